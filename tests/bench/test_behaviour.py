"What changed for whom: every measure against a case worked out by hand."
import math

import pytest
import torch
import torch.nn.functional as F

from pruning_bench.bench.measure.behaviour import (classification_metrics, dense_comparison, ece, flips, kl_divergence,
                                                   reliability_bins, prediction_changes, worst_class)
from pruning_bench.core.inputs import BadInput

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
DENSE, PRUNED = (F.one_hot(torch.tensor(a), 3).float() for a in ([0, 0, 1, 2, 2, 1], [0, 1, 1, 1, 2, 0]))

def some(n=200, classes=5, seed=0): return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * 2


# against the dense model

def test_flips_and_their_kinds_by_hand():
    assert flips(DENSE, PRUNED) == .5
    assert prediction_changes(PRUNED, DENSE, LABELS) == pytest.approx({"lost": 1 / 6, "gained": 1 / 6,
                                                                       "swapped": 1 / 6})
    assert prediction_changes(DENSE, PRUNED, LABELS) == pytest.approx({"lost": 1 / 6, "gained": 1 / 6,
                                                                       "swapped": 1 / 6})

@pytest.mark.parametrize("seed", range(5))
def test_kinds_add_up_and_explain_the_change_of_accuracy(seed):
    a, b, labels = some(seed=seed), some(seed=seed + 50), torch.arange(200) % 5
    kinds, accuracy = prediction_changes(a, b, labels), lambda l: classification_metrics(l, labels)["accuracy"]
    assert sum(kinds.values()) == pytest.approx(flips(a, b), abs=1e-6) and flips(a, b) == flips(b, a)
    assert kinds["gained"] - kinds["lost"] == pytest.approx(accuracy(a) - accuracy(b), abs=1e-6)
    back = prediction_changes(b, a, labels)
    assert (back["lost"], back["gained"], back["swapped"]) == (kinds["gained"], kinds["lost"], kinds["swapped"])

def test_kl_by_hand():
    even, tilted = torch.tensor([[.5, .5]]).log(), torch.tensor([[.25, .75]]).log()
    assert kl_divergence(even, tilted) == pytest.approx(math.log(4 / 3) / 2, abs=1e-7)
    # not symmetric
    assert kl_divergence(tilted, even) == pytest.approx(.25 * math.log(.5) + .75 * math.log(1.5), abs=1e-7)
    assert kl_divergence(torch.cat([even, even]),
                         # a mean over examples
                         torch.cat([tilted, even])) == pytest.approx(math.log(4 / 3) / 4, abs=1e-7)
    # certainty where the dense model has none
    assert kl_divergence(torch.tensor([[0., 0.]]), torch.tensor([[0., -math.inf]])) == math.inf

def test_kl_is_zero_for_equal_and_shifted_logits_and_positive_otherwise():
    a, b = some(), some(seed=1)
    assert kl_divergence(a, a) == 0
    assert abs(kl_divergence(a, a + torch.randn(200, 1))) < 1e-6
    assert kl_divergence(a, b) > 0
    values = [kl_divergence(a, a + s * b) for s in (.01, .1, .5, 1.)]
    # quadratic near zero
    assert values == sorted(values) and values[1] / values[0] == pytest.approx(100, rel=.2)

def test_tokens_count_like_examples():
    a, b = some(), some(seed=1)
    assert flips(a.view(20, 10, 5), b.view(20, 10, 5)) == flips(a, b)
    assert kl_divergence(a.view(20, 10, 5), b.view(20, 10, 5)) == pytest.approx(kl_divergence(a, b))

def test_outputs_of_different_examples_are_refused():
    for compare in (flips, kl_divergence, dense_comparison):
        with pytest.raises(BadInput, match=r"\(6, 3\) and \(5, 3\)|\(5, 3\) and \(6, 3\)"): compare(DENSE, PRUNED[:5])
    with pytest.raises(BadInput, match="6 outputs and 5 labels"): classification_metrics(DENSE, LABELS[:5])


