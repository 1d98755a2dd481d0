"""One full-width Qwen2-7B decoder layer through calibration and GPTQ: time, peak memory, and what 28 of them would take.

    python -m benchmarks.gptq_layer --output benchmarks/results/gptq_layer.json

Random weights and random tokens at the scale of trained ones, channels uneven as activations are; arithmetic does not care. Needs about
8 GB. Seconds are of the processor (one thread: set OMP_NUM_THREADS=1), so that a busy machine does not change them; a GPU's are of the
clock. What grows with the tokens (passes, Hessians) and what does not (factoring, rounding) are told apart, so that the projection to a
whole calibration can be checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agvas.config import LanguageConfig, ov_7b
from agvas.encoders import language_model
from benchmarks.environment import environment
from calibration.calibrate import PASSES, SHARING, quantize_layer
from calibration.gptq import GPTQSettings
from calibration.observers import Ranges
from calibration.truth import linear_of
from runtime.verify import peak_rss_bytes

SAMPLES = 128  # of a whole calibration: agvas-calibrate's default
TOKENS_OF_A_PICTURE = 1536  # 2 x 729 image and aligned tokens, question and answer
LAYERS = ov_7b().language.layers
# Published dense fp32 peaks outside the tensor cores, FLOP/s; half of it is supposed to be reached.
GPU_PEAKS = {"H100": 67e12, "RTX 4090": 83e12}
REACHED = 0.5


def measure(config: LanguageConfig, tokens: int, settings: GPTQSettings, device: str) -> dict[str, Any]:
    """Seconds, memory and errors of one layer on one picture of that many tokens."""
    torch.manual_seed(0)
    small = dataclasses.replace(config, layers=1, vocabulary=8)
    language = language_model(small).to(device).eval()
    layer, rotary = language.model.layers[0], language.model.rotary_emb
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    uneven = torch.randn(config.width, device=device).exp()  # a few channels are far louder than the rest
    hidden = torch.randn(1, tokens, config.width, device=device) * uneven
    positions = torch.arange(tokens, device=device)[None]
    growing = started = 0.0

    def run() -> Tensor:
        nonlocal started
        started = _seconds(device)
        return layer(hidden, position_ids=positions, position_embeddings=rotary(hidden, positions))

    def step() -> None:
        nonlocal growing
        growing += _seconds(device) - started

    before = peak_rss_bytes()
    begun, clock = _seconds(device), time.monotonic()
    with torch.inference_mode():
        _, records = quantize_layer("layer", layer, [run], lambda _, count: torch.ones(count, device=device), settings, Ranges(), step)
        run()
        step()
    return {
        "tokens": tokens,
        "seconds": round(_seconds(device) - begun, 1),
        "seconds_that_grow_with_tokens": round(growing, 1),
        "clock_seconds": round(time.monotonic() - clock, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_bytes_before": before,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
        "linears": {record.name.removeprefix("layer."): _rounded(record.error, record.rounding_error) for record in records},
        "flop": flop(layer, tokens),
    }


def flop(layer: nn.Module, tokens: int) -> dict[str, float]:
    """Multiply-adds counted twice, of the matrix products alone: those that grow with the tokens, and those that do not."""
    shapes = {name: tuple(linear_of(layer, name).weight.shape) for names in SHARING for name in names}
    inputs = [shapes[names[0]][1] for names in SHARING]
    weights = sum(n * k for n, k in shapes.values())
    # Each pass stops at the linears it is for: all five together are less than three whole ones.
    seen, passes = 0, 0
    for names in SHARING:
        passes += seen
        seen += sum(n * k for n, k in (shapes[name] for name in names))
    passes += seen
    assert seen == weights and PASSES == len(SHARING) + 1
    growing = 2.0 * tokens * (passes + sum(k * k for k in inputs))
    # Cholesky k³/3, triangular inverse by a full solve k³; rounding n·k² (half of the columns are still to come, counted twice).
    fixed = sum(4 / 3 * k**3 for k in inputs) + sum(n * k * k for n, k in shapes.values())
    fixed += sum(3 * 2.0 * min(n, 512) * k * k for n, k in shapes.values())  # errors
    return {"growing": growing, "fixed": fixed}


def projection(measured: dict[str, Any]) -> dict[str, Any]:
    """28 layers on 128 pictures of 1,536 tokens: as measured here, and by arithmetic for GPUs."""
    more = SAMPLES * TOKENS_OF_A_PICTURE / measured["tokens"]
    fixed = measured["seconds"] - measured["seconds_that_grow_with_tokens"]
    work = measured["flop"]["growing"] * more + measured["flop"]["fixed"]
    return {
        "layers": LAYERS,
        "pictures": SAMPLES,
        "tokens_of_a_picture": TOKENS_OF_A_PICTURE,
        "hours_here": round(LAYERS * (measured["seconds_that_grow_with_tokens"] * more + fixed) / 3600, 2),
        "hours_here_that_do_not_grow_with_tokens": round(LAYERS * fixed / 3600, 2),
        "petaflop": round(LAYERS * work / 1e15, 2),
        "minutes_on_a_gpu_derived_not_measured": {
            name: round(LAYERS * work / (REACHED * peak) / 60, 1) for name, peak in GPU_PEAKS.items()
        },
        "disk_bytes": 2 * SAMPLES * TOKENS_OF_A_PICTURE * ov_7b().language.width * 4,
    }


def _seconds(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _rounded(error: float, rounding_error: float) -> dict[str, float]:
    return {"error": round(error, 4), "rounding_error": round(rounding_error, 4)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width-divided-by", type=int, choices=(1, 2, 4), default=1, help="a smaller layer, to try it (no projection)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda:N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config, part = ov_7b().language, options.width_divided_by
    config = dataclasses.replace(
        config,
        width=config.width // part,
        mlp_width=config.mlp_width // part,
        heads=config.heads // part,
        key_value_heads=max(1, config.key_value_heads // part),
    )
    settings = GPTQSettings()
    result: dict[str, Any] = {"layer": dataclasses.asdict(config), "settings": dataclasses.asdict(settings), "device": options.device}
    result |= measure(config, options.tokens, settings, options.device)
    if part == 1:
        result["projection"] = projection(result)
    result["environment"] = environment()
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
