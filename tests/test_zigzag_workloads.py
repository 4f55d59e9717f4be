"""ZigZag workloads: shapes and MACs of every layer by hand, and what is none of it in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from codesign import cli, trace
from codesign.zigzag_workloads import read_zigzag_workload

CONV = "O[b][k][oy][ox]+=W[k][c][fy][fx]*I[b][c][iy][ix]"


def layer(number, equation, source, steps=(1, 1), weights=None, **sizes):
    """An entry of a workload; `steps` are strides along width and height."""
    return {
        "id": number,
        "operator_type": "any",
        "equation": equation,
        "dimension_relations": [f"ix={steps[0]}*ox+1*fx", f"iy={steps[1]}*oy+1*fy"],
        "loop_dims": list(sizes),
        "loop_sizes": list(sizes.values()),
        "operand_precision": {"W": 8, "I": 8, "O": 16, "O_final": 8},
        "operand_source": {"I": source, "W": number if weights is None else weights},
    }


# A strided convolution, a depthwise one beside it, their sum, a mean over what is left, a matrix product of it.
NETWORK = [
    layer(0, CONV, 0, (2, 1), B=1, K=4, C=3, OY=6, OX=5, FY=3, FX=3),
    layer(1, "O[b][g][oy][ox]+=W[g][fy][fx]*I[b][g][iy][ix]", 0, B=1, G=4, OY=6, OX=5, FY=3, FX=3),
    layer(2, "O[b][g][oy][ox]=W[b][g][oy][ox]+I[b][g][oy][ox]", 1, weights=0, B=1, G=4, OY=6, OX=5),
    layer(3, "O[b][g][oy][ox]+=W[fx][fy]*I[b][g][iy][ix]", 2, (2, 3), B=1, G=4, OY=2, OX=2, FX=3, FY=3),
    layer(4, "O[b][k]+=W[k][c]*I[b][c]", 3, B=1, K=7, C=16),
]


def write(path, layers):
    path.write_text(yaml.safe_dump(layers))
    return path


def test_a_network_by_hand(tmp_path):
    read = read_zigzag_workload(write(tmp_path / "net.yaml", NETWORK), batch_size=2)
    assert [x.shape for x in read.inputs] == [(2, 8, 11, 3)]  # (6 - 1) + 3 by 2 (5 - 1) + 3
    workload = trace(read.fn, read.params, *read.inputs)
    macs = {row["layer"]: row["macs"] for row in workload.table() if row["pass"] == "forward"}
    assert macs == {"layer0": 2 * 4 * 3 * 30 * 9, "layer1": 2 * 4 * 30 * 9, "layer4": 2 * 7 * 16}
    assert {"layer0 (weight_grad)", "layer1 (input_grad)", "layer4 (input_grad)"} <= set(workload.labels)
    # With kernels that pick the centre, the sum is twice the first layer and the rest are means of it.
    ones = jax.tree.map(lambda x: jnp.zeros(x.shape), read.params)
    ones["layer0"]["kernel"] = ones["layer0"]["kernel"].at[1, 1, 0].set(1.0)
    ones["layer1"]["kernel"] = ones["layer1"]["kernel"].at[1, 1].set(1.0)
    ones["layer4"]["kernel"] = ones["layer4"]["kernel"].at[0, 0].set(1.0)
    x = np.random.default_rng(0).random((2, 8, 11, 3)).astype(np.float32)
    first = 2 * x[:, 1:7, 1:11:2, 0]
    padded = first[:, :, :5]
    means = [padded[:, 3 * i : 3 * i + 3, 2 * j : 2 * j + 3].mean((1, 2)) for i in range(2) for j in range(2)]
    (result,) = read.fn(ones, jnp.asarray(x))
    np.testing.assert_allclose(result.reshape(2, 7), np.repeat(4 * sum(means)[:, None], 7, 1), rtol=1e-5)


def test_trace_of_a_workload_file(tmp_path, capsys):
    path = write(tmp_path / "net.yaml", NETWORK)
    assert cli.main(["trace", "--model", str(path), "--batch-size", "2"]) == 0
    assert "layer4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"equation": "O[b]=I[b]"}, "layer 0: expected an equation of two operands, got 'O[b]=I[b]'"),
        (0, {"equation": CONV.replace("W", "A")}, "layer 0: expected the operands W and I, got A and I"),
        (1, {"operand_source": {"I": 0, "W": 0}}, "layer 1: expected constant weights (W: 1), got those of layer 0"),
        (1, {"operand_source": {"I": 9, "W": 1}}, "layer 1: expected ids that stand once and sources above, got [9]"),
        (1, {"id": 0, "operand_source": {"I": 0, "W": 0}}, "layer 0: expected ids that stand once"),
        (0, {"loop_sizes": [1, 4, 3, 6, 5, 3, 0]}, "layer 0: expected sizes from 1"),
        (0, {"loop_sizes": [1, 4, 3]}, "layer 0: zip() argument 2 is shorter"),
        (0, {"loop_dims": ["B", "K", "C", "OY", "OX", "FY", "H"]}, "layer 0: expected sizes from 1 of B, G, K"),
        (0, {"dimension_relations": ["ix=ox+fx+1"]}, "layer 0: expected relations such as"),
        (4, {"loop_sizes": [1, 7, 17]}, "layer 4: expected 17 channels, got 4 from the layer it reads"),
        (2, {"operand_source": {"I": 1, "W": 2}, "id": 2, "loop_sizes": [1, 3, 6, 5]}, "layer 2: "),
        (3, {"equation": None}, "layer 3: AttributeError"),
    ],
)
def test_what_is_no_workload_is_told_in_one_line(tmp_path, capsys, number, change, message):
    path = write(tmp_path / "net.yaml", [x | change if x["id"] == number else x for x in NETWORK])
    assert cli.main(["trace", "--model", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_another_yaml_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a list of layers, as ZigZag's workloads are, got dict"):
        read_zigzag_workload(write(tmp_path / "net.yaml", {"layers": []}), 1)
