"Zero-shot questions: equal, question by question, to the lm-evaluation-harness; hostile input."
import gzip
import json

import pytest
import torch

from pruning_bench.bench.measure.zero_shot import (ZERO_SHOT, Question, answer_scores, ending_scores, encode_pair,
                                                   zero_shot, zero_shot_questions)
from pruning_bench.bench.sources import local_file
from pruning_bench.bench.task import find_task
from pruning_bench.bench.tasks.language import STORY_SOURCES, story_tokenizer
from pruning_bench.core.inputs import BadInput

HERE = local_file(ZERO_SHOT["piqa"][0]) and local_file(STORY_SOURCES["weights"])
needs_data = pytest.mark.skipif(not HERE, reason="the questions or stories260K are not here: set PRUNING_BENCH_DATA")


@pytest.fixture(scope="module")
def stories():
    from transformers import PreTrainedTokenizerFast
    words = PreTrainedTokenizerFast(tokenizer_object=story_tokenizer(), eos_token=story_tokenizer().id_to_token(2))
    return find_task("stories-llama").dense(), words


@needs_data
@pytest.mark.parametrize("name, questions, answers", [("piqa", 1838, 2), ("arc_easy", 2376, 4), ("boolq", 3270, 2),
                                                      ("openbook_qa", 500, 4), ("winogrande", 1267, 2),
                                                      ("lambada_openai", 5153, 1)])
def test_every_set_is_whole(name, questions, answers):
    found = zero_shot_questions(name, None)
    assert len(found) == questions
    assert max({len(q.endings) for q in found}, key=[len(q.endings) for q in found].count) == answers
    assert all(len(q.contexts) == len(q.endings) > q.gold >= 0 for q in found)
    assert all(e.startswith(" ") and e.strip() for q in found for e in q.endings)


@needs_data
def test_padding_and_batches_change_no_score(stories):
    questions = zero_shot_questions("piqa", 6)
    pairs = [p for q in questions for p in zip(q.contexts, q.endings)]
    alone = [ending_scores(*stories, [p])[0] for p in pairs]
    for tokens in (1, 300, 4096):
        together = ending_scores(*stories, pairs, tokens=tokens)
        assert torch.allclose(torch.tensor([s for s, _ in together]), torch.tensor([s for s, _ in alone]), atol=1e-3)


@needs_data
def test_a_long_context_loses_its_oldest_tokens(stories):
    model, words = stories
    (long, _), = ending_scores(model, words, [("Once upon a time. " * 60, " there")], longest=100)
    first, last = encode_pair(words, "Once upon a time. " * 60, " there")
    short = torch.tensor((first + last)[-101:])[None]
    with torch.no_grad(): logp = model(input_ids=short[:, :-1]).logits.log_softmax(-1)[0, -len(last):]
    assert abs(long - logp.gather(1, torch.tensor(last)[:, None]).sum().item()) < 1e-4


@needs_data
def test_the_context_is_that_of_the_model(stories):
    pair = ("Once upon a time. " * 200, " there")
    assert stories[0].config.max_position_embeddings == 512
    assert ending_scores(*stories, [pair]) == ending_scores(*stories, [pair], longest=512)


def test_the_better_answer_is_chosen_for_the_reason_that_is_named():
    q = Question(("x",) * 3, (" a", " bb", " cccc"), 2)
    assert answer_scores([q], [(-1., 0), (-3., 0), (-3.9, 0)])[0] | {"logp": 0} == {"acc": 0, "acc_norm": 1, "logp": 0}
    assert answer_scores([q], [(-3., 0), (-3., 0), (-2., 0)])[0]["acc"] == 1


def test_unknown_sets_and_missing_files_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_BENCH_OFFLINE", "1")
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path))
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="no questions 'mmlu'"): zero_shot(None, None, ["mmlu"])
    with pytest.raises(BadInput, match="zeroshot/piqa"): zero_shot(None, None, ["piqa"])


def harness_task(name, questions, folder):
    "A set as a task of the harness, from a file of its own rows."
    path = folder/f"{name}.json"
    rows = [{"context": q.contexts[0], "contexts": list(q.contexts), "endings": [e[1:] for e in q.endings],
             "gold": q.gold} for q in questions]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "target_delimiter": " ", "metric_list": [{"metric": "acc"}]}
    if len(questions[0].endings) == 1:
        return task | {"output_type": "loglikelihood", "doc_to_text": "{{context}}",
                       "doc_to_target": "{{' ' + endings[0]}}"}   # as in its task `lambada_openai`
    if len(set(questions[0].contexts)) > 1:   # the choices are the beginnings
        return task | {"output_type": "multiple_choice", "doc_to_text": lambda d: d["gold"],
                       "doc_to_choice": lambda d: d["contexts"], "doc_to_target": lambda d: d["endings"][0]}
    return task | {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{endings}}",
                   "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO_SHOT)
def test_fifty_questions_are_scored_as_by_the_harness(name, stories, tmp_path):
    pytest.importorskip("lm_eval", reason="no lm-evaluation-harness: pip install 'pruning_bench[llm]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    questions = zero_shot_questions(name, 50)
    there = simple_evaluate(HFLM(pretrained=stories[0], tokenizer=stories[1]),
                            tasks=[harness_task(name, questions, tmp_path)], bootstrap_iters=0, log_samples=True)
    theirs = sorted(there["samples"][f"local_{name}"], key=lambda s: s["doc_id"])
    ours = answer_scores(questions, ending_scores(*stories, [p for q in questions for p in zip(q.contexts, q.endings)]))
    for us, they in zip(ours, theirs, strict=True):
        assert us["acc"] == int(they["acc"]) and us.get("acc_norm") == they.get("acc_norm", us.get("acc_norm"))
        logp = [r[0] if isinstance(r, (list, tuple)) else r for r in they["filtered_resps"]]
        found = torch.tensor(logp).flatten()[:len(us["logp"])]
        assert torch.allclose(torch.tensor(us["logp"], dtype=torch.float), found, atol=1e-2)


def test_the_files_are_those_that_the_hashes_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path))
    (tmp_path/"zeroshot").mkdir()
    with gzip.open(tmp_path/"zeroshot"/"piqa.jsonl.gz", "wt") as f: f.write("{}\n")
    with pytest.raises(BadInput, match="another file"): zero_shot_questions("piqa")
