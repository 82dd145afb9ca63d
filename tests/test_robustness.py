"""Several processes, rivals, and what goes wrong: pretrain.py and main.py on a few small images."""

import io
import math
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
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
    CPU,
    MODEL,
    SMALL,
    NarrowResNet,
    annotate,
    collect_panels,
    fails,
    find_result,
    finish,
    flags_of,
    read,
    read_log,
    same,
    same_result,
    save_backbone,
    start,
    without_seconds,
)
from PIL import ExifTags, Image
from torchvision.models.resnet import BasicBlock, Bottleneck

import dataset
import main
import pretrain
import utils
from model import HEADS, PretrainNetwork, build_backbone

ROOT = Path(__file__).parent.parent


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
    main.main([*main_args, "--task=test"])
    assert tested == capsys.readouterr().out and "9 test images" in tested  # in shards of 5 and 4
    main.main([*flags, "--overwrite"])
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
    command = [*launch, str(ROOT / "main.py"), *main_args, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and read(save_dir / "last.tar")["epoch"] == 1, done.stderr


@pytest.mark.slow
def test_two_processes_compile_in_bfloat16(
    main_args: list[str], pretrain_args: list[str], save_dir: Path, tmp_path: Path, run_by_two
) -> None:
    """The losses are those of the eager run but for rounding."""
    for script, argv, log in (
        ("pretrain", pretrain_args, tmp_path / "out" / "pt_log.csv"),
        ("main", [*main_args, *MODEL], save_dir / "log.csv"),
    ):
        rows = []
        for how in ([], ["--compile"]):
            run_by_two(script, [*argv, "--precision", "bf16", "--epochs", "1", "--overwrite", *how])
            rows += read_log(log)
        eager, compiled = rows
        for name in ("train_loss", "valid_nll"):
            assert float(compiled[name]) == pytest.approx(float(eager[name]), rel=0.02), name


def test_two_processes_pretrain_what_they_validate(pretrain_args: list[str], run_by_two, tmp_path: Path) -> None:
    """Each process has BatchNorm statistics of its own after a step; the figures must be those of the file saved."""
    out = tmp_path / "out"
    run_by_two("pretrain", [*pretrain_args, "--epochs", "1"])
    row = read_log(out / "pt_log.csv")[0]
    net = PretrainNetwork(backbone=build_backbone(ARCH), n_classes=3, patch_size=32)
    net.load_state_dict(read(out / "pt_last.tar")["model_dict"])
    _, valid = dataset.read_training_lists(Path(pretrain_args[1]), 0.3)
    loader = dataset.make_loader(valid, flags_of(pretrain), CPU, 128)
    alone = pretrain.evaluate(utils.wrap(net, CPU), loader, CPU, "")
    assert alone.keys() == {"loss", "nll", *(f"accuracy_{head}" for head in HEADS)}
    for name, value in alone.items():
        assert float(row[f"valid_{name}"]) == pytest.approx(value, rel=1e-4)


def test_batches_that_cannot_be_divided(pretrain_args: list[str], make_data) -> None:
    images = dataset.read_list(make_data(), "test")
    for trains in (True, False):
        args, machine = flags_of(pretrain, "--batch_size", "7"), CPU._replace(world_size=3)
        with pytest.raises(utils.UserError, match="--batch_size 7 or 9 images do not split over 3 processes"):
            dataset.make_loader(images, args, machine, 32, trains=trains)
        args, machine = flags_of(pretrain, "--batch_size", "21"), CPU._replace(rank=20, world_size=21)
        with pytest.raises(utils.UserError, match="--batch_size 21 or 9 images do not split over 21 processes"):
            dataset.make_loader(images, args, machine, 32, trains=trains)
    assert "BatchNorm needs two images for each GPU" in fails(pretrain, [*pretrain_args, "--batch_size", "1"])


def test_threads_of_data_parallel_compute_in_bfloat16() -> None:
    """A thread that only knows that autocast is on would compute in float16 on a GPU."""
    net = utils.wrap(torch.nn.Linear(3, 2), CPU._replace(precision="bf16"))
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
            script.main([*args, *task, "--save_dir", str(tmp_path / name), *how])
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
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 3)
        for name in ("set_device", "is_bf16_supported"):
            patch.setattr(torch.cuda, name, lambda *_, **__: True)
        for gpus in ("", "0,1"):
            with pytest.raises(utils.UserError, match="--compile takes one GPU per process"):
                utils.set_up_machine(flags_of(main, "--compile", "--device", "cuda", "--gpus", gpus))
        one = utils.set_up_machine(flags_of(main, "--compile", "--device", "cuda", "--gpus", "1"))
        assert one.compiles and one.gpus == [1]
    torch._dynamo.reset()
    from torch._inductor import config  # takes seconds

    with config.patch({"force_disable_caches": True, "cpp.cxx": ("false",)}):  # a compiler that always fails
        assert fails(main, [*main_args, "--compile", "--epochs", "1"]).startswith("error: --compile does not work here")


