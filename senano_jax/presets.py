"""The systems of the record table, and ideas for fewer tokens, each as a difference from another."""

import dataclasses
import re
from collections.abc import Callable

from senano_jax.config import Config, DataConfig, Gpt2Config, LayerSchedule, ModelConfig, Stage, changed
from senano_jax.data import sample
from senano_jax.errors import UserError
from senano_jax.model.schedule import Weighted
from senano_jax.model.soft_cap import SoftCap
from senano_jax.optim.config import (
    AdamRule,
    Cooldown,
    LookAhead,
    Mixture,
    MuonRule,
    Ramp,
    Recipe,
    TailAverage,
    WarmupCosine,
)
from senano_jax.preset_file import made, names_file, preset_of_file


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


def polar_express() -> Config:
    """The record with another orthogonalisation in Muon: Polar Express (Amsel et al., arXiv 2505.16932)."""
    return changed(recurrent(), {"optimizer.matrices.iteration": "polar-express"})


def batch_ramp() -> Config:
    """The record's tokens in a ramp of the batch, in thirds of the steps, as the speed record of modded-nanogpt has it.

    Its rates are 1, 2^0.6 and 3^0.5 at 131,072, 262,144 and 393,216 tokens; here they are relative to the last. The
    sequences are shorter than the record's, so that eight devices share every step.
    """
    return changed(
        recurrent(),
        {
            "steps": 2550,
            "seq_len": 16_384,
            "stages": (
                Stage(part=1, batch_tokens=131_072, rate=3**-0.5),
                Stage(part=1, batch_tokens=262_144, rate=2**0.6 * 3**-0.5),
                Stage(part=1),
            ),
        },
    )


def normuon() -> Config:
    """NorMuon (Li et al., arXiv 2510.05491) with the matrices and rates that modded-nanogpt gives it: queries and keys
    of two heads together, a lower rate, a fourfold one for the second projection of the MLP."""
    return changed(
        polar_express(),
        {
            "optimizer.matrices.rate": 0.023,
            "optimizer.matrices.neuron_b2": 0.9,
            "optimizer.matrices.query_key_columns": 256,
            "optimizer.matrices.down_rate": 4.0,
        },
    )


def cautious_decay() -> Config:
    """Weight decay of the matrices where the step shrinks a weight too (Chen et al., arXiv 2510.12402), as in
    modded-nanogpt."""
    return changed(normuon(), {"optimizer.matrices.decay": 1.2})


def falling_momentum() -> Config:
    """Muon's momentum falls again over the last 50 steps, as in modded-nanogpt."""
    return changed(cautious_decay(), {"optimizer.matrices.momentum.cooldown_steps": 50})


def long_cooldown() -> Config:
    """Learning rates fall over the last 60% of the steps, to 0.15 of what they were, as in modded-nanogpt."""
    return changed(falling_momentum(), {"optimizer.schedule": Cooldown(fraction=0.6, floor=0.15)})


def rare_adam() -> Config:
    """Adam with float32 moments, at every second step on the sum of two gradients, as in modded-nanogpt."""
    groups = ("head", "embeddings", "scalars")
    state = {f"optimizer.{group}.state": "float32" for group in groups}
    return changed(long_cooldown(), state | {f"optimizer.{group}.every": 2 for group in groups})


def mixed_momentum() -> Config:
    """Muon's momentum as a mixture of a fast and a slow average from 31% of the run on: Bi-Maxwell, modded-nanogpt's
    slow track."""
    mixture = Mixture(start=1000 / 3250, fast=0.85, slow=0.98, share=0.4385)
    return changed(rare_adam(), {"optimizer.matrices.mixture": mixture})


def strict() -> Config:
    """The record with at most 162,000,000 parameters, read strictly: the last layer's MLP is narrower by 256 units."""
    return changed(recurrent(), {"model.mlp_widths": ((11, 2816),)})


def head_gate() -> Config:
    """A gate on what each attention head gives (modded-nanogpt of 2025-08), with weights of its own for each visit."""
    return changed(strict(), {"model.head_gate": True})


def exclusive() -> Config:
    """What a head gives loses a learned share along the token's own value (modded-nanogpt of 2026-05 has it by layer),
    by visit."""
    return changed(strict(), {"model.exclusive_attention": True})


def key_offset() -> Config:
    """Keys of the layers with the long window tell of the token before theirs (modded-nanogpt of 2025-12)."""
    return changed(strict(), {"model.key_offset": "long"})


def paired_heads() -> Config:
    """Heads of half of the layers with the short window attend in pairs, after modded-nanogpt of 2026-01."""
    return changed(strict(), {"model.paired_heads": (1, 5, 9)})


def values_from_x0() -> Config:
    """The embedding, by a matrix of their own, adds to the values of three layers, which costs less than tables of
    values by token; the MLPs of five layers are narrower for it, so that parameters stay below 162,000,000."""
    widths = tuple((layer, 2816) for layer in (1, 2, 9, 10, 11))
    return changed(strict(), {"model.values_from_x0": (1, 10, 11), "model.mlp_widths": widths})


