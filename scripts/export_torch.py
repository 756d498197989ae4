"""Writes the weights of a run as a PyTorch checkpoint: the names, layout and types of the PyTorch program.

    python scripts/export_torch.py logs/<run-id> weights.pt [--step N]

The file holds {"step": N, "model": state dict}, for `load_state_dict` of the PyTorch model (before torch.compile) and
for our own --init-from. An existing file is never overwritten.
"""

import argparse
from pathlib import Path

from senano_jax.config_file import read_config
from senano_jax.errors import UserError, one_line_errors
from senano_jax.files import expand_home
from senano_jax.interop.torch_checkpoint import to_torch, write_torch_checkpoint
from senano_jax.jax_settings import start_jax
from senano_jax.model.build import abstract_params, make_model
from senano_jax.training.checkpoint import load_params
from senano_jax.training.mesh import make_mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=expand_home, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("out", type=expand_home, metavar="OUT.pt", help="file to write")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (default: the newest)")
    args = parser.parse_args()
    export(args.run_dir, args.out, args.step)


def export(run_dir: Path, out: Path, step: int | None = None) -> None:
    """Writes the weights after `step` steps of a run, or its newest ones, to `out`. Raises UserError if it cannot."""
    if out.suffix != ".pt":
        raise UserError(f"{out}: a PyTorch checkpoint is known by its name; let it end in .pt")
    if out.exists():
        raise UserError(f"{out} exists already; choose another name, or delete it")
    start_jax()
    config, _ = read_config(run_dir / "config.json")
    params, step = load_params(run_dir, abstract_params(make_model(config.model, config.dtype)), make_mesh(1), step)
    arrays = to_torch(params, config.model)
    write_torch_checkpoint(out, arrays, step)
    print(f"{out}: {sum(a.size for a in arrays.values()):,} parameters in {len(arrays)} tensors, after step {step}")


if __name__ == "__main__":
    with one_line_errors(prints_result=False):
        main()
