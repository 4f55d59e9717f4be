"""Loom: both operands enter bit by bit (Sharify et al., DAC 2018; simulated)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

LOOM = Preset(
    title="Loom (DAC 2018)",
    node_nm=Fact(65, "not found; that of its contemporaries, which no compared figure depends on"),
    clock=Fact(((1.2, 1.0e9),), "not found; nominal supply, which no compared figure depends on"),
    modes={
        f"{bits} bit": Mode("slices", None, (bits, bits), "serial in both operands, abstract", (16, 16), slice_bits=1)
        for bits in (16, 8, 4)
    },
    assumptions={"num_macs": Assumption(16384, 4096, 65536, "serial units; not public at hand")},
)
