"""How far this program's bfloat16 gradients, and those of the PyTorch program, are from float32 ones.

    git clone https://github.com/lapp0/sample-efficient-nanogpt torch_repo
    python scripts/compare_gradients.py --torch-repo torch_repo --weights logs/<run-id> \
        --train-files 'data/fineweb10B/fineweb_train_*.bin'

Same weights, same sequences. Rounding to bfloat16 errs in every program; one that errs more than PyTorch, or in another
direction for all tokens, trains to another loss. The reference is this program in float32. PyTorch in float32
must agree with it, which shows that both compute the same function.

The PyTorch model is that of the project's own file. Compiled, it is the fastest we could make it (nothing recomputed,
FlexAttention's own tiles); not compiled, it has its checkpointing. One GPU, or a CPU with --seq-len 512 or so, where
PyTorch's attention is dense and compiling takes minutes; there XLA leaves out roundings that a GPU makes, unless it is
told XLA_FLAGS=--xla_allow_excess_precision=false. The weights should be some steps into a training: at the start
the head is zero, and with it all other gradients.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int32

from senano_jax.attention import BLOCK
from senano_jax.config import Config
from senano_jax.config_check import check_config
from senano_jax.data.shards import find_shards
from senano_jax.data.stream import SequenceSource
from senano_jax.errors import UserError, check_counts, one_line_errors
from senano_jax.files import check_output_file, expand_home, write_atomically
from senano_jax.interop.torch_checkpoint import to_torch
from senano_jax.interop.torch_program import (
    DEFAULT_TILES,
    FASTEST,
    SYSTEMS,
    Patch,
    from_anywhere,
    output_of,
    patched_program,
    schedule,
)
from senano_jax.jax_settings import start_jax
from senano_jax.model.build import Params, abstract_params, make_model
from senano_jax.presets import preset
from senano_jax.training.mesh import make_mesh
from senano_jax.training.step import summed_gradients
from senano_jax.training.weights import load_weights

TORCH_MODES = {"float32": "PyTorch, float32", "eager": "PyTorch, not compiled", "compiled": "PyTorch, compiled"}
OURS = "this program"
SAME_FUNCTION = 1e-3  # largest error of a float32 gradient; a mistake makes far more, rounding 2e-5
DRIVER = Path(__file__).resolve().with_name("torch_gradients.py")

SCALARS = 100  # numbers, at most, of an array that is shown one by one

Gradients = Mapping[str, np.ndarray]  # by PyTorch's names, in its layout, float32


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Of the gradients of one kind of parameter from the reference; an entry a layer, None where that is zero."""

    program: str
    kind: str
    relative_error: list[float | None]  # length of the difference over the length of the reference
    projection: list[float | None]  # on the reference, over its length
    wrong_sign: list[float]  # part of the numbers whose sign is not the reference's: Adam's first steps know only signs
    values: list[list[float]] | None  # the gradients themselves, of scalars
    cosine: list[float | None]  # of the difference with that of compiled PyTorch: 1 if both err the same way


def model_patches(system: str, mode: str) -> list[Patch]:
    """Leaves the model of the PyTorch file, with `system`'s schedule, importable without a GPU."""
    return [
        *(FASTEST if mode == "compiled" else [DEFAULT_TILES]),
        *schedule(system),
        Patch("first use of the GPU", r"^torch\.empty\(1, device=\"cuda\".*$", r"if torch.cuda.is_available(): \g<0>"),
        Patch("data and training", r"(?s)^# -+\n# Our own simple Distributed Data Loader.*\Z", ""),
    ]


def our_gradients(
    config: Config, weights: Params, tokens: Int32[np.ndarray, "S T+1"], window_blocks: int
) -> tuple[Gradients, float]:
    """Gradients of the loss summed over all sequences, and the mean loss; a training step of as many micro-batches
    has them before it rounds them to the types of the parameters."""
    step = jax.jit(summed_gradients, static_argnums=0)
    loss, gradients = step(make_model(config.model, config.dtype), weights, tokens[:, None], window_blocks)
    return to_torch(gradients, config.model), float(loss) / (tokens.size - len(tokens))


