"Units without scale are removed for good and do nothing; zeros may return until the ticket is fixed; counts are exact."
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from three_layers import TOTAL, batches, mlp
from pruning_bench import build, prune
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import remove_masks
from pruning_bench.core.recovery import finetune
from pruning_bench.core.rule import apply_rule
from pruning_bench.core.space import Weights
from pruning_bench.weight.supertickets import paired_norms, shrink_scales, silence_units, units_to_remove


class Branches(nn.Module):
    "Two parallel layers with a norm each, whose outputs are added, and a head without one."
    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Linear(12, 8), nn.BatchNorm1d(8)
        self.norm_b, self.b = nn.BatchNorm1d(8), nn.Linear(12, 8)   # declared before its layer
        self.head, self.last = nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        return self.last(self.head(F.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x)))))


def branches(seed=0):
    with seeded(seed):
        return Branches()


WEIGHTS = 2 * 12 * 8 + 8 * 4


def test_norms_are_found_by_what_they_read():
    model, found = branches(), {}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with paired_norms(model, Weights(model).layers, found):
        model(batches()[0][0])
    assert found == {"a.weight": model.norm_a, "b.weight": model.norm_b}   # the last one has no scale
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_proximal_step_of_the_penalty():
    norm = nn.BatchNorm1d(4)
    norm.weight.data = torch.tensor([1., -.5, .2, -.1])
    shrink_scales({"a": norm}, .25)
    assert torch.allclose(norm.weight, torch.tensor([.75, -.25, 0, 0]))


def test_which_units_are_removed():
    scales = {"a": torch.tensor([0., .5, 1e-4, 2.]), "b": torch.tensor([0., 1e-4])}
    sizes = {"a": torch.tensor([9, 9, 9, 9]), "b": torch.tensor([4, 4])}
    def gone(least, total=44, threshold=1e-3):
        found = units_to_remove(scales, sizes, threshold, least, total)
        return found["a"].tolist() + found["b"].tolist()
    assert gone(0) == [True, False, True, False, True, False]
    assert gone(31) == [True, False, False, False, True, False]   # the smallest first, while the budget can be met
    assert gone(36) == [False] * 6                                # 44 - 9 is too few
    assert gone(0, threshold=-1.) == [False] * 6
    assert gone(0, threshold=10.) == [True, True, True, False, True, False]   # the strongest of a layer stays
    sizes["a"][0] = 0                                             # removed before
    assert gone(0)[0] is False


@pytest.mark.parametrize("steps", [20, 23])
def test_removed_units_do_nothing_and_the_count_is_exact(steps):
    model = branches()
    plan = prune(model, "supertickets", .75, batches(), F.cross_entropy, steps=steps, total_shrinkage=1.1,
                 ramp_end=.5, lr=3e-2)
    assert sum(int(m.sum()) for m in plan.masks.values()) == WEIGHTS // 4
    norms = {"a": model.norm_a, "b": model.norm_b}
    gone = {n: (norm.weight == 0) & (norm.bias == 0) for n, norm in norms.items()}
    assert sum(int(g.sum()) for g in gone.values()) > 2
    assert not any(g.all() or plan.masks[f"{n}.weight"][g].any() for n, g in gone.items())
    noisy, x = copy.deepcopy(model).eval(), batches()[0][0]
    remove_masks(noisy)
    for n, g in gone.items():
        layer = noisy.get_submodule(n)
        layer.weight.data[g] = torch.randn(int(g.sum()), 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(noisy(x), model.eval()(x), atol=1e-6)


def followed(look, model=None, keep=.25, steps=20, **settings):
    "Train under the rule and call `look(training)` after every update."
    model = mlp() if model is None else model
    method = build("supertickets", **settings)
    rule = method.rule(method, keep)
    watched = replace(rule, update=lambda training: (rule.update(training), look(training)))
    with apply_rule(watched, Weights(model), keep, steps):
        finetune(steps, 1e-2)(model, batches(), F.cross_entropy)
    return model


def test_zeros_may_return_until_the_ticket_is_fixed():
    zeros, masks = [], []
    def look(training):
        zeros.append({n: training.w(n) == 0 for n in training.names})
        masks.append({n: training.alive(n).clone() for n in training.names})
    followed(look, rounds=5, ramp_end=.5)
    count = lambda tensors: sum(int(t.sum()) for t in tensors.values())
    # cuts after the steps 2, 4, 6, 8 and 10, with densities on a straight line from 1 to a quarter
    due = [round(TOTAL * (1 - .75 * s / 10)) for s in (2, 4, 6, 8, 10)]
    assert [TOTAL - count(zeros[s - 1]) for s in (2, 4, 6, 8, 10)] == pytest.approx(due, abs=1)
    assert all(count(m) == TOTAL for m in masks[:9])                           # open masks
    assert all(count(zeros[s]) < count(zeros[s - 1]) / 2 for s in (2, 4, 6, 8))   # the zeros have grown again
    assert all(count(m) == TOTAL // 4 for m in masks[9:])
    assert all(torch.equal(m[n], masks[9][n]) for m in masks[9:] for n in m)


def test_each_cut_is_one_global_ranking():
    method, model, cut = build("supertickets", rounds=1, ramp_end=.2), mlp(), []   # one cut, after step 4 of 20
    rule = method.rule(method, .25)
    def update(training):
        before = {n: training.w(n).clone() for n in training.names}
        rule.update(training)
        if training.step == 4:
            cut.extend((before[n].abs(), training.w(n) != 0) for n in training.names)
    with apply_rule(replace(rule, update=update), Weights(model), .25, 20):
        finetune(20, 1e-2)(model, batches(), F.cross_entropy)
    kept, lost = (torch.cat([size[m if stays else ~m] for size, m in cut]) for stays in (True, False))
    assert len(kept) == TOTAL // 4 and kept.min() >= lost.max()


def test_without_search_norms_train_on():
    model = branches()
    prune(model, "supertickets", .5, batches(), F.cross_entropy, steps=20, total_shrinkage=0., threshold=10.)
    assert (model.norm_a.weight != 0).all() and (model.norm_b.weight != 0).all()


def test_silence_survives_momentum():
    norm = nn.BatchNorm1d(3)
    silence_units({"a": norm}, {"a": torch.tensor([True, False, True])})
    assert norm.weight.tolist() == [0, 1, 0]
    silence_units({"b": nn.BatchNorm1d(3, affine=True)}, {})


def test_a_network_pruned_before_keeps_its_zeros_and_their_units():
    "Rows that were empty before are no removed units: their norms go on adding their shift."
    model = branches()
    with torch.no_grad():
        model.a.weight[:2] = 0
    prune(model, "magnitude", .2)
    model.norm_a.bias.data[:2] = 1.
    prune(model, "supertickets", .5, batches(), F.cross_entropy, steps=10, total_shrinkage=3.)
    assert (model.norm_a.bias[:2] != 0).all()
