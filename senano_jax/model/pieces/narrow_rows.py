"""A tied table whose later, rarer tokens have fewer numbers than the stream is wide."""

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float

Bands = tuple[tuple[int, int], ...]
"""First token and width of each; a band ends where the next one begins, the last with the head's columns."""


def band_shapes(bands: Bands, columns: int) -> Iterator[tuple[int, int]]:
    """Yields width and number of tokens of each band."""
    borders = (*(first for first, _ in bands), columns)
    for (first, width), end in zip(bands, borders[1:], strict=True):
        yield width, end - first


def with_narrow_rows(head_DF: Float[Array, "D F"], bands: list[Float[Array, "width tokens"]]) -> Float[Array, "D V"]:
    """The head's whole columns, then those of each band, zero but for their first `width` numbers:

        column = sqrt(dim / width) (band, 0)

    The factor gives it the norm of a whole column at the start, and a step of Adam moves it as far. GPT-2's tokens are
    numbered as BPE merged them, so that later ones are rarer. Adaptive input representations (Baevski & Auli, arXiv
    1809.10853) have a matrix for each band instead of zeros; bands in the first dimensions are ours.
    """
    dim = len(head_DF)
    padded = [jnp.pad((dim / len(band)) ** 0.5 * band, ((0, dim - len(band)), (0, 0))) for band in bands]
    return jnp.concatenate([head_DF, *padded], axis=1)
