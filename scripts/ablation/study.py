"""A study: variants of a preset, each a list of differences, read from a TOML file and checked as a whole.

    name = "rates"
    preset = "recurrent"
    tokens = 78_643_200                     # of every run
    seeds = [0, 1]
    budgets = [39_321_600, 157_286_400]     # of the first variant alone: what its tokens are worth (optional)
    keep_weights = false                    # the checkpoints of finished runs are deleted (default)

    [common]                                # differences of all variants from their preset
    data.train_files = "data/fineweb10B/fineweb_train_*.bin"
    val_every = 50

    [[variants]]                            # the first one is the base
    name = "base"

    [[variants]]
    name = "slow"
    optimizer.matrices.rate = 0.04          # a field by its path, as in config.json

    [[variants]]
    name = "slow-long-window"
    from = "slow"                           # its differences first, then these; `preset` swaps the preset
    final_window_tokens = 2304

    [[factors]]                             # changes of the base that are tried together (optional, three at least):
    name = "to-zero"                        # runs are added so that each factor is on in half of them (factorial.py).
    optimizer.schedule.floor = 0.0          # Their number and order decide these runs, factors-01, factors-02, ..

A field that may be None takes the text "None"; one that takes one of several classes takes a table with its `kind`.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from ablation.cost import at_budget
from ablation.differences import assignments, check_apart, differences, in_words, typed
from ablation.factorial import FEWEST_FACTORS, MOST_FACTORS, design
from senano_jax.config import Config, changed, settings
from senano_jax.config_check import check_config
from senano_jax.errors import UserError
from senano_jax.presets import preset

_KEYS = {"name": str, "preset": str, "tokens": int, "seeds": list, "variants": list}
_OPTIONAL = {"budgets": list, "keep_weights": bool, "common": dict, "factors": list}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # also part of a folder's name
_DESIGN = re.compile(r"factors-\d\d")  # of the runs that a study with factors adds
_MOST_TOKENS = 10**12
_JUDGED_ON = ("data.train_files", "data.val_files", "data.val_tokens")


@dataclass(frozen=True)
class Job:
    """One run: a variant, complete with its schedule, at one budget and seed."""

    name: str
    """Of its folder."""
    variant: str
    preset: str
    tokens: int
    seed: int
    config: Config


@dataclass(frozen=True)
class Variant:
    name: str
    text: str
    """Its differences as the study gives them."""
    on: tuple[str, ...] | None = None
    """The factors that are on in it: none in the base; None for a variant outside of their design."""


@dataclass(frozen=True)
class Factor:
    name: str
    text: str
    """The differences that it makes, as the study gives them."""


@dataclass(frozen=True)
class Study:
    path: Path
    name: str
    preset: str
    tokens: int
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    """Those of the base, in order, `tokens` among them; empty if the study names none."""
    keep_weights: bool
    common: str
    """The differences of all variants from their preset, as the study gives them."""
    variants: tuple[Variant, ...]
    factors: tuple[Factor, ...]
    jobs: tuple[Job, ...]

    @property
    def design(self) -> dict[str, tuple[str, ...]]:
        """The factors that are on in each variant which tells of them."""
        return {variant.name: variant.on for variant in self.variants if variant.on is not None}

    def job(self, variant: str, seed: int, tokens: int | None = None) -> Job:
        """The run of a variant at the study's budget or, of the base, at another."""
        wanted = (variant, seed, tokens or self.tokens)
        return next(job for job in self.jobs if (job.variant, job.seed, job.tokens) == wanted)


