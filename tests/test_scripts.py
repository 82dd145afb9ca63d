"""pretrain.py and main.py as a user runs them, on a few small images."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import resource
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
import toy_table
from conftest import (
    ARCH,
    BACKBONE,
    CPU,
    SMALL,
    NarrowResNet,
    annotate,
    draw_image,
    fails,
    finish,
    fit,
    read,
    read_log,
    run,
    same,
    save_backbone,
    start,
    without_seconds,
    write_list,
)
from PIL import ExifTags, Image
from scipy.io import loadmat
from torchvision.models.resnet import BasicBlock, Bottleneck

import dataset
import main
import pretrain
import utils
from model import HEADS, PretrainNetwork, build_backbone, feature_size, fold_batchnorm

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pretrain_args(make_data, tmp_path: Path) -> list[str]:
    folders = ["--data_dir", str(make_data()), "--save_dir", str(tmp_path / "out")]
    return [*folders, *SMALL, *BACKBONE]


@pytest.fixture
def main_args(make_data, save_dir: Path, tmp_path: Path) -> list[str]:
    folders = ["--data_dir", str(make_data()), "--save_dir", str(save_dir), "--imgs_dir", str(tmp_path / "imgs")]
    return [*folders, *SMALL]


NETWORK = ("k", "start_size", "n_glimpses", "rnn_hidden", "std_dev", "classify_context")
MODEL = ["--rnn_hidden", "16", "--k", "2", "--start_size", "1", "--n_glimpses", "2", "--lr", "0.01"]


def refuses(script: ModuleType, argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line about a mistake in the command line itself."""
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def find_result(report: str, subject: str, estimate: str) -> dict[str, float]:
    """The figures of a line that `--task=test` printed, by name."""
    [line] = [line for line in report.splitlines() if line.startswith(f"{subject:15}{estimate:20}")]
    return {name: float(value) for name, value in re.findall(r"(\w+) (\d+\.\d{4})(?=  |$)", line[35:])}


def same_result(ours: object, theirs: object) -> bool:
    """Equality bit by bit of two checkpoints or logs but for the time that was measured."""
    return same(without_seconds(ours), without_seconds(theirs))


def load(save_dir: Path) -> torch.nn.Module:
    """The best classifier in a folder, as main.py rebuilds it."""
    path = save_dir / "saved_model.tar"
    checkpoint = read(path)
    settings = main.Settings(**{name: checkpoint["settings"][name] for name in NETWORK})
    net = main.build_model(settings, checkpoint["backbone"], len(checkpoint["data"]["class_names"]), path).eval()
    net.load_state_dict(checkpoint["model_dict"])
    return net


