"""How often a model finds the true one of several texts the most probable."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float64, Int

from senano_jax.attention import BLOCK
from senano_jax.data.hellaswag import Row
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError
from senano_jax.kernels.choice import on_gpu
from senano_jax.model.build import Model, Params
from senano_jax.training.mesh import DATA_AXIS, place_sequences

# On a device: their logits exist at a time, 1.6 GB of float32 over 50,304 columns on a GPU.
TOKENS_AT_A_TIME, TOKENS_AT_A_TIME_CPU = 8192, 512


class Share(NamedTuple):
    """Of questions that are answered rightly."""

    value: float
    questions: int

    @property
    def standard_error(self) -> float:
        """Of the value, with these questions drawn from many."""
        return math.sqrt(self.value * (1 - self.value) / self.questions)


def log_probabilities(
    model: Model,
    params: Params,
    mesh: Mesh,
    rows: Sequence[Row],
    window_blocks: int,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> Float64[np.ndarray, "N"]:
    """The natural logarithm of each ending's probability after its context, summed over the ending's tokens.

    Probabilities are over the vocabulary, without the columns that pad the head. Rows are filled up to whole blocks of
    128 tokens; those of one length go together, so that a few programs are compiled. `say` is told how many rows are
    done, of all. Raises UserError if the weights give no finite ones.
    """
    score = _make_score(model, mesh)
    lengths = np.array([-(-len(row.tokens) // BLOCK) * BLOCK for row in rows])
    scores, done = np.zeros(len(rows)), 0
    for length in np.unique(lengths):
        wanted = np.flatnonzero(lengths == length)
        at_a_time = max(1, (TOKENS_AT_A_TIME if on_gpu() else TOKENS_AT_A_TIME_CPU) // length) * mesh.size
        for start in range(0, len(wanted), at_a_time):
            group = wanted[start : start + at_a_time]
            tokens = np.full((at_a_time, length), END_OF_TEXT, np.int32)
            ending = np.zeros((at_a_time, 2), np.int32)  # none of the rows that fill up the group
            for place, number in enumerate(group):
                row = rows[number]
                tokens[place, : len(row.tokens)] = row.tokens
                ending[place] = row.first, len(row.tokens)
            placed = place_sequences(mesh, tokens), place_sequences(mesh, ending)
            scores[group] = np.asarray(score(params, *placed, np.int32(window_blocks)))[: len(group)]
            done += len(group)
            say(done, len(rows))
    if bad := np.count_nonzero(~np.isfinite(scores)):
        raise UserError(f"the log-probabilities of {bad} of {len(rows)} texts are not finite: these weights are no use")
    return scores


def shares(scores: Float64[np.ndarray, "N"], tokens: Sequence[int], labels: Sequence[int]) -> tuple[Share, Share]:
    """The shares of questions whose true ending is the most probable one, by the mean over an ending's tokens and by
    their sum.

    `scores` are those of `log_probabilities`, for each question of all of its endings; `tokens` how many each has.
    """
    sums_QE = np.asarray(scores).reshape(len(labels), -1)
    means_QE = sums_QE / np.asarray(tokens).reshape(sums_QE.shape)
    right = [float((values.argmax(1) == np.asarray(labels)).mean()) for values in (means_QE, sums_QE)]
    return Share(right[0], len(labels)), Share(right[1], len(labels))


def _make_score(model: Model, mesh: Mesh) -> Callable:
    """A jitted (params, tokens [R, T], where the endings begin and end [R, 2], window_blocks) -> [R]."""
    vocabulary = model.config.vocab_size

    def score(
        params: Params, tokens_RT: Int[jax.Array, "R T"], ending_R2: Int[jax.Array, "R 2"], window_blocks
    ) -> Float[jax.Array, "R"]:
        logits_RTV = model.apply({"params": params}, tokens_RT, window_blocks, method=model.logits)
        logits_RTV = logits_RTV[:, :-1, :vocabulary].astype(jnp.float32)
        of_next_RT = jnp.take_along_axis(logits_RTV, tokens_RT[:, 1:, None], axis=2)[..., 0]
        position_T = jnp.arange(1, tokens_RT.shape[1])
        asked_RT = (ending_R2[:, :1] <= position_T) & (position_T < ending_R2[:, 1:])
        return jnp.where(asked_RT, of_next_RT - jax.nn.logsumexp(logits_RTV, axis=2), 0).sum(1)

    sharded = jax.shard_map(
        score, mesh=mesh, in_specs=(P(), P(DATA_AXIS), P(DATA_AXIS), P()), out_specs=P(DATA_AXIS), check_vma=False
    )
    return jax.jit(sharded)
