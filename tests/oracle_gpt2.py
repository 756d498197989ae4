"""GPT-2 as llm.c trains it, in float64 NumPy with every derivative written by hand, as a second opinion.

Parameters come under GPT-2's names, matrices (out, in) as in torch's Linear. Every operation returns its value and a
function that turns the gradient of that value into the gradients of the arguments, in their order.
"""

import functools
import math

import numpy as np


def linear(x_BTI, weight_OI, bias_O):
    def backward(dy_BTO):
        dy_NO, x_NI = (array.reshape(-1, array.shape[-1]) for array in (dy_BTO, x_BTI))
        return dy_BTO @ weight_OI, dy_NO.T @ x_NI, dy_NO.sum(0)

    return x_BTI @ weight_OI.T + bias_O, backward


def layer_norm(x_BTD, weight_D, bias_D):
    scale_BT1 = 1 / np.sqrt(x_BTD.var(-1, keepdims=True) + 1e-5)
    normed_BTD = (x_BTD - x_BTD.mean(-1, keepdims=True)) * scale_BT1

    def backward(dy_BTD):
        d_BTD = dy_BTD * weight_D
        along_BT1 = (d_BTD * normed_BTD).mean(-1, keepdims=True)
        dx_BTD = scale_BT1 * (d_BTD - d_BTD.mean(-1, keepdims=True) - along_BT1 * normed_BTD)
        return dx_BTD, (dy_BTD * normed_BTD).sum((0, 1)), dy_BTD.sum((0, 1))

    return normed_BTD * weight_D + bias_D, backward


def gelu(x):
    """The tanh form."""
    root = math.sqrt(2 / math.pi)
    t = np.tanh(root * (x + 0.044715 * x**3))

    def backward(dy):
        return (dy * 0.5 * (1 + t + x * (1 - t**2) * root * (1 + 3 * 0.044715 * x**2)),)

    return 0.5 * x * (1 + t), backward


def causal_attention(qkv_BTE, num_heads: int):
    """E = 3D holds all of q, then k, then v; every query sees all keys up to its own, whatever the documents."""
    B, T, _ = qkv_BTE.shape
    q_BHTK, k_BHTK, v_BHTK = qkv_BTE.reshape(B, T, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    scale = q_BHTK.shape[-1] ** -0.5
    scores_BHTT = np.where(np.tri(T, dtype=bool), scale * q_BHTK @ k_BHTK.swapaxes(2, 3), -np.inf)
    weights_BHTT = softmax(scores_BHTT)

    def backward(dy_BTD):
        dy_BHTK = dy_BTD.reshape(B, T, num_heads, -1).swapaxes(1, 2)
        dweights_BHTT = dy_BHTK @ v_BHTK.swapaxes(2, 3)
        dscores_BHTT = weights_BHTT * (dweights_BHTT - (dweights_BHTT * weights_BHTT).sum(-1, keepdims=True))
        dq_BHTK = scale * dscores_BHTT @ k_BHTK
        dk_BHTK = scale * dscores_BHTT.swapaxes(2, 3) @ q_BHTK
        dv_BHTK = weights_BHTT.swapaxes(2, 3) @ dy_BHTK
        return (np.stack([dq_BHTK, dk_BHTK, dv_BHTK]).transpose(1, 3, 0, 2, 4).reshape(B, T, -1),)

    return (weights_BHTT @ v_BHTK).swapaxes(1, 2).reshape(B, T, -1), backward


def softmax(x) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss_and_gradients(params, inputs_BT, targets_BT, num_heads: int, vocab_size: int | None = None):
    """Mean cross-entropy over all B*T tokens in nats, and its gradients under the names of `params`.

    The softmax runs over the first `vocab_size` rows of wte.weight, over all of them if it is None.
    """
    params = {name: np.asarray(array, np.float64) for name, array in params.items()}
    grads = {name: np.zeros_like(array) for name, array in params.items()}

    def run(x, operations):
        tape = []
        for name, operation in operations:
            weights = (params[f"{name}.weight"], params[f"{name}.bias"]) if name else ()
            x, backward = operation(x, *weights)
            tape.append((name, backward))
        return x, tape

    def run_back(dy, tape):
        for name, backward in reversed(tape):
            dy, *dweights = backward(dy)
            if name:
                grads[f"{name}.weight"], grads[f"{name}.bias"] = dweights
        return dy

    (B, T), head_VD = inputs_BT.shape, params["wte.weight"][:vocab_size]
    x_BTD = params["wte.weight"][inputs_BT] + params["wpe.weight"][:T]
    attend = functools.partial(causal_attention, num_heads=num_heads)
    branches = (
        [("ln_1", layer_norm), ("attn.c_attn", linear), ("", attend), ("attn.c_proj", linear)],
        [("ln_2", layer_norm), ("mlp.c_fc", linear), ("", gelu), ("mlp.c_proj", linear)],
    )
    tapes = []
    for i in range(sum(name.endswith(".ln_1.weight") for name in params)):
        for branch in branches:
            y_BTD, tape = run(x_BTD, [(name and f"h.{i}.{name}", operation) for name, operation in branch])
            x_BTD = x_BTD + y_BTD
            tapes.append(tape)
    x_BTD, last_tape = run(x_BTD, [("ln_f", layer_norm)])
    probabilities_BTV = softmax(x_BTD @ head_VD.T)
    of_target = (*np.indices((B, T)), targets_BT)
    loss = -np.log(probabilities_BTV[of_target]).mean()

    dlogits_BTV = probabilities_BTV / (B * T)
    dlogits_BTV[of_target] -= 1 / (B * T)
    grads["wte.weight"][:vocab_size] = np.einsum("btv,btd->vd", dlogits_BTV, x_BTD)
    dx_BTD = run_back(dlogits_BTV @ head_VD, last_tape)
    for tape in reversed(tapes):
        dx_BTD = dx_BTD + run_back(dx_BTD, tape)
    np.add.at(grads["wte.weight"], inputs_BT, dx_BTD)
    grads["wpe.weight"][:T] = dx_BTD.sum(0)
    return float(loss), grads


def global_norm_clip(grads, max_norm: float = 1.0):
    """Gradients times min(1, max_norm / (norm + 1e-6)), as torch clips (llm.c leaves out the 1e-6), and that norm."""
    norm = math.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
    return {name: grad * min(1.0, max_norm / (norm + 1e-6)) for name, grad in grads.items()}, norm


def adamw_step(params, grads, m, v, step: int, lr: float, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
    """New (params, m, v). `step` counts from 1; only tensors of two or more dims decay, embeddings among them."""
    m = {name: b1 * m[name] + (1 - b1) * grad for name, grad in grads.items()}
    v = {name: b2 * v[name] + (1 - b2) * np.square(grad) for name, grad in grads.items()}
    new = {}
    for name, array in params.items():
        direction = m[name] / (1 - b1**step) / (np.sqrt(v[name] / (1 - b2**step)) + eps)
        new[name] = array - lr * (direction + (decay * array if array.ndim >= 2 else 0))
    return new, m, v


def cosine_lr(step: int, steps: int, peak: float = 6e-4, warmup_steps: int = 700) -> float:
    """`step` counts from 0: peak / warmup_steps there, the peak in the last step of the warm-up, 0 at `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
