"""The TensorRT runner's memory on a double of the GPU: what is bound, captured, kept, and what crosses between host and device."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import cuda_double
import numpy as np
import pytest
from tensorrt_machine import BOTH, Feeds, Gpu, assert_equal, language_feeds, reference, spam_feeds

from engines import EngineFailed, EngineOptions, open_engine
from runtime.bundle import Bundle
from runtime.contract import LANGUAGE, STAGES


@BOTH
def test_memory_is_bound_once_and_grows_when_a_larger_tensor_comes(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    language = gpu.open(tiny_bundle, "language")
    gpu.cuda.calls.clear()
    for tokens, past in ((30, 0), (29, 0), (1, 20), (1, 21), (30, 0)):
        feeds = language_feeds(tiny_bundle, tokens, past, seed=past)
        assert_equal(language.run(feeds), reference(tiny_bundle, "language", feeds))
    taken, pinned = (gpu.cuda.calls.count(name) for name in ("cudaMalloc", "cudaMallocHost"))
    tensors = len(LANGUAGE.inputs) + len(LANGUAGE.outputs)
    # The past grows twice from its one byte; nothing else does. Keys and values stay on the device and have no pinned twin.
    assert tensors <= taken <= tensors + 4 and pinned == taken - 2
    assert gpu.cuda.calls.count("cudaStreamCreateWithFlags") == 1


@BOTH
def test_the_second_call_with_the_same_shapes_is_captured_and_later_ones_are_one_launch(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam = gpu.open(tiny_bundle)
    for seed in range(4):
        gpu.cuda.calls.clear()
        feeds = spam_feeds(tiny_bundle, seed)
        assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))
        assert ("cudaStreamBeginCapture" in gpu.cuda.calls) is (seed == 1)
        assert ("cudaGraphLaunch" in gpu.cuda.calls) is (seed >= 1)
        if seed >= 2:
            queued = ["cudaEventRecord", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaEventRecord"]  # the copy is the output's that stays
            assert gpu.cuda.calls[: 1 + len(queued)] == ["cudaSetDevice", *queued]
            assert gpu.cuda.calls[1 + len(queued) :][:2] == ["cudaEventSynchronize", "cudaEventElapsedTime"]


@BOTH
def test_other_shapes_drop_the_graph_and_the_numbers_stay_right(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",), max_batch=3)
    spam = gpu.open(tiny_bundle)
    for batch in (1, 1, 1, 3, 3, 3, 1, 1):
        feeds = spam_feeds(tiny_bundle, batch, batch)
        assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))
    assert len(gpu.cuda.graphs) == 1  # the last shapes'
    del spam
    assert not gpu.cuda.graphs and not gpu.cuda.device and not gpu.cuda.pinned and not gpu.cuda.streams


def test_kernels_still_being_compiled_are_not_captured(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle)
    gpu.trt.capturable = False
    for _ in range(3):
        spam.run(feeds)
    assert "cudaStreamBeginCapture" not in gpu.cuda.calls
    gpu.trt.capturable = True
    assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))
    assert "cudaGraphLaunch" in gpu.cuda.calls


@BOTH
def test_an_engine_that_cannot_be_captured_runs_without_and_says_so_once(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle)
    gpu.cuda.refuse_capture = True
    spam.run(feeds)
    with pytest.warns(RuntimeWarning, match="stage spam runs without a CUDA graph.*cudaErrorStreamCaptureInvalidated"):
        ours = spam.run(feeds)
    assert_equal(ours, reference(tiny_bundle, "spam", feeds))
    assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))
    assert gpu.cuda.calls.count("cudaStreamBeginCapture") == 1


@BOTH
@pytest.mark.parametrize("ran", [True, False], ids=["with memory", "never run"])
def test_an_engine_that_the_collector_finds_during_a_capture_is_freed_after_it(
    ran: bool, gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle)
    spam.run(feeds)
    kept = len(gpu.cuda.device)
    lost: Any = gpu.open(tiny_bundle)
    if ran:
        lost.run(feeds)
    lost.itself = lost
    del lost
    execute = cuda_double._Context.execute_async_v3

    def collecting(context: Any, stream: int) -> bool:
        assert gpu.cuda.capturing[stream] is not None
        assert gc.collect()
        return execute(context, stream)

    with monkeypatch.context() as during:
        during.setattr(cuda_double._Context, "execute_async_v3", collecting)
        assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))
    assert len(gpu.cuda.graphs) == 1 and len(gpu.cuda.device) == kept


@BOTH
def test_a_capture_that_fails_inside_leaves_no_graph_behind(gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library may refuse to run while the capture itself is still valid."""
    gpu.build(tiny_bundle, stages=("spam",))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle)
    spam.run(feeds)
    with monkeypatch.context() as refusing, pytest.warns(RuntimeWarning, match="stage spam runs without a CUDA graph"):
        execute = cuda_double._Context.execute_async_v3
        refusing.setattr(
            cuda_double._Context,
            "execute_async_v3",
            lambda context, stream: gpu.cuda.capturing.get(stream) is None and execute(context, stream),
        )
        assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))
    assert not gpu.cuda.graphs


