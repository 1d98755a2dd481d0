"""The chain of stages on one picture: what goes from which stage to which, and how an answer is verified or written.

Direct mode is one language pass: the expected answer is appended as a draft, and the same pass yields the model's own choice at each
of its positions. Where they agree throughout, greedy generation would have said exactly this; from the first disagreement on,
the pipeline generates, reusing the keys and values up to there. So the result is the reference's greedy result always.

What a picture contributes is computed once, however many instructions are given about it: the encoders' outputs, and the language
model's keys and values of everything before the instruction, which a causal model computes alike whatever follows.

Stages are anything with `run(feeds)`: engines, or torch modules when export checks this glue against AGVAS. Those with `start(feeds)`, too,
are queued on their device, and one stage's outputs are fed to the next where they lie.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from engines import EngineFailed, Joined, Pending, Resident
from runtime import preprocess
from runtime.contract import STAGES
from runtime.deadline import computing
from runtime.preprocess import Frame, Preprocessing
from runtime.prompts import Prompt, PromptEncoder
from runtime.text_stream import TextStream

# Keys or values: an array, or where an engine on a GPU keeps them.
Past = np.ndarray | Resident


class Stage(Protocol):
    """One graph of the contract. (What stays on a GPU is typed as the array that it can be made into.)"""

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


class NotFinite(EngineFailed):
    """A stage ran, and what it computed holds NaN or infinity.

    Attributes:
        tensors: every stage's outputs up to there by contract name.
    """

    def __init__(self, message: str, tensors: dict[str, np.ndarray]) -> None:
        super().__init__(message)
        self.tensors = tensors

    def __reduce__(self) -> tuple[type[NotFinite], tuple[str, dict[str, np.ndarray]]]:
        """For the way from one process to another; what was computed stays."""
        return type(self), (str(self), {})


@dataclass
class Trace:
    """Everything one answer left behind on its way.

    Attributes:
        tensors: every stage's outputs by contract name, of the first language pass where there were several.
        answer: token ids said, end token included when it was reached.
        verified: the draft was confirmed whole; False where the model wrote its own answer, or the length limit cut it.
        anchor_states: float32 [1, 3, D], None when the answer lacks an anchor.
        anomaly_map: float32 [H, W] at the picture's size; zeros when the answer lacks an anchor.
        timings: milliseconds by stage, "preprocess", "postprocess" and "total"; the first answer about a picture includes what
            seeing it took, later ones do not. Of stages that a GPU computes at the same time, each has what it was waited for.
        device_timings: milliseconds that each stage took on its device, its copies included, where the engine can tell.
        tiles: how many pieces the picture was seen in.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    answer: tuple[int, ...] = ()
    verified: bool = False
    anchor_states: np.ndarray | None = None
    anomaly_map: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    timings: dict[str, float] = field(default_factory=dict)
    device_timings: dict[str, float] = field(default_factory=dict)
    tiles: int = 1

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + (time.perf_counter() - started) * 1e3


class _Call:
    """A stage at work for a trace, which takes its outputs and times at its end."""

    def __init__(self, trace: Trace, name: str, pending: Pending) -> None:
        self._trace, self._name, self._pending = trace, name, pending
        self._outputs: dict[str, np.ndarray] | None = None

    def __getitem__(self, output: str) -> Any:
        """An output for another stage: before it is computed where it stays on the device."""
        early = self._pending.resident.get(output)
        return self.end()[output] if early is None else early

    def end(self) -> dict[str, np.ndarray]:
        if self._outputs is None:
            with computing(), self._trace.timed(self._name):
                self._outputs = self._pending.result()
            for name, value in self._outputs.items():
                self._trace.tensors.setdefault(name, value)
            if self._pending.milliseconds is not None:
                times = self._trace.device_timings
                times[self._name] = times.get(self._name, 0.0) + self._pending.milliseconds
        return self._outputs


