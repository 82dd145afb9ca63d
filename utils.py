"""What both scripts share: flags, errors, devices and processes, checkpoints, meters and logs."""

import argparse
import contextlib
import csv
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """The user can mend this; the message is one line that names the flag, file or value and says what to do."""


def run(main: Callable[[], None], *user_errors: type[Exception]) -> None:
    """Run a script; a user's mistake (UserError, or one of user_errors) ends it with one line and exit code 1."""
    try:
        main()
    except (UserError, *user_errors) as error:
        # A loader's worker sends the message wrapped into its traceback; the message is the end of the last line.
        last_line = str(error).strip().splitlines()[-1]
        sys.exit("error: " + last_line.rpartition(f"{type(error).__name__}: ")[2])
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: lower --batch_size")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- flags


def boolean(text: str) -> bool:
    """Flag type: true or false, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def number(kind: type, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf) -> Callable:
    """Flag type: an int or a float within bounds."""
    bounds = {f"at least {least}": least, f"above {above}": above, f"below {below}": below}
    wanted = " and ".join(text for text, bound in bounds.items() if math.isfinite(bound))

    def convert(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value < below and above < value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number {wanted}")

    return convert


def gpu_list(text: str) -> list[int]:
    """Flag type: GPU numbers such as 0,1."""
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different GPU numbers such as 0,1")
    return [int(number) for number in numbers]


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of both scripts, with one set of defaults."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("--data_dir", type=Path, default=Path("data/Original"), help="folder with Images/ and lists/")
    add("--save_dir", type=Path, default=Path("data/saved_models"), help="folder for checkpoints and logs")
    add(
        "--valid_size",
        type=number(float, above=0, below=1),
        default=0.1,
        help="part of the training list held out for validation",
    )
    add("--batch_size", type=number(int, least=1), default=128, help="pictures per step, over all GPUs and processes")
    add("--epochs", type=number(int, least=1), default=101)
    add("--lr", type=number(float, above=0), default=1e-4, help="Adam's learning rate")
    add(
        "--num_workers",
        type=number(int, least=0),
        default=min(n_cores, 8),
        help="loader processes (default from the machine)",
    )
    add("--seed", type=number(int, least=0), default=0, help="of the split, the weights, the augmentation and the gaze")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPUs, if there are any")
    add("--gpus", type=gpu_list, metavar="0,1,...", help="GPUs to use (default: all visible)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it")
    add(
        "--resume_training", type=boolean, nargs="?", const=True, default=False, help="go on after the last epoch saved"
    )


def settle_flags(given: dict[str, Any], stored: dict[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """Values of flags that a checkpoint may fix: the stored value, else the one given, else the default.

    A flag that was not given is None. Raises UserError if one was given and contradicts what is stored.
    """
    values = {}
    for name, default in defaults.items():
        if stored and given[name] not in (None, stored[name]):
            raise UserError(
                f"--{name} {given[name]} contradicts the checkpoint, which was made with {name} {stored[name]}: "
                "leave the flag out, or train anew"
            )
        values[name] = stored[name] if stored else default if given[name] is None else given[name]
    return values


# --- devices and processes


class Machine(NamedTuple):
    """What this process computes on."""

    device: torch.device
    gpus: list[int]
    precision: str
    rank: int
    world_size: int

    def autocast(self) -> torch.autocast:
        """The one mixed-precision context, switched off for fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def own(self, n_items: int) -> range:
        """The items of a list that are this process's to evaluate: dealt out in turn, each to one process."""
        return range(self.rank, n_items, self.world_size)

    def share(self, batch_size: int) -> int:
        """Size of this process's part of a batch. Raises UserError if the batch cannot be divided evenly."""
        if batch_size % self.world_size:
            raise UserError(f"--batch_size {batch_size} is not a multiple of the {self.world_size} processes")
        return batch_size // self.world_size

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.rank == 0:
            print(text, flush=True)


def set_up_machine(device: str, gpus: list[int] | None, precision: str) -> Machine:
    """Choose device and precision, and join the other processes if torchrun started this one.

    Raises UserError for a device or a GPU that this machine does not have.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if n_gpus or gpus else "cpu"
    if device == "cpu" and gpus:
        raise UserError("--gpus with --device cpu: leave one of them out")
    if device == "cpu":
        gpus, place = [], torch.device("cpu")
    else:
        gpus = list(range(n_gpus)) if gpus is None else gpus
        unknown = [gpu for gpu in gpus if gpu >= n_gpus]
        if unknown or not gpus:
            raise UserError(f"GPU {unknown[0] if unknown else 0} not found: this machine has {n_gpus} visible GPUs")
        if world_size > 1:
            if local_rank >= len(gpus):
                raise UserError(f"torchrun started more processes on this machine than the {len(gpus)} GPUs to use")
            gpus = [gpus[local_rank]]
        place = torch.device("cuda", gpus[0])
        torch.cuda.set_device(place)
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(False) if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    if world_size > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Machine(place, gpus, precision, rank, world_size)


def wrap(model: nn.Module, machine: Machine) -> nn.Module:
    """The model over several processes (DistributedDataParallel), over several GPUs (DataParallel), or as it is."""
    if machine.world_size > 1:
        # A static graph lets parameters without a gradient be, such as attention that no glimpse uses.
        return nn.parallel.DistributedDataParallel(model, device_ids=machine.gpus or None, static_graph=True)
    return nn.DataParallel(model, machine.gpus) if len(machine.gpus) > 1 else model


def unsynchronized(net: nn.Module) -> nn.Module:
    """For evaluation: processes may have different numbers of batches, so none may wait for another in `forward`."""
    return net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net


def gather(part: Tensor, machine: Machine) -> Tensor:
    """Put together what each process has of a list dealt out in turn: rank r holds the items r, r + world_size, ..."""
    if machine.world_size == 1:
        return part
    parts: list[Any] = [None] * machine.world_size
    dist.all_gather_object(parts, part)
    whole = part.new_empty(sum(map(len, parts)), *part.shape[1:])
    for rank, some in enumerate(parts):
        whole[rank :: machine.world_size] = some
    return whole


# --- checkpoints


def prepare_folder(path: Path) -> None:
    """Make a folder to write to. Raises UserError at once, rather than after an epoch, where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): choose another") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to the folder {path}: choose another")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file, flush it to the disk and rename it: `path` is always whole, the old one or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); earlier files are intact") from error


