"""UNPU: look-up-table MACs, bit-serial in the weights (Lee et al., ISSCC 2018; JSSC 54(1) 2019)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

# Of the source's 345.6 GOPS at 16 bits and 200 MHz; figures of other widths are predictions.
_LOOK_UPS = "derived: 345.6 GOPS at 16 bits and 200 MHz are 4608 look-ups of three products, 16 cycles each"

UNPU = Preset(
    title="UNPU (ISSCC 2018)",
    node_nm=Fact(65, "JSSC abstract, doi 10.1109/JSSC.2018.2865489"),
    clock=Fact(((0.63, 5e6), (1.1, 200e6)), "supplies and 200 MHz: JSSC abstract; 5 MHz: recalled, medium confidence"),
    sram_kib=Fact(256, "recalled, medium confidence"),
    modes={
        f"{bits} bit": Mode("lut", 4608, (bits, 16), f"{_LOOK_UPS}; activations of 16 bits", (16, 16))
        for bits in (16, 8, 4, 1)
    },
    assumptions={
        "vdd": Assumption(0.63, 0.63, 0.75, "the supply of the published efficiencies; the lowest is usual"),
        "cluster_macs": Assumption(
            1152,
            192,
            1152,
            "notes on the ISSCC paper: a weight memory in each of four cores, a feature loader in each of their six units",
        ),
    },
)
