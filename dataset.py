"""Stanford Dogs or pictures of one's own: lists, a seeded stratified split, the pictures, and their loaders.

Layouts of DATA_DIR, the first that is there:
- Stanford Dogs: Images/<class>/<file> and lists/{train,test}_list.mat (MATLAB 5 files with the cell column `file_list`
  of names below Images and the column `labels` counted from 1);
- train/<class>/<file> and test/<class>/<file>;
- Images/<class>/<file> alone: a fifth of each class, the same in every run, is the test set.
"""

import csv
import os
import random
import re
from collections.abc import Iterator
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

PICTURE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".heic", ".heif")
LARGEST_PICTURE = 2**28  # pixels: what phones take today; Pillow warns beyond, and refuses the double of it
TEST_SIZE = 0.2  # of pictures that come without a test set
SPLIT_SEED = 0  # the same for all runs: a backbone must not have been trained on what main.py validates on

BOX_EDGES = ("left", "top", "right", "bottom")


class DataError(Exception):
    """Something is wrong with the user's data; the message is one line that says what and what to do."""


class PictureList(NamedTuple):
    """Pictures with their labels (counted from 0) and the names that the labels stand for."""

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    origin: str = ""  # in words, what says which pictures are to train on and which to test on


def read_list(data_dir: str | Path, split: str) -> PictureList:
    """The pictures of a split, "train" or "test", in whichever layout they lie. Opens none of them.

    Raises DataError for missing folders and pictures, and for a missing or broken list.
    """
    data_dir = Path(data_dir)

    def has(folder: str) -> bool:  # unlike Path's own, False for a name that is too long
        return os.path.isdir(data_dir / folder)

    if has("lists") and has("Images"):
        return read_official_list(data_dir, split)
    if has("train") or has("test"):
        return read_class_folders(data_dir / split, f"as in {data_dir}/train and {data_dir}/test", data_dir / "train")
    if has("Images"):
        origin = f"{data_dir} has no lists: {TEST_SIZE:.0%} of each class, the same in every run, are the test pictures"
        return split_list(read_class_folders(data_dir / "Images", origin), TEST_SIZE)[split == "test"]
    raise DataError(
        f"no pictures at {data_dir / 'Images'} or {data_dir / 'train'}: make them with `python data/stanford_dogs.py` "
        "(Stanford Dogs) or `python data/toy_dogs.py` (a small synthetic set in data/toy), put your own into "
        "Images/<class>/, or give another --data_dir"
    )


def display_names(folders: list[str]) -> list[str]:
    """Names of classes as people say them: without the numbers that some sets put before them, if all then differ."""
    names = [re.sub(r"^(n\d+-|\d+\.)", "", folder).replace("_", " ") for folder in folders]
    return names if all(names) and len(set(names)) == len(names) else folders


def is_picture(path: str | Path) -> bool:
    """Whether a file's name says that it is a picture, and not what some systems keep beside one under a dot."""
    name = os.path.basename(path)
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def read_class_folders(folder: Path, origin: str, like: Path | None = None) -> PictureList:
    """Pictures in a folder for each class, at any depth below it; `like` has the folders of the same classes.

    Raises DataError where there are none, and for a class that `like` has not.
    """
    try:
        present, _ = find_classes(folder)
        classes, numbers = find_classes(like if like and os.path.isdir(like) else folder)
        # A class may lack pictures to test with, but not to learn from.
        samples = make_dataset(folder, numbers, is_valid_file=is_picture, allow_empty=like not in (None, folder))
    except OSError as error:
        reason = error.strerror or str(error).rstrip(". ")
        raise DataError(f"no pictures of classes in {folder} ({reason}): see --data_dir") from error
    if unknown := sorted(set(present) - set(classes)):
        raise DataError(f"{folder} has a class {unknown[0]} that {like} has not: rename or remove it")
    if not samples:
        raise DataError(f"no pictures in the folders of {folder}: see --data_dir")
    files, labels = zip(*samples)
    return PictureList([Path(file) for file in files], list(labels), display_names(classes), origin)


