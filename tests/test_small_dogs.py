"""data/small_dogs.py: scenes of photos of one part only, with boxes that are right, and the same in every run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import annotate, draw_folder, fails
from PIL import Image

from data import small_dogs
from dataset import crop_to_canvas, read_image, read_list, read_training_lists


def make(source: Path, data_dir: Path, *more: str) -> None:
    small_dogs.main(["--source", str(source), "--data_dir", str(data_dir), "--size", "96", *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def canvas_and_boxes(file: Path, annotation: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    canvas, boxes = crop_to_canvas(*read_image(file, size, annotation), size)
    return canvas, boxes[boxes.isfinite().all(-1)]


def test_same_command_gives_the_same_bytes(make_data: Callable[..., Path], tmp_path: Path) -> None:
    source = make_data(n_train=4, n_test=2)
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        make(source, tmp_path / name, "--seed", seed)
    make(source, tmp_path / "b", "--seed", "0")  # again, in place
    one, two, other = (contents(tmp_path / name) for name in "abc")
    mark = small_dogs.MARK
    assert one.keys() == two.keys() == other.keys() and len(one) == 1 + 2 + 2 * 18
    assert {name for name in one if one[name] != two[name]} == {mark}  # which names the folder
    images = [name for name in one if name.startswith("Images/")]
    assert len(images) == 18 and all(one[name] != other[name] for name in images)


@pytest.mark.parametrize("layout", ["official", "parts", "classes"])
def test_scenes_are_of_their_own_part_only(layout: str, make_data: Callable[..., Path], tmp_path: Path) -> None:
    """Photos for training are red, those for validation and test green and blue: no scene mixes them."""
    source, data_dir = tmp_path / "photos", tmp_path / "scenes"
    if layout == "official":
        source = make_data(n_train=6, n_test=4)
    for part in ("train", "val", "test") if layout == "parts" else ("",) if layout == "classes" else ():
        for name in ("cat", "dog"):
            draw_folder(source / part / name, 8)
    names, rng = {}, np.random.default_rng(0)
    for channel, part in enumerate(("train", "valid", "test")):
        images = read_list(source, part)
        names[part] = [f"{file.parent.name}/{file.name}" for file in images.files]
        for file in images.files:
            pixels = rng.integers(0, 60, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 190
            Image.fromarray(pixels).save(file, quality=95)
    make(source, data_dir, "--clutter", "3", "--scale", "0.3")
    for channel, part in enumerate(("train", "valid", "test")):
        scenes = read_list(data_dir, part)
        assert [f"{file.parent.name}/{file.name}" for file in scenes.files] == names[part]
        for file in scenes.files:
            others = np.delete(np.asarray(Image.open(file)).astype(int), channel, axis=2)
            assert others.max() < 130, f"a scene of {part} shows a photo of another part"


def test_copies_of_a_photo_stay_on_one_side(tmp_path: Path) -> None:
    """They get the same scene, by which a split knows them, each with a box of its own."""
    source, data_dir = tmp_path / "photos", tmp_path / "scenes"
    for name in ("cat", "dog"):
        draw_folder(source / name, 8)
        for i in range(8):
            shutil.copy(source / name / f"{i}.jpg", source / name / f"copy_{i}.jpg")
    make(source, data_dir)
    for folder in (source, data_dir):
        train, test = (read_list(folder, part).files for part in ("train", "test"))
        train, test = ({(file.parent.name, file.name.removeprefix("copy_")) for file in part} for part in (train, test))
        assert train and test and not train & test
    files = [file for file in (data_dir / "Images" / "cat").iterdir() if not file.name.startswith("copy_")]
    assert len({file.read_bytes() for file in files}) == len(files) == 8
    assert all(file.read_bytes() == file.with_name(f"copy_{file.name}").read_bytes() for file in files)


def test_boxes_are_right_to_a_pixel(tmp_path: Path) -> None:
    """White dogs in black photos, of which the central square cuts some off; a photo without boxes is a dog itself."""
    black, places = tmp_path / "black.png", set()
    Image.new("RGB", (50, 50)).save(black)
    for i in range(16):
        pixels = np.zeros((80, 100 + i, 3), dtype=np.uint8)
        left, top = 4 * i, 10 + 2 * i
        pixels[top : top + 20, left : left + 30] = 255
        file = tmp_path / "Images" / "cat" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels if i else np.full_like(pixels, 255)).save(file)
        annotation = tmp_path / "Annotation" / "cat" / f"{i}" if i else None
        if i:
            annotate(tmp_path, {file: [(left, top, left + 30, top + 20)]}, 100 + i, 80)
        goals = tmp_path / f"{i}.jpg", tmp_path / f"{i}"
        scene = small_dogs.Scene(f"cat/{i}", file, annotation, [black, black], *goals)
        assert small_dogs.write_scene(scene, scale=0.5, size=96, seed=0) == ""
        canvas, boxes = canvas_and_boxes(scene.image, scene.box, 96)
        rows, columns = ((canvas[0] > 127).any(axis).nonzero().flatten() for axis in (1, 0))
        seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert (boxes * 96 - seen).abs().max() <= 1, (i, boxes * 96, seen)
        places.add(tuple(seen.tolist()))
    assert len(places) > 12  # nearly each somewhere else


def test_full_scale_is_the_photo_itself(make_data: Callable[..., Path], tmp_path: Path) -> None:
    source = make_data(n_train=3, n_test=2)
    make(source, tmp_path / "scenes", "--scale", "1")
    pairs = zip(read_list(source, "test").files, read_list(tmp_path / "scenes", "test").files)
    for file, scene in pairs:
        ours, theirs = (crop_to_canvas(*read_image(path, 96), 96)[0].int() for path in (scene, file))
        assert (ours - theirs).abs().float().mean() < 3


def test_split_for_validation_is_that_of_the_photos(make_data: Callable[..., Path], tmp_path: Path) -> None:
    source = make_data(n_train=8, n_test=2)
    make(source, tmp_path / "scenes")
    splits = [read_training_lists(folder, 0.3) for folder in (source, tmp_path / "scenes")]
    for photos, scenes in zip(*splits):
        assert [file.name for file in photos.files] == [file.name for file in scenes.files]


def test_what_is_there_is_not_overwritten(make_data: Callable[..., Path], tmp_path: Path) -> None:
    source = make_data(n_train=3, n_test=2)
    before = contents(source)
    line = fails(small_dogs, ["--source", str(source), "--data_dir", str(source)])
    assert f"{source} is not empty" in line and contents(source) == before
    victim = read_list(source, "test").files[1]
    victim.write_text("no image")
    line = fails(small_dogs, ["--source", str(source), "--data_dir", str(tmp_path / "scenes"), "--size", "96"])
    assert f"image {victim} cannot be read" in line and not (tmp_path / "scenes" / "lists").exists()
