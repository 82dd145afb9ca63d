"""What users ask for: predictions in tables, progress that can be watched, useful help."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from types import ModuleType

import demo_figure
import numpy as np
import plot
import pytest
import torch
from conftest import ARCH, BACKBONE, SMALL, annotate, fails, fit, read_log, run, save_backbone, without_seconds
from matplotlib import pyplot
from PIL import Image

import dataset
import main
import pretrain
import utils
from model import Rollout

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--n_glimpses", "2"]


# --- pictures of logs


def test_learning_curves_are_drawn_from_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, log in (("a", "log.csv"), ("b", "pt_log.csv")):
        (tmp_path / name).mkdir()
        accuracy = "valid_accuracy" if log == "log.csv" else "valid_accuracy_123"
        rows = [f"epoch,train_loss,valid_nll,{accuracy}", "1,2.5,1.5,0.2", "2,1.5,1.1,0.6"]
        (tmp_path / name / log).write_text("\n".join(rows))
    out = tmp_path / "curves.png"
    plot.main(["curves", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    assert capsys.readouterr().out == f"curves drawn in {out}\n"
    with Image.open(out) as image:
        assert image.size[0] > 2 * image.size[1] and len(image.convert("RGB").getcolors(2**16)) > 50
    figure = pyplot.gcf()
    drawn = [[line.get_ydata() for line in panel.get_lines()] for panel in figure.axes]
    assert [[tuple(line) for line in panel] for panel in drawn] == [
        [(2.5, 1.5)] * 2,
        [(1.5, 1.1)] * 2,
        [(0.2, 0.6)] * 2,
    ]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        f"{tmp_path / 'a'}, classifier",
        f"{tmp_path / 'b'}, pre-training",
    ]
    with pytest.raises(SystemExit, match="no pt_log.csv or log.csv in"):
        plot.main(["curves", str(tmp_path)])


def test_rivals_are_drawn_from_what_tests_and_probes_wrote(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def write(path: Path, subject: str, figures: dict[str, tuple[float, int]], **settings: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: {"accuracy": x, "interval": [x - 0.1, x + 0.2]} for name, (x, _) in figures.items()}
        cost = {name: cost for name, (_, cost) in figures.items()}
        content = {"images": 50, "multiply_adds": cost, "figures": {subject: values, "glimpse 1": values}}
        content["backbone"] = {"arch": "resnet18", "patch_size": 32}
        path.write_text(json.dumps({**content, "settings": settings}))

    sizes = {"k": 1, "start_size": 2, "n_glimpses": 2, "classify_context": False}
    estimates = {"deterministic": (0.5, 3 * 10**9), "average of 7": (0.6, 9 * 10**9)}
    write(tmp_path / "1" / "results_learned.json", "policy learned", estimates, policy="learned", **sizes)
    write(
        tmp_path / "2" / "3" / "results_learned.json", "policy learned", estimates, policy="learned", **sizes | {"k": 2}
    )
    probe, context = {"arch": "resnet50", "weights": "a/b.pth", "patch_size": 96}, sizes | {"classify_context": True}
    write(tmp_path / "probe_96.json", "probe", {"linear probe": (0.3, 10**9)}, **probe)
    write(
        tmp_path / "4" / "results_grid.json", "policy grid", {"deterministic": (0.4, 10**9)}, policy="grid", **context
    )
    write(tmp_path / "pt_results.json", "heads", {"23": (0.2, 2 * 10**9)}, **probe)
    (tmp_path / "other.json").write_text("[]")
    plot.main(["rivals", str(tmp_path), "--out", str(tmp_path / "rivals.png")])
    assert capsys.readouterr().out.splitlines()[2:-1] == [
        "| grid, with context | k 1, start_size 2, 2 glimpses, resnet18 at 32 pixels | 1.0 | 40.0 | 30.0 to 60.0 |",
        "| heads of pre-training | head 23, resnet50 at 96 pixels | 2.0 | 20.0 | 10.0 to 40.0 |",
        "| learned | k 1, start_size 2, 2 glimpses, resnet18 at 32 pixels | 3.0 | 50.0 | 40.0 to 70.0 |",
        "| learned | k 2, start_size 2, 2 glimpses, resnet18 at 32 pixels | 3.0 | 50.0 | 40.0 to 70.0 |",
        "| learned, average of 7 | k 1, start_size 2, 2 glimpses, resnet18 at 32 pixels | 9.0 | 60.0 | 50.0 to 80.0 |",
        "| learned, average of 7 | k 2, start_size 2, 2 glimpses, resnet18 at 32 pixels | 9.0 | 60.0 | 50.0 to 80.0 |",
        "| linear probe, weights b | whole image, resnet50 at 96 pixels | 1.0 | 30.0 | 20.0 to 50.0 |",
    ]
    [panel] = pyplot.gcf().axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == [
        *("grid, with context", "heads of pre-training"),
        *("learned", "learned, average of 7", "linear probe, weights b"),
    ]
    labels = [text.get_text() for text in panel.texts]
    assert labels == ["(1, 2) x 2", "23", *(2 * ["(1, 2) x 2", "(2, 2) x 2"]), "96 px"]
    with Image.open(tmp_path / "rivals.png") as image:
        assert len(image.convert("RGB").getcolors(2**16)) > 50
    with pytest.raises(SystemExit, match="no results_"):
        plot.main(["rivals", str(tmp_path / "2" / "3" / "none")])


# --- output


def test_closed_output_ends_the_run_quietly(tmp_path: Path) -> None:
    """As that of `python main.py | head -1`; a pipe of another kind that breaks is an error like any other."""
    code = """
