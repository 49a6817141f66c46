"Criteria of channels: golden values, exact invariants, refusals, and one calibrated ordering."
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from pruning_bench import BadInput, prune
from pruning_bench.core.allocate import ALLOCATORS
from pruning_bench.core.score import SCORES
from pruning_bench.core.relevance import propagate_relevance
from pruning_bench.core.stats import PROVIDERS
from pruning_bench.core.space import Weights
from pruning_bench.core.stats import collect, sample_gradients
from pruning_bench.structured.eigendamage import (filter_obs, filter_obs_update, kronecker_factors,
                                                  output_gradients)
from pruning_bench.structured.feature_maps import FeatureMapRecorder, betarank
from pruning_bench.structured.filters import (NORMALISERS, REDUCTIONS, group_signature, criterion, fpgm,
                                              group_magnitude, isomorphic, member_sums)
from pruning_bench.structured.relevance import relevance
from pruning_bench.structured.taylor import filter_obd, gate_taylor, group_taylor, sample_labels
from pruning_bench.graph.groups import Channels


def chain(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(),
                        nn.Linear(64, 3)).double().eval()
    net[1].weight.data.uniform_(.5, 2)
    net[1].bias.data.uniform_(0, 2); net[1].running_mean.normal_(); net[1].running_var.uniform_(.5, 2)
    x = torch.randn(12, 3, 8, 8).double()
    return net, [(x, torch.randint(0, 3, (12,)))]

def perceptron(seed=0, bias=True):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias)).double()
    return net, [(torch.randn(20, 6).double(), torch.randint(0, 3, (20,)))]

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 12, 0., "gelu", batch_first=True, norm_first=True)
                                     for _ in range(2)])

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        for layer in self.layers: x = layer(x)
        return self.head(x.mean(1))

def read(score, net, batches, **settings):
    return PROVIDERS[score.name](Channels(net, batches), batches, F.cross_entropy, **settings)["0.weight"]
def product(net, loss): # {parameter: w g}
    return {n: (p * g).detach() for (n, p), g in zip(net.named_parameters(),
                                                     torch.autograd.grad(loss, list(net.parameters())))}


# what the weights say

def test_group_norm_is_the_sum_over_members():
    net, batches = chain()
    by_hand = torch.stack([net[0].weight.square().sum((1, 2, 3)), net[1].weight.square(),
                           net[3].weight.square().sum((0, 2, 3))]).detach()
    for how, fold in {"sum": by_hand.sum(0), "mean": by_hand.mean(0), "max": by_hand.amax(0),
                      "first": by_hand[0]}.items():
        assert torch.allclose(read(group_magnitude, net, batches, reduce=how), fold)
    one = net[0].weight.abs().sum((1, 2, 3)) + net[1].weight.abs() + net[3].weight.abs().sum((0, 2, 3))
    assert torch.allclose(read(group_magnitude, net, batches, p=1, reduce="sum"), one.detach())

def test_a_flattened_channel_owns_all_its_columns():
    net, batches = chain()
    by_hand = net[3].weight.square().sum((1, 2, 3)) + net[5].weight.view(3, 4, 16).square().sum((0, 2))
    assert torch.allclose(PROVIDERS["group_magnitude"](Channels(net, batches), reduce="sum")["3.weight"],
                          by_hand.detach())

def test_l1_and_l2_of_a_hand_filled_layer():
    net, _ = perceptron()
    net[0].weight.data = torch.tensor([[3., 0, 0, 0, 0, 0], [1.1, 1.1, 1.1, 1.1, 1.1, 1.1], [1, 1, 1, 1, 1, 1.],
                                       [2.9, 0, 0, 0, 0, 0]] * 2).double()
    kept = {m: prune(copy.deepcopy(net), m, .5, data=[torch.randn(2, 6).double()]).masks["0.weight"].tolist()
            for m in ("l1-filter", "l2-filter")}
    assert kept == {"l1-filter": [False, True, True, False] * 2, "l2-filter": [True, False, False, True] * 2}

