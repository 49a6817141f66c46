"Padding counts nowhere: the same tokens give the same decision and the same loss, however they are padded."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core import request, stats
from pruning_bench.core.block_by_block import block_by_block
from pruning_bench.core.inputs import forward, model_loss, target_count
from pruning_bench.core.padding import unpadded, without_padding
from pruning_bench.core.score import Score
from pruning_bench.core.stats import Provider, mean_gradient

transformers = pytest.importorskip("transformers")

LENGTHS = (9, 6, 9, 4)
SENTENCES = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
SIZES = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)

def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        **SIZES)).eval()

def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=4, n_head=4, n_positions=64,
        resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., **SIZES)).eval()

def t5():
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, vocab_size=96, pad_token_id=0,
        eos_token_id=2, dropout_rate=0.)).eval()

def bert():
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)).eval()

MODELS = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert}

def padded(side="right", width=14, sentences=SENTENCES):
    "All sentences in one batch, padded to a width."
    def wide(row): return F.pad(row, (0, width - len(row)) if side == "right" else (width - len(row), 0))
    return {"input_ids": torch.stack([wide(s) for s in sentences]),
            "attention_mask": torch.stack([wide(torch.ones_like(s)) for s in sentences])}

def tight(sentences=SENTENCES):
    "The same sentences in batches of equal length."
    rows = [torch.stack([s for s in sentences if len(s) == n]) for n in sorted({len(s) for s in sentences})]
    return [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows]

READINGS = ("wanda", "sparsegpt", "obd", "snip", "grasp", "block-influence", "attention-heads",
            "taylor-filter", "taylor-gate", "taylor-group")

@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", READINGS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_padding_changes_no_decision(model, how, side):
    settings = {"grasp": {"batch_splits": 1}}.get(how, {})
    plans = [prune(MODELS[model](), how, .5, data, calibration=8, **settings)
             for data in (tight(), [padded(side)], [padded(side, 20)])]
    assert plans[0] == plans[1] == plans[2]

@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", ["wanda", "obd", "snip", "sparsegpt"])
@pytest.mark.parametrize("model", ["t5", "bert"])
def test_padding_changes_no_decision_of_encoders(model, how, side):
    def with_targets(batch):
        rows = batch["input_ids"]
        return {**batch, "labels": rows.masked_fill(batch["attention_mask"] == 0, -100)}
    plans = [prune(MODELS[model](), how, .5, [with_targets(b) for b in data], calibration=8)
             for data in (tight(), [padded(side)])]
    if model == "t5" and side == "left": assert plans[0].density == plans[1].density   # labels begin at the left
    else: assert plans[0] == plans[1]

