"Late rewinding, linear mode connectivity, soups, PQ index, inactive units: exact invariants, orders over three seeds."
import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, Method, build, prune
from pruning_bench.bench.task import find_task
from pruning_bench.core.allocate import global_
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import attach_mask, masks_of
from pruning_bench.core.pattern import n_m, per_row, unstructured
from pruning_bench.core.recovery import (infinite_batches, Recovery, train_before_pruning, finetune, rewind,
                                          recalibrate_bn)
from pruning_bench.core.schedule import Schedule, as_schedule, cubic, pruning_steps, geometric
from pruning_bench.core.space import Weights
from pruning_bench.weight.lottery_ticket import (error_barrier, parameter_distance, late_rewinding, average_states,
                                                 mask_iou, linear_interpolation)
from pruning_bench.weight.imp_variants import (pq_schedule, pq_index, dead_neuron_rates, average_models, pq_rank,
                                               init_w, prunable_counts, ap_solver)


def mlp(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(),
                             nn.Linear(16, 10))

def conv(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                             nn.Conv2d(4, 6, 3, stride=2, bias=False),
                             nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10, bias=False))

def batches(seed=0, n=5):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 1, 8, 8, generator=g), torch.randint(0, 10, (16,), generator=g)) for _ in range(n)]

def run(model, method, sparsity=.8, data=None, **settings):
    return prune(model, method, sparsity, batches() if data is None else data, F.cross_entropy, **settings)
def total(masks): return sum(int(m.sum()) for m in masks.values())
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# schedules that look

def test_cuts_reads_both_kinds_of_schedules():
    assert list(pruning_steps(cubic(3), .2, None)) == [(k, 3, 2 - i) for i, k in enumerate(cubic(3)(.2))]
    # lists may rest at the end
    found = list(pruning_steps(as_schedule(lambda keep: [.5, .2, .2, .2]), .2, None))
    assert found == [(.5, 4, 3), (.2, 4, 2), (.2, 4, 1), (.2, 4, 0)]
    asked = []
    def look(keep, space):
        for k in (.7, .4): asked.append(k); yield k
        yield keep; raise AssertionError("asked after the end")
    steps = pruning_steps(Schedule(look, most=9), .3, None)
    assert next(steps) == (.7, 9, 8) and asked == [.7]   # the second answer is not asked for before its time
    assert list(steps) == [(.4, 9, 7), (.3, 9, 0)]
    assert list(pruning_steps(Schedule(look, most=2), .3, None)) == [(.7, 2, 1), (.4, 2, 0)]

def test_a_schedule_that_looks_sees_the_weights_between_cuts():
    seen = []
    def look(keep, space):
        for k in (.5, .3):
            seen.append(sum(int(space.alive(n).sum()) for n in space.names())); yield k
        yield keep
    plan = run(mlp(), Method(schedule=Schedule(look, most=3)), .9)
    n = sum(m.numel() for m in plan.masks.values())
    assert seen == [n, round(.5 * n)] and total(plan.masks) == round(.1 * n)


# late rewinding

@pytest.mark.parametrize("net", [mlp, conv])
def test_rewinding_to_step_zero_is_imp(net):
    one, two, other = net(), net(), net()
    p, q = run(one, "imp", rounds=3, steps=8), run(two, "imp-late", rounds=3, steps=8, rewind_to=0.)
    run(other, "imp-late", rounds=3, steps=8, rewind_to=.5)
    assert p == q
    assert p.cost["backward"] == q.cost["backward"] == 32
    assert equal(one.state_dict(), two.state_dict())
    assert not equal(one.state_dict(), other.state_dict())

@pytest.mark.parametrize("net", [mlp, conv])
def test_rewinding_to_the_end_is_one_shot_pruning(net):
    one, two = net(), net()
    finetune(8, 3e-3, weight_decay=1e-4)(one, batches(), F.cross_entropy)
    p, q = run(one, "global-magnitude"), run(two, "imp-late", rounds=4, steps=8, rewind_to=1.)
    assert p == q and q.cost["backward"] == 8 and equal(one.state_dict(), two.state_dict())

