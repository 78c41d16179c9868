"""The configuration files for `accelerate launch`: what Accelerate reads out of them, and what it shards a model into.

Accelerate itself starts neither engine on CPUs; the engines are run by test_distributed.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import toys

import pst_kernels as pst

pytest.importorskip("accelerate")
FOLDER = Path(__file__).parents[1] / "configs"


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
        name for name, module in model.named_modules() if type(module).__name__ in ("BertLayer", "BertEmbeddings")
    ]


def test_the_job_refuses_to_be_sharded(monkeypatch, tmp_path, capsys):
    from pst_kernels import cli

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert cli.main(["finetune", "--output", str(tmp_path / "run")]) == 2
    assert "shares batches, not weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
