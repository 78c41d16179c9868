"""Fine-tune through transformers.Trainer, kill the process in mid-run, resume, and compare every bit of the weights.

    python tests/finetune/kill_and_resume.py [FOLDER]

One run is left alone. Another is a process of its own, killed (SIGKILL, so that nothing can be tidied up) at a moment
that nothing in it knows of, and resumed from its last whole checkpoint by a model with other random numbers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds toys.py
import toys
import transformers

import pst_kernels as pst
from pst_kernels.finetune.callbacks import COMPLETE, MarkComplete, newest_checkpoint

STEPS, SAVE_STEPS = 40, 3


class Slow(transformers.TrainerCallback):
    """Time for the kill to come in the middle."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.05)


def train(folder: Path, seed: int = 0, slowly: bool = False) -> dict[str, torch.Tensor]:
    """Train to the end, from the last whole checkpoint in `folder` if there is one; returns the state dict."""
    torch.set_num_threads(1)
    base = toys.seeded(hidden_dropout_prob=0.1)
    torch.manual_seed(seed)
    model = pst.replace_linear(base, pst.PSTConfig(sparsity=0.8))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=SAVE_STEPS, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="cosine", report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=10, seed=3,
    )  # fmt: skip
    callbacks = [pst.PSTCallback(), MarkComplete(), *([Slow()] if slowly else [])]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=toys.Examples(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder, STEPS))
    return toys.snapshot(model)


def kill_in_the_middle(folder: Path) -> int:
    """Start a run and kill it some time after its first checkpoint; returns the last step of a whole checkpoint."""
    process = subprocess.Popen([sys.executable, __file__, str(folder), "--child"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(folder.glob(f"checkpoint-*/{COMPLETE}")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the run ended with status {process.wait()} before it could be killed")
        time.sleep(0.01)
    time.sleep(0.4)
    process.kill()
    process.wait()
    return max(int(path.parent.name.rpartition("-")[2]) for path in folder.glob(f"checkpoint-*/{COMPLETE}"))


def main(folder: Path) -> int:
    whole = train(folder / "whole")
    stopped = kill_in_the_middle(folder / "killed")
    resumed = train(folder / "killed", seed=99)
    other = toys.differences(whole, resumed)
    print(f"killed after step {stopped} of {STEPS}, resumed; of {len(whole)} tensors {len(other)} differ")
    return 0 if not other and 0 < stopped < STEPS else 1


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if sys.argv[2:] == ["--child"]:
        train(Path(sys.argv[1]), slowly=True)
    elif len(sys.argv) > 1:
        raise SystemExit(main(Path(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            raise SystemExit(main(Path(temporary)))
