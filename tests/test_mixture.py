"""The training mixture: its settings, its shares, and that a sample depends on seed, step and index alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agvas.config import ANSWER, tiny
from agvas.tokenizer import train_tokenizer
from agvas.training import mixture
from agvas.training.batch import collate
from agvas.training.instructions import Description
from agvas.training.mixture import GroupSettings, Mixture, MixtureSettings
from agvas.training.record_digest import digest_of
from agvas.training.sample import TrainingSample
from agvas.training.sources.catalogue import GROUPS, OPTIONS, SourceSettings
from agvas.training.sources.coco import CocoImage
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.index_masks import IndexedImage
from agvas.training.text_limits import TextLimits
from runtime.prompts import MODES, PromptEncoder

HEIGHT, WIDTH = 5, 7
ROOT = Path(__file__).parents[1]
# A colour for each source, so that a sample says where it comes from.
COLOURS = {"ade": 10, "phrases": 20, "described": 30, "goods": 40, "cracks": 50, "llava": 60}


def picture(path: Path, source: str, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (COLOURS[source], shade, 0)).save(path)


def mask_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[1:3, 2:4] = 255
    Image.fromarray(mask).save(path)


def ade_image(root: Path, name: str, indices: np.ndarray) -> None:
    """A PNG named .jpg: files are told apart by content, and JPEG would blur the colour."""
    image, mask = root / f"images/training/{name}.jpg", root / f"annotations/training/{name}.png"
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (COLOURS["ade"], 0, 0)).save(image, format="PNG")
    Image.fromarray(indices).save(mask)
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky\n")


def source_of(sample: TrainingSample) -> str:
    return {colour: name for name, colour in COLOURS.items()}[int(sample.image[0, 0, 0])]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sets of distinct sizes in one folder."""
    root = tmp_path_factory.mktemp("sets")
    for n in range(3):
        ade_image(root / "ade", str(n), np.tile(np.array([0, 1, 2, 2, 1, 0, 0], np.uint8), (HEIGHT, 1)))
    write_manifest(root / "phrases", "phrases", 1, "the man in red")
    write_manifest(root / "cracks", "cracks", 6)
    for n in range(2):
        picture(root / f"goods/can/train/good/{n}.png", "goods", n)
    for n in range(2, 4):
        picture(root / f"goods/can/test/opened/{n}.png", "goods", n)
        mask_file(root / f"goods/can/ground_truth/opened/{n}.png")
    picture(root / "instruct/a.png", "described")
    mask_file(root / "instruct/a_mask.png")
    fields = {"expectation": "E.", "observation": "O.", "diagnosis": "D.", "summary": "[NOR][ANO][SEG]", "explanation": "X."}
    record = {"image": "a.png", "mask": "a_mask.png", "class": "can", "kind": "opened"} | fields
    (root / "instruct/instruct.jsonl").write_text(json.dumps(record) + "\n")
    picture(root / "llava/train2017/1.png", "llava")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A can."}]
    (root / "llava/llava_instruct_150k.json").write_text(json.dumps([{"id": "1", "image": "1.png", "conversations": turns}]))
    return root


