"""The methods that a run compares, as stages of the one loop: joint, sequential, fixed precision, fixed chip, float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from codesign.config import Config
from codesign.cooptimize import Phase
from codesign.problem import initial_rule
from nets.rules import LayerRule


@dataclass(frozen=True)
class Stage:
    """A stretch of training and what is done with its outcome.

    Attributes:
      name: unique in a run, "method/part".
      start: state that it starts from: "pretrained", "current" (where the stage before ended), or the "best" of the
        method's tries.
      phase: what moves.
      epochs: passes over the training set (of as many steps without data, where the network does not train).
      rule: formats of every layer to start with, fitted anew; None keeps the state's.
      effort: of the search for the mappings of its last iterate, as a multiple of that of a single try.
      finish: what follows: "calibrate" formats and keep the state as pretrained; "try": keep it as one of several to choose
        from; "legalise" chip and mappings; "report" the finished method.
    """

    name: str
    start: Literal["pretrained", "current", "best"]
    phase: Phase
    epochs: int
    finish: Literal["calibrate", "try", "legalise", "report"]
    rule: LayerRule | None = None
    effort: int = 1

    @property
    def method(self) -> str:
        """The method it belongs to."""
        return self.name.split("/")[0]


def plan(config: Config) -> tuple[Stage, ...]:
    """All stages of a run, in order. Every finished method has seen the same number of training steps."""
    train, include = config.train, config.baselines.include
    all_epochs = train.epochs + train.finetune_epochs
    learn_bits, learn_chip = config.precision.learn, bool(config.chip.free)
    finetune = Stage("joint/finetune", "current", Phase(), train.finetune_epochs, "report")

    def joint(method: str, bits: bool, chip: bool) -> list[Stage]:
        tries = [
            Stage(
                f"{method}/weight {weight:g}",
                "pretrained",
                Phase(learn_bits=bits, learn_chip=chip, penalty="edp", weight=weight),
                train.epochs,
                "try",
                rule=None if bits else initial_rule(config.precision),
            )
            for weight in config.objective.cost_weights
        ]
        legalise = Stage(f"{method}/legalise", "best", Phase(), 0, "legalise")
        return [*tries, legalise, replace(finetune, name=f"{method}/finetune")]

    def sequential() -> list[Stage]:
        tries = [
            Stage(
                f"sequential/bits {weight:g}",
                "pretrained",
                Phase(learn_bits=True, penalty="bit_operations", weight=weight),
                train.epochs,
                "try",
            )
            for weight in config.baselines.sequential_weights
        ]
        chip_only = Phase(train=False, learn_chip=True, penalty="edp", weight=1.0)
        # As many chip steps, and as much effort, as all tries of the joint search together: the same cost evaluations.
        tried = len(config.objective.cost_weights)
        chip = Stage("sequential/chip", "best", chip_only, train.epochs * tried, "legalise", effort=tried)
        return [*tries, chip, replace(finetune, name="sequential/finetune")]

    methods = {
        "float32": [Stage("float32", "pretrained", Phase(quantised=False), all_epochs, "report")],
        "uniform8": [Stage("uniform8", "pretrained", Phase(), all_epochs, "report", rule=LayerRule(8, 8, 8, 8))],
        "sequential": sequential(),
        "joint_without_bits": joint("joint_without_bits", False, learn_chip),
        "joint_without_chip": joint("joint_without_chip", learn_bits, False),
    }
    stages = [Stage("pretrain", "current", Phase(quantised=False), train.pretrain_epochs, "calibrate")]
    stages += joint("joint", learn_bits, learn_chip)
    for method, own in methods.items():
        if method in include:
            stages += own
    return tuple(stages)


def choose(tries: Sequence[Mapping[str, float]]) -> int:
    """Index of the chosen try: the cheapest among those within half a point of the best validation accuracy.

    Args:
      tries: dicts with "validation_accuracy" (fraction) and "cost" (EDP, or bit operations), lower is better.
    """
    best = max(one["validation_accuracy"] for one in tries)
    good = [i for i, one in enumerate(tries) if one["validation_accuracy"] >= best - 0.005]
    return min(good, key=lambda i: tries[i]["cost"])
