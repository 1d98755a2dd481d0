"""Every explicit mode says what the reference says, token for token, and its limits and odd answers are defined results."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import new_tiny, picture

from agvas import AGVAS, save
from agvas.config import ANSWER, DESCRIBE, INSTRUCTION, INSTRUCTIONS
from agvas.training.instructions import Description, dialogue
from agvas.training.losses import text_loss
from export.parity import measure_modes, pipeline_over, torch_stages
from runtime import Segmenter
from runtime.errors import RequestError
from runtime.prompts import DIRECT, MODES, PLUS, PromptEncoder, with_normal_state
from runtime.text_stream import TextStream

ENGINES = ("onnxruntime", "openvino")
NORMAL = "The surface is even."
# Letters of two, three and four bytes, which the tiny tokenizer splits; anchors at the start, in the middle and at the end, once and twice.
SAYS = {
    "direct": ANSWER,
    "describe-then-segment": "Große Kerbe: [NOR][ANO][SEG].",
    PLUS: "Not even: [NOR], [ANO] 缺 [SEG]",
    "segment-then-explain": "[NOR][ANO][SEG]. 🔍 [NOR][ANO][SEG] [NOR] twice",
}
# As in test_segmenter.py.
MAP_TOLERANCE = 1e-4


def with_all_modes(model: AGVAS) -> AGVAS:
    """The same weights asked in four modes."""
    config = dataclasses.replace(model.config, prompts=dataclasses.replace(model.config.prompts, instructions=INSTRUCTIONS))
    talking = AGVAS(config, model.tokenizer)
    talking.load_state_dict(model.state_dict())
    return talking.eval()


def arguments(mode: str) -> dict[str, Any]:
    return {"mode": mode, "normal_state": NORMAL if mode == PLUS else None}


@pytest.fixture(scope="module")
def talker() -> AGVAS:
    """A tiny AG-VAS that answers each mode's default instruction as SAYS has it."""
    model = with_all_modes(new_tiny())
    encoder = model.prompt_encoder
    prompts = [encoder.encode(None, **arguments(mode)) for mode in MODES]
    answers = [encoder.encode_answer(SAYS[mode]) for mode in MODES]
    generator = torch.Generator().manual_seed(0)
    settings = model.config.preprocessing
    pixels = torch.randn(len(MODES), 3, settings.pixel_size, settings.pixel_size, generator=generator)
    semantics = torch.randn(len(MODES), 3, settings.semantic_size, settings.semantic_size, generator=generator)
    with torch.no_grad():
        features = model.encode(pixels, semantics)
    optimizer = torch.optim.Adam(model.language.parameters(), lr=1e-2)
    for step in range(240):
        turn = step % len(MODES)  # every picture is asked in every mode: the words decide, not the picture
        asked, said = (rows[turn:] + rows[:turn] for rows in (prompts, answers))
        loss = text_loss(model(pixels, semantics, asked, said, features).logits, said)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def talking_bundle(talker: AGVAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from export.bundle import export_bundle
    from export.progress import Progress
    from export.settings import ExportSettings

    folder = tmp_path_factory.mktemp("talker")
    save(talker, folder / "checkpoint")
    export_bundle(ExportSettings(str(folder / "checkpoint"), "fp32", folder / "bundle", pictures=6), Progress(quiet=True))
    return folder / "bundle"


@pytest.fixture(scope="module", params=ENGINES)
def segmenter(request: pytest.FixtureRequest, talking_bundle: Path) -> Iterator[Segmenter]:
    yield Segmenter(talking_bundle, engine=request.param)


@pytest.fixture(scope="module")
def babbler() -> AGVAS:
    """Random weights, large enough that an answer does not run in circles: 64 tokens of nonsense to whatever is asked."""
    model = with_all_modes(new_tiny(seed=11))
    with torch.no_grad():
        for name, parameter in model.language.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return model


# What an export tells of them


def test_parity_json_tells_what_the_modes_that_write_keep(talking_bundle: Path) -> None:
    told = json.loads((talking_bundle / "parity.json").read_text())["modes"]
    assert set(told) == {*MODES} - {DIRECT}
    for mode in told.values():
        assert (mode["images"], mode["answers_changed"], mode["flips"]) == (6, 0, 0) and mode["mask_iou_min"] > 0.98


def test_other_words_are_counted(talker: AGVAS, babbler: AGVAS) -> None:
    chain = pipeline_over(babbler, torch_stages(babbler))
    found = measure_modes(talker, chain, [picture(0), picture(1)])
    assert all((mode.images, mode.answers_changed, mode.anchors_changed) == (2, 2, 2) for mode in found.values()) and len(found) == 3


# The reference's text


@pytest.mark.parametrize("mode", MODES)
def test_each_modes_answer_is_the_references_token_for_token_on_each_engine(mode: str, segmenter: Segmenter, talker: AGVAS) -> None:
    pipeline = segmenter._pipeline  # a result has the text, not its tokens
    for seed in range(2):
        reference = talker.segment(picture(seed), **arguments(mode))
        assert reference.text == SAYS[mode], "the fixture must have learned its answers"
        trace = pipeline.run(picture(seed), pipeline.prompts.encode(None, **arguments(mode)))
        assert trace.answer == reference.answer_ids
        assert trace.verified is (mode == "direct")
        np.testing.assert_allclose(trace.anomaly_map, reference.anomaly_map, atol=MAP_TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("instruction", [None, "Anything odd about the left edge?", "请说明缺陷。"])
def test_whatever_a_model_babbles_the_runtime_babbles_token_for_token(mode: str, instruction: str | None, babbler: AGVAS) -> None:
    reference = babbler.segment(picture(1), instruction, **arguments(mode))
    assert reference.truncated and len(set(reference.answer_ids)) > 20, "the fixture must babble"
    prompt = babbler.prompt_encoder.encode(instruction, **arguments(mode))
    trace = pipeline_over(babbler, torch_stages(babbler)).run(picture(1), prompt)
    assert trace.answer == reference.answer_ids


def test_a_result_says_what_was_asked_and_how(segmenter: Segmenter) -> None:
    for mode, instruction in [("direct", INSTRUCTION), (PLUS, f"{NORMAL} {DESCRIBE}")]:
        result = segmenter(picture(), **arguments(mode))
        assert (result.mode, result.instruction, result.text) == (mode, instruction, SAYS[mode])
    assert segmenter(picture(), " Rust? ", "segment-then-explain").instruction == "Rust?"


# The sentence on the normal state


def test_the_sentence_stands_where_training_puts_it() -> None:
    description = Description(NORMAL, "o", "d", "[NOR][ANO][SEG].", "e")
    for seed in range(5):  # the same draws with and without the sentence
        question, _ = dialogue("describe-then-segment", description, np.random.default_rng(seed))
        assert dialogue(PLUS, description, np.random.default_rng(seed))[0] == with_normal_state(question, f" {NORMAL}\n")


def test_reference_and_line_read_the_sentence_before_the_instruction(talker: AGVAS, segmenter: Segmenter) -> None:
    plain = talker.prompt_encoder.encode(f"{NORMAL} {DESCRIBE}")
    for prompt in (talker.prompt_encoder.encode(None, PLUS, NORMAL), segmenter.request(None, PLUS, normal_state=NORMAL)):
        assert (prompt.prefix, prompt.suffix) == (plain.prefix, plain.suffix)
    own = talker.prompt_encoder.encode("Dents?", PLUS, NORMAL)
    assert own.suffix == talker.prompt_encoder.encode(f"{NORMAL} Dents?").suffix
    # An instruction of one's own may hold the sentence itself.
    assert talker.prompt_encoder.encode(f"{NORMAL} Dents?", PLUS).suffix == own.suffix


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"mode": PLUS}, "needs a sentence .* got none; give it, or ask in mode describe-then-segment"),
        ({"mode": PLUS, "normal_state": " \n"}, "got an empty text; write one"),
        ({"mode": PLUS, "normal_state": "Even [SEG]."}, r"control token \[SEG\]"),
        ({"mode": PLUS, "normal_state": "Even. " * 300}, r"has \d+ tokens, this model takes 256"),
        ({"mode": "direct", "normal_state": NORMAL}, "only mode describe-then-segment-plus takes it, got mode direct"),
        ({"mode": "segment-then-explain", "normal_state": ""}, "only mode describe-then-segment-plus takes it"),
        ({"max_new_tokens": 0}, "expected 1 to 64, this model's limit, got 0"),
        ({"max_new_tokens": 65}, "expected 1 to 64, this model's limit, got 65"),
        ({"max_new_tokens": 2.5}, "expected 1 to 64, this model's limit, got 2.5"),
    ],
)
def test_a_request_that_means_nothing_is_refused_by_reference_and_line(
    request_: dict[str, Any], message: str, talker: AGVAS, segmenter: Segmenter
) -> None:
    for ask in (partial(talker.segment, picture()), partial(segmenter, picture()), segmenter.inspect(picture()).ask):
        with pytest.raises(RequestError, match=message):
            ask(**request_)


