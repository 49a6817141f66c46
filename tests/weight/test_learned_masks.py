"PDP, STR, movement, BiP and jackpots: formulas exactly, counts at every step, orderings over three seeds."
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, Method, prune, pruning
from pruning_bench.core.allocate import topk_mask
from pruning_bench.core.rule import apply_rule
from pruning_bench.core.inputs import seeded
from pruning_bench.core.pattern import as_pattern, magnitude_threshold
from pruning_bench.core.recovery import Recovery, finetune
from pruning_bench.core.schedule import ramped_density
from pruning_bench.core.space import Weights
from pruning_bench.weight.learned_masks import (BilevelMask, bilevel_rule, threshold_shift, limit_swaps,
                                                movement_rule, straight_through_mask, mask_search_rule, sigmoid_masked,
                                                soft_threshold, soft_mask_rule, soft_threshold_rule)

SLUGS = ["pdp", "str", "movement", "bip", "jackpot"]

def mlp(seed=0, norm=False):
    with seeded(seed):
        return nn.Sequential(nn.Linear(12, 16), *[nn.BatchNorm1d(16)] * norm, nn.ReLU(), nn.Linear(16, 8), nn.ReLU(),
                             nn.Linear(8, 4))

def batches(seed=0, n=6):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 12, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(n)]

TOTAL = 12 * 16 + 16 * 8 + 8 * 4
def total(masks): return sum(int(m.sum()) for m in masks.values())

def followed(rule, look, keep=.25, steps=24, lr=1e-2, wd=.1, method=Method(), model=None):
    "Train under a rule, and call `look(training)` after its update at every step."
    made, model = rule(method, keep), model or mlp()
    watched = dataclasses.replace(made, update=lambda training: (made.update(training), look(training)))
    with apply_rule(watched, Weights(model), keep, steps, method.pattern) as training:
        finetune(steps, lr, weight_decay=wd)(model, batches(), F.cross_entropy)
    return model, training


# all of them

def scores_of(training): return [s["score"] for s in training.state.values()]

