"""Arguments of the commands, parsed by tyro: the flags a command uses, in groups, and one line on whatever is wrong.

Nothing here imports JAX before it is asked to, and no command does before its arguments are parsed, but for evaluate of
a safetensors file, whose configuration is what its flags change.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from senano_jax.errors import UserError
from senano_jax.versions import installed_version

Arguments = TypeVar("Arguments")
Groups = Mapping[str, Sequence[str]]  # heading of the help: names of fields

_WIDEST = "100000"  # columns: tyro shall not break the lines of an error


def parse(
    kind: type[Arguments],
    arguments: Sequence[str],
    prog: str,
    *,
    default: Arguments | None = None,
    description: str | None = None,
    groups: Groups | None = None,
    unused: Collection[str] = (),
) -> Arguments:
    """`arguments` as an instance of the dataclass `kind`; parts that are dataclasses themselves come from `default`.

    `unused` are the fields, by their paths, that the command has no flags for; they keep their defaults. Raises
    UserError for what cannot be parsed, SystemExit for --help and --version, which it prints.
    """
    arguments = with_dashes(arguments)
    common = {"prog": prog, "description": description, "config": (tyro.conf.AvoidSubcommands,)}
    if "--version" in arguments:
        print_version()
        sys.exit()
    if asks_for_help(arguments):
        shown, values = _shown(kind, default, groups or {}, unused)
        tyro.cli(shown, default=values, args=["--help"], **common)
    _check_names(arguments, set(_flags(kind, default, unused)), switches(kind), prog)
    defaults = {} if default is None else {"default": default}
    with _one_line(prog):
        return tyro.cli(kind, args=arguments, **defaults, **common)


def print_version() -> None:
    """The installed package's."""
    version = installed_version()
    print("senano-jax, not installed" if version is None else f"senano-jax {version}")


def import_jax() -> None:
    """For commands, before a module that needs it. Raises UserError for a variable of JAX's with a value that it does
    not know, with which no module that needs it could be imported."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise UserError(f"{error}; mend or unset the variable") from None


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether --help is one of the arguments, which goes before all else that they say."""
    return "-h" in arguments or "--help" in arguments


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The flags' names with dashes for underscores: both spellings are accepted."""
    spelt = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelt.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return spelt


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of `--flag value` or `--flag=value`, read before the flags are parsed."""
    for argument, following in zip(arguments, [*arguments[1:], None]):
        if argument == flag:
            return following
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


def switches(kind: type) -> set[str]:
    """The last parts of the names of the flags that take no value, of `kind` and of all dataclasses that its fields may
    hold: `unroll` and `no-unroll` for --model.unroll."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        if hint is bool:
            found |= {name.replace("_", "-"), f"no-{name}".replace("_", "-")}
        for part in filter(dataclasses.is_dataclass, _parts(hint)):
            found |= switches(part)
    return found


def _parts(hint: Any) -> Iterator[Any]:
    """A type and what it is made of: the options of a union, the items of a tuple."""
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


