"""Scratch buffers on CPUs: one set a thread, used again, and let go of for all threads at once."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from pst_kernels import cpu
from pst_kernels.cpu import scratch

CPU = torch.device("cpu")


def buffer(*shape):
    return scratch.get("test", shape, torch.float32, CPU)


def test_a_buffer_is_used_again_and_grows():
    first = buffer(10, 20).data_ptr()
    assert buffer(10, 20).data_ptr() == buffer(5, 3).data_ptr() == first
    assert buffer(30, 20).shape == (30, 20)
    assert buffer(10, 20).data_ptr() == buffer(30, 20).data_ptr()


def test_a_thread_has_buffers_of_its_own():
    own = buffer(7, 7)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(buffer, 7, 7).result().data_ptr() != own.data_ptr()


def test_release_reaches_every_thread_and_takes_nothing_away():
    own, released, made = buffer(6, 6).fill_(3.0), threading.Event(), threading.Event()

    def work():
        view = buffer(6, 6).fill_(4.0)
        made.set()
        released.wait(10)
        storage = weakref.ref(view.untyped_storage())
        alive = bool((view == 4.0).all())  # in the hands of the thread, and still whole
        del view
        return alive, storage() is None, buffer(6, 6).shape

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        made.wait(10)
        cpu.release_scratch()
        released.set()
        assert done.result() == (True, True, (6, 6))
    assert (own == 3.0).all()
    assert buffer(6, 6).data_ptr() != own.data_ptr()
