"Arms of a run: controls keep what they promise to keep, and only that."
import dataclasses

import pytest
import torch

from pruning_bench import BadInput
from pruning_bench.bench.measure.size import macs
from pruning_bench.bench.run import CONTROLS, run_with_status, method_arm, scratch_training
from pruning_bench.bench.suites import with_controls
from pruning_bench.bench.runner import Job
from pruning_bench.bench.task import find_task
from pruning_bench.core.method import METHODS, build
from pruning_bench.core.recovery import finetune, none


@pytest.fixture(scope="module")
def world():
    "digits-cnn with a short training."
    t = find_task("digits-cnn")
    return dataclasses.replace(t, name="brief", train=finetune(60, lr=4e-3), recover=finetune(6, lr=1e-3),
                               config={"steps": 60})


def same_counts(a, b): return all(int(a.masks[n].sum()) == int(b.masks[n].sum()) for n in a.masks)


@pytest.mark.parametrize("method, settings", [("global-magnitude", {}), ("wanda", {}),
                                              ("magnitude", {"pattern": "2:4", "skip": ["stem*"]}), ("snip", {}),
                                              ("gradual-magnitude", {})])
def test_lots_keep_the_count_of_every_layer(world, method, settings):
    _, plan, _, _ = method_arm(world, method, .5, 0, settings, "cpu")
    for control in ("random", "shuffled"):
        model, lot, recipe, _ = CONTROLS[control](world, method, .5, 0, settings, "cpu")
        assert same_counts(plan, lot) and lot != plan and recipe.steps in (6, 60)
    assert lot == CONTROLS[control](world, method, .5, 0, settings,
                                    "cpu")[1] != CONTROLS[control](world, method, .5, 1, settings, "cpu")[1]


def test_the_lottery_repairs_nothing(world):
    dense = world.dense(0)
    model, lot, _, _ = CONTROLS["random"](world, "sparsegpt", .5, 0, {}, "cpu")
    weights = dict(dense.named_parameters())
    assert all(torch.equal(p[p != 0], weights[n][p != 0]) for n, p in model.named_parameters())


def test_lots_of_channels_keep_the_widths(world):
    small, plan, _, _ = method_arm(world, "taylor-filter", .5, 0, {}, "cpu")
    other, lot, _, _ = CONTROLS["random"](world, "taylor-filter", .5, 0, {}, "cpu")
    assert same_counts(plan, lot)
    assert lot != plan
    assert [p.shape for p in small.parameters()] == [p.shape for p in other.parameters()]
    with pytest.raises(BadInput, match="use control 'random'"):
        CONTROLS["shuffled"](world, "l1-filter", .5, 0, {}, "cpu")


def test_scratch_has_the_architecture_and_not_the_weights(world):
    pruned, plan, _, _ = method_arm(world, "l1-filter", .5, 0, {}, "cpu")
    fresh, same, recipe, measurable = CONTROLS["scratch"](world, "l1-filter", .5, 0, {}, "cpu")
    assert same == plan and not measurable and recipe.steps == 66 == scratch_training(world).steps
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in pruned.parameters()]
    assert not torch.equal(fresh.blocks[0].conv1.weight, pruned.blocks[0].conv1.weight)


def test_the_smaller_network_has_about_as_many_parameters(world):
    full = sum(p.numel() for p in world.build().parameters())
    model, plan, recipe, _ = CONTROLS["smaller"](world, "magnitude", .5, 0, {}, "cpu")
    assert plan is None and abs(sum(p.numel() for p in model.parameters()) / full - .5) < .1 and recipe.steps == 66


def test_scratch_b_takes_the_multiplications_that_were_saved(world):
    full, small = macs(world.build(),
                       batch := world.calibration(0)[0]), macs(method_arm(world, "l1-filter", .5, 0, {}, "cpu")[0],
                                                               batch)
    fresh, plan, recipe, measurable = CONTROLS["scratch-b"](world, "l1-filter", .5, 0, {}, "cpu")
    assert recipe.steps == round(60 * full / small + 6) > 100
    assert not measurable
    assert plan == CONTROLS["scratch"](world, "l1-filter", .5, 0, {}, "cpu")[1]
    assert macs(fresh, batch) == small and abs(recipe.steps * small - (60 * full + 6 * small)) <= small
    with pytest.raises(BadInput, match="use control 'scratch'"):
        CONTROLS["scratch-b"](world, "magnitude", .5, 0, {}, "cpu")


@pytest.mark.parametrize("control", [c for c in CONTROLS if c not in ("", "scratch-b")])
def test_every_control_is_a_run_like_any_other(world, control):
    run, model, _ = run_with_status(world, "global-magnitude", .8, 0, {"control": control})
    assert run["status"] == "ok" and set(run) == set(run_with_status(world, "global-magnitude", .8, 0)[0])
    assert run["cost"]["recover_steps"] == (6 if control in ("random", "shuffled") else 66)
    again = run_with_status(world, "global-magnitude", .8, 0, {"control": control})[0]
    assert again["quality"] == run["quality"]


def test_skip_reaches_the_method_and_its_lottery(world):
    for control in ("", "random"):
        _, plan, _, _ = CONTROLS[control](world, "magnitude", .5, 0, {"skip": ["blocks*"]}, "cpu")
        assert plan.masks and not any(n.startswith("blocks") for n in plan.masks)


def test_refusals(world):
    assert "did you mean random" in run_with_status(world, "magnitude", .5, 0, {"control": "randon"})[0]["message"]
    assert "random-subset" in run_with_status(find_task("digits-data"), "el2n", .5, 0,
                                              {"control": "random"})[0]["message"]
    with pytest.raises(BadInput, match="unknown control"): with_controls(Job("digits-mlp", "magnitude"), "chance")
    assert len({j.name for j in with_controls(Job("digits-mlp", "magnitude", "2:4", settings={"pattern": "2:4"}),
                                              "random")}) == 2


def test_a_recovery_that_does_not_count_its_steps_still_heals(world):
    ran = []
    def mine(model, data, loss, part=1.): ran.append(part)
    run, _, _ = run_with_status(dataclasses.replace(world, recover=mine), "global-magnitude", .8, 0)
    assert ran == [1.] and run["quality"]["after_recover"] and run["cost"]["recover_steps"] == 0


def test_a_task_without_retraining_has_one_number_and_no_steps(world):
    run, _, _ = run_with_status(dataclasses.replace(world, recover=none()), "obd", .8, 0)
    assert run["status"] == "ok"
    assert run["quality"]["after_recover"] is None
    assert run["cost"]["backward"] > 0 == run["cost"]["recover_steps"]


def test_the_lottery_of_unlike_units_holds_at_every_budget(world):
    for sparsity in (.35, .95):
        assert run_with_status(world, "truncated-svd", sparsity, 0, {"control": "random"})[0]["status"] == "ok"


# too large for it, or without what they prune
REFUSED = {"obs": "more than 2500", "optembed": "no nn.Embedding"}

@pytest.mark.parametrize("method", [m for m, c in METHODS.items() if c.family == "weight" and m != "imp"])
def test_every_weight_method_has_its_lottery(world, method):
    settings = {"skip": ["stem*"]} if build(method).pattern.fixed else {}   # one input channel is no group of four
    if method in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[method]): CONTROLS["random"](world, method, .5, 0, settings, "cpu")
        return
    _, lot, _, _ = CONTROLS["random"](world, method, .5, 0, settings, "cpu")
    assert abs(lot.sparsity - .5) < .02 and abs(lot.requested - .5) < 1e-6
