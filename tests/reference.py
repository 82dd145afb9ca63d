"""The independent oracle: a slow, obvious retina made with PIL, and the loss written out number by number.

Nothing here imports the code under test.
"""

import math

from PIL import Image


def crop_with_black_border(picture: Image.Image, left: int, top: int, side: int) -> Image.Image:
    """A square of the picture that may reach over its border; what lies outside is black."""
    square = Image.new("RGB", (side, side), "black")
    square.paste(picture, (-left, -top))
    return square


def glimpse(picture: Image.Image, x: float, y: float, k: int, start_size: int, patch_size: int) -> list[Image.Image]:
    """The k patches of the glimpse at (x, y) in [-1, 1], finest first, and nothing clever.

    picture: square, its side 4 * patch_size / start_size. A patch of q quarters is cut at q/4 of the side around the
    place looked at, which is rounded to whole pixels of the patch, and shrunk to patch_size.
    """
    patches = []
    for i in range(k):
        quarters = start_size * 2**i
        shrink = quarters // start_size  # pixels of the picture per pixel of the patch
        level_side = picture.width // shrink
        left = round((x + 1) / 2 * level_side - patch_size / 2) * shrink
        top = round((y + 1) / 2 * level_side - patch_size / 2) * shrink
        square = crop_with_black_border(picture, left, top, patch_size * shrink)
        patches.append(square.resize((patch_size, patch_size), Image.Resampling.BILINEAR))
    return patches


def context(picture: Image.Image, patch_size: int) -> Image.Image:
    """The whole picture at patch_size."""
    return picture.resize((patch_size, patch_size), Image.Resampling.BILINEAR)


def normal_log_density(value: float, mean: float, std_dev: float) -> float:
    """Logarithm of the density of a normal distribution."""
    return math.log(math.exp(-((value - mean) ** 2) / (2 * std_dev**2)) / math.sqrt(2 * math.pi * std_dev**2))


def loss(
    logits: list[list[list[list[float]]]],
    baseline: list[list[list[float]]],
    log_prob: list[list[list[float]]],
    labels: list[int],
    each: bool,
) -> tuple[float, float, float]:
    """Cross-entropy, squared error of the baseline and REINFORCE. [B][M][T][C], [B][M][T], [B][M][T] and [B].

    each: predictions after all glimpses count, not the last one alone.
    """
    classification, squared, reinforce = [], [], []
    for picture, label in enumerate(labels):
        for trajectory, predictions in enumerate(logits[picture]):
            term = 0.0
            for step, expected in enumerate(baseline[picture][trajectory]):
                scores = predictions[step] if each else predictions[-1]
                if each or step == 0:
                    probability = math.exp(scores[label]) / sum(math.exp(score) for score in scores)
                    classification.append(-math.log(probability))
                reward = 1.0 if scores.index(max(scores)) == label else 0.0
                squared.append((expected - reward) ** 2)
                term -= (reward - expected) * log_prob[picture][trajectory][step]
            reinforce.append(term)
    return tuple(sum(values) / len(values) for values in (classification, squared, reinforce))