def write_manifest(folder: Path, source: str, lines: int, text: str = "") -> None:
    rows = ["image,mask,label,text"]
    mask_file(folder / "mask.png")
    for n in range(lines):
        picture(folder / f"{n}.png", source, n)
        rows.append(f"{n}.png,mask.png,1,{text}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def groups() -> dict[str, Any]:
    return {
        "general": {"sources": [{"kind": "ade20k", "root": "ade"}, {"kind": "manifest", "root": "phrases"}]},
        "instruct": {"sources": [{"kind": "anomaly-instruct", "root": "instruct"}]},
        "anomaly": {"sources": [{"kind": "goods-ad", "root": "goods"}, {"kind": "manifest", "root": "cracks"}]},
        "conversation": {"sources": [{"kind": "llava", "root": "llava"}]},
    }


def read(sets: Path, content: Any, name: str = "mixture.json") -> MixtureSettings:
    (sets / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return MixtureSettings.read(sets / name)


@pytest.fixture
def with_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the mode: what templates say is another file's matter."""

    def dialogue(mode: str, description: Description | None, rng: np.random.Generator) -> tuple[str, str]:
        assert description is not None or mode == "direct"
        return f"question {rng.integers(1000)}", mode

    monkeypatch.setattr(mixture, "dialogue", dialogue)


def drawn(opened: Mixture, number: int, seed: int = 0) -> list[TrainingSample]:
    return [opened.sample(seed, n // 10, n % 10) for n in range(number)]


def close(count: int, number: int, probability: float) -> bool:
    """Within four standard deviations of a binomial: fails once in 16,000 for a right sampler, and the seeds are fixed."""
    return abs(count - number * probability) <= 4 * (number * probability * (1 - probability)) ** 0.5


@pytest.mark.usefixtures("with_every_mode")
def test_the_shares_of_groups_sources_and_anomalies_are_those_of_the_settings(sets: Path) -> None:
    number = 1500
    samples = drawn(Mixture(read(sets, groups())), number)
    counts = Counter(map(source_of, samples))
    expected = {
        "ade": 0.4 * 3 / 4,
        "phrases": 0.4 * 1 / 4,
        "described": 0.25,
        "goods": 0.25 * (0.5 + 0.5 * 2 / 8),  # all of the normal pictures, 2 of 8 anomalous ones
        "cracks": 0.25 * 0.5 * 6 / 8,
        "llava": 0.1,
    }
    assert sum(expected.values()) == pytest.approx(1)
    for name, probability in expected.items():
        assert close(counts[name], number, probability), (name, counts[name] / number, probability)
    anomalies = [sample for sample in samples if source_of(sample) in ("goods", "cracks")]
    assert close(sum(bool(sample.mask is not None and sample.mask.any()) for sample in anomalies), len(anomalies), 0.5)
    modes = Counter(sample.answer for sample in samples if source_of(sample) == "described")
    assert set(modes) == set(MODES) and all(close(count, modes.total(), 0.25) for count in modes.values())


@pytest.mark.usefixtures("with_every_mode")
def test_given_probabilities_weights_shares_and_modes_are_kept(sets: Path) -> None:
    content = groups()
    content["general"]["probability"], content["anomaly"]["probability"] = 0.2, 0.45
    for source, weight in zip(content["general"]["sources"], (1, 4)):
        source["weight"] = weight
    content["anomaly"]["anomalous_share"] = 0.2
    content["instruct"]["sources"][0]["modes"] = {"direct": 1, "segment-then-explain": 3, "describe-then-segment": 0}
    number = 1500
    samples = drawn(Mixture(read(sets, content)), number, seed=1)
    counts = Counter(map(source_of, samples))
    assert close(counts["ade"], number, 0.2 * 0.2) and close(counts["phrases"], number, 0.2 * 0.8)
    assert close(counts["goods"], number, 0.45 * (0.8 + 0.2 * 2 / 8)) and close(counts["cracks"], number, 0.45 * 0.2 * 6 / 8)
    modes = Counter(sample.answer for sample in samples if source_of(sample) == "described")
    assert set(modes) == {"direct", "segment-then-explain"} and close(modes["direct"], modes.total(), 0.25)


@pytest.mark.usefixtures("with_every_mode")
def test_each_group_gives_the_samples_that_its_losses_need(sets: Path) -> None:
    truth = np.zeros((HEIGHT, WIDTH), bool)
    truth[1:3, 2:4] = True
    seen = set()
    for sample in drawn(Mixture(read(sets, groups())), 300):
        source = source_of(sample)
        seen.add(source)
        assert sample.image.shape == (HEIGHT, WIDTH, 3) and sample.image.dtype == np.uint8
        assert sample.relative == (source in ("described", "goods", "cracks"))
        if source == "llava":
            assert sample.mask is None and (sample.instruction, sample.answer) == ("What is it?", "A can.")
            continue
        assert sample.mask is not None and sample.mask.shape == (HEIGHT, WIDTH)
        if source == "ade":
            columns = [2, 3] if "sky" in sample.instruction else [1, 4]
            assert sample.mask[:, columns].all() and sample.mask.sum() == 2 * HEIGHT
        elif source == "phrases":
            assert "the man in red" in sample.instruction and (sample.mask == truth).all()
        elif source == "goods" and sample.image[0, 0, 1] < 2:
            assert not sample.mask.any()
        else:
            assert (sample.mask == truth).all()
        if source in ("goods", "cracks"):
            assert sample.answer == "direct"
    assert seen == set(COLOURS)


def fingerprint(sample: TrainingSample) -> str:
    mask = "none" if sample.mask is None else sample.mask.tobytes().hex()
    return f"{sample.image.tobytes().hex()} {sample.instruction} {sample.answer} {mask} {sample.relative}"


def without_descriptions() -> dict[str, Any]:
    return groups() | {"instruct": {"sources": [{"kind": "anomaly-instruct", "root": "instruct", "modes": ["direct"]}]}}


def test_a_sample_depends_on_seed_step_and_index_alone(sets: Path) -> None:
    settings = read(sets, without_descriptions())
    opened = Mixture(settings)
    places = [(seed, step, index) for seed in (0, 5) for step in (0, 1, 70000) for index in range(10)]
    forwards = {place: fingerprint(opened.sample(*place)) for place in places}
    backwards = {place: fingerprint(Mixture(settings).sample(*place)) for place in places[::-7]}
    assert all(forwards[place] == sample for place, sample in backwards.items())
    assert [fingerprint(opened.sample(*place)) for place in places] == list(forwards.values())
    assert len(set(forwards.values())) > 15  # and it does depend on them


def test_another_process_draws_the_same_samples(sets: Path) -> None:
    settings = read(sets, without_descriptions(), "other-process.json")
    code = (
        "import sys, hashlib; from agvas.training.mixture import Mixture, MixtureSettings\n"
        f"opened = Mixture(MixtureSettings.read({str(sets / 'other-process.json')!r}))\n"
        "samples = [opened.sample(3, 1, index) for index in range(12)]\n"
        "heavy = {'torch', 'cv2', 'transformers'} & set(sys.modules)\n"
        "print(hashlib.sha256(b''.join(s.image.tobytes() + s.instruction.encode() for s in samples)).hexdigest(), *heavy)"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    samples = [Mixture(settings).sample(3, 1, index) for index in range(12)]
    ours = hashlib.sha256(b"".join(sample.image.tobytes() + sample.instruction.encode() for sample in samples)).hexdigest()
    assert finished.stdout.split() == [ours]  # and nothing heavy was loaded


def test_direct_answers_are_the_one_that_inference_verifies(sets: Path) -> None:
    only = {"anomaly": groups()["anomaly"] | {"probability": 1}}
    assert {sample.answer for sample in drawn(Mixture(read(sets, only)), 20)} == {ANSWER}


def test_an_ablations_answers_hold_its_own_anchors(sets: Path) -> None:
    opened = Mixture(read(sets, groups()), anchors=("[SEG]",))
    answers = [opened.sample(0, 0, index).answer for index in range(60)]
    masked = [answer for answer in answers if "[SEG]" in answer]
    assert masked and ANSWER.replace("[NOR][ANO]", "") in masked and not any("[NOR]" in answer or "[ANO]" in answer for answer in answers)


def test_a_group_with_anomalies_only_draws_anomalies_only(sets: Path) -> None:
    only = {"anomaly": {"sources": [{"kind": "manifest", "root": "cracks"}]}}
    assert all(sample.mask is not None and sample.mask.any() for sample in drawn(Mixture(read(sets, only)), 40))


@pytest.mark.parametrize("share", [None, 0.2])
def test_described_pictures_are_normal_half_of_the_time_where_any_are(sets: Path, tmp_path: Path, share: float | None) -> None:
    """One of five is."""
    fields = {"expectation": "E.", "observation": "O.", "diagnosis": "D.", "summary": "[NOR][ANO][SEG]", "explanation": "X."}
    lines = []
    for n in range(5):
        picture(tmp_path / f"{n}.png", "described", n)
        mask_file(tmp_path / f"{n}_mask.png")
        lines.append(json.dumps({"image": f"{n}.png", "mask": f"{n}_mask.png" if n else None, "class": "can", "kind": None} | fields))
    (tmp_path / "instruct.jsonl").write_text("\n".join(lines))
    group = {"probability": 1, "sources": [{"kind": "anomaly-instruct", "root": "."}]}
    opened = Mixture(read(tmp_path, {"instruct": group | ({} if share is None else {"anomalous_share": share})}))
    samples = drawn(opened, 400)
    assert close(sum(bool(sample.mask is not None and sample.mask.any()) for sample in samples), 400, share or 0.5)
    assert len({sample.image[0, 0, 1] for sample in samples}) == 5 and shares(opened.describe()) == [1.0]


def limits(max_new_tokens: int = 64, token: str | None = None) -> TextLimits:
    """Of a tokenizer with one token a byte, but for its own: letters are tokens."""
    tokenizer = train_tokenizer([], 262)
    if token is not None:
        tokenizer.add_tokens([token])
    return TextLimits(tokenizer, replace(tiny().prompts, max_new_tokens=max_new_tokens))


def spoilt(sets: Path, tmp_path: Path, group: str, words: str) -> dict[str, Any]:
    """A mixture of one group whose source, a copy, has these words in its text: conversations in the second record's question."""
    source = groups()[group]["sources"][-1]
    root = Path(shutil.copytree(sets / source["root"], tmp_path / "copy"))
    if group == "conversation":
        file = root / "llava_instruct_150k.json"
        turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "A can."}]
        file.write_text(json.dumps([*json.loads(file.read_text()), {"id": "2", "image": "1.png", "conversations": turns}]))
    elif group == "instruct":
        file = root / "instruct.jsonl"
        file.write_text("\n" + json.dumps(json.loads(file.read_text()) | {"expectation": words}))
    else:
        write_manifest(root, "phrases", 1, words)
    return {group: {"probability": 1, "sources": [source | {"root": str(root)}]}}


@pytest.mark.parametrize(
    ("group", "place"),
    [
        ("conversation", r"llava_instruct_150k\.json: expected a question of record 1"),
        ("instruct", r"instruct\.jsonl, line 2: expected an expectation"),
        ("general", r"manifest\.csv, line 2: expected a text"),
    ],
)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("word " * 60, r" that makes at most 256 tokens, what the checkpoint takes, found \d+; shorten it, or remove the record"),
        ("Ends </s> here.", " without tokens of the checkpoint's tokenizer, found </s>; remove the token"),
    ],
    ids=["too long", "a token"],
)
def test_words_that_the_checkpoint_does_not_take_are_named_when_the_mixture_is_opened(
    sets: Path, tmp_path: Path, group: str, place: str, words: str, expected: str
) -> None:
    settings = read(tmp_path, spoilt(sets, tmp_path, group, words))
    Mixture(settings)
    with pytest.raises(DatasetError, match=place + expected):
        Mixture(settings, limits=limits(token="</s>"))


def test_an_answer_with_a_token_of_the_checkpoints_tokenizer_is_named(sets: Path) -> None:
    settings = read(sets, {"conversation": groups()["conversation"]})
    with pytest.raises(DatasetError, match=r"expected an answer of record 0 without tokens .* found can\."):
        Mixture(settings, limits=limits(token="can."))


@pytest.mark.parametrize(
    ("group", "longest", "remark"),
    [
        # Letters, anchors and the end of "A can.", and of "Sure, the mask is [NOR][ANO][SEG]. The reasons: X."
        ("conversation", 7, r"1 of 1 answers are longer than the 6 tokens that .* writes \(llava_\S+, an answer of record 0 first\)"),
        ("instruct", 39, r"1 of 2 answers are longer than the 38 tokens .* \(instruct\.jsonl, line 1 first\): it will not say their ends"),
    ],
)
def test_answers_that_inference_would_cut_off_are_told_with_the_mixture(sets: Path, group: str, longest: int, remark: str) -> None:
    settings = read(sets, {group: groups()[group]})
    assert "longer" not in Mixture(settings, limits=limits(longest)).describe()
    assert re.search(remark, Mixture(settings, limits=limits(longest - 1)).describe())


def test_a_checkpoint_that_cannot_be_asked_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompts\.max_instruction_tokens: expected room for training's questions, \d+ tokens, got 20"):
        TextLimits(train_tokenizer([], 262), replace(tiny().prompts, max_instruction_tokens=20))


@pytest.mark.parametrize(("instruction", "answer"), [("Look at [SEG].", ANSWER), ("Look.", "Nothing.")])
def test_a_sample_that_cannot_be_trained_names_its_picture(sets: Path, instruction: str, answer: str) -> None:
    opened = Mixture(read(sets, {"anomaly": groups()["anomaly"]}))
    sample = opened.sample(0, 0, 0)
    encoder = PromptEncoder(train_tokenizer([], 262), tiny().prompts)
    with pytest.raises(ValueError, match=r"^\S+\.png: the (instruction contains the control token \[SEG\]|answer to a sample with a mask)"):
        collate([replace(sample, instruction=instruction, answer=answer)], tiny(), encoder)


@pytest.mark.parametrize("off", ["left out", "probability 0"])
def test_a_group_switched_off_is_not_read_and_the_others_share_its_part(sets: Path, off: str) -> None:
    content = groups()
    if off == "left out":
        del content["instruct"]
    else:
        content["instruct"] = {"probability": 0, "sources": [{"kind": "anomaly-instruct", "root": "nowhere"}]}
    opened = Mixture(read(sets, content))
    description = opened.describe()
    assert "without instruct: the other groups' probabilities are divided by 0.75" in description
    assert shares(description) == pytest.approx([0.4, 0.4 / 3, 0.25 / 0.75 * 0.625, 0.25 / 0.75 * 0.375, 0.1 / 0.75], abs=1e-4)
    number = 1000
    counts = Counter(map(source_of, drawn(opened, number)))
    assert close(counts["llava"], number, 0.1 / 0.75) and not counts["described"]


def shares(description: str) -> list[float]:
    return [float(line.split("|")[4]) for line in description.splitlines()[2:] if line.startswith("|")]


def test_the_description_is_a_table_of_sources_records_and_probabilities(sets: Path) -> None:
    picture(sets / "ade/images/training/unlabelled.png", "ade")
    description = Mixture(read(sets, groups())).describe()
    (sets / "ade/images/training/unlabelled.png").unlink()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in description.splitlines() if line.startswith("|")]
    assert rows[0] == ["group", "source", "records", "probability"]
    assert [row[0] for row in rows[2:]] == ["general", "general", "instruct", "anomaly", "anomaly", "conversation"]
    assert [row[2] for row in rows[2:]] == ["3", "1", "1", "4", "6", "1"]
    assert sum(shares(description)) == pytest.approx(1, abs=1e-3)
    assert "divided" not in description
    assert f"ade20k ({sets / 'ade'}): 1 images without a mask left out" in description


