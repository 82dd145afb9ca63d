"""Geometry and pixels of glimpses: patch scales, image pyramid, patch extraction, boxes and drawing.

Shapes: B images, M glimpses per image, T glimpses per trajectory, k patches per glimpse, P patch side, S canvas side.
Locations are (x, y) in [-1, 1]: x to the right, y down, (0, 0) the center of the image.
Scales are in quarters of the image side: a patch of scale q covers q/4 of the side and is always P x P pixels.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

FULL_SCALE = 4  # in quarters: a patch of this scale covers the whole image
STARTS = (1, 2, 4)  # scales of the three resolution levels: high, medium and low resolution
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SYSTEM_FONTS = (  # of Linux, macOS and Windows, for class names in any language
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "unifont.otf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "arial.ttf", "msyh.ttc", "malgun.ttf"),
)
GLIMPSE_COLORS = ("red", "blue", "green", "#c85a00", "purple", "darkcyan")  # dark enough for text on white
GAP, LINE = 8, 22  # of a panel, in pixels: between its parts, and the height of a line of text


def patch_scales(k: int, start_size: int) -> tuple[int, ...]:
    """Scales of the k concentric patches, finest first: start_size * 2^i. Raises ValueError if one is not 1, 2 or 4."""
    if k < 1 or start_size not in STARTS or start_size * 2 ** (k - 1) > FULL_SCALE:
        raise ValueError(f"k {k} with start_size {start_size} is not (1, 1), (2, 1), (3, 1), (1, 2), (2, 2) or (1, 4)")
    return tuple(start_size * 2**i for i in range(k))


def canvas_size(patch_size: int, start_size: int) -> int:
    """Side in pixels of the canvas at the resolution of the finest patch, so that it is cut without resizing."""
    return FULL_SCALE * patch_size // start_size


def build_pyramid(canvas: Tensor, scales: tuple[int, ...], patch_size: int) -> dict[int, Tensor]:
    """Build the resolution levels that patches are cut from: one for each scale, and one for the whole image.

    canvas: uint8 [B, 3, S, S]. Returns {scale q: float [B, 3, 4P/q + P, 4P/q + P]} in [0, 1]: the image, resized with
    antialiasing to side 4P/q and padded with P/2 black pixels, as far as a patch can extend beyond the image border.
    """
    image = canvas.float() / 255
    levels = {}
    for scale in {*scales, FULL_SCALE}:
        side = canvas_size(patch_size, scale)
        level = image if side == canvas.shape[-1] else F.interpolate(image, side, mode="bilinear", antialias=True)
        levels[scale] = F.pad(level, [patch_size // 2] * 4)
    return levels


def patch_boxes(location: Tensor, scales: tuple[int, ...], patch_size: int) -> Tensor:
    """Boxes (left, top, right, bottom) of the patches of a glimpse, as fractions of the image side.

    location: [..., 2]. Returns [..., k, 4]. Boxes lie on the pixel grid of their level and may cross the image border.
    """
    boxes = []
    for scale in scales:
        side = canvas_size(patch_size, scale)
        corner = ((location.clamp(-1, 1) + 1) / 2 * side - patch_size / 2).round()  # [..., 2], left and top
        boxes.append(torch.cat([corner, corner + patch_size], dim=-1) / side)
    return torch.stack(boxes, dim=-2)


def inside(location: Tensor, box: Tensor) -> Tensor:
    """Whether a location [..., 2] lies inside a box [..., 4] in the format of `patch_boxes`: bool [...]."""
    point = (location + 1) / 2
    return ((point >= box[..., :2]) & (point <= box[..., 2:])).all(-1)


def extract_patches(pyramid: dict[int, Tensor], location: Tensor, scales: tuple[int, ...], patch_size: int) -> Tensor:
    """Extract the k concentric patches of M glimpses from each image; pixels outside the image are black.

    pyramid: from `build_pyramid`; location: [B, M, 2]. Returns [B, M, k, 3, P, P] in [0, 1].
    """
    boxes = patch_boxes(location, scales, patch_size)  # [B, M, k, 4]
    image = torch.arange(len(location), device=location.device).unsqueeze(1)  # [B, 1]
    patches = []
    for i, scale in enumerate(scales):
        side = canvas_size(patch_size, scale)
        corner = (boxes[..., i, :2] * side).round().long() + patch_size // 2  # exact: undoes a division by the side
        left, top = corner.clamp(0, side).unbind(-1)  # [B, M]; a diverged network's NaN, too, needs a valid index
        windows = pyramid[scale].unfold(2, patch_size, 1).unfold(3, patch_size, 1)  # a view: [B, 3, y, x, P, P]
        patches.append(windows[image, :, top, left])  # [B, M, 3, P, P]
    return torch.stack(patches, dim=2)


def normalize(patches: Tensor) -> Tensor:
    """Subtract the ImageNet mean and divide by its standard deviation. patches: [..., 3, P, P] in [0, 1]."""
    # Python numbers, because constant tensors would cost a synchronizing copy to the GPU in each call.
    return torch.stack([(x - m) / s for x, m, s in zip(patches.unbind(-3), IMAGENET_MEAN, IMAGENET_STD)], dim=-3)


@functools.lru_cache
def load_fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """Pillow's own font, which has little more than ASCII, and those of `SYSTEM_FONTS` that are installed."""
    fonts = [ImageFont.load_default(size)]
    for name in SYSTEM_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts


