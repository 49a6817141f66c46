"EagleEye: candidates judged as the network that is left, with the batch norm statistics of a fresh pass."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.inputs import seeded
from pruning_bench.core.recovery import recalibrate_bn
from pruning_bench.core.stats import collect
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.bn_candidates import (candidate_network, draw_shares, eagleeye, quality,
                                                    shares_to_counts)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3),
                        nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.normal_(m.bias)
    return net.double().eval()


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 1, 8, 8, generator=g).double(), torch.randint(0, 4, (16,), generator=g))
            for _ in range(4)]


def norms_of_a_pass(net, inputs):
    "Mean and unbiased variance of the input of every batch norm, averaged over batches, each norm on its batch."
    found = {}
    def hook(name):
        def record(m, args):
            x = args[0].transpose(0, 1).flatten(1)
            found.setdefault(name, []).append((x.mean(1), x.var(1)))
        return record
    twin = copy.deepcopy(net)
    for n, m in twin.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(hook(n))
            m.train()
    with torch.no_grad():
        for x in inputs:
            twin(x)
    return {n: [torch.stack(v).mean(0) for v in zip(*pairs)] for n, pairs in found.items()}


def test_the_statistics_of_a_candidate_are_those_of_a_fresh_pass_through_the_cut_network(net, batches):
    space = Channels(net, batches)
    scores = {n: space.w(n) for n in space.names()}
    small = candidate_network(space, scores, {"0.weight": 3, "3.weight": 2})
    recalibrate_bn(small, batches)
    fresh = norms_of_a_pass(small, [x for x, _ in batches])
    for n, (mean, var) in fresh.items():
        assert torch.allclose(small.get_submodule(n).running_mean, mean)
        assert torch.allclose(small.get_submodule(n).running_var, var)


def test_a_candidate_is_the_network_that_pruning_leaves(net, batches):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    space = Channels(net, batches)
    scores = {n: space.reduce(n, {k: layer.read().abs() for k, layer in space.layers.items()}) for n in space.names()}
    small = candidate_network(space, scores, {"0.weight": 4, "3.weight": 3})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    prune(net, "l1-filter", .5, batches)
    x = batches[0][0]
    assert torch.equal(small(x), net(x))


def test_quality_is_the_accuracy_and_the_mean_loss(net, batches):
    uneven = [(x[:n], y[:n]) for n, (x, y) in zip((16, 5, 1), batches)]
    x, y = (torch.cat(t) for t in zip(*uneven))
    right, loss = quality(net, uneven, F.cross_entropy)
    assert right == (net(x).argmax(1) == y).double().mean().item()
    assert -loss == pytest.approx(F.cross_entropy(net(x), y).item())
    assert quality(net, [(x, torch.randn(22, 4).double())], F.mse_loss)[0] == 0   # no class labels


def test_the_winner_is_the_best_of_all_candidates_by_brute_force(net, batches):
    space = Channels(net, batches)
    stats = collect(space, batches, {"judging_batches"}, F.cross_entropy)
    scores, size = {n: space.w(n) for n in space.names()}, {"0.weight": 8, "3.weight": 6}
    with seeded(5):
        found = eagleeye(12, .1)(scores, .5, space, stats)
    with seeded(5):
        drawn = draw_shares(size, 12, .1)
    values = []
    for shares in drawn:
        counts = shares_to_counts(shares, size, 7)
        assert sum(counts.values()) == 7
        small = recalibrate_bn(candidate_network(space, scores, counts), batches[::2])
        values.append((quality(small, batches[1::2], F.cross_entropy), counts))
    best = max(values, key=lambda v: v[0])[1]
    assert {n: round(f * size[n]) for n, f in found.items()} == best
    assert len({tuple(c.values()) for _, c in values}) > 2   # the candidates differ


def test_the_plan_meets_a_budget_of_work_and_more_of_it_never_costs_more(net, batches):
    for of in ("macs", "params"):
        plan = prune(copy.deepcopy(net), "eagleeye", {of: .5}, batches, F.cross_entropy, candidates=4)
        assert plan.budget["achieved"] >= .5


def test_other_units_are_refused(batches):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    with pytest.raises(BadInput, match="searches the widths of channel groups"):
        prune(net, "magnitude", .5, batches, F.cross_entropy, allocate="eagleeye")