@pytest.mark.parametrize("two", [False, True], ids=["one optimiser", "two optimisers"])
@pytest.mark.parametrize("slug", ["jackpot", "bip"])
def test_what_rests_does_not_move_under_zeroed_gradients(slug, two):
    model, moved, rests = mlp(norm=True), [], []
    for p in model.parameters(): p.grad = torch.ones_like(p)   # left from an earlier training
    frozen = [p for p in model.parameters() if p.dim() == 1]
    with pruning(model, slug, .5, steps=12) as loop:
        weights, scores = list(loop.training.weight.values()), scores_of(loop.training)
        held = [[*weights, *frozen], scores] if two else [[*weights, *frozen, *scores]]
        optimizers = [torch.optim.SGD(ps, .1, momentum=.9, weight_decay=.1) for ps in held]
        for i, (x, y) in enumerate(batches(n=6) * 2):
            before = [[p.detach().clone() for p in ps] for ps in (weights, frozen, scores)]
            for opt in optimizers: opt.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            for opt in optimizers: opt.step()
            assert loop.training.step == i + 1
            moved.append([any(not torch.equal(a, b) for a, b in zip(ps, was))
                          for ps, was in zip((weights, frozen, scores), before)])
    rests = {"jackpot": [[False, False, True]] * 12, "bip": [[True, True, False], [False, True, True]] * 6}[slug]
    assert moved == rests
    assert all(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize("slug", SLUGS)
def test_where_nothing_learns_the_largest_weights_stay(slug):
    plan = prune(mlp(), slug, .7, batches(), F.cross_entropy, steps=8, lr=0.)
    assert plan == prune(mlp(), "magnitude" if slug == "movement" else "global-magnitude", .7)

@pytest.mark.parametrize("slug", SLUGS)
def test_what_was_pruned_before_stays_pruned(slug):
    model = mlp()
    first = prune(model, "magnitude" if slug == "movement" else "global-magnitude", .5)
    then = prune(model, slug, .8, batches(), F.cross_entropy, steps=24, lr=.05)
    assert all((then.masks[n] <= first.masks[n]).all() for n in first.masks) and total(then.masks) == round(.2 * TOTAL)

@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_patterns_hold(slug, pattern):
    plan = prune(mlp(), slug, pattern, batches(), F.cross_entropy, steps=12, lr=.02)
    assert all((m.view(-1, 4).sum(1) == int(pattern[0])).all() for m in plan.masks.values())

@pytest.mark.parametrize("slug", SLUGS)
def test_the_mask_is_learned(slug):
    plan = prune(mlp(), slug, .7, batches(), F.cross_entropy, steps=40, lr=.02,
                 **dict(score_margin=.02) if slug == "jackpot" else {})
    assert plan != prune(mlp(), "magnitude" if slug == "movement" else "global-magnitude", .7)

@pytest.mark.parametrize("slug", ["movement", "bip", "jackpot"])
def test_decay_alone_changes_no_order(slug):
    nothing = lambda out, y: 0 * F.cross_entropy(out, y)
    plan = prune(mlp(), slug, .7, batches(), nothing, recover=finetune(30, .1, weight_decay=.5))
    assert plan == prune(mlp(), "magnitude" if slug == "movement" else "global-magnitude", .7)

@pytest.mark.parametrize("slug", SLUGS)
def test_a_convolution_is_a_matrix_too(slug):
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    x, y = torch.randn(16, 4, 4, 4), torch.arange(16) % 4
    plan = prune(model, slug, .75, [(x, y)], F.cross_entropy, steps=9)
    assert total(plan.masks) == round(.25 * (8 * 36 + 128))
    assert all((Weights(model).w(n)[~m] == 0).all() for n, m in plan.masks.items())


# PDP

def test_a_weight_at_the_threshold_is_half_seen():
    t = torch.tensor([.3, 1., 2.], dtype=torch.double)
    assert torch.equal(sigmoid_masked(t, t, torch.tensor(.1)), t / 2)
    assert torch.equal(sigmoid_masked(-t, t, torch.tensor(.1)), -t / 2)

@pytest.mark.parametrize("tau", [.05, .5, 5.])
def test_the_derivative_of_a_soft_weight(tau):
    w, t = torch.linspace(-2, 2, 81, dtype=torch.double, requires_grad=True), torch.tensor(.8, dtype=torch.double)
    slope, = torch.autograd.grad(sigmoid_masked(w, t, torch.tensor(tau)).sum(), w)
    m = torch.sigmoid((w**2 - t**2) / tau)
    assert torch.allclose(slope, (m + 2 * w**2 / tau * m * (1 - m)).detach()) and (slope > 0).all()
    # above one where tau is below 0.64
    assert slope[(w.abs() - .8).abs() < .01].min() == pytest.approx(.5 + .32 / tau)

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 7, 63])
def test_a_threshold_separates(seed, k):
    size = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
    mask = topk_mask(size.flatten(), k).view(8, 8)
    t = magnitude_threshold(size, mask, 64)
    assert torch.equal(size > t, mask) and torch.equal(sigmoid_masked(size, t, torch.tensor(.1)) / size >= .5, mask)
    groups = as_pattern("1:4")(size, .25)
    assert torch.equal(size > magnitude_threshold(size, groups, 4), groups)

def test_thresholds_at_the_ends():
    size = torch.tensor([[1., 2.]])
    assert (magnitude_threshold(size, size > 0, 2) == 0).all()
    assert (magnitude_threshold(size, size > 5, 2) == math.inf).all()
    w = size.clone().requires_grad_()
    seen = sigmoid_masked(w, magnitude_threshold(size, size > 5, 2), torch.tensor(.1))
    assert (seen == 0).all() and torch.equal(torch.autograd.grad(seen.sum(), w)[0], torch.zeros(1, 2))

def test_the_ramp_is_linear_and_the_shares_are_those_of_its_first_step():
    kept, sizes = [], {}
    def look(training):
        if not training.state["0.weight"]: return
        if not kept: sizes.update({n: training.w(n).abs() for n in training.names})
        kept.append({n: int(s["mask"].sum()) for n, s in training.state.items()})
    followed(soft_mask_rule(1., .25, .75), look, keep=.2, steps=40, lr=.05)
    flat = torch.cat([s.flatten() for s in sizes.values()])
    parts = topk_mask(flat, round(.2 * TOTAL)).split([s.numel() for s in sizes.values()])
    final = {n: int(p.sum()) for n, p in zip(sizes, parts)}
    assert kept[0] == {n: s.numel() for n, s in sizes.items()} and len(kept) == 31 and kept[-1] == kept[20] == final
    assert all(kept[10][n] == int((1 - .5 * (1 - final[n] / s.numel())) * s.numel() + .5) for n, s in sizes.items())

