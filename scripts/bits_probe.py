"""Computes what a revision of the package computes: weights, losses, gradients and steps of every preset, to the bit.

    python scripts/bits_probe.py --store DIR --report FILE [--devices N] [--full] PRESET ...

`same_bits.py` starts this file once for each of two trees, with that tree's package on the path, and compares. A tree
that has a copy of this file is measured by it, so the calls below follow their own tree; one that has none is older,
and `from_first` finds its names where they were. The arguments and the report must stay as they are.

The weights of the steps are drawn here and by name, so that no zero matrix hides what it multiplies, and a parameter
keeps its numbers whatever stands beside it.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from senano_jax.errors import one_line_errors
from senano_jax.presets import PRESETS, preset

END_OF_TEXT = 50_256
STEPS = 3  # the whole run: rising momentum, a growing window, falling learning rates
TINY_LENGTH = 384
TINY_SEQUENCES = 4  # in two micro-batches, so on one device or two
TINY_DOCUMENT = 90  # tokens, on average
FULL_DOCUMENT = 700
FULL_MICRO_BATCH = 32_768  # tokens, at most: less than half of an H100's 80 GB in bfloat16
SEED = 0

# The systems of the record table and the demo, which never change a bit; presets of the ladder may.
SYSTEMS = ("recurrent", "no-value-embeddings", "value-embeddings", "llmc", "demo")
AS_IT_IS = "as it is"
# Beside the presets themselves, once for each way that a model can be built.
VARIANTS = {
    "recurrent": {
        "unrolled": {"unroll": True},
        "scanned": {"unroll": False},
        "remat full": {"unroll": False, "remat": "full"},
        "remat attention": {"remat": "attention"},
    },
    "llmc": {AS_IT_IS: {}, "remat full": {"remat": "full"}},
}

Arrays = Mapping[str, np.ndarray]  # by path
Measured = Mapping[str, Arrays]  # by what they are


@dataclasses.dataclass(frozen=True)
class Case:
    preset: str
    dtype: str
    variant: str
    config: Any = dataclasses.field(compare=False)
    document: int = dataclasses.field(compare=False)  # mean length, tokens


def from_first(name: str, *modules: str) -> Callable:
    """`name` from the first of `modules` that exists and has it: where it is now, then where it was."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name):
                raise
        except AttributeError:
            pass
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


make_model = from_first("make_model", "senano_jax.model.build", "senano_jax.training.state")
make_optimizer = from_first("make_optimizer", "senano_jax.optim.recipe", "senano_jax.optim.groups")
window_blocks = from_first("window_blocks", "senano_jax.plan", "senano_jax.optim.schedules")
init_state = from_first("init_state", "senano_jax.training.state")
make_train_step = from_first("make_train_step", "senano_jax.training.step")
make_eval_step = from_first("make_eval_step", "senano_jax.training.step")
make_mesh, place_batch, place_sequences = (
    from_first(name, "senano_jax.training.mesh") for name in ("make_mesh", "place_batch", "place_sequences")
)
MODEL_OF_TWO = (
    make_model.__module__ == "senano_jax.model.build"
)  # configuration of the model, dtype; before, of the run


