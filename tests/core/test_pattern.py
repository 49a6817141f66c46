"Patterns on numbers that can be worked out by hand."
from types import SimpleNamespace

import pytest
import torch

from pruning_bench import BadInput
from pruning_bench.core.pattern import (PATTERNS, Pattern, as_pattern, block, count_to_keep, magnitude_threshold, n_m,
                                        per_row, topk_per_row, unstructured)


@pytest.mark.parametrize("fraction, size, count", [(.5, 3, 2), (.49, 3, 1), (0., 5, 0), (1., 5, 5), (.1, 4, 0),
                                                   (.25, 6, 2)])
def test_a_fraction_is_rounded_to_whole_units_and_a_half_goes_up(fraction, size, count):
    assert count_to_keep(fraction, size) == count


def test_each_pattern_by_hand():
    scores = torch.tensor([[8., 1., 2., 3.], [4., 5., 6., 7.]])
    assert unstructured()(scores, .5).int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert per_row()(scores, .5).int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 1]]
    assert n_m(1, 2)(scores, .5).int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert block(1, 2)(scores, .5).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]   # 9, 5, 9, 13
    assert block(2, 1)(scores, .5).int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1]]


def test_ties_of_a_row_go_to_the_lower_index():
    assert topk_per_row(torch.ones(2, 4), 3).int().tolist() == [[1, 1, 1, 0]] * 2
    assert not topk_per_row(torch.ones(2, 4), 0).any()


@pytest.mark.parametrize("shape", [(7, 2), (5, 4), (3, 6, 4), (9, 8), (6, 9), (4, 33), (2, 3, 50)])
@pytest.mark.parametrize("values", [2, 5, 10_000])   # few values: many ties
def test_the_best_of_a_row_are_those_of_a_stable_sort(shape, values):
    g = torch.Generator().manual_seed(values)
    for k in range(shape[-1] + 1):
        scores = torch.randint(-values, values, shape, generator=g).float()
        scores = scores.masked_fill(torch.rand(shape, generator=g) < .1, -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        assert torch.equal(topk_per_row(scores, k), torch.zeros(shape, dtype=torch.bool).scatter_(-1, order, True))
        assert torch.equal(topk_per_row(scores.bfloat16(), k), topk_per_row(scores.bfloat16().float(), k))


def test_removed_units_stay_removed_and_count_nothing_in_a_tile():
    gone = torch.tensor([[-torch.inf, 5., 3., 3.]])
    assert block(1, 2)(gone, .5).int().tolist() == [[0, 0, 1, 1]]      # 5 against 6: the removed one is worth nothing
    assert block(1, 2)(gone + 2, .5).int().tolist() == [[0, 0, 1, 1]] and block(1, 2)(gone * 3 - 5, .5)[0, 1]   # 10, 8
    assert unstructured()(gone, 1.).int().tolist() == [[0, 1, 1, 1]]
    assert n_m(1, 2)(torch.tensor([[-torch.inf, -torch.inf]]), .5).sum() == 0


def test_what_a_pattern_says_of_itself():
    assert (n_m(1, 4).fixed, n_m(1, 4).divides, str(n_m(1, 4))) == (.25, (1, 4), "1:4")
    assert (block(2, 8).fixed, block(2, 8).divides, block(2, 8).name) == (None, (2, 8), "2x8")
    assert (unstructured().divides, unstructured().at_most, n_m().name, block().name) == ((1, 1), 1., "2:4", "4x4")
    assert as_pattern("3:8").name == "3:8" and as_pattern("2x8").divides == (2, 8)
    assert as_pattern("per_row").name == "per_row" and as_pattern(PATTERNS["block"]).name == "4x4"
    own = as_pattern(lambda scores, fraction: scores > 0)
    assert isinstance(own, Pattern) and own.name == "custom"


@pytest.mark.parametrize("n, m", [(0, 4), (4, 4), (5, 4)])
def test_a_pattern_of_nothing_or_of_everything_is_refused(n, m):
    with pytest.raises(BadInput, match="keeps nothing or everything"): n_m(n, m)


@pytest.mark.parametrize("rows, cols, fits", [(4, 8, True), (5, 8, False), (4, 6, False), (2, 8, True)])
def test_a_layer_must_divide(rows, cols, fits):
    layer, pattern = SimpleNamespace(read=lambda: torch.zeros(rows, cols), in_channels=cols), block(2, 4)
    if fits: pattern.check("w", layer)
    else:
        with pytest.raises(BadInput, match=f"does not divide 'w' \\({rows} outputs, {cols} input channels"):
            pattern.check("w", layer)


def test_a_threshold_lies_half_way_between_the_last_kept_and_the_first_removed():
    size = torch.tensor([[1., 2., 3., 5.], [4., 4., 8., 6.]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    assert magnitude_threshold(size, mask, 4).tolist() == [[2.5] * 4, [5.] * 4]
    assert magnitude_threshold(size, mask, 8).tolist() == [[4.5] * 4] * 2
    assert magnitude_threshold(size, torch.ones(2, 4).bool(), 4).tolist() == [[0.] * 4] * 2
