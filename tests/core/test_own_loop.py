"""Every method that prunes inside one training prunes inside a loop of the user; an interruption leaves no trace."""
import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from pruning_bench import BadInput, build, methods, prune, pruning
from pruning_bench.core.allocate import global_
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import masks_of
from pruning_bench.core.pattern import count_to_keep
from pruning_bench.core.recovery import finetune

def residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.conv, self.bn = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
            self.back, self.head = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x):
            x = self.norm(self.stem(x)).relu()
            return self.head((x + self.back(self.bn(self.conv(x)).relu())).mean((2, 3)))
    torch.manual_seed(0)
    return Residual()


class Adds(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(16, 16)
    def forward(self, x): return x + self.a(x).relu()


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Sequential(*[Adds() for _ in range(4)]), nn.Linear(16, 4))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


class Attends(nn.Module):
    "Attention of four heads over the pixels of a row."
    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.q, self.v, self.out = (nn.Linear(16, 16) for _ in range(3))
        self.k = nn.Linear(16, 16, bias=False)   # a softmax over keys does not see a bias of theirs

    def forward(self, x):
        x = self.enter(x.flatten(1, 2))
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.head(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


def attends():
    torch.manual_seed(0)
    return Attends()


class Categories(nn.Module):
    "The sign of each pixel, as a row of one table for every two rows of pixels."
    def __init__(self):
        super().__init__()
        self.tables, self.head = nn.ModuleList(nn.Embedding(16, 4) for _ in range(2)), nn.Linear(8, 4)

    def forward(self, x):
        code = (x > 0).long().view(len(x), 2, 8) + 2 * torch.arange(8)
        return self.head(torch.cat([t(code[:, i]).mean(1) for i, t in enumerate(self.tables)], 1))


def categories():
    torch.manual_seed(0)
    return Categories()


OWN = {"weights": plain, "ranks": plain, "channels": residual, "blocks": blocks, "residuals": blocks,
       "heads": attends, "rows": categories, "locations": plain}
TRACED = "channels", "residuals", "heads", "locations"   # spaces that run the model once to find their units
RULED = {n: build(n) for n in methods(use="prune").method if build(n).rule}
INSIDE = list(RULED)


def pixels(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 1, 4, 4, generator=g).to(dtype), torch.randint(4, (8,), generator=g)) for _ in range(2)]


def loop(net, data, steps, optimizer=None):
    opt = optimizer or torch.optim.SGD(net.parameters(), .05, momentum=.9)
    net.train()
    for x, y in itertools.islice(itertools.cycle(data), steps):
        opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
    return net.eval()


def traces(net): # what a plain model has not
    def hooks(m): return len(m._forward_hooks), len(m._forward_pre_hooks), len(m._load_state_dict_post_hooks)
    return [(n, type(m).__name__, hooks(m), [*m._parameters], [*m._buffers]) for n, m in net.named_modules()]


def request(name): return {"sparsity": None if build(name).pattern.fixed else .5}


@pytest.mark.parametrize("name", INSIDE)
def test_every_method_that_prunes_inside_a_training_prunes_inside_yours(name, dtype=torch.float64):
    net, data, record = OWN[RULED[name].space]().to(dtype), pixels(dtype), RULED[name]
    read = data if record.space in TRACED else None
    with pruning(net, name, **request(name), steps=6, data=read, loss=F.cross_entropy) as p:
        assert p.plan is None
        loop(net, data, 6)
    keep = .5
    if record.allocate is global_ or record.space == "weights":
        total = sum(m.numel() for m in p.plan.masks.values())
        assert sum(int(m.sum()) for m in p.plan.masks.values()) == count_to_keep(keep, total)
    else: assert all(int(m.sum()) == max(1, count_to_keep(keep, m.numel())) for m in p.plan.masks.values())
    assert not any(parametrize.is_parametrized(m) for m in net.modules())
    assert all(v.dtype == dtype for v in net.parameters()) and all(v.requires_grad for v in net.parameters())
    if record.space == "weights":
        assert all((v[~masks_of(net)[n]] == 0).all() for n, v in net.named_parameters() if n in masks_of(net))
        assert len(masks_of(net)) == len(p.plan.masks)
    elif record.space == "rows":
        assert all((net.get_parameter(n)[~m] == 0).all() for n, m in p.plan.masks.items())
    elif record.space == "locations":
        (mask,), (x, _) = p.plan.masks.values(), data[0]
        other = x.masked_fill(~mask.view(x.shape[-2:]), 9.)
        assert not torch.equal(other, x) and torch.equal(net(other), net(x))
    else: assert sum(v.numel() for v in net.parameters()) < sum(v.numel() for v in OWN[record.space]().parameters())
    assert p.plan.provenance["method"] == name and p.plan.provenance["recover"] == "your loop"
    assert p.plan.provenance["rule"] == record.provenance["rule"] and p.plan.cost["backward"] >= 6
    loop(net, data, 2)
    assert torch.isfinite(net(data[0][0])).all()


