"""Float training on plain pytrees: the split model, the step, evaluation and the recipe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nets.data import Examples, load_digits_dataset, take
from nets.models import make_model
from nets.training import TrainState, accuracy, cross_entropy, evaluate, fit, make_train_step, split_model

SHAPE = (8, 8, 1)


class DropoutNet(nnx.Module):
    """A dense layer behind dropout: the smallest model with random streams."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense1 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.dense1(self.dropout(images.reshape(images.shape[0], -1)))


def random_batch(size=16):
    images = jax.random.uniform(jax.random.key(0), (size, *SHAPE))
    return images, jnp.arange(size, dtype=jnp.int32) % 10


def test_loss_and_accuracy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    labels = jnp.array([0, 2])
    assert cross_entropy(logits, labels) == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)
    assert accuracy(logits, labels) == 0.5


def test_split_model_gives_named_arrays_and_leaves_the_model_alone():
    model = make_model("lenet", SHAPE, 10)
    images, _ = random_batch()
    before = model(images)
    forward, params, rest = split_model(model)
    assert params["conv1"]["kernel"].shape == (3, 3, 1, 16)
    assert not jax.tree.leaves(rest)
    logits, _ = forward(params, rest, images, None, False)
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_array_equal(model(images), before)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["lenet", "resnet8"])
def test_jit_equals_eager(name, train):
    forward, params, rest = split_model(make_model(name, SHAPE, 10))
    images, _ = random_batch()
    eager = forward(params, rest, images, None, train)
    jitted = jax.jit(forward, static_argnums=4)(params, rest, images, None, train)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eager, jitted)


def test_batch_statistics_move_in_training_only():
    forward, params, rest = split_model(make_model("resnet8", SHAPE, 10))
    images, labels = random_batch()
    _, after_evaluation = forward(params, rest, images, None, False)
    jax.tree.map(np.testing.assert_array_equal, rest, after_evaluation)
    optimizer = optax.sgd(0.1)
    state, _ = make_train_step(forward, optimizer)(
        TrainState(params, rest, optimizer.init(params)), images, labels, None
    )
    assert jax.tree.structure(state.rest) == jax.tree.structure(rest)
    # By definition: 0.9 * 0 + 0.1 * mean over the batch of what conv1 gives.
    convolved = jax.lax.conv_general_dilated(
        images, params["conv1"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = 0.1 * convolved.mean((0, 1, 2))
    np.testing.assert_allclose(state.rest["norm1"]["mean"], expected, rtol=1e-4, atol=1e-6)


def test_dropout_follows_the_key():
    forward, params, rest = split_model(DropoutNet(nnx.Rngs(0)))
    images, _ = random_batch()
    logits = [forward(params, rest, images, jax.random.key(seed), True)[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])
    assert not jax.tree.leaves(rest)
    forward(params, rest, images, None, False)
    with pytest.raises(ValueError, match=r"expected a random key for a model with dropout in training"):
        forward(params, rest, images, None, True)


def test_a_step_follows_the_gradient():
    forward, params, rest = split_model(make_model("mlp", SHAPE, 10))
    images, labels = random_batch()
    optimizer = optax.sgd(0.1)
    state, metrics = make_train_step(forward, optimizer)(
        TrainState(params, rest, optimizer.init(params)), images, labels, None
    )

    def loss_fn(params):
        return cross_entropy(forward(params, rest, images, None, True)[0], labels)

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss_fn)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected)
    assert metrics.loss == pytest.approx(float(loss_fn(params)), rel=1e-5)
    assert loss_fn(state.params) < metrics.loss


# Flax's BatchNorm mixes float64 with float32, so networks with it stay in float32.
@pytest.mark.parametrize(("name", "dtype"), [("lenet", "float64"), ("resnet8", "float32")])
def test_a_step_with_x64_enabled_keeps_its_dtypes(name, dtype, x64):
    forward, params, rest = split_model(make_model(name, SHAPE, 10))
    params, rest = jax.tree.map(lambda x: x.astype(dtype), (params, rest))
    images, labels = random_batch(4)
    images = images.astype(dtype)
    optimizer = optax.adam(1e-3)
    state, metrics = make_train_step(forward, optimizer)(
        TrainState(params, rest, optimizer.init(params)), images, labels, None
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.rest, metrics))} == {jnp.dtype(dtype)}


def test_evaluation_in_uneven_batches_is_the_mean_over_the_split():
    dataset = load_digits_dataset()
    forward, params, rest = split_model(make_model("mlp", SHAPE, 10))
    whole = evaluate(forward, params, rest, dataset.validation, batch_size=360)
    pieces = evaluate(forward, params, rest, dataset.validation, batch_size=100)
    np.testing.assert_allclose(whole, pieces, rtol=1e-5)
    logits, _ = forward(params, rest, dataset.validation.images, None, False)
    assert whole.accuracy == pytest.approx(float(accuracy(logits, dataset.validation.labels)))


def test_fit_is_deterministic():
    dataset = load_digits_dataset()
    forward, params, rest = split_model(make_model("mlp", SHAPE, 10))
    runs = [fit(forward, params, rest, dataset, epochs=2, seed=seed, max_shift=1) for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, runs[0][0], runs[1][0])
    assert runs[0][2] == runs[1][2] != runs[2][2]
    assert [record.epoch for record in runs[0][2]] == [0, 1]
    assert runs[0][2][1].train.loss < runs[0][2][0].train.loss


def test_lenet_learns_the_digits():
    dataset = load_digits_dataset()
    forward, params, rest = split_model(make_model("lenet", dataset.input_shape, dataset.num_classes))
    params, rest, history = fit(forward, params, rest, dataset, epochs=60)
    assert history[-1].train.accuracy > 0.99
    assert history[-1].validation.accuracy > 0.965
    assert evaluate(forward, params, rest, dataset.test).accuracy > 0.97


def test_a_loss_that_is_not_finite_stops_training():
    dataset = load_digits_dataset()
    images = dataset.train.images.copy()
    images[:] = np.inf
    broken = dataclasses.replace(dataset, train=Examples(images, dataset.train.labels))
    forward, params, rest = split_model(make_model("mlp", SHAPE, 10))
    with pytest.raises(ValueError, match=r"expected a finite loss, got nan in epoch 0, step 0"):
        fit(forward, params, rest, broken, epochs=1)


def test_misuse_of_fit_is_explained():
    dataset = load_digits_dataset()
    few = dataclasses.replace(dataset, train=take(dataset.train, np.arange(50)))
    forward, params, rest = split_model(make_model("mlp", SHAPE, 10))
    with pytest.raises(ValueError, match="expected epochs >= 1, got 0"):
        fit(forward, params, rest, dataset, epochs=0)
    with pytest.raises(ValueError, match=r"expected batch_size in 1..50, the training split, got 128"):
        fit(forward, params, rest, few, epochs=1)
