"""Networks, the rollout and its gradients, and the loss against its scalar reference."""

import copy
import math

import numpy as np
import pytest
import reference
import torch
import torchvision
from conftest import N_CLASSES
from PIL import Image
from torch import nn

import glimpse
import model
from model import PretrainNetwork, Rollout, attention_loss, build_backbone, gaussian_log_prob, location_mean

PAIRS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4)]


def canvases(n_images: int, patch_size: int = 32, start_size: int = 1) -> torch.Tensor:
    side = glimpse.canvas_size(patch_size, start_size)
    return torch.randint(0, 256, (n_images, 3, side, side), dtype=torch.uint8)


def with_gradient(module: nn.Module) -> set[str]:
    """Names of the direct children that received a nonzero gradient."""
    return {
        name
        for name, child in module.named_children()
        if any(parameter.grad is not None and parameter.grad.any() for parameter in child.parameters())
    }


# --- backbone


def test_state_dict_keys_and_shapes_match_2018() -> None:
    resnet = torchvision.models.resnet50()
    resnet.conv1 = nn.Conv2d(3, 64, 5, 1, 2, bias=False)
    expected = nn.Sequential(*list(resnet.children())[:-2]).state_dict()
    ours = build_backbone("resnet50").state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}
    assert {"0.weight", "1.weight", "4.0.conv1.weight"} <= set(ours)


@pytest.mark.parametrize(("arch", "n_features"), [("resnet18", 512), ("resnet50", 2048)])
def test_backbone_has_stride_16(arch: str, n_features: int) -> None:
    backbone = build_backbone(arch).eval()
    assert model.feature_size(backbone) == n_features
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 96, 96)).shape == (1, n_features, 6, 6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_onednn_layout_does_not_change_the_backbone(arch: str) -> None:
    """Compared to float64, where PyTorch's own layouts differ as much: batch statistics amplify rounding errors."""
    backbone = build_backbone(arch)
    exact = nn.Sequential(*copy.deepcopy(backbone).double())
    layouts = []
    backbone[4].register_forward_pre_hook(lambda module, inputs: layouts.append(inputs[0].layout))
    patches = glimpse.normalize(torch.rand(4, 3, 64, 64))

    def error(value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        return (value - expected).norm() / expected.norm()

    features = backbone(patches), exact(patches.double())
    for output in features:
        output.square().mean().backward()
    gradients = [torch.cat([p.grad.flatten().double() for p in net.parameters()]) for net in (backbone, exact)]
    assert error(*features) < 1e-3 and error(*gradients) < 0.1
    for value, expected in zip(backbone.buffers(), exact.buffers(), strict=True):
        assert error(value.double(), expected.double()) < 1e-3
    with torch.no_grad():
        assert error(backbone.eval()(patches), exact.eval()(patches.double())) < 1e-4
    backbone(patches).mean().backward()  # in eval mode: training the weights with fixed statistics
    assert layouts == [torch._mkldnn, torch._mkldnn, torch.strided]


def test_stem_is_resampled_and_the_rest_copied() -> None:
    resnet = torchvision.models.resnet18()
    backbone = build_backbone("resnet18")
    model.load_resnet_weights(backbone, {key: value.half() for key, value in resnet.state_dict().items()})
    stem = backbone[0].weight
    assert stem.shape == (64, 3, 5, 5) and stem.dtype == torch.float32
    # A filter's response to a constant image is the sum of its kernel; a blob stays a blob of the same sign.
    flat = torch.ones(64, 3, 7, 7)
    backbone_of_flat = build_backbone("resnet18")
    model.load_resnet_weights(backbone_of_flat, {**resnet.state_dict(), "conv1.weight": flat})
    assert torch.allclose(backbone_of_flat[0].weight.sum((2, 3)), flat.sum((2, 3)))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 7), indexing="ij")
    blob = torch.exp(-3 * (x**2 + y**2)).expand(64, 3, 7, 7)
    model.load_resnet_weights(backbone_of_flat, {**resnet.state_dict(), "conv1.weight": blob})
    assert torch.allclose(backbone_of_flat[0].weight.sum((2, 3)), blob.sum((2, 3)), rtol=0.1)
    assert torch.equal(backbone[4][0].conv1.weight, resnet.layer1[0].conv1.weight.half().float())
    assert torch.equal(backbone[7][1].bn2.running_var, resnet.layer4[1].bn2.running_var)


