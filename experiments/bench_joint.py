"""What co-design adds to a training step: the joint step against the plain quantised one and against float32.

    python -m experiments.bench_joint [--json]

LeNet on 8 x 8 digits, batch 128, on whatever device JAX finds. The steps are timed in turn, many short rounds, so that a
machine whose speed drifts slows all of them alike; ratios are medians over rounds. The refresh of mappings and noise is
timed on its own and amortised over the steps between two refreshes. Aim: joint at most 1.3x the plain quantised step.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from codesign.config import Config, Count, TrainConfig
from codesign.cooptimize import Phase, make_step, refresh_mappings, refresh_noise, start_phase
from codesign.problem import make_task
from experiments import command_line
from nets.data import batches
from nets.dataset_files import load_dataset

PHASES = {
    "float32": Phase(quantised=False),
    "quantised": Phase(),
    "joint": Phase(learn_bits=True, learn_chip=True, penalty="edp", weight=0.03),
}


def median_times(runs: dict[str, Callable[[], Any]], rounds: int, inner: int) -> dict[str, np.ndarray]:
    """Seconds per call of each function, shape (rounds,), the functions taken in turn within every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            started = time.perf_counter()
            for _ in range(inner):
                out = call()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - started) / inner)
    return {name: np.array(values) for name, values in times.items()}


def measure(rounds: int = 15, inner: int = 10) -> dict[str, Any]:
    """Milliseconds per step of each phase (medians), the refreshes, compile times and the ratios."""
    config = Config(train=TrainConfig(batch_size=128))
    dataset = load_dataset(config.data.name)
    task, state = make_task(config, dataset)
    images, labels = next(batches(dataset, 128, seed=0, epoch=0))
    key, num_steps = jax.random.key(0), 1000
    runs: dict[str, Callable[[], Any]] = {}
    compile_s = {}
    for name, phase in PHASES.items():
        step, start = make_step(task, phase, num_steps), start_phase(task, phase, state, num_steps)
        runs[name] = functools.partial(step, start, images, labels, key)
    runs["refresh_mappings"] = lambda: refresh_mappings(task, state, key, task.refresh_evaluations).mappings.scores
    runs["refresh_noise"] = lambda: refresh_noise(task, state, images, labels, key).noise.energy
    for name, call in runs.items():
        started = time.perf_counter()
        jax.block_until_ready(call())
        compile_s[name] = time.perf_counter() - started
    times = median_times({name: runs[name] for name in PHASES}, rounds, inner)
    refreshes = median_times({name: runs[name] for name in runs if name not in PHASES}, 3, 1)
    every = {"refresh_mappings": config.search.refresh_every, "refresh_noise": config.search.noise_every}
    refresh = sum(float(np.median(refreshes[name])) / steps for name, steps in every.items())
    ratio = np.median((times["joint"] + refresh) / times["quantised"])
    return {
        "device": jax.devices()[0].device_kind,
        "step_ms": {name: 1e3 * float(np.median(values)) for name, values in times.items()},
        "refresh_ms": {name: 1e3 * float(np.median(values)) for name, values in refreshes.items()},
        "refresh_every": every,
        "first_call_s": compile_s,
        "joint_over_quantised": float(ratio),
        "joint_over_quantised_without_refresh": float(np.median(times["joint"] / times["quantised"])),
        "quantised_over_float32": float(np.median(times["quantised"] / times["float32"])),
    }


def main(rounds: Count = 15, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Measure and print.

    Args:
      rounds: rounds of ten steps each.
      as_json: one JSON object instead of lines.
    """
    result = measure(rounds)
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
