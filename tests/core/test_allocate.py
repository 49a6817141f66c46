"Allocations on numbers that can be worked out by hand."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pruning_bench import BadInput
from pruning_bench.core.allocate import (ALLOCATORS, Allocator, as_allocator, erk, global_, keep_current, kth_largest,
                                         proportional_densities, round_to_units, topk_mask, total_density, uniform,
                                         within_alive)
from pruning_bench.core.mask import attach_mask
from pruning_bench.core.space import Weights


def space(unit="weight", alive=None, layers=None, **cost): # groups with costs, and nothing else
    return SimpleNamespace(unit=unit, cost=lambda n: cost.get(n, 1), layers=layers or {},
                           alive=lambda n: torch.tensor(alive[n]))


def test_the_total_density_weighs_groups_by_their_cost():
    scores = {"a": torch.zeros(10), "b": torch.zeros(5)}
    assert total_density({"a": 1., "b": 0.}, scores, space()) == pytest.approx(10 / 15)
    assert total_density({"a": 1., "b": 0.}, scores, space(b=4)) == pytest.approx(10 / 30)
    assert total_density({"a": .2, "b": .6}, scores, space(b=4)) == pytest.approx((2 + 12) / 30)


def test_what_the_built_in_allocators_read():
    assert uniform.shapes_only and erk.shapes_only and keep_current.shapes_only
    assert not global_.shapes_only and not Allocator(lambda *a: {}).shapes_only
    assert ALLOCATORS["erk"] is erk and as_allocator("global") is global_
    asked = []
    reads = Allocator(lambda *a: asked.append(len(a)), needs=frozenset({"gram"}))
    for a in (reads, Allocator(lambda *a: asked.append(len(a)))): a.shares({}, .5, None, {})
    assert asked == [4, 3]   # statistics only where some are declared


@pytest.mark.parametrize("k, kept", [(-1, ""), (0, ""), (1, "1"), (2, "13"), (3, "134"), (4, "0134"), (5, "01234"),
                                     (9, "01234")])
