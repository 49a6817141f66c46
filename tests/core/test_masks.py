"""Masks stay with their parameters whatever is done to a model: exact zeros, the same function, or one sentence."""
import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from pruning_bench import BadInput, prune, pruning
from pruning_bench.core import mask as masks
from pruning_bench.core.mask import (MaskedParameter, attach_mask, detach_mask, mask_of, masks_of, record_gradient,
                                     remove_masks, set_mask, install_hooks)


class Attention(nn.Module):
    "`out_proj` is a module that is never called: its parent reads its weight."
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x): return self.head(self.attention(x, x, x, need_weights=False)[0])


class Reader(nn.Module):
    "Reads the weight of a child without calling it, as torchvision's Swin does."
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x): return self.head(F.relu(F.linear(x, self.fc.weight, self.fc.bias)))


class Tied(nn.Module):
    "Two layers with one weight."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x): return self.b(F.relu(self.a(x)))


def linear(): return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
def conv(): return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))


KINDS = {"linear": linear, "conv": conv, "attention": Attention, "reader": Reader, "tied": Tied}
every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(kind, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((5, 3, 4, 4) if kind == "conv" else (5, 3, 8) if kind == "attention" else (5, 8), generator=g)


def dense(kind, seed=0):
    torch.manual_seed(seed)
    return KINDS[kind]()


def sparse(kind, seed=0): # half of every weight is pruned
    model = dense(kind, seed)
    if kind == "tied":   # `prune` leaves shared weights alone
        attach_mask(model.a, "weight", model.a.weight.abs() > model.a.weight.abs().median())
        install_hooks(model, inside=True)
    else: assert prune(model, "magnitude", .5).density == .5
    return model


def attach(model, name, mask):
    owner, _, attr = name.rpartition(".")
    attach_mask(model.get_submodule(owner), attr, mask)


def train(model, x, steps=3, optimizer=None):
    opt = optimizer or torch.optim.SGD(model.parameters(), .1, momentum=.9, weight_decay=1e-2)
    for _ in range(steps):
        opt.zero_grad(); model(x).square().mean().backward(); opt.step()
    return opt


def exact(model, expected, prefix=""): # zeros where they were planned, and nowhere else
    assert expected
    for name, mask in expected.items(): assert torch.equal(model.get_parameter(prefix + name) != 0, mask), name


def same_function(model, x): # as the ordinary model that is left when the masks are removed
    model.eval()
    with torch.no_grad(): found = model(x)
    plain = remove_masks(copy.deepcopy(model))
    with torch.no_grad(): return torch.equal(found, plain(x))


def test_the_weights_that_are_masked_are_those_that_the_grid_speaks_of():
    names = {kind: list(masks_of(sparse(kind))) for kind in KINDS}
    assert names == {"linear": ["0.weight", "2.weight"], "conv": ["0.weight", "4.weight"], "tied": ["a.weight"],
                     "attention": ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"],
                     "reader": ["fc.weight", "head.weight"]}


# copies

@every_kind
def test_copies_train_under_the_same_mask(kind):
    model, x = sparse(kind), inputs(kind)
    expected, before = masks_of(model), copy.deepcopy(model.state_dict())
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model))):
        train(twin, x)
        exact(twin, expected)
        assert same_function(twin, x) and masks_of(twin).keys() == expected.keys()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    if kind == "tied": assert twin.a.weight is twin.b.weight


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_masks import KINDS, inputs, train
for kind in KINDS:
    model = torch.load(f"{sys.argv[2]}/{kind}.pt", weights_only=False)
    train(model, inputs(kind))
    torch.save(model.state_dict(), f"{sys.argv[2]}/{kind}.trained.pt")
