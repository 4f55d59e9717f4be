"""Which stages a run has, in what order, and which of several tries is chosen."""

from dataclasses import replace

import pytest

from codesign.config import BaselinesConfig, ChipConfig, Config, ObjectiveConfig, PrecisionConfig, TrainConfig
from codesign.stages import choose, plan
from nets.rules import LayerRule

TRAIN = TrainConfig(pretrain_epochs=2, epochs=5, finetune_epochs=3)
OBJECTIVE = ObjectiveConfig(cost_weights=(0.1, 0.3))
EVERYTHING = BaselinesConfig(
    include=("float32", "uniform8", "sequential", "random", "joint_without_bits", "joint_without_chip"),
    sequential_weights=(0.01, 0.1),
)
CONFIG = Config(train=TRAIN, objective=OBJECTIVE, baselines=EVERYTHING)


def by_name(config=CONFIG):
    return {stage.name: stage for stage in plan(config)}


def test_all_stages_in_order():
    assert [(stage.name, stage.start, stage.epochs, stage.finish) for stage in plan(CONFIG)] == [
        ("pretrain", "current", 2, "calibrate"),
        ("joint/weight 0.1", "pretrained", 5, "try"),
        ("joint/weight 0.3", "pretrained", 5, "try"),
        ("joint/legalise", "best", 0, "legalise"),
        ("joint/finetune", "current", 3, "report"),
        ("float32", "pretrained", 8, "report"),
        ("uniform8", "pretrained", 8, "report"),
        ("sequential/bits 0.01", "pretrained", 5, "try"),
        ("sequential/bits 0.1", "pretrained", 5, "try"),
        ("sequential/chip", "best", 10, "legalise"),
        ("sequential/finetune", "current", 3, "report"),
        ("joint_without_bits/weight 0.1", "pretrained", 5, "try"),
        ("joint_without_bits/weight 0.3", "pretrained", 5, "try"),
        ("joint_without_bits/legalise", "best", 0, "legalise"),
        ("joint_without_bits/finetune", "current", 3, "report"),
        ("joint_without_chip/weight 0.1", "pretrained", 5, "try"),
        ("joint_without_chip/weight 0.3", "pretrained", 5, "try"),
        ("joint_without_chip/legalise", "best", 0, "legalise"),
        ("joint_without_chip/finetune", "current", 3, "report"),
    ]


def test_what_each_method_moves():
    stages = by_name()
    moves = {name: (s.phase.quantised, s.phase.learn_bits, s.phase.learn_chip) for name, s in stages.items()}
    assert moves["joint/weight 0.1"] == (True, True, True)
    assert moves["joint_without_bits/weight 0.1"] == (True, False, True)
    assert moves["joint_without_chip/weight 0.1"] == (True, True, False)
    assert moves["sequential/bits 0.1"] == (True, True, False)
    assert moves["pretrain"] == moves["float32"] == (False, False, False)
    assert moves["uniform8"] == moves["joint/finetune"] == (True, False, False)
    chip = stages["sequential/chip"].phase
    assert (chip.train, chip.learn_bits, chip.learn_chip, chip.penalty, chip.weight) == (False, False, True, "edp", 1.0)


def test_penalties_and_fixed_widths():
    stages = by_name()
    paid = {name: (s.phase.penalty, s.phase.weight) for name, s in stages.items() if s.finish == "try"}
    assert paid == {
        "joint/weight 0.1": ("edp", 0.1),
        "joint/weight 0.3": ("edp", 0.3),
        "sequential/bits 0.01": ("bit_operations", 0.01),
        "sequential/bits 0.1": ("bit_operations", 0.1),
        "joint_without_bits/weight 0.1": ("edp", 0.1),
        "joint_without_bits/weight 0.3": ("edp", 0.3),
        "joint_without_chip/weight 0.1": ("edp", 0.1),
        "joint_without_chip/weight 0.3": ("edp", 0.3),
    }
    fixed = {name: stage.rule for name, stage in stages.items() if stage.rule}
    everywhere = LayerRule(8, 8, 8, 8)  # the default of where bits start, too
    assert fixed == dict.fromkeys(
        ("uniform8", "joint_without_bits/weight 0.1", "joint_without_bits/weight 0.3"), everywhere
    )


def test_every_method_trains_its_network_for_equally_many_epochs():
    epochs: dict[str, dict[str, int]] = {}
    for stage in plan(CONFIG):
        if stage.phase.train and stage.method != "pretrain":
            epochs.setdefault(stage.method, {})[stage.finish] = (
                stage.epochs
            )  # tries stand beside each other: one counts
    assert {method: sum(parts.values()) for method, parts in epochs.items()} == dict.fromkeys(epochs, 5 + 3)
    assert len(epochs) == 6


def test_only_included_baselines_run():
    config = replace(CONFIG, baselines=BaselinesConfig(include=("uniform8",)))
    assert {stage.method for stage in plan(config)} == {"pretrain", "joint", "uniform8"}
    config = replace(CONFIG, baselines=BaselinesConfig(include=()))
    assert {stage.method for stage in plan(config)} == {"pretrain", "joint"}


def test_settings_that_hold_bits_or_chip_hold_them_in_joint():
    held_bits = by_name(replace(CONFIG, precision=PrecisionConfig(4, 5, 6, 7, learn=False)))
    for method in ("joint", "joint_without_bits"):
        stage = held_bits[f"{method}/weight 0.1"]
        assert not stage.phase.learn_bits and stage.phase.learn_chip
        assert stage.rule == LayerRule(4, 5, 6, 7, learn=False)
    held_chip = by_name(replace(CONFIG, chip=ChipConfig(free=())))["joint/weight 0.1"]
    assert held_chip.phase.learn_bits and not held_chip.phase.learn_chip


@pytest.mark.parametrize(
    ("tries", "chosen"),
    [
        ([(0.97, 5.0)], 0),
        ([(0.97, 5.0), (0.97, 4.0)], 1),  # as good: the cheaper
        ([(0.97, 5.0), (0.966, 4.0)], 1),  # 0.4 point behind: the cheaper
        ([(0.97, 5.0), (0.964, 4.0)], 0),  # 0.6 point behind: too much
        ([(0.96, 1.0), (0.97, 3.0), (0.9651, 2.0)], 2),  # the cheapest of those that are good
        ([(0.97, 3.0), (0.972, 4.0), (0.966, 1.0)], 0),  # measured from the best, not from the cheapest
    ],
)
def test_choice_is_the_cheapest_within_half_a_point(tries, chosen):
    assert choose([{"validation_accuracy": accuracy, "cost": cost} for accuracy, cost in tries]) == chosen
