"""The README: its commands run as written, but for sizes that suit a test, and what it says of defaults is true."""

import re
import shlex
import subprocess
from pathlib import Path

import finetune
import numpy as np
import probe
import pytest
from conftest import ARCH, draw_image

import main
import pretrain
from data import small_dogs, stanford_dogs, toy_dogs
from dataset import read_image, read_list

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "tests" / "RESULTS.md").read_text()
SCRIPTS = {"pretrain.py": pretrain, "main.py": main, "tests/probe.py": probe, "tests/finetune.py": finetune}
BY_HAND = ("tests/benchmark.py", "tests/toy_table.py", "tests/plot.py", "tests/controls.py")
SHARED = ["--data_dir", "data/toy", "--save_dir", "saved", "--device", "cpu", "--num_workers", "0"]
SHARED += ["--batch_size", "4", "--epochs", "1", "--valid_size", "0.5"]
BACKBONE = ["--arch", ARCH, "--patch_size", "32", "--weights", "none"]
SIZES = {**dict.fromkeys(SCRIPTS, SHARED), "main.py": [*SHARED, "--n_samples", "2"]}
NETWORKS = {"pretrain.py": BACKBONE, "main.py": ["--rnn_hidden", "8", "--cells", "2"], "tests/probe.py": BACKBONE}
NETWORKS["tests/finetune.py"] = ["--arch", ARCH, "--image_size", "32", "--weights", "none"]


def blocks() -> list[str]:
    """The commands to type: the fenced blocks without a language."""
    return [text for language, text in re.findall(r"^```(\w*)\n(.*?)^```", PAGES, re.M | re.S) if not language]


def commands() -> list[list[str]]:
    """The commands in the README's blocks, in its order, as words."""
    lines = [
        line
        for line in "".join(blocks()).replace("\\\n", "").splitlines()
        if line.startswith(("python ", "torchrun ", "make "))
    ]
    return [shlex.split(line, comments=True) for line in lines]


def reads_its_checkpoint(words: list[str]) -> bool:
    """Whether these flags make a script read its own checkpoint, which determines the network."""
    tasks = [word.removeprefix("--task=") for word in words if word.startswith("--task")]
    return tasks not in ([], ["train"]) or any(word.startswith("--resume_training") for word in words)


def run_as_written(script: str, words: list[str]) -> None:
    """Run a command of the README, with sizes that suit a test added to its flags."""
    module, sizes = SCRIPTS[script], SIZES[script]
    module.make_parser().parse_args(words)
    if not reads_its_checkpoint(words):
        sizes = [*sizes, *NETWORKS[script], "--overwrite"]
    if "--backbone" in words:
        sizes = [*sizes, "--backbone", "saved/pt_glimpse_model.tar"]
    module.main([*words, *sizes])


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """In one folder, one after the other, as a reader would try them.

    torchrun, make and the download have tests of their own: of their commands, only flags and targets are checked.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "another.png"):
        draw_image(np.random.default_rng(0), 80, 60).save(name)
    Path("folder").mkdir()
    draw_image(np.random.default_rng(0), 80, 60).save("folder/third.webp")
    toy_dogs.main(["--data_dir", "data/toy", "--n_train", "32", "--n_test", "8", "--size", "64"])
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    n_run = 0
    for program, *words in commands():
        script = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
        if program == "make":
            assert words[0] in targets
        elif words[0] == "data/stanford_dogs.py":
            stanford_dogs.parse_args(words[1:])
        elif words[0] == "data/small_dogs.py":
            small_dogs.main([*words[1:], "--source", "data/toy", "--data_dir", "data/small", "--size", "64"])
        elif words[0] in BY_HAND:
            assert (ROOT / words[0]).exists()
        elif program == "torchrun" or "--gpus" in words:
            SCRIPTS[words[script]].make_parser().parse_args(words[script + 1 :])
        else:
            run_as_written(words[0], words[1:])
            n_run += 1
    [in_python] = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(in_python.replace("data/saved_models", "saved"), {})
    assert "tensor(" in capsys.readouterr().out.splitlines()[-1]
    drawings = {path.name for path in Path("imgs").iterdir()}
    tested = {f"{file.stem}.jpg" for file in read_list("data/toy", "test").files}
    assert len(drawings & tested) == 2
    assert drawings - tested == {"contact_sheet.jpg", "another.jpg", "photo.jpg", "third.jpg", "predictions.csv"}
    assert n_run >= 10


def test_defaults_that_differ_from_2018_are_those_of_the_flags() -> None:
    defaults = {**vars(pretrain.make_parser().parse_args([])), **vars(main.make_parser().parse_args([]))}
    named = re.findall(r"`--(\w+) ([^` ]+)`[^`(]*\(2018: ", README.replace("\n", " "))
    assert [name for name, _ in named] == ["supervision", "attention_lr", "lr_schedule"]
    for name, shown in named:
        assert type(defaults[name])(shown) == defaults[name], f"the default of --{name} is {defaults[name]}"


def test_birds_are_linked_into_folders_of_classes(tmp_path: Path) -> None:
    """CUB-200-2011, on two classes in its layout."""
    rows, split, boxes = [], [], []
    for name in ("001.Black_footed_Albatross", "002.Laysan_Albatross"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            draw_image(np.random.default_rng(i), 30, 20).save(tmp_path / "images" / name / f"{i}.jpg")
            rows.append(f"{len(rows) + 1} {name}/{i}.jpg")
            split.append(f"{len(rows)} {int(i < 3)}")
            boxes.append(f"{len(rows)} {i + 6}.0 2.0 12.0 10.0")  # left, top, width, height
    (tmp_path / "images.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "train_test_split.txt").write_text("\n".join(split) + "\n")
    (tmp_path / "bounding_boxes.txt").write_text("\n".join(boxes) + "\n")
    for _ in range(2):  # again does no harm
        subprocess.run(["sh", ROOT / "data" / "link_birds.sh", tmp_path], check=True)
    for part, n_images in (("train", 6), ("test", 2)):
        images = read_list(tmp_path, part)
        assert images.class_names == ["Black footed Albatross", "Laysan Albatross"]
        assert len(images.files) == n_images
        for file, annotation in zip(images.files, images.annotations):
            image, birds = read_image(file, 20, annotation)
            left = int(file.stem) + 6
            expected = [left / 30, 2 / 20, (left + 12) / 30, 12 / 20]
            assert image.size == (30, 20) and birds.squeeze(0).tolist() == pytest.approx(expected)


def anchors(page: Path) -> set[str]:
    """The names by which a link reaches the headings of a page."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "n_links"), [(ROOT / "README.md", 10), (ROOT / "tests" / "RESULTS.md", 1)])
def test_links_and_images_are_there(page: Path, n_links: int) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if not target.startswith("http")]
    assert len(targets) > n_links and local
    for target in local:
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target
