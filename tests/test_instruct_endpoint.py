"""Endpoint and pace: when a request is sent, how long it may take, and what a run makes of one that gets no answer."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import ANSWER, GOOD, Server, completion, last_line, lines_of, run, skip_waits, write_dataset

from agvas.instruct.cli import main
from agvas.instruct.endpoint import Endpoint, EndpointClosed, Pace, RequestFailed, Stopped


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return skip_waits(monkeypatch)


def test_requests_keep_the_rate_with_any_number_of_workers() -> None:
    now, lock = [100.0], threading.Lock()
    started: list[float] = []

    def sleep(seconds: float) -> None:
        with lock:
            now[0] += seconds

    pace = Pace(30, lambda: now[0], sleep)
    for _ in range(10):
        pace.wait()
        started.append(now[0])
    assert np.diff(started) == pytest.approx([2.0] * 9)
    now[0] += 60
    for _ in range(3):
        pace.wait()
        started.append(now[0])
    assert np.diff(started[-3:]) == pytest.approx([2.0] * 2), "time that went unused is not caught up"


def test_a_hold_keeps_everyone_back_even_who_waits_already() -> None:
    now = [0.0]
    waited: list[float] = []
    pace: Pace

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds
        if len(waited) == 1:
            pace.hold(10.0)

    pace = Pace(60, lambda: now[0], sleep)
    pace.wait()
    pace.wait()
    assert waited == [1.0, 10.0] and now[0] == 11.0


def test_a_stopped_pace_wakes_who_waits() -> None:
    pace = Pace(0.1)
    pace.wait()
    ended: list[bool] = []

    def wait() -> None:
        with pytest.raises(Stopped):
            pace.wait()
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    pace.stop()
    thread.join(5)
    assert ended == [True]


def test_an_endpoint_may_be_given_with_or_without_its_last_part() -> None:
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert Endpoint(url, None, Pace()).url == "http://h/v1/chat/completions"
    assert Endpoint("https://h/d?api-version=1", None, Pace()).url == "https://h/d/chat/completions?api-version=1"


def test_where_nothing_ever_answered_the_run_ends_and_later_silence_is_one_samples(server: Server, waits: list[float]) -> None:
    nobody = "http://127.0.0.1:1/v1/chat/completions"
    with pytest.raises(EndpointClosed, match=r"no reply.*2 tries\), and nothing has answered there yet; start the endpoint or correct its"):
        Endpoint(nobody, None, Pace(), tries=2).ask({})
    assert len(waits) == 1
    for status in (200, 500):
        server.play = lambda number, body, status=status: (status, completion(ANSWER), {})
        endpoint = Endpoint(server.url, None, Pace(), tries=1)
        with contextlib.suppress(RequestFailed):
            endpoint.ask({})
        endpoint.url = nobody
        with pytest.raises(RequestFailed, match="no reply.*1 tries"):
            endpoint.ask({})


def test_a_first_answer_that_is_on_its_way_to_another_worker_keeps_the_run_going(server: Server, waits: list[float]) -> None:
    arrived, answer = threading.Event(), threading.Event()

    def play(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        arrived.set()
        answer.wait(10)
        return 200, completion(ANSWER), {}

    server.play = play
    endpoint = Endpoint(server.url, None, Pace(), tries=1)
    worker = threading.Thread(target=endpoint.ask, args=({},))
    worker.start()
    assert arrived.wait(10)
    endpoint.url = "http://127.0.0.1:1/v1/chat/completions"  # where the second one finds no slot
    with pytest.raises(RequestFailed, match="no reply.*1 tries"):
        endpoint.ask({})
    answer.set()
    worker.join(10)


def test_a_retry_after_may_be_a_date(server: Server) -> None:
    server.play = lambda number, body: (503, "", {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"})
    with pytest.raises(EndpointClosed, match="asks to wait"):
        Endpoint(server.url, None, Pace()).ask({})


def test_a_retry_after_of_nothing_does_not_take_the_pauses_away(server: Server, waits: list[float]) -> None:
    """0 and less than the pause: the pause grows all the same; more than it: what was asked for."""
    asked = iter(["0", "0", "1", "30"])
    server.play = lambda number, body: (429, "", {"Retry-After": next(asked)}) if number < 4 else (200, completion(ANSWER), {})
    Endpoint(server.url, None, Pace()).ask({})
    assert [round(seconds) for seconds in np.array(waits) / (1, 2, 4, 30)] == [1] * 4, "1, 2, 4 and 30 seconds, a quarter more or less"


@pytest.mark.parametrize("slow", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"], ids=["headers", "body"])
def test_an_answer_that_comes_byte_by_byte_is_lost_when_its_time_is_over(waits: list[float], slow: bytes) -> None:
    """Each byte ends a silence; the whole takes minutes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.sendall(slow)
            for _ in range(600):
                connection.sendall(b"x")
                time.sleep(0.05)

    threading.Thread(target=trickle, daemon=True).start()
    endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", None, Pace(), timeout=0.6, tries=1)
    began = time.monotonic()
    with pytest.raises((EndpointClosed, RequestFailed), match="no whole answer within 0.6 s"):
        endpoint.ask({})
    assert 0.5 < time.monotonic() - began < 5
    listener.close()


# What a run makes of it


FILTERED = '{"error": {"code": "content_filter"}}'


def told_by(server: Server, refused: Callable[[int, dict[str, Any]], bool], said: str = FILTERED) -> None:
    """The server refuses for good what `refused` says, and answers all else."""
    server.play = lambda number, body: (400, said, {}) if refused(number, body) else (200, completion(ANSWER), {})


