"""What would flatter a test or lose something in silence: images seen before, other data sets, boxes, links, files."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import BACKBONE, SMALL, annotate, draw_folder, draw_image, fails, read_log
from PIL import Image

import dataset
import main
import pretrain
from dataset import read_list, read_training_lists

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--n_glimpses", "2"]
OWN = {pretrain: BACKBONE, main: CLASSIFIER}  # flags of a new run
RESULTS = {pretrain: "pt_results", main: "results_learned"}


def flags(folder: Path, data_dir: Path | None = None) -> list[str]:
    """Flags to train and test on data/ in a folder, with its out/ as the folder of the run."""
    return ["--data_dir", str(data_dir or folder / "data"), "--save_dir", str(folder / "out"), *SMALL]


def train_both(folder: Path, *more: str) -> None:
    for script in (pretrain, main):
        script.main([*flags(folder), *OWN[script], "--epochs", "1", *more])


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with numbered classes, not in the order of their names, and the files of both scripts in out/."""
    folder = tmp_path_factory.mktemp("leaks")
    for name in ("001.Red_cat", "002.Blue_dog", "003.Ant"):
        draw_folder(folder / "data" / "train" / name, 5)
        draw_folder(folder / "data" / "test" / name, 2)
    train_both(folder)
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy to work on: the images stay where they are, the files of the scripts are in out/."""
    shutil.copytree(trained_once / "out", tmp_path / "out")
    return tmp_path


def read_results(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def touch(folder: Path, *names: str) -> None:
    """Empty files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- images that were seen before


@pytest.mark.parametrize("script", [pretrain, main])
def test_images_of_training_are_known_by_any_name(script: ModuleType, trained: Path, trained_once: Path) -> None:
    seen = [images.files[0] for images in read_training_lists(trained_once / "data", 0.3)]
    shutil.copytree(trained_once / "data", trained / "other")
    for i, file in enumerate(seen):
        shutil.copy(file, trained / "other" / "test" / file.parent.name / f"my photo {i}.jpeg")
    line = fails(script, [*flags(trained, trained / "other"), "--task=test"])
    assert f"error: 2 of the 8 test images were used in training {trained / 'out' / script.FILES[0]}, first " in line


