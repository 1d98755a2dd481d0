"""The chain of stages on one picture: what goes from which stage to which, and how an answer is verified or written.

Direct mode is one language pass: the expected answer is appended as a draft, and the same pass yields the model's own choice at each
of its positions. Where they agree throughout, greedy generation would have said exactly this; from the first disagreement on,
the pipeline generates, reusing the keys and values up to there. So the result is the reference's greedy result always.

Stages are anything with `run(feeds)`: engines, or torch modules when export checks this glue against AGVAS.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from engines.errors import EngineFailed
from runtime import preprocess
from runtime.contract import STAGES
from runtime.preprocess import Preprocessing
from runtime.prompts import Prompt, PromptEncoder


class Stage(Protocol):
    """One graph of the contract."""

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


@dataclass
class Trace:
    """Everything one picture left behind on its way.

    Attributes:
        tensors: every stage's outputs by contract name, of the first language pass where there were several.
        answer: token ids said, end token included when it was reached.
        verified: the draft was confirmed; False where the model wrote its own answer.
        anchor_states: float32 [1, 3, D], None when the answer lacks an anchor.
        anomaly_map: float32 [H, W] at the picture's size; zeros when the answer lacks an anchor.
        timings: milliseconds by stage, "preprocess", "postprocess" and "total".
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    answer: tuple[int, ...] = ()
    verified: bool = False
    anchor_states: np.ndarray | None = None
    anomaly_map: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + (time.perf_counter() - started) * 1e3


class Pipeline:
    """Runs pictures through the five stages; holds no state of a request, so threads may share it."""

    def __init__(
        self,
        stages: Mapping[str, Stage],
        preprocessing: Preprocessing,
        prompts: PromptEncoder,
        embeddings: np.ndarray,
        sizes: Mapping[str, int],
    ) -> None:
        self.stages = stages
        self.preprocessing = preprocessing
        self.prompts = prompts
        self.embeddings = embeddings
        self._empty_past = np.zeros((sizes["L"], 1, sizes["H"], 0, sizes["C"]), np.float32)

    def run(self, image: np.ndarray, prompt: Prompt) -> Trace:
        """Segment one picture (uint8 RGB [H, W, 3]).

        Raises:
            EngineFailed: a stage could not be computed, or the language stage chose among logits that are NaN.
        """
        trace = Trace()
        with trace.timed("total"):
            with trace.timed("preprocess"):
                pixel_image, semantic_image, frame = preprocess.encoder_images(image, self.preprocessing)
            self._stage(trace, "pixel_encoder", pixel_image=pixel_image[None])
            self._stage(trace, "semantic_encoder", semantic_image=semantic_image[None])
            pixel_embeddings = trace.tensors["pixel_embeddings"]
            self._stage(trace, "spam", semantic_features=trace.tensors["semantic_features"], pixel_embeddings=pixel_embeddings)
            states = self._answer(trace, prompt)
            anchors = self.prompts.find_anchors(trace.answer)
            if anchors is None:
                trace.anomaly_map = np.zeros(image.shape[:2], np.float32)
                return trace
            shift = 1 + self.prompts.state_shift  # row i stands at token i - 1
            trace.anchor_states = states[None, [index + shift for index in anchors]]
            self._stage(trace, "mask_decoder", anchor_states=trace.anchor_states, pixel_embeddings=pixel_embeddings)
            with trace.timed("postprocess"):
                trace.anomaly_map = preprocess.restore(trace.tensors["anomaly_map"][0], frame)
        return trace

    def _stage(self, trace: Trace, name: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        with trace.timed(name):
            outputs = self.stages[name].run(feeds)
        for key, value in outputs.items():
            trace.tensors.setdefault(key, value)
        return outputs

    def _answer(self, trace: Trace, prompt: Prompt) -> np.ndarray:
        """Fill in `answer` and `verified`; return the states [A, D] that predicted each token."""
        limit = self.prompts.prompts.max_new_tokens
        draft = (prompt.draft or ())[:limit]
        embeddings = np.concatenate(
            [
                self._embed(prompt.prefix),
                trace.tensors["image_embeddings"],
                trace.tensors["aligned_embeddings"],
                self._embed(prompt.suffix + draft[:-1]),
            ],
            axis=1,
        )  # [1, N, D]
        length = embeddings.shape[1] - len(draft[:-1])  # of the prompt alone
        rows = np.arange(length - 1, embeddings.shape[1], dtype=np.int64)
        output = self._language(trace, embeddings, 0, self._empty_past, self._empty_past, rows)
        said = output["logits"][0].argmax(axis=-1)  # [A]
        agreed = next((i for i, token in enumerate(draft) if token != said[i]), len(draft))
        states = [output["states"][0, : agreed + 1]]
        if draft and agreed == len(draft):
            trace.answer, trace.verified = draft, True
            return states[0]
        answer = [*draft[:agreed], int(said[agreed])]
        keys, values = (output[name][:, :, :, : length + agreed] for name in ("present_keys", "present_values"))
        last_row = np.zeros(1, np.int64)
        while answer[-1] != self.prompts.end_id and len(answer) < limit:
            output = self._language(trace, self._embed((answer[-1],)), keys.shape[3], keys, values, last_row)
            keys, values = output["present_keys"], output["present_values"]
            states.append(output["states"][0])
            answer.append(int(output["logits"][0, 0].argmax()))
        trace.answer = tuple(answer)
        return np.concatenate(states)

    def _language(
        self, trace: Trace, embeddings: np.ndarray, start: int, keys: np.ndarray, values: np.ndarray, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        positions = np.arange(start, start + embeddings.shape[1], dtype=np.int64)[None]
        output = self._stage(
            trace,
            "language",
            input_embeddings=embeddings,
            positions=positions,
            past_keys=np.ascontiguousarray(keys),
            past_values=np.ascontiguousarray(values),
            rows=rows,
        )
        _check_logits(trace, output["logits"])
        return output

    def _embed(self, ids: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self.embeddings[list(ids)], np.float32)[None]


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
    raise EngineFailed(f"{first}; use another engine, or a bundle of higher precision (fp16 ends at 65504)")
