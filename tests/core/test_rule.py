"""Rules act inside a training of the user: on exact masks, with the right gradients, and without leaving a trace."""
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from pruning_bench import BadInput, prune
from pruning_bench.core.allocate import keep_current, round_to_units, topk_mask
from pruning_bench.core.rule import Rule, RuleMaker, TrainingState, apply_rule, attach_rule, make_step_hook
from pruning_bench.core.rule import optimizer_buffers, update_mask
from pruning_bench.core.mask import attach_mask, masks_of, record_gradient, remove_masks
from pruning_bench.core.method import Method
from pruning_bench.core.recovery import finetune
from pruning_bench.core.schedule import cubic
from pruning_bench.core.space import Weights, matrix_to_weight, matrix_permutations, prunable_layers


class Mixed(nn.Module):
    "A convolution, a transposed one, a linear layer without bias, and a norm between them."
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.up, self.head = nn.ConvTranspose2d(4, 3, 2, 2), nn.Linear(3, 5, bias=False)

    def forward(self, x): return self.head(F.relu(self.up(F.relu(self.norm(self.conv(x))))).mean((2, 3)))


def mixed(seed=0):
    torch.manual_seed(seed)
    return Mixed()


def batches(n=4, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    def batch(): return torch.randn(8, 2, 6, 6, generator=g).to(dtype), torch.randint(5, (8,), generator=g)
    return [batch() for _ in range(n)]


def train(net, steps=20, data=None, **settings):
    finetune(steps, **{"lr": 1e-2, **settings})(net, data or batches(), F.cross_entropy)


def top(training, keep=None): # the best share of every layer, as {name: (w, mask)}
    scores = {n: training.w(n).abs().masked_fill(~training.allowed[n], -1).float().flatten() for n in training.names}
    masks = {n: topk_mask(s, round((keep or training.keep) * s.numel())) for n, s in scores.items()}
    return {n: (training.w(n), m.view_as(training.w(n))) for n, m in masks.items()}


def shuffle(training): # half of the weights of every layer, drawn anew
    for n in training.names: update_mask(training, n, torch.rand(training.w(n).shape).to(training.w(n).device) < .5)


MAGNITUDE = Rule(finish=top)
def drift(w, state, training): return w * (1 - .5 * training.progress)
def one_factor_per_row(w, training): return {"dim": nn.Parameter(torch.zeros(len(w), 1, dtype=w.dtype))}
DIM = Rule(state=one_factor_per_row, view=lambda w, state, training: w * (1 + state["dim"]), finish=top)


# a rule that does nothing is not there

@pytest.mark.parametrize("settings", [{}, dict(optimizer="sgd"), dict(clip=.5, warmup=.2),
                                      dict(optimizer="adam", weight_decay=1e-2)])
def test_training_under_a_rule_without_an_effect_is_the_same_to_the_bit(settings):
    free, ruled, seen = mixed(), mixed(), mixed()
    train(free, **settings)
    with apply_rule(Rule(), Weights(ruled), 1., 20): train(ruled, **settings)
    with apply_rule(Rule(view=lambda w, state, training: w), Weights(seen), 1., 20): train(seen, **settings)
    for a, b, c in zip(free.state_dict().values(), ruled.state_dict().values(), seen.state_dict().values()):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# matrices

@pytest.mark.parametrize("module", [nn.Linear(3, 5), nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (2, 3)), nn.Conv3d(2, 3, 2),
                                    nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)],
                         ids=lambda m: type(m).__name__)
def test_folded_undoes_every_layout(module):
    perm, w = matrix_permutations(module)["weight"], torch.randn(module.weight.shape)
    matrix = w.permute(perm).flatten(1)
    assert torch.equal(matrix_to_weight(matrix, w.shape, perm), w)
    # whatever lies behind it in memory
    assert torch.equal(matrix_to_weight(matrix.t().contiguous().t(), w.shape, perm), w)