def test_weights_of_another_network_are_rejected() -> None:
    with pytest.raises(RuntimeError):
        model.load_resnet_weights(build_backbone("resnet18"), torchvision.models.resnet34().state_dict())
    with pytest.raises(RuntimeError):
        model.load_resnet_weights(build_backbone("resnet18"), {"something.else": torch.zeros(1)})


# --- pre-training


def test_pretraining_heads_read_their_resolution_levels() -> None:
    net = PretrainNetwork(backbone=build_backbone("resnet18"), n_classes=N_CLASSES, patch_size=32).eval()
    read = []
    for head in net.heads:
        head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    canvas = canvases(2)
    with torch.no_grad():
        assert net(canvas).shape == (2, 4, N_CLASSES)
        high, medium, low = (
            net.backbone(
                glimpse.normalize(
                    torch.nn.functional.interpolate(
                        canvas[..., edge : 128 - edge, edge : 128 - edge] / 255,
                        size=32,
                        mode="bilinear",
                        antialias=True,
                    )
                )
            ).mean((2, 3))
            for edge in (48, 32, 0)  # the central quarter and half of the side, and all of it
        )
    expected = [(high, medium), (high, low), (medium, low), (high, medium, low)]
    for features, levels in zip(read, expected, strict=True):
        # A bound, not equality: the pyramid's antialiasing filter extends beyond the patch, that of this crop does not.
        assert torch.nn.functional.cosine_similarity(features, torch.cat(levels, dim=1)).min() > 0.99
        assert torch.nn.functional.cosine_similarity(features, torch.cat(levels[::-1], dim=1)).max() < 0.99


def test_pretraining_and_evaluation_normalize_alike() -> None:
    """A pass for each level, as in 2018, trains with statistics of one level and evaluates with those of a mixture."""
    net = PretrainNetwork(backbone=build_backbone("resnet18"), n_classes=N_CLASSES, patch_size=32)
    features = []
    net.backbone.register_forward_hook(lambda module, inputs, output: features.append(output.mean((2, 3))))
    canvas = canvases(8)
    with torch.no_grad():
        for _ in range(60):  # until the running statistics are those of this batch
            net(canvas)
        net.eval()(canvas)
    *_, in_training, in_evaluation = features
    error = (in_training - in_evaluation).norm() / in_training.norm()
    assert in_training.shape == in_evaluation.shape == (24, 512) and error < 0.1, error


# --- location


@pytest.mark.parametrize(("quadrant", "corner"), list(enumerate([(0, 0), (1, 0), (0, 1), (1, 1)])))
def test_glimpse_is_taken_from_the_attended_quadrant(quadrant: int, corner: tuple[int, int], make_model) -> None:
    """The 2018 code inverted the vertical axis: attention on the top gave a glimpse from the bottom."""
    net = make_model()
    column, row = corner
    image = np.zeros((128, 128, 3), dtype=np.uint8)
    image[64 * row : 64 * row + 64, 64 * column : 64 * column + 64] = 255
    canvas = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    context = torch.nn.functional.adaptive_avg_pool2d(canvas.float(), 2)  # [1, 3, 2, 2], in the order of features
    attention = torch.softmax(context.sum(1).flatten(1), dim=-1).view(1, 1, 4)
    assert attention.argmax().item() == quadrant
    location, _ = net.sample_location(attention, torch.zeros(1, 1, 2), "learned", 0)
    assert torch.equal(torch.sign(location[0, 0]), torch.tensor([2.0 * column - 1, 2.0 * row - 1]))
    left, top, right, bottom = glimpse.patch_boxes(location[0, 0], (1,), 32)[0].tolist()
    assert (left + right) / 2 // 0.5 == column and (top + bottom) / 2 // 0.5 == row
    pyramid = glimpse.build_pyramid(canvas, (1,), 32)
    assert glimpse.extract_patches(pyramid, location, (1,), 32).mean() > 0.4  # the rest lies outside the image


