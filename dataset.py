"""Stanford Dogs or your own images: layouts and lists, splits, a check of all images, decoding, and loaders.

Layouts of DATA_DIR, the first that fits; folder names may be in any case, hidden files and folders are ignored:
- Images/<class>/<file> and lists/{train,test}_list.mat, as Stanford Dogs: MATLAB 5 files with the cell column
  `file_list` of names below Images and the column `labels` counted from 1;
- train/<class>/<file> with test/, with val/ (the test set if there is no test/), or with both; test/ alone to test;
- Images/<class>/<file> or <class>/<file> alone: a fifth of each class is the test set.
"""

import difflib
import errno
import hashlib
import math
import os
import random
import re
import unicodedata
from argparse import Namespace
from collections import Counter, defaultdict
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
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from tqdm import tqdm

from utils import DATA_DIR, Machine, UserError

IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".gif", ".avif", ".heic", ".heif")
LARGEST_IMAGE = 2**28  # pixels, enough for today's phones; Pillow warns above this and refuses twice as many
TEST_SIZE = 0.2  # fraction of each class, for data without a test set
LARGEST_OVERLAP = 0.01  # fraction of test images that may be training images too: official lists hold some twins
BOX_EDGES = ("xmin", "ymin", "xmax", "ymax")  # of a box in PASCAL VOC XML
N_BOXES = 16  # that a batch holds for each image
N_NAMED = 10  # bad images that a message names
ANNOTATIONS = ("annotation", "annotations")  # names of the folder of boxes
HIDDEN = (".", "__MACOSX")  # beginnings of names that file systems, notebooks and archives leave
PARTS = {"train": ("train", "training"), "valid": ("val", "valid", "validation"), "test": ("test", "testing")}


class ImageError(UserError):
    """An image that cannot be read."""


class ImageList(NamedTuple):
    """Images, their labels (counted from 0) and the class name of each label."""

    files: list[Path] = []
    labels: list[int] = []
    class_names: list[str] = []
    split_rule: str = ""  # in words, how training, validation and test images are told apart
    folder: Path = Path()  # that of the folders of classes
    annotations: list[Path | None] = []  # files with the boxes of the dogs, where there are any
    fingerprints: list[int] = []  # of the files' content, once they have been checked

    def subset(self, indices: Iterable[int]) -> "ImageList":
        """The images at these indices."""
        chosen, columns = list(indices), ("files", "labels", "annotations", "fingerprints")
        values = {name: getattr(self, name) for name in columns}
        return self._replace(**{name: [value[i] for i in chosen] for name, value in values.items() if value})