def test_opening_a_mixture_decodes_no_picture_and_drawing_a_broken_one_names_it(sets: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "cracks", "cracks", 2)
    path = tmp_path / "cracks/0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"IDAT") + 6])  # the header stays
    opened = Mixture(read(tmp_path, {"anomaly": {"sources": [{"kind": "manifest", "root": "cracks"}]}}))
    with pytest.raises(DatasetError, match=r"cracks.0\.png: expected a picture that decodes"):
        drawn(opened, 40)


def test_images_without_a_class_are_drawn_again_and_a_set_without_any_is_an_error(sets: Path, tmp_path: Path) -> None:
    root = tmp_path / "ade"
    for name, index in (("empty", 0), ("wall", 1)):
        ade_image(root, name, np.full((HEIGHT, WIDTH), index, np.uint8))
    content = {"general": {"sources": [{"kind": "ade20k", "root": "ade"}]}}
    assert all(sample.mask is not None and sample.mask.all() for sample in drawn(Mixture(read(tmp_path, content)), 20))
    (root / "annotations/training/wall.png").unlink()
    with pytest.raises(DatasetError, match="images with a class, found none in 100 drawn"):
        Mixture(read(tmp_path, content)).sample(0, 0, 0)


def test_a_missing_source_is_named_when_the_mixture_is_opened(sets: Path) -> None:
    content = {"conversation": {"sources": [{"kind": "llava", "root": "nowhere"}]}}
    with pytest.raises(DatasetError, match="nowhere"):
        Mixture(read(sets, content))


