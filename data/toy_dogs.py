"""Draw "toy dogs", a small synthetic fine-grained data set, in the layout of Stanford Dogs.

Each image shows one dog of any color somewhere on a smooth background. The eight breeds differ only in the fine
pattern of the coat, whose period is about 4 pixels: it is visible in a glimpse at full resolution, but not in the image
downsampled by a factor of 4. Classifying the breed therefore requires finding the dog first and then looking there.
"""

import argparse
import math
import os
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw
from scipy.io import savemat
from tqdm import tqdm

REDUCTION = 4  # downsampling factor from the image to the context
PERIOD = 4.0  # of the patterns in pixels, independent of the image size
CONTRAST = 0.28  # standard deviation of a pattern as a fraction of the coat's color
LENGTH = 1 / 3  # of a dog from tail to nose, as a fraction of the image side
SUPERSAMPLING = 4

# Patterns of the breeds, with x and y in radians of the period. Each is its own mirror image up to a phase, no two have
# the same spectrum, and each is so fine along x or y that downsampling averages it out.
WAVES = {
    "horizontal_stripes": lambda x, y: np.cos(y),
    "vertical_stripes": lambda x, y: np.cos(x),
    "checks": lambda x, y: np.cos(x) * np.cos(y),
    "dots": lambda x, y: (1 + np.cos(x)) * (1 + np.cos(y)),
    # Thin steep lines: the sum of two diagonal gratings would be checks.
    "crosshatch": lambda x, y: np.minimum(np.cos(x + y / 2), np.cos(x - y / 2)),
    # As high as the period and three times as wide.
    "zigzag": lambda x, y: np.cos(y + 2 * np.arcsin(np.sin(x / 3))),
    # Slightly finer than the others, because rings are coarser along x and y where they run diagonally.
    "rings": lambda x, y: np.cos(1.1 * np.hypot(x, y)),
}
BREEDS = (*WAVES, "plain_grain")
FOLDERS = tuple(f"n{number:08d}-{breed}" for number, breed in enumerate(BREEDS, start=1))
SPLITS = ("train", "test")

# A dog facing right, in drawing order. A body part is a row of discs along a quadratic Bezier curve: start, control
# point, end, first radius, last radius, brightness (x to the right, y down). The far legs and the ear are shaded.
LIT, SHADED, DARK = 1.0, 0.72, 0.12
DOG = {
    "far front leg": ((0.09, 0.06), (0.10, 0.20), (0.09, 0.37), 0.070, 0.050, SHADED),
    "far hind leg": ((-0.16, 0.06), (-0.20, 0.20), (-0.14, 0.37), 0.080, 0.050, SHADED),
    "tail": ((-0.30, -0.06), (-0.46, -0.08), (-0.49, -0.32), 0.060, 0.028, LIT),
    "hind leg": ((-0.25, 0.02), (-0.34, 0.20), (-0.27, 0.39), 0.130, 0.052, LIT),
    "hind paw": ((-0.27, 0.40), (-0.25, 0.40), (-0.22, 0.40), 0.052, 0.046, LIT),
    "front leg": ((0.18, 0.04), (0.20, 0.20), (0.19, 0.39), 0.100, 0.052, LIT),
    "front paw": ((0.19, 0.40), (0.21, 0.40), (0.24, 0.40), 0.052, 0.046, LIT),
    "body": ((-0.22, 0.00), (-0.03, -0.02), (0.14, -0.01), 0.160, 0.175, LIT),
    "neck": ((0.14, -0.06), (0.21, -0.14), (0.27, -0.26), 0.150, 0.115, LIT),
    "head": ((0.26, -0.29), (0.28, -0.29), (0.31, -0.28), 0.130, 0.120, LIT),
    "muzzle": ((0.35, -0.25), (0.41, -0.24), (0.46, -0.23), 0.090, 0.068, LIT),
    "ear": ((0.21, -0.37), (0.13, -0.34), (0.14, -0.19), 0.045, 0.070, SHADED),
    "eye": ((0.34, -0.32), (0.34, -0.32), (0.34, -0.32), 0.028, 0.028, DARK),
    "nose": ((0.51, -0.26), (0.51, -0.26), (0.51, -0.26), 0.036, 0.036, DARK),
}
SWAY = {"tail": 0.10, "far front leg": 0.05, "far hind leg": 0.05}  # largest horizontal shift of a part's end point

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Scene(NamedTuple):
    """An image of a dog without a pattern; S is the side in pixels."""

    plain: np.ndarray  # [S, S, 3] in [0, 1]
    coat: np.ndarray  # [3], the coat's color
    light: np.ndarray  # [S, S] in [0, 1], brightness of the coat in each pixel, 0 outside the dog
    box: Box  # of the dog


