"The queue on a Ray cluster of two nodes, one of which is killed while it works."
import threading
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'pruning_bench[ray]'")
from rich.console import Console

from pruning_bench.bench import runner
from pruning_bench.bench.ray_engine import RayEngine
from pruning_bench.core.inputs import BadInput
from queue_faults import jobs, left_over, lines, prepare, results, undo_prepare, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "Two nodes of one core, and a store that both see."
    from ray.cluster_utils import Cluster
    undo_prepare(monkeypatch, tmp_path)
    prepare(tmp_path / "store", work="time.sleep(2)", kernel=True)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.store = tmp_path / "store"
    yield made
    ray.shutdown()
    made.shutdown()


def test_nothing_is_lost_with_a_node_that_is_killed(cluster):
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    found = {}
    def work(): found.update(runner.run_jobs(jobs(6), console=Console(quiet=True), engine=RayEngine(cluster.address)))
    queue = threading.Thread(target=work)
    queue.start()
    assert wait_until(lambda: len(results(cluster.store)) >= 1 and len(lines(cluster.store, "began")) >= 3, 300)
    before = results(cluster.store)
    cluster.remove_node(second, allow_graceful=False)
    queue.join(600)
    assert len(found) == 6 and all(isinstance(entry, dict) for entry in found.values())
    assert before.items() <= results(cluster.store).items() and len(results(cluster.store)) == 6
    assert set(lines(cluster.store, "ended")) == {j.variant for j in jobs(6)}
    assert 6 <= len(lines(cluster.store, "began")) <= 7   # the job of the node that was killed, at most, began twice
    assert wait_until(lambda: not [p for p in left_over(cluster.store) if "ipykernel" in " ".join(p.cmdline())])


def test_a_job_that_wants_a_gpu_is_refused_where_there_is_none(cluster):
    from dataclasses import replace
    with pytest.raises(BadInput, match="no node of the cluster has a GPU"):
        runner.run_jobs([replace(jobs(1)[0], device="cuda")], console=Console(quiet=True),
                        engine=RayEngine(cluster.address))


def test_a_node_that_does_not_see_the_store_is_named(cluster):
    engine = RayEngine(cluster.address)
    Path(engine.mark).unlink()
    with pytest.raises(BadInput, match="all nodes mount"):
        runner.run_jobs(jobs(1), console=Console(quiet=True), engine=engine)
