"""Intervals and tests of a handful of seeds, by hand and against SciPy's."""

import math

import pytest
from scipy import stats

from senano_jax.runlog.statistics import Sample, p_mean_below, welch_test

CANDIDATE = [3.2790, 3.2772, 3.2801, 3.2765, 3.2779]
BASELINE = [3.2810, 3.2821, 3.2793]


def test_against_the_tests_of_scipy():
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
