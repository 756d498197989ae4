"""Sizes that Triton's kernels take."""


def fits(width: int) -> bool:
    """Whether Triton can hold a row of `width` numbers: its blocks are powers of two, and its products begin at 16."""
    return width >= 16 and width & (width - 1) == 0