@dataclass(frozen=True)
class _Ran:
    """What a stage that cannot be queued has computed, as a Pending."""

    outputs: dict[str, np.ndarray]
    resident: Mapping[str, Resident] = field(default_factory=dict)
    milliseconds: float | None = None

    def result(self) -> dict[str, np.ndarray]:
        return self.outputs


@dataclass(frozen=True, eq=False)
class Prepared:
    """A picture as the encoders take it, float32 [3, S, S] and [3, s, s], with what that took."""

    pixel_image: np.ndarray
    semantic_image: np.ndarray
    frame: Frame
    milliseconds: float


class Vision:
    """What one picture contributes to every answer about it.

    Threads may share it: each attribute is replaced whole, and two threads that come first compute the same.

    Attributes:
        frame: the picture's size and place in the encoders' square.
        tensors: outputs of both encoders and SPAM by contract name.
    """

    def __init__(self, frame: Frame, trace: Trace) -> None:
        self.frame = frame
        self.tensors = trace.tensors
        self._timings = trace.timings, trace.device_timings
        self._past: tuple[Past, Past] | None = None
        self._prefix = 0  # tokens
        self._lock = threading.Lock()

    def take_timings(self) -> tuple[dict[str, float], dict[str, float]]:
        """What seeing took, and on the device, once: it is told with the first answer."""
        timings, self._timings = self._timings, ({}, {})
        return dict(timings[0]), dict(timings[1])

    def keep(self, keys: Past, values: Past, tokens: int) -> None:
        """Remember a pass that began with the picture's own `tokens`; nothing is copied until a second answer asks for them."""
        with self._lock:
            self._prefix, self._past = tokens, (keys, values)

    def forget(self) -> None:
        """Let go of what was kept: the next answer computes it again."""
        with self._lock:
            self._past = None

    def past(self) -> tuple[Past, Past] | None:
        """Keys and values [L, 1, H, K, C] of the tokens before the instruction; None before the first pass."""
        with self._lock:
            past, prefix = self._past, self._prefix
        if past is None:
            return None
        cut = _cut(past, prefix)
        with self._lock:
            if self._past is past:  # another thread may have forgotten it meanwhile
                self._past = cut
        return cut


class Chain(Protocol):
    """What an Inspection and a stream ask of: a Pipeline, or one that takes pictures in tiles, each with a vision of its own kind."""

    prompts: PromptEncoder

    def prepare(self, image: np.ndarray, /) -> Any: ...

    def look(self, prepared: Any, /) -> Any: ...

    def answer(self, vision: Any, prompt: Prompt, on_text: Callable[[str], object] | None = None, /) -> Trace: ...


class Embeddings(Protocol):
    """The token table [V, D]: an array, mapped or not, or what reads rows from elsewhere."""

    def __getitem__(self, rows: list[int], /) -> np.ndarray: ...


