"""What the queue adds to its jobs, and what a second process gains: `make bench` prints both.

Other programs that use the processor change these figures; the load of the last minute is printed beside them.
"""
import os
import time

import pytest
from jupyter_client.manager import start_new_kernel
from rich.console import Console

from pruning_bench.bench import runner
from queue_faults import jobs, lines, prepare, undo_prepare

JOBS = 6
COUNT = """
began = time.perf_counter()
for _ in range(3):
    for i in range(10_000_000): pass
took = open(os.environ["PRUNING_BENCH_CACHE"] + "/seconds", "a")
print(time.perf_counter() - began, file=took, flush=True)
"""   # a method that uses one core


@pytest.fixture
def timed_queue(tmp_path, monkeypatch):
    "A function: workers -> seconds of a queue of jobs, and the seconds that their notebooks worked."
    undo_prepare(monkeypatch, tmp_path)
    jobs(1)[0].digest()   # reads the code of the package once
    def run(workers):
        store = tmp_path / str(workers)
        prepare(store, work=COUNT, kernel=True)
        began = time.perf_counter()
        found = runner.run_jobs(jobs(JOBS), workers, console=Console(quiet=True))
        took = time.perf_counter() - began
        assert all(isinstance(entry, dict) for entry in found.values()) and len(lines(store, "ended")) == JOBS
        return took, sum(map(float, lines(store, "seconds")))
    return run


def kernel_seconds():
    "The time to start a kernel until it answers, and to end it."
    began = time.perf_counter()
    manager, client = start_new_kernel(kernel_name="python3")
    client.stop_channels()
    manager.shutdown_kernel()
    return time.perf_counter() - began


def load(): return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def test_a_job_costs_at_most_three_seconds_beyond_its_kernel_and_its_method(timed_queue):
    kernels = [kernel_seconds()]
    took, worked = timed_queue(1)
    kernels.append(kernel_seconds())
    added = (took - worked) / JOBS - sum(kernels) / 2
    print(f"\n{JOBS} jobs one after the other: {took:.1f} s, of which {worked:.1f} s of work; a kernel takes "
          f"{sum(kernels) / 2:.2f} s, the queue adds {added:.2f} s per job ({load()})")
    assert added <= 3


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_two_processes_are_at_least_1_7_times_as_fast_as_one(timed_queue):
    (one, _), (two, _) = timed_queue(1), timed_queue(2)
    print(f"\n{JOBS} jobs: {one:.1f} s with one process, {two:.1f} s with two, "
          f"{one / two:.2f} times as fast ({load()})")
    assert one / two >= 1.7