def test_images_of_equal_name_size_and_border_are_told_apart(tmp_path: Path) -> None:
    """BMPs begin with their lowest row: here, the first 120,000 bytes of all are equal."""
    for i, part in enumerate(("train", "val", "test")):
        for j, name in enumerate(("cat", "dog")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for k in range(2):
                image = Image.new("RGB", (200, 300), "white")
                image.paste((40 * i, 40 * j, 40 * k), (50, 10, 150, 90))
                image.save(tmp_path / "data" / part / name / f"{k}.bmp")
    train_both(tmp_path, "--epochs", "0")
    for script, name in ((pretrain, "pt_results.json"), (main, "results_learned.json")):
        script.main([*flags(tmp_path), "--task=test"])
        assert read_results(tmp_path / "out" / name)["images_seen_in_training"] == 0


def test_copies_of_an_image_go_to_the_same_part(tmp_path: Path) -> None:
    """And move no other image, nor are they counted as images that a class has for each part."""
    parts: list[dict[str, str]] = []
    for name in ("cat", "dog"):
        draw_folder(tmp_path / name, 40)
    for _ in range(2):
        train, valid = read_training_lists(tmp_path, 0.3)
        lists = {"train": train, "valid": valid, "test": read_list(tmp_path, "test")}
        files = [(part, file) for part, images in lists.items() for file in images.files]
        contents = {part: {file.read_bytes() for other, file in files if other == part} for part in lists}
        assert sum(map(len, contents.values())) == len(set().union(*contents.values())) == 80
        parts.append({str(file.relative_to(tmp_path)): part for part, file in files})
        for i in range(40):
            shutil.copy(tmp_path / "cat" / f"{i}.jpg", tmp_path / "cat" / f"copy {i}.jpg")
            if i % 4 == 0:  # of a wrong class, too
                shutil.copy(tmp_path / "cat" / f"{i}.jpg", tmp_path / "dog" / f"cat {i}.jpg")
    assert len(parts[1]) == 130 and parts[0].items() <= parts[1].items()
    shutil.rmtree(tmp_path / "dog")
    draw_folder(tmp_path / "cow", 2)
    shutil.copy(tmp_path / "cow" / "0.jpg", tmp_path / "cow" / "2.jpg")
    with pytest.raises(dataset.UserError, match="the class cow needs 3 distinct images for test, but has 2"):
        read_list(tmp_path, "train")


def test_image_that_may_not_be_read_is_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where copies are looked for: the two files are equally long."""
    for name in ("cat", "dog"):
        draw_folder(tmp_path / "data" / name, 6)
    victim, real = tmp_path / "data" / "cat" / "3.jpg", Path.read_bytes
    shutil.copy(tmp_path / "data" / "cat" / "2.jpg", victim)

    def refuse(path: Path) -> bytes:
        if path == victim:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    fail_to_open(monkeypatch, victim, PermissionError(errno.EACCES, "Permission denied"))
    line = fails(pretrain, [*flags(tmp_path), *BACKBONE])
    assert line.startswith(f"error: 1 of 12 images cannot be used: image {victim} cannot be read (")


@pytest.mark.parametrize("script", [pretrain, main])
def test_few_twins_of_official_lists_are_counted(
    script: ModuleType, make_data, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Up to one in a hundred, in the results too; more are refused."""
    argv = [*flags(tmp_path, make_data(3, 34)), "--save_dir", str(tmp_path / "out")]
    for one in (pretrain, main)[: 1 + (script is main)]:
        one.main([*argv, *OWN[one], "--epochs", "0"])
    train, _ = read_training_lists(tmp_path / "dogs", 0.3)
    test, path = read_list(tmp_path / "dogs", "test"), tmp_path / "out" / f"{RESULTS[script]}.json"
    for n_twins in range(2):
        script.main([*argv, "--task=test"])
        printed = capsys.readouterr().out
        assert printed.count("note: 1 of the 102 test images were used in training too\n") == n_twins
        assert read_results(path)["images_seen_in_training"] == n_twins and "102 test images of" in printed
        shutil.copy(train.files[n_twins], test.files[n_twins])
    line = fails(script, [*argv, "--task=test"])
    assert f"error: 2 of the 102 test images were used in training {tmp_path / 'out' / script.FILES[0]}" in line


# --- other data sets


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Only images to test on, of two of the three classes, whose names are written in another way."""
    draw_folder(tmp_path / "other" / "test" / "ant", 1)
    draw_folder(tmp_path / "other" / "test" / "n02085620-red CAT", 3)
    return tmp_path / "other"


@pytest.mark.parametrize("script", [pretrain, main])
def test_classes_of_other_data_are_matched_by_name(
    script: ModuleType, trained: Path, other: Path, capsys: pytest.CaptureFixture
) -> None:
    """Results of another folder carry its name."""
    out, argv = trained / "out", [*flags(trained, other), "--task=test"]
    script.main(argv)
    assert "note: no test images of 1 of 3 classes, first Blue dog\n" in capsys.readouterr().out
    assert read_results(out / f"{RESULTS[script]}_other.json")["images"] == 4
    assert not (out / f"{RESULTS[script]}.json").exists()
    if script is main:
        rows = read_log(out / "predictions_learned_other.csv")
        truth = {row["file"]: row["true_class"] for row in rows}
        assert truth == {f"test/n02085620-red CAT/{i}.jpg": "Red cat" for i in range(3)} | {"test/ant/0.jpg": "Ant"}
        assert {row["class_1"] for row in rows} <= {"Red cat", "Blue dog", "Ant"}
        script.main([*argv, "--task=view_glimpses", "--imgs_dir", str(trained / "imgs")])


def test_results_of_other_data_leave_ones_own(trained: Path, trained_once: Path, other: Path) -> None:
    main.main([*flags(trained, trained_once / "data"), "--task=test"])
    before = contents(trained / "out")
    assert trained / "out" / "results_learned.json" in before
    main.main([*flags(trained, other), "--task=test"])
    after = contents(trained / "out")
    assert before.items() < after.items()
    new = {path.name for path in after.keys() - before.keys()}
    assert new == {"results_learned_other.json", "predictions_learned_other.csv"}


@pytest.mark.parametrize("script", [pretrain, main])
def test_unknown_class_of_other_data_is_named_with_the_nearest(script: ModuleType, trained: Path, other: Path) -> None:
    draw_folder(other / "test" / "012.blu_dog", 1)
    line = fails(script, [*flags(trained, other), "--task=test"])
    checkpoint = trained / "out" / script.FILES[0]
    wanted = f"{other / 'test'} has a class 012.blu_dog that {checkpoint} lacks: rename it, perhaps to Blue dog"
    assert line.startswith(f"error: {wanted}")


def test_names_that_differ_in_numbers_only_are_not_mixed_up(tmp_path: Path) -> None:
    """Nor where the list lacks some of them, so that its own names need no numbers."""
    draw_folder(tmp_path / "test" / "001.cat", 1)
    draw_folder(tmp_path / "test" / "003.dog", 1)
    test, names = read_list(tmp_path, "test"), ["001.cat", "002.cat", "dog"]
    assert dataset.match_classes(test, names, tmp_path).labels == [0, 2]
    (tmp_path / "test" / "001.cat").rename(tmp_path / "test" / "cat")
    with pytest.raises(dataset.UserError, match="has a class cat that .* lacks: rename it, perhaps to 00[12].cat"):
        dataset.match_classes(read_list(tmp_path, "test"), names, tmp_path)


@pytest.mark.parametrize("script", [pretrain, main])
def test_folder_without_a_split_is_tested_whole(
    script: ModuleType, trained: Path, trained_once: Path, capsys: pytest.CaptureFixture
) -> None:
    """Unless the network was trained on one of its images."""
    mixed = trained / "mixed"
    for name in ("red cat", "blue dog", "ant"):
        draw_folder(mixed / name, 4)
    argv = [*flags(trained, mixed), "--task=test"]
    script.main(argv)
    printed = capsys.readouterr().out
    assert f"12 test images of {mixed}, " in printed
    if script is main:
        assert f"; all of {mixed} is for testing: none of it was trained on\n" in printed
        main.main([*flags(trained, mixed), "--task=view_glimpses", "--imgs_dir", str(trained / "imgs")])
        assert f"12 drawings in {trained / 'imgs'}; " in capsys.readouterr().out
    seen = read_training_lists(trained_once / "data", 0.3)[0].files[0]
    said = set()
    for i in range(9):
        copy = mixed / "red cat" / f"seen {i}.jpg"
        shutil.copy(seen, copy)
        test = read_list(mixed, "test")
        if copy in test.files and "refused" not in said:
            assert f"1 of the {len(test.files)} test images were used in training" in fails(script, argv)
            said.add("refused")
        if copy not in test.files and "tested" not in said:
            script.main(argv)
            assert f"{len(test.files)} test images of {mixed}, " in capsys.readouterr().out and len(test.files) < 12
            said.add("tested")
        copy.unlink()
    assert said == {"refused", "tested"}


def test_boxes_of_other_data_are_used(trained: Path, other: Path, capsys: pytest.CaptureFixture) -> None:
    """To measure where the model looks, and for the policy that looks there."""
    cat = other / "test" / "n02085620-red CAT"
    annotate(other, {cat / f"{i}.jpg": [(0, 0, 10, 10)] for i in range(2)}, 40, 36)
    argv = [*flags(trained, other), "--task=test"]
    main.main([*argv, "--policy", "oracle"])
    assert "; boxes for 2 of 4 images; " in capsys.readouterr().out
    gaze = read_results(trained / "out" / "results_oracle_other.json")["figures"]["glimpse 1"]["deterministic"]
    assert gaze["hit_rate"] == 1 and gaze["distance_to_dog"] == pytest.approx(0, abs=1e-6)
    main.main(argv)
    figures = read_results(trained / "out" / "results_learned_other.json")["figures"]
    assert 0 <= figures["glimpse 1"]["deterministic"]["hit_rate"] <= 1


# --- boxes


@pytest.mark.parametrize(
    ("place", "image"),
    [
        ("Annotation/test/cat/0", "test/cat/0.jpg"),
        ("annotations/TEST/Cat/0.XML", "test/cat/0.jpg"),
        ("annotation/cat/only.xml", "test/cat/only.jpg"),
        ("Annotation/test/cat/2019/7", "test/cat/2019/7.jpg"),
        ("Annotation/cat/2019/7.xml", "test/cat/2019/7.jpg"),
        ("Annotation/test/cat/7.xml", "test/cat/2019/7.jpg"),
        ("Annotation/Train/cat/0.xml", "train/cat/0.jpg"),
        ("Annotation/train/cat/only", None),
        ("Annotation/test/dog/0", None),
        ("Annotation/test/cat/.0.xml", None),
        ("Annotation/test/cat/0.txt", None),
    ],
)
def test_boxes_are_found_where_they_belong(place: str, image: str | None, tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/0.jpg", "train/dog/0.jpg", "test/cat/0.jpg", "test/cat/only.jpg", "test/cat/2019/7.jpg")
    touch(tmp_path, place)
    found = {}
    for images in (read_list(tmp_path, "train"), read_list(tmp_path, "test")):
        found |= {file: path for file, path in zip(images.files, images.annotations, strict=True) if path}
    assert found == ({tmp_path / image: tmp_path / place} if image else {})


def test_boxes_lie_beside_folders_of_classes(tmp_path: Path) -> None:
    """The folder of boxes is not taken for a class without images."""
    touch(tmp_path, "cat/0.jpg", "dog/0.jpg", "Annotation/cat/0.xml")
    images = read_list(tmp_path, "all")
    assert images.class_names == ["cat", "dog"]
    assert images.annotations == [tmp_path / "Annotation" / "cat" / "0.xml", None]


@pytest.mark.parametrize("part", ["train", "test"])
def test_boxes_are_not_those_of_another_part(part: str, tmp_path: Path) -> None:
    """Annotation/cat/0 is of train/cat/0.jpg or of test/cat/0.jpg: nobody knows."""
    touch(tmp_path, "train/cat/0.jpg", "train/dog/0.jpg", "test/cat/0.jpg", "Annotation/cat/0")
    place = tmp_path / "Annotation" / "cat" / "0"
    with pytest.raises(
        dataset.UserError,
        match=rf"^{place} could annotate .*/cat/0.jpg, but .*/cat/0.jpg fits too: .*/Annotation/{part}/<class>/",
    ):
        read_list(tmp_path, part)
    touch(tmp_path, f"Annotation/{part}/cat/0.xml")
    assert read_list(tmp_path, part).annotations[0] == tmp_path / "Annotation" / part / "cat" / "0.xml"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Images/cat/0.jpg", "Images/cat/0.png", "Annotation/cat/0"], "cat/0.png, but {}/Images/cat/0.jpg fits too"),
        (
            ["Images/cat/a/0.jpg", "Images/cat/b/0.jpg", "Annotation/cat/0"],
            "Annotation/cat/0 could annotate {}/Images/cat/b/0.jpg, but {}/Images/cat/a/0.jpg fits too",
        ),
        (
            ["Images/cat/0.jpg", "Annotation/cat/0", "Annotation/cat/0.xml"],
            "cat/0.jpg, but {}/Annotation/cat/0 fits too",
        ),
        (["Images/cat/0.jpg", "Annotation/x", "annotations/x"], "annotations both seem to hold annotations: rename"),
    ],
)
def test_boxes_that_could_belong_to_two_images_are_refused(names: list[str], said: str, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(dataset.UserError, match=re.escape(said.replace("{}", str(tmp_path)))):
        read_list(tmp_path, "all")


# --- links and folders among those of classes


def test_links_multiply_no_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw_folder(tmp_path / "train" / name, 3)
        draw_folder(tmp_path / "train" / name / "2019", 2)
        draw_folder(tmp_path / "test" / name, 1)
    (tmp_path / "train" / "cat" / "self").symlink_to(".")
    assert len(read_list(tmp_path, "train").files) == 10
    (tmp_path / "train" / "cat" / "2019" / "up").symlink_to("..")
    (tmp_path / "train" / "dog" / "all").symlink_to("..")
    (tmp_path / "train" / "dog" / "everything").symlink_to(tmp_path)
    (tmp_path / "train" / "dog" / "2018").symlink_to("2019")
    (tmp_path / "elsewhere").mkdir()
    draw_folder(tmp_path / "elsewhere", 1)
    (tmp_path / "train" / "dog" / "elsewhere").symlink_to(tmp_path / "elsewhere")
    train = read_list(tmp_path, "train")
    assert [train.labels.count(label) for label in range(2)] == [5, 6]
    assert len({os.path.realpath(file) for file in train.files}) == 11
    (tmp_path / "train" / "loop").symlink_to(".")
    with pytest.raises(dataset.UserError, match="the class loop in .*train has no images: add some, or remove the"):
        read_list(tmp_path, "train")
    assert len(dataset.find_images([tmp_path / "train" / "dog"])) == 6


def test_folder_is_found_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_folder(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    assert dataset.find_images([Path("."), Path("../" + tmp_path.name)]) == [
        *(Path(f"{i}.jpg") for i in range(2)),
        *(Path("..", tmp_path.name, f"{i}.jpg") for i in range(2)),
    ]


def test_files_of_a_run_among_the_classes_are_refused_at_the_start(tmp_path: Path) -> None:
    """Or they would be a class of the next run."""
    data_dir = tmp_path / "data"
    for name in ("cat", "dog"):
        draw_folder(data_dir / name, 6)
    (tmp_path / "link").symlink_to("data")
    before = contents(tmp_path)
    argv = [*flags(tmp_path), *BACKBONE, "--epochs", "0"]
    for folder in (data_dir / "results", data_dir / "cat" / "results", tmp_path / "link" / "results"):
        line = fails(pretrain, [*argv, "--save_dir", str(folder)])
        wanted = f"--save_dir {folder} would be taken for a class of {data_dir}: choose another folder"
        assert line == f"error: {wanted}" and contents(tmp_path) == before and not folder.exists()
    train_both(tmp_path, "--epochs", "0")
    for task in ("train", "test", "view_glimpses"):
        given = ["--task", task, "--imgs_dir", str(data_dir / "imgs")]
        line = fails(main, [*flags(tmp_path), *given, *(["--overwrite"] if task == "train" else [])])
        assert line.startswith(f"error: --imgs_dir {data_dir / 'imgs'} would be taken for a class")
    (data_dir / "train").mkdir()
    for name in ("cat", "dog"):
        (data_dir / name).rename(data_dir / "train" / name)
    pretrain.main([*argv, "--save_dir", str(data_dir / "results")])


def test_jfif_is_an_image(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw_folder(tmp_path / "train" / name, 1)
        (tmp_path / "train" / name / "0.jpg").rename(tmp_path / "train" / name / "0.JFIF")
    assert [file.name for file in read_list(tmp_path, "train").files] == ["0.JFIF"] * 2


# --- images that are good, and images that are not


def fail_to_open(monkeypatch: pytest.MonkeyPatch, victim: Path, error: BaseException) -> None:
    """Let Pillow raise an error instead of opening a file."""
    real = Image.open

    def fail(path: str | Path, *given: object) -> Image.Image:
        if Path(path) == victim:
            raise error
        return real(path, *given)

    monkeypatch.setattr(Image, "open", fail)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: out of memory: "),
        (OSError(errno.EMFILE, "Too many open files"), "error: Too many open files at image {}, which may be good"),
        (OSError(errno.ENFILE, "Too many open files"), "error: Too many open files at image {}, which may be good"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "error: Cannot allocate memory at image {}, which may be"),
    ],
)
def test_lack_of_memory_does_not_make_an_image_bad(
    error: Exception, said: str, trained: Path, trained_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = read_training_lists(trained_once / "data", 0.3)[0].files[2]
    fail_to_open(monkeypatch, victim, error)
    argv = ["--data_dir", str(trained_once / "data"), "--save_dir", str(trained / "new"), *SMALL]
    line = fails(pretrain, [*argv, *BACKBONE, "--epochs", "0", "--skip_bad_images"])
    assert line.startswith(said.replace("{}", str(victim))) and not (trained / "new").exists()
    line = fails(main, [*flags(trained), "--task=predict", "--images", str(victim)])
    assert line.startswith(said.replace("{}", str(victim)))


@pytest.mark.parametrize("script", [pretrain, main])
def test_bad_test_image_is_named_before_training(script: ModuleType, trained: Path, trained_once: Path) -> None:
    shutil.copytree(trained_once / "data", trained / "data")
    victim = read_list(trained / "data", "test").files[3]
    victim.write_text("<html>404 not found</html>")
    argv, before = [*flags(trained), *OWN[script], "--epochs", "0", "--overwrite"], contents(trained / "out")
    line = fails(script, argv)
    assert line.startswith(f"error: 1 of 21 images cannot be used: image {victim} cannot be read (not an image)")
    assert contents(trained / "out") == before
    script.main([*argv, "--skip_bad_images"])


@pytest.mark.parametrize("script", [pretrain, main])
def test_class_without_a_good_training_image_is_refused(script: ModuleType, trained: Path, trained_once: Path) -> None:
    """As if all photos of a class were HEIC and pillow-heif not installed."""
    shutil.copytree(trained_once / "data", trained / "data")
    images, _ = read_training_lists(trained / "data", 0.3)
    for file, label in zip(images.files, images.labels):
        if label == 0:
            file.write_bytes(b"no image")
    argv, before = [*flags(trained), *OWN[script], "--epochs", "0", "--overwrite"], contents(trained / "out")
    line = fails(script, [*argv, "--skip_bad_images"])
    assert line.endswith(f"--skip_bad_images leaves no training image of {images.class_names[0]}: replace its images")
    assert contents(trained / "out") == before


def test_bad_test_image_is_drawn_around(trained: Path, trained_once: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(trained_once / "data", trained / "data")
    victim = read_list(trained / "data", "test").files[3]
    victim.write_text("<html>404 not found</html>")
    argv = [*flags(trained), "--task=view_glimpses", "--imgs_dir", str(trained / "imgs")]
    assert f"image {victim} cannot be read" in fails(main, argv) and not (trained / "imgs").exists()
    main.main([*argv, "--skip_bad_images"])
    assert f"1 of 6 images cannot be used and are left out: image {victim} cannot" in capsys.readouterr().out
    assert len([*(trained / "imgs").iterdir()]) == 5 + 1  # and the contact sheet


@pytest.mark.parametrize("script", [pretrain, main])
def test_test_images_without_labels_do_not_prevent_training(
    script: ModuleType, trained: Path, trained_once: Path, capsys: pytest.CaptureFixture
) -> None:
    """As in some competitions: the images of test/ are in no folders of classes."""
    shutil.copytree(trained_once / "data", trained / "data")
    shutil.rmtree(trained / "data" / "test")
    draw_folder(trained / "data" / "test", 3)
    script.main([*flags(trained), *OWN[script], "--epochs", "0", "--overwrite"])
    line = fails(script, [*flags(trained), "--task=test"])
    assert "data/test has no folders of images" in line
    assert f"note: --task=test will fail: {line.removeprefix('error: ')}\n" in capsys.readouterr().out


# --- files that stay, and files that go


def test_new_run_takes_away_the_results_of_the_old_one(trained_once: Path, tmp_path: Path, other: Path) -> None:
    """Of its own script, once its first checkpoint is written, and nothing else."""
    for name in ("data", "out"):
        shutil.copytree(trained_once / name, tmp_path / name)
    out = tmp_path / "out"
    for script in (pretrain, main):
        for data_dir in (tmp_path / "data", other):
            script.main([*flags(tmp_path, data_dir), "--task=test"])
    for name in ("results.txt", "my_results_learned.json", "predictions.xlsx"):
        (out / name).touch()
    present = set(contents(out))
    gone = {path for path in present if re.match(r"(results|predictions)_(?!.*xlsx)", path.name)}
    assert len(gone) >= 4 and {path.suffix for path in gone} == {".json", ".csv"}
    again = [*flags(tmp_path), *CLASSIFIER, "--overwrite", "--epochs", "1"]
    victim = read_list(tmp_path / "data", "test").files[0]
    whole = victim.read_bytes()
    victim.write_text("no image")
    fails(main, again)
    assert set(contents(out)) == present
    victim.write_bytes(whole)
    main.main([*flags(tmp_path), "--resume_training", "--epochs", "2"])
    assert set(contents(out)) == present
    main.main(again)
    assert set(contents(out)) == present - gone
    pretrain.main([*flags(tmp_path), *BACKBONE, "--overwrite", "--epochs", "0"])
    left = {path.name for path in contents(out)}
    assert not any(name.startswith("pt_results") or name in pretrain.FILES[1:] for name in left)
    assert {"saved_model.tar", "last.tar", "log.csv", "results.txt", "my_results_learned.json"} <= left


def test_drawings_are_named_after_the_photo_and_delete_nothing(
    trained: Path, trained_once: Path, capsys: pytest.CaptureFixture
) -> None:
    """A number tells apart those of the same name; no photo is drawn over."""
    imgs = trained / "imgs"
    for name in ("glimpse_0.jpg", "glimpse_77.jpg", "holiday.png", "cat.jpg"):
        draw_folder(imgs, 0)
        draw_image(np.random.default_rng(0), 40, 36).save(imgs / name)
    before = contents(imgs)
    argv = [*flags(trained, trained_once / "data"), "--imgs_dir", str(imgs)]
    main.main([*argv, "--task=view_glimpses", "--n_samples", "4"])
    after = contents(imgs)
    assert before.items() < after.items()
    drawn = {path.name for path in after.keys() - before.keys()}
    images = read_list(trained_once / "data", "test")
    stems = [images.files[i].stem for i in main.fixed_choice(6, 4, seed=0)]
    names = {f"{stem}{f'_{stems[:i].count(stem)}' if stem in stems[:i] else ''}.jpg" for i, stem in enumerate(stems)}
    assert drawn == {*names, "contact_sheet.jpg"} and len(names) == 4
    for name in ("my_dog.jpg", "my_dog.png", "contact_sheet.jpg"):
        draw_image(np.random.default_rng(0), 40, 36).save(trained / name)
    given = [trained / name for name in ("my_dog.jpg", "my_dog.png", "contact_sheet.jpg")]
    capsys.readouterr()
    words = [*argv, "--task=predict", "--n_trajectories", "2", "--images", *map(str, given)]
    main.main(words)
    last = contents(imgs)
    assert {path.name for path in last.keys() - after.keys()} == {
        *("my_dog.jpg", "my_dog_1.jpg", "contact_sheet_1.jpg", "predictions.csv")
    }
    assert after.items() < last.items()
    printed = capsys.readouterr().out
    line = fails(main, [*words, str(imgs / "cat.jpg")])  # a photo among the drawings, one of which could replace it
    assert line == f"error: --imgs_dir {imgs} holds the image cat.jpg: choose another folder for drawings"
    assert contents(imgs) == last
    assert f"{trained / 'my_dog.png'}: average of 2 (drawn in {imgs / 'my_dog_1.jpg'})\n" in printed


def test_drawing_says_whose_probability_it_shows(
    trained: Path, trained_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, real = [], main.draw_panel
    monkeypatch.setattr(main, "draw_panel", lambda *given: captions.append(given[5]) or real(*given))
    photo = trained_once / "data" / "test" / "003.Ant" / "0.jpg"
    classifier = main.load_classifier(trained / "out", device="cpu", precision="fp32")
    classifier.draw(classifier(photo), photo.name)
    [caption] = captions
    drawn = classifier(photo).drawn[-1]
    assert caption.startswith("0.jpg: learned policy, deterministic trajectory\npredicted ")
    assert caption.endswith(f" {classifier.class_names[drawn.argmax()]} ({drawn.max():.2f})")


# --- figures


@pytest.mark.parametrize("n_classes", [3, 6])
def test_accuracy_is_printed_as_a_count(n_classes: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With its interval; no top-5 accuracy where every class is among the five most probable."""
    for i in range(n_classes):
        draw_folder(tmp_path / "data" / "train" / f"class {i}", 2)
        draw_folder(tmp_path / "data" / "test" / f"class {i}", 2)
    train_both(tmp_path, "--epochs", "0")
    capsys.readouterr()
    main.main([*flags(tmp_path), "--task=test"])
    printed = capsys.readouterr().out
    rows = [row for row in read_log(tmp_path / "out" / "predictions_learned.csv") if row["estimate"] == "deterministic"]
    n_right = sum(row["class_1"] == row["true_class"] for row in rows)
    counts = rf"\({n_right} of {2 * n_classes}; 95% CI \d+% to \d+%\)  "
    wanted = rf"deterministic +{n_right / len(rows):.1%} correct {counts}"
    assert re.search(rf"policy learned +{wanted}", printed)
    assert ("top5" in printed) == (n_classes > 5)
    pretrain.main([*flags(tmp_path), "--task=test"])
    assert re.search(rf"head 123 +\S+% correct \(\d+ of {2 * n_classes}; 95% CI ", capsys.readouterr().out)
