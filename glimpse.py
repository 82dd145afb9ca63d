"""Geometry and pixels of glimpses: patch scales, image pyramid, patch extraction, boxes and drawing.

Shapes: B pictures, M glimpse centres per picture, T glimpses, k patches per glimpse, P patch side, S canvas side.
Locations are (x, y) in [-1, 1]: x to the right, y down, (0, 0) the middle of the picture.
Scales are quarters of the picture's side: a patch of scale q covers q/4 of the side and is always P x P pixels.
"""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

FULL_SCALE = 4  # quarters: a patch of this scale covers the whole picture
STARTS = (1, 2, 4)  # scales at which a picture may be looked at: high, medium and low resolution
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GLIMPSE_COLORS = ("red", "blue", "green", "orange", "purple", "cyan")


def patch_scales(k: int, start_size: int) -> tuple[int, ...]:
    """Scales of the k concentric patches of a glimpse, finest first: start_size * 2^i for i < k.

    Raises ValueError unless start_size is 1, 2 or 4 and the coarsest patch fits the picture.
    """
    if k < 1 or start_size not in STARTS or start_size * 2 ** (k - 1) > FULL_SCALE:
        raise ValueError(
            f"k {k} with start_size {start_size} is no valid pair of scales: start_size is 1, 2 or 4 quarters of the "
            f"side and start_size * 2^(k - 1) at most {FULL_SCALE}: (k, start_size) = (1, 1), (2, 1), (3, 1), (1, 2), "
            "(2, 2) or (1, 4)"
        )
    return tuple(start_size * 2**i for i in range(k))


def canvas_size(patch_size: int, start_size: int) -> int:
    """Side in pixels of the canvas whose own resolution is that of the finest patch."""
    return FULL_SCALE * patch_size // start_size


