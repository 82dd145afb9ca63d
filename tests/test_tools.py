"""The tools beside the scripts: the linear probe, pictures and tables of what runs left, the toy table, the demo."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import controls
import demo_figure
import finetune
import numpy as np
import plot
import probe
import pytest
import torch
import torchvision
import toy_table
from conftest import ARCH, BACKBONE, CPU, SMALL, annotate, draw_image, fails, flags_of, read, read_log, write_list
from matplotlib import pyplot
from PIL import Image
from scipy.io import loadmat
from scipy.stats import binomtest

import dataset
import main
import pretrain
import utils
from model import build_backbone

CLASSIFIER = ["--rnn_hidden", "8", "--k", "1", "--start_size", "4", "--n_glimpses", "2"]


# --- the linear probe


@pytest.fixture
def colors(make_data) -> Path:
    """Images of three classes, each of one color, no two of them alike."""
    data_dir = make_data(n_train=12, n_test=8)
    for i, folder in enumerate(sorted((data_dir / "Images").iterdir())):
        for j, file in enumerate(sorted(folder.iterdir())):
            color = [j] * 3
            color[i] = 255 - j
            Image.new("RGB", (64, 64), tuple(color)).save(file)
    return data_dir


def test_probe_is_the_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=generator), torch.randint(3, (40,), generator=generator)
    fitted = probe.fit_probe(features, labels, 3, weight_decay=0.1)
    # Where the gradient vanishes: the sum over samples of (p - y) x / N balances the pull to zero of the weights.
    excess = (fitted(features).softmax(-1) - torch.eye(3)[labels]) / 40
    assert torch.allclose(excess.T @ features + 0.1 * fitted.weight, torch.zeros(3, 5), atol=1e-4)
    assert torch.allclose(excess.sum(0), torch.zeros(3), atol=1e-4)


def test_probe_reads_what_is_there(colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With random weights, and with a backbone of an earlier run on larger images, unless that has seen what is tested.

    Its predictions have the columns of those of main.py, and its figures follow from them.
    """
    out = tmp_path / "out"
    argv = ["--data_dir", str(colors), "--save_dir", str(out), *SMALL, *BACKBONE]
    probe.main(argv)
    name = f"probe_{ARCH}_none_32_{colors.name}"
    *_, accuracy, where = capsys.readouterr().out.splitlines()
    assert accuracy == "test:       100.0% correct (24 of 24; 95% CI 86% to 100%)"
    assert where == f"figures: {out / name}.json, predictions: {out / f'predictions_{name}.csv'}"
    pretrain.main([*argv, "--epochs", "0"])
    best = out / "pt_glimpse_model.tar"
    larger = [*argv, "--patch_size", "64", "--weights", str(best)]
    probe.main(larger)
    assert f"at 64 pixels, features of {best} weights" in capsys.readouterr().out
    names = [name, f"probe_{ARCH}_pt_glimpse_model_64_{colors.name}"]
    results = [json.loads((out / f"{name}.json").read_text()) for name in names]
    assert [(result["images"], result["images_seen_in_training"]) for result in results] == [(24, 0), (24, 0)]
    figures = results[1]["figures"]["probe"]["linear probe"]
    assert figures["accuracy"] == 1 and figures.keys() == {"accuracy", "mean_per_class", "top5", "nll"}
    assert results[1]["settings"]["weights"] == str(best) and results[1]["versions"]["precision"] == "fp32"
    small, large = (result["multiply_adds"]["linear probe"] for result in results)
    assert 3.9 < large / small < 4.1
    refused = fails(pretrain, [*argv, "--weights", str(best), "--save_dir", str(tmp_path / "other")])
    assert refused == f"error: --weights {best} is from this script: --resume_training continues a run"

    rows, test = read_log(out / f"predictions_{name}.csv"), dataset.read_list(colors, "test")
    assert list(rows[0]) == ["file", "estimate", "true_class", "true_probability", "class_1", "probability_1"] + [
        f"{column}_{i}" for i in (2, 3) for column in ("class", "probability")
    ]
    assert [colors / row["file"] for row in rows] == test.files
    assert [row["true_class"] for row in rows] == [test.class_names[label] for label in test.labels]
    assert {row["estimate"] for row in rows} == {"linear probe"}
    assert all(row["class_1"] == row["true_class"] and row["true_probability"] == row["probability_1"] for row in rows)
    nll = -np.log([float(row["true_probability"]) for row in rows]).mean()
    assert results[0]["figures"]["probe"]["linear probe"]["nll"] == pytest.approx(nll, abs=1e-5)

    content, data = read(best), read(best)["data"]
    [of_test] = dataset.check_images(flags_of(main), CPU, test)
    for seen, use in ((data["validation"]["fingerprints"], "validation"), (of_test.fingerprints, "test")):
        content["data"]["training"]["fingerprints"] = seen
        torch.save(content, best)
        assert re.search(rf"\d+ of the \d+ {use} images were used in training .*{best}, first ", fails(probe, larger))
    content["data"] = {**data, "validation": {**data["validation"], "fingerprints": of_test.fingerprints}}
    torch.save(content, best)
    assert f"24 of the 24 test images were used in training the probe of {best}, first " in fails(probe, larger)