def test_survivors_return_to_the_early_step_and_masks_are_nested():
    first, seen, data = conv(), [], batches(n=20)
    finetune(10, 3e-3)(first, data, F.cross_entropy, .3, since=0.)
    prepare, between = late_rewinding(.3)
    def look(model, start, train, n, left):
        def noted(model, *args, **piece):
            masks = {k: m.clone() for k, m in masks_of(model).items()}
            seen.append(({k: v.clone() for k, v in model.state_dict().items()}, masks, next(train.data)[0]))
            train.recover(model, *args, **piece)
        between(model, start, replace(train, recover=replace(train.recover, fn=noted)), n, left)
    run(conv(), Method(allocate=global_, schedule=geometric(3), prepare=prepare, between=look,
                       recover=finetune(10, 3e-3)), data=data)
    for state, masks, _ in seen:
        # running statistics too
        assert all(torch.equal(v, first.state_dict()[k] * masks[k] if k in masks else first.state_dict()[k])
                   for k, v in state.items())
    for (_, more, _), (_, less, _) in zip(seen, seen[1:]): assert all((less[n] <= more[n]).all() for n in more)
    assert all(torch.equal(x, data[3][0]) for _, _, x in seen)   # the data of the rewound time follow

def numbered(shuffled):
    "Fifteen batches that a model can tell apart by their first value, as a list or as a loader with a random order."
    x, y = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10
    data = torch.utils.data.TensorDataset(x, y)
    if not shuffled: return list(zip(x.split(4), y.split(4)))
    return torch.utils.data.DataLoader(data, 4, shuffle=True, generator=shuffled if shuffled is not True else None)

class Listening(nn.Module):
    "A network that remembers which batches it was trained on."
    def __init__(self):
        super().__init__()
        self.net, self.seen = mlp(), []
    def forward(self, x):
        if self.training: self.seen.append(x[0, 0, 0, 0].item())
        return self.net(x)

@pytest.mark.parametrize("shuffled", [False, True, torch.Generator().manual_seed(3)], ids=["list", "loader", "own"])
@pytest.mark.parametrize("name, part, settings", [("imp-late", .1, dict(rewind_to=.1)), ("imp", 0, {}), ("ap", 0, {}),
                                                  ("imp-late", .8, dict(rewind_to=.8))], ids=str)
def test_the_data_are_rewound_as_the_weights_are(name, part, settings, shuffled):
    net, steps, data = Listening(), 20, numbered(shuffled)
    run(net, name, rounds=3, steps=steps, data=data, **settings)
    first, left = net.seen[:steps], steps - round(part * steps)
    rounds = [net.seen[i:i + left] for i in range(steps, len(net.seen), left)]
    assert len(rounds) == 3 and all(r == first[steps - left:] for r in rounds)
    if not shuffled:
        assert rounds[0][:3] == [data[i % 15][0][0, 0, 0, 0].item() for i in range(steps - left, 23 - left)]
    else: assert first[:5] != first[15:]   # every pass has an order of its own

def test_other_random_numbers_go_on_when_an_order_is_repeated():
    stream, drawn = infinite_batches(numbered(True)), []
    torch.manual_seed(0)
    for _ in range(2):
        stream.rewind()
        for _ in zip(range(20), stream): drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 40

def test_late_rewinding_costs_the_first_part_once():
    plan = run(mlp(), "imp-late", rounds=3, steps=20, rewind_to=.25)
    assert plan.cost["backward"] == 20 + 3 * 15

