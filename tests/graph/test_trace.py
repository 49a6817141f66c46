"Outputs are found in every kind of container, and a model whose outputs hold no tensor is refused."
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.graph.trace import tensors_in


@dataclass
class Data:
    features: torch.Tensor
    logits: torch.Tensor

@dataclass
class Nested:
    data: Data
    note: str = "text"

class Slots:
    "What no code can look into."
    __slots__ = "features", "logits"
    def __init__(self, features, logits): self.features, self.logits = features, logits

KINDS = {"tuple": lambda f, o: (f, o), "dict": lambda f, o: {"features": f, "logits": o}, "data class": Data,
         "named tuple": namedtuple("Named", "features logits"), "nested": lambda f, o: Nested(Data(f, o)),
         "in a list": lambda f, o: [Data(f, o)], "namespace": lambda f, o: SimpleNamespace(features=f, logits=o)}

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b, self.o = kind, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1)
    def forward(self, x):
        f = self.b(self.a(x).relu()).relu()
        return self.kind(f, self.o(f * f.shape[1] ** -.5))

@pytest.mark.parametrize("name", KINDS)
def test_a_returned_feature_map_keeps_its_width(name):
    model, x = Net(KINDS[name]).eval(), torch.randn(2, 3, 8, 8)
    plan = prune(model, "l1-filter", .5, data=x)
    assert list(plan.masks) == ["a.weight"]
    assert [tuple(t.shape[:2]) for t in tensors_in(model(x))] == [(2, 16), (2, 4)]

def test_outputs_without_a_tensor_are_refused_before_work():
    model = Net(Slots)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(BadInput, match="no tensor was found"):
        prune(model, "l1-filter", .5, data=torch.randn(2, 3, 8, 8))
    assert all(map(torch.equal, before, model.parameters()))
