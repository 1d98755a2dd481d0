"""agvas-instruct against a small server that plays the endpoint: every sample described once, whatever goes wrong in between."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import ANSWER, GOOD, KEY, Server, completion, last_line, lines_of, run, skip_waits, write_dataset
from PIL import Image

from agvas.instruct.cli import main
from agvas.instruct.journal import Journal, read_entries
from agvas.training.instructions import dialogue
from agvas.training.sources.errors import DatasetError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "bolts")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return skip_waits(monkeypatch)


def test_each_anomalous_picture_is_described_once_with_paths_that_move_with_the_folder(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(dataset, server, "--price-input", "2", "--price-output", "10") == 0
    summary = last_line(capsys)
    assert (summary["described"], summary["refused"], summary["undone"], summary["requests"]) == (3, 0, 0, 3)
    assert (summary["input_tokens"], summary["output_tokens"]) == (3000, 300)
    assert summary["cost"] == pytest.approx(3000 * 2e-6 + 300 * 10e-6)
    moved = dataset.rename(tmp_path / "elsewhere")
    records = lines_of(moved / "instruct/instruct.jsonl")
    assert [record["image"] for record in records] == [f"../images/{number}.png" for number in range(3)]
    for record in records:
        assert (moved / "instruct" / record["image"]).is_file() and (moved / "instruct" / record["mask"]).is_file()
        assert {name.lower(): text for name, text in GOOD.items()}.items() <= record.items()
        assert (record["class"], record["kind"], record["model"], record["attempts"]) == ("hex_bolt", "cut_notch", "m-1", 1)
        assert record["usage"] == {"input_tokens": 1000, "output_tokens": 100}
    entry = read_entries(moved / "instruct/instruct.jsonl")[0]
    assert dialogue("describe-then-segment", entry.description, np.random.default_rng(0))[1] == GOOD["Summary"]


def test_the_request_shows_boxes_tint_and_normal_picture_and_tells_what_is_known(dataset: Path, server: Server, tmp_path: Path) -> None:
    (tmp_path / "kinds.csv").write_text("class,kind,explanation\nhex_bolt,cut_notch,a tool cut into the thread\n")
    assert run(dataset, server, "--explanations", str(tmp_path / "kinds.csv"), "--temperature", "0.3") == 0
    body = server.requests[0]
    assert (body["model"], body["temperature"]) == ("m-1", 0.3) and body["messages"][0]["role"] == "system"
    content = body["messages"][1]["content"]
    boxes, tint, normal = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,")))), int)
        for part in content
        if part["type"] == "image_url"
    )
    assert boxes.shape == tint.shape == normal.shape == (48, 64, 3)
    assert tint[11:19, 6:14, 0].mean() > tint[11:19, 30:60, 0].mean() + 40
    assert boxes[9, 5:15, 1].mean() > 200 and boxes[9, 5:15, 0].mean() < 80
    goods = [np.asarray(Image.open(dataset / f"images/{name}.png"), int) for name in ("good_a", "good_b")]
    assert min(np.abs(normal - good).mean() for good in goods) < 15  # JPEG of noise; two different pictures are 85 apart
    assert all(words in content[-1]["text"] for words in ("'hex bolt'", "'cut notch'", "a tool cut into the thread"))
    assert server.headers[0]["path"] == "/v1/chat/completions" and server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_the_key_is_written_nowhere(dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.play = lambda number, body: (200, completion(ANSWER), {}) if number < 2 else (401, "no such key", {})
    assert run(dataset, server) == 2
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    assert not [path for path in dataset.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_without_a_key_none_is_sent(dataset: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert run(dataset, server) == 0 and "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{not json", "not valid JSON"),
        (json.dumps(GOOD | {"Observation": "The green box holds a dark notch."}), "'box' (box)"),
        (json.dumps(GOOD | {"Summary": "A small dark notch on the left flank of the thread."}), "[NOR] stands 0 times"),
    ],
    ids=["broken JSON", "forbidden word", "no anchors"],
)
def test_a_refused_answer_is_asked_for_again_with_the_reasons(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str], bad: str, told: str
) -> None:
    server.play = lambda number, body: (200, completion(ANSWER if number else bad), {})
    assert run(dataset, server) == 0
    assert last_line(capsys)["requests"] == 4
    first, second = server.requests[:2]
    assert second["messages"][:2] == first["messages"] and second["messages"][2]["content"] == bad
    assert told in second["messages"][3]["content"]
    record = lines_of(dataset / "instruct/instruct.jsonl")[0]
    assert record["attempts"] == 2 and record["usage"] == {"input_tokens": 2000, "output_tokens": 200}


def test_an_answer_that_was_cut_off_is_told_so(dataset: Path, server: Server) -> None:
    server.play = lambda number, body: (200, completion(ANSWER[:99], finish="length") if number == 0 else completion(ANSWER), {})
    assert run(dataset, server) == 0
    assert "cut off at the length limit" in server.requests[1]["messages"][3]["content"]


def test_a_sample_without_a_usable_answer_goes_to_review_and_is_not_asked_about_again_unless_wanted(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = json.dumps(GOOD | {"Observation": "The masked notch is dark and small."})
    server.play = lambda number, body: (200, completion(bad if number < 2 else ANSWER), {})
    assert run(dataset, server, "--answers", "2") == 0
    summary = last_line(capsys)
    assert (summary["described"], summary["refused"]) == (2, 1)
    (refusal,) = lines_of(dataset / "instruct/refused.jsonl")
    assert refusal["image"] == "../images/0.png" and refusal["answer"] == bad and "mask" in refusal["reasons"][0]
    assert refusal["usage"] == {"input_tokens": 2000, "output_tokens": 200}
    assert run(dataset, server) == 0 and last_line(capsys)["requests"] == 0
    assert run(dataset, server, "--retry-refused") == 0 and last_line(capsys)["described"] == 1
    with (dataset / "instruct/review.csv").open(newline="", encoding="utf-8-sig") as file:
        assert sorted((row["image"], row["status"]) for row in csv.DictReader(file)) == [
            (f"../images/{number}.png", "described") for number in range(3)
        ]


def test_a_busy_endpoint_is_given_the_time_it_asks_for(dataset: Path, server: Server, waits: list[float]) -> None:
    server.play = lambda number, body: (429, "slow down", {"Retry-After": "7"}) if number == 1 else (200, completion(ANSWER), {})
    assert run(dataset, server) == 0
    assert waits == [pytest.approx(7.0)] and len(server.requests) == 4


def test_server_faults_are_waited_out_with_growing_pauses(dataset: Path, server: Server, waits: list[float]) -> None:
    replies = {0: (500, "oops", {}), 1: (503, "", {}), 2: (502, "", {}), 3: (200, "not json", {}), 4: (408, "", {})}
    server.play = lambda number, body: replies.get(number, (200, completion(ANSWER), {}))
    assert run(dataset, server) == 0
    assert [round(seconds / 2**n * 2) / 2 for n, seconds in enumerate(waits)] == [1.0] * 5, "1, 2, 4, 8, 16 seconds, a quarter more or less"


def test_silence_counts_as_a_fault(dataset: Path, server: Server, waits: list[float]) -> None:
    def play(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        if number == 0:
            time.sleep(0.6)
        return 200, completion(ANSWER), {}

    server.play = play
    assert run(dataset, server, "--timeout", "0.3") == 0
    assert len(waits) == 1 and len(server.requests) == 4 and len(lines_of(dataset / "instruct/instruct.jsonl")) == 3


def test_a_sample_that_the_endpoint_cannot_answer_is_left_for_the_next_run(
    dataset: Path, server: Server, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.play = lambda number, body: (500, "always", {}) if number < 3 else (200, completion(ANSWER), {})
    assert run(dataset, server, "--tries", "3") == 1
    summary = last_line(capsys)
    assert (summary["described"], summary["undone"], summary["requests"]) == (2, 1, 5)
    assert run(dataset, server) == 0
    assert {record["image"] for record in lines_of(dataset / "instruct/instruct.jsonl")} == {f"../images/{n}.png" for n in range(3)}


def test_notes_name_a_picture_as_the_manifest_does_whatever_became_of_it(
    tmp_path: Path, server: Server, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is refused, 1 gets no reply, 2 does not decode."""
    dataset = write_dataset(tmp_path / "bolts")
    whole = (dataset / "images/2.png").read_bytes()
    (dataset / "images/2.png").write_bytes(whole[: len(whole) // 2])
    server.play = lambda number, body: (200, completion("{"), {}) if number == 0 else (500, "always", {})
    arguments = ["--dataset", str(dataset), "--endpoint", server.url, "--model", "m-1", "--output", str(dataset / "instruct")]
    assert main([*arguments, "--concurrency", "1", "--answers", "1", "--tries", "1"]) == 1
    error = capsys.readouterr().err
    assert "agvas-instruct: images/0.png: to review after 1 answer: " in error
    assert "left for the next run: images/1.png: " in error and "left for the next run: images/2.png: " in error
    assert str(dataset) not in error and "../images" not in error


@pytest.mark.parametrize(
    ("prices", "shown"),
    [(("2", "10"), "cost 0.0090"), (("200", "1000"), "cost 0.90"), (("0", "0"), "cost 0.00"), (("9000", "0"), "cost 27.00")],
)
def test_a_small_cost_is_shown_with_the_digits_it_has(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str], prices: tuple[str, str], shown: str
) -> None:
    assert run(dataset, server, "--price-input", prices[0], "--price-output", prices[1]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(shown)


def test_the_cost_of_resumed_runs_is_summed_with_that_of_refused_and_superseded_answers(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is refused after two answers, 1 and 2 are described in a second run, 1 again in a third one, and its endpoint counts no tokens."""
    prices = ("--price-input", "2", "--price-output", "10")
    server.play = lambda number, body: (200, completion("{"), {})
    assert run(dataset, server, "--limit", "1", "--answers", "2", *prices) == 0
    first = capsys.readouterr().out
    assert "in all runs" not in first and json.loads(first.splitlines()[-1])["all_runs"]["input_tokens"] == 2000
    server.play = lambda number, body: (200, completion(ANSWER), {})
    assert run(dataset, server, *prices) == 0
    second = capsys.readouterr().out.splitlines()
    assert second[1].startswith("in all runs so far 4000 input and 400 output tokens") and second[1].endswith("cost 0.012 at these prices")
    correct_mask(dataset, 1, 20)
    server.play = lambda number, body: (200, completion(ANSWER, usage={}), {})
    assert run(dataset, server, *prices) == 0
    summary = last_line(capsys)
    assert (summary["input_tokens"], summary["cost"]) == (0, 0)
    assert summary["all_runs"] == {
        "input_tokens": 4000, "output_tokens": 400, "samples_without_usage": 1, "cost": pytest.approx(0.012),
    }  # fmt: skip


def test_an_outage_ends_the_run_and_not_every_sample(
    tmp_path: Path, server: Server, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.play = lambda number, body: (500, "out of order", {})
    assert run(write_dataset(tmp_path / "many", 9), server, "--tries", "1") == 2
    assert len(server.requests) == 5 and "5 requests in a row failed" in (error := capsys.readouterr().err) and "out of order" in error


@pytest.mark.parametrize(
    ("status", "headers", "remedy"),
    [
        (401, {}, "check the key"),
        (403, {}, "may not use this model"),
        (404, {}, "check --endpoint"),
        (302, {"Location": "http://other.example/v1"}, "redirect to http://other.example/v1"),
        (429, {"Retry-After": "86400"}, "asks to wait 86400 s"),
    ],
)
def test_an_endpoint_that_refuses_everything_stops_the_run_at_once_and_keeps_what_is_done(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str], status: int, headers: dict[str, str], remedy: str
) -> None:
    server.play = lambda number, body: (status, "refused", headers) if number else (200, completion(ANSWER), {})
    assert run(dataset, server) == 2
    assert len(server.requests) == 2 and len(lines_of(dataset / "instruct/instruct.jsonl")) == 1
    error = capsys.readouterr().err
    assert remedy in error and f"HTTP {status}" in error and server.url in error
    server.play = lambda number, body: (200, completion(ANSWER), {})
    assert run(dataset, server) == 0 and len(server.requests) == 4


def test_samples_are_described_side_by_side_and_each_once(tmp_path: Path, server: Server) -> None:
    def play(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        time.sleep(0.1)
        return 200, completion(ANSWER), {}

    server.play = play
    dataset = write_dataset(tmp_path / "many", 12)
    assert run(dataset, server, "--concurrency", "4") == 0
    assert 2 <= server.most_at_once <= 4 and len(server.requests) == 12
    assert len({record["id"] for record in lines_of(dataset / "instruct/instruct.jsonl")}) == 12


def test_a_picture_that_stands_twice_in_the_manifest_is_asked_about_once(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with (dataset / "manifest.csv").open("a") as file:
        file.write("images/0.png,masks/0.png,1,hex_bolt,cut_notch\n")
    assert run(dataset, server) == 0
    summary = last_line(capsys)
    assert (summary["described"], summary["duplicates"]) == (3, 1) and len(server.requests) == 3


def test_a_limit_is_kept_and_the_next_run_goes_on(dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dataset, server, "--limit", "2", "--concurrency", "3") == 0 and len(server.requests) == 2
    assert last_line(capsys)["unfinished"] == 1
    assert run(dataset, server, "--limit", "2") == 0 and len(server.requests) == 3


def test_a_corrected_mask_is_described_anew_and_a_moved_folder_is_not(dataset: Path, server: Server, tmp_path: Path) -> None:
    assert run(dataset, server) == 0
    moved = dataset.rename(tmp_path / "elsewhere")
    assert run(moved, server) == 0 and len(server.requests) == 3
    mask = np.zeros((48, 64), np.uint8)
    mask[30:40, 30:40] = 255
    Image.fromarray(mask).save(moved / "masks/1.png")
    assert run(moved, server) == 0 and len(server.requests) == 4


def correct_mask(dataset: Path, number: int, column: int) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[30:40, column : column + 10] = 255
    Image.fromarray(mask).save(dataset / f"masks/{number}.png")


def test_a_description_of_a_mask_that_was_corrected_since_counts_nowhere(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is untouched in the review, 1 was accepted there; both are described again, and so is 0 when its mask is corrected back."""
    output, first = dataset / "instruct", (dataset / "masks/0.png").read_bytes()
    assert run(dataset, server) == 0
    rows = review_rows(dataset)
    write_review(dataset, [row | {"accept": "yes" if row["image"] == "../images/1.png" else ""} for row in rows])
    newer = json.dumps(GOOD | {"Diagnosis": "The thread is cut there."})
    server.play = lambda number, body: (200, completion(newer), {})
    correct_mask(dataset, 0, 20)
    correct_mask(dataset, 1, 20)
    capsys.readouterr()
    assert run(dataset, server) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("2 described (2 of them again, the older description no longer counts)")
    assert json.loads(printed[-1])["superseded"] == 2
    rows = review_rows(dataset)
    assert sorted((row["image"][10], row["status"], row["accept"], row["diagnosis"] == "The thread is cut there.") for row in rows) == [
        ("0", "described", "", True), ("1", "described", "", True), ("1", "superseded", "yes", False), ("2", "described", "", False),
    ]  # fmt: skip
    assert main(["review", "--output", str(output), "--json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "2 older descriptions do not count" in printed[1]
    assert (json.loads(printed[-1])["samples"], json.loads(printed[-1])["superseded"]) == (3, 2)
    assert main(["review", "--output", str(output), "--apply", "--accept-unmarked", "--json"]) == 0
    summary = last_line(capsys)
    assert (summary["accepted"], summary["superseded"]) == (3, 2)
    accepted = {entry.image: entry.description.diagnosis for entry in read_entries(output / "accepted.jsonl")}
    assert [accepted[f"../images/{number}.png"] == "The thread is cut there." for number in range(3)] == [True, True, False]

    (dataset / "masks/0.png").write_bytes(first)
    server.play = lambda number, body: (200, completion(ANSWER), {})
    assert run(dataset, server) == 0 and last_line(capsys)["described"] == 1
    (row,) = (row for row in review_rows(dataset) if row["image"] == "../images/0.png")
    assert row["diagnosis"] == GOOD["Diagnosis"]


def start(dataset: Path, server: Server, *more: str) -> subprocess.Popen[str]:
    arguments = ["--dataset", str(dataset), "--endpoint", server.url, "--model", "m-1", "--output", str(dataset / "instruct"), *more]
    command = [sys.executable, "-m", "agvas.instruct.cli", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def interrupt(process: subprocess.Popen[str]) -> None:
    """Until it has said that it stops."""
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("stopping: waiting" in line for line in process.stderr)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def hold_from(server: Server, first_held: int) -> threading.Event:
    """Requests from this number on wait until the event is set."""
    let_go = threading.Event()

    def play(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        if number >= first_held:
            let_go.wait(60)
        return 200, completion(ANSWER), {}

    server.play = play
    return let_go


def test_a_killed_run_goes_on_where_it_was_without_asking_twice(tmp_path: Path, server: Server) -> None:
    dataset = write_dataset(tmp_path / "many", 8)
    let_go = hold_from(server, 5)
    process = start(dataset, server, "--concurrency", "2")
    journal = dataset / "instruct/instruct.jsonl"
    wait_for(lambda: len(server.requests) == 7 and journal.read_text().count("\n") == 5)
    process.kill()
    process.communicate()
    let_go.set()
    with journal.open("a") as file:
        file.write('{"id": "half a li')  # as a crash in the middle of a write leaves it
    assert run(dataset, server) == 0
    assert len(server.requests) == 7 + 3, "only the two in flight were asked about again, and the one that was never begun"
    records = lines_of(journal)
    assert len(records) == len({record["id"] for record in records}) == 8


def test_an_interruption_lets_the_requests_in_flight_come_home(tmp_path: Path, server: Server) -> None:
    dataset = write_dataset(tmp_path / "many", 8)
    let_go = hold_from(server, 1)
    process = start(dataset, server, "--concurrency", "2", "--json")
    wait_for(lambda: len(server.requests) == 3)
    interrupt(process)
    let_go.set()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err
    assert json.loads(out.splitlines()[-1])["described"] == 3 == len(lines_of(dataset / "instruct/instruct.jsonl")) == len(server.requests)
    assert (dataset / "instruct/review.csv").is_file()


def test_a_second_interruption_leaves_at_once(dataset: Path, server: Server) -> None:
    let_go = hold_from(server, 1)
    process = start(dataset, server, "--concurrency", "1")
    wait_for(lambda: len(server.requests) == 2)
    interrupt(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and not let_go.is_set() and len(lines_of(dataset / "instruct/instruct.jsonl")) == 1
    let_go.set()


def test_two_runs_do_not_write_one_output(dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(dataset / "instruct/instruct.jsonl"):
        assert run(dataset, server) == 2
    assert "another agvas-instruct writes it" in capsys.readouterr().err and not server.requests


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_sent(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dataset, server, "--limit", "2") == 0
    journal = dataset / "instruct/instruct.jsonl"
    journal.write_text("{broken\n" + journal.read_text())
    assert run(dataset, server) == 2 and "instruct.jsonl, line 1" in capsys.readouterr().err and len(server.requests) == 2


def test_a_dry_run_writes_exactly_what_would_be_sent_and_sends_nothing(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dataset, server, "--dry-run", "2") == 0
    printed = capsys.readouterr().out.splitlines()
    summary = json.loads(printed[-1])
    folders = [Path(folder) for folder in summary["dry_run"]]
    assert summary["pictures"] == ["images/0.png", "images/1.png"]
    assert [line.split("  ") for line in printed[:2]] == [[folder.name, name] for folder, name in zip(folders, summary["pictures"])]
    assert [folder.name.split("-")[0] for folder in folders] == ["0", "1"]
    assert not server.requests and len(folders) == 2 and not (dataset / "instruct/instruct.jsonl").exists()
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"boxes.jpg", "tint.jpg", "normal.jpg", "request.json"}
    assert printed[2] == f"wrote 2 requests with their pictures to {dataset / 'instruct/dry-run'}; nothing was sent"
    assert run(dataset, server, "--dry-run", "1") == 0 and "wrote 1 request with its pictures to " in capsys.readouterr().out
    assert run(dataset, server) == 0
    assert [json.loads((folder / "request.json").read_text()) for folder in folders] == server.requests[:2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--endpoint", "localhost:8000"], "expected a URL like"),
        (["--endpoint", "http://user:pass@localhost/v1"], "without user name"),
        (["--price-input", "3"], "expected both or none"),
        (["--split", "test"], "anomalous samples (label 1) of split 'test'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(dataset, server, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "pass@" not in error and not server.requests


def test_normals_come_from_another_folder_and_a_category_without_any_is_named(
    dataset: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = dataset / "manifest.csv"
    manifest.write_text("".join(line for line in manifest.read_text().splitlines(keepends=True) if ",0," not in line))
    assert run(dataset, server) == 2 and "none of hex_bolt" in capsys.readouterr().err
    (tmp_path / "normals/hex_bolt").mkdir(parents=True)
    (dataset / "images/good_a.png").rename(tmp_path / "normals/hex_bolt/a.png")
    assert run(dataset, server, "--normals", str(tmp_path / "normals")) == 0 and len(server.requests) == 3


def test_replies_that_do_not_say_their_tokens_are_counted_as_such(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play = lambda number, body: (200, completion(ANSWER, usage={}), {})
    assert run(dataset, server) == 0
    summary = last_line(capsys)
    assert (summary["input_tokens"], summary["replies_without_usage"], summary["cost"]) == (0, 3, None)
    assert lines_of(dataset / "instruct/instruct.jsonl")[0]["usage"] is None


def review_rows(dataset: Path) -> list[dict[str, str]]:
    with (dataset / "instruct/review.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def write_review(dataset: Path, rows: list[dict[str, str]]) -> None:
    with (dataset / "instruct/review.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def reviewed(dataset: Path, server: Server) -> Path:
    """Sample 0 was refused for one word, 1 and 2 were described."""
    bad = json.dumps(GOOD | {"Observation": "The masked notch is dark and small."})
    server.play = lambda number, body: (200, completion(bad if number < 3 else ANSWER), {})
    assert run(dataset, server) == 0
    return dataset


def test_a_review_of_nothing_is_told_and_leaves_nothing(dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    output = dataset / "instruct"
    assert run(dataset, server, "--dry-run", "1") == 0
    before = sorted(output.iterdir())
    assert main(["review", "--output", str(output)]) == 2
    assert "in which nothing has been described yet" in capsys.readouterr().err
    assert sorted(output.iterdir()) == before


def test_a_reviewer_accepts_rejects_and_corrects_and_the_journals_stay_as_they_are(
    reviewed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [(reviewed / "instruct" / name).read_bytes() for name in ("instruct.jsonl", "refused.jsonl")]
    rows = review_rows(reviewed)
    for row in rows:
        number = row["image"].removeprefix("../images/")[0]
        row["accept"] = {"0": "yes", "1": "No", "2": "TRUE"}[number]
        if number == "0":
            assert row["status"] == "refused" and "mask" in row["reasons"] and row["observation"] == "The masked notch is dark and small."
            row["observation"] = "The notch is dark, small and lies on the left."
    write_review(reviewed, rows)
    assert main(["review", "--output", str(reviewed / "instruct"), "--apply", "--json"]) == 0
    summary = last_line(capsys)
    assert (summary["accepted"], summary["rejected"], summary["unmarked"], summary["edited"]) == (2, 1, 0, 1)
    accepted = {entry.image: entry for entry in read_entries(reviewed / "instruct/accepted.jsonl")}
    assert accepted.keys() == {"../images/0.png", "../images/2.png"}
    assert accepted["../images/0.png"].description.observation == "The notch is dark, small and lies on the left."
    assert accepted["../images/0.png"].model == "m-1, edited" and accepted["../images/2.png"].model == "m-1"
    assert before == [(reviewed / "instruct" / name).read_bytes() for name in ("instruct.jsonl", "refused.jsonl")]


def test_what_comes_next_is_told_at_the_end_of_describing_and_of_reviewing(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    output = dataset / "instruct"
    assert run(dataset, server) == 0
    described = capsys.readouterr().out
    assert main(["review", "--output", str(output)]) == 0
    for said in (described, capsys.readouterr().out):
        assert f"write yes or no in column accept of {output / 'review.csv'}" in said
        assert f"agvas-instruct review --output {output} --apply" in said


@pytest.mark.parametrize("more", [[], ["--accept-unmarked"]])
def test_a_review_without_any_decision_writes_nothing_and_says_where_decisions_go(
    dataset: Path, server: Server, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """With --accept-unmarked, too, where every sample was refused."""
    server.play = lambda number, body: (200, completion("{" if more else ANSWER), {})
    assert run(dataset, server) == 0
    before = b"an earlier review's"
    (dataset / "instruct/accepted.jsonl").write_bytes(before)
    capsys.readouterr()
    assert main(["review", "--output", str(dataset / "instruct"), "--apply", "--json", *more]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and f"write yes or no in column accept of {dataset / 'instruct/review.csv'}" in printed.err
    assert (dataset / "instruct/accepted.jsonl").read_bytes() == before


def test_a_review_that_rejects_everything_is_a_decision(reviewed: Path) -> None:
    write_review(reviewed, [row | {"accept": "no"} for row in review_rows(reviewed)])
    assert main(["review", "--output", str(reviewed / "instruct"), "--apply"]) == 0
    assert read_entries(reviewed / "instruct/accepted.jsonl") == []
    assert (reviewed / "instruct/accepted.jsonl").is_file()


def test_yes_on_a_refused_line_says_first_that_it_is_one(reviewed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_review(reviewed, [row | {"accept": "yes"} for row in review_rows(reviewed)])
    assert main(["review", "--output", str(reviewed / "instruct"), "--apply"]) == 2
    assert "found a refused answer that is still to be corrected: the field observation mentions" in capsys.readouterr().err
    assert not (reviewed / "instruct/accepted.jsonl").exists()


def test_unmarked_samples_are_left_out_unless_wanted_and_refused_ones_always(reviewed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = review_rows(reviewed)
    next(row for row in rows if row["status"] == "described")["accept"] = "no"
    write_review(reviewed, rows)
    assert main(["review", "--output", str(reviewed / "instruct"), "--apply", "--json"]) == 0
    summary = last_line(capsys)
    assert (summary["accepted"], summary["rejected"], summary["unmarked"]) == (0, 1, 2)
    assert read_entries(reviewed / "instruct/accepted.jsonl") == []
    assert main(["review", "--output", str(reviewed / "instruct"), "--apply", "--accept-unmarked", "--json"]) == 0
    summary = last_line(capsys)
    assert (summary["accepted"], summary["rejected"], summary["unmarked"]) == (1, 1, 1)


def test_a_later_run_keeps_decisions_corrections_and_columns_of_the_reviewer(reviewed: Path, server: Server) -> None:
    rows = review_rows(reviewed)
    for row in rows:
        row["note"] = "looked at" if row["status"] == "described" else ""
    decided = next(row for row in rows if row["status"] == "described")
    decided["accept"], decided["diagnosis"] = "yes", "The thread is interrupted, says the reviewer."
    write_review(reviewed, rows)
    assert run(reviewed, server, "--retry-refused") == 0
    after = {row["id"]: row for row in review_rows(reviewed)}
    assert len(after) == 3 and after[decided["id"]] == decided
    assert {row["status"] for row in after.values()} == {"described"}
    assert sorted(row["note"] for row in after.values()) == ["", "looked at", "looked at"]


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("accept", "maybe", "expected yes, no or nothing in column accept, found 'maybe'"),
        ("id", "0123", "expected an id of a described or refused sample, found 0123"),
        ("summary", "A dark notch without any anchors at all, here.", r"\[NOR\] stands 0 times"),
    ],
)
def test_a_line_that_cannot_be_taken_is_named_and_nothing_is_written(
    reviewed: Path, capsys: pytest.CaptureFixture[str], column: str, cell: str, said: str
) -> None:
    from agvas.instruct.review import apply_review

    rows = review_rows(reviewed)
    index = next(index for index, row in enumerate(rows) if row["status"] == "described")
    rows[index] |= {"accept": "yes", column: cell}
    write_review(reviewed, rows)
    with pytest.raises(DatasetError, match=said) as raised:
        apply_review(reviewed / "instruct")
    assert raised.value.line == index + 2 and not (reviewed / "instruct/accepted.jsonl").exists()


def test_a_review_file_that_was_saved_with_other_separators_is_refused_and_left_alone(
    reviewed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    review = reviewed / "instruct/review.csv"
    review.write_text(review.read_text(encoding="utf-8-sig").replace(",", ";"), encoding="utf-8")
    before = review.read_bytes()
    assert main(["review", "--output", str(reviewed / "instruct"), "--apply"]) == 2
    assert "review.csv, line 1: expected the columns id, accept" in capsys.readouterr().err and review.read_bytes() == before
