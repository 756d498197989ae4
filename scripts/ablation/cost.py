"""What a configuration costs: its steps for a number of tokens, and the arithmetic of a token."""

import dataclasses
import functools
from collections import Counter

from senano_jax.config import Config
from senano_jax.errors import UserError
from senano_jax.plan import Plan
from senano_jax.profiling.flops import step_flops
from senano_jax.profiling.tokens import synthetic_sequences

SAMPLE_TOKENS = 131_072  # made-up documents over which the pairs of attention are counted
_NEAR = 16  # steps around those that are looked for


def total_tokens(config: Config) -> int:
    """Tokens that a run is trained on; more for more steps."""
    return Plan(config).total_tokens


def at_budget(config: Config, tokens: int) -> Config:
    """`config` with the number of steps that trains on exactly `tokens`, its schedules stretched over them.

    Raises UserError with the nearest budgets if there is no such number.
    """

    def trained(steps: int) -> int:
        return total_tokens(dataclasses.replace(config, steps=steps))

    fewer, more = 0, max(1, len(config.stages))
    while trained(more) < tokens:
        fewer, more = more, 2 * more
    while more - fewer > 1:
        middle = (fewer + more) // 2
        fewer, more = (middle, more) if trained(middle) < tokens else (fewer, middle)
    # A stage of small batches behind one of large ones, and borders that are rounded: more steps can be fewer tokens.
    near = {trained(steps): steps for steps in range(max(1, more - _NEAR), more + _NEAR)}
    if tokens not in near:
        nearest = [max((n for n in near if n < tokens), default=0), min((n for n in near if n > tokens), default=0)]
        raise UserError(
            f"a budget of {tokens:,} tokens is no whole number of steps; "
            f"near it {' and '.join(f'{count:,}' for count in nearest if count)}"
        )
    return dataclasses.replace(config, steps=near[tokens])


@functools.cache
def flops_per_token(config: Config) -> float:
    """Model FLOPs of training on one token, forward and backward: the mean over the windows of the schedule, on
    documents of FineWeb's lengths."""
    plan, total = Plan(config), 0.0
    for stage in plan.stages:
        sequences = max(1, SAMPLE_TOKENS // stage.seq_len)
        tokens_ST = synthetic_sequences(sequences, stage.seq_len, config.model.vocab_size)
        windows = Counter(plan.window(step) for step in range(stage.first, stage.end))
        of_sample = sum(count * step_flops(stage.model, tokens_ST, window).total for window, count in windows.items())
        total += of_sample * stage.batch_tokens / tokens_ST.size
    return total / plan.total_tokens


def training_flops(config: Config) -> float:
    """Model FLOPs of the whole run, by which runs are ordered."""
    return flops_per_token(dataclasses.replace(config, seed=0)) * total_tokens(config)
