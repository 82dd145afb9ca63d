"""Independent reference: slow, simple glimpses with PIL, and the loss in scalar arithmetic.

Nothing here imports the code under test.
"""

import math

from PIL import Image


def crop_with_black_border(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    """A square crop that may cross the image border; pixels outside are black."""
    square = Image.new("RGB", (side, side), "black")
    square.paste(image, (-left, -top))
    return square


def glimpse(image: Image.Image, x: float, y: float, k: int, start_size: int, patch_size: int) -> list[Image.Image]:
    """The k patches of the glimpse at (x, y) in [-1, 1], finest first.

    image: square, of side 4 * patch_size / start_size. A patch of q quarters is a crop of q/4 of the side around the
    location, which is rounded to whole pixels of the patch, and is resized to patch_size.
    """
    patches = []
    for i in range(k):
        quarters = start_size * 2**i
        factor = quarters // start_size  # image pixels per patch pixel
        level_side = image.width // factor
        left = round((x + 1) / 2 * level_side - patch_size / 2) * factor
        top = round((y + 1) / 2 * level_side - patch_size / 2) * factor
        square = crop_with_black_border(image, left, top, patch_size * factor)
        patches.append(square.resize((patch_size, patch_size), Image.Resampling.BILINEAR))
    return patches


def context(image: Image.Image, patch_size: int) -> Image.Image:
    """The whole image resized to patch_size."""
    return image.resize((patch_size, patch_size), Image.Resampling.BILINEAR)


def normal_log_density(value: float, mean: float, std_dev: float) -> float:
    """Log-density of a normal distribution."""
    return math.log(math.exp(-((value - mean) ** 2) / (2 * std_dev**2)) / math.sqrt(2 * math.pi * std_dev**2))


def loss(
    logits: list[list[list[list[float]]]],
    baseline: list[list[list[float]]],
    log_prob: list[list[list[float]]],
    labels: list[int],
    each: bool,
) -> tuple[float, float, float]:
    """Cross-entropy, squared error of the baseline and REINFORCE. [B][M][T][C], [B][M][T], [B][M][T] and [B].

    each: the predictions after all glimpses are supervised, not only the last one.
    """
    classification, squared, reinforce = [], [], []
    for image, label in enumerate(labels):
        for trajectory, predictions in enumerate(logits[image]):
            term = 0.0
            for step, expected in enumerate(baseline[image][trajectory]):
                scores = predictions[step] if each else predictions[-1]
                if each or step == 0:
                    probability = math.exp(scores[label]) / sum(math.exp(score) for score in scores)
                    classification.append(-math.log(probability))
                reward = 1.0 if scores.index(max(scores)) == label else 0.0
                squared.append((expected - reward) ** 2)
                term -= (reward - expected) * log_prob[image][trajectory][step]
            reinforce.append(term)
    return tuple(sum(values) / len(values) for values in (classification, squared, reinforce))
