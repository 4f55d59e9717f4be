"""What each mechanism of low-bit training costs: step time, compiled memory and kept bytes, against float32.

    python -m experiments.bench_training [--json] [--quick] [--cases NAME ...]

LeNet-5 on 28 x 28 and ResNet-8 on 32 x 32 x 3 pixels, batch 128, Adam, on whatever device JAX finds. All steps of a
network are timed in turn in many short rounds, so that a machine whose speed drifts slows all of them alike; ratios are
medians over rounds of step time over that of float32. Memory is XLA's temporary memory of the compiled step; kept bytes
are JAX's list of what the forward pass leaves for the backward pass (`residual_bytes` of ResNet-8, and
`residual_bytes_lenet`). Qwix is timed where it is installed, with weights and inputs of 8 bits (`qwix_qat`) and errors as
well (`qwix_qt`), to nearest.

Aim: w8a8g8_stochastic at most 1.15, learned_bits 1.25, sliced_4x4 2.0; kept bytes of ResNet-8 with masks_local_4bit at
least 6 times below float32's. A quarter of an hour on two cores, most of it compilation.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from codesign.config import Count
from experiments import command_line
from nets import BitSlices, Decomposed, Laps, LayerRule, PrecisionRules, init_precision, make_local_format, quantize
from nets.laps import init_laps, step_laps
from nets.models import make_model
from nets.saved_activations import residual_bytes
from nets.training import apply_gradient, cross_entropy, split_model
from nets.weight_update import low_bit_update, near_memory, scale_by_optc

BATCH = 128
NETWORKS = {"lenet": (28, 28, 1), "resnet8": (32, 32, 3)}
KEY = jax.random.key(0)


@dataclass(frozen=True)
class Case:
    """One way to train: the rule of every layer (None: float32 as it is), rounding, frozen parameters, optimiser."""

    rule: LayerRule | None = None
    stochastic: bool = True
    frozen: tuple[str, ...] = ()
    optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adam(1e-3)


def fixed(**options: Any) -> LayerRule:
    """8 bits everywhere, not learned."""
    return LayerRule(learn=False, **options)


def case_of(**options: Any) -> Case:
    """8 bits everywhere and one mechanism."""
    return Case(fixed(**options))


CASES = {
    "float32": Case(),
    "w8a8g8_stochastic": Case(fixed()),
    "w8a8g8_nearest": Case(fixed(), stochastic=False),
    "learned_bits": Case(LayerRule()),
    "sliced_4x4": case_of(multiplier=BitSlices(4, "twos_complement")),
    "decomposed_4x4": Case(LayerRule(4, 4, "fp16", "fp16", learn=False, multiplier=Decomposed())),
    "masks": case_of(masks=True),
    "masks_local_4bit": case_of(saved=make_local_format(4, 16)),
    "frozen_convolutions": Case(fixed(masks=True), frozen=("*conv*",)),
    "sdfxp_laps": case_of(point="random_bit", laps=Laps()),
    "direct_feedback": case_of(direct_feedback=True),
    "fp8": Case(LayerRule("fp8_e4m3", "fp8_e4m3", "fp8_e5m2", "fp8_e5m2", learn=False)),
    "optc_16bit": Case(fixed(), optimizer=lambda: optax.chain(scale_by_optc(state_bits=16), optax.scale(-1e-3))),
    "near_memory": Case(fixed(), optimizer=lambda: near_memory(optax.adam(1e-3))),
    "weights8_residual": Case(fixed(), optimizer=lambda: optax.chain(optax.adam(1e-3), low_bit_update())),
}
QUICK = ("float32", "w8a8g8_stochastic")


def make_step(case: Case, model: nnx.Module, images: jax.Array, labels: jax.Array) -> tuple[Callable, Any, int]:
    """(step, its first state, kept bytes): step(state, images, labels, key) -> state, not yet compiled."""
    forward, params, rest = split_model(model)
    fn = lambda params, rest, images: forward(params, rest, images, None, True)  # noqa: E731
    optimizer = case.optimizer()
    if case.rule is None:
        precision, quant_state, laps = None, None, None
    else:
        rules = PrecisionRules({"*": case.rule}, frozen=case.frozen)
        task_loss = lambda out: cross_entropy(out[0], labels)  # noqa: E731
        precision, quant_state = init_precision(fn, rules, params, rest, images, loss=task_loss)
        laps = init_laps(precision) if case.rule.laps else None
    qfn = quantize(fn, stochastic=case.stochastic)
    learns = case.rule is not None and case.rule.learn
    trained = (params, precision) if learns else (params,)

    def loss(trees: Any, precision: Any, rest: Any, images: Any, labels: Any, key: Any) -> Any:
        trained, quant_state = trees
        if quant_state is None:
            logits, rest = fn(trained[0], rest, images)
        else:
            logits, rest = qfn(trained[0], trained[1] if learns else precision, quant_state, key, rest, images)
        return cross_entropy(logits, labels), rest

    def step(state: Any, images: Any, labels: Any, key: Any) -> Any:
        trained, precision, quant_state, rest, laps, opt_state = state
        differentiate = jax.grad(loss, has_aux=True)
        (gradient, cotangent), rest = differentiate((trained, quant_state), precision, rest, images, labels, key)
        trained, opt_state = apply_gradient(optimizer, gradient, opt_state, trained)
        if laps is not None:
            laps, precision, quant_state = step_laps(laps, precision, quant_state, cotangent)
        elif quant_state is not None:
            quant_state = quant_state.updated(cotangent)
        return trained, precision, quant_state, rest, laps, opt_state

    first = (trained, None if learns else precision, quant_state, rest, laps, optimizer.init(trained))
    scalar = lambda trees: loss(trees, precision, rest, images, labels, KEY)[0]  # noqa: E731
    return step, first, residual_bytes(scalar, (trained, quant_state))


def qwix_model(name: str, model: nnx.Module, images: jax.Array) -> nnx.Module:
    """The model under Qwix; raises ImportError where it is not installed."""
    import qwix  # optional, and only this function knows it

    widths = {"module_path": ".*", "weight_qtype": jnp.int8, "act_qtype": jnp.int8}
    rule = qwix.QtRule(**widths, bwd_qtype=jnp.int8) if name == "qwix_qt" else qwix.QuantizationRule(**widths)
    return qwix.quantize_model(model, qwix.QtProvider([rule]), images)


def ratios_to_float32(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of step time over that of float32 within rounds, in which all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(np.divide(values, seconds["float32"]))) for name, values in seconds.items()}


def measure(network: str, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Ratio, temporary memory and kept bytes of each case on one network."""
    shape = NETWORKS[network]
    images = jax.random.normal(KEY, (BATCH, *shape))
    labels = jnp.arange(BATCH) % 10
    runs: dict[str, Callable[[], Any]] = {}
    temporary: dict[str, float] = {}
    kept: dict[str, float] = {}
    for name in names:
        model = make_model(network, shape, 10)
        if name.startswith("qwix"):
            try:
                model = qwix_model(name, model, images)
            except ImportError:
                print(f"{name} is left out: Qwix is not installed; pip install -e .[bench]", file=sys.stderr)
                continue
        step, state, kept[name] = make_step(CASES.get(name, Case()), model, images, labels)
        compiled = jax.jit(step).lower(state, images, labels, KEY).compile()
        if (memory := compiled.memory_analysis()) is not None:  # some backends tell nothing
            temporary[name] = float(memory.temp_size_in_bytes)
        runs[name] = functools.partial(compiled, state, images, labels, KEY)
        jax.block_until_ready(runs[name]())
    return {"ratios": ratios_to_float32(runs, rounds), "temporary_bytes": temporary, "residual_bytes": kept}


