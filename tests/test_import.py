"""agvas-import: the checkpoint that it makes of parts, where its folder may be, and what it says of what was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from imported_parts import Published, same_tensors
from safetensors.torch import load_file, save_file

from agvas import CheckpointError, load, save
from agvas.checkpoint import weight_files
from agvas.import_cli import main
from agvas.importing import ImportSettings, import_parts


def test_a_checkpoint_moves_together_with_its_parts(
    a_copy: Path, the_parts: Published, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(a_copy)
    assert main(["--base", "onevision", "--sam", "sam_vit_mini.pth", "--trained", "trained", "--output", "moving", "--json"]) == 0
    monkeypatch.chdir(the_parts.folder)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["problems"] == [] and [part["role"] for part in told["parts"]] == ["base", "pixel encoder", "trained"]
    assert sum(path.stat().st_size for path in (a_copy / "moving").iterdir()) < 100_000
    moved = a_copy.rename(a_copy.with_name("elsewhere"))
    same_tensors(load(moved / "moving"), the_parts.merged.state_dict())


def test_a_part_that_was_moved_away_is_named(a_copy: Path) -> None:
    text = (a_copy / "checkpoint" / "parts.json").read_text().replace("sam_vit_mini.pth", "gone.pth")
    (a_copy / "checkpoint" / "parts.json").write_text(text)
    with pytest.raises(CheckpointError, match="parts.json: pixel_encoder: .*gone.pth is not there; correct the path"):
        load(a_copy / "checkpoint")


def test_a_folder_of_something_else_is_not_written_over(the_parts: Published, tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(CheckpointError, match="exists and was not written by agvas-import"):
        import_parts(ImportSettings(the_parts.onevision, tmp_path, the_parts.sam, (the_parts.trained,)))


@pytest.mark.parametrize("within", [".", "trained"])
def test_parts_are_not_written_over_by_what_is_made_of_them(the_parts: Published, tmp_path: Path, within: str) -> None:
    import_parts(ImportSettings(the_parts.onevision, tmp_path / "start", the_parts.sam, untrained=0))
    (tmp_path / "start" / "trained").mkdir()
    before = {path.name: path.stat().st_size for path in (tmp_path / "start").iterdir()}
    settings = ImportSettings(tmp_path / "start", tmp_path / "start", None)
    if within != ".":
        settings = ImportSettings(the_parts.onevision, tmp_path / "start", the_parts.sam, (tmp_path / "start" / within,))
    with pytest.raises(CheckpointError, match="start would replace .*choose another --output"):
        import_parts(settings)
    assert {path.name: path.stat().st_size for path in (tmp_path / "start").iterdir()} == before


def test_a_base_that_is_a_file_is_asked_for_as_a_folder(the_parts: Published, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a folder .*got a file; are --base and --pixel-encoder swapped"):
        import_parts(ImportSettings(the_parts.sam, tmp_path / "out", the_parts.onevision, untrained=0))
    with pytest.raises(CheckpointError, match="expected a folder .*got a file; give the folder that holds"):
        import_parts(ImportSettings(the_parts.sam, tmp_path / "out", untrained=0))
    assert not list(tmp_path.iterdir())


def test_parts_without_a_training_say_what_to_give(the_parts: Published, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no part has a mask decoder; give what a training left .*or --untrained"):
        import_parts(ImportSettings(the_parts.onevision, tmp_path / "out", the_parts.sam))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_names_itself_as_its_base_is_told(a_copy: Path) -> None:
    path = a_copy / "checkpoint" / "parts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "../checkpoint"}))
    with pytest.raises(CheckpointError, match="base: expected another checkpoint, got this one"):
        load(a_copy / "checkpoint")


def test_an_output_behind_a_linked_folder_finds_its_parts(a_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (a_copy / "deep" / "real").mkdir(parents=True)
    (a_copy / "link").symlink_to(a_copy / "deep" / "real", target_is_directory=True)
    monkeypatch.chdir(a_copy)
    arguments = ["--base", "onevision", "--sam", "sam_vit_mini.pth", "--trained", "trained"]
    assert main([*arguments, "--output", "link/new"]) == 0
    assert load(a_copy / "deep" / "real" / "new").config == load(a_copy / "checkpoint").config


def test_the_files_of_a_base_in_parts_are_its_own_and_those_it_names(the_parts: Published, tmp_path: Path) -> None:
    import_parts(ImportSettings(the_parts.onevision, tmp_path / "start", the_parts.sam, untrained=0))
    import_parts(ImportSettings(tmp_path / "start", tmp_path / "both", None, (the_parts.trained,)))
    files = {path.resolve() for path in weight_files(tmp_path / "both")}
    assert {path.resolve() for path in weight_files(tmp_path / "start")} < files
    assert {the_parts.sam.resolve(), *(path.resolve() for path in the_parts.onevision.glob("*.safetensors"))} < files


@pytest.mark.parametrize("what", ["onevision", "trained"])
def test_a_part_given_as_a_checkpoint_says_how_to_import_it(the_parts: Published, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"agvas-import --base .*{what}"):
        load(the_parts.folder / what)


def test_random_parts_are_made_only_where_there_are_none(the_parts: Published, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hold SPAM or a mask decoder already"):
        import_parts(ImportSettings(the_parts.onevision, tmp_path / "out", the_parts.sam, (the_parts.trained,), untrained=0))


def test_a_checkpoint_in_shards_is_loaded(the_parts: Published, tmp_path: Path) -> None:
    save(the_parts.merged, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-{1 + index % 3:05}-of-00003.safetensors" for index, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({name: tensor for name, tensor in state.items() if places[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    same_tensors(load(tmp_path), the_parts.merged.state_dict())
    some = next(iter(places))
    index.write_text(json.dumps({"weight_map": {name: shard for name, shard in places.items() if name != some}}))
    with pytest.raises(CheckpointError, match=f"do not belong together: {some}"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {some: "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected a file beside it"):
        load(tmp_path)


@pytest.mark.parametrize("option", ["--base", "--pixel-encoder", "--trained"])
def test_a_part_that_is_not_there_is_named_as_it_was_given(option: str, a_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--base": "onevision", "--pixel-encoder": "sam_vit_mini.pth", "--trained": "trained"}
    given = {name: str(a_copy / ("nowhere" if name == option else path)) for name, path in given.items()}
    assert main([*(text for pair in given.items() for text in pair), "--output", str(a_copy / "new")]) == 2
    assert capsys.readouterr().err == f"agvas-import: {option} {a_copy / 'nowhere'}: no such file or folder; correct the path\n"
    assert not (a_copy / "new").exists()
