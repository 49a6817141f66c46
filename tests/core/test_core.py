"""The promises of the core, against brute force and against PyTorch's own pruning."""
import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune as torch_prune

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.allocate import ALLOCATORS, kth_largest, round_to_units, total_density, topk_mask
from pruning_bench.core.mask import attach_mask, masks_of, remove_masks
from pruning_bench.core.pattern import as_pattern, block, count_to_keep, n_m, per_row, topk_per_row, unstructured
from pruning_bench.core.schedule import SCHEDULES
from pruning_bench.core.score import magnitude, unit_scores
from pruning_bench.core.space import Weights, prunable_layers
from pruning_bench.core.stats import act_norm, gram


def net():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5)]
    return nn.Sequential(*convolutions, *head)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_winners_agree_with_a_stable_sort(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    s = torch.randint(-3, 4, (200,), generator=g).to(dtype)   # many ties
    for k in (0, 1, 7, 100, 199, 200):
        expected = torch.zeros(200, dtype=torch.bool)
        expected[s.float().sort(descending=True, stable=True).indices[:k]] = True
        assert torch.equal(topk_mask(s, k), expected)


MANY = 70_001
SAMPLED = torch.arange(MANY) % (MANY // 2**14) == 0   # the scores that `kth_largest` looks at first
LOTS = {"normal": lambda r: r, "ties": lambda r: r.round(), "equal": torch.zeros_like,
        "half dead": lambda r: torch.where(r < 0, -math.inf, r), "rising": lambda r: r.sort().values,
        "sample sees the highest": lambda r: r + 9 * SAMPLED, "sample sees the lowest": lambda r: r - 9 * SAMPLED}


@pytest.mark.parametrize("kind", LOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_winners_among_so_many_that_a_sample_is_drawn(kind, dtype):
    s = LOTS[kind](torch.randn(MANY, generator=torch.Generator().manual_seed(0))).to(dtype)
    order = s.double().sort(descending=True, stable=True).indices
    for k in (1, 300, 7_000, 35_000, 63_001, 70_000):
        assert topk_mask(s, k).sum() == k and topk_mask(s, k)[order[:k]].all(), k


def test_few_of_many_scores_are_ranked(monkeypatch):
    s, rank, seen = torch.randn(10**6, generator=torch.Generator().manual_seed(0)), np.partition, []
    monkeypatch.setattr(np, "partition", lambda x, i: (seen.append(len(x)), rank(x, i))[1])
    for k in (10**5, 5 * 10**5, 9 * 10**5): assert kth_largest(s, k) == s.sort(descending=True).values[k - 1]
    assert max(seen) < .05 * len(s) and len(seen) == 3


@pytest.mark.parametrize("p", [unstructured(), per_row(), n_m(2, 4), n_m(1, 4), block(2, 4)])
@pytest.mark.parametrize("fill", ["random", "zeros", "equal", "infinite"])
def test_patterns_keep_exact_counts(p, fill):
    fills = {"random": torch.rand(8, 16), "zeros": torch.zeros(8, 16), "equal": torch.ones(8, 16),
             "infinite": torch.full((8, 16), math.inf)}
    s = fills[fill]
    for fraction in (.25, .5, .75):
        f = p.fixed or fraction
        m = p(s, f)
        assert m.dtype == torch.bool and m.shape == s.shape and int(m.sum()) == count_to_keep(f, s.numel())
        assert torch.equal(m, p(s, f))


def test_n_of_m_is_optimal_by_enumeration():
    torch.manual_seed(0)
    s = torch.rand(3, 12)
    mask = n_m(2, 4)(s, .5)
    for row, group in itertools.product(range(3), range(3)):
        part = s[row, 4 * group:4 * group + 4]
        best = max(itertools.combinations(range(4), 2), key=lambda c: part[list(c)].sum())
        assert mask[row, 4 * group:4 * group + 4].nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize("spec", ["2:4", "1:4", "4:8"])
def test_conv_groups_run_along_input_channels(spec):
    model = nn.Conv2d(16, 4, 3)
    plan = prune(model, "magnitude", spec)
    n, m = map(int, spec.split(":"))
    w = model.weight.permute(0, 2, 3, 1).reshape(-1, m)
    assert ((w != 0).sum(1) == n).all() and plan.density == n / m


@pytest.mark.parametrize("name", ["uniform", "global", "erk"])
@pytest.mark.parametrize("keep", [.013, .1, .5, .9, .999])
def test_allocations_spend_the_budget(name, keep):
    space = Weights(net())
    scores = unit_scores(space, magnitude, {n: SimpleNamespace() for n in space.names()})
    total = sum(s.numel() for s in scores.values())
    shares = ALLOCATORS[name](scores, keep, space)
    assert abs(total_density(shares, scores, space) - keep) <= (1e-9 if name != "global" else .5 / total + 1e-9)
    assert all(0 <= f <= 1 for f in shares.values())
    exact = round_to_units(shares, keep, scores, space)
    assert sum(round(exact[n] * scores[n].numel()) for n in exact) == count_to_keep(keep, total)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("keep", [.01, .37, 1.])
def test_schedules_fall_to_the_end_point(name, keep):
    steps = SCHEDULES[name]()(keep)
    assert steps[-1] == keep and all(a >= b - 1e-12 for a, b in zip(steps, steps[1:]))
    assert all(0 < s <= 1 for s in steps)


@pytest.mark.parametrize("amount", [.2, .5, .87])
def test_layerwise_magnitude_is_that_of_pytorch(amount):
    ours, theirs = net(), net()
    prune(ours, "magnitude", amount)
    for name, layer in prunable_layers(theirs).items():
        torch_prune.l1_unstructured(layer.module, "weight", amount)
        assert abs(int((dict(ours.named_parameters())[name] == 0).sum()) - int((layer.module.weight == 0).sum())) <= 1
        disagree = (dict(ours.named_parameters())[name] == 0) != (layer.module.weight == 0)
        assert int(disagree.sum()) <= 1


def test_global_magnitude_is_that_of_pytorch():
    ours, theirs = net(), net()
    plan = prune(ours, allocate="global", sparsity=.8)
    layers = prunable_layers(theirs)
    removed = plan.density and sum(int((~m).sum()) for m in plan.masks.values())
    weights = [(l.module, "weight") for l in layers.values()]
    torch_prune.global_unstructured(weights, torch_prune.L1Unstructured, amount=removed)
    assert all(torch.equal(dict(ours.named_parameters())[n] == 0, l.module.weight == 0) for n, l in layers.items())


def test_the_inputs_of_every_prunable_layer_are_recorded():
    model, x = net(), torch.randn(4, 3, 16, 16)
    norms, grams = act_norm(Weights(model), [x]), gram(Weights(model), [x])
    for name, layer in prunable_layers(model).items():
        rows, columns = layer.read().shape
        assert norms[name].shape in ((1, columns), (rows, columns)) and grams[name].shape[-2:] == (columns, columns)
        square = torch.stack([g.diagonal() for g in grams[name]]).sqrt()
        found = norms[name][::max(1, rows // len(square))][:len(square)]
        assert found.max() > 0 and torch.allclose(found, square * found.max() / square.max(), rtol=1e-3)


def transformer():
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 32, 64, num_classes=7)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=2))


def mobilenet(): return torchvision.models.mobilenet_v2(weights=None)
@pytest.mark.parametrize("make, batch", [(net, torch.randn(4, 3, 16, 16)), (transformer, torch.randn(2, 3, 16, 16)),
                                         (gpt2, {"input_ids": torch.randint(0, 40, (2, 16))}),
                                         (mobilenet, torch.randn(2, 3, 32, 32))])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_any_architecture(make, batch, method):
    model = make().eval()
    plan = prune(model, method, .5, data=[batch])
    for name, layer in prunable_layers(model).items():
        m = plan.masks[name]
        assert torch.equal(layer.matrix(masks_of(model)[name]), m) and (layer.read()[~m] == 0).all()
    out = model(**batch).logits if isinstance(batch, dict) else model(batch)
    assert torch.isfinite(out).all() and abs(plan.density - .5) < .02


def test_tied_and_output_weights_are_left_alone():
    model = gpt2()
    assert not any("wte" in n or "lm_head" in n for n in prunable_layers(model))


def train_step(model, opt, x, y):
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


@pytest.mark.parametrize("make_opt", [
    lambda p: torch.optim.SGD(p, .1, momentum=.9, nesterov=True, weight_decay=1e-2),
    lambda p: torch.optim.AdamW(p, .01), lambda p: torch.optim.RMSprop(p, .01, momentum=.9)])
def test_momentum_from_before_cannot_move_a_pruned_weight(make_opt):
    model, x, y = net(), torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
    opt = make_opt(model.parameters())
    for _ in range(3): train_step(model, opt, x, y)
    prune(model, "magnitude", .7)
    masks = {n: m.clone() for n, m in masks_of(model).items()}
    for _ in range(3):
        train_step(model, opt, x, y)
        assert all((dict(model.named_parameters())[n][~m] == 0).all() for n, m in masks.items())
        assert all((dict(model.named_parameters())[n].grad[~m] == 0).all() for n, m in masks.items())


def test_masks_follow_copies_devices_and_types_but_not_state_dicts():
    model = net()
    prune(model, "magnitude", .5)
    twin = copy.deepcopy(model).double()
    assert masks_of(twin).keys() == masks_of(model).keys()
    assert all(m.dtype == torch.bool for m in masks_of(twin).values())
    assert list(model.state_dict()) == list(net().state_dict())
    remove_masks(twin)
    assert not masks_of(twin) and masks_of(model)


def test_a_frozen_parameter_can_be_held():
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    attach_mask(layer, "weight", torch.eye(4, dtype=torch.bool))
    assert (layer.weight != 0).sum() <= 4 and layer(torch.randn(2, 4)).shape == (2, 4)


def test_nothing_is_removed_at_sparsity_zero():
    model, dense = net(), net()
    assert prune(model, "magnitude", 0.).density == 1
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values()))


