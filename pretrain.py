"""Fine-tune the backbone on concentric patches at three resolutions, as the glimpse network of main.py.

    python pretrain.py                          # an ImageNet ResNet-50 on data/Original
    python pretrain.py --batch_size 32          # in 8 GB of memory
    python pretrain.py --resume_training=True   # continue after the last saved epoch
    python pretrain.py --task=test              # accuracy of the four heads on the test list
    python pretrain.py --task=probe             # a linear probe on features of whole images, before fine-tuning

Training writes pt_glimpse_model.tar (the best backbone), pt_last.tar (to resume from) and pt_log.csv under --save_dir.
Test and probe give the figures that attention has to beat.
"""

if __name__ == "__main__":  # Ctrl-C ends the script quietly while PyTorch is imported, which takes seconds
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import dataset
import utils
from glimpse import STARTS, canvas_size, normalize
from model import ARCHITECTURES, HEADS, PretrainNetwork, build_backbone, feature_size, load_resnet_weights
from utils import Machine, UserError, network_setting, setting

FILES = ("pt_glimpse_model.tar", "pt_last.tar", "pt_log.csv")
KEPT = ("data_dir", "save_dir", "valid_size", "epochs", "batch_size", "lr", "lr_schedule", "seed")  # for main.py
PROBE_WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(utils.SharedSettings):
    """Settings of this script, each of them a flag."""

    task: str = setting("train", "task to run", utils.TASK, stored=False, one_of=("train", "test", "probe"))
    seed: int = utils.seed_setting(tasks="train probe")
    arch: str = network_setting("resnet50", "torchvision ResNet to use as the backbone", one_of=ARCHITECTURES)
    patch_size: int = network_setting(96, "side of a patch in pixels", at_least=32, multiple_of=32)
    weights: str = network_setting(
        "imagenet",
        "initial weights: imagenet (a download), none, or the file of a ResNet; to probe, also one of this script",
        tasks="train probe",
    )


def load_initial_weights(backbone: nn.Sequential, weights: str, arch: str) -> dict[str, Any]:
    """Load ImageNet weights, torchvision's (version 1, as in 2018), those in a file, or those of an earlier run.

    Returns the content of the latter's file, and nothing for all others. Raises UserError.
    """
    if weights == "none":
        return {}
    if weights == "imagenet":
        try:
            # Version 1 is what `pretrained=True` loaded in 2018.
            state = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.get_state_dict(progress=True)
        except Exception as error:  # of the network, or of a broken download
            raise UserError(
                f"the ImageNet weights of {arch} cannot be downloaded ({error}): give --weights FILE or --weights none"
            ) from error
    else:
        state = utils.load_checkpoint(Path(weights), "--weights takes imagenet, none, or a file")
    where = f"{weights} (is --arch {arch} right?)"
    if isinstance(state, dict) and "model_dict" in state:
        utils.load_state(backbone.load_state_dict, state["model_dict"], where)
        return state
    if isinstance(state, dict) and "state_dict" in state:  # as many other training scripts save it
        state = state["state_dict"]
    utils.load_state(lambda state: load_resnet_weights(backbone, state), state, where)
    return {}


def build_model(settings: Settings, n_classes: int) -> PretrainNetwork:
    """The network of these settings, with fresh weights."""
    return PretrainNetwork(backbone=build_backbone(settings.arch), n_classes=n_classes, patch_size=settings.patch_size)


def place(model: PretrainNetwork, machine: Machine) -> None:
    """Move the network to the device, and let its backbone be compiled if that was asked for."""
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


def evaluate(net: nn.Module, loader: DataLoader, machine: Machine, title: str) -> dict[str, float]:
    """Loss, negative log-likelihood of head 123 and accuracies of all heads over a list. Raises UserError."""
    net = utils.for_evaluation(net)
    [logits] = utils.collect(lambda canvas, _: (net(canvas),), loader, machine, title)  # [N, 4, C]
    labels = torch.tensor(loader.dataset.images.labels)
    nll = F.cross_entropy(logits[:, list(HEADS).index("123")], labels)
    means = {"loss": pretrain_loss(logits, labels), "nll": nll, **head_accuracies(logits, labels)}
    return {name: value.item() for name, value in means.items()}


def mean_error(figures: dict[str, float]) -> float:
    """Mean error of the heads, by which an epoch is judged.

    Not their NLL, which also measures how well they are calibrated: they are not used afterwards. All heads count,
    since the accuracy of one on a few hundred validation images says little about one epoch or the next.
    """
    error = 1 - statistics.fmean(figures[f"accuracy_{name}"] for name in HEADS)
    return round(error, 6)  # or equal means could differ in their last bit


def refuse_single_images(n_images: int, settings: Settings, machine: Machine) -> None:
    """Raise UserError if some GPU would have one image of this process's batch of n, too few for BatchNorm."""
    if min(map(len, torch.arange(n_images).chunk(max(1, len(machine.gpus))))) < 2:
        raise UserError(
            f"--batch_size {settings.batch_size} leaves one image to a GPU or process: BatchNorm needs at least two"
        )


