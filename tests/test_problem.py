"""Models by name, what a user's own factory may get wrong, and chips with a user's own numbers."""

import sys

import pytest

from codesign import config
from codesign.config import ChipConfig, Config, DataConfig
from codesign.design import DEFAULT_VARIABLES, physical_values
from codesign.inspection import model_workload
from codesign.problem import design_space, load_chip, load_model, load_tasks
from nets.dataset_files import load_dataset
from nets.models import MODELS

MODULE = """
from flax import nnx


class Net(nnx.Module):
    def __init__(self, inputs, outputs):
        self.dense = nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return self.dense(images.reshape(images.shape[0], -1))


class Switched(Net):
    def __call__(self, images, train):
        return super().__call__(images)


class Named(Net):
    def __call__(self, images):
        return {"logits": super().__call__(images)}


good = lambda shape, classes, seed: Net(64, classes)
narrow = lambda shape, classes, seed: Net(64, 7)
mismatched = lambda shape, classes, seed: Net(63, classes)
switched = lambda shape, classes, seed: Switched(64, classes)
named = lambda shape, classes, seed: Named(64, classes)
fewer = lambda shape: Net(64, 10)
number = 3


def broken(shape, classes, seed):
    raise RuntimeError("no such file")


def nothing(shape, classes, seed):
    return None
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    (tmp_path / "strangers_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers_net", raising=False)
    digits = load_dataset("digits")
    return lambda name: load_model(f"strangers_net:{name}", digits, 0)


def test_a_good_model_loads(load):
    assert load("good").dense.kernel.shape == (64, 10)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("narrow", r"logits of shape \(2, 10\) for 2 images of digits, got \(2, 7\)"),
        ("named", "logits of shape .* got dict"),
        ("mismatched", r"takes images \(2, 8, 8, 1\) and nothing else, got TypeError"),
        ("switched", "takes images .* got TypeError: .*train"),
        ("fewer", "to return a model, got TypeError"),
        ("number", "to return a model, got TypeError"),
        ("broken", "to return a model, got RuntimeError: no such file"),
        ("nothing", "expected a flax.nnx.Module, got NoneType"),
        ("absent", "has no attribute 'absent'"),
    ],
)
def test_what_a_factory_gets_wrong_is_told_in_one_line(load, name, told):
    with pytest.raises(ValueError, match=told) as caught:
        load(name)
    assert str(caught.value).startswith(f"model.name 'strangers_net:{name}'") and "\n" not in str(caught.value)


def test_a_node_between_two_whole_ones_is_kept():
    assert load_chip(ChipConfig(node_nm=27.5)).technology.node_nm == 27.5


def test_a_chip_outside_the_usual_ranges_is_where_the_search_starts():
    chip = load_chip(ChipConfig(rows=100, vdd=0.45))
    space = design_space(chip, ("rows", "vdd", "columns"))
    assert space.variables["rows"].high == 100 and space.variables["vdd"].low == pytest.approx(0.45)
    assert space.variables["columns"] == DEFAULT_VARIABLES["columns"]
    values = physical_values(space.chip(space.initial()))  # a hundredth of the range inside
    assert values["rows"] == pytest.approx(100, rel=0.05) and values["vdd"] == pytest.approx(0.45, abs=0.011)


def test_the_settings_know_all_models():
    assert set(config.MODELS) == set(MODELS)


def test_a_batch_larger_than_memory_is_traced():
    assert model_workload("mlp", "digits", 10**9).batch == 10**9


def test_more_samples_of_a_writer_than_there_are_name_the_settings():
    settings = Config(data=DataConfig(writer=3, writer_samples=400))
    with pytest.raises(ValueError, match=r"^data.writer 3, data.writer_samples 400 \(40 of each class\): expected"):
        load_tasks(settings)
