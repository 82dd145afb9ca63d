"""What users ask for: pictures of their own, tables of answers, what can be watched, help that helps."""

import builtins
import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONE, SMALL, draw_picture, fails, read_log
from PIL import Image

import dataset
import main
import pretrain
import utils
from dataset import DataError, PictureList, read_list

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--n_glimpses", "2"]


def draw_folder(folder: Path, n_pictures: int, suffix: str = "jpg") -> None:
    folder.mkdir(parents=True)
    for i in range(n_pictures):
        draw_picture(np.random.default_rng(i), 40, 36).save(folder / f"{i}.{suffix}")


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """train/<class> and test/<class>, as people have them: numbered names, other formats, a folder in a folder."""
    data_dir = tmp_path / "own"
    for name, suffix in (("001.Red_cat", "png"), ("002.Blue_cat", "JPG"), ("010.Cow", "webp")):
        draw_folder(data_dir / "train" / name, 4, suffix)
        draw_folder(data_dir / "test" / name, 2, suffix)
    draw_folder(data_dir / "train" / "010.Cow" / "2019", 2)
    (data_dir / "train" / "010.Cow" / "._0.webp").write_text("of a file system")
    (data_dir / "train" / "010.Cow" / "notes.txt").write_text("no picture")
    return data_dir


# --- own data