def train(settings: Settings, machine: Machine, last: dict[str, Any] | None) -> None:
    """Fine-tune the backbone and keep it at its best, the epoch with the lowest `mean_error` on validation."""
    run = utils.Run(settings, machine, FILES, "mean error of the heads", last)
    checking = machine.checking(settings)
    train_list, valid_list, data = dataset.read_training_data(settings.data_dir, settings.valid_size, **checking)
    run.describe_origin(data=data)
    loading = machine.loading(settings.batch_size, settings.num_workers)
    loading["canvas_size"] = canvas_size(settings.patch_size, STARTS[0])
    draws = settings.seed, settings.smallest_crop
    # A ragged batch could hold a single image, too few for BatchNorm.
    train_loader = dataset.make_training_loader(train_list, *draws, drop_last=True, **loading)
    valid_loader = dataset.make_evaluation_loader(valid_list, **loading)
    refuse_single_images(train_loader.batch_size, settings, machine)

    torch.manual_seed(settings.seed)
    model = build_model(settings, len(train_list.class_names))
    if last is None and load_initial_weights(model.backbone, settings.weights, settings.arch):
        raise UserError(f"--weights {settings.weights} is a backbone of this script, which is for --task=probe only")
    place(model, machine)
    optimizer = utils.make_optimizer(model.parameters())
    run.restore(model, optimizer)
    net = utils.wrap(model, machine)
    best = {"model_dict": model.backbone, "heads": model.heads}
    with run.training(model, train_list.split_rule, best) as epochs:
        if last:
            utils.warn_of_new_schedule(settings, last, machine)
        for epoch in epochs:
            start, title = time.perf_counter(), f"epoch {epoch + 1}/{settings.epochs}"
            train_loader.sampler.epoch = epoch
            lr = utils.learning_rate(settings.lr, settings.lr_schedule, epoch, settings.epochs)
            optimizer.param_groups[0]["lr"] = lr
            means = train_one_epoch(net, train_loader, optimizer, machine, title)
            valid = evaluate(net, valid_loader, machine, "validation")
            seconds = time.perf_counter() - start
            figures = {"train": means, "valid": valid, "lr": lr, "seconds": seconds}
            is_best = run.save(epoch, mean_error(valid), model, optimizer, **figures)
            heads = ", ".join(f"{name} {valid['accuracy_' + name]:.2f}" for name in HEADS)
            machine.print(
                f"{title}: loss {means['loss']:.3f}; valid {heads}, NLL {valid['nll']:.3f}"
                f"{' (best)' if is_best else ''}; {seconds:.0f} s"
            )
    machine.print(utils.next_command(settings, "main.py", keep=KEPT))


def multiply_adds(settings: Settings, n_classes: int) -> dict[str, int]:
    """Multiplications, each with an addition, by which each head classifies one image, its features included."""
    with torch.device("meta"):
        model, side = build_model(settings, n_classes).eval(), settings.patch_size
        of_pass, cost = utils.multiply_adds(lambda: model.backbone(torch.empty(1, 3, side, side))), {}
        for head, (name, levels) in zip(model.heads, HEADS.items()):
            features = torch.empty(1, len(levels) * feature_size(model.backbone))
            cost[name] = len(levels) * of_pass + utils.multiply_adds(functools.partial(head, features))
    return cost


def test(settings: Settings, machine: Machine, checkpoint: dict[str, Any]) -> None:
    """Print the accuracy of the best backbone's four heads on the test list, and write it as JSON."""
    images, path = dataset.read_list(settings.data_dir, "test"), settings.save_dir / FILES[0]
    utils.refuse_other_classes(checkpoint, images.class_names, settings.data_dir, path)
    [(images, fingerprints)] = dataset.check_images(images, **machine.checking(settings))
    dataset.refuse_trained_on(images, fingerprints, checkpoint["data"], path, "test")
    n_images, n_classes = len(images.files), len(images.class_names)
    model = build_model(settings, n_classes)
    utils.load_state(model.backbone.load_state_dict, checkpoint["model_dict"], path)
    utils.load_state(lambda content: model.heads.load_state_dict(content["heads"]), checkpoint, path)
    place(model, machine)
    loading = machine.loading(settings.batch_size, settings.num_workers)
    loader = dataset.make_evaluation_loader(images, canvas_size=canvas_size(settings.patch_size, STARTS[0]), **loading)
    means = evaluate(utils.wrap(model, machine), loader, machine, "test")
    machine.print(f"{n_images:,} test images of {settings.data_dir}, backbone of epoch {checkpoint['epoch'] + 1}")
    for name in HEADS:
        machine.print(f"head {name:4} accuracy {means['accuracy_' + name]:.4f}")
    if machine.rank == 0:
        path = settings.save_dir / "pt_results.json"
        figures = {"heads": {name: {"accuracy": means[f"accuracy_{name}"]} for name in HEADS}}
        cost = multiply_adds(settings, n_classes)
        utils.write_results(path, settings, machine, n_images, figures, cost, epoch=checkpoint["epoch"] + 1)
        machine.print(f"all figures in {path}")
    machine.print(utils.next_command(settings, "main.py", keep=("data_dir", "save_dir", "valid_size")))