def test_write_changes_what_w_reads():
    net = mixed()
    training = TrainingState(Weights(net), 1., 1)
    for n in training.names:
        new = torch.randn_like(training.w(n))
        training.set_weight(n, new)
        assert torch.equal(training.w(n), new) and torch.equal(Weights(net).w(n), new)
    assert net.conv.weight.shape == (4, 2, 3, 3)
    assert torch.equal(training.w("conv.weight")[1, :2], net.conv.weight[1, :, 0, 0])


# dense gradients

def recorded_gradients(net, loop, begin=shuffle, every=1, steps=1):
    got = []
    def note(training): got.append({n: training.gradient(n).clone() for n in training.names})
    torch.manual_seed(3)
    with apply_rule(Rule(begin=begin, update=note, every=every), Weights(net), .5, steps): loop(net)
    return got


def test_gradients_are_dense_and_match_autograd_on_every_layout():
    net, (x, y) = mixed(), batches()[0]
    def loop(net):
        opt = torch.optim.SGD(net.parameters(), 0.)
        F.cross_entropy(net(x), y).backward(); opt.step()
    got = recorded_gradients(net, loop)[0]
    twin = copy.deepcopy(net)
    remove_masks(twin)
    F.cross_entropy(twin(x), y).backward()
    for name, layer in prunable_layers(twin).items():
        assert torch.allclose(got[name], layer.matrix(layer.weight.grad), atol=1e-6), name
        dead = layer.read() == 0
        assert dead.any() and got[name][dead].abs().max() > 0
        # what the optimiser sees is masked
        assert (prunable_layers(net)[name].weight.grad[prunable_layers(net)[name].weight == 0] == 0).all()


def test_gradients_are_summed_over_accumulated_batches_and_over_nothing_else():
    net, data = mixed().eval(), batches(6)
    def loop(net):
        opt = torch.optim.SGD(net.parameters(), 0.)
        for i, (x, y) in enumerate(data):
            F.cross_entropy(net(x), y).backward()
            if i % 2: opt.step(); opt.zero_grad()
    got = recorded_gradients(net, loop, every=3, steps=3)
    twin = copy.deepcopy(net)
    remove_masks(twin)
    for x, y in data[4:]: F.cross_entropy(twin(x), y).backward()
    assert len(got) == 1
    for name, layer in prunable_layers(twin).items():
        assert torch.allclose(got[0][name], layer.matrix(layer.weight.grad), atol=1e-6)


def test_gradients_are_recorded_before_clipping():
    net, (x, y) = mixed(), batches()[0]
    def loop(net):
        opt = torch.optim.SGD(net.parameters(), 0.)
        F.cross_entropy(net(x), y).backward(); nn.utils.clip_grad_norm_(net.parameters(), 1e-6); opt.step()
    norm = sum(g.square().sum() for g in recorded_gradients(net, loop)[0].values()).sqrt()
    assert norm > 1e-3


def test_layers_without_a_gradient_have_a_zero_one():
    net = mixed()
    net.conv.weight.requires_grad_(False)
    before = net.conv.weight.clone()
    got = recorded_gradients(net, lambda net: train(net, 3), begin=lambda training: None, steps=3)
    assert len(got) == 3
    assert all(g["conv.weight"].shape == (4, 18) and (g["conv.weight"] == 0).all() for g in got)
    assert all(g["head.weight"].abs().max() > 0 for g in got)
    assert torch.equal(net.conv.weight, before)

    class Half(nn.Module): # one layer is not used
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        def forward(self, x): return self.a(x)
    data = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]
    def loop(net): finetune(2)(net, data, F.cross_entropy)
    got = recorded_gradients(Half(), loop, begin=lambda training: None, steps=2)
    assert (got[1]["b.weight"] == 0).all() and got[1]["a.weight"].abs().max() > 0


def test_gradients_of_a_view_are_those_of_the_trained_weight():
    net, (x, y) = mixed(), batches()[0]
    got, twin = [], copy.deepcopy(net)
    def record(training): got.append({n: training.gradient(n) for n in training.names})
    half = Rule(view=lambda w, state, training: w / 2, update=record)
    with apply_rule(half, Weights(net), 1., 1):
        opt = torch.optim.SGD(net.parameters(), 0.)
        F.cross_entropy(net(x), y).backward(); opt.step()
    for layer in prunable_layers(twin).values(): layer.weight.data /= 2
    F.cross_entropy(twin(x), y).backward()
    for name, layer in prunable_layers(twin).items():
        assert torch.allclose(got[0][name], layer.matrix(layer.weight.grad) / 2, atol=1e-6)


