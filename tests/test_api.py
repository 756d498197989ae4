"""The package from Python: what it is called, runs with an optimiser or a model of one's own, comparisons of runs."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from tiny import tiny_model
from tiny_demo import tiny_demo
from written_logs import run_folder, torch_log

import senano_jax
from senano_jax import evaluate, train
from senano_jax.config import Stage, changed
from senano_jax.config_file import read_config
from senano_jax.errors import UserError
from senano_jax.interop.safetensors_file import write_safetensors
from senano_jax.model.build import abstract_params
from senano_jax.model.schedule import Weighted
from senano_jax.optim.config import OwnOptimizer
from senano_jax.optim.recipe import make_optimizer
from senano_jax.presets import PRESETS, demo
from senano_jax.runlog.reader import read_log
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import make_mesh
from senano_jax.training.own import Own, naming, on_mean_gradients
from senano_jax.training.state import TrainState


class Bigram(nn.Module):
    """The next token from this one alone."""

    vocabulary: int
    rank: int = 4

    @nn.compact
    def __call__(self, inputs, targets, window_blocks):
        table = self.param("table", nn.initializers.normal(1.0), (self.vocabulary, self.rank))
        head = self.param("head", nn.initializers.zeros, (self.rank, self.vocabulary))
        logits = table[inputs] @ head
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets.astype(jnp.int32)).sum()


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run with a model and an optimiser of its own, and what it was told of as it went."""
    told = []
    config = changed(tiny_demo(), {"run_dir": str(tmp_path_factory.mktemp("own") / "run"), "steps": 3})
    model = Bigram(config.model.vocab_size)
    return senano_jax.fit(config, optax.sgd(0.5), model=model, name="bigram", on_record=told.append, quiet=True), told


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (Stage(part=1, ahead=((1.0, 1.0), (0.5, 0.0))), "ahead"),
        (Stage(part=1, visits=1), "visits"),  # of the two that its configuration has
    ],
)
def test_a_model_of_ones_own_knows_no_stages_that_call_it_otherwise(tmp_path, stage, name):
    """Said before there is a folder."""
    changes = {"run_dir": str(tmp_path / "run"), "stages": (Stage(part=1), stage), "steps": 4}
    changes |= {"model.layers.loop": 2, "model.layers.visits": 2, "model.trunk": Weighted()}
    with pytest.raises(UserError, match=rf"--stages\.1\.{name} is for the models of this package"):
        senano_jax.fit(changed(tiny_demo(), changes), optax.sgd(0.5), model=Bigram(64), quiet=True)
    assert not list(tmp_path.iterdir())


def test_the_names_are_there_and_the_package_alone_imports_no_jax():
    for name in senano_jax.__all__:
        assert getattr(senano_jax, name).__doc__
    assert set(senano_jax.__all__) <= set(dir(senano_jax))
    assert (senano_jax.train, senano_jax.evaluate) == (train, evaluate), "the commands stay modules"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = senano_jax.nothing
    program = "import sys, senano_jax; dir(senano_jax); print(any(n in sys.modules for n in ('jax', 'numpy')))"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=variables)
    assert done.stdout == "False\n"


def test_a_run_of_ones_own_is_recorded_as_the_command_does(own_run):
    run, told = own_run
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == told
    assert [record["step"] for record in told if "loss" in record] == [1, 2, 3]
    assert all("lr" not in record for record in told), "nothing is known of its rates"
    document = json.loads((run.folder / "config.json").read_text())
    assert document["preset"] == run.name == "bigram"
    assert document["optimizer"]["kind"] == "OwnOptimizer"
    assert document["optimizer"]["name"] == "bigram"
    assert document["own_model"].startswith("Bigram ")
    assert read_config(run.folder / "config.json")[0] == run.config


def test_its_weights_give_its_loss_again(own_run):
    run, _ = own_run
    assert run.final_loss == run.log.final.val_loss
    assert senano_jax.validation_loss(run) == pytest.approx(run.final_loss, rel=1e-6)
    again = senano_jax.validation_loss(run.params, run.config, model=run.model)
    assert again == pytest.approx(run.final_loss, rel=1e-6)
    assert senano_jax.count_parameters(run.params) == 2 * 4 * run.config.model.vocab_size


def test_a_safetensors_file_brings_its_configuration_and_its_step(own_run, tmp_path, monkeypatch):
    run, _ = own_run
    write_safetensors(tmp_path / "w.safetensors", run.params, 1, (run.folder / "config.json").read_text())
    monkeypatch.setattr("senano_jax.api.make_evaluator", lambda *_: lambda params, window_blocks: window_blocks)
    assert senano_jax.validation_loss(run) == 2
    assert senano_jax.validation_loss(tmp_path / "w.safetensors", model=run.model) == 1
    assert senano_jax.validation_loss(tmp_path / "w.safetensors", run.config, model=run.model) == 1