def test_the_highest_scores_stay_and_ties_go_to_the_lower_index(k, kept):
    mask = topk_mask(torch.tensor([1., 3., 1., 3., 2.]), k)
    assert mask.dtype == torch.bool and "".join(str(i) for i in mask.nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("sample", [2, 16, 2**14])
@pytest.mark.parametrize("kind", ["random", "sorted", "reversed", "constant", "one outlier", "period of the sample"])
def test_the_kth_largest_is_that_of_a_sort_whatever_the_sample_says(kind, sample):
    rng = np.random.default_rng(0)
    x = {"random": rng.normal(size=301), "sorted": np.arange(301.), "reversed": -np.arange(301.),
         "constant": np.ones(301), "one outlier": np.r_[np.zeros(300), 1.],
         "period of the sample": np.where(np.arange(301) % (301 // sample or 1), 5., -rng.random(301))}[kind]
    for k in (1, 2, 3, 150, 299, 300, 301):
        assert kth_largest(torch.tensor(x), k, sample) == np.sort(x)[-k], (kind, k)


def test_a_global_ranking_counts_units_where_all_cost_the_same():
    scores = {"a": torch.tensor([[5., 4.], [3., 0.]]), "b": torch.tensor([2., 1.])}
    assert global_(scores, .5, space()) == {"a": .75, "b": 0.}
    assert global_(scores, .5, space(a=7, b=7)) == {"a": .75, "b": 0.}
    assert global_(scores, 5 / 6, space()) == {"a": .75, "b": 1.}


def test_a_global_ranking_spends_a_budget_of_cost():
    scores = {"dear": torch.tensor([6., 3., 1.]), "cheap": torch.tensor([5., 4., 2.])}
    costs = space(dear=4, cheap=1)   # in order of the scores: 4 1 1 4 1 4 of 15; a unit is in with half of its cost
    assert global_(scores, 2 / 15, costs) == {"dear": 1 / 3, "cheap": 0.}
    assert global_(scores, 4.4 / 15, costs) == {"dear": 1 / 3, "cheap": 0.}
    assert global_(scores, 4.6 / 15, costs) == {"dear": 1 / 3, "cheap": 1 / 3}
    assert global_(scores, 8.1 / 15, costs) == {"dear": 2 / 3, "cheap": 2 / 3}
    assert global_(scores, 1., costs) == {"dear": 1., "cheap": 1.}


def test_erk_is_the_sum_of_the_shape_over_its_product():
    layers = {"a": SimpleNamespace(shape=(100, 300)), "b": SimpleNamespace(shape=(20, 10, 5, 5))}
    found = erk(dict.fromkeys(layers), .02, space(layers=layers))
    assert found["a"] * 100 * 300 / (100 + 300) == pytest.approx(found["b"] * 20 * 10 * 25 / (20 + 10 + 5 + 5))
    assert found["a"] * 30000 + found["b"] * 5000 == pytest.approx(.02 * 35000)
    with pytest.raises(BadInput, match="use 'uniform'"): erk({**layers, "c": None}, .1, space("channel", layers=layers))


def test_densities_above_one_are_capped_and_the_others_share_the_rest():
    size = {"a": 10, "b": 10, "c": 20}
    assert proportional_densities({"a": 1, "b": 2, "c": 3}, size, .45) == pytest.approx({"a": .2, "b": .4, "c": .6})
    found = proportional_densities({"a": 4, "b": 1, "c": 1}, size, .5)   # 4/7 of 20 units do not fit into ten
    assert found == pytest.approx({"a": 1., "b": 1 / 3, "c": 1 / 3})
    assert proportional_densities(dict.fromkeys(size, 1), size, 1.) == pytest.approx(dict.fromkeys(size, 1.))
    assert proportional_densities({"a": 9, "b": 3, "c": 1}, size, 1.) == pytest.approx(dict.fromkeys(size, 1.))


def test_densities_respect_a_largest_one_of_each_group():
    size, most = {"a": 10, "b": 10, "c": 20}, {"a": .2, "b": 1., "c": 1.}
    found = proportional_densities({"a": 1, "b": 1, "c": 1}, size, .5, most)
    assert found == pytest.approx({"a": .2, "b": 18 / 30, "c": 18 / 30})
    found = proportional_densities({"a": 1, "b": 0, "c": 0}, size, .5, most)   # nobody else was asked for anything
    assert found == pytest.approx({"a": .2, "b": 18 / 30, "c": 18 / 30})
    found = proportional_densities({"a": 1, "b": 1, "c": 1}, size, .8, {"a": .2, "b": .5, "c": 1.})
    assert found == pytest.approx({"a": .2, "b": .5, "c": 1.})   # all are full, and the budget is not met


def test_an_allocation_is_capped_at_the_units_that_are_left():
    size, alive = {"a": 10, "b": 10}, {"a": 3, "b": 10}
    fits = {"a": .3, "b": .5}
    assert within_alive(fits, size, alive) is fits
    assert within_alive({"a": .4, "b": .4}, size, alive) == pytest.approx({"a": .3, "b": .5})
    assert within_alive({"a": .5, "b": .5}, size, {"a": 3, "b": 6}) == pytest.approx({"a": .3, "b": .6})


def test_weights_are_rounded_to_the_budget_by_largest_remainders():
    scores = {"a": torch.zeros(7), "b": torch.zeros(7), "c": torch.zeros(6)}
    assert round_to_units(dict.fromkeys(scores, .5), .5, scores, space()) == {"a": 4 / 7, "b": 3 / 7, "c": .5}
    assert round_to_units({"a": .2, "b": .25, "c": .3}, .2475, scores, space()) == {"a": 1 / 7, "b": 2 / 7, "c": 2 / 6}
    assert round_to_units(dict.fromkeys(scores, 0.), 0., scores, space()) == dict.fromkeys(scores, 0.)
    assert round_to_units({"a": 3 / 7, "b": 0., "c": 0.}, 3 / 20, scores, space()) == {"a": 3 / 7, "b": 0., "c": 0.}


def test_weights_that_are_gone_are_not_counted():
    scores = {"a": torch.tensor([1., 2.] + [-torch.inf] * 8), "b": torch.arange(10.)}
    assert round_to_units({"a": .5, "b": .5}, .5, scores, space()) == {"a": .2, "b": .8}
    assert round_to_units({"a": .5}, .5, {"a": scores["a"]}, space()) == {"a": .2}   # more than is left
    absent = {n: torch.empty(10, device="meta") for n in "ab"}
    masks = {"a": [True] * 2 + [False] * 8, "b": [True] * 10}
    assert round_to_units({"a": .5, "b": .5}, .5, absent, space(alive=masks)) == {"a": .2, "b": .8}


def test_structures_are_rounded_one_by_one_and_none_is_emptied():
    scores = {"a": torch.zeros(4), "b": torch.zeros(2, 10)}
    assert round_to_units({"a": .1, "b": .25}, .2, scores, space("channel")) == {"a": 1 / 4, "b": .3}
    assert round_to_units({"a": .6, "b": .24}, .2, scores, space("weight", a=3)) == {"a": 2 / 4, "b": .2}


def test_the_current_mask_is_kept_layer_by_layer():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    attach_mask(model[0], "weight", torch.arange(12).view(3, 4) < 3)
    weights = Weights(model)
    found = keep_current(dict.fromkeys(weights.names()), .9, weights)
    assert found["0.weight"] == .25 and all(v == 1. for n, v in found.items() if n != "0.weight")