@pytest.mark.parametrize("name", INSIDE)
def test_a_loop_that_breaks_off_leaves_a_plain_model(name):
    net, data = OWN[RULED[name].space](), pixels()
    before, grads = traces(net), [p.requires_grad for p in net.parameters()]
    with pytest.raises(KeyboardInterrupt):
        with pruning(net, name, **request(name), steps=6, data=data, loss=F.cross_entropy):
            loop(net, data, 3)
            raise KeyboardInterrupt
    assert traces(net) == before and [p.requires_grad for p in net.parameters()] == grads and not masks_of(net)
    moved = [p.clone() for p in net.parameters()]
    loop(net, data, 2)
    assert all((p != q).any() for p, q in zip(net.parameters(), moved))   # no mask holds a weight any more


def test_the_rest_is_refused_in_one_sentence():
    for name in set(methods(use="prune").method) - set(INSIDE):
        net = plain()
        with pytest.raises(BadInput, match="does not prune inside one training of yours: call prune") as no:
            with pruning(net, name, .5, steps=3, data=pixels(), loss=F.cross_entropy): pass
        assert str(no.value).count(". ") == 0 and traces(net) == traces(plain())


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=2.5), dict(steps=3, lr=.1), dict(steps=3, sparsity=1.5),
                                 dict(steps=3, warmth=1)])
def test_requests_that_cannot_be_met_are_refused_before_the_loop(bad):
    net, request = plain(), {"sparsity": .5, **bad}
    with pytest.raises(BadInput):
        with pruning(net, "gradual-magnitude", **request): raise RuntimeError("the loop began")
    assert traces(net) == traces(plain())


@pytest.mark.parametrize("name", ["gradual-magnitude", "rigl", "pdp", "str", "trp", "jackpot", "iss"])
def test_your_loop_and_prune_leave_the_same_network(name):
    nets, data, train = [plain(), plain()], pixels(), finetune(8, lr=1e-2)
    plan = prune(nets[0], name, .5, data, F.cross_entropy, recover=train, seed=3)
    with seeded(3):
        with pruning(nets[1], name, .5, steps=8) as p: train(nets[1], data, F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))
    assert all(torch.equal(m, p.plan.masks[n]) for n, m in plan.masks.items())
    assert p.plan.cost["backward"] == plan.cost["backward"] == 8


def test_the_checks_before_the_loop_draw_nothing_from_your_generator():
    net = plain()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pixels()[0]), 4, shuffle=True)
    with pruning(net, "gradual-magnitude", .5, steps=1, data=loader) as p:
        assert torch.equal(torch.rand(3), expected)
        loop(net, pixels(), 1)
    assert p.plan.density == .5


def test_a_longer_loop_stays_exact_and_a_shorter_one_is_refused_and_undone():
    net = plain()
    with pruning(net, "gradual-magnitude", .5, steps=5) as p: loop(net, pixels(), 9)
    assert p.training.progress == 1 and p.plan.density == .5
    net = plain()
    with pytest.raises(BadInput, match="took 3 optimiser steps and 5 were announced"):
        with pruning(net, "gradual-magnitude", .5, steps=5): loop(net, pixels(), 3)
    assert traces(net) == traces(plain())


