"""Loop nests: their sizes, taps on padding, the transposed form."""

from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hw import LOOPS, PASSES, make_operation, stack_operations, transposed
from hw.operation import RELEVANT


def test_relevance_of_loops():
    moved = {"".join(np.array(LOOPS)[row]) for row in RELEVANT}
    assert moved == {"GKCRS", "GNCPQRS", "GNKPQ"}


def test_bounds_and_macs():
    operation = make_operation(G=2, N=3, K=5, C=7, P=4, Q=6, R=3, S=1)
    np.testing.assert_array_equal(operation.bounds, [2, 3, 5, 7, 4, 6, 3, 1])
    assert operation.macs == 2 * 3 * 5 * 7 * 4 * 6 * 3
    assert operation.effective_macs == operation.macs


def test_taps_on_padding_do_not_count():
    # A 3x5 kernel over 4x4 inputs, padded to give 4x4 outputs. Width, 3 taps: the first and the last output lose one
    # tap, 4 * 3 - 2 = 10. Height, 5 taps: outputs see 3, 4, 4, 3 inputs.
    operation = make_operation(P=4, Q=4, R=3, S=5, padding=((1, 1), (2, 2)))
    np.testing.assert_array_equal(operation.taps, [10, 14])
    assert operation.effective_macs == 140 and operation.macs == 240


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("outputs", "window"), [(5, 3), (3, 5)])
def test_taps_by_enumeration(stride, dilation, outputs, window):
    size, before = 6, 2
    operation = make_operation(
        P=outputs,
        R=window,
        stride=(stride, 1),
        dilation=(dilation, 1),
        padding=((before, 9), (0, 0)),
        input_size=(size, 1),
    )
    positions = [p * stride + r * dilation - before for p in range(outputs) for r in range(window)]
    assert operation.taps[0] == sum(0 <= x < size for x in positions)


@pytest.mark.parametrize("pass_", PASSES)
def test_a_pass_names_the_accumulated_operand(pass_):
    expected = {"forward": [0, 0, 1], "input_grad": [0, 1, 0], "weight_grad": [1, 0, 0]}
    np.testing.assert_array_equal(make_operation(pass_=pass_).accumulated, expected[pass_])


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 3, 4])
def test_transposed_form_computes_every_input_gradient(stride, dilation, window):
    """Every (output, tap) pair of the original lands on one residue, within its outputs and taps."""
    outputs = 5
    original = make_operation(
        N=2, K=3, C=7, P=outputs, R=window, stride=(stride, 1), dilation=(dilation, 1), pass_="input_grad"
    )
    nest = transposed(original)
    common = gcd(stride, dilation)
    residues = stride // common
    inputs = {p * stride + r * dilation for p in range(outputs) for r in range(window)}
    taps = {}
    for p in range(outputs):
        for r in range(window):
            taps.setdefault((p * stride + r * dilation) // common, set()).add(r)
    bounds = dict(zip(LOOPS, map(int, nest.bounds), strict=True))
    assert bounds["K"] == 7 * residues and bounds["C"] == 3 and bounds["N"] == 2
    assert bounds["P"] == -(-(max(inputs) // common + 1) // residues)
    assert bounds["R"] == -(-window // residues) >= max(map(len, taps.values()))
    assert int(nest.dilation[0]) == dilation // common and int(nest.stride[0]) == 1
    np.testing.assert_allclose(nest.effective_macs, original.effective_macs, rtol=1e-6)
    np.testing.assert_array_equal(nest.accumulated, [0, 0, 1])


def test_transposed_form_of_the_inputs_that_are_real():
    # 3x3 taps over 8x8 inputs padded to 10x10: of the gradient only 8x8 is wanted.
    original = make_operation(K=4, C=2, P=8, Q=8, R=3, S=3, padding=((1, 1), (1, 1)), pass_="input_grad")
    np.testing.assert_array_equal(transposed(original).bounds, [1, 1, 2, 4, 10, 10, 3, 3])
    np.testing.assert_array_equal(transposed(original, (8, 8)).bounds, [1, 1, 2, 4, 8, 8, 3, 3])


def test_stacked_operations_are_one_pytree():
    stacked = stack_operations([make_operation(K=2), make_operation(K=3, C=5)])
    np.testing.assert_array_equal(jax.vmap(lambda operation: operation.macs)(stacked), jnp.array([2.0, 15.0]))
    np.testing.assert_array_equal(stacked.macs, [2.0, 15.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"K": 0}, "expected K to be a positive integer, got 0"),
        ({"K": 2.5}, "expected K to be a positive integer"),
        ({"stride": (0, 1)}, "stride"),
        ({"dilation": (1, -1)}, "dilation"),
        ({"padding": ((-1, 0), (0, 0))}, "padding"),
        ({"padding": (1, 1)}, "padding"),
        ({"padding": ((0, 0), (0.5, 0))}, "padding"),
        ({"input_size": (3,)}, "input_size"),
        ({"input_size": (0, 4)}, "input_size"),
        ({"stride": (2,)}, "expected stride to be a pair"),
        ({"pass_": "backward"}, "expected pass_ to be one of forward, input_grad, weight_grad, got 'backward'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_operation(**arguments)
