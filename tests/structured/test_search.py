"Search over widths and blocks: closed form, alignment, evolution, supernets."
import copy
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.inputs import in_mode
from pruning_bench.core.recovery import Recovery, finetune, recalibrate_bn
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.evolution import combine_fronts, evolve_widths, gated_weights, parametrized
from pruning_bench.structured.layer_similarity import Residuals, block_cka, block_lists, cka
from pruning_bench.structured.precrop import balanced_widths, layer_groups, precrop, round_widths
from pruning_bench.structured.supernets import (LearnedWidths, MixedWidths, channel_interpolation, channel_order,
                                                consumer_columns, distil_gradients, evolutionary_search, l1_ranks,
                                                progressive_shrinking, width_mixture)

WEIGHTS = {"a": 1, "b": 2, "c": 4}


class Block(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.skip = nn.Identity() if i == o and stride == 1 else nn.Conv2d(i, o, 1, stride)

    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
        self.stages = nn.Sequential(nn.Sequential(Block(6, 6), Block(6, 6), Block(6, 6)),
                                    nn.Sequential(Block(6, 8, 2), Block(8, 8)))
        self.head = nn.Linear(8, 4)

    def forward(self, x): return self.head(self.stages(self.stem(x)).mean((2, 3)))


def residual(seed=0):
    torch.manual_seed(seed)
    net = Net()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.normal_(m.running_mean, std=.1)
    return net.double().eval()


def chain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1),
                         nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(12 * 9, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()


def batches(n=3, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 1, 6, 6, generator=g).double(), torch.randint(0, 4, (size,), generator=g))
            for _ in range(n)]


