"""Stanford Dogs or your own images: layouts and lists, splits, a check of all images, decoding, and loaders.

Layouts of DATA_DIR, the first that fits; folder names may be in any case, hidden files and folders are ignored:
- Images/<class>/<file> and lists/{train,test}_list.mat, as Stanford Dogs (MATLAB 5 files with the cell column
  `file_list` of names below Images and the column `labels` counted from 1);
- train/<class>/<file> with test/, with val/, or with both: val/ is the validation set if there is a test/, else the
  test set;
- Images/<class>/<file> or <class>/<file> alone: a fifth of each class is the test set.
"""

import contextlib
import hashlib
import itertools
import math
import os
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy.io import loadmat
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor, resize

import utils
from utils import Machine, UserError

IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".heic", ".heif")
LARGEST_IMAGE = 2**28  # pixels, enough for today's phones; Pillow warns above this and refuses twice as many
TEST_SIZE = 0.2  # fraction of each class, for data without a test set
BYTES_HASHED = 2**16  # of each image, from its beginning
N_NAMED = 10  # bad images that a message names
HOW_TO_GET_DATA = (
    ": fetch Stanford Dogs with `python data/stanford_dogs.py`, draw a small synthetic set with "
    "`python data/toy_dogs.py`, or give --data_dir"
)
PARTS = {  # names of the folders of each part, in any case
    "train": ("train", "training"),
    "valid": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
IMAGE_FOLDERS = ("images", *itertools.chain(*PARTS.values()))  # whose folders of classes may have boxes
BOX_EDGES = ("xmin", "ymin", "xmax", "ymax")


class ImageList(NamedTuple):
    """Images, their labels (counted from 0) and the class name of each label."""

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    split_rule: str = ""  # in words, how training, validation and test images are told apart

    def subset(self, indices: Iterable[int]) -> "ImageList":
        """The images at these places."""
        chosen = list(indices)
        return self._replace(files=[self.files[i] for i in chosen], labels=[self.labels[i] for i in chosen])


NO_IMAGES = ImageList([], [], [])


# --- layouts


def is_visible(name: str) -> bool:
    """Whether a file or folder belongs to the data, and not to a file system, a notebook or an archive."""
    return not name.startswith(".") and name != "__MACOSX"


def is_image(path: str | Path) -> bool:
    """Whether a file name is that of an image."""
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_SUFFIXES) and is_visible(name)


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder. Raises UserError if it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and is_visible(entry.name))
    except OSError as error:
        hint = HOW_TO_GET_DATA if folder == utils.SharedSettings.data_dir else ""
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}){hint}") from error


