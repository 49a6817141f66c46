"""The queue on a cluster that this process imitates: what is asked of Ray, and what follows from its answers.

`test_ray.py` runs the same queue on a real cluster, where Ray is installed.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from pruning_bench.bench import runner
from pruning_bench.bench.ray_engine import RayEngine
from pruning_bench.core.inputs import BadInput
from queue_faults import jobs, left_over, lines, prepare, results, undo_prepare, wait_until

QUIET = Console(quiet=True)


class RayError(Exception): pass
class RayTaskError(RayError): pass


class StandIn(ModuleType):
    "The part of Ray's interface that the engine uses. Tasks run in threads; `lose` ends one as a lost node does."
    def __init__(self, gpus=0):
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.gpus, self.asked = gpus, []
        self.pool, self.lost, self.cancelled, self.closed = ThreadPoolExecutor(4), {}, [], False

    def init(self, address, **settings):
        if address == "nowhere:1": raise ConnectionError("ray.init: no cluster\nmore lines")

    def nodes(self): return [{"Alive": True, "Resources": {"CPU": 2.}}, {"Alive": False, "Resources": {"CPU": 64.}}]
    def cluster_resources(self): return {"CPU": 2., **({"GPU": self.gpus} if self.gpus else {})}

    def remote(self, fn):
        def options(**wanted):
            def start(*args):
                self.asked.append(wanted)
                return self.pool.submit(fn, *args)
            return SimpleNamespace(remote=start)
        return SimpleNamespace(options=options)

    def wait(self, handles, timeout): return [h for h in handles if h.done()], []

    def get(self, handle):
        result = handle.result()
        if self.lost.pop(handle, None): raise RayError("the node died\nmore lines")
        return result

    def cancel(self, handle, force): self.cancelled.append(handle)
    def shutdown(self):
        self.pool.shutdown()
        self.closed = True


@pytest.fixture
def ray(tmp_path, monkeypatch):
    "A stand-in for Ray, and a store with a quick notebook."
    undo_prepare(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "ray", StandIn())
    prepare(tmp_path / "store")
    sys.modules["ray"].store = tmp_path / "store"
    return sys.modules["ray"]


def test_jobs_run_as_tasks_with_their_cores_and_leave_nothing(ray):
    found = runner.run_jobs(jobs(3), console=QUIET, engine=RayEngine())
    assert len(found) == 3 and all(isinstance(entry, dict) for entry in found.values())
    assert ray.asked == 3 * [{"num_cpus": 1, "num_gpus": 0, "max_retries": 0}]
    assert ray.closed and not list(ray.store.glob("ray-*.json")) and not left_over(ray.store)


def test_a_job_whose_node_is_lost_runs_again(ray, monkeypatch):
    (ray.store / "template.ipynb").unlink()
    prepare(ray.store, work="if len(pathlib.Path(os.environ['PRUNING_BENCH_CACHE'], 'began').read_text().split('\\n')) "
                            "== 2: time.sleep(60)")   # the first of all is still at work when its node is lost
    engine = RayEngine()
    start = engine.start
    def start_and_lose(step):
        start(step)
        if len(ray.asked) > 1: return
        assert wait_until(lambda: lines(ray.store, "began"))
        ray.lost[step.handle] = True
        for p in left_over(ray.store): p.kill()
    monkeypatch.setattr(engine, "start", start_and_lose)
    found = runner.run_jobs(jobs(2), console=QUIET, engine=engine)
    assert all(isinstance(entry, dict) for entry in found.values()) and len(results(ray.store)) == 2
    assert sorted(lines(ray.store, "ended")) == ["job 0", "job 1"] and len(lines(ray.store, "began")) == 3
    assert not any(runner.past_failures(job) for job in jobs(2))   # the job did nothing wrong


def test_a_result_that_was_written_before_its_node_was_lost_counts(ray, monkeypatch):
    engine = RayEngine()
    start = engine.start
    def start_and_lose(step):
        start(step)
        ray.lost[step.handle] = True
    monkeypatch.setattr(engine, "start", start_and_lose)
    found = runner.run_jobs(jobs(1), console=QUIET, engine=engine)
    assert isinstance(found[jobs(1)[0].name], dict) and lines(ray.store, "began") == ["job 0"]


@pytest.mark.parametrize("error, starts, message", [
    (RayError("the node died\nmore lines"), runner.ATTEMPTS, "its node was lost: the node died"),
    (RayTaskError("ray::run_on_node()\nTraceback\nOSError: no space left"), 1, "OSError: no space left")])
def test_a_task_without_an_answer_ends_as_a_failure(ray, monkeypatch, error, starts, message):
    engine, started = RayEngine(), []
    def start(step):
        step.handle = ray.pool.submit(int)
        started.append(step.label)
    def get(handle): raise error
    monkeypatch.setattr(engine, "start", start)
    monkeypatch.setattr(ray, "get", get)
    found = runner.run_jobs(jobs(1), console=QUIET, engine=engine)[jobs(1)[0].name]
    assert found.status == "error" and found == message and len(started) == starts


def test_a_gpu_is_asked_for_where_a_job_wants_one(ray, monkeypatch):
    wanted = [replace(job, device="cuda") for job in jobs(2)]
    with pytest.raises(BadInput, match="no node of the cluster has a GPU"):
        runner.run_jobs(wanted, console=QUIET, engine=RayEngine())
    assert ray.closed and not ray.asked
    ray.__init__(gpus=2)
    ray.store = Path(runner.cache_folder())
    found = runner.run_jobs(wanted, console=QUIET, engine=RayEngine())
    assert all(isinstance(entry, dict) for entry in found.values())
    assert [a["num_gpus"] for a in ray.asked] == [1, 1]


def test_what_is_wrong_with_a_cluster_is_one_sentence(ray):
    with pytest.raises(BadInput, match=r"no Ray cluster answers at 'nowhere:1' \(ray.init: no cluster\)"):
        RayEngine("nowhere:1")
    engine = RayEngine()
    Path(engine.mark).unlink()
    with pytest.raises(BadInput, match="all nodes mount"): runner.run_jobs(jobs(1), console=QUIET, engine=engine)
    assert not lines(ray.store, "began")


def test_an_interruption_cancels_the_tasks(ray, monkeypatch):
    engine = RayEngine()
    def wait(*args, **settings): raise KeyboardInterrupt
    monkeypatch.setattr(ray, "wait", wait)
    with pytest.raises(KeyboardInterrupt): runner.run_jobs(jobs(1), console=QUIET, engine=engine)
    assert len(ray.cancelled) == 1 and ray.closed
