"Adapters that are cut along, and a mask that clients agree on: exact identities, golden numbers, invariants, refusals."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.recovery import finetune
from pruning_bench.core.space import Weights
from pruning_bench.core.stats import PROVIDERS
from pruning_bench.structured.adapters import attach_adapters, federated_average, candidate_masks, dirichlet_split, select_candidate, extend_groups, exchange_weights, fedtiny, can_adapt, merge_adapters, exchange_count, average_bn_stats, growth_gradients
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.surgery import cut, kept_slices


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 5, padding=2)
        self.c, self.d = nn.Linear(96, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.norm(self.a(x))))).flatten(1))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double().eval()


def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(16, 1, 8, 8, generator=g).double(), torch.randint(0, 4, (16,), generator=g)) for _ in range(4)]


def loud(model, rank=3):
    torch.manual_seed(1)
    was = attach_adapters(model, rank)
    for m in model.modules():
        if hasattr(m, "up"):
            nn.init.normal_(m.up.weight)
    return was


# adapters

def test_at_first_nothing_changes_and_only_the_small_trains():
    model, x = net(), data()[0][0]
    before = model(x)
    attach_adapters(model, 2)
    assert (model(x) - before).abs().max() < 1e-3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.dim() < 2 or ".up." in n or ".down." in n} and "a.up.weight" in trained


def test_fusing_is_exact_and_gives_the_vanilla_class_back():
    model, x = net(), data()[0][0]
    was = loud(model)
    moved = model(x)
    merge_adapters(model, was)
    assert torch.allclose(model(x), moved, atol=1e-10) and not torch.allclose(net()(x), moved, atol=1e-2)
    assert model.state_dict().keys() == net().state_dict().keys() and all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_a_copy_has_its_own_adapters():
    model, x = net(), data()[0][0]
    loud(model)
    twin = copy.deepcopy(model)
    moved = model(x)
    merge_adapters(twin)
    assert torch.allclose(twin(x), moved, atol=1e-10) and torch.equal(model(x), moved) and hasattr(model.a, "up") and not hasattr(twin.a, "up")


@pytest.mark.parametrize("seed", range(4))
def test_cut_then_fuse_is_fuse_then_cut(seed):
    first, second, space = net(), net(), Channels(net(), data())
    loud(first), loud(second)
    kept = {n: torch.rand(len(g), generator=torch.Generator().manual_seed(seed)) > .4 for n, g in space.groups.items()}
    assert len(kept) == 3
    cut(merge_adapters(first), kept_slices(first, space.groups, kept))
    space.model = second
    extend_groups(space)
    cut(second, kept_slices(second, space.groups, kept))
    apart = second(data()[0][0])
    merge_adapters(second)
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert torch.allclose(apart, first(data()[0][0]), atol=1e-10)


def test_the_score_is_that_of_the_fused_filter():
    model, vanilla = net(), net()
    space = Channels(model, data())
    loud(model), loud(vanilla)
    merge_adapters(vanilla)
    want = {n: p.detach().abs().flatten(1).sum(1) for n, p in vanilla.named_parameters() if n in space.groups}
    assert all(torch.allclose(PROVIDERS["merged_l1_norm"](space)[n], s) for n, s in want.items()) and len(want) == 3
    assert not torch.allclose(PROVIDERS["merged_l1_norm"](space)["a.weight"], net().a.weight.detach().abs().flatten(1).sum(1))


def test_the_weights_move_only_along_the_low_rank():
    model, dense = net(), net()
    prune(model, "splora", 0., data=data(), loss=F.cross_entropy, rank=2, rounds=2, recover=finetune(20, 1e-2))
    for n in ("c.weight", "d.weight"):
        change = dict(model.named_parameters())[n].detach() - dict(dense.named_parameters())[n].detach()
        assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-6) <= 2
    change = (model.b.weight - dense.b.weight).detach()
    assert change[:, :, 2, 2].any()
    change[:, :, 2, 2] = 0
    assert not change.any()


def test_pruned_is_vanilla_and_its_plan_fits_the_dense_network():
    model = net()
    plan = prune(model, "splora", .5, data=data(), loss=F.cross_entropy, rank=2, rounds=2, steps=6)
    assert all(2 * int(m.sum()) == len(m) for m in plan.masks.values()) and not any("up" in n or "down" in n for n in plan.slices)
    dense = net()
    plan.apply(dense)
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(data()[0][0]), model(data()[0][0])) and all(p.requires_grad for p in model.parameters())
    assert not masks_of(model)


def test_what_takes_no_adapter():
    assert [can_adapt(m) for m in (nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Linear(2, 2))] == [False] * 4 + [True] * 2
    for model, rank in ((nn.Sequential(nn.Conv2d(4, 4, 3)), 2), (net(), 0)):
        with pytest.raises(BadInput):
            attach_adapters(model, rank)
        assert not any(hasattr(m, "up") for m in model.modules())


# clients

def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))


def homes():
    return [[(x.float(), y)] for x, y in data()]


