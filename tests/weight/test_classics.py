"Magnitude, SNIP, SynFlow, gradual pruning and lottery tickets: invariants exactly, orderings over three seeds."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from pruning_bench import BadInput, Method, prune
from pruning_bench.bench.task import find_task
from pruning_bench.core.allocate import global_
from pruning_bench.core.inputs import seeded
from pruning_bench.core.mask import masks_of
from pruning_bench.core.recovery import train_before_pruning, finetune, rewind
from pruning_bench.core.schedule import Schedule, geometric
from pruning_bench.core.space import Weights
from pruning_bench.core.stats import collect
from pruning_bench.weight.at_init import synflow
from pruning_bench.weight.gradual import cubic_then_constant
from pruning_bench.weight.magnitude import copy_allocation, shuffle_masks


def mlp(*sizes, seed=0, bias=True):
    with seeded(seed):
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b, bias=bias), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

def conv(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                             nn.Conv2d(4, 6, 3, stride=2, bias=False),
                             nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10, bias=False))

def batches(seed=0, n=4, shape=(1, 8, 8)):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, *shape, generator=g), torch.randint(0, 10, (16,), generator=g)) for _ in range(n)]

def total(masks): return sum(int(m.sum()) for m in masks.values())
def size(model): return sum(w.numel() for n, w in model.named_parameters() if w.dim() > 1)


# magnitude

@pytest.mark.parametrize("method", ["magnitude", "global-magnitude", "erk-magnitude"])
def test_masks_have_exact_sizes_and_are_nested(method):
    masks = [prune(mlp(64, 50, 30, 10), method, s).masks for s in (.25, .5, .75, .9, .95)]
    assert [total(m) for m in masks] == [int((1 - s) * size(mlp(64, 50, 30, 10)) + .5) for s in (.25, .5, .75, .9, .95)]
    for more, less in zip(masks, masks[1:]): assert all((less[n] <= more[n]).all() for n in more)

def test_erk_of_lenet_300_100():
    plan = prune(mlp(784, 300, 100, 10), "erk-magnitude", .9)
    assert plan.table().density.round(4).tolist() == [.0796, .2302, 1.]
    assert total(plan.masks) == 26_620

def test_masks_are_those_of_torch():
    net = mlp(64, 50, 30, 10)
    layers = [1, 3, 5]
    judge = copy.deepcopy(net)
    torch_prune.global_unstructured([(judge[i], "weight") for i in layers], torch_prune.L1Unstructured, amount=.8)
    plan = prune(copy.deepcopy(net), "global-magnitude", .8)
    assert all(torch.equal(plan.masks[f"{i}.weight"], judge[i].weight_mask.bool()) for i in layers)
    judge = copy.deepcopy(net)
    for i in layers: torch_prune.l1_unstructured(judge[i], "weight", .8)
    plan = prune(copy.deepcopy(net), "magnitude", .8)
    assert all(torch.equal(plan.masks[f"{i}.weight"], judge[i].weight_mask.bool()) for i in layers)

def test_controls_keep_the_allocation():
    plan = prune(conv(), "global-magnitude", .8)
    kept = {n: int(m.sum()) for n, m in plan.masks.items()}
    lot, moved = prune(conv(), "random", .8, allocate=copy_allocation(plan)), shuffle_masks(plan, 1)
    for other in (lot, moved):
        assert {n: int(m.sum()) for n, m in other.masks.items()} == kept and other != plan
    assert moved == shuffle_masks(plan, 1) != shuffle_masks(plan, 2)
    assert prune(conv(), "magnitude", .8, allocate=copy_allocation(plan)) == plan
    with pytest.raises(BadInput, match="keeps"): prune(conv(), "random", .5, allocate=copy_allocation(plan))
    with pytest.raises(BadInput, match="other layers"): prune(mlp(64, 10), "random", .8, allocate=copy_allocation(plan))


# at initialisation

def scores(model, need, data, loss=F.cross_entropy):
    space = Weights(model)
    return space, collect(space, data, {need}, loss)

def test_snip_is_the_derivative_by_the_gates():
    net, (x, y) = mlp(64, 20, 10), batches(n=1)[0]
    space, found = scores(net, "init_grad", [(x, y)])
    gates = {n: torch.ones_like(space.w(n), requires_grad=True) for n in space.names()}
    F.cross_entropy(torch.func.functional_call(net, {n: g * space.w(n) for n, g in gates.items()}, x), y).backward()
    assert all(torch.allclose(gates[n].grad, space.w(n) * found[n].init_grad, atol=1e-6) for n in gates)

