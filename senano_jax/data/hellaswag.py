"""HellaSwag (Zellers et al., arXiv 1905.07830): sentences, four endings each, one of which is the true one.

A row is a context with one of its endings, as llm.c and build-nanogpt score it: the field `ctx` as it is, a space and
the ending, tokenised apart. The harness of EleutherAI prepares the same file otherwise (the activity in front, brackets
taken out, lengths in characters), so that its numbers differ by some tenths of a percent or more.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from senano_jax.data.bpe import encode_all
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError

if TYPE_CHECKING:
    import tiktoken

ENDINGS = 4


class Question(NamedTuple):
    """One line of the file."""

    line: int  # from 1
    context: str
    endings: tuple[str, ...]
    label: int  # of the true ending


class Row(NamedTuple):
    """A document of its own: END_OF_TEXT, the context, an ending."""

    tokens: list[int]
    first: int  # position of the ending's first token


def read_questions(path: Path) -> list[Question]:
    """The questions of a file in the published form, hellaswag_val.jsonl. Raises UserError naming the line at fault."""
    try:
        with path.open(encoding="utf-8") as file:
            questions = [_question(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, ValueError) as error:  # or not UTF-8
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"--hellaswag {path} cannot be read ({reason}); give HellaSwag's hellaswag_val.jsonl") from None
    if not questions:
        raise UserError(f"--hellaswag {path} is empty; give HellaSwag's hellaswag_val.jsonl")
    return questions


def _question(path: Path, number: int, line: str) -> Question:
    try:
        fields = json.loads(line)
        context, endings, label = fields["ctx"], fields["endings"], fields["label"]
    except (ValueError, LookupError, TypeError, RecursionError):
        context, endings, label = None, None, None
    label = int(label) if isinstance(label, str) and label in map(str, range(ENDINGS)) else label
    fault = None
    if not isinstance(context, str) or not context:
        fault = "has no text as ctx"
    elif not isinstance(endings, list) or len(endings) != ENDINGS or not all(e and isinstance(e, str) for e in endings):
        fault = f"has no {ENDINGS} texts as endings"
    elif type(label) is not int or not 0 <= label < ENDINGS:
        fault = f"has no label from 0 to {ENDINGS - 1}"
    if fault:
        raise UserError(f"--hellaswag {path}: line {number} {fault}; give HellaSwag's hellaswag_val.jsonl")
    return Question(number, context, tuple(endings), label)


def rows_of(questions: Sequence[Question], encoding: "tiktoken.Encoding", longest: int, vocab_size: int) -> list[Row]:
    """The rows of all questions, ENDINGS for each, in order.

    Raises UserError for one of more than `longest` tokens, or with a token that is none of the vocabulary.
    """
    names = [f"line {question.line} of --hellaswag" for question in questions]
    contexts = encode_all(encoding, [question.context for question in questions], names)
    texts = [f" {ending}" for question in questions for ending in question.endings]
    endings = encode_all(encoding, texts, [name for name in names for _ in range(ENDINGS)])
    rows = []
    for number, ending in enumerate(endings):
        context = [END_OF_TEXT, *contexts[number // ENDINGS]]
        rows.append(Row(context + ending, len(context)))
        name, largest = names[number // ENDINGS], max(rows[-1].tokens)
        if len(rows[-1].tokens) > longest:
            raise UserError(f"{name} has {len(rows[-1].tokens)} tokens, more than the {longest} of a training sequence")
        if largest >= vocab_size:
            raise UserError(f"{name} has token {largest}; the model's vocabulary has {vocab_size}: give its own tables")
    return rows
