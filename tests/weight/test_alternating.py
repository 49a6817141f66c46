"Prune and fine-tune, AC/DC, DPF and Top-KAST: phases, gradients and the settings at which two methods are one."
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from three_layers import TOTAL, batches, identical, mlp, trained
from pruning_bench import BadInput, build, prune
from pruning_bench.core.recovery import finetune
from pruning_bench.core.rule import apply_rule
from pruning_bench.core.schedule import geometric
from pruning_bench.core.space import Weights
from pruning_bench.weight.alternating import (TwoMasks, alternating_rule, deviations, feedback_rule, phase_at,
                                              topkast_rule)


def followed(rule, look, keep=.25, steps=24, lr=1e-2, optimizer="sgd"):
    "Train under a rule, and call `look(training)` after every optimiser step that is followed by an update."
    model = mlp()
    watched = replace(rule, update=lambda training: (rule.update(training), look(training)))
    with apply_rule(watched, Weights(model), keep, steps) as training:
        finetune(steps, lr, optimizer)(model, batches(), F.cross_entropy)
    return model, training


# prune and fine-tune

def test_one_threshold_is_a_multiple_of_the_deviation_of_every_layer():
    model = mlp()
    layers = Weights(model).layers
    plan = prune(model, "iterative-finetune", .75, batches(), F.cross_entropy, rounds=1, lr=0.)
    fresh = {n: layer.read() for n, layer in Weights(mlp()).layers.items()}
    ratio = {n: w.abs() / w.var(correction=0).sqrt() for n, w in fresh.items()}
    lowest_kept = min(r[plan.masks[n]].min() for n, r in ratio.items())
    highest_gone = max(r[~plan.masks[n]].max() for n, r in ratio.items())
    assert lowest_kept >= highest_gone and set(layers) == set(plan.masks)
    with torch.no_grad():
        scaled = mlp()
        scaled[0].weight *= 100
    again = prune(scaled, "iterative-finetune", .75, batches(), F.cross_entropy, rounds=1, lr=0.)
    assert again.masks.keys() == plan.masks.keys() and all(torch.equal(m, again.masks[n])
                                                           for n, m in plan.masks.items())


def test_a_constant_layer_has_no_deviation_and_finite_scores():
    assert torch.isfinite(deviations(torch.ones(3, 3), None)).all()


def test_survivors_go_on_from_their_values():
    a, p = trained("iterative-finetune", rounds=2, lr=0.)
    fresh = mlp()
    assert all(torch.equal(a.get_parameter(n), fresh.get_parameter(n) * m) for n, m in p.masks.items())
    assert geometric(2)(.25) == [.5, .25]


# AC/DC

def test_the_phases_of_the_published_configuration():
    phases = [phase_at(e / 100, .1, .05, .75, .85) for e in range(100)]
    change = {e: phases[e] for e in range(1, 100) if phases[e] != phases[e - 1]}
    dense = {15, 25, 35, 45, 55, 65, 75}
    assert change == {**dict.fromkeys(dense, "dense"), **dict.fromkeys({10, 20, 30, 40, 50, 60, 70, 85}, "sparse")}


