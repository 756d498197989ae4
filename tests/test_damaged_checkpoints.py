"""Checkpoints and records that are damaged: passed over, refused or noticed, and never lost."""

import os
import shutil

import kept_programs
import pytest
import resumed_runs
from faults.comparison import abstract_of, state_of
from resumed_runs import STEPS, assert_same_bits, assert_same_run, init_state_of, resume, steps_of

from senano_jax import evaluate
from senano_jax.errors import UserError
from senano_jax.training.checkpoint import Checkpoints
from senano_jax.training.mesh import make_mesh
from senano_jax.training.resume import restore

undisturbed, copy = resumed_runs.undisturbed, resumed_runs.copy  # fixtures
one_trace = kept_programs.one_trace  # for all tests here


def damage(run_dir, step, how):
    """Harms the checkpoint of `step`: its largest file of weights is cut, changed in one bit, or gone."""
    file = max(
        (run_dir / "checkpoints" / str(step) / "params").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size
    )
    if how == "removed":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_a_damaged_newest_checkpoint_is_passed_over(how, copy, undisturbed, capsys):
    damage(copy, STEPS, how)
    resume(copy)
    said = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint {STEPS} in {copy / 'checkpoints'}" in said and "going back to that of step 4" in said
    assert f"kept as {copy / 'checkpoints' / f'unread-{STEPS}'} what could not be read" in said
    assert "bound method" not in said  # what orbax says of an array, and not of the file
    assert_same_run(copy, undisturbed)
    assert steps_of(copy) == [6, 4, 2]


def test_a_checkpoint_that_cannot_be_read_once_is_not_lost(copy):
    """Nor the second time: each keeps a name of its own, which no reader takes for a checkpoint."""
    for name in ("unread-6", "unread-6-2"):
        with Checkpoints(copy / "checkpoints", keep_latest=9) as checkpoints:
            assert checkpoints.set_aside_after(4) == [copy / "checkpoints" / name]
            assert checkpoints.steps() == [4, 2]
        shutil.copytree(copy / "checkpoints" / name, copy / "checkpoints" / "6")
    assert_same_bits(state_of(copy), state_of(copy, 6))


def test_a_checkpoint_of_another_program_is_refused(tmp_path, undisturbed):
    state, record = init_state_of(undisturbed)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, record | {"next_token": 0, "train_ms": 0.0, "evaluated": False})
        with pytest.raises(UserError, match=r"checkpoint 1 does not say .* \(its record lacks run_folder\); use"):
            restore(checkpoints, "latest", abstract_of(undisturbed), make_mesh(1), print)


def test_when_all_checkpoints_are_damaged_it_says_so(copy):
    for step in (2, 4, 6):
        damage(copy, step, "flipped")
    with pytest.raises(UserError, match=r"checkpoint 2 in .* (damaged|cannot be read)") as caught:
        resume(copy)
    assert "\n" not in str(caught.value)
    assert steps_of(copy) == [6, 4, 2], "nothing is deleted where nothing was restored"


@pytest.mark.parametrize(
    ("old", "new"), [(b'"next_token": ', b'"next_token": 1'), (b'"evaluated": true', b'"evaluated": null')]
)
def test_a_changed_record_is_noticed(old, new, copy):
    """It holds the position in the stream: the arrays' checksums say nothing about it."""
    file = copy / "checkpoints" / str(STEPS) / "record" / "metadata"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match="damaged: the checksum of its record does not match"):
        state_of(copy)


@pytest.mark.parametrize("loss", [b"", b"[]", b'{"val_loss": "x"}', b'{"val_loss": NaN}', b"\xff{", b"[" * 100_000])
def test_a_damaged_validation_loss_costs_only_itself(loss, copy, undisturbed):
    (copy / "checkpoints" / str(STEPS) / "metrics" / "metrics").write_bytes(loss)
    with Checkpoints(copy / "checkpoints", keep_latest=9) as checkpoints:
        assert checkpoints.steps() == [6, 4, 2]
        assert_same_bits(checkpoints.restore(STEPS, abstract_of(copy), make_mesh(1))[0], state_of(undisturbed))


def test_damaged_weights_are_not_evaluated(copy):
    damage(copy, STEPS, "flipped")
    with pytest.raises(UserError, match=f"checkpoint {STEPS} in .* (damaged|cannot be read)"):
        evaluate.main([str(copy)])


def test_a_damaged_array_is_found_by_its_checksum(tmp_path, undisturbed):
    """Also where the file format itself notices nothing: here the array is damaged before it is written."""
    state, record = init_state_of(undisturbed)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, record)
        assert_same_bits(checkpoints.restore(1, abstract_of(undisturbed), make_mesh(1))[0], state)
    other = state._replace(params={**state.params, "skip_weights": state.params["skip_weights"] + 1})
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(1, other, record)
        checkpoints.steps()
    shutil.rmtree(tmp_path / "checkpoints/1/params")
    shutil.copytree(tmp_path / "other/1/params", tmp_path / "checkpoints/1/params")
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoint 1 in .* is damaged: its checksums do not match"):
            checkpoints.restore(1, abstract_of(undisturbed), make_mesh(1))
        with pytest.raises(UserError, match=r"checkpoint 1 in .* is damaged: its checksums do not match"):
            checkpoints.restore_params(1, abstract_of(undisturbed).params, make_mesh(1))


def test_a_shortened_record_of_the_run_is_not_continued(copy):
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    os.truncate(copy / "metrics.jsonl", 100)
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than when the checkpoint was saved"):
        resume(copy)
