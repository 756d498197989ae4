"""The two bounds of each token's interval, against the rule about pairs of tokens that they stand for."""

import jax
import numpy as np
import pytest
from oracles import END_OF_TEXT, random_tokens, visible_pairs

from senano_jax.attention import intervals
from senano_jax.attention.intervals import document_start, window_intervals

LENGTH = 640  # five blocks
bounds = jax.jit(lambda tokens, window: window_intervals(document_start(tokens), window))


def test_the_units_are_those_of_the_specification():
    """Blocks have 128 tokens and documents start at GPT-2's <|endoftext|>: the other tests assume both."""
    assert (intervals.BLOCK, intervals.END_OF_TEXT) == (128, END_OF_TEXT)


@pytest.mark.parametrize("documents", [0.0, 0.003, 0.05, 1.0])
@pytest.mark.parametrize("window_blocks", [0, 1, 2, 3, 5, 100])
def test_intervals_hold_exactly_the_visible_pairs(documents, window_blocks):
    """key_start[q] <= k <= q, and k <= q < query_end[k], are both the brute-force mask; windows of any size."""
    rng = np.random.default_rng(window_blocks)
    tokens = np.stack([random_tokens(rng, LENGTH, documents) for _ in range(3)])
    key_start, query_end = (np.asarray(bound) for bound in bounds(tokens, window_blocks))
    position = np.arange(LENGTH)
    for row in range(len(tokens)):
        expected = visible_pairs(tokens[row], window_blocks)
        from_queries = (key_start[row][:, None] <= position) & (position <= position[:, None])
        from_keys = (position <= position[:, None]) & (position[:, None] < query_end[row])
        np.testing.assert_array_equal(from_queries, expected)
        np.testing.assert_array_equal(from_keys, expected)
    assert key_start.dtype == query_end.dtype == np.int32


@pytest.mark.parametrize("window_blocks", [1, 2, 4])
def test_bounds_never_decrease(window_blocks):
    """What lets a tile of queries be bounded by its first and its last one."""
    tokens = random_tokens(np.random.default_rng(0), LENGTH, 0.02)[None]
    for bound in bounds(tokens, window_blocks):
        assert (np.diff(np.asarray(bound)) >= 0).all()


def test_a_document_starts_at_its_end_of_text():
    """The token itself belongs to the new document, also as first, last and repeated token."""
    tokens = np.zeros((2, 128), np.int32)
    tokens[0, [5, 6, 127]] = END_OF_TEXT
    tokens[1, 0] = END_OF_TEXT
    starts = np.asarray(document_start(tokens))
    np.testing.assert_array_equal(starts[0], [0] * 5 + [5] + [6] * 121 + [127])
    np.testing.assert_array_equal(starts[1], np.zeros(128))


@pytest.mark.parametrize("window_blocks", range(6))
def test_the_short_window_is_half_rounded_down_and_at_least_one_block(window_blocks):
    """window_intervals(W // 2), as the model calls it, is a window of max(1, W // 2) blocks."""
    tokens = random_tokens(np.random.default_rng(1), LENGTH, 0.002)
    key_start = np.asarray(bounds(tokens[None], window_blocks // 2).key_start)[0]
    expected = visible_pairs(tokens, max(1, window_blocks // 2)).argmax(axis=1)  # first visible key
    np.testing.assert_array_equal(key_start, expected)
