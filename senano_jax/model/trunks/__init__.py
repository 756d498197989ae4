"""How the residual stream runs through the layers: a trunk in each file.

A trunk is a linen module called with the context of the layers and the number of visits of the loop, None for those of
the configuration; it returns the residual stream [B, T, D] that the output head reads, not normalised. It owns the
layers, layer_<n> or loop.layer_<n>, and whatever weights connect them, in the scope of the model.
"""

from flax import linen as nn

from senano_jax.model.config import ModelConfig
from senano_jax.model.schedule import Weighted
from senano_jax.model.trunks.depth import DepthTrunk
from senano_jax.model.trunks.unet import UNetTrunk
from senano_jax.model.trunks.weighted import WeightedTrunk


def trunk_of(model: ModelConfig) -> nn.Module:
    """The trunk that a configuration asks for; a new one needs a line here."""
    if not isinstance(model.trunk, Weighted):
        return UNetTrunk(model)
    return WeightedTrunk(model) if model.trunk.depth_block is None else DepthTrunk(model)
