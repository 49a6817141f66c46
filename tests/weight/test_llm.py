"Wanda and SparseGPT: the invariants of the papers, exactly; orderings on the small language model."
import copy
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from pruning_bench import BadInput, methods, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.pattern import as_pattern, per_row, unstructured
from pruning_bench.core.space import Weights
from pruning_bench.weight.sparsegpt import inverse_factor, obs, compensate_columns, sparsegpt, column_sweep
from pruning_bench.weight.wanda import wanda


def world(r=16, c=24, groups=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(groups, 300, 6, generator=g) @ torch.randn(groups, 6, c, generator=g) + .5
         * torch.randn(groups, 300, c, generator=g)).double()
    w, gram = torch.randn(r, c, generator=g).double(), x.transpose(1, 2) @ x / 300
    damped = gram + .01 * torch.diag_embed(gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, c))
    return w, SimpleNamespace(gram=gram, act_norm=x[0].norm(dim=0, keepdim=True)), damped


def refit(row, h, keep):
    new = torch.zeros_like(row)
    new[keep] = torch.linalg.solve(h[keep][:, keep], h[keep] @ row)
    return new


def test_wanda_with_equal_norms_is_row_magnitude():
    net, data = nn.Linear(20, 7), torch.eye(20).repeat(2, 1)
    for s in (.1, .5, .83):
        by_magnitude = prune(copy.deepcopy(net), "magnitude", s, pattern="per_row")
        assert prune(copy.deepcopy(net), "wanda", s, data=data) == by_magnitude


def test_wanda_ignores_rescaling_and_magnitude_does_not():
    torch.manual_seed(0)
    net, x = nn.Linear(32, 8), torch.randn(100, 32)
    scale = 2. ** torch.randint(-4, 5, (32,))
    scaled = copy.deepcopy(net)
    with torch.no_grad(): scaled.weight /= scale
    assert prune(copy.deepcopy(net), "wanda", data=x) == prune(copy.deepcopy(scaled), "wanda", data=x * scale)
    assert prune(net, "magnitude") != prune(scaled, "magnitude")


def test_wanda_score_in_numbers():
    w, stats = torch.tensor([[1., -4., 2.], [3., 0., -1.]]), SimpleNamespace(act_norm=torch.tensor([[2., .5, 1.]]))
    assert torch.equal(wanda(w, stats), torch.tensor([[2., 2., 2.], [6., 0., 1.]]))


def test_wanda_counts_every_row():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2))
    plan = prune(net, "wanda", .6, data=torch.randn(3, 4, 9, 9))
    for mask in plan.masks.values():
        assert len(set(mask.sum(1).tolist())) == 1 and abs(mask.sum(1)[0] - .4 * mask.shape[1]) < 1


@pytest.mark.parametrize("block", [1, 5, 8, 24, 128])
def test_sweep_error_identity_for_any_mask_and_block(block):
    w, stats, h = world()
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > .5
    new, kept = compensate_columns(w, stats, mask.double(), mask.double().mean().item(), lambda s, f: mask, block=block)
    u, e, swept = inverse_factor(stats.gram, .01)[0], torch.zeros_like(w), w.clone()
    for i in range(w.shape[1]):
        e[:, i] = swept[:, i] * ~mask[:, i] / u[i, i]
        swept[:, i:] -= e[:, i:i+1] * u[i, i:]
    d = new - w
    assert torch.equal(kept, mask) and not new[~mask].any() and torch.allclose(new, swept * mask)
    assert torch.allclose((d @ h[0] * d).sum(1), e.square().sum(1))


@pytest.mark.parametrize("columns, width, groups", [(24, 4, 1), (24, 7, 2), (23, 5, 1), (24, 128, 3), (1, 4, 1)])
def test_the_sweep_is_the_one_of_the_paper(columns, width, groups):
    w, stats, _ = world(r=12, c=columns, groups=groups)
    u, swept, e = inverse_factor(stats.gram, .01), w.clone().view(groups, -1, columns), torch.zeros_like(w)
    keep, asked = torch.ones_like(w, dtype=torch.bool), []
    def half(scores, a, b):
        asked.append((a, b))
        return per_row()(scores, .5) if b > a + 1 else scores > scores.median()
    new, mask = column_sweep(w, u, half, width)
    for a in range(0, columns, width):
        b = min(a + width, columns)
        scores = (swept[..., a:b] / u.diagonal(dim1=1, dim2=2)[:, None, a:b]).square().view(len(w), -1)
        keep[:, a:b] = per_row()(scores, .5) if b > a + 1 else scores > scores.median()
        for i in range(a, b):
            e = swept[..., i] * ~keep.view_as(swept)[..., i] / u[:, i, i, None]
            swept[..., i:] -= e[..., None] * u[:, i, None, i:]
    assert asked == [(a, min(a + width, columns)) for a in range(0, columns, width)]
    assert torch.equal(mask, keep) and torch.allclose(new, swept.view_as(w) * keep)


