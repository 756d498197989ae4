"""The model of a step on many GPUs: bytes against a ring played through, and the document that it writes."""

from pathlib import Path

import pytest
import scaling
from scaling import System, communication_ms, optimiser_ms, sent, step_ms

from senano_jax.errors import UserError

DOCUMENT = Path(scaling.ROOT) / "docs" / "scaling.md"


def by_a_ring(numbers, size, gpus, *, both_ways):
    """Bytes that one GPU hands on: N - 1 parts of N in a reduce-scatter or all-gather, twice that in an all-reduce."""
    part, handed_on = numbers * size / gpus, 0.0
    for _ in range((2 if both_ways else 1) * (gpus - 1)):
        handed_on += part
    return handed_on


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_bytes_are_those_of_rings(gpus):
    parameters, matrices = 1000, 600
    gather = by_a_ring(matrices, 2, gpus, both_ways=False)
    everything = by_a_ring(parameters, 4, gpus, both_ways=True)
    assert sent(parameters, matrices, gpus) == pytest.approx(everything + gather)
    others = by_a_ring(parameters - matrices, 4, gpus, both_ways=True)
    scattered = by_a_ring(matrices, 4, gpus, both_ways=False)
    assert sent(parameters, matrices, gpus, shared=True) == pytest.approx(others + scattered + gather)


def test_the_record_s_optimiser_and_communication_are_those_profiled():
    """8.76 and 5.76 ms on one and two GPUs, 3.81 ms of communication on two."""
    record = System("recurrent", *scaling.sizes("recurrent"), 4.0, "H100")
    assert (optimiser_ms(record, 1), optimiser_ms(record, 2)) == pytest.approx((8.76, 5.76))
    assert (communication_ms(record, 1), communication_ms(record, 2)) == pytest.approx((0, 3.81))
    assert step_ms(record, 1000, 2) == pytest.approx(2.0 + 5.76 + 3.81)


def test_a_folder_without_measurements_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no measured steps; give --logs"):
        scaling.document(tmp_path)


def test_the_document_is_what_the_script_writes():
    """Its measured figures are read from the logs."""
    assert scaling.document(scaling.ROOT / "logs") == DOCUMENT.read_text()