def is_grey(body: dict[str, Any]) -> bool:
    """Whether three times the same picture is shown."""
    return len({part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"}) == 1


def test_pictures_that_the_endpoint_filters_go_to_review_and_block_no_run(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six at the head, and one among others that are answered: no plain pictures are asked about for that."""
    dataset = write_dataset(tmp_path / "many", 10)
    order: list[dict[str, Any]] = []
    assert run(dataset, server, "--dry-run", "10") == 0
    for folder in last_line(capsys)["dry_run"]:
        order.append(json.loads((Path(folder) / "request.json").read_text()))
    filtered = [order[n] for n in (0, 1, 2, 3, 4, 5, 8)]
    told_by(server, lambda number, body: body in filtered)
    assert run(dataset, server) == 0
    summary = last_line(capsys)
    assert (summary["described"], summary["refused"], summary["undone"]) == (3, 7, 0)
    assert sum(map(is_grey, server.requests)) == 6 and len(server.requests) == 16
    refusals = lines_of(dataset / "instruct/refused.jsonl")
    assert [refusal["image"] for refusal in refusals] == [f"../images/{n}.png" for n in (0, 1, 2, 3, 4, 5, 8)]
    assert all("HTTP 400" in refusal["reasons"][0] and "content_filter" in refusal["reasons"][0] for refusal in refusals)
    assert {refusal["attempts"] for refusal in refusals} == {0} and {refusal["answer"] for refusal in refusals} == {""}
    assert run(dataset, server) == 0 and last_line(capsys)["requests"] == 0


@pytest.mark.parametrize("answered", [0, 1])
def test_a_model_or_option_that_is_not_taken_stops_the_run_at_once_and_refuses_no_picture(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str], answered: int
) -> None:
    """Where requests were answered before, one picture is taken for the cause."""
    dataset = write_dataset(tmp_path / "many", 9)
    told_by(server, lambda number, body: number >= answered, "model m-1 does not exist")
    assert run(dataset, server) == 2
    error = capsys.readouterr().err
    assert "HTTP 400" in error and "model m-1 does not exist" in error and "correct --model" in error and server.url in error
    refused = dataset / "instruct/refused.jsonl"
    assert len(server.requests) == (2 if not answered else 4) and len(lines_of(refused)) == answered


def test_a_refusal_of_the_second_request_keeps_the_first_answer_for_review(tmp_path: Path, server: Server) -> None:
    bad = json.dumps(GOOD | {"Observation": "The masked notch is dark and small."})
    replies: list[tuple[int, Any, dict[str, str]]] = [(200, completion(bad), {}), (400, FILTERED, {})]
    server.play = lambda number, body: replies[number] if number < 2 else (200, completion(ANSWER), {})
    dataset = write_dataset(tmp_path / "bolts")
    assert run(dataset, server) == 0
    (refusal,) = lines_of(dataset / "instruct/refused.jsonl")
    assert refusal["answer"] == bad and refusal["attempts"] == 1 and refusal["usage"] == {"input_tokens": 1000, "output_tokens": 100}
    assert "content_filter" in refusal["reasons"][0] and "'masked'" in refusal["reasons"][1]


def test_half_a_character_is_a_reason_to_ask_again_and_ends_no_run(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a text, inside and outside of the answer's JSON; one sample has nothing else."""
    half = json.dumps(GOOD | {"Observation": "A dark \ud83d notch lies on the left flank of the thread."})
    odd = "\ud83d " + half
    server.play = lambda number, body: (200, completion((half, odd, half, half)[number] if number < 4 else ANSWER), {})
    dataset = write_dataset(tmp_path / "bolts")
    assert run(dataset, server) == 0
    summary = last_line(capsys)
    assert (summary["described"], summary["refused"]) == (2, 1)
    assert "observation holds half a character" in server.requests[1]["messages"][3]["content"]
    assert server.requests[2]["messages"][2]["content"].startswith("\ufffd {")
    (refusal,) = lines_of(dataset / "instruct/refused.jsonl")
    assert refusal["attempts"] == 3 and "half a character" in refusal["reasons"][0]
    assert run(dataset, server, "--retry-refused") == 0 and last_line(capsys)["described"] == 1


def test_a_silent_endpoint_is_told_while_it_is_waited_for_and_what_it_left_open_is_counted(
    tmp_path: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unheard:  # bound and not listening: connections are refused
        unheard.bind(("127.0.0.1", 0))
        dataset, url = write_dataset(tmp_path / "bolts"), f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        arguments = ["--dataset", str(dataset), "--endpoint", url, "--model", "m-1", "--output", str(dataset / "instruct")]
        assert main([*arguments, "--json", "--concurrency", "1", "--tries", "3"]) == 2
    out, error = capsys.readouterr()
    told = "nothing has answered there yet, each request is sent 3 times before that ends the run"
    assert error.count(told) == 1 and len(waits) == 2
    assert "0 left for the next run, 0 done before, 3 not come to an end in this run" in out
    assert json.loads(out.splitlines()[-1])["unfinished"] == 3


def test_a_hiccup_of_an_endpoint_that_has_answered_is_waited_out_in_silence(
    tmp_path: Path, server: Server, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.play = lambda number, body: (500, "oops", {}) if number == 1 else (200, completion(ANSWER), {})
    dataset = write_dataset(tmp_path / "bolts")
    arguments = ["--dataset", str(dataset), "--endpoint", server.url, "--model", "m-1", "--output", str(dataset / "instruct")]
    assert main([*arguments, "--concurrency", "1"]) == 0 and len(waits) == 1
    out, error = capsys.readouterr()
    assert "nothing has answered" not in error and "not come to an end" not in out
