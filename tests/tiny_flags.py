"""Flags of a training that takes seconds and saves at every step, for tests of what may befall one."""

SMALL = [
    "demo", "--model.dim=16", "--model.num-heads=2", "--model.layers.loop=0", "--model.layers.visits=0",
    "--steps=12", "--batch-tokens=256", "--seq-len=256", "--final-window-tokens=256",
    "--data.val-tokens=256", "--data.val-seq-len=256", "--val-every=0", "--devices=1", "--checkpoint-every=1",
]  # fmt: skip