def test_normalisers_divide_by_what_is_alive():
    net, batches = chain()
    space = Channels(net, batches)
    raw = PROVIDERS["group_magnitude"](space)["0.weight"]
    for how in NORMALISERS:
        assert torch.allclose(PROVIDERS["group_magnitude"](space, normalise=how)["0.weight"] * NORMALISERS[how](raw),
                              raw)
    space.kept["0.weight"][0] = False
    assert torch.allclose(PROVIDERS["group_magnitude"](space, normalise="mean")["0.weight"] * raw[1:].mean(), raw)

def test_median_of_five_points_and_a_translation():
    net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
    points = torch.tensor([[0., 0.], [1., 0.], [-1., 0.], [0., 1.], [0., -1.]])
    scores = []
    for shift in (0., 10.):
        net[0].weight.data = points + shift
        scores.append(PROVIDERS["fpgm"](Channels(net, [torch.randn(2, 2)]))["0.weight"])
    assert torch.allclose(scores[0].float(), torch.tensor([4.] + [3 + 8**.5] * 4))
    assert torch.allclose(*scores, atol=1e-5)
    assert (points + 10).norm(dim=1).argmin() != scores[1].argmin()

def test_median_among_the_living_only():
    net, batches = perceptron()
    space = Channels(net, batches)
    space.kept["0.weight"][:4] = False
    w = net[0].weight.detach()
    assert torch.allclose(PROVIDERS["fpgm"](space)["0.weight"], torch.cdist(w, w[4:]).sum(1))

def test_identical_filters_go_one_by_one_but_for_the_last():
    net, batches = perceptron(1, bias=False)
    with torch.no_grad(): net[0].weight[:4] = net[0].weight[0]
    at_once = prune(copy.deepcopy(net), "fpgm", .5, batches).masks["0.weight"]
    slowly = prune(copy.deepcopy(net), "fpgm", .5, batches,
                   schedule=lambda keep: [7/8, 6/8, 5/8, 4/8]).masks["0.weight"]
    assert not at_once[:4].any() and slowly[:4].sum() == 1 and slowly.sum() == 4

def test_nobody_lends_columns_in_a_grouped_convolution():
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2, bias=False), nn.ReLU(),
                        nn.Conv2d(6, 2, 1, bias=False))
    net[2].weight.data[:, 1] = 0
    group = Channels(net, [torch.randn(1, 3, 4, 4)]).groups["0.weight"]
    sums = member_sums(group, {"2.weight": net[2].weight.detach().square()})
    assert len(group) == 4
    assert sums["2.weight", 1][1] == 0
    assert torch.allclose(sums["2.weight", 1], net[2].weight.square().sum((0, 2, 3)))

def test_batch_norm_scale_is_read_and_its_absence_said():
    net, batches = chain()
    with pytest.raises(BadInput, match="no batch norm scales the channels of '3.weight'"):
        PROVIDERS["bn_scale"](Channels(net, batches))
    short = nn.Sequential(*net[:3], nn.Flatten(), nn.Linear(180, 3)).double()
    short[1].weight.data.neg_()
    assert torch.equal(PROVIDERS["bn_scale"](Channels(short, batches))["0.weight"], -short[1].weight)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(BadInput, match="skip="): prune(net, "bn-scale", .5, batches)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())

@pytest.mark.parametrize("method", ["depgraph", "isomorphic", "l2-filter", "fpgm", "taylor-gate"])
def test_ties_do_not_change_the_count(method):
    net, batches = perceptron()
    for p in net.parameters(): p.data.fill_(.5)
    assert prune(net, method, .5, batches, F.cross_entropy).masks["0.weight"].sum() == 4


# who competes with whom

