"""Training steps on one array: wired dataflows are kept to, and nothing wired beats what every pass chooses itself."""

import numpy as np
import pytest

from experiments.table_steps import DATAFLOWS, freedom_of, main, run, trace_step
from hw.chips import CHIPS
from hw.operation import LOOPS


def test_a_dataflow_wires_both_axes_and_leaves_time_free():
    chip = CHIPS["edge_trainer"]()
    wired, free = (
        dict(zip(LOOPS, np.asarray(freedom_of(chip, d).num_places), strict=True)) for d in ("channels", "own")
    )
    assert wired == dict.fromkeys(LOOPS, 3) | dict.fromkeys("GKC", 4)  # three levels in time below DRAM, and an axis
    assert free == dict.fromkeys(LOOPS, 5)


@pytest.mark.slow
def test_own_mappings_are_never_worse():
    rows = run("resnet18", CHIPS["edge_trainer"](), pixels=32, batch=2, bits=8.0, evaluations=320, rounds=2)
    assert [row.dataflow for row in rows] == [*DATAFLOWS, "own"]
    assert min(row.edp for row in rows) == rows[-1].edp
    assert all(0 < share <= 1 + 1e-6 for row in rows for share in row.utilisation)


@pytest.mark.slow
def test_the_step_is_that_of_the_network():
    """ResNet-18 has 21 products; the first gives no input gradient. 3 x 1.81 G products a sample, less those of conv1."""
    workload = trace_step("resnet18", 224, 32)
    assert len(workload.names) == 3 * 21 - 1
    macs = sum(row["macs"] for row in workload.table()) / 32
    assert macs == pytest.approx(3 * 1.814e9 - 118.0e6, rel=0.03)  # taps on padding are not products


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="expected a chip among"):
        main(chip="none")
