"""A measurement as a report: one HTML page that holds its pictures, the plots as PNG, a Markdown table, and the JSON.

Drawn from agvas-bench's JSON alone, so that a report can be made again from a file of raw samples:

    python -m benchmarks.report RUN.json DIR

The paper's 1.0 s and 20.8 GB are drawn as what they are: the paper's figures, of its model on its hardware.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench_result import check_report, read_result
from benchmarks.other_work import BUSY as BUSY_OTHERS
from benchmarks.other_work import in_words, taken
from runtime.errors import RequestError

PAPER_SECONDS, PAPER_GIGABYTES = 1.0, 20.8
PAPER = f"paper, its model on its hardware: {PAPER_SECONDS:.1f} s, {PAPER_GIGABYTES} GB"
BUSY = 0.5  # load average before measuring, from which figures are marked; what others took while measuring is BUSY_OTHERS
STAGES = ("preprocess", "pixel_encoder", "semantic_encoder", "spam", "language", "graph", "mask_decoder", "postprocess")
COLOURS = ("#9c9c9c", "#1f77b4", "#17a2b8", "#7b5ea7", "#d0582e", "#8c564b", "#2e8b57", "#c9a227")
REST_COLOUR = "#e3e3e3"


def check_plots() -> None:
    """Raises RequestError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError('--report: needs matplotlib, which is not installed; pip install "agvas[bench]", or leave --report out')


def markdown(result: Mapping[str, Any]) -> str:
    """The table that belongs beside any of its figures: times, memory and masks together."""
    runs, environment = result["runs"], result["environment"]
    on_gpu = any(run["device_memory_bytes"] for run in runs.values())
    head = ["candidate", "precision, engine", "p50 ms", "p90", "p99", "max", "stream, fps", "peak RSS, MB"]
    head += [*(["GPU memory, MB"] if on_gpu else []), "disk, MB", "load, s", "mask IoU", "flips"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, run in runs.items():
        streamed = "" if run["stream_fps"] is None else f"{run['stream_fps']:.1f}"
        peak, on_device = (f"{run[key] / 1e6:.0f}" if run[key] else "" for key in ("peak_rss_bytes", "device_memory_bytes"))
        masks = ["not judged", ""] if run["mask_iou_mean"] is None else [f"{run['mask_iou_mean']:.4f}", str(run["flips"])]
        times = [f"{run[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms", "max_ms")]
        cells = [name, f"{_precision(run)}, {run['engine']}", *times, streamed, peak, *([on_device] if on_gpu else [])]
        lines.append(_row([*cells, f"{run['bytes'] / 1e6:.1f}", f"{run['load_ms'] / 1e3:.2f}", *masks]))
    if result["ratios"]:
        lines.append("")
    for name, spread in result["ratio_spreads"].items():
        lines.append(
            f"{name}: {spread['median']:.2f} times (median of {runs['ours']['queries']} pairs, 99 % interval {spread['low']:.2f} to "
            f"{spread['high']:.2f}; pairs from {spread['p10']:.2f} to {spread['p90']:.2f})"
        )
    lines += ["", "| stage, median ms | " + " | ".join(runs) + " |", f"| --- |{' --- |' * len(runs)}"]
    for stage in (*_stages(result), "gap"):
        spent = (run["gap_ms"] if stage == "gap" else run["stages_ms"].get(stage) for run in runs.values())
        lines.append(_row([stage, *("" if ms is None else f"{ms:.2f}" for ms in spent)]))
    device_stages: list[dict[str, float]] = [run.get("device_stages_ms", {}) for run in runs.values()]  # not in files of before
    for stage in dict.fromkeys(name for each in device_stages for name in each):
        lines.append(_row([f"{stage}, on the GPU", *(f"{each[stage]:.2f}" if stage in each else "" for each in device_stages)]))
    lines.append("")
    for name, run in runs.items():
        if told := run.get("deadline"):
            lines.append(
                f"{name} at {told['fps']:g} frames/s: {told['missed_alone']:.2%} take longer than {told['period_ms']:.1f} ms, "
                f"{told['missed_in_queue']:.2%} are late when frames queue"
            )
    pictures, power = result["pictures"], result["power"]
    sizes = ", ".join(f"{height} × {width}" for height, width in pictures["sizes"])
    lines += [
        f"{pictures['count']} distinct pictures ({pictures['source']}, {sizes}), {runs['ours']['queries']} queries each; "
        f"masks against {result['reference']}, on {runs['ours']['judged']} pictures. Gap: time that is in no stage. "
        f"Disk and decoding, in no figure above: {runs['ours']['disk_ms']:.2f} and {runs['ours']['decode_ms']:.2f} ms. "
        f"First result {runs['ours']['first_result_ms'] / 1e3:.2f} s after the process began (files may be in the system's cache).",
        f"{environment['processor']}, {environment['threads']} threads, "
        f"{', '.join(gpu['name'] for gpu in environment['gpu']) or 'no GPU'}, power mode {environment['power_mode'] or 'not told'}; "
        f"{_power(power)}.",
        f"{PAPER}. The ratio of two machines and two models is no speed-up.",
    ]
    lines += _warnings(result)
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _precision(run: Mapping[str, Any]) -> str:
    """Of the encoders, and how the language model's weights are stored where that is another, with what they are multiplied with."""
    lmm = run.get("lmm", "float")
    inputs = " with inputs in 8 bits" if "int8" in str(run.get("inference_precision")) else ""
    return str(run["precision"]) if lmm == "float" else f"{run['precision']}, language model {lmm}{inputs}"


