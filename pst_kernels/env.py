"""The package's own environment variables, read here and nowhere else; which backend serves a device; the machine.

PST_KERNELS_BACKEND   auto (default), triton or torch
PST_KERNELS_CPU       auto (default), numba or torch: how the passes over W on a CPU are made
PST_KERNELS_ARCH      choose tiles for this target, such as sm_90, instead of the device at hand
PST_KERNELS_TUNING    a JSON file written by `pst-kernels tune`
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

BACKENDS = ("auto", "triton", "torch")
CPU_PASSES = ("auto", "numba", "torch")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy", "numba")


def _choice(name: str, allowed: tuple[str, ...], default: str | None) -> str | None:
    value = os.environ.get(name, "").strip() or default
    if value is not None and value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; set it to one of {', '.join(allowed)}, or unset it")
    return value


def backend() -> str:
    """The requested backend: "auto", "triton" or "torch"."""
    return str(_choice("PST_KERNELS_BACKEND", BACKENDS, "auto"))


def cpu() -> str:
    """How the passes over W are made on a CPU: "auto", "numba" or "torch"."""
    return str(_choice("PST_KERNELS_CPU", CPU_PASSES, "auto"))


def architecture() -> str | None:
    """The requested target, such as "sm_90", or None for that of the device at hand."""
    return _choice("PST_KERNELS_ARCH", ARCHITECTURES, None)


def tuning_file() -> Path | None:
    """The user's table of tiles, or None. Raises ValueError when the file is not there."""
    value = os.environ.get("PST_KERNELS_TUNING", "").strip()
    if not value:
        return None
    path = Path(value)
    if not path.is_file():
        raise ValueError(
            f"PST_KERNELS_TUNING={value!r} is not a file; set it to a JSON file written by `pst-kernels tune`,"
            " or unset it"
        )
    return path


def variables() -> dict[str, str]:
    """Every variable and its value now; a bad value raises, as it would in use."""
    return {
        "PST_KERNELS_BACKEND": backend(),
        "PST_KERNELS_CPU": cpu(),
        "PST_KERNELS_ARCH": architecture() or "of the device",
        "PST_KERNELS_TUNING": str(tuning_file() or "none"),
    }


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend_for(device_type: str) -> tuple[str, str]:
    """The backend for tensors on a device, and why. Raises ImportError when an explicit request cannot be met."""
    requested = backend()
    if requested == "torch":
        return "torch", "PST_KERNELS_BACKEND=torch"
    if requested == "triton":
        if not has_triton():
            raise ImportError(
                "PST_KERNELS_BACKEND=triton, but triton is not installed; install it or unset the variable"
            )
        return "triton", "PST_KERNELS_BACKEND=triton"
    if device_type != "cuda":
        return "torch", f"no kernels for {device_type} tensors"
    if not has_triton():
        return "torch", "triton is not installed"
    return "triton", "CUDA tensors and triton is installed"


def versions() -> dict[str, str]:
    """Installed version of every package that matters here, "not installed" where it is absent."""
    found = {"pst_kernels": _version("pst_kernels"), "python": platform.python_version()}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str | int]:
    """What a results file must say about where it was measured."""
    import torch

    info: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name(0)
    return info


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
