"HALP and NetAdapt: the knapsack against all combinations, counted costs, greedy steps; nothing about speed."
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune
from pruning_bench.core.budget import RESOURCES
from pruning_bench.core.stats import PROVIDERS, collect
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.latency_allocation import (between_counts, cost_knapsack, knapsack_widths, narrower,
                                                         netadapt_step, width_table)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10), nn.ReLU(),
                         nn.Linear(10, 4)).double().eval()


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 1, 8, 8, generator=g).double(), torch.randint(0, 4, (16,), generator=g))
            for _ in range(2)]


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_the_best_of_all_combinations(seed):
    g = torch.Generator().manual_seed(seed)
    groups = "abcd"[:2 + seed % 3]
    values = {n: torch.rand(4, generator=g).tolist() for n in groups}   # importance may even fall with the width
    costs = {n: [0, *torch.randint(0, 9, (3,), generator=g).sort().values.tolist()] for n in groups}
    for budget in (1, 7, 15, 40):
        found = knapsack_widths(values, costs, budget, bins=budget)
        options = [dict(zip(groups, i)) for i in itertools.product(range(4), repeat=len(groups))]
        fits = [o for o in options if sum(costs[n][i] for n, i in o.items()) <= budget]
        assert found in fits
        best = max(sum(values[n][i] for n, i in o.items()) for o in fits)
        assert sum(values[n][i] for n, i in found.items()) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
def test_rounded_costs_never_exceed_the_budget(seed):
    g = torch.Generator().manual_seed(seed)
    values = {n: torch.rand(5, generator=g).sort().values.tolist() for n in range(4)}
    costs = {n: [0., *torch.rand(4, generator=g).sort().values.tolist()] for n in range(4)}
    for bins in (3, 50, 1000):
        found = knapsack_widths(values, costs, .9, bins)
        assert sum(costs[n][i] for n, i in found.items()) <= .9 + 1e-9
    assert knapsack_widths(values, costs, 0.) == dict.fromkeys(range(4), 0)


def test_the_table_is_what_the_budget_says_of_each_group_alone(net, batches):
    space = Channels(net, batches)
    price = RESOURCES["macs"](space)
    table = width_table(space, price, 4)
    whole = price({n: len(g) for n, g in space.groups.items()})
    assert table["0.weight"][0] == [2, 4, 6, 8] and table["3.weight"][0] == [3, 6, 9, 12]
    first = [(64 * 9 + 9 * 9 * 12) * (k - 2) / whole for k in (2, 4, 6, 8)]   # each unit is written and read
    assert table["0.weight"][1] == pytest.approx(first)


def test_noise_of_a_measurement_is_made_monotone(net, batches):
    noisy = iter([1., .7, .9, .8, 1.3] + [.5] * 8)   # the last one is slower than the whole network
    table = width_table(Channels(net, batches), lambda kept: next(noisy), 4)
    assert table["0.weight"][1] == pytest.approx([0, .2, .2, .3])


def test_a_measured_table_has_the_widths_and_costs_that_rise(net, batches):
    found = PROVIDERS["width_costs"](Channels(net, batches), batches, of="latency", levels=2, rounds=5)["0.weight"]
    assert {n: w for n, (w, _) in found.items()} == {"0.weight": [4, 8], "3.weight": [6, 12], "6.weight": [5, 10]}
    assert all(c[0] == 0 and sorted(c) == c for _, c in found.values())


def test_the_allocation_prefers_cheap_channels_among_equally_important_ones(net, batches):
    space = Channels(net, batches)
    stats = collect(space, batches, {"width_costs"}, settings={"width_costs": dict(of="macs", levels=4)})
    scores = {n: torch.ones(len(g)) for n, g in space.groups.items()}
    found = cost_knapsack()(scores, .6, space, stats)
    assert sum(round(f * len(scores[n])) for n, f in found.items()) == 18
    assert found["6.weight"] == 1    # a unit of the linear layer costs 112, a channel of the second layer 729 + 90
    assert found["0.weight"] < 1


def test_counts_between_two_allocations_add_up():
    low, high, size = {"a": 2, "b": 3}, {"a": 8, "b": 5}, {"a": 8, "b": 6}
    for total in range(5, 14):
        found = between_counts(low, high, size, total)
        assert sum(found.values()) == total and all(low[n] <= found[n] <= high[n] for n in found)


def test_a_proposal_removes_no_more_than_it_must(net, batches):
    space = Channels(net, batches)
    price, size = RESOURCES["macs"](space), {n: len(g) for n, g in space.groups.items()}
    for n in size:
        target = price(size) * .9
        found = narrower(price, size, n, target)
        assert {m: found[m] for m in size if m != n} == {m: size[m] for m in size if m != n}
        assert found[n] == 1 or price(found) <= target < price(found | {n: found[n] + 1})


def test_a_step_takes_the_proposal_that_is_judged_best(net, batches):
    space = Channels(net, batches)
    price, size = RESOURCES["params"](space), {n: len(g) for n, g in space.groups.items()}
    scores = {n: space.w(n) for n in size}
    for favourite, at in (("0.weight", 0), ("3.weight", 3), ("6.weight", 6)):
        found = netadapt_step(space, scores, size, price, .02, lambda m: -m[at].weight.shape[0])
        assert [n for n in size if found[n] < size[n]] == [favourite]


@pytest.mark.parametrize("name, settings", [("halp", dict(of="macs", rounds=2)), ("netadapt", dict(tune_steps=2))])
def test_budgets_are_met_and_the_rest_of_the_model_is_left_alone(net, batches, name, settings):
    for budget, of in (({"macs": .4}, "macs"), ({"params": .4}, "params")):
        plan = prune(copy.deepcopy(net), name, budget, batches, F.cross_entropy, **settings)
        assert plan.budget["achieved"] >= .4 and plan.budget["of"] == of
    plan = prune(net, name, .5, batches, F.cross_entropy, **settings)
    assert sum(int(m.sum()) for m in plan.masks.values()) == 15


def test_the_short_trainings_of_proposals_leave_the_weights_of_the_network_as_they_are(net, batches):
    kept = {n: p.clone() for n, p in net.named_parameters()}
    plan = prune(net, "netadapt", .5, batches, F.cross_entropy, tune_steps=3)
    rows = plan.masks["0.weight"]
    assert torch.equal(net[0].weight, kept["0.weight"][rows])


@pytest.mark.parametrize("name", ["halp", "netadapt"])
def test_an_unknown_resource_is_refused_before_work(name):
    with pytest.raises(BadInput, match="'joules'"):
        build(name, of="joules")


def test_short_trainings_that_all_diverge_are_refused_in_a_sentence(net, batches):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loss = lambda out, y: F.cross_entropy(out, y) * (torch.nan if out.requires_grad else 1.)
    with pytest.raises(BadInput, match="every short training of NetAdapt diverged: lower lr"):
        prune(net, "netadapt", .5, batches, loss, tune_steps=2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_single_precision(net, batches, dtype):
    twin = net.to(dtype)
    plan = prune(twin, "netadapt", .5, [(x.to(dtype), y) for x, y in batches], F.cross_entropy, tune_steps=2)
    assert sum(int(m.sum()) for m in plan.masks.values()) == 15
    assert all(p.dtype == dtype for p in twin.parameters())
