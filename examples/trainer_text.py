"""`transformers.Trainer` on a text file: one text and its label a line, with a tab between them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import pst_kernels as pst

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", type=Path)
parser.add_argument("--model", required=True, help="folder or name of a pretrained model")
parser.add_argument("--teacher", help="folder of a dense model that was trained on the same labels")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output", default="runs/trainer_text")
options = parser.parse_args()

pairs = [line.rstrip("\n").rsplit("\t", 1) for line in options.file.open(encoding="utf-8") if "\t" in line]
names = sorted({label for _, label in pairs})
tokenizer = AutoTokenizer.from_pretrained(options.model)
labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
model = AutoModelForSequenceClassification.from_pretrained(options.model, **labels)
config = pst.PSTConfig.preset("accurate", sparsity=0.9)
model = pst.replace_linear(model, config)

texts = [tokenizer(text, truncation=True, max_length=96) | {"labels": names.index(label)} for text, label in pairs]
arguments = TrainingArguments(
    options.output, max_steps=options.steps, per_device_train_batch_size=16, report_to=[], save_strategy="no",
    logging_steps=max(1, options.steps // 10), use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
optimizer = torch.optim.AdamW(pst.parameter_groups(model, lr=1e-4), weight_decay=0.0)
settings = {
    "model": model, "args": arguments, "train_dataset": texts, "data_collator": DataCollatorWithPadding(tokenizer),
    "optimizers": (optimizer, None), "callbacks": [pst.PSTCallback()],
}  # fmt: skip
if options.teacher:
    trainer = pst.DistillationTrainer(teacher=options.teacher, precompute=True, **settings)
else:
    from transformers import Trainer

    trainer = Trainer(**settings)
trainer.train()
pst.save_sparse(model, options.output, tokenizer=tokenizer)
print(f"{len(texts)} texts, {len(names)} labels; the sparse model is in {options.output}")