@pytest.mark.parametrize("name", ["movement", "str", "bip", "jackpot"])
def test_an_optimiser_that_does_not_know_the_masks_is_refused(name):
    net = plain()
    early = torch.optim.SGD(net.parameters(), .05)
    with pytest.raises(BadInput, match="make the optimiser inside the context"):
        with pruning(net, name, .5, steps=4):
            for x, y in pixels() * 2:
                early.zero_grad()
                F.cross_entropy(net(x), y).backward()
                early.step()
    assert traces(net) == traces(plain())


def test_gates_that_nobody_trains_are_refused():
    net = blocks()
    early = torch.optim.SGD(net.parameters(), .05)
    with pytest.raises(BadInput, match="make the optimiser inside the context"):
        with pruning(net, "polarize", .5, steps=4, data=pixels()): loop(net, pixels(), 4, early)
    assert len(net[1]) == 4 and traces(net) == traces(blocks())


def test_a_second_optimiser_may_train_what_the_method_learns():
    net = plain()
    first = torch.optim.SGD(net.parameters(), .05)
    with pruning(net, "movement", .5, steps=4) as p:
        known = {id(q) for q in first.param_groups[0]["params"]}
        second = torch.optim.Adam([q for q in net.parameters() if id(q) not in known], .01)
        for x, y in pixels() * 2:
            first.zero_grad(); second.zero_grad(); F.cross_entropy(net(x), y).backward(); first.step(); second.step()
    assert p.plan.density == .5 and all(s["score"].abs().max() > 1e-6 for s in p.training.state.values())


def test_masks_from_before_survive_a_loop_that_breaks_off():
    net = plain()
    plan = prune(net, "magnitude", .5)
    with pytest.raises(KeyboardInterrupt):
        with pruning(net, "gradual-magnitude", .9, steps=6): loop(net, pixels(), 3); raise KeyboardInterrupt
    assert all(torch.equal(m, plan.masks[n]) for n, m in masks_of(net).items()) and len(masks_of(net)) == 3
    loop(net, pixels(), 2)
    assert all((v[~plan.masks[n]] == 0).all() for n, v in net.named_parameters() if n in plan.masks)


def test_parts_and_budgets_of_a_request_count_in_a_loop_as_well():
    net = plain()
    with pruning(net, "gradual-magnitude", "2:4", steps=4, skip="5*") as p: loop(net, pixels(), 4)
    assert p.plan.density == .5
    assert all((m.view(len(m), -1, 4).sum(-1) == 2).all() for m in p.plan.masks.values())
    assert len(p.plan.masks) == 2
    net = plain()
    with pruning(net, "gradual-magnitude", .8, steps=4, allocate="global") as p: loop(net, pixels(), 4)
    assert len({round(float(m.float().mean()), 3) for m in p.plan.masks.values()}) > 1
    assert sum(int(m.sum()) for m in p.plan.masks.values()) == count_to_keep(.2, 320)


def test_accumulated_gradients_and_clipping_are_your_business():
    net, data = plain(), pixels()
    with pruning(net, "rigl", .5, steps=4) as p:
        opt = torch.optim.AdamW(net.parameters(), 1e-2)
        for _ in range(4):
            opt.zero_grad()
            for x, y in data: (F.cross_entropy(net(x), y) / 2).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
            opt.step()
    assert p.training.step == 4 and p.plan.density == .5


WEIGHTS = [n for n in INSIDE if RULED[n].space == "weights"]


def exact(plan, keep=.5):
    return sum(int(m.sum()) for m in plan.masks.values()) == count_to_keep(keep, sum(m.numel() for m in
                                                                                       plan.masks.values()))


