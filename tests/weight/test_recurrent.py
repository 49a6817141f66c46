"Recurrent layers: masks in the forward pass, statistics of every product, and the study of both matrices."
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.rule import Rule, apply_rule
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import masks_of
from pruning_bench.core.pattern import count_to_keep
from pruning_bench.core.recovery import finetune
from pruning_bench.core.space import Weights, prunable_layers
from pruning_bench.core.stats import act_norm, collect, grad, gram, record_inputs
from pruning_bench.weight.recurrent import (SYMBOLS, gate_densities, is_grammatical, skip_except, reber_dataset,
                                            random_string)

LAYERS = {"tanh": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"}), "gru": (nn.GRU, {}), "lstm": (nn.LSTM, {}),
          "projected": (nn.LSTM, {"proj_size": 3}),
          "both ways": (nn.LSTM, {"bidirectional": True})}
each_layer = pytest.mark.parametrize("kind", LAYERS)


class Net(nn.Module):
    def __init__(self, kind, layers=2):
        super().__init__()
        make, options = LAYERS[kind]
        self.cell = make(5, 6, layers, batch_first=True, **options)
        self.head = nn.Linear(self.cell(torch.zeros(1, 1, 5))[0].shape[-1], 3)

    def forward(self, x): return self.head(self.cell(x)[0][:, -1])

def net(kind, seed=0, layers=2):
    with seeded(seed): return Net(kind, layers).eval()

def data(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 7, 5, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)]

def by_hand(cell, x): # outputs of the last step, from the parameters as they are; one direction
    kind, layers = type(cell), cell.num_layers
    for k in range(layers):
        U, W, b, c = (getattr(cell, f"{p}_l{k}") for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, s, out = torch.zeros(len(x), W.shape[1]), torch.zeros(len(x), cell.hidden_size), []
        for t in range(x.shape[1]):
            u, w = x[:, t] @ U.T + b, h @ W.T + c
            if kind is nn.RNN: h = (u + w).tanh() if cell.nonlinearity == "tanh" else (u + w).relu()
            elif kind is nn.GRU:
                (r, z, n), (r2, z2, n2) = u.chunk(3, 1), w.chunk(3, 1)
                n = (n + (r + r2).sigmoid() * n2).tanh()
                h = (1 - (z + z2).sigmoid()) * n + (z + z2).sigmoid() * h
            else:
                i, f, g, o = (u + w).chunk(4, 1)
                s = f.sigmoid() * s + i.sigmoid() * g.tanh()
                h = o.sigmoid() * s.tanh()
                if cell.proj_size: h = h @ getattr(cell, f"weight_hr_l{k}").T
            out.append(h)
        x = torch.stack(out, 1)
    return x[:, -1]


# weights and masks

def test_the_matrices_of_recurrent_layers():
    def shapes(model): return {n: l.shape for n, l in prunable_layers(model).items()}
    assert shapes(nn.GRU(5, 6)) == {"weight_ih_l0": (18, 5), "weight_hh_l0": (18, 6)}
    assert list(prunable_layers(nn.LSTM(5, 6, proj_size=3))) == ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    assert len(prunable_layers(nn.RNN(5, 6, 2, bidirectional=True))) == 8
    assert shapes(nn.LSTMCell(5, 6)) == {"weight_ih": (24, 5), "weight_hh": (24, 6)}

@each_layer
def test_the_forward_pass_sees_the_zeros(kind):
    model, x = net(kind), data()[0][0]
    whole = model(x)
    plan = prune(model, "magnitude", .8, skip="*weight_ih*")
    assert all("weight_ih" not in n for n in plan.masks) and abs(plan.density - .2) < .01
    by_values = net(kind)
    for n, m in plan.masks.items(): by_values.get_parameter(n).data *= m
    assert torch.allclose(model(x), by_values(x), atol=1e-6) and not torch.allclose(model(x), whole)
    if kind != "both ways": assert torch.allclose(model(x), model.head(by_hand(model.cell, x)), atol=1e-5)

@each_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: copy.deepcopy(copy.deepcopy(m))],
                         ids=["copy", "copy of a copy"])
