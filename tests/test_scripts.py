"""pretrain.py and main.py as a user runs them, on a few small images."""

import functools
import hashlib
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import (
    ARCH,
    BACKBONE,
    MODEL,
    SMALL,
    annotate,
    collect_panels,
    draw_image,
    fails,
    find_result,
    load,
    read,
    read_log,
    same,
    same_result,
    write_list,
)
from PIL import Image
from scipy.io import loadmat

import dataset
import main
import pretrain
import utils
from model import HEADS, PretrainNetwork, build_backbone, fold_batchnorm

ROOT = Path(__file__).parent.parent


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
    pretrain.main([*pretrain_args, "--epochs", "2"])
    out = tmp_path / "out"
    best, last = read(out / "pt_glimpse_model.tar"), read(out / "pt_last.tar")
    assert best["model_dict"].keys() == build_backbone(ARCH).state_dict().keys()
    assert (best["settings"]["arch"], best["settings"]["patch_size"]) == (ARCH, "32") and last["epoch"] == 1
    rows = read_log(out / "pt_log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert min(map(mean_error_of_heads, rows)) == pytest.approx(last["best_score"], abs=1e-5)

    shared = [*pretrain_args[: -len(BACKBONE)], "--imgs_dir", str(tmp_path / "imgs")]
    capsys.readouterr()
    main.main([*shared, *MODEL, "--epochs", "2"])
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed and "saved_model.tar" in printed and printed.isascii()
    assert [row["epoch"] for row in read_log(out / "log.csv")] == ["1", "2"]

    main.main([*shared, "--task=test", "--n_trajectories=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"9 test images of {shared[1]}, classifier of epoch {read(out / 'saved_model.tar')['epoch'] + 1}; "
        f"boxes for 0 of 9 images; as in {shared[1]}/lists"
    )
    assert lines[-2:] == [
        f"figures: {out / 'results_learned.json'}, predictions: {out / 'predictions_learned.csv'}",
        f"next: python main.py --task=view_glimpses --data_dir {shared[1]} --save_dir {out}",  # what can be typed
    ]
    assert "stop_at" not in read(out / "saved_model.tar")["settings"]  # a flag of one command
    subjects = ("policy learned", "glimpse 1", "glimpse 2")
    kinds = ("deterministic", "sampled trajectory", "average of 3")
    assert [(line[:15].rstrip(), line[15:35].rstrip()) for line in lines[1:-13]] == [
        (subject, estimate) for subject in subjects for estimate in kinds
    ]
    assert all(line.startswith("stopping above ") for line in lines[-13:-2])

    main.main([*shared, "--task", "view_glimpses", "--n_samples", "4"])
    images = dataset.read_list(shared[1], "test")
    drawn = main.drawing_paths(tmp_path / "imgs", [images.files[i] for i in main.fixed_choice(9, 4, seed=0)])
    assert {*(tmp_path / "imgs").iterdir()} == {tmp_path / "imgs" / "contact_sheet.jpg", *drawn} and len({*drawn}) == 4
    image = draw_image(np.random.default_rng(5), 90, 70)
    image.save(tmp_path / "photo.png")
    capsys.readouterr()
    folders = ["--save_dir", str(out), "--imgs_dir", str(tmp_path / "imgs")]
    main.main([*folders, "--task=predict", "--images", str(tmp_path / "photo.png")])  # neither data nor other flags
    lines = capsys.readouterr().out.splitlines()
    drawn = tmp_path / "imgs" / "photo.jpg"
    assert lines[0] == f"{tmp_path / 'photo.png'}: average of 7 (drawn in {drawn})"
    assert lines[-1] == f"predictions: {tmp_path / 'imgs' / 'predictions.csv'}"
    assert len(lines) == 5  # there are three breeds to name
    assert sum(float(re.match(r"\s+([\d.]+)%", line)[1]) for line in lines[1:-1]) == pytest.approx(100, abs=0.2)
    assert Image.open(drawn).width > 500


def test_both_scripts_learn_what_can_be_learned(make_data, save_dir: Path) -> None:
    """Breeds of one color each, which both networks soon tell apart."""
    data_dir = make_data(n_train=12)
    for folder, color in zip(sorted((data_dir / "Images").iterdir()), ("red", "green", "blue")):
        for i, file in enumerate(sorted(folder.iterdir())):  # no two alike, which would not be split
            Image.new("RGB", (64 + i, 64), color).save(file)
    shared = ["--data_dir", str(data_dir), "--save_dir", str(save_dir), *SMALL, "--lr", "0.001"]
    pretrain.main([*shared, *BACKBONE, "--epochs", "8", "--overwrite"])
    assert read(save_dir / "pt_glimpse_model.tar")["metrics"]["valid_accuracy_123"] > 0.9
    main.main([*shared, "--rnn_hidden", "16", "--k", "1", "--start_size", "2", "--epochs", "16"])
    assert read(save_dir / "saved_model.tar")["metrics"]["valid_accuracy"] > 0.9


def test_heads_are_tested_as_they_were_saved(
    pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With heads that always predict 0, 1, 2 and 0, on a list of two, three and four images of these breeds."""
    pretrain.main([*pretrain_args, "--epochs", "1"])
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
    given = [*pretrain_args, "--task=test"]
    capsys.readouterr()
    pretrain.main(given)
    assert capsys.readouterr().out.splitlines() == [
        f"9 test images of {pretrain_args[1]}, backbone of epoch 1",
        "head 12   22.2% correct (2 of 9; 95% CI 6% to 55%)",
        "head 13   33.3% correct (3 of 9; 95% CI 12% to 65%)",
        "head 23   44.4% correct (4 of 9; 95% CI 19% to 73%)",
        "head 123  22.2% correct (2 of 9; 95% CI 6% to 55%)",
        f"figures: {tmp_path / 'out' / 'pt_results.json'}",
    ]
    results = json.loads((tmp_path / "out" / "pt_results.json").read_text())
    assert results["figures"]["heads"]["23"]["accuracy"] == pytest.approx(4 / 9) and results["images"] == 9
    backbone = build_backbone(ARCH)
    of_pass = utils.multiply_adds(lambda: backbone(torch.zeros(1, 3, 32, 32)))
    assert results["multiply_adds"] == {"12": 2 * of_pass, "13": 2 * of_pass, "23": 2 * of_pass, "123": 3 * of_pass}
    assert "--arch" in fails(pretrain, [*given, "--arch", "resnet34"])
    torch.save({key: value for key, value in checkpoint.items() if key != "heads"}, path)
    message = fails(pretrain, given)
    assert str(path) in message and "heads" in message
    torch.save({**checkpoint, "data": {**checkpoint["data"], "class_names": ["cat"]}}, path)
    message = fails(pretrain, given)
    assert f"a class n00000001-toy_breed_1 that {path} lacks: rename it, perhaps to cat" in message


def test_untrained_classifier_and_backbone_of_another_folder(
    main_args: list[str], save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (save_dir / "pt_glimpse_model.tar").rename(tmp_path / "backbone.tar")
    assert "--backbone" in fails(main, [*main_args, *MODEL])
    given = [*main_args, *MODEL, "--backbone", str(tmp_path / "backbone.tar")]
    main.main([*given, "--epochs", "0"])
    untrained = read(save_dir / "saved_model.tar")
    message = fails(main, [*given, "--epochs", "0"])
    assert f"{save_dir} holds an earlier run (saved_model.tar): " in message
    assert untrained["epoch"] == -1 and not (save_dir / "last.tar").exists()
    capsys.readouterr()
    main.main([*main_args, "--task=test"])
    assert "classifier of epoch 0" in capsys.readouterr().out
    assert "--task=predict needs --images" in fails(main, [*main_args, "--task=predict"])
    main.main([*given, "--epochs", "1", "--overwrite"])
    trained = read(save_dir / "saved_model.tar")
    message = fails(main, [*main_args, "--resume_training", "--backbone", "a.tar"])
    assert f"--backbone a.tar contradicts {save_dir / 'last.tar'}" in message
    main.main([*given, "--resume_training", "--epochs", "1"])  # the same file may be named again
    assert (trained["model_dict"]["locate.first.weight"] != untrained["model_dict"]["locate.first.weight"]).any()
    main.main([*main_args, "--resume_training", "--epochs", "0"])  # there is nothing left to do, nor to overwrite
    assert same(read(save_dir / "saved_model.tar"), trained)


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_batches_of_one_and_ragged_batches(main_args: list[str], save_dir: Path, batch_size: str) -> None:
    """A bare squeeze crashed the 2018 code on a batch of one image; 12 training images leave 2 after two fives."""
    main.main([*main_args, *MODEL, "--batch_size", batch_size, "--epochs", "1"])
    main.main([*main_args, "--task=test", "--batch_size", batch_size])
    assert read(save_dir / "last.tar")["epoch"] == 0


def test_pretraining_survives_a_ragged_batch_of_one(pretrain_args: list[str], tmp_path: Path) -> None:
    pretrain.main([*pretrain_args, "--batch_size", "11", "--epochs", "1"])  # 12 training images
    assert read(tmp_path / "out" / "pt_last.tar")["epoch"] == 0


def test_every_policy_trains(main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture) -> None:
    for policy in ("center", "random", "grid"):
        main.main([*main_args, *MODEL, "--policy", policy, "--epochs", "1", "--overwrite"])
        assert read(save_dir / "saved_model.tar")["settings"]["policy"] == policy
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
    about = read(tmp_path / "saved_model.tar")["backbone"]
    assert (about["arch"], about["patch_size"], about["file"]) == ("resnet50", 96, str(path))
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


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
    for best, log, score in (
        (out / "pt_glimpse_model.tar", out / "pt_log.csv", mean_error_of_heads),
        (save_dir / "saved_model.tar", save_dir / "log.csv", lambda row: float(row["valid_nll"])),
    ):
        rows = read_log(log)
        found = [score(row) for row in rows]
        assert read(best)["epoch"] == max(i for i, value in enumerate(found) if value == pytest.approx(min(found)))
        metrics = {name: float(value) for name, value in rows[read(best)["epoch"]].items()}
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
    pretrain.main([*pretrain_args, "--epochs", "4"])
    best = read(tmp_path / "out" / "pt_glimpse_model.tar")
    assert best["epoch"] == 2 and best["metrics"]["valid_nll"] == 2
    assert read(tmp_path / "out" / "pt_last.tar")["best_score"] == 0.25
    assert re.findall(r"^epoch (\d)/4: .* \(best\)", capsys.readouterr().out, re.MULTILINE) == ["1", "2", "3"]


def test_best_classifier_has_the_lowest_nll(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy on a few images is a poor criterion: here it is the same in all epochs."""
    values = iter((0.4, 0.8, 0.6))
    real = main.evaluate

    def evaluate(net: torch.nn.Module, loader: torch.utils.data.DataLoader, *given: object) -> list[torch.Tensor]:
        (probabilities, location, boxes), value = real(net, loader, *given), next(values)
        probabilities = torch.full_like(probabilities, (1 - value) / 2)
        labels = torch.tensor(loader.dataset.images.labels)
        probabilities[torch.arange(len(labels)), :, :, labels] = value
        return [probabilities, location, boxes]

    monkeypatch.setattr(main, "evaluate", evaluate)
    main.main([*main_args, *MODEL, "--epochs", "3"])
    best = read(save_dir / "saved_model.tar")
    assert best["epoch"] == 1 and best["metrics"]["valid_accuracy"] == 1
    nll = [float(row["valid_nll"]) for row in read_log(save_dir / "log.csv")]
    assert nll == pytest.approx([-math.log(0.4), -math.log(0.8), -math.log(0.6)], rel=1e-5)
    assert read(save_dir / "last.tar")["best_score"] == pytest.approx(-math.log(0.8))


def test_view_glimpses_draws_the_deterministic_trajectory(
    main_args: list[str], save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2018 code drew boxes at a location averaged over ten sampled trajectories."""
    main.main([*main_args, *MODEL, "--epochs", "1"])
    drawn = collect_panels(monkeypatch)
    main.main([*main_args, "--task=view_glimpses", "--n_samples", "5"])
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


def test_glance_first_and_stop_when_sure(main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """The glance is scored as glimpse 0, and what predict does on its own is the full rollout, cut when it is sure."""
    main.main([*main_args, *MODEL, "--classify_context", "--epochs", "2"])
    best = read(save_dir / "saved_model.tar")
    [row] = [row for row in read_log(save_dir / "log.csv") if int(row["epoch"]) == best["epoch"] + 1]
    assert 0 <= float(row["valid_accuracy_0"]) <= 1 and float(row["valid_accuracy_2"]) == float(row["valid_accuracy"])
    assert best["thresholds"] == sorted(best["thresholds"]) and best["thresholds"][:: len(best["thresholds"]) - 1] == [
        0,
        1,
    ]
    main.main([*main_args, "--task=test", "--n_trajectories=1", "--precision=fp32"])
    results = json.loads((save_dir / "results_learned.json").read_text())
    curve, glances = results["stopping"], results["figures"]["glimpse 0"]
    assert glances.keys() == {"deterministic", "sampled trajectory", "average of 1"}
    assert curve[0]["accuracy"] == pytest.approx(glances["deterministic"]["accuracy"])
    full = results["figures"]["policy learned"]["deterministic"]["accuracy"]
    assert curve[-1]["accuracy"] == pytest.approx(full)
    assert curve[-1]["multiply_adds"] == pytest.approx(results["multiply_adds"]["deterministic"])
    assert [point["multiply_adds"] for point in curve] == sorted(point["multiply_adds"] for point in curve)

    images, flags = dataset.read_list(main_args[1], "test").files, {"device": "cpu", "precision": "fp32"}
    patient, costs, taken = main.load_classifier(save_dir, **flags, n_trajectories=1), [], set()
    rollouts = torch.stack([patient(file).drawn for file in images])  # [N, T + 1, C]
    stop_at = rollouts[:, 0].amax(-1).median().item()  # about half of the images stop at the glance
    hasty = main.load_classifier(save_dir, **flags, stop_at=stop_at)
    for file in images:
        whole, cut = patient(file), hasty(file)
        costs.append(utils.multiply_adds(functools.partial(hasty, file)))
        n = len(cut.location)
        assert len(cut.drawn) == n + 1 and torch.allclose(cut.drawn, whole.drawn[: n + 1], atol=1e-6)
        assert torch.allclose(cut.location, whole.location[:n], atol=1e-6) and len(cut.attention) == n
        assert torch.equal(cut.probabilities, cut.drawn[-1]) and cut.estimate == "deterministic"
        assert (cut.drawn[:-1].amax(-1) <= stop_at).all() and (n == 2 or cut.drawn[-1].max() > stop_at)
        assert hasty.draw(cut, file.name).size[1] > 0
        taken.add(n)
    assert len(taken) > 1  # some images need more than others
    up_to_each = main.multiply_adds(patient.args, best["backbone"], rollouts.shape[-1], 1)
    labels = torch.zeros(len(images), dtype=torch.long)
    [point] = main.stopping(rollouts, labels, [stop_at], up_to_each)
    assert statistics.fmean(costs) == pytest.approx(point["multiply_adds"])
    rows = [row for row in read_log(save_dir / "predictions_learned.csv") if row["estimate"] == "after glimpse 0"]
    assert [float(row["probability_1"]) for row in rows] == pytest.approx(rollouts[:, 0].amax(-1).tolist(), abs=1e-4)
    capsys.readouterr()
    main.main([*main_args, "--task=predict", "--stop_at=1e-9", "--images", str(images[0])])
    assert "deterministic after 0 of 2 glimpses (drawn in " in capsys.readouterr().out
    main.main([*main_args, "--task=predict", f"--stop_at={stop_at}", "--images", *map(str, images)])
    rows = read_log(Path(main_args[main_args.index("--imgs_dir") + 1]) / "predictions.csv")
    assert {(row["x_1"] == "nan") + (row["x_2"] == "nan") for row in rows} == {2 - n for n in taken}


def test_stopping_by_hand() -> None:
    probabilities = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.3, 0.7]], [[0.55, 0.45], [0.9, 0.1]]])
    curve = main.stopping(probabilities, torch.tensor([0, 1, 0]), [0.0, 0.58, 0.7, 1.0], [10, 40])
    assert [point["accuracy"] for point in curve] == pytest.approx([2 / 3, 2 / 3, 1, 2 / 3])
    assert [point["multiply_adds"] for point in curve] == pytest.approx([10, 20, 30, 40])
    thresholds = main.stopping_thresholds(probabilities[:, :1])
    assert thresholds[0] == 0 and thresholds[-1] == 1 and thresholds[5] == pytest.approx(0.6)
    assert main.stopping_thresholds(probabilities[:, :0]) == []


def test_each_policy_has_tables_of_its_own(main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """Their rows give the figures that are printed, and the locations are those of the predictions beside them."""
    main.main([*main_args, *MODEL, "--epochs", "1"])
    images, net = dataset.read_list(main_args[1], "test"), load(save_dir)
    names = [images.class_names[label] for label in images.labels]
    canvases = dataset.ImageDataset(images, net.glimpse.canvas_size)
    with torch.no_grad():
        rollout = net(torch.stack([canvas for canvas, *_ in canvases]), torch.zeros(9, 1, 2, 2), "learned")
    tables = {}
    classes_of = images.class_names
    for policy, wanted in (
        ("learned", ("deterministic", "average of 3", "after glimpse 1")),
        ("center", ("deterministic", "after glimpse 1")),
        ("random", ("average of 3",)),
    ):
        capsys.readouterr()
        main.main([*main_args, "--task=test", f"--policy={policy}", "--n_trajectories=3"])
        report = capsys.readouterr().out
        tables[policy] = rows = read_log(save_dir / f"predictions_{policy}.csv")
        results = json.loads((save_dir / f"results_{policy}.json").read_text())
        assert results["settings"]["policy"] == policy and results["images"] == 9
        assert results["versions"]["torch"] == torch.__version__
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
            if estimate == "after glimpse 1":
                after = results["figures"]["glimpse 1"]["deterministic"]
                assert after["accuracy"] == pytest.approx(sum(correct) / 9)
                continue
            figures = find_result(report, f"policy {policy}", estimate)
            assert figures["accuracy"] == pytest.approx(sum(correct) / 9, abs=1e-4)
            figures_written = results["figures"][f"policy {policy}"][estimate]
            assert figures_written["accuracy"] == pytest.approx(sum(correct) / 9)
            per_class = [
                sum(row["class_1"] == name for row in mine if row["true_class"] == name) / names.count(name)
                for name in classes_of
            ]
            assert figures["mean_per_class"] == pytest.approx(sum(per_class) / 3, abs=1e-4)
            places = [[row[f"{axis}_{t}"] for t in (1, 2) for axis in "xy"] for row in mine]
            if estimate != "deterministic":
                assert {place for row in places for place in row} == {"nan"}
            elif policy == "center":
                assert {float(place) for row in places for place in row} == {0}
            else:
                places = torch.tensor([list(map(float, row)) for row in places])
                assert torch.allclose(places, rollout.location.flatten(1), atol=1e-3) and places.abs().min() > 0
                probability = rollout.logits[:, 0, -1].softmax(-1).max(-1).values
                assert [float(row["probability_1"]) for row in mine] == pytest.approx(probability.tolist(), abs=1e-3)
        printed = re.findall(rf"^policy {policy} +(\w+ \w+ \d|\w+ \w+|\w+)  +[\d.]+% correct", report, re.MULTILINE)
        assert list(results["figures"][f"policy {policy}"]) == printed
    assert tables["learned"] == read_log(save_dir / "predictions_learned.csv")  # still there


def test_panels_show_what_the_policy_uses(
    main_args: list[str], save_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixed policies use no attention. Drawings are named after the photos, and nothing is removed."""
    main.main([*main_args, *MODEL, "--epochs", "0"])
    drawn, imgs = collect_panels(monkeypatch), tmp_path / "imgs"
    imgs.mkdir()
    mine = [imgs / name for name in ("glimpse_of_my_dog.jpg", "glimpse_0.jpg", "glimpse_9.txt")]
    for path in mine:
        path.write_text("not of view_glimpses")
    trajectories = (("center", 4, "deterministic trajectory"), ("random", 2, "one sampled trajectory"))
    present = {path.name for path in mine} | {"contact_sheet.jpg"}
    for policy, n_samples, trajectory in trajectories:
        drawn.clear()
        main.main([*main_args, "--task=view_glimpses", f"--policy={policy}", f"--n_samples={n_samples}"])
        assert len(drawn) == n_samples and all(attention is None for _, _, attention, *_ in drawn)
        assert all((location == 0).all() == (policy == "center") for _, location, *_ in drawn)
        files = dataset.read_list(main_args[1], "test").files
        chosen = [files[i] for i in main.fixed_choice(9, n_samples, 0)]
        titles = [caption.partition("\n")[0] for *_, caption, _, _ in drawn]
        assert titles == [f"{file.name}: {policy} policy, {trajectory}" for file in chosen]
        stems = [file.stem for file in chosen]  # images of several classes have the same
        counts = [stems[:i].count(stem) for i, stem in enumerate(stems)]
        present |= {f"{stem}_{n}.jpg" if n else f"{stem}.jpg" for stem, n in zip(stems, counts)}
        assert {path.name for path in imgs.iterdir()} == present
    assert all(path.read_text() == "not of view_glimpses" for path in mine)


def test_predict_draws_and_labels_the_deterministic_trajectory(
    main_args: list[str], save_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What is printed is the average over all trajectories, and says so."""
    main.main([*main_args, *MODEL, "--std_dev", "3", "--epochs", "2"])
    draw_image(np.random.default_rng(7), 90, 90).save(tmp_path / "photo.png")
    drawn = collect_panels(monkeypatch)
    capsys.readouterr()
    main.main([*main_args, "--task=predict", "--n_trajectories=4", "--images", str(tmp_path / "photo.png")])
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
    main.main([*words, *MODEL, "--epochs", "1", "--device", "cuda"])
    assert not any(value.is_cuda for value in read(save_dir / "saved_model.tar")["model_dict"].values())
    main.main([*main_args, "--resume_training", "--epochs", "2"])


def test_training_is_the_same_whatever_the_test_images(
    pretrain_args: list[str], main_args: list[str], save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The 2018 code validated on the test list. Here it is read only to name bad images in time."""
    lists, trained = Path(main_args[1]) / "lists", []
    for _ in range(2):
        pretrain.main([*pretrain_args, "--epochs", "1", "--overwrite"])
        main.main([*main_args, *MODEL, "--epochs", "1", "--overwrite"])
        names = [tmp_path / "out" / name for name in pretrain.FILES[:2]] + [save_dir / name for name in main.FILES[:2]]
        trained.append([read(path) for path in names])
        for i, file in enumerate(sorted(lists.parent.glob("Images/*/test_*.jpg"))):
            draw_image(np.random.default_rng(100 + i), 80, 50).save(file)
    assert same_result(*trained)
    (lists / "test_list.mat").write_text("whoever needs this fails")
    capsys.readouterr()
    main.main([*main_args, *MODEL, "--epochs", "1", "--overwrite"])
    assert same_result(trained[0][2:], [read(save_dir / name) for name in main.FILES[:2]])
    assert "note: --task=test will fail: " in capsys.readouterr().out
    assert "test_list.mat cannot be read" in fails(main, [*main_args, "--task=test"])


@pytest.mark.parametrize(
    ("stored", "repeated"),  # flags of the run, and those that describe its machine
    [
        ([], ["--num_workers=2"]),
        ([], ["--precision=bf16"]),
        (["--policy=random"], []),
        (["--policy=oracle", "--smallest_crop=0.6"], []),
        (["--classify_context"], []),
        (["--n_glimpses=1", "--supervision=last"], []),
        pytest.param([], ["--num_workers=0"], marks=pytest.mark.slow),
        pytest.param([], ["--compile", "--precision=bf16"], marks=pytest.mark.slow),
        pytest.param(["--policy=random"], ["--num_workers=2"], marks=pytest.mark.slow),
        pytest.param(["--policy=oracle", "--smallest_crop=0.6"], ["--num_workers=2"], marks=pytest.mark.slow),
        pytest.param(["--policy=center"], ["--num_workers=0"], marks=pytest.mark.slow),
        pytest.param(["--policy=center"], ["--num_workers=2"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_resumed_training_is_the_uninterrupted_one(
    main_args: list[str], save_dir: Path, stored: list[str], repeated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two glimpses, unless the flags say otherwise."""
    if "--policy=oracle" in stored:
        for i, file in enumerate(sorted(Path(main_args[1]).glob("Images/*/*.jpg"))):
            with Image.open(file) as image:
                annotate(Path(main_args[1]), {file: [(i, 5, i + 20, 40)]}, *image.size)
    main_args = [*main_args, *repeated]
    flags = [*main_args, *MODEL, *stored]
    main.main([*flags, "--epochs", "4"])
    straight, log = read(save_dir / "last.tar"), read_log(save_dir / "log.csv")
    best = read(save_dir / "saved_model.tar")

    def interrupt(machine: utils.Machine, text: str) -> None:
        if text.startswith("epoch 2/4"):  # the line that ends the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils.Machine, "print", interrupt)
        main.main([*flags, "--epochs", "4", "--overwrite"])
    assert read(save_dir / "last.tar")["epoch"] == 1
    main.main([*main_args, "--lr", "0.01", "--epochs", "4", "--resume_training=True"])  # architecture from the file
    assert same_result(straight, read(save_dir / "last.tar")) and same_result(log, read_log(save_dir / "log.csv"))
    assert same_result(best, read(save_dir / "saved_model.tar"))


@pytest.mark.parametrize(
    ("stored", "repeated"),
    [
        ([], ["--num_workers=0"]),
        (["--smallest_crop=0.6"], ["--precision=bf16"]),
        pytest.param([], ["--num_workers=2"], marks=pytest.mark.slow),
        pytest.param([], ["--compile", "--precision=bf16"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_resumed_pretraining_is_the_uninterrupted_one(
    stored: list[str], repeated: list[str], pretrain_args: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pretrain_args = [*pretrain_args, *repeated, "--lr_schedule", "constant"]
    pretrain.main([*pretrain_args, *stored, "--epochs", "2"])
    straight, log = read(out / "pt_last.tar"), read_log(out / "pt_log.csv")
    pretrain.main([*pretrain_args, *stored, "--epochs", "1", "--overwrite"])
    pretrain.main([*pretrain_args, "--epochs", "2", "--resume_training"])
    assert same_result(straight, read(out / "pt_last.tar")) and same_result(log, read_log(out / "pt_log.csv"))


def test_earlier_run_is_replaced_only_on_demand(training: tuple[ModuleType, list[str], Path]) -> None:
    script, argv, folder = training
    script.main([*argv, "--epochs", "2"])
    files = script.FILES[:3]
    paths = [folder / name for name in files]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    message = fails(script, [*argv, "--seed", "1", "--epochs", "1"])
    assert f"{folder} holds an earlier run ({', '.join(files)})" in message
    assert "--resume_training=True" in message and "--overwrite" in message
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before

    script.main([*argv, "--seed", "1", "--epochs", "1", "--overwrite"])
    best, last = (read(path) for path in paths[:2])
    for content in (best, last):
        assert (content["settings"]["seed"], content["settings"]["epochs"], content["epoch"]) == ("1", "1", 0)
    assert [row["epoch"] for row in read_log(paths[2])] == ["1"] == [str(row["epoch"]) for row in last["log"]]
    assert set(folder.iterdir()) == before.keys()

    paths[1].unlink()  # now there is nothing to resume from
    message = fails(script, [*argv, "--epochs", "1"])
    assert f"({files[0]}, {files[2]})" in message and "--resume_training" not in message
    assert "--overwrite" in message


def test_untrained_network_replaces_the_whole_run(training: tuple[ModuleType, list[str], Path]) -> None:
    """Otherwise the earlier run could be resumed beside a best checkpoint that is not its own."""
    script, argv, folder = training
    script.main([*argv, "--epochs", "1"])
    script.main([*argv, "--epochs", "0", "--overwrite"])
    untrained = read(folder / script.FILES[0])
    assert (untrained["epoch"], untrained["metrics"], untrained["settings"]["epochs"]) == (-1, {}, "0")
    assert not any((folder / name).exists() for name in script.FILES[1:])


def test_replaced_run_is_not_resumed(
    training: tuple[ModuleType, list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the run that replaces it is stopped after its first best checkpoint."""
    script, argv, folder = training
    script.main([*argv, "--epochs", "1"])
    real = utils.save_checkpoint

    def stop(path: Path, content: dict) -> None:
        if path.name == script.FILES[1]:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "save_checkpoint", stop)
        script.main([*argv, "--epochs", "2", "--seed", "1", "--overwrite"])
    assert read(folder / script.FILES[0])["settings"]["seed"] == "1"
    assert f"{script.FILES[1]} not found" in fails(script, [*argv, "--resume_training", "--epochs", "2"])


def test_resuming_restores_every_setting(training: tuple[ModuleType, list[str], Path]) -> None:
    script, argv, folder = training
    flags = ["--epochs", "1", "--valid_size", "0.5", "--lr", "0.02", "--batch_size", "5", "--seed", "3"]
    flags += ["--lr_schedule", "constant"]
    if script is main:
        flags += ["--attention_lr", "0.03", "--supervision", "last", "--policy", "random"]
        flags += ["--std_dev", "0.3", "--backbone", str(folder / "pt_glimpse_model.tar")]
    script.main([*argv, *flags])
    before = read(folder / script.FILES[1])
    given = {**before["settings"]}
    for name, value in zip(flags[::2], flags[1::2]):
        assert given.pop(name[2:]) == value
    assert given.pop("data_dir") == argv[1] and given.pop("precision") == "fp32"
    defaults = vars(script.make_parser().parse_args([]))
    network = dict(zip(MODEL[::2], MODEL[1::2])) if script is main else dict(zip(BACKBONE[::2], BACKBONE[1::2]))
    for name, value in given.items():
        assert value == network.get(f"--{name}", str(defaults[name]))

    where = ["--save_dir", str(folder), "--device", "cpu", "--num_workers", "0"]
    script.main([*where, "--resume_training", "--epochs", "2"])
    after = read(folder / script.FILES[1])
    assert after["settings"] == {**before["settings"], "epochs": "2"} and same(after["data"], before["data"])
    rates = [group["lr"] for group in after["optimizer"]["param_groups"]]
    assert rates == ([0.02, 0.03] if script is main else [0.02])
    assert [row["epoch"] for row in after["log"]] == [1, 2]
    script.main([*where, "--task=test"])  # on the same data


def test_printed_command_trains_on_the_same_split(
    pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrain.main([*pretrain_args, "--valid_size", "0.5", "--epochs", "1"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: python main.py ")]
    small = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--num_workers", "0", "--device", "cpu"]
    main.main([*shlex.split(line)[3:], *small, "--epochs", "1", "--batch_size", "4"])
    last, backbone = read(tmp_path / "out" / "last.tar"), read(tmp_path / "out" / "pt_last.tar")
    assert same(last["data"], backbone["data"]) and len(last["data"]["validation"]["files"]) == 7 and last["epoch"] == 0
    assert "trained on other images" not in capsys.readouterr().out
    names = ["data_dir", "valid_size"]
    assert [last["settings"][name] for name in names] == [backbone["settings"][name] for name in names]


def test_learning_rate_follows_the_epochs_and_schedule_of_the_resumed_run(main_args: list[str], save_dir: Path) -> None:
    main.main([*main_args, *MODEL, "--epochs", "3"])
    main.main([*main_args, "--resume_training", "--epochs", "6"])
    main.main([*main_args, "--resume_training", "--epochs", "7", "--lr_schedule", "constant"])
    main.main([*main_args, "--resume_training", "--epochs", "8"])  # still constant
    rates = [float(row["lr"]) for row in read_log(save_dir / "log.csv")]
    assert rates[2:4] == pytest.approx([0.0025, 0.005], rel=1e-5) and rates[5] == pytest.approx(0.00067, rel=1e-2)
    assert rates[6:] == [0.01, 0.01]
