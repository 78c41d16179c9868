"""What test_distributed.py runs in each of four processes (gloo, CPU), one launch for all: its results go to a file."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import toys
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pst_kernels as pst
from pst_kernels import cpu
from pst_kernels.layers import checks

RANKS, STEPS, BATCH, WIDTH = 4, 6, 8, 24
# 33 rows of 40 columns: neither a multiple of the 32 columns of a word, nor of the number of processes; so is rank 3
PLAN = {"0": ColwiseParallel, "2": RowwiseParallel, "4": lambda: ColwiseParallel(output_layouts=Replicate())}
MATRICES = {"dyadic": (96, 70), "bf16 ties": (65, 131), "one row more": (13, 260)}
FROZEN = {"train_kept": True, "freeze": 0.34, "cooldown": 0.4, "score_interval": 2}  # for the last two steps
GLOBAL = {"allocation": "global", "sparsity": 0.8}
FISHER = {"magnitude": "fisher", "freeze": 0.17, "score_interval": 2}  # moments of every second step, a last one fixed
SPARSITIES = (0.0, 0.3, 0.31, 0.6, 0.97)


def build(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 35), nn.ReLU(), nn.Linear(35, 3)
    )
    sizes = {"sparsity": 0.7, "weight_rank": 3, "score_rank": 2, "train_bias": True}
    return toys.perturb(pst.replace_linear(model, pst.PSTConfig(**sizes | settings)))


class Training:
    """A model, its optimizer and its schedule over STEPS steps of SGD with momentum, of micro-batches each."""

    def __init__(self, engine: str = "single", mesh: DeviceMesh | None = None, parts: int = 2, **settings):
        self.engine, self.mesh, self.parts, self.model = engine, mesh, parts, build(**settings)
        self.forward: nn.Module = self.model
        if engine == "ddp":
            self.forward = nn.parallel.DistributedDataParallel(self.model)
        elif engine == "compiled ddp":
            graph = torch.compile(self.model, backend="aot_eager", fullgraph=True)
            self.forward = nn.parallel.DistributedDataParallel(graph)
        elif engine == "fsdp2":
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif engine == "tensor parallel":
            parallelize_module(self.model, mesh, {name: style() for name, style in PLAN.items()})
        self.schedule = pst.SparsitySchedule(self.model, STEPS)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
        self.made = 0

    def run(self, first: int = 0, last: int = STEPS) -> Training:
        compute = cpu.prune_mask

        def counted(*args):
            self.made += 1
            return compute(*args)

        cpu.prune_mask = counted
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(BATCH, WIDTH, generator=generator) for _ in range(STEPS)]
        rank, ranks = (
            (self.mesh.get_local_rank(), self.mesh.size())
            if "parallel" not in self.engine and self.mesh is not None
            else (0, 1)
        )
        for batch in batches[first:last]:
            for part in batch.view(self.parts, -1, WIDTH):
                (self.forward(part.view(ranks, -1, WIDTH)[rank]).pow(2).mean() / self.parts).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        cpu.prune_mask = compute
        return self

    def state(self) -> dict[str, torch.Tensor]:
        return {name: checks.whole(tensor).detach().clone() for name, tensor in self.model.state_dict().items()}

    def save(self, folder: Path) -> None:
        dcp.save(self._states(), checkpoint_id=folder, process_group=self.mesh and self.mesh.get_group())

    def load(self, folder: Path) -> Training:
        states = self._states()
        dcp.load(states, checkpoint_id=folder, process_group=self.mesh and self.mesh.get_group())
        set_state_dict(
            self.model, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        self.schedule.load_state_dict(states["schedule"])
        return self

    def _states(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}


def words(engine: str = "single", mesh: DeviceMesh | None = None) -> dict[str, torch.Tensor]:
    """The state after two steps of a model whose word embeddings learn, of eight texts over all ranks."""
    torch.manual_seed(0)
    body = nn.Embedding(51, WIDTH, padding_idx=0), nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, 3)
    model: nn.Module = pst.replace_linear(nn.Sequential(*body), pst.PSTConfig(sparsity=0.7, embedding_rank=3))
    forward = nn.parallel.DistributedDataParallel(model) if engine == "ddp" else model
    if engine == "fsdp2":
        fully_shard(model, mesh=mesh)
    if engine == "tensor parallel":
        parallelize_module(model, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    rank, ranks = (0, 1) if engine in ("single", "tensor parallel") else (mesh.get_local_rank(), mesh.size())
    for step in range(2):
        ids = torch.randint(51, (8, 6), generator=torch.Generator().manual_seed(step))
        forward(ids.view(ranks, -1, 6)[rank]).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: checks.whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def matrix(name: str) -> nn.Linear:
    """A weight whose scores are exact in fp32, so that its mask may not depend on anything."""
    out, columns = MATRICES[name]
    layer = nn.Linear(columns, out)
    with torch.no_grad():
        layer.weight.copy_(toys.dyadic(out, columns))
        layer.weight[: out // 2] /= 16  # a threshold for each half would prune as much in either
    return layer.to(torch.bfloat16) if name == "bf16 ties" else layer


def pruning_layer(name: str) -> pst.PSTLinear:
    layer = pst.PSTLinear.from_linear(matrix(name), pst.PSTConfig(weight_rank=3, score_rank=2))
    if name != "bf16 ties":  # untrained factors there: a few hundred distinct scores of thousands
        for i, factor in enumerate(layer.factors):
            factor.data.copy_(toys.dyadic(*factor.shape, seed=i) / 8)
        layer.pst_R.data -= 1  # negative scores too
        if name == "one row more":
            layer.pst_R.data[4] = float("nan")  # sorts last, and is kept
    return layer


def masks(mesh: DeviceMesh) -> dict[tuple[str, str, float], torch.Tensor]:
    """Masks of whole matrices cut over the mesh by rows and by columns, at rising and falling sparsity."""
    made = {}
    for name in MATRICES:
        for style in (ColwiseParallel, RowwiseParallel):
            layer = parallelize_module(pruning_layer(name), mesh, style())
            for sparsity in (*SPARSITIES, *reversed(SPARSITIES)):
                layer.sparsity = sparsity
                made[name, style.__name__, sparsity] = layer.mask
    return made


class Traffic(TorchDispatchMode):
    """The largest tensor that any collective is given."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            sizes = [t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.largest = max([self.largest, *sizes])
        return func(*args, **kwargs or {})


