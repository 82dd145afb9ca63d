"""Synthetic pictures in the official layout, and small networks, for all tests."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import dataset
import utils
from model import RecurrentAttention, build_backbone

N_CLASSES = 3
SMALL = ["--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--precision", "fp32", "--valid_size", "0.3"]
BACKBONE = ["--arch", "resnet18", "--patch_size", "32", "--weights", "none"]


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
    """A folder with a resnet18 backbone for 32-pixel patches, as pretrain.py leaves it."""
    folder = tmp_path / "saved_models"
    folder.mkdir()
    content = {"model_dict": build_backbone("resnet18").state_dict(), "arch": "resnet18", "patch_size": 32}
    torch.save(content, folder / "pt_glimpse_model.tar")
    return folder
