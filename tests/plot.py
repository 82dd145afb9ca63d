"""Draw learning curves and accuracy against compute, and examine predictions, from what runs left. Run by hand.

    python tests/plot.py curves data/saved_models            # loss, NLL and accuracy by epoch, from the logs
    python tests/plot.py rivals runs                         # every test and probe below a folder, and their table
    python tests/plot.py law runs/1 runs/0.5 runs/0.25       # the same by the scale of data/small_dogs.py
    python tests/plot.py classes predictions_learned.csv     # accuracy of each class, and what is confused
    python tests/plot.py compare predictions_learned.csv predictions_center.csv   # paired, on the same images
    python tests/plot.py cascade small.csv large.csv --stop_at 0.8 --out both.csv   # the large one only where unsure

The drawings need matplotlib: pip install matplotlib. For curves that grow while a run trains, see --tensorboard.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

LOGS = {"pt_log.csv": "pre-training", "log.csv": "classifier"}  # as pretrain.py and main.py name them
HUES = {"learned gaze": "#d62728", "fixed gaze": "#1f77b4", "whole image": "#555555"}
MARKERS = dict(zip(HUES, "os^"))  # color alone does not tell them apart for everyone
PANELS = {  # columns of both logs; the accuracy of pre-training is that of head 123
    "training loss": ("train_loss",),
    "validation NLL": ("valid_nll",),
    "validation accuracy": ("valid_accuracy", "valid_accuracy_123"),
}
N_CONFUSIONS = 10  # to print
Predictions = dict[str, tuple[str, str]]  # (true class, predicted class) of each image, by file


class Rival(NamedTuple):
    """One way to classify the test images."""

    family: str  # of HUES
    curve: str
    label: str  # of its point
    detail: str
    multiply_adds: int  # per image
    accuracy: float
    n_images: int

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy (Wilson 1927)."""
        low, high = binomtest(round(self.accuracy * self.n_images), self.n_images).proportion_ci(method="wilson")
        return float(low), float(high)


