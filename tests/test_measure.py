"Measurement against numbers derived by hand."
import copy, math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench.bench.measure import (accuracy, clock, densities, frechet, interval, kid, logits_of, macs, nonzero_macs, nonzeros, parameters,
                                         pareto, ssim, token_nll)
from pruning_bench.core.inputs import BadInput
from pruning_bench.core.mask import hold


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)
    def forward(self, x): return self.inner(x, x, x, need_weights=False)[0]

class Fused(nn.Module):
    def forward(self, x): return F.scaled_dot_product_attention(x, x, x)

CASES = {
    "linear": (nn.Linear(5, 7), torch.randn(3, 5), 35),
    "conv": (nn.Conv2d(3, 8, 3, 2, 1), torch.randn(2, 3, 8, 8), 3 * 8 * 9 * 16),
    "depthwise": (nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.randn(2, 16, 8, 8), 16 * 9 * 64),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, 2), torch.randn(2, 4, 5, 5), 4 * 6 * 4 * 25),
    "conv1d": (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 10), 4 * 6 * 3 * 8),
    "attention": (Attention(), torch.randn(2, 5, 16), 4 * 5 * 16 * 16 + 2 * 25 * 16),
    "fused attention": (Fused(), torch.randn(2, 1, 6, 8), 2 * 36 * 8),
    "encoder layer": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16), 4 * 5 * 256 + 2 * 25 * 16 + 2 * 5 * 16 * 32),
}

@pytest.mark.parametrize("name", CASES)
def test_macs(name):
    model, x, by_hand = CASES[name]
    assert macs(model, x) == by_hand

def test_macs_of_resnet20():
    widths = [(3, 16, 1)] + [(16, 16, 1)] * 6 + [(16, 32, 2)] + [(32, 32, 1)] * 5 + [(32, 64, 2)] + [(64, 64, 1)] * 5
    chain = nn.Sequential(*[nn.Conv2d(i, o, 3, s, 1, bias=False) for i, o, s in widths], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    assert macs(chain, torch.randn(2, 3, 32, 32)) == 40_551_040

@pytest.mark.parametrize("name", ["linear", "conv", "depthwise", "transposed", "conv1d"])
def test_nonzero_macs_are_zero_without_weights_and_all_with_them(name):
    model, x, by_hand = CASES[name]
    assert nonzero_macs(model, x) == by_hand
    empty = copy.deepcopy(model)
    empty.weight.data.zero_()
    assert nonzero_macs(empty, x) == 0

def test_macs_leave_mode_and_hooks_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = copy.deepcopy(net.state_dict())
    nonzero_macs(net, torch.randn(3, 4))
    assert net.training and not net[0]._forward_hooks and all(torch.equal(before[k], v) for k, v in net.state_dict().items())

def test_three_densities():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    masked = copy.deepcopy(net)
    hold(masked[0], "weight", torch.arange(24).view(6, 4) >= 12)
    masked[0].weight.data[5, :3] = 0
    assert densities(masked, net) == {"mask": 18 / 30, "nonzero": 15 / 30, "structure": 1.}
    assert densities(masked, net, "whole") == {"mask": 25 / 37, "nonzero": 22 / 37, "structure": 1.}
    assert densities(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)), net)["structure"] == .5
    with pytest.raises(BadInput, match="unknown scope"): parameters(net, "prunables")

def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    assert parameters(net) == 16 + 10 and nonzeros(net) == 26

def test_quality():
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == .75
    assert torch.equal(logits_of(nn.Identity(), torch.arange(10.).view(5, 2), size=2), torch.arange(10.).view(5, 2))
    class Even(nn.Module):
        def forward(self, input_ids): return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 11)})
    assert math.exp(token_nll(Even(), torch.randint(11, (5, 8)), size=2)) == pytest.approx(11)

def test_distances():
    assert kid(torch.ones(2, 1), torch.zeros(2, 1)) == pytest.approx(7)
    assert frechet(torch.tensor([[0.], [2.]]), torch.tensor([[1.], [5.]])) == pytest.approx(6)
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    assert frechet(x, x) == pytest.approx(0, abs=1e-6) and frechet(x, x + 2) == pytest.approx(24, abs=1e-4)
    assert kid(x, x + 2) > 1 > abs(kid(x[:150], x[150:]))

def test_kid_is_unbiased():
    x = torch.randn(40, 20, 3, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([kid(a[:10], a[10:]) for a in x])
    assert values.mean().abs() < 3 * values.std() / 40**.5

def test_ssim():
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert ssim(x, x) == pytest.approx(1, abs=1e-5) and ssim(x, 1 - x) < 0 and ssim(x, x.flip(3)) < .9
    assert ssim(torch.full((1, 1, 8, 8), .5), torch.full((1, 1, 8, 8), .25)) == pytest.approx(.2501 / .3126, abs=1e-5)

def test_interval():
    r = interval([1, 2, 3])
    assert (r["mean"], r["sd"], r["n"]) == (2, 1, 3) and r["high"] - 2 == pytest.approx(4.302653 / 3**.5) == pytest.approx(2 - r["low"])
    one = interval([5.])
    assert one["mean"] == 5 and math.isnan(one["sd"]) and math.isnan(one["low"])

def test_pareto():
    points = [(1, .7), (2, .9), (2, .8), (3, .85), (4, .95), (4, .95)]
    assert pareto(points) == [0, 1, 4, 5] and pareto([(1, 30), (2, 20), (3, 25)], higher=False) == [0, 1] and pareto([]) == []

def test_clock():
    with clock() as taken: sum(range(1000))
    assert 0 < taken.seconds < 5
