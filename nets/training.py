"""Training and evaluation on plain pytrees: a model is split once, jitted steps see only dictionaries of arrays."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nets.data import Dataset, Examples, batches

Array = jax.Array | np.ndarray
Params = Any
Rest = Any

# What a model carries from step to step beside its parameters; its random streams start anew from each step's key.
CARRIED = nnx.Not(nnx.Any(nnx.Param, nnx.RngState))


class Forward(Protocol):
    """A network as a plain function.

    Args:
      params: trainable arrays, a pytree.
      rest: everything else the network carries along (batch statistics), a pytree.
      images: shape (batch, height, width, channels).
      key: random key of this step, or None where nothing is random.
      train: static; whether batch statistics are taken from the batch and dropout is active.

    Returns:
      Logits of shape (batch, num_classes) and the updated `rest`.
    """

    def __call__(
        self, params: Params, rest: Rest, images: Array, key: Array | None, train: bool, /
    ) -> tuple[jax.Array, Rest]: ...


def split_model(model: nnx.Module) -> tuple[Forward, Params, Rest]:
    """Split an NNX model into a plain function and the pytrees that it works on; the model itself is left as it is.

    Args:
      model: maps images to logits; may hold batch statistics and dropout.

    Returns:
      forward: see `Forward`; raises ValueError where the model draws random numbers in training and key is None.
      params: nested dictionaries of arrays whose paths are the model's own, such as {"conv1": {"kernel": ...}}.
      rest: nested dictionaries of the other arrays; empty for a model without state.
    """
    model = nnx.clone(model)
    model.train()
    train_graph = nnx.graphdef(model)
    model.eval()
    eval_graph = nnx.graphdef(model)
    params, rest = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, CARRIED))
    streams = nnx.to_pure_dict(nnx.state(model, nnx.RngState))
    is_random = bool(jax.tree.leaves(streams))

    def forward(params, rest, images, key, train):
        if train and is_random and key is None:
            raise ValueError(
                "expected a random key for a model with dropout in training, got None; pass jax.random.key(...)"
            )
        graph = train_graph if train else eval_graph
        # copy=True: without it, variables that BatchNorm updates belong to an outer trace inside jax.grad.
        merged = nnx.merge(graph, params, streams if key is None else _reseed(streams, key), rest, copy=True)
        logits = merged(images)
        return logits, nnx.to_pure_dict(nnx.state(merged, CARRIED))

    return forward, params, rest


def _reseed(streams: dict, key: jax.Array) -> dict:
    """Random streams of a model restarted from a key: each its own key, counters at zero."""
    leaves, structure = jax.tree.flatten(streams)
    fresh = [
        jax.random.fold_in(key, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats: logits (batch, num_classes), integer labels (batch,) -> shape ()."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of labels with the largest logit: logits (batch, num_classes), integer labels (batch,) -> shape ()."""
    return jnp.mean(jax.lax.argmax(logits, logits.ndim - 1, labels.dtype) == labels, dtype=logits.dtype)


class Metrics(NamedTuple):
    """Mean cross-entropy in nats and share of right answers; arrays of shape () or floats."""

    loss: jax.Array | float
    accuracy: jax.Array | float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a training step changes: parameters, the model's other state, the optimiser's state."""

    params: Params
    rest: Rest
    opt_state: Any


def apply_gradient(
    optimizer: optax.GradientTransformation, gradient: Any, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """Take one optimiser step; returns the new params and optimiser state, pytrees like the old ones."""
    # optax mixes its integer step count with floats, which strict promotion, where a caller sets it, would refuse.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def make_train_step(
    forward: Forward, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Array, Array, Array | None], tuple[TrainState, Metrics]]:
    """Build the jitted step `(state, images, labels, key) -> (state, metrics)`, metrics being those before the update.

    Call it once per batch from Python: inside `lax.scan` it is an order of magnitude slower on a CPU.

    Args:
      forward: the network, from `split_model` or its quantised twin.
      optimizer: turns the gradient of the cross-entropy into an update of `state.params`.
    """

    @jax.jit
    def train_step(state, images, labels, key):
        def loss_fn(params):
            logits, rest = forward(params, state.rest, images, key, True)
            return cross_entropy(logits, labels), (logits, rest)

        (loss, (logits, rest)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        params, opt_state = apply_gradient(optimizer, gradient, state.opt_state, state.params)
        return TrainState(params, rest, opt_state), Metrics(loss, accuracy(logits, labels))

    return train_step


def evaluate(forward: Forward, params: Params, rest: Rest, examples: Examples, batch_size: int = 512) -> Metrics:
    """Loss and accuracy of a network on a split, without changing its state.

    Args:
      forward: the network; hand over the same function each time, it is compiled once per function and batch shape.
      params, rest: its pytrees.
      examples: the split.
      batch_size: examples per call; the last call takes what is left.

    Returns:
      Means over the split, as floats.
    """
    totals = np.zeros(2)
    for start in range(0, len(examples.labels), batch_size):
        chunk = slice(start, start + batch_size)
        totals += jax.device_get(_totals(forward, params, rest, examples.images[chunk], examples.labels[chunk]))
    loss, share = totals / len(examples.labels)
    return Metrics(float(loss), float(share))


@functools.partial(jax.jit, static_argnums=0)
def _totals(forward, params, rest, images, labels):
    logits, _ = forward(params, rest, images, None, False)
    return len(labels) * jnp.stack([cross_entropy(logits, labels), accuracy(logits, labels)])


class EpochRecord(NamedTuple):
    """One epoch of `fit`: training loss and accuracy (means over its batches) and those on the validation split."""

    epoch: int
    train: Metrics
    validation: Metrics


def fit(
    forward: Forward,
    params: Params,
    rest: Rest,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    max_shift: int = 0,
    seed: int = 0,
) -> tuple[Params, Rest, list[EpochRecord]]:
    """Train a network with Adam and a learning rate that falls to zero along a cosine.

    With the defaults and 60 epochs LeNet reaches 98 % of the test digits in about two seconds.

    Args:
      forward, params, rest: the network, from `split_model`.
      dataset: trains on its training split, reports its validation split, leaves its test split alone.
      epochs: passes over the training split.
      batch_size: examples per step.
      learning_rate: of the first step.
      max_shift: augmentation, see `nets.data.batches`.
      seed: of order, augmentation and dropout.

    Returns:
      The trained params and rest, and one record per epoch.

    Raises:
      ValueError: epochs below one; a bad batch_size; a loss that is not finite, naming the epoch and step it came at.
    """
    if epochs < 1:
        raise ValueError(f"expected epochs >= 1, got {epochs}")
    steps = epochs * (len(dataset.train.labels) // batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))
    train_step = make_train_step(forward, optimizer)
    state = TrainState(params, rest, optimizer.init(params))
    key, step, history = jax.random.key(seed), 0, []
    for epoch in range(epochs):
        seen = []
        for images, labels in batches(dataset, batch_size, seed, epoch, max_shift=max_shift):
            state, metrics = train_step(state, images, labels, jax.random.fold_in(key, step))
            if not np.isfinite(metrics.loss):
                raise ValueError(
                    f"expected a finite loss, got {metrics.loss} in epoch {epoch}, step {step}; lower learning_rate "
                    f"({learning_rate:g}) or look at the data"
                )
            seen.append(metrics)
            step += 1
        train = Metrics(*(float(np.mean(values)) for values in zip(*seen, strict=True)))
        history.append(EpochRecord(epoch, train, evaluate(forward, state.params, state.rest, dataset.validation)))
    return state.params, state.rest, history
