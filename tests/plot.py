"""Draw learning curves and accuracy against compute, and examine predictions, from what runs left. Run by hand.

    python tests/plot.py curves data/saved_models            # loss, NLL and accuracy by epoch, from the logs
    python tests/plot.py rivals runs                         # every test and probe below a folder, and their table
    python tests/plot.py classes predictions_learned.csv     # accuracy of each class, and what is confused
    python tests/plot.py compare predictions_learned.csv predictions_center.csv   # paired, on the same images

The drawings need matplotlib: pip install matplotlib. For curves that grow while a run trains, see --tensorboard.
"""

import argparse
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
MARKERS = "osD^v<>P*Xh"  # of the curves, which color alone does not tell apart for everyone
PANELS = {  # columns of both logs; the accuracy of pre-training is that of head 123
    "training loss": ("train_loss",),
    "validation NLL": ("valid_nll",),
    "validation accuracy": ("valid_accuracy", "valid_accuracy_123"),
}
N_CONFUSIONS = 10  # to print
Predictions = dict[str, tuple[str, str]]  # (true class, predicted class) of each image, by file


class Rival(NamedTuple):
    """One way to classify the test images."""

    curve: str
    label: str  # of its point
    detail: str
    multiply_adds: int  # per image
    accuracy: float
    interval: tuple[float, float]
    n_images: int


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
    patterns = [(folder, name) for folder in folders for name in ("probe_*.json", "pt_results*.json", "results_*.json")]
    for path in sorted({path for folder, name in patterns for path in folder.rglob(name)}):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        if path.name.startswith("probe_"):
            curve = f"linear probe, weights {Path(settings['weights']).stem}"
            label = f"{settings['patch_size']} px"
            detail = f"central square, {settings['arch']} at {settings['patch_size']} pixels"
        elif path.name.startswith("pt_"):
            curve = "heads of pre-training" + path.stem.removeprefix("pt_results").replace("_", ", ", 1)
            detail = f"{settings['arch']} at {settings['patch_size']} pixels"
        else:
            curve = settings["policy"] + (", with context" if str(settings["classify_context"]) == "True" else "")
            # The folder of images, if the network was not trained on it.
            curve += path.stem.removeprefix(f"results_{settings['policy']}").replace("_", ", ", 1)
            several = int(settings["n_glimpses"]) > 1
            label = f"({settings['k']}, {settings['start_size']})"
            label += f" x {settings['n_glimpses']}" if several else ""
            detail = f"k {settings['k']}, start_size {settings['start_size']}"
            detail += f", {settings['n_glimpses']} glimpses" if several else ""
            detail += ", {arch} at {patch_size} pixels".format(**content["backbone"])
        for subject, of_subject in content["figures"].items():
            kind = subject.split()[0]
            for estimate, figures in of_subject.items() if kind in ("probe", "heads", "policy") else ():
                name = f"{curve}, {estimate}" if kind == "policy" and estimate != "deterministic" else curve
                if kind == "heads":
                    label, what = estimate, f"head {estimate}, {detail}"
                else:
                    what = detail
                cost, accuracy = content["multiply_adds"][estimate], figures["accuracy"]
                rivals.append(Rival(name, label, what, cost, accuracy, figures["interval"], content["images"]))
    if not rivals:
        sys.exit(f"error: no results_*.json or probe_*.json below {', '.join(map(str, folders))}: test or probe first")
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


