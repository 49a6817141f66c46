"Channel permutation: gains by trying, searches that only improve, and networks whose function stays the same."
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import masks_of
from pruning_bench.core.space import Weights
from pruning_bench.weight.channel_permutation import (channel_permutation, kept_magnitude, permutation_search,
                                                      permute_units, reading_columns, swap_gains)


def mlp(seed=0, norm=False):
    with seeded(seed):
        return nn.Sequential(nn.Linear(12, 16), *[nn.BatchNorm1d(16)] * norm, nn.ReLU(), nn.Linear(16, 8), nn.ReLU(),
                             nn.Linear(8, 4)).eval()


class Conv(nn.Module):
    "A stem, a residual branch with norms, a flattening head: columns that belong to pixels."
    def __init__(self, flatten):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.bn, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.flatten, self.head = flatten, nn.Linear(8 * 16 if flatten else 8, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.b(F.relu(self.bn(self.a(x))))
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))


def conv(flatten, seed=0):
    with seeded(seed):
        net = Conv(flatten).eval()
        for m in (net.norm, net.bn):
            for t in (m.running_mean, m.weight.data, m.bias.data):
                t.copy_(torch.randn(t.shape))
            m.running_var.copy_(torch.rand(m.running_var.shape) + .5)
    return net


def features(): return [(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)]
def images(): return [(torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)]


def prepared(model, data):
    "The model after the permutation alone."
    method = channel_permutation()
    method.prepare(method, Weights(model), .5, SimpleNamespace(loss=F.cross_entropy, data=iter(data)))
    return model


# the search

@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (1, 2), (3, 4)])
def test_gains_are_what_an_exchange_gains(n, m):
    with seeded(0): size = torch.randn(3, 3 * m).abs().double()
    gains = swap_gains(size, n, m)
    for i, j in itertools.product(range(3 * m), repeat=2):
        order = list(range(3 * m))
        order[i], order[j] = order[j], order[i]
        if i // m == j // m:
            assert gains[i, j] == -torch.inf
        else:
            tried = kept_magnitude(size[:, order], n, m) - kept_magnitude(size, n, m)
            assert gains[i, j].item() == pytest.approx(tried, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_ends_where_no_exchange_helps(seed):
    with seeded(seed): size = torch.randn(5, 16).abs()
    order = permutation_search(size, 2, 4)
    assert order.sort().values.tolist() == list(range(16))
    assert kept_magnitude(size[:, order], 2, 4) > kept_magnitude(size, 2, 4)
    assert swap_gains(size[:, order].double(), 2, 4).max() < 1e-6
    assert permutation_search(size[:, order], 2, 4).tolist() == list(range(16))   # nothing more to do


def test_a_row_by_hand():
    row = torch.tensor([[9., 8, 7, 6, 4, 3, 2, 1]])
    assert kept_magnitude(row, 2, 4) == 24
    assert kept_magnitude(row[:, permutation_search(row, 2, 4)], 2, 4) == 30


# networks

@pytest.mark.parametrize("make, data", [(mlp, features), (lambda: mlp(norm=True), features),
                                        (lambda: conv(False), images), (lambda: conv(True), images)])
def test_the_function_stays_the_same(make, data):
    model, x = make().double(), data()[0][0].double()
    before, original = model(x), copy.deepcopy(model)
    prepared(model, [(x, data()[0][1])])
    assert torch.allclose(model(x), before, atol=1e-9)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), original.parameters()))
    for p, q in zip(model.parameters(), original.parameters()):
        assert torch.equal(p.flatten().sort().values, q.flatten().sort().values)   # moved, not changed


