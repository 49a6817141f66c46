"Knees of curves and the inverse participation ratio: golden values, invariances, the study of modular addition."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput
from pruning_bench.core.inputs import seeded
from pruning_bench.weight.studies import essential_sparsity, ipr, knee

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
