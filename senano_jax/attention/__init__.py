"""Attention over one interval of keys per query: one function, several implementations that agree."""

from typing import Literal

from jaxtyping import Array, Float

from senano_jax.attention import hopper_flash
from senano_jax.attention.banded import banded_attention
from senano_jax.attention.dense import dense_attention
from senano_jax.attention.flash import flash_attention
from senano_jax.attention.intervals import BLOCK, END_OF_TEXT, Intervals, document_start, window_intervals
from senano_jax.errors import UserError
from senano_jax.kernels import triton
from senano_jax.kernels.choice import on_gpu

__all__ = ["BLOCK", "END_OF_TEXT", "Intervals", "attend", "document_start", "takes_hopper", "window_intervals"]

Implementation = Literal["auto", "hopper", "flash", "banded", "dense"]


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    intervals: Intervals,
    scale: float,
    implementation: Implementation = "auto",
    *,
    with_values: bool = False,
) -> Float[Array, "B T H D"] | tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
    """softmax(scale * q k^T) v, in which query i sees the keys intervals.key_start[i] <= j <= i.

    `with_values` returns v, too, for others that read it: the gradient that they give v is added in the kernel of
    `hopper` and `flash` that makes attention's, and not in a pass of its own over memory.

    Scores, softmax and sums are float32 whatever the type of q, k and v; the result has q's type. T is a multiple of
    128, ValueError otherwise. `dense` needs O(T^2) memory and is the reference for the others; `hopper` needs a Hopper
    GPU, bfloat16 and heads of 64 or 128, UserError otherwise; `auto` takes the fastest one that runs: `hopper`, else
    `flash` on a GPU, else `banded`.
    """
    if q.shape[1] % BLOCK:
        raise ValueError(
            f"sequences of {q.shape[1]} tokens are not whole blocks of {BLOCK}; shorten them or fill them up"
        )
    if implementation == "auto":
        implementation = _fastest(q)
    if implementation == "hopper":
        if not hopper_flash.runs_here():
            raise UserError("attention hopper needs a Hopper GPU and JAX 0.11; use flash, or banded without a GPU")
        if not hopper_flash.fits(q.shape[1], q.shape[3], q.dtype):
            raise UserError(
                f"attention hopper takes bfloat16 heads 64 or 128 wide, not {q.dtype} of {q.shape[3]}; use flash"
            )
        return hopper_flash.hopper_attention(q, k, v, intervals, scale, with_values)
    if implementation == "flash":
        return flash_attention(q, k, v, intervals, scale, with_values)
    out = {"banded": banded_attention, "dense": dense_attention}[implementation](q, k, v, intervals, scale)
    return (out, v) if with_values else out


def takes_hopper(implementation: Implementation, length: int, width: int, dtype) -> bool:
    """Whether `attend` runs the kernels for Hopper GPUs on [B, length, H, width] of this dtype."""
    asked = implementation in ("auto", "hopper")
    return asked and hopper_flash.runs_here() and hopper_flash.fits(length, width, dtype)


def _fastest(q: Float[Array, "B T H D"]) -> Implementation:
    """Of those that this device runs at q's sizes."""
    if takes_hopper("auto", q.shape[1], q.shape[3], q.dtype):
        return "hopper"
    return "flash" if on_gpu() and triton.fits(q.shape[3]) else "banded"
