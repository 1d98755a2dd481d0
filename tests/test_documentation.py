"""What the READMEs promise is there: links, modules, options and files. What the commands do, the other tests hold."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "engines", "export", "calibration", "agvas/training", "benchmarks")
PAGES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_the_first_page_leads_to_every_other() -> None:
    first = PAGES[0].read_text()
    assert [folder for folder in FOLDERS if f"]({folder}/README.md)" not in first] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.relative_to(ROOT)}: {target}"
        if heading:
            assert heading in _headings(file), f"{page.relative_to(ROOT)}: {target} is none of {sorted(_headings(file))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_modules_and_results_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:benchmarks|agvas)[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, f"{page.relative_to(ROOT)}: python -m {module}"
    for result in re.findall(r"benchmarks/results/[\w./-]*\w", text):
        assert (ROOT / result).exists(), f"{page.relative_to(ROOT)}: {result}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_take_the_options_that_are_shown(page: Path) -> None:
    shown = _commands(page.read_text())
    for command, options in shown:
        missing = [option for option in options if not re.search(rf"{option}\b", _help(command))]
        assert not missing, f"{page.relative_to(ROOT)}: {command} has no {', '.join(missing)}"
    assert shown


def _headings(page: Path) -> set[str]:
    """As the fragment of a link names them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _commands(text: str) -> list[tuple[str, list[str]]]:
    """Command or `-m` module, and the options given to it, of every line in a block of shell and every span of code."""
    found = []
    pieces = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    pieces += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    for piece in pieces:
        line = piece.partition(" #")[0]
        command = re.search(r"(?:^|[/\s])(agvas-\w+|python -m benchmarks\.\w+|-m agvas\.training\.cli)(.*)", line)
        if command is None:
            continue
        name = command[1].removeprefix("python ").removeprefix("-m ")
        name = "agvas-train" if name == "agvas.training.cli" else name
        arguments = command[2].split()
        sub = arguments[0] if name.endswith(("agvas-instruct", "full_size_gpu")) and arguments and arguments[0].isalpha() else ""
        found.append((f"{name} {sub}".strip(), re.findall(r"(?<=[\s\[])(--[a-z][\w-]*)", command[2])))
    return found


@cache
def _help(command: str) -> str:
    """In this process: a new one would load torch again for each of thirty."""
    name, *sub = command.split()
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [name, *sub, "--help"])
        if name in SCRIPTS:
            module, _, function = SCRIPTS[name].partition(":")
            sys.exit(getattr(importlib.import_module(module), function)())
        runpy.run_module(name, run_name="__main__")
    assert not end.value.code, f"{command}: {end.value.code}"
    return told.getvalue()