# against the labels

def test_worst_class_by_hand():
    # classes that do not occur do not count
    assert worst_class(DENSE, LABELS) == .5 and worst_class(DENSE[:2], LABELS[:2]) == 1
    assert worst_class(PRUNED, LABELS) == .5
    assert worst_class(F.one_hot(torch.tensor([0, 0, 0]), 3).float(), torch.tensor([0, 0, 2])) == 0

def four(): return torch.tensor([[.9, .1], [.9, .1], [.4, .6], [.4, .6]]).log()

def test_ece_by_hand():
    assert ece(four(), torch.tensor([0, 0, 1, 0])) == pytest.approx(.1, abs=1e-6)        # (0.1 + 0.1) / 2
    assert ece(four(), torch.tensor([0, 1, 1, 0])) == pytest.approx((.4 + .1) / 2, abs=1e-6)
    # one bin: modesty and boldness cancel
    assert ece(four(), torch.tensor([0, 0, 1, 0]), bins=1) == pytest.approx(0, abs=1e-6)
    r = reliability_bins(torch.tensor([[.88, .12], [.88, .12], [.36, .64], [.36, .64]]).log(),
                         torch.tensor([0, 0, 1, 0]), bins=10)
    assert r["count"].tolist() == [0] * 6 + [2, 0, 2, 0] and r["accuracy"][6] == .5 and r["accuracy"][8] == 1
    assert r["confidence"][[6, 8]].tolist() == pytest.approx([.64, .88])

def test_ece_of_extremes():
    sure = 100. * F.one_hot(torch.arange(10) % 3, 3).float()
    assert ece(sure, torch.arange(10) % 3) == pytest.approx(0, abs=1e-9)
    assert ece(sure, (torch.arange(10) + 1) % 3) == pytest.approx(1, abs=1e-9)
    # a third of confidence, a third right
    flat = torch.zeros(30, 3)
    assert ece(flat, torch.arange(30) % 3) == pytest.approx(0, abs=1e-9)

def test_ece_of_a_calibrated_and_of_a_bold_model():
    g = torch.Generator().manual_seed(0)
    logits = some(20000)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g).flatten()
    assert ece(logits, labels) < .015 < .1 < ece(3 * logits, labels)

def test_ece_against_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    for seed, bins in ((0, 15), (1, 10), (2, 4)):
        logits, labels = some(500, seed=seed), torch.arange(500) % 5
        theirs = metrics.multiclass_calibration_error(logits.double(), labels, num_classes=5, n_bins=bins, norm="l1")
        assert ece(logits, labels, bins) == pytest.approx(theirs.item(), abs=1e-6)

def test_order_of_examples_and_names_of_classes_do_not_matter():
    logits, labels, dense = some(), torch.arange(200) % 5, some(seed=3)
    p, c = torch.randperm(200), torch.randperm(5)
    one = {**classification_metrics(logits, labels), **dense_comparison(logits, dense)}
    assert {**classification_metrics(logits[p], labels[p]),
            **dense_comparison(logits[p], dense[p])} == pytest.approx(one, abs=1e-5)
    assert {**classification_metrics(logits[:, c], c.argsort()[labels]),
            **dense_comparison(logits[:, c], dense[:, c])} == pytest.approx(one, abs=1e-5)

def test_what_tasks_call():
    got = classification_metrics(DENSE, LABELS)
    assert list(got) == ["accuracy", "loss", "worst_class", "ece"] and got["accuracy"] == pytest.approx(4 / 6)
    assert got["loss"] == pytest.approx((4 * math.log(1 + 2 / math.e) + 2 * math.log(2 + math.e)) / 6, abs=1e-6)
    assert dense_comparison(PRUNED, DENSE) == {"flips": .5, "kl": kl_divergence(DENSE, PRUNED)}
    assert dense_comparison(DENSE, DENSE) == {"flips": 0, "kl": 0}
    assert all(isinstance(v, float) for v in (*got.values(), *dense_comparison(PRUNED, DENSE).values()))
