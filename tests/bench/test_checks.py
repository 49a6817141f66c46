"""Submitted entries: hostile files are refused in a sentence and leave nothing behind, honest ones pass, and the
protocols by which they are checked follow from the tasks."""
import json
import os
from pathlib import Path

import pytest

from entries import COST, SIZE, SPEED
from pruning_bench import BadInput
from pruning_bench.bench.checks import BOARD_CHECKS, CHECKS, check_files, findings
from pruning_bench.bench.artefacts import put as put_artefact
from pruning_bench.bench.entry import PROVENANCE, entry_path, write_json
from pruning_bench.bench.protocol_files import frozen_protocol, protocol_digest, read_protocols
from pruning_bench.bench.strict_json import MOST_BYTES, read_strict
from pruning_bench.bench.task import find_task

LEADERBOARD = Path(__file__).resolve().parents[2]/"leaderboard"
ENTRIES = sorted((LEADERBOARD/"entries").glob("*/*.json"))


@pytest.fixture(scope="module")
def protocol(): return frozen_protocol(find_task("digits-mlp"))


def honest(protocol):
    "An entry that breaks no rule; its numbers are invented."
    dense = {**SIZE, "mask_density": 1., "nonzero": SIZE["params"], "nonzero_prunable": SIZE["prunable"],
             "nonzero_macs": SIZE["macs"], "bytes": 10**6}
    def size(kept): return {**dense, "mask_density": kept, "nonzero_prunable": round(kept * SIZE["prunable"]),
                            "nonzero": round(kept * SIZE["prunable"]) + SIZE["params"] - SIZE["prunable"],
                            "nonzero_macs": round(kept * SIZE["macs"])}
    times = dict(min=1., p50=2., p90=3., stable=True, speedup=1., low=.9, high=1.1)
    def run(s, seed): return dict(
        sparsity=s, seed=seed, status="ok", message=None, plan="a" * 64, code="b" * 64, size=size(1 - s),
        cost={**COST, "recover_steps": protocol["steps"]["recover"]}, speed={**SPEED, "dense": times, "pruned": times},
        quality={"after_prune": {"accuracy": .9 - s / 10}, "after_recover": {"accuracy": .97 - s / 50}})
    return {"schema": "entry.v3", "task": {k: protocol[k] for k in ("name", "digest", "track", "metric", "higher")},
            "method": {"name": "magnitude", "variant": "default", "settings": {}, "config": {"space": "weights"},
                       "family": "weight", "stage": "trained", "paper": "p", "year": 2020},
            "dense": [dict(seed=s, quality={"accuracy": .97}, size=dense, train_seconds=1.) for s in range(3)],
            "runs": [run(s, seed) for s in (.5, .9) for seed in range(3)],
            "provenance": {**dict.fromkeys(PROVENANCE), "notebook": "c" * 64, "libraries": {"torch": "2"},
                           "date": "2026-01-01", "dirty": False}}


@pytest.fixture
def board(tmp_path, protocol):
    write_json(protocol, tmp_path/"tasks"/"digits-mlp.json")
    entry = honest(protocol)
    return tmp_path, write_json(entry, entry_path(tmp_path/"entries", entry)), entry


def test_an_honest_entry_is_accepted_without_a_word(board):
    folder, path, entry = board
    assert [f.check for f in check_files([path], folder)] == ["controls-are-beside"]
    beside(folder, entry, "random")
    assert check_files([path], folder) == check_files([folder/"entries"], folder) == []


def put(*keys, value):
    def change(e):
        for k in keys[:-1]: e = e[k]
        e[keys[-1]] = value
    change.__name__ = "/".join(map(str, keys))
    return change


