"""The configuration files for `accelerate launch`: what Accelerate reads out of them, and FSDP2 run by one of them.

The one for DDP is run by test_readme.py. Accelerate has no FSDP on CPUs; accelerate_worker.py says what it does
about it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import toys

import pst_kernels as pst

pytest.importorskip("accelerate")
import accelerate_worker as worker

FOLDER = Path(__file__).parents[2] / "configs"


def environment(name: str) -> dict[str, str]:
    """The variables that `accelerate launch` gives every process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert defaults is not None
    assert arguments.num_processes == 2
    return prepare_multi_gpu_env(arguments)


def test_ddp():
    found = environment("accelerate_ddp.yaml")
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_USE_FSDP" not in found


def test_fsdp2_shards_by_transformer_block(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    found = environment("accelerate_fsdp2.yaml")
    assert found["ACCELERATE_USE_FSDP"] == "true"
    for name, value in found.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    model = pst.replace_linear(toys.seeded())
    plugin.set_auto_wrap_policy(model)
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
    # Accelerate shards a block as one group: all factors of a block come together with its weights
    assert [name for name, module in model.named_modules() if chosen(module)] == [
        f"bert.encoder.layer.{i}" for i in range(2)
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the checkpoint is loaded by one process
def test_fsdp2_trains_as_one_process_and_its_checkpoint_loads_into_one(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "accelerate_fsdp2.yaml")]
    paths = [*map(str, Path(worker.__file__).parents[:2]), str(FOLDER.parent)]
    done = subprocess.run(
        [sys.executable, *launcher, "--main_process_port", "0", worker.__file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    result = torch.load(tmp_path / "result.pt")
    assert result["found"] == "MULTI_CPU"  # README, Limits
    assert "FSDPBertLayer" in result["sharded"]

    single = worker.build()
    worker.train(single, worker.sgd(single))
    expected = toys.snapshot(single)
    saved = {"model": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}
    dcp.load(saved, checkpoint_id=tmp_path / "pytorch_model_fsdp_0")
    for found in (result["state"], saved["model"]):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if name.endswith(("pst_mask", "pst_num_pruned")):
                assert torch.equal(found[name], tensor), name
            else:
                torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_the_job_refuses_to_be_sharded(monkeypatch, tmp_path, capsys):
    from pst_kernels import cli

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert cli.main(["finetune", "--output", str(tmp_path / "run")]) == 2
    assert "shares batches, not weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
