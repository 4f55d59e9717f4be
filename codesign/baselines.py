"""Controls over the same design space: chips drawn at random, judged by the same mapper and evaluation."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC

import jax

from codesign.design import DesignSpace
from codesign.evaluation import Evaluated, evaluate
from codesign.legalize import legal_chip, preference
from hw.chip import Chip
from hw.schedule import Step


def random_chips(
    space: DesignSpace,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    budgets: MappingABC[str, float],
    key: jax.Array,
    num: int,
    **options,
) -> Evaluated:
    """The best of `num` chips drawn uniformly on each quantity's own scale, every one with its mappings searched.

    Chips larger than the area budget are drawn again and not counted: their area is known without any search. The other
    budgets rank those that were evaluated.
    """
    draw_key, search_key = jax.random.split(key)
    chips: list[Chip] = []
    draws = 0
    limit = budgets.get("area", float("inf"))
    while len(chips) < num and draws < 100 * num:
        chip = legal_chip(space, space.random(jax.random.fold_in(draw_key, draws)))
        draws += 1
        if float(chip.area().total) <= limit:
            chips.append(chip)
    if not chips:
        raise ValueError(
            f"random chips: none of {draws} draws has at most {limit * 1e6:.3g} mm2; raise the area budget"
        )
    found = [
        evaluate(chip, step, operation_bits, tensor_bits, jax.random.fold_in(search_key, i), **options)
        for i, chip in enumerate(chips)
    ]
    best = min(found, key=lambda other: preference(other.cost, budgets))
    return best._replace(evaluations=sum(other.evaluations for other in found))
