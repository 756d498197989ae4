"""The system with value embeddings in float64 NumPy, derivatives written by hand, as a second opinion.

Parameters come under the names of the PyTorch program, matrices (out, in). Every operation returns its value and a
function that turns the gradient of that value into the gradients of the arguments, in their order.
"""

import math

import numpy as np
from oracles import visible_pairs

TABLES = {0: 0, 1: 1, 2: 2, 9: 0, 10: 1, 11: 2}  # layer: its value embedding
LONG = (0, 4, 7, 11)  # layers that see the whole window; the others see half of it
NO_ATTENTION = (7,)


def norm(x):
    """Over the last axis."""
    scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + 2.0**-23)
    y = x * scale
    return y, lambda dy: scale * (dy - y * (dy * y).mean(-1, keepdims=True))


def rotary(x_HTK, direction: int = 1) -> np.ndarray:
    """Orthogonal: the gradient turns back (direction -1)."""
    _, T, K = x_HTK.shape
    frequencies = np.concatenate([1024.0 ** -np.linspace(0, 1, K // 4), np.zeros(K // 4)])
    angle = direction * np.arange(T)[:, None] * frequencies
    x1, x2 = np.split(x_HTK, 2, axis=-1)
    return np.concatenate([x1 * np.cos(angle) + x2 * np.sin(angle), x2 * np.cos(angle) - x1 * np.sin(angle)], axis=-1)


def softmax(x) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(x_TD, value_TD, qkv_w, lambdas, c_proj_DD, visible_TT, num_heads: int):
    """`value_TD` is the tokens' value embedding, or None; the gradient is then None."""

    def split(x_TD):
        return x_TD.reshape(len(x_TD), num_heads, -1).swapaxes(0, 1)

    def join(x_HTK):
        return x_HTK.swapaxes(0, 1).reshape(x_TD.shape)

    scale = 0.12
    raw_q, raw_k, raw_v = (split(x_TD @ w.T) for w in qkv_w)
    (q_HTK, q_back), (k_HTK, k_back) = norm(raw_q), norm(raw_k)
    q_HTK, k_HTK = rotary(q_HTK), rotary(k_HTK)
    v_HTK = lambdas[0] * raw_v + (0 if value_TD is None else lambdas[1] * split(value_TD))
    weights_HTT = softmax(np.where(visible_TT, scale * q_HTK @ k_HTK.swapaxes(1, 2), -np.inf))
    y_TD = join(weights_HTT @ v_HTK)

    def backward(dout_TD):
        dy_HTK = split(dout_TD @ c_proj_DD)
        dweights_HTT = dy_HTK @ v_HTK.swapaxes(1, 2)
        dscores_HTT = scale * weights_HTT * (dweights_HTT - (dweights_HTT * weights_HTT).sum(-1, keepdims=True))
        dq_HTK = q_back(rotary(dscores_HTT @ k_HTK, -1))
        dk_HTK = k_back(rotary(dscores_HTT.swapaxes(1, 2) @ q_HTK, -1))
        dv_HTK = weights_HTT.swapaxes(1, 2) @ dy_HTK
        dlambdas, dvalue_TD = np.array([(dv_HTK * raw_v).sum(), 0.0]), None
        if value_TD is not None:
            dlambdas[1], dvalue_TD = (join(dv_HTK) * value_TD).sum(), lambdas[1] * join(dv_HTK)
        dqkv = [join(d_HTK) for d_HTK in (dq_HTK, dk_HTK, lambdas[0] * dv_HTK)]
        dx_TD = sum(d_TD @ w for d_TD, w in zip(dqkv, qkv_w))
        return dx_TD, dvalue_TD, np.stack([d_TD.T @ x_TD for d_TD in dqkv]), dlambdas, dout_TD.T @ y_TD

    return y_TD @ c_proj_DD.T, backward


def mlp(x_TD, c_fc_FD, c_proj_DF):
    active_TF = np.maximum(x_TD @ c_fc_FD.T, 0)

    def backward(dy_TD):
        dup_TF = 2 * active_TF * (dy_TD @ c_proj_DF)
        return dup_TF @ c_fc_FD, dup_TF.T @ x_TD, dy_TD.T @ active_TF**2

    return active_TF**2 @ c_proj_DF.T, backward


def summed_loss(x_TD, head_VD, targets_T):
    """Cross-entropy in nats over all rows of the head, logits soft-capped between 0 and 30."""
    width = 7.5 * math.sqrt(x_TD.shape[1])
    share_TV = 1 / (1 + np.exp(-(x_TD @ head_VD.T) / width))
    probabilities_TV = softmax(30 * share_TV)
    of_target = np.arange(len(targets_T)), targets_T

    def backward():
        dlogits_TV = probabilities_TV.copy()
        dlogits_TV[of_target] -= 1
        dz_TV = dlogits_TV * 30 * share_TV * (1 - share_TV) / width
        return dz_TV @ head_VD, dz_TV.T @ x_TD

    return -np.log(probabilities_TV[of_target]).sum(), backward


def loss_and_gradients(
    params,
    inputs_T,
    targets_T,
    window_blocks: int,
    num_heads: int = 6,
    num_layers: int = 12,
    tables=TABLES,
    long=LONG,
    no_attention=NO_ATTENTION,
):
    """Sum of the cross-entropies of one sequence, and its gradients under the names of `params`; `num_layers` even."""
    params = {name: np.asarray(array, np.float64) for name, array in params.items()}
    grads = {name: np.zeros_like(array) for name, array in params.items()}
    half, skip_weights = num_layers // 2, params["skip_weights"]
    windows = [visible_pairs(inputs_T, window_blocks // (1 if i in long else 2)) for i in range(num_layers)]

    x0, x0_back = norm(params["embed.weight"][inputs_T])
    x, kept, tape = x0, {}, []
    for i in range(num_layers):
        p = {name.removeprefix(f"blocks.{i}."): array for name, array in params.items()}
        if i >= half:
            x = x + skip_weights[i - half] * kept[2 * half - 1 - i]
        block_input = x
        x = p["lambdas"][0] * x + p["lambdas"][1] * x0
        attention_back = None
        if i not in no_attention:
            value = params[f"value_embeds.{tables[i]}.weight"][inputs_T] if i in tables else None
            weights = p["attn.qkv_w"], p["attn.lambdas"], p["attn.c_proj.weight"]
            normed, norm_back = norm(x)
            y, of_attention = attention(normed, value, *weights, windows[i], num_heads)
            x, attention_back = x + y, (norm_back, of_attention)
        normed, norm_back = norm(x)
        y, of_mlp = mlp(normed, p["mlp.c_fc.weight"], p["mlp.c_proj.weight"])
        x = x + y
        kept[i] = x
        tape.append((block_input, p["lambdas"], attention_back, (norm_back, of_mlp)))
    normed, norm_back = norm(x)
    loss, loss_back = summed_loss(normed, params["lm_head.weight"], targets_T)

    dnormed, grads["lm_head.weight"] = loss_back()
    dx, dx0, dkept = norm_back(dnormed), 0, {}
    for i in reversed(range(num_layers)):
        block_input, lambdas, attention_back, (norm_back, of_mlp) = tape[i]
        dx = dx + dkept.get(i, 0)
        dnormed, grads[f"blocks.{i}.mlp.c_fc.weight"], grads[f"blocks.{i}.mlp.c_proj.weight"] = of_mlp(dx)
        dx = dx + norm_back(dnormed)
        if attention_back:
            norm_back, of_attention = attention_back
            dnormed, dvalue, *dweights = of_attention(dx)
            for name, dweight in zip(("qkv_w", "lambdas", "c_proj.weight"), dweights):
                grads[f"blocks.{i}.attn.{name}"] = dweight
            if i in tables:
                np.add.at(grads[f"value_embeds.{tables[i]}.weight"], inputs_T, dvalue)
            dx = dx + norm_back(dnormed)
        grads[f"blocks.{i}.lambdas"] = np.array([(dx * block_input).sum(), (dx * x0).sum()])
        dx, dx0 = lambdas[0] * dx, dx0 + lambdas[1] * dx
        if i >= half:
            grads["skip_weights"][i - half] = (dx * kept[2 * half - 1 - i]).sum()
            dkept[2 * half - 1 - i] = skip_weights[i - half] * dx
    np.add.at(grads["embed.weight"], inputs_T, x0_back(dx + dx0))
    return float(loss), grads
