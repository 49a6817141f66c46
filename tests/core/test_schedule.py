"Schedules on numbers that can be worked out by hand."
import pytest

from pruning_bench import BadInput
from pruning_bench.core.schedule import (SCHEDULES, Schedule, as_schedule, cubic, fixed_schedule, geometric, linear,
                                         one_shot, polynomial_decay, pruning_steps, ramped_density)


def test_each_schedule_by_hand():
    assert one_shot()(.3) == [.3]
    assert geometric(3)(.125) == pytest.approx([.5, .25, .125]) and geometric(1)(.2) == [.2]
    assert cubic(2)(.2) == pytest.approx([.2 + .8 / 8, .2]) and cubic(2)(.2)[-1] == .2
    assert linear(4)(.2) == pytest.approx([.8, .6, .4, .2])
    assert [len(SCHEDULES[name]()(.5)) for name in ("one_shot", "geometric", "cubic", "linear")] == [1, 5, 10, 10]
    assert geometric(5)(.3)[-1] == .3   # exactly


def test_the_decay_starts_and_ends_where_it_says():
    assert polynomial_decay(.1, 0.) == 1. and polynomial_decay(.1, 1.) == .1
    assert polynomial_decay(.1, .5, start=.5) == pytest.approx(.1 + .4 / 8)
    assert polynomial_decay(.1, .5, power=1) == pytest.approx(.55)


@pytest.mark.parametrize("t, density", [(0., 1.), (.2, 1.), (.4, .1 + .9 * (2 / 3)**3), (.8, .1), (1., .1)])
def test_a_ramp_is_flat_before_and_after(t, density):
    assert ramped_density(.1, t, .2, .8) == pytest.approx(density)


def test_a_ramp_without_length_is_a_step():
    assert ramped_density(.1, .499, .5, .5) == 1. and ramped_density(.1, .5, .5, .5) == 1.
    assert ramped_density(.1, .5001, .5, .5) == .1
    assert ramped_density(.2, .5, 0., 1., power=1) == pytest.approx(.6)


@pytest.mark.parametrize("bad", [[], [.5, .6], [1.1, .5], [.5, 0.], [-.1]])
def test_a_list_that_is_no_schedule_is_refused(bad):
    with pytest.raises(BadInput, match="give falling fractions"): fixed_schedule(bad)


def test_a_list_ends_at_the_budget():
    made = as_schedule([1, .7, .7, .5])
    assert made(.5) == [1., .7, .7, .5] and made.most == 0
    assert made(.5 + 1e-12)[-1] == .5 + 1e-12   # the budget itself, not the list's last
    for keep in (.4, .6):
        with pytest.raises(BadInput, match="let them agree"): made(keep)


def test_steps_are_counted_down():
    assert list(pruning_steps(as_schedule([.9, .7, .5]), .5, None)) == [(.9, 3, 2), (.7, 3, 1), (.5, 3, 0)]


def test_an_adaptive_schedule_ends_when_it_arrives_or_has_no_step_left():
    def made(fractions): return Schedule(lambda keep, space: iter(fractions), "watching", most=4)
    assert list(pruning_steps(made([.9, .5, .3]), .5, None)) == [(.9, 4, 3), (.5, 4, 0)]
    assert list(pruning_steps(made([.9, .8, .7, .6, .5]), .5, None)) == [(.9, 4, 3), (.8, 4, 2), (.7, 4, 1), (.6, 4, 0)]
