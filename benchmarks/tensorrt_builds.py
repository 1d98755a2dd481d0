"""What TensorRT-RTX engines cost to build ahead of time, with no GPU, and how many attentions become one kernel.

    python -m benchmarks.tensorrt_builds --models sam_vit_h siglip_so400m --output benchmarks/results/tensorrt_rtx_builds.json
    python -m benchmarks.tensorrt_builds --models nano_pixel_encoder nano_semantic_encoder nano_spam nano_language nano_mask_decoder
        --output benchmarks/results/tensorrt_rtx_builds_nano.json
    python -m benchmarks.tensorrt_builds --models nano_language_int4 qwen2_7b_2_layers qwen2_7b_2_layers_int4
        --output benchmarks/results/tensorrt_rtx_builds_int4.json

Every stage of nano, SAM ViT-H's and SigLIP so400m's encoders at full size and two full-width layers of Qwen2-7B (with a head of 1,024
words), with random weights, in fp16, for GeForce and RTX cards of three generations; both language models with their layers in 4 bit, too
(plain rounding: what a build costs does not depend on the codes). Nothing is run: speed and masks are for a machine with such a GPU. Needs
about 7 GB of memory while SAM ViT-H is exported; each export and each build is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import environment
from engines.tensorrt_builder import BuildRequest, build
from engines.tensorrt_library import TENSORRT_RTX, version
from runtime.contract import STAGES
from runtime.engine_builds import profile_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from calibration.weights import IntegerWeight

CAPABILITIES = ("8.6", "8.9", "12.0")  # Ampere, Ada, Blackwell
# As agvas-build makes them of nano's prompts.
FREE = ({"B": 1, "N": 1, "K": 0, "R": 1}, {"B": 1, "N": 233, "K": 0, "R": 10}, {"B": 1, "N": 490, "K": 586, "R": 10})
FULL_SIZE = {"sam_vit_h": "pixel_encoder", "siglip_so400m": "semantic_encoder", "qwen2_7b_2_layers": "language"}
IN_4_BIT = {"nano_language_int4": 32, "qwen2_7b_2_layers_int4": 128}  # groups, as agvas-export takes them
MODELS = {**{f"nano_{stage}": stage for stage in STAGES}, **FULL_SIZE, **dict.fromkeys(IN_4_BIT, "language")}


def export(name: str, precision: str, folder: Path) -> None:
    """Write a model's graph, and sizes.json beside it. In a process of its own: what torch allocated is gone with it."""
    import torch

    from agvas.checkpoint import load
    from agvas.config import ov_7b
    from agvas.encoders import SemanticEncoder, pixel_encoder
    from benchmarks.full_size_stages import two_layers
    from export.adapters import LanguageStage, PixelEncoderStage, SemanticEncoderStage, axis_sizes
    from export.integer_weights import store_integers
    from export.onnx_writer import export_stage, stage_module, write
    from export.passes import lower_precision

    stage = MODELS[name]
    torch.manual_seed(0)
    if name.startswith("nano_"):
        model = load("nano")
        config, module = model.config, stage_module(model, stage)
    else:
        config = ov_7b()
        holder = argparse.Namespace()
        if stage == "pixel_encoder":
            holder.pixel_encoder = pixel_encoder(config.pixel)
            module = PixelEncoderStage(holder).eval()  # type: ignore[arg-type]
        elif stage == "language":
            config, holder.language = two_layers(vocabulary=1024)
            module = LanguageStage(holder).eval()  # type: ignore[arg-type]
        else:
            holder.semantic_encoder = SemanticEncoder(config)
            module = SemanticEncoderStage(holder).eval()  # type: ignore[arg-type]
    graph = export_stage(module, stage, axis_sizes(config))
    if name in IN_4_BIT:
        store_integers(graph, _rounded(graph, IN_4_BIT[name]))
    if precision != "fp32":
        lower_precision(graph, precision)
    write(graph, folder, stage)
    (folder / "sizes.json").write_text(json.dumps(axis_sizes(config)))


def _rounded(graph: ir.Model, group: int) -> dict[str, IntegerWeight]:
    """A language graph's decoder layers in 4 bit, by the names of their products."""
    import torch

    from agvas.weights import LazyTensor
    from calibration.gptq import GPTQSettings, rounded_to_nearest
    from export.integer_weights import linears

    def of(weight: ir.Value) -> LazyTensor:  # stored [K, N]
        inputs, outputs = weight.const_value.shape
        return LazyTensor((outputs, inputs), torch.float32, lambda: torch.from_numpy(weight.const_value.numpy().T.copy()).float())

    settings = GPTQSettings(bits=4, group=group)
    products = {name: node for name, node in linears(graph).items() if name.startswith("layers.")}
    return {name: rounded_to_nearest(of(node.inputs[1]), settings, name) for name, node in products.items()}


def measure(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Export a model and build it for every capability: {"graph_bytes", "builds": {capability: BuildReport}}."""
    stage = MODELS[name]
    command = [sys.executable, "-m", "benchmarks.tensorrt_builds", "--export", name, "--precision", precision, "--folder", str(folder)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    profile = profile_of(stage, json.loads((folder / "sizes.json").read_text()), *FREE)
    graph = folder / f"{stage}.onnx"
    found: dict[str, Any] = {"graph_bytes": sum(path.stat().st_size for path in folder.glob(f"{stage}.*")), "builds": {}}
    for capability in CAPABILITIES:
        report = build(BuildRequest(TENSORRT_RTX, str(graph), str(folder / "engine"), capability, profile), folder / "log")
        found["builds"][capability] = asdict(report)
        print(name, capability, json.dumps(asdict(report)), flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--folder", type=Path, help="where the graphs go (about 5 GB; default a temporary folder)")
    parser.add_argument("--precision", default="fp16", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--export", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.export:
        export(options.export, options.precision, options.folder)
        return 0
    result: dict[str, Any] = {"engine": f"{TENSORRT_RTX} {version(TENSORRT_RTX)}", "precision": options.precision, "models": {}}
    for name in options.models:
        folder = Path(tempfile.mkdtemp(dir=options.folder)).absolute()
        try:
            result["models"][name] = measure(name, options.precision, folder)
        finally:
            shutil.rmtree(folder)
    result["environment"] = environment()
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
