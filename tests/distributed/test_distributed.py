"""Several processes on this machine (gloo): DistributedDataParallel, FSDP2 and tensor parallelism train as one does.

One launch of four processes makes all results (distributed_worker.py), on meshes of four and of two.
"""

from __future__ import annotations

from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import toys
from processes import launch

import pst_kernels as pst
from pst_kernels import reference
from pst_kernels.masks.patterns import num_pruned_at
from pst_kernels.masks.sharded_selection import ordered, score_of
from pst_kernels.model import pst_layers

LAUNCH = """
import sys, torch.multiprocessing as mp, distributed_worker as worker
if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["distributed_worker"])  # imported once for all
    mp.start_processes(worker.run, (sys.argv[1],), nprocs=worker.RANKS, start_method="forkserver")
"""
SHARDED = ("fsdp2", "tensor parallel")


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    return launch(folder, LAUNCH, worker)


@pytest.fixture(scope="module")
def results(launched) -> list[dict]:
    """What each of the four processes found."""
    return [torch.load(launched / f"{rank}.pt") for rank in range(worker.RANKS)]


@pytest.fixture(scope="module")
def single() -> worker.Training:
    torch.manual_seed(0)
    return worker.Training().run()


def assert_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same masks, and values within 1e-6."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(("pst_mask", "pst_num_pruned")):
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_ddp_trains_as_one_process_with_the_same_mask_on_every_rank(results, single):
    assert single.made == 3 * worker.STEPS  # three layers, one mask a step each
    for found in results:
        made, state = found["ddp"]
        assert made == single.made
        assert not toys.differences(state, results[0]["ddp"][1])
    assert_state(results[0]["ddp"][1], single.state())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("engine", SHARDED)
def test_a_sharded_model_trains_as_one_process(results, single, engine, ranks):
    for found in results:
        made, state = found[engine, ranks]
        assert not toys.differences(state, results[0][engine, ranks][1])
        if engine == "fsdp2":  # parameters gathered anew may be looked at anew
            assert single.made <= made <= 2 * single.made
        else:  # every process computes the mask of its own part
            assert made == 0
    assert_state(results[0][engine, ranks][1], single.state())
    changed = single.state()["2.pst_V"] - worker.build().state_dict()["2.pst_V"]
    assert changed.abs().max() > 1e-3  # there was something to agree on


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_kept_weights_train_as_in_one_process(results, engine):
    """Before the freeze they have no gradient, and nothing waits for one; DDP makes zeros of none, and no step takes
    them."""
    torch.manual_seed(0)
    expected = worker.Training(**worker.FROZEN).run().state()
    assert expected["2.pst_kept"].abs().max() > 3e-5
    for found in results:
        state, frozen = found["frozen", engine]
        assert frozen[0::2] == [True] * 3 + [None]
        assert_state(state, expected)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_threshold_for_all_layers_is_that_of_one_process(results, engine):
    torch.manual_seed(0)
    training = worker.Training(**worker.GLOBAL).run()
    expected, layers = training.state(), [layer for _, layer in pst_layers(training.model)]
    assert len({round(layer.sparsity, 2) for layer in layers}) == len(layers)
    for found in results:
        assert not toys.differences(found["global", engine], results[0]["global", engine])
    assert_state(results[0]["global", engine], expected)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_word_embeddings_learn_as_in_one_process(results, engine):
    expected = worker.words()
    assert expected["0.pst_embedding_U"][1:].any()
    for found in results:
        assert_state(found["words", engine], expected)


@pytest.mark.parametrize("engine", ["ddp", "compiled ddp", "fsdp2"])
def test_moments_are_the_same_on_every_rank(results, engine):
    """Of four ranks with two micro-batches each: those of eight micro-batches, but for the scale of the loss."""
    torch.manual_seed(0)
    expected = worker.Training(parts=8, **worker.FISHER).run().state()
    plain = worker.Training(parts=8, **worker.FISHER | {"magnitude": "plain"}).run().state()
    state = dict(results[0]["fisher", engine])
    for found in results:
        assert not toys.differences(found["fisher", engine], state)
    for name in [name for name in expected if name.endswith("pst_moments")]:
        assert state[name].any()
        state[name] = state[name] / worker.RANKS**2
    assert_state(state, expected)
    assert any(not torch.equal(plain[name], expected[name]) for name in plain if name.endswith("pst_mask"))


