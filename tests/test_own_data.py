"""People's own data: layouts, splits that do not move, checkpoints that know their images, bad images, predictions."""

import builtins
import io
import locale
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import BACKBONE, SMALL, draw_folder, draw_image, fails, flags_of, read, read_log, save_backbone
from PIL import Image

import dataset
import main
import pretrain
import utils
from dataset import ImageList, read_list, read_training_lists, split_list

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--n_glimpses", "2"]
OWN = {pretrain: BACKBONE, main: CLASSIFIER}  # flags of a new run
HIDDEN = (".ipynb_checkpoints", ".thumbs", "__MACOSX")


def flags(folder: Path) -> list[str]:
    """Flags to train and test on data/ in a folder, with its out/ as the folder of the run."""
    return ["--data_dir", str(folder / "data"), "--save_dir", str(folder / "out"), *SMALL]


def train_both(argv: list[str], *more: str) -> None:
    pretrain.main([*argv, *BACKBONE, *more])
    main.main([*argv, *CLASSIFIER, *more])


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/<class> and test/<class> in data/, with the same names, and the files of both scripts in out/."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("cat", "dog"):
        draw_folder(folder / "data" / "train" / name, 6)
        draw_folder(folder / "data" / "test" / name, 3)
    train_both(flags(folder), "--epochs", "1")
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy to work on."""
    return Path(shutil.copytree(trained_once, tmp_path / "own"))


# --- layouts


@pytest.mark.parametrize(
    "folders", [("TRAIN", "Val", "Test"), ("Training", "validation"), ("Train", "TEST"), ("IMAGES",), (".",)]
)
def test_every_layout_is_trained_and_tested(
    folders: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Past the hidden folders that notebooks, file browsers and archives leave on every level."""
    data_dir, argv = tmp_path / "data", flags(tmp_path)
    places = [data_dir / top / name for top in folders for name in ("001.red_cat", "dog", "cow")]
    for place in places:
        draw_folder(place, 6)
    for place in {data_dir, *(data_dir / top for top in folders), *places}:
        for name in HIDDEN:
            (place / name / "dog").mkdir(parents=True)
            (place / name / "dog" / "0-checkpoint.jpg").write_text("whoever opens this fails")
        (place / "._0.jpg").write_text("whoever opens this fails")
    train_both(argv, "--epochs", "1")
    printed = capsys.readouterr().out
    for script in (pretrain, main):
        script.main([*argv, "--task=test"])
    tested = capsys.readouterr().out

    rule = f"20% of each class in {data_dir / folders[0]} is the test set"
    if len(folders) > 1:
        uses = ("train", "validate", "test") if len(folders) == 3 else ("train", "test")
        rule = ", ".join(f"{top}/ to {use}" for top, use in zip(folders, uses))
    assert printed.count(f"3 classes: red cat, cow, dog; {rule}") == 2 and f"; {rule}\n" in tested
    held_out = "30% of each class is held out for validation"
    assert printed.count(held_out) == (0 if len(folders) == 3 else 2) and held_out not in tested
    lists = (*read_training_lists(data_dir, 0.3), read_list(data_dir, "test"))
    n_train, n_valid, n_test = (len(images.files) for images in lists)
    assert n_train + n_valid + n_test == 6 * len(places) and tested.startswith(f"{n_test} test images of {data_dir}, ")
    assert printed.count(f"data:    {n_train} training and {n_valid} validation images of 3 classes") == 2
    assert (
        len(read_log(tmp_path / "out" / "predictions_learned.csv")) == 3 * n_test
    )  # two estimates, and one after glimpse 1
    tops = [{file.relative_to(data_dir).parts[0] for file in images.files} for images in lists]
    if len(folders) > 1:
        assert tops == [{folders[0]}, {folders[len(folders) - 2]}, {folders[-1]}]


