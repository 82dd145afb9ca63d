"""Kills, signals, full disks, numbers that are not finite, leaks: what a long run survives, and what stops it."""

import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ARCH,
    BACKBONE,
    CPU,
    N_CLASSES,
    SMALL,
    fails,
    finish,
    flags_of,
    forkserver,
    members,
    read,
    read_log,
    same,
    save_backbone,
    start,
    without_seconds,
)

import dataset
import main
import pretrain
import utils
from model import RecurrentAttention, attention_loss, build_backbone

CLASSIFIER = ["--rnn_hidden", "16", "--k", "1", "--start_size", "2", "--n_glimpses", "2"]
FILES = {
    "main": ("last.tar", "saved_model.tar", "log.csv"),
    "pretrain": ("pt_last.tar", "pt_glimpse_model.tar", "pt_log.csv"),
}


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Until the condition holds or the process has ended."""
    while process.is_alive() and not condition():
        time.sleep(0.002)


@pytest.fixture
def flags(make_data, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a run of a script that saves to the folder given; for main.py, with a backbone."""
    data_dir, backbone = make_data(n_train=4), tmp_path / "backbone.tar"

    def make(script: str, save_dir: Path, arch: str = ARCH) -> list[str]:
        if not backbone.exists():
            save_backbone(backbone, arch)
        own = [*CLASSIFIER, "--backbone", str(backbone)] if script == "main" else [*BACKBONE, "--arch", arch]
        return [*own, "--data_dir", str(data_dir), "--save_dir", str(save_dir), *SMALL]

    return make


def content(path: Path) -> object:
    """What a run leaves in a checkpoint or a log, the same for equal runs."""
    return without_seconds(read(path) if path.suffix == ".tar" else read_log(path))


# --- kills


@pytest.mark.parametrize(
    ("script", "n_kills"),
    [
        ("main", 2),
        ("pretrain", 1),
        pytest.param("main", 30, marks=pytest.mark.slow),
        pytest.param("pretrain", 20, marks=pytest.mark.slow),
    ],
)
def test_run_killed_at_any_moment_ends_as_if_never_killed(script: str, n_kills: int, flags, tmp_path: Path) -> None:
    """Every other kill is timed to hit the writing of a checkpoint, which takes long enough if it is large.

    Without a last checkpoint to resume from, the run starts again, with --overwrite if it left other files.
    """
    n_epochs, rng = 4, random.Random(script)
    straight, printed = tmp_path / "straight", tmp_path / "printed.txt"
    argv = [*flags(script, straight, "resnet18"), "--epochs", str(n_epochs)]
    begin = time.monotonic()
    assert finish(start(script, argv, printed)) == 0, printed.read_text()
    duration = time.monotonic() - begin
    n_resumed = 0
    for i in range(n_kills):
        folder = tmp_path / f"killed_{i}"
        folder.mkdir()
        argv = [*flags(script, folder, "resnet18"), "--epochs", str(n_epochs)]
        process = start(script, argv, printed)
        time.sleep(rng.uniform(0, duration))
        if i % 2 == 0:
            wait_for(lambda folder=folder: any(folder.glob("*.tmp")), process)
            time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        last, best, log = (folder / name for name in FILES[script])
        for path in (last, best):
            if path.exists():
                assert isinstance(read(path), dict)
        n_resumed += last.exists()
        present = [path.name for path in (best, log) if path.exists()]
        if last.exists():
            argv.append("--resume_training")
        elif present:
            assert finish(start(script, argv, printed)) == 1
            assert printed.read_text().startswith(f"error: {folder} holds an earlier run ({', '.join(present)}): ")
            argv.append("--overwrite")
        assert finish(start(script, argv, printed)) == 0, printed.read_text()
        for name in FILES[script]:
            assert same(content(folder / name), content(straight / name)), f"{name} after kill {i}"
    assert n_resumed or n_kills < 10


# --- signals