def draw_curves(folders: list[Path], pyplot: Any) -> Any:
    """A figure of loss, negative log-likelihood and accuracy by epoch, one line per log."""
    logs = {}
    for path in (folder / name for folder in folders for name in LOGS):
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                logs[f"{path.parent}, {LOGS[path.name]}"] = list(csv.DictReader(file))
    if not logs:
        sys.exit(f"error: no {' or '.join(LOGS)} in {', '.join(map(str, folders))}: train first, or give other folders")
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(4.5 * len(PANELS), 3.5), layout="constrained")
    for panel, (title, columns) in zip(panels, PANELS.items()):
        for name, rows in logs.items():
            column = next(column for column in columns if column in rows[0])
            panel.plot(*zip(*((int(row["epoch"]), float(row[column])) for row in rows)), marker=".", label=name)
        panel.set(title=title, xlabel="epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    return figure


def read_rivals(folders: list[Path]) -> list[Rival]:
    """The estimates in all files of results below the folders, by curve and cost."""
    rivals = []
    names = ("probe_*.json", "finetune_*.json", "pt_results*.json", "results_*.json")
    for path in sorted({path for folder in folders for name in names for path in folder.rglob(name)}):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        if path.name.startswith("probe_"):
            family, weights = "whole image", Path(settings["weights"]).stem
            curve = f"linear probe, weights {weights}, {Path(settings['data_dir']).name}"
            label = f"{settings['patch_size']} px" + ("" if weights.startswith("pt_") else ", ImageNet weights")
            detail = f"central square, {settings['arch']} at {settings['patch_size']} pixels"
        elif path.name.startswith("finetune_"):
            family, curve = "whole image", "fine-tuned ResNet"
            label = f"{settings['image_size']} px, fine-tuned"
            detail = f"{settings['arch']} at {settings['image_size']} pixels"
        elif path.name.startswith("pt_"):
            family, label = "fixed gaze", ""
            curve = "heads of pre-training" + path.stem.removeprefix("pt_results").replace("_", ", ", 1)
            detail = f"{settings['arch']} at {settings['patch_size']} pixels"
        else:
            policy, k, start, n = (settings[name] for name in ("policy", "k", "start_size", "n_glimpses"))
            is_whole = (policy, k, start) == ("center", "1", "4")
            family = "whole image" if is_whole else "learned gaze" if policy == "learned" else "fixed gaze"
            curve = policy + (", with context" if settings["classify_context"] == "True" else "")
            cells = settings.get("cells", "2")  # the quadrants need no word
            curve += f", {cells} x {cells} cells" if policy == "learned" and cells != "2" else ""
            # The folder of images, if the network was not trained on it.
            curve += path.stem.removeprefix(f"results_{policy}").replace("_", ", ", 1)
            label = f"{content['backbone']['patch_size']} px" if is_whole else f"{curve} ({k}, {start})"
            label += f" x {n}" if n != "1" else ""
            detail = f"k {k}, start_size {start}" + (f", {n} glimpses" if n != "1" else "")
            detail += ", {arch} at {patch_size} pixels".format(**content["backbone"])
        for subject, of_subject in content["figures"].items():
            kind = subject.split()[0]
            for estimate, figures in of_subject.items() if kind != "glimpse" else ():
                name = f"{curve}, {estimate}" if kind == "policy" and estimate != "deterministic" else curve
                what = f"head {estimate}, {detail}" if kind == "heads" else detail
                cost = content["multiply_adds"][estimate]
                rivals.append(Rival(family, name, label, what, cost, figures["accuracy"], content["images"]))
    if not rivals:
        sys.exit(f"error: no {', '.join(names)} below {', '.join(map(str, folders))}: test or probe first")
    return sorted(rivals, key=lambda rival: (rival.curve, rival.multiply_adds, rival.detail))


def side_by_side(rivals: list[Rival]) -> list[float]:
    """Where to draw each rival: at its cost in billions, or beside it, by 1 % at most, if others cost the same.

    The same is what the table shows as the same. Otherwise one point would hide another.
    """
    places = [rival.multiply_adds / 1e9 for rival in rivals]
    equal = defaultdict(list)
    for i in sorted(range(len(rivals)), key=lambda i: places[i]):
        equal[f"{places[i]:.1f}"].append(i)
    for group in equal.values():
        for rank, i in enumerate(group if len(group) > 1 else ()):
            places[i] *= 0.99 + 0.02 * rank / (len(group) - 1)
    return places


def is_drawn(rival: Rival) -> bool:
    """Whether a rival is one look at an image as a user would take it: no head, average or sampled trajectory."""
    return (
        not rival.curve.startswith("heads") and not rival.curve.endswith("trajectory") and "average" not in rival.curve
    )


def read_stopping(folders: list[Path]) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """Family, label and points (billions of multiply-adds, accuracy in %) of all that stops when it is sure.

    They are classifiers with several predictions, and cascades of linear probes: a small whole image, a larger one if
    unsure.
    """
    curves, probes = [], defaultdict(list)
    names = ("results_*.json", "probe_*.json")
    for path in sorted({path for folder in folders for name in names for path in folder.rglob(name)}):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name.startswith("results_") and content.get("stopping"):
            points = [(point["multiply_adds"] / 1e9, 100 * point["accuracy"]) for point in content["stopping"]]
            curves.append(("learned gaze" if "learned" in path.name else "fixed gaze", "stops when sure", points))
        elif path.name.startswith("probe_") and content.get("thresholds"):
            settings, cost = content["settings"], content["multiply_adds"]["linear probe"] / 1e9
            same = (path.parent, settings["arch"], settings["weights"], settings["data_dir"])
            probes[same].append((int(settings["patch_size"]), cost, content, path))
    for of_network in probes.values():
        (small, cost, content, path), *larger = sorted(of_network, key=lambda probe: probe[0])
        first = read_rows(path.parent / f"predictions_{path.stem}.csv", None)[0]
        for size, more, _, other in larger:
            points, second = [], read_rows(other.parent / f"predictions_{other.stem}.csv", None)[0]
            for threshold in content["thresholds"]:
                rows, n_unsure = stop(first, second, threshold)
                right = sum(row["class_1"] == row["true_class"] for row in rows.values()) / len(rows)
                points.append((cost + more * n_unsure / len(rows), 100 * right))
            curves.append(("whole image", f"{small}, then {size} px if unsure", points))
    return curves


def draw_rivals(folders: list[Path], pyplot: Any) -> Any:
    """A figure of accuracy against multiply-adds per image. Prints a table, which has what is not drawn too."""
    rivals = read_rivals(folders)
    print("| | | billions of multiply-adds per image | accuracy in % | 95 % interval |\n|---|---|---|---|---|")
    for rival in rivals:
        low, high = (100 * edge for edge in rival.interval())
        cells = f"{rival.multiply_adds / 1e9:.1f} | {100 * rival.accuracy:.1f} | {low:.1f} to {high:.1f}"
        print(f"| {rival.curve} | {rival.detail} | {cells} |")
    figure, panel = pyplot.subplots(figsize=(10, 7), layout="constrained")
    rivals, labeled = list(filter(is_drawn, rivals)), []
    for rival, cost in zip(rivals, side_by_side(rivals)):
        low, high = (100 * edge for edge in rival.interval())
        color, height = HUES[rival.family], 100 * rival.accuracy
        panel.errorbar(cost, height, [[height - low], [high - height]], elinewidth=0.6, color=color, alpha=0.4)
        panel.plot(cost, height, MARKERS[rival.family], color=color)
        same = [(c, a) for c, a, family in labeled if family == rival.family]
        close = [a for c, a in same if abs(c / cost - 1) < 0.1 and abs(a - height) < 1]
        labeled.append((cost, height, rival.family))
        places = {"fixed gaze": ("right", -6, -13), "whole image": ("right", -5, 6), "learned gaze": ("left", 6, -3)}
        align, x, y = places[rival.family]
        style = {"textcoords": "offset points", "fontsize": "x-small", "ha": align, "color": color}
        panel.annotate(rival.label, (cost, height), (x, y + 9 * len(close)), **style)
    for family, label, points in read_stopping(folders):
        panel.plot(*zip(*points), ".--", linewidth=1, color=HUES[family])
        style = {"textcoords": "offset points", "fontsize": "x-small", "ha": "right", "color": HUES[family]}
        panel.annotate(label, points[-1], (-4, -14), **style)
    for family in dict.fromkeys(rival.family for rival in rivals):
        panel.plot([], [], MARKERS[family], color=HUES[family], label=family)
    title = "What one image costs, and how often the answer is right"
    panel.set(xscale="log", title=title, xlabel="billions of multiply-adds per image", ylabel="test accuracy in %")
    ticks = sorted({round(rival.multiply_adds / 1e9) for rival in rivals})
    panel.set_xticks(ticks, map(str, ticks), minor=False)
    panel.set_xticks([], minor=True)
    panel.margins(x=0.2)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small", loc="lower right")
    return figure


def draw_law(folders: list[Path], pyplot: Any) -> Any:
    """A figure of accuracy against the scale of small dogs: a line for each way to look. Prints its table.

    Each folder is named after the scale of its runs, such as 0.25.
    """
    lines, costs, labeled = defaultdict(list), {}, []
    for folder in folders:
        try:
            scale = float(folder.name)
        except ValueError:
            sys.exit(f"error: {folder} is not named after a scale of data/small_dogs.py, such as 0.25")
        for rival in filter(is_drawn, read_rivals([folder])):
            name = f"whole image, {rival.label}" if rival.family == "whole image" else rival.curve
            name += ", 2 x 2 cells" if name == "learned" else ""
            line, cost = lines[rival.family, name], rival.multiply_adds / 1e9
            if scale in dict(line) or costs.setdefault(name, cost) != cost:
                sys.exit(f"error: {folder} has another run of {name}: one for each scale, of equal cost, can be drawn")
            line.append((scale, rival))
    print("| method | billions of multiply-adds | scale | accuracy in % | 95 % interval |\n|---|---|---|---|---|")
    figure, panel = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for (family, name), points in sorted(lines.items(), key=lambda item: costs[item[0][1]]):
        points.sort(key=lambda point: point[0])
        for scale, rival in points:
            low, high = (100 * edge for edge in rival.interval())
            print(f"| {name} | {costs[name]:.1f} | {scale:g} | {100 * rival.accuracy:.1f} | {low:.1f} to {high:.1f} |")
        scales, heights = zip(*((scale, 100 * rival.accuracy) for scale, rival in points))
        edges = zip(*([100 * abs(rival.accuracy - edge) for edge in rival.interval()] for _, rival in points))
        style = {"marker": MARKERS[family], "linewidth": 1.2, "elinewidth": 0.6, "color": HUES[family]}
        panel.errorbar(scales, heights, list(edges), linestyle=":" if name == "oracle" else "-", **style)
        label = f"{name}: {costs[name]:.1f} "
        style = {"textcoords": "offset points", "fontsize": "small", "ha": "right", "color": HUES[family]}
        close = [height for height in labeled if abs(height - heights[0]) < 3]  # whose labels this one stands above
        labeled.append(heights[0])
        panel.annotate(label, (scales[0], heights[0]), (-6, -3 + 11 * len(close)), **style)
    scales = sorted({scale for points in lines.values() for scale, _ in points})
    panel.set(xscale="log", title="The smaller the dog, the more it pays to choose where to look",
              xlabel="side of the photo of the dog, in sides of the image", ylabel="test accuracy in %")  # fmt: skip
    panel.set_xticks(scales, [f"{scale:.2g}" for scale in scales])
    panel.set_xticks([], minor=True)
    panel.set_xlim(scales[0] * (scales[0] / scales[-1]) ** 0.42, scales[-1] * 1.05)
    panel.text(0.99, 0.02, "numbers: billions of multiply-adds per image", transform=panel.transAxes, ha="right",
               fontsize="small")  # fmt: skip
    panel.grid(alpha=0.3)
    return figure


def read_rows(path: Path, estimate: str | None) -> tuple[dict[str, dict[str, str]], str]:
    """The rows, by file, of an estimate in a CSV of `--task=test` or tests/probe.py, by default the first; its name."""
    if not path.is_file():
        sys.exit(f"error: {path} not found: give a predictions_*.csv, as a test writes it")
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"file", "estimate", "true_class", "class_1"} <= rows[0].keys():
        sys.exit(f"error: {path} is no table of predictions: give a predictions_*.csv, as a test writes it")
    estimate = estimate or rows[0]["estimate"]
    if estimate not in (known := dict.fromkeys(row["estimate"] for row in rows)):
        sys.exit(f"error: {path} has no estimate {estimate}, only: {', '.join(known)}")
    return {row["file"]: row for row in rows if row["estimate"] == estimate}, estimate