def mixed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
                        nn.Conv2d(12, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    return net, [torch.randn(2, 3, 8, 8)]

def test_groups_of_one_build_compete_and_others_do_not():
    net, batches = mixed()
    space = Channels(net, batches)
    assert group_signature(space, "0.weight") == group_signature(space, "2.weight")
    assert group_signature(space, "8.weight") == group_signature(space, "10.weight")
    assert len({group_signature(space, n) for n in ("0.weight", "4.weight", "8.weight")}) == 3
    scores = {n: torch.arange(float(len(g))) + i / 10 for i, (n, g) in enumerate(space.groups.items())}
    share = isomorphic(scores, .5, space)
    flat = lambda names: sorted((s for n in names for s in scores[n].tolist()), reverse=True)
    assert share["0.weight"] * 8 + share["2.weight"] * 12 == pytest.approx(10)
    assert share["4.weight"] == .5
    assert share["8.weight"] * 10 + share["10.weight"] * 20 == pytest.approx(15)
    assert (share["10.weight"] * 20
            == pytest.approx(sum(s >= flat(("8.weight", "10.weight"))[14] for s in scores["10.weight"].tolist())))

def test_scopes_are_parts_of_any_method():
    net, batches = mixed()
    for scope in ("uniform", "global", "isomorphic"):
        plan = prune(copy.deepcopy(net), "fpgm", .5, batches, allocate=scope)
        assert abs(sum(int(m.sum()) for m in plan.masks.values()) - 27) <= 2
    assert "isomorphic" in ALLOCATORS
    with pytest.raises(BadInput, match="use 'uniform' or 'global'"):
        prune(copy.deepcopy(net), "magnitude", .5, allocate="isomorphic")

@pytest.mark.parametrize("score", ["group_magnitude", "fpgm", "gate_taylor", "hrank", "filter_obs", "relevance"])
def test_whole_units_are_not_single_weights(score):
    net, batches = perceptron()
    with pytest.raises(BadInput, match="space='channels'|ranks channels"):
        prune(net, score=score, sparsity=.5, data=batches, loss=F.cross_entropy)

def test_bad_settings_are_named():
    net, batches = perceptron()
    for method, setting in (("depgraph", dict(reduce="men")), ("depgraph", dict(normalise="median")),
                            ("betarank", dict(exponent=2))):
        with pytest.raises(BadInput): prune(net, method, .5, batches, F.cross_entropy, **setting)
    with pytest.raises(BadInput, match="did you mean mean"): prune(net, "depgraph", .5, batches, reduce="meam")
    assert set(REDUCTIONS) == {"sum", "mean", "max", "first"}


# invariants

def test_a_filter_behind_a_batch_norm_in_training_has_no_slope():
    net, [(x, y)] = chain()
    net[1].eps = 1e-30
    wg = product(net.train(), F.cross_entropy(net(x), y))["0.weight"]
    assert wg.sum((1, 2, 3)).abs().max() < 1e-12 and wg.square().sum((1, 2, 3)).min() > 1e-8

@pytest.mark.parametrize("training", [False, True])
def test_gate_is_norm_is_columns(training):
    net, [(x, y)] = chain()
    one = torch.ones(5, 1, 1, dtype=torch.double, requires_grad=True)
    net.train(training)
    slope, = torch.autograd.grad(F.cross_entropy(net[2:](net[:2](x) * one), y), one)
    wg = product(net, F.cross_entropy(net(x), y))
    assert torch.allclose(slope.flatten(), wg["1.weight"] + wg["1.bias"], atol=1e-12)
    assert torch.allclose(slope.flatten(), wg["3.weight"].sum((0, 2, 3)), atol=1e-12)
    if not training:
        assert torch.allclose(read(gate_taylor, net, [(x, y)], examples_per_grad=12), slope.flatten().square(),
                              atol=1e-15)
        single = [torch.autograd.grad(F.cross_entropy(net[2:](net[:2](x[i:i + 1]) * one), y[i:i + 1]), one)[0]
                  for i in range(12)]
        assert torch.allclose(read(gate_taylor, net, [(x, y)]), torch.stack(single).square().mean(0).flatten())

def test_what_goes_in_comes_out_of_a_relu_unit():
    net, [(x, y)] = perceptron()
    wg = product(net, F.cross_entropy(net(x), y))
    assert torch.allclose(wg["0.weight"].sum(1) + wg["0.bias"], wg["2.weight"].sum(0), atol=1e-12)

def test_group_taylor_counts_norms_and_biases():
    net, [(x, y)] = chain()
    wg = {n: v.abs() for n, v in product(net, F.cross_entropy(net(x), y)).items()}
    by_hand = torch.stack([wg["0.weight"].sum((1, 2, 3)), wg["1.weight"], wg["1.bias"], wg["3.weight"].sum((0, 2, 3))])
    assert by_hand[1].max() > 0 < by_hand[2].max()
    assert torch.allclose(read(group_taylor, net, [(x, y)], reduce="sum"), by_hand.sum(0))
    assert torch.allclose(read(group_taylor, net, [(x, y)], reduce="mean"), by_hand.mean(0))

def test_rescaling_changes_norms_and_no_criterion_from_data():
    net, batches = perceptron()
    twin, scale = copy.deepcopy(net), torch.logspace(-1, 1, 8).double()
    with torch.no_grad(): twin[0].weight *= scale[:, None]; twin[0].bias *= scale; twin[2].weight /= scale
    order = lambda score, model, **s: read(score, model, batches, **s).argsort().tolist()
    for score in (group_magnitude, fpgm): assert order(score, net) != order(score, twin)
    for score, settings in ((gate_taylor, {}), (group_taylor, {}), (filter_obd, {"label_samples": 0}), (betarank, {}),
                            (relevance, {})):
        assert torch.allclose(read(score, net, batches, **settings), read(score, twin, batches, **settings),
                              rtol=1e-4 if score is betarank else 1e-9), score.name
    price = [filter_obs(space.w("0.weight"), collect(space, batches, {"kronecker_factors"}, F.cross_entropy,
                                                     {"kronecker_factors": {"label_samples": 0}})["0.weight"])
             for space in (Channels(net, batches), Channels(twin, batches))]
    assert torch.allclose(*price, rtol=1e-9)


# curvature

def test_fisher_of_single_examples_is_the_analytic_one():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3, bias=False).double(), torch.randn(32, 4).double()
    p = layer(x).softmax(1).detach()
    y = torch.multinomial(p, 1)[:, 0]
    found = torch.stack([f["weight"] for f in sample_gradients(layer, dict(layer.named_parameters()),
                                                               [(x[:20], y[:20]), (x[20:], y[20:])], F.cross_entropy)])
    assert len(found) == 32
    assert torch.allclose(found.square().mean(0), (p - F.one_hot(y, 3)).square().T @ x.square() / 32)

