"""How the passes are compiled, and where their machine code is kept.

Numba keeps the code of a function until the function's own file changes. That is too little here, where functions of
several files are compiled into one: the code is kept in a folder that is named after all sources of this one, beside
Python's own compiled files, or in Numba's folder of the user where that cannot be written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.compiler import CompilerBase, DefaultPassBuilder


@functools.cache
def cache_folder() -> Path:
    """NUMBA_CACHE_DIR is respected."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    root = Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else Path(__file__).parent / "__pycache__"
    return root / f"pst_kernels-{digest}"


@contextlib.contextmanager
def _kept_in_the_cache_folder() -> Iterator[None]:
    """Numba asks for the folder when it meets a function."""
    folder, before = str(cache_folder()), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = folder
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


class _NoAlias(CompilerBase):
    """Numba's compiler, told that no array of a call overlaps one that the call writes to.

    Without that each loop starts by comparing the addresses, and with more than a few arrays it stays scalar.
    """

    def define_pipelines(self) -> list:
        self.state.flags.noalias = True
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


# A product and a sum may become one fused instruction; sums keep their order, so that all passes see the same W' and S.
_EXACT = {"contract", "nsz"}
# The code of parts is in that of the passes that call them, so it is neither kept on disk nor callable by address:
# a sixth of the time that compiling takes.
_part = functools.partial(numba.njit, error_model="numpy", nogil=True, no_cfunc_wrapper=True)
row = _part(fastmath=_EXACT, pipeline_class=_NoAlias)
# A sum along a row may be split over vector lanes.
reduction = _part(fastmath=_EXACT | {"reassoc"}, pipeline_class=_NoAlias)
part = _part(fastmath=_EXACT)
# put in place by Numba: as a call, what a loop does with arrays of its caller's took 7 % of a small product
inlined = _part(fastmath=_EXACT, inline="always")


def whole_pass(function: Callable) -> Any:
    """A pass, called by its address with that of its arguments; its code is kept on disk."""
    with _kept_in_the_cache_folder():
        return numba.cfunc(types.void(types.int64), error_model="numpy", fastmath=_EXACT, cache=True)(function)
