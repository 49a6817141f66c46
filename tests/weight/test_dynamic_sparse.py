"Dynamic sparse training and soft shrinkage: counts, births, schedules and limits exactly, orderings over three seeds."
import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, Method, build, prune
from pruning_bench.bench.task import find_task
from pruning_bench.core.allocate import erk, global_, topk_mask
from pruning_bench.core.rule import Rule, optimizer_buffers, apply_rule
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import masks_of
from pruning_bench.core.method import METHODS
from pruning_bench.core.pattern import as_pattern
from pruning_bench.core.recovery import finetune
from pruning_bench.core.score import random
from pruning_bench.core.space import Weights
from pruning_bench.weight import dynamic_sparse
from pruning_bench.weight.gradual import current_masks, prune_to_density
from pruning_bench.weight.dynamic_sparse import (ANNEALS, random_growth, gradient_growth, drop_grow,
                                                 dynamic_sparse_rule, drop_grow_layers, update_interval, granet_rule,
                                                 soft_shrinkage_rule)


def mlp(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(),
                             nn.Linear(20, 10))

def conv(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2),
                             nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))

def batches(seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 1, 8, 8, generator=g), torch.randint(0, 10, (16,), generator=g)) for _ in range(n)]

def size(model): return sum(p.numel() for p in model.parameters() if p.dim() > 1)
def total(masks): return sum(int(m.sum()) for m in masks.values())
def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def run(rule, model=None, keep=.2, steps=20, optimizer="adamw", look=None):
    "A training under a rule; `look(training)` is called after every update."
    model = mlp() if model is None else model
    seen = rule if look is None else replace(rule, update=lambda training: (rule.update(training), look(training)))
    with apply_rule(seen, Weights(model), keep, steps):
        finetune(steps, 1e-2, optimizer)(model, batches(), F.cross_entropy)
    return model

def masks(training): return {n: training.alive(n).clone() for n in training.names}
def method(steps=20, **parts): return Method(recover=finetune(steps), **parts)


# drop and grow

def test_drop_grow_by_hand():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0]]).bool()
    drop = torch.tensor([[4., 1., 0.], [0., 3., 0.], [2., 0., 0.]])
    grow = torch.tensor([[9., 2., 1.], [5., 9., 0.], [7., 0., 3.]])
    new, born = drop_grow(mask, drop, grow, 2)   # 1 and 2 go; 7 wins and was there before, then 5
    assert new.tolist() == [[True, False, False], [True, True, False], [True, False, False]]
    assert born.nonzero().tolist() == [[1, 0]]
    assert torch.equal(drop_grow(mask, drop, grow, 0)[0], mask) and not drop_grow(mask, drop, grow, 0)[1].any()
    all_gone, _ = drop_grow(mask, drop, grow, 99)
    assert all_gone.flatten().nonzero().flatten().tolist() == [0, 3, 4, 6]

def test_ties_go_to_the_lower_index():
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]]).bool()
    new, born = drop_grow(mask, torch.zeros(1, 6), torch.zeros(1, 6), 2)
    assert new.tolist() == [[True, True, True, False, False, False]]
    assert born.tolist() == [[True, False, True, False, False, False]]

@pytest.mark.parametrize("seed", range(8))
def test_drop_grow_is_the_sorted_oracle(seed):
    with seeded(seed):
        mask, drop, grow, n = torch.rand(7, 9) < .4, torch.randn(7, 9), torch.randn(7, 9), int(torch.randint(0, 12, ()))
    new, born = drop_grow(mask, drop, grow, n)
    alive = sorted(mask.flatten().nonzero().flatten().tolist(), key=lambda i: drop.flatten()[i].item())
    kept = set(alive[n:])
    rest = sorted(set(range(63)) - kept, key=lambda i: -grow.flatten()[i].item())
    assert set(new.flatten().nonzero().flatten().tolist()) == kept | set(rest[:min(n, len(alive))])
    assert not (born & mask).any() and torch.equal(new, (mask & new) | born)

