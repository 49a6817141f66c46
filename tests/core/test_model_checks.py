"Models that cannot be pruned as they are, and requests that name nothing: one sentence before any work."
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from pruning_bench import BadInput, prune, pruning
from pruning_bench.core.mask import masks_of, remove_masks

METHODS = ["magnitude", "wanda", "snip", "obd", "sparsegpt", "l1-filter", "gradual-magnitude", "rigl", "bip", "imp"]
TRAINED = {"gradual-magnitude", "rigl", "bip", "imp"}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, 10))


def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(10, (8,), generator=g))]


def cut(model, name, **more):
    if name in TRAINED:
        more = {"steps": 3, **more}
    return prune(model, name, .5, data(), F.cross_entropy, **more)


def refused(call, *words):
    with pytest.raises(BadInput) as e:
        call()
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in words), text


@pytest.mark.parametrize("name", METHODS)
def test_inference_mode_around_a_pruning_is_refused_and_no_grad_is_not(name):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        refused(lambda: cut(model, name), "torch.inference_mode()", "outside")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not masks_of(model)
    with torch.no_grad():
        plan = cut(model, name)
    assert plan == cut(net(), name)


def test_a_loop_under_inference_mode_is_refused():
    with torch.inference_mode():
        refused(lambda: pruning(net(), "gradual-magnitude", .5, steps=3).__enter__(), "torch.inference_mode()")


@pytest.mark.parametrize("name", METHODS)
def test_weights_made_under_inference_mode_cannot_be_changed(name):
    with torch.inference_mode():
        model = net()
    refused(lambda: cut(model, name), "'0.weight'", "torch.inference_mode()", "state dict")
    outside = net()
    outside.load_state_dict(model.state_dict())
    assert cut(outside, name).density <= .55


@pytest.mark.parametrize("name", METHODS)
def test_a_lazy_layer_is_refused_until_it_has_weights(name):
    model = nn.Sequential(*net()[:-1], nn.LazyLinear(10))
    refused(lambda: cut(model, name), "lazy", "'6'", "one batch")
    model(data()[0][0])
    assert cut(model, name).density <= .55


COMPUTED = [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
            nn.utils.weight_norm, nn.utils.spectral_norm]


class Doubled(nn.Module):
    def forward(self, w):
        return w + .1


def doubled(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [m for m in METHODS if m != "l1-filter"])
@pytest.mark.parametrize("make", [*COMPUTED, doubled])
def test_a_weight_that_is_computed_is_refused_or_named_in_skip(make, name):
    model = net()
    make(model[2])
    refused(lambda: cut(model, name), "computed", "weight")
    plan = cut(model, name, skip="2")
    assert set(plan.masks) == {"0.weight", "6.weight"}


class Centred(nn.Linear):
    "One-bit weights whose mean is subtracted: no zero of the parameter is a zero of the product."
    def forward(self, x):
        w = self.weight - self.weight.mean()
        return F.linear(x, w.sign() * w.abs().mean(), self.bias)


class Ternary(nn.Linear):
    "Weights rounded to -1, 0 and 1: zeros stay zeros."
    def forward(self, x):
        scale = self.weight.abs().mean().clamp_min(1e-5)
        return F.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * self.weight.abs().mean(), self.bias)


class Unusual(nn.Linear):
    def forward(self, x, gate):
        return super().forward(x) * gate


@pytest.mark.parametrize("name", [m for m in METHODS if m != "l1-filter"])
@pytest.mark.parametrize("kind", [Centred, Standardised])
def test_a_layer_that_fills_the_zeros_of_its_weight_is_refused(kind, name):
    model, at = net(), 2 if kind is Standardised else 6
    model[at] = kind(8, 16, 3) if kind is Standardised else kind(16, 10)
    refused(lambda: cut(model, name), kind.__name__, f"'{at}.weight'", "skip=")
    assert f"{at}.weight" not in cut(model, name, skip=f"{at}*").masks


@pytest.mark.parametrize("layer", [Ternary(16, 10), Ternary(16, 16), Scaled(4, 8, 3, groups=2, dilation=2),
                                   Unusual(4, 4)], ids=lambda m: type(m).__name__)
def test_a_layer_that_keeps_zeros_is_pruned(layer):
    assert prune(nn.Sequential(layer), "magnitude", .5).density == .5


def test_the_check_draws_nothing_and_changes_nothing():
    model = nn.Sequential(Ternary(8, 8), nn.Linear(8, 2))
    model[0].register_forward_hook(lambda *_: pytest.fail("the check called the layer of the user"))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    prune(model, "magnitude", .5)
    assert torch.equal(torch.rand(2), expected)


def test_masks_of_torch_are_named_in_both_orders():
    model = net()
    torch_prune.random_unstructured(model[0], "weight", .5)
    refused(lambda: cut(model, "magnitude"), "'0.weight'", "torch.nn.utils.prune.remove")
    assert "0.weight" not in cut(model, "magnitude", skip="0").masks
    model = net()
    cut(model, "magnitude")
    torch_prune.l1_unstructured(model[0], "weight", .7)
    refused(lambda: model(data()[0][0]), "remove_masks(model)")
    zeros = remove_masks(model)[0].weight == 0
    assert zeros.float().mean() > .5 and torch.isfinite(model(data()[0][0])).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_pattern_that_matches_nothing_is_refused(name):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    refused(lambda: cut(model, name, skip=["0", "module.2.*"]), "'module.2.*'", "did you mean '2.*'?")
    refused(lambda: cut(model, name, skip="2.wieght"), "'2.weight'")
    refused(lambda: cut(model, name, skip=7), "skip=7")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not masks_of(model)


def test_a_pattern_may_name_what_is_not_pruned_anyway():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(prune(model, "magnitude", .5, skip=("*.bias", "4", "5*")).masks) == 3


def test_names_of_a_wrapped_model_have_its_prefix():
    model = nn.DataParallel(net())
    refused(lambda: prune(model, "magnitude", .5, skip="2.*"), "'module.2.*'")
    assert "module.2.weight" not in prune(model, "magnitude", .5, skip="module.2.*").masks


def test_a_loop_refuses_a_pattern_that_matches_nothing():
    refused(lambda: pruning(net(), "gradual-magnitude", .5, steps=3, skip="head").__enter__(), "skip='head'")


def test_examples_have_no_parameter_names():
    refused(lambda: prune(None, "random-subset", .5, data(), skip="head"), "skip='head'")
