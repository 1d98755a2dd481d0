"""Tuning a checkpoint as the paper does, through the function and through agvas-train --checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import new_tiny, picture
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from agvas import AGVAS, load, save
from agvas.config import ANSWER
from agvas.training import cli
from agvas.training.adaptation import TrainedParts
from agvas.training.batch import collate
from agvas.training.feature_cache import FeatureCache, fingerprint
from agvas.training.loop import Diverged, LoopSettings
from agvas.training.sample import TrainingSample
from agvas.training.sources.catalogue import COCO_PLACES, GROUPS, OPTIONS
from agvas.training.sources.referring import PLACES
from agvas.training.trainer import TuningSettings, tune

LOOP = LoopSettings(steps=4, global_batch=2, micro_batch=1, warmup_steps=1, learning_rate=3e-3, precision="no", save_every=2, log_every=1)
SETTINGS = TuningSettings(LOOP)


class Pictures:
    """Three pictures that come again and again: an anomaly, a general one, a conversation."""

    def sample(self, seed: int, step: int, index: int) -> TrainingSample:
        kind = (step + index) % 3
        image = picture(kind)
        mask = image.mean(axis=2) > 200
        if kind == 2:
            return TrainingSample(image, "What is this?", "A bright block.", None, False)
        return TrainingSample(image, "Segment it.", ANSWER, mask, kind == 0)


def weights(model: AGVAS) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    folder = tmp_path_factory.mktemp("tuned")
    return weights(tune(new_tiny(), Pictures(), SETTINGS, folder)), folder


def test_tuning_moves_the_papers_parts_and_no_other(tuned: tuple[dict[str, Tensor], Path]) -> None:
    start = new_tiny().state_dict()
    moved = {name for name, tensor in tuned[0].items() if not torch.allclose(tensor, start[name], atol=1e-7, rtol=0)}
    assert not {name for name in moved if name.startswith(("pixel_encoder.", "semantic_encoder."))}
    language = {name for name in moved if name.startswith("language.model.layers")}
    assert language == {f"language.model.layers.{n}.self_attn.{p}_proj.weight" for n in range(3) for p in "qv"}
    assert {"language.model.embed_tokens.weight", "language.lm_head.weight", "spam.query.weight"} <= moved
    assert {name for name in start if name.startswith("mask_decoder.") and name not in moved} == {"mask_decoder.frequencies"}


def test_the_checkpoint_is_whole_and_what_was_trained_lies_beside_it(tuned: tuple[dict[str, Tensor], Path]) -> None:
    merged, folder = tuned
    on_disk = load(folder / "checkpoint").state_dict()
    assert on_disk.keys() == merged.keys()
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in merged.items())
    assert {path.name for path in (folder / "trained").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "trained.safetensors", "trained.json",
    }  # fmt: skip


def test_features_that_are_kept_train_the_same_model_without_looking_again(
    tuned: tuple[dict[str, Tensor], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0
    encode = AGVAS.encode

    def counted(model: AGVAS, pixel_image: Tensor, semantic_image: Tensor) -> object:
        nonlocal looked
        looked += len(pixel_image)
        return encode(model, pixel_image, semantic_image)

    monkeypatch.setattr(AGVAS, "encode", counted)
    cached = weights(tune(new_tiny(), Pictures(), SETTINGS, tmp_path / "run", cache=tmp_path / "features"))
    assert looked == 3  # eight samples of three pictures
    start = new_tiny().state_dict()
    for name, tensor in tuned[0].items():
        if name.endswith(("key.bias", "k_proj.bias")):
            continue  # softmax does not feel it: its gradient is rounding alone, which Adam blows up
        # What is kept lies otherwise in memory, so sums round otherwise, and Adam makes much of it where a gradient is nearly none.
        apart, moved = torch.linalg.vector_norm(cached[name] - tensor), torch.linalg.vector_norm(tensor - start[name])
        assert apart <= 0.01 * moved, f"{name}: {apart:.2g} apart, {moved:.2g} from the start"
    tune(new_tiny(), Pictures(), SETTINGS, tmp_path / "again", cache=tmp_path / "features")
    assert looked == 3


def test_another_encoders_features_are_not_taken(tmp_path: Path) -> None:
    model = new_tiny().requires_grad_(False)
    batch = collate([Pictures().sample(0, 0, 0)], model.config, model.prompt_encoder)
    first = FeatureCache(tmp_path, model).features(model, batch)
    with torch.no_grad():
        model.pixel_encoder.neck.conv1.weight += 0.1
    second = FeatureCache(tmp_path, model).features(model, batch)
    assert not torch.equal(first.pixel_embeddings, second.pixel_embeddings)
    torch.testing.assert_close(first.semantic_features, second.semantic_features)


def test_features_of_another_precision_are_not_taken(tmp_path: Path) -> None:
    model = new_tiny().requires_grad_(False)
    cache, batch = FeatureCache(tmp_path, model), collate([Pictures().sample(0, 0, 0)], model.config, model.prompt_encoder)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cache.features(model, batch)
    exact = cache.features(model, batch)
    assert rounded.pixel_embeddings.dtype == torch.bfloat16 and exact.pixel_embeddings.dtype == torch.float32
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_encoders_with_counters_are_cached_too(tmp_path: Path) -> None:
    """Batch norms count their batches in a tensor without axes."""
    model = new_tiny().requires_grad_(False)
    model.pixel_encoder.register_buffer("num_batches_tracked", torch.tensor(3))
    batch = collate([Pictures().sample(0, 0, 0)], model.config, model.prompt_encoder)
    FeatureCache(tmp_path, model).features(model, batch)
    before = fingerprint(model.pixel_encoder)
    model.pixel_encoder.num_batches_tracked += 1
    assert fingerprint(model.pixel_encoder) != before


def test_a_cache_of_encoders_that_learn_is_refused(tmp_path: Path) -> None:
    settings = replace(SETTINGS, parts=TrainedParts(encoders=True))
    with pytest.raises(ValueError, match="needs frozen encoders"):
        tune(new_tiny(), Pictures(), settings, tmp_path / "run", cache=tmp_path / "features")


def test_another_base_or_mixture_is_another_run(tuned: tuple[dict[str, Tensor], Path], tmp_path: Path) -> None:
    one_step = replace(SETTINGS, loop=replace(LOOP, steps=1))
    tune(new_tiny(), Pictures(), one_step, tmp_path, facts={"checkpoint": "a"})
    with pytest.raises(ValueError, match="checkpoint was a, is b"):
        tune(new_tiny(), Pictures(), one_step, tmp_path, facts={"checkpoint": "b"})


# --- the door ---


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A manifest data set of two pictures and a mixture of it alone."""
    data = tmp_path / "data"
    data.mkdir()
    rows = ["image,mask,label"]
    for number in range(2):
        Image.fromarray(picture(number)).save(data / f"{number}.png")
        mask = (picture(number).mean(axis=2) > 200) & (number == 0)
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(data / f"{number}_mask.png")
        rows.append(f"{number}.png,{number}_mask.png,{1 - number}")
    (data / "manifest.csv").write_text("\n".join(rows) + "\n")
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps({"anomaly": {"probability": 1, "sources": [{"kind": "manifest", "root": "data"}]}}))
    return file


