"""Train the recurrent attention model on a pre-trained backbone; test it, draw where it looks, classify images.

    python main.py                                            # train on the backbone of pretrain.py
    python main.py --batch_size 32 --lr 3e-4 --epochs 10      # in 2 GB of memory, for a first impression
    python main.py --resume_training=True                     # continue after the last saved epoch
    python main.py --task=test                                # score on the test list
    python main.py --task=view_glimpses                       # draw where the model looks
    python main.py --task=predict --images photo.jpg folder/  # classify images

Training reads pt_glimpse_model.tar of pretrain.py and writes saved_model.tar (the best classifier), last.tar (to resume
from) and log.csv under --save_dir. The other tasks need saved_model.tar only. In Python, use `load_classifier`.
"""

if __name__ == "__main__":  # Ctrl-C ends the script quietly while PyTorch is imported, which takes seconds
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import hashlib
import math
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import dataset
import pretrain
import utils
from dataset import ImageList
from glimpse import STARTS, coverage, draw_contact_sheet, draw_panel, inside, patch_boxes, patch_scales
from model import (
    POLICIES,
    SUPERVISIONS,
    GlimpseNetwork,
    RecurrentAttention,
    Rollout,
    attention_loss,
    build_backbone,
    rewards,
)
from utils import Machine, UserError, file_setting, network_setting, setting, training_setting

FILES = ("saved_model.tar", "last.tar", "log.csv")
BACKBONE_OF_2018 = {"arch": "resnet50", "patch_size": 96}  # its file holds only the weights
N_BEST = 5  # most probable classes to list
N_CONFUSED = 10  # pairs of classes that test names
N_ON_SHEET = 40  # images on the contact sheet
N_PLACES = 12  # along each axis, that stand for glimpses anywhere in the image
N_WATCHED = 8  # validation images that TensorBoard shows after every epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(utils.SharedSettings):
    """Settings of this script, each of them a flag."""

    task: str = setting(
        "train", "task to run", utils.TASK, stored=False, one_of=("train", "test", "view_glimpses", "predict")
    )
    images: tuple[Path, ...] = setting((), "images, or folders of them", utils.TASK, tasks="predict", stored=False)
    n_trajectories: int = setting(
        7, "sampled trajectories to average over", utils.TASK, tasks="test predict", stored=False, at_least=1
    )
    n_samples: int = setting(20, "images to draw", utils.TASK, tasks="view_glimpses", stored=False, at_least=1)
    backbone: str = file_setting(
        "", "checkpoint of pretrain.py (default: pt_glimpse_model.tar in --save_dir)", tasks="train", fixed="always"
    )
    imgs_dir: Path = file_setting(Path("imgs"), "folder for drawings", tasks="view_glimpses predict", stored=False)
    seed: int = utils.seed_setting()
    attention_lr: float = training_setting(1e-4, "learning rate of the attention after the first glimpse", above=0)
    supervision: str = training_setting(
        "each", "train and reward every prediction or only the last", fixed="always", one_of=SUPERVISIONS
    )
    k: int = network_setting(2, "patches per glimpse", at_least=1)
    start_size: int = network_setting(2, "quarters of the image side that the finest patch covers", one_of=STARTS)
    n_glimpses: int = network_setting(1, "glimpses per image", at_least=1)
    rnn_hidden: int = network_setting(2048, "hidden units of the LSTM", at_least=1)
    std_dev: float = network_setting(0.2, "standard deviation of the sampled location, before tanh", above=0)
    classify_context: bool = network_setting(False, "let the LSTM read the context's features beside the glimpse's")
    policy: str = network_setting(
        "learned", "where to look; the others are rivals to compare with", fixed="resuming", one_of=POLICIES
    )


# --- training


def at_the_dogs(boxes: Iterable[Tensor], n_glimpses: int) -> Tensor:
    """What policy "oracle" takes for noise, [N, 1, T, 2]: the locations of the dogs with these boxes, N x [n, 4]."""
    location = torch.stack([dataset.location_of_dog(of_image) for of_image in boxes])
    return location.view(-1, 1, 1, 2).expand(-1, -1, n_glimpses, -1)


def read_dogs(settings: Settings, images: ImageList) -> list[dataset.Dogs]:
    """The annotated dogs in each image. Raises UserError if the policy needs them and there are none."""
    dogs = dataset.read_dogs(images)
    if settings.policy == "oracle" and not any(len(one.boxes) for one in dogs):
        raise UserError(f"--policy oracle looks at annotated dogs: there are none in {settings.data_dir}/Annotation")
    return dogs


def training_noise(
    dogs: list[dataset.Dogs], sampler: dataset.TrainSampler, settings: Settings, epoch: int, machine: Machine
) -> Tensor:
    """Noise of the images that the sampler gives this process, [n, 1, T, 2], drawn from (seed, epoch) alone.

    For policy "oracle": the locations of the dogs in these images. dogs: in all images, for this policy only.
    """
    if settings.policy == "oracle":
        boxes = (dataset.boxes_on_canvas(dogs[index], draw) for index, draw in sampler)
        return at_the_dogs(boxes, settings.n_glimpses)
    generator = torch.Generator().manual_seed(random.Random(f"gaze {settings.seed} {epoch}").getrandbits(32))
    noise = torch.randn(sampler.n_images, 1, settings.n_glimpses, 2, generator=generator)
    return noise[machine.rank :: machine.world_size][: len(sampler)]


