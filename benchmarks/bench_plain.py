"""A plain torch.onnx export: the reference's own pass with the fixed answer as one graph, nothing changed for deployment.

    python -m benchmarks.bench_plain CHECKPOINT FOLDER

What somebody gets who calls torch.onnx.export on the model and runs the file: the head on every answer position, all rows of the last
layer, SAM's attention as transformers writes it. It needs a process of its own, so that torch does not count into the candidate's memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agvas import AGVAS, load
from runtime.prompts import Prompt


class Plain(nn.Module):
    """Both images → answer logits [B, A, V] and anomaly map [B, M, M]: AGVAS.forward with the default instruction and its answer."""

    def __init__(self, model: AGVAS, prompt: Prompt) -> None:
        super().__init__()
        self.model, self.prompt = model, prompt

    def forward(self, pixel_image: Tensor, semantic_image: Tensor) -> tuple[Tensor, Tensor]:
        assert self.prompt.draft is not None
        output = self.model(pixel_image, semantic_image, [self.prompt], [self.prompt.draft])
        return output.logits, output.maps.anomaly_map


def export_plain(checkpoint: str, folder: Path) -> None:
    """Write plain.onnx and plain.json (what a caller must know: preprocessing, how masks are cut, the answer's tokens) into `folder`.

    Raises:
        CheckpointError: see agvas.load.
        ValueError: the checkpoint has no fixed answer.
    """
    model = load(checkpoint)
    prompt = model.prompt_encoder.encode()
    if prompt.draft is None:
        raise ValueError(f"{checkpoint}: expected a fixed answer in direct mode, got none; a plain export cannot generate")
    config = model.config
    inputs = (
        torch.randn(1, 3, config.pixel.image_size, config.pixel.image_size),
        torch.randn(1, 3, config.semantic.image_size, config.semantic.image_size),
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.language.config.use_cache = False
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Plain(model, prompt).eval(),
            inputs,
            dynamo=True,
            input_names=["pixel_image", "semantic_image"],
            output_names=["logits", "anomaly_map"],
            external_data=True,
            verbose=False,
        )
    assert program is not None
    program.save(folder / "plain.onnx", external_data=True)
    rule = asdict(config.mask_decoder.mask_rule)
    told = {"preprocessing": asdict(config.preprocessing), "mask_rule": rule, "draft": list(prompt.draft)}
    (folder / "plain.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    export_plain(sys.argv[1], Path(sys.argv[2]))
