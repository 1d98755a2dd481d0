"""The command that measures the full size on a GPU, at a small size on the CPU: what it draws is what it compares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks import full_size_gpu
from benchmarks.full_size_gpu import (
    GROUP,
    LMMS,
    Weights,
    config_of,
    fill,
    main,
    ours,
    packed,
    prepare,
    reference,
    round_to_int4,
)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "graphs"
    prepare("small", folder)
    return folder


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Weights:
    monkeypatch.setattr(full_size_gpu, "GPU", "cpu")
    return Weights(config_of("small"), "cpu")


def test_every_form_gives_the_references_numbers_and_the_fixed_answer(graphs: Path, weights: Weights, tmp_path: Path) -> None:
    fill(graphs, tmp_path, weights)
    told = reference(full_size_gpu.REFERENCE, weights, tmp_path, 2)
    assert told["calls"] == 2 and told["p50_ms"] > 0 and len(told["samples_ms"]) == 2
    for kind in ("float", "float-plain", "gptq4"):
        told = ours(kind, Weights(config_of("small"), "cpu"), tmp_path, 1)
        assert told["answers_verified"] and told["stages_p50_ms"].keys() >= {"preprocess", "language", "mask_decoder"}
        errors = told["relative_error"]
        assert errors.keys() == {"pixel_embeddings", "image_embeddings", "aligned_embeddings", "anchor_states", "map"}
        for name, error in errors.items():
            rounded = kind == "gptq4" and name in ("anchor_states", "map")  # integers, where the reference has floats
            assert error < (0.5 if rounded else 5e-3), (kind, name, error)
        assert not (kind == "gptq4" and errors["anchor_states"] < 1e-2)


def test_a_profile_names_each_stage(graphs: Path, weights: Weights, tmp_path: Path) -> None:
    """On a CPU there are no kernels to see: the command's way is tried, its figures need a GPU."""
    fill(graphs, tmp_path, weights)
    assert main(["profile", "--work", str(tmp_path), "--output", str(tmp_path / "profile.txt"), "--device", "cpu"]) == 0
    told = (tmp_path / "profile.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in told if line.endswith("in all")] == ["pixel_encoder", "language", "semantic_encoder"]


def test_weights_are_the_same_wherever_they_are_drawn(weights: Weights) -> None:
    again = Weights(config_of("small"), "cpu")
    for name in list(weights.shapes)[::7]:
        assert torch.equal(weights(name), again(name))
    assert not torch.equal(weights("spam.query.weight"), weights("spam.key.weight"))


def test_integers_are_packed_as_onnx_has_them() -> None:
    weight = torch.randn(6, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    codes, scales = round_to_int4(weight)
    assert codes.min() >= -8 and codes.max() <= 7 and scales.shape == (6, 2)
    error = codes.float() * scales.float().repeat_interleave(GROUP, dim=1) - weight
    assert (error.abs() <= 0.51 * scales.float().repeat_interleave(GROUP, dim=1)).all()
    wanted = ir.tensor(codes.numpy().astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4).tobytes()
    assert packed(codes).numpy().tobytes() == wanted


def test_what_is_prepared_tells_where_everything_lies(graphs: Path) -> None:
    for lmm in LMMS:
        places = json.loads((graphs / lmm / "language" / "language.json").read_text())
        ends = [(place["offset"], place["offset"] + place["length"]) for place in places]
        assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:]))
        held = [value.const_value for value in ir.load(graphs / lmm / "language" / "language.onnx").graph.initializers.values()]
        outside = {(tensor.offset, tensor.length) for tensor in held if isinstance(tensor, ir.ExternalTensor)}
        assert outside == {(place["offset"], place["length"]) for place in places}
    assert {place["kind"] for place in places} >= {"codes", "scales"}


def test_a_candidate_that_fails_is_told_and_the_others_are_kept(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size_gpu, "GPU", "cpu")
    work, output = tmp_path / "work", tmp_path / "out.json"
    work.mkdir()
    (work / "filled.json").write_text("{}")  # but nothing is there
    arguments = ["measure", "--graphs", str(graphs), "--work", str(work), "--output", str(output), "--device", "cpu", "--calls", "1"]
    assert main([*arguments, "--candidates", "float"]) == 1
    assert json.loads(output.read_text())["candidates"] == {"float": {"failed": "CalledProcessError"}}


def test_percentiles_are_of_the_calls_behind_the_warm_up() -> None:
    seen: list[np.ndarray] = []

    def call(image: np.ndarray) -> dict[str, float]:
        seen.append(image)
        return {"stage": float(len(seen))}

    full_size_gpu.GPU, before = "cpu", full_size_gpu.GPU
    try:
        told = full_size_gpu.timed(call, [np.zeros(1), np.ones(1)], calls=3, warm_up=2)
    finally:
        full_size_gpu.GPU = before
    assert len(seen) == 5 and told["stages_p50_ms"] == {"stage": 4.0} and told["p90_ms"] == told["max_ms"]
