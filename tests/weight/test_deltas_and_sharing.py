"Numbers that move and numbers that are shared: counts, identities, golden values, and what they are worth."
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.bench.tasks.digits import digits
from pruning_bench.bench.task import find_task
from pruning_bench.core.rule import apply_rule
from pruning_bench.core.inputs import seeded
from pruning_bench.core.recovery import OPTIMIZERS, finetune
from pruning_bench.core.space import Weights, prunable_layers
from pruning_bench.weight.deltas_and_sharing import (equal_memory_count, pool_assignment, accumulate_gradients,
                                                     extract_patch, reassign_deltas, sft, stable_rps, swap_patch)


def mlp(dtype=torch.float32, seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
                             nn.Linear(16, 10)).to(dtype)

def conv(dtype=torch.float32, seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
                             nn.Flatten(), nn.Linear(54, 10)).to(dtype)

def data(dtype=torch.float32, n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 1, 8, 8, generator=g).to(dtype), torch.randint(0, 10, (32,), generator=g))
            for _ in range(n)]

def train(model, rule, keep, steps=40, recipe=None, seed=0, dtype=torch.float32):
    for n, p in model.named_parameters(): p.requires_grad_("bias" not in n)
    with seeded(seed), apply_rule(rule, Weights(model), keep, steps) as training:
        (recipe or finetune(steps, 1e-2))(model, data(dtype), F.cross_entropy)
    return training

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
each_net = pytest.mark.parametrize("net", [mlp, conv])


# deltas

@each_net
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("keep", [.01, .1, .6, 1.])
def test_the_number_of_deltas_never_changes(net, optimizer, keep):
    model, base, seen = net(), net(), []
    rule = sft(update_every=5, window=2)
    def look(training):
        before = {n: s["index"].clone() for n, s in training.state.items()}
        rule.update(training)
        seen.append({n: (before[n], s["index"].clone()) for n, s in training.state.items()})
    training = train(model, replace(rule, update=look, every=5), keep, recipe=finetune(40, 1e-2, optimizer))
    for n, w in base.named_parameters():
        if n not in training.names: assert torch.equal(w, model.get_parameter(n)); continue
        k = int(keep * w.numel() + .5)
        assert all(len(a) == len(b) == k and len(set(b.tolist())) == k for step in seen for a, b in [step[n]])
        at = torch.zeros(w.numel(), dtype=torch.bool); at[training.state[n]["index"]] = True
        matrix = lambda m: prunable_layers(m)[n].read().flatten()
        assert torch.equal(matrix(model)[~at], matrix(base)[~at])   # nothing else has changed
    if keep == .1: assert any(not torch.equal(a, b) for a, b in seen[0].values())

@each_net
def test_zero_deltas_are_the_base(net):
    model, base, x = net(), net(), data()[0][0]
    with seeded(0), apply_rule(sft(), Weights(model), .05, 3):
        assert torch.equal(model(x), base(x))
        finetune(3, 0.)(model, data(), F.cross_entropy)
    assert same(model, base)

@each_net
def test_patches_come_off_without_a_trace(net):
    model, base = net(), net()
    training = train(model, sft(update_every=5, window=2), .05)
    other = copy.deepcopy(base)
    there = extract_patch(training)
    back = swap_patch(other, there)
    assert same(other, model) and not same(other, base)
    again = swap_patch(other, back)
    assert same(other, base) and all(torch.equal(again[n][1], there[n][1]) for n in there)
    with pytest.raises(BadInput, match="does not fit"): swap_patch(other, {"9.weight": there[training.names[0]]})
    with pytest.raises(BadInput, match="does not fit"):
        swap_patch(other, {training.names[0]: (torch.tensor([10 ** 6]), torch.zeros(1))})
    assert same(other, base)

