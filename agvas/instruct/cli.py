"""agvas-instruct: describe the anomalies of a data set by a large multimodal model, and take the reviewers' decisions.

Parses, opens what the run needs, shows how far it is. Exit codes: 0 all samples have a description or a place in the review file, 1 some
were left for the next run (or a review held no decision to apply), 2 nothing could be done or the endpoint closed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.command_line import Parser

if TYPE_CHECKING:
    from agvas.instruct.construction import Construction, Tally
    from agvas.instruct.journal import Usage
    from agvas.instruct.references import References
    from agvas.instruct.request import RequestSettings
    from agvas.instruct.samples import Explanations, Record

PROG = "agvas-instruct"
_THUMBNAILS = "thumbnails"
_DRY_RUN = "dry-run"
_KINDS = ("real-iad", "goods-ad", "dtd-synthetic", "miad", "zju-leaper")
"""Of the mixture's anomaly sources, those with normal pictures to stand beside and a mask file, which a line of instruct.jsonl can name.

crackforest and gc10-det have neither: every picture of theirs shows a defect, and their truth is a .mat file or boxes. Given as a manifest
with masks, and normal pictures by --normals, they are described, too.
"""


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    reviewing = given[:1] == ["review"]
    options = _review_parser().parse_args(given[1:]) if reviewing else _parser().parse_args(given)
    from agvas.instruct.endpoint import EndpointClosed

    try:
        return _review(options) if reviewing else _describe(options)
    except ModuleNotFoundError as error:
        print(f'{PROG}: {error.name} is not installed; pip install "agvas[instruct]"', file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; what was written so far is whole and stays", file=sys.stderr)
        return 130
    except (ValueError, LookupError, OSError, EndpointClosed) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description="Describe each anomalous picture of a data set in five fields (Anomaly-Instruct) by any OpenAI-compatible chat "
        "endpoint. Pictures are sent to that endpoint. Run the same command again to go on after an interruption.",
        epilog=f"After that: `{PROG} review --output DIR` brings review.csv up to date, `{PROG} review --output DIR --apply` writes "
        "accepted.jsonl. Exit codes: 0 every sample has a description or a line in review.csv; 1 some were left for the next run; 2 "
        "nothing could be done, or the endpoint closed; 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", type=Path, metavar="DIR", help="folder with manifest.csv; or a published set by --kind and --root")
    add("--kind", choices=_KINDS, help="a published set, by its name and layout in a mixture (agvas-train --help shows the folders)")
    add("--root", type=Path, metavar="DIR", help="folder of the --kind")
    add("--annotations", metavar="NAME", help="below --root, as in a mixture: folder of real-iad's JSON files, list of zju-leaper")
    add("--images", metavar="NAME", help="below --root, as in a mixture: folder of real-iad's resolution (default realiad_1024)")
    add("--split", metavar="NAME", help="describe only samples of this split (default: all)")
    add("--normals", type=Path, metavar="DIR", help="more normal pictures: a folder with manifest.csv, or one with a folder per category")
    add("--explanations", type=Path, metavar="FILE", help="CSV (class, kind, explanation): what each anomaly type means")
    add("--endpoint", metavar="URL", help="base of the API, http://localhost:8000/v1; needed unless --dry-run")
    add("--model", required=True, metavar="NAME", help="name that the endpoint knows")
    add("--api-key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable of the key (default OPENAI_API_KEY)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of instruct.jsonl, refused.jsonl and review.csv")
    add("--answers", type=_positive, default=3, metavar="N", help="answers that a sample may take before it goes to review (default 3)")
    add("--tries", type=_positive, default=6, metavar="N", help="how often a request is sent to a busy or silent endpoint (default 6)")
    add("--timeout", type=_seconds, default=300.0, metavar="S", help="seconds for a request and its whole answer (default 300)")
    add("--concurrency", type=_positive, default=4, metavar="N", help="requests at the same time (default 4)")
    add("--requests-per-minute", type=_seconds, metavar="N", help="no more than this, evenly spaced (default: no limit)")
    add("--limit", type=_positive, metavar="N", help="describe at most N samples in this run")
    add("--retry-refused", action="store_true", help="ask anew about samples whose every answer was refused in an earlier run")
    add("--temperature", type=float, metavar="T", help="sent only if given")
    add("--max-tokens", type=_positive, metavar="N", help="longest answer; sent only if given")
    add("--json-mode", action="store_true", help="ask the endpoint for JSON (response_format); not every endpoint can")
    add("--max-side", type=_positive, default=1024, metavar="N", help="longer side of the pictures sent, in pixels (default 1024)")
    add("--price-input", type=_price, metavar="P", help="price of a million input tokens; with --price-output the cost is shown")
    add("--price-output", type=_price, metavar="P", help="price of a million output tokens")
    add("--dry-run", type=_positive, metavar="N", help=f"send nothing: write the first N samples' pictures and requests to DIR/{_DRY_RUN}")
    add("--json", action="store_true", help="the last line of stdout is a JSON object")
    add("--quiet", action="store_true", help="no progress bar and no notes on stderr, only errors")
    return parser


def _review_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{PROG} review",
        description="Bring review.csv up to date. Then write yes or no into its column accept, correct texts where you like, save as CSV, "
        "and run again with --apply. Pictures are named relative to the file's folder. A line of status refused holds what could be saved "
        "of the last answer, and in column reasons why it was refused.",
        epilog="Exit codes: 0 done; 1 --apply found no decision and wrote nothing; 2 nothing could be done.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of an earlier run")
    add("--apply", action="store_true", help="write accepted.jsonl: the accepted samples with their texts as they stand in review.csv")
    add("--accept-unmarked", action="store_true", help="with --apply: take described samples without a decision, too")
    add("--json", action="store_true", help="the last line of stdout is a JSON object")
    return parser


def _describe(options: argparse.Namespace) -> int:
    if (options.price_input is None) != (options.price_output is None):
        raise ValueError("--price-input, --price-output: expected both or none, got one")
    _check_source(options)
    if options.dry_run is None and options.endpoint is None:
        raise ValueError("--endpoint: expected a URL, got none; name one, or see with --dry-run what would be sent")

    from agvas.instruct.request import RequestSettings
    from agvas.instruct.samples import read_explanations

    records, references = _open(options)
    explanations = read_explanations(options.explanations, records) if options.explanations else {}
    request = RequestSettings(options.model, options.temperature, options.max_tokens, options.json_mode, options.max_side)
    if options.dry_run is not None:
        return _rehearse(options, records, references, request, explanations)

    from agvas.instruct.construction import Construction, RunSettings
    from agvas.instruct.endpoint import Endpoint, Pace
    from agvas.instruct.review import REVIEW, update_review

    key = os.environ.get(options.api_key_variable) or None
    if key is None and not options.quiet:
        print(f"{PROG}: {options.api_key_variable} is not set; requests go without a key", file=sys.stderr)
    started = time.monotonic()
    pace = Pace(options.requests_per_minute)
    endpoint = Endpoint(options.endpoint, key, pace, options.timeout, options.tries)
    settings = RunSettings(request, options.answers, options.concurrency, options.limit, options.retry_refused)
    with _Bar(len(records), options) as bar:
        construction = Construction(records, references, endpoint, pace, options.output, settings, explanations, bar.note)
        try:
            with _stopping_on_interrupt(construction, bar.note) as interrupted:
                construction.run(bar)
        finally:
            if options.output.is_dir():  # however the run ended, what it wrote can be reviewed
                update_review(options.output)
            _summarise(options, construction, endpoint.requests_sent, time.monotonic() - started, options.output / REVIEW)
    if interrupted():
        print(f"{PROG}: interrupted; what was written so far is whole and stays, the same command goes on", file=sys.stderr)
        return 130
    return 1 if construction.tally.undone else 0


def _open(options: argparse.Namespace) -> tuple[list[Record], References]:
    """The anomalous samples to describe and the normal pictures of their categories."""
    from agvas.instruct.references import References, find_normals
    from agvas.training.sources.errors import DatasetError
    from agvas.training.sources.manifest import MANIFEST, read_manifest

    items = _read_items(options)
    place = options.root or options.dataset / MANIFEST
    records: list[Record] = [item for item in items if item.is_anomalous and options.split in (None, item.split)]
    if not records:
        among = f" of split {options.split!r}" if options.split else ""
        raise DatasetError(place, None, f"anomalous samples (label 1){among}", "none", "check the labels and --split")
    normals: dict[str, list[Path]] = {}
    for item in items:
        if not item.is_anomalous:
            normals.setdefault(item.category, []).append(item.image)
    if options.normals is not None:
        if (options.normals / MANIFEST).is_file():
            more = [(item.category, [item.image]) for item in read_manifest(options.normals) if not item.is_anomalous]
        else:
            more = list(find_normals(options.normals).items())
        for category, paths in more:
            normals.setdefault(category, []).extend(paths)
    if missing := sorted({record.category for record in records} - normals.keys()):
        where = options.normals or options.root or options.dataset
        found = f"none of {', '.join(missing)}"
        remedy = "name a folder with --normals: a manifest, or CATEGORY/*.png"
        raise DatasetError(where, None, "a normal picture of each category", found, remedy)
    return records, References(normals, options.output / _THUMBNAILS)


def _check_source(options: argparse.Namespace) -> None:
    """Raises ValueError unless one data set is named, with options that it takes."""
    if (options.dataset is None) == (options.kind is None):
        raise ValueError(f"--dataset, --kind: expected one of the two, got {'none' if options.kind is None else 'both'}")
    if (options.kind is None) != (options.root is None):
        raise ValueError("--kind, --root: expected both or none, got one; --root is the folder of a --kind")

    from agvas.training.sources.catalogue import OPTIONS

    taken = OPTIONS["anomaly"][options.kind] if options.kind else ()
    for name in ("annotations", "images"):
        if getattr(options, name) is not None and name not in taken:
            raise ValueError(f"--{name}: {options.kind or 'a manifest'} takes no such option; leave it out")


def _read_items(options: argparse.Namespace) -> Sequence[Any]:
    """Every picture of the data set, whatever its split: its normal ones stand beside the anomalous."""
    from agvas.training.sources.catalogue import SourceSettings, read_source
    from agvas.training.sources.manifest import read_manifest

    if options.dataset is not None:
        return read_manifest(options.dataset)
    items, remarks = read_source("anomaly", SourceSettings(options.kind, str(options.root), options.annotations, options.images))
    for remark in remarks if not options.quiet else ():
        print(f"{PROG}: {options.root}: {remark}", file=sys.stderr)
    return items


def _rehearse(
    options: argparse.Namespace,
    records: list[Record],
    references: References,
    request: RequestSettings,
    explanations: Explanations,
) -> int:
    from agvas.instruct.dry_run import rehearse

    written = rehearse(records, references, request, options.output / _DRY_RUN, options.dry_run, explanations)
    for folder, name in written:
        print(f"{folder.name}  {name}")
    requests = "1 request with its pictures" if len(written) == 1 else f"{len(written)} requests with their pictures"
    print(f"wrote {requests} to {options.output / _DRY_RUN}; nothing was sent")
    if options.json:
        print(json.dumps({"dry_run": [str(folder) for folder, _ in written], "pictures": [name for _, name in written]}))
    return 0


def _review(options: argparse.Namespace) -> int:
    from agvas.instruct.journal import ACCEPTED, DESCRIBED, REFUSED
    from agvas.instruct.review import REVIEW, apply_review, update_review

    if options.accept_unmarked and not options.apply:
        raise ValueError("--accept-unmarked: expected --apply with it")
    if not options.output.is_dir():
        raise ValueError(f"--output: expected the folder of an earlier run, found no folder {options.output}")
    if not any((options.output / name).is_file() for name in (DESCRIBED, REFUSED, REVIEW)):
        raise ValueError(f"--output: expected the folder of an earlier run, got {options.output}, in which nothing has been described yet")
    record: dict[str, Any] = {"review": str(options.output / REVIEW)}
    if options.apply:
        decisions = apply_review(options.output, options.accept_unmarked)
        if not decisions.accepted + decisions.rejected:
            print(f"{PROG}: no decision was taken and nothing written; {_decide(options.output)}", file=sys.stderr)
            return 1
        print(
            f"{decisions.accepted} accepted ({decisions.edited} with corrected texts), {decisions.rejected} rejected, "
            f"{decisions.unmarked} without a decision left out; wrote {options.output / ACCEPTED}"
        )
        if decisions.superseded:
            print(_superseded(decisions.superseded))
        record |= {"accepted_file": str(options.output / ACCEPTED), **vars(decisions)}
    else:
        told = update_review(options.output)
        samples = f"{told.samples} sample{'s' * (told.samples != 1)}"
        print(f"{samples}; {_decide(options.output)}, then run {PROG} review --output {options.output} --apply")
        if told.superseded:
            print(_superseded(told.superseded))
        record |= vars(told)
    if options.json:
        print(json.dumps(record))
    return 0


def _superseded(count: int) -> str:
    return f"{count} older descriptions do not count: their pictures were described again, with another mask or by another prompt"


def _decide(output: Path) -> str:
    from agvas.instruct.review import REVIEW

    return f"write yes or no in column accept of {output / REVIEW}"


def _summarise(options: argparse.Namespace, construction: Construction, requests: int, seconds: float, review: Path) -> None:
    from agvas.instruct.journal import DESCRIBED, read_usage

    tally = construction.tally
    unfinished = len(construction.records) - tally.behind
    cost, all_runs = _cost(options, tally), read_usage(options.output)
    cost_of_all = _cost(options, all_runs)
    without = f", {tally.replies_without_usage} replies did not say theirs" if tally.replies_without_usage else ""
    again = f" ({tally.superseded} of them again, the older description no longer counts)" if tally.superseded else ""
    cut = f", {unfinished} not come to an end in this run" if unfinished else ""
    print(
        f"{tally.described} described{again}, {tally.refused} to review without a usable answer, {tally.undone} left for the next run, "
        f"{tally.done_before} done before{cut}; {tally.input_tokens} input and {tally.output_tokens} output tokens{without}"
        + ("" if cost is None else f", cost {_money(cost)}")
    )
    if tally.done_before:
        print(
            f"in all runs so far {all_runs.input_tokens} input and {all_runs.output_tokens} output tokens for what was described or refused"
            + (f", {all_runs.samples_without_usage} samples without theirs" if all_runs.samples_without_usage else "")
            + ("" if cost_of_all is None else f", cost {_money(cost_of_all)} at these prices")
        )
    if tally.described + tally.refused + tally.done_before:
        print(f"next: {_decide(options.output)}, then run {PROG} review --output {options.output} --apply")
    if options.json:
        record = {
            "described": tally.described,
            "superseded": tally.superseded,
            "refused": tally.refused,
            "undone": tally.undone,
            "unfinished": unfinished,
            "done_before": tally.done_before,
            "duplicates": tally.duplicates,
            "requests": requests,
            "input_tokens": tally.input_tokens,
            "output_tokens": tally.output_tokens,
            "replies_without_usage": tally.replies_without_usage,
            "cost": cost,
            "all_runs": {**vars(all_runs), "cost": cost_of_all},
            "seconds": round(seconds, 3),
            "instruct": str(options.output / DESCRIBED),
            "review": str(review),
        }
        print(json.dumps(record), flush=True)


def _cost(options: argparse.Namespace, tally: Tally | Usage) -> float | None:
    """Of one run or of all, in the unit of the prices; None without prices."""
    if options.price_input is None:
        return None
    return float(tally.input_tokens * options.price_input + tally.output_tokens * options.price_output) / 1e6


def _money(cost: float) -> str:
    """Two decimals, and of a small sum as many as show two digits of it: 0.0042."""
    return f"{cost:.{max(2, 1 - math.floor(math.log10(cost))) if cost > 0 else 2}f}"


class _Bar:
    """How many records are behind, with tokens and cost so far; notes go above it."""

    def __init__(self, total: int, options: argparse.Namespace) -> None:
        from tqdm import tqdm

        from runtime.progress import pace

        self._options = options
        self._tqdm = tqdm(total=total, desc="describing", unit="sample", disable=options.quiet, **pace())

    def __call__(self, tally: Tally) -> None:
        cost = _cost(self._options, tally)
        tokens = f"{tally.input_tokens} in, {tally.output_tokens} out"
        self._tqdm.set_postfix_str(tokens if cost is None else f"{tokens}, cost {_money(cost)}", refresh=False)
        self._tqdm.update(tally.behind - self._tqdm.n)

    def note(self, line: str) -> None:
        if not self._options.quiet:
            self._tqdm.write(f"{PROG}: {line}", file=sys.stderr)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()


@contextmanager
def _stopping_on_interrupt(construction: Construction, note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) stops the run gently, a second leaves at once with KeyboardInterrupt. Gives whether there was one."""
    count = 0

    def stop() -> None:
        construction.stop()
        note("stopping: waiting for the requests in flight; Ctrl-C again leaves them behind")

    def handle(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        # In a thread: this handler may have interrupted the holder of the very locks that stop needs.
        threading.Thread(target=stop, daemon=True).start()

    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        signals = ()
    before = [signal.signal(number, handle) for number in signals]
    try:
        yield lambda: count > 0
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def _price(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
