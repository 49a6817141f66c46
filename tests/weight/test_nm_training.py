"N:M training: what is seen, what learns, two masks from one weight; exactly, and orderings over three seeds."
import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.bench.task import find_task
from pruning_bench.core.inputs import seeded
from pruning_bench.core.rule import Rule, apply_rule
from pruning_bench.core.pattern import Pattern, as_pattern
from pruning_bench.core.recovery import Recovery, finetune
from pruning_bench.core.space import Weights
from pruning_bench.weight.nm_training import (DECAYS, MaskedSTE, bidirectional_masks, nm_mask, mask_decay_rule,
                                              group_sizes_kept, ste_rule, structure_decay_rule)

METHODS = ["nm-ste", "sr-ste", "mdgf", "sdgf", "bdwp"]
ALL = Pattern("4:4", lambda scores, fraction: torch.ones_like(scores, dtype=torch.bool), divides=(1, 4))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

def conv(seed=0, groups=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False))

def batches(seed=0, shape=(16,), classes=8):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, *shape, generator=g), torch.randint(0, classes, (16,), generator=g)) for _ in range(3)]

def one_pass(model, rule, x, pattern):
    "Output, gradients of the input and of every weight, and the masks, for one sum of squares under a rule."
    space, x = Weights(model), x.clone().requires_grad_()
    with apply_rule(rule, space, .5, 1, pattern) as training:
        weights = list(training.weight.values())
        y = model(x)
        y.square().sum().backward()
        found = (y.detach(), x.grad, [w.grad.clone() for w in weights],
                 [nm_mask(training.w(n), training) for n in training.names])
        torch.optim.SGD(model.parameters(), 0.).step()
    return found


# masks

@pytest.mark.parametrize("n,m", [(1, 4), (2, 4), (3, 4), (2, 8)])
def test_the_largest_weights_of_a_group_are_the_best_of_all_its_masks(n, m):
    w = torch.randn(6, 2 * m, generator=torch.Generator().manual_seed(m))
    mask = as_pattern(f"{n}:{m}")(w.abs(), n / m)
    for group, kept in zip(w.view(-1, m), mask.view(-1, m)):
        errors = {c: group[[i for i in range(m) if i not in c]].square().sum().item()
                  for c in itertools.combinations(range(m), n)}
        assert tuple(kept.nonzero().flatten().tolist()) == min(errors, key=errors.get)

@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "1:16"])
def test_every_group_keeps_n_of_m(name, pattern):
    n, m = map(int, pattern.split(":"))
    model = net()
    plan = prune(model, name, pattern, batches(), F.cross_entropy, steps=4)
    assert all((mask.view(-1, m).sum(1) == n).all() for mask in plan.masks.values())
    assert all((model[i].weight.view(-1, m) != 0).sum(1).max() <= n for i in (0, 2))

@pytest.mark.parametrize("name", METHODS)
def test_groups_of_a_convolution_run_along_its_input_channels(name):
    model = nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    prune(model, name, "2:4", batches(shape=(8, 5, 5)), F.cross_entropy, steps=3)
    w = model[0][0].weight
    assert ((w.view(8, 2, 4, 3, 3) != 0).sum(2) == 2).all()

@pytest.mark.parametrize("name", METHODS)
def test_what_was_pruned_before_stays_pruned(name):
    model = net()
    prune(model, "random", .5, seed=1)
    dead = [model[i].weight == 0 for i in (0, 2)]
    prune(model, name, "2:4", batches(), F.cross_entropy, steps=5)
    assert all((model[i].weight[d] == 0).all() for i, d in zip((0, 2), dead))

@pytest.mark.parametrize("name", METHODS)
def test_the_cut_keeps_what_the_network_saw(name):
    model, data, seen = net(), batches(), []
    def train(model, data, loss, part=1.):
        finetune(12, 1e-2)(model, data, loss, part)
        with torch.no_grad(): seen.append(model(x))
    x = data[0][0]
    prune(model, name, "1:4", data, F.cross_entropy, recover=Recovery(train, steps=12))
    assert torch.allclose(model(x), seen[0], atol=1e-3)

