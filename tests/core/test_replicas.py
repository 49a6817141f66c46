"Replicas of one model in several processes end with the same weights and the same plan, whatever the method."
import pytest
import torch
import torch.nn.functional as F
from torch import multiprocessing, nn

import replica_work
from pruning_bench import build, methods, prune
from pruning_bench.core.replicas import unwrapped

RULED = [n for n in methods(use="prune").method if build(n).rule]
ALL = list(methods(space="weights", use="prune").method)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What two processes return; they have other batches and other random numbers."
    folder = tmp_path_factory.mktemp("replicas")
    multiprocessing.spawn(replica_work.everything, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def same(one, two):
    return one[1:] == two[1:] and all(torch.equal(one[0][n], two[0][n]) for n in one[0])


@pytest.mark.parametrize("name", RULED)
def test_replicas_trained_in_a_loop_stay_equal(found, name):
    one, two = (part[f"loop {name}"] for part in found)
    if build(name).space != "weights":
        assert one == two and "prune the module, then wrap it" in one
        return
    assert same(one, two) and one[2] == ["1.weight", "4.weight"]   # names of the module, without a prefix


@pytest.mark.parametrize("name", ALL)
def test_replicas_that_prune_stay_equal(found, name):
    one, two = (part[f"prune {name}"] for part in found)
    assert same(one, two)


def test_removing_structure_from_a_replica_is_refused(found):
    for part in found:
        assert "prune the module, then wrap it" in part["prune l1-filter"]


@pytest.mark.parametrize("name", ["wanda", "snip", "obd", "sparsegpt"])
def test_the_statistics_are_those_of_all_processes(found, name):
    whole = replica_work.net()
    batches = replica_work.data(0) + replica_work.data(1)
    plan = prune(whole, name, .5, batches, F.cross_entropy)
    assert found[0][f"prune {name}"][1] == plan.digest
    own = prune(replica_work.net(), name, .5, replica_work.data(0), F.cross_entropy)
    assert own != plan   # the batches of one process alone give another plan


def test_processes_that_prune_modules_of_their_own_are_warned_where_data_decide(found):
    for part in found:
        [told] = part["alone"]
        assert "'wanda'" in told and "DistributedDataParallel" in told


def test_a_model_that_is_not_wrapped_is_left_as_it_is():
    assert isinstance(unwrapped(nn.DataParallel(nn.Linear(2, 2))), nn.DataParallel)