def changed(path: str, value: Any) -> dict[str, Any]:
    content: Any = groups()
    *keys, last = path.split(".")
    place = content
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed("anomalies", {}), "mixture: expected one of general, .*got 'anomalies'; did you mean 'anomaly'"),
        (changed("general.probabilty", 0.4), "general: .*'probabilty'; did you mean 'probability'"),
        (changed("general.anomalous_share", 0.4), "general: .*'anomalous_share'"),
        (changed("anomaly.sources.0.kind", "good-ad"), r"anomaly\.sources\[0\]\.kind: .*did you mean 'goods-ad'"),
        (changed("anomaly.sources.0.kind", "ade20k"), r"anomaly\.sources\[0\]\.kind: .*got 'ade20k'"),
        (changed("anomaly.sources.0.rot", "x"), r"anomaly\.sources\[0\]: .*did you mean 'root'"),
        (changed("anomaly.sources.0", {"kind": "goods-ad"}), r"anomaly\.sources\[0\]: expected a root, got kind"),
        (changed("anomaly.sources.0.images", "x"), r"anomaly\.sources\[0\]\.images: goods-ad takes split"),
        (changed("anomaly.sources.0.split", 3), r"anomaly\.sources\[0\]\.split: expected text"),
        (changed("anomaly.sources.0.modes", ["direct"]), "only the group instruct"),
        (changed("instruct.sources.0.modes", ["segment-and-explain"]), "did you mean 'segment-then-explain'"),
        (changed("instruct.sources.0.modes", []), "expected a list of modes or an object"),
        (changed("instruct.sources.0.modes", {"direct": -1}), "share of 0 or more for direct"),
        (changed("instruct.sources.0.modes", {"direct": 0}), "a share above 0, got none"),
        (changed("general.sources.0.weight", 2), "a weight for all sources or for none, got 1 of 2"),
        (changed("instruct.sources.0.weight", 0), r"instruct\.sources\[0\]\.weight: expected more than 0"),
        (changed("instruct.sources", []), r"instruct\.sources: expected at least one, got none"),
        (changed("instruct.sources", {}), r"instruct\.sources: expected a list"),
        (changed("anomaly.anomalous_share", 1.5), r"anomaly\.anomalous_share: expected 0 to 1"),
        (changed("anomaly.probability", 0.3), r"probabilities that sum to 1, got 0\.4 \+ 0\.25 \+ 0\.3 \+ 0\.1 = 1\.05"),
        (changed("anomaly.probability", 0.2), "probabilities that sum to 1"),
        (changed("anomaly.probability", -0.1), r"anomaly\.probability: .* got -0\.1; correct it, or leave the group out to turn it off"),
        (changed("anomaly.probability", "0.25"), r'anomaly\.probability: expected a number, got "0\.25"; write 0\.25 without quotes'),
        (changed("anomaly.probability", True), r"anomaly\.probability: expected a number, got true"),
        ({"general": {"probability": 0}}, "at least one group"),
        ({}, "at least one group"),
        ([], "mixture: expected an object"),
    ],
)
def test_settings_that_cannot_be_name_the_file_the_key_and_the_nearest_name(sets: Path, content: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as raised:
        read(sets, content, "wrong.json")
    assert str(raised.value).startswith(str(sets / "wrong.json"))


def test_broken_json_names_the_line(sets: Path) -> None:
    with pytest.raises(DatasetError, match=r"wrong\.json, line 2: expected JSON"):
        read(sets, "{\n", "wrong.json")


def test_a_mixture_is_the_users_own_file_and_not_a_releases(sets: Path) -> None:
    with pytest.raises(DatasetError, match=r"no\.json: expected .* found no such file; correct the path, or write the file"):
        MixtureSettings.read(sets / "no.json")
    with pytest.raises(DatasetError, match="correct it there"):
        read(sets, "{\n", "wrong.json")


def test_every_kind_of_every_group_has_a_reader_that_names_what_is_missing(tmp_path: Path) -> None:
    assert tuple(OPTIONS) == GROUPS
    for group, kinds in OPTIONS.items():
        for kind in kinds:
            settings = MixtureSettings(**{group: GroupSettings(1.0, (SourceSettings(kind, str(tmp_path / "nowhere")),))})
            with pytest.raises(DatasetError, match="nowhere"):
                Mixture(settings)


def test_a_relative_root_starts_at_the_settings_file_and_options_reach_the_reader(sets: Path, tmp_path: Path) -> None:
    content = changed("anomaly.sources.0.split", "train")
    settings = read(sets, content)
    assert settings.anomaly is not None and settings.anomaly.sources[0].root == str(sets / "goods")
    (row,) = (line for line in Mixture(settings).describe().splitlines() if "goods-ad" in line)
    assert "| 2 " in row  # the two normal pictures of train


# --- what a stopped run compares ---


def test_the_facts_of_a_mixture_change_with_every_setting_and_every_annotation(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets, tmp_path / "sets")

    def facts(content: dict[str, Any]) -> str:
        return json.dumps(Mixture(read(tmp_path / "sets", content)).facts())

    before = facts(groups())
    assert facts(groups()) == before
    changed = []
    for group, key, value in [("anomaly", "anomalous_share", 0.4), ("conversation", "probability", None)]:
        content = groups()
        content[group][key] = value if value is not None else content[group].pop("probability", 0.1)
        changed.append(facts(content))
    assert changed[0] != before and changed[1] == before, "a default that is written out is no change"
    for group, option in [("instruct", {"modes": ["direct"]}), ("anomaly", {"split": "train"}), ("general", {"split": "training"})]:
        content = groups()
        content[group]["sources"][0] |= option
        changed.append(facts(content))
    turns = tmp_path / "sets/llava/llava_instruct_150k.json"
    turns.write_text(turns.read_text().replace("A can.", "A cup."))
    changed.append(facts(groups()))
    manifest = tmp_path / "sets/cracks/manifest.csv"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([lines[0], *lines[:0:-1]]))
    changed.append(facts(groups()))
    del changed[1]
    assert len({before, *changed}) == len(changed) + 1


