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
    _share_shapes()
    _broadcast_if_needed()
    _convert_if_needed()
    _check_no_overflow()
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
    languages: dict[Callable, set[int]] = {}  # that a function's module has by some name

    def restore() -> None:
        patched.clear()
        while scopes:
            interpreter._LangPatchScope.restore(scopes.pop())

    def patch_once(function: Callable) -> Any:
        if function not in languages:
            values = function.__globals__.values()
            languages[function] = {id(value) for value in values if value is tl or value is tl.core}
        names = languages[function]
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


def _share_shapes() -> None:
    """A block's type checks its shape and writes its name, and a tensor makes another form of the shape, at each step:
    make each once."""
    import triton.language as tl

    make_type, make_tensor, equal = tl.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    tensors: dict[int, tuple[Any, dict[str, Any]]] = {}  # by the identity of a shape, which is kept with it

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        key = id(element_ty), sizes
        if key not in types:
            make_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            types[key] = dict(vars(self))  # with the element's type: nothing else takes its identity
        vars(self).update(types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) not in tensors:
            make_tensor(self, handle, type)
            tensors[id(shape)] = shape, {"shape": self.shape, "numel": self.numel}
        vars(self).update(tensors[id(shape)][1], handle=handle, type=type, dtype=type.scalar)

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor  # type: ignore[method-assign]
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)  # type: ignore[method-assign]


def _broadcast_if_needed() -> None:
    """Two blocks of one shape are compared in ways that take longer than their sum."""
    from triton.language.semantic import TritonSemantic

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_if_needed(self: Any, left: Any, right: Any) -> Any:
        one, other = left.type, right.type
        if one.is_block() and other.is_block() and one.shape is other.shape:
            return left, right
        return broadcast(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast_if_needed  # type: ignore[method-assign]


def _convert_if_needed() -> None:
    """Two operands of one type are what an operation takes, but where halves are divided. A number beside a block
    becomes the same block each time: no operation writes to its operands."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_type_checking_impl
    blocks: dict[tuple, tuple[Any, Any]] = {}  # the block of a number beside one of a type, which is kept with it

    def convert_if_needed(
        self: Any, left: Any, right: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        given = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if isinstance(left, tl.tensor):
            if isinstance(right, tl.tensor):
                one, other = left.type, right.type
                same = left.dtype is right.dtype and one.is_block() and other.is_block() and one.shape is other.shape
                if same and not div_or_mod and not left.dtype.is_ptr():
                    return left, right
            elif left.type.is_block() and not left.dtype.is_ptr() and not div_or_mod:
                key = id(left.type.shape), id(left.dtype), type(right), repr(right), arithmetic_check
                if key not in blocks:
                    found, block = check(self, left, right, *given)
                    if found is not left:
                        return found, block
                    blocks[key] = left.type, block
                return left, blocks[key][1]
        return check(self, left, right, *given)

    TritonSemantic.binary_op_type_checking_impl = convert_if_needed  # type: ignore[method-assign]


def _check_no_overflow() -> None:
    """Each sum of integers is made again in 64 bits, for an assertion that is left out."""
    from triton.language.semantic import TritonSemantic

    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *given: None  # type: ignore[method-assign]


def _index_by_item(interpreter: ModuleType) -> None:
    """Triton 3.6 makes ints of arrays of one element by `int(array)`, which NumPy refuses from 2.4 on: give tensors the
    `__index__` of later versions."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
