"""The guides run as they are written: a block that begins with a file name is that file; commands, then the others, follow it."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from codesign import cli
from codesign.config import load_config
from hw.chips import CHIPS
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.training import cross_entropy, split_model

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def run_guide(tmp_path, monkeypatch, capsys):
    """Runs a guide in an empty directory; returns what its command and its blocks printed."""

    def run(name, with_commands=True, given=None):
        text = (DOCS / name).read_text(encoding="utf-8")
        found = re.findall(r"^```(?:python|yaml)\n(# (\w+\.(?:py|yaml))\n)?(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for _, file, block in found:
            if file:
                (tmp_path / file).write_text(block, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        commands = re.findall(r"^python -m codesign (.*?)(?: +#.*)?$", text, re.MULTILINE)
        for command in commands if with_commands else ():
            assert cli.main(command.split()) == 0, command
        told, namespace = capsys.readouterr().out, {} if given is None else given
        namespace["__name__"] = "guide"
        for _, file, block in found:
            if file.endswith(".yaml"):
                load_config(tmp_path / file)
            elif not file:
                exec(compile(block, name, "exec"), namespace)
        return told, capsys.readouterr().out

    return run


def test_own_data(run_guide):
    told, output = run_guide("own-data.md")
    assert "One training step of lenet, batch 16" in told and "weight_grad" in told
    assert output == "48 4 4\n"  # six users of eight samples train; of the other's eight two of each class adapt


@pytest.mark.slow
def test_own_model(run_guide):
    told, output = run_guide("own-model.md")
    assert "depthwise" in told and "weight_grad" in told
    assert "000-hidden-forward.yaml 6144" in output  # 16 samples, 12 inputs, 32 outputs
    costed = re.findall(r"^(.*): [\d.e-]+ µJ, [\d.e-]+ µs$", output, re.MULTILINE)
    assert costed == ["depthwise, pointwise, dense", "Conv_0, Dense_0", "hidden, out", "layers, layers_2, layers_3"]


def test_exchange(run_guide):
    """Its commands want a finished run or files of others: they run in the tests of each format."""
    pytest.importorskip("onnx", reason="needs the extra 'exchange'")
    _, output = run_guide("exchange.md", with_commands=False)
    assert "'hidden (forward)', 'out (forward)'" in output


def test_tutorial(run_guide):
    told, output = run_guide("tutorial.md")
    assert "One training step of mlp, batch 16" in told
    assert output.splitlines()[0] == "dense1 forward weight_grad"  # as the page says of the first layer


def test_own_chip(run_guide):
    assert run_guide("own-chip.md")[1] == "2.0 times the area of MACs\n"


def test_own_format(run_guide):
    assert run_guide("own-format.md")[1] == "4 True\n"


def test_budgets(run_guide):
    run_guide("budgets.md")


@pytest.mark.slow
def test_arithmetic(run_guide):
    """Its blocks begin with a network, data and a chip of the reader's."""
    digits = load_dataset("digits")
    forward, params, rest = split_model(make_model("lenet", digits.input_shape, digits.num_classes, 0))
    batch = (jnp.asarray(digits.train.images[:32]), jnp.asarray(digits.train.labels[:32]))

    def network(params, images):
        return forward(params, rest, images, None, False)[0]

    given = {
        "forward": forward, "params": params, "rest": rest, "dataset": digits, "batch": batch, "images": batch[0],
        "network": network, "fn": lambda params, images, labels: (network(params, images), labels),
        "loss_of_the_result": lambda result: cross_entropy(*result), "chip": CHIPS["edge_trainer"](),
        "key": jax.random.key(0),
    }  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):
        run_guide("arithmetic.md", given=given)
    assert given["precision"].names == given["state"].precision.names == ("conv1", "conv2", "dense1", "dense2")
    assert given["bits"].shape == (4, 4) and given["work"].shape == (4, 3, 2)
    assert float(given["found"].cost.energy) > 0


def test_no_page_with_code_is_left_out():
    """One whose blocks run has a test here, but for `schedule.md`, of which `tests/test_cores.py` takes care."""
    pages = {
        path.name for path in DOCS.rglob("*.md") if re.search("^```(python|yaml)$", path.read_text(), re.MULTILINE)
    }
    tested = set(re.findall(r'run_guide\("([\w-]+\.md)"', Path(__file__).read_text(encoding="utf-8")))
    assert pages == tested | {"schedule.md"}


def test_every_page_is_reached():
    """What the site's navigation leaves out, nobody finds; pages that it names exist."""
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(named) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!#|http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the site needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "hw.html").read_text(encoding="utf-8")
    assert "make_chip" in page and "fonts.googleapis" not in page
