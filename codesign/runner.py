"""A whole run: stages in order, with checkpoints to resume from, judged by one evaluation, written to one directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign import rundir
from codesign.baselines import random_chips
from codesign.checkpoint import Checkpoint, Checkpoints, check_owner
from codesign.config import Config, config_to_dict, dump_config, fingerprint
from codesign.cooptimize import (
    State,
    StepFunction,
    make_step,
    neighbour_evaluations,
    penalised,
    refresh_mappings,
    refresh_noise,
    start_phase,
    state_edp,
)
from codesign.cost_report import describe_cost, inference_cost
from codesign.design import physical_values, with_values
from codesign.evaluation import evaluate_chip
from codesign.legalize import legal_chip, polish
from codesign.mapper import make_tables, replace_best
from codesign.narrowing import narrow
from codesign.network_file import write_network
from codesign.problem import (
    asked_budgets,
    batch_size,
    calibrate,
    check_budgets,
    describe_budgets,
    float_sibling,
    initial_rule,
    load_tasks,
    make_task,
    trace_network,
)
from codesign.progress import NullProgress, Progress, deferred_interrupt
from codesign.report import METHODS, write_report
from codesign.stages import Stage, choose, plan
from codesign.summary import describe_bits, mean_bits, read_bits, summarise
from codesign.uncertainty import compare
from hw.chip import Chip
from nets.data import Dataset, batches
from nets.precision import LayerRule, freeze
from nets.training import Metrics, evaluate

_FINAL_EFFORT = 4  # mappings tried per operation for a last iterate and in a final evaluation, in `search.evaluations`
_CHECKPOINT_STEPS = 200  # steps lost at most by a kill
_COST_KEYS = (
    "energy_uj", "latency_ms", "edp_js", "area_mm2", "power_mw", "intervals",
    "energy_to_bound", "latency_to_bound", "edp_to_bound",
)  # fmt: skip
_CURVES = {"energy": ("energy_uj", 1e6), "latency": ("latency_ms", 1e3), "area": ("area_mm2", 1e6)}


def run(config: Config, directory: Path, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run all methods of a config and write everything to a directory.

    Args:
      config: the settings.
      directory: exists; empty, or with `resume` one that was begun under the same settings.
      resume: go on from its last checkpoint.
      progress: where to show how far it is.

    Returns:
      What result.json holds.

    Raises:
      ValueError: settings, data or budgets that cannot be met, a loss that is not finite; what was reached is kept.
    """
    with progress or NullProgress() as shown:
        current = Run(config, directory, shown)  # refuses what is impossible before anything is written
        check_owner(directory, fingerprint(config))
        if not resume:  # before all else, so that whatever stops the run from here on, it can be gone on with
            rundir.write_atomic(directory / rundir.CONFIG, dump_config(config))
        with Checkpoints(directory, fingerprint(config)) as checkpoints:
            current.execute(checkpoints, checkpoints.resume() if resume else None)
        result = current.result()
    rundir.write_result(directory, result)
    rundir.write_design(directory, result["design"])
    write_report(directory)
    return result