def whole_image_features(
    backbone: nn.Sequential, images: dataset.ImageList, settings: Settings, machine: Machine
) -> Tensor:
    """Features [N, D] of whole images from the frozen backbone, in the list's order."""
    net = utils.MixedPrecision(backbone.eval(), machine)
    loading = machine.loading(settings.batch_size, settings.num_workers)
    loader = dataset.make_evaluation_loader(images, canvas_size=settings.patch_size, **loading)

    def predict(canvas: Tensor, _: Tensor) -> tuple[Tensor]:
        return (net(normalize(canvas.float() / 255)).float().mean((2, 3)),)

    return utils.collect(predict, loader, machine, "features")[0]


def fit_probe(features: Tensor, labels: Tensor, n_classes: int, weight_decay: float) -> nn.Linear:
    """Multinomial logistic regression of labels [N] on features [N, D], solved to the optimum."""
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


def probe_figures(fitted: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and negative log-likelihood of a probe on features [N, D] with labels [N]."""
    logits = fitted(features)
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    return {"accuracy": accuracy, "nll": F.cross_entropy(logits, labels).item()}


def probe(settings: Settings, machine: Machine, _: None) -> None:
    """Fit a linear classifier to features of whole images from the initial weights, and print its test accuracy.

    The weight decay is the one of `PROBE_WEIGHT_DECAYS` that is best on validation.
    """
    train_list, valid_list = dataset.read_training_lists(settings.data_dir, settings.valid_size)
    lists = train_list, valid_list, dataset.read_list(settings.data_dir, "test")
    if lists[0].class_names != lists[2].class_names:
        raise UserError(f"the training and the test list of {settings.data_dir} have different classes")
    lists, fingerprints = zip(*dataset.check_images(*lists, **machine.checking(settings)))
    torch.manual_seed(settings.seed)
    backbone = build_backbone(settings.arch)
    earlier = load_initial_weights(backbone, settings.weights, settings.arch)
    for i, use in ((1, "validation"), (2, "test")):
        dataset.refuse_trained_on(lists[i], fingerprints[i], earlier.get("data", {}), Path(settings.weights), use)
    backbone.to(machine.device, memory_format=torch.channels_last)
    features = [whole_image_features(backbone, images, settings, machine) for images in lists]
    mean, std = features[0].mean(0), features[0].std(0).clamp_min(1e-6)
    (train_x, train_y), valid, test = [
        ((x - mean) / std, torch.tensor(images.labels)) for x, images in zip(features, lists)
    ]
    n_classes = len(lists[0].class_names)
    probes = {decay: fit_probe(train_x, train_y, n_classes, decay) for decay in PROBE_WEIGHT_DECAYS}
    on_valid = {decay: probe_figures(fitted, *valid)["accuracy"] for decay, fitted in probes.items()}
    best = max(on_valid, key=on_valid.get)
    side, on_test = settings.patch_size, probe_figures(probes[best], *test)
    machine.print(
        f"linear probe of whole images at {side} pixels, features of {settings.weights} weights, "
        f"{len(lists[2].files):,} test images of {settings.data_dir}"
    )
    machine.print(f"weight decay {best:g}, chosen on validation: accuracy {on_valid[best]:.4f}")
    machine.print(f"test accuracy {on_test['accuracy']:.4f}")
    if machine.rank == 0:
        net = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), probes[best]).to("meta")
        cost = {"linear probe": utils.multiply_adds(lambda: net(torch.empty(1, 3, side, side, device="meta")))}
        path = settings.save_dir / f"probe_{settings.arch}_{Path(settings.weights).stem}_{side}.json"
        utils.write_results(path, settings, machine, len(test[1]), {"probe": {"linear probe": on_test}}, cost)
        machine.print(f"all figures in {path}")
    machine.print(utils.next_command(settings, "pretrain.py"))


def main(argv: list[str] | None = None) -> None:
    """Read flags and checkpoint, find the device, do the task."""
    given = utils.parse_flags(Settings, __doc__, argv)
    hint = "make it with `python pretrain.py`, or give its --save_dir"
    settings, checkpoint = utils.read_settings(Settings, given, FILES, hint)
    machine = utils.set_up_machine(settings.device, settings.gpus, settings.precision, settings.compile)
    {"train": train, "test": test, "probe": probe}[settings.task](settings, machine, checkpoint)


if __name__ == "__main__":
    utils.run(main)
