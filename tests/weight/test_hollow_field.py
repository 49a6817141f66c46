"Hollow fields: bilinear features, a gate that is exactly zero, a multiplier that holds a budget, and what is not read."
import pytest
import torch

from pruning_bench import BadInput
from pruning_bench.weight.hollow_field import DualAscent, HashGrid, HollowField, cut_map, fit_field, used_entries


def grid_points(n=12):
    axis = (torch.arange(n) + .5) / n
    return torch.cartesian_prod(axis, axis)


def field(**settings):
    torch.manual_seed(0)
    return HollowField(HashGrid(levels=2, entries=32, coarsest=3, finest=8), outputs=1, hidden=16, cells=6, **settings)


def corner_value():
    "Something in one quarter of the square, nothing elsewhere."
    x = grid_points()
    return x, ((x < .5).all(1).float() * (20 * x[:, 0]).sin())[:, None]


def test_features_are_bilinear_in_a_grid_without_collisions():
    grid = HashGrid(levels=1, features=1, entries=16, coarsest=3, finest=3)
    corners = torch.cartesian_prod(torch.arange(4.), torch.arange(4.)) / 3
    with torch.no_grad():
        grid.table[0] = (2 * corners[:, :1] - 5 * corners[:, 1:] + 1)
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(grid(x)[:, 0], 2 * x[:, 0] - 5 * x[:, 1] + 1, atol=1e-5)
    assert torch.allclose(grid(corners), grid.table[0], atol=1e-5)   # also on the border of the square


def test_a_position_without_saliency_gives_zero_and_no_gradient_to_the_tables():
    net, x = field(), grid_points()
    cut_map(net, x, .25)
    outside = net.saliency(x) == 0
    assert (net(x)[outside] == 0).all() and (net(x)[~outside] != 0).any()
    net(x[outside]).sum().backward()
    assert net.grid.table.grad is None or not net.grid.table.grad.any()


def test_a_cut_keeps_the_most_salient_share():
    net, x = field(), grid_points()
    with torch.no_grad():
        net.map.normal_(generator=torch.Generator().manual_seed(1))
    p = net.saliency(x).detach()
    cut_map(net, x, .25)
    kept = net.saliency(x) > 0
    assert int(kept.sum()) == 36 and p[kept].min() >= p[~kept].max()


def test_the_multiplier_rises_while_the_budget_is_exceeded_and_falls_to_zero():
    pruner, seen = DualAscent(.5, rho=2., step=.1), []
    for value in [.9, .8, .7, .5, .2, .1, .1, .1]:
        pruner.ascend(value)
        seen.append(pruner.multiplier)
    assert seen[0] < seen[1] < seen[2] == pytest.approx(.09) and seen[3] == seen[2] and seen[4] < seen[3]
    assert seen[-1] == 0
    value = torch.tensor(.8, requires_grad=True)
    pruner.multiplier = .3
    pruner.penalty(value).backward()
    assert value.grad.item() == pytest.approx(2 * (.8 - .5) + .3)
    below = torch.tensor(.4, requires_grad=True)
    pruner.penalty(below).backward()
    assert below.grad.item() == pytest.approx(.3)   # no quadratic penalty below the budget


def test_the_map_meets_its_budget_and_keeps_what_is_there():
    x, y = corner_value()
    net = field()
    seen = fit_field(net, x, y, 250, 1e-2, DualAscent(.35, rho=.1, step=1e-3), batch=64)
    assert seen[0][0] > .8 and net.saliency(x).mean() < .37
    there = (x < .5).all(1)
    assert net.saliency(x)[there].mean() > 2 * net.saliency(x)[~there].mean()


def test_entries_that_are_not_used_are_not_read():
    net, x = field(), grid_points()
    with torch.no_grad():
        net.map[:, 3:] = -2.
    cut_map(net, x, .3)
    used, before = used_entries(net, x), net(x)
    assert not used.all()
    with torch.no_grad():
        net.grid.table[~used] = 1e6
    assert torch.equal(net(x), before)
    entry = used.nonzero()[0]
    with torch.no_grad():
        net.grid.table[entry[0], entry[1]] += 1.
    assert not torch.equal(net(x), before)


def test_refusals():
    for call in (lambda: DualAscent(.5, rho=-1), lambda: DualAscent(.5, step=0),
                 lambda: cut_map(field(), grid_points(), 1.),
                 lambda: cut_map(HollowField(HashGrid(), cells=0), grid_points(), .5)):
        with pytest.raises(BadInput) as refused:
            call()
        assert "\n" not in str(refused.value)
