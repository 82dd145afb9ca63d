"""What both scripts share: flags, errors, devices and processes, checkpoints, meters and logs."""

import argparse
import contextlib
import csv
import ctypes
import os
import platform
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

SHOWN_BY_BAR = ("loss", "accuracy", "acc_123")  # of all means, those that fit into a line
STEPS_PER_CHECK = 100  # of the loss being finite, for which the device is waited for
DATA_DIR, SAVE_DIR = Path("data/Original"), Path("data/saved_models")
TRAIN_DEFAULTS = {"batch_size": 128, "epochs": 101, "lr": 1e-4, "seed": 0}  # of flags that a checkpoint remembers


class UserError(Exception):
    """The user can mend this; the message is one line that names the flag, file or value and says what to do."""


class Stopped(KeyboardInterrupt):
    """The user, or the system, ends the run; the message says what is saved."""


def run(main: Callable[[], None], *user_errors: type[Exception]) -> None:
    """Run a script, and end it with one line where it fails for a reason that the user can mend or has given.

    A user's mistake (UserError, or one of user_errors) has exit code 1, Ctrl-C 130 and SIGTERM 143.
    """

    def terminate(number: int, frame: object) -> None:
        nonlocal exit_code
        exit_code = 128 + number
        # Whoever signals the whole group ends the loader's workers too, which PyTorch would report as a crash.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        raise KeyboardInterrupt

    exit_code = 128 + signal.SIGINT
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        if dist.is_initialized():  # after an error the other processes may never come to this
            dist.destroy_process_group()
    except (UserError, *user_errors) as error:
        # A loader's worker sends the message wrapped into its traceback; the message is the end of the last line.
        last_line = str(error).strip().splitlines()[-1]
        sys.exit("error: " + last_line.rpartition(f"{type(error).__name__}: ")[2])
    except BrokenPipeError:  # whoever reads the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it flushes
        sys.exit(128 + signal.SIGPIPE)
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: lower --batch_size")
    except KeyboardInterrupt as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # whoever asks twice waits for the same end
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"stopped{f': {stop}' if isinstance(stop, Stopped) else ''}", file=sys.stderr)
        sys.exit(exit_code)


# --- flags


