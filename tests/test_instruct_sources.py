"""agvas-instruct on the published sets that the mixture reads: their anomalies are described, and the mixture reads what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from anomaly_sets import HEIGHT, WIDTH, truth, write_goods, write_leaper_set, write_real_iad, write_real_iad_set
from chat_server import Server, write_dataset

from agvas.instruct.cli import _KINDS, main
from agvas.training.sources.catalogue import OPTIONS, SourceSettings, read_source
from agvas.training.sources.instruct import read_instruct

WRITERS: dict[str, tuple[Callable[[Path], Path], list[tuple[str, str]]]] = {
    "real-iad": (write_real_iad_set, [("audiojack", "scratch")]),
    "goods-ad": (write_goods, [("Woven_001", "bad"), ("drink_can", "opened")]),
    "dtd-synthetic": (write_goods, [("Woven_001", "bad"), ("drink_can", "opened")]),
    "miad": (write_goods, [("Woven_001", "bad"), ("drink_can", "opened")]),
    "zju-leaper": (write_leaper_set, [("fabric", "fabric defect")]),
}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def describe(kind: str, root: Path, server: Server, output: Path, *more: str) -> int:
    arguments = ["--kind", kind, "--root", str(root), "--endpoint", server.url, "--model", "m-1", "--output", str(output)]
    return main([*arguments, "--concurrency", "1", *more])


@pytest.mark.parametrize("kind", _KINDS)
def test_the_anomalies_of_a_published_set_are_described_and_read_again_with_their_masks(kind: str, tmp_path: Path, server: Server) -> None:
    write, expected = WRITERS[kind]
    root = write(tmp_path / "set")
    assert describe(kind, root, server, tmp_path / "instruct") == 0
    records, _ = read_instruct(tmp_path / "instruct/instruct.jsonl")
    assert [(record.picture.category, record.picture.kind) for record in records] == expected
    for record in records:
        assert np.array_equal(record.picture.read_mask(HEIGHT, WIDTH), truth())
    images, _ = read_source("anomaly", SourceSettings(kind, str(root)))
    assert [record.picture.image for record in records] == [image.image for image in images if image.is_anomalous]
    knowledge = server.requests[0]["messages"][1]["content"][-1]["text"]
    assert repr(expected[0][0].replace("_", " ")) in knowledge and repr(expected[0][1]) in knowledge


def test_the_kinds_are_the_mixtures_but_for_manifests_and_sets_without_normal_pictures_and_mask_files() -> None:
    assert set(OPTIONS["anomaly"]) - set(_KINDS) == {"manifest", "crackforest", "gc10-det"}
    assert set(_KINDS) <= set(OPTIONS["anomaly"])


def test_a_split_has_its_normal_pictures_from_the_whole_set_and_remarks_are_told(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real-IAD with its good pictures in train alone, another folder of lists, and an anomaly without a mask beside."""
    root = write_real_iad_set(tmp_path / "set")
    file = write_real_iad(root, "lists")
    good = '{"category": "audiojack", "anomaly_class": "OK", "image_path": "OK/S0002/b_OK_C1.jpg", "mask_path": null}'
    assert good in file.read_text()
    file.write_text(file.read_text().replace(good, good.replace('"OK"', '"AK"')))
    assert describe("real-iad", root, server, tmp_path / "instruct", "--split", "test", "--annotations", "lists") == 0
    assert len(read_instruct(tmp_path / "instruct/instruct.jsonl")[0]) == len(server.requests) == 1
    assert f"{root}: 1 anomalous pictures without a mask left out, the first b_OK_C1.jpg" in capsys.readouterr().err
    assert describe("real-iad", root, server, tmp_path / "instruct", "--split", "train") == 2
    assert f"{root}: expected anomalous samples (label 1) of split 'train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "DATA", "--kind", "real-iad", "--root", "DATA"], "expected one of the two, got both"),
        ([], "expected one of the two, got none"),
        (["--kind", "real-iad"], "--kind, --root: expected both or none"),
        (["--dataset", "DATA", "--root", "DATA"], "--kind, --root: expected both or none"),
        (["--kind", "goods-ad", "--root", "DATA", "--images", "x"], "--images: goods-ad takes no such option"),
        (["--dataset", "DATA", "--annotations", "x"], "--annotations: a manifest takes no such option"),
        (["--kind", "goods-ad", "--root", "DATA"], "expected class folders with train and test"),
    ],
)
def test_a_data_set_that_is_not_named_in_one_way_is_refused_before_anything_is_sent(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    data = write_dataset(tmp_path / "data")
    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    assert main([*given, "--endpoint", server.url, "--model", "m-1", "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not server.requests