class Run:
    """A run in progress.

    Attributes:
      single: the workload of one sample, for the cost of an inference.
      states: "pretrained", "current" and every "try i" of the present method; only "current" has optimiser state.
      results: finished method -> what it reached, JSON-like.
      notes: what unfinished methods must remember, JSON-like.
      epoch_metrics: metrics of the steps since the last full epoch.
    """

    def __init__(self, config: Config, directory: Path, progress: Progress):
        self.config, self.directory, self.progress = config, directory, progress
        self.tasks = load_tasks(config)
        self.dataset = self.tasks.methods
        self.task, initial = make_task(config, self.dataset)
        check_budgets(self.task, initial, asked_budgets(config))
        self.single = trace_network(
            self.task.forward, initial.params, initial.rest, self.dataset, 1, config.train.optimizer
        )
        self.stages = plan(config)
        num_tries = max(len(config.objective.cost_weights), len(config.baselines.sequential_weights))
        names = ("pretrained", "current", *(f"try {i}" for i in range(num_tries)))
        self.states: dict[str, State] = dict.fromkeys(names, initial)
        self.results: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self.epoch_metrics: list[dict[str, float]] = []
        self.key = jax.random.key(config.train.seed)

    def execute(self, checkpoints: Checkpoints, checkpoint: Checkpoint | None) -> None:
        """Go through all stages, after a checkpoint if there is one, writing new ones on the way."""
        self.checkpoints = checkpoints
        first, first_step = (0, 0) if checkpoint is None else self._restore(checkpoint)
        self.progress.plan([(stage.name, self._num_steps(stage)) for stage in self.stages])
        for index, stage in enumerate(self.stages):
            self.progress.stage(stage.name)
            if index < first:
                self.progress.advance(self._num_steps(stage))
                continue
            started = time.perf_counter()
            self._train(stage, index, first_step if index == first else 0)
            getattr(self, f"_{stage.finish}")(stage, jax.random.fold_in(self.key, 1_000_000 + index))
            self.notes.setdefault("seconds", {})[stage.name] = round(time.perf_counter() - started, 2)
            self._save(index + 1, 0)

    def _num_steps(self, stage: Stage) -> int:
        return stage.epochs * self._steps_per_epoch(stage)

    def _data(self, stage: Stage) -> Dataset:
        """What a stage trains on."""
        return self.tasks.pretraining if stage.finish == "calibrate" else self.tasks.methods

    def _steps_per_epoch(self, stage: Stage) -> int:
        data = self._data(stage)
        return len(data.train.labels) // batch_size(self.config, data)

    def _save(self, index: int, step: int) -> None:
        """Write a checkpoint: `step` steps of stage `index` are done."""
        position = sum(self._num_steps(stage) + 1 for stage in self.stages[:index]) + step
        precision = self.states["pretrained"].precision
        note = {
            "stage": index, "step": step, "signed": precision.signed,
            "results": self.results, "notes": self.notes, "epoch_metrics": self.epoch_metrics,
        }  # fmt: skip
        self.checkpoints.save(position, self.states, note)

    def _restore(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Take over a checkpoint; returns the stage and step to go on with."""
        note = checkpoint.note
        index, step = note["stage"], note["step"]
        signed = tuple((bool(weights), bool(inputs)) for weights, inputs in note["signed"])
        initial = self.states["current"]
        template = dataclasses.replace(initial, precision=dataclasses.replace(initial.precision, signed=signed))
        current = template
        if step:
            current = start_phase(self.task, self.stages[index].phase, template, self._num_steps(self.stages[index]))
        self.states = checkpoint.state(dict.fromkeys(self.states, template) | {"current": current})
        self.results, self.notes, self.epoch_metrics = note["results"], note["notes"], note["epoch_metrics"]
        return index, step

    def _train(self, stage: Stage, index: int, first_step: int) -> None:
        """Run a stage's steps; metrics once per epoch, a checkpoint now and then and when interrupted."""
        phase, total = stage.phase, self._num_steps(stage)
        if not first_step:
            self.states["current"] = start_phase(self.task, phase, self._prepared(stage), total)
        step_fn = make_step(self.task, phase, total)
        key = jax.random.fold_in(self.key, index)
        self.progress.advance(first_step)
        with deferred_interrupt() as interrupted:
            for step, batch in self._batches(stage, first_step, total):
                self._advance(stage, step_fn, step, batch, jax.random.fold_in(key, step))
                if (step + 1) % self._steps_per_epoch(stage) == 0:
                    self._log(stage, (step + 1) // self._steps_per_epoch(stage))
                if interrupted() or ((step + 1) % _CHECKPOINT_STEPS == 0 and step + 1 < total):
                    self._save(index, step + 1)
                if interrupted():
                    raise KeyboardInterrupt
        self.states["current"] = dataclasses.replace(self.states["current"], opt_state=())

    def _advance(self, stage: Stage, step_fn: StepFunction, step: int, batch: tuple[Any, Any], key: jax.Array) -> None:
        """One step, after a refresh where one is due."""
        state = self.states["current"]
        is_last = step + 1 == self._num_steps(stage)
        if stage.phase.penalty == "edp" and (is_last or step % self.config.search.refresh_every == 0):
            # The last iterate gets the effort of a final answer, or what legalising costs would be lost in what it finds.
            final = _FINAL_EFFORT * stage.effort * self.task.evaluations
            evaluations = final if is_last else self.task.refresh_evaluations
            state = self._refreshed(stage, state, jax.random.fold_in(key, 1), evaluations)
        if stage.phase.learn_bits and step % self.config.search.noise_every == 0:
            state = refresh_noise(self.task, state, *batch, jax.random.fold_in(key, 2))
        state, metrics = step_fn(state, *batch, key)
        if not np.isfinite(metrics.get("loss", 0.0)):
            raise ValueError(
                f"loss in {stage.name}, step {step}: expected a finite number, got {metrics['loss']}; lower "
                f"train.learning_rate ({self.config.train.learning_rate:g}) or look at the data; the last checkpoint is kept"
            )
        self.states["current"] = state
        self.epoch_metrics.append({name: float(value) for name, value in metrics.items()})
        shown = {name: self.epoch_metrics[-1][name] for name in ("loss", "accuracy", "edp") if name in metrics}
        self.progress.advance(1, **shown)

    def _prepared(self, stage: Stage) -> State:
        """The state a stage starts from, with the formats it wants."""
        state = self._best_try(stage) if stage.start == "best" else self.states[stage.start]
        if stage.rule is not None:
            state = self._with_formats(state, stage.rule)
        elif stage.phase.quantised and not stage.phase.learn_bits:
            state = dataclasses.replace(state, precision=freeze(state.precision))
        return state

    def _best_try(self, stage: Stage) -> State:
        """The chosen try of a stage's method, widths that it learned narrowed by what it paid for."""
        chosen = choose(self.notes["tries"][stage.method])
        state = self.states[f"try {chosen}"]
        tries = [other for other in self.stages if other.method == stage.method and other.finish == "try"]
        if not (phase := tries[chosen].phase).learn_bits:
            return state
        state, tried = narrow(self.task, phase, state, self.dataset.train)
        if phase.penalty == "edp":
            self._count(stage, tried * state.mappings.scores.size)
        return state

    def _batches(self, stage: Stage, first_step: int, total: int) -> Iterator[tuple[int, tuple[Any, Any]]]:
        """Step numbers from `first_step` on with their batches; a function of the seed and the step alone."""
        if not stage.phase.train:
            yield from ((step, (None, None)) for step in range(first_step, total))
            return
        train, data, per_epoch = self.config.train, self._data(stage), self._steps_per_epoch(stage)
        for epoch in range(first_step // per_epoch, stage.epochs):
            size = batch_size(self.config, data)
            examples = batches(data, size, train.seed, epoch, max_shift=1 if train.augment else 0)
            for i, batch in enumerate(examples):
                step = epoch * per_epoch + i
                if step >= first_step:
                    yield step, batch

    def _refreshed(self, stage: Stage, state: State, key: jax.Array, evaluations: int) -> State:
        """The state with new candidate mappings, `evaluations` tried per operation."""
        state = refresh_mappings(self.task, state, key, evaluations)
        num_operations, num_candidates = state.mappings.scores.shape
        num_neighbours = num_candidates - self.task.num_candidates
        searched = evaluations + num_neighbours * neighbour_evaluations(evaluations)
        # Until the next refresh every step evaluates all candidates with their gradient, which counts three times.
        steps = 3 * num_candidates * self.config.search.refresh_every
        self._count(stage, num_operations * (searched + steps))
        return state

    def _count(self, stage: Stage, evaluations: int) -> None:
        """Note (operation, mapping, chip) triples that a method's search has costed."""
        counts = self.notes.setdefault("evaluations", {})
        counts[stage.method] = counts.get(stage.method, 0) + evaluations

    def _log(self, stage: Stage, epoch: int) -> None:
        """One line of metrics.jsonl: means over an epoch's steps, and the chip and bits at its end."""
        seen, self.epoch_metrics = self.epoch_metrics, []
        means = {name: float(np.mean([metrics[name] for metrics in seen])) for name in seen[0]}
        record: dict[str, Any] = {
            "method": stage.method,
            "stage": stage.name,
            "epoch": self._epoch(stage) + epoch,
        } | means
        record |= {new: means[old] * scale for old, (new, scale) in _CURVES.items() if old in means}
        state = self.states["current"]
        if stage.phase.learn_bits:
            precision = state.precision
            record["bits_mean"] = mean_bits(describe_bits(self.task.workload, precision.bits(), precision.names))
        if stage.phase.learn_chip:
            record["chip"] = {n: float(self.task.space.variables[n].value(raw)) for n, raw in state.design.items()}
        if stage.phase.train:
            record["validation_accuracy"] = self._evaluate(stage.phase.quantised, "validation").accuracy
        rundir.append_metrics(self.directory, record)

    def _epoch(self, stage: Stage) -> int:
        """Epochs of the same method before a stage; of several tries, which all start at zero, one counts."""
        earlier = [s for s in self.stages[: self.stages.index(stage)] if s.method == stage.method]
        tries = [s.epochs for s in earlier if s.finish == "try"]
        if stage.finish == "try":
            return 0
        return sum(tries[:1]) + sum(s.epochs for s in earlier if s.finish != "try")

    def _evaluate(self, quantised: bool, split: str) -> Metrics:
        """Loss and accuracy of the current network on a split."""
        state, examples = self.states["current"], getattr(self.dataset, split)
        if not quantised:
            return evaluate(self.task.forward, state.params, state.rest, examples)
        groups = (state.params, state.precision, state.quant_state)
        return evaluate(self.task.quantised_evaluation, groups, state.rest, examples)

    def _calibrate(self, stage: Stage, key: jax.Array) -> None:
        """Fit formats to the pretrained network."""
        state = self._with_formats(self.states["current"], initial_rule(self.config.precision))
        self.states = dict.fromkeys(self.states, state)

    def _with_formats(self, state: State, rule: LayerRule) -> State:
        """The state with formats of one rule for every layer, fitted to its network as it stands."""
        precision, quant_state = calibrate(self.task.forward, state.params, state.rest, self.dataset, rule)
        return dataclasses.replace(state, precision=precision, quant_state=quant_state)

    def _try(self, stage: Stage, key: jax.Array) -> None:
        """Keep the state of one try, with what it is chosen by: validation accuracy and what it pays for."""
        state = self.states["current"]
        cost = penalised(self.task, stage.phase, state, state.precision.bits())
        tried = self.notes.setdefault("tries", {}).setdefault(stage.method, [])
        self.states[f"try {len(tried)}"] = state
        accuracy = self._evaluate(True, "validation").accuracy
        tried.append({"weight": stage.phase.weight, "validation_accuracy": accuracy, "cost": cost})

    def _legalise(self, stage: Stage, key: jax.Array) -> None:
        """Pin the chip to its grain, search mappings anew, polish; note what each did to the EDP."""
        state, task = self.states["current"], self.task
        bits = state.precision.bits()
        last = state_edp(task, state, bits)
        options = self._search_options()
        legal = evaluate_chip(
            legal_chip(task.space, state.design), *self._work(bits), jax.random.fold_in(key, 0), task.workload.labels,
            start=state.mappings, prices=state.prices, **options,
        )  # fmt: skip
        polished = polish(task.space, legal, *self._work(bits), task.budgets, jax.random.fold_in(key, 1), **options)
        self._count(stage, polished.evaluations)
        self.notes[stage.method] = {
            "chip": physical_values(polished.chip),
            "gap": float(legal.cost.edp) / last - 1.0,
            "gap_polished": float(polished.cost.edp) / last - 1.0,
            "over_budget": {
                name: float(getattr(polished.cost, name)) / limit - 1.0
                for name, limit in task.budgets.items()
                if float(getattr(polished.cost, name)) > limit * (1 + 1e-6)  # float32
            },
        }
        mappings = replace_best(state.mappings, polished.candidates)
        self.states["current"] = dataclasses.replace(state, mappings=mappings, prices=polished.prices)

    def _report(self, stage: Stage, key: jax.Array) -> None:
        """Accuracy, cost and design of a finished method."""
        state, method = self.states["current"], stage.method
        note = self.notes.get(method, {})
        if stage.phase.quantised:
            chip = with_values(self.task.space.base, {n: jnp.asarray(v) for n, v in note.get("chip", {}).items()})
            bits = state.precision.bits()
        else:
            chip, bits = float_sibling(self.task.space.base), jnp.full((len(state.precision.names), 4), 32.0)
        start = (state.mappings, state.prices) if "chip" in note else (None, None)
        accuracy = {s: self._evaluate(stage.phase.quantised, s).accuracy for s in ("validation", "test")}
        if method == "joint":
            write_network(self.directory / rundir.NETWORK, state.params, state.rest, state.precision)
        gaps = {name: value for name, value in note.items() if name != "chip"}
        self.results[method] = {
            "method": method, "accuracy": accuracy["test"], "validation_accuracy": accuracy["validation"], **gaps,
            **self._judged(chip, bits, key, *start),
        }  # fmt: skip

    def _judged(self, chip: Chip, bits: jax.Array, key: jax.Array, start=None, prices=None) -> dict[str, Any]:
        """The evaluation that every method is judged by: one training step, and one inference of one sample."""
        options = self._search_options()
        options["evaluations"] *= _FINAL_EFFORT
        workload, single = self.task.workload, self.single
        found = evaluate_chip(chip, *self._work(bits), key, workload.labels, start=start, prices=prices, **options)
        # Mappings of a step of one sample hold for its forward pass alone, the first operations of it.
        operation_bits, tensor_bits = single.operation_bits(bits), single.tensor_bits(bits)
        alone = evaluate_chip(
            chip, single.step, operation_bits, tensor_bits, key, single.labels,
            **options | {"tables": make_tables(single.step.operations)},
        )  # fmt: skip
        return summarise(workload, found, bits, self.states["current"].precision.names) | {
            "inference": describe_cost(inference_cost(single, alone, bits))
        }

    def result(self) -> dict[str, Any]:
        """Everything the report shows."""
        if "random" in self.config.baselines.include and "random" not in self.results:
            self.results["random"] = self._random()
        rows = {name: self.results[name] for name in METHODS if name in self.results}
        joint = rows["joint"]
        for name in rows.keys() - {"joint"}:
            rows[name] = rows[name] | {"against_joint": compare(rows[name], joint)}
        hidden = ("figures", "mappings", "chip", "bits", "samples", "operations", "explanations")
        return {
            "title": f"{self.config.model.name} on {self.dataset.name}, co-designed",
            "config": config_to_dict(self.config),
            "summary": [{key: value for key, value in row.items() if key not in hidden} for row in rows.values()],
            "design": {
                "chip": joint["chip"], "bits": joint["bits"], "training_step": _only(joint, (*_COST_KEYS, "accuracy")),
                "inference": _only(joint["inference"], _COST_KEYS), "mappings": joint["mappings"],
            },
            "operations": joint["operations"],
            "explanations": joint["explanations"],
            "figures": {
                "accuracy_energy": {"points": [
                    _only(row, ("energy_uj", "accuracy")) | {"label": name, "interval": row["intervals"]["energy_uj"]}
                    for name, row in rows.items()
                ]},
                "bits_per_layer": {"table": joint["bits"]},
                "energy_breakdown": joint["figures"]["energy_breakdown"],
                "roofline": joint["figures"]["roofline"],
                "area_breakdown": {
                    "areas": {name: row["figures"]["area"] for name, row in rows.items()},
                    "intervals": {name: row["intervals"]["area_mm2"] for name, row in rows.items()},
                },
            },
            "notes": self._assumptions(),
            "seconds": self.notes.get("seconds", {}),
            "tries": self.notes.get("tries", {}),
            "evaluations": self.notes.get("evaluations", {}),
        }  # fmt: skip

    def _random(self) -> dict[str, Any]:
        """The random baseline: chips drawn for the network and bits that the joint search found."""
        bits = read_bits(self.results["joint"]["bits"])
        key = jax.random.fold_in(self.key, 2_000_000)
        options = self._search_options()
        per_chip = 3 * options["evaluations"] * len(self.task.workload.names)  # three rounds from scratch
        num = self.config.baselines.random_chips or -(-self.notes["evaluations"]["joint"] // per_chip)
        best = random_chips(self.task.space, *self._work(bits), self.task.budgets, key, num, **options)
        judged = self._judged(best.chip, bits, key, best.candidates, best.prices)
        accuracy = _only(self.results["joint"], ("accuracy", "validation_accuracy"))
        self.notes["evaluations"]["random"] = best.evaluations
        return {"method": "random", **accuracy, **judged}

    def _assumptions(self) -> list[str]:
        """What a reader must know to judge the numbers."""
        task, technology = self.task, self.task.space.base.technology
        over = [
            f"The joint design exceeds its {name} budget by {excess:.1%}: no design inside all budgets was found."
            for name, excess in self.results["joint"].get("over_budget", {}).items()
        ]
        return [
            *over,
            f"Costs are of one training step of {task.workload.batch} samples ({self.config.train.optimizer}, float32 "
            f"master weights), modelled, not measured on silicon: {technology.node_nm:g} nm, {technology.dram}.",
            f"Budgets: {describe_budgets(task.budgets)}. EDP of a step is its energy times its latency, leakage and DRAM included.",
            "Accuracies are of the test set, which nothing was chosen on; every method had the same number of training "
            "steps after the same float32 pretraining.",
            "gap: EDP of the buildable chip, mappings searched anew, over that of the last iterate, before polishing.",
        ]

    def _work(self, bits: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """The training step with the widths that bits (P, 4) give its operands and tensors."""
        workload = self.task.workload
        return workload.step, workload.operation_bits(bits), workload.tensor_bits(bits)

    def _search_options(self) -> dict[str, Any]:
        task = self.task
        return {
            "slots": task.slots, "tables": task.tables, "evaluations": task.evaluations, "num_best": task.num_candidates,
        }  # fmt: skip


def _only(row: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: row[key] for key in keys}
