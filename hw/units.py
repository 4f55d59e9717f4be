"""Units as constants: a number times its unit, `10 * PJ`, is in SI (or in bits), which is all that is used inside."""

from typing import Final

FJ: Final = 1e-15
PJ: Final = 1e-12
MILLIWATT: Final = 1e-3
UW: Final = 1e-6
NW: Final = 1e-9
PS: Final = 1e-12
MHZ: Final = 1e6
GBPS: Final = 1e9
UM2: Final = 1e-12
MM2: Final = 1e-6
BYTE: Final = 8.0
KIB: Final = 8.0 * 1024

# The units that data files may use, with their factor to SI (or bits).
UNITS: Final[dict[str, float]] = {
    "1": 1.0,
    "V": 1.0,
    "fJ": FJ,
    "pJ": PJ,
    "pJ/bit": PJ,
    "pJ/bit/mm": 1e3 * PJ,
    "nW": NW,
    "uW": UW,
    "ps": PS,
    "Gbit/s": GBPS,
    "um2": UM2,
    "mm2": MM2,
}