# --- rivals


def test_operations_are_those_of_the_layers() -> None:
    """Counted by hand: a context, shared by all trajectories, and for each a glimpse and its small networks."""
    backbone = {"arch": "resnet18", "patch_size": 32}
    args = flags_of(main, "--k", "1", "--start_size", "1", "--rnn_hidden", "16")
    convolutions = 0
    side = {"0": 32, "4": 16, "5": 8, "6": 4, "7": 2}  # of what the layer puts out
    for name, module in build_backbone("resnet18").named_modules():
        if isinstance(module, torch.nn.Conv2d):
            convolutions += module.weight.numel() * side[name.partition(".")[0]] ** 2
    assert utils.multiply_adds(lambda: build_backbone("resnet18")(torch.zeros(1, 3, 32, 32))) == convolutions
    [once], [many] = (main.multiply_adds(args, backbone, 120, n) for n in (1, 7))
    lstm, classifier, baseline = 4 * 16 * (512 + 16), 16 * 120, 512 + 16
    of_glimpse = convolutions + lstm + classifier + baseline
    attention = 4 * 512
    assert once == convolutions + attention + of_glimpse and many == once + 6 * of_glimpse
    for policy in ("center", "random", "grid", "oracle"):  # which need no context, unless it is classified
        args.policy, args.classify_context = policy, False
        assert main.multiply_adds(args, backbone, 120, 1) == [attention + of_glimpse]
        args.classify_context = True
        glance = attention + of_glimpse  # the context in place of a glimpse
        assert main.multiply_adds(args, backbone, 120, 1) == [glance, glance + attention + of_glimpse]


def test_gaze_is_at_the_nearest_of_several_dogs() -> None:
    boxes = torch.full((3, 2, 4), math.nan)
    boxes[0] = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.9]])
    boxes[1, 0] = torch.tensor([0.4, 0.0, 0.6, 1.0])  # and the third is not annotated
    figures = main.gaze(torch.tensor([[[0.3, 0.2]], [[0.0, 0.0]], [[0.9, 0.9]]]), boxes)  # at .65, .6
    distance = (math.hypot(0.05, 0.1) + 0) / 2
    assert figures == pytest.approx({"hit_rate": 1.0, "distance_to_dog": distance}, abs=1e-3)
    assert main.gaze(torch.zeros(1, 1, 2), boxes[2:]) == {}


@pytest.mark.parametrize("seed", range(4))
def test_boxes_follow_the_augmented_crop(seed: int, tmp_path: Path) -> None:
    pixels = np.zeros((60, 90), dtype=np.uint8)
    pixels[20:40, 38:50] = 255
    file = tmp_path / "Images" / "breed" / "dog.png"
    file.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(file)
    annotate(tmp_path, {file: [(40, 25, 41, 26), (38, 20, 50, 40), (0, 0, 1, 1)]}, 90, 60)
    images = dataset.read_list(tmp_path, "all")
    image, boxes = dataset.read_image(file, 120, images.annotations[0])
    canvas, boxes = dataset.crop_to_canvas(image, boxes, 120, seed, 0.8)
    bright = canvas[0] > 127
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 120
    assert (boxes[0] - seen).abs().max() < 0.02  # the largest comes first
    center, noise = (seen[:2] + seen[2:]) - 1, torch.randn(1, 1, 1, 2)
    assert (main.look_at(noise, boxes.unsqueeze(0), "oracle") - center).abs().max() < 0.03
    nowhere = torch.full((1, dataset.N_BOXES, 4), math.nan)
    assert main.look_at(noise, nowhere, "oracle").flatten().tolist() == [0, 0]
    assert main.look_at(noise, boxes.unsqueeze(0), "learned") is noise


