"""Train the recurrent attention model on a pre-trained backbone; test it, draw where it looks, classify images.

    python main.py                                            # train on the backbone of pretrain.py
    python main.py --batch_size 32 --lr 3e-4 --epochs 4       # on a laptop: 2 GB of memory, for a quick try
    python main.py --resume_training=True                     # continue after the last finished epoch
    python main.py --task=test                                # score on the test list
    python main.py --task=view_glimpses                       # draw where the model looks
    python main.py --task=predict --images photo.jpg folder/  # classify images

Training reads pt_glimpse_model.tar of pretrain.py and writes saved_model.tar (the best classifier), last.tar (to resume
from) and log.csv under --save_dir. The other tasks need saved_model.tar only. In Python, use `load_classifier`.
"""

import hashlib
import math
import random
from argparse import Namespace
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

import dataset
import pretrain
import utils
from dataset import ImageList
from glimpse import STARTS, draw_contact_sheet, draw_panel, inside, patch_boxes
from model import POLICIES, RecurrentAttention, Rollout, attention_loss, build_backbone, rewards
from utils import Machine, UserError

FILES = ("saved_model.tar", "last.tar", "log.csv", "results_*.json", *(f"predictions_{name}*.csv" for name in POLICIES))
NETWORK = ("k", "start_size", "n_glimpses", "rnn_hidden", "std_dev", "classify_context", "cells")  # the model's
BACKBONE_OF_2018 = {"arch": "resnet50", "patch_size": "96"}  # its file holds only weights
N_BEST = 5  # most probable classes to list
N_ON_SHEET = 40  # images on the contact sheet


def make_parser() -> utils.Parser:
    """The flags of this script."""
    parser = utils.Parser(__doc__)
    parser.add_argument("--task", default="train", choices=["train", "test", "view_glimpses", "predict"], help="task")
    parser.add_shared_flags()
    training = parser.add_argument_group("training of the classifier").add_argument
    training("--backbone", default="", help="file of pretrain.py; if empty, the one in --save_dir%(default)s")
    training("--attention_lr", type=utils.positive, default=1e-4, help="learning rate of the attention after glimpse 1")
    training("--supervision", default="each", choices=["each", "last"], help="train every prediction or only the last")
    network = parser.add_argument_group("network").add_argument
    network("--k", type=utils.positive_count, default=2, help="patches per glimpse")
    network("--start_size", type=int, default=2, choices=STARTS, help="finest patch's side, in quarters of the image")
    network("--n_glimpses", type=utils.positive_count, default=1, help="glimpses per image")
    network("--rnn_hidden", type=utils.positive_count, default=2048, help="hidden units of the LSTM")
    network("--std_dev", type=utils.positive, default=0.2, help="standard deviation of the location, before tanh")
    network("--classify_context", **utils.SWITCH, help="classify the context first, then the glimpses as well")
    network("--cells", type=utils.positive_count, default=2, help="cells per side of the context, up to patch_size/16")
    network("--policy", default="learned", choices=POLICIES,
            help="learned; or a baseline: center, random, grid, oracle (annotated box)")  # fmt: skip
    use = parser.add_argument_group("test, view_glimpses and predict").add_argument
    use("--images", type=Path, nargs="+", metavar="PATH", help="images to predict, or folders of them")
    use("--imgs_dir", type=Path, default=Path("imgs"), help="folder for drawings")
    use("--n_samples", type=utils.positive_count, default=20, help="images to draw in view_glimpses")
    use("--n_trajectories", type=utils.positive_count, default=7, help="sampled trajectories to average over")
    use("--stop_at", type=utils.fraction_or_one, default=1.0, help="to predict or draw: stop above this probability")
    return parser


# --- training
def look_at(noise: Tensor, boxes: Tensor, policy: str) -> Tensor:
    """The noise [B, M, T, 2] for the network; for "oracle" the middle of the first box, the largest, of [B, n, 4]."""
    location = (boxes[:, 0, :2] + boxes[:, 0, 2:] - 1).nan_to_num(0)  # without a box, the middle of the image
    return location.view(-1, 1, 1, 2).expand_as(noise) if policy == "oracle" else noise