def largest_message(mesh: DeviceMesh) -> tuple[int, int]:
    """(numel of the largest message, numel of the weight) in training steps of a layer and in saving its state."""
    layer = cut(pst.PSTLinear(1024, 1024, config=pst.PSTConfig(sparsity=0.5)), mesh)
    with Traffic() as traffic:
        for sparsity in (0.5, 0.9):
            layer.sparsity = sparsity
            layer(torch.randn(4, 1024)).sum().backward()
        layer.state_dict()
    return traffic.largest, layer.weight.numel()


def cut(layer: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(layer, mesh, ColwiseParallel())


def pruning(pattern: str) -> pst.PSTLinear:
    return pst.PSTLinear(32, 32, config=pst.PSTConfig(pattern=pattern))


def refused(call) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:  # NotImplementedError is a RuntimeError
        return f"{type(error).__name__}: {error}"
    return ""


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    four, two = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    meshes, results = {2: two["parts"], 4: four}, {}

    ddp = Training("ddp", four).run()
    results["ddp"] = (ddp.made, ddp.state())
    for ranks, mesh in meshes.items():
        results["masks", ranks] = masks(mesh)
        for engine in ("fsdp2", "tensor parallel"):
            training = Training(engine, mesh).run()
            results[engine, ranks] = (training.made, training.state())
            results["merge", engine, ranks] = refused(training.model[0].merge)
    for engine, mesh in (("ddp", four), ("fsdp2", two["parts"])):
        frozen = Training(engine, mesh, **FROZEN).run()
        results["frozen", engine] = frozen.state(), [getattr(layer, "frozen", None) for layer in frozen.model]
        results["global", engine] = Training(engine, mesh, **GLOBAL).run().state()
    results["words", "ddp"], results["words", "fsdp2"] = words("ddp", four), words("fsdp2", four)
    for engine in ("ddp", "compiled ddp", "fsdp2"):
        results["fisher", engine] = Training(engine, four, **FISHER).run().state()
    results["traffic"] = largest_message(four)
    twice = fully_shard(cut(pst.PSTLinear(8, 8), two["parts"]), mesh=two["copies"])
    late = nn.Sequential(cut(nn.Linear(8, 8), four), nn.Linear(8, 2))
    results["errors"] = {
        "too few rows": refused(lambda: cut(pst.PSTLinear(8, 5), four).mask),
        "two meshes": refused(twice.state_dict),
        "converted late": refused(lambda: pst.replace_linear(late)),
        "block pattern": refused(lambda: cut(pruning("block:16"), four)(torch.ones(2, 32))),
        "N:M pattern": refused(lambda: cut(pruning("2:4"), four).mask),
        "frozen": refused(lambda: cut(pst.PSTLinear(8, 8, config=pst.PSTConfig(freeze=0.2)), four).mask),
        "global": refused(lambda: Training("tensor parallel", four, **GLOBAL).run()),
        "fisher": refused(lambda: Training("tensor parallel", four, magnitude="fisher").run()),
        "words": refused(lambda: words("tensor parallel", four)),
        "fisher, alone": refused(lambda: Training(magnitude="fisher").run()),
        "Conv1D": refused(lambda: cut(pst.PSTConv1D(8, 8), four)),
    }

    # 2 -> 4 processes here, and 4 -> 1 in the test
    for engine in ("fsdp2", "tensor parallel"):
        of_two, of_four = (Path(folder, f"{engine} {ranks}") for ranks in meshes)
        if rank < 2:
            Training(engine, meshes[2]).run(0, 2).save(of_two)
        dist.barrier()
        resumed = Training(engine, four, sparsity=0.7).load(of_two).run(2, 4)
        resumed.save(of_four)
        adapter = Path(folder, f"{engine} adapter {rank}")
        pst.save_pretrained(resumed.model, adapter)
        results["loading", engine] = refused(lambda m=resumed.model, folder=adapter: pst.load_pretrained(m, folder))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
