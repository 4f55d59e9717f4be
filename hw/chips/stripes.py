"""Stripes: activations enter bit by bit, weights of 16 bits at once (Judd et al., MICRO 2016; simulated)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

STRIPES = Preset(
    title="Stripes (MICRO 2016)",
    node_nm=Fact(65, "not found; that of its contemporaries, which no compared figure depends on"),
    clock=Fact(((1.2, 1.0e9),), "not found; nominal supply, which no compared figure depends on"),
    modes={
        f"{bits} bit": Mode("serial", None, (bits, 16), "serial in the bits of one operand, abstract", (16, 16))
        for bits in (16, 8, 4)
    },
    assumptions={"num_macs": Assumption(4096, 1024, 16384, "serial units; not public at hand")},
)
