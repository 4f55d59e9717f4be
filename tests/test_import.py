"""`import codesign` is light, and refuses foreign packages of the same names."""

import subprocess
import sys

import pytest

import codesign


def test_import_is_light_and_checks_its_neighbours(monkeypatch, tmp_path):
    script = "import sys, codesign; assert 'jax' not in sys.modules; codesign.trace; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert set(codesign.__all__) <= set(dir(codesign))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        codesign.nothing  # noqa: B018
    foreign = tmp_path / "__init__.py"
    foreign.write_text("")
    monkeypatch.setattr(codesign, "find_spec", lambda name: type("Spec", (), {"origin": str(foreign)}))
    with pytest.raises(ImportError, match="'hw'"):
        codesign._check_packages()
