"""From shards to batches, in file order, each token once.

Positions count tokens over the concatenation of all shards. A sequence of T tokens is read with one more,
because the targets are the inputs shifted by one; neighbouring sequences share that token. A sequence may
span shards, so all that is left over is what does not fill the last sequence.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from senano_jax.data.shards import Shard, check_tokens, open_shard
from senano_jax.errors import UserError

if TYPE_CHECKING:
    import grain

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4


class SequenceSource:
    """Random access to sequences, the data source of a grain pipeline: record k is int32 [T + 1].

    Record k begins at `start + k * T`; with `discard_tokens` as many tokens are left out after every
    `batch_sequences` records. Safe to read from several threads.

    Raises UserError, on construction, if a shard is unsound or shorter than one sequence, and, on reading, if
    a token is not GPT-2's.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        seq_len: int,
        start: int = 0,
        *,
        batch_sequences: int = 1,
        discard_tokens: int = 0,
    ):
        self._paths = list(shards)
        self._shards = [Shard(path) for path in self._paths]
        _check_lengths(self._paths, map(len, self._shards), seq_len)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._seq_len = seq_len
        self._start = start
        self._batch_sequences = batch_sequences
        self._stride = batch_sequences * seq_len + discard_tokens

    @property
    def total_tokens(self) -> int:
        """The tokens in all shards together."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        usable = max(self.total_tokens - 1 - self._start, 0)  # the last token is only ever a target
        batches, rest = divmod(usable, self._stride)
        return batches * self._batch_sequences + min(rest // self._seq_len, self._batch_sequences)

    def __getitem__(self, k: int) -> Int32[np.ndarray, "T+1"]:
        if not 0 <= k < len(self):
            raise IndexError(f"record {k} of {len(self)}")
        batch, row = divmod(k, self._batch_sequences)
        first = self._start + batch * self._stride + row * self._seq_len
        return self._read(first, first + self._seq_len + 1)

    def __repr__(self) -> str:
        return f"SequenceSource({len(self._paths)} shards, seq_len={self._seq_len}, start={self._start})"

    def _read(self, first: int, end: int) -> Int32[np.ndarray, "end-first"]:
        pieces = []
        shard = int(np.searchsorted(self._ends, first, side="right"))
        while first < end:
            shard_start = int(self._ends[shard]) - len(self._shards[shard])
            piece_end = min(end, int(self._ends[shard]))
            piece = self._shards[shard].read(first - shard_start, piece_end - shard_start)
            check_tokens(self._paths[shard], piece, first - shard_start)
            pieces.append(piece)
            first, shard = piece_end, shard + 1
        return np.concatenate(pieces, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Batch:
    """This process's rows of one global batch."""

    tokens: Int32[np.ndarray, "local_sequences T+1"]
    first_token: int  # stream position of the global batch's first input
    end_token: int  # stream position after the global batch's last input (its last target)