@BOTH
def test_every_thread_has_a_context_of_its_own(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    language = gpu.open(tiny_bundle, "language")
    requests = [language_feeds(tiny_bundle, 10 + index, index, index) for index in range(4)]
    alone = [reference(tiny_bundle, "language", feeds) for feeds in requests]
    gpu.trt.contexts = 0
    start, wrong = threading.Barrier(len(requests)), list[str]()

    def work(index: int) -> None:
        start.wait()
        try:
            for _ in range(5):
                assert_equal(language.run(requests[index]), alone[index])
        except BaseException as error:
            wrong.append(f"{index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and gpu.trt.contexts == len(requests)


@BOTH
def test_a_result_is_the_callers_own(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam", "language"))
    spam, language = gpu.open(tiny_bundle), gpu.open(tiny_bundle, "language")
    first = spam.run(spam_feeds(tiny_bundle, 1)) | language.run(language_feeds(tiny_bundle, 9, 0, 1))
    kept = {name: np.array(value) for name, value in first.items()}
    spam.run(spam_feeds(tiny_bundle, 2))
    language.run(language_feeds(tiny_bundle, 9, 0, 2))
    assert_equal(first, kept)


def test_kernels_compiled_on_the_device_are_kept_for_the_next_start(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, path = gpu.open(tiny_bundle), gpu.key(tiny_bundle).path.with_suffix(".kernels")
    assert not gpu.trt.read_kernels and not path.exists()
    spam.run(spam_feeds(tiny_bundle))
    assert path.read_bytes() == b"kernels"
    gpu.trt.read_kernels.clear()
    again = gpu.open(tiny_bundle)
    path.unlink()
    again.run(spam_feeds(tiny_bundle))
    assert gpu.trt.read_kernels == [b"kernels"] and not path.exists(), "those that were read are not written again"
    path.write_bytes(b"kernels")
    gpu.build(tiny_bundle, stages=("spam",), rebuild=True)
    assert not path.exists(), "those of the engine before"
    gpu.trt.takes_kernels = False
    path.write_bytes(b"those of another driver")
    gpu.open(tiny_bundle).run(spam_feeds(tiny_bundle))
    assert path.read_bytes() == b"kernels"


def test_kernels_compiled_in_the_background_are_kept_too(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, path, found = gpu.open(tiny_bundle), gpu.key(tiny_bundle).path.with_suffix(".kernels"), list[int]()
    for call in range(1, 7):
        gpu.trt.saved_kernels = b"k" * call
        spam.run(spam_feeds(tiny_bundle))
        found.append(len(path.read_bytes()))
    assert found == [1, 2, 2, 4, 4, 4]
    del spam
    assert len(path.read_bytes()) == 6


def test_kernels_of_fixed_shapes_are_compiled_before_the_first_call(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle)
    gpu.trt.configs.clear()
    for stage in STAGES:
        gpu.open(tiny_bundle, stage)
    gpu.build(tiny_bundle, stages=("spam",), max_batch=2, rebuild=True)
    gpu.open(tiny_bundle)
    strategies = [config.dynamic_shapes_kernel_specialization_strategy.name for config in gpu.trt.configs]
    assert dict(zip((*STAGES, "two at once"), strategies)) == {
        **dict.fromkeys(STAGES, "EAGER"),
        "language": "LAZY",
        "two at once": "LAZY",
    }


def test_threads_take_turns_in_keeping_kernels(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, wrong = gpu.open(tiny_bundle), list[BaseException]()

    def work() -> None:
        try:
            for _ in range(4):
                spam.run(spam_feeds(tiny_bundle))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and gpu.key(tiny_bundle).path.with_suffix(".kernels").read_bytes() == b"kernels"


def test_too_little_memory_on_the_gpu_is_told_in_cudas_words(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam = gpu.open(tiny_bundle)
    gpu.cuda.memory = 100
    with pytest.raises(EngineFailed, match=r"CUDA: out of memory \(cudaErrorMemoryAllocation\)"):
        spam.run(spam_feeds(tiny_bundle))
    gpu.cuda.memory = 1 << 30
    assert_equal(spam.run(spam_feeds(tiny_bundle)), reference(tiny_bundle, "spam", spam_feeds(tiny_bundle)))


def test_shapes_that_the_library_cannot_infer_fail_in_the_stages_name(
    gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam = gpu.open(tiny_bundle)

    def broken(context: object) -> list[str]:
        raise RuntimeError("node_7 is odd")

    monkeypatch.setattr(cuda_double._Context, "infer_shapes", broken)
    with pytest.raises(EngineFailed, match=r"stage spam: its outputs' shapes were not found: node_7 is odd \(the library gave no reason\)"):
        spam.run(spam_feeds(tiny_bundle))


def test_memory_that_the_library_refused_once_is_offered_again(gpu: Gpu, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.build(tiny_bundle, stages=("spam",))
    spam, feeds = gpu.open(tiny_bundle), spam_feeds(tiny_bundle)
    with monkeypatch.context() as refusing:
        refusing.setattr(cuda_double._Context, "set_tensor_address", lambda context, name, address: False)
        with pytest.raises(EngineFailed, match="stage spam: the memory of .* was refused"):
            spam.run(feeds)
    assert_equal(spam.run(feeds), reference(tiny_bundle, "spam", feeds))


# What stays on the device

PRESENT = {"past_keys": "present_keys", "past_values": "present_values"}


def decoded(engine: Any, bundle: Path, steps: int) -> tuple[list[Feeds], list[Feeds]]:
    """A pass over 20 tokens and `steps` more that are fed its keys and values back; what was fed beside those, and the outputs."""
    fed, outputs = [language_feeds(bundle, 20, 0)], list[Feeds]()
    outputs.append(engine.run(fed[0]))
    for step in range(steps):
        fed.append(language_feeds(bundle, 1, 20 + step, seed=step))
        outputs.append(engine.run(fed[-1] | {past: outputs[-1][present] for past, present in PRESENT.items()}))
    return fed, outputs


@BOTH
def test_a_step_of_an_answer_moves_no_past_over_the_host(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    language = gpu.open(tiny_bundle, "language")
    plain = open_engine(Bundle(tiny_bundle).graph("language"), LANGUAGE, "onnxruntime")
    (_, *fed), (_, *ours) = decoded(language, tiny_bundle, 3)
    _, (_, *wanted) = decoded(plain, tiny_bundle, 3)
    for step in range(3):
        assert_equal(ours[step], wanted[step])
        assert not isinstance(ours[step]["present_keys"], np.ndarray) and isinstance(ours[step]["logits"], np.ndarray)
    before = dict(gpu.cuda.copied)
    again = language.run(fed[2] | {past: ours[1][present] for past, present in PRESENT.items()})
    moved = {direction: size - before[direction] for direction, size in gpu.cuda.copied.items()}
    assert moved == {
        "HostToDevice": sum(array.nbytes for name, array in fed[2].items() if name not in PRESENT),
        "DeviceToHost": again["states"].nbytes + again["logits"].nbytes,
    }
    assert_equal(again, wanted[2])


@BOTH
def test_what_stays_never_changes_and_outlives_the_engine(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    language = gpu.open(tiny_bundle, "language")
    _, outputs = decoded(language, tiny_bundle, 4)
    last = outputs[-1]["present_keys"]
    for tokens, output in enumerate(outputs, start=20):
        np.testing.assert_array_equal(np.asarray(output["present_keys"]), np.asarray(last)[:, :, :, :tokens])
    kept = np.asarray(last)
    del language, output
    outputs.clear()
    np.testing.assert_array_equal(np.asarray(last), kept)
    assert len(gpu.cuda.device) == 1 and not gpu.cuda.streams
    ours, plain = both(gpu, tiny_bundle)
    feeds = language_feeds(tiny_bundle, 1, 24)
    assert_equal(ours.run(feeds | {"past_keys": last}), plain.run(feeds | {"past_keys": kept}))
    del ours, last
    assert not gpu.cuda.device and not gpu.cuda.pinned


def both(gpu: Gpu, bundle: Path) -> tuple[Any, Any]:
    """The language stage on the GPU and on onnxruntime's CPU."""
    return gpu.open(bundle, "language"), open_engine(Bundle(bundle).graph("language"), LANGUAGE, "onnxruntime")


@BOTH
@pytest.mark.parametrize("low_memory", [False, True])
def test_memory_of_what_stayed_is_used_again_unless_little_is_to_be_kept(low_memory: bool, gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    language = gpu.open(tiny_bundle, "language", EngineOptions("cuda:0", low_memory=low_memory))
    decoded(language, tiny_bundle, 0)
    empty = len(gpu.cuda.device)
    gpu.cuda.calls.clear()
    decoded(language, tiny_bundle, 0)
    assert gpu.cuda.calls.count("cudaMalloc") == gpu.cuda.calls.count("cudaFree") == (2 if low_memory else 0)
    assert ("cudaGraphLaunch" in gpu.cuda.calls) is (not low_memory) and len(gpu.cuda.device) == empty


@BOTH
def test_a_graph_is_used_at_its_own_addresses_alone(gpu: Gpu, tiny_bundle: Path) -> None:
    """Pictures that overlap: of two of the same shapes the first one's keys and values are still needed when the second comes."""
    gpu.build(tiny_bundle, stages=("language",))
    ours, plain = both(gpu, tiny_bundle)
    held: list[Feeds] = []
    launched = []
    for seed in range(8):
        feeds = language_feeds(tiny_bundle, 12, 0, seed)
        gpu.cuda.calls.clear()
        held.append(ours.run(feeds))
        launched.append("cudaGraphLaunch" in gpu.cuda.calls)
        assert_equal(held[-1], plain.run(feeds))
        if seed not in (2, 3):
            held.pop()
    assert launched == [False, True, True, False, False, True, True, True]
    for seed, output in zip((2, 3), held):
        assert_equal(output, plain.run(language_feeds(tiny_bundle, 12, 0, seed)))


@BOTH
def test_a_graph_captured_for_a_past_on_the_device_is_not_used_for_one_of_the_host(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    ours, plain = both(gpu, tiny_bundle)
    first = ours.run(language_feeds(tiny_bundle, 9, 0))
    feeds = language_feeds(tiny_bundle, 3, 9, 1)
    for _ in range(3):
        ours.run(feeds | {past: first[present] for past, present in PRESENT.items()})
    for seed in range(2, 6):
        feeds = language_feeds(tiny_bundle, 3, 9, seed)
        assert_equal(ours.run(feeds), plain.run(feeds))


@BOTH
def test_keys_and_values_pass_from_thread_to_thread(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle, stages=("language",))
    ours, plain = both(gpu, tiny_bundle)
    _, wanted = decoded(plain, tiny_bundle, 3)
    fed = [language_feeds(tiny_bundle, 20, 0), *(language_feeds(tiny_bundle, 1, 20 + step, seed=step) for step in range(3))]
    outputs: list[Feeds] = []

    def work(language: Any, feeds: Feeds) -> None:
        past = {past: outputs[-1][present] for past, present in PRESENT.items()} if outputs else {}
        outputs.append(language.run(feeds | past))

    for feeds in fed:
        thread = threading.Thread(target=work, args=(ours, feeds))
        thread.start()
        thread.join()
    for output, right in zip(outputs, wanted, strict=True):
        assert_equal(output, right)
    outputs.clear()
    del ours, output
    assert not gpu.cuda.device


@BOTH
def test_what_lies_on_another_gpu_comes_over_the_host(gpu: Gpu, tiny_bundle: Path) -> None:
    gpu.cuda.second = "8.9"
    gpu.build(tiny_bundle, stages=("language",))
    first, second = (gpu.open(tiny_bundle, "language", EngineOptions(f"cuda:{number}")) for number in (0, 1))
    _, (began, *_) = decoded(first, tiny_bundle, 0)
    feeds = language_feeds(tiny_bundle, 1, 20) | {past: began[present] for past, present in PRESENT.items()}
    before = gpu.cuda.copied["DeviceToHost"]
    there = second.run(feeds)
    assert gpu.cuda.copied["DeviceToHost"] - before >= 2 * began["present_keys"].size * 4
    assert_equal(there, first.run(feeds))
