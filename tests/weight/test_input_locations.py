"Input locations: one mask for all channels and time steps, its gradient, exchanges, and what the mask leaves alone."
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.recovery import finetune
from pruning_bench.core.rule import apply_rule
from pruning_bench.weight.input_locations import (LocationMask, Locations, change_grid, exchanged, location_mask,
                                                  location_rule, set_location_mask)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 12), nn.ReLU(), nn.Linear(12, 4))


def batches(n=4, places=(1, 6, 11)):
    "Three channels on a 4 x 4 grid; the class depends on three locations only."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32 * n, 3, 4, 4, generator=g)
    seen = x.flatten(2)[..., list(places)].sum(1)
    y = torch.cat([seen, torch.zeros(len(x), 1)], 1).argmax(1)
    return [(a, b) for a, b in zip(x.split(32), y.split(32))]


def pruned(method="dynst", **settings):
    model = net()
    settings = {"steps": 300, **settings} if method == "dynst" else settings
    plan = prune(model, method, 1 - 3 / 16, batches(), F.cross_entropy, **settings)
    return model, plan


def test_the_locations_that_decide_the_class_are_found():
    _, plan = pruned()
    assert plan.masks["#input"].nonzero().flatten().tolist() == [1, 6, 11]


def test_what_is_not_read_has_no_effect_not_even_when_it_is_no_number():
    model, plan = pruned()
    x = batches()[0][0]
    gone = ~plan.masks["#input"].view(4, 4)
    for other in (torch.nan, torch.inf, 1e30):
        assert torch.equal(model(x), model(x.masked_fill(gone, other)))
    assert not torch.equal(model(x), model(x.masked_fill(~gone, 0)))


def test_the_mask_travels_with_copies_and_plans(tmp_path):
    model, plan = pruned()
    x = batches()[0][0]
    twin = copy.deepcopy(model)
    set_location_mask(twin, torch.ones(16, dtype=torch.bool))
    assert torch.equal(location_mask(model).keep, plan.masks["#input"])   # the copy has a mask of its own
    plan.save(tmp_path / "plan")
    dense = net()
    dense.load_state_dict(model.state_dict())
    assert not torch.equal(dense(x), model(x))
    load_plan(tmp_path / "plan").apply(dense)
    assert torch.equal(dense(x), model(x))


def test_pruning_again_keeps_what_was_removed():
    model, first = pruned(steps=60)
    second = prune(model, "dynst", 1 - 1 / 16, batches(), F.cross_entropy, steps=60)
    assert int(second.masks["#input"].sum()) == 1 and not (second.masks["#input"] & ~first.masks["#input"]).any()
    assert sum(isinstance(h, LocationMask) for h in model._forward_pre_hooks.values()) == 1


def test_the_gradient_of_a_gate_sums_input_times_gradient_over_channels():
    model, data = net(), batches()
    x, y = data[0]
    space, factors = Locations(model, data), torch.ones(16, requires_grad=True)
    with space.gate(lambda name: factors):
        F.cross_entropy(model(x), y).backward()
    free = x.clone().requires_grad_()
    F.cross_entropy(model(free), y).backward()
    assert torch.allclose(factors.grad, (x * free.grad).sum((0, 1)).flatten(), atol=1e-6)


def test_a_gate_of_none_is_the_model_itself():
    model, data = net(), batches()
    x, expected = data[0][0], model(data[0][0])
    with Locations(model, data).gate(lambda name: None):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("share", [0., .4, 1.])
def test_an_exchange_keeps_the_count_and_takes_candidates_only(share):
    g = torch.Generator().manual_seed(1)
    mask, may, worth = torch.arange(20) < 10, torch.arange(20) < 15, torch.rand(20, generator=g)
    new = exchanged(mask, may, worth, share)
    assert int(new.sum()) == 10 and not (new & ~may).any()
    swapped = int((mask & ~new).sum())
    assert swapped == min(int(share * 10), 5)
    if 0 < swapped < 5:
        assert worth[mask & ~new].max() <= worth[mask & new].min()
        assert worth[~mask & new].min() >= worth[may & ~mask & ~new].max()


def test_the_density_follows_the_schedule_and_the_ramp_ends_exactly():
    model, data, seen = net(), batches(), []
    rule = location_rule(.1, .5, 5, .3)(None, 3 / 16)

    def update(training):
        rule.update(training)
        seen.append(int(training.state["#input"]["mask"].sum()))
    with apply_rule(replace(rule, update=update), Locations(model, data), 3 / 16, 40):
        torch.manual_seed(0)
        finetune(40, 1e-3)(model, iter(data * 20), F.cross_entropy)
    assert seen[0] == 16 and sorted(seen, reverse=True) == seen and seen[20:] == [3] * 20


def test_one_mask_for_inputs_by_name_and_for_sensors_in_a_row():
    keep = torch.tensor([True, False, True, False])
    x = torch.ones(2, 5, 4)
    (a,), _ = change_grid((x,), {}, 4, lambda t, grid: t * keep.view(grid))
    assert a.sum() == 20
    _, named = change_grid((torch.ones(2, 5, dtype=torch.long),), {"pixels": x}, 4, lambda t, grid: t * 0)
    assert named["pixels"].sum() == 0


def test_refusals_in_one_sentence():
    model, data = net(), batches()
    ids = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(12, 4))
    tokens = [(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long))]
    cases = [(lambda: prune(model, "random", .5, space="locations"), "data="),
             (lambda: prune(ids, "random", .5, tokens, space="locations"), "no locations"),
             (lambda: prune(model, "magnitude", .5, data, space="locations"), "reads weights")]
    for call, word in cases:
        with pytest.raises(BadInput, match=word) as refused:
            call()
        assert "\n" not in str(refused.value)
    assert location_mask(model) is None and location_mask(ids) is None
    prune(model, "random", .5, data, space="locations")
    with pytest.raises(BadInput, match="locations"):
        model(torch.ones(2, 3, 5, 5))