def images_below(folder: Path) -> list[Path]:
    """The images in a folder at any depth, in a fixed order."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(filter(is_visible, folders))
        found += [Path(root, name) for name in sorted(names) if is_image(name)]
    return found


def read_list(data_dir: str | Path, part: str) -> ImageList:
    """The images of a part: "train", "valid" (none if they are yet to be held out of "train") or "test".

    Opens no image, and no list but that of the part. Raises UserError for what is missing or contradictory.
    """
    data_dir = Path(data_dir)
    folders = {name.lower(): data_dir / name for name in subfolders(data_dir)}
    if {"images", "lists"} <= folders.keys():
        rule = f"as in {folders['lists']}"
        return read_official_list(folders["images"], folders["lists"], part, rule) if part != "valid" else NO_IMAGES
    parts = {part: next((folders[name] for name in names if name in folders), None) for part, names in PARTS.items()}
    if not parts["train"] and parts["test"]:
        raise UserError(f"--data_dir: {data_dir} has a folder {parts['test'].name}, but no folder train")
    if parts["train"]:
        if not parts["test"]:
            parts["test"], parts["valid"] = parts["valid"], None
        uses = zip(parts.values(), ("train", "validate", "test"))
        rule = ", ".join(f"{folder.name}/ to {use}" for folder, use in uses if folder)
        if part == "test" and not parts["test"]:
            raise UserError(f"--data_dir: {data_dir} has no folder test (or val) beside train")
        return read_class_folders(parts[part], rule, parts["train"]) if parts[part] else NO_IMAGES
    if part == "valid":
        return NO_IMAGES
    folder = folders.get("images", data_dir)
    rule = f"{TEST_SIZE:.0%} of each class in {folder} are the test set"
    everything = read_class_folders(folder, rule, folder)
    return split_list(everything, TEST_SIZE, "test", n_parts=3)[part == "test"]


def read_training_lists(data_dir: Path, valid_size: float) -> tuple[ImageList, ImageList]:
    """The training and the validation images; valid_size is the fraction to hold out if there is no folder of these."""
    train, valid = read_list(data_dir, "train"), read_list(data_dir, "valid")
    if valid.files:
        return train, valid
    rule = f"{train.split_rule}; {valid_size:.0%} of each class are held out for validation"
    return split_list(train._replace(split_rule=rule), valid_size, "validation", n_parts=2)


def display_names(folders: list[str]) -> list[str]:
    """Class names to print: folder names without the leading numbers of some data sets, if they stay distinct."""
    names = [re.sub(r"^(n\d+-|\d+\.)", "", folder).replace("_", " ") for folder in folders]
    return names if all(names) and len(set(names)) == len(names) else folders


def read_class_folders(folder: Path, split_rule: str, like: Path) -> ImageList:
    """Images in one folder per class, at any depth; the folders of `like` are the classes.

    Raises UserError if there are none, for a class of `like` without images, and for one that `like` does not have.
    """
    classes, present = subfolders(like), subfolders(folder)
    if unknown := sorted(set(present) - set(classes)):
        raise UserError(f"{folder} has a class {unknown[0]} that {like} lacks: rename or remove it")
    found = [images_below(folder / name) for name in classes]
    if not any(found):
        flat = [name for name in os.listdir(folder) if is_image(name)]
        what = f"{utils.count(len(flat), 'image')}, but no folder for each class" if flat else "no folders of images"
        raise UserError(f"{folder} has {what}: put the images into {folder}/<class>/")
    if folder == like and (empty := [name for name, files in zip(classes, found) if not files]):
        raise UserError(f"the class {empty[0]} in {folder} has no images: add some, or remove the folder")
    if len(classes) < 2:
        raise UserError(f"{folder} has one class only, {classes[0]}: there is nothing to tell apart")
    labels = [label for label, files in enumerate(found) for _ in files]
    return ImageList([file for files in found for file in files], labels, display_names(classes), split_rule)


def read_official_list(images: Path, lists: Path, part: str, split_rule: str) -> ImageList:
    """Read a list in the official format, and check that every listed image exists.

    Raises UserError for a missing or broken list and missing images.
    """
    path = lists / f"{part}_list.mat"
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
    files = [images / name for name in names]
    missing = [str(file) for file in files if not os.path.isfile(file)]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of the {len(files)} images in {path} are missing: {first}")
    class_names = display_names([folders[label] for label in range(len(folders))])
    return ImageList(files, labels, class_names, split_rule)


class Dogs(NamedTuple):
    """Where the dogs are in an image."""

    boxes: Tensor  # [n, 4]: left, top, right, bottom as fractions of the width and height of the upright image
    size: tuple[int, int]  # width and height in pixels of the upright image


def read_annotation(path: Path, size: tuple[int, int]) -> Tensor:
    """Boxes of the dogs in one image, [n, 4] as fractions of the stored image, from an annotation in PASCAL VOC XML.

    size: width and height of the image in pixels, for annotations that do not say what size they refer to.
    Raises UserError if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text:  # without which there are no entities, whose expansion could fill the memory
            raise ValueError("it has a DOCTYPE")
        root = ElementTree.fromstring(text)
        scale = [float(root.findtext(f"size/{name}", value)) for name, value in zip(("width", "height"), size)]
        boxes = [[float(box.findtext(edge)) for edge in BOX_EDGES] for box in root.iterfind("object/bndbox")]
        fractions = torch.tensor(boxes).view(-1, 4) / torch.tensor(scale * 2)
        if not fractions.isfinite().all():
            raise ValueError("its boxes are not numbers, or its size is 0")
        return fractions
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"annotation {path} cannot be read ({error}): fetch it again, or remove it") from error