def test_structured_obd_reads_every_example():
    net, [(x, y)] = perceptron()
    f = {n: torch.stack([torch.autograd.grad(F.cross_entropy(net(x[i:i + 1]), y[i:i + 1]), net[0].get_parameter(n))[0]
                         for i in range(20)]).square().mean(0) for n in ("weight", "bias")}
    by_hand = ((net[0].weight**2 * f["weight"]).sum(1) + net[0].bias**2 * f["bias"]).detach() / 2
    assert torch.allclose(read(filter_obd, net, [(x, y)], label_samples=0), by_hand)
    assert torch.allclose(read(filter_obd, net, [(x.flip(0), y.flip(0))], label_samples=0), by_hand)
    assert not torch.allclose(read(filter_obd, net, [(x[-1:], y[-1:])], label_samples=0), by_hand, rtol=.1)

def test_labels_are_drawn_from_the_predictions():
    class Sure(nn.Module):
        def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
        def forward(self, x): return torch.tensor([0., 0., 50.]).expand(len(x), 3) + 0 * self.p
    batches = list(sample_labels(Sure(), [(torch.zeros(6, 1), torch.zeros(6, dtype=torch.long))], 2))
    assert len(batches) == 2 and all((y == 2).all() and y.dtype == torch.long for _, y in batches)
    given = [(torch.zeros(6, 1), torch.zeros(6, dtype=torch.long))]
    assert list(sample_labels(Sure(), given, 0)) == given
    for bad in (torch.zeros(6, 1), (torch.zeros(6, 1), torch.zeros(6)),
                (torch.zeros(6, 1), torch.zeros(6, 2, dtype=torch.long))):
        with pytest.raises(BadInput, match="label_samples=0"): list(sample_labels(Sure(), [bad], 1))
    pixels = nn.Conv2d(1, 3, 1)
    (_, y), = sample_labels(pixels, [(torch.randn(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))], 1)
    assert y.shape == (2, 4, 4)

