"Hard-concrete gates, continuous sparsification and edge-popup: formulas, budgets and limits, exactly."
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from three_layers import TOTAL, batches, mlp
from pruning_bench import BadInput, build, prune
from pruning_bench.core.inputs import seeded
from pruning_bench.core.recovery import finetune
from pruning_bench.core.rule import apply_rule
from pruning_bench.core.schedule import ramped_density
from pruning_bench.core.space import Weights
from pruning_bench.weight.relaxed_masks import (BETA, GAMMA, ZETA, continuous_rule, edge_popup_rule, hard_concrete,
                                                hard_concrete_rule, open_probability)

NAMES = ["l0", "continuous-sparsification", "edge-popup"]


def followed(rule, look, keep=.25, steps=24, lr=1e-2, model=None, optimizer="adamw"):
    "Train under a rule, and call `look(training)` after its update at every step."
    model = model or mlp()
    watched = replace(rule, update=lambda training: (rule.update(training), look(training)))
    with seeded(0), apply_rule(watched, Weights(model), keep, steps) as training:
        finetune(steps, lr, optimizer)(model, batches(), F.cross_entropy)
    return model, training


# all of them

@pytest.mark.parametrize("name", ["l0", "continuous-sparsification"])
def test_where_nothing_learns_the_largest_weights_stay(name):
    plan = prune(mlp(), name, .7, batches(), F.cross_entropy, steps=8, lr=0.)
    assert plan == prune(mlp(), "global-magnitude", .7)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_pruned_before_stays_pruned(name):
    model = mlp()
    first = prune(model, "magnitude", .5)
    then = prune(model, name, .8, batches(), F.cross_entropy, steps=24, lr=.05)
    assert all((then.masks[n] <= first.masks[n]).all() for n in first.masks)
    assert sum(int(m.sum()) for m in then.masks.values()) == round(.2 * TOTAL)


@pytest.mark.filterwarnings("ignore:pattern")
@pytest.mark.parametrize("name", NAMES)
def test_patterns_hold(name):
    plan = prune(mlp(), name, "2:4", batches(), F.cross_entropy, steps=12, lr=.02)
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in plan.masks.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_learned(name):
    still = prune(mlp(), name, .7, batches(), F.cross_entropy, steps=40, lr=0.)
    assert prune(mlp(), name, .7, batches(), F.cross_entropy, steps=40, lr=.02) != still


# L0

def test_a_gate_by_hand():
    u = torch.tensor(.3)
    s = 1 / (1 + math.exp(-(math.log(.3) - math.log(.7) + .5) / (2 / 3)))
    assert hard_concrete(torch.tensor(.5), u).item() == pytest.approx(s * 1.2 - .1, abs=1e-6)
    assert hard_concrete(torch.tensor(-9.), u) == 0 and hard_concrete(torch.tensor(9.), u) == 1
    assert hard_concrete(torch.tensor(0.)).item() == pytest.approx(.5)
    assert (BETA, GAMMA, ZETA) == (2 / 3, -.1, 1.1)


@pytest.mark.parametrize("location", [-4., -1., 0., 2., 5.])
def test_the_probability_is_that_of_the_uniform_numbers_that_open_the_gate(location):
    "A gate is a rising function of u: the probability is one minus the u at which it leaves zero, found by bisection."
    low, high, at = 0., 1., torch.tensor(location, dtype=torch.double)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if hard_concrete(at, torch.tensor(middle, dtype=torch.double)) > 0 else (middle, high)
    assert open_probability(at).item() == pytest.approx(1 - low, abs=1e-6)


def test_the_gradient_of_a_gate():
    location = torch.linspace(-3, 3, 25, dtype=torch.double).requires_grad_()
    u = torch.rand(25, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    z = hard_concrete(location, u)
    slope, = torch.autograd.grad(z.sum(), location)
    step = 1e-6
    difference = (hard_concrete(location.detach() + step, u) - hard_concrete(location.detach() - step, u)) / (2 * step)
    assert torch.allclose(slope, difference, atol=1e-5) and ((slope > 0) == ((z > 0) & (z < 1))).all()


def test_the_multiplier_rises_with_the_excess_and_restarts_at_the_budget():
    rule = hard_concrete_rule(.9, 30., 1.)
    made, shift = rule(build("l0"), .3), math.log(.9 / .1) + BETA * math.log(-GAMMA / ZETA)
    expected, multipliers = 0., []
    cell = made.update.__closure__
    multiplier = next(c.cell_contents for c in cell if isinstance(c.cell_contents, list))

    def look(training):
        nonlocal expected
        s = torch.cat([s["s"].detach().flatten() for s in training.state.values()])
        excess = open_probability(shift + 30 * s).mean().item() - .3
        expected = expected + excess if excess > 0 else 0.
        multipliers.append((multiplier[0], expected))
    followed(made, look, keep=.3, steps=60)
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in multipliers)
    assert multipliers[0][0] == pytest.approx(.6, abs=.02) and min(m for m, _ in multipliers[5:]) == 0


def test_only_the_penalty_closes_gates():
    nothing = hard_concrete_rule(.9, 30., 0.)(build("l0"), .25)
    pushed = hard_concrete_rule(.9, 30., 5.)(build("l0"), .25)
    ends = []
    for rule in (nothing, pushed):
        _, training = followed(rule, lambda t: None, steps=40)
        ends.append(torch.cat([s["s"].detach().flatten() for s in training.state.values()]).mean().item())
    assert ends[1] < ends[0] - .02