def bits(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# widths by arithmetic

def test_the_closed_form_by_hand_and_no_neighbour_is_better():
    p = balanced_widths({n: (a, [n]) for n, a in WEIGHTS.items()}, 1.)
    assert p == pytest.approx({"a": 1, "b": .5, "c": .25})
    assert sum(WEIGHTS[n] * p[n] for n in p) == pytest.approx(3)
    best = math.prod(p.values())
    for a, b in itertools.permutations(WEIGHTS, 2):   # move weights from one layer to another
        q = {**p, a: p[a] + .01 / WEIGHTS[a], b: p[b] - .01 / WEIGHTS[b]}
        assert q[a] > 1 or math.prod(q.values()) < best


@pytest.mark.parametrize("seed", range(8))
def test_the_condition_of_the_optimum_holds_for_coupled_groups(seed):
    g = torch.Generator().manual_seed(seed)
    names = "uvwxyz"[:3 + seed % 4]
    ends = {f"{a}{b}": (int(torch.randint(10, 9000, (), generator=g)), [a, b]) for a, b in zip(names, names[1:])}
    ends["in"], ends["out"] = (300, [names[0]]), (200, [names[-1]])
    price = float(torch.randint(20, 400, (), generator=g))
    r = balanced_widths(ends, price, 2000)
    for n in names:
        held = sum(s * math.prod(r[m] for m in groups) for s, groups in ends.values() if n in groups)
        # two layer ends each
        assert held == pytest.approx(2 * price, rel=1e-3) if r[n] < 1 - 1e-6 else held <= 2 * price * 1.001


def test_widths_grow_with_the_price():
    ends = {"first": (600, ["g"]), "second": (6000, ["g", "h"]), "last": (500, ["h"])}
    steps = [balanced_widths(ends, p) for p in (10., 50., 200., 800., 1e4)]
    assert all(a[n] <= b[n] + 1e-9 for a, b in zip(steps, steps[1:]) for n in a) and steps[-1] == {"g": 1, "h": 1}


@pytest.mark.parametrize("seed", range(20))
def test_whole_numbers_add_up_and_keep_their_bounds(seed):
    g = torch.Generator().manual_seed(seed)
    n = 1 + seed % 6
    size = {i: int(torch.randint(1, 40, (), generator=g)) for i in range(n)}
    want = {i: float(torch.randn((), generator=g) * 20 + 10) for i in range(n)}
    for total in (0, n, (n + sum(size.values())) // 2, sum(size.values())):
        count = round_widths(want, size, total)
        assert sum(count.values()) == max(n, total) and all(1 <= count[i] <= size[i] for i in size)
    exact = {i: min(3, s) for i, s in size.items()}
    assert round_widths(exact, size, sum(exact.values())) == exact


def test_precrop_holds_equal_weights_per_layer_end_within_a_channel():
    net = nn.Sequential(nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                        nn.Linear(128, 40))
    data = [torch.randn(2, 9)]
    space = Channels(net, data)
    scores = {n: torch.zeros(len(g)) for n, g in space.groups.items()}
    fractions = precrop(scores, .4, space)
    assert sum(round(fractions[n] * len(s)) for n, s in scores.items()) == round(.4 * 320)
    assert all((fractions[n] * len(s)) % 1 < 1e-9 or (fractions[n] * len(s)) % 1 > 1 - 1e-9 for n, s in scores.items())
    r, names = list(fractions.values()), list(fractions)
    ends = layer_groups(space)
    held = [sum(s * math.prod(fractions[m] for m in groups) for s, groups in ends.values() if n in groups)
            for n in names]
    # weights, and those of one channel
    cut = [(h, h / round(f * len(scores[n]))) for h, f, n in zip(held, r, names) if f < 1]
    assert len(cut) >= 2 and max(cut)[0] - min(cut)[0] < max(one for _, one in cut)
    wider = precrop(scores, .6, space)
    assert all(wider[n] >= fractions[n] for n in names)


# blocks

def test_alignment_ignores_rotation_scale_shift_and_order_of_arguments():
    torch.manual_seed(0)
    x, y = torch.randn(40, 7).double(), torch.randn(40, 5).double() + 3
    q = torch.linalg.qr(torch.randn(7, 7).double()).Q
    assert cka(x, 3 * x @ q + 2) == pytest.approx(1, abs=1e-12)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12) and 0 < cka(x, y) < .5
    # samples against features
    assert cka(x[:4], y[:4]) == pytest.approx(cka(x[:4].repeat(3, 1), y[:4].repeat(3, 1)), abs=1e-12)
    assert cka(x, torch.ones(40, 2)) == 0
    a, b = torch.tensor([[1.], [2], [3]]), torch.tensor([[0.], [2], [1]])
    assert cka(a, b) == pytest.approx(.25)


def test_units_are_the_blocks_that_keep_the_shape():
    net, data = residual(), batches()
    assert list(block_lists(net)) == ["stages.0", "stages.1"]   # stages are no blocks
    space = Residuals(net, data)
    assert space.units == [("stages.0", 0), ("stages.0", 1), ("stages.0", 2), ("stages.1", 1)]
    assert Residuals(net, data, skip=("stages.0.1*",)).units == [("stages.0", 0), ("stages.0", 2), ("stages.1", 1)]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_block_that_adds_nothing_scores_zero_and_its_removal_is_exact(gone):
    net, data = residual(), batches()
    for p in (net.stages[0][gone].bn2.weight, net.stages[0][gone].bn2.bias): nn.init.zeros_(p)
    nn.init.zeros_(net.stages[0][gone].bn2.running_mean)
    with torch.no_grad(): before = net(data[0][0])
    (read,) = block_cka(Residuals(net, data), data).values()
    assert 1 - read[gone] < 1e-12 and all(1 - read[i] > 1e-5 for i in range(4) if i != gone)
    plan = prune(net, "cka-layer", .25, data, rounds=1)
    assert [m.tolist() for m in plan.masks.values()] == [[i != gone for i in range(4)]]
    assert [len(s) for s in net.stages] == [2, 2]
    with torch.no_grad(): assert torch.equal(net(data[0][0]), before)


def test_alignment_without_a_block_is_that_of_the_shorter_network():
    net, data = residual(), batches(2, 16)
    space = Residuals(net, data)
    (read,) = block_cka(space, data).values()
    for (path, i), seen in zip(space.units, read.tolist(), strict=True):
        short = copy.deepcopy(net)
        del short.get_submodule(path)[i]
        feats = [torch.cat([m.stages(m.stem(x)).mean((2, 3)) for x, _ in data]).float() for m in (net, short)]
        assert seen == pytest.approx(cka(*feats), abs=1e-6)


def test_the_plan_of_blocks_fits_another_copy(tmp_path):
    from pruning_bench import load_plan
    net, data = residual(), batches()
    twin = copy.deepcopy(net)
    plan = prune(net, "cka-layer", .5, data)
    assert plan.density == .5
    plan.save(tmp_path / "plan")
    load_plan(tmp_path / "plan").apply(twin)
    assert same(bits(net), bits(twin)) and torch.equal(net(data[0][0]), twin(data[0][0]))


def test_the_lottery_of_layers_drops_the_least_sensitive_block():
    net, data = residual(), batches()
    with in_mode(net, True):
        twin = copy.deepcopy(net).train()
        grads = [torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())) for x, y in data]
    mean = {n: sum(g[i] for g in grads) / len(data) for i, (n, _) in enumerate(twin.named_parameters())}
    spaces = Residuals(net, data)
    total = [sum((mean[n] * q).abs().sum().item() for n, q in twin.named_parameters() if n.startswith(f"{p}.{i}.")
                 and q.dim() > 1) for p, i in spaces.units]
    (mask,) = prune(net, "layer-lottery", .25, data, F.cross_entropy).masks.values()
    assert (~mask).nonzero().flatten().tolist() == [total.index(min(total))]


