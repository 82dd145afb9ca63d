"""Does it matter where a trained classifier looks? Test it at other places than those of its own gaze.

    python tests/controls.py --save_dir DIR                                  # a classifier of policy "learned"
    python tests/controls.py --save_dir DIR --other predictions_center.csv   # also compare it with another

The same network gets its glimpses at the places of its deterministic gaze, at those of another test image, at the mean
of all its places, at the center of the image and, with annotations, in the middle of the dog (without a box, at the
center). The differences in accuracy are paired, with their 95 % intervals; with annotations, also by thirds of the
dog's size and of its distance from the center. Under --save_dir it writes predictions_learned_NAME.csv of each control.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from plot import paired, read_predictions
from probe import write_predictions

import dataset
import main as classifier
import utils
from utils import UserError

OWN = "own gaze"


def make_parser() -> utils.Parser:
    """The flags of main.py that a test takes, and --other."""
    parser = classifier.make_parser()
    parser.description, parser.epilog = __doc__, None
    parser.add_argument("--other", type=Path, help="predictions_*.csv of another classifier on the same images")
    return parser


def places_of(own: Tensor, boxes: Tensor, seed: int) -> dict[str, Tensor]:
    """Where each control looks, like the own gaze [N, 1, T, 2]. boxes [N, n, 4]: of the dogs, the largest first."""
    shift = 1 + torch.randperm(len(own) - 1, generator=torch.Generator().manual_seed(seed))[0].item()
    places = {
        OWN: own,
        "gaze of another image": own.roll(shift, 0),  # at a random distance in the list: none keeps its own
        "mean place": own.mean(0, keepdim=True).expand_as(own),
        "center": torch.zeros_like(own),
    }
    annotated = {"annotated dog": classifier.look_at(own, boxes, "oracle")}
    return places | annotated if boxes.isfinite().any() else places


def thirds(boxes: Tensor) -> dict[str, list[Tensor]]:
    """Indices of the images in each third by size (square root of the area) and by offset of the largest dog's box."""
    known = boxes[:, 0].isfinite().all(-1).nonzero().flatten()  # images with a box
    if len(known) < 3:
        return {}
    edges = boxes[known, 0]
    offset = ((edges[:, :2] + edges[:, 2:]) / 2 - 0.5).norm(dim=-1)
    values = {"dog's size": (edges[:, 2:] - edges[:, :2]).prod(-1).sqrt(), "dog's distance from the center": offset}
    return {name: list(known[value.argsort(stable=True)].tensor_split(3)) for name, value in values.items()}


def compare(right: dict[str, Tensor], boxes: Tensor, machine: utils.Machine) -> None:
    """Print accuracies, and how far the own gaze is ahead of each control, in all images and in thirds of them."""
    for name, answers in right.items():
        ahead, spread = paired(right[OWN].tolist(), answers.tolist())
        difference = "" if name == OWN else f"; the own gaze is ahead by {100 * ahead:.1f} ± {100 * spread:.1f} points"
        machine.print(f"{name:26}{answers.double().mean():6.1%} right{difference}")
    for measure, parts in thirds(boxes).items():
        for name in [name for name in right if name != OWN]:
            by_third = [paired(right[OWN][part].tolist(), right[name][part].tolist()) for part in parts]
            shown = ", ".join(f"{100 * ahead:.1f} ± {100 * spread:.1f}" for ahead, spread in by_third)
            machine.print(f"ahead of {name} by {measure}, smallest third first: {shown}")


def main(argv: list[str] | None = None) -> None:
    """Test at the places of each control, write the predictions, and compare."""
    argv = [*(sys.argv[1:] if argv is None else argv), "--task=test"]
    args, checkpoint = utils.parse_flags(make_parser(), argv, classifier.FILES, classifier.NETWORK)
    if args.policy != "learned":
        raise UserError(f"--policy {args.policy}: only a learned gaze has places of its own to exchange")
    machine = utils.set_up_machine(args)
    images, _ = dataset.read_test_list(args, machine, checkpoint, args.save_dir / classifier.FILES[0])
    if len(images.files) < 2:
        raise UserError(f"--data_dir: {args.data_dir} has one test image, which has no other to exchange its gaze with")
    model = classifier.Classifier(args, machine, checkpoint).model
    net, labels = utils.wrap(model, machine), torch.tensor(images.labels)
    loader = dataset.make_loader(images, args, machine, model.glimpse.canvas_size)
    noise = torch.zeros(len(labels), 1, args.n_glimpses, 2)
    _, own, boxes = classifier.evaluate(net, loader, noise, "learned", machine, OWN)
    right, other_data = {}, utils.name_of_other_data(args, checkpoint)
    for name, places in places_of(own, boxes, args.seed).items():

        def predict(canvas: Tensor, _: Tensor, index: Tensor, places: Tensor = places) -> tuple[Tensor]:
            return (net(canvas, places[index].to(machine.device), "oracle").logits[:, :, -1].softmax(-1),)

        probabilities = utils.collect(predict, loader, machine, name)[0]  # [N, 1, C]
        right[name] = probabilities[:, 0].argmax(-1) == labels
        path = args.save_dir / f"predictions_learned_{name.replace(' ', '_')}{other_data}.csv"
        write_predictions(path, args, images, probabilities, name)
    if args.other:
        table, _ = read_predictions(args.other, None)
        files = [str(file.relative_to(args.data_dir)) for file in images.files]
        if missing := [file for file in files if file not in table]:
            raise UserError(f"--other {args.other} lacks {missing[0]}: it must be of the same test images")
        right[args.other.stem] = torch.tensor([table[file][0] == table[file][1] for file in files])
    compare(right, boxes, machine)


if __name__ == "__main__":
    utils.run(main)