def test_the_stored_network_is_the_test_network():
    model, rule = mlp(), hard_concrete_rule(.9, 30., 0.)(build("l0"), 1.)
    x, y = batches()[0]
    with seeded(0), apply_rule(rule, Weights(model), 1., 10):
        finetune(10, 1e-2)(model, batches(), F.cross_entropy)
        model.eval()
        out = model(x)
        model.train()
        assert not torch.equal(model(x), model(x))   # noise
    assert torch.allclose(model.eval()(x), out, atol=1e-6)


@pytest.mark.parametrize("bad", [dict(start_open=0.), dict(start_open=1.)])
def test_gates_that_cannot_learn_are_refused(bad):
    model = mlp()
    with pytest.raises(BadInput, match="start_open"):
        prune(model, "l0", .5, batches(), F.cross_entropy, **bad)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), mlp().parameters()))


# continuous sparsification

def test_gates_above_one_half_are_as_many_as_the_schedule_says():
    made, counts = continuous_rule(200., 30., .1, .7)(build("continuous-sparsification"), .25), []
    ones = torch.ones(1)

    def look(training):
        gates = torch.cat([made.view(ones.expand_as(s["s"]), s, training).flatten() for s in training.state.values()])
        wanted = ramped_density(.25, training.progress, .1, .7) * TOTAL
        counts.append((int((gates > .5).sum()), wanted, int((gates >= .5).sum())))
    _, training = followed(made, look, steps=30, lr=.1, optimizer="sgd")   # no two gates are equal, as after Adam's
    assert all(above <= wanted + 1 and wanted - 1 <= at_least for above, wanted, at_least in counts)
    assert counts[-1][0] > .8 * TOTAL // 4 and counts[-1][2] < 1.2 * TOTAL // 4


def test_the_sigmoid_hardens_exponentially():
    made, slopes = continuous_rule(16., 1., 0., 0.)(build("continuous-sparsification"), .999), {}

    def look(training):
        s = {"s": torch.tensor([[1e-4, -1e-4]])}
        a, b = made.view(torch.ones(1, 2), s, training)[0]
        slopes[training.progress] = (torch.logit(a) - torch.logit(b)).item()
    followed(made, look, steps=4)
    assert [slopes[t] / slopes[.25] for t in (.25, .5, .75, 1.)] == pytest.approx([1, 2, 4, 8], rel=1e-2)


@pytest.mark.parametrize("bad", [dict(final_temperature=.5)])
def test_a_sigmoid_that_softens_is_refused(bad):
    with pytest.raises(BadInput, match="final_temperature"):
        prune(mlp(), "continuous-sparsification", .5, batches(), F.cross_entropy, **bad)


# edge-popup

def test_weights_and_biases_are_never_trained():
    model = mlp()
    signs = {n: layer.read().sign() for n, layer in Weights(model).layers.items()}
    plan = prune(model, "edge-popup", .75, batches(), F.cross_entropy, recover=finetune(20, .05, weight_decay=.3))
    for n, s in signs.items():
        size = math.sqrt(2 / (s.shape[1] * .25))
        assert torch.allclose(model.get_parameter(n), s * size * plan.masks[n])
        assert int(plan.masks[n].sum()) == round(.25 * s.numel())
    fresh = dict(mlp().named_parameters())
    assert all(torch.equal(p, fresh[n]) and p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))
    plain = mlp()
    plan = prune(plain, "edge-popup", .75, batches(), F.cross_entropy, steps=8, constant=False)
    assert all(torch.equal(plain.get_parameter(n), fresh[n] * m) for n, m in plan.masks.items())


def test_the_straight_through_gradient_of_a_score():
    model, rule = mlp(), edge_popup_rule(False, 10.)(build("edge-popup"), .25)
    x, y = batches()[0]
    with seeded(0), apply_rule(rule, Weights(model), .25, 1) as training:
        before = {n: s["score"].detach().clone() for n, s in training.state.items()}
        masks = {n: s["mask"].clone() for n, s in training.state.items()}
        F.cross_entropy(model(x), y).backward()
        slopes = {n: s["score"].grad.clone() for n, s in training.state.items()}
        torch.optim.SGD(model.parameters(), .1).step()
    pruned = mlp()
    with torch.no_grad():
        for n, m in masks.items():
            pruned.get_parameter(n).mul_(m)
    F.cross_entropy(pruned(x), y).backward()
    for n, m in masks.items():
        w = mlp().get_parameter(n)
        assert torch.allclose(slopes[n], 10 * w * pruned.get_parameter(n).grad, atol=1e-6)
        top = before[n].flatten().sort(descending=True).values[round(.25 * m.numel()) - 1]
        assert torch.equal(m, before[n] >= top)


def test_first_scores_are_drawn_and_bounded():
    rule = edge_popup_rule(True, 30.)(build("edge-popup"), .25)
    with seeded(0), apply_rule(rule, Weights(mlp()), .25, 1) as training:
        scores = {n: 30 * s["score"].detach() for n, s in training.state.items()}
        model = training.space.model
        F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
        torch.optim.SGD(model.parameters(), 0.).step()
    for n, s in scores.items():
        bound = 1 / math.sqrt(s.shape[1])
        assert s.abs().max() <= bound and s.std() > .3 * bound and (s > 0).any() and (s < 0).any()


def test_scores_that_cannot_move_are_refused():
    with pytest.raises(BadInput, match="gate_speed=0"):
        prune(mlp(), "edge-popup", .5, batches(), F.cross_entropy, gate_speed=0.)
