"""The tokens of the steps of a run whose log counts only steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from senano_jax.errors import UserError

_PIECE = re.compile(r"(?P<tokens>[0-9][0-9_]{0,15})(x(?P<steps>[0-9][0-9_]{0,15}))?", re.ASCII)


@dataclass(frozen=True)
class BatchPlan:
    """Batches in tokens, each with the number of steps it lasts; the last one lasts for ever."""

    pieces: Sequence[tuple[int, int | None]]

    def tokens_after(self, steps: int) -> int:
        """Tokens that `steps` steps have trained on."""
        trained = 0
        for batch, lasting in self.pieces:
            done = steps if lasting is None else min(steps, lasting)
            trained, steps = trained + batch * done, steps - done
        return trained

    @classmethod
    def parse(cls, text: str, argument: str) -> "BatchPlan":
        """Of "393216", or of "131072x580+262144x580+393216": 580 steps of 131072 tokens, then 580 of 262144, then steps
        of 393216. Raises UserError, which names `argument`, for anything else."""
        matches = [_PIECE.fullmatch(piece) for piece in text.split("+")]
        if not all(matches) or matches[-1]["steps"] or not all(match["steps"] for match in matches[:-1]):
            raise UserError(
                f"{argument}: {text!r} is no batch in tokens; write LOG@393216, or LOG@131072x580+393216 for a run "
                "that begins with 580 smaller steps"
            )
        plan = cls([(int(match["tokens"]), match["steps"] and int(match["steps"])) for match in matches])
        if not all(batch for batch, _ in plan.pieces):
            raise UserError(f"{argument}: a step of 0 tokens; give the batch in tokens, e.g. LOG@393216")
        return plan