def hsv_to_rgb(hue: ArrayLike, saturation: ArrayLike, value: ArrayLike) -> np.ndarray:
    """Colors `[..., 3]` in [0, 1]; hues are in turns and wrap around."""
    hue, saturation, value = (np.asarray(channel)[..., None] for channel in (hue, saturation, value))
    sector = (np.array([5, 3, 1]) + 6 * hue) % 6
    return value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))


def draw_background(size: int, generator: Generator) -> np.ndarray:
    """A Bezier surface of bright colors with similar hues: `[S, S, 3]` in [0, 1], without texture."""
    hue = generator.uniform() + generator.normal(0, 0.12, (5, 5))
    knots = hsv_to_rgb(hue, generator.uniform(0.05, 0.6, (5, 5)), generator.uniform(0.88, 1, (5, 5)))
    t = (np.arange(size) + 0.5) / size
    bernstein = np.stack([math.comb(4, i) * t**i * (1 - t) ** (4 - i) for i in range(5)], axis=1)
    return np.einsum("yi,xj,ijc->yxc", bernstein, bernstein, knots, optimize=True)


def pose_dog(generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Discs (x, y, radius) `[N, 3]` as fractions of the image side, centered on (0, 0), and their brightness `[N]`."""
    discs, lights = [], []
    t = np.linspace(0, 1, 24)[:, None]
    for name, (start, control, end, first_radius, last_radius, light) in DOG.items():
        end = np.add(end, (SWAY.get(name, 0) * generator.uniform(-1, 1), 0))
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * np.array(control) + t**2 * end
        discs.append(np.hstack([curve, first_radius + t * (last_radius - first_radius)]))
        lights.append(np.full(len(t), light))
    discs = np.concatenate(discs) * LENGTH * generator.uniform(0.85, 1.15)
    tilt = math.radians(generator.uniform(-10, 10))
    rotation = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    discs[:, :2] = discs[:, :2] @ rotation.T
    if generator.random() < 0.5:
        discs[:, 0] *= -1
    centers, radii = discs[:, :2], discs[:, 2:]
    centers -= ((centers - radii).min(axis=0) + (centers + radii).max(axis=0)) / 2
    return discs, np.concatenate(lights)


def draw_scene(size: int, spread: float, generator: Generator) -> Scene:
    """Draw a dog without a pattern, entirely inside the image, on a background."""
    background = draw_background(size, generator)
    discs, lights = pose_dog(generator)
    room = 0.5 - (discs[:, :2] + discs[:, 2:]).max(axis=0)
    for axis in range(2):
        offset = math.inf
        while abs(offset) > room[axis]:
            offset = generator.normal(0, spread)
        discs[:, axis] += 0.5 + offset

    # Two canvases: the dog's mask and its brightness.
    canvases = [Image.new("L", (size * SUPERSAMPLING,) * 2) for _ in range(2)]
    draws = [ImageDraw.Draw(canvas) for canvas in canvases]
    for (x, y, radius), light in zip(discs * size * SUPERSAMPLING, lights):
        for draw, fill in zip(draws, (255, round(255 * light))):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    mask, light = (canvas.reduce(SUPERSAMPLING) for canvas in canvases)
    box = mask.getbbox()
    mask, light = (np.asarray(image, dtype=float) / 255 for image in (mask, light))

    # Darker than any background, and dark enough that the pattern's peaks are not clipped.
    coat = hsv_to_rgb(generator.uniform(), generator.uniform(0.25, 0.8), generator.uniform(0.48, 0.6))
    return Scene(background * (1 - mask[..., None]) + coat * light[..., None], coat, light, box)


def draw_pattern(breed: str, size: int, box: Box, generator: Generator) -> np.ndarray:
    """A breed's pattern over the whole image, `[S, S]`, not yet normalized."""
    if breed == "plain_grain":
        spectrum = np.fft.rfft2(generator.normal(size=(size, size)))
        frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
        return np.clip(np.fft.irfft2(spectrum * (frequency > 0.8 / PERIOD), s=(size, size)), -2, 2)
    period = PERIOD * generator.uniform(0.97, 1.03)
    phase = generator.uniform(-math.pi, math.pi, 2)
    center = np.add(box[:2], box[2:]) / 2
    x, y = (2 * math.pi * (np.arange(size) + 0.5 - center[axis]) / period + phase[axis] for axis in range(2))
    return WAVES[breed](*np.meshgrid(x, y))


def normalize_pattern(pattern: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Zero mean over the coat within each pixel of the context, unit standard deviation over the whole coat.

    The context of an image is then the same for all breeds, and fine patterns are hardly changed.
    """
    blocks = (len(light) // REDUCTION, REDUCTION) * 2
    total = light.reshape(blocks).sum(axis=(1, 3), keepdims=True)
    mean = (light * pattern).reshape(blocks).sum(axis=(1, 3), keepdims=True) / np.maximum(total, 1e-9)
    pattern = (pattern.reshape(blocks) - mean).reshape(light.shape)
    return pattern / np.sqrt((light * pattern**2).sum() / light.sum())


def draw_image(breed: str, size: int, spread: float, generator: Generator) -> tuple[np.ndarray, Box]:
    """An image, uint8 `[S, S, 3]`, and the dog's box; equal generators give equal scenes for all breeds."""
    scene = draw_scene(size, spread, generator)
    pattern = draw_pattern(breed, size, scene.box, generator)
    texture = CONTRAST * scene.light * normalize_pattern(pattern, scene.light)
    image = scene.plain + scene.coat * texture[..., None]
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), scene.box


def write_list(path: Path, names: list[str], labels: list[int]) -> None:
    """Write one list in the format of Stanford Dogs, atomically."""
    columns = {
        "file_list": np.array(names, dtype=object)[:, None],
        "annotation_list": np.array([name.removesuffix(".jpg") for name in names], dtype=object)[:, None],
        "labels": np.array(labels, dtype=np.uint8)[:, None],
    }
    temporary = path.with_suffix(".tmp")
    savemat(temporary, columns, appendmat=False, do_compression=True)
    os.replace(temporary, path)


def write_annotation(path: Path, breed: str, size: int, box: Box) -> None:
    """Write the dog's box in the format of Stanford Dogs, PASCAL VOC XML."""
    edges = "".join(f"<{name}>{edge}</{name}>" for name, edge in zip(("xmin", "ymin", "xmax", "ymax"), box))
    shape = f"<size><width>{size}</width><height>{size}</height><depth>3</depth></size>"
    dog = f"<object><name>{breed}</name><bndbox>{edges}</bndbox></object>"
    path.write_text(f"<annotation>{shape}{dog}</annotation>\n", encoding="utf-8")


def write_data_set(data_dir: Path, n_train: int, n_test: int, size: int, spread: float, seed: int) -> None:
    """Draw all images and annotate them, and write the lists last, so that a set with lists is complete."""
    images, lists, annotations = data_dir / "Images", data_dir / "lists", data_dir / "Annotation"
    lists.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (lists / f"{split}_list.mat").unlink(missing_ok=True)
    for folder in FOLDERS:
        for place, pattern in ((images, f"{folder[:9]}_*.jpg"), (annotations, f"{folder[:9]}_*")):
            (place / folder).mkdir(parents=True, exist_ok=True)
            for old_file in (place / folder).glob(pattern):
                old_file.unlink()

    counts = (n_train // len(BREEDS), n_test // len(BREEDS))
    names = {split: [] for split in SPLITS}
    with tqdm(total=n_train + n_test, unit=" images", disable=None) as progress:
        for split_index, split in enumerate(SPLITS):
            for label, (breed, folder) in enumerate(zip(BREEDS, FOLDERS), start=1):
                for i in range(counts[split_index]):
                    # One generator per image, so that the size of one split does not change the other images.
                    generator = np.random.default_rng((seed, split_index, label, i))
                    image, box = draw_image(breed, size, spread, generator)
                    name = f"{folder}/{folder[:9]}_{split_index * counts[0] + i + 1}.jpg"
                    # Chroma subsampling would average the coat's color over two pixels, half a period.
                    Image.fromarray(image).save(images / name, quality=95, subsampling=0)
                    names[split].append(name)
                    write_annotation(annotations / name.removesuffix(".jpg"), breed, size, box)
                    progress.update()

    for split, count in zip(SPLITS, counts):
        labels = [label for label in range(1, len(BREEDS) + 1) for _ in range(count)]
        write_list(lists / f"{split}_list.mat", names[split], labels)


def find_obstacle(data_dir: Path) -> str | None:
    """Reason why a toy set cannot or must not be written to `data_dir`, or None."""
    images, lists = data_dir / "Images", data_dir / "lists"
    nearest = next(path for path in (images.absolute(), *images.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return f"{nearest} is not a writable folder"
    foreign = sorted(path for path in images.glob("*") if path.is_dir() and path.name not in FOLDERS)
    if not all((images / folder).is_dir() for folder in FOLDERS):
        foreign += sorted(lists.glob("*.mat"))
    return f"{data_dir} contains something other than toy dogs: {foreign[0]}" if foreign else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; an error is reported in one line, with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    spread_help = (
        "standard deviation of the dog's center from the image center, as a fraction of the image side; "
        "resampled until the dog fits"
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data/toy"), help="output folder")
    parser.add_argument("--n_train", type=int, default=1600, help="number of training images, a multiple of 8")
    parser.add_argument("--n_test", type=int, default=400, help="number of test images, a multiple of 8")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels, a multiple of 4, at least 64")
    parser.add_argument("--spread", type=float, default=0.2, help=spread_help)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the images")
    args = parser.parse_args(argv)
    for name in ("n_train", "n_test"):
        if getattr(args, name) < 1 or getattr(args, name) % len(BREEDS):
            parser.error(f"--{name} must be a positive multiple of {len(BREEDS)}, not {getattr(args, name)}")
    if args.size < 64 or args.size % REDUCTION:
        parser.error(f"--size must be a multiple of {REDUCTION} and at least 64, not {args.size}")
    if not 0 <= args.spread <= 1:
        parser.error(f"--spread must lie between 0 and 1, not {args.spread}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, not {args.seed}")
    if obstacle := find_obstacle(args.data_dir):
        parser.error(f"--data_dir: {obstacle}")
    return args


def patch_size(size: int) -> int:
    """The smallest multiple of 32, as pretrain.py requires, that is at least a quarter of the image side."""
    return 32 * math.ceil(size / (4 * 32))


def main(argv: list[str] | None = None) -> None:
    """Draw the set, and print what was drawn and the commands that train on it."""
    args = parse_args(argv)
    write_data_set(**vars(args))
    print(
        f"Drew {args.n_train} training and {args.n_test} test images ({args.size} x {args.size}, "
        f"seed {args.seed}) of {len(BREEDS)} toy breeds into {args.data_dir}"
    )
    shared = (
        f"--data_dir {shlex.quote(str(args.data_dir))} --save_dir {shlex.quote(str(args.data_dir / 'saved_models'))}"
    )
    backbone = f"--weights none --arch resnet18 --patch_size {patch_size(args.size)}"
    print(f"next: python pretrain.py {shared} {backbone} --batch_size 32 --lr 5e-4 --epochs 10")
    print(f"then: python main.py {shared} --k 1 --start_size 1 --rnn_hidden 256 --batch_size 32 --lr 1e-3 --epochs 12")


if __name__ == "__main__":
    main()