def test_snip_adds_gradients_before_the_absolute_value():
    x, y = batches(n=1)[0]
    whole = prune(mlp(64, 20, 10), "snip", .9, [(x, y)], F.cross_entropy)
    parts = prune(mlp(64, 20, 10), "snip", .9, [(x[i:i + 4], y[i:i + 4]) for i in range(0, 16, 4)], F.cross_entropy)
    assert whole.diff(parts).iou.min() > .98   # equal but for rounding

def test_snip_ignores_rescaling():
    net, twin = mlp(64, 40, 30, 10), mlp(64, 40, 30, 10)
    factors = 2. ** torch.randint(-3, 4, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): twin[1].weight *= factors[:, None]; twin[1].bias *= factors; twin[3].weight /= factors
    one, two = (prune(m, "snip", .9, batches(), F.cross_entropy) for m in (net, twin))
    assert one.diff(two).iou.min() > .98 and one.diff(two).kept_here.equals(one.diff(two).kept_there)
    assert prune(mlp(64, 40, 30, 10), "magnitude", .9).diff(prune(twin, "magnitude", .9)).iou.min() < .9

def test_snip_needs_labels_and_data():
    for data in (None, [b[0] for b in batches()]):
        with pytest.raises(BadInput): prune(mlp(64, 10), "snip", .5, data, F.cross_entropy)

@pytest.mark.parametrize("net", [mlp(64, 40, 30, 10, bias=False), conv()], ids=["mlp", "conv"])
def test_synflow_is_conserved(net):
    before = copy.deepcopy(net.state_dict())
    space, found = scores(net, "synflow_grad", batches(n=1))
    sums = [synflow(space.w(n), found[n]).sum().item() for n in space.names()]
    assert sums == pytest.approx([1.] * len(sums), abs=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

def test_synflow_is_conserved_at_every_unit_of_a_pruned_network():
    net = mlp(64, 40, 30, 10, bias=False)
    prune(net, "random", .7)
    space, found = scores(net, "synflow_grad", batches(n=1))
    flow = [synflow(space.w(n), found[n]) for n in space.names()]
    for into, out in zip(flow, flow[1:]): assert torch.allclose(into.sum(1), out.sum(0))
    assert all((f[~space.alive(n)] == 0).all() for n, f in zip(space.names(), flow))

def test_synflow_reads_no_data():
    data_sets = batches(0), [torch.rand(3, 1, 8, 8)], [{"input": torch.zeros(1, 1, 8, 8)}]
    plans = [prune(conv(), "synflow", .9, data, rounds=20) for data in data_sets]
    assert plans[0] == plans[1] == plans[2]
    with pytest.raises(BadInput, match="token ids"):
        prune(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), "synflow", .5, [torch.ones(2, 3).long()])

def test_synflow_collapses_in_one_round_only():
    net = lambda: mlp(64, 256, 256, 256, 10)
    assert prune(net(), "synflow", .99, batches(n=1), rounds=1).table().kept.min() == 0
    plan = prune(net(), "synflow", .99, batches(n=1))
    assert plan.table().kept.min() > 100 and total(plan.masks) == 1500

