"Group Fisher pruning: the squared derivative of a gate that coupled layers share, and what a unit costs."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune
from pruning_bench.core.budget import RESOURCES
from pruning_bench.core.stats import PROVIDERS
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.group_fisher import unit_macs, unit_memory


class Coupled(nn.Module):
    "A stream that two convolutions write and three layers read, and one inner group."
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.back, self.side = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x, gate=None):
        def gated(t): return t if gate is None else t * gate[:, None, None]
        x = F.relu(self.stem(x))
        y = self.side(gated(x)) + self.back(F.relu(self.inner(gated(x))))
        return self.head(y.mean((2, 3)))


@pytest.fixture
def world():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(n, 1, 8, 8, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in (4, 3)]
    return Coupled().double().eval(), batches


def by_gate(net, batches):
    "The mean over examples of the squared derivative of the loss by one gate, which all readers of the stem share."
    found = []
    for x, y in batches:
        for i in range(len(x)):
            gate = torch.ones(6, dtype=torch.double, requires_grad=True)
            found.append(torch.autograd.grad(F.cross_entropy(net(x[i:i + 1], gate), y[i:i + 1]), gate)[0].square())
    return torch.stack(found).mean(0)


def score(net, batches, **settings):
    return PROVIDERS["group_fisher"](Channels(net, batches, residual=True), batches, F.cross_entropy, **settings)


@pytest.mark.parametrize("per, saved", [("none", 1), ("memory", 64), ("macs", 64 * 9 + 16 * 9 * 5 + 16 * 6)])
def test_the_score_is_half_the_squared_derivative_of_the_shared_gate_over_what_it_saves(world, per, saved):
    net, batches = world
    assert torch.allclose(score(net, batches, per=per)["stem.weight"], by_gate(net, batches) / 2 / saved, rtol=1e-6)


def test_derivatives_of_coupled_layers_that_cancel_count_as_nothing(world):
    net, batches = world
    twin = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU())
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.write, self.plus, self.minus = twin, nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
            self.minus.weight.data = -self.plus.weight.data
            self.head = nn.Linear(4, 3)
        def forward(self, x):
            x = self.write(x)
            return self.head((self.plus(x) + self.minus(x)).mean((2, 3)))
    found = PROVIDERS["group_fisher"](Channels(Twice().double(), batches), batches, F.cross_entropy, per="none")
    assert found["write.0.weight"].abs().max() < 1e-20


def test_memory_counts_the_outputs_of_all_layers_that_write_a_unit(world):
    net, batches = world
    found = unit_memory(Channels(net, batches, residual=True))
    assert {n: set(v.tolist()) for n, v in found.items()} == {"stem.weight": {64}, "inner.weight": {16},
                                                              "back.weight": {32}}   # two layers of 16 positions


def test_memory_counts_the_tokens_of_linear_layers():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    for n in (2, 5):
        found = unit_memory(Channels(net, [torch.randn(n, 7, 4).double()]))
        assert found["0.weight"].tolist() == [7] * 6


def test_work_is_what_the_budget_says_a_unit_saves_at_the_widths_of_the_moment(world):
    net, batches = world
    space = Channels(net, batches, residual=True)
    masks = {n: torch.ones(len(g), dtype=torch.bool) for n, g in space.groups.items()}
    masks["inner.weight"][:2] = False
    space.apply({n: (None, m) for n, m in masks.items()})
    found = unit_macs(space)
    assert set(found["stem.weight"].tolist()) == {64 * 9 + 16 * 9 * 3 + 16 * 6}   # three of five inner channels
    price = RESOURCES["macs"](space)
    whole = {n: int(m.sum()) for n, m in masks.items()}
    for n in whole:
        assert found[n][0] == price(whole) - price(whole | {n: whole[n] - 1})


def test_a_budget_of_macs_keeps_more_units_when_the_score_is_divided_by_them(world):
    net, batches = world
    net.back.weight.data *= 1e-3   # all inner channels matter equally little
    plans = {per: prune(copy.deepcopy(net), "group-fisher", .5, batches, F.cross_entropy, per=per, rounds=1,
                        residual=True) for per in ("macs", "none")}
    assert all(p.density == pytest.approx(.5, abs=.05) for p in plans.values())


def test_an_unknown_saving_is_refused_before_work():
    with pytest.raises(BadInput, match="'seconds'"):
        build("group-fisher", per="seconds")
