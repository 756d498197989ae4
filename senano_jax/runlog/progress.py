"""What a person watching a run sees: a live line on a terminal, plain lines elsewhere."""

import rich.console
import rich.progress
from rich.text import Text

from senano_jax.plan import Plan


class _Left(rich.progress.TimeRemainingColumn):
    """The time that is left, while steps are made."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text() if task.fields["doing"] else Text("left ") + super().render(task)


class Progress:
    """A context manager. The bar and the time left go by tokens, of which steps may hold more and more. Prints nothing
    if `visible` is False."""

    def __init__(self, plan: Plan, visible: bool = True):
        self._plan = plan
        self._console = rich.console.Console(highlight=False, quiet=not visible, soft_wrap=True)
        self._bar = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.fields[step]}/{task.fields[steps]}"),
                rich.progress.BarColumn(bar_width=30),
                rich.progress.TextColumn("{task.fields[figures]}"),
                rich.progress.TextColumn("{task.fields[doing]}"),
                _Left(compact=True),
                console=self._console,
                transient=True,
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task(
                "train", total=plan.total_tokens, step=0, steps=plan.steps, figures="", doing="compiling"
            )

    def starting_at(self, step: int) -> "Progress":
        """Itself, for a run that goes on after `step` steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._plan.tokens_after(step), step=step)
        return self

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_s: float, line: str) -> None:
        """Shows a finished step: on the live line, or as the plain `line`."""
        if self._bar is None:
            self._console.print(line, markup=False)
        else:
            figures = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
            completed = self._plan.tokens_after(step)
            self._bar.update(self._task, completed=completed, step=step, figures=figures, doing="")

    def doing(self, what: str) -> None:
        """Shows on the live line what is done between two steps."""
        if self._bar is not None:
            self._bar.update(self._task, doing=what, refresh=True)

    def say(self, line: str) -> None:
        """Prints a line, above the live one if there is one."""
        self._console.print(line, markup=False)
