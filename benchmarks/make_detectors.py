"""Detectors of another package to time or judge ours beside: anomalib's EfficientAD and WinCLIP as OpenVINO models.

In an environment of its own, since anomalib brings torchvision, lightning and others of its own versions (torch and torchvision have to be
builds that match, both from PyTorch's CPU index for instance):

    python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install anomalib==2.7.0 openvino onnx onnxscript open_clip_torch torch torchvision
    ENVIRONMENT/bin/python -m benchmarks.make_detectors --output detectors --random
    agvas-bench --bundle BUNDLE --against detectors/efficient_ad.xml --against detectors/winclip.xml

With --random the weights are random and nothing is downloaded: time, memory and size are those of a trained detector, masks mean nothing.
Without it WinCLIP alone is made, zero-shot, with the published CLIP weights, which anomalib downloads, for what --object names. EfficientAD
learns from good pictures of one product, with anomalib itself (`anomalib train`, then `anomalib export --export_type openvino`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def efficient_ad() -> Any:
    from anomalib.models import EfficientAd

    return EfficientAd()


def winclip(named: str, random: bool) -> Any:
    import open_clip
    from anomalib.models import WinClip

    published = open_clip.create_model_and_transforms
    if random:  # WinCLIP has no setting for it
        open_clip.create_model_and_transforms = lambda name, pretrained=None, **settings: published(name, pretrained=None, **settings)
    try:
        model = WinClip()
    finally:
        open_clip.create_model_and_transforms = published
    model.model.setup(named, None)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.make_detectors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for NAME.xml and NAME.bin")
    parser.add_argument("--random", action="store_true", help="random weights: for times alone")
    parser.add_argument("--object", default="surface", metavar="NAME", help="of WinCLIP's sentences (default: surface)")
    options = parser.parse_args(argv)
    try:
        import anomalib  # noqa: F401
    except ModuleNotFoundError:
        print("make_detectors: anomalib is not installed; make the environment that --help describes", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    makers = {"winclip": lambda: winclip(options.object, options.random)} | ({"efficient_ad": efficient_ad} if options.random else {})
    for name, make in makers.items():
        with tempfile.TemporaryDirectory() as work:
            exported = Path(make().to_openvino(export_root=work))
            for suffix in (".xml", ".bin"):
                shutil.move(exported.with_suffix(suffix), options.output / f"{name}{suffix}")
        print(options.output / f"{name}.xml", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
