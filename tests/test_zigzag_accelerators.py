"""ZigZag accelerators: levels, fan-out and kept operands by hand, mappings that keep to them, refusals in one line."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from codesign import cli, evaluate_chip, trace
from codesign.zigzag_accelerators import read_zigzag_accelerator
from hw.operation import PASSES, make_operation, stack_operations


def port(kind, bits, *allocation):
    return {"name": "p", "type": kind, "bandwidth_min": 8, "bandwidth_max": bits, "allocation": list(allocation)}


def memory(size, operands, served, *ports):
    costs = {"r_cost": 1.0, "w_cost": 1.2, "area": 0, "latency": 1}
    return {"size": size, **costs, "operands": operands, "ports": list(ports), "served_dimensions": served}


# A register of weights at each MAC, one of sums for every row of 8, an SRAM of inputs and sums, DRAM.
ACCELERATOR = {
    "name": "small",
    "memories": {
        "weights": memory(64, ["I2"], [], port("read", 8, "I2, tl"), port("write", 16, "I2, fh")),
        "sums": memory(
            96, ["O"], ["D1"], port("read", 32, "O, tl"), port("read", 32, "O, th"), port("write", 48, "O, fh", "O, fl")
        ),
        "sram": memory(2**19, ["I1", "O"], ["D1", "D2"], port("read_write", 512, "I1, tl")),
        "dram": memory(2**36, ["I1", "I2", "O"], ["D1", "D2"], port("read_write", 64, "I1, tl")),
    },
    "operational_array": {"unit_energy": 0.04, "unit_area": 1, "dimensions": ["D1", "D2"], "sizes": [8, 4]},
}  # fmt: skip


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_levels_by_hand(tmp_path):
    chip, holds = read_zigzag_accelerator(write(tmp_path / "small.yaml", ACCELERATOR))
    assert chip.names == ("weights", "sums", "sram", "dram")
    assert chip.kinds == ("register", "register", "sram", "dram") and chip.ports == ("1R1W", "1R1W", "1RW", "1RW")
    assert chip.fanout.tolist() == [[1, 1], [8, 1], [4, 1], [1, 1]]
    assert chip.instances().tolist() == [32, 4, 1, 1] and float(chip.num_macs()) == 32
    assert chip.size_bits.tolist() == [64, 96, 2**19, np.inf]
    assert chip.bandwidth_bits.tolist() == [8, 48, 512, 64]  # the slower direction: of sums, 48 written against 64 read
    assert chip.banks.tolist() == [1, 1, 2, 1]  # no wider than 256 bits
    assert holds.astype(int).tolist() == [[0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]  # O, I1, I2
    assert chip.mac.widths.tolist() == [8, 8] and chip.mac.style == "fixed"


def test_passes_keep_what_their_memories_hold(tmp_path):
    """Weights, inputs, outputs at each level below DRAM: sums are what a pass accumulates."""
    accelerator = read_zigzag_accelerator(write(tmp_path / "small.yaml", ACCELERATOR))
    freedom = accelerator.freedom(stack_operations([make_operation(K=2, C=2, pass_=pass_) for pass_ in PASSES]))
    assert freedom.keep[:, 0].astype(int).tolist() == [
        [[1, 0, 0], [0, 0, 1], [0, 1, 1]],  # forward: weights at the MACs
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],  # gradient of inputs: weights there too, errors from the SRAM
        [[0, 0, 1], [1, 0, 0], [1, 1, 0]],  # gradient of weights: errors at the MACs
    ]
    assert not freedom.toggles.any()


@pytest.mark.slow
def test_found_mappings_keep_to_it_and_are_costed(tmp_path, capsys):
    path = write(tmp_path / "small.yaml", ACCELERATOR)
    accelerator = read_zigzag_accelerator(path)
    params = {"dense": {"kernel": jnp.zeros((16, 8))}, "out": {"kernel": jnp.zeros((8, 4))}}
    workload = trace(lambda p, x: (x @ p["dense"]["kernel"]) @ p["out"]["kernel"], params, jnp.zeros((4, 16)))
    bits = jnp.full((2, 4), 4.0)
    widths, freedom = (
        (workload.operation_bits(bits), workload.tensor_bits(bits)),
        accelerator.freedom(workload.step.operations),
    )
    found = evaluate_chip(
        accelerator.chip, workload.step, *widths, jax.random.key(0), workload.labels, evaluations=300, freedom=freedom
    )  # fmt: skip
    kept = np.asarray(found.candidates.mapping.keep)
    np.testing.assert_array_equal(kept[:, :, :-1], np.broadcast_to(freedom.keep, kept[:, :, :-1].shape))
    assert (
        cli.main(["cost", "--model", "mlp", "--chip", str(path), "--bits", "4", "--evaluations", "300", "--json"]) == 0
    )
    costed = json.loads(capsys.readouterr().out)
    assert {"weights", "sums", "sram", "dram"} < set(costed["inference"]["energy_by_component_uj"])
    assert cli.main(["cost", "--chip", str(path), "--rows", "4"]) == 2
    assert "got rows beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("operational_array", "is_imc"), True, "got is_imc, computing in memory"),
        (("operational_array", "sizes"), [8, 0], "expected the size of D2 to be a whole number from 1, got 0"),
        (("operational_array", "sizes"), [8], "expected a size for each of the dimensions ['D1', 'D2'], got [8]"),
        (("operational_array", "input_precision"), [8], "two widths in bits"),
        (("operational_array", "dataflows"), {}, "got 'dataflows', without counterpart"),
        (("memories", "sums", "served_dimensions"), ["D3"], "memory sums: expected served_dimensions among D1, D2"),
        (
            ("memories", "weights", "served_dimensions"),
            ["D2"],
            "expected memories that nest, got weights, which serves",
        ),
        (("memories", "sums", "served_dimensions"), ["D1", "D2"], None),
        (("memories", "sums", "operands"), ["W"], "memory sums: expected operands among O, I1, I2"),
        (("memories", "sums", "latency"), 3, "memory sums: expected accesses of one cycle"),
        (("memories", "sums", "ports"), [port("read", 8)], "memory sums: expected ports to read and to write"),
        (("memories", "sums", "ports"), [{"fh": "w_port_1"}], "memory sums: KeyError: 'type'"),
        (("memories", "sums", "size"), "96", "memory sums: expected size to be a whole number from 1, got '96'"),
        (("memories", "dram", "operands"), ["O"], "expected DRAM to hold I1, I2 and O"),
        (("memories", "dram"), None, "memory dram: expected it as ZigZag's accelerators have it, got NoneType"),
        (("memories", "sram", "mem_type"), "dram", "expected the last memory alone to be DRAM"),
        (("memories",), [], "expected memories by name"),
    ],
)
def test_what_has_no_counterpart_is_told_in_one_line(tmp_path, capsys, place, value, message):
    content = copy.deepcopy(ACCELERATOR)
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    path = write(tmp_path / "small.yaml", content)
    if message is None:
        read_zigzag_accelerator(path)
        return
    assert cli.main(["cost", "--chip", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told and str(path) in told and told.count("\n") == 1


def test_memories_of_an_operand_stay_in_their_order(tmp_path):
    content = copy.deepcopy(ACCELERATOR)
    first = {"inner": memory(2**15, ["O"], ["D1", "D2"], port("read_write", 64))}
    content["memories"] = first | content["memories"]
    with pytest.raises(
        ValueError, match=r"expected memories of O from those of few MACs to those of many, got \['inner'"
    ):
        read_zigzag_accelerator(write(tmp_path / "small.yaml", content))
