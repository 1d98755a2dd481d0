"""What one training step sees of one picture: the picture, a question, the answer wanted and the truth of its anchors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TrainingSample:
    """One picture with one question.

    Attributes:
        image: uint8 RGB [H, W, 3].
        instruction: the question, without the conversation's control tokens.
        answer: the answer wanted, anchors written out, without the end token. All three anchors where there is a mask.
        mask: bool [H, W], True where [SEG] and [ANO] should be; all False on a normal picture; None where nothing is to be segmented (a
            conversation), and no mask loss is computed.
        relative: whether [NOR] and [ANO] are supervised too: only anomaly sources teach them (paper B.1).
        origin: the picture's file, for errors; None where there is none.
    """

    image: npt.NDArray[np.uint8]
    instruction: str
    answer: str
    mask: npt.NDArray[np.bool_] | None
    relative: bool
    origin: Path | None = None