"""


def test_a_fresh_process_trains_the_loaded_model_under_its_masks(tmp_path):
    models = {kind: sparse(kind) for kind in KINDS}
    for kind, model in models.items(): torch.save(model, tmp_path / f"{kind}.pt")
    subprocess.run([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path)], check=True)
    for kind, model in models.items():
        expected, twin = masks_of(model), dense(kind)
        twin.load_state_dict(torch.load(tmp_path / f"{kind}.trained.pt"))   # only tensors
        exact(twin, expected)
        assert not torch.equal(next(twin.parameters()), next(model.parameters()))


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_those_of_the_plain_model(kind, assign):
    model, other, x = sparse(kind), dense(kind, 1), inputs(kind)
    expected, state = masks_of(model), model.state_dict()
    assert list(state) == list(other.state_dict()) and all(type(t) is torch.Tensor for t in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.eval()(x), copy.deepcopy(model).eval()(x))
    model.load_state_dict(dense(kind, 2).state_dict(), assign=assign)
    exact(model, expected)
    train(model, x)
    exact(model, expected)
    assert same_function(model, x)


@every_kind
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_keep_the_zeros(kind, use_buffers):
    model, x = sparse(kind), inputs(kind)
    expected, ema, opt = masks_of(model), AveragedModel(model, use_buffers=use_buffers), None
    for _ in range(3):
        opt = train(model, x, 1, opt)
        ema.update_parameters(model)
    exact(ema.module, expected)
    assert same_function(ema.module, x) and not torch.equal(next(ema.module.parameters()), next(model.parameters()))


# other people write weights

WRITES = {
    "copy_": lambda p, q: p.copy_(q),
    "add_": lambda p, q: p.add_(q),
    "+=": lambda p, q: p.__iadd__(q),
    "elements": lambda p, q: p.__setitem__(..., q),
    "normal_": lambda p, q: nn.init.normal_(p),
    "data": lambda p, q: setattr(p, "data", q.clone()),
    "data +=": lambda p, q: setattr(p, "data", p.data.__iadd__(q)),   # as a merge of LoRA does
}
UNSEEN = {
    "data.copy_": lambda p, q: p.data.copy_(q),
    "view of data": lambda p, q: p.data.view(-1).add_(q.view(-1)),
    "detach": lambda p, q: p.detach().copy_(q),
    "foreach": lambda p, q: torch._foreach_add_([p], [q]),
}


@pytest.mark.parametrize("write", WRITES)
@every_kind
def test_a_direct_write_leaves_the_zeros(kind, write):
    model, other = sparse(kind), dense(kind, 1)
    expected = masks_of(model)
    with torch.no_grad():
        for n in expected: WRITES[write](model.get_parameter(n), other.get_parameter(n))
    exact(model, expected)
    assert not torch.equal(next(model.parameters()), next(sparse(kind).parameters()))


USES = {
    "evaluated": lambda m, x: m.eval()(x),
    "without gradients": lambda m, x: torch.no_grad()(m.eval())(x),
    "inference mode": lambda m, x: torch.inference_mode()(m.eval())(x),
    "saved": lambda m, x: m.state_dict(),
    "copied": lambda m, x: copy.deepcopy(m),
    "listed": lambda m, x: masks_of(m),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("write", UNSEEN)
@every_kind
def test_any_other_write_is_undone_before_the_weights_are_used(kind, write, use):
    model, other, x = sparse(kind), dense(kind, 1), inputs(kind)
    expected = masks_of(model)
    for _ in range(2):   # also the second time
        with torch.no_grad():
            for n in expected: UNSEEN[write](model.get_parameter(n), other.get_parameter(n).data)
        USES[use](model, x)
        exact(model, expected)
    assert same_function(model, x)


@every_kind
def test_an_alias_that_somebody_keeps_is_never_trusted(kind):
    model, x = sparse(kind), inputs(kind)
    expected = masks_of(model)
    aliases = [model.get_parameter(n).data for n in expected]
    for _ in range(3):
        for a in aliases: a.add_(1)
        model(x)
        exact(model, expected)


@every_kind
def test_an_average_from_before_the_pruning_can_be_copied_back(kind):
    model, x = dense(kind), inputs(kind)
    ema = copy.deepcopy(model)
    pruned = sparse(kind)
    expected = masks_of(pruned)
    with torch.no_grad():
        for a, b in zip(pruned.parameters(), ema.parameters()): a.data.copy_(b.data)
    assert same_function(pruned, x)
    exact(pruned, expected)
    assert all((p != 0).all() for n, p in ema.named_parameters() if n in expected)   # the average itself is untouched


@every_kind
@pytest.mark.parametrize("held", [False, True], ids=["alone", "old one held by an optimiser"])
def test_a_parameter_that_replaces_a_masked_one_is_masked(kind, held):
    model, other, x = sparse(kind), dense(kind, 1), inputs(kind)
    expected, opt = masks_of(model), torch.optim.SGD(model.parameters(), .1) if held else None
    for n in expected:
        owner, _, attr = n.rpartition(".")
        new = nn.Parameter(other.get_parameter(n).detach().clone())
        setattr(model.get_submodule(owner), attr, new)
        if kind == "tied": model.b.weight = new
    exact(model, expected)
    train(model, x)
    exact(model, expected)
    assert opt is None or len(opt.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_parameter_made_of_a_masked_one_has_its_mask():
    model = sparse("linear")
    again = nn.Parameter(model[0].weight)
    assert type(again) is MaskedParameter and again.data_ptr() == model[0].weight.data_ptr()
    again.grad = torch.ones_like(again)
    torch.optim.SGD([again], .1).step()
    assert torch.equal(again != 0, mask_of(model[0], "weight"))


@every_kind
def test_weights_that_are_lent_to_a_model_are_not_changed(kind):
    model, other, x = sparse(kind), dense(kind, 1), inputs(kind)
    lent = dict(other.named_parameters())
    before = {n: p.detach().clone() for n, p in lent.items()}
    found = torch.func.functional_call(model.eval(), lent, (x,), tie_weights=True)
    assert torch.equal(found, other.eval()(x))
    assert all(torch.equal(before[n], p) and type(p) is nn.Parameter for n, p in lent.items())
    exact(model, masks_of(model))


# steps

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1),
    "sgd foreach": lambda p: torch.optim.SGD(p, .1, momentum=.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, .01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, .01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, .01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, .01, momentum=.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, .1),
}


@every_kind
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimiser_moves_a_pruned_weight(kind, optimizer):
    model, x = dense(kind), inputs(kind)
    opt = train(model, x, 2, OPTIMIZERS[optimizer](model.parameters()))   # with momentum from before
    chosen = sparse(kind)
    for n, mask in masks_of(chosen).items(): attach(model, n, mask)
    expected = masks_of(model)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()   # before any forward pass
    exact(model, expected)
    train(model, x, 3, opt)
    exact(model, expected)
    assert all(opt.state[model.get_parameter(n)] for n in expected)   # the optimiser still knows its parameters
    assert same_function(model, x)


def test_the_state_of_an_optimiser_comes_back():
    model, x = sparse("linear"), inputs("linear")
    opt = train(model, x, 3, torch.optim.AdamW(model.parameters(), .01))
    twin = copy.deepcopy(model)
    again = torch.optim.AdamW(twin.parameters(), .01)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, x, 2, opt), train(twin, x, 2, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@every_kind
def test_gradients_of_pruned_weights_are_zero_and_the_others_are_those_of_the_plain_model(kind):
    model, x = sparse(kind), inputs(kind)
    plain = remove_masks(copy.deepcopy(model))
    for _ in range(2):   # accumulated
        for m in (model, plain): m(x).square().mean().backward()
    for n, mask in masks_of(model).items():
        found, want = model.get_parameter(n).grad, plain.get_parameter(n).grad
        assert torch.equal(found, want.masked_fill(~mask, 0)) and want[~mask].abs().max() > 0
    for p in plain.parameters(): p.grad = p.grad if p.grad is None else p.grad.masked_fill((p == 0) & (p.dim() > 1), 0)
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 1e-3) for m in (model, plain)]
    assert torch.allclose(*norms, rtol=1e-5)


@every_kind
def test_scaled_gradients_step_under_the_mask(kind):
    model, x = sparse(kind), inputs(kind)
    expected, scaler = masks_of(model), torch.amp.GradScaler("cpu", init_scale=4.)
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    plain = copy.deepcopy(model)
    train(plain, x, 3, torch.optim.SGD(plain.parameters(), .1, momentum=.9))
    for _ in range(3):
        opt.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(opt); scaler.step(opt); scaler.update()
    exact(model, expected)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), plain.parameters()))


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_under_the_mask(kind, reentrant):
    model, x = sparse(kind), inputs(kind).requires_grad_(True)
    expected, opt = masks_of(model), torch.optim.SGD(model.parameters(), .1, momentum=.9)
    for _ in range(3):
        opt.zero_grad(); checkpoint(model, x, use_reentrant=reentrant).square().mean().backward(); opt.step()
    exact(model, expected)


def test_a_gradient_that_will_be_differentiated_again_stays_differentiable():
    layer = nn.Linear(3, 2)
    attach_mask(layer, "weight", torch.tensor([[True, False, True], [False, True, True]]))
    loss = layer(torch.ones(1, 3)).pow(3).sum()
    with pytest.warns(UserWarning, match="create_graph"): loss.backward(create_graph=True)
    assert layer.weight.grad.requires_grad and not layer.weight.grad[0, 1] and layer.weight.grad[0, 0]
    layer.weight.grad = None


@every_kind
def test_weights_that_are_thawed_later_are_masked(kind):
    model, x = dense(kind).requires_grad_(False), inputs(kind)
    chosen = sparse(kind)
    for n, mask in masks_of(chosen).items(): attach(model, n, mask)
    expected = masks_of(model)
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    model(x).square().mean().backward()
    assert all((model.get_parameter(n).grad[~mask] == 0).all() for n, mask in expected.items())
    train(model, x)
    exact(model, expected)


# types and devices

@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_keep_the_zeros(kind, dtype):
    model, x = sparse(kind), inputs(kind).to(dtype)
    expected = masks_of(model)
    model.to(dtype)
    exact(model, expected)
    if dtype != torch.float16:   # not every operation of the CPU knows it
        train(model, x)
        exact(model, expected)
    model.float()
    exact(model, expected)
    train(model, inputs(kind))
    exact(model, expected)


def test_complex_weights_have_masks_too():
    for dtype in (torch.complex64, torch.complex128):
        layer = nn.Linear(4, 4, dtype=dtype)
        attach_mask(layer, "weight", torch.eye(4, dtype=torch.bool))
        layer.weight.data.add_(1)
        layer(torch.randn(2, 4, dtype=dtype))
        assert torch.equal(layer.weight != 0, torch.eye(4, dtype=torch.bool))


@every_kind
def test_a_model_can_go_to_the_meta_device_and_back(kind):
    model, x = sparse(kind), inputs(kind)
    expected, state = masks_of(model), dense(kind, 1).state_dict()
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    if kind == "tied": model.b.weight = model.a.weight
    model.load_state_dict(state)
    exact(model, expected)
    train(model, x)
    exact(model, expected)


@every_kind
@pytest.mark.parametrize("flag", ["overwrite", "swap"])
def test_conversions_that_make_new_parameters_keep_the_masks(kind, flag):
    model, x = sparse(kind), inputs(kind)
    expected = masks_of(model)
    change = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    change(True)
    try: model.double()
    finally: change(False)
    if kind == "tied" and flag == "overwrite": model.b.weight = model.a.weight
    train(model, x.double())
    exact(model, expected)


def test_not_a_number_becomes_zero_as_well():
    model = sparse("linear")
    expected = masks_of(model)
    model.load_state_dict({n: torch.full_like(t, torch.nan) for n, t in model.state_dict().items()})
    for n, mask in expected.items(): assert torch.equal(model.get_parameter(n).isnan(), mask)
    exact(model, expected)
    assert not torch.signbit(model[0].weight[~expected["0.weight"]]).any()   # no negative zero


# removing masks

@every_kind
def test_a_model_whose_masks_are_removed_is_an_ordinary_one(kind):
    model, x = sparse(kind), inputs(kind)
    train(model, x)
    expected, before = masks_of(model), model.eval()(x)
    assert remove_masks(model) is model
    exact(model, expected)
    assert torch.equal(model(x), before) and not masks_of(model)
    plain = dense(kind)
    for a, b in zip(model.modules(), plain.modules()):
        assert a.__dict__.keys() == b.__dict__.keys() and type(a) is type(b)
        assert not a._forward_pre_hooks and not a._load_state_dict_post_hooks and not a._state_dict_pre_hooks
    assert all(type(p) is nn.Parameter and not p.__dict__ and not p._backward_hooks for p in model.parameters())
    file = io.BytesIO()
    torch.save(model, file)
    assert b"pruning_bench" not in file.getvalue()
    train(model.train(), x)
    for n, mask in expected.items(): assert (model.get_parameter(n)[~mask] != 0).any()   # pruned weights move again


def test_a_plan_bakes_its_model_and_no_other():
    model, x = dense("conv"), inputs("conv")
    plan = prune(model, "magnitude", .5)
    before = model.eval()(x)
    other = dense("conv", 1)
    for wrong in (other, sparse("conv", 1)):
        with pytest.raises(BadInput, match="not those of the plan"): plan.bake(wrong)
    assert plan.bake(model) is model and torch.equal(model(x), before) and not masks_of(model)


def test_one_mask_can_be_detached():
    model = sparse("linear")
    detach_mask(model[0], "weight")
    assert list(masks_of(model)) == ["2.weight"] and type(model[0].weight) is nn.Parameter
    assert (model[0].weight == 0).float().mean() == .5
    detach_mask(model[2])
    assert not masks_of(model) and mask_of(model[2], "weight") is None


def test_masks_that_are_read_are_copies_and_set_mask_changes_them():
    model = sparse("linear")
    mask = mask_of(model[0], "weight")
    mask.fill_(True)
    assert not mask_of(model[0], "weight").all() and not masks_of(model)["0.weight"].all()
    weight = model[0].weight.detach().clone()
    set_mask(model[0], "weight", mask)
    assert mask_of(model[0], "weight").all() and torch.equal(model[0].weight, weight)   # what comes back starts at zero
    set_mask(model[0], "weight", ~mask)
    assert (model[0].weight == 0).all()


def test_recorded_gradients_are_dense_and_end_with_their_handle():
    layer, found = nn.Linear(3, 1), []
    attach_mask(layer, "weight", torch.tensor([[True, False, True]]))
    handle = record_gradient(layer, "weight", found.append)
    for m in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        m(torch.tensor([[1., 2., 3.]])).sum().backward()
    handle.remove()
    layer(torch.ones(1, 3)).sum().backward()
    assert len(found) == 1 and found[0].tolist() == [[1, 2, 3]] and layer.weight.grad.tolist() == [[2, 0, 4]]


# exports

@every_kind
@pytest.mark.parametrize("backend", [
    "eager", pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_train_and_run_under_the_mask(kind, backend):
    torch._dynamo.reset()
    model, x = sparse(kind), inputs(kind)
    expected, twin = masks_of(model), copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    train(compiled, x), train(twin, x)
    exact(model, expected)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(model.parameters(), twin.parameters()))
    with torch.no_grad():
        for n in expected: model.get_parameter(n).data.add_(1)
    with torch.no_grad(): found, want = compiled.eval()(x), remove_masks(copy.deepcopy(model)).eval()(x)
    assert torch.allclose(found, want, atol=1e-4)
    exact(model, expected)


def test_a_model_that_was_compiled_before_it_is_pruned_is_masked():
    torch._dynamo.reset()
    model, x = dense("linear"), inputs("linear")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    opt = train(compiled, x)
    prune(model, "magnitude", .5)
    expected = masks_of(model)
    train(compiled, x, 3, opt)
    exact(model, expected)


class Changing(Reader):
    "Reads a weight in ways that the class of the parameter intercepts, and changes it."
    def __init__(self, read):
        super().__init__()
        self.take = read

    def forward(self, x): return self.head(F.linear(x, self.take(self.fc.weight)))


def added(w):
    with torch.no_grad(): return w.add_(1)


READS = {"detach": lambda w: w.detach(), "data": lambda w: w.data, "clone": lambda w: w.clone(), "add_": added}


@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_graphs_may_read_and_write_masked_weights(read):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Changing(read), inputs("reader")
    prune(model, "magnitude", .5)
    expected, twin = masks_of(model), copy.deepcopy(model)
    found, want = torch.compile(model, backend="aot_eager", fullgraph=True)(x), twin(x)
    for y in (found, want): y.sum().backward()
    exact(model, expected)
    assert torch.allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_compiled_optimiser_steps_under_the_mask(kind):
    torch._dynamo.reset()
    model, x = sparse(kind), inputs(kind)
    expected, opt = masks_of(model), torch.optim.SGD(model.parameters(), .1, momentum=.9)
    step = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        opt.zero_grad(); model(x).square().mean().backward(); step()
    exact(model, expected)


def test_a_compiled_loop_inside_pruning_is_one_graph_and_counted():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = dense("linear"), inputs("linear")
    with pruning(model, "gradual-magnitude", .5, steps=12) as loop:
        train(torch.compile(model, backend="eager", fullgraph=True), x, 12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [loop.plan.cost[k] for k in ("forward", "backward", "samples")] == [12, 12, 60]
    exact(model, {n: m.view_as(model.get_parameter(n)) for n, m in loop.plan.masks.items()})


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_exported_programs_compute_the_same_and_carry_the_zeros(kind):
    model, x = sparse(kind).eval(), inputs(kind)
    expected = masks_of(model)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    state = torch.export.load(file).state_dict
    for n, mask in expected.items(): assert torch.equal(state[n] != 0, mask)


@every_kind
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_files_compute_the_same_and_carry_the_zeros(kind, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, x = sparse(kind).eval(), inputs(kind)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), verbose=False, external_data=False)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)
    stored = [t for t in onnx.load(str(tmp_path / "m.onnx")).graph.initializer if len(t.dims) > 1]
    zeros = sum(int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in stored)
    assert zeros == sum(int((~m).sum()) for m in masks_of(model).values())


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_masks_and_refuses_to_compile_them_in_one_sentence(kind):
    model, x = sparse(kind).eval(), inputs(kind)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert torch.allclose(traced(x), model(x), atol=1e-6)
    with pytest.raises(BadInput, match="remove_masks"): torch.jit.script(model)
    exact(model, masks_of(model))
    if kind != "reader":   # a module that is never called may still be scripted
        assert torch.allclose(torch.jit.script(remove_masks(model))(x), model(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_quantisation_aware_training_keeps_the_zeros_and_conversion_makes_them_integers(kind):
    from torch.ao import quantization as q
    model = q.QuantWrapper(dense(kind))
    x = inputs(kind)
    prune(model, "magnitude", .5)
    expected = masks_of(model)
    engine = torch.backends.quantized.engine
    model.qconfig = q.get_default_qat_qconfig("fbgemm")
    q.prepare_qat(model.train(), inplace=True)
    assert not any(type(m) is nn.Linear for m in model.modules()) and masks_of(model).keys() == expected.keys()
    train(model, x)
    exact(model, expected)
    recorded = {n: [] for n in expected}
    for n, found in recorded.items():   # of the modules that replaced the old ones
        record_gradient(model.get_submodule(n.removesuffix(".weight")), "weight", found.append)
    train(model, x, 1)
    assert all(len(found) == 1 and found[0][~expected[n]].any() for n, found in recorded.items())
    with pruning(model, "rigl", .7, steps=4) as loop: train(model, x, 4)
    expected = masks_of(model)
    assert {n: int(m.sum()) for n, m in expected.items()} == {n: int(m.sum()) for n, m in loop.plan.masks.items()}
    exact(model, expected)
    quantised = q.convert(model.eval(), inplace=False)
    for n, mask in expected.items():
        integers = quantised.get_submodule(n.removesuffix(".weight")).weight()
        assert (integers.dequantize()[~mask] == 0).all() and (integers.dequantize() != 0).any()
    torch.backends.quantized.engine = engine


@pytest.mark.slow   # peft imports transformers
@pytest.mark.parametrize("kind, layer", [("linear", "0"), ("conv", "0"), ("tied", "a")])
def test_lora_merges_under_the_mask(kind, layer):
    peft = pytest.importorskip("peft")
    model, x = sparse(kind), inputs(kind)
    expected = masks_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=False))
    train(adapted, x, 3, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], .01))
    merged = adapted.merge_and_unload().eval()
    exact(merged, expected)
    assert same_function(merged, x) and list(merged.state_dict()) == list(dense(kind).state_dict())


RANK = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_masks import KINDS, exact, inputs, masks_of, sparse, train
from torch.nn.parallel import DistributedDataParallel as DDP
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=int(sys.argv[3]), world_size=2)
for kind in KINDS:
    for options in ({}, {"gradient_as_bucket_view": True}):
        model = sparse(kind)
        expected, parallel = masks_of(model), DDP(model, **options)
        x = inputs(kind, 5 + int(sys.argv[3]))
        train(parallel, x)
        exact(model, expected)
        parallel(x).square().mean().backward()
        assert all((model.get_parameter(n).grad[~m] == 0).all() for n, m in expected.items())
        for p in model.parameters():
            other = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(other, p.detach())
            assert torch.equal(*other)
dist.destroy_process_group()
os._exit(0)   # threads of gloo may abort a process while Python shuts down
"""