def test_any_pattern_will_do():
    plan = prune(net(), "sr-ste", .8, batches(), F.cross_entropy, pattern="unstructured", steps=4)
    assert sum(int(m.sum()) for m in plan.masks.values()) == round(.2 * 384)


# gradients

def test_straight_through_by_hand():
    w, mask = torch.tensor([[2., -1, .5, 3]], requires_grad=True), torch.tensor([[True, False, False, True]])
    seen = MaskedSTE.apply(w, mask, .1)
    (seen * torch.tensor([[1., 2, 3, 4]])).sum().backward()
    assert seen.tolist() == [[2, 0, 0, 3]]
    assert torch.allclose(w.grad, torch.tensor([[1., 2 - .1, 3 + .05, 4]]))

def test_without_a_pull_sr_ste_is_straight_through():
    models = net(), net()
    prune(models[0], "nm-ste", "2:4", batches(), F.cross_entropy, steps=6)
    prune(models[1], "sr-ste", "2:4", batches(), F.cross_entropy, steps=6, sparse_decay=0.)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))

def test_a_fading_mask_goes_from_dense_training_to_a_masked_gradient():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    pattern = as_pattern("1:4")
    y, dx, dws, _ = one_pass(net(), Rule(), x, pattern)
    decayed = one_pass(net(), mask_decay_rule(lambda t: 1.), x, pattern)
    assert torch.equal(decayed[0], y) and torch.equal(decayed[1], dx) and all(map(torch.equal, decayed[2], dws))
    mute, through = one_pass(net(), mask_decay_rule(lambda t: 0.), x, pattern), one_pass(net(), ste_rule(), x, pattern)
    assert torch.equal(mute[0], through[0]) and torch.equal(mute[1], through[1])
    assert all(torch.equal(g, h * m) for g, h, m in zip(mute[2], through[2], mute[3]))
    half = one_pass(net(), mask_decay_rule(lambda t: .5), x, pattern)
    assert not torch.equal(half[0], y) and not torch.equal(half[0], mute[0])

def test_decays_start_at_one_and_end_near_zero():
    assert all(d(0.) == 1 and d(1.) < 1e-4 and all(d(a / 20) >= d((a + 1) / 20) for a in range(20))
               for d in DECAYS.values())
    assert DECAYS["linear"](.4) == .5 and DECAYS["linear"](.8) == 0

@pytest.mark.parametrize("pattern,want", [("2:4", [4, 3, 2]), ("1:8", [8, 7, 4, 2, 1]),
                                          ("1:32", [32, 31, 16, 8, 4, 2, 1]), ("7:8", [8, 7]), ("1:2", [2, 1])])
def test_stages(pattern, want): assert group_sizes_kept(as_pattern(pattern)) == want

def test_a_tightening_pattern_shows_what_its_stage_allows():
    model, seen = net(), []
    with apply_rule(structure_decay_rule(as_pattern("1:4")), Weights(model), .25, 8, as_pattern("1:4")):
        opt = torch.optim.SGD(model.parameters(), 1e-3)
        for x, y in (batches() * 3)[:8]:
            seen.append(int((model[0].weight.view(-1, 4) != 0).sum(1).max()))
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert seen == [4, 4, 3, 3, 2, 2, 1, 1]


# both ways