def test_relocation_by_hand():
    def training(candidates, allowed=torch.ones(2, 4, dtype=torch.bool)):
        state = {"index": torch.tensor([0, 3, 5]), "delta": torch.tensor([.5, -.1, .2]), "candidates": candidates}
        memory = {"exp_avg": torch.ones(3), "step": torch.tensor(7.)}
        c = SimpleNamespace(state={"w": state}, allowed={"w": allowed},
                            optimizers={id(state["delta"]): SimpleNamespace(state={state["delta"]: memory})})
        return c, state, memory
    candidates = lambda: {"at": torch.tensor([7, 3, 1]), "sum": torch.tensor([-9., 5., 4.])}
    c, s, memory = training(candidates())   # two may go: 3 and 5; 3 is chosen again and stays, 7 takes the place of 5
    reassign_deltas(c, "w", .6)
    assert s["index"].tolist() == [0, 3, 7]
    assert s["delta"].tolist() == pytest.approx([.5, -.1, 0])
    assert memory["exp_avg"].tolist() == [1, 1, 0]
    assert memory["step"] == 7
    c, s, _ = training(candidates())        # one may go
    reassign_deltas(c, "w", .34)
    assert s["index"].tolist() == [0, 7, 5] and s["delta"].tolist() == pytest.approx([.5, 0, .2])
    c, s, _ = training(candidates(), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool))   # 7 is closed
    reassign_deltas(c, "w", .34)
    assert s["index"].tolist() == [0, 3, 5]   # 3 is the best that is left, and it is there
    for share, ears in ((0., candidates()), (.6, {})):
        c, s, _ = training(ears)
        reassign_deltas(c, "w", share)
        assert s["index"].tolist() == [0, 3, 5]

def test_candidates_are_chosen_once_and_added_up():
    candidates = {}
    accumulate_gradients(torch.tensor([1., -5, 3, 0]), candidates, 2)
    accumulate_gradients(torch.tensor([100., 1, 1, 100]), candidates, 2)
    assert candidates["at"].tolist() == [1, 2] and candidates["sum"].tolist() == [-4, 4]

def test_the_gradient_candidates_is_the_gradient_of_the_matrix():
    model, plain, got = mlp(), mlp(), []
    rule = sft(update_every=2, window=1)
    def look(training): got.append({n: dict(s["candidates"]) for n, s in training.state.items()})
    train(model, replace(rule, update=look, every=2), .1, 2, finetune(2, 0.))
    batch = data()[1]
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    for n, candidates in got[0].items():
        g = plain.get_parameter(n).grad.flatten()
        assert set(candidates["at"].tolist()) == set(g.abs().topk(len(candidates["at"])).indices.tolist())
        assert torch.allclose(candidates["sum"], g[candidates["at"]], atol=1e-6)

@pytest.mark.parametrize("rule", [sft(update_every=5, window=2), stable_rps()], ids=["sft", "stable-rps"])
@each_net
def test_what_was_pruned_stays_pruned(net, rule):
    model = net()
    plan = prune(model, "magnitude", .8)
    training = train(model, rule, .1)
    assert all((training.w(n)[~m] == 0).all() and (training.w(n)[m] != 0).any() for n, m in plan.masks.items())
    assert all(not torch.equal(training.w(n), Weights(net()).w(n) * m) for n, m in plan.masks.items())

@pytest.mark.parametrize("rule", [sft(update_every=5, window=2), stable_rps()], ids=["sft", "stable-rps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_seed_and_plainness(rule, dtype):
    a, b, c = (mlp(dtype) for _ in range(3))
    for m, seed in ((a, 0), (b, 0), (c, 1)): train(m, rule, .1, 12, finetune(12, 1e-2), seed, dtype)
    assert same(a, b) and not same(a, c) and all(p.dtype == dtype for p in a.parameters())
    assert list(a.state_dict()) == list(mlp().state_dict()) and same(copy.deepcopy(a), a)


# a pool

@pytest.mark.parametrize("n,m", [(1000, 128), (25, 7), (64, 64), (65, 64), (10, 1), (3, 2)])
def test_every_number_is_read_equally_often(n, m):
    with seeded(0): order, sign = pool_assignment(n, m)
    load = order.bincount(minlength=m)
    assert len(order) == len(sign) == n and set(load.tolist()) <= {n // m, -(-n // m)} and set(sign.tolist()) <= {-1, 1}
    for piece in order.split(m): assert len(set(piece.tolist())) == len(piece)
    if n == 1000: assert (load == 7).sum() == 24 and (load == 8).sum() == 104

def test_pools_that_make_no_sense():
    for n, m in ((5, 0), (5, 6)):
        with pytest.raises(BadInput, match="pool"): pool_assignment(n, m)

@each_net
def test_one_number_per_weight_is_the_network_itself(net):
    model, base, x = net(), net(), data()[0][0]
    with seeded(0), apply_rule(stable_rps(), Weights(model), 1., 1) as training:
        assert torch.allclose(model(x), base(x), atol=1e-5)
        assert (torch.cat([s["order"] for s in training.state.values()]).sort()
                .values.tolist() == list(range(len(training.pool))))
        finetune(1, 0.)(model, data(), F.cross_entropy)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), base.parameters()))

