"""Lists, the split, images of every kind, and what the loaders deliver."""

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, annotate, draw_image, flags_of, write_list
from PIL import ExifTags, Image, ImageDraw

import dataset
import main
from dataset import ImageList, TrainSampler, make_loader, read_list, split_list
from glimpse import build_pyramid, extract_patches
from utils import UserError

NO_BOXES = torch.empty(0, 4)
WHOLE = 2**14  # a canvas so large that no JPEG is decoded at less than its size


def load(path: Path, size: int = 32, decoded_for: int = WHOLE) -> np.ndarray:
    return dataset.crop_to_canvas(*dataset.read_image(path, decoded_for), size)[0].permute(1, 2, 0).numpy()


def crop(image: Image.Image, size: int, *draw: float) -> torch.Tensor:
    """The canvas of an image without boxes."""
    return dataset.crop_to_canvas(image, NO_BOXES, size, *draw)[0]


def test_list_in_the_official_format(make_data) -> None:
    images = read_list(make_data(n_train=4, n_classes=3), "train")
    assert len(images.files) == 12 and images.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert images.class_names == ["toy breed 1", "toy breed 2", "toy breed 3"]


def test_split_is_disjoint_and_the_same_in_every_run() -> None:
    """About the fraction of each class, whatever the order of the list; the order within the parts is that of it."""
    labels = [label for label in range(120) for _ in range(100)]
    files = [Path(f"{label}/{i}.jpg") for i, label in enumerate(labels)]
    official = ImageList(files, labels, [str(label) for label in range(120)])
    train, valid = split_list(official, 0.1, "validation", n_parts=2)
    assert sorted(train.files + valid.files) == sorted(files) and not set(train.files) & set(valid.files)
    assert 1080 < len(valid.files) < 1320  # 0.1 of 12,000, within four standard deviations
    sizes = Counter(valid.labels)
    assert len(sizes) == 120 and min(sizes.values()) >= 1 and max(sizes.values()) < 25
    place = {file: i for i, file in enumerate(files)}
    for part in (train, valid):
        assert part.class_names == official.class_names and part.files == sorted(part.files, key=place.get)
        assert all(file.parts[0] == str(label) for file, label in zip(part.files, part.labels))
    assert split_list(official, 0.1, "validation", n_parts=2) == (train, valid)
    order = random.Random(0).sample(range(12_000), 12_000)
    shuffled, _ = split_list(official.subset(order), 0.1, "validation", n_parts=2)
    assert set(shuffled.files) == set(train.files)


def test_both_parts_of_a_split_have_an_image_of_each_class() -> None:
    four = ImageList([Path(f"ab/{i}.jpg") for i in range(4)], [0, 0, 1, 1], ["a", "b"])
    for fraction in (0.01, 0.99):
        train, valid = split_list(four, fraction, "validation", n_parts=2)
        assert sorted(train.labels) == sorted(valid.labels) == [0, 1]
    with pytest.raises(UserError, match="^the class b needs 2 distinct images for validation, but has 1$"):
        split_list(four.subset([0, 1, 2]), 0.5, "validation", n_parts=2)
    with pytest.raises(UserError, match="^the class a needs 3 distinct images for test, but has 2$"):
        split_list(four, 0.5, "test", n_parts=3)


def test_missing_default_folder_names_both_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other folder was meant to hold images of one's own."""
    monkeypatch.chdir(tmp_path)
    default = r"^the folder data/Original cannot be read \(No such .*python data/stanford_dogs.py.*data/toy_dogs.py"
    with pytest.raises(UserError, match=default):
        read_list("data/Original", "train")
    with pytest.raises(UserError, match=r"^the folder data/nowhere cannot be read \(No such file or directory\)$"):
        read_list("data/nowhere", "train")


def test_missing_and_broken_lists(make_data) -> None:
    data_dir = make_data()
    path = data_dir / "lists" / "train_list.mat"
    names = [f"{folder.name}/train_0.jpg" for folder in sorted((data_dir / "Images").iterdir())]
    for broken in (
        ([], []),
        (names, [1, 2]),
        (names, [1, 2, 4]),
        (names, [0, 1, 2]),
        (names, [1, 1, 2]),
        ([names[0], names[0]], [1, 2]),
        (["../../x.jpg", *names[1:]], [1, 2, 3]),
        (["../x.jpg", *names[1:]], [1, 2, 3]),
    ):
        write_list(path, *broken)
        with pytest.raises(UserError, match="train_list.mat is broken: each <breed folder>/<file> needs the label"):
            read_list(data_dir, "train")
    for content in (b"", b"no list", b"MATLAB 5.0 MAT-file" + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="train_list.mat cannot be read"):
            read_list(data_dir, "train")
    path.unlink()
    with pytest.raises(UserError, match="train_list.mat cannot be read"):
        read_list(data_dir, "train")


