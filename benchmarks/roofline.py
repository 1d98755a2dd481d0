"""Planning: the least time each stage can take on a device, from its arithmetic and memory traffic, and how far a run is from it.

A floor is max(FLOP / peak, bytes / bandwidth) of each stage, summed: nothing computes faster than its peak nor reads weights faster than
its memory. Real kernels reach a part of both, so a floor orders devices and precisions; it promises no latency. A run's processor is
measured in the same run (ceilings.py); other devices have the vendor's dense peaks (devices.py). A run is only ever set against the
device that it ran on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.bench_statistics import same_processor
from benchmarks.ceilings import ceilings
from benchmarks.devices import DEVICES, Device, device_of
from benchmarks.environment import processor
from benchmarks.other_work import taken
from benchmarks.work import StageWork, stage_work
from runtime.errors import RequestError

__all__ = ["against_floor", "floor_ms", "machine_of", "measured_table", "roofline", "table", "this_machine"]

# What a run's precision is multiplied in on a processor, whose engines turn fp16 graphs into fp32; none knows a ceiling of integers.
ON_CPU = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp32"}
# On the GPUs of DEVICES, whose tensor cores are as fast in both 16-bit types. Their fp32 runs elsewhere, and is not in the table.
ON_GPU = {"bf16": "bf16", "fp16": "bf16"}


def floor_ms(work: StageWork, device: Device, precision: str, stored: str | None = None) -> float | None:
    """Least milliseconds of a stage; None where the device's peak in that precision is not known.

    Args:
        precision: of its products.
        stored: of its weights, where that is another; FP8's are as large as INT8's.
    """
    peak = device.flops.get(precision)
    if peak is None:
        return None
    stored = stored or ("int8" if precision == "fp8" else precision)
    return max(work.flops / peak, work.bytes(stored) / device.bandwidth) * 1e3


def this_machine(threads: int) -> Device:
    """Its processor, measured now."""
    return _measured("this machine", ceilings(threads), "measured now: ")


def machine_of(result: Mapping[str, Any]) -> Device:
    """The device that a result of agvas-bench was measured on.

    Returns:
        its GPU's peaks; or its processor's ceilings as the result has them, or, of a result that has none, measured now on the same one.

    Raises:
        RequestError: the GPU is not known, or the result has no ceilings and is another processor's.
    """
    environment, device = result["environment"], str(result["runs"]["ours"].get("device", "cpu"))
    if device != "cpu":
        number = int(device.partition(":")[2] or 0)
        listed = environment.get("gpu") or []
        return device_of(listed[number].get("name") if number < len(listed) else None)
    told = result.get("ceilings") or {}
    if "flops" in told:
        return _measured("the run's machine", told, "measured in the run: ")
    here, there = processor(), str(environment.get("processor"))
    if not same_processor(here, there):
        raise RequestError(
            f"the run: expected one of this machine ({here}), or one that has its own machine's ceilings, got one of {there} without them; "
            "run this there, or measure again there with --json, which keeps the ceilings"
        )
    return _measured("this machine", ceilings(int(environment["threads"])), "measured now, not in the run, which has no ceilings: ")


def _measured(name: str, told: Mapping[str, Any], when: str) -> Device:
    share = taken(told.get("other_work", {}))
    others = "" if share is None else f"; other processes took {share:.0%} of the processors' time"
    return Device(name, dict(told["flops"]), float(told["bandwidth"]), f"{when}{told['source']}{others}")


def roofline(config: Any, here: Device | None, text_tokens: int | None = None) -> dict[str, Any]:
    """Work and floors of every stage on DEVICES.

    Args:
        config: AGVASConfig.
        here: a further device, above the others.
        text_tokens: tokens of prompt, instruction and draft; None takes the paper's.

    Returns:
        "stages": by stage flops, weights and bytes in bf16; "devices": by name, precision and stage the floor in milliseconds, and its sum.
    """
    works = _works(config, text_tokens)
    devices: dict[str, Any] = {}
    for device in (*([here] if here else []), *DEVICES):
        floors = {}
        for precision in device.flops:
            by_stage = {name: floor_ms(work, device, precision) for name, work in works.items()}
            floors[precision] = {"stages_ms": by_stage, "total_ms": sum(value for value in by_stage.values() if value is not None)}
        peaks = {"bytes_per_second": device.bandwidth, "flops": dict(device.flops)}
        devices[device.name] = {"floors": floors, "source": device.source, **peaks}
    stages = {name: {"flops": work.flops, "parameters": work.parameters, "bytes_bf16": work.bytes("bf16")} for name, work in works.items()}
    return {"model": config.name, "stages": stages, "devices": devices}


def _works(config: Any, text_tokens: int | None) -> dict[str, StageWork]:
    return stage_work(config) if text_tokens is None else stage_work(config, text_tokens)


def against_floor(config: Any, device: Device, run: Mapping[str, Any], text_tokens: int | None = None) -> dict[str, Any]:
    """A run's stages against the device that it ran on.

    Args:
        run: "stages_ms", "p50_ms", "precision" of the graphs' arithmetic and "lmm", how the language model's weights are stored
            (float where it does not say), as agvas-bench has them.

    Returns:
        "stages": by stage "ms", "gflops" achieved and, where the peak in its precision is known, "share" of it, "floor_ms" and "times"
        the floor, else None; "total": "ms" of a picture, "floor_ms" of all stages and "times"; "notes": what a reader has to know.
    """
    works, precision, lmm = _works(config, text_tokens), str(run["precision"]), str(run.get("lmm", "float"))
    gpu = device in DEVICES
    stages: dict[str, Any] = {}
    for name, work in works.items():
        ms = run["stages_ms"].get(name)
        if not ms:
            continue
        integers = lmm if name == "language" and lmm != "float" else None
        computed = (ON_GPU if gpu else ON_CPU).get(precision)
        if integers and not (gpu and integers == "gptq4"):  # 4-bit weights are multiplied in 16 bit there
            computed = None
        peak = device.flops.get(computed or "")
        row: dict[str, Any] = {"ms": ms, "gflops": work.flops / ms / 1e6, "share": None, "floor_ms": None, "times": None}
        if computed and peak:
            floor = floor_ms(work, device, computed, "int4" if integers else precision)
            assert floor is not None
            row |= {"share": work.flops / ms / 1e-3 / peak, "floor_ms": floor, "times": ms / floor}
        stages[name] = row
    total: dict[str, Any] = {"ms": run["p50_ms"], "floor_ms": None, "times": None}
    floors = [row["floor_ms"] for row in stages.values()]
    if len(floors) == len(works) and None not in floors:
        total |= {"floor_ms": sum(floors), "times": run["p50_ms"] / sum(floors)}
    told = {"device": device.name, "source": device.source, "precision": precision, "lmm": lmm, "stages": stages, "total": total}
    return told | {"notes": _notes(told, gpu)}


def _notes(told: Mapping[str, Any], gpu: bool) -> list[str]:
    """What keeps a row from being read as it stands."""
    rows, notes = {**told["stages"], "total": told["total"]}, []
    if unknown := [name for name, row in told["stages"].items() if row["floor_ms"] is None]:
        integers = "" if told["lmm"] == "float" else f", language model {told['lmm']}"
        notes.append(
            f"No peak of {told['device']} is known for {', '.join(unknown)} as they are computed ({told['precision']}{integers}): no floor."
        )
    if not gpu and told["precision"] == "fp16":
        notes.append("Graphs in fp16 are computed in fp32 on a processor, and are set against that.")
    if fast := [name for name, row in rows.items() if row["times"] is not None and row["times"] < 1]:
        notes.append(
            f"Below 1, which cannot be: {', '.join(fast)}. The ceiling was measured while the machine was busy, or the weights stay in the "
            "processor's cache, which is faster than its memory; measure both again on a quiet machine."
        )
    return notes


def _figure(value: float) -> str:
    """Three digits of a number, all of those before the point, and no power of ten: 0.00043, 1.64, 27,340."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 or not value else "< 0.0001"


