"Layers that read the same input share one sum, and only these."
import pytest
import torch
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.score import Score
from pruning_bench.core.space import Weights
from pruning_bench.core.stats import act_norm, collect, gram


class Projections(nn.Module):
    "Three projections of one input; `before(i, x)` is what projection i reads."
    def __init__(self, before=lambda i, x: x):
        super().__init__()
        self.layers, self.before = nn.ModuleList(nn.Linear(6, 4) for _ in range(3)), before

    def forward(self, x): return sum(layer(self.before(i, x)) for i, layer in enumerate(self.layers))


def data(): return list(torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)))

def moments(x): return x.T @ x / len(x)

def grams(model, batches=None): # in the order of the layers
    found = gram(Weights(model), batches or data())
    return [found[n][0] for n in Weights(model).names()]


def test_projections_of_one_input_hold_one_tensor():
    found, norms = grams(Projections()), act_norm(Weights(Projections()), data())
    assert found[0].data_ptr() == found[1].data_ptr() == found[2].data_ptr()
    assert torch.allclose(found[0], moments(torch.cat(data())), atol=1e-6)
    assert len({id(t) for t in norms.values()}) == 1 and torch.allclose(norms["layers.0.weight"][0],
                                                                        torch.cat(data()).norm(dim=0))


def test_the_blocks_of_a_language_model_hold_four_moments_for_seven_layers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    found = gram(Weights(lm), [{"input_ids": torch.arange(16)[None]}])
    assert len(found) == 14 and len({id(t) for t in found.values()}) == 8


def double_in_place(i, x): return x.mul_(2) if i else x

@pytest.mark.parametrize("before, factors", [
    (double_in_place, (1, 2, 4)),                     # the same memory with other values
    (lambda i, x: x * 2 ** i, (1, 2, 4)),             # new memory, which may be that of the last one
    (lambda i, x: x.flip(-1) if i == 1 else x, None)])
def test_inputs_that_differ_are_summed_apart(before, factors):
    found, whole = grams(Projections(before), [x.clone() for x in data()]), torch.cat(data())
    wanted = [moments(whole * f) for f in factors] if factors else [moments(v) for v in (whole, whole.flip(-1), whole)]
    for mine, theirs in zip(found, wanted): assert torch.allclose(mine, theirs, rtol=1e-5)


def test_a_layer_that_a_batch_leaves_out_keeps_its_own_sum():
    class Sometimes(Projections):
        def forward(self, x): return sum(layer(x) for i, layer in enumerate(self.layers) if i != 1 or x[0, 0] > 0)
    batches = data()
    taken = [x for x in batches if x[0, 0] > 0]
    assert 0 < len(taken) < len(batches)
    first, second, third = grams(Sometimes(), batches)
    assert torch.allclose(second, moments(torch.cat(taken)), atol=1e-6) and first.data_ptr() == third.data_ptr()
    assert torch.allclose(first, moments(torch.cat(batches)), atol=1e-6)


def test_convolutions_share_where_they_cut_the_same_patches():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1),
                                         nn.Conv2d(3, 4, 3, padding=1, dilation=1, stride=2), nn.Conv2d(3, 4, 1)])
        def forward(self, x): return [layer(x) for layer in self.layers]
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(2, 3, 6, 6)
    found = [*gram(Weights(model), [x]).values()]
    alone = [*(gram(Weights(layer), [x])["weight"] for layer in model.layers)]
    assert found[0] is found[1] and len({id(t) for t in found}) == 3
    for mine, theirs in zip(found, alone): assert torch.equal(mine, theirs)


def test_data_made_under_inference_mode():
    with torch.inference_mode(): batches = [x.clone() for x in data()]
    for mine in grams(Projections(), batches): assert torch.allclose(mine, moments(torch.cat(data())), atol=1e-6)


def test_statistics_of_one_input_reach_every_layer():
    stats = collect(Weights(Projections()), data(), {"act_norm", "gram"})
    assert stats["layers.0.weight"].gram is stats["layers.2.weight"].gram


def test_a_score_that_nothing_reads_is_neither_computed_nor_recorded():
    calls = []
    counted = Score(lambda w, s: calls.append(1) or w.abs(), "counted")
    plan = prune(Projections(), "sparsegpt", .5, data=data())
    assert "score" not in plan.provenance and plan.provenance["solve"].startswith("sparsegpt")
    with pytest.raises(BadInput, match="'sparsegpt' ranks by its own score 'obs'"):
        prune(Projections(), "sparsegpt", .5, data=data(), score=counted)
    assert not calls
    plan = prune(Projections(), "sparsegpt", .5, data=data(), score=counted, allocate="global")
    assert len(calls) == 3 and plan.provenance["score"] == "counted"


def test_what_was_pruned_before_stays_pruned_without_a_score():
    model = Projections()
    first = prune(model, "random", .3)
    second = prune(model, "sparsegpt", .6, data=data())
    assert all((first.masks[n] | ~m).all() for n, m in second.masks.items())
    assert sum(int(m.sum()) for m in second.masks.values()) == round(.4 * 72)
