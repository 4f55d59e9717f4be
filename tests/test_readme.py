"""The examples of README.md work as they are written."""

import re
from pathlib import Path

import pytest

from codesign import cli
from codesign.config import load_config

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory that can be imported from, with the first Python block as the file that it names."""
    model = blocks("python")[0]
    (tmp_path / model.splitlines()[0].removeprefix("# ")).write_text(model, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_python_blocks_run(folder, capsys):
    _, script = blocks("python")
    exec(compile(script, "README.md", "exec"), {"__name__": "readme"})
    output = capsys.readouterr().out
    assert "conv (weight_grad)" in output and "conv (input_grad)" not in output
    assert re.search(r"[1-9].* µJ, .* µs, .* mm²", output)


def test_own_model_on_the_command_line(folder, capsys):
    assert cli.main(["trace", "--model", "my_net:make_net"]) == 0
    assert "weight_grad" in capsys.readouterr().out


def test_configuration_file_is_valid(folder):
    path = folder / "small.yaml"
    path.write_text(blocks("yaml")[0], encoding="utf-8")
    assert load_config(path).objective.area_mm2 == 0.6


def test_links_lead_to_files():
    root = Path(__file__).parent.parent
    for target in re.findall(r'\]\((?!#|http)([^)#]+)|src="([^"]+)"', README):
        assert (root / "".join(target)).is_file(), target
