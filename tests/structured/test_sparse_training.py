"Sparsity regularisation of channels: exact penalties, exact counts, and the order that the papers report."
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune
from pruning_bench.core.allocate import Allocator, global_, uniform
from pruning_bench.core.rule import TrainingState, Rule, apply_rule
from pruning_bench.core.recovery import finetune, none
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.soft_filters import (zero_filters, filter_norm, straight_through_step, soft_density,
                                                   soft_pruning_rule)
from pruning_bench.structured.sparse_training import (targeted_l1_rule, penalty_share, growing_penalty_rule,
                                                      group_lasso_rule, group_norms, select_channels, penalty_rule,
                                                      penalty_strengths, l1_proximal_step, scale_members, bn_l1_rule)

METHODS = ("slimming", "masksparsity", "group-lasso", "growing-reg", "sfp", "soft-fpgm", "lapp")
GLOBAL = SimpleNamespace(allocate=global_)
EVEN = SimpleNamespace(allocate=uniform)


def chain(dtype=torch.float64, widths=(6, 10)):
    torch.manual_seed(0)
    a, b = widths
    net = nn.Sequential(nn.Conv2d(1, a, 3), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, bias=False),
                        nn.BatchNorm2d(b), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                        nn.Linear(4 * b, 3)).to(dtype)
    for m in (net[1], net[4]):
        m.weight.data.copy_(torch.rand(len(m.weight)) + .5)
        m.bias.data.copy_(torch.randn(len(m.bias)) / 4)
        m.running_mean.copy_(torch.randn(len(m.bias)) / 4)
    return net


def batches(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 1, 8, 8, generator=g).to(dtype), torch.arange(8) % 3) for _ in range(3)]


def states(net): return {n: t.clone() for n, t in net.state_dict().items()}


def followed(net, rule, steps, look, lr=0., keep=.5, optimizer="adamw"):
    "What `look(space)` says after every step of a training under a rule."
    space, log = Channels(net, batches()), []
    def update(training): rule.update(training); log.append(look(space))
    with apply_rule(Rule(begin=rule.begin, update=update, finish=rule.finish), space, keep, steps):
        finetune(steps, lr, optimizer)(net, batches(), F.cross_entropy)
    return log


# doses and penalties

@pytest.mark.parametrize("steps,end", [(1, 1.), (10, .5), (40, .7), (300, .9)])
@pytest.mark.parametrize("rising", [False, True])
def test_doses_add_up_to_one_and_are_monotone(steps, end, rising):
    found = [penalty_share(SimpleNamespace(step=k, steps=steps), end, rising) for k in range(1, round(end * steps) + 1)]
    assert sum(found) == pytest.approx(1) and found == sorted(found, reverse=not rising) and min(found) >= 0


def test_the_pull_is_the_minimum_of_the_lasso():
    a = torch.tensor([1., -.7, .5, -.3, .1, 0.], dtype=torch.double)
    grid = torch.linspace(-1.5, 1.5, 30001, dtype=torch.double)
    for s in (.05, .3, .6, 2.):
        p = a.clone()
        l1_proximal_step(p, torch.arange(6).view(3, 2), s)
        oracle = torch.stack([grid[(.5 * (grid - v)**2 + s * grid.abs()).argmin()] for v in a])
        assert (p - oracle).abs().max() < 1e-4 and (p * a >= 0).all() and p[5] == 0


def test_the_pull_is_the_published_subgradient_under_gradient_descent():
    a, g, lr, s = torch.tensor([1., -.7, .5]), torch.tensor([.1, -.2, .3]), .1, .4
    p = a - lr * g
    l1_proximal_step(p, torch.arange(3), lr * s)
    assert torch.allclose(p, a - lr * (g + s * a.sign()), atol=1e-7)


def test_pressure_of_the_weakest_and_the_strongest():
    assert penalty_strengths(torch.tensor([2., 1., 3.]), 16.).tolist() == [4., 16., 1.]
    assert penalty_strengths(torch.tensor([.3, .3]), 16.).tolist() == [1., 1.]
    s = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert (penalty_strengths(s, 16.)[s.argsort(descending=True)].diff() >= 0).all()


def test_the_norm_of_a_channel_has_all_its_members():
    net = chain()
    by_hand = (net[3].weight.square().sum((1, 2, 3)) + net[4].weight.square() + net[8].weight.view(3, 10, 4).square()
               .sum((0, 2)))
    assert torch.allclose(group_norms(Channels(net, batches()))["3.weight"], by_hand.sqrt().detach())