@pytest.mark.parametrize("steps", [1, 7, 12])
@pytest.mark.parametrize("name", INSIDE)
def test_a_loop_may_say_that_it_ends(name, steps):
    net, data = OWN[RULED[name].space](), pixels()
    read = data if RULED[name].space in TRACED else None
    with pruning(net, name, **request(name), steps=12, data=read, loss=F.cross_entropy) as p:
        loop(net, data, steps)
        p.finish()
    assert not any(parametrize.is_parametrized(m) for m in net.modules()) and torch.isfinite(net(data[0][0])).all()
    if RULED[name].space == "weights":
        assert exact(p.plan) and all(torch.equal(m, p.plan.masks[n]) for n, m in masks_of(net).items())
    else:
        kept = {n: (int(m.sum()), m.numel()) for n, m in p.plan.masks.items()}
        assert abs(sum(a for a, _ in kept.values()) - .5 * sum(b for _, b in kept.values())) <= len(kept)


@pytest.mark.parametrize("name", INSIDE)
def test_a_loop_that_ends_after_the_schedule_keeps_everything_and_before_it_nothing(name):
    record, data, steps = RULED[name], pixels(), 40
    read = data if record.space in TRACED else None
    made = []

    def run(taken):
        net = OWN[record.space]()
        with pruning(net, name, **request(name), steps=steps, data=read, loss=F.cross_entropy) as p:
            loop(net, data, taken)
        made.append(net)
        return p.plan

    ends = {"gradual-magnitude": 19 / 30, "rigl": .75, "set": .75, "granet": .7, "pdp": .5, "str": .7, "movement": .7,
            "slimming": .7, "admm": .5}
    end = ends.get(name, 1.)
    with pytest.raises(BadInput, match="took 1 optimiser steps and 40 were announced.*call finish"):
        run(1)
    if end < 1:
        plan = run(39)
        assert exact(plan) if record.space == "weights" else plan.density < .8
        assert record.space != "weights" or masks_of(made[-1])
        with pytest.raises(BadInput, match=f"needs {round(end * steps + .49)} of them"):
            run(int(end * steps) - 1)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("at", [0, 3, 7])
def test_one_gradient_that_is_not_a_number_is_refused_and_undone(name, at):
    net, data = plain(), pixels()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(BadInput, match="not finite"):
        with pruning(net, name, **request(name), steps=8, loss=F.cross_entropy):
            opt = torch.optim.SGD(net.parameters(), .05, momentum=.9)
            for step in range(8):
                x, y = data[step % 2]
                opt.zero_grad(); F.cross_entropy(net(x), y).backward()
                reached = [p.grad for p in net.parameters() if p.grad is not None]
                if step == at: reached[-1].fill_(torch.nan)
                opt.step()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not masks_of(net)


@pytest.mark.parametrize("name", WEIGHTS)
def test_infinite_weights_are_refused(name):
    net, data = plain(), pixels()
    with pytest.raises(BadInput, match="not finite"):
        with pruning(net, name, **request(name), steps=4, loss=F.cross_entropy):
            loop(net, data, 3)
            opt, (x, y) = torch.optim.SGD(net.parameters(), 0.), data[0]
            opt.zero_grad(); F.cross_entropy(net(x), y).backward()
            for p in net.parameters():
                if p.dim() == 1: p.data[0] = torch.inf   # an overflow that no forward pass has seen yet
            opt.step()
    assert traces(net) == traces(plain())


PICKLED = ("gradual-magnitude", "rigl", "set", "granet", "iss")   # PyTorch pickles no parametrised module


@pytest.mark.parametrize("name", INSIDE)
def test_copies_from_inside_a_loop_work_after_it(name):
    net, data = OWN[RULED[name].space](), pixels()
    read = data if RULED[name].space in TRACED else None
    x, y = data[0]
    with pruning(net, name, **request(name), steps=6, data=read, loss=F.cross_entropy):
        loop(net, data, 3)
        net.eval()
        copied, expected = copy.deepcopy(net), net(x).detach()
        if name in PICKLED: assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
        loop(net, data, 3)
    if RULED[name].space == "weights": assert torch.equal(copied(x), expected)
    opt = torch.optim.SGD(copied.parameters(), .1)
    F.cross_entropy(copied(x), y).backward()
    opt.step()
    assert torch.isfinite(copy.deepcopy(copied)(x)).all() and torch.isfinite(net(x)).all()
