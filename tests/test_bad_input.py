"""Bad input in bulk: wrong lists, images, checkpoints and flags end a run with one line and damage nothing."""

import dataclasses
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import BACKBONE, SMALL, draw_image, fails, read, run, write_list

import dataset
import main
import pretrain
import utils
from dataset import read_image, read_list
from utils import UserError

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4"]


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of writing of every file below a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def refused(script: ModuleType, argv: list[str], folder: Path) -> str:
    """The line with which a script refuses what it was given, having written nothing below the folder."""
    before = snapshot(folder)
    line = fails(script, argv)
    assert snapshot(folder) == before
    return line


def damaged(content: bytes, rng: random.Random, n_bytes: int = 3) -> bytes:
    """The same with a few bytes changed anywhere."""
    changed = bytearray(content)
    for _ in range(n_bytes):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


# --- images


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[frame + 9 :]


BROKEN_JPEGS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda jpeg: b"",
    "cut in the header": lambda jpeg: jpeg[:30],
    "cut in the pixels": lambda jpeg: jpeg[: len(jpeg) * 3 // 4],
    "zeros": lambda jpeg: bytes(len(jpeg)),
    "text": lambda jpeg: b"<html>404 not found</html>",
    "a PNG's header": lambda jpeg: b"\x89PNG\r\n\x1a\n" + jpeg[8:],
    "no header": lambda jpeg: jpeg[4:],
    "no tables": lambda jpeg: jpeg.replace(b"\xff\xc4", b"\xff\xfe").replace(b"\xff\xdb", b"\xff\xfe"),
    "gigantic": lambda jpeg: with_size(jpeg, 65000, 65000),
    "no width": lambda jpeg: with_size(jpeg, 0, 48),
}


@pytest.fixture
def trained(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a folder in which both scripts have trained for an epoch."""
    monkeypatch.chdir(tmp_path)  # where drawings go
    shared = ["--data_dir", str(make_data()), "--save_dir", str(tmp_path / "out"), *SMALL]
    pretrain.main([*shared, *BACKBONE, "--epochs", "1"])
    main.main([*shared, *CLASSIFIER, "--epochs", "1"])
    return shared


def test_broken_image_is_named_by_every_task(trained: list[str], tmp_path: Path) -> None:
    """Also where a run is to be replaced: until its first epoch is over, the earlier one is intact."""
    anew = [*trained, "--overwrite"]
    for split, runs in (
        ("train", [(pretrain, [*anew, *BACKBONE]), (main, [*anew, *CLASSIFIER])]),
        ("test", [(pretrain, [*trained, "--task=test"]), (main, [*trained, "--task=test"])]),
    ):
        victim = sorted(Path(trained[1]).glob(f"Images/*/{split}_*.jpg"))[2]
        whole = victim.read_bytes()
        if split == "test":
            runs.append((pretrain, [*trained, *BACKBONE, "--task=probe"]))
            runs.append((main, [*trained, "--task=predict", "--images", str(victim)]))
        for name, damage in BROKEN_JPEGS.items():
            victim.write_bytes(damage(whole))
            for script, argv in runs:
                line = refused(script, argv, tmp_path)
                assert line.startswith(f"error: image {victim} cannot be read ("), (name, line)
        victim.write_bytes(whole)


def test_damaged_images_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes are cut off or changed at random. Pillow may not notice; otherwise the only error is a UserError."""
    rng, n_refused = random.Random(0), 0
    for suffix in ("jpg", "png", "gif", "webp", "tiff", "bmp"):
        path = tmp_path / f"image.{suffix}"
        draw_image(np.random.default_rng(0), 50, 40).save(path)
        whole = path.read_bytes()
        for i in range(60):
            path.write_bytes(damaged(whole, rng) if i % 2 else whole[: rng.randrange(len(whole))])
            try:
                assert read_image(path, 32).mode == "RGB"
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                n_refused += 1
    assert n_refused > 150


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_images_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    for suffix in ("jpg", "png"):
        path = tmp_path / f"image.{suffix}"
        draw_image(np.random.default_rng(0), *size).save(path)
        for rng in (None, random.Random(0)):
            canvas = dataset.crop_to_canvas(read_image(path, 64), 64, rng)
            assert canvas.shape == (3, 64, 64) and canvas.dtype == torch.uint8


# --- lists


def test_damaged_lists_are_refused(make_data) -> None:
    """Lists are cut off or filled with zeros from a random byte on. Other bytes could crash SciPy's reader."""
    data_dir = make_data()
    path, rng = data_dir / "lists" / "train_list.mat", random.Random(0)
    whole = path.read_bytes()
    for i in range(200):
        kept = rng.randrange(len(whole))
        path.write_bytes(whole[:kept] + bytes(len(whole) - kept) if i % 2 else whole[:kept])
        with pytest.raises(UserError) as refusal:
            read_list(data_dir, "train")
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        "../secret/a.jpg",
        "../secret.jpg",
        "/etc/hostname",
        "//hostname",
        "n00000001-toy_breed_1/../secret.jpg",
        "n00000001-toy_breed_1/..",
        "n00000001-toy_breed_1/",
        "train_0.jpg",
        "",
        "x" * 300 + "/" + "y" * 300,
        "n00000001-toy_breed_1/\0.jpg",
    ],
)
def test_names_in_a_list_stay_in_the_data_folder(name: str, make_data, tmp_path: Path) -> None:
    data_dir = make_data(n_classes=1)
    (data_dir / "secret.jpg").write_bytes((data_dir / "Images/n00000001-toy_breed_1/train_0.jpg").read_bytes())
    path = data_dir / "lists" / "train_list.mat"
    write_list(path, [name, name], [1, 1])  # one folder for one label, so that only the name is wrong
    argv = ["--data_dir", str(data_dir), "--save_dir", str(tmp_path / "out"), *SMALL]
    for script, flags in ((pretrain, BACKBONE), (main, CLASSIFIER)):
        assert str(path) in refused(script, [*argv, *flags], tmp_path)