def test_one_factorisation_for_layers_that_share_an_input(monkeypatch):
    w, stats, h = world()
    u = inverse_factor(stats.gram, .01)
    assert inverse_factor(stats.gram, .01) is u and inverse_factor(stats.gram.clone(), .01) is not u
    assert torch.allclose(u.mT @ u, h.inverse()) and torch.equal(u, u.triu())
    again = inverse_factor(stats.gram, .02)
    assert not torch.allclose(again, u)
    stats.gram.mul_(4)
    assert torch.allclose(inverse_factor(stats.gram, .02), again / 2)   # a changed tensor is factorised again


def test_single_precision_and_where_it_does_not_do():
    _, stats, _ = world()
    exact, single = inverse_factor(stats.gram, .01), inverse_factor(stats.gram.float(), .01)
    assert single.dtype == torch.float32 and ((single - exact).norm() / exact.norm()).item() < 1e-4
    flat = torch.ones(1, 24, 24)   # of rank one
    assert inverse_factor(flat, 1e-2).dtype == torch.float32 and inverse_factor(flat, 1e-6).dtype == torch.float64
    for damp in (1e-2, 1e-9):
        with pytest.raises(BadInput, match="too few or too dependent"): inverse_factor(-flat, damp)


def test_sweep_over_first_columns_is_the_refit_and_over_last_leaves_the_rest():
    w, stats, h = world()
    u, first, last = inverse_factor(stats.gram, .01), torch.arange(24) < 7, torch.arange(24) >= 17
    new = column_sweep(w, u, lambda s, a, b: (~first)[a:b].expand(len(w), -1), 5)[0]
    assert torch.allclose(new, torch.stack([refit(v, h[0], ~first) for v in w]))
    new = column_sweep(w, u, lambda s, a, b: (~last)[a:b].expand(len(w), -1), 5)[0]
    assert torch.equal(new[:, ~last], w[:, ~last])


def test_sparsegpt_with_independent_inputs_is_wanda():
    w, stats, _ = world()
    stats.gram = torch.diag_embed(stats.gram.diagonal(dim1=1, dim2=2))
    new, mask = sparsegpt(w, stats, w.abs(), .4, unstructured(), damp=0.)
    assert torch.equal(new, w * mask) and torch.equal(mask, unstructured()(wanda(w, stats), .4))


def test_obc_is_the_refit_and_beats_the_sweep():
    w, stats, h = world(r=8)
    total = lambda new: ((new - w) @ h[0] * (new - w)).sum()
    rows = []
    for row in w:
        v, inverse, keep = row.clone(), h[0].inverse(), torch.ones(24, dtype=torch.bool)
        for _ in range(12):
            p = (v**2 / inverse.diagonal()).masked_fill(~keep, torch.inf).argmin()
            keep[p] = False
            v = (v - v[p] / inverse[p, p] * inverse[p]) * keep
            inverse = inverse - inverse[:, p:p+1] @ inverse[p:p+1] / inverse[p, p]
            inverse[p, p] = 1.
        assert torch.allclose(v, refit(row, h[0], keep))
        rows.append(v)
    swept = sparsegpt(w, stats, w.abs(), .5, per_row())[0]
    assert total(torch.stack(rows)) < total(swept) < total(w * per_row()(wanda(w, stats), .5))


def test_obs_score_is_the_error_after_the_best_repair():
    w, stats, h = world(r=3)
    for j in (0, 11, 23):
        keep = torch.arange(24) != j
        error = torch.stack([(refit(v, h[0], keep) - v) @ h[0] @ (refit(v, h[0], keep) - v) for v in w])
        assert torch.allclose(obs(w, stats)[:, j], error.to(obs(w, stats)), rtol=1e-4)


@pytest.mark.parametrize("name,fraction",
                         [("unstructured", .37), ("per_row", .37), ("2:4", .5), ("1:4", .25), ("4:8", .5), ("4x4", .5)])
@pytest.mark.parametrize("block", [3, 8, 128])
@pytest.mark.parametrize("groups", [1, 2])
def test_sparsegpt_counts(name, fraction, block, groups):
    w, stats, _ = world(groups=groups)
    pattern = as_pattern(name)
    new, mask = sparsegpt(w, stats, w.abs(), fraction, pattern, block=block)
    assert mask.sum() == pattern(w.abs(), fraction).sum() and not new[~mask].any() and torch.isfinite(new).all()
    if ":" in name:
        n, m = map(int, name.split(":"))
        assert (mask.view(len(w), -1, m).sum(-1) == n).all()


def test_groups_are_swept_apart():
    w, stats, _ = world(groups=2)
    both = compensate_columns(w, stats, w.abs(), .5, per_row())[0]
    for g in range(2):
        half = slice(8 * g, 8 * g + 8)
        one = compensate_columns(w[half], SimpleNamespace(gram=stats.gram[g:g+1]), w[half].abs(), .5, per_row())[0]
        assert torch.allclose(both[half], one)


