"""What a step frees is there for the next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pst_kernels.finetune import allocator

STEP = """
import resource, sys
import torch
from pst_kernels.finetune.allocator import keep_freed_memory

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    kept = [torch.zeros(5_000_000) for _ in range(8)]  # 20 MB each

print(keep_freed_memory())
step()
before = pages()
step()
print(pages() - before)
"""
PAGES = 8 * 20_000_000 // os.sysconf("SC_PAGE_SIZE")

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def run(**more: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=environment | more, capture_output=True, text=True, check=True
    )
    said, pages = done.stdout.split()
    return said == "True", int(pages)


@glibc
def test_a_second_step_gets_the_pages_of_the_first():
    kept, pages = run()
    assert kept
    assert pages < PAGES // 100


@glibc
def test_what_the_user_set_stays():
    kept, pages = run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert not kept
    assert pages > PAGES // 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
