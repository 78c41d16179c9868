"""Several processes, as torchrun or `accelerate launch` start them: which one this is, and their group.

Every process reads the texts and trains on its share of each batch; the first alone writes and prints.
"""

from __future__ import annotations

import os


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def form_group(name: str) -> None:
    """Make this process one of the group `name`; does nothing where there is one process only.

    torchrun's store outlives a group, so each group has keys of its own there: a second one that found the addresses
    of the first would wait for processes that have ended.
    """
    if count() == 1:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, ranks = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=ranks)


def first_says(value: bool) -> bool:
    """What the first process found, for all of them."""
    if count() == 1:
        return value
    import torch.distributed as dist

    said = [value]
    dist.broadcast_object_list(said, src=0)
    return bool(said[0])


def wait_for_all() -> None:
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()
