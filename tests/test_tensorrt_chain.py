"""The stages on a doubled GPU as one chain: what they hand to one another there, when the host waits, and whose times are told."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_machine import BOTH, Gpu, assert_equal, language_feeds, reference, spam_feeds

from engines import EngineFailed, EngineOptions, Joined
from runtime import Segmenter
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.pipeline import Pipeline
from runtime.prompts import Prompt
from runtime.verify import open_pipeline


def chain(gpu: Gpu, bundle: Path) -> tuple[Pipeline, Prompt, list[np.ndarray]]:
    gpu.build(bundle)
    opened = Bundle(bundle)
    pictures = [picture for name, picture in opened.golden().items() if name.endswith(".image")]
    pipeline = open_pipeline(opened, gpu.engine, EngineOptions("cuda:0"))
    return pipeline, pipeline.prompts.encode(), pictures


@BOTH
def test_nothing_but_pictures_words_and_results_crosses_the_host(gpu: Gpu, tiny_bundle: Path) -> None:
    pipeline, prompt, (picture, *_) = chain(gpu, tiny_bundle)
    for _ in range(3):
        before = dict(gpu.cuda.copied)
        trace = pipeline.run(picture, prompt)
    moved = {direction: size - before[direction] for direction, size in gpu.cuda.copied.items()}
    assert trace.verified and trace.anchor_states is not None
    seen = pipeline.prepare(picture)
    words = len(prompt.prefix) + len(prompt.suffix) + len(prompt.draft or ()) - 1
    rows, width = len(prompt.draft or ()), trace.anchor_states.shape[2]
    tokens = words + 2 * trace.tensors["image_embeddings"].shape[1]
    assert moved["HostToDevice"] == (
        seen.pixel_image.nbytes + seen.semantic_image.nbytes + 4 * words * width + 8 * tokens + 8 * rows + trace.anchor_states.nbytes
    )
    fetched = ("states", "logits", "probability_absolute", "probability_relative", "anomaly_map")
    assert moved["DeviceToHost"] == sum(trace.tensors[name].nbytes for name in fetched)


@BOTH
def test_the_host_waits_once_all_that_sees_a_picture_is_queued(gpu: Gpu, tiny_bundle: Path) -> None:
    pipeline, _, (picture, *_) = chain(gpu, tiny_bundle)
    prepared = pipeline.prepare(picture)
    for _ in range(3):
        gpu.cuda.calls.clear()
        vision = pipeline.look(prepared)
    waits = [index for index, name in enumerate(gpu.cuda.calls) if name == "cudaEventSynchronize"]
    queued = [index for index, name in enumerate(gpu.cuda.calls) if name in ("cudaGraphLaunch", "cudaStreamWaitEvent")]
    assert len(waits) == 3 and len(queued) == 5 and max(queued) < min(waits)
    wanted = Pipeline.look(open_pipeline(Bundle(tiny_bundle), "onnxruntime", EngineOptions()), prepared)
    assert_equal(vision.tensors, wanted.tensors)


@BOTH
def test_pictures_that_overlap_use_the_same_graphs_and_keep_their_numbers(gpu: Gpu, tiny_bundle: Path) -> None:
    pipeline, prompt, pictures = chain(gpu, tiny_bundle)
    plain = open_pipeline(Bundle(tiny_bundle), "onnxruntime", EngineOptions())
    visions = [pipeline.see(picture) for picture in pictures[:3]]
    for vision in visions:
        pipeline.answer(vision, prompt)
    gpu.cuda.calls.clear()
    visions = [pipeline.see(picture) for picture in pictures[:3]]
    assert "cudaStreamBeginCapture" not in gpu.cuda.calls and gpu.cuda.calls.count("cudaGraphLaunch") == 9
    for vision, picture in zip(visions, pictures):
        ours, wanted = pipeline.answer(vision, prompt), plain.run(picture, prompt)
        np.testing.assert_allclose(ours.anomaly_map, wanted.anomaly_map, atol=1e-5)
        assert ours.answer == wanted.answer


@BOTH
def test_each_stage_tells_what_it_took_on_the_gpu(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle)
    picture = Bundle(tiny_bundle).golden()["0.image"]
    gpu.cuda.milliseconds = 0.5
    result = Segmenter(tiny_bundle, gpu.engine, "cuda:0")(picture)
    assert result.device_timings == dict.fromkeys(STAGES, 0.5)
    tiled = Segmenter(tiny_bundle, gpu.engine, "cuda:0", tile=64)(np.zeros((64, 128, 3), np.uint8))
    assert tiled.tiles > 1 and tiled.device_timings == dict.fromkeys(STAGES, 0.5 * tiled.tiles)
    assert Segmenter(tiny_bundle, "onnxruntime")(picture).device_timings == {}


@BOTH
def test_a_second_call_ends_the_first_which_keeps_its_numbers(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    language = gpu.open(tiny_bundle, "language")
    feeds = [language_feeds(tiny_bundle, 9, 0, seed) for seed in range(3)]
    calls = [language.start(each) for each in feeds]
    assert calls[-1].milliseconds is None
    for call, each in zip(calls, feeds):
        assert_equal(call.result(), reference(tiny_bundle, "language", each))
        assert_equal(call.result(), reference(tiny_bundle, "language", each))
        assert call.milliseconds == gpu.cuda.milliseconds


@BOTH
def test_what_stays_may_be_read_before_its_call_was_waited_for(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam", "language"))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle)
    wanted = reference(tiny_bundle, "spam", feeds)["aligned_embeddings"]
    np.testing.assert_allclose(np.asarray(spam.start(feeds).resident["aligned_embeddings"]), wanted, rtol=1e-5, atol=1e-5)
    resident: Any = spam.start(feeds).resident["aligned_embeddings"]
    del spam
    gc.collect()
    assert not gpu.cuda.streams, "the engine is gone, and its work was waited for"
    language, feeds = gpu.open(tiny_bundle, "language"), language_feeds(tiny_bundle, wanted.shape[1], 0)
    ours = language.run(feeds | {"input_embeddings": resident})
    assert_equal(ours, reference(tiny_bundle, "language", feeds | {"input_embeddings": wanted}))
    np.testing.assert_allclose(np.asarray(resident), wanted, rtol=1e-5, atol=1e-5)


@BOTH
def test_calls_that_nobody_waits_for_leave_nothing_behind(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle, 1)
    for seed in range(4):
        spam.start(spam_feeds(tiny_bundle, seed))
    assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))
    spam.start(feeds)
    del spam
    gc.collect()
    assert not gpu.cuda.device and not gpu.cuda.pinned and not gpu.cuda.streams and not gpu.cuda.graphs


@BOTH
def test_what_a_call_reads_is_not_used_again_before_its_end(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam", "language"))
    spam, language = gpu.open(tiny_bundle), gpu.open(tiny_bundle, "language")
    aligned = np.asarray(spam.run(spam_feeds(tiny_bundle, 1))["aligned_embeddings"])
    feeds = language_feeds(tiny_bundle, aligned.shape[1], 0)
    call = language.start(feeds | {"input_embeddings": spam.start(spam_feeds(tiny_bundle, 1)).resident["aligned_embeddings"]})
    spam.run(spam_feeds(tiny_bundle, 2))
    assert_equal(call.result(), reference(tiny_bundle, "language", feeds | {"input_embeddings": aligned}))


@BOTH
def test_a_call_that_fails_while_it_is_queued_spoils_no_later_one(gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, prompt, (picture, *_) = chain(gpu, tiny_bundle)
    right = pipeline.run(picture, prompt).anomaly_map
    stage: Any = pipeline.stages["spam"]
    with monkeypatch.context() as failing:
        failing.setattr(type(stage._threads.execution), "_enqueue", lambda execution, bound: _refuse())
        failing.setattr(type(stage._threads.execution), "_can_be_captured", lambda execution: False)
        stage._threads.execution._drop_graph()
        with pytest.raises(EngineFailed, match="no room"):
            pipeline.stages["spam"].run(spam_feeds(tiny_bundle))
    for _ in range(3):
        np.testing.assert_array_equal(pipeline.run(picture, prompt).anomaly_map, right)


def _refuse() -> None:
    raise EngineFailed("no room")


@BOTH
def test_parts_are_put_together_on_the_device(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam", "language"))
    spam, language = gpu.open(tiny_bundle), gpu.open(tiny_bundle, "language")
    aligned: Any = spam.run(spam_feeds(tiny_bundle, 1))["aligned_embeddings"]
    tokens = aligned.shape[1]
    feeds = language_feeds(tiny_bundle, 7 + tokens + 2, 0)
    words = feeds["input_embeddings"]
    for _ in range(3):
        parts: Any = Joined([words[:, :7], aligned, words[:, -2:]])
        joined = np.concatenate([words[:, :7], np.asarray(aligned), words[:, -2:]], axis=1)
        np.testing.assert_array_equal(np.asarray(parts), joined)
        before = gpu.cuda.copied["HostToDevice"]
        ours = language.run(feeds | {"input_embeddings": parts})
        others = sum(feeds[name].nbytes for name in ("positions", "rows"))
        assert gpu.cuda.copied["HostToDevice"] - before == 4 * 9 * words.shape[2] + others
        assert_equal(ours, reference(tiny_bundle, "language", feeds | {"input_embeddings": joined}))


def test_parts_that_do_not_fit_are_refused() -> None:
    part = np.zeros((1, 2, 4), np.float32)
    for other in (np.zeros((1, 2, 5), np.float32), np.zeros((2, 2, 4), np.float32), np.zeros((1, 2, 4)), np.zeros((2, 4), np.float32)):
        with pytest.raises(ValueError, match=r"expected parts \[1, n, D\] of one width and type"):
            Joined([part, other])


@BOTH
def test_a_picture_seen_in_one_thread_is_answered_in_another(gpu: Gpu, tiny_bundle: Path) -> None:
    pipeline, prompt, pictures = chain(gpu, tiny_bundle)
    plain = open_pipeline(Bundle(tiny_bundle), "onnxruntime", EngineOptions())
    visions = [pipeline.see(picture) for picture in pictures]
    maps = []

    def answer() -> None:
        maps.extend(pipeline.answer(vision, prompt).anomaly_map for vision in visions)

    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    for ours, picture in zip(maps, pictures, strict=True):
        np.testing.assert_allclose(ours, plain.run(picture, prompt).anomaly_map, atol=1e-5)


@BOTH
def test_a_stream_and_one_stage_at_a_time_give_the_same_masks(gpu: Gpu, tiny_bundle: Path) -> None:
    _, _, pictures = chain(gpu, tiny_bundle)
    plain = Segmenter(tiny_bundle, "onnxruntime")
    wanted = [plain(picture) for picture in pictures]
    for options in ({}, {"low_memory": True}):
        segmenter = Segmenter(tiny_bundle, gpu.engine, "cuda:0", **options)
        for _ in range(2):
            for streamed, right in zip(segmenter.stream(pictures), wanted, strict=True):
                np.testing.assert_allclose(streamed.get().anomaly_map, right.anomaly_map, atol=1e-5)
    del segmenter, streamed
    gc.collect()
