"Repetitions and receipts: what was typed is noticed, what was edited has no receipt, badges follow from receipts."
import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pruning_bench import BadInput
from pruning_bench.bench import board
from pruning_bench.bench.cli import app
from pruning_bench.bench.entry import entry_digest, entry_path, write_json
from pruning_bench.bench.protocol_files import freeze_tasks
from pruning_bench.bench.task import find_task
from pruning_bench.bench.verify import (badge, compare_entries, empty_cache, job_of, make_receipt,
                                        read_receipts, reproduce, tolerance, write_receipt)


@pytest.fixture(scope="module")
def entry():
    "Two seeds of a cheap method, made in a process of its own."
    from pruning_bench.bench.runner import Job, run_jobs
    job = Job("digits-mlp", "magnitude", "default", (.8,), (0, 1))
    with empty_cache(): return run_jobs([job], 1)[job.name]


def changed(entry, change):
    other = copy.deepcopy(entry)
    change(other)
    return other


def test_the_tolerance_is_the_larger_of_spread_and_share():
    assert tolerance([1., 1.], 2.) == pytest.approx(.04) and tolerance([3.], 2.) == pytest.approx(.04)
    assert tolerance([1., 2., 3.], 2.) == pytest.approx(2.) and tolerance([0., 0.], -1.) == pytest.approx(.02)


@pytest.mark.parametrize("change", [
    lambda e: e["runs"][0]["quality"]["after_recover"].update(accuracy=2.),
    lambda e: e["runs"][1]["quality"]["after_prune"].update(accuracy=-1.),
    lambda e: e["runs"][0]["size"].update(params=1), lambda e: e["runs"][0]["size"].update(macs=1),
    lambda e: e["runs"].append({**e["runs"][0], "seed": 9}),
    lambda e: e["runs"][0].update(sparsity=.7)])
def test_what_was_not_measured_disagrees(entry, change):
    assert all(c["agrees"] for c in compare_entries(entry, entry))
    assert not all(c["agrees"] for c in compare_entries(changed(entry, change), entry))
    assert not make_receipt(changed(entry, change), entry)["agrees"]


def without_numbers(run):
    return {**run, "status": "infeasible", "message": "no", "size": None, "cost": None, "plan": None, "speed": None,
            "quality": {"after_prune": None, "after_recover": None}}


def test_the_way_a_run_ends_is_compared(entry):
    "What is infeasible in both agrees, although it has no numbers; what only one of the two could not do disagrees."
    none = changed(entry, lambda e: e.update(runs=[without_numbers(r) for r in e["runs"]]))
    assert make_receipt(none, none)["agrees"]
    assert not make_receipt(none, entry)["agrees"] and not make_receipt(entry, none)["agrees"]


def test_a_claimed_spread_does_not_widen_the_band(entry):
    "Of two seeds, the higher one is raised: the spread of the claims grows with it."
    lie = changed(entry, lambda e: e["runs"][0]["quality"]["after_recover"].update(accuracy=.99 + .5))
    bad = [c for c in compare_entries(lie, entry) if not c["agrees"]]
    assert [(c["what"], c["seed"]) for c in bad] == [("after_recover", 0)]


def test_from_nothing_in_another_process_on_one_machine(entry, tmp_path, monkeypatch):
    "The dense models are trained again: the cache of the first run is not used, and is as it was."
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    again, = reproduce([entry])
    assert not list(tmp_path.iterdir())
    receipt = make_receipt(entry, again)
    assert receipt["agrees"] and receipt["exact"]


def test_receipts_belong_to_one_content(entry, tmp_path):
    receipt = make_receipt(entry, entry)
    write_receipt(receipt, entry, tmp_path)
    found = read_receipts(tmp_path)
    assert badge(entry, found) == "reproduced" and badge(entry, {}) == "checked"
    assert badge(entry, {}, refused=True) == "claimed" and badge(entry, found, refused=True) == "reproduced"
    edited = changed(entry, lambda e: e["method"].update(year=1999))
    assert badge(edited, found) == "checked" and entry_digest(edited) != entry_digest(entry)
    disagree = {**make_receipt(entry, entry), "agrees": False}
    assert badge(entry, {entry_digest(entry): [receipt, disagree]}) == "disputed"


@pytest.mark.parametrize("change, word", [
    (lambda r: r.update(agrees=False), "follow"), (lambda r: r["cells"][0].update(agrees=False), "follow"),
    (lambda r: r.update(cells=[]), "follow"), (lambda r: r.update(kind="blessed"), "kind"),
    (lambda r: r.update(note="x"), "note"), (lambda r: r.pop("entry"), "entry"),
    (lambda r: r.update(method="<b>"), "markup")])
def test_a_receipt_that_does_not_follow_from_its_cells_is_refused(entry, tmp_path, change, word):
    bad = make_receipt(entry, entry)
    change(bad)
    write_json(bad, tmp_path/"t"/"r.json")
    with pytest.raises(BadInput, match=word): read_receipts(tmp_path)


def test_the_way_from_an_entry_to_its_badge(entry, tmp_path):
    "An entry is written, frozen, checked, made again on the command line, and its row on the board says so."
    path = write_json(entry, entry_path(tmp_path/"entries", entry))
    freeze_tasks(tmp_path/"tasks", [find_task("digits-mlp")])
    def run(*arguments): return CliRunner().invoke(app, [*map(str, arguments), "--folder", str(tmp_path)])
    def row(): return set(board.board_pages(tmp_path, readme=None)[0].badge)
    assert row() <= {"checked", "claimed"}   # a dirty checkout breaks a rule
    assert isinstance(run("verify", path).exception, BadInput)
    assert run("verify", path, "--reproduce").exit_code == 0 and row() == {"reproduced"}
    lie = changed(entry, lambda e: [r["quality"]["after_recover"].update(accuracy=.5) for r in e["runs"]])
    write_json(lie, path)
    assert row() <= {"checked", "claimed"}
    disagrees = run("verify", tmp_path/"entries", "--reproduce")
    assert isinstance(disagrees.exception, RuntimeError) and row() == {"disputed"}
    receipt, = Path(tmp_path/"receipts").rglob("*.json")
    assert json.loads(receipt.read_text())["agrees"] is False


def test_a_job_asks_for_what_the_entry_holds(entry):
    job = job_of(entry)
    assert (job.task, job.method, job.variant, job.sparsities, job.seeds) == (
        "digits-mlp", "magnitude", "default", (.8,), (0, 1))
