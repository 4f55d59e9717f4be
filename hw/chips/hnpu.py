"""HNPU: training with layer-wise bits in dynamic fixed point, zero slices skipped (Han et al., JSSC 56(9) 2021)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

HNPU = Preset(
    title="HNPU (JSSC 2021)",
    node_nm=Fact(28, "DOI 10.1109/JSSC.2021.3066400, abstract"),
    clock=Fact(((0.75, 50e6), (1.1, 250e6)), "recalled, low confidence; the same for the baseline of every ratio"),
    modes={
        f"{bits} bit": Mode(
            "slices", None, (bits, bits), "bit-slice units: abstract; slices of 4 bits: recalled", (16, 16)
        )
        for bits in (16, 12, 8, 4)
    },
    mechanisms={
        "slice skipping": "abstract: in-out slice skipping",
        "shared accumulation": "abstract: reconfigurable accumulation network",
        "update unit": "abstract: one core for momentum and Adam",
    },
    assumptions={
        "num_macs": Assumption(1024, 256, 4096, "slice multipliers; not public"),
        "lanes": Assumption(4, 1, 16, "slices in lock-step, skipped only if all are zero; not public"),
    },
)