def read_dogs(images: ImageList) -> list[Dogs]:
    """The dogs in each image, by its annotation; none where that is missing.

    The annotation of Images/<breed>/<name>.jpg is Annotation/<breed>/<name>, as in Stanford Dogs, and so for the other
    `IMAGE_FOLDERS`; images elsewhere have none. Raises UserError for an annotation or an annotated image that cannot be
    read.
    """
    dogs = []
    for file in images.files:
        breed, folder = file.parents[:2]
        path, boxes, size = folder.parent / "Annotation" / breed.name / file.stem, torch.empty(0, 4), (1, 1)
        if folder.name.lower() in IMAGE_FOLDERS and os.path.isfile(path):
            with open_image(file) as image:  # which decodes nothing of a JPEG
                size, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
            boxes = read_annotation(path, size)
            # Annotations are of the image as stored, the canvas is of the upright one.
            x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]
            if orientation >= 5:
                x, y, size = y, x, size[::-1]
            x = 1 - x.flip(-1) if orientation in (2, 3, 6, 7) else x
            y = 1 - y.flip(-1) if orientation in (3, 4, 7, 8) else y
            boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
        dogs.append(Dogs(boxes, size))
    return dogs


def boxes_on_canvas(dogs: Dogs, draw: "RandomCrop | None" = None) -> Tensor:
    """Boxes of the dogs in the crop that `crop_to_canvas` makes: [n, 4], in fractions of the canvas side.

    They are clipped at its border; those of dogs outside are left out.
    """
    width, height = dogs.size
    crop = choose_crop(width, height, draw)
    corner = torch.tensor([crop.left, crop.top] * 2)
    boxes = ((dogs.boxes * torch.tensor([width, height] * 2) - corner) / crop.side).clamp(0, 1)
    if crop.flipped:
        boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]


def boxes_of_dogs(dogs: list[Dogs]) -> Tensor | None:
    """Boxes on the canvas of the central crop, [N, n, 4] in fractions of its side, or None if no image has any.

    n is the largest number of dogs in an image; NaN stands for those that another lacks.
    """
    boxes = nn.utils.rnn.pad_sequence([boxes_on_canvas(one) for one in dogs], batch_first=True, padding_value=math.nan)
    return boxes if boxes.shape[1] else None


def location_of_dog(boxes: Tensor) -> Tensor:
    """Centre of the largest of the boxes [n, 4] on a canvas, [2] in [-1, 1]; without boxes, that of the canvas."""
    if not len(boxes):
        return torch.zeros(2)
    largest = boxes[(boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()]
    return largest[:2] + largest[2:] - 1


def hash_of(text: str, content: bytes = b"") -> int:
    """A hash of a text and bytes, a signed integer of 64 bits, the same for both forms of Unicode.

    macOS stores the accents of file names apart from their letters.
    """
    encoded = unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(encoded + content).digest()[:8], "big", signed=True)


