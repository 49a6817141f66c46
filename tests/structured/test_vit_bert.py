"Modules, tiles and experts: golden numbers, oracles, invariants, refusals."
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.structured.vit_bert import (HeadExperts, distortion_curve, dimap, equal_slope, head_usage,
                                               comparison_module, module_share, keep_top_head, convex_slopes,
                                               tile_scores, to_tiles, tiles, add_head_experts)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "k_proj", "v_proj", "proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    def forward(self, x):
        x = x + self.attn["proj"](torch.tanh(self.attn["q_proj"](x)) * self.attn["k_proj"](x) + self.attn["v_proj"](x))
        return x + self.mlp["fc2"](torch.relu(self.mlp["fc1"](x)))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 4)).double()


def batches():
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]


def bert(layers=2):
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
                                intermediate_size=64), add_pooling_layer=False).eval()


def words():
    return {"input_ids": torch.randint(0, 50, (12, 7), generator=torch.Generator().manual_seed(1))}


# DIMAP

@pytest.mark.parametrize("name, module", [
    ("swin.encoder.layers.0.blocks.1.attention.k_proj.weight", "swin.encoder.layers.0.blocks.1 QKV"),
    ("swin.encoder.layers.0.blocks.1.attention.o_proj.weight", "swin.encoder.layers.0.blocks.1 PRJ"),
    ("swin.encoder.layers.0.downsample.reduction.weight", "swin.encoder.layers.0.downsample.reduction.weight"),
    ("encoder.layers.encoder_layer_2.self_attention.in_proj_weight", "encoder.layers.encoder_layer_2 QKV"),
    ("encoder.layers.encoder_layer_2.self_attention.out_proj.weight", "encoder.layers.encoder_layer_2 PRJ"),
    ("encoder.layer.3.attention.self.value.weight", "encoder.layer.3 QKV"),
    ("encoder.layer.3.attention.output.dense.weight", "encoder.layer.3 PRJ"),
    ("encoder.layer.3.intermediate.dense.weight", "encoder.layer.3 MLP"),
    ("encoder.layer.3.output.dense.weight", "encoder.layer.3 MLP"),
    ("features.1.0.attn.qkv.weight", "features.1.0 QKV"),
    ("0.weight", "0.weight")])
def test_roles_are_read_from_names(name, module):
    assert comparison_module(name) == module and comparison_module(name, "layer") == name


@pytest.mark.parametrize("sparsity", [.3, .7, .9])
def test_with_layers_as_modules_it_is_lamp(sparsity):
    assert prune(net(), "dimap", sparsity, scope="layer") == prune(net(), "lamp", sparsity)


def test_shares_of_a_module_by_hand():
    scores = {"0.attn.q_proj": torch.tensor([[3., 1.]]), "0.attn.k_proj": torch.tensor([[.2, .1]])}
    space = SimpleNamespace(cost=lambda n: 1.)
    assert module_share()(scores, .75, space) == {"0.attn.q_proj": 1., "0.attn.k_proj": .5}
    # 1, .1 against 1, .2
    assert module_share("layer")(scores, .75, space) == {"0.attn.q_proj": .5, "0.attn.k_proj": 1.}


def test_no_module_is_emptied_and_scale_does_not_matter():
    kept = {}
    for name, mask in prune(net(), "dimap", .97).masks.items():
        kept[comparison_module(name)] = kept.get(comparison_module(name), 0) + int(mask.sum())
    assert min(kept.values()) >= 1
    scaled = net()
    with torch.no_grad():
        for n in ("q_proj", "k_proj", "v_proj"):
            scaled[1].attn[n].weight *= 32
    assert prune(scaled, "dimap", .6) == prune(net(), "dimap", .6)


def test_what_is_pruned_stays_pruned():
    model = net()
    first = prune(model, "magnitude", .5)
    second = prune(model, "dimap", .7)
    assert all((first.masks[n] | ~second.masks[n]).all() for n in first.masks)


def test_unknown_scope_is_refused():
    with pytest.raises(BadInput, match="scope 'model'"):
        dimap("model")


# LPViT

def test_tiles_by_hand():
    s = torch.tensor([[1., 1, 5, 0], [1, 1, 0, 0], [9, 0, 2, 2], [0, 0, 2, 2]])
    assert tile_scores(s, 2, 2).tolist() == [1., 1.25, 2.25, 2.]
    assert tiles(2, 2)(s, .5).int().tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    # ties: the first tile
    assert tiles(2, 2)(torch.ones(4, 4), .25).int().tolist() == [[1, 1, 0, 0]] * 2 + [[0] * 4] * 2


def test_tiles_shrink_and_dead_tiles_stay_dead():
    assert to_tiles(torch.arange(60.).view(10, 6), 4, 4).shape == (15, 4)
    s = torch.ones(4, 4)
    s[:2, :2] = -torch.inf
    assert not tiles(2, 2)(s, .75)[:2, :2].any() and tiles(2, 2)(s, .75).sum() == 12


def test_curve_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    w, g = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    order = torch.randperm(6)
    got = distortion_curve(w, g, order, 2, 2)
    for k in range(1, 7):
        delta = torch.zeros(6, 4).double()
        delta[order[:k]] = -to_tiles(w, 2, 2)[order[:k]]
        v, d = to_tiles(g, 2, 2).flatten(), delta.flatten()
        exact = (d * v).square().mean() + .5 * d @ (torch.outer(v, v) + 1e-7 * torch.eye(24).double()) @ d
        assert torch.isclose(got[k - 1], exact, rtol=1e-10)


