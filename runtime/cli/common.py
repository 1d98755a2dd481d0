"""What the runtime's command lines share: version and engine options, one-line JSON, careful stdout, and the progress bar."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from engines import ENGINES, INFERENCE_PRECISIONS, EngineOptions
from runtime import __version__
from runtime.bundle import Bundle
from runtime.errors import OutputError, RequestError, choose
from runtime.parity import finite
from runtime.progress import pace

AUTO = "auto"

_LOGGED_FROM = 9  # steps: a log file has no use for a bar on a handful of pictures


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`, the same for every command: the package's."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def add_engine_arguments(parser: argparse.ArgumentParser, *, bundle_required: bool = True) -> None:
    """`--version`, and the options that say where a bundle runs, the same for every command."""
    add_version(parser)
    parser.add_argument("--bundle", required=bundle_required, metavar="DIR", help="folder that agvas-export wrote")
    parser.add_argument(
        "--engine",
        default=AUTO,
        help=f"{AUTO} (default: the fastest here that gives the reference's masks), {', '.join(ENGINES)}",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda:N; nothing else is used in its place")
    parser.add_argument(
        "--inference-precision",
        help="graph (the graphs' own types), bf16 (openvino), int8 (where weights are integers) or bf16+int8 (both, openvino); default: "
        "graph for a named engine, any for auto",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="CPU threads of one inference (default 0: the engine's choice)",
    )
    parser.add_argument(
        "--remeasure",
        action="store_true",
        help=f"with engine {AUTO}: measure the engines now, whatever an earlier, perhaps busier, hour has found",
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="one stage in memory at a time: slower, for models that do not fit (name an engine)",
    )


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """Check the options of `add_engine_arguments`.

    Raises:
        RequestError: names the option, what it takes and the nearest valid value.
    """
    choose("--engine", arguments.engine, (AUTO, *ENGINES))
    if arguments.inference_precision is not None:
        choose("--inference-precision", arguments.inference_precision, INFERENCE_PRECISIONS)
    if arguments.remeasure and arguments.engine != AUTO:
        raise RequestError(f"--remeasure: expected --engine {AUTO}, got {arguments.engine}, which is taken as it is; leave one of them out")
    if arguments.low_memory and arguments.engine == AUTO:
        raise RequestError(f"--low-memory: expected a named engine, got {AUTO}, which would hold all of them to compare; add --engine")
    try:
        return EngineOptions(arguments.device, arguments.threads, arguments.inference_precision or "graph", arguments.low_memory)
    except ValueError as error:
        raise RequestError(f"--{error}") from error


def json_line(record: Any) -> str:
    """One line of JSON; NaN and infinity become null."""
    return json.dumps(finite(record), allow_nan=False)


def open_streams() -> None:
    """Give stdout and stderr somewhere to go where they were closed (`>&-`): what a command tells must not change what it does."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def say(line: str) -> None:
    """Print to stdout at once: another program may be waiting for the line.

    Raises:
        OutputError: stdout goes to a full disk. BrokenPipeError passes: its reader has gone.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        # File names need not be text; a name that the terminal cannot show must not end the run.
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        close_stdout()  # what waits in its buffer would be tried again at the end, and change the exit code
        raise OutputError(f"stdout: expected to write a line, got {error}; free some space or redirect it") from error


def close_stdout() -> None:
    """After a broken pipe: point stdout at nothing, so that Python's own flush at exit does not complain once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # stdout is no real file: nothing will be flushed


class Progress:
    """A bar on stderr. On a terminal it is shown from two steps on; in a log from nine, at most every ten seconds.

    Args:
        tell: is given the label of work that is too short for a bar, as it begins.
    """

    def __init__(self, *, quiet: bool = False, tell: Callable[[str], None] | None = None) -> None:
        self._quiet = quiet
        self._tell = tell
        self._terminal = sys.stderr.isatty()
        self._label = ""
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps of the work called `label` are done."""
        if self._bar is None or label != self._label:
            self.__exit__(None, None, None)
            self._bar, self._label = self._open(label, done, total), label
        self._bar.update(done - self._bar.n)

    def step_aside(self) -> None:
        """Take the bar off the terminal before a line is printed there; the next call draws it again."""
        if self._bar is not None and self._terminal:
            self._bar.clear()

    def _open(self, label: str, done: int, total: int) -> Any:
        from tqdm import tqdm

        short = total < (2 if self._terminal else _LOGGED_FROM)
        hidden = self._quiet or short
        if short and not self._quiet and self._tell is not None:
            self._tell(label)
        return tqdm(
            desc=label,
            total=total,
            initial=done,  # what an earlier run did tells nothing of this one's pace
            disable=hidden,
            leave=not self._terminal,
            **pace(),
        )


def opening(bundle: str) -> str:
    """What to tell before `auto` opens a bundle, which may take a minute.

    Raises:
        BundleError: there is none to open.
    """
    Bundle(bundle, check_hashes=False)
    return f"opening {bundle}; on a new machine, engine auto first measures the engines that are installed"


def describe(engine: str, options: EngineOptions) -> str:
    """Engine, precision and device in words."""
    return f"engine {engine}, precision {options.inference_precision}, device {options.device}"
