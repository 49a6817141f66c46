"Iterative SNIP, FORCE and effective density: scores by hand, limits that are SNIP, paths counted by hand."
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import three_layers
from three_layers import TOTAL, identical, mlp
from pruning_bench import BadInput, build, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.recovery import finetune
from pruning_bench.core.score import snip
from pruning_bench.core.space import Weights
from pruning_bench.weight.foresight import (DenseStart, effective_density, foresight, foresight_grad, path_connected,
                                            reopen)

def batches(seed=0, n=4): return three_layers.batches(seed, n)


# scores

@pytest.mark.parametrize("name", ["iterative-snip", "force"])
def test_one_round_is_snip(name):
    a, b = mlp(), mlp()
    once = prune(a, name, .75, batches(), F.cross_entropy, rounds=1)
    assert once == prune(b, "snip", .75, batches(), F.cross_entropy)
    assert identical(a, b)


def test_the_gradient_is_that_of_the_pruned_network_for_all_weights():
    model, masks = mlp(), prune(mlp(), "magnitude", .5).masks
    space = Weights(model)
    space.start = DenseStart(space, {n: space.w(n).clone() for n in space.names()}, {}, masks)
    found = foresight_grad(space, batches()[:1], F.cross_entropy)
    assert identical(model, mlp())   # the weights are put back
    by_hand = mlp()
    with torch.no_grad():
        for n, m in masks.items():
            by_hand.get_parameter(n).mul_(m)
    x, y = batches()[0]
    F.cross_entropy(by_hand(x), y).backward()
    for n, m in masks.items():
        assert torch.allclose(found[n], by_hand.get_parameter(n).grad, atol=1e-7) and (found[n][~m] != 0).any()


def test_the_weights_are_put_back_when_the_gradient_fails():
    model, masks = mlp(), prune(mlp(), "magnitude", .5).masks
    space = Weights(model)
    space.start = DenseStart(space, {n: space.w(n).clone() for n in space.names()}, {}, masks)

    def broken(out, y): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        foresight_grad(space, batches(), broken)
    assert identical(model, mlp())


def test_two_rounds_of_force_by_hand():
    model, data = mlp(), batches()[:1]
    plan = prune(model, "force", .75, data, F.cross_entropy, rounds=2)

    def chosen(masks, k):
        net = mlp()
        with torch.no_grad():
            for n, m in masks.items():
                net.get_parameter(n).mul_(m)
        F.cross_entropy(net(data[0][0]), data[0][1]).backward()
        dense = dict(mlp().named_parameters())
        scores = {n: (dense[n] * net.get_parameter(n).grad).abs().detach() for n in masks}
        edge = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[k - 1]
        return {n: s >= edge for n, s in scores.items()}
    ones = {n: torch.ones_like(m) for n, m in plan.masks.items()}
    twice = chosen(chosen(ones, TOTAL // 2), TOTAL // 4)
    assert all(torch.equal(m, twice[n]) for n, m in plan.masks.items())
    assert all(torch.equal(model.get_parameter(n), mlp().get_parameter(n) * m) for n, m in twice.items())


def rounds_of(name, model, **settings):
    history = []

    def record(model, start, train, n, left):
        history.append(torch.cat([m.flatten() for m in masks_of(model).values()]))
        if name == "force":
            reopen(model, start, train, n, left)
    method = replace(build(name, rounds=8), between=record, **settings)
    prune(model, method, .9, batches(), F.cross_entropy)
    return history


def test_cuts_are_taken_back_by_one_and_not_by_the_other():
    for name, some in (("iterative-snip", False), ("force", True)):
        history = rounds_of(name, mlp())
        assert len(history) == 8 and any((b & ~a).any() for a, b in zip(history, history[1:])) == some
        assert [int(h.sum()) for h in history] == [round(.1**(k / 8) * TOTAL) for k in range(1, 9)]


def test_what_was_pruned_before_never_returns():
    model = mlp()
    first = prune(model, "random", .5)
    old = torch.cat([m.flatten() for m in first.masks.values()])
    assert all((h <= old).all() for h in rounds_of("force", model))


def test_the_training_comes_last_and_keeps_the_mask():
    model, still = mlp(), mlp()
    plan = prune(model, "force", .75, batches(), F.cross_entropy, rounds=3, recover=finetune(5, 1e-2))
    assert plan == prune(still, "force", .75, batches(), F.cross_entropy, rounds=3) and not identical(model, still)
    assert plan.cost["backward"] == 5 + 3 * 4   # one gradient per batch and round


def test_other_units_are_refused():
    model = mlp()
    with pytest.raises(BadInput, match="channels"):
        prune(model, "force", .5, batches(), F.cross_entropy, space="channels")
    assert identical(model, mlp()) and snip.needs != foresight.needs


# paths

def masked(model, **masks):
    space = Weights(model)
    space.apply({n: (space.w(n), masks.get(n.replace(".", "_"), torch.ones_like(space.w(n))).bool())
                 for n in space.names()})
    return model


def test_paths_by_hand():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    first, second = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]]), torch.tensor([[0, 1, 0], [1, 0, 0], [1, 1, 0]])
    found = path_connected(masked(net, **{"0_weight": first, "3_weight": second}), torch.randn(5, 3))
    assert found["0.weight"].int().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert found["3.weight"].int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert effective_density(net, torch.randn(5, 3)) == pytest.approx(4 / 18)


