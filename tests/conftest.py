"""Synthetic images in the official layout, and small networks, for all tests."""

import csv
import importlib
import multiprocessing
import os
import re
import resource
import subprocess
import time
import traceback
import zlib
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet

import main
import model
import pretrain
import utils
from model import RecurrentAttention, build_backbone

N_CLASSES = 3
ARCH = "narrow"  # the width of a backbone matters to the time of a test, not to what the scripts do with it
SMALL = ["--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--precision", "fp32", "--valid_size", "0.3"]
CPU = utils.Machine(torch.device("cpu"), [], "fp32", rank=0, world_size=1)
BACKBONE = ["--arch", ARCH, "--patch_size", "32", "--weights", "none"]
MODEL = ["--rnn_hidden", "16", "--k", "2", "--start_size", "1", "--n_glimpses", "2", "--lr", "0.01"]


# --- networks


class NarrowResNet(ResNet):
    """A ResNet with an eighth of the channels."""

    def _make_layer(self, block: type[nn.Module], planes: int, *others: int, **named: int) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *others, **named)


@register_model(ARCH)
def narrow(weights: None = None) -> NarrowResNet:
    """The blocks of a resnet18."""
    net = NarrowResNet(BasicBlock, [2, 2, 2, 2])
    net.fc = nn.Linear(net.inplanes, net.fc.out_features)
    return net


model.ARCHITECTURES.append(ARCH)


def save_backbone(path: Path, arch: str = ARCH) -> None:
    """A backbone for 32-pixel patches, as pretrain.py saves it."""
    described = {"settings": {"arch": arch, "patch_size": "32"}, "data": {}, "versions": {}}
    torch.save({"model_dict": build_backbone(arch).state_dict(), **described}, path)


# --- runs


def flags_of(script: ModuleType, *argv: str) -> Namespace:
    """The flags of a script, as they are without a checkpoint."""
    return script.make_parser().parse_args([*SMALL, *argv])


def fails(script: ModuleType, argv: list[str]) -> str:
    """The one line with which a script refuses what it was given."""
    with pytest.raises(SystemExit) as stop:
        utils.run(lambda: script.main(argv))
    error: BaseException | None = stop.value
    while error:  # the frames keep loaders alive, whose workers the garbage collector would wait for
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


# --- processes


forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["main", "pretrain"])


def run_script(
    script: str, argv: list[str], printed: Path, largest_file: int | None, environment: dict[str, str]
) -> None:
    """A script as a shell starts it: the leader of a group of processes, its output in a file."""
    os.setsid()
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # of the script's own workers, which would be the server's
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    utils.run(lambda: module.main(argv))


def start(
    script: str, argv: list[str], printed: Path, *, largest_file: int | None = None, **environment: str
) -> BaseProcess:
    """Start a script in a process of its own, where nothing has run before."""
    process = forkserver.Process(target=run_script, args=(script, argv, printed, largest_file, environment))
    process.start()
    return process


def members(group: int) -> list[str]:
    """Processes of a group that still run: those that have ended and wait for their parent to notice do not count."""
    table = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,pid="], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return [pid for number, state, pid in rows if int(number) == group and not state.startswith("Z")]


def finish(process: BaseProcess) -> int:
    """Wait for the end, and see that nothing is left of its group."""
    process.join(300)
    assert process.exitcode is not None
    deadline = time.monotonic() + 10
    while left := members(process.pid):
        assert time.monotonic() < deadline, f"processes {left} of its group still run"
    return process.exitcode


