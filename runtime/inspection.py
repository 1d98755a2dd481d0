"""One picture under inspection: looked at once, asked about as often as need be.

The encoders have run before it is made, and what the language model keeps of the picture is kept from the first answer on; so a second
instruction costs its own words and nothing of the picture. Each answer is what a fresh call would give. `Segmenter.inspect` makes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from engines import EngineFailed
from runtime.errors import RequestError
from runtime.masking import MaskRule
from runtime.pipeline import Chain
from runtime.prompts import DIRECT, Prompt
from runtime.segmentation import MAP_SLACK, Segmentation


class Inspection:
    """Answers about one picture; threads may share it.

    It holds the picture, the encoders' outputs and the language model's keys and values of them (of a 7B model about 180 MB; in tiles, the
    encoders' outputs of 32 of them, about 30 MB each): drop it when the picture's last question is answered.

    Args:
        image: uint8 RGB [H, W, 3].
        vision: what the chain saw in it.
        rule: how masks are cut from maps.
        engine: named in errors.
        region: bool [H, W], the pixels that every answer is about, see Segmentation.within; None for all.
        warnings: what may have spoiled the picture, in words; every answer has them.
        read_milliseconds: what reading it took: decoding, and a look at whether it shows anything. No answer's timings hold that.
    """

    def __init__(
        self,
        chain: Chain,
        image: np.ndarray,
        vision: Any,
        rule: MaskRule,
        engine: str,
        *,
        region: np.ndarray | None = None,
        warnings: tuple[str, ...] = (),
        read_milliseconds: float = 0.0,
    ) -> None:
        self.image = image
        self.rule = rule
        self.region = region
        self.warnings = warnings
        self.read_milliseconds = read_milliseconds
        self._engine = engine
        self._chain = chain
        self._vision = vision

    def ask(
        self,
        instruction: str | None = None,
        mode: str = DIRECT,
        *,
        normal_state: str | None = None,
        max_new_tokens: int | None = None,
        on_text: Callable[[str], object] | None = None,
    ) -> Segmentation:
        """As `Segmenter.__call__`, about this picture."""
        return self.answer(self._chain.prompts.encode(instruction, mode, normal_state, max_new_tokens), on_text)

    def answer(self, prompt: Prompt, on_text: Callable[[str], object] | None = None) -> Segmentation:
        """The answer to a request that was encoded already.

        Raises:
            EngineFailed: the engine could not compute, or computed NaN or a map outside 0..1.
            RequestError: `on_text` for a picture in tiles, or that cannot be called.
        """
        check_callback(on_text)
        trace = self._chain.answer(self._vision, prompt, on_text)
        lowest, score = float(trace.anomaly_map.min()), float(trace.anomaly_map.max())
        # NumPy's maximum of anything with a NaN is NaN; a NaN would pass every threshold as OK.
        if not (math.isfinite(lowest) and math.isfinite(score)):
            raise EngineFailed(
                f"engine {self._engine} computed an anomaly map with NaN or infinity; "
                "agvas-verify tells in which stage it begins. Use another engine, or a bundle of higher precision"
            )
        if lowest < -MAP_SLACK or score > 1 + MAP_SLACK:
            raise EngineFailed(
                f"engine {self._engine} computed an anomaly map of {lowest:g}..{score:g}, expected probabilities in 0..1; "
                "agvas-verify tells in which stage it begins. Use another engine, or a bundle of higher precision"
            )
        said = self._chain.prompts.read(trace.answer)
        mask = self.rule.mask(trace.anomaly_map)
        result = Segmentation(
            mask=mask,
            anomaly_map=trace.anomaly_map,
            score=score,
            is_anomalous=bool(mask.any()),
            text=said.text,
            instruction=prompt.instruction,
            mode=prompt.mode,
            answer_verified=trace.verified,
            anchor_groups=said.anchor_groups,
            truncated=said.truncated,
            rule=self.rule,
            timings=trace.timings,
            device_timings=trace.device_timings,
            image=self.image,
            tiles=trace.tiles,
            warnings=self.warnings,
        )
        return result if self.region is None else result.within(self.region)


def check_callback(on_text: object) -> None:
    """Raises RequestError where it cannot be called."""
    if on_text is not None and not callable(on_text):
        raise RequestError(f"on_text: expected a function of a piece of text (print, for instance), got {on_text!r}; give one or None")
