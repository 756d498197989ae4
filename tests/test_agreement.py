"""Processes of one run that are not alike: which one, and in what; between real processes: test_processes.py."""

from types import SimpleNamespace

import jax
import pytest

from senano_jax.config import changed
from senano_jax.errors import UserError
from senano_jax.presets import demo
from senano_jax.training import agreement
from senano_jax.training.agreement import require_same_program


def device(process, kind="cpu"):
    return SimpleNamespace(process_index=process, device_kind=kind)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["H100", "H100 H100"], r"process 1 differs from process 0 in devices \(2 x H100, not 1 x H100\)"),
        (["H100", "H100", "H200"], r"process 2 differs from process 0 in devices \(1 x H200, not 1 x H100\)"),
    ],
)
def test_processes_with_other_devices_are_named(monkeypatch, kinds, said):
    devices = [device(process, kind) for process, some in enumerate(kinds) for kind in some.split()]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError, match=said):
        require_same_program(demo())


def programs_of(monkeypatch, tmp_path, *sources):
    """What processes would say of themselves that have these texts in a file of the package."""
    for process, source in enumerate(sources):
        package = tmp_path / str(process) / "senano_jax"
        package.mkdir(parents=True)
        (package / "plan.py").write_text(source)
        monkeypatch.setattr(agreement, "_PACKAGE", package)
        yield agreement.program(demo())


def test_a_process_with_other_code_is_named_with_the_file(monkeypatch, tmp_path):
    programs = list(programs_of(monkeypatch, tmp_path, "a = 1", "a = 1", "a = 2"))
    agreement.require_equal(programs[:2])
    with pytest.raises(UserError, match=r"process 2 differs from process 0 in senano_jax/plan.py \("):
        agreement.require_equal(programs)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.layers.visits", 5, r"in model.layers.visits \(5, not 2\)"),
        ("checkpoint_every", 7, r"in checkpoint_every \(7, not 0\)"),
        ("run_dir", "logs/b", r"in run_dir \(logs/b, not None\)"),
    ],
)
def test_a_process_with_another_configuration_is_named_with_the_field(path, value, said):
    programs = [agreement.program(config) for config in (demo(), changed(demo(), {path: value}))]
    with pytest.raises(UserError, match=f"process 1 differs from process 0 {said}; start all"):
        agreement.require_equal(programs)


def test_a_machine_may_keep_its_files_elsewhere():
    elsewhere = changed(demo(), {"data.train_files": "/scratch/*.bin", "compilation_cache": "/scratch/xla"})
    assert agreement.program(elsewhere) == agreement.program(demo())
