"""What the backward pass keeps of a block and what it computes again."""

from typing import Literal

import jax
from flax import linen as nn


def rematerialised(
    block: type[nn.Module], remat: Literal["none", "attention", "full"], *, scanned: bool = False
) -> type[nn.Module]:
    """The class `block`, or one that recomputes it in the backward pass: all of it, or all but its attention.

    `scanned` tells that it is applied inside a loop, which itself keeps XLA from merging the recomputation with the
    forward pass.
    """
    if remat == "none":
        return block
    keep = {"full": (), "attention": ("attention_out", "attention_lse")}[remat]
    return nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(*keep), prevent_cse=not scanned)
