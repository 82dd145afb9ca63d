"""The README: every command in it runs as written, but for sizes that suit a test."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ARCH, draw_picture

import main
import pretrain
from data import stanford_dogs, toy_dogs
from dataset import read_list, read_picture

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"data/toy_dogs.py": toy_dogs, "pretrain.py": pretrain, "main.py": main}
BY_HAND = ("tests/benchmark.py", "tests/toy_table.py")
SHARED = ["--data_dir", "data/toy", "--save_dir", "saved", "--device", "cpu", "--num_workers", "0"]
SHARED += ["--batch_size", "4", "--epochs", "1", "--valid_size", "0.5"]
SIZES = {
    "data/toy_dogs.py": ["--data_dir", "data/toy", "--n_train", "32", "--n_test", "8", "--size", "64"],
    "pretrain.py": [*SHARED, "--arch", ARCH, "--patch_size", "32"],
    "main.py": [*SHARED, "--rnn_hidden", "8", "--n_samples", "2"],
}


def blocks() -> list[str]:
    """What is to be typed: the fenced blocks of no language."""
    return [text for language, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S) if not language]


def commands() -> list[list[str]]:
    """The commands in the README's blocks, in its order, as words."""
    lines = [
        line
        for line in "".join(blocks()).replace("\\\n", "").splitlines()
        if line.startswith(("python ", "torchrun ", "make "))
    ]
    return [shlex.split(line, comments=True) for line in lines]


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, one after the other, as a reader would try them.

    torchrun, make and the download have tests of their own: of their commands, only what they name is looked up.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "another.png"):
        draw_picture(np.random.default_rng(0), 80, 60).save(name)
    Path("folder").mkdir()
    draw_picture(np.random.default_rng(0), 80, 60).save("folder/third.webp")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    n_run = 0
    for program, *words in commands():
        if program == "make":
            assert words[0] in targets
        elif program == "torchrun":
            script = next(i for i, word in enumerate(words) if word in SCRIPTS)
            SCRIPTS[words[script]].parse_args(words[script + 1 :])
        elif words[0] == "data/stanford_dogs.py":
            stanford_dogs.parse_args(words[1:])
        elif words[0] in BY_HAND:
            assert (ROOT / words[0]).exists()
        elif "--gpus" in words:
            main.parse_args(words[1:])
        else:
            settings = SIZES[words[0]]
            if "--task=test" in words or "--resume_training=True" in words:  # which take no other size of the network
                settings = SHARED
            if words[0] == "pretrain.py" and "--task=test" not in words:
                settings = [*settings, "--weights", "none"]
            if "--backbone" in words:
                settings = [*settings, "--backbone", "saved/pt_glimpse_model.tar"]
            SCRIPTS[words[0]].main([*words[1:], *settings])
            n_run += 1
    assert n_run >= 10 and len(list(Path("imgs").iterdir())) == 6


def test_birds_are_linked_into_folders_of_classes(tmp_path: Path) -> None:
    """The shell commands for CUB-200-2011, on two classes in its layout."""
    rows, split = [], []
    for name in ("001.Black_footed_Albatross", "002.Laysan_Albatross"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            draw_picture(np.random.default_rng(i), 30, 20).save(tmp_path / "images" / name / f"{i}.jpg")
            rows.append(f"{len(rows) + 1} {name}/{i}.jpg")
            split.append(f"{len(rows)} {int(i < 3)}")
    (tmp_path / "images.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "train_test_split.txt").write_text("\n".join(split) + "\n")
    [block] = [block for block in blocks() if "train_test_split.txt" in block]
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, check=True)
    for part, n_pictures in (("train", 6), ("test", 2)):
        pictures = read_list(tmp_path, part)
        assert pictures.class_names == ["Black footed Albatross", "Laysan Albatross"]
        assert len(pictures.files) == n_pictures and read_picture(pictures.files[0], 20).size == (30, 20)


def test_links_and_pictures_are_there() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", README, re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) > 10
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).is_file(), target