def test_nobody_listens_afterwards_nor_to_copies():
    net, calls = nn.Linear(3, 2), []
    attach_mask(net, "weight", torch.ones(2, 3, dtype=torch.bool))
    handle = record_gradient(net, "weight", calls.append)
    for twin in (copy.deepcopy(net), net): twin(torch.ones(1, 3)).sum().backward()
    assert len(calls) == 1
    handle.remove()
    handle.remove()
    net(torch.ones(1, 3)).sum().backward()
    assert len(calls) == 1

    net, counted = mixed(), []
    with apply_rule(Rule(update=lambda training: counted.append(training.step)), Weights(net), 1., 2) as training:
        train(net, 2)
    train(net, 3)
    assert counted == [1, 2] and not training.gradients


def test_a_mask_outlives_the_module_that_its_parameter_came_from():
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    attach_mask(old, "weight", mask)
    new.weight = old.weight
    del old
    new(torch.ones(1, 3)).sum().backward()
    assert torch.equal(new.weight.grad, mask.float()) and torch.equal(new.weight != 0, mask)


def test_a_model_can_be_saved_whole_while_a_rule_listens(tmp_path):
    net = mixed()
    with apply_rule(Rule(), Weights(net), 1., 1):
        torch.save(net, tmp_path / "net.pt")
        train(net, 1)
    assert list(torch.load(tmp_path / "net.pt", weights_only=False).state_dict()) == list(net.state_dict())


# masks that move

@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, .05, momentum=.9), lambda p: torch.optim.Adam(p, .01, amsgrad=True),
    lambda p: torch.optim.AdamW(p, .01), lambda p: torch.optim.RMSprop(p, .01, momentum=.5)])
def test_momentum_of_the_dead_and_the_newborn_is_zero_and_of_no_other(optimizer):
    net, looked = mixed(), []
    def look(training):
        def copies(n): return [v.clone() for v in optimizer_buffers(training, n)]
        before = {n: (copies(n), training.alive(n).clone(), training.w(n).clone()) for n in training.names}
        shuffle(training)
        for n, (then, alive, w) in before.items():
            changed = training.to_weight_layout(n, alive != training.alive(n))
            assert len(then) == len(optimizer_buffers(training, n)) > 0 and changed.any()
            for a, b in zip(then, optimizer_buffers(training, n)):
                assert (b[changed] == 0).all()
                assert torch.equal(a[~changed], b[~changed])
                assert b.abs().sum() > 0
            # removed and regrown weights are zero, the others untouched
            assert torch.equal(training.w(n), w * training.alive(n) * alive)
            looked.append(n)
    with apply_rule(Rule(begin=shuffle, update=look, every=4), Weights(net), .5, 12):
        opt = optimizer(net.parameters())
        for x, y in itertools.islice(itertools.cycle(batches()), 12):
            opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
    assert len(looked) == 9


def test_the_dead_stay_zero_with_momentum_weight_decay_and_kept_gradients():
    net = mixed()
    def look(training):
        if training.step == 1: shuffle(training)
    with apply_rule(Rule(update=look), Weights(net), .5, 10) as training:
        opt = torch.optim.SGD(net.parameters(), .1, momentum=.9, weight_decay=.1, nesterov=True)
        for x, y in itertools.islice(itertools.cycle(batches()), 10):
            F.cross_entropy(net(x), y).backward(); opt.step()   # gradients pile up: the user does not clear them
            if training.step == 1: born = {n: training.weight[n].grad.clone() for n in training.names}
    for n, layer in prunable_layers(net).items():
        dead = ~masks_of(net)[n]
        assert dead.any() and (layer.weight[dead] == 0).all() and (born[n][dead] == 0).all()
        assert all((v[dead] == 0).all() for v in optimizer_buffers(training, n))


