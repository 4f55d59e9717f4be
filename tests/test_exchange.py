"""Exchange: a problem file computes what JAX computes, reads back as it was written, and is refused where it is no nest."""

import csv
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax import lax

from codesign import trace
from codesign.exchange import read_timeloop_problem, timeloop_problem, write_layers, write_timeloop_problems
from hw.operation import make_operation

GROUPED: dict[str, Any] = {
    "G": 2,
    "N": 2,
    "K": 2,
    "C": 2,
    "P": 2,
    "Q": 3,
    "R": 3,
    "S": 2,
    "stride": (2, 1),
    "dilation": (1, 2),
}


def execute(problem, arrays):
    """Runs a problem: for every point of its loops, the product of the two operands read is added to the third."""
    shape, sizes = problem["shape"], problem["instance"]

    def place(space, point):
        return tuple(
            sum(point[term[0]] * (sizes[term[1]] if len(term) > 1 else 1) for term in axis)
            for axis in space["projection"]
        )

    spaces = shape["data-spaces"]
    (written,) = (space for space in spaces if space.get("read-write"))
    read = [space for space in spaces if space is not written]
    result = np.zeros_like(arrays[written["name"]])
    for values in itertools.product(*(range(sizes[name]) for name in shape["dimensions"])):
        point = dict(zip(shape["dimensions"], values, strict=True))
        result[place(written, point)] += np.prod([arrays[space["name"]][place(space, point)] for space in read])
    return written["name"], result


