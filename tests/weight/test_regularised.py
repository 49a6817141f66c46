"ADMM and Powerpropagation: the three steps by hand, derivatives, and the settings at which both are magnitude pruning."
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from three_layers import batches, identical, mlp, trained
from pruning_bench import BadInput, build, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.recovery import finetune
from pruning_bench.core.rule import Rule, apply_rule
from pruning_bench.core.space import Weights
from pruning_bench.weight.regularised import (SignedPower, admm_rule, loss_penalty, powerprop_rule, project,
                                              signed_root)


# the penalty

@pytest.mark.parametrize("times", [1, 3])
def test_a_penalty_counts_once_per_step_however_often_the_model_runs(times):
    model, rule = mlp(), None
    target = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for n, p in model.named_parameters()
              if p.dim() > 1}

    def penalty(training):
        return .25 * sum((training.weight[n] - t).square().sum() for n, t in target.items())
    rule = Rule(inside=lambda training: loss_penalty(training, penalty))
    x, y = batches()[0]
    with apply_rule(rule, Weights(model), 1., 1):
        opt = torch.optim.SGD(model.parameters(), .1)
        for _ in range(times):
            (F.cross_entropy(model(x), y) / times).backward()
        opt.step()
    by_hand = mlp()
    value = F.cross_entropy(by_hand(x), y) + .25 * sum((by_hand.get_parameter(n) - t).square().sum()
                                                       for n, t in target.items())
    value.backward()
    for p, q in zip(by_hand.parameters(), model.parameters()):
        assert torch.allclose(p - .1 * p.grad, q, atol=1e-6)


def test_a_penalty_leaves_pruned_weights_and_their_momentum_alone():
    model = mlp()
    plan = prune(model, "magnitude", .5)
    rule = Rule(inside=lambda training: loss_penalty(training, lambda t: sum((w - 1).square().sum()
                                                                             for w in t.weight.values())))
    with apply_rule(rule, Weights(model), .5, 2):
        opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
        for x, y in batches()[:2]:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        for n, m in plan.masks.items():
            buffer = opt.state[model.get_parameter(n)]["momentum_buffer"]
            assert (buffer[~m] == 0).all() and (buffer[m] != 0).any()
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in plan.masks.items())


def test_nothing_is_left_of_a_penalty():
    from torch.optim import optimizer
    before = len(optimizer._global_optimizer_pre_hooks)
    trained("admm", rho=.1)
    assert len(optimizer._global_optimizer_pre_hooks) == before


# ADMM

def test_two_rounds_by_hand():
    "Z and U after the start and after two projections, from the weights that the training had at these steps."
    method, keep = build("admm"), .25
    rule = admm_rule(.3, 3, 1.)(method, keep)
    model = mlp()

    def values(training): return {n: training.w(n).clone() for n in training.names}

    def projected(v): return {n: x * (x.abs() >= x.abs().flatten().sort().values[-round(keep * x.numel())])
                              for n, x in v.items()}
    frozen = values_of(model)
    z, u = projected(frozen), {n: torch.zeros_like(w) for n, w in frozen.items()}

    def update(training):
        w = values(training)
        if training.step in (3, 6):   # of 9: two projections after the start
            moved = {n: w[n] + u[n] for n in w}
            z.update(projected(moved))
            u.update({n: moved[n] - z[n] for n in w})
        rule.update(training)
    x, y = batches()[0]
    with apply_rule(replace(rule, update=update), Weights(model), keep, 9) as training:
        opt = torch.optim.SGD(model.parameters(), .05)
        for step in range(9):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            plain = {n: p.grad.clone() for n, p in training.weight.items()}
            pulls = {n: .3 * (w - z[n] + u[n]) for n, w in values(training).items()}
            opt.step()
            for n in plain if step < 8 else ():   # the last step ends with the cut
                assert torch.allclose(training.weight[n].grad, plain[n] + pulls[n], atol=1e-6)
    assert all((v != 0).any() for v in u.values())