@pytest.mark.parametrize(("cells", "patch_size"), [(2, 32), (3, 64), (6, 96)])
def test_context_cells_are_in_the_order_of_attention(cells: int, patch_size: int, make_model) -> None:
    """The gaze at a cell looks at what is seen there: into its cell, and for the outermost ones at the corners."""
    net = make_model(cells=cells, patch_size=patch_size, start_size=4)
    net.glimpse.backbone = nn.AvgPool2d(16)  # a backbone whose receptive field is one cell
    canvas = torch.zeros(cells**2, 3, patch_size, patch_size, dtype=torch.uint8)
    for cell in range(cells**2):
        row, column = ((2 * i + 1) * patch_size // (2 * cells) for i in divmod(cell, cells))  # the middle of the cell
        canvas[cell, :, row - 2 : row + 2, column - 2 : column + 2] = 255
    features = net.glimpse.context(glimpse.build_pyramid(canvas, (4,), patch_size))  # [c c, 3, c, c]
    assert features.shape == (cells**2, 3, cells, cells)
    assert features.sum(1).flatten(1).argmax(1).tolist() == list(range(cells**2))
    places = location_mean(torch.eye(cells**2))
    wanted = [(2 * x / (cells - 1) - 1, 2 * y / (cells - 1) - 1) for y in range(cells) for x in range(cells)]
    assert torch.allclose(places, torch.tensor(wanted), atol=1e-6)
    assert location_mean(torch.full((cells**2,), 1 / cells**2)).abs().max() < 1e-6


def test_cells_finer_than_the_features_are_refused(make_model) -> None:
    for cells in (1, 3):
        with pytest.raises(ValueError, match=f"--cells must be from 2 to 2, a .*, not {cells}"):
            make_model(cells=cells)  # 32 pixels have 2 x 2 features


@pytest.mark.parametrize("n_glimpses", [1, 2])
def test_rollout_over_finer_cells(n_glimpses: int, make_model) -> None:
    """Attention has a weight for each cell, before and after the first glimpse, and all of it is trained."""
    net = make_model(cells=4, patch_size=64, n_glimpses=n_glimpses)
    canvas = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    rollout = net(canvas, torch.randn(2, 3, n_glimpses, 2), "learned")
    assert rollout.attention.shape == (2, 3, n_glimpses, 16)
    assert torch.allclose(rollout.attention.sum(-1), torch.ones(2, 3, n_glimpses))
    sum(attention_loss(rollout, torch.tensor([0, 1]), "each")).backward()
    trained = [net.locate.first.weight, *([net.locate.from_context.weight] if n_glimpses > 1 else [])]
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained)


def test_attention_matches_the_formula(make_model) -> None:
    net = make_model(rnn_hidden=5)
    locate = net.locate
    V, h = torch.randn(2, 512, 2, 2), torch.randn(2, 3, 5)
    with torch.no_grad():
        first, later = locate(V, h, 1), locate(V, h, 2)
    for b in range(2):
        quadrants = [V[b, :, 0, 0], V[b, :, 0, 1], V[b, :, 1, 0], V[b, :, 1, 1]]
        for m in range(3):
            z = [(locate.first.weight.flatten() * v).sum() for v in quadrants]
            assert torch.allclose(first[b, m], torch.softmax(torch.stack(z), 0), atol=1e-5)
            hidden = locate.from_hidden.weight @ h[b, m]
            z = [locate.score.weight[0] @ torch.tanh(locate.from_context.weight @ v + hidden) for v in quadrants]
            assert torch.allclose(later[b, m], torch.softmax(torch.stack(z), 0), atol=1e-5)
    assert all(module.bias is None for module in (locate.first, locate.from_context, locate.from_hidden, locate.score))


def test_location_mean_matches_the_formula() -> None:
    a = torch.tensor([0.1, 0.2, 0.3, 0.4])  # top left, top right, bottom left, bottom right
    assert torch.allclose(location_mean(a), torch.tensor([0.2 + 0.4 - 0.1 - 0.3, 0.3 + 0.4 - 0.1 - 0.2]))


