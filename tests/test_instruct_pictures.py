"""What a model is shown: boxes, tint and the nearest normal picture, checked by pixels and against slow oracles."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from agvas.instruct.pictures import BOX_COLOUR, MAX_BOXES, boxed, encode_jpeg, find_boxes, line_width, tinted
from agvas.instruct.references import References, colour_histogram, find_normals, structural_score, thumbnail
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.pictures import picture_size, read_picture

HEIGHT, WIDTH = 61, 83


def flood_boxes(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The slow oracle: flood fill, 8 neighbours."""
    left, boxes = {tuple(point) for point in np.argwhere(mask).tolist()}, []
    while left:
        front, region = [left.pop()], []
        while front:
            y, x = front.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        ys, xs = zip(*region, strict=True)
        boxes.append((min(ys), min(xs), max(ys) + 1, max(xs) + 1))
    return sorted(boxes)


def test_every_region_gets_its_tight_box() -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:6, 4:9] = mask[20, 30] = mask[21, 31] = mask[50:, 70:] = True
    assert find_boxes(mask) == [(3, 4, 6, 9), (20, 30, 22, 32), (50, 70, 61, 83)] == flood_boxes(mask)


def test_many_regions_are_merged_with_their_neighbours_and_every_pixel_stays_in_a_box() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((HEIGHT, WIDTH)) < rng.choice((0.002, 0.02, 0.2))
        boxes = find_boxes(mask)
        alone = flood_boxes(mask)
        assert len(boxes) <= MAX_BOXES and (len(alone) > MAX_BOXES or boxes == alone)
        covered = np.zeros_like(mask)
        for top, left, bottom, right in boxes:
            covered[top:bottom, left:right] = True
            edges = mask[[top, bottom - 1], left:right].any(axis=1), mask[top:bottom, [left, right - 1]].any(axis=0)
            assert np.all(edges), "a box is as tight as its pixels"
        assert covered[mask].all()


def test_near_regions_merge_before_far_ones() -> None:
    mask = np.zeros((200, 200), bool)
    mask[10:30:2, 10:30:2] = True  # 100 specks side by side
    mask[150:160, 150:160] = True
    assert find_boxes(mask) == [(10, 10, 29, 29), (150, 150, 160, 160)]


def test_a_green_line_runs_around_the_region_and_nothing_else_changes() -> None:
    image = np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:30, 40:55] = True
    drawn = boxed(image, mask)
    ring = np.zeros_like(mask)
    ring[19:31, 39:56] = True
    ring[20:30, 40:55] = False
    assert (drawn[ring] == BOX_COLOUR).all() and (drawn[~ring] == image[~ring]).all()


def test_a_region_at_the_border_is_boxed_inside_the_picture() -> None:
    mask = np.ones((HEIGHT, WIDTH), bool)
    drawn = boxed(np.zeros((HEIGHT, WIDTH, 3), np.uint8), mask)
    green = (drawn == BOX_COLOUR).all(axis=-1)
    assert green[0].all() and green[-1].all() and green[:, 0].all() and green[:, -1].all() and not green[1:-1, 1:-1].any()


def test_the_line_grows_with_the_longer_side() -> None:
    assert [line_width(*size) for size in ((50, 60), (400, 300), (300, 1000), (4000, 3000))] == [1, 2, 5, 20]
    mask = np.zeros((1000, 400), bool)
    mask[500:600, 100:200] = True
    green = (boxed(np.zeros((1000, 400, 3), np.uint8), mask) == BOX_COLOUR).all(axis=-1)
    assert green[:, 150].sum() == 10 and green[495:500, 150].all() and not green[500:600, 150].any()


def test_the_tint_moves_anomalous_pixels_halfway_to_red_and_leaves_the_others() -> None:
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    before, mask = image.copy(), np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.3
    result = tinted(image, mask)
    assert (image == before).all() and (result[~mask] == image[~mask]).all()
    assert np.abs(result[mask] - (image[mask] / 2 + np.array([127.5, 0, 0]))).max() <= 0.5


def test_a_sent_picture_is_a_jpeg_no_longer_than_asked_and_never_enlarged() -> None:
    image = np.full((90, 300, 3), (10, 120, 240), np.uint8)
    small, same = (Image.open(io.BytesIO(encode_jpeg(image, side))) for side in (100, 1000))
    assert (small.format, small.size, same.size) == ("JPEG", (100, 30), (300, 90))
    assert np.abs(np.asarray(small, int) - (10, 120, 240)).max() <= 4


def test_pictures_are_read_as_rgb_and_turned_as_their_tag_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (30, 20, 3) and picture_size(tmp_path / "turned.jpg") == (30, 20)
    Image.fromarray(np.full((4, 6), 0x8123, np.uint16)).save(tmp_path / "deep.png")
    assert (read_picture(tmp_path / "deep.png") == 0x81).all()
    Image.new("RGBA", (6, 4), (9, 8, 7, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == (9, 8, 7)).all()


def test_a_size_is_read_from_the_header_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for name, tag in (("plain.png", None), ("turned.png", exif)):
        noise.save(tmp_path / name, exif=tag)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: whole.index(b"IDAT") + 9])
    noise.save(tmp_path / "turned.tif", exif=exif)
    sizes = [picture_size(tmp_path / name) for name in ("plain.png", "turned.png", "turned.tif")]
    assert sizes == [(HEIGHT, WIDTH), (WIDTH, HEIGHT), (WIDTH, HEIGHT)]