def test_one_example_makes_the_kronecker_product_exact():
    net, [(x, y)] = perceptron()
    space, one = Channels(net, [(x, y)]), [(x[:1], y[:1])]
    (k, rows), = kronecker_factors(space, one, F.cross_entropy, label_samples=0)["0.weight"]
    (delta,), g = ((output_gradients(space, one, F.cross_entropy),
                    torch.autograd.grad(F.cross_entropy(net(x[:1]), y[:1]), [net[0].weight, net[0].bias])))
    flat = torch.cat([g[0], g[1][:, None]], 1).flatten()
    assert torch.allclose(torch.kron(delta["0.weight"].T @ delta["0.weight"], k.a[0]), torch.outer(flat, flat),
                          atol=1e-7)

def test_an_activation_that_writes_in_place_does_not_change_the_slopes():
    net, batches = perceptron()
    twin = copy.deepcopy(net); twin[1].inplace = True
    a, b = (torch.cat([d["0.weight"] for d in output_gradients(Channels(m, batches), batches, F.cross_entropy)])
            for m in (net, twin))
    assert torch.equal(a, b)

def test_obs_of_filters_is_brute_force_on_the_kronecker_product():
    net, batches = perceptron()
    space = Channels(net, batches)
    stats = collect(space, batches, {"kronecker_factors"}, F.cross_entropy,
                    {"kronecker_factors": {"label_samples": 0}})["0.weight"]
    (k, _), = stats.kronecker_factors
    h = torch.kron(torch.linalg.inv(k.inverse).contiguous(), k.a[0] + 1e-9 * torch.eye(7).double())
    inverse = torch.linalg.inv(h)
    def forced(out):
        at = torch.cat([torch.arange(i * 7, i * 7 + 7) for i in out])
        step = -inverse[:, at] @ torch.linalg.solve(inverse[at][:, at], k.w.flatten()[at])
        return step @ h @ step / 2, k.w + step.view(k.w.shape)
    price = filter_obs(space.w("0.weight"), stats)
    assert torch.allclose(price, torch.stack([forced([i])[0] for i in range(8)]), rtol=1e-5)
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    (new, mask), = filter_obs_update({"0.weight": (None, stats, price, .5, lambda s, f: keep)}).values()
    assert torch.equal(mask, keep)
    assert torch.allclose(torch.cat([new["0.weight"], new["0.bias"][:, None]], 1), forced([1, 4, 6])[1], atol=1e-6)

def test_structured_obs_moves_the_filters_that_stay_and_only_them():
    net, batches = chain()
    small = copy.deepcopy(net)
    plan = prune(small, "obs-struct", .4, batches, F.cross_entropy, allocate="uniform", label_samples=0)
    at = plan.slices["0.weight"][0]
    assert not torch.allclose(small[0].weight, net[0].weight[at])
    assert torch.allclose(small[5].weight.view(3, -1), net[5].weight[:, plan.slices["5.weight"][1]])


# activations