def torch_gradients(
    sources: Mapping[str, str],
    python: str,
    weights: Gradients,
    tokens: Int32[np.ndarray, "S T+1"],
    window_blocks: int,
) -> Iterator[tuple[str, Gradients, float]]:
    """(mode, gradients, mean loss) of the model in each of `sources`, by mode.

    Raises UserError if the model fails, or if there is no room for the weights.
    """
    with tempfile.TemporaryDirectory(prefix="compare-gradients-") as place:
        folder = Path(place)
        named = {f"weights/{name}": array.astype(np.float32) for name, array in weights.items()}
        try:
            np.savez(folder / "given.npz", tokens=tokens, window_blocks=window_blocks, **named)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error}); set TMPDIR") from None
        for mode, source in sources.items():
            (folder / "model.py").write_text(source, encoding="utf-8")
            output_of([from_anywhere(python), DRIVER, folder, mode], folder, TORCH_MODES[mode])
            with np.load(folder / f"{mode}.npz") as arrays:
                gradients = dict(arrays)
            (folder / f"{mode}.npz").unlink()
            yield mode, gradients, float(gradients.pop("loss"))


def deviations(program: str, gradients: Gradients, reference: Gradients, compiled: Gradients) -> list[Deviation]:
    """How far `gradients` are from `reference`, by kind of parameter, and whether in the direction of `compiled`."""
    of_kind: dict[str, Deviation] = {}
    for name, expected in reference.items():
        kind = re.sub(r"^blocks\.\d+\.", "", name)
        few = [] if expected.size <= SCALARS else None
        found = of_kind.setdefault(kind, Deviation(program, kind, [], [], [], few, []))
        arrays = (expected, gradients[name], compiled[name])
        expected, given, other = (array.astype(np.float64).ravel() for array in arrays)
        squared = float(expected @ expected)
        error, of_other = given - expected, other - expected
        lengths = float(np.linalg.norm(error) * np.linalg.norm(of_other))
        found.relative_error.append(float(np.linalg.norm(error)) / squared**0.5 if squared else None)
        found.cosine.append(float(error @ of_other) / lengths if squared and lengths else None)
        found.projection.append(float(given @ expected) / squared if squared else None)
        found.wrong_sign.append(float(np.mean(np.sign(given) != np.sign(expected))))
        if found.values is not None:
            found.values.append(given.tolist())
    return list(of_kind.values())


def format_table(rows: Sequence[Deviation]) -> str:
    """Markdown: a row for each kind and program."""
    figures = ("relative error, median (range)", "projection", "wrong sign", "cosine with compiled PyTorch's")
    headers = ("gradient of", "program", *figures)
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for row in sorted(rows, key=lambda row: row.kind):
        errors, projections, cosines = (
            [number for number in numbers if number is not None]
            for numbers in (row.relative_error, row.projection, row.cosine)
        )
        if errors:
            spread = f" ({min(errors):.2g} to {max(errors):.2g})" if len(errors) > 1 else ""
            cosine = f"{np.median(cosines):.2f}" if cosines else "-"
            signs = f"{np.mean(row.wrong_sign):.1%}"
            cells = f"{np.median(errors):.2g}{spread} | {np.median(projections):.4f} | {signs} | {cosine}"
            lines.append(f"| {row.kind} | {row.program} | {cells} |")
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> None:
    """Prints the table, and writes `args.json`. Raises UserError for what cannot work, or if float32 disagrees."""
    config = _config(args)
    check_output_file("--json", args.json)
    sources = {mode: patched_program(args.torch_repo, model_patches(args.system, mode)) for mode in TORCH_MODES}
    tokens = _tokens(args.train_files, args.sequences, args.seq_len)
    output_of([args.torch_python, "-c", "import numpy, torch"], Path.cwd(), f"--torch-python {args.torch_python}")
    weights, _ = load_weights(
        args.weights, config.model, abstract_params(make_model(config.model, config.dtype)), make_mesh(1), args.step
    )
    results: dict[str, Gradients] = {}

    def told(program: str, gradients: Gradients, loss: float) -> Gradients:
        print(f"{program}: mean loss {loss:.6f}", flush=True)
        return gradients

    # PyTorch first: what JAX has taken of a GPU's memory it keeps.
    host_weights = to_torch(jax.tree.map(np.asarray, weights), config.model)
    for mode, gradients, loss in torch_gradients(sources, args.torch_python, host_weights, tokens, args.window_blocks):
        results[TORCH_MODES[mode]] = told(TORCH_MODES[mode], gradients, loss)
    results[OURS] = told(OURS, *our_gradients(config, weights, tokens, args.window_blocks))
    exact_model = dataclasses.replace(config.model, attention="banded", remat="full")
    exact = dataclasses.replace(config, dtype="float32", model=exact_model)
    with jax.default_matmul_precision("highest"):
        reference = told(f"{OURS}, float32", *our_gradients(exact, weights, tokens, args.window_blocks))

    compiled = results[TORCH_MODES["compiled"]]
    rows = [row for name, gradients in results.items() for row in deviations(name, gradients, reference, compiled)]
    print(format_table(rows))
    if args.json:
        write_atomically(args.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1).encode())
    for row in rows:
        worst = max((error for error in row.relative_error if error is not None), default=0)
        if row.program == TORCH_MODES["float32"] and not worst <= SAME_FUNCTION:
            raise UserError(
                f"the float32 gradients of {row.kind} differ by {worst:.2g} of their length: the programs compute "
                f"different functions of --weights {args.weights}; is --system {args.system} the right one?"
            )