def test_pruned_weights_stay_pruned_and_the_total_stays_exact():
    w, stats, _ = world()
    gone = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < .3
    gone[:, :6] = True
    scores = w.abs().masked_fill(gone, -torch.inf)
    for block in (4, 24):
        mask = sparsegpt(w * ~gone, stats, scores, .3, unstructured(), block=block)[1]
        assert not mask[gone].any() and mask.sum() == round(.3 * w.numel())


def test_sparsegpt_is_idempotent_to_the_bit():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(100, 24)
    for sparsity in (.6, "2:4"):
        model = copy.deepcopy(net)
        one = prune(model, "sparsegpt", sparsity, data=x, block=5)
        after = copy.deepcopy(model.state_dict())
        assert prune(model, "sparsegpt", sparsity, data=x, block=5) == one
        assert all(torch.equal(a, b) for a, b in zip(after.values(), model.state_dict().values()))


def test_silent_inputs_and_too_few_tokens():
    net = nn.Linear(12, 6)
    x = torch.randn(5, 12); x[:, 3] = 0
    plan = prune(net, "sparsegpt", .5, data=x)
    assert torch.isfinite(net.weight).all() and plan.density == .5
    with pytest.raises(BadInput, match="damp"): prune(nn.Linear(12, 6), "sparsegpt", .5, data=x, damp=0.)


def test_repair_needs_weights():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    with pytest.raises(BadInput, match="updates weights"):
        prune(net, solve="compensate_columns", space="blocks", data=torch.randn(4, 4))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))

def opt():
    from transformers import OPTConfig, OPTForCausalLM
    return OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                                    num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32))

def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))

def vit(): return torchvision.models.VisionTransformer(16, 8, 2, 2, 32, 64, num_classes=10)
def resnet(): return torchvision.models.resnet18(num_classes=10)

MODELS = {"gpt2": (gpt2, lambda: {"input_ids": torch.randint(0, 64, (2, 16))}),
          "opt": (opt, lambda: {"input_ids": torch.randint(0, 64, (2, 16))}),
          "llama": (llama, lambda: {"input_ids": torch.randint(0, 64, (2, 16))}),
          "vit": (vit, lambda: torch.randn(2, 3, 16, 16)), "resnet": (resnet, lambda: torch.randn(2, 3, 32, 32))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", list(MODELS))
def test_real_architectures(name, method, dtype):
    torch.manual_seed(0)
    build, batch = MODELS[name]
    model, loader = build().to(dtype).eval(), [batch(), batch()]
    if name in ("vit", "resnet"): loader = [b.to(dtype) for b in loader]
    if method == "sparsegpt" and name == "resnet":
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10, dtype=dtype)
    plan = prune(model, method, .5, data=loader)
    names = Weights(model).names()
    assert set(plan.masks) == set(names) == {n for n, _ in model.named_parameters() if n in masks_of(model)}
    for n, mask in plan.masks.items():
        want = mask.numel() / 2 if method == "sparsegpt" else len(mask) * int(mask.shape[1] * .5 + .5)
        assert abs(mask.sum().item() - want) <= .5 and not Weights(model).w(n)[~mask].any()
    assert all(p.dtype == dtype for p in model.parameters())
    out = model(**loader[0]).logits if isinstance(loader[0], dict) else model(loader[0])
    assert torch.isfinite(out).all()


def test_gpt2_matrices_are_read_the_right_way_round():
    model, batch = gpt2().eval(), {"input_ids": torch.randint(0, 64, (2, 16))}
    seen = []
    model.transformer.h[0].mlp.c_fc.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().reshape(-1, 32)))
    model(**batch)
    w = model.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    plan = prune(model, "wanda", .5, data=[batch])
    assert torch.equal(plan.masks["transformer.h.0.mlp.c_fc.weight"], per_row()(w.abs() * seen[0].norm(dim=0), .5))


def test_cards():
    assert {"wanda", "sparsegpt"} <= set(methods(family="weight").method)
    assert methods("sparsegpt").needs[0] == "gram" and methods("wanda").needs[0] == "act_norm"


@pytest.mark.slow
def test_orderings_on_pydoc_llama():
    "Repair wins on every draw. Wanda against magnitude is not asserted: without large features it is a toss-up."
    from pruning_bench.bench.task import find_task
    world = find_task("pydoc-llama")
    def perplexity(method, sparsity, seed, **parts):
        model = world.dense(0)
        prune(model, method, sparsity, data=world.calibration(seed), seed=seed, **parts)
        return world.evaluate(model, "validation")["perplexity"]
    dense = world.evaluate(world.dense(0), "validation")["perplexity"]
    for sparsity in (.5, .6, .7, "2:4"):
        for seed in range(3):
            chance, mag, wan, rep, gpt = (perplexity(m, sparsity, seed, **p) for m, p in (
                ("random", {}), ("magnitude", {}), ("wanda", {}), ("wanda", {"solve": "compensate_columns"}),
                ("sparsegpt", {})))
            assert chance > 1.5 * max(mag, wan) and min(mag, wan, rep) > gpt > dense and wan > rep
