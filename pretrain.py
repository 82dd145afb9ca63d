"""Fine-tune the backbone on concentric patches at three resolutions, to be the glimpse network of main.py.

Writes under --save_dir: pt_glimpse_model.tar (best backbone), pt_last.tar (to resume from), pt_log.csv.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import utils
from dataset import DataError, describe_data, make_training_loaders, read_list, split_list
from glimpse import STARTS, canvas_size
from model import ARCHITECTURES, HEADS, PretrainNetwork, build_backbone, load_resnet_weights

RUN_DEFAULTS = {"arch": "resnet50", "patch_size": 96, **utils.TRAIN_DEFAULTS}


def patch_side(text: str) -> int:
    """Flag type: a positive multiple of 32, so that the quadrants of the context are whole cells of features."""
    if not text.isdecimal() or int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32, which the backbone needs")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags that a checkpoint can fix are None when not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    utils.add_shared_flags(parser)
    add = parser.add_argument
    add("--arch", choices=ARCHITECTURES, help="backbone (resnet50)")
    add("--patch_size", type=patch_side, metavar="P", help="side of a patch in pixels, a multiple of 32 (96)")
    add(
        "--weights",
        default="imagenet",
        help="imagenet (a download), none, or a torchvision ResNet's file (%(default)s)",
    )
    return utils.parse_flags(parser, argv)


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
        state = utils.load_checkpoint(Path(weights), (), "--weights takes imagenet, none, or a file")
    utils.load_state(lambda state: load_resnet_weights(backbone, state), state, weights)


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
    meter = utils.Meter()
    with utils.progress(title, loader, machine) as bar:
        for canvas, labels in loader:
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            logits = net(canvas)  # [B, 4, C]
            loss = pretrain_loss(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(len(labels), loss=loss, **head_accuracies(logits, labels))
            if bar.update(len(labels) * machine.world_size):
                bar.set_postfix_str(str(meter), refresh=False)
    return meter.means(machine)


@torch.no_grad()
def evaluate(net: nn.Module, loader: DataLoader, machine: utils.Machine, title: str) -> dict[str, float]:
    """Loss and the heads' accuracies over a list, each picture once whatever the number of processes."""
    net = utils.for_evaluation(net)
    answers, truth, meter = [], [], utils.Meter()
    with utils.progress(title, loader, machine) as bar:
        for canvas, labels in loader:
            answers.append(net(canvas.to(machine.device, non_blocking=True)).cpu())  # [B, 4, C]
            truth.append(labels)
            loss = pretrain_loss(answers[-1], labels)
            meter.update(len(labels), loss=loss, **head_accuracies(answers[-1], labels))
            if bar.update(len(labels) * machine.world_size):
                bar.set_postfix_str(str(meter), refresh=False)
    logits, labels = utils.gather(torch.cat(answers), machine), utils.gather(torch.cat(truth), machine)
    means = {"loss": pretrain_loss(logits, labels), **head_accuracies(logits, labels)}
    return {name: value.item() for name, value in means.items()}


def main(argv: list[str] | None = None) -> None:
    """Parse, prepare, resume, train, and keep the best backbone."""
    args = parse_args(argv)
    machine = utils.set_up_machine(args.device, args.gpus, args.precision)
    train_list, valid_list = split_list(read_list(args.data_dir, "train"), args.valid_size)
    data = describe_data(train_list, valid_list)
    last_path, best_path = args.save_dir / "pt_last.tar", args.save_dir / "pt_glimpse_model.tar"
    log_path = args.save_dir / "pt_log.csv"
    utils.read_log(log_path)  # whatever is wrong with it is better known now than after an epoch
    last = utils.load_last(last_path, args.resume_training, RUN_DEFAULTS)
    if last:
        utils.refuse_other_data(last["data"], data, last_path)
    flags = utils.settle_flags(vars(args), last, RUN_DEFAULTS, free=("batch_size", "lr"))

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
    backbone = build_backbone(flags["arch"])
    model = PretrainNetwork(backbone=backbone, n_classes=len(data["class_names"]), patch_size=flags["patch_size"])
    if last is None:
        load_initial_weights(backbone, args.weights, flags["arch"])
    model.to(machine.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=flags["lr"], betas=(0.5, 0.999))
    first_epoch, best_accuracy = utils.restore(last, last_path, model, optimizer, flags["lr"])
    net = utils.wrap(model, machine)
    utils.prepare_folder(args.save_dir)
    machine.say(utils.describe_run({**vars(args), **flags}, data, model, machine))

    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()
        title = f"epoch {epoch + 1}/{args.epochs}"
        train_loader.sampler.epoch = epoch
        train = train_one_epoch(net, train_loader, optimizer, machine, title)
        valid = evaluate(net, valid_loader, machine, "validation")
        is_best = valid["acc_123"] > best_accuracy
        best_accuracy = max(valid["acc_123"], best_accuracy)
        if machine.rank == 0:  # what to resume from comes last: whoever is stopped in between repeats the epoch
            shared = {**flags, "epoch": epoch, "data": data}
            if is_best:
                best = {"model_dict": utils.cpu_state(backbone), "accuracy": best_accuracy}
                utils.save_checkpoint(best_path, {**best, **shared})
            utils.log_metrics(log_path, epoch, train=train, valid=valid)
            state = {"model_dict": utils.cpu_state(model), "optimizer": optimizer.state_dict()}
            utils.save_checkpoint(last_path, {**state, "best_accuracy": best_accuracy, **shared})
        heads = ", ".join(f"{name} {valid['acc_' + name]:.3f}" for name in HEADS)
        machine.say(
            f"{title}: train loss {train['loss']:.3f}, accuracy {train['acc_123']:.3f}; "
            f"validation accuracy {heads}{' (best)' if is_best else ''}; {time.perf_counter() - start:.0f} s"
        )
    machine.say(f"best validation accuracy {best_accuracy:.4f}, backbone in {best_path}; next: python main.py")


if __name__ == "__main__":
    utils.run(main, DataError)
