"""What tests share: a tiny AG-VAS that has learned to give the fixed answer, and its exported bundle (made once a session)."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from judged_parts import write_dataset
from PIL import Image
from torch import nn

from agvas import AGVAS, save
from agvas.config import INSTRUCTIONS, tiny
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from agvas.training.losses import text_loss
from runtime.cli import segment, verify


def new_tiny(anchor_position: str = "own", seed: int = 3) -> AGVAS:
    """Random weights: its greedy answer is not the template."""
    torch.manual_seed(seed)
    config = tiny(anchor_position=anchor_position)
    model = AGVAS(config, train_tokenizer([*all_instructions(), config.prompts.answer], config.language.vocabulary))
    with torch.no_grad():  # distinct positions and rel-pos tables, so that a swapped axis shows
        for name, parameter in model.named_parameters():
            if "pos" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def of_four_modes() -> AGVAS:
    """Random weights of sizes that groups of 32 divide, two layers, all four modes."""
    torch.manual_seed(5)
    config = tiny(instructions=INSTRUCTIONS)
    language = dataclasses.replace(config.language, width=64, mlp_width=96, heads=4, layers=2)
    config = dataclasses.replace(config, language=language)
    return AGVAS(config, train_tokenizer([*all_instructions(), config.prompts.answer], language.vocabulary)).eval()


def teach(model: AGVAS, answer: tuple[int, ...], steps: int = 150) -> AGVAS:
    """Train the language part alone until the model says `answer` to the default instruction; seconds."""
    prompt = model.prompt_encoder.encode()
    generator = torch.Generator().manual_seed(0)
    settings = model.config.preprocessing
    pixels = torch.randn(4, 3, settings.pixel_size, settings.pixel_size, generator=generator)
    semantics = torch.randn(4, 3, settings.semantic_size, settings.semantic_size, generator=generator)
    with torch.no_grad():
        vision = model.see(pixels, semantics)
    parameters = list(model.language.parameters())
    prompts, answers = [prompt] * len(pixels), [answer] * len(pixels)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        embeddings = model.input_embeddings(vision, prompts, answers)
        states = model.language.model(inputs_embeds=embeddings).last_hidden_state
        loss = text_loss(model.language.lm_head(states[:, -len(answer) - 1 : -1]), answers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def picture(seed: int = 0, height: int = 41, width: int = 67) -> np.ndarray:
    """uint8 RGB noise with a bright block."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 160, (height, width, 3), dtype=np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = 250
    return image


class Architecture(pickle.Pickler):
    """What a module is but for the values of its parameters and buffers: those are told by shape, and by which of them are one."""

    def __init__(self, file: io.BytesIO, module: nn.Module) -> None:
        super().__init__(file)
        self.places = {id(tensor): place for place, tensor in enumerate((*module.parameters(), *module.buffers()))}

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, nn.Module):  # transformers marks what it has filled, whose graph is no other
            return type, (type(obj),), {name: value for name, value in vars(obj).items() if name != "_is_hf_initialized"}
        return NotImplemented

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, torch.Tensor) and id(obj) in self.places:
            return self.places[id(obj)], list(obj.shape), str(obj.dtype)
        return None


Trace = Callable[..., torch.onnx.ONNXProgram | None]


def save_picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def always_traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trace]:
    """torch traces a stage of one architecture once, later exports of it start from a copy of that graph. Gives what always traces.

    Tracing is most of the time that a small export takes. Nothing of it depends on weights, or on whether there are any
    (test_streamed_export.py holds that, tracing each), and export_stage puts the module's own in their place.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers share it
    trace = torch.onnx.export

    def traced(module: nn.Module, inputs: tuple[torch.Tensor, ...], *arguments: Any, **settings: Any) -> torch.onnx.ONNXProgram | None:
        content = io.BytesIO()
        examples = [(list(tensor.shape), str(tensor.dtype)) for tensor in inputs]
        try:
            Architecture(content, module).dump((module, examples, arguments, settings))
        except (pickle.PicklingError, AttributeError, TypeError):  # it holds what cannot be told apart
            return trace(module, inputs, *arguments, **settings)
        known = folder / f"{hashlib.sha256(content.getvalue()).hexdigest()}.onnx"
        if known.exists():
            return torch.onnx.ONNXProgram(ir.load(known), None)  # type: ignore[arg-type]
        program = trace(module, inputs, *arguments, **settings)
        if program is not None:
            graph = program.model.clone()
            for name in {**module.state_dict(), **dict(module.named_buffers())}.keys() & graph.graph.initializers.keys():
                weight = graph.graph.initializers[name]
                assert weight.shape is not None and weight.dtype is not None
                weight.const_value = ir.tensor(np.zeros(weight.shape.numpy(), weight.dtype.numpy()))
            being_written = known.with_suffix(f".{os.getpid()}")
            ir.save(graph, being_written)
            being_written.replace(known)
        gc.collect()
        gc.freeze()  # tracing loads a million objects for good, which every later gc.collect() would go through: 0.8 s each
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", traced)
        yield trace


@pytest.fixture(scope="session")
def tiny_model() -> AGVAS:
    """A tiny AG-VAS that answers with the template."""
    model = new_tiny()
    draft = model.prompt_encoder.encode().draft
    assert draft is not None
    return teach(model, draft)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: AGVAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save(tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its fp32 bundle. Do not write into it: copy it first (`copy_of_bundle`)."""
    from export.bundle import export_bundle
    from export.progress import Progress
    from export.settings import ExportSettings

    output = tmp_path_factory.mktemp("bundle") / "tiny-fp32"
    export_bundle(ExportSettings(str(tiny_checkpoint), "fp32", output, pictures=6), Progress(quiet=True))
    return output


@pytest.fixture
def copy_of_bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy that a test may damage."""
    import shutil

    def copy() -> Path:
        return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))

    return copy


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three pictures."""
    for index, name in enumerate(("one", "two", "three")):
        save_picture(tmp_path / "photos" / f"{name}.png", index)
    return tmp_path / "photos"


@pytest.fixture
def run_segment(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], str]]:
    """Exit code, lines of stdout and stderr of agvas-segment on onnxruntime."""

    def run(
        *arguments: str | Path, engine: str = "onnxruntime", bundle: Path = tiny_bundle
    ) -> tuple[int, list[str], str]:
        code = segment.main([*map(str, arguments), "--bundle", str(bundle), "--engine", engine])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def run_verify(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], str]]:
    def run(
        *arguments: str | Path, engine: str = "onnxruntime", bundle: Path = tiny_bundle
    ) -> tuple[int, list[str], str]:
        code = verify.main(["--bundle", str(bundle), "--engine", engine, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two categories, interleaved; the second has no normal image."""
    return write_dataset(
        tmp_path / "parts",
        ("a", 1, "bolt", "test"),
        ("b", 1, "nut", "test"),
        ("c", 0, "bolt", "train"),
        ("d", 1, "bolt", "test"),
        ("e", 0, "bolt", "test"),
    )


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engine choices of a test stay in the test."""
    monkeypatch.setenv("AGVAS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def the_parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An imported_parts.Published; do not write into it."""
    from imported_parts import Published

    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def a_copy(the_parts: Any, tmp_path: Path) -> Path:
    """The checkpoint and its parts, to be damaged."""
    import shutil

    return Path(shutil.copytree(the_parts.folder, tmp_path / "copy"))


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tensorrt_machine.Gpu: of TensorRT for RTX, or as its BOTH asks."""
    from tensorrt_machine import doubled

    with doubled(getattr(request, "param", "tensorrt-rtx"), monkeypatch) as machine:
        yield machine