def draw_rivals(folders: list[Path], pyplot: Any) -> Any:
    """A figure of accuracy against multiply-adds per image: a curve for each way to look, through its best points.

    Prints its table, which has the single sampled trajectories too: in the figure they would be in the way.
    """
    rivals = read_rivals(folders)
    print("| | | billions of multiply-adds per image | accuracy in % | 95 % interval |\n|---|---|---|---|---|")
    for rival in rivals:
        low, high = (100 * edge for edge in rival.interval)
        cells = f"{rival.multiply_adds / 1e9:.1f} | {100 * rival.accuracy:.1f} | {low:.1f} to {high:.1f}"
        print(f"| {rival.curve} | {rival.detail} | {cells} |")
    figure, panel = pyplot.subplots(figsize=(7, 5), layout="constrained")
    rivals, curves = [rival for rival in rivals if not rival.curve.endswith("sampled trajectory")], {}
    for rival, cost in zip(rivals, side_by_side(rivals)):
        curves.setdefault(rival.curve, []).append((cost, 100 * rival.accuracy, rival))
    for i, (name, points) in enumerate(curves.items()):
        cost, accuracy, rivals = zip(*points)
        around = [
            [100 * abs(r.accuracy - edge) for r, edge in zip(rivals, edges)]
            for edges in zip(*(r.interval for r in rivals))
        ]
        color = pyplot.get_cmap("tab10")(i % 10)
        ranked = sorted((y, x, r) for x, y, r in points)
        best = {round(r.multiply_adds / 1e9, 1): (x, y) for y, x, r in ranked}  # of points that cost about the same
        panel.errorbar(cost, accuracy, list(around), fmt="none", elinewidth=0.7, capsize=2, color=color)
        panel.plot(*zip(*sorted(best.values())), linewidth=1, color=color)
        panel.plot(cost, accuracy, MARKERS[i % len(MARKERS)], color=color, label=name)
        for rival, *place in zip(rivals, cost, accuracy):
            style = {"textcoords": "offset points", "fontsize": "xx-small", "ha": "right" if i % 2 else "left"}
            panel.annotate(rival.label, place, (-4 if i % 2 else 4, 3), **style)
    cost_label = "billions of multiply-adds per image (points of equal cost side by side)"
    panel.set(xscale="log", xlabel=cost_label, ylabel="test accuracy in % (bars: 95 % intervals)")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("{x:g}")
    panel.tick_params(which="both", labelsize="small", length=4, pad=4)
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize="small")
    return figure


def read_predictions(path: Path, estimate: str | None) -> tuple[Predictions, str]:
    """The predictions of an estimate in a CSV of `--task=test` or tests/probe.py, by default the first; its name."""
    if not path.is_file():
        sys.exit(f"error: {path} not found: give a predictions_*.csv, as a test writes it")
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"file", "estimate", "true_class", "class_1"} <= rows[0].keys():
        sys.exit(f"error: {path} is no table of predictions: give a predictions_*.csv, as a test writes it")
    estimate = estimate or rows[0]["estimate"]
    if estimate not in (known := dict.fromkeys(row["estimate"] for row in rows)):
        sys.exit(f"error: {path} has no estimate {estimate}, only: {', '.join(known)}")
    chosen = [row for row in rows if row["estimate"] == estimate]
    return {row["file"]: (row["true_class"], row["class_1"]) for row in chosen}, estimate


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
    n = len(shared)
    difference = (only_a - only_b) / n
    spread = 1.96 * math.sqrt(max(0.0, (only_a + only_b) / n - difference**2) / n)
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
    {"curves": draw_curves, "rivals": draw_rivals}[command](folders, pyplot).savefig(out, dpi=150)
    print(f"{command} drawn in {out}")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, draw or print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("curves", "loss and accuracy by epoch"), ("rivals", "accuracy against multiply-adds")):
        command = commands.add_parser(name, help=f"draw {what}")
        command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="--save_dir of a run")
        command.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="image to write (%(default)s)")
    command = commands.add_parser("classes", help="print the accuracy of each class and the commonest confusions")
    command.add_argument("table", type=Path, metavar="PREDICTIONS.csv")
    command.add_argument("--estimate", help='such as "average of 7" (the first in the table)')
    command = commands.add_parser("compare", help="print the difference in accuracy on the same images")
    command.add_argument("tables", nargs=2, type=Path, metavar="PREDICTIONS.csv")
    command.add_argument("--estimates", nargs=2, default=[None, None], help="of each (the first in the table)")
    args = parser.parse_args(argv)
    if args.command == "classes":
        print_classes(args.table, args.estimate)
    elif args.command == "compare":
        print_comparison(args.tables, args.estimates)
    else:
        draw(args.command, args.folders, args.out)


if __name__ == "__main__":
    main()