@pytest.mark.skipif(not features.check("webp"), reason="Pillow without WebP")
def test_a_picture_that_training_would_refuse_is_not_described_either(tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "normal.png", format="WEBP")
    with pytest.raises(DatasetError, match=r"normal\.png: expected a picture that decodes .*; restore it.*, or save it as PNG"):
        References({"bolt": [tmp_path / "normal.png"]}).nearest(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "bolt")


@pytest.mark.parametrize("read", [read_picture, picture_size])
def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path: Path, read: object) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match="bad.png: expected a picture"):
        read(tmp_path / "bad.png")  # type: ignore[operator]


def write_normals(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Smooth pictures of different colours and sizes: some alike in structure, some in colour."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8) // rng.integers(1, 4)
        path = folder / f"{number:02}.png"
        Image.fromarray(coarse.astype(np.uint8)).resize((90 + number, 70), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def slow_nearest(image: np.ndarray, paths: list[Path]) -> Path:
    """The definition: SSIM of the grey thumbnails minus the Bhattacharyya distance of the colour histograms, over all pictures."""

    def score(path: Path) -> float:
        other = read_picture(path)
        p, q = (colour_histogram(picture).astype(float) for picture in (image, other))
        distance = max(0.0, 1.0 - sum((a * b) ** 0.5 for a, b in zip(p, q, strict=True))) ** 0.5
        return structural_score(thumbnail(image), thumbnail(other)) - distance

    return max(paths, key=score)


def test_the_nearest_normal_picture_is_the_one_that_brute_force_finds(tmp_path: Path) -> None:
    paths = write_normals(tmp_path / "bolt", 20)
    references = References({"bolt": paths[::-1], "nut": paths[:1]})
    rng = np.random.default_rng(4)
    chosen = set()
    for number in range(10):
        image = read_picture(paths[number]).astype(int) // (1 + number % 2) + rng.integers(0, 60)
        image = image.clip(0, 255).astype(np.uint8)[:, ::-1] if number % 3 == 0 else image.clip(0, 255).astype(np.uint8)
        expected = slow_nearest(image, paths)
        assert references.nearest(image, "bolt") == expected
        chosen.add(expected)
    assert len(chosen) > 5, "the oracle must have something to choose"


def test_a_picture_is_its_own_nearest_unless_it_is_the_one_asked_about(tmp_path: Path) -> None:
    paths = write_normals(tmp_path / "bolt", 6)
    references = References({"bolt": paths})
    image = read_picture(paths[3])
    assert references.nearest(image, "bolt") == paths[3] != references.nearest(image, "bolt", apart_from=paths[3])


def test_of_equal_pictures_the_first_path_is_chosen(tmp_path: Path) -> None:
    paths = write_normals(tmp_path / "bolt", 3)
    paths[0].write_bytes(paths[2].read_bytes())
    assert References({"bolt": paths}).nearest(read_picture(paths[2]), "bolt") == paths[0]


def test_a_category_without_a_normal_picture_is_named(tmp_path: Path) -> None:
    (path,) = write_normals(tmp_path / "bolt", 1)
    references = References({"bolt": [path]})
    with pytest.raises(LookupError, match="category 'nut'.*--normals"):
        references.nearest(read_picture(path), "nut")
    with pytest.raises(LookupError, match="category 'bolt'"):
        references.nearest(read_picture(path), "bolt", apart_from=path)


def test_each_normal_picture_is_decoded_once_and_never_again_by_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_normals(tmp_path / "bolt", 7)
    image, decoded = read_picture(paths[2]), []
    monkeypatch.setattr("agvas.instruct.references.read_picture", lambda path: decoded.append(path) or read_picture(path))
    first = References({"bolt": paths}, tmp_path / "cache")
    assert first.nearest(image, "bolt") == first.nearest(image, "bolt") == paths[2] and decoded == paths
    assert References({"bolt": paths}, tmp_path / "cache").nearest(image, "bolt") == paths[2] and decoded == paths
    paths[2].write_bytes(paths[4].read_bytes())
    assert References({"bolt": paths}, tmp_path / "cache").nearest(image, "bolt") != paths[2] and len(decoded) == 14
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert References({"bolt": paths}, tmp_path / "cache").nearest(image, "bolt") != paths[2] and len(decoded) == 21


def test_normals_in_a_folder_per_category_are_found(tmp_path: Path) -> None:
    bolts, nuts = write_normals(tmp_path / "bolt", 2), write_normals(tmp_path / "nut", 1)
    (tmp_path / "nut/notes.txt").write_text("not a picture")
    assert find_normals(tmp_path) == {"bolt": bolts, "nut": nuts}