def test_what_was_pruned_before_never_returns():
    net = mixed()
    first = prune(net, "random", .5, seed=7)
    def everything(training):
        return {n: (torch.ones_like(training.w(n)), torch.ones_like(training.alive(n))) for n in training.names}
    def all_of_it(training):
        for n in training.names: update_mask(training, n, torch.ones_like(training.alive(n)))
    def gone(net): return all((layer.read()[~first.masks[n]] == 0).all() for n, layer in prunable_layers(net).items())
    with apply_rule(Rule(begin=all_of_it, update=all_of_it, finish=everything), Weights(net), 1., 5): train(net, 5)
    assert gone(net)
    assert all(torch.equal(layer.matrix(masks_of(net)[n]), first.masks[n]) for n, layer in prunable_layers(net).items())
    used = []
    def record(training): used.append(net.conv.weight.detach().clone())
    rule = Rule(view=lambda w, state, training: w + 1, update=record, finish=everything)
    with apply_rule(rule, Weights(net), 1., 5): train(net, 5)
    assert gone(net)
    removed = ~prunable_layers(net)["conv.weight"].tensor(first.masks["conv.weight"])
    assert len(used) == 5 and all((w[removed] == 0).all() for w in used)
    train(net, 5)
    assert gone(net)


def test_a_move_under_a_view_zeroes_the_trained_weight():
    net = mixed()
    with apply_rule(Rule(view=drift, update=shuffle, every=3), Weights(net), .5, 3) as training: train(net, 3)
    for n in training.names:
        assert (training.w(n)[~training.alive(n)] == 0).all()
        assert training.alive(n).any()
        assert not training.alive(n).all()


# clocks

def test_course_counts_steps_and_updates_on_time():
    net, seen = mixed(), []
    def record(training): seen.append((training.step, training.progress))
    with apply_rule(Rule(update=record, every=4), Weights(net), 1., 10): train(net, 10)
    assert seen == [(4, .4), (8, .8)]


def test_a_longer_training_stays_at_its_end():
    net, seen = mixed(), []
    with apply_rule(Rule(update=lambda training: seen.append(training.progress)), Weights(net), 1., 4): train(net, 6)
    assert seen == [.25, .5, .75, 1., 1., 1.]


def test_two_optimisers_make_one_step():
    net, seen = mixed(), []
    def look(training): seen.append(training.step); shuffle(training)
    with apply_rule(Rule(update=look), Weights(net), .5, 6) as training:
        others = [p for n, p in net.named_parameters() if not n.startswith("conv")]
        first, second = torch.optim.SGD(net.conv.parameters(), .1, momentum=.9), torch.optim.Adam(others, .01)
        for x, y in itertools.islice(itertools.cycle(batches()), 6):
            first.zero_grad(); second.zero_grad(); F.cross_entropy(net(x), y).backward(); second.step(); first.step()
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(optimizer_buffers(training, "conv.weight")) == 1 and len(optimizer_buffers(training, "head.weight")) == 2
    for n in training.names:   # also of the optimiser that steps after the update
        dead = training.to_weight_layout(n, ~training.alive(n))
        assert dead.any()
        assert all((v[dead] == 0).all() for v in (training.weight[n].data, *optimizer_buffers(training, n)))


def test_steps_of_others_and_steps_without_gradients_do_not_count():
    net, other = mixed(), nn.Linear(3, 1)
    with pytest.raises(BadInput, match="took 2 optimiser steps and 3 were announced"):
        with apply_rule(Rule(), Weights(net), 1., 3):
            opt = torch.optim.SGD(net.parameters(), .1)
            opt.step()
            strange = torch.optim.SGD(other.parameters(), .1)
            other(torch.ones(1, 3)).sum().backward(); strange.step()
            train(net, 2)


def test_pieces_of_one_training_are_one_course():
    net, seen, recover = mixed(), [], finetune(10, lr=1e-2)
    with apply_rule(Rule(update=lambda training: seen.append(training.step)), Weights(net), 1., 10):
        for since in (0., .3): recover(net, batches(), F.cross_entropy, .3 if not since else .7, since=since)
    assert seen == list(range(1, 11))


