"""What others take of the processors while something is measured, as Linux counts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks
from benchmarks.other_work import Counted, counted, in_words, other_work

LINUX = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="wants Linux's counters")
BURN = "import time\nend = time.perf_counter() + 60\nwhile time.perf_counter() < end: pass"


def test_what_is_neither_ours_nor_idle_is_others() -> None:
    before, after = Counted(100.0, 50.0, 1.0, 20.0), Counted(200.0, 110.0, 3.0, 70.0)
    assert other_work(before, after) == {"others": 0.1, "steal": 0.02, "seconds": 100.0}
    assert other_work(before, Counted(200.0, 60.0, 1.0, 31.0))["others"] == 0, "counters of two files may not be of one moment"


def test_where_nothing_is_counted_the_reason_is_told() -> None:
    still = Counted(1.0, 1.0, 0.0, 1.0)
    assert "did not move" in other_work(still, still)["reason"] and "as Linux does" in other_work(None, still)["reason"]
    assert counted((), Path("/no/such/proc")) is None


def test_the_usable_processors_lines_and_the_processes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    lines = [f"{name} 9 9 9 9 9 9 9 9 9 9" for name in ("cpu ", "cpu0", "cpu10")]
    lines.insert(2, "cpu1 100 200 300 400 500 600 700 800 50 50")
    (tmp_path / "stat").write_text("\n".join([*lines, "intr 1"]))
    for number, ticks in ((os.getpid(), "100 200 300 400"), (7, "10 20 30 40")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "stat").write_text(f"{number} (a b) c) R 1 2 3 4 5 6 7 8 9 10 {ticks} 20 0\n")
    assert counted([7], tmp_path) == Counted(total=36.0, busy=19.0, steal=8.0, own=11.0)


@LINUX
def test_a_process_of_ours_counts_as_ours_and_one_that_is_not_named_as_others() -> None:
    with subprocess.Popen([sys.executable, "-c", BURN]) as process:
        try:
            time.sleep(0.3)
            told = []
            for named in ([process.pid], []):
                before = counted(named)
                time.sleep(1.0)
                after = counted(named)
                assert before is not None and after is not None
                told.append(after.own - before.own)
        finally:
            process.kill()
    assert told[0] > 0.1 > told[1], "seconds of the processor"


def test_what_was_told_is_said_with_what_it_means() -> None:
    assert in_words({"reason": "no counters"}) == "What other processes took of the processors is not told: no counters."
    quiet, busy = ({"others": others, "steal": 0.01, "seconds": 9.0} for others in (0.04, 0.05))
    told = "4.0% of the processors' time while this was measured, the host's other guests 1.0%"
    assert in_words(quiet) == f"Other processes took {told}."
    assert in_words(busy).endswith("guests 1.0%: times and ratios are not to be trusted.")


# Times of a GPU, and times by the processor's own clock, from which others take nothing.
NOT_COMPARED = {"full_size_gpu.py", "gptq_layer.py", "metrics_at_scale.py"}


def test_a_benchmark_that_times_by_the_clock_tells_what_others_took_meanwhile() -> None:
    files = sorted(Path(benchmarks.__file__).parent.glob("*.py"))
    timed = {path.name: path.read_text() for path in files if re.search(r"perf_counter\(\)|timings\[", path.read_text())}
    writing = {name: text for name, text in timed.items() if "environment(" in text and name not in NOT_COMPARED}
    assert {"levers.py", "precisions.py", "prefix_reuse.py"} <= writing.keys()
    assert [name for name, text in writing.items() if "other_work(" not in text] == []
