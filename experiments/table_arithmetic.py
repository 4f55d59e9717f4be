"""The arithmetic of low-bit training on real digits: accuracy, bits, slices, kept bytes and step time of each scheme.

    python -m experiments.table_arithmetic            # 5 seeds, both tasks; some twenty minutes on two cores
    python -m experiments.table_arithmetic --quick    # 1 seed, few epochs: only to see it work

LeNet on the digits, trained with Adam. Every scheme also adapts a network that was trained in float32 to one synthetic
writer (50 digits; `nets.personalisation`). "fxp4_fp16_frozen" starts from a float32 network in both tasks: its
convolutions are frozen. Reported per scheme, means and 95 % intervals over seeds: test accuracy and accuracy on the
writer's other digits; mean bits of weights, inputs and errors at the end; the share of non-zero 4-bit signed slices per
pass; bytes that one training step keeps for its backward pass; step time over that of float32 in the same run.

The two further rows of the controller show its sensitivity to thresholds three times lower and higher.

Aim: within half a point of float32 for w8a8g8_stochastic and sdfxp_laps, within 1.5 for g4_stochastic; g3_nearest is seen
to fail. CIFAR-10 is used with `--data`, a folder as `nets.dataset_files` describes it.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from codesign.config import Count
from experiments import command_line
from nets import BitSlices, Decomposed, Laps, LayerRule, PrecisionRules, make_local_format, quantize
from nets.data import Dataset, Examples, batches, take
from nets.dataset_files import load_dataset
from nets.low_bit_training import LowBitState, init_low_bit, make_low_bit_loss, make_low_bit_step, train_low_bit
from nets.models import make_model
from nets.personalisation import make_personalisation
from nets.rules import FLOAT
from nets.saved_activations import residual_bytes
from nets.skipping import mask_densities, slice_densities
from nets.training import cross_entropy, fit, split_model
from nets.weight_update import low_bit_update

KEY = jax.random.key(0)
BATCH = 128


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    Attributes:
      rule: of every layer.
      stochastic: how errors are rounded.
      frozen: patterns of parameters that are not trained; the network then starts from a float32 one.
      low_bit_weights: whether weights are kept in 8 bits with a residual.
    """

    rule: LayerRule
    stochastic: bool = True
    frozen: tuple[str, ...] = ()
    low_bit_weights: bool = False


def plain(weights: int = 8, inputs: int = 8, errors: int = 8, **options: Any) -> LayerRule:
    """A rule with given widths and one for both errors."""
    return LayerRule(weights, inputs, errors, errors, learn=False, **options)


SCHEMES = {
    "float32": Scheme(FLOAT),
    "w8a8g8_stochastic": Scheme(plain()),
    "g4_nearest": Scheme(plain(errors=4), stochastic=False),
    "g4_stochastic": Scheme(plain(errors=4)),
    "g3_nearest": Scheme(plain(errors=3), stochastic=False),
    "g3_stochastic": Scheme(plain(errors=3)),
    "sdfxp_laps": Scheme(plain(16, 16, 16, point="random_bit", laps=Laps())),
    "sdfxp_laps_tight": Scheme(plain(16, 16, 16, point="random_bit", laps=Laps(upper=0.01, lower=3e-5))),
    "sdfxp_laps_loose": Scheme(plain(16, 16, 16, point="random_bit", laps=Laps(upper=0.1, lower=3e-4))),
    "fxp4_fp16_frozen": Scheme(
        LayerRule(4, 4, "fp16", "fp16", learn=False, multiplier=Decomposed()), frozen=("conv*",)
    ),
    "local_4bit": Scheme(plain(saved=make_local_format(4, 16))),
    "masks": Scheme(plain(masks=True)),
    "sliced_4x4": Scheme(plain(multiplier=BitSlices(4, "signed"))),
    "weights8_residual": Scheme(plain(), low_bit_weights=True),
}


