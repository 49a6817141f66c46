"CHITA: the regression, the search that never rises, and supports that are never worse than those it starts from."
import itertools

import pytest
import torch
import torch.nn.functional as F

import three_layers
from three_layers import TOTAL, mlp
from pruning_bench import build, prune
from pruning_bench.core.inputs import seeded
from pruning_bench.core.score import unit_scores
from pruning_bench.core.solve import SOLVERS
from pruning_bench.core.space import Weights
from pruning_bench.core.stats import collect
from pruning_bench.weight.l0_regression import hard_threshold, regression_loss
from pruning_bench.weight.second_order import Fisher

def batches(seed=0, n=2): return three_layers.batches(seed, n)


def problem(seed, m=5, d=8, damp=.1):
    with seeded(seed):
        return Fisher(torch.randn(m, d).double(), damp), torch.randn(d).double()


def top(k): return lambda values: values.abs() >= values.abs().sort().values[-k]


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_the_quadratic_form_of_the_damped_fisher(seed):
    fisher, dense = problem(seed)
    a = fisher.g[0]
    matrix = .1 * torch.eye(8).double() + a.T @ a / 5
    w = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
    assert regression_loss(fisher, w, dense) == pytest.approx(((w - dense) @ matrix @ (w - dense) / 2).item())
    assert regression_loss(fisher, dense, dense) == 0


def by_hand(fisher, dense, mask):
    "The loss at the exact minimum on a support, from the normal equations."
    matrix = fisher.damp * torch.eye(len(dense)).double() + fisher.g[0].T @ fisher.g[0] / len(fisher.g[0])
    w = torch.zeros_like(dense)
    w[mask] = torch.linalg.solve(matrix[mask][:, mask], (matrix @ dense)[mask])
    return ((w - dense) @ matrix @ (w - dense) / 2).item(), w, matrix


@pytest.mark.parametrize("damp", [.01, .1, 1.])
@pytest.mark.parametrize("seed", range(12))
def test_the_search_never_rises_and_stays_sparse(seed, damp):
    fisher, dense = problem(seed, damp=damp)
    found = [hard_threshold(fisher, dense, top(3)(dense), top(3), t) for t in range(8)]
    losses = [regression_loss(fisher, w, dense) for w, _ in found]
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:]))
    for (w, mask), loss in zip(found, losses):
        assert mask.sum() == 3 and (w[~mask] == 0).all() and loss == pytest.approx(by_hand(fisher, dense, mask)[0])
    supports = [torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(c), True)
                for c in itertools.combinations(range(8), 3)]
    assert losses[-1] >= min(by_hand(fisher, dense, s)[0] for s in supports) - 1e-12


def test_searches_find_better_supports():
    better = 0
    for seed in range(20):
        fisher, dense = problem(seed)
        w, mask = hard_threshold(fisher, dense, top(3)(dense), top(3), 10)
        better += not torch.equal(mask, top(3)(dense))
    assert better > 5


@pytest.mark.parametrize("damp", [.1, 1., 3.])
@pytest.mark.parametrize("seed", range(12))
def test_one_move_by_hand(seed, damp):
    fisher, dense = problem(seed, damp=damp)
    start, w, matrix = by_hand(fisher, dense, top(3)(dense))
    slope = matrix @ (w - dense)
    tried = [by_hand(fisher, dense, top(3)(w - slope / (damp * 2**i)))[0] for i in range(5)]
    moved, _ = hard_threshold(fisher, dense, top(3)(dense), top(3), 1)
    assert regression_loss(fisher, moved, dense) == pytest.approx(min(start, *tried))


def stage(solver, keep, pattern=None, model=None):
    "One stage on a small network: {layer: (w, mask)} and the loss of the regression."
    model = model or mlp()
    space, method = Weights(model), build("chita", rounds=1, damp=1e-3)
    stats = collect(space, batches(), method.needs, F.cross_entropy, method.readings)
    scores = unit_scores(space, method.score, stats)
    shares = method.allocate(scores, keep, space)
    groups = {n: (space.w(n), stats[n], scores[n], shares[n], pattern or method.pattern) for n in scores}
    whole, dense = next(iter(stats.values())).fisher.whole, torch.cat([space.w(n).flatten() for n in scores])
    solved = solver(groups)
    return solved, regression_loss(whole, torch.cat([w.flatten() for w, _ in solved.values()]), dense)


@pytest.mark.parametrize("keep", [.5, .25, .1])
def test_never_worse_than_the_repair_of_the_same_scores(keep):
    losses = {name: stage(SOLVERS[name], keep)[1] for name in ("obs_update", "fisher_refit", "l0_regression")}
    assert losses["l0_regression"] <= losses["fisher_refit"] < losses["obs_update"]
    assert losses["l0_regression"] < .999 * losses["fisher_refit"]   # the search finds another support


def test_weights_and_masks_are_decided_together():
    solved, _ = stage(SOLVERS["l0_regression"], .1)
    repaired, _ = stage(SOLVERS["fisher_refit"], .1)
    assert sum(int(m.sum()) for _, m in solved.values()) == sum(int(m.sum()) for _, m in repaired.values())
    assert any(not torch.equal(m, repaired[n][1]) for n, (_, m) in solved.items())
    assert all((w[~m] == 0).all() for w, m in solved.values())


def test_without_steps_it_is_the_exact_repair():
    a, b = mlp(), mlp()
    p = prune(a, "chita", .75, batches(), F.cross_entropy, rounds=3, solve="fisher_refit")
    from pruning_bench.weight.l0_regression import l0_regression
    q = prune(b, "chita", .75, batches(), F.cross_entropy, rounds=3, solve=l0_regression.configured(iterations=0))
    assert p == q and all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.filterwarnings("ignore:pattern")
def test_a_pattern_is_kept_and_what_was_pruned_stays_pruned():
    plan = prune(mlp(), "chita", "2:4", batches(), F.cross_entropy, rounds=1)
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in plan.masks.values())
    model = mlp()
    first = prune(model, "random", .5)
    then = prune(model, "chita", .75, batches(), F.cross_entropy, rounds=2)
    assert all((then.masks[n] <= m).all() for n, m in first.masks.items())
    assert sum(int(m.sum()) for m in then.masks.values()) == TOTAL // 4