# Ends and limits


@pytest.mark.parametrize("mode", MODES)
def test_a_shorter_limit_cuts_the_same_answer_and_says_so(mode: str, segmenter: Segmenter, talker: AGVAS) -> None:
    inspection = segmenter.inspect(picture())
    whole = talker.segment(picture(), **arguments(mode)).answer_ids
    for limit in (1, 4, len(whole) - 1, len(whole), 64):
        reference = talker.segment(picture(), max_new_tokens=limit, **arguments(mode))
        assert reference.answer_ids == whole[:limit]
        result = inspection.ask(max_new_tokens=limit, **arguments(mode))
        assert result.truncated is reference.truncated is (limit < len(whole))
        assert (result.text, result.anchor_groups) == (reference.text, reference.anchor_groups)
        np.testing.assert_array_equal(result.mask, reference.mask)


def test_an_answer_without_anchors_is_an_empty_mask_with_its_text(segmenter: Segmenter) -> None:
    result = segmenter(picture(), mode="describe-then-segment", max_new_tokens=5)
    assert result.text and SAYS["describe-then-segment"].startswith(result.text.rstrip("\ufffd"))
    assert (result.anchors_found, result.anchor_groups, result.truncated) == (False, 0, True)
    assert not result.mask.any() and not result.anomaly_map.any() and not result.is_anomalous and result.score == 0


