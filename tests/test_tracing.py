"""Tracing: passes against what is trained, tensors and vector work against hand counts."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from codesign.tracing import trace
from hw.accesses import count
from hw.chip import make_chip
from hw.mapping import outermost_mapping
from hw.operation import stack_operations
from hw.schedule import evaluate_step
from nets.jaxpr import flatten
from nets.models import make_model
from nets.training import cross_entropy, split_model


def network(name, shape, batch=2):
    """(fn, params, rest, images) of a reference network in training."""
    forward, params, rest = split_model(make_model(name, shape, 10))
    return lambda p, r, x: forward(p, r, x, None, True)[0], params, rest, jnp.zeros((batch, *shape))


def attention(params, x):
    q, k = x @ params["q"]["kernel"], x @ params["k"]["kernel"]
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
    return jnp.einsum("bqk,bkd->bqd", scores, x)


def test_frozen_layers_have_no_weight_gradient_and_errors_stop_at_the_lowest_trained_layer():
    fn, params, rest, x = network("lenet", (8, 8, 1))
    workload = trace(fn, params, rest, x, trainable=("conv2", "dense2"))
    passes = {(name, pass_) for name, pass_ in zip(workload.names, workload.passes, strict=True) if pass_ != "forward"}
    assert passes == {
        ("dense2", "weight_grad"),
        ("dense2", "input_grad"),
        ("dense1", "input_grad"),
        ("conv2", "weight_grad"),
    }
    kept = [name for name in workload.tensor_names if name.endswith(" kept")]
    assert sorted(kept) == ["conv2/inputs kept", "dense2/inputs kept"]  # dense1 keeps none: only its mask
    assert "dense1/inputs mask" in workload.tensor_names
    updated = [n for n, p in zip(workload.vector_names, workload.vector_passes, strict=True) if p == "update"]
    assert sorted(updated) == ["conv2/kernel", "dense2/kernel", "other parameters"]
    others = workload.tensor_names.index("other parameters gradient")
    assert workload.step.tensor_elements[others] == 32 + 10
    same = trace(fn, params, rest, x, trainable=lambda path: path.startswith(("conv2/", "dense2/")))
    assert same.labels == workload.labels
    assert trace(fn, params, rest, x, trainable=()).passes == ("forward",) * 4


def tensors(workload):
    """{name: (kind, elements, birth, death)}"""
    step = workload.step
    columns = (step.tensor_elements, step.tensor_birth, step.tensor_death)
    rows = zip(workload.tensor_names, workload.tensor_kind, *(c.astype(int).tolist() for c in columns), strict=True)
    return {name: rest for name, *rest in rows}


def vector_work(workload, name, pass_):
    """(operations, reads, writes) of a piece of vector work."""
    (i,) = [
        i
        for i, key in enumerate(zip(workload.vector_names, workload.vector_passes, strict=True))
        if key == (name, pass_)
    ]
    moved = [
        {workload.tensor_names[t]: int(table[i, t]) for t in np.flatnonzero(np.asarray(table[i]))}
        for table in (workload.step.vector_reads, workload.step.vector_writes)
    ]
    return int(workload.step.vector_ops[i]), *moved


def test_tensors_and_vector_work_of_lenet():
    """Batch 2, 8 x 8 pixels: conv1 makes 16 channels, ReLU, pooling to 4 x 4 for conv2, which makes 32 channels."""
    workload = trace(*network("lenet", (8, 8, 1)), optimizer="momentum")
    unpooled, pooled = 2 * 8 * 8 * 16, 2 * 4 * 4 * 16
    mask = pooled * (1 + 2)  # one bit alive, two bits for the place in the window
    operations, reads, writes = vector_work(workload, "conv2/inputs", "forward")
    assert operations == 3 * unpooled  # bias, ReLU, pooling
    assert reads == {"conv1/outputs": unpooled, "other parameters master": 16}
    assert writes == {"conv2/inputs": pooled, "conv2/inputs mask": mask}
    _, reads, writes = vector_work(workload, "conv2/inputs", "backward")
    assert reads == {"conv2/inputs gradient": pooled, "conv2/inputs mask": mask}
    assert writes == {"conv1/outputs gradient": unpooled, "other parameters gradient": 16}
    kernel = 3 * 3 * 16 * 32
    operations, reads, writes = vector_work(workload, "conv2/kernel", "update")
    assert operations == 2 * kernel
    assert reads == dict.fromkeys(("conv2/kernel gradient", "conv2/kernel master", "conv2/kernel state"), kernel)
    assert writes == dict.fromkeys(("conv2/kernel", "conv2/kernel master", "conv2/kernel state"), kernel)
    # Forward: conv1, its chain, conv2, ...; the kept copy takes over after conv2 and lives until its weight gradient.
    found = tensors(workload)
    weight_grad = int(workload.step.operation_slot[workload.labels.index("conv2 (weight_grad)")])
    assert found["conv2/inputs"] == ["activation", pooled, 1, 2]
    assert found["conv2/inputs kept"] == ["activation", pooled, 3, weight_grad]
    assert found["conv2/inputs mask"] == ["other", mask, 1, weight_grad + 3]
    assert found["conv2/kernel"] == ["weights", kernel, 0, workload.step.num_slots - 1]
    assert found["conv2/kernel state"][1] == kernel
    # Images stay in DRAM: their only tensor is read again by the weight gradient.
    assert found["argument 0"] == ["activation", 2 * 64, 0, workload.step.num_slots - 2]
    externals = np.flatnonzero(np.asarray(workload.step.tensor_external))
    assert [workload.tensor_names[t] for t in externals] == ["argument 0", "results"]
    assert workload.batch == 2
    assert workload.num_parameters == 13_706


def test_normalisation_reads_twice_and_keeps_its_inputs():
    workload = trace(*network("resnet8", (32, 32, 3)))
    outputs = 2 * 32 * 32 * 16
    _, reads, writes = vector_work(workload, "block1/conv2/inputs", "forward")
    assert reads == {"block1/conv1/outputs": 2 * outputs, "other parameters master": 32}
    assert writes == {"block1/conv2/inputs": outputs}
    _, reads, writes = vector_work(workload, "block1/conv2/inputs", "backward")
    assert reads["block1/conv1/outputs kept"] == reads["block1/conv2/inputs gradient"] == 2 * outputs
    assert writes == {"block1/conv1/outputs gradient": outputs, "other parameters gradient": 32}
    # The residual branch: the input of block 1 gets errors from its first convolution and from the addition.
    _, reads, _ = vector_work(workload, "block1/conv1/inputs", "backward")
    errors = {name for name in reads if "gradient" in name}
    assert errors == {
        "block1/conv1/inputs gradient from block1/conv1/inputs",
        "block1/conv1/inputs gradient from block2/conv1/inputs",
    }


def test_frozen_normalisation_keeps_nothing():
    def fn(params, mean, x):
        y = (x @ params["dense1"]["kernel"] - mean) * lax.rsqrt(mean + 1.0) * params["norm"]["scale"]
        return jax.nn.relu(y) @ params["dense2"]["kernel"]

    kernel = {"kernel": jnp.zeros((4, 4))}
    params = {"dense1": kernel, "norm": {"scale": jnp.ones((1, 4))}, "dense2": kernel}
    arguments = (params, jnp.zeros((1, 4)), jnp.zeros((3, 4)))
    frozen = trace(fn, *arguments, trainable=("dense*",))
    assert [name for name in frozen.tensor_names if "kept" in name or "mask" in name] == [
        "dense2/inputs mask",
        "dense2/inputs kept",
    ]
    assert "dense1/outputs kept" in trace(fn, *arguments).tensor_names


def weight_norm(params, x):
    kernel = params["kernel"]
    return jax.nn.tanh(x @ (kernel * lax.rsqrt(jnp.sum(kernel**2, axis=0, keepdims=True)))) @ kernel


def regularised_embedding(params, tokens, key):
    x = params["table"][tokens]
    x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, jnp.zeros_like(x))
    logits = x @ params["kernel"] + params["bias"][None, None]
    return -jnp.mean(jax.nn.log_softmax(logits)) + 0.1 * jnp.sum(params["kernel"] ** 2)


def residual_before_activation(params, x):
    for kernel in params:
        x = x + jax.nn.relu(x) @ kernel
    return x


KERNELS = {"kernel": jnp.zeros((6, 6))}
PROGRAMS = {
    "attention": (attention, {"q": KERNELS, "k": KERNELS}, jnp.zeros((2, 7, 6))),
    "weight norm": (weight_norm, KERNELS, jnp.zeros((2, 6))),
    "embedding": (
        regularised_embedding,
        KERNELS | {"table": jnp.zeros((20, 6)), "bias": jnp.zeros(6)},
        jnp.zeros((2, 3), jnp.int32),
        jax.random.key(0),
    ),
    "residual": (residual_before_activation, [jnp.zeros((6, 6))] * 3, jnp.zeros((2, 6))),
    "checkpoint": (jax.checkpoint(residual_before_activation), [jnp.zeros((6, 6))] * 2, jnp.zeros((2, 6))),
    "vector": (lambda p, x: p["kernel"] @ jnp.sin(p["kernel"] @ x), KERNELS, jnp.zeros(6)),
    "square": (lambda p, x: jnp.tril((x @ p["kernel"]) @ (x @ p["kernel"]).T), KERNELS, jnp.zeros((4, 6))),
    "lenet": network("lenet", (8, 8, 1)),
    "resnet8": network("resnet8", (32, 32, 3)),
}


def slots_of(step):
    """Tensor ids (reads, writes) of every slot in order."""
    moved = zip(np.asarray(step.vector_reads), np.asarray(step.vector_writes), strict=True)
    slots = {int(s): tuple(map(np.flatnonzero, rows)) for s, rows in zip(step.vector_slot, moved, strict=True)}
    for slot, tensors, accumulated in zip(
        step.operation_slot.tolist(), *map(np.asarray, (step.operand_tensor, step.operations.accumulated)), strict=True
    ):
        slots[slot] = tensors[accumulated == 0], tensors[accumulated == 1]
    return [slots[slot] for slot in range(step.num_slots)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_everything_read_was_written_before(name):
    workload = trace(*PROGRAMS[name], optimizer="adam")
    names = workload.tensor_names
    for step in (workload.step, workload.inference):
        is_copy = np.asarray(step.tensor_origin) != np.arange(len(names))
        known = {n for n, external in zip(names, step.tensor_external.tolist(), strict=True) if external}
        known |= {f"{n} gradient{end}" for n in known for end in ("", " from results")}
        known |= {n for n, kind in zip(names, workload.tensor_kind, strict=True) if kind in ("master", "state")}
        known |= {n.removesuffix(" master") for n in known} | {n for n in names if n.startswith("constant")}
        for reads, writes in slots_of(step):
            assert {names[t] for t in reads if not is_copy[t]} <= known
            assert {names[step.tensor_origin[t]] for t in reads} <= known
            known |= {names[t] for t in writes}
    assert workload.vector_passes.count("update") == sum(n.endswith(" master") for n in names)


def test_loss_in_the_function_and_statistics_beside_it():
    forward, params, rest = split_model(make_model("resnet8", (32, 32, 3), 10))

    def loss(params, rest, images, labels):
        logits, rest = forward(params, rest, images, None, True)
        return cross_entropy(logits, labels), rest

    workload = trace(loss, params, rest, jnp.zeros((2, 32, 32, 3)), jnp.zeros(2, jnp.int32))
    _, reads, writes = vector_work(workload, "results", "backward")
    assert "dense1/outputs gradient" in writes
    assert not [name for name in (*reads, *writes) if name.startswith("block")]  # running statistics have no gradient
    labels = workload.tensor_names.index("argument 19")
    assert workload.tensor_bits(jnp.full((10, 4), 8.0))[labels] == 32


def test_shared_weights_have_one_gradient_and_one_update():
    def fn(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["w"]

    workload = trace(fn, {"w": jnp.zeros((4, 4))}, jnp.zeros((3, 4)), optimizer="adam")
    assert Counter(workload.passes) == {"forward": 2, "weight_grad": 2, "input_grad": 1}
    gradients = {
        int(operands[0])
        for operands, p in zip(workload.step.operand_tensor, workload.passes, strict=True)
        if p == "weight_grad"
    }
    assert len(gradients) == 1
    operations, reads, _ = vector_work(workload, "w", "update")
    assert operations == 9 * 16
    assert reads == {"w gradient": 16, "w master": 16, "w state": 2 * 16}
    assert workload.vector_passes[-1] == "update"


def test_bits_of_operands_and_tensors():
    """Product i reads weights, inputs and both errors at 10 i + 1, 2, 3, 4 bits."""
    workload = trace(*network("lenet", (8, 8, 1)), gradient_bits=12.0, master_bits=24.0)
    bits = 10.0 * jnp.arange(4.0)[:, None] + jnp.arange(1.0, 5.0)[None]
    stored = dict(zip(workload.tensor_names, workload.tensor_bits(bits).tolist(), strict=True))
    assert stored["conv2/kernel"] == 11
    assert stored["conv1/outputs"] == stored["conv2/inputs"] == stored["conv2/inputs kept"] == 12
    assert stored["conv2/outputs gradient"] == 14  # the wider of what the two backward passes of conv2 read
    assert stored["dense1/inputs gradient"] == 14  # made for conv2
    assert stored["conv1/outputs gradient"] == 4
    assert stored["conv2/inputs mask"] == 1
    assert stored["conv2/kernel gradient"] == stored["other parameters gradient"] == 12
    assert stored["conv2/kernel master"] == stored["dense2/outputs"] == stored["results"] == 24
    operands = dict(zip(workload.labels, workload.operation_bits(bits).tolist(), strict=True))
    assert operands["conv2 (forward)"] == [11, 12, 22]
    assert operands["conv2 (input_grad)"] == [11, 4, 13]  # dX is stored for conv1, which has no input gradient
    assert operands["conv2 (weight_grad)"] == [12, 12, 14]
    assert operands["dense2 (forward)"] == [31, 32, 24]
    jitted = jax.jit(lambda w, b: (w.operation_bits(b), w.tensor_bits(b)))(workload, bits)
    np.testing.assert_array_equal(jitted[0], workload.operation_bits(bits))
    gradient = jax.grad(lambda b: workload.operation_bits(b).sum())(bits)
    # How often each width occurs: read in two passes, and stored by the operation that makes the tensor.
    assert gradient.tolist() == [[1, 2, 0, 2], [2, 3, 1, 2], [2, 3, 1, 2], [2, 3, 1, 1]]


def test_an_activation_of_several_products_takes_their_widest_inputs():
    workload = trace(*network("resnet8", (32, 32, 3)))
    names = list(dict.fromkeys(workload.names))
    conv1, shortcut = names.index("block2/conv1"), names.index("block2/shortcut")
    bits = jnp.full((len(names), 4), 4.0).at[conv1, 1].set(5.0).at[shortcut, 1].set(7.0)
    stored = dict(zip(workload.tensor_names, workload.tensor_bits(bits).tolist(), strict=True))
    assert stored["block2/conv1/inputs"] == 7
    reads = dict(zip(workload.labels, workload.operation_bits(bits)[:, 1].tolist(), strict=True))
    assert (reads["block2/conv1 (forward)"], reads["block2/shortcut (forward)"]) == (5, 7)


def test_rows_are_those_of_the_table_of_bits():
    fn, *arguments = network("resnet8", (32, 32, 3))
    workload = trace(fn, *arguments)
    products = [product.name for product in flatten(fn, *arguments).products]
    assert [products[i] for i in workload.product.tolist()] == list(workload.names)


def test_shapes_are_enough():
    fn, *arguments = network("mlp", (8, 8, 1))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    assert trace(fn, *shapes).labels == trace(fn, *arguments).labels


@jax.jit
def evaluated(chip, step, mappings, operation_bits, tensor_bits):
    accesses = jax.vmap(count)(step.operations, mappings)
    return evaluate_step(chip, step, accesses, operation_bits, tensor_bits, jnp.ones((len(operation_bits), 2)))


def cost(step, workload, chip):
    """Cost at 8 bits with every loop in DRAM."""
    n = len(step.multiplicity)
    operations = [jax.tree.map(lambda x, i=i: x[i], step.operations) for i in range(n)]
    bits = jnp.full((max(workload.product.tolist()) + 1, 4), 8.0)
    mappings = stack_operations([outermost_mapping(operation, 4) for operation in operations])
    return evaluated(chip, step, mappings, workload.operation_bits(bits)[:n], workload.tensor_bits(bits))


def test_unlimited_sram_leaves_the_batch_and_the_results():
    workload = trace(*network("mlp", (8, 8, 1)))
    chip = make_chip(shared_kib=2**20)
    bits = 8 * 2 * 64 + 32 * 2 * 10
    per_bit = float(chip.energy_per_bit()[-1].mean() + chip.wire_energy_per_bit()[-1])
    for step in (workload.step, workload.inference):
        found = cost(step, workload, chip)
        assert float(found.dram_energy) == pytest.approx(bits * per_bit, rel=1e-4)
        assert float(found.spilled_bits.sum()) == 0.0
        assert float(found.breakdown.sum()) == pytest.approx(float(found.energy), rel=1e-5)
    small = cost(workload.step, workload, make_chip(shared_kib=1, shared_banks=1))
    assert float(small.spilled_bits.sum()) > 0.0
    assert float(small.dram_energy) > float(found.dram_energy)


def test_table_and_html():
    workload = trace(*network("lenet", (8, 8, 1)))
    row = workload.table(jnp.full((4, 4), 8.0))[1]
    expected = {
        "layer": "conv2",
        "pass": "forward",
        "loops": "N2 K32 C16 P4 Q4 R3 S3",
        "effective_macs": 2 * 32 * 16 * 10 * 10,  # 4 + 3 + 3 taps of a padded row of 4 meet data
        "macs": 2 * 32 * 16 * 16 * 9,
        "weights": 9 * 16 * 32,
        "inputs": 2 * 16 * 16,
        "outputs": 2 * 32 * 16,
    }
    assert row == expected | {"weights_bits": 8.0, "inputs_bits": 8.0, "outputs_bits": 8.0}
    page = workload._repr_html_()
    assert page.count("<tr>") == len(workload.names) + 1
    assert "13,706 parameters" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fn": lambda p, x: x * p["w"][:2]}, "convolution or matrix product"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"gradient_bits": 0.0}, "positive widths"),
        ({"trainable": ("v*",)}, "did you mean 'w'"),
        ({"fn": lambda p, x: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ p["w"], x)}, "while"),
    ],
)
def test_what_cannot_be_traced(change, message):
    arguments = {"fn": lambda p, x: x @ p["w"]} | change
    with pytest.raises(ValueError, match=message):
        trace(arguments.pop("fn"), {"w": jnp.zeros((3, 3))}, jnp.zeros((2, 3)), **arguments)