def split_list(images: ImageList, fraction: float, purpose: str, n_parts: int) -> tuple[ImageList, ImageList]:
    """Hold out a fraction of each class for a purpose. Returns (the rest, the images held out).

    Each image is held out or not by a hash of its own name, so that adding, removing or renaming one moves no other;
    the sizes are therefore about the fraction. Both parts have at least one image of each class. Raises UserError for a
    class with fewer images than n_parts.
    """

    draws = [hash_of(f"{purpose} {'/'.join(file.parts[-2:])}") / 2**64 + 0.5 for file in images.files]
    held_out = set()
    for label, name in enumerate(images.class_names):
        members = sorted((i for i, other in enumerate(images.labels) if other == label), key=lambda i: draws[i])
        if len(members) < n_parts:
            have, need = (utils.count(len(members), "image"), f"to hold out some for {purpose} it needs {n_parts}")
            raise UserError(f"the class {name} has {have}: {need}")
        n_held_out = sum(draws[i] < fraction for i in members)
        held_out.update(members[: min(max(1, n_held_out), len(members) - n_parts + 1)])
    everything = range(len(images.files))
    kept = [i for i in everything if i not in held_out]
    return images.subset(kept), images.subset(sorted(held_out))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths and the images in the folders, at any depth.

    Raises UserError for a path that does not exist and for a folder without images.
    """
    paths, files = list(paths), []
    if missing := [str(path) for path in paths if not os.path.exists(path)]:
        raise UserError(f"--images: {', '.join(missing[:N_NAMED])} not found")
    for path in paths:
        found = images_below(path) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"--images {path}: there is no image in that folder")
        files.extend(found)
    return files


# --- decoding


def enable_heic(path: str | Path) -> None:
    """Let Pillow open HEIC images, by means of an optional package. Raises UserError if it is missing."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise UserError(f"image {path} is HEIC: pip install pillow-heif, or convert it to JPEG") from None
    register_heif_opener()


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image of any format, opened by Pillow. Raises UserError if it cannot be read, here or where it is used."""
    if str(path).lower().endswith((".heic", ".heif")):
        enable_heic(path)
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"image {path} not found") from None
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        unknown = isinstance(error, UnidentifiedImageError)  # whose message is mostly the path
        reason = "not an image" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {path} cannot be read ({reason})") from error


def read_image(path: str | Path, size: int) -> Image.Image:
    """Open any image as upright 8-bit RGB; transparent parts become white. Raises UserError if it is unreadable.

    size: side of the canvas it is for. A JPEG whose short side is at least twice that is decoded at a half, a quarter
    or an eighth of its size, but no smaller than the canvas, which skips most of the decoder's work.
    """
    with open_image(path) as image:
        image.draft(None, (size, size))
        image.load()
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any image into upright 8-bit RGB, perhaps in place; transparent parts become white.

    Raises ValueError for floating-point pixels, whose range is unknown.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


class RandomCrop(NamedTuple):
    """What a random crop is drawn from."""

    seed: int
    smallest: float  # side, as a fraction of the short side


def load_canvas(path: str | Path, size: int, draw: RandomCrop | None = None) -> Tensor:
    """Read an image as a canvas, uint8 [3, size, size]. Raises UserError if it is unreadable."""
    # A smaller crop needs more pixels of the image, or it would be enlarged.
    return crop_to_canvas(read_image(path, math.ceil(size / draw.smallest) if draw else size), size, draw)


class Crop(NamedTuple):
    """A square of an upright image, in pixels, to be mirrored if flipped."""

    left: int
    top: int
    side: int
    flipped: bool


def choose_crop(width: int, height: int, draw: RandomCrop | None = None) -> Crop:
    """The central square of the short side; or one at random, flipped at random.

    The side of a random crop is uniform between the smallest and all of the short side.
    """
    side = min(width, height)
    if draw is None:
        return Crop((width - side) // 2, (height - side) // 2, side, False)
    rng = random.Random(draw.seed)
    flipped = rng.random() < 0.5
    # Fractions, not pixels, so that an image decoded at a smaller size is cropped at the same place.
    x, y, scale = rng.random(), rng.random(), rng.uniform(draw.smallest, 1)
    side = max(1, round(side * scale))
    return Crop(int(x * (width - side + 1)), int(y * (height - side + 1)), side, flipped)


def crop_to_canvas(image: Image.Image, size: int, draw: RandomCrop | None = None) -> Tensor:
    """The crop of `choose_crop`, resized once: uint8 [3, size, size].

    All augmentation happens here, once per image, so that the context and the glimpses can never disagree.
    """
    left, top, side, flipped = choose_crop(*image.size, draw)
    square = pil_to_tensor(image.crop((left, top, left + side, top + side)))
    canvas = resize(square, [size, size])  # antialiased, as in Pillow, in half the time
    return canvas.flip(-1) if flipped else canvas


class ImageDataset(Dataset):
    """Items (uint8 canvas [3, S, S], label, index in the list). Each image is opened and decoded once.

    An index gives the central crop; a pair (index, RandomCrop) from `TrainSampler` a random one.
    """

    def __init__(self, images: ImageList, canvas_size: int) -> None:
        self.images = images
        self.canvas_size = canvas_size

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, key: int | tuple[int, RandomCrop]) -> tuple[Tensor, int, int]:
        index, draw = (key, None) if isinstance(key, int) else key
        return load_canvas(self.images.files[index], self.canvas_size, draw), self.images.labels[index], index


class TrainSampler(Sampler):
    """Shuffled (index, RandomCrop) pairs of one process's shard of an epoch, all drawn from (seed, epoch).

    For any number of workers and processes, batch i over all processes holds the same images with the same
    augmentation. The last `n_images % world_size` images of the order are left out of the epoch.
    """

    def __init__(self, n_images: int, seed: int, smallest_crop: float, *, rank: int = 0, world_size: int = 1) -> None:
        self.n_images, self.seed, self.smallest_crop = n_images, seed, smallest_crop
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.n_images // self.world_size

    def __iter__(self) -> Iterator[tuple[int, RandomCrop]]:
        rng = random.Random(f"epoch {self.seed} {self.epoch}")
        keys = [(index, RandomCrop(rng.getrandbits(32), self.smallest_crop)) for index in range(self.n_images)]
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
    images: ImageList, seed: int, smallest_crop: float, *, rank: int, world_size: int, **loading: Any
) -> DataLoader:
    """A loader of one process's shard, shuffled and augmented. `loading` goes to `make_loader`."""
    sampler = TrainSampler(len(images.files), seed, smallest_crop, rank=rank, world_size=world_size)
    return make_loader(images, sampler, **loading)