BREAKS = [("task-is-frozen", put("task", "digest", value="0" * 64)),
    ("task-is-frozen", put("task", "higher", value=False)),
    ("dense-baseline", put("dense", 0, "quality", "accuracy", value=.6)),
    ("dense-twin", put("runs", 0, "seed", value=7)),
    ("counts-fit", put("runs", 1, "size", "nonzero", value=SIZE["params"] + 1)),
    ("counts-fit", put("dense", 1, "size", "prunable", value=SIZE["params"] + 1)),
    ("no-larger-than-dense", put("runs", 1, "size", "params", value=SIZE["params"] + 1)),
    ("sparsity-is-reached", put("runs", 3, "size", "mask_density", value=.5)),
    ("sparsity-is-reached", put("runs", 0, "size", "nonzero_prunable", value=SIZE["prunable"])),
    ("metrics-are-possible", put("runs", 0, "quality", "after_prune", value={"accuracy": 1.01})),
    ("metrics-are-possible", put("runs", 0, "quality", "after_prune", value={"loss": 1.})),
    ("stages-are-apart", put("runs", 0, "cost", "recover_steps", value=0)),
    ("times-fit", put("runs", 0, "speed", "pruned", "speedup", value=9.)),
    ("times-fit", put("runs", 0, "speed", "dense", "p50", value=9.)),
    ("provenance-is-complete", put("provenance", "dirty", value=True)),
    ("provenance-is-complete", put("provenance", "libraries", value=[])),
    ("provenance-is-complete", put("runs", 2, "code", value=None)),
    ("method-is-known", put("method", "name", value="m\u0430gnitude")),
    ("method-is-known", put("method", "name", value="../magnitude")),
    ("method-is-known", put("method", "name", value="magnitude2")),
    ("names-are-plain", put("method", "variant", value="a | b")),
    ("names-are-plain", put("method", "variant", value="x\n| best | 1 |")),
    ("names-are-plain", put("method", "settings", value={"`": 1})),
    ("names-are-plain", put("method", "paper", value="a\nb")),
    ("names-are-plain", put("runs", 0, "speed", "device", value="[x](http://x)")),
    ("last-state-is-reported", put("runs", 0, "quality", "after_prune", value={"accuracy": .9, "best_accuracy": .95})),
    ("pattern-keeps-its-share", put("method", "settings", value={"pattern": "1:8"})),
    ("dense-has-one-size", put("dense", 2, "size", value={**SIZE, "macs": SIZE["macs"] + 1, "mask_density": 1.})),
    ("bytes-fit-the-counts", put("runs", 0, "size", "bytes_sparse", value=3)),
    ("costs-fit", put("runs", 0, "cost", "prune_seconds", value=-1.)),
    ("timing-has-its-conditions", put("runs", 0, "speed", "rounds", value=1)),
    ("timing-has-its-conditions", put("runs", 0, "speed", "pruned", "low", value=1.05))]
LANGUAGE = dict(track="llm", metric="perplexity", protocol={"tokenizer": "t", "bos": "none", "context": 1, "stride": 1,
                                                           "windows": "all 3", "dtype": "float32"})
OPEN = [("base-weights-are-named", dict(steps=dict(train=0, recover=100))),
    ("data-are-named-by-content", dict(data="cifar")), ("licences-are-named", dict(sources=["a web page"])),
    ("calibration-is-training-data", dict(config={"calibration": "the validation text"})),
    *(("language-protocol-is-complete",
       {**LANGUAGE, "protocol": {k: v for k, v in LANGUAGE["protocol"].items() if k != n}})
      for n in LANGUAGE["protocol"]),
    ("zero-shot-names-its-harness", dict(track="llm", metric="acc_norm")),
    ("generator-protocol-is-complete", dict(track="diffusion"))]
REMARKS = [("budget-is-kept", put("runs", 0, "cost", "recover_steps", value=10**7)),
    ("seeds-are-paired", lambda e: e["runs"].pop()),
    ("quality-falls", lambda e: [r["quality"]["after_recover"].update(accuracy=.1) for r in e["runs"][:3]]),
    ("no-better-than-dense", lambda e: [r["quality"]["after_recover"].update(accuracy=1.) for r in e["runs"]])]


