"""A demo of one layer on each side and of two steps: what the presets, the examples and the pages are tried with."""

from senano_jax.config import Config, changed
from senano_jax.presets import demo


def tiny_demo() -> Config:
    """The configuration."""
    return changed(
        demo(),
        {
            "model.dim": 16,
            "model.attention": "dense",
            "model.layers.loop": 0,
            "model.layers.visits": 0,
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
