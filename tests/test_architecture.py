"""The house of design.md: who may import whom, what stays light, and that nothing of one machine is written down.

Files are parsed, not imported, so an import inside a function counts as one at the top does.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]

# What a folder may import of ours, itself aside: a package allows all its modules.
ALLOWED = {
    "engines": set(),
    "runtime": {"engines"},
    # What has to be one and the same.
    "agvas": {"runtime.command_line", "runtime.masking", "runtime.preprocess", "runtime.progress", "runtime.prompts"},
    "calibration": {"agvas", "engines.memory", "runtime"},
    "export": {"agvas", "calibration", "engines", "runtime"},
    "benchmarks": {"agvas", "calibration", "engines", "export", "runtime"},
}
LIGHT = ("engines", "runtime")
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "cv2", "skimage", "sklearn", "safetensors"}
# Libraries of an engine whose name is not the file's.
NAMED_OTHERWISE = {"tensorrt_library": {"tensorrt_rtx"}, "cuda": {"cuda"}}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def imported(text: str, package: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file of `package`, as deep as the statement says: modules and what is taken from them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "import_module", "importlib.import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def imports_of(package: str) -> Iterator[tuple[str, str]]:
    for path in source_files(package):
        inside = path.relative_to(ROOT).parent.parts
        for line, name in imported(path.read_text(), inside):
            yield f"{path.relative_to(ROOT)}:{line}", name


def allows(allowed: set[str], name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in allowed)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_every_folder_imports_only_what_its_place_in_the_house_allows() -> None:
    broken = [
        f"{where} imports {name}"
        for package, allowed in ALLOWED.items()
        for where, name in imports_of(package)
        if name.split(".")[0] in {*ALLOWED, "tests"} and not allows({package} | allowed, name)
    ]
    assert not broken, "\n".join(broken)


def test_the_table_names_every_package_and_the_packages_are_the_ones_installed() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == ALLOWED.keys()
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in include} == ALLOWED.keys()


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import export.bundle", "export.bundle"),
        ("from export import bundle", "export.bundle"),
        ("def f():\n    from export.bundle import thing", "export.bundle.thing"),
        ("if TYPE_CHECKING:\n    import export as e", "export"),
        ("import importlib\nimportlib.import_module('export.cli')", "export.cli"),
        ("from . import errors", "runtime.errors"),
        ("from .errors import choose", "runtime.errors.choose"),
        ("from ..export import bundle", "export.bundle"),
    ],
)
def test_no_way_of_writing_an_import_escapes_the_parser(statement: str, name: str) -> None:
    assert name in [found for _, found in imported(statement, ("runtime",))]


def test_a_module_is_not_allowed_because_another_starts_with_its_name() -> None:
    assert allows({"runtime.prompts"}, "runtime.prompts.Prompts")
    assert not allows({"runtime.prompts"}, "runtime.prompts_of_another_kind")
    assert not allows({"runtime.prompts"}, "runtime.errors")


@pytest.mark.parametrize("package", LIGHT)
def test_the_run_chain_stays_python_3_10(package: str) -> None:
    for path in source_files(package):
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))


@pytest.mark.parametrize("package", LIGHT)
def test_the_run_chain_imports_no_build_tools_anywhere(package: str) -> None:
    heavy = [f"{where} imports {name}" for where, name in imports_of(package) if name.split(".")[0] in HEAVY]
    assert not heavy, "\n".join(heavy)


@pytest.mark.parametrize("package", LIGHT)
def test_the_run_chain_needs_only_what_the_package_depends_on(package: str) -> None:
    """numpy, Pillow, tokenizers and tqdm are its dependencies; engines come with extras and only in the file of their name."""
    third_party = {"numpy", "PIL", "tokenizers", "tqdm"}
    for where, name in imports_of(package):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in {"engines", "runtime"} or top in third_party:
            continue
        stem = Path(where.split(":")[0]).stem
        assert where.startswith("engines/") and (stem.startswith(top) or top in NAMED_OTHERWISE.get(stem, ())), f"{where} imports {name}"


def test_importing_the_runtime_loads_no_framework_and_no_engine() -> None:
    code = "import sys, runtime; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    finished = python(code)
    assert finished.returncode == 0, finished.stderr
    loaded = set(finished.stdout.split())
    assert "runtime" in loaded
    assert not loaded & (HEAVY | {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"})


def test_every_console_script_is_a_callable() -> None:
    for name, target in SCRIPTS.items():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_without_loading_torch(script: str) -> None:
    module, function = SCRIPTS[script].split(":")
    finished = python(
        f"import sys\nfrom {module} import {function} as main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'cv2', 'skimage', 'scipy'}\n"
        "heavy &= set(sys.modules)\n"
        "print('HEAVY', *heavy, file=sys.stderr)\nsys.exit(code)"
    )
    assert finished.returncode == 0, finished.stderr
    assert f"usage: {script} " in finished.stdout
    assert finished.stderr.splitlines()[-1].split() == ["HEAVY"]


def test_no_tracked_file_holds_a_path_of_one_machine() -> None:
    of_a_machine = re.compile(rb"(?<![\w.\-])/(?:work|root|home|Users|tmp/venv)/\w")
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue  # not text
        found += [f"{path.relative_to(ROOT)}: {match.group().decode()}" for match in of_a_machine.finditer(content)]
    assert not found, "\n".join(found)
