"""Do GPTQ checkpoints travel? Ours into gptqmodel and transformers, gptqmodel's into ours; a person runs it in an extra environment.

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install torch==2.13.0
    ENVIRONMENT/bin/pip install gptqmodel==7.6.0 optimum && ENVIRONMENT/bin/python -m benchmarks.gptq_interoperability

torch comes first, or the registry's CUDA build comes with gptqmodel; gptqmodel pins an older numpy than the project's own environment,
which is why this is no test. The model is small and random; compared are logits, between whoever loads a checkpoint and the reference
with the dequantised weights of the same integers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agvas import AGVAS, save
from agvas.checkpoint import open_checkpoint
from agvas.config import tiny
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from benchmarks.environment import environment
from calibration.gptq import GPTQSettings, gptq
from calibration.gptq_checkpoint import GPTQCheckpointError, write_gptq_checkpoint
from calibration.truth import fake_quantize
from calibration.weights import QuantizedWeight
from export.quantisation import LMM, Quantisation, fake_quantised, quantise

# gptqmodel 7.6.0 asks for two workers of one where a machine has two processors, and stops.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
GROUP = 32
# gptqmodel computes in 16 bit, whatever the checkpoint's floats are: logits of random weights agree to a hundredth at best.
TOLERANCE = 2e-2


def small_model() -> AGVAS:
    torch.manual_seed(0)
    config = tiny()
    language = dataclasses.replace(config.language, width=128, mlp_width=256, heads=4, key_value_heads=2, layers=2)
    config = dataclasses.replace(config, language=language)
    return AGVAS(config, train_tokenizer([*all_instructions(), config.prompts.answer], language.vocabulary)).eval()


def our_weights(model: AGVAS, bits: int) -> dict[str, QuantizedWeight]:
    """GPTQ on random inputs: act-order and scale search at work."""
    weights = {}
    for name, layer in model.named_modules():
        if name.startswith("language.model.") and isinstance(layer, nn.Linear):
            inputs = torch.randn(500, layer.in_features) * torch.randn(layer.in_features).exp()
            weights[name] = gptq(layer.weight.detach(), inputs.T @ inputs, GPTQSettings(bits=bits, group=GROUP))
    return weights


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def logits(language: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return language(input_ids=ids).logits


def _add(results: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    results[name] = entry
    print(name, json.dumps(entry), file=sys.stderr, flush=True)


def ours_elsewhere(folder: Path, model: AGVAS, ids: torch.Tensor) -> dict[str, Any]:
    """Checkpoints that we write, loaded by gptqmodel (and by transformers, through optimum)."""
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM

    results: dict[str, Any] = {}
    for bits, layout in ((4, "gptq"), (4, "gptq_v2"), (8, "gptq")):
        weights = our_weights(model, bits)
        wanted = logits(fake_quantize(model, weights).language, ids)
        unquantised = relative(logits(model.language, ids), wanted)
        path = folder / f"ours-{bits}-{layout}"
        write_gptq_checkpoint(model, weights, path, layout)
        loaded = {"gptqmodel": GPTQModel.load(str(path), device="cpu", backend=BACKEND.TORCH).model}
        if find_spec("optimum"):
            loaded["transformers"] = AutoModelForCausalLM.from_pretrained(path)
        for name, language in loaded.items():
            error = relative(logits(language, ids), wanted)
            _add(results, f"{name}, {bits} bits, {layout}", {"error": error, "error_of_the_float_model": unquantised})
    return results


def read_here(path: Path, model: AGVAS, checkpoint: Path, bits: int) -> Quantisation:
    """A GPTQ checkpoint read as `agvas-export --calibration` reads it.

    Args:
        checkpoint: the model's own folder (agvas.save).

    Raises:
        GPTQCheckpointError, RequestError: as export.quantisation.quantise.
    """
    lmm = next(name for name, settings in LMM.items() if settings.bits == bits)
    return quantise(model, open_checkpoint(checkpoint).tensors, lmm, False, path)


def theirs_here(folder: Path, model: AGVAS, ids: torch.Tensor) -> dict[str, Any]:
    """Checkpoints that gptqmodel makes of the same language model, read as agvas-export reads them."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    source, checkpoint = folder / "float", folder / "checkpoint"
    save(model, checkpoint)
    model.language.save_pretrained(source)
    model.tokenizer.save(str(source / "tokenizer.json"))
    end = model.config.prompts.end
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end})
    )
    rows = torch.randint(0, model.config.language.vocabulary, (32, 64), generator=torch.Generator().manual_seed(1)).tolist()
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    results: dict[str, Any] = {}
    for bits, layout, act_order in ((4, "gptq", False), (4, "gptq_v2", False), (8, "gptq", False), (4, "gptq", True)):
        settings = QuantizeConfig(bits=bits, group_size=GROUP, sym=True, desc_act=act_order, format=layout, device="cpu")
        path = folder / f"theirs-{bits}-{layout}-{act_order}"
        quantizing = GPTQModel.load(str(source), settings)
        quantizing.quantize(calibration, batch_size=4)
        quantizing.save(str(path))
        name = f"{bits} bits, {layout}{', act-order' if act_order else ''}"
        if act_order:
            try:
                read_here(path, model, checkpoint, bits)
                _add(results, name, {"refused": None})
            except GPTQCheckpointError as refusal:
                _add(results, name, {"refused": str(refusal)})
            continue
        quantisation = read_here(path, model, checkpoint, bits)
        loaded = GPTQModel.load(str(path), device="cpu", backend=BACKEND.TORCH)
        wanted = logits(loaded.model, ids).float()
        error = relative(logits(fake_quantised(model, quantisation).language, ids), wanted)
        unquantised = relative(logits(model.language, ids), wanted)
        _add(results, name, {"error": error, "error_of_the_float_model": unquantised, "linears": len(quantisation.weights)})
    return results


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every checkpoint travelled and the act-order one was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    model = small_model()
    ids = torch.randint(0, model.config.language.vocabulary, (1, 50), generator=torch.Generator().manual_seed(2))
    output = options.output and options.output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # gptqmodel leaves logs where it runs
        result: dict[str, Any] = {"theirs_here": theirs_here(Path(folder), model, ids)}
        result["ours_elsewhere"] = ours_elsewhere(Path(folder), model, ids)
        os.chdir(Path(__file__).parent)
    compared = [entry for part in result.values() for entry in part.values()]
    result["passed"] = all(entry["error"] < TOLERANCE if "error" in entry else bool(entry["refused"]) for entry in compared)
    result["tolerance"] = TOLERANCE
    result["versions"] = {name: version(name) if find_spec(name) else None for name in ("gptqmodel", "optimum", "transformers", "torch")}
    result["environment"] = environment()
    print(json.dumps(result, indent=2))
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