def test_agvas_train_tunes_a_checkpoint_on_a_mixture(mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(new_tiny(), tmp_path / "base")
    (tmp_path / "settings.json").write_text(json.dumps({"loop": {"precision": "no", "warmup_steps": 1}, "parts": {"lora": {"rank": 4}}}))
    arguments = ["--checkpoint", str(tmp_path / "base"), "--mixture", str(mixture), "--settings", str(tmp_path / "settings.json")]
    arguments += ["--steps", "2", "--batch", "2", "--feature-cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"saved {tmp_path / 'run' / 'checkpoint'}\n"
    assert "manifest" in captured.err  # the mixture's table
    adapter = load_file(tmp_path / "run" / "trained" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {4}
    assert load(tmp_path / "run" / "checkpoint").segment(picture()).mask.shape == picture().shape[:2]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--checkpoint", "nano", "--mixture", "m.json"], "tuning-run"),
        (["--config", "tiny"], "training-run"),
        (["--checkpoint", "nano", "--output", "x"], "x"),
    ],
)
def test_what_is_tuned_and_what_is_trained_from_nothing_have_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], expected: str
) -> None:
    for door in ("_tune", "_from_nothing"):
        monkeypatch.setattr(cli, door, lambda options: options.output)
    assert cli.main(given) == 0
    assert capsys.readouterr().out == f"saved {expected}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "(default training-run, with --checkpoint tuning-run)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("device", ["banana", "cuda", "cuda:0", "mps", "xpu", "meta"])