class Trainer:
    """Trains networks of one architecture under one scheme; compiled once for all seeds."""

    def __init__(self, scheme: Scheme, forward: Callable, num_steps: int, learning_rate: float) -> None:
        self.scheme, self.forward = scheme, forward
        # The yardstick is the network itself, not its twin with widths of 32 bits.
        self.loss = make_low_bit_loss(forward, stochastic=scheme.stochastic, quantised=scheme.rule != FLOAT)
        adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
        self.optimizer = optax.chain(adam, low_bit_update()) if scheme.low_bit_weights else adam
        self.step = make_low_bit_step(self.loss, self.optimizer)
        self.logits = jax.jit(self._logits)

    def start(self, params: Any, rest: Any, images: Any, labels: Any) -> LowBitState:
        """The state before the first step, calibrated on one batch."""
        rules = PrecisionRules({"*": self.scheme.rule}, frozen=self.scheme.frozen)
        return init_low_bit(self.forward, params, rest, rules, self.optimizer, (images, labels))

    def train(
        self, params: Any, rest: Any, epochs: Sequence[Sequence[Examples]], seed: int
    ) -> tuple[LowBitState, np.ndarray]:
        """The state after given batches, epoch by epoch, and all widths at the end of every epoch."""
        state, history = train_low_bit(self.step, self.start(params, rest, *epochs[0][0]), epochs, seed)
        return state, np.asarray(history)

    def _logits(self, state: LowBitState, images: Any) -> jax.Array:
        network = quantize(lambda params, rest, images: self.forward(params, rest, images, None, False)[0])
        return network(state.params, state.precision, state.quant_state, None, state.rest, images)

    def accuracy(self, state: LowBitState, examples: Examples) -> float:
        """Share of right answers with the formats of the state."""
        return float(np.mean(np.argmax(self.logits(state, examples.images), axis=1) == examples.labels))

    def kept_bytes(self, state: LowBitState, images: Any, labels: Any) -> int:
        """Bytes that the backward pass of one step keeps, parameters apart."""
        loss = lambda trees: self.loss(trees[0], trees[1], state, images, labels, KEY)[0]  # noqa: E731
        return residual_bytes(loss, (state.params, state.quant_state))

    def slice_work(self, state: LowBitState, images: Any, labels: Any) -> dict[str, float] | None:
        """Share of 4-bit signed slices that are left per pass, a mean over layers; None without narrow integers."""
        fn = lambda params, images: self.forward(params, state.rest, images, KEY, True)  # noqa: E731
        loss = lambda out: cross_entropy(out[0], labels)  # noqa: E731
        found = np.asarray(slice_densities(fn, loss, state.precision, state.quant_state, state.params, images))
        if np.any(np.isnan(found)):
            return None
        masks = np.asarray(mask_densities(fn, state.params, images))
        shares = {"forward": found[:, 1], "input_grad": found[:, 2] * masks, "weight_grad": found[:, 1] * found[:, 3]}
        return {name: float(np.mean(share)) for name, share in shares.items()}


def compare_steps(
    trainers: dict[str, Trainer], states: dict[str, LowBitState], batch: Examples, rounds: int
) -> dict[str, float]:
    """Step time over that of float32: medians of ratios within rounds, in which the schemes take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            for _ in range(5):
                out = trainer.step(states[name], *batch, KEY)
            jax.block_until_ready(out)
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(np.divide(values, seconds["float32"]))) for name, values in seconds.items()}


def measure(dataset: Dataset, names: Sequence[str], seeds: int, epochs: int, adapt_epochs: int) -> dict[str, Any]:
    """All figures of all schemes: lists with one value per seed, and what one step of seed 0 shows."""
    forward, _, _ = split_model(make_model("lenet", dataset.input_shape, dataset.num_classes))
    num_steps = epochs * (len(dataset.train.labels) // BATCH)
    adapt_steps = adapt_epochs * 2
    trainers = {name: Trainer(SCHEMES[name], forward, num_steps, 0.01) for name in names}
    adapters = {name: Trainer(SCHEMES[name], forward, adapt_steps, 0.002) for name in names}
    rows: dict[str, Any] = {name: {"accuracy": [], "writer_accuracy": [], "mean_bits": []} for name in names}
    states: dict[str, LowBitState] = {}
    for seed in range(seeds):
        _, params, rest = split_model(make_model("lenet", dataset.input_shape, dataset.num_classes, seed))
        data = [list(batches(dataset, BATCH, seed, epoch)) for epoch in range(epochs)]
        pretrained, pretrained_rest, _ = fit(forward, params, rest, dataset, epochs=epochs, seed=seed)
        task = make_personalisation(dataset, seed)
        adaptation = [halves(task.adaptation, seed, epoch) for epoch in range(adapt_epochs)]
        for name in names:
            start = (pretrained, pretrained_rest) if SCHEMES[name].frozen else (params, rest)
            state, history = trainers[name].train(*start, data, seed)
            adapted, _ = adapters[name].train(pretrained, pretrained_rest, adaptation, seed)
            rows[name]["accuracy"].append(trainers[name].accuracy(state, dataset.test))
            rows[name]["writer_accuracy"].append(adapters[name].accuracy(adapted, task.evaluation))
            rows[name]["mean_bits"].append(float(history[-1].mean()))
            if seed == 0:
                states[name] = state
                rows[name]["layers"] = state.precision.names
                rows[name]["bits_over_time"] = history.tolist() if SCHEMES[name].rule.laps else None
    batch = data[0][0]
    ratios = compare_steps(trainers, states, batch, rounds=10)
    for name in names:
        rows[name]["kept_bytes"] = trainers[name].kept_bytes(states[name], *batch)
        rows[name]["slice_work"] = trainers[name].slice_work(states[name], *batch)
        rows[name]["step_time"] = ratios[name]
    return rows


def halves(examples: Examples, seed: int, epoch: int) -> list[Examples]:
    """The few examples of a writer in random order, in two batches."""
    order = np.random.default_rng((seed, epoch)).permutation(len(examples.labels))
    return [take(examples, half) for half in np.split(order[: len(order) // 2 * 2], 2)]


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, half width of the 95 % interval (Student) and the values themselves, one per seed."""
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {"mean": float(np.mean(values)), "half_width": half, "values": list(values)}


