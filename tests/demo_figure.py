"""Print what `make demo` found, and draw it as a strip: a toy dog before and after training, and three accuracies.

    python tests/demo_figure.py --data_dir data/toy --untrained data/toy/saved_models/untrained \
        --trained data/toy/saved_models --out imgs/toy/demo.jpg
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from plot import HUES

import dataset
from glimpse import (
    FULL_SCALE,
    build_pyramid,
    draw_attention,
    draw_boxes,
    draw_dogs,
    extract_patches,
    inside,
    patch_boxes,
    to_image,
)
from main import Classifier, Prediction, fixed_choice, load_classifier, save_image

POLICIES = ("learned", "center", "random")
COLUMNS = ("deterministic", "sampled trajectory", "average of 7", "hit rate")
N_CANDIDATES = 100  # test images to choose the example from
TILE, GAP, LINE, TEXT, BAR = 184, 12, 24, 250, 330  # sides, widths and heights in pixels


class Example(NamedTuple):
    """A test image before and after training."""

    label: int
    early: Prediction
    late: Prediction


def read_figures(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy of each policy by estimate, and how often its first glimpse hits the dog, where there are any."""
    table = {}
    for policy in POLICIES:
        figures = json.loads((folder / f"results_{policy}.json").read_text(encoding="utf-8"))["figures"]
        of_policy = {name: values["accuracy"] for name, values in figures[f"policy {policy}"].items()}
        table[policy] = {**of_policy, "hit rate": next(iter(figures["glimpse 1"].values()))["hit_rate"]}
    return table


def distance(prediction: Prediction) -> float:
    """From the first glimpse to the middle of the annotated dog, in sides of the image."""
    box = prediction.boxes[0]
    return ((prediction.location[0] + 1) / 2 - (box[:2] + box[2:]) / 2).norm().item()


def choose_example(data_dir: Path, before: Classifier, after: Classifier) -> Example:
    """Of the first hundred test images in the order of `view_glimpses`, that whose gaze training moves the most.

    The untrained gaze misses its dog and the predicted breed is wrong; the trained gaze hits it, and the breed is
    correct; else any image.
    """
    images = dataset.read_list(data_dir, "test")
    images = images.subset(fixed_choice(len(images.files), N_CANDIDATES, after.args.seed))
    examples = []
    for file, annotation, label in zip(images.files, images.annotations, images.labels):
        early, late = before(file, annotation), after(file, annotation)
        hits = [bool(inside(p.location[:1], p.boxes).any()) for p in (early, late)]
        correct = [p.drawn[-1].argmax().item() == label for p in (early, late)]
        is_typical = hits == correct == [False, True]
        examples.append((is_typical, distance(early) - distance(late), Example(label, early, late)))
    return max(examples, key=lambda example: example[:2])[-1]


def draw_row(classifier: Classifier, prediction: Prediction, label: int) -> Image.Image:
    """The small copy with its attention, where the glimpse is, what it shows, and the predicted breed."""
    glimpse, names, font = classifier.model.glimpse, classifier.class_names, ImageFont.load_default(17)
    pyramid = build_pyramid(prediction.canvas.unsqueeze(0), glimpse.scales, glimpse.patch_size)
    shown = {FULL_SCALE: torch.zeros(1, 1, 2), glimpse.scales[0]: prediction.location[:1].unsqueeze(0)}

    def tile(scale: int) -> Image.Image:
        patch: Tensor = extract_patches(pyramid, shown[scale], (scale,), glimpse.patch_size)[0, 0, 0]
        return to_image((patch * 255).round().byte(), TILE)

    boxes = patch_boxes(prediction.location[:1], glimpse.scales, glimpse.patch_size)
    where = draw_boxes(draw_dogs(to_image(prediction.canvas, TILE), prediction.boxes), boxes)
    draw, middle = ImageDraw.Draw(where), (TILE / 2, TILE / 2)
    end = tuple(((prediction.location[0] + 1) / 2 * TILE).tolist())
    draw.line([middle, end], "red", 2)
    draw.circle(end, 5, "red")
    row = Image.new("RGB", (3 * (TILE + GAP) + TEXT, TILE), "white")
    for i, image in enumerate(
        (draw_attention(tile(FULL_SCALE), prediction.attention[0]), where, tile(glimpse.scales[0]))
    ):
        row.paste(image, (i * (TILE + GAP), 0))
    p, answer = prediction.drawn[-1], int(prediction.drawn[-1].argmax())
    verdict = "right" if answer == label else f"wrong: it is\n{names[label]}"
    text = f"{names[answer]}\n({p[answer]:.0%} sure)\n\n{verdict}"
    ImageDraw.Draw(row).multiline_text((3 * (TILE + GAP), 40), text, "black" if answer == label else "#c00000", font)
    return row


def compose(rows: dict[str, Image.Image], figures: dict[str, dict[str, float]]) -> Image.Image:
    """The rows below their headings, beside a bar for the accuracy of each policy."""
    font, title = ImageFont.load_default(17), ImageFont.load_default(19)
    width = next(iter(rows.values())).width
    left, top = 110, LINE + GAP
    strip = Image.new("RGB", (left + width + GAP + BAR + 110, top + len(rows) * (TILE + GAP)), "white")
    draw = ImageDraw.Draw(strip)
    for i, heading in enumerate(("small copy", "where it looks", "what it sees", "breed")):
        draw.text((left + i * (TILE + GAP), GAP / 2), heading, "black", title)
    for i, (name, row) in enumerate(rows.items()):
        draw.text((GAP, top + i * (TILE + GAP) + TILE / 2), name, "black", title, "lm")
        strip.paste(row, (left, top + i * (TILE + GAP)))
    x, y = left + width, GAP / 2
    draw.text((x, y), "accuracy on the toy test set", "black", title)
    for policy, of_policy in figures.items():
        y += 84
        estimate = next(iter(of_policy))  # of the random policy, that of a sampled trajectory
        accuracy = of_policy[estimate]
        draw.text((x, y - 24), f"{policy} gaze", "black", font)
        draw.rectangle((x, y, x + BAR, y + 34), "#eeeeee")
        draw.rectangle(
            (x, y, x + BAR * accuracy, y + 34), HUES["learned gaze" if policy == "learned" else "fixed gaze"]
        )
        draw.text((x + BAR + 8, y + 17), f"{accuracy:.1%}", "black", font, "lm")
    return strip


def main(argv: list[str] | None = None) -> None:
    """Print the table and draw the strip."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, what in (
        ("data_dir", "the toy set"),
        ("untrained", "folder of the classifier before training"),
        ("trained", "folder of the trained classifier and its test results"),
        ("out", "image file to write"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    args = parser.parse_args(argv)
    figures, (before, after) = read_figures(args.trained), map(load_classifier, (args.untrained, args.trained))
    example = choose_example(args.data_dir, before, after)
    rows = {
        "untrained": draw_row(before, example.early, example.label),
        "trained": draw_row(after, example.late, example.label),
    }
    save_image(args.out, compose(rows, figures))
    print("".join(f"{cell:20}" for cell in ("test set, in %", *COLUMNS)).rstrip())
    for policy, values in figures.items():
        cells = (f"{100 * values[column]:.1f}" if column in values else "" for column in COLUMNS)
        print("".join(f"{cell:20}" for cell in (policy, *cells)).rstrip())
    print(f"one toy dog before and after training: {args.out}")


if __name__ == "__main__":
    main()
