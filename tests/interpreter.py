"""Triton's interpreter, mended before a kernel is interpreted: made quicker, and Triton 3.6's made to run at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


def mend() -> None:
    from triton.runtime import interpreter

    from pst_kernels.triton.tiles import versions

    _patch_once(interpreter)
    _remember_types(interpreter)
    if versions.INSTALLED < (3, 7):
        _index_by_item(interpreter)
    _take_large_steps()


def _take_large_steps() -> None:
    """A step takes its time whatever its size, and no bit depends on that. The emulator runs the shipped tiles."""
    from pst_kernels.triton import sweep

    shipped = sweep.tile_of

    def tile_of(ranks: int) -> sweep.SweepTile:
        tile = shipped(ranks)
        return tile._replace(block_i=max(16, tile.block_i))

    sweep.tile_of = tile_of


def _patch_once(interpreter: ModuleType) -> None:
    """Every call of a function within a kernel puts the interpreter's own in the place of all of triton.language again,
    half of the time: do so once a launch."""
    import triton.language as tl

    patch, scopes, patched = interpreter._patch_lang, [], set()

    def restore() -> None:
        patched.clear()
        while scopes:
            interpreter._LangPatchScope.restore(scopes.pop())

    def patch_once(function: Callable) -> Any:
        names = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if names and names <= patched:
            return interpreter._LangPatchScope()
        scopes.append(patch(function))
        patched.update(names)
        if len(scopes) == 1:  # of the kernel itself, which restores it at its end
            scopes[0].restore = restore
        return scopes[-1]

    interpreter._patch_lang = patch_once


def _remember_types(interpreter: ModuleType) -> None:
    """NumPy's type for one of Triton's is found in a table that is made anew each time."""
    import triton.language as tl

    of_scalar, of_pointer = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)

    def np_dtype(found: tl.dtype) -> np.dtype:
        element = found.element_ty if isinstance(found, tl.block_type) else found
        return of_pointer if isinstance(element, tl.pointer_type) else of_scalar(element)

    interpreter._get_np_dtype = np_dtype


def _index_by_item(interpreter: ModuleType) -> None:
    """Triton 3.6 makes ints of arrays of one element by `int(array)`, which NumPy refuses from 2.4 on: give tensors the
    `__index__` of later versions."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
