"Half precision: every method that reads a network decides nearly as in float32, and sums over many batches grow."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from worlds import NAMES, WORLDS, build, settings_of

from pruning_bench import prune
from pruning_bench.core.space import SPACES, Weights
from pruning_bench.core.stats import collect


def reads_only(name):
    record = build(name, **settings_of(name))
    return not record.rule and not record.recover.steps and record.space != "examples"

def removed_by_both(a, b):
    "Units that both plans remove, divided by those that one of them removes."
    pairs = [(~a.masks[n], ~b.masks[n]) for n in a.masks]
    return sum((x & y).sum().item() for x, y in pairs) / sum((x | y).sum().item() for x, y in pairs)

def in_dtype(batch, dtype):
    return (batch[0].to(dtype), batch[1]) if isinstance(batch, tuple) else batch

ROUNDS = {"rounds": 1}   # later rounds score the networks that earlier ones left, which differ in a few weights

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in NAMES if reads_only(n)])
def test_half_precision_decides_as_float32(name, dtype):
    make, data, loss = WORLDS[build(name).space]
    torch.manual_seed(0)
    half = make().to(dtype).eval()
    whole = copy.deepcopy(half).float()
    batches = [in_dtype(b, dtype) for b in data(torch.float32)]
    settings = settings_of(name) | ({k: v for k, v in ROUNDS.items() if name in ("iterative-snip", "force")})
    plans = [prune(m, name, .5, [in_dtype(b, t) for b in batches], loss, **settings)
             for m, t in ((half, dtype), (whole, torch.float32))]
    assert removed_by_both(*plans) > .85   # two random choices of one half share a third

def tiny(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need", ["grad", "init_grad", "act_norm", "gram", "fisher_diag", "output_square_grad"])
def test_sums_over_many_batches_keep_growing(need, dtype):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(1024, 1, 8, generator=g), torch.zeros(1024, 1, dtype=torch.long)
    batches = [(a.to(dtype), b) for a, b in zip(x, y)]
    means = []
    for t in (dtype, torch.float32):
        stats = collect(Weights(tiny(dtype).to(t)), [(a.to(t), b) for a, b in batches], {need}, F.cross_entropy)
        found = getattr(stats["0.weight"], need)
        assert found.dtype == torch.float32
        means.append(found.abs().mean().item())
    assert means[0] == pytest.approx(means[1], rel=.03)

def test_gates_of_heads_are_summed_in_float32():
    model, data, _ = WORLDS["heads"]
    torch.manual_seed(0)
    net = model().bfloat16().eval()
    batches, found = data(torch.float32), []
    for m in (net, copy.deepcopy(net).float()):
        space = SPACES["heads"](m, batches)
        stats = collect(space, [{"input_ids": b["input_ids"][:1]} for b in batches] * 120, {"gate_gradient"})
        found.append(torch.cat([stats[n].gate_gradient for n in space.names()]))
    assert found[0].dtype == torch.float32 and torch.allclose(found[0].mean(), found[1].mean(), rtol=.03)

def test_small_gradients_in_float16_are_not_rounded_to_zero():
    net = tiny(torch.float16)
    x, y = torch.rand(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    def faint(out, labels): return F.cross_entropy(out, labels) * 2e-6
    found = [collect(Weights(m), [(x.to(t), y)], {"grad"}, faint)["0.weight"].grad
             for m, t in ((net, torch.float16), (copy.deepcopy(net).float(), torch.float32))]
    assert torch.allclose(found[0], found[1], rtol=.1, atol=found[1].abs().max().item() / 50)