def test_rank_of_known_maps():
    net = nn.Sequential(nn.Conv2d(3, 3, 1, groups=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(75, 2)).eval()
    net[0].weight.data = torch.eye(3)[:, :, None, None]
    maps = torch.stack([torch.ones(5, 5), torch.eye(5), -torch.ones(5, 5)])
    found = PROVIDERS["hrank"](Channels(net, [maps[None]]), [maps[None].expand(4, -1, -1, -1)])["0.weight"]
    assert found.tolist() == [1, 5, 0]
    with torch.no_grad(), FeatureMapRecorder(Channels(net, [maps[None]]).layers) as seen: net(maps[None])
    assert torch.equal(seen.maps["0.weight"], net[:3](maps[None]).detach())

def test_rank_without_maps_is_refused():
    net, batches = perceptron()
    with pytest.raises(BadInput, match="no two-dimensional feature maps"): prune(net, "hrank", .5, batches)

def test_spread_in_over_spread_out():
    net, [(x, y)] = perceptron(bias=False)
    w = net[0].weight.detach()
    ratio = lambda w, x: (w.abs() * x.std(0) / (x @ w.T).std(0)[:, None]).sum(1)
    assert torch.allclose(read(betarank, net, [(x, y)]), ratio(w, x), rtol=1e-5)
    assert torch.allclose(read(betarank, net, [(x, y)], exponent=-1),
                          (w.abs() / x.std(0) * (x @ w.T).std(0)[:, None]).sum(1), rtol=1e-5)
    assert torch.allclose(read(betarank, net, [(3 * x, y)]), ratio(w, x), rtol=1e-5)
    net[0].weight.data[2] = 0
    assert read(betarank, net, [(x, y)])[2] == 0
    with pytest.raises(BadInput, match="at least two"): read(betarank, net, [(x[:1], y[:1])])

def test_spread_of_a_convolution_is_per_position():
    net, batches = chain()
    x, w = batches[0][0], net[0].weight.detach()
    patches = F.unfold(x, 3).view(12, 27, -1)
    by_hand = (w.flatten(1).abs() @ patches.std(0) / net[0](x).flatten(2).std(0).detach()).mean(1)
    assert torch.allclose(read(betarank, net, batches), by_hand, rtol=1e-4)


# relevance

def plain():
    torch.manual_seed(0)
    net = (nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                         nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Dropout(), nn.Linear(16, 3, bias=False)).double().eval())
    for p in net.parameters(): p.data += .1
    return net, (torch.rand(10, 1, 8, 8).double(), torch.randint(0, 3, (10,)))

def test_relevance_is_conserved():
    net, batch = plain()
    r, heard = propagate_relevance(Channels(net, [batch]), batch)
    assert torch.allclose(r.sum((1, 2, 3)), torch.ones(10).double(), atol=1e-12)
    assert all(abs(h.sum() - 10) < 1e-10 and h.min() >= 0 for h in heard.values())
    assert heard.keys() == {"0.weight", "3.weight"}

def test_relevance_by_hand_on_two_layers():
    net, [(x, y)] = perceptron(bias=False)
    x = x[:1].abs() + .1; y = torch.tensor([1])
    net[2].weight.data.abs_()
    a = net[1](net[0](x)).detach()[0]
    hidden = a * net[2].weight[1] / (a * net[2].weight[1]).sum()
    z = (x[0][:, None] * net[0].weight.T).clamp_min(0).detach()
    r, heard = propagate_relevance(Channels(net, [(x, y)]), (x, y))
    assert torch.allclose(heard["0.weight"], hidden.detach())
    assert torch.allclose(r[0], (z / z.sum(0).clamp_min(1e-300) * hidden.detach()).sum(1))

