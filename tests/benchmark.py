"""How near the repository comes to the speed of its backbone. Run by hand, on a CPU or a GPU.

Each figure is a ratio of two things timed in turn in this run, the median of several rounds after a warm-up, on
synthetic JPEGs of 500 x 375 and random weights, which take the same time as real ones. Let the machine be idle.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import reference

import main
import pretrain
import utils
from data.toy_dogs import write_list
from dataset import N_BOXES, ImageDataset, make_loader, read_list
from glimpse import FULL_SCALE, STARTS, build_pyramid, canvas_size, extract_patches, normalize, patch_scales
from model import PATCHES_PER_PASS, PretrainNetwork, RecurrentAttention, build_backbone

N_CLASSES = 120
K, START_SIZE = 2, 2
N_TRAJECTORIES = 7
# Of the 2018 code on two cores of another machine in float32, the same work: seconds and peak memory in GB.
IN_2018 = {"pretrain 128 + 64": (80.0, 5.0), "train 128 + 19": (74.0, 2.8), "test 64": (134.0, 5.1)}
TIMES_FASTER = {"fp32": (1.2, 2.5, 3.2), "bf16": (2.2, 8.0, 10.0)}  # the latter with --compile


class Setting(NamedTuple):
    """What is measured, and on what."""

    data_dir: Path  # of images to load
    machine: utils.Machine
    arch: str
    patch_size: int
    rounds: int
    batch_sizes: dict[str, int]  # of each script's step
    clone_of_2018: Path | None


class Figure(NamedTuple):
    """A row of the table."""

    part: str
    what: str
    value: float
    target: str
    detail: str


# --- measuring


def seconds(function: Callable[[], Any], machine: utils.Machine) -> float:
    """How long a call takes, until the GPU has finished too."""
    if machine.gpus:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if machine.gpus:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(setting: Setting, *functions: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each function in each round, after one that does not count."""
    rounds = [[seconds(function, setting.machine) for function in functions] for _ in range(setting.rounds + 1)]
    return rounds[1:]


def median_ratio(rounds: list[list[float]], ratio: Callable[..., float]) -> float:
    """Median over the rounds of a ratio of their seconds."""
    return statistics.median(ratio(*times) for times in rounds)


def milliseconds(rounds: list[list[float]], *names: str, per: int = 1) -> str:
    """Median time of each function in words."""
    medians = [statistics.median(times) for times in zip(*rounds)]
    return ", ".join(f"{name} {1000 * value / per:.3g} ms" for name, value in zip(names, medians))


def peak_memory(machine: utils.Machine) -> float:
    """Largest memory that this process has held so far, in GB: of the GPU if it uses one."""
    if machine.gpus:
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def in_new_process(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function where nothing has taken memory before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *inputs).result()


# --- what is measured


def write_images(data_dir: Path, breed: str, n_train: int, n_test: int) -> None:
    """A data set of one breed of 500 x 375 JPEGs, which are as large as photographs: about 50 kB each."""
    rng = np.random.default_rng(list(breed.encode()))  # no image is in two of the sets
    folder = f"n00000001-{breed}"
    (data_dir / "Images" / folder).mkdir(parents=True)
    (data_dir / "lists").mkdir()
    for split, count in (("train", n_train), ("test", n_test)):
        names = [f"{folder}/{split}_{i}.jpg" for i in range(count)]
        for name in names:
            image = np.zeros((375, 500, 3))
            for side, weight in ((6, 0.6), (50, 0.25), (200, 0.15)):
                coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
                image += weight * np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
            Image.fromarray(image.astype(np.uint8)).save(data_dir / "Images" / name, quality=88)
        write_list(data_dir / "lists" / f"{split}_list.mat", names, [1] * count)


def main_flags(**values: Any) -> argparse.Namespace:
    """The flags of main.py, with these values."""
    return main.make_parser().parse_args([f"--{name}={value}" for name, value in values.items()])


