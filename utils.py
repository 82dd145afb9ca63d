"""What both scripts share: errors, flags, the machine, the meter, predictions, and the files of a run."""

import argparse
import contextlib
import csv
import ctypes
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from argparse import Namespace
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

DATA_DIR = Path("data/Original")
SECONDS_PER_LINE = 60  # between lines of progress where no terminal shows a bar


class UserError(Exception):
    """A mistake that the user can fix; the message is one line that names the flag, file or value and what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistake, lack of memory, Ctrl-C (exit code 130) or SIGTERM (143) ends it with one line."""

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        for other in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGCHLD", number)):
            signal.signal(other, lambda *_: None)  # neither Ctrl-C nor the end of a loader's worker disturbs the ending
        raise KeyboardInterrupt

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no text in the system's encoding
    try:
        main()
        if dist.is_initialized():  # not after an error, when other processes may never get here
            dist.destroy_process_group()
    except (UserError, ModuleNotFoundError) as error:
        # An error in a loader's worker arrives inside its traceback; file names may have line breaks.
        message = str(error).partition(f".{type(error).__name__}: ")[2] or str(error)
        sys.exit("error: " + message.strip().replace("\n", " "))
    except (RuntimeError, MemoryError, KeyboardInterrupt) as error:
        if signals:  # which also end the loader's workers: PyTorch may report that as a RuntimeError
            print("stopped: --resume_training=True continues a training from its last saved epoch", file=sys.stderr)
            sys.exit(128 + signals[0])
        if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
            sys.exit(f"error: --compile does not work here ({str(error).strip().splitlines()[0][:160]}): leave it out")
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)  # PyTorch has a type for GPU memory only
        if not known and "can't allocate memory" not in str(error) and "by signal: Killed" not in str(error):
            raise
        sys.exit("error: out of memory: choose a smaller batch, a smaller network or fewer trajectories")


# --- flags
# Those that describe a command, not a run: checkpoints do not store them.
OF_COMMAND = ("task", "save_dir", "imgs_dir", "images", "n_samples", "n_trajectories", "stop_at", "skip_bad_images")
OF_COMMAND += ("resume_training", "overwrite", "tensorboard", "device", "gpus", "compile", "num_workers")
MAY_CHANGE = ("data_dir", "epochs", "batch_size", "lr", "attention_lr", "lr_schedule", "precision")  # when resuming


def number(kind: type, is_valid: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A `type` of argparse: numbers of this kind for which is_valid is true; wanted describes them in words."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError, KeyError):
            if is_valid(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted}")

    return convert


count = number(int, lambda n: 0 <= n < 2**32, "a whole number of at least 0")
positive_count = number(int, lambda n: 0 < n < 2**32, "a whole number of at least 1")
positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
fraction = number(float, lambda x: 0 < x < 1, "a number above 0 and below 1")
fraction_or_one = number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
boolean = number(lambda text: {"true": True, "false": False}[text.lower()], lambda _: True, "True or False")
gpu_list = number(str, lambda t: not t or "-" not in t and len({*map(int, t.split(","))}) > t.count(","), "like 0,2")
SWITCH = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "True"}  # --flag or --flag=True

