"""How a process leaves its gloo group without a thread of the group outliving Python (docs/troubleshooting.md).

Such a thread may abort the process when Python ends, with or without this package: PyTorch's issue 190489.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, pathlib, sys
import torch, torch.distributed as dist
if "import first" in sys.argv:
    import torch.distributed.nn
import pst_kernels as pst

store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
ddp = torch.nn.parallel.DistributedDataParallel(pst.replace_linear(model))
ddp(torch.randn(4, 8)).sum().backward()
dist.all_gather([torch.empty(1)], torch.ones(1))
if "delete" in sys.argv:
    del ddp
dist.destroy_process_group()
threads = [task.joinpath("comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
print(json.dumps(sum("gloo" in name for name in threads)), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("steps", [["import first", "delete"], ["delete"], ["import first"]], ids=str)
def test_both_steps_are_needed(steps):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *steps], capture_output=True, text=True, check=True, timeout=100
    )
    left = json.loads(done.stdout)
    assert (left == 0) == (len(steps) == 2)
