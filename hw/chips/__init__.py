"""Chips, one file each, every number with its source: `CHIPS` to co-design from, `PRESETS` to check the costs against."""

from hw.chips.cnnp_v2 import CNNP_V2
from hw.chips.dnpu import DNPU
from hw.chips.edge_trainer import make_edge_trainer, make_edge_trainer_fp32
from hw.chips.envision import ENVISION
from hw.chips.eyeriss import EYERISS
from hw.chips.lnpu import LNPU
from hw.chips.pnpu import PNPU
from hw.chips.preset import Preset
from hw.chips.rapid import RAPID
from hw.chips.tsunami import TSUNAMI
from hw.chips.unpu import UNPU

CHIPS = {"edge_trainer": make_edge_trainer, "edge_trainer_fp32": make_edge_trainer_fp32}
PRESETS: dict[str, Preset] = {
    "cnnp_v2": CNNP_V2,
    "dnpu": DNPU,
    "envision": ENVISION,
    "eyeriss": EYERISS,
    "lnpu": LNPU,
    "pnpu": PNPU,
    "rapid": RAPID,
    "tsunami": TSUNAMI,
    "unpu": UNPU,
}