def training_noise(args: Namespace, n_images: int, epoch: int, machine: Machine) -> Tensor:
    """Noise of the images that `TrainSampler` gives this process, [n, 1, T, 2], drawn from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(random.Random(f"gaze {args.seed} {epoch}").getrandbits(32))
    noise = torch.randn(n_images, 1, args.n_glimpses, 2, generator=generator)
    return noise[machine.rank :: machine.world_size][: n_images // machine.world_size]


def train_one_epoch(
    net: nn.Module, data: DataLoader, noise: Tensor, args: Namespace, optimizer: Optimizer, machine: Machine, title: str
) -> dict[str, float]:
    """One pass over the training images. Returns means of the loss, its terms and other metrics."""
    net.train()
    with utils.Meter(title, data, machine) as meter:
        for (canvas, boxes, labels, _), eps in zip(data, noise.split(data.batch_size)):
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            eps = look_at(eps, boxes, args.policy).to(machine.device)  # [B, 1, T, 2]
            rollout = net(canvas, eps, args.policy)
            terms = attention_loss(rollout, labels, args.supervision)
            loss = sum(terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watched = {
                "accuracy": rewards(rollout, labels, "each")[:, :, -1].mean(),
                "reward": rewards(rollout, labels, args.supervision).mean(),
                "expected_reward": rollout.baseline.mean(),
                # In sides of the image; a glance, before the glimpses, has no location.
                "distance_from_center": rollout.location[:, :, -args.n_glimpses :].norm(dim=-1).mean() / 2,
            }
            meter.update(len(labels), loss=loss, **terms._asdict(), **watched)
    return meter.means()


def evaluation_noise(policy: str, n_images: int, n_samples: int, n_glimpses: int, seed: int) -> Tensor:
    """Noise [N, M, T, 2] of the trajectories to evaluate, always the same for the same seed.

    "learned": the deterministic trajectory, then n_samples sampled ones; "random": n_samples; else one of zeros.
    """
    samples = torch.randn(n_images, n_samples, n_glimpses, 2, generator=torch.Generator().manual_seed(seed))
    if policy == "random":
        return samples
    deterministic = torch.zeros(n_images, 1, n_glimpses, 2)
    return torch.cat([deterministic, samples], dim=1) if policy == "learned" else deterministic


def evaluate(net: nn.Module, data: DataLoader, noise: Tensor, policy: str, machine: Machine, part: str) -> list[Tensor]:
    """Probabilities [N, M, T, C], locations [N, M, T, 2] and boxes [N, n, 4] of a list, in order. Raises UserError.

    If the context is classified, there are T + 1 probabilities: those after the glance come first.
    """
    net = utils.for_evaluation(net)

    def predict(canvas: Tensor, boxes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        rollout = net(canvas, look_at(noise[index], boxes, policy).to(machine.device), policy)
        return rollout.logits.softmax(-1), rollout.location[:, :, -noise.shape[2] :]

    return utils.collect(predict, data, machine, part)


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, its mean over classes, top-5 accuracy and NLL of probabilities [N, M, C], means over M; labels: [N]."""
    correct = (probabilities.argmax(-1) == labels.unsqueeze(1)).double()  # [N, M]
    best = probabilities.topk(min(5, probabilities.shape[-1])).indices  # [N, M, 5]
    of_truth = probabilities[torch.arange(len(labels)), :, labels].double()  # [N, M]
    means = {
        "accuracy": correct.mean(),
        "mean_per_class": torch.stack([correct[labels == label].mean() for label in labels.unique()]).mean(),
        "top5": (best == labels.view(-1, 1, 1)).any(-1).double().mean(),
        "nll": -of_truth.clamp_min(torch.finfo(torch.float32).tiny).log().mean(),
    }
    return {name: value.item() for name, value in means.items()}


