"""What to do with a run that has ended: the lines that the train command leaves on the screen."""

import shlex
from pathlib import Path


def next_steps(run_dir: Path, curve: Path | None, seed: int) -> str:
    """The folder of the run of `seed`, its curve, if there is one, and commands to go on with, ready for a shell."""
    folder = shlex.quote(str(run_dir))
    lines = {
        "run folder": str(run_dir),
        "curve": None if curve is None else str(curve),
        "evaluate": f"python -m senano_jax.evaluate {folder}",
        "sample": f"python -m senano_jax.sample {folder}",
        "compare": f"python -m senano_jax.compare {folder} OTHER_RUN",
        "repeat": f"python -m senano_jax.train --config {folder} --seed {seed + 1}",
    }
    return "\n".join(f"{label + ':':<12}{text}" for label, text in lines.items() if text is not None)


def draw_curve(run_dir: Path) -> tuple[Path | None, str]:
    """The file of the run's curve, or None and the reason why there is none: a run has not failed because its curve
    cannot be drawn."""
    try:
        from senano_jax.runlog.plots import write_curve  # which may bring in matplotlib

        return write_curve(run_dir), ""
    except Exception as error:
        return None, f"no curve was drawn ({' '.join(str(error).split())[:150]})"
