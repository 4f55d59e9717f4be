"""The exported graph computes, in onnxruntime, the integers that JAX computes; what ONNX does not have is named."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from codesign.onnx_export import export_onnx
from nets import LayerRule, PrecisionRules, fixed_point, init_precision
from nets.data import load_digits_dataset
from nets.jaxpr import interpret
from nets.models import make_model
from nets.precision import freeze
from nets.training import fit, split_model

onnx = pytest.importorskip("onnx", reason="needs the extra 'exchange'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'dev'")


def calibrated(network, params, images, rule):
    precision, _ = init_precision(network, PrecisionRules({"*": rule}), params, images)
    return freeze(precision)


def in_jax(network, params, precision, images):
    """The result, and by name the integers that enter each product."""
    steps, tops = fixed_point.step_and_range(precision.log2_step, precision.log2_range)
    integers = {}

    def on_product(i, product, lhs, rhs, default):
        operands = [lhs, rhs]
        for side in range(2):
            role = 0 if side == product.weights_operand else 1
            step = steps[i, role]
            operands[side] = fixed_point.quantise(operands[side], step, tops[i, role], precision.signed[i][role])
            # Convolutions are written with channels before the spatial axes.
            axes = product.params["dimension_numbers"][side] if product.kind == "conv" else range(operands[side].ndim)
            integers[f"{product.name}.{('weights', 'inputs')[role]}"] = (operands[side] / step).transpose(axes)
        return default(*operands)

    def evaluated(params, images):
        integers.clear()
        return interpret(network, on_product)(params, images), dict(integers)

    return jax.jit(evaluated)(params, images)


def in_onnxruntime(model, images, names):
    """The result, and the integers of those names."""
    stored = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    computed = {output: node for node in model.graph.node for output in node.output}
    for name in (name for name in names if name in computed):
        zero = stored[computed[name].input[2]]
        kind = onnx.helper.np_dtype_to_tensor_dtype(zero.dtype)
        watched.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {"images": np.asarray(images)}), strict=True))
    return found["output"], {name: found[name] if name in computed else stored[name] for name in names}


def check(network, params, images, rule):
    """Every integer is the same; returns the logits of both."""
    precision = calibrated(network, params, images, rule)
    expected, integers = in_jax(network, params, precision, images)
    model = export_onnx(network, params, precision, images)
    result, found = in_onnxruntime(model, images, list(integers))
    assert len(integers) == 2 * len(precision.names)
    for name, values in integers.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), values, err_msg=name)
    return np.asarray(expected), result, found


def network_of(name, dataset, epochs=0):
    forward, params, rest = split_model(make_model(name, dataset.input_shape, dataset.num_classes, 0))
    if epochs:
        params, rest, _ = fit(forward, params, rest, dataset, epochs=epochs)
    return lambda params, images: forward(params, rest, images, None, False)[0], params


def test_lenet_computes_the_same_integers_and_logits():
    digits = load_digits_dataset()
    network, params = network_of("lenet", digits)
    expected, result, integers = check(network, params, jnp.asarray(digits.test.images[:64]), LayerRule(6, 9))
    np.testing.assert_array_equal(result, expected)
    types = {name: (values.dtype.name, int(values.max())) for name, values in integers.items()}
    assert types["conv1.weights"][0] == "int8" and types["conv1.weights"][1] <= 31
    assert types["dense1.inputs"][0] == "uint16" and 127 < types["dense1.inputs"][1] <= 511


def everything(params, x):
    """What no reference network has: attention, layer norm, mean pooling, slices, padding, a choice, a strided convolution."""
    kernel, project = params["conv"]["kernel"], params["project"]["kernel"]
    x = jax.lax.conv_general_dilated(
        x, kernel, (2, 1), ((1, 0), (0, 2)), rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )  # fmt: skip
    x = jax.lax.reduce_window(nnx.leaky_relu(x, 0.25), 0.0, jax.lax.add, (1, 3, 2, 1), (1, 1, 2, 1), "SAME") / 6.0
    x = jnp.pad(x[:, ::2], ((0, 0), (0, 1), (1, 0), (0, 0)))
    tokens = jnp.concatenate([x, jnp.clip(x, -0.5, 0.5)], axis=1).reshape(x.shape[0], -1, x.shape[-1])
    mean = tokens.mean(axis=-1, keepdims=True)
    tokens = (tokens - mean) * jax.lax.rsqrt(((tokens - mean) ** 2).mean(axis=-1, keepdims=True) + 1.0)
    query = tokens @ project
    scores = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", query, tokens))
    return jnp.einsum("bqk,bkc->bcq", scores, nnx.gelu(tokens)) * jax.nn.sigmoid(query).max(axis=1)[:, :, None]


@pytest.mark.slow
def test_other_primitives():
    """Where float32 is not exact between products, an input that lies at the border of two steps may fall to either side."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"conv": (3, 2, 2, 4), "project": (4, 4)}
    params = {
        name: {"kernel": 0.5 * jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    images = jax.random.normal(keys[2], (2, 7, 8, 4))
    precision = calibrated(everything, params, images, LayerRule(8, 8))
    expected, _ = in_jax(everything, params, precision, images)
    result, _ = in_onnxruntime(export_onnx(everything, params, precision, images), images, [])
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, atol=0.02)
    assert np.mean(np.abs(result - expected) < 1e-5) > 0.9


def dense(params, x):
    return x @ params["dense"]["kernel"]


def test_what_is_float_stays_so():
    params, images = {"dense": {"kernel": jnp.eye(3) / 3}}, jnp.ones((2, 3))
    model = export_onnx(dense, params, calibrated(dense, params, images, LayerRule(32, 32)), images)
    assert [node.op_type for node in model.graph.node if "Linear" in node.op_type] == []
    assert (
        in_onnxruntime(model, images, [])[0].tolist() == (np.ones((2, 3)) @ (np.eye(3) / 3)).astype(np.float32).tolist()
    )


@pytest.mark.parametrize(
    ("rule", "after", "message"),
    [
        (LayerRule(8, 20), lambda x: x, "expected at most 16 bits, got 20 of dense.inputs"),
        (LayerRule("fp8_e4m3", 8), lambda x: x, "expected fixed point, got the format .* of 'dense'"),
        (LayerRule(), lambda x: jnp.sort(x, axis=0), "got 'sort'; write the network without it"),
        (LayerRule(), lambda x: jnp.cumsum(x, axis=0), "got 'cumsum'"),
        (LayerRule(), lambda x: jax.lax.pad(x, 0.0, ((-1, 0, 0), (0, 0, 0))), "negative or interior padding"),
    ],
)
def test_what_onnx_does_not_have_is_named(rule, after, message):
    params, images = {"dense": {"kernel": jnp.ones((3, 3))}}, jnp.ones((2, 3))
    precision = calibrated(dense, params, images, rule)
    with pytest.raises(ValueError, match=message):
        export_onnx(lambda params, x: after(dense(params, x)), params, precision, images)


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"the package onnx, .* pip install 'jax-codesign\[exchange\]'"):
        export_onnx(lambda p, x: x @ p, jnp.ones((2, 2)), None, jnp.ones((2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet", "mlp", "resnet8", "ds_cnn", "mobilenet_vww"])
def test_a_thousand_digits(name):
    """Trained digits through networks with batch normalisation, residual connections and depthwise convolutions."""
    digits = load_digits_dataset()
    network, params = network_of(name, digits, epochs=2)
    images = jnp.asarray(np.concatenate([digits.train.images, digits.test.images])[:1000])
    expected, result, _ = check(network, params, images, LayerRule(5, 6))
    np.testing.assert_array_equal(result, expected)
