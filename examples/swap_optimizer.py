"""Another optimiser on the demo, compared over three seeds. In cells; ten minutes on two CPU cores."""

# %% An optimiser of your own: the sign of a moving average of the gradients.
import jax
import jax.numpy as jnp
import optax

from senano_jax import changed, comparison, fit, preset


def sign_descent(steps, rate=1e-3, decay=0.9):
    def update(gradients, average, params=None):
        average = jax.tree.map(lambda a, g: decay * a + (1 - decay) * g, average, gradients)
        return jax.tree.map(jnp.sign, average), average

    by_sign = optax.GradientTransformation(optax.tree.zeros_like, update)
    return optax.chain(by_sign, optax.scale_by_learning_rate(optax.linear_schedule(rate, 0, steps)))


# %% The recipe of the demo (Muon for the matrices, Adam for the rest) and both others, with three seeds each.
runs = {"Muon": [], "AdamW": [], "sign descent": []}
for seed in range(3):
    config = changed(preset("demo"), {"seed": seed})
    runs["Muon"].append(fit(config))
    runs["AdamW"].append(fit(config, optax.adamw(3e-3), name="adamw"))
    runs["sign descent"].append(fit(config, sign_descent))

# %% The tables. Losses are in nats a token; the target is the mean of the first row.
result = comparison(runs)
print(result)
