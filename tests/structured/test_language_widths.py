"FLAP and CFSP: scores against errors by hand, allocations against their budgets, and language models of three kinds."
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pruning_bench import BadInput, build, load_plan, prune
from pruning_bench.core.allocate import ALLOCATORS, global_
from pruning_bench.core.solve import zero
from pruning_bench.core.stats import collect
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.saving import load_pruned
from pruning_bench.structured import language_widths
from pruning_bench.structured.language_widths import (PUBLISHED_SCALE, activation_share, add_zero_biases,
                                                      block_angles, column_fluctuation, fluctuation, global_params,
                                                      input_moments, mean_share, sigmoid_shares, standardised,
                                                      unit_costs)

transformers = pytest.importorskip("transformers")


def llama(**other):
    torch.manual_seed(0)
    sizes = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **other})).eval()


def biased_llama():
    return add_zero_biases(llama())


def opt():
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=16)).eval()


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_inner=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=0,
        eos_token_id=0)).eval()


MODELS = {"llama": biased_llama, "opt": opt, "gpt2": gpt2}
READERS = {"llama": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"),
           "opt": ("model.decoder.layers.{}.fc2", "model.decoder.layers.{}.self_attn.out_proj"),
           "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj")}


@pytest.fixture
def tokens():
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 48, (4, 16), generator=g)} for _ in range(3)]


def rows(model, name, batches, outputs=False):
    "What a layer reads, or writes, for all tokens."
    found = []
    def keep(module, args, y):
        t = y if outputs else args[0]
        found.append(t.reshape(-1, t.shape[-1]))
    hook = model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches: model(**batch)
    hook.remove()
    return torch.cat(found)


def matrix(layer):
    w = layer.weight.detach()
    return w.T if type(layer).__name__ == "Conv1D" else w


# scores

@pytest.mark.parametrize("kind", MODELS)
def test_the_score_is_the_error_of_replacing_one_channel_by_its_mean(kind, tokens):
    model = MODELS[kind]().double()
    space = Channels(model, tokens)
    stats = collect(space, tokens, {"consumer_stats"})
    readers = {r.name.removesuffix(".weight"): (n, columns) for n in space.names()
               for r, columns in stats[n].consumer_stats}
    for part in READERS[kind]:
        name = part.format(1)
        group, columns = readers[name]
        x, w = rows(model, name, tokens), matrix(model.get_submodule(name))
        error = torch.stack([((x[:, j] - x[:, j].mean())[:, None] * w[:, j]).square().sum(1).mean()
                             for j in range(w.shape[1])])
        found = column_fluctuation(stats[group].consumer_stats, "wifv")
        assert torch.allclose(found, error[columns], rtol=1e-4) and len(found) == len(space.groups[group])
        assert torch.allclose(column_fluctuation(stats[group].consumer_stats, "ifv"),
                              x.var(0, correction=0)[columns], rtol=1e-4)
        norm = w.abs().mean(0) * x.norm(dim=0) / len(x) ** .5
        assert torch.allclose(column_fluctuation(stats[group].consumer_stats, "wifn"), norm[columns], rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_moments_do_not_depend_on_whether_the_layer_has_a_bias(bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=bias)).double()
    x = torch.randn(50, 3).double()
    (reader, _), = collect(Channels(net, [x]), [x[:20], x[20:]], {"consumer_stats"})["0.weight"].consumer_stats
    z = net[:2](x).detach()
    variance, second = input_moments(reader)
    assert torch.allclose(variance[0], z.var(0, correction=0), atol=1e-5)
    assert torch.allclose(second[0], z.square().mean(0), atol=1e-5)


def test_standardised_by_hand_and_without_removed_units():
    x = torch.tensor([[1.], [2.], [3.], [100.]]).double()
    found = standardised(x, torch.tensor([True, True, True, False]))
    assert torch.allclose(found[:3, 0], torch.tensor([-1., 0, 1]).double() / (2 / 3) ** .5)
    assert standardised(torch.full((3, 2), .3), torch.ones(3, dtype=torch.bool)).eq(0).all()
    assert standardised(torch.ones(1, 1), torch.ones(1, dtype=torch.bool)).eq(0).all()