def test_folders_of_classes(own_data: Path) -> None:
    train, test = (read_list(own_data, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["Red cat", "Blue cat", "Cow"]
    assert [train.labels.count(label) for label in range(3)] == [4, 4, 6] and test.labels == [0, 0, 1, 1, 2, 2]
    for images, folder in ((train, "train"), (test, "test")):
        for file, label in zip(images.files, images.labels):
            assert file.is_file() and file.relative_to(own_data).parts[:2] == (
                folder,
                ("001.Red_cat", "002.Blue_cat", "010.Cow")[label],
            )


def test_test_folder_may_lack_a_class_but_not_add_one(own_data: Path) -> None:
    shutil.rmtree(own_data / "test" / "002.Blue_cat")
    names, train = ["Red cat", "Blue cat", "Cow"], own_data / "train"
    test = dataset.match_classes(read_list(own_data, "test"), names, train)
    assert test.class_names == names and test.labels == [0, 0, 2, 2]
    draw_folder(own_data / "test" / "Dog", 1)
    with pytest.raises(utils.UserError, match=r"test has a class Dog that .*train lacks"):
        dataset.match_classes(read_list(own_data, "test"), names, train)


def make_empty_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "{} has no folders of images: put the images into {}/<class>/"),
        (["a.jpg", "b.png", "notes.txt"], "{} has no folders of images: put the images into {}/<class>/"),
        (["Images/a.jpg"], "{}/Images has no folders of images: put the images into {}/Images/<class>/"),
        (["cat/a.jpg", "cat/b.jpg", "cat/c.jpg"], "{} has one class only, cat: there is nothing to tell apart"),
        (["train/cat/a.jpg", "test/cat/a.jpg"], "{}/train has one class only, cat: there is nothing to tell apart"),
        (
            ["train/cat/a.jpg", "train/dog/a.txt"],
            "the class dog in {}/train has no images: add some, or remove the folder",
        ),
        (["test/cat/a.jpg", "test/dog/a.jpg"], "{} has a folder test, but no folder train"),
        (["train/cat/a.jpg", "train/dog/a.jpg"], "the class cat needs 2 distinct images for validation, but has 1"),
        (["cat/a.jpg", "cat/b.jpg", "dog/a.jpg"], "the class cat needs 3 distinct images for test, but has 2"),
        (
            ["train/cat/a.jpg", "train/dog/a.jpg", "val/cow/a.jpg", "test/x"],
            "{}/val has a class cow that {}/train lacks",
        ),
    ],
)
def test_what_is_missing_is_named(names: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_empty_files(tmp_path / "data", *names)
    for script in (pretrain, main):
        line = fails(script, flags(tmp_path))
        assert (
            line.removeprefix("error: ")
            .removeprefix("--data_dir: ")
            .startswith(message.replace("{}", str(tmp_path / "data")))
        )
    assert not (tmp_path / "out").exists()


def test_missing_test_set_is_named(trained: Path) -> None:
    """By the tasks that need it; training does without it."""
    shutil.rmtree(trained / "data" / "test")
    for script, task in ((pretrain, "test"), (main, "test"), (main, "view_glimpses")):
        line = fails(script, [*flags(trained), f"--task={task}"])
        assert f"{trained / 'data'} has no test images" in line
    train_both(flags(trained), "--epochs", "0", "--overwrite")
    (trained / "data" / "test").mkdir()
    for script in (pretrain, main):
        assert f"{trained / 'data' / 'test'} has no folders of images" in fails(
            script, [*flags(trained), "--task=test"]
        )
    shutil.rmtree(trained / "data")
    (trained / "data").touch()
    for script in (pretrain, main):
        line = fails(script, [*flags(trained), "--overwrite"])
        assert line == f"error: the folder {trained / 'data'} cannot be read (Not a directory)"


def test_names_that_would_become_equal_are_not_shortened() -> None:
    assert dataset.display_names(["n02085620-Chihuahua", "n02-toy_terrier"]) == ["Chihuahua", "toy terrier"]
    assert dataset.display_names(["001.cat", "002.cat"]) == ["001.cat", "002.cat"]
    assert dataset.display_names(["n02-", "n03-cat"]) == ["n02-", "n03-cat"]
    assert dataset.display_names(["1.", "2.cat"]) == ["1.", "2.cat"]


def test_only_numbers_of_known_data_sets_are_cut_off() -> None:
    """Of CUB-200-2011 and ImageNet, not those that are names."""
    folders = ["001.Black_footed_Albatross", "200.Common_Yellowthroat"]
    assert dataset.display_names(folders) == ["Black footed Albatross", "Common Yellowthroat"]
    for names in (["1.5T", "3.0T"], ["7.Mai", "8.Mai"], ["100.5 MHz", "101.25 MHz"]):
        assert dataset.display_names(names) == names


def test_both_scripts_on_own_images(own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From pre-training to test."""
    out = tmp_path / "out"
    shared = ["--data_dir", str(own_data), "--save_dir", str(out), *SMALL]
    pretrain.main([*shared, *BACKBONE, "--epochs", "1"])
    main.main([*shared, *CLASSIFIER, "--epochs", "2"])
    printed = capsys.readouterr().out
    following = f"next: python main.py --data_dir {own_data} --save_dir {out} --valid_size 0.3"
    assert following in printed.splitlines() and "\r" not in printed
    assert printed.count("3 classes: Red cat, Blue cat, Cow") == 2
    assert printed.count("9 training and 5 validation images") == 2
    assert printed.count("; train/ to train, test/ to test; 30% of each class is held out for validation\n") == 2
    main.main([*shared, "--task=test", "--n_trajectories", "2"])
    predictions = read_log(out / "predictions_learned.csv")
    for estimate in ("deterministic", "average of 2"):
        mine = [row for row in predictions if row["estimate"] == estimate]
        assert [own_data / row["file"] for row in mine] == read_list(own_data, "test").files
        assert [row["true_class"] for row in mine] == ["Red cat"] * 2 + ["Blue cat"] * 2 + ["Cow"] * 2


def test_tables_are_utf8_whatever_the_locale(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The names of folders and the tables that hold them, where Python's default encoding cannot express them."""
    data_dir, out = tmp_path / "own", tmp_path / "out"
    for split, n_images in (("train", 2), ("test", 1)):
        for name in ("柴犬", "Größe"):
            draw_folder(data_dir / split / name, n_images)
    out.mkdir()
    save_backbone(out / "pt_glimpse_model.tar")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        if sys.flags.utf8_mode:
            pytest.skip("Python uses UTF-8 in every locale here")
        shared = ["--data_dir", str(data_dir), "--save_dir", str(out), *SMALL]
        main.main([*shared, *CLASSIFIER, "--epochs", "1"])
        main.main([*shared, "--task=test"])
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert "2 classes: Größe, 柴犬" in capsys.readouterr().out
    assert {row["true_class"] for row in read_log(out / "predictions_learned.csv")} == {"Größe", "柴犬"}


def test_names_that_are_no_text_are_written_as_they_are(tmp_path: Path) -> None:
    """Python reads names of folders that it cannot decode, as all that are not ASCII under LC_ALL=C, as surrogates."""
    utils.write_table(tmp_path / "a.csv", [{"class": "柴犬".encode().decode("ascii", "surrogateescape")}])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").split() == ["class", "柴犬"]


def test_names_that_are_no_text_are_printed_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    utils.run(lambda: print("dog\udcff.jpg", flush=True))
    assert stream.buffer.getvalue().strip() == rb"dog\udcff.jpg"


# --- splits


def parts_of(data_dir: Path) -> dict[str, str]:
    """The part of each image, by its path."""
    train, valid = read_training_lists(data_dir, 0.1)
    lists = {"train": train, "valid": valid, "test": read_list(data_dir, "test")}
    parts = {str(file.relative_to(data_dir)): part for part, images in lists.items() for file in images.files}
    assert len(parts) == sum(len(images.files) for images in lists.values())
    return parts


@pytest.fixture
def hundreds(tmp_path: Path) -> Path:
    """Three classes of a hundred images, of which half are in a folder below; nobody opens them."""
    data_dir = tmp_path / "hundreds"
    for name in ("cat", "dog", "Größe"):
        make_empty_files(data_dir / "Images" / name, *(f"{'' if i % 2 else '2019/'}{i}.jpg" for i in range(100)))
    return data_dir


def test_parts_are_about_the_fractions_of_each_class(hundreds: Path) -> None:
    parts = parts_of(hundreds)
    assert len(parts) == 300 and parts == parts_of(hundreds)
    for name in ("cat", "dog", "Größe"):
        found = [part for file, part in parts.items() if file.startswith(f"Images/{name}/")]
        sizes = {part: found.count(part) for part in ("train", "valid", "test")}
        # Within four standard deviations of a fifth of a hundred, and of a tenth of the rest.
        assert 4 <= sizes["test"] <= 36 and 1 <= sizes["valid"] <= 19 and sizes["train"] >= 50, sizes
    everything = [*parts.values()]
    assert 33 <= everything.count("test") <= 87 and 6 <= everything.count("valid") <= 42


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_no_image_moves_when_another_one_comes_goes_or_is_renamed(part: str, hundreds: Path) -> None:
    before = parts_of(hundreds)
    for name in ("cat", "Größe"):
        files = [file for file, its_part in before.items() if its_part == part and file.startswith(f"Images/{name}/")]
        for file in {files[0], files[-1]} if name == "cat" else files[:1]:
            (hundreds / file).rename(hundreds / "aside")
            others = {other: its_part for other, its_part in before.items() if other != file}
            assert parts_of(hundreds) == others
            for new in ("a new name.png", "0000.jpg", "2020/1.jpg"):
                renamed = hundreds / "Images" / name / new
                renamed.parent.mkdir(exist_ok=True)
                (hundreds / "aside").rename(renamed)
                assert {key: value for key, value in parts_of(hundreds).items() if key in before} == others
                renamed.rename(hundreds / "aside")
            (hundreds / "aside").rename(hundreds / file)
    make_empty_files(hundreds / "Images" / "bird", *(f"{i}.jpg" for i in range(30)))
    after = parts_of(hundreds)
    assert before.items() < after.items() and len(after) == 330
    shutil.rmtree(hundreds / "Images" / "cat")
    assert parts_of(hundreds).items() < after.items()


def test_validation_and_test_images_are_drawn_independently() -> None:
    """By one hash for both, none would be left to validate on where the test set is drawn too."""
    files = [Path(f"cat/{i}.jpg") for i in range(3000)]
    images = ImageList(files, [0] * 3000, ["cat"])
    held_out = [set(split_list(images, 0.2, purpose, n_parts=3)[1].files) for purpose in ("validation", "test")]
    assert 80 <= len(held_out[0] & held_out[1]) <= 160  # 0.04 of 3000, within four standard deviations


def test_form_of_unicode_does_not_matter(tmp_path: Path) -> None:
    """A Mac may write umlauts as two characters."""
    parts = {}
    for form in ("NFC", "NFD"):
        for name in ("Größe", "Nähe"):
            names = [unicodedata.normalize(form, f"{name}/ü{i}.jpg") for i in range(30)]
            make_empty_files(tmp_path / form / "Images", *names)
        parts[form] = parts_of(tmp_path / form)
    assert len(parts["NFC"]) == 60 and parts["NFC"].keys() != parts["NFD"].keys()
    assert {unicodedata.normalize("NFC", name): part for name, part in parts["NFD"].items()} == parts["NFC"]


def test_three_images_of_a_class_are_enough_for_three_parts(tmp_path: Path) -> None:
    for i in range(60):
        make_empty_files(tmp_path / f"class {i}", "0.jpg", "1.jpg", "2.jpg")
    assert sorted(parts_of(tmp_path).values()) == ["test"] * 60 + ["train"] * 60 + ["valid"] * 60


# --- checkpoints know their images


@pytest.mark.parametrize("script", [pretrain, main])
def test_resuming_with_other_images_is_refused(script: ModuleType, trained: Path) -> None:
    """Of the same names, classes and numbers."""
    argv, last = [*flags(trained), "--resume_training", "--epochs", "2"], trained / "out" / script.FILES[1]
    before = {path: path.read_bytes() for path in (trained / "out").iterdir() if path.name in script.FILES}
    lists = dict(zip(("training", "validation"), read_training_lists(trained / "data", 0.3)))
    for part, images in lists.items():
        for n_changed in (1, len(images.files)):
            whole = {file: file.read_bytes() for file in images.files[:n_changed]}
            for i, file in enumerate(whole):
                draw_image(np.random.default_rng(i), 40, 36).save(file)
            first = images.files[0].relative_to(trained / "data")
            wanted = f"was trained on other images ({2 * n_changed} {part} images are missing or new, first {first}): "
            line = fails(script, argv)
            assert (
                line.startswith(f"error: the run in {trained / 'out'} {wanted}")
                and "train anew with --overwrite" in line
            )
            for file, content in whole.items():
                file.write_bytes(content)
    draw_folder(trained / "data" / "train" / "dog" / "new", 1)
    assert re.search(
        r"other images \(1 \w+ images are missing or new, first train/dog/new/0.jpg\)", fails(script, argv)
    )
    shutil.rmtree(trained / "data" / "train" / "dog" / "new")
    lists["training"].files[0].rename(trained / "aside.jpg")
    first = lists["training"].files[0].relative_to(trained / "data")
    assert f"was trained on other images (1 training images are missing or new, first {first}): " in fails(script, argv)
    (trained / "data" / "train" / "cat").rename(trained / "data" / "train" / "cow")
    assert f"the run in {trained / 'out'} was trained on other classes" in fails(script, argv)
    assert {path: path.read_bytes() for path in before} == before
    (trained / "data" / "train" / "cow").rename(trained / "data" / "train" / "cat")
    (trained / "aside.jpg").rename(lists["training"].files[0])
    script.main(argv)
    assert read(last)["epoch"] == 1


def used_in_training(n: int, use: str, n_images: int, path: Path, first: Path) -> str:
    """What is said if n of n_images images were used in training a checkpoint, as a regular expression."""
    found = rf"{n} of the {n_images} {use} images (was|were) used in training {path}, first {re.escape(str(first))}"
    return rf"error: {found}: .*--data_dir.*"


@pytest.mark.parametrize("script", [pretrain, main])
def test_testing_on_images_of_training_is_refused(script: ModuleType, trained: Path) -> None:
    """Whether trained or validated on. Other images may have their names: here all test images do."""
    argv, best, data_dir = [*flags(trained), "--task=test"], trained / "out" / script.FILES[0], trained / "data"
    script.main(argv)
    lists = read_training_lists(data_dir, 0.3)
    names = {"/".join(file.parts[-2:]) for images in lists for file in images.files}
    assert names > {"/".join(file.parts[-2:]) for file in read_list(data_dir, "test").files}
    for images in lists:
        file = images.files[-1]
        moved = data_dir / "test" / file.parent.name / "found" / file.name
        moved.parent.mkdir()
        file.rename(moved)
        assert re.fullmatch(used_in_training(1, "test", 7, best, moved), fails(script, argv))
        moved.rename(file)
        moved.parent.rmdir()
    for before, after in (("train", "x"), ("test", "train"), ("x", "test")):
        (data_dir / before).rename(data_dir / after)
    first = read_list(data_dir, "test").files[0]
    assert re.fullmatch(used_in_training(12, "test", 12, best, first), fails(script, argv))


def test_swapped_lists_are_refused(make_data, tmp_path: Path) -> None:
    """Of the official layout."""
    data_dir = make_data()
    argv = ["--data_dir", str(data_dir), "--save_dir", str(tmp_path / "out"), *SMALL]
    train_both(argv, "--epochs", "0")
    lists = [data_dir / "lists" / f"{part}_list.mat" for part in ("train", "test")]
    contents = [path.read_bytes() for path in lists]
    for path, content in zip(lists, reversed(contents)):
        path.write_bytes(content)
    first = read_list(data_dir, "test").files[0]
    for script in (pretrain, main):
        wanted = used_in_training(18, "test", 18, tmp_path / "out" / script.FILES[0], first)
        assert re.fullmatch(wanted, fails(script, [*argv, "--task=test"]))


def test_backbone_must_not_have_seen_the_validation_images(trained: Path, tmp_path: Path) -> None:
    """As if the folders for training and validation were swapped."""
    seen, _ = read_training_lists(trained / "data", 0.3)
    backbone = trained / "out" / pretrain.FILES[0]
    shutil.copytree(trained / "data" / "test", tmp_path / "data" / "train")
    shutil.copytree(trained / "data" / "train", tmp_path / "data" / "val")
    (tmp_path / "data" / "test").mkdir()
    line = fails(main, [*flags(tmp_path), *CLASSIFIER, "--backbone", str(backbone)])
    first = next(f for f in read_list(tmp_path / "data", "valid").files if f.read_bytes() == seen.files[0].read_bytes())
    assert re.fullmatch(used_in_training(len(seen.files), "validation", 12, backbone, first), line)
    assert not (tmp_path / "out" / main.FILES[0]).exists()


def test_backbone_of_other_images_is_told_and_remembered(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Testing on what only the backbone was trained or validated on is refused too, also after resuming."""
    lists = read_training_lists(trained / "data", 0.3)
    backbone, best = trained / "out" / pretrain.FILES[0], tmp_path / "out" / main.FILES[0]
    for name in ("cat", "dog"):
        draw_folder(tmp_path / "data" / "train" / name / "mine", 4)
    argv = flags(tmp_path)
    main.main([*argv, *CLASSIFIER, "--backbone", str(backbone), "--epochs", "1"])
    main.main([*argv, "--resume_training", "--epochs", "2"])
    shutil.copytree(trained / "data" / "test", tmp_path / "data" / "test")
    for seen in lists:
        places = [tmp_path / "data" / "test" / file.parent.name / "seen" / file.name for file in seen.files]
        for file, place in zip(seen.files, places):
            place.parent.mkdir(exist_ok=True)
            shutil.copy(file, place)
        line = fails(main, [*argv, "--task=test"])
        assert re.fullmatch(used_in_training(len(places), "test", 6 + len(places), best, places[0]), line)
        for place in places:
            place.unlink()
    main.main([*argv, "--task=test"])


def test_fingerprint_does_not_depend_on_the_form_of_unicode(trained: Path) -> None:
    """So that data copied from a Mac are known again."""
    file = read_training_lists(trained / "data", 0.3)[0].files[0]
    prints = []
    for form in ("NFC", "NFD"):
        renamed = file.with_name(unicodedata.normalize(form, "Größe.jpg"))
        file.rename(renamed)
        prints.append(dataset.fingerprint_of(renamed))
        renamed.rename(file)
    assert prints[0] == prints[1]


# --- bad images


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that are read from now on."""
    reads, real = [], dataset.read_image
    monkeypatch.setattr(dataset, "read_image", lambda path, *given: reads.append(Path(path)) or real(path, *given))
    return reads


def spoil(*files: Path) -> None:
    """Make images unreadable, each in another way."""
    damages: list[Callable[[Path], object]] = [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("<html>404 not found</html>"),
        lambda file: file.write_bytes(file.read_bytes()[:300]),
        lambda file: Image.fromarray(np.ones((9, 9), dtype=np.float32)).save(file, "TIFF"),
    ]
    for file, damage in zip(files, damages):
        damage(file)


@pytest.mark.parametrize("script", [pretrain, main])
def test_images_are_checked_once(script: ModuleType, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those to test on, too: their files only."""
    argv, data_dir = [*flags(trained), "--epochs", "0", "--overwrite"], trained / "data"
    lists = [*read_training_lists(data_dir, 0.3), read_list(data_dir, "test")]
    reads = count_reads(monkeypatch)
    script.main([*argv, *OWN[script]])
    assert sorted(reads) == sorted(file for images in lists for file in images.files)
    reads.clear()
    script.main([*argv, "--task=test"])
    assert sorted(reads) == sorted(2 * lists[2].files)  # for the check and for the test


@pytest.mark.parametrize("script", [pretrain, main])
def test_bad_images_are_all_named_before_anything_is_written(script: ModuleType, trained: Path, tmp_path: Path) -> None:
    """Those for training and for validation together; at most ten."""
    argv = [*flags(trained), "--save_dir", str(tmp_path / "fresh"), *OWN[script]]
    train, valid = read_training_lists(trained / "data", 0.3)
    bad = [*train.files[:2], *valid.files[:2]]
    spoil(*bad)
    line = fails(script, argv)
    assert line.startswith("error: 4 of 18 images cannot be used: ") and "--skip_bad_images" in line
    assert line.count(" cannot be read (") == 4 and all(f"image {file} cannot be read (" in line for file in bad)
    assert line.count("floating-point") == 1 and line.count("(not an image)") == 2
    make_empty_files(trained / "data" / "train" / "cat", *(f"new/{i}.jpg" for i in range(9)))
    line = fails(script, argv)
    assert line.startswith("error: 13 of 27 images cannot be used: ") and "; ...: " in line
    assert line.count(" cannot be read (") == 10
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("script", [pretrain, main])
def test_bad_images_are_left_out_on_demand(script: ModuleType, trained: Path, capsys: pytest.CaptureFixture) -> None:
    argv = [*flags(trained), *OWN[script], "--skip_bad_images", "--epochs", "1", "--overwrite"]
    lists = read_training_lists(trained / "data", 0.3)
    bad = [lists[0].files[0], lists[0].files[2], lists[1].files[0]]
    spoil(*bad)
    script.main(argv)
    printed = capsys.readouterr().out
    assert "left out" in printed and all(f"image {file} cannot be read (" in printed for file in bad)
    data = read(trained / "out" / script.FILES[0])["data"]
    sizes = [len(images.files) - n_bad for images, n_bad in zip(lists, (2, 1))]
    for part, size in zip(("training", "validation"), sizes):
        assert [len(data[part][name]) for name in ("files", "fingerprints", "labels")] == [size] * 3
        assert not {str(file.relative_to(trained / "data")) for file in bad} & set(data[part]["files"])
    assert f"data:    {sizes[0]} training and {sizes[1]} validation images" in printed
    assert "3 of 18 images cannot be used and are left out: " in printed


def test_bad_images_of_the_test_set(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = read_list(trained / "data", "test").files
    spoil(files[1])
    argv = flags(trained)
    before = {path: path.read_bytes() for path in (trained / "out").iterdir()}
    for script in (pretrain, main):
        words = [*argv, "--task=test"]
        line = fails(script, words)
        assert re.match(rf"error: 1 of \d+ images cannot be used: image {files[1]} cannot be read \(not an", line)
        assert "--skip_bad_images" in line
        assert {path: path.read_bytes() for path in (trained / "out").iterdir()} == before
        capsys.readouterr()
        script.main([*words, "--skip_bad_images"])
        printed = capsys.readouterr().out
        assert "5 test images of" in printed and f"image {files[1]} cannot be read (" in printed
        before = {path: path.read_bytes() for path in (trained / "out").iterdir()}
    rows = read_log(trained / "out" / "predictions_learned_data.csv")  # of a copy of the folder that was trained on
    assert [trained / "data" / row["file"] for row in rows] == 3 * [files[0], *files[2:]]


def test_image_that_has_become_readable_is_not_left_out(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As after `chmod`, or with the package for HEIC installed: the file is the same."""
    argv, best = [*flags(trained), *BACKBONE, "--epochs", "0", "--overwrite"], trained / "out" / pretrain.FILES[0]
    victim, real = read_training_lists(trained / "data", 0.3)[0].files[0], dataset.read_image

    def refuse(path: Path, *given: object) -> tuple[Image.Image, torch.Tensor]:
        if Path(path) == victim:
            raise dataset.ImageError(f"image {path} is HEIC: pip install pillow-heif")
        return real(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_image", refuse)
        pretrain.main([*argv, "--skip_bad_images"])
    assert f"image {victim} is HEIC" in capsys.readouterr().out
    n_images = len(read(best)["data"]["training"]["files"])
    pretrain.main(argv)
    assert len(read(best)["data"]["training"]["files"]) == n_images + 1


def test_link_to_nowhere_is_a_bad_image(trained: Path) -> None:
    file = read_training_lists(trained / "data", 0.3)[0].files[0]
    file.unlink()
    file.symlink_to("nowhere")
    argv = [*flags(trained), *BACKBONE, "--epochs", "0", "--overwrite"]
    line = fails(pretrain, argv)
    assert re.match(rf"error: 1 of \d+ images cannot be used: image {file} (not found|cannot be read)", line)
    pretrain.main([*argv, "--skip_bad_images"])
    assert (
        str(file.relative_to(trained / "data"))
        not in read(trained / "out" / pretrain.FILES[0])["data"]["training"]["files"]
    )


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    """Their range is not known; Pillow itself would clip it to 0 and 255."""
    Image.fromarray(np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)).save(tmp_path / "depth.tif")
    with pytest.raises(utils.UserError, match=r"^image .*depth\.tif cannot be read \(.*floating-point.*\)$"):
        dataset.read_image(tmp_path / "depth.tif", 9)


@pytest.mark.parametrize("beyond", [-1, 65536])
def test_integers_beyond_16_bits_are_refused(beyond: int, tmp_path: Path) -> None:
    """They were clipped."""
    path, values = tmp_path / "depth.tif", np.arange(81, dtype=np.int32).reshape(9, 9) * 257 * 3
    Image.fromarray(values).save(path)
    image, _ = dataset.read_image(path, 9)
    assert np.array_equal(np.asarray(image)[:, :, 1], np.arange(81).reshape(9, 9) * 3)
    values[4, 4] = beyond
    Image.fromarray(values).save(path)
    with pytest.raises(utils.UserError, match=r"^image .*depth\.tif cannot be read \(.*beyond 65,535.*\)$"):
        dataset.read_image(path, 9)


def test_images_of_phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 megapixels are read, which Pillow would refuse; for HEIC the package that reads it is named."""
    Image.new("L", (16384, 12288), 100).save(tmp_path / "large.jpg")
    assert min(dataset.read_image(tmp_path / "large.jpg", 384)[0].size) == 12288 // 8
    path = tmp_path / "photo.HEIC"
    path.write_bytes(b"")
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *rest)

    with monkeypatch.context() as patch, pytest.raises(utils.UserError, match="pip install pillow-heif"):
        patch.setattr(builtins, "__import__", missing)
        dataset.read_image(path, 32)
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    image = draw_image(np.random.default_rng(0), 320, 240)
    image.save(path, quality=95)
    error = np.abs(np.asarray(dataset.read_image(path, 32)[0]).astype(int) - np.asarray(image)).mean()
    assert error < 4


# --- predictions


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folders in folders, names that occur more than once, hidden and other files."""
    folder = tmp_path / "photos"
    for i, name in enumerate(("a/1.jpg", "b/1.jpg", "b/1.png", "b/c/d/1.jpg", "b/c/2.JPG")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(np.random.default_rng(i), 40, 50).save(folder / name)
    make_empty_files(folder, "b/.3.jpg", "b/.thumbs/4.jpg", "b/__MACOSX/._1.jpg", "b/notes.txt", "empty/notes.txt")
    return folder


def predict(trained: Path, imgs: Path, *words: str) -> list[str]:
    """Flags of the task."""
    shared = ["--save_dir", str(trained / "out"), "--imgs_dir", str(imgs), "--device", "cpu", "--precision", "fp32"]
    return [*shared, "--task=predict", "--n_trajectories", "2", *words]


def read_predictions(printed: str) -> dict[str, list[tuple[str, str]]]:
    """The classes and probabilities that were printed, by image."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in printed.splitlines():
        if header := re.fullmatch(r"(.*): average of 2 \(drawn in (.*)\)", line):
            assert Path(header[2]).is_file() and header[1] not in found
            cells = found[header[1]] = []
        elif row := re.fullmatch(r" +(\d+\.\d)%  (\w+)", line):
            cells.append((row[2], row[1]))
    return found


def test_images_are_predicted_in_bulk(
    trained_once: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A bad one in between is skipped, and the run ends with an error."""
    (photos / "b" / "c" / "0.jpg").write_text("no image")
    wanted = [photos / name for name in ("b/1.jpg", "b/1.png", "b/c/2.JPG", "b/c/d/1.jpg", "a/1.jpg")]
    tables = {}
    for batch_size in ("1", "2", "4", "128"):
        imgs = tmp_path / batch_size
        given = ["--images", str(photos / "b"), str(photos / "a" / "1.jpg"), "--batch_size", batch_size]
        line = fails(main, predict(trained_once, imgs, *given))
        assert line == "error: 1 of 6 images could not be read and were skipped"
        printed = capsys.readouterr().out
        assert f"skipped: image {photos / 'b/c/0.jpg'} cannot be read (not an image)\n" in printed
        assert f"predictions: {imgs / 'predictions.csv'}\n" in printed
        rows = tables[batch_size] = read_log(imgs / "predictions.csv")
        columns = ["file", "class_1", "probability_1", "class_2", "probability_2", "x_1", "y_1", "x_2", "y_2"]
        assert list(rows[0]) == columns and [Path(row["file"]) for row in rows] == wanted
        said = read_predictions(printed)
        assert [*said] == [row["file"] for row in rows]
        for row in rows:
            in_table = [(row[f"class_{i}"], f"{100 * float(row[f'probability_{i}']):.1f}") for i in (1, 2)]
            for (name, percent), (other_name, other_percent) in zip(said[row["file"]], in_table, strict=True):
                assert name == other_name and float(percent) == pytest.approx(float(other_percent), abs=0.11)
            assert sum(float(row[f"probability_{i}"]) for i in (1, 2)) == pytest.approx(1, abs=2e-4)
            assert all(-1 <= float(row[name]) <= 1 for name in columns[-4:])
        assert sorted(path.name for path in imgs.glob("*.jpg")) == ["1.jpg", "1_1.jpg", "1_2.jpg", "1_3.jpg", "2.jpg"]
    for rows in tables.values():  # one by one or together
        for row, other in zip(rows, tables["1"], strict=True):
            numbers = [name for name in row if name[0] in "pxy"]
            assert all(float(row[name]) == pytest.approx(float(other[name]), abs=2e-4) for name in numbers)
            assert all(row[name] == other[name] for name in row if name not in numbers)


def test_classifier_in_python_says_what_predict_does(trained_once: Path, photos: Path, tmp_path: Path) -> None:
    """Of files and of PIL images alike, whose own pixels and orientation are left as they are."""
    imgs, turned = tmp_path / "imgs", tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_image(np.random.default_rng(1), 50, 36).save(turned, exif=exif)
    main.main(predict(trained_once, imgs, "--images", str(photos / "a"), str(turned)))
    given = {"device": "cpu", "precision": "fp32"}
    classifier = main.load_classifier(trained_once / "out", n_trajectories=2, **given)
    assert not classifier.model.training
    for row in read_log(imgs / "predictions.csv"):
        image = Image.open(row["file"])
        for either in (image, Path(row["file"]), row["file"]):
            prediction = classifier(either)
            in_table = {row[f"class_{i}"]: float(row[f"probability_{i}"]) for i in (1, 2)}
            ours = dict(zip(classifier.class_names, prediction.probabilities.tolist(), strict=True))
            assert ours == pytest.approx(in_table, abs=2e-4)
            places = [float(row[f"{axis}_{t}"]) for t in (1, 2) for axis in "xy"]
            assert prediction.location.flatten().tolist() == pytest.approx(places, abs=2e-4)
            assert prediction.attention.shape == (2, 4) and torch.allclose(prediction.attention.sum(-1), torch.ones(2))
        assert image.getexif().get(0x0112) == (6 if row["file"] == str(turned) else None)
    center = main.load_classifier(str(trained_once / "out"), policy="center", **given)
    assert not center(turned).location.any() and center(turned).attention is None
    random = main.load_classifier(trained_once / "out", policy="random", **given)(turned)
    assert random.location.any() and random.probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(utils.UserError, match="nowhere/saved_model.tar not found: train first"):
        main.load_classifier("nowhere")
    with pytest.raises(utils.UserError, match="--k 2 contradicts"):
        main.load_classifier(trained_once / "out", k=2)
    with pytest.raises(utils.UserError, match="gone.jpg cannot be read"):
        classifier("gone.jpg")
    with pytest.raises(utils.UserError, match="oracle looks at annotated dogs"):
        main.load_classifier(trained_once / "out", policy="oracle", **given)(turned)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ({"policy": "centre"}, "argument --policy: invalid choice: 'centre' (choose from "),
        ({"device": "gpu"}, "argument --device: invalid choice: 'gpu' (choose from "),
        ({"n_trajectories": 0}, "argument --n_trajectories: '0' is not a whole number of at least 1"),
        ({"trajectories": 7}, "unrecognized arguments: --trajectories=7"),
    ],
)
def test_classifier_in_python_refuses_what_the_command_line_does(flag: dict[str, object], said: str) -> None:
    with pytest.raises(utils.UserError, match=f"^{re.escape(said)}"):
        main.load_classifier("nowhere", **flag)


def test_paths_that_are_missing_are_named_before_the_first_image(
    trained_once: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good, imgs = str(photos / "a"), tmp_path / "imgs"
    line = fails(main, predict(trained_once, imgs, "--images", "gone.jpg", good, str(photos / "nowhere")))
    assert line == f"error: --images: not found, or without images: gone.jpg, {photos / 'nowhere'}"
    line = fails(main, predict(trained_once, imgs, "--images", good, str(photos / "empty")))
    assert line == f"error: --images: not found, or without images: {photos / 'empty'}"
    assert not imgs.exists() and not capsys.readouterr().out
    line = fails(main, predict(trained_once, imgs, "--images", str(photos / "b" / "notes.txt")))
    assert line == "error: 1 of 1 images could not be read and were skipped"
    assert not imgs.exists() and capsys.readouterr().out.startswith(f"skipped: image {photos / 'b/notes.txt'} ")


def test_image_given_twice_is_no_error(trained_once: Path, photos: Path, tmp_path: Path) -> None:
    """By itself and in its folder, say."""
    given = ["--images", str(photos / "a" / "1.jpg"), str(photos / "a"), str(photos / "b")]
    main.main(predict(trained_once, tmp_path / "imgs", *given))
    files = [row["file"] for row in read_log(tmp_path / "imgs" / "predictions.csv")]
    assert list(dict.fromkeys(files)) == [
        str(photos / n) for n in ("a/1.jpg", "b/1.jpg", "b/1.png", "b/c/2.JPG", "b/c/d/1.jpg")
    ]


# --- what else must not pass in silence


def test_image_moved_to_another_class_is_another_image(trained: Path) -> None:
    (trained / "data" / "train" / "cat" / "moved").mkdir()
    file = next(file for file in read_training_lists(trained / "data", 0.3)[0].files if file.parts[-2] == "dog")
    file.rename(trained / "data" / "train" / "cat" / "moved" / file.name)
    assert "was trained on other images (" in fails(pretrain, [*flags(trained), "--resume_training", "--epochs", "2"])


def test_images_to_train_and_to_validate_on_must_differ(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for part in ("train", "val", "test"):
            draw_folder(tmp_path / "data" / part / name, 3)
        shutil.copy(tmp_path / "data" / "train" / name / "1.jpg", tmp_path / "data" / "val" / name / "1.jpg")
    line = fails(pretrain, [*flags(tmp_path), *BACKBONE])
    assert f"2 of the 6 validation images were used in training {tmp_path / 'data'}, first " in line


def test_more_processes_than_images(tmp_path: Path) -> None:
    args, machine = flags_of(main, "--batch_size", "3"), utils.Machine(torch.device("cpu"), [], "fp32", 2, 3)
    images = ImageList([tmp_path / "a.jpg", tmp_path / "b.jpg"], [0, 1], ["a", "b"])
    for trains in (False, True):
        with pytest.raises(utils.UserError, match="--batch_size 3 or 2 images do not split over 3 processes"):
            dataset.make_loader(images, args, machine, 96, trains=trains)


@pytest.mark.parametrize("name", ["x" * 240, "柴" * 80])
def test_long_names_are_drawn(name: str, trained_once: Path, tmp_path: Path) -> None:
    photo = tmp_path / f"{name}.jpg"
    draw_image(np.random.default_rng(0), 40, 36).save(photo)
    argv = [*flags(trained_once), "--imgs_dir", str(tmp_path / "imgs"), "--task=predict", "--images", str(photo)]
    main.main(argv)
    assert len(list((tmp_path / "imgs").glob(f"{name[:9]}*.jpg"))) == 1
