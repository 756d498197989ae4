"""Flags of a training that takes seconds and saves at every step, for tests of what may befall one."""

STEPS = 6  # few, as each is saved, which takes longer than the step
SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    f"--steps={STEPS}", "--batch-tokens=128", "--seq-len=128", "--final-window-tokens=128",
    "--data.val-tokens=128", "--data.val-seq-len=128", "--val-every=0", "--devices=1", "--checkpoint-every=1",
]  # fmt: skip
