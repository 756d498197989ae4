"""The checks that refuse, in one line each, what a configuration cannot mean; they need no device and no file."""

import math

from senano_jax.config import Config, Gpt2Config, ModelConfig, Stage
from senano_jax.errors import UserError, check_counts
from senano_jax.model.config import check_model
from senano_jax.model.schedule import UNet
from senano_jax.optim.config import MuonRule, check_optimizer
from senano_jax.plan import Plan, PlannedStage
from senano_jax.windows import BLOCK


def check_config(config: Config) -> None:
    """Raises UserError at the first value that cannot work; needs no device and no file."""
    model, data = config.model, config.data
    check_counts(
        {
            "--steps": config.steps,
            "--batch-tokens": config.batch_tokens,
            "--seq-len": config.seq_len,
            "--final-window-tokens": config.final_window_tokens,
            "--devices": 1 if config.devices is None else config.devices,
            "--micro-batches": 1 if config.micro_batches is None else config.micro_batches,
            "--checkpoint-keep": config.checkpoint_keep,
            "--data.val-tokens": data.val_tokens,
            "--data.val-seq-len": data.val_seq_len,
            **_own("evaluation_window_tokens", "--evaluation-window-tokens", config),
            **{
                flag: value
                for number, stage in enumerate(config.stages)
                for name in ("batch_tokens", "seq_len")
                for flag, value in _own(name, _flag(number, name), stage).items()
            },
        },
        least=1,
    )
    check_counts(
        {
            "--val-every": config.val_every,
            "--checkpoint-every": config.checkpoint_every,
            "--checkpoint-keep-every": config.checkpoint_keep_every,
            "--data.discard-micro-batch": data.discard_micro_batch,
            "--initial-window-tokens": config.initial_window_tokens,
            "--seed": config.seed,
        },
        least=0,
    )
    if config.resume is not None and config.run_dir is None:
        raise UserError("--resume needs --run-dir, the folder of the run to go on with")
    check_model(model)
    lengths = {"--seq-len": config.seq_len, "--data.val-seq-len": data.val_seq_len}
    for number, stage in enumerate(config.stages):
        lengths |= _own("seq_len", _flag(number, "seq_len"), stage)
    for flag, length in lengths.items():
        if length % BLOCK:
            raise UserError(f"{flag} {length} is not a multiple of {BLOCK}, the block of the attention window")
        if isinstance(model, Gpt2Config) and length > model.max_length:
            raise UserError(
                f"{flag} {length} is longer than --model.max-length {model.max_length}, the positions it knows; "
                "shorten the sequence or add positions"
            )
    _check_windows(config)
    for number, stage in enumerate(config.stages):
        _check_stage(number, stage, model)
    plan = Plan(config)
    for stage in plan.stages:
        _check_steps(config, plan, stage)
    if data.val_tokens % data.val_seq_len:
        raise UserError(
            f"--data.val-tokens {data.val_tokens} is not a multiple of --data.val-seq-len {data.val_seq_len}; "
            f"the nearest is {max(1, round(data.val_tokens / data.val_seq_len)) * data.val_seq_len}"
        )
    check_optimizer(config.optimizer)
    if config.own_model is None:
        _check_columns(config)


def check_split(plan: Plan, devices: int, micro_batches: int) -> None:
    """Raises UserError if the sequences of a step cannot be dealt out evenly to the devices and micro-batches."""
    for stage in plan.stages:
        if stage.sequences % (devices * micro_batches):
            flags = [_flag_in_use(plan.config, stage, name) for name in ("batch_tokens", "seq_len")]
            raise UserError(
                f"a step of {stage.sequences} sequences ({flags[0]} / {flags[1]}) cannot be split evenly over "
                f"{devices} devices x {micro_batches} micro-batches; change --devices, --micro-batches or {flags[0]}"
            )


def _check_columns(config: Config) -> None:
    """Those of the parts that queries and keys are orthogonalised in."""
    model, rule = config.model, getattr(config.optimizer, "matrices", None)
    columns = rule.query_key_columns if isinstance(rule, MuonRule) else None
    if columns is not None and isinstance(model, ModelConfig) and model.dim % columns:
        raise UserError(
            f"--optimizer.matrices.query-key-columns is {columns}; it must divide the {model.dim} columns of queries "
            f"and keys (--model.dim), which are {model.num_heads} heads of {model.head_dim}"
        )


