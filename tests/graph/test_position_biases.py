"Heads whose biases are made by `forward` itself: each attention selects its own, or all layers keep equally many."
import copy
import pickle

import pytest
import torch
import transformers as tf

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.inputs import forward
from pruning_bench.graph.attention import Heads
from pruning_bench.graph.saving import load_pruned
from pruning_bench.graph.surgery import removed_indices

tf.logging.set_verbosity_error()
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
WORDS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]}
TOKENS = dict(vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0, vocab_size=64)

def mpt(): return tf.MptForCausalLM(tf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64))
def bloom(): return tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_head=4, n_layer=2, **TOKENS))
def falcon():
    return tf.FalconForCausalLM(tf.FalconConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, alibi=True,
                                                new_decoder_architecture=False, multi_query=False, **TOKENS))
def t5(): return tf.T5ForConditionalGeneration(tf.T5Config(**T5))
def umt5(): return tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5))

# model, batch, groups of heads: T5's first blocks make the biases of all others
CASES = [pytest.param(mpt, WORDS, 2, id="mpt"), pytest.param(bloom, WORDS, 2, id="bloom"),
         pytest.param(falcon, WORDS, 2, id="falcon"), pytest.param(t5, SEQ2SEQ, 3, id="t5"),
         pytest.param(umt5, SEQ2SEQ, 9, id="umt5")]

def made(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    return model

def logits(model, batch):
    with torch.no_grad(): return forward(model, batch).logits

def close(a, b): return torch.allclose(a, b, rtol=0, atol=1e-4 * b.abs().max().item())

@pytest.mark.parametrize("make, batch, groups", CASES)
def test_the_heads_are_units_and_removed_equals_unread(make, batch, groups):
    model = made(make)
    space, unread = Heads(model, [batch]), copy.deepcopy(model)
    assert len(space.groups) == groups and all(len(g) == 4 for g in space.groups.values())
    some = [[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1]]   # another number in every group, and not the first ones
    kept = {n: torch.tensor(some[i % 3]).bool() for i, n in enumerate(space.groups)}
    for (p, d), lost in removed_indices(space.groups, kept).items():
        if any((p, d) in g.consumes for g in space.groups.values()):
            unread.get_parameter(p).data.index_fill_(d, torch.as_tensor(lost), 0)
    space.apply({n: (None, k) for n, k in kept.items()})
    space.remove()
    assert close(logits(model, batch), logits(unread, batch))
    assert not close(logits(model, batch), logits(made(make), batch))

@pytest.mark.parametrize("make, batch, groups", CASES)
def test_a_model_cut_twice_is_rebuilt_copied_and_trained(make, batch, groups, tmp_path):
    model, other = made(make), made(make)
    prune(model, "random", .25, space="heads", data=[batch], seed=1).save(tmp_path / "first")
    load_plan(tmp_path / "first").apply(other)
    assert torch.equal(logits(other, batch), logits(model, batch))
    prune(model, "random", 1 / 3, space="heads", data=[batch], seed=2).save(tmp_path / "second")
    twins = load_pruned(tmp_path / "second", make()), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins: assert torch.equal(logits(twin.eval(), batch), logits(model, batch))
    forward(model.train(), batch).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

@pytest.mark.parametrize("make", [mpt, bloom, falcon, t5])
def test_generation_with_and_without_a_cache_after_a_cut(make):
    model = made(make)
    prune(model, "random", .5, space="heads", data=[SEQ2SEQ if make is t5 else WORDS], seed=1)
    answers = [model.generate(IDS[:1], attention_mask=WORDS["attention_mask"][:1], max_new_tokens=6, do_sample=False,
                              use_cache=cache, pad_token_id=0, eos_token_id=None) for cache in (True, False)]
    assert torch.equal(*answers)

@pytest.mark.parametrize("make, batch", [(bloom, WORDS), (t5, SEQ2SEQ)])
def test_a_batch_of_another_size_after_a_cut(make, batch):
    model = made(make)
    prune(model, "random", .5, space="heads", data=[batch], seed=1)
    wide = {k: torch.cat([v, v[:1]]) for k, v in batch.items()}
    assert close(logits(model, wide)[:2], logits(model, batch))

def test_a_cache_of_fixed_width_is_named_and_a_batch_without_it_frees_the_streams():
    def rwkv():
        return tf.RwkvForCausalLM(tf.RwkvConfig(hidden_size=32, num_hidden_layers=2, context_length=64, **TOKENS))
    words, plain = {"input_ids": IDS}, {"input_ids": IDS, "use_cache": False}
    with pytest.raises(BadInput, match="returns hidden states.*'use_cache': False"):
        prune(made(rwkv), "l1-filter", {"params": .8}, data=[words])
    model, small = made(rwkv), made(rwkv)
    plan = prune(small, "l1-filter", {"params": .5}, data=[plain], residual=True)
    assert plan.budget["achieved"] >= .5 and logits(small, plain).shape == logits(model, plain).shape