def tabulate(rows: dict[str, Any]) -> dict[str, Any]:
    """Statistics over seeds, and accuracy relative to float32 in points (paired by seed)."""
    table = {}
    for name, row in rows.items():
        table[name] = row | {key: interval(row[key]) for key in ("accuracy", "writer_accuracy", "mean_bits")}
        for key in ("accuracy", "writer_accuracy"):
            points = 100.0 * (np.array(row[key]) - np.array(rows["float32"][key]))
            table[name][f"{key}_points_to_float32"] = interval(points.tolist())
    return table


def show(table: dict[str, Any]) -> None:
    """Print the table for people."""
    rich = Table(title="LeNet on digits")
    for heading in (
        "scheme",
        "accuracy %",
        "points to float32",
        "writer %",
        "bits",
        "slices f/i/w %",
        "kept KiB",
        "step",
    ):
        rich.add_column(heading)
    for name, row in table.items():
        work = row["slice_work"]
        slices = "-" if work is None else " / ".join(f"{100 * share:.0f}" for share in work.values())
        accuracy, writer, points = (row[k] for k in ("accuracy", "writer_accuracy", "accuracy_points_to_float32"))
        rich.add_row(
            name,
            f"{100 * accuracy['mean']:.2f} +- {100 * accuracy['half_width']:.2f}",
            f"{points['mean']:+.2f}",
            f"{100 * writer['mean']:.2f} +- {100 * writer['half_width']:.2f}",
            f"{row['mean_bits']['mean']:.2f}",
            slices,
            f"{row['kept_bytes'] / 1024:.0f}",
            f"{row['step_time']:.2f}x",
        )
    Console(width=140).print(rich)


def plot_bits(history: np.ndarray, layers: Sequence[str], path: Path) -> None:
    """Widths over time of every layer, a row each, forward and input_grad side by side."""
    import matplotlib.pyplot as plt  # half a second to import: only who plots pays for it

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True, layout="constrained")
    widths = np.arange(2, 18, 2)
    colours = plt.get_cmap("viridis", len(widths))
    for axis, column, title in zip(axes, (1, 2), ("forward", "input_grad"), strict=True):
        image = axis.imshow(
            history[:, :, column].T, cmap=colours, vmin=1, vmax=17, aspect="auto", interpolation="nearest",
            extent=(0.5, len(history) + 0.5, len(layers) - 0.5, -0.5),
        )  # fmt: skip
        axis.set(title=title, xlabel="epoch", yticks=range(len(layers)), yticklabels=layers)
    figure.colorbar(image, ax=axes, ticks=widths, label="bits")
    figure.savefig(path)


def main(
    seeds: Count = 5,
    epochs: Count = 60,
    data: str = "digits",
    schemes: tuple[str, ...] = tuple(SCHEMES),
    plot: Path | None = None,
    quick: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Train and tabulate.

    Args:
      seeds: networks per scheme.
      epochs: passes over the training split.
      data: "digits" or a folder, see `nets.dataset_files`.
      schemes: rows of the table; float32 is always one.
      plot: where to draw the widths that the controller chose over time (seed 0).
      quick: one seed and two epochs, to see it work.
      as_json: print one JSON object instead of the table.
    """
    unknown = set(schemes) - set(SCHEMES)
    if unknown:
        raise ValueError(f"expected schemes among {', '.join(SCHEMES)}, got {', '.join(sorted(unknown))}")
    if plot is not None and "sdfxp_laps" not in schemes:
        raise ValueError(f"expected sdfxp_laps among the schemes, whose widths --plot draws, got {', '.join(schemes)}")
    names = ("float32", *(name for name in schemes if name != "float32"))
    seeds, epochs, adapt_epochs = (1, 2, 2) if quick else (seeds, epochs, 30)
    table = tabulate(measure(load_dataset(data), names, seeds, epochs, adapt_epochs))
    if plot is not None:
        history = np.array(table["sdfxp_laps"]["bits_over_time"])
        plot_bits(history, table["sdfxp_laps"]["layers"], plot)
    if as_json:
        print(json.dumps(table))
    else:
        show(table)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
