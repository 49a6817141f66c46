"Levels are sums of powers of two; the quantiser is a projection; quantised trainings leave levels, and nothing else."
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, build, prune
from pruning_bench.core.inputs import seeded
from pruning_bench.core.recovery import finetune
from pruning_bench.structured.quantised_filters import (CLIP, LEVELS, Quantise, additive_powers, first_log_clip,
                                                        nearest_level, quantised_finetune, quantised_forward,
                                                        uniform_levels)

# exponents of the terms in the authors' code, for the bits of a magnitude
PUBLISHED = {1: [[1]], 2: [[1, 2, 3]], 3: [[1, 2, 4], [3]], 4: [[1, 3, 5], [2, 4, 6]], 5: [[1, 3, 6], [2, 4, 7], [5]],
             6: [[1, 4, 7], [2, 5, 8], [3, 6, 9]]}


# levels

@pytest.mark.parametrize("bits", PUBLISHED)
def test_levels_are_the_published_sums_of_powers_of_two(bits):
    choices = itertools.product(*[[0., *[2.**-e for e in term]] for term in PUBLISHED[bits]])
    sums = sorted({sum(c) for c in choices})
    levels = additive_powers(bits + 1)
    assert len(levels) == len(sums) == 2**bits
    assert torch.equal(levels, torch.tensor(sums, dtype=torch.double) / sums[-1])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grid", LEVELS)
def test_levels_increase_from_zero_to_one(bits, grid):
    levels = LEVELS[grid](bits)
    assert len(levels) == 2**(bits - 1) and levels[0] == 0 and levels[-1] == 1 and (levels.diff() > 0).all()


