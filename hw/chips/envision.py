"""Envision: multipliers of one 16-bit, two 8-bit or four 4-bit products, supply and clock with them (ISSCC 2017)."""

from hw.chips.preset import Fact, Mode, Preset

_SUBWORDS = "256 multipliers, each for one product of 16 bits, two of 8 or four of 4: title and recalled"

ENVISION = Preset(
    title="Envision (ISSCC 2017)",
    node_nm=Fact(28, "recalled, medium confidence; FD-SOI, taken as bulk"),
    clock=Fact(((0.65, 50e6), (1.03, 200e6)), "recalled, medium confidence"),
    clusters=Fact(1, "one array of multipliers; recalled, medium confidence"),
    aspect=Fact(1, "16 x 16 multipliers; recalled, medium confidence"),
    modes={
        f"{bits} bit": Mode("subwords", 256, (bits, bits), _SUBWORDS, (16, 16), slice_bits=4) for bits in (16, 8, 4)
    },
    mechanisms={"zero gating": "guards zero operands; recalled, medium confidence"},
)