@pytest.mark.parametrize("how", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_decision_block_by_block(how, side):
    plans = [prune(llama(), how, .5, data, calibration=8, stages=block_by_block())
             for data in (tight(), [padded(side)])]
    assert plans[0] == plans[1]

def test_a_reading_of_the_user_sees_no_padding(monkeypatch):
    seen = []
    def tokens_seen(space, batches, loss=None):
        seen.extend(b["attention_mask"] for b in batches)
        return {n: torch.ones_like(l.read()) for n, l in space.layers.items()}
    monkeypatch.setattr(stats, "PROVIDERS", {"tokens_seen": Provider(tokens_seen, "tokens_seen")})
    monkeypatch.setattr(request, "PROVIDERS", stats.PROVIDERS)
    by_tokens = Score(lambda w, s: w.abs() * s.tokens_seen, "by_tokens", needs=frozenset({"tokens_seen"}))
    prune(llama(), None, .5, [padded()], score=by_tokens)
    assert sum(m.numel() for m in seen) == sum(LENGTHS) and all(m.all() for m in seen)

@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("labelled", [False, True])
def test_padding_has_no_part_in_the_own_loss(model, side, labelled):
    if model != "llama" and side == "left": pytest.skip("its positions are those of the columns")
    net, copies = MODELS[model](), (lambda b: {**b, "labels": b["input_ids"]}) if labelled else (lambda b: b)
    batches = [copies(b) for b in tight()]
    counts = [target_count(net, b) for b in batches]
    with torch.no_grad():
        mean = sum(model_loss(net, b) * n for b, n in zip(batches, counts)) / sum(counts)
        found = model_loss(net, copies(padded(side)))
    assert torch.allclose(found, mean, atol=1e-5)
    assert target_count(net, copies(padded("right"))) == sum(counts)

def test_training_on_padded_text_is_training_on_the_text():
    nets = [llama(), llama()]
    losses = []
    for net, data in zip(nets, ([padded(sentences=SENTENCES[:1])], tight(SENTENCES[:1]))):
        model_loss(net, data[0]).backward()
        losses.append([p.grad for p in net.parameters()])
    for a, b in zip(*losses): assert torch.allclose(a, b, atol=1e-6)

def test_a_gradient_is_a_mean_over_tokens_in_batches_of_any_size():
    from pruning_bench.core.space import Weights
    net = llama()
    space = Weights(net)
    whole, parts = (mean_gradient(space, data, None) for data in ([padded()], tight()))
    for n in whole: assert torch.allclose(whole[n], parts[n], atol=1e-6)
    linear = nn.Linear(4, 3)
    x, y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
    y[7] = -100
    a, b = (mean_gradient(Weights(linear), data, F.cross_entropy)["weight"]
            for data in ([(x, y)], [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]))
    assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(BadInput, match="-100"): mean_gradient(Weights(linear), [(x[7:8], y[7:8])], F.cross_entropy)


# cutting

def test_groups_hold_the_same_tokens_once():
    for side in ("left", "right"):
        parts = unpadded(padded(side))
        rows = [r.tolist() for p in parts for r in p["input_ids"]]
        assert sorted(rows) == sorted(s.tolist() for s in SENTENCES) and all(p["attention_mask"].all() for p in parts)

def test_both_sequences_of_an_encoder_decoder_are_cut():
    labels = torch.tensor([[5, 6, 7, 2, -100], [5, 2, -100, -100, -100]])
    batch = {"input_ids": torch.tensor([[4, 5, 0], [6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
             "labels": labels}
    parts = without_padding([batch], t5())
    assert sorted((p["input_ids"].tolist(), p["labels"].tolist()) for p in parts) == [
        ([[4, 5]], [[5, 6, 7, 2]]), ([[6, 7, 8]], [[5, 2]])]

def test_targets_and_positions_are_cut_with_their_tokens():
    batch = padded()
    shared = {**batch, "position_ids": torch.arange(14)[None], "flag": None}
    marks = torch.where(batch["attention_mask"] == 0, -100, 1)
    for (inputs, y), n in zip(unpadded((shared, marks)), sorted(set(LENGTHS))):
        assert inputs["position_ids"].shape == (1, n) and y.shape == inputs["input_ids"].shape and (y == 1).all()
    classes = torch.arange(4)
    assert sorted(torch.cat([y for _, y in unpadded((batch, classes))]).tolist()) == [0, 1, 2, 3]

def test_what_is_not_padding_stays():
    hole = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1, 1]] * 2)}
    kept = unpadded(hole)
    assert len(kept) == 1 and torch.equal(kept[0]["attention_mask"], hole["attention_mask"])
    audio = {"input_features": torch.zeros(2, 8, 30), "attention_mask": torch.tensor([[1] * 20 + [0] * 10] * 2)}
    contradiction = {**padded(), "labels": torch.ones(4, 14, dtype=torch.long)}
    for batch in (audio, contradiction, torch.ones(2, 3), (torch.ones(2, 3), torch.ones(2))):
        assert unpadded(batch)[0] is batch

def test_an_empty_sentence_is_left_out():
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long),
             "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])}
    parts = unpadded(batch)
    assert sum(len(p["input_ids"]) for p in parts) == 2
    assert all(torch.isfinite(forward(llama(), p).logits).all() for p in parts)