def collect_panels(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `draw_panel` is called with from now on."""
    drawn, real = [], main.draw_panel
    monkeypatch.setattr(main, "draw_panel", lambda *given: drawn.append(given) or real(*given))
    return drawn


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


def mean_error_of_heads(row: dict[str, str]) -> float:
    return 1 - statistics.fmean(float(row[f"valid_accuracy_{name}"]) for name in HEADS)


def test_pretraining_then_every_task(pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(pretrain, [*pretrain_args, "--epochs", "2"])
    out = tmp_path / "out"
    best, last = read(out / "pt_glimpse_model.tar"), read(out / "pt_last.tar")
    assert best["model_dict"].keys() == build_backbone(ARCH).state_dict().keys()
    assert (best["settings"]["arch"], best["settings"]["patch_size"]) == (ARCH, 32) and last["epoch"] == 1
    rows = read_log(out / "pt_log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert min(map(mean_error_of_heads, rows)) == pytest.approx(last["best_score"], abs=1e-5)

    shared = [*pretrain_args[: -len(BACKBONE)], "--imgs_dir", str(tmp_path / "imgs")]
    capsys.readouterr()
    run(main, [*shared, *MODEL, "--epochs", "2"])
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed and "saved_model.tar" in printed and printed.isascii()
    assert [row["epoch"] for row in read_log(out / "log.csv")] == ["1", "2"]

    run(main, [*shared, "--task=test", "--n_trajectories=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"9 test images of {shared[1]}, classifier of epoch {read(out / 'saved_model.tar')['epoch'] + 1}"
    assert lines[1] == f"3 classes: toy breed 1, toy breed 2, toy breed 3; split as in {shared[1]}/lists"
    assert lines[-5:-1] == [
        f"predictions in {out / 'predictions_learned.csv'}",
        f"accuracy per class in {out / 'per_class_learned.csv'}",
        f"confusion matrix in {out / 'confusion_learned.csv'}",
        f"all figures in {out / 'results_learned.json'}",
    ]
    assert lines[-1] == (
        f"next: python main.py --task=view_glimpses --data_dir {shared[1]} --save_dir {out}"  # what can be typed
    )
    subjects = ("policy learned", "glimpse 1", "glimpse 2")
    kinds = ("deterministic", "sampled trajectory", "average of 3")
    assert [(line[:15].rstrip(), line[15:35].rstrip()) for line in lines[2:11]] == [
        (subject, estimate) for subject in subjects for estimate in kinds
    ]

    run(main, [*shared, "--task", "view_glimpses", "--n_samples", "4"])
    assert sorted(path.name for path in (tmp_path / "imgs").iterdir()) == [
        "contact_sheet.jpg",
        *(f"glimpse_{i}.jpg" for i in range(4)),
    ]
    image = draw_image(np.random.default_rng(5), 90, 70)
    image.save(tmp_path / "photo.png")
    capsys.readouterr()
    folders = ["--save_dir", str(out), "--imgs_dir", str(tmp_path / "imgs")]
    main.main([*folders, "--task=predict", "--images", str(tmp_path / "photo.png")])  # neither data nor other flags
    lines = capsys.readouterr().out.splitlines()
    [drawn] = (tmp_path / "imgs").glob("predict_photo.png_*.jpg")
    assert lines[0] == f"{tmp_path / 'photo.png'}: average of 7 (drawn in {drawn})"
    assert lines[-1] == f"predictions for 1 image in {tmp_path / 'imgs' / 'predictions.csv'}"
    assert len(lines) == 5  # there are three breeds to name
    assert sum(float(re.match(r"\s+([\d.]+)%", line)[1]) for line in lines[1:-1]) == pytest.approx(100, abs=0.2)
    assert Image.open(drawn).width > 500


def test_both_scripts_learn_what_can_be_learned(make_data, save_dir: Path) -> None:
    """Breeds of one colour each, which both networks soon tell apart."""
    data_dir = make_data(n_train=12)
    for folder, color in zip(sorted((data_dir / "Images").iterdir()), ("red", "green", "blue")):
        for file in folder.iterdir():
            Image.new("RGB", (64, 64), color).save(file)
    shared = ["--data_dir", str(data_dir), "--save_dir", str(save_dir), *SMALL, "--lr", "0.001"]
    run(pretrain, [*shared, *BACKBONE, "--epochs", "8", "--overwrite"])
    assert read(save_dir / "pt_glimpse_model.tar")["metrics"]["valid_accuracy_123"] > 0.9
    run(main, [*shared, "--rnn_hidden", "16", "--k", "1", "--start_size", "2", "--epochs", "16"])
    assert read(save_dir / "saved_model.tar")["metrics"]["valid_accuracy"] > 0.9


def test_heads_are_tested_as_they_were_saved(
    pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With heads that always predict 0, 1, 2 and 0, on a list of two, three and four images of these breeds."""
    run(pretrain, [*pretrain_args, "--epochs", "1"])
    path, list_path = tmp_path / "out" / "pt_glimpse_model.tar", Path(pretrain_args[1]) / "lists" / "test_list.mat"
    checkpoint, names = read(path), [name.item() for name in loadmat(list_path)["file_list"].ravel()]
    assert (
        checkpoint["heads"].keys()
        == PretrainNetwork(backbone=build_backbone(ARCH), n_classes=3, patch_size=32).heads.state_dict().keys()
    )
    for head, prediction in enumerate((0, 1, 2, 0)):
        checkpoint["heads"][f"{head}.3.bias"] = 1000 * torch.eye(3)[prediction]
    torch.save(checkpoint, path)
    kept = [names[i] for i in (0, 1, 3, 4, 5, 6, 7, 8)] + [names[6].replace("test_0", "test_3")]
    draw_image(np.random.default_rng(1), 50, 40).save(Path(pretrain_args[1]) / "Images" / kept[-1])
    write_list(list_path, kept, [1, 1, 2, 2, 2, 3, 3, 3, 3])
    given = fit(pretrain, [*pretrain_args, "--task=test"])
    capsys.readouterr()
    pretrain.main(given)
    assert capsys.readouterr().out.splitlines() == [
        f"9 test images of {pretrain_args[1]}, backbone of epoch 1",
        "head 12   accuracy 0.2222",
        "head 13   accuracy 0.3333",
        "head 23   accuracy 0.4444",
        "head 123  accuracy 0.2222",
        f"all figures in {tmp_path / 'out' / 'pt_results.json'}",
        f"next: python main.py --data_dir {pretrain_args[1]} --save_dir {tmp_path / 'out'} --valid_size 0.3",
    ]
    results = json.loads((tmp_path / "out" / "pt_results.json").read_text())
    assert results["figures"]["heads"]["23"]["accuracy"] == pytest.approx(4 / 9) and results["images"] == 9
    backbone = build_backbone(ARCH)
    of_pass = utils.multiply_adds(lambda: backbone(torch.zeros(1, 3, 32, 32)))
    of_head = 3 * feature_size(backbone) * 1024 + 1024 * 3
    assert results["multiply_adds"]["123"] == 3 * of_pass + of_head
    assert "--resume_training" in refuses(pretrain, ["--task=test", "--resume_training"], capsys)
    assert "--weights" in refuses(pretrain, [*given, "--weights", "none"], capsys)
    assert "--arch" in fails(pretrain, [*given, "--arch", "resnet34"])
    torch.save({**checkpoint, "settings": {**checkpoint["settings"], "arch": "resnet1"}}, path)
    message = fails(pretrain, [*fit(pretrain, [*pretrain_args[:-6], "--task=test"])])
    assert str(path) in message and "its setting arch: resnet1 is not one of resnet18" in message
    torch.save({key: value for key, value in checkpoint.items() if key != "heads"}, path)  # one of 2018 has no heads
    message = fails(pretrain, given)
    assert str(path) in message and "heads" in message
    torch.save({**checkpoint, "data": {"class_names": ["cat"]}}, path)
    assert "other classes" in fails(pretrain, given)


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
    out = tmp_path / "out"
    argv = ["--data_dir", str(data_dir), "--save_dir", str(out), *SMALL, *BACKBONE]
    run(pretrain, [*argv, "--task=probe"])
    *_, accuracy, where, following = capsys.readouterr().out.splitlines()
    assert accuracy == "test accuracy 1.0000" and following.startswith("next: python pretrain.py --data_dir ")
    assert where == f"all figures in {out / f'probe_{ARCH}_none_32.json'}"
    # As it is, as a larger image, and by a backbone of an earlier run, unless that has seen what is tested.
    run(pretrain, [*argv, "--epochs", "0"])
    best = out / "pt_glimpse_model.tar"
    run(pretrain, [*argv, "--task=probe", "--patch_size", "64", "--weights", str(best)])
    assert f"at 64 pixels, features of {best} weights" in capsys.readouterr().out
    names = [f"probe_{ARCH}_none_32.json", f"probe_{ARCH}_pt_glimpse_model_64.json"]
    results = [json.loads((out / name).read_text()) for name in names]
    assert [result["images"] for result in results] == [24, 24]
    figures = results[1]["figures"]["probe"]["linear probe"]
    assert figures["accuracy"] == 1 and figures["interval"] == pytest.approx([24 / (24 + 1.96**2), 1])
    small, large = (result["multiply_adds"]["linear probe"] for result in results)
    assert 3.9 < large / small < 4.1
    refused = fails(pretrain, [*argv, "--weights", str(best), "--save_dir", str(tmp_path / "other")])
    assert refused == f"error: --weights {best} is a backbone of this script, which is for --task=probe only"
    content = read(best)
    [(_, of_test)] = dataset.check_images(
        dataset.read_list(data_dir, "test"), machine=CPU, num_workers=0, skip_bad=False, memory=tmp_path / "memory"
    )
    for use, fingerprints in (("validation", content["data"]["fingerprints"]["validation"]), ("test", of_test)):
        content["data"]["fingerprints"]["training"] = fingerprints
        torch.save(content, best)
        refused = fails(pretrain, [*argv, "--task=probe", "--weights", str(best)])
        assert f"{use} images were used in training {best}" in refused
    list_path = data_dir / "lists" / "test_list.mat"
    names = [name.item() for name in loadmat(list_path)["file_list"].ravel()]
    write_list(list_path, names[:8], [1] * 8)
    message = fails(pretrain, ["--data_dir", str(data_dir), *SMALL, *BACKBONE, "--task=probe"])
    assert "the training and the test list of" in message and "different classes" in message


def test_untrained_classifier_and_backbone_of_another_folder(
    main_args: list[str], save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (save_dir / "pt_glimpse_model.tar").rename(tmp_path / "backbone.tar")
    assert "--backbone" in fails(main, [*main_args, *MODEL])
    given = [*main_args, *MODEL, "--backbone", str(tmp_path / "backbone.tar")]
    run(main, [*given, "--epochs", "0"])
    untrained = read(save_dir / "saved_model.tar")
    message = fails(main, [*given, "--epochs", "0"])
    assert f"{save_dir} holds an earlier run (saved_model.tar): replace it with --overwrite" in message
    assert untrained["epoch"] == -1 and not (save_dir / "last.tar").exists()
    capsys.readouterr()
    run(main, [*main_args, "--task=test"])
    assert "classifier of epoch 0" in capsys.readouterr().out
    assert "--task=predict needs --images" in fails(main, [*main_args, "--task=predict"])
    test = fit(main, [*main_args, "--task=test"])
    assert "--backbone has no effect on --task=test" in refuses(main, [*test, "--backbone", "a.tar"], capsys)
    run(main, [*given, "--epochs", "1", "--overwrite"])
    trained = read(save_dir / "saved_model.tar")
    message = fails(main, [*main_args, "--resume_training", "--backbone", "a.tar"])
    assert f"--backbone a.tar contradicts {save_dir / 'last.tar'}" in message
    run(main, [*given, "--resume_training", "--epochs", "1"])  # the same file may be named again
    assert (trained["model_dict"]["locate.first.weight"] != untrained["model_dict"]["locate.first.weight"]).any()
    run(main, [*main_args, "--resume_training", "--epochs", "0"])  # there is nothing left to do, nor to overwrite
    assert same(read(save_dir / "saved_model.tar"), trained)


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_batches_of_one_and_ragged_batches(main_args: list[str], save_dir: Path, batch_size: str) -> None:
    """A bare squeeze crashed the 2018 code on a batch of one image; 12 training images leave 2 after two fives."""
    run(main, [*main_args, *MODEL, "--batch_size", batch_size, "--epochs", "1"])
    run(main, [*main_args, "--task=test", "--batch_size", batch_size])
    assert read(save_dir / "last.tar")["epoch"] == 0


def test_pretraining_survives_a_ragged_batch_of_one(pretrain_args: list[str], tmp_path: Path) -> None:
    run(pretrain, [*pretrain_args, "--batch_size", "11", "--epochs", "1"])  # 12 training images
    assert read(tmp_path / "out" / "pt_last.tar")["epoch"] == 0


def test_every_policy_trains(main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture) -> None:
    for policy in ("center", "random", "grid"):
        run(main, [*main_args, *MODEL, "--policy", policy, "--epochs", "1", "--overwrite"])
        assert read(save_dir / "saved_model.tar")["settings"]["policy"] == policy
        capsys.readouterr()
        run(main, [*main_args, "--task=test"])  # with the policy that it was trained with
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
    run(main, [*folders, *SMALL, "--epochs", "1", "--rnn_hidden", "8", "--k", "1", "--start_size", "4"])
    about = read(tmp_path / "saved_model.tar")["backbone"]
    assert (about["arch"], about["patch_size"], about["file"]) == ("resnet50", 96, str(path))
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_backbone_in_the_checkpoint_is_the_pretrained_one(main_args: list[str], save_dir: Path) -> None:
    run(main, [*main_args, *MODEL, "--epochs", "2"])
    backbone = build_backbone(ARCH)
    backbone.load_state_dict(read(save_dir / "pt_glimpse_model.tar")["model_dict"])
    before, after = fold_batchnorm(backbone).state_dict(), read(save_dir / "last.tar")["model_dict"]
    assert all(torch.equal(value, after[f"glimpse.backbone.{key}"]) for key, value in before.items())


def test_best_checkpoints_are_of_the_best_epoch(main_args: list[str], pretrain_args: list[str], save_dir: Path) -> None:
    out = Path(pretrain_args[3])
    run(pretrain, [*pretrain_args, "--epochs", "3", "--lr", "0.01"])
    run(main, [*main_args, *MODEL, "--epochs", "4"])
    for best, log, score in (
        (out / "pt_glimpse_model.tar", out / "pt_log.csv", mean_error_of_heads),
        (save_dir / "saved_model.tar", save_dir / "log.csv", lambda row: float(row["valid_nll"])),
    ):
        rows = read_log(log)
        found = [score(row) for row in rows]
        assert read(best)["epoch"] == max(i for i, value in enumerate(found) if value == pytest.approx(min(found)))
        metrics = {name: float(value) for name, value in rows[read(best)["epoch"]].items() if name != "epoch"}
        assert read(best)["metrics"] == pytest.approx(metrics, rel=1e-5)


def test_best_backbone_has_the_highest_mean_accuracy_of_heads(
    pretrain_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever its NLL, and the last of equal ones: by then the learning rate has fallen."""
    values, real = iter(((0.5, 0.5, 1.0), (0.5, 1.0, 1.5), (0.75, 0.75, 2.0), (1.0, 0.25, 0.5))), pretrain.evaluate

    def evaluate(*given: object) -> dict[str, float]:
        *accuracies, nll = next(values)
        return {**real(*given), **{f"accuracy_{name}": value for name, value in zip(HEADS, accuracies * 2)}, "nll": nll}

    monkeypatch.setattr(pretrain, "evaluate", evaluate)
    run(pretrain, [*pretrain_args, "--epochs", "4"])
    best = read(tmp_path / "out" / "pt_glimpse_model.tar")
    assert best["epoch"] == 2 and best["metrics"]["valid_nll"] == 2
    assert "lowest validation mean error of the heads, 0.2500: " in capsys.readouterr().out


def test_best_classifier_has_the_lowest_nll(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy on a few images is a poor criterion: here it is the same in all epochs."""
    values = iter((0.4, 0.8, 0.6))
    real = main.evaluate

    def evaluate(net: torch.nn.Module, loader: torch.utils.data.DataLoader, *given: object) -> list[torch.Tensor]:
        (probabilities, location), value = real(net, loader, *given), next(values)
        probabilities = torch.full_like(probabilities, (1 - value) / 2)
        labels = torch.tensor(loader.dataset.images.labels)
        probabilities[torch.arange(len(labels)), :, :, labels] = value
        return [probabilities, location]

    monkeypatch.setattr(main, "evaluate", evaluate)
    run(main, [*main_args, *MODEL, "--epochs", "3"])
    best = read(save_dir / "saved_model.tar")
    assert best["epoch"] == 1 and best["metrics"]["valid_accuracy"] == 1
    nll = [float(row["valid_nll"]) for row in read_log(save_dir / "log.csv")]
    assert nll == pytest.approx([-math.log(0.4), -math.log(0.8), -math.log(0.6)], rel=1e-5)
    assert read(save_dir / "last.tar")["best_score"] == pytest.approx(-math.log(0.8))


def test_view_glimpses_draws_the_deterministic_trajectory(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2018 code drew boxes at a location averaged over ten sampled trajectories."""
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    drawn = collect_panels(monkeypatch)
    run(main, [*main_args, "--task=view_glimpses", "--n_samples", "5"])
    net = load(save_dir)
    images = dataset.read_list(main_args[1], "test")
    names = [file.name for file in images.files]
    chosen = main.fixed_choice(len(names), 5, seed=0)
    assert len(drawn) == 5 and len({caption for *_, caption, _, _ in drawn}) == 5
    for index, (canvas, location, attention, scales, patch_size, caption, predictions, _) in zip(chosen, drawn):
        rollout = net(canvas.unsqueeze(0), torch.zeros(1, 1, 2, 2), "learned")
        assert torch.allclose(location, rollout.location[0, 0], atol=1e-5) and (scales, patch_size) == ((1, 2), 32)
        assert torch.allclose(attention, rollout.attention[0, 0], atol=1e-5)
        probabilities = rollout.logits[0, 0].softmax(-1)  # [T, C]
        wanted = [f"toy breed {p.argmax() + 1} ({p.max():.2f})" for p in probabilities]
        assert predictions == wanted  # after each glimpse
        title, text = caption.split("\n")
        assert title == f"{names[index]}: learned policy, deterministic trajectory"
        predicted, true = re.fullmatch(r"predicted (.*), true (.*)", text).groups()
        truth = images.labels[index]
        assert predicted == wanted[-1] and true == f"toy breed {truth + 1} ({probabilities[-1, truth]:.2f})"


def test_each_policy_has_tables_of_its_own(main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """Their rows give the figures that are printed, and the locations are those of the predictions beside them."""
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    images, net = dataset.read_list(main_args[1], "test"), load(save_dir)
    names = [images.class_names[label] for label in images.labels]
    canvases = dataset.ImageDataset(images, net.glimpse.canvas_size)
    with torch.no_grad():
        rollout = net(torch.stack([canvas for canvas, *_ in canvases]), torch.zeros(9, 1, 2, 2), "learned")
    tables = {}
    classes_of = images.class_names
    for policy, wanted in (
        ("learned", ("deterministic", "average of 3")),
        ("center", ("deterministic",)),
        ("random", ("average of 3",)),
    ):
        capsys.readouterr()
        run(main, [*main_args, "--task=test", f"--policy={policy}", "--n_trajectories=3"])
        report = capsys.readouterr().out
        rows, classes = (read_log(save_dir / f"{table}_{policy}.csv") for table in ("predictions", "per_class"))
        tables[policy] = rows
        results = json.loads((save_dir / f"results_{policy}.json").read_text())
        assert results["settings"]["policy"] == policy and results["images"] == 9
        assert results["made_by"]["torch"] == torch.__version__ and results["settings"]["n_trajectories"] == 3
        last = [row for row in rows if row["estimate"] == wanted[-1]]
        for line in read_log(save_dir / f"confusion_{policy}.csv"):
            mine = [row["class_1"] for row in last if row["true_class"] == line["true_class"]]
            assert {name: int(line[name]) for name in classes_of} == {name: mine.count(name) for name in classes_of}
        assert list(dict.fromkeys(row["estimate"] for row in rows)) == list(wanted) and len(rows) == 9 * len(wanted)
        assert list(rows[0])[:5] == ["file", "estimate", "true_class", "true_probability", "class_1"]
        for estimate in wanted:
            mine = [row for row in rows if row["estimate"] == estimate]
            assert [Path(main_args[1], row["file"]) for row in mine] == images.files
            assert [row["true_class"] for row in mine] == names
            assert all(1 / 3 <= float(row["probability_1"]) <= 1 for row in mine)
            for row in mine:  # of three classes all are named, from the most probable on
                named = {row[f"class_{i}"]: float(row[f"probability_{i}"]) for i in (1, 2, 3)}
                assert named[row["true_class"]] == float(row["true_probability"]) and named.keys() == set(classes_of)
                assert sum(named.values()) == pytest.approx(1, abs=2e-4)
                assert list(named.values()) == sorted(named.values(), reverse=True)
            correct = [row["true_class"] == row["class_1"] for row in mine]
            figures = find_result(report, f"policy {policy}", estimate)
            assert figures["accuracy"] == pytest.approx(sum(correct) / 9, abs=1e-4)
            figures_written = results["figures"][f"policy {policy}"][estimate]
            assert figures_written["accuracy"] == pytest.approx(sum(correct) / 9)
            low, high = figures_written["interval"]
            assert 0 <= low < sum(correct) / 9 + 1e-9 and sum(correct) / 9 - 1e-9 < high <= 1
            per_class = [float(row[estimate.replace(" ", "_")]) for row in classes]
            assert figures["mean_per_class"] == pytest.approx(sum(per_class) / 3, abs=1e-4)
            places = [[row[f"{axis}_{t}"] for t in (1, 2) for axis in "xy"] for row in mine]
            if estimate != "deterministic":
                assert not any(map(any, places))
            elif policy == "center":
                assert {float(place) for row in places for place in row} == {0}
            else:
                places = torch.tensor([list(map(float, row)) for row in places])
                assert torch.allclose(places, rollout.location.flatten(1), atol=1e-3) and places.abs().min() > 0
                probability = rollout.logits[:, 0, -1].softmax(-1).max(-1).values
                assert [float(row["probability_1"]) for row in mine] == pytest.approx(probability.tolist(), abs=1e-3)
        estimates = [name.replace("_", " ") for name in classes[0]][2:]
        printed = re.findall(rf"^policy {policy} +(\w+ \w+ \d|\w+ \w+|\w+)  +accuracy", report, re.MULTILINE)
        assert estimates == printed
    assert tables["learned"] == read_log(save_dir / "predictions_learned.csv")  # still there


def test_panels_show_what_the_policy_uses(
    main_args: list[str], save_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixed policies use no attention; drawings of an earlier, longer choice are removed, and nothing else is."""
    run(main, [*main_args, *MODEL, "--epochs", "0"])
    drawn, imgs = collect_panels(monkeypatch), tmp_path / "imgs"
    imgs.mkdir()
    mine = [imgs / name for name in ("glimpse_of_my_dog.jpg", "predict_0_photo.jpg", "glimpse_9.txt")]
    for path in mine:
        path.write_text("not of view_glimpses")
    for policy, n_samples, trajectory in (("center", 4, "deterministic"), ("random", 2, "sampled")):
        drawn.clear()
        run(main, [*main_args, "--task=view_glimpses", f"--policy={policy}", f"--n_samples={n_samples}"])
        assert len(drawn) == n_samples and all(attention is None for _, _, attention, *_ in drawn)
        assert all((location == 0).all() == (policy == "center") for _, location, *_ in drawn)
        files = [file.name for file in dataset.read_list(main_args[1], "test").files]
        chosen = [files[i] for i in main.fixed_choice(9, n_samples, 0)]
        titles = [caption.partition("\n")[0] for *_, caption, _, _ in drawn]
        assert titles == [f"{name}: {policy} policy, {trajectory} trajectory" for name in chosen]
        numbered = {f"glimpse_{i}.jpg" for i in range(n_samples)}
        assert {path.name for path in imgs.iterdir()} == {*numbered, "contact_sheet.jpg", *(p.name for p in mine)}


def test_predict_draws_and_labels_the_deterministic_trajectory(
    main_args: list[str], save_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What is printed is the average over all trajectories, and says so."""
    run(main, [*main_args, *MODEL, "--std_dev", "3", "--epochs", "2"])
    draw_image(np.random.default_rng(7), 90, 90).save(tmp_path / "photo.png")
    drawn = collect_panels(monkeypatch)
    capsys.readouterr()
    run(main, [*main_args, "--task=predict", "--n_trajectories=4", "--images", str(tmp_path / "photo.png")])
    lines = capsys.readouterr().out.splitlines()
    [(canvas, location, attention, _, _, caption, predictions, dogs)] = drawn
    assert len(dogs) == 0  # not annotated
    noise = main.evaluation_noise("learned", 1, 4, 2, seed=0)
    with torch.no_grad():
        rollout = load(save_dir)(canvas.unsqueeze(0), noise, "learned")
    assert torch.allclose(location, rollout.location[0, 0], atol=1e-5)
    assert torch.allclose(attention, rollout.attention[0, 0], atol=1e-5)
    probabilities = rollout.logits[0, :, -1].softmax(-1)  # [5, C]
    alone, average = probabilities[0], probabilities[1:].mean(0)
    title, text = caption.split("\n")
    assert f"({average.max():.2f})" not in text  # so that one cannot be taken for the other
    assert title == "photo.png: learned policy, deterministic trajectory"
    assert text == f"predicted {predictions[-1]}" == f"predicted toy breed {alone.argmax() + 1} ({alone.max():.2f})"
    assert lines[0].startswith(f"{tmp_path / 'photo.png'}: average of 4 (drawn in ")
    assert lines[1].split()[0] == f"{average.max():.1%}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_checkpoint_opens_without_one(main_args: list[str], save_dir: Path) -> None:
    """As the 2018 files did not."""
    words = [word for word in main_args if word not in ("--device", "cpu")]
    run(main, [*words, *MODEL, "--epochs", "1", "--device", "cuda"])
    assert not any(value.is_cuda for value in read(save_dir / "saved_model.tar")["model_dict"].values())
    run(main, [*main_args, "--resume_training", "--epochs", "2"])


def test_training_opens_no_test_image(pretrain_args: list[str], main_args: list[str], make_data) -> None:
    """The 2018 code validated on the test list. Here it is not even read: without it, training runs all the same."""
    data_dir = Path(main_args[1])
    for file in (data_dir / "Images").glob("*/test_*.jpg"):
        file.write_text("whoever opens this fails")
    (data_dir / "lists" / "test_list.mat").write_text("whoever reads this fails")
    run(pretrain, [*pretrain_args, "--epochs", "1"])
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    assert "test_list.mat cannot be read" in fails(main, [*main_args, "--task=test"])


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
    run(main, [*flags, "--epochs", "4"])
    straight, log = read(save_dir / "last.tar"), read_log(save_dir / "log.csv")
    best = read(save_dir / "saved_model.tar")

    def interrupt(machine: utils.Machine, text: str) -> None:
        if text.startswith("epoch 2/4"):  # the line that ends the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils.Machine, "print", interrupt)
        run(main, [*flags, "--epochs", "4", "--overwrite"])
    assert read(save_dir / "last.tar")["epoch"] == 1
    run(main, [*main_args, "--lr", "0.01", "--epochs", "4", "--resume_training=True"])  # architecture from the file
    assert same_result(straight, read(save_dir / "last.tar")) and same_result(log, read_log(save_dir / "log.csv"))
    assert same_result(best, read(save_dir / "saved_model.tar"))


@pytest.mark.parametrize("num_workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_resumed_pretraining_is_the_uninterrupted_one(
    num_workers: str, pretrain_args: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pretrain_args = [*pretrain_args, "--num_workers", num_workers, "--lr_schedule", "constant"]
    run(pretrain, [*pretrain_args, "--epochs", "2"])
    straight, log = read(out / "pt_last.tar"), read_log(out / "pt_log.csv")
    run(pretrain, [*pretrain_args, "--epochs", "1", "--overwrite"])
    run(pretrain, [*pretrain_args, "--epochs", "2", "--resume_training"])
    assert same_result(straight, read(out / "pt_last.tar")) and same_result(log, read_log(out / "pt_log.csv"))


@pytest.fixture(params=["pretrain", "main"])
def training(request: pytest.FixtureRequest) -> tuple[ModuleType, list[str], Path]:
    """Each of the scripts, flags for a short run of it, and the folder of its files."""
    if request.param == "pretrain":
        argv = request.getfixturevalue("pretrain_args")
        return pretrain, argv, Path(argv[3])
    return main, [*request.getfixturevalue("main_args"), *MODEL], request.getfixturevalue("save_dir")


def test_earlier_run_is_replaced_only_on_demand(training: tuple[ModuleType, list[str], Path]) -> None:
    script, argv, folder = training
    run(script, [*argv, "--epochs", "2"])
    paths = [folder / name for name in script.FILES]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    message = fails(script, [*argv, "--seed", "1", "--epochs", "1"])
    assert f"{folder} holds an earlier run ({', '.join(script.FILES)})" in message
    assert "--resume_training=True" in message and "--overwrite" in message
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before

    run(script, [*argv, "--seed", "1", "--epochs", "1", "--overwrite"])
    best, last = (read(path) for path in paths[:2])
    for content in (best, last):
        assert (content["settings"]["seed"], content["settings"]["epochs"], content["epoch"]) == (1, 1, 0)
    assert [row["epoch"] for row in read_log(paths[2])] == ["1"] == [str(row["epoch"]) for row in last["log"]]
    assert set(folder.iterdir()) == before.keys()

    paths[1].unlink()  # now there is nothing to resume from
    message = fails(script, [*argv, "--epochs", "1"])
    assert f"({script.FILES[0]}, {script.FILES[2]})" in message
    assert "--resume_training" not in message and "--overwrite" in message


def test_untrained_network_replaces_the_whole_run(training: tuple[ModuleType, list[str], Path]) -> None:
    """Otherwise the earlier run could be resumed beside a best checkpoint that is not its own."""
    script, argv, folder = training
    run(script, [*argv, "--epochs", "1"])
    run(script, [*argv, "--epochs", "0", "--overwrite"])
    untrained = read(folder / script.FILES[0])
    assert (untrained["epoch"], untrained["metrics"], untrained["settings"]["epochs"]) == (-1, {}, 0)
    assert not any((folder / name).exists() for name in script.FILES[1:])


def test_replaced_run_is_not_resumed(
    training: tuple[ModuleType, list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the run that replaces it is stopped after its first best checkpoint."""
    script, argv, folder = training
    run(script, [*argv, "--epochs", "1"])
    real = utils.save_checkpoint

    def stop(path: Path, content: dict) -> None:
        if path.name == script.FILES[1]:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "save_checkpoint", stop)
        run(script, [*argv, "--epochs", "2", "--seed", "1", "--overwrite"])
    assert read(folder / script.FILES[0])["settings"]["seed"] == 1
    assert f"{script.FILES[1]} not found" in fails(script, [*argv, "--resume_training", "--epochs", "2"])


def test_resuming_restores_every_setting(training: tuple[ModuleType, list[str], Path]) -> None:
    script, argv, folder = training
    flags = ["--epochs", "1", "--valid_size", "0.5", "--lr", "0.02", "--batch_size", "5", "--seed", "3"]
    flags += ["--lr_schedule", "constant"]
    if script is main:
        flags += ["--attention_lr", "0.03", "--supervision", "last", "--policy", "random"]
        flags += ["--std_dev", "0.3", "--backbone", str(folder / "pt_glimpse_model.tar")]
    run(script, [*argv, *flags])
    before = read(folder / script.FILES[1])
    given = {**before["settings"]}
    for name, value in zip(flags[::2], flags[1::2]):
        assert str(given.pop(name[2:])) == value
    assert given.pop("data_dir") == argv[1] and given.pop("precision") == "fp32"
    defaults = script.Settings()
    network = dict(zip(MODEL[::2], MODEL[1::2])) if script is main else dict(zip(BACKBONE[::2], BACKBONE[1::2]))
    for name, value in given.items():
        assert str(value) == network.get(f"--{name}", str(getattr(defaults, name)))

    where = ["--save_dir", str(folder), "--device", "cpu", "--num_workers", "0"]
    script.main([*where, "--resume_training", "--epochs", "2"])
    after = read(folder / script.FILES[1])
    assert after["settings"] == {**before["settings"], "epochs": 2} and same(after["data"], before["data"])
    rates = [group["lr"] for group in after["optimizer"]["param_groups"]]
    assert rates == ([0.02, 0.03] if script is main else [0.02])
    assert [row["epoch"] for row in after["log"]] == [1, 2]
    script.main([*where, "--task=test"])  # on the same data


@pytest.mark.parametrize("task", ["train", "test"])
def test_printed_command_trains_on_the_same_split(
    task: str, pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--valid_size", "0.5", "--epochs", "1", "--lr", "0.02", "--seed", "3"]
    run(pretrain, [*pretrain_args, *flags])
    if task == "test":
        capsys.readouterr()
        pretrain.main(["--save_dir", str(tmp_path / "out"), "--num_workers", "0", "--device", "cpu", "--task=test"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: python main.py ")]
    words = shlex.split(line)[3:]
    small = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--num_workers", "0", "--device", "cpu"]
    main.main([*words, *small, *(["--epochs", "1", "--batch_size", "4"] if task == "test" else [])])
    last, backbone = read(tmp_path / "out" / "last.tar"), read(tmp_path / "out" / "pt_last.tar")
    assert same(last["data"], backbone["data"]) and last["data"]["validation_images"] == 7 and last["epoch"] == 0
    assert "trained on other images" not in capsys.readouterr().out
    names = ["data_dir", "valid_size", "epochs", "batch_size", *(["lr", "seed"] if task == "train" else [])]
    assert [last["settings"][name] for name in names] == [backbone["settings"][name] for name in names]


def test_jump_of_the_learning_rate_is_announced(
    main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    run(main, [*main_args, *MODEL, "--epochs", "3"])
    assert "learning rate" not in capsys.readouterr().out
    run(main, [*main_args, "--resume_training", "--epochs", "6"])
    lines = capsys.readouterr().out.splitlines()
    [note] = [i for i, line in enumerate(lines) if line.startswith("note: ")]
    assert "cosine schedule" in lines[note] and "6 epochs, not 3" in lines[note]
    assert "the learning rate goes from 0.0025 to 0.005" in lines[note]
    epochs = [i for i, line in enumerate(lines) if re.match(r"epoch \d/6", line)]
    assert len(epochs) == 3 and note < epochs[0]
    rates = [float(row["lr"]) for row in read_log(save_dir / "log.csv")]
    assert rates[2:4] == pytest.approx([0.0025, 0.005], rel=1e-5)
    run(main, [*main_args, "--resume_training", "--epochs", "6"])
    assert "note:" not in capsys.readouterr().out
    run(main, [*main_args, "--resume_training", "--epochs", "7", "--lr_schedule", "constant"])
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "constant schedule" in note and "the learning rate goes from 0.00067 to 0.01" in note
    run(main, [*main_args, "--resume_training", "--epochs", "8"])  # still constant
    assert "note:" not in capsys.readouterr().out


# --- several processes


@pytest.fixture
def run_by_two(tmp_path: Path) -> Callable[[str, list[str]], str]:
    """Runs a script in two processes, in the environment that torchrun gives them, and returns what they print."""

    def run_both(script: str, argv: list[str]) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        printed = [tmp_path / f"printed_{rank}.txt" for rank in "01"]
        started = [start(script, argv, path, RANK=rank, LOCAL_RANK=rank, **shared) for rank, path in zip("01", printed)]
        assert [finish(process) for process in started] == [0, 0], [path.read_text() for path in printed]
        return "".join(path.read_text() for path in printed)

    return run_both


def test_two_processes_train_and_evaluate_as_one(
    main_args: list[str], save_dir: Path, run_by_two, capsys: pytest.CaptureFixture
) -> None:
    """A single process loads the checkpoint, and its figures are the same."""
    flags = [*main_args, *MODEL, "--n_glimpses", "1", "--epochs", "2"]
    assert run_by_two("main", flags).count("epoch 2/2") == 1
    logs = [without_seconds(read_log(save_dir / "log.csv"))]
    tested = run_by_two("main", [*main_args, "--task=test"])
    run(main, [*main_args, "--task=test"])
    assert tested == capsys.readouterr().out and "9 test images" in tested  # in shards of 5 and 4
    run(main, [*flags, "--overwrite"])
    logs.append(without_seconds(read_log(save_dir / "log.csv")))
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
    argv = fit(main, [*main_args, *flags])
    done = subprocess.run([*launch, str(ROOT / "main.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 0 and read(save_dir / "last.tar")["epoch"] == 1, done.stderr


@pytest.mark.slow
def test_two_processes_compile_in_bfloat16(
    main_args: list[str], pretrain_args: list[str], save_dir: Path, tmp_path: Path, run_by_two
) -> None:
    how = ["--precision", "bf16", "--compile", "--epochs", "1"]
    run_by_two("pretrain", [*pretrain_args, *how])
    run_by_two("main", [*main_args, *MODEL, *how])
    for folder, log in ((tmp_path / "out", "pt_log.csv"), (save_dir, "log.csv")):
        [row] = read_log(folder / log)
        assert 0 < float(row["valid_nll"]) < 5


def test_two_processes_pretrain_what_they_validate(pretrain_args: list[str], run_by_two, tmp_path: Path) -> None:
    """Each process has BatchNorm statistics of its own after a step; the figures must be those of the file saved."""
    out = tmp_path / "out"
    run_by_two("pretrain", [*pretrain_args, "--epochs", "1"])
    row = read_log(out / "pt_log.csv")[0]
    machine = utils.set_up_machine("cpu", "", "fp32")
    net = PretrainNetwork(backbone=build_backbone(ARCH), n_classes=3, patch_size=32)
    net.load_state_dict(read(out / "pt_last.tar")["model_dict"])
    loading = {"canvas_size": 128, "batch_size": 4, "num_workers": 0}
    _, valid = dataset.read_training_lists(Path(pretrain_args[1]), 0.3)
    loader = dataset.make_loader(valid, range(len(valid.files)), **loading)
    alone = pretrain.evaluate(utils.wrap(net, machine), loader, machine, "")
    assert alone.keys() == {"loss", "nll", *(f"accuracy_{head}" for head in HEADS)}
    for name, value in alone.items():
        assert float(row[f"valid_{name}"]) == pytest.approx(value, rel=1e-4)


def test_batches_that_cannot_be_divided(pretrain_args: list[str], make_data) -> None:
    machine = utils.Machine(torch.device("cpu"), [], "fp32", 0, 3)
    with pytest.raises(utils.UserError, match="--batch_size 7 is not a multiple of the 3 processes"):
        machine.loading(7, 0)
    assert "--batch_size 1 leaves one image" in fails(pretrain, [*pretrain_args, "--batch_size", "1"])
    images = dataset.read_list(make_data(), "test")
    with pytest.raises(utils.UserError, match="more processes than images"):
        dataset.make_loader(images, range(20, 9, 21), canvas_size=32, batch_size=4, num_workers=0)


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


@pytest.mark.slow
@pytest.mark.parametrize("script", [main, pretrain])
def test_compiled_run_is_like_the_eager_one(
    script: ModuleType, pretrain_args: list[str], main_args: list[str], make_data, tmp_path: Path
) -> None:
    make_data(n_train=80)
    args, log, best = {
        pretrain: (pretrain_args, "pt_log.csv", "pt_glimpse_model.tar"),
        main: (main_args, "log.csv", "saved_model.tar"),
    }[script]
    backbone = args[args.index("--save_dir") + 1] + "/pt_glimpse_model.tar"
    args = [*args, "--batch_size", "32", *(["--backbone", backbone] if script is main else [])]
    compiled = []
    for name, how in (("eager", []), ("compiled", ["--compile"])):
        for task in (["--overwrite", "--epochs", "2"], ["--task=test"]):
            torch._dynamo.reset()  # as in a process of its own
            torch._dynamo.utils.counters.clear()
            run(script, [*args, *task, "--save_dir", str(tmp_path / name), *how])
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0)
    assert compiled == [False, False, True, True]
    rows, others = (read_log(tmp_path / name / log) for name in ("eager", "compiled"))
    for row, other in zip(rows, others, strict=True):
        for name in set(row) - {"seconds"}:
            # Compiling changes rounding: after ten steps many predictions are near-ties, so that the accuracies of
            # pre-training differ by some images although its losses agree.
            if script is main or "accuracy" not in name:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=0.005, abs=1e-4), name
    eager, other = (read(tmp_path / name / best) for name in ("eager", "compiled"))
    assert eager.keys() == other.keys() and list(eager["model_dict"]) == list(other["model_dict"])
    if script is main:
        frozen = {key for key in eager["model_dict"] if key.startswith("glimpse.")}
        assert frozen and all(torch.equal(eager["model_dict"][key], other["model_dict"][key]) for key in frozen)


def test_what_cannot_be_compiled_is_refused(main_args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", "--compile", "--gpus", "0,1"])
    with pytest.raises(utils.UserError, match="start `torchrun --nproc_per_node=2 main.py --compile --gpus 0,1`"):
        utils.refuse_to_compile([0, 1])
    utils.refuse_to_compile([1])  # a GPU needs no C++ compiler
    monkeypatch.setenv("CXX", "no_such_compiler")
    refused = fails(main, [*main_args, "--compile", "--epochs", "1"])
    assert refused.startswith("error: --compile needs a C++ compiler, and no_such_compiler was not found")
    monkeypatch.delenv("CXX")
    torch._dynamo.reset()
    from torch._inductor import config  # takes seconds

    with config.patch({"force_disable_caches": True, "cpp.cxx": ("false",)}):  # a compiler that always fails
        assert fails(main, [*main_args, "--compile", "--epochs", "1"]).startswith("error: --compile does not work here")


# --- rivals


def test_operations_are_those_of_the_layers() -> None:
    """Counted by hand: a context, shared by all trajectories, and for each a glimpse and its small networks."""
    backbone, settings = {"arch": "resnet18", "patch_size": 32}, main.Settings(k=1, start_size=1, rnn_hidden=16)
    convolutions = 0
    side = {"0": 32, "4": 16, "5": 8, "6": 4, "7": 2}  # of what the layer puts out
    for name, module in build_backbone("resnet18").named_modules():
        if isinstance(module, torch.nn.Conv2d):
            convolutions += module.weight.numel() * side[name.partition(".")[0]] ** 2
    assert utils.multiply_adds(lambda: build_backbone("resnet18")(torch.zeros(1, 3, 32, 32))) == convolutions
    once, many = (main.multiply_adds(settings, backbone, 120, n) for n in (1, 7))
    lstm, classifier, baseline = 4 * 16 * (512 + 16), 16 * 120, 512 + 16
    of_glimpse = convolutions + lstm + classifier + baseline
    attention = 4 * 512
    assert once == convolutions + attention + of_glimpse and many == once + 6 * of_glimpse
    for policy in ("center", "random", "grid", "oracle"):  # which need no context, unless it is classified
        fixed = dataclasses.replace(settings, policy=policy)
        assert main.multiply_adds(fixed, backbone, 120, 1) == attention + of_glimpse
        fixed = dataclasses.replace(fixed, classify_context=True)
        assert main.multiply_adds(fixed, backbone, 120, 1) == once + 4 * 16 * 512


def test_gaze_is_at_the_nearest_of_several_dogs(make_model) -> None:
    glimpse = make_model(k=1, start_size=2).glimpse  # half of the side
    boxes = torch.full((3, 2, 4), math.nan)
    boxes[0] = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.9]])
    boxes[1, 0] = torch.tensor([0.4, 0.0, 0.6, 1.0])  # and the third is not annotated
    figures = main.gaze(torch.tensor([[[0.3, 0.2]], [[0.0, 0.0]], [[0.9, 0.9]]]), boxes, glimpse)  # at .65, .6
    distance = (math.hypot(0.05, 0.1) + 0) / 2
    covered = (
        1 * (0.84375 - 0.5) / 0.4 + 0.5
    ) / 2  # the patch ends at .65 + .25 and .6 + .25, on the grid of 64 pixels
    assert figures == pytest.approx({"hit_rate": 1.0, "distance_to_dog": distance, "coverage": covered}, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_follow_the_augmented_crop(seed: int, tmp_path: Path) -> None:
    pixels = np.zeros((60, 90), dtype=np.uint8)
    pixels[20:40, 38:50] = 255
    file = tmp_path / "Images" / "breed" / "dog.png"
    file.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(file)
    annotate(tmp_path, {file: [(38, 20, 50, 40), (0, 0, 1, 1)]}, 90, 60)
    [dogs] = dataset.read_dogs(dataset.ImageList([file], [0], ["breed"]))
    draw = dataset.RandomCrop(seed, 0.8)
    canvas = dataset.load_canvas(file, 120, draw)[0] > 127
    rows, columns = canvas.any(1).nonzero().flatten(), canvas.any(0).nonzero().flatten()
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 120
    boxes = dataset.boxes_on_canvas(dogs, draw)
    assert (boxes[0] - seen).abs().max() < 0.02
    center = (seen[:2] + seen[2:]) - 1
    assert (dataset.location_of_dog(boxes.flip(0)) - center).abs().max() < 0.03  # of the larger one
    assert dataset.location_of_dog(torch.empty(0, 4)).tolist() == [0, 0]


def test_oracle_looks_at_the_dogs(
    main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = Path(main_args[1])
    refused = fails(main, [*main_args, *MODEL, "--policy=oracle", "--epochs", "1"])
    assert refused.startswith("error: --policy oracle looks at annotated dogs: there are none in")
    for part in ("train", "test"):
        for i, file in enumerate(dataset.read_list(data_dir, part).files):  # each dog at a place of its own, white
            pixels = np.zeros((60, 60 + i, 3), dtype=np.uint8)
            left, top = 5 + 2 * i, 40 - i
            pixels[top : top + 8, left : left + 8] = 255
            Image.fromarray(pixels).save(file, quality=95)
            annotate(data_dir, {file: [(left, top, left + 8, top + 8)]}, 60 + i, 60)
    images = dataset.read_list(data_dir, "train")
    settings = main.Settings(policy="oracle", n_glimpses=2)
    for rank in (0, 1):
        loading = {"rank": rank, "world_size": 2, "canvas_size": 120, "batch_size": 100, "num_workers": 0}
        loader = dataset.make_training_loader(images, seed=0, smallest_crop=0.7, **loading)
        machine = utils.Machine(torch.device("cpu"), [], "fp32", rank, 2)
        noise = main.training_noise(dataset.read_dogs(images), loader.sampler, settings, 0, machine)
        [(canvas, *_)] = loader
        assert noise.shape == (len(canvas), 1, 2, 2)
        for location, bright in zip(noise[:, 0, 1], canvas[:, 0] > 127):
            seen = bright.nonzero().float().mean(0).flip(0) / 60 - 1
            assert not bright.any() or (location - seen).abs().max() < 0.1  # of what the crop has left
    run(main, [*main_args, *MODEL, "--policy=oracle", "--epochs", "2"])
    assert {"valid_hit_rate_1", "valid_nll_2", "valid_coverage_2"} <= read_log(save_dir / "log.csv")[0].keys()
    for row in read_log(save_dir / "log.csv"):
        assert float(row["valid_hit_rate_1"]) == float(row["valid_hit_rate_2"]) == 1
        assert float(row["train_distance_from_center"]) > 0.05 and float(row["train_reinforce"]) == 0
    capsys.readouterr()
    run(main, [*main_args, "--task=test"])
    report = capsys.readouterr().out
    assert find_result(report, "glimpse 2", "deterministic")["distance_to_dog"] == 0
    assert find_result(report, "policy oracle", "deterministic") and "average of" not in report
    drawn = collect_panels(monkeypatch)
    run(main, [*main_args, "--task=view_glimpses"])
    assert len(drawn) == 9 and all(dogs.shape == (1, 4) for *_, dogs in drawn)
    for _, location, *_, dogs in drawn:
        assert torch.allclose(location, (dogs[:, :2] + dogs[:, 2:] - 1).expand(2, 2), atol=1e-5)
    refused = fails(main, [*main_args, "--task=predict", "--images", str(data_dir)])
    assert "choose another to classify other images" in refused


# --- what goes wrong


def test_flags_are_refused_by_name(capsys: pytest.CaptureFixture) -> None:
    for script, flag, value in (
        (pretrain, "--patch_size", "48"),
        (pretrain, "--patch_size", "0"),
        (pretrain, "--valid_size", "1"),
        (pretrain, "--valid_size", "0"),
        (pretrain, "--valid_size", "nan"),
        (pretrain, "--lr", "-1"),
        (pretrain, "--batch_size", "-4"),
        (pretrain, "--seed", str(2**64)),
        (pretrain, "--arch", "vgg16"),
        (pretrain, "--resume_training", "maybe"),
        (main, "--batch_size", "0"),
        (main, "--k", "two"),
        (main, "--std_dev", "0"),
        (main, "--epochs", "1.5"),
        (main, "--n_samples", "0"),
        (main, "--num_workers", "-1"),
        (main, "--gpus", "0,00"),
        (main, "--gpus", "first"),
        (main, "--gpus", "a0,b1"),
        (main, "--gpus", "-1"),
        (main, "--gpus", "0,,1"),
        (main, "--policy", "best"),
        (main, "--seed", "-1"),
        (main, "--epochs", "-1"),
        (pretrain, "--epochs", "-1"),
        (main, "--attention_lr", "0"),
        (main, "--lr_schedule", "linear"),
        (main, "--supervision", "first"),
    ):
        assert flag in refuses(script, [flag, value], capsys)
    assert "--images" in refuses(main, ["--images", "a.jpg"], capsys)
    assert "--resume_training" in refuses(main, ["--task=test", "--resume_training"], capsys)
    assert "--no_such_flag" in refuses(main, ["--no_such_flag"], capsys)
    for flag in ("--arch", "--patch_size"):
        assert f"{flag}: it is the backbone's: choose it in pretrain.py" in refuses(main, [flag, "1"], capsys)
    assert "--n_glimps" in refuses(main, ["--n_glimps", "2"], capsys)  # no abbreviations


def test_spellings_of_flags() -> None:
    def given(*words: str) -> dict[str, object]:
        return utils.parse_flags(main.Settings, main.__doc__, [*words])

    assert given() == {} and main.Settings().resume_training is False
    for words in (["--resume_training"], ["--resume_training=True"], ["--resume_training", "true"]):
        assert given(*words) == {"resume_training": True}
    assert given("--resume_training", "false") == {"resume_training": False}
    assert given("--k=3") == given("--k", "3") == {"k": 3}
    assert given("--gpus", "0,2") == {"gpus": "0,2"} and utils.choose_gpus("0,2", 3, None) == [0, 2]
    assert given("--task", "predict", "--images", "a.jpg", "b") == {
        "task": "predict",
        "images": (Path("a.jpg"), Path("b")),
    }


def test_bad_data_ends_with_one_line(main_args: list[str], tmp_path: Path) -> None:
    data_dir = Path(main_args[1])
    elsewhere = [*main_args, "--data_dir", str(tmp_path / "nowhere")]
    for script in (pretrain, main):
        message = fails(script, elsewhere[:2] + elsewhere[-2:] if script is pretrain else elsewhere)
        assert message == f"error: the folder {tmp_path / 'nowhere'} cannot be read (No such file or directory)"
    victim = sorted((data_dir / "Images").glob("*/train_*.jpg"))[3]
    victim.write_bytes(b"no image")
    for workers in ("0", "1"):
        message = fails(main, [*main_args, *MODEL, "--epochs", "1", "--num_workers", workers])
        assert f" cannot be used: image {victim} cannot be read (not an image): " in message
        assert message.startswith("error: 1 of ") and "--skip_bad_images" in message
    victim.unlink()
    assert f"1 of the 18 images in {data_dir}" in fails(main, [*main_args, *MODEL])


def test_scales_gpus_and_contradictions(main_args: list[str], save_dir: Path, make_data) -> None:
    assert "k 2 with start_size 4" in fails(main, [*main_args, "--k", "2", "--start_size", "4"])
    assert "--gpus" in fails(main, [*main_args, "--gpus", "0"])  # main_args says --device cpu
    missing = str(torch.cuda.device_count())
    words = [word for word in main_args if word not in ("--device", "cpu")]
    assert f"GPU {missing} not found" in fails(main, [*words, "--device", "cuda", "--gpus", missing])
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    before = [(save_dir / name).read_bytes() for name in main.FILES]
    for flag, value in (
        ("--k", "1"),
        ("--start_size", "2"),
        ("--n_glimpses", "1"),
        ("--rnn_hidden", "8"),
        ("--std_dev", "0.3"),
    ):
        for task in ("--task=test", "--task=view_glimpses", "--resume_training"):
            path = save_dir / ("last.tar" if task == "--resume_training" else "saved_model.tar")
            assert f"{flag} {value} contradicts {path}" in fails(main, [*main_args, task, flag, value])
    for flag, value in (
        ("--seed", "1"),
        ("--smallest_crop", "0.5"),
        ("--policy", "center"),
        ("--supervision", "last"),
        ("--valid_size", "0.5"),
    ):
        message = fails(main, [*main_args, "--resume_training", flag, value])
        assert f"{flag} {value} contradicts {save_dir / 'last.tar'}" in message and "leave the flag out" in message
    make_data(n_train=7)  # in the same folder
    message = fails(main, [*main_args, "--resume_training"])
    assert f"{save_dir / 'last.tar'} was trained on other images: " in message and "--data_dir" in message
    assert [(save_dir / name).read_bytes() for name in main.FILES] == before  # nothing was damaged


def test_pretraining_is_resumed_as_it_was(
    pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(pretrain, [*pretrain_args, "--epochs", "1"])
    for flag, value in (("--arch", "resnet34"), ("--patch_size", "64"), ("--seed", "1")):
        assert flag in fails(pretrain, [*pretrain_args, "--resume_training", flag, value])
    path = tmp_path / "out" / "pt_last.tar"
    run(pretrain, [*pretrain_args, "--resume_training"])
    assert "1 epoch of 1 done" in capsys.readouterr().out
    run(pretrain, [*pretrain_args, "--resume_training", "--epochs", "2", "--lr", "0.5"])
    last = read(path)
    assert last["settings"]["lr"] == 0.5 and last["optimizer"]["param_groups"][0]["lr"] == 0.25  # halfway down
    path.write_bytes(path.read_bytes()[:5000])
    assert "pt_last.tar cannot be read" in fails(pretrain, [*pretrain_args, "--resume_training"])


def test_backbone_never_saw_the_validation_images(pretrain_args: list[str], tmp_path: Path) -> None:
    """Both scripts split the list alike, whatever the seed; another --valid_size would mix the parts."""
    run(pretrain, [*pretrain_args, "--epochs", "1"])
    shared = ["--data_dir", pretrain_args[1], "--save_dir", str(tmp_path / "out"), *SMALL, *MODEL, "--epochs", "1"]
    splits, real = [], dataset.split_list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "split_list", lambda *given, **more: splits.append(real(*given, **more)) or splits[-1])
        run(pretrain, [*pretrain_args, "--epochs", "1", "--overwrite"])
        run(main, [*shared, "--seed", "3"])
    assert len(splits) == 2 and splits[0] == splits[1]
    [train, valid], path = splits[0], tmp_path / "out" / "pt_glimpse_model.tar"
    _, larger = dataset.read_training_lists(Path(pretrain_args[1]), 0.5)
    mixed = [file for file in larger.files if file in train.files]
    assert set(larger.files) > set(valid.files) and mixed
    message = fails(main, [*shared, "--valid_size", "0.5", "--overwrite"])
    wanted = f"{len(mixed)} of the {len(larger.files)} validation images were used in training {path}, first {mixed[0]}"
    assert message == f"error: {wanted}: see --data_dir and --valid_size"


def test_learning_rate_and_batch_size_may_change_on_resuming(main_args: list[str], save_dir: Path) -> None:
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    resume = ["--save_dir", str(save_dir), "--num_workers", "0", "--device", "cpu", "--resume_training"]
    main.main([*resume, "--epochs", "2", "--lr_schedule", "constant"])
    last = read(save_dir / "last.tar")
    assert [last["settings"][name] for name in ("lr", "attention_lr", "batch_size")] == [0.01, 1e-4, 4]
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [0.01, 1e-4]
    main.main([*resume, "--epochs", "3", "--lr", "0.5", "--attention_lr", "0.2", "--batch_size", "6"])
    last = read(save_dir / "last.tar")
    assert [last["settings"][name] for name in ("lr", "attention_lr", "batch_size")] == [0.5, 0.2, 6]
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [0.5, 0.2]


def test_cosine_schedule(main_args: list[str], save_dir: Path) -> None:
    rates = [utils.learning_rate(0.1, "cosine", epoch, 4) for epoch in range(4)]
    assert rates == pytest.approx([0.1, 0.1 * (2 + 2**0.5) / 4, 0.05, 0.1 * (2 - 2**0.5) / 4])
    assert utils.learning_rate(0.1, "constant", 3, 4) == 0.1
    run(main, [*main_args, *MODEL, "--epochs", "2"])  # half way down in the second epoch
    groups = read(save_dir / "last.tar")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.005, 5e-5])


def test_foreign_log_is_left_alone(
    main_args: list[str], pretrain_args: list[str], save_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for script, path, flags in (
        (main, save_dir / "log.csv", [*main_args, *MODEL]),
        (pretrain, tmp_path / "out" / "pt_log.csv", pretrain_args),
    ):
        path.write_text("a,b\n1,2\n")
        assert f"{path.parent} holds an earlier run ({path.name}): replace it with" in fails(script, flags)
        assert path.read_text() == "a,b\n1,2\n"


def test_bad_checkpoints_end_with_one_line(main_args: list[str], pretrain_args: list[str], save_dir: Path) -> None:
    assert "saved_model.tar not found" in fails(main, [*main_args, "--task=test"])
    assert "last.tar not found" in fails(main, [*main_args, "--resume_training"])
    assert "pt_last.tar not found" in fails(pretrain, [*pretrain_args, "--resume_training"])
    assert "gone.pth not found" in fails(pretrain, [*pretrain_args, "--weights", str(save_dir / "gone.pth")])
    for name, task in (("saved_model.tar", "--task=test"), ("last.tar", "--resume_training")):
        (save_dir / name).write_bytes(b"PK not really")
        assert f"{name} cannot be read" in fails(main, [*main_args, task])
        torch.save({"model_dict": {}}, save_dir / name)
        assert f"{name} is not a checkpoint of the expected kind" in fails(main, [*main_args, task])
        (save_dir / name).unlink()
    path = save_dir / "pt_glimpse_model.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "pt_glimpse_model.tar cannot be read" in fails(main, [*main_args])
    path.write_bytes(b"")
    assert "pt_glimpse_model.tar cannot be read" in fails(main, [*main_args])
    torch.save({"model_dict": {}, "settings": {"arch": "resnet1", "patch_size": 32}}, path)
    assert "the arch of its backbone" in fails(main, [*main_args])
    torch.save({"weights": 1}, path)
    assert "no entry model_dict" in fails(main, [*main_args])
    torch.save({"model_dict": {"0.weight": torch.zeros(3)}}, path)
    assert "does not fit" in fails(main, [*main_args])
    assert "does not fit" in fails(pretrain, [*pretrain_args, "--weights", str(path)])
    path.unlink()
    assert "python pretrain.py" in fails(main, [*main_args])


def test_weights_of_another_kind_end_with_one_line(pretrain_args: list[str], tmp_path: Path) -> None:
    path, flags = tmp_path / "weights.pth", ["--weights", str(tmp_path / "weights.pth"), "--epochs", "0"]
    resnet = torchvision.models.get_model(ARCH)
    torch.save(resnet, path)
    message = fails(pretrain, [*pretrain_args, *flags])
    assert message.startswith(f"error: {path} cannot be read: it holds Python objects, such as a whole model: ")
    assert "state_dict()" in message
    for other in (NarrowResNet(BasicBlock, [3, 4, 6, 3]), NarrowResNet(Bottleneck, [2, 2, 2, 2])):
        torch.save(other.state_dict(), path)
        message = fails(pretrain, [*pretrain_args, *flags])
        wanted = f"error: the state in {path} (is --arch {ARCH} right?) does not fit this network: "
        assert message.startswith(wanted) and len(message) < len(wanted) + 200
    assert not (tmp_path / "out" / "pt_glimpse_model.tar").exists()


def test_weights_saved_by_other_scripts_are_accepted(pretrain_args: list[str], tmp_path: Path) -> None:
    """Of DataParallel, whose keys begin with "module.", and beside other entries of a checkpoint."""
    resnet, loaded = torchvision.models.get_model(ARCH), []
    of_parallel = {f"module.{key}": value for key, value in resnet.state_dict().items()}
    entries = {"state_dict": of_parallel, "epoch": 90}
    for name, state in (("plain", resnet.state_dict()), ("parallel", of_parallel), ("checkpoint", entries)):
        torch.save(state, tmp_path / name)
        run(pretrain, [*pretrain_args, "--weights", str(tmp_path / name), "--epochs", "0", "--overwrite"])
        loaded.append(read(tmp_path / "out" / "pt_glimpse_model.tar")["model_dict"])
    assert all(same(loaded[0], other) for other in loaded[1:])
    assert torch.equal(loaded[0]["4.0.conv1.weight"], resnet.layer1[0].conv1.weight)


def test_classifier_is_not_taken_for_a_backbone(main_args: list[str], save_dir: Path) -> None:
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    for name in ("saved_model.tar", "last.tar"):
        message = fails(main, [*main_args, *MODEL, "--overwrite", "--backbone", str(save_dir / name)])
        assert message.startswith(f"error: --backbone {save_dir / name} is a classifier of main.py: ")
        assert "pt_glimpse_model.tar of pretrain.py" in message


def test_fewer_epochs_than_are_done(
    training: tuple[ModuleType, list[str], Path], capsys: pytest.CaptureFixture
) -> None:
    """Change nothing, and are said in one line."""
    script, argv, folder = training
    run(script, [*argv, "--epochs", "2"])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for epochs in ("0", "1", "2"):
        capsys.readouterr()
        run(script, [*argv, "--resume_training", "--epochs", epochs])
        lines = capsys.readouterr().out.splitlines()
        [line] = [line for line in lines if "raise --epochs" in line]
        assert re.match(r"2 epochs\b.* done", line) and not any(line.startswith("epoch ") for line in lines)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


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


def test_only_the_disk_is_blamed_for_what_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.tar"
    utils.save_checkpoint(path, {"epoch": 0})

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="^a mistake in the program$"):
        utils.save_checkpoint(path, {"epoch": 1})
    with pytest.raises(RuntimeError, match="^a mistake in the program$"), utils.replacing(path, mode="wb"):
        broken()
    assert read(path) == {"epoch": 0} and list(tmp_path.iterdir()) == [path]


def test_lack_of_memory_ends_with_one_line(main_args: list[str]) -> None:
    largest, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**40, hard))  # where the system would promise any size
    try:
        message = fails(main, [*main_args, "--rnn_hidden", "1000000000"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (largest, hard))
    assert message.startswith("error: out of memory: ") and "a smaller network" in message
    assert "GPU" not in message and "pt_glimpse_model.tar" not in message and "fit" not in message


def test_interrupted_imports_leave_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py")], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 30
    while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode in (-signal.SIGINT, 130)


@pytest.mark.parametrize(
    ("wanted", "n_gpus", "local_rank", "chosen"),
    [
        ("", 4, 0, [0]),  # torchrun with a single process
        ("", 4, 3, [3]),
        ("", 4, None, [0, 1, 2, 3]),
        ("1,3", 4, None, [1, 3]),
        ("1,3", 4, 1, [3]),
        ("2", 4, 0, [2]),
        ("", 0, None, "GPU 0 not found: this machine has 0 visible GPUs"),
        ("4", 4, None, "GPU 4 not found: this machine has 4 visible GPUs"),
        ("0,7", 4, 0, "GPU 7 not found"),
        ("", 4, 4, "torchrun started more processes on this machine than the 4 GPUs"),
        ("1,3", 4, 2, "torchrun started more processes on this machine than the 2 GPUs"),
    ],
)
def test_gpus_of_a_process(wanted: str, n_gpus: int, local_rank: int | None, chosen: list[int] | str) -> None:
    if isinstance(chosen, list):
        assert utils.choose_gpus(wanted, n_gpus, local_rank) == chosen
    else:
        with pytest.raises(utils.UserError, match=chosen):
            utils.choose_gpus(wanted, n_gpus, local_rank)


def test_saving_where_nothing_can_be_written(pretrain_args: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another" in fails(pretrain, [*pretrain_args, "--save_dir", str(tmp_path / "file" / "below")])


def test_log_is_written_from_the_checkpoint(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch that is repeated, because the last checkpoint does not have it yet, is logged once."""
    real = utils.save_checkpoint

    def stop(path: Path, content: dict) -> None:
        if path.name == "last.tar" and content["epoch"] == 1:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "save_checkpoint", stop)
        run(main, [*main_args, *MODEL, "--epochs", "3"])
    before = read_log(save_dir / "log.csv")
    assert [row["epoch"] for row in before] == ["1", "2"] and read(save_dir / "last.tar")["epoch"] == 0
    (save_dir / "log.csv").write_text("damaged")
    run(main, [*main_args, "--resume_training"])
    after, last = read_log(save_dir / "log.csv"), read(save_dir / "last.tar")
    assert [row["epoch"] for row in after] == ["1", "2", "3"] and same_result(after[:2], before)
    assert [row["epoch"] for row in last["log"]] == [1, 2, 3] and last["log"][0].keys() == after[0].keys()
    for stored, logged in zip(last["log"], after):
        assert stored == pytest.approx({name: float(value) for name, value in logged.items()}, rel=1e-5)


def test_estimates_of_trajectories() -> None:
    probabilities = torch.eye(4).expand(3, 4, 4)  # trajectory m of each image is sure of class m
    learned = main.estimates(probabilities, "learned")
    assert list(learned) == ["deterministic", "sampled trajectory", "average of 3"]
    assert torch.equal(learned["deterministic"], probabilities[:, :1])
    assert torch.equal(learned["sampled trajectory"], probabilities[:, 1:])
    assert torch.allclose(learned["average of 3"], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]).expand(3, 1, 4))
    assert list(main.estimates(probabilities, "random")) == ["sampled trajectory", "average of 4"]
    assert list(main.estimates(probabilities[:, :1], "center")) == ["deterministic"]
    learned, random = (main.evaluation_noise(policy, 5, 7, 2, seed=0) for policy in ("learned", "random"))
    assert learned.shape == (5, 8, 2, 2) and (learned[:, 0] == 0).all() and (learned[:, 1:] != 0).all()
    center = main.evaluation_noise("center", 5, 7, 2, seed=0)
    assert torch.equal(random, learned[:, 1:]) and center.shape == (5, 1, 2, 2)


def test_test_reports_hit_rates_where_boxes_are_known(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    files = dataset.read_list(main_args[1], "test").files
    square = [(i / 20, 0.4, 1.0, 0.51 + i / 40) for i in range(8)]  # on a canvas of side 1; the ninth has no annotation
    for file, (left, top, right, bottom) in zip(files, square):
        width, height = Image.open(file).size
        side = min(width, height)
        x, y = (width - side) / 2, (height - side) / 2
        box = (x + left * side, y + top * side, x + right * side, y + bottom * side)
        annotate(Path(main_args[1]), {file: [box]}, width, height)
    boxes = dataset.boxes_of_dogs(dataset.read_dogs(dataset.read_list(main_args[1], "test")))
    assert torch.allclose(boxes[:8, 0], torch.tensor(square), atol=1e-5) and boxes[8].isnan().all()

    # The deterministic trajectory starts 0.29 to the left of the centre, then goes to it; a sampled one goes astray.
    location = torch.tensor([[[-0.58, 0.0], [0.0, 0.0]], [[0.0, 0.0], [-0.9, 0.9]]]).expand(9, 2, 2, 2)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", lambda *_: [torch.full((9, 2, 2, 3), 1 / 3), location])
        run(main, [*main_args, "--task=test", "--n_trajectories=1"])
    report = capsys.readouterr().out

    def by_hand(x: float, y: float) -> list[str]:
        """The gaze at one place of the canvas, for which the finest patch covers a quarter of the side."""
        hits = distance = covered = 0.0
        corner = [round((place - 0.125) * 128) / 128 for place in (x, y)]  # on the grid of pixels
        for left, top, right, bottom in square:
            hits += left <= x <= right and top <= y <= bottom
            distance += math.hypot((left + right) / 2 - x, (top + bottom) / 2 - y)
            width = min(corner[0] + 0.25, right) - max(corner[0], left)
            height = min(corner[1] + 0.25, bottom) - max(corner[1], top)
            covered += max(0, width) * max(0, height) / ((right - left) * (bottom - top))
        return [f"hit_rate {hits / 8:.4f}  distance_to_dog {distance / 8:.4f}  coverage {covered / 8:.4f}"]

    guess = "accuracy 0.3333  nll 1.0986"
    expected = {
        "glimpse 1      deterministic": [guess, "distance_from_center 0.2900", *by_hand(0.21, 0.5)],
        "glimpse 1      sampled trajectory": [guess, "distance_from_center 0.0000", *by_hand(0.5, 0.5)],
        "glimpse 1      average of 1": [guess],
        "glimpse 2      deterministic": [guess, "distance_from_center 0.0000", *by_hand(0.5, 0.5)],
        "glimpse 2      sampled trajectory": [guess, "distance_from_center 0.6364", *by_hand(0.05, 0.95)],
        "glimpse 2      average of 1": [guess],
        "to compare     at the centre": by_hand(0.5, 0.5),
    }
    lines = report.splitlines()[5:]
    for line, (subject, figures) in zip(lines, expected.items()):
        assert (line[:35].rstrip(), line[35:]) == (subject, "  ".join(figures))
    at_random = {name: float(value) for name, value in re.findall(r"([a-z_]+) (\d\.\d{4})", lines[7][35:])}
    area = statistics.mean((right - left) * (bottom - top) for left, top, right, bottom in square)
    assert at_random["hit_rate"] == pytest.approx(area, abs=0.04) and lines[7].startswith("to compare     anywhere")
    assert lines[8] == "dogs are annotated in 8 of 9 images"
    figures = toy_table.read_report(report)
    assert figures["policy deterministic accuracy"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["glimpse 1 deterministic hit_rate"] == 5 / 8  # boxes with left <= 0.2
    path = Path(main_args[1]) / "Annotation" / files[0].parent.name / files[0].stem
    for broken in (
        "no XML",
        '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>',
        path.read_text().replace("<xmin>", "<x>").replace("</xmin>", "</x>"),
        re.sub(r"<width>\d+", "<width>0", path.read_text()),
        path.read_text().encode("utf-16").decode("latin-1"),
    ):
        path.write_text(broken, encoding="latin-1")
        refused = fails(main, [*main_args, "--task=test"])
        assert refused.startswith(f"error: annotation {path} cannot be read (") and "fetch it again" in refused


def test_boxes_survive_the_way_of_the_image(tmp_path: Path) -> None:
    """A dog of white pixels, stored in every EXIF orientation, of which the crop cuts some off."""

    def boxes_in(files: list[Path]) -> torch.Tensor | None:
        return dataset.boxes_of_dogs(dataset.read_dogs(dataset.ImageList(files, [0] * len(files), ["breed"])))

    data_dir = tmp_path / "dogs"
    for width, height in ((90, 60), (60, 100)):
        pixels = np.zeros((height, width), dtype=np.uint8)
        left, top, right, bottom = 3, 8, 40, 50
        pixels[top:bottom, left:right] = 255
        for orientation in range(1, 9):
            file = data_dir / "Images" / "breed" / f"{width}_{orientation}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            Image.fromarray(pixels).save(file, exif=exif)
            canvas = dataset.load_canvas(file, 120)[0] > 127
            rows, columns = canvas.any(1).nonzero().flatten(), canvas.any(0).nonzero().flatten()
            seen = [columns[0] / 120, rows[0] / 120, (columns[-1] + 1) / 120, (rows[-1] + 1) / 120]
            dogs = [(-9, -9, -3, -3), (left, top, right, bottom), (left, top, right, bottom)]  # the first lies outside
            annotate(data_dir, {file: dogs}, width, height)
            boxes = boxes_in([file])
            assert boxes.shape == (1, 2, 4)
            assert (boxes - torch.stack(seen)).abs().max() < 0.02, (width, orientation)
    files = [data_dir / "Images" / "breed" / "unknown.png", file]
    boxes = boxes_in(files)
    assert boxes[0].isnan().all() and boxes[1].isfinite().all()
    assert boxes_in(files[:1]) is None


def test_supervision_is_the_flags(main_args: list[str], save_dir: Path) -> None:
    losses = {}
    for supervision in ("each", "last"):
        run(main, [*main_args, *MODEL, "--epochs", "1", "--supervision", supervision, "--overwrite"])
        losses[supervision] = read_log(save_dir / "log.csv")[0]["train_classification"]
        assert read(save_dir / "last.tar")["settings"]["supervision"] == supervision
    assert losses["each"] != losses["last"]


def test_resuming_keeps_the_number_of_epochs(
    main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    run(main, [*main_args, *MODEL, "--epochs", "1"])
    run(main, [*main_args, "--resume_training"])  # not 101, the default of a new run
    assert read(save_dir / "last.tar")["epoch"] == 0
    assert capsys.readouterr().out.count("1 epoch of 1 done: to go on, raise --epochs") == 1


def test_scores_by_hand() -> None:
    probabilities = torch.eye(3)[[0, 0, 1, 1]].unsqueeze(1)  # predictions 0, 0, 1, 1
    values = main.scores(probabilities, torch.tensor([0, 0, 0, 1]))
    tiny = torch.finfo(torch.float32).tiny
    wanted = {"accuracy": 3 / 4, "mean_per_class": (2 / 3 + 1) / 2, "top5": 1.0, "nll": -math.log(tiny) / 4}
    assert values == pytest.approx(wanted)
    spread = torch.arange(12.0).view(1, 1, 12)  # the best five are 7 to 11
    assert [main.scores(spread, torch.tensor([label]))["top5"] for label in (7, 6)] == [1, 0]
    two = torch.stack([torch.eye(2)[[0, 0]], torch.eye(2)[[1, 0]]], dim=1)  # two trajectories over two images
    assert main.scores(two, torch.tensor([0, 0]))["accuracy"] == 3 / 4
    sure = torch.tensor([[[0.2, 0.8]], [[0.5, 0.5]]])
    assert main.scores(sure, torch.tensor([0, 1]))["nll"] == pytest.approx(-(math.log(0.2) + math.log(0.5)) / 2)


def test_toy_table_is_of_the_reports_and_continued(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data_dir, out, calls = make_data(), tmp_path / "table", []
    for i, file in enumerate(dataset.read_list(data_dir, "test").files):
        annotate(data_dir, {file: [(4, 4, 6, 6 if i % 2 else 4.5)]}, 10, 10)

    def run_here(script: str, flags: list[str]) -> str:  # in this process, which has PyTorch loaded
        calls.append(script)
        module, printed = {"pretrain.py": pretrain, "main.py": main}[script], io.StringIO()
        assert fit(module, flags) == flags  # only flags that have an effect
        with contextlib.redirect_stdout(printed):
            run(module, [*flags, *SMALL])
        return printed.getvalue()

    monkeypatch.setattr(toy_table, "run", run_here)
    monkeypatch.setattr(toy_table, "BACKBONE", [*toy_table.BACKBONE[:-1], "1", "--arch", ARCH])
    once = ["--rnn_hidden", "8", "--epochs", "1"]
    monkeypatch.setattr(toy_table, "ROWS", {"learned": once, "one, center": [*once, "--policy", "center"]})
    for _ in range(2):
        toy_table.main(["--data_dir", str(data_dir), "--out", str(out), "--seeds", "3", "4"])
        for seed, accuracy in ((3, "0.1000"), (4, "0.3000")):
            report = out / f"seed_{seed}" / "one_center" / "test.txt"
            report.write_text(re.sub(r"(?<=deterministic       accuracy )\S+", accuracy, report.read_text()))
    assert calls == 2 * ["pretrain.py", *(4 * ["main.py"])]  # nothing is run twice
    lines = capsys.readouterr().out.splitlines()
    learned, center = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:])
    assert len(learned) == len(center) == 1 + len(toy_table.COLUMNS) and (learned[0], center[0]) == tuple(
        toy_table.ROWS
    )
    assert center[1] == "20.0 ± 14.1"
    assert center[2] == center[5] == "" and center[4] == "44.4 ± 0.0"  # 4 of 9 boxes hold the middle