@pytest.mark.parametrize("concentration", [.01, .5, 100.])
def test_examples_are_divided_and_nobody_is_left_out(concentration):
    labels = torch.arange(200) % 10
    parts = dirichlet_split(labels, 7, concentration, seed=3)
    assert torch.cat(parts).sort().values.tolist() == list(range(200)) and all(len(p) for p in parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, dirichlet_split(labels, 7, concentration, seed=3)))
    if concentration == 100.: assert max(map(len, parts)) < 2 * min(map(len, parts))


def test_candidates_have_one_size_and_differ():
    masks = candidate_masks(small(), .2, 4)
    sizes = {sum(int(m.sum()) for m in c.values()) for c in masks}
    assert sizes == {round(.2 * sum(m.numel() for m in masks[0].values()))}
    assert len({tuple(int(m.sum()) for m in c.values()) for c in masks}) > 1
    w = Weights(small()).w("4.weight").abs()
    assert w[masks[1]["4.weight"] if "4.weight" in masks[1] else 0].min() >= w[~masks[1]["4.weight"]].max()


def test_averages_by_hand():
    states = [{"w": torch.tensor([1., 2.]), "n": torch.tensor(5)}, {"w": torch.tensor([4., 8.]), "n": torch.tensor(9)}]
    got = federated_average(states, [1, 2])
    assert got["w"].tolist() == [3., 6.] and got["n"].item() == 5


def test_statistics_of_norms_are_those_of_all_examples():
    model = small()
    average_bn_stats(model, [[(x.float(), y)] for x, y in data()])
    x = model[0](torch.cat([x.float() for x, _ in data()]))
    assert torch.allclose(model[1].running_mean, x.mean((0, 2, 3)), atol=1e-5)


def test_the_least_loss_is_elected():
    model = small()
    masks = candidate_masks(model, .2, 4)
    best, losses = select_candidate(model, masks, homes(), F.cross_entropy)
    assert best is masks[losses.index(min(losses))] and len(losses) == 4 and not masks_of(model)


def test_quota_by_hand():
    assert exchange_count(0, 100, 200, .3) == 60 and exchange_count(50, 100, 200, .3) == 30 and exchange_count(100, 100, 200) == 0 and exchange_count(130, 100, 200) == 0


def test_exchange_by_hand_and_conserved():
    w, mask = torch.tensor([[.5, -.1, .9, 0., 0.]]), torch.tensor([[True, True, True, False, False]])
    assert exchange_weights(w, mask, torch.tensor([[9., 9, 9, .2, -.7]]), 1).tolist() == [[True, False, True, False, True]]
    g = torch.Generator().manual_seed(0)
    w, mask, wish = torch.randn(9, 9, generator=g), torch.rand(9, 9, generator=g) > .6, torch.randn(9, 9, generator=g)
    for k in (0, 3, 20, 500):
        new = exchange_weights(w * mask, mask, wish * ~mask, k)
        assert new.sum() == mask.sum() and (new & ~mask).sum() == min(k, int(mask.sum()), int((~mask).sum()))


def test_a_client_sends_the_largest_gradients_of_dead_weights():
    model = small().eval()
    space = Weights(model)
    mask = torch.rand(4, 216, generator=torch.Generator().manual_seed(0)) > .5
    space.apply({"4.weight": (space.w("4.weight") * mask, mask)})
    x, y = homes()[0][0]
    sent = growth_gradients(model, "4.weight", (x, y), F.cross_entropy, 7)
    w = model[4].weight.detach().clone().requires_grad_()
    dense = torch.autograd.grad(F.cross_entropy(model[3](model[2](model[1](model[0](x)))) @ w.T + model[4].bias, y), w)[0]
    want = dense.abs().masked_fill(mask, 0).flatten().topk(7).indices.sort().values
    assert torch.equal(sent.flatten().nonzero().flatten(), want) and torch.allclose(sent.flatten()[want], dense.flatten()[want], atol=1e-6)


def test_a_federation_keeps_its_number_of_weights_and_learns():
    model = small()
    log = fedtiny(model, homes(), F.cross_entropy, keep=.3, rounds=8, local_steps=3, exchange_every=2, lr=.1)
    total = round(.3 * (54 + 864))
    assert {n for n, _ in log} == {total} and sum(int(m.sum()) for m in masks_of(model).values()) == total and sum(k for _, k in log) > 0
    assert all((p[~masks_of(model)[n]] == 0).all() for n, p in model.named_parameters() if n in masks_of(model))
    one, two = small(), small()
    fedtiny(one, homes(), F.cross_entropy, keep=.3, rounds=3), fedtiny(two, homes(), F.cross_entropy, keep=.3, rounds=3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("more, moved", [(dict(exchange_every=0), 0), (dict(num_candidates=1), None)])
def test_parts_of_the_federation_can_be_left_out(more, moved):
    log = fedtiny(copy.deepcopy(small()), homes(), F.cross_entropy, keep=.3, rounds=4, local_steps=1, **more)
    assert moved is None or sum(k for _, k in log) == moved