def _config(args: argparse.Namespace) -> Config:
    base = preset(args.system)
    check_counts({"--seq-len": args.seq_len, "--sequences": args.sequences, "--window-blocks": args.window_blocks}, 1)
    config = dataclasses.replace(
        base,
        seq_len=args.seq_len,
        batch_tokens=args.seq_len,
        stages=(),
        final_window_tokens=min(base.final_window_tokens, args.seq_len),
    )
    check_config(config)
    if args.window_blocks > args.seq_len // BLOCK:
        raise UserError(
            f"--window-blocks {args.window_blocks} of {BLOCK} tokens are longer than --seq-len {args.seq_len}; "
            f"use at most {args.seq_len // BLOCK}"
        )
    return config


def _tokens(pattern: str, sequences: int, length: int) -> Int32[np.ndarray, "S T+1"]:
    """The first sequences of the shards."""
    source = SequenceSource(find_shards(pattern), length)
    if len(source) < sequences:
        raise UserError(
            f"{pattern}: {source.total_tokens:,} tokens, of which {sequences * length + 1:,} are needed; "
            "lower --sequences or --seq-len"
        )
    return np.stack([source[k] for k in range(sequences)])


def main(argv: Sequence[str]) -> None:
    base = preset("recurrent")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-repo", type=expand_home, required=True, help="checkout of the PyTorch project")
    parser.add_argument("--weights", required=True, help="checkpoint of the PyTorch program (.pt), or a run folder")
    parser.add_argument("--step", type=int, help="of the run folder's checkpoints, the one of this step")
    parser.add_argument("--train-files", default=base.data.train_files, help="glob of the shards")
    parser.add_argument("--system", choices=SYSTEMS, default="recurrent", help="default: recurrent")
    parser.add_argument("--seq-len", type=int, default=base.seq_len, help=f"default: {base.seq_len}")
    parser.add_argument("--sequences", type=int, default=1, help="their gradients are added (default: 1)")
    parser.add_argument("--window-blocks", type=int, default=6, help="long window, blocks of 128 (default: 6)")
    parser.add_argument(
        "--torch-python", type=os.path.expanduser, default=sys.executable, help="Python that has PyTorch and NumPy"
    )
    parser.add_argument("--json", type=expand_home, help="file for all numbers")
    args = parser.parse_args(argv)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch shares the GPU
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else gigabytes stay in the temporary folder
    with one_line_errors():
        start_jax()
        compare(args)


if __name__ == "__main__":
    main(sys.argv[1:])
