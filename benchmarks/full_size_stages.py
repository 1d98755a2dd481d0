"""Do the full-size stages export? SAM ViT-H and a two-layer full-width Qwen2-7B, random weights, against transformers' own modules.

    python -m benchmarks.full_size_stages --output benchmarks/results/full_size_stages.json

Needs about 16 GB of memory and some minutes; a person runs it, the tests do not. Whole checkpoints are another matter: this shows that
sizes alone break nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from agvas.config import AGVASConfig, ov_7b
from agvas.encoders import language_model, pixel_encoder
from benchmarks.environment import environment
from engines import open_engine
from export.adapters import LanguageStage, PixelEncoderStage, axis_sizes
from export.onnx_writer import export_stage, write
from runtime.contract import STAGES
from runtime.parity import relative_error
from runtime.verify import peak_rss_bytes

LAYERS = 2
TOKENS, ROWS = 50, 8


def sam_h(folder: Path) -> dict[str, Any]:
    """The pixel encoder at full size; the oracle is SamVisionEncoder itself."""
    config = ov_7b()
    torch.manual_seed(0)
    encoder = pixel_encoder(config.pixel).eval()
    _spread(encoder)
    image = torch.randn(1, 3, config.pixel.image_size, config.pixel.image_size)
    with torch.inference_mode():
        wanted = encoder(image).last_hidden_state.numpy()
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    stage = PixelEncoderStage(SimpleNamespace(pixel_encoder=encoder))  # type: ignore[arg-type]
    feeds = {"pixel_image": image.numpy()}
    return _export_and_compare(stage, "pixel_encoder", axis_sizes(config), feeds, {"pixel_embeddings": wanted}, folder, parameters)


def two_layers(vocabulary: int | None = None) -> tuple[AGVASConfig, nn.Module]:
    """Two Qwen2-7B layers with their head (of that many words; None: of all), and the config of an AG-VAS with them."""
    config = ov_7b()
    words = config.language.vocabulary if vocabulary is None else vocabulary
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, layers=LAYERS, vocabulary=words))
    torch.manual_seed(0)
    with torch.device("meta"):
        language = language_model(config.language)
    language.to_empty(device="cpu")
    _spread(language)
    rotary = language.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq = rotary.compute_default_rope_parameters(rotary.config)[0]
    return config, language.eval()


def language_two_layers(folder: Path) -> dict[str, Any]:
    """Against Qwen2ForCausalLM over all rows."""
    config, language = two_layers()
    embeddings = torch.randn(1, TOKENS, config.language.width)
    with torch.inference_mode():
        output = language(inputs_embeds=embeddings, output_hidden_states=True)
    wanted = {
        "states": output.hidden_states[-1][:, -ROWS:].numpy(),
        "logits": output.logits[:, -ROWS:].numpy(),
    }
    sizes = axis_sizes(config)
    past = np.zeros((LAYERS, 1, sizes["H"], 0, sizes["C"]), np.float32)
    feeds = {
        "input_embeddings": embeddings.numpy(),
        "positions": np.arange(TOKENS)[None],
        "past_keys": past,
        "past_values": past.copy(),
        "rows": np.arange(TOKENS - ROWS, TOKENS),
    }
    parameters = sum(parameter.numel() for parameter in language.parameters())
    stage = LanguageStage(SimpleNamespace(language=language))  # type: ignore[arg-type]
    return _export_and_compare(stage, "language", sizes, feeds, wanted, folder, parameters)


def _spread(module: nn.Module) -> None:
    """Weights at the scale of trained ones, positions included, so that no path is multiplied by zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(std=0.02)


def _export_and_compare(
    stage: nn.Module,
    name: str,
    sizes: dict[str, int],
    feeds: dict[str, np.ndarray],
    wanted: dict[str, np.ndarray],
    folder: Path,
    parameters: int,
) -> dict[str, Any]:
    started = time.monotonic()
    graph = export_stage(stage, name, sizes)
    write(graph, folder, name)
    seconds = time.monotonic() - started
    del graph
    outputs = open_engine(folder / f"{name}.onnx", STAGES[name], "onnxruntime").run(feeds)
    return {
        "parameters": parameters,
        "export_seconds": round(seconds, 1),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "relative_error": {key: relative_error(outputs[key], value) for key, value in wanted.items()},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--folder", type=Path, help="where the graphs go (about 10 GB; default a temporary folder)")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"engine": "onnxruntime, CPU, fp32"}
    for name, run in (("sam_vit_h", sam_h), (f"qwen2_7b_{LAYERS}_layers", language_two_layers)):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            result[name] = run(folder)
        finally:
            shutil.rmtree(folder)
        print(name, json.dumps(result[name]), flush=True)
    result["environment"] = environment()
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