def test_a_step_of_the_state_alone_is_a_step():
    net, still = mixed(), Rule(state=DIM.state, view=lambda w, state, training: w.detach() * (1 + state["dim"]))
    before = {n: layer.read().clone() for n, layer in prunable_layers(net).items()}
    with apply_rule(still, Weights(net), 1., 5) as training: train(net, 5)
    assert training.step == 5 and all(torch.equal(training.w(n), w) for n, w in before.items())
    assert all(s["dim"].abs().max() > 0 for s in training.state.values())


# views

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_views_keep_dtypes_and_train_what_they_bring(dtype):
    net = mixed().to(dtype)
    def learn(w, state, training): return w.float() * (1 + state["dim"])   # a rule that thinks in single precision
    rule = Rule(state=lambda w, training: {"dim": nn.Parameter(torch.zeros(len(w), 1))}, view=learn, finish=top)
    with apply_rule(rule, Weights(net), .5, 6) as training:
        assert net.conv.weight.dtype == dtype
        train(net, 6, batches(dtype=dtype))
    assert all(p.dtype == dtype for p in net.parameters())
    assert all(s["dim"].abs().max() > 0 for s in training.state.values())
    for n, layer in prunable_layers(net).items():
        assert int((layer.weight != 0).sum()) == int(masks_of(net)[n].sum()) == round(.5 * layer.weight.numel())


def test_a_view_is_what_the_network_computes_with():
    net, (x, _) = mixed().eval(), batches()[0]
    twin = copy.deepcopy(net)
    with pytest.raises(BadInput):
        by_column = Rule(view=lambda w, state, training: w * torch.arange(1., 1 + w.shape[1]))
        with apply_rule(by_column, Weights(net), 1., 1):
            seen = net(x)
    for layer in prunable_layers(twin).values():
        layer.weight.data.copy_(layer.tensor(layer.read() * torch.arange(1., 1 + layer.read().shape[1])))
    assert torch.allclose(seen, twin(x), atol=1e-6) and not torch.allclose(seen, net(x), atol=1e-3)


def test_views_keep_the_memory_format():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last))
    with pytest.raises(BadInput):
        with apply_rule(Rule(view=lambda w, state, training: w), Weights(net), 1., 1):
            assert net[0].weight.is_contiguous() and net[1].weight.is_contiguous(memory_format=torch.channels_last)
            net[0](torch.randn(2, 2, 5, 5)).view(2, -1)   # would fail on another format


def snapshot(net):
    names, ids = [n for n, _ in net.named_parameters()], [id(p) for p in net.parameters()]
    return list(net.state_dict()), names, ids, [type(m) for m in net.modules()]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, FloatingPointError])
@pytest.mark.parametrize("rule", [DIM, MAGNITUDE, Rule(begin=shuffle, update=shuffle)], ids=["view", "finish", "moves"])
def test_names_order_and_identity_are_restored(rule, error):
    net = mixed()
    before = snapshot(net)
    if error is None:
        with apply_rule(rule, Weights(net), .5, 2): train(net, 2)
    else:
        with pytest.raises(error):
            with apply_rule(rule, Weights(net), .5, 2): train(net, 1); raise error
    assert snapshot(net) == before and not any(parametrize.is_parametrized(m) for m in net.modules())
    fresh = mixed(1)
    fresh.load_state_dict(net.state_dict())
    train(net, 1); train(copy.deepcopy(net), 1)


def test_a_view_that_fails_leaves_nothing_behind():
    net, calls = mixed(), []
    def picky(w, state, training):
        if training.w("head.weight").shape == w.shape: raise RuntimeError("not this one")
        return w
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="not this one"):
        with apply_rule(Rule(view=picky, update=calls.append), Weights(net), 1., 2): pass
    train(net, 2)
    assert snapshot(net) == before and not calls


