"""The loss of the ladder's systems in float64 NumPy, application by application, from the program's parameter tree.

Gradients are checked by `slope`: the derivative along a direction, by central differences.
"""

import numpy as np
from oracles import norm, rotary, visible_pairs


def loss(params, tokens, targets, window_blocks, loss_weights, *, layers, heads, cap, depth_block) -> float:
    """Summed over the tokens of one sequence; `loss_weights` are those of the tokens 1, 2, .. ahead, `layers` is
    (prelude, loop, visits, coda) and `cap` (height, divisor, shift). With `depth_block`, the layers of a block, what
    layers and head read is a mixture of x0 and of what blocks have added."""
    prelude, loop, visits, coda = layers
    applications = [(params[f"layer_{n}"], n, 0) for n in range(prelude)]
    for visit in range(visits):
        applications += [(params["loop"][f"layer_{n}"], n, visit) for n in range(prelude, prelude + loop)]
    last = prelude + loop + coda
    applications += [(params[f"layer_{n}"], n, 0) for n in range(prelude + loop, last)]

    visible = [visible_pairs(tokens, window_blocks), visible_pairs(tokens, max(1, window_blocks // 2))]
    x = x0 = norm(params["embedding"][tokens] if "embedding" in params else params["head"].T[tokens])
    count, first_v, kept, blocks = len(applications), None, [], [x0]
    for i, (layer, n, visit) in enumerate(applications):
        where = (first_v, visible[n % 2], heads, visit)
        if "stream_weights" in params:
            if depth_block:
                if i in (0, prelude) or ((i - prelude) % depth_block == 0 and prelude < i <= prelude + loop * visits):
                    blocks.append(0 * x0)  # of which this application is the first one
                sources = [block for block in blocks if block.any()]
                x = read = at_depth(params["depth_queries"][i], sources)
            y, v = attention(layer["attention"], norm(x), *where)
            stream, added = params["stream_weights"][i], params["added_weights"][i]
            x = stream[0] * x + added[0] * y + params["x0_weights"][i] * x0
            x = stream[1] * x + added[1] * mlp(layer["mlp"], x)
            if depth_block:
                blocks[-1] = blocks[-1] + x - read
        else:
            if i >= count // 2:
                x = x + params["skip_weights"][i - count // 2] * kept[count - 1 - i]
            x = layer["lambdas"][0] * x + layer["lambdas"][1] * x0
            y, v = attention(layer["attention"], norm(x), *where)
            x = x + y
            x = x + mlp(layer["mlp"], x)
            kept.append(x)
        first_v = v if i == 0 else first_v

    if depth_block:
        x = at_depth(params["depth_queries"][-1], blocks)
    height, divisor, shift = cap
    z = norm(x) @ params["head"]
    logits = height / (1 + np.exp(-(z + shift) / divisor))
    logsumexp = np.log(np.exp(logits).sum(-1))
    total = 0.0
    for k, weight in enumerate(loss_weights):
        for t in range(len(tokens) - k):
            total += weight * (logsumexp[t] - logits[t, targets[t + k]])
    return total


def attention(w, x, first_v, visible, heads, visit, *, key_offset=False, paired=False):
    """What attention adds, and the values that it weighs; `visible` is of slots if heads are paired."""
    q, k, v = ((x @ matrix).reshape(len(x), heads, -1) for matrix in w["qkv"])
    if first_v is not None:
        share = w["value_residual"] if np.ndim(w["value_residual"]) == 0 else w["value_residual"][visit]
        v = (1 - share) * v + share * first_v
    z_q, z_k, z_v = (one_in_each_slot(z) for z in (q, k, v)) if paired else (q, k, v)
    z_q, z_k = rotary(norm(z_q)), rotary(norm(z_k))
    if key_offset:
        z_k = with_dimensions_of_the_token_before(z_k)
    z_y = np.zeros_like(z_v)
    for h in range(z_q.shape[1]):
        z_y[:, h] = seen_with(z_q[:, h], z_k[:, h], visible) @ z_v[:, h]
    y = heads_of_slots(z_y) if paired else z_y
    for h in range(heads):
        if "difference" in w:
            query = rotary(norm((x @ w["difference"]["queries"][h])[:, None]))[:, 0]
            share = 1 / (1 + np.exp(-x[:, :12] @ w["difference"]["gate"][visit, h]))
            y[:, h] -= share[:, None] * (seen_with(query, z_k[:, h], visible) @ v[:, h])
        if "exclusive" in w:
            strength, own = np.tanh(w["exclusive"]["strength"][visit, h]), v[:, h]
            y[:, h] -= strength * ((y[:, h] * own).sum(-1) / (own**2).sum(-1))[:, None] * own
        if "head_gate" in w:
            y[:, h] /= 1 + np.exp(-x[:, :12] @ w["head_gate"]["gate"][visit, h])[:, None]
    return y.reshape(x.shape) @ w["out"], v


def seen_with(q, k, visible):
    """The weights of all keys, for each query."""
    weights = np.where(visible, np.exp(0.12 * q @ k.T), 0)
    return weights / weights.sum(-1, keepdims=True)


def at_depth(query, sources):
    """The sources' sum, weighted by n times a softmax over all n of them."""
    weights = np.exp([norm(source) @ query / len(query) ** 0.5 for source in sources])
    weights *= len(sources) / weights.sum(0)
    return sum(weight[..., None] * source for weight, source in zip(weights, sources))


def one_in_each_slot(z):
    """[T, H, K] to [2T, H/2, K]: of each pair, head g of token t in slot 2t and head g + H/2 in slot 2t + 1."""
    length, heads, width = z.shape
    slots = np.zeros((2 * length, heads // 2, width))
    for t in range(length):
        for g in range(heads // 2):
            slots[2 * t, g], slots[2 * t + 1, g] = z[t, g], z[t, g + heads // 2]
    return slots


def heads_of_slots(slots):
    """The inverse."""
    return np.concatenate([slots[::2], slots[1::2]], axis=1)


def with_dimensions_of_the_token_before(k):
    """Of each head's two halves the second half."""
    offset, quarter = k.copy(), k.shape[-1] // 4
    for t in range(1, len(k)):
        for first in (quarter, 3 * quarter):
            offset[t, :, first : first + quarter] = k[t - 1, :, first : first + quarter]
    return offset


def mlp(w, x):
    return np.maximum(norm(x) @ w["up"], 0) ** 2 @ w["down"]


def slope(function, params, path, direction, step=1e-5) -> float:
    """Derivative of function(params) where the array at `path` moves along `direction`."""

    def moved(tree, keys, by):
        key, *rest = keys
        return tree | {key: moved(tree[key], rest, by) if rest else tree[key] + by}

    return (function(moved(params, path, step * direction)) - function(moved(params, path, -step * direction))) / (
        2 * step
    )
