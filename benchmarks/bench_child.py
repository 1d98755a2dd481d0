"""The process that one candidate runs in: it opens the candidate, then takes pictures by name and tells times. bench.py talks to it.

A process of its own, so that peak memory and load time are the candidate's alone. One line of JSON for a request on stdin, one for its
answer on stdout; whatever libraries print goes to stderr. The clock of a picture starts when it is decoded, uint8 in memory, and
stops when mask and score are; reading and decoding are told apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.bench_candidates import Candidate, Opened, open_candidate
from runtime.images import read_image
from runtime.verify import peak_rss_bytes as peak


def main() -> int:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        opened = open_candidate(Candidate(**json.loads(sys.argv[1])))
    except Exception as error:  # whatever it is, the parent tells the user; a traceback would say less
        _say(channel, {"error": f"{type(error).__name__}: {error}"})
        return 1
    load_ms = (time.perf_counter() - started) * 1e3
    inside = {"precision": opened.precision, "lmm": opened.lmm}
    _say(channel, {"load_ms": load_ms, "bytes": opened.bytes, **inside, "streams": opened.stream is not None})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _say(channel, _stream(opened, request) if "stream" in request else _segment(opened, request))
        except Exception as error:
            _say(channel, {"error": f"{type(error).__name__}: {error}"})
    return 0


def _segment(opened: Opened, request: dict[str, Any]) -> dict[str, Any]:
    """One picture: {"image", "keep"} → times, and a checksum of the mask; with `keep`, the mask is written there."""
    path, began = Path(request["image"]), time.perf_counter()
    path.read_bytes()
    read = time.perf_counter()
    image = read_image(path)  # from the system's cache now: decoding alone
    decoded = time.perf_counter()
    result = opened.segment(image)
    ended = time.perf_counter()
    if request.get("keep"):
        np.savez_compressed(request["keep"], mask=result.mask)
    return {
        "ms": (ended - decoded) * 1e3,
        "disk_ms": (read - began) * 1e3,
        "decode_ms": (decoded - read) * 1e3,
        "stages": result.stages,
        "device_stages": result.device_stages,
        "score": result.score,
        "checksum": zlib.crc32(result.mask.tobytes()),
        "peak_rss_bytes": peak(),
    }


def _stream(opened: Opened, request: dict[str, Any]) -> dict[str, Any]:
    """Many pictures at full speed: {"stream": paths, "count"} → frames per second, decoded beforehand as a camera hands them over."""
    frames = [read_image(path) for path in request["stream"]]
    count = int(request["count"])

    def camera() -> Iterator[np.ndarray]:
        for index in range(count):
            yield frames[index % len(frames)]

    assert opened.stream is not None
    started = time.perf_counter()
    done = 0
    for streamed in opened.stream(camera()):
        streamed.get()  # a frame that failed raises, and is no throughput
        done += 1
    seconds = time.perf_counter() - started
    return {"frames": done, "fps": done / seconds}


def _say(channel: TextIO, answer: dict[str, Any]) -> None:
    channel.write(json.dumps(answer) + "\n")
    channel.flush()


if __name__ == "__main__":
    sys.exit(main())
