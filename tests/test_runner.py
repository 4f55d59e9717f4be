"""A whole run at reduced size: what it writes, that its design can be read back, killed runs, refusals."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign import rundir, runner
from codesign.config import (
    BaselinesConfig,
    Config,
    ModelConfig,
    ObjectiveConfig,
    SearchConfig,
    TrainConfig,
    load_config,
)
from codesign.design import with_values
from codesign.problem import make_task
from codesign.progress import NullProgress
from codesign.run_export import export_run
from codesign.summary import chip_values, read_bits, read_mapping
from codesign.timeloop_designs import read_timeloop_design
from hw.accesses import count
from hw.operation import stack_operations
from hw.schedule import evaluate_step
from nets.dataset_files import load_dataset

CONFIG = Config(
    model=ModelConfig("mlp"),
    train=TrainConfig(pretrain_epochs=1, epochs=2, finetune_epochs=1),
    search=SearchConfig(candidates=2, evaluations=64, refresh_every=6),
    objective=ObjectiveConfig(cost_weights=(0.1,)),
    baselines=BaselinesConfig(include=("uniform8", "sequential"), sequential_weights=(0.1,)),
)


class Kills(NullProgress):
    """Copies the run directory as it is on the disk when a step of a stage has been taken: what a kill there leaves."""

    def __init__(self, directory, copies, points):
        self.directory, self.copies, self.points = directory, copies, points

    def stage(self, name):
        self.name, self.done = name, 0

    def advance(self, steps=1, **metrics):
        self.done += steps
        if self.points.get(self.name) == self.done:
            shutil.copytree(self.directory, self.copies / self.name.replace("/", "-"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run, its result, and copies from two moments on the way."""
    directory, copies = (tmp_path_factory.mktemp(name) for name in ("run", "copies"))
    kills = Kills(directory, copies, {"joint/weight 0.1": 13, "sequential/chip": 13})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_CHECKPOINT_STEPS", 5)
        result = runner.run(CONFIG, directory, progress=kills)
    return directory, result, copies


def test_every_file_is_there(finished):
    directory, result, _ = finished
    for name in (rundir.CONFIG, rundir.METRICS, rundir.DESIGN, rundir.RESULT, rundir.REPORT, "checkpoints"):
        assert (directory / name).exists(), name
    assert load_config(directory / rundir.CONFIG) == CONFIG
    assert rundir.read_result(directory) == rundir.plain(result, finite=True)
    figures = {path.stem for path in (directory / "figures").glob("*.svg")}
    assert figures >= {"training_curves", "accuracy_energy", "bits_per_layer", "energy_breakdown", "roofline"}
    report = (directory / rundir.REPORT).read_text()
    assert report.count("<svg") >= len(figures) and all(row["method"] in report for row in result["summary"])


def test_methods_and_their_rows(finished):
    _, result, _ = finished
    rows = {row["method"]: row for row in result["summary"]}
    assert set(rows) == {"joint", "uniform8", "sequential"}
    for row in rows.values():
        assert all(
            np.isfinite(row[key]) and row[key] > 0 for key in ("energy_uj", "latency_ms", "area_mm2", "power_mw")
        )
        # uJ ms is 1e-9 J s; uJ / ms is mW.
        assert row["edp_js"] == pytest.approx(row["energy_uj"] * row["latency_ms"] * 1e-9, rel=1e-6)
        assert row["power_mw"] == pytest.approx(row["energy_uj"] / row["latency_ms"], rel=1e-4)
        assert sum(row["energy_by_component_uj"].values()) == pytest.approx(row["energy_uj"], rel=1e-4)
        assert row["accuracy"] > 0.3  # guessing is right in a tenth
    assert rows["uniform8"]["bits_mean"] == 8
    # The default budget is the area of the base chip, which uniform8 has.
    assert rows["joint"]["area_mm2"] <= rows["uniform8"]["area_mm2"] * (1 + 1e-6)
    assert rows["joint"]["edp_js"] < rows["uniform8"]["edp_js"]
    assert {"gap", "gap_polished"} <= set(rows["joint"]) and {"gap", "gap_polished"} <= set(rows["sequential"])
    assert rows["joint"]["gap_polished"] <= rows["joint"]["gap"]


def test_breakdown_of_the_figure_adds_up_to_the_energy(finished):
    _, result, _ = finished
    joint = next(row for row in result["summary"] if row["method"] == "joint")
    figure = result["figures"]["energy_breakdown"]
    energy = np.asarray(figure["energy_j"])
    assert energy.shape == (len(figure["layers"]), len(figure["passes"]), len(figure["components"]))
    assert energy.sum() == pytest.approx(joint["energy_uj"] * 1e-6, rel=1e-4)
    by_component = dict(zip(figure["components"], energy.sum(axis=(0, 1)), strict=True))
    assert by_component == pytest.approx({k: v * 1e-6 for k, v in joint["energy_by_component_uj"].items()}, rel=1e-4)


def test_metrics_have_every_epoch_of_every_stage(finished):
    directory, *_ = finished
    records = rundir.read_metrics(directory)
    epochs = {}
    for record in records:
        epochs.setdefault(record["stage"], []).append(record["epoch"])
    assert epochs == {
        "pretrain": [1],
        "joint/weight 0.1": [1, 2],
        "joint/finetune": [3],  # of tries beside each other one counts
        "uniform8": [1, 2, 3],
        "sequential/bits 0.1": [1, 2],
        "sequential/chip": [3, 4],
        "sequential/finetune": [5],
    }
    joint = [record for record in records if record["stage"] == "joint/weight 0.1"]
    assert all(set(record["chip"]) >= {"rows", "columns", "vdd"} and record["energy_uj"] > 0 for record in joint)
    assert all("validation_accuracy" in record for record in records if record["stage"] != "sequential/chip")