@pytest.mark.parametrize("make, message", [(lambda: prune(residual(), "cka-layer", .5), "data="),
                                           (lambda: prune(chain(), "cka-layer", .5, batches()), "no residual block"),
                                           (lambda: prune(residual(), "cka-layer", .5, batches(), skip=("stages*",)),
                                            "no residual block"),
                                           (lambda: prune(residual(), "cka-layer", .5, [torch.randn(2, 3, 6, 6)]),
                                            "first batch"),
                                           (lambda: prune(residual(), "magnitude", .5, batches(), allocate="emo"),
                                            "space='channels'"),
                                           (lambda: prune(residual(), "magnitude", .5, batches(), allocate="precrop"),
                                            "space='channels'"),
                                           (lambda: prune(residual(), "tas", .5, batches(), F.cross_entropy,
                                                          recover="none"), "trains"),
                                           (lambda: prune(residual(), "ofa", .5, batches(), F.cross_entropy,
                                                          recover="none"), "trains")])
def test_refusals(make, message):
    with pytest.raises(BadInput, match=message) as refused: make()
    assert "\n" not in str(refused.value)


# evolution

def beaten(a, b): return b[0] <= a[0] and b[1] <= a[1] and b[:2] != a[:2]


@pytest.mark.parametrize("seed", range(3))
def test_a_front_has_no_beaten_member_and_is_as_good_as_uniform(seed):
    torch.manual_seed(seed)
    size, weight = {"a": 6, "b": 9, "c": 4}, {"a": 5., "b": 1., "c": .2}
    def hurt(c): return sum(weight[n] * (1 - c[n] / size[n])**2 for n in size)
    front = evolve_widths(size, hurt, 8, 16)
    assert not any(beaten(a, b) for a in front for b in front) and len({m[0] for m in front}) == len(front)
    assert all(m[0] == sum(m[2].values()) and m[1] == pytest.approx(hurt(m[2]))
               and all(1 <= m[2][n] <= size[n] for n in size) for m in front)
    even = [{n: max(1, round(f * s)) for n, s in size.items()} for f in (.25, .5, .75, 1.)]
    for e in even: assert any(m[0] <= sum(e.values()) and m[1] <= hurt(e) + 1e-12 for m in front)
    torch.manual_seed(seed)
    assert evolve_widths(size, hurt, 8, 16) == front


