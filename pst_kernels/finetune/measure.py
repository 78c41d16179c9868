"""What the final table says, each number taken from the process or the file it is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open

MEGABYTE = 1e6


@dataclass
class Zeros:
    """Zeros counted in a saved checkpoint: in every pruned matrix, in all of those, and in the whole file."""

    matrices: dict[str, tuple[int, int]]  # name -> (zeros, numel)
    model_zeros: int
    model_numel: int

    @property
    def pruned_share(self) -> float:
        return sum(zeros for zeros, _ in self.matrices.values()) / sum(numel for _, numel in self.matrices.values())

    @property
    def model_share(self) -> float:
        return self.model_zeros / self.model_numel

    def to_dict(self) -> dict:
        return asdict(self)


def count_zeros(folder: Path, layers: Iterable[str]) -> Zeros:
    """Read every tensor of the safetensors files in `folder`; `layers` are the modules whose `.weight` PST prunes."""
    wanted = {f"{name}.weight" for name in layers}
    matrices, zeros, numel = {}, 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no dict)
                tensor = file.get_tensor(key)
                count = tensor.numel() - int(torch.count_nonzero(tensor))
                zeros, numel = zeros + count, numel + tensor.numel()
                if key in wanted:
                    matrices[key] = (count, tensor.numel())
    if missing := wanted - matrices.keys():
        raise RuntimeError(f"{folder} lacks {len(missing)} of {len(wanted)} pruned weights, such as {min(missing)}")
    return Zeros(matrices, zeros, numel)


def weights_mb(folder: Path) -> float:
    """Size of the weight files of a checkpoint, without tokenizer and configuration."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / MEGABYTE


def memory_mb(peak: bool) -> float:
    """Resident memory of this process now, or its highest so far (VmHWM).

    VmHWM starts anew with a process, spawned or forked; ru_maxrss, the fallback off Linux, may include the parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE
    field = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024 / MEGABYTE