def load_checkpoint(path: Path, required: Iterable[str], hint: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises UserError if it is missing (with the hint), broken or of another kind."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} not found: {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a broken file
        raise UserError(f"{path} cannot be read: it is truncated or no checkpoint of PyTorch weights") from error
    missing = [key for key in required if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} is not a checkpoint of the expected kind: it has no entry {', '.join(missing)}")
    return content


def load_weights(load: Callable[[dict[str, Tensor]], Any], state: dict[str, Tensor], path: Path | str) -> None:
    """Call load(state), and turn PyTorch's long list of misfits into one line. Raises UserError."""
    try:
        load(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        misfits = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(f"the weights in {path} do not fit this network: {misfits[0][:160]}") from error


def restore(
    last: dict[str, Any] | None, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put the state of the last epoch back, if there is one. Returns the next epoch and the best accuracy so far."""
    if last is None:
        return 0, -1.0
    load_weights(model.load_state_dict, last["model_dict"], path)
    optimizer.load_state_dict(last["optimizer"])
    return last["epoch"] + 1, last["best_accuracy"]


def refuse_other_data(checkpoint: dict[str, Any] | None, data: dict[str, Any], path: Path) -> None:
    """Raise UserError if training would go on with other classes, other list sizes or another split."""
    for name, stored in (checkpoint["data"] if checkpoint else {}).items():
        if stored != data.get(name):
            values = "" if name == "class_names" else f" (then {stored}, now {data.get(name)})"
            raise UserError(f"{path} cannot be resumed with other data: {name.replace('_', ' ')} differ{values}")


# --- meters and logs


class Meter:
    """Running means over pictures. Sums stay on the device, so that no training step waits for them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def update(self, n_pictures: int, **means: Tensor) -> None:
        """Add a batch, given its size and the means over it."""
        self.count += n_pictures
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + mean.detach().double() * n_pictures

    def means(self, machine: Machine | None = None) -> dict[str, float]:
        """The means so far, over the pictures of all processes if a machine is given."""
        totals = torch.stack([*self.sums.values(), next(iter(self.sums.values())).new_tensor(self.count)])
        if machine is not None and machine.world_size > 1:
            dist.all_reduce(totals)
        *sums, count = totals.tolist()
        return {name: total / count for name, total in zip(self.sums, sums)}

    def __str__(self) -> str:
        return ", ".join(f"{name} {mean:.3f}" for name, mean in self.means().items())


def progress(title: str, n_pictures: int, machine: Machine) -> tqdm:
    """A bar that counts pictures; silent in a pipe and on all processes but the first."""
    return tqdm(total=n_pictures, desc=title, unit=" pictures", leave=False, disable=True if machine.rank else None)


def log_metrics(path: Path, row: dict[str, Any]) -> None:
    """Write an epoch's row into a CSV, after the rows of earlier epochs and in place of the same and later ones."""
    rows = []
    if path.is_file():
        with open(path, newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows([*rows, row])
    os.replace(temporary, path)


def metrics_row(epoch: int, train: dict[str, float], valid: dict[str, float]) -> dict[str, Any]:
    """One epoch's line of the metrics log, epochs counted from 1."""
    columns = {f"train_{name}": value for name, value in train.items()}
    columns |= {f"valid_{name}": value for name, value in valid.items()}
    return {"epoch": epoch + 1, **{name: f"{value:.6g}" for name, value in columns.items()}}


def describe_run(flags: dict[str, Any], data: dict[str, Any], model: nn.Module, machine: Machine) -> str:
    """What a training run is about to do: its flags, data, model and machine, a line each."""
    n_all = sum(parameter.numel() for parameter in model.parameters())
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sizes = f"{data['training pictures']:,} training and {data['validation pictures']:,} validation pictures"
    where = f"GPUs {machine.gpus}" if machine.gpus else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"flags  {' '.join(f'{name}={value}' for name, value in flags.items())}\n"
        f"data   {len(data['class_names'])} classes, {sizes}\n"
        f"model  {n_all / 1e6:.1f} M parameters, {n_trained / 1e6:.1f} M of them trained\n"
        f"on     {where}, {machine.world_size} process{'es' if machine.world_size > 1 else ''}, {machine.precision}"
    )