def test_a_silent_filter_gets_nothing_and_a_negative_scale_turns_the_weights():
    net, batch = plain()
    net[0].weight.data[1] = 0
    assert propagate_relevance(Channels(net, [batch]), batch)[1]["0.weight"][1] == 0
    flipped, straight = (nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False),
                                       nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
                         .eval() for _ in range(2))
    straight.load_state_dict(flipped.state_dict())
    flipped[2].weight.data.neg_(); flipped[3].weight.data.neg_()
    batch = (torch.rand(6, 1, 1, 1).double(), torch.randint(0, 2, (6,)))
    a, b = (propagate_relevance(Channels(m, [batch]), batch)[1]["0.weight"] for m in (flipped, straight))
    assert torch.equal(flipped(batch[0]), straight(batch[0])) and torch.allclose(a, b)

class Skip(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.c, self.d = ((how,
                                                     *(nn.Linear(*s, bias=False)
                                                       for s in ((4, 6), (6, 5), (5, 6), (6, 3)))))
    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.c(F.relu(self.b(x)))
        if self.how == "in place": y += x
        else: y = x + y if self.how == "plus" else torch.add(y, x)
        return self.d(F.relu(y))

def test_a_shortcut_takes_its_share():
    found = []
    for how in ("plus", "add", "in place"):
        torch.manual_seed(0)
        net = Skip(how).double()
        for p in net.parameters(): p.data.abs_()
        batch = (torch.rand(7, 4).double(), torch.arange(7) % 3)
        r, heard = propagate_relevance(Channels(net, [batch], residual=True), batch)
        x = F.relu(net.a(batch[0])); y = net.c(F.relu(net.b(x)))
        assert torch.allclose(r.sum(1), torch.ones(7).double())
        assert heard["a.weight"].sum() == pytest.approx(7)
        assert 0 < heard["b.weight"].sum() < 7
        share = (net.d.weight[batch[1]] * (x + y)); share = share / share.sum(1, keepdim=True)
        assert heard["c.weight"].sum().item() == pytest.approx((share * y / (x + y)).sum().item())
        found.append(heard["b.weight"])
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[2])

def test_relevance_refuses_a_scaled_sum():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
        def forward(self, x): return torch.add(self.a(x), x, alpha=2.)
    net, batch = Scaled(), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    space = SimpleNamespace(model=net, layers={})
    with pytest.raises(BadInput, match="no rule says how relevance passes 'add'"): propagate_relevance(space, batch)

def test_relevance_refuses_by_name_and_leaves_the_model_alone():
    torch.manual_seed(0)
    net, batches = Encoder().eval(), [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(BadInput, match="no rule says how relevance passes '.*attention"):
        prune(net, "lrp", .5, batches, F.cross_entropy)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    net, batches = perceptron()
    for bad in ([batches[0][0]], [(batches[0][0], torch.randn(20, 3).double())]):
        with pytest.raises(BadInput, match="class labels"): prune(net, "lrp", .5, bad)


# the user's network

EVERYWHERE = ["l1-filter", "l2-filter", "depgraph", "isomorphic", "fpgm", "rand-struct", "taylor-filter", "taylor-gate",
              "taylor-group", "obd-struct", "obs-struct", "betarank"]

@pytest.mark.parametrize("method", EVERYWHERE)
def test_cnn_mlp_and_transformer(method):
    for make, groups in ((lambda: chain(), 2), (lambda: perceptron(), 1),
                         (lambda: (Encoder().eval(), [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]), 2)):
        net, batches = make()
        names = (Channels(net, batches).names() if groups < 2 or not isinstance(net, Encoder)
                 else [n for n in Channels(net, batches).names() if "linear1" in n])
        skip = [n for n in Channels(net, batches).names() if n not in names]
        plan = prune(net, method, .5, batches, F.cross_entropy, allocate="uniform", skip=skip)
        assert len(plan.masks) == groups and all(int(m.sum()) == int(len(m) * .5 + .5) for m in plan.masks.values())
        out = net(batches[0][0])
        F.cross_entropy(out, batches[0][1]).backward()
        assert torch.isfinite(out).all() and all(p.grad is not None for p in net.parameters())

def test_a_criterion_of_ones_own():
    @criterion()
    def last_first(space, batches=None, loss=None):
        return {n: -torch.arange(float(len(g))) for n, g in space.groups.items()}
    try:
        net, batches = perceptron()
        assert prune(net, score="last_first", space="channels", sparsity=.5,
                     data=batches).masks["0.weight"].tolist() == [True] * 4 + [False] * 4
        with pytest.raises(BadInput, match="space='channels'"): PROVIDERS["last_first"](Weights(perceptron()[0]))
    finally: SCORES.discard("last_first"), PROVIDERS.discard("last_first")


# orderings

class Block(nn.Module):
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = ((nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b),
                                                       nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)))
        self.short = (nn.Identity() if a == b and stride == 1
                      else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)))
    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))