@pytest.mark.parametrize("make, data, skip", [(mlp, features, ()), (lambda: conv(False), images, ())])
def test_the_mask_keeps_more(make, data, skip):
    def kept(name):
        model = make()
        plan = prune(model, name, "2:4", data(), F.cross_entropy, skip=skip)
        return plan, sum(model.get_parameter(n).abs().sum().item() for n in plan.masks)
    (_, plain), (plan, permuted) = kept("magnitude"), kept("channel-permutation")
    assert permuted > plain * 1.001
    for m in plan.masks.values():   # kernels are rows of their own: input channels come last
        assert (m.reshape(-1, 4).sum(1) == 2).all()


def test_an_order_with_a_meaning_is_left_alone():
    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(self.a(x) * torch.linspace(1, 2, 8))   # a constant per channel, in the code
    with seeded(0): model = Ordered()
    x = features()[0][0]
    before = model(x)
    prepared(model, features())
    assert torch.allclose(model(x), before, atol=1e-5)


def test_a_permutation_that_changes_the_output_is_taken_back(monkeypatch):
    from pruning_bench.graph.groups import dependency_groups
    from pruning_bench.weight import channel_permutation as module

    def wrong(model, batch, run=None):   # groups that have lost the rows that write the channels
        groups = [g for g in dependency_groups(model, batch).groups if len(g) in (8, 16)]
        for g in groups:
            g.members = {k: v for k, v in g.members.items() if k in g.consumes}
        return SimpleNamespace(groups=groups)
    monkeypatch.setattr(module, "dependency_groups", wrong)
    model = prepared(mlp(), features())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), mlp().parameters()))


def test_every_position_of_a_kernel_is_a_row():
    from pruning_bench.graph.groups import dependency_groups
    model = conv(False)
    group = next(g for g in dependency_groups(model, images()[0]).groups if ("b.weight", 1) in g.consumes)
    assert [tuple(c.shape) for c in reading_columns(Weights(model), group, 4)] == [(8, 16)]
    stream = next(g for g in dependency_groups(model, images()[0]).groups if ("a.weight", 1) in g.consumes)
    shapes = sorted(tuple(c.shape) for c in reading_columns(Weights(model), stream, 4))
    assert shapes == [(4, 8), (16 * 9, 8)]


def test_columns_that_share_a_channel_are_left_as_they_are():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(16, 4)

        def forward(self, x):
            h = F.relu(self.a(x))
            return self.b(torch.cat([h, h], 1))
    from pruning_bench.graph.groups import dependency_groups
    model = Twice()
    group = next(g for g in dependency_groups(model, features()[0]).groups if ("a.weight", 0) in g.members)
    assert group.members[("b.weight", 1)].shape == (8, 2) and reading_columns(Weights(model), group, 4) == []


def test_masks_move_with_their_weights():
    model = mlp()
    prune(model, "random", .5)
    x = features()[0][0]
    before, counts = model(x), {n: int(m.sum()) for n, m in masks_of(model).items()}
    prepared(model, features())
    assert torch.allclose(model(x), before, atol=1e-5)
    assert {n: int(m.sum()) for n, m in masks_of(model).items()} == counts
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in masks_of(model).items())


def test_a_permutation_and_its_inverse():
    from pruning_bench.graph.groups import dependency_groups
    model, order = mlp(), torch.randperm(16, generator=torch.Generator().manual_seed(3))
    group = next(g for g in dependency_groups(model, features()[0]).groups if len(g) == 16)
    permute_units(model, group, order)
    assert torch.equal(model[0].weight, mlp()[0].weight[order])
    assert torch.equal(model[2].weight, mlp()[2].weight[:, order])
    assert torch.equal(model[0].bias, mlp()[0].bias[order])
    permute_units(model, group, order.argsort())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), mlp().parameters()))


@pytest.mark.parametrize("settings", [dict(sparsity=.5, pattern="unstructured"), dict(sparsity=.5, pattern="per_row")])
def test_requests_without_a_pattern_of_groups_are_refused(settings):
    model = mlp()
    with pytest.raises(BadInput, match="2:4"):
        prune(model, "channel-permutation", data=features(), loss=F.cross_entropy, **settings)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), mlp().parameters()))