def test_slopes_are_the_lower_hull():
    for seed in range(20):
        d = torch.randn(9, generator=torch.Generator().manual_seed(seed)).cumsum(0).tolist()
        s, points = convex_slopes(d), [0., *d]
        hull = torch.tensor([0., *s]).cumsum(0).tolist()
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(s)) and abs(hull[-1] - d[-1]) < 1e-5
        below = [min((points[i] * (j - k) + points[j] * (k - i)) / (j - i) if i < j else points[k] for i in range(k + 1)
                     for j in range(k, 10)) for k in range(10)]
        assert all(abs(a - b) < 1e-5 for a, b in zip(hull, below))


@pytest.mark.parametrize("seed", range(5))
def test_equal_slopes_find_the_best_choice(seed):
    g = torch.Generator().manual_seed(seed)
    layers = {f"{i}.weight": (torch.randn(4, 4, generator=g), torch.randn(4, 4, generator=g) * 3.**-i)
              for i in range(3)}
    scores = {n: (w * v).abs() for n, (w, v) in layers.items()}
    stats = {n: SimpleNamespace(output_square_grad=v) for n, (w, v) in layers.items()}
    space = SimpleNamespace(unit="weight", w=lambda n: layers[n][0])
    hulls = [torch.tensor([0.,
                           *convex_slopes(distortion_curve(w, v, tile_scores(scores[n], 2, 2).argsort(stable=True), 2,
                                                           2).tolist())]).cumsum(0) for n, (w, v) in layers.items()]
    for removed in (2, 5, 8):
        got = [round(4 * (1 - f)) for f in equal_slope(2, 2)(scores, 1 - removed / 12, space, stats).values()]
        cost = lambda c: float(sum(h[k] for h, k in zip(hulls, c)))
        assert sum(got) == removed
        assert cost(got) <= min(cost(c) for c in itertools.product(range(4), repeat=3) if sum(c) == removed) + 1e-5


def test_tiles_are_empty_or_untouched_and_no_label_is_read():
    model = net()
    plan = prune(model, "lpvit", .5, data=batches())
    assert plan.density == .5
    assert all(to_tiles(m.double(), 4, 4).mean(1).unique().tolist() in ([0., 1.], [1.], [0.])
               for m in plan.masks.values())
    assert all(m.any() for m in plan.masks.values())
    assert plan == prune(net(), "lpvit", .5, data=[(x, torch.zeros(16, dtype=torch.long)) for x in batches()])


def test_equal_slopes_are_for_weights():
    conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    with pytest.raises(BadInput, match="equal slopes are for tiles"):
        prune(conv, "l1-filter", .5, data=torch.randn(2, 1, 8, 8), allocate=equal_slope(2, 2))


# SHRP

def test_settling_is_exact_when_the_choice_is_one():
    model = add_head_experts(bert(), [0, 1], 16)
    with torch.no_grad():
        for i, h in ((0, 3), (1, 1)):
            model.encoder.layer[i].router.bias[h] += 100
    routed, usage = model(**words()).last_hidden_state, head_usage(model, [words()])
    assert [u.tolist() for u in usage] == [[0, 0, 0, 12], [0, 12, 0, 0]]
    before = sum(p.numel() for p in model.parameters())
    keep_top_head(model, usage)
    assert torch.allclose(routed, model(**words()).last_hidden_state, atol=1e-5)
    lost = 2 * (3 * 24 * 33 + 33 * 4)   # three projections lose 24 rows and biases; the router of 4 heads goes
    assert before - sum(p.numel() for p in model.parameters()) == lost


def test_heads_that_are_not_chosen_get_no_gradient_but_the_router_does():
    model = add_head_experts(bert(), [1], 16)
    model(**words()).last_hidden_state.square().sum().backward()
    expert, usage = model.encoder.layer[1], head_usage(model, [words()])[0]
    assert 0 < (usage == 0).sum()
    for p in (expert.query, expert.key, expert.value):
        assert [bool(p.weight.grad[8 * h:8 * h + 8].any()) for h in range(4)] == (usage > 0).tolist()
    assert expert.router.weight.grad.any()


def test_one_expert_layer_by_hand():
    torch.manual_seed(0)
    e = HeadExperts(*(nn.Linear(6, 6) for _ in range(3)), heads=2, width=5).eval()
    x = torch.randn(3, 4, 6)
    out = e(x)
    for i in range(3):
        h = int(e.router(x[i, 0]).argmax())
        q, k, v = (m(x[i])[:, 3 * h:3 * h + 3] for m in (e.query, e.key, e.value))
        said = (q @ k.T / 3**.5).softmax(-1) @ v
        assert torch.allclose(out[i], e.norm(x[i] + e.expand(said)), atol=1e-5)


def test_only_bert_layers_become_experts():
    with pytest.raises(BadInput, match="layer 5"):
        add_head_experts(bert(), [5])
    before = copy.deepcopy(net())
    with pytest.raises(BadInput):
        add_head_experts(before, [0])