def test_soft_is_rounded_but_for_weights_at_the_threshold():
    model, training = followed(soft_mask_rule(1e-3, .1, .7), lambda training: None)
    for n, s in training.state.items():
        w = training.w(n)
        far = (w.square() - s["t"].square()).abs() > 20 * s["tau"]
        assert far.float().mean() > .9
        assert torch.allclose(sigmoid_masked(w, s["t"], s["tau"])[far], (w * s["mask"])[far], atol=1e-6)

@pytest.mark.parametrize("pattern", ["per_row", "2x2"])
def test_a_pattern_without_thresholds_is_refused(pattern):
    model = mlp()
    with pytest.raises(BadInput, match="threshold for each group") as refused:
        prune(model, "pdp", .5, batches(), F.cross_entropy, pattern=pattern)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mlp().parameters()))


# STR

def test_the_gradient_of_a_threshold():
    g = torch.Generator().manual_seed(0)
    w, up, s = torch.randn(6, 6, generator=g), torch.randn(6, 6, generator=g), torch.tensor(-.5, requires_grad=True)
    slope, = torch.autograd.grad((soft_threshold(w, s.exp()) * up).sum(), s)
    cut = s.detach().exp()
    assert torch.isclose(slope, -cut * (up * w.sign())[w.abs() > cut].sum())

@pytest.mark.parametrize("seed", range(5))
def test_one_shift_leaves_an_exact_number(seed):
    g = torch.Generator().manual_seed(seed)
    places = {"a": torch.randn(30, generator=g) - 3, "b": torch.randn(5, 14, generator=g)}
    for k in (1, 2, 50, 99): assert sum(int((p > threshold_shift(places, k)).sum()) for p in places.values()) == k
    # a threshold is above something
    assert sum(int((p > threshold_shift(places, 100)).sum()) for p in places.values()) == 99

def test_the_density_follows_its_cubic():
    alive = []
    def look(training):
        alive.append(sum(int((training.w(n).abs() > s["s"].exp()).sum()) for n, s in training.state.items()))
    followed(soft_threshold_rule(.2, .8), look, keep=.1, steps=30)
    assert all(abs(a - ramped_density(.1, (i + 1) / 30, .2, .8) * TOTAL) <= 1 for i, a in enumerate(alive))
    assert alive[-1] == round(.1 * TOTAL)

def test_the_network_that_was_trained_is_kept():
    model, steps, seen = mlp(), 20, {}
    with apply_rule(soft_threshold_rule(.1, .7)(Method(), .3), Weights(model), .3, steps) as training:
        finetune(steps, 1e-2)(model, batches(), F.cross_entropy)
        out, trained = model(batches()[0][0]), {n: training.w(n).clone() for n in training.names}
        seen.update({n: s["s"].detach().exp() for n, s in training.state.items()})
    assert torch.allclose(model(batches()[0][0]), out, atol=1e-6)
    for n, w in trained.items():
        now = dict(model.named_parameters())[n]
        assert torch.allclose(now[now != 0].abs(), w[now != 0].abs() - seen[n], atol=1e-7)

@pytest.mark.parametrize("factor", [1e-6, 1., 30., 1e4])
def test_thresholds_reach_weights_of_every_size(factor):
    model = mlp()
    with torch.no_grad():
        for m in model[::2]: m.weight.mul_(factor)
    plan = prune(model, "str", .8, batches(), F.cross_entropy, steps=6, lr=0.)
    assert plan == prune(mlp(), "global-magnitude", .8) and all(m.any() for m in plan.masks.values())
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in plan.masks.items())

def test_layers_learn_different_thresholds():
    _, training = followed(soft_threshold_rule(.1, .7), lambda training: None, lr=.05)
    assert len({round(s["s"].item(), 4) for s in training.state.values()}) == 3


# learned scores

def test_straight_through():
    g = torch.Generator().manual_seed(0)
    w, up, mask = (torch.randn(5, 5, generator=g) for _ in range(3))
    w.requires_grad_(); score = torch.rand(5, 5, requires_grad=True)
    out = straight_through_mask(w, {"mask": mask > 0, "score": score})
    g_w, g_s = torch.autograd.grad((out * up).sum(), (w, score))
    assert torch.equal(out, w * (mask > 0))
    assert torch.equal(g_w, up * (mask > 0))
    assert torch.allclose(g_s, up * w.detach())