def test_learning_rate_rewinding_keeps_weights_and_repeats_the_training():
    one, two = mlp(), mlp()
    plan = run(one, "imp-lr", rounds=2, steps=10)
    assert plan.cost["backward"] == 30
    record = build("imp-lr", rounds=2, steps=10)
    train = finetune(10, 3e-3, weight_decay=1e-4)
    train(two, batches(), F.cross_entropy)
    for keep in record.schedule(.2):
        run(two, "global-magnitude", 1 - keep)
        train(two, batches(), F.cross_entropy)
    assert equal(one.state_dict(), two.state_dict())

@pytest.mark.parametrize("settings, word", [(dict(rewind_to=-.1), "outside"), (dict(rewind_to=1.5), "outside"),
                                            (dict(recover=Recovery(lambda model, data, loss, part=1.: None, steps=3)),
                                             "can resume"),
                                            (dict(recover="none"), "give it a training")])
def test_late_rewinding_refuses_before_work(settings, word):
    net = mlp()
    with pytest.raises(BadInput, match=word): run(net, "imp-late", **settings)
    assert equal(net.state_dict(), mlp().state_dict()) and not masks_of(net)


# probes

def test_overlap_by_hand():
    def plan(*bits):
        net = nn.Linear(4, 1, bias=False)
        net.weight.data = torch.tensor([bits], dtype=torch.float)
        return prune(net, "magnitude", .5)
    assert mask_iou(plan(2, 2, 1, 1), plan(2, 2, 1, 1)) == 1 and mask_iou(plan(2, 2, 1, 1), plan(1, 1, 2, 2)) == 0
    assert mask_iou(plan(2, 2, 1, 1), plan(2, 1, 2, 1)) == pytest.approx(1 / 3)

def test_mix_is_exact_at_corners_and_for_copies():
    a, b = conv(0).state_dict(), conv(1).state_dict()
    assert equal(average_states([a, b], [1., 0.]), a) and equal(average_states([a, a, a], [1 / 3] * 3), a)
    half = average_states([a, b], [.5, .5])
    assert all(torch.allclose(half[k], (a[k] + b[k]) / 2, atol=1e-7) for k in a if a[k].is_floating_point())
    assert half["1.num_batches_tracked"].dtype == torch.long

def test_path_ends_at_its_ends_and_barriers_are_exact():
    a, b, seen = mlp(0), mlp(1), []
    def first(model): seen.append(model[1].weight.detach().clone()); return float(len(seen) % 3)
    heights = linear_interpolation(a, b, first, points=4)
    assert torch.equal(seen[0], a[1].weight)
    assert torch.allclose(seen[-1], b[1].weight, atol=1e-6)
    assert heights == [1., 2., 0., 1.]
    assert error_barrier(heights) == 1.
    assert torch.allclose(seen[1], a[1].weight + (b[1].weight - a[1].weight) / 3, atol=1e-6)
    x, y = batches()[0]
    assert error_barrier(linear_interpolation(a, copy.deepcopy(a), lambda m: F.cross_entropy(m(x), y).item())) == 0
    turned = copy.deepcopy(a)   # hidden units exchanged: the same function, far away
    for p, q, dims in ((turned[1].weight, a[1].weight, (0,)), (turned[1].bias, a[1].bias, (0,)),
                       (turned[3].weight, a[3].weight, (1,))):
        p.data = q.data.flip(*dims)
    assert torch.allclose(a(x), turned(x), atol=1e-6)
    assert parameter_distance(a, turned) > 1
    assert parameter_distance(a, a) == 0
    assert abs(linear_interpolation(a, turned, lambda m: F.cross_entropy(m(x), y).item())[5] - F.cross_entropy(a(x), y)
               .item()) > 1e-3

def test_paths_between_children_of_a_ticket_stay_sparse():
    net = mlp()
    run(net, "global-magnitude")
    children = [copy.deepcopy(net) for _ in range(2)]
    for i, child in enumerate(children): finetune(5, 1e-2)(child, batches(i), F.cross_entropy)
    assert (max(linear_interpolation(*children,
                                     lambda m: sum(int((w != 0).sum()) for w in m.parameters() if w.dim() > 1)))
            <= total(masks_of(net)))