@pytest.mark.parametrize("power", [1., 2.])
def test_heads_are_squared_standardised_and_averaged(tokens, power):
    model = llama().double()
    space = Channels(model, tokens)
    stats = collect(space, tokens, {"consumer_stats"})
    found = fluctuation(space, stats, head_power=power)
    for n, g in space.groups.items():
        f = column_fluctuation(stats[n].consumer_stats, "wifv")
        if not g.heads:
            s = found[n]
            assert abs(s.mean()) < 1e-9 and abs(s.std(correction=0) - 1) < 1e-9
            continue
        assert tuple(f.shape) == (2, 8)   # grouped queries: two heads of four channels share a key head
        f = f ** power
        assert torch.allclose(found[n], ((f - f.mean()) / f.std(correction=0)).mean(1))


def test_the_fluctuation_is_that_of_all_layers_that_read():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x).tanh()
            return self.b(x) * self.c(x)

    torch.manual_seed(0)
    net, x = Twice().double(), torch.randn(40, 3).double()
    space = Channels(net, [x])
    stats = collect(space, [x], {"consumer_stats"})
    both = column_fluctuation(stats["a.weight"].consumer_stats, "wifv")
    z = net.a(x).tanh().detach()
    each = [z.var(0, correction=0) * m.weight.detach().square().sum(0) for m in (net.b, net.c)]
    assert torch.allclose(both, torch.stack(each, 1), rtol=1e-4)


# one ranking by cost

def test_a_head_and_a_neuron_cost_what_is_removed_with_them(tokens):
    for model in (llama(), biased_llama(), opt(), gpt2()):
        space = Channels(copy.deepcopy(model), tokens)
        cost, full = unit_costs(space), sum(p.numel() for p in model.parameters())
        for name in space.names()[:2]:
            space = Channels(net := copy.deepcopy(model), tokens)
            keep = {n: torch.arange(len(g)) > 0 if n == name else torch.ones(len(g), dtype=torch.bool)
                    for n, g in space.groups.items()}
            space.apply({n: (None, m) for n, m in keep.items()}.items())
            space.remove()
            assert full - sum(p.numel() for p in net.parameters()) == cost[name]


def test_the_ranking_is_cut_where_the_share_is_spent(monkeypatch):
    monkeypatch.setattr(language_widths, "unit_costs", lambda space: {"a": 6, "b": 2})
    scores = {"a": torch.tensor([4., 1.]), "b": torch.tensor([5., 3., 2., 0.])}
    space = SimpleNamespace(groups=dict.fromkeys("ab"))   # costs in order of the scores: 2, 8, 10, 12, 18, 20
    found = {keep: global_params(scores, keep, space) for keep in (.1, .4, .6, .9, 1.)}
    assert {k: (f["a"] * 2, f["b"] * 4) for k, f in found.items()} == {.1: (0, 1), .4: (1, 1), .6: (1, 3), .9: (2, 3),
                                                                      1.: (2, 4)}


def test_equal_costs_make_it_the_ranking_of_all_units(tokens):
    model = opt()
    plans = [prune(copy.deepcopy(model), "flap", .4, tokens, skip=("*self_attn*",), allocate=a)
             for a in (global_params, global_)]
    assert plans[0] == plans[1] and len({int(m.sum()) for m in plans[0].masks.values()}) > 1


def test_a_budget_of_parameters_is_met(tokens):
    for kind, make in MODELS.items():
        plan = prune(make(), "flap", {"params": .15}, tokens)
        assert .15 <= plan.budget["achieved"] < .2, kind


# bias compensation

@pytest.mark.parametrize("kind, part, dtype, close", [
    ("llama", 0, torch.float64, 1e-5), ("llama", 1, torch.float64, 1e-5), ("opt", 0, torch.float64, 1e-5),
    ("opt", 1, torch.float64, 1e-5), ("gpt2", 0, torch.float64, 1e-5), ("gpt2", 1, torch.float64, 1e-5),
    ("llama", 0, torch.float32, 1e-4), ("gpt2", 1, torch.float32, 1e-4), ("llama", 0, torch.bfloat16, .05)])
def test_the_mean_output_is_preserved(kind, part, dtype, close, tokens):
    made, change = MODELS[kind]().to(dtype), []
    name = READERS[kind][part].format(0)
    wanted = rows(made, name, tokens, outputs=True).double().mean(0)
    space = Channels(made, tokens)
    group, = [g for g in space.groups.values() if f"{name}.weight" in dict(g.consumes)]
    others = [p for g in space.groups.values() if g is not group for p, _ in g.produces]
    for solve in ({}, {"solve": zero}):
        model = copy.deepcopy(made)
        plan = prune(model, "flap", .5, tokens, skip=tuple(others), **solve)
        assert len(plan.masks) == 1 and plan.density < 1
        found = rows(model, name, tokens, outputs=True).double().mean(0)
        change.append(((found - wanted).norm() / wanted.norm()).item())
    assert change[0] < close < .5 * change[1]


