"""How sharply each head attends: normalised queries and keys leave all heads one temperature (Henry et al., arXiv
2010.04245, learn it; here by head and visit)."""

from jaxtyping import Array, Float


def with_gains(q: Float[Array, "B T_ H_ K"], gain_H: Float[Array, "H"]) -> Float[Array, "B T_ H_ K"]:
    """Queries times the float32 gains of their heads, rounded once; of tokens, or of slots where heads are paired."""
    B, _, _, K = q.shape
    by_head = q.reshape(B, -1, len(gain_H), K)  # slots are a token's heads in order
    return (by_head * gain_H[:, None]).astype(q.dtype).reshape(q.shape)
