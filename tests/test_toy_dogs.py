"""The toy dogs: their files, and that breeds can be told apart in glimpses but not in the context."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from scipy.io import loadmat

import dataset
from data import toy_dogs

SCRIPT = Path(toy_dogs.__file__)
BREEDS = toy_dogs.BREEDS
N_TRAIN, N_TEST = 80, 40


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy") / "set"
    toy_dogs.main([f"--data_dir={root}", f"--n_train={N_TRAIN}", f"--n_test={N_TEST}"])
    return root


def read_list(root: Path, split: str) -> tuple[list[str], list[int]]:
    table = loadmat(root / "lists" / f"{split}_list.mat")
    return [cell.item() for cell in table["file_list"][:, 0]], table["labels"][:, 0].tolist()


def read_boxes(root: Path) -> dict[str, tuple[float, ...]]:
    """Left, top, right, bottom as fractions of the side, by the name of the image."""
    boxes = {}
    for path in (root / "Annotation").rglob("n*_*"):
        if path.is_file():
            [box] = dataset.read_boxes(path, (1, 1), 1).tolist()  # which says its size itself
            boxes[f"{path.relative_to(root / 'Annotation').as_posix()}.jpg"] = tuple(box)
    return boxes


def read_image(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / "Images" / name))


def draw(breed: str, number: int, size: int = 128) -> np.ndarray:
    """Image `number`, as floats; its scene is the same for all breeds."""
    return toy_dogs.draw_image(breed, size, 0.2, np.random.default_rng(number))[0].astype(float)


def scene(number: int, size: int = 128, spread: float = 0.2) -> toy_dogs.Scene:
    return toy_dogs.draw_scene(size, spread, np.random.default_rng(number))


# Files


@pytest.mark.parametrize(("split", "count"), [("train", N_TRAIN), ("test", N_TEST)])
def test_lists_have_the_format_of_stanford_dogs(toy, split, count):
    path = toy / "lists" / f"{split}_list.mat"
    assert path.read_bytes().startswith(b"MATLAB 5.0 MAT-file")
    table = loadmat(path)
    columns = {key: value for key, value in table.items() if not key.startswith("__")}
    assert set(columns) == {"file_list", "annotation_list", "labels"}
    assert all(column.shape == (count, 1) for column in columns.values())
    assert columns["labels"].dtype == np.uint8
    for key in ("file_list", "annotation_list"):
        assert columns[key].dtype == object
        assert all(cell.shape == (1,) and cell.dtype.kind == "U" for cell in columns[key][:, 0])
    for name, annotation in zip(columns["file_list"][:, 0], columns["annotation_list"][:, 0]):
        assert name.item() == annotation.item() + ".jpg"


def test_folder_names_and_balance(toy):
    train, test = read_list(toy, "train"), read_list(toy, "test")
    for (names, labels), count in ((train, N_TRAIN), (test, N_TEST)):
        assert labels == sorted(labels)
        assert [labels.count(label) for label in range(1, 9)] == [count // 8] * 8
        for name, label in zip(names, labels):
            folder, file = name.split("/")
            assert folder == f"n{label:08d}-{BREEDS[label - 1]}"
            assert file.startswith(f"n{label:08d}_")
    assert train[0][0].startswith("n00000001-horizontal_stripes/n00000001_")
    on_disk = {str(path.relative_to(toy / "Images")) for path in (toy / "Images").rglob("*.jpg")}
    assert len(on_disk) == N_TRAIN + N_TEST
    assert on_disk == {*train[0], *test[0]} == set(read_boxes(toy))
    assert len({(toy / "Images" / name).read_bytes() for name in on_disk}) == len(on_disk)


def test_jpeg_compression_preserves_the_pattern(toy):
    image = Image.open(toy / "Images" / read_list(toy, "train")[0][0])
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))
    assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
    assert max(max(table) for table in image.quantization.values()) <= 12  # quality 95 or better


def test_same_seed_same_bytes(tmp_path):
    def contents(root: Path) -> dict[str, bytes]:
        files = [*root.rglob("*.jpg"), *root.rglob("*.csv")]  # the lists contain the date
        return {str(path.relative_to(root)): path.read_bytes() for path in files}

    flags = ["--n_train=8", "--n_test=8", "--size=64"]
    command = [sys.executable, SCRIPT, *flags]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    drawn, *commands = process.stdout.splitlines()
    assert str(Path("data/toy")) in drawn and commands == [
        "next: python pretrain.py --data_dir data/toy --save_dir data/toy/saved_models --weights none --arch resnet18 "
        "--patch_size 32 --batch_size 32 --lr 5e-4 --epochs 10",
        "then: python main.py --data_dir data/toy --save_dir data/toy/saved_models --k 1 --start_size 1 "
        "--rnn_hidden 256 --batch_size 32 --lr 1e-3 --epochs 12",
    ]
    first = contents(tmp_path / "data" / "toy")
    np.random.seed(1)  # the global generator has no effect
    toy_dogs.main([*flags, f"--data_dir={tmp_path / 'again'}"])
    assert contents(tmp_path / "again") == first
    toy_dogs.main([*flags, f"--data_dir={tmp_path / 'other'}", "--seed=1"])
    other = contents(tmp_path / "other")
    assert other.keys() == first.keys()
    assert not {*other.values()} & {*first.values()}


@pytest.mark.parametrize(("size", "patch_size"), [(64, 32), (128, 32), (132, 64), (192, 64), (256, 64), (260, 96)])
def test_printed_commands_fit_the_size_and_quote_the_folder(tmp_path, capsys, size, patch_size):
    root = tmp_path / "my dogs"
    toy_dogs.main([f"--data_dir={root}", "--n_train=8", "--n_test=8", f"--size={size}"])
    commands = [shlex.split(line.partition(": ")[2]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [command[:2] for command in commands] == [["python", "pretrain.py"], ["python", "main.py"]]
    folders = ["--data_dir", str(root), "--save_dir", str(root / "saved_models")]
    assert all(command[2:6] == folders for command in commands)
    assert commands[0][commands[0].index("--patch_size") + 1] == str(patch_size)


def test_test_images_do_not_depend_on_the_number_of_training_images(tmp_path):
    images = []
    for n_train in (8, 16):
        root = tmp_path / str(n_train)
        toy_dogs.main([f"--data_dir={root}", f"--n_train={n_train}", "--n_test=8", "--size=64"])
        images.append([(root / "Images" / name).read_bytes() for name in read_list(root, "test")[0]])
    assert images[0] == images[1]


def test_an_interrupted_run_leaves_no_lists_and_a_rerun_no_old_images(tmp_path, monkeypatch):
    flags = [f"--data_dir={tmp_path}", "--n_test=8", "--size=64"]
    toy_dogs.main([*flags, "--n_train=24"])
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return draw_image(*arguments)

    draw_image = toy_dogs.draw_image
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_dogs, "draw_image", interrupted)
        toy_dogs.main([*flags, "--n_train=8"])
    assert not list((tmp_path / "lists").glob("*.mat"))
    toy_dogs.main([*flags, "--n_train=8"])
    assert len(list(tmp_path.rglob("*.jpg"))) == len(read_boxes(tmp_path)) == 16
    lists = sorted(path.name for path in (tmp_path / "lists").iterdir())
    assert lists == ["test_list.mat", "train_list.mat"]


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        "--n_train=0",
        "--n_train=12",
        "--n_test=-8",
        "--n_test=many",
        "--size=32",
        "--size=130",
        "--spread=-0.1",
        "--spread=nan",
        "--spread=2",
        "--seed=-1",
        "--n_tra=8",
        "--color=red",
    ],
)
def test_an_invalid_flag_is_rejected_in_one_line(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        toy_dogs.main([f"--data_dir={tmp_path / 'set'}", flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in message and flags.partition("=")[0] in message
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("found", ["Images/n02085620-Chihuahua/", "lists/train_list.mat", "Images"])
def test_other_files_are_not_overwritten(tmp_path, capsys, found):
    path = tmp_path / found
    path.parent.mkdir(parents=True, exist_ok=True)
    if found.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"not ours")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        toy_dogs.main([f"--data_dir={tmp_path}", "--n_train=8", "--n_test=8"])
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


# Positions


def test_boxes_enclose_the_whole_dog_on_an_empty_background():
    for number in range(12):
        plain, _, light, (left, top, right, bottom) = scene(number)
        background = toy_dogs.draw_background(128, np.random.default_rng(number))
        dog = np.abs(plain - background).max(axis=2) > 0
        rows, columns = np.flatnonzero(dog.any(axis=1)), np.flatnonzero(dog.any(axis=0))
        assert (left, top, right, bottom) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert 0.2 < (right - left) / 128 < 0.5 and 0.2 < (bottom - top) / 128 < 0.5
        assert not light[~dog].any()


def test_boxes_in_the_table_match_the_written_images(toy):
    for name, (left, top, right, bottom) in read_boxes(toy).items():
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        image = read_image(toy, name).astype(float)
        inside = tuple(slice(round(a * 128), round(b * 128)) for a, b in ((top, bottom), (left, right)))
        dog = image[inside].copy()
        image[inside] = np.nan
        for axis in range(2):
            assert np.abs(np.diff(dog, axis=axis)).max() > 60
            assert np.nanmax(np.abs(np.diff(image, axis=axis))) < 40  # a smooth background with some JPEG ringing
        assert dog.min() < np.nanmin(image.max(axis=2))


def test_positions_have_the_given_standard_deviation():
    def centers(spread: float, count: int) -> np.ndarray:
        boxes = np.array([scene(number, size=64, spread=spread).box for number in range(count)]) / 64
        assert boxes.min() >= 0 and boxes.max() <= 1
        return (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5

    near = centers(0.1, 150)
    assert np.abs(near.mean(axis=0)).max() < 0.03
    assert near.std(axis=0) == pytest.approx([0.1, 0.1], rel=0.2)
    assert np.abs(centers(0, 10)).max() <= 1 / 64
    assert centers(1, 60).std() > 0.17  # wherever the dog fits


def test_dogs_face_both_directions():
    n_facing_right = 0
    for number in range(40):
        _, _, light, (left, top, right, bottom) = scene(number)
        upper = light[top : top + (bottom - top) // 3]  # a big head and a thin tail
        middle = (left + right) // 2
        n_facing_right += upper[:, :middle].sum() < upper[:, middle:].sum()
    assert 10 <= n_facing_right <= 30


# Visibility of the breeds


def reduce_by_boxes(image: np.ndarray) -> np.ndarray:
    return image.reshape(32, 4, 32, 4, -1).mean(axis=(1, 3))


def reduce_antialiased(image: np.ndarray) -> np.ndarray:
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(image, 2, 0)]
    return np.stack([channel.resize((32, 32), Image.Resampling.BILINEAR) for channel in channels], axis=2)


@pytest.mark.parametrize("breed", BREEDS)
def test_the_context_does_not_show_the_breed(breed):
    """Difference to the same dog without a pattern, in gray levels of 255: about 28 before downsampling."""
    for number in range(6):
        plain, _, light, _ = scene(number)
        difference = draw(breed, number) - plain * 255
        dog = light > 0.5
        assert difference[dog].std() > 15
        assert np.abs(difference[dog].mean(axis=0)).max() < 1
        assert np.abs(reduce_by_boxes(difference)).max() < 1
        inside = reduce_by_boxes(dog[..., None] * 1.0)[..., 0] == 1
        assert reduce_antialiased(difference)[inside].std() < 4


def test_all_coats_have_the_same_mean_and_contrast():
    for number in range(6):
        dog = scene(number).light > 0.5
        coats = np.array([draw(breed, number)[dog] for breed in BREEDS])  # [8, pixels, 3]
        means, contrasts = coats.mean(axis=1), coats.std(axis=1)
        assert np.ptp(means, axis=0).max() < 1
        assert (np.ptp(contrasts, axis=0) / contrasts.mean(axis=0)).max() < 0.05


def test_scenes_do_not_depend_on_the_breed():
    background = toy_dogs.draw_background(128, np.random.default_rng(0))
    for breed in BREEDS:
        left, top, right, bottom = scene(0).box
        difference = np.abs(draw(breed, 0) - background * 255)
        difference[top:bottom, left:right] = 0
        assert difference.max() <= 0.5 + 1e-9  # rounding


def test_grain_has_no_low_frequencies():
    grain = toy_dogs.draw_pattern("plain_grain", 128, (40, 40, 88, 88), np.random.default_rng(0))
    power = np.abs(np.fft.fft2(grain)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    assert power[frequency < 0.15].mean() < 0.02 * power[frequency > 0.25].mean()


def test_phases_are_random():
    for breed in BREEDS:
        generators = (np.random.default_rng(number) for number in range(40))
        patterns = [toy_dogs.draw_pattern(breed, 32, (8, 8, 24, 24), generator) for generator in generators]
        mean = np.mean(patterns, axis=0)
        assert (mean - mean.mean()).std() < 0.4 * np.std(patterns), breed


def spectrum(crop: np.ndarray) -> np.ndarray:
    """Amplitude spectrum of a 32 x 32 crop at periods of up to 6 pixels, of norm 1."""
    window = np.hanning(34)[1:-1]
    gray = crop.mean(axis=2)
    amplitude = np.abs(np.fft.fft2((gray - gray.mean()) * window * window[:, None]))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
    amplitude = np.where(frequency > 1 / 6, amplitude, 0)
    return (amplitude / np.linalg.norm(amplitude)).ravel()


def dog_crops(root: Path, split: str) -> tuple[list[np.ndarray], np.ndarray]:
    boxes = read_boxes(root)
    names, labels = read_list(root, split)
    crops = []
    for name in names:
        left, top, right, bottom = boxes[name]
        x, y = (int(np.clip(round(64 * (a + b)) - 16, 0, 96)) for a, b in ((left, right), (top, bottom)))
        crops.append(read_image(root, name)[y : y + 32, x : x + 32].astype(float))
    return crops, np.array(labels)


def test_a_glimpse_shows_the_breed_even_when_mirrored(toy):
    """Classification by the most similar template, the mean spectrum of a breed's training crops."""
    crops, labels = dog_crops(toy, "train")
    spectra = np.array([spectrum(crop) for crop in crops])
    templates = np.array([spectra[labels == label].mean(axis=0) for label in range(1, 9)])
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    crops, labels = dog_crops(toy, "test")
    for mirror in (slice(None), slice(None, None, -1)):
        predictions = [np.argmax(templates @ spectrum(crop[:, mirror])) + 1 for crop in crops]
        assert np.mean(predictions == labels) > 0.9