def test_one_pool_for_all_layers():
    model = mlp()
    with seeded(0), apply_rule(stable_rps(), Weights(model), .05, 4) as training:
        pools = {id(p) for n, p in model.named_parameters() if n.endswith("pool")}
        assert pools == {id(training.pool)} and len(training.pool) == round(.05 * (64 * 24 + 24 * 16 + 160))
        x, y = data()[0]
        F.cross_entropy(model(x), y).backward()
        got = training.pool.grad.clone()
        finetune(4, 1e-2)(model, data(), F.cross_entropy)
    spread = {n: (model.get_parameter(n).abs().flatten() / s["scale"].abs()) for n, s in training.state.items()}
    for n, s in training.state.items():
        assert torch.allclose(spread[n], training.pool.detach().abs()[s["order"]], atol=1e-5)
    assert got.abs().sum() > 0

def test_the_gradient_of_a_number_is_the_mean_wish_of_its_readers():
    model = mlp()
    with seeded(0), apply_rule(stable_rps(), Weights(model), .05, 1) as training:
        seen = {n: model.get_submodule(n.rpartition(".")[0]).weight.detach().clone() for n in training.names}
        x, y = data()[0]
        F.cross_entropy(model(x), y).backward()
        got = training.pool.grad.double()
        finetune(1, 0.)(model, data(), F.cross_entropy)
    plain = mlp()
    for n, w in seen.items(): plain.get_parameter(n).data.copy_(w)
    F.cross_entropy(plain(x), y).backward()
    wish, squares = torch.zeros(len(got)).double(), torch.zeros(len(got)).double()
    for n, s in training.state.items():
        wish.index_add_(0, s["order"], (s["scale"] * plain.get_parameter(n).grad.flatten()).double())
        squares.index_add_(0, s["order"], s["scale"].double().square())
    assert torch.allclose(got, wish / squares, atol=1e-6)

def test_the_unit_of_the_pool_does_not_matter_to_plain_descent(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "plain", lambda p, lr, wd: torch.optim.SGD(p, lr))
    def moved(**settings):
        model = mlp()
        train(model, stable_rps(**settings), .1, 5, finetune(5, .1, "plain"))
        return torch.cat([p.flatten() for p in model.parameters()])
    same_step = lambda squares: torch.ones_like(squares)
    assert torch.allclose(moved(), moved(unit=3.), atol=1e-5)
    assert not torch.allclose(moved(divide=same_step), moved(unit=3., divide=same_step), atol=1e-2)


# memory

@pytest.mark.parametrize("n,numbers,bits", [(25856, 517, 32), (25856, 517, 8), (1000, 400, 16), (1000, 1000, 32),
                                            (4, 4, 1), (30, 29, 1), (10, 3, 4), (10, 0, 8)])
def test_affordable_against_exact_binomials(n, numbers, bits):
    k = equal_memory_count(n, numbers, bits)
    cost = lambda k: k * bits + math.log2(math.comb(n, k))
    assert k == max(k for k in range(min(n, numbers) + 1) if cost(k) <= numbers * bits)


# what they are worth

def lift(rule, seed, keep):
    (x, y), (tx, ty) = ((a[b >= 5], b[b >= 5] - 5) for a, b in map(digits, ("train", "test")))
    model, g = find_task("digits-mlp").dense(seed), torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters(): p.requires_grad_("bias" not in n)
    stream = [(x[i], y[i]) for i in torch.randint(len(y), (200, 64), generator=g)]
    with seeded(seed), apply_rule(rule, Weights(model), keep, 200): finetune(200, 3e-2)(model, stream, F.cross_entropy)
    return 100 * (model.eval()(tx).argmax(1) == ty).float().mean().item()

@pytest.mark.slow
def test_places_that_move_are_better_than_places_drawn_once():
    mean = {name: sum(lift(rule, seed, .01) for seed in range(3)) / 3
            for name, rule in {"sft": sft(), "fixed": sft(first_fraction=0., later_fraction=0.)}.items()}
    assert mean["sft"] > mean["fixed"]

@pytest.mark.slow
def test_sharing_beats_random_pruning_at_the_same_memory():
    world = find_task("digits-mlp")
    def pooled(seed):
        model = world.initial(seed)
        with seeded(seed), apply_rule(stable_rps(), Weights(model), .02, 600):
            world.train(model, world.batches(seed), world.loss)
        return world.evaluate(model.eval())["accuracy"]
    def pruned(seed):
        model = world.initial(seed)
        prune(model, "random", 1 - equal_memory_count(25856, 517) / 25856, world.batches(seed), world.loss, seed=seed,
              allocate="erk", recover=world.train)
        return world.evaluate(model.eval())["accuracy"]
    assert sum(map(pooled, range(3))) / 3 > sum(map(pruned, range(3))) / 3 + .05
