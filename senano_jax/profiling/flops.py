"""How much arithmetic the model asks for, from its configuration alone, and what the device could do.

Model FLOPs count what the mathematics needs: every matrix product of every layer APPLICATION (a layer of the loop
counts once a visit) and of the head, and attention over the pairs of query and key that see each other. A product
[m, k] x [k, n] is 2mkn; the backward pass is twice the forward pass. Neither recomputation nor the optimiser counts.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from senano_jax.attention import document_start, window_intervals
from senano_jax.config import TransformerConfig

# Dense bfloat16 products, FLOP/s, from the vendor's data sheets; the first name found in device_kind counts.
PEAK_BFLOAT16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
}
TRAINING_FACTOR = 3  # forward pass, and gradients by both operands of each product


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one training step over all devices."""

    matrix_products: int
    attention: int

    @property
    def total(self) -> int:
        return self.matrix_products + self.attention


def matrix_flops_per_token(model: TransformerConfig) -> int:
    """Forward FLOPs of one token in the matrix products: qkv, output and MLP at every position, and the head."""
    squares = 4 * len(model.attention_windows) + 2 * model.mlp_expansion * model.positions
    return 2 * squares * model.dim**2 + 2 * model.dim * model.padded_vocab_size


def attention_flops_per_pair(model: TransformerConfig) -> int:
    """Forward FLOPs of one visible pair in one layer application: score and weighted value, over all heads."""
    return 4 * model.dim


def visible_pairs(tokens_ST: Int[np.ndarray, "S T"], window_blocks: int, *, sees_documents: bool = True) -> int:
    """Pairs of query and key that see each other in all sequences, for one layer application with that window."""
    position = np.arange(tokens_ST.shape[1])
    start = document_start(tokens_ST) if sees_documents else np.zeros_like(tokens_ST)
    key_start = np.asarray(window_intervals(start, window_blocks).key_start)
    return int((position - key_start + 1).sum(dtype=np.int64))


def step_flops(
    model: TransformerConfig, tokens_ST: Int[np.ndarray, "S T"], window_blocks: int, *, training: bool = True
) -> ModelFlops:
    """Model FLOPs of the inputs `tokens_ST`: some layers see the long window, the others half of it."""
    factor = TRAINING_FACTOR if training else 1
    long, short = (
        visible_pairs(tokens_ST, window, sees_documents=model.sees_documents)
        for window in (window_blocks, window_blocks // 2)
    )
    pairs = sum(long if is_long else short for is_long in model.attention_windows)
    return ModelFlops(
        factor * matrix_flops_per_token(model) * tokens_ST.size,
        factor * attention_flops_per_pair(model) * pairs,
    )


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device, or None for one not in the table and for types other than bfloat16."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_BFLOAT16.items() if name in device_kind), None)
