"""Make "small dogs": photos of any data set pasted small, anywhere, into cluttered scenes.

They are for photos what translated, cluttered MNIST is for digits (Mnih et al., arXiv 1406.6247): what there is to see
fills a fraction of the image, so that a classifier must find it, or look at everything in detail.

    python data/small_dogs.py --source data/Original --scale 0.25 --data_dir data/small_dogs

The central square of each photo is pasted onto another photo, strongly blurred, among pieces of further photos of the
same part: training scenes are made of training photos only, test scenes of test photos. Names of files and the split
are those of the source; boxes are those of its dogs, moved, or of the whole photo where it is not annotated. Copies of
a photo get the same scene, so that they stay on one side of a split.
"""

import argparse
import functools
import random
import shlex
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import utils
from dataset import BOX_EDGES, ImageList, crop_to_canvas, first_twins, read_image, read_list, subfolders

MARK = "small_dogs.txt"  # holds the flags that a folder was made with
BLUR = 1 / 24  # radius for the background, as a fraction of the scene's side
PIECE = 1 / 2  # side of a piece of clutter, as a fraction of the pasted photo's


class Scene(NamedTuple):
    """What a scene is made of, and where it goes."""

    name: str  # that its places are drawn from
    photo: Path
    annotation: Path | None
    others: list[Path]  # the background, then the clutter
    image: Path
    box: Path


def read_square(file: Path, side: int, annotation: Path | None = None) -> tuple[Image.Image, Tensor]:
    """The central square of a photo at the given side in pixels, and its boxes [n, 4] in fractions of it."""
    canvas, boxes = crop_to_canvas(*read_image(file, side, annotation), side)
    return to_pil_image(canvas), boxes[boxes.isfinite().all(-1)]


def tags(values: Iterable[tuple[str, int]]) -> str:
    """XML elements with these names and values."""
    return "".join(f"<{name}>{value}</{name}>" for name, value in values)


def write_scene(scene: Scene, *, scale: float, size: int, seed: int) -> str:
    """Draw a scene and annotate it. Returns what is wrong with its photos, empty if nothing is."""
    rng, side = random.Random(f"scene {seed} {scene.name}"), round(scale * size)
    try:
        photo, boxes = read_square(scene.photo, side, scene.annotation)
        image = read_square(scene.others[0], size)[0].filter(ImageFilter.GaussianBlur(BLUR * size))
        piece = round(PIECE * side)
        for file in scene.others[1:]:
            left, top = (rng.randint(0, side - piece) for _ in "xy")
            clutter = read_square(file, side)[0].crop((left, top, left + piece, top + piece))
            image.paste(clutter, tuple(rng.randint(0, size - piece) for _ in "xy"))
    except utils.UserError as error:
        return str(error)
    left, top = (rng.randint(0, size - side) for _ in "xy")
    image.paste(photo, (left, top))
    boxes = boxes if len(boxes) else torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    edges = (boxes * side + torch.tensor([left, top] * 2)).round().int().tolist()
    for path in (scene.image, scene.box):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.save(scene.image, "JPEG", quality=95)  # whatever its name ends with: readers look at the content
    dogs = [f"<object><name>dog</name><bndbox>{tags(zip(BOX_EDGES, box))}</bndbox></object>" for box in edges]
    shape = f"<size>{tags([('width', size), ('height', size), ('depth', 3)])}</size>"
    scene.box.write_text(f"<annotation>{shape}{''.join(dogs)}</annotation>\n", encoding="utf-8")
    return ""


def plan_scenes(images: ImageList, data_dir: Path, in_images: bool, clutter: int, seed: int) -> list[Scene]:
    """A scene for each photo of a part, with others of the part to draw around it."""
    scenes, folder = [], "Images" if in_images else images.folder.name
    indices = {file: i for i, file in enumerate(images.files)}
    for file, twin, annotation in zip(images.files, first_twins(images.files), images.annotations):
        place, name = file.relative_to(images.folder), twin.relative_to(images.folder).as_posix()
        rng = random.Random(f"others {seed} {name}")
        steps = (rng.randrange(1, len(images.files)) for _ in range(clutter + 1))  # any but the photo itself
        others = [images.files[(indices[twin] + step) % len(images.files)] for step in steps]
        boxes = data_dir / "Annotation" / ("" if in_images else folder) / place.with_suffix("")
        scenes.append(Scene(f"{folder}/{name}", twin, annotation, others, data_dir / folder / place, boxes))
    return scenes


def write_scenes(args: argparse.Namespace) -> int:
    """Write all scenes and, last, the lists of the source if it has any. Returns their number. Raises UserError."""
    mark, flags = args.data_dir / MARK, " ".join(f"{name}={value}" for name, value in vars(args).items())
    utils.prepare_folder(args.data_dir)
    if any(args.data_dir.iterdir()) and not (mark.is_file() and mark.read_text() == flags):
        raise utils.UserError(f"{args.data_dir} is not empty, and was not made by this command: see --data_dir")
    mark.write_text(flags)
    scenes: list[Scene] = []
    lists = {name.lower(): path for name, path in subfolders(args.source).items()}.get("lists")
    for part in ("train", "valid", "test"):
        images = read_list(args.source, part)
        if len(images.files) == 1:
            raise utils.UserError(f"{images.files[0]} is alone: a scene needs other photos around it")
        in_images = images.folder == args.source or images.folder.name.lower() == "images"
        scenes += plan_scenes(images, args.data_dir, in_images, args.clutter, args.seed)
    write = functools.partial(write_scene, scale=args.scale, size=args.size, seed=args.seed)
    with ProcessPoolExecutor(utils.N_CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(write, scenes, chunksize=8)
        bad = list(filter(None, tqdm(done, total=len(scenes), unit=" scenes", disable=None)))
    if bad:
        named = "; ".join(dict.fromkeys(bad[:10]))
        raise utils.UserError(f"{len(bad)} scenes cannot be drawn: {named}: replace or remove these photos")
    if lists:
        (args.data_dir / "lists").mkdir(exist_ok=True)
        for path in lists.glob("*.mat"):
            shutil.copy(path, args.data_dir / "lists")
    return len(scenes)


def main(argv: list[str] | None = None) -> None:
    """Draw the set, and print what was drawn and the command that trains on it."""
    parser = utils.Parser(__doc__)
    side = utils.number(int, lambda n: 32 <= n <= 2**14, "a side in pixels, at least 32")
    parser.add_argument("--source", type=Path, default=utils.DATA_DIR, help="folder of photos, in any layout")
    parser.add_argument("--data_dir", type=Path, default=Path("data/small_dogs"), help="folder for the scenes")
    parser.add_argument("--scale", type=utils.fraction_or_one, default=0.25, help="side of a photo / side of its scene")
    parser.add_argument("--size", type=side, default=384, help="side of a scene in pixels")
    parser.add_argument("--clutter", type=utils.count, default=6, help="pieces of other photos in a scene")
    parser.add_argument("--seed", type=utils.count, default=0, help="random seed of the scenes")
    args = parser.parse_args(argv)
    n_scenes = write_scenes(args)
    words = ["--data_dir", str(args.data_dir), "--save_dir", str(args.data_dir / "saved_models"), "--backbone", "FILE"]
    print(f"Drew {n_scenes:,} scenes of {args.size} x {args.size} pixels into {args.data_dir}")
    print(f"next: python main.py {shlex.join(words)} --k 1 --start_size 1 --cells 6")


if __name__ == "__main__":
    utils.run(main)
