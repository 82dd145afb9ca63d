"""Bad input in bulk: wrong lists, images, checkpoints and flags end a run with one line and damage nothing."""

import argparse
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKBONE, CPU, SMALL, draw_image, fails, flags_of, write_list

import dataset
import main
import pretrain
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


def test_broken_image_is_named_by_every_task(trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before the first epoch, also where a run is to be replaced: the earlier one stays intact."""
    anew = [*trained, "--overwrite"]
    trainings = [(pretrain, [*anew, *BACKBONE]), (main, [*anew, *CLASSIFIER])]
    tests = [(pretrain, [*trained, "--task=test"]), (main, [*trained, "--task=test"])]
    tests.append((main, [*trained, "--task=view_glimpses"]))
    for split, runs in (("train", trainings), ("test", [*trainings, *tests])):
        victim = sorted(Path(trained[1]).glob(f"Images/*/{split}_*.jpg"))[2]
        whole = victim.read_bytes()
        for name, damage in BROKEN_JPEGS.items():
            victim.write_bytes(damage(whole))
            for script, argv in runs:
                line = refused(script, argv, tmp_path)
                wanted = rf"error: 1 of \d+ images cannot be used: image {victim} cannot be read \(.*\): .*"
                assert re.fullmatch(wanted, line) and "--skip_bad_images" in line, (name, line)
            capsys.readouterr()
            line = refused(main, [*trained, "--task=predict", "--images", str(victim)], tmp_path)
            assert line == "error: 1 of 1 images could not be read and were skipped"
            assert capsys.readouterr().out.startswith(f"skipped: image {victim} cannot be read ("), name
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
                assert read_image(path, 32)[0].mode == "RGB"
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                n_refused += 1
    assert n_refused > 150


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_a_worker_is_the_line_that_it_would_be_without(num_workers: int, tmp_path: Path) -> None:
    """An image gone bad since the check; there may be a line break in its name."""
    for name in ("a b.jpg", "a\nb.jpg", "a\nError: b.jpg"):
        file = tmp_path / name
        file.write_bytes(b"no image")
        images = dataset.ImageList([file] * 3, [0] * 3, ["a"], annotations=[None] * 3)
        loader = dataset.make_loader(images, flags_of(main, f"--num_workers={num_workers}"), CPU, 32)
        line = fails(SimpleNamespace(main=lambda argv, loader=loader: [*loader]), [])
        assert line == f"error: image {file} cannot be read (not an image)".replace("\n", " ")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_images_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    for suffix in ("jpg", "png"):
        path = tmp_path / f"image.{suffix}"
        draw_image(np.random.default_rng(0), *size).save(path)
        for seed in (None, 0):
            canvas, _ = dataset.crop_to_canvas(*read_image(path, 64), 64, seed, 0.5)
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
            assert len(images.files) == len(images.labels) and set(images.labels) <= set(classes)
            assert not images.files or part != "train" or set(images.labels) == set(classes) != {0}
        n_read += len(parts) == 3
    assert 30 < n_read < 270


# --- flags


def flags_with_type(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags that turn their text into a value of another kind, or check it."""
    return [action for action in parser._actions if action.type]


def parse(parser: argparse.ArgumentParser, flag: argparse.Action, text: str) -> Any:
    """The value of a flag for this text, as a shell passes it. Raises UserError."""
    return getattr(parser.parse_args([f"--{flag.dest}={text}"]), flag.dest)


@pytest.mark.parametrize("script", [main, pretrain])
def test_numbers_out_of_any_range(script: ModuleType) -> None:
    """Every flag that takes a number is refused or is a number to compute with."""
    parser = script.make_parser()
    numbers = [flag for flag in flags_with_type(parser) if type(flag.default) in (int, float)]
    assert {"batch_size", "epochs", "lr", "seed", "valid_size", "num_workers"} <= {flag.dest for flag in numbers}
    for flag in numbers:
        n_refused = 0
        for word in ("", " ", "x", "-1", "-0.5", "nan", "inf", "-inf", "1e999", "0x10", "9" * 40, "1_0", "1,5", "None"):
            try:
                value = parse(parser, flag, word)
            except UserError:
                n_refused += 1
            else:
                assert type(value) is type(flag.default) and math.isfinite(value) and value >= 0
        assert n_refused >= 12, flag.dest


ODD_TEXTS = "Größe ٣ ² ½ İ ٣,٤ ²,³ 1e5 1e400 -0.0 +1 1_0 0,0 0,,1 , 00,0 -1,0 0x1F 1+1j None True [] {} %s % {0} - --lr"
ODD_TEXTS = [*ODD_TEXTS.split(), "~", "/", "..", "", " ", "\n", "\0", "\udcff", "a\nb", "TRUE\n", "nan\0"]
ODD_TEXTS += ["9" * 5000, "0" * 5000, "x" * 5000, "9" * 5000 + ",1"]


@pytest.mark.parametrize("script", [main, pretrain])
def test_odd_texts_end_in_a_line_that_names_the_flag(script: ModuleType) -> None:
    """Whatever is given, a flag's `type` raises nothing but what argparse turns into an error."""
    parser, rng, n_refused = script.make_parser(), random.Random(0), 0
    alphabet = "0123456789.,eE+-_ \n\t\0xnaif%{}٣²½é\udcff\U0001f415"
    texts = ODD_TEXTS + ["".join(rng.choices(alphabet, k=rng.randrange(1, 9))) for _ in range(200)]
    flags = [flag for flag in parser._actions if flag.dest != "help"]
    assert {flag.dest for flag in flags} > {flag.dest for flag in flags_with_type(parser)} > {"gpus", "seed", "compile"}
    for flag in flags:
        for text in texts:
            try:
                parse(parser, flag, text)
            except UserError as error:
                assert f"--{flag.dest}" in str(error) and len(str(error)) < 10_500, (flag.dest, text)
                n_refused += 1
        line = fails(script, [f"--{flag.dest}=a\nb", "a\nb"])  # which may be of use, or not
        assert re.fullmatch(r"error: .* (\S+) \(--help lists all flags\)", line), line
    assert n_refused > 0.6 * len(flags) * len(texts)


def test_paths_that_cannot_be(trained: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    anew = [*trained, "--overwrite"]
    for path in ("", "x" * 5000, str(file), str(file / "below"), "/proc/nothing", "a\nb"):
        for script, argv in ((pretrain, BACKBONE), (main, CLASSIFIER)):
            line = refused(script, [*anew, *argv, "--data_dir", path], tmp_path)
            assert line.startswith("error: the folder " if path else "error: the class out in ."), line
    assert "the folder a b cannot be read" in line
    for path in ("x" * 5000, str(file), str(file / "below"), "/proc/nothing"):
        assert "error: " in refused(pretrain, [*anew, *BACKBONE, "--save_dir", path], tmp_path)
        assert "error: " in refused(main, [*trained, "--task=test", "--save_dir", path], tmp_path)
        assert "error: " in refused(main, [*anew, *CLASSIFIER, "--backbone", path], tmp_path)
        assert "error: " in refused(main, [*trained, "--task=predict", "--images", path], tmp_path)
        assert "error: " in refused(main, [*trained, "--task=view_glimpses", "--imgs_dir", path], tmp_path)
        assert "error: " in refused(pretrain, [*anew, *BACKBONE, "--weights", path], tmp_path)
