"The average density is the integral of the schedule; compute and steps agree; the law is recovered; runs are recorded."
import math

import pytest
import torch
import torch.nn.functional as F

from three_layers import TOTAL, batches, identical, mlp, trained
from pruning_bench import BadInput, build, prune
from pruning_bench.core.recovery import finetune
from pruning_bench.core.rule import apply_rule
from pruning_bench.core.schedule import ramped_density
from pruning_bench.core.space import Weights
from pruning_bench.weight.average_density import (NUMBERS, bootstrap_law, compute_to_steps, fit_law, law, mean_density,
                                                  record_density)

SCHEDULES = [(.2, .25, .75, 3), (.5, 0., 1., 3), (.1, .5, .5, 3), (.3, .2, .9, 1), (.02, 0., .5, 2), (1., .25, .75, 3)]


def integral(keep, start, end, power, until=1., n=40_000):
    "The midpoint rule."
    return sum(ramped_density(keep, (i + .5) / n * until, start, end, power) for i in range(n)) / n * until


# the average

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_average_is_the_integral_of_the_schedule(schedule):
    assert mean_density(*schedule) == pytest.approx(integral(*schedule), abs=1e-6)


def test_the_average_by_hand():
    assert mean_density(.2, .25, .75) == pytest.approx(.5)            # 80 % removed between a quarter and three
    assert mean_density(.3, .4, .4) == pytest.approx(.4 + .6 * .3)    # one cut
    assert mean_density(.5, 0., 1., 1) == pytest.approx(.75)          # a straight line


@pytest.mark.parametrize("keep, start, end, power", SCHEDULES)
def test_fractions_of_the_compute_as_fractions_of_the_steps(keep, start, end, power):
    first, last = compute_to_steps(keep, start, end, power)
    assert 0 <= first <= last <= 1
    whole = integral(keep, first, last, power)
    assert integral(keep, first, last, power, until=first) / whole == pytest.approx(start, abs=1e-4)
    assert integral(keep, first, last, power, until=last) / whole == pytest.approx(end, abs=1e-4)
    ramp = keep + (1 - keep) / (power + 1)   # the average is a harmonic mean of the parts, weighted by their compute
    assert 1 / mean_density(keep, first, last, power) == pytest.approx(start + (end - start) / ramp + (1 - end) / keep)


def test_nothing_removed_and_nothing_left_over():
    assert compute_to_steps(1., .25, .75) == pytest.approx((.25, .75))
    assert compute_to_steps(.2, .25, 1.)[1] == pytest.approx(1.)


# the method

def test_the_density_of_every_step_follows_the_schedule():
    densities, keep, steps = [], .2, 60
    method = build("sparse-pretraining", every=1)
    with apply_rule(record_density(method.rule(method, keep), densities), Weights(mlp()), keep, steps) as training:
        finetune(steps, 1e-2)(training.space.model, batches(), F.cross_entropy)
    first, last = compute_to_steps(keep, .25, .75)
    due = [ramped_density(keep, i / steps, first, last) for i in range(steps)]
    assert len(densities) == steps and densities[0] == 1
    assert max(abs(a - b) for a, b in zip(densities, due)) < 2 / TOTAL * 3   # whole weights in each of three layers
    assert all(b <= a for a, b in zip(densities, densities[1:]))
    assert sum(densities) / steps == pytest.approx(mean_density(keep, first, last), abs=1 / steps)


def test_being_recorded_changes_nothing():
    model, method, densities = mlp(), build("sparse-pretraining", every=7), []
    with apply_rule(record_density(method.rule(method, .25), densities), Weights(model), .25, 20):
        finetune(20, 3e-3)(model, batches(), F.cross_entropy)
    other, plan = trained("sparse-pretraining", every=7)
    assert identical(model, other) and len(densities) == 20
    assert sum(int(m.sum()) for m in plan.masks.values()) == TOTAL // 4


def test_a_weight_that_was_cut_does_not_return_and_each_layer_has_its_share():
    method, seen, model = build("sparse-pretraining", every=2), [], mlp()
    rule = method.rule(method, .25)
    with apply_rule(rule, Weights(model), .25, 20) as training:
        for x, y in batches() * 4:
            if training.step == 20:
                break
            if not training.optimizers:
                opt = torch.optim.SGD(model.parameters(), .1)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
            seen.append({n: training.alive(n).clone() for n in training.names})
    assert all((b[n] <= a[n]).all() for a, b in zip(seen, seen[1:]) for n in a)
    kept = {n: layer.read().ne(0).float().mean().item() for n, layer in Weights(model).layers.items()}
    assert all(v == pytest.approx(.25, abs=.02) for v in kept.values())


def test_it_prunes_by_magnitude_at_the_end_of_the_ramp():
    "Without learning, the cuts of a gradual schedule leave what one cut leaves."
    model, plan = trained("sparse-pretraining", lr=0.)
    other = mlp()
    once = prune(other, "magnitude", .75)
    assert all(torch.equal(m, once.masks[n]) for n, m in plan.masks.items())


def test_start_after_end_is_refused():
    with pytest.raises(BadInput, match="start"):
        build("sparse-pretraining", start=.8, end=.5)


# the law

KNOWN = dict(E=1.7, A=40., alpha=.4, B=9., beta=.5)


def runs():
    n, d = torch.meshgrid(torch.tensor([1e3, 4e3, 2e4, 1e5]), torch.tensor([50., 200., 800.]), indexing="ij")
    return n.flatten(), d.flatten()


def test_a_known_law_is_recovered_and_extrapolates():
    n, d = runs()
    fit = fit_law(n, d, law(KNOWN, n, d))
    assert set(fit) == set(NUMBERS) and all(fit[k] == pytest.approx(v, rel=.01) for k, v in KNOWN.items())
    assert law(fit, 1e6, 5e3).item() == pytest.approx(law(KNOWN, 1e6, 5e3).item(), rel=1e-3)


def test_one_wrong_run_does_not_move_the_law_much():
    n, d = runs()
    y = law(KNOWN, n, d)
    y[5] *= 1.3
    fit = fit_law(n, d, y)
    others = torch.arange(len(y)) != 5
    assert (law(fit, n, d) / y - 1).abs()[others].max() < .02


def test_the_bootstrap_is_seeded_and_covers_the_law():
    n, d = runs()
    g = torch.Generator().manual_seed(0)
    y = law(KNOWN, n, d) * (1 + .002 * torch.randn(len(n), generator=g, dtype=torch.double))
    fits, again = bootstrap_law(n, d, y, draws=8, seed=3), bootstrap_law(n, d, y, draws=8, seed=3)
    assert fits == again and len({f["alpha"] for f in fits}) > 1
    assert all(math.isfinite(v) for f in fits for v in f.values())


@pytest.mark.parametrize("n, d, y, word", [([1, 2, 3, 4, 5], [1, 1, 2, 2, 2], [1.] * 5, "lengths"),
                                           ([1, 2, 3], [1, 2, 3], [1., 1, 1], "five"),
                                           ([1, 2, 3, 4], [1, 2, 3, 4, 5], [1.] * 5, "determine"),
                                           ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1., 1, 1, 1, math.nan], "finite"),
                                           ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [1.] * 5, "above zero")])
def test_runs_that_determine_no_law_are_refused(n, d, y, word):
    with pytest.raises(BadInput, match=word):
        fit_law(n, d, y)
