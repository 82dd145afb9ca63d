"""Bad input in bulk: wrong lists, images, checkpoints and flags end a run with one line and damage nothing."""

import dataclasses
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import BACKBONE, SMALL, draw_image, fails, read, run, same, write_list

import dataset
import main
import pretrain
import utils
from dataset import read_image, read_list
from utils import UserError

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4"]
MEMORY = "checked_images.tar"  # of images that were read, which a run that is refused later may add to


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of writing of every file below a folder but the memory."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MEMORY]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


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


def test_broken_image_is_named_by_every_task(trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before the first epoch, also where a run is to be replaced: the earlier one stays intact."""
    anew, memory = [*trained, "--overwrite"], tmp_path / "out" / MEMORY
    remembered = memory.read_bytes()
    for split, runs in (
        ("train", [(pretrain, [*anew, *BACKBONE]), (main, [*anew, *CLASSIFIER])]),
        ("test", [(pretrain, [*trained, "--task=test"]), (main, [*trained, "--task=test"])]),
    ):
        victim = sorted(Path(trained[1]).glob(f"Images/*/{split}_*.jpg"))[2]
        whole = victim.read_bytes()
        if split == "test":
            runs.append((pretrain, [*trained, *BACKBONE, "--task=probe"]))
        for name, damage in BROKEN_JPEGS.items():
            victim.write_bytes(damage(whole))
            for script, argv in runs:
                line = refused(script, argv, tmp_path)
                wanted = rf"error: 1 of \d+ images cannot be used: image {victim} cannot be read \(.*\): .*"
                assert re.fullmatch(wanted, line) and "--skip_bad_images" in line, (name, line)
            capsys.readouterr()
            line = refused(main, [*trained, "--task=predict", "--images", str(victim)], tmp_path)
            assert line == "error: 1 of 1 images could not be read and were passed over"
            assert capsys.readouterr().out.startswith(f"passed over: image {victim} cannot be read ("), name
        victim.write_bytes(whole)
    assert memory.read_bytes() == remembered


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
        for draw in (None, dataset.RandomCrop(0, 0.5)):
            canvas = dataset.crop_to_canvas(read_image(path, 64), 64, draw)
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


NO_PRINTS = [*WRONG, [[1]], torch.zeros(()), torch.zeros(2, 2), torch.tensor([0.5]), torch.zeros(0).bool()]


def test_wrong_fingerprints_are_those_of_no_image(tmp_path: Path) -> None:
    images = dataset.ImageList([tmp_path / "a.jpg", tmp_path / "b.jpg"], [0, 1], ["a", "b"])
    prints = torch.tensor([1, 2])
    data = {"class_names": ["a", "b"], "left_out": 0, "fingerprints": {"training": prints, "validation": prints}}
    data["labels"] = {"training": torch.tensor([0, 1]), "validation": torch.tensor([0, 1])}
    for value in NO_PRINTS:
        for wrong in (value, {"training": value, "validation": value}):
            stored = {"class_names": ["a", "b"], "fingerprints": wrong}
            dataset.refuse_trained_on(images, prints, stored, tmp_path / "last.tar", "test")
            with pytest.raises(UserError, match=r"last.tar was trained on other images: 2 training images are new"):
                utils.refuse_other_data(stored, data, tmp_path / "last.tar")


def test_wrong_fingerprints_in_checkpoints_are_named(trained: list[str], tmp_path: Path) -> None:
    """Where training goes on; for other tasks the images are just new."""
    backbone = (main, [*trained, *CLASSIFIER, "--epochs", "0", "--overwrite"])
    for name, (script, argv) in [*readers(trained).items(), ("pt_glimpse_model.tar", backbone)]:
        path = tmp_path / "out" / name
        whole, good = path.read_bytes(), read(path)
        wrong = [{**good, "data": {**good["data"], "fingerprints": value}} for value in ("text", {"training": "text"})]
        if "backbone" in good:
            values = ("text", torch.zeros(()))
            wrong += [{**good, "backbone": {**good["backbone"], "trained_on": value}} for value in values]
        for content in wrong:
            torch.save(content, path)
            of_use = accepted(script, argv, [f"{path} was trained on other images"], tmp_path)
            assert of_use == (content["data"] is good["data"] or "--resume_training" not in argv), name
        path.write_bytes(whole)


def test_broken_memory_of_checked_images_is_made_anew(trained: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out" / MEMORY
    whole, good = path.read_bytes(), read(path)
    contents = [b"", b"text", whole[: len(whole) // 2], *WRONG, [1, 2], torch.zeros(3)]
    contents += [{key: value for key in good} for value in [*WRONG, torch.zeros(0), torch.zeros(3, 2), torch.zeros(10)]]
    for content in contents:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        run(main, [*trained, "--resume_training", "--epochs", "1"])
        found = read(path)
        assert same({key: found[key] for key in good}, good), content


# --- folders


LAYOUTS = [["train", "test"], ["Train", "VAL"], ["TRAIN", "val", "Test"], ["images"], [""], ["train"], ["test", "val"]]
CLASSES = ["cat", "dog", "Größe", "a b", "2019", "x.jpg", "lists", "Test", "001.", ".ipynb_checkpoints", "__MACOSX"]
FILES = [*(f"{i}.jpg" for i in range(9)), "a.PNG", "notes.txt", ".b.jpg", "._0.jpg", "Thumbs.db", "train_list.mat"]


def make_random_folders(data_dir: Path, rng: random.Random) -> None:
    """A layout of random classes; now and then a folder is missing, empty, hidden or below another one."""
    classes = rng.sample(CLASSES, rng.randrange(1, 5))
    for top in rng.choice(LAYOUTS):
        for name in classes:
            folder = data_dir / top / name / rng.choice(["", "", "", "2019", ".thumbs", "a/b"])
            if rng.random() < 0.95:
                folder.mkdir(parents=True, exist_ok=True)
                for file in rng.sample(FILES, rng.choice((1, 9, 12, 15)) if rng.random() < 0.95 else 0):
                    (folder / file).touch()


def test_random_folders_are_read_or_refused(tmp_path: Path) -> None:
    """What is read exists, is visible, and is in one part only."""
    rng, n_read = random.Random(0), 0
    for i in range(300):
        data_dir, parts = tmp_path / str(i), {}
        data_dir.mkdir()
        make_random_folders(data_dir, rng)
        for part in ("train", "valid", "test"):
            try:
                parts[part] = read_list(data_dir, part)
            except UserError as error:
                assert str(data_dir) in str(error) or str(error).startswith("the class "), error
                assert "\n" not in str(error)
        found = [file for images in parts.values() for file in images.files]
        assert len(found) == len(set(found))
        for file in found:
            names = file.relative_to(data_dir).parts
            assert file.is_file() and not any(name.startswith(".") or name == "__MACOSX" for name in names)
        for part, images in parts.items():
            classes = range(len(images.class_names))
            assert len(images.files) == len(images.labels) and set(images.labels) <= set(classes) != {0}
            assert not images.files or part != "train" or set(images.labels) == set(classes)
        n_read += len(parts) == 3
    assert 30 < n_read < 270


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
