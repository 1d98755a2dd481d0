"""Power, clocks and device memory while something runs, where the platform tells them: NVML on a GPU, tegrastats on a Jetson.

Sampled from a thread, a few times a second: the medians describe a run, not a picture. What cannot be had is None with the reason beside
it, never a guess.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import statistics
import subprocess
import threading
from typing import Any

INTERVAL = 0.25  # seconds; NVML's own counters move no faster


class PowerSampler:
    """`with PowerSampler("cuda:0") as sampler: …; sampler.summary()`. Device memory is told by process: `sampler.watch(pid)`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._samples: dict[str, list[float]] = {}
        self._memory: dict[int, int] = {}
        self._watched: set[int] = set()
        self._going = threading.Event()
        self._thread: threading.Thread | None = None
        self._tegrastats: subprocess.Popen[str] | None = None
        self._nvml: Any = None
        self.reason = ""
        self.memory_reason = "the candidates run on the CPU" if device == "cpu" else ""

    def watch(self, pid: int) -> None:
        """Keep the peak of this process's device memory."""
        self._watched.add(pid)

    def device_memory(self, pid: int) -> int | None:
        """Most bytes that the process was seen to hold on the device."""
        return self._memory.get(pid)

    def summary(self) -> dict[str, Any]:
        """{"power_watts", "clock_mhz"}: medians or None; and why, in "reason", where they are None."""
        told: dict[str, Any] = {}
        for name in ("power_watts", "clock_mhz"):
            values = self._samples.get(name)
            told[name] = round(statistics.median(values), 2) if values else None
        return told | ({} if any(value is not None for value in told.values()) else {"reason": self.reason or "nothing was told in time"})

    def __enter__(self) -> PowerSampler:
        self._going.set()
        target = self._start()
        if target is not None:
            self._thread = threading.Thread(target=target, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going.clear()
        if self._tegrastats is not None:
            self._tegrastats.terminate()
            self._tegrastats.wait()
        if self._thread is not None:
            self._thread.join()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()

    def _start(self) -> Any:
        if shutil.which("tegrastats"):
            return self._read_tegrastats
        if self._device == "cpu":
            self.reason = "no tegrastats here, and a processor's own counters need rights that a benchmark should not have"
            return None
        try:
            import pynvml
        except ImportError:
            self.reason = self.memory_reason = "NVML cannot be read; pip install nvidia-ml-py"
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.reason = self.memory_reason = f"NVML does not start: {error}"
            return None
        self._nvml = pynvml
        try:
            handle = _handle(pynvml, int(self._device.split(":")[1]))
        except (pynvml.NVMLError, ValueError) as error:
            self.reason = self.memory_reason = f"NVML does not tell which GPU {self._device} is: {error}"
            return None
        return functools.partial(self._read_nvml, handle)

    def _read_nvml(self, handle: Any) -> None:
        nvml = self._nvml
        readers = {
            "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        }
        while self._going.is_set():
            for name, read in readers.items():
                try:
                    self._samples.setdefault(name, []).append(float(read()))
                except nvml.NVMLError as error:
                    self.reason = str(error)
            try:
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid in self._watched and process.usedGpuMemory is not None:
                        self._memory[process.pid] = max(self._memory.get(process.pid, 0), int(process.usedGpuMemory))
            except nvml.NVMLError as error:
                self.memory_reason = str(error)
            threading.Event().wait(INTERVAL)

    def _read_tegrastats(self) -> None:
        self._tegrastats = subprocess.Popen(["tegrastats", "--interval", str(int(INTERVAL * 1e3))], stdout=subprocess.PIPE, text=True)
        assert self._tegrastats.stdout is not None
        for line in self._tegrastats.stdout:
            for name, value in read_tegrastats_line(line).items():
                self._samples.setdefault(name, []).append(value)
            if not self._going.is_set():
                return


def _handle(nvml: Any, number: int) -> Any:
    """NVML's handle of CUDA's device of this number, which CUDA_VISIBLE_DEVICES may have moved.

    Raises:
        ValueError: the variable hides it or names it in another way; NVMLError: no such GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(each) for each in range(number + 1)] if visible is None else [name.strip() for name in visible.split(",")]
    name = names[number] if number < len(names) else ""
    if name.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    if not name.isdecimal():
        raise ValueError(f"CUDA_VISIBLE_DEVICES: expected a number or GPU-… in place {number}, got {visible!r}")
    return nvml.nvmlDeviceGetHandleByIndex(int(name))


def read_tegrastats_line(line: str) -> dict[str, float]:
    """Board power (VDD_IN, or the sum of the rails where there is none) and GPU clock in a line of tegrastats; only what is there."""
    told = {}
    rails = {name: int(milliwatts) for name, milliwatts in re.findall(r"(VDD_\w+|VIN_\w+) (\d+)mW", line)}
    if rails:
        told["power_watts"] = rails.get("VDD_IN", sum(rails.values())) / 1e3
    if clock := re.search(r"GR3D_FREQ \d+%@\[?(\d+)", line):
        told["clock_mhz"] = float(clock[1])
    return told