def values_of(model): return {n: layer.read().clone() for n, layer in Weights(model).layers.items()}


@pytest.mark.parametrize("end", [.3, .5, 1.])
def test_without_a_penalty_it_is_one_cut(end):
    if end < 1:
        a, p = trained("admm", rho=0., prune_at=end)
        b, q = trained("iss", alpha=1., end=end, weight_decay=0.)
        assert identical(a, b) and p == q
    assert not identical(trained("admm", rho=0., prune_at=end)[0], trained("admm", rho=1., prune_at=end)[0])


def test_the_penalty_draws_to_the_projection():
    def outside(rho):
        found, rule = [], admm_rule(rho, 10, 1.)(build("admm"), .1)

        def update(training):
            if training.step == 60:
                w = {n: training.w(n) for n in training.names}
                z = project(build("admm"), training, w, .1)
                found.append(sum((w[n] - z[n]).square().sum() for n in w) / sum(v.square().sum() for v in w.values()))
            rule.update(training)
        model = mlp()
        with apply_rule(replace(rule, update=update), Weights(model), .1, 60):
            finetune(60, 1e-2)(model, batches(), F.cross_entropy)
        return found[0]
    assert outside(10.) < .5 * outside(0.)


def test_masks_hold_after_the_cut():
    model, plan = trained("admm", prune_at=.5)
    assert all((p[~masks_of(model)[n]] == 0).all() for n, p in model.named_parameters() if n in plan.masks)


# Powerpropagation

@pytest.mark.parametrize("power", [1., 1.5, 2., 4.])
def test_the_derivative_of_a_signed_power(power):
    phi = torch.tensor([-1.3, -.2, 0., .4, 2.], dtype=torch.double, requires_grad=True)
    up = torch.tensor([1., 2., 3., 4., 5.], dtype=torch.double)
    seen = SignedPower.apply(phi, power)
    slope, = torch.autograd.grad(seen, phi, up)
    step, away = 1e-6, phi.detach() != 0
    above, below = (SignedPower.apply(phi.detach() + s, power) for s in (step, -step))
    assert torch.allclose(slope[away], (up * (above - below) / (2 * step))[away], rtol=1e-4)
    assert torch.allclose(slope, up * power * phi.detach().abs()**(power - 1)) and slope.isfinite().all()
    assert torch.allclose(SignedPower.apply(signed_root(phi.detach(), power), power), phi.detach())


def test_the_network_is_the_same_before_the_first_step():
    model, (x, _) = mlp(), batches()[0]
    before = model(x)
    with apply_rule(powerprop_rule(3., 1.)(build("powerprop"), 1.), Weights(model), 1., 1) as training:
        assert torch.allclose(model(x), before, atol=1e-5)
        stored = training.weight["0.weight"]
        assert not torch.allclose(stored, mlp()[0].weight)
        opt = torch.optim.SGD(model.parameters(), 0.)
        F.cross_entropy(model(x), batches()[0][1]).backward()
        opt.step()
    assert torch.allclose(model(x), before, atol=1e-5) and torch.allclose(model[0].weight, mlp()[0].weight, atol=1e-6)


def test_power_one_is_magnitude_pruning():
    a, p = trained("powerprop", power=1., prune_at=.5)
    b, q = trained("iss", alpha=1., end=.5, weight_decay=0., allocate="global")
    assert identical(a, b) and p == q
    assert not identical(a, trained("powerprop", power=2., prune_at=.5)[0])


def test_without_steps_that_move_it_is_one_ranking():
    model = mlp()
    plan = prune(model, "powerprop", .75, batches(), F.cross_entropy, steps=2, lr=0.)
    assert plan == prune(mlp(), "global-magnitude", .75)


def test_a_power_below_one_is_refused():
    model = mlp()
    with pytest.raises(BadInput, match="power=0.5"):
        prune(model, "powerprop", .5, batches(), F.cross_entropy, power=.5)
    assert identical(model, mlp())
