"""What both scripts share: errors, settings and flags, the machine, meters and predictions, a run's files."""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

SECONDS_PER_LINE = 60  # between lines of progress where no terminal shows a bar


class UserError(Exception):
    """A mistake that the user can fix; the message is one line that names the flag, file or value and what to do."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run; the message says what is saved."""


class OutputClosed(Exception):
    """Standard output is a pipe whose reader has gone, such as `head`."""


def explain(error: RuntimeError | MemoryError) -> str:
    """Why PyTorch failed and what to do, where the user can do something about it; else empty."""
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        return f"--compile does not work here ({str(error).strip().splitlines()[0][:160]}): leave it out"
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)  # PyTorch has a type for GPU memory only
    if not known and "can't allocate memory" not in str(error) and "by signal: Killed" not in str(error):
        return ""
    where = "GPU " if isinstance(error, torch.OutOfMemoryError) else ""
    return f"out of {where}memory: choose a smaller batch, a smaller network or fewer trajectories"


def run(main: Callable[[], None]) -> None:
    """Run a script, and end it with one line where it fails for a reason that the user can understand.

    Exit codes: 1 for a UserError or lack of memory, 130 after Ctrl-C, 143 after SIGTERM.
    """

    def terminate(number: int, frame: object) -> None:
        nonlocal exit_code
        exit_code = 128 + number
        # A signal to the process group also ends the loader's workers, which PyTorch would report as a crash.
        with contextlib.suppress(AttributeError):  # Windows has no such signal
            signal.signal(signal.SIGCHLD, lambda *_: None)
        raise KeyboardInterrupt

    exit_code = 128 + signal.SIGINT
    with contextlib.suppress(AttributeError):  # a file name may have characters that the output cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        if dist.is_initialized():  # not after an error, when other processes may never get here
            dist.destroy_process_group()
    except UserError as error:
        # An error in a loader's worker arrives inside its traceback; the message ends the last line.
        sys.exit("error: " + str(error).strip().splitlines()[-1].rpartition("UserError: ")[2])
    except OutputClosed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it flushes
        sys.exit(128 + 13)  # of SIGPIPE, which Windows lacks
    except (RuntimeError, MemoryError) as error:
        if not (reason := explain(error)):
            raise
        sys.exit(f"error: {reason}")
    except KeyboardInterrupt as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not disturb the ending
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"stopped{f': {stop}' if isinstance(stop, Stopped) else ''}", file=sys.stderr)
        sys.exit(exit_code)


# --- settings and flags

GROUPS = TASK, FILES, TRAINING, MACHINE, NETWORK = ("task", "data and files", "training", "machine", "network")
RULES = {
    "above": lambda value, limit: value > limit,
    "at_least": lambda value, limit: value >= limit,
    "at_most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
    "multiple_of": lambda value, factor: value % factor == 0,
    "one_of": lambda value, choices: value in choices,
    "a_list_like": lambda value, _: (
        re.fullmatch(r"\d+(,\d+)*", value) and len(set(map(int, value.split(",")))) == len(value.split(","))
    ),
}


def setting(
    default: Any, help: str, group: str, *, tasks: str = "", fixed: str = "", stored: bool = True, **rules: Any
) -> Any:
    """A field of a settings dataclass, with all that its flag, its checks and the checkpoints need to know.

    group: of --help. tasks: those for which the flag means something, all if empty. stored: checkpoints store the
    value, for use where the flag is not given. fixed: when a flag must agree with what is stored, "always" or when
    "resuming", else never. rules: limits by the names of `RULES`.
    """
    metadata = {"help": help, "group": group, "tasks": tasks.split(), "fixed": fixed, "stored": stored, "rules": rules}
    return dataclasses.field(default=default, metadata=metadata)


file_setting = functools.partial(setting, group=FILES)
training_setting = functools.partial(setting, group=TRAINING, tasks="train")
network_setting = functools.partial(setting, group=NETWORK, fixed="always")
machine_setting = functools.partial(setting, group=MACHINE, stored=False)
# The scripts need the seed for different tasks.
seed_setting = functools.partial(setting, 0, "random seed", TRAINING, fixed="resuming", at_least=0)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


