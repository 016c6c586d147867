"""Workers of one thread: results in order, the first error, and torch's threads as they were."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cerwu_gpu.threads import one_thread, run, worker_count


@pytest.fixture(autouse=True)
def threads():
    """Each test begins with three threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_tasks():
    def slow(number):
        time.sleep(0.02 * (4 - number))
        return number

    assert run([lambda n=n: slow(n) for n in range(5)]) == [0, 1, 2, 3, 4]
    assert run([]) == []


def test_as_many_workers_as_torch_has_threads_and_one_thread_in_each():
    meeting = threading.Barrier(3, timeout=30)

    def meet():
        meeting.wait()
        return threading.current_thread().name, torch.get_num_threads(), worker_count()

    results = run([meet] * 6)
    assert len({name for name, _, _ in results}) == 3
    assert {(threads, workers) for _, threads, workers in results} == {(1, 1)}


def test_workers_that_are_left_are_shared_out():
    torch.set_num_threads(5)
    assert run([worker_count, worker_count]) == [2, 2]
    torch.set_num_threads(3)


def test_a_single_task_keeps_all_workers():
    assert run([worker_count]) == [3]
    assert run([torch.get_num_threads]) == [3]
    assert run([lambda: run([torch.get_num_threads] * 3)]) == [[1, 1, 1]]


def test_inside_of_one_thread_there_are_still_workers():
    with one_thread():
        assert torch.get_num_threads() == 1
        assert worker_count() == 3
        with one_thread():
            assert worker_count() == 3
        assert torch.get_num_threads() == 1
        assert run([torch.get_num_threads] * 3) == [1, 1, 1]


def test_the_first_error_in_order_is_raised_when_all_have_ended():
    ended = []

    def fail(number):
        time.sleep(0.03 * (2 - number))
        ended.append(number)
        raise ValueError(f"task {number}")

    with pytest.raises(ValueError, match="task 0"):
        run([lambda n=n: fail(n) for n in range(3)])
    assert sorted(ended) == [0, 1, 2]


def test_an_error_leaves_torch_s_threads_as_they_were():
    with pytest.raises(ZeroDivisionError), one_thread():
        print(1 / 0)
    assert torch.get_num_threads() == 3
    assert worker_count() == 3


def test_tasks_of_another_device_run_one_after_the_other_here():
    names = run([lambda: threading.current_thread().name] * 3, torch.device("meta"))
    assert set(names) == {threading.current_thread().name}
    assert run([torch.get_num_threads] * 2, torch.device("meta")) == [3, 3]


INTERRUPTED = """
import os, signal, threading, time, torch
from cerwu_gpu.threads import run
torch.set_num_threads(2)
threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    run([lambda: time.sleep(0.3)] * 200)
except KeyboardInterrupt:
    assert time.monotonic() - begin < 5
    print("stopped")
"""


def test_an_interrupt_drops_what_has_not_begun():
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


def test_overlapping_callers_leave_the_number_that_was_there():
    """One leaves while another is inside that came later, and first uses torch then."""
    inside, done = threading.Event(), threading.Event()

    def other():
        with one_thread():
            inside.set()
            done.wait(30)

    with one_thread():
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(30)
    done.set()
    thread.join()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_workers_are_in_inference_mode_if_their_caller_is():
    with torch.inference_mode():
        total = torch.zeros(4)
        run([lambda n=n: total[n].fill_(n) for n in range(4)])
        assert total.tolist() == [0, 1, 2, 3]
    assert run([torch.is_inference_mode_enabled] * 3) == [False] * 3
