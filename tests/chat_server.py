"""A small server that plays an OpenAI-compatible endpoint, a data set to describe, and agvas-instruct run on both."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agvas.instruct.cli import main
from agvas.instruct.endpoint import Pace

GOOD = {
    "Expectation": "A normal bolt has a straight shaft and an even thread.",
    "Observation": "On the left flank of the thread lies a dark notch, about a twentieth of the length.",
    "Diagnosis": "The notch interrupts the thread, so it cannot carry load evenly.",
    "Summary": "A small dark notch on the left flank of the thread: [NOR][ANO][SEG].",
    "Explanation": "The thread of a sound bolt runs evenly along the shaft. Here its left flank is interrupted by a dark notch.",
}
ANSWER = json.dumps(GOOD)
KEY = "sk-secret-of-the-test"

Play = Callable[[int, dict[str, Any]], "tuple[int, str | dict[str, Any], dict[str, str]]"]


def completion(text: str, usage: dict[str, int] | None = None, finish: str = "stop") -> dict[str, Any]:
    reply: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    return reply | {"usage": {"prompt_tokens": 1000, "completion_tokens": 100} if usage is None else usage}


class Server:
    """`play` gives (status, body, headers) for the number of a request, from 0, and its body."""

    def __init__(self) -> None:
        self.play: Play = lambda number, body: (200, completion(ANSWER), {})
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.headers.append({**dict(self.headers), "path": self.path})
                    server.times.append(time.monotonic())
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                status, content, headers = server.play(number, body)
                with lock:
                    server.at_once -= 1
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def write_dataset(root: Path, anomalous: int = 3) -> Path:
    """Anomalous pictures 0.png, 1.png ... with a square each, and two normal ones."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,mask,label,class,kind"]
    for number in range(anomalous):
        mask = np.zeros((48, 64), np.uint8)
        mask[10:20, 5 + number : 15 + number] = 255
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
        lines.append(f"images/{number}.png,masks/{number}.png,1,hex_bolt,cut_notch")
    for name in ("good_a", "good_b"):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / f"images/{name}.png")
        lines.append(f"images/{name}.png,,0,hex_bolt,")
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


def run(dataset: Path, server: Server, *more: str) -> int:
    arguments = ["--dataset", str(dataset), "--endpoint", server.url, "--model", "m-1", "--output", str(dataset / "instruct")]
    return main([*arguments, "--quiet", "--json", "--concurrency", "1", *more])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def skip_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the run would have waited: nobody waits in truth."""
    waited: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    plain = Pace.__init__
    monkeypatch.setattr(Pace, "__init__", lambda self, per_minute=None: plain(self, per_minute, lambda: now[0], sleep))
    return waited