def test_zeros_hold_through_training_and_copies(kind, copied):
    model = net(kind)
    plan = prune(model, "global-magnitude", .7, skip="head")
    twin = copied(model)
    for m in (model, twin):
        before = m(data()[0][0]).detach()
        finetune(4, 1e-2, weight_decay=.1)(m, data(), F.cross_entropy)
        assert all((m.get_parameter(n)[~mask] == 0).all() for n, mask in plan.masks.items())
        if kind != "both ways": assert torch.allclose(m(data()[0][0]), m.head(by_hand(m.cell, data()[0][0])), atol=1e-5)
        assert not torch.allclose(before, m(data()[0][0]))

@each_layer
def test_reloading_keeps_the_zeros(kind, tmp_path):
    model, x = net(kind), data()[0][0]
    plan = prune(model, "magnitude", .7, skip="head")
    plain, masked = net(kind, 1), net(kind, 2)
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    plan.save(tmp_path / "plan")
    load_plan(tmp_path / "plan").apply(masked)
    masked.load_state_dict(net(kind).state_dict())   # dense weights into a masked model
    assert all(torch.allclose(m(x), model(x), atol=1e-6) for m in (plain, masked))
    assert set(masks_of(masked)) == set(plan.masks)

@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision(kind, dtype):
    model, x = net(kind).to(dtype), data()[0][0].to(dtype)
    plan = prune(model, "magnitude", .5, skip="head")
    assert all(p.dtype == dtype for p in model.parameters()) and plan.density == pytest.approx(.5, abs=.01)
    assert torch.equal(copy.deepcopy(model)(x), model(x))

@each_layer
def test_nothing_pruned_is_nothing_changed(kind):
    model, x = net(kind), data()[0][0]
    before = model(x)
    prune(model, "magnitude", 0.)
    assert torch.equal(before, model(x))

@pytest.mark.parametrize("kind", ["tanh", "relu", "gru", "lstm"])
def test_without_the_way_back(kind):
    "A plain network forgets everything but the last symbol; gated ones do not."
    model, (x, _) = net(kind), data()[0]
    plan = prune(model, "magnitude", 1 - 1e-9, skip=skip_except(model, "*weight_hh*"))
    assert plan.density == 0
    y = torch.cat([x.flip(0)[:, :-1], x[:, -1:]], 1)   # another past
    assert torch.equal(model(x), model(y)) == (kind in ("tanh", "relu"))
    if kind == "tanh":
        h, cell = x[:, -1], model.cell
        for k in range(2):
            h = torch.tanh(h @ getattr(cell, f"weight_ih_l{k}").T + getattr(cell, f"bias_ih_l{k}")
                           + getattr(cell, f"bias_hh_l{k}"))
        assert torch.allclose(model(x), model.head(h), atol=1e-6)

@each_layer
def test_rules_inside_a_training(kind):
    "The network sees the view, and is a plain module again afterwards: copies and reloads work at once."
    model, x = net(kind), data()[0][0]
    names, silent = list(model.state_dict()), net(kind)
    for n, w in silent.named_parameters(): w.data *= "weight_hh" not in n
    rule = Rule(view=lambda w, state, training: w * 0,
                finish=lambda training: {n: (training.w(n) * 0, training.alive(n)) for n in training.names})
    with apply_rule(rule, Weights(model, skip=skip_except(model, "*weight_hh*")), 1., 2):
        assert torch.allclose(model(x), silent(x), atol=1e-6)
        finetune(2)(model, data(), F.cross_entropy)
    twin = copy.deepcopy(model)
    assert list(model.state_dict()) == names and torch.equal(twin(x), model(x)) and not model.cell.weight_hh_l0.any()
    finetune(3, 1e-2)(twin, data(), F.cross_entropy)
    assert twin.cell.weight_hh_l0.any() and not torch.equal(twin(x), model(x))


# statistics

@pytest.mark.parametrize("kind", ["tanh", "relu", "gru", "lstm"])
@pytest.mark.parametrize("flat", [False, True], ids=["apart", "in one storage"])
def test_every_product_is_heard(kind, flat):
    model, batches = net(kind, layers=1), data(3)
    if flat:   # as on a GPU, where all weights of a layer lie in one piece of memory
        whole, at = torch.cat([p.data.flatten() for p in model.cell.parameters()]), 0
        for p in model.cell.parameters():
            p.data, at = whole[at:at + p.numel()].view_as(p), at + p.numel()
    x = torch.cat([b[0] for b in batches])
    states = torch.cat([torch.zeros(len(x), 1, 6), model.cell(x)[0][:, :-1]], 1).flatten(0, 1).detach()
    heard = act_norm(Weights(model), batches)
    assert torch.allclose(heard["cell.weight_hh_l0"][0], states.norm(dim=0), atol=1e-4)
    assert torch.allclose(heard["cell.weight_ih_l0"][0], x.flatten(0, 1).norm(dim=0), atol=1e-4)
    assert torch.allclose(gram(Weights(model), batches)["cell.weight_hh_l0"][0], states.T @ states / len(states),
                          atol=1e-5)