def test_scores_are_single_precision_and_gone_afterwards():
    model = mlp().to(torch.bfloat16)
    with apply_rule(bilevel_rule(1e-4)(Method(), .5), Weights(model), .5, 4) as training:
        finetune(4, 1e-2)(model, [(x.bfloat16(), y) for x, y in batches()], F.cross_entropy)
        assert all(s["score"].dtype == torch.float32 for s in training.state.values())
        assert model[0].weight.dtype == torch.bfloat16
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in mlp().named_parameters()]

def test_movement_sums_what_moves_away_from_zero():
    model, sums = mlp(), {}
    with apply_rule(movement_rule(0., .6)(Method(), .25), Weights(model), .25, 15) as training:
        opt = torch.optim.SGD(model.parameters(), .1)
        for (x, y), _ in zip(batches() * 3, range(15)):
            opt.zero_grad()
            seen = {n: (training.w(n) * training.state[n]["mask"]).requires_grad_() for n in training.names}
            rest_of = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
            h = F.relu(F.linear(x, seen["0.weight"], rest_of["0.bias"]))
            h = F.relu(F.linear(h, seen["2.weight"], rest_of["2.bias"]))
            grads = torch.autograd.grad(F.cross_entropy(F.linear(h, seen["4.weight"], rest_of["4.bias"]), y),
                                        list(seen.values()))
            for n, g in zip(seen, grads): sums[n] = sums.get(n, 0) - .1 * g * training.w(n)
            F.cross_entropy(model(x), y).backward()
            opt.step()
    for n, s in sums.items(): assert torch.allclose(training.state[n]["score"], s, atol=1e-6)

def test_movement_keeps_the_small_weight_that_grows():
    for slug, survivor in (("magnitude", 1), ("movement", 0)):
        net = nn.Linear(2, 1, bias=False)
        net.weight.data = torch.tensor([[.1, 1.]])
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        prune(net, slug, .5, [(x, x @ torch.tensor([[1.], [.2]]))], F.mse_loss, recover=finetune(40, .02, "sgd"))
        assert net.weight.flatten().nonzero().item() == survivor

def test_movement_keeps_the_same_share_of_every_matrix_at_every_step():
    seen = []
    followed(movement_rule(.2, .8),
             lambda training: seen.append([int(s["mask"].sum()) for s in training.state.values()]), keep=.25, steps=20)
    for i, counts in enumerate(seen):
        k = ramped_density(.25, (i + 1) / 20, .2, .8)
        assert all(abs(c - k * n) < 1 for c, n in zip(counts, (192, 128, 32)))
        assert sum(counts) == math.floor(k * TOTAL + .5)


# BiP

def test_the_gradient_of_the_upper_level_by_hand():
    score = torch.ones(1, requires_grad=True)
    def at(implicit, mask):
        out = BilevelMask.apply(score, torch.tensor([2.]), torch.tensor([mask]), implicit)
        return torch.autograd.grad((out - .5).square().sum() / 2, score)[0].item()
    assert at(.1, True) == pytest.approx(2.775) and at(0., True) == 3. and at(.1, False) == at(0., False) == -1.

def test_levels_take_turns():
    parts = {"w": lambda training, n: training.w(n), "s": lambda training, n: training.state[n]["score"].detach()}
    last, still = {}, []
    def look(training):
        now = {k: [f(training, n).clone() for n in training.names] for k, f in parts.items()}
        if last: still.append({k: all(torch.equal(a, b) for a, b in zip(v, last[k])) for k, v in now.items()})
        last.update(now)
    followed(bilevel_rule(1e-4), look, steps=12)
    assert still[:-1] == [dict(w=True, s=False), dict(w=False, s=True)] * 5

def test_layers_float_and_the_total_does_not():
    seen = []
    model, training = followed(bilevel_rule(1e-4),
                               lambda training: seen.append([int(s["mask"].sum()) for s in training.state.values()]),
                               steps=60, lr=.03)
    assert {sum(c) for c in seen} == {round(.25 * TOTAL)} and len({tuple(c) for c in seen}) > 1

def test_a_closed_score_listens():
    heard = []
    model, keep = mlp(), .25
    with apply_rule(bilevel_rule(0.)(Method(), keep), Weights(model), keep, 2) as training:
        opt = torch.optim.SGD(model.parameters(), .1)
        for x, y in batches()[:2]:
            opt.zero_grad(); F.cross_entropy(model(x), y).backward()
            heard.append([(s["score"].grad, ~s["mask"]) for s in training.state.values()])
            opt.step()
    assert all(g is None for g, _ in heard[0]) and all(g[closed].abs().max() > 0 for g, closed in heard[1])


# jackpots

