"""Stanford Dogs or your own images: layouts and lists, splits, a check of all images, decoding, and loaders.

Layouts of DATA_DIR, the first that fits; folder names may be in any case, hidden files and folders are ignored:
- Images/<class>/<file> and lists/{train,test}_list.mat, as Stanford Dogs (MATLAB 5 files with the cell column
  `file_list` of names below Images and the column `labels` counted from 1);
- train/<class>/<file> with test/, with val/, or with both: val/ is the validation set if there is a test/, else the
  test set; to test a classifier, test/ alone is enough;
- Images/<class>/<file> or <class>/<file> alone: a fifth of each class is the test set.
"""

import contextlib
import difflib
import errno
import hashlib
import math
import os
import random
import re
import unicodedata
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy.io import loadmat
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from tqdm import tqdm

from utils import DATA_DIR, Machine, UserError

IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".gif", ".avif", ".heic", ".heif")
LARGEST_IMAGE = 2**28  # pixels, enough for today's phones; Pillow warns above this and refuses twice as many
TEST_SIZE = 0.2  # fraction of each class, for data without a test set
LARGEST_OVERLAP = 0.01  # fraction of test images that may be training images too: official lists hold some twins
N_BOXES = 16  # that a batch holds for each image
N_NAMED = 10  # bad images that a message names
PARTS = {  # names of the folders of each part, in any case
    "train": ("train", "training"),
    "valid": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


class ImageError(UserError):
    """An image that cannot be read."""


class ImageList(NamedTuple):
    """Images, their labels (counted from 0) and the class name of each label."""

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    split_rule: str = ""  # in words, how training, validation and test images are told apart
    folder: Path = Path()  # that of the folders of classes
    annotations: list[Path | None] = []  # files with the boxes of the dogs, where there are any
    fingerprints: list[int] = []  # of the files' content, once they have been checked

    def subset(self, indices: Iterable[int]) -> "ImageList":
        """The images at these places."""
        chosen, columns = list(indices), ("files", "labels", "annotations", "fingerprints")
        values = {name: getattr(self, name) for name in columns}
        return self._replace(**{name: [value[i] for i in chosen] for name, value in values.items() if value})


NO_IMAGES = ImageList([], [], [])


# --- layouts


def is_visible(name: str) -> bool:
    """Whether a file or folder belongs to the data, and not to a file system, a notebook or an archive."""
    return not name.startswith(".") and name != "__MACOSX"


def subfolders(folder: Path) -> dict[str, Path]:
    """The visible folders in a folder, by name. Raises UserError if it cannot be read."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and is_visible(entry.name))
    except OSError as error:
        fetch, draw = "fetch it with `python data/stanford_dogs.py`", "draw a small set with `python data/toy_dogs.py`"
        hint = f": {fetch}, {draw}, or give --data_dir" if folder == DATA_DIR else ""
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}){hint}") from error
    return {name: folder / name for name in names}


def files_below(folder: Path, suffixes: str | tuple[str, ...] = "") -> list[Path]:
    """The visible files in a folder at any depth, in a fixed order. Links lead to no folder twice, nor to one above."""
    above = Path(os.path.abspath(folder)).parent.resolve()
    found, visited = [], {str(path) for path in (above, *above.parents)}
    for root, folders, names in os.walk(folder, followlinks=True):
        is_new = (place := os.path.realpath(root)) not in visited
        visited.add(place)
        folders[:] = sorted(filter(is_visible, folders)) if is_new else []
        found += [Path(root, n) for n in sorted(names) if is_new and is_visible(n) and n.lower().endswith(suffixes)]
    return found


def read_list(data_dir: str | Path, part: str) -> ImageList:
    """The images of a part: "train", "valid", "test", or "all" if the layout leaves the split to us.

    A part that is missing is empty, but for "train". Raises UserError for contradictions and too few images.
    """
    folders = {name.lower(): path for name, path in subfolders(Path(data_dir)).items()}
    boxes = [path for name, path in folders.items() if name in ("annotation", "annotations")]
    if len(boxes) > 1:
        raise UserError(f"{boxes[0]} and {boxes[1]} both seem to hold annotations: rename or remove one of them")
    if {"images", "lists"} <= folders.keys():
        return read_official_list(folders["images"], folders["lists"], part, boxes)
    parts = {part: next((folders[name] for name in names if name in folders), None) for part, names in PARTS.items()}
    if parts["train"] or parts["test"]:
        if not parts["test"]:
            parts["test"], parts["valid"] = parts["valid"], None
        if part == "train" and not parts["train"]:
            raise UserError(f"--data_dir: {data_dir} has a folder {parts['test'].name}, but no folder train")
        uses = zip(parts.values(), ("train", "validate", "test"))
        rule = ", ".join(f"{folder.name}/ to {use}" for folder, use in uses if folder)
        others = [folder for name, folder in parts.items() if folder and name != part]
        return read_class_folders(parts[part], part, rule, boxes, others) if parts.get(part) else NO_IMAGES
    if part == "valid":
        return NO_IMAGES
    folder = folders.get("images", Path(data_dir))
    rule = f"{TEST_SIZE:.0%} of each class in {folder} are the test set"
    everything = read_class_folders(folder, part, rule, boxes if "images" in folders else [], [])
    return everything if part == "all" else split_list(everything, TEST_SIZE, "test", n_parts=3)[part == "test"]


def read_training_lists(data_dir: Path, valid_size: float) -> tuple[ImageList, ImageList]:
    """The training and the validation images; valid_size is the fraction to hold out if there is no folder of these."""
    train, valid = read_list(data_dir, "train"), read_list(data_dir, "valid")
    if valid.files:
        return train, match_classes(valid, train.class_names, train.folder)
    rule = f"{train.split_rule}; {valid_size:.0%} of each class are held out for validation"
    return split_list(train._replace(split_rule=rule), valid_size, "validation", n_parts=2)


def strip_number(name: str) -> str:
    """A class name without the number in front that ImageNet (n02085620-) and CUB-200-2011 (001.) write."""
    return re.sub(r"^(n\d+-|\d{3}\.(?=\D))", "", name).replace("_", " ")


def display_names(folders: list[str]) -> list[str]:
    """Class names to print: folder names without numbers in front, if they stay distinct."""
    names = [strip_number(folder) for folder in folders]
    return names if all(names) and len(set(names)) == len(names) else folders


def match_classes(images: ImageList, class_names: list[str], path: Path) -> ImageList:
    """The images, labelled by class_names, which may differ in case, underscores and leading numbers.

    path: the source of these names. Raises UserError for a class that is not among them.
    """
    keys = [strip_number(name).casefold() for name in class_names]
    known = {key: label for label, key in enumerate(keys) if keys.count(key) == 1}
    known |= {name: label for label, name in enumerate(class_names)}
    labels = {}
    for label, file in dict(zip(images.labels, images.files)).items():
        name = file.relative_to(images.folder).parts[0]
        labels[label] = known.get(name, known.get(strip_number(name).casefold()))
        if labels[label] is None:
            [nearest] = difflib.get_close_matches(strip_number(name), class_names, n=1, cutoff=0)
            hint = f"rename it, perhaps to {nearest}, or remove it"
            raise UserError(f"{images.folder} has a class {name} that {path} lacks: {hint}")
    return images._replace(labels=[labels[label] for label in images.labels], class_names=class_names)


def read_class_folders(folder: Path, part: str, split_rule: str, boxes: list[Path], others: list[Path]) -> ImageList:
    """Images in one folder per class, at any depth; boxes and others are for `find_annotations`.

    Raises UserError if there are none and, if they are for training, for a class without images and a single class.
    """
    classes = subfolders(folder)
    found = [files_below(path, IMAGE_SUFFIXES) for path in classes.values()]
    if not any(found):
        flat = sum(is_visible(name) and name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(folder))
        what = f"{flat} image{'s' * (flat > 1)}, but no folder for each class" if flat else "no folders of images"
        raise UserError(f"{folder} has {what}: put the images into {folder}/<class>/")
    if part in ("train", "all") and (empty := [name for name, files in zip(classes, found) if not files]):
        raise UserError(f"the class {empty[0]} in {folder} has no images: add some, or remove the folder")
    if part == "train" and len(classes) < 2:
        raise UserError(f"{folder} has one class only, {min(classes)}: there is nothing to tell apart")
    files = [file for files in found for file in files]
    labels = [label for label, files in enumerate(found) for _ in files]
    annotations = find_annotations(files, folder, boxes, others)
    return ImageList(files, labels, display_names(list(classes)), split_rule, folder, annotations)


def read_official_list(images: Path, lists: Path, part: str, boxes: list[Path]) -> ImageList:
    """The images in a list of the official format; boxes is for `find_annotations`. A missing list is empty.

    Raises UserError for a missing list of training images, a broken list and missing images.
    """
    path = lists / f"{part}_list.mat"
    if not os.path.isfile(path):
        if part != "train":
            return NO_IMAGES
        raise UserError(f"list {path} not found: run `python data/stanford_dogs.py` again to fetch the lists")
    try:
        content = loadmat(path, variable_names=["file_list", "labels"])
        names = [str(name.item()) for name in content["file_list"].ravel()]
        labels = [int(label) - 1 for label in content["labels"].ravel()]
    except Exception as error:  # scipy raises many types on a broken file
        raise UserError(f"list {path} cannot be read ({type(error).__name__}): fetch or make it again") from error
    if not names or len(names) != len(labels):
        raise UserError(f"list {path} is broken: it has {len(names)} file names and {len(labels)} labels")
    if wrong := [name for name in names if not re.fullmatch(r"(?!\.\./)[^/]+/(?!\.\.$)[^/]+", name)]:
        raise UserError(f"list {path} names {wrong[0]!r}, which is not <breed folder>/<file> below Images")
    pairs = sorted({(label, name.partition("/")[0]) for name, label in zip(names, labels)})
    folders = [folder for _, folder in pairs]
    if [label for label, _ in pairs] != list(range(len(pairs))) or len(set(folders)) < len(folders):
        raise UserError(f"list {path} is broken: its labels must be 1 to the number of breeds, one for each folder")
    files = [images / name for name in names]
    if missing := [str(file) for file in files if not os.path.isfile(file)]:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of the {len(files)} images in {path} are missing: {first}")
    annotations = find_annotations(files, images, boxes, [])
    return ImageList(files, labels, display_names(folders), f"as in {lists}", images, annotations)


def find_annotations(files: list[Path], folder: Path, boxes: list[Path], others: list[Path]) -> list[Path | None]:
    """The annotation of each image of folder/<class>/, PASCAL VOC XML, or None.

    boxes: [the folder of annotations], or []. It holds <folder>/<class>/<image name> or, for all parts together,
    <class>/<image name>, in any case, with or without ".xml". others: folders of the other parts. Raises UserError if
    an annotation could belong to two images, or two annotations to an image.
    """
    if not boxes:
        return [None] * len(files)
    root = {name.lower(): path for name, path in subfolders(boxes[0]).items()}.get(folder.name.lower(), boxes[0])
    known: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(root):
        known[path.relative_to(root).as_posix().lower().removesuffix(".xml")].append(path)
    names = [(file, file.relative_to(folder)) for file in files]
    if root == boxes[0]:
        names += [(file, file.relative_to(other)) for other in others for file in files_below(other, IMAGE_SUFFIXES)]
    found, owners = {}, {}
    for file, place in names:
        name = place.with_suffix("").as_posix().lower()
        paths = known.get(name) or known.get(f"{name.partition('/')[0]}/{name.rpartition('/')[2]}") or [None]
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1]} both annotate {file}: remove one of them")
        if paths[0] and owners.setdefault(paths[0], file) != file:
            where = f"write {boxes[0]}/{folder.name}/<class>/<image name>, or rename one of the images"
            raise UserError(f"{paths[0]} could annotate {owners[paths[0]]} or {file}: {where}")
        found[file] = paths[0]
    return [found[file] for file in files]


def hash_of(content: bytes) -> int:
    """A hash of bytes, a signed integer of 64 bits."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def fingerprint_of(file: Path) -> int:
    """A hash of the whole content of a file; 0 if it cannot be read."""
    with contextlib.suppress(OSError):
        return hash_of(file.read_bytes())
    return 0


def first_twins(files: list[Path]) -> list[Path]:
    """For each file the first, by path, of those with the same content. Reads only files of equal size."""
    first, same_size = {}, defaultdict(list)
    for file in sorted(files):
        same_size[os.path.getsize(file) if os.path.isfile(file) else 0].append(file)
    for size, group in same_size.items():
        seen: dict[Any, Path] = {}
        for file in group:
            alone = not size or len(group) == 1
            first[file] = file if alone else seen.setdefault(fingerprint_of(file), file)
    return [first[file] for file in files]


def split_list(images: ImageList, fraction: float, purpose: str, n_parts: int) -> tuple[ImageList, ImageList]:
    """Hold out a fraction of each class for a purpose. Returns (the rest, the images held out).

    Each image is held out or not by a hash of its own name, so that adding, removing or renaming one moves no other;
    the sizes are therefore about the fraction. Images with the same content count as one. Both parts have at least one
    image of each class, for which a small class may move one. Raises UserError for a class of fewer than n_parts
    distinct images, one of which the images held out leave for each other part.
    """
    twins = first_twins(images.files)
    draws = {}
    for file in twins:  # macOS stores the accents of file names apart from their letters
        name = unicodedata.normalize("NFC", f"{purpose} {'/'.join(file.parts[-2:])}")
        draws[file] = hash_of(name.encode("utf-8", "surrogateescape")) / 2**64 + 0.5
    held_out = set()
    for label, name in enumerate(images.class_names):
        members = dict.fromkeys(twin for twin, other in zip(twins, images.labels) if other == label)
        members = sorted(members, key=draws.get)
        if len(members) < n_parts:
            have = f"{len(members)} distinct image{'s' * (len(members) > 1)}"
            raise UserError(f"the class {name} has {have}: to hold out some for {purpose} it needs {n_parts}")
        n_held_out = sum(draws[twin] < fraction for twin in members)
        held_out.update(members[: min(max(1, n_held_out), len(members) - n_parts + 1)])
    parts = ([i for i, twin in enumerate(twins) if (twin in held_out) == is_held_out] for is_held_out in (False, True))
    kept, held = map(images.subset, parts)
    return kept, held


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among the paths, and the images in the folders. Raises UserError if some is missing or empty."""
    paths, files = list(paths), []
    if missing := [str(path) for path in paths if not os.path.exists(path)]:
        raise UserError(f"--images: {', '.join(missing[:N_NAMED])} not found")
    for path in paths:
        found = files_below(path, IMAGE_SUFFIXES) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"--images {path}: there is no image in that folder")
        files.extend(found)
    return files


# --- decoding


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image of any format, opened by Pillow. Raises ImageError if it cannot be read, here or by the caller."""
    if str(path).lower().endswith((".heic", ".heif")):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ImageError(f"image {path} is HEIC: pip install pillow-heif, or convert it to JPEG") from None
        register_heif_opener()
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ImageError(f"image {path} not found") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise UserError(f"{error.strerror} at image {path}, which may be good: lower --num_workers") from error
        unknown = isinstance(error, UnidentifiedImageError)  # whose message is mostly the path
        reason = "not an image" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image {path} cannot be read ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any image into upright 8-bit RGB, perhaps in place; transparent parts become white.

    Raises ValueError for pixels whose range is unknown: floating-point numbers, and integers of more than 16 bits.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] <= 65535:
        raise ValueError("its pixels are floating-point numbers or beyond 65,535: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies even RGB


def read_boxes(path: Path, size: tuple[int, int], orientation: int) -> Tensor:
    """Boxes of the dogs in an image, [n, 4]: left, top, right, bottom as fractions of the upright image's sides.

    path: an annotation in PASCAL VOC XML, of the image as stored. size: width and height of that in pixels, if it does
    not say them. orientation: EXIF's, by which the image is turned. Raises UserError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text:  # without which there are no entities, whose expansion could fill the memory
            raise ValueError("it has a DOCTYPE")
        root = ElementTree.fromstring(text)
        scale = [float(root.findtext(f"size/{name}", value)) for name, value in zip(("width", "height"), size)]
        edges = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[float(box.findtext(edge)) for edge in edges] for box in root.iterfind("object/bndbox")]
        boxes = torch.tensor(boxes).view(-1, 4) / torch.tensor(scale * 2)
        if not boxes.isfinite().all():
            raise ValueError("its boxes are not numbers, or its size is 0")
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"annotation {path} cannot be read ({error}): fetch it again, or remove it") from error
    x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]
    if orientation >= 5:
        x, y = y, x
    x = 1 - x.flip(-1) if orientation in (2, 3, 6, 7) else x
    y = 1 - y.flip(-1) if orientation in (3, 4, 7, 8) else y
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def read_image(path: str | Path, size: int, annotation: Path | None = None) -> tuple[Image.Image, Tensor]:
    """Read any image as upright 8-bit RGB, transparent parts white, and its boxes [n, 4], in fractions of its sides.

    size: side of the canvas it is for. A JPEG whose short side is at least twice that is decoded at a half, a quarter
    or an eighth of its size, but no smaller than the canvas, which skips most of the decoder's work. Raises ImageError
    for an image and UserError for an annotation that cannot be read.
    """
    with open_image(path) as image:
        stored, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
        image.draft(None, (size, size))
        image.load()
        upright = to_rgb(image)
    return upright, read_boxes(annotation, stored, orientation) if annotation else torch.empty(0, 4)


class RandomCrop(NamedTuple):
    """What a random crop is drawn from."""

    seed: int
    smallest: float  # side, as a fraction of the short side


def choose_crop(width: int, height: int, draw: RandomCrop | None = None) -> tuple[int, int, int, bool]:
    """Left, top and side in pixels of the central square, or of a random one, and whether to mirror it.

    The central one has the short side. The side of a random one is uniform between the smallest and the short side.
    """
    side = min(width, height)
    if draw is None:
        return (width - side) // 2, (height - side) // 2, side, False
    rng = random.Random(draw.seed)
    flipped = rng.random() < 0.5
    # Fractions, not pixels, so that an image decoded at a smaller size is cropped at the same place.
    x, y, scale = rng.random(), rng.random(), rng.uniform(draw.smallest, 1)
    side = max(1, round(side * scale))
    return int(x * (width - side + 1)), int(y * (height - side + 1)), side, flipped


def crop_to_canvas(
    image: Image.Image, boxes: Tensor, size: int, draw: RandomCrop | None = None
) -> tuple[Tensor, Tensor]:
    """The crop of `choose_crop`, resized once: uint8 [3, size, size], and its boxes [N_BOXES, 4].

    boxes: [n, 4] in fractions of the image's sides. Those returned are in fractions of the canvas side, clipped at its
    border, the largest first, filled up with NaN. All augmentation happens here, once per image, so that the context,
    the glimpses and the boxes can never disagree.
    """
    left, top, side, flipped = choose_crop(*image.size, draw)
    square = pil_to_tensor(image.crop((left, top, left + side, top + side)))
    canvas = resize(square, [size, size])  # antialiased, as in Pillow, in half the time
    boxes = ((boxes * torch.tensor(image.size * 2) - torch.tensor([left, top] * 2)) / side).clamp(0, 1)
    if flipped:
        canvas = canvas.flip(-1)
        boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(1)
    visible = areas.argsort(descending=True, stable=True)[: min(N_BOXES, int((areas > 0).sum()))]
    padded = torch.full((N_BOXES, 4), math.nan)
    padded[: len(visible)] = boxes[visible]
    return canvas, padded


# --- loaders


class ImageDataset(Dataset):
    """Items (uint8 canvas [3, S, S], boxes [N_BOXES, 4], label, index in the list). Each image is opened once.

    An index gives the central crop; a pair (index, RandomCrop) from `TrainSampler` a random one.
    """

    def __init__(self, images: ImageList, canvas_size: int) -> None:
        self.images = images
        self.canvas_size = canvas_size

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, key: int | tuple[int, RandomCrop]) -> tuple[Tensor, Tensor, int, int]:
        index, draw = (key, None) if isinstance(key, int) else key
        # A smaller crop needs more pixels of the image, or it would be enlarged.
        size = math.ceil(self.canvas_size / draw.smallest) if draw else self.canvas_size
        annotation = self.images.annotations[index] if self.images.annotations else None
        image, boxes = read_image(self.images.files[index], size, annotation)
        return *crop_to_canvas(image, boxes, self.canvas_size, draw), self.images.labels[index], index


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
    args: Namespace,
    machine: Machine,
    canvas_size: int,
    *,
    trains: bool = False,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of `ImageDataset` items, of this process's shard, from workers that persist over epochs.

    trains: shuffled and augmented; else the images rank, rank + world_size, ... in order. drop_last: drop a last batch
    that is not full, unless it is the only one. Raises UserError if the processes cannot share batches or images.
    """
    rank, world_size = machine.rank, machine.world_size
    if args.batch_size % world_size:
        raise UserError(f"--batch_size {args.batch_size} is not a multiple of the {world_size} processes")
    order: Any = range(rank, len(images.files), world_size)
    if trains:
        order = TrainSampler(len(images.files), args.seed, args.smallest_crop, rank=rank, world_size=world_size)
    if not len(order):
        raise UserError(f"more processes than images: none of {len(images.files)} is left for this one")
    return DataLoader(
        ImageDataset(images, canvas_size),
        batch_size=min(args.batch_size // world_size, len(order)),
        sampler=order,
        num_workers=args.num_workers,
        drop_last=drop_last,
        pin_memory=machine.device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        generator=torch.Generator().manual_seed(0),  # seeds the workers only; augmentation depends on the order alone
    )


# --- the check of all images, and what checkpoints know of them


def check_image(file: Path, annotation: Path | None) -> tuple[int, str]:
    """Fingerprint of a file, and why it cannot be used, empty if it can. Raises UserError for a bad annotation."""
    try:
        read_image(file, 1, annotation)  # a JPEG at an eighth of its size
        return hash_of(file.read_bytes()), ""
    except ImageError as error:
        return 0, str(error)


def check_images(args: Namespace, machine: Machine, *lists: ImageList) -> list[ImageList]:
    """Read every image of the lists once. Returns each list with fingerprints and without images that are bad.

    The first process reads, with threads, since Pillow decodes outside Python's lock. Raises UserError, naming the bad
    images, unless they are to be skipped, and if a folder to write to lies among those of classes.
    """
    classes = {images.folder.resolve() for images in lists if images.files}
    for name, folder in vars(args).items():
        if name in ("save_dir", "imgs_dir") and classes & set(folder.resolve().parents):
            raise UserError(f"--{name} {folder} would be taken for a class of {args.data_dir}: choose another folder")
    files = [file for images in lists for file in images.files]
    annotations = [path for images in lists for path in images.annotations or [None] * len(images.files)]
    found: list[Any] = [None]
    if machine.rank == 0:
        with ThreadPoolExecutor(max(1, args.num_workers)) as pool:
            results = pool.map(check_image, files, annotations)
            bar = tqdm(results, "checking images", len(files), unit=" images", leave=False, disable=None)
            found = [list(bar)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if bad := [reason for _, reason in found[0] if reason]:
        named = "; ".join(bad[:N_NAMED]) + ("; ..." if len(bad) > N_NAMED else "")
        what = f"{len(bad)} of {len(files)} images cannot be used"
        if not args.skip_bad_images:
            raise UserError(f"{what}: {named}: replace them, or leave them out with --skip_bad_images")
        machine.print(f"{what} and are left out: {named}")
    checked, results = [], iter(found[0])
    for images in lists:
        prints, reasons = zip(*(next(results) for _ in images.files)) if images.files else ((), ())
        good = [i for i, reason in enumerate(reasons) if not reason]
        checked.append(images._replace(fingerprints=list(prints)).subset(good))
    return checked


def describe(train: ImageList, valid: ImageList) -> str:
    """The data of a training run, in words."""
    names = train.class_names if len(train.class_names) <= 4 else [*train.class_names[:3], "...", train.class_names[-1]]
    sizes = f"{len(train.files):,} training and {len(valid.files):,} validation images"
    return f"{sizes} of {len(train.class_names)} classes: {', '.join(names)}; {train.split_rule}"


def read_training_data(args: Namespace, machine: Machine) -> tuple[ImageList, ImageList, dict[str, Any]]:
    """The training and the validation images, all of them readable, and what checkpoints store about them.

    The test images are read too, to name bad ones before hours of training; nothing else of them is used. Raises
    UserError, also if an image is in both parts.
    """
    train, valid = read_training_lists(args.data_dir, args.valid_size)
    try:
        test = read_list(args.data_dir, "test")
    except UserError as error:  # such as images without labels
        test = NO_IMAGES
        machine.print(f"note: --task=test will fail: {error}")
    train, valid, _ = check_images(args, machine, train, valid, test)
    if lost := sorted(set(range(len(train.class_names))) - set(train.labels)):
        raise UserError(f"no training image of the class {train.class_names[lost[0]]} can be used")
    data: dict[str, Any] = {"class_names": train.class_names}
    for part, images in (("training", train), ("validation", valid)):
        files = [os.path.relpath(file, args.data_dir) for file in images.files]
        data[part] = {"files": files, "fingerprints": images.fingerprints, "labels": images.labels}
    refuse_seen_images(valid, seen_by(data, ("training",)), args.data_dir, "validation")
    return train, valid, data


def seen_by(data: dict[str, Any], parts: tuple[str, ...]) -> set[int]:
    """Fingerprints of the "training" or "validation" images in a checkpoint's data."""
    return {number for part in parts if part in data for number in data[part]["fingerprints"]}


def refuse_seen_images(images: ImageList, seen: set[int], path: Path, use: str) -> int:
    """How many images for a use are among those that a network was trained on, as `seen_by` says.

    Raises UserError for more than `LARGEST_OVERLAP` of them.
    """
    found = [file for file, number in zip(images.files, images.fingerprints) if number in seen]
    if len(found) > LARGEST_OVERLAP * len(images.files):
        words = f"{len(found)} of the {len(images.files)} {use} images were used in training {path}, first {found[0]}"
        raise UserError(f"{words}: see --data_dir and --valid_size")
    return len(found)


def refuse_other_data(stored: dict[str, Any], data: dict[str, Any], path: Path) -> None:
    """Raise UserError if training would go on with other classes, other images or another split."""
    if data["class_names"] != stored["class_names"]:
        raise UserError(f"{path} was trained on other classes: see --data_dir")
    for part in ("training", "validation"):
        then, now = (
            dict(zip(zip(some[part]["fingerprints"], some[part]["labels"]), some[part]["files"]))
            for some in (stored, data)
        )
        if changed := [file for key, file in (then | now).items() if (key in then) != (key in now)]:
            what = f"{len(changed)} {part} images are missing or new, first {changed[0]}"
            hint = "put missing ones back, or train anew with --overwrite"
            raise UserError(f"{path} was trained on other images ({what}): {hint}")


def read_test_list(args: Namespace, machine: Machine, checkpoint: dict[str, Any], path: Path) -> tuple[ImageList, int]:
    """The images to test the network in a checkpoint on, and how many of them it was trained on nevertheless.

    Labels are those of the checkpoint, matched by class name. Of data without a split of its own, all images are for
    testing if the network was trained on none. Raises UserError if there are none, and for more than `LARGEST_OVERLAP`
    that the network or its backbone was trained or validated on.
    """
    parts, names = ("training", "validation"), checkpoint["data"]["class_names"]
    seen = seen_by(checkpoint["data"], parts) | seen_by(checkpoint.get("backbone", {}).get("data", {}), parts)
    images = read_list(args.data_dir, "all")
    if any(fingerprint_of(file) in seen for file in images.files) or not images.files:
        images = read_list(args.data_dir, "test")
    else:
        images = images._replace(split_rule=f"all of {images.folder} is for testing: none of it was trained on")
    if not images.files:
        raise UserError(f"--data_dir: {args.data_dir} has no test images: add a folder test (or val) beside train")
    [images] = check_images(args, machine, match_classes(images, names, path))
    n_seen = refuse_seen_images(images, seen, path, "test")
    if n_seen:
        machine.print(f"note: {n_seen} of the {len(images.files)} test images were used in training too")
    if lost := sorted(set(range(len(names))) - set(images.labels)):
        machine.print(f"note: no test images of {len(lost)} of {len(names)} classes, first {names[lost[0]]}")
    return images, n_seen
