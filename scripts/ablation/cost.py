"""What a configuration costs: its steps for a number of tokens, and the arithmetic of a token."""

import dataclasses
import functools
from collections import Counter

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.plan import window_blocks
from senano_jax.profiling.flops import step_flops
from senano_jax.profiling.tokens import synthetic_sequences

SAMPLE_TOKENS = 131_072  # made-up documents over which the pairs of attention are counted


def total_tokens(config: Config) -> int:
    """Tokens that a run is trained on; more for more steps."""
    return config.steps * config.batch_tokens


def at_budget(config: Config, tokens: int) -> Config:
    """`config` with the number of steps that trains on exactly `tokens`, its schedules stretched over them.

    Raises UserError with the nearest budgets if there is no such number.
    """

    def trained(steps: int) -> int:
        return total_tokens(dataclasses.replace(config, steps=steps))

    fewer, more = 0, 1  # trained(fewer) < tokens <= trained(more)
    while trained(more) < tokens:
        fewer, more = more, 2 * more
    while more - fewer > 1:
        middle = (fewer + more) // 2
        fewer, more = (middle, more) if trained(middle) < tokens else (fewer, middle)
    if trained(more) != tokens:
        nearest = " and ".join(f"{trained(steps):,}" for steps in (fewer, more) if steps)
        raise UserError(
            f"a budget of {tokens:,} tokens is no whole number of steps of {config.batch_tokens:,} tokens; "
            f"near it {nearest}"
        )
    return dataclasses.replace(config, steps=more)


@functools.cache
def flops_per_token(config: Config) -> float:
    """Model FLOPs of training on one token, forward and backward: the mean over the windows of the schedule, on
    documents of FineWeb's lengths."""
    sequences = max(1, SAMPLE_TOKENS // config.seq_len)
    tokens_ST = synthetic_sequences(sequences, config.seq_len, config.model.vocab_size)
    windows = Counter(
        window_blocks(step, config.steps, config.final_window_tokens, config.initial_window_tokens)
        for step in range(config.steps)
    )
    total = sum(count * step_flops(config.model, tokens_ST, window).total for window, count in windows.items())
    return total / (config.steps * tokens_ST.size)


def training_flops(config: Config) -> float:
    """Model FLOPs of the whole run, by which runs are ordered."""
    return flops_per_token(dataclasses.replace(config, seed=0)) * total_tokens(config)