@pytest.mark.parametrize("pass_", ["forward", "input_grad", "weight_grad"])
def test_a_problem_computes_the_convolution_and_its_gradients(pass_):
    """A grouped convolution, asymmetric in everything, against XLA and its derivatives; arrays in the nest's own order."""
    g, n, k, c, p, q, r, s = (GROUPED[name] for name in "GNKCPQRS")
    (width_step, height_step), (width_gap, height_gap) = GROUPED["stride"], GROUPED["dilation"]
    width, height = (p - 1) * width_step + (r - 1) * width_gap + 1, (q - 1) * height_step + (s - 1) * height_gap + 1
    rng = np.random.default_rng(0)
    weights, inputs, errors = (
        rng.integers(-3, 4, size).astype(np.float32)
        for size in ((g, k, c, r, s), (g, n, c, width, height), (g, n, k, p, q))
    )

    def convolution(weights, inputs):
        out = lax.conv_general_dilated(
            inputs.transpose(1, 0, 2, 3, 4).reshape(n, g * c, width, height),
            weights.reshape(g * k, c, r, s),
            (width_step, height_step),
            "VALID",
            rhs_dilation=(width_gap, height_gap),
            feature_group_count=g,
        )
        return out.reshape(n, g, k, p, q).transpose(1, 0, 2, 3, 4)

    outputs, pull = jax.vjp(convolution, weights, inputs)
    weight_grad, input_grad = pull(jnp.asarray(errors))
    expected = {"forward": outputs, "input_grad": input_grad, "weight_grad": weight_grad}[pass_]
    problem = timeloop_problem(make_operation(**GROUPED, pass_=pass_))["problem"]
    arrays = {"Weights": weights, "Inputs": inputs, "Outputs": errors}
    _, result = execute(problem, arrays)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("pass_", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("sizes", [GROUPED, {"N": 8, "K": 5, "C": 7}, {"C": 3, "P": 4, "Q": 4, "S": 3}])
def test_what_is_written_is_read_back(tmp_path, sizes, pass_):
    operation = make_operation(**sizes, pass_=pass_)
    path = tmp_path / "problem.yaml"
    path.write_text(yaml.safe_dump(timeloop_problem(operation)))
    chex.assert_trees_all_equal(read_timeloop_problem(path), operation)


# As people write them: M for output channels, underscores, a depthwise convolution over channels C, no coefficients.
FOREIGN = """
problem:
  version: 0.4
  shape:
    name: depthwise
    dimensions: [C, R, S, N, P, Q]
    coefficients:
    - {name: Wstride, default: 2}
    data_spaces:
    - {name: Weights, projection: [[[C]], [[R]], [[S]]]}
    - {name: Inputs, projection: [[[N]], [[C]], [[S], [Q]], [[R], [P, Wstride]]]}
    - {name: Outputs, projection: [[[N]], [[C]], [[Q]], [[P]]], read_write: true}
  instance: {C: 16, R: 3, S: 5, N: 1, P: 8, Q: 9}
"""
MATRIX = """
problem:
  shape:
    name: matrix
    dimensions: [M, N, K]
    data-spaces:
    - {name: Weights, projection: [[[K]], [[M]]]}
    - {name: Inputs, projection: [[[N]], [[K]]]}
    - {name: Outputs, projection: [[[N]], [[M]]], read-write: True}
  instance: {M: 6, N: 4, K: 9}
"""


def test_dimensions_are_known_by_what_they_move(tmp_path):
    path = tmp_path / "problem.yaml"
    path.write_text(FOREIGN)
    chex.assert_trees_all_equal(read_timeloop_problem(path), make_operation(G=16, R=3, S=5, P=8, Q=9, stride=(2, 1)))
    path.write_text(MATRIX)
    chex.assert_trees_all_equal(read_timeloop_problem(path), make_operation(N=4, K=6, C=9))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("problem:", "problems:", "'problem' to be a dict"),
        ("C: 16", "C: 0", "C to be an integer from 1 to 16777216, got 0"),
        ("C: 16", "C: 2.5", "got 2.5"),
        ("C: 16", "C: 1000000000000", "integer from 1 to 16777216"),
        ("default: 2", "default: -2", "Wstride to be an integer from 1"),
        ("C: 16, ", "", "expected a size of every dimension in instance, got none of C"),
        ("Q: 9}", "Q: 9, densities: 1}", "expected sizes of dimensions and coefficients in instance, got 'densities'"),
        ("name: Inputs", "name: Activations", "data spaces Weights, Inputs and Outputs, got Weights, Activations"),
        (", read_write: true", "", "one data space with read-write, got none"),
        ("[[R], [P, Wstride]]", "[[R], [P, Stride]]", "spell it out"),
        ("[[C]], [[R]], [[S]]", "[[C]], [[R], [S]]", "sums with coefficients, got .* in Weights"),
        ("[[R], [P, Wstride]]", "[[R], [P], [N]]", "one dimension of Outputs and one of Weights, got R . P . N"),
        ("[[S], [Q]], ", "", "join or split it"),
        ("dimensions: [C,", "dimensions: [[C],", "dimensions to be names"),
        ("[[N]], [[C]], [[Q]]", "{N: C}", "got {'N': 'C'} in Outputs"),
        ("instance: {", "instance: {{", "not valid YAML"),
    ],
)
def test_no_nest_is_told_in_one_line(tmp_path, old, new, message):
    assert old in FOREIGN
    path = tmp_path / "problem.yaml"
    path.write_text(FOREIGN.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_timeloop_problem(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def paths_within(tree):
    """The path of every value in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(key,), *((key, *rest) for rest in paths_within(value))]]


def changed(tree, path, value):
    """A tree with one value replaced."""
    copy = tree.copy()
    copy[path[0]] = value if len(path) == 1 else changed(tree[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("value", [None, [], {}, "C", "", -1, 2, True, 1e99, [["C"]], {"C": 1}], ids=repr)
def test_no_change_of_a_value_is_a_traceback(tmp_path, value):
    tree, path = yaml.safe_load(FOREIGN), tmp_path / "problem.yaml"
    refused = 0
    for place in paths_within(tree):
        path.write_text(yaml.safe_dump(changed(tree, place, value)))
        try:
            read_timeloop_problem(path)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


@pytest.fixture(scope="module")
def workload():
    """A strided convolution with padding, then a product."""
    params = {"conv": {"kernel": jnp.ones((3, 5, 3, 4))}, "out": {"kernel": jnp.ones((4, 2))}}

    def network(params, images):
        x = lax.conv_general_dilated(
            images, params["conv"]["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.mean(axis=(1, 2)) @ params["out"]["kernel"]

    return trace(network, params, jnp.ones((2, 8, 6, 3)))


def test_problem_files_of_a_training_step(workload, tmp_path):
    paths = write_timeloop_problems(workload, tmp_path / "problems")
    assert [path.name for path in paths] == [
        "000-conv-forward.yaml",
        "001-out-forward.yaml",
        "002-out-weight_grad.yaml",
        "003-out-input_grad.yaml",
        "004-conv-weight_grad.yaml",
    ]
    macs = [float(read_timeloop_problem(path).macs) for path in paths]
    conv, out = 2 * 4 * 3 * (4 * 6) * (3 * 5), 2 * 4 * 2
    assert macs == [conv, out, out, out, conv]


def test_layer_tables(workload, tmp_path):
    bits = jnp.full((2, 4), 6.0)
    for name in ("layers.csv", "layers.yaml"):
        write_layers(workload, tmp_path / name, bits)
    with (tmp_path / "layers.csv").open() as file:
        from_csv = list(csv.DictReader(file))
    from_yaml = yaml.safe_load((tmp_path / "layers.yaml").read_text())["layers"]
    assert from_csv == [{key: str(value) for key, value in row.items()} for row in from_yaml]
    first = from_yaml[0]
    expected = {"layer": "conv", "pass": "forward", "runs": 1, "G": 1, "N": 2, "K": 4, "C": 3, "P": 6, "Q": 4}
    expected |= {"R": 5, "S": 3, "Wstride": 1, "Hstride": 2, "Wdilation": 1, "Hdilation": 1}
    assert first | expected == first
    assert (first["weights_bits"], first["macs"]) == (6.0, 2 * 4 * 3 * 24 * 15)
    with pytest.raises(ValueError, match=r"ends in .csv, .yaml or .yml, got 'layers.xlsx'"):
        write_layers(workload, tmp_path / "layers.xlsx")
