"Retraining few parameters: what changes, what stays, and low-rank updates that keep every zero."
import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import transformer
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import masks_of, remove_masks
from pruning_bench.core.recovery import RECOVERIES, as_recovery
from pruning_bench.weight.parameter_efficient_retraining import (MaskedLowRank, bias_parameters, biases_and_norms,
                                                                 finetune_norms, head_parameters, low_rank_layers,
                                                                 low_rank_updates, masked_lora, norm_parameters,
                                                                 training_only)

NAMES = ["finetune_biases", "finetune_norms", "finetune_biases_and_norms", "finetune_head"]
CHOSEN = dict(zip(NAMES, (bias_parameters, norm_parameters, biases_and_norms, head_parameters)))


def cnn(dtype=torch.float32):
    with seeded(0):
        return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(),
                             nn.Flatten(), nn.Linear(24, 4)).to(dtype)

def pictures(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 2, 6, 6, generator=g).to(dtype), torch.randint(0, 4, (16,), generator=g))]

def words():
    ids = torch.randint(0, 48, (4, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]

def bits(model): return {n: p.detach().clone() for n, p in model.named_parameters()}
def changed(model, before): return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
def named(model, chosen): return {n for n, p in model.named_parameters() if any(p is q for q in chosen)}
def pruned(model, data, loss=None):
    prune(model, "magnitude", .5, data, loss)
    return model


# a part of the parameters

@pytest.mark.parametrize("kind, biases, norms", [("llama", 0, 5), ("opt", 12, 10), ("gpt2", 8, 10)])
def test_biases_norms_and_heads_of_language_models(kind, biases, norms):
    model = transformer(kind)
    assert (len(bias_parameters(model)), len(norm_parameters(model))) == (biases, norms)
    assert not named(model, bias_parameters(model)) & named(model, norm_parameters(model))
    assert len(biases_and_norms(model)) == biases + norms
    assert head_parameters(model) == [model.get_output_embeddings().weight]

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["cnn", "llama", "opt"])
def test_only_the_named_parameters_change_and_every_zero_stays(name, kind):
    model, data, loss = (cnn(), pictures(), F.cross_entropy) if kind == "cnn" else (transformer(kind), words(), None)
    before = bits(pruned(copy.deepcopy(model), data, loss))
    if kind == "llama" and name == "finetune_biases":
        with pytest.raises(BadInput, match="has no biases"): prune(model, "magnitude", .5, data, loss, recover=name)
        return
    plan = prune(model, "magnitude", .5, data, loss, recover=RECOVERIES[name](3))
    assert changed(model, before) == named(model, CHOSEN[name](model))
    assert all(not model.get_parameter(n)[~m].any() for n, m in masks_of(model).items())
    assert plan == prune(cnn() if kind == "cnn" else transformer(kind), "magnitude", .5, data, loss)
    assert name in plan.provenance["recover"]

def test_flags_are_put_back_and_frozen_parameters_stay_frozen():
    net = pruned(cnn(), None)
    net[1].bias.requires_grad_(False)
    flags, before = {n: p.requires_grad for n, p in net.named_parameters()}, bits(net)
    for name in [*NAMES, "masked_lora"]:
        RECOVERIES[name](2)(net, pictures(), F.cross_entropy)
        assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
    assert "1.bias" not in changed(net, before) and "1.weight" in changed(net, before)
    with pytest.raises(ZeroDivisionError), training_only(net, net[0].parameters(), "layer"): 1 / 0
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags

def test_what_is_missing_or_frozen_is_refused_and_nothing_changes():
    net = nn.Sequential(nn.Linear(6, 4, bias=False))
    before = bits(net)
    for name in ("finetune_biases", "finetune_norms", "finetune_biases_and_norms"):
        with pytest.raises(BadInput, match="that can be trained") as refused:
            prune(net, "magnitude", .5, [(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))], F.cross_entropy,
                  recover=name)
        assert "\n" not in str(refused.value) and not changed(net, before) and not masks_of(net)
    frozen = cnn().requires_grad_(False)
    for name in [*NAMES, "masked_lora"]:
        with pytest.raises(BadInput): RECOVERIES[name](2)(frozen, pictures(), F.cross_entropy)
    assert not changed(frozen, bits(cnn()))

def test_recoveries_have_names_and_settings():
    assert str(as_recovery("finetune_norms")) == "finetune_norms(steps=100, lr=0.001)"
    record = finetune_norms(7, clip=1.)
    assert record.steps == 7 and record.settings == {"steps": 7, "lr": 1e-3, "clip": 1.} and record.resumable
    assert masked_lora().steps == 100
    with pytest.raises(TypeError): finetune_norms(7, speed=3)

@pytest.mark.parametrize("method, parts", [("magnitude", {"schedule": [.8, .6, .4]}), ("imp", {}), ("wanda", {})])
@pytest.mark.parametrize("recover", [finetune_norms(4), masked_lora(4, rank=2)])
def test_methods_that_train_between_steps_take_them(method, parts, recover):
    net = cnn()
    plan = prune(net, method, .6, pictures(), F.cross_entropy, recover=recover, **parts)
    assert all(not net.get_parameter(n)[~m].any() for n, m in masks_of(net).items()) and abs(plan.density - .4) < .02
    assert not any("parametrizations" in n for n, _ in net.named_modules())