def _flags(kind: type, default: Any, unused: Collection[str], prefix: str = "") -> Iterator[str]:
    """The names of all flags, as tyro makes them of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for f in dataclasses.fields(kind):
        value, path = getattr(default, f.name, None), prefix + f.name
        marks = getattr(hints[f.name], "__metadata__", ())
        if path in unused or tyro.conf.Positional in marks or tyro.conf.Suppress in marks:
            continue
        if dataclasses.is_dataclass(value):
            yield from _flags(type(value), value, unused, path + ".")
        elif isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
            for number, item in enumerate(value):
                yield from _flags(type(item), item, unused, f"{path}.{number}.")
        else:
            yield "--" + path.replace("_", "-")
            if isinstance(f.default if value is None else value, bool):
                yield "--" + f"{prefix}no-{f.name}".replace("_", "-")


def _check_names(arguments: Sequence[str], known: Collection[str], without_value: Collection[str], prog: str) -> None:
    """Raises UserError for the first flag that is none of `known`, with the nearest one; `without_value` as `switches`
    gives them."""
    for before, argument in itertools.pairwise(["", *arguments]):
        name = argument.split("=")[0]
        if not name.startswith("--") or name in known:
            continue
        ends = [flag for flag in known if flag.endswith("." + name.lstrip("-"))]
        # Flags of one group begin alike, so that difflib's own bound finds something near any of them.
        near = sorted(ends) or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
        meant = f"; did you mean {near[0]}?" if near else ";"
        takes_it = before in known and before.rpartition(".")[2].lstrip("-") not in without_value
        as_value = f"; a value that begins with -- is given as {before}=VALUE" if takes_it else ""
        raise UserError(f"unknown flag {name}{meant} {prog} --help lists all{as_value}")


@contextlib.contextmanager
def _one_line(prog: str) -> Iterator[None]:
    """What tyro says in a box and ends the program with, as a UserError."""
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDEST
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):  # of no encoding: no frames
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_reason(said.getvalue())}; {prog} --help tells more") from None
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _reason(box: str) -> str:
    """The first part of tyro's box, up to its first rule, in our words where they are known."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    _, text, *_ = [*re.split(r"^ *-{5,} *$", plain, flags=re.MULTILINE), ""]  # its heading comes before
    text = " ".join(text.split())
    if match := re.fullmatch(r"Missing from .*?: ([A-Z]\S*.*?) (\S.*?) \(required\)", text):
        return f"{match[1]} is missing: {match[2].rstrip('.')}"
    if match := re.fullmatch(r"Error parsing (\S+?):? (.*)", text):
        reason = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", match[2])
        reason = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", reason)
        return f"{match[1]}: {reason.rstrip('.')}"
    if match := re.fullmatch(r"Missing value for argument '(\S+?)'.*", text):
        return f"{match[1].replace('/', ' or ')} has no value"
    if match := re.fullmatch(r"Unrecognized options: (.*)", text):
        first = match[1].split(", ")[0]
        return f"unknown flag {first}" if first.startswith("-") else f"{first!r} belongs to no flag"
    return text.rstrip(".") or "the arguments cannot be understood"


def _shown(kind: type, default: Any, groups: Groups, unused: Collection[str], prefix: str = "") -> tuple[type, Any]:
    """A dataclass like `kind`, and its default values, of which tyro prints the help: fields of a group are in a part
    of its own, without a prefix to their names, and what is unused is left out."""
    texts, hints = field_texts(kind), typing.get_type_hints(kind, include_extras=True)
    group_of = {name: group for group, names in groups.items() for name in names}
    parts: dict[str, list] = {}
    fields, values = [], {}
    for f in dataclasses.fields(kind):
        path = prefix + f.name
        if path in unused:
            continue
        value = getattr(default, f.name, dataclasses.MISSING) if default is not None else f.default
        if dataclasses.is_dataclass(value) and any(name.startswith(path + ".") for name in unused):
            shown, values[f.name] = _shown(type(value), value, {}, unused, path + ".")
            fields.append((f.name, shown))
            continue
        own_name = {"prefix_name": False} if f.name in group_of else {}
        hint = Annotated[hints[f.name], tyro.conf.arg(help=texts.get(f.name), **own_name)]
        if f.name in group_of:
            parts.setdefault(group_of[f.name], []).append((f.name, hint, value))
        else:
            fields.append((f.name, hint))
            values[f.name] = tyro.MISSING if value is dataclasses.MISSING else value
    for title in [title for title in groups if title in parts]:
        part = dataclasses.make_dataclass(title, [(name, hint) for name, hint, _ in parts[title]])
        fields.append((title, part))
        values[title] = part(**{name: value for name, _, value in parts[title]})
    order = {title: number for number, title in enumerate(groups)}
    fields.sort(key=lambda f: order.get(f[0], len(order)))  # groups first; stable
    shown = dataclasses.make_dataclass(kind.__name__, fields)
    written_by_dataclasses = (kind.__doc__ or "").startswith(f"{kind.__name__}(")
    shown.__doc__ = "" if written_by_dataclasses else kind.__doc__
    return shown, shown(**values)


def field_texts(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, those that it inherits included."""
    texts = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                texts[statement.target.id] = inspect.cleandoc(following.value.value)
    return texts
