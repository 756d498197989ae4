"""The systems of the record table, each as a difference from the one before, and a small one to try."""

import dataclasses

from senano_jax.config import Config, DataConfig, Gpt2Config, LayerSchedule, ModelConfig
from senano_jax.data import sample
from senano_jax.optim.config import AdamRule, Cooldown, MuonRule, Ramp, Recipe, WarmupCosine


def llmc() -> Config:
    """GPT-2 of 124M parameters as llm.c trains it, 10,485.76M tokens: the baseline of the record's history.

    It attends over all of its short sequence, whatever the documents in it.
    """
    return Config(
        model=Gpt2Config(dim=768, num_heads=12, num_layers=12),
        data=DataConfig(
            train_files="data/fineweb10B/fineweb_train_*.bin",
            val_files="data/fineweb10B/fineweb_val_*.bin",
            val_tokens=10_485_760,
            val_seq_len=1024,
        ),
        optimizer=Recipe(
            matrices=AdamRule(rate=6e-4, b1=0.9, b2=0.95, eps=1e-8, decay=0.1),
            schedule=WarmupCosine(warmup_steps=700),
            mean_gradients=True,
            clip_norm=1.0,
        ),
        steps=20_000,
        batch_tokens=512 * 1024,
        seq_len=1024,
        initial_window_tokens=1024,
        final_window_tokens=1024,
        val_every=250,
    )


def value_embeddings() -> Config:
    """modded-nanogpt of 2025-05-25, 695.99M tokens: 12 layers once, with values by token in six of them."""
    base = llmc()
    return dataclasses.replace(
        base,
        model=ModelConfig(
            dim=768,
            num_heads=6,
            layers=LayerSchedule(prelude=6, loop=0, visits=0, coda=6, long_windows=(0, 4, 7, 11), no_attention=(7,)),
            value_embeddings=3,
        ),
        data=dataclasses.replace(base.data, val_seq_len=262_144),
        optimizer=Recipe(
            matrices=MuonRule(rate=0.05, momentum=Ramp(start=0.85, end=0.95, warmup_steps=300)),
            head=AdamRule(rate=0.22, b1=0.8, b2=0.95, eps=1e-10),
            embeddings=AdamRule(rate=0.6, b1=0.8, b2=0.95, eps=1e-10),
            scalars=AdamRule(rate=0.04, b1=0.8, b2=0.95, eps=1e-10),
            schedule=Cooldown(fraction=0.4, floor=0.1),
        ),
        steps=1770,
        batch_tokens=8 * 49_152,
        seq_len=49_152,
        initial_window_tokens=0,
        final_window_tokens=1728,
        val_every=125,
    )


def no_value_embeddings() -> Config:
    """747.11M tokens: without the tables, which the rules count as parameters, and with attention in every layer; all
    mix in the first one's values instead, and long and short windows alternate."""
    base = value_embeddings()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, layers=LayerSchedule(prelude=6, loop=0, visits=0, coda=6), value_embeddings=0
        ),
        data=dataclasses.replace(base.data, val_seq_len=131_072),
        steps=1900,
        seq_len=24_576,
    )


def recurrent() -> Config:
    """The record, 668.47M tokens: the six middle layers are applied four times over the same weights."""
    base = no_value_embeddings()
    layers = LayerSchedule(prelude=3, loop=6, visits=4, coda=3)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, layers=layers, unroll=True), steps=1700)


def demo() -> Config:
    """A narrow recurrent model on the bundled sample; minutes on two CPU cores."""
    base = recurrent()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            dim=64,
            num_heads=2,
            layers=LayerSchedule(prelude=1, loop=2, visits=2, coda=1),
            unroll=False,
        ),
        data=DataConfig(
            train_files=sample.TRAIN,
            val_files=sample.VAL,
            val_tokens=32_768,
            val_seq_len=4096,
        ),
        steps=32,
        batch_tokens=4096,
        seq_len=1024,
        final_window_tokens=512,
        val_every=16,
        dtype="float32",
    )