def test_fused_kernels_are_back_afterwards():
    class Broken(nn.LSTM):
        def forward(self, x): super().forward(x); raise RuntimeError("broken")
    fused = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    act_norm(Weights(net("lstm")), data())
    with pytest.raises(RuntimeError, match="broken"): record_inputs(Weights(Broken(5, 6)), data(), lambda *a: None)
    assert fused == (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)

@each_layer
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip"])
def test_methods_that_read_data_prune_recurrent_layers(kind, method):
    plan = prune(net(kind), method, .5, data(), F.cross_entropy, skip="head")
    rows = sum(m.shape[0] * count_to_keep(.5, m.shape[1]) for m in plan.masks.values())
    half = sum(m.numel() for m in plan.masks.values()) // 2
    assert sum(int(m.sum()) for m in plan.masks.values()) == (rows if method == "wanda" else half)

def test_gradients_are_those_of_backpropagation_through_time():
    model, batch = net("lstm"), data(1)
    got = grad(Weights(model), batch, F.cross_entropy)
    F.cross_entropy(model(batch[0][0]), batch[0][1]).backward()
    assert all(torch.allclose(got[n], model.get_parameter(n).grad, atol=1e-6) for n in got)

def test_a_layer_that_never_runs_is_named():
    class Idle(Net):
        def forward(self, x): return self.head(torch.zeros(len(x), 6))
    with seeded(0): model = Idle("lstm")
    with pytest.raises(BadInput, match="'cell.weight_ih_l0'"): collect(Weights(model), data(), {"act_norm"})


# the chapter's parts

def test_reber():
    x, y = reber_dataset(64, length=10, seed=3)
    strings = ["".join(SYMBOLS[i] for i in row) for row in x.tolist()]
    assert x.shape == (64, 10) and [is_grammatical(s.strip()) for s in strings] == [not bad for bad in y.tolist()]
    assert all(s == s.strip().rjust(10) and s.strip()[0] == "B" and s[-1] == "E" for s in strings)
    assert torch.equal(x, reber_dataset(64, 10, 3)[0]) and not torch.equal(x, reber_dataset(64, 10, 4)[0])
    assert all(is_grammatical(random_string(random.Random(i))) for i in range(50))
    assert [is_grammatical(s) for s in ("BTXSE", "BPVVE", "BTSSXXTVVE", "BTXS", "BTXSEE", "", "XTXSE",
                                        "BTXVE")] == [True] * 3 + [False] * 5

def test_only():
    model = net("lstm")
    assert skip_except(model, "cell*") == ("head.weight",) and skip_except(model, "*") == ()
    assert set(prune(model, "magnitude", .5, skip=skip_except(model, "*hh_l1")).masks) == {"cell.weight_hh_l1"}
    with pytest.raises(BadInput, match="no prunable weight matches"): skip_except(model, "*weigth_hh*")

def test_by_gate():
    model = nn.LSTM(1, 2)
    model.weight_hh_l0.data = torch.tensor([[9., 9], [9, 9], [1, 1], [1, 1], [8, 1], [8, 1], [8, 1], [1, 1]])
    table = gate_densities(model, prune(model, "magnitude", 1 - 7 / 16, skip="weight_ih_l0"))
    assert table.loc["weight_hh_l0"].to_dict() == {"input": 1., "forget": 0., "cell": .5, "output": .25}
    projected = net("projected")
    assert (list(gate_densities(projected, prune(projected, "magnitude", .5)).index)
            == [f"cell.weight_{p}_l{k}" for k in (0, 1) for p in ("ih", "hh")])
    with pytest.raises(BadInput, match="no recurrent matrix"):
        gate_densities(nn.Sequential(nn.Linear(2, 2)), prune(nn.Sequential(nn.Linear(2, 2)), "magnitude"))
