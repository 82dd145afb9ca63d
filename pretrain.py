"""Fine-tune the backbone on concentric patches at three resolutions, to be the glimpse network of main.py.

Training writes under --save_dir: pt_glimpse_model.tar (best backbone), pt_last.tar (to resume from), pt_log.csv.
The other tasks give the figures that attention has to beat: what the four heads of that backbone score on the test
list, and what a linear classifier makes of the features before any fine-tuning.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import utils
from dataset import DataError, PictureList, describe_data, make_loader, make_training_loaders, read_list, split_list
from glimpse import STARTS, canvas_size, normalize
from model import ARCHITECTURES, HEADS, PretrainNetwork, build_backbone, load_resnet_weights

RUN_DEFAULTS = {"arch": "resnet50", "patch_size": 96, **utils.TRAIN_DEFAULTS}
PROBE_WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def patch_side(text: str) -> int:
    """Flag type: a positive multiple of 32, so that the quadrants of the context are whole cells of features."""
    if not text.isdecimal() or int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32, which the backbone needs")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags that a checkpoint can fix are None when not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument_group("task").add_argument
    add("--task", choices=tuple(TASKS), default="train", help="train, test its heads, or probe --weights (%(default)s)")
    utils.add_shared_flags(parser)
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=ARCHITECTURES, help="backbone (resnet50)")
    add("--patch_size", type=patch_side, metavar="P", help="side of a patch in pixels, a multiple of 32 (96)")
    add("--weights", help="imagenet (a download), none, or a torchvision ResNet's file (imagenet)")
    args = utils.parse_flags(parser, argv, positive=["epochs"])
    if args.task == "test" and args.weights:
        parser.error("--weights does not go with --task=test, which reads pt_glimpse_model.tar under --save_dir")
    args.weights = args.weights or "imagenet"
    return args


def load_initial_weights(backbone: nn.Sequential, weights: str, arch: str) -> None:
    """Start the backbone from ImageNet weights: torchvision's (version 1, as in 2018) or those in a file."""
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            # Version 1 is what `pretrained=True` loaded in 2018.
            state = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.get_state_dict(progress=True)
        except Exception as error:  # of the network, or of a broken download
            raise utils.UserError(
                f"the ImageNet weights of {arch} cannot be downloaded ({error}): give --weights FILE or --weights none"
            ) from error
    else:
        state = utils.load_checkpoint(Path(weights), {}, "--weights takes imagenet, none, or a file")
    utils.load_state(lambda state: load_resnet_weights(backbone, state), state, weights)


def build_model(settings: dict[str, Any], n_classes: int, path: Path) -> PretrainNetwork:
    """The network that a run's settings describe, with fresh weights. Raises UserError if there is no such network.

    path: the checkpoint that they would then come from.
    """
    try:
        backbone = build_backbone(settings["arch"])
    except ValueError as error:
        raise utils.UserError(f"{path} describes no network that can be built: {error}") from error
    return PretrainNetwork(backbone=backbone, n_classes=n_classes, patch_size=settings["patch_size"])


def pretrain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the heads' cross-entropies, each a mean over the batch. logits: [B, 4, C]; labels: [B]."""
    return sum(F.cross_entropy(logits[:, head], labels) for head in range(len(HEADS)))