def _work_row(name: str, work: Mapping[str, float]) -> str:
    cells = work["flops"] / 1e9, work["parameters"] / 1e6, work["bytes_bf16"] / 1e6
    return f"| {name} | {' | '.join(map(_figure, cells))} |"


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    stages = result["stages"]
    lines = [
        f"Work of one picture, {result['model']}, direct mode in one pass:",
        "",
        "| stage | GFLOP | weights, M | MB read and passed (bf16) |",
        "| --- | --- | --- | --- |",
    ]
    for name, stage in stages.items():
        lines.append(_work_row(name, stage))
    total = {key: sum(stage[key] for stage in stages.values()) for key in ("flops", "parameters", "bytes_bf16")}
    lines.append(_work_row("total", total))
    lines += [
        "",
        "Floors in ms (the larger of FLOP / peak and bytes / bandwidth, by stage; no kernel reaches its peak throughout):",
        "",
        f"| device | precision | {' | '.join(stages)} | total |",
        f"| --- | --- | {' | '.join('---' for _ in stages)} | --- |",
    ]
    for device, told in result["devices"].items():
        for precision, floors in told["floors"].items():
            cells = " | ".join(_figure(value) for value in floors["stages_ms"].values())
            lines.append(f"| {device} | {precision} | {cells} | {_figure(floors['total_ms'])} |")
    lines += ["", *(f"- {device}: {told['source']}" for device, told in result["devices"].items())]
    return "\n".join(lines)


def measured_table(told: Mapping[str, Any]) -> str:
    """Markdown of what `against_floor` tells."""
    lines = [
        f"The measured run ({told['precision']}{'' if told['lmm'] == 'float' else ', language model ' + told['lmm']}) against "
        f"{told['device']} ({told['source']}):",
        "",
        "| stage | ms | GFLOP/s | share of the products' ceiling | floor, ms | times the floor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in {**told["stages"], "total": told["total"]}.items():
        rate = f"{row['gflops']:.0f}" if "gflops" in row else ""
        share = "" if row.get("share") is None else f"{row['share']:.0%}"
        floor = " | " if row["floor_ms"] is None else f"{_figure(row['floor_ms'])} | {row['times']:.1f}"
        lines.append(f"| {name} | {_figure(row['ms'])} | {rate} | {share} | {floor} |")
    return "\n".join([*lines, *(["", *told["notes"]] if told["notes"] else [])])
