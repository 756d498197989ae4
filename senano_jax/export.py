"""python -m senano_jax.export RUN_DIR OUT.safetensors [--step N]: the weights of a run as a safetensors file."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from senano_jax.command_line import import_jax, parse
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import check_output_file, expand_home
from senano_jax.sources import SAFETENSORS


@dataclass(frozen=True)
class Arguments:
    """Writes the weights of a run, each under its path in the parameter tree, in the type that it is kept in. The file
    brings the run's configuration along: evaluate, sample and --init-from take it as they take the run's folder. An
    existing file is never overwritten."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Annotated[Path, tyro.conf.Positional]
    """File to write, whose name ends in .safetensors."""
    step: int | None = None
    """Checkpoint of this step of the run; the newest by default."""


def main(arguments: Sequence[str]) -> Path:
    """Parses, writes the file, says what is in it, and returns its path."""
    args = parse(Arguments, arguments, "python -m senano_jax.export")
    import_jax()
    out = expand_home(args.out)
    export(expand_home(args.run_dir), out, args.step)
    return out


def export(run_dir: Path, out: Path, step: int | None = None) -> None:
    """Writes the weights after `step` steps of a run, or its newest ones, to `out`. Raises UserError if it cannot."""
    from senano_jax.config_file import read_config
    from senano_jax.interop.safetensors_file import write_safetensors
    from senano_jax.jax_settings import start_jax
    from senano_jax.model.build import abstract_params, count_parameters, make_model
    from senano_jax.training.checkpoint import load_params
    from senano_jax.training.mesh import make_mesh

    if out.suffix != SAFETENSORS:
        raise UserError(f"{out}: weights are known by their name; let it end in {SAFETENSORS}")
    check_output_file("OUT", out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another name, or delete it")
    config, _ = read_config(run_dir / "config.json")
    start_jax()
    params, step = load_params(run_dir, abstract_params(make_model(config.model, config.dtype)), make_mesh(1), step)
    write_safetensors(out, params, step, (run_dir / "config.json").read_text(encoding="utf-8"))
    print(f"{out}: {count_parameters(params):,} parameters, after step {step}")


if __name__ == "__main__":
    with one_line_errors(prints_result=False):
        main(sys.argv[1:])
