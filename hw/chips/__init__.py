"""Chips, one file each, every number with its source: `CHIPS` to co-design from, `PRESETS` to check the costs against."""

from hw.chips.bit_fusion import BIT_FUSION
from hw.chips.cnnp_v2 import CNNP_V2
from hw.chips.dnpu import DNPU
from hw.chips.edge_trainer import make_edge_trainer, make_edge_trainer_fp32
from hw.chips.envision import ENVISION
from hw.chips.eyeriss import EYERISS
from hw.chips.hnpu import HNPU
from hw.chips.in_situ_trainer import IN_SITU_TRAINER
from hw.chips.lnpu import LNPU
from hw.chips.loom import LOOM
from hw.chips.low_bit_trainer import LOW_BIT_TRAINER
from hw.chips.pnpu import PNPU
from hw.chips.preset import Preset
from hw.chips.rapid import RAPID
from hw.chips.row_pipeline_trainer import ROW_PIPELINE_TRAINER
from hw.chips.sibia import SIBIA
from hw.chips.stripes import STRIPES
from hw.chips.tsunami import TSUNAMI
from hw.chips.unpu import UNPU

CHIPS = {"edge_trainer": make_edge_trainer, "edge_trainer_fp32": make_edge_trainer_fp32}
PRESETS: dict[str, Preset] = {
    "bit_fusion": BIT_FUSION,
    "cnnp_v2": CNNP_V2,
    "dnpu": DNPU,
    "envision": ENVISION,
    "eyeriss": EYERISS,
    "hnpu": HNPU,
    "in_situ_trainer": IN_SITU_TRAINER,
    "lnpu": LNPU,
    "loom": LOOM,
    "low_bit_trainer": LOW_BIT_TRAINER,
    "pnpu": PNPU,
    "rapid": RAPID,
    "row_pipeline_trainer": ROW_PIPELINE_TRAINER,
    "sibia": SIBIA,
    "stripes": STRIPES,
    "tsunami": TSUNAMI,
    "unpu": UNPU,
}
