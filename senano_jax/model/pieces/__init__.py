"""What attention can be given besides: small modules, each in a file, and the one place that says which layer's has
which.

A piece of attention is a linen module with `after(y_BTHK, v_BTHK, x_BTD, visit)`: attention's output [B, T, H, K]
before its last product, from what attention gave, the values that it weighed, the layer's normalised input and the
number of this visit of the layer, an int or a traced one. Parameters that differ between visits have these as their
first axis. Two pieces that one kernel computes are applied as one (`GatedExclusive`); their parameters stay where they
are.
"""

from flax import linen as nn

from senano_jax.model.config import ModelConfig
from senano_jax.model.pieces.exclusive import Exclusive
from senano_jax.model.pieces.gated_exclusive import GatedExclusive
from senano_jax.model.pieces.head_gate import HeadGate


def pieces_of(model: ModelConfig, layer: int) -> tuple[nn.Module | GatedExclusive, ...]:
    """The pieces of a layer's attention, in the order in which they are applied; to be called where the module's
    children are made."""
    visits, heads = model.layers.visits_of(layer), model.num_heads
    pieces: tuple[nn.Module, ...] = ()
    if model.excludes_own_values(layer):
        pieces += (Exclusive(visits, heads, name="exclusive"),)
    if model.head_gate:
        pieces += (HeadGate(visits, heads, name="head_gate"),)
    return (GatedExclusive(*pieces),) if len(pieces) == 2 else pieces
