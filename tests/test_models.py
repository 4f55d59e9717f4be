"""Reference networks: shapes, parameter counts, names, seeds, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nets.models import MODELS, make_model
from nets.training import split_model

# Shapes and number of parameters; those of LeNet-5 and of ResNet-20 with projection shortcuts are the published ones.
CASES = [
    ("mlp", (8, 8, 1), 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10),
    ("lenet", (8, 8, 1), 9 * 16 + 16 + 9 * 16 * 32 + 32 + 128 * 64 + 64 + 64 * 10 + 10),
    ("lenet", (28, 28, 1), 61_706),
    ("resnet8", (32, 32, 3), 78_042),
    ("resnet20", (32, 32, 3), 272_474),
]


def names_of(model: nnx.Module) -> list[str]:
    _, params, _ = split_model(model)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]


@pytest.mark.parametrize(("name", "input_shape", "num_parameters"), CASES)
def test_shapes_and_parameter_counts(name, input_shape, num_parameters):
    forward, params, rest = split_model(make_model(name, input_shape, 10))
    assert sum(parameter.size for parameter in jax.tree.leaves(params)) == num_parameters
    images = jax.ShapeDtypeStruct((3, *input_shape), jnp.float32)
    logits, _ = jax.eval_shape(lambda images: forward(params, rest, images, None, True), images)
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.float32


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
