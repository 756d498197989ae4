"""Numbers that the original PyTorch functions of single ideas computed in float32 on a CPU: tests/data/pieces/.

Each file holds arrays and, as JSON under `meta`, where its function is from (`source`, `what`, `constants`) and how the
inputs are drawn. d_NAME is the gradient with respect to NAME of the sum over tokens of a loss, or of sum(output * g)
with another input g.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "data" / "pieces"


def reference(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and arrays of a file, by name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        return {k: _drawn(**v) for k, v in meta["inputs"].items()}, {k: file[k] for k in meta["arrays"]}


def _drawn(seed, shape, scale=1.0, offset=0.0, randint=None, **_) -> np.ndarray:
    random = np.random.RandomState(seed)
    if randint is not None:
        return random.randint(*randint, size=shape)
    drawn = random.standard_normal(shape).astype(np.float32) * np.float32(scale)
    return drawn.astype(np.float32) + np.float32(offset)


def largest_error(result, expected) -> float:
    """Largest difference, as a share of the largest number expected."""
    return float(np.abs(np.asarray(result, np.float64) - expected).max() / np.abs(expected).max())
