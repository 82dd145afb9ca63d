"""Geometry and pixels against the PIL reference."""

import itertools

import numpy as np
import pytest
import reference
import torch
from conftest import draw_picture
from PIL import Image, ImageDraw

import glimpse

PAIRS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4)]  # every valid (k, start_size)
PLACES = [(0.0, 0.0), (-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (0.97, 0.1), (-0.3, -0.99)]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def natural_picture(side: int, seed: int = 0) -> Image.Image:
    """Smooth colours with hard edges in front, as photographs have them."""
    rng = np.random.default_rng(seed)
    picture = draw_picture(rng, side, side)
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, radius = rng.integers(0, side), rng.integers(0, side), rng.integers(side // 20, side // 6)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def extract(picture: Image.Image, places: list[tuple[float, float]], k: int, start_size: int, patch_size: int):
    """Patches [M, k, 3, P, P] in 0..255 of one picture."""
    scales = glimpse.patch_scales(k, start_size)
    pyramid = glimpse.build_pyramid(to_tensor(picture).unsqueeze(0), scales, patch_size)
    return glimpse.extract_patches(pyramid, torch.tensor([places]), scales, patch_size)[0] * 255


def test_valid_scales() -> None:
    assert [glimpse.patch_scales(*pair) for pair in PAIRS] == [(1,), (1, 2), (1, 2, 4), (2,), (2, 4), (4,)]
    assert [glimpse.canvas_size(96, start) for start in (1, 2, 4)] == [384, 192, 96]


@pytest.mark.parametrize("pair", [(0, 1), (4, 1), (3, 2), (2, 4), (1, 3), (1, 8), (1, 0), (-1, 2)])
def test_invalid_scales(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"k {pair[0]} with start_size {pair[1]}"):
        glimpse.patch_scales(*pair)


# Not 32: there the one line of pixels along the picture's border, where the reference blends in the black and a
# window of a level does not, is a thirtieth of the patch and alone reaches 2 of 255.
@pytest.mark.parametrize("patch_size", [64, 96])
@pytest.mark.parametrize("pair", PAIRS)
def test_extraction_equals_the_pil_reference(pair: tuple[int, int], patch_size: int) -> None:
    k, start_size = pair
    picture = natural_picture(glimpse.canvas_size(patch_size, start_size))
    rng = np.random.default_rng(1)
    places = PLACES + [tuple(place) for place in rng.uniform(-1, 1, (20, 2)).tolist()]
    patches = extract(picture, places, k, start_size, patch_size)
    for (x, y), ours in zip(places, patches):
        for i, theirs in enumerate(reference.glimpse(picture, x, y, k, start_size, patch_size)):
            error = (ours[i] - to_tensor(theirs)).abs().mean().item()
            assert error < 2, f"patch {i} at ({x:.2f}, {y:.2f}) is {error:.2f} of 255 off"


def test_reference_notices_an_inverted_axis() -> None:
    picture = natural_picture(128)
    patches = extract(picture, [(0.4, -0.6)], 1, 1, 32)[0, 0]
    theirs = to_tensor(reference.glimpse(picture, 0.4, 0.6, 1, 1, 32)[0])
    assert (patches - theirs).abs().mean() > 10  # what the comparison above would see


def test_outside_the_picture_is_black() -> None:
    white = Image.new("RGB", (128, 128), "white")
    patch = extract(white, [(-1.0, -1.0)], 1, 1, 32)[0, 0]
    assert (patch[:, :16] == 0).all() and (patch[:, :, :16] == 0).all() and (patch[:, 16:, 16:] == 255).all()
    black = glimpse.normalize(torch.zeros(1, 3, 1, 1)).flatten()
    assert torch.allclose(black, -torch.tensor(glimpse.IMAGENET_MEAN) / torch.tensor(glimpse.IMAGENET_STD))


def test_extraction_is_batched_over_pictures_and_places() -> None:
    pictures = [natural_picture(64, seed) for seed in range(3)]
    canvas = torch.stack([to_tensor(picture) for picture in pictures])
    location = torch.rand(3, 4, 2) * 2 - 1
    pyramid = glimpse.build_pyramid(canvas, (2, 4), 32)
    together = glimpse.extract_patches(pyramid, location, (2, 4), 32) * 255
    assert together.shape == (3, 4, 2, 3, 32, 32)
    for picture, places, patches in zip(pictures, location.tolist(), together):
        assert torch.equal(patches, extract(picture, [tuple(place) for place in places], 2, 2, 32))


@pytest.mark.parametrize("place", PLACES)
def test_box_drawn_is_the_box_cut(place: tuple[float, float]) -> None:
    """The outline drawn runs along the outermost pixels of the patch that was cut."""
    side, patch_size = 128, 32
    boxes = glimpse.patch_boxes(torch.tensor([place]), (1,), patch_size)
    drawn = np.array(glimpse.draw_boxes(Image.new("RGB", (side, side), "black"), boxes))[..., 0] == 255
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    index = torch.arange(side * side).reshape(side, side)  # each pixel's own number, in two bytes of its colour
    canvas = torch.stack([index // 256, index % 256, torch.full_like(index, 255)]).byte().unsqueeze(0)
    pyramid = glimpse.build_pyramid(canvas, (1,), patch_size)
    patch = (glimpse.extract_patches(pyramid, torch.tensor([[place]]), (1,), patch_size)[0, 0, 0] * 255).round()
    numbers = (patch[0] * 256 + patch[1])[patch[2] > 0].long()  # of the pixels cut that lie inside the picture
    assert (rows.min(), rows.max()) == ((numbers // side).min(), (numbers // side).max())
    assert (columns.min(), columns.max()) == ((numbers % side).min(), (numbers % side).max())


def test_boxes_of_a_glimpse_are_concentric_and_doubling() -> None:
    boxes = glimpse.patch_boxes(torch.tensor([0.25, -0.5]), (1, 2, 4), 96)
    middle, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    assert torch.allclose(size, torch.tensor([[0.25, 0.25], [0.5, 0.5], [1.0, 1.0]]))
    assert torch.allclose(middle, torch.tensor([0.625, 0.25]).expand(3, 2), atol=0.5 / 96)


def test_panel_shows_every_part() -> None:
    picture = to_tensor(natural_picture(64))
    attention = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    place = torch.tensor([[-0.4, -0.4], [0.5, 0.5]])
    panel = glimpse.draw_panel(picture, place, attention, (2, 4), 32, "a caption", ["one", "two"])
    pixels = np.array(panel)
    assert all((pixels == color).all(-1).sum() > 500 for color in ([255, 0, 0], [0, 0, 255]))
    context = glimpse.build_pyramid(picture.unsqueeze(0), (4,), 32)[4][0, :, 16:48, 16:48]
    seen = (context * 255).round().byte()
    left, top, tile, row = 8 + 480 + 8, 30 + 22, 192, 22 + 192 + 22 + 8
    patch = np.array(panel.crop((left + 200, top, left + 200 + tile, top + tile)))
    corner = glimpse.extract_patches(
        glimpse.build_pyramid(picture.unsqueeze(0), (2,), 32), torch.tensor([[[-0.4, -0.4]]]), (2,), 32
    )
    assert (patch[::6, ::6] == (corner[0, 0, 0] * 255).round().byte().permute(1, 2, 0).numpy()).all()  # 6 x 6 pixels
    attended = np.array(panel.crop((left, top, left + tile, top + tile)))[3::6, 3::6]
    assert (attended[:4, :4] == seen.permute(1, 2, 0).numpy()[:4, :4]).all()  # the heaviest quadrant in full light
    assert panel.size == (8 + 480 + 3 * 200 + 8, 22 + 8 + 480 + 8)
    other = np.array(glimpse.draw_panel(picture, place, attention, (2, 4), 32, "a caption", ["one", "three"]))
    changed = np.argwhere((other != pixels).any(-1))  # what the network says after the second glimpse, below its row
    assert changed.min(0)[0] >= top + row + tile and changed.min(0)[1] >= left and len(changed)


def test_contact_sheet_shows_every_picture_with_its_boxes() -> None:
    colors = [(40 * i, 255 - 40 * i, 90) for i in range(7)]
    canvases = [to_tensor(Image.new("RGB", (64, 64), color)) for color in colors]
    boxes = [torch.tensor([[[0.25, 0.25, 0.75, 0.75]]])] * 7
    sheet = np.array(glimpse.draw_contact_sheet(canvases, boxes, ["one line\nand another"] * 7))
    assert sheet.shape == (8 + 2 * (276 + 8), 8 + 5 * (240 + 8), 3)
    for i, color in enumerate(colors):
        x, y = 8 + 248 * (i % 5), 8 + 284 * (i // 5)
        tile = sheet[y : y + 276, x : x + 240]
        assert (tile[120, 120] == color).all() and (tile[60, 60:180] == (255, 0, 0)).all()
        assert (tile[240:] < 128).all(-1).any() and (tile[-1] == 255).all()  # a caption, not cut off


def test_attention_is_drawn_over_its_own_quadrant() -> None:
    white = Image.new("RGB", (64, 64), "white")
    for quadrant, (x, y) in enumerate(itertools.product((0, 1), repeat=2)):
        weights = torch.full((4,), 0.1)
        weights[quadrant] = 0.7
        brightness = np.array(glimpse.draw_attention(white, weights)).mean(-1)
        means = [
            brightness[32 * j : 32 * j + 6, 32 * i : 32 * i + 6].mean() for j, i in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        assert int(np.argmax(means)) == quadrant == 2 * x + y


def test_inside_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.0, 1.0, 0.25], [0.0, 0.0, 0.5, 0.5]])  # left, top, right, bottom
    location = torch.tensor([[0.5, -0.9], [-0.5, -0.9], [0.5, 0.9], [-1.0, -0.1]])  # x to the right, y down
    hits = glimpse.inside(location.expand(2, 4, 2), boxes[:, None])
    assert hits.tolist() == [[True, False, False, False], [False, True, False, True]]
