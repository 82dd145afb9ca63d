"""Fine-tune the backbone on concentric patches at three resolutions, for the glimpses of main.py.

    python pretrain.py                                        # an ImageNet ResNet-50 on data/Original
    python pretrain.py --batch_size 32 --lr 5e-5 --epochs 5   # on a laptop: 8 GB of memory, for a quick try
    python pretrain.py --resume_training=True                 # continue after the last finished epoch
    python pretrain.py --task=test                            # accuracy of the four heads on the test list

Training writes pt_glimpse_model.tar (the best backbone), pt_last.tar (to resume from) and pt_log.csv under --save_dir.
"""

import statistics
from argparse import Namespace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import dataset
import utils
from glimpse import STARTS, canvas_size
from model import ARCHITECTURES, HEADS, PretrainNetwork, build_backbone, load_resnet_weights
from utils import Machine, UserError

FILES = ("pt_glimpse_model.tar", "pt_last.tar", "pt_log.csv", "pt_results*.json", "*probe_*_pt_glimpse_model_*")
NETWORK = ("arch", "patch_size")  # flags that must agree with a checkpoint

patch_side = utils.number(int, lambda n: 0 < n < 2**12 and n % 32 == 0, "a multiple of 32")


def make_parser() -> utils.Parser:
    """The flags of this script."""
    parser = utils.Parser(__doc__)
    parser.add_argument("--task", default="train", choices=["train", "test"], help="what to do")
    parser.add_shared_flags()
    network = parser.add_argument_group("network").add_argument
    network("--arch", default="resnet50", choices=ARCHITECTURES, help="torchvision ResNet to use as the backbone")
    network("--patch_size", type=patch_side, default=96, help="side of a patch in pixels, a multiple of 32")
    network("--weights", default="imagenet", help="initial weights: imagenet (a download), none, or a ResNet's file")
    return parser


def read_weights(weights: str, arch: str) -> Any:
    """ImageNet weights (torchvision's version 1, as in 2018), or those of a file. Raises UserError."""
    if weights != "imagenet":
        content = utils.load_checkpoint(Path(weights), "--weights takes imagenet, none, or a file")
        is_nested = isinstance(content, dict) and "state_dict" in content  # as many other training scripts save it
        return content["state_dict"] if is_nested else content
    try:
        return torchvision.models.get_model_weights(arch).IMAGENET1K_V1.get_state_dict(progress=True)
    except Exception as error:  # of the network, or of a broken download
        raise UserError(f"ImageNet weights of {arch} cannot be downloaded ({error}): see --weights") from error


def load_initial_weights(backbone: nn.Sequential, weights: str, arch: str) -> dict[str, Any]:
    """Load ImageNet weights or those of a file, unless weights is "none". Raises UserError.

    Returns the file's content if this script wrote it, else {}.
    """
    if weights == "none":
        return {}
    state = read_weights(weights, arch)
    where = f"{weights} (is --arch {arch} right?)"
    if isinstance(state, dict) and "model_dict" in state:
        utils.load_state(backbone.load_state_dict, state["model_dict"], where)
        return state
    utils.load_state(lambda state: load_resnet_weights(backbone, state), state, where)
    return {}


def place(model: PretrainNetwork, machine: Machine) -> None:
    """Move the network to the device, and compile its backbone if asked to."""
    model.to(machine.device, memory_format=torch.channels_last)
    if machine.compiles:
        model.backbone.compile()


def pretrain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the heads' cross-entropies, each a mean over the batch. logits: [B, 4, C]; labels: [B]."""
    return sum(F.cross_entropy(logits[:, head], labels) for head in range(len(HEADS)))