class TokenStream:
    """An iterator of `Batch`es that reads ahead in threads and can be saved and resumed at any token.

    Process p of P gets the p-th part of each global batch of `batch_sequences` sequences, so that the
    parts side by side are in file order. Both sizes can be changed between two batches. After every batch
    `discard_tokens` tokens are skipped. The stream ends (StopIteration) when the tokens left do not fill a
    global batch.

    Raises UserError if the shards are unsound, and, from `next`, when a token that is not GPT-2's is reached.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        seq_len: int,
        batch_sequences: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        discard_tokens: int = 0,
        start_token: int = 0,
    ):
        self._shards = list(shards)
        self._process_index = process_index
        self._process_count = process_count
        self._discard_tokens = discard_tokens
        self._next_token = start_token
        self._seq_len = self._batch_sequences = 0
        self.resize(seq_len, batch_sequences)

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> Batch:
        try:
            tokens = next(self._batches)
        except UserError:
            self.set_state(self.get_state())  # grain has dropped the batch that failed; we do not skip it
            raise
        first = self._next_token
        end = first + self._batch_sequences * self._seq_len
        self._next_token = end + self._discard_tokens
        return Batch(tokens, first, end)

    def resize(self, seq_len: int, batch_sequences: int) -> None:
        """Continues where it is with batches of another size. Raises UserError if they cannot be shared evenly."""
        if (seq_len, batch_sequences) == (self._seq_len, self._batch_sequences):
            return
        if batch_sequences % self._process_count:
            raise UserError(
                f"{batch_sequences} sequences a batch cannot be shared evenly by {self._process_count} processes: "
                "change --batch-tokens or --seq-len"
            )
        self._seq_len, self._batch_sequences = seq_len, batch_sequences
        self.set_state(self.get_state())

    def get_state(self) -> dict[str, Any]:
        """JSON: `next_token`, the position of the first token not handed out yet (and not to be skipped)."""
        return {"next_token": self._next_token}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at `state["next_token"]`, any position.

        Raises UserError if the shards do not reach that far.
        """
        source = SequenceSource(
            self._shards,
            self._seq_len,
            state["next_token"],
            batch_sequences=self._batch_sequences,
            discard_tokens=self._discard_tokens,
        )
        if not 0 <= state["next_token"] < source.total_tokens + self._discard_tokens:
            raise UserError(
                f"cannot continue at token {state['next_token']} of shards that hold {source.total_tokens}: "
                "give --data.train-files the shards that the run was started with"
            )
        self.close()
        self._next_token = state["next_token"]
        self._batches = self._read_ahead(source)

    def close(self) -> None:
        """Ends the reading threads."""
        if hasattr(self, "_batches"):
            self._batches.close()

    def _read_ahead(self, source: SequenceSource) -> "grain.DatasetIterator":
        import grain  # takes half a second beyond jax, and evaluation does without

        whole_batches = len(source) // self._batch_sequences * self._batch_sequences
        return iter(
            grain.MapDataset.source(source)
            .slice(slice(whole_batches))
            .batch(self._batch_sequences // self._process_count)
            .slice(slice(self._process_index, None, self._process_count))
            .to_iter_dataset(grain.ReadOptions(PREFETCH_THREADS, PREFETCH_BATCHES))
        )


def require_tokens(pattern: str, shards: Sequence[Path], tokens_needed: int, seq_len: int) -> None:
    """Raises UserError unless the shards found by `pattern` hold `tokens_needed` inputs and a last target, and each of
    them one sequence of `seq_len` tokens.

    `tokens_needed` counts what the stream passes from position 0 to the end of the run, skipped tokens too.
    """
    sizes = [len(open_shard(path)) for path in shards]
    if sum(sizes) > tokens_needed:
        return _check_lengths(shards, sizes, seq_len)
    shards_needed = -(-(tokens_needed + 1) // max(sizes))
    raise UserError(
        f"{pattern!r} matches {len(sizes)} shards with {sum(sizes):,} tokens, the run needs "
        f"{tokens_needed + 1:,} and samples are never repeated: give it {shards_needed} shards of "
        f"{max(sizes):,} tokens, or lower --steps or --batch-tokens"
    )


def _check_lengths(paths: Sequence[Path], lengths: Iterable[int], seq_len: int) -> None:
    for path, length in zip(paths, lengths):
        if length <= seq_len:
            raise UserError(
                f"{path} is shorter than one sequence: it holds {length} tokens, it takes {seq_len} "
                "and a last target; leave the file out, or lower --seq-len or --data.val-seq-len"
            )


def validation_sequences(
    pattern: str, shards: Sequence[Path], val_tokens: int, seq_len: int
) -> Int32[np.ndarray, "sequences T+1"]:
    """The first `val_tokens` tokens as sequences of `seq_len` in file order, each with its last target.

    Raises UserError as `validation_source`.
    """
    source = validation_source(pattern, shards, val_tokens, seq_len)
    return np.stack([source[k] for k in range(val_tokens // seq_len)])


def validation_source(pattern: str, shards: Sequence[Path], val_tokens: int, seq_len: int) -> SequenceSource:
    """What they are read from. Raises UserError if they are not a whole number of sequences, or more than `pattern`'s
    shards hold."""
    if val_tokens % seq_len:
        raise UserError(
            f"--data.val-tokens {val_tokens} is not a multiple of --data.val-seq-len {seq_len}: "
            f"use {max(val_tokens // seq_len, 1) * seq_len}"
        )
    source = SequenceSource(shards, seq_len)
    if len(source) * seq_len < val_tokens:
        raise UserError(
            f"{pattern!r} holds {source.total_tokens:,} tokens, --data.val-tokens {val_tokens} and the last "
            f"target take {val_tokens + 1:,}: add shards or use --data.val-tokens {len(source) * seq_len}"
        )
    return source
