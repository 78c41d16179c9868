"""Triton 3.6's interpreter makes ints of arrays of one element by `int(array)`, which NumPy refuses from 2.4 on."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Give tensors the `__index__` of later versions; called before a kernel is interpreted."""
    from triton.runtime import interpreter

    from pst_kernels.triton.tiles import versions

    if versions.INSTALLED >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
