"""agvas-inspect: what a checkpoint, a bundle or a part holds, what does not fit, and what exporting it will take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from runtime.command_line import Parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all that is there fits, 1 when something is missing or unexpected, 2 when nothing could be told."""
    parser = Parser(prog="agvas-inspect", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="nano, a checkpoint, a bundle, or a part: a base, SAM's file, a training's folder")
    parser.add_argument("--json", action="store_true", help="last line of stdout as JSON")
    options = parser.parse_args(arguments)
    try:
        from agvas.bundle_contents import bundle_contents, is_bundle

        if is_bundle(Path(options.path)):  # on a target, which has no torch
            found = bundle_contents(Path(options.path))
        else:
            from agvas.contents import contents

            found = contents(options.path)
        needs = _needs(options.path) if found.layout.startswith("AG-VAS checkpoint") and not found.problems else {}
    except ModuleNotFoundError as error:
        print(f'agvas-inspect: {error.name} is not installed; pip install "agvas[export]"', file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"agvas-inspect: {error.filename}: expected a readable file, got {error.strerror}; change its permissions", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"agvas-inspect: {error}", file=sys.stderr)
        return 2
    for line in found.lines():
        print(line)
    if needs:
        print("  exporting takes about (memory: at least, and with the reference whole in it; time: without calibrating and comparing):")
    for name, need in needs.items():
        least, whole = need["export_memory"], need["whole_memory"]
        memory = _bytes(least) if whole <= least else f"{_bytes(least)} to {_bytes(whole)}"
        print(f"    {name:14} {_bytes(need['disk']):>8} of disk, {memory} of memory, {max(1, round(need['export_seconds'] / 60))} min")
    if options.json:
        print(json.dumps(found.to_json() | {"needs": needs}))
    return 1 if found.problems else 0


def _needs(checkpoint: str) -> dict[str, dict[str, Any]]:
    """What export/estimate.py says, by precision and language model's weights."""
    from agvas.checkpoint import open_checkpoint
    from export.cli import DEFAULT_LMM, PRECISIONS, WEIGHTS
    from export.estimate import estimate

    tensors = open_checkpoint(checkpoint).tensors
    pairs = [(precision, "float") for precision in PRECISIONS] + [("fp16", lmm) for lmm in WEIGHTS if lmm != "float"]
    if ("fp32", DEFAULT_LMM) not in pairs:
        pairs.append(("fp32", DEFAULT_LMM))
    return {f"{precision} {lmm}": vars(estimate(tensors, precision, lmm)) for precision, lmm in pairs}


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