@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_the_three_products_of_bdwp(shape):
    model = nn.Sequential(nn.Linear(16, 8, bias=False)) if shape == "linear" else conv()
    x = torch.randn(3, 16) if shape == "linear" else torch.randn(2, 8, 5, 5)
    w, pattern, space = model[0].weight.detach().clone(), as_pattern("2:4"), Weights(model)
    layer = space.layers["0.weight"]
    def masked(m): return w * layer.tensor(m)
    into, out = masked(pattern(layer.read().abs(), .5)), masked(pattern(layer.read().abs().T.contiguous(), .5).T)
    assert ((out != 0).sum(0) == 4).all()
    assert ((into.view(8, -1) != 0).sum(1) == into[0].numel() // 2).all()
    assert not torch.equal(into, out)
    apply = (lambda x, w: F.linear(x, w)) if shape == "linear" else (lambda x, w: F.conv2d(x, w, padding=1))
    x.requires_grad_()
    with apply_rule(bidirectional_masks(), space, .5, 0, pattern) as training:
        y = model(x)
        dy = torch.randn_like(y)
        dx, dw = torch.autograd.grad(y, [x, training.weight["0.weight"]], dy)
    dense = w.clone().requires_grad_()
    assert torch.allclose(y, apply(x, into), atol=1e-5)
    assert torch.allclose(dx, torch.autograd.grad(apply(x, out), x, dy)[0], atol=1e-5)
    assert torch.allclose(dw, torch.autograd.grad(apply(x.detach(), dense), dense, dy)[0], atol=1e-5)

def test_where_nothing_is_masked_both_ways_are_the_ordinary_layer():
    x = torch.randn(5, 16)
    y, dx, dws, _ = one_pass(net(), Rule(), x, ALL)
    model = net()
    same = one_pass(model, bidirectional_masks(), x, ALL)
    for a, b in zip((same[0], same[1], *same[2]), (y, dx, *dws), strict=True): assert torch.allclose(a, b, atol=1e-5)

def test_gradcheck_fails_by_design_and_only_there():
    torch.manual_seed(0)
    model, pattern = nn.Sequential(nn.Linear(8, 8)).double(), as_pattern("2:4")
    space, x = Weights(model), torch.randn(2, 8, dtype=torch.double, requires_grad=True)
    with apply_rule(ste_rule(), space, .5, 0, pattern):
        assert torch.autograd.gradcheck(model, x)     # straight-through does not touch the gradient of the input
    with apply_rule(bidirectional_masks(), space, .5, 0, pattern):
        assert not torch.autograd.gradcheck(model, x, raise_exception=False)
    with apply_rule(ste_rule(), space, .5, 0, pattern):
        assert torch.autograd.gradcheck(model, x)     # and the hooks are gone again

def test_layers_whose_outputs_do_not_divide_keep_the_gradient_of_their_forward_pass():
    model, pattern = nn.Sequential(nn.Linear(8, 6)), as_pattern("2:4")
    x = torch.randn(3, 8)
    plain, same = (one_pass(copy.deepcopy(model), rule, x, pattern) for rule in (ste_rule(), bidirectional_masks()))
    assert torch.equal(same[1], plain[1])

class Named(nn.Module):
    "A layer that is called with its input as a keyword, or not."
    def __init__(self, layer, key=None):
        super().__init__()
        self.layer, self.key = layer, key
    def forward(self, x): return self.layer(x) if self.key is None else self.layer(**{self.key: x})

def products(make, key, x):
    with seeded(0): model = Named(make(), key)
    return one_pass(model, bidirectional_masks(), x, as_pattern("2:4"))

def gpt2_layer():
    from transformers.pytorch_utils import Conv1D
    return Conv1D(8, 16)

@pytest.mark.parametrize("make, key, shape", [(lambda: nn.Linear(16, 8), "input", (3, 16)),
                                              (lambda: nn.Conv2d(8, 8, 3), "input", (2, 8, 5, 5)),
                                              (gpt2_layer, "x", (3, 16))], ids=["linear", "conv", "gpt2"])
def test_layers_called_with_keywords(make, key, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain, named = products(make, None, x), products(make, key, x)
    for a, b in zip((plain[0], plain[1], *plain[2]), (named[0], named[1], *named[2]), strict=True):
        assert torch.equal(a, b)
    with seeded(0): model = Named(make())
    assert not torch.allclose(plain[1], one_pass(model, ste_rule(), x, as_pattern("2:4"))[1], atol=1e-3)

def test_a_transposed_weight_is_masked_along_its_outputs():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with seeded(0): ours = Named(gpt2_layer())
    twin = Named(nn.Linear(16, 8))
    with torch.no_grad(): twin.layer.weight.copy_(ours.layer.weight.T), twin.layer.bias.copy_(ours.layer.bias)
    a, b = (one_pass(m, bidirectional_masks(), x, as_pattern("2:4")) for m in (ours, twin))
    assert torch.allclose(a[0], b[0], atol=1e-6) and torch.allclose(a[1], b[1], atol=1e-6)

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 4)
    def forward(self, x): return self.head(self.rnn(x[:, None])[0][:, -1])

class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)
    def forward(self, x): return self.head(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])