# --- the check before training


class ImageCheck(Dataset):
    """Items (int64 [2], 0, index): an image's fingerprint, and whether it is bad, that is, cannot be read.

    The fingerprint is a hash of the file's name, size and first bytes, which tells images apart that only share a name.
    """

    def __init__(self, images: ImageList) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        file = self.images.files[index]
        try:
            with open(file, "rb") as content:
                beginning = content.read(BYTES_HASHED)
            fingerprint = hash_of(f"{file.name} {os.path.getsize(file)} ", beginning)
            read_image(file, 1)  # a JPEG at an eighth of its size
        except (OSError, UserError):
            return torch.tensor([0, 1]), 0, index
        return torch.tensor([fingerprint, 0]), 0, index


def check_images(
    *lists: ImageList, machine: Machine, num_workers: int, skip_bad: bool, memory: Path
) -> list[tuple[ImageList, Tensor]]:
    """Read every image of the lists once. Returns each list without the bad ones, and the fingerprints int64 [N] of it.

    memory: a file that remembers the result, so that the same files are not read again. Raises UserError, naming the
    bad images, unless they are to be skipped.
    """
    together = ImageList([file for images in lists for file in images.files], [], [])
    if len(together.files) < machine.world_size:
        raise UserError(f"there are more processes than images ({len(together.files)})")
    known, key = remembered(memory), digest_of(together.files)
    values = read_all(together, machine, num_workers, known.get(key))
    bad = values[:, 1].nonzero().flatten().tolist()
    if bad:
        counted = f"{len(bad)} of {len(together.files)} images cannot be used"
        named = "; ".join(why_bad(together.files[i]) for i in bad[:N_NAMED]) + ("; ..." if len(bad) > N_NAMED else "")
        if not skip_bad:
            raise UserError(f"{counted}: {named}: replace them, or leave them out with --skip_bad_images")
        machine.print(f"{counted} and are left out: {named}")
    if machine.rank == 0:
        utils.prepare_folder(memory.parent)
        if values is not known.get(key):
            utils.save_checkpoint(memory, {**known, key: values})
    parts = values.split([len(images.files) for images in lists])
    kept = [(part[:, 1] == 0).nonzero().flatten() for part in parts]
    return [(images.subset(good.tolist()), part[good, 0]) for images, part, good in zip(lists, parts, kept)]