import torch, utils
machine = utils.Machine(torch.device("cpu"), [], "fp32", 0, 1)
def main():
    for i in range(10**6):
        machine.print(str(i))
utils.run(main)
"""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=Path(main.__file__).parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 141)

    def broken() -> None:
        raise BrokenPipeError("of a loader's worker")

    with pytest.raises(BrokenPipeError, match="of a loader's worker"):
        utils.run(broken)


# --- what is reported


def test_confused_classes_by_hand() -> None:
    names = ["cat", "dog", "cow"]
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([1, 1, 1, 0, 1, 0, 2])
    matrix = main.confusion_matrix(predictions, labels, 3)
    assert matrix.tolist() == [[1, 3, 0], [1, 1, 0], [0, 0, 1]]
    assert main.most_confused(matrix, names) == ["cat taken for dog: 3 of 4", "dog taken for cat: 1 of 2"]
    assert main.most_confused(main.confusion_matrix(labels, labels, 3), names) == []
    many = torch.arange(20)
    matrix = main.confusion_matrix(many.roll(1), many, 20)
    assert len(main.most_confused(matrix, [str(i) for i in range(20)])) == main.N_CONFUSED


def test_rewards_are_of_the_supervised_predictions() -> None:
    logits = torch.eye(3)[torch.tensor([[[0, 1], [1, 2]]])]  # one image, two trajectories: 0 then 1, and 1 then 2
    rollout = Rollout(logits, *(torch.zeros(1, 2, 2) for _ in range(4)))
    for supervision, wanted in (("each", [[0, 1], [1, 0]]), ("last", [[1, 1], [0, 0]])):
        assert main.rewards(rollout, torch.tensor([1]), supervision).tolist() == [wanted]


def test_choice_of_images_is_fixed() -> None:
    assert main.fixed_choice(50, 8, 0) == main.fixed_choice(50, 20, 0)[:8] != main.fixed_choice(50, 8, 1)
    assert sorted(main.fixed_choice(5, 8, 0)) == [0, 1, 2, 3, 4]


def test_tensorboard_shows_the_metrics_and_the_same_images(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A resumed run continues where the log ends."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    shared = ["--data_dir", str(own_data), "--save_dir", str(out), *SMALL]
    run(pretrain, [*shared, *BACKBONE, "--epochs", "1", "--tensorboard"])
    run(main, [*shared, *CLASSIFIER, "--epochs", "2", "--lr_schedule", "constant", "--tensorboard=True"])
    plain = without_seconds(read_log(out / "log.csv"))
    run(main, [*shared, *CLASSIFIER, "--epochs", "1", "--lr_schedule", "constant", "--tensorboard", "--overwrite"])
    run(main, [*shared, "--resume_training", "--epochs", "2", "--tensorboard"])
    assert without_seconds(read_log(out / "log.csv")) == plain  # neither drawing nor resuming changes anything
    assert f"tensorboard --logdir {out / 'tensorboard'}" in re.sub(r"\s+", " ", capsys.readouterr().out)
    for log in ("log", "pt_log"):
        board = events.EventAccumulator(str(out / "tensorboard" / log), size_guidance={"images": 0})
        board.Reload()
        rows = read_log(out / f"{log}.csv")
        columns = {"/".join(reversed(name.split("_", 1))): name for name in rows[0] if name != "epoch"}
        assert set(board.Tags()["scalars"]) == columns.keys() and {"loss/train", "nll/valid", "lr"} <= columns.keys()
        for tag, column in columns.items():
            scalars = board.Scalars(tag)
            assert [scalar.step for scalar in scalars] == [int(row["epoch"]) for row in rows]
            assert [s.value for s in scalars] == pytest.approx([float(row[column]) for row in rows], rel=1e-4)
        if log == "log":
            wanted = {"reward/train", "expected_reward/train", "lr/attention"}
            wanted |= {f"distance_from_center/{part}" for part in ("train", "valid")}
            assert wanted <= columns.keys()
            assert set(board.Tags()["images"]) == {f"validation/{i}" for i in range(5)}  # all that there are
            assert [image.step for image in board.Images("validation/0")] == [1, 2]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    argv = [*shared, *CLASSIFIER, "--epochs", "1", "--tensorboard", "--overwrite"]
    assert "pip install tensorboard" in fails(main, argv)


def test_progress_is_printed_where_there_is_no_terminal(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A line a minute, so none in a short run."""
    shared = ["--data_dir", str(own_data), "--save_dir", str(tmp_path), *SMALL, "--epochs", "1", "--overwrite"]
    save_backbone(tmp_path / "pt_glimpse_model.tar")
    run(main, [*shared, *CLASSIFIER])
    assert not re.search(r"\bstep\b|images/s", "".join(capsys.readouterr()))
    monkeypatch.setattr(utils, "SECONDS_PER_LINE", 0)
    run(main, [*shared, *CLASSIFIER])
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if ": step " in line]
    rest = r"\d+\.\d images/s, (\d\d:\d\d) left"
    titles = [rf"epoch 1/1: step {i} of 3, loss \d+\.\d{{3}}" for i in (1, 2, 3)]
    titles += [f"validation: step {i} of 2" for i in (1, 2)]
    left = [re.fullmatch(f"{title}, {rest}", line)[1] for title, line in zip(titles, lines, strict=True)]
    assert left[2] == left[4] == "00:00" and not printed.err
    run(main, [*fit(main, [*shared[:-3], "--task=test"]), "--n_trajectories", "1"])
    printed = capsys.readouterr().out
    assert "checking images: step 1 of 1, " in printed and "test: step 2 of 2, " in printed