@pytest.mark.parametrize("make, first, count", [(Recurrent, "rnn.weight_ih_l0", 2),
                                                (Attending, "attention.in_proj_weight", 2)])
def test_layers_with_a_forward_mask_only_are_named(make, first, count):
    with pytest.warns(UserWarning, match=f"{count} layers have only the forward mask, the first is '{first}'") as said:
        prune(make(), "bdwp", None, batches(classes=4), F.cross_entropy, steps=3)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(make(), "nm-ste", None, batches(classes=4), F.cross_entropy, steps=3)
        skip = "rnn.*" if make is Recurrent else "attention.*"
        prune(make(), "bdwp", None, batches(classes=4), F.cross_entropy, steps=3, skip=skip)

def test_evaluation_inside_the_training_is_left_alone():
    model, pattern = net(), as_pattern("2:4")
    x, twin = torch.randn(3, 16), copy.deepcopy(model)
    with (apply_rule(ste_rule(), Weights(model), .5, 0, pattern),
          apply_rule(bidirectional_masks(), Weights(twin), .5, 0, pattern)):
        with torch.no_grad(): assert torch.equal(twin(x), model(x))


# refusals

@pytest.mark.parametrize("name", METHODS)
def test_refusals(name):
    for call, word in ((lambda: prune(net(), name, "1:5", batches(), F.cross_entropy), "does not divide"),
                       (lambda: prune(net(), name, .75, batches(), F.cross_entropy), "contradicts"),
                       (lambda: prune(net(), name, "2:4"), "data"),
                       (lambda: prune(net(), name, "2:4", batches(), F.cross_entropy, recover="none"), "trains")):
        with pytest.raises(BadInput, match=word) as refused: call()
        assert "\n" not in str(refused.value)

def test_an_unknown_decay_and_a_pattern_without_groups():
    with pytest.raises(BadInput, match="exponential"):
        prune(net(), "mdgf", "2:4", batches(), F.cross_entropy, decay="exponentail")
    before = net().state_dict()
    model = net()
    with pytest.raises(BadInput, match="2:4"):
        prune(model, "sdgf", .5, batches(), F.cross_entropy, pattern="unstructured")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# orderings

@pytest.mark.slow
@pytest.mark.parametrize("name", ["nm-ste", "sr-ste", "mdgf", "bdwp"])
def test_at_one_of_thirty_two_training_under_the_pattern_beats_one_cut(name):
    world, gap = find_task("digits-mlp"), []
    for seed in range(3):
        cut, grown = world.dense(seed), world.initial(seed)
        prune(cut, "magnitude", "1:32", world.batches(seed), world.loss, skip="5.weight", recover=world.recover)
        prune(grown, name, "1:32", world.batches(seed), world.loss, skip="5.weight",
              recover=finetune(700, 3e-3, weight_decay=1e-4))
        gap.append(world.evaluate(grown)["accuracy"] - world.evaluate(cut)["accuracy"])
    assert sum(gap) / 3 > .05 and min(gap) > 0