def test_design_is_read_back_and_costs_the_same(finished):
    """design.yaml holds all that was built: its chip, bits and mappings give the step's cost again."""
    directory, result, _ = finished
    design = rundir.read_design(directory / rundir.DESIGN)
    task, _ = make_task(CONFIG, load_dataset("digits"))
    chip = with_values(task.space.base, chip_values(design["chip"]))
    assert float(chip.area().total) * 1e6 == pytest.approx(design["chip"]["area_mm2"], rel=1e-5)
    bits = read_bits(design["bits"])
    assert list(design["bits"]) == ["dense1", "dense2", "dense3"]
    assert "input_grad" not in design["bits"]["dense1"]  # nothing trainable lies below the first layer
    widths = bits[~jnp.isnan(bits)]
    assert float(widths.min()) >= CONFIG.precision.min_bits and float(widths.max()) <= CONFIG.precision.max_bits

    workload = task.workload
    mappings = stack_operations([read_mapping(design["mappings"][name], chip.names) for name in workload.labels])
    accesses = jax.jit(jax.vmap(count))(workload.step.operations, mappings)
    cost = jax.jit(evaluate_step)(
        chip, workload.step, accesses, workload.operation_bits(bits), workload.tensor_bits(bits),
        jnp.ones((len(workload.labels), 2)),
    )  # fmt: skip
    assert float(jnp.sum(cost.violation)) == 0.0
    assert float(cost.energy) * 1e6 == pytest.approx(design["training_step"]["energy_uj"], rel=1e-5)
    assert float(cost.latency) * 1e3 == pytest.approx(design["training_step"]["latency_ms"], rel=1e-5)
    joint = next(row for row in result["summary"] if row["method"] == "joint")
    assert design["training_step"]["edp_js"] == pytest.approx(joint["edp_js"], rel=1e-6)
    assert design["inference"]["energy_uj"] < design["training_step"]["energy_uj"] / 2


def outcome(directory):
    """What a run wrote, without how long it took."""
    result = json.loads((directory / rundir.RESULT).read_text())
    del result["seconds"]
    return result, rundir.read_metrics(directory), rundir.read_design(directory / rundir.DESIGN)


@pytest.mark.parametrize(
    ("killed", "kept"),
    [("sequential-chip", 10), pytest.param("joint-weight 0.1", 10, marks=pytest.mark.slow)],
)
def test_killed_run_resumes_to_the_same_end(finished, killed, kept):
    """Three steps after a checkpoint in the middle of a stage, and of an epoch."""
    directory, _, copies = finished
    copy = copies / killed
    assert not (copy / rundir.RESULT).exists()
    told = Told()
    runner.run(CONFIG, copy, resume=True, progress=told)
    assert told.resumed[killed.replace("-", "/")] == kept
    assert outcome(copy) == outcome(directory)


class Told(NullProgress):
    """Notes how many steps of each stage had been done in the run before."""

    def __init__(self):
        self.resumed = {}

    def stage(self, name):
        self.name = name

    def advance(self, steps=1, **metrics):
        self.resumed.setdefault(self.name, steps)


def test_directory_of_another_config_is_refused(finished):
    directory, *_ = finished
    before = outcome(directory)
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=1))
    with pytest.raises(ValueError, match=r"belongs to another config .*; resume it without changed settings"):
        runner.run(other, directory, resume=True)
    assert outcome(directory) == before


def test_nan_in_the_data_stops_at_that_step_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    good = runner.batches

    def poisoned(*args, **options):
        for i, (images, labels) in enumerate(good(*args, **options)):
            yield (np.full_like(images, np.nan) if i == 6 else images), labels

    monkeypatch.setattr(runner, "_CHECKPOINT_STEPS", 5)
    monkeypatch.setattr(runner, "batches", poisoned)
    with pytest.raises(ValueError) as error:
        runner.run(CONFIG, tmp_path)
    message = str(error.value)
    assert message.startswith("loss in pretrain, step 6: expected a finite number, got nan; lower train.learning_rate")
    assert "\n" not in message
    assert (tmp_path / "checkpoints" / "5").is_dir() and not (tmp_path / rundir.RESULT).exists()


def test_exports_of_a_run(finished, tmp_path):
    """The graph classifies as the report says; every operation has its design, every epoch its scalars."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'dev'")
    pytest.importorskip("tensorboardX", reason="needs the extra 'exchange'")
    directory, result, _ = finished
    digits = load_dataset("digits").test
    (path,) = export_run(directory, "onnx", tmp_path / "network.onnx", samples=len(digits.labels))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": digits.images})
    assert np.mean(logits.argmax(axis=1) == digits.labels) == pytest.approx(result["summary"][0]["accuracy"], abs=1e-6)

    designs = export_run(directory, "timeloop", tmp_path / "designs")
    assert len(designs) == len(result["operations"])
    for design, mapping in zip(designs, result["design"]["mappings"].values(), strict=True):
        _, written = read_timeloop_design(design)
        chex.assert_trees_all_equal(written, read_mapping(mapping, ("register", "local", "shared", "dram")))

    folders = export_run(directory, "tensorboard", tmp_path / "scalars")
    stages = [record["stage"] for record in rundir.read_metrics(directory)]
    assert [folder.name for folder in folders] == [stage.replace("/", ".") for stage in dict.fromkeys(stages)]
    assert all(list(folder.glob("events.*")) for folder in folders)
    with pytest.raises(ValueError, match="expected an empty folder"):
        export_run(directory, "tensorboard", tmp_path / "scalars")

    (layers,) = export_run(directory, "csv", tmp_path / "layers.csv")
    assert len(layers.read_text().splitlines()) == 1 + len(designs)