@pytest.mark.parametrize(
    ("script", "number", "exit_code", "send"),
    [
        ("main", signal.SIGTERM, 143, os.kill),
        ("pretrain", signal.SIGTERM, 143, os.killpg),
        ("pretrain", signal.SIGINT, 130, os.killpg),
        pytest.param("main", signal.SIGINT, 130, os.killpg, marks=pytest.mark.slow),
        pytest.param("main", signal.SIGTERM, 143, os.killpg, marks=pytest.mark.slow),
        pytest.param("pretrain", signal.SIGTERM, 143, os.kill, marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(
    script: str, number: int, exit_code: int, send: Callable[[int, int], None], flags, tmp_path: Path
) -> None:
    """Ctrl-C reaches all processes of the terminal; SIGTERM the script alone, or its workers too."""
    folder, printed = tmp_path / "out", tmp_path / "printed.txt"
    argv = [*flags(script, folder), "--epochs", "1000", "--num_workers", "2"]
    process = start(script, argv, printed)
    wait_for(lambda: printed.exists() and "epoch 1/" in printed.read_text(), process)
    send(process.pid, number)
    assert finish(process) == exit_code, printed.read_text()
    *_, line = printed.read_text().splitlines()
    last = folder / FILES[script][0]
    assert line == "stopped: --resume_training=True continues a training from its last saved epoch"
    assert "Traceback" not in printed.read_text() and not list(folder.glob("*.tmp"))
    n_saved = read(last)["epoch"] + 1
    (tmp_path / "backbone.tar").unlink(missing_ok=True)  # the checkpoint has its weights
    process = start(script, [*argv, "--resume_training", "--epochs", str(n_saved + 1)], printed)
    assert finish(process) == 0 and len(read_log(folder / FILES[script][2])) == n_saved + 1, printed.read_text()


def test_stopped_before_anything_is_saved(flags, tmp_path: Path) -> None:
    folder, printed = tmp_path / "out", tmp_path / "printed.txt"
    process = start("main", flags("main", folder), printed)
    wait_for(lambda: printed.exists() and "network: " in printed.read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    assert printed.read_text().splitlines()[-1].startswith("stopped: ") and not list(folder.iterdir())


# --- the disk


@pytest.mark.parametrize("script", ["main", "pretrain"])
def test_full_disk_leaves_earlier_files(script: str, flags, tmp_path: Path) -> None:
    """A limit on the size of files refuses the write as a full disk does."""
    folder, printed = tmp_path / "out", tmp_path / "printed.txt"
    argv = flags(script, folder)
    assert finish(start(script, [*argv, "--epochs", "1"], printed)) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar"}
    assert finish(start(script, [*argv, "--resume_training", "--epochs", "2"], printed, largest_file=10**5)) == 1
    *_, line = printed.read_text().splitlines()
    assert line.startswith(f"error: cannot write {folder}/") and line.endswith("earlier files are intact")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".csv"} == before
    assert finish(start(script, [*argv, "--resume_training", "--epochs", "2"], printed)) == 0


# --- numbers


@pytest.mark.parametrize("script", [main, pretrain])
def test_loss_that_is_not_finite_stops_training(
    script: ModuleType, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = script.__name__
    argv = [*flags(name, tmp_path / "out"), "--batch_size", "2"]
    script.main([*argv, "--epochs", "1"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    losses = {main: "attention_loss", pretrain: "pretrain_loss"}
    real, n_calls = getattr(script, losses[script]), 0

    def second_is_infinite(*given: object) -> object:
        nonlocal n_calls
        n_calls += 1
        value, factor = real(*given), float("inf") if n_calls == 2 else 1.0
        return type(value)(*(term * factor for term in value)) if script is main else value * factor

    monkeypatch.setattr(script, losses[script], second_is_infinite)
    line = fails(script, [*argv, "--resume_training", "--lr", "0.003", "--epochs", "2"])
    assert line == "error: epoch 2/2: the loss is not finite: lower the learning rate"
    assert n_calls == 2 and {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_network_that_is_not_finite_is_not_saved(flags, tmp_path: Path) -> None:
    """The last step of an epoch may spoil the weights although its loss was finite."""
    argv = flags("pretrain", tmp_path / "out")
    pretrain.main([*argv, "--epochs", "1"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    line = fails(pretrain, [*argv, "--resume_training", "--lr", "1e9", "--epochs", "2"])
    assert "validation: the network's predictions are not finite" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_first_step_that_is_not_finite_is_named(value: float) -> None:
    loader = torch.utils.data.DataLoader(range(40), batch_size=4)
    with utils.Meter("epoch 7/9", loader, CPU) as meter:
        meter.update(4, loss=torch.tensor(1.0), accuracy=torch.tensor(0.5))
        meter.update(4, loss=torch.tensor(2.0), accuracy=torch.tensor(1.0))
        assert meter.means() == {"loss": 1.5, "accuracy": 0.75}
        with pytest.raises(utils.UserError, match="epoch 7/9: the loss is not finite: "):
            meter.update(4, loss=torch.tensor(value), accuracy=torch.tensor(1.0))


class List(torch.utils.data.Dataset):
    """Three images, each the number of its place in the list."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return torch.tensor([float(index)]), torch.full((1, 4), index / 4 if index else float("nan")), 0, index


def test_each_image_is_predicted_exactly_once() -> None:
    """In any order; the predictions are those of the list."""

    def collect(order: list[int], *spoiled: float) -> list[torch.Tensor]:
        loader = torch.utils.data.DataLoader(List(), batch_size=2, sampler=order)

        def predict(canvas: torch.Tensor, boxes: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert torch.equal(canvas[:, 0], index.float()) and torch.equal(boxes[:, 0, 0].nan_to_num(), index / 4)
            for value in spoiled:
                canvas[index == 1] = value
            return 10 * canvas, canvas.unsqueeze(2).expand(-1, 1, 4) if spoiled else 2 * canvas

        return utils.collect(predict, loader, CPU, "test")

    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        tens, twice, boxes = collect(order)
        assert tens.tolist() == [[0], [10], [20]] and twice.tolist() == [[0], [2], [4]]
        assert boxes[0].isnan().all() and boxes[1:].tolist() == [[[0.25] * 4], [[0.5] * 4]]
    for order in ([0, 1, 1], [0, 1], [0, 0, 1, 2], [2, 2, 2], [0, 1, 2, 0, 1, 2]):
        message = f"^test: {len(order)} predictions of {len(set(order))} of 3 images$"
        with pytest.raises(utils.UserError, match=message):
            collect(order)
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(utils.UserError, match="^test: the network's predictions are not finite: "):
            collect([0, 1, 2], value)


def test_evaluation_notices_a_repeated_or_missing_image(make_data, make_model) -> None:
    images = dataset.read_list(make_data(), "test")
    backbone = pretrain.PretrainNetwork(backbone=build_backbone(ARCH), n_classes=N_CLASSES, patch_size=32)
    noise = torch.zeros(9, 1, 2, 2)
    for order in ([0, 1, 2, 3, 4, 5, 6, 7, 7], range(8)):
        items = dataset.ImageDataset(images, 128)
        loader = torch.utils.data.DataLoader(items, batch_size=4, sampler=order)
        message = f"test: {len(order)} predictions of 8 of 9 images"
        with pytest.raises(utils.UserError, match=message):
            main.evaluate(make_model(), loader, noise, "learned", CPU, "test")
        with pytest.raises(utils.UserError, match=message):
            pretrain.evaluate(backbone, loader, CPU, "test")


def gradients(rank: int, world_size: int, net: RecurrentAttention, folder: Path) -> None:
    """Gradients of one step on this process's shard of a fixed batch, averaged over the processes."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    machine = utils.Machine(torch.device("cpu"), [], "fp32", rank, world_size)
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8, generator=generator)
    noise = torch.randn(8, 1, 2, 2, generator=generator)
    labels = torch.arange(8) % N_CLASSES
    wrapped = utils.wrap(net, machine)  # bound to a name, for the backward pass needs it
    rollout = wrapped(canvas[rank::world_size], noise[rank::world_size], "learned")
    sum(attention_loss(rollout, labels[rank::world_size], "each")).backward()
    if rank == 0:
        grads = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
        torch.save(grads, folder / f"gradients_{world_size}.tar")
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(make_model, tmp_path: Path) -> None:
    net = make_model()
    for world_size in (1, 2):
        processes = [
            forkserver.Process(target=gradients, args=(rank, world_size, net, tmp_path)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    alone, together = (read(tmp_path / f"gradients_{world_size}.tar") for world_size in (1, 2))
    assert alone.keys() == together.keys() and any(value.abs().max() > 1e-3 for value in alone.values())
    for name, value in alone.items():
        assert torch.allclose(value, together[name], atol=1e-6, rtol=0), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_gradient_of_one(make_model) -> None:
    grads = []
    canvas = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8, device="cuda")
    noise, labels = torch.randn(8, 1, 2, 2, device="cuda"), (torch.arange(8) % N_CLASSES).cuda()
    net = make_model().cuda()
    for gpus in ([0], [0, 1]):
        net.zero_grad()
        machine = utils.Machine(torch.device("cuda", 0), gpus, "fp32", 0, 1)
        sum(attention_loss(utils.wrap(net, machine)(canvas, noise, "learned"), labels, "each")).backward()
        grads.append({name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None})
    for name, value in grads[0].items():
        assert torch.allclose(value, grads[1][name], atol=1e-6, rtol=0), name


# --- long runs


def resident(pid: int) -> int:
    """Resident memory of a process in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_200_epochs_leak_nothing(num_workers: str, flags, tmp_path: Path) -> None:
    folder, printed = tmp_path / "out", tmp_path / "printed.txt"
    process = start("main", [*flags("main", folder), "--epochs", "200", "--num_workers", num_workers], printed)
    seen = []
    for n_epochs in (40, 190):
        wait_for(lambda n=n_epochs: printed.exists() and f"epoch {n}/" in printed.read_text(), process)
        n_files, n_processes = len(os.listdir(f"/proc/{process.pid}/fd")), len(members(process.pid))
        seen.append((resident(process.pid), n_files, n_processes))
    assert finish(process) == 0, printed.read_text()
    (memory, files, processes), (memory_later, files_later, processes_later) = seen
    assert memory_later < 1.05 * memory and abs(files_later - files) <= 3
    assert processes_later == processes and (processes > 1) == (num_workers != "0")


def test_checkout_that_cannot_be_written_to(flags, tmp_path: Path) -> None:
    """A user who may write there all the same, such as root, finds nothing new in it but Python's cache."""
    root, checkout, out = Path(__file__).parent.parent, tmp_path / "checkout", tmp_path / "out"
    checkout.mkdir()
    for path in root.glob("*.py"):
        (checkout / path.name).write_bytes(path.read_bytes())
    checkout.chmod(0o555)
    before = sorted(checkout.iterdir())
    command = [sys.executable, "main.py", *flags("main", out, "resnet18"), "--epochs", "1"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0 and (out / "saved_model.tar").exists(), done.stderr
    assert [path for path in sorted(checkout.iterdir()) if path.name != "__pycache__"] == before
    checkout.chmod(0o755)


def test_benchmark_does_not_need_pytest(tmp_path: Path) -> None:
    """What the README says to run must work with requirements.txt alone."""
    (tmp_path / "pytest.py").write_text("raise ImportError")
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "--help"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and "--parts" in done.stdout, done.stderr


def pages_of_later_tensors() -> int:
    """How many pages the system gave for ten tensors, after twenty of the same size were freed."""
    utils.set_up_machine(flags_of(main))  # on the CPU
    given = []
    for _ in range(30):
        torch.ones(2**24)
        given.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return given[-1] - given[19]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept by an option of glibc")
def test_tensors_reuse_the_memory_of_freed_ones() -> None:
    with ProcessPoolExecutor(1, mp_context=forkserver) as pool:
        assert pool.submit(pages_of_later_tensors).result() * resource.getpagesize() < 2**26  # the size of one