def read_study(path: Path) -> Study:
    """Reads and checks a study: every configuration in it can be built and works.

    Raises UserError naming the file, the variant and the field. Looks at no shard.
    """
    document = _read(path)
    tokens, seeds, budgets = document["tokens"], document["seeds"], document.get("budgets", [])
    _check_counts(path, "tokens", [tokens], least=1, most=_MOST_TOKENS)
    _check_counts(path, "seeds", seeds, least=0, most=2**31 - 1)
    _check_counts(path, "budgets", budgets, least=1, most=_MOST_TOKENS)
    if not seeds:
        raise UserError(f"{path}: seeds is empty; name one seed at least")
    variants = _named_tables(path, "variants", document["variants"])
    factors = _factors(path, document, variants)
    base, on = next(iter(variants)), {}
    for number, row in enumerate(design(len(factors)) if factors else ()):
        name = f"factors-{number:02d}" if number else base
        if number and name in variants:
            raise UserError(f"{path}: {name} is a run of the factors' design; give the variant another name")
        on[name] = tuple(compress(factors, row))
    jobs, configs = [], {}
    for number, name in enumerate(variants | on):
        added = [factors[factor] for factor in on.get(name, ())]
        where = f"{path}, variant {name!r}" + (f" ({', '.join(on[name])})" if added else "")
        start, config = _configuration(where, document, variants, base if added else name, added)
        _check_distinct(where, config, configs)
        configs[name] = config
        for budget in [tokens] if number else sorted({tokens, *budgets}):
            planned = config if budget == tokens else _planned(where, config, budget)
            middle = "" if budget == tokens else f"-{budget}"
            jobs += [
                Job(f"{name}{middle}-seed{seed}", name, start, budget, seed, dataclasses.replace(planned, seed=seed))
                for seed in seeds
            ]
    if (twice := _repeated([job.name for job in jobs])) is not None:
        raise UserError(f"{path}: two runs would have the folder {twice}; give the variants other names")
    return Study(
        path=path,
        name=document["name"],
        preset=document["preset"],
        tokens=tokens,
        seeds=tuple(seeds),
        budgets=tuple(sorted({tokens, *budgets})) if budgets else (),
        keep_weights=document.get("keep_weights", False),
        common="; ".join(assignments(document.get("common", {}), "")),
        variants=tuple(
            Variant(name, f"with {', '.join(on[name])}" if on.get(name) else in_words(variants[name]), on.get(name))
            for name in variants | on
        ),
        factors=tuple(Factor(name, in_words(table)) for name, table in factors.items()),
        jobs=tuple(jobs),
    )


def _read(path: Path) -> dict[str, Any]:
    """The document, its keys all known and of the right types."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); give the file of a study") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {' '.join(str(error).split())}") from None
    known = _KEYS | _OPTIONAL
    for key, value in document.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; known are {', '.join(known)}")
        if type(value) is not known[key]:
            raise UserError(f"{path}: {key} is {_shown(value)}; it takes {known[key].__name__}")
    if missing := [key for key in _KEYS if key not in document]:
        raise UserError(f"{path}: {missing[0]} is missing; a study has {', '.join(_KEYS)}")
    _check_name(path, "name", document["name"])
    return document


def _named_tables(path: Path, key: str, tables: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The table of each variant or factor by its name, in order."""
    one = key.removesuffix("s")
    if not tables or not all(isinstance(table, dict) for table in tables):
        first = ", the base first" if key == "variants" else ""
        raise UserError(f"{path}: {key} is {_shown(tables)}; give one table [[{key}]] a {one}{first}")
    for number, table in enumerate(tables, start=1):
        if "name" not in table:
            raise UserError(f"{path}: {one} {number} has no name; give it one")
        _check_name(path, f"the name of {one} {number}", table["name"])
        for link in ("from", "preset") if key == "variants" else ():
            if not isinstance(table.get(link, ""), str):
                raise UserError(f"{path}, {one} {table['name']!r}: {link} is {_shown(table[link])}; it takes str")
    if (twice := _repeated([table["name"] for table in tables])) is not None:
        raise UserError(f"{path}: two {key} are called {twice!r}; give each its own name")
    return {table["name"]: table for table in tables}


