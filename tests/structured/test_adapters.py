"Structured pruning adapters: exact identities, golden numbers, invariants, refusals."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.recovery import finetune
from pruning_bench.core.stats import PROVIDERS
from pruning_bench.structured.adapters import attach_adapters, can_adapt, extend_groups, merge_adapters
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.surgery import cut, kept_slices


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = ((nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8),
                                      nn.Conv2d(8, 6, 5, padding=2)))
        self.c, self.d = nn.Linear(96, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.norm(self.a(x))))).flatten(1))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double().eval()


def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(16, 1, 8, 8, generator=g).double(), torch.randint(0, 4, (16,), generator=g)) for _ in range(4)]


def nonzero_adapters(model, rank=3):
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
    assert trained == {n for n, p in model.named_parameters() if p.dim() < 2 or ".up." in n or ".down." in n}
    assert "a.up.weight" in trained


def test_fusing_is_exact_and_gives_the_vanilla_class_back():
    model, x = net(), data()[0][0]
    was = nonzero_adapters(model)
    moved = model(x)
    merge_adapters(model, was)
    assert torch.allclose(model(x), moved, atol=1e-10) and not torch.allclose(net()(x), moved, atol=1e-2)
    assert model.state_dict().keys() == net().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_copy_has_its_own_adapters():
    model, x = net(), data()[0][0]
    nonzero_adapters(model)
    twin = copy.deepcopy(model)
    moved = model(x)
    merge_adapters(twin)
    assert torch.allclose(twin(x), moved, atol=1e-10)
    assert torch.equal(model(x), moved)
    assert hasattr(model.a, "up")
    assert not hasattr(twin.a, "up")


@pytest.mark.parametrize("seed", range(4))
def test_cut_then_fuse_is_fuse_then_cut(seed):
    first, second, space = net(), net(), Channels(net(), data())
    nonzero_adapters(first), nonzero_adapters(second)
    kept = {n: torch.rand(len(g), generator=torch.Generator().manual_seed(seed)) > .4 for n, g in space.groups.items()}
    assert len(kept) == 3
    cut(merge_adapters(first), kept_slices(first, space.groups, kept))
    space.model = second
    extend_groups(space)
    cut(second, kept_slices(second, space.groups, kept))
    apart = second(data()[0][0])
    merge_adapters(second)
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(first.state_dict().values(),
                                                                second.state_dict().values()))
    assert torch.allclose(apart, first(data()[0][0]), atol=1e-10)


def test_the_score_is_that_of_the_fused_filter():
    model, vanilla = net(), net()
    space = Channels(model, data())
    nonzero_adapters(model), nonzero_adapters(vanilla)
    merge_adapters(vanilla)
    want = {n: p.detach().abs().flatten(1).sum(1) for n, p in vanilla.named_parameters() if n in space.groups}
    assert all(torch.allclose(PROVIDERS["merged_l1_norm"](space)[n], s) for n, s in want.items()) and len(want) == 3
    assert not torch.allclose(PROVIDERS["merged_l1_norm"](space)["a.weight"],
                              net().a.weight.detach().abs().flatten(1).sum(1))


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
    assert all(2 * int(m.sum()) == len(m) for m in plan.masks.values())
    assert not any("up" in n or "down" in n for n in plan.slices)
    dense = net()
    plan.apply(dense)
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(data()[0][0]), model(data()[0][0])) and all(p.requires_grad for p in model.parameters())
    assert not masks_of(model)


def test_what_takes_no_adapter():
    assert ([can_adapt(m) for m in (nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2),
                                    nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=2, dilation=2),
                                    nn.Linear(2, 2))] == [False] * 4 + [True] * 2)
    for model, rank in ((nn.Sequential(nn.Conv2d(4, 4, 3)), 2), (net(), 0)):
        with pytest.raises(BadInput):
            attach_adapters(model, rank)
        assert not any(hasattr(m, "up") for m in model.modules())