def read_predictions(path: Path, estimate: str | None) -> tuple[Predictions, str]:
    """True and predicted class of each image, by file, in the rows of `read_rows`; the name of the estimate."""
    rows, estimate = read_rows(path, estimate)
    return {file: (row["true_class"], row["class_1"]) for file, row in rows.items()}, estimate


def stop(first: dict[str, dict], second: dict[str, dict], threshold: float) -> tuple[dict[str, dict], int]:
    """The row of the first table where it is above a threshold, else that of the second, and how often the latter.

    Both are tables of `read_rows`.
    """
    if first.keys() != second.keys():
        sys.exit("error: a cascade needs two tables of the same images: give two tests of one --data_dir")
    unsure = [file for file, row in first.items() if not float(row["probability_1"]) > threshold]
    return {**first, **{file: second[file] for file in unsure}}, len(unsure)


def write_cascade(paths: list[Path], estimates: list[str | None], threshold: float, out: Path) -> None:
    """Write the predictions of a cascade: the first table where it is above a threshold, else the second."""
    (first, _), (second, _) = (read_rows(path, estimate) for path, estimate in zip(paths, estimates))
    rows, n_unsure = stop(first, second, threshold)
    columns = ("file", "true_class", "class_1", "probability_1")
    with open(out, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, ["estimate", *columns], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "estimate": f"cascade at {threshold:g}"} for row in rows.values())
    right = sum(row["class_1"] == row["true_class"] for row in rows.values()) / len(rows)
    print(f"{right:.1%} of {len(rows):,} images right, {n_unsure / len(rows):.1%} of them by the second table: {out}")


