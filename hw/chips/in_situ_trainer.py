"""In-situ personalisation: three cores, 8-bit training, an engine near threshold (Choi et al., JSSC 55(10) 2020)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

IN_SITU_TRAINER = Preset(
    title="In-situ personalisation processor (JSSC 2020)",
    node_nm=Fact(65, "abstract"),
    clock=Fact(((0.5, 50e6),), "abstract: engine at 0.5 V, 50 MHz"),
    memory_vdd=Fact(0.63, "abstract: 0.63 V is the lowest supply of the chip; that of its memories, an inference"),
    modes={"8 bit": Mode("fixed", None, (8, 8), "8-bit fixed-point datapath: abstract")},
    mechanisms={
        "masks": "abstract",
        "cores by pass": "abstract: three cores with dataflows of their own",
        "update unit": "abstract: modified weight update on an 8-bit datapath",
    },
    assumptions={"num_macs": Assumption(768, 192, 3072, "of three cores together; not public")},
)
