"""Everything public says what it is."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "senano_jax"
ASKED_FOR_BY_A_LIBRARY = {"setup"}  # of linen modules


def silent(tree: ast.Module | ast.ClassDef, prefix: str = ""):
    """Names of the public functions, classes and methods without a docstring."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and node.name not in ASKED_FOR_BY_A_LIBRARY:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from silent(node, f"{prefix}{node.name}.")


def test_what_is_public_has_a_docstring():
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.read_text()]
    assert len(files) > 90
    trees = {path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    assert [str(path) for path, tree in trees.items() if not ast.get_docstring(tree)] == []
    assert [f"{path}: {name}" for path, tree in trees.items() for name in silent(tree)] == []


def test_a_silent_method_is_found():
    tree = ast.parse(
        'class A:\n    """Said."""\n    def b(self): pass\n    def setup(self): pass\n    def _c(self): pass'
    )
    assert list(silent(tree)) == ["A.b"]
