"""Queues that are killed, and queues that share a store: every job finishes once, none twice, no process is left."""
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from queue_faults import forked_queue, jobs, left_over, lines, results, wait_until


@pytest.fixture
def store(tmp_path):
    jobs(1)[0].digest()   # what the digests of code need is read once, before anything is forked
    yield tmp_path / "store"
    for p in left_over(tmp_path / "store"): p.kill()


def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_store(store, before):
    "Nothing is left running or half written, and no result was made again."
    assert wait_until(lambda: not left_over(store)), "a process outlived its queue"
    now = results(store)
    assert before.items() <= now.items(), "a finished job was run again"
    for path in Path(store).glob("runs/*/*/*.json"):
        if path.name != "unfinished.json": json.loads(path.read_text())   # that one may be half written
    return now


def kill_and_resume(store, n, kills, longest, **settings):
    "Kill a queue at random moments after it began to work, then let it finish."
    finished, at_work, draw = {}, 0, random.Random(0)   # one stream of moments, from 0 to `longest` seconds
    for _ in range(kills):
        began, pid = len(lines(store, "began")), forked_queue(store, n, 2, **settings)
        wait_until(lambda: len(lines(store, "began")) > began or len(results(store)) == n)
        time.sleep(draw.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        at_work += end(pid) == -signal.SIGKILL
        finished = check_store(store, finished)
    assert end(forked_queue(store, n, 2, **settings)) == 0
    assert len(check_store(store, finished)) == n
    began, ended = lines(store, "began"), lines(store, "ended")
    assert at_work and set(ended) == {j.variant for j in jobs(n)}
    assert len(began) <= n + 2 * at_work   # a kill costs at most the jobs that ran


def test_a_queue_that_is_killed_five_times_finishes_every_job_once(store):
    kill_and_resume(store, 16, 5, .6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_matrix_of_forty_cells_survives_twenty_kills(store):
    kill_and_resume(store, 40, 20, 3., kernel=True)


def test_two_queues_share_a_store(store):
    queues = [forked_queue(store, 8, 2, work="time.sleep(.3)") for _ in range(2)]
    assert [end(pid) for pid in queues] == [0, 0]
    assert len(check_store(store, {})) == 8
    assert sorted(lines(store, "began")) == sorted(j.variant for j in jobs(8))


def test_a_queue_takes_over_what_a_killed_one_was_at(store):
    queues = [forked_queue(store, 6, 2, work="time.sleep(1)") for _ in range(2)]
    assert wait_until(lambda: len(lines(store, "began")) >= 3)   # both are at work
    os.kill(queues[0], signal.SIGKILL)
    assert [end(pid) for pid in queues] == [-signal.SIGKILL, 0]
    assert len(check_store(store, {})) == 6 and set(lines(store, "ended")) == {j.variant for j in jobs(6)}
    assert len(lines(store, "began")) <= 6 + 2