@pytest.mark.parametrize("name", ["2:4", "1:4", "per_row", "2x4"])
def test_drop_grow_keeps_the_pattern(name):
    pattern = as_pattern(name)
    with seeded(1): start, drop, grow = torch.randn(3, 8, 16)
    before = pattern(start, .25)
    after, born = drop_grow(before, drop, grow, before.sum() - 2, pattern)
    assert after.sum() == before.sum() and born.any() and torch.equal(pattern(after.float(), .25), after)

def test_nothing_grows_where_the_door_is_closed():
    with seeded(2): open_, drop, grow = torch.rand(9, 9) < .5, torch.randn(9, 9), torch.randn(9, 9)
    mask = open_ & (drop > 0)
    new, _ = drop_grow(mask, drop, grow, 12, allowed=open_)
    assert not (new & ~open_).any() and new.sum() == mask.sum()


# schedules

def test_shares_end_where_the_paper_says():
    assert [ANNEALS["cosine"](x) for x in (0, 1)] == [1., 0.] and ANNEALS["cosine"](.5) == pytest.approx(.5)
    assert [ANNEALS["constant"](x) for x in (0, .999, 1)] == [1., 1., 0.]
    assert update_interval(method(600), 30, .75) == 15
    assert update_interval(method(3), 30, .75) == 1
    assert update_interval(method(600), 40) == 15
    assert update_interval(method(200), 29, .29) == 2   # 200 * .29 is a little less than 58 in floating point
    assert ANNEALS["cosine"](1.5) == 0 and ANNEALS["constant"](1.5) == 0   # after the last update

def test_the_defaults_are_those_of_the_papers():
    def defaults(name): return {n: p.default for n, p in inspect.signature(METHODS[name].build).parameters.items()}
    assert defaults("set").items() >= dict(drop_fraction=.3, anneal="constant").items()
    assert defaults("rigl").items() >= dict(drop_fraction=.3, anneal="cosine", end=.75).items()
    assert defaults("granet").items() >= dict(drop_fraction=.5, density=1.).items()
    assert defaults("iss").items() >= dict(alpha=.95, end=.5).items()

@pytest.mark.parametrize("bad",
                         [dict(updates=0), dict(end=0.), dict(end=1.5), dict(drop_fraction=2.), dict(anneal="cosin")])