@pytest.mark.parametrize("name", worker.MATRICES)
def test_the_threshold_is_that_of_the_whole_matrix_on_1_2_and_4_ranks(results, name):
    layer = worker.pruning_layer(name)
    factors = [factor.detach().double() for factor in layer.factors]
    scores = reference.scores(layer.weight.detach().double(), *factors)
    assert torch.equal(scores.float().double().nan_to_num(), scores.nan_to_num())  # exact in fp32
    for sparsity in worker.SPARSITIES:
        layer.sparsity = sparsity
        expected = reference.prune_mask(scores, num_pruned_at(scores.numel(), sparsity))
        assert torch.equal(layer.mask, expected)
        for ranks in (2, 4):
            for style in ("ColwiseParallel", "RowwiseParallel"):
                for found in results:
                    assert torch.equal(found["masks", ranks][name, style, sparsity], expected), (ranks, style, sparsity)


def test_no_weight_is_gathered(results):
    largest, weight = results[0]["traffic"]
    assert weight == 1 << 20
    assert largest == 1 << 16  # the histogram; the whole mask takes 1 << 15 words


@pytest.mark.parametrize("engine", SHARDED)
def test_a_distributed_checkpoint_reloads_on_another_number_of_processes(launched, single, engine):
    """Two steps on two processes, two on four, two on one: as six on one."""
    resumed = worker.Training().load(launched / f"{engine} 4")
    assert resumed.schedule.step_count == 4
    assert_state(resumed.run(4).state(), single.state())


@pytest.mark.parametrize("engine", SHARDED)
def test_the_adapter_of_a_sharded_model_loads_into_one_process(launched, engine):
    plain = worker.build()
    for _, layer in pst_layers(plain):
        layer.reset_factors()
    pst.load_pretrained(plain, launched / f"{engine} adapter 3")
    expected = worker.Training().run(0, 4).model
    assert_state(toys.snapshot(plain), toys.snapshot(expected))


def test_what_sharded_layers_refuse(results):
    found = results[0]
    for engine in SHARDED:
        for ranks in (2, 4):
            assert "the weight is sharded over processes and cannot be merged there;" in found["merge", engine, ranks]
        assert "call load_pretrained before fully_shard or parallelize_module" in found["loading", engine]
    assert found["errors"]["too few rows"] == (
        "ValueError: a weight (5, 8) cut along dimension 0 leaves some of 4 processes without a part; use fewer, or"
        " leave this layer out of the plan"
    )
    assert "over a mesh of 2 dimensions; cut PST layers with ColwiseParallel" in found["errors"]["two meshes"]
    assert found["errors"]["converted late"].startswith("TypeError: 0 has a weight of type DTensor, sharded over proc")
    assert "call replace_linear before fully_shard" in found["errors"]["converted late"]
    for name, pattern in (("block pattern", "block:16"), ("N:M pattern", "2:4")):
        assert found["errors"][name] == (
            f"RuntimeError: pattern='{pattern}' does not run under tensor parallelism; use pattern='unstructured'"
        )
    assert "freeze=0.2 does not run under tensor parallelism" in found["errors"]["frozen"]
    assert found["errors"]["global"].startswith("RuntimeError: allocation='global' does not run under tensor parallel")
    assert "magnitude='fisher' does not run under tensor parallelism" in found["errors"]["fisher"]
    assert "embedding_rank is not for a model under tensor parallelism" in found["errors"]["words"]
    assert "magnitude='fisher' trains in one process, or in several under" in found["errors"]["fisher, alone"]
    # torch's own, for GPT-2's layers with and without PST; quoted in docs/troubleshooting.md
    assert "currently only support nn.Linear and nn.Embedding!" in found["errors"]["Conv1D"]


def test_keys_order_as_scores_do():
    values = torch.tensor([-torch.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, torch.inf, torch.nan, -torch.nan])
    keys = ordered(values).tolist()
    assert keys[3] == keys[4]
    assert keys[8] == keys[9] == (1 << 32) - 1
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys) - 2
    assert [score_of(key) for key in keys[:8]] == values[:8].tolist()