def _warnings(result: Mapping[str, Any]) -> list[str]:
    """What keeps figures from being trusted or published, and how busy others made the machine."""
    lines, busy, load = [], result.get("other_work", {}), result["environment"]["load_average"]
    if busy:
        lines.append(in_words(busy))
    if load is not None and load[0] > BUSY:
        lines.append(
            f"The machine was busy before this began (load average {load[0]:.1f})"
            + ("." if "others" in busy else ", and nothing tells how busy others kept it: times and ratios are not to be trusted.")
        )
    lines += _chosen_when_busy(result)
    if any(run["device_memory_bytes"] is None and run.get("device", "cpu") != "cpu" for run in result["runs"].values()):
        reasons = sorted({run["device_memory_reason"] for run in result["runs"].values() if "device_memory_reason" in run})
        lines.append(f"GPU memory is not told: {'; '.join(reasons)}.")
    if not result.get("full"):
        effort = result["effort"]
        had = f"{effort['warmups']}, {effort['queries']:,}, {effort['seconds']:g} s and {result['pictures']['count']}"
        lines.append(f"Short of the full setting (50 warm-ups, 1,024 queries, 60 s, 64 pictures), with {had}: no figures to publish.")
    return lines


def _chosen_when_busy(result: Mapping[str, Any]) -> list[str]:
    """What `auto` measured just before, and remembers from now on, was measured on that busy machine, too."""
    load, others = result["environment"]["load_average"], taken(result.get("other_work", {}))
    chosen = [name for name, run in result["runs"].items() if run.get("chosen") == "now"]
    if not chosen or not ((load is not None and load[0] > BUSY) or (others is not None and others > BUSY_OTHERS)):
        return []
    return [
        f"The engine of {', '.join(chosen)} was chosen by auto in this run, on that busy machine, too, and is remembered. To choose again "
        f"on a quiet one: agvas-verify --bundle DIR --threads {result['environment']['threads']} --remeasure, with the same --device and "
        "--inference-precision where they were given; then measure again."
    ]


def write_report(result: Mapping[str, Any], folder: Path) -> Path:
    """report.html, report.md, result.json and the plots in `folder` (made where need be); returns the page.

    Raises:
        RequestError: matplotlib is not installed.
    """
    check_plots()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "stages": ("Where a picture's time goes", _waterfall),
        "latency": ("How long a picture takes", _distribution),
        "precision": ("Time and memory by candidate", _time_and_memory),
    }
    blocks = []
    for name, (title, draw) in pictures.items():
        path = folder / f"{name}.png"
        draw(result, path)
        encoded = base64.b64encode(path.read_bytes()).decode()
        blocks.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{encoded}">')
    table = markdown(result)
    (folder / "report.md").write_text(table + "\n")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    page = folder / "report.html"
    page.write_text(_page(result, table, blocks))
    return page


def _page(result: Mapping[str, Any], table: str, blocks: list[str]) -> str:
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left}"
        "img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}"
    )
    facts = json.dumps({"environment": result["environment"], "effort": result["effort"], "power": result["power"]}, indent=2)
    title = f"agvas-bench: {html.escape(str(result['model']))}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style><h1>{title}</h1>'
        f"{_html(table)}{''.join(blocks)}<h2>Conditions</h2><pre>{html.escape(facts)}</pre></html>\n"
    )


