"""DNPU: convolution with multipliers for 4, 8 and 16 bits (Shin et al., ISSCC 2017)."""

from hw.chips.preset import Fact, Mode, Preset

DNPU = Preset(
    title="DNPU (ISSCC 2017)",
    node_nm=Fact(65, "recalled, medium confidence"),
    clock=Fact(((0.77, 50e6), (1.1, 200e6)), "recalled, medium confidence"),
    sram_kib=Fact(290, "recalled, medium confidence"),
    clusters=Fact(16, "recalled, medium confidence: convolution cores of 48 multipliers of 16 bits"),
    modes={
        f"{bits} bit": Mode(
            "fixed", macs, (bits, bits), f"derived from {gops} GOPS at 200 MHz; idle parts of a multiplier cost nothing"
        )
        for bits, macs, gops in ((16, 768, 300), (8, 1536, 600), (4, 3072, 1200))
    },
)
