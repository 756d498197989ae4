"""python -m senano_jax.evaluate RUN_DIR|FILE [flags]: validation loss or HellaSwag of saved weights."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from senano_jax.command_line import import_jax, parse, value_of
from senano_jax.config import Config, DataConfig
from senano_jax.config_check import check_config
from senano_jax.data.bpe import load_bpe
from senano_jax.data.hellaswag import read_questions, rows_of
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, expand_home, write_atomically
from senano_jax.plan import Plan
from senano_jax.presets import preset
from senano_jax.sources import config_of, is_weights_file

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from senano_jax.model.build import Model, Params

PROG = "python -m senano_jax.evaluate"
UNUSED = ("data.train_files", "data.discard_micro_batch")
SECONDS_BETWEEN_LINES = 10  # of progress


@dataclass(frozen=True)
class Arguments:
    """Prints val_loss:<6 decimals> tokens:<n> for a checkpoint of a run, or for a file of weights; with --hellaswag how
    often it finds the true one of four endings the most probable, in place of it."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|FILE")]
    """Folder of a run, a .safetensors file of one, or a PyTorch checkpoint (.pt)."""
    data: DataConfig
    preset: str = "recurrent"
    """System that a PyTorch checkpoint holds; the others know their own."""
    step: int | None = None
    """Checkpoint of a run; the newest by default."""
    window_blocks: int | None = None
    """Long attention window in blocks of 128 tokens; by default that of the run's own evaluation after the checkpoint's
    step, or at the end of the run for a PyTorch checkpoint."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the activations and of the embedding table."""
    attention: Literal["auto", "hopper", "flash", "banded", "dense"] = "auto"
    """Implementation of attention."""
    devices: int | None = None
    """Devices to use; all by default."""
    hellaswag: Path | None = None
    """HellaSwag's hellaswag_val.jsonl: acc_norm compares endings by the mean log-probability of their tokens, acc by
    the sum, as llm.c does."""
    bpe_dir: Path | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe, for HellaSwag; tiktoken downloads them by default."""
    json: Path | None = None
    """File for the result, with what it was computed from."""


def main(arguments: Sequence[str]) -> float:
    """Parses, evaluates, prints, and returns the loss, or with --hellaswag acc_norm."""
    base = _base_config(arguments)
    defaults = Arguments(
        source=tyro.MISSING, data=base.data, dtype=base.dtype, attention=base.model.attention, devices=base.devices
    )
    args = parse(Arguments, arguments, PROG, default=defaults, unused=UNUSED)
    is_weights_file(args.source)  # or the folder of a run, else refused before anything is looked for
    if args.window_blocks is not None and args.window_blocks < 1:
        raise UserError(f"--window-blocks is {args.window_blocks}; it must be at least 1")
    out = None if args.json is None else expand_home(args.json)
    check_output_file("--json", out)
    config = dataclasses.replace(
        base,
        data=args.data,
        dtype=args.dtype,
        devices=args.devices,
        model=dataclasses.replace(base.model, attention=args.attention),
    )
    check_config(config)
    import_jax()
    from senano_jax.jax_settings import start_jax
    from senano_jax.model.build import abstract_params, make_model
    from senano_jax.training.evaluation import make_evaluator
    from senano_jax.training.mesh import make_mesh
    from senano_jax.training.weights import load_weights

    start_jax(config.dtype, config.compilation_cache, config.deterministic)
    mesh = make_mesh(config.devices)
    model = make_model(config.model, config.dtype)
    evaluate = make_evaluator(config, model, mesh) if args.hellaswag is None else _hellaswag(args, config, model, mesh)
    params, step = load_weights(args.source, config.model, abstract_params(model), mesh, args.step)
    step = config.steps if step is None else step
    window = Plan(config).evaluation_window(step) if args.window_blocks is None else args.window_blocks
    if args.hellaswag is None:
        loss = evaluate(params, window)
        result = {"val_loss": loss, "tokens": evaluate.tokens}
        print(f"val_loss:{loss:.6f} tokens:{evaluate.tokens}")
    else:
        result = evaluate(params, window)
        print("hellaswag " + " ".join(f"{name}:{value:.6g}" for name, value in result.items()))
    if out is not None:
        of = {"source": args.source, "step": step, "window_blocks": window, "dtype": config.dtype}
        write_atomically(out, (json.dumps(result | of, indent=2) + "\n").encode())
    return next(iter(result.values()))


def _hellaswag(
    args: Arguments, config: Config, model: "Model", mesh: "Mesh"
) -> Callable[["Params", int], dict[str, float]]:
    """A function of weights and window. Raises UserError for a file or tables that cannot serve."""
    from senano_jax.training.choices import log_probabilities, shares

    questions = read_questions(expand_home(args.hellaswag))
    rows = rows_of(questions, load_bpe(args.bpe_dir), Plan(config).longest_sequence, config.model.vocab_size)
    said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{done:,} of {total:,} endings", file=sys.stderr, flush=True)

    def score(params: "Params", window_blocks: int) -> dict[str, float]:
        scores = log_probabilities(model, params, mesh, rows, window_blocks, say)
        tokens = [len(row.tokens) - row.first for row in rows]
        by_mean, by_sum = shares(scores, tokens, [question.label for question in questions])
        named = {"acc_norm": by_mean, "acc": by_sum}
        errors = {f"{name}_standard_error": share.standard_error for name, share in named.items()}
        return {name: share.value for name, share in named.items()} | errors | {"questions": len(questions)}

    return score


def _base_config(arguments: Sequence[str]) -> Config:
    """The configuration that the flags change: of the run named, or of --preset."""
    for word in arguments:
        if not word.startswith("-") and (config := config_of(word)) is not None:
            return config
    return preset(value_of("--preset", list(arguments)) or "recurrent")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
