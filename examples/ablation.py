"""An ablation: each idea alone against the base, over three seeds. In cells; ten minutes on two CPU cores.

Studies of many runs on several GPUs: scripts/ablate.py, which keeps what is finished and goes on after a stop.
"""

# %% The variants, each a difference to the demo.
from senano_jax import changed, comparison, fit, preset
from senano_jax.runlog.statistics import Sample

VARIANTS = {"base": {}, "head gate": {"model.head_gate": True}}
SEEDS = range(3)

# %% The runs. A seed decides the initial weights alone: all read the same tokens in the same order.
runs = {
    name: [fit(changed(preset("demo"), {**changes, "seed": seed}), quiet=True) for seed in SEEDS]
    for name, changes in VARIANTS.items()
}

# %% Differences to the base, seed by seed, with the 95% interval of their mean.
differences = {}
for name in list(VARIANTS)[1:]:
    pairs = zip(runs[name], runs["base"], strict=True)
    differences[name] = Sample.of([run.final_loss - base.final_loss for run, base in pairs])
    print(f"{name}: {differences[name].mean:+.4f} ± {differences[name].half_width():.4f} nats a token")

# %% All figures: tokens to the base's loss, tests, time.
result = comparison(runs)
print(result)
