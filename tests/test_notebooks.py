"""The notebooks run from top to bottom at reduced size; a cell's last expression is shown, as Jupyter does."""

import ast
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "experiments" / "notebooks"


class Notebook:
    """A notebook being executed in a module of its own, which is `__main__` meanwhile, as in a kernel.

    Attributes:
      module: what its cells have defined.
      shown: rich representations of what they showed, in order.
    """

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cells = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
        self.module = ModuleType("__main__")
        self.shown: list[str] = []
        monkeypatch.setitem(sys.modules, "__main__", self.module)

    def run(self, **parameters: object) -> None:
        """Run all code cells, with other values for names that the cell tagged "parameters" defines."""
        for cell in self.cells:
            if cell["cell_type"] == "code":
                self._run_cell("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                assert parameters.keys() <= vars(self.module).keys()
                vars(self.module).update(parameters)

    def _run_cell(self, source: str) -> None:
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "notebook", "exec"), vars(self.module))
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "notebook", "eval"), vars(self.module))
            names = [name for name in ("_repr_html_", "_repr_svg_") if hasattr(value, name)]
            self.shown += [getattr(value, name)() for name in names]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.slow
def test_quickstart(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notebook = Notebook("quickstart.ipynb", monkeypatch)
    with jax.numpy_dtype_promotion("standard"):  # a reader's JAX is as it comes; optax's Adam needs it
        notebook.run(epochs=2, evaluations=64)
    table, *pictures = notebook.shown
    assert "dense1" in table and len(pictures) == 4 and all("<svg" in picture for picture in pictures)
    made = vars(notebook.module)
    assert made["losses"][-1] < made["losses"][0]
    assert made["narrow"].energy < made["cost"].energy
    assert [row["method"] for row in made["result"]["summary"]] == ["joint", "uniform8"]
    output = capsys.readouterr().out
    assert output.count("% right") == 2
    assert (made["directory"] / "report.html").is_file()


@pytest.mark.slow
def test_explore_chip(monkeypatch, capsys):
    notebook = Notebook("explore_chip.ipynb", monkeypatch)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # a reader's JAX is as it comes
        notebook.run(evaluations=64, points=4)
    chip, cost, picture = notebook.shown
    assert "<table" in chip and "<table" in cost and "<svg" in picture
    made = vars(notebook.module)
    energy, latency, area, violation = made["swept"].T
    fits, front, shown = made["fits"], made["front"], made["shown"]
    assert len(energy) == 16 and all((x > 0).all() for x in (energy, latency, area)) and (violation[fits] == 0).all()
    beaten = {
        i for i in fits if any((energy[j] <= energy[i]) & (latency[j] <= latency[i]) & (j != i) for j in fits)
    }  # fmt: skip
    assert set(front) == set(fits) - beaten and 1 < len(front) < len(fits)  # both sizes and supplies are traded off
    low, high = np.transpose(made["bars"])
    assert (low < energy[shown]).all() and (energy[shown] < high).all()
    assert f"{len(front)} of them are beaten by none" in capsys.readouterr().out
