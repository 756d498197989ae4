"""Student's t against published tables, closed forms and, where it is installed, SciPy."""

import math

import pytest

from senano_jax.runlog.statistics import Sample, p_mean_below, student_t_cdf, student_t_quantile, welch_test

CANDIDATE = [3.2790, 3.2772, 3.2801, 3.2765, 3.2779]
BASELINE = [3.2810, 3.2821, 3.2793]


@pytest.mark.parametrize(
    ("df", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_two_sided_95_percent_points_of_the_printed_table(df, table):
    assert student_t_quantile(0.975, df) == pytest.approx(table, abs=5e-4)
    assert student_t_quantile(0.025, df) == pytest.approx(-table, abs=5e-4)


@pytest.mark.parametrize("t", [-1e8, -40.0, -3.0, -0.3, 0.0, 1e-9, 0.7, 2.5, 1e3])
def test_closed_forms_of_one_and_two_degrees_of_freedom(t):
    cauchy = math.atan2(1, -t) / math.pi  # 1/2 + atan(t)/pi without the cancellation in the left tail
    assert student_t_cdf(t, 1) == pytest.approx(cauchy, rel=1e-12)
    root = math.sqrt(2 + t * t)
    two = 0.5 + t / (2 * root) if t > -1 else 1 / (root * (root - t))
    assert student_t_cdf(t, 2) == pytest.approx(two, rel=1e-12)


def test_symmetric_increasing_and_inverted_by_the_quantile():
    grid = [k / 7 for k in range(-70, 71)]
    for df in (1, 2.7, 14, 400):
        values = [student_t_cdf(t, df) for t in grid]
        assert values == sorted(values)
        assert student_t_cdf(0, df) == 0.5
        for t in grid:
            assert student_t_cdf(t, df) + student_t_cdf(-t, df) == pytest.approx(1, abs=1e-14)
        for p in (0.001, 0.2, 0.5, 0.975, 0.9999):
            assert student_t_cdf(student_t_quantile(p, df), df) == pytest.approx(p, rel=1e-12)


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (0.7, 1, 2, 3.3, 10, 57.5, 1e4):
        for t in (-300.0, -25.0, -4.0, -1.0, -0.01, 0.2, 3.0, 12.0):
            assert student_t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9)
        assert student_t_quantile(0.995, df) == pytest.approx(stats.t.ppf(0.995, df), rel=1e-9)
    test, theirs = (
        welch_test(Sample.of(BASELINE), Sample.of(CANDIDATE)),
        stats.ttest_ind(CANDIDATE, BASELINE, equal_var=False),
    )
    interval = theirs.confidence_interval(0.95)
    assert (test.p, test.df) == pytest.approx((theirs.pvalue, theirs.df), rel=1e-9)
    assert test.difference - test.half_width == pytest.approx(interval.low, rel=1e-9)
    assert test.difference + test.half_width == pytest.approx(interval.high, rel=1e-9)
    one_sided = stats.ttest_1samp(CANDIDATE, 3.28, alternative="less").pvalue
    assert p_mean_below(Sample.of(CANDIDATE), 3.28) == pytest.approx(one_sided, rel=1e-9)


def test_the_tests_by_hand():
    """Three values 1, 2, 3: mean 2, sd 1, so t = (2 - 4) * sqrt(3) against 4, with 2 degrees of freedom."""
    sample = Sample.of([1.0, 2.0, 3.0])
    assert (sample.mean, sample.sd, sample.n) == (2, 1, 3)
    t = 2 * math.sqrt(3)
    assert p_mean_below(sample, 4) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert p_mean_below(sample, 0) == pytest.approx(1 - p_mean_below(sample, 4))
    assert sample.half_width() == pytest.approx(4.3026527 / math.sqrt(3))
    same = welch_test(sample, sample)
    assert (same.difference, same.p, same.df) == (0, pytest.approx(1), pytest.approx(4))


def test_undefined_tests_say_so():
    single, flat, spread = Sample.of([3.27]), Sample.of([3.27, 3.27]), Sample.of([3.27, 3.28])
    assert single.sd is None
    assert single.half_width() is None
    assert p_mean_below(single, 3.28) is None
    assert p_mean_below(flat, 3.28) is None
    assert welch_test(single, spread) is None
    assert welch_test(flat, flat) is None
    assert welch_test(flat, spread) is not None