def test_of_two_groups_the_first_makes_the_mask_and_both_are_counted(segmenter: Segmenter, talker: AGVAS) -> None:
    mode = "segment-then-explain"
    both, reference = segmenter(picture(), mode=mode), talker.segment(picture(), mode=mode)
    assert both.anchor_groups == reference.anchor_groups == 2
    first_alone = segmenter(picture(), mode=mode, max_new_tokens=5)
    assert first_alone.anchor_groups == 1
    np.testing.assert_allclose(both.anomaly_map, first_alone.anomaly_map, atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "anchors", "groups", "truncated"),
    [
        ("NAS.E", (0, 1, 2), 1, False),
        ("..NAS.NASE", (2, 3, 4), 2, False),
        ("NANSAE", (0, 1, 3), 1, False),  # said twice within a group: where it came first
        ("SANNASE", (2, 1, 0), 2, False),
        ("NAS.NAS", (0, 1, 2), 1, True),  # the last was never read back
        ("NA.E", None, 0, False),
        ("NASNASNASE", (0, 1, 2), 3, False),
        ("...", None, 0, True),
        ("", None, 0, True),
    ],
)
def test_an_answer_is_read_group_by_group(
    answer: str, anchors: tuple[int, ...] | None, groups: int, truncated: bool, babbler: AGVAS
) -> None:
    encoder = babbler.prompt_encoder
    ids = dict(zip("NASE.", (*encoder.anchor_ids, encoder.end_id, encoder.encode("x").suffix[0])))
    read = encoder.read([ids[letter] for letter in answer])
    assert (read.anchors, read.anchor_groups, read.truncated) == (anchors, groups, truncated)
    assert encoder.find_anchors([ids[letter] for letter in answer]) == anchors


# Text while it is written


@pytest.mark.parametrize("mode", MODES)
def test_the_pieces_are_the_text_and_no_letter_comes_in_halves(mode: str, segmenter: Segmenter) -> None:
    pieces: list[str] = []
    result = segmenter(picture(), **arguments(mode), on_text=pieces.append)
    assert "".join(pieces) == result.text == SAYS[mode]
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    if mode == "direct":
        assert pieces == [ANSWER], "a confirmed draft is there at once"
    else:
        assert len(pieces) >= 8
        assert "[SEG]" in "".join(pieces[:-1]) + pieces[-1]


def stream(encoder: PromptEncoder, ids: list[int]) -> list[str]:
    pieces: list[str] = []
    streaming = TextStream(encoder.decode, pieces.append)
    for count in range(1, len(ids)):
        streaming.update(ids[:count])
    streaming.end(ids)
    return pieces


def test_any_tokens_at_all_come_through_as_their_text(babbler: AGVAS) -> None:
    encoder, rng = babbler.prompt_encoder, np.random.default_rng(0)
    letters = [encoder._tokenizer.encode(text, add_special_tokens=False).ids for text in ("é", "缺", "🔍", " ", "\u3000", "a\n", "[NOR]")]
    whole = 0
    for _ in range(300):
        ids = [i for pick in rng.integers(0, len(letters), 8) for i in letters[pick]]
        if rng.random() < 0.5:  # anything else, whole letters or not
            ids = ids[: rng.integers(1, len(ids))] + rng.integers(0, 512, 4).tolist() + ids[-2:]
        pieces = stream(encoder, ids)
        assert "".join(pieces) == encoder.decode(ids)
        assert all(pieces)
        whole += "\ufffd" not in encoder.decode(ids)
    assert 50 < whole < 290, "both whole and broken letters must occur"


def test_an_answer_cut_within_a_letter_ends_in_the_mark_for_it(babbler: AGVAS) -> None:
    encoder = babbler.prompt_encoder
    ids = list(encoder._tokenizer.encode("ab 🔍", add_special_tokens=False).ids)[:-1]
    assert stream(encoder, ids)[-1].strip() == "\ufffd" and "".join(stream(encoder, ids)) == encoder.decode(ids) == "ab \ufffd"