def test_commands_refuse_what_they_do_not_have(own_run):
    """In one line: a model that only the program has, and an optimiser to go on with."""
    folder = str(own_run[0].folder)
    with pytest.raises(UserError, match=r"a program's own model \(Bigram \w{8}\); use it there"):
        evaluate.main([folder])
    with pytest.raises(UserError, match="optimiser 'bigram' is a program's own; train there"):
        train.main([f"--run-dir={folder}", "--resume"])


def test_another_optimiser_cannot_go_on_with_it(own_run):
    run, _ = own_run
    config = changed(tiny_demo(), {"run_dir": str(run.folder), "steps": 3, "resume": "latest"})
    with pytest.raises(UserError, match=r"optimizer\.update_checksum \w{8} -> \w{8}\); drop"):
        senano_jax.fit(config, optax.sgd(0.4), model=run.model, name="bigram", quiet=True)
    with pytest.raises(UserError, match=r"own_model Bigram \w{8} -> None"):
        senano_jax.fit(config, optax.sgd(0.5), name="bigram", quiet=True)
    again = senano_jax.fit(config, optax.sgd(0.5), model=run.model, name="bigram", quiet=True)
    assert again.final_loss == run.final_loss


def checksum(optimizer):
    return naming(tiny_demo(), Own(optimizer), "x").optimizer.update_checksum


def test_checksums_are_of_what_is_computed():
    """Not of names or of addresses: made twice they are equal, and any number sets them apart."""
    assert checksum(optax.adamw(1e-3)) == checksum(optax.adamw(1e-3))
    different = [
        optax.adamw(1e-3), optax.adamw(1.001e-3), optax.adamw(1e-3, b2=0.99), optax.adam(1e-3), optax.lion(1e-3),
        optax.adamw(optax.cosine_decay_schedule(1e-3, 10)), optax.adamw(optax.cosine_decay_schedule(1e-3, 11)),
        optax.apply_if_finite(optax.adamw(1e-3), 2), optax.add_noise(0.1, 0.5, jax.random.key(0)),
        optax.add_noise(0.1, 0.5, jax.random.key(1)), optax.adagrad(1e-3), optax.adagrad(1e-3, 0.2),
    ]  # fmt: skip
    assert len({checksum(optimizer) for optimizer in different}) == len(different)


def test_an_optimiser_of_ones_own_gets_means_and_its_updates_the_stage_s_factor():
    params = {"x": jnp.ones(3)}
    optimizer = on_mean_gradients(optax.sgd(0.5))
    gradients, state = {"x": jnp.full(3, 8.0)}, optimizer.init(params)
    updates, _ = optimizer.update(gradients, state, params, tokens=4, rate=jnp.float32(3))
    assert updates["x"].tolist() == [-3.0] * 3
    updates, _ = optimizer.update(gradients, state, params, tokens=4)
    assert updates["x"].tolist() == [-1.0] * 3


def test_a_recipe_given_as_an_optimiser_keeps_its_state():
    """What the step looks for in it, such as an average, is found."""
    recipe = tiny_demo().optimizer
    params = abstract_params(tiny_model())
    own, configured = on_mean_gradients(make_optimizer(recipe, 10)), make_optimizer(recipe, 10)
    assert jax.tree.structure(jax.eval_shape(own.init, params)) == jax.tree.structure(
        jax.eval_shape(configured.init, params)
    )


def test_flags_and_keys_in_an_optimiser_s_state_are_saved(tmp_path):
    optimizer = optax.apply_if_finite(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(5)), optax.sgd(0.1)), 3)
    params = {"x": jnp.ones(3)}
    state = TrainState(jnp.int32(1), params, jax.jit(optimizer.init)(params))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, jax.eval_shape(lambda: state), make_mesh(1))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    (flag,), (key,) = (
        [leaf for leaf in jax.tree.leaves(restored) if jnp.issubdtype(leaf.dtype, kind)]
        for kind in (jnp.bool_, jax.dtypes.prng_key)
    )
    assert flag == state.opt_state.last_finite
    assert key == jax.random.key(5)


def test_a_model_of_ones_own_with_parameters_that_the_recipe_does_not_know_needs_an_optimiser():
    recipe = demo().optimizer  # of several rules
    with pytest.raises(UserError, match=r"parameter table fits the patterns of no group.*give it an optimiser too"):
        senano_jax.fit(changed(tiny_demo(), {"optimizer": recipe}), model=Bigram(50_257), quiet=True)


