"""CNNP-v2: memory-centric face recognition near threshold (Choi, S.-P. et al., AICAS 2019)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

CNNP_V2 = Preset(
    title="CNNP-v2 (AICAS 2019)",
    node_nm=Fact(65, "abstract, doi 10.1109/AICAS.2019.8771617"),
    clock=Fact(((0.48, 10e6),), "abstract"),
    clusters=Fact(1, "abstract: PEs in one two-dimensional mesh"),
    modes={"full": Mode("fixed", 1024, None, "abstract for the number of MACs")},
    mechanisms={
        "shifted inputs": "abstract: one-dimensional shift convolution, distributed memory",
    },
    assumptions={"operand_bits": Assumption(16, 8, 16, "not public; 16 recalled, low confidence")},
)
