"""The wheel, installed into an environment of its own, works outside the checkout.

Dependencies are lent by the environment of the tests, so that no package index is needed; CONTRIBUTING.md has the check
with one.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = """\
model: {name: mlp}
train: {pretrain_epochs: 1, epochs: 1, finetune_epochs: 1}
search: {candidates: 2, evaluations: 32, refresh_every: 6}
objective: {cost_weights: [0.1]}
baselines: {include: [float32]}
"""

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """An environment in which the wheel is installed and nothing else, dependencies lent: its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes beside what it builds
    for name in ("codesign", "hw", "nets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    built = call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    assert built.returncode == 0, built.stderr
    shutil.rmtree(source)
    environment = folder / "environment"
    made = call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("jax_codesign-*.whl")
    options = ("--python", environment / "bin" / "python", "install", "--no-deps", "--no-index")
    installed = call(*pip, *options, wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    lent = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(lent))
    return environment


def test_commands_outside_the_checkout(fresh, tmp_path):
    where = call(fresh / "bin" / "python", "-c", "import codesign, hw, nets; print(codesign, hw, nets)", cwd=tmp_path)
    assert where.stdout.count(str(fresh)) == 3, where
    program = fresh / "bin" / "jax-codesign"
    told = call(program, "run", "--help", cwd=tmp_path)
    assert told.returncode == 0 and "--train.epochs" in told.stdout
    costed = call(program, "cost", "--model", "mlp", "--evaluations", "32", "--json", cwd=tmp_path)
    assert costed.returncode == 0, costed.stderr
    assert json.loads(costed.stdout)["training_step"]["energy_uj"] > 0
    (tmp_path / "tiny.yaml").write_text(TINY)
    ran = call(program, "run", "--config", "tiny.yaml", "--out", "tiny", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "<svg" in (tmp_path / "tiny" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["hw", "nets"])
def test_a_foreign_package_is_named(fresh, tmp_path, name):
    """As where another distribution, installed later, has written a package of that name over ours."""
    (packages,) = fresh.glob("lib/python*/site-packages")
    ours = (packages / name / "__init__.py").read_text(encoding="utf-8")
    try:
        (packages / name / "__init__.py").write_text("")
        told = call(fresh / "bin" / "jax-codesign", "chips", cwd=tmp_path)
    finally:
        (packages / name / "__init__.py").write_text(ours)
    assert told.returncode != 0
    assert f"expected the package '{name}' of jax-codesign" in told.stderr and "reinstall" in told.stderr
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")  # where the command is run, nothing is taken for ours
    assert call(fresh / "bin" / "jax-codesign", "chips", cwd=tmp_path).returncode == 0
