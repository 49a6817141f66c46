"""A rotating sample of the embedded entries is run again with the code of today. The sample follows from the date, so
that it is the same all day; `PRUNING_BENCH_DAY=2026-12-24` chooses another one. An entry of older code is skipped, with
its name. What is too long for this is made again by `make reproduce`, every night."""
import contextlib
import copy
import datetime
import os
import random
from pathlib import Path

import pytest
import torch

from pruning_bench.bench.board_rows import current_code, is_stale
from pruning_bench.bench.entry import read_entries
from pruning_bench.bench.run import dense_run, make_entry, run_with_status
from pruning_bench.bench.task import find_task
from pruning_bench.bench.verify import EXACT, STAGES, empty_cache, tolerance

ENTRIES = Path(__file__).resolve().parents[2]/"leaderboard"/"entries"
DRAWS, LONGEST = 2, 10.   # cells a day, each of another task; seconds that a cell took when it was made
EMBEDDED = ("digits-", "pydoc-")


def today():
    now = datetime.datetime.now(datetime.timezone.utc)
    return os.environ.get("PRUNING_BENCH_DAY") or now.date().isoformat()


def seconds(entry, run):
    trained = {d["seed"]: d["train_seconds"] or 0 for d in entry["dense"]}
    dense = [trained.get(run["seed"], max(trained.values()))]   # some tasks have one dense model for all seeds
    return sum(dense) + run["cost"]["prune_seconds"] + run["cost"]["recover_seconds"]


def cells(entries):
    "{task: [(entry, run)]} of the runs that are short enough."
    found = {}
    for e in entries:
        if not e["task"]["name"].startswith(EMBEDDED): continue
        mine = [(e, r) for r in e["runs"] if r["status"] == "ok" and r["cost"] and seconds(e, r) <= LONGEST]
        if mine: found.setdefault(e["task"]["name"], []).extend(mine)
    return found


def draw(entries, day):
    "The cells of one day, each of another task."
    known, lot = cells(entries), random.Random(day)
    return [lot.choice(known[task]) for task in lot.sample(sorted(known), min(DRAWS, len(known)))]


@contextlib.contextmanager
def threads(n):
    "Sums over other numbers of threads round differently."
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)


def replay(entry, run):
    "The same run by the code of today, from nothing."
    task, method = find_task(entry["task"]["name"]), entry["method"]
    with empty_cache(), threads(task.threads):
        return run_with_status(task, method["name"], run["sparsity"], run["seed"], method["settings"])[0]


def same_dense(old, new): return old.get("dense_sha256") is not None and old["dense_sha256"] == new["dense_sha256"]


def allowed(entry, old, new, stage):
    """How far a number may be away: the tolerance of a verification where both runs have the same dense model.
    Elsewhere a retrained number may be off by a tenth, or by three times what the seeds differ; one right after pruning
    is open, and so are counts, because another dense model loses other channels."""
    metric = entry["task"]["metric"]
    value = old["quality"][stage][metric]
    seeds = [r["quality"][stage][metric] for r in entry["runs"]
             if r["status"] == "ok" and r["sparsity"] == old["sparsity"] and r["quality"][stage]]
    if same_dense(old, new): return tolerance(seeds, value)
    return max(.1 * abs(value), 3 * (max(seeds) - min(seeds))) if stage == "after_recover" else None


def disagreements(entry, old, new):
    "What differs between a run and its repetition, in words."
    if new["status"] != old["status"]: return [f"{old['status']} became {new['status']} ({new['message']})"]
    exact = EXACT if same_dense(old, new) else ("params",) if entry["method"]["config"]["space"] == "weights" else ()
    said = [f"{k}: {old['size'][k]} became {new['size'][k]}" for k in exact if old["size"][k] != new["size"][k]]
    for stage in (s for s in STAGES if old["quality"][s]):
        limit, metric = allowed(entry, old, new, stage), entry["task"]["metric"]
        was, now = old["quality"][stage][metric], (new["quality"][stage] or {}).get(metric)
        if now is None or limit is not None and not abs(was - now) <= limit:
            said.append(f"{stage}: {was:.6g} became {now}, and {limit:.3g} is allowed")
    return said


@pytest.mark.parametrize("i", range(DRAWS))
def test_an_entry_of_the_day_is_what_it_was(i):
    drawn = draw(read_entries(ENTRIES), today())
    assert len(drawn) == DRAWS
    entry, run = drawn[i]
    method, which = entry["method"], f"sparsity {run['sparsity']:g}, seed {run['seed']}"
    name = f"{entry['task']['name']}/{method['name']}--{method['variant']}, {which}"
    if entry["task"]["digest"] != find_task(entry["task"]["name"]).digest or is_stale([run], current_code(entry)):
        pytest.skip(f"{name} is stale: run `make leaderboard`")
    said = disagreements(entry, run, replay(entry, run))
    assert not said, f"{name}: {said}"


def test_the_sample_stays_for_a_day_and_moves_on():
    entries = read_entries(ENTRIES)
    def names(day): return [(e["task"]["name"], e["method"]["name"], e["method"]["variant"], r["sparsity"], r["seed"])
                            for e, r in draw(entries, day)]
    days = [f"2026-12-{d:02}" for d in range(1, 31)]
    assert all(names(d) == names(d) and len({n[0] for n in names(d)}) == DRAWS for d in days[:3])
    assert len({tuple(names(d)) for d in days}) > 25
    assert {n[0] for d in days for n in names(d)} == set(cells(entries))   # every task has its turn


@pytest.fixture(scope="module")
def fresh():
    "An entry of today, made in a cache of its own."
    task = find_task("digits-mlp")
    with empty_cache(), threads(task.threads):
        runs = [run_with_status(task, "magnitude", .8, 0)[0]]
        return make_entry(task, "magnitude", "default", {}, [dense_run(task, 0)], runs, "0" * 64)


def test_an_entry_of_this_code_is_replayed_and_agrees(fresh):
    run, = fresh["runs"]
    assert not is_stale([run], current_code(fresh)) and seconds(fresh, run) > 0
    again = replay(fresh, run)
    assert same_dense(run, again) and not disagreements(fresh, run, again)


@pytest.mark.parametrize("change, word", [
    (lambda r: r["quality"]["after_prune"].update(accuracy=.1), "after_prune"),
    (lambda r: r["quality"]["after_recover"].update(accuracy=.9 * r["quality"]["after_recover"]["accuracy"]),
     "after_recover"),
    (lambda r: r["quality"].update(after_recover=None), "after_recover"),
    (lambda r: r["size"].update(macs=1), "macs"), (lambda r: r.update(status="diverged", message="x"), "diverged")])
def test_a_repetition_that_is_another_is_noticed(fresh, change, word):
    run, = fresh["runs"]
    other = copy.deepcopy(run)
    change(other)
    assert word in str(disagreements(fresh, run, other))


def test_on_another_dense_model_only_large_differences_count(fresh):
    run, = fresh["runs"]
    other = copy.deepcopy(run) | {"dense_sha256": "f" * 64}
    other["quality"]["after_prune"]["accuracy"] = .1
    other["quality"]["after_recover"]["accuracy"] -= .05
    assert not disagreements(fresh, run, other)
    other["quality"]["after_recover"]["accuracy"] -= .2
    assert "after_recover" in str(disagreements(fresh, run, other))