def read_all(images: ImageList, machine: Machine, num_workers: int, known: Any) -> Tensor:
    """Fingerprint of each image, and whether it is bad, int64 [N, 2]; if known, only bad ones are read again."""
    found = machine.of_first(known)
    if not isinstance(found, Tensor) or found.shape != (len(images.files), 2):
        shard = range(machine.rank, len(images.files), machine.world_size)
        loader = DataLoader(ImageCheck(images), batch_size=16, sampler=shard, num_workers=num_workers)
        [found] = utils.collect(lambda items, _: (items,), loader, machine, "checking images")
        return found
    bad = found[:, 1].nonzero().flatten().tolist()
    found = found.clone() if bad else found
    for i in bad:
        found[i] = ImageCheck(images)[i][0]
    return found


def remembered(memory: Path) -> dict[str, Any]:
    """What earlier checks found, by the digest of the files."""
    with contextlib.suppress(Exception):  # torch raises many types on a missing or broken file: check again
        return dict(torch.load(memory, weights_only=True))
    return {}


def digest_of(files: list[Path]) -> str:
    """A hash of the paths, sizes and times of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file} ".encode("utf-8", "surrogateescape"))
        with contextlib.suppress(OSError):  # such as a broken link
            digest.update(f"{os.stat(file).st_size} {os.stat(file).st_mtime_ns} ".encode())
    return digest.hexdigest()


def why_bad(file: Path) -> str:
    """What is wrong with an image, in words."""
    try:
        read_image(file, 1)
    except UserError as error:
        return str(error)
    return f"image {file} could not be read"


def read_training_data(
    data_dir: Path, valid_size: float, **checking: Any
) -> tuple[ImageList, ImageList, dict[str, Any]]:
    """The training and the validation images, all of them readable, and what checkpoints store about them.

    checking: keywords for `check_images`. Raises UserError, also if an image is in both parts.
    """
    lists = read_training_lists(data_dir, valid_size)
    (train, train_prints), (valid, valid_prints) = check_images(*lists, **checking)
    if lost := sorted(set(range(len(train.class_names))) - set(train.labels)):
        raise UserError(f"no training image of the class {train.class_names[lost[0]]} can be read")
    sizes = {"training_images": len(train.files), "validation_images": len(valid.files)}
    sizes["left_out"] = sum(len(images.files) for images in lists) - sum(sizes.values())
    data = {"class_names": train.class_names, **sizes}
    data["fingerprints"] = {"training": train_prints, "validation": valid_prints}
    data["labels"] = {"training": torch.tensor(train.labels), "validation": torch.tensor(valid.labels)}
    refuse_trained_on(valid, valid_prints, data, data_dir, "validation")
    return train, valid, data


def refuse_trained_on(images: ImageList, fingerprints: Tensor, data: dict[str, Any], path: Path, use: str) -> None:
    """Raise UserError if images to be used for a "validation" or "test" were used in training a checkpoint.

    data: of that checkpoint. Testing on its validation images is refused too, since they chose the epoch.
    """
    parts = ("training", "validation") if use == "test" else ("training",)
    seen = {number for part in parts for number in utils.numbers_of(data, "fingerprints", part).tolist()}
    found = [file for file, number in zip(images.files, fingerprints.tolist()) if number in seen]
    if found:
        words = f"{len(found)} of the {len(images.files)} {use} images were used in training {path}, first {found[0]}"
        raise UserError(f"{words}: see --data_dir and --valid_size")