def test_missing_images_are_counted_and_named(make_data) -> None:
    data_dir = make_data(n_train=6)
    for i in range(5):
        next((data_dir / "Images").glob(f"*1/train_{i}.jpg")).unlink()
    with pytest.raises(UserError, match=r"^5 of the 18 images in .* are missing, first .*train_0.jpg$"):
        read_list(data_dir, "train")


def test_unusual_modes_are_converted_to_rgb(tmp_path: Path) -> None:
    image = draw_image(np.random.default_rng(0), 40, 40)
    expected, gray = np.array(image), np.array(image.convert("L"))

    def check(name: str, image: Image.Image, wanted: np.ndarray, tolerance: float, **options: object) -> None:
        image.save(tmp_path / name, **options)
        error = np.abs(load(tmp_path / name, 40).astype(float) - wanted).mean()
        assert error <= tolerance, f"{name} is {error:.1f} of 255 off"

    gray_rgb = np.repeat(gray[..., None], 3, axis=2)
    check("rgb.png", image, expected, 0)
    check("rgb.jpg", image, expected, 3, quality=95)
    check("gray.png", image.convert("L"), gray_rgb, 0)
    check(
        "black_and_white.png", image.convert("1"), np.repeat(np.array(image.convert("1"))[..., None] * 255.0, 3, 2), 0
    )
    check("gray16.png", Image.fromarray(gray.astype(np.uint16) * 257), gray_rgb, 1)
    check("gray16.tif", Image.fromarray(gray.astype(np.uint16) * 257), gray_rgb, 1)
    check("cmyk.jpg", image.convert("CMYK"), expected, 4, quality=95)
    check("palette.png", image.quantize(256), np.array(image.quantize(256).convert("RGB")), 0)
    alpha = Image.fromarray(np.tile(np.repeat([0, 255], 20).astype(np.uint8), (40, 1)))
    on_white = np.where(np.array(alpha)[..., None] == 255, expected, 255)
    translucent = image.copy()
    translucent.putalpha(alpha)
    check("alpha.png", translucent, on_white, 0)
    check("gray_alpha.png", translucent.convert("LA"), np.where(np.array(alpha)[..., None] == 255, gray_rgb, 255), 0)
    palette = image.quantize(200)
    wanted = np.where(np.array(palette)[..., None] == 7, 255, np.array(palette.convert("RGB")))
    check("palette_alpha.png", palette, wanted, 0, transparency=7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = draw_image(np.random.default_rng(1), 40, 40)
    back = {2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}  # Pillow's transpositions, undone by EXIF's
    stored = upright
    for step in back.get(orientation, ()):
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert (load(tmp_path / "photo.png", 40) == np.array(upright)).all()


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good.jpg"
    draw_image(np.random.default_rng(0), 64, 64).save(good)
    for name, content in (("empty.jpg", b""), ("text.jpg", b"hello"), ("cut.jpg", good.read_bytes()[:400])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            dataset.read_image(tmp_path / name, 32)
    with pytest.raises(UserError, match="gone.jpg cannot be read .*No such file"):
        dataset.read_image(tmp_path / "gone.jpg", 32)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_at_less_than_their_size(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw_image(np.random.default_rng(0), 500, 375).save(path, quality=95, exif=exif)
    turned = (lambda width, height: (height, width)) if orientation == 6 else (lambda *size: size)
    for size, decoded in ((40, (63, 47)), (96, (250, 188)), (187, (250, 188)), (188, (500, 375))):
        assert dataset.read_image(path, size)[0].size == turned(*decoded)
    for size in (40, 96):
        assert abs(load(path, size, decoded_for=size).astype(int) - load(path, size)).mean() < 3


@pytest.mark.parametrize("size", [(500, 375), (90, 240), (50, 50), (64, 63)])
def test_canvas_is_what_pillow_makes_of_the_square(size: tuple[int, int]) -> None:
    """Nothing from outside the square, and the same antialiased filter, shrinking and growing."""
    image = draw_image(np.random.default_rng(0), *size)
    image = Image.blend(image, Image.effect_noise(size, 90).convert("RGB"), 0.5)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    square = image.crop((left, top, left + side, top + side))
    for target in (32, 96, 192, 384):
        theirs = np.asarray(square.resize((target, target), Image.Resampling.BILINEAR)).astype(int)
        ours = crop(image, target).permute(1, 2, 0).numpy()
        assert abs(ours - theirs).max() <= 1


def test_random_crops_lie_inside_the_image_and_half_are_flipped(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (50, 1, 3)))  # a pixel names its x
    central = crop(ramp, 50)
    assert central.shape == (3, 50, 50) and central.dtype == torch.uint8
    assert central[0, 0, [0, -1]].tolist() == [75, 124]
    starts, mirrored = [], []
    for seed in range(200):
        row = crop(ramp, 50, seed)[0, 0].int()
        assert (row.diff() == 1).all() or (row.diff() == -1).all()
        starts.append(row.min().item())
        mirrored.append(bool(row[0] > row[-1]))
    assert min(starts) < 10 and max(starts) > 140 and len(set(starts)) > 80 and 70 < sum(mirrored) < 130
    tall = crop(ramp.rotate(90, expand=True), 50)
    assert tall.shape == (3, 50, 50) and len(set(tall[0, :, 0].tolist())) == 50
    assert crop(Image.new("RGB", (1, 5000)), 32).shape == (3, 32, 32)


def test_smaller_random_crops_are_squares_of_any_size_down_to_the_smallest() -> None:
    across, down = np.meshgrid(np.arange(200, dtype=np.uint8), np.arange(100, dtype=np.uint8))
    ramp = Image.fromarray(np.stack([across, down, down], axis=-1))  # a pixel names its place
    sides, seen = [], np.zeros((100, 200), dtype=bool)
    for seed in range(300):
        left, top, side, flipped = dataset.choose_crop(200, 100, seed, 0.5)
        canvas = crop(ramp, side, seed, 0.5)
        x, y = canvas[0].flip(-1) if flipped else canvas[0], canvas[1]
        assert (x == torch.arange(left, left + side)).all()
        assert (y[:, 0] == torch.arange(top, top + side)).all()
        sides.append(side)
        seen[top : top + side, left : left + side] = True
    assert (
        50 <= min(sides) <= 52
        and 98 <= max(sides) <= 100
        and 73 < np.mean(sides) < 77
        and seen[3:-3, 3:-3].mean() > 0.99
    )
    assert {dataset.choose_crop(200, 100, seed)[2] for seed in range(20)} == {100}
    assert dataset.choose_crop(200, 100) == (50, 0, 100, False)


def extent(dog: torch.Tensor) -> torch.Tensor:
    """Left, top, right and bottom of the pixels [S, S] that are true, in fractions of the side."""
    rows, columns = dog.any(1).nonzero().flatten(), dog.any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(dog)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_pixels_of_random_crops_agree(orientation: int, tmp_path: Path) -> None:
    """Red, green and blue dogs in a JPEG that is decoded at a quarter of its size, scaled, and flipped or not."""
    boxes = [(40, 240, 330, 470), (380, 60, 500, 400), (560, 150, 770, 260)]
    stored, file = Image.new("RGB", (800, 600)), tmp_path / "Images" / "breed" / "dog.jpg"
    for color, (left, top, right, bottom) in zip(("#f00", "#0f0", "#00f"), boxes):
        ImageDraw.Draw(stored).rectangle((left, top, right - 1, bottom - 1), color)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file.parent.mkdir(parents=True)
    stored.save(file, quality=95, subsampling=0, exif=exif)
    annotate(tmp_path, {file: boxes}, *stored.size)
    annotation = tmp_path / "Annotation" / "breed" / "dog"
    assert max(dataset.read_image(file, 120)[0].size) == 200
    items = dataset.ImageDataset(ImageList([file], [0], ["breed"], annotations=[annotation]), 72, 0.6)
    n_visible, flips = [], set()
    for seed in range(12):
        canvas, found, *_ = items[0, seed]
        seen = torch.stack([extent(dog) for dog in canvas > 127 if dog.any()])
        assert found.shape == (dataset.N_BOXES, 4) and found[len(seen) :].isnan().all(), seed
        agree = (found[: len(seen)].unsqueeze(1) - seen).abs().amax(-1) < 0.02  # each box with the pixels of each dog
        assert (agree.sum(0) == 1).all() and (agree.sum(1) == 1).all(), seed
        assert ((found[: len(seen), 2:] - found[: len(seen), :2]).prod(1).diff() <= 0).all(), seed
        n_visible.append(len(seen))
        flips.add(dataset.choose_crop(800, 600, seed)[3])
    assert flips == {False, True} and set(n_visible) >= {2, 3}


def test_a_batch_holds_the_largest_boxes_first() -> None:
    """Those in the crop, clipped; NaN fills the other places."""
    image, sides = Image.new("RGB", (200, 100)), torch.randperm(20) + 1
    corners = torch.tensor([[50, 0]]).expand(20, 2)  # of the central square
    boxes = torch.cat([corners, corners + sides.unsqueeze(1)], dim=1) / torch.tensor([200, 100] * 2)
    _, found = dataset.crop_to_canvas(image, boxes, 32)
    wanted = [[0, 0, side / 100, side / 100] for side in range(20, 20 - dataset.N_BOXES, -1)]
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
    outside, cut, whole = [0.0, 0.0, 0.25, 1.0], [0.1, 0.0, 0.3, 0.5], [0.3, 0.5, 0.5, 1.0]
    turned = [0.7, 0.9, 0.3, 0.1]  # its corners in the wrong order
    _, found = dataset.crop_to_canvas(image, torch.tensor([outside, cut, whole, turned]), 32)
    assert torch.allclose(found[:2], torch.tensor([[0.1, 0.5, 0.5, 1.0], [0.0, 0.0, 0.1, 0.5]]), atol=1e-6)
    _, none = dataset.crop_to_canvas(image, NO_BOXES, 32)
    assert found[2:].isnan().all() and none.isnan().all() and none.shape == found.shape == (dataset.N_BOXES, 4)


def test_jpegs_keep_the_pixels_of_small_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be enlarged if the image were decoded for a crop of its whole short side."""
    draw_image(np.random.default_rng(0), 800, 800).save(tmp_path / "large.jpg")
    sizes, real = [], dataset.crop_to_canvas
    monkeypatch.setattr(dataset, "crop_to_canvas", lambda image, *rest: sizes.append(image.size) or real(image, *rest))
    for smallest in (1, 0.5, 0.2):
        items = dataset.ImageDataset(ImageList([tmp_path / "large.jpg"], [0], ["a"], annotations=[None]), 96, smallest)
        assert items[0, 0][0].shape == (3, 96, 96)
    assert sizes == [(100, 100), (200, 200), (800, 800)]


def test_full_size_glimpse_is_the_context_after_any_augmentation(make_data) -> None:
    """The 2018 code paired a flipped context with glimpses of the unflipped image, from another crop."""
    images = read_list(make_data(), "train")
    canvas, *_ = next(iter(make_loader(images, flags_of(main, "--batch_size", "18"), CPU, 128, trains=True)))
    pyramid = build_pyramid(canvas, (1, 2, 4), 32)
    glimpses = extract_patches(pyramid, torch.zeros(18, 1, 2), (1, 2, 4), 32)[:, 0]
    context = pyramid[4][:, :, 16:-16, 16:-16]
    assert torch.equal(glimpses[:, 2], context)
    finer = torch.nn.functional.interpolate(glimpses[:, 1], size=(16, 16), mode="bilinear", antialias=True)
    # The finer patch shows the middle of the same image.
    assert (finer - context[:, :, 8:24, 8:24]).abs().mean() < 2 / 255


def test_each_image_is_opened_once(make_data, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 2018 code opened a file once for the context and once more for each glimpse."""
    images = read_list(make_data(), "train")
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    for _ in make_loader(images, flags_of(main), CPU, 32, trains=True):
        pass
    assert sorted(opened) == sorted(images.files)


def test_persistent_workers_learn_of_the_next_epoch(make_data) -> None:
    """Persistent workers keep their copy of the dataset, so the epoch must travel with the keys."""
    images = read_list(make_data(), "train")
    flags = [flags_of(main, "--smallest_crop", "0.6", "--num_workers", workers) for workers in ("0", "1")]
    loaders = [make_loader(images, args, CPU, 32, trains=True) for args in flags]
    epochs = []
    for number in range(2):
        for loader in loaders:
            loader.sampler.epoch = number
        here, there = (torch.cat([canvas for canvas, *_ in loader]) for loader in loaders)
        assert torch.equal(here, there)
        epochs.append(here)
    assert not torch.equal(*epochs)


def test_validation_images_are_central_crops_in_order(make_data) -> None:
    """The 2018 code cropped even the validation images at random."""
    _, valid = dataset.read_training_lists(make_data(), 0.3)

    def read_shard(rank: int, world_size: int) -> torch.Tensor:
        args = flags_of(main, "--batch_size", str(4 * world_size))
        machine = CPU._replace(rank=rank, world_size=world_size)
        return torch.cat([canvas for canvas, *_ in make_loader(valid, args, machine, 32)])

    canvas = read_shard(0, 1)
    assert len(canvas) == len(valid.files) == 6
    expected = [crop(dataset.read_image(file, 32)[0], 32) for file in valid.files]
    assert torch.equal(canvas, torch.stack(expected))
    shards = [read_shard(rank, 3) for rank in range(3)]
    assert [len(shard) for shard in shards] == [2, 2, 2] and torch.equal(shards[1], canvas[1::3])
    assert [len(read_shard(rank, 4)) for rank in range(4)] == [2, 2, 1, 1]
    with pytest.raises(UserError, match="or 6 images do not split over 9 processes"):
        read_shard(8, 9)


def test_data_are_described_by_classes_files_and_fingerprints(make_data, tmp_path: Path) -> None:
    """A fingerprint is of the whole content of a file, whatever its name and wherever it lies."""
    data_dir, elsewhere = make_data(), tmp_path / "elsewhere"
    shutil.copytree(data_dir, elsewhere)

    def describe(folder: Path) -> tuple[ImageList, dict[str, object]]:
        train, valid, data = dataset.read_training_data(flags_of(main, "--data_dir", str(folder)), CPU)
        for part, images in (("training", train), ("validation", valid)):
            assert data[part]["labels"] == images.labels and data[part]["fingerprints"] == images.fingerprints
            assert [folder / file for file in data[part]["files"]] == images.files
        return train, data

    train, data = describe(data_dir)
    assert list(data) == ["class_names", "training", "validation"]
    assert data["class_names"] == ["toy breed 1", "toy breed 2", "toy breed 3"]
    prints = [number for part in ("training", "validation") for number in data[part]["fingerprints"]]
    assert len(set(prints)) == 18 and all(type(number) is int and -(2**63) <= number < 2**63 for number in prints)
    same_list, same_data = describe(elsewhere)
    assert same_data == data
    assert [file.name for file in same_list.files] == [file.name for file in train.files]

    victim = same_list.files[0]
    whole = victim.read_bytes()
    large = whole + bytes(2**17)
    seen = {data["training"]["fingerprints"][0]}
    for content in (next(elsewhere.glob("Images/*/test_0.jpg")).read_bytes(), large, large + b"0", large + b"1"):
        victim.write_bytes(content)
        first, *others = describe(elsewhere)[1]["training"]["fingerprints"]
        assert others == data["training"]["fingerprints"][1:] and first not in seen
        seen.add(first)
    victim.write_bytes(whole)
    assert describe(elsewhere)[1] == data
    renamed = victim.rename(victim.with_name("another name.jpg"))
    assert dataset.fingerprint_of(renamed) == data["training"]["fingerprints"][0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_depends_on_seed_and_epoch_alone(make_data, num_workers: int) -> None:
    images = read_list(make_data(), "train")

    def epoch(seed: int, number: int, workers: int) -> tuple[torch.Tensor, list[int]]:
        loader = make_loader(images, flags_of(main, f"--seed={seed}", f"--num_workers={workers}"), CPU, 32, trains=True)
        loader.sampler.epoch = number
        torch.rand(number + 1)  # other code may draw from the global state
        batches = list(loader)
        return torch.cat([canvas for canvas, *_ in batches]), torch.cat([labels for *_, labels, _ in batches]).tolist()

    canvas, labels = epoch(0, 1, num_workers)
    assert torch.equal(canvas, epoch(0, 1, 0)[0]) and sorted(labels) == sorted(images.labels)
    assert not torch.equal(canvas, epoch(0, 2, 0)[0]) and not torch.equal(canvas, epoch(1, 1, 0)[0])


def test_shards_of_processes_form_the_same_batches() -> None:
    whole = list(TrainSampler(11, 3))
    shards = [list(TrainSampler(11, 3, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(shard) for shard in shards] == [5, 5]
    assert set(shards[0][:2] + shards[1][:2]) == set(whole[:4])  # two batches of 2 are the batch of 4
    assert len(set(shards[0] + shards[1])) == 10


def test_short_lists_still_make_a_batch(make_data) -> None:
    images = read_list(make_data(n_train=2, n_classes=2), "train")
    batches = list(make_loader(images, flags_of(main, "--batch_size", "9"), CPU, 32, drop_last=True))
    assert [len(labels) for *_, labels, _ in batches] == [4]
    batches = list(make_loader(images, flags_of(main, "--batch_size", "3"), CPU, 32))
    assert [len(labels) for *_, labels, _ in batches] == [3, 1]
