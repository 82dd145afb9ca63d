"""Fine-tune a plain torchvision ResNet on whole images: the standard rival without glimpses.

    python tests/finetune.py --batch_size 32 --epochs 5 --lr 5e-5 --smallest_crop 0.6      # ImageNet weights
    python tests/finetune.py --data_dir DIR --weights resnet50.pth --save_dir DIR --image_size 224 --smallest_crop 0.6

It uses torchvision's transforms: in training flips and random crops of at least --smallest_crop ** 2 of the area, in
tests the short side resized to 8/7 of the image size and a center crop, or the central square if training has no
smaller crops. The epoch with the lowest NLL on the validation images is tested. Under --save_dir it writes NAME.json
and predictions_NAME.csv; NAME: finetune_ARCH_WEIGHTS_SIZE_DATA.
"""

import copy
import math
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from probe import publish

import dataset
import pretrain
import utils
from dataset import N_BOXES, ImageList
from glimpse import IMAGENET_MEAN, IMAGENET_STD
from main import scores
from model import ARCHITECTURES
from utils import Machine, UserError

NAME = "fine-tuned ResNet"  # of the estimate


def make_parser() -> utils.Parser:
    """The flags of this script; --compile, --tensorboard, --overwrite and resuming have no effect."""
    parser = utils.Parser(__doc__)
    parser.add_shared_flags()
    network = parser.add_argument_group("network").add_argument
    network("--arch", default="resnet50", choices=ARCHITECTURES, help="torchvision ResNet to fine-tune")
    network("--image_size", type=pretrain.patch_side, default=224, help="side of the image in pixels")
    network("--weights", default="imagenet", help="initial weights: imagenet (a download), none, or a ResNet's file")
    return parser


class Photos(Dataset):
    """Items (normalized image [3, S, S], no boxes, label, index) of a list, as `utils.collect` takes them."""

    def __init__(self, images: ImageList, transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, int]:
        image, _ = dataset.read_image(self.images.files[index], size=2**16)
        return self.transform(image), torch.full((N_BOXES, 4), math.nan), self.images.labels[index], index


def make_loader(images: ImageList, args: Namespace, *, trains: bool) -> DataLoader:
    """Batches of a list, for training shuffled and augmented."""
    size = args.image_size
    if trains:
        crop = [v2.RandomResizedCrop(size, (args.smallest_crop**2, 1), antialias=True), v2.RandomHorizontalFlip()]
    else:
        margin = 8 / 7 if args.smallest_crop < 1 else 1  # objects look larger in random crops than in whole images
        crop = [v2.Resize(round(size * margin), antialias=True), v2.CenterCrop(size)]
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    photos, generator = Photos(images, v2.Compose([*crop, *to_tensor])), torch.Generator().manual_seed(args.seed)
    workers = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0}
    size = min(args.batch_size, len(images.files))  # so that drop_last leaves a batch
    return DataLoader(photos, size, trains, drop_last=trains, generator=generator, **workers)


def initial_network(args: Namespace, n_classes: int) -> nn.Module:
    """The network with its initial weights, but for a new last layer. Raises UserError."""
    net = torchvision.models.get_model(args.arch)
    if args.weights != "none":
        state = pretrain.read_weights(args.weights, args.arch)
        utils.load_state(net.load_state_dict, state, f"{args.weights} (is --arch {args.arch} right?)")
    net.fc = nn.Linear(net.fc.in_features, n_classes)
    return net


def train_one_epoch(net: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, machine: Machine) -> float:
    """One pass over the training images. Returns the mean loss."""
    net.train()
    with utils.Meter("training", loader, machine) as meter:
        for images, _, labels, _ in loader:
            logits = net(images.to(machine.device, memory_format=torch.channels_last))  # [B, C]
            loss = F.cross_entropy(logits.float(), labels.to(machine.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.update(len(labels), loss=loss)
    return meter.means()["loss"]


def probabilities_of(net: nn.Module, loader: DataLoader, machine: Machine, title: str) -> Tensor:
    """Probabilities [N, 1, C] of a list, in its order."""
    net.eval()
    return utils.collect(lambda images, *_: (net(images).float().softmax(-1).unsqueeze(1),), loader, machine, title)[0]


def main(argv: list[str] | None = None) -> None:
    """Fine-tune, choose the epoch on the validation images, and test it."""
    args = make_parser().parse_args(argv)
    machine = utils.set_up_machine(args)
    if machine.world_size > 1:
        raise UserError("tests/finetune.py runs in one process: start it without torchrun")
    utils.prepare_folder(args.save_dir)
    train, valid, data = dataset.read_training_data(args, machine)
    test, n_seen = dataset.read_test_list(args, machine, {"data": data}, Path("the network"))
    torch.manual_seed(args.seed)
    model = initial_network(args, len(train.class_names)).to(machine.device, memory_format=torch.channels_last)
    net, optimizer = utils.wrap(model, machine), utils.make_optimizer(model.parameters())
    train_loader = make_loader(train, args, trains=True)
    valid_loader, test_loader = (make_loader(images, args, trains=False) for images in (valid, test))
    best_nll, best = math.inf, model.state_dict()
    for epoch in range(args.epochs):
        optimizer.param_groups[0]["lr"] = utils.learning_rate(args.lr, args.lr_schedule, epoch, args.epochs)
        loss = train_one_epoch(net, train_loader, optimizer, machine)
        on_valid = scores(probabilities_of(net, valid_loader, machine, "validation"), torch.tensor(valid.labels))
        if on_valid["nll"] <= best_nll:
            best_nll, best = on_valid["nll"], copy.deepcopy(model.state_dict())
        figures = f"loss {loss:.3f}; valid {on_valid['accuracy']:.3f}, NLL {on_valid['nll']:.3f}"
        machine.print(f"epoch {epoch + 1}/{args.epochs}: {figures}")
    model.load_state_dict(best)
    probabilities = probabilities_of(net, test_loader, machine, "test")
    pixels = torch.empty(1, 3, args.image_size, args.image_size, device="meta")
    cost = {NAME: utils.multiply_adds(lambda: model.to("meta")(pixels))}
    name = f"finetune_{args.arch}_{Path(args.weights).stem}_{args.image_size}"
    publish(args, machine, name, NAME, test, probabilities, images_seen_in_training=n_seen, multiply_adds=cost)


if __name__ == "__main__":
    utils.run(main)