def test_a_device_that_is_not_there_is_told_before_samples(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["--config", "tiny", "--device", device, "--output", str(tmp_path / "run")]) == 2
    assert f"got {device}" in capsys.readouterr().err.replace("'", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("of the settings"), 2), (OSError("of the disk"), 2), (Diverged("the loss is nan"), 1), (KeyboardInterrupt(), 130)],
)
def test_exit_codes_tell_wrong_input_from_a_run_that_diverged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def raises(options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_from_nothing", raises)
    assert cli.main(["--config", "nano"]) == code
    assert (str(error) or "training-run") in capsys.readouterr().err


def test_after_divergence_each_kind_of_run_is_told_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def diverges(options: object) -> None:
        raise Diverged("text is nan at step 4; the state of step 4 is in run")

    for door in ("_tune", "_from_nothing"):
        monkeypatch.setattr(cli, door, diverges)
    assert cli.main(["--checkpoint", "nano", "--output", str(tmp_path)]) == 1
    assert "is in run. Look at the samples of this step, or give a lower learning_rate" in capsys.readouterr().err
    assert cli.main(["--config", "nano", "--output", str(tmp_path)]) == 1
    assert "is in run. The rates of --config are its recipe's" in capsys.readouterr().err


def test_a_tuning_goes_on_with_a_lower_rate_from_its_settings_file(
    mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(new_tiny(), tmp_path / "base")
    arguments = ["--checkpoint", str(tmp_path / "base"), "--mixture", str(mixture), "--settings", str(tmp_path / "s.json")]
    arguments += ["--steps", "1", "--batch", "2", "--output", str(tmp_path / "run")]
    for rate in (1e-3, 1e-4):
        (tmp_path / "s.json").write_text(json.dumps({"loop": {"precision": "no", "learning_rate": rate}}))
        assert cli.main(arguments) == 0
    assert "goes on at step 1 with other settings: learning_rate was 0.001, is 0.0001" in capsys.readouterr().err
    (tmp_path / "run" / "state.safetensors").write_bytes(b"half")
    assert cli.main(arguments) == 2
    assert "state.safetensors: expected a whole state" in capsys.readouterr().err
    (tmp_path / "run" / "settings.json").unlink()  # the remedy where it is damaged: a run's folder all the same
    (tmp_path / "run" / "state.safetensors").unlink()
    (tmp_path / "run" / "state").mkdir()
    assert cli.main(arguments) == 0


def test_a_changed_mixture_is_another_run(mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(new_tiny(), tmp_path / "base")
    arguments = ["--checkpoint", str(tmp_path / "base"), "--mixture", str(mixture), "--steps", "1", "--batch", "2"]
    arguments += ["--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    begun, manifest = json.loads(mixture.read_text()), tmp_path / "data" / "manifest.csv"
    mixture.write_text(json.dumps({"anomaly": begun["anomaly"] | {"anomalous_share": 0.25}}))
    assert cli.main(arguments) == 2
    assert "describes another run (mixture_groups.anomaly.anomalous_share was 0.5, is 0.25)" in capsys.readouterr().err
    mixture.write_text(json.dumps(begun))
    listed = manifest.read_text()
    manifest.write_text(listed.replace("1.png,1_mask.png", "0.png,1_mask.png"))  # as many pictures, and other ones
    assert cli.main(arguments) == 2
    assert "mixture_groups.anomaly.sources[0].records_sha256 was " in capsys.readouterr().err
    manifest.write_text(listed)
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    del kept["mixture_groups"]
    (tmp_path / "run" / "settings.json").write_text(json.dumps(kept | {"mixture": "| group | source |"}))
    assert cli.main(arguments) == 2
    assert "another version's, without or with mixture, mixture_groups: whether this is the same run" in capsys.readouterr().err


def test_a_fault_of_ours_is_no_diverged_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_from_nothing", lambda options: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["--config", "nano"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 'agvas-train: peft is not installed; pip install "agvas[train]"\n'),
        (ModuleNotFoundError("a.json: COCO masks need it", name="pycocotools"), "agvas-train: a.json: COCO masks need it\n"),
    ],
)
def test_what_is_not_installed_is_named_in_the_words_of_what_needs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: ModuleNotFoundError, told: str
) -> None:
    def raises(options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_from_nothing", raises)
    assert cli.main(["--config", "nano"]) == 2
    assert capsys.readouterr().err == told


def test_a_question_that_the_checkpoint_does_not_take_is_told_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(new_tiny(), tmp_path / "base")
    (tmp_path / "train2017").mkdir()
    Image.fromarray(picture()).save(tmp_path / "train2017" / "1.png")
    turns = [{"from": "human", "value": "why? " * 400}, {"from": "gpt", "value": "So."}]
    (tmp_path / "llava_instruct_150k.json").write_text(json.dumps([{"id": "1", "image": "1.png", "conversations": turns}]))
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps({"conversation": {"probability": 1, "sources": [{"kind": "llava", "root": "."}]}}))
    arguments = ["--checkpoint", str(tmp_path / "base"), "--mixture", str(file), "--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    assert "llava_instruct_150k.json: expected a question of record 0 that makes at most 256 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_help_shows_the_folders_of_every_kind_of_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    parts = re.split(r"^ (\w+)$", printed, flags=re.MULTILINE)
    groups = dict(zip(parts[1::2], parts[2::2]))
    assert tuple(groups) == GROUPS
    for group, kinds in OPTIONS.items():
        lines = dict(re.findall(r"^  ([\w+-]+) +(\S.*(?:\n {10,}.*)*)$", groups[group], flags=re.MULTILINE))
        assert lines.keys() == kinds.keys()
        for kind, places in COCO_PLACES.items() if group == "general" else ():
            assert all(f"ROOT/{place}" in lines[kind] for place in places if place != ".")
        for kind, (references, images) in PLACES.items() if group == "general" else ():
            shared = lines[kind] + (lines["refcoco"] if "as refcoco" in lines[kind] else "")
            assert f"ROOT/{kind}" in lines[kind] and references in shared and f"ROOT/{images}" in shared
        for kind, options in kinds.items():
            told = lines["goods-ad"] if "as goods-ad" in lines[kind] else lines["refcoco"] if "as refcoco" in lines[kind] else lines[kind]
            for option in options:
                assert option in told.rpartition("[")[2], f"{kind} takes {option}"


def test_a_mixture_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(new_tiny(), tmp_path / "base")
    arguments = ["--checkpoint", str(tmp_path / "base"), "--mixture", str(tmp_path / "no.json")]
    assert cli.main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "no.json" in capsys.readouterr().err
