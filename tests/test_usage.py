"""What users ask for: predictions in tables, progress that can be watched, useful help."""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import BACKBONE, SMALL, fails, flags_of, read_log, save_backbone, without_seconds

import dataset
import main
import pretrain
import utils
from model import Rollout

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--n_glimpses", "2"]


# --- what is reported


def test_rewards_are_of_the_supervised_predictions() -> None:
    logits = torch.eye(3)[torch.tensor([[[0, 1], [1, 2]]])]  # one image, two trajectories: 0 then 1, and 1 then 2
    rollout = Rollout(logits, *(torch.zeros(1, 2, 2) for _ in range(4)))
    for supervision, wanted in (("each", [[0, 1], [1, 0]]), ("last", [[1, 1], [0, 0]])):
        assert main.rewards(rollout, torch.tensor([1]), supervision).tolist() == [wanted]


def test_choice_of_images_is_fixed() -> None:
    assert main.fixed_choice(50, 8, 0) == main.fixed_choice(50, 20, 0)[:8] != main.fixed_choice(50, 8, 1)
    assert sorted(main.fixed_choice(5, 8, 0)) == [0, 1, 2, 3, 4]


def test_tensorboard_shows_the_metrics(own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run continues where the log ends."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    shared = ["--data_dir", str(own_data), "--save_dir", str(out), *SMALL]
    pretrain.main([*shared, *BACKBONE, "--epochs", "1", "--tensorboard"])
    main.main([*shared, *CLASSIFIER, "--epochs", "2", "--lr_schedule", "constant", "--tensorboard=True"])
    plain = without_seconds(read_log(out / "log.csv"))
    main.main([*shared, *CLASSIFIER, "--epochs", "1", "--lr_schedule", "constant", "--tensorboard", "--overwrite"])
    main.main([*shared, "--resume_training", "--epochs", "2", "--tensorboard"])
    assert without_seconds(read_log(out / "log.csv")) == plain  # neither logging nor resuming changes anything
    for log in ("log", "pt_log"):
        board = events.EventAccumulator(str(out / "tensorboard" / log))
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
            wanted |= {"distance_from_center/train", "distance_from_center_1/valid"}
            assert wanted <= columns.keys()

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    argv = [*shared, *CLASSIFIER, "--epochs", "1", "--tensorboard", "--overwrite"]
    assert fails(main, argv).startswith("error: import of torch.utils.tensorboard halted")


def test_progress_is_printed_where_there_is_no_terminal(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A line a minute, so none in a short run."""
    shared = ["--data_dir", str(own_data), "--save_dir", str(tmp_path), *SMALL, "--epochs", "1", "--overwrite"]
    save_backbone(tmp_path / "pt_glimpse_model.tar")
    main.main([*shared, *CLASSIFIER])
    assert "images/s" not in "".join(capsys.readouterr())
    monkeypatch.setattr(utils, "SECONDS_PER_LINE", 0)
    main.main([*shared, *CLASSIFIER])
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if "images/s" in line]
    steps = [rf"epoch 1/1: +\d+% {n}/9 .*, loss \d+\.\d{{3}}\]" for n in (4, 8, 9)]
    steps += [rf"validation: +\d+% {n}/5 .*\]" for n in (4, 5)]
    for step, line in zip(steps, lines, strict=True):
        assert re.fullmatch(step, line) and re.search(r"\[\d\d:\d\d<\d\d:\d\d, +\d+\.\d\d images/s", line), line
    assert "100%" in lines[2] and "100%" in lines[4] and not printed.err
    main.main([*shared, "--task=test", "--n_trajectories", "1"])
    assert re.search("^test: 100% 6/6 ", capsys.readouterr().out, re.M)


# --- words


def flags_by_name(script: ModuleType) -> dict[str, argparse.Action]:
    """All flags of a script but --help."""
    return {action.dest: action for action in script.make_parser()._actions if action.dest != "help"}


@pytest.mark.parametrize("script", [main, pretrain])
def test_help_shows_groups_defaults_and_commands(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text, (summary, *rest) = capsys.readouterr().out, script.__doc__.splitlines()
    assert stop.value.code == 0
    assert max(len(line) for line in text.splitlines() if line not in (summary, *rest)) <= 100
    groups = re.findall(r"^([a-z_, ]+):$", text, re.M)
    own = ["training of the classifier", "network", "test, view_glimpses and predict"]
    assert groups == ["options", "data and files", "training", "machine", *(own if script is main else ["network"])]
    flags, commands = text.partition("\noptions:")[2], "\n".join(rest)
    assert summary in text and flags.rstrip().endswith(commands.strip())
    assert commands.count(f"    python {script.__name__}.py") >= 4
    sections = {name: part for name, part in re.findall(r"^  --(\w+)(.*?)(?=^ {1,4}[-p]|^\S|\Z)", flags, re.M | re.S)}
    assert sections.keys() == flags_by_name(script).keys()
    for name, flag in flags_by_name(script).items():
        wanted = flag.help if "%(default)s" in flag.help else f"{flag.help}(default: %(default)s)"
        wanted %= {"default": flag.default}  # which may be broken at any space or hyphen
        assert flag.help and "".join(sections[name].split()).endswith("".join(wanted.split())), name


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
    """In the parsers, from which flags, help and what checkpoints store derive."""
    flags = {(name, flag) for script in (main, pretrain) for name, flag in flags_by_name(script).items()}
    defaults = {(name, flag.default) for name, flag in flags if not isinstance(flag.default, list)}
    for path in sorted(Path(main.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of_2018 = [node for node in tree.body if "BACKBONE_OF_2018" in ast.unparse(node).partition(" = ")[0]]
        exempt = [pair for node in of_2018 for pair in named_values(node)]  # of a file, whatever the defaults are
        for name, value in named_values(tree):
            if isinstance(value, ast.Constant) and (name, value) not in exempt:
                assert (name, value.value) not in defaults, f"{path.name}: the default of {name} again"


def test_help_repeats_no_default_in_words() -> None:
    for script in (main, pretrain):
        for name, flag in flags_by_name(script).items():
            numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", flag.help)}
            assert type(flag.default) not in (int, float) or flag.default not in numbers, f"--{name}: {flag.help}"


def test_a_run_is_described_in_three_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [f"class {i}" for i in range(120)]
    train = dataset.ImageList([Path()] * 1201, [0] * 1201, names, "as in a/lists")
    described = dataset.describe(train, train.subset([0]))
    assert described.startswith("1,201 training and 1 validation images of 120 classes: class 0, class 1, class 2, ")
    assert "2, ..., class 119" in described and "as in a/lists" in described
    cats = train._replace(class_names=["cat", "dog"])
    assert "2 classes: cat, dog;" in dataset.describe(cats, cats)
    args = flags_of(main, "--save_dir", str(tmp_path / "a"), "--lr", "0.25")
    machine = utils.Machine(torch.device("cpu"), [], "fp32", 0, 2)
    utils.print_opening(args, machine, torch.nn.Linear(1000, 1000), described)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["data", "network", "flags"] and lines[0].endswith(described)
    assert "1.0 M parameters, 1.0 M of them trained" in lines[1] and "processes: 2, fp32" in lines[1]
    assert " lr=0.25 " in lines[2] and "n_trajectories" not in lines[2]
