"""Entries and the board: nothing derived is stored, nothing incomplete is averaged, nothing is half written."""
import copy
import json
import math
from pathlib import Path

import fastjsonschema
import pytest

from entries import COST, SIZE, SPEED
from pruning_bench import BadInput
from pruning_bench.bench import board, board_rows, board_text
from pruning_bench.bench.board_figures import plot_fronts
from pruning_bench.bench.entry import (ARTEFACTS, PROVENANCE, SCHEMAS, entry_path, notebook_digest, read_entries,
                                       validate, write_json)
from pruning_bench.bench.stored_runs import committed_names
from pruning_bench.bench.verify import RECEIPTS


def make_run(sparsity=.5, seed=0, before=.8, after=.9, **changes):
    return {"sparsity": sparsity, "seed": seed, "status": "ok", "message": None, "plan": "a" * 64, "size": SIZE,
            "cost": COST, "speed": SPEED, "code": "b" * 64,
            "quality": {"after_prune": {"accuracy": before}, "after_recover": {"accuracy": after}}, **changes}


def failed(sparsity=.5, seed=0, status="diverged"):
    return make_run(sparsity, seed, status=status, message="loss is nan", plan=None, size=None, cost=None, speed=None,
                    quality={"after_prune": None, "after_recover": None})


def make_entry(method="magnitude", runs=None, higher=True, stage="trained", variant="default"):
    return {"schema": "entry.v3", "task": {"name": "toy", "digest": "0" * 64, "track": "cnn", "metric": "accuracy",
                                           "higher": higher},
            "method": {"name": method, "variant": variant, "settings": {}, "config": {}, "family": "weight",
                       "stage": stage, "paper": "p", "year": 2020},
            "dense": [{"seed": 0, "quality": {"accuracy": .95}, "size": SIZE, "train_seconds": None}],
            "runs": runs or [make_run(seed=s, after=.9 + s / 100) for s in range(3)],
            "provenance": dict.fromkeys(PROVENANCE)}


def test_a_good_entry_passes_and_survives_json():
    entry = make_entry()
    assert validate(json.loads(json.dumps(entry))) == entry


@pytest.mark.parametrize("change, word", [
    (lambda e: e.update(delta=.1), "delta"),
    (lambda e: e["runs"][0].update(rank=1), "rank"),
    (lambda e: e["runs"][0].update(seed="0"), "seed"),
    (lambda e: e["runs"][0].update(sparsity=1.5), "sparsity"),
    (lambda e: e["runs"][0]["size"].update(mask_density="half"), "mask_density"),
    (lambda e: e["task"].update(digest="abc"), "digest"),
    (lambda e: e.pop("dense"), "dense"),
    (lambda e: e.update(runs=[]), "runs"),
    (lambda e: e["runs"].append(e["runs"][0]), "twice"),
    (lambda e: e["runs"][0].update(status="ok", size=None), "does not fit"),
    (lambda e: e["runs"][0].update(status="diverged", message="x"), "does not fit"),
    (lambda e: e["provenance"].pop("notebook"), "notebook"),
    (lambda e: e["runs"][0].pop("code"), "code"),
    (lambda e: e["runs"][0].update(code="abc"), "code"),
    (lambda e: e.update(schema="entry.v1"), "entry.v1"),
    (lambda e: e.update(schema="entry.v2"), "entry"),
    (lambda e: e["runs"][0].update(quality={"after_prune": {"accuracy": "0.9"}, "after_recover": None}), "quality"),
])
def test_a_bad_entry_is_refused_naming_the_place(change, word):
    entry = copy.deepcopy(make_entry())
    change(entry)
    with pytest.raises(BadInput) as refused:
        validate(entry)
    assert word in str(refused.value) and "\n" not in str(refused.value)