def test_zero_biases_change_nothing_and_are_saved(tokens, tmp_path):
    plain, biased = llama(), biased_llama()
    with torch.no_grad():
        assert torch.equal(plain(**tokens[0]).logits, biased(**tokens[0]).logits)
    assert biased.lm_head.weight is biased.model.embed_tokens.weight
    assert biased.config.attention_bias and biased.config.mlp_bias and not plain.config.mlp_bias
    plan = prune(biased, "flap", .5, tokens)
    assert biased.lm_head.weight is biased.model.embed_tokens.weight
    assert any(biased.model.layers[i].mlp.down_proj.bias.abs().max() > 0 for i in range(2))
    plan.save(tmp_path / "half")
    loaded = load_pruned(tmp_path / "half", biased_llama())
    with torch.no_grad():
        assert torch.equal(loaded(**tokens[0]).logits, biased(**tokens[0]).logits)
    assert load_plan(tmp_path / "half") == plan


def test_zero_biases_keep_dtype_and_fit_a_pruned_model(tokens):
    model = llama().bfloat16()
    prune(model, "flap", .5, tokens)
    add_zero_biases(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    mlp = model.model.layers[0].mlp
    assert len(mlp.gate_proj.bias) == len(mlp.gate_proj.weight) == mlp.down_proj.weight.shape[1]
    with torch.no_grad():
        assert model(**tokens[0]).logits.isfinite().all()


@pytest.mark.parametrize("make", [gpt2, opt, biased_llama, lambda: nn.Linear(2, 2)])
def test_biases_that_no_configuration_knows_are_refused(make):
    model = make()
    before = [*model.state_dict()]
    with pytest.raises(BadInput, match="can add a bias"):
        add_zero_biases(model)
    assert before == [*model.state_dict()]


def test_without_a_bias_the_kept_weights_are_left_as_they_are(tokens):
    models = llama(), llama()
    assert prune(models[0], "flap", .5, tokens) == prune(models[1], "flap", .5, tokens, solve=zero)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models)))


# grouped queries, tied embeddings

@pytest.mark.parametrize("method", ["flap", "cfsp"])
def test_heads_stay_consistent_and_embeddings_tied(method, tokens):
    model = llama()
    prune(model, method, {"params": .25}, tokens)
    for block in model.model.layers:
        a, queries = block.self_attn, len(block.self_attn.q_proj.weight)
        assert queries == a.o_proj.weight.shape[1] == 2 * len(a.k_proj.weight) == 2 * len(a.v_proj.weight)
        assert queries == 16 or method == "flap"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert model(**tokens[0]).logits.shape == (4, 16, 48)


# CFSP

def test_the_angle_is_the_mean_over_tokens_of_the_block_of_a_group(tokens):
    for model in (llama(), opt(), gpt2()):
        space = Channels(model, tokens)
        angles = block_angles(space, tokens)
        with torch.no_grad():
            states = [model(**b, output_hidden_states=True).hidden_states for b in tokens]
        for i in (0,):   # the last state has passed the final norm
            pairs = [torch.cosine_similarity(s[i].double(), s[i + 1].double(), dim=-1) for s in states]
            want = torch.cat(pairs).clamp(-1, 1).arccos().mean().item() / torch.pi
            mine = [a for n, a in angles.items() if f".{i}." in n]
            assert len(mine) == 2 and all(a == pytest.approx(want, abs=1e-6) for a in mine)


@pytest.mark.parametrize("keep", [.2, .5, .9, 1.])
@pytest.mark.parametrize("steepness", [0., 1., 50.])
def test_shares_average_to_the_budget_and_rise_with_the_angle(keep, steepness):
    angles, size = {"a": .1, "b": .2, "c": .12, "d": .4}, {"a": 10, "b": 20, "c": 30, "d": 40}
    found = sigmoid_shares(angles, size, keep, steepness)
    assert sum(found[n] * size[n] for n in size) / 100 == pytest.approx(keep, abs=1e-12)
    assert all(0 <= f <= 1 for f in found.values())
    order = [found[n] for n in ("a", "c", "b", "d")]
    assert order == sorted(order)
    if steepness == 0: assert {*found.values()} == {keep}


