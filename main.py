"""Train the recurrent attention model on a pre-trained backbone, test it, draw where it looks, name a picture's breed.

Training reads pt_glimpse_model.tar of pretrain.py under --save_dir and writes saved_model.tar (best classifier),
last.tar (to resume from) and log.csv beside it. The other tasks need saved_model.tar alone.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from dataset import (
    DataError,
    PictureList,
    TrainSampler,
    crop_to_canvas,
    describe_data,
    make_loader,
    read_list,
    read_picture,
    split_list,
)
from glimpse import canvas_size, draw_panel, patch_scales
from model import POLICIES, RecurrentAttention, Rollout, attention_loss, build_backbone

MODEL_DEFAULTS = {"k": 2, "start_size": 2, "n_glimpses": 1, "rnn_hidden": 2048, "std_dev": 0.2}
RUN_DEFAULTS = {**MODEL_DEFAULTS, "policy": "learned"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags that a checkpoint can fix are None when not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    utils.add_shared_flags(parser)
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="train")
    add("--k", type=utils.number(int, least=1), help="patches per glimpse (default 2)")
    add(
        "--start_size",
        type=utils.number(int, least=1),
        help="quarters of the side that the finest patch covers (default 2)",
    )
    add("--n_glimpses", type=utils.number(int, least=1), help="glimpses per picture (default 1)")
    add("--rnn_hidden", type=utils.number(int, least=1), help="hidden units of the LSTM (default 2048)")
    add("--std_dev", type=utils.number(float, above=0), help="deviation of the gaze around its mean (default 0.2)")
    add("--n_trajectories", type=utils.number(int, least=1), default=7, help="over which test and predict average")
    add("--policy", choices=POLICIES, help="where to look (default learned, or as trained); the others are ablations")
    add("--n_samples", type=utils.number(int, least=1), default=20, help="pictures that view_glimpses draws")
    add("--imgs_dir", type=Path, default=Path("imgs"), help="folder for the pictures drawn")
    add("--images", type=Path, nargs="+", metavar="FILE", help="pictures to predict")
    args = parser.parse_args(argv)
    if (args.task == "predict") != bool(args.images):
        parser.error("--task=predict needs --images FILE..., and no other task takes it")
    if args.task != "train" and args.resume_training:
        parser.error(f"--resume_training does not go with --task={args.task}")
    return args


def training_noise(n_pictures: int, n_glimpses: int, seed: int, epoch: int, machine: utils.Machine) -> Tensor:
    """This process's share of an epoch's noise, [n, 1, T, 2], drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(random.Random(f"gaze {seed} {epoch}").getrandbits(32))
    noise = torch.randn(n_pictures, 1, n_glimpses, 2, generator=generator)
    return noise[machine.rank :: machine.world_size][: n_pictures // machine.world_size]


def train_one_epoch(
    net: nn.Module,
    loader: DataLoader,
    noise: Tensor,
    policy: str,
    optimizer: torch.optim.Optimizer,
    machine: utils.Machine,
    title: str,
) -> dict[str, float]:
    """One pass over the training pictures. Returns the means of the loss terms and of the accuracy."""
    net.train()
    meter = utils.Meter()
    with utils.progress(title, len(loader.dataset), machine) as bar:
        for (canvas, labels), eps in zip(loader, noise.split(loader.batch_size)):
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            with machine.autocast():
                rollout = net(canvas, eps.to(machine.device, non_blocking=True), policy)
            terms = attention_loss(rollout, labels)
            loss = sum(terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accuracy = (rollout.logits.argmax(-1) == labels.unsqueeze(1)).float().mean()
            meter.update(len(labels), loss=loss, accuracy=accuracy, **terms._asdict())
            if bar.update(len(labels) * machine.world_size):
                bar.set_postfix_str(str(meter), refresh=False)
    return meter.means(machine)


def evaluation_noise(policy: str, n_pictures: int, n_samples: int, n_glimpses: int, seed: int) -> Tensor:
    """Noise [N, M, T, 2] of the trajectories to evaluate, always the same for the same seed.

    "learned": the deterministic trajectory first, then n_samples sampled ones; "center": one; "random": n_samples.
    """
    samples = torch.randn(n_pictures, n_samples, n_glimpses, 2, generator=torch.Generator().manual_seed(seed))
    if policy == "random":
        return samples
    deterministic = torch.zeros(n_pictures, 1, n_glimpses, 2)
    return torch.cat([deterministic, samples], dim=1) if policy == "learned" else deterministic


@torch.no_grad()
def evaluate(
    net: nn.Module, loader: DataLoader, noise: Tensor, policy: str, machine: utils.Machine, title: str
) -> tuple[Tensor, Tensor]:
    """Probabilities [N, M, C] on each trajectory and labels [N], in the order of the list, each picture once."""
    net = utils.unsynchronized(net).eval()
    probabilities, truth = [], []
    right = 0
    with utils.progress(title, len(loader.dataset), machine) as bar:
        for (canvas, labels), eps in zip(loader, noise[machine.rank :: machine.world_size].split(loader.batch_size)):
            with machine.autocast():
                rollout = net(canvas.to(machine.device, non_blocking=True), eps.to(machine.device), policy)
            probabilities.append(rollout.logits.softmax(-1).cpu())  # [B, M, C]
            truth.append(labels)
            right += (probabilities[-1].mean(1).argmax(-1) == labels).sum().item()
            if bar.update(len(labels) * machine.world_size):
                bar.set_postfix_str(f"accuracy {right / sum(map(len, truth)):.3f}", refresh=False)
    return utils.gather(torch.cat(probabilities), machine), utils.gather(torch.cat(truth), machine)


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, its mean over the classes, and top-5 accuracy, each a mean over trajectories. [N, M, C] and [N]."""
    right = (probabilities.argmax(-1) == labels.unsqueeze(1)).double()  # [N, M]
    n_best = min(5, probabilities.shape[-1])
    among_best = (probabilities.topk(n_best).indices == labels.view(-1, 1, 1)).any(-1).double()
    per_class = [right[labels == label].mean() for label in labels.unique()]
    means = {"accuracy": right.mean(), "mean per class": torch.stack(per_class).mean(), "top-5": among_best.mean()}
    return {name: value.item() for name, value in means.items()}


def build_model(settings: dict[str, Any], n_classes: int) -> RecurrentAttention:
    """The network that a checkpoint's settings describe, with fresh weights. Raises UserError for invalid scales."""
    keywords = {name: settings[name] for name in ("patch_size", *MODEL_DEFAULTS)}
    return RecurrentAttention(backbone=build_backbone(settings["arch"]), n_classes=n_classes, **keywords)


def load_classifier(args: argparse.Namespace, machine: utils.Machine) -> tuple[RecurrentAttention, dict[str, Any]]:
    """The best classifier as trained, on the device, and its checkpoint."""
    path = args.save_dir / "saved_model.tar"
    required = ("model_dict", "arch", "patch_size", "data", *RUN_DEFAULTS)
    checkpoint = utils.load_checkpoint(path, required, "train one with `python main.py`, or give its --save_dir")
    utils.settle_flags(vars(args), checkpoint, MODEL_DEFAULTS)
    model = build_model(checkpoint, len(checkpoint["data"]["class_names"]))
    utils.load_weights(model.load_state_dict, checkpoint["model_dict"], path)
    return model.to(machine.device, memory_format=torch.channels_last).eval(), checkpoint


def train(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Train on a frozen backbone, validating after every epoch, and keep the best classifier."""
    last_path, best_path = args.save_dir / "last.tar", args.save_dir / "saved_model.tar"
    last: dict[str, Any] | None = None
    if args.resume_training:
        required = ("model_dict", "optimizer", "epoch", "best_accuracy", "data", "arch", "patch_size", *RUN_DEFAULTS)
        last = utils.load_checkpoint(last_path, required, "there is no run to resume, leave --resume_training out")
    flags = utils.settle_flags(vars(args), last, RUN_DEFAULTS)
    try:
        patch_scales(flags["k"], flags["start_size"])
    except ValueError as error:
        raise utils.UserError(f"--k and --start_size: {error}") from None
    pretrained_path = args.save_dir / "pt_glimpse_model.tar"
    source = last or utils.load_checkpoint(pretrained_path, ["model_dict"], "make one with `python pretrain.py`")
    # The file of 2018 has no other entry than the weights, which are those of a resnet50 at 96 pixels.
    settings = {**flags, "arch": source.get("arch", "resnet50"), "patch_size": source.get("patch_size", 96)}

    train_list, valid_list = split_list(read_list(args.data_dir, "train"), args.valid_size, args.seed)
    data = describe_data(train_list, valid_list, args.seed)
    utils.refuse_other_data(last, data, last_path)
    size = canvas_size(settings["patch_size"], flags["start_size"])
    loading = {"canvas_size": size, "batch_size": machine.share(args.batch_size), "num_workers": args.num_workers}
    sampler = TrainSampler(len(train_list.files), args.seed, machine.rank, machine.world_size)
    train_loader = make_loader(train_list, sampler, **loading)
    valid_loader = make_loader(valid_list, machine.own(len(valid_list.files)), **loading)

    torch.manual_seed(args.seed)
    model = build_model(settings, len(data["class_names"]))
    if last is None:
        utils.load_weights(model.glimpse.backbone.load_state_dict, source["model_dict"], pretrained_path)
    model.to(machine.device, memory_format=torch.channels_last)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.lr, betas=(0.5, 0.999))
    first_epoch, best_accuracy = utils.restore(last, last_path, model, optimizer)
    net = utils.wrap(model, machine)
    utils.prepare_folder(args.save_dir)
    machine.say(utils.describe_run({**vars(args), **settings}, data, model, machine))

    policy, n_glimpses = flags["policy"], flags["n_glimpses"]
    valid_noise = evaluation_noise(policy, len(valid_list.files), int(policy == "random"), n_glimpses, args.seed)
    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()
        title = f"epoch {epoch + 1}/{args.epochs}"
        sampler.epoch = epoch
        noise = training_noise(len(train_list.files), n_glimpses, args.seed, epoch, machine)
        means = train_one_epoch(net, train_loader, noise, policy, optimizer, machine, title)
        valid = scores(*evaluate(net, valid_loader, valid_noise, policy, machine, "validation"))
        is_best = valid["accuracy"] > best_accuracy
        best_accuracy = max(valid["accuracy"], best_accuracy)
        if machine.rank == 0:
            # The best first: whoever is stopped in between repeats the epoch on resuming, and nothing is lost.
            shared = {**settings, "model_dict": model.state_dict(), "epoch": epoch, "data": data}
            if is_best:
                utils.save_checkpoint(best_path, {**shared, "accuracy": best_accuracy})
            utils.log_metrics(args.save_dir / "log.csv", utils.metrics_row(epoch, means, valid))
            utils.save_checkpoint(
                last_path, {**shared, "optimizer": optimizer.state_dict(), "best_accuracy": best_accuracy}
            )
        machine.say(
            f"{title}: train loss {means['loss']:.3f}, accuracy {means['accuracy']:.3f}; "
            f"validation accuracy {valid['accuracy']:.3f}{' (best)' if is_best else ''}; "
            f"{time.perf_counter() - start:.0f} s"
        )
    machine.say(f"best validation accuracy {best_accuracy:.4f}, classifier in {best_path}")
    machine.say("next: python main.py --task=test, --task=view_glimpses or --task=predict --images FILE...")


def test_list(args: argparse.Namespace, checkpoint: dict[str, Any]) -> PictureList:
    """The test list, whose classes must be those of the classifier. No other task than these two opens it."""
    pictures = read_list(args.data_dir, "test")
    if pictures.class_names != checkpoint["data"]["class_names"]:
        raise utils.UserError(f"{args.data_dir} has other classes than those that the classifier was trained on")
    return pictures


def test(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Score the best classifier on the test list."""
    model, checkpoint = load_classifier(args, machine)
    policy = args.policy or checkpoint["policy"]
    pictures = test_list(args, checkpoint)
    n_pictures = len(pictures.files)
    loader = make_loader(
        pictures,
        machine.own(n_pictures),
        canvas_size=canvas_size(checkpoint["patch_size"], checkpoint["start_size"]),
        batch_size=machine.share(args.batch_size),
        num_workers=args.num_workers,
    )
    noise = evaluation_noise(policy, n_pictures, args.n_trajectories, model.n_glimpses, args.seed)
    probabilities, labels = evaluate(utils.wrap(model, machine), loader, noise, policy, machine, "test")
    machine.say(f"{n_pictures:,} test pictures of {args.data_dir}, classifier of epoch {checkpoint['epoch'] + 1}")
    kinds = {}
    if policy != "random":
        kinds["deterministic"], probabilities = probabilities[:, :1], probabilities[:, 1:]
    if policy != "center":
        kinds["one trajectory"] = probabilities
        kinds[f"mean of {args.n_trajectories}"] = probabilities.mean(1, keepdim=True)
    for kind, values in kinds.items():
        figures = "  ".join(f"{name} {value:.4f}" for name, value in scores(values, labels).items())
        machine.say(f"policy {policy:8}{kind:15} {figures}")


@torch.no_grad()
def look_at(
    file: Path, model: RecurrentAttention, noise: Tensor, policy: str, machine: utils.Machine
) -> tuple[Tensor, Rollout]:
    """Canvas [3, S, S] and rollout of one picture. noise: [1, M, T, 2]."""
    canvas = crop_to_canvas(read_picture(file), canvas_size(model.glimpse.patch_size, model.glimpse.scales[0]))
    with machine.autocast():
        return canvas, model(canvas.unsqueeze(0).to(machine.device), noise.to(machine.device), policy)


def draw_rollout(
    canvas: Tensor, rollout: Rollout, model: RecurrentAttention, class_names: list[str], truth: str = ""
) -> Image.Image:
    """Panel of the first trajectory over one picture, with its prediction and, if known, the true breed."""
    probability, label = rollout.logits[0, 0].softmax(-1).max(-1)
    caption = f"predicted {class_names[label]} ({probability:.2f})" + (f", true {truth}" if truth else "")
    location, attention = rollout.location[0, 0].cpu(), rollout.attention[0, 0].cpu()
    return draw_panel(canvas, location, attention, model.glimpse.scales, model.glimpse.patch_size, caption)


def view_glimpses(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Draw where the best classifier looks, on test pictures that the seed alone chooses."""
    model, checkpoint = load_classifier(args, machine)
    policy = args.policy or checkpoint["policy"]
    pictures = test_list(args, checkpoint)
    order = list(range(len(pictures.files)))
    random.Random(f"view {args.seed}").shuffle(order)
    utils.prepare_folder(args.imgs_dir)
    order = order[: args.n_samples]
    noise = evaluation_noise(policy, len(order), int(policy == "random"), model.n_glimpses, args.seed)
    for i, index in enumerate(tqdm(order, "view_glimpses", leave=False, disable=None)):
        canvas, rollout = look_at(pictures.files[index], model, noise[i : i + 1], policy, machine)
        truth = pictures.class_names[pictures.labels[index]]
        panel = draw_rollout(canvas, rollout, model, pictures.class_names, truth)
        panel.save(args.imgs_dir / f"glimpse_{i}.jpg", quality=95, subsampling=0)
    machine.say(f"{len(order)} pictures of where the model looks: {args.imgs_dir}/glimpse_0.jpg, ...")


def predict(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Name the five likeliest breeds of each picture given, and draw where the model looked."""
    model, checkpoint = load_classifier(args, machine)
    policy = args.policy or checkpoint["policy"]
    class_names = checkpoint["data"]["class_names"]
    noise = evaluation_noise(policy, 1, args.n_trajectories, model.n_glimpses, args.seed)
    utils.prepare_folder(args.imgs_dir)
    for i, file in enumerate(args.images):
        canvas, rollout = look_at(file, model, noise, policy, machine)
        path = args.imgs_dir / f"predict_{i}_{file.stem}.jpg"
        draw_rollout(canvas, rollout, model, class_names).save(path, quality=95, subsampling=0)
        probabilities = rollout.logits[0].softmax(-1).mean(0)  # over the trajectories
        best = probabilities.topk(min(5, len(class_names)))
        machine.say(f"{file} (drawn in {path})")
        for probability, label in zip(best.values.tolist(), best.indices.tolist()):
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
