"""A bundle opens when every file is what its manifest says, and otherwise refuses with the file's path and what to do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import OLDEST_SCHEMA, SCHEMA_VERSION, SEAL, SEALED_SCHEMA, WHOLE_NUMBERS, Bundle, Manifest, seal_of, sha256_of
from runtime.contract import STAGES
from runtime.errors import BundleCorrupt, BundleMissing, BundleVersionError

# What a user is told to do; every refusal says one of these.
REMEDY = r"agvas-export|copy the bundle again|copy or export|export the bundle again|do not use|install a newer agvas"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the manifest in place."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    fields[SEAL] = seal_of(fields)
    path.write_text(json.dumps(fields))
    return folder


def refusal(folder: Path, kind: type[Exception], **options: bool) -> str:
    with pytest.raises(kind, match=REMEDY) as caught:
        Bundle(folder, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_exported_bundle_opens_with_its_graphs_tokenizer_and_traces(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    assert all(bundle.graph(stage).is_file() for stage in STAGES)
    assert len(bundle.prompt_encoder().anchor_ids) == 3
    assert "0.image" in bundle.golden()
    on_disk = {path for path in tiny_bundle.rglob("*") if path.is_file() and path.name != "manifest.json"}
    assert {tiny_bundle / name for name in bundle.manifest.files} == on_disk
    assert bundle.bytes == sum(path.stat().st_size for path in on_disk)


def test_a_bundles_id_changes_with_any_of_its_files(tiny_bundle: Path, copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    assert Bundle(folder).id == Bundle(tiny_bundle).id
    flip_last_byte(folder / "parity.json")
    edit(folder, lambda fields: fields["files"]["parity.json"].update(sha256=sha256_of(folder / "parity.json")))
    assert Bundle(folder).id != Bundle(tiny_bundle).id


def test_a_manifest_survives_its_json(tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_sha256_is_that_of_the_whole_file_however_long(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes((4 << 20) + 17)  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere", BundleMissing)


def test_a_file_in_place_of_the_folder(tiny_bundle: Path) -> None:
    assert "manifest.json is not a folder" in refusal(tiny_bundle / "manifest.json", BundleMissing)
    assert "nano is a checkpoint: agvas-export --checkpoint nano" in refusal(Path("nano"), BundleMissing)


def test_a_folder_without_manifest_was_not_exported_to_its_end(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    (folder / "manifest.json").unlink()
    message = refusal(folder, BundleMissing)
    assert str(folder) in message and "interrupted" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\x89PNG\r\n\x1a\n\xff\xfe", b"[]", b"null", b"{}", b'{"schema_version": "one", "contract_version": 1}'],
)
def test_a_manifest_that_is_none(content: bytes, copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    (folder / "manifest.json").write_bytes(content)
    assert str(folder / "manifest.json") in refusal(folder, BundleCorrupt)


@pytest.mark.parametrize("field", ["precision", "threshold", "files", "prompts", "preprocessing", "sizes", "schema_version"])
def test_a_manifest_that_lacks_a_field_names_it(field: str, copy_of_bundle: Callable[[], Path]) -> None:
    folder = edit(copy_of_bundle(), lambda fields: fields.pop(field))
    message = refusal(folder, BundleCorrupt)
    assert str(folder / "manifest.json") in message and field in message


@pytest.mark.parametrize(("part", "field"), [("prompts", "answer"), ("preprocessing", "pixel_mean")])
def test_a_manifest_whose_part_lacks_a_field_names_it(
    part: str, field: str, copy_of_bundle: Callable[[], Path]
) -> None:
    folder = edit(copy_of_bundle(), lambda fields: fields[part].pop(field))
    assert field in refusal(folder, BundleCorrupt)


@pytest.mark.parametrize(
    ("field", "values"),
    [("pixel_std", [0, 0, 0]), ("semantic_std", [0.229, 0.224, 0.225]), ("pixel_mean", [1, 2]), ("semantic_mean", [1, 2, "three"])],
)
def test_means_and_deviations_that_no_picture_has_are_refused(field: str, values: list[object], copy_of_bundle: Callable[[], Path]) -> None:
    folder = edit(copy_of_bundle(), lambda fields: fields["preprocessing"].update({field: values}))
    assert f"preprocessing.{field}: expected" in refusal(folder, BundleCorrupt)


def test_a_manifest_with_an_impossible_threshold_is_named(copy_of_bundle: Callable[[], Path]) -> None:
    folder = edit(copy_of_bundle(), lambda fields: fields.update(threshold=5))
    said = refusal(folder, BundleCorrupt)
    assert f"{folder / 'manifest.json'} does not describe a bundle: threshold: expected a number in 0..1, got 5.0" in said


def test_prompts_that_contradict_themselves(copy_of_bundle: Callable[[], Path]) -> None:
    folder = edit(copy_of_bundle(), lambda fields: fields["prompts"].update(suffix="no place for it"))
    assert "{instruction}" in refusal(folder, BundleCorrupt)


@pytest.mark.parametrize("name", ["tokenizer.json", "embeddings.npy", "golden.npz", "spam/spam.onnx", "spam/spam.data"])
def test_a_missing_file_is_named(name: str, copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder, BundleMissing)
    assert str(folder / name) in refusal(folder, BundleMissing, check_hashes=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(threshold=0.999),
        lambda fields: fields["preprocessing"].update(pixel_mean=[1.0, 2.0, 3.0]),
        lambda fields: fields.pop(SEAL),
    ],
)
def test_a_manifest_that_was_changed_by_hand_is_refused(
    change: Callable[[dict[str, Any]], Any], copy_of_bundle: Callable[[], Path]
) -> None:
    folder = copy_of_bundle()
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(fields))  # laid out otherwise: the same
    Bundle(folder)
    change(fields)
    (folder / "manifest.json").write_text(json.dumps(fields))
    message = refusal(folder, BundleCorrupt)
    assert "manifest.json was changed after export" in message and "--threshold" in message


def test_a_manifest_of_before_the_seal_is_read(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    fields = json.loads((folder / "manifest.json").read_text())
    del fields[SEAL]
    (folder / "manifest.json").write_text(json.dumps(fields | {"schema_version": SEALED_SCHEMA - 1}))
    assert Bundle(folder).manifest.schema_version == SEALED_SCHEMA - 1


@pytest.mark.parametrize("name", ["tokenizer.json", "embeddings.npy", "golden.npz", "language/language.onnx"])
def test_a_manifest_that_does_not_list_what_every_bundle_has(name: str, copy_of_bundle: Callable[[], Path]) -> None:
    folder = edit(copy_of_bundle(), lambda fields: fields["files"].pop(name))
    message = refusal(folder, BundleCorrupt)
    assert name in message and str(folder) in message


def test_a_truncated_file_is_told_with_both_sizes(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    path = folder / "language" / "language.data"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(folder, BundleCorrupt)
    assert str(path) in message and f"{whole - 100} bytes" in message and f"says {whole}" in message


def test_one_altered_byte_of_the_same_size_is_found(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    flip_last_byte(folder / "mask_decoder" / "mask_decoder.data")
    message = refusal(folder, BundleCorrupt)
    assert str(folder / "mask_decoder" / "mask_decoder.data") in message and "sha256" in message


def test_without_hashes_contents_are_trusted_and_sizes_are_not(copy_of_bundle: Callable[[], Path]) -> None:
    folder = copy_of_bundle()
    path = folder / "spam" / "spam.data"
    flip_last_byte(path)
    Bundle(folder, check_hashes=False)
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refusal(folder, BundleCorrupt, check_hashes=False)


@pytest.mark.parametrize("name", ["spam/spam.data", "manifest.json", "."])
def test_what_may_not_be_looked_at_is_named(name: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stat = tiny_bundle / name, Path.stat

    def refused(self: Path, **options: Any) -> os.stat_result:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refused)
    message = refusal(tiny_bundle, BundleCorrupt)
    assert str(path / "manifest.json" if name == "." else path) in message and "check its permissions" in message


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("spam/spam.data", Bundle),
        ("golden.npz", lambda folder: Bundle(folder, check_hashes=False).golden()),
        ("embeddings.npy", lambda folder: Bundle(folder, check_hashes=False).embeddings()),
    ],
)
def test_a_file_that_may_not_be_read_is_named(
    name: str, read: Callable[[Path], Any], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tiny_bundle / name, open

    def refused(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied")
        return opened(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(BundleCorrupt, match=f"{path} cannot be read .*Permission denied.*check its permissions, or copy the bundle again"):
        read(tiny_bundle)


@pytest.mark.parametrize("name", ["../outside", "spam/../../outside", "{absolute}", "..\\outside", "spam\\spam.onnx", "C:outside"])
def test_a_path_that_leaves_the_folder_is_refused_even_where_the_file_is_as_told(
    name: str, copy_of_bundle: Callable[[], Path]
) -> None:
    folder = copy_of_bundle()
    outside = folder.parent / "outside"
    outside.write_bytes(b"12345")
    record = {"bytes": 5, "sha256": sha256_of(outside)}
    name = name.format(absolute=outside)
    (folder / name).write_bytes(b"12345")  # a backslash and a colon are plain characters of a name on POSIX
    edit(folder, lambda fields: fields["files"].update({name: record}))
    message = refusal(folder, BundleCorrupt)
    assert repr(name) in message and "outside the bundle" in message


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in WHOLE_NUMBERS.items() for name in names])
@pytest.mark.parametrize("value", ["x", 0, 1.5, None])
def test_a_size_that_is_no_whole_number_is_the_manifests_fault(
    group: str, name: str, value: Any, copy_of_bundle: Callable[[], Path]
) -> None:
    folder = edit(copy_of_bundle(), lambda fields: fields[group].update({name: value}))
    assert f"{group}.{name}: expected a whole number above 0, got {value!r}" in refusal(folder, BundleCorrupt)


@pytest.mark.parametrize(
    ("field", "step", "remedy"),
    [
        ("schema_version", OLDEST_SCHEMA - SCHEMA_VERSION - 1, "export the bundle again"),
        ("schema_version", 1, "install a newer agvas"),
        ("contract_version", -1, "export the bundle again"),
        ("contract_version", 1, "install a newer agvas"),
    ],
)
def test_another_version_says_which_side_is_older(
    field: str, step: int, remedy: str, copy_of_bundle: Callable[[], Path]
) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields[field] += step
        del fields["threshold"]  # another version may have other fields: the version is told first

    folder = edit(copy_of_bundle(), change)
    message = refusal(folder, BundleVersionError)
    assert str(folder / "manifest.json") in message and remedy in message and field.removesuffix("_version") in message


def test_the_embeddings_stay_on_disk_until_a_row_is_read(tiny_bundle: Path, tiny_model: Any) -> None:
    table = Bundle(tiny_bundle).embeddings()
    assert isinstance(table, np.memmap) and not table.flags.writeable
    weight = tiny_model.language.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table[[0, 7, 511]], weight[[0, 7, 511]])
