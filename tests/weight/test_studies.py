"Knees of curves and the inverse participation ratio: golden values, invariances, the study of modular addition."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import masks_of
from pruning_bench.core.recovery import finetune
from pruning_bench.weight.studies import (essential_sparsity, ipr, kendall_tau, knee, mode_connectivity, oracle,
                                          subsets, three_regime)

GRID = torch.linspace(0, 1, 21)


# curves

@pytest.mark.parametrize("bend", [.2, .5, .75])
def test_a_hinge_has_its_knee_where_it_was_made(bend):
    quality = 1 - (GRID - bend).clamp(min=0) / (1 - bend)
    assert knee(GRID, quality) == pytest.approx(bend)
    assert knee(GRID, 80 * quality + 10) == pytest.approx(bend)
    assert knee(GRID, 3 - quality, higher=False) == pytest.approx(bend)
    assert essential_sparsity(GRID, quality) == pytest.approx(bend + .01 * (1 - bend))

def test_essential_is_read_between_the_points():
    assert essential_sparsity([0, .5, 1], [1, 1, .9], .05) == pytest.approx(.75)
    # exactly at the tolerance is still nothing
    assert essential_sparsity([0, .5, 1], [100, 99, 0], .01) == pytest.approx(.5)
    # the first crossing counts, recovery or not
    assert essential_sparsity([0, .2, .4, .6], [1, .98, 1.2, 0], .01) == pytest.approx(.1)
    assert essential_sparsity([0, .3, .6], [2., 2.1, 4.], .1, higher=False) == pytest.approx(.3 + .3 * .05 / .95)
    # log-likelihoods are negative
    assert essential_sparsity([0, .5, .9], [-1, -1, -1.5], .1) == pytest.approx(.5 + .4 * .2)

def test_a_larger_tolerance_is_never_less():
    quality = 1 - GRID ** 5
    found = [essential_sparsity(GRID, quality, t) for t in (0., .01, .05, .3, 2.)]
    assert found == sorted(found) and found[-1] == 1.

def test_curves_that_never_fall():
    assert essential_sparsity([0, .5, .9], [1, 1, 1.1]) == knee([0, .5, .9], [1, 1, 1.1]) == .9

@pytest.mark.parametrize("wrong", [([0, .5], [1]), ([0], [1]), ([0, .5, .5], [1, 1, 1]), ([.5, .2], [1, 1]),
                                   ([0, .5], [1, math.nan]), ([0, .5], [0, 1])])
def test_curves_that_say_nothing(wrong):
    for fn in (essential_sparsity, knee):
        with pytest.raises(BadInput, match="a curve needs"): fn(*wrong)


# the spectrum

