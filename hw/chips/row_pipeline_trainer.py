"""Row pipeline of 4-bit fixed-point and fp16 units for training with frozen layers (Lu et al., ISCAS 2024)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

ROW_PIPELINE_TRAINER = Preset(
    title="Row-pipelined FXP4/FP16 accelerator (ISCAS 2024)",
    node_nm=Fact(28, "abstract"),
    clock=Fact(((0.9, 200e6),), "not found; nominal supply, a usual clock"),
    modes={
        "fxp4": Mode("fixed", None, (4, 4), "fixed-point MACs of 4 bits for convolutions: abstract"),
        "fp16": Mode("fp16", None, (16, 16), "fp16 units: abstract"),
    },
    mechanisms={
        "freezing": "abstract: convolutions and batch normalisations",
        "decomposed products": "abstract",
        "row pipeline": "abstract",
    },
    assumptions={"num_macs": Assumption(256, 64, 1024, "fixed-point MACs; not public")},
)
