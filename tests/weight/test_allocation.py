"Allocations at one score: golden values by hand, exact budgets, brute force, refusals; orderings over three seeds."
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune
from pruning_bench.bench.task import find_task
from pruning_bench.core.allocate import ALLOCATORS, erk, round_to_units, total_density
from pruning_bench.core.inputs import seeded
from pruning_bench.core.pattern import count_to_keep
from pruning_bench.core.score import lamp, magnitude, unit_scores
from pruning_bench.core.space import Weights
from pruning_bench.weight.allocation import (output_distortion, er, fill_to_total, global_with_floor,
                                             global_rescaled_floor, knapsack, rd, rescale_to_budget, uniform_plus)
from pruning_bench.weight.magnitude import copy_allocation, shuffle_masks


def mlp(*sizes, seed=0):
    with seeded(seed):
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

def conv(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(),
                             nn.Conv2d(12, 16, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10))

def scored(model, score=magnitude):
    space = Weights(model)
    return unit_scores(space, score, {n: SimpleNamespace() for n in space.names()}), space

def inputs(n=2): return list(torch.randn(n, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
def total(plan): return sum(int(m.sum()) for m in plan.masks.values())


# every allocation

RULES = {"uniform_plus": uniform_plus, "er": er, "global_with_floor": global_with_floor(),
         "floor of 3": global_with_floor(3),
         "rescaled": global_rescaled_floor(3)}

@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("keep", [.15, .3, .7, .97])
def test_allocations_spend_the_budget(name, keep):
    scores, space = scored(conv())
    units = sum(s.numel() for s in scores.values())
    shares = RULES[name](scores, keep, space)
    assert total_density(shares, scores, space) == pytest.approx(keep, abs=.5 / units + 1e-9)
    assert all(0 <= f <= 1 + 1e-12 for f in shares.values())
    exact = round_to_units(shares, keep, scores, space)
    assert sum(round(exact[n] * scores[n].numel()) for n in exact) == count_to_keep(keep, units)

ALL = {**RULES, "uniform": "uniform", "erk": "erk", "global": "global", "rd": "rd"}

def lopsided(model, gone):
    "Remove part of every layer at random: the fractions in `gone`, in turn."
    space, fractions = Weights(model), itertools.cycle(gone)
    with seeded(1):
        space.apply({n: (space.w(n), torch.rand(space.w(n).shape) >= next(fractions)) for n in space.names()})
    return {n: space.alive(n) for n in space.names()}

@pytest.mark.parametrize("gone", [(.5,), (.95, .1), (.1, .9, .4), (1., .2)], ids=str)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("net", [lambda: mlp(64, 96, 32, 10), conv], ids=["mlp", "conv"])
def test_what_is_removed_counts_as_removed(net, name, gone):
    model = net()
    before = lopsided(model, gone)
    units, left = (sum(f(m) for m in before.values()) for f in (torch.numel, lambda m: int(m.sum())))
    for sparsity in (1 - .9 * left / units, 1 - .5 * left / units):
        plan = prune(model, allocate=ALL[name], sparsity=sparsity, data=inputs())
        assert total(plan) == count_to_keep(1 - sparsity, units)
        assert all((m <= before[n]).all() for n, m in plan.masks.items())

@pytest.mark.parametrize("slug", ["gradual-magnitude", "granet", "pdp", "bip", "str"])
def test_training_rules_count_what_is_removed(slug):
    model = mlp(64, 96, 32, 10)
    before = lopsided(model, (.95, .1))
    units = sum(m.numel() for m in before.values())
    batches = [(x, torch.arange(16) % 10) for x in inputs()]
    plan = prune(model, slug, .8, batches, F.cross_entropy, steps=20)
    assert total(plan) == count_to_keep(.2, units) and all((m <= before[n]).all() for n, m in plan.masks.items())

@pytest.mark.parametrize("name", ["global-mp", "lamp", "rd", "random-erk"])
@pytest.mark.parametrize("sparsity", [.3, .8, .95])
def test_methods_keep_exact_counts(name, sparsity):
    plan = prune(conv(), name, sparsity, inputs())
    assert total(plan) == count_to_keep(1 - sparsity, sum(m.numel() for m in plan.masks.values()))

def test_registered_by_name():
    for name in ("uniform_plus", "er", "global_with_floor", "rd"):
        assert name in ALLOCATORS
        assert prune(conv(), "magnitude", .7, inputs(), allocate=name).provenance["allocate"].split("(")[0] == name
    with pytest.raises(BadInput, match="uniform_plus"): prune(conv(), "magnitude", .7, allocate="uniform_pls")


# uniform with exceptions, Erdos-Renyi

def test_uniform_plus_by_hand():
    scores, space = scored(conv())
    size = {n: s.numel() for n, s in scores.items()}
    shares = list(uniform_plus(scores, .15, space).values())
    middle = (.15 * sum(size.values()) - 72 - .2 * 480) / (864 + 576)
    assert shares == pytest.approx([1, middle, middle, .2])
    # no exception for the last layer above a fifth
    assert list(uniform_plus(scores, .5, space).values())[-1] == list(uniform_plus(scores, .5, space).values())[1]

def test_uniform_plus_leaves_a_first_linear_layer_alone():
    scores, space = scored(mlp(64, 40, 30, 10))
    shares = list(uniform_plus(scores, .1, space).values())
    assert shares[0] == shares[1] == pytest.approx((.1 * 4060 - .2 * 300) / 3760) and shares[2] == .2

def test_uniform_plus_refuses_what_does_not_fit():
    with pytest.raises(BadInput, match="uniform_plus"): prune(conv(), "magnitude", .98, allocate="uniform_plus")

def test_er_and_erk():
    flat, flat_space = scored(mlp(784, 300, 100, 10))
    shares = er(flat, .1, flat_space)
    assert list(shares.values()) == pytest.approx([.0796, .2302, 1.], abs=1e-4)
    scores, space = scored(conv())
    ours, kernels = er(scores, .2, space), erk(scores, .2, space)
    raw = {"2.weight": 20 / 96, "4.weight": 28 / 192}
    assert ours["2.weight"] / ours["4.weight"] == pytest.approx(raw["2.weight"] / raw["4.weight"]) and ours != kernels
    assert kernels["2.weight"] / kernels["4.weight"] == pytest.approx((26 / 864) / (32 / 576))

def test_allocations_by_shape_refuse_other_units():
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    for name in ("uniform_plus", "er", "rd"):
        with pytest.raises(BadInput): prune(conv(), "l1-filter", .5, [(x, y)], F.cross_entropy, allocate=name)

def test_random_erk_is_random_with_the_densities_of_erk():
    one, two = (prune(mlp(784, 300, 100, 10), "random-erk", .9, seed=s) for s in (0, 1))
    assert one != two
    assert one.table().density.round(4).tolist() == [.0796, .2302, 1.] == two.table().density.round(4).tolist()
    assert one == prune(mlp(784, 300, 100, 10), "random", .9, allocate="erk")
    assert build("random-erk").provenance["score"] == "random"


# floors

def test_floor_is_the_best_mask_with_a_minimum():
    torch.manual_seed(0)
    scores = {n: torch.rand(4) * s for n, s in (("a", 1.), ("b", 3.), ("c", .1))}
    space = SimpleNamespace(cost=lambda n: 1., unit="weight")
    for k, least in itertools.product((6, 8, 10), (1, 2)):
        shares = global_with_floor(least)(scores, k / 12, space)
        kept = {n: round(4 * f) for n, f in shares.items()}
        value = lambda c: sum(float(s.sort(descending=True).values[:m].sum()) for s, m in zip(scores.values(), c))
        best = max((c for c in itertools.product(range(least, 5), repeat=3) if sum(c) == k), key=value)
        assert tuple(kept.values()) == best

def test_floor_of_nothing_is_global_and_a_floor_prevents_collapse():
    net = lambda: mlp(64, 256, 256, 10)
    assert prune(net(), "global-mp", .97, min_per_layer=0) == prune(net(), "global-magnitude", .97)
    assert prune(net(), "global-magnitude", .97).table().kept.min() == 0
    assert prune(net(), "global-mp", .97).table().kept.min() == round(.0005 * (64 * 256 + 256 * 256 + 2560))
    assert prune(net(), "global-mp", .97, min_per_layer=50).table().kept.min() == 50

def test_floor_never_returns_what_is_gone():
    net = mlp(64, 256, 256, 10)
    first = prune(net, "global-magnitude", .97)
    again = prune(net, "global-mp", .98)
    assert total(again) == count_to_keep(.02, sum(m.numel() for m in again.masks.values()))
    assert all((again.masks[n] <= first.masks[n]).all() for n in first.masks)

def test_floors_above_the_budget_are_refused():
    net = mlp(64, 40, 10)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(BadInput, match="floor"): prune(net, "global-mp", .9, min_per_layer=200)
    with pytest.raises(BadInput, match="floor"): prune(net, "magnitude", .9, allocate=global_rescaled_floor(200))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

def test_rescaled_floor_of_the_paper():
    size = {"a": 1000, "b": 400, "c": 100}
    moved = rescale_to_budget({"a": .90, "b": .97, "c": .99}, size, 20, .92)
    assert moved == pytest.approx({"a": .92, "b": .95, "c": .80}, abs=1e-7)
    assert sum(moved[n] * size[n] for n in size) / 1500 == pytest.approx(.92, abs=1e-8)
    # nothing to do
    assert rescale_to_budget({"a": .90, "b": .97, "c": .99}, size, 0,
                             1387 / 1500) == pytest.approx({"a": .90, "b": .97, "c": .99})


# LAMP

def test_lamp_by_hand():
    assert lamp(torch.tensor([[1., -2., 3.]]), None)[0].tolist() == pytest.approx([1 / 14, 4 / 13, 1.])
    w = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    by_hand = torch.stack([v**2 / (w[w.abs() >= v.abs()]**2).sum() for v in w.flatten()]).view_as(w)
    assert torch.allclose(lamp(w, None), by_hand.double(), rtol=1e-5)
    assert not torch.isnan(lamp(torch.zeros(3, 3), None)).any()

def test_lamp_keeps_the_best_of_every_layer_whatever_its_scale():
    net = mlp(64, 40, 30, 10)
    with torch.no_grad(): net[1].weight *= 1024; net[5].weight /= 1024
    assert prune(copy.deepcopy(net), "lamp", .9) == prune(mlp(64, 40, 30, 10), "lamp", .9)
    plan = prune(net, "lamp", 1 - 3.2 / 4060)
    assert plan.table().kept.tolist() == [1, 1, 1]
    assert all(m.flatten()[mlp(64, 40, 30, 10).get_parameter(n).abs().argmax()] for n, m in plan.masks.items())

@pytest.mark.parametrize("keep", [.02, .2, .6])
def test_lamp_is_an_allocation(keep):
    plan = prune(conv(), "lamp", 1 - keep)
    assert plan == prune(conv(), "magnitude", 1 - keep, allocate=copy_allocation(plan))

def test_lamp_breaks_ties_like_everybody():
    w = torch.ones(2, 4)
    assert lamp(w, None).flatten().argsort(descending=True).tolist() == list(range(8))


# rate and distortion

@pytest.mark.parametrize("seed", range(20))
def test_knapsack_equals_brute_force(seed):
    g = torch.Generator().manual_seed(seed)
    def draw(n, high): return torch.randint(0, high, (n,), generator=g).tolist()
    loss = [draw(int(k), 50) for k in torch.randint(1, 7, (3,), generator=g)]
    cost = [[0, *draw(len(l) - 1, 9)] for l in loss]
    for budget in (0, 3, 10, 30):
        value = lambda pick: sum(l[j] for l, j in zip(loss, pick))
        allowed = [p for p in itertools.product(*(range(len(l)) for l in loss))
                   if sum(c[j] for c, j in zip(cost, p)) <= budget]
        mine = knapsack(loss, cost, budget)
        assert tuple(mine) in allowed and value(mine) == min(map(value, allowed))

def test_knapsack_refuses_what_cannot_be_bought():
    with pytest.raises(BadInput, match="budget"): knapsack([[1.]], [[5]], 4)

def test_distortion_is_measured_one_layer_at_a_time():
    net, data = conv().eval(), inputs()
    before = copy.deepcopy(net.state_dict())
    scores, space = scored(net)
    curves = output_distortion(space, scores, data, {n: [1, 20, s.numel()] for n, s in scores.items()})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for n, s in scores.items():
        other = copy.deepcopy(net)
        weights = {m: l for m, l in Weights(other).layers.items()}
        edge = s.flatten().sort(descending=True).values[19]
        weights[n].weight.data *= (weights[n].weight.data.abs() >= edge)
        change = torch.stack([(other(x) - net(x)).square().mean() for x in data]).mean().item()
        assert curves[n][1] == pytest.approx(change, rel=1e-4) and curves[n][2] == 0

def test_rd_is_the_best_of_its_grid():
    data = inputs()
    scores, space = scored(conv())
    stats = {n: SimpleNamespace(calibration_batches=data) for n in space.names()}
    keep, points = .3, 4
    units = sum(s.numel() for s in scores.values())
    counts = {n: [max(1, round(s.numel() * (j / points)**2)) for j in range(points + 1)] for n, s in scores.items()}
    curves = output_distortion(space, scores, data, counts)
    allowed = [p for p in itertools.product(range(points + 1), repeat=4)
               if sum(counts[n][j] for n, j in zip(counts, p)) <= round(keep * units)]
    best = min(allowed, key=lambda p: sum(curves[n][j] for n, j in zip(counts, p)))
    chosen = {n: counts[n][j] for n, j in zip(counts, best)}
    expected = fill_to_total(chosen, {n: s.numel() for n, s in scores.items()},
                             {n: s.numel() for n, s in scores.items()}, round(keep * units))
    assert rd(points)(scores, keep, space, stats) == pytest.approx(expected)
    assert all(f * scores[n].numel() >= chosen[n] - 1e-9 for n, f in expected.items())

def test_filled_meets_the_total_and_the_bounds():
    most = {"a": 10, "b": 4, "c": 7}
    for total_ in (0, 3, 12, 17, 21):
        shares = fill_to_total({"a": 5, "b": 4, "c": 3}, most, most, total_)
        assert sum(f * most[n] for n, f in shares.items()) == pytest.approx(total_)
        assert all(-1e-12 <= f <= 1 + 1e-12 for f in shares.values())

def test_rd_at_the_last_weights():
    plan = prune(conv(), "rd", 1 - 4.2 / 1992, inputs(1))
    assert plan.table().kept.tolist() == [1, 1, 1, 1]

def test_rd_needs_inputs_and_no_labels():
    with pytest.raises(BadInput, match="data"): prune(conv(), "rd", .8)
    data = inputs()
    assert prune(conv(), "rd", .8, data) == prune(conv(), "rd", .8, [(x, torch.zeros(16).long()) for x in data])
    plan = prune(conv(), "rd", .8, data)
    assert plan.cost["backward"] == 0 and plan.cost["forward"] > 4 * 20

def test_rd_measures_with_the_scores_it_allocates_for():
    data = inputs()
    plans = [prune(conv(), score=s, allocate="rd", sparsity=.8, data=data) for s in ("magnitude", "random")]
    assert plans[0].table().density.tolist() != plans[1].table().density.tolist()

def test_rd_again_only_cuts_deeper():
    net, data = conv(), inputs()
    first = prune(net, "rd", .5, data)
    more = prune(net, "rd", .8, data)
    assert total(more) == count_to_keep(.2, sum(m.numel() for m in more.masks.values()))
    assert all((more.masks[n] <= first.masks[n]).all() for n in first.masks)


# orderings

@pytest.mark.slow
def test_with_the_same_retraining_uniform_is_last():
    world, found = find_task("digits-cnn"), {}
    for name in ("magnitude", "global-mp", "lamp"):
        found[name] = []
        for seed in range(3):
            model = world.dense(seed)
            prune(model, name, .95, world.batches(seed), world.loss, seed=seed, recover=world.recover)
            found[name].append(100 * world.evaluate(model)["accuracy"])
    mean = {n: sum(v) / 3 for n, v in found.items()}
    assert min(mean["lamp"], mean["global-mp"]) > mean["magnitude"] + 5

@pytest.mark.slow
def test_after_training_the_choice_is_everything():
    world, found = find_task("digits-cnn"), []
    for seed in range(3):
        model, other = world.dense(seed), world.dense(seed)
        plan = prune(model, "lamp", .7)
        shuffle_masks(plan, seed).apply(other)
        found.append(100 * (world.evaluate(model)["accuracy"] - world.evaluate(other)["accuracy"]))
    assert sum(found) / 3 > 20
