"Shortened LLaMA and FinerCut: losses without a unit, sub-layers, divergences, greedy search."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, batch_loss, load_pruned, prune
from pruning_bench.bench.measure.size import macs
from pruning_bench.core.blocks import Blocks
from pruning_bench.core.plan import Plan, load_plan
from pruning_bench.core.score import Score
from pruning_bench.core.stats import collect
from pruning_bench.structured.language_depth import (DIVERGENCES, Sublayers, bypassed, jensen_shannon, kl,
                                                     one_by_one, protected_taylor)


def llama(layers=4, **more):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                                        num_attention_heads=4, num_key_value_heads=2, initializer_range=.2,
                                        **more)).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=4, n_head=4,
                                      initializer_range=.2)).eval()


def opt(**more):
    from transformers import OPTConfig, OPTForCausalLM
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=4, init_std=.2,
                                    num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32,
                                    **more)).eval()


def post_norm(): return opt(do_layer_norm_before=False)


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                            num_attention_heads=4, initializer_range=.2)).eval()


FAMILIES = [llama, gpt2, opt, post_norm, neox]


def text(seed=0, n=2):
    return {"input_ids": torch.randint(3, 64, (n, 12), generator=torch.Generator().manual_seed(seed))}


def remove(model, gone, data=None):
    "Remove chosen sub-layers of a model with `prune`."
    wanted = torch.ones(len(Sublayers(model).all))
    wanted[gone] = 0
    chosen = Score(lambda w, stats: wanted, "chosen", unit="sub-layer")
    return prune(model, score=chosen, space="sublayers", sparsity=len(gone) / len(wanted), data=data)


def removed(plan): return (~next(iter(plan.masks.values()))).nonzero().flatten().tolist()


# the space

