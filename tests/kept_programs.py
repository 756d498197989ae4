"""A fixture for files that train many times in one process: what a run traces, lowers and loads serves the next run of
the same model, recipe and devices too, as JAX has it where the functions are the same objects.

What such a function makes depends on its arguments alone. A file may have the fixture if its tests change nothing
inside of the model, the optimiser and the step. Processes that tests start trace everything themselves.
"""

import functools

import jax
import pytest

from senano_jax.training import evaluation, resume, wiring


def kept(function):
    """The function, called once for arguments that can be told apart."""
    cached = functools.cache(function)

    def call(*arguments):
        try:
            hash(arguments)
        except TypeError:
            return function(*arguments)
        return cached(*arguments)

    return call


make_optimizer = kept(wiring.make_optimizer)
make_train_step = kept(wiring.make_train_step)
make_eval_step = kept(evaluation.make_eval_step)
abstract_state = kept(wiring.abstract_state)
initial_state = kept(resume.init_state)


def init_state(*arguments):
    """A copy: the step consumes it."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), initial_state(*arguments))


@pytest.fixture(scope="module", autouse=True)
def one_trace():
    """For all tests of a file that has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiring, "make_optimizer", make_optimizer)
        patch.setattr(wiring, "make_train_step", make_train_step)
        patch.setattr(wiring, "abstract_state", abstract_state)
        patch.setattr(evaluation, "make_eval_step", make_eval_step)
        patch.setattr(resume, "init_state", init_state)
        yield