def test_copies_made_during_and_after_a_training_are_independent():
    net, (x, _) = mixed(), batches()[0]
    with apply_rule(DIM, Weights(net), .5, 6):
        train(net, 3)
        twin = copy.deepcopy(net).eval()
        then = twin(x)
        train(net, 3)
        assert torch.equal(twin(x), then) and not torch.equal(net.eval()(x), then)   # its own weights, and its own dims
    done = copy.deepcopy(net)
    zeros = {n: layer.weight == 0 for n, layer in prunable_layers(net).items()}
    old = {n: p.clone() for n, p in net.named_parameters()}
    train(done, 3)
    for n, layer in prunable_layers(done).items(): assert torch.equal(layer.weight == 0, zeros[n])
    assert all(torch.equal(p, old[n]) for n, p in net.named_parameters())
    assert not torch.equal(done.head.weight, net.head.weight)


def test_one_rule_serves_many_models():
    a, b = mixed(0), mixed(0)
    with apply_rule(DIM, Weights(a), .5, 4): train(a, 4)
    with apply_rule(DIM, Weights(b), .5, 4): train(b, 4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_attention_of_torch_can_have_a_view():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)
        def forward(self, x): return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))
    torch.manual_seed(0)
    net, x, y = Attends(), torch.randn(4, 5, 8), torch.tensor([0, 1, 0, 1])
    before = snapshot(net)
    with apply_rule(DIM, Weights(net), .5, 4) as training: finetune(4)(net, [(x, y)], F.cross_entropy)
    assert snapshot(net) == before
    assert set(training.names) == {"mix.in_proj_weight", "mix.out_proj.weight", "head.weight"}
    assert all(s["dim"].abs().max() > 0 for s in training.state.values())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_have_several_views(kind):
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.cell, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 2)
        def forward(self, x): return self.head(self.cell(x)[0][:, -1])
    torch.manual_seed(0)
    net, x, y = Reads(), torch.randn(4, 5, 4), torch.tensor([0, 1, 0, 1])
    before = snapshot(net)
    with apply_rule(DIM, Weights(net), .5, 4) as training: finetune(4)(net, [(x, y)], F.cross_entropy)
    assert snapshot(net) == before and len(training.names) == 3
    assert all(s["dim"].abs().max() > 0 for s in training.state.values())
    out = net(x)
    net.cell.weight_hh_l0.data.zero_()
    assert not torch.equal(net(x), out)   # the layer computes with the parameters that it shows


# as methods

def toward(method, keep): # magnitude along a cubic, every second step: the schedule of the record is read
    way = cubic(5)(keep)
    def update(training):
        for n, (_, mask) in top(training, way[min(4, int(5 * training.progress))]).items():
            update_mask(training, n, mask & training.alive(n))
    return Rule(update=update, every=2, finish=top)


RULES = {"finish": MAGNITUDE, "view": DIM, "gradual": toward}


def method_of(rule, steps=20, uses=()): # of a `Rule`, or of a function (method, keep) -> Rule
    made = RuleMaker((lambda method, keep: rule) if isinstance(rule, Rule) else rule, "under_test", uses=uses)
    return Method(rule=made, recover=finetune(steps, lr=1e-2))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("sparsity", [.1, .5, .9])
def test_methods_are_exact_train_once_and_repeat_themselves(rule, sparsity):
    plans, nets = [], []
    for _ in range(2):
        net = mixed()
        state = torch.random.get_rng_state()
        plans.append(prune(net, method_of(rule), sparsity, batches(), F.cross_entropy, seed=3)); nets.append(net)
        assert torch.equal(state, torch.random.get_rng_state())
    for n, layer in prunable_layers(nets[0]).items():
        kept = int(plans[0].masks[n].sum())
        assert kept == round((1 - sparsity) * layer.weight.numel()) == int((layer.weight != 0).sum())
    assert plans[0] == plans[1]
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))
    assert plans[0].cost["backward"] == 20 and plans[0].provenance["rule"] == "under_test"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_a_method_left_stays_in_later_trainings(rule):
    net = mixed()
    plan = prune(net, method_of(rule), .8, batches(), F.cross_entropy)
    train(net, 10, optimizer="sgd")
    assert all(((layer.read() != 0) <= plan.masks[n]).all() for n, layer in prunable_layers(net).items())
    again = prune(net, method_of(rule), .9, batches(), F.cross_entropy)
    assert all((again.masks[n] <= plan.masks[n]).all() for n in plan.masks)