# --- words


@pytest.mark.parametrize("script", [main, pretrain])
def test_help_is_in_groups_and_fits_the_terminal(
    script: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    lines = capsys.readouterr().out.replace(f",{ARCH}", "").splitlines()  # an architecture of the tests
    assert stop.value.code == 0 and max(map(len, lines)) <= 80
    groups = [line for line in lines if re.fullmatch(r"[a-z ]+:", line)]
    assert groups == ["options:", "task:", "data and files:", "training:", "machine:", "network:"]


def tasks_of(script: ModuleType) -> tuple[str, ...]:
    [task] = [field for field in fields(script.Settings) if field.name == "task"]
    return task.metadata["rules"]["one_of"]


def an_argument(field: Field) -> str:
    """A valid value for a flag."""
    if isinstance(field.default, Path | tuple):
        return "a"
    choices = field.metadata["rules"].get("one_of")
    return str(choices[0] if choices else field.default) or "0"


@pytest.mark.parametrize(
    ("script", "task"), [(script, task) for script in (main, pretrain) for task in tasks_of(script)]
)
def test_flags_without_effect_are_refused(script: ModuleType, task: str, capsys: pytest.CaptureFixture) -> None:
    refused = set()
    for field in fields(script.Settings):
        if field.name == "task":
            continue
        argv = [f"--task={task}", f"--{field.name}", an_argument(field)]
        if task in (field.metadata["tasks"] or [task]):
            assert utils.parse_flags(script.Settings, script.__doc__, argv).keys() == {"task", field.name}
        else:
            with pytest.raises(SystemExit) as stop:
                utils.parse_flags(script.Settings, script.__doc__, argv)
            assert stop.value.code == 2
            wanted = f"error: --{field.name} has no effect on --task={task}: leave it out\n"
            assert capsys.readouterr().err == wanted
            refused.add(field.name)
    training = {"epochs", "lr", "resume_training", "overwrite", "tensorboard"}
    assert refused >= training if task != "train" else not refused & {*training, "data_dir", "backbone", "weights"}
    assert not refused & {"device", "gpus", "precision", "save_dir"}
    for name, users in {
        "images": {"predict"},
        "imgs_dir": {"predict", "view_glimpses"},
        "n_trajectories": {"predict", "test"},
        "n_samples": {"view_glimpses"},
        "data_dir": {"train", "test", "probe", "view_glimpses"},
        "valid_size": {"train", "probe"},
        "batch_size": {"train", "test", "probe", "view_glimpses", "predict"},
        "skip_bad_images": {"train", "test", "probe"},
        "num_workers": {"train", "test", "probe"},
        "compile": {"train", "test", "view_glimpses", "predict"},
    }.items():
        if name in script.Settings.__dataclass_fields__:
            assert (name in refused) == (task not in users), name


@pytest.mark.parametrize("script", [main, pretrain])
def test_help_names_tasks_and_defaults(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out.partition("\noptions:")[2]
    sections = {name: part for name, part in re.findall(r"^  --(\w+)(.*?)(?=^ {1,2}-|^\S|\Z)", text, re.M | re.S)}
    assert sections.keys() == script.Settings.__dataclass_fields__.keys()
    for field in fields(script.Settings):
        part = " ".join(sections[field.name].split())
        tasks = [task for task in tasks_of(script) if task in field.metadata["tasks"]]
        of_some = tasks and len(tasks) < len(tasks_of(script))
        assert re.findall(r"\[([a-z_, ]+)\]$", part) == ([", ".join(tasks)] if of_some else []), part
        if isinstance(field.default, bool | tuple):
            assert "default" not in part
        else:
            [shown] = re.findall(r"\(default: (.*?)\)", part)
            assert field.default == "" or shown == str(field.default)


def named_values(tree: ast.AST) -> Iterator[tuple[object, ast.expr | None]]:
    """Defaults of parameters, entries of dicts and keyword arguments, by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            names = [argument.arg for argument in (*node.posonlyargs, *node.args)]
            yield from zip(names[len(names) - len(node.defaults) :], node.defaults)
            yield from zip([argument.arg for argument in node.kwonlyargs], node.kw_defaults)
        elif isinstance(node, ast.Dict):
            yield from zip([getattr(key, "value", None) for key in node.keys], node.values)
        elif isinstance(node, ast.keyword):
            yield node.arg, node.value


def test_defaults_are_written_once() -> None:
    """In the fields of the settings, from which flags, help, checks and checkpoints derive."""
    settings = {(field.name, field.default) for script in (main, pretrain) for field in fields(script.Settings)}
    for path in sorted(Path(main.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of_2018 = [node for node in tree.body if "BACKBONE_OF_2018" in ast.unparse(node).partition(" = ")[0]]
        exempt = [pair for node in of_2018 for pair in named_values(node)]  # of a file, whatever the defaults are
        for name, value in named_values(tree):
            if isinstance(value, ast.Constant) and (name, value) not in exempt:
                assert (name, value.value) not in settings, f"{path.name}: the default of {name} again"


def test_help_repeats_no_default_or_range_in_words() -> None:
    explained = {"epochs": {0}}  # what 0 does
    for script in (main, pretrain):
        for field in fields(script.Settings):
            limits = [field.default, *field.metadata["rules"].values()]
            known = {limit for limit in limits if type(limit) in (int, float)} - explained.get(field.name, set())
            numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", field.metadata["help"])}
            assert not known & numbers, f"--{field.name}: {field.metadata['help']}"


def test_next_command_keeps_the_folders() -> None:
    settings = main.Settings(data_dir=Path("my dogs"), lr=0.5)
    following = "next: python main.py --task=test --data_dir 'my dogs'"
    assert utils.next_command(settings, "main.py", "--task=test") == following
    assert utils.next_command(settings, "main.py", keep=["lr"]) == "next: python main.py --lr 0.5"


def test_a_run_is_described_in_a_few_short_lines(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(120)]
    assert utils.describe_classes(names) == "120 classes: class 0, class 1, class 2, ..., class 119"
    assert utils.describe_classes(["cat"]) == "1 class: cat"
    settings = main.Settings(save_dir=tmp_path / "a", lr=0.25)
    machine = utils.Machine(torch.device("cpu"), [], "fp32", 0, 2)
    data = {"class_names": names, "training_images": 1201, "validation_images": 1}
    training = utils.Run(settings, machine, main.FILES, "NLL", None)
    training.describe_origin(data=data)
    text = training.describe(torch.nn.Linear(1000, 1000), "as in a/lists")
    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) < 80
    text = re.sub(r"\s+", " ", text)  # it is wrapped
    assert "1,201 training images and 1 validation image of 120 classes" in text and "as in a/lists" in text
    assert "1.0 M parameters, 1.0 M of them trained" in text and "2 processes, fp32" in text
    assert "saved_model.tar (best)" in text and " lr=0.25 " in text and "n_trajectories" not in text


# --- the end of the demo


def test_demo_ends_with_its_figures_and_a_picture(
    make_data, save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data_dir = make_data(n_test=6)
    annotate(data_dir, {file: [(0, 0, 30, 40)] for file in dataset.read_list(data_dir, "test").files}, 60, 64)
    shared, untrained = ["--data_dir", str(data_dir), *SMALL], tmp_path / "untrained"
    backbone = ["--backbone", str(save_dir / "pt_glimpse_model.tar"), *CLASSIFIER]
    run(main, [*shared, *backbone, "--save_dir", str(untrained), "--epochs", "0"])
    run(main, [*shared, *backbone, "--save_dir", str(save_dir), "--epochs", "1"])
    for policy in demo_figure.POLICIES:
        run(main, [*shared, "--save_dir", str(save_dir), "--task=test", "--policy", policy])
    capsys.readouterr()
    out, folders = tmp_path / "imgs" / "demo.jpg", {"data_dir": data_dir, "untrained": untrained, "trained": save_dir}
    demo_figure.main([word for name, value in {**folders, "out": out}.items() for word in (f"--{name}", str(value))])
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert re.split("  +", header) == ["test set, in %", *demo_figure.COLUMNS] and last.endswith(f": {out}")
    for policy, row in zip(demo_figure.POLICIES, rows, strict=True):
        figures = json.loads((save_dir / f"results_{policy}.json").read_text())["figures"]
        values = [of_estimate["accuracy"] for of_estimate in figures[f"policy {policy}"].values()]
        hit_rate = figures["glimpse 1"]["sampled trajectory" if policy == "random" else "deterministic"]["hit_rate"]
        assert row.split() == [policy, *(f"{100 * value:.1f}" for value in [*values, hit_rate])]
    examples = demo_figure.draw_examples(data_dir, untrained, save_dir)
    assert list(examples) in (["before training", "after training", "a mistake"], ["before training", "after training"])
    with Image.open(out) as image:
        pixels, top = np.asarray(image).astype(int), 10
        for panel in examples.values():
            top += 26  # of the title
            assert np.abs(pixels[top : top + panel.height, 10 : 10 + panel.width] - panel).mean() < 4
            top += panel.height + 10
        assert (pixels[top + 26 :] < 128).any()  # the table
