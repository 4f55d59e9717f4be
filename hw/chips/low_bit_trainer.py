"""Training by local low-bit quantisation and freezing on a bit-flexible array (Choi, Shin, Choi, Kim, DAC 2019)."""

from hw.chips.preset import Assumption, Fact, Mode, Preset

LOW_BIT_TRAINER = Preset(
    title="Low-bit trainable system (DAC 2019)",
    node_nm=Fact(65, "not found; that of its group's other chips, the same for the baseline of every ratio"),
    clock=Fact(((1.2, 200e6),), "not found; nominal supply, the same for the baseline of every ratio"),
    modes={
        f"{bits} bit": Mode("fusion", None, (bits, bits), "bit-flexible fixed point: abstract", (16, 16), slice_bits=4)
        for bits in (16, 8, 4)
    },
    mechanisms={
        "local quantisation": "abstract",
        "freezing": "abstract: computation freezing",
    },
    assumptions={
        "num_macs": Assumption(256, 64, 1024, "units of 16 x 16 bits; not public"),
        "local_bits": Assumption(4, 4, 8, "width of what is kept for the backward pass; not public"),
        "region": Assumption(32, 8, 128, "values that share a scale of 8 bits; not public"),
    },
)
