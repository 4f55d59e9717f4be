"""DNPU: convolution with multipliers for 4, 8 and 16 bits (Shin et al., ISSCC 2017)."""

from hw.chips.preset import Fact, Mode, Preset

_SUBWORDS = "768 multipliers, derived from 300 GOPS of 16 bits at 200 MHz; two of 8 bits or four of 4, as 600 and 1200 GOPS tell"

DNPU = Preset(
    title="DNPU (ISSCC 2017)",
    node_nm=Fact(65, "recalled, medium confidence"),
    clock=Fact(((0.77, 50e6), (1.1, 200e6)), "recalled, medium confidence"),
    sram_kib=Fact(290, "recalled, medium confidence"),
    clusters=Fact(16, "recalled, medium confidence: convolution cores of 48 multipliers of 16 bits"),
    modes={
        f"{bits} bit": Mode("subwords", 768, (bits, bits), _SUBWORDS, (16, 16), slice_bits=4) for bits in (16, 8, 4)
    },
)