def read_official_list(data_dir: Path, split: str) -> PictureList:
    """Read a list of the official kind, and check that every listed picture is there.

    Raises DataError for a missing or broken list and missing pictures.
    """
    path = data_dir / "lists" / f"{split}_list.mat"
    if not os.path.isfile(path):
        raise DataError(f"list {path} not found: run `python data/stanford_dogs.py` again to fetch the lists")
    try:
        content = loadmat(path, variable_names=["file_list", "labels"])
        names = [str(name.item()) for name in content["file_list"].ravel()]
        labels = [int(label) - 1 for label in content["labels"].ravel()]
    except Exception as error:  # scipy raises many types on a broken file
        raise DataError(f"list {path} cannot be read ({type(error).__name__}): fetch or make it again") from error
    if not names or len(names) != len(labels):
        raise DataError(f"list {path} is broken: it has {len(names)} file names and {len(labels)} labels")

    folders: dict[int, str] = {}
    for name, label in zip(names, labels):
        parts = name.split("/")
        if len(parts) != 2 or ".." in parts or "" in parts:
            raise DataError(f"list {path} names {name!r}, which is not <breed folder>/<file> below Images")
        if folders.setdefault(label, parts[0]) != parts[0]:
            raise DataError(f"list {path} is broken: label {label + 1} stands for {folders[label]} and {parts[0]}")
    if sorted(folders) != list(range(len(folders))) or len(set(folders.values())) != len(folders):
        raise DataError(f"list {path} is broken: its labels must be 1 to the number of breeds, one for each folder")
    files = [data_dir / "Images" / name for name in names]
    missing = [str(file) for file in files if not os.path.isfile(file)]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{len(missing)} of the {len(files)} pictures in {path} are missing: {first}")
    class_names = display_names([folders[label] for label in range(len(folders))])
    return PictureList(files, labels, class_names, f"as in {data_dir}/lists")


def read_dog_boxes(data_dir: str | Path, pictures: PictureList) -> Tensor | None:
    """Where the toy dogs are: [N, 4], left, top, right, bottom in fractions of the side, in the order of the list.

    Toy pictures are square, so that these are fractions of the canvas too. None where there is no such table, as in
    Stanford Dogs. Raises DataError for a table that does not fit the list.
    """
    path = Path(data_dir) / "lists" / "dogs.csv"
    if not path.is_file():
        return None
    try:
        with open(path, newline="") as file:
            table = {row["file"]: [float(row[edge]) for edge in BOX_EDGES] for row in csv.DictReader(file)}
        return torch.tensor([table["/".join(file.parts[-2:])] for file in pictures.files])
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"table {path} does not fit the lists beside it: make it again with data/toy_dogs.py"
        ) from error


def split_list(pictures: PictureList, valid_size: float, seed: int = SPLIT_SEED) -> tuple[PictureList, PictureList]:
    """Hold out the fraction valid_size of each class, drawn from the seed. Returns (training, validation).

    Raises DataError where a class has fewer than two pictures; otherwise each has one or more on either side.
    """
    rng = random.Random(f"split {seed}")
    held_out = set()
    for label, name in enumerate(pictures.class_names):
        members = [i for i, other in enumerate(pictures.labels) if other == label]
        if len(members) < 2:
            raise DataError(
                f"class {name} has {len(members)} picture to divide: some are held out of each class, so it needs two"
            )
        n_valid = min(max(1, round(valid_size * len(members))), len(members) - 1)
        held_out.update(rng.sample(members, n_valid))

    def subset(indices: list[int]) -> PictureList:
        files, labels = zip(*((pictures.files[i], pictures.labels[i]) for i in indices))
        return pictures._replace(files=list(files), labels=list(labels))

    everything = range(len(pictures.files))
    return subset([i for i in everything if i not in held_out]), subset([i for i in everything if i in held_out])


