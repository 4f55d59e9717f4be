"""LNPU: training with FP8 and FP16 mixed, zero inputs skipped (Lee et al., ISSCC 2019)."""

from hw.chips.preset import Fact, Mode, Preset

LNPU = Preset(
    title="LNPU (ISSCC 2019)",
    node_nm=Fact(65, "recalled, medium confidence"),
    clock=Fact(((0.78, 50e6), (1.1, 200e6)), "recalled, medium confidence; agrees with its GOPS over power"),
    sram_kib=Fact(372, "recalled, medium confidence"),
    modes={
        "fp8": Mode("fp8", 1536, (8, 8), "derived from 600 GOPS at 200 MHz"),
        "fp16": Mode("fp16", 768, (16, 16), "derived from 300 GOPS at 200 MHz"),
    },
    mechanisms={
        "zero skipping": "abstract: zero inputs",
    },
)