@pytest.mark.parametrize("seed", range(4))
def test_paths_are_those_of_the_graph(seed):
    model = mlp()
    prune(model, "random", .93, seed=seed)
    found, masks = path_connected(model, batches()[0]), masks_of(model)
    a, b, c = (masks[f"{i}.weight"] for i in (0, 2, 4))
    fed = [torch.ones(12).bool()]
    for m in (a, b, c):
        fed.append((m & fed[-1]).any(1))
    leads = [torch.ones(4).bool()]
    for m in (c, b, a):
        leads.append((m & leads[-1][:, None]).any(0))
    for i, (m, n) in enumerate(zip((a, b, c), ("0.weight", "2.weight", "4.weight"))):
        assert torch.equal(found[n], m & fed[i] & leads[2 - i][:, None])


def test_weights_off_all_paths_can_go():
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    prune(model, "random", .9, seed=1)
    x = batches()[0][0]
    before, space = model(x), Weights(model)
    space.apply({n: (space.w(n), m) for n, m in path_connected(model, x).items()})
    assert torch.allclose(model(x), before, atol=1e-6)


def test_convolutions_pools_and_branches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
            self.pool, self.head = nn.MaxPool2d(2), nn.Linear(2, 3)

        def forward(self, x):
            h = F.relu(self.norm(self.a(x)))
            return self.head(self.pool(h + self.b(h)).mean((2, 3)))
    net = Net()
    net.norm.running_mean += 3   # a trained norm would hide the paths of an input of ones
    gone = torch.ones(2, 2, 3, 3)
    gone[1] = 0                  # nothing but the skip connection leads to the second channel
    found = path_connected(masked(net, b_weight=gone), torch.randn(2, 1, 8, 8))
    assert found["a.weight"].all() and found["head.weight"].all() and torch.equal(found["b.weight"], gone.bool())
    closed = torch.ones(3, 2)
    closed[:, 1] = 0
    found = path_connected(masked(net, b_weight=torch.zeros(2, 2, 3, 3), head_weight=closed), torch.randn(2, 1, 8, 8))
    assert found["a.weight"][0].all() and not found["a.weight"][1].any()


def test_a_maximum_has_paths_from_all_that_it_compares():
    net = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 2))
    assert effective_density(masked(net), torch.randn(5, 3)) == 1.


def test_a_dense_network_has_all_paths_and_is_left_alone():
    model = mlp().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert effective_density(model, batches()[0]) == 1.
    assert model.training and not masks_of(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(BadInput, match="token ids"):
        path_connected(mlp(), torch.zeros(2, 12, dtype=torch.long))
    with pytest.raises(BadInput, match="cannot be counted"):
        path_connected(nn.Sequential(nn.Linear(12, 4), nn.Threshold(2., 0.)), batches()[0])


def test_a_network_without_any_path():
    model = masked(mlp(), **{"2_weight": torch.zeros(8, 16)})
    assert effective_density(model, batches()[0]) == 0. and not path_connected(model, batches()[0])["0.weight"].any()