def test_renewed_norms_are_the_mean_over_batches_and_touches_nothing_else():
    net, data = conv(), batches()
    finetune(4, 1e-2)(net, data, F.cross_entropy)
    net.eval()
    before = copy.deepcopy(net)
    assert recalibrate_bn(net, []) is net and equal(net.state_dict(), before.state_dict())
    recalibrate_bn(net, (b for b in data)); recalibrate_bn(net, data)
    with torch.no_grad(): first = torch.cat([net[0](x) for x, _ in data])
    assert torch.allclose(net[1].running_mean, first.mean((0, 2, 3)), atol=1e-6)
    assert not torch.allclose(net[1].running_mean, before[1].running_mean)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters()))
    assert net[1].momentum == .1
    assert not any(m.training for m in net.modules())
    plain = mlp()
    assert recalibrate_bn(plain, iter(())) is plain


# soups

def test_soup_of_copies_is_the_network_and_support_never_grows():
    net = conv()
    run(net, "global-magnitude", .9)
    assert equal(average_models([net] * 3).state_dict(), net.state_dict())
    pots = [copy.deepcopy(net) for _ in range(3)]
    for i, pot in enumerate(pots): finetune(5, 1e-2)(pot, batches(i), F.cross_entropy)
    made = average_models(pots, batches())
    assert all((made.get_parameter(n)[~m] == 0).all() for n, m in masks_of(net).items())
    assert equal(masks_of(made), masks_of(net))
    # batch-norm scales and shifts are averaged
    assert torch.allclose(made[1].bias, sum(p[1].bias for p in pots) / 3, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(made[1].running_mean, torch.cat([made[0](x) for x, _ in batches()]).mean((0, 2, 3)),
                              atol=1e-6)

def test_a_linear_soup_averages_answers():
    models, x = [nn.Linear(6, 3) for _ in range(4)], torch.randn(9, 6)
    assert torch.allclose(average_models(models)(x), sum(m(x) for m in models) / 4, atol=1e-6)

def test_members_with_other_masks_are_refused():
    a, b = mlp(0), mlp(1)
    for m in (a, b): run(m, "global-magnitude")
    with pytest.raises(BadInput, match="differ"): average_models([a, b])
    with pytest.raises(BadInput, match="differ"): average_models([a, mlp(0)])
    part = mlp(0)
    attach_mask(part[1], "weight", part[1].weight > 0)
    with pytest.raises(BadInput, match="differ"): average_models([part, a])

def test_members_share_mask_and_budget_but_not_batches():
    seen, train = [], finetune(12, 1e-2)
    def noted(model, data, loss, part=1.):
        train(model, data, loss, part)
        seen.append((part, {n: m.clone() for n, m in masks_of(model).items()}, model[1].weight.detach().clone()))
    plan = run(mlp(), "soup", rounds=2, members=3, recover=Recovery(noted, steps=12))
    assert [p for p, _, _ in seen] == pytest.approx([1 / 6] * 6) and plan.cost["backward"] == 12
    for three in (seen[:3], seen[3:]):
        assert all(equal(m, three[0][1]) for _, m, _ in three) and not torch.equal(three[0][2], three[1][2])

def test_a_soup_of_one_is_going_on():
    one, two = mlp(), mlp()
    run(one, "soup", rounds=3, members=1, steps=12, lr=1e-2)
    run(two, Method(allocate=global_, schedule=geometric(3), recover=finetune(12, 1e-2)))
    assert equal(one.state_dict(), two.state_dict())

def test_soup_without_training_is_one_shot():
    one, two = mlp(), mlp()
    assert prune(one, "soup", .8, recover="none") == prune(two, "global-magnitude", .8)
    assert equal(one.state_dict(), two.state_dict())


# the PQ index

NORMS = [(.5, 1.), (1., 2.), (.2, 3.)]

@pytest.mark.parametrize("p, q", NORMS)
def test_pq_index_of_known_vectors(p, q):
    assert pq_index(torch.full((2, 30), -3.), p, q).tolist() == pytest.approx([0, 0], abs=1e-12)
    one = torch.zeros(1, 30); one[0, 4] = -7
    assert pq_index(one, p, q).item() == pytest.approx(1 - 30 ** (1 / q - 1 / p))
    for k in (1, 7, 29):
        some = torch.zeros(1, 100); some[0, :k] = .3
        assert 100 * (1 - pq_index(some, p, q).item()) ** (p * q / (q - p)) == pytest.approx(k)
    w = torch.randn(4, 50)
    for scaled in (w * 1e-20, w * 1e20, torch.cat([w, w, w], 1)):
        assert torch.allclose(pq_index(scaled, p, q), pq_index(w, p, q), atol=1e-6)

def test_surplus_by_hand():
    w = torch.tensor([[4., 1, 1, 1, 1], [9., 4, 1, 0, 0], [0., 0, 0, 0, 0], [2., 2, 2, 2, 0]])
    # (.5, 1): what can go is d I.  5 - 36/8 = .5; 3 - 36/14 = .43; nothing; nothing
    assert prunable_counts(w).tolist() == [0, 0, 0, 0]
    assert prunable_counts(w, gamma=2.1).tolist() == [1, 0, 0, 0]
    assert prunable_counts(w, gamma=2.4).tolist() == [1, 1, 0, 0]
    # (1, 2): d - |w|_1^2 / |w|_2^2 = 5 - 64/20 = 1.8; 3 - 196/98 = 1
    assert prunable_counts(w, 1., 2.).tolist() == [1, 1, 0, 0]
    # (1 + eta)^-2 of 20 stay
    assert prunable_counts(torch.eye(20)[:1] + 1e-9, beta=.5).item() == 10
    assert prunable_counts(torch.ones(1, 20), eta=1.).item() == 15

@pytest.mark.parametrize("p, q", [(1., 1.), (2., 1.), (0., 1.)])
def test_norms_in_the_wrong_order_are_refused(p, q):
    with pytest.raises(BadInput, match="0 < p < q"): build("sap", p=p, q=q)
    with pytest.raises(BadInput, match="scope"): build("sap", scope="rows")

@pytest.mark.parametrize("scope", ["layer", "row"])
def test_standing_draws_the_line_where_the_index_says(scope):
    w = torch.randn(12, 40) * torch.rand(12, 1) * (torch.rand(12, 40) < .7)
    w[3], w[4] = 0., 1.
    below, groups = (pq_rank(w, None, scope=scope) < 0) & (w != 0), w if scope == "row" else w.view(1, -1)
    assert below.view(len(groups), -1).sum(1).tolist() == prunable_counts(groups).tolist() and (below.sum() > 0)
    s = pq_rank(w, None, scope=scope).view(len(groups), -1)
    # never against the magnitudes
    for row, alive in zip(s, groups.abs()): assert (row[alive.argsort(stable=True)].diff() >= 0).all()

@pytest.mark.parametrize("scope, p, q", [("global", .5, 1.), ("layer", .5, 1.), ("row", 1., 2.)])
def test_sap_takes_what_the_index_says_and_stops_exactly_at_the_budget(scope, p, q):
    densities, wanted = [], []
    def look(model, start, train, n, left):
        assert n == 40
        densities.append(total(masks_of(model))); rewind(model, start, train, n, left)
        groups = {"global": lambda ws: [torch.cat([w.flatten() for w in ws])[None]],
                  "layer": lambda ws: [w.view(1, -1) for w in ws],
                  "row": lambda ws: ws}[scope]([w.detach() for w in model.parameters() if w.dim() > 1])
        wanted.append(densities[-1] - sum(int(prunable_counts(g, p, q).sum()) for g in groups))
    record = build("sap", scope=scope, rounds=40, p=p, q=q)
    plan = run(mlp(), Method(score=record.score, allocate=record.allocate, schedule=record.schedule,
                             prepare=train_before_pruning, between=look, recover=finetune(4, 1e-2)), .4)
    n = sum(m.numel() for m in plan.masks.values())
    assert total(plan.masks) == densities[-1] == round(.6 * n)
    assert len(densities) < 40
    assert all(a > b for a, b in zip(densities, densities[1:]))
    # the index decides until the last cut, which is shortened
    assert densities[1:-1] == wanted[:-2] and wanted[-2] <= densities[-1]

def test_the_pace_decides_where_the_index_brakes():
    ones = SimpleNamespace(names=lambda: ["a"], w=lambda n: torch.ones(10, 10))
    steps = pruning_steps(pq_schedule(4), .1, ones)
    assert next(steps)[0] == pytest.approx(.1 ** .25)   # nothing can go, so an even pace; the fake weights never change
    assert [k for k, _, _ in steps][-1] == .1
    with pytest.warns(UserWarning, match="index decided none of them") as said:
        assert run(mlp(), "sap", .95, rounds=3, steps=4) == run(mlp(), "imp", .95, rounds=3, steps=4)
    assert len(said) == 1

@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_without_a_target_the_index_decides_every_round(scope):
    densities, wanted = [], []
    def look(model, start, train, n, left):
        assert n == 3
        densities.append(total(masks_of(model)))
        rewind(model, start, train, n, left)
        groups = {"global": lambda ws: [torch.cat([w.flatten() for w in ws])[None]],
                  "layer": lambda ws: [w.view(1, -1) for w in ws],
                  "row": lambda ws: ws}[scope]([w.detach() for w in model.parameters() if w.dim() > 1])
        wanted.append(densities[-1] - sum(int(prunable_counts(g).sum()) for g in groups))
    record = build("sap", scope=scope, rounds=3, target=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = run(mlp(), replace(record, between=look, recover=finetune(4, 1e-2)), .95)
    assert len(densities) == 3 and densities[1:] == wanted[:-1] and total(plan.masks) == densities[-1]
    assert plan.density > .2
    stopped = run(mlp(), "sap", .2, scope=scope, rounds=30, steps=4, target=False)   # the sparsity is a limit
    assert total(stopped.masks) == round(.8 * sum(m.numel() for m in stopped.masks.values()))
    assert stopped.cost["backward"] < 4 * 31

def test_where_the_index_decides_a_round_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = run(mlp(), "sap", .4, rounds=40, steps=4)
    assert plan != run(mlp(), "imp", .4, rounds=40, steps=4)


# silent units

def test_silence_is_heard_in_modules_and_functions():
    class Both(nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b, self.relu = nn.Linear(4, 6), nn.Linear(6, 8), nn.ReLU(inplace=True)
        def forward(self, x): return self.relu(self.b(F.relu(self.a(x))))
    net, x = Both(), torch.randn(50, 4)
    with torch.no_grad(): hidden = net.a(x); out = net.b(F.relu(hidden))
    assert (dead_neuron_rates(net, [x[:25], (x[25:], None)])
            == pytest.approx([(hidden <= 0).float().mean().item(), (out <= 0).float().mean().item()], abs=1e-6))
    with pytest.raises(BadInput, match="no ReLU"): dead_neuron_rates(nn.Sequential(nn.Linear(4, 4), nn.GELU()), [x])

@pytest.mark.parametrize("seed", range(5))
def test_cutting_negative_weights_wakes_units_behind_positive_inputs(seed):
    g = torch.Generator().manual_seed(seed)
    net, x, stats = (nn.Sequential(nn.Linear(20, 30), nn.ReLU()), torch.rand(64, 20, generator=g),
                     SimpleNamespace(init_w=torch.randn(30, 20, generator=g)))
    w = net[0].weight.data.clone()
    before = dead_neuron_rates(net, [x])[0]
    # the whole cut is the part for waking
    kept, mask = ap_solver(w, stats, torch.where(w < 0, w.abs(), 9.), .9, unstructured(), share=.1)
    net[0].weight.data = kept
    assert (~mask).sum() == 60 and (w[~mask] < 0).all() and dead_neuron_rates(net, [x])[0] <= before
    unmoved = (w - stats.init_w).abs()
    assert unmoved[~mask].max() <= unmoved[mask & (w < 0)].min()

@pytest.mark.parametrize("pattern, fraction", [(unstructured(), .3), (per_row(), .3), (n_m(2, 4), .5)],
                         ids=["unstructured", "per_row", "2:4"])
def test_waking_meets_any_pattern(pattern, fraction):
    w, stats = torch.randn(12, 20), SimpleNamespace(init_w=torch.randn(12, 20))
    _, mask = ap_solver(w, stats, w.abs(), fraction, pattern, share=.1)
    assert mask.sum() == pattern(w.abs(), fraction).sum()
    if pattern.name != "unstructured": assert len(set(mask.view(-1, 4 if pattern.fixed else 20).sum(1).tolist())) == 1
    assert torch.equal(ap_solver(w, stats, w.abs(), fraction, pattern, share=0.)[1], pattern(w.abs(), fraction))

def test_waking_takes_no_positive_weight_and_no_more_than_there_are():
    w = torch.cat([torch.rand(10, 9) + .1, -torch.rand(10, 1) - .1], 1)   # ten negative weights, asked for forty
    _, mask = ap_solver(w, SimpleNamespace(init_w=torch.zeros(10, 10)), w.abs(), .5, unstructured(), share=.4)
    positive = w > 0
    order = w.abs().masked_fill(~positive, torch.inf).flatten().argsort()
    assert mask.sum() == 50 and not mask[~positive].any() and not mask.flatten()[order[:40]].any()

def test_ap_without_its_share_is_imp_and_finds_the_start():
    one, two, other = mlp(), mlp(), mlp()
    p, q = run(one, "ap", activation_fraction=0., rounds=2, steps=6), run(two, "imp", rounds=2, steps=6)
    assert p == q
    assert equal(one.state_dict(), two.state_dict())
    assert run(other, "ap", activation_fraction=.1, rounds=2, steps=6) != p
    with pytest.raises(BadInput, match="rewinds"): run(mlp(), Method(solve=ap_solver))
    with pytest.raises(BadInput, match="rewinds"): init_w(Weights(mlp()), [])


# orderings on the digits

def world(): return find_task("digits-mlp")
def accuracy(model): return 100 * world().evaluate(model)["accuracy"]
def mean(values): return sum(values) / len(values)

@pytest.mark.slow
def test_averages_need_a_shared_mask_and_a_shared_start():
    for seed in range(3):
        pruned = world().dense(seed)
        plan = prune(pruned, "global-magnitude", .95)
        pots = [copy.deepcopy(pruned) for _ in range(3)]
        for i, pot in enumerate(pots): finetune(300, 3e-3)(pot, world().batches(10 * seed + i), world().loss)
        unrelated = [world().initial(100 + 10 * seed + i) for i in range(2)]
        for i, net in enumerate(unrelated): plan.apply(net); world().train(net, world().batches(i), world().loss)
        assert accuracy(average_models(pots)) > mean([accuracy(p) for p in pots]) - 1.5
        assert accuracy(average_models(unrelated)) < mean([accuracy(n) for n in unrelated]) - 10

@pytest.mark.slow
def test_cutting_unmoved_negative_weights_wakes_units():
    for seed in range(3):
        rates = []
        for share in (0., .1):
            model, first = world().dense(seed), world().initial(seed).state_dict()
            def remember(method, space, keep, train): return first
            prune(model, Method(allocate=global_, solve=build("ap", activation_fraction=share).solve, prepare=remember),
                  .8, world().calibration(seed))
            rates.append(mean(dead_neuron_rates(model, world().calibration(seed))))
        assert rates[1] < rates[0] - .03
