"""Sibia: signed 4-bit slices, those that are zero skipped (Im et al., HPCA 2023; simulated)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

# A signed slice of four bits holds three bits and a sign: 7 bits are two slices, 10 three, 13 four.
_SLICES = "signed slices of 4 bits, 3n + 1 bits in n of them: abstract"

SIBIA = Preset(
    title="Sibia (HPCA 2023)",
    node_nm=Fact(28, "recalled, low confidence"),
    clock=Fact(((0.9, 250e6),), "recalled, low confidence"),
    modes={
        f"{bits} bit": Mode("slices", None, (4 * count, 4 * count), _SLICES, (16, 16), slice_bits=4)
        for bits, count in ((7, 2), (10, 3), (13, 4))
    },
    mechanisms={
        "slice skipping": "abstract: signed slices that are zero",
    },
    assumptions={"num_macs": Assumption(3072, 768, 6144, "slice multipliers; not public at hand")},
)
