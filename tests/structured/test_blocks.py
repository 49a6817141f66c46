"Removing residual blocks: readings, invariants, surgery, orderings."
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from pruning_bench import BadInput, methods, prune
from pruning_bench.core.score import Score
from pruning_bench.core.blocks import Blocks
from pruning_bench.structured.blocks import block_cosine


def llama(layers=4, **more):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                                        num_attention_heads=4, num_key_value_heads=2, **more)).eval()

def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=4, n_head=4)).eval()

def opt():
    from transformers import OPTConfig, OPTForCausalLM
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=4,
                                    num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32)).eval()

def text(seed=0): return {"input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))}


def test_reading_is_the_cosine_of_hidden_states():
    model, batches = llama(), [text(0), text(1)]
    read = block_cosine(Blocks(model), batches)["model.layers"]
    states = [model.model(**b, output_hidden_states=True).hidden_states for b in batches]
    for i in range(3):   # the last entry of hidden_states is normalised
        c = torch.cat([F.cosine_similarity(s[i].double(), s[i + 1].double(), dim=-1).flatten() for s in states]).mean()
        assert abs(read[i] - c) < 1e-6


def test_idle_block_goes_first_and_logits_do_not_move():
    model, batch = llama(), text()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_(); model.model.layers[2].mlp.down_proj.weight.zero_()
        before = model(**batch).logits
    assert (1 - block_cosine(Blocks(model), [batch])["model.layers"][2]).abs() < 1e-12
    plan = prune(model, "block-influence", .25, data=[batch])
    assert plan.masks["model.layers"].tolist() == [True, True, False, True]
    assert torch.equal(before, model(**batch).logits)


def test_bypass_is_removal_and_the_plan_repeats_it():
    model, batch = llama(), text()
    fresh, bypassed = copy.deepcopy(model), copy.deepcopy(model)
    plan = prune(model, "block-influence", .5, data=[batch])
    blocks = Blocks(bypassed)
    blocks.apply({blocks.path: (None, plan.masks[blocks.path])})
    assert torch.equal(model(**batch).logits, bypassed(**batch, use_cache=False).logits)
    plan.apply(fresh)
    assert torch.equal(model(**batch).logits, fresh(**batch).logits) and len(fresh.model.layers) == 2


@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_generation_with_and_without_cache(build):
    model, batch = build(), text()
    prune(model, "block-influence", .5, data=[batch])
    a, b = (model.generate(batch["input_ids"], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
                           use_cache=c) for c in (True, False))
    assert torch.equal(a, b) and model.config.num_hidden_layers == 2


def test_exact_count_and_half_precision():
    for n, sparsity in ((6, 1/3), (7, .5), (5, .2)):
        model = llama(n).bfloat16()
        plan = prune(model, "block-influence", sparsity, data=[text()])
        assert len(model.model.layers) == int((1 - sparsity) * n + .5) == plan.masks["model.layers"].sum()
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_padding_is_not_read():
    model, ids = llama(), text()["input_ids"]
    padded = {"input_ids": F.pad(ids, (0, 5)), "attention_mask": F.pad(torch.ones_like(ids), (0, 5))}
    a, b = (block_cosine(Blocks(model), [x])["model.layers"] for x in ({"input_ids": ids}, padded))
    assert torch.allclose(a, b, atol=1e-5)


def test_other_scores_on_blocks():
    model, batch = llama(), text()
    with torch.no_grad():
        for p in model.model.layers[1].parameters(): p.mul_(.01)
    assert prune(copy.deepcopy(model), score="magnitude", space="blocks",
                 sparsity=.25).masks["model.layers"].tolist() == [True, False, True, True]
    def taylor(w, stats): return (w * stats.grad).abs()
    plan = prune(copy.deepcopy(model), score=Score(taylor, "taylor", needs=frozenset({"grad"})), space="blocks",
                 sparsity=.25, data=[batch])
    assert plan.masks["model.layers"].sum() == 3


def test_magnitude_on_a_bare_sequential():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    with torch.no_grad(): net[1][0].weight.mul_(1e-3)
    assert prune(net, score="magnitude", space="blocks", sparsity=1/3).masks[""].tolist() == [True, False, True]


def test_vision_transformer_and_what_cannot_be_left_out():
    vit = torchvision.models.VisionTransformer(16, 8, 4, 2, 32, 64, num_classes=10).eval()
    x = torch.randn(2, 3, 16, 16)
    prune(vit, "block-influence", .5, data=x)
    assert len(vit.encoder.layers) == 2 and torch.isfinite(vit(x)).all()
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8)), nn.Sequential(nn.Linear(8, 8))])
        def forward(self, x):
            for b in self.blocks: x = b(x)
            return x
    with pytest.raises(BadInput, match="changes the shape"): prune(Net(), "block-influence", data=torch.randn(3, 4))


def test_needs_data_and_is_listed():
    with pytest.raises(BadInput, match="data"): prune(llama(), "block-influence", .5)
    assert methods("block-influence").space[0] == "blocks"


@pytest.mark.slow
def test_orderings_on_pydoc_llama():
    "The first block is indispensable, and block influence knows it in every draw."
    from pruning_bench.bench.task import find_task
    world = find_task("pydoc-llama")
    dense = world.evaluate(world.dense(0), "validation")["perplexity"]
    first = world.dense(0)
    del first.model.layers[0]
    worst = world.evaluate(first, "validation")["perplexity"]
    for seed in range(3):
        reached = [dense]
        for n in (1, 2, 3):
            model = world.dense(0)
            plan = prune(model, "block-influence", n / 6, data=world.calibration(seed))
            assert plan.masks["model.layers"][0] and plan.masks["model.layers"].sum() == 6 - n
            reached.append(world.evaluate(model, "validation")["perplexity"])
        assert reached == sorted(reached) and reached[-1] < worst / 5