N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
N_WORKERS = max(1, min(N_CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, but not where %(default)s ends a help text, and the docstring's commands as they are."""


class Parser(argparse.ArgumentParser):
    """Flags of a script. --help ends with the rest of the script's docstring. Mistakes raise UserError."""

    def __init__(self, doc: str) -> None:
        summary, _, rest = doc.partition("\n")
        super().__init__(description=summary, epilog=rest, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all flags)")

    def add_shared_flags(self) -> None:
        """Add the flags of both scripts, in groups."""
        files = self.add_argument_group("data and files").add_argument
        files("--data_dir", type=Path, default=DATA_DIR, help="folder of images")
        files("--save_dir", type=Path, default=Path("data/saved_models"), help="folder for checkpoints and results")
        files("--valid_size", type=fraction, default=0.1, help="fraction of the training images to validate on")
        files("--skip_bad_images", **SWITCH, help="leave out images that cannot be read")
        training = self.add_argument_group("training").add_argument
        training("--epochs", type=count, default=101, help="total epochs, including resumed ones; 0: save untrained")
        training("--batch_size", type=positive_count, default=128, help="batch size over all GPUs and processes")
        training("--lr", type=positive, default=1e-4, help="learning rate of Adam")
        training("--lr_schedule", default="cosine", choices=["constant", "cosine"], help="learning-rate schedule")
        training("--smallest_crop", type=fraction_or_one, default=1.0, help="side of the smallest crop / short side")
        training("--seed", type=count, default=0, help="random seed")
        training("--resume_training", **SWITCH, help="continue after the last finished epoch")
        training("--overwrite", **SWITCH, help="replace an earlier run in --save_dir")
        training("--tensorboard", **SWITCH, help="also log for TensorBoard (pip install tensorboard)")
        machine = self.add_argument_group("machine").add_argument
        machine("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: GPUs if there are any")
        machine("--gpus", type=gpu_list, default="", help="GPUs to use, such as 0,2; all if empty%(default)s")
        machine("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is fast")
        machine("--compile", **SWITCH, help="compile the backbone: faster in bf16; takes a minute")
        machine("--num_workers", type=count, default=N_WORKERS, help="processes that load images")


def parse_flags(parser: Parser, argv: list[str] | None, files: tuple, network: tuple) -> tuple[Namespace, dict | None]:
    """The flags, and the checkpoint that they refer to: the last one to resume from, the best one to use, or None.

    A flag is the one given, else the one stored, else the default. files: names of the best and the last checkpoint.
    network: flags that must agree with what is stored; when training is resumed all must, except `MAY_CHANGE`.
    """
    args = parser.parse_args(argv)
    trains = args.task == "train"
    if trains and not args.resume_training:
        return args, None
    hint = "there is no run to resume: leave --resume_training out" if trains else "train first, or see --save_dir"
    path = args.save_dir / files[1 if trains else 0]
    checkpoint = load_checkpoint(path, hint, "model_dict", "settings", "data", "epoch", "versions")
    parser.set_defaults(**checkpoint["settings"])  # texts, which argparse converts as it does those of the command line
    args, stored = parser.parse_args(argv), parser.parse_args([])
    for name in checkpoint["settings"]:
        given, before = getattr(args, name), getattr(stored, name)
        if given != before and (name not in MAY_CHANGE if trains else name in network):
            raise UserError(f"--{name} {given} contradicts {path}, made with {before}: leave it out, or see --save_dir")
    return args, checkpoint


def name_of_other_data(args: Namespace, checkpoint: dict[str, Any]) -> str:
    """What the names of results end with: empty, or "_" and the folder if it is not the one that was trained on."""
    folder, own = args.data_dir.resolve(), Path(checkpoint["settings"]["data_dir"]).resolve()
    return "" if folder == own else f"_{folder.name}"


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
        """The type that networks compute in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def print(self, text: str) -> None:
        """Print in the first process only."""
        if self.rank == 0:
            tqdm.write(text)  # above a bar, if there is one
            sys.stdout.flush()


def choose_gpus(wanted: str, n_gpus: int, local_rank: int | None) -> list[int]:
    """The GPUs of this process: those wanted, else all; under torchrun the one of its local rank. Raises UserError."""
    gpus = [int(number) for number in wanted.split(",")] if wanted else list(range(n_gpus))
    if max(gpus, default=0) >= n_gpus or (local_rank or 0) >= len(gpus):
        raise UserError(f"--gpus {wanted or 'all'}: {n_gpus} GPUs found, numbered from 0; torchrun needs one each")
    return gpus if local_rank is None else [gpus[local_rank]]


def set_up_machine(args: Namespace) -> Machine:
    """Choose device and precision, and join the other processes if torchrun started this one. Raises UserError."""
    local_rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None  # set by torchrun
    if args.device == "cuda" or (args.device == "auto" and (args.gpus or torch.cuda.is_available())):
        gpus = choose_gpus(args.gpus, torch.cuda.device_count(), local_rank)
        device = torch.device("cuda", gpus[0])
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes hardly change, so that the search for fast kernels pays
        torch.set_float32_matmul_precision("high")  # TF32, as in convolutions by default: faster, and exact enough
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gpus, device, has_bf16 = [], torch.device("cpu"), torch.cpu._is_avx512_bf16_supported()
        # Let new tensors reuse freed memory; glibc returns large blocks to the system, which must clear fresh pages.
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: do not serve large blocks by mmap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory
    if args.compile and len(gpus) > 1:
        raise UserError("--compile takes one GPU per process: choose it with --gpus, or start one process for each")
    precision = args.precision if args.precision != "auto" else "bf16" if has_bf16 else "fp32"
    if local_rank is None:
        return Machine(device, gpus, precision, rank=0, world_size=1, compiles=args.compile)
    # The others wait while the first process reads all images, on a slow disk for hours.
    dist.init_process_group("nccl" if gpus else "gloo", timeout=datetime.timedelta(hours=12))
    return Machine(device, gpus, precision, dist.get_rank(), dist.get_world_size(), args.compile)


class MixedPrecision(nn.Module):
    """A network under autocast, entered in `forward`, since threads of DataParallel do not inherit its type."""

    def __init__(self, net: nn.Module, machine: Machine) -> None:
        super().__init__()
        self.net = net
        self.device_type, self.enabled = machine.device.type, machine.precision == "bf16"

    def forward(self, *inputs: Any) -> Any:
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


def for_evaluation(net: nn.Module) -> nn.Module:
    """The wrapped model in eval mode, whose `forward` waits for no other process: they may have more batches."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        net = net.module
        for buffer in net.buffers():  # statistics of BatchNorm, of which training gives each process its own
            dist.broadcast(buffer, src=0)
    return net.eval()


# --- meter and predictions
class Meter(tqdm):
    """Progress in images of all processes, as a bar or, without a terminal, a line a minute; and means over images."""

    def __init__(self, title: str, loader: DataLoader, machine: Machine) -> None:
        n_images = min(len(loader.dataset), len(loader) * loader.batch_size * machine.world_size)
        hidden = True if machine.rank else None  # None: where standard error is not a terminal
        super().__init__(total=n_images, desc=title, unit=" images", leave=False, disable=hidden)
        self.title, self.machine = title, machine
        self.sums: dict[str, float] = {}
        self.n_images = 0
        self.start = self.last_line = time.monotonic()

    def update(self, n_images: int, **means: Tensor) -> None:
        """Add a batch, given its size and means over it. Raises UserError if one of these is not finite."""
        self.n_images += n_images
        values = torch.stack([mean.detach() for mean in means.values()]).tolist() if means else []
        if not all(map(math.isfinite, values)):
            raise UserError(f"{self.title}: the loss is not finite: lower the learning rate")
        for name, value in zip(means, values):
            self.sums[name] = self.sums.get(name, 0.0) + value * n_images
        self.set_postfix_str(f"loss {self.sums['loss'] / self.n_images:.3f}" if means else "", refresh=False)
        super().update(n_images * self.machine.world_size)
        now, n_done = time.monotonic(), self.n_images * self.machine.world_size
        if self.disable and now - self.last_line >= SECONDS_PER_LINE:
            self.last_line, words = now, {"prefix": self.title, "unit": " images", "postfix": self.postfix}
            self.machine.print(self.format_meter(n_done, self.total, now - self.start, ncols=0, **words))

    def means(self) -> dict[str, float]:
        """The means over the images of all processes."""
        totals = torch.tensor([*self.sums.values(), self.n_images], dtype=torch.float64, device=self.machine.device)
        if dist.is_initialized():
            dist.all_reduce(totals)
        *sums, n_images = totals.tolist()
        return {name: total / n_images for name, total in zip(self.sums, sums)}


@torch.no_grad()
def collect(predict: Callable[..., tuple], loader: DataLoader, machine: Machine, title: str) -> list[Tensor]:
    """Predictions for all images of a list and, last, their boxes [N, n, 4], on the CPU and in the list's order.

    predict: canvases uint8 [B, 3, S, S] on the device, boxes [B, n, 4], indices in the list [B] -> tensors [B, ...].
    Raises UserError unless each image was predicted exactly once, in finite numbers.
    """
    batches = []
    with Meter(title, loader, machine) as meter:
        for canvas, boxes, _, index in loader:
            values = predict(canvas.to(machine.device, non_blocking=True), boxes, index)
            batches.append((index, *values, boxes))
            meter.update(len(index))
    shard = [torch.cat(parts).cpu() for parts in zip(*batches)]
    if dist.is_initialized():
        shards: list[Any] = [None] * machine.world_size
        dist.all_gather_object(shards, shard)
        shard = [torch.cat(parts) for parts in zip(*shards)]
    index, *values = shard
    if index.sort().values.tolist() != list(range(len(loader.dataset))):
        raise UserError(f"{title}: {len(index)} predictions of {len(index.unique())} of {len(loader.dataset)} images")
    if not all(value.isfinite().all() for value in values[:-1]):
        raise UserError(f"{title}: the network's predictions are not finite: train with a lower --lr")
    return [value[index.argsort()] for value in values]


def multiply_adds(function: Callable[[], Any]) -> int:
    """Multiply-adds of a call (each two FLOPs), as PyTorch counts them; on "meta", without computing."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def describe_accuracy(accuracy: float, n_images: int) -> str:
    """An accuracy in words, with its 95 % confidence interval (Wilson 1927)."""
    from scipy.stats import binomtest  # takes a second to import

    low, high = binomtest(round(accuracy * n_images), n_images).proportion_ci(method="wilson")
    return f"{accuracy:.1%} correct ({accuracy * n_images:,.0f} of {n_images:,}; 95% CI {low:.0%} to {high:.0%})"


# --- files
def prepare_folder(path: Path) -> None:
    """Make a folder to write to. Raises UserError at once, rather than after an epoch, where that is impossible."""
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    if not os.path.isdir(path) or not os.access(path, os.W_OK):
        raise UserError(f"cannot write to the folder {path}: choose another")


@contextlib.contextmanager
def replacing(path: Path, **how: Any) -> Iterator[IO[Any]]:
    """Write to a file of a unique name, flush it to the disk and rename it to `path`. Raises UserError."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # which PyTorch's archive hides
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path} ({cause.strerror}); earlier files are intact") from error
    finally:
        with contextlib.suppress(OSError):  # renamed already, or never opened
            temporary.unlink()


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, completely or not at all; the last one names the columns. Floats get six digits."""
    rows = [{key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows]
    # A file name that is not text in the system's encoding is written as it is.
    with replacing(path, mode="w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, rows[-1], restval="nan", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, completely or not at all."""
    with replacing(path, mode="wb") as file:
        torch.save(content, file)


def load_checkpoint(path: Path, hint: str, *entries: str) -> Any:
    """Load a PyTorch file to the CPU. Raises UserError, with the hint if it is missing, also if it lacks an entry."""
    if not os.path.isfile(path):  # unlike Path's own, False for a name that is too long
        raise UserError(f"checkpoint {path} not found: {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a broken file
        raise UserError(f"{path} cannot be read ({type(error).__name__}): a saved state_dict() is needed") from error
    if entries and not (isinstance(content, dict) and content.keys() >= set(entries)):
        raise UserError(f"{path} is not a checkpoint of the expected kind, which has entries {', '.join(entries)}")
    return content


def load_state(load: Callable[[dict[str, Any]], Any], state: dict[str, Any], path: Path | str) -> None:
    """Call load(state), and turn PyTorch's long list of mismatches into one line. Raises UserError."""
    try:
        load(state)
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the state in {path} does not fit this network: {reason}") from error


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict on the CPU, so that its file opens on any machine."""
    return {key: value.cpu() for key, value in module.state_dict().items()}


def provenance(args: Namespace, machine: Machine) -> dict[str, dict[str, str]]:
    """Flags, as texts, and versions, to store with what they made; git is the commit, empty where this is no clone."""
    git = ""
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {"torch": str(torch.__version__), "torchvision": torchvision.__version__, "git": git}
    versions |= {"device": machine.device.type, "precision": machine.precision}
    return {"settings": {k: str(x) for k, x in vars(args).items() if k not in OF_COMMAND}, "versions": versions}


def write_results(path: Path, args: Namespace, machine: Machine, figures: dict[str, Any], **more: Any) -> None:
    """Write the figures of a test as JSON, with more entries, the flags and the versions that they depend on."""
    with replacing(path, mode="w", encoding="utf-8") as file:
        json.dump({**more, "figures": figures, **provenance(args, machine)}, file, indent=1)


def print_opening(args: Namespace, machine: Machine, model: nn.Module, data: str) -> None:
    """Say in three lines what a training run is made of: data, network and machine, flags."""
    total = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    place = f"GPUs {machine.gpus}" if machine.gpus else f"CPU with {torch.get_num_threads()} threads"
    machine.print(f"data:    {data}")
    network = f"{total:.1f} M parameters, {trained:.1f} M of them trained"
    machine.print(f"network: {network}; {place}, processes: {machine.world_size}, {machine.precision}")
    machine.print(f"flags:   {' '.join(f'{k}={x}' for k, x in vars(args).items() if k not in OF_COMMAND)}")


class Run:
    """A training run and its files under --save_dir: the best checkpoint, the last one to resume from, the log.

    files: their names in this order, then patterns of the results of their tests. last: the last checkpoint if the run
    is resumed, else None. Raises UserError, before anything is written, if an earlier run would be lost.
    """

    def __init__(self, args: Namespace, machine: Machine, files: tuple[str, ...], last: dict | None) -> None:
        self.args, self.machine, self.last = args, machine, last
        self.best_path, self.last_path, self.log_path = (args.save_dir / name for name in files[:3])
        present = [name for name in files[:3] if os.path.exists(args.save_dir / name)]
        if present and not last and not args.overwrite:
            ways = "continue it with --resume_training=True, " if files[1] in present else ""
            ways += "replace it with --overwrite, or choose another --save_dir"
            raise UserError(f"{args.save_dir} holds an earlier run ({', '.join(present)}): {ways}")
        names = files[1:] if present and not last else ()  # of what the first checkpoint replaces besides the best one
        self.replaced = [path for name in names for path in args.save_dir.glob(name)]
        self.best_score, self.rows = (last["best_score"], last["log"]) if last else (math.inf, [])
        self.epochs = range(last["epoch"] + 1 if last else 0, args.epochs)  # those to train, from 0
        self.board: Any = None  # TensorBoard's writer

    def start(self, model: nn.Module, optimizer: Optimizer, best: dict[str, nn.Module], **origin: Any) -> None:
        """Try the folder and restore a resumed run. best: modules of the best checkpoint; origin: entries of both."""
        prepare_folder(self.args.save_dir)
        self.model, self.optimizer, self.best = model, optimizer, best
        self.stored = {**provenance(self.args, self.machine), **origin}
        if self.last:
            load_state(model.load_state_dict, self.last["model_dict"], self.last_path)
            load_state(optimizer.load_state_dict, self.last["optimizer"], self.last_path)
            if not self.epochs:
                self.machine.print(f"{self.epochs.start} epochs are done: raise --epochs to train longer")
        elif not self.epochs and self.machine.rank == 0:
            self.save_best(-1, {})
        if self.args.tensorboard and self.machine.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.args.save_dir / "tensorboard" / self.log_path.stem
            self.board = SummaryWriter(folder, purge_step=self.epochs.start + 1)
        self.epoch_start = time.perf_counter()

    def save_best(self, epoch: int, metrics: dict[str, float]) -> None:
        """Write the best checkpoint, of this epoch (from 0; -1: untrained). The first one replaces an earlier run."""
        while self.replaced:
            self.replaced.pop().unlink(missing_ok=True)
        states = {name: cpu_state(module) for name, module in self.best.items()}
        save_checkpoint(self.best_path, {**states, "epoch": epoch, "metrics": metrics, **self.stored})

    def save(self, epoch: int, score: float, summary: str, **metrics: Any) -> None:
        """Write an epoch (from 0), also as the best one if no earlier score is lower, and print its summary."""
        is_best, self.best_score = score <= self.best_score, min(score, self.best_score)
        metrics["seconds"] = seconds = time.perf_counter() - self.epoch_start
        row = {"epoch": epoch + 1}
        for part, value in metrics.items():  # numbers, or dicts of them
            row |= {f"{part}_{name}": one for name, one in value.items()} if isinstance(value, dict) else {part: value}
        self.rows.append(row)
        if self.machine.rank == 0:
            if is_best:
                self.save_best(epoch, row)
            write_table(self.log_path, self.rows)
            if self.board:
                for name, value in list(row.items())[1:]:  # without the epoch
                    self.board.add_scalar("/".join(reversed(name.split("_", 1))), value, epoch + 1)
                self.board.flush()
            # Last, so that a run that is stopped before repeats the epoch when resumed.
            state = {"model_dict": cpu_state(self.model), "optimizer": self.optimizer.state_dict(), "log": self.rows}
            save_checkpoint(self.last_path, {**state, "epoch": epoch, "best_score": self.best_score, **self.stored})
        self.machine.print(f"{summary}{' (best)' if is_best else ''}; {seconds:.0f} s")
        self.epoch_start = time.perf_counter()