@pytest.mark.parametrize("name", ["set", "rigl"])
def test_settings_without_a_meaning_are_refused(name, bad):
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(BadInput, match=str(next(iter(bad.values())))):
        prune(model, name, .5, batches(), F.cross_entropy, steps=4, **bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and not masks_of(model)

@pytest.mark.parametrize("name, bad, said", [
    ("granet", dict(density=.3), "density=0.3 .* 0.5, and 1"), ("granet", dict(density=2.), "density=2.0"),
    ("granet", dict(drop_fraction=-1.), "drop_fraction=-1.0"), ("iss", dict(end=0.), "end=0.0"),
    ("granet", dict(updates=0), "updates=0"),
    ("iss", dict(alpha=2.), "alpha=2.0"), ("iss", dict(end=1.), "end=1.0"),
    ("rigl", dict(score="wanda"), "'act_norm' is read from data"),
    ("gradual-magnitude", dict(score="snip"), "is read from data"),
    ("iss", dict(solve="sparsegpt"), "does not read solve=")])
def test_requests_that_cannot_be_met_are_refused(name, bad, said):
    with pytest.raises(BadInput, match=said): prune(mlp(), name, .5, batches(), F.cross_entropy, steps=4, **bad)


# SET and RigL

@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("name", ["set", "rigl"])
def test_every_layer_keeps_its_number_and_the_last_quarter_its_mask(name, make):
    model, frames = make(), []
    grow = {"set": random_growth, "rigl": gradient_growth}[name]
    run(dynamic_sparse_rule(grow, 5, .3, .75, "constant")(build(name, steps=20), .2), model,
        look=lambda training: frames.append(masks(training)))
    fresh = make()
    prune(fresh, "random", .8, allocate="erk")
    counts = {n: int(m.sum()) for n, m in masks_of(fresh).items()}
    assert all({n: int(m.sum()) for n, m in f.items()} == counts for f in frames)
    assert sum(counts.values()) == int(.2 * size(model) + .5)
    assert any(not torch.equal(frames[0][n], frames[1][n]) for n in counts)
    assert all(torch.equal(frames[-1][n], frames[-2][n]) for n in counts)   # updates 5 (t = .75) and 6

def test_the_whole_method_is_the_rule():
    one, two = mlp(), mlp()
    plan = prune(one, "rigl", .8, batches(), F.cross_entropy, updates=5, steps=20, lr=1e-2, weight_decay=0.)
    with seeded(0): run(dynamic_sparse_rule(gradient_growth, 5, .3, .75, "cosine")(build("rigl", steps=20), .2), two)
    assert same(one, two) and plan.cost["backward"] == 20 and plan.provenance["allocate"] == "erk"

@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rigl_takes_the_loudest_of_the_dead_and_starts_them_at_nothing(optimizer):
    born = []
    def update(training):
        before, w, g = (masks(training), {n: training.w(n).clone() for n in training.names},
                        {n: training.gradient(n).clone() for n in training.names})
        drop_grow_layers(Method(), training, gradient_growth, .3)
        for n in training.names:
            k = int(.3 * int(before[n].sum()))
            drop = w[n].abs()[before[n]].sort().values[k]
            grown, kept = training.alive(n) & ~before[n], before[n] & (w[n].abs() >= drop)
            assert (training.alive(n) & kept).sum() == kept.sum()
            rest = g[n].abs().masked_fill(kept, -1)
            assert rest[training.alive(n) & ~kept].min() >= rest[~training.alive(n) & ~kept].max()
            state = optimizer_buffers(training, n)
            assert state
            assert all((v[grown] == 0).all() and (v[~training.alive(n)] == 0).all() for v in state)
            assert (training.w(n)[grown] == 0).all()
            back = before[n] & ~kept & training.alive(n)   # dropped and elected again: never away
            assert torch.equal(training.w(n)[back], w[n][back])
            born.append((int(grown.sum()), int(back.sum())))
    run(Rule(begin=lambda training: prune_to_density(Method(score=random, allocate=erk), training, .3), update=update,
             every=4), keep=.3, optimizer=optimizer)
    assert sum(b for b, _ in born) > 20 and sum(b for _, b in born) > 0

def test_without_exchange_both_are_a_lottery():
    nets = [mlp() for _ in range(3)]
    for net, (name, more) in zip(nets, {"set": dict(drop_fraction=0.), "rigl": dict(drop_fraction=0.),
                                        "random": dict(allocate="erk")}
                                 .items()):
        prune(net, name, .8, batches(), F.cross_entropy, recover=finetune(12, 1e-2), **more)
    assert same(nets[0], nets[1]) and same(nets[1], nets[2])

def test_the_ends_of_every_range_are_allowed():
    for name, settings in (("rigl", dict(drop_fraction=1.)), ("set", dict(end=1.)), ("granet", dict(density=.2)),
                           ("granet", dict(drop_fraction=1.)), ("iss", dict(alpha=0.))):
        plan = prune(mlp(), name, .8, batches(), F.cross_entropy, steps=12, **settings)
        assert plan.density == pytest.approx(.2, abs=1e-3), name

def test_another_allocation_and_a_pattern():
    plan = prune(mlp(), "rigl", .75, batches(), F.cross_entropy, allocate="uniform", steps=12, updates=6)
    assert plan.table().kept.tolist() == [640, 200, 50]
    with pytest.warns(UserWarning, match="fixes the density"):
        plan = prune(mlp(), "rigl", "2:4", batches(), F.cross_entropy, steps=12, updates=6)
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in plan.masks.values())

def test_nothing_pruned_before_grows_again():
    model = mlp()
    first = prune(model, "magnitude", .5)
    for name in ("set", "rigl", "granet", "iss", "gradual-magnitude"):
        again = mlp()
        first.apply(again)
        plan = prune(again, name, .8, batches(), F.cross_entropy, steps=12)
        assert all((plan.masks[n] <= first.masks[n]).all() for n in plan.masks), name
        assert all((w[~first.masks[n]] == 0).all() for n, w in again.named_parameters() if n in first.masks), name

