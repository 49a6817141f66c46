"A dry run tells the faults of a model's code from those of ours, and an assertion without a message is a reason."
import pytest
import torch
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.graph import surgery
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.trace import OPERATION_RULES, operation_rule


class Asserts(nn.Module):
    "Insists on a width without a word; the width itself is in a closure, out of reach."
    def __init__(self, width):
        super().__init__()
        self.conv, self.fits = nn.Conv2d(width, width, 3, padding=1), lambda x: x.shape[1] == width
    def forward(self, x):
        assert self.fits(x)
        return self.conv(x).relu()

def test_a_bare_assertion_is_a_reason():
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), Asserts(16), nn.Conv2d(16, 4, 1)), torch.randn(2, 3, 8, 8)
    assert list(prune(model, "l1-filter", .5, data=x).masks) == ["1.conv.weight"]
    space = Channels(nn.Sequential(nn.Conv2d(3, 16, 3), Asserts(16), nn.Conv2d(16, 4, 1)), [x])
    assert "AssertionError" in space.coupling.frozen["0.weight"][1]

def chain(): return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

def test_an_error_of_a_removal_is_not_blamed_on_the_model(monkeypatch):
    def broken(model, modules): raise ZeroDivisionError("ours")
    monkeypatch.setattr(surgery, "AROUND_CUT", [broken])
    with pytest.raises(ZeroDivisionError, match="ours"): Channels(chain(), [torch.randn(2, 3, 4, 4)])

def test_an_error_of_a_rule_is_not_blamed_on_the_model():
    known = OPERATION_RULES["convolution"]
    @operation_rule("convolution", replaces=True)
    def broken(g, outs, a): raise ZeroDivisionError("ours")
    try:
        with pytest.raises(ZeroDivisionError, match="ours"): Channels(chain(), [torch.randn(2, 3, 4, 4)])
    finally: operation_rule("convolution", replaces=True)(known)

def test_a_batch_that_does_not_fit_is_said():
    with pytest.raises(BadInput, match="does not run on the first batch"): Channels(chain(), [torch.randn(2, 5, 4, 4)])

class MixedHeads(nn.Module):
    "Attention whose scores pass a convolution over the heads: queries and values share only a number of the code."
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.mix = heads, nn.Conv2d(heads, heads, 1)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).reshape(len(x), -1, self.heads, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = self.mix(q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))

def test_groups_that_share_a_number_of_the_code_are_pruned_together():
    torch.manual_seed(0)
    blocks = [MixedHeads() for _ in range(3)]
    model, x = nn.Sequential(nn.Linear(6, 16), *blocks, nn.Linear(16, 3)).eval(), torch.randn(2, 5, 6)
    heads = [g for g in Channels(model, [x]).groups.values() if g.heads]
    assert [len(g) for g in heads] == [4, 4, 4]
    for i, g in enumerate(heads, 1):
        assert {f"{i}.{n}.weight" for n in ("q", "k", "v", "mix", "proj")} == {p for p, _ in g.members if "weight" in p}
    prune(model, "l1-filter", .5, data=[x])   # compared with the masked model
    assert model[1].heads == 2 and len(model[1].v.weight) == len(model[1].q.weight) == 8
    model(x).sum().backward()