def test_oracle_looks_at_the_dogs(
    main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = Path(main_args[1])
    refused = fails(main, [*main_args, *MODEL, "--policy=oracle", "--epochs", "1"])
    assert refused.startswith("error: --policy oracle looks at annotated dogs: there are none in")
    for part, shade in (("train", 0), ("test", 20)):
        for i, file in enumerate(dataset.read_list(data_dir, part).files):  # each dog at a place of its own, white
            pixels = np.full((60, 60 + i, 3), shade, dtype=np.uint8)
            left, top = 5 + 2 * i, 40 - i
            pixels[top : top + 8, left : left + 8] = 255
            Image.fromarray(pixels).save(file, quality=95)
            annotate(data_dir, {file: [(left, top, left + 8, top + 8)]}, 60 + i, 60)
    images = dataset.read_list(data_dir, "train")
    args = flags_of(main, "--n_glimpses", "2", "--smallest_crop", "0.7", "--batch_size", "100")
    for rank in (0, 1):
        machine = CPU._replace(rank=rank, world_size=2)
        [(canvas, boxes, *_)] = dataset.make_loader(images, args, machine, 120, trains=True)
        noise = main.training_noise(args, len(images.files), 0, machine)
        assert noise.shape == (len(canvas), 1, 2, 2)
        for location, bright in zip(main.look_at(noise, boxes, "oracle")[:, 0, 1], canvas[:, 0] > 127):
            seen = bright.nonzero().float().mean(0).flip(0) / 60 - 1
            assert not bright.any() or (location - seen).abs().max() < 0.1  # of what the crop has left
    main.main([*main_args, *MODEL, "--policy=oracle", "--epochs", "2"])
    assert {"valid_hit_rate_1", "valid_nll_2", "valid_distance_to_dog_2"} <= read_log(save_dir / "log.csv")[0].keys()
    for row in read_log(save_dir / "log.csv"):
        assert float(row["valid_hit_rate_1"]) == float(row["valid_hit_rate_2"]) == 1
        assert float(row["train_distance_from_center"]) > 0.05 and float(row["train_reinforce"]) == 0
    capsys.readouterr()
    main.main([*main_args, "--task=test"])
    report = capsys.readouterr().out
    assert find_result(report, "glimpse 2", "deterministic")["distance_to_dog"] == 0
    assert find_result(report, "policy oracle", "deterministic") and "average of" not in report
    drawn = collect_panels(monkeypatch)
    main.main([*main_args, "--task=view_glimpses"])
    assert len(drawn) == 9 and all(dogs.shape == (1, 4) for *_, dogs in drawn)
    for _, location, *_, dogs in drawn:
        assert torch.allclose(location, (dogs[:, :2] + dogs[:, 2:] - 1).expand(2, 2), atol=1e-5)
    refused = fails(main, [*main_args, "--task=predict", "--images", str(data_dir)])
    assert "choose another to classify other images" in refused


# --- what goes wrong


def test_flags_are_refused_by_name() -> None:
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
        assert f"argument {flag}: " in fails(script, [flag, value])
    for flag in ("--no_such_flag", "--arch", "--patch_size", "--n_glimps"):  # no abbreviations
        assert flag in fails(main, [flag, "1"])


def test_spellings_of_flags() -> None:
    def given(*words: str) -> dict[str, object]:
        return {name: x for name, x in vars(flags_of(main, *words)).items() if x != getattr(flags_of(main), name)}

    assert given() == {} and main.make_parser().parse_args([]).resume_training is False
    for words in (["--resume_training"], ["--resume_training=True"], ["--resume_training", "true"]):
        assert given(*words) == {"resume_training": True}
    assert flags_of(main, "--resume_training", "false").resume_training is False
    assert given("--k=3") == given("--k", "3") == {"k": 3}
    assert given("--gpus", "0,2") == {"gpus": "0,2"} and utils.choose_gpus("0,2", 3, None) == [0, 2]
    args = flags_of(main, "--task", "predict", "--images", "a.jpg", "b")
    assert (args.task, args.images) == ("predict", [Path("a.jpg"), Path("b")])


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
    missing = str(torch.cuda.device_count())
    words = [word for word in main_args if word not in ("--device", "cpu")]
    message = fails(main, [*words, "--device", "cuda", "--gpus", missing])
    assert f"--gpus {missing}: {missing} GPUs found, numbered from 0" in message
    main.main([*main_args, *MODEL, "--epochs", "1"])
    before = [(save_dir / name).read_bytes() for name in main.FILES[:3]]
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
        assert f"{flag} {value} contradicts {save_dir / 'last.tar'}" in message and "leave it out" in message
    make_data(n_train=7)  # in the same folder
    message = fails(main, [*main_args, "--resume_training"])
    assert f"the run in {save_dir} was trained on other images" in message and "--overwrite" in message
    assert [(save_dir / name).read_bytes() for name in main.FILES[:3]] == before  # nothing was damaged


def test_pretraining_is_resumed_as_it_was(
    pretrain_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrain.main([*pretrain_args, "--epochs", "1"])
    for flag, value in (("--arch", "resnet34"), ("--patch_size", "64"), ("--seed", "1")):
        assert flag in fails(pretrain, [*pretrain_args, "--resume_training", flag, value])
    path = tmp_path / "out" / "pt_last.tar"
    pretrain.main([*pretrain_args, "--resume_training"])
    assert "1 epochs are done: raise --epochs to train longer" in capsys.readouterr().out
    pretrain.main([*pretrain_args, "--resume_training", "--epochs", "2", "--lr", "0.5"])
    last = read(path)
    assert last["settings"]["lr"] == "0.5" and last["optimizer"]["param_groups"][0]["lr"] == 0.25  # halfway down
    path.write_bytes(path.read_bytes()[:5000])
    assert "pt_last.tar cannot be read" in fails(pretrain, [*pretrain_args, "--resume_training"])


def test_backbone_never_saw_the_validation_images(pretrain_args: list[str], tmp_path: Path) -> None:
    """Both scripts split the list alike, whatever the seed; another --valid_size would mix the parts."""
    pretrain.main([*pretrain_args, "--epochs", "1"])
    shared = ["--data_dir", pretrain_args[1], "--save_dir", str(tmp_path / "out"), *SMALL, *MODEL, "--epochs", "1"]
    splits, real = [], dataset.split_list
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "split_list", lambda *given, **more: splits.append(real(*given, **more)) or splits[-1])
        pretrain.main([*pretrain_args, "--epochs", "1", "--overwrite"])
        main.main([*shared, "--seed", "3"])
    assert len(splits) == 2 and splits[0] == splits[1]
    [train, valid], path = splits[0], tmp_path / "out" / "pt_glimpse_model.tar"
    _, larger = dataset.read_training_lists(Path(pretrain_args[1]), 0.5)
    mixed = [file for file in larger.files if file in train.files]
    assert set(larger.files) > set(valid.files) and mixed
    message = fails(main, [*shared, "--valid_size", "0.5", "--overwrite"])
    wanted = f"{len(mixed)} of the {len(larger.files)} validation images were used in training {path}, first {mixed[0]}"
    assert message == f"error: {wanted}: see --data_dir and --valid_size"


def test_learning_rate_and_batch_size_may_change_on_resuming(main_args: list[str], save_dir: Path) -> None:
    main.main([*main_args, *MODEL, "--epochs", "1"])
    resume = ["--save_dir", str(save_dir), "--num_workers", "0", "--device", "cpu", "--resume_training"]
    main.main([*resume, "--epochs", "2", "--lr_schedule", "constant"])
    last = read(save_dir / "last.tar")
    assert [last["settings"][name] for name in ("lr", "attention_lr", "batch_size")] == ["0.01", "0.0001", "4"]
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [0.01, 1e-4]
    main.main([*resume, "--epochs", "3", "--lr", "0.5", "--attention_lr", "0.2", "--batch_size", "6"])
    last = read(save_dir / "last.tar")
    assert [last["settings"][name] for name in ("lr", "attention_lr", "batch_size")] == ["0.5", "0.2", "6"]
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [0.5, 0.2]


def test_cosine_schedule(main_args: list[str], save_dir: Path) -> None:
    rates = [utils.learning_rate(0.1, "cosine", epoch, 4) for epoch in range(4)]
    assert rates == pytest.approx([0.1, 0.1 * (2 + 2**0.5) / 4, 0.05, 0.1 * (2 - 2**0.5) / 4])
    assert utils.learning_rate(0.1, "constant", 3, 4) == 0.1
    main.main([*main_args, *MODEL, "--epochs", "2"])  # half way down in the second epoch
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
        assert f"{path.parent} holds an earlier run ({path.name}): " in fails(script, flags)
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
    torch.save({"weights": 1}, path)
    assert "is not a checkpoint of the expected kind, which has entries model_dict" in fails(main, [*main_args])
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
    assert message.startswith(f"error: {path} cannot be read (UnpicklingError): ")
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
        pretrain.main([*pretrain_args, "--weights", str(tmp_path / name), "--epochs", "0", "--overwrite"])
        loaded.append(read(tmp_path / "out" / "pt_glimpse_model.tar")["model_dict"])
    assert all(same(loaded[0], other) for other in loaded[1:])
    assert torch.equal(loaded[0]["4.0.conv1.weight"], resnet.layer1[0].conv1.weight)


def test_classifier_is_not_taken_for_a_backbone(main_args: list[str], save_dir: Path) -> None:
    main.main([*main_args, *MODEL, "--epochs", "1"])
    for name in ("saved_model.tar", "last.tar"):
        message = fails(main, [*main_args, *MODEL, "--overwrite", "--backbone", str(save_dir / name)])
        assert message.startswith(f"error: --backbone {save_dir / name} is a classifier, or outdated: ")
        assert "pt_glimpse_model.tar of pretrain.py" in message


def test_fewer_epochs_than_are_done(
    training: tuple[ModuleType, list[str], Path], capsys: pytest.CaptureFixture
) -> None:
    """Change nothing, and are said in one line."""
    script, argv, folder = training
    script.main([*argv, "--epochs", "2"])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for epochs in ("0", "1", "2"):
        capsys.readouterr()
        script.main([*argv, "--resume_training", "--epochs", epochs])
        lines = capsys.readouterr().out.splitlines()
        [line] = [line for line in lines if "raise --epochs" in line]
        assert line.startswith("2 epochs are done: ") and not any(line.startswith("epoch ") for line in lines)
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


def test_two_runs_may_write_the_same_file(tmp_path: Path) -> None:
    """Each writes a complete one, of which the last stays."""
    path = tmp_path / "results.json"
    with utils.replacing(path, mode="w") as first:
        first.write("the first ")
        with utils.replacing(path, mode="w") as second:
            second.write("the second, which is longer ")
            first.write("run")
            second.write("run")
        assert path.read_text() == "the second, which is longer run"
        with pytest.raises(ZeroDivisionError), utils.replacing(path, mode="w") as third:
            third.write(str(1 / 0))
    assert path.read_text() == "the first run" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_checkpoint_is_interrupted_while_it_is_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In each of its writes in turn, after which PyTorch cannot close its archive."""
    path, left = tmp_path / "last.tar", 0

    class File(io.BufferedWriter):
        """Sends the signal in the middle of a write."""

        def write(self, data: bytes) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                super().write(data[: len(data) // 2])
                signal.raise_signal(number)
            return super().write(data)

    monkeypatch.setattr(utils, "open", lambda name, mode: File(io.FileIO(name, mode)), raising=False)
    content = {"model_dict": {name: torch.ones(100, 10) for name in "abc"}, "epoch": 1}
    utils.save_checkpoint(path, content)
    n_writes = -left
    utils.save_checkpoint(path, {"epoch": 0})
    assert n_writes > 10
    for n in range(1, n_writes + 1):
        left = n
        with pytest.raises(SystemExit) as stop:
            utils.run(lambda: utils.save_checkpoint(path, content))
        assert stop.value.code == 128 + number
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("stopped: --resume_training=True continues")
        left = n
        signal.signal(number, signal.default_int_handler)  # as in a notebook, where `run` has not the last word
        with pytest.raises((KeyboardInterrupt, RuntimeError)):  # the latter of PyTorch's archive, in that context
            utils.save_checkpoint(path, content)
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


@pytest.mark.parametrize(
    ("wanted", "n_gpus", "local_rank", "chosen"),
    [
        ("", 4, 0, [0]),  # torchrun with a single process
        ("", 4, 3, [3]),
        ("", 4, None, [0, 1, 2, 3]),
        ("1,3", 4, None, [1, 3]),
        ("1,3", 4, 1, [3]),
        ("2", 4, 0, [2]),
        ("", 0, None, "--gpus all: 0 GPUs found, "),
        ("4", 4, None, "--gpus 4: 4 GPUs found, numbered from 0"),
        ("0,7", 4, 0, "--gpus 0,7: 4 GPUs found, "),
        ("", 4, 4, "--gpus all: 4 GPUs found, .* one each"),
        ("1,3", 4, 2, "--gpus 1,3: 4 GPUs found, .* one each"),
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
        main.main([*main_args, *MODEL, "--epochs", "3"])
    before = read_log(save_dir / "log.csv")
    assert [row["epoch"] for row in before] == ["1", "2"] and read(save_dir / "last.tar")["epoch"] == 0
    (save_dir / "log.csv").write_text("damaged")
    main.main([*main_args, "--resume_training"])
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
    main.main([*main_args, *MODEL, "--epochs", "1"])
    files = dataset.read_list(main_args[1], "test").files
    square = [(i / 20, 0.4, 1.0, 0.51 + i / 40) for i in range(8)]  # on a canvas of side 1; the ninth has no annotation
    for file, (left, top, right, bottom) in zip(files, square):
        width, height = Image.open(file).size
        side = min(width, height)
        x, y = (width - side) / 2, (height - side) / 2
        box = (x + left * side, y + top * side, x + right * side, y + bottom * side)
        annotate(Path(main_args[1]), {file: [box]}, width, height)
    # The deterministic trajectory starts 0.29 to the left of the center, then goes to it; a sampled one goes astray.
    location = torch.tensor([[[-0.58, 0.0], [0.0, 0.0]], [[0.0, 0.0], [-0.9, 0.9]]]).expand(9, 2, 2, 2)
    found, real = [], main.evaluate

    def evaluate(*given: object) -> list[torch.Tensor]:
        found.append(real(*given)[-1])
        return [torch.full((9, 2, 2, 3), 1 / 3), location, found[-1]]

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", evaluate)
        main.main([*main_args, "--task=test", "--n_trajectories=1"])
    report, [boxes] = capsys.readouterr().out, found
    assert torch.allclose(boxes[:8, 0], torch.tensor(square), atol=1e-5) and boxes[8].isnan().all()
    assert boxes[:, 1:].isnan().all()

    def by_hand(x: float, y: float) -> str:
        """The gaze at one place of the canvas."""
        hits = distance = 0.0
        for left, top, right, bottom in square:
            hits += left <= x <= right and top <= y <= bottom
            distance += math.hypot((left + right) / 2 - x, (top + bottom) / 2 - y)
        return f"hit_rate {hits / 8:.4f}  distance_to_dog {distance / 8:.4f}"

    guess = "33.3% correct (3 of 9; 95% CI 12% to 65%)  nll 1.0986"
    of_sampled = "33.3% correct  nll 1.0986"
    expected = {
        "glimpse 1      deterministic": [guess, "distance_from_center 0.2900", by_hand(0.21, 0.5)],
        "glimpse 1      sampled trajectory": [of_sampled, "distance_from_center 0.0000", by_hand(0.5, 0.5)],
        "glimpse 1      average of 1": [guess],
        "glimpse 2      deterministic": [guess, "distance_from_center 0.0000", by_hand(0.5, 0.5)],
        "glimpse 2      sampled trajectory": [of_sampled, "distance_from_center 0.6364", by_hand(0.05, 0.95)],
        "glimpse 2      average of 1": [guess],
    }
    lines = report.splitlines()
    assert "boxes for 8 of 9 images" in lines[0]
    for line, (subject, figures) in zip(lines[4:10], expected.items(), strict=True):
        assert (line[:35].rstrip(), line[35:]) == (subject, "  ".join(figures))
    figures = toy_table.read_figures(save_dir / "results_learned.json")
    assert figures["policy deterministic accuracy"] == pytest.approx(1 / 3)
    assert figures["glimpse 1 deterministic hit_rate"] == 5 / 8  # boxes with left <= 0.2
    path = Path(main_args[1]) / "Annotation" / files[0].parent.name / files[0].stem
    for broken in (
        "no XML",
        path.read_text().replace("<xmin>", "<x>").replace("</xmin>", "</x>"),
        re.sub(r"<width>\d+", "<width>0", path.read_text()),
        path.read_text().encode("utf-16").decode("latin-1"),
    ):
        path.write_text(broken, encoding="latin-1")
        refused = fails(main, [*main_args, "--task=test"])
        assert refused.startswith(f"error: annotation {path} cannot be read (") and "fetch it again" in refused


def test_boxes_survive_the_way_of_the_image(tmp_path: Path) -> None:
    """A dog of white pixels, stored in every EXIF orientation, of which the crop cuts some off."""
    data_dir = tmp_path / "dogs"
    folder = data_dir / "Images" / "breed"
    folder.mkdir(parents=True)
    for width, height in ((90, 60), (60, 100)):
        pixels = np.zeros((height, width), dtype=np.uint8)
        left, top, right, bottom = 3, 8, 40, 50
        pixels[top:bottom, left:right] = 255
        for orientation in range(1, 9):
            file = folder / f"{width}_{orientation}.png"
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            Image.fromarray(pixels).save(file, exif=exif)
            dogs = [(-9, -9, -3, -3), (left, top, right, bottom), (left, top, right, bottom)]  # the first lies outside
            annotate(data_dir, {file: dogs}, width, height)
    Image.fromarray(pixels).save(folder / "unknown.png")
    images = dataset.read_list(data_dir, "all")
    for i, (canvas, boxes, *_) in enumerate(map(dataset.ImageDataset(images, 120).__getitem__, range(17))):
        assert boxes.shape == (dataset.N_BOXES, 4) and boxes[2:].isnan().all()
        if images.files[i].stem == "unknown":
            assert boxes.isnan().all()
            continue
        bright = canvas[0] > 127
        rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
        seen = [columns[0] / 120, rows[0] / 120, (columns[-1] + 1) / 120, (rows[-1] + 1) / 120]
        assert (boxes[:2] - torch.stack(seen)).abs().max() < 0.02, images.files[i]


def test_supervision_is_the_flags(main_args: list[str], save_dir: Path) -> None:
    losses = {}
    for supervision in ("each", "last"):
        main.main([*main_args, *MODEL, "--epochs", "1", "--supervision", supervision, "--overwrite"])
        losses[supervision] = read_log(save_dir / "log.csv")[0]["train_classification"]
        assert read(save_dir / "last.tar")["settings"]["supervision"] == supervision
    assert losses["each"] != losses["last"]


def test_resuming_keeps_the_number_of_epochs(
    main_args: list[str], save_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    main.main([*main_args, *MODEL, "--epochs", "1"])
    main.main([*main_args, "--resume_training"])  # not 101, the default of a new run
    assert read(save_dir / "last.tar")["epoch"] == 0
    assert capsys.readouterr().out.count("1 epochs are done: raise --epochs to train longer") == 1


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
