"""What goes from visit to visit of the loop, in place of the residual stream itself.

`norm`: norm(x) + e after each visit, with e the stream that entered the loop (a boundary operator: arXiv 2609.19107, in
the form that marin replicated on FineWeb, thread 9292 of its tracker).

`lanes`: streams L_n, all e at first. Visit k reads u = sum_n read[k,n] L_n, makes x of it and leaves
L_i <- sum_j kept[k,i,j] L_j + written[k,i] norm(x); the layers after the loop read their sum (hyper-connections over
the loop: arXiv 2604.21106, static weights).

`layer-lanes` are no matter of the loop: lanes.py.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from senano_jax.model.norm_fork import norm_fork
from senano_jax.model.trunks.lanes import LaneWeights, read_lanes, write_lanes

Between = Literal["stream", "norm", "lanes", "layer-lanes"]
Carried = tuple[Float[Array, "B T D"], ...]  # float32


def begin(between: Between, x_BTD: Float[Array, "B T D"], lanes: int) -> Carried:
    """What the first visit is given, of the stream that enters the loop."""
    return (x_BTD,) * {"norm": 2, "lanes": lanes}.get(between, 1)


def enter(between: Between, carried: Carried, weights: LaneWeights | None) -> Float[Array, "B T D"]:
    """What the layers of a visit read, float32."""
    if between != "lanes":
        return carried[0]
    return read_lanes(carried, weights, jnp.float32)


def leave(
    between: Between, carried: Carried, x_BTD: Float[Array, "B T D"], weights: LaneWeights | None, dtype: jnp.dtype
) -> Carried:
    """What the next visit is given, of the stream that the layers made; its norm is computed of x in `dtype`."""
    if between in ("stream", "layer-lanes"):
        return (x_BTD,)
    _, normed_BTD = norm_fork(x_BTD.astype(dtype))
    if between == "norm":
        entered_BTD = carried[1]
        return normed_BTD + entered_BTD, entered_BTD
    return write_lanes(carried, normed_BTD, weights)


def finish(between: Between, carried: Carried) -> Float[Array, "B T D"]:
    """What the layers after the loop read, float32."""
    return sum(carried) if between == "lanes" else carried[0]
