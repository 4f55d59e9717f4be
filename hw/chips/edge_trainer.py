"""The hand-picked baseline: an edge chip that trains small networks, 28 nm, 16 x 16 MACs, and its fp32 sibling."""

from hw.arithmetic import make_mac
from hw.chip import Chip, make_chip


def make_edge_trainer() -> Chip:
    """16 x 16 MACs of temporal 4 bit slices, operands of up to 16 bits; 32 KiB local, 256 KiB shared SRAM; LPDDR4.

    Sizes follow published 28 nm and 65 nm training chips (256 to 1024 MACs, 200 to 700 KiB); none is copied.
    """
    return make_chip(
        rows=16, columns=16, local_kib=32, shared_kib=256, node_nm=28, mac=make_mac("slices", slice_bits=4)
    )


def make_edge_trainer_fp32() -> Chip:
    """The same chip with fp32 MACs and register ports wide enough for them."""
    return make_chip(
        rows=16, columns=16, local_kib=32, shared_kib=256, node_nm=28, mac=make_mac("fp32"), register_bandwidth_bits=128
    )
