"""The compiled training step and evaluation step: data-parallel, one reduction each, what changes by step traced."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from senano_jax.model.build import Model, Params
from senano_jax.optim.shares import Shares
from senano_jax.training.mesh import DATA_AXIS
from senano_jax.training.reduction import reduced
from senano_jax.training.state import TrainState, state_shardings


class StepMetrics(NamedTuple):
    """Of one step, float32."""

    loss: Float[Array, ""]  # a token, before the update; with weights, of all that is weighted
    grad_norm: Float[Array, ""]  # of the summed loss, over all parameters


def summed_gradients(
    model: Model,
    params: Params,
    tokens_AST: Int[Array, "A S T+1"],
    window_blocks: Int[Array, ""] | int,
    loss_weights: Float[Array, "K"] | None = None,
    visits: int | None = None,
) -> tuple[Float[Array, ""], Params]:
    """The loss summed over all tokens, one micro-batch after the other, and its gradients, all in float32."""
    options = _given(loss_weights=loss_weights, visits=visits)
    # A float32 view of a bfloat16 embedding makes its gradient accumulate in float32.
    params32 = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def summed_loss(params, tokens_ST):
        return model.apply({"params": params}, tokens_ST[:, :-1], tokens_ST[:, 1:], window_blocks, **options)

    def accumulate(total, tokens_ST):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(summed_loss)(params32, tokens_ST)), None

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params32))
    total, _ = jax.lax.scan(accumulate, zeros, tokens_AST)
    return total


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    visits: int | None = None,
    shares: Shares | None = None,
    reduce_dtype: DTypeLike = jnp.float32,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """A jitted (state, tokens, window_blocks, loss_weights=None, rate=None) -> (state, metrics).

    What follows the tokens are `StepInputs`. The model's loop is applied `visits` times, or as configured.

    `tokens` [A, S, T+1] holds A micro-batches; their S sequences are sharded over the mesh, and token t+1 is the target
    of token t. Gradients of the summed loss are added over micro-batches in float32, reduced once over the devices, and
    rounded to their parameter's type: up to the order of sums the update depends on the set of sequences alone. The
    given state is donated. The optimiser must have been made with this mesh's axis name; one that asks for it is told
    over how many `tokens` the gradients are summed, and the `rate` that multiplies its learning rates. `shares` are
    those that it was made with; `reduce_dtype` is the type in which gradients travel between devices.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def local_step(state: TrainState, tokens_AST, window_blocks, loss_weights, rate):
        loss, gradients = summed_gradients(model, state.params, tokens_AST, window_blocks, loss_weights, visits)
        with jax.named_scope("reduce"):
            loss = jax.lax.psum(loss, DATA_AXIS)
            gradients, stacks, grad_norm = reduced(gradients, shares, reduce_dtype)

        A, S, length = tokens_AST.shape
        trained = A * S * (length - 1) * jax.lax.axis_size(DATA_AXIS)
        with jax.named_scope("optimizer"):
            gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.params)
            options = _given(tokens=trained, rate=rate, stacks=stacks)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, **options)
            params = optax.apply_updates(state.params, updates)

        return TrainState(state.step + 1, params, opt_state), StepMetrics(loss / trained, grad_norm)

    def step(state: TrainState, tokens_AST, window_blocks, loss_weights=None, rate=None):
        of_state = jax.tree.map(lambda sharding: sharding.spec, state_shardings(state, mesh))
        sharded = jax.shard_map(
            local_step,
            mesh=mesh,
            in_specs=(of_state, P(None, DATA_AXIS), P(), P(), P()),
            out_specs=(of_state, P()),
            check_vma=False,
        )
        return sharded(state, tokens_AST, window_blocks, loss_weights, rate)

    return jax.jit(step, donate_argnums=0)


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None: of the others, models and optimisers need know nothing."""
    return {name: value for name, value in options.items() if value is not None}


def make_eval_step(
    model: Model, mesh: Mesh
) -> Callable[[Params, Int[Array, "S T+1"], Float[Array, "N"], Int[Array, ""]], Float[Array, ""]]:
    """A jitted (params, tokens, weights, window_blocks) -> summed loss, equally many sequences on each device.

    `weights` has an entry a device: 1 if its sequences count and 0 if they fill up the last round.
    """

    def step(params, tokens_RT, weights_1, window_blocks):
        loss = model.apply({"params": params}, tokens_RT[:, :-1], tokens_RT[:, 1:], window_blocks)
        return jax.lax.psum(loss * weights_1[0], DATA_AXIS)

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(DATA_AXIS), P(DATA_AXIS), P()), out_specs=P(), check_vma=False
    )
    return jax.jit(sharded)
