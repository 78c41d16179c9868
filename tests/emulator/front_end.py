"""What decides the code of a compiled kernel, and the digests of it by which tests keep what a compiler made.

Two digests: of the code that Triton's front end makes, and of the kernel's source in its place, as the front end takes
its time. A comment or a line's number changes the second alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.compiler import ASTSource, make_backend


@functools.cache
def _context(backend: str) -> Any:
    return ir.context()


def _anywhere(options: Any) -> dict[str, Any]:
    """Options without the folder that Triton is installed in, which differs from clone to clone."""
    return vars(options) | {"extern_libs": [(name, Path(path).name) for name, path in options.extern_libs]}


class FrontEnd(NamedTuple):
    """Of a binary: what the front end needs to make its code."""

    target: Any
    backend: Any
    source: ASTSource
    options: Any

    @classmethod
    def of(cls, source: ASTSource, target: Any, options: dict[str, Any]) -> FrontEnd:
        backend = make_backend(target)
        return cls(target, backend, source, backend.parse_options(options | source.parse_options()))

    def code(self) -> str:
        context = _context(self.target.backend)
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions = self.backend.get_codegen_implementation(self.options), self.backend.get_module_map()
        return self.source.make_ir(self.target, self.options, *functions, context).str_nodebug()

    def digest(self, *more: Any) -> str:
        """By the code that the front end makes. more: what else decides the thing that is kept."""
        return self._digest(self.code(), more)

    def source_digest(self, *more: Any) -> str:
        """By the kernel's source."""
        return self._digest(self.source.hash(), more)  # what Triton's own cache goes by

    def key(self, sources: Mapping[str, str], *more: Any) -> str:
        """`digest`, by the shorter way where the source is as it was. sources: the one by the other."""
        return sources.get(self.source_digest(*more)) or self.digest(*more)

    def _digest(self, text: str, more: tuple[Any, ...]) -> str:
        decided = (
            triton.__version__, self.backend.hash(), text, sorted(_anywhere(self.options).items(), key=str), *more,
            *sorted(get_cache_invalidating_env_vars().items()),
        )  # fmt: skip
        return hashlib.sha256(repr(decided).encode()).hexdigest()[:24]
