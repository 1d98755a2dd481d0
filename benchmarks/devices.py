"""Devices to plan for: the vendor's dense peaks, and which of them a GPU is by the name that nvidia-smi tells.

A peak is what the arithmetic units do in every clock, a bandwidth what the memory's pins carry; nothing here was measured. Jetsons have
no names to be recognised by: one name covers several modules of different speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.errors import RequestError


@dataclass(frozen=True)
class Device:
    """A device's dense peaks.

    Attributes:
        flops: FLOP/s by precision.
        bandwidth: of its memory, byte/s.
        source: where the numbers come from.
        names: that nvidia-smi gives it.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    source: str
    names: Sequence[str] = ()


def _tensor_cores(multiprocessors: int, products: int, gigahertz: float) -> float:
    """FLOP/s in 16 bit: multiprocessors × multiplications and additions of each in a clock × 2 × boost clock."""
    return multiprocessors * products * 2 * gigahertz * 1e9


def _device(name: str, sixteen: float, eight: str, bandwidth: float, source: str, names: Sequence[str] = ()) -> Device:
    """8 bit is twice as fast as 16 on all of these; INT4 weights are multiplied in 16 bit."""
    return Device(name, {"bf16": sixteen, eight: 2 * sixteen, "int4": sixteen}, bandwidth, source, names)


DEVICES = (
    _device(
        "H100 SXM",
        989.4e12,
        "fp8",
        3.35e12,
        "NVIDIA H100 datasheet: 1,979 TFLOPS BF16 with sparsity, half of it dense; 3.35 TB/s",
        ("NVIDIA H100 80GB HBM3",),
    ),
    _device(
        "RTX 4000 Ada",
        _tensor_cores(48, 512, 2.175),
        "fp8",
        360e9,
        "NVIDIA RTX 4000 Ada datasheet: 192 tensor cores (48 SMs), 26.7 TFLOPS fp32 at 2.175 GHz, 360 GB/s; 512 per SM: Ada whitepaper. "
        "Derived: 107 TFLOPS in 16 bit. The tensor figure quoted of the card, 327.6 TFLOPS FP8 with sparsity, would be 82, the same units "
        "at 1.67 GHz; which clock it means could not be looked up, so floors have the higher peak, and may be 1.3 times too low",
        ("NVIDIA RTX 4000 Ada Generation",),
    ),
    _device(
        "RTX A2000",
        _tensor_cores(26, 512, 1.2),
        "int8",
        288e9,
        "NVIDIA RTX A2000 datasheet: 63.9 TFLOPS with sparsity, half of it dense (104 tensor cores, 26 SMs, 1.2 GHz); 288 GB/s",
        ("NVIDIA RTX A2000", "NVIDIA RTX A2000 12GB"),
    ),
    _device(
        "Jetson AGX Orin 64GB",
        _tensor_cores(16, 1024, 1.3),
        "int8",
        204.8e9,
        "NVIDIA Jetson AGX Orin technical brief: GPU 170 INT8 TOPS with sparsity, 85 dense, at 1.3 GHz; 204.8 GB/s; no DLAs",
    ),
    _device(
        "Jetson Orin NX 16GB",
        _tensor_cores(8, 1024, 0.918),
        "int8",
        102.4e9,
        "NVIDIA Jetson Orin NX data sheet: GPU 60 INT8 TOPS with sparsity, 30 dense, at 918 MHz; 102.4 GB/s; no DLAs",
    ),
    _device(
        "Jetson Thor T5000",
        2070e12 / 8,
        "fp8",
        273e9,
        "NVIDIA Jetson Thor data sheet: 2,070 TFLOPS FP4 with sparsity; halved for dense, for FP8 and for 16 bit; 273 GB/s",
    ),
)


def device_of(gpu: str | None) -> Device:
    """The device that nvidia-smi calls so.

    Raises:
        RequestError: none of DEVICES is known by that name, or there is none.
    """
    for device in DEVICES:
        if gpu in device.names:
            return device
    known = ", ".join(name for device in DEVICES for name in device.names)
    raise RequestError(
        f"the run's GPU: expected one whose peaks are known ({known}), got {gpu or 'none named in the file'}; "
        "set its times against a floor of the table, or add its peaks to benchmarks/devices.py"
    )
