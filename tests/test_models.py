"""Reference networks: shapes, parameter counts, names, seeds, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from codesign import trace
from nets.models import (
    DSCNN,
    MODELS,
    AutoEncoder,
    MobileNetV1,
    MobileNetV2,
    MobileNetVWW,
    ResNet8,
    ResNet18,
    make_model,
)
from nets.training import split_model

# Shapes and number of parameters; those of LeNet-5 and of ResNet-20 with projection shortcuts are the published ones.
CASES = [
    ("mlp", (8, 8, 1), 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10),
    ("lenet", (8, 8, 1), 9 * 16 + 16 + 9 * 16 * 32 + 32 + 128 * 64 + 64 + 64 * 10 + 10),
    ("lenet", (28, 28, 1), 61_706),
    ("resnet8", (32, 32, 3), 78_042),
    ("resnet20", (32, 32, 3), 272_474),
    ("ds_cnn", (49, 10, 1), 10 * 4 * 64 + 4 * (9 + 64) * 64 + 9 * 2 * 64 + 64 * 10 + 10),
]


def names_of(model: nnx.Module) -> list[str]:
    _, params, _ = split_model(model)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]


@pytest.mark.parametrize(("name", "input_shape", "num_parameters"), CASES)
def test_shapes_and_parameter_counts(name, input_shape, num_parameters):
    forward, params, rest = split_model(make_model(name, input_shape, 10))
    assert sum(parameter.size for parameter in jax.tree.leaves(params)) == num_parameters
    images = jax.ShapeDtypeStruct((3, *input_shape), jnp.float32)
    logits, _ = jax.eval_shape(lambda images: forward(params, rest, images, jax.random.key(0), True), images)
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.float32


def published_counts(make, shape):
    """MACs of an inference, in which padding counts as data, elements of parameters and of statistics."""
    forward, params, rest = split_model(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    sample = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    workload = trace(lambda params, rest, x: forward(params, rest, x, None, False)[0], params, rest, sample)
    macs = sum(row["macs"] for row in workload.table() if row["pass"] == "forward")
    return macs, *(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, rest))


@pytest.mark.parametrize(
    ("width", "pixels", "million_macs", "million_parameters"),
    [(1.0, 224, 569, 4.2), (0.75, 224, 325, 2.6), (0.5, 224, 149, 1.3), (0.25, 224, 41, 0.5), (1.0, 128, 186, 4.2)],
)
def test_mobilenets_have_the_published_counts(width, pixels, million_macs, million_parameters):
    """Source: Howard et al., MobileNets, 2017, tables 6 and 7."""
    shape = (pixels, pixels, 3)
    macs, parameters, _ = published_counts(lambda rngs: MobileNetV1(shape, 1000, width=width, rngs=rngs), shape)
    assert macs / 1e6 == pytest.approx(million_macs, abs=1.0)
    assert parameters / 1e6 == pytest.approx(million_parameters, abs=0.05)


@pytest.mark.parametrize(
    ("make", "million_macs", "parameters"),
    [(ResNet18, 1814, 11_689_512), (MobileNetV2, 300.8, 3_504_872)],
)
def test_imagenet_networks_have_the_published_counts(make, million_macs, parameters):
    """Source: torchvision's model cards of resnet18 and mobilenet_v2 (1.81 and 0.30 G multiply-adds)."""
    shape = (224, 224, 3)
    macs, elements, _ = published_counts(lambda rngs: make(shape, 1000, rngs=rngs), shape)
    assert macs / 1e6 == pytest.approx(million_macs, rel=1e-3)
    assert elements == parameters


@pytest.mark.parametrize(
    ("make", "shape", "macs", "elements", "biases"),
    [
        (lambda rngs: DSCNN((49, 10, 1), 12, rngs=rngs), (49, 10, 1), 5.4e6 / 2, None, None),
        (lambda rngs: MobileNetVWW((96, 96, 3), 2, rngs=rngs), (96, 96, 3), 7.49e6, 221_794, 2736),
        (lambda rngs: ResNet8((32, 32, 3), 10, rngs=rngs), (32, 32, 3), 12.5e6, None, None),
        (lambda rngs: AutoEncoder(rngs=rngs), (640,), 0.264e6, 269_992, 8 * 128 + 8),
    ],
    ids=["ds_cnn", "mobilenet_vww", "resnet8", "autoencoder"],
)
def test_mlperf_tiny_has_the_published_counts(make, shape, macs, elements, biases):
    """MACs and elements of parameters and statistics; the reference models have biases before normalisations besides.

    Sources: Hello edge, table 1, 5.4 million operations, two a MAC with those of biases and pooling, for DS-CNN of small
    size; for the others MLPerf Tiny's reference models as Keras and TensorFlow Lite tools count them.
    """
    counted, parameters, statistics = published_counts(make, shape)
    assert counted == pytest.approx(macs, rel=0.02)
    if elements is not None:
        assert parameters + statistics + biases == elements


def test_an_autoencoder_returns_the_shape_of_its_features():
    model = AutoEncoder(20, rngs=nnx.Rngs(0))
    assert model(jnp.ones((3, 20))).shape == (3, 20)


def test_names_are_readable():
    assert names_of(make_model("lenet", (8, 8, 1), 10)) == [
        f"{layer}/{kind}" for layer in ("conv1", "conv2", "dense1", "dense2") for kind in ("bias", "kernel")
    ]
    resnet = names_of(make_model("resnet8", (32, 32, 3), 10))
    assert {"conv1/kernel", "norm1/scale", "block1/conv1/kernel", "block2/shortcut/kernel", "dense1/bias"} <= set(
        resnet
    )
    assert "conv1/bias" not in resnet
    assert "block1/shortcut/kernel" not in resnet


def test_a_number_of_classes_sets_the_width_of_the_logits():
    assert make_model("lenet", (8, 8, 1), 26)(jnp.zeros((1, 8, 8, 1))).shape == (1, 26)


def test_the_seed_determines_the_weights():
    weights = [np.asarray(make_model("mlp", (8, 8, 1), 10, seed).dense1.kernel[...]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_images_of_a_batch_do_not_mix_in_evaluation(name):
    model = make_model(name, (8, 8, 1), 10)
    model.eval()
    images = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    alone = jnp.concatenate([model(images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(model(images), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("LeNet5", (8, 8, 1), 10), "did you mean 'lenet'"),
        (("resnet", (8, 8, 1), 10), "did you mean 'resnet8'"),
        (("lenet", (8, 8), 10), r"expected input_shape \(height, width, channels\)"),
        (("lenet", (3, 8, 1), 10), "at least 4 x 4 pixels, got"),
        (("mlp", (8, 8, 1), 1), "expected num_classes >= 2, got 1"),
    ],
)
def test_misuse_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(*arguments)