def gaze(location: Tensor, boxes: Tensor) -> dict[str, float]:
    """How well glimpses at location [N, M, 2] look at dogs in boxes [N, n, 4]: means over images with a box, if any.

    hit_rate: how often the center of a glimpse lies in a box. distance_to_dog: to the nearest box's center, in sides.
    """
    known = boxes[:, 0].isfinite().all(-1)
    if not known.any():
        return {}
    places, boxes = location[known].unsqueeze(2), boxes[known].unsqueeze(1)  # [N, M, 1, 2], [N, 1, n, 4]
    offset = (boxes[..., :2] + boxes[..., 2:]) / 2 - (places + 1) / 2
    distance = offset.norm(dim=-1).nan_to_num(math.inf).amin(-1)
    figures = {"hit_rate": inside(places, boxes).any(-1), "distance_to_dog": distance}
    return {name: value.double().mean().item() for name, value in figures.items()}


def by_glimpse(probabilities: Tensor, location: Tensor) -> dict[int, Tensor]:
    """Probabilities of `evaluate` after each glimpse, [N, M, C], by its number: 0 is the glance, if there is one."""
    T = location.shape[2]
    return dict(zip(range(1 + T - probabilities.shape[2], T + 1), probabilities.unbind(2)))


def validate(net: nn.Module, data: DataLoader, noise: Tensor, policy: str, machine: Machine) -> tuple[dict, list]:
    """Figures of one trajectory per image, by name, also after each glimpse; thresholds for `stopping`."""
    probabilities, location, boxes = evaluate(net, data, noise, policy, machine, "validation")
    labels = torch.tensor(data.dataset.images.labels)
    by_subject = measure(policy, probabilities, location, boxes, labels).values()
    figures, *after_each = (next(iter(of_subject.values())) for of_subject in by_subject)
    for t, of_glimpse in zip(by_glimpse(probabilities, location), after_each):
        figures |= {f"{name}_{t}": value for name, value in of_glimpse.items()}
    return figures, stopping_thresholds(probabilities[:, :, :-1])


def stopping_thresholds(probabilities: Tensor) -> list[float]:
    """0, the deciles of the highest probability in each prediction [..., C], and 1; none if there is no prediction."""
    if not probabilities.numel():  # a single glimpse without a glance has no prediction to stop at
        return []
    deciles = probabilities.amax(-1).double().quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.double))
    return [0.0, *deciles.tolist(), 1.0]


