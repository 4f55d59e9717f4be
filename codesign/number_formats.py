"""Number formats of a layer's rule on MACs: which unit multiplies them, at which widths, and which chip cannot.

A fixed-point operand is an integer of its width; a value of a block is an integer of the block's width, the shared
exponents being added once for a block and left out. A float MAC also takes the formats whose every number it holds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from codesign.tensors import INPUT_GRAD, INPUTS, WEIGHT_GRAD, WEIGHTS
from codesign.tracing import Workload
from hw.arithmetic import FLOAT_STYLES, Mac, make_mac
from hw.chip import Chip
from nets.fixed_point import FLOAT_BITS
from nets.formats import FORMATS, BinaryFormat, BlockFormat
from nets.precision import Precision
from nets.rules import LayerRule

# Formats that each float style takes, and the width of the integers that its significand holds; narrowest first.
_FP8 = ("fp8_e4m3", "fp8_e5m2")
_TAKES = {
    "fp8": (_FP8, 5),
    "bf16": (("bf16", *_FP8), 9),
    "fp16": (("fp16", *_FP8), 12),
    "fp32": (("fp32", "fp16", "bf16", *_FP8), 25),
}
_READ = {"forward": (WEIGHTS, INPUTS), "input_grad": (WEIGHTS, INPUT_GRAD), "weight_grad": (INPUTS, WEIGHT_GRAD)}
_COLUMNS = ("weights", "inputs", "input_grad", "weight_grad")


def make_rule_mac(rule: LayerRule, pass_: str = "forward", style: str = "fixed") -> Mac:
    """The least MAC that multiplies the two operands that a pass reads in the formats of a rule.

    Args:
      rule: of the layer.
      pass_: "forward", "input_grad" or "weight_grad".
      style: integer style where both operands are fixed point or blocks, see `hw.arithmetic`.

    Raises:
      ValueError: formats that no MAC of the cost model takes together; names the rule.
    """
    operands = [_operand(rule, column) for column in _READ[pass_]]
    if all(isinstance(operand, int) for operand in operands):
        return make_mac(style, (float(operands[0]), float(operands[1])))
    for float_style in _TAKES:
        if all(_holds(float_style, operand) for operand in operands):
            return make_mac(float_style)
    raise ValueError(
        f"expected formats with a MAC in the cost model, got {' and '.join(map(str, operands))} in the rule {rule}; "
        f"choose among {', '.join(_TAKES)} and widths in bits that one of them holds"
    )


def check_formats(chip: Chip, workload: Workload, precision: Precision) -> None:
    """That the chip's MACs multiply what every pass of every layer reads.

    Widths in bits may still exceed an integer MAC's: that is a violation, reported by the cost.

    Raises:
      ValueError: a format that the MAC has no entry for; names the layer, the operand, the format and the rule.
    """
    style = chip.mac.style
    for row, pass_ in sorted(set(zip(np.asarray(workload.product).tolist(), workload.passes, strict=True))):
        for column in _READ[pass_]:
            operand = _operand(precision.rule(row), column)
            if not (_holds(style, operand) if style in FLOAT_STYLES else isinstance(operand, int)):
                raise ValueError(
                    f"expected formats that MACs of style {style!r} multiply, got {operand} for {_COLUMNS[column]} in "
                    f"{pass_} of layer {precision.names[row]!r} (rule {precision.rule(row)}); change the rule, or take "
                    f"a chip with the MAC of codesign.number_formats.make_rule_mac"
                )


def format_widths(chip: Chip, workload: Workload, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Widths of all operands (n, 3) and tensors (m,) of a step in the formats of a precision, as `evaluate_chip` takes.

    What a block's tensor stores includes its exponent; what is multiplied does not, nor do the words that a nest
    moves: a quarter of a bit of traffic in 8, for blocks of 32, is left out there.

    Raises:
      ValueError: as `check_formats`.
    """
    check_formats(chip, workload, precision)
    stored = precision.bits()
    named = np.array([[isinstance(x, BlockFormat) for x in precision.rule(i).formats] for i in range(len(stored))])
    # A width in bits that is trained is whole, too, and keeps its gradient.
    multiplied = jnp.where(named, jnp.floor(stored), stored)
    return workload.operation_bits(multiplied), workload.tensor_bits(stored)


def _operand(rule: LayerRule, column: int) -> int | str:
    """Width of the integers that an operand is made of, or the name of its float format."""
    own = (rule.weights, rule.inputs, rule.input_grad, rule.weight_grad)[column]
    if not isinstance(own, str):
        return "fp32" if own == FLOAT_BITS else int(own)
    number_format = FORMATS[own]
    if isinstance(number_format, BinaryFormat):
        return 1
    return number_format.bits if isinstance(number_format, BlockFormat) else own


def _holds(style: str, operand: int | str) -> bool:
    """Whether a float style takes an operand."""
    names, integer_bits = _TAKES[style]
    return operand in names if isinstance(operand, str) else operand <= integer_bits
