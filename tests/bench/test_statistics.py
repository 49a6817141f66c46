"Intervals, paired differences, ranks and fronts: golden values, promises tested by simulation, and properties."
import math

import numpy as np
import pytest

from pruning_bench.bench.measure.statistics import (is_better, bootstrap_interval, t_interval, paired_interval,
                                                    pareto_front, rank_intervals)
from pruning_bench.core.inputs import BadInput


# intervals

def test_interval_by_hand():
    r = t_interval([1, 2, 3])
    assert (r["mean"], r["sd"], r["n"]) == (2, 1, 3)
    assert r["high"] - 2 == pytest.approx(4.302653 / 3**.5) == pytest.approx(2 - r["low"])
    assert t_interval([0, 2])["high"] - 1 == pytest.approx(12.70620)                      # sd = sqrt 2, over sqrt 2
    assert t_interval([1, 2, 3], level=.9)["high"] - 2 == pytest.approx(2.919986 / 3**.5)
    one = t_interval([5.])
    assert one["mean"] == 5 and math.isnan(one["sd"]) and math.isnan(one["low"])

@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("level", [.8, .95])
def test_the_t_interval_keeps_its_promise(n, level):
    g = np.random.default_rng(0)
    hits = np.mean([(r := t_interval(x, level))["low"] <= 7 <= r["high"] for x in g.normal(7, 3, size=(3000, n))])
    assert abs(hits - level) < 4 * math.sqrt(level * (1 - level) / 3000)

def test_interval_moves_and_scales_with_the_values():
    x = np.random.default_rng(0).normal(size=4)
    r, moved = t_interval(x), t_interval(5 - 2 * x)
    assert (moved["mean"], moved["sd"]) == pytest.approx((5 - 2 * r["mean"], 2 * r["sd"]))
    assert (moved["low"], moved["high"]) == pytest.approx((5 - 2 * r["high"], 5 - 2 * r["low"]))
    assert t_interval(x[::-1])["low"] == pytest.approx(r["low"]) and t_interval(x, .99)["low"] < r["low"]

@pytest.mark.parametrize("bad", [[], [1., math.nan], [1., math.inf], [[1., 2.]]])
def test_failed_seeds_are_not_left_out(bad):
    with pytest.raises(BadInput, match="one number per seed"): t_interval(bad)


# pairs

def test_paired_by_hand():
    r = paired_interval([5, 7, 9], [4, 5, 6])                     # differences 1, 2, 3
    assert (r["mean"], r["sd"]) == (2, 1) and r["low"] == pytest.approx(2 - 4.302653 / 3**.5)
    assert paired_interval([4, 5, 6], [5, 7, 9])["high"] == pytest.approx(-r["low"])
    with pytest.raises(BadInput, match="2 and 3 seeds"): paired_interval([1, 2], [1, 2, 3])

def test_common_luck_cancels():
    luck = np.array([100., -50., 3.])
    assert paired_interval(luck + [1, 2, 3], luck)["sd"] == pytest.approx(1)
    assert is_better(luck + [1, 1.1, .9], luck)
    assert not is_better(luck, luck + [1, 1.1, .9])

def test_false_separation_is_as_rare_as_promised_and_pairing_finds_more():
    g = np.random.default_rng(0)
    def pair(gap):
        luck = g.normal(size=5)
        return luck + gap + g.normal(size=5) / 3, luck + g.normal(size=5) / 3
    equal = [pair(0.) for _ in range(1500)]
    wrong = np.mean([is_better(a, b) or is_better(b, a) for a, b in equal])
    assert .03 < wrong < .07
    real = [pair(1.) for _ in range(300)]
    apart = lambda a, b: t_interval(a)["low"] > t_interval(b)["high"]
    assert np.mean([is_better(a, b) for a, b in real]) > .8 > .3 > np.mean([apart(a, b) for a, b in real])


# bootstrap

def test_bootstrap_of_a_large_normal_sample_is_the_t_interval():
    x = np.random.default_rng(0).normal(size=500)
    t = t_interval(x)
    for method in ("BCa", "percentile", "basic"):
        r = bootstrap_interval(x, method=method, draws=5000)
        assert (r["low"], r["high"]) == pytest.approx((t["low"], t["high"]), abs=.01)
        assert r["mean"] == pytest.approx(t["mean"])

def test_bootstrap_of_a_coin_by_hand():
    r = bootstrap_interval([0.] * 50 + [1.] * 50, method="percentile", draws=5000)       # binomial: .5 -+ 1.96 * .05
    assert (r["low"], r["high"]) == pytest.approx((.402, .598), abs=.011)

def test_bootstrap_is_seeded_and_refuses_a_handful():
    x = np.random.default_rng(1).exponential(size=30)
    assert bootstrap_interval(x) == bootstrap_interval(x) != bootstrap_interval(x, seed=1)
    assert bootstrap_interval([2.] * 12) == {"n": 12, "mean": 2., "low": 2., "high": 2.}
    with pytest.raises(BadInput, match="3 values are too few"): bootstrap_interval([1, 2, 3])