def test_probe_chooses_the_weight_decay_on_validation(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = make_data()
    argv = ["--data_dir", str(data_dir), "--save_dir", str(tmp_path), *SMALL, *BACKBONE]
    probes, tested = {}, []

    def fit(features: torch.Tensor, labels: torch.Tensor, n_classes: int, weight_decay: float) -> torch.nn.Linear:
        """Right on all images with a weight decay of 0.01 only."""
        fitted = torch.nn.Linear(features.shape[1], n_classes)
        probes[fitted] = weight_decay
        return fitted

    def probabilities_of(fitted: torch.nn.Linear, features: torch.Tensor) -> torch.Tensor:
        part = {6: "validation", 9: "test"}[len(features)]
        if part == "test":
            tested.append(probes[fitted])
        truth = torch.arange(3).repeat_interleave(len(features) // 3)
        return torch.eye(3)[truth if probes[fitted] == 0.01 else (truth + 1) % 3].unsqueeze(1)

    monkeypatch.setattr(probe, "fit_probe", fit)
    monkeypatch.setattr(probe, "probabilities_of", probabilities_of)
    probe.main(argv)
    results = json.loads((tmp_path / f"probe_{ARCH}_none_32_{data_dir.name}.json").read_text())
    assert tested == [0.01] and results["weight_decay"] == 0.01
    assert list(probes.values()) == list(probe.WEIGHT_DECAYS)


def test_fine_tuning_learns_and_keeps_the_best_epoch(
    colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Tested is the epoch with the lowest NLL on validation; figures and predictions are those of the test list."""
    argv = ["--data_dir", str(colors), "--save_dir", str(tmp_path), *SMALL, "--arch", ARCH, "--image_size", "32"]
    finetune.main([*argv, "--weights", "none", "--epochs", "6", "--lr", "0.01", "--lr_schedule", "constant"])
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+);", out)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    name = f"finetune_{ARCH}_none_32_{colors.name}"
    results, rows = json.loads((tmp_path / f"{name}.json").read_text()), read_log(tmp_path / f"predictions_{name}.csv")
    figures = results["figures"]["finetune"]["fine-tuned ResNet"]
    right = np.mean([row["class_1"] == row["true_class"] for row in rows])
    assert len(rows) == results["images"] == 24 and figures["accuracy"] == pytest.approx(right) and right > 0.5
    nll = -np.log([float(row["true_probability"]) for row in rows]).mean()
    assert figures["nll"] == pytest.approx(nll, abs=1e-5)
    plot.main(["compare", *[str(tmp_path / f"predictions_{name}.csv")] * 2])
    assert "0.0" in capsys.readouterr().out
    for more in (["--epochs", "0"], ["--epochs", "1", "--batch_size", "5000"]):  # more than there are images
        finetune.main([*argv, "--weights", "none", *more])
        assert "test: " in capsys.readouterr().out
    torch.save({"state_dict": torchvision.models.get_model(ARCH).state_dict()}, tmp_path / "of_another_script.pth")
    finetune.main([*argv, "--weights", str(tmp_path / "of_another_script.pth"), "--epochs", "0"])
    assert (tmp_path / f"predictions_finetune_{ARCH}_of_another_script_32_{colors.name}.csv").exists()


def test_fine_tuning_without_crops_tests_the_whole_square(tmp_path: Path) -> None:
    """A network that was trained on whole images sees their border in the test too; one trained on crops does not."""
    image = Image.new("RGB", (80, 80), "red")
    image.paste("blue", (4, 4, 76, 76))
    image.save(tmp_path / "framed.png")
    images = dataset.ImageList([tmp_path / "framed.png"], [0])
    for smallest, shows_border in ((1.0, True), (0.6, False)):
        args = Namespace(image_size=40, smallest_crop=smallest, batch_size=1, seed=0, num_workers=0)
        [(pixels, *_)] = finetune.make_loader(images, args, trains=False)
        assert (pixels[0, 0, 0, 20] > pixels[0, 2, 0, 20]) == shows_border  # red or blue


def test_results_of_a_probe_last_as_long_as_what_it_probed(colors: Path, tmp_path: Path) -> None:
    """Training a classifier beside them leaves them; replacing the backbone removes those of the old one alone.

    A first backbone replaces none, and leaves those of another of the same name.
    """
    argv = ["--data_dir", str(colors), "--save_dir", str(tmp_path), *SMALL]
    of_another = tmp_path / "probe_resnet50_pt_glimpse_model_96_elsewhere.json"
    of_another.write_text("{}")
    pretrain.main([*argv, *BACKBONE, "--epochs", "0"])
    of_another.unlink()
    probe.main([*argv, *BACKBONE])
    of_none = {path.name for path in tmp_path.glob("*probe_*")}
    probe.main([*argv, *BACKBONE, "--weights", str(tmp_path / "pt_glimpse_model.tar")])
    both = {path.name for path in tmp_path.glob("*probe_*")}
    main.main([*argv, *CLASSIFIER, "--epochs", "0"])
    assert {path.name for path in tmp_path.glob("*probe_*")} == both and len(both) == 2 * len(of_none) == 4
    pretrain.main([*argv, *BACKBONE, "--epochs", "0", "--overwrite"])
    assert {path.name for path in tmp_path.glob("*probe_*")} == of_none


def read_list_file(path: Path) -> tuple[list[str], list[int]]:
    """Names and labels, from 1, of an official list."""
    content = loadmat(path)
    return [name.item() for name in content["file_list"].ravel()], [int(label) for label in content["labels"].ravel()]


def test_probe_refuses_its_own_training_images(colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In its test list, unless they are 1 % at most, which are counted; and a class that it was not trained on."""
    argv = ["--data_dir", str(colors), "--save_dir", str(tmp_path), *SMALL, *BACKBONE]
    train_path, test_path = (colors / "lists" / f"{part}_list.mat" for part in ("train", "test"))
    names, labels = read_list_file(test_path)
    seen = dataset.read_training_lists(colors, 0.3)
    for images in seen:
        twin = images.files[0].relative_to(colors / "Images").as_posix()
        write_list(test_path, [*names, twin], [*labels, images.labels[0] + 1])
        line = fails(probe, argv)
        assert line.startswith("error: 1 of the 25 test images were used in training the probe of none, first ")
        assert line.endswith(f"{twin}: see --data_dir and --valid_size")
    folder = Path(names[0]).parent
    for i in range(75):
        draw_image(np.random.default_rng(i), 40, 40).save(colors / "Images" / folder / f"more_{i}.png")
    more = [f"{folder}/more_{i}.png" for i in range(75)]
    write_list(test_path, [*names, *more, twin], [*labels, *([labels[0]] * 75), images.labels[0] + 1])
    capsys.readouterr()
    probe.main(argv)
    assert "note: 1 of the 100 test images were used in training too" in capsys.readouterr().out
    results = json.loads((tmp_path / f"probe_{ARCH}_none_32_{colors.name}.json").read_text())
    assert (results["images"], results["images_seen_in_training"]) == (100, 1)
    write_list(test_path, names[:8], [1] * 8)  # a class is missing: that is said
    probe.main(argv)
    assert "note: no test images of 2 of 3 classes, first toy breed 2" in capsys.readouterr().out
    write_list(train_path, *zip(*[row for row in zip(*read_list_file(train_path)) if row[1] < 3]))
    write_list(test_path, names, labels)
    line = fails(probe, argv)
    assert "toy_breed_3 that the probe of none lacks: rename it, perhaps to toy breed " in line


def test_probe_ends_in_a_line_for_a_mistake(colors: Path, tmp_path: Path) -> None:
    argv = ["--data_dir", str(colors), "--save_dir", str(tmp_path / "out"), *SMALL, *BACKBONE]
    assert "'33' is not a multiple of 32" in fails(probe, [*argv, "--patch_size", "33"])
    assert f"{tmp_path / 'no.tar'} not found" in fails(probe, [*argv, "--weights", str(tmp_path / "no.tar")])
    torch.save({"model_dict": build_backbone("resnet18").state_dict()}, tmp_path / "other.tar")
    assert "(is --arch narrow right?) does not fit" in fails(probe, [*argv, "--weights", str(tmp_path / "other.tar")])
    victim = dataset.read_list(colors, "test").files[3]
    victim.write_bytes(b"no image")
    line = fails(probe, argv)
    assert re.match(rf"error: 1 of \d+ images cannot be used: image {victim} cannot be read \(not an", line)
    probe.main([*argv, "--skip_bad_images"])
    assert len(read_log(tmp_path / "out" / f"predictions_probe_{ARCH}_none_32_{colors.name}.csv")) == 23
    (colors / "lists" / "test_list.mat").unlink()
    assert f"--data_dir: {colors} has no test images" in fails(probe, argv)
    (tmp_path / "file").write_text("")
    assert "cannot write to the folder" in fails(probe, [*argv, "--save_dir", str(tmp_path / "file")])


# --- pictures and tables of what runs left


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
    def write(path: Path, subject: str, figures: dict[str, tuple[float, int]], **settings: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: {"accuracy": x} for name, (x, _) in figures.items()}
        cost = {name: cost for name, (_, cost) in figures.items()}
        content = {"images": 50, "multiply_adds": cost, "figures": {subject: values, "glimpse 1": values}}
        content["backbone"] = {"arch": "resnet18", "patch_size": 32}
        path.write_text(json.dumps({**content, "settings": settings}))

    sizes = {"k": "1", "start_size": "2", "n_glimpses": "2", "classify_context": "False"}
    estimates = {"deterministic": (0.5, 3 * 10**9), "average of 7": (0.6, 9 * 10**9)}
    write(tmp_path / "1" / "results_learned.json", "policy learned", estimates, policy="learned", **sizes)
    of_k_2 = {"policy": "learned", **sizes, "k": "2"}
    write(tmp_path / "2" / "3" / "results_learned.json", "policy learned", estimates, **of_k_2)
    of_probe, context = {"arch": "resnet50", "weights": "a/b.pth", "patch_size": "96"}, {"classify_context": "True"}
    of_probe["data_dir"] = "data/dogs"
    write(tmp_path / "probe_96.json", "probe", {"linear probe": (0.3, 10**9)}, **of_probe)
    of_whole = {"arch": "resnet50", "weights": "a/b.pth", "image_size": "224"}
    write(tmp_path / "finetune_224.json", "finetune", {"fine-tuned ResNet": (0.7, 4 * 10**9)}, **of_whole)
    of_grid = {"policy": "grid", **sizes, **context}
    write(tmp_path / "4" / "results_grid.json", "policy grid", {"deterministic": (0.4, 10**9)}, **of_grid)
    write(tmp_path / "pt_results.json", "heads", {"23": (0.2, 2 * 10**9)}, **of_probe)
    (tmp_path / "other.json").write_text("[]")
    plot.main(["rivals", str(tmp_path), "--out", str(tmp_path / "rivals.png")])
    assert capsys.readouterr().out.splitlines()[2:-1] == [
        "| fine-tuned ResNet | resnet50 at 224 pixels | 4.0 | 70.0 | 56.2 to 80.9 |",
        "| grid, with context | k 1, start_size 2, 2 glimpses, resnet18 at 32 pixels | 1.0 | 40.0 | 27.6 to 53.8 |",
        "| heads of pre-training | head 23, resnet50 at 96 pixels | 2.0 | 20.0 | 11.2 to 33.0 |",
        "| learned | k 1, start_size 2, 2 glimpses, resnet18 at 32 pixels | 3.0 | 50.0 | 36.6 to 63.4 |",
        "| learned | k 2, start_size 2, 2 glimpses, resnet18 at 32 pixels | 3.0 | 50.0 | 36.6 to 63.4 |",
        "| learned, average of 7 | k 1, start_size 2, 2 glimpses, resnet18 at 32 pixels | 9.0 | 60.0 | 46.2 to 72.4 |",
        "| learned, average of 7 | k 2, start_size 2, 2 glimpses, resnet18 at 32 pixels | 9.0 | 60.0 | 46.2 to 72.4 |",
        "| linear probe, weights b, dogs | central square, resnet50 at 96 pixels | 1.0 | 30.0 | 19.1 to 43.8 |",
    ]
    [panel] = pyplot.gcf().axes
    families = {text.get_text() for text in panel.get_legend().get_texts()}
    assert families == {"fixed gaze", "learned gaze", "whole image"}
    labels = [text.get_text() for text in panel.texts]  # neither heads nor averages
    assert labels == [
        *("224 px, fine-tuned", "grid, with context (1, 2) x 2"),
        *("learned (1, 2) x 2", "learned (2, 2) x 2", "96 px, ImageNet weights"),
    ]
    with Image.open(tmp_path / "rivals.png") as image:
        assert len(image.convert("RGB").getcolors(2**16)) > 50
    with pytest.raises(SystemExit, match="no probe_.*, results_.*none: test or probe first"):
        plot.main(["rivals", str(tmp_path / "2" / "3" / "none")])
    of_others = {"results_grid_my_photos.json": ("policy grid", "deterministic", of_grid)}
    of_others["pt_results_my_photos.json"] = ("heads", "23", of_probe)
    for name, (subject, estimate, settings) in of_others.items():  # of tests on other images
        write(tmp_path / "5" / name, subject, {estimate: (0.4, 10**9)}, **settings)
    curves = [rival.curve for rival in plot.read_rivals([tmp_path / "5"])]
    assert curves == ["grid, with context, my_photos", "heads of pre-training, my_photos"]


def test_rivals_stand_at_their_cost() -> None:
    """Only those of the same cost in the table stand side by side, 1 % at most from where they belong."""
    costs = [5.94, 5.27, 8.16, 5.94, 2.96, 2.99, 2.972, 11.8]
    rivals = [plot.Rival("", "", "", "", round(1e9 * cost), 0.5, 10) for cost in costs]
    moved = [place / cost - 1 for place, cost in zip(plot.side_by_side(rivals), costs)]
    assert moved == pytest.approx([-0.01, 0, 0, 0.01, -0.01, 0.01, 0, 0])


def write_predictions(path: Path, estimates: dict[str, str], truth: str, start: int = 0) -> None:
    """A table of predictions: for each estimate a letter for the predicted class of each image, in order."""
    rows = [
        {"file": f"test/{start + i}.jpg", "estimate": estimate, "true_class": true, "class_1": predicted}
        for estimate, answers in estimates.items()
        for i, (true, predicted) in enumerate(zip(truth, answers, strict=True))
    ]
    utils.write_table(path, rows)


def test_law_is_drawn_by_scale(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"k": "1", "n_glimpses": "1", "classify_context": "False", "cells": "6"}
    for scale, accuracy in (("0.5", 0.8), ("0.25", 0.7)):
        for policy, start_size, below in (("learned", "1", 0), ("oracle", "1", -0.1), ("center", "4", 0.3)):
            figures = {"accuracy": accuracy - below}
            content = {"images": 50, "multiply_adds": {"deterministic": 5 * 10**9}, "backbone": {}}
            content["backbone"] = {"arch": "resnet18", "patch_size": 32}
            content["figures"] = {f"policy {policy}": {"deterministic": figures}}
            content["settings"] = {**sizes, "policy": policy, "start_size": start_size}
            path = tmp_path / scale / policy / f"results_{policy}.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content))
    plot.main(["law", *(str(tmp_path / scale) for scale in ("0.5", "0.25")), "--out", str(tmp_path / "law.png")])
    rows = capsys.readouterr().out.splitlines()[2:-1]
    assert [row for row in rows if "learned" in row] == [
        "| learned, 6 x 6 cells | 5.0 | 0.25 | 70.0 | 56.2 to 80.9 |",
        "| learned, 6 x 6 cells | 5.0 | 0.5 | 80.0 | 67.0 to 88.8 |",
    ]
    assert "| whole image, 32 px | 5.0 | 0.25 | 40.0 | 27.6 to 53.8 |" in rows and len(rows) == 6
    [panel] = pyplot.gcf().axes
    labels = {text.get_text().partition(":")[0] for text in panel.texts}
    assert labels == {"learned, 6 x 6 cells", "oracle", "whole image, 32 px", "numbers"}
    (tmp_path / "0.5").rename(tmp_path / "half")
    with pytest.raises(SystemExit, match="half is not named after a scale"):
        plot.main(["law", str(tmp_path / "half")])
    shutil.copytree(tmp_path / "0.25" / "learned", tmp_path / "0.25" / "of another seed")
    with pytest.raises(SystemExit, match="0.25 has another run of learned, 6 x 6 cells"):
        plot.main(["law", str(tmp_path / "0.25"), "--out", str(tmp_path / "law.png")])


def test_cascade_and_stopping_curves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The small probe is sure of the first two of four images: right and wrong; the large one is right on all."""
    truth, sure = "abab", (0.9, 0.8, 0.4, 0.3)
    for size, answers, cost, data in ((96, "aaaa", 3, "x"), (128, "abab", 5, "x"), (128, "bbbb", 5, "other")):
        name = f"probe_resnet18_w_{size}_{data}"
        rows = [
            {"file": f"{data}{i}", "estimate": "linear probe", "true_class": a, "class_1": b, "probability_1": p}
            for i, (a, b, p) in enumerate(zip(truth, answers, sure))
        ]
        utils.write_table(tmp_path / f"predictions_{name}.csv", rows)
        settings = {"patch_size": str(size), "weights": "w", "arch": "resnet18", "data_dir": f"data/{data}"}
        content = {"settings": settings, "images": 4}
        content |= {"multiply_adds": {"linear probe": cost * 10**9}, "thresholds": [0.0, 0.5, 1.0]}
        content["figures"] = {"probe": {"linear probe": {"accuracy": 0.5}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    of_glance = {"classify_context": "True", "policy": "learned", "k": "1", "start_size": "2", "n_glimpses": "1"}
    content = {"settings": of_glance, "stopping": [{"multiply_adds": 2e9, "accuracy": 0.25}], "figures": {}}
    (tmp_path / "results_learned.json").write_text(json.dumps({**content, "backbone": {"arch": "a", "patch_size": 96}}))
    assert sorted(plot.read_stopping([tmp_path])) == [
        ("learned gaze", "stops when sure", [(2, 25)]),
        ("whole image", "96, then 128 px if unsure", [(3, 50), (5.5, 75), (8, 100)]),
    ]
    plot.main(["rivals", str(tmp_path), "--out", str(tmp_path / "rivals.png")])
    assert "96, then 128 px if unsure" in [text.get_text() for text in pyplot.gcf().axes[0].texts]
    small, large = (str(tmp_path / f"predictions_probe_resnet18_w_{size}_x.csv") for size in (96, 128))
    capsys.readouterr()
    plot.main(["cascade", small, large, "--stop_at", "0.5", "--out", str(tmp_path / "both.csv")])
    assert (
        capsys.readouterr().out == f"75.0% of 4 images right, 50.0% of them by the second table: {tmp_path}/both.csv\n"
    )
    plot.main(["compare", str(tmp_path / "both.csv"), large])
    assert "A - B: -25.0 points" in capsys.readouterr().out
    write_predictions(tmp_path / "other.csv", {"linear probe": "a"}, "a")
    with pytest.raises(SystemExit, match="same images"):
        plot.main(
            ["cascade", small, str(tmp_path / "other.csv"), "--stop_at", "0.5", "--out", str(tmp_path / "no.csv")]
        )
    with pytest.raises(SystemExit, match="cannot be written: name a file"):
        plot.main(["cascade", small, large, "--stop_at", "0.5", "--out", str(tmp_path)])


def test_classes_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(path, {"deterministic": "dddcdcw", "average of 7": "ccccddw"}, "ccccddw")
    plot.main(["classes", str(path)])
    assert capsys.readouterr().out.splitlines() == [
        "3 of 7 images right, deterministic",
        "  25.0% of    4  c",
        "  50.0% of    2  d",
        " 100.0% of    1  w",
        "c taken for d: 3 of 4",
        "d taken for c: 1 of 2",
    ]
    plot.main(["classes", str(path), "--estimate", "average of 7"])
    assert capsys.readouterr().out.splitlines()[0] == "7 of 7 images right, average of 7"
    many = "abcdefghijklmnopqrst"
    write_predictions(path, {"deterministic": many[1:] + many[0]}, many)
    plot.main(["classes", str(path)])
    assert sum(" taken for " in line for line in capsys.readouterr().out.splitlines()) == plot.N_CONFUSIONS == 10
    with pytest.raises(SystemExit, match="error: .* has no estimate average of 7, only: deterministic"):
        plot.main(["classes", str(path), "--estimate", "average of 7"])
    with pytest.raises(SystemExit, match="error: .*none.csv not found"):
        plot.main(["classes", str(tmp_path / "none.csv")])
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(SystemExit, match="error: .* is no table of predictions"):
        plot.main(["classes", str(path)])


def test_comparison_is_paired(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On the images that both tables have, by file name. On paper: 30 images only A gets right, 10 only B."""
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    n_both, n_neither = 100, 60
    right_a = "c" * n_both + "c" * 30 + "d" * 10 + "d" * n_neither
    right_b = "c" * n_both + "d" * 30 + "c" * 10 + "d" * n_neither
    write_predictions(a, {"deterministic": right_a + "d" * 5}, "c" * 205)  # five images that the other lacks
    write_predictions(b, {"linear probe": right_b}, "c" * 200)
    plot.main(["compare", str(a), str(b)])
    spread = 1.96 * np.std([1] * 30 + [-1] * 10 + [0] * 160) / np.sqrt(200)
    p = binomtest(30, 40).pvalue
    assert capsys.readouterr().out.splitlines() == [
        "200 images in both, 5 in one only",
        f"A: 65.0% right, 30 where the other is wrong ({a}, deterministic)",
        f"B: 55.0% right, 10 where the other is wrong ({b}, linear probe)",
        f"A - B: +10.0 points (95 %: {10 - 100 * spread:+.1f} to {10 + 100 * spread:+.1f}); McNemar's exact p {p:.2g}",
    ]
    write_predictions(b, {"deterministic": "d" * 205, "average of 7": right_a + "d" * 5}, "c" * 205)
    plot.main(["compare", str(a), str(b), "--estimates", "deterministic", "average of 7"])
    assert capsys.readouterr().out.splitlines()[-1] == "A - B: +0.0 points (95 %: +0.0 to +0.0); McNemar's exact p 1"
    write_predictions(b, {"deterministic": right_b}, "c" * 199 + "w")
    with pytest.raises(SystemExit, match=f"error: test/199.jpg is c in {a} and w in {b}"):
        plot.main(["compare", str(a), str(b)])
    write_predictions(b, {"deterministic": right_b}, "c" * 200, start=1000)
    with pytest.raises(SystemExit, match=f"error: {a} and {b} have no image in common"):
        plot.main(["compare", str(a), str(b)])


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (0, 6), (83, 104), (391, 259), (7, 7)])
def test_p_is_that_of_mcnemars_exact_test(pair: tuple[int, int]) -> None:
    wanted = binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1
    assert plot.mcnemar(*pair) == pytest.approx(wanted)


# --- controls of the gaze


def test_controls_look_where_they_say(make_data, save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Their predictions are those of main.py's test where it looks at the same places; the differences are paired."""
    data_dir = make_data(n_test=6)
    files = dataset.read_list(data_dir, "test").files
    annotate(data_dir, {file: [(0, 0, 10 + 2 * i, 12 + i)] for i, file in enumerate(files)}, 60, 64)
    shared, folder = [*SMALL, "--save_dir", str(save_dir)], str(save_dir / "pt_glimpse_model.tar")
    network = ["--k", "1", "--start_size", "1", "--n_glimpses", "2", "--rnn_hidden", "16"]
    main.main([*shared, "--data_dir", str(data_dir), "--backbone", folder, *network, "--epochs", "0"])
    for policy in ("learned", "center", "oracle"):
        main.main([*shared, "--task=test", "--policy", policy, "--n_trajectories", "1"])
    assert "only a learned gaze" in fails(controls, [*shared, "--policy", "center"])
    capsys.readouterr()
    other = save_dir / "predictions_center.csv"
    (save_dir / "of_a_probe.csv").write_text(other.read_text().replace("deterministic", "linear probe"))
    controls.main([*shared, "--other", str(save_dir / "of_a_probe.csv")])
    as_a_probe = capsys.readouterr().out
    controls.main([*shared, "--other", str(other)])
    out = capsys.readouterr().out
    assert re.findall(r"ahead by (.*)", as_a_probe) == re.findall(r"ahead by (.*)", out)
    same = {"own_gaze": "learned", "center": "center", "annotated_dog": "oracle"}
    tables = {}
    for name, policy in same.items():
        rows = [row for row in read_log(save_dir / f"predictions_{policy}.csv") if row["estimate"] == "deterministic"]
        tables[name] = read_log(save_dir / f"predictions_learned_{name}.csv")
        for row, control in zip(rows, tables[name], strict=True):
            assert all(control[key] == row[key] for key in ("file", "true_class", "class_1"))
            assert float(control["true_probability"]) == pytest.approx(float(row["true_probability"]), abs=1e-5)
    differ = [a["probability_1"] != b["probability_1"] for a, b in zip(tables["own_gaze"], tables["annotated_dog"])]
    assert any(differ)
    right = {name: np.array([r["class_1"] == r["true_class"] for r in rows]) for name, rows in tables.items()}
    ahead = right["own_gaze"].astype(float) - right["annotated_dog"]
    half = 196 * ahead.std() / len(ahead) ** 0.5
    assert re.search(rf"annotated dog .*ahead by {100 * ahead.mean():.1f} ± {half:.1f} points", out)
    assert "predictions_center " in out and len(re.findall("smallest third first", out)) == 2 * 5


def test_controls_give_no_image_its_own_gaze() -> None:
    own = torch.randn(7, 1, 2, 2)
    boxes = torch.full((7, 2, 4), torch.nan)
    boxes[:, 0] = torch.tensor([0.0, 0.5, 0.5, 1.0])
    for seed in range(20):
        places = controls.places_of(own, boxes, seed)
        other = places["gaze of another image"]
        assert not any(torch.equal(a, b) for a, b in zip(own, other))
        assert torch.equal(other.flatten(1).sort(0).values, own.flatten(1).sort(0).values)
    assert torch.allclose(places["mean place"][3], own.mean(0)) and not places["center"].any()
    assert torch.equal(places["annotated dog"][0, 0], torch.tensor([[-0.5, 0.5]] * 2))
    assert "annotated dog" not in controls.places_of(own, torch.full_like(boxes, torch.nan), 0)


def test_controls_sort_dogs_into_thirds() -> None:
    assert controls.thirds(torch.full((7, 2, 4), torch.nan)) == {}
    boxes = torch.full((7, 2, 4), torch.nan)  # the first image has none
    for i in range(1, 7):
        boxes[i, 0] = torch.tensor([0.5 - 0.05 * i, 0.5 - 0.05 * i, 0.5 + 0.01 * i, 0.5 + 0.01 * i])
    boxes[1, 0] = torch.tensor([0.9, 0.9, 0.91, 0.91])  # the smallest is the farthest
    parts = {name: [part.tolist() for part in thirds] for name, thirds in controls.thirds(boxes).items()}
    assert parts["dog's size"] == [[1, 2], [3, 4], [5, 6]]
    assert parts["dog's distance from the center"] == [[2, 3], [4, 5], [6, 1]]


# --- the toy table and the end of the demo


def test_toy_table_is_of_the_results_and_continued(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data_dir, out, calls = make_data(), tmp_path / "table", []
    for i, file in enumerate(dataset.read_list(data_dir, "test").files):
        annotate(data_dir, {file: [(4, 4, 6, 6 if i % 2 else 4.5)]}, 10, 10)

    def run_here(script: str, flags: list[str]) -> None:  # in this process, which has PyTorch loaded
        calls.append(script)
        {"pretrain.py": pretrain, "main.py": main}[script].main([*flags, *SMALL])

    monkeypatch.setattr(toy_table, "run", run_here)
    monkeypatch.setattr(toy_table, "BACKBONE", [*toy_table.BACKBONE[:-1], "1", "--arch", ARCH])
    once = ["--rnn_hidden", "8", "--epochs", "1"]
    monkeypatch.setattr(toy_table, "ROWS", {"learned": once, "one, center": [*once, "--policy", "center"]})
    for _ in range(2):
        toy_table.main(["--data_dir", str(data_dir), "--out", str(out), "--seeds", "3", "4"])
        for seed, accuracy in ((3, 0.1), (4, 0.3)):
            path = out / f"seed_{seed}" / "one_center" / "results_center.json"
            results = json.loads(path.read_text())
            results["figures"]["policy center"]["deterministic"]["accuracy"] = accuracy
            path.write_text(json.dumps(results))
    assert calls == 2 * ["pretrain.py", *(4 * ["main.py"])]  # nothing is run twice
    lines = capsys.readouterr().out.splitlines()
    learned, center = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:])
    assert len(learned) == len(center) == 1 + len(toy_table.COLUMNS)
    assert (learned[0], center[0]) == tuple(toy_table.ROWS)
    assert center[1] == "20.0 ± 14.1"
    assert center[2] == center[5] == "" and center[4] == "44.4 ± 0.0"  # 4 of 9 boxes hold the middle


def test_demo_ends_with_its_figures_and_a_picture(
    make_data, save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data_dir = make_data(n_test=6)
    annotate(data_dir, {file: [(0, 0, 30, 40)] for file in dataset.read_list(data_dir, "test").files}, 60, 64)
    shared, untrained = ["--data_dir", str(data_dir), *SMALL], tmp_path / "untrained"
    backbone = ["--backbone", str(save_dir / "pt_glimpse_model.tar"), *CLASSIFIER]
    main.main([*shared, *backbone, "--save_dir", str(untrained), "--epochs", "0"])
    main.main([*shared, *backbone, "--save_dir", str(save_dir), "--epochs", "1"])
    for policy in demo_figure.POLICIES:
        main.main([*shared, "--save_dir", str(save_dir), "--task=test", "--policy", policy])
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
    before, after = (main.load_classifier(folder) for folder in (untrained, save_dir))
    example = demo_figure.choose_example(data_dir, before, after)
    with Image.open(out) as image:
        pixels, tile, gap = np.asarray(image).astype(int), demo_figure.TILE, demo_figure.GAP
    assert 1200 < pixels.shape[1] < 1800 and pixels.shape[0] < 450
    top, left = demo_figure.LINE + gap, 110
    for classifier, prediction in ((before, example.early), (after, example.late)):
        row = np.asarray(demo_figure.draw_row(classifier, prediction, example.label)).astype(int)
        assert np.abs(pixels[top : top + tile, left : left + row.shape[1]] - row).mean() < 4
        top += tile + gap


def test_demo_shows_the_gaze_that_moved_the_most(make_data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that training moves onto the dog, if only the trained prediction is correct."""
    data_dir = make_data(n_test=6)
    images = dataset.read_list(data_dir, "test")
    annotate(data_dir, {file: [(0, 0, 30, 32)] for file in images.files}, 60, 64)
    order = main.fixed_choice(len(images.files), 100, 0)
    far, near, aside = (0.9, 0.9), (-0.5, -0.5), (-0.1, -0.1)
    early, late = [far] * len(order), [near] * len(order)
    right = [False, False, True, True, True, *([False] * len(order))]
    right_before = [False, False, False, False, True, *([False] * len(order))]
    late[2], early[3] = aside, (0.2, 0.2)  # the second candidate that is right moves less, but to the middle of the dog

    def fake(places: list[tuple[float, float]], right: list[bool]):
        answers = iter(range(len(order)))

        def classify(file: Path, annotation: Path) -> main.Prediction:
            i = next(answers)
            truth = images.labels[order[i]]
            drawn = torch.nn.functional.one_hot(torch.tensor([truth if right[i] else (truth + 1) % 3]), 3).float()
            boxes = torch.tensor([[0, 0, 0.5, 0.5]])
            return main.Prediction(drawn[0], "", torch.tensor([places[i]]), None, drawn, torch.zeros(1), boxes)

        return classify

    after = fake(late, right)
    after.args = utils.argparse.Namespace(seed=0)
    example = demo_figure.choose_example(data_dir, fake(early, right_before), after)
    assert example.late.location[0].tolist() == pytest.approx(aside) and example.label == images.labels[order[2]]
