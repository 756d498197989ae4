"""Builds the bundled sample that the `demo` preset trains on, from the documentation inside Python itself.

    python scripts/build_sample.py --bpe-dir DIR

The text is that of `pydoc_data.topics` and of the standard library's docstrings, so the sample depends on the Python
that runs this: senano_jax/data/sample/README.md says which one made the committed files. Beside it, the text of each
of its tokens, for `sample`.
"""

import argparse
import ast
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from senano_jax.data.bpe import encode_all, load_bpe
from senano_jax.data.sample import PIECES, TRAIN, VAL
from senano_jax.data.sample.pieces import pieces_json
from senano_jax.data.shards import write_shard
from senano_jax.data.vocabulary import END_OF_TEXT
from senano_jax.errors import one_line_errors
from senano_jax.files import expand_home, write_atomically

NOT_DOCUMENTATION = {"test", "idlelib", "lib2to3", "distutils", "turtledemo", "tkinter", "site-packages", "pydoc_data"}
SHORTEST_DOCUMENT = 200  # characters
VAL_FRACTION = 0.1  # of the tokens
SEED = 0

DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bpe-dir", type=expand_home, help="folder with encoder.json and vocab.bpe (default: downloaded)"
    )
    args = parser.parse_args()
    encoding = load_bpe(args.bpe_dir)
    texts = documents()
    encoded = [[END_OF_TEXT, *tokens] for tokens in encode_all(encoding, texts, [text[:60] for text in texts], 8)]
    val, train = split(encoded)
    for path, part in ((VAL, val), (TRAIN, train)):
        tokens = [token for document in part for token in document]
        write_shard(path, tokens)
        print(f"{path}: {len(part)} documents, {len(tokens):,} tokens")
    tokens = {token for document in encoded for token in document} - {END_OF_TEXT}
    tokens |= {encoding.encode_single_token(bytes([byte])) for byte in range(256)}  # of which any text can be made
    texts = {token: encoding.decode_single_token_bytes(token) for token in tokens}
    write_atomically(Path(PIECES), pieces_json(texts).encode())
    print(f"{PIECES}: {len(texts):,} tokens")


def documents() -> list[str]:
    """All documents in a random order that depends on the text alone."""
    texts = [*pydoc_data.topics.topics.values(), *library_documents(Path(sysconfig.get_path("stdlib")))]
    unique = sorted({text.strip() for text in texts if len(text) >= SHORTEST_DOCUMENT})
    random.Random(SEED).shuffle(unique)
    return unique


def library_documents(library: Path) -> Iterator[str]:
    """A document for each public module (with its functions) and each public class (with its methods)."""
    seen = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts[0] in NOT_DOCUMENTATION or any(map(is_private, parts)):
            continue
        module, title = ast.parse(path.read_bytes()), ".".join(parts)
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        module.body = [node for node in module.body if node not in classes]
        yield "\n\n".join(docstrings(module, title, seen))
        for node in classes:
            if not is_private(node.name):
                yield "\n\n".join(docstrings(node, f"{title}.{node.name}", seen))


def docstrings(node: Documented, title: str, seen: set[str]) -> Iterator[str]:
    """The docstrings of `node` and of what is public in it, each under its name, but for those `seen` before."""
    text = ast.get_docstring(node)
    if text and text not in seen:
        seen.add(text)
        yield f"{title}\n\n{text}"
    for child in node.body:
        if isinstance(child, DEFINITIONS) and not is_private(child.name):
            yield from docstrings(child, f"{title}.{child.name}", seen)


def is_private(name: str) -> bool:
    return name.startswith("_")


def split(encoded: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Validation, the first documents with `VAL_FRACTION` of the tokens together, and training, the others."""
    wanted = VAL_FRACTION * sum(map(len, encoded))
    held = 0
    for number, document in enumerate(encoded):
        if held >= wanted:
            return encoded[:number], encoded[number:]
        held += len(document)
    raise ValueError("no documents")


if __name__ == "__main__":
    with one_line_errors(prints_result=False):
        main()
