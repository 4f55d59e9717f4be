"""Bit Fusion: multipliers of 2-bit bricks that join for wider operands (Sharma et al., ISCA 2018; simulated)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

_BRICKS = "16 bricks of 2 bits a unit, side by side for narrow products: ISCA abstract and artefacts"

BIT_FUSION = Preset(
    title="Bit Fusion (ISCA 2018)",
    node_nm=Fact(45, "recalled, high confidence"),
    clock=Fact(((0.9, 500e6),), "500 MHz recalled, high confidence; the nominal supply of the node"),
    modes={f"{bits} bit": Mode("fusion", None, (bits, bits), _BRICKS, (8, 8), slice_bits=2) for bits in (8, 4, 2)},
    assumptions={"num_macs": Assumption(512, 256, 1024, "fusion units; not public at hand")},
)