def boolean(text: str) -> bool:
    """Flag type: true or false, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def gpu_list(text: str) -> list[int]:
    """Flag type: GPU numbers such as 0,1."""
    numbers = [int(number) for number in text.split(",") if number.isdecimal()]
    if len(set(numbers)) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different GPU numbers such as 0,1")
    return numbers


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def switch(help: str) -> dict[str, Any]:
    """Keywords of a flag that is false unless given: `--flag`, `--flag=True` and `--flag true` all turn it on."""
    return {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "True", "help": help}


def add_shared_flags(parser: argparse.ArgumentParser) -> tuple[Any, Any]:
    """The flags of both scripts, with one set of defaults. Those that a checkpoint may fix are None if not given.

    Returns the groups of --help for files and for training, to which a script adds its own.
    """
    n_workers = max(1, min(available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8))
    files = parser.add_argument_group("data and files")
    add = files.add_argument
    add("--data_dir", type=Path, default=DATA_DIR, help="folder of pictures, see the README (%(default)s)")
    add("--save_dir", type=Path, default=SAVE_DIR, help="folder for checkpoints and logs (%(default)s)")
    add("--valid_size", type=float, default=0.1, help="part of the training pictures to validate on (%(default)s)")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--epochs", type=int, help="epochs in all, those resumed included (101)")
    add("--batch_size", type=int, help="pictures per step, over all GPUs and processes (128)")
    add("--lr", type=float, help="Adam's learning rate (1e-4)")
    add("--seed", type=int, help="of weights, augmentation and gaze (0)")
    add("--resume_training", **switch("go on after the last epoch saved"))
    add("--tensorboard", **switch("also log for TensorBoard (pip install tensorboard)"))
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPUs, if there are any")
    add("--gpus", type=gpu_list, metavar="0,1,...", help="GPUs to use (all visible ones)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it")
    add("--num_workers", type=int, default=n_workers, help="loader processes (here %(default)s)")
    return files, training


def parse_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None, positive: Iterable[str] = ()
) -> argparse.Namespace:
    """Parse the command line; a number out of its range, such as one of `positive` at 0, is refused by name.

    So is a flag that does nothing for the --task given.
    """
    args = parser.parse_args(argv)
    for name in ("batch_size", "lr", *positive):
        value = vars(args)[name]
        if value is not None and not 0 < value < 2**32:
            parser.error(f"argument --{name}: {value} is not above 0, or far too large")
    for name in ("epochs", "num_workers", "seed"):
        value = vars(args)[name]
        if value is not None and not 0 <= value < 2**32:
            parser.error(f"argument --{name}: {value} is below 0, or far too large")
    if not 0 < args.valid_size < 1:
        parser.error(f"argument --valid_size: {args.valid_size} is not between 0 and 1")
    for name in ("resume_training", "tensorboard"):
        if args.task != "train" and vars(args)[name]:
            parser.error(f"--{name} does not go with --task={args.task}")
    return args


def next_command(args: argparse.Namespace, script: str, *words: str) -> str:
    """What to run next, on the same folders."""
    for name, default in (("data_dir", DATA_DIR), ("save_dir", SAVE_DIR)):
        if vars(args)[name] != default:
            words += (f"--{name}", str(vars(args)[name]))
    return "next: " + shlex.join(["python", script, *words])


def settle_flags(
    given: dict[str, Any], stored: dict[str, Any] | None, defaults: dict[str, Any], free: Iterable[str] = ()
) -> dict[str, Any]:
    """Values of flags that a checkpoint may fix: what is stored, else what is given, else the default.

    A flag that was not given is None. A given one of `free` wins; any other that contradicts what is stored raises
    UserError.
    """
    values = {}
    for name, default in defaults.items():
        stands = stored[name] if stored else default
        if stored and name not in free and given[name] not in (None, stands):
            raise UserError(
                f"--{name} {given[name]} contradicts the checkpoint, which was made with {name} {stands}: "
                "leave the flag out, or train anew"
            )
        values[name] = stands if given[name] is None else given[name]
    return values


# --- devices and processes


class Machine(NamedTuple):
    """What this process computes on."""

    device: torch.device
    gpus: list[int]
    precision: str
    rank: int
    world_size: int

    def loading(self, batch_size: int, num_workers: int) -> dict[str, Any]:
        """How a loader of this process is set up. Raises UserError if the batch cannot be divided evenly."""
        if batch_size % self.world_size:
            raise UserError(f"--batch_size {batch_size} is not a multiple of the {self.world_size} processes")
        share = batch_size // self.world_size
        return {"batch_size": share, "num_workers": num_workers, "pin_memory": self.device.type == "cuda"}

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes."""
        if self.rank == 0:
            print(text, flush=True)


def keep_freed_memory() -> None:
    """Let tensors take the memory that earlier ones left, as a GPU's do.

    By default glibc hands every large block back to the system, which must clear fresh pages for the next activation.
    The numbers of the two options are those of malloc.h.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes from the system by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: none goes back


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
        keep_freed_memory()
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


class MixedPrecision(nn.Module):
    """A network under autocast.

    The context belongs inside `forward`: DataParallel calls that in threads of its own, to which a context entered
    outside passes on that it is enabled, but not that its type is bfloat16.
    """

    def __init__(self, net: nn.Module, machine: Machine) -> None:
        super().__init__()
        self.net = net
        self.device_type, self.enabled = machine.device.type, machine.precision == "bf16"

    def forward(self, *inputs: Any) -> Any:
        """What the network gives for the inputs."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled):
            return self.net(*inputs)


