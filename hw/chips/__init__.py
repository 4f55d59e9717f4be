"""Chips, one file each, every number with its source."""

from hw.chips.edge_trainer import edge_trainer, edge_trainer_fp32

CHIPS = {"edge_trainer": edge_trainer, "edge_trainer_fp32": edge_trainer_fp32}