def build_pyramid(canvas: Tensor, scales: tuple[int, ...], patch_size: int) -> dict[int, Tensor]:
    """Resolution levels from which patches are windows, one for each scale and one for the whole picture.

    canvas: uint8 [B, 3, S, S]. Returns {scale q: float [B, 3, 4P/q + P, 4P/q + P]} in [0, 1]: the antialiased
    picture of side 4P/q within a black margin of P/2, as wide as a window at the picture's edge reaches out.
    """
    picture = canvas.float() / 255
    levels = {}
    for scale in {*scales, FULL_SCALE}:
        side = canvas_size(patch_size, scale)
        level = picture
        if side != canvas.shape[-1]:
            level = F.interpolate(picture, size=(side, side), mode="bilinear", antialias=True)
        levels[scale] = F.pad(level, [patch_size // 2] * 4)
    return levels


def patch_boxes(location: Tensor, scales: tuple[int, ...], patch_size: int) -> Tensor:
    """Boxes (left, top, right, bottom) of the patches of a glimpse, as fractions of the picture's side.

    location: [..., 2]. Returns [..., k, 4]. Boxes lie on the pixel grid of their level and may reach over the border.
    """
    boxes = []
    for scale in scales:
        side = canvas_size(patch_size, scale)
        corner = ((location.clamp(-1, 1) + 1) / 2 * side - patch_size / 2).round()  # [..., 2], left and top
        boxes.append(torch.cat([corner, corner + patch_size], dim=-1) / side)
    return torch.stack(boxes, dim=-2)


def inside(location: Tensor, box: Tensor) -> Tensor:
    """Whether a location [..., 2] lies in a box [..., 4] of the picture, given as by `patch_boxes`: bool [...]."""
    place = (location + 1) / 2
    return ((place >= box[..., :2]) & (place <= box[..., 2:])).all(-1)


def extract_patches(pyramid: dict[int, Tensor], location: Tensor, scales: tuple[int, ...], patch_size: int) -> Tensor:
    """Cut the k concentric patches of M glimpses out of each picture; what lies outside the picture is black.

    pyramid: of `build_pyramid`; location: [B, M, 2]. Returns [B, M, k, 3, P, P] in [0, 1].
    """
    boxes = patch_boxes(location, scales, patch_size)  # [B, M, k, 4]
    picture = torch.arange(len(location), device=location.device).unsqueeze(1)  # [B, 1]
    patches = []
    for i, scale in enumerate(scales):
        side = canvas_size(patch_size, scale)
        corner = (boxes[..., i, :2] * side).round().long() + patch_size // 2
        corner = corner.clamp(0, side)  # in it already, unless a network gone wrong looks at NaN: its loss tells
        left, top = corner.unbind(-1)  # [B, M]
        windows = pyramid[scale].unfold(2, patch_size, 1).unfold(3, patch_size, 1)  # a view: [B, 3, y, x, P, P]
        patches.append(windows[picture, :, top, left])  # [B, M, 3, P, P]
    return torch.stack(patches, dim=2)


def normalize(patches: Tensor) -> Tensor:
    """Subtract the ImageNet mean and divide by its deviation. patches: [..., 3, P, P] in [0, 1]."""
    # Numbers rather than tensors of constants, for which each call would copy to the GPU and wait.
    channels = zip(patches.unbind(-3), IMAGENET_MEAN, IMAGENET_STD)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=-3)


def to_image(picture: Tensor, side: int) -> Image.Image:
    """A uint8 [3, S, S] picture as a PIL image of the given side; whole multiples show each pixel as a square."""
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    resample = Image.Resampling.NEAREST if side % picture.shape[-1] == 0 else Image.Resampling.LANCZOS
    return image.resize((side, side), resample)


def draw_boxes(image: Image.Image, boxes: Tensor) -> Image.Image:
    """A copy of a square image with the boxes [T, k, 4] of T glimpses, one colour each, cut off at the border."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for color, glimpse in zip(GLIMPSE_COLORS * len(boxes), boxes.clamp(0, 1).tolist()):
        for left, top, right, bottom in glimpse:
            corners = [round(edge * image.width) for edge in (left, top, right, bottom)]
            draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), outline=color, width=3)
    return image


def draw_attention(context: Image.Image, attention: Tensor) -> Image.Image:
    """A copy of the context picture with the weights [4] in its quadrants, the heaviest in full light."""
    half = context.width // 2
    image = Image.new("RGB", context.size)
    draw = ImageDraw.Draw(image)
    for i, weight in enumerate(attention.tolist()):
        left, top = half * (i % 2), half * (i // 2)  # top left, top right, bottom left, bottom right
        light = 0.3 + 0.7 * weight / attention.max().item()
        quadrant = context.crop((left, top, left + half, top + half))
        image.paste(quadrant.point([round(value * light) for value in range(256)] * 3), (left, top))
        middle = (left + half / 2, top + half / 2)
        draw.text(
            middle, f"{weight:.2f}", "white", ImageFont.load_default(15), "mm", stroke_width=1, stroke_fill="black"
        )
    return image


def draw_panel(
    canvas: Tensor,
    location: Tensor,
    attention: Tensor,
    scales: tuple[int, ...],
    patch_size: int,
    caption: str,
    answers: list[str],
) -> Image.Image:
    """One picture's way through the network: canvas with boxes, and per glimpse the attention and the patches seen.

    canvas: uint8 [3, S, S]; location: [T, 2]; attention: [T, 4]; answers: what the network says after each glimpse.
    Boxes, context and patches come from the functions that cut them for the network.
    """
    pyramid = build_pyramid(canvas.unsqueeze(0), scales, patch_size)
    center = torch.zeros_like(location[:1])
    context = extract_patches(pyramid, center.unsqueeze(0), (FULL_SCALE,), patch_size)[0, 0, 0]  # [3, P, P]
    patches = extract_patches(pyramid, location.unsqueeze(0), scales, patch_size)[0]  # [T, k, 3, P, P]
    n_glimpses, k = patches.shape[:2]

    tile = patch_size * max(1, round(192 / patch_size))  # whole multiples: each pixel that the network saw is a square
    gap, line = 8, 22
    row = line + tile + line + gap
    side = max(canvas.shape[-1], 2 * tile, n_glimpses * row - gap)
    width = gap + side + (k + 1) * (tile + gap) + gap
    panel = Image.new("RGB", (width, line + gap + side + gap), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(14)
    draw.text((gap, gap / 2), caption, "black", font)
    panel.paste(draw_boxes(to_image(canvas, side), patch_boxes(location, scales, patch_size)), (gap, line + gap))
    for t, color, answer in zip(range(n_glimpses), GLIMPSE_COLORS * n_glimpses, answers):
        x, y = gap + side + gap, line + gap + t * row
        draw.text((x, y + line + tile + gap / 2), f"then {answer}", color, font)
        draw.text((x, y), f"attention {t + 1}", "black", font)
        panel.paste(draw_attention(to_image((context * 255).round().byte(), tile), attention[t]), (x, y + line))
        for i in range(k):
            x += tile + gap
            draw.text((x, y), f"glimpse {t + 1}" + (f", patch {i + 1} of {k}" if k > 1 else ""), color, font)
            panel.paste(to_image((patches[t, i] * 255).round().byte(), tile), (x, y + line))
    return panel


def draw_contact_sheet(canvases: list[Tensor], boxes: list[Tensor], captions: list[str]) -> Image.Image:
    """Many pictures with their boxes on one sheet, each with its caption of one or two lines below.

    canvases: uint8 [3, S, S] each; boxes: [T, k, 4] each.
    """
    side, font = 240, ImageFont.load_default(12)
    tiles = []
    for canvas, box, caption in zip(canvases, boxes, captions):
        tile = Image.new("RGB", (side, side + 36), "white")
        tile.paste(draw_boxes(to_image(canvas, side), box))
        ImageDraw.Draw(tile).text((0, side + 2), caption, "black", font)
        tiles.append(pil_to_tensor(tile))
    return to_pil_image(make_grid(tiles, nrow=5, padding=8, pad_value=255))
