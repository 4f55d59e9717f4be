"""Chips, one file each, every number with its source."""

from hw.chips.edge_trainer import make_edge_trainer, make_edge_trainer_fp32

CHIPS = {"edge_trainer": make_edge_trainer, "edge_trainer_fp32": make_edge_trainer_fp32}