def main(
    rounds: Count = 15,
    cases: tuple[str, ...] = (*CASES, "qwix_qat", "qwix_qt"),
    quick: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure and print.

    Args:
      rounds: rounds of one step each.
      cases: mechanisms; float32 is always one.
      quick: 8 bits on LeNet only.
      as_json: one JSON object instead of lines.
    """
    unknown = set(cases) - {*CASES, "qwix_qat", "qwix_qt"}
    if unknown:
        raise ValueError(
            f"expected cases among {', '.join(CASES)}, qwix_qat, qwix_qt, got {', '.join(sorted(unknown))}"
        )
    names = QUICK if quick else ("float32", *(name for name in cases if name != "float32"))
    networks = ("lenet",) if quick else tuple(NETWORKS)
    found = {network: measure(network, names, rounds) for network in networks}
    by_case = {
        key: {
            name: {network: values[key][name] for network, values in found.items() if name in values[key]}
            for name in found[networks[0]][key]
        }
        for key in ("ratios", "temporary_bytes")
    }
    result = {"device": jax.devices()[0].device_kind, "batch": BATCH, **by_case}
    result["residual_bytes"] = found[networks[-1]]["residual_bytes"]
    result["residual_bytes_lenet"] = found["lenet"]["residual_bytes"]
    if as_json:
        print(json.dumps(result))
        return
    for name, ratios in by_case["ratios"].items():
        shown = ", ".join(
            f"{network} {ratio:.2f}x time, {by_case['temporary_bytes'].get(name, {}).get(network, 0) / 2**20:.1f} MiB, "
            f"{found[network]['residual_bytes'][name] / 2**20:.2f} MiB kept"
            for network, ratio in ratios.items()
        )
        print(f"{name}: {shown}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
