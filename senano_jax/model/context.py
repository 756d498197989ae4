"""What a layer sees beside the residual stream."""

from typing import NamedTuple

from jaxtyping import Array, Float

from senano_jax.attention import Intervals


class Slots(NamedTuple):
    """What layers with paired heads take in place of the context's: of two slots a token, S = 2T."""

    rotary: tuple[Float[Array, "S 1 half"], Float[Array, "S 1 half"]]
    windows: dict[bool, Intervals]


class Context(NamedTuple):
    """The same for all applications of layers, but for `first_v`, which the first one makes."""

    x0: Float[Array, "B T D"]  # normalised embedding
    first_v: Float[Array, "B T H K"] | None  # values of the first layer; None there and with value embeddings
    value_embeddings: tuple[Float[Array, "B T H K"], ...]  # of the tokens, one a table
    rotary: tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]
    windows: dict[bool, Intervals]  # by whether the layer has a long one
    slots: Slots | None = None  # if some layer pairs its heads
