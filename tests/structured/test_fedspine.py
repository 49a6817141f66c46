"Simulated federated fine-tuning with pruning: estimates, averages and the bandit by hand, budgets, nothing moved."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput
from pruning_bench.graph.groups import Channels
from pruning_bench.structured.evolution import parametrized
from pruning_bench.structured.fedspine import (Device, PartitionBandit, adapted_views, adapter_gradient,
                                               average_factors, deployed, device_seconds, fedspine,
                                               fixed_actions, line_gates, new_factors, prune_device, train_device)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(128, 4)).eval()


def batches(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(8, 1, 8, 8, generator=g), torch.randint(0, 4, (8,), generator=g)) for _ in range(n)]


def world():
    model = net()
    return model, Channels(model, batches(1))


def device(space, speed=1., n=2, seed=0):
    return Device(batches(n, seed), speed, 1e3, {k: torch.ones(len(g)) for k, g in space.groups.items()})


def loss(model, batch): return F.cross_entropy(model(batch[0]), batch[1])


def test_the_estimate_of_the_gradient_is_the_move_of_the_product():
    torch.manual_seed(0)
    up, down, a, b = (torch.randn(*s).double() for s in ((5, 2), (2, 4), (5, 2), (2, 4)))
    assert torch.allclose(up @ down - adapter_gradient(up, down, a, b), (up - a) @ (down - b))


def test_training_moves_adapters_only_and_scores_by_hand():
    model, space = world()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    factors, one = new_factors(space, 3), device(space, n=1)
    sent, _, _ = train_device(space, one, factors, 2, loss, 1, 1e-2, torch.Generator().manual_seed(0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(u.shape[1] == 2 == len(d) for u, d in sent.values())
    # by hand: up is zero at the start, so the estimate is the gradient, projected onto the rows of down
    found = torch.autograd.grad(loss(model, one.batches[0]), [model.get_parameter(p) for p in factors])
    grads = dict(zip(factors, found))
    score = {p: (model.get_parameter(p).detach().flatten(1) * (g.flatten(1) @ factors[p][1][:2].T @ factors[p][1][:2]))
             .abs().view_as(g) for p, g in grads.items()}
    first = score["0.weight"].sum((1, 2, 3)) + score["3.weight"].sum((0, 2, 3))
    last = score["3.weight"].sum((1, 2, 3)) + score["6.weight"].view(4, 8, 16).sum((0, 2))
    for got, want in zip(one.importance.values(), (first, last)): assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)


def test_pruning_meets_the_density_never_takes_back_and_leaves_one_unit():
    _, space = world()
    one = device(space)
    one.importance = {n: torch.arange(1., len(g) + 1) for n, g in space.groups.items()}
    prune_device(one, .5)
    assert one.density == .5
    was = {n: g.clone() for n, g in one.gates.items()}
    one.importance = {n: -s + 20 for n, s in one.importance.items()}   # the other order: what is pruned does not return
    prune_device(one, .25)
    assert sum(int(g.sum()) for g in one.gates.values()) == 4 and all((g <= was[n]).all() for n, g in one.gates.items())
    prune_device(one, .01)
    assert [int(g.sum()) for g in one.gates.values()] == [1, 1]


def test_the_average_counts_what_is_left_and_pads_with_zeros():
    _, space = world()
    torch.manual_seed(0)
    factors, pair = new_factors(space, 3), [device(space, n=1), device(space, n=3)]   # 8 and 24 examples
    sent = [{p: (torch.randn(len(u), r), torch.randn(r, d.shape[1])) for p, (u, d) in factors.items()} for r in (3, 1)]
    name = next(n for n, g in space.groups.items() if ("0.weight", 0) in g.members)
    pair[0].gates[name][2] = 0
    up, down = average_factors(space, factors, sent, pair)["0.weight"]
    (u0, d0), (u1, d1) = (s["0.weight"] for s in sent)
    assert torch.allclose(up[0], .25 * u0[0] + .75 * F.pad(u1[0], (0, 2)), atol=1e-6)
    assert torch.allclose(up[2], F.pad(u1[2], (0, 2)), atol=1e-6)   # only the second device has this unit
    assert torch.allclose(down, .25 * d0 + .75 * F.pad(d1, (0, 0, 0, 2)), atol=1e-6)
    pair[1].gates[name][2] = 0
    assert torch.equal(average_factors(space, factors, sent, pair)["0.weight"][0][2], factors["0.weight"][0][2])
    assert line_gates(space, pair[0].gates, "3.weight")[1].sum() == 5 * 9


def test_time_by_hand():
    _, space = world()
    one = device(space, speed=2.)
    numbers = (6 + 9) + (8 + 54) + (4 + 128)
    assert device_seconds(space, one, 2, 4, 10) == pytest.approx(10 / 2 * (1 + 2 / 16) + 2 * numbers / 1e3)


def test_the_bandit_tries_every_part_first_and_divides_where_it_tries():
    generator, bandit, seen = torch.Generator().manual_seed(0), PartitionBandit(split_after=2), []
    for _ in range(4):
        part, point = bandit.choose(generator)
        assert all(a <= x <= b for x, (a, b) in zip(point, part["box"]))
        seen.append(part["box"])
        bandit.learn(part, float(part["box"] == ((.5, 1.), (0., .5))))
    assert len(set(seen)) == 4
    for _ in range(30):
        part, _ = bandit.choose(generator)
        bandit.learn(part, float(part["box"][0][0] >= .5 and part["box"][1][1] <= .5))
    areas = [(b - a) * (d - c) for (a, b), (c, d) in (p["box"] for p in bandit.parts)]
    assert sum(areas) == pytest.approx(1)
    inside = [p for p in bandit.parts if p["box"][0][0] >= .5 and p["box"][1][1] <= .5]
    assert len(inside) > len(bandit.parts) / 2


def test_every_device_ends_at_the_density_and_deploys_what_it_simulated():
    model, space = world()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fleet = [device(space, 2.**-i, seed=i) for i in range(3)]
    factors, log = fedspine(space, fleet, F.cross_entropy, .5, rounds=3, local_steps=2, highest=3, seed=1)
    assert all(d.density == .5 for d in fleet) and len(log) == 9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    x = batches(1, 9)[0][0]
    for d in fleet:
        with torch.no_grad(), parametrized(model, adapted_views(space, factors, d.gates, 3)): want = model(x)
        small = deployed(space, d, factors)
        assert torch.allclose(small(x), want, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    again = [device(space, 2.**-i, seed=i) for i in range(3)]
    same, _ = fedspine(space, again, F.cross_entropy, .5, rounds=3, local_steps=2, highest=3, seed=1)
    assert all(torch.equal(a, b) for p in factors for a, b in zip(factors[p], same[p]))


@pytest.mark.parametrize("keep", [0., 1., -1., 2.])
def test_densities_that_leave_nothing_to_decide_are_refused(keep):
    _, space = world()
    with pytest.raises(BadInput, match="leaves nothing to decide"):
        fedspine(space, [device(space)], F.cross_entropy, keep, actions=fixed_actions(.5, .5))
