"Tuned trainings: what a run takes from a card, what is refused, and which methods have a job."
import math
from dataclasses import replace

import pandas as pd
import pytest

from pruning_bench import BadInput, build
from pruning_bench.bench.run import make_entry, method_arm, resolve_method, run_with_status, dense_run
from pruning_bench.bench.suites import SUITES
from pruning_bench.bench.task import find_task
from pruning_bench.bench.tuning import LEARNING_RATES, preferred_rate, tune, validation_score
from pruning_bench.core.catalogue import tuned_text
from pruning_bench.core.method import METHODS, describe_method
from pruning_bench.core.recovery import finetune, none

@pytest.fixture(scope="module")
def task(): return replace(find_task("digits-mlp"), train=finetune(6, 3e-3), recover=finetune(4, 3e-3, weight_decay=.1))


def test_a_run_replaces_arguments_of_its_training_and_never_the_steps(task):
    for method, own in (("snip", task.train), ("magnitude", task.recover), ("rigl", task.train)):
        assert resolve_method(task, method, {})[1] is own
        changed = resolve_method(task, method, {"training": {"lr": .5}})[1]
        assert changed.settings == {**own.settings, "lr": .5} and changed.steps == own.steps
        with pytest.raises(BadInput, match="steps"): resolve_method(task, method, {"training": {"steps": 9}})
    for wrong in (.1, "fast", ["lr"], None):
        with pytest.raises(BadInput, match="is not a mapping"): resolve_method(task, "snip", {"training": wrong})
    own = replace(task, recover=lambda model, data, loss, part=1.: None)
    with pytest.raises(BadInput, match="leave training out"): resolve_method(own, "wanda", {"training": {"lr": 1.}})
    with pytest.raises(BadInput, match="no training that was tuned"):
        resolve_method(find_task("digits-cnn"), "snip", {"training": "tuned"})


@pytest.mark.parametrize("method", ["rigl", "magnitude", "gradual-magnitude"])
def test_the_training_that_was_asked_for_is_the_one_that_runs(task, method):
    inside, trained = resolve_method(task, method, {})[2], {}
    for lr in (0., .01):
        model, plan, recipe, _ = method_arm(task, method, .5, 0, {"training": {"lr": lr}}, "cpu")
        if recipe is not None: recipe(model, task.batches(0), task.loss)
        trained[lr] = [p.detach().clone() for p in model.parameters()]
        assert (recipe is None) == inside
    start = (task.initial if METHODS[method].stage == "init" else task.dense)(0)
    biases = [i for i, p in enumerate(start.parameters()) if p.dim() == 1]
    still = [bool((trained[0.][i] == p).all()) for i, p in enumerate(start.parameters()) if i in biases]
    assert all(still) and not any(bool((trained[.01][i] == trained[0.][i]).all()) for i in biases)


@pytest.mark.parametrize("method", ["rigl", "magnitude"])
def test_an_entry_says_which_training_ran(task, method):
    settings = {"training": {"lr": .0125}}
    run, _, _ = run_with_status(task, method, .5, 0, settings)
    entry = make_entry(task, method, "faster", settings, [dense_run(task, 0)], [run], "0" * 64)
    said = entry["method"]["config"]["recover" if method == "rigl" else "retraining"]
    assert "lr=0.0125" in said and f"steps={6 if method == 'rigl' else 4}" in said
    assert entry["method"]["settings"] == settings


def test_a_rate_is_chosen_on_validation_data_of_the_run_of_the_board(task):
    table = tune(task, "magnitude", .5, learning_rates=(1e-6, 1e-2), seeds=(3, 4))
    assert list(table.index) == [1e-6, 1e-2] and list(table.columns) == [3, 4, "mean"]
    assert table.loc[1e-2, "mean"] == pytest.approx((table.loc[1e-2, 3] + table.loc[1e-2, 4]) / 2)
    model, _, recipe, _ = method_arm(task, "magnitude", .5, 3, {"training": {"lr": 1e-2}}, "cpu")
    recipe(model, task.batches(3), task.loss)
    assert table.loc[1e-2, 3] == pytest.approx(task.evaluate(model, "validation")["accuracy"])


def test_a_training_that_diverges_is_never_chosen(task):
    wild = validation_score(task, "magnitude", .5, 0, {"training": {"lr": 1e30}})
    assert math.isnan(wild) or wild < .3
    table = pd.DataFrame({"mean": [.2, float("nan"), .4, .4]}, index=[1., 2., 3., 4.])
    assert preferred_rate(table, True) == 3. and preferred_rate(table, False) == 1.
    with pytest.raises(FloatingPointError, match="every seed"): preferred_rate(table.iloc[1:2], True)


def test_a_task_without_retraining_has_nothing_to_tune(task):
    bare = replace(task, recover=none())
    assert 0 <= validation_score(bare, "magnitude", .5, 0, {}) <= 1
    with pytest.raises(BadInput, match="lr"): tune(bare, "magnitude", .5)


def test_every_weight_method_has_a_job_and_a_rate_of_its_own():
    jobs = SUITES["weight"]()
    assert {j.name for j in SUITES["embedded"]() if j.task == "digits-mlp"} <= {j.name for j in jobs}
    cards = [c for c in METHODS.values() if c.family == "weight" and c.build.__module__.startswith("pruning_bench.")
             and build(c.slug).space in ("weights", "ranks")]   # networks on boards have no tables of rows
    assert {c.slug for c in cards} <= {j.method for make in SUITES.values() for j in make()}
    assert all(j.settings.get("training") == "tuned" for j in jobs)   # or a table would compare recipes
    assert all(METHODS[j.method].tuned[j.task]["lr"] in LEARNING_RATES for j in jobs)
    for name in ("embedded", "weight"): assert len({j.name for j in SUITES[name]()}) == len(SUITES[name]())
    for job in jobs: resolve_method(find_task(job.task), job.method, job.settings)


def test_every_kind_of_row_has_its_random_control():
    jobs = [j for j in SUITES["weight"]() if j.task == "digits-mlp" and "control" not in j.settings]
    kinds = {}
    for j in jobs:
        kind = (j.settings.get("pattern"), str(j.settings.get("skip")), METHODS[j.method].build().space
                if "space" not in j.settings else j.settings["space"])
        for s in j.sparsities: kinds.setdefault((*kind, s), set()).add(j.method)
    assert len(kinds) == 5 and all("random" in methods for methods in kinds.values())


def test_the_card_shows_its_tuned_training():
    assert tuned_text({}) == "" and tuned_text({"a": {"lr": .01, "optimizer": "sgd"}, "b": {"lr": .1}}) \
        == "a: lr=0.01, optimizer='sgd'; b: lr=0.1"
    lr = METHODS["rigl"].tuned["digits-mlp"]["lr"]
    assert describe_method("rigl")["tuned"] == f"digits-mlp: lr={lr:g}"