def test_shares_by_hand():
    s = [1 / (1 + torch.tensor(-PUBLISHED_SCALE * x).exp().item()) for x in (-.05, .05)]
    found = sigmoid_shares({"a": .1, "b": .2}, {"a": 5, "b": 5}, .4, 1.)
    assert [found[n] for n in "ab"] == pytest.approx([.4 * x / (sum(s) / 2) for x in s], rel=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_only_neurons_are_removed_and_a_flat_sigmoid_is_uniform(kind, tokens):
    model = MODELS[kind]()
    space = Channels(model, tokens)
    plan = prune(copy.deepcopy(model), "cfsp", .5, tokens, steepness=0.)
    kept = {n: int(m.sum()) for n, m in plan.masks.items()}
    assert all(k == (len(g) if g.heads else 12) for (n, k), g in zip(kept.items(), space.groups.values()))
    steep = prune(copy.deepcopy(model), "cfsp", .5, tokens, steepness=100.)
    neurons = [n for n, g in space.groups.items() if not g.heads]
    angles = block_angles(space, tokens)
    counts = [int(steep.masks[n].sum()) for n in sorted(neurons, key=angles.get)]
    assert counts == sorted(counts) and counts[0] < counts[-1] and abs(sum(counts) - 24) <= 1


def test_the_released_score_is_the_activation_norm(tokens):
    for model, terms in ((llama().double(), 3), (opt().double(), 2), (gpt2().double(), 2)):
        space = Channels(model, tokens)
        stats = collect(space, tokens, {"consumer_stats"})
        found = activation_share(space, stats, over="features", inner_power=.6, outer_power=1.7)
        for n, g in space.groups.items():
            if g.heads: continue
            (reader, columns), = stats[n].consumer_stats
            rms = input_moments(reader)[1][0][columns[:, 0]].sqrt()
            assert torch.allclose(found[n], terms / 16 * rms ** 1.7, rtol=1e-12)
            other = activation_share(space, stats, inner_power=.6, outer_power=1.7)[n]
            assert not torch.allclose(other / other.sum(), found[n] / found[n].sum(), rtol=.01)


def test_relative_weights_by_hand():
    m = torch.tensor([[1., 3.], [2., 2.]]).double()
    assert mean_share(m, "neurons").tolist() == [.375, .625]
    assert mean_share(m, "features").tolist() == [.5, .5]
    assert mean_share(torch.zeros(2, 2), "neurons").tolist() == [0, 0]


def test_a_neuron_that_is_never_active_goes_first(tokens):
    model = llama()
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[5] = 0
    for method in ("cfsp", "flap"):
        plan = prune(copy.deepcopy(model), method, .1, tokens, allocate="uniform")
        assert not plan.masks["model.layers.1.mlp.gate_proj.weight"][5]


# refusals

def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(BadInput, match="'variance'"): build("flap", metric="variance")
    with pytest.raises(BadInput, match="'rows'"): build("cfsp", over="rows")
    with pytest.raises(BadInput, match="head_power"): build("flap", head_power=-1.)


def test_allocations_say_where_they_do_not_apply(tokens):
    model = llama()
    with pytest.raises(BadInput, match="keeps all heads"):
        prune(model, "cfsp", .5, tokens, space="heads")
    with pytest.raises(BadInput, match="counts the parameters"):
        prune(model, "magnitude", .5, allocate="global_params")
    stages = nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)) for _ in range(2)))
    before = [p.clone() for p in stages.parameters()]
    with pytest.raises(BadInput, match="residual stream"):
        prune(stages, "cfsp", .5, torch.randn(4, 2, 5, 5))
    assert all(torch.equal(a, b) for a, b in zip(before, stages.parameters()))


def test_angles_divide_the_weights_of_blocks_as_well(tokens):
    plan = prune(llama(), "wanda", .5, tokens, pattern="unstructured", allocate=ALLOCATORS["angle_sigmoid"](10.))
    by_block = {}
    for n, m in plan.masks.items(): by_block.setdefault(n.split(".")[2], []).append(m.float().mean().item())
    assert plan.density == pytest.approx(.5, abs=1e-3)
    assert all(max(d) - min(d) < .01 for d in by_block.values())
    assert abs(by_block["0"][0] - by_block["1"][0]) > .02