# --- checkpoints


WRONG = [None, "text", -1, 2**40, float("nan"), [], {}, {"class_names": [1]}, {"0.weight": 3}]


class Code:
    """What a checkpoint must never run."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def readers(trained: list[str]) -> dict[str, tuple[ModuleType, list[str]]]:
    """For each checkpoint that training writes, a script and the flags with which it reads that file."""
    return {
        "pt_glimpse_model.tar": (pretrain, [*trained, "--task=test"]),
        "pt_last.tar": (pretrain, [*trained, "--resume_training"]),
        "saved_model.tar": (main, [*trained, "--task=test"]),
        "last.tar": (main, [*trained, "--resume_training"]),
    }


def accepted(script: ModuleType, argv: list[str], names: list[str], folder: Path) -> bool:
    """Whether a run ends well. If it does not, it must write nothing below the folder and say one of the names."""
    before = snapshot(folder)
    try:
        utils.run(lambda: run(script, argv))
    except SystemExit as stop:
        assert isinstance(stop.code, str) and "\n" not in stop.code, stop.code
        assert any(name in stop.code for name in names), (names, stop.code)
        assert snapshot(folder) == before
        return False
    return True


def test_broken_checkpoints_are_named(trained: list[str], tmp_path: Path) -> None:
    rng = random.Random(0)
    for name, (script, argv) in readers(trained).items():
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        broken = [b"", b"text", bytes(1000), *(whole[: rng.randrange(len(whole))] for _ in range(4))]
        for content in broken:
            path.write_bytes(content)
            assert refused(script, argv, tmp_path).startswith(f"error: {path} cannot be read")
        for content in ([1, 2], "text", torch.zeros(2), {}, {"model_dict": {}}):
            torch.save(content, path)
            assert refused(script, argv, tmp_path).startswith(f"error: {path} is not a checkpoint of the expected kind")
        torch.save({"model_dict": Code()}, path)
        assert refused(script, argv, tmp_path).startswith(f"error: {path} cannot be read")
        path.write_bytes(whole)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("n_values", [1, pytest.param(len(WRONG), marks=pytest.mark.slow)])
def test_wrong_entries_of_checkpoints_are_named(n_values: int, trained: list[str], tmp_path: Path) -> None:
    """An entry that no run reads, such as the accuracy, may be anything."""
    rng = random.Random(0)
    for name, (script, argv) in readers(trained).items():
        path, n_refused = tmp_path / "out" / name, 0
        whole, good = path.read_bytes(), read(path)
        for key in good:
            for value in rng.sample(WRONG, n_values):
                torch.save({**good, key: value}, path)
                n_refused += not accepted(script, [*argv, "--epochs", "1"], [str(path), f"--{key}"], tmp_path)
        assert n_refused > n_values * len(good) / 2
        path.write_bytes(whole)


@pytest.mark.parametrize("n_values", [1, pytest.param(len(WRONG), marks=pytest.mark.slow)])
def test_wrong_settings_in_checkpoints_are_named(n_values: int, trained: list[str], tmp_path: Path) -> None:
    """Of the wrong values, only text is of use, and only where any text would do."""
    rng = random.Random(0)
    for name, (script, argv) in readers(trained).items():
        path = tmp_path / "out" / name
        whole, good = path.read_bytes(), read(path)
        free_text = {"data_dir", "backbone", "weights"}
        for key in good["settings"]:
            for value in rng.sample(WRONG, n_values):
                torch.save({**good, "settings": {**good["settings"], key: value}}, path)
                names = [f"{path} is not a checkpoint of the expected kind: its setting {key}: "]
                of_use = accepted(script, [*argv, "--epochs", "1"], names, tmp_path)
                assert of_use == (key in free_text and value == "text"), (name, key, value)
        path.write_bytes(whole)


def test_wrong_backbones_in_checkpoints_are_named(trained: list[str], tmp_path: Path) -> None:
    """In a checkpoint of main.py, and in that of pretrain.py, which main.py reads to train."""
    anew = [*trained, *CLASSIFIER, "--overwrite"]
    for name, argv, entry in (
        ("saved_model.tar", [*trained, "--task=test"], "backbone"),
        ("last.tar", [*trained, "--resume_training"], "backbone"),
        ("pt_glimpse_model.tar", anew, "settings"),
    ):
        path = tmp_path / "out" / name
        whole, good = path.read_bytes(), read(path)
        contents = [
            {**good, entry: {**good[entry], key: value}}
            for key, values in (("arch", [*WRONG, "resnet50", "vit_b_16"]), ("patch_size", [*WRONG, 0]))
            for value in values
        ]
        no_table = [value for value in WRONG if not isinstance(value, dict)]
        contents += [{**good, key: value} for key in (entry, "data") for value in no_table]
        for content in contents:
            torch.save(content, path)
            line = refused(main, argv, tmp_path)
            assert str(path) in line, (name, content[entry], content["data"], line)
        path.write_bytes(whole)


# --- flags


@pytest.mark.parametrize("script", [main, pretrain])
def test_numbers_out_of_any_range(script: ModuleType) -> None:
    """Every flag that takes a number ends with exit code 2 or is a number to compute with."""
    numbers = [field for field in dataclasses.fields(script.Settings) if type(field.default) in (int, float)]
    assert {"batch_size", "epochs", "lr", "seed", "valid_size", "num_workers"} <= {field.name for field in numbers}
    for field in numbers:
        n_refused, tasks = 0, field.metadata["tasks"]
        for word in ("", " ", "x", "-1", "-0.5", "nan", "inf", "-inf", "1e999", "0x10", "9" * 40, "1_0", "1,5", "None"):
            argv = [f"--{field.name}={word}", f"--task={tasks[0] if tasks else 'train'}"]
            try:
                value = utils.parse_flags(script.Settings, script.__doc__, argv)[field.name]
            except SystemExit as stop:
                assert stop.code == 2
                n_refused += 1
            else:
                assert type(value) is type(field.default) and math.isfinite(value) and value >= 0
        assert n_refused >= 12, field.name


def test_paths_that_cannot_be(trained: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    anew = [*trained, "--overwrite"]
    for path in ("", "x" * 5000, str(file), str(file / "below"), "/proc/nothing"):
        for script, argv in ((pretrain, BACKBONE), (main, CLASSIFIER)):
            assert "error: " in refused(script, [*anew, *argv, "--data_dir", path], tmp_path)
    for path in ("x" * 5000, str(file), str(file / "below"), "/proc/nothing"):
        assert "error: " in refused(pretrain, [*anew, *BACKBONE, "--save_dir", path], tmp_path)
        assert "error: " in refused(main, [*trained, "--task=test", "--save_dir", path], tmp_path)
        assert "error: " in refused(main, [*anew, *CLASSIFIER, "--backbone", path], tmp_path)
        assert "error: " in refused(main, [*trained, "--task=predict", "--images", path], tmp_path)
        assert "error: " in refused(main, [*trained, "--task=view_glimpses", "--imgs_dir", path], tmp_path)
        assert "error: " in refused(pretrain, [*anew, *BACKBONE, "--weights", path], tmp_path)