def wrap(model: nn.Module, machine: Machine) -> nn.Module:
    """The model in the machine's precision, over several processes or GPUs if it has them."""
    net = MixedPrecision(model, machine)
    if machine.world_size > 1:
        # A static graph lets parameters without a gradient be, such as attention that no glimpse uses.
        return nn.parallel.DistributedDataParallel(net, device_ids=machine.gpus or None, static_graph=True)
    return nn.DataParallel(net, machine.gpus) if len(machine.gpus) > 1 else net


def make_optimizer(*groups: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Adam as in 2018, in one kernel for all parameters. The learning rate of each group is the caller's to set."""
    return torch.optim.Adam([{"params": parameters} for parameters in groups], betas=(0.5, 0.999), fused=True)


def for_evaluation(net: nn.Module) -> nn.Module:
    """The wrapped model in eval mode, the same in all processes, and none waits for another in `forward`.

    Processes may have different numbers of batches, and after a training step BatchNorm statistics of their own.
    """
    if isinstance(net, nn.parallel.DistributedDataParallel):
        net = net.module
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)
    return net.eval()


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
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    if not os.path.isdir(path) or not os.access(path, os.W_OK):
        raise UserError(f"cannot write to the folder {path}: choose another")


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict on the CPU, so that its file opens on any machine, whatever opens it."""
    return {key: value.cpu() for key, value in module.state_dict().items()}


@contextlib.contextmanager
def replacing(path: Path, **how: Any) -> Iterator[IO[Any]]:
    """Open a temporary file, flush it to the disk and rename it: `path` is always whole, the old one or the new.

    Raises UserError where that is impossible.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); earlier files are intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all."""
    with replacing(path, mode="wb") as file:
        torch.save(content, file)


def load_checkpoint(
    path: Path, required: dict[str, Any], hint: str, optional: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises UserError if it is missing (with the hint), broken or of another kind.

    required: the entries that it must have, each with a value of the type that the entry has; a number that is
    positive here is positive there. optional: what the entries that it may lack are then.
    """
    if not os.path.isfile(path):  # unlike Path's own, False for a name that is too long
        raise UserError(f"checkpoint {path} not found: {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch raises many types on a broken file
        raise UserError(f"{path} cannot be read: it is truncated or no checkpoint of PyTorch weights") from error
    missing = [key for key in required if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} is not a checkpoint of the expected kind: it has no entry {', '.join(missing)}")
    content = {**(optional or {}), **content}
    for key, example in {**required, **(optional or {})}.items():
        value = content[key]
        if not isinstance(value, type(example)) or (
            isinstance(value, int | float) and example > 0 and not 0 < value < 2**32
        ):
            raise UserError(f"{path} is not a checkpoint of the expected kind: its entry {key} is {str(value)[:40]!r}")
    return content


def load_last(path: Path, resume: bool, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of the last epoch, with these settings in it, or None if a run is not to be resumed."""
    required = {"model_dict": {}, "optimizer": {}, "epoch": 0, "best_score": 0.0, "data": {}, **settings}
    return load_checkpoint(path, required, "there is no run to resume, leave --resume_training out") if resume else None


@contextlib.contextmanager
def stoppable(last_path: Path, resumed: bool) -> Iterator[None]:
    """Training within may be stopped at any time: Stopped then says what is saved, and how to go on."""

    def written() -> int:
        return last_path.stat().st_mtime_ns if last_path.exists() else 0

    before = written()
    try:
        yield
    except KeyboardInterrupt as stop:
        if resumed or written() != before:
            raise Stopped(f"every finished epoch is saved in {last_path}: go on with --resume_training=True") from stop
        raise Stopped("no epoch was finished, nothing new is saved") from stop


def load_state(load: Callable[[dict[str, Any]], Any], state: dict[str, Any], path: Path | str) -> None:
    """Call load(state), and turn PyTorch's long list of misfits into one line. Raises UserError."""
    try:
        load(state)
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError) as error:
        misfits = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(f"the state in {path} does not fit this network: {misfits[0][:160]}") from error


def restore(
    last: dict[str, Any] | None, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put the state of the last epoch back, if there is one. Returns the next epoch and the best score so far."""
    if last is None:
        return 0, -1.0
    load_state(model.load_state_dict, last["model_dict"], path)
    load_state(optimizer.load_state_dict, last["optimizer"], path)
    return last["epoch"] + 1, last["best_score"]


def epochs_left(first: int, epochs: int, machine: Machine) -> range:
    """The epochs (from 0) that are still to be trained, of `epochs` in all; where none is, it says so."""
    if first >= epochs:
        machine.say(f"{count(first, 'epoch')} of {epochs} done: to go on, raise --epochs")
    return range(first, epochs)


def refuse_other_data(stored: dict[str, Any], data: dict[str, Any], path: Path) -> None:
    """Raise UserError if training would go on with other classes, other list sizes or another split."""
    for name, value in data.items():
        if value != stored.get(name):
            values = "" if name == "class_names" else f" (then {stored.get(name)}, now {value}: see --valid_size)"
            raise UserError(f"{path} was trained on other data: {name.replace('_', ' ')} differ{values}")


def class_names_of(checkpoint: dict[str, Any], path: Path) -> list[str]:
    """The names of the classes that a checkpoint tells apart. Raises UserError if there are none in it."""
    names = checkpoint["data"].get("class_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a checkpoint of the expected kind: it names no classes")
    return names


def refuse_other_classes(stored: list[str], class_names: list[str], data_dir: Path, path: Path) -> None:
    """Raise UserError if a network is to be used on pictures of other classes than it was trained on."""
    if class_names != stored:
        raise UserError(f"{data_dir} has other classes than those that {path} was trained on")


# --- meters and logs


class Meter:
    """Running means over the pictures of one pass, and the bar that shows them.

    Sums stay on the device, so that no step waits for them. The bar counts the pictures of all processes; it is silent
    in a pipe and on all processes but the first. With an optimizer the pass is training, and a mean that is not a
    finite number ends it.
    """

    def __init__(
        self, title: str, loader: DataLoader, machine: Machine, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.title, self.machine, self.optimizer = title, machine, optimizer
        self.sums: dict[str, Tensor] = {}
        self.n_pictures = self.n_steps = 0
        self.n_finite: Tensor | int = 0  # steps before the first mean that was not finite
        total = min(len(loader.dataset), len(loader) * loader.batch_size * machine.world_size)
        hidden = True if machine.rank else None  # None: where the output is no terminal
        self.bar = tqdm(total=total, desc=title, unit=" pictures", leave=False, disable=hidden)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, n_pictures: int, **means: Tensor) -> None:
        """Add a batch, given its size and the means over it. Raises UserError as `require_finite`."""
        self.n_pictures += n_pictures
        self.n_steps += 1
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + mean.detach().double() * n_pictures
        if self.optimizer is not None:
            self.n_finite = self.n_finite + torch.stack(list(self.sums.values())).isfinite().all()
        refreshed = self.bar.update(n_pictures * self.machine.world_size)
        if refreshed or self.n_steps % STEPS_PER_CHECK == 0:
            self.require_finite()
        if refreshed and self.sums:
            means = {name: self.sums[name].item() / self.n_pictures for name in SHOWN_BY_BAR if name in self.sums}
            self.bar.set_postfix_str(", ".join(f"{name} {mean:.3f}" for name, mean in means.items()), refresh=False)

    def require_finite(self) -> None:
        """Raise UserError if the loss of a training step was not a finite number, naming the first such step."""
        if self.optimizer is not None and int(self.n_finite) < self.n_steps:
            rates = sorted({f"{group['lr']:.3g}" for group in self.optimizer.param_groups})
            raise UserError(
                f"{self.title}, step {int(self.n_finite) + 1}: the loss is not finite at learning rate "
                f"{' and '.join(rates)}: lower it; what earlier epochs saved is intact"
            )

    def means(self) -> dict[str, float]:
        """The means over the pictures of all processes. Raises UserError as `require_finite`."""
        self.require_finite()
        totals = torch.stack([*self.sums.values(), next(iter(self.sums.values())).new_tensor(self.n_pictures)])
        if self.machine.world_size > 1:
            dist.all_reduce(totals)
        *sums, count = totals.tolist()
        return {name: total / count for name, total in zip(self.sums, sums)}


def check_answers(answers: Tensor, index: Tensor, n_pictures: int, title: str) -> None:
    """Raise UserError unless there is one answer, all of it finite, for each picture of a list, in its order.

    answers: [N, ...]; index: [N], which pictures they are of.
    """
    if index.tolist() != list(range(n_pictures)):
        twice = len(index) - len(index.unique())
        raise UserError(f"{title}: {len(index)} answers for {n_pictures} pictures, {twice} of them given twice")
    if not answers.isfinite().all():
        raise UserError(f"{title}: the network's answers are not finite: lower --lr; earlier files are intact")


def read_log(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics log, none if there is no such file. Raises UserError if it is not one of ours."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if int(row["epoch"]) > 0]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no metrics log of this script: move it away, or give another --save_dir") from error


def open_tensorboard(folder: Path, epoch: int) -> Any:
    """A writer of TensorBoard's files, for the epochs from this one (from 0) on: it hides what others left of them.

    Raises UserError where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard takes a package that is missing: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=epoch + 1)


def log_metrics(path: Path, epoch: int, board: Any = None, **parts: dict[str, float]) -> None:
    """Write an epoch (from 0) into a metrics log, in place of rows of the same and later epochs.

    board: of `open_tensorboard`, where the same figures go too.
    """
    row = {f"{part}_{name}": f"{value:.6g}" for part, values in parts.items() for name, value in values.items()}
    rows = [old for old in read_log(path) if int(old["epoch"]) <= epoch]
    with replacing(path, mode="w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *row], extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, {"epoch": epoch + 1, **row}])
    if board is not None:
        for part, values in parts.items():
            for name, value in values.items():
                board.add_scalar(f"{name}/{part}", value, epoch + 1)
        board.flush()


def write_table(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    with replacing(path, mode="w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def save_picture(path: Path, image: Image.Image) -> None:
    """Write a drawing as a JPEG, whole or not at all, into a folder that is made for it. Raises UserError."""
    prepare_folder(path.parent)
    with replacing(path, mode="wb") as file:
        image.save(file, "JPEG", quality=95, subsampling=0)


def count(n: int, noun: str) -> str:
    """A number of things in words: 1 process, 2 processes."""
    return f"{n:,} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def describe_classes(names: list[str]) -> str:
    """How many classes there are, and what the first and the last are called."""
    some = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
    return f"{count(len(names), 'class')}: {', '.join(some)}"


def describe_run(
    *,
    flags: dict[str, Any],
    data: dict[str, Any],
    origin: str,
    outputs: dict[str, Path],
    model: nn.Module,
    machine: Machine,
    board: Any,
) -> str:
    """What a training run is about to do: its data, network, flags, machine and files, for a terminal of 80 columns."""
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) for frozen in (1, 0))
    sizes = [count(data[part], part.removesuffix("s")) for part in ("training pictures", "validation pictures")]
    where = f"GPUs {machine.gpus}" if machine.gpus else f"CPU, {count(torch.get_num_threads(), 'thread')}"
    files = [f"{path} ({what})" for what, path in outputs.items()]
    lines = {
        "data": f"{' and '.join(sizes)} of {describe_classes(data['class_names'])}",
        "split": origin,
        "model": f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained",
        "flags": " ".join(f"{name}={value}" for name, value in flags.items()),
        "on": f"{where}, {count(machine.world_size, 'process')}, {machine.precision}",
        "files": ", ".join(files) + (f"; watch: tensorboard --logdir {board.log_dir}" if board else ""),
    }
    wrap = {"width": 79, "subsequent_indent": " " * 7, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(f"{name:7}{text}", **wrap) for name, text in lines.items())