def _factors(
    path: Path, document: Mapping[str, Any], variants: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The table of each factor by its name, in order: each changes the base, and no field is another one's."""
    if "factors" not in document:
        return {}
    factors = _named_tables(path, "factors", document["factors"])
    if not FEWEST_FACTORS <= len(factors) <= MOST_FACTORS:
        raise UserError(
            f"{path}: there are {len(factors)} factors; give {FEWEST_FACTORS} to {MOST_FACTORS}, or make them variants"
        )
    base, fields = next(iter(variants)), []
    configs = {base: _configuration(f"{path}, variant {base!r}", document, variants, base)[1]}
    for name, table in factors.items():
        where = f"{path}, factor {name!r}"
        if forbidden := [key for key in ("from", "preset") if key in table]:
            raise UserError(f"{where}: {forbidden[0]} is for variants; a factor changes the base")
        if name in variants or _DESIGN.fullmatch(name):
            raise UserError(f"{where}: a variant is called so, too; give the factor a name of its own")
        if table.keys() == {"name"}:
            raise UserError(f"{where}: it changes nothing; give it a field")
        _, config = _configuration(where, document, variants, base, [table])
        _check_distinct(where, config, configs)
        configs[name] = config
        own = typed(where, configs[base], differences(table))
        check_apart(where, own, fields, "give each factor fields of its own")
        fields += own
    return factors


def _configuration(
    where: str,
    document: Mapping[str, Any],
    tables: Mapping[str, dict[str, Any]],
    name: str,
    added: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, Config]:
    """The preset's name and the configuration of a variant with the differences of `added` tables, of the study's
    tokens, but for the seed."""
    chain = [name]  # from the variant to the one at the start
    while (origin := tables[chain[-1]].get("from")) is not None:
        if origin not in tables:
            raise UserError(f"{where}: from is {origin!r}; the variants are {', '.join(tables)}")
        if origin in chain:
            raise UserError(f"{where}: from leads back to {origin!r}; derive one of them from the preset")
        chain.append(origin)
    start = next((tables[link]["preset"] for link in chain if "preset" in tables[link]), document["preset"])
    try:
        config = preset(start)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    own = [differences(table) for table in (*(tables[link] for link in reversed(chain)), *added)]
    for table in [document.get("common", {}), *own]:
        config = changed(config, typed(where, config, table))
    return start, _planned(where, config, document["tokens"])


def _planned(where: str, config: Config, tokens: int) -> Config:
    """`config` with the steps for so many tokens. Raises UserError if it cannot work, or has no such number of them."""
    try:
        config = at_budget(config, tokens)
        check_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _check_distinct(where: str, config: Config, earlier: Mapping[str, Config]) -> None:
    """Raises UserError if a variant computes what an earlier one does, or is judged on other data."""
    for name, other in earlier.items():
        if settings(config) == settings(other):
            raise UserError(f"{where} computes the same as {name!r}; leave one of them out")
    base = next(iter(earlier.values()), config)
    for path in _JUDGED_ON:
        field = path.removeprefix("data.")
        own, others = getattr(config.data, field), getattr(base.data, field)
        if own != others:
            raise UserError(f"{where}: {path} is {own!r}, that of the base {others!r}; set it in [common]")


def _check_counts(path: Path, key: str, values: Sequence[Any], least: int, most: int) -> None:
    for value in values:
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{path}: {key} has {_shown(value)}; it takes whole numbers from {least} to {most:,}")
    if (twice := _repeated(values)) is not None:
        raise UserError(f"{path}: {key} has {twice} twice; name each once")


def _check_name(path: Path, what: str, name: Any) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name) and len(name) <= 80):
        raise UserError(f"{path}: {what} is {_shown(name)}; use letters, digits and . _ + -, 80 at most")


def _repeated(values: Sequence[Any]) -> Any:
    """The first value that is there twice; None if there is none."""
    return next((value for number, value in enumerate(values) if value in values[:number]), None)


def _shown(value: Any) -> str:
    return repr(value)[:60]
