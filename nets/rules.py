"""What a user asks of each layer, by name: widths, and how the chip multiplies, saves and feeds back."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nets.fixed_point import FLOAT_BITS, SIGNIFICAND_BITS
from nets.formats import BinaryFormat, Format, find_format
from nets.multipliers import Multiplier
from nets.saved_activations import LocalFormat

METRICS = ("error", "top_slice")


@dataclass(frozen=True)
class Laps:
    """Settings of the precision controller of one layer (`nets.laps`).

    Attributes:
      metric: "error", the energy of the quantisation error over that of the values, of those that do not saturate; or
        "top_slice", the share of values whose top slice is not zero.
      upper: a metric above it brings one slice more at once.
      lower: a metric below it for `patience` steps in a row brings one slice less.
      patience: K, at least 1.
      slice_width: bits of a slice.
      min_bits, max_bits: bounds of the width, multiples of the slice.
    """

    metric: str = "error"
    upper: float = 0.03
    lower: float = 1e-4
    patience: int = 10
    slice_width: int = 4
    min_bits: int = 4
    max_bits: int = 16

    def check(self) -> None:
        """Raises ValueError for settings that make no controller."""
        if self.metric not in METRICS:
            raise ValueError(f"expected a metric among {', '.join(METRICS)}, got {self.metric!r}; choose one of them")
        if not 0.0 <= self.lower < self.upper or self.patience < 1:
            raise ValueError(
                f"expected 0 <= lower < upper and a patience of at least 1, got {self.lower}, {self.upper} and "
                f"{self.patience}; without hysteresis the width would never rest"
            )
        bounds = self.min_bits, self.max_bits
        if not (2 <= bounds[0] <= bounds[1] <= 16) or any(bits % self.slice_width for bits in bounds):
            raise ValueError(
                f"expected bounds within 2 to 16 bits in slices of {self.slice_width}, got {bounds}; choose multiples"
            )


@dataclass(frozen=True)
class LayerRule:
    """Bits that a layer starts with, 2 to 24, or 32 for float32, and the mechanisms it trains with.

    Attributes:
      weights, inputs: widths of the operands of its products, or names of other formats (`nets.formats.FORMATS`), such
        as "fp8_e4m3", which are not trained. Weights may be "binary": one bit.
      input_grad, weight_grad: likewise of the error in the two backward passes.
      learn: whether these widths are trained.
      masks: whether ReLUs and max poolings after it keep packed masks for their backward pass.
      saved: how its inputs are kept for weight_grad, and its outputs for the normalisation or activation after it;
        None keeps them as they are. Weight gradients, and gradients of normalisations, are then approximate. ReLUs and
        max poolings keep masks. The format of its inputs is not trained.
      multiplier: how its forward products are formed: `BitSlices`, `LookUp` (the result is the same, bit for bit) or
        `Decomposed` (rounded to FP16); None as a whole. Its widths are not trained.
      direct_feedback: whether the error of its inputs is a fixed random projection of the error at the last product's
        output, in place of the one that it would pass back.
      point: how the ranges of errors follow their overflow: "dynamic" as it is, or "random_bit", one bit shorter at
        random at every step (SDFXP).
      laps: the controller that moves its widths in place of training them, None for none. Its state machine,
        `nets.laps.step_laps`, runs in the training step.
    """

    weights: int | str = 8
    inputs: int | str = 8
    input_grad: int | str = 8
    weight_grad: int | str = 8
    learn: bool = True
    masks: bool = field(default=False, kw_only=True)
    saved: LocalFormat | None = field(default=None, kw_only=True)
    multiplier: Multiplier | None = field(default=None, kw_only=True)
    direct_feedback: bool = field(default=False, kw_only=True)
    point: str = field(default="dynamic", kw_only=True)
    laps: Laps | None = field(default=None, kw_only=True)

    @property
    def formats(self) -> tuple[Format | None, Format | None, Format | None, Format | None]:
        """Named formats of weights, inputs, and errors in input_grad and weight_grad; None for fixed point."""
        weights, inputs, *errors = (find_format(x) if isinstance(x, str) else None for x in self._operands)
        return weights, inputs, errors[0], errors[1]

    @property
    def bits(self) -> tuple[float, float, float, float]:
        """Widths of weights, inputs, and errors in input_grad and weight_grad."""
        weights, inputs, *errors = (find_format(x).width if isinstance(x, str) else x for x in self._operands)
        return weights, inputs, errors[0], errors[1]

    @property
    def _operands(self) -> tuple[int | str, int | str, int | str, int | str]:
        return self.weights, self.inputs, self.input_grad, self.weight_grad


#: Leaves a layer as it is.
FLOAT = LayerRule(FLOAT_BITS, FLOAT_BITS, FLOAT_BITS, FLOAT_BITS, learn=False)


@dataclass(frozen=True)
class PrecisionRules:
    """Which layer starts with which rule.

    Attributes:
      rules: patterns of layer names, such as "conv*" (`fnmatch`), to rules; the first pattern that matches counts. A
        layer that none matches stays float32; a pattern that is first for no layer is an error of `init_precision`.
      frozen: patterns of paths of parameters, such as "block1/*", that are not trained: their layers have no
        weight_grad and keep no inputs for it, and errors stop above the lowest layer that is trained. A pattern that
        matches no parameter is an error.
    """

    rules: Mapping[str, LayerRule]
    frozen: tuple[str, ...] = ()

    def assign(self, names: Sequence[str]) -> tuple[LayerRule, ...]:
        """The rule of each layer.

        Args:
          names: names of all products.

        Returns:
          One rule per name.

        Raises:
          ValueError: if a rule has an impossible width or an unknown format, or applies to no layer.
        """
        for pattern, rule in self.rules.items():
            try:
                formats = rule.formats
            except ValueError as error:
                raise ValueError(f"{error} (rule {pattern!r})") from error
            fixed = [bits for bits, named in zip(rule.bits, formats, strict=True) if named is None]
            if any(not (bits in range(2, SIGNIFICAND_BITS + 1) or bits == FLOAT_BITS) for bits in fixed):
                raise ValueError(
                    f"expected whole widths of 2 to {SIGNIFICAND_BITS} bits, or {FLOAT_BITS} for float32, got {rule.bits} in the rule "
                    f"{pattern!r}; change that rule"
                )
            if any(isinstance(named, BinaryFormat) for named in formats[1:]):
                raise ValueError(
                    f"expected binary weights at most, got binary inputs or errors in the rule {pattern!r}; give them a "
                    f"width or another format"
                )
        first = [self.pattern(name) for name in names]
        for pattern in self.rules:
            if pattern not in first:
                raise ValueError(
                    f"expected every rule to apply to a layer, got {pattern!r}, which is first for none of "
                    f"{', '.join(names)}; correct or remove it"
                )
        return tuple(FLOAT if pattern is None else self.rules[pattern] for pattern in first)

    def pattern(self, name: str) -> str | None:
        """The pattern whose rule applies to a layer, None if there is none."""
        return next((pattern for pattern in self.rules if fnmatch.fnmatchcase(name, pattern)), None)

    def frozen_paths(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Paths of the parameters that are not trained.

        Args:
          paths: of all parameters.

        Returns:
          Those that a pattern of `frozen` matches.

        Raises:
          ValueError: if a pattern matches none.
        """
        for pattern in self.frozen:
            if not fnmatch.filter(paths, pattern):
                raise ValueError(
                    f"expected every frozen pattern to match a parameter, got {pattern!r}, which matches none of "
                    f"{', '.join(paths)}; correct or remove it"
                )
        return tuple(path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.frozen))