def choose_font(size: int, *texts: str) -> tuple[ImageFont.FreeTypeFont, list[str]]:
    """The first font with all characters of the texts, and the texts; without one, they are escaped, as in \\u67f4."""
    characters = set("".join(texts)) - set(" \n")
    for font in load_fonts(size):
        missing = bytes(font.getmask("\U0010fffe"))  # not a character, so it renders as a missing one
        if all(bytes(font.getmask(character)) != missing for character in characters):
            return font, list(texts)
    return load_fonts(size)[0], [text.encode("ascii", "backslashreplace").decode() for text in texts]


def to_image(pixels: Tensor, side: int) -> Image.Image:
    """Convert uint8 [3, S, S] to a PIL image of the given side; at integer factors each pixel becomes a square."""
    resample = Image.Resampling.NEAREST if side % pixels.shape[-1] == 0 else Image.Resampling.LANCZOS
    return to_pil_image(pixels).resize((side, side), resample)


def draw_boxes(image: Image.Image, boxes: Tensor) -> Image.Image:
    """Copy a square image and draw the boxes [T, k, 4] of T glimpses, one color each, clipped at the border."""
    image = image.copy()
    draw, drawn = ImageDraw.Draw(image), []
    for color, glimpse in zip(GLIMPSE_COLORS * len(boxes), boxes.clamp(0, 1).tolist()):
        for box in glimpse:
            left, top, right, bottom = (round(edge * image.width) for edge in box)
            inset = min(4 * drawn.count(box), (right - left - 1) // 2, (bottom - top - 1) // 2)
            drawn.append(box)  # the next glimpse at the same location is outlined inside this one, not over it
            draw.rectangle((left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=color, width=3)
    return image


def draw_dogs(image: Image.Image, boxes: Tensor) -> Image.Image:
    """Copy a square image and outline the annotated boxes [n, 4] of dogs, thin and dashed, unlike those of glimpses."""
    outlines, places = Image.new("1", image.size), torch.arange(image.width)
    for box in (boxes * (image.width - 1)).round().int().tolist():
        ImageDraw.Draw(outlines).rectangle(box, outline=1)
    stripes = (places + places.unsqueeze(1)) // 5 % 2 * 255  # black and white, diagonal: dashes along every side
    image = image.copy()
    image.paste(to_pil_image(stripes.byte()), mask=outlines)
    return image


def draw_attention(context: Image.Image, attention: Tensor) -> Image.Image:
    """Copy the context and darken each of its c x c cells the less attention, of [c c], it gets; label quadrants."""
    side = math.isqrt(len(attention))
    brightness = (0.3 + 0.7 * attention / attention.max()).view(1, 1, side, side)
    pixels = pil_to_tensor(context) * F.interpolate(brightness, context.width, mode="nearest-exact")[0]
    image = to_pil_image(pixels.round().byte())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for i, weight in enumerate(attention.tolist() if side == 2 else []):
        center = (i % 2 + 0.5) * image.width / 2, (i // 2 + 0.5) * image.width / 2
        draw.text(center, f"{weight:.2f}", "white", font, "mm", stroke_width=1, stroke_fill="black")
    return image


def draw_row(tiles: dict[str, Image.Image], prediction: str, color: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw images of one size in a row, each below its title, the first in black, and a prediction below them."""
    side = max(tile.width for tile in tiles.values())
    width = max(len(tiles) * (side + GAP), round(font.getlength(prediction)) + GAP)
    row = Image.new("RGB", (width, LINE + side + LINE + GAP), "white")
    draw = ImageDraw.Draw(row)
    for i, (title, tile) in enumerate(tiles.items()):
        draw.text((i * (side + GAP), 0), title, color if i else "black", font)
        row.paste(tile, (i * (side + GAP), LINE))
    draw.text((0, LINE + side + GAP / 2), prediction, color, font)
    return row


def draw_panel(
    canvas: Tensor,
    location: Tensor,
    attention: Tensor | None,
    scales: tuple[int, ...],
    patch_size: int,
    caption: str,
    predictions: list[str],
    dogs: Tensor,
) -> Image.Image:
    """Draw a trajectory over one image: the canvas with its boxes, and for each glimpse the attention and the patches.

    canvas: uint8 [3, S, S]; location: [T, 2]; attention: [T, c c], or None; caption: one or more lines; predictions: T,
    one after each glimpse, or T + 1, the first for the context alone; dogs: annotated boxes [n, 4], if any.
    """
    pyramid, k = build_pyramid(canvas.unsqueeze(0), scales, patch_size), len(scales)
    context = extract_patches(pyramid, torch.zeros(1, 1, 2), (FULL_SCALE,), patch_size)[0, 0, 0]  # [3, P, P]
    patches = extract_patches(pyramid, location.unsqueeze(0), scales, patch_size)[0]  # [T, k, 3, P, P]
    tile_side = patch_size * max(1, round(192 / patch_size))  # an integer factor: pixels become squares
    font, (caption, *predictions) = choose_font(14, caption, *predictions)
    image, rows = to_image((context * 255).round().byte(), tile_side), []
    if len(predictions) > len(location):
        rows.append(draw_row({"context": image}, f"after the context: {predictions.pop(0)}", "black", font))
    for t, color, prediction in zip(range(len(location)), GLIMPSE_COLORS * len(location), predictions):
        name = f"glimpse {t + 1}"
        tiles = {"context": image} if attention is None else {f"attention {t + 1}": draw_attention(image, attention[t])}
        for i, patch in enumerate((patches[t] * 255).round().byte(), start=1):
            tiles[f"{name}, patch {i} of {k}" if k > 1 else name] = to_image(patch, tile_side)
        rows.append(draw_row(tiles, f"after {name}: {prediction}", color, font))

    side = max(canvas.shape[-1], 2 * tile_side, len(rows) * rows[0].height - GAP)
    left, top = GAP + side + GAP, LINE * (caption.count("\n") + 1) + GAP  # of the rows
    end = GAP + max(map(font.getlength, caption.split("\n")))
    width = max(left + max(row.width for row in rows), round(end) + GAP)
    panel = Image.new("RGB", (width, top + side + GAP), "white")
    ImageDraw.Draw(panel).text((GAP, GAP / 2), caption, "black", font)
    with_dogs = draw_dogs(to_image(canvas, side), dogs)
    panel.paste(draw_boxes(with_dogs, patch_boxes(location, scales, patch_size)), (GAP, top))
    for i, row in enumerate(rows):
        panel.paste(row, (left, top + i * row.height))
    return panel


def draw_contact_sheet(
    canvases: list[Tensor], boxes: list[Tensor], captions: list[str], correct: list[bool]
) -> Image.Image:
    """Draw images, uint8 [3, S, S], with boxes, [T, k, 4], above one or two lines of caption, in red if not correct."""
    side, tiles = 256, []  # wide enough for the breeds of Stanford Dogs; longer lines end at the edge
    font, captions = choose_font(12, *captions)
    for canvas, box, caption, is_correct in zip(canvases, boxes, captions, correct):
        tile = Image.new("RGB", (side, side + 36), "white")
        tile.paste(draw_boxes(to_image(canvas, side), box))
        text, color = (caption, "black") if is_correct else (caption.replace("predicted", "wrong:", 1), "#c00000")
        ImageDraw.Draw(tile).text((0, side + 2), text, color, font)
        tiles.append(pil_to_tensor(tile))
    return to_pil_image(make_grid(tiles, nrow=5, padding=8, pad_value=255))
