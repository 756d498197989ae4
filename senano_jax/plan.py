"""What a run does at each of its steps, worked out on the host. Steps count from 0: step k is the one that k steps
precede, and a stage goes from its first step to the first of the next one."""

import bisect
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from senano_jax.config import Config, Gpt2Config, ModelConfig, Stage, changed
from senano_jax.windows import window_blocks


class StepInputs(NamedTuple):
    """What changes from step to step while the compiled program stays; None is no part of the program."""

    window_blocks: np.int32  # long attention window, in blocks of 128 tokens
    loss_weights: Float32[np.ndarray, "K"] | None = None  # of predicting the token 1, 2, .. K ahead
    rate: np.float32 | None = None  # factor of all learning rates, beside that of their schedule


@dataclass(frozen=True)
class PlannedStage:
    """Steps that run one compiled program: a `Stage` with nothing left open."""

    index: int
    first: int
    """Its first step."""
    end: int
    """The first step after it."""
    tokens_before: int
    """Tokens trained on before it."""
    batch_tokens: int
    seq_len: int
    rate: float
    ahead: tuple[tuple[float, float], ...]
    visits: int | None
    model: ModelConfig | Gpt2Config
    """As the stage applies it."""

    @property
    def sequences(self) -> int:
        """Of one step, over all devices and micro-batches."""
        return self.batch_tokens // self.seq_len


class Plan:
    """The whole run. `config` must have passed check_config, but for what that asks a plan."""

    def __init__(self, config: Config):
        self.config = config
        self.steps = config.steps
        self.stages = _planned(config)
        self._firsts = [stage.first for stage in self.stages]

    def stage(self, step: int) -> PlannedStage:
        """The one that a step belongs to; the last one for what lies behind the run."""
        return self.stages[bisect.bisect_right(self._firsts, step) - 1]

    def tokens_after(self, steps: int) -> int:
        """Tokens trained on in the first `steps` steps."""
        stage = self.stage(steps)
        return stage.tokens_before + (steps - stage.first) * stage.batch_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens trained on in the whole run."""
        return self.tokens_after(self.steps)

    @property
    def stream_tokens(self) -> int:
        """Tokens that the run passes in the stream, those it skips between two steps included."""
        return self.total_tokens + (self.steps - 1) * self.config.data.discard_micro_batch

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest training sequence."""
        return max(stage.seq_len for stage in self.stages)

    def window(self, step: int) -> int:
        """Long attention window of training, in blocks of 128 tokens."""
        config = self.config
        return window_blocks(step, self.steps, config.final_window_tokens, config.initial_window_tokens)

    def evaluation_window(self, steps: int) -> int:
        """Long attention window of an evaluation after `steps` steps, in blocks of 128 tokens."""
        config = self.config
        if config.evaluation_window_tokens is None:
            return self.window(steps)
        return window_blocks(steps, self.steps, config.evaluation_window_tokens, config.initial_window_tokens)

    def inputs(self, step: int) -> StepInputs:
        """All that changes from step to step, for the step that `step` steps precede."""
        return StepInputs(np.int32(self.window(step)), self.loss_weights(step), self.rate(step))

    def loss_weights(self, step: int) -> Float32[np.ndarray, "K"] | None:
        """Weights of predicting the token 1, 2, .. K ahead; None in a run where the next token counts alone.

        K is that of the stage that looks farthest: 0 costs next to nothing, another program half a minute to compile.
        """
        longest = max(len(stage.ahead) for stage in self.stages)
        if not longest:
            return None
        stage = self.stage(step)
        # Each moves linearly from the first of its pair, at the stage's first step, to the second, at the next one's.
        start, end = np.array(stage.ahead or ((1.0, 1.0),)).T
        done = (step - stage.first) / (stage.end - stage.first)
        weights = (start + (end - start) * done).astype(np.float32)
        return np.pad(weights, (0, longest - len(weights)))

    def rate(self, step: int) -> np.float32 | None:
        """The stage's factor of all learning rates; None if no stage of the run has one."""
        if all(stage.rate == 1 for stage in self.stages):
            return None
        return np.float32(self.stage(step).rate)


def _planned(config: Config) -> tuple[PlannedStage, ...]:
    stages = config.stages or (Stage(part=1),)
    parts = [0.0, *itertools.accumulate(stage.part for stage in stages)]
    borders = [round(config.steps * part / parts[-1]) for part in parts]
    planned, tokens = [], 0
    for index, stage in enumerate(stages):
        first, end = borders[index : index + 2]
        visits = stage.visits
        if isinstance(config.model, ModelConfig) and visits == config.model.layers.visits:
            visits = None  # the same program as without
        model = config.model if visits is None else changed(config.model, {"layers.visits": visits})
        batch_tokens = stage.batch_tokens or config.batch_tokens
        seq_len = stage.seq_len or config.seq_len
        planned.append(
            PlannedStage(
                index=index,
                first=first,
                end=end,
                tokens_before=tokens,
                batch_tokens=batch_tokens,
                seq_len=seq_len,
                rate=stage.rate,
                ahead=stage.ahead,
                visits=visits,
                model=model,
            )
        )
        tokens += (end - first) * batch_tokens
    return tuple(planned)
