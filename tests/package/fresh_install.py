"""Builds the wheel and the sdist, installs each into an empty environment, and runs README's quick start there.

    python tests/package/fresh_install.py [--python python3.12] [--tests layers ops]

All of it in a temporary folder, with no repository beside it. `make package` runs this with the Python of .venv;
ARGS="--python ..." tries another version of Python, for which pip may fetch a torch of several GB. `--tests` runs the
quick tests of these folders against the installed wheel as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pages import ROOT, blocks

CONSTRAINTS = ROOT / "constraints.txt"
WHERE = "import pathlib, pst_kernels; print(pathlib.Path(pst_kernels.__file__).parent)"


def run(command: Sequence[str | Path], folder: Path) -> str:
    """What a command prints, in a folder and without this process's own paths; ends the script when it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PST_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_tree(target: Path) -> None:
    """What git tracks or would, as it lies in the working tree."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def build(python: str, work: Path) -> list[Path]:
    """The wheel and the sdist, by `python -m build`."""
    copy_tree(work / "tree")
    run([python, "-m", "venv", work / "builder"], work)
    builder = work / "builder" / "bin" / "python"
    run([builder, "-m", "pip", "install", "--quiet", "build"], work)
    run([builder, "-m", "build", "--outdir", work / "dist", work / "tree"], work)
    for name in ("tests", "bench", "pyproject.toml"):  # as the working tree was then, for `--tests`
        (work / "tree" / name).rename(work / name)
    shutil.rmtree(work / "tree")
    (wheel,), (sdist,) = (list((work / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    print(f"{wheel.name}: {len(zipfile.ZipFile(wheel).namelist())} files, {wheel.stat().st_size / 1e3:.0f} kB")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e3:.0f} kB")
    return [wheel, sdist]


def quick_start(python: Path, folder: Path) -> None:
    """README's first block in an empty folder; ends the script unless it prints what README says."""
    (code, expected), *_ = blocks("README")
    folder.mkdir()
    (folder / "quick_start.py").write_text("import torch; torch.manual_seed(0)\n" + code)
    printed = run([python, "quick_start.py"], folder)
    if printed != expected:
        sys.exit(f"the quick start printed\n{printed}README says\n{expected}")
    print(printed, end="")
    command = python.with_name("pst-kernels")
    run([command, "env"], folder)
    print(run([command, "show", "runs/sparse"], folder).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environments")
    parser.add_argument("--tests", nargs="+", default=(), metavar="FOLDER", help="of tests/, to run in the first one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        made = build(options.python, work)
        run([options.python, "-m", "venv", work / "fresh"], work)
        python = work / "fresh" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS]
        run([*install, "torch"], work)  # first, so that no dependency of the rest chooses another build of it
        for kind, file in zip(("wheel", "sdist"), made, strict=True):
            started = time.monotonic()
            run([*install, f"{file}[finetune]"], work)
            where = Path(run([python, "-c", WHERE], work).strip())
            if work not in where.parents or not (where / "py.typed").is_file():
                sys.exit(f"the {kind} was installed into {where}, or without py.typed")
            print(f"\n{kind}, installed in {time.monotonic() - started:.0f} s; README's quick start:")
            quick_start(python, work / f"empty_{kind}")
            if kind == "wheel":
                check_types(python, work)
                if options.tests:
                    run_tests(python, install, work, options.tests)
            run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "pst_kernels"], work)
            shutil.rmtree(where, ignore_errors=True)  # compiled files


def check_types(python: Path, work: Path) -> None:
    """`mypy --strict` of a user's program, with the package as it is installed there."""
    shutil.copy(Path(__file__).with_name("typed_user.py"), work)
    run([sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "typed_user.py"], work)
    print("mypy --strict takes tests/package/typed_user.py")


def run_tests(python: Path, install: Sequence[str | Path], work: Path, folders: Sequence[str]) -> None:
    """Those that are neither slow nor compile kernels, away from the package's sources."""
    run([*install, "pytest", "hypothesis"], work)
    chosen = ["-m", "not gpu and not slow and not compiled", *(f"tests/{folder}" for folder in folders)]
    print(run([python, "-m", "pytest", "-q", *chosen], work).splitlines()[-1])


if __name__ == "__main__":
    main()
