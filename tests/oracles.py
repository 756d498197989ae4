"""The model in float64 NumPy, written from its description with loops where they are clearer, as a second opinion.

Weights come under the PyTorch program's names and in its layout, (out, in).
"""

import math

import numpy as np

END_OF_TEXT = 50256


def random_tokens(rng, length: int, documents: float, vocabulary: int = 50256) -> np.ndarray:
    """int32 [length] of ordinary tokens, of which about the share `documents` is replaced by END_OF_TEXT."""
    tokens = rng.integers(0, vocabulary, length)
    return np.where(rng.random(length) < documents, END_OF_TEXT, tokens).astype(np.int32)


def visible_pairs(tokens, window_blocks: int, slots: int = 1) -> np.ndarray:
    """Bool [query, key]: not in the future, in the same document, and less than `window_blocks` blocks back; of so many
    slots a token."""
    document = np.repeat(np.cumsum(np.asarray(tokens) == END_OF_TEXT), slots)
    query, key = np.ogrid[: len(document), : len(document)]
    return (
        (key <= query)
        & (document[query] == document[key])
        & (query // 128 - key // 128 < max(1, window_blocks))  # a query always sees its own block
    )


def softmax_attention(q, k, v, visible, scale: float) -> np.ndarray:
    """[T, H, D] arrays; one query and one head at a time."""
    out = np.zeros(v.shape, np.float64)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for t in range(q.shape[0]):
        keys = np.flatnonzero(visible[t])
        for h in range(q.shape[1]):
            scores = scale * k[keys, h] @ q[t, h]
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[keys, h] / weights.sum()
    return out


def norm(x) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 2.0**-23)


def rotary(x) -> np.ndarray:
    """[T, H, D]: pair (j, D/2 + j) turns by position x 1024^(-j / (D/4 - 1)) for j < D/4, the others rest."""
    length, _, width = x.shape
    half, turning = width // 2, width // 4
    y = np.array(x, np.float64)
    for j in range(turning):
        angle = np.arange(length)[:, None] * 1024.0 ** (-j / (turning - 1))
        x1, x2 = x[:, :, j], x[:, :, half + j]
        y[:, :, j] = x1 * np.cos(angle) + x2 * np.sin(angle)
        y[:, :, half + j] = -x1 * np.sin(angle) + x2 * np.cos(angle)
    return y


def soft_capped_logits(x, head) -> np.ndarray:
    """`head` is [V, dim]."""
    return 30 / (1 + np.exp(-(x @ head.T) / (7.5 * math.sqrt(x.shape[-1]))))


def cross_entropies(logits, targets) -> np.ndarray:
    """One a token, natural logarithm."""
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def gpt_logits(weights, tokens, window_blocks: int, schedule: list[int], heads: int) -> np.ndarray:
    """[T, V]; `schedule` lists the layer of each position."""
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    visible = [visible_pairs(tokens, window_blocks), visible_pairs(tokens, max(1, window_blocks // 2))]
    length, half = len(tokens), len(schedule) // 2
    x = x0 = norm(weights["embed.weight"][tokens])
    first_v, kept = None, {}
    for i, layer in enumerate(schedule):
        w = {name.removeprefix(f"blocks.{layer}."): array for name, array in weights.items()}
        if i >= half:
            x = x + w["skip_weights"][i - half] * kept[2 * half - 1 - i]
        x = w["lambdas"][0] * x + w["lambdas"][1] * x0
        q, k, v = ((norm(x) @ matrix.T).reshape(length, heads, -1) for matrix in w["attn.qkv_w"])
        first_v = v if i == 0 else first_v
        v = (1 - w["attn.lamb"]) * v + w["attn.lamb"] * first_v
        y = softmax_attention(rotary(norm(q)), rotary(norm(k)), v, visible[i % 2], 0.12)
        x = x + y.reshape(length, -1) @ w["attn.c_proj.weight"].T
        x = x + np.square(np.maximum(norm(x) @ w["mlp.c_fc.weight"].T, 0)) @ w["mlp.c_proj.weight"].T
        if i < half:
            kept[i] = x
    return soft_capped_logits(norm(x), weights["lm_head.weight"])


def newton_schulz(matrix) -> np.ndarray:
    """[out, in], exact arithmetic's version of the five steps."""
    x = np.asarray(matrix, np.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def odd_polynomials(matrix, coefficients, margin: float, epsilon: float) -> np.ndarray:
    """U f(S) V^T of a matrix with the singular values S after division by margin ||.||_F + epsilon, f the composition
    of s -> a s + b s^3 + c s^5; by a decomposition, not by products."""
    u, singular, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    singular = singular / (margin * np.sqrt(np.sum(singular**2)) + epsilon)
    for a, b, c in coefficients:
        singular = a * singular + b * singular**3 + c * singular**5
    return u * singular @ vt


def relative_error(result, expected) -> float:
    """In the Frobenius norm."""
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