def test_location_mean_of_quadrants_rounds_as_before() -> None:
    """So that a gaze over quadrants is the same, bit by bit, whether or not there can be more cells."""
    attention = torch.randn(1000, 4).softmax(-1)
    TL, TR, BL, BR = attention.unbind(-1)
    assert torch.equal(location_mean(attention), torch.stack([TR + BR - TL - BL, BL + BR - TL - TR], dim=-1))


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
def test_score_has_mean_zero(mean: float) -> None:
    """The 2018 code evaluated log N at tanh(u), whose score pulls an off-center location towards the center."""
    n, std_dev = 200_000, 0.2
    mu = torch.full((n, 2), mean, dtype=torch.float64, requires_grad=True)
    sample = mu.detach() + std_dev * torch.randn(n, 2, dtype=torch.float64)
    gaussian_log_prob(sample, mu, std_dev).sum().backward()
    error = mu.grad.std(0) / math.sqrt(n)
    assert (mu.grad.mean(0).abs() < 4 * error).all()
    wrong = ((torch.tanh(sample) - mu.detach()) / std_dev**2).mean(0)  # what the 2018 code computed
    assert mean == 0 or (wrong.abs() > 4 * error).all()


def test_log_prob_is_the_density() -> None:
    sample, mean = torch.tensor([0.3, -0.9]), torch.tensor([0.1, -0.5])
    expected = sum(reference.normal_log_density(u, mu, 0.2) for u, mu in zip(sample.tolist(), mean.tolist()))
    assert gaussian_log_prob(sample, mean, 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_policies(make_model) -> None:
    net = make_model().eval()
    canvas, noise = canvases(2), torch.randn(2, 3, 2, 2)
    learned = net(canvas, noise, "learned")
    deterministic = net(canvas, torch.zeros_like(noise), "learned")
    assert torch.allclose(torch.atanh(deterministic.location), location_mean(deterministic.attention), atol=1e-5)
    first = location_mean(learned.attention[:, :, 0]) + 0.2 * noise[:, :, 0]
    assert torch.allclose(torch.atanh(learned.location[:, :, 0]), first, atol=1e-4)
    assert (net(canvas, noise, "center").location == 0).all()
    many = net.sample_location(torch.full((1, 20_000, 4), 0.25), torch.randn(1, 20_000, 2), "random", 0)[0][0]
    histogram = torch.histc(many[:, 0], bins=10, min=-1, max=1)
    assert ((histogram / 2_000 - 1).abs() < 0.15).all() and np.abs(np.corrcoef(many.T.numpy())[0, 1]) < 0.03
    quadrants = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])  # in the order of attention
    grid = make_model(n_glimpses=5)(canvas, torch.randn(2, 1, 5, 2), "grid").location
    assert torch.equal(grid, quadrants[[0, 1, 2, 3, 0]].expand(2, 1, 5, 2))
    assert torch.equal(net(canvas, noise.tanh(), "oracle").location, noise.tanh())
    for policy in ("center", "random", "grid", "oracle"):
        rollout = net(canvas, noise, policy)
        assert (rollout.log_prob == 0).all() and not rollout.log_prob.requires_grad


# --- the rollout


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("n_glimpses", [1, 2, 3])
def test_shapes_for_every_pair_of_scales(pair: tuple[int, int], n_glimpses: int, make_model) -> None:
    k, start_size = pair
    net = make_model(k=k, start_size=start_size, n_glimpses=n_glimpses)
    for B, M, T in ((1, 1, n_glimpses), (3, 2, n_glimpses)):
        rollout = net(canvases(B, 32, start_size), torch.randn(B, M, T, 2), "learned")
        shapes = [(B, M, T, N_CLASSES), (B, M, T, 2), (B, M, T, 4), (B, M, T), (B, M, T)]
        assert [tuple(value.shape) for value in rollout] == shapes
        assert all(value.isfinite().all() and value.dtype == torch.float32 for value in rollout)
        assert (rollout.location.abs() < 1).all() and torch.allclose(rollout.attention.sum(-1), torch.ones(B, M, T))
        assert ((rollout.baseline > 0) & (rollout.baseline < 1)).all()
        sum(attention_loss(rollout, torch.zeros(B, dtype=torch.long), "each")).backward()


@pytest.mark.parametrize("classify_context", [False, True])
def test_what_is_classified(classify_context: bool, make_model) -> None:
    """Pixels outside the glimpse count only if the context is classified; those inside it always."""
    net = make_model(n_glimpses=1, classify_context=classify_context).eval()  # the glimpse is pixels 48 to 80 of 128
    canvas = torch.full((3, 3, 128, 128), 128, dtype=torch.uint8)
    canvas[1, :, :40] = 255
    canvas[2, :, 56:72, 56:72] = 255
    with torch.no_grad():
        plain, outside, inside = net(canvas, torch.zeros(3, 1, 1, 2), "center").logits
    assert torch.allclose(plain, outside, atol=1e-6) != classify_context
    assert not torch.allclose(plain, inside, atol=1e-6)


