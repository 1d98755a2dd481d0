"""Do the full-size stages export? SAM ViT-H and a two-layer full-width Qwen2-7B, random weights, against transformers' own modules, and two
full-width layers of each other pixel encoder of the paper's table 7 against the reference's (tests hold that to transformers').

    python -m benchmarks.full_size_stages --output benchmarks/results/full_size_stages.json
    python -m benchmarks.full_size_stages --models pixel_encoders --output benchmarks/results/full_size_pixel_encoders.json

Needs about 16 GB of memory and some minutes (5 for pixel_encoders); a person runs it, the tests do not. Whole checkpoints are another
matter: this shows that sizes alone break nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from agvas.config import AGVASConfig, PixelEncoderConfig, ov_7b
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
# At the widths and picture sizes that they are published in.
PIXEL_ENCODERS = {
    "sam_vit_b": PixelEncoderConfig(1024, 16, 768, LAYERS, 12, 3072, 14, (1,)),
    "sam_vit_l": PixelEncoderConfig(1024, 16, 1024, LAYERS, 16, 4096, 14, (1,)),
    "clip_vit_l": PixelEncoderConfig(336, 14, 1024, LAYERS, 16, 4096, 0, (), kind="clip"),
    "siglip_so400m": PixelEncoderConfig(378, 14, 1152, LAYERS, 16, 4304, 0, (), kind="siglip"),
    "dinov2_vit_l": PixelEncoderConfig(518, 14, 1024, LAYERS, 16, 4096, 0, (), kind="dinov2"),
    "dinov3_vit_l": PixelEncoderConfig(512, 16, 1024, LAYERS, 16, 4096, 0, (), kind="dinov3", registers=4),
}


def sam_h(folder: Path) -> dict[str, Any]:
    """The pixel encoder at full size; the oracle is SamVisionEncoder itself."""
    return _pixel_encoder(ov_7b(), folder)


def pixel_encoders(folder: Path) -> dict[str, Any]:
    """Each of PIXEL_ENCODERS; the oracle is the reference's module."""
    found, config = {}, ov_7b()
    for name, pixel in PIXEL_ENCODERS.items():
        (folder / name).mkdir()
        settings = dataclasses.replace(config.preprocessing, pixel_size=pixel.image_size)
        found[name] = _pixel_encoder(dataclasses.replace(config, pixel=pixel, preprocessing=settings), folder / name)
        shutil.rmtree(folder / name)
    return found


def _pixel_encoder(config: AGVASConfig, folder: Path) -> dict[str, Any]:
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
    models: dict[str, Callable[[Path], dict[str, Any]]] = {"sam_vit_h": sam_h, f"qwen2_7b_{LAYERS}_layers": language_two_layers}
    models["pixel_encoders"] = pixel_encoders
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(models)[:2], help="default: the first two")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"engine": "onnxruntime, CPU, fp32"}
    for name in options.models:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            result[name] = models[name](folder)
        finally:
            shutil.rmtree(folder)
        print(name, json.dumps(result[name]), flush=True)
    result["environment"] = environment()
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