def test_fit_wants_a_configuration():
    with pytest.raises(UserError, match="fit got 'demo'; give a configuration"):
        senano_jax.fit("demo")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (3, "fit got the optimiser 3; give a transformation"),
        (optax.adamw, r"optax's adamw with a number of steps; call it with a rate: adamw\(3e-3\)"),
        (functools.partial(optax.sgd, momentum=0.9), "optax's sgd with a number of steps"),
        (lambda steps: None, "<lambda> returned None, not an optax transformation; mend it"),
    ],
)
def test_fit_wants_an_optimiser_or_a_function_that_makes_one(optimizer, message, tmp_path):
    config = changed(tiny_demo(), {"run_dir": str(tmp_path / "run")})
    with pytest.raises(UserError, match=message) as caught:
        senano_jax.fit(config, optimizer, quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a/../../b", "x: y", "mine.py:wide", "", "-x", 3])
def test_a_name_of_a_run_is_part_of_a_path(name, tmp_path):
    config = changed(tiny_demo(), {"run_dir": str(tmp_path / "run")})
    with pytest.raises(UserError, match=r"fit got the name .*; use letters, digits and \. _ \+ -"):
        senano_jax.fit(config, name=name, quiet=True)


def test_a_run_is_called_by_the_nearest_preset_of_those_that_make_one(own_run, monkeypatch):
    names = []

    def train(config, preset, own, **options):
        names.append(preset)
        return own_run[0].folder

    monkeypatch.setattr("senano_jax.training.loop.train", train)
    monkeypatch.setattr("senano_jax.presets.PRESETS", dict(PRESETS))
    senano_jax.register("failing", lambda: 1 // 0)
    senano_jax.register("nothing", lambda: None)
    senano_jax.fit(changed(demo(), {"seed": 1}))
    senano_jax.register("wide", lambda: changed(demo(), {"model.dim": 96}))
    senano_jax.fit(changed(demo(), {"model.dim": 96, "seed": 1}))
    assert names == ["demo", "wide"]


def test_parameters_need_their_configuration():
    with pytest.raises(UserError, match="needs the config of these weights"):
        senano_jax.validation_loss({})
    with pytest.raises(UserError, match="nothing is called nowhere"):
        senano_jax.validation_loss("nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        senano_jax.Run("nowhere")


def test_a_comparison_of_named_groups_and_of_runs_by_their_settings(tmp_path):
    ours = [run_folder(tmp_path / f"{seed}", 5.0, 4.0 - seed / 100, seed=seed) for seed in range(3)]
    theirs = [torch_log(tmp_path / f"{seed}.txt", 5.0, 3.9 - seed / 100) for seed in range(3)]
    named = senano_jax.comparison({"JAX": ours, "PyTorch": theirs, "one": tmp_path / "0"})
    assert [(row.name, row.n) for row in named.rows] == [("JAX", 3), ("PyTorch", 3), ("one", 1)]
    assert named.target == pytest.approx(3.99)
    assert named.rows[1].final_loss_test.difference == pytest.approx(-0.1)
    assert "| PyTorch |" in str(named) and named._repr_markdown_() == str(named)
    grouped = senano_jax.comparison([*ours, theirs[0]], target=4.5)
    assert [(row.name, row.n) for row in grouped.rows] == [("tiny", 3), ("0", 1)]
    assert grouped.rows[0].reached == 3
    with pytest.raises(UserError, match="is given twice"):
        senano_jax.comparison({"a": [ours[0], ours[0]]})
    for nothing in ({}, [], {"a": []}):
        with pytest.raises(UserError, match="no runs"):
            senano_jax.comparison(nothing)
    for wrong in (3, [3], {"a": 3}, {"a": [3]}):
        with pytest.raises(UserError, match="comparison got 3; give runs, folders or"):
            senano_jax.comparison(wrong)


def test_what_several_groups_have_in_common_is_said_once(tmp_path):
    runs = {"short": torch_log(tmp_path / "short.txt", 5.0, 4.0)}
    runs |= {name: torch_log(tmp_path / f"{name}.txt", 5.0, 4.5, 4.0) for name in ("a", "b")}
    notes = senano_jax.comparison(runs).notes
    assert notes == ("short and a and b: a schedule of 3.00M tokens, not 2.00M",)


def test_runs_of_two_optimisers_are_two_groups(tmp_path):
    folders = []
    for name, seed in (("adamw", 0), ("adamw", 1), ("lion", 0)):
        optimizer = {"kind": "OwnOptimizer", "name": name, "update_checksum": "0" * 8}
        config = dataclasses.asdict(tiny_demo()) | {"optimizer": optimizer, "seed": seed, "steps": 2}
        config["model"] = {"kind": "ModelConfig"} | config["model"]
        config["model"]["trunk"] = {"kind": "UNet"}
        folders.append(run_folder(tmp_path / f"{name}{seed}", 5.0, 4.0, **config))
    assert isinstance(read_config(tmp_path / "lion0" / "config.json")[0].optimizer, OwnOptimizer)
    rows = senano_jax.comparison(folders).rows
    assert [(row.name, row.n) for row in rows] == [
        ("tiny (optimizer.name=adamw)", 2),
        ("tiny (optimizer.name=lion)", 1),
    ]
    assert read_log(folders[0]).planned_tokens == 1024