def _html(table: str) -> str:
    """The Markdown above: tables and paragraphs, nothing else."""
    parts: list[str] = []
    rows: list[str] = []
    for line in [*table.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        if rows:
            cells = [[html.escape(cell.strip()) for cell in row.strip("|").split("|")] for row in rows if not row.startswith("| ---")]
            head, *body = cells
            listed = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
            parts.append(f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{listed}</table>")
            rows = []
        if line:
            parts.append(f"<p>{html.escape(line)}</p>")
    return "".join(parts)


def _waterfall(result: Mapping[str, Any], path: Path) -> None:
    """A bar for each candidate, its stages one after the other, what is in no stage at the end.

    A bar ends at its label, the median of whole pictures: medians of stages do not sum up to it, and what is left is between them.
    """
    plot = _pyplot()
    figure, axes = plot.subplots(figsize=(10, 1.2 + 0.55 * len(result["runs"])))
    names, shown = list(result["runs"])[::-1], set()
    for row, name in enumerate(names):
        run, left = result["runs"][name], 0.0
        for stage in (*_stages(result), "gap"):
            spent = max(0.0, run["p50_ms"] - left) if stage == "gap" else run["stages_ms"].get(stage, 0.0)
            if not spent:
                continue
            colour = REST_COLOUR if stage == "gap" else dict(zip(STAGES, COLOURS)).get(stage, "#555555")
            label = None if stage in shown else "between stages" if stage == "gap" else stage
            axes.barh(row, spent, left=left, color=colour, edgecolor="white", label=label)
            shown.add(stage)
            left += spent
        axes.text(left, row, f" {run['p50_ms']:.1f} ms", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("milliseconds, medians")
    axes.margins(x=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45 if len(names) < 3 else -0.22), ncol=4, frameon=False)
    _save(figure, path)


def _distribution(result: Mapping[str, Any], path: Path) -> None:
    """Share of the queries that take longer than so many milliseconds: tails as visible as medians."""
    plot = _pyplot()
    figure, axes = plot.subplots(figsize=(10, 4.5))
    for name, run in result["runs"].items():
        values = sorted(run["samples"]["ms"])
        axes.step(values, [1 - index / len(values) for index in range(len(values))], where="post", label=name)
    axes.axvline(PAPER_SECONDS * 1e3, color="black", linestyle=":", label=PAPER)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("share of the queries that take longer")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=4, frameon=False)  # tails reach into every corner
    _save(figure, path)


def _time_and_memory(result: Mapping[str, Any], path: Path) -> None:
    """A point for each candidate: median time, and the most memory it held (of the device, where it runs on one)."""
    plot = _pyplot()
    figure, axes = plot.subplots(figsize=(10, 5))
    for name, run in result["runs"].items():
        held = run["device_memory_bytes"] or run["peak_rss_bytes"]
        if held is None:
            continue
        axes.plot(run["p50_ms"], held / 1e9, "o", label=f"{name}, {_precision(run)}")
    axes.plot(PAPER_SECONDS * 1e3, PAPER_GIGABYTES, "k*", markersize=12)
    axes.axvline(PAPER_SECONDS * 1e3, color="black", linestyle=":", alpha=0.5)
    axes.axhline(PAPER_GIGABYTES, color="black", linestyle=":", alpha=0.5)
    axes.annotate(PAPER, (PAPER_SECONDS * 1e3, PAPER_GIGABYTES), xytext=(-8, -14), textcoords="offset points", ha="right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("milliseconds, median")
    axes.set_ylabel("GB at peak")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=4, frameon=False)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    _pyplot().close(figure)


def _stages(result: Mapping[str, Any]) -> list[str]:
    """Every stage that a candidate told, in the order of the chain."""
    told = {stage for run in result["runs"].values() for stage in run["stages_ms"]}
    return [stage for stage in STAGES if stage in told] + sorted(told - set(STAGES))


def _power(power: Mapping[str, Any]) -> str:
    if "reason" in power:
        return f"power and clock not told ({power['reason']})"
    named = {"power_watts": "power {:g} W", "clock_mhz": "clock {:g} MHz"}
    return ", ".join(text.format(power[name]) for name, text in named.items() if power[name] is not None)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 where the file is no result, or there is no matplotlib."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="The report of a result of agvas-bench.")
    parser.add_argument("result", type=Path, metavar="RUN.json", help="what agvas-bench --json wrote")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the report goes")
    options = parser.parse_args(arguments)
    try:
        result = read_result(options.result)
        check_report(result)
        print(write_report(result, options.folder))
    except (RequestError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
