"""TSUNAMI: FP8 training with iterative pruning in several modes (TCAS-I 69(4) 2022, doi 10.1109/TCSI.2021.3138092)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

TSUNAMI = Preset(
    title="TSUNAMI (TCAS-I 2022)",
    node_nm=Fact(65, "recalled, low to medium confidence"),
    clock=Fact(((0.78, 50e6),), "abstract"),
    modes={"fp8": Mode("fp8", None, (8, 8), "abstract for FP8")},
    mechanisms={
        "zero skipping": "abstract: coarse and fine zeros",
    },
    assumptions={"num_macs": Assumption(1024, 512, 2048, "not public; like LNPU")},
)
