"""README.md and docs/: their commands can be given, their files and links are there, their Python names what is."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import senano_jax
from senano_jax.train import parse_request

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
TRAIN = re.compile(r"python -m senano_jax[. ]train((?: +[^\s`#&|;]+|\s+--\S+(?: [^\s`#-]+)*)*)")
COMMAND = re.compile(r"python -m senano_jax\.(\w+)")
SCRIPT = re.compile(r"scripts/\w+\.(?:py|sh)")
LINK = re.compile(r"\]\((?!https?://)([^)\s]+)\)")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_scripts_and_links_are_there(path):
    text = path.read_text()
    for name in COMMAND.findall(text):
        assert (ROOT / "senano_jax" / f"{name}.py").is_file() or name == "COMMAND", name
    for name in SCRIPT.findall(text):
        assert (ROOT / name).is_file(), name
    for target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], target


def test_every_run_that_a_text_trains_can_be_asked_for():
    """Presets and flags are known and their values fit; commands with a run to be filled in are left out."""
    count = 0
    for path in TEXTS:
        for match in TRAIN.finditer(path.read_text()):
            words = shlex.split(match[1].replace("\n", " "))
            if any("<" in word or word.isupper() or "--resume" in word or ".py:" in word for word in words):
                continue
            assert parse_request(words).config.steps > 0, match[0]
            count += 1
    assert count >= 5


def test_the_readme_s_python_names_what_there_is():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 15
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "senano_jax":
                assert all(hasattr(senano_jax, alias.name) for alias in node.names)