def test_a_failed_call_leaves_the_model_alone():
    model, dense = net(), net()
    for bad in (dict(sparsity=1.), dict(sparsity=-.1), dict(sparsity="half"), dict(sparsity="2:3"),
                dict(method="wanda"), dict(score="tayler"), dict(method="magnitude", data=[]),
                dict(recover="finetune"), dict(skip="*"), dict(sparsity=.3, pattern="2:4"), dict(allocate="erk2"),
                dict(method="wanda", data=[torch.randn(2, 5)])):
        with pytest.raises((BadInput, RuntimeError)) as refused:
            prune(model, **bad)
        assert "\n" not in str(refused.value)[:80]
    assert not masks_of(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values()))


def test_a_tampered_plan_is_refused(tmp_path):
    folder = prune(net(), "magnitude", .5).save(tmp_path / "plan")
    data = bytearray((folder / "plan.safetensors").read_bytes())
    data[-1] ^= 0x80
    (folder / "plan.safetensors").write_bytes(data)
    with pytest.raises(BadInput, match="altered"):
        load_plan(folder)
    with pytest.raises(BadInput, match="no plan at"):
        load_plan(tmp_path / "elsewhere")


def test_top_rows_and_patterns_read_strings():
    assert as_pattern("2:4").fixed == .5 and as_pattern("4x2").name == "4x2"
    assert topk_per_row(torch.tensor([[1., 1., 1.]]), 2).tolist() == [[True, True, False]]
    for bad in ("4:4", "0:4", "nothing"):
        with pytest.raises(BadInput):
            as_pattern(bad)

def test_finite_weights_are_welcome_even_where_their_sum_overflows():
    layer = nn.Linear(4, 4)
    layer.weight.data.fill_(3e38)
    assert layer.weight.sum().isinf() and prune(layer, "random", .5).density == .5