def cases(name: str, *, full: bool, devices: int) -> Iterator[Case]:
    """The preset as it is; or small, in both types, some with the loop the other way or with blocks computed again."""
    if full:
        config = preset(name)
        sequences = config.batch_tokens // config.seq_len // devices
        size = math.gcd(sequences, max(1, FULL_MICRO_BATCH // config.seq_len))
        config = dataclasses.replace(config, steps=STEPS, micro_batches=sequences // size)
        yield Case(name, config.dtype, "full width", config, FULL_DOCUMENT)
        return
    config = shrunk(preset(name))
    for dtype in ("float32", "bfloat16"):
        for variant, changes in VARIANTS.get(name, {AS_IT_IS: {}}).items():
            if "remat" in changes and dtype == "float32":  # where it is of no use
                continue
            model = dataclasses.replace(config.model, **changes)
            changed = dataclasses.replace(config, model=model, dtype=dtype)
            yield Case(name, dtype, variant, changed, TINY_DOCUMENT)


def shrunk(config: Any) -> Any:
    """With a model that compiles in seconds, the kinds of its layers kept. The vocabulary stays: it has END_OF_TEXT."""
    model = dataclasses.replace(config.model, dim=32, num_heads=2)
    if hasattr(model, "layers"):
        layers = model.layers
        edge = 2 if model.value_embeddings else 1
        layers = dataclasses.replace(
            layers,
            prelude=edge,
            loop=min(layers.loop, 2),
            visits=min(layers.visits, 4),
            coda=edge,
            long_windows=None if layers.long_windows is None else (0, 3),
            no_attention=(2,) if layers.no_attention else (),
        )
        model = dataclasses.replace(model, layers=layers, value_embeddings=min(model.value_embeddings, 1))
    else:
        model = dataclasses.replace(model, num_layers=2, max_length=TINY_LENGTH)
    return dataclasses.replace(
        config,
        model=model,
        optimizer=warmed_up_early(config.optimizer),
        steps=STEPS,
        seq_len=TINY_LENGTH,
        batch_tokens=TINY_SEQUENCES * TINY_LENGTH,
        initial_window_tokens=max(TINY_LENGTH // 2, min(config.initial_window_tokens, TINY_LENGTH)),
        final_window_tokens=TINY_LENGTH,
        micro_batches=2,
    )


def warmed_up_early(part: Any) -> Any:
    """The part of an optimiser's configuration, its warm-ups shortened so that the steps see their end."""
    changes = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = warmed_up_early(value)
        elif field.name == "momentum_warmup_steps" or (field.name == "warmup_steps" and hasattr(part, "start")):
            changes[field.name] = 2
        elif field.name == "warmup_steps":
            changes[field.name] = 1
    return dataclasses.replace(part, **changes)


def measure(case: Case, devices: int = 1) -> Measured:
    """What the package computes for `case`, on the host, along the path that training takes.

    Weights of its own seed; then from drawn weights the validation loss of as many sequences as devices (once for all
    ways to make gradients), training steps, and the gradients of the first one.
    """
    config = case.config
    mesh = make_mesh(devices)
    model = make_model(config.model, config.dtype) if MODEL_OF_TWO else make_model(config)
    optimizer = keeping_gradients(make_optimizer(config.optimizer, config.steps, mesh.axis_names[0]))
    state = init_state(model, optimizer, config.seed, mesh)
    measured = {"initial weights": by_path(state.params)}
    state = state._replace(params=jax.tree.map_with_path(drawn, state.params))
    batches = [sequences(config, case.document, SEED + n) for n in range(config.steps)]

    if config.model.remat == "none":
        rows = place_sequences(mesh, batches[0][:devices])
        counted = place_sequences(mesh, np.ones(devices, np.float32))
        widest = window_blocks(config.steps, config.steps, config.final_window_tokens)
        loss = make_eval_step(model, mesh)(state.params, rows, counted, np.int32(widest))
        measured["validation"] = {"loss": np.asarray(loss)}

    step = make_train_step(model, optimizer, mesh)
    metrics = {}
    for n, batch in enumerate(batches):
        window = window_blocks(n, config.steps, config.final_window_tokens, config.initial_window_tokens)
        state, (loss, norm) = step(state, place_batch(mesh, batch, config.micro_batches), np.int32(window))
        metrics |= {f"{n} loss": np.asarray(loss), f"{n} gradient norm": np.asarray(norm)}
        if n == 0:
            measured["gradients"] = by_path(state.opt_state.gradients)
    return measured | {"steps": metrics, "weights after them": by_path(state.params)}


class Kept(NamedTuple):
    state: optax.OptState
    gradients: Any


def keeping_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same optimiser, whose state has the last gradients too. So one program gives them and the step."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(gradients, kept, params=None, **more):
        updates, state = optimizer.update(gradients, kept.state, params, **more)
        return updates, Kept(state, gradients)

    return optax.GradientTransformationExtraArgs(
        lambda params: Kept(optimizer.init(params), jax.tree.map(jnp.zeros_like, params)), update
    )


def sequences(config: Any, document: int, seed: int) -> np.ndarray:
    """int32 [S, T+1]: a step's, of random tokens, in which a document of `document` tokens on average begins."""
    rng = np.random.default_rng(seed)
    shape = (config.batch_tokens // config.seq_len, config.seq_len + 1)
    tokens = rng.integers(0, END_OF_TEXT, shape, np.int32)
    return np.where(rng.random(shape) < 1 / document, np.int32(END_OF_TEXT), tokens)


def drawn(path: tuple, leaf: jax.Array) -> jax.Array:
    """Random numbers in place of `leaf`, none of them trivial, the same for each path and shape."""
    rng = np.random.default_rng([SEED, zlib.crc32(name_of(path).encode())])
    x = rng.standard_normal(leaf.shape, np.float32)
    if leaf.ndim < 2:
        x = 0.5 + 0.2 * x
    elif "embedding" not in name_of(path[-1:]) and name_of(path[-1:]) != "head":
        x /= np.sqrt(np.float32(leaf.shape[-2]))
    return jax.device_put(x.astype(leaf.dtype), leaf.sharding)


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any) -> Arrays:
    return dict(sorted((name_of(path), np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)))


def stored(array: np.ndarray, store: Path) -> dict[str, Any]:
    """Type, shape and SHA-256 of an array, whose bytes go into a file of that name unless they are there."""
    raw = np.ascontiguousarray(array).tobytes()
    digest = hashlib.sha256(raw).hexdigest()
    if not (store / digest).exists():
        (store / digest).write_bytes(raw)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="those that this tree lacks are passed over")
    parser.add_argument("--store", type=Path, required=True, help="folder of the arrays' bytes")
    parser.add_argument("--report", type=Path, required=True, help="JSON file of what was computed")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="the presets as they are, not small ones")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", args.devices)
    report = []
    with one_line_errors():
        for name in args.presets:
            for case in cases(name, full=args.full, devices=args.devices) if name in PRESETS else ():
                start = time.perf_counter()
                items = {
                    what: {path: stored(array, args.store) for path, array in arrays.items()}
                    for what, arrays in measure(case, args.devices).items()
                }
                report.append({"preset": name, "dtype": case.dtype, "variant": case.variant, "items": items})
                seconds = time.perf_counter() - start
                print(f"  {name} {case.dtype} {case.variant}: {seconds:.1f} s", file=sys.stderr, flush=True)
    args.report.write_text(json.dumps({"device": jax.devices()[0].device_kind, "cases": report}))


if __name__ == "__main__":
    main(sys.argv[1:])