def test_folders_of_classes(own_data: Path) -> None:
    train, test = (read_list(own_data, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["Red cat", "Blue cat", "Cow"]
    assert [train.labels.count(label) for label in range(3)] == [4, 4, 6] and test.labels == [0, 0, 1, 1, 2, 2]
    for pictures, folder in ((train, "train"), (test, "test")):
        for file, label in zip(pictures.files, pictures.labels):
            assert file.is_file() and file.relative_to(own_data).parts[:2] == (
                folder,
                ("001.Red_cat", "002.Blue_cat", "010.Cow")[label],
            )


def test_test_folder_may_lack_a_class_but_not_know_another(own_data: Path) -> None:
    shutil.rmtree(own_data / "test" / "002.Blue_cat")
    test = read_list(own_data, "test")
    assert test.class_names == ["Red cat", "Blue cat", "Cow"] and test.labels == [0, 0, 2, 2]
    draw_folder(own_data / "test" / "Dog", 1)
    with pytest.raises(DataError, match=r"test has a class Dog that .*train has not"):
        read_list(own_data, "test")


def test_pictures_without_a_test_set_are_divided(own_data: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "divided"
    for name, n_pictures in (("cat", 10), ("dog", 20)):
        draw_folder(data_dir / "Images" / name, n_pictures)
    train, test = (read_list(data_dir, split) for split in ("train", "test"))
    assert (train, test) == tuple(read_list(data_dir, split) for split in ("train", "test"))
    assert [test.labels.count(label) for label in (0, 1)] == [2, 4] and len(train.files) == 24
    assert not set(train.files) & set(test.files) and "20% of each class" in train.origin


def test_folders_without_pictures_are_named(own_data: Path, tmp_path: Path) -> None:
    (own_data / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="classes empty"):
        read_list(own_data, "train")
    shutil.rmtree(own_data / "test")
    with pytest.raises(DataError, match=r"own/test \(No such file"):
        read_list(own_data, "test")
    (tmp_path / "flat" / "Images").mkdir(parents=True)
    draw_picture(np.random.default_rng(0), 9, 9).save(tmp_path / "flat" / "Images" / "a.jpg")
    with pytest.raises(DataError, match="flat/Images"):
        read_list(tmp_path / "flat", "train")
    draw_folder(tmp_path / "one" / "Images" / "cat", 1)
    with pytest.raises(DataError, match="class cat has 1 picture to divide"):
        read_list(tmp_path / "one", "train")


def test_names_that_would_become_alike_stay_as_they_are() -> None:
    assert dataset.display_names(["n02085620-Chihuahua", "n02-toy_terrier"]) == ["Chihuahua", "toy terrier"]
    assert dataset.display_names(["1.cat", "2.cat"]) == ["1.cat", "2.cat"]
    assert dataset.display_names(["1.", "2.cat"]) == ["1.", "2.cat"]


def test_both_scripts_on_own_pictures(own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The whole way, and what is printed on it fits a terminal of 80 columns, paths aside."""
    out, imgs = tmp_path / "out", tmp_path / "imgs"
    shared = ["--data_dir", str(own_data), "--save_dir", str(out), "--imgs_dir", str(imgs), *SMALL]
    pretrain.main([*shared[:4], *SMALL, *BACKBONE, "--epochs", "1"])
    main.main([*shared, *CLASSIFIER, "--epochs", "2"])
    printed = capsys.readouterr().out
    assert f"next: python main.py --data_dir {own_data} --save_dir {out}" in printed.splitlines()
    lines = printed.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) < 90 and "\r" not in printed
    printed = re.sub(r"\s+", " ", printed)  # it is wrapped
    assert printed.count("3 classes: Red cat, Blue cat, Cow") == 2
    assert printed.count("10 training pictures and 4 validation pictures") == 2
    assert printed.count(f"as in {own_data}/train and") == 2
    main.main([*shared, "--task=test", "--n_trajectories", "2"])
    with open(out / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["pictures"]) for row in rows] == [("Red cat", "2"), ("Blue cat", "2"), ("Cow", "2")]
    answers = read_log(out / "predictions.csv")
    assert [own_data / row["file"] for row in answers] == read_list(own_data, "test").files
    for row in rows:
        mine = [answer["prediction"] == row["class"] for answer in answers if answer["truth"] == row["class"]]
        assert float(row["mean of 2"]) == sum(mine) / len(mine)

    draw_folder(tmp_path / "photos", 2, "png")
    (tmp_path / "photos" / "thumbs.db").write_text("no picture")
    photo = tmp_path / "a photo.jpg"
    draw_picture(np.random.default_rng(0), 300, 400).save(photo)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    main.main([*shared[2:6], "--task=predict", "--images", str(photo), str(tmp_path / "photos")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (drawn")[0] for line in lines if "drawn" in line] == [
        str(photo),
        *(str(tmp_path / "photos" / f"{i}.png") for i in (0, 1)),
    ]
    assert len(list(imgs.glob("predict_*.jpg"))) == 3
    (tmp_path / "notes.txt").write_text("no picture")
    for path, reason in ((tmp_path / "empty", "no picture in that folder"), (tmp_path / "notes.txt", "not a picture")):
        argv = [*shared, "--task=predict", "--imgs_dir", str(tmp_path / "nothing"), "--images", str(path)]
        assert reason in fails(main.main, argv)
    assert not (tmp_path / "nothing").exists()


def test_pictures_of_phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 megapixels are read, which Pillow would refuse; for HEIC the package that reads it is named."""
    Image.new("L", (16384, 12288), 100).save(tmp_path / "large.jpg")
    assert min(dataset.read_picture(tmp_path / "large.jpg", 384).size) == 12288 // 8
    path = tmp_path / "photo.HEIC"
    path.write_bytes(b"")
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *rest)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="pip install pillow-heif"):
        patch.setattr(builtins, "__import__", missing)
        dataset.read_picture(path, 32)
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    picture = draw_picture(np.random.default_rng(0), 320, 240)
    picture.save(path, quality=95)
    error = np.abs(np.asarray(dataset.read_picture(path, 32)).astype(int) - np.asarray(picture)).mean()
    assert error < 4


def test_output_that_nobody_reads_on_ends_the_run_quietly(tmp_path: Path) -> None:
    code = "import utils\ndef main():\n    for i in range(10**6): print(i, flush=True)\nutils.run(main)"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(command, shell=True, cwd=Path(main.__file__).parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


# --- what is reported


def test_confused_classes_by_hand() -> None:
    names = ["cat", "dog", "cow"]
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([1, 1, 1, 0, 1, 0, 2])
    lines = main.most_confused(predictions, labels, names)
    assert lines == ["cat taken for dog: 3 of 4", "dog taken for cat: 1 of 2"]
    assert main.most_confused(labels, labels, names) == []
    many = torch.arange(20)
    assert len(main.most_confused(many.roll(1), many, [str(i) for i in range(20)])) == main.N_CONFUSED


def test_rewards_are_of_the_predictions_that_count() -> None:
    logits = torch.eye(3)[torch.tensor([[[0, 1], [1, 2]]])]  # one picture, two trajectories: 0 then 1, and 1 then 2
    rollout = main.Rollout(logits, *(torch.zeros(1, 2, 2) for _ in range(4)))
    for supervision, wanted in (("each", [[0, 1], [1, 0]]), ("last", [[1, 1], [0, 0]])):
        assert main.rewards(rollout, torch.tensor([1]), supervision).tolist() == [wanted]


def test_choice_of_pictures_is_fixed() -> None:
    assert main.fixed_choice(50, 8, 0) == main.fixed_choice(50, 20, 0)[:8] != main.fixed_choice(50, 8, 1)
    assert sorted(main.fixed_choice(5, 8, 0)) == [0, 1, 2, 3, 4]


def test_tensorboard_shows_the_metrics_and_the_same_pictures(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A run that is resumed goes on where the log does."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    shared = ["--data_dir", str(own_data), "--save_dir", str(out), *SMALL]
    pretrain.main([*shared, *BACKBONE, "--epochs", "1", "--tensorboard"])
    main.main([*shared, *CLASSIFIER, "--epochs", "2", "--lr_schedule", "constant", "--tensorboard=True"])
    plain = (out / "log.csv").read_text()
    main.main([*shared, *CLASSIFIER, "--epochs", "1", "--lr_schedule", "constant", "--tensorboard"])
    main.main([*shared, "--resume_training", "--epochs", "2", "--tensorboard"])
    assert (out / "log.csv").read_text() == plain  # drawing changes nothing, resuming neither
    assert f"tensorboard --logdir {out / 'tensorboard'}" in re.sub(r"\s+", " ", capsys.readouterr().out)
    for script, log in (("main", "log.csv"), ("pretrain", "pt_log.csv")):
        board = events.EventAccumulator(str(out / "tensorboard" / script), size_guidance={"images": 0})
        board.Reload()
        rows = read_log(out / log)
        names = {f"{name.partition('_')[2]}/{name.partition('_')[0]}" for name in rows[0] if name != "epoch"}
        assert set(board.Tags()["scalars"]) == names and {"loss/train"} <= names
        for name in names:
            scalars = board.Scalars(name)
            assert [scalar.step for scalar in scalars] == [int(row["epoch"]) for row in rows]
            what, part = name.split("/")
            assert [s.value for s in scalars] == pytest.approx([float(row[f"{part}_{what}"]) for row in rows], rel=1e-4)
        if script == "main":
            wanted = {"reward/train", "expected_reward/train", "off_center/train", "off_center/valid"}
            assert wanted <= names
            assert set(board.Tags()["images"]) == {f"validation/{i}" for i in range(4)}  # all that there are
            assert [image.step for image in board.Images("validation/0")] == [1, 2]

    for task in ("test", "probe"):
        with pytest.raises(SystemExit):
            pretrain.parse_args([f"--task={task}", "--tensorboard"])
        assert f"--tensorboard does not go with --task={task}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert "pip install tensorboard" in fails(main.main, [*shared, *CLASSIFIER, "--epochs", "1", "--tensorboard"])


# --- words


@pytest.mark.parametrize("script", [main, pretrain])
def test_help_is_in_groups_and_fits_the_terminal(
    script: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and max(map(len, lines)) <= 80
    groups = [line for line in lines if re.fullmatch(r"[a-z ]+:", line)]
    assert groups == ["options:", "task:", "data and files:", "training:", "machine:", "network:"]


def test_next_command_keeps_the_folders() -> None:
    args = main.parse_args(["--data_dir", "my dogs"])
    assert utils.next_command(args, "main.py", "--task=test") == "next: python main.py --task=test --data_dir 'my dogs'"


def test_a_run_is_described_in_a_few_short_lines() -> None:
    names = [f"class {i}" for i in range(120)]
    assert utils.describe_classes(names) == "120 classes: class 0, class 1, class 2, ..., class 119"
    assert utils.describe_classes(["cat"]) == "1 class: cat"
    pictures = PictureList([Path("a")] * 1201, [0] * 1201, names, "as in a/lists")
    text = utils.describe_run(
        flags={"lr": 1e-4},
        data=dataset.describe_data(pictures, pictures),
        origin=pictures.origin,
        outputs={"best": Path("a/b.tar")},
        model=torch.nn.Linear(1000, 1000),
        machine=utils.Machine(torch.device("cpu"), [], "fp32", 0, 2),
        board=None,
    )
    assert "1,201 training pictures and 1,201 validation pictures of 120 classes" in text and "as in a/lists" in text
    assert (
        "1.0 M parameters, 1.0 M of them trained" in text and "2 processes, fp32" in text and "a/b.tar (best)" in text
    )