def first_pass(prompt: Prompt, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the language stage's free axes in the first pass over a picture: N tokens, K of them past, R rows to be answered."""
    draft = (prompt.draft or ())[: prompt.max_new_tokens]
    seen = len(prompt.prefix) + 2 * sizes["T"]  # the picture's tokens, and the aligned ones
    return {"N": seen + len(prompt.suffix) + len(draft[:-1]), "K": 0, "R": max(1, len(draft))}


class Pipeline:
    """Runs pictures through the five stages; holds no state of a request, so threads may share it."""

    def __init__(
        self,
        stages: Mapping[str, Stage],
        preprocessing: Preprocessing,
        prompts: PromptEncoder,
        embeddings: Embeddings,
        sizes: Mapping[str, int],
    ) -> None:
        self.stages = stages
        self.preprocessing = preprocessing
        self.prompts = prompts
        self.embeddings = embeddings
        self._empty_past = np.zeros((sizes["L"], 1, sizes["H"], 0, sizes["C"]), np.float32)

    def run(self, image: np.ndarray, prompt: Prompt, on_text: Callable[[str], object] | None = None) -> Trace:
        """Segment one picture (uint8 RGB [H, W, 3]): `see` and `answer`."""
        return self.answer(self.see(image), prompt, on_text)

    def see(self, image: np.ndarray) -> Vision:
        """Everything about a picture (uint8 RGB [H, W, 3]) that depends on no words: `prepare` and `look`."""
        return self.look(self.prepare(image))

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resize and normalise a picture (uint8 RGB [H, W, 3]) for both encoders; no engine is asked."""
        started = time.perf_counter()
        pixel_image, semantic_image, frame = preprocess.encoder_images(image, self.preprocessing)
        return Prepared(pixel_image, semantic_image, frame, (time.perf_counter() - started) * 1e3)

    def look(self, prepared: Prepared) -> Vision:
        """The encoders and SPAM.

        Raises:
            EngineFailed: a stage could not be computed.
        """
        trace = Trace(timings={"preprocess": prepared.milliseconds, "total": prepared.milliseconds})
        with trace.timed("total"):
            pixel = self._start(trace, "pixel_encoder", pixel_image=prepared.pixel_image[None])
            semantic = self._start(trace, "semantic_encoder", semantic_image=prepared.semantic_image[None])
            features, pixel_embeddings = semantic["semantic_features"], pixel["pixel_embeddings"]
            spam = self._start(trace, "spam", semantic_features=features, pixel_embeddings=pixel_embeddings)
            for call in (pixel, semantic, spam):
                call.end()
        return Vision(prepared.frame, trace)

    def answer(self, vision: Vision, prompt: Prompt, on_text: Callable[[str], object] | None = None) -> Trace:
        """One instruction's answer and map.

        Args:
            on_text: called with each new piece of the answer as it is written, see TextStream; a confirmed draft comes in one.

        Raises:
            EngineFailed: a stage could not be computed; NotFinite: the language stage chose among logits that are NaN.
        """
        timings, device_timings = vision.take_timings()
        trace = Trace(dict(vision.tensors), timings=timings, device_timings=device_timings)
        with trace.timed("total"):
            states = self._generate(trace, vision, prompt, TextStream(self.prompts.decode, on_text) if on_text else None)
            anchors = self.prompts.find_anchors(trace.answer)
            if anchors is None:
                trace.anomaly_map = np.zeros((vision.frame.height, vision.frame.width), np.float32)
                return trace
            shift = 1 + self.prompts.state_shift  # row i stands at token i - 1
            trace.anchor_states = states[None, [index + shift for index in anchors]]
            pixel_embeddings = vision.tensors["pixel_embeddings"]
            maps = self._stage(trace, "mask_decoder", anchor_states=trace.anchor_states, pixel_embeddings=pixel_embeddings)
            with trace.timed("postprocess"):
                trace.anomaly_map = preprocess.restore(maps["anomaly_map"][0], vision.frame)
        return trace

    def _stage(self, trace: Trace, name: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        return self._start(trace, name, **feeds).end()

    def _start(self, trace: Trace, name: str, **feeds: np.ndarray) -> _Call:
        """Queue a stage's work, or do it where its engine does not queue."""
        stage = self.stages[name]
        start = getattr(stage, "start", None)
        with computing(), trace.timed(name):
            pending = start(feeds) if start is not None else _Ran(stage.run(feeds))
        return _Call(trace, name, pending)

    def _generate(self, trace: Trace, vision: Vision, prompt: Prompt, stream: TextStream | None) -> np.ndarray:
        """Fill in `answer` and `verified`; return the states [A, D] that predicted each token."""
        draft = (prompt.draft or ())[: prompt.max_new_tokens]
        embeddings = self._embed(prompt.suffix + draft[:-1])  # [1, N, D]
        past = vision.past()
        if past is None:
            seen = [self._embed(prompt.prefix), vision.tensors["image_embeddings"], vision.tensors["aligned_embeddings"]]
            embeddings = _joined([*seen, embeddings])
        keys, values = past or (self._empty_past, self._empty_past)
        start = keys.shape[3]
        question = embeddings.shape[1] - len(draft[:-1])  # tokens of this pass without the draft
        rows = np.arange(question - 1, embeddings.shape[1], dtype=np.int64)
        output = self._language(trace, embeddings, keys, values, rows)
        if past is None:
            vision.keep(output["present_keys"], output["present_values"], question - len(prompt.suffix))
        said = output["logits"][0].argmax(axis=-1)  # [A]
        agreed = next((i for i, token in enumerate(draft) if token != said[i]), len(draft))
        states = [output["states"][0, : agreed + 1]]
        confirmed = bool(draft) and agreed == len(draft)
        trace.verified = confirmed and draft == prompt.draft  # not one that the limit cut
        answer = list(draft) if confirmed else [*draft[:agreed], int(said[agreed])]
        if not confirmed:
            keys, values = _cut((output["present_keys"], output["present_values"]), start + question + agreed)
        last_row = np.zeros(1, np.int64)
        while not confirmed and answer[-1] != self.prompts.end_id and len(answer) < prompt.max_new_tokens:
            if stream:
                stream.update(answer)
            output = self._language(trace, self._embed((answer[-1],)), keys, values, last_row)
            keys, values = output["present_keys"], output["present_values"]
            states.append(output["states"][0])
            answer.append(int(output["logits"][0, 0].argmax()))
        if stream:
            stream.end(answer)
        trace.answer = tuple(answer)
        return np.concatenate(states)

    def _language(self, trace: Trace, embeddings: np.ndarray, keys: Past, values: Past, rows: np.ndarray) -> dict[str, np.ndarray]:
        start = keys.shape[3]
        positions = np.arange(start, start + embeddings.shape[1], dtype=np.int64)[None]
        output = self._stage(
            trace,
            "language",
            input_embeddings=embeddings,
            positions=positions,
            past_keys=cast(np.ndarray, keys),
            past_values=cast(np.ndarray, values),
            rows=rows,
        )
        _check_logits(trace, output["logits"])
        return output

    def _embed(self, ids: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self.embeddings[list(ids)], np.float32)[None]


def _joined(parts: list[Any]) -> Any:
    """Parts [1, n, D] as [1, sum of n, D]: by the engine where one of them is on its device."""
    return np.concatenate(parts, axis=1) if all(isinstance(part, np.ndarray) for part in parts) else Joined(parts)


def _cut(past: tuple[Past, Past], tokens: int) -> tuple[Past, Past]:
    """The first `tokens` of keys and values [L, 1, H, K, C], contiguous; themselves, not copied, where they have no more.

    From a GPU they are fetched to be cut: after an answer that was not the expected one, and for a second question about a picture.
    """
    if past[0].shape[3] == tokens:
        return past
    keys, values = (np.ascontiguousarray(np.asarray(array)[:, :, :, :tokens]) for array in past)
    return keys, values


def _check_logits(trace: Trace, logits: np.ndarray) -> None:
    """Refuse logits with NaN: arg-max would make token 0 of them, an answer without anchors, an empty mask and so an "OK".

    A NaN of the encoders arrives here too. Rows' maxima suffice, since NumPy's maximum of anything with a NaN is NaN.
    """
    if np.isfinite(logits.max(axis=-1)).all():
        return
    bad = [
        f"stage {stage.name} computed NaN or infinity in {tensor.name}"
        for stage in STAGES.values()
        for tensor in stage.outputs
        if tensor.name in trace.tensors and not np.isfinite(trace.tensors[tensor.name]).all()
    ]
    first = bad[0] if bad else "stage language computed NaN or infinity in logits of a later pass"
    raise NotFinite(f"{first}; use another engine, or a bundle of higher precision (fp16 ends at 65504)", trace.tensors)
