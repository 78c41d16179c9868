"""`pst-kernels show DIR`: where the zeros of a saved folder lie, layer by layer, as a table and as one PNG.

`reading` looks into the folder, `drawing` prints and draws. Importing this is cheap.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

PACKAGES = ("transformers", "matplotlib", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", type=Path,
        help="a folder of save_sparse, an adapter of save_pretrained, or a transformers folder with zeros",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="BASE", type=Path, help="of an adapter: the folder of its base model, for the scores"
    )
    parser.add_argument(
        "--output", metavar="FILE.png", type=Path, help="the picture; by default zeros_NAME.png in the current folder"
    )


def main(options: argparse.Namespace) -> int:
    """Raises ValueError or OSError for what cannot be read, before anything is written."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; run: pip install 'pst_kernels[finetune]'")
    picture = options.output or Path(f"zeros_{options.directory.resolve().name}.png")
    if picture.suffix.lower() != ".png" or picture.is_dir():
        raise ValueError(f"--output {picture} must be the name of a .png file")
    from .drawing import draw, print_table
    from .reading import look

    folder = look(options.directory, options.model)
    draw(folder, picture)
    print_table(folder)
    print(f"The picture is in {picture}")
    return 0