def test_masks_alternate_and_returned_weights_start_from_zero_without_momentum():
    seen, returned = [], []
    rule = alternating_rule(.1, .1, .7, .8)(build("acdc"), .25)

    def look(training):
        count = sum(int(training.alive(n).sum()) for n in training.names)
        if seen and count > seen[-1]:
            for n in training.names:
                zero = training.w(n) == 0
                momentum = training.optimizers[id(training.weight[n])].state[training.weight[n]]["momentum_buffer"]
                returned.append((int(zero.sum()), bool((momentum[zero] == 0).all())))
        seen.append(count)
    followed(rule, look, steps=40)
    assert set(seen) == {TOTAL, TOTAL // 4} and seen[-1] == TOTAL // 4
    cuts = [i + 1 for i in range(1, 40) if seen[i] < seen[i - 1]]
    assert cuts == [4, 12, 20, 32] and [i + 1 for i in range(1, 40) if seen[i] > seen[i - 1]] == [8, 16, 24]
    assert sum(n for n, _ in returned) == 3 * (TOTAL - TOTAL // 4) and all(quiet for _, quiet in returned)


def test_some_weights_come_back_into_use():
    frames = []
    rule = alternating_rule(.1, .1, .7, .8)(build("acdc"), .25)

    def look(training): frames.append(torch.cat([training.alive(n).flatten() for n in training.names]))
    followed(rule, look, steps=40, lr=.05, optimizer="adamw")
    first, last = frames[4], frames[-1]
    assert first.sum() == last.sum() == TOTAL // 4 and not torch.equal(first, last)


def test_one_phase_of_each_kind_is_one_cut():
    once, p = trained("acdc", warmup=.5, last_dense=.5, final=.5, weight_decay=0.)
    cut, q = trained("iss", alpha=1., end=.5, weight_decay=0., allocate="global")
    assert identical(once, cut) and p == q


@pytest.mark.parametrize("settings", [dict(final=1.), dict(warmup=1., final=1., last_dense=1.), dict(phase=.01)])
def test_any_phases_end_at_the_asked_density(settings):
    model, plan = trained("acdc", **settings)
    assert sum(int(m.sum()) for m in plan.masks.values()) == TOTAL // 4
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in plan.masks.items())


def test_a_phase_of_no_length_is_refused():
    with pytest.raises(BadInput, match="phase=0"):
        prune(mlp(), "acdc", .5, batches(), F.cross_entropy, phase=0.)


# DPF and Top-KAST

def test_two_masks_by_hand():
    w = torch.tensor([[4., -3., 2., -1.]], requires_grad=True)
    used, reached = w.detach().abs() > 3.5, w.detach().abs() > 1.5
    out = TwoMasks.apply(w, used, reached, .1 * used + .4 * (reached & ~used))
    out.sum().backward()
    assert out.tolist() == [[4., 0., 0., 0.]] and torch.allclose(w.grad, torch.tensor([[1.4, -.2, 1.8, 0.]]))


def test_feedback_is_the_gradient_at_the_pruned_network_for_all_weights():
    model, rule = mlp(), feedback_rule(1, 0., 0.)(build("dpf"), .25)
    before = {n: layer.read().clone() for n, layer in Weights(model).layers.items()}
    x, y = batches()[0]
    with apply_rule(rule, Weights(model), .25, 1) as training:
        masks = {n: s["masks"][0].clone() for n, s in training.state.items()}
        opt = torch.optim.SGD(model.parameters(), .5)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        after = {n: training.w(n).clone() for n in training.names}
    pruned = mlp()
    prune(pruned, "global-magnitude", .75)
    from pruning_bench.core.mask import masks_of, remove_masks
    assert all(torch.equal(masks_of(pruned)[n], m) for n, m in masks.items())
    remove_masks(pruned)
    F.cross_entropy(pruned(x), y).backward()
    for n, w in before.items():
        assert torch.allclose(after[n], w - .5 * pruned.get_parameter(n).grad, atol=1e-6)
        assert (after[n][~masks[n]] != w[~masks[n]]).any()


@pytest.mark.filterwarnings("ignore:pattern")
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_with_a_pattern_and_a_mask_per_step_it_is_straight_through_training(pattern):
    a, p = trained("dpf", pattern, every=1, start=0., end=0., weight_decay=0.)
    b, q = trained("nm-ste", pattern)
    assert identical(a, b) and p == q
    c, _ = trained("top-kast", pattern, backward_density=1., decay=0.)
    assert identical(a, c)


@pytest.mark.parametrize("every", [1, 4])
def test_top_kast_with_gradients_for_all_is_dpf(every):
    a, p = trained("top-kast", backward_density=1., decay=0., every=every)
    b, q = trained("dpf", every=every, start=0., end=0., allocate="uniform", weight_decay=0.)
    assert identical(a, b) and p == q
    assert not identical(a, trained("top-kast", backward_density=1., decay=1., every=every)[0])


def test_weights_outside_the_trained_set_never_move():
    moved, rule = [], topkast_rule(.5, 0., 1)(build("top-kast"), .25)
    last = {}

    def look(training):
        for n in training.names:
            if n in last:
                moved.append((last[n][1] | (training.w(n) == last[n][0])).all().item())
            last[n] = training.w(n).clone(), training.state[n]["masks"][1]
    for n, layer in Weights(mlp()).layers.items():
        last[n] = layer.read().clone(), layer.read().abs() >= layer.read().abs().flatten().quantile(.5)
    model = mlp()
    watched = replace(rule, update=lambda training: (rule.update(training), look(training)))
    with apply_rule(watched, Weights(model), .25, 12):
        opt = torch.optim.SGD(model.parameters(), .3)
        for x, y in batches() * 2:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert len(moved) == 36 and all(moved)


def test_the_set_in_use_lies_in_the_set_that_is_trained():
    sizes = []

    def look(training):
        for n in training.names:
            used, reached, _ = training.state[n]["masks"]
            assert (used <= reached).all()
            sizes.append((used.float().mean().item(), reached.float().mean().item()))
    followed(topkast_rule(.5, 1e-4, 1)(build("top-kast"), .25), look)
    assert set(sizes) == {(.25, .5)}
    sizes.clear()
    followed(topkast_rule(.1, 1e-4, 1)(build("top-kast"), .25), look)
    assert set(sizes) == {(.25, .25)}   # never fewer than are used


def test_the_density_of_dpf_falls_along_the_cubic():
    counts = []
    rule = feedback_rule(4, 0., .5)(build("dpf"), .25)
    followed(rule, lambda t: counts.append(sum(int(s["masks"][0].sum()) for s in t.state.values())), steps=24)
    wanted = [(.25 + .75 * (1 - min(1, (4 * k / 24) / .5))**3) * TOTAL for k in range(1, 7)]
    assert all(abs(c - w) <= 1 for c, w in zip(counts, wanted)) and counts[2:] == [TOTAL // 4] * 4