def test_frozen_to_the_bit():
    model = mlp(norm=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = prune(model, "jackpot", .8, batches(), F.cross_entropy, recover=finetune(40, .05, weight_decay=.3),
                 score_margin=.02)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n] * plan.masks[n] if n in plan.masks else before[n]) and p.requires_grad

@pytest.mark.parametrize("power", [0., 4.])
def test_layer_counts_never_change(power):
    seen, masks = [], []
    def look(training):
        seen.append(tuple(int(s["mask"].sum()) for s in training.state.values()))
        masks.append(torch.cat([s["mask"].flatten() for s in training.state.values()]))
    followed(mask_search_rule("magnitude", .02, power), look, steps=30)
    assert len(set(seen)) == 1 and not torch.equal(masks[0], masks[-1])

def test_no_swaps_no_change():
    assert prune(mlp(), "jackpot", .8, batches(), F.cross_entropy, steps=30, lr=.05,
                 power=1e6) == prune(mlp(), "global-magnitude", .8)

@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("seed", range(5))
def test_the_strongest_swaps_happen(pattern, seed):
    g = torch.Generator().manual_seed(seed)
    pick = lambda s: as_pattern(pattern)(s, .5)
    old, scores = pick(torch.rand(8, 8, generator=g)), torch.rand(8, 8, generator=g)
    full = int((pick(scores) & ~old).sum())
    for share in (0., .3, .8, 1.):
        new = limit_swaps(old, scores, share, pick)
        swaps = int((new & ~old).sum())
        assert torch.equal(new, pick(new.float()))
        assert int(new.sum()) == 32
        assert (swaps == int(share * full) if pattern == "unstructured" else swaps <= full)
        if share == 0: assert torch.equal(new, old)
        if share == 1: assert torch.equal(new, pick(scores))
        if pattern == "2:4": continue
        came, waits, stays, went = (scores[new & ~old], scores[pick(scores) & ~new], scores[old & ~pick(scores) & new],
                                    scores[old & ~new])
        assert all(not len(a) or not len(b) or a.min() >= b.max() for a, b in ((came, waits), (stays, went)))

def test_the_first_mask_must_need_no_data():
    for start, said in (("wanda", "needs"), ("magnitud", "magnitude")):
        with pytest.raises(BadInput, match=said):
            prune(mlp(), "jackpot", .5, batches(), F.cross_entropy, init_score=start)

def test_a_broken_search_thaws_the_network():
    def breaking(model, data, loss, part): raise KeyboardInterrupt
    model, record = mlp(), Method(rule=mask_search_rule("magnitude", .2, 4.), recover=Recovery(breaking, steps=5))
    with pytest.raises(KeyboardInterrupt): prune(model, record, .5, batches(), F.cross_entropy, restore=False)
    assert all(p.requires_grad for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in mlp().named_parameters()]


# orderings over three seeds

@pytest.fixture(scope="module")
def world():
    from pruning_bench.bench.task import find_task
    return find_task("digits-mlp")

def accuracies(world, method, sparsity, fresh, **settings):
    found = []
    for seed in range(3):
        model = fresh(seed)
        prune(model, method, sparsity, world.batches(seed), world.loss, seed=seed, **settings)
        found.append(100 * world.evaluate(model)["accuracy"])
    return sum(found) / 3

@pytest.mark.slow
def test_bip_against_one_cut_at_two_percent(world):
    once = accuracies(world, "global-magnitude", .98, world.dense, recover=finetune(300, 3e-3))
    assert accuracies(world, "bip", .98, world.dense) > once + 5

@pytest.mark.slow
def test_a_search_on_frozen_weights_finds_something_and_starts_best_from_magnitude(world):
    still = dict(recover=finetune(1, 0.))
    found = {start: [accuracies(world, "jackpot", .9, world.dense, init_score=start, **more) for more in (still, {})]
             for start in ("magnitude", "random")}
    assert all(after > before + 5 for before, after in found.values())
    assert found["magnitude"][1] > found["random"][1] + 5

@pytest.mark.slow
def test_a_soft_mask_against_a_hard_one_on_the_same_ramp(world):
    def hard(method, keep):
        return dataclasses.replace(soft_mask_rule(1., .1, .5)(method, keep),
                                   view=lambda w, state, training: w * state["mask"] if state else w)
    cut = Method(rule=hard, recover=finetune(900, 3e-3))
    assert accuracies(world, "pdp", .98, world.initial, steps=900) > accuracies(world, cut, .98, world.initial)
