"""The attention window: its unit, and how it grows."""

BLOCK = 128  # tokens; the unit of the window, from the PyTorch program's block mask


def window_blocks(step: int, steps: int, final_window_tokens: int, initial_window_tokens: int = 0) -> int:
    """Long attention window in blocks of 128 tokens, one at least: linear in the step, rounded up.

    Evaluated on the host in float64, with the PyTorch program's order of operations: the step at which a block is
    added must not depend on rounding.
    """
    tokens = initial_window_tokens + (final_window_tokens - initial_window_tokens) * (step / steps)
    return max(1, -int(-tokens // BLOCK))