# --- layouts
def subfolders(folder: Path) -> dict[str, Path]:
    """The visible folders in a folder, by name. Raises UserError if it cannot be read."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        hint = ": run `python data/stanford_dogs.py` or `python data/toy_dogs.py`" if folder == DATA_DIR else ""
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}){hint}") from error
    return {name: folder / name for name in names if not name.startswith(HIDDEN)}


def files_below(folder: Path, suffixes: str | tuple[str, ...] = "") -> list[Path]:
    """The visible files in a folder at any depth, in a fixed order. Links lead to no folder twice, nor to one above."""
    above = Path(os.path.abspath(folder)).parent.resolve()
    found, visited = [], {str(path) for path in (above, *above.parents)}
    for root, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        names = sorted(name for name in names if not name.startswith(HIDDEN))
        found += [Path(root, name) for name in names if name.lower().endswith(suffixes)]
    return found


def read_list(data_dir: str | Path, part: str) -> ImageList:
    """The images, perhaps none, of "train", "valid", "test", or "all" if the layout has no parts. Raises UserError."""
    folders = {name.lower(): path for name, path in subfolders(Path(data_dir)).items()}
    if {"images", "lists"} <= folders.keys():
        return find_annotations(read_official_list(folders["images"], folders["lists"], part), folders)
    parts = {part: next((folders[name] for name in names if name in folders), None) for part, names in PARTS.items()}
    if parts["train"] or parts["test"]:
        if not parts["test"]:
            parts["test"], parts["valid"] = parts["valid"], None
        if part == "train" and not parts["train"]:
            raise UserError(f"--data_dir: {data_dir} has a folder {parts['test'].name}, but no folder train")
        if not parts.get(part):
            return ImageList()
        uses = zip(parts.values(), ("train", "validate", "test"))
        rule = ", ".join(f"{folder.name}/ to {use}" for folder, use in uses if folder)
        others = [folder for name, folder in parts.items() if folder and name != part]
        return find_annotations(read_class_folders(parts[part], part, rule), folders, others)
    if part == "valid":
        return ImageList()
    folder = folders.get("images", Path(data_dir))
    rule = f"{TEST_SIZE:.0%} of each class in {folder} is the test set"
    everything = find_annotations(read_class_folders(folder, part, rule), folders)
    return everything if part == "all" else split_list(everything, TEST_SIZE, "test", n_parts=3)[part == "test"]


def read_training_lists(data_dir: Path, valid_size: float) -> tuple[ImageList, ImageList]:
    """The training and the validation images, a fraction of the former if there is no folder of the latter."""
    train, valid = read_list(data_dir, "train"), read_list(data_dir, "valid")
    if valid.files:
        return train, match_classes(valid, train.class_names, train.folder)
    rule = f"{train.split_rule}; {valid_size:.0%} of each class is held out for validation"
    return split_list(train._replace(split_rule=rule), valid_size, "validation", n_parts=2)


def strip_number(name: str) -> str:
    """A class name without the number in front that ImageNet (n02085620-) and CUB-200-2011 (001.) write."""
    return re.sub(r"^(n\d+-|\d{3}\.(?=\D))", "", name).replace("_", " ")


def display_names(folders: list[str]) -> list[str]:
    """Class names to print: folder names without numbers in front, if they stay distinct."""
    names = [strip_number(folder) for folder in folders]
    return names if all(names) and len(set(names)) == len(names) else folders


def match_classes(images: ImageList, class_names: list[str], path: Path) -> ImageList:
    """The images, relabeled by the class_names of path; case, _ and leading numbers may differ. Raises UserError."""
    keys = [strip_number(name).casefold() for name in class_names]
    known = {key: label for label, key in enumerate(keys) if keys.count(key) == 1}
    known |= {name: label for label, name in enumerate(class_names)}
    labels = []
    for name in (file.relative_to(images.folder).parts[0] for file in images.files):
        labels.append(known.get(name, known.get(strip_number(name).casefold())))
        if labels[-1] is None:
            [nearest] = difflib.get_close_matches(strip_number(name), class_names, n=1, cutoff=0)
            raise UserError(f"{images.folder} has a class {name} that {path} lacks: rename it, perhaps to {nearest}")
    return images._replace(labels=labels, class_names=class_names)


def read_class_folders(folder: Path, part: str, split_rule: str) -> ImageList:
    """Images in one folder per class, at any depth. Raises UserError if there are none, or too few to train on."""
    classes = {name: path for name, path in subfolders(folder).items() if name.lower() not in ANNOTATIONS}
    found = [files_below(path, IMAGE_SUFFIXES) for path in classes.values()]
    if not any(found):
        raise UserError(f"{folder} has no folders of images: put the images into {folder}/<class>/")
    if part in ("train", "all") and (empty := [name for name, files in zip(classes, found) if not files]):
        raise UserError(f"the class {empty[0]} in {folder} has no images: add some, or remove the folder")
    if part == "train" and len(classes) < 2:
        raise UserError(f"{folder} has one class only, {min(classes)}: there is nothing to tell apart")
    files = [file for files in found for file in files]
    labels = [label for label, files in enumerate(found) for _ in files]
    return ImageList(files, labels, display_names(list(classes)), split_rule, folder)


def read_official_list(images: Path, lists: Path, part: str) -> ImageList:
    """The images in a list of the official format, which may be missing, but for "train". Raises UserError."""
    path = lists / f"{part}_list.mat"
    if part != "train" and not os.path.isfile(path):
        return ImageList()
    try:
        content = loadmat(path, variable_names=["file_list", "labels"])
        names = [str(name.item()) for name in content["file_list"].ravel()]
        labels = [int(label) - 1 for label in content["labels"].ravel()]
    except Exception as error:  # scipy raises many types on a broken file
        raise UserError(f"list {path} cannot be read ({type(error).__name__}): fetch or make it again") from error
    pairs = sorted({(label, name.partition("/")[0]) for name, label in zip(names, labels)})
    folders = [folder for _, folder in pairs]
    is_sound = len(names) == len(labels) > 0 and [label for label, _ in pairs] == [*range(len(set(folders)))]
    if not is_sound or not all(re.fullmatch(r"(?!\.\./)[^/]+/(?!\.\.$)[^/]+", name) for name in names):
        raise UserError(f"list {path} is broken: each <breed folder>/<file> needs the label, from 1 on, of its folder")
    files = [images / name for name in names]
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UserError(f"{len(missing)} of the {len(files)} images in {path} are missing, first {missing[0]}")
    return ImageList(files, labels, display_names(folders), f"as in {lists}", images)


def find_annotations(images: ImageList, folders: dict[str, Path], others: Iterable[Path] = ()) -> ImageList:
    """The images with the annotation, PASCAL VOC XML, of each, or None. Raises UserError for ambiguous ones.

    They are files [<folder>/]<class>/<image name>[.xml], in any case, below Annotation/ among the folders of the data;
    <folder> is that of the part. others: folders of the other parts.
    """
    boxes = [folders[name] for name in ANNOTATIONS if name in folders]
    if not boxes:
        return images._replace(annotations=[None] * len(images.files))
    if len(boxes) > 1:
        raise UserError(f"{boxes[0]} and {boxes[1]} both seem to hold annotations: rename or remove one of them")
    root = {name.lower(): path for name, path in subfolders(boxes[0]).items()}.get(images.folder.name.lower(), boxes[0])
    known: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(root):
        known[path.relative_to(root).as_posix().lower().removesuffix(".xml")].append(path)
    places = {file: file.relative_to(images.folder) for file in images.files}
    if root == boxes[0]:
        places |= {file: file.relative_to(other) for other in others for file in files_below(other, IMAGE_SUFFIXES)}
    found, owners = {}, {}
    for file, place in places.items():
        name = place.with_suffix("").as_posix().lower()
        for path in known.get(name) or known.get(f"{place.parts[0]}/{place.stem}".lower()) or ():
            if (twin := found.setdefault(file, path)) != path or (twin := owners.setdefault(path, file)) != file:
                hint = f"rename one, or write {boxes[0]}/{images.folder.name}/<class>/<image name>"
                raise UserError(f"{path} could annotate {file}, but {twin} fits too: {hint}")
    return images._replace(annotations=[found.get(file) for file in images.files])


def hash_of(content: bytes) -> int:
    """A hash of bytes, a signed integer of 64 bits."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def fingerprint_of(file: Path) -> int:
    """A hash of the whole content of a file; 0 if it cannot be read."""
    try:
        return hash_of(file.read_bytes())
    except OSError:
        return 0


