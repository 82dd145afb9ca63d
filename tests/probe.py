"""Classify by a linear probe, the rival that attention has to beat: one look at the central square of each image.

    python tests/probe.py --patch_size 192                                               # ImageNet weights
    python tests/probe.py --patch_size 192 --weights data/saved_models/pt_glimpse_model.tar
    python tests/probe.py --data_dir DIR --weights FILE --save_dir DIR --patch_size 128

It fits a linear classifier to the backbone's frozen features, with the weight decay that is best on the validation
images, and tests it. Under --save_dir it writes NAME.json and predictions_NAME.csv; NAME: probe_ARCH_WEIGHTS_SIZE_DATA.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
import pretrain
import utils
from dataset import ImageList
from glimpse import normalize
from main import estimate_rows, scores, stopping_thresholds
from model import ARCHITECTURES, build_backbone
from utils import Machine

WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NAME = "linear probe"  # of the estimate


def make_parser() -> utils.Parser:
    """The flags of this script; of those of training only --batch_size and --seed have an effect."""
    parser = utils.Parser(__doc__)
    parser.add_shared_flags()
    network = parser.add_argument_group("network").add_argument
    network("--arch", default="resnet50", choices=ARCHITECTURES, help="torchvision ResNet to use as the backbone")
    network("--patch_size", type=pretrain.patch_side, default=96, help="side of the resized image, a multiple of 32")
    network("--weights", default="imagenet", help="weights: imagenet (a download), none, a ResNet's file, or that of "
            "a backbone of pretrain.py")  # fmt: skip
    return parser


def image_features(backbone: nn.Sequential, images: ImageList, args: Namespace, machine: Machine) -> Tensor:
    """Features [N, D] of the images' central squares from the frozen backbone, in the list's order."""
    net = utils.MixedPrecision(backbone.eval(), machine)
    loader = dataset.make_loader(images, args, machine, args.patch_size)

    def predict(canvas: Tensor, *_: Tensor) -> tuple[Tensor]:
        return (net(normalize(canvas.float() / 255)).float().mean((2, 3)),)

    return utils.collect(predict, loader, machine, "features")[0]


def fit_probe(features: Tensor, labels: Tensor, n_classes: int, weight_decay: float) -> nn.Linear:
    """Multinomial logistic regression of labels [N] on features [N, D], by up to 500 steps of L-BFGS."""
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


@torch.no_grad()
def probabilities_of(probe: nn.Linear, features: Tensor) -> Tensor:
    """Probabilities [N, 1, C] that the probe gives features [N, D]."""
    return probe(features).softmax(-1).unsqueeze(1)


def write_predictions(path: Path, args: Namespace, images: ImageList, probabilities: Tensor, estimate: str) -> None:
    """Write the predictions, with the columns of those of main.py. probabilities: [N, 1, C]."""
    nowhere = torch.empty(len(probabilities), 0, 2)
    utils.write_table(path, estimate_rows(args, images, estimate, probabilities[:, 0], nowhere))


def publish(
    args: Namespace, machine: Machine, name: str, estimate: str, test: ImageList, probabilities: Tensor, **more: Any
) -> None:
    """Score a rival on the test images, and write NAME.json and predictions_NAME.csv, as main.py does for a classifier.

    name: "<subject>_...", NAME above without the folder of data. estimate: what to call it. probabilities: [N, 1, C].
    more: entries of the JSON.
    """
    n_images, subject = len(test.files), name.partition("_")[0]
    name = f"{name}_{args.data_dir.resolve().name}"
    figures = scores(probabilities, torch.tensor(test.labels))
    machine.print(f"test:       {utils.describe_accuracy(figures['accuracy'], n_images)}")
    if machine.rank == 0:
        figures_path, table_path = args.save_dir / f"{name}.json", args.save_dir / f"predictions_{name}.csv"
        write_predictions(table_path, args, test, probabilities, estimate)
        utils.write_results(figures_path, args, machine, {subject: {estimate: figures}}, images=n_images, **more)
        machine.print(f"figures: {figures_path}, predictions: {table_path}")


def main(argv: list[str] | None = None) -> None:
    """Extract features, fit probes, choose one on the validation images, and test it."""
    args = make_parser().parse_args(argv)
    machine, side = utils.set_up_machine(args), args.patch_size
    utils.prepare_folder(args.save_dir)
    torch.manual_seed(args.seed)
    backbone = build_backbone(args.arch)
    earlier = pretrain.load_initial_weights(backbone, args.weights, args.arch)
    train, valid, data = dataset.read_training_data(args, machine)
    seen = dataset.seen_by(earlier.get("data", {}), ("training",))
    dataset.refuse_seen_images(valid, seen, Path(args.weights), "validation")
    known = {"data": data, "backbone": earlier}
    test, n_seen = dataset.read_test_list(args, machine, known, Path(f"the probe of {args.weights}"))
    backbone.to(machine.device, memory_format=torch.channels_last)
    features = [image_features(backbone, images, args, machine) for images in (train, valid, test)]
    mean, std = features[0].mean(0), features[0].std(0).clamp_min(1e-6)
    (train_x, train_y), (valid_x, valid_y), (test_x, _) = [
        ((x - mean) / std, torch.tensor(images.labels)) for x, images in zip(features, (train, valid, test))
    ]
    probes = {decay: fit_probe(train_x, train_y, len(train.class_names), decay) for decay in WEIGHT_DECAYS}
    on_valid = {decay: scores(probabilities_of(probe, valid_x), valid_y) for decay, probe in probes.items()}
    best = max(on_valid, key=lambda decay: on_valid[decay]["accuracy"])
    probabilities = probabilities_of(probes[best], test_x)
    thresholds = stopping_thresholds(probabilities_of(probes[best], valid_x))  # for a cascade of two probes
    machine.print(f"{NAME} of the central square at {side} pixels, features of {args.weights} weights")
    accuracy = utils.describe_accuracy(on_valid[best]["accuracy"], len(valid_y))
    machine.print(f"validation: {accuracy}, weight decay {best:g}")
    net = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), probes[best]).to("meta")
    cost = {NAME: utils.multiply_adds(lambda: net(torch.empty(1, 3, side, side, device="meta")))}
    name = f"probe_{args.arch}_{Path(args.weights).stem}_{side}"
    more = {"images_seen_in_training": n_seen, "multiply_adds": cost, "weight_decay": best, "thresholds": thresholds}
    publish(args, machine, name, NAME, test, probabilities, **more)


if __name__ == "__main__":
    utils.run(main)
