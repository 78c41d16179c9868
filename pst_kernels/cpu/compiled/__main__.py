"""`python -m pst_kernels.cpu.compiled` compiles all passes now, say when an image is built: no first call waits."""

from __future__ import annotations

import importlib
import pkgutil

from . import __path__


def compile_all() -> list[str]:
    """Import what compiles itself as it is imported; returns the modules' names."""
    names = [f"{__package__}.{found.name}" for found in pkgutil.iter_modules(__path__) if found.name != "__main__"]
    for name in names:
        importlib.import_module(name)
    return names


if __name__ == "__main__":
    compile_all()
    from .jit import cache_folder

    print(f"All passes are compiled and kept in {cache_folder()}")