def head_accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Fraction of right answers of each head, by name."""
    right = (logits.argmax(-1) == labels.unsqueeze(1)).float().mean(0)  # [4]
    return {f"acc_{name}": value for name, value in zip(HEADS, right)}


def train_one_epoch(
    net: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, machine: utils.Machine, title: str
) -> dict[str, float]:
    """One pass over the training pictures. Returns the mean loss and the heads' accuracies."""
    net.train()
    with utils.Meter(title, loader, machine, optimizer) as meter:
        for canvas, labels, _ in loader:
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            logits = net(canvas)  # [B, 4, C]
            loss = pretrain_loss(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(len(labels), loss=loss, **head_accuracies(logits, labels))
        return meter.means()


@torch.no_grad()
def evaluate(net: nn.Module, loader: DataLoader, machine: utils.Machine, title: str) -> dict[str, float]:
    """Loss and the heads' accuracies over a list, each picture once whatever the number of processes.

    Raises UserError if an answer is missing, given twice or not finite.
    """
    net = utils.for_evaluation(net)
    batches = []
    with utils.Meter(title, loader, machine) as meter:
        for canvas, labels, index in loader:
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            logits = net(canvas)  # [B, 4, C]
            batches.append((logits, labels, index))
            meter.update(len(labels), loss=pretrain_loss(logits, labels), **head_accuracies(logits, labels))
    logits, labels, index = (utils.gather(torch.cat(parts).cpu(), machine) for parts in zip(*batches))
    utils.check_answers(logits, index, len(loader.dataset), title)
    means = {"loss": pretrain_loss(logits, labels), **head_accuracies(logits, labels)}
    return {name: value.item() for name, value in means.items()}


def train(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Prepare, resume, train, and keep the best backbone."""
    train_list, valid_list = split_list(read_list(args.data_dir, "train"), args.valid_size)
    data = describe_data(train_list, valid_list)
    last_path, best_path = args.save_dir / "pt_last.tar", args.save_dir / "pt_glimpse_model.tar"
    log_path = args.save_dir / "pt_log.csv"
    utils.read_log(log_path)  # whatever is wrong with it is better known now than after an epoch
    last = utils.load_last(last_path, args.resume_training, RUN_DEFAULTS)
    if last:
        utils.refuse_other_data(last["data"], data, last_path)
    flags = utils.settle_flags(vars(args), last, RUN_DEFAULTS, free=("batch_size", "epochs", "lr"))

    train_loader, valid_loader = make_training_loaders(
        train_list,
        valid_list,
        seed=flags["seed"],
        rank=machine.rank,
        world_size=machine.world_size,
        drop_last=True,  # a ragged batch might be of one picture, too few for BatchNorm
        canvas_size=canvas_size(flags["patch_size"], STARTS[0]),
        **machine.loading(flags["batch_size"], args.num_workers),
    )
    if min(map(len, torch.arange(train_loader.batch_size).chunk(max(1, len(machine.gpus))))) < 2:
        raise utils.UserError(
            f"--batch_size {flags['batch_size']} leaves one picture to a GPU or process: BatchNorm needs at least two"
        )

    torch.manual_seed(flags["seed"])
    model = build_model(flags, len(data["class_names"]), last_path)
    if last is None:
        load_initial_weights(model.backbone, args.weights, flags["arch"])
    model.to(machine.device, memory_format=torch.channels_last)
    optimizer = utils.make_optimizer(model.parameters())
    first_epoch, best_accuracy = utils.restore(last, last_path, model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = flags["lr"]
    net = utils.wrap(model, machine)
    utils.prepare_folder(args.save_dir)
    board_dir = args.save_dir / "tensorboard" / "pretrain"
    board = utils.open_tensorboard(board_dir, first_epoch) if args.tensorboard and machine.rank == 0 else None
    outputs = {"best backbone": best_path, "to resume from": last_path, "metrics": log_path}
    run = {"flags": {**vars(args), **flags}, "data": data, "origin": train_list.origin, "outputs": outputs}
    with utils.stoppable(last_path, resumed=last is not None):
        machine.say(utils.describe_run(**run, model=model, machine=machine, board=board))
        for epoch in utils.epochs_left(first_epoch, flags["epochs"], machine):
            start = time.perf_counter()
            title = f"epoch {epoch + 1}/{flags['epochs']}"
            train_loader.sampler.epoch = epoch
            means = train_one_epoch(net, train_loader, optimizer, machine, title)
            valid = evaluate(net, valid_loader, machine, "validation")
            is_best = valid["acc_123"] > best_accuracy
            best_accuracy = max(valid["acc_123"], best_accuracy)
            if machine.rank == 0:  # what to resume from comes last: whoever is stopped in between repeats the epoch
                shared = {**flags, "epoch": epoch, "data": data}
                if is_best:
                    best = {"model_dict": utils.cpu_state(model.backbone), "heads": utils.cpu_state(model.heads)}
                    utils.save_checkpoint(best_path, {**best, "accuracy": best_accuracy, **shared})
                utils.log_metrics(log_path, epoch, board, train=means, valid=valid)
                state = {"model_dict": utils.cpu_state(model), "optimizer": optimizer.state_dict()}
                utils.save_checkpoint(last_path, {**state, "best_score": best_accuracy, **shared})
            heads = ", ".join(f"{name}: {valid['acc_' + name]:.3f}" for name in HEADS)
            machine.say(
                f"{title}: loss {means['loss']:.3f}; valid {heads}{' (best)' if is_best else ''}; "
                f"{time.perf_counter() - start:.0f} s"
            )
    machine.say(f"best validation accuracy {best_accuracy:.4f}, backbone in {best_path}")
    machine.say(utils.next_command(args, "main.py"))


def test(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Score the four heads of the best backbone on the test list."""
    pictures = read_list(args.data_dir, "test")
    path = args.save_dir / "pt_glimpse_model.tar"
    required = {"model_dict": {}, "heads": {}, "epoch": 0, "data": {}, **RUN_DEFAULTS}
    checkpoint = utils.load_checkpoint(path, required, "make one with `python pretrain.py`, or give its --save_dir")
    flags = utils.settle_flags(vars(args), checkpoint, RUN_DEFAULTS, free=utils.TRAIN_DEFAULTS)
    utils.refuse_other_classes(utils.class_names_of(checkpoint, path), pictures.class_names, args.data_dir, path)
    model = build_model(flags, len(pictures.class_names), path)
    utils.load_state(model.backbone.load_state_dict, checkpoint["model_dict"], path)
    utils.load_state(model.heads.load_state_dict, checkpoint["heads"], path)
    model.to(machine.device, memory_format=torch.channels_last)
    order = range(machine.rank, len(pictures.files), machine.world_size)
    loading = machine.loading(flags["batch_size"], args.num_workers)
    loader = make_loader(pictures, order, canvas_size=canvas_size(model.patch_size, STARTS[0]), **loading)
    means = evaluate(utils.wrap(model, machine), loader, machine, "test")
    machine.say(
        f"{len(pictures.files):,} test pictures of {args.data_dir}, backbone of epoch {checkpoint['epoch'] + 1}"
    )
    for name in HEADS:
        machine.say(f"head {name:4} accuracy {means['acc_' + name]:.4f}")
    machine.say(utils.next_command(args, "main.py"))


@torch.no_grad()
def whole_picture_features(
    backbone: nn.Sequential, patch_size: int, pictures: PictureList, machine: utils.Machine, **loading: Any
) -> tuple[Tensor, Tensor]:
    """Features [N, D] of whole pictures of side P from the frozen backbone, and labels [N], in the list's order."""
    net = utils.MixedPrecision(backbone.eval(), machine)
    loader = make_loader(pictures, range(len(pictures.files)), canvas_size=patch_size, **loading)
    features, truth = [], []
    with utils.Meter("features", loader, machine) as meter:
        for canvas, labels, _ in loader:
            picture = normalize(canvas.to(machine.device, non_blocking=True).float() / 255)  # [B, 3, P, P]
            features.append(net(picture).float().mean((2, 3)).cpu())  # [B, D]
            truth.append(labels)
            meter.update(len(labels))
    return torch.cat(features), torch.cat(truth)


def fit_probe(features: Tensor, labels: Tensor, n_classes: int, weight_decay: float) -> nn.Linear:
    """Multinomial logistic regression of labels [N] on features [N, D], its optimum up to the solver's tolerance."""
    probe = nn.Linear(features.shape[1], n_classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    solver = torch.optim.LBFGS(probe.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(probe(features), labels) + weight_decay / 2 * probe.weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return probe


def probe(args: argparse.Namespace, machine: utils.Machine) -> None:
    """Train a linear classifier on frozen features of whole pictures, before any fine-tuning, and test it.

    The weight decay is the one of `PROBE_WEIGHT_DECAYS` that is best on validation.
    """

    def accuracy(fitted: nn.Linear, features: Tensor, labels: Tensor) -> float:
        return (fitted(features).argmax(-1) == labels).double().mean().item()

    if machine.world_size > 1:
        raise utils.UserError("--task=probe runs in one process: start it without torchrun")
    flags = utils.settle_flags(vars(args), None, RUN_DEFAULTS)
    lists = (*split_list(read_list(args.data_dir, "train"), args.valid_size), read_list(args.data_dir, "test"))
    if lists[0].class_names != lists[2].class_names:
        raise utils.UserError(f"the training and the test list of {args.data_dir} name other classes: mend one")
    torch.manual_seed(flags["seed"])
    backbone = build_backbone(flags["arch"])
    load_initial_weights(backbone, args.weights, flags["arch"])
    backbone.to(machine.device, memory_format=torch.channels_last)
    n_classes, loading = len(lists[0].class_names), machine.loading(flags["batch_size"], args.num_workers)
    parts = [whole_picture_features(backbone, flags["patch_size"], some, machine, **loading) for some in lists]
    mean, std = parts[0][0].mean(0), parts[0][0].std(0).clamp_min(1e-6)
    (train_x, train_y), *others = [((features - mean) / std, labels) for features, labels in parts]
    probes = [fit_probe(train_x, train_y, n_classes, weight_decay) for weight_decay in PROBE_WEIGHT_DECAYS]
    valid = [accuracy(fitted, *others[0]) for fitted in probes]
    best = valid.index(max(valid))
    machine.say(
        f"linear probe of {args.weights} features of whole pictures at {flags['patch_size']} pixels, "
        f"{len(lists[2].files):,} test pictures of {args.data_dir}"
    )
    machine.say(f"weight decay {PROBE_WEIGHT_DECAYS[best]:g}, chosen on validation: accuracy {valid[best]:.4f}")
    machine.say(f"test accuracy {accuracy(probes[best], *others[1]):.4f}")
    machine.say(utils.next_command(args, "pretrain.py"))


TASKS = {"train": train, "test": test, "probe": probe}


def main(argv: list[str] | None = None) -> None:
    """Parse, find the device, do the task."""
    args = parse_args(argv)
    TASKS[args.task](args, utils.set_up_machine(args.device, args.gpus, args.precision))


if __name__ == "__main__":
    utils.run(main, DataError)
