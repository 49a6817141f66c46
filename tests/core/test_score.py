"Scores on numbers that can be worked out by hand."
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruning_bench import BadInput
from pruning_bench.core.mask import attach_mask
from pruning_bench.core.score import SCORES, Score, checked, lamp, magnitude, random, score, snip, unit_scores
from pruning_bench.core.space import Weights


def test_each_score_by_hand():
    w = torch.tensor([[1., -2.], [3., 0.]])
    assert magnitude(w, None).tolist() == [[1., 2.], [3., 0.]]
    assert snip(w, SimpleNamespace(init_grad=torch.tensor([[-5., 1.], [2., 7.]]))).tolist() == [[5., 2.], [6., 0.]]
    assert lamp(w, None).flatten().tolist() == pytest.approx([1 / 14, 4 / 13, 1., 0.])
    assert lamp(torch.zeros(2, 2), None).tolist() == [[0., 0.], [0., 0.]]


def test_random_scores_follow_the_seed_and_fill_the_unit_interval():
    torch.manual_seed(1)
    one = random(torch.zeros(40, 50), None)
    torch.manual_seed(1)
    assert torch.equal(one, random(torch.ones(40, 50), None)) and 0 <= one.min() < .05 and .95 < one.max() < 1


def test_what_scores_say_of_themselves():
    assert snip.needs == {"init_grad"} and not magnitude.needs and random.unit == "any" and magnitude.unit == "weight"
    assert magnitude.scope == "group" and SCORES["lamp"] is lamp
    def own(w, stats): return w
    made = score(["gram"], unit="block", scope="space")(own)
    assert (made.name, made.needs, made.unit, made.scope) == ("own", {"gram"}, "block", "space")
    assert score(["gram"])(own).unit == "weight"   # the same function may be registered again
    def another():
        def own(w, stats): return -w
        return own
    with pytest.raises(BadInput, match="own"): score()(another())
    score(replaces=True)(another())


def weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad(): model[0].weight.copy_(torch.tensor([[1., -2., 3.], [-4., 5., -6.]]))
    attach_mask(model[0], "weight", torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    return Weights(model)


def test_removed_weights_score_minus_infinity():
    found = unit_scores(weights(), magnitude, dict.fromkeys(weights().names()))
    assert found["0.weight"].tolist() == [[1., 2., -torch.inf], [4., 5., 6.]]


def test_a_score_may_speak_of_the_whole_space_at_once():
    asked = []
    def every(space, stats):
        asked.append(stats)
        return {n: space.w(n) * 0 for n in space.names()}
    found = unit_scores(weights(), Score(every, "every", scope="space"), {"x": 1})
    assert asked == [{"x": 1}] and found["0.weight"][0, 2] == -torch.inf and found["0.weight"][0, 0] == 0


def test_scores_of_weights_are_reduced_to_the_units_of_a_space():
    layers = {"w": SimpleNamespace(scored=lambda: torch.tensor([[1., -2.], [3., 4.]]))}
    rows = SimpleNamespace(unit="channel", layers=layers, names=lambda: ["rows"], alive=lambda n: torch.ones(2).bool(),
                           reduce=lambda n, leaf: leaf["w"].sum(1))
    assert unit_scores(rows, magnitude, {"w": None})["rows"].tolist() == [3., 7.]
    rows.w = lambda n: torch.tensor([7., 8.])
    own = Score(lambda w, stats: w + stats, "own", unit="channel")
    assert unit_scores(rows, own, {"rows": 1.})["rows"].tolist() == [8., 9.]
    assert unit_scores(rows, Score(lambda w, stats: w, "own", unit="any"), {"rows": 0})["rows"].tolist() == [7., 8.]


@pytest.mark.parametrize("unit", ["block", "example"])
def test_scores_of_other_units_are_refused(unit):
    with pytest.raises(BadInput, match=f"ranks {unit}s, but this space has weights"):
        unit_scores(weights(), Score(lambda w, stats: w, "own", unit=unit), {})


@pytest.mark.parametrize("made, said", [(torch.zeros(3), "gives \\(3,\\)"), (1., "gives float"),
                                        (torch.full((2, 3), float("nan")), "is not a number in '0.weight'"),
                                        (torch.tensor([[0., 0, 0], [0, 0, float("nan")]]), "is not a number")])
def test_scores_that_are_none_are_refused(made, said):
    with pytest.raises(BadInput, match=said): checked(magnitude, weights(), "0.weight", made)
