"""What a configuration may be: the presets as they are, and one line on everything that cannot work."""

import dataclasses
import re

import pytest

from senano_jax.config import Config, LayerSchedule
from senano_jax.config_check import check_config, check_split
from senano_jax.errors import UserError
from senano_jax.plan import Plan
from senano_jax.presets import PRESETS, preset


def changed(config: Config, field: str, value) -> Config:
    """`field` may name one of the model's, the data's or the optimiser's, as the flags do: "data.val_tokens"."""
    outer, _, inner = field.partition(".")
    if inner:
        value = changed(getattr(config, outer), inner, value)
    return dataclasses.replace(config, **{outer: value})


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_work(name):
    """As they are, on one device and on several."""
    config = preset(name)
    check_config(config)
    for devices in (1, 2, 4):
        check_split(Plan(config), devices, 1)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    """The name given and every name there is."""
    message = refusal(preset, "recurent")
    assert "'recurent'" in message
    assert all(name in message for name in PRESETS)


@pytest.mark.parametrize(
    ("name", "trained_tokens", "sequences", "val_seq_len", "positions"),
    [
        ("recurrent", 668_467_200, 16, 131_072, 30),
        ("no-value-embeddings", 747_110_400, 16, 131_072, 12),
        ("value-embeddings", 695_992_320, 8, 262_144, 12),
    ],
)
def test_record_presets_are_the_published_runs(name, trained_tokens, sequences, val_seq_len, positions):
    """Tokens trained on in all, sequences a step, validation, and the depth of the schedule with its mirrored skips."""
    config = preset(name)
    assert config.steps * config.batch_tokens == trained_tokens
    assert (config.batch_sequences, config.batch_tokens, config.dtype) == (sequences, 393_216, "bfloat16")
    assert (config.data.val_tokens, config.data.val_seq_len, config.val_every) == (10_485_760, val_seq_len, 125)
    layers = config.model.layers
    assert (layers.layers, layers.positions, config.model.trunk.skips(layers)) == (12, positions, positions // 2)
    assert (config.model.dim, config.model.head_dim) == (768, 128)
    assert (config.model.vocab_size, config.model.padded_vocab_size) == (50_257, 50_304)


def test_llmc_is_the_published_run():
    """10,486M tokens: 20,000 steps of 512 sequences of 1,024, validated on as short ones."""
    config = preset("llmc")
    assert config.steps * config.batch_tokens == 10_485_760_000
    assert (config.batch_sequences, config.seq_len, config.dtype) == (512, 1024, "bfloat16")
    assert (config.data.val_tokens, config.data.val_seq_len) == (10_485_760, 1024)
    model, optimizer = config.model, config.optimizer
    assert (model.dim, model.num_heads, model.head_dim, model.num_layers, model.max_length) == (768, 12, 64, 12, 1024)
    rule = optimizer.matrices
    assert (rule.b1, rule.b2, rule.decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize(
    "field",
    [
        *("steps", "batch_tokens", "seq_len", "final_window_tokens", "devices", "micro_batches"),
        *("data.val_tokens", "data.val_seq_len", "model.dim", "model.num_heads", "model.mlp_expansion"),
        *("model.vocab_size", "model.layers.prelude"),
    ],
)
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(field, value):
    """Flag, value, and the least that is allowed; never a division by zero."""
    message = refusal(check_config, changed(preset("recurrent"), field, value))
    assert f"--{field.replace('_', '-')} is {value}; it must be at least 1" in message


@pytest.mark.parametrize(
    "field",
    [
        *(
            "val_every",
            "checkpoint_every",
            "data.discard_micro_batch",
            "optimizer.matrices.momentum.warmup_steps",
            "seed",
        ),
        *("model.layers.loop", "model.layers.visits", "model.value_embeddings"),
    ],
)
def test_some_counts_may_be_zero_but_not_negative(field):
    """Zero has a meaning for each of them."""
    check_config(changed(preset("no-value-embeddings"), field, 0))
    message = refusal(check_config, changed(preset("recurrent"), field, -1))
    assert f"--{field.replace('_', '-')} is -1; it must not be negative" in message


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"initial_window_tokens": 1729}, ["--initial-window-tokens 1729", "--final-window-tokens 1728", "only grows"]),
        ({"model.num_heads": 5}, ["--model.dim 768", "--model.num-heads 5", "multiple of the number of heads"]),
        ({"model.dim": 12}, ["--model.dim 12", "--model.num-heads 6", "heads of 2", "multiple of 4"]),
        (
            {"model.padded_vocab_size": 50_256},
            ["--model.padded-vocab-size 50256", "below --model.vocab-size 50257"],
        ),
        ({"model.layers": LayerSchedule(3, 6, 4, 2)}, ["prelude 3", "--model.layers.coda 2", "must be equal"]),
        ({"model.layers": LayerSchedule(3, 5, 4, 3)}, ["--model.layers.loop 5", "visits 4", "must both be even"]),
        ({"model.layers": LayerSchedule(3, 6, 3, 3)}, ["--model.layers.loop 6", "visits 3", "must both be even"]),
        ({"model.layers": LayerSchedule(3, 6, 0, 3)}, ["--model.layers.loop 6", "visits 0"]),
        ({"model.layers": LayerSchedule(0, 6, 4, 0)}, ["--model.layers.prelude is 0", "at least 1"]),
        ({"model.layers.long_windows": (0, 12)}, ["--model.layers.long-windows names layer 12", "layers 0 to 11"]),
        (
            {"model.layers.no_attention": (0,)},
            ["--model.layers.no-attention names layer 0", "--model.value-embeddings"],
        ),
        (
            {"model.value_embeddings": 4},
            ["--model.value-embeddings 4", "--model.layers.prelude 3", "at most one table"],
        ),
        ({"seq_len": 24_500}, ["--seq-len 24500", "multiple of 128"]),
        ({"data.val_seq_len": 1000}, ["--data.val-seq-len 1000", "multiple of 128"]),
        (
            {"seq_len": 1024, "batch_tokens": 4096},
            ["--final-window-tokens 1728", "--seq-len 1024", "shorten the window or lengthen the sequence"],
        ),
        ({"batch_tokens": 400_000}, ["--batch-tokens 400000", "--seq-len 24576", "the nearest is 393216"]),
        ({"batch_tokens": 100}, ["--batch-tokens 100", "the nearest is 24576"]),
        ({"data.val_tokens": 10_000_000}, ["--data.val-tokens 10000000", "131072", "the nearest is 9961472"]),
        ({"optimizer.schedule.fraction": 1.5}, ["--optimizer.schedule.fraction is 1.5", "0 to 1"]),
        ({"optimizer.schedule.fraction": float("nan")}, ["--optimizer.schedule.fraction is nan", "0 to 1"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_one_line(changes, fragments):
    """It names the flags and their values, and what to do."""
    config = preset("recurrent")
    for field, value in changes.items():
        config = changed(config, field, value)
    message = refusal(check_config, config)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"seq_len": 2048}, ["--seq-len 2048", "--model.max-length 1024", "shorten the sequence"]),
        ({"data.val_seq_len": 4096}, ["--data.val-seq-len 4096", "--model.max-length 1024"]),
        ({"seq_len": 512}, ["--final-window-tokens 1024", "--seq-len 512"]),
        ({"model.num_layers": 0}, ["--model.num-layers is 0", "at least 1"]),
        ({"model.max_length": -1}, ["--model.max-length is -1", "at least 1"]),
        ({"model.num_heads": 7}, ["--model.dim 768", "--model.num-heads 7"]),
        ({"optimizer.matrices.b2": 1.1}, ["--optimizer.matrices.b2 is 1.1", "from 0, and below 1"]),
        ({"optimizer.clip_norm": float("inf")}, ["--optimizer.clip-norm is inf", "0 or more"]),
        ({"optimizer.schedule.warmup_steps": -1}, ["--optimizer.schedule.warmup-steps is -1", "must not be negative"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_gpt2_has_limits_of_its_own(changes, fragments):
    """The same lines for the values that only it has."""
    config = preset("llmc")
    for field, value in changes.items():
        config = changed(config, field, value)
    message = refusal(check_config, config)
    for fragment in fragments:
        assert fragment in message


def test_the_nearest_value_that_is_proposed_is_accepted():
    """Advice that is followed must work."""
    for field, value in (("batch_tokens", 400_000), ("batch_tokens", 1), ("data.val_tokens", 10_000_000)):
        message = refusal(check_config, changed(preset("recurrent"), field, value))
        proposed = int(re.search(r"the nearest is (\d+)", message)[1])
        check_config(changed(preset("recurrent"), field, proposed))


@pytest.mark.parametrize(("devices", "micro_batches"), [(3, 1), (8, 4), (1, 5), (32, 1)])
def test_a_step_that_cannot_be_dealt_out_is_refused(devices, micro_batches):
    """The numbers and the three flags that can mend it."""
    message = refusal(check_split, Plan(preset("recurrent")), devices, micro_batches)
    assert "16 sequences" in message
    assert f"{devices} devices x {micro_batches} micro-batches" in message
    assert "change --devices, --micro-batches or --batch-tokens" in message


def test_even_splits_are_accepted():
    """All ways of dealing 16 sequences to powers of two."""
    for devices in (1, 2, 4, 8, 16):
        for micro_batches in (1, 2, 4, 8, 16):
            if devices * micro_batches <= 16:
                check_split(Plan(preset("recurrent")), devices, micro_batches)