@pytest.mark.slow
def test_norms_beat_the_lottery_and_the_lottery_beats_the_worst():
    "Half of the inner channels of a small residual network trained with weight decay; batch norms recalibrated."
    from pruning_bench.bench.tasks.digits import digits
    from pruning_bench.core.recovery import finetune, recalibrate_bn
    @criterion()
    def worst(space, batches=None, loss=None): return {n: -s for n, s in PROVIDERS["group_magnitude"](space).items()}
    images, classes = map(torch.cat, zip(*map(digits, ("train", "validation", "test"))))
    reached = {}
    for seed in range(4):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        batches = [(images[b], classes[b]) for _ in range(20) for b in order[:1000][torch.randperm(1000)].split(64)]
        net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16),
                            Block(16, 16), Block(16, 32, 2), Block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(32, 10))
        finetune(len(batches), .05, "sgd", 5e-3)(net, batches, F.cross_entropy)
        def tried(name, method, seed=0, **how):
            model = copy.deepcopy(net)
            prune(model, method, .5, batches[:4], F.cross_entropy, allocate="uniform", seed=seed, **how)
            recalibrate_bn(model, batches[:16]).eval()
            with torch.no_grad():
                (reached.setdefault(name, [])
                 .append(100 * (model(images[order[1000:]]).argmax(1) == classes[order[1000:]]).float().mean().item()))
        for name, how in {"l1": dict(method="depgraph", p=1), "l2": dict(method="depgraph"),
                          "fpgm": dict(method="fpgm"), "worst": dict(method="depgraph", score=worst)}.items():
            tried(name, **how)
        for lottery in range(5): tried("random", "rand-struct", lottery)
    SCORES.discard("worst"), PROVIDERS.discard("worst")
    mean = {n: sum(v) / len(v) for n, v in reached.items()}
    assert min(mean["l1"], mean["l2"]) > mean["random"] + 5, mean
    assert mean["random"] > mean["worst"] and mean["fpgm"] > mean["worst"] + 8, mean


def tanh_weight(layer):
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer

@pytest.mark.parametrize("method", ["l1-filter", "l2-filter", "depgraph", "fpgm"])
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm,
                                  nn.utils.spectral_norm, tanh_weight])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_computed_weight_is_scored_as_what_it_computes(wrap, method):
    torch.manual_seed(0)
    model, x = nn.Sequential(wrap(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith(("original0", "weight_g")): p.copy_(torch.rand_like(p) + .2)
            if n.endswith(("original1", "weight_v", "original", "weight_orig")):
                p.mul_(1 + 5 * torch.rand(16, 1, 1, 1))
        model(x)
        plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), copy.deepcopy(model[2])).eval()
        plain[0].weight.copy_(model[0].weight)
        plain[0].bias.copy_(model[0].bias)
        expected = [*prune(plain, method, .5, data=[x]).masks.values()]
        found = [*prune(model, method, .5, data=[x]).masks.values()]
    assert [m.tolist() for m in found] == [m.tolist() for m in expected]
    if wrap is not parametrizations.spectral_norm and wrap is not nn.utils.spectral_norm:   # its norm is another one
        assert torch.allclose(model(x), plain(x), atol=1e-5)
