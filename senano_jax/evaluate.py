"""python -m senano_jax.evaluate RUN_DIR|FILE [flags]: validation loss of saved weights."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from senano_jax.config import Config, DataConfig
from senano_jax.config_check import check_config
from senano_jax.errors import UserError, one_line_errors
from senano_jax.jax_settings import start_jax
from senano_jax.model.build import abstract_params, make_model
from senano_jax.plan import Plan
from senano_jax.presets import preset
from senano_jax.train import value_of, with_dashes
from senano_jax.training.evaluation import make_evaluator
from senano_jax.training.mesh import make_mesh
from senano_jax.training.weights import config_of, is_weights_file, load_weights


@dataclass(frozen=True)
class Arguments:
    """Prints val_loss:<6 decimals> tokens:<n> for a checkpoint of a run, or for a file of weights."""

    source: Annotated[str, tyro.conf.Positional]
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
    attention: Literal["auto", "flash", "banded", "dense"] = "auto"
    """Implementation of attention."""
    devices: int | None = None
    """Devices to use; all by default."""


def main(arguments: Sequence[str]) -> float:
    """Parses, evaluates, prints, and returns the loss."""
    arguments = with_dashes(arguments)
    base = _base_config(arguments)
    defaults = Arguments(
        source=tyro.MISSING, data=base.data, dtype=base.dtype, attention=base.model.attention, devices=base.devices
    )
    args = tyro.cli(Arguments, default=defaults, args=arguments, prog="python -m senano_jax.evaluate")
    is_weights_file(args.source)  # or the folder of a run, else refused before anything is looked for
    if args.window_blocks is not None and args.window_blocks < 1:
        raise UserError(f"--window-blocks is {args.window_blocks}; it must be at least 1")
    config = dataclasses.replace(
        base,
        data=args.data,
        dtype=args.dtype,
        devices=args.devices,
        model=dataclasses.replace(base.model, attention=args.attention),
    )
    check_config(config)
    start_jax(config.dtype, config.compilation_cache)
    mesh = make_mesh(config.devices)
    model = make_model(config.model, config.dtype)
    evaluate = make_evaluator(config, model, mesh)
    params, step = load_weights(args.source, config.model, abstract_params(model), mesh, args.step)
    step = config.steps if step is None else step
    window = Plan(config).evaluation_window(step) if args.window_blocks is None else args.window_blocks
    loss = evaluate(params, window)
    print(f"val_loss:{loss:.6f} tokens:{evaluate.tokens}")
    return loss


def _base_config(arguments: Sequence[str]) -> Config:
    """The configuration that the flags change: of the run named, or of --preset."""
    for word in arguments:
        if not word.startswith("-") and (config := config_of(word)) is not None:
            return config
    return preset(value_of("--preset", list(arguments)) or "recurrent")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
