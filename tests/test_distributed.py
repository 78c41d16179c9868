"""Two processes on this machine (gloo): DistributedDataParallel trains as one process does."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import pst_kernels as pst
from pst_kernels import linear

STEPS, BATCH = 6, 8


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 3))
    return pst.replace_linear(model, pst.PSTConfig(sparsity=0.7, weight_rank=2, score_rank=2))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 24, generator=generator) for _ in range(STEPS)]


def train(model, forward, rank=0, ranks=1):
    """Mean loss over the whole batch, two micro-batches a step; returns how often each layer's mask was made."""
    schedule = pst.SparsitySchedule(model, STEPS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    made, compute = [], linear.ops.prune_mask
    linear.ops.prune_mask = lambda *args: made.append(1) or compute(*args)
    try:
        for batch in batches():
            for half in batch.view(2, -1, 24):
                share = half.view(ranks, -1, 24)[rank]
                (forward(share).pow(2).mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    finally:
        linear.ops.prune_mask = compute
    return len(made)


def run_rank(rank, ranks, port, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    model = build()
    made = train(model, nn.parallel.DistributedDataParallel(model), rank, ranks)
    torch.save((made, model.state_dict()), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ddp_equals_one_process(tmp_path, free_port):
    mp.start_processes(run_rank, (2, free_port, str(tmp_path)), nprocs=2, start_method="spawn")
    single = build()
    made = train(single, single)
    assert made == 2 * STEPS  # two layers, one mask a step each
    (first_made, first), (second_made, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first_made == second_made == made
    for name, expected in single.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if name.endswith("pst_mask"):
            assert torch.equal(first[name], expected)
        else:
            torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)
