"""Synthetic pictures in the official layout, and small networks, for all tests."""

import csv
import importlib
import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet

import dataset
import pretrain
import utils
from model import RecurrentAttention, build_backbone

N_CLASSES = 3
ARCH = "narrow"  # what the scripts do with a backbone does not hang on its width, but how long it takes does
SMALL = ["--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--precision", "fp32", "--valid_size", "0.3"]
BACKBONE = ["--arch", ARCH, "--patch_size", "32", "--weights", "none"]


# --- networks


class NarrowResNet(ResNet):
    """A ResNet with an eighth of the channels."""

    def _make_layer(self, block: type[nn.Module], planes: int, *others: int, **named: int) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *others, **named)


@register_model(ARCH)
def narrow(weights: None = None) -> NarrowResNet:
    """The blocks of a resnet18."""
    return NarrowResNet(BasicBlock, [2, 2, 2, 2])


pretrain.ARCHITECTURES = (*pretrain.ARCHITECTURES, ARCH)


def save_backbone(path: Path, arch: str = ARCH) -> None:
    """A backbone for 32-pixel patches, as pretrain.py leaves it."""
    torch.save({"model_dict": build_backbone(arch).state_dict(), "arch": arch, "patch_size": 32}, path)


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
    utils.run(lambda: importlib.import_module(script).main(argv), dataset.DataError)


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
    process.join(60)
    assert process.exitcode is not None
    deadline = time.monotonic() + 10
    while left := members(process.pid):
        assert time.monotonic() < deadline, f"processes {left} of its group still run"
    return process.exitcode


# --- what scripts leave


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def read_log(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
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


def fails(script: Callable[[list[str]], None], argv: list[str]) -> str:
    """The one line with which a script refuses what it was given."""
    with pytest.raises(SystemExit) as stop:
        utils.run(lambda: script(argv), dataset.DataError)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


# --- fixtures


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw_picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth colourful picture with some structure, so that crops at different places differ."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_list(path: Path, names: list[str], labels: list[int]) -> None:
    """A list as the official ones: an N x 1 cell column of names and an N x 1 uint8 column of labels from 1."""
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"file_list": cells, "labels": np.array(labels, dtype=np.uint8).reshape(-1, 1)})


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data folder with n_train and n_test pictures of each class, and returns it."""

    def make(n_train: int = 6, n_test: int = 3, n_classes: int = N_CLASSES) -> Path:
        rng = np.random.default_rng(0)
        data_dir = tmp_path / "dogs"
        for split, n_pictures in (("train", n_train), ("test", n_test)):
            names, labels = [], []
            for label in range(1, n_classes + 1):
                folder = f"n{label:08d}-toy_breed_{label}"
                (data_dir / "Images" / folder).mkdir(parents=True, exist_ok=True)
                for i in range(n_pictures):
                    names.append(f"{folder}/{split}_{i}.jpg")
                    labels.append(label)
                    width, height = (60, 48) if i % 2 else (44, 64)
                    draw_picture(rng, width, height).save(data_dir / "Images" / names[-1], quality=95)
            write_list(data_dir / "lists" / f"{split}_list.mat", names, labels)
        return data_dir

    return make


@pytest.fixture
def make_model() -> Callable[..., RecurrentAttention]:
    """Builds a small network; keywords override its settings."""

    def make(arch: str = "resnet18", **keywords: object) -> RecurrentAttention:
        settings = {"n_classes": N_CLASSES, "patch_size": 32, "k": 1, "start_size": 1, "n_glimpses": 2}
        settings |= {"rnn_hidden": 16, "std_dev": 0.2, **keywords}
        return RecurrentAttention(backbone=build_backbone(arch), **settings)

    return make


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    """A folder with a backbone for 32-pixel patches."""
    folder = tmp_path / "saved_models"
    folder.mkdir()
    save_backbone(folder / "pt_glimpse_model.tar")
    return folder