def test_bootstrap_coverage():
    g = np.random.default_rng(2)
    hits = np.mean([(r := bootstrap_interval(g.normal(size=40), draws=300))["low"] <= 0 <= r["high"]
                    for _ in range(300)])
    assert .90 <= hits <= .985


# ranks

def spread_out(methods=6, seeds=5, gap=10., seed=0):
    g = np.random.default_rng(seed)
    return {f"m{i}": list(gap * i + g.normal(size=seeds)) for i in range(methods)}

@pytest.mark.parametrize("seed", range(5))
def test_exact_order_when_ten_standard_deviations_apart(seed):
    results = spread_out(seed=seed)
    assert rank_intervals(results) == {f"m{i}": (6 - i, 6 - i) for i in range(5, -1, -1)}
    assert rank_intervals(results, higher=False) == {f"m{i}": (i + 1, i + 1) for i in range(6)}
    assert list(rank_intervals(results)) == [f"m{i}" for i in range(5, -1, -1)]

def test_equal_methods_share_all_ranks():
    # 0.1 + 0.2 is not 0.3, but nearly; and no spread to hide it
    same = {f"m{i}": [.1 + .2] * 3 for i in range(3)} | {"m3": [.3] * 3}
    assert set(rank_intervals(same).values()) == {(1, 4)}

@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_never_separate(seeds):
    assert set(rank_intervals(spread_out(seeds=seeds, gap=1e6)).values()) == {(1, 6)}

def test_ranks_by_hand():
    base = np.array([0., 1., 2.])
    results = {"a": base + [10, 10.1, 9.9], "b": base + [10, 9.9, 10.1], "c": base, "d": base + [5, -5, 4]}
    assert rank_intervals(results) == {"a": (1, 3), "b": (1, 3), "d": (1, 4), "c": (3, 4)}
    assert rank_intervals({"only": [1., 2., 3.]}) == {"only": (1, 1)} and rank_intervals({}) == {}

@pytest.mark.parametrize("seed", range(10))
def test_properties_of_ranks(seed):
    g = np.random.default_rng(seed)
    results = {f"m{i}": g.normal(i / 2, .3, size=4) for i in range(6)}
    ranks = rank_intervals(results)
    n, order = len(results), g.permutation(list(results))
    assert all(1 <= best <= worst <= n for best, worst in ranks.values())
    shuffled = g.permutation(4)
    assert ranks == rank_intervals({m: results[m]
                                    # names, seeds
                                    for m in order}) == rank_intervals({m: v[shuffled] for m, v in results.items()})
    # units and common luck
    assert ranks == rank_intervals({m: 3 * v + np.arange(4) for m, v in results.items()})
    turned = rank_intervals({m: -v for m, v in results.items()}, higher=False)
    assert turned == ranks
    place = sorted(results, key=lambda m: -results[m].mean())
    # the observed rank is always possible
    assert all(ranks[m][0] <= place.index(m) + 1 <= ranks[m][1] for m in results)

@pytest.mark.parametrize("seed", range(10))
def test_a_better_method_never_ranks_lower(seed):
    g = np.random.default_rng(seed)
    results = {f"m{i}": g.normal(i / 2, .3, size=4) for i in range(5)}
    before = rank_intervals(results)["m2"]
    for gain in (.1, .5, 1., 5.):
        after = rank_intervals({**results, "m2": results["m2"] + gain})["m2"]
        assert after[0] <= before[0] and after[1] <= before[1]
        before = after
    assert before == (1, 1)

def test_better_is_transitive_and_never_mutual():
    g, chains = np.random.default_rng(0), 0
    for _ in range(1500):
        a, b, c = g.normal(size=(3, 4)) * .4 + [[2.], [1.], [0.]]
        assert not (is_better(a, b) and is_better(b, a))
        if is_better(a, b) and is_better(b, c): chains += 1; assert is_better(a, c)
    assert chains > 100

def test_unpaired_seeds_are_refused():
    with pytest.raises(BadInput, match="3 and 4 seeds|4 and 3 seeds"):
        rank_intervals({"a": [1, 2, 3], "b": [1, 2, 3, 4]})
    with pytest.raises(BadInput, match="one number per seed"): rank_intervals({"a": [1, 2, 3], "b": [1, 2, math.nan]})


# the front

def test_pareto_by_hand():
    points = [(1, .7), (2, .9), (2, .8), (3, .85), (4, .95), (4, .95)]
    assert pareto_front(points) == [0, 1, 4, 5]
    assert pareto_front([(1, 30), (2, 20), (3, 25)], higher=False) == [0, 1]
    assert pareto_front([]) == []

@pytest.mark.parametrize("seed", range(5))
def test_every_point_off_the_front_is_beaten_by_one_on_it(seed):
    points = [tuple(p) for p in np.random.default_rng(seed).integers(0, 8, size=(30, 2))]
    front = pareto_front(points)
    beats = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    assert all(any(beats(points[i], p) for i in front) for j, p in enumerate(points) if j not in front)
    assert not any(beats(points[i], points[j]) for i in front for j in front)
