"""The guides run as they are written: the first block is the file it names, the command and the other blocks follow it."""

import re
from pathlib import Path

import pytest

from codesign import cli

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def run_guide(tmp_path, monkeypatch, capsys):
    """Runs a guide in an empty directory; returns what its command and its blocks printed."""

    def run(name, with_commands=True):
        text = (DOCS / name).read_text(encoding="utf-8")
        module, *blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        (tmp_path / module.splitlines()[0].removeprefix("# ")).write_text(module, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        commands = re.findall(r"^python -m codesign (.*?)(?: +#.*)?$", text, re.MULTILINE)
        for command in commands if with_commands else ():
            assert cli.main(command.split()) == 0, command
        told, namespace = capsys.readouterr().out, {"__name__": "guide"}
        for block in blocks:
            exec(compile(block, name, "exec"), namespace)
        return told, capsys.readouterr().out

    return run


def test_own_data(run_guide):
    told, output = run_guide("own-data.md")
    assert "One training step of lenet, batch 16" in told and "weight_grad" in told
    assert output == "48 4 4\n"  # six users of eight samples train; of the other's eight two of each class adapt


def test_exchange(run_guide):
    """Its commands want a finished run or files of others: they run in the tests of each format."""
    pytest.importorskip("onnx", reason="needs the extra 'exchange'")
    _, output = run_guide("exchange.md", with_commands=False)
    assert "'hidden (forward)', 'out (forward)'" in output
