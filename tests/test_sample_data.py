"""The bundled sample: sound, of the size its README gives, and with no document on both sides."""

from pathlib import Path

import numpy as np
import pytest

from senano_jax.data.sample import TRAIN, VAL
from senano_jax.data.shards import check_tokens, open_shard
from senano_jax.data.vocabulary import END_OF_TEXT


def documents(path):
    tokens = np.asarray(open_shard(path))
    return [piece.tobytes() for piece in np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT)[1:])]


@pytest.mark.parametrize("path", [TRAIN, VAL])
def test_the_shard_is_sound_and_as_its_readme_says(path):
    tokens = open_shard(path)
    check_tokens(path, tokens, 0)
    assert tokens[0] == END_OF_TEXT
    row = f"| `{Path(path).name}` | {len(documents(path))} | {len(tokens):,} |"
    assert row in Path(path).with_name("README.md").read_text()


def test_no_validation_document_is_trained_on():
    train, val = documents(TRAIN), documents(VAL)
    assert len({*train, *val}) == len(train) + len(val)
    assert 0.08 < sum(map(len, val)) / sum(map(len, train + val)) < 0.12