def random_canvases(setting: Setting, n_images: int, start_size: int) -> torch.Tensor:
    """uint8 [N, 3, S, S] of noise."""
    side = canvas_size(setting.patch_size, start_size)
    return torch.randint(0, 256, (n_images, 3, side, side), dtype=torch.uint8)


def random_patches(setting: Setting, n_patches: int) -> torch.Tensor:
    """Patches [N, 3, P, P] as the backbone likes them best, on the device."""
    patches = torch.randn(n_patches, 3, setting.patch_size, setting.patch_size, device=setting.machine.device)
    return patches.contiguous(memory_format=torch.channels_last)


def make_classifier(setting: Setting, k: int, start_size: int, n_glimpses: int) -> RecurrentAttention:
    """The network of main.py, of the default flags but for those given, with random weights."""
    args = main_flags(k=k, start_size=start_size, n_glimpses=n_glimpses)
    net = main.build_model(args, {"arch": setting.arch, "patch_size": setting.patch_size}, N_CLASSES)
    net.to(setting.machine.device, memory_format=torch.channels_last)
    net.glimpse.speed_up(setting.machine.dtype, compiles=setting.machine.compiles)
    return net


def frozen_passes(net: RecurrentAttention, machine: utils.Machine, *batches: torch.Tensor) -> Callable[[], None]:
    """The passes of batches of patches [N, 3, P, P] through the frozen backbone, and nothing else."""

    @torch.no_grad()
    def passes() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bf16"):
            for patches in batches:
                net.glimpse.features(patches)

    return passes