@pytest.mark.parametrize("n", [5, 29, 32, 97])
def test_single_frequencies_have_one(n):
    t = torch.arange(n)
    for f in range(1, n // 2 + 1):
        assert ipr(torch.cos(2 * torch.pi * f * t / n + .3)).item() == pytest.approx(1, abs=1e-6)

@pytest.mark.parametrize("n", [29, 97])
def test_bounds(n):
    frequencies = n // 2
    assert ipr(torch.eye(n)).tolist() == pytest.approx([1 / frequencies] * n)   # an impulse has all frequencies alike
    with seeded(0): drawn = ipr(torch.randn(5000, n))
    assert drawn.min() >= 1 / frequencies and drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(2 / (frequencies + 1), rel=.03)

def test_against_a_spectrum_written_out():
    with seeded(1): v = torch.randn(3, 11)
    for r in (2, 3):
        for row, got in zip(v.double().numpy(), ipr(v, r)):
            power = np.array([abs(sum(row[t] * np.exp(-2j * np.pi * f * t / 11) for t in range(11))) ** 2
                              for f in range(1, 6)])
            assert got.item() == pytest.approx(((power / power.sum()) ** r).sum())

def test_constants_scales_and_shifts():
    with seeded(2): v = torch.randn(4, 29)
    assert ipr(torch.ones(29)) == 0 and ipr(torch.zeros(2, 29)).tolist() == [0, 0]
    for other in (3 * v, -v, v + 5, v.roll(7, -1), v.flip(-1)): assert torch.allclose(ipr(other), ipr(v), atol=1e-5)
    half = torch.cos(2 * torch.pi * 3 * torch.arange(29) / 29) + torch.cos(2 * torch.pi * 5 * torch.arange(29) / 29)
    assert ipr(half).item() == pytest.approx(.5)   # two equal frequencies
    assert ipr(nn.Linear(29, 4).weight).shape == (4,) and not ipr(nn.Linear(29, 4).weight).requires_grad
    with pytest.raises(BadInput, match="two or more"): ipr(torch.ones(3, 1))


# a network that adds modulo 29, taught with 15 % wrong answers

def add(seed, width=128, steps=400):
    g, p = torch.Generator().manual_seed(seed), 29
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    x, true, order = (torch.cat([F.one_hot(a, p), F.one_hot(b, p)], 1).float(), (a + b) % p,
                      torch.randperm(p * p, generator=g))
    bad, seen, unseen = order[:88], order[:588], order[588:]
    taught = true.clone()
    taught[bad] = (true[bad] + torch.randint(1, p, (88,), generator=g)) % p
    with seeded(seed):
        w, v = (nn.Parameter(torch.randn(s) * .5 / (2 * width) ** (1 / 3)) for s in ((width, 2 * p), (p, width)))
    opt = torch.optim.AdamW([w, v], 2e-2, weight_decay=1.)
    for _ in range(steps):
        opt.zero_grad()
        F.mse_loss((x[seen] @ w.T).square() @ v.T, F.one_hot(taught[seen], p).float()).backward()
        opt.step()
    score = (ipr(w[:, :p]) + ipr(w[:, p:]) + ipr(v.T)) / 3
    def rates(keep): # test accuracy, and wrong answers known by heart
        with torch.no_grad(): said = ((x @ w.T).square() * keep @ v.T).argmax(1)
        return (said[unseen] == true[unseen]).float().mean().item(), (said[bad] == taught[bad]).float().mean().item()
    return score, rates

@pytest.mark.slow
def test_neurons_without_a_frequency_know_by_heart():
    got = []
    for seed in range(3):
        score, rates = add(seed)
        rank = score.argsort().argsort()
        with seeded(seed): lot = torch.randperm(128)
        got.append([*rates(torch.ones(128)), *rates(rank >= 64), *rates(rank < 64), *rates(lot >= 64)])
    full, heart, kept, forgot, high, _, lot, _ = np.mean(got, 0)
    assert full > .9 and heart > .95
    assert kept > full - .02 and forgot < heart - .5 and kept > lot + .2 > high + .2


# oracle pruning and phase diagrams

def mlp(seed=0):
    with seeded(seed): return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

X, Y = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
def loss(net):
    with torch.no_grad(): return F.cross_entropy(net(X), Y).item()
def fit(net, seed=0, steps=20):
    with seeded(seed): finetune(steps, 1e-2)(net, [(X[i], Y[i]) for i in torch.randperm(60).split(20)], F.cross_entropy)

@pytest.mark.parametrize("width, removed", [(6, 2), (5, 0), (4, 4)])
def test_all_subsets_once(width, removed):
    keep = subsets(width, removed)
    assert keep.dtype == torch.bool and len(keep) == math.comb(width, removed) == len(keep.unique(dim=0))
    assert (keep.sum(1) == width - removed).all()

def test_drawn_subsets_differ_and_repeat_with_their_seed():
    keep = subsets(20, 8, 50, seed=1)
    assert keep.shape == (50, 20) and len(keep.unique(dim=0)) == 50 and (keep.sum(1) == 12).all()
    assert torch.equal(keep, subsets(20, 8, 50, seed=1)) and not torch.equal(keep, subsets(20, 8, 50, seed=2))
    for bad in ((4, 5), (4, -1), (4, 2, 0)):
        with pytest.raises(BadInput, match="units"): subsets(*bad)

def test_kendall_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    for high in (4, 1000):
        a, b = torch.randint(high, (30,), generator=g), torch.randint(high, (30,), generator=g)
        assert kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    assert kendall_tau([1, 2, 3], [2, 4, 9]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    with pytest.raises(BadInput): kendall_tau([1], [2])

def test_the_oracle_measures_every_candidate_on_its_own():
    model, before, inside = mlp(), mlp(), []
    masks = [{"2.weight": row.expand(3, -1)} for row in subsets(6, 2)]
    def train(net):
        fit(net)
        inside.append(masks_of(net)["2.weight"])
    rows = oracle(model, masks, loss, train, lambda net: -loss(net))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())) and not masks_of(model)
    assert all(torch.equal(a, m["2.weight"]) for a, m in zip(inside, masks))
    for i in (0, 7, 14):   # by hand
        one = mlp()
        with torch.no_grad(): one[2].weight.mul_(masks[i]["2.weight"])
        assert rows[i]["loss"] == pytest.approx(loss(one), abs=1e-6)
    assert all(-row["quality"] < row["loss"] for row in rows)
    still = oracle(model, masks, loss, lambda net: None, loss)
    assert kendall_tau([r["loss"] for r in still], [r["quality"] for r in still]) == 1   # without retraining, the same
    with pytest.raises(BadInput, match="2.weight"): oracle(model, [{"2.wieght": masks[0]["2.weight"]}], loss, fit, loss)

def test_a_network_is_connected_to_itself_and_not_to_its_mirror():
    net, mirror = mlp(), mlp()
    fit(net, steps=150), fit(mirror, steps=150)
    order = torch.arange(6).flip(0)
    with torch.no_grad():   # the same function, with its hidden units in another order
        for t, dim in ((mirror[0].weight, 0), (mirror[0].bias, 0), (mirror[2].weight, 1)):
            t.copy_(t.index_select(dim, order).clone())
    assert loss(mirror) == pytest.approx(loss(net), abs=1e-5)
    assert mode_connectivity(net, net, loss) == pytest.approx(0, abs=1e-6)
    assert mode_connectivity(net, mirror, loss) < -.05

def test_a_phase_diagram_has_a_row_per_temperature_and_density():
    trained, seen = [], []
    def start(steps):
        net = mlp()
        fit(net, steps=steps)
        trained.append(steps)
        return net
    def again(net, seed):
        seen.append((seed, float((net[0].weight != 0).float().mean())))
        fit(net, seed)
    rows = three_regime(start, (5, 60), iter((.25, 1.)), again, loss, seeds=(3, 3))
    cells = [(r["temperature"], r["density"]) for r in rows]
    assert trained == [5, 60] and cells == [(5, .25), (5, 1.), (60, .25), (60, 1.)]
    assert [s for s, _ in seen] == [3] * 8 and [d for _, d in seen] == [.25, .25, 1., 1.] * 2
    assert all(abs(r["connectivity"]) < 1e-6 for r in rows)   # one seed: the same network twice
    apart = three_regime(start, (60,), (1.,), again, loss, on_path=lambda net: 7.)
    assert apart[0]["connectivity"] == 0 and apart[0]["error"] != 7
    with pytest.raises(BadInput, match="two seeds"): three_regime(start, (5,), (1.,), again, loss, seeds=(1, 2, 3))
