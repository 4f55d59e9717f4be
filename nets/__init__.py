"""Models and the arithmetic they train with: products found in any JAX function, and their quantised twins."""

from nets.jaxpr import Equation, Product, Program, Value, find_products, flatten, interpret

# Another distribution may ship an import package of this name and overwrite it silently: `codesign` checks this marker.
__distribution__ = "jax-codesign"

__all__ = ["Equation", "Product", "Program", "Value", "find_products", "flatten", "interpret"]