def head_accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Accuracy of each head, by name. logits: [B, 4, C]; labels: [B]."""
    accuracies = (logits.argmax(-1) == labels.unsqueeze(1)).float().mean(0)  # [4]
    return {f"accuracy_{name}": value for name, value in zip(HEADS, accuracies)}


def train_one_epoch(
    net: nn.Module, loader: DataLoader, optimizer: Optimizer, machine: Machine, title: str
) -> dict[str, float]:
    """One pass over the training images. Returns the mean loss and the heads' accuracies."""
    net.train()
    with utils.Meter(title, loader, machine) as meter:
        for canvas, _, labels, _ in loader:
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            logits = net(canvas)  # [B, 4, C]
            loss = pretrain_loss(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(len(labels), loss=loss, **head_accuracies(logits, labels))
    return meter.means()


def evaluate(net: nn.Module, loader: DataLoader, machine: Machine, title: str) -> dict[str, float]:
    """Loss, negative log-likelihood of head 123 and accuracies of all heads over a list. Raises UserError."""
    net = utils.for_evaluation(net)
    logits, _ = utils.collect(lambda canvas, *_: (net(canvas),), loader, machine, title)  # [N, 4, C]
    labels = torch.tensor(loader.dataset.images.labels)
    nll = F.cross_entropy(logits[:, list(HEADS).index("123")], labels)
    means = {"loss": pretrain_loss(logits, labels), "nll": nll, **head_accuracies(logits, labels)}
    return {name: value.item() for name, value in means.items()}


def train(args: Namespace, machine: Machine, last: dict[str, Any] | None) -> None:
    """Fine-tune the backbone and keep it at its best, the epoch with the lowest mean validation error of the heads."""
    run = utils.Run(args, machine, FILES, last)
    train_list, valid_list, data = dataset.read_training_data(args, machine, last)
    size = canvas_size(args.patch_size, STARTS[0])
    # A ragged batch could hold a single image, too few for BatchNorm.
    train_loader = dataset.make_loader(train_list, args, machine, size, trains=True, drop_last=True)
    valid_loader = dataset.make_loader(valid_list, args, machine, size)
    if min(map(len, torch.arange(train_loader.batch_size).chunk(max(1, len(machine.gpus))))) < 2:
        raise UserError("BatchNorm needs two images for each GPU or process: raise --batch_size, or add images")
    torch.manual_seed(args.seed)
    backbone, n_classes = build_backbone(args.arch), len(train_list.class_names)
    model = PretrainNetwork(backbone=backbone, n_classes=n_classes, patch_size=args.patch_size)
    if not last and load_initial_weights(model.backbone, args.weights, args.arch):
        raise UserError(f"--weights {args.weights} is from this script: --resume_training continues a run")
    place(model, machine)
    optimizer = utils.make_optimizer(model.parameters())
    run.start(model, optimizer, {"model_dict": model.backbone, "heads": model.heads}, data=data)
    net = utils.wrap(model, machine)
    utils.print_opening(args, machine, model, dataset.describe(train_list, valid_list))
    for epoch in run.epochs:
        title = f"epoch {epoch + 1}/{args.epochs}"
        train_loader.sampler.epoch = epoch
        optimizer.param_groups[0]["lr"] = lr = utils.learning_rate(args.lr, args.lr_schedule, epoch, args.epochs)
        means = train_one_epoch(net, train_loader, optimizer, machine, title)
        valid = evaluate(net, valid_loader, machine, "validation")
        # All heads count, since one on a few hundred images says little; NLL would also measure their calibration.
        error = round(1 - statistics.fmean(valid[f"accuracy_{name}"] for name in HEADS), 6)  # so that ties are ties
        heads = ", ".join(f"{name} {valid['accuracy_' + name]:.2f}" for name in HEADS)
        summary = f"{title}: loss {means['loss']:.3f}; valid {heads}, NLL {valid['nll']:.3f}"
        run.save(epoch, error, summary, train=means, valid=valid, lr=lr)
    machine.print(f"best backbone: {run.best_path}")
    folders = f"--data_dir {quote(str(args.data_dir))} --save_dir {quote(str(args.save_dir))}"
    skip = " --skip_bad_images" if args.skip_bad_images else ""
    machine.print(f"next: python main.py {folders} --valid_size {args.valid_size}{skip}")


def test(args: Namespace, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Print the accuracy of the best backbone's four heads on the test list, and write it as JSON."""
    best_path, n_classes = args.save_dir / FILES[0], len(checkpoint["data"]["class_names"])
    images, n_seen = dataset.read_test_list(args, machine, checkpoint, best_path)
    backbone, n_images = build_backbone(args.arch), len(images.files)
    model = PretrainNetwork(backbone=backbone, n_classes=n_classes, patch_size=args.patch_size)
    utils.load_state(model.backbone.load_state_dict, checkpoint["model_dict"], best_path)
    utils.load_state(lambda content: model.heads.load_state_dict(content["heads"]), checkpoint, best_path)
    place(model, machine)
    loader = dataset.make_loader(images, args, machine, canvas_size(args.patch_size, STARTS[0]))
    means = evaluate(utils.wrap(model, machine), loader, machine, "test")
    machine.print(f"{n_images:,} test images of {args.data_dir}, backbone of epoch {checkpoint['epoch'] + 1}")
    for name in HEADS:
        machine.print(f"head {name:4} {utils.describe_accuracy(means['accuracy_' + name], n_images)}")
    if machine.rank == 0:
        path = args.save_dir / f"pt_results{utils.name_of_other_data(args, checkpoint)}.json"
        patch = torch.empty(1, 3, args.patch_size, args.patch_size, device="meta")
        of_pass = utils.multiply_adds(lambda: model.backbone.to("meta").forward(patch))  # not through the compiler
        cost = {name: len(levels) * of_pass for name, levels in HEADS.items()}  # a head itself adds 0.1 %
        heads = {name: {"accuracy": means[f"accuracy_{name}"]} for name in HEADS}
        more = {"images": n_images, "images_seen_in_training": n_seen, "multiply_adds": cost}
        utils.write_results(path, args, machine, {"heads": heads}, **more)
        machine.print(f"figures: {path}")


def main(argv: list[str] | None = None) -> None:
    """Read flags and checkpoint, find the device, do the task."""
    args, checkpoint = utils.parse_flags(make_parser(), argv, FILES, NETWORK)
    machine = utils.set_up_machine(args)
    {"train": train, "test": test}[args.task](args, machine, checkpoint)


if __name__ == "__main__":
    utils.run(main)