@pytest.mark.parametrize("deadline", [None, 60.0])
def test_a_callback_that_cannot_be_called_is_refused_before_the_picture_is_read(deadline: float | None, segmenter: Segmenter) -> None:
    with pytest.raises(RequestError, match="on_text: expected a function"):
        segmenter("no-such-file.png", on_text=5, deadline=deadline)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="on_text: expected a function"):
        segmenter.inspect(picture()).ask(on_text="print")  # type: ignore[arg-type]


def test_what_the_callback_raises_ends_the_answer_and_the_picture_can_be_asked_again(segmenter: Segmenter) -> None:
    heard: list[str] = []

    def enough(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 3:
            raise KeyError("enough")

    inspection = segmenter.inspect(picture())
    with pytest.raises(KeyError, match="enough"):
        inspection.ask(mode="describe-then-segment", on_text=enough)
    assert len(heard) == 3
    assert inspection.ask(mode="describe-then-segment").text == SAYS["describe-then-segment"]


# Several instructions about one picture


def test_each_answer_about_one_picture_is_a_fresh_calls(segmenter: Segmenter) -> None:
    requests = [arguments(mode) for mode in MODES] + [{"instruction": "Find dents."}, arguments("direct"), {"mode": MODES[1]}]
    for seed in range(2):
        inspection = segmenter.inspect(picture(seed))
        for request in requests:
            ours, fresh = inspection.ask(**request), segmenter(picture(seed), **request)
            assert (ours.text, ours.anchor_groups, ours.answer_verified) == (fresh.text, fresh.anchor_groups, fresh.answer_verified)
            np.testing.assert_array_equal(ours.mask, fresh.mask)
            np.testing.assert_allclose(ours.anomaly_map, fresh.anomaly_map, atol=1e-5)


def test_babble_about_one_picture_is_the_references_from_the_second_instruction_on(babbler: AGVAS) -> None:
    pipeline = pipeline_over(babbler, torch_stages(babbler))
    vision = pipeline.see(picture(2))
    for instruction in ("Find dents.", "Find scratches, please.", "Rust?"):
        for mode in ("direct", "segment-then-explain"):
            trace = pipeline.answer(vision, babbler.prompt_encoder.encode(instruction, mode))
            assert trace.answer == babbler.segment(picture(2), instruction, mode).answer_ids


def test_a_second_instruction_costs_its_own_tokens_and_nothing_of_the_picture(talker: AGVAS) -> None:
    stages = torch_stages(talker)
    calls: list[tuple[str, int]] = []
    for name, stage in stages.items():

        def counted(feeds: dict[str, np.ndarray], name: str = name, run: Any = stage.run) -> dict[str, np.ndarray]:
            calls.append((name, feeds["input_embeddings"].shape[1] if name == "language" else 0))
            return run(feeds)

        stage.run = counted  # type: ignore[method-assign]
    pipeline = pipeline_over(talker, stages)
    prompt = talker.prompt_encoder.encode()
    assert prompt.draft is not None
    vision = pipeline.see(picture())
    own = len(prompt.suffix) + len(prompt.draft) - 1
    of_picture = len(prompt.prefix) + 2 * vision.tensors["image_embeddings"].shape[1]
    for _ in range(3):
        assert pipeline.answer(vision, prompt).verified
    assert [name for name, _ in calls[:3]] == ["pixel_encoder", "semantic_encoder", "spam"]
    assert calls[3:] == [call for tokens in (of_picture + own, own, own) for call in (("language", tokens), ("mask_decoder", 0))]


def test_seeing_is_told_with_the_first_answer_and_not_again(segmenter: Segmenter) -> None:
    inspection = segmenter.inspect(picture())
    first, second = inspection.ask().timings, inspection.ask().timings
    assert {"preprocess", "pixel_encoder", "semantic_encoder", "spam", "language", "mask_decoder", "postprocess", "total"} == first.keys()
    assert {"language", "mask_decoder", "postprocess", "total"} == second.keys()
    for timings in (first, second):
        assert sum(spent for name, spent in timings.items() if name != "total") <= timings["total"]


def test_threads_may_ask_about_one_picture_at_once(segmenter: Segmenter) -> None:
    inspection, start, said = segmenter.inspect(picture()), threading.Barrier(4), dict[str, list[str]]()

    def work(mode: str) -> None:
        start.wait()
        said[mode] = [inspection.ask(**arguments(mode)).text for _ in range(3)]

    threads = [threading.Thread(target=work, args=(mode,)) for mode in MODES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {mode: [SAYS[mode]] * 3 for mode in MODES}
