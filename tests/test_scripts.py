"""pretrain.py and main.py as a user runs them, on a few small pictures."""

import contextlib
import io
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_table
from conftest import (
    ARCH,
    BACKBONE,
    SMALL,
    draw_picture,
    fails,
    finish,
    read,
    read_log,
    same,
    save_backbone,
    start,
    write_list,
)
from PIL import Image
from scipy.io import loadmat

import dataset
import main
import pretrain
import utils
from model import PretrainNetwork, build_backbone, fold_batchnorm

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pretrain_args(make_data, tmp_path: Path) -> list[str]:
    folders = ["--data_dir", str(make_data()), "--save_dir", str(tmp_path / "out")]
    return [*folders, *SMALL, *BACKBONE]


@pytest.fixture
def main_args(make_data, save_dir: Path, tmp_path: Path) -> list[str]:
    folders = ["--data_dir", str(make_data()), "--save_dir", str(save_dir), "--imgs_dir", str(tmp_path / "imgs")]
    return [*folders, *SMALL]


MODEL = ["--rnn_hidden", "16", "--k", "2", "--start_size", "1", "--n_glimpses", "2", "--lr", "0.01"]


def refuses(script: Callable[[list[str]], None], argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The last line of argparse's complaint about a flag."""
    with pytest.raises(SystemExit) as stop:
        script(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# --- the whole way


def test_importing_does_nothing(tmp_path: Path) -> None:
    names = ["glimpse", "dataset", "model", "utils", "pretrain", "main", "data.stanford_dogs", "data.toy_dogs"]
    code = (
        "import os, random, torch, torchvision, torch.distributed, scipy.io, tqdm; before = dict(os.environ);"
        f"state = torch.get_rng_state(), random.getstate(); [__import__(name) for name in {names}];"
        "assert dict(os.environ) == before; assert random.getstate() == state[1];"
        "assert torch.equal(torch.get_rng_state(), state[0])"
    )
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_pretraining_then_every_task(pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pretrain.main([*pretrain_args, "--epochs", "2"])
    out = tmp_path / "out"
    best, last = read(out / "pt_glimpse_model.tar"), read(out / "pt_last.tar")
    assert best["model_dict"].keys() == build_backbone(ARCH).state_dict().keys()
    assert (best["arch"], best["patch_size"]) == (ARCH, 32) and last["epoch"] == 1
    rows = read_log(out / "pt_log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"] and max(float(row["valid_acc_123"]) for row in rows) == (
        pytest.approx(last["best_score"], rel=1e-5)
    )

    shared = [*pretrain_args[: -len(BACKBONE)], "--imgs_dir", str(tmp_path / "imgs")]
    capsys.readouterr()
    main.main([*shared, *MODEL, "--epochs", "2"])
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed and "saved_model.tar" in printed and printed.isascii()
    assert [row["epoch"] for row in read_log(out / "log.csv")] == ["1", "2"]

    main.main([*shared, "--task=test", "--n_trajectories=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("9 test pictures") and lines[1] == (
        f"3 classes: toy breed 1, toy breed 2, toy breed 3; split as in {shared[1]}/lists"
    )
    assert str(out / "predictions.csv") in lines[-2] and str(out / "per_class.csv") in lines[-2]
    assert lines[-1] == (
        f"next: python main.py --task=view_glimpses --data_dir {shared[1]} --save_dir {out}"  # what can be typed
    )
    assert [re.split("accuracy|off", line)[0].split() for line in lines[2:9]] == [
        ["policy", "learned", "deterministic"],
        ["policy", "learned", "one", "trajectory"],
        ["policy", "learned", "mean", "of", "3"],
        *(["glimpse", t, *kind] for t in "12" for kind in (["deterministic"], ["one", "trajectory"])),
    ]
    for policy, n_lines in (("learned", 3), ("center", 1), ("random", 2)):
        main.main([*shared, "--task=test", f"--policy={policy}"])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("policy")]
        assert len(lines) == n_lines and all(line.startswith(f"policy {policy}") for line in lines)
        rows = read_log(out / "predictions.csv")
        pictures = dataset.read_list(shared[1], "test")
        assert [Path(shared[1], row["file"]) for row in rows] == pictures.files
        assert [row["truth"] for row in rows] == [pictures.class_names[label] for label in pictures.labels]
        right = sum(row["truth"] == row["prediction"] for row in rows) / len(rows)
        assert f"accuracy {right:.4f} " in lines[-1] and all(0 < float(row["probability"]) <= 1 for row in rows)
        assert (policy == "center") == all(float(row["x_2"]) == float(row["y_2"]) == 0 for row in rows)

    main.main([*shared, "--task", "view_glimpses", "--n_samples", "4"])
    assert sorted(path.name for path in (tmp_path / "imgs").iterdir()) == [
        "contact_sheet.jpg",
        *(f"glimpse_{i}.jpg" for i in range(4)),
    ]
    picture = draw_picture(np.random.default_rng(5), 90, 70)
    picture.save(tmp_path / "photo.png")
    capsys.readouterr()
    main.main(
        [
            "--save_dir",
            str(out),
            "--imgs_dir",
            str(tmp_path / "imgs"),
            "--task=predict",
            "--images",
            str(tmp_path / "photo.png"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "photo.png" in lines[0] and len(lines) == 4  # there are three breeds to name
    assert sum(float(re.match(r"\s+([\d.]+)%", line)[1]) for line in lines[1:]) == pytest.approx(100, abs=0.2)
    assert Image.open(tmp_path / "imgs" / "predict_0_photo.jpg").width > 500


def test_both_scripts_learn_what_can_be_learned(make_data, save_dir: Path) -> None:
    """Breeds of one colour each, which both networks soon tell apart."""
    data_dir = make_data(n_train=12)
    for folder, color in zip(sorted((data_dir / "Images").iterdir()), ("red", "green", "blue")):
        for file in folder.iterdir():
            Image.new("RGB", (64, 64), color).save(file)
    shared = ["--data_dir", str(data_dir), "--save_dir", str(save_dir), *SMALL, "--lr", "0.001"]
    pretrain.main([*shared, *BACKBONE, "--epochs", "3"])
    assert read(save_dir / "pt_glimpse_model.tar")["accuracy"] > 0.9
    main.main([*shared, "--rnn_hidden", "16", "--k", "1", "--start_size", "2", "--epochs", "16"])
    assert read(save_dir / "saved_model.tar")["accuracy"] > 0.9


def test_heads_are_tested_as_they_were_saved(
    pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With heads that always answer 0, 1, 2 and 0, on a list of two, three and four pictures of these breeds."""
    pretrain.main([*pretrain_args, "--epochs", "1"])
    path, list_path = tmp_path / "out" / "pt_glimpse_model.tar", Path(pretrain_args[1]) / "lists" / "test_list.mat"
    checkpoint, names = read(path), [name.item() for name in loadmat(list_path)["file_list"].ravel()]
    assert (
        checkpoint["heads"].keys()
        == PretrainNetwork(backbone=build_backbone(ARCH), n_classes=3, patch_size=32).heads.state_dict().keys()
    )
    for head, answer in enumerate((0, 1, 2, 0)):
        checkpoint["heads"][f"{head}.3.bias"] = 1000 * torch.eye(3)[answer]
    torch.save(checkpoint, path)
    kept = [names[i] for i in (0, 1, 3, 4, 5, 6, 7, 8)] + [names[6].replace("test_0", "train_0")]
    write_list(list_path, kept, [1, 1, 2, 2, 2, 3, 3, 3, 3])
    given = [*pretrain_args[:-2], "--task=test"]  # which takes no --weights
    capsys.readouterr()
    pretrain.main(given)
    assert capsys.readouterr().out.splitlines() == [
        f"9 test pictures of {pretrain_args[1]}, backbone of epoch 1",
        "head 12   accuracy 0.2222",
        "head 13   accuracy 0.3333",
        "head 23   accuracy 0.4444",
        "head 123  accuracy 0.2222",
        f"next: python main.py --data_dir {pretrain_args[1]} --save_dir {tmp_path / 'out'}",
    ]
    assert "--resume_training" in refuses(pretrain.main, ["--task=test", "--resume_training"], capsys)
    assert "--weights" in refuses(pretrain.main, [*given, "--weights", "none"], capsys)
    assert "--arch" in fails(pretrain.main, [*given, "--arch", "resnet34"])
    torch.save({**checkpoint, "arch": "resnet1"}, path)
    assert "describes no network" in fails(pretrain.main, [*pretrain_args[:-6], "--task=test"])
    torch.save({key: value for key, value in checkpoint.items() if key != "heads"}, path)  # one of 2018 has no heads
    assert "no entry heads" in fails(pretrain.main, given)
    torch.save({**checkpoint, "data": {"class_names": ["cat"]}}, path)
    assert "other classes" in fails(pretrain.main, given)


def test_probe_is_the_optimum_and_reads_what_is_there(make_data, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=generator), torch.randint(3, (40,), generator=generator)
    probe = pretrain.fit_probe(features, labels, 3, weight_decay=0.1)
    # Where the gradient vanishes: the sum over samples of (p - y) x / N balances the pull to zero of the weights.
    excess = (probe(features).softmax(-1) - torch.eye(3)[labels]) / 40
    assert torch.allclose(excess.T @ features + 0.1 * probe.weight, torch.zeros(3, 5), atol=1e-4)
    assert torch.allclose(excess.sum(0), torch.zeros(3), atol=1e-4)

    data_dir = make_data(n_train=12, n_test=8)
    for folder, color in zip(sorted((data_dir / "Images").iterdir()), ("red", "green", "blue")):
        for file in folder.iterdir():
            Image.new("RGB", (64, 64), color).save(file)
    pretrain.main(["--data_dir", str(data_dir), "--save_dir", str(tmp_path / "out"), *SMALL, *BACKBONE, "--task=probe"])
    *_, accuracy, following = capsys.readouterr().out.splitlines()
    assert accuracy == "test accuracy 1.0000" and following.startswith("next: python pretrain.py --data_dir ")
    assert not (tmp_path / "out").exists()
    list_path = data_dir / "lists" / "test_list.mat"
    names = [name.item() for name in loadmat(list_path)["file_list"].ravel()]
    write_list(list_path, names[:8], [1] * 8)
    message = fails(pretrain.main, ["--data_dir", str(data_dir), *SMALL, *BACKBONE, "--task=probe"])
    assert "name other classes" in message


def test_untrained_classifier_and_backbone_of_another_folder(
    main_args: list[str], save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (save_dir / "pt_glimpse_model.tar").rename(tmp_path / "backbone.tar")
    assert "--backbone" in fails(main.main, [*main_args, *MODEL])
    given = [*main_args, *MODEL, "--backbone", str(tmp_path / "backbone.tar")]
    main.main([*given, "--epochs", "0"])
    untrained = read(save_dir / "saved_model.tar")
    assert "saved_model.tar would be lost" in fails(main.main, [*given, "--epochs", "0"])
    assert untrained["epoch"] == -1 and not (save_dir / "last.tar").exists()
    capsys.readouterr()
    main.main([*main_args, "--task=test"])
    assert "classifier of epoch 0" in capsys.readouterr().out
    for task in ("--task=test", "--resume_training"):
        assert "--backbone" in refuses(main.main, [*main_args, task, "--backbone", "a.tar"], capsys)
    main.main([*given, "--epochs", "1"])
    trained = read(save_dir / "saved_model.tar")
    assert (trained["model_dict"]["locate.first.weight"] != untrained["model_dict"]["locate.first.weight"]).any()
    main.main([*main_args, "--resume_training", "--epochs", "0"])  # there is nothing left to do, nor to overwrite
    assert same(read(save_dir / "saved_model.tar"), trained)


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_batches_of_one_and_ragged_batches(main_args: list[str], save_dir: Path, batch_size: str) -> None:
    """A bare squeeze crashed the 2018 code on a batch of one picture; 12 training pictures leave 2 after two fives."""
    main.main([*main_args, *MODEL, "--batch_size", batch_size, "--epochs", "1"])
    main.main([*main_args, "--task=test", "--batch_size", batch_size])
    assert read(save_dir / "last.tar")["epoch"] == 0


def test_pretraining_survives_a_ragged_batch_of_one(pretrain_args: list[str], tmp_path: Path) -> None:
    pretrain.main([*pretrain_args, "--batch_size", "11", "--epochs", "1"])  # 12 training pictures
    assert read(tmp_path / "out" / "pt_last.tar")["epoch"] == 0


def test_every_policy_trains(main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture) -> None:
    for policy in ("center", "random"):
        main.main([*main_args, *MODEL, "--policy", policy, "--epochs", "1"])
        assert read(save_dir / "saved_model.tar")["policy"] == policy
        capsys.readouterr()
        main.main([*main_args, "--task=test"])  # with the policy that it was trained with
        assert f"policy {policy}" in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])
def test_2018_checkpoint_is_accepted(zipped: bool, make_data, tmp_path: Path) -> None:
    """It holds the weights of a resnet50 at 96 pixels under model_dict, and nothing else.

    Early PyTorch did not zip its files, nor count batches in BatchNorm.
    """
    state = build_backbone("resnet50").state_dict()
    if not zipped:
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    path = tmp_path / "pt_glimpse_model.tar"
    torch.save({"model_dict": state}, path, _use_new_zipfile_serialization=zipped)
    folders = ["--data_dir", str(make_data(n_train=2, n_classes=2)), "--save_dir", str(tmp_path)]
    main.main([*folders, *SMALL, "--epochs", "1", "--rnn_hidden", "8", "--k", "1", "--start_size", "4"])
    made = read(tmp_path / "saved_model.tar")
    assert (made["arch"], made["patch_size"]) == ("resnet50", 96)


def test_backbone_in_the_checkpoint_is_the_pretrained_one(main_args: list[str], save_dir: Path) -> None:
    main.main([*main_args, *MODEL, "--epochs", "2"])
    backbone = build_backbone(ARCH)
    backbone.load_state_dict(read(save_dir / "pt_glimpse_model.tar")["model_dict"])
    before, after = fold_batchnorm(backbone).state_dict(), read(save_dir / "last.tar")["model_dict"]
    assert all(torch.equal(value, after[f"glimpse.backbone.{key}"]) for key, value in before.items())


def test_best_checkpoints_are_of_the_best_epoch(main_args: list[str], pretrain_args: list[str], save_dir: Path) -> None:
    out = Path(pretrain_args[3])
    pretrain.main([*pretrain_args, "--epochs", "3", "--lr", "0.01"])
    main.main([*main_args, *MODEL, "--epochs", "4"])
    for best, log, column in (
        (out / "pt_glimpse_model.tar", out / "pt_log.csv", "valid_acc_123"),
        (save_dir / "saved_model.tar", save_dir / "log.csv", "valid_probability"),
    ):
        found, rows = [float(row[column]) for row in read_log(log)], read_log(log)
        assert read(best)["epoch"] == found.index(max(found))
        accuracy = rows[read(best)["epoch"]]["valid_acc_123" if log.name == "pt_log.csv" else "valid_accuracy"]
        assert read(best)["accuracy"] == pytest.approx(float(accuracy), rel=1e-5)


def test_best_classifier_is_the_surest_of_the_truth(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy of a few pictures is a poor judge: here it is the same in all epochs."""
    surest = iter((0.4, 0.8, 0.6))
    real = main.evaluate

    def evaluate(*given: object) -> main.Answers:
        answers, probability = real(*given), next(surest)
        probabilities = torch.full_like(answers.probabilities, (1 - probability) / 2)
        probabilities[torch.arange(len(answers.labels)), :, answers.labels] = probability
        return answers._replace(probabilities=probabilities)

    monkeypatch.setattr(main, "evaluate", evaluate)
    main.main([*main_args, *MODEL, "--epochs", "3"])
    best = read(save_dir / "saved_model.tar")
    assert best["epoch"] == 1 and best["accuracy"] == 1
    assert [float(row["valid_probability"]) for row in read_log(save_dir / "log.csv")] == [0.4, 0.8, 0.6]


def test_view_glimpses_draws_the_deterministic_trajectory(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2018 code drew boxes at a location averaged over ten sampled trajectories."""
    main.main([*main_args, *MODEL, "--epochs", "1"])
    drawn = []
    real = main.draw_panel
    monkeypatch.setattr(main, "draw_panel", lambda *given: drawn.append(given) or real(*given))
    main.main([*main_args, "--task=view_glimpses", "--n_samples", "5"])
    checkpoint = read(save_dir / "saved_model.tar")
    net = main.build_model(checkpoint, 3, save_dir).eval()
    net.load_state_dict(checkpoint["model_dict"])
    assert len(drawn) == 5 and len({caption for *_, caption, _ in drawn}) > 1
    for canvas, location, attention, scales, patch_size, caption, answers in drawn:
        rollout = net(canvas.unsqueeze(0), torch.zeros(1, 1, 2, 2))
        assert torch.allclose(location, rollout.location[0, 0], atol=1e-5) and (scales, patch_size) == ((1, 2), 32)
        assert torch.allclose(attention, rollout.attention[0, 0], atol=1e-5)
        probabilities = rollout.logits[0, 0].softmax(-1)  # [T, C]
        said = [f"toy breed {p.argmax() + 1} ({p.max():.2f})" for p in probabilities]
        assert answers == said  # after each glimpse
        predicted, true = re.fullmatch(r"predicted (.*), true (.*)", caption).groups()
        truth = int(re.fullmatch(r"toy breed (\d) \([01]\.\d\d\)", true)[1])
        assert predicted == said[-1] and true == f"toy breed {truth} ({probabilities[-1, truth - 1]:.2f})"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_checkpoint_opens_without_one(main_args: list[str], save_dir: Path) -> None:
    """As the 2018 files did not."""
    words = [word for word in main_args if word not in ("--device", "cpu")]
    main.main([*words, *MODEL, "--epochs", "1", "--device", "cuda"])
    assert not any(value.is_cuda for value in read(save_dir / "saved_model.tar")["model_dict"].values())
    main.main([*main_args, "--resume_training", "--epochs", "2"])


def test_training_opens_no_test_picture(pretrain_args: list[str], main_args: list[str], make_data) -> None:
    """The 2018 code validated on the test list. Here it is not even read: without it, training runs all the same."""
    data_dir = Path(main_args[1])
    for file in (data_dir / "Images").glob("*/test_*.jpg"):
        file.write_text("whoever opens this fails")
    (data_dir / "lists" / "test_list.mat").write_text("whoever reads this fails")
    pretrain.main([*pretrain_args, "--epochs", "1"])
    main.main([*main_args, *MODEL, "--epochs", "1"])
    assert "test_list.mat cannot be read" in fails(main.main, [*main_args, "--task=test"])


@pytest.mark.parametrize(
    ("policy", "num_workers"),
    [
        ("learned", "2"),
        ("random", "0"),
        pytest.param("learned", "0", marks=pytest.mark.slow),
        pytest.param("random", "2", marks=pytest.mark.slow),
        pytest.param("center", "0", marks=pytest.mark.slow),
        pytest.param("center", "2", marks=pytest.mark.slow),
    ],
)
def test_resumed_training_is_the_uninterrupted_one(
    main_args: list[str], save_dir: Path, policy: str, num_workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main_args = [*main_args, "--num_workers", num_workers]
    flags = [*main_args, *MODEL, "--policy", policy]
    main.main([*flags, "--epochs", "4"])
    straight, log = read(save_dir / "last.tar"), (save_dir / "log.csv").read_text()
    best = read(save_dir / "saved_model.tar")

    def interrupt(machine: utils.Machine, text: str) -> None:
        if text.startswith("epoch 2/4"):  # the line that ends the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils.Machine, "say", interrupt)
        main.main([*flags, "--epochs", "4"])
    assert read(save_dir / "last.tar")["epoch"] == 1
    main.main([*main_args, "--lr", "0.01", "--epochs", "4", "--resume_training=True"])  # architecture from the file
    assert same(straight, read(save_dir / "last.tar")) and log == (save_dir / "log.csv").read_text()
    assert same(best, read(save_dir / "saved_model.tar"))


@pytest.mark.parametrize("num_workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_resumed_pretraining_is_the_uninterrupted_one(
    num_workers: str, pretrain_args: list[str], tmp_path: Path
) -> None:
    out, pretrain_args = tmp_path / "out", [*pretrain_args, "--num_workers", num_workers]
    pretrain.main([*pretrain_args, "--epochs", "2"])
    straight, log = read(out / "pt_last.tar"), (out / "pt_log.csv").read_text()
    pretrain.main([*pretrain_args, "--epochs", "1"])
    pretrain.main([*pretrain_args, "--epochs", "2", "--resume_training"])
    assert same(straight, read(out / "pt_last.tar")) and log == (out / "pt_log.csv").read_text()


# --- several processes


@pytest.fixture
def run_by_two(tmp_path: Path) -> Callable[[str, list[str]], str]:
    """Runs a script in two processes, with what torchrun tells them, and returns what they print."""

    def run(script: str, argv: list[str]) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        printed = [tmp_path / f"printed_{rank}.txt" for rank in "01"]
        started = [start(script, argv, path, RANK=rank, LOCAL_RANK=rank, **shared) for rank, path in zip("01", printed)]
        assert [finish(process) for process in started] == [0, 0], [path.read_text() for path in printed]
        return "".join(path.read_text() for path in printed)

    return run


def test_two_processes_train_and_evaluate_as_one(
    main_args: list[str], save_dir: Path, run_by_two, capsys: pytest.CaptureFixture
) -> None:
    """A single process loads the checkpoint, and its figures are the same."""
    flags = [*main_args, *MODEL, "--n_glimpses", "1", "--epochs", "2"]
    assert run_by_two("main", flags).count("epoch 2/2") == 1
    logs = [read_log(save_dir / "log.csv")]
    tested = run_by_two("main", [*main_args, "--task=test"])
    main.main([*main_args, "--task=test"])
    assert tested == capsys.readouterr().out and "9 test pictures" in tested  # dealt out as 5 and 4
    main.main(flags)
    logs.append(read_log(save_dir / "log.csv"))
    for together, alone in zip(*logs, strict=True):
        together, alone = ({name: float(value) for name, value in row.items()} for row in (together, alone))
        assert together == pytest.approx(alone, abs=2e-3)  # Adam's first steps magnify rounding


def test_two_processes_do_not_wait_for_unused_attention(main_args: list[str], save_dir: Path) -> None:
    """With a fixed policy the location network has no gradient (and with one glimpse, above, a part of it has none).

    By torchrun itself.
    """
    save_backbone(save_dir / "pt_glimpse_model.tar", "resnet18")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--rnn_hidden", "16", "--k", "1", "--start_size", "4", "--policy", "center", "--epochs", "2"]
    done = subprocess.run([*launch, str(ROOT / "main.py"), *main_args, *flags], capture_output=True, text=True)
    assert done.returncode == 0 and read(save_dir / "last.tar")["epoch"] == 1, done.stderr


def test_two_processes_pretrain_what_they_validate(pretrain_args: list[str], run_by_two, tmp_path: Path) -> None:
    """Each process has BatchNorm statistics of its own after a step; the figures must be those of the file saved."""
    out = tmp_path / "out"
    run_by_two("pretrain", [*pretrain_args, "--epochs", "1"])
    row = read_log(out / "pt_log.csv")[0]
    machine = utils.set_up_machine("cpu", None, "fp32")
    net = PretrainNetwork(backbone=build_backbone(ARCH), n_classes=3, patch_size=32)
    net.load_state_dict(read(out / "pt_last.tar")["model_dict"])
    loading = {"canvas_size": 128, "batch_size": 4, "num_workers": 0}
    lists = dataset.split_list(dataset.read_list(pretrain_args[1], "train"), 0.3)
    _, loader = dataset.make_training_loaders(*lists, seed=0, rank=0, world_size=1, drop_last=True, **loading)
    alone = pretrain.evaluate(utils.wrap(net, machine), loader, machine, "")
    for name, value in alone.items():
        assert float(row[f"valid_{name}"]) == pytest.approx(value, rel=1e-4)


def test_batches_that_cannot_be_shared_out(pretrain_args: list[str], make_data) -> None:
    machine = utils.Machine(torch.device("cpu"), [], "fp32", 0, 3)
    with pytest.raises(utils.UserError, match="--batch_size 7 is not a multiple of the 3 processes"):
        machine.loading(7, 0)
    assert "--batch_size 1 leaves one picture" in fails(pretrain.main, [*pretrain_args, "--batch_size", "1"])
    pictures = dataset.read_list(make_data(), "test")
    with pytest.raises(dataset.DataError, match="more processes than pictures"):
        dataset.make_loader(pictures, range(20, 9, 21), canvas_size=32, batch_size=4, num_workers=0)


def test_threads_of_data_parallel_compute_in_bfloat16() -> None:
    """A thread that only knows that autocast is on would compute in float16 on a GPU."""
    machine = utils.Machine(torch.device("cpu"), [], "bf16", 0, 1)
    net = utils.wrap(torch.nn.Linear(3, 2), machine)
    types = []
    threads = [threading.Thread(target=lambda: types.append(net(torch.ones(1, 3)).dtype)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert types == [torch.bfloat16] * 2


# --- what goes wrong


def test_flags_are_refused_by_name(capsys: pytest.CaptureFixture) -> None:
    for script, flag, value in (
        (pretrain.main, "--patch_size", "48"),
        (pretrain.main, "--patch_size", "0"),
        (pretrain.main, "--valid_size", "1"),
        (pretrain.main, "--valid_size", "0"),
        (pretrain.main, "--valid_size", "nan"),
        (pretrain.main, "--lr", "-1"),
        (pretrain.main, "--batch_size", "-4"),
        (pretrain.main, "--seed", str(2**64)),
        (pretrain.main, "--arch", "vgg16"),
        (pretrain.main, "--resume_training", "maybe"),
        (main.main, "--batch_size", "0"),
        (main.main, "--k", "two"),
        (main.main, "--std_dev", "0"),
        (main.main, "--epochs", "1.5"),
        (main.main, "--n_samples", "0"),
        (main.main, "--num_workers", "-1"),
        (main.main, "--gpus", "0,00"),
        (main.main, "--gpus", "first"),
        (main.main, "--policy", "best"),
        (main.main, "--seed", "-1"),
        (main.main, "--epochs", "-1"),
        (pretrain.main, "--epochs", "0"),
        (main.main, "--attention_lr", "0"),
        (main.main, "--lr_schedule", "linear"),
        (main.main, "--supervision", "first"),
    ):
        assert flag in refuses(script, [flag, value], capsys)
    assert "--images" in refuses(main.main, ["--task=predict"], capsys)
    assert "--images" in refuses(main.main, ["--images", "a.jpg"], capsys)
    assert "--resume_training" in refuses(main.main, ["--task=test", "--resume_training"], capsys)
    assert "--no_such_flag" in refuses(main.main, ["--no_such_flag"], capsys)
    assert "--n_glimps" in refuses(main.main, ["--n_glimps", "2"], capsys)  # no abbreviations


def test_spellings_of_flags() -> None:
    for words, value in (([], False), (["--resume_training"], True), (["--resume_training=True"], True)):
        assert main.parse_args(words).resume_training is value
    assert main.parse_args(["--resume_training", "false"]).resume_training is False
    assert main.parse_args(["--k=3"]).k == main.parse_args(["--k", "3"]).k == 3
    assert main.parse_args(["--gpus", "0,2"]).gpus == [0, 2]


def test_bad_data_ends_with_one_line(main_args: list[str], tmp_path: Path) -> None:
    data_dir = Path(main_args[1])
    elsewhere = [*main_args, "--data_dir", str(tmp_path / "nowhere")]
    for script in (pretrain.main, main.main):
        assert "data/toy_dogs.py" in fails(
            script, elsewhere[:2] + elsewhere[-2:] if script is pretrain.main else elsewhere
        )
    victim = sorted((data_dir / "Images").glob("*/train_*.jpg"))[3]
    victim.write_bytes(b"no picture")
    for workers in ("0", "1"):
        message = fails(main.main, [*main_args, *MODEL, "--epochs", "1", "--num_workers", workers])
        assert message.startswith(f"error: picture {victim} cannot be read")
    victim.unlink()
    assert f"1 of the 18 pictures in {data_dir}" in fails(main.main, [*main_args, *MODEL])


def test_scales_gpus_and_contradictions(main_args: list[str], save_dir: Path) -> None:
    assert "k 2 with start_size 4" in fails(main.main, [*main_args, "--k", "2", "--start_size", "4"])
    assert "--gpus" in fails(main.main, [*main_args, "--gpus", "0"])  # main_args says --device cpu
    missing = str(torch.cuda.device_count())
    words = [word for word in main_args if word not in ("--device", "cpu")]
    assert f"GPU {missing} not found" in fails(main.main, [*words, "--device", "cuda", "--gpus", missing])
    main.main([*main_args, *MODEL, "--epochs", "1"])
    for flag, value in (("--k", "1"), ("--start_size", "2"), ("--n_glimpses", "1"), ("--rnn_hidden", "8")):
        for task in ("--task=test", "--task=view_glimpses", "--resume_training"):
            assert flag in fails(main.main, [*main_args, task, flag, value])
    for flag, value in (("--seed", "1"), ("--std_dev", "0.3"), ("--policy", "center")):
        assert flag in fails(main.main, [*main_args, "--resume_training", flag, value])
    assert "training pictures differ" in fails(main.main, [*main_args, "--resume_training", "--valid_size", "0.5"])
    read(save_dir / "last.tar")  # nothing was damaged


def test_pretraining_is_resumed_as_it_was(
    pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrain.main([*pretrain_args, "--epochs", "1"])
    for flag, value in (("--arch", "resnet34"), ("--patch_size", "64"), ("--seed", "1")):
        assert flag in fails(pretrain.main, [*pretrain_args, "--resume_training", flag, value])
    path = tmp_path / "out" / "pt_last.tar"
    pretrain.main([*pretrain_args, "--resume_training"])
    assert "1 epoch of 1 done" in capsys.readouterr().out
    pretrain.main([*pretrain_args, "--resume_training", "--epochs", "2", "--lr", "0.5"])
    last = read(path)
    assert last["lr"] == last["optimizer"]["param_groups"][0]["lr"] == 0.5
    path.write_bytes(path.read_bytes()[:5000])
    assert "pt_last.tar cannot be read" in fails(pretrain.main, [*pretrain_args, "--resume_training"])


def test_backbone_never_saw_the_validation_pictures(pretrain_args: list[str], tmp_path: Path) -> None:
    """Both scripts split the list alike, whatever the seed; another --valid_size would mix the parts."""
    pretrain.main([*pretrain_args, "--epochs", "1"])
    shared = ["--data_dir", pretrain_args[1], "--save_dir", str(tmp_path / "out"), *SMALL, *MODEL, "--epochs", "1"]
    splits = []
    with pytest.MonkeyPatch.context() as patch:
        for script in (pretrain, main):
            patch.setattr(script, "split_list", lambda *given: splits.append(dataset.split_list(*given)) or splits[-1])
        pretrain.main([*pretrain_args, "--epochs", "1"])
        main.main([*shared, "--seed", "3"])
    assert len(splits) == 2 and splits[0] == splits[1]
    assert "--valid_size" in fails(main.main, [*shared, "--valid_size", "0.5"])


def test_learning_rate_and_batch_size_may_change_on_resuming(main_args: list[str], save_dir: Path) -> None:
    main.main([*main_args, *MODEL, "--epochs", "1"])
    resume = [*main_args[:6], "--valid_size", "0.3", "--num_workers", "0", "--device", "cpu", "--resume_training"]
    main.main([*resume, "--epochs", "2", "--lr_schedule", "constant"])
    last = read(save_dir / "last.tar")
    assert (last["lr"], last["attention_lr"], last["batch_size"]) == (0.01, 1e-4, 4)
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [0.01, 1e-4]
    main.main([*resume, "--epochs", "3", "--lr", "0.5", "--attention_lr", "0.2", "--batch_size", "6"])
    last = read(save_dir / "last.tar")
    assert (last["lr"], last["attention_lr"], last["batch_size"]) == (0.5, 0.2, 6)
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [0.5, 0.2]


def test_cosine_schedule(main_args: list[str], save_dir: Path) -> None:
    rates = [main.learning_rate(0.1, "cosine", epoch, 4) for epoch in range(4)]
    assert rates == pytest.approx([0.1, 0.1 * (2 + 2**0.5) / 4, 0.05, 0.1 * (2 - 2**0.5) / 4])
    assert main.learning_rate(0.1, "constant", 3, 4) == 0.1
    main.main([*main_args, *MODEL, "--epochs", "2"])  # half way down in the second epoch
    groups = read(save_dir / "last.tar")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.005, 5e-5])


def test_foreign_log_is_left_alone(
    main_args: list[str], pretrain_args: list[str], save_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for script, path, flags in (
        (main.main, save_dir / "log.csv", [*main_args, *MODEL]),
        (pretrain.main, tmp_path / "out" / "pt_log.csv", pretrain_args),
    ):
        path.write_text("a,b\n1,2\n")
        assert f"{path} is no metrics log" in fails(script, flags)
        assert path.read_text() == "a,b\n1,2\n"


def test_bad_checkpoints_end_with_one_line(main_args: list[str], pretrain_args: list[str], save_dir: Path) -> None:
    assert "saved_model.tar not found" in fails(main.main, [*main_args, "--task=test"])
    assert "last.tar not found" in fails(main.main, [*main_args, "--resume_training"])
    assert "pt_last.tar not found" in fails(pretrain.main, [*pretrain_args, "--resume_training"])
    assert "gone.pth not found" in fails(pretrain.main, [*pretrain_args, "--weights", str(save_dir / "gone.pth")])
    for name, task in (("saved_model.tar", "--task=test"), ("last.tar", "--resume_training")):
        (save_dir / name).write_bytes(b"PK not really")
        assert f"{name} cannot be read" in fails(main.main, [*main_args, task])
        torch.save({"model_dict": {}}, save_dir / name)
        assert f"{name} is not a checkpoint of the expected kind" in fails(main.main, [*main_args, task])
    path = save_dir / "pt_glimpse_model.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "pt_glimpse_model.tar cannot be read" in fails(main.main, [*main_args])
    path.write_bytes(b"")
    assert "pt_glimpse_model.tar cannot be read" in fails(main.main, [*main_args])
    torch.save({"model_dict": {}, "arch": "resnet1"}, path)
    assert "describes no network" in fails(main.main, [*main_args])
    torch.save({"weights": 1}, path)
    assert "no entry model_dict" in fails(main.main, [*main_args])
    torch.save({"model_dict": {"0.weight": torch.zeros(3)}}, path)
    assert "does not fit" in fails(main.main, [*main_args])
    assert "does not fit" in fails(pretrain.main, [*pretrain_args, "--weights", str(path)])
    path.unlink()
    assert "python pretrain.py" in fails(main.main, [*main_args])


def test_failed_saving_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.tar"
    utils.save_checkpoint(path, {"epoch": 0})
    with pytest.raises(Exception, match="pickle"):
        utils.save_checkpoint(path, {"epoch": lambda: None})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(utils.UserError, match=r"cannot write .*last.tar .*No space left.*earlier files are intact"):
        utils.save_checkpoint(path, {"epoch": 1})
    assert read(path) == {"epoch": 0} and list(tmp_path.iterdir()) == [path]


def test_saving_where_nothing_can_be_written(pretrain_args: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another" in fails(pretrain.main, [*pretrain_args, "--save_dir", str(tmp_path / "file" / "below")])


def test_metrics_log_replaces_what_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for epoch, value in ((0, 1), (1, 2), (2, 3), (1, 4)):
        utils.log_metrics(path, epoch, train={"loss": value})
    assert path.read_text().split() == ["epoch,train_loss", "1,1", "2,4"]


def test_kinds_of_trajectories() -> None:
    probabilities = torch.eye(4).expand(3, 4, 4)  # trajectory m of each picture is sure of class m
    learned = main.by_kind(probabilities, "learned")
    assert list(learned) == ["deterministic", "one trajectory", "mean of 3"]
    assert torch.equal(learned["deterministic"], probabilities[:, :1])
    assert torch.equal(learned["one trajectory"], probabilities[:, 1:])
    assert torch.allclose(learned["mean of 3"], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]).expand(3, 1, 4))
    assert list(main.by_kind(probabilities, "random")) == ["one trajectory", "mean of 4"]
    assert list(main.by_kind(probabilities[:, :1], "center")) == ["deterministic"]
    learned, random = (main.evaluation_noise(policy, 5, 7, 2, seed=0) for policy in ("learned", "random"))
    assert learned.shape == (5, 8, 2, 2) and (learned[:, 0] == 0).all() and (learned[:, 1:] != 0).all()
    assert torch.equal(random, learned[:, 1:]) and main.evaluation_noise("center", 5, 7, 2, seed=0).shape == (
        5,
        1,
        2,
        2,
    )


def test_test_reports_the_gaze_where_boxes_are_known(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    main.main([*main_args, *MODEL, "--epochs", "1"])
    pictures, table = dataset.read_list(main_args[1], "test"), Path(main_args[1]) / "lists" / "dogs.csv"
    names = ["/".join(file.parts[-2:]) for file in pictures.files]
    boxes = [(i / 20, 0.4, 1.0, 0.5 + i / 40) for i in range(9)]
    rows = [f"{name},{','.join(map(str, box))}\n" for name, box in zip(names, boxes)]
    table.write_text("file,left,top,right,bottom\n" + "".join(reversed(rows)))
    assert torch.allclose(dataset.read_dog_boxes(main_args[1], pictures), torch.tensor(boxes))

    # The first trajectory, deterministic, first looks 0.29 to the left of the middle, then at it; another goes astray.
    location = torch.tensor([[[-0.58, 0.0], [0.0, 0.0]], [[0.0, 0.0], [-0.9, 0.9]]]).expand(9, 2, 2, 2)
    answers = main.Answers(torch.full((9, 2, 3), 1 / 3), location, torch.tensor(pictures.labels), torch.arange(9))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", lambda *_: answers)
        main.main([*main_args, "--task=test", "--n_trajectories=1"])
    report = capsys.readouterr().out
    assert report.splitlines()[5:9] == [
        "glimpse 1      deterministic   off center 0.2900  on dog 0.5556",  # the boxes with left <= 0.2
        "glimpse 1      one trajectory  off center 0.0000  on dog 1.0000",
        "glimpse 2      deterministic   off center 0.0000  on dog 1.0000",
        "glimpse 2      one trajectory  off center 0.6364  on dog 0.0000",
    ]
    figures = toy_table.read_report(report)
    kinds = ("policy deterministic", "policy one trajectory", "policy mean of 1")
    gazes = [f"glimpse {t} {kind}" for t in (1, 2) for kind in ("deterministic", "one trajectory")]
    assert list(figures) == [
        *(f"{kind} {name}" for kind in kinds for name in ("accuracy", "mean per class", "top-5")),
        *(f"{gaze} {name}" for gaze in gazes for name in ("off center", "on dog")),
    ]
    assert [f"{value:.4f}" for value in figures.values()] == re.findall(r"\d\.\d{4}", report)
    for broken in ("".join(rows), "file,left,top,right,bottom\n" + "".join(rows[1:])):
        table.write_text(broken)
        assert f"{table} does not fit" in fails(main.main, [*main_args, "--task=test"])


def test_supervision_is_the_flags(main_args: list[str], save_dir: Path) -> None:
    losses = {}
    for supervision in ("each", "last"):
        main.main([*main_args, *MODEL, "--epochs", "1", "--supervision", supervision])
        losses[supervision] = read_log(save_dir / "log.csv")[0]["train_classification"]
        assert read(save_dir / "last.tar")["supervision"] == supervision
    assert losses["each"] != losses["last"]


def test_resuming_keeps_the_number_of_epochs(
    main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    main.main([*main_args, *MODEL, "--epochs", "1"])
    main.main([*main_args, "--resume_training"])  # not 101, the default of a new run
    assert read(save_dir / "last.tar")["epoch"] == 0
    assert capsys.readouterr().out.count("1 epoch of 1 done: to go on, raise --epochs") == 1


def test_scores_by_hand() -> None:
    probabilities = torch.eye(3)[[0, 0, 1, 1]].unsqueeze(1)  # predictions 0, 0, 1, 1
    values = main.scores(probabilities, torch.tensor([0, 0, 0, 1]))
    assert values == pytest.approx({"accuracy": 3 / 4, "mean per class": (2 / 3 + 1) / 2, "top-5": 1.0})
    spread = torch.arange(12.0).view(1, 1, 12)  # the best five are 7 to 11
    assert main.scores(spread, torch.tensor([7]))["top-5"] == 1 and main.scores(spread, torch.tensor([6]))["top-5"] == 0
    two = torch.stack([torch.eye(2)[[0, 0]], torch.eye(2)[[1, 0]]], dim=1)  # two trajectories over two pictures
    assert main.scores(two, torch.tensor([0, 0]))["accuracy"] == 3 / 4


def test_toy_table_is_of_the_reports_and_continued(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data_dir, out, calls = make_data(), tmp_path / "table", []
    names = ["/".join(file.parts[-2:]) for file in dataset.read_list(data_dir, "test").files]
    rows = [f"{name},0.4,0.4,0.6,{0.6 if i % 2 else 0.45}\n" for i, name in enumerate(names)]
    (data_dir / "lists" / "dogs.csv").write_text("file,left,top,right,bottom\n" + "".join(rows))

    def run(script: str, flags: list[str]) -> str:  # in this process, which has PyTorch loaded
        calls.append(script)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            {"pretrain.py": pretrain.main, "main.py": main.main}[script]([*flags, *SMALL])
        return printed.getvalue()

    monkeypatch.setattr(toy_table, "run", run)
    monkeypatch.setattr(toy_table, "BACKBONE", [*toy_table.BACKBONE[:-1], "1", "--arch", ARCH])
    once = ["--rnn_hidden", "8", "--epochs", "1"]
    monkeypatch.setattr(toy_table, "ROWS", {"learned": once, "one, center": [*once, "--policy", "center"]})
    for _ in range(2):
        toy_table.main(["--data_dir", str(data_dir), "--out", str(out), "--seeds", "3", "4"])
        for seed, accuracy in ((3, "0.1000"), (4, "0.3000")):
            report = out / f"seed_{seed}" / "one_center" / "test.txt"
            report.write_text(re.sub(r"(?<=deterministic   accuracy )\S+", accuracy, report.read_text()))
    assert calls == 2 * ["pretrain.py", *(4 * ["main.py"])]  # nothing is run twice
    lines = capsys.readouterr().out.splitlines()
    learned, center = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:])
    assert len(learned) == len(center) == 1 + len(toy_table.COLUMNS) and (learned[0], center[0]) == tuple(
        toy_table.ROWS
    )
    assert center[1] == "20.0 ± 14.1"
    assert center[2] == center[5] == "" and center[4] == "44.4 ± 0.0"  # 4 of 9 boxes hold the middle
