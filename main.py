"""Train the recurrent attention model on a pre-trained backbone, test it, draw where it looks, name a picture's breed.

Training reads pt_glimpse_model.tar of pretrain.py, and writes saved_model.tar (best classifier), last.tar (to resume
from) and log.csv under --save_dir. The other tasks need saved_model.tar alone.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import utils
from dataset import (
    DataError,
    PictureList,
    crop_to_canvas,
    describe_data,
    is_picture,
    make_loader,
    make_training_loaders,
    read_dog_boxes,
    read_list,
    read_picture,
    split_list,
)
from glimpse import canvas_size, draw_contact_sheet, draw_panel, inside, patch_boxes, patch_scales
from model import POLICIES, SUPERVISIONS, RecurrentAttention, Rollout, attention_loss, build_backbone, rewards

MODEL_DEFAULTS = {"k": 2, "start_size": 2, "n_glimpses": 1, "rnn_hidden": 2048, "std_dev": 0.2}
N_CONFUSED = 10  # pairs of classes that test names
N_ON_SHEET = 40  # pictures on the contact sheet
N_WATCHED = 8  # validation pictures that TensorBoard shows after every epoch
LR_SCHEDULES = ("constant", "cosine")
RUN_DEFAULTS = {
    **MODEL_DEFAULTS,
    **utils.TRAIN_DEFAULTS,
    "policy": "learned",
    "supervision": "each",
    "attention_lr": 1e-4,
    "lr_schedule": "cosine",
}
BACKBONE_OF_2018 = {"arch": "resnet50", "patch_size": 96, "data": {}}  # its file holds nothing but the weights
MAY_CHANGE = ("batch_size", "epochs", "lr", "attention_lr", "lr_schedule")  # on resuming
USE_DEFAULTS = {name: RUN_DEFAULTS[name] for name in (*MODEL_DEFAULTS, "policy", "batch_size", "seed")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags that a checkpoint can fix are None when not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument_group("task").add_argument
    add("--task", choices=tuple(TASKS), default="train", help="what to do (%(default)s)")
    add("--images", type=Path, nargs="+", metavar="PATH", help="pictures to predict, or folders of them")
    add("--n_trajectories", type=int, default=7, help="over which test and predict average (%(default)s)")
    add("--n_samples", type=int, default=20, help="pictures that view_glimpses draws (%(default)s)")
    files, training = utils.add_shared_flags(parser)
    add = files.add_argument
    add("--backbone", type=Path, metavar="FILE", help="pretrain.py's (pt_glimpse_model.tar under --save_dir)")
    add("--imgs_dir", type=Path, default=Path("imgs"), help="folder for the pictures drawn (%(default)s)")
    add = training.add_argument
    add("--lr_schedule", choices=LR_SCHEDULES, help="learning rates over all epochs: constant, or down a (cosine)")
    add("--attention_lr", type=float, help="learning rate of the attention after the first glimpse (1e-4)")
    add("--supervision", choices=SUPERVISIONS, help="glimpses to classify and reward after: each, or the last (each)")
    add = parser.add_argument_group("network").add_argument
    add("--k", type=int, help="patches per glimpse (2)")
    add("--start_size", type=int, help="quarters of the side that the finest patch covers: 1, 2 or 4 (2)")
    add("--n_glimpses", type=int, help="glimpses per picture (1)")
    add("--rnn_hidden", type=int, help="hidden units of the LSTM (2048)")
    add("--std_dev", type=float, help="deviation of the gaze around its mean, in half sides before tanh (0.2)")
    add("--policy", choices=POLICIES, help="where to look (learned, or as trained); the other two are ablations")
    args = utils.parse_flags(parser, argv, positive=(*MODEL_DEFAULTS, "attention_lr", "n_trajectories", "n_samples"))
    if (args.task == "predict") != bool(args.images):
        parser.error("--task=predict needs --images PATH..., and no other task takes it")
    if args.backbone and (args.task != "train" or args.resume_training):
        parser.error("--backbone goes with a new training run only: a classifier's file has the backbone in it")
    return args


def learning_rate(lr: float, schedule: str, epoch: int, epochs: int) -> float:
    """Of an epoch (from 0): always lr, or from lr down to nearly 0 along half a cosine."""
    return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 if schedule == "cosine" else lr


def training_noise(n_pictures: int, n_glimpses: int, seed: int, epoch: int, machine: utils.Machine) -> Tensor:
    """This process's share of an epoch's noise, [n, 1, T, 2], drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(random.Random(f"gaze {seed} {epoch}").getrandbits(32))
    noise = torch.randn(n_pictures, 1, n_glimpses, 2, generator=generator)
    return noise[machine.rank :: machine.world_size][: n_pictures // machine.world_size]


def off_center(location: Tensor) -> Tensor:
    """How far from the middle of the picture a glimpse is, in sides of the picture. [..., 2] -> [...]."""
    return location.norm(dim=-1) / 2


def train_one_epoch(
    net: nn.Module,
    loader: DataLoader,
    noise: Tensor,
    policy: str,
    supervision: str,
    optimizer: torch.optim.Optimizer,
    machine: utils.Machine,
    title: str,
) -> dict[str, float]:
    """One pass over the training pictures. Returns the means of the loss terms and of the accuracy."""
    net.train()
    with utils.Meter(title, loader, machine, optimizer) as meter:
        for (canvas, labels, _), eps in zip(loader, noise.to(machine.device).split(loader.batch_size)):
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            rollout = net(canvas, eps, policy)
            terms = attention_loss(rollout, labels, supervision)
            loss = sum(terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right = rewards(rollout, labels, "each")  # [B, M, T]
            watched = {
                "accuracy": right[:, :, -1].mean(),
                "reward": rewards(rollout, labels, supervision).mean(),
                "expected_reward": rollout.baseline.mean(),
                "off_center": off_center(rollout.location).mean(),
            }
            meter.update(len(labels), loss=loss, **terms._asdict(), **watched)
        return meter.means()


def evaluation_noise(policy: str, n_pictures: int, n_samples: int, n_glimpses: int, seed: int) -> Tensor:
    """Noise [N, M, T, 2] of the trajectories to evaluate, always the same for the same seed.

    "learned": the deterministic trajectory first, then n_samples sampled ones; "center": one; "random": n_samples.
    """
    samples = torch.randn(n_pictures, n_samples, n_glimpses, 2, generator=torch.Generator().manual_seed(seed))
    if policy == "random":
        return samples
    deterministic = torch.zeros(n_pictures, 1, n_glimpses, 2)
    return torch.cat([deterministic, samples], dim=1) if policy == "learned" else deterministic


class Answers(NamedTuple):
    """What the classifier says of N pictures on M trajectories each, and what they are."""

    probabilities: Tensor  # [N, M, C]
    location: Tensor  # [N, M, T, 2]
    labels: Tensor  # [N]
    index: Tensor  # [N], in the list of pictures


@torch.no_grad()
def evaluate(
    net: nn.Module, loader: DataLoader, noise: Tensor, policy: str, machine: utils.Machine, title: str
) -> Answers:
    """What the classifier says of each picture of a list, in its order, each picture once.

    Raises UserError if an answer is missing, given twice or not finite.
    """
    net = utils.for_evaluation(net)
    batches = []
    share = noise[machine.rank :: machine.world_size].to(machine.device)
    with utils.Meter(title, loader, machine) as meter:
        for (canvas, labels, index), eps in zip(loader, share.split(loader.batch_size)):
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            rollout = net(canvas, eps, policy)
            batches.append(Answers(rollout.logits[:, :, -1].softmax(-1), rollout.location, labels, index))
            mean = batches[-1].probabilities.mean(1)  # [B, C]
            accuracy = (mean.argmax(-1) == labels).float().mean()
            meter.update(len(labels), loss=F.nll_loss(mean.log(), labels), accuracy=accuracy)
    answers = Answers(*(utils.gather(torch.cat(parts).cpu(), machine) for parts in zip(*batches)))
    utils.check_answers(answers.probabilities, answers.index, len(loader.dataset), title)
    return answers


def by_kind(values: Tensor, policy: str) -> dict[str, Tensor]:
    """Sort what the trajectories of `evaluation_noise` gave, [..., M, n], into [..., m, n], the best estimate last.

    "deterministic": the one along the mean of the gaze; "one trajectory": each sampled one; "mean of n": their mean.
    """
    kinds = {}
    if policy != "random":
        kinds["deterministic"], values = values[..., :1, :], values[..., 1:, :]
    if values.shape[-2]:
        kinds["one trajectory"] = values
        kinds[f"mean of {values.shape[-2]}"] = values.mean(-2, keepdim=True)
    return kinds


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, its mean over the classes, and top-5 accuracy, each a mean over trajectories. [N, M, C] and [N]."""
    right = (probabilities.argmax(-1) == labels.unsqueeze(1)).double()  # [N, M]
    n_best = min(5, probabilities.shape[-1])
    among_best = (probabilities.topk(n_best).indices == labels.view(-1, 1, 1)).any(-1).double()
    per_class = [right[labels == label].mean() for label in labels.unique()]
    means = {"accuracy": right.mean(), "mean per class": torch.stack(per_class).mean(), "top-5": among_best.mean()}
    return {name: value.item() for name, value in means.items()}


def build_model(
    settings: dict[str, Any], n_classes: int, path: Path, pretrained: dict[str, Tensor] | None = None
) -> RecurrentAttention:
    """The network that a run's settings describe, with fresh weights but for those of a pre-trained backbone.

    path: the checkpoint that settings and backbone come from. Raises UserError if they make no network.
    """
    keywords = {name: settings[name] for name in ("patch_size", *MODEL_DEFAULTS)}
    try:
        backbone = build_backbone(settings["arch"])
        if pretrained is not None:
            utils.load_state(backbone.load_state_dict, pretrained, path)
        return RecurrentAttention(backbone=backbone, n_classes=n_classes, **keywords)
    except (RuntimeError, TypeError, ValueError) as error:
        raise utils.UserError(f"{path} describes no network that can be built: {error}") from error


def load_classifier(
    args: argparse.Namespace, machine: utils.Machine, pictures: PictureList | None = None
) -> tuple[RecurrentAttention, dict[str, Any], list[str]]:
    """The best classifier on the device, the settings to use it with, and the names of its classes.

    Raises UserError if there is none, and if the pictures it is to be used on have other classes.
    """
    path = args.save_dir / "saved_model.tar"
    required = {"model_dict": {}, **BACKBONE_OF_2018, "epoch": 0, **USE_DEFAULTS}
    checkpoint = utils.load_checkpoint(path, required, "train one with `python main.py`, or give its --save_dir")
    flags = utils.settle_flags(vars(args), checkpoint, USE_DEFAULTS, free=("policy", "batch_size", "seed"))
    class_names = utils.class_names_of(checkpoint, path)
    if pictures is not None:
        utils.refuse_other_classes(class_names, pictures.class_names, args.data_dir, path)
    model = build_model(checkpoint, len(class_names), path)
    utils.load_state(model.load_state_dict, checkpoint["model_dict"], path)
    model.to(machine.device, memory_format=torch.channels_last).eval()
    return model, {**flags, "epoch": checkpoint["epoch"]}, class_names


def train(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Train on a frozen backbone, validating after every epoch, and keep the best classifier.

    The best is the one with the highest mean probability of the true breed on validation.
    """
    train_list, valid_list = split_list(read_list(args.data_dir, "train"), args.valid_size)
    data = describe_data(train_list, valid_list)
    last_path, best_path = args.save_dir / "last.tar", args.save_dir / "saved_model.tar"
    log_path = args.save_dir / "log.csv"
    utils.read_log(log_path)  # whatever is wrong with it is better known now than after an epoch
    last = utils.load_last(last_path, args.resume_training, {**BACKBONE_OF_2018, **RUN_DEFAULTS})
    flags = utils.settle_flags(vars(args), last, RUN_DEFAULTS, free=MAY_CHANGE)
    try:
        patch_scales(flags["k"], flags["start_size"])
    except ValueError as error:
        raise utils.UserError(f"--k and --start_size: {error}") from None
    source_path = last_path if last else args.backbone or args.save_dir / "pt_glimpse_model.tar"
    source = last or utils.load_checkpoint(
        source_path, {"model_dict": {}}, "make it with `python pretrain.py`, or see --backbone", BACKBONE_OF_2018
    )
    # A backbone may come from other data, but must not have been trained on what is validated on here.
    if last or source["data"].get("class_names") == data["class_names"]:
        utils.refuse_other_data(source["data"], data, source_path)
    settings = {**flags, "arch": source["arch"], "patch_size": source["patch_size"]}

    train_loader, valid_loader = make_training_loaders(
        train_list,
        valid_list,
        seed=flags["seed"],
        rank=machine.rank,
        world_size=machine.world_size,
        drop_last=False,
        canvas_size=canvas_size(settings["patch_size"], flags["start_size"]),
        **machine.loading(flags["batch_size"], args.num_workers),
    )

    torch.manual_seed(flags["seed"])
    pretrained = source["model_dict"] if last is None else None
    model = build_model(settings, len(data["class_names"]), source_path, pretrained)
    model.to(machine.device, memory_format=torch.channels_last)
    optimizer = utils.make_optimizer(*model.parameter_groups())
    first_epoch, best_score = utils.restore(last, last_path, model, optimizer)
    net = utils.wrap(model, machine)
    utils.prepare_folder(args.save_dir)
    board_dir = args.save_dir / "tensorboard" / "main"
    board = utils.open_tensorboard(board_dir, first_epoch) if args.tensorboard and machine.rank == 0 else None
    outputs = {"best classifier": best_path, "to resume from": last_path, "metrics": log_path}
    run = {"flags": {**vars(args), **settings}, "data": data, "origin": train_list.origin, "outputs": outputs}
    policy, n_glimpses, seed = flags["policy"], flags["n_glimpses"], flags["seed"]
    valid_noise = evaluation_noise(policy, data["validation pictures"], int(policy == "random"), n_glimpses, seed)
    with utils.stoppable(last_path, resumed=last is not None):
        machine.say(utils.describe_run(**run, model=model, machine=machine, board=board))
        if flags["epochs"] == 0 and last is None:  # what the untrained network does, to compare with
            if machine.rank == 0:
                if best_path.exists():
                    raise utils.UserError(
                        f"{best_path} would be lost to an untrained classifier: give another --save_dir"
                    )
                untrained = {**settings, "model_dict": utils.cpu_state(model), "epoch": -1, "data": data}
                utils.save_checkpoint(best_path, untrained)
            machine.say(f"untrained classifier in {best_path}")
            machine.say(utils.next_command(args, "main.py", "--task=test"))
            return
        for epoch in utils.epochs_left(first_epoch, flags["epochs"], machine):
            start = time.perf_counter()
            title = f"epoch {epoch + 1}/{flags['epochs']}"
            train_loader.sampler.epoch = epoch
            for group, lr in zip(optimizer.param_groups, (flags["lr"], flags["attention_lr"])):
                group["lr"] = learning_rate(lr, flags["lr_schedule"], epoch, flags["epochs"])
            noise = training_noise(data["training pictures"], n_glimpses, seed, epoch, machine)
            means = train_one_epoch(net, train_loader, noise, policy, flags["supervision"], optimizer, machine, title)
            answers = evaluate(net, valid_loader, valid_noise, policy, machine, "validation")
            # Accuracy counts a few pictures and soon stands still; how sure the answers are still tells epochs apart.
            of_truth = answers.probabilities[torch.arange(len(answers.labels)), 0, answers.labels]
            valid = {
                **scores(answers.probabilities, answers.labels),
                "probability": of_truth.mean().item(),
                "off_center": off_center(answers.location).mean().item(),
            }
            is_best = valid["probability"] > best_score
            best_score = max(valid["probability"], best_score)
            if machine.rank == 0:  # what to resume from comes last: whoever is stopped in between repeats the epoch
                shared = {**settings, "model_dict": utils.cpu_state(model), "epoch": epoch, "data": data}
                if is_best:
                    utils.save_checkpoint(best_path, {**shared, "accuracy": valid["accuracy"]})
                utils.log_metrics(log_path, epoch, board, train=means, valid=valid)
                if board is not None:
                    watched = fixed_choice(data["validation pictures"], N_WATCHED, seed)
                    for i, view in enumerate(look_at_list(valid_list, watched, model.eval(), policy, seed, machine)):
                        board.add_image(f"validation/{i}", pil_to_tensor(view.panel), epoch + 1)
                state = {"optimizer": optimizer.state_dict(), "best_score": best_score}
                utils.save_checkpoint(last_path, {**shared, **state})
            machine.say(
                f"{title}: loss {means['loss']:.3f}, accuracy {means['accuracy']:.3f}; "
                f"valid {valid['accuracy']:.3f}, probability {valid['probability']:.3f}"
                f"{' (best)' if is_best else ''}; {time.perf_counter() - start:.0f} s"
            )
    machine.say(f"best mean probability of the true class on validation {best_score:.4f}: {best_path}")
    machine.say(utils.next_command(args, "main.py", "--task=test"))


def write_predictions(
    path: Path, data_dir: Path, pictures: PictureList, probabilities: Tensor, location: Tensor
) -> None:
    """A table of the answer for each picture, [N, C], and of where its glimpses were, [N, T, 2]."""
    values, labels = (part.tolist() for part in probabilities.max(-1))
    names = pictures.class_names
    rows = [
        [file.relative_to(data_dir), names[truth], names[label], f"{value:.4f}", *(f"{x:.4f}" for x in place)]
        for file, truth, label, value, place in zip(
            pictures.files, pictures.labels, labels, values, location.flatten(1).tolist()
        )
    ]
    places = [f"{axis}_{t + 1}" for t in range(location.shape[1]) for axis in "xy"]
    utils.write_table(path, ["file", "truth", "prediction", "probability", *places], rows)


def write_accuracy_per_class(path: Path, class_names: list[str], kinds: dict[str, Tensor], labels: Tensor) -> None:
    """A table of the classes among labels [N]: how many pictures, and the accuracy of each kind of `by_kind`."""
    right = {kind: (p.argmax(-1) == labels.unsqueeze(1)).double().mean(1) for kind, p in kinds.items()}  # [N]
    rows = []
    for label in labels.unique().tolist():
        mine = labels == label
        accuracies = [f"{values[mine].mean().item():.4f}" for values in right.values()]
        rows.append([class_names[label], int(mine.sum()), *accuracies])
    utils.write_table(path, ["class", "pictures", *right], rows)


def most_confused(predictions: Tensor, labels: Tensor, class_names: list[str]) -> list[str]:
    """The classes most often taken for another, in words: at most N_CONFUSED of them. [N] and [N]."""
    n_classes = len(class_names)
    pairs = torch.bincount(labels * n_classes + predictions, minlength=n_classes**2).view(n_classes, n_classes)
    sizes = pairs.sum(1)
    counts, places = pairs.fill_diagonal_(0).flatten().sort(descending=True, stable=True)
    lines = []
    for n, place in zip(counts[:N_CONFUSED].tolist(), places.tolist()):
        truth, taken_for = divmod(place, n_classes)
        if n:
            lines.append(f"{class_names[truth]} taken for {class_names[taken_for]}: {n} of {sizes[truth]}")
    return lines


def test(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Score the best classifier on the test list; say how far its gaze goes, and how often to the dog, if known."""
    pictures = read_list(args.data_dir, "test")
    boxes = read_dog_boxes(args.data_dir, pictures)
    model, flags, _ = load_classifier(args, machine, pictures)
    n_pictures, policy = len(pictures.files), flags["policy"]
    loading = machine.loading(flags["batch_size"], args.num_workers)
    order = range(machine.rank, n_pictures, machine.world_size)
    loader = make_loader(pictures, order, canvas_size=model.glimpse.canvas_size, **loading)
    noise = evaluation_noise(policy, n_pictures, args.n_trajectories, model.n_glimpses, flags["seed"])
    answers = evaluate(utils.wrap(model, machine), loader, noise, policy, machine, "test")
    machine.say(
        f"{n_pictures:,} test pictures of {args.data_dir}, classifier of epoch {flags['epoch'] + 1}\n"
        f"{utils.describe_classes(pictures.class_names)}; split {pictures.origin}"
    )
    kinds = by_kind(answers.probabilities, policy)
    for kind, values in kinds.items():
        figures = "  ".join(f"{name} {value:.4f}" for name, value in scores(values, answers.labels).items())
        machine.say(f"policy {policy:8}{kind:15} {figures}")
    gaze = {"off center": by_kind(off_center(answers.location), policy)}
    if boxes is not None:
        gaze["on dog"] = by_kind(inside(answers.location, boxes[:, None, None]).double(), policy)
    for t in range(model.n_glimpses):
        for kind in gaze["off center"]:
            if not kind.startswith("mean"):  # of n trajectories, which look at n places
                figures = "  ".join(f"{name} {values[kind][..., t].mean():.4f}" for name, values in gaze.items())
                machine.say(f"glimpse {t + 1:<7}{kind:15} {figures}")
    best = list(kinds.values())[-1][:, 0]  # [N, C]
    confused = most_confused(best.argmax(-1), answers.labels, pictures.class_names)
    machine.say("\n  ".join(["most often confused:", *confused]) if confused else "nothing is confused")
    predictions_path, per_class_path = args.save_dir / "predictions.csv", args.save_dir / "per_class.csv"
    if machine.rank == 0:
        write_predictions(predictions_path, args.data_dir, pictures, best, answers.location[:, 0])
        write_accuracy_per_class(per_class_path, pictures.class_names, kinds, answers.labels)
    machine.say(f"the answer for each picture is in {predictions_path}, the accuracy of each class in {per_class_path}")
    machine.say(utils.next_command(args, "main.py", "--task=view_glimpses"))


class View(NamedTuple):
    """A picture that was looked at along one trajectory, and the drawing of it."""

    canvas: Tensor  # uint8 [3, S, S]
    boxes: Tensor  # [T, k, 4]
    caption: str
    panel: Image.Image


@torch.no_grad()
def look_at(
    file: Path, model: RecurrentAttention, noise: Tensor, policy: str, machine: utils.Machine
) -> tuple[Tensor, Rollout]:
    """Canvas [3, S, S] and rollout, on the CPU, of one picture. noise: [1, M, T, 2]."""
    canvas = crop_to_canvas(read_picture(file, model.glimpse.canvas_size), model.glimpse.canvas_size)
    net = utils.MixedPrecision(model, machine)
    rollout = net(canvas.unsqueeze(0).to(machine.device), noise.to(machine.device), policy)
    return canvas, Rollout(*(value.cpu() for value in rollout))


def draw_first_trajectory(
    canvas: Tensor, rollout: Rollout, model: RecurrentAttention, class_names: list[str], caption: str
) -> Image.Image:
    """Panel of the first trajectory, the deterministic one unless the policy is random."""
    location, attention = rollout.location[0, 0], rollout.attention[0, 0]
    values, labels = rollout.logits[0, 0].softmax(-1).max(-1)  # [T]
    answers = [f"{class_names[label]} ({value:.2f})" for value, label in zip(values, labels)]
    return draw_panel(canvas, location, attention, model.glimpse.scales, model.glimpse.patch_size, caption, answers)


def fixed_choice(n_pictures: int, n_chosen: int, seed: int) -> list[int]:
    """Places of some pictures of a list, always the same for the same seed; of a longer choice the first are these."""
    order = list(range(n_pictures))
    random.Random(f"view {seed}").shuffle(order)
    return order[:n_chosen]


def look_at_list(
    pictures: PictureList, order: list[int], model: RecurrentAttention, policy: str, seed: int, machine: utils.Machine
) -> Iterator[View]:
    """Look at the pictures at these places of a list, one after the other, and draw each."""
    noise = evaluation_noise(policy, len(order), int(policy == "random"), model.n_glimpses, seed)
    for i, index in enumerate(order):
        canvas, rollout = look_at(pictures.files[index], model, noise[i : i + 1], policy, machine)
        probabilities, truth = rollout.logits[0, 0, -1].softmax(-1), pictures.labels[index]
        label = int(probabilities.argmax())
        said, true = (f"{pictures.class_names[c]} ({probabilities[c]:.2f})" for c in (label, truth))
        caption = f"predicted {said}, true {true}"
        panel = draw_first_trajectory(canvas, rollout, model, pictures.class_names, caption)
        boxes = patch_boxes(rollout.location[0, 0], model.glimpse.scales, model.glimpse.patch_size)
        yield View(canvas, boxes, caption, panel)


def view_glimpses(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Draw where the best classifier looks, on test pictures that the seed alone chooses."""
    pictures = read_list(args.data_dir, "test")
    model, flags, _ = load_classifier(args, machine, pictures)
    order = fixed_choice(len(pictures.files), args.n_samples, flags["seed"])
    views = look_at_list(pictures, order, model, flags["policy"], flags["seed"], machine)
    on_sheet = []
    for i, view in enumerate(tqdm(views, "view_glimpses", len(order), unit=" pictures", leave=False, disable=None)):
        utils.save_picture(args.imgs_dir / f"glimpse_{i}.jpg", view.panel)
        if i < N_ON_SHEET:
            on_sheet.append((view.canvas, view.boxes, view.caption.replace(", true", "\ntrue")))
    sheet_path = args.imgs_dir / "contact_sheet.jpg"
    utils.save_picture(sheet_path, draw_contact_sheet(*zip(*on_sheet)))
    machine.say(f"where the model looks on {utils.count(len(order), 'picture')}: {args.imgs_dir}/glimpse_0.jpg, ...")
    machine.say(f"{utils.count(len(on_sheet), 'picture')} at a glance: {sheet_path}")
    machine.say(utils.next_command(args, "main.py", "--task=predict", "--images", "photo.jpg"))


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files given, and in place of a folder the pictures in it. Raises UserError for a folder without any."""
    files = []
    for path in paths:
        inside_it = [path]
        if os.path.isdir(path):
            inside_it = sorted(file for file in path.iterdir() if is_picture(file))
        if not inside_it:
            raise utils.UserError(f"--images {path}: no picture in that folder")
        files.extend(inside_it)
    return files


def predict(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Name the five likeliest breeds of each picture given, and draw where the model looked."""
    model, flags, class_names = load_classifier(args, machine)
    files = find_pictures(args.images)
    noise = evaluation_noise(flags["policy"], 1, args.n_trajectories, model.n_glimpses, flags["seed"])
    for i, file in enumerate(files):
        canvas, rollout = look_at(file, model, noise, flags["policy"], machine)
        *_, probabilities = by_kind(rollout.logits[:, :, -1].softmax(-1), flags["policy"]).values()  # [1, 1, C]
        values, labels = probabilities.flatten().topk(min(5, len(class_names)))
        path = args.imgs_dir / f"predict_{i}_{file.stem}.jpg"
        caption = f"predicted {class_names[labels[0]]} ({values[0]:.2f})"
        utils.save_picture(path, draw_first_trajectory(canvas, rollout, model, class_names, caption))
        machine.say(f"{file} (drawn in {path})")
        for probability, label in zip(values.tolist(), labels.tolist()):
            machine.say(f"  {probability:6.1%}  {class_names[label]}")


TASKS = {"train": train, "test": test, "view_glimpses": view_glimpses, "predict": predict}


def main(argv: list[str] | None = None) -> None:
    """Parse, find the device, do the task."""
    args = parse_args(argv)
    machine = utils.set_up_machine(args.device, args.gpus, args.precision)
    if machine.world_size > 1 and args.task in ("view_glimpses", "predict"):
        raise utils.UserError(f"--task={args.task} runs in one process: start it without torchrun")
    TASKS[args.task](args, machine)


if __name__ == "__main__":
    utils.run(main, DataError)
