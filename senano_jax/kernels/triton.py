"""pallas_call through the Triton compiler: the one place that knows JAX's unstable names for it.

The names are the same in JAX 0.10 to 0.12: the class of `compiler_params` selects Triton. From 0.11 on, lowering warns
that Triton under Pallas is deprecated (for Mosaic GPU); our users can do nothing about it, so the warning stops here.
"""

import struct
import warnings
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.experimental.pallas.triton import load as load

from senano_jax.kernels.triton_sizes import fits as fits

warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


class Launch(Protocol):
    """How Triton compiles a kernel; each kernel's own class adds a program's share of the work."""

    warps: int  # of 32 threads
    stages: int  # depth of the software pipeline that loads the next tiles


@dataclass(frozen=True)
class RowLaunch:
    """A launch whose programs own whole rows, with nothing to pipeline."""

    rows: int  # of a program
    warps: int  # of 32 threads
    stages: int = 1


@dataclass(frozen=True)
class HeadLaunch:
    """A launch whose programs own some heads of some tokens."""

    tokens: int  # of a program
    heads: int  # of a program, for all of which it reads tables once; fewer if this does not divide the model's
    warps: int  # of 32 threads
    stages: int = 1  # nothing to pipeline: other programs on the multiprocessor hide the loads


Kind = TypeVar("Kind", bound=Launch)


@dataclass(frozen=True)
class Launches(Generic[Kind]):
    """Of a kernel and of that of its gradients."""

    forward: Kind
    backward: Kind


def call(
    kernel, *, name, grid, in_specs, out_specs, out_shape, launch: Launch, interpret: bool,
    written_into: dict[int, int] | None = None,
):  # fmt: skip
    """`pallas_call` for Triton, with the warps and stages of `launch`; `written_into` are the inputs whose memory
    becomes that of an output, with the number of that."""
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=interpret,
        input_output_aliases=written_into or {},
    )


def scaled_exp2(interpret: bool):
    """The function (x, factor, shift) -> exp2(x * factor - shift); float32, shift broadcast to x.

    Triton under XLA neither fuses the product with the sum nor flushes denormals in exp2, six instructions in all, and
    this is the inner loop's inner loop; in PTX it is two.
    """
    return _exp2_interpreted if interpret else _exp2_ptx


def _exp2_interpreted(x, factor: float, shift):
    return jnp.exp2(x * factor - shift)


def _exp2_ptx(x, factor: float, shift):
    constant = "0f" + struct.pack(">f", factor).hex().upper()
    [result] = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; neg.f32 t, $2; fma.rn.ftz.f32 t, $1, {constant}, t; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, jnp.broadcast_to(shift, x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def reciprocal(interpret: bool):
    """The function x -> 1 / x; float32, one instruction where a division is ten."""
    return _reciprocal_interpreted if interpret else _reciprocal_ptx


def _reciprocal_interpreted(x):
    return 1 / x


def _reciprocal_ptx(x):
    [result] = plgpu.elementwise_inline_asm(
        "rcp.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result