def test_fronts_are_joined_step_by_step():
    one = [(4, 0., {"a": 4}), (2, 1., {"a": 2}), (1, 9., {"a": 1})]
    two = [(4, 0., {"b": 4}), (3, 3., {"b": 3}), (2, 4., {"b": 2})]
    got = [combine_fronts([one, two], t) for t in (8, 7, 6, 5, 4, 3, 1)]
    assert [tuple(g.values()) for g in got] == [(4, 4), (2, 4), (2, 4), (2, 2), (2, 2), (1, 2), (1, 2)]


def test_a_missing_library_is_named_before_the_model_is_touched(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "pymoo"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymoo", None)
    net = residual()
    before = bits(net)
    with pytest.raises(BadInput, match=r"pip install pruning_bench\[search\]"): prune(net, "emo-pms", .5, batches())
    assert same(before, bits(net)) and not any(hasattr(m, "parametrizations") for m in net.modules())


def test_evolution_hurts_no_more_than_uniform_widths():
    from pruning_bench.structured.evolution import output_change, unit_ranks
    net, data = chain(), batches()
    space = Channels(net, data)
    scores = {n: space.w(n) for n in space.names()}
    dense = copy.deepcopy(net)
    plan = prune(net, "emo-pms", .5, data, subnetworks=1, generations=6, score="magnitude")
    assert plan.density == .5
    found = {n: int(m.sum()) for n, m in plan.masks.items()}
    other = Channels(dense, data)
    from pruning_bench.core.score import magnitude, unit_scores
    place = unit_ranks(unit_scores(other, magnitude, dict.fromkeys([*other.layers, *other.names()])))
    with gated_weights(other) as gates:
        hurt = output_change(other, place, data, gates)
        assert hurt(found) <= hurt({n: len(s) // 2 for n, s in scores.items()}) * 1.0001
        assert hurt({n: len(s) for n, s in scores.items()}) == 0


# supernets

@pytest.mark.parametrize("make", [chain, residual])
def test_a_network_behind_gates_is_the_one_with_sliced_weights(make):
    net, data = make(), batches()
    before, small = bits(net), copy.deepcopy(net)
    plan = prune(small, "l1-filter", .5, data)
    space = Channels(net, data)
    place = l1_ranks(space)
    with torch.no_grad(), gated_weights(space) as gates:
        for n, g in gates.items(): g.copy_(place[n] < int(plan.masks[n].sum()))
        assert all(torch.equal(gates[n].bool(), plan.masks[n]) for n in gates)
        assert torch.allclose(net(data[0][0]), small(data[0][0]), atol=1e-12)
        for g in gates.values(): g.fill_(1)
        whole_again = net(data[0][0])
    assert torch.equal(whole_again, net(data[0][0])) and same(before, bits(net))


def test_sorting_is_a_permutation_that_the_network_does_not_notice():
    net, data = chain(), batches()
    space, twin = Channels(net, data), copy.deepcopy(net)
    place, tensors = l1_ranks(space), dict(twin.named_parameters()) | dict(twin.named_buffers())
    with torch.no_grad():
        for n, g in space.groups.items():
            for (p, d), index in g.members.items():
                flat, sorted_ = torch.from_numpy(index).flatten(), torch.from_numpy(index)[place[n].argsort()].flatten()
                tensors[p].index_copy_(d, flat, tensors[p].index_select(d, sorted_))
        assert torch.allclose(net(data[0][0]), twin(data[0][0]), atol=1e-12)
    assert all((p == torch.arange(len(p))).all() for p in l1_ranks(Channels(twin, data)).values())
    assert not all((p == torch.arange(len(p))).all() for p in place.values())


def test_interpolation_by_hand():
    four = torch.tensor([1., 2, 3, 4])
    assert (four @ channel_interpolation(4, 2)).tolist() == [1.5, 3.5]
    assert (four[:3] @ channel_interpolation(3, 3)).tolist() == [1, 2, 3]
    assert torch.equal(width_mixture(4, [4, 2], torch.tensor([1., 0.])), torch.eye(4))
    assert torch.equal(width_mixture(4, [3, 3], torch.tensor([.4, .6])).diagonal(), torch.tensor([1., 1, 1, 0]))
    half = four @ width_mixture(4, [2, 4], torch.tensor([.5, .5]))
    assert half.tolist() == [1., 1.5, 2.5, 3.]   # (1 1 2 2) / 2 + (1 2 3 4) / 2


@pytest.mark.parametrize("make", [chain, residual])
def test_readers_of_one_width_are_the_gated_network_and_full_width_is_the_identity(make):
    net, data = make(), batches()
    space, x = Channels(net, data), data[0][0]
    place = l1_ranks(space)
    for part in (.5, 1.):
        width = {n: max(1, round(part * len(g))) for n, g in space.groups.items()}
        views = {p: MixedWidths(parts,
                                lambda n: width_mixture(len(place[n]), [width[n]] * 2, torch.tensor([.3, .7]).double()))
                 for p, parts in consumer_columns(space, place).items()}
        with torch.no_grad():
            with parametrized(net, views): mixed = net(x)
            with gated_weights(space) as gates:
                for n, g in gates.items(): g.copy_(place[n] < width[n])
                assert torch.allclose(mixed, net(x), atol=1e-6)


def test_the_pressure_is_the_gradient_of_the_logarithm():
    torch.manual_seed(0)
    net, data = chain(), batches()
    search = LearnedWidths(Channels(net, data), .5, 10, 5, 8., 2.)
    n = next(iter(search.options))
    for shift, sign in ((5., 1), (-5., -1)):
        with torch.no_grad():
            for a in search.logits.values(): a.copy_(torch.linspace(0, shift, len(a)))
        logits = {k: a.detach().clone().requires_grad_() for k, a in search.logits.items()}
        total = sum(a.softmax(0) @ search.options[k].float() for k, a in logits.items())
        wanted = torch.autograd.grad(sign * 2. * total.log(), logits[n])[0]
        assert torch.allclose(search.penalty_gradient(n), wanted, atol=1e-6)
        search.sample_widths(0)
        search.samples[n] = (*search.samples[n][:2], torch.tensor([0, 1]))
        assert search.mixture_of(n).sum().isfinite()
    search.target = sum(search.expected_widths().values()) * 1.02   # between 95 % and 100 % nothing pulls
    assert search.penalty_gradient(n).abs().max() == 0


def test_drawn_candidates_are_two_and_their_parts_are_a_whole():
    torch.manual_seed(0)
    net, data = chain(), batches()
    search = LearnedWidths(Channels(net, data), .5, 10, 5, 8., 2.)
    for step in range(10):
        search.sample_widths(step)
        for n in search.logits:
            assert len(set(search.samples[n][2].tolist())) == 2
            m, wide = search.mixture_of(n), max(search.options[n][search.samples[n][2]].tolist())
            # averages of channels
            assert torch.allclose(m.sum(0)[:wide], torch.ones(wide)) and (m[:, wide:] == 0).all()


def test_the_added_gradient_is_that_of_the_written_loss():
    torch.manual_seed(0)
    student, teacher = chain(1).train(), chain(2)
    (x, y), a, t = batches()[0], .7, 3.
    out, goal = student(x), teacher(x).detach()
    full = ((1 - a) * F.cross_entropy(out, y) + a * t**2 * F.kl_div((out / t).log_softmax(-1), (goal / t).softmax(-1),
                                                                    reduction="batchmean"))
    wanted = torch.autograd.grad(full, list(student.parameters()))
    with distil_gradients(student, teacher, a, t):
        got = torch.autograd.grad(F.cross_entropy(student(x), y), list(student.parameters()))
    assert all(torch.allclose(u, v, atol=1e-10) for u, v in zip(wanted, got))
    alone = torch.autograd.grad(F.cross_entropy(student(x), y), list(student.parameters()))
    assert not torch.allclose(alone[0], got[0])


def test_norms_are_plain_means_over_the_batches():
    net, data = chain().train(), batches(4)
    with torch.no_grad(): seen = [net[0](x) for x, _ in data]
    recalibrate_bn(net, data)
    assert torch.allclose(net[1].running_mean, torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0))
    assert torch.allclose(net[1].running_var, torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0))
    assert net[1].momentum == .1 and all(m.training for m in net.modules())


def test_the_search_among_sub_networks_is_no_worse_than_uniform_widths():
    from types import SimpleNamespace
    from pruning_bench.core.inputs import as_loss
    net, data = chain(), batches()
    space = Channels(net, data)
    scores = {n: -p.float() for n, p in l1_ranks(space).items()}
    stats = {"x": SimpleNamespace(loss_on_batches=(data, as_loss(F.cross_entropy)))}
    torch.manual_seed(0)
    before = bits(net)
    fractions = evolutionary_search(6, 8)(scores, .5, space, stats)
    assert sum(round(f * len(scores[n])) for n, f in fractions.items()) == 18 and same(before, bits(net))
    uniform = tuple(len(s) // 2 for s in scores.values())
    found = tuple(round(fractions[n] * len(s)) for n, s in scores.items())
    tried = space.searched[1]
    assert tried[found] == min(tried.values()) <= tried[uniform] and len(tried) > 8 and all(sum(k) == 18 for k in tried)


@pytest.mark.parametrize("method", ["tas", "ofa"])
def test_a_supernet_spends_the_budget_of_the_recipe_and_not_more(method):
    spent, net, data = [], residual(), batches()
    def counting(model, data, loss, part=1., since=None):
        step = finetune(20, lr=1e-3)
        opt_steps = max(1, round(20 * part))
        spent.append(opt_steps)
        step(model, data, loss, part)
    plan = prune(net, method, .5, data, F.cross_entropy, recover=Recovery(counting, steps=20, resumable=True))
    assert sum(spent) == 20 and plan.density == .5
    assert not any(hasattr(m, "parametrizations") for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_the_score_reads_the_order_from_before_the_training():
    space = Channels(residual(), batches())
    before = {n: r.clone() for n, r in l1_ranks(space).items()}
    assert all(torch.equal(r, before[n]) for n, r in channel_order(space, None).items())
    weights = [layer.weight for layer in space.layers.values()]
    class Training:
        steps = 2
        def __call__(self, part):
            for w in weights: w.data.mul_(2. ** torch.arange(len(w)).view(-1, *[1] * (w.dim() - 1)))
    progressive_shrinking(.5, .5)(None, space, .5, Training())
    assert any(not torch.equal(r, before[n]) for n, r in l1_ranks(space).items())
    assert all(torch.equal(r, before[n]) for n, r in channel_order(space, None).items())


def test_the_searched_weights_are_thrown_away():
    net, data, seen = residual(), batches(), []
    dense = copy.deepcopy(net)
    def watching(model, data, loss, part=1., since=None):
        seen.append(copy.deepcopy(model))
        finetune(6, lr=.1)(model, data, loss, part)
    plan = prune(net, "tas", .5, data, F.cross_entropy, recover=Recovery(watching, steps=6, resumable=True))
    plan.apply(dense)
    # what is trained after the cut are the dense weights, cut
    assert len(seen) == 2 and same(bits(dense), bits(seen[1]))


@pytest.mark.slow
def test_narrow_networks_from_a_supernet_are_far_ahead_of_those_cut_from_the_dense_one():
    from pruning_bench.bench.task import find_task
    cnn, gain = find_task("digits-cnn"), []
    for seed in range(3):
        made = {}
        for name in ("l1-filter", "ofa"):
            net = cnn.dense(seed)
            prune(net, name, .75, cnn.batches(seed), F.cross_entropy, recover=cnn.recover if name == "ofa" else "none",
                  seed=seed)
            recalibrate_bn(net, cnn.calibration(seed))
            made[name] = cnn.evaluate(net, "validation")["accuracy"]
        gain.append(made["ofa"] - made["l1-filter"])
    assert sum(gain) / 3 > .05
