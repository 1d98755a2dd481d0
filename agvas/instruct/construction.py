"""One run of the offline stage: workers that claim samples, ask, check and ask again; a collector that writes what they found.

Threads, since all but the drawing is waiting. Only the collector writes, so a line is never torn. `stop` lets the requests in flight come
home, as they are paid for; a process that is killed loses those alone. Everything written stays, and the next run goes on after it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agvas.instruct.answers import read_answer, whole_characters
from agvas.instruct.endpoint import Endpoint, EndpointClosed, Pace, Reply, RequestFailed, RequestRefused, Stopped
from agvas.instruct.journal import DESCRIBED, REFUSED, Entry, Journal, Refusal, latest, read_entries, read_refusals, relative_path
from agvas.instruct.pictures import encode_jpeg
from agvas.instruct.references import References
from agvas.instruct.request import RequestSettings, first_request, knowledge_sentence, with_reasons
from agvas.instruct.samples import Explanations, Record, Sample, identify, mask_file, picture_name

__all__ = ["Construction", "RunSettings", "Tally"]

_FAILURES_IN_A_ROW = 5  # requests that nothing answered: by then it is the endpoint, not a sample
_GREY = 128
_SHOWN_ANSWER = 8000  # characters of a refused answer that are kept


@dataclass(frozen=True)
class RunSettings:
    """How a run goes.

    Attributes:
        request: what is set about every request.
        answers: answers a sample may take before it goes to review.
        concurrency: workers.
        limit: most samples described in this run; None has no limit.
        retry_refused: ask anew about samples whose every answer was refused in an earlier run.
    """

    request: RequestSettings
    answers: int = 3
    concurrency: int = 4
    limit: int | None = None
    retry_refused: bool = False


@dataclass
class Tally:
    """What a run did. `undone` samples got no reply or could not be read, and are tried again by the next run; `errors` says why.
    `superseded` of those described had a description already, of another mask or by another prompt, which no longer counts. What none of
    these counts has, the run ended before: at its limit, stopped, or because the endpoint closed."""

    described: int = 0
    superseded: int = 0
    refused: int = 0
    undone: int = 0
    done_before: int = 0
    duplicates: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    replies_without_usage: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def behind(self) -> int:
        """Records that something became of."""
        return self.described + self.refused + self.undone + self.done_before + self.duplicates


class Construction:
    """A run into one output folder."""

    def __init__(
        self,
        records: Sequence[Record],
        references: References,
        endpoint: Endpoint,
        pace: Pace,
        output: Path,
        settings: RunSettings,
        explanations: Explanations | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            records: only anomalous ones are described.
            pace: the endpoint's, which an interruption stops.
            note: takes one line about a sample that went wrong.
        """
        self.records = [record for record in records if record.is_anomalous]
        self._references, self._endpoint, self._pace = references, endpoint, pace
        self._output, self._settings, self._explanations, self._note = output, settings, explanations or {}, note
        self.tally = Tally()
        self._lock = threading.Lock()
        self._results: queue.Queue[_Event] = queue.Queue()
        self._stopping = threading.Event()
        self._claimed: set[str] = set()
        self._claims_left = settings.limit
        self._failures_in_a_row = 0
        self._answered_since = False  # since the last request that was refused for good

    def run(self, progress: Callable[[Tally], None] = lambda tally: None) -> Tally:
        """Describe what is not described yet; `progress` is called after each record.

        Raises:
            EndpointClosed: the endpoint refuses every request, plain pictures too, or several in a row got no reply.
            DatasetError: a damaged journal.
            OSError: the output cannot be written.
        """
        with Journal(self._output / DESCRIBED) as described, Journal(self._output / REFUSED) as refused:
            for name, cut in ((DESCRIBED, described.cut_bytes), (REFUSED, refused.cut_bytes)):
                if cut:
                    self._note(f"{name}: dropped {cut} bytes of a line that an earlier run did not finish")
            current = latest(read_entries(self._output / DESCRIBED))
            self._done = {entry.id for entry in current}  # not of a superseded one: a mask corrected back is described again
            self._known = {entry.place for entry in current}
            if not self._settings.retry_refused:
                self._done |= {refusal.id for refusal in read_refusals(self._output / REFUSED)}
            turn = iter(self.records)
            workers = [threading.Thread(target=self._work, args=(turn,), daemon=True) for _ in range(self._settings.concurrency)]
            for worker in workers:
                worker.start()
            try:
                self._collect(described, refused, len(workers), progress)
            finally:
                self.stop()
        return self.tally

    def stop(self) -> None:
        """Start nothing more; `run` returns when the requests in flight have been answered and written."""
        self._stopping.set()
        self._pace.stop()

    def _collect(self, described: Journal, refused: Journal, working: int, progress: Callable[[Tally], None]) -> None:
        """Write events until all workers have ended; a fault that ends the run is raised after the others have come home."""
        fault: Exception | None = None
        while working:
            event = self._results.get()
            outcome = event.outcome
            self._count(event)
            if event.ended:
                working -= 1
            elif isinstance(outcome, Entry):
                described.append(outcome.to_json())
                self.tally.described += 1
                self.tally.superseded += outcome.place in self._known
                self._known.add(outcome.place)
            elif isinstance(outcome, Refusal):
                refused.append(outcome.to_json())
                self.tally.refused += 1
                self._note(f"{event.name}: to review after {outcome.attempts} answer{'s' * (outcome.attempts != 1)}: {outcome.reasons[0]}")
            elif isinstance(outcome, _Undone):
                self.tally.undone += 1
                self.tally.errors.append(outcome.reason)
                self._note(f"left for the next run: {outcome.reason}")
            elif isinstance(outcome, Exception):
                fault = fault or outcome
                self.stop()
            progress(self.tally)
        if fault is not None:
            raise fault

    def _count(self, event: _Event) -> None:
        self.tally.input_tokens += event.input_tokens
        self.tally.output_tokens += event.output_tokens
        self.tally.replies_without_usage += event.without_usage
        self.tally.done_before += event.outcome == _DONE_BEFORE
        self.tally.duplicates += event.outcome == _DUPLICATE

    def _work(self, turn: Iterator[Record]) -> None:
        try:
            while not self._stopping.is_set():
                with self._lock:
                    if self._claims_left == 0:
                        return
                    record = next(turn, None)
                if record is None:
                    return
                event = _Event(name=picture_name(record))
                try:
                    event.outcome = self._handle(record, event)
                except Stopped:
                    pass
                except RequestFailed as error:
                    event.outcome = _Undone(f"{event.name}: {error}", of_endpoint=True)
                except (ValueError, LookupError, OSError) as error:
                    path, said = str(record.image), str(error)
                    event.outcome = _Undone(said.replace(path, event.name) if path in said else f"{event.name}: {said}")
                except Exception as error:  # EndpointClosed, or a fault of ours: the run must end aloud, not one thread in silence
                    event.outcome = error
                    self.stop()  # here, not in the collector: this worker must not send one request more
                outage = self._find_outage(event.outcome)
                self._results.put(event)
                if outage is not None:
                    self._results.put(_Event(outcome=outage))
        finally:
            self._results.put(_Event(ended=True))

    def _find_outage(self, outcome: object) -> EndpointClosed | None:
        """What ends the run after too many failures in a row; counted by the worker, which must not send one request more."""
        with self._lock:
            if isinstance(outcome, (Entry, Refusal)):
                self._failures_in_a_row = 0
            if not (isinstance(outcome, _Undone) and outcome.of_endpoint):
                return None
            self._failures_in_a_row += 1
            if self._failures_in_a_row < _FAILURES_IN_A_ROW:
                return None
            failures = self._failures_in_a_row
        self.stop()
        return EndpointClosed(f"{failures} requests in a row failed, the last with: {outcome.reason}")

    def _handle(self, record: Record, event: _Event) -> Entry | Refusal | str | None:
        sample = identify(record, self._explanations)
        with self._lock:
            if sample.id in self._done:
                return _DONE_BEFORE
            if sample.id in self._claimed:
                return _DUPLICATE
            if self._claims_left is not None:
                if self._claims_left == 0:
                    return None
                self._claims_left -= 1
            self._claimed.add(sample.id)
        return self._describe(sample, event)

    def _describe(self, sample: Sample, event: _Event) -> Entry | Refusal:
        settings = self._settings
        record, mask = sample.record, mask_file(sample.record)
        jpegs, _ = sample.draw(self._references, settings.request.max_side)
        first = first_request(settings.request, jpegs, sample.knowledge)
        image = relative_path(record.image, self._output)
        place = (sample.id, image, relative_path(mask, self._output) if mask else None, record.category, record.kind)
        answer, answers = "", 0
        reasons: list[str] = []
        while answers < settings.answers:
            try:
                reply = self._ask(with_reasons(first, answer, reasons) if answers else first, event)
            except RequestRefused as error:
                self._suspect(error, sample, event)
                reasons = [f"the endpoint does not take this sample: {error}", *reasons]
                break
            answers += 1
            description, reasons = read_answer(reply.text, record.category, record.kind)
            if description is not None:
                return Entry(*place, description, settings.request.model, answers, event.usage())
            if reply.finish_reason == "length":
                reasons = ["the answer was cut off at the length limit; write less", *reasons]
            answer = whole_characters(reply.text)
        return Refusal(*place, answer[:_SHOWN_ANSWER], tuple(reasons), settings.request.model, answers, event.usage())

    def _ask(self, body: dict[str, Any], event: _Event) -> Reply:
        reply = self._endpoint.ask(body, self._note)
        event.add(reply.input_tokens, reply.output_tokens)
        with self._lock:
            self._answered_since = True
        return reply

    def _suspect(self, error: RequestRefused, sample: Sample, event: _Event) -> None:
        """Raise EndpointClosed unless it is the sample that was refused: a content filter's, an odd picture.

        A wrong model or option is refused with the same 400. So unless a request was answered since the last refusal, the endpoint is
        asked about plain grey pictures of this one's size, with the same model and options, and has to answer that.
        """
        with self._lock:
            answered, self._answered_since = self._answered_since, False
        if answered:
            return
        request = self._settings.request
        grey = encode_jpeg(np.full((*sample.mask.shape, 3), _GREY, np.uint8), request.max_side)
        try:
            reply = self._endpoint.ask(first_request(request, (grey, grey, grey), knowledge_sentence("part", None, None)))
        except RequestRefused:
            remedy = "three plain grey pictures are refused as well: correct --model or the options that are sent with it"
            raise EndpointClosed(f"{self._endpoint.url}: {error}; {remedy}") from error
        event.add(reply.input_tokens, reply.output_tokens)


_DONE_BEFORE, _DUPLICATE = "done before", "duplicate"


@dataclass(frozen=True)
class _Undone:
    reason: str
    of_endpoint: bool = False


@dataclass
class _Event:
    """What a worker tells the collector: what became of one record, or that the worker has ended. `name` is the picture's (samples.py)."""

    name: str = ""
    outcome: Entry | Refusal | _Undone | Exception | str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    without_usage: int = 0
    ended: bool = False

    def add(self, input_tokens: int | None, output_tokens: int | None) -> None:
        self.input_tokens += input_tokens or 0
        self.output_tokens += output_tokens or 0
        self.without_usage += input_tokens is None or output_tokens is None

    def usage(self) -> dict[str, int] | None:
        return None if self.without_usage else {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
