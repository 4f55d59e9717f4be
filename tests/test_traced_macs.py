"""Tracing: MACs of every product in every pass against those that XLA counts."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from codesign.tracing import trace
from nets.jaxpr import flatten
from tests.test_tracing import attention, network

NETWORKS = [
    ("mlp", (8, 8, 1)),
    ("lenet", (8, 8, 1)),
    ("lenet", (28, 28, 1)),
    ("resnet8", (32, 32, 3)),
    ("resnet20", (32, 32, 3)),
]


def xla_macs(fn, params, *args):
    """MACs of each product in each pass as XLA counts them: {(product, pass): MACs}."""
    program = flatten(fn, params, *args)
    runs = {e.product: e.run for e in program.walk() if e.product is not None}
    known, macs = {}, {}
    for i, product in enumerate(program.products):
        shapes = (product.lhs_shape, product.rhs_shape, product.out_shape)
        lhs, rhs, out = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

        def product_fn(a, b, i=i):
            return runs[i](a, b)[0]

        def lhs_grad(dy, b, product_fn=product_fn, lhs=lhs):
            return jax.linear_transpose(lambda a: product_fn(a, b), lhs)(dy)

        def rhs_grad(a, dy, product_fn=product_fn, rhs=rhs):
            return jax.linear_transpose(lambda b: product_fn(a, b), rhs)(dy)

        grads = {"input_grad": (lhs_grad, out, rhs), "weight_grad": (rhs_grad, lhs, out)}
        if product.weights_operand == 0:
            grads = dict(zip(grads, reversed(grads.values()), strict=True))
        for pass_, (f, *operands) in {"forward": (product_fn, lhs, rhs), **grads}.items():
            key = (*shapes, str(product.params), pass_)
            if key not in known:
                analysis = jax.jit(f).lower(*operands).compile().cost_analysis()
                assert analysis is not None
                known[key] = analysis["flops"] / 2
            macs[i, pass_] = known[key]
    return macs


def check_macs(fn, params, *args):
    workload = trace(fn, params, *args)
    expected = xla_macs(fn, params, *args)
    traced = dict(zip(zip(workload.product.tolist(), workload.passes, strict=True), workload.table(), strict=True))
    for key, row in traced.items():
        assert row["effective_macs"] == pytest.approx(expected[key], rel=0.01), (row["layer"], key)
        assert row["macs"] >= row["effective_macs"]
    return workload


@pytest.mark.parametrize(("name", "shape"), NETWORKS)
def test_macs_agree_with_xla_in_every_pass(name, shape):
    workload = check_macs(*network(name, shape))
    num_products = max(workload.product.tolist()) + 1
    assert Counter(workload.passes) == {
        "forward": num_products,
        "weight_grad": num_products,
        "input_grad": num_products - 1,  # the images need none
    }


def conv(strides=(1, 1), padding="SAME", **options):
    """A convolution of inputs that are trained as well, so that all passes exist."""

    def fn(params, x):
        x = x * params["scale"]
        return lax.conv_general_dilated(
            x, params["kernel"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )

    return fn


def conv_params(*kernel):
    return {"kernel": jnp.zeros(kernel), "scale": jnp.ones((1, 1, 1, 1))}


@pytest.mark.parametrize(
    ("fn", "kernel", "images", "role"),
    [
        (conv((2, 1)), (3, 5, 4, 6), (2, 9, 11, 4), "inputs"),
        (conv((2, 2), "VALID"), (3, 2, 4, 6), (2, 9, 10, 4), "inputs"),
        (conv(rhs_dilation=(2, 3)), (3, 3, 4, 6), (2, 9, 11, 4), "inputs"),
        (conv(feature_group_count=2), (3, 3, 2, 6), (2, 8, 7, 4), "inputs"),
        (conv((2, 2), feature_group_count=4), (3, 3, 1, 8), (2, 8, 8, 4), "inputs"),
        (conv(batch_group_count=2), (3, 3, 4, 6), (4, 6, 6, 4), "inputs"),
        (conv(padding=((2, -1), (0, 3))), (3, 3, 4, 6), (2, 9, 9, 4), "inputs"),
        (conv(padding=((2, 2), (1, 1)), lhs_dilation=(2, 2)), (3, 3, 4, 6), (2, 5, 6, 4), "outputs"),
        (
            conv(padding=((3, 2), (1, 2)), lhs_dilation=(3, 2), rhs_dilation=(2, 1)),
            (2, 3, 4, 6),
            (2, 5, 6, 4),
            "outputs",
        ),
    ],
)
def test_macs_of_any_convolution_agree_with_xla(fn, kernel, images, role):
    workload = check_macs(fn, conv_params(*kernel), jnp.zeros(images))
    assert workload.passes == ("forward", "weight_grad", "input_grad")
    row = workload.table()[0]
    assert (row["weights"], row[role]) == (np.prod(kernel), np.prod(images))


def test_one_spatial_axis_is_the_width():
    def fn(params, x):
        return lax.conv_general_dilated(x, params["kernel"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    workload = check_macs(fn, {"kernel": jnp.zeros((5, 3, 4))}, jnp.zeros((2, 16, 3)))
    assert workload.table()[0]["loops"] == "N2 K4 C3 P8 R5"


def test_transposed_convolution_accumulates_inputs_forward():
    fn = conv(padding=((2, 2), (2, 2)), lhs_dilation=(2, 2))
    workload = trace(fn, conv_params(3, 3, 4, 6), jnp.zeros((2, 5, 5, 4)))
    forward, weight_grad, input_grad = workload.step.operations.accumulated.tolist()
    assert (forward, weight_grad, input_grad) == ([0, 1, 0], [1, 0, 0], [0, 0, 1])
    assert workload.step.operation_pass.tolist() == [0, 2, 1]
    row = workload.table()[0]
    assert row["loops"] == "N2 K4 C6 P5 Q5 R3 S3"
    assert (row["inputs"], row["outputs"]) == (2 * 11 * 11 * 6, 2 * 5 * 5 * 4)


def test_products_without_parameters():
    params = {"q": {"kernel": jnp.zeros((6, 5))}, "k": {"kernel": jnp.zeros((6, 5))}}
    workload = check_macs(attention, params, jnp.zeros((2, 7, 6)))
    rows = {(row["layer"], row["pass"]): row for row in workload.table()}
    scores = workload.names[2]
    assert rows["q", "forward"]["loops"] == "N2 K5 C6 P7"
    assert rows[scores, "forward"]["loops"] == "G2 N7 K7 C5"
    # Both operands of the first are errors' way back; of the second only the scores vary, x is data.
    assert [pass_ for layer, pass_ in rows if layer == scores] == ["forward", "weight_grad", "input_grad"]
    kinds = {workload.tensor_kind[t] for t in workload.step.operand_tensor[2].tolist()}
    assert kinds == {"activation"}
    assert ("q", "input_grad") not in rows


def test_convolutions_that_are_no_nest():
    volume = {"kernel": jnp.zeros((3, 3, 3, 2, 2))}
    with pytest.raises(ValueError, match="two spatial axes"):
        trace(
            lambda p, x: lax.conv(x, p["kernel"].transpose(4, 3, 0, 1, 2), (1, 1, 1), "SAME"),
            volume,
            jnp.zeros((1, 2, 4, 4, 4)),
        )
    both = conv((2, 2), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2))
    with pytest.raises(ValueError, match="both"):
        trace(both, conv_params(3, 3, 4, 6), jnp.zeros((2, 5, 5, 4)))
