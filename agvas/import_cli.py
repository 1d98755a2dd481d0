"""agvas-import: a published base, a pixel encoder and what was trained become one checkpoint that points at them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from runtime.command_line import Parser

_EXAMPLES = """\
examples:
  agvas-import --base llava-onevision-qwen2-7b-ov-hf --pixel-encoder sam_vit_h_4b8939.pth --trained run/trained --output checkpoint
  agvas-import --base llava-onevision-qwen2-7b-ov-hf --pixel-encoder sam_vit_h_4b8939.pth --untrained --output start   # to be trained
  agvas-import --base start --trained run/state --output stopped        # a run that DeepSpeed saved and did not finish

No weights are copied: keep the parts where they are, or move them together with the checkpoint (relative paths hold from its folder).
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the checkpoint was written, 2 when the parts do not make one."""
    parser = Parser(
        prog="agvas-import", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, required=True, help="LLaVA-OneVision or LLaVA 1.5 in Hugging Face's layout, or a checkpoint of this package"
    )
    parser.add_argument(
        "--pixel-encoder",
        "--sam",
        type=Path,
        help="SAM's sam_vit_h_4b8939.pth (or vit_l, vit_b), or a folder of transformers' SamModel, CLIP, SigLIP, DINOv2 or DINOv3; "
        "not where the base has one",
    )
    parser.add_argument(
        "--trained",
        type=Path,
        nargs="+",
        default=[],
        help="what was trained, later ones over earlier ones: agvas-train's trained/, a peft adapter, a DeepSpeed state "
        "(ZeRO 1 or 2; of stage 3 what its zero_to_fp32.py writes), a file of tensors",
    )
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint's folder: config.json, tokenizer.json, parts.json")
    parser.add_argument("--config", type=Path, help="config.json to take, where the trained part brings none")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to take, where the trained part brings none")
    parser.add_argument(
        "--untrained", type=int, nargs="?", const=0, metavar="SEED", help="start SPAM and mask decoder at random, for agvas-train"
    )
    parser.add_argument(
        "--pixel-size", type=int, help="side of the pixel encoder's pictures where it takes any: DINOv3 alone (default 1024)"
    )
    parser.add_argument("--json", action="store_true", help="last line of stdout as JSON")
    options = parser.parse_args(arguments)
    try:
        from agvas.contents import checkpoint_contents
        from agvas.importing import ImportSettings, import_parts

        settings = ImportSettings(
            options.base,
            options.output,
            options.pixel_encoder,
            tuple(options.trained),
            options.config,
            options.tokenizer,
            options.untrained,
            options.pixel_size,
        )
        imported = import_parts(settings)
    except ModuleNotFoundError as error:
        print(f'agvas-import: {error.name} is not installed; pip install "agvas[export]"', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"agvas-import: {error}", file=sys.stderr)
        return 2
    contents = checkpoint_contents(imported.opened)
    for line in contents.lines():
        print(line)
    for note in imported.notes:
        print(f"note: {note}")
    if options.json:
        print(json.dumps(contents.to_json() | {"notes": list(imported.notes)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