def test_shrinking_touches_the_members_of_a_channel_and_nothing_else():
    net = chain()
    space, before = Channels(net, batches()), states(net)
    f = torch.ones(10, dtype=torch.double)
    f[3] = .25
    scale_members(space, {"3.weight": f})
    after, quarter = states(net), {}
    for n, where in {"3.weight": (3,), "4.weight": (3,), "4.bias": (3,),
                     "8.weight": (slice(None), slice(12, 16))}.items():
        quarter[n] = torch.zeros_like(before[n], dtype=torch.bool)
        quarter[n][where] = True
    assert all(torch.equal(after[n], torch.where(quarter[n], before[n] / 4, before[n]) if n in quarter else before[n])
               for n in after)


# choices

def test_no_group_vanishes_and_the_count_is_exact():
    space = Channels(chain(), batches())
    scores = {"0.weight": torch.arange(6.) - 100, "3.weight": torch.arange(10.)}
    for keep, total in ((.5, 8), (.25, 4), (2 / 16, 2)):
        masks = select_channels(TrainingState(space, keep, 1), scores, global_)
        assert sum(int(m.sum()) for m in masks.values()) == total and masks["0.weight"][5] and masks["3.weight"][9]


def test_the_choice_is_made_once_and_then_held():
    net, order = chain(), []
    rule = penalty_rule(lambda c, m: order.append(c.step),
                        lambda c, m: select_channels(c, group_norms(c.space), m.allocate), .5)(EVEN, .5)
    log = followed(net, rule, 10, lambda space: space.kept["3.weight"].clone(), lr=1e-2)
    assert order == [1, 2, 3, 4, 5]
    assert all(m.all() for m in log[:4])
    assert all(torch.equal(m, log[4]) for m in log[5:])
    assert log[4].sum() == 5
    assert (net[8].weight.view(3, 10, 4)[:, ~log[4]] == 0).all() and (net[4].bias[~log[4]] == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_record_is_used_twice_without_a_memory(name):
    from pruning_bench import build
    record = build(name, steps=6)
    first, second = (prune(chain(), record, .5, batches(), F.cross_entropy) for _ in range(2))
    other = prune(chain(), record, .25, batches(), F.cross_entropy)
    assert first == second
    assert sum(int(m.sum()) for m in first.masks.values()) == 8
    assert sum(int(m.sum()) for m in other.masks.values()) == 12 + (name in ("growing-reg", "sfp", "soft-fpgm"))


@pytest.mark.parametrize("name", METHODS)
def test_channels_are_really_gone_and_a_budget_may_have_bounds(name):
    net = chain()
    plan = prune(net, name, {"channels": .5, "at_least": {"0*": 5}}, batches(), F.cross_entropy, steps=8)
    assert len(net[0].weight) == int(plan.masks["0.weight"].sum()) >= 5 and len(net[0].weight) + len(net[3].weight) <= 8
    assert net[8].in_features == 4 * len(net[3].weight)


@pytest.mark.parametrize("name", ("group-lasso", "sfp"))
def test_the_choice_inside_the_training_meets_a_budget_of_multiplications(name):
    from pruning_bench.bench.measure.size import macs
    net, x = chain(), batches()[0][0]
    dense = macs(net, x)
    prune(net, name, {"macs": .5}, batches(), F.cross_entropy, steps=8)
    assert .35 * dense < macs(net, x) <= .5 * dense


@pytest.mark.parametrize("name", ("slimming", "masksparsity"))
def test_without_batch_norm_scales_are_refused_in_one_sentence(name):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    before = states(net)
    with pytest.raises(BadInput, match="no batch norm scales the channels of '1.weight'") as refused:
        prune(net, name, .5, batches(), F.cross_entropy, steps=4)
    assert "\n" not in str(refused.value)
    assert "group-lasso" in str(refused.value)
    assert all(torch.equal(before[n], t) for n, t in states(net).items())


# what each of them does to weights that the loss ignores (learning rate zero)

def test_slimming_takes_the_travel_from_every_scale_and_nothing_from_the_rest():
    net = chain()
    before = states(net)
    log = followed(net, bn_l1_rule(.3, 1.)(GLOBAL, .5), 11,
                   lambda space: torch.cat([net[1].weight.detach(), net[4].weight.detach()]))
    start = torch.cat([before["1.weight"], before["4.weight"]])
    left = .3 * penalty_share(SimpleNamespace(step=11, steps=11), 1.)
    assert torch.allclose(log[-2], (start - .3 + left).clamp(min=0))
    assert torch.allclose(log[-1][log[-1] > 0], (start - .3)[log[-1] > 0]) and (log[-1] > 0).sum() == 8


def test_masksparsity_leaves_the_scales_that_stay_as_they_were():
    net = chain()
    before = states(net)
    log = followed(net, targeted_l1_rule(.3, .2, 1.)(GLOBAL, .5), 20,
                   lambda space: torch.cat([net[1].weight.detach(), net[4].weight.detach()]))
    start = torch.cat([before["1.weight"], before["4.weight"]])
    stays = log[-1] > 0
    assert (log[2] < start).all() and stays.sum() == 8 and torch.equal(log[-2][stays], start[stays])
    assert (log[-2][~stays] < .1 * start[~stays]).all()
    assert torch.equal(stays, start >= start.sort(descending=True).values[7])


def test_growing_regularisation_squeezes_the_chosen_and_nobody_else():
    net = chain()
    s, start = group_norms(Channels(net, batches())), states(net)
    log = followed(net, growing_penalty_rule(8., 1.)(EVEN, .5), 10,
                   lambda space: {n: m.weight.detach().clone()
                                  for n, m in (("0.weight", net[1]), ("3.weight", net[4]))})
    factor = torch.tensor(-8 * (1 - penalty_share(SimpleNamespace(step=10, steps=10), 1., True))).exp().item()
    for n, norm in (("0.weight", "1.weight"), ("3.weight", "4.weight")):
        stays = s[n] >= s[n].sort(descending=True).values[len(s[n]) // 2 - 1]
        assert torch.equal(log[-1][n], start[norm] * stays) and torch.equal(log[-2][n][stays], start[norm][stays])
        assert torch.allclose(log[-2][n][~stays], start[norm][~stays] * factor, rtol=1e-5)


def test_the_group_lasso_widens_the_gap_between_weak_and_strong():
    first, log = ((group_norms(Channels(chain(), batches())),
                   followed(chain(), group_lasso_rule(8., 16., 1.)(GLOBAL, .5), 20, group_norms)))
    for n, s in first.items():
        left = log[-2][n] / s
        assert left[s.argmin()] == left.min() < .01 and left[s.argmax()] == left.max() > .5


# soft filters

def test_a_blank_filter_regains_weight_in_one_step_where_its_bias_lets_the_gradient_through():
    net, (x, y) = chain(), batches()[0]
    before, stays = states(net), {"0.weight": torch.arange(6) % 2 == 0, "3.weight": torch.arange(10) < 4}
    zero_filters(Channels(net, batches()), stays)
    changed = {n for n, t in states(net).items() if not torch.equal(t, before[n])}
    assert changed == {"0.weight", "3.weight"}
    assert all(torch.equal(net[k].weight.flatten(1).norm(dim=1) == 0, ~stays[f"{k}.weight"]) for k in (0, 3))
    opt, awake = torch.optim.SGD(net.parameters(), 1e-2), net[4].bias.detach() > 0
    F.cross_entropy(net.train()(x), y).backward(); opt.step()
    assert torch.equal(net[3].weight.flatten(1).norm(dim=1) > 0, awake | stays["3.weight"]) and 0 < awake[4:].sum() < 6


def test_soft_filters_are_zeroed_in_equal_numbers_and_change_places():
    net = chain(widths=(12, 10))
    rule = soft_pruning_rule(filter_norm, 5, 1.)(EVEN, .5)
    log = followed(net, rule, 25, lambda space: net[0].weight.detach().flatten(1).norm(dim=1) == 0, lr=1e-1,
                   optimizer="sgd")
    rounds = [log[k] for k in (4, 9, 14, 19, 24)]
    assert all(m.sum() == 6 for m in rounds) and not any(log[k].any() for k in (5, 10, 15, 20))
    assert any((a != b).any() for a, b in zip(rounds, rounds[1:]))


# thresholds

def test_a_gate_is_a_mask_on_the_readers_and_leaves_no_hook():
    net = chain().eval()
    space, (x, _) = Channels(net, batches()), batches()[0]
    masks = {n: torch.arange(len(g)) % 3 > 0 for n, g in space.groups.items()}
    with space.gate(lambda n: masks[n].double()): seen = net(x)
    with pytest.raises(KeyboardInterrupt):
        with space.gate(lambda n: None):
            assert not torch.allclose(net(x), seen)
            raise KeyboardInterrupt
    assert not any(m._forward_pre_hooks for m in net.modules())
    space.apply({n: (None, m) for n, m in masks.items()}); space.remove()
    assert torch.allclose(net(x), seen, atol=1e-12)


def test_gates_of_depthwise_and_grouped_readers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
                        nn.Conv2d(8, 4, 1, groups=2), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    space, (x, _) = Channels(net, batches()), batches()[0]
    masks = {n: torch.arange(len(g)) % 2 == 0 for n, g in space.groups.items()}
    with space.gate(lambda n: masks[n].double()): seen = net(x)
    space.apply({n: (None, m) for n, m in masks.items()}); space.remove()
    assert torch.allclose(net(x), seen, atol=1e-12)


def test_thresholds_rise_while_too_many_pass():
    s = {"a": torch.rand(9), "b": torch.rand(5)}
    for target, sign in ((.1, -1), (.9, 1)):
        ts = {n: torch.tensor(.5, requires_grad=True) for n in s}
        (soft_density(s, ts, .1) - target).square().backward()
        assert all(sign * t.grad > 0 for t in ts.values())   # descent moves against the slope
    passed = [straight_through_step(s["a"], torch.tensor(t), .1) for t in (0., .3, .6, 1.1)]
    assert all((a >= b).all() for a, b in zip(passed, passed[1:]))
    assert passed[-1].sum() == 0
    assert set(passed[1].tolist()) <= {0., 1.}


# transformers

@pytest.mark.parametrize("name", METHODS)
def test_the_feed_forward_layers_of_a_vision_transformer(name):
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    net = VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24,
                            num_classes=3)
    data = [(x.float().expand(-1, 3, -1, -1), y) for x, y in batches()]
    skip = ("*self_attention*", "conv_proj*", "class_token", "*pos_embedding")
    if name in ("slimming", "masksparsity"):
        with pytest.raises(BadInput, match="no batch norm"):
            prune(net, name, .5, data, F.cross_entropy, skip=skip, steps=4)
        return
    plan = prune(net, name, .5, data, F.cross_entropy, skip=skip, steps=10)
    ffn = [m for n, m in plan.masks.items() if "mlp" in n]
    assert len(ffn) == 2 and sum(int(m.sum()) for m in ffn) == 24 and all(m.any() for m in ffn)
    assert [b.mlp[0].out_features for b in net.encoder.layers] == [int(m.sum()) for m in ffn]
    assert net(data[0][0]).isfinite().all()


# the order that the papers report

@pytest.mark.slow
def test_a_cut_after_group_sparse_training_survives_and_a_plain_one_does_not():
    from pruning_bench.bench.task import find_task
    cnn, found = find_task("digits-cnn"), {}
    for name in ("l1-filter", "trained l1-filter", "slimming", "group-lasso", "growing-reg"):
        for seed in range(3):
            model, recipe = copy.deepcopy(cnn.dense(seed)), finetune(100, 3e-3, weight_decay=1e-4)
            more = dict(data=cnn.batches(seed), loss=F.cross_entropy, seed=seed)
            if name == "trained l1-filter": recipe(model, more["data"], F.cross_entropy)
            if "l1" in name: prune(model, "l1-filter", .5, recover=none(), **more)
            else: prune(model, name, .5, prune_at=1., recover=recipe, **more)
            found.setdefault(name, []).append(cnn.evaluate(model, "validation")["accuracy"])
    mean = {n: sum(v) / 3 for n, v in found.items()}
    assert min(mean["group-lasso"], mean["growing-reg"]) > max(mean["l1-filter"], mean["trained l1-filter"],
                                                               mean["slimming"]) + .3, mean

@pytest.mark.parametrize("name", ["slimming", "masksparsity", "growing-reg", "group-lasso", "resrep"])
def test_an_allocation_that_reads_data_is_refused_before_the_training(name):
    "Its statistics would be those of the network before the training, and channels are selected inside it."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    reads = Allocator(lambda scores, keep, space: dict.fromkeys(scores, keep), "reading", needs=frozenset({"act_norm"}))
    data = [(torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,)))] * 3
    with pytest.raises(BadInput, match="'reading' reads 'act_norm'.*without statistics"):
        prune(net, build(name, steps=3), .5, data=data, loss=F.cross_entropy, allocate=reads)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
