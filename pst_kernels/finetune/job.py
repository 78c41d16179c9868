"""The order of things: check, read, train each method in its own process, report. And how a stopped run goes on."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from .. import env
from ..files import read_json, write_json
from . import presets, processes
from .allocator import keep_freed_memory
from .data import Dataset, load
from .result import read_result
from .settings import METHODS, Settings, from_arguments

# Below the output folder: what --resume reads, and the trainer's checkpoints while they are needed.
STATE, RUN = "state", "run.json"
PRODUCTS = ("results.json", "curves.png", *METHODS, *(f".{method}.tmp" for method in METHODS), STATE)
REFUSED = 3  # exit status of a training process that could not convert the model


class RefusedError(Exception):
    """A training process ended with REFUSED."""


def main(args: argparse.Namespace) -> int:
    """Run the job; 0 when done, 1 when training failed, 2 when PST cannot convert the model, 130 when interrupted.

    Raises ValueError for a bad request.
    """
    started = time.monotonic()
    settings = from_arguments(args)
    dataset = _prepare(settings, args.resume, args.overwrite)
    settings = settings.with_steps_for(len(dataset.train))
    trains = processes.is_first() and read_result(settings.folder / STATE, "pst") is None
    if trains and (told := presets.note(settings)):
        print(f"note: {told}")
    again = "; the same command with --resume goes on from the last checkpoint"
    try:
        results = _train(settings, dataset)
    except RefusedError:
        return 2  # the training process has said why
    except RuntimeError as error:
        print(f"pst-kernels finetune: {error}{again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pst-kernels finetune: interrupted{again}", file=sys.stderr)
        return 130
    if not processes.is_first():
        return 0
    from . import report

    report.draw_curves(settings.folder / "curves.png", results)
    report.write_results(settings.folder / "results.json", results, settings, dataset)
    report.print_table(results, settings)
    print(f"Written to {settings.folder} in {time.monotonic() - started:.0f} s:")
    for name in ("results.json", "curves.png", "dense", "pst/adapter", "pst/sparse", "pst/merged"):
        if (settings.folder / name).exists():
            print(f"  {settings.folder / name}")
    return 0


def _prepare(settings: Settings, resume: bool, overwrite: bool) -> Dataset:
    """Everything that can be wrong before training is found here, before anything is written."""
    folder = settings.folder
    if settings.batch_size % processes.count():
        raise ValueError(
            f"--batch-size {settings.batch_size} must be a multiple of the {processes.count()} processes, which share"
            " each batch evenly"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "the job shares batches, not weights, among processes; launch it without FSDP, with"
            " configs/accelerate_ddp.yaml or torchrun"
        )
    if not processes.is_first():  # the first process sees to the folder
        _stay_offline(settings)
        return _load(settings)
    existing = [name for name in PRODUCTS if (folder / name).exists()]
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output {folder} is a file; give a folder")
    if existing and not (resume or overwrite):
        raise FileExistsError(
            f"--output {folder} holds a run already ({', '.join(existing)}); go on with --resume,"
            " start anew with --overwrite, or give another folder"
        )
    dataset = _load(settings)
    print(dataset.summary())
    for note in dataset.notes:
        print(f"note: {note}")
    from . import models

    _stay_offline(settings)
    for note in models.check(settings, dataset.labels):
        print(f"note: {note}")
    run = {"settings": settings.fixed(), "data": dataset.fingerprint()}
    if resume and (folder / STATE / RUN).is_file():
        _check_same(run, read_json(folder / STATE / RUN, "the settings of the run to resume"), folder)
    elif resume and existing:
        raise ValueError(f"--resume: {folder} has no {STATE}/{RUN}, so nothing can go on there; use --overwrite")
    else:
        for name in existing:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(folder / STATE / RUN, run)
    return dataset


def _stay_offline(settings: Settings) -> None:
    """Nothing of a local model needs the network; training processes inherit the variable, those forked from a server
    as it was when this process first trained.
    """
    from . import models

    if Path(models.model_name(settings)).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _load(settings: Settings) -> Dataset:
    train, validation, test = (
        Path(name) if name else None for name in (settings.train_file, settings.validation_file, settings.test_file)
    )
    return load(train, validation, test, settings.text_column, settings.label_column, settings.seed)


def _check_same(now: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    now = json.loads(json.dumps(now))
    for name, value in now["settings"].items():
        if value != before.get("settings", {}).get(name):
            raise ValueError(
                f"--resume: the run in {folder} had {name} = {before.get('settings', {}).get(name)!r}, now it is"
                f" {value!r}; give the same settings, or --overwrite"
            )
    if now["data"] != before.get("data"):
        raise ValueError(f"--resume: the texts are not those of the run in {folder}; restore them, or use --overwrite")


def _train(settings: Settings, dataset: Dataset) -> dict[str, Any]:
    """The results of every method, each trained unless an earlier run did."""
    work = settings.folder / STATE
    results = {}
    compiling = _compile_beside() if "pst" in settings.methods and read_result(work, "pst") is None else None
    for method in settings.methods:
        if method == "pst" and compiling is not None:
            compiling.join()
        result = read_result(work, method)
        if result is None or processes.count() > 1:  # of several, the first one's look at the folder decides
            # not forked from this process: a fresh one, whose memory is that of its own method
            process = _context().Process(target=_child, args=(method, settings, dataset, work), name=method)
            process.start()
            try:
                process.join()
            finally:
                process.terminate()
                process.join()
            if process.exitcode == REFUSED:
                raise RefusedError
            if process.exitcode:
                raise RuntimeError(f"training {method} ended with exit status {process.exitcode}")
            result = read_result(work, method)
            if result is None:
                raise RuntimeError(f"training {method} ended without a result")
        results[method] = result
    return results


def _compile_beside() -> Any:
    """Started, or None where PyTorch knows of a GPU: a process that compiles the CPU's passes, if this is their first
    use, while the dense model trains. What a compiler takes is then no part of the memory that PST is said to need.
    """
    if torch.accelerator.is_available() or not processes.is_first():
        return None
    process = _context().Process(target=_compile, name="compile", daemon=True)
    process.start()
    return process


def _compile() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if env.cpu() != "torch":
        from ..cpu.compiled.__main__ import compile_all

        with contextlib.suppress(ImportError):  # of Numba: training says so
            compile_all()


def _context() -> Any:
    """Where PyTorch knows of no GPU, training processes are forked from one that has imported what they need, which
    takes seconds, and has done nothing else. CUDA in a forked process is not to be relied on.
    """
    if not sys.platform.startswith("linux") or torch.version.cuda or torch.version.hip:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.train"])
    return context


def _child(method: str, settings: Settings, dataset: Dataset, work: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    from . import presets
    from .train import run

    try:
        run(method, settings, dataset, work)
    except presets.ConversionError as error:
        print(f"pst-kernels finetune: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def _end_with_parent() -> None:
    """A training process must not go on writing when the command was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