N_WORKERS = max(1, min(available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """Settings of both scripts. Flags, their help and checks, and what checkpoints store derive from the fields."""

    data_dir: Path = file_setting(Path("data/Original"), "folder of images", tasks="train test probe view_glimpses")
    save_dir: Path = file_setting(Path("data/saved_models"), "folder for checkpoints, logs and results", stored=False)
    valid_size: float = file_setting(
        0.1, "fraction of the training images to validate on", tasks="train probe", fixed="always", above=0, below=1
    )
    skip_bad_images: bool = file_setting(
        False, "leave out images that cannot be read", tasks="train test probe", stored=False
    )
    epochs: int = training_setting(101, "epochs in total, including resumed ones; 0: save untrained", at_least=0)
    batch_size: int = training_setting(
        128,
        "batch size, summed over all GPUs and processes",
        tasks="train test probe view_glimpses predict",
        at_least=1,
    )
    lr: float = training_setting(1e-4, "learning rate of Adam", above=0)
    lr_schedule: str = training_setting("cosine", "learning-rate schedule", one_of=("constant", "cosine"))
    smallest_crop: float = training_setting(
        1.0,
        "smallest side of a random training crop, as a fraction of the image's short side",
        fixed="resuming",
        above=0,
        at_most=1,
    )
    resume_training: bool = training_setting(False, "continue after the last saved epoch", stored=False)
    overwrite: bool = training_setting(False, "replace an earlier run in --save_dir", stored=False)
    tensorboard: bool = training_setting(False, "also log for TensorBoard (pip install tensorboard)", stored=False)
    device: str = machine_setting("auto", "auto: use the GPUs if there are any", one_of=("auto", "cpu", "cuda"))
    gpus: str = machine_setting("", "GPUs to use, such as 0,1 (default: all visible ones)", a_list_like="0,1")
    precision: str = setting(
        "auto", "auto: use bf16 if the hardware supports it", MACHINE, one_of=("auto", "fp32", "bf16")
    )
    compile: bool = machine_setting(
        False, "compile the backbone: faster with bf16, after a minute", tasks="train test view_glimpses predict"
    )
    num_workers: int = machine_setting(N_WORKERS, "processes that load images", tasks="train test probe", at_least=0)


def problem(value: Any, field: dataclasses.Field) -> str:
    """Why a setting cannot have this value, in words; empty if it can."""
    kind, shown = type(field.default), str(value)[:40]
    if not isinstance(value, int | float if kind is float else kind) or (type(value) is bool and kind is not bool):
        return f"{shown!r} is not of type {kind.__name__}"
    if kind in (int, float) and not value < 2**32:
        return f"{shown} is far too large"
    for rule, limit in field.metadata["rules"].items():
        if value != field.default and not RULES[rule](value, limit):
            return (
                f"{shown} is not {rule.replace('_', ' ')} {', '.join(map(str, limit)) if rule == 'one_of' else limit}"
            )
    return ""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {message}\n")


def add_flag(group: Any, field: dataclasses.Field, all_tasks: tuple[str, ...]) -> None:
    """Add the flag of a setting to a group of --help."""
    kind, help = type(field.default), field.metadata["help"]

    def number(text: str) -> Any:  # the name is for argparse's own errors
        value = {"true": True, "false": False}.get(text.lower(), text) if kind is bool else kind(text)
        if wrong := problem(value, field):
            raise argparse.ArgumentTypeError(wrong)
        return value

    if kind not in (bool, tuple) and field.default != "":
        help += f" (default: {field.default})"
    tasks = [task for task in all_tasks if task in field.metadata["tasks"]]
    if tasks and len(tasks) < len(all_tasks):
        help += f" [{', '.join(tasks)}]"
    keywords: dict[str, Any] = {"type": number, "choices": field.metadata["rules"].get("one_of")}
    if kind is bool:  # --flag, --flag=True and --flag true are the same
        keywords |= {"nargs": "?", "const": True, "metavar": "True"}
    if kind is tuple:
        keywords |= {"type": Path, "nargs": "+", "metavar": "PATH"}
    group.add_argument(f"--{field.name}", help=help, **keywords)


def parse_flags(cls: type, doc: str, argv: list[str] | None, **elsewhere: str) -> dict[str, Any]:
    """The flags given, by name. Exits with one line for a mistake or a flag that has no effect on the task.

    doc: of the script, whose first line heads --help. elsewhere: hints for flags that this script does not have.
    """
    note = "[task, ...] names the tasks that a flag is for; without it, it is for all."
    parser = Parser(
        description=doc.splitlines()[0], epilog=note, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    all_tasks = cls.__dataclass_fields__["task"].metadata["rules"]["one_of"]
    for field in dataclasses.fields(cls):
        add_flag(groups[field.metadata["group"]], field, all_tasks)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = elsewhere.get(unknown[0].partition("=")[0].lstrip("-"), "--help lists all flags")
        parser.error(f"unknown argument {unknown[0]}: {hint}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(flags).items()}
    try:
        check_settings(cls, given)
    except UserError as error:
        parser.error(str(error))
    return given


def check_settings(cls: type, given: dict[str, Any]) -> None:
    """Raise UserError for a setting that class cls lacks, an invalid value, or one that has no effect on the task."""
    fields = cls.__dataclass_fields__
    if unknown := [name for name in given if name not in fields]:
        raise UserError(f"there is no setting {unknown[0]}")
    task = given.get("task", fields["task"].default)
    for name, value in given.items():
        if wrong := problem(value, fields[name]):
            raise UserError(f"--{name}: {wrong}")
        if task not in (fields[name].metadata["tasks"] or [task]):
            raise UserError(f"--{name} has no effect on --task={task}: leave it out")


def read_settings(
    cls: type, given: dict[str, Any], files: tuple[str, ...], hint: str, **entries: type
) -> tuple[Any, dict[str, Any] | None]:
    """Settings of class cls, and the checkpoint that the task needs: last to resume from, best to use, or None.

    A setting is the flag given, else what the checkpoint stores, else the default. files: as for `Run`. hint: what to
    do if there is no best checkpoint. entries: as for `load_checkpoint`. Raises UserError for a flag that
    contradicts the checkpoint, and for a stored value that is not valid.
    """
    settings = cls(**given)
    path = settings.save_dir / files[settings.resume_training]
    if settings.resume_training and settings.overwrite:
        raise UserError("--resume_training continues a run and --overwrite replaces it: leave one of them out")
    if settings.resume_training:
        hint = "there is no run to resume, leave --resume_training out"
        entries |= {"optimizer": dict, "best_score": float, "log": list}
    elif settings.task in ("train", "probe"):
        return settings, None
    checkpoint = load_checkpoint(path, hint, model_dict=dict, settings=dict, data=dict, epoch=int, **entries)
    for field in dataclasses.fields(cls):
        name, fixed, stored = field.name, field.metadata["fixed"], checkpoint["settings"]
        if name not in stored or not field.metadata["stored"]:
            continue
        value = Path(stored[name]) if isinstance(field.default, Path) and type(stored[name]) is str else stored[name]
        if wrong := problem(value, field):
            raise wrong_kind(path, f"its setting {name}: {wrong}")
        if (fixed == "always" or fixed and settings.resume_training) and given.get(name, value) != value:
            made = f"--{name} {given[name]} contradicts {path}, which was made with {name} {value}"
            raise UserError(f"{made}: leave the flag out, or train anew in another --save_dir")
        given = {name: value, **given}
    return cls(**given), checkpoint


def next_command(settings: Any, script: str, *words: str, keep: Iterable[str] = ("data_dir", "save_dir")) -> str:
    """The command to run next, with those settings of `keep` that differ from the defaults."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in keep and value and value != field.default:  # not the 0 epochs of an untrained network
            words += (f"--{field.name}", str(value))
    return "next: " + shlex.join(["python", script, *words])


# --- the machine


class Machine(NamedTuple):
    """What this process computes on."""

    device: torch.device
    gpus: list[int]
    precision: str
    rank: int
    world_size: int
    compiles: bool = False  # the backbone

    @property
    def dtype(self) -> torch.dtype:
        """In which networks compute."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def loading(self, batch_size: int, num_workers: int) -> dict[str, Any]:
        """Loader keywords of this process. Raises UserError if the batch cannot be divided evenly."""
        if batch_size % self.world_size:
            raise UserError(f"--batch_size {batch_size} is not a multiple of the {self.world_size} processes")
        shard = {"rank": self.rank, "world_size": self.world_size, "batch_size": batch_size // self.world_size}
        return {**shard, "num_workers": num_workers, "pin_memory": self.device.type == "cuda"}

    def of_first(self, value: Any) -> Any:
        """What the first process has, so that all processes do the same."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values)
        return values[0]

    def checking(self, settings: SharedSettings) -> dict[str, Any]:
        """Keywords for `dataset.check_images`. What that finds is remembered in the folder of the run."""
        how = {"num_workers": settings.num_workers, "skip_bad": settings.skip_bad_images}
        return {"machine": self, **how, "memory": settings.save_dir / "checked_images.tar"}

    def print(self, text: str) -> None:
        """Print in the first process only. Raises OutputClosed if the reader of the output has gone."""
        if self.rank == 0:
            try:
                tqdm.write(text)  # above a bar, if there is one
                sys.stdout.flush()
            except BrokenPipeError as error:
                raise OutputClosed from error


def keep_freed_memory() -> None:
    """Let new tensors reuse the memory of freed ones, as on a GPU.

    By default glibc returns every large block to the system, which must clear fresh pages for the next activation.
    The numbers of the two options are those of malloc.h.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: do not serve large blocks by mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory


def choose_gpus(wanted: str, n_gpus: int, local_rank: int | None) -> list[int]:
    """The GPUs of this process: those wanted, else all; under torchrun the one of its local rank. Raises UserError."""
    gpus = [int(number) for number in wanted.split(",")] if wanted else list(range(n_gpus))
    missing = [gpu for gpu in gpus if gpu >= n_gpus]
    if missing or not gpus:
        raise UserError(f"GPU {missing[0] if missing else 0} not found: this machine has {n_gpus} visible GPUs")
    if local_rank is not None and local_rank >= len(gpus):
        raise UserError(f"torchrun started more processes on this machine than the {len(gpus)} GPUs to use")
    return gpus if local_rank is None else [gpus[local_rank]]


def refuse_to_compile(gpus: list[int]) -> None:
    """Raise UserError where this process cannot compile a network."""
    if len(gpus) > 1:
        command = shlex.join(["torchrun", f"--nproc_per_node={len(gpus)}", *sys.argv])
        raise UserError(f"--compile takes one GPU per process: choose it with --gpus, or start `{command}`")
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)  # which PyTorch calls
    if not gpus and not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, and {compiler} was not found: install it, or do without")


def set_up_machine(device: str, gpus: str, precision: str, compiles: bool = False) -> Machine:
    """Choose device and precision, and join the other processes if torchrun started this one.

    Raises UserError for a device or a GPU that this machine does not have, and if it cannot compile but should.
    """
    local_rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None  # set by torchrun
    if device == "cpu" and gpus:
        raise UserError("--gpus with --device cpu: leave one of them out")
    if device == "cuda" or (device == "auto" and (gpus or torch.cuda.is_available())):
        chosen = choose_gpus(gpus, torch.cuda.device_count(), local_rank)
        place = torch.device("cuda", chosen[0])
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True  # shapes hardly change, so that the search for fast kernels pays
        torch.set_float32_matmul_precision("high")  # TF32, as in convolutions by default: faster, and exact enough
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        chosen, place, has_bf16 = [], torch.device("cpu"), torch.cpu._is_avx512_bf16_supported()
        keep_freed_memory()
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    if compiles:
        refuse_to_compile(chosen)
    if local_rank is None:
        return Machine(place, chosen, precision, rank=0, world_size=1, compiles=compiles)
    dist.init_process_group("nccl" if chosen else "gloo")
    return Machine(place, chosen, precision, dist.get_rank(), dist.get_world_size(), compiles)


class MixedPrecision(nn.Module):
    """A network under autocast.

    The context belongs inside `forward`: DataParallel calls that in threads of its own, which learn from a context
    entered outside that autocast is enabled, but not that its type is bfloat16.
    """

    def __init__(self, net: nn.Module, machine: Machine) -> None:
        super().__init__()
        self.net = net
        self.device_type, self.enabled = machine.device.type, machine.precision == "bf16"

    def forward(self, *inputs: Any) -> Any:
        """What the network computes."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled):
            return self.net(*inputs)


def wrap(model: nn.Module, machine: Machine) -> nn.Module:
    """The model in the machine's precision, over several processes or GPUs if it has them."""
    net = MixedPrecision(model, machine)
    if dist.is_initialized():
        # A static graph permits parameters without a gradient, such as attention that no glimpse uses.
        return nn.parallel.DistributedDataParallel(net, device_ids=machine.gpus or None, static_graph=True)
    return nn.DataParallel(net, machine.gpus) if len(machine.gpus) > 1 else net


def make_optimizer(*groups: Iterable[nn.Parameter]) -> Optimizer:
    """Adam as in 2018, in one kernel for all parameters. The caller sets the learning rate of each group."""
    return torch.optim.Adam([{"params": parameters} for parameters in groups], betas=(0.5, 0.999), fused=True)


def learning_rate(lr: float, schedule: str, epoch: int, epochs: int) -> float:
    """The rate of an epoch (from 0): always lr, or falling from lr to nearly 0 along half a cosine."""
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 if schedule == "cosine" else lr


def warn_of_new_schedule(settings: SharedSettings, last: dict[str, Any], machine: Machine) -> None:
    """Say how the learning rate changes if a run is resumed with another number of epochs or another schedule."""
    before, epoch = {**vars(settings), **last["settings"]}, last["epoch"]
    changed = (settings.lr_schedule, settings.epochs) != (before["lr_schedule"], before["epochs"])
    if changed and "cosine" in (settings.lr_schedule, before["lr_schedule"]) and epoch + 1 < settings.epochs:
        was = learning_rate(before["lr"], before["lr_schedule"], epoch, before["epochs"])
        now = learning_rate(settings.lr, settings.lr_schedule, epoch + 1, settings.epochs)
        schedule = f"{settings.lr_schedule} schedule over {settings.epochs} epochs, not {before['epochs']}"
        machine.print(f"note: {schedule}: the learning rate goes from {was:.2g} to {now:.2g}")


def for_evaluation(net: nn.Module) -> nn.Module:
    """The wrapped model in eval mode, equal in all processes, whose `forward` waits for no other process.

    Processes may have different numbers of batches and, after a training step, different BatchNorm statistics.
    """
    if isinstance(net, nn.parallel.DistributedDataParallel):
        net = net.module
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)
    return net.eval()


# --- meters and predictions


class Meter:
    """Progress of one pass over a loader, counting the images of all processes, and running means over the images.

    A terminal shows a bar; elsewhere a line a minute is printed. optimizer: of a pass that trains.
    """

    def __init__(self, title: str, loader: DataLoader, machine: Machine, optimizer: Optimizer | None = None) -> None:
        self.title, self.machine, self.optimizer, self.n_batches = title, machine, optimizer, len(loader)
        self.sums: dict[str, float] = {}
        self.n_images = self.n_steps = 0
        total = min(len(loader.dataset), len(loader) * loader.batch_size * machine.world_size)
        hidden = True if machine.rank else None  # None: where standard error is not a terminal
        self.bar = tqdm(total=total, desc=title, unit=" images", leave=False, disable=hidden)
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, n_images: int, **means: Tensor) -> None:
        """Add a batch, given its size and means over it. Raises UserError if one of these is not finite."""
        self.n_images += n_images
        self.n_steps += 1
        values = torch.stack([mean.detach() for mean in means.values()]).tolist() if means else []
        if not all(map(math.isfinite, values)):
            rates = " and ".join(dict.fromkeys(f"{group['lr']:.3g}" for group in self.optimizer.param_groups))
            where = f"{self.title}, step {self.n_steps}: the loss is not finite at learning rate {rates}"
            raise UserError(f"{where}: lower it; what earlier epochs saved is intact")
        for name, value in zip(means, values):
            self.sums[name] = self.sums.get(name, 0.0) + value * n_images
        loss = f"loss {self.sums['loss'] / self.n_images:.3f}" if means else ""
        self.bar.set_postfix_str(loss, refresh=False)
        self.bar.update(n_images * self.machine.world_size)
        if self.bar.disable and time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            seconds = self.last_line - self.start
            rate = f"{self.n_images * self.machine.world_size / seconds:.1f} images/s"
            left = tqdm.format_interval((self.n_batches - self.n_steps) * seconds / self.n_steps)
            parts = [f"step {self.n_steps} of {self.n_batches}", loss, rate, f"{left} left"]
            self.machine.print(f"{self.title}: {', '.join(filter(None, parts))}")

    def means(self) -> dict[str, float]:
        """The means over the images of all processes."""
        totals = torch.tensor([*self.sums.values(), self.n_images], dtype=torch.float64, device=self.machine.device)
        if dist.is_initialized():
            dist.all_reduce(totals)
        *sums, n_images = totals.tolist()
        return {name: total / n_images for name, total in zip(self.sums, sums)}


@torch.no_grad()
def collect(
    predict: Callable[[Tensor, Tensor], tuple[Tensor, ...]], loader: DataLoader, machine: Machine, title: str
) -> list[Tensor]:
    """Predictions for all images of a list, on the CPU and in its order, whatever the number of processes.

    predict: canvases uint8 [B, 3, S, S] on the device and their indices in the list [B] -> tensors [B, ...].
    Raises UserError unless each image was predicted exactly once, in finite numbers.
    """
    batches = []
    with Meter(title, loader, machine) as meter:
        for canvas, _, index in loader:
            batches.append((index, *predict(canvas.to(machine.device, non_blocking=True), index)))
            meter.update(len(index))
    shard = [torch.cat(parts).cpu() for parts in zip(*batches)]
    if dist.is_initialized():
        shards: list[Any] = [None] * machine.world_size
        dist.all_gather_object(shards, shard)
        shard = [torch.cat(parts) for parts in zip(*shards)]
    index, *values = shard
    if index.sort().values.tolist() != list(range(len(loader.dataset))):
        twice = len(index) - len(index.unique())
        raise UserError(f"{title}: {len(index)} predictions for {len(loader.dataset)} images, {twice} of them repeated")
    if not all(value.isfinite().all() for value in values):
        raise UserError(f"{title}: the network's predictions are not finite: lower --lr; earlier files are intact")
    return [value[index.argsort()] for value in values]


# --- files


def prepare_folder(path: Path) -> None:
    """Make a folder to write to. Raises UserError at once, rather than after an epoch, where that is impossible."""
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    if not os.path.isdir(path) or not os.access(path, os.W_OK):
        raise UserError(f"cannot write to the folder {path}: choose another")


@contextlib.contextmanager
def replacing(path: Path, **how: Any) -> Iterator[IO[Any]]:
    """Open a temporary file, flush it to the disk and rename it, so that `path` is always complete, old or new.

    Raises UserError if the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); earlier files are intact") from error
    finally:
        with contextlib.suppress(OSError):  # such as a name that is too long, which is already reported
            temporary.unlink(missing_ok=True)


def write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, completely or not at all; floats are written with four decimals."""
    cells = ([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    # A file name that is not text in the system's encoding is written as it is.
    with replacing(path, mode="w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header, *cells])


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, completely or not at all."""
    with replacing(path, mode="wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of a full disk, while PyTorch was closing the file
                raise error.__context__ from error
            raise


def wrong_kind(path: Path, reason: str) -> UserError:
    """The error for a checkpoint that lacks what it should hold."""
    return UserError(f"{path} is not a checkpoint of the expected kind: {reason}")


def load_checkpoint(path: Path, hint: str, **entries: type) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises UserError if it is missing, broken or of another kind.

    hint: what to do if there is none. entries: those that it must have, with their types.
    """
    if not os.path.isfile(path):  # unlike Path's own, False for a name that is too long
        raise UserError(f"checkpoint {path} not found: {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch raises many types on a broken file
        reason = "it is truncated or not a checkpoint of PyTorch weights"
        if "Unsupported global" in str(error):
            reason = "it holds Python objects, such as a whole model: save its state_dict() instead"
        raise UserError(f"{path} cannot be read: {reason}") from error
    for name, kind in entries.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise wrong_kind(path, f"it has no entry {name} of type {kind.__name__}")
    names = content["data"].get("class_names") if "data" in entries else ["not asked for"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise wrong_kind(path, "it names no classes")
    return content


def load_state(load: Callable[[dict[str, Any]], Any], state: dict[str, Any], path: Path | str) -> None:
    """Call load(state), and turn PyTorch's long list of mismatches into one line. Raises UserError."""
    try:
        load(state)
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError) as error:
        mismatches = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(f"the state in {path} does not fit this network: {mismatches[0][:160]}") from error


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict on the CPU, so that its file opens on any machine."""
    return {key: value.cpu() for key, value in module.state_dict().items()}


def refuse_other_classes(checkpoint: dict[str, Any], class_names: list[str], data_dir: Path, path: Path) -> None:
    """Raise UserError if a network is to be tested on other classes than it was trained on."""
    if class_names != checkpoint["data"]["class_names"]:
        raise UserError(f"{data_dir} has other classes than those that {path} was trained on")


def numbers_of(data: Any, key: str, part: str) -> Tensor:
    """The "fingerprints" or "labels", int64 [N], of the "training" or "validation" images in a checkpoint's data."""
    stored = data.get(key) if isinstance(data, dict) else None
    value = stored.get(part) if isinstance(stored, dict) else None
    valid = isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1
    return value if valid else torch.empty(0, dtype=torch.int64)


def refuse_other_data(stored: dict[str, Any], data: dict[str, Any], path: Path) -> None:
    """Raise UserError if training would go on with other classes, other images or another split.

    Images may be missing if as many were left out, because they can no longer be read.
    """
    if data["class_names"] != stored["class_names"]:
        raise UserError(f"{path} was trained on other classes: see --data_dir")
    for part in ("training", "validation"):
        then, now = (
            set(zip(*(numbers_of(some, key, part).tolist() for key in ("fingerprints", "labels"))))
            for some in (stored, data)
        )
        if now - then or len(then - now) > data["left_out"]:
            words = f"{len(now - then)} {part} images are new and {len(then - now)} of {len(then)} are missing"
            raise UserError(f"{path} was trained on other images: {words}: see --data_dir and --valid_size")


def multiply_adds(function: Callable[[], Any]) -> int:
    """Multiplications, each with an addition, of a call, as PyTorch counts them; on "meta", without computing."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def interval(accuracy: float, n_images: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy on n images (Wilson 1927)."""
    z = 1.96
    center = (accuracy + z**2 / (2 * n_images)) / (1 + z**2 / n_images)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / n_images + z**2 / (4 * n_images**2)) / (1 + z**2 / n_images)
    return center - spread, center + spread


def plain(settings: SharedSettings, which: Callable[[dataclasses.Field], bool]) -> dict[str, Any]:
    """Some of the settings, in types that JSON and checkpoints have."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if which(field)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def made_by(machine: Machine) -> dict[str, str]:
    """Versions and machine, to store with what they made."""
    versions = {"torch": str(torch.__version__), "torchvision": torchvision.__version__, "git": git_revision()}
    return {**versions, "device": machine.device.type, "precision": machine.precision}


def write_results(
    path: Path,
    settings: SharedSettings,
    machine: Machine,
    n_images: int,
    figures: dict[str, dict[str, dict[str, float]]],
    cost: dict[str, int],
    **origin: Any,
) -> None:
    """Write the figures of a test as JSON, with all that they depend on.

    figures: by subject and estimate; an accuracy is followed by its 95 % interval. cost: multiply-adds per image, by
    estimate. origin: of the network.
    """
    content: dict[str, Any] = {"images": n_images, "multiply_adds": cost, "figures": {}, **origin}
    for subject, of_subject in figures.items():
        content["figures"][subject] = {
            estimate: values | ({"interval": interval(values["accuracy"], n_images)} if "accuracy" in values else {})
            for estimate, values in of_subject.items()
        }
    content["settings"] = plain(settings, lambda f: f.metadata["stored"] or settings.task in f.metadata["tasks"])
    with replacing(path, mode="w", encoding="utf-8") as file:
        json.dump({**content, "made_by": made_by(machine)}, file, indent=1)


def git_revision() -> str:
    """The commit of this code, empty where it is not in a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def open_tensorboard(folder: Path, epoch: int) -> Any:
    """A writer for TensorBoard from this epoch (from 0) on. Raises UserError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is missing: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=epoch + 1)


def count(n: int, noun: str) -> str:
    """A number of things in words: 1 process, 2 processes."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def describe_classes(names: list[str]) -> str:
    """How many classes there are, and the names of some."""
    some = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
    return f"{count(len(names), 'class')}: {', '.join(some)}"


class Run:
    """A training run and its files under --save_dir: the best checkpoint, the last one to resume from, the log.

    files: their names, in this order. score: what the best epoch has the lowest of, in words. last: the last checkpoint
    if the run is resumed, else None. Raises UserError, before anything is written, if an earlier run would be lost.
    """

    def __init__(self, settings: Any, machine: Machine, files: tuple[str, ...], score: str, last: dict | None) -> None:
        self.settings, self.machine, self.score, self.last = settings, machine, score, last
        self.best_path, self.last_path, self.log_path = self.paths = [settings.save_dir / name for name in files]
        present = [path.name for path in self.paths if os.path.exists(path)]
        if present and not last and not settings.overwrite:
            resume = "continue it with --resume_training=True, " if files[1] in present else ""
            found = f"{settings.save_dir} holds an earlier run ({', '.join(present)})"
            raise UserError(f"{found}: {resume}replace it with --overwrite, or choose another --save_dir")
        self.best_score, self.rows = (last["best_score"], last["log"]) if last else (math.inf, [])
        if not all(
            isinstance(row, dict) and all(isinstance(x, int | float) for x in row.values()) for row in self.rows
        ):
            raise wrong_kind(self.last_path, "its log has entries that are not numbers")
        self.board: Any = None  # TensorBoard's writer

    def describe_origin(self, **origin: dict[str, Any]) -> None:
        """Store in the checkpoints, beside states, settings and versions, what the run was made of, with its `data`.

        Raises UserError if the run is resumed on other data.
        """
        if self.last:
            refuse_other_data(self.last["data"], origin["data"], self.last_path)
        settings = plain(self.settings, lambda field: field.metadata["stored"])
        self.stored = {"settings": settings, "made_by": made_by(self.machine), **origin}

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put the state after the last epoch back, if the run is resumed. Raises UserError if it does not fit."""
        if self.last:
            load_state(model.load_state_dict, self.last["model_dict"], self.last_path)
            load_state(optimizer.load_state_dict, self.last["optimizer"], self.last_path)

    @contextlib.contextmanager
    def training(self, model: nn.Module, split_rule: str, best: dict[str, nn.Module]) -> Iterator[range]:
        """Describe the run, yield the epochs (from 0) to train, and at the end say what is saved, also when stopped.

        best: modules whose states the best checkpoint holds, by the names of its entries.
        """
        first, n_epochs, rows = self.last["epoch"] + 1 if self.last else 0, self.settings.epochs, self.rows
        self.best = best
        prepare_folder(self.settings.save_dir)
        if self.settings.tensorboard and self.machine.rank == 0:
            self.board = open_tensorboard(self.settings.save_dir / "tensorboard" / self.log_path.stem, first)
        try:
            self.machine.print(self.describe(model, split_rule))
            if self.last and first >= n_epochs:
                self.machine.print(f"{count(first, 'epoch')} of {n_epochs} done: to go on, raise --epochs")
            if not self.last and n_epochs == 0:
                self.save_best(-1, {})
            yield range(first, n_epochs)
        except KeyboardInterrupt as stop:
            if not self.last and self.rows is rows:
                raise Stopped("no epoch was finished, there is nothing to resume") from stop
            where = f"every finished epoch is saved in {self.last_path}"
            raise Stopped(f"{where}: go on with --resume_training=True") from stop
        found = f"lowest validation {self.score}, {self.best_score:.4f}" if self.rows else "untrained network"
        self.machine.print(f"{found}: {self.best_path}")

    def describe(self, model: nn.Module, split_rule: str) -> str:
        """Data, network, settings, machine and files of the run, for a terminal of 80 columns."""
        data, machine = self.stored["data"], self.machine
        flags = [f.name for f in dataclasses.fields(self.settings) if "train" in (f.metadata["tasks"] or ["train"])]
        sizes = [count(data[name], name[:-1].replace("_", " ")) for name in ("training_images", "validation_images")]
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        where = f"GPUs {machine.gpus}" if machine.gpus else f"CPU, {count(torch.get_num_threads(), 'thread')}"
        files = [f"{path} ({use})" for path, use in zip(self.paths, ("best", "to resume from", "metrics"))]
        lines = {
            "data": f"{' and '.join(sizes)} of {describe_classes(data['class_names'])}",
            "split": split_rule,
            "model": f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained",
            "flags": " ".join(f"{name}={getattr(self.settings, name)}" for name in flags),
            "on": f"{where}, {count(machine.world_size, 'process')}, {machine.precision}",
            "files": ", ".join(files) + (f"; tensorboard --logdir {self.board.log_dir}" if self.board else ""),
        }
        wrap = {"width": 79, "subsequent_indent": " " * 7, "break_long_words": False, "break_on_hyphens": False}
        return "\n".join(textwrap.fill(f"{name:7}{text}", **wrap) for name, text in lines.items())

    def save_best(self, epoch: int, metrics: dict[str, float]) -> None:
        """Write the best checkpoint, of this epoch (from 0; -1: untrained). The first of a run ends an earlier run."""
        if self.machine.rank == 0:
            if not self.last and not self.rows:
                self.last_path.unlink(missing_ok=True)
                self.log_path.unlink(missing_ok=True)
            states = {name: cpu_state(module) for name, module in self.best.items()}
            save_checkpoint(self.best_path, {**states, "epoch": epoch, "metrics": metrics, **self.stored})

    def save(
        self, epoch: int, score: float, model: nn.Module, optimizer: Optimizer, **metrics: float | dict[str, float]
    ) -> bool:
        """Write an epoch (from 0) to all three files. Returns whether it is the best so far: of equal ones, the last.

        The last checkpoint is written last: a run that is stopped before that repeats the epoch when resumed.
        """
        is_best, self.best_score = score <= self.best_score, min(score, self.best_score)
        row = {}
        for part, value in metrics.items():
            row |= {f"{part}_{name}": one for name, one in value.items()} if isinstance(value, dict) else {part: value}
        rows = [*self.rows, {"epoch": epoch + 1, **row}]
        if self.machine.rank == 0:
            if is_best:
                self.save_best(epoch, row)
            cells = ([f"{old.get(name, math.nan):.6g}" for name in rows[-1]] for old in rows)
            write_table(self.log_path, rows[-1], cells)
            if self.board:
                for name, value in row.items():
                    self.board.add_scalar("/".join(reversed(name.split("_", 1))), value, epoch + 1)
                self.board.flush()
            state = {"model_dict": cpu_state(model), "optimizer": optimizer.state_dict()}
            progress = {"epoch": epoch, "best_score": self.best_score, "log": rows}
            save_checkpoint(self.last_path, {**state, **progress, **self.stored})
        self.rows = rows
        return is_best