def test_synflow_trains_once_after_the_last_round():
    one, two = mlp(64, 20, 10), mlp(64, 20, 10)
    prune(one, "synflow", .8, batches(), F.cross_entropy, rounds=7, recover=finetune(12))
    prune(two, "synflow", .8, batches(), F.cross_entropy, rounds=7)
    finetune(12)(two, batches(), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


# gradual

@pytest.mark.parametrize("keep", [.5, .2, .02])
def test_cubic_with_rest_meets_its_end_points(keep):
    way = cubic_then_constant(10, 5)(keep)
    assert len(way) == 15 and way[9:] == [keep] * 6
    assert 1 - way[4] == pytest.approx(7 / 8 * (1 - keep))
    assert all(a >= b for a, b in zip([1., *way], way))

def every_step(model, *what, **settings): # learning rates, masks while each step is taken, and the plan
    rates, masks = [], []
    def look(optimizer, args, kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        masks.append({n: m.clone() for n, m in masks_of(model).items()})
        if len(rates) > 1: assert optimizer is last[0]
        last[:] = [optimizer]
    last, handle = [], register_optimizer_step_post_hook(look)
    try: plan = prune(model, *what, batches(), F.cross_entropy, **settings)
    finally: handle.remove()
    return rates, masks, plan

def test_gradual_magnitude_is_exact_nested_and_keeps_its_budget():
    net = mlp(64, 40, 10)
    rates, masks, plan = every_step(net, "gradual-magnitude", .9, pruning_steps=5, final_intervals=1, steps=12)
    assert total(plan.masks) == 296 == sum(int((w != 0).sum()) for w in net.parameters() if w.dim() > 1)
    assert plan.cost["backward"] == 12 == len(rates)
    assert [total(m) for m in masks] == [int(size(net) * k + .5) for k in cubic_then_constant(5, 1)(.1)
                                         for _ in range(2)]
    for more, less in zip(masks, masks[1:]): assert all((less[n] <= more[n]).all() for n in more)
    one, two = mlp(64, 40, 10), mlp(64, 40, 10)
    prune(one, "gradual-magnitude", .9, batches(), F.cross_entropy, pruning_steps=1, final_intervals=0, steps=8,
          lr=1e-3)
    prune(two, "magnitude", .9, batches(), F.cross_entropy, recover=finetune(8, 1e-3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))

def test_gradual_magnitude_is_one_training_with_one_learning_rate():
    rates, masks, _ = every_step(mlp(64, 40, 10), "gradual-magnitude", .9, steps=30)
    assert all(a >= b for a, b in zip(rates, rates[1:])) and len(rates) == 30
    idle, plain = mlp(64, 40, 10), mlp(64, 40, 10)
    prune(idle, "gradual-magnitude", 0., batches(), F.cross_entropy, steps=12)
    finetune(12, 3e-3)(plain, batches(), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(idle.parameters(), plain.parameters()))

@pytest.mark.parametrize("steps", [1, 2, 7, 29, 31, 100])
def test_gradual_magnitude_ends_before_the_training_does(steps):
    rates, masks, plan = every_step(mlp(64, 40, 10), "gradual-magnitude", .9, steps=steps)
    if steps > 2: assert total(masks[-1]) == 296
    assert total(plan.masks) == 296 and len(rates) == steps

def test_gradual_magnitude_asks_the_parts_of_the_method():
    end = prune(mlp(64, 40, 10), "gradual-magnitude", .9, batches(), F.cross_entropy, allocate="erk",
                steps=30).table().kept.tolist()
    assert end == prune(mlp(64, 40, 10), "erk-magnitude", .9).table().kept.tolist() != [256, 40]
    _, masks, plan = every_step(mlp(64, 40, 12), "gradual-magnitude", "2:4", steps=30)
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in [*masks[0].values(), *plan.masks.values()])
    rows = prune(mlp(64, 40, 10), "gradual-magnitude", .75, batches(), F.cross_entropy, pattern="per_row", steps=30)
    assert all((m.sum(1) == m.shape[1] // 4).all() for m in rows.masks.values())
    _, masks, _ = every_step(mlp(64, 40, 10), "gradual-magnitude", .5, schedule=lambda keep: [.9, .7, keep], steps=6)
    assert [total(m) for m in masks] == [2664, 2664, 2072, 2072, 1480, 1480]

def test_gradual_magnitude_refuses_what_needs_a_pause():
    def looks(keep, space): yield keep
    adaptive = Schedule(looks, most=3)
    with pytest.raises(BadInput, match="read from data"):
        prune(mlp(64, 10), "gradual-magnitude", .5, batches(), F.cross_entropy, score="snip")
    with pytest.raises(BadInput, match="adaptive schedule needs pauses"):
        prune(mlp(64, 10), "gradual-magnitude", .5, batches(), F.cross_entropy, schedule=adaptive)
    with pytest.raises(BadInput, match="give it a training"):
        prune(mlp(64, 10), "gradual-magnitude", .5, batches(), F.cross_entropy, recover="none")


# lottery tickets

def watching(between):
    seen = []
    def look(model, start, train, n, left):
        def train_and_note(part):
            seen.append({k: (m.clone(), model.get_parameter(k).detach().clone()) for k, m in masks_of(model).items()})
            train(part)
        between(model, start, train_and_note, n, left)
    return seen, look

def test_imp_sizes_chains_and_rewinding():
    net, first = mlp(50, 16, 20, seed=3, bias=True), mlp(50, 16, 20, seed=3, bias=True)
    data = [(x, y) for x, y in batches(shape=(50,))]
    seen, look = watching(rewind)
    prune(net, Method(allocate=global_, schedule=geometric(5), prepare=train_before_pruning, between=look,
                      recover=finetune(6, 1e-2)), 1 - .8**5, data, F.cross_entropy)
    assert [sum(int(m.sum()) for m, _ in r.values()) for r in seen] == [round(.8**i * size(first)) for i in range(1, 6)]
    for r in seen:
        for name, (mask, w) in r.items(): assert torch.equal(w, first.get_parameter(name) * mask)
    for more, less in zip(seen, seen[1:]): assert all((less[n][0] <= more[n][0]).all() for n in more)

def test_imp_ranks_trained_weights_and_charges_every_round():
    data = batches()
    plan = prune(conv(), "imp", .8, data, F.cross_entropy, rounds=3, steps=8)
    assert plan.cost["backward"] == 4 * 8
    assert plan != prune(conv(), "global-magnitude", .8)

def test_imp_plan_is_a_ticket():
    data = batches(n=8)
    net, again = conv(), conv()
    plan = prune(net, "imp", .8, data, F.cross_entropy, rounds=2, steps=8)
    plan.apply(again)
    finetune(8, 3e-3, weight_decay=1e-4)(again, data, F.cross_entropy)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())   # running statistics too


# orderings on the digits

def world(): return find_task("digits-mlp")
def accuracy(model): return 100 * world().evaluate(model)["accuracy"]
def mean(values): return sum(values) / len(values)

@pytest.mark.slow
def test_at_initialisation_synflow_beats_snip_beats_magnitude():
    found = {}
    for name in ("synflow", "snip", "magnitude"):
        for keep in (.01, .005):
            found[name, keep] = []
            for seed in range(3):
                net = mlp(64, 256, 256, 256, 10, seed=seed)
                prune(net, name, 1 - keep, world().calibration(seed), world().loss, allocate="global", seed=seed)
                finetune(600, 3e-3, weight_decay=1e-4)(net, world().batches(seed), world().loss)
                found[name, keep].append(accuracy(net))
    assert mean(found["synflow", .01]) > mean(found["snip", .01]) > mean(found["magnitude", .01]) + 50
    assert mean(found["synflow", .005]) > mean(found["snip", .005]) + 10 > mean(found["magnitude", .005]) + 20

@pytest.mark.slow
def test_winning_ticket_beats_other_values_beat_shuffled_mask():
    rounds, found = 20, {"ticket": [], "other values": [], "shuffled": [], "one cut": []}
    def fit(model, seed):
        world().train(model, world().batches(seed), world().loss)
        return accuracy(model)
    for seed in range(3):
        model, once = world().initial(seed), world().initial(seed)
        plan = prune(model, "imp", 1 - .8**rounds, world().batches(seed), world().loss, rounds=rounds, seed=seed)
        prune(once, "imp", 1 - .8**rounds, world().batches(seed), world().loss, rounds=1, seed=seed)
        other, moved = world().initial(seed + 100), world().initial(seed)
        plan.apply(other); shuffle_masks(plan, seed).apply(moved)
        for name, value in {"ticket": accuracy(model), "one cut": accuracy(once), "other values": fit(other, seed),
                            "shuffled": fit(moved, seed)}.items():
            found[name].append(value)
    assert mean(found["ticket"]) > mean(found["other values"]) + 5 > mean(found["shuffled"]) + 10
    assert mean(found["ticket"]) > mean(found["one cut"]) + 10

@pytest.mark.slow
def test_gradual_beats_one_shot_at_equal_steps_and_98_percent():
    found = {}
    for name, settings in {"gradual": {}, "one-shot": dict(pruning_steps=1, final_intervals=0)}.items():
        found[name] = []
        for seed in range(3):
            model = world().dense(seed)
            plan = prune(model, "gradual-magnitude", .98, world().batches(seed), world().loss, allocate="global",
                         seed=seed, **settings)
            assert plan.cost["backward"] == 300
            found[name].append(accuracy(model))
    assert mean(found["gradual"]) > mean(found["one-shot"]) + 5

@pytest.mark.slow
def test_a_good_allocation_is_worth_more_than_the_criterion():
    conv_world, found = find_task("digits-cnn"), {}
    for criterion, allocate in (("random", "erk"), ("magnitude", "uniform"), ("magnitude", "erk")):
        found[criterion, allocate] = []
        for seed in range(3):
            model = conv_world.dense(seed)
            prune(model, criterion, .9, conv_world.batches(seed), conv_world.loss, allocate=allocate, seed=seed,
                  recover=conv_world.recover)
            found[criterion, allocate].append(100 * conv_world.evaluate(model)["accuracy"])
    assert mean(found["magnitude", "erk"]) > mean(found["random", "erk"]) > mean(found["magnitude", "uniform"]) + 5
