"""A small vocabulary for models that NumPy computes: it takes all columns twice for each tensor."""

import oracles

from senano_jax.attention import intervals

TOKENS, COLUMNS = 120, 128


def few_tokens(monkeypatch):
    """To be a fixture: a vocabulary of TOKENS, whose last begins a document."""
    for module in (intervals, oracles):
        monkeypatch.setattr(module, "END_OF_TEXT", TOKENS - 1)
