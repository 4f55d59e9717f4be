"""PNPU: FP8 training with stochastic coarse and fine pruning (LSSC 4, 2021, doi 10.1109/LSSC.2020.3041497)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

PNPU = Preset(
    title="PNPU (LSSC 2021)",
    node_nm=Fact(65, "recalled, low to medium confidence"),
    clock=Fact(((0.78, 50e6),), "abstract"),
    modes={"fp8": Mode("fp8", None, (8, 8), "abstract for FP8")},
    mechanisms={
        "zero skipping": "abstract: zero inputs, outputs and weights",
    },
    assumptions={"num_macs": Assumption(1024, 512, 2048, "not public; like LNPU")},
)
