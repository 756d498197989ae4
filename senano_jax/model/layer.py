"""One layer: attention with a value residual and a squared-ReLU MLP, to be applied one by one.

How they meet the residual stream is a trunk's matter, whose layers add it to this class.
"""

import jax.numpy as jnp
from flax import linen as nn

from senano_jax.attention import Intervals
from senano_jax.model.config import GATE_INPUTS, ModelConfig
from senano_jax.model.context import Context
from senano_jax.model.elementwise import weighted_sum
from senano_jax.model.heads_attention import attend_product
from senano_jax.model.initializers import uniform_fan_in
from senano_jax.model.pieces import pieces_of
from senano_jax.model.pieces.difference import Difference
from senano_jax.model.pieces.paired_heads import columns_by_slot, in_slots
from senano_jax.model.schedule import Weighted
from senano_jax.model.squared_relu import squared_relu_mlp

ATTENTION_SCALE = 0.12  # in place of head_dim**-0.5; from modded-nanogpt


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys and a learned share of values from elsewhere.

    Parameters: qkv [3, D, D], out [D, D], and the shares, value_lambdas [2] with value embeddings and value_residual
    without, [] or, in a trunk whose weights differ between applications, [visits].
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x_BTD, other_v_BTHK, rotary, intervals: Intervals, visit=0, weight=None, first_BTG=None):
        """Returns the output, times `weight` if there is one, and the values it weighs. Its pieces read `first_BTG`,
        the first channels of x, if it is given, else x.

        `other_v_BTHK` is those of the first layer or the tokens' value embeddings. None mixes nothing: what the first
        layer returns is later layers' `other_v_BTHK`. `rotary` and `intervals` are those of slots where heads are
        paired. `visit` numbers the applications of this layer.
        """
        c = self.config
        B, T, D = x_BTD.shape
        # One product, so that its gradient is one too.
        qkv_3DD = self.param("qkv", uniform_fan_in, (3, D, D)).astype(x_BTD.dtype)
        out_DD = self.param("out", nn.initializers.zeros, (D, D))
        heads = 2 * c.num_heads if self.layer in c.difference else c.num_heads
        if self.layer in c.paired_heads:
            slots, qkv_DE = 2, columns_by_slot(qkv_3DD)
            other_v_BTHK = None if other_v_BTHK is None else in_slots(other_v_BTHK)
        elif self.layer in c.difference:
            difference = Difference(c.layers.visits_of(self.layer), c.num_heads, D, name="difference")
            slots, qkv_DE = 1, difference.columns(qkv_3DD)
            other_v_BTHK = None if other_v_BTHK is None else jnp.concatenate([other_v_BTHK] * 2, axis=2)
        else:
            slots, qkv_DE = 1, jnp.swapaxes(qkv_3DD, 0, 1).reshape(D, 3 * D)
        if c.value_embeddings:
            lambdas = self.param("value_lambdas", nn.initializers.constant(0.5), (2,))
            first_v_BTHK, value_residual = None, jnp.float32(0)

            def values(v_BTHK):
                tables = [] if other_v_BTHK is None else [(lambdas[1], other_v_BTHK)]
                return weighted_sum((lambdas[0], v_BTHK), *tables, dtype=v_BTHK.dtype)

        else:
            by_visit = isinstance(c.trunk, Weighted)
            shape = (c.layers.visits_of(self.layer),) if by_visit else ()
            value_residual = self.param("value_residual", nn.initializers.constant(0.5), shape)
            if by_visit:
                value_residual = value_residual[visit]
            first_v_BTHK, values = other_v_BTHK, None
        y_BTHK, v_BTHK = attend_product(
            x_BTD, qkv_DE, first_v_BTHK, value_residual, rotary, intervals, heads // slots, ATTENTION_SCALE,
            c.attention,
            slots=slots,
            offsets_keys=c.offsets_keys(self.layer),
            with_values=c.excludes_own_values(self.layer),
            values=values,
        )  # fmt: skip
        y_BTHK, v_BTHK = (z.reshape(B, T, heads, c.head_dim) for z in (y_BTHK, v_BTHK))  # of tokens, not of slots
        read_BTC = x_BTD if first_BTG is None else first_BTG
        if self.layer in c.difference:
            y_BTHK, v_BTHK = difference.of_both(y_BTHK, read_BTC, visit), v_BTHK[:, :, : c.num_heads]
        for piece in pieces_of(c, self.layer):
            y_BTHK = piece.after(y_BTHK, v_BTHK, read_BTC, visit)
        return y_BTHK.reshape(B, T, D) @ times(weight, out_DD).astype(x_BTD.dtype), v_BTHK


class Mlp(nn.Module):
    """Two matrices around relu(x)^2."""

    dim: int
    hidden: int

    def setup(self):
        self.up = self.param("up", uniform_fan_in, (self.dim, self.hidden))
        self.down = self.param("down", nn.initializers.zeros, (self.hidden, self.dim))

    def matrices(self, dtype: jnp.dtype, weight=None):
        """Both, the second one times `weight` if there is one."""
        return self.up.astype(dtype), times(weight, self.down).astype(dtype)

    def __call__(self, x_BTD):
        return squared_relu_mlp(x_BTD, *self.matrices(x_BTD.dtype))


def times(weight, matrix_FD):
    """The matrix, times a weight if there is one. That of an output costs nothing here, nor does its gradient, where
    each would be a pass over all tokens."""
    return matrix_FD if weight is None else weight * matrix_FD


class Layer(nn.Module):
    """Two sublayers, each taking the normalised residual stream and returning what is to be added to it."""

    config: ModelConfig
    layer: int

    def setup(self):
        if self.has_attention:
            self.attention = Attention(self.config, self.layer)
        self.mlp = Mlp(self.config.dim, self.config.mlp_width(self.layer))

    @property
    def has_attention(self) -> bool:
        """Whether it is more than an MLP."""
        return self.layer not in self.config.layers.no_attention

    @property
    def reads_apart(self) -> int | None:
        """How many of the normalised stream's first channels gates read, if there are any: `first_BTG`."""
        return GATE_INPUTS if self.config.head_gate or self.layer in self.config.difference else None

    def attend(self, x_BTD, context: Context, visit=0, weight=None, first_BTG=None):
        """Attention with the values and the window that this layer takes; returns the output, times `weight` if there
        is one, and the values that it weighed. Its pieces read `first_BTG`."""
        c = self.config
        table = c.value_table(self.layer)
        other_v = context.first_v if table is None else context.value_embeddings[table]
        rows = context.slots if self.layer in c.paired_heads else context
        intervals = rows.windows[c.layers.has_long_window(self.layer)]
        return self.attention(x_BTD, other_v, rows.rotary, intervals, visit, weight, first_BTG)
