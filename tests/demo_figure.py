"""Print what `make demo` found, and draw it as one picture: before training, after it, a mistake, and the figures.

    python tests/demo_figure.py --data_dir data/toy --untrained data/toy/saved_models/untrained \
        --trained data/toy/saved_models --out imgs/toy/demo.jpg
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
import main as scripts
from glimpse import choose_font

POLICIES = ("learned", "center", "random")
COLUMNS = ("deterministic", "sampled trajectory", "average of 7", "hit rate")
N_LOOKED_AT = 40  # test images among which to find a mistake


def read_table(folder: Path) -> list[list[str]]:
    """Accuracy of each policy by estimate, and how often its first glimpse hits the dog, as percentages in words."""
    rows = [["test accuracy in %", *COLUMNS]]
    for policy in POLICIES:
        figures = json.loads((folder / f"results_{policy}.json").read_text(encoding="utf-8"))["figures"]
        values = [figures[f"policy {policy}"].get(estimate, {}).get("accuracy") for estimate in COLUMNS[:-1]]
        values.append(next(iter(figures["glimpse 1"].values()))["hit_rate"])
        rows.append([policy, *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return rows


def draw_examples(data_dir: Path, untrained: Path, trained: Path) -> list[tuple[str, Image.Image]]:
    """A test image that the trained classifier gets right, before and after training, and one that it gets wrong."""
    before, after = (scripts.load_classifier(folder) for folder in (untrained, trained))
    images = dataset.read_list(data_dir, "test")
    images = images.subset(scripts.fixed_choice(len(images.files), N_LOOKED_AT, after.settings.seed))
    dogs = dataset.read_dogs(images)
    early, late = (
        list(scripts.draw_images(images, dogs, one, scripts.single_noise(dogs, one.settings)))
        for one in (before, after)
    )
    examples = []
    for i, title in [(i, "After training") for i, drawing in enumerate(late) if drawing.right][:1]:
        examples += [("Before training", early[i].panel), (title, late[i].panel)]
    return examples + [("A mistake", drawing.panel) for drawing in late if not drawing.right][:1]


def compose(examples: list[tuple[str, Image.Image]], table: list[list[str]]) -> Image.Image:
    """All examples below one another, then the table."""
    gap, line, column = 10, 26, 150
    font, _ = choose_font(16, *(cell for row in table for cell in row))
    width = max(panel.width for _, panel in examples)
    height = sum(line + panel.height + gap for _, panel in examples) + line * len(table) + 2 * gap
    picture = Image.new("RGB", (max(width, column * len(table[0])) + 2 * gap, height), "white")
    draw, y = ImageDraw.Draw(picture), gap
    for title, panel in examples:
        draw.text((gap, y), title, "black", font)
        picture.paste(panel, (gap, y + line))
        y += line + panel.height + gap
    for row in table:
        for i, cell in enumerate(row):
            draw.text((gap + i * column, y), cell, "black", font)
        y += line
    return picture


def main(argv: list[str] | None = None) -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, what in (
        ("data_dir", "the toy set"),
        ("untrained", "folder of the classifier before training"),
        ("trained", "folder of the trained one, with its tests"),
        ("out", "picture to draw"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    args = parser.parse_args(argv)
    table = read_table(args.trained)
    scripts.save_image(args.out, compose(draw_examples(args.data_dir, args.untrained, args.trained), table))
    print("\n".join("".join(f"{cell:20}" for cell in row).rstrip() for row in table))
    print(f"before training, after it, and a mistake: {args.out}")


if __name__ == "__main__":
    main()
