"""ONNX graphs computed in JAX: equal to onnxruntime, traced and costed as any function, refused with a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import cli, trace
from codesign.onnx_export import export_onnx, write_onnx
from codesign.onnx_reader import read_onnx
from nets import LayerRule, PrecisionRules, init_precision
from nets.precision import freeze

onnx = pytest.importorskip("onnx", reason="needs the extra 'exchange'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'dev'")


def make_model(nodes, shape, initializers, rank=4):
    helper = onnx.helper
    float_type = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, **attributes) for op, inputs, outputs, attributes in nodes],
        "graph",
        [helper.make_tensor_value_info("x", float_type, ["n", *shape])],
        [helper.make_tensor_value_info("y", float_type, ["n", "c", "h", "w"][:rank])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# As an exporter writes it: a strided and a depthwise convolution, batch normalisation, pooling, a shape computed from a shape.
CNN = [
    ("Conv", ["x", "conv1.weight", "conv1.bias"], ["a"], {"strides": [2, 1], "pads": [1, 0, 1, 2], "kernel_shape": [3, 3]}),
    ("BatchNormalization", ["a", "bn.scale", "bn.bias", "bn.mean", "bn.var"], ["b"], {}),
    ("Clip", ["b", "zero", "six"], ["c"], {}),
    ("Conv", ["c", "conv2.weight"], ["d"], {"group": 4, "auto_pad": "SAME_UPPER", "dilations": [1, 1]}),
    ("MaxPool", ["d"], ["e"], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ("AveragePool", ["e"], ["f"], {"kernel_shape": [2, 2], "pads": [0, 1, 0, 1]}),
    ("Shape", ["f"], ["s"], {}),
    ("Gather", ["s", "first"], ["n"], {"axis": 0}),
    ("Concat", ["n", "rest"], ["t"], {"axis": 0}),
    ("Reshape", ["f", "t"], ["g"], {}),
    ("Gemm", ["g", "fc.weight", "fc.bias"], ["h"], {"transB": 1, "alpha": 0.5}),
    ("Softmax", ["h"], ["y"], {}),
]  # fmt: skip
CNN_TENSORS = {
    "conv1.weight": normal(4, 3, 3, 3), "conv1.bias": normal(4), "bn.scale": normal(4), "bn.bias": normal(4),
    "bn.mean": normal(4), "bn.var": np.float32([1, 2, 3, 4]), "zero": np.float32(0), "six": np.float32(6),
    "conv2.weight": normal(4, 1, 3, 3), "first": np.int64([0]), "rest": np.int64([-1]),
    "fc.weight": normal(5, 4 * 1 * 5), "fc.bias": normal(5),
}  # fmt: skip


def test_a_network_computes_what_onnxruntime_computes(tmp_path):
    path = tmp_path / "cnn.onnx"
    write_onnx(make_model(CNN, (3, 8, 8), CNN_TENSORS, rank=2), path)
    read = read_onnx(path, batch_size=3)
    assert [(i.shape, i.dtype) for i in read.inputs] == [((3, 3, 8, 8), np.float32)]
    x = normal(3, 3, 8, 8)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        jax.jit(read.fn)(read.params, x)[0], session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-6
    )

    workload = trace(read.fn, read.params, *read.inputs)
    forward = {row["layer"]: row["macs"] for row in workload.table() if row["pass"] == "forward"}
    assert forward == {"conv1": 3 * 4 * 3 * 9 * 4 * 8, "conv2": 3 * 4 * 9 * 4 * 8, "fc": 3 * 5 * 20}
    assert "conv2 (input_grad)" in workload.labels and "conv1 (input_grad)" not in workload.labels


def test_a_quantised_network_is_read_back(tmp_path):
    """Our own export: the same results, and weights that are trained."""
    params = {"hidden": {"kernel": jnp.asarray(normal(6, 4))}, "out": {"kernel": jnp.asarray(normal(4, 3))}}
    x = jnp.asarray(normal(5, 6))

    def network(params, x):
        return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["out"]["kernel"]

    precision = freeze(init_precision(network, PrecisionRules({"*": LayerRule(4, 5)}), params, x)[0])
    path = tmp_path / "network.onnx"
    write_onnx(export_onnx(network, params, precision, x), path)
    read = read_onnx(path, batch_size=5)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(read.fn(read.params, x)[0], session.run(None, {"images": np.asarray(x)})[0])
    assert set(trace(read.fn, read.params, *read.inputs).names) == {"hidden", "out"}


def test_trace_and_cost_of_an_onnx_file(tmp_path, capsys):
    path = tmp_path / "cnn.onnx"
    write_onnx(make_model(CNN, (3, 8, 8), CNN_TENSORS, rank=2), path)
    assert cli.main(["trace", "--model", str(path), "--batch-size", "3"]) == 0
    assert "conv2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nodes", "tensors", "message"),
    [
        ([("Celu", ["x"], ["y"], {})], {}, "operators with a counterpart here, got 'Celu'"),
        ([("MaxPool", ["x"], ["y"], {"kernel_shape": [3, 3], "ceil_mode": 1})], {}, "got ceil_mode"),
        ([("Pad", ["x", "p"], ["y"], {"mode": "reflect"})], {"p": np.int64([0] * 8)}, "padding of all axes by a constant"),
        ([("Reshape", ["x", "p"], ["y"], {})], {"p": np.int64([1, 64])}, "evaluated at batch 2, got"),
    ],
)  # fmt: skip
def test_graphs_without_counterpart_are_refused(tmp_path, capsys, nodes, tensors, message):
    path = tmp_path / "net.onnx"
    write_onnx(make_model(nodes, (1, 8, 8), tensors), path)
    assert cli.main(["trace", "--model", str(path), "--batch-size", "2"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_no_damage_to_a_file_is_a_traceback(tmp_path):
    good = make_model(CNN, (3, 8, 8), CNN_TENSORS, rank=2).SerializeToString()
    path = tmp_path / "net.onnx"
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(40):
        data = bytearray(good)
        if trial % 2:
            del data[rng.integers(len(data)) :]
        else:
            data[rng.integers(len(data) // 4)] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            read_onnx(path, batch_size=1)
        except ValueError as error:
            assert "net.onnx" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 20
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_onnx(tmp_path / "none.onnx")


def test_integers_that_two_nodes_dequantise_are_read_once(tmp_path):
    """Weights used twice: both products take 2 * integers, not one of them 4 * integers."""
    nodes = [
        ("DequantizeLinear", ["weights", "scale", "zero"], ["a"], {}),
        ("DequantizeLinear", ["weights", "scale", "zero"], ["b"], {}),
        ("MatMul", ["x", "a"], ["h"], {}),
        ("MatMul", ["h", "b"], ["y"], {}),
    ]
    integers = np.int8([[1, -2], [3, 0]])
    tensors = {"weights": integers, "scale": np.float32(2), "zero": np.int8(0)}
    write_onnx(make_model(nodes, (2,), tensors, rank=2), tmp_path / "twice.onnx")
    read = read_onnx(tmp_path / "twice.onnx")
    np.testing.assert_array_equal(
        read.fn(read.params, np.float32([[1, 1]]))[0], [[1, 1]] @ (2 * integers) @ (2 * integers)
    )