@pytest.mark.parametrize("method", ["movement", "gradual-magnitude", "rigl"])
@pytest.mark.parametrize("recover", [finetune_norms(4), masked_lora(4, rank=2)])
def test_a_method_that_learns_its_mask_while_it_trains_refuses_them(method, recover):
    net = cnn()
    before = bits(net)
    with pytest.raises(BadInput) as refused:
        prune(net, method, .5, pictures(), F.cross_entropy, recover=recover)
    assert "\n" not in str(refused.value) and not changed(net, before)


# low-rank updates

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_the_merged_model_is_the_trained_one_bit_for_bit(kind, dtype):
    model = pruned(transformer(kind, dtype), words())
    before, order = bits(model), [n for n, _ in model.named_parameters()]
    kept, classes = masks_of(model), [type(m) for m in model.modules()]
    objects = {n: id(p) for n, p in model.named_parameters()}
    x = words()[0]["input_ids"]
    with torch.no_grad():
        start = model(x).logits
        with low_rank_updates(model, 2, 4.) as updates:
            assert torch.equal(model(x).logits, start)   # B is zero
            for u in updates: nn.init.normal_(u.up, std=.1)
            trained = model(x).logits
        assert torch.equal(model(x).logits, trained) and not torch.equal(trained, start)
    assert changed(model, before) == set(kept) and len(kept) == len(updates)
    for n, m in masks_of(model).items():
        assert torch.equal(m, kept[n]) and not model.get_parameter(n)[~m].any()
    assert [n for n, _ in model.named_parameters()] == order and [type(m) for m in model.modules()] == classes
    assert {n: id(p) for n, p in model.named_parameters()} == objects   # optimisers that hold a weight hold it still

def test_an_update_is_the_masked_product_in_the_form_of_the_layer():
    for model in (cnn(), transformer("gpt2")):
        pruned(model, None)
        for layer in low_rank_layers(model).values():
            u, w = MaskedLowRank(layer, 3, 2.), layer.weight.detach()
            nn.init.normal_(u.up)
            expected = w + layer.tensor(2 * u.up @ u.down) * (w != 0)
            assert torch.allclose(u(w), expected, atol=1e-6) and torch.equal(u(w) != 0, w != 0)

def test_a_plain_low_rank_update_breaks_the_zeros():
    net = pruned(cnn(), None)
    weight = net[6].weight.detach()
    plain = weight + torch.randn(4, 2) @ torch.randn(2, 24)
    assert (plain != 0).all() and (weight == 0).any()

def test_only_factors_train_and_the_gradient_of_a_pruned_place_is_none():
    net = pruned(cnn(), None)
    with low_rank_updates(net, 2, 4.) as updates, training_only(net, [p for u in updates for p in u.parameters()], ""):
        trained = {n for n, p in net.named_parameters() if p.requires_grad}
        assert all(n.endswith((".up", ".down")) for n in trained) and len(trained) == 2 * len(updates) == 6
        F.cross_entropy(net(pictures()[0][0]), pictures()[0][1]).backward()
        assert all(u.up.grad.any() and u.down.grad is not None for u in updates)
        assert all(p.grad is None for n, p in net.named_parameters() if n not in trained)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_lora_lowers_the_loss_and_keeps_zeros_without_a_mask_too(dtype):
    net, data = pruned(cnn(dtype), None), pictures(dtype)
    baked = remove_masks(copy.deepcopy(net))
    zeros = {n: p == 0 for n, p in baked.named_parameters() if p.dim() > 1}
    def loss(model):
        model.eval()
        return F.cross_entropy(model(data[0][0]).float(), data[0][1]).item()
    start = loss(copy.deepcopy(net))
    for model in (net, baked):
        masked_lora(30, 1e-2, rank=2)(model, data, F.cross_entropy)
        assert loss(model) < start and all(torch.equal(model.get_parameter(n) == 0, z) for n, z in zeros.items())

def test_also_says_what_is_trained_besides():
    net = pruned(cnn(), None)
    before = bits(net)
    masked_lora(3, 1e-2, rank=2, also=lambda model: [])(net, pictures(), F.cross_entropy)
    assert changed(net, before) == {"0.weight", "3.weight", "6.weight"}

def test_a_training_that_fails_leaves_the_weights_as_they_were():
    net = pruned(cnn(), None)
    before, flags = bits(net), [p.requires_grad for p in net.parameters()]
    calls = []
    def fails(out, y):
        calls.append(1)
        return F.cross_entropy(out, y) if len(calls) < 3 else out.sum() * float("nan")
    with pytest.raises(FloatingPointError): masked_lora(5, 1e-2, rank=2, also=lambda m: [])(net, pictures(), fails)
    assert not changed(net, before) and [p.requires_grad for p in net.parameters()] == flags
    assert [n for n, _ in net.named_parameters()] == list(before)

def test_a_rank_below_one_and_a_model_without_layers_are_refused():
    for model, rank in ((cnn(), 0), (nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), 2)):
        with pytest.raises(BadInput, match="rank of at least 1"):
            masked_lora(2, rank=rank)(model, pictures(), F.cross_entropy)
    with pytest.raises(BadInput, match="no prunable layer"):
        masked_lora(2)(nn.Sequential(nn.LayerNorm(3)), pictures(), F.cross_entropy)

def test_recurrent_layers_are_left_out():
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "out": nn.Linear(4, 2)})
    assert set(low_rank_layers(net)) == {"out.weight"}
