"""Batches to time a step on: real tokens where there are any, else made-up documents of realistic lengths."""

import contextlib
import itertools
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from senano_jax.config import Config
from senano_jax.data import sample
from senano_jax.data.shards import find_shards, open_shard
from senano_jax.data.stream import TokenStream
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError
from senano_jax.plan import PlannedStage

MEAN_DOCUMENT = 720  # tokens, FineWeb's mean; the spread below is FineWeb's too
DOCUMENT_SIGMA = 1.2  # of the logarithm of the length
SYNTHETIC_BATCHES = 4  # made once, then repeated

Batches = Generator[Int32[np.ndarray, "S T+1"], None, None]


class Feed(NamedTuple):
    """An endless supply of global batches; close `batches` to end its threads."""

    description: str
    batches: Batches


def open_feed(config: Config, stage: PlannedStage, *, shards_required: bool) -> Feed:
    """Batches of a stage: from config.data.train_files; if they are missing, from the bundled sample; if it is too
    short, made up.

    Real batches come through the training loop's own reader, from the start again when they run out. Raises UserError
    for shards that are unsound, and with `shards_required` for shards that are missing or hold less than a batch.
    """
    try:
        shards = find_shards(config.data.train_files)
    except UserError:
        if shards_required:
            raise
        shards = []
    if shards and _holds_a_batch(shards, stage):
        bundled = config.data.train_files == sample.TRAIN
        return Feed("the bundled sample" if bundled else config.data.train_files, _repeat(shards, stage))
    if shards_required:
        raise UserError(
            f"{config.data.train_files!r} holds less than one step of {stage.batch_tokens:,} tokens; "
            "give --data.train-files more shards or lower --batch-tokens"
        )
    if _holds_a_batch([Path(sample.TRAIN)], stage):
        return Feed("the bundled sample", _repeat([Path(sample.TRAIN)], stage))
    description = f"synthetic documents (log-normal lengths, {MEAN_DOCUMENT} tokens on average)"
    return Feed(description, _repeat_synthetic(stage))


def synthetic_sequences(count: int, length: int, vocabulary: int, seed: int = 0) -> Int32[np.ndarray, "count length"]:
    """Uniform random tokens in documents that begin with END_OF_TEXT and have log-normal lengths."""
    rng = np.random.default_rng(seed)
    total = count * length
    tokens = rng.integers(0, min(vocabulary, END_OF_TEXT), total, dtype=np.int32)
    mean_log = np.log(MEAN_DOCUMENT) - DOCUMENT_SIGMA**2 / 2
    lengths = np.maximum(1, rng.lognormal(mean_log, DOCUMENT_SIGMA, 1 + total)).astype(np.int64)
    starts = np.cumsum(lengths)
    tokens[starts[starts < total]] = END_OF_TEXT
    return tokens.reshape(count, length)


def _repeat_synthetic(stage: PlannedStage) -> Batches:
    shape = (stage.sequences, stage.seq_len + 1)
    seeds = range(SYNTHETIC_BATCHES)
    yield from itertools.cycle([synthetic_sequences(*shape, stage.model.vocab_size, seed) for seed in seeds])


def _holds_a_batch(shards: list[Path], stage: PlannedStage) -> bool:
    return sum(len(open_shard(path)) for path in shards) > stage.batch_tokens


def _repeat(shards: list[Path], stage: PlannedStage) -> Batches:
    while True:
        with contextlib.closing(TokenStream(shards, stage.seq_len, stage.sequences)) as stream:
            for batch in stream:
                yield batch.tokens
