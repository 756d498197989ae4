"""python -m senano_jax.sample RUN_DIR|FILE --prompt TEXT [flags]: text from saved weights."""

import codecs
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from senano_jax.command_line import import_jax, parse
from senano_jax.config import Config
from senano_jax.config_check import check_config
from senano_jax.data.bpe import encode_all, load_bpe
from senano_jax.data.sample.pieces import SamplePieces, is_sample, load_pieces
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import UserError, one_line_errors
from senano_jax.output import output_failure
from senano_jax.plan import Plan
from senano_jax.presets import preset
from senano_jax.sources import config_of, is_weights_file

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True)
class Arguments:
    """Prints text as the model writes it, as the beginning of a document, until it ends the document or --tokens are
    written. The attention window is that of the checkpoint's evaluation."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|FILE")]
    """Folder of a run, a .safetensors file of one, or a PyTorch checkpoint (.pt)."""
    prompt: str = ""
    """Text that the model goes on with."""
    tokens: int = 200
    """Tokens to write at most; with the prompt, no more than a training sequence held."""
    temperature: float = 1.0
    """Divides the logits: below 1 the probable becomes more probable; 0 always takes the most probable token."""
    top_k: int | None = None
    """Draw from so many of the most probable tokens; from all by default."""
    seed: int = 0
    """Seed of the draws."""
    num_samples: int = 1
    """Texts to write, one after another."""
    step: int | None = None
    """Checkpoint of this step of the run; the newest by default."""
    preset: str = "recurrent"
    """System that a PyTorch checkpoint holds; the others know their own."""
    bpe_dir: Path | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe. By default tiktoken downloads them. Only for a run on the bundled
    sample the package has the tokens itself: a prompt is made of the longest that fit, from left to right, and one that
    the sample lacks is written as its <|number|>."""


def main(arguments: Sequence[str]) -> list[str]:
    """Parses, prints the texts, and returns them without the prompt."""
    args = parse(Arguments, arguments, "python -m senano_jax.sample")
    _check(args)
    config = _config(args)
    encoding = _encoding(args.bpe_dir, config.data.train_files)
    prompt = [END_OF_TEXT, *encode_all(encoding, [args.prompt], ["--prompt"])[0]]  # a document starts with this token
    plan = Plan(config)
    if len(prompt) + args.tokens > plan.longest_sequence:
        raise UserError(
            f"--tokens {args.tokens} after a prompt of {len(prompt)} tokens is more than the {plan.longest_sequence} "
            "of a training sequence; write fewer, or shorten --prompt"
        )
    import_jax()
    import jax

    from senano_jax.jax_settings import start_jax
    from senano_jax.model.build import abstract_params, make_model
    from senano_jax.model.sampling import generate
    from senano_jax.training.mesh import make_mesh
    from senano_jax.training.weights import load_weights

    start_jax(config.dtype, config.compilation_cache)
    model = make_model(config.model, config.dtype)
    params, step = load_weights(args.source, config.model, abstract_params(model), make_mesh(1), args.step)
    step = config.steps if step is None else step
    window = plan.evaluation_window(step)

    texts = []
    for sample in range(args.num_samples):
        if output_failure() is not None:  # nobody reads on
            break
        if args.num_samples > 1:
            print(f"--- {sample + 1} of {args.num_samples}")
        key = jax.random.fold_in(jax.random.key(args.seed), sample)
        tokens = generate(model, params, prompt, args.tokens, window, key, args.temperature, args.top_k)
        texts.append(_print_text(args.prompt, decode(tokens, encoding)))
    return texts


def decode(tokens: Iterable[int], encoding: "tiktoken.Encoding | SamplePieces") -> Iterator[str]:
    """The text of the tokens before END_OF_TEXT, piece by piece: a character of several tokens comes with its last."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token == END_OF_TEXT:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def _encoding(folder: Path | None, train_files: str) -> "tiktoken.Encoding | SamplePieces":
    """GPT-2's, or for a run on the bundled sample what the package knows of it, which it says."""
    if folder is not None or not is_sample(train_files):
        return load_bpe(folder)
    print("in the tokens of the bundled sample; --bpe-dir DIR takes all of GPT-2's", file=sys.stderr)
    return load_pieces()


def _print_text(prompt: str, pieces: Iterable[str]) -> str:
    print(prompt, end="", flush=True)
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
        if output_failure() is not None:
            break
    print()
    return text


def _check(args: Arguments) -> None:
    """Raises UserError for values that cannot work."""
    for flag, value in {"--tokens": args.tokens, "--num-samples": args.num_samples, "--top-k": args.top_k}.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1")
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UserError(f"--temperature is {args.temperature}; use 0 or more")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}; it must not be negative and fit into 31 bits")


def _config(args: Arguments) -> Config:
    """That of the run or preset, with the attention that suits this machine. Raises UserError if it cannot work."""
    is_weights_file(args.source)  # or the folder of a run, else refused
    config = config_of(args.source) or preset(args.preset)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    check_config(config)
    if args.top_k is not None and args.top_k > config.model.vocab_size:
        raise UserError(f"--top-k {args.top_k} is more than the {config.model.vocab_size} tokens there are; drop it")
    return config


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