def _check_windows(config: Config) -> None:
    """Those that grow: not backwards, and not over the sequences."""
    initial, final = config.initial_window_tokens, config.final_window_tokens
    evaluated = {"--final-window-tokens": final} | _own(
        "evaluation_window_tokens", "--evaluation-window-tokens", config
    )
    for flag, tokens in evaluated.items():
        if initial > tokens:
            raise UserError(f"--initial-window-tokens {initial} is more than {flag} {tokens}; the window only grows")
    if final > config.seq_len and not config.stages:
        raise UserError(
            f"--final-window-tokens {final} is longer than --seq-len {config.seq_len}; "
            "shorten the window or lengthen the sequence"
        )
    if (config.evaluation_window_tokens or 0) > config.data.val_seq_len:
        raise UserError(
            f"--evaluation-window-tokens {config.evaluation_window_tokens} is longer than --data.val-seq-len "
            f"{config.data.val_seq_len}; shorten the window or lengthen the sequence"
        )


def _check_stage(number: int, stage: Stage, model: ModelConfig | Gpt2Config) -> None:
    """What is wrong with a stage wherever it stands."""
    if not (math.isfinite(stage.part) and stage.part > 0):
        raise UserError(f"{_flag(number, 'part')} is {stage.part}; use a number above 0")
    if not (math.isfinite(stage.rate) and stage.rate >= 0):
        raise UserError(f"{_flag(number, 'rate')} is {stage.rate}; use 0 or more")
    for weight in (weight for pair in stage.ahead for weight in pair):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{_flag(number, 'ahead')} holds {weight}; use weights of 0 or more")
    if stage.visits is not None:
        _check_visits(f"{_flag(number, 'visits')} {stage.visits}", stage.visits, model)


def _check_visits(what: str, visits: int, model: ModelConfig | Gpt2Config) -> None:
    if isinstance(model, Gpt2Config) or not model.layers.loop:
        raise UserError(f"{what}: this model has no loop; leave it out")
    if isinstance(model.trunk, UNet):
        raise UserError(
            f"{what}: this model's skips pair the first half of its layer applications with the second, so that their "
            "number stays; leave it out"
        )
    if not 1 <= visits <= model.layers.visits:
        raise UserError(f"{what}: the model has weights for 1 to {model.layers.visits} visits (--model.layers.visits)")


def _check_steps(config: Config, plan: Plan, stage: PlannedStage) -> None:
    """What is wrong with a stage where it stands in the run."""
    batch, length = (_flag_in_use(config, stage, name) for name in ("batch_tokens", "seq_len"))
    if stage.end == stage.first:
        raise UserError(
            f"{_flag(stage.index, 'part')} {config.stages[stage.index].part} is not one of the --steps {config.steps}; "
            "make the part larger, or train for more steps"
        )
    if stage.batch_tokens % stage.seq_len:
        raise UserError(
            f"{batch} {stage.batch_tokens} is not a multiple of {length} {stage.seq_len}; "
            f"the nearest is {max(1, round(stage.batch_tokens / stage.seq_len)) * stage.seq_len}"
        )
    reach = BLOCK * plan.window(stage.end - 1)
    if config.stages and reach > stage.seq_len:
        raise UserError(
            f"{length} {stage.seq_len} is shorter than the attention window, {reach} tokens at the end of stage "
            f"{stage.index}; lengthen the sequence or lower --final-window-tokens"
        )


def _own(name: str, flag: str, holder: Config | Stage) -> dict[str, int]:
    """The value of an optional field by its flag; none where it is left open."""
    value = getattr(holder, name)
    return {} if value is None else {flag: value}


def _flag(number: int, name: str) -> str:
    return f"--stages.{number}.{name.replace('_', '-')}"


def _flag_in_use(config: Config, stage: PlannedStage, name: str) -> str:
    """The flag that the stage has the value from: its own, or the run's."""
    own = config.stages and getattr(config.stages[stage.index], name) is not None
    return _flag(stage.index, name) if own else f"--{name.replace('_', '-')}"
