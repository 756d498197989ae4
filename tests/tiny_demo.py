"""A demo that is quick to compile: one layer on each side, two steps, AdamW. Presets, examples and pages are tried
with it."""

from senano_jax.config import Config, changed
from senano_jax.presets import demo, llmc


def tiny_demo() -> Config:
    """The configuration."""
    return changed(
        demo(),
        {
            "model.dim": 16,
            "model.attention": "dense",
            "model.layers.loop": 0,
            "model.layers.visits": 0,
            "optimizer": llmc().optimizer,
            "steps": 2,
            "batch_tokens": 512,
            "seq_len": 256,
            "final_window_tokens": 256,
            "data.val_tokens": 512,
            "data.val_seq_len": 512,
            "val_every": 0,
            "devices": 1,
        },
    )