def enable_heic(path: str | Path) -> None:
    """Teach Pillow to open HEIC pictures, by the optional package for that. Raises DataError where it is missing."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise DataError(f"picture {path} is HEIC: pip install pillow-heif, or convert it to JPEG") from None
    register_heif_opener()


def read_picture(path: str | Path, size: int) -> Image.Image:
    """Open any picture as upright 8-bit RGB; transparent parts become white. Raises DataError if it is unreadable.

    size: the canvas that it is for. Where the short side of a JPEG is at least twice that, it comes at a half, a
    quarter or an eighth, but no smaller than the canvas: its decoder then skips most of the work.
    """
    if str(path).lower().endswith((".heic", ".heif")):
        enable_heic(path)
    Image.MAX_IMAGE_PIXELS = LARGEST_PICTURE
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
        raise DataError(f"picture {path} not found") from None
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        unknown = isinstance(error, UnidentifiedImageError)  # whose message is mostly the path
        reason = "not a picture" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"picture {path} cannot be read ({reason}): replace it or leave it out") from error


def crop_to_canvas(image: Image.Image, size: int, rng: random.Random | None = None) -> Tensor:
    """Square crop of the short side, resized once: uint8 [3, size, size].

    Without rng the crop is the middle one; with it, a random one of a picture that is mirrored at random. This is
    the only augmentation, so that the context and the glimpses of a picture can never disagree.
    """
    mirrored = rng is not None and rng.random() < 0.5
    side = min(image.size)
    slack = image.width - side, image.height - side
    left, top = (rng.randint(0, room) if rng is not None else room // 2 for room in slack)
    square = pil_to_tensor(image.crop((left, top, left + side, top + side)))
    canvas = resize(square, [size, size])  # antialiased: what Pillow gives, in half of its time
    return canvas.flip(-1) if mirrored else canvas


class PictureDataset(Dataset):
    """Pictures as (uint8 canvas [3, S, S], label, index in the list). Each is opened and decoded once.

    An index gives the middle crop; a pair (index, seed) of `TrainSampler` the crop and mirroring drawn from the seed.
    """

    def __init__(self, pictures: PictureList, canvas_size: int) -> None:
        self.pictures = pictures
        self.canvas_size = canvas_size

    def __len__(self) -> int:
        return len(self.pictures.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        index, rng = (key, None) if isinstance(key, int) else (key[0], random.Random(key[1]))
        image = read_picture(self.pictures.files[index], self.canvas_size)
        return crop_to_canvas(image, self.canvas_size, rng), self.pictures.labels[index], index


class TrainSampler(Sampler):
    """Shuffled (index, seed) pairs of one process's share of an epoch, all drawn from (seed, epoch).

    Whatever the number of workers and processes, batch number i of all processes together is the same pictures with
    the same augmentation. The last `n_pictures % world_size` pictures of the order sit the epoch out.
    """

    def __init__(self, n_pictures: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.n_pictures, self.seed = n_pictures, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.n_pictures // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = random.Random(f"epoch {self.seed} {self.epoch}")
        keys = [(index, rng.getrandbits(32)) for index in range(self.n_pictures)]
        rng.shuffle(keys)
        return iter(keys[self.rank :: self.world_size][: len(self)])


def make_loader(
    pictures: PictureList,
    order: Sampler | range,
    *,
    canvas_size: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of (uint8 [B, 3, S, S], int64 [B], int64 [B]) in the given order, from workers that outlive the epoch.

    drop_last: leave out a last batch that is not full, unless it is the only one. Raises DataError for an empty order.
    """
    if not len(order):
        raise DataError(f"more processes than pictures: none of {len(pictures.files)} is left for this one")
    return DataLoader(
        PictureDataset(pictures, canvas_size),
        batch_size=min(batch_size, len(order)),
        sampler=order,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(0),  # seeds the workers; what is drawn comes from the order alone
    )


def make_training_loaders(
    train: PictureList, valid: PictureList, *, seed: int, rank: int, world_size: int, drop_last: bool, **loading: Any
) -> tuple[DataLoader, DataLoader]:
    """Loaders of one process's share of the training pictures, augmented, and of the validation pictures.

    The latter are dealt out in turn: rank r has number r, r + world_size, ... `loading` goes to `make_loader`.
    """
    sampler = TrainSampler(len(train.files), seed, rank, world_size)
    valid_order = range(rank, len(valid.files), world_size)
    return make_loader(train, sampler, drop_last=drop_last, **loading), make_loader(valid, valid_order, **loading)


def describe_data(train: PictureList, valid: PictureList) -> dict[str, Any]:
    """What a checkpoint remembers of the lists that it was trained and validated on."""
    sizes = {"training pictures": len(train.files), "validation pictures": len(valid.files)}
    return {"class_names": train.class_names, **sizes}
