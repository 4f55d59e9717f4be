"""Formats of rules on MACs: the unit and widths of every format, and the layer and rule of one that a chip has not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import trace
from codesign.number_formats import check_formats, format_widths, make_rule_mac
from hw.chips import CHIPS
from nets import FORMATS, LayerRule, PrecisionRules, init_precision

PARAMS = {"a": {"kernel": jnp.ones((6, 8))}, "b": {"kernel": jnp.ones((8, 4))}}


def network(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


@pytest.fixture(scope="module")
def traced():
    x = jnp.linspace(-1.0, 1.0, 96).reshape(16, 6)

    def make(rule):
        rules = PrecisionRules({"b": rule, "*": LayerRule(8, 8, 8, 8, learn=False)})
        return init_precision(network, rules, PARAMS, x)[0]

    return trace(network, PARAMS, x), make


@pytest.mark.parametrize(
    ("operands", "pass_", "style", "widths"),
    [
        ((8, 6, 4, 3), "forward", "fixed", [8, 6]),
        ((8, 6, 4, 3), "input_grad", "fixed", [8, 4]),
        ((8, 6, 4, 3), "weight_grad", "fixed", [6, 3]),
        (("block8", "block4", 8, 8), "forward", "fixed", [8, 4]),
        (("binary", 8, 8, 8), "forward", "fixed", [1, 8]),
        (("fp8_e4m3", "fp8_e4m3", "fp8_e5m2", "fp8_e5m2"), "input_grad", "fp8", [8, 8]),
        (("fp16", 4, 8, 8), "forward", "fp16", [16, 16]),
        ((4, 4, "bf16", "fp16"), "input_grad", "bf16", [16, 16]),
        ((12, 4, "bf16", "fp16"), "input_grad", "fp32", [32, 32]),
        (("fp16", "bf16", 8, 8), "forward", "fp32", [32, 32]),
        ((32, 8, 8, 8), "forward", "fp32", [32, 32]),
    ],
)
def test_the_least_mac_that_holds_both_operands(operands, pass_, style, widths):
    mac = make_rule_mac(LayerRule(*operands, learn=False), pass_)
    assert mac.style == style
    np.testing.assert_array_equal(mac.widths, widths)


def test_every_format_has_a_mac():
    for name in FORMATS:
        for pass_ in ("forward", "input_grad", "weight_grad"):
            make_rule_mac(LayerRule(name, name, name, name, learn=False), pass_)


def test_a_format_that_the_chip_has_not_names_layer_and_rule(traced):
    workload, make = traced
    trainer, floating = CHIPS["edge_trainer"](), CHIPS["edge_trainer_fp32"]()
    precision = make(LayerRule(8, 8, "fp8_e5m2", 8, learn=False))
    with pytest.raises(ValueError, match=r"'slices' multiply, got fp8_e5m2 for input_grad in input_grad of layer 'b'"):
        check_formats(trainer, workload, precision)
    with pytest.raises(ValueError, match=r"rule LayerRule\(weights=8"):
        format_widths(trainer, workload, precision)
    check_formats(floating, workload, precision)
    # The first layer has no input_grad: what its rule says of that error does not matter.
    alone = PrecisionRules({"a": LayerRule(8, 8, "fp16", 8, learn=False), "b": LayerRule(8, 8, 8, 8, learn=False)})
    check_formats(trainer, workload, init_precision(network, alone, PARAMS, jnp.ones((16, 6)))[0])


def test_blocks_are_stored_with_their_exponent_and_multiplied_without(traced):
    workload, make = traced
    operations, tensors = format_widths(
        CHIPS["edge_trainer"](), workload, make(LayerRule("block8", 8, 8, 8, learn=False))
    )
    row = workload.labels.index("b (forward)")
    assert float(operations[row, 0]) == 8.0
    assert float(tensors[workload.tensor_names.index("b/kernel")]) == 8.25


def test_a_format_without_a_mac_is_an_error(monkeypatch):
    monkeypatch.setattr("codesign.number_formats.FORMATS", FORMATS | {"posit8": object()})
    with pytest.raises(
        ValueError, match=r"formats with a MAC in the cost model, got posit8 and 8 in the rule LayerRule"
    ):
        make_rule_mac(LayerRule("posit8", 8, 8, 8, learn=False))