def distance_from_center(location: Tensor) -> Tensor:
    """Distance of glimpses from the centre of the image, in sides of the image. [..., 2] -> [...]."""
    return location.norm(dim=-1) / 2


def train_one_epoch(
    net: nn.Module,
    loader: DataLoader,
    noise: Tensor,
    settings: Settings,
    optimizer: Optimizer,
    machine: Machine,
    title: str,
) -> dict[str, float]:
    """One pass over the training images. Returns means of the loss terms, accuracy, reward and distance."""
    net.train()
    with utils.Meter(title, loader, machine, optimizer) as meter:
        for (canvas, labels, _), eps in zip(loader, noise.to(machine.device).split(loader.batch_size)):
            canvas = canvas.to(machine.device, non_blocking=True)  # [B, 3, S, S]
            labels = labels.to(machine.device, non_blocking=True)  # [B]
            rollout = net(canvas, eps, settings.policy)
            terms = attention_loss(rollout, labels, settings.supervision)
            loss = sum(terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watched = {
                "accuracy": rewards(rollout, labels, "each")[:, :, -1].mean(),
                "reward": rewards(rollout, labels, settings.supervision).mean(),
                "expected_reward": rollout.baseline.mean(),
                "distance_from_center": distance_from_center(rollout.location).mean(),
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


def noise_for(dogs: list[dataset.Dogs], settings: Settings, n_samples: int) -> Tensor:
    """Noise of `evaluation_noise` for images with these dogs, or what policy "oracle" takes for it."""
    if settings.policy == "oracle":
        return at_the_dogs(map(dataset.boxes_on_canvas, dogs), settings.n_glimpses)
    return evaluation_noise(settings.policy, len(dogs), n_samples, settings.n_glimpses, settings.seed)


def single_noise(dogs: list[dataset.Dogs], settings: Settings) -> Tensor:
    """Noise [N, 1, T, 2] of one trajectory per image: sampled if the policy is random, else deterministic."""
    return noise_for(dogs, settings, n_samples=1)[:, :1]


def evaluate(
    net: nn.Module, loader: DataLoader, noise: Tensor, policy: str, machine: Machine, title: str
) -> list[Tensor]:
    """Probabilities [N, M, T, C] after every glimpse and locations [N, M, T, 2] for a list, in its order.

    noise: [N, M, T, 2]. Raises UserError unless each image is predicted once, in finite numbers.
    """
    net = utils.for_evaluation(net)

    def predict(canvas: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        rollout = net(canvas, noise[index].to(machine.device), policy)
        return rollout.logits.softmax(-1), rollout.location

    return utils.collect(predict, loader, machine, title)


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, its mean over classes, top-5 accuracy and NLL, each a mean over the M trajectories.

    probabilities: [N, M, C]; labels: [N].
    """
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


def gaze(location: Tensor, boxes: Tensor, glimpse: GlimpseNetwork) -> dict[str, float]:
    """How well glimpses at location [N, M, 2] look at the dogs, with boxes [N, n, 4] of `dataset.boxes_of_dogs`.

    hit_rate: how often the centre of a glimpse lies in a dog's box. distance_to_dog: from there to the centre of the
    nearest box, in sides of the image. coverage: the fraction of a dog's box inside the finest patch, of the dog that
    this patch covers best. Each is a mean over the images with a box.
    """
    known = boxes[:, 0].isfinite().all(-1)
    places, boxes = location[known].unsqueeze(2), boxes[known].unsqueeze(1)  # [N, M, 1, 2], [N, 1, n, 4]
    offset = (boxes[..., :2] + boxes[..., 2:]) / 2 - (places + 1) / 2
    patches = patch_boxes(places, glimpse.scales[:1], glimpse.patch_size).squeeze(-2)  # [N, M, 1, 4]
    figures = {
        "hit_rate": inside(places, boxes).any(-1),
        "distance_to_dog": offset.norm(dim=-1).nan_to_num(math.inf).amin(-1),
        "coverage": coverage(patches, boxes).nan_to_num(0).amax(-1),
    }
    return {name: value.double().mean().item() for name, value in figures.items()}


def validate(
    net: nn.Module,
    loader: DataLoader,
    noise: Tensor,
    policy: str,
    machine: Machine,
    boxes: Tensor | None,
    glimpse: GlimpseNetwork,
) -> dict[str, float]:
    """Scores of one trajectory per image after the last glimpse, and its accuracy, NLL and gaze after each.

    boxes of the dogs: as for `gaze`, if known.
    """
    probabilities, location = evaluate(net, loader, noise, policy, machine, "validation")
    labels, each = torch.tensor(loader.dataset.images.labels), {}
    for t in range(location.shape[2]):
        after = scores(probabilities[:, :, t], labels)
        figures = {name: after[name] for name in ("accuracy", "nll")}
        figures |= gaze(location[:, :, t], boxes, glimpse) if boxes is not None else {}
        each |= {f"{name}_{t + 1}": value for name, value in figures.items()}
    return {**after, **each, "distance_from_center": distance_from_center(location).mean().item()}


def read_backbone(
    settings: Settings, valid_list: ImageList, data: dict[str, Any], machine: Machine
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of the pre-trained backbone, and what the classifier's checkpoint stores about it.

    Raises UserError if it was trained on images that are validated on here. Other images are fine, which is said.
    """
    path = Path(settings.backbone) if settings.backbone else settings.save_dir / pretrain.FILES[0]
    content = utils.load_checkpoint(path, "make it with `python pretrain.py`, or see --backbone", model_dict=dict)
    if "backbone" in content:
        raise UserError(f"--backbone {path} is a classifier of main.py: give pt_glimpse_model.tar of pretrain.py")
    content = {"settings": BACKBONE_OF_2018, "data": {}, **content}
    made, its_data = content["settings"], content["data"]
    if not isinstance(made, dict) or not isinstance(its_data, dict):
        raise utils.wrong_kind(path, "it has no valid settings or data")
    dataset.refuse_trained_on(valid_list, data["fingerprints"]["validation"], its_data, path, "validation")
    trained_on = utils.numbers_of(its_data, "fingerprints", "training")
    if set(trained_on.tolist()) != set(data["fingerprints"]["training"].tolist()):
        machine.print(f"note: the backbone in {path} was trained on other images than those to train on now")
    about = {
        "arch": made.get("arch"),
        "patch_size": made.get("patch_size"),
        "file": str(path),
        "trained_on": trained_on,
    }
    return content["model_dict"], {**about, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def build_model(
    settings: Settings, backbone: dict[str, Any], n_classes: int, path: Path, weights: dict[str, Tensor] | None = None
) -> RecurrentAttention:
    """The network of these settings, randomly initialized except for the backbone weights, if given.

    path: the file that describes the backbone. Raises UserError if that is not valid or does not fit the weights.
    """
    for name in ("arch", "patch_size"):
        if wrong := utils.problem(backbone.get(name), pretrain.Settings.__dataclass_fields__[name]):
            raise utils.wrong_kind(path, f"the {name} of its backbone: {wrong}")
    net = build_backbone(backbone["arch"])
    if weights is not None:
        utils.load_state(net.load_state_dict, weights, path)
    names = ("k", "start_size", "n_glimpses", "rnn_hidden", "std_dev", "classify_context")
    keywords = {name: getattr(settings, name) for name in names}
    return RecurrentAttention(backbone=net, n_classes=n_classes, patch_size=backbone["patch_size"], **keywords)


def show_watched(
    run: utils.Run, images: ImageList, dogs: list[dataset.Dogs], model: RecurrentAttention, noise: Tensor, epoch: int
) -> None:
    """Show TensorBoard where the model looks in the same few validation images after every epoch (from 0)."""
    watched = fixed_choice(len(images.files), N_WATCHED, run.settings.seed)
    shown = images.subset(watched), [dogs[i] for i in watched]
    classifier = Classifier(model.eval(), run.settings, run.machine, images.class_names)
    for i, drawing in enumerate(draw_images(*shown, classifier, noise[watched])):
        run.board.add_image(f"validation/{i}", pil_to_tensor(drawing.panel), epoch + 1)


def train(settings: Settings, machine: Machine, last: dict[str, Any] | None) -> None:
    """Train on a frozen backbone and keep the classifier at its best, the epoch with the lowest NLL on validation."""
    run = utils.Run(settings, machine, FILES, "NLL", last)
    train_list, valid_list, data = dataset.read_training_data(
        settings.data_dir, settings.valid_size, **machine.checking(settings)
    )
    weights, backbone = (None, last["backbone"]) if last else read_backbone(settings, valid_list, data, machine)
    run.describe_origin(data=data, backbone=backbone)
    torch.manual_seed(settings.seed)
    path = run.last_path if last else Path(backbone["file"])
    model = build_model(settings, backbone, len(train_list.class_names), path, weights)
    model.to(machine.device, memory_format=torch.channels_last)
    optimizer = utils.make_optimizer(*model.parameter_groups())
    run.restore(model, optimizer)
    model.glimpse.speed_up(machine.dtype, compiles=machine.compiles)
    net = utils.wrap(model, machine)
    loading = machine.loading(settings.batch_size, settings.num_workers) | {"canvas_size": model.glimpse.canvas_size}
    train_loader = dataset.make_training_loader(train_list, settings.seed, settings.smallest_crop, **loading)
    valid_loader = dataset.make_evaluation_loader(valid_list, **loading)
    policy, valid_dogs = settings.policy, read_dogs(settings, valid_list)
    train_dogs = read_dogs(settings, train_list) if policy == "oracle" else []
    valid_noise, boxes = single_noise(valid_dogs, settings), dataset.boxes_of_dogs(valid_dogs)
    with run.training(model, train_list.split_rule, {"model_dict": model}) as epochs:
        if last:
            utils.warn_of_new_schedule(settings, last, machine)
        for epoch in epochs:
            start, title = time.perf_counter(), f"epoch {epoch + 1}/{settings.epochs}"
            train_loader.sampler.epoch = epoch
            for group, lr in zip(optimizer.param_groups, (settings.lr, settings.attention_lr)):
                group["lr"] = utils.learning_rate(lr, settings.lr_schedule, epoch, settings.epochs)
            lr, attention_lr = (group["lr"] for group in optimizer.param_groups)
            noise = training_noise(train_dogs, train_loader.sampler, settings, epoch, machine)
            means = train_one_epoch(net, train_loader, noise, settings, optimizer, machine, title)
            valid = validate(net, valid_loader, valid_noise, policy, machine, boxes, model.glimpse)
            seconds = time.perf_counter() - start
            if run.board:
                show_watched(run, valid_list, valid_dogs, model, valid_noise, epoch)
            figures = {"train": means, "valid": valid, "lr": lr, "attention_lr": attention_lr, "seconds": seconds}
            is_best = run.save(epoch, valid["nll"], model, optimizer, **figures)
            machine.print(
                f"{title}: loss {means['loss']:.3f}, accuracy {means['accuracy']:.3f}; valid "
                f"{valid['accuracy']:.3f}, NLL {valid['nll']:.3f}{' (best)' if is_best else ''}; {seconds:.0f} s"
            )
    machine.print(utils.next_command(settings, "main.py", "--task=test"))


# --- test


def load_model(settings: Settings, checkpoint: dict[str, Any], machine: Machine) -> RecurrentAttention:
    """The best network, in eval mode on the device. Raises UserError if the checkpoint does not fit."""
    path = settings.save_dir / FILES[0]
    model = build_model(settings, checkpoint["backbone"], len(checkpoint["data"]["class_names"]), path)
    utils.load_state(model.load_state_dict, checkpoint["model_dict"], path)
    model.to(machine.device, memory_format=torch.channels_last).eval()
    model.glimpse.speed_up(machine.dtype, compiles=machine.compiles)
    return model


def estimates(values: Tensor, policy: str) -> dict[str, Tensor]:
    """Group values [N, M, ...] of the trajectories of `evaluation_noise` by how they are turned into a prediction.

    "deterministic": [N, 1, ...]; "sampled trajectory", each on its own: [N, n, ...]; "average of n": [N, 1, ...]. The
    last is the best.
    """
    grouped = {}
    if policy != "random":
        grouped["deterministic"], values = values[:, :1], values[:, 1:]
    if values.shape[1]:
        grouped["sampled trajectory"] = values
        grouped[f"average of {values.shape[1]}"] = values.mean(1, keepdim=True)
    return grouped


def most_probable(probabilities: Tensor, class_names: list[str]) -> list[tuple[str, float]]:
    """The N_BEST most probable classes with their probabilities, given probabilities [C]."""
    values, labels = probabilities.sort(descending=True, stable=True)  # the first is that of argmax, also in a tie
    best = zip(values[:N_BEST].tolist(), labels[:N_BEST].tolist())
    return [(class_names[label], value) for value, label in best]


def prediction_header(n_classes: int, n_glimpses: int) -> list[str]:
    """Columns of `prediction_cells`."""
    best = [f"{what}_{i + 1}" for i in range(min(N_BEST, n_classes)) for what in ("class", "probability")]
    return best + [f"{axis}_{t + 1}" for t in range(n_glimpses) for axis in "xy"]


def prediction_cells(best: list[tuple[str, float]], location: Tensor) -> list[Any]:
    """The classes of `most_probable`, and where a trajectory looked, location [T, 2]."""
    return [*(cell for pair in best for cell in pair), *location.flatten().tolist()]


def write_predictions(
    path: Path, images: ImageList, data_dir: Path, probabilities: dict[str, Tensor], location: Tensor
) -> None:
    """Write the prediction of each single-valued estimate for each image, and where a single trajectory looked.

    probabilities: [N, 1, C] by estimate; location: [N, T, 2], of the deterministic trajectory.
    """
    names, rows = images.class_names, []
    for estimate, values in probabilities.items():
        for i, (file, truth) in enumerate(zip(images.files, images.labels)):
            place = location[i] if estimate == "deterministic" else torch.empty(0)
            of_true = [names[truth], values[i, 0, truth].item()]
            predicted = prediction_cells(most_probable(values[i, 0], names), place)
            rows.append([file.relative_to(data_dir), estimate, *of_true, *predicted])
    header = ["file", "estimate", "true_class", "true_probability"]
    utils.write_table(path, [*header, *prediction_header(len(names), location.shape[1])], rows)


def write_accuracy_per_class(path: Path, class_names: list[str], kinds: dict[str, Tensor], labels: Tensor) -> None:
    """Write, for each class among labels [N], its number of images and the accuracy of each estimate.

    kinds: of `estimates` of probabilities [N, M, C].
    """
    correct = {name: (p.argmax(-1) == labels.unsqueeze(1)).double().mean(1) for name, p in kinds.items()}  # [N]
    rows = []
    for label in labels.unique().tolist():
        of_class = labels == label
        accuracies = [values[of_class].mean().item() for values in correct.values()]
        rows.append([class_names[label], int(of_class.sum()), *accuracies])
    utils.write_table(path, ["class", "images", *(name.replace(" ", "_") for name in correct)], rows)


def confusion_matrix(predictions: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Numbers of images [C, C] by true and by predicted class, of predictions [N] and labels [N]."""
    return torch.bincount(labels * n_classes + predictions, minlength=n_classes**2).view(n_classes, n_classes)


def most_confused(matrix: Tensor, class_names: list[str]) -> list[str]:
    """The N_CONFUSED most frequent confusions of two classes, in words, from a confusion matrix [C, C]."""
    sizes, n_classes = matrix.sum(1), len(class_names)
    counts, places = matrix.clone().fill_diagonal_(0).flatten().sort(descending=True, stable=True)
    lines = []
    for n, place in zip(counts[:N_CONFUSED].tolist(), places.tolist()):
        truth, predicted = divmod(place, n_classes)
        if n:
            lines.append(f"{class_names[truth]} taken for {class_names[predicted]}: {n} of {sizes[truth]}")
    return lines


def measure(
    policy: str, probabilities: Tensor, location: Tensor, labels: Tensor, boxes: Tensor | None, glimpse: GlimpseNetwork
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by subject and estimate: scores of the policy, and after each glimpse where it looked, and how well.

    probabilities: [N, M, T, C]; location: [N, M, T, 2]; labels: [N]; boxes of the dogs: as for `gaze`, if known.
    """
    final = estimates(probabilities[:, :, -1], policy)
    figures = {f"policy {policy}": {name: scores(values, labels) for name, values in final.items()}}
    for t in range(location.shape[2]):
        answers, of_glimpse = estimates(probabilities[:, :, t], policy), {}
        for name, places in estimates(location[:, :, t], policy).items():
            after = scores(answers[name], labels) if location.shape[2] > 1 else {}
            of_glimpse[name] = {key: value for key, value in after.items() if key in ("accuracy", "nll")}
            if not name.startswith("average"):  # which is of n glimpses at n places
                of_glimpse[name]["distance_from_center"] = distance_from_center(places).mean().item()
                of_glimpse[name] |= gaze(places, boxes, glimpse) if boxes is not None else {}
        figures[f"glimpse {t + 1}"] = {name: values for name, values in of_glimpse.items() if values}
    if boxes is not None:
        axis = torch.linspace(-1, 1, N_PLACES + 1)[:-1] + 1 / N_PLACES
        anywhere = torch.cartesian_prod(axis, axis).expand(len(boxes), -1, -1)
        elsewhere = {"at the centre": torch.zeros(len(boxes), 1, 2), "anywhere at random": anywhere}
        figures["to compare"] = {name: gaze(places, boxes, glimpse) for name, places in elsewhere.items()}
    return figures


def report(figures: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Lines with the figures of `measure`."""
    return [
        f"{subject:15}{estimate:20}" + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        for subject, of_subject in figures.items()
        for estimate, values in of_subject.items()
    ]


def multiply_adds(settings: Settings, backbone: dict[str, Any], n_classes: int, n_trajectories: int) -> int:
    """Multiplications, each with an addition, of all networks on one image."""
    with torch.device("meta"):
        model = build_model(settings, backbone, n_classes, Path(FILES[0])).eval()
        side = model.glimpse.canvas_size
        canvas = torch.empty(1, 3, side, side, dtype=torch.uint8)
        noise = torch.empty(1, n_trajectories, settings.n_glimpses, 2)
        return utils.multiply_adds(lambda: model(canvas, noise, settings.policy))


def write_results(
    settings: Settings,
    machine: Machine,
    checkpoint: dict[str, Any],
    images: ImageList,
    kinds: dict[str, Tensor],
    location: Tensor,
    figures: dict[str, dict[str, dict[str, float]]],
) -> list[str]:
    """Write what `test` found under --save_dir, into files that name the policy. Returns lines that say where.

    kinds: of `estimates` of probabilities [N, M, C]; location: [N, M, T, 2]; figures: of `measure`.
    """
    labels, names = torch.tensor(images.labels), images.class_names
    policy, (*_, (best, answers)) = settings.policy, kinds.items()
    matrix = confusion_matrix(answers[:, 0].argmax(-1), labels, len(names))
    confused = most_confused(matrix, names)
    written = {
        "predictions": settings.save_dir / f"predictions_{policy}.csv",
        "accuracy per class": settings.save_dir / f"per_class_{policy}.csv",
        "confusion matrix": settings.save_dir / f"confusion_{policy}.csv",
        "all figures": settings.save_dir / f"results_{policy}.json",
    }
    if machine.rank == 0:
        single = {name: values for name, values in kinds.items() if name != "sampled trajectory"}
        write_predictions(written["predictions"], images, settings.data_dir, single, location[:, 0])
        write_accuracy_per_class(written["accuracy per class"], names, kinds, labels)
        rows = ([name, *row] for name, row in zip(names, matrix.tolist()))
        utils.write_table(written["confusion matrix"], ["true_class", *names], rows)
        sizes = {name: settings.n_trajectories if name.startswith("average") else 1 for name in kinds}
        costs = {m: multiply_adds(settings, checkpoint["backbone"], len(names), m) for m in set(sizes.values())}
        cost = {name: costs[m] for name, m in sizes.items()}
        about = {name: checkpoint["backbone"].get(name) for name in ("arch", "patch_size", "file", "sha256")}
        origin = {"backbone": about, "epoch": checkpoint["epoch"] + 1}
        utils.write_results(written["all figures"], settings, machine, len(labels), figures, cost, **origin)
    lines = ["\n  ".join([f"most frequent confusions, {best}:", *confused]) if confused else "no confusions"]
    return [*lines, *(f"{what} in {path}" for what, path in written.items())]


def test(settings: Settings, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Score the best classifier on the test list, and write its predictions."""
    images, path, policy = dataset.read_list(settings.data_dir, "test"), settings.save_dir / FILES[0], settings.policy
    utils.refuse_other_classes(checkpoint, images.class_names, settings.data_dir, path)
    [(images, fingerprints)] = dataset.check_images(images, **machine.checking(settings))
    for data in (
        checkpoint["data"],
        {"fingerprints": {"training": checkpoint["backbone"].get("trained_on", torch.empty(0))}},
    ):
        dataset.refuse_trained_on(images, fingerprints, data, path, "test")
    dogs = read_dogs(settings, images)
    boxes = dataset.boxes_of_dogs(dogs)
    model = load_model(settings, checkpoint, machine)
    loading = machine.loading(settings.batch_size, settings.num_workers)
    loader = dataset.make_evaluation_loader(images, canvas_size=model.glimpse.canvas_size, **loading)
    noise = noise_for(dogs, settings, settings.n_trajectories)
    probabilities, location = evaluate(utils.wrap(model, machine), loader, noise, policy, machine, "test")
    machine.print(
        f"{len(images.files):,} test images of {settings.data_dir}, classifier of epoch {checkpoint['epoch'] + 1}\n"
        f"{utils.describe_classes(images.class_names)}; split {images.split_rule}"
    )
    figures = measure(policy, probabilities, location, torch.tensor(images.labels), boxes, model.glimpse)
    machine.print("\n".join(report(figures)))
    if boxes is not None:
        n_known = int(boxes[:, 0].isfinite().all(-1).sum())
        machine.print(f"dogs are annotated in {n_known:,} of {utils.count(len(dogs), 'image')}")
    kinds = estimates(probabilities[:, :, -1], policy)
    machine.print("\n".join(write_results(settings, machine, checkpoint, images, kinds, location, figures)))
    machine.print(utils.next_command(settings, "main.py", "--task=view_glimpses"))


# --- drawings and predictions


class Prediction(NamedTuple):
    """Prediction for one image, among C classes, after T glimpses."""

    probabilities: Tensor  # [C], averaged over the sampled trajectories where the policy has any
    # Where the deterministic trajectory looked, or the first sampled one of policy "random".
    attention: Tensor | None  # [T, 4], over top left, top right, bottom left, bottom right; of policy "learned" only
    location: Tensor  # [T, 2], centres of the glimpses: (x, y) in (-1, 1), x to the right, y down


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network, ready to classify images."""

    model: RecurrentAttention
    settings: Settings
    machine: Machine
    class_names: list[str]

    @classmethod
    def of(cls, settings: Settings, machine: Machine, checkpoint: dict[str, Any]) -> "Classifier":
        """The best classifier, from a checkpoint. Raises UserError if the weights do not fit."""
        model = load_model(settings, checkpoint, machine)
        return cls(model, settings, machine, checkpoint["data"]["class_names"])

    def __call__(self, image: Image.Image | str | Path) -> Prediction:
        """Classify a PIL image, which is left as it is, or a file, of any size.

        A large JPEG file is decoded at a smaller size, so that its prediction differs slightly from that of the same
        image opened by PIL. Raises UserError for a file that is unreadable, ValueError for floating-point pixels.
        """
        noise, size = self.noise(), self.model.glimpse.canvas_size
        if isinstance(image, Image.Image):
            canvas = dataset.crop_to_canvas(dataset.to_rgb(image.copy()), size)
        else:
            canvas = dataset.load_canvas(image, size)
        rollout = self.look(canvas.unsqueeze(0), noise)
        probabilities = self.best_estimate(rollout.logits[:, :, -1].softmax(-1))[1]
        attention = rollout.attention[0, 0] if self.settings.policy == "learned" else None
        return Prediction(probabilities[0, 0], attention, rollout.location[0, 0])

    def noise(self) -> Tensor:
        """Noise [1, M, T, 2]: the same for every image, so that a prediction does not depend on the other images.

        Raises UserError for policy "oracle", which needs to know where the dog is.
        """
        settings = self.settings
        if settings.policy == "oracle":
            raise UserError("--policy oracle looks at annotated dogs: choose another to classify other images")
        return evaluation_noise(settings.policy, 1, settings.n_trajectories, settings.n_glimpses, settings.seed)

    @torch.no_grad()
    def look(self, canvases: Tensor, noise: Tensor) -> Rollout:
        """Roll out trajectories over canvases uint8 [B, 3, S, S], with noise [B, M, T, 2]. Returns CPU tensors."""
        net, device = utils.MixedPrecision(self.model, self.machine), self.machine.device
        rollout = net(canvases.to(device), noise.to(device), self.settings.policy)
        return Rollout(*(value.cpu() for value in rollout))

    def best_estimate(self, probabilities: Tensor) -> tuple[str, Tensor]:
        """The best of the `estimates` of probabilities [B, M, C]: its name, and its probabilities [B, 1, C]."""
        return list(estimates(probabilities, self.settings.policy).items())[-1]


def load_classifier(save_dir: str | Path, **flags: Any) -> Classifier:
    """Load the trained classifier in save_dir. flags: of `--task=predict`, such as n_trajectories=1, device="cpu".

    Raises UserError if there is no checkpoint, and for a flag that is invalid or contradicts it.
    """
    given = {**flags, "save_dir": Path(save_dir), "task": "predict"}
    utils.check_settings(Settings, given)
    settings, checkpoint = read_valid_settings(given)
    machine = utils.set_up_machine(settings.device, settings.gpus, settings.precision, settings.compile)
    return Classifier.of(settings, machine, checkpoint)


class Drawing(NamedTuple):
    """An image, where the first trajectory looked in it, and what all of them predicted."""

    file: Path
    canvas: Tensor  # uint8 [3, S, S]
    location: Tensor  # [T, 2]
    boxes: Tensor  # [T, k, 4]
    probabilities: Tensor  # [M, C], after the last glimpse
    caption: str
    correct: bool | None  # whether the first trajectory predicts the label; None if that is unknown
    panel: Image.Image


def draw_images(
    images: ImageList,
    dogs: list[dataset.Dogs],
    classifier: Classifier,
    noise: Tensor,
    unreadable: list[UserError] | None = None,
) -> Iterator[Drawing]:
    """Classify images along the trajectories of noise [N, M, T, 2], and draw the first one of each, in order.

    Labels and dogs may be missing, if they are unknown. An image that cannot be read is passed over, and its error
    appended to `unreadable`, or raised if there is no such list.
    """
    size, batch_size = classifier.model.glimpse.canvas_size, classifier.settings.batch_size
    for start in range(0, len(images.files), batch_size):
        canvases = {}
        for i in range(start, min(start + batch_size, len(images.files))):
            try:
                canvases[i] = dataset.load_canvas(images.files[i], size)
            except UserError as error:
                if unreadable is None:
                    raise
                unreadable.append(error)
        if canvases:
            rollout = classifier.look(torch.stack(list(canvases.values())), noise[list(canvases)])
        for j, (i, canvas) in enumerate(canvases.items()):
            boxes = dataset.boxes_on_canvas(dogs[i]) if dogs else torch.empty(0, 4)
            yield draw_one(images, i, boxes, canvas, Rollout(*(value[j] for value in rollout)), classifier)


def draw_one(
    images: ImageList, i: int, dogs: Tensor, canvas: Tensor, rollout: Rollout, classifier: Classifier
) -> Drawing:
    """Draw the first trajectory over image i, whose canvas is uint8 [3, S, S].

    rollout: the row of this image, that is, without the axis of images. dogs: annotated boxes [n, 4], if any.
    """
    glimpse, policy, names = classifier.model.glimpse, classifier.settings.policy, images.class_names
    location, probabilities = rollout.location[0], rollout.logits.softmax(-1)  # [T, 2], [M, T, C]
    drawn = probabilities[0]  # [T, C]
    predictions = [f"{names[p.argmax()]} ({p.max():.2f})" for p in drawn]
    caption, correct = f"predicted {predictions[-1]}", None
    if images.labels:
        label = images.labels[i]
        correct = int(drawn[-1].argmax()) == label
        caption += f", true {names[label]} ({drawn[-1, label]:.2f})"
    title = f"{policy} policy, {'sampled' if policy == 'random' else 'deterministic'} trajectory\n{caption}"
    title = f"{images.files[i].name}: {title}"
    attention = rollout.attention[0] if policy == "learned" else None
    panel = draw_panel(canvas, location, attention, glimpse.scales, glimpse.patch_size, title, predictions, dogs)
    boxes = patch_boxes(location, glimpse.scales, glimpse.patch_size)
    return Drawing(images.files[i], canvas, location, boxes, probabilities[:, -1], caption, correct, panel)


def fixed_choice(n_images: int, n_chosen: int, seed: int) -> list[int]:
    """Indices of some images of a list, always the same for the same seed; a longer choice begins with a shorter."""
    order = list(range(n_images))
    random.Random(f"view {seed}").shuffle(order)
    return order[:n_chosen]


def save_image(path: Path, image: Image.Image) -> None:
    """Write a drawing as a JPEG, completely or not at all. Raises UserError."""
    utils.prepare_folder(path.parent)
    with utils.replacing(path, mode="wb") as file:
        image.save(file, "JPEG", quality=95, subsampling=0)


def view_glimpses(settings: Settings, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Draw where the best classifier looks in test images that depend on the seed alone."""
    images = dataset.read_list(settings.data_dir, "test")
    utils.refuse_other_classes(checkpoint, images.class_names, settings.data_dir, settings.save_dir / FILES[0])
    images = images.subset(fixed_choice(len(images.files), settings.n_samples, settings.seed))
    classifier, n_images = Classifier.of(settings, machine, checkpoint), len(images.files)
    dogs = read_dogs(settings, images)
    drawings = draw_images(images, dogs, classifier, single_noise(dogs, settings))
    paths, on_sheet = [settings.imgs_dir / f"glimpse_{i}.jpg" for i in range(n_images)], []
    bar = tqdm(drawings, "view_glimpses", n_images, unit=" images", leave=False, disable=None)
    for path, drawing in zip(paths, bar):
        save_image(path, drawing.panel)
        if len(on_sheet) < N_ON_SHEET:
            caption = drawing.caption.replace(", true", "\ntrue")
            on_sheet.append((drawing.canvas, drawing.boxes, caption, drawing.correct))
    for path in set(settings.imgs_dir.glob("glimpse_*.jpg")) - set(paths):  # of an earlier, longer choice
        if re.fullmatch(r"glimpse_\d+\.jpg", path.name):
            path.unlink()
    sheet_path = settings.imgs_dir / "contact_sheet.jpg"
    save_image(sheet_path, draw_contact_sheet(*zip(*on_sheet)))
    machine.print(f"where the model looks in {utils.count(n_images, 'image')}: {paths[0]}, ...")
    machine.print(f"{utils.count(len(on_sheet), 'image')} at a glance: {sheet_path}")
    machine.print(utils.next_command(settings, "main.py", "--task=predict", "--images", "photo.jpg", keep=["save_dir"]))


def predict(settings: Settings, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Print the five most probable breeds of each image, draw where the model looked, and write a table of both.

    An image that cannot be read is named and passed over. Raises UserError at the end if there were any.
    """
    files, classifier = dataset.find_images(settings.images), Classifier.of(settings, machine, checkpoint)
    images, names, rows, unreadable = ImageList(files, [], classifier.class_names), classifier.class_names, [], []
    drawings = draw_images(images, [], classifier, classifier.noise().expand(len(files), -1, -1, -1), unreadable)
    for drawing in tqdm(drawings, "predict", len(files), unit=" images", leave=False, disable=None):
        file = drawing.file
        estimate, probabilities = classifier.best_estimate(drawing.probabilities.unsqueeze(0))
        best = most_probable(probabilities.flatten(), names)
        # A hash tells apart images of the same name.
        unique = hashlib.sha256(os.fsencode(os.path.abspath(file))).hexdigest()[:8]
        path = settings.imgs_dir / f"predict_{file.name[:40]}_{unique}.jpg"
        save_image(path, drawing.panel)
        lines = [f"  {value:6.1%}  {name}" for name, value in best]
        machine.print("\n".join([f"{file}: {estimate} (drawn in {path})", *lines]))
        rows.append([file, *prediction_cells(best, drawing.location)])
    header = prediction_header(len(names), settings.n_glimpses)
    table = settings.imgs_dir / "predictions.csv"
    if rows:
        utils.write_table(table, ["file", *header], rows)
        machine.print(f"predictions for {utils.count(len(rows), 'image')} in {table}")
    for error in unreadable:
        machine.print(f"passed over: {error}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(files)} images could not be read and were passed over")


def read_valid_settings(given: dict[str, Any]) -> tuple[Settings, dict[str, Any] | None]:
    """`utils.read_settings` of this script. Also raises UserError for an invalid combination of k and start_size."""
    hint = "train one with `python main.py`, or give its --save_dir"
    settings, checkpoint = utils.read_settings(Settings, given, FILES, hint, backbone=dict)
    try:
        patch_scales(settings.k, settings.start_size)
    except ValueError as error:
        raise UserError(f"--k and --start_size: {error}") from None
    return settings, checkpoint


def main(argv: list[str] | None = None) -> None:
    """Read flags and checkpoint, find the device, do the task."""
    of_backbone = "it is the backbone's: choose it in pretrain.py"
    given = utils.parse_flags(Settings, __doc__, argv, arch=of_backbone, patch_size=of_backbone)
    settings, checkpoint = read_valid_settings(given)
    if settings.task == "predict" and not settings.images:
        raise UserError("--task=predict needs --images PATH ...")
    machine = utils.set_up_machine(settings.device, settings.gpus, settings.precision, settings.compile)
    if machine.world_size > 1 and settings.task in ("view_glimpses", "predict"):
        raise UserError(f"--task={settings.task} runs in one process: start it without torchrun")
    tasks = {"train": train, "test": test, "view_glimpses": view_glimpses, "predict": predict}
    tasks[settings.task](settings, machine, checkpoint)


if __name__ == "__main__":
    utils.run(main)