def test_files_are_named_after_their_content(tmp_path):
    entry = make_entry(variant="2:4")
    path = write_json(entry, entry_path(tmp_path, entry))
    assert path.name == "magnitude--2of4.json" and read_entries(tmp_path) == [entry]
    path.rename(path.with_name("wanda--2of4.json"))
    with pytest.raises(BadInput, match="should be magnitude--2of4.json"):
        read_entries(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    write_json(make_entry(), entry_path(tmp_path, make_entry())).write_text("{")
    with pytest.raises(BadInput, match="magnitude--default.json"):
        read_entries(tmp_path)


def test_numbers_that_json_cannot_hold_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError):
        write_json({"x": math.nan}, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_mean_and_deviation_are_computed_from_the_runs():
    row = board_rows.entry_rows([make_entry()]).query("board == 'retrained'").iloc[0]
    assert row.value == pytest.approx(.91) and row.sd == pytest.approx(.01) and row.seeds == 3 and row.removed == .5


def test_a_failed_run_voids_the_mean():
    table = board_rows.entry_rows([make_entry(runs=[make_run(seed=0), make_run(seed=1), failed(seed=2)])])
    assert table.value.isna().all() and set(table.status) == {"1 of 3 diverged"}
    assert "1 of 3 diverged" in board_text.to_markdown(board_text.format_columns(table))


def test_the_order_follows_the_direction_of_the_metric():
    good, bad = make_entry("a", [make_run(seed=s, after=.9)
                                 for s in range(3)]), make_entry("b", [make_run(seed=s, after=.5) for s in range(3)])
    first = lambda entries: board_rows.sort_rows(board_rows.entry_rows(entries).query(
        "board == 'retrained'")).method.iloc[0]
    assert first([good, bad]) == "a"
    for e in (good, bad): e["task"]["higher"] = False
    assert first([good, bad]) == "b"


def test_methods_that_start_untrained_have_a_board_of_their_own():
    assert set(board_rows.entry_rows([make_entry(stage="init")]).board) == {"trained under the mask"}


def test_the_front_holds_what_nothing_beats():
    table = board_rows.entry_rows([make_entry(runs=[make_run(s) for s in (.2, .4, .6, .8)])])
    table = table[table.board == "retrained"].assign(left=[.1, .2, .3, .2], value=[.5, .7, .6, .65])
    def front(t): return list(board_rows.add_fronts(t).front)
    assert front(table) == [True, True, False, False]
    assert front(table.assign(higher=False)) == [True, False, False, False]
    assert front(table.assign(steps=[0., 0., 60., 60.])) == [True, True, False, True]   # fronts of equal training
    line = plot_fronts(table).axes[0].lines[0]   # drawn over the same rows
    assert line.get_xydata().tolist() == [[.1, .5], [.2, .7]]


def test_publishing_is_repeatable_and_keeps_what_people_wrote(tmp_path):
    for m in ("magnitude", "random"):
        write_json(make_entry(m), entry_path(tmp_path / "board" / "entries", make_entry(m)))
    readme, folder = tmp_path / "README.md", tmp_path / "board"
    readme.write_text(f"before\n{board.BEGIN_MARKER}\n{board.END_MARKER}\nafter\n")
    board.publish(folder, readme, index="")
    first = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    board.publish(folder, readme, index="")
    assert first == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")
    assert "*random*" in readme.read_text()
    for version, schema in {**SCHEMAS, **RECEIPTS}.items():
        assert json.loads((folder / "schema" / f"{version}.json").read_text()) == schema


def test_the_schemas_of_the_repository_are_those_of_the_code():
    "Byte for byte, none is missing, and none is left over; what is written passes the file that a reader finds."
    folder = Path(__file__).resolve().parents[2] / "leaderboard"
    pages = board.schema_pages(folder)
    assert {p: p.read_text() for p in (folder / "schema").iterdir()} == pages
    for entry in make_entry(), version_4(make_entry()):
        read = fastjsonschema.compile(json.loads((folder / "schema" / f"{entry['schema']}.json").read_text()))
        assert read(entry)
        with pytest.raises(fastjsonschema.JsonSchemaException, match="rank"): read({**entry, "rank": 1})


def test_a_readme_without_a_place_is_refused():
    with pytest.raises(BadInput, match="BEGIN LEADERBOARD"):
        board.replace_marked("nothing here", "x")


def older(entry):
    "An entry as version 2 wrote it: one digest of the whole package, none per run."
    runs = [{k: v for k, v in r.items() if k != "code"} for r in entry["runs"]]
    method = {"recipe" if k == "config" else k: v for k, v in entry["method"].items()}
    about = {**entry["provenance"], "code": None}
    return {**entry, "schema": "entry.v2", "method": method, "runs": runs, "provenance": about}


def words(table):
    "The column `badge` of a board, once per word."
    return set(board_text.format_columns(table).badge)


def test_entries_of_version_2_are_read_and_are_stale():
    assert validate(older(make_entry())) and words(board_rows.entry_rows([older(make_entry())])) == {"stale"}


def version_4(entry):
    "An entry of version 3 as today's code writes it: with dense weights and artefacts, here none."
    runs = [{**r, "dense_sha256": None, "artefacts": dict.fromkeys(ARTEFACTS)} for r in entry["runs"]]
    return {**entry, "schema": "entry.v4", "runs": runs}


@pytest.mark.parametrize("version", [lambda e: e, version_4])
def test_entries_of_version_3_and_4_are_claimed_while_their_code_is_todays(version):
    entry = version(make_entry())
    entry["task"]["name"] = "digits-mlp"
    assert validate(entry) and words(board_rows.entry_rows([entry])) == {"stale"}
    for r in entry["runs"]: r["code"] = board_rows.current_code(entry)
    assert words(board_rows.entry_rows([entry])) == {"claimed"}
    other = {"entry.v3": "entry.v4", "entry.v4": "entry.v3"}[entry["schema"]]
    with pytest.raises(BadInput, match="runs"): validate({**entry, "schema": other})


def test_every_entry_of_the_repository_is_read_and_an_older_one_has_nothing_stored():
    folder = Path(__file__).resolve().parents[2] / "leaderboard"
    entries = read_entries(folder / "entries")
    assert entries and {e["schema"] for e in entries} <= set(SCHEMAS)
    assert not [e for e in entries if e["schema"] in ("entry.v2", "entry.v3") and committed_names(e)]
    assert not [e for e in entries if e["schema"] == "entry.v2" and not board_rows.is_stale(e["runs"], "c" * 64)]


def test_a_row_is_stale_where_the_code_is_not_todays():
    entry = make_entry()
    entry["task"]["name"] = "digits-mlp"
    assert words(board_rows.entry_rows([entry])) == {"stale"}
    code = board_rows.current_code(entry)
    for r in entry["runs"]: r["code"] = code
    table = board_rows.entry_rows([entry])
    assert len(code) == 64 and words(table) == {"claimed"}
    assert "| claimed |" in board_text.render_markdown(table)
    entry["runs"][-1]["code"] = None
    assert words(board_rows.entry_rows([entry])) == {"stale"}
    entry["runs"][-1]["code"] = "c" * 64
    assert words(board_rows.entry_rows([entry])) == {"stale"}


@pytest.mark.parametrize("where", ["task", "method"])
def test_what_no_longer_exists_is_stale(where):
    entry = make_entry()
    entry["task"]["name"] = "digits-mlp"
    for r in entry["runs"]: r["code"] = board_rows.current_code(entry)
    entry[where]["name"] = "gone"
    assert board_rows.current_code(entry) is None and words(board_rows.entry_rows([entry])) == {"stale"}


def test_outputs_of_a_notebook_do_not_count(tmp_path):
    cell = {"cell_type": "code", "source": ["1 + 1"], "outputs": []}
    a, b = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    a.write_text(json.dumps({"cells": [cell]}))
    b.write_text(json.dumps({"cells": [{**cell, "outputs": ["2"]}]}))
    assert notebook_digest(a) == notebook_digest(b)
