"""What published chips do beyond their MACs, memories and supplies, by name, and the switch that each is in the cost model.

The style of a MAC (bit-serial, slices, look-up tables, ...) is a `Mode` of its preset; everything else stands here.
"""

MECHANISMS = {
    "zero skipping": "products of zeros take neither cycles nor energy: `density` of hw.cost.price; stored without zeros: hw.sparse",
    "zero gating": "products of zeros take their cycles but no energy: `gates` of hw.arithmetic.Mac, under the same densities",
    "compressed maps": "finished maps without their zeros in external memory: hw.sparse.stored_share on that traffic alone",
    "slice skipping": "as zero skipping, of slices of operands: nets.skipping.slice_densities counts what lock-step lanes leave",
    "shared accumulation": "products summed by an adder tree before one accumulator: `tree` of hw.arithmetic.Mac",
    "masks": "one to three bits a value in place of the value before a ReLU or a pool: tensors `... mask` of codesign.trace",
    "freezing": "layers without weight_grad, update and kept inputs: `trainable` of codesign.trace",
    "local quantisation": "few bits and a scale for each region of what is kept for the backward pass: widths of those tensors",
    "decomposed products": "integer MACs under a dequantiser: cores of their own bits (hw.cores), nets.Decomposed in training",
    "cores by pass": "a core, and so a dataflow, of its own for each pass: hw.overlap.assign_passes",
    "update unit": "gradients of few bits and weights with a residual: `gradient_bits`, `master_bits` of codesign.trace",
    "row pipeline": "lines in place of maps between layers: hw.pipeline",
    "shifted inputs": "inputs that move from PE to PE: hw.shift",
}
