"Numbers in attributes and in calls of reshape are found by running, for any name they have."
import copy
import pickle

import pytest
import torch
from torch import nn

from pruning_bench import load_plan, prune
from pruning_bench.graph.code_sizes import resize_code
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.repairs import kind_of, transfer_changes, without_numbers
from pruning_bench.graph.saving import load_pruned


class Base(nn.Module):
    "Attention under names that no table holds."
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.pieces, self.whole, self.per = heads, width, width // heads
        self.parts = [width, width, width]
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    def mix(self, q, k, v): return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)

class Stream(Base):
    "The width of the input is taken for that of all heads."
    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.joint(x).reshape(B, N, 3, self.pieces, C // self.pieces).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mix(q, k, v).reshape(B, N, C))

class Attribute(Base):
    "An attribute holds the width."
    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.joint(x).reshape(B, N, 3, self.pieces, -1).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mix(q, k, v).reshape(B, -1, self.whole))

class Listed(Base):
    "A list holds the sizes of the three parts."
    def forward(self, x):
        B, N, C = x.shape
        parts = self.joint(x).split(self.parts, -1)
        q, k, v = (t.view(B, N, self.pieces, self.per).transpose(1, 2) for t in parts)
        return x + self.out(self.mix(q, k, v).reshape((B, N, C)))

class Quotient(Base):
    "One size is open already, and another one is computed from the number of heads."
    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.joint(x).reshape(B, -1, 3, self.pieces, C // self.pieces).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mix(q, k, v).reshape(B, N, C))

KINDS = [Stream, Attribute, Listed, Quotient]

def net(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), kind(), nn.Sequential(kind(), nn.GELU()), nn.Linear(32, 3)).eval()

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_found_and_removed_heads_equal_masked_ones(kind):
    model = net(kind)
    space = Channels(model, [X])
    heads = {n: g for n, g in space.groups.items() if g.heads}
    assert [len(g) for g in heads.values()] == [4, 4] and all(g.exact for g in heads.values())
    kept = torch.tensor([[True, False, True, False], [False, True, True, True]])
    space.apply({n: (None, kept[[*heads].index(n)] if n in heads else torch.ones(len(g), dtype=torch.bool))
                 for n, g in space.groups.items()})
    masked = model(X)
    space.remove()
    assert model[1].joint.out_features == 48 and model[2][0].out.in_features == 24
    assert torch.allclose(model(X), masked, atol=1e-5)
    assert isinstance(model[1], kind)

@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_heads_together(kind):
    model = net(kind)
    plan = prune(model, "l1-filter", .5, data=[X], residual=True)
    assert model[0].out_features == 16 and model[1].out.weight.shape == (16, 16)
    model(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    fresh = net(kind)
    plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))

@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(kind, tmp_path):
    model = net(kind)
    plan = prune(model, "l1-filter", .5, data=[X])
    plan.save(tmp_path / "pruned")
    assert torch.equal(load_pruned(tmp_path / "pruned", net(kind))(X), model(X))
    fresh = net(kind)
    load_plan(tmp_path / "pruned").apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(copied(X), model(X))

def test_a_second_cut_keeps_what_the_first_one_changed():
    model = net(Stream)
    for left in (2, 1):
        prune(model, "l1-filter", .5, data=[X])
        assert model[1].joint.out_features == 3 * 8 * left and model(X).shape == (2, 5, 3)

def test_a_model_that_runs_keeps_its_classes():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    prune(model, "l1-filter", .5, data=[X])
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]

def test_one_change_serves_all_blocks():
    groups = [g for g in Channels(net(Stream), [X]).groups.values() if g.heads]
    assert kind_of(groups[0]) != kind_of(groups[1])   # one lies deeper
    first = Channels(nn.Sequential(*(Stream() for _ in range(3))).eval(), [torch.randn(2, 5, 32)])
    a, _, c = (g for g in first.groups.values() if g.heads)
    bare = copy.copy(c)
    bare.numeric_width = {}
    assert transfer_changes(a, bare).numeric_width.keys() == c.numeric_width.keys() != a.numeric_width.keys()

def test_numbers_of_blocks_are_not_part_of_a_kind():
    assert without_numbers("blocks.10.attn.conv1.weight") == "blocks.*.attn.conv1.weight"

def test_zero_argument_super_survives():
    class Child(Stream):
        def forward(self, x): return super().forward(x).view(2, 5, 32)
    model, x = Child().eval(), torch.randn(2, 5, 32)
    answer = model(x)
    resize_code(model, ["forward/0/2/-1"])
    assert torch.equal(model(x), answer)