def first_twins(files: list[Path]) -> list[Path]:
    """For each file the first, by path, of those with the same content. Reads only files of equal size."""
    sizes = {file: os.path.getsize(file) if os.path.isfile(file) else 0 for file in files}
    n_of_size, first, twins = Counter(sizes.values()), {}, {}
    for file in sorted(files):
        content = fingerprint_of(file) if sizes[file] and n_of_size[sizes[file]] > 1 else file
        twins[file] = first.setdefault(content, file)
    return [twins[file] for file in files]


def split_list(images: ImageList, fraction: float, purpose: str, n_parts: int) -> tuple[ImageList, ImageList]:
    """Hold out a fraction of each class for a purpose. Returns (the rest, the images held out).

    They are chosen by a hash of the names of folder and file, so that adding or removing an image moves no other, but
    at least one is held out and n_parts - 1 are kept. Copies count as one image. Raises UserError for too few images.
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
            raise UserError(f"the class {name} needs {n_parts} distinct images for {purpose}, but has {len(members)}")
        n_held_out = sum(draws[twin] < fraction for twin in members)
        held_out.update(members[: min(max(1, n_held_out), len(members) - n_parts + 1)])
    kept = images.subset(i for i, twin in enumerate(twins) if twin not in held_out)
    return kept, images.subset(i for i, twin in enumerate(twins) if twin in held_out)


def find_images(paths: list[Path]) -> list[Path]:
    """The files among the paths, and the images in the folders. Raises UserError if some is missing or empty."""
    found = [files_below(path, IMAGE_SUFFIXES) if os.path.isdir(path) else [path] for path in paths]
    if missing := [str(path) for path, files in zip(paths, found) if not files or not os.path.exists(path)]:
        raise UserError(f"--images: not found, or without images: {', '.join(missing[:N_NAMED])}")
    return [file for files in found for file in files]


# --- decoding
def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as upright 8-bit RGB, on white, perhaps changed in place. Raises ValueError for an unknown range."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] <= 65535:
        raise ValueError("its pixels are floating-point numbers or beyond 65,535: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies even RGB


def read_boxes(path: Path, size: tuple[int, int], orientation: int) -> Tensor:
    """Boxes of the dogs [n, 4]: left, top, right, bottom in fractions of the upright image's sides. Raises UserError.

    path: PASCAL VOC XML of the image as stored. size: width and height, if the XML lacks them. orientation: EXIF's.
    """
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        scale = [float(root.findtext(f"size/{name}", value)) for name, value in zip(("width", "height"), size)]
        boxes = [[float(box.findtext(edge)) for edge in BOX_EDGES] for box in root.iterfind("object/bndbox")]
        boxes = torch.tensor(boxes).view(-1, 4) / torch.tensor(scale * 2)
        if not boxes.isfinite().all():
            raise ValueError("its boxes are not numbers, or its size is 0")
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"annotation {path} cannot be read ({error}): fetch it again, or remove it") from error
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    if orientation >= 5:
        x, y = y, x
    x = 1 - x.flip(-1) if orientation in (2, 3, 6, 7) else x
    y = 1 - y.flip(-1) if orientation in (3, 4, 7, 8) else y
    return torch.stack([x, y], dim=-1).flatten(1)


def read_image(path: str | Path, size: int, annotation: Path | None = None) -> tuple[Image.Image, Tensor]:
    """Any image as upright 8-bit RGB, on white, and its boxes [n, 4] in fractions of its sides. Raises UserError.

    size: side of the canvas it is for. A JPEG is decoded at a half, a quarter or an eighth, but no smaller than that.
    """
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE
    try:
        if str(path).lower().endswith((".heic", ".heif")):
            from pillow_heif import register_heif_opener

            register_heif_opener()
        with Image.open(path) as image:
            stored, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
            image.draft(None, (size, size))
            image.load()
            upright = to_rgb(image)
    except MemoryError:
        raise
    except ImportError:
        raise ImageError(f"image {path} is HEIC: pip install pillow-heif, or convert it to JPEG") from None
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise UserError(f"{error.strerror} at image {path}, which may be good: lower --num_workers") from error
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise ImageError(f"image {path} cannot be read ({reason})") from error
    return upright, read_boxes(annotation, stored, orientation) if annotation else torch.empty(0, 4)


def choose_crop(width: int, height: int, seed: int | None = None, smallest: float = 1) -> tuple[int, int, int, bool]:
    """Left, top and side in pixels of the central square or, with a seed, of a random one, and whether to mirror it.

    smallest: the side of the smallest random square, as a fraction of the short side.
    """
    side = min(width, height)
    if seed is None:
        return (width - side) // 2, (height - side) // 2, side, False
    rng = random.Random(seed)
    flipped = rng.random() < 0.5
    # Fractions, not pixels, so that an image decoded at a smaller size is cropped at the same place.
    x, y, scale = rng.random(), rng.random(), rng.uniform(smallest, 1)
    side = max(1, round(side * scale))
    return int(x * (width - side + 1)), int(y * (height - side + 1)), side, flipped


def crop_to_canvas(
    image: Image.Image, boxes: Tensor, size: int, seed: int | None = None, smallest: float = 1
) -> tuple[Tensor, Tensor]:
    """The crop of `choose_crop`, resized once: uint8 [3, size, size], and its boxes [N_BOXES, 4].

    boxes: [n, 4] in fractions of the image's sides; those returned are in fractions of the canvas side, clipped at its
    border, the largest first, filled up with NaN. Augmentation happens here only, so that boxes and glimpses agree.
    """
    left, top, side, flipped = choose_crop(*image.size, seed, smallest)
    square = pil_to_tensor(image.crop((left, top, left + side, top + side)))
    canvas = resize(square, [size, size])  # antialiased, as in Pillow, in half the time
    boxes = ((boxes * torch.tensor(image.size * 2) - torch.tensor([left, top] * 2)) / side).clamp(0, 1)
    if flipped:
        canvas = canvas.flip(-1)
        boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(1)
    visible = areas.argsort(descending=True, stable=True)[: min(N_BOXES, int((areas > 0).sum()))]
    return canvas, pad(boxes[visible], (0, 0, 0, N_BOXES - len(visible)), value=math.nan)


# --- loaders
class ImageDataset(Dataset):
    """Items (uint8 canvas [3, S, S], boxes [N_BOXES, 4], label, index) by index or (index, seed of a random crop)."""

    def __init__(self, images: ImageList, canvas_size: int, smallest: float = 1) -> None:
        self.images, self.canvas_size, self.smallest = images, canvas_size, smallest

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, int, int]:
        index, seed = (key, None) if isinstance(key, int) else key
        # A smaller crop needs more pixels of the image, or it would be enlarged.
        size = math.ceil(self.canvas_size / self.smallest)
        image, boxes = read_image(self.images.files[index], size, self.images.annotations[index])
        canvas, boxes = crop_to_canvas(image, boxes, self.canvas_size, seed, self.smallest)
        return canvas, boxes, self.images.labels[index], index


class TrainSampler(Sampler):
    """Shuffled (index, seed of its crop) pairs of one process's shard of an epoch, all drawn from (seed, epoch).

    Batch i over any number of processes holds the same images and crops. `n_images % world_size` images are left out.
    """

    def __init__(self, n_images: int, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.n_images, self.seed, self.rank, self.world_size = n_images, seed, rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.n_images // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = random.Random(f"epoch {self.seed} {self.epoch}")
        keys = [(index, rng.getrandbits(32)) for index in range(self.n_images)]
        rng.shuffle(keys)
        return iter(keys[self.rank :: self.world_size][: len(self)])


def make_loader(
    images: ImageList, args: Namespace, machine: Machine, size: int, *, trains: bool = False, drop_last: bool = False
) -> DataLoader:
    """Batches of this process's items of `ImageDataset`, for training shuffled and augmented. Raises UserError."""
    rank, world_size, n_images = machine.rank, machine.world_size, len(images.files)
    if args.batch_size % world_size or n_images < world_size:
        raise UserError(f"--batch_size {args.batch_size} or {n_images} images do not split over {world_size} processes")
    if "policy" in args and args.policy == "oracle" and not any(images.annotations):
        raise UserError(f"--policy oracle looks at annotated dogs: there are none in {args.data_dir}/Annotation")
    sampler = TrainSampler(n_images, args.seed, rank=rank, world_size=world_size)
    order = sampler if trains else range(rank, n_images, world_size)
    return DataLoader(
        ImageDataset(images, size, args.smallest_crop if trains else 1),
        batch_size=min(args.batch_size // world_size, len(order)),  # so that drop_last leaves a batch
        sampler=order,
        num_workers=args.num_workers,
        drop_last=drop_last,
        pin_memory=machine.device.type == "cuda",
        persistent_workers=args.num_workers > 0,
    )


# --- the check of all images, and what checkpoints know of them
def check_images(args: Namespace, machine: Machine, *lists: ImageList) -> list[ImageList]:
    """Each list with fingerprints and without bad images. Raises UserError for these unless they are to be skipped."""

    def check(file: Path, annotation: Path | None) -> int | str:  # the fingerprint, or why it cannot be used
        try:
            read_image(file, 1, annotation)  # a JPEG at an eighth of its size
            return hash_of(file.read_bytes())
        except ImageError as error:
            return str(error)

    classes = {images.folder.resolve() for images in lists if images.files}
    for name, folder in vars(args).items():
        if name in ("save_dir", "imgs_dir") and classes & set(folder.resolve().parents):
            raise UserError(f"--{name} {folder} would be taken for a class of {args.data_dir}: choose another folder")
    files = [file for images in lists for file in images.files]
    annotations = [path for images in lists for path in images.annotations]
    found: list[Any] = [None]  # of the first process
    if machine.rank == 0:
        with ThreadPoolExecutor(max(1, args.num_workers)) as pool:  # Pillow decodes outside Python's lock
            results = pool.map(check, files, annotations)
            found = [[*tqdm(results, "checking images", len(files), unit=" images", leave=False, disable=None)]]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if bad := [reason for reason in found[0] if isinstance(reason, str)]:
        named = "; ".join(bad[:N_NAMED]) + ("; ..." if len(bad) > N_NAMED else "")
        what = f"{len(bad)} of {len(files)} images cannot be used"
        if not args.skip_bad_images:
            raise UserError(f"{what}: {named}: replace them, or leave them out with --skip_bad_images")
        machine.print(f"{what} and are left out: {named}")
    known = dict(zip(files, found[0]))
    checked = [images._replace(fingerprints=[known[file] for file in images.files]) for images in lists]
    return [images.subset(i for i, x in enumerate(images.fingerprints) if isinstance(x, int)) for images in checked]


def describe(train: ImageList, valid: ImageList) -> str:
    """The data of a training run, in words."""
    names = train.class_names if len(train.class_names) <= 4 else [*train.class_names[:3], "...", train.class_names[-1]]
    sizes = f"{len(train.files):,} training and {len(valid.files):,} validation images"
    return f"{sizes} of {len(train.class_names)} classes: {', '.join(names)}; {train.split_rule}"


def read_training_data(args: Namespace, machine: Machine, last: dict | None = None) -> tuple[ImageList, ImageList, Any]:
    """The training and the validation images, and what checkpoints store about them.

    last: the checkpoint to resume from, or None. Raises UserError, also if its classes or images were others.
    """
    train, valid = read_training_lists(args.data_dir, args.valid_size)
    try:
        test = read_list(args.data_dir, "test")
    except UserError as error:  # such as images without labels
        test = ImageList()
        machine.print(f"note: --task=test will fail: {error}")
    train, valid, _ = check_images(args, machine, train, valid, test)  # bad test images, too, before hours of training
    if lost := [name for label, name in enumerate(train.class_names) if label not in train.labels]:
        raise UserError(f"--skip_bad_images leaves no training image of {lost[0]}: replace its images")
    data = {"class_names": train.class_names}
    stored, run = last["data"] if last else data, f"the run in {args.save_dir}"
    if data["class_names"] != stored["class_names"]:
        raise UserError(f"{run} was trained on other classes: see --data_dir")
    for part, images in (("training", train), ("validation", valid)):
        files = [os.path.relpath(file, args.data_dir) for file in images.files]
        data[part] = {"files": files, "fingerprints": images.fingerprints, "labels": images.labels}
        then, now = (dict(zip(zip(x["fingerprints"], x["labels"]), x["files"])) for x in (stored[part], data[part]))
        if changed := [file for key, file in (then | now).items() if (key in then) != (key in now)]:
            what = f"other images ({len(changed)} {part} images are missing or new, first {changed[0]})"
            raise UserError(f"{run} was trained on {what}: undo that, or train anew with --overwrite")
    refuse_seen_images(valid, seen_by(data, ("training",)), args.data_dir, "validation")
    return train, valid, data


def seen_by(data: dict[str, Any], parts: tuple[str, ...] = ("training", "validation")) -> set[int]:
    """Fingerprints of the "training" or "validation" images in a checkpoint's data."""
    return {number for part in parts if part in data for number in data[part]["fingerprints"]}


def refuse_seen_images(images: ImageList, seen: set[int], path: Path, use: str) -> int:
    """How many images for a use are among those seen in training. Raises UserError beyond `LARGEST_OVERLAP`."""
    found = [file for file, number in zip(images.files, images.fingerprints) if number in seen]
    if len(found) > LARGEST_OVERLAP * len(images.files):
        words = f"{len(found)} of the {len(images.files)} {use} images were used in training {path}, first {found[0]}"
        raise UserError(f"{words}: see --data_dir and --valid_size")
    return len(found)


def list_test_images(data_dir: Path, checkpoint: dict[str, Any], path: Path) -> tuple[ImageList, set[int]]:
    """The test images, with the labels of a checkpoint in path, and the fingerprints that it or its backbone has seen.

    Of data without a split, all images are for testing if it has seen none. Raises UserError, also if there are none.
    """
    seen = seen_by(checkpoint["data"]) | seen_by(checkpoint.get("backbone", {}).get("data", {}))
    images = read_list(data_dir, "all")
    if any(fingerprint_of(file) in seen for file in images.files) or not images.files:
        images = read_list(data_dir, "test")
    else:
        images = images._replace(split_rule=f"all of {images.folder} is for testing: none of it was trained on")
    if not images.files:
        raise UserError(f"--data_dir: {data_dir} has no test images: add a folder test (or val) beside train")
    return match_classes(images, checkpoint["data"]["class_names"], path), seen


def read_test_list(args: Namespace, machine: Machine, checkpoint: dict[str, Any], path: Path) -> tuple[ImageList, int]:
    """The images of `list_test_images`, checked, and how many of them were seen. Raises UserError if too many were."""
    images, seen = list_test_images(args.data_dir, checkpoint, path)
    [images], names = check_images(args, machine, images), images.class_names
    if n_seen := refuse_seen_images(images, seen, path, "test"):
        machine.print(f"note: {n_seen} of the {len(images.files)} test images were used in training too")
    if lost := sorted(set(range(len(names))) - set(images.labels)):
        machine.print(f"note: no test images of {len(lost)} of {len(names)} classes, first {names[lost[0]]}")
    return images, n_seen
