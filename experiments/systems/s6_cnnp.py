"""S6, CNNP-v2: utilisation from the dataflow alone, efficiency near threshold, with and without shifted inputs."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.systems.record import Figure, Samples, System, Values, exactly, sweep
from hw.accesses import count
from hw.chip import Chip
from hw.chips import PRESETS
from hw.cost import price
from hw.mapping import make_mapping
from hw.operation import LOOPS, make_operation
from hw.shift import shift_inputs
from hw.technology import Technology, sample_technologies

CNNP = PRESETS["cnnp_v2"]
# Convolutions of VGG-Face (Parkhi et al., BMVC 2015), a public network for the task of the chip, whose own is not
# public: input channels, output channels, side of the outputs; 3 x 3, padded.
VGG_FACE = (
    (3, 64, 224), (64, 64, 224), (64, 128, 112), (128, 128, 112), (128, 256, 56), (256, 256, 56), (256, 256, 56),
    (256, 512, 28), (512, 512, 28), (512, 512, 28), (512, 512, 14), (512, 512, 14), (512, 512, 14),
)  # fmt: skip
TAPS = 3
CHAIN = 32  # PEs side by side of 32 x 32
SUPPLIES = (0.48, 0.46)


def utilisation(chain: int, rows: int) -> float:
    """Share of MAC cycles that do work when each chain of PEs makes outputs of one row, each row another channel.

    Lost are the ends of a row (outputs of a border skip the taps on padding, and its PE waits), and what is left of a
    row or of the channels after whole chains. A chain that is longer than a row takes several rows side by side.
    """
    work = cycles = 0.0
    for channels, features, side in VGG_FACE:
        at_once = max(1, chain // side)
        passes = -(-side // at_once) if at_once > 1 else side * -(-side // chain)
        taps_on_data = (side * TAPS - 2) / (side * TAPS)
        products = channels * features * side**2 * TAPS**2
        work += products * taps_on_data
        cycles += channels * -(-features // rows) * passes * TAPS**2 * chain * rows
    return work / cycles


def measure_system(quick: bool) -> System:
    """Headlines and ablations of CNNP-v2."""
    samples = 4 if quick else 64
    geometries = [utilisation(chain, 1024 // chain) for chain in (16, 32, 64)]
    chip = CNNP.make("full", values={"tree": 1.0})
    peak = 2e-9 * float(chip.num_macs() * chip.frequency())
    assumptions = {name: it for name, it in CNNP.assumed().items() if name != "tree"}
    figures = sweep(lambda values: _efficiencies(values, samples), assumptions)
    efficiency = figures["efficiency, 0.48 V"]
    figures |= {
        "peak throughput": exactly(round(peak, 6)),
        "utilisation": Figure(*(100.0 * u for u in (geometries[1], min(geometries), max(geometries)))),
        "power": Figure(peak / efficiency.ours, peak / efficiency.high, peak / efficiency.low),
    }
    return System(
        workload="a padded 3 x 3 convolution that fills 32 x 32 PEs; utilisation: all convolutions of VGG-Face",
        figures=figures,
        ablation=_ablation(),
        assumptions=assumptions,
        notes=(
            "The network behind 91.5 % is not public, nor is the shape of the array: the interval runs over chains of 16, "
            "32 and 64 PEs. From 0.48 to 0.46 V the chip gains 1.42x, the square of the supply 1.09x: 9.4 mW is the "
            "power of an application, 3.1 TOPS/W a peak."
        ),
    )


def _efficiencies(values: Values, samples: int) -> Samples:
    technology = CNNP.technology()
    drawn = sample_technologies(jax.random.key(0), samples, technology)
    bits = jnp.full(3, values.get("operand_bits", CNNP.assumptions["operand_bits"].value), jnp.float32)

    def of(technology: Technology, vdd: float) -> jax.Array:
        return 2e-12 / joules_per_product(CNNP.make("full", vdd, {**values, "tree": 1.0}, technology), bits, shift=True)

    return {
        f"efficiency, {vdd} V": np.append(float(of(technology, vdd)), jax.vmap(lambda t: of(t, vdd))(drawn))  # noqa: B023
        for vdd in SUPPLIES
    }


def joules_per_product(chip: Chip, bits: jax.Array, *, shift: bool, spread: str = "P") -> jax.Array:
    """Core energy of a product, leakage included, where weights rest and each PE sums its own output, shape ().

    Args:
      chip: 32 x 32 PEs.
      bits: widths of weights, inputs and outputs, shape (3,).
      shift: whether inputs move from PE to PE.
      spread: loop along a chain: "P", or "C" for an operator-centric array that adds up channels.
    """
    operation = make_operation(K=CHAIN, C=CHAIN, P=CHAIN, Q=CHAIN, R=TAPS, S=TAPS)
    temporal, spatial = np.ones((4, 8)), np.ones((4, 2, 8))
    index = LOOPS.index
    spatial[1, 0, index(spread)], spatial[1, 1, index("K")] = CHAIN, CHAIN
    temporal[1, [index("R"), index("S")]] = TAPS
    temporal[1, index("C" if spread == "P" else "P")] = CHAIN
    temporal[2, index("Q")] = CHAIN
    mapping = make_mapping(
        operation, temporal, spatial, np.tile(np.argsort([LOOPS.index(x) for x in "RSCPQKNG"]), (4, 1))
    )
    accesses = count(operation, mapping)
    if shift:
        accesses = shift_inputs(accesses, operation, mapping, level=1)
    cost = price(chip, operation, accesses, bits, jnp.ones(2), jnp.zeros(3))
    core = cost.energy - cost.access_energy[-1].sum()
    return (core + chip.leakage_power() * cost.compute_cycles / chip.frequency()) / cost.macs


def _ablation() -> dict[str, dict[str, float]]:
    bits = jnp.full(3, 16.0)
    chip, fast = (CNNP.make("full", vdd, {"tree": 1.0}) for vdd in (None, 1.2))
    full = float(joules_per_product(chip, bits, shift=True))
    without = {
        "inputs that shift": joules_per_product(chip, bits, shift=False),
        "rows of the image along the array (channels instead)": joules_per_product(chip, bits, shift=False, spread="C"),
        "supply near threshold (1.2 V)": joules_per_product(fast, bits, shift=True),
    }
    return {name: {"energy x": float(joules) / full} for name, joules in without.items()}
