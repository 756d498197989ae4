"""A tied table whose later, rarer tokens have fewer numbers than the stream is wide."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class NarrowRows(nn.Module):
    """Of each band of tokens the embeddings, which are columns of the head too, have numbers in the first `width`
    dimensions and zeros in the others. GPT-2's tokens are numbered as BPE merged them, so that later ones are rarer.

    Adaptive input representations (Baevski & Auli, arXiv 1809.10853) give each band a matrix from its width to that of
    the stream; here the layers can turn the stream so that the first dimensions are those that it would choose. What
    is stored counts sqrt(dim / width) times, so that a column has the norm that a whole one has at the start, and a
    step of Adam moves it as far.

    Parameters, float32: narrow_head_<n> [width, tokens of the band], normal with `deviation`.
    """

    bands: tuple[tuple[int, int], ...]
    """First token and width of each; the next one begins where it ends, the last with the head."""
    columns: int
    """Of the head, padding included."""
    deviation: float

    @nn.compact
    def __call__(self, head_DF: Float[Array, "D F"]) -> Float[Array, "D V"]:
        """The whole head behind the columns of the first band's predecessors, float32."""
        dim, parts = len(head_DF), [head_DF]
        ends = (*(first for first, _ in self.bands[1:]), self.columns)
        for number, ((first, width), end) in enumerate(zip(self.bands, ends, strict=True)):
            init = nn.initializers.normal(self.deviation)
            band = self.param(f"narrow_head_{number}", init, (width, end - first))
            parts.append(jnp.pad((dim / width) ** 0.5 * band, ((0, dim - width), (0, 0))))
        return jnp.concatenate(parts, axis=1)
