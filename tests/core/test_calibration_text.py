"Calibration text: what is drawn, what is recorded, and what is refused."
import copy

import numpy as np
import pytest
import torch

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.calibration_text import MODES, calibration_windows

DOCUMENTS = [np.arange(a, a + n) for a, n in ((0, 40), (100, 7), (200, 90), (400, 33))]


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_fixes_the_windows_and_each_is_part_of_the_text(mode):
    made = [calibration_windows(DOCUMENTS, windows=5, length=12, mode=mode, seed=s) for s in (0, 0, 1)]
    assert torch.equal(made[0].ids, made[1].ids) and made[0].ids.shape == (5, 12)
    assert torch.equal(made[0].ids, made[2].ids) == (mode == "start")
    text = np.concatenate(DOCUMENTS).tolist()
    for row in made[0].ids.tolist(): assert text[text.index(row[0]):][:12] == row


def test_documents_that_are_too_short_are_never_drawn_and_windows_stay_inside_one():
    ids = calibration_windows(DOCUMENTS, windows=400, length=33).ids
    assert (ids.diff(dim=1) == 1).all() and set((ids[:, 0] // 100).tolist()) == {0, 2, 4}


def test_joined_windows_are_drawn_once_and_start_takes_the_first():
    joined = calibration_windows(DOCUMENTS, windows=14, length=12, mode="joined").ids
    assert torch.equal(joined, calibration_windows(DOCUMENTS, windows=14, length=12, mode="start").ids)
    few = calibration_windows(DOCUMENTS, windows=5, length=12, mode="joined").ids
    assert len(few.unique(dim=0)) == 5


@pytest.mark.parametrize("settings, words", [
    (dict(length=91), "no document has 91 tokens (the longest has 90)"),
    (dict(mode="joined", windows=15, length=12), "need 180 tokens and the text has 170"),
    (dict(mode="start", windows=171, length=1), "need 171 tokens"), (dict(mode="document"), "did you mean documents"),
    (dict(windows=0), "windows=0"), (dict(length=2.5), "length=2.5"), (dict(size="4"), "size='4'"),
    (dict(windows=True), "windows=True"), (dict(seed=-1), "seed=-1")])
def test_refusals(settings, words):
    with pytest.raises(BadInput) as refused: calibration_windows(DOCUMENTS, **{"windows": 2, "length": 12, **settings})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_no_documents_and_one_text():
    for mode in MODES:
        with pytest.raises(BadInput): calibration_windows([], windows=1, length=2, mode=mode)
    with pytest.raises(BadInput, match="pass a list of texts"): calibration_windows("a text", windows=1, length=2)


def test_text_of_the_evaluation_is_refused_wherever_it_stands():
    evaluation = torch.arange(1000, 1300).view(3, 100)
    for at in (1000, 1150, 1268):
        copied = np.concatenate([np.arange(5000, 5010), np.arange(at, at + 32)])
        with pytest.raises(BadInput, match="shares 32 tokens"):
            calibration_windows([copied], windows=1, length=42, evaluation=evaluation)
    calibration_windows(DOCUMENTS, windows=4, length=33, evaluation=evaluation)


def test_short_windows_of_the_evaluation_are_found_too():
    for short in (torch.arange(200, 216).view(2, 8), [[205, 206, 207, 208]]):
        with pytest.raises(BadInput, match="tokens in a row"):
            calibration_windows(DOCUMENTS[2:3], windows=1, length=90, evaluation=short)
    calibration_windows(DOCUMENTS, windows=1, length=33, evaluation=torch.arange(900, 916).view(2, 8))


def test_the_model_must_have_room_and_the_tokens():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=500, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32))
    with pytest.raises(BadInput, match="longer than the context of the model"):
        calibration_windows(DOCUMENTS, windows=2, length=33, model=lm)
    with pytest.raises(BadInput, match="not among the 500"):
        calibration_windows([np.arange(480, 520)], windows=2, length=30, model=lm)
    data = calibration_windows(DOCUMENTS, windows=6, length=32, size=4, model=lm)
    plan = prune(lm, "sparsegpt", "2:4", data=data)
    assert plan.provenance["calibration_text"].startswith("6 windows of 32 tokens, documents, seed 0, text ")


def test_the_plan_keeps_it_on_disk(tmp_path):
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.mlp = torch.nn.Embedding(512, 8), torch.nn.Linear(8, 8)
        def forward(self, input_ids): return self.mlp(self.words(input_ids))
    model, data = Reader(), calibration_windows(DOCUMENTS, windows=3, length=20)
    dense = copy.deepcopy(model)
    prune(model, "wanda", .5, data=data).save(tmp_path / "plan")
    assert load_plan(tmp_path / "plan").provenance["calibration_text"] == data.drawn
    assert "calibration_text" not in prune(dense, "wanda", .5, data=list(data)).provenance
