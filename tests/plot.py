"""Draw what runs left: learning curves, or accuracy against compute. Run by hand.

    python tests/plot.py curves data/saved_models            # loss, NLL and accuracy by epoch, from the logs
    python tests/plot.py rivals runs                         # every test and probe below a folder, and their table

It needs matplotlib: pip install matplotlib. For curves that grow while a run trains, see --tensorboard.
"""

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

LOGS = {"pt_log.csv": "pre-training", "log.csv": "classifier"}  # as pretrain.py and main.py name them
MARKERS = "osD^v<>P*Xh"  # of the curves, which color alone does not tell apart for everyone
PANELS = {  # columns of both logs; the accuracy of pre-training is that of head 123
    "training loss": ("train_loss",),
    "validation NLL": ("valid_nll",),
    "validation accuracy": ("valid_accuracy", "valid_accuracy_123"),
}


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
    patterns = [(folder, name) for folder in folders for name in ("probe_*.json", "pt_results.json", "results_*.json")]
    for path in sorted({path for folder, name in patterns for path in folder.rglob(name)}):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        if path.name.startswith("probe_"):
            curve = f"linear probe, weights {Path(settings['weights']).stem}"
            label = f"{settings['patch_size']} px"
            detail = f"whole image, {settings['arch']} at {settings['patch_size']} pixels"
        elif path.name.startswith("pt_"):
            curve, detail = "heads of pre-training", f"{settings['arch']} at {settings['patch_size']} pixels"
        else:
            curve = settings["policy"] + (", with context" if settings["classify_context"] else "")
            label = f"({settings['k']}, {settings['start_size']})"
            label += f" x {settings['n_glimpses']}" if settings["n_glimpses"] > 1 else ""
            detail = f"k {settings['k']}, start_size {settings['start_size']}"
            detail += f", {settings['n_glimpses']} glimpses" if settings["n_glimpses"] > 1 else ""
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


def draw_rivals(folders: list[Path], pyplot: Any) -> Any:
    """A figure of accuracy against multiply-adds per image: a curve for each way to look, through its best points.

    Prints its table, which has the single sampled trajectories too: in the figure they would be in the way.
    """
    curves = defaultdict(list)
    print("| | | billions of multiply-adds per image | accuracy in % | 95 % interval |\n|---|---|---|---|---|")
    for rival in read_rivals(folders):
        curves[rival.curve].append(rival)
        low, high = (100 * edge for edge in rival.interval)
        cells = f"{rival.multiply_adds / 1e9:.1f} | {100 * rival.accuracy:.1f} | {low:.1f} to {high:.1f}"
        print(f"| {rival.curve} | {rival.detail} | {cells} |")
    figure, panel = pyplot.subplots(figsize=(7, 5), layout="constrained")
    curves = {name: rivals for name, rivals in curves.items() if not name.endswith("sampled trajectory")}
    for i, (name, rivals) in enumerate(curves.items()):
        aside = 1.018 ** (i - len(curves) / 2)  # or points of the same cost would hide one another
        cost = [aside * rival.multiply_adds / 1e9 for rival in rivals]
        accuracy = [100 * rival.accuracy for rival in rivals]
        around = [
            [100 * abs(r.accuracy - edge) for r, edge in zip(rivals, edges)]
            for edges in zip(*(r.interval for r in rivals))
        ]
        color = pyplot.get_cmap("tab10")(i % 10)
        ranked = sorted(zip(accuracy, cost, rivals))
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


def main(argv: list[str] | None = None) -> None:
    """Read the command line, draw and save."""
    what = {"curves": draw_curves, "rivals": draw_rivals}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=what, help="what to draw")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what was the --save_dir of a run")
    parser.add_argument("--out", type=Path, help="image to write (default: curves.png or rivals.png)")
    args = parser.parse_args(argv)
    os.environ.setdefault("MPLBACKEND", "agg")  # without a display
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("error: tests/plot.py needs a package that is missing: pip install matplotlib")
    out = args.out or Path(f"{args.what}.png")
    what[args.what](args.folders, pyplot).savefig(out, dpi=150)
    print(f"{args.what} drawn in {out}")


if __name__ == "__main__":
    main()
