"""What a notebook needs: train, evaluate and compare from Python. `import senano_jax` offers it by these names.

`senano_jax.train`, `.evaluate` and `.compare` are the modules of the commands, so the functions have other names:
`fit`, `validation_loss` and `comparison`. All of them raise UserError, with one line, for what the caller can mend.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import jax
import optax

from senano_jax.config import Config, settings
from senano_jax.config_check import check_config
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.files import expand_home
from senano_jax.jax_settings import start_jax
from senano_jax.model.build import Model, Params, abstract_params, make_model
from senano_jax.plan import Plan
from senano_jax.presets import can_name, preset, preset_names
from senano_jax.runlog.comparison import Group, Row, cautions, compare, notes, read_groups
from senano_jax.runlog.curves import RunLog
from senano_jax.runlog.reader import read_log
from senano_jax.runlog.sinks import Record
from senano_jax.runlog.statistics import Sample
from senano_jax.runlog.tables import comparison_tables, to_markdown
from senano_jax.sources import config_of, is_weights_file
from senano_jax.training import loop
from senano_jax.training.evaluation import make_evaluator
from senano_jax.training.mesh import make_mesh, replicated
from senano_jax.training.own import NOTHING_OWN, Own, naming
from senano_jax.training.weights import load_weights

Optimizer = optax.GradientTransformation | Callable[[int], optax.GradientTransformation]
Source = "Run | str | PathLike"


class Run:
    """The folder of a run and what it holds, read when asked for. `model` is needed for the weights of a run that was
    given one of its own. Raises UserError if the folder is not that of a run."""

    def __init__(self, folder: str | PathLike, model: Model | None = None):
        self.folder: Path = expand_home(folder)
        self.model = model
        self.config, self.name = read_config(self.folder / "config.json")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @functools.cached_property
    def log(self) -> RunLog:
        """Its evaluations (`points`) and steps (`train_points`), with losses in nats a token."""
        return read_log(self.folder)

    @property
    def final_loss(self) -> float:
        """Validation loss of the newest evaluation, in nats a token. Raises UserError if there is none."""
        if self.log.final is None:
            raise UserError(f"{self.folder}: the run was not evaluated; train it to its end")
        return self.log.final.val_loss

    @functools.cached_property
    def params(self) -> Params:
        """The weights of the newest checkpoint, those that are evaluated, on the first device."""
        return self.weights()[0]

    def weights(self, step: int | None = None) -> tuple[Params, int]:
        """The weights of the checkpoint of `step`, or of the newest one, and its step."""
        return _load(str(self.folder), self.config, self.model, step)


def fit(
    config: Config,
    optimizer: Optimizer | None = None,
    *,
    model: Model | None = None,
    name: str | None = None,
    on_record: Callable[[Record], None] | None = None,
    quiet: bool = False,
) -> Run:
    """Trains as `python -m senano_jax.train` does, folder and checkpoints included, and returns the run.

    Args:
      config: what to train, such as `changed(preset("demo"), {"seed": 1})`.
      optimizer: an optax transformation in place of config.optimizer, or a function that makes one for a number of
        steps. It gets gradients of the mean loss, in nats a token, rounded to the types of the parameters.
      model: a linen module in place of the one that config.model describes: (inputs [B, T], targets [B, T],
        window_blocks) to the loss summed over tokens, float32.
      name: what the run is called, in the name of its folder and in comparisons, and its optimiser if one is given; by
        default the nearest preset, and the function that made the optimiser. Of letters, digits and . _ + -
      on_record: is called with each line of metrics.jsonl, a dictionary: `step` and `loss` of a step, `step` and
        `val_loss` of an evaluation. What it raises ends the run.
      quiet: print nothing.

    Raises UserError for what cannot work, and Stopped, a KeyboardInterrupt, once an interrupted run is saved. JAX's
    settings are changed for the whole process.
    """
    if not isinstance(config, Config):
        raise UserError(f"fit got {config!r:.60}; give a configuration, such as preset('demo')")
    if name is not None and not (isinstance(name, str) and can_name(name)):
        raise UserError(f"fit got the name {name!r:.60}; use letters, digits and . _ + -")
    preset_name = name or _nearest_preset(config)
    optimizer_name = name or _name_of(optimizer)
    own = Own(_transformation(optimizer, config.steps), model)
    if own != NOTHING_OWN:
        check_config(config)
        start_jax(config.dtype, config.compilation_cache, config.deterministic)
        config = naming(config, own, optimizer_name)
    return Run(loop.train(config, preset_name, own, quiet=quiet, on_record=on_record), model)


def validation_loss(
    weights: "Source | Params",
    config: Config | None = None,
    *,
    model: Model | None = None,
    step: int | None = None,
) -> float:
    """Mean cross-entropy over the validation tokens, in nats a token, with the window of the evaluation after `step`.

    Args:
      weights: a run or its folder, a file (.safetensors, or a PyTorch checkpoint, .pt), or parameters.
      config: what they belong to and what is read; by default that of the run, which a .safetensors file brings along.
        Parameters and PyTorch files need one.
      model: a linen module in place of the one that config.model describes; by default that of the run.
      step: checkpoint of a run, the newest by default; of parameters the steps that they were trained for, by default
        all of config.steps. A file is of one step: none may be given.

    Raises UserError for weights that do not fit, and for validation shards that are not there or too short.
    """
    if isinstance(weights, (str, PathLike)) and not is_weights_file(str(weights)):
        weights = Run(weights, model)
    if isinstance(weights, Run):
        config, model = config or weights.config, model or weights.model
    elif isinstance(weights, (str, PathLike)):
        config = config or config_of(str(weights))
    if config is None:
        raise UserError("validation_loss needs the config of these weights; give it as the second argument")
    check_config(config)
    start_jax(config.dtype, config.compilation_cache, config.deterministic)
    params = weights
    if isinstance(weights, (Run, str, PathLike)):
        params, step = _load(_path(weights), config, model, step)
    mesh = make_mesh(config.devices)
    evaluate = make_evaluator(config, _model(config, model), mesh)
    window = Plan(config).evaluation_window(config.steps if step is None else step)
    return evaluate(jax.device_put(params, replicated(mesh)), window)


@dataclass(frozen=True)
class Comparison:
    """Groups of runs against the first of them. Printed it is Markdown; a notebook shows its tables."""

    target: float
    """Validation loss to reach, in nats a token."""
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    """The figures, a row a group."""
    notes: tuple[str, ...]
    """What to know about them: first what keeps them from being compared."""

    def __str__(self) -> str:
        tables = [to_markdown(table) for table in comparison_tables(self.rows, self.target)]
        return "\n\n".join([*tables, *self.notes])

    _repr_markdown_ = __str__


def comparison(
    runs: "Mapping[str, Source | Iterable[Source]] | Sequence[Source]", target: float | None = None
) -> Comparison:
    """Final losses, tokens to the `target` loss and tests between groups of runs, such as seeds of one system.

    `runs` are runs, their folders or logs of other programs, of which those that differ in their seed alone are one
    group; or groups of them by name: {"Muon": runs, "AdamW": others}. The first group is what the others are compared
    with; without a `target` it is that group's mean final loss. Raises UserError for a log that is damaged or given
    twice.
    """
    if isinstance(runs, Mapping):
        groups = [_group(name, sources) for name, sources in runs.items()]
    else:
        groups = read_groups([_path(source) for source in _sources(runs)], None)
    if not groups:
        raise UserError("comparison got no runs; give runs, folders or {name: runs}")
    if target is None:
        losses = [run.final.val_loss for run in groups[0].runs if run.final is not None]
        target = Sample.of(losses).mean if losses else 3.28
    rows = compare(groups, target)
    return Comparison(target, tuple(groups), tuple(rows), (*cautions(rows), *notes(groups)))


def _group(name: str, sources: "Source | Iterable[Source]") -> Group:
    paths = [_path(source) for source in _sources(sources)]
    if not paths:
        raise UserError(f"comparison: {name!r} has no runs; give it one")
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{twice} is given twice, which would count as two seeds; give each run once")
    return Group(name, tuple(read_log(path) for path in paths))


def _sources(given: "Source | Iterable[Source]") -> "list[Source]":
    kinds = (Run, str, PathLike)
    sources = list(given) if isinstance(given, Iterable) and not isinstance(given, kinds) else [given]
    if wrong := [source for source in sources if not isinstance(source, kinds)]:
        raise UserError(f"comparison got {wrong[0]!r:.60}; give runs, folders or {{name: runs}}")
    return sources


def _path(source: "Source") -> str:
    return str(source.folder) if isinstance(source, Run) else str(source)


def _load(source: str, config: Config, model: Model | None, step: int | None) -> tuple[Params, int | None]:
    abstract = abstract_params(_model(config, model))
    return load_weights(source, config.model, abstract, make_mesh(1), step, own_model=model is not None)


def _model(config: Config, model: Model | None) -> Model:
    return make_model(config.model, config.dtype) if model is None else model


def _transformation(optimizer: Optimizer | None, steps: int) -> optax.GradientTransformation | None:
    """The optimiser, made for so many steps if it is a function. Raises UserError for what neither is nor makes one."""
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    function = optimizer
    while isinstance(function, functools.partial):
        function = function.func
    name = _name_of(function)
    if not callable(function):
        raise UserError(f"fit got the optimiser {function!r:.60}; give a transformation, such as optax.adamw(3e-3)")
    if (getattr(function, "__module__", None) or "").split(".")[0] == "optax":
        raise UserError(f"fit would call optax's {name} with a number of steps; call it with a rate: {name}(3e-3)")
    made = optimizer(steps)
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(f"the optimiser function {name} returned {made!r:.60}, not an optax transformation; mend it")
    return made


def _name_of(optimizer: Optimizer | None) -> str:
    """That of the function, or of the one that made the transformation."""
    function = optimizer.update if isinstance(optimizer, optax.GradientTransformation) else optimizer
    return getattr(function, "__qualname__", type(function).__name__).split(".<locals>")[0]


def _nearest_preset(config: Config) -> str:
    """That from which `config` differs in the fewest settings: what it was most likely derived from. A registered one
    that makes no configuration is none of them."""
    given = settings(config)

    def differences(name: str) -> float:
        try:
            there = settings(preset(name))
        except UserError:
            return math.inf
        return sum(there.get(path, ...) != given.get(path, ...) for path in there | given)

    return min(preset_names(), key=differences)