def read_backbone(args: Namespace, valid_list: ImageList) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of the pre-trained backbone, and what checkpoints store of it.

    Raises UserError for an unsuitable file, and if the backbone was trained on images of valid_list.
    """
    path = Path(args.backbone) if args.backbone else args.save_dir / pretrain.FILES[0]
    content = utils.load_checkpoint(path, "make it with `python pretrain.py`, or see --backbone", "model_dict")
    if "backbone" in content or ("settings" in content and "versions" not in content):
        raise UserError(f"--backbone {path} is a classifier, or outdated: give pt_glimpse_model.tar of pretrain.py")
    content = {"settings": BACKBONE_OF_2018, "data": {}, **content}
    dataset.refuse_seen_images(valid_list, dataset.seen_by(content["data"], ("training",)), path, "validation")
    source = {"arch": content["settings"]["arch"], "patch_size": int(content["settings"]["patch_size"])}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return content["model_dict"], {**source, "file": str(path), "sha256": sha256, "data": content["data"]}


def build_model(args: Namespace, source: dict[str, Any], n_classes: int, weights: Any = None) -> RecurrentAttention:
    """The network of these flags on a backbone of this source, with its weights or random ones. Raises UserError."""
    backbone = build_backbone(source["arch"])
    if weights is not None:
        utils.load_state(backbone.load_state_dict, weights, source["file"])
    keywords = {name: getattr(args, name) for name in NETWORK}
    try:
        return RecurrentAttention(backbone=backbone, n_classes=n_classes, patch_size=source["patch_size"], **keywords)
    except ValueError as error:  # of flags that do not go together
        raise UserError(str(error)) from None


def train(args: Namespace, machine: Machine, last: dict[str, Any] | None) -> None:
    """Train on a frozen backbone and keep the classifier at its best, the epoch with the lowest NLL on validation."""
    run = utils.Run(args, machine, FILES, last)
    train_list, valid_list, data = dataset.read_training_data(args, machine, last)
    weights, source = (None, last["backbone"]) if last else read_backbone(args, valid_list)
    torch.manual_seed(args.seed)
    model = build_model(args, source, len(train_list.class_names), weights)
    train_loader = dataset.make_loader(train_list, args, machine, model.glimpse.canvas_size, trains=True)
    valid_loader = dataset.make_loader(valid_list, args, machine, model.glimpse.canvas_size)
    model.to(machine.device, memory_format=torch.channels_last)
    optimizer = utils.make_optimizer(*model.parameter_groups())
    run.start(model, optimizer, {"model_dict": model}, data=data, backbone=source)
    model.glimpse.speed_up(machine.dtype, compiles=machine.compiles)
    net = utils.wrap(model, machine)
    valid_noise = evaluation_noise(args.policy, len(valid_list.files), 1, args.n_glimpses, args.seed)[:, :1]
    utils.print_opening(args, machine, model, dataset.describe(train_list, valid_list))
    for epoch in run.epochs:
        title = f"epoch {epoch + 1}/{args.epochs}"
        train_loader.sampler.epoch = epoch
        for group, lr in zip(optimizer.param_groups, (args.lr, args.attention_lr)):
            group["lr"] = utils.learning_rate(lr, args.lr_schedule, epoch, args.epochs)
        noise = training_noise(args, len(train_list.files), epoch, machine)
        means = train_one_epoch(net, train_loader, noise, args, optimizer, machine, title)
        valid, run.stored["thresholds"] = validate(net, valid_loader, valid_noise, args.policy, machine)
        rates = {name: group["lr"] for name, group in zip(("lr", "attention_lr"), optimizer.param_groups)}
        scored = f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.3f}; valid {valid['accuracy']:.3f}"
        run.save(epoch, valid["nll"], f"{title}: {scored}, NLL {valid['nll']:.3f}", train=means, valid=valid, **rates)
    machine.print(f"best classifier: {run.best_path}")
    skip = " --skip_bad_images" if args.skip_bad_images else ""
    machine.print(f"next: python main.py --task=test --save_dir {quote(str(args.save_dir))}{skip}")


# --- test
def estimates(values: Tensor, policy: str) -> dict[str, Tensor]:
    """Group values [N, M, ...] of the trajectories of `evaluation_noise` by how they are turned into a prediction.

    "deterministic": [N, 1, ...]; "sampled trajectory", each on its own: [N, n, ...]; "average of n": [N, 1, ...]. The
    last one is the one to report.
    """
    grouped = {}
    if policy != "random":
        grouped["deterministic"], values = values[:, :1], values[:, 1:]
    if values.shape[1]:
        grouped["sampled trajectory"] = values
        grouped[f"average of {values.shape[1]}"] = values.mean(1, keepdim=True)
    return grouped


def prediction_row(probabilities: Tensor, class_names: list[str], location: Tensor) -> dict[str, Any]:
    """The N_BEST most probable classes of probabilities [C], and where a trajectory looked, location [T, 2]."""
    values, labels = probabilities.sort(descending=True, stable=True)  # the first is that of argmax, also in a tie
    row: dict[str, Any] = {}
    for i, (value, label) in enumerate(zip(values[:N_BEST].tolist(), labels[:N_BEST].tolist()), start=1):
        row |= {f"class_{i}": class_names[label], f"probability_{i}": value}
    for t, place in enumerate(location.tolist(), start=1):
        row |= {f"x_{t}": place[0], f"y_{t}": place[1]}
    return row


def estimate_rows(args: Namespace, images: ImageList, estimate: str, probabilities: Tensor, location: Tensor) -> list:
    """A row, a dict, per image for one estimate: its probabilities are [N, C], and it looked at location [N, T, 2]."""
    rows, names = [], images.class_names
    for file, truth, p, places in zip(images.files, images.labels, probabilities, location):
        row = {"file": file.relative_to(args.data_dir), "estimate": estimate, "true_class": names[truth]}
        rows.append({**row, "true_probability": p[truth].item(), **prediction_row(p, names, places)})
    return rows


def prediction_rows(args: Namespace, images: ImageList, probabilities: Tensor, location: Tensor) -> list[dict]:
    """A row per image and estimate: the deterministic one, the average, then the former after each earlier glimpse.

    probabilities: [N, M, T, C], or T + 1 with a glance; location: [N, M, T, 2].
    """
    rows, earlier = [], by_glimpse(probabilities, location)
    after = estimates(earlier.pop(location.shape[2]), args.policy)
    after.pop("sampled trajectory", None)
    if "deterministic" in after:
        after |= {f"after glimpse {t}": answers[:, :1] for t, answers in earlier.items()}
    for estimate, values in after.items():
        seen = location[:, 0] if estimate == "deterministic" else torch.full_like(location[:, 0], math.nan)
        rows += estimate_rows(args, images, estimate, values[:, 0], seen)
    return rows


def measure(policy: str, probabilities: Tensor, location: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Any]:
    """Figures by subject and estimate: scores after the last glimpse; accuracy, NLL and gaze after each.

    probabilities: [N, M, T, C], or T + 1 with a glance, which is called glimpse 0; location: [N, M, T, 2]; boxes of the
    dogs: [N, n, 4]; labels: [N].
    """
    figures: dict[str, Any] = {f"policy {policy}": {}}
    for t, of_all in by_glimpse(probabilities, location).items():
        places, of_glimpse = estimates(location[:, :, t - 1], policy), {}
        for name, answers in estimates(of_all, policy).items():
            figures[f"policy {policy}"][name] = after = scores(answers, labels)
            of_glimpse[name] = {"accuracy": after["accuracy"], "nll": after["nll"]}
            if t and not name.startswith("average"):  # of trajectories, each with a place of its own
                of_glimpse[name]["distance_from_center"] = places[name].norm(dim=-1).mean().item() / 2
                of_glimpse[name] |= gaze(places[name], boxes)
        figures[f"glimpse {t}"] = of_glimpse
    return figures


def stopping(probabilities: Tensor, labels: Tensor, thresholds: list[float], costs: list[int]) -> list[dict[str, Any]]:
    """Accuracy against mean multiply-adds if each image stops at its first prediction above a threshold.

    probabilities: [N, T, C], of one trajectory; labels: [N]; costs: multiply-adds up to each of the T predictions.
    """
    sure, curve = probabilities.amax(-1), []  # [N, T]
    correct = (probabilities.argmax(-1) == labels.unsqueeze(1)).double()
    for threshold in thresholds:
        stops = sure > threshold
        stops[:, -1] = True
        step = stops.int().argmax(1, keepdim=True)  # the first that stops
        accuracy, cost = correct.gather(1, step).mean().item(), torch.tensor(costs)[step].double().mean().item()
        curve.append({"stop_at": threshold, "accuracy": accuracy, "multiply_adds": cost})
    return curve


def report(figures: dict[str, Any], n_images: int, n_classes: int, machine: Machine) -> None:
    """Print the figures of `measure`."""
    hidden = ("accuracy",) if n_classes > 5 else ("accuracy", "top5")
    for subject, of_subject in figures.items():
        for estimate, values in of_subject.items():
            correct = f"{values['accuracy']:.1%} correct"
            if estimate != "sampled trajectory":  # a mean over trajectories, so that no count of images applies
                correct = utils.describe_accuracy(values["accuracy"], n_images)
            others = (f"{name} {value:.4f}" for name, value in values.items() if name not in hidden)
            machine.print(f"{subject:15}{estimate:20}" + "  ".join([correct, *others]))


def multiply_adds(args: Namespace, source: dict[str, Any], n_classes: int, n_trajectories: int) -> list[int]:
    """Multiply-adds for one image, up to each prediction, of all networks together. source: that of the backbone."""
    with torch.device("meta"):
        model, costs = build_model(args, source, n_classes).eval(), []
        side = model.glimpse.canvas_size
        canvas = torch.empty(1, 3, side, side, dtype=torch.uint8)
        noise = torch.empty(1, n_trajectories, args.n_glimpses, 2)
        for model.n_glimpses in range(1 - args.classify_context, args.n_glimpses + 1):
            costs.append(utils.multiply_adds(lambda: model(canvas, noise, args.policy)))
    return costs


def test(args: Namespace, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Score the best classifier on the test list, and write figures and predictions under --save_dir."""
    images, n_seen = dataset.read_test_list(args, machine, checkpoint, args.save_dir / FILES[0])
    n_images, names, policy, epoch = len(images.files), images.class_names, args.policy, checkpoint["epoch"] + 1
    known = f"boxes for {sum(map(bool, images.annotations)):,} of {n_images:,} images; {images.split_rule}"
    machine.print(f"{n_images:,} test images of {args.data_dir}, classifier of epoch {epoch}; {known}")
    model = Classifier(args, machine, checkpoint).model
    loader = dataset.make_loader(images, args, machine, model.glimpse.canvas_size)
    noise = evaluation_noise(policy, n_images, args.n_trajectories, args.n_glimpses, args.seed)
    probabilities, location, boxes = evaluate(utils.wrap(model, machine), loader, noise, policy, machine, "test")
    labels = torch.tensor(images.labels)
    figures = measure(policy, probabilities, location, boxes, labels)
    report(figures, n_images, len(names), machine)
    if machine.rank == 0:
        name, source = policy + utils.name_of_other_data(args, checkpoint), checkpoint["backbone"]
        table_path, figures_path = args.save_dir / f"predictions_{name}.csv", args.save_dir / f"results_{name}.json"
        utils.write_table(table_path, prediction_rows(args, images, probabilities, location))
        sizes = {name: args.n_trajectories if name.startswith("average") else 1 for name in figures[f"policy {policy}"]}
        more = {"images": n_images, "images_seen_in_training": n_seen, "epoch": epoch}
        costs = {n: multiply_adds(args, source, len(names), n) for n in {1, *sizes.values()}}
        more["multiply_adds"] = {name: costs[n][-1] for name, n in sizes.items()}
        more["stopping"] = stopping(probabilities[:, 0], labels, checkpoint.get("thresholds", []), costs[1])
        for point in more["stopping"]:
            right, cost = utils.describe_accuracy(point["accuracy"], n_images), point["multiply_adds"] / 1e9
            machine.print(f"stopping above {point['stop_at']:.6f}: {right}  {cost:.2f}e9 multiply-adds")
        more["backbone"] = {name: source[name] for name in ("arch", "patch_size", "file", "sha256")}
        utils.write_results(figures_path, args, machine, figures, **more)
        machine.print(f"figures: {figures_path}, predictions: {table_path}")
    folders = f"--data_dir {quote(str(args.data_dir))} --save_dir {quote(str(args.save_dir))}"
    machine.print(f"next: python main.py --task=view_glimpses {folders}")