def test_keep_current_counts_large_layers_without_rounding():
    mask = torch.arange(20_000_003) >= 7
    shares = keep_current({"weight": mask}, .5, SimpleNamespace(alive=lambda name: mask))
    assert abs(shares["weight"] * len(mask) - (len(mask) - 7)) < 1e-6


def test_round_to_units_leaves_alone_what_is_above_the_budget():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(8)])
    space = Weights(net)
    scores = {n: space.w(n) for n in space.names()}
    shares = dict.fromkeys(scores, .5)
    assert round_to_units(shares, .49, scores, space) == shares


def test_a_fixed_pattern_is_passed_on_without_a_warning(recwarn):
    seen = []
    def pairs(training):
        seen.append(training.pattern.name)
        return {n: (training.w(n), training.pattern(training.w(n).abs(), .5)) for n in training.names}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    data = [(torch.randn(6, 8), torch.randint(4, (6,)))]
    plan = prune(net, method_of(Rule(finish=pairs), 3, ("pattern",)), "2:4", data, F.cross_entropy)
    assert seen == ["2:4"] and plan.density == .5 and not [w for w in recwarn if "allocation" in str(w.message)]


def test_the_whole_training_is_announced_to_the_rule():
    seen = []
    rule = Rule(begin=lambda training: seen.append((training.steps, training.keep, training.step, training.progress)))
    prune(mixed(), method_of(rule, 7), .25, batches(), F.cross_entropy)
    assert seen == [(7, .75, 0, 0.)]


# refusals

def test_refusals_name_the_remedy():
    with pytest.raises(BadInput, match="give it a training with recover="):
        prune(mixed(), Method(rule=Rule()), .5, batches(), F.cross_entropy)
    with pytest.raises(BadInput, match="blocks"):
        blocks, data = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [(torch.randn(3, 4), torch.randint(4, (3,)))]
        prune(blocks, method_of(Rule(view=drift)), .5, data, F.cross_entropy, space="blocks")
    parts = dict(score="magnitude", allocate="global", pattern="2:4", schedule="cubic", solve="zero")
    for part, value in parts.items():
        with pytest.raises(BadInput, match=f"does not read {part}="):
            prune(mixed(), method_of(Rule()), data=batches(), loss=F.cross_entropy, **{part: value})
    net = mixed()
    with pytest.raises(BadInput, match="took 3 optimiser steps and 4 were announced"):
        with apply_rule(MAGNITUDE, Weights(net), .5, 4): train(net, 3)
    assert all(mask.all() for mask in masks_of(net).values())   # nothing was cut


def test_clock_and_dress_are_taken_off_one_by_one():
    net = mixed()
    training = TrainingState(Weights(net), 1., 2)
    training.space.apply({n: (training.w(n), training.allowed[n]) for n in training.names})
    tick, undress = make_step_hook(Rule(), training), attach_rule(Rule(), training, "conv.weight")
    opt = torch.optim.SGD(net.parameters(), .1)
    F.cross_entropy(net(batches()[0][0]), batches()[0][1]).backward()
    assert list(training.gradients) == ["conv.weight"]
    tick(opt, (), {})
    assert training.step == 1 and not training.gradients
    undress()
    F.cross_entropy(net(batches()[0][0]), batches()[0][1]).backward()
    assert not training.gradients


def test_pieces_of_a_training_ignore_gradients_left_by_others():
    def piece(stale):
        net, recover = mixed(), finetune(10, lr=1e-2)
        if stale: F.cross_entropy(net(batches()[0][0]), batches()[0][1]).backward()
        net.norm.reset_running_stats()
        recover(net, batches(), F.cross_entropy, .2, since=.5)
        return net
    for a, b in zip(piece(False).state_dict().values(), piece(True).state_dict().values()): assert torch.equal(a, b)
