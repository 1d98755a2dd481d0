"""What all command lines share: an unknown option is told with the nearest one, warnings are lines, short work is announced."""

from __future__ import annotations

import importlib
import warnings

import pytest
from test_architecture import SCRIPTS

from export import cli as export_cli
from runtime.cli.common import Progress
from runtime.command_line import Parser, on_stderr, warnings_as_lines

# What each needs, so that nothing is missing but what is misspelt.
NEEDED = {
    "agvas-segment": ["part.png", "--bundle", "bundle"],
    "agvas-verify": ["--bundle", "bundle"],
    "agvas-build": ["--bundle", "bundle", "--engine", "tensorrt"],
    "agvas-eval": ["parts", "--bundle", "bundle"],
    "agvas-instruct": ["--output", "out", "--model", "m"],
    "agvas-calibrate": ["--output", "plan"],
    "agvas-import": ["--base", "base", "--output", "out"],
    "agvas-inspect": ["nano"],
}


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_misspelt_option_is_told_in_one_line_with_the_nearest_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, name = SCRIPTS[command].partition(":")
    main = getattr(importlib.import_module(module), name)
    with pytest.raises(SystemExit) as end:
        main([*NEEDED.get(command, []), "--hlep"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"{command}: unknown option --hlep; did you mean --help? {command} --help lists them all\n"


@pytest.fixture
def parser() -> Parser:
    parser = Parser("agvas-x")
    parser.add_argument("inputs", nargs="*")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--relative-threshold", type=float)
    parser.add_argument("--config", choices=("nano", "tiny"))
    return parser


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--treshold", "0.5"], "agvas-x: unknown option --treshold; did you mean --threshold? agvas-x --help lists them all\n"),
        (["--treshold=0.5"], "agvas-x: unknown option --treshold; did you mean --threshold? agvas-x --help lists them all\n"),
        (["--colour", "--cofnig"], "agvas-x: unknown option --colour; --cofnig; did you mean --config? agvas-x --help lists them all\n"),
        (["--verbose"], "agvas-x: unknown option --verbose; agvas-x --help lists them all\n"),
    ],
)
def test_options_far_from_all_have_no_nearest(parser: Parser, given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        with pytest.raises(SystemExit):
            parse(["--threshold", "0.5", *given])
        assert capsys.readouterr().err == told


def test_other_mistakes_are_told_as_ever_a_choice_with_the_nearest(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    for given, told in (
        (["--config", "nanoo"], "did you mean nano?\n"),
        (["--config", "zzz"], ")\n"),
        (["--threshold", "high"], "argument --threshold: invalid float value: 'high'\n"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(given)
        err = capsys.readouterr().err
        assert err.startswith("usage: agvas-x") and err.endswith(told)


def test_warnings_are_lines_of_the_command_and_pythons_own_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    shown = warnings.showwarning
    with warnings_as_lines(on_stderr("agvas-x")):
        warnings.warn("own-parts: left out 8", stacklevel=1)
    assert capsys.readouterr().err == "agvas-x: warning: own-parts: left out 8\n"
    assert warnings.showwarning is shown


def test_an_export_tells_warnings_as_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(*_: object) -> int:
        warnings.warn("own-parts: left out 8", stacklevel=1)
        return 0

    monkeypatch.setattr(export_cli, "_export", warn)
    assert export_cli.main([]) == 0
    assert capsys.readouterr().err == "agvas-export: warning: own-parts: left out 8\n"


def test_work_too_short_for_a_bar_is_announced_once_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    with Progress(tell=told.append) as progress:
        for label, steps in (("choosing the engine", 1), ("checking", 3), ("measuring", 40)):
            for done in range(steps + 1):
                progress(label, done, steps)
    assert told == ["choosing the engine", "checking"]
    assert "measuring" in capsys.readouterr().err
    with Progress(quiet=True, tell=told.append) as progress:
        progress("checking", 0, 3)
    assert len(told) == 2