# --- drawings and predictions
class Prediction(NamedTuple):
    """Prediction for one image, among C classes, after T glimpses."""

    probabilities: Tensor  # [C], of the best estimate
    estimate: str  # its name: "average of n" over the sampled trajectories where the policy has any, and does not stop
    location: Tensor  # [T, 2], centers of the drawn trajectory's glimpses: (x, y) in (-1, 1), x to the right, y down
    attention: Tensor | None  # [T, c c], over the cells of the context, row by row; of policy "learned" only
    drawn: Tensor  # [T, C], or T + 1 with a glance, of the drawn trajectory: deterministic or, if "random", sampled
    canvas: Tensor  # uint8 [3, S, S], the central square of the image
    boxes: Tensor  # [n, 4], of annotated dogs, as fractions of the canvas side


class Classifier:
    """The best network of a run, in eval mode on the device, to classify one image at a time."""

    def __init__(self, args: Namespace, machine: Machine, checkpoint: dict[str, Any]) -> None:
        self.args, self.machine = args, machine
        self.class_names: list[str] = checkpoint["data"]["class_names"]
        self.model = build_model(args, checkpoint["backbone"], len(self.class_names))
        utils.load_state(self.model.load_state_dict, checkpoint["model_dict"], args.save_dir / FILES[0])
        self.model.to(machine.device, memory_format=torch.channels_last).eval()
        self.model.glimpse.speed_up(machine.dtype, compiles=machine.compiles)
        # The same for every image, so that a prediction does not depend on the other images.
        self.noise = evaluation_noise(args.policy, 1, args.n_trajectories, args.n_glimpses, args.seed)
        if args.stop_at < 1:  # several trajectories would stop at different glimpses
            self.noise = self.noise[:, :1]

    @torch.no_grad()
    def __call__(self, image: Image.Image | str | Path, annotation: Path | None = None) -> Prediction:
        """Classify a PIL image, which is left as it is, or a file, of any size. Raises UserError for a broken file.

        A large JPEG file is decoded at a smaller size: its prediction differs slightly from that of an opened image.
        """
        policy, device, size = self.args.policy, self.machine.device, self.model.glimpse.canvas_size
        if policy == "oracle" and annotation is None:
            raise UserError("--policy oracle looks at annotated dogs: choose another to classify other images")
        if isinstance(image, Image.Image):
            upright, boxes = dataset.to_rgb(image.copy()), torch.empty(0, 4)
        else:
            upright, boxes = dataset.read_image(image, size, annotation)
        canvas, boxes = dataset.crop_to_canvas(upright, boxes, size)
        noise = look_at(self.noise, boxes.unsqueeze(0), policy).to(device)
        net = utils.MixedPrecision(self.model, self.machine)
        rollout = Rollout(*(v.cpu() for v in net(canvas.unsqueeze(0).to(device), noise, policy, self.args.stop_at)))
        drawn = rollout.logits.softmax(-1)  # [1, M, T, C]
        estimate, best = list(estimates(drawn[:, :, -1], policy).items())[-1]
        glimpses = slice(int(self.args.classify_context), None)  # the glance has no location
        attention = rollout.attention[0, 0, glimpses] if policy == "learned" else None
        boxes, location = boxes[boxes.isfinite().all(-1)], rollout.location[0, 0, glimpses]
        return Prediction(best[0, 0], estimate, location, attention, drawn[0, 0], canvas, boxes)

    def caption(self, prediction: Prediction, truth: int | None = None) -> str:
        """What the drawn trajectory predicts, and the truth with its probability, if known."""
        drawn, names = prediction.drawn[-1], self.class_names
        text = f"predicted {names[drawn.argmax()]} ({drawn.max():.2f})"
        return text if truth is None else f"{text}, true {names[truth]} ({drawn[truth]:.2f})"

    def draw(self, prediction: Prediction, title: str, truth: int | None = None) -> Image.Image:
        """Draw where the trajectory looked. truth: the label, if known."""
        glimpse, policy = self.model.glimpse, self.args.policy
        trajectory = "one sampled trajectory" if policy == "random" else "deterministic trajectory"
        caption = f"{title}: {policy} policy, {trajectory}\n{self.caption(prediction, truth)}"
        after = [f"{self.class_names[p.argmax()]} ({p.max():.2f})" for p in prediction.drawn]
        where = prediction.location, prediction.attention, glimpse.scales, glimpse.patch_size
        return draw_panel(prediction.canvas, *where, caption, after, prediction.boxes)