@pytest.mark.parametrize("patch_size", [64, 96])
def test_other_patch_sizes(patch_size: int, make_model) -> None:
    net = make_model(patch_size=patch_size, k=2, start_size=2)
    assert net(canvases(2, patch_size, 2), torch.randn(2, 1, 2, 2), "learned").logits.shape == (2, 1, 2, N_CLASSES)


def test_two_halves_of_a_batch_equal_the_whole(make_model) -> None:
    """DataParallel relies on this: it splits every tensor along the first axis and concatenates the outputs."""
    net = make_model(k=2, start_size=1).eval()
    canvas, noise = canvases(5), torch.randn(5, 2, 2, 2)
    whole = net(canvas, noise, "learned")
    halves = [net(canvas[half], noise[half], "learned") for half in (slice(0, 3), slice(3, 5))]
    for name, value, values in zip(Rollout._fields, whole, zip(*halves)):
        assert torch.allclose(value, torch.cat(values), atol=1e-5), name


def test_trajectories_share_context_and_equal_single_ones(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 2018 code recomputed the context for each of 7 trajectories."""
    net = make_model(k=2, start_size=1).eval()
    canvas, noise = canvases(2), torch.randn(2, 7, 2, 2)
    seen = []
    net.glimpse.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    together = net(canvas, noise, "learned")
    assert sum(seen) == 2 + 2 * 7 * 2 * 2  # one context per image, then k patches per glimpse and trajectory
    monkeypatch.setattr(model, "PATCHES_PER_PASS", 5)
    for m in range(7):
        for value, single in zip(together, net(canvas, noise[:, m : m + 1], "learned")):
            assert torch.allclose(value[:, m : m + 1], single, atol=1e-5)


def test_glimpse_features_are_those_of_the_reference_patches(make_model) -> None:
    """The forward pass by hand: patches cut with PIL, one at a time, through the backbone and the LSTM."""
    net = make_model(k=2, start_size=2, n_glimpses=1, patch_size=96).eval()
    x, y = torch.meshgrid(torch.linspace(0, 1, 192), torch.linspace(0, 1, 192), indexing="xy")
    canvas = (torch.stack([x, y, (x * 9).sin() * (y * 7).cos() / 2 + 0.5]) * 255).byte()
    rollout = net(canvas.unsqueeze(0), torch.full((1, 1, 1, 2), 0.5), "learned")
    location = rollout.location[0, 0, 0].tolist()
    image = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    patches = reference.glimpse(image, *location, k=2, start_size=2, patch_size=96)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        features = []
        for patch in patches:
            pixels = (torch.from_numpy(np.array(patch)) / 255 - mean) / std
            features.append(net.glimpse.backbone(pixels.permute(2, 0, 1).unsqueeze(0)).mean((2, 3)))
        hidden, _ = net.rnn(torch.cat(features, dim=1))
        logits = net.classify(hidden)
    assert torch.allclose(rollout.logits[0, :, -1], logits, atol=0.02)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_folded_backbone_equals_the_original(arch: str, precision: str, tolerance: float) -> None:
    backbone = build_backbone(arch).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, different for each channel
            for value, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.3)):
                nn.init.uniform_(value, low, high)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    folded = model.fold_batchnorm(backbone)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    patches = glimpse.normalize(torch.rand(3, 3, 1, 1) * torch.rand(3, 3, 32, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected, ours = (net(patches).float().mean((2, 3)) for net in (backbone, folded))  # [3, D]
    assert (ours - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cast_weights_compute_what_autocast_computes(precision: str, make_model) -> None:
    net, canvas, noise = make_model(), canvases(2), torch.randn(2, 3, 2, 2)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = net(canvas, noise, "learned")
        net.glimpse.speed_up(dtype, compiles=False)
        assert {parameter.dtype for parameter in net.glimpse.parameters()} == {dtype}
        assert all(map(torch.equal, expected, net(canvas, noise, "learned")))
    after = net.state_dict()  # of a checkpoint, which the precision of the machine must not reach
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert {value.dtype for value in after.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "tolerance"), [pytest.param("fp32", 1e-4, marks=pytest.mark.slow), ("bf16", 2e-2)]
)
def test_compiled_backbone_equals_the_eager_one(precision: str, tolerance: float) -> None:
    """And it is compiled once for all numbers of patches from 16 on (PyTorch chooses other kernels for fewer)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)]
    net = model.GlimpseNetwork(backbone=model.Backbone(*layers), patch_size=32, scales=(1,), cells=2)
    sizes = [(17, 1), (16, 2), (30, 10)]  # images and glimpses of each: over PATCHES_PER_PASS in the last
    inputs = [(glimpse.build_pyramid(canvases(B), (1,), 32), torch.rand(B, M, 2) * 2 - 1) for B, M in sizes]
    expected = [(net.context(pyramid), net(pyramid, location)) for pyramid, location in inputs]
    net.speed_up(torch.bfloat16 if precision == "bf16" else torch.float32, compiles=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ours = [(net.context(pyramid), net(pyramid, location)) for pyramid, location in inputs]
    for values, others in zip(ours, expected, strict=True):
        for value, other in zip(values, others, strict=True):
            assert value.dtype == torch.float32 and (value - other).norm() < tolerance * other.norm()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 2  # frozen


# --- gradients and loss


@pytest.mark.parametrize("supervision", ["each", "last"])
def test_each_loss_term_trains_its_own_network(supervision: str, make_model) -> None:
    net = make_model(n_glimpses=2)
    rollout = net(canvases(4), torch.randn(4, 2, 2, 2), "learned")
    labels = torch.tensor([0, 1, 2, 0])
    for term, reached in (
        ("reinforce", {"locate"}),
        ("baseline", {"baseline"}),
        ("classification", {"rnn", "classify"}),
    ):
        net.zero_grad()
        getattr(attention_loss(rollout, labels, supervision), term).backward(retain_graph=True)
        assert with_gradient(net) == reached
        if term == "reinforce":
            assert all(parameter.grad is not None for parameter in net.locate.parameters())


@pytest.mark.parametrize("seed", range(20))
def test_baseline_is_alive_at_the_first_glimpse(seed: int, make_model) -> None:
    """With one glimpse, the 2018 baseline was ReLU(bias), dead for half of all initializations."""
    torch.manual_seed(seed)
    net = model.BaselineNetwork(n_features=8, rnn_hidden=4)
    expected = net(torch.rand(3, 1, 8), torch.zeros(3, 1, 4))
    assert expected.shape == (3, 1) and ((expected > 0) & (expected < 1)).all()
    assert expected.unique().numel() == 3  # it distinguishes images although the hidden state is zero
    (expected - 1).square().mean().backward()
    assert net.linear.bias.grad.abs() > 0 and net.linear.weight.grad[:, :8].abs().min() > 0


@pytest.mark.parametrize("supervision", ["each", "last"])
def test_loss_equals_the_scalar_reference(supervision: str) -> None:
    B, M, T, C = 3, 2, 2, 4
    log_prob = torch.randn(B, M, T)
    rollout = Rollout(
        torch.randn(B, M, T, C), torch.zeros(B, M, T, 2), torch.zeros(B, M, T, 4), log_prob, torch.rand(B, M, T)
    )
    labels = torch.tensor([1, 3, 0])
    # One trajectory ends with a correct prediction, one starts with one; the others are random.
    rollout.logits[0, 0, 1, 1] = rollout.logits[1, 1, 0, 3] = 5.0
    rollout.logits[1, 1, 1, 0] = 5.0
    ours = attention_loss(rollout, labels, supervision)
    theirs = reference.loss(
        rollout.logits.tolist(),
        rollout.baseline.tolist(),
        rollout.log_prob.tolist(),
        labels.tolist(),
        supervision == "each",
    )
    assert [term.item() for term in ours] == pytest.approx(theirs, rel=1e-5)


def test_parameter_groups_hold_each_trainable_parameter_once(make_model) -> None:
    net = make_model()
    rest, later = net.parameter_groups()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert sorted(names[id(parameter)] for parameter in [*rest, *later]) == sorted(
        name for name, parameter in net.named_parameters() if parameter.requires_grad
    )
    later_names = {names[id(parameter)] for parameter in later}
    assert later_names == {f"locate.{name}.weight" for name in ("from_context", "from_hidden", "score")}


def test_backbone_is_bit_identical_after_training(make_model) -> None:
    """The "frozen" backbone of 2018 stayed in train mode, and its BatchNorm statistics drifted."""
    net = make_model()
    before = {key: value.clone() for key, value in net.glimpse.backbone.state_dict().items()}
    optimizer = torch.optim.Adam([parameter for parameter in net.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(3):
        net.train()
        rollout = net(canvases(3), torch.randn(3, 1, 2, 2), "learned")
        sum(attention_loss(rollout, torch.tensor([0, 1, 2]), "each")).backward()
        optimizer.step()
    after = net.glimpse.backbone.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in net.glimpse.backbone.parameters())


@pytest.mark.parametrize("supervision", ["each", "last"])
def test_estimator_is_the_gradient_of_the_expected_reward(supervision: str, make_model) -> None:
    """Two glimpses, each of which falls left or right with known probability.

    A prediction is correct once a glimpse has fallen to the right.
    """
    net, M = make_model(n_glimpses=2, std_dev=0.5), 400_000
    logits = torch.tensor([[0.2, 0.0, 0.1, 0.3], [0.0, -0.4, 0.2, 0.1]], requires_grad=True)  # of attention, [T, 4]
    attention = torch.softmax(logits, dim=-1)  # [T, 4]
    mean = location_mean(attention)[:, 0]  # [T]
    miss = 0.5 * (1 + torch.erf(-mean / (net.std_dev * 2**0.5)))  # [T], probability of the left
    correct_first, correct_last = 1 - miss[0], 1 - miss[0] * miss[1]
    # Either both glimpses are rewarded for the last prediction, or each for the prediction after it.
    objective = {"last": correct_last, "each": correct_first + (1 - miss[0].detach() * miss[1])}[supervision]
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)

    noise = torch.randn(2, 1, M, 2)
    location, log_prob = zip(
        *(net.sample_location(attention[t].expand(1, M, 4), noise[t], "learned", t) for t in range(2))
    )
    hit = torch.stack(location, dim=2)[..., 0] > 0  # [1, M, T]
    correct = hit.cummax(-1).values.float()  # after the first glimpse, after either of the two
    # The baseline may be any function of what happened before a glimpse, even a bad one.
    baseline = torch.stack([torch.full((1, M), 0.9), 0.2 + 0.5 * hit[..., 0]], dim=-1)
    rollout = Rollout(
        torch.stack([1 - correct, correct], dim=-1),
        torch.stack(location, dim=2),
        attention.detach(),
        torch.stack(log_prob, dim=-1),
        baseline,
    )
    loss = attention_loss(rollout, torch.ones(1, dtype=torch.long), supervision).reinforce
    (estimated,) = torch.autograd.grad(-loss, logits)
    assert torch.allclose(estimated, expected, atol=0.006) and expected.abs().min() > 0.012, (estimated, expected)


def test_reinforce_moves_the_location_towards_the_reward(make_model) -> None:
    """With the reward on the left, gradient steps on this term alone move the mean location to the left."""
    net = make_model(n_glimpses=1)
    attention = torch.zeros(1, 1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([attention], lr=0.05)
    labels = torch.zeros(1, dtype=torch.long)
    for _ in range(150):
        location, log_prob = net.sample_location(
            torch.softmax(attention, -1).expand(1, 64, 4), torch.randn(1, 64, 2), "learned", 0
        )
        correct = (location[..., 0] < -0.1).float()  # [1, 64]
        logits = torch.stack([correct, 1 - correct], dim=-1)
        baseline = correct.mean().expand(1, 64, 1)
        rollout = Rollout(logits.unsqueeze(2), location.unsqueeze(2), attention, log_prob.unsqueeze(-1), baseline)
        optimizer.zero_grad()
        attention_loss(rollout, labels, "last").reinforce.backward()
        optimizer.step()
    assert location_mean(torch.softmax(attention, -1))[0, 0, 0] < -0.2


@pytest.mark.parametrize("policy", ["learned", "center", "random"])
def test_bfloat16_is_close_to_float32(policy: str, make_model) -> None:
    net = make_model().eval()
    canvas, noise = canvases(3), torch.randn(3, 1, 2, 2)
    exact = net(canvas, noise, policy)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(canvas, noise, policy)
    assert all(value.dtype == torch.float32 for value in rough)
    assert torch.allclose(exact.logits, rough.logits, atol=0.05)
    assert torch.allclose(exact.location, rough.location, atol=0.05)
