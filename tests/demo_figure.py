"""Print what `make demo` found, and draw it as one figure: before training, after it, a mistake, and the table.

    python tests/demo_figure.py --data_dir data/toy --untrained data/toy/saved_models/untrained \
        --trained data/toy/saved_models --out imgs/toy/demo.jpg
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
from main import fixed_choice, load_classifier, save_image

POLICIES = ("learned", "center", "random")
COLUMNS = ("deterministic", "sampled trajectory", "average of 7", "hit rate")
EXAMPLES = ("before training", "after training", "a mistake")


def read_table(folder: Path) -> list[list[str]]:
    """Accuracy of each policy by estimate, and how often its first glimpse hits the dog, as formatted percentages."""
    rows = [["test set, in %", *COLUMNS]]
    for policy in POLICIES:
        figures = json.loads((folder / f"results_{policy}.json").read_text(encoding="utf-8"))["figures"]
        values = [figures[f"policy {policy}"].get(estimate, {}).get("accuracy") for estimate in COLUMNS[:-1]]
        values.append(next(iter(figures["glimpse 1"].values()))["hit_rate"])
        rows.append([policy, *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return rows


def draw_examples(data_dir: Path, untrained: Path, trained: Path) -> dict[str, Image.Image]:
    """A test image that is classified correctly, before and after training, and one that is not, if there are any."""
    before, after = (load_classifier(folder) for folder in (untrained, trained))
    images = dataset.read_list(data_dir, "test")
    images = images.subset(fixed_choice(len(images.files), len(images.files), after.args.seed))
    examples: dict[str, Image.Image] = {}
    for file, annotation, label in zip(images.files, images.annotations, images.labels):
        late = after(file, annotation)
        panel = after.draw(late, file.name, label)
        if late.drawn[-1].argmax() != label:
            examples.setdefault("a mistake", panel)
        elif "after training" not in examples:
            early = before.draw(before(file, annotation), file.name, label)
            examples |= {"before training": early, "after training": panel}
        if len(examples) == len(EXAMPLES):
            break
    return {name: examples[name] for name in EXAMPLES if name in examples}


def compose(examples: dict[str, Image.Image], table: list[list[str]]) -> Image.Image:
    """Stack the examples above the table."""
    gap, line, column = 10, 26, 150
    font = ImageFont.load_default(16)
    width = max(panel.width for panel in examples.values())
    height = sum(line + panel.height + gap for panel in examples.values()) + line * len(table) + 2 * gap
    figure = Image.new("RGB", (max(width, column * len(table[0])) + 2 * gap, height), "white")
    draw, y = ImageDraw.Draw(figure), gap
    for title, panel in examples.items():
        draw.text((gap, y), title.capitalize(), "black", font)
        figure.paste(panel, (gap, y + line))
        y += line + panel.height + gap
    for row in table:
        for i, cell in enumerate(row):
            draw.text((gap + i * column, y), cell, "black", font)
        y += line
    return figure


def main(argv: list[str] | None = None) -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, what in (
        ("data_dir", "the toy set"),
        ("untrained", "folder of the classifier before training"),
        ("trained", "folder of the trained classifier and its test results"),
        ("out", "image file to write"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    args = parser.parse_args(argv)
    table, examples = read_table(args.trained), draw_examples(args.data_dir, args.untrained, args.trained)
    save_image(args.out, compose(examples, table))
    print("\n".join("".join(f"{cell:20}" for cell in row).rstrip() for row in table))
    print(f"{', '.join(examples)}: {args.out}")


if __name__ == "__main__":
    main()