def load_classifier(save_dir: str | Path, **flags: Any) -> Classifier:
    """The trained classifier in save_dir. flags: of `--task=predict`, such as device="cpu". Raises UserError."""
    argv = [f"--{name}={value}" for name, value in {**flags, "save_dir": save_dir, "task": "predict"}.items()]
    args, checkpoint = utils.parse_flags(make_parser(), argv, FILES, NETWORK)
    return Classifier(args, utils.set_up_machine(args), checkpoint)


def fixed_choice(n_images: int, n_chosen: int, seed: int) -> list[int]:
    """Indices of some images of a list, always the same for the same seed; a longer one begins with a shorter one."""
    order = list(range(n_images))
    random.Random(f"view {seed}").shuffle(order)
    return order[:n_chosen]


def drawing_paths(folder: Path, files: list[Path]) -> list[Path]:
    """Paths in a folder for drawings, named after their files, with a number where needed. Raises UserError."""
    paths = {folder / "contact_sheet.jpg": None}  # a dict, which keeps the order
    for file in files:
        if file.resolve().parent == folder.resolve():  # a drawing could replace it
            raise UserError(f"--imgs_dir {folder} holds the image {file.name}: choose another folder for drawings")
        numbered = (folder / f"{file.stem[:50]}{f'_{n}' if n else ''}.jpg" for n in range(len(paths) + 1))
        paths[next(path for path in numbered if path not in paths)] = None
    return list(paths)[1:]