def test_a_digest_sees_what_a_record_holds_and_not_how_it_is_kept() -> None:
    names = {1: ("the wall",), 2: ("the sky",)}
    polygon = np.arange(3000, dtype=np.float64)
    path = Path("a.png")

    def digest(**changes: Any) -> str:
        record = CocoImage(path, 5, 7, {1: (polygon,)}, names, Path("a.json"))
        return digest_of([record, replace(record, **changes)])

    plain = digest()
    assert digest(names=dict(reversed(names.items()))) == plain and digest(shapes={1: (polygon.copy(),)}) == plain
    moved = polygon.copy()
    moved[1500] += 1e-9
    others = [digest(shapes={1: (moved,)}), digest(shapes={2: (polygon,)}), digest(names={1: ("the wall",), 2: ("the sea",)})]
    others += [digest(image=Path("b.png")), digest(height=7, width=5), digest(shapes={1: ({"size": [5, 7], "counts": [35]},)})]
    assert len({plain, *others}) == len(others) + 1
    indexed = IndexedImage(path, path, {1: "wall"}, frozenset({0, 255}))
    assert digest_of([indexed]) == digest_of([replace(indexed, ignored=frozenset({255, 0}))])
    assert digest_of([indexed]) != digest_of([replace(indexed, ignored=frozenset({0}))])
