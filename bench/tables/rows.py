"""Rows of results, and the one CSV they live in: new rows take the place of old ones of the same measurement."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pst_kernels import env
from pst_kernels.files import replacing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parents[1] / "results"
CSV_NAME = "benchmark.csv"


@dataclass
class Row:
    """One provider in one case. Times in ms; a ratio is over `ratio_to` in the same round, None if refused."""

    provider: str
    mode: str
    shape: str
    out_features: int
    in_features: int
    tokens: int
    dtype: str
    device: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    ratio: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    ratio_to: str
    check: str  # "ok", or what the correctness check found
    kept_bytes: int | None  # from forward to backward, beyond the input and the parameters
    peak_bytes: int | None  # most that a run allocates at one time, on top of parameters and optimizer state
    parameter_bytes: int | None  # parameters and buffers, trained or not
    optimizer_bytes: int | None
    trainable: int | None
    adamw: str
    machine: str
    threads: int
    versions: str
    date: str
    commit: str

    @property
    def memory_bytes(self) -> int | None:
        """Parameters, optimizer state, and the most that a run allocates on top of them."""
        if self.peak_bytes is None or self.parameter_bytes is None:
            return None
        return self.parameter_bytes + self.peak_bytes + (self.optimizer_bytes or 0)

    @property
    def key(self) -> tuple:
        """Rows of the same key are the same measurement, taken again."""
        return (
            self.provider, self.mode, self.shape, self.tokens, self.dtype, self.device, self.adamw, self.machine,
            self.threads,
        )  # fmt: skip


COLUMNS = [field.name for field in dataclasses.fields(Row)]
_INTEGERS = {"out_features", "in_features", "tokens", "rounds", "threads"}
_OPTIONAL_INTEGERS = {"kept_bytes", "peak_bytes", "parameter_bytes", "optimizer_bytes", "trainable"}
_FLOATS = {"median_ms", "p20_ms", "p80_ms"}
_OPTIONAL_FLOATS = {"ratio", "ratio_p20", "ratio_p80"}


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_text(getattr(row, column)) for column in COLUMNS])


def read_csv(path: Path) -> list[Row]:
    """Rows of a file written by `write_csv`. Raises FileNotFoundError or ValueError that say what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `python -m bench` first, or name another file with --csv")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} has columns {reader.fieldnames}, expected {COLUMNS}; run `python -m bench` again")
        return [_row(values) for values in reader]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The old rows, those measured again replaced where they stood, the rest of the new ones after them."""
    rows = {row.key: row for row in old}
    rows.update({row.key: row for row in new})
    return list(rows.values())


def versions() -> str:
    found = env.versions()
    return " ".join(f"{name} {found[name]}" for name in ("python", "torch", "numpy", "triton", "transformers"))


def machine() -> str:
    info = env.machine()
    gpu = f", {info['gpu']}" if "gpu" in info else ""
    return f"{info['processor']}, {info['cores']} cores{gpu}"


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def commit() -> str:
    """The checkout's commit, with "+" behind it when the package or the benchmark differs from it.

    The variable BENCH_COMMIT says it for a copy that has no git, or another commit's.
    """
    if said := os.environ.get("BENCH_COMMIT", "").strip():
        return said
    try:
        short = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "pst_kernels", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return short + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(values: dict[str, str]) -> Row:
    def convert(name: str, text: str) -> object:
        if name in _INTEGERS:
            return int(text)
        if name in _FLOATS:
            return float(text)
        if name in _OPTIONAL_INTEGERS:
            return int(text) if text else None
        if name in _OPTIONAL_FLOATS:
            return float(text) if text else None
        return text

    return Row(**{name: convert(name, values[name]) for name in COLUMNS})  # type: ignore[arg-type]