@pytest.mark.parametrize("name, change", BREAKS + REMARKS)
def test_each_rule_notices_that_it_is_broken(protocol, name, change):
    entry = honest(protocol)
    change(entry)
    said = {f.check: f for f in findings(entry, protocol, "x.json")}
    assert name in said
    assert said[name].fatal == (not any(name == n for n, _ in REMARKS)) == CHECKS[name].fatal
    assert str(said[name]).startswith(f"x.json: {name}: ") and said[name].remedy


def test_every_rule_is_broken_by_some_test(): assert {n for n, _ in BREAKS + REMARKS + OPEN} == set(CHECKS)


@pytest.mark.parametrize("name, change", OPEN, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_what_a_protocol_leaves_open_is_noticed(protocol, name, change):
    assert not list(CHECKS[name].fn(honest(protocol), protocol))
    assert list(CHECKS[name].fn(honest(protocol), {**protocol, **change}))


def test_a_complete_protocol_of_a_language_model_is_accepted(protocol):
    rules = {**protocol, **LANGUAGE, "config": {"weights": "a" * 64}, "steps": {"train": 0, "recover": 1}}
    names = "language-protocol-is-complete", "base-weights-are-named", "zero-shot-names-its-harness"
    assert not [s for n in names for s in CHECKS[n].fn(honest(rules), rules)]


def test_runs_start_from_the_one_dense_model_of_the_protocol(protocol):
    entry, rules = honest(protocol), {**protocol, "varies": ["calibration"]}
    for seed, run in enumerate(entry["runs"]): run["dense_sha256"] = "1" * 64
    fn = CHECKS["base-weights-are-named"].fn
    assert not list(fn(entry, rules))
    entry["runs"][0]["dense_sha256"] = "2" * 64
    assert list(fn(entry, rules)) and not list(fn(entry, protocol))   # here a seed draws a dense model of its own


def beside(folder, entry, name, **changes):
    "Another entry of the same folder."
    other = {**entry, **changes, "method": {**entry["method"], "name": name}}
    return write_json(other, entry_path(folder/"entries", other))


def board_words(folder): return {(f.check, Path(f.path).stem) for f in check_files([folder/"entries"], folder)}


def test_entries_are_looked_at_together(board):
    folder, path, entry = board
    assert board_words(folder) == {("controls-are-beside", path.stem)}
    control = beside(folder, entry, "random")
    assert board_words(folder) == set()
    dense = [{**d, "size": {**d["size"], "macs": 2000}} for d in entry["dense"]]
    beside(folder, entry, "random", dense=dense)
    assert board_words(folder) == {("dense-models-agree", control.stem)}


def test_a_receipt_is_believed_as_far_as_it_follows(board):
    from pruning_bench.bench.verify import make_receipt
    folder, path, entry = board
    beside(folder, entry, "random")
    receipt = make_receipt(entry, entry)
    place = entry_path(folder/"receipts", entry)
    write_json(receipt, place)
    assert board_words(folder) == set()
    for cell in (dict(found=.1), dict(claimed=.123456, found=.123456), dict(found=None)):
        write_json({**receipt, "cells": [{**receipt["cells"][0], **cell}]}, place)
        assert board_words(folder) == {("receipts-follow", path.stem)}
    place.write_text("[]")
    assert board_words(folder) == {("receipts-follow", str(folder.name))}
    place.unlink(); place.symlink_to(path)
    assert board_words(folder) == {("receipts-follow", path.stem)}


@pytest.mark.parametrize("kept, pattern, words", [(90, None, 0), (44, None, 1), (45, "2:4", 1)])
def test_stored_masks_are_counted(board, kept, pattern, words):
    import torch
    from pruning_bench.core.plan import Plan
    folder, path, entry = board
    mask = (torch.arange(90) < kept).reshape(9, 10)
    plan = Plan("weights", {"a": mask})
    sha = put_artefact({"mask:a": mask}, folder/"artefacts", {"space": "weights", "plain": True})
    run = {**entry["runs"][0], "plan": plan.digest, "artefacts": {"plan": sha, "weights": None, "outcomes": None}}
    run["size"] = {**run["size"], "mask_density": 1. if kept == 90 else .5}
    settings = {"pattern": pattern} if pattern else {}
    changed = {**entry, "runs": [run], "method": {**entry["method"], "settings": settings}}

    def said(): return [s for name in ("stored-patterns-hold", "artefacts-fit")
                        for s in BOARD_CHECKS[name].fn({str(path): changed}, folder) if s[1] != "file"]
    assert len(said()) == words
    artefact = folder/"artefacts"/f"{sha}.safetensors"
    artefact.write_bytes(b"\x80\x04.")
    assert len(said()) == 1
    artefact.unlink()
    assert not said()   # large files are not committed


def test_files_that_no_entry_commits_are_refused(board):
    folder, path, entry = board
    assert not list(BOARD_CHECKS["artefacts-fit"].fn({str(path): entry}, folder))
    import torch
    put_artefact({"mask:a": torch.ones(9).bool()}, folder/"artefacts", {"space": "weights", "plain": True})
    assert [s[1] for s in BOARD_CHECKS["artefacts-fit"].fn({str(path): entry}, folder)] == ["file"]


def test_every_question_of_the_review_has_an_answer():
    from pruning_bench.bench.review import BY_CONSTRUCTION, QUESTIONS, function_exists, review_table
    table = review_table()
    assert list(table.id) == [f"V{i}" for i in range(1, 27)] == list(QUESTIONS)
    assert ((table.checks != "") | (table.functions != "")).all()
    assert all(function_exists(f) for names in BY_CONSTRUCTION.values() for f in names)
    checks = {*CHECKS.values(), *BOARD_CHECKS.values()}
    assert all(c.covers and {*c.covers} <= {*QUESTIONS} and c.rule.endswith(".") and c.remedy for c in checks)


def test_a_check_that_breaks_down_is_no_pass(protocol):
    entry = honest(protocol)
    entry["runs"][0]["size"] = {}
    broken = {f.check for f in findings(entry, protocol) if "ended in" in f.problem}
    assert broken >= {"counts-fit", "sparsity-is-reached"}


def text(entry): return json.dumps(entry)


HOSTILE = {
    "duplicate key": lambda t: t.replace('"runs"', '"runs": [], "runs"', 1),
    "not a number": lambda t: t.replace('"speedup": 1.0', '"speedup": NaN', 1),
    "infinity": lambda t: t.replace('"speedup": 1.0', '"speedup": 1e999', 1),
    "long integer": lambda t: t.replace('"seed": 0', '"seed": ' + "9" * 5000, 1),
    "deep": lambda t: t.replace('"settings": {}', '"settings": ' + '{"a":' * 50_000 + "1" + "}" * 50_000, 1),
    "unclosed": lambda t: "[" * 100_000, "empty": lambda t: "", "a list": lambda t: "[]", "a word": lambda t: '"entry"',
    "rank": lambda t: t.replace('"schema"', '"rank": 1, "schema"', 1),
    "mean in a run": lambda t: t.replace('"sparsity"', '"mean": 1, "sparsity"', 1),
    "receipt": lambda t: t.replace('"provenance": {', '"receipt": "reproduced", "provenance": {', 1),
    "markup": lambda t: t.replace('"paper": "p"', '"paper": "<script>alert(1)</script>"', 1),
    "image": lambda t: t.replace('"paper": "p"', '"paper": "<img src=x onerror=alert(1)>"', 1),
    "carriage return": lambda t: t.replace('"paper": "p"', '"paper": "p\\rq"', 1),
    "escape": lambda t: t.replace('"paper": "p"', '"paper": "\\u001b[2J"', 1),
    "reversed text": lambda t: t.replace('"paper": "p"', '"paper": "\\u202ep"', 1),
    "half a character": lambda t: t.replace('"paper": "p"', '"paper": "\\ud800"', 1),
    "markup in a key": lambda t: t.replace('"settings": {}', '"settings": {"<b>": 1}', 1),
    "long text": lambda t: t.replace('"paper": "p"', '"paper": "' + "p" * 10_000 + '"', 1),
    "other method": lambda t: t.replace('"name": "magnitude"', '"name": "wanda"', 1),
    "path": lambda t: t.replace('"name": "digits-mlp"', '"name": "../../digits-mlp"', 1),
    "text for a number": lambda t: t.replace('"year": 2020', '"year": "2020"', 1),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence_and_leaves_nothing(board, how):
    folder, path, entry = board
    changed = HOSTILE[how](text(entry))
    assert changed != text(entry)
    path.write_text(changed)
    before = sorted(folder.rglob("*"))
    refused = [f for f in check_files([path], folder) if f.fatal]
    assert refused and all("\n" not in str(f) and "\r" not in str(f) and "\x1b" not in str(f) for f in refused)
    assert sorted(folder.rglob("*")) == before and path.read_text() == changed


def test_bytes_links_sizes_and_places(board):
    folder, path, entry = board
    path.write_bytes(b"\xff\xfe{}")
    assert "UTF-8" in str(check_files([path], folder)[0])
    path.write_text(" " * (MOST_BYTES + 1))
    assert "bytes" in str(check_files([path], folder)[0])
    elsewhere = write_json(entry, folder/"other.json")
    path.unlink(); path.symlink_to(elsewhere)
    assert "link" in str(check_files([path], folder)[0])
    assert "outside" in str(check_files([elsewhere], folder)[0])
    path.unlink(); os.mkfifo(path)
    assert "no file" in str(check_files([path], folder)[0])
    with pytest.raises(BadInput, match="does not exist"): check_files([folder/"nothing"], folder)


def test_a_protocol_that_was_changed_is_refused(board, protocol):
    folder, path, _ = board
    write_json({**protocol, "bound": .1, "threads": 9}, folder/"tasks"/"digits-mlp.json")
    with pytest.raises(BadInput, match="does not follow"): check_files([path], folder)
    write_json({}, folder/"tasks"/"digits-mlp.json")
    with pytest.raises(BadInput, match="lacks"): read_protocols(folder/"tasks")


def test_an_entry_of_an_unknown_task_is_refused(board):
    folder, path, _ = board
    (folder/"tasks"/"digits-mlp.json").unlink()
    assert [f.check for f in check_files([path], folder)] == ["task-is-frozen", "controls-are-beside"]


@pytest.mark.parametrize("path", ENTRIES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_entry_of_this_repository_is_accepted(path, protocols):
    entry = json.loads(path.read_text())
    assert not [str(f) for f in findings(entry, protocols.get(entry["task"]["name"], {}), path.name) if f.fatal]


@pytest.fixture(scope="module")
def protocols(): return read_protocols(LEADERBOARD/"tasks")


def test_the_frozen_protocols_are_those_of_the_tasks(protocols, tmp_path):
    unchecked = set()
    for name, frozen in protocols.items():
        assert protocol_digest(frozen) == frozen["digest"]
        try: assert frozen_protocol(find_task(name)) == frozen, f"run `pruning-bench freeze {name}`"
        except BadInput: unchecked.add(name)   # its data are not here
    assert "digits-mlp" not in unchecked and len(unchecked) < len(protocols)
    assert not unchecked or not os.environ.get("PRUNING_BENCH_DATA")


@pytest.mark.parametrize("n", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_random_changes_end_in_a_value_or_a_sentence(protocol, tmp_path, n):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    base, path = text(honest(protocol)), tmp_path/"e.json"
    leaf = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20)
    whole = st.recursive(leaf, lambda inner: st.lists(inner, max_size=4)
                         | st.dictionaries(st.text(max_size=8), inner, max_size=4))
    @hypothesis.settings(max_examples=n, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.integers(0, len(base)), st.integers(0, 60), st.text(max_size=12), whole)
    def attack(start, length, put, value):
        for changed in (base[:start] + put + base[start + length:], json.dumps(value)):
            path.write_bytes(changed.encode("utf-8", "surrogatepass"))
            try: entry = read_strict(path)
            except BadInput: continue
            if isinstance(entry, dict): list(findings(entry, protocol))
    attack()
