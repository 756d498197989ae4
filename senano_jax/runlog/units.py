"""Figures in the units that people read them in."""


def format_tokens(tokens: float, decimals: int = 2, like: float | None = None) -> str:
    """650.18M; below a tenth of a million in full. `like` is the figure whose unit to share (a count and its error)."""
    if abs(tokens if like is None else like) < 1e5:
        return f"{tokens:,.0f}"
    return f"{tokens / 1e6:,.{decimals}f}M"


def format_time(milliseconds: float) -> str:
    """1:49:16, in hours, minutes and seconds."""
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