def save_image(path: Path, image: Image.Image) -> None:
    """Write a drawing as a JPEG, completely or not at all. Raises UserError."""
    utils.prepare_folder(path.parent)
    with utils.replacing(path, mode="wb") as file:
        image.save(file, "JPEG", quality=95, subsampling=0)


def view_glimpses(args: Namespace, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Draw where the best classifier looks in test images that depend on the seed alone."""
    images, _ = dataset.list_test_images(args.data_dir, checkpoint, args.save_dir / FILES[0])
    if args.policy == "oracle":
        images = images.subset(i for i, annotation in enumerate(images.annotations) if annotation)
    images = images.subset(fixed_choice(len(images.files), args.n_samples, args.seed))
    [images] = dataset.check_images(args, machine, images)
    if not images.files:
        raise UserError(f"--data_dir: {args.data_dir} has no test images to draw with --policy {args.policy}")
    classifier, sheet = Classifier(args, machine, checkpoint), []
    glimpse, paths = classifier.model.glimpse, drawing_paths(args.imgs_dir, images.files)
    rows = [*zip(images.files, images.annotations, images.labels, paths)]
    for file, annotation, label, path in tqdm(rows, "drawing", unit=" images", leave=False, disable=None):
        prediction = classifier(file, annotation)
        save_image(path, classifier.draw(prediction, file.name, label))
        boxes = patch_boxes(prediction.location, glimpse.scales, glimpse.patch_size)
        caption = classifier.caption(prediction, label).replace(", true", "\ntrue")
        sheet.append((prediction.canvas, boxes, caption, prediction.drawn[-1].argmax().item() == label))
    save_image(args.imgs_dir / "contact_sheet.jpg", draw_contact_sheet(*zip(*sheet[:N_ON_SHEET])))
    machine.print(f"{len(images.files)} drawings in {args.imgs_dir}; contact_sheet.jpg has up to {N_ON_SHEET} of them")
    machine.print(f"next: python main.py --task=predict --save_dir {quote(str(args.save_dir))} --images photo.jpg")


def predict(args: Namespace, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Print the five most probable breeds of each image, draw where the model looked, and write a table of both."""
    if not args.images:
        raise UserError("--task=predict needs --images PATH ...")
    files, classifier, rows = dataset.find_images(args.images), Classifier(args, machine, checkpoint), []
    jobs = [*zip(files, drawing_paths(args.imgs_dir, files))]
    for file, path in tqdm(jobs, "predicting", unit=" images", leave=False, disable=None):
        try:
            prediction = classifier(file)
        except dataset.ImageError as error:
            machine.print(f"skipped: {error}")
            continue
        save_image(path, classifier.draw(prediction, file.name))
        n_taken = f" after {len(prediction.location)} of {args.n_glimpses} glimpses" if args.stop_at < 1 else ""
        machine.print(f"{file}: {prediction.estimate}{n_taken} (drawn in {path})")
        untaken = torch.full((args.n_glimpses - len(prediction.location), 2), math.nan)  # glimpses that it did without
        places = torch.cat([prediction.location, untaken])
        row = prediction_row(prediction.probabilities, classifier.class_names, places)
        for i in range(1, min(N_BEST, len(classifier.class_names)) + 1):
            machine.print(f"  {row[f'probability_{i}']:6.1%}  {row[f'class_{i}']}")
        rows.append({"file": file, **row})
    if rows:
        utils.write_table(args.imgs_dir / "predictions.csv", rows)
        machine.print(f"predictions: {args.imgs_dir / 'predictions.csv'}")
    if n_bad := len(files) - len(rows):
        raise UserError(f"{n_bad} of {len(files)} images could not be read and were skipped")


def main(argv: list[str] | None = None) -> None:
    """Read flags and checkpoint, find the device, do the task."""
    args, checkpoint = utils.parse_flags(make_parser(), argv, FILES, NETWORK)
    machine = utils.set_up_machine(args)
    tasks = {"train": train, "test": test, "view_glimpses": view_glimpses, "predict": predict}
    tasks[args.task](args, machine, checkpoint)


if __name__ == "__main__":
    utils.run(main)
