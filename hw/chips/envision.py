"""Envision: multipliers of one 16-bit, two 8-bit or four 4-bit products, supply and clock with them (ISSCC 2017)."""

from hw.chips.preset import Fact, Mode, Preset

ENVISION = Preset(
    title="Envision (ISSCC 2017)",
    node_nm=Fact(28, "recalled, medium confidence; FD-SOI, taken as bulk"),
    clock=Fact(((0.65, 50e6), (1.03, 200e6)), "recalled, medium confidence"),
    clusters=Fact(1, "one array of 16 x 16 multipliers; recalled, medium confidence"),
    modes={
        f"{bits} bit": Mode(
            "fixed",
            macs,
            (bits, bits),
            "256 multipliers, subwords side by side; idle parts of a multiplier cost nothing",
        )
        for bits, macs in ((16, 256), (8, 512), (4, 1024))
    },
)