def test_each_level_has_one_power_of_two_per_term():
    for bits in range(2, 9):
        magnitude = bits - 1
        biggest = sum(2.**-i for i in range(1, magnitude // 2 + 1)) + (2.**-magnitude if magnitude % 2 else 0)
        whole = additive_powers(bits) * biggest * 2**12
        assert torch.allclose(whole, whole.round(), atol=1e-6)
        assert all(f"{int(v):b}".count("1") <= (magnitude + 1) // 2 for v in whole.round())


@pytest.mark.parametrize("bits", [1, 9, 0, -3, 2.5, True, "4"])
def test_other_bits_are_refused(bits):
    with pytest.raises(BadInput, match="bits"):
        additive_powers(bits)


# the quantiser

def test_the_nearest_level_is_the_nearest():
    levels, x = additive_powers(5), torch.rand(500, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal((nearest_level(x, levels) - x).abs(), (levels - x[:, None]).abs().amin(1))
    assert nearest_level(torch.tensor([.25]).double(), torch.tensor([0., .5, 1.]).double()).item() == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_quantiser_is_a_projection_that_keeps_signs_and_zeros(bits, dtype):
    with seeded(0):
        w = torch.randn(40, 30, dtype=dtype)
    w[:3] = 0
    log_clip, levels = first_log_clip(w), additive_powers(bits)
    q = Quantise.apply(w, log_clip, levels)
    assert torch.equal(Quantise.apply(q, log_clip, levels), q) and q.dtype == dtype
    assert (q[:3] == 0).all() and (q * w >= 0).all() and torch.equal(Quantise.apply(-w, log_clip, levels), -q)
    assert q.abs().max() <= log_clip.exp() * (1 + 1e-6) and len(q.abs().unique()) <= 2**(bits - 1)


def test_the_gradients():
    w = torch.tensor([.1, -.4, .9, -3.], dtype=torch.double, requires_grad=True)
    log_clip = torch.tensor(.3, dtype=torch.double, requires_grad=True)
    g = torch.tensor([1., 2., -1., 5.], dtype=torch.double)
    levels, clip = additive_powers(4), log_clip.detach().exp()
    q = Quantise.apply(w, log_clip, levels)
    q.backward(g)
    assert torch.equal(w.grad, g)   # straight through
    x = w.detach() / clip
    slope = torch.where(x.abs() <= 1, q.detach() / clip - x, x.sign())
    assert log_clip.grad.item() == pytest.approx((g * slope).sum().item() * clip.item())   # of the logarithm
    outside = torch.tensor([5.], dtype=torch.double)   # where everything is clipped, this is the true derivative
    up, down = (Quantise.apply(outside, log_clip.detach() + e, levels) for e in (1e-6, -1e-6))
    assert ((up - down) / 2e-6).item() == pytest.approx(clip.item(), rel=1e-5)


def test_the_first_clip_ignores_pruned_weights():
    w = torch.cat([torch.tensor([2., -2.]), torch.zeros(98)])
    assert first_log_clip(w).exp().item() == pytest.approx(6.)
    assert torch.isfinite(first_log_clip(torch.zeros(5)))


# trainings with quantised weights

def mlp():
    with seeded(0):
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(n=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 12, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(n)]


def test_inside_the_network_is_the_quantised_one():
    model, x = mlp(), batches()[0][0]
    names, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    with quantised_forward(model, bits=3):
        inside = model(x)
        assert all(torch.equal(model.state_dict()[n], before[n]) for n in names)   # the weights behind
        assert sum(n.endswith(CLIP) for n, _ in model.named_parameters()) == 3     # an optimiser sees the clips
    assert torch.equal(model(x), inside) and list(model.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model[0].bias, before["0.bias"]) and not torch.equal(model[2].weight, before["2.weight"])


def test_the_first_and_the_last_layer_are_uniform():
    model = mlp()
    with quantised_forward(model, bits=2, edge_bits=3):
        pass
    values = {i: model[i].weight.abs().unique() for i in (0, 2, 4)}
    assert len(values[2]) == 2
    for i in (0, 4):
        steps = values[i] / values[i][1]
        assert torch.allclose(steps, steps.round(), atol=1e-5)


def test_clips_are_learned_and_weights_end_on_levels():
    model, other = mlp(), mlp()
    finetune(30, 1e-2)(other, batches(), F.cross_entropy)
    quantised_finetune(30, 1e-2, bits=3)(model, batches(), F.cross_entropy)
    assert len(model[2].weight.abs().unique()) <= 4
    fresh = mlp()
    with quantised_forward(fresh, bits=3):
        pass
    assert fresh[2].weight.abs().max() != model[2].weight.abs().max()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_the_share_in_full_precision():
    a, b = mlp(), mlp()
    quantised_finetune(20, 1e-2, start=1.)(a, batches(), F.cross_entropy)
    finetune(20, 1e-2)(b, batches(), F.cross_entropy)
    assert len(a[2].weight.abs().unique()) <= 8 and torch.equal(a[0].bias, b[0].bias)


def test_pruned_weights_stay_zero():
    model = mlp()
    plan = prune(model, "global-magnitude", .6, batches(), F.cross_entropy, recover=quantised_finetune(20, bits=3))
    assert all((p[~plan.masks[n]] == 0).all() for n, p in model.named_parameters() if n in plan.masks)
    assert plan.density == pytest.approx(.4, abs=.01)


def test_an_exception_inside_leaves_the_weights_and_takes_everything_off():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        with quantised_forward(model):
            with pytest.raises(RuntimeError):
                model(torch.zeros(1, 3))   # the wrong number of inputs, in the middle of a forward pass
            assert torch.equal(model[0].weight, before["0.weight"])
            raise ZeroDivisionError
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "weight" in vars(m) for m in model.modules())


def test_layers_that_read_their_weights_elsewhere_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
    with pytest.raises(BadInput, match="LSTM"):
        with quantised_forward(model):
            pass
    with pytest.raises(BadInput, match="parametrization"):
        with quantised_forward(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))):
            pass
    with pytest.raises(BadInput, match="grid"):
        quantised_finetune(grid="log")
    with pytest.raises(BadInput, match="bits"):
        quantised_finetune(edge_bits=12)


# the methods

@pytest.mark.parametrize("name", ["ppq", "spq"])
def test_methods_remove_channels_and_quantise_the_rest(name):
    model = mlp()
    prune(model, name, .5, batches(), F.cross_entropy, steps=12, bits=3)
    assert [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)] == [(8, 12), (8, 8), (4, 8)]
    assert len(model[2].weight.abs().unique()) <= 4
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_similar_filters_are_removed():
    model = mlp()
    with torch.no_grad():
        model[0].weight[[3, 5, 8, 11]] = model[0].weight[3] + 1e-4 * torch.arange(4.)[:, None]
    plan = prune(model, "ppq", .125, batches(), F.cross_entropy, steps=2, lr=0.)
    first = next(m for n, m in plan.masks.items() if "0" in n)
    gone = set((~first).flatten().nonzero().flatten().tolist())
    assert len(gone) == 2 and gone <= {3, 5, 8, 11}


@pytest.mark.parametrize("name, settings", [("ppq", {"bits": 9}), ("ppq", {"edge_bits": 1}), ("spq", {"bits": 1}),
                                            ("spq", {"edge_bits": 20})])
def test_bits_are_checked_before_any_work(name, settings):
    with pytest.raises(BadInput, match="bits"):
        build(name, **settings)


def test_uniform_levels():
    assert torch.allclose(uniform_levels(3), torch.tensor([0., 1 / 3, 2 / 3, 1.], dtype=torch.double))