def make_step(
    setting: Setting,
    job: str,
    batch_size: int,
    k: int = K,
    start_size: int = START_SIZE,
    n_glimpses: int = 1,
    n_trajectories: int = N_TRAJECTORIES,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One step of a job on a batch in memory, by the very function of its script; and its backbone passes alone.

    job: "pretrain", "train" or "test".
    """
    machine = setting.machine
    canvas = random_canvases(setting, batch_size, STARTS[0] if job == "pretrain" else start_size)
    boxes, labels = torch.full((batch_size, N_BOXES, 4), math.nan), torch.randint(0, N_CLASSES, (batch_size,))
    loader = DataLoader(TensorDataset(canvas, boxes, labels, torch.arange(batch_size)), batch_size=batch_size)
    if job == "pretrain":
        backbone = build_backbone(setting.arch)
        model = PretrainNetwork(backbone=backbone, n_classes=N_CLASSES, patch_size=setting.patch_size)
        pretrain.place(model, machine)
        optimizer = utils.make_optimizer(model.parameters())
        net = utils.wrap(model, machine)
        patches = random_patches(setting, batch_size * len(STARTS))
        bare = utils.MixedPrecision(backbone, machine)

        def train_passes() -> None:
            backbone.zero_grad()
            bare(patches).float().mean().backward()

        return lambda: pretrain.train_one_epoch(net, loader, optimizer, machine, job), train_passes

    model = make_classifier(setting, k, start_size, n_glimpses)
    net = utils.wrap(model, machine)
    n_samples = n_trajectories if job == "test" else 0
    noise = main.evaluation_noise("learned", batch_size, n_samples, n_glimpses, seed=0)
    glimpses = random_patches(setting, batch_size * noise.shape[1] * k).split(PATCHES_PER_PASS)
    passes = frozen_passes(model, machine, random_patches(setting, batch_size), *glimpses * n_glimpses)
    if job == "test":
        return lambda: main.evaluate(net, loader, noise, "learned", machine, job), passes
    optimizer = utils.make_optimizer(*model.parameter_groups())
    return lambda: main.train_one_epoch(net, loader, noise, main_flags(), optimizer, machine, job), passes


def measure_loader(setting: Setting) -> list[Figure]:
    """The loader with one worker, over a bare loop of PIL."""
    images, side = read_list(setting.data_dir, "train"), canvas_size(setting.patch_size, START_SIZE)
    n_images = len(images.files)
    loader = make_loader(images, main_flags(batch_size=32, num_workers=1), setting.machine, side)

    def ours() -> None:
        for _ in loader:
            pass

    def bare() -> None:
        for file in images.files:
            image = Image.open(file).convert("RGB")
            square = min(image.size)
            left, top = (image.width - square) // 2, (image.height - square) // 2
            image.crop((left, top, left + square, top + square)).resize((side, side), Image.Resampling.BILINEAR)

    rounds = in_turn(setting, ours, bare)
    value = median_ratio(rounds, lambda ours, bare: bare / ours)
    return [Figure("loader", "speed over a bare loop", value, ">= 0.9", milliseconds(rounds, "an image", per=n_images))]


def measure_retina(setting: Setting) -> list[Figure]:
    """Pyramid and glimpses, over the backbone passes that they feed."""
    n_images, scales = 64, patch_scales(K, START_SIZE)
    canvas = random_canvases(setting, n_images, START_SIZE).to(setting.machine.device)
    location = torch.rand(n_images, 1, 2, device=setting.machine.device) * 2 - 1
    batches = random_patches(setting, n_images), random_patches(setting, n_images * K)
    passes = frozen_passes(make_classifier(setting, K, START_SIZE, 1), setting.machine, *batches)

    def retina() -> None:
        pyramid = build_pyramid(canvas, scales, setting.patch_size)
        normalize(extract_patches(pyramid, torch.zeros_like(location), (FULL_SCALE,), setting.patch_size))
        normalize(extract_patches(pyramid, location, scales, setting.patch_size))

    rounds = in_turn(setting, retina, passes)
    value = median_ratio(rounds, lambda retina, passes: retina / passes)
    detail = milliseconds(rounds, "retina", "passes") + f" for {n_images} images"
    return [Figure("retina", "time over the backbone's", value, "<= 0.05", detail)]


def measure_steps(setting: Setting) -> list[Figure]:
    """The backbone passes of each script's step, over the whole step.

    And the operations that they take, in a second of the step, over those of a large matrix product: the peak.
    """
    machine, side = setting.machine, 8192 if setting.machine.gpus else 4096
    of_type = {"device": machine.device, "dtype": machine.dtype}
    left, right = torch.randn(2, side, side, **of_type)
    n_patches = {"pretrain": len(STARTS), "train": 1 + K, "test": 1 + K * (1 + N_TRAJECTORIES)}  # of an image
    figures = []
    for job, batch_size in setting.batch_sizes.items():
        step, passes = make_step(setting, job, batch_size)
        with FlopCounterMode(display=False) as counter:
            passes()
        n_operations = counter.get_total_flops()
        rounds = in_turn(setting, step, passes, lambda: left @ right)
        value = median_ratio(rounds, lambda step, passes, _: passes / step)
        detail = milliseconds(rounds, "step", "passes") + f" for {batch_size} images"
        figures.append(Figure(f"{job} step", "share of the backbone", value, ">= 0.90", detail))
        value = median_ratio(rounds, lambda step, _, product: product / step) * n_operations / (2 * side**3)
        speed = n_operations / statistics.median(times[0] for times in rounds) / 1e12
        detail = f"{n_operations / n_patches[job] / batch_size / 1e9:.1f} GFLOP a patch, {speed:.3g} TFLOP/s"
        figures.append(Figure(f"{job} step", "speed over the peak", value, "", detail))
    return figures


def measure_end_to_end(setting: Setting) -> list[Figure]:
    """An epoch of main.py from files, over the longer of loading and computing alone."""
    machine, images = setting.machine, read_list(setting.data_dir, "train")
    side, n_images = canvas_size(setting.patch_size, START_SIZE), len(images.files)
    loader = make_loader(images, main_flags(batch_size=32), machine, side)
    in_memory = DataLoader(TensorDataset(*map(torch.cat, zip(*loader))), batch_size=32)
    model = make_classifier(setting, K, START_SIZE, 1)
    net, optimizer = utils.wrap(model, machine), utils.make_optimizer(*model.parameter_groups())
    noise = torch.randn(n_images, 1, 1, 2)

    def load() -> None:
        for _ in loader:
            pass

    def train(source: DataLoader) -> None:
        main.train_one_epoch(net, source, noise, main_flags(), optimizer, machine, "epoch")

    rounds = in_turn(setting, lambda: train(loader), load, lambda: train(in_memory))
    value = median_ratio(rounds, lambda epoch, load, compute: epoch / max(load, compute))
    detail = milliseconds(rounds, "epoch", "loading", "computing") + f" for {n_images} images"
    return [Figure("end to end", "epoch over its longer half", value, "<= 1.1", detail)]


def measure_reference(setting: Setting) -> list[Figure]:
    """The retina made with PIL, over ours, for one glimpse and the context."""
    images, side = read_list(setting.data_dir, "test"), canvas_size(setting.patch_size, START_SIZE)
    n_images, scales = len(images.files), patch_scales(K, START_SIZE)
    location = torch.rand(n_images, 1, 2) * 2 - 1
    dataset = ImageDataset(images, side)
    loaded = torch.stack([canvas for canvas, *_ in dataset])
    opened = [Image.fromarray(canvas.permute(1, 2, 0).numpy()) for canvas in loaded]

    def ours(canvas: torch.Tensor) -> None:
        pyramid = build_pyramid(canvas.to(setting.machine.device), scales, setting.patch_size)
        place = location.to(setting.machine.device)
        extract_patches(pyramid, torch.zeros_like(place), (FULL_SCALE,), setting.patch_size)
        extract_patches(pyramid, place, scales, setting.patch_size)

    def theirs(image: Image.Image, x: float, y: float) -> None:
        reference.context(image, setting.patch_size)
        reference.glimpse(image, x, y, K, START_SIZE, setting.patch_size)

    def ours_from_files() -> None:
        ours(torch.stack([canvas for canvas, *_ in dataset]))

    def theirs_from_files() -> None:
        for file, place in zip(images.files, location[:, 0].tolist()):
            theirs(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BILINEAR), *place)

    def theirs_from_memory() -> None:
        for image, place in zip(opened, location[:, 0].tolist()):
            theirs(image, *place)

    figures = []
    for what, functions in (
        ("PIL's time over ours", (lambda: ours(loaded), theirs_from_memory)),
        ("the same, with decoding", (ours_from_files, theirs_from_files)),
    ):
        rounds = in_turn(setting, *functions)
        detail = milliseconds(rounds, "ours", "PIL", per=n_images) + " an image"
        figures.append(Figure("reference", what, median_ratio(rounds, lambda ours, pil: pil / ours), "", detail))
    return figures


class Cost(NamedTuple):
    """What a job took."""

    seconds: float  # once everything is imported, without compiling
    memory: float  # peak, in GB
    compiling: float  # seconds


def run_silently(job: Callable[[], Any], machine: utils.Machine) -> Cost:
    """What a script costs."""
    multiprocessing.set_start_method(None, force=True)  # of its loader's workers: the system's own, as from a shell
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        duration = seconds(job, machine)
    spent = torch._dynamo.utils.calculate_time_spent() if machine.compiles else {}
    compiling = spent.get("total_wall_time", 0.0)
    return Cost(duration - compiling, peak_memory(machine), compiling)


def run_job(script: str, flags: list[str], machine: utils.Machine) -> Cost:
    """What a script of ours costs."""
    module = importlib.import_module(script)
    return run_silently(lambda: module.main(flags), machine)


def run_job_of_2018(script: Path, flags: list[str], folder: Path, machine: utils.Machine) -> Cost:
    """The same of a script of the 2018 repository as it stands, on a CPU, in a folder that holds data/Original."""
    os.chdir(folder)
    for name in ("dataset", "main"):
        del sys.modules[name]  # ours, which would be taken for theirs
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *flags]
    resnet50 = torchvision.models.resnet50
    torchvision.models.resnet50 = lambda pretrained: resnet50()  # takes the same time, and no download
    torch.Tensor.__round__ = lambda number: round(number.item())  # Pillow now rounds the corners of a crop: tensors
    torch.cuda.is_available = lambda: False

    def job() -> None:
        left = runpy.run_path(str(script), run_name="__main__")  # its global variables
        path = Path(left.get("save_file") or left["save_path"])
        if not path.exists():  # it saves only what is right on some image, and the next job needs the file
            model = left["my_model"].module.resnet if "save_file" in left else left["my_model"]
            torch.save({"model_dict": model.state_dict()}, path)

    return run_silently(job, machine)


def measure_epochs(setting: Setting) -> Iterator[Figure]:
    """Three jobs, against the times that they take by the 2018 code: on this machine, given a clone of it."""
    folder = setting.data_dir.parent
    # Names by whose hashes just 64 and 19 images are held out for validation.
    write_images(folder / "pretrain", "pretrain2", 128 + 64, 1)
    write_images(folder / "train", "train4", 128 + 19, 64)
    save_dir, precision = ["--save_dir", str(folder / "saved")], setting.machine.precision
    shared = [*save_dir, "--precision", precision, "--device", setting.machine.device.type]
    shared += ["--compile"] if setting.machine.compiles else []
    backbone = ["--arch", setting.arch, "--patch_size", str(setting.patch_size), "--weights", "none"]
    once = [*shared, "--batch_size", "16", "--epochs", "1", "--overwrite"]  # the files of an earlier round
    pretrain_data, train_data = (["--data_dir", str(folder / name)] for name in ("pretrain", "train"))
    jobs = (
        ("pretrain", [*once, *pretrain_data, *backbone, "--valid_size", str(64 / 192)]),
        ("main", [*once, *train_data, "--valid_size", str(19 / 147)]),
        ("main", [*shared, *train_data, "--task=test", "--batch_size", "16"]),
    )
    folder_of_2018 = folder / "2018"
    write_images(folder_of_2018 / "data" / "Original", "of_2018", 128, 64)
    once_of_2018 = ["--batch_size", "16", "--epochs", "1", "--num_workers", "2"]
    jobs_of_2018 = (
        ("pretrain.py", once_of_2018),
        ("main.py", once_of_2018),
        ("main.py", [*once_of_2018, "--task", "test"]),
    )
    targets = TIMES_FASTER[precision]
    for (script, flags), old, (name, elsewhere), target in zip(jobs, jobs_of_2018, IN_2018.items(), targets):
        ours, theirs = [], []
        for _ in range(setting.rounds):
            ours.append(in_new_process(run_job, script, flags, setting.machine))
            if setting.clone_of_2018:
                job = (setting.clone_of_2018 / old[0], old[1], folder_of_2018, setting.machine._replace(compiles=False))
                theirs.append(in_new_process(run_job_of_2018, *job))
            else:
                theirs.append(Cost(*elsewhere, 0.0))
        value = statistics.median(then.seconds / now.seconds for now, then in zip(ours, theirs))
        now, then = (Cost(*map(statistics.median, zip(*some))) for some in (ours, theirs))
        where = "" if setting.clone_of_2018 else " on another machine"
        compiling = f", {now.compiling:.0f} s of compiling not counted" if setting.machine.compiles else ""
        detail = f"{now.seconds:.1f} s{compiling}, then {then.seconds:.1f} s{where}"
        yield Figure(name, "times faster than 2018", value, f">= {target}", detail)
        detail = f"{then.memory:.1f} GB in 2018"
        yield Figure(name, "peak memory in GB", now.memory, f"<= {then.memory:.1f}", detail)


def measure_one(setting: Setting, job: str, sizes: dict[str, int]) -> tuple[float, float]:
    """Seconds of a step and the peak memory in GB, where nothing else has run."""
    step, _ = make_step(setting, job, **sizes)
    rounds = in_turn(setting._replace(rounds=3), step)
    return statistics.median(times[0] for times in rounds), peak_memory(setting.machine)


def measure_growth(setting: Setting) -> Iterator[Figure]:
    """Time and memory of a step as one size grows."""
    of_pretraining, of_training, of_test = setting.batch_sizes.values()
    plans = (
        ("pretrain", "batch_size", [of_pretraining * n // 2 for n in (1, 2, 4)], {}),
        ("train", "batch_size", [of_training * n // 4 for n in (1, 2, 4)], {}),
        ("train", "k", [1, 2, 3], {"batch_size": of_training // 4, "start_size": 1}),
        ("train", "n_glimpses", [1, 2, 4], {"batch_size": of_training // 4}),
        ("test", "n_trajectories", [1, 7, 14], {"batch_size": of_test}),
    )
    for job, name, values, others in plans:
        for value in values:
            duration, memory = in_new_process(measure_one, setting, job, {**others, name: value})
            words = ", ".join(f"{key} {size}" for key, size in others.items())
            detail = f"{duration:.3g} s a step, {memory:.2f} GB" + (f", {words}" if words else "")
            yield Figure(f"{job} growth", f"{name} {value}: s", duration, "", detail)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="what to measure (all)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(%(default)s)")
    add("--compile", action="store_true", help="compile the backbone, as the scripts do with this flag")
    add("--arch", default="resnet50", help="(%(default)s)")
    add("--patch_size", type=int, default=96, help="(%(default)s)")
    add("--clone_of_2018", type=Path, metavar="FOLDER", help="time the 2018 code too, on this CPU; needs joblib")
    add("--rounds", type=int, default=5, help="of which the median is taken (%(default)s)")
    args = parser.parse_args(argv)
    if args.clone_of_2018 and not (args.clone_of_2018 / "models.py").exists():
        parser.error(f"--clone_of_2018 {args.clone_of_2018} is no clone of the 2018 repository: it has no models.py")
    return args


PARTS = {
    "loader": measure_loader,
    "retina": measure_retina,
    "steps": measure_steps,
    "end_to_end": measure_end_to_end,
    "reference": measure_reference,
    "epochs": measure_epochs,
    "growth": measure_growth,
}


def benchmark(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the numbers."""
    args = parse_args(argv)
    args.gpus = "0" if args.device != "cpu" and torch.cuda.device_count() else ""
    machine = utils.set_up_machine(args)
    batch_sizes = {"pretrain": 16, "train": 128, "test": 16}
    if machine.gpus:
        batch_sizes = {"pretrain": 128, "train": 128, "test": 128}
    torch.manual_seed(0)
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    place = torch.cuda.get_device_name() if machine.gpus else cpu
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    compiled = ", compiled" if machine.compiles else ""
    about = f"{place}, {machine.precision}{compiled}, {versions}, {args.arch}"
    print(f"{about}\n\n| part | what | value | target | |\n|---|---|---|---|---|", flush=True)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            data_dir=Path(folder) / "images",
            machine=machine,
            arch=args.arch,
            patch_size=args.patch_size,
            rounds=args.rounds,
            batch_sizes=batch_sizes,
            clone_of_2018=args.clone_of_2018 and args.clone_of_2018.resolve(),
        )
        write_images(setting.data_dir, "timed", 128, 64)
        for figure in itertools.chain.from_iterable(PARTS[part](setting) for part in args.parts):
            figures.append(figure._asdict())
            print(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else v for v in figure)} |", flush=True)
            if args.json:  # row by row, since a later part may fail
                with utils.replacing(args.json, mode="w") as file:
                    json.dump({"about": about, "figures": figures}, file, indent=1)


if __name__ == "__main__":
    benchmark()
