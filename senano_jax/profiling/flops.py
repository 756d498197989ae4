"""How much arithmetic the model asks for, from its configuration alone, and what the device could do.

Model FLOPs count what the mathematics needs: every matrix product of every layer APPLICATION (a layer of the loop
counts once a visit) and of the head, as the traced program has them, and attention over the pairs of query and key that
see each other. A product [m, k] x [k, n] is 2mkn; the backward pass is twice the forward pass. Neither recomputation
nor the optimiser counts.
"""

import dataclasses
import functools
import math
from collections import Counter
from dataclasses import dataclass

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from senano_jax.attention import BLOCK, document_start, window_intervals
from senano_jax.config import TransformerConfig
from senano_jax.model.build import abstract_params, make_model

# Dense bfloat16 products, FLOP/s, from the vendor's data sheets; the first name found in device_kind counts.
PEAK_BFLOAT16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
}
SLOTS = {False: 1, True: 2}  # of a token in attention, by whether heads are paired
TRAINING_FACTOR = 3  # forward pass, and gradients by both operands of each product


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one training step over all devices."""

    matrix_products: int
    attention: int

    @property
    def total(self) -> int:
        """Both kinds together."""
        return self.matrix_products + self.attention


@functools.cache
def matrix_flops_per_token(model: TransformerConfig) -> int:
    """Forward FLOPs of one token in all products but attention's.

    Counted in the program of one block of tokens: in float32, for which no product is part of a kernel, and with dense
    attention, whose products are those of all pairs.
    """
    program = make_model(dataclasses.replace(model, attention="dense", remat="none"), "float32")
    tokens = jax.ShapeDtypeStruct((1, BLOCK), jnp.int32)
    forward = jax.make_jaxpr(lambda params, tokens: program.apply({"params": params}, tokens, tokens, 1))
    attention = sum(
        attention_flops_per_pair(model, paired=paired, second=second) * (BLOCK * SLOTS[paired]) ** 2
        for paired, second in zip(model.attention_pairs, model.attention_differences, strict=True)
    )
    per_block = product_flops(forward(abstract_params(program), tokens).jaxpr) - attention
    return per_block // BLOCK - _made_twice(model)


def product_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
    """FLOPs of all products in a program, those inside a scan once a turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += turns * sum(product_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def _made_twice(model: TransformerConfig) -> int:
    """Forward FLOPs of one token in the keys and values that the program makes again for second queries."""
    return sum(model.attention_differences) * 2 * 2 * model.dim**2


def attention_flops_per_pair(model: TransformerConfig, *, paired: bool = False, second: bool = False) -> int:
    """Forward FLOPs of one visible pair in one layer application: score and weighted value, over all heads; of one pair
    of slots, over all pairs of heads, if these are `paired`; in two attentions if there is a `second` one."""
    return (2 if second else 1) * 4 * model.dim // SLOTS[paired]


def visible_pairs(
    tokens_ST: Int[np.ndarray, "S T"], window_blocks: int, *, sees_documents: bool = True, paired: bool = False
) -> int:
    """Pairs of query and key that see each other in all sequences, for one layer application with that window; of
    slots where heads are `paired`."""
    slots = SLOTS[paired]
    position = np.arange(slots * tokens_ST.shape[1])
    start = document_start(tokens_ST) if sees_documents else np.zeros_like(tokens_ST)
    start = np.repeat(slots * np.asarray(start), slots, axis=1)
    key_start = np.asarray(window_intervals(start, window_blocks).key_start)
    return int((position - key_start + 1).sum(dtype=np.int64))


def step_flops(
    model: TransformerConfig, tokens_ST: Int[np.ndarray, "S T"], window_blocks: int, *, training: bool = True
) -> ModelFlops:
    """Model FLOPs of the inputs `tokens_ST`: some layers see the long window, the others half of it."""
    factor = TRAINING_FACTOR if training else 1
    kinds = Counter(zip(model.attention_windows, model.attention_pairs, model.attention_differences, strict=True))
    attention = 0
    for (is_long, paired, second), count in kinds.items():
        window = window_blocks if is_long else window_blocks // 2
        pairs = visible_pairs(tokens_ST, window, sees_documents=model.sees_documents, paired=paired)
        attention += count * attention_flops_per_pair(model, paired=paired, second=second) * pairs
    return ModelFlops(factor * matrix_flops_per_token(model) * tokens_ST.size, factor * attention)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device, or None for one not in the table and for types other than bfloat16."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_BFLOAT16.items() if name in device_kind), None)
