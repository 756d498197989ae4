"""pallas_call through the Triton compiler: the one place that knows JAX's unstable names for it.

The names are the same in JAX 0.10 to 0.12: the class of `compiler_params` selects Triton. From 0.11 on, lowering warns
that Triton under Pallas is deprecated (for Mosaic GPU); our users can do nothing about it, so the warning stops here.
"""

import warnings

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from senano_jax.attention.tiles import Tile

warnings.filterwarnings("ignore", message=".*[Tt]riton.*", category=DeprecationWarning, module="jax.*")


def call(kernel, *, name, grid, in_specs, out_specs, out_shape, tile: Tile, interpret: bool):
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )
