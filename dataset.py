"""Stanford Dogs or your own images: lists, a seeded stratified split, decoding, and loaders.

Layouts of DATA_DIR, the first that fits:
- Stanford Dogs: Images/<class>/<file> and lists/{train,test}_list.mat (MATLAB 5 files with the cell column `file_list`
  of names below Images and the column `labels` counted from 1);
- train/<class>/<file> and test/<class>/<file>;
- Images/<class>/<file> alone: a fifth of each class, the same in every run, is the test set.
"""

import csv
import hashlib
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.io import loadmat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from utils import UserError

IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".heic", ".heif")
LARGEST_IMAGE = 2**28  # pixels, enough for today's phones; Pillow warns above this and refuses twice as many
TEST_SIZE = 0.2  # fraction of each class, for data without a test set
SPLIT_SEED = 0  # of every run, since a backbone must not have been trained on what main.py validates on
BOX_EDGES = ("left", "top", "right", "bottom")


class ImageList(NamedTuple):
    """Images, their labels (counted from 0) and the class name of each label."""

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    split_rule: str = ""  # in words, how training and test images were told apart


def read_list(data_dir: str | Path, split: str) -> ImageList:
    """The images of a split, "train" or "test", in any of the layouts. Opens none of them.

    Raises UserError for missing folders and images, and for a missing or broken list.
    """
    data_dir = Path(data_dir)

    def has(folder: str) -> bool:  # unlike Path's own, False for a name that is too long
        return os.path.isdir(data_dir / folder)

    if has("lists") and has("Images"):
        return read_official_list(data_dir, split)
    if has("train") or has("test"):
        return read_class_folders(data_dir / split, f"as in {data_dir}/train and {data_dir}/test", data_dir / "train")
    if has("Images"):
        split_rule = f"{data_dir} has no lists: {TEST_SIZE:.0%} of each class, the same in every run, are test images"
        return split_list(read_class_folders(data_dir / "Images", split_rule), TEST_SIZE)[split == "test"]
    raise UserError(
        f"no images at {data_dir / 'Images'} or {data_dir / 'train'}: make them with `python data/stanford_dogs.py` "
        "(Stanford Dogs) or `python data/toy_dogs.py` (a small synthetic set in data/toy), put your own into "
        "Images/<class>/, or give another --data_dir"
    )


def display_names(folders: list[str]) -> list[str]:
    """Class names to print: folder names without the leading numbers of some data sets, if they stay distinct."""
    names = [re.sub(r"^(n\d+-|\d+\.)", "", folder).replace("_", " ") for folder in folders]
    return names if all(names) and len(set(names)) == len(names) else folders


def is_image(path: str | Path) -> bool:
    """Whether a file name is that of an image; hidden files, which some systems keep beside images, are none."""
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_class_folders(folder: Path, split_rule: str, like: Path | None = None) -> ImageList:
    """Images in one folder per class, at any depth; `like` is a folder that defines the classes.

    Raises UserError if there are none, and for a class that `like` does not have.
    """
    try:
        present, _ = find_classes(folder)
        classes, numbers = find_classes(like if like and os.path.isdir(like) else folder)
        # A class needs training images, but may lack test images.
        samples = make_dataset(folder, numbers, is_valid_file=is_image, allow_empty=like not in (None, folder))
    except OSError as error:
        reason = error.strerror or str(error).rstrip(". ")
        raise UserError(f"no images of classes in {folder} ({reason}): see --data_dir") from error
    if unknown := sorted(set(present) - set(classes)):
        raise UserError(f"{folder} has a class {unknown[0]} that {like} lacks: rename or remove it")
    if not samples:
        raise UserError(f"no images in the folders of {folder}: see --data_dir")
    files, labels = zip(*samples)
    return ImageList([Path(file) for file in files], list(labels), display_names(classes), split_rule)


def read_official_list(data_dir: Path, split: str) -> ImageList:
    """Read a list in the official format, and check that every listed image exists.

    Raises UserError for a missing or broken list and missing images.
    """
    path = data_dir / "lists" / f"{split}_list.mat"
    if not os.path.isfile(path):
        raise UserError(f"list {path} not found: run `python data/stanford_dogs.py` again to fetch the lists")
    try:
        content = loadmat(path, variable_names=["file_list", "labels"])
        names = [str(name.item()) for name in content["file_list"].ravel()]
        labels = [int(label) - 1 for label in content["labels"].ravel()]
    except Exception as error:  # scipy raises many types on a broken file
        raise UserError(f"list {path} cannot be read ({type(error).__name__}): fetch or make it again") from error
    if not names or len(names) != len(labels):
        raise UserError(f"list {path} is broken: it has {len(names)} file names and {len(labels)} labels")

    folders: dict[int, str] = {}
    for name, label in zip(names, labels):
        parts = name.split("/")
        if len(parts) != 2 or ".." in parts or "" in parts:
            raise UserError(f"list {path} names {name!r}, which is not <breed folder>/<file> below Images")
        if folders.setdefault(label, parts[0]) != parts[0]:
            raise UserError(f"list {path} is broken: label {label + 1} stands for {folders[label]} and {parts[0]}")
    if sorted(folders) != list(range(len(folders))) or len(set(folders.values())) != len(folders):
        raise UserError(f"list {path} is broken: its labels must be 1 to the number of breeds, one for each folder")
    files = [data_dir / "Images" / name for name in names]
    missing = [str(file) for file in files if not os.path.isfile(file)]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of the {len(files)} images in {path} are missing: {first}")
    class_names = display_names([folders[label] for label in range(len(folders))])
    return ImageList(files, labels, class_names, f"as in {data_dir}/lists")


def read_dog_boxes(data_dir: str | Path, images: ImageList) -> Tensor | None:
    """Boxes of the toy dogs, [N, 4]: left, top, right, bottom as fractions of the side, in the order of the list.

    Toy images are square, so these are fractions of the canvas too. None if there is no such table, as in Stanford
    Dogs. Raises UserError if the table does not match the list.
    """
    path = Path(data_dir) / "lists" / "dogs.csv"
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = {row["file"]: [float(row[edge]) for edge in BOX_EDGES] for row in csv.DictReader(file)}
        return torch.tensor([table["/".join(file.parts[-2:])] for file in images.files])
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"table {path} does not match the lists beside it: make it again with data/toy_dogs.py"
        ) from error


def split_list(images: ImageList, fraction: float, seed: int = SPLIT_SEED) -> tuple[ImageList, ImageList]:
    """Hold out a fraction of each class, drawn from the seed. Returns (the rest, the images held out).

    Both parts have at least one image of each class. Raises UserError for a class with fewer than two images.
    """
    rng = random.Random(f"split {seed}")
    held_out = set()
    for label, name in enumerate(images.class_names):
        members = [i for i, other in enumerate(images.labels) if other == label]
        if len(members) < 2:
            raise UserError(
                f"class {name} has {len(members)} image: some of each class are held out, so it needs at least two"
            )
        n_held_out = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.update(rng.sample(members, n_held_out))

    def subset(indices: list[int]) -> ImageList:
        files, labels = zip(*((images.files[i], images.labels[i]) for i in indices))
        return images._replace(files=list(files), labels=list(labels))

    everything = range(len(images.files))
    return subset([i for i in everything if i not in held_out]), subset([i for i in everything if i in held_out])


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths and the images in the folders. Raises UserError for a folder without any."""
    files = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if is_image(file)) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"--images {path}: there is no image in that folder")
        files.extend(found)
    return files


def enable_heic(path: str | Path) -> None:
    """Let Pillow open HEIC images, by means of an optional package. Raises UserError if it is missing."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise UserError(f"image {path} is HEIC: pip install pillow-heif, or convert it to JPEG") from None
    register_heif_opener()


def read_image(path: str | Path, size: int) -> Image.Image:
    """Open any image as upright 8-bit RGB; transparent parts become white. Raises UserError if it is unreadable.

    size: side of the canvas it is for. A JPEG whose short side is at least twice that is decoded at a half, a quarter
    or an eighth of its size, but no smaller than the canvas, which skips most of the decoder's work.
    """
    if str(path).lower().endswith((".heic", ".heif")):
        enable_heic(path)
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE
    try:
        with Image.open(path) as image:
            image.draft(None, (size, size))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except FileNotFoundError:
        raise UserError(f"image {path} not found") from None
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        unknown = isinstance(error, UnidentifiedImageError)  # whose message is mostly the path
        reason = "not an image" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {path} cannot be read ({reason}): replace it or leave it out") from error


def load_canvas(path: str | Path, size: int, rng: random.Random | None = None) -> Tensor:
    """Read an image as a canvas, uint8 [3, size, size]. Raises UserError if it is unreadable."""
    return crop_to_canvas(read_image(path, size), size, rng)


def crop_to_canvas(image: Image.Image, size: int, rng: random.Random | None = None) -> Tensor:
    """Square crop of the short side, resized once: uint8 [3, size, size].

    Without rng it is the central crop; with rng, a random one, flipped at random. All augmentation happens here, once
    per image, so that the context and the glimpses can never disagree.
    """
    flipped = rng is not None and rng.random() < 0.5
    side = min(image.size)
    slack = image.width - side, image.height - side
    left, top = (rng.randint(0, room) if rng is not None else room // 2 for room in slack)
    square = pil_to_tensor(image.crop((left, top, left + side, top + side)))
    canvas = resize(square, [size, size])  # antialiased, as in Pillow, in half the time
    return canvas.flip(-1) if flipped else canvas


class ImageDataset(Dataset):
    """Items (uint8 canvas [3, S, S], label, index in the list). Each image is opened and decoded once.

    An index gives the central crop; a pair (index, seed) from `TrainSampler` the crop and flip drawn from the seed.
    """

    def __init__(self, images: ImageList, canvas_size: int) -> None:
        self.images = images
        self.canvas_size = canvas_size

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        index, rng = (key, None) if isinstance(key, int) else (key[0], random.Random(key[1]))
        return load_canvas(self.images.files[index], self.canvas_size, rng), self.images.labels[index], index


class TrainSampler(Sampler):
    """Shuffled (index, seed) pairs of one process's shard of an epoch, all drawn from (seed, epoch).

    For any number of workers and processes, batch i over all processes holds the same images with the same
    augmentation. The last `n_images % world_size` images of the order are left out of the epoch.
    """

    def __init__(self, n_images: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.n_images, self.seed = n_images, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.n_images // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = random.Random(f"epoch {self.seed} {self.epoch}")
        keys = [(index, rng.getrandbits(32)) for index in range(self.n_images)]
        rng.shuffle(keys)
        return iter(keys[self.rank :: self.world_size][: len(self)])


def make_loader(
    images: ImageList,
    order: Sampler | range,
    *,
    canvas_size: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    drop_last: bool = False,
) -> DataLoader:
    """Batches (uint8 [B, 3, S, S], int64 [B], int64 [B]) in the given order, from workers that persist over epochs.

    drop_last: drop a last batch that is not full, unless it is the only one. Raises UserError for an empty order.
    """
    if not len(order):
        raise UserError(f"more processes than images: none of {len(images.files)} is left for this one")
    return DataLoader(
        ImageDataset(images, canvas_size),
        batch_size=min(batch_size, len(order)),
        sampler=order,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(0),  # seeds the workers only; augmentation depends on the order alone
    )


def make_evaluation_loader(images: ImageList, *, rank: int, world_size: int, **loading: Any) -> DataLoader:
    """A loader of one process's shard, the images rank, rank + world_size, ... `loading` goes to `make_loader`."""
    return make_loader(images, range(rank, len(images.files), world_size), **loading)


def make_training_loader(
    images: ImageList, *, seed: int, rank: int, world_size: int, drop_last: bool = False, **loading: Any
) -> DataLoader:
    """A loader of one process's shard, shuffled and augmented. `loading` goes to `make_loader`."""
    sampler = TrainSampler(len(images.files), seed, rank, world_size)
    return make_loader(images, sampler, drop_last=drop_last, **loading)


def read_training_lists(data_dir: Path, valid_size: float) -> tuple[ImageList, ImageList, dict[str, Any]]:
    """The training images, the fraction valid_size of them held out for validation, and a description of both."""
    train, valid = split_list(read_list(data_dir, "train"), valid_size)
    return train, valid, describe_data(train, valid)


def describe_data(train: ImageList, valid: ImageList) -> dict[str, Any]:
    """What a checkpoint stores of the lists that it was trained and validated on."""
    digests = {}
    for name, images in (("training_list", train), ("validation_list", valid)):
        lines = [f"{label} {'/'.join(file.parts[-2:])}" for file, label in zip(images.files, images.labels)]
        digests[name] = hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
    sizes = {"training_images": len(train.files), "validation_images": len(valid.files)}
    return {"class_names": train.class_names, **sizes, **digests}
