"""The methods that a run compares, as stages of the one loop: joint, sequential, fixed precision, fixed chip, float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from codesign.config import Config
from codesign.cooptimize import Phase

Slot = Literal["pretrained", "current", "best"]
"""Named states that a run holds: after pretraining, where it stands, and the best of several tries."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training and what is done with its outcome.

    Attributes:
      name: unique in a run, "method/part".
      start: state that it starts from.
      phase: what moves.
      epochs: passes over the training set (of as many steps without data, where the network does not train).
      bits: fixed width of every operand to start with; None keeps the state's formats, 0 starts learning anew.
      finish: what follows: "calibrate" formats and keep the state as pretrained; "try": keep it if it beats the best so far;
        "legalise" chip and mappings; "report" the finished method.
    """

    name: str
    start: Slot
    phase: Phase
    epochs: int
    finish: Literal["calibrate", "try", "legalise", "report"]
    bits: int | None = None

    @property
    def method(self) -> str:
        """The method it belongs to."""
        return self.name.split("/")[0]


def plan(config: Config) -> tuple[Stage, ...]:
    """All stages of a run, in order. Every method sees the same number of training steps."""
    train, include = config.train, config.baselines.include
    weight = config.objective.cost_weight
    learn_bits, learn_chip = config.precision.learn, bool(config.chip.free)
    stages = [Stage("pretrain", "current", Phase(quantised=False), train.pretrain_epochs, "calibrate")]

    def fixed(name: str, quantised: bool) -> Stage:
        epochs = train.epochs + train.finetune_epochs
        return Stage(name, "pretrained", Phase(quantised=quantised), epochs, "report", bits=8 if quantised else None)

    def joint(name: str, bits: bool, chip: bool) -> list[Stage]:
        phase = Phase(learn_bits=bits, learn_chip=chip, penalty="edp", weight=weight)
        return [
            Stage(f"{name}/search", "pretrained", phase, train.epochs, "legalise", bits=None if bits else 8),
            Stage(f"{name}/finetune", "current", Phase(), train.finetune_epochs, "report"),
        ]

    if "float32" in include:
        stages.append(fixed("float32", quantised=False))
    if "uniform8" in include:
        stages.append(fixed("uniform8", quantised=True))
    stages += joint("joint", learn_bits, learn_chip)
    if "sequential" in include:
        for tried in config.baselines.sequential_weights:
            phase = Phase(learn_bits=True, penalty="bit_operations", weight=tried)
            stages.append(Stage(f"sequential/bits {tried:g}", "pretrained", phase, train.epochs, "try"))
        chip_only = Phase(train=False, learn_chip=True, penalty="edp", weight=1.0)
        stages.append(Stage("sequential/chip", "best", chip_only, train.epochs, "legalise"))
        stages.append(Stage("sequential/finetune", "current", Phase(), train.finetune_epochs, "report"))
    if "joint_without_bits" in include:
        stages += joint("joint_without_bits", False, True)
    if "joint_without_chip" in include:
        stages += joint("joint_without_chip", True, False)
    return tuple(stages)
