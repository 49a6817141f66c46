"Ranks of whole tables: tests of pairs by hand and against other libraries, and properties on tables of known order."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from pruning_bench.bench.measure.paired_tests import bootstrap_p, crossed_interval, crossed_p, holm, mcnemar, moderated
from pruning_bench.bench.measure.table_ranks import SeedResults, significant_pairs, simulated_rows, table_ranks
from pruning_bench.core.inputs import BadInput

counts = st.integers(0, 60)
tables = st.builds(lambda seed, skills, fixed, spread: simulated_rows(
    skills, [i for i, f in enumerate(fixed) if f and i < len(skills)], examples=200, spread=spread,
    g=np.random.default_rng(seed)),
    st.integers(0, 2**32 - 1), st.lists(st.floats(.5, 2.5), min_size=2, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6), st.floats(.01, .5))


@given(counts, counts)
def test_mcnemar_is_the_exact_binomial_test(a, b):
    expected = stats.binomtest(a, a + b, .5).pvalue if a + b else 1.
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9) and mcnemar(a, b) == mcnemar(b, a)
    assert mcnemar(a, b, mid=True) <= mcnemar(a, b)


def test_mcnemar_by_hand():
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5) and mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1.


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_keeps_the_order_and_is_never_below_the_p_value(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-15).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1, len(p) * min(p)))


def test_holm_by_hand(): assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])


def test_the_bootstrap_of_many_examples_is_the_t_test():
    d = np.random.default_rng(0).normal(.05, 1, size=(6, 2000))
    assert bootstrap_p(d) == pytest.approx(stats.ttest_1samp(d, 0, axis=1).pvalue, abs=.02)
    assert bootstrap_p(-d) == pytest.approx(bootstrap_p(d), abs=1e-12)
    assert (bootstrap_p(np.zeros((1, 50))) == 1).all() and bootstrap_p(np.ones((1, 50)))[0] < 1e-3


@pytest.mark.parametrize("bad", [np.zeros((1, 9)), np.full((1, 20), np.nan)])
def test_a_bootstrap_of_a_handful_or_of_nothing_is_refused(bad):
    with pytest.raises(BadInput, match="at least 10"): bootstrap_p(bad)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.integers(20, 100))
def test_an_interval_excludes_zero_exactly_where_its_p_value_is_small(seed, seeds, examples):
    g = np.random.default_rng(seed)
    d = g.normal(.3, .2, size=(seeds, 1)) + g.normal(size=(seeds, examples))
    for level in (.8, .95):
        low, high = crossed_interval(d, level)
        assert (low > 0 or high < 0) == (crossed_p(d) < 1 - level)


def test_variances_that_agree_are_pooled_and_one_alone_stays():
    pooled, freedom = moderated([1., 1.01, .99, 1.], np.array([2, 2, 2, 2]), 6)
    assert freedom == pytest.approx([8] * 4) and np.ptp(pooled) < .01
    alone, freedom = moderated([1.], np.array([2]), 6)
    assert alone == [1.] and freedom == [2]


@settings(max_examples=40, deadline=None)
@given(tables)
def test_ranks_do_not_depend_on_the_order_of_rows_and_turn_around_with_the_metric(rows):
    ranks, n = table_ranks(rows), len(rows)
    assert all(1 <= best <= worst <= n for best, worst in ranks.values())
    assert table_ranks(dict(reversed(rows.items()))) == ranks
    assert {m: (n + 1 - w, n + 1 - b) for m, (b, w) in table_ranks(rows, higher=False).items()} == ranks
    losses = {m: r._replace(values=-r.values, outcomes=1 - r.outcomes) for m, r in rows.items()}
    assert table_ranks(losses, higher=False) == ranks


@settings(max_examples=40, deadline=None)
@given(tables)
def test_claims_are_never_mutual_and_follow_the_means(rows):
    pairs = significant_pairs(rows)
    assert not {(b, a) for a, b in pairs} & pairs
    assert all(rows[a].outcomes.mean() > rows[b].outcomes.mean() for a, b in pairs)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 1000), st.booleans())
def test_a_clear_order_is_found_exactly(order, seed, fixed):
    rows = simulated_rows([-1.2 + .6 * k for k in order], range(5) if fixed else (), examples=3000, spread=.02,
                          g=np.random.default_rng(seed))
    assert table_ranks(rows) == {m: (5 - k, 5 - k) for m, k in enumerate(order)}


def test_ranks_of_equal_methods_are_wrong_as_rarely_as_promised():
    g = np.random.default_rng(0)
    made = [simulated_rows([1.2] * 6, range(3), examples=400, g=g) for _ in range(120)]
    false = sum(bool(significant_pairs(rows)) for rows in made)
    assert stats.binomtest(false, 120, .05, alternative="greater").pvalue > .001


def test_one_deterministic_run_beats_three_seeds_of_a_far_worse_method_without_a_second_seed():
    rows = simulated_rows([2., .5], (0,), examples=1000, g=np.random.default_rng(0))
    assert len(rows[0].seeds) == 1 and table_ranks(rows) == {0: (1, 1), 1: (2, 2)}


def test_one_seed_of_a_method_that_draws_is_never_ranked():
    rows = simulated_rows([2.5, .2], (), seeds=1, examples=1000, g=np.random.default_rng(0))
    assert table_ranks(rows) == {0: (1, 2), 1: (1, 2)}


def test_different_examples_are_refused():
    rows = {"a": SeedResults((0,), np.ones(1), np.ones((1, 50), dtype=np.uint8), True),
            "b": SeedResults((0,), np.ones(1), np.ones((1, 60), dtype=np.uint8), True)}
    with pytest.raises(BadInput, match="50 and 60 examples"): table_ranks(rows)


def test_losses_of_windows_are_ranked_the_other_way_round():
    g = np.random.default_rng(0)
    windows = g.normal(3, 1, size=80)
    rows = {m: SeedResults((0,), np.array([(windows + m).mean()]), (windows + m + .1 * g.normal(size=80))[None], True)
            for m in (0, 1, 2)}
    assert table_ranks(rows, higher=False) == {0: (1, 1), 1: (2, 2), 2: (3, 3)}