@pytest.mark.parametrize("build", FAMILIES)
def test_without_both_parts_of_a_block_the_stream_passes(build):
    model, whole, batch = build(), build(), text()
    blocks = Blocks(whole)
    mask, kept = torch.tensor([True, False, True, True]), torch.ones(8, dtype=torch.bool)
    kept[[2, 3]] = False
    with torch.no_grad(), bypassed(Sublayers(model), kept), bypassed(blocks, mask):
        assert torch.allclose(model(**batch).logits, whole(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize("gone", [[1], [0, 3, 6], [0, 1, 4]])
def test_a_bypassed_and_a_removed_part_are_the_same(build, gone):
    model, batch = build(), text()
    fresh, dense = copy.deepcopy(model), model(**batch).logits
    units, kept = Sublayers(model), torch.ones(8, dtype=torch.bool)
    kept[gone] = False
    weights = sum(p.numel() for i in gone for p in units.all[i].parameters())
    size, work = sum(p.numel() for p in model.parameters()), macs(model, batch)
    with torch.no_grad(), bypassed(units, kept): through = model(**batch, use_cache=False).logits
    assert torch.equal(model(**batch).logits, dense) and not torch.allclose(through, dense, atol=1e-3)
    plan = remove(model, gone, [batch])
    assert removed(plan) == gone
    assert torch.equal(model(**batch).logits, through)
    assert sum(p.numel() for p in model.parameters()) == size - weights and macs(model, batch) < work
    plan.apply(fresh)
    assert torch.equal(fresh(**batch).logits, through)


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize("gone", [[0, 2, 6], [2, 3, 5], [0, 2, 4, 6]])
def test_generation_with_and_without_cache(build, gone):
    model, batch = build(), text()
    remove(model, gone)
    a, b = (model.generate(batch["input_ids"], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
                           use_cache=c) for c in ((True, False) if len(gone) < 4 else (None, False)))
    assert torch.equal(a, b)
    left = [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx") and any(True for _ in m.parameters())]
    assert [i for i in dict.fromkeys(left)] == list(range(4 - sum(i % 2 == 0 for i in gone)))


@pytest.mark.parametrize("build", FAMILIES)
def test_a_saved_model_is_the_model(build, tmp_path):
    model, batch = build(), text()
    plan = remove(model, [0, 3, 4, 5], [batch])
    plan.save(tmp_path / "kept")
    assert load_plan(tmp_path / "kept") == plan
    again = load_pruned(tmp_path / "kept", build)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.config.num_hidden_layers == 3


def test_a_second_call_goes_on_where_the_first_one_ended():
    model, batch = llama(), text()
    first = remove(model, [0, 3], [batch])
    plan = prune(model, "finercut", 3 / 8, data=[batch])
    assert {0, 3} < {*removed(plan)} and len(removed(plan)) == 3
    fresh = llama()
    for step in (first, plan): step.apply(fresh)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_sums_of_scores_are_those_of_the_parts():
    model = llama()
    units = Sublayers(model)
    sums = units.reduce(units.path, {n: l.read().abs() for n, l in units.layers.items()})
    layer = model.model.layers[1]
    own = [sum(p.abs().sum() for p in part.parameters()) for part in (layer.self_attn, layer.mlp)]
    assert torch.allclose(sums[2:4], torch.stack(own)) and units.cost(units.path) * 8 == sum(
        p.numel() for p in model.model.layers.parameters())
    norms = units.w(units.path)[3] ** 2
    assert torch.allclose(norms, sum(p.square().sum() for m in (layer.mlp, layer.post_attention_layernorm)
                                     for p in m.parameters()), rtol=1e-5)
    with pytest.raises(BadInput, match="leave its layers out of skip="):
        prune(model, score="magnitude", space="sublayers", skip="model.layers.1.mlp*")


def test_other_blocks_are_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8)
    with pytest.raises(BadInput, match="one norm each"): Sublayers(Gemma2ForCausalLM(Gemma2Config(**sizes)))
    mixed = llama()
    mixed.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(BadInput, match="several kinds"): Sublayers(mixed)


@pytest.mark.parametrize("mask", [torch.ones(4), torch.ones(10), torch.ones(4, 2)])
def test_plans_of_other_sizes_are_refused(mask):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match="does not fit"): Plan("sublayers", {"model.layers": mask.bool()}).apply(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


# divergences

def test_divergences_by_hand():
    p, q = torch.tensor([.5, .25, .25]), torch.tensor([.25, .25, .5])
    a, b = p.log() + 3, q.log() - 1   # logits are free up to a constant
    m = (p + q) / 2
    js = .5 * (p * (p / m).log()).sum() + .5 * (q * (q / m).log()).sum()
    assert torch.allclose(jensen_shannon(a, b), js) and torch.allclose(kl(a, b), torch.tensor(.25 * math.log(2)))
    x, y = torch.tensor([1., 0.]), torch.tensor([1., 1.])
    assert torch.allclose(DIVERGENCES["angle"](x, y), torch.tensor(math.pi / 4))
    assert DIVERGENCES["l2"](x, y) == 1


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [1e-3, 1., 30., 1e4])
def test_bounds_of_divergences(name, scale):
    a, b = torch.randn(2, 40, 33, generator=torch.Generator().manual_seed(0)) * scale
    found, d = DIVERGENCES[name](a, b), DIVERGENCES[name]
    assert (d(a, a) == 0).all() and (found > -1e-6).all() and torch.isfinite(found).all()
    if name == "js": assert (found <= math.log(2) + 1e-6).all() and torch.allclose(found, d(b, a), atol=1e-6)
    if name == "angle": assert (found <= math.pi).all()


def test_the_released_divergence_is_another_one():
    a, b = torch.tensor([8., 0.]), torch.tensor([0., 8.])
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    reverse = .5 * (m * (m / p).log()).sum() + .5 * (m * (m / q).log()).sum()
    assert reverse > math.log(2) > jensen_shannon(a, b)


# Shortened LLaMA

@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_loss_without_a_block_is_exhaustive(build):
    batches = [text(0, 3), text(1, 1)]
    losses = []
    for i in range(4):
        model = build()
        remove(model, [2 * i, 2 * i + 1])
        losses.append(sum(len(b["input_ids"]) * model(**b, labels=b["input_ids"], use_cache=False).loss.item()
                          for b in batches) / 4)
    dense = build()
    found = collect(Blocks(dense), batches, {"loss_without"})[Blocks(dense).path].loss_without
    assert torch.allclose(found, torch.tensor(losses).to(found), atol=1e-5)
    assert removed(prune(dense, "shortened-llama", .25, data=batches)) == [min(range(4), key=losses.__getitem__)]


def test_idle_block_costs_nothing():
    model, batch = llama(), text()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_(); model.model.layers[2].mlp.down_proj.weight.zero_()
    before, loss = model(**batch).logits, model(**batch, labels=batch["input_ids"]).loss.item()
    found = collect(Blocks(model), [batch], {"loss_without"})["model.layers"].loss_without
    assert found[2].item() == pytest.approx(loss, abs=1e-6)
    short = copy.deepcopy(model)
    plan = prune(short, "shortened-llama-taylor", .25, data=[batch], protected_first=0, protected_last=0)
    assert removed(plan) == [2] and torch.equal(short(**batch).logits, before)


@pytest.mark.parametrize("first, last, order", [(0, 0, [3, 2, 1, 0]), (1, 1, [2, 1, 3, 0]), (4, 2, [3, 2, 1, 0]),
                                                (0, 2, [1, 0, 3, 2]), (9, 9, [3, 2, 1, 0])])
def test_protected_blocks_go_last(first, last, order):
    model, batch = llama(), text()
    with torch.no_grad():   # the sums fall with the depth
        for i, block in enumerate(model.model.layers):
            for m in (block.self_attn.o_proj, block.mlp.down_proj): m.weight.mul_(.2**i)
    space = Blocks(model)
    stats = collect(space, [batch], {"grad"})
    found = protected_taylor(space, stats, first, last)["model.layers"]
    assert found.argsort().tolist() == order
    plain = protected_taylor(space, stats, 0, 0)["model.layers"]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    by_hand = [sum((p * p.grad).abs().sum().item() for p in b.parameters() if p.dim() == 2) for b in model.model.layers]
    assert torch.allclose(plain, torch.tensor(by_hand).double(), rtol=1e-4)


# FinerCut

@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("build", [llama, opt])
def test_the_search_is_greedy_against_the_dense_output(build, divergence):
    batches, gone = [text(0, 3), text(1, 1)], []
    def change(without):
        kept = torch.tensor([i not in without for i in range(8)])
        with bypassed(units, kept): pairs = [*zip(dense, (units.model(**b).logits for b in batches))]
        return torch.cat([DIVERGENCES[divergence](a, b).flatten() for a, b in pairs]).mean().item()
    units = Sublayers(build())
    dense = [units.model(**b).logits for b in batches]
    with torch.no_grad():
        for k in (1, 2):
            gone.append(min({*range(8)} - {*gone}, key=lambda i: change([*gone, i])))
            plan = prune(build(), "finercut", k / 8, data=batches, divergence=divergence)
            assert removed(plan) == sorted(gone)


@pytest.mark.parametrize("build, where", [(llama, "model.layers.1.self_attn.o_proj"),
                                          (llama, "model.layers.2.mlp.down_proj"),
                                          (gpt2, "transformer.h.1.mlp.c_proj"), (opt, "model.decoder.layers.3.fc2")])
def test_an_idle_part_goes_first_and_logits_do_not_move(build, where):
    model, batch = build(), text()
    with torch.no_grad():
        for p in model.get_submodule(where).parameters(): p.zero_()
    before = model(**batch).logits
    number = next(int(part) for part in where.split(".") if part.isdigit())
    plan = prune(model, "finercut", 1 / 8, data=[batch])
    assert removed(plan) == [2 * number + ("attn" not in where)] and torch.equal(model(**batch).logits, before)


def test_whole_blocks_and_one_ranking():
    model, batch = llama(), text()
    plan = prune(copy.deepcopy(model), "finercut", .5, data=[batch], space="blocks")
    assert plan.masks["model.layers"].tolist().count(True) == 2
    ranked = collect(Sublayers(model), [batch], {"output_change"})["model.layers"].output_change
    once = prune(copy.deepcopy(model), "finercut", .5, data=[batch], schedule="one_shot")
    assert removed(once) == sorted(ranked.argsort()[:4].tolist())


def test_steps_of_the_schedule():
    units = Sublayers(llama())
    assert [round(k * 8, 6) for k in one_by_one()(.5, units)] == [7, 6, 5, 4]
    assert [round(k * 8, 6) for k in one_by_one()(.45, units)] == [7, 6, 5, 3.6]   # 3.6 units are rounded to 4
    assert [*one_by_one()(1., units)] == [1.]
    assert len(removed(prune(llama(), "finercut", .55, data=[text()]))) == 4


def test_half_precision_and_padding():
    model, ids = llama(), text()["input_ids"]
    padded = {"input_ids": F.pad(ids, (0, 5)), "attention_mask": F.pad(torch.ones_like(ids), (0, 5))}
    for need in ("output_change", "loss_without"):
        a, b = (getattr(collect(Sublayers(model), [x], {need})["model.layers"], need)
                for x in ({"input_ids": ids}, padded))
        assert torch.allclose(a, b, atol=1e-5)
    half = llama().bfloat16()
    plan = prune(half, "finercut", .5, data=[padded])
    assert len(removed(plan)) == 4 and all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert torch.isfinite(half(input_ids=ids).logits).all()


@pytest.mark.parametrize("name", ["finercut", "shortened-llama"])
def test_an_interrupted_search_leaves_the_model_as_it_was(name):
    model, batch = llama(), text()
    before, calls = model(**batch).logits, []
    def stop(module, args):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
    handle = model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): prune(model, name, .5, data=[batch], restore=False)
    handle.remove()
    assert torch.equal(model(**batch).logits, before) and not any(m._forward_hooks for m in model.modules())


def test_what_cannot_be_searched_is_refused():
    data = [text()]
    with pytest.raises(BadInput, match="unknown divergence"): prune(llama(), "finercut", divergence="jsd", data=data)
    with pytest.raises(BadInput, match="shortened-llama"):
        prune(llama(), "finercut", data=data, loss=batch_loss(lambda model, b: model(**b, labels=b["input_ids"]).loss))
    with pytest.raises(BadInput, match="choose one of the two"):
        prune(nn.Sequential(nn.Linear(4, 4)), score="loss_when_removed", loss=F.cross_entropy,
              data=(torch.randn(4, 4), torch.tensor([0, 1, 2, 3])))
    unlabelled = {**text(), "labels": torch.full((2, 12), -100)}
    with pytest.raises(BadInput, match="label"): collect(Blocks(llama()), [unlabelled], {"loss_without"})
