"""A model by hand: its weights, its loss, a gradient check, a few steps. In cells; half a minute on a CPU."""

# %% A model and its weights. Nothing here needs a run.
import jax
import jax.numpy as jnp
import optax

from senano_jax import changed, count_parameters, make_model, preset
from senano_jax.data.shards import find_shards, open_shard

config = changed(preset("demo"), {"model.head_gate": True})
model = make_model(config.model, config.dtype)
tokens_T = jnp.asarray(open_shard(find_shards(config.data.train_files)[0])[: 4 * 129], jnp.int32)
tokens_BT = tokens_T.reshape(4, 129)  # token t + 1 is the target of token t
inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
params = jax.jit(model.init)(jax.random.key(0), inputs_BT, targets_BT, 1)["params"]
print(f"{count_parameters(params):,} parameters, {', '.join(params)}")


# %% The loss. The model gives the sum over all tokens; its last argument is the window, in blocks of 128 tokens.
@jax.jit
@jax.value_and_grad
def loss_and_gradients(params):
    return model.apply({"params": params}, inputs_BT, targets_BT, 1) / targets_BT.size


loss, gradients = loss_and_gradients(params)
print(f"loss {loss:.4f} nats a token; ln(padded vocabulary) {jnp.log(config.model.padded_vocab_size):.4f}")

# %% Steps by hand. The head starts with zeros: the first step moves it alone.
optimizer = optax.adam(1e-2)
state, losses = optimizer.init(params), []


@jax.jit
def step(params, state, gradients):
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state


for _ in range(10):
    loss, gradients = loss_and_gradients(params)
    params, state = step(params, state, gradients)
    losses.append(float(loss))
print("losses", " ".join(f"{loss:.2f}" for loss in losses))

# %% Gradient check: the slope along the gradient, by differences of the loss and from the gradient itself.
_, gradients = loss_and_gradients(params)
norm = float(optax.tree.norm(gradients))
far = 0.02 / norm
ends = [loss_and_gradients(jax.tree.map(lambda p, g, s=s: p + s * far * g, params, gradients))[0] for s in (1, -1)]
slope = float(ends[0] - ends[1]) / (2 * far * norm)
print(f"slope {slope:.5f} by differences, {norm:.5f} by the gradient")

# %% What it says comes after the first eight tokens: the five most probable ones.
logits = jax.jit(lambda params: model.apply({"params": params}, inputs_BT[:1], 1, 7, method=model.logits))
print(jax.lax.top_k(logits(params)[0, : config.model.vocab_size], 5)[1])