def test_a_frozen_layer_stays():
    model = mlp()
    model[1].weight.requires_grad_(False)
    before = []
    run(Rule(begin=lambda training: (prune_to_density(Method(score=random, allocate=erk), training, .3),
                                     before.append(training.alive("1.weight").clone())),
             update=lambda training: drop_grow_layers(Method(), training, gradient_growth, .3), every=4), model,
        keep=.3)
    assert torch.equal(masks_of(model)["1.weight"], before[0])


# GraNet

@pytest.mark.parametrize("density", [1., .5])
def test_granet_meets_every_point_of_the_cubic(density):
    frames, model = [], mlp()
    run(granet_rule(density, 10, .5, .6)(method(40, allocate=global_), .1), model, keep=.1, steps=40,
        look=lambda training: frames.append(total(masks(training))))
    cubic = [.1 + (density - .1) * (1 - i / 6)**3 for i in range(1, 7)]
    assert frames == [math.floor(size(model) * k + .5) for k in cubic] + [math.floor(size(model) * .1 + .5)] * 4

def test_granet_exchanges_half_at_first_and_a_hundredth_of_that_at_last():
    share = lambda t: .5 * (.01 + .99 * ANNEALS["cosine"](t))
    assert share(0) == pytest.approx(.5) and share(1) == pytest.approx(.005)
    record, said = method(20, allocate=global_), []
    rule = granet_rule(1., 4, .5, .5)(record, .2)
    def update(training):
        training.gradients = {}                       # nobody explores: what remains is the cut
        rule.update(training); said.append(masks(training))
    run(replace(rule, update=update))
    once = []
    run(Rule(update=lambda training: (prune_to_density(record, training, .2 + .8 * (1 - min(1, training.step / 10))**3),
                                      once.append(masks(training))), every=5))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(said, once) for n in a)

def test_granet_exchanges_less_from_update_to_update(monkeypatch):
    asked, real = [], dynamic_sparse.drop_grow_layers
    def watched(method, training, grow, drop_fraction, rounding):
        before = masks(training)
        real(method, training, grow, drop_fraction, rounding)
        grown = {n: int((m & ~before[n]).sum()) for n, m in masks(training).items()}
        assert all(grown[n] <= math.ceil(drop_fraction * int(before[n].sum())) for n in grown)
        asked.append((training.progress, drop_fraction, sum(grown.values())))
    monkeypatch.setattr(dynamic_sparse, "drop_grow_layers", watched)
    prune(mlp(), "granet", .8, batches(), F.cross_entropy, updates=10, end=.1, recover=finetune(40, 1e-2))
    assert [t for t, _, _ in asked] == pytest.approx([i / 10 for i in range(1, 10)])
    cosine = [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(1, 10)]
    assert [part for _, part, _ in asked] == pytest.approx([.5 * (.01 + .99 * c) for c in cosine])
    assert asked[0][2] > asked[-1][2]

def test_granet_from_sparse_starts_at_random_with_the_densities_of_erk():
    starts, net = [], conv()
    for seed in (0, 1):
        model = conv()
        rule = granet_rule(.5, 10, .5, .6)(method(40, allocate=global_), .1)
        with seeded(seed), apply_rule(rule, Weights(model), .1, 0): starts.append(masks_of(model))
    shapes = {n: tuple(w.shape) for n, w in net.named_parameters() if n in starts[0]}
    density = {n: sum(s) / math.prod(s) for n, s in shapes.items()}
    scale = .5 * size(net) / sum(d * math.prod(shapes[n]) for n, d in density.items())
    full = {n for n, d in density.items() if scale * d > 1}   # these are dense, the others share the rest
    rest = {n: d * math.prod(shapes[n]) for n, d in density.items() if n not in full}
    scale = (.5 * size(net) - sum(math.prod(shapes[n]) for n in full)) / sum(rest.values())
    assert all(scale * density[n] <= 1 for n in rest) and full and rest
    for n, mask in starts[0].items():
        wanted = mask.numel() * (1 if n in full else scale * density[n])
        assert abs(int(mask.sum()) - wanted) <= 1
        kept = net.get_parameter(n).detach().abs()
        largest = topk_mask(kept.flatten(), int(mask.sum())).view_as(mask)
        assert n in full or not torch.equal(mask, largest) and not torch.equal(mask, starts[1][n])

