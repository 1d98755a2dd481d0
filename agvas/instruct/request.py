"""What the model is asked: system prompt, one example, three pictures and a sentence of knowledge, as an OpenAI-compatible chat request.

The pictures show what the answer must not mention; the constraints of the system prompt say so, answers.py checks it. The prompt is our
own wording after the paper's description (A.2). Whatever changes an answer belongs to PROMPT_VERSION, which is a hash of these texts:
samples described with an older prompt are described again.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from agvas.instruct.answers import FIELDS, LENGTHS

__all__ = ["PROMPT_VERSION", "SYSTEM_PROMPT", "RequestSettings", "first_request", "knowledge_sentence", "with_reasons"]

_EXAMPLE = {
    "expectation": "A normal ceramic tile has a smooth, evenly glazed surface with straight edges and four intact corners.",
    "observation": "At the lower right corner a triangular piece is missing, about a tenth of the tile's side long; the break is rough, "
    "brighter than the glaze, and a hairline crack runs from it towards the middle.",
    "diagnosis": "The glaze and the body below it are broken away, so the outline is no longer square and the crack weakens the tile.",
    "summary": "A rough, bright triangular chip at the lower right corner with a thin crack running inwards from it: [NOR][ANO][SEG].",
    "explanation": "A sound tile shows an unbroken glaze up to four sharp corners. Here the lower right corner ends in a rough, bright "
    "fracture instead of a smooth edge, and a fine dark line continues from the fracture into the surface. Material has broken away and "
    "the damage has begun to spread, which is why this corner is a chip and not a variation of colour.",
}

SYSTEM_PROMPT = f"""You are an experienced inspector of industrial parts and materials. You describe one anomalous picture so that a \
vision model can learn from your words what an anomaly is, where it lies and why it is one.

You are shown three pictures: the inspected picture with the anomalous regions framed, the same picture with these regions tinted, and a \
normal specimen of the same category. You are also told in one sentence what is known already. They help you to be right. The reader of \
your words sees only the plain inspected picture.

Write a JSON object with exactly these five fields, all of them plain English text:
- "expectation": one sentence on how a normal specimen looks; nothing about the anomaly. {LENGTHS["expectation"][1]} characters at most.
- "observation": the visible deviations: location in the picture, shape, size relative to the object, colour, texture. \
{LENGTHS["observation"][1]} characters at most.
- "diagnosis": why these deviations break the normal material, shape or structure. {LENGTHS["diagnosis"][1]} characters at most.
- "summary": one concise sentence with the look and the location of what is to be segmented, ending with the three tokens \
[NOR][ANO][SEG] exactly so. {LENGTHS["summary"][1]} characters at most.
- "explanation": one coherent paragraph that joins all of the above. {LENGTHS["explanation"][0]} to {LENGTHS["explanation"][1]} characters.

Rules, without exception:
1. Describe only what can be seen in the plain inspected picture. Write as if you had seen nothing else and had been told nothing.
2. Never mention ground truth, annotations, masks, boxes, frames, outlines, tints, overlays or highlighted regions, in any form of these \
words, nor their colours.
3. Never mention a reference, a comparison, a normal specimen's picture, or that there are several pictures.
4. Never mention prior knowledge, or that something was given to you or provided.
5. The tokens [NOR], [ANO] and [SEG] stand once each, in this order, and only in the summary.
6. Describe every anomalous region; where there are many alike, describe them together with where they lie.
7. Locations are those of the picture as you see it (upper left, centre, along the right edge), not coordinates.
8. If you are unsure what caused a deviation, describe it without naming a cause.
9. Answer with the JSON object alone: no code fence, no words before or after it.

Example of an answer, for a chipped tile:
{json.dumps(_EXAMPLE, indent=1)}"""

_PICTURE_LABELS = (
    "Inspected picture, anomalous regions framed in green:",
    "Inspected picture, anomalous regions tinted red:",
    "Normal specimen of the same category:",
)
_TASK = "{knowledge} Describe the inspected picture as a JSON object with the fields {fields}."
_REFUSED = "Your answer cannot be used:\n{reasons}\nWrite the whole JSON object again, correct these points and keep every rule."


PROMPT_VERSION = hashlib.sha256("\n".join((SYSTEM_PROMPT, *_PICTURE_LABELS, _TASK, _REFUSED)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RequestSettings:
    """What is set about every request.

    Attributes:
        model: name that the endpoint knows.
        temperature, max_tokens: sent only where set: not every endpoint takes them, and each has its own default.
        json_mode: ask the endpoint for JSON (response_format json_object); not every endpoint can.
        max_side: longer side of the pictures sent, in pixels.
    """

    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    json_mode: bool = False
    max_side: int = 1024


def knowledge_sentence(category: str, kind: str | None, explanation: str | None) -> str:
    """One sentence of prior knowledge (A.2): the category, the anomaly's type and its explanation, as far as they are known."""
    told = f"It is known that the object is of the category {_words(category)!r} and that it is anomalous"
    if kind:
        told += f", that the anomaly is of the type {_words(kind)!r}"
    if explanation:
        told += f", and that this means: {' '.join(explanation.split()).rstrip('.')}"
    return told + "."


def first_request(settings: RequestSettings, jpegs: tuple[bytes, bytes, bytes], knowledge: str) -> dict[str, Any]:
    """The body of the first request about one sample: boxed picture, tinted picture and reference, all JPEG."""
    content: list[dict[str, Any]] = []
    for label, jpeg in zip(_PICTURE_LABELS, jpegs, strict=True):
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
        content += [{"type": "text", "text": label}, {"type": "image_url", "image_url": {"url": url}}]
    content.append({"type": "text", "text": _TASK.format(knowledge=knowledge, fields=", ".join(FIELDS))})
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}],
    }
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.max_tokens is not None:
        body["max_tokens"] = settings.max_tokens
    if settings.json_mode:
        body["response_format"] = {"type": "json_object"}
    return body


def with_reasons(first: dict[str, Any], answer: str, reasons: list[str]) -> dict[str, Any]:
    """The request that follows a refused answer: the first one, that answer and the reasons. Older refused answers are left out."""
    refused = _REFUSED.format(reasons="\n".join(f"- {reason}" for reason in reasons))
    # Some endpoints refuse an empty message.
    told = [{"role": "assistant", "content": answer or "(no answer)"}, {"role": "user", "content": refused}]
    return {**first, "messages": [*first["messages"], *told]}


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").split())