@pytest.mark.slow
def test_two_ranks_train_one_masked_model(tmp_path):
    command = [sys.executable, "-c", RANK, str(Path(__file__).parent), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=500)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], said


# refusals

@pytest.mark.slow
def test_lora_for_attention_computes_weights_and_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(sparse("attention"), peft.LoraConfig(r=2, target_modules=["attention"]))
    with pytest.raises(BadInput, match="remove_masks"): adapted(inputs("attention"))


NORMS = [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm]


@pytest.mark.parametrize("make", NORMS, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_computed_weights_are_refused_before_and_after(kind, make):
    model, x = dense(kind), inputs(kind)
    make(model.eval()[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match="computed from other tensors") as refused: prune(model, "magnitude", .5)
    assert "\n" not in str(refused.value) and not masks_of(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert prune(model, "magnitude", .5, skip=("0",)).density == .5   # the others can be pruned
    later = sparse(kind)
    mask = masks_of(later)["0.weight"]
    make(later[0])
    if make is parametrizations.spectral_norm:   # it divides the masked parameter by a number, so the zeros stay
        train(later, x)
        assert torch.equal(later[0].weight != 0, mask)
    else:
        with pytest.raises(BadInput, match="remove_masks"): later(x)


def test_masks_of_another_kind_are_refused():
    layer = nn.Linear(3, 2)
    for wrong in (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool)):
        with pytest.raises(BadInput, match="must be bool and of shape"): attach_mask(layer, "weight", wrong)
    assert type(layer.weight) is nn.Parameter and not layer._forward_pre_hooks
    attach_mask(layer, "weight", torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(BadInput, match="remove_masks"): layer.weight.data = torch.ones(4, 3)
    assert layer.weight.shape == (2, 3)
    layer.weight = nn.Parameter(torch.ones(2, 5))
    with pytest.raises(BadInput, match="of another shape or class"): layer(torch.ones(1, 5))
    assert type(remove_masks(layer).weight) is nn.Parameter and layer(torch.ones(1, 5)).shape == (1, 2)


class Foreign(nn.Parameter):
    "A parameter of another class, as quantised and sharded layers have."


@pytest.mark.filterwarnings("ignore")
def test_a_masked_parameter_that_becomes_one_of_another_class_is_refused():
    model, x = sparse("linear"), inputs("linear")
    model[0].weight = Foreign(torch.ones(12, 8))
    with pytest.raises(BadInput, match="remove_masks"): model(x)
    assert remove_masks(model)(x).shape == (5, 4)


def test_parameters_of_other_kinds_are_refused():
    with pytest.raises(BadInput, match="UninitializedParameter"): attach_mask(nn.LazyLinear(3), "weight", torch.ones(1))
    with pytest.raises(BadInput, match="has no mask"): set_mask(nn.Linear(2, 1), "weight", torch.ones(1, 2).bool())
    layer = nn.Linear(3, 2)
    attach_mask(layer, "weight", torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(BadInput, match="must be bool"): set_mask(layer, "weight", torch.tensor(True))
    assert mask_of(layer, "weight").all()


def test_a_call_that_does_nothing_costs_nothing():
    model, x, written = sparse("linear"), inputs("linear"), []
    model(x)
    old, masks.clear = masks.clear, lambda *a: written.append(a)
    try:
        for _ in range(3): model(x)
    finally: masks.clear = old
    assert not written
