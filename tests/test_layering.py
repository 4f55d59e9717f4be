"""The structure of the project: who imports whom, sizes of modules and functions, what the wheel holds."""

import ast
import doctest
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "hw": {"nets", "codesign", "experiments"},
    "nets": {"hw", "codesign", "experiments"},
    "codesign": {"experiments"},
    "experiments": set(),
}
MODULES = sorted(path.relative_to(ROOT) for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))


def parse(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text(), filename=str(module))


def imports(module: Path) -> set[str]:
    """Full names of everything a module imports, inside functions too: `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.parent.parts[: len(module.parent.parts) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, [package, node.module]))
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def functions(module: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parse(module)) if isinstance(node, ast.FunctionDef)]


def lines_without_docstring(function: ast.FunctionDef) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def test_packages_import_only_what_they_may():
    found = [
        f"{module} imports {name}"
        for module in MODULES
        for name in imports(module)
        if name.split(".")[0] in FORBIDDEN[module.parts[0]]
    ]
    assert not found


def test_only_the_walker_touches_the_internals_of_jaxprs():
    assert {str(module) for module in MODULES if "jax.extend.core" in (ROOT / module).read_text()} <= {"nets/jaxpr.py"}
    assert not [f"{module}: {name}" for module in MODULES for name in imports(module) if name.startswith("jax._src")]


def test_no_module_is_a_drawer_for_everything():
    assert not [
        str(module) for module in MODULES if module.stem in ("utils", "util", "common", "helpers", "misc", "_src")
    ]


def test_a_module_and_a_function_beside_it_never_share_a_name():
    stems = {(module.parent, module.stem) for module in MODULES}
    assert not [
        f"{module}: {node.name}"
        for module in MODULES
        for node in parse(module).body
        if isinstance(node, ast.FunctionDef) and (module.parent, node.name) in stems
    ]


def test_modules_have_at_most_500_lines():
    sizes = {str(module): len((ROOT / module).read_text().splitlines()) for module in MODULES}
    assert not {module: size for module, size in sizes.items() if size > 500}


def test_functions_have_at_most_60_lines_beside_their_docstring():
    sizes = {
        f"{module}:{function.lineno} {function.name}": lines_without_docstring(function)
        for module in MODULES
        for function in functions(module)
    }
    assert not {name: size for name, size in sizes.items() if size > 60}


def test_public_functions_of_the_leaves_are_documented():
    missing = [
        f"{module}:{node.lineno} {node.name}"
        for module in MODULES
        if module.parts[0] in ("hw", "nets")
        for node in parse(module).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        if not node.name.startswith("_") and ast.get_docstring(node) is None
    ]
    assert not missing


@pytest.mark.parametrize("module", [str(module) for module in MODULES if module.stem != "__main__"])
def test_examples_in_docstrings_hold(module):
    name = ".".join(Path(module).with_suffix("").parts).removesuffix(".__init__")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_wheel_holds_the_packages_and_their_data(tmp_path):
    """Built from a copy, because a build leaves traces in the tree."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in FORBIDDEN:
        shutil.copytree(ROOT / package, tmp_path / package)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("jax_codesign-*.whl")
    contents = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = ("codesign", "hw", "nets")
    assert {name.split("/")[0] for name in contents} == set(shipped)
    assert {str(module) for module in MODULES if module.parts[0] in shipped} <= contents
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "hw" / "data").glob("*.yaml")}
    assert data <= contents