# --- what scripts leave


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def read_log(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same(ours: object, theirs: object) -> bool:
    """Equality bit by bit through nested containers."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def without_seconds(content: object) -> object:
    """The rows of a log or the content of a checkpoint, without the measured time, which differs between equal runs."""
    if isinstance(content, dict):
        return {key: without_seconds(value) for key, value in content.items() if key != "seconds"}
    return [without_seconds(row) for row in content] if isinstance(content, list) else content


def same_result(ours: object, theirs: object) -> bool:
    """Equality bit by bit of two checkpoints or logs but for the time that was measured."""
    return same(without_seconds(ours), without_seconds(theirs))


def find_result(report: str, subject: str, estimate: str) -> dict[str, float]:
    """The figures of a line that `--task=test` of main.py printed, by name."""
    [line] = [line for line in report.splitlines() if line.startswith(f"{subject:15}{estimate:20}")]
    right, n_images = re.match(r"[\d.]+% correct \(([\d,]+) of ([\d,]+); ", line[35:]).groups()
    others = {name: float(value) for name, value in re.findall(r"(\w+) (\d+\.\d{4})(?=  |$)", line[35:])}
    return {"accuracy": int(right.replace(",", "")) / int(n_images.replace(",", "")), **others}


def load(save_dir: Path) -> RecurrentAttention:
    """The best classifier in a folder, rebuilt from its checkpoint alone."""
    argv = ["--task=predict", "--save_dir", str(save_dir)]
    args, checkpoint = utils.parse_flags(main.make_parser(), argv, main.FILES, main.NETWORK)
    net = main.build_model(args, checkpoint["backbone"], len(checkpoint["data"]["class_names"])).eval()
    net.load_state_dict(checkpoint["model_dict"])
    return net


def collect_panels(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `draw_panel` is called with from now on."""
    drawn, real = [], main.draw_panel
    monkeypatch.setattr(main, "draw_panel", lambda *given: drawn.append(given) or real(*given))
    return drawn


# --- fixtures


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth colorful image with some structure, so that crops at different places differ."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def draw_folder(folder: Path, n_images: int, suffix: str = "jpg", width: int = 40, height: int = 36) -> None:
    """Images 0.jpg, 1.jpg, ..., no two of them alike in whatever class and part of the data."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_images):
        path = folder / f"{i}.{suffix}"
        rng = np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode()))
        draw_image(rng, width, height).save(path)


def write_list(path: Path, names: list[str], labels: list[int]) -> None:
    """A list as the official ones: an N x 1 cell column of names and an N x 1 uint8 column of labels from 1."""
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"file_list": cells, "labels": np.array(labels, dtype=np.uint8).reshape(-1, 1)})


def annotate(data_dir: Path, boxes: dict[Path, list[tuple[float, ...]]], width: int, height: int) -> None:
    """Annotations as those of Stanford Dogs, of images of this size: xmin, ymin, xmax, ymax in pixels of each dog."""
    for file, dogs in boxes.items():
        lines = ["<annotation>", "<folder>02085620</folder>"]
        lines.append(f"<size>\n<width>{width}</width>\n<height>{height}</height>\n<depth>3</depth></size>")
        for box in dogs:
            edges = "\n".join(f"<{edge}>{value}</{edge}>" for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
            lines.append(f"<object>\n<name>a dog</name>\n<pose>Unspecified</pose>\n<bndbox>{edges}</bndbox></object>")
        path = data_dir / "Annotation" / file.parent.name / file.stem
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, "</annotation>"]), encoding="utf-8")


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data folder with n_train and n_test images of each class, and returns it."""

    def make(n_train: int = 6, n_test: int = 3, n_classes: int = N_CLASSES) -> Path:
        rng = np.random.default_rng(0)
        data_dir = tmp_path / "dogs"
        for split, n_images in (("train", n_train), ("test", n_test)):
            names, labels = [], []
            for label in range(1, n_classes + 1):
                folder = f"n{label:08d}-toy_breed_{label}"
                (data_dir / "Images" / folder).mkdir(parents=True, exist_ok=True)
                for i in range(n_images):
                    names.append(f"{folder}/{split}_{i}.jpg")
                    labels.append(label)
                    width, height = (60, 48) if i % 2 else (44, 64)
                    draw_image(rng, width, height).save(data_dir / "Images" / names[-1], quality=95)
            write_list(data_dir / "lists" / f"{split}_list.mat", names, labels)
        return data_dir

    return make


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """train/<class> and test/<class>, as people have them: numbered names, other formats, a folder in a folder."""
    data_dir = tmp_path / "own"
    for name, suffix in (("001.Red_cat", "png"), ("002.Blue_cat", "JPG"), ("010.Cow", "webp")):
        draw_folder(data_dir / "train" / name, 4, suffix)
        draw_folder(data_dir / "test" / name, 2, suffix)
    draw_folder(data_dir / "train" / "010.Cow" / "2019", 2)
    (data_dir / "train" / "010.Cow" / "._0.webp").write_text("of a file system")
    (data_dir / "train" / "010.Cow" / "notes.txt").write_text("no image")
    return data_dir


@pytest.fixture
def make_model() -> Callable[..., RecurrentAttention]:
    """Builds a small network; keywords override its settings."""

    def make(arch: str = "resnet18", **keywords: object) -> RecurrentAttention:
        settings = {"n_classes": N_CLASSES, "patch_size": 32, "k": 1, "start_size": 1, "n_glimpses": 2}
        settings |= {"rnn_hidden": 16, "std_dev": 0.2, "classify_context": False, "cells": 2, **keywords}
        return RecurrentAttention(backbone=build_backbone(arch), **settings)

    return make


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    """A folder with a backbone for 32-pixel patches."""
    folder = tmp_path / "saved_models"
    folder.mkdir()
    save_backbone(folder / "pt_glimpse_model.tar")
    return folder


@pytest.fixture
def pretrain_args(make_data, tmp_path: Path) -> list[str]:
    folders = ["--data_dir", str(make_data()), "--save_dir", str(tmp_path / "out")]
    return [*folders, *SMALL, *BACKBONE]


@pytest.fixture
def main_args(make_data, save_dir: Path, tmp_path: Path) -> list[str]:
    folders = ["--data_dir", str(make_data()), "--save_dir", str(save_dir), "--imgs_dir", str(tmp_path / "imgs")]
    return [*folders, *SMALL]


@pytest.fixture(params=["pretrain", "main"])
def training(request: pytest.FixtureRequest) -> tuple[ModuleType, list[str], Path]:
    """Each of the scripts, flags for a short run of it, and the folder of its files."""
    if request.param == "pretrain":
        argv = request.getfixturevalue("pretrain_args")
        return pretrain, argv, Path(argv[3])
    return main, [*request.getfixturevalue("main_args"), *MODEL], request.getfixturevalue("save_dir")
