"""RaPiD: training in hybrid FP8, inference in INT4 (Agrawal et al., ISSCC 2021; Venkataramani et al., ISCA 2021)."""

from hw.chips.preset import Fact, Mode, Preset

RAPID = Preset(
    title="RaPiD (ISSCC 2021)",
    node_nm=Fact(7, "ISCA abstract"),
    clock=Fact(((0.55, 1.0e9), (0.75, 1.6e9)), "ISCA abstract; Linley newsletter for the peak speed"),
    clusters=Fact(4, "ISCA abstract: four cores"),
    sram_kib=Fact(8192, "recalled, medium confidence: 2 MiB in each core"),
    modes={
        "fp8": Mode("fp8", 8192, (8, 8), "derived from 25.6 TFLOPS at 1.6 GHz"),
        "int4": Mode("fixed", 32768, (4, 4), "derived from 102.4 TOPS at 1.6 GHz; units of their own, an assumption"),
    },
)