def test_granet_without_regrowth_is_gradual_pruning():
    way = lambda keep: [1., *(keep + (1 - keep) * (1 - i / 6)**3 for i in range(1, 6)), *[keep] * 4]
    one, two = mlp(), mlp()
    prune(one, "granet", .9, batches(), F.cross_entropy, drop_fraction=0., updates=10, end=.6,
          recover=finetune(40, 1e-2))
    prune(two, "gradual-magnitude", .9, batches(), F.cross_entropy, allocate="global", schedule=way,
          recover=finetune(40, 1e-2))
    assert same(one, two)

def test_granet_exchanges_inside_layers():
    counts = []
    record = method(40, allocate=global_)
    def look(training):
        counts.append({n: int(training.alive(n).sum()) for n in training.names})
    run(granet_rule(1., 10, .5, .3)(record, .1), keep=.1, steps=40, look=look)   # three cuts, seven updates without
    assert len({tuple(c.values()) for c in counts[2:]}) == 1 and counts[0] != counts[1] != counts[2]


# iterative soft shrinkage

def test_no_shrinking_is_one_cut_in_the_middle():
    one, two = mlp(), mlp()
    prune(one, "iss", .8, batches(), F.cross_entropy, alpha=1., recover=finetune(20, 1e-2))
    run(Rule(update=lambda training: prune_to_density(Method(), training, .2) if training.step == 10 else None), two)
    assert same(one, two)

def test_shrinking_touches_the_smallest_only_and_as_much_as_it_says():
    rule, net = soft_shrinkage_rule(.75, .5)(Method(), .2), mlp()
    def update(training):
        before, mask = {n: training.w(n).clone() for n in training.names}, current_masks(Method(), training, .2)
        rule.update(training)
        for n in training.names:
            assert int(mask[n].sum()) == round(.2 * mask[n].numel())
            if training.step < 10: assert torch.equal(training.w(n), torch.where(mask[n], before[n], before[n] * .75))
            if training.step == 10: assert torch.equal(training.alive(n), mask[n])
            if training.step > 10: assert torch.equal(training.w(n), before[n])
    run(Rule(update=update), net)
    assert total(masks_of(net)) == round(.2 * size(net))

def test_shrinking_by_nothing_is_hard_thresholding():
    rule, sets = soft_shrinkage_rule(0., .9)(Method(), .9), []
    def update(training):
        rule.update(training)
        sets.append({n: training.w(n) != 0 for n in training.names})
    run(Rule(update=update))
    assert all(int(m.sum()) == round(.9 * m.numel()) for s in sets for m in s.values())
    assert any((sets[16][n] & ~sets[0][n]).any() for n in sets[0])   # a zero may come back


# orderings on the digits, 600 steps for every method

def world(): return find_task("digits-mlp")

def scores(name, sparsity=.98, **settings):
    found = []
    for seed in range(3):
        model = world().initial(seed)
        plan = prune(model, name, sparsity, world().batches(seed), world().loss, seed=seed, recover=world().train,
                     **settings)
        assert plan.cost["backward"] == 600 and plan.density == pytest.approx(1 - sparsity, abs=1e-4)
        found.append(100 * world().evaluate(model)["accuracy"])
    return sum(found) / 3

@pytest.mark.slow
def test_moving_beats_standing_still_and_gradients_beat_chance():
    lot, chance, gradient = scores("random", allocate="erk"), scores("set"), scores("rigl")
    assert gradient > chance + 5 > lot + 10

@pytest.mark.slow
def test_gradual_granet_and_rigl_are_neighbours_above_set():
    found = [scores("gradual-magnitude", allocate="global"), scores("granet"), scores("granet", density=.5),
             scores("rigl")]
    assert min(found) > scores("set")

@pytest.mark.slow
def test_soft_shrinkage_beats_hard_thresholding():
    assert scores("iss") > scores("iss", alpha=0.)