def print_classes(path: Path, estimate: str | None) -> None:
    """Print the accuracy of each class, the worst first, and the commonest confusions."""
    predictions, estimate = read_predictions(path, estimate)
    images = Counter(truth for truth, _ in predictions.values())
    right = Counter(truth for truth, answer in predictions.values() if answer == truth)
    confused = Counter(pair for pair in predictions.values() if pair[0] != pair[1])
    print(f"{sum(right.values()):,} of {len(predictions):,} images right, {estimate}")
    for name in sorted(images, key=lambda name: (right[name] / images[name], name)):
        print(f"{right[name] / images[name]:7.1%} of {images[name]:4}  {name}")
    for (truth, answer), n in sorted(confused.items(), key=lambda item: (-item[1], item[0]))[:N_CONFUSIONS]:
        print(f"{truth} taken for {answer}: {n} of {images[truth]}")


def mcnemar(first: int, second: int) -> float:
    """Two-sided p of McNemar's exact test, given how many images only the first or only the second gets right."""
    return binomtest(first, first + second).pvalue if first + second else 1.0


def paired(one: list[bool], other: list[bool]) -> tuple[float, float]:
    """The difference of two accuracies, given which answers of each are right, and half its 95 % interval."""
    n, differ = len(one), sum(a != b for a, b in zip(one, other))
    difference = (sum(one) - sum(other)) / n
    return difference, 1.96 * math.sqrt(max(0.0, differ / n - difference**2) / n)


