"""Eyeriss: 16-bit inference, row-stationary (Chen et al., ISSCC 2016; JSSC 52(1) 2017)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

EYERISS = Preset(
    title="Eyeriss (ISSCC 2016)",
    node_nm=Fact(65, "JSSC abstract"),
    clock=Fact(
        ((0.82, 100e6), (1.0, 200e6), (1.17, 250e6)), "clocks: the authors' slides; supplies recalled, high confidence"
    ),
    sram_kib=Fact(108, "global buffer; recalled, high confidence"),
    register_bits=Fact(3584, "derived: (181.5 KiB in all - 108 KiB global buffer) / 168"),
    clusters=Fact(1, "one array of PEs; recalled, high confidence"),
    aspect=Fact(14 / 12, "12 x 14 PEs; recalled, high confidence"),
    sum_bits=Fact(16, "psum scratchpads; recalled, high confidence"),
    dram=Fact("DDR3", "the board of its demonstration; recalled, medium confidence"),
    modes={"16 bit": Mode("fixed", 168, (16, 16), "JSSC abstract")},
    mechanisms={
        "compressed maps": "JSSC abstract: compression; run lengths of zeros",
        "zero gating": "JSSC abstract: data gating",
    },
    assumptions={"density": Assumption(0.5, 0.3, 0.8, "share of a map's values that is not zero; not public at hand")},
)