def smear() -> Config:
    """Each token's embedding takes some of that of the token before (modded-nanogpt of 2025-09)."""
    return changed(strict(), {"model.smear": True})


def weighted() -> Config:
    """No skip connections over depth: weights of the residual stream and of what is added to it, by application
    (modded-nanogpt of 2026-03 has them by layer), and less added by the layers of the loop (arXiv 2606.18524)."""
    return changed(strict(), {"model.trunk": Weighted()})


def output_init() -> Config:
    """Each sublayer adds something from the start on, attention as in modded-nanogpt since 2026-02; the MLP does so in
    its slow track, from numbers twice as large. Layers of the loop add less (`weighted`), as they do at every visit."""
    return changed(weighted(), {"model.output_init": 0.5})


def shifted_cap() -> Config:
    """The soft-cap of modded-nanogpt since 2025-10: logits 23 sigmoid((z + 5) / 7.5), not divided by the root of the
    width, and the head's learning rate divided by it instead."""
    cap = SoftCap(height=23.0, divisor=7.5, shift=5.0, by_width=False)
    return changed(strict(), {"model.cap": cap, "optimizer.head.rate": 0.008})


def multi_token() -> Config:
    """Each token also predicts the second one ahead in the first two thirds of the run, and the third one in the first
    third, from the same logits and with falling weights, as in modded-nanogpt since 2025-12."""
    stages = (
        Stage(part=1, ahead=((1.0, 1.0), (0.5, 0.5), (0.25, 0.0))),
        Stage(part=1, ahead=((1.0, 1.0), (0.5, 0.0))),
        Stage(part=1),
    )
    return changed(strict(), {"stages": stages})


def prefix() -> Config:
    """Each token also predicts the longest token that the next one begins with, in the first two thirds of the run, as
    in modded-nanogpt since 2026-07. It needs GPT-2's tables in data/gpt2."""
    base = multi_token()
    weights = ((0.25, 0.25), (0.25, 0.0), (0.0, 0.0))
    stages = tuple(dataclasses.replace(stage, prefix=pair) for stage, pair in zip(base.stages, weights, strict=True))
    return changed(base, {"stages": stages, "data.bpe_dir": "data/gpt2"})


def look_ahead() -> Config:
    """Gradients ahead of the weights from a tenth to two thirds of the run: EMA-Nesterov (arXiv 2605.25395) with the
    numbers of modded-nanogpt's slow track, result 46."""
    ahead = LookAhead(distance=0.3, decay=0.99, start=300 / 2900, end=1950 / 2900)
    return changed(mixed_momentum(), {"optimizer.look_ahead": ahead})


def tail_average() -> Config:
    """The weights of the end of the run are blended with their average, but for the embeddings: modded-nanogpt's slow
    track, result 46."""
    average = TailAverage(start=2400 / 2900, horizon=150 / 2900, share=0.6, groups=("matrices", "head", "scalars"))
    return changed(look_ahead(), {"optimizer.average": average})


PRESETS: dict[str, Callable[[], Config]] = {
    "recurrent": recurrent,
    "no-value-embeddings": no_value_embeddings,
    "value-embeddings": value_embeddings,
    "llmc": llmc,
    "demo": demo,
    "polar-express": polar_express,
    "batch-ramp": batch_ramp,
    "normuon": normuon,
    "cautious-decay": cautious_decay,
    "falling-momentum": falling_momentum,
    "long-cooldown": long_cooldown,
    "rare-adam": rare_adam,
    "mixed-momentum": mixed_momentum,
    "look-ahead": look_ahead,
    "tail-average": tail_average,
    "strict": strict,
    "head-gate": head_gate,
    "exclusive": exclusive,
    "key-offset": key_offset,
    "paired-heads": paired_heads,
    "values-from-x0": values_from_x0,
    "smear": smear,
    "weighted": weighted,
    "output-init": output_init,
    "shifted-cap": shifted_cap,
    "multi-token": multi_token,
    "prefix": prefix,
}


_OURS = frozenset(PRESETS)


def preset(name: str) -> Config:
    """The configuration called `name`, or that of a Python file's function: FILE.py:FUNCTION.

    Raises UserError with the known names for another one, and for a function or a file that makes none.
    """
    if names_file(name):
        return preset_of_file(name)
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'; choose one of {', '.join(PRESETS)}; or give FILE.py:FUNCTION")
    return PRESETS[name]() if name in _OURS else made(PRESETS[name], name)


def preset_names() -> tuple[str, ...]:
    """The presets of this package, then those that were registered."""
    return tuple(PRESETS)


def register(name: str, function: Callable[[], Config]) -> None:
    """Makes the configuration that `function` returns a preset of this process, in place of one registered before.

    Raises UserError for the name of a preset of this package, and for one that a command line could not give.
    """
    if name in _OURS:
        raise UserError(f"there is a preset {name!r} already; choose another name")
    if not re.fullmatch(r"\w[\w.+-]*", name) or names_file(name):
        raise UserError(f"{name!r} cannot name a preset; use letters, digits and . _ + -")
    PRESETS[name] = function
