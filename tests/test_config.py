"""Settings: what is written is read back, and what is wrong is named in one line."""

import ast
import inspect
from pathlib import Path

import pytest

from codesign import config
from codesign.config import Config, config_from_dict, config_to_dict, dump_config, fingerprint, load_config
from codesign.rundir import read_yaml

CHANGED = {
    "model": {"name": "my_package.nets:make"},
    "data": {"name": "~/mnist", "writer": 3},
    "train": {"epochs": 2, "learning_rate": 1e-05, "augment": False, "optimizer": "sgd"},
    "chip": {"rows": 12, "free": ["vdd"]},
    "objective": {"area_mm2": 2},
    "baselines": {"include": [], "sequential_weights": [0.1, 1]},
    "out": "runs/mine",
}


@pytest.mark.parametrize("data", [{}, CHANGED])
def test_round_trip_through_a_file(tmp_path, data):
    loaded = config_from_dict(data)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(loaded))
    assert load_config(path) == loaded == config_from_dict(config_to_dict(loaded))


def test_values_arrive_with_their_types(tmp_path):
    loaded = config_from_dict(CHANGED)
    assert loaded.objective.area_mm2 == 2.0 and isinstance(loaded.objective.area_mm2, float)
    assert loaded.chip.free == ("vdd",) and loaded.baselines.sequential_weights == (0.1, 1.0)
    assert loaded.train.finetune_epochs == Config().train.finetune_epochs


def test_an_empty_file_is_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_numbers_in_scientific_notation_without_a_dot(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {learning_rate: 1e-3}\n")
    assert load_config(tmp_path / "c.yaml").train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 1}", "unknown key 'trian' in {path}; nearest valid name: 'train'"),
        ("epochs: 1", "unknown key 'epochs' in {path}; nearest valid name: 'train.epochs'"),
        ("train: {epoks: 1}", "unknown key 'train.epoks' in {path}; nearest valid name: 'train.epochs'"),
        ("chip: {batch_size: 1}", "unknown key 'chip.batch_size' in {path}; nearest valid name: 'train.batch_size'"),
        ("train: {epochs: ten}", "train.epochs in {path}: expected a whole number, got 'ten'; the default is 60"),
        ("train: {epochs: true}", "expected a whole number, got True"),
        ("train: {epochs: 1.0}", "expected a whole number, got 1.0"),
        ("train: {epochs: 0}", "train.epochs in {path}: expected a number from 1 to 1e+09, got 0"),
        ("train: {augment: 1}", "expected true or false, got 1"),
        ("train: {optimizer: lamb}", "expected one of sgd, momentum, adam, got 'lamb'; the default is \"adam\""),
        ("train: {optimizer: [adam]}", "expected one of sgd, momentum, adam, got ['adam']"),
        ("train: {learning_rate: .nan}", "expected a finite number, got nan"),
        ("train: {learning_rate: fast}", "expected a finite number, got 'fast'"),
        ("train: {learning_rate: -1}", "got -1.0"),
        ("train: {seed: -1}", "train.seed"),
        ("data: {writer: -1}", "data.writer"),
        ("train: 3", "train in {path}: expected a section of 'key: value' lines, got 3"),
        ("[1, 2]", "the whole file in {path}: expected a section"),
        ("chip: {free: vdd}", "chip.free in {path}: expected a list, got 'vdd'"),
        (
            "chip: {free: [vdd, cols]}",
            "expected one of rows, columns, register_bytes, local_kib, shared_kib, bandwidth, vdd, got 'cols'",
        ),
        ("baselines: {sequential_weights: [0.1, -1]}", "baselines.sequential_weights in {path}: expected a number"),
        ("baselines: {sequential_weights: []}", "baselines.sequential_weights in {path}: empty"),
        ("model: {name: lnet}", "unknown model 'lnet'; nearest valid name: 'lenet'"),
        ("precision: {weights: 14}", "precision.weights in {path}: 14 bits lie outside"),
        ("precision: {min_bits: 1}", "precision.min_bits in {path}: expected a number from 2 to 16, got 1"),
        ("out: 3", "out in {path}: expected text, got 3"),
        ("1: 2", "unknown key '1'"),
        ("train: {epochs: 1, epochs: 2}", "key 'epochs' stands twice in {path}, line 1, column 20"),
        ("train: {epochs: 1", "not valid YAML"),
        ("train: {seed: !!bool maybe}", "not valid YAML: 'maybe'"),
        ("train: {seed: !!timestamp x}", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("train: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
        ("a: &a [x, x, x]\nb: [*a, *a]\ntrain: {seed: [*a, *a]}", "unknown key 'a'"),
        ("'" + "x" * 1000 + "': 1", "unknown key"),
    ],
)
def test_bad_settings_are_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ValueError) as error:
        load_config(path)
    told = str(error.value)
    assert message.replace("{path}", str(path)) in told
    assert "\n" not in told and len(told) < 600


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no such file: no/where\.yaml; check the path"):
        load_config(Path("no/where.yaml"))


def test_every_setting_is_explained_on_the_command_line():
    """The text below a field is what --help shows; a field without one would be blank there."""
    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "Config":
            assert ast.get_docstring(node), node.name
            for field, text in zip(node.body[1::2], node.body[2::2], strict=True):
                assert isinstance(field, ast.AnnAssign) and isinstance(text.value, ast.Constant), node.name


def test_fingerprint_follows_settings_and_not_the_place():
    loaded = config_from_dict(CHANGED)
    assert fingerprint(loaded) == fingerprint(config_from_dict({**CHANGED, "out": "elsewhere"}))
    assert fingerprint(loaded) != fingerprint(config_from_dict({**CHANGED, "train": {"epochs": 3}}))


def test_aliases_cannot_blow_up(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    (tmp_path / "bomb.yaml").write_text("train:\n  epochs: &e\n" + "\n".join("    " + line for line in lines))
    with pytest.raises(ValueError, match="expected a whole number"):
        load_config(tmp_path / "bomb.yaml")
    assert read_yaml(tmp_path / "bomb.yaml")["train"]["epochs"]["a0"] == ["x", "x"]
