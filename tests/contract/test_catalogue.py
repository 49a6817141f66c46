"What the table of methods says of every registered method is true on the smallest world of its space."
import functools
import json

import pytest
import torch

from pruning_bench import BadInput, build, methods, prune, pruning
from pruning_bench.core.catalogue import PATTERN_KINDS, RULES, SMALL_TASKS, hyphenated, measured_minutes
from pruning_bench.core.method import METHODS, describe_method
from pruning_bench.core.pattern import as_pattern
from worlds import NAMES, settings_of, world


@functools.cache
def rows(): return {row["method"]: row for row in methods().to_dict("records")}


WEIGHTS = [n for n in NAMES if build(n).space == "weights"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", PATTERN_KINDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_patterns(name, kind):
    model, data, loss = world(name)
    pattern = PATTERN_KINDS[kind]
    fixed = as_pattern(pattern).fixed
    request = dict(pattern=pattern, sparsity=None if fixed else .5, skip="5.*", **settings_of(name))
    if kind not in rows()[name]["patterns"].split(", "):
        with pytest.raises(BadInput): prune(model, name, data=data, loss=loss, **request)
        return
    plan = prune(model, name, data=data, loss=loss, **request)
    assert plan.density == pytest.approx(.5, abs=.01)
    for n, mask in plan.masks.items():
        if kind == "N:M": assert (mask.view(-1, 4).sum(1) <= 2).all(), n
        if kind == "blocks":
            tiles = mask.view(mask.shape[0] // 4, 4, -1, 4).transpose(1, 2).flatten(2).float().mean(2)
            assert set(tiles.unique().tolist()) <= {0., 1.}


@pytest.mark.parametrize("name", NAMES)
def test_data_and_labels(name):
    row, (model, data, _) = rows()[name], world(name)
    settings = settings_of(name)
    if not row["data"]: assert row["needs"] == "nothing" and prune(model, name, .5, **settings).density < 1
    else:
        with pytest.raises(BadInput, match="data"): prune(model, name, .5, **settings)
        assert row["needs"] != "nothing"
    if row["data"] and not row["labels"]:   # inputs alone, and no loss
        if isinstance(data, torch.utils.data.TensorDataset): data = torch.utils.data.TensorDataset(data.tensors[0])
        elif isinstance(data[0], tuple): data = [x for x, _ in data]
        assert prune(model, name, .5, data, **settings).density < 1


@pytest.mark.parametrize("name", NAMES)
def test_trainings(name):
    row, (model, data, loss) = rows()[name], world(name)
    record = build(name, **settings_of(name))
    assert row["trains"] == build(name).recover.steps and (row["trains"] > 0) == (record.recover.steps > 0)
    if row["trains"]: assert row["labels"] and "training" in row["needs"]
    if row["own_loop"]: return   # the tests of loops run these
    with pytest.raises(BadInput, match="call prune"):
        with pruning(model, name, .5, steps=3, data=data, loss=loss): pass


def test_names_aliases_and_words_of_titles():
    for name in rows(): assert list(methods(name).method) == [name]
    assert list(methods("gmp").method) == ["gradual-magnitude"] and list(methods("sms").method) == ["soup"]
    assert list(methods("lottery-ticket").method) == ["imp"]
    assert list(methods("sft").method) == list(methods("spiel").method) == ["sft"]
    assert {"imp", "imp-late"} <= set(methods("Lottery Ticket Hypothesis").method)
    assert list(methods("second-order information").method) == ["mfac"]
    assert set(methods("*magnitude*").method) == {n for n in rows() if "magnitude" in n}   # a wildcard speaks of names
    assert list(methods("gm?").method) == ["gradual-magnitude"]
    assert methods("no such thing at all").empty and methods("").empty
    taken = [n for c in [*METHODS.values(), *RULES.values()] for n in (c.slug, *c.aliases)]
    assert len(taken) == len(set(taken)) and all(n == hyphenated(n) for n in taken)


def test_another_name_is_answered_with_the_name():
    for name, said in (("gmp", "'gradual-magnitude'"), ("sft", "apply_rule"), ("stable-rps", "apply_rule"),
                       ("imp-latte", "imp-late")):
        model, data, loss = world("magnitude")
        with pytest.raises(BadInput, match=said) as refused: prune(model, name, .5, data, loss)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("name", [*NAMES, *RULES])
def test_descriptions_have_every_setting_with_its_meaning(name):
    card = describe_method(name)
    assert card["what"] and card["paper"] and card["use"] in ("prune", "apply_rule")
    assert all(s["meaning"] and "#" not in s["meaning"] for s in card["settings"])
    if name in METHODS: build(name, **{s["setting"]: s["default"] for s in card["settings"]})
    json.dumps({k: v for k, v in card.items() if k != "settings"})


def write_entry(folder, task, name, seconds, variant="default"):
    "A stored entry with these seconds of pruning, as many of retraining, and a run that could not be done."
    runs = [{"status": "ok", "cost": {"prune_seconds": s, "recover_seconds": s}} for s in seconds]
    runs.append({"status": "infeasible", "cost": None})
    (folder / task).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"method": {"name": name}, "runs": runs})
    (folder / task / f"{name}--{variant}.json").write_text(text)


def test_minutes_are_the_median_of_the_first_small_task_with_an_entry(tmp_path):
    write_entry(tmp_path, "digits-cnn", "one", [30, 3000, 60])
    write_entry(tmp_path, "pydoc-llama", "one", [1])
    write_entry(tmp_path, "digits-mlp", "one", [1], variant="2of4")
    write_entry(tmp_path, "cifar10-resnet20", "two", [1])
    write_entry(tmp_path, "digits-mlp", "three", [])
    assert measured_minutes(tmp_path) == {"one": (2., "digits-cnn")}
    assert measured_minutes(tmp_path / "nowhere") == {}


def test_minutes_in_the_table_are_those_of_the_stored_entries():
    table, stored = rows(), measured_minutes()
    assert {n for n, row in table.items() if row["task"]} == set(stored) & set(table) and set(stored) <= set(table)
    for name, row in table.items():
        if not row["task"]: assert row["minutes"] != row["minutes"]   # not a number: nothing was measured
        else: assert row["task"] in SMALL_TASKS and (row["minutes"], row["task"]) == stored[name]
    assert describe_method("sft")["minutes"] is None or "sft" in stored
