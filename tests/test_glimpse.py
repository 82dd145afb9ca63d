"""Geometry and pixels against the PIL reference."""

import itertools

import numpy as np
import pytest
import reference
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

import glimpse

PAIRS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4)]  # every valid (k, start_size)
NO_DOGS = torch.empty(0, 4)
LOCATIONS = [(0.0, 0.0), (-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (0.97, 0.1), (-0.3, -0.99)]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def natural_image(side: int, seed: int = 0) -> Image.Image:
    """Smooth colors with hard-edged discs in front, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, radius = rng.integers(0, side), rng.integers(0, side), rng.integers(side // 20, side // 6)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def extract(image: Image.Image, locations: list[tuple[float, float]], k: int, start_size: int, patch_size: int):
    """Patches [M, k, 3, P, P] of one image, in 0..255."""
    scales = glimpse.patch_scales(k, start_size)
    pyramid = glimpse.build_pyramid(to_tensor(image).unsqueeze(0), scales, patch_size)
    return glimpse.extract_patches(pyramid, torch.tensor([locations]), scales, patch_size)[0] * 255


def test_valid_scales() -> None:
    assert [glimpse.patch_scales(*pair) for pair in PAIRS] == [(1,), (1, 2), (1, 2, 4), (2,), (2, 4), (4,)]
    assert [glimpse.canvas_size(96, start) for start in (1, 2, 4)] == [384, 192, 96]


@pytest.mark.parametrize("pair", [(0, 1), (4, 1), (3, 2), (2, 4), (1, 3), (1, 8), (1, 0), (-1, 2)])
def test_invalid_scales(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"k {pair[0]} with start_size {pair[1]}"):
        glimpse.patch_scales(*pair)


# Not 32: the row of pixels along the image border, where the reference blends in black and the pyramid does not, is a
# thirtieth of such a patch and alone adds an error of 2 out of 255.
@pytest.mark.parametrize("patch_size", [64, 96])
@pytest.mark.parametrize("pair", PAIRS)
def test_extraction_equals_the_pil_reference(pair: tuple[int, int], patch_size: int) -> None:
    k, start_size = pair
    image = natural_image(glimpse.canvas_size(patch_size, start_size))
    rng = np.random.default_rng(1)
    locations = LOCATIONS + [tuple(location) for location in rng.uniform(-1, 1, (20, 2)).tolist()]
    patches = extract(image, locations, k, start_size, patch_size)
    for (x, y), ours in zip(locations, patches):
        for i, theirs in enumerate(reference.glimpse(image, x, y, k, start_size, patch_size)):
            error = (ours[i] - to_tensor(theirs)).abs().mean().item()
            assert error < 2, f"patch {i} at ({x:.2f}, {y:.2f}) is off by {error:.2f} of 255"


def test_reference_detects_an_inverted_axis() -> None:
    image = natural_image(128)
    patches = extract(image, [(0.4, -0.6)], 1, 1, 32)[0, 0]
    theirs = to_tensor(reference.glimpse(image, 0.4, 0.6, 1, 1, 32)[0])
    assert (patches - theirs).abs().mean() > 10  # far above the tolerance of the comparison above


def test_outside_the_image_is_black() -> None:
    white = Image.new("RGB", (128, 128), "white")
    patch = extract(white, [(-1.0, -1.0)], 1, 1, 32)[0, 0]
    assert (patch[:, :16] == 0).all() and (patch[:, :, :16] == 0).all() and (patch[:, 16:, 16:] == 255).all()
    black = glimpse.normalize(torch.zeros(1, 3, 1, 1)).flatten()
    assert torch.allclose(black, -torch.tensor(glimpse.IMAGENET_MEAN) / torch.tensor(glimpse.IMAGENET_STD))


def test_extraction_is_batched_over_images_and_locations() -> None:
    images = [natural_image(64, seed) for seed in range(3)]
    canvas = torch.stack([to_tensor(image) for image in images])
    location = torch.rand(3, 4, 2) * 2 - 1
    pyramid = glimpse.build_pyramid(canvas, (2, 4), 32)
    together = glimpse.extract_patches(pyramid, location, (2, 4), 32) * 255
    assert together.shape == (3, 4, 2, 3, 32, 32)
    for image, locations, patches in zip(images, location.tolist(), together):
        assert torch.equal(patches, extract(image, [tuple(point) for point in locations], 2, 2, 32))


@pytest.mark.parametrize("location", LOCATIONS)
def test_box_drawn_is_the_box_cut(location: tuple[float, float]) -> None:
    """The outline covers the outermost pixels of the patch that is cut."""
    side, patch_size = 128, 32
    boxes = glimpse.patch_boxes(torch.tensor([location]), (1,), patch_size)
    drawn = np.array(glimpse.draw_boxes(Image.new("RGB", (side, side), "black"), boxes))[..., 0] == 255
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    index = torch.arange(side * side).reshape(side, side)  # each pixel's index, in two bytes of its color
    canvas = torch.stack([index // 256, index % 256, torch.full_like(index, 255)]).byte().unsqueeze(0)
    pyramid = glimpse.build_pyramid(canvas, (1,), patch_size)
    patch = (glimpse.extract_patches(pyramid, torch.tensor([[location]]), (1,), patch_size)[0, 0, 0] * 255).round()
    indices = (patch[0] * 256 + patch[1])[patch[2] > 0].long()  # of the pixels of the patch that lie inside the image
    assert (rows.min(), rows.max()) == ((indices // side).min(), (indices // side).max())
    assert (columns.min(), columns.max()) == ((indices % side).min(), (indices % side).max())


@pytest.mark.parametrize("n_glimpses", [3, 20])
def test_coinciding_boxes_are_visible(n_glimpses: int) -> None:
    """As with the policy "center"; there is room for three outlines in the smaller box."""
    boxes = glimpse.patch_boxes(torch.zeros(n_glimpses, 2), (1, 4), 32)
    pixels = np.array(glimpse.draw_boxes(Image.new("RGB", (128, 128), "white"), boxes))
    for i, color in enumerate(glimpse.GLIMPSE_COLORS[:3]):
        drawn = (pixels == ImageColor.getrgb(color)).all(-1)
        for left, right in ((48, 80), (0, 128)):
            expected = [4 * i, 4 * i + 1, 4 * i + 2]  # in pixels from the edge of the box
            assert np.flatnonzero(drawn[64, left : left + 12]).tolist() == expected
            assert np.flatnonzero(drawn[64, right - 12 : right][::-1]).tolist() == expected


def test_annotated_dogs_are_dashed_where_they_are() -> None:
    dogs = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.1, 0.1]])
    pixels = np.array(glimpse.draw_dogs(Image.new("RGB", (101, 101), "red"), dogs))
    drawn = (pixels != (255, 0, 0)).any(2)
    expected = np.zeros((101, 101), dtype=bool)
    for left, top, right, bottom in ((25, 50, 75, 100), (0, 0, 10, 10)):
        expected[[top, bottom], left : right + 1] = expected[top : bottom + 1, [left, right]] = True
    assert (drawn == expected).all()
    edge = pixels[50, 25:76, 0]
    assert set(edge.tolist()) == {0, 255} and 0.3 < (edge == 0).mean() < 0.7 and (np.diff(edge) != 0).sum() > 5
    canvas = to_tensor(natural_image(128))
    panels = [
        np.array(glimpse.draw_panel(canvas, torch.zeros(1, 2), None, (2,), 32, "a caption", ["one"], boxes))
        for boxes in (NO_DOGS, dogs)
    ]
    assert 100 < (panels[0] != panels[1]).any(2).sum() < 2000


def test_boxes_of_a_glimpse_are_concentric_and_doubling() -> None:
    boxes = glimpse.patch_boxes(torch.tensor([0.25, -0.5]), (1, 2, 4), 96)
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    assert torch.allclose(size, torch.tensor([[0.25, 0.25], [0.5, 0.5], [1.0, 1.0]]))
    assert torch.allclose(center, torch.tensor([0.625, 0.25]).expand(3, 2), atol=0.5 / 96)


def test_colors_are_readable_as_text_on_white() -> None:
    for color in glimpse.GLIMPSE_COLORS:
        linear = [(value / 255) ** 2.2 for value in ImageColor.getrgb(color)]
        luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
        assert 1.05 / (luminance + 0.05) > 3.9, color  # contrast as defined by WCAG 2, which asks for at least 3


def test_panel_shows_every_part() -> None:
    canvas = to_tensor(natural_image(64))
    attention = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    location = torch.tensor([[-0.4, -0.4], [0.5, 0.5]])
    panel = glimpse.draw_panel(canvas, location, attention, (2, 4), 32, "a caption", ["one", "two"], NO_DOGS)
    pixels = np.array(panel)
    assert all((pixels == color).all(-1).sum() > 500 for color in ([255, 0, 0], [0, 0, 255]))
    context = glimpse.build_pyramid(canvas.unsqueeze(0), (4,), 32)[4][0, :, 16:48, 16:48]
    seen = (context * 255).round().byte()
    left, top, tile, row = 8 + 480 + 8, 30 + 22, 192, 22 + 192 + 22 + 8
    patch = np.array(panel.crop((left + 200, top, left + 200 + tile, top + tile)))
    corner = glimpse.extract_patches(
        glimpse.build_pyramid(canvas.unsqueeze(0), (2,), 32), torch.tensor([[[-0.4, -0.4]]]), (2,), 32
    )
    assert (patch[::6, ::6] == (corner[0, 0, 0] * 255).round().byte().permute(1, 2, 0).numpy()).all()  # 6 x 6 pixels
    attended = np.array(panel.crop((left, top, left + tile, top + tile)))[3::6, 3::6]
    assert (attended[:4, :4] == seen.permute(1, 2, 0).numpy()[:4, :4]).all()  # the largest weight at full brightness
    assert panel.size == (8 + 480 + 3 * 200 + 8, 22 + 8 + 480 + 8)
    other = np.array(
        glimpse.draw_panel(canvas, location, attention, (2, 4), 32, "a caption", ["one", "three"], NO_DOGS)
    )
    changed = np.argwhere((other != pixels).any(-1))  # the prediction after the second glimpse, below its row of tiles
    assert changed.min(0)[0] >= top + row + tile and changed.min(0)[1] >= left and len(changed)

    panel = glimpse.draw_panel(canvas, location, None, (2, 4), 32, "a caption", ["one", "two"], NO_DOGS)
    for t in range(2):  # without attention: the context as it is, with no weights written on it
        plain = np.array(panel.crop((left, top + t * row, left + tile, top + t * row + tile)))
        assert (plain == seen.permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1)).all()
    glanced = glimpse.draw_panel(canvas, location, attention, (2, 4), 32, "a caption", ["all", "one", "two"], NO_DOGS)
    lower = np.array(glanced)[top:, 8 + 3 * row - 8 + 8 :]  # three rows are higher than two tiles
    assert (lower[:tile, :tile] == plain).all()  # first the context as it is, then the glimpses
    assert (
        lower[row : 2 * row + tile, : 2 * tile + 8] == pixels[top : top + row + tile, left : left + 2 * tile + 8]
    ).all()
    labels = [np.array(image)[30:52, left : left + tile] for image in (panel, Image.fromarray(pixels))]
    assert all((label < 128).any() for label in labels) and (labels[0] != labels[1]).any()


@pytest.mark.parametrize("caption", ["a caption " * 30, "short\n" + "a second line " * 20, "first\nsecond\nthird"])
def test_text_of_a_panel_is_not_cut(caption: str) -> None:
    canvas, font = to_tensor(natural_image(64)), ImageFont.load_default(14)
    predictions = ["American Staffordshire terrier " * 4]
    panel = glimpse.draw_panel(canvas, torch.zeros(1, 2), None, (2,), 32, caption, predictions, NO_DOGS)
    text = Image.new("RGB", (4000, 200), "white")
    ImageDraw.Draw(text).text((8, 4), caption, "black", font)
    header = 22 * (caption.count("\n") + 1)
    rows, columns = np.nonzero((np.array(text) < 255).any(-1))
    assert rows.max() < header and columns.max() < panel.width
    assert (np.array(text)[:header, : panel.width] == np.array(panel)[:header]).all()
    left, top = 8 + 384 + 8, header + 8 + 22 + 192
    assert panel.width >= left + font.getlength(f"after glimpse 1: {predictions[0]}")
    assert (np.array(panel)[top : top + 22, left:] < 255).any() and (np.array(panel)[:, -1] == 255).all()


def test_contact_sheet_shows_every_image_with_its_boxes() -> None:
    colors = [(40 * i, 255 - 40 * i, 90) for i in range(7)]
    canvases = [to_tensor(Image.new("RGB", (64, 64), color)) for color in colors]
    boxes = [torch.tensor([[[0.25, 0.25, 0.75, 0.75]]])] * 7
    sheet = np.array(glimpse.draw_contact_sheet(canvases, boxes, ["one line\nand another"] * 7, [True] * 7))
    assert sheet.shape == (8 + 2 * (292 + 8), 8 + 5 * (256 + 8), 3)
    for i, color in enumerate(colors):
        x, y = 8 + 264 * (i % 5), 8 + 300 * (i // 5)
        tile = sheet[y : y + 292, x : x + 256]
        assert (tile[128, 128] == color).all() and (tile[64, 64:192] == (255, 0, 0)).all()
        assert (tile[256:] < 128).all(-1).any() and (tile[-1] == 255).all()  # a caption, not cut off


def test_contact_sheet_says_which_predictions_are_wrong() -> None:
    canvas, box = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    captions = ["predicted cat (0.50)", "wrong: cat (0.50)"]
    sheet = np.array(glimpse.draw_contact_sheet([canvas] * 2, [box] * 2, [captions[0]] * 2, [True, False]))
    right, wrong = (sheet[264:282, 8 + 264 * i : 264 + 264 * i].astype(int) for i in range(2))
    said = np.array(glimpse.draw_contact_sheet([canvas] * 2, [box] * 2, captions, [True] * 2))[264:282, 272:528]
    assert ((wrong[..., 1] < 128) == (said[..., 1] < 128)).all()
    assert (wrong[..., 0] >= 0xC0).all() and (right[..., 0] < 128).any()


def without_glyph(character: str, font: ImageFont.FreeTypeFont) -> bool:
    """Whether a font draws a character as its sign for a missing one, which U+FFFF, no character, is drawn as."""
    return bytes(font.getmask(character)) == bytes(font.getmask("\uffff"))


@pytest.mark.parametrize(
    "text", ["Größe", "Épagneul", "柴犬", "Русский той", "Ελληνικός", "a\u0308", "\u0378", "\U0010abcd", "Größe 柴犬"]
)
def test_no_character_is_drawn_as_a_missing_one(text: str) -> None:
    """A font that has all of them is taken, else all are escaped."""
    plain = "predicted American Staffordshire terrier (0.99),\ntrue Shiba"
    assert glimpse.choose_font(14, plain)[1] == [plain]
    font, (first, second) = glimpse.choose_font(14, plain, text)
    assert first == plain and not any(without_glyph(character, font) for character in {*first, *second} - {"\n"})
    assert second in (text, text.encode("ascii", "backslashreplace").decode())


def test_characters_of_no_font_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what panels and contact sheets show; texts in ASCII stay as they are."""
    plain = ImageFont.load_default(14)
    monkeypatch.setattr(glimpse, "load_fonts", lambda size: [ImageFont.load_default(size)])
    assert without_glyph("柴", plain) and without_glyph("ü", plain) and not without_glyph("u", plain)
    font, texts = glimpse.choose_font(14, "柴犬 (0.50)", "cat\ndog", "Größe")
    assert texts == ["\\u67f4\\u72ac (0.50)", "cat\ndog", "Gr\\xf6\\xdfe"]
    assert (np.array(font.getmask("cat")) == np.array(plain.getmask("cat"))).all()
    canvas, box = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    panels, sheets = [], []
    for name in ("Größe", "Gr\\xf6\\xdfe"):
        panels.append(
            glimpse.draw_panel(canvas, torch.zeros(1, 2), None, (2,), 32, f"{name}.jpg", [f"{name} (0.50)"], NO_DOGS)
        )
        sheets.append(
            glimpse.draw_contact_sheet([canvas] * 2, [box] * 2, [f"predicted {name} (0.50)", "true cat"], [True] * 2)
        )
    for first, second in (panels, sheets):
        assert first.size == second.size and (np.array(first) == np.array(second)).all()


def test_drawings_show_the_names_in_a_font_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one in which every character is wide, so that it can be recognized."""
    monkeypatch.setattr(glimpse, "choose_font", lambda size, *texts: (ImageFont.load_default(3 * size), list(texts)))
    canvas, box = torch.full((3, 64, 64), 255, dtype=torch.uint8), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    panel = np.array(
        glimpse.draw_panel(canvas, torch.zeros(1, 2), None, (2,), 32, "a caption", ["a prediction"], NO_DOGS)
    )
    sheet = np.array(glimpse.draw_contact_sheet([canvas], [box], ["a caption"], [True]))
    text = Image.new("RGB", (panel.shape[1], 20), "white")
    ImageDraw.Draw(text).text((8, 4), "a caption", "black", ImageFont.load_default(42))
    assert (panel[:20] == np.array(text)).all()
    assert (sheet[8 + 256 : -8, 8:-8] < 128).all(-1).any(0).sum() > 60  # columns with ink


def test_contact_sheet_keeps_long_names_in_their_tiles() -> None:
    """The longest names of Stanford Dogs as a whole; a longer one, of a class whose name no font has, is cut."""
    canvas, box = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    for long in ("American Staffordshire terrier", "West Highland white terrier", "柴犬" * 12):
        caption = f"predicted {long} (0.99)\ntrue {long} (0.01)"
        sheet = np.array(glimpse.draw_contact_sheet([canvas] * 6, [box] * 6, [caption] * 6, [True] * 6))
        assert (sheet[8 + 256 : 8 + 292, 256 + 8 : 256 + 16] == 255).all()  # nothing between the tiles
        for i in range(6):
            left = 8 + 264 * (i % 5)
            ink = ((sheet if i < 5 else sheet[300:])[8 + 256 : 8 + 292, left : left + 256] < 128).all(-1)
            assert ink[:18].any() and ink[18:].any() and np.flatnonzero(ink.any(0)).max() > 200
        assert long[0] > "z" or ImageFont.load_default(12).getlength(f"predicted {long} (0.99)") <= 256


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


def test_attention_over_finer_cells_is_a_heat_map() -> None:
    """Cells of equal brightness each, up to where sides are not divisible, without numbers on them."""
    white = Image.new("RGB", (64, 64), "white")
    for cell in range(25):
        weights = torch.full((25,), 0.01)
        weights[cell] = 0.5
        brightness = np.array(glimpse.draw_attention(white, weights)).mean(-1)
        row, column = divmod(cell, 5)
        edges = [round(i * 64 / 5) for i in range(6)]
        bright = np.zeros((64, 64), dtype=bool)
        bright[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = True
        assert (brightness[bright] == 255).all() and len(np.unique(brightness[~bright])) == 1


def test_inside_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.0, 1.0, 0.25], [0.0, 0.0, 0.5, 0.5]])  # left, top, right, bottom
    location = torch.tensor([[0.5, -0.9], [-0.5, -0.9], [0.5, 0.9], [-1.0, -0.1]])  # x to the right, y down
    hits = glimpse.inside(location.expand(2, 4, 2), boxes[:, None])
    assert hits.tolist() == [[True, False, False, False], [False, True, False, True]]
