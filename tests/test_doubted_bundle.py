"""A bundle that export's comparison did not prove is told when it is opened, and one that it did prove is not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import Segmenter
from runtime.bundle import MANIFEST, Bundle

FAILED = ({"passed": False}, "failed its comparison with the reference in export")
NOT_COMPARED = ({"passed": False, "compared": False}, "was exported without a comparison")


def with_parity(folder: Path, fields: dict[str, Any]) -> Path:
    """The bundle as `--parity report` leaves one that failed, or `--parity none` any."""
    manifest = Bundle(folder, check_hashes=False).manifest
    (folder / MANIFEST).write_text(dataclasses.replace(manifest, parity=manifest.parity | fields).to_json())
    return folder


@pytest.mark.parametrize(("parity", "words"), [FAILED, NOT_COMPARED], ids=["failed", "not compared"])
def test_a_segmenter_warns_once_of_a_bundle_that_is_not_proved(
    copy_of_bundle: Callable[[], Path], parity: dict[str, Any], words: str
) -> None:
    bundle = with_parity(copy_of_bundle(), parity)
    with pytest.warns(UserWarning) as caught:
        Segmenter(bundle, engine="onnxruntime")
    assert [words in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize(("parity", "words"), [FAILED, NOT_COMPARED], ids=["failed", "not compared"])
def test_the_command_tells_it_in_one_line_though_quiet(
    copy_of_bundle: Callable[[], Path],
    photos: Path,
    run_segment: Callable[..., tuple[int, list[str], str]],
    parity: dict[str, Any],
    words: str,
) -> None:
    code, lines, told = run_segment(photos, "--quiet", bundle=with_parity(copy_of_bundle(), parity))
    assert (code, len(lines)) == (0, 3)
    assert told.count("agvas-segment: warning: ") == told.count(words) == 1


def test_a_bundle_that_passed_is_opened_without_a_word(tiny_bundle: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Segmenter(tiny_bundle, engine="onnxruntime")