def print_comparison(paths: list[Path], estimates: list[str | None]) -> None:
    """Print the difference in accuracy on the images that both tables have, and whether it may be chance."""
    (a, b), names = zip(*(read_predictions(path, estimate) for path, estimate in zip(paths, estimates)))
    shared = [file for file in a if file in b]
    if not shared:
        sys.exit(f"error: {paths[0]} and {paths[1]} have no image in common")
    for file in shared:
        if a[file][0] != b[file][0]:
            sys.exit(f"error: {file} is {a[file][0]} in {paths[0]} and {b[file][0]} in {paths[1]}")
    right = [[table[file][0] == table[file][1] for file in shared] for table in (a, b)]
    only_a, only_b = (sum(one and not other for one, other in zip(*pair)) for pair in (right, right[::-1]))
    n, (difference, spread) = len(shared), paired(*right)
    print(f"{n:,} images in both, {len(a) + len(b) - 2 * n:,} in one only")
    for letter, path, name, answers, only in zip("AB", paths, names, right, (only_a, only_b)):
        print(f"{letter}: {sum(answers) / n:.1%} right, {only:,} where the other is wrong ({path}, {name})")
    low, high = 100 * (difference - spread), 100 * (difference + spread)
    print(
        f"A - B: {100 * difference:+.1f} points (95 %: {low:+.1f} to {high:+.1f}); "
        f"McNemar's exact p {mcnemar(only_a, only_b):.2g}"
    )


def draw(command: str, folders: list[Path], out: Path) -> None:
    """Draw curves or rivals into a file."""
    os.environ.setdefault("MPLBACKEND", "agg")  # without a display
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("error: tests/plot.py needs a package that is missing: pip install matplotlib")
    {"curves": draw_curves, "rivals": draw_rivals, "law": draw_law}[command](folders, pyplot).savefig(out, dpi=150)
    print(f"{command} drawn in {out}")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, draw or print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("curves", "loss and accuracy by epoch"),
        ("rivals", "accuracy against multiply-adds"),
        ("law", "accuracy against the scale of small dogs"),
    ):
        command = commands.add_parser(name, help=f"draw {what}")
        command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="--save_dir of a run")
        command.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="image to write (%(default)s)")
    command = commands.add_parser("classes", help="print the accuracy of each class and the commonest confusions")
    command.add_argument("table", type=Path, metavar="PREDICTIONS.csv")
    command.add_argument("--estimate", help='such as "average of 7" (the first in the table)')
    for name, what in (
        ("compare", "print the difference in accuracy on the same images"),
        ("cascade", "write the predictions of one table where they are sure, else those of another"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("tables", nargs=2, type=Path, metavar="PREDICTIONS.csv")
        command.add_argument("--estimates", nargs=2, default=[None, None], help="of each (the first in the table)")
    command.add_argument("--stop_at", type=float, required=True, help="probability above which the first table is sure")
    command.add_argument("--out", type=Path, default=Path("cascade.csv"), help="table to write (%(default)s)")
    args = parser.parse_args(argv)
    if "out" in args:
        with contextlib.suppress(OSError):
            args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.out.is_dir() or not args.out.parent.is_dir():
            sys.exit(f"error: --out {args.out} cannot be written: name a file in a folder")
    if args.command == "classes":
        print_classes(args.table, args.estimate)
    elif args.command == "compare":
        print_comparison(args.tables, args.estimates)
    elif args.command == "cascade":
        write_cascade(args.tables, args.estimates, args.stop_at, args.out)
    else:
        draw(args.command, args.folders, args.out)


if __name__ == "__main__":
    main()
