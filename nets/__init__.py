"""Models and the arithmetic they train with: products found in any JAX function, and their quantised twins."""

from nets.bitslice import BitSlices
from nets.decomposed import Decomposed
from nets.formats import FORMATS
from nets.jaxpr import Equation, Product, Program, Value, find_products, flatten, interpret
from nets.lookup import LookUp
from nets.noise import NoiseModel, make_noise_measurement, no_noise
from nets.precision import FLOAT, LayerRule, Precision, PrecisionRules, QuantState, freeze, init_precision, unfreeze
from nets.rules import Laps
from nets.saved_activations import LocalFormat, make_local_format
from nets.transform import quantize

# Another distribution may ship an import package of this name and overwrite it silently: `codesign` checks this marker.
__distribution__ = "jax-codesign"

__all__ = [
    "FLOAT",
    "FORMATS",
    "BitSlices",
    "Decomposed",
    "Equation",
    "Laps",
    "LayerRule",
    "LocalFormat",
    "LookUp",
    "NoiseModel",
    "Precision",
    "PrecisionRules",
    "Product",
    "Program",
    "QuantState",
    "Value",
    "find_products",
    "flatten",
    "freeze",
    "init_precision",
    "interpret",
    "make_local_format",
    "make_noise_measurement",
    "no_noise",
    "quantize",
    "unfreeze",
]
