"""Networks: the backbone, its pre-training heads, and the recurrent attention model with its rollout and loss.

Shapes: B images, M trajectories per image, T glimpses per trajectory, k patches per glimpse, P patch side, S canvas
side, D backbone features, c cells along a side of the context, H hidden units, C classes. Locations are (x, y) in
(-1, 1), x to the right, y down.
"""

import copy
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from glimpse import FULL_SCALE, STARTS, build_pyramid, canvas_size, extract_patches, normalize, patch_scales

ARCHITECTURES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
HEADS = {"12": [0, 1], "13": [0, 2], "23": [1, 2], "123": [0, 1, 2]}  # resolution levels (indices into STARTS) per head
POLICIES = ("learned", "center", "random", "grid", "oracle")
GRID = ((-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5))  # centers of the quadrants, in the order of attention
PATCHES_PER_PASS = 256  # bounds memory for many trajectories: 0.6 GB of float32 stem output at P = 96


class Backbone(nn.Sequential):
    """A ResNet that, in float32 on a CPU, runs in oneDNN's memory layout: faster, and with less memory in training."""

    def forward(self, patches: Tensor) -> Tensor:
        """[N, 3, P, P] -> [N, D, P/16, P/16]."""
        is_possible = self.training or not torch.is_grad_enabled()  # oneDNN's eval-mode BatchNorm has no backward
        if patches.device.type == "cpu" and is_possible and not torch.compiler.is_compiling():
            float32 = patches.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            if float32 and torch.backends.mkldnn.is_available():
                return super().forward(patches.to_mkldnn()).to_dense()
        return super().forward(patches)


def build_backbone(arch: str) -> Backbone:
    """A torchvision ResNet without pooling and classifier, with a 5x5 stride-1 stem and random weights.

    The state-dict keys ("0.weight", "4.0.conv1.weight", ...) are those of the 2018 `pt_glimpse_model.tar`.
    """
    resnet = torchvision.models.get_model(arch, weights=None)
    resnet.conv1 = nn.Conv2d(3, 64, kernel_size=5, stride=1, padding=2, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as in torchvision
    return Backbone(*list(resnet.children())[:-2])


def feature_size(backbone: nn.Sequential) -> int:
    """D, the number of output channels of the backbone."""
    return [module for module in backbone.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def fold_batchnorm(backbone: nn.Sequential) -> nn.Sequential:
    """A copy with each BatchNorm folded into the preceding convolution, using its running statistics.

    Its output equals that of the backbone in eval mode; it is faster, and has no statistics that could drift.
    """
    folded = copy.deepcopy(backbone).eval()
    for module in folded.modules():
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(norm, nn.BatchNorm2d):  # always follows a convolution in a ResNet
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


def load_resnet_weights(backbone: nn.Sequential, resnet_state: dict[str, Tensor]) -> None:
    """Load a torchvision ResNet's state dict, resampling its 7x7 stem to 5x5. Raises RuntimeError if it does not fit.

    A kernel is a small image of what its filter responds to, so it is downsampled like one, with antialiasing; the
    factor 49/25 keeps its sum, hence its response to a slowly varying image.
    """
    children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    state = {}
    for key, value in resnet_state.items():
        child, _, rest = key.removeprefix("module.").partition(".")  # DataParallel adds it
        if child in children:
            state[f"{children.index(child)}.{rest}"] = value.float() if value.is_floating_point() else value
    stem = state.get("0.weight")
    if stem is not None and stem.shape[-2:] == (7, 7):
        state["0.weight"] = F.interpolate(stem, size=(5, 5), mode="bilinear", antialias=True) * (49 / 25)
    backbone.load_state_dict(state)


class PretrainNetwork(nn.Module):
    """The backbone with four classification heads on concentric patches at high, medium and low resolution."""

    def __init__(self, *, backbone: nn.Sequential, n_classes: int, patch_size: int) -> None:
        super().__init__()
        self.backbone, self.patch_size = backbone, patch_size
        self.heads = nn.ModuleList()
        for levels in HEADS.values():
            first, last = nn.Linear(len(levels) * feature_size(backbone), 1024), nn.Linear(1024, n_classes)
            self.heads.append(nn.Sequential(first, nn.BatchNorm1d(1024), nn.ReLU(), last))

    def forward(self, canvas: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> logits [B, 4, C], one row per head in the order of `HEADS`."""
        pyramid = build_pyramid(canvas, STARTS, self.patch_size)
        center = torch.zeros(len(canvas), 1, 2, device=canvas.device)
        patches = normalize(extract_patches(pyramid, center, STARTS, self.patch_size))  # [B, 1, 3, 3, P, P]
        # One pass over all levels. With one for each, as in 2018, training would normalize every level by statistics of
        # its own, but evaluation, and main.py, by running statistics of their mixture, which fit none of them.
        features = self.backbone(patches.flatten(0, 2)).mean((2, 3)).unflatten(0, (-1, len(STARTS)))  # [B, 3, D]
        logits = [head(features[:, levels].flatten(1)) for head, levels in zip(self.heads, HEADS.values())]
        return torch.stack(logits, dim=1).float()


class GlimpseNetwork(nn.Module):
    """Features of the context and of glimpses from the frozen backbone, its BatchNorm folded into the weights."""

    def __init__(self, *, backbone: nn.Sequential, patch_size: int, scales: tuple[int, ...], cells: int) -> None:
        super().__init__()
        self.backbone = fold_batchnorm(backbone).requires_grad_(False)
        self.patch_size, self.scales, self.cells = patch_size, scales, cells
        self.canvas_size = canvas_size(patch_size, scales[0])
        self.compiled = False

    def train(self, mode: bool = True) -> "GlimpseNetwork":
        """Set the mode of all but the frozen backbone, which stays in eval mode, the only one it is compiled for."""
        super().train(mode)
        self.backbone.eval()
        return self

    def speed_up(self, dtype: torch.dtype, *, compiles: bool) -> None:
        """Compute the features in this type and, if wanted, compiled. To be called once, after weights are loaded."""
        # Autocast alone would cast the frozen weights anew in every pass. The state dict keeps the float32 weights.
        exact = {name: weight.cpu() for name, weight in self.backbone.state_dict().items()}
        self.backbone.to(dtype)
        self.backbone.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.update({prefix + name: weight for name, weight in exact.items()})
        )
        self.compiled = compiles
        if compiles:
            self.backbone.compile()

    def features(self, patches: Tensor) -> Tensor:
        """Normalized patches [N, 3, P, P] -> features [N, D, P/16, P/16] of the frozen backbone."""
        patches = patches.contiguous(memory_format=torch.channels_last)
        if not self.compiled:
            return self.backbone(patches)
        from torch._inductor import config  # takes seconds to import

        torch._dynamo.mark_dynamic(patches, 0)  # otherwise it is compiled anew for every N
        # Frozen weights are packed for the matrix units of the CPU, and each ReLU is fused with its convolution.
        with config.patch(freezing=patches.device.type == "cpu"):
            return self.backbone(patches)

    @torch.no_grad()
    def context(self, pyramid: dict[int, Tensor]) -> Tensor:
        """Features of the whole image, averaged over each of c x c cells: [B, D, c, c]."""
        level = pyramid[FULL_SCALE]
        center = torch.zeros(len(level), 1, 2, device=level.device)
        image = extract_patches(pyramid, center, (FULL_SCALE,), self.patch_size)  # [B, 1, 1, 3, P, P]
        return F.adaptive_avg_pool2d(self.features(normalize(image.flatten(0, 2))), self.cells).float()

    @torch.no_grad()
    def forward(self, pyramid: dict[int, Tensor], location: Tensor) -> Tensor:
        """Features of the glimpses at location [B, M, 2], concatenated over patches, finest first: [B, M, k D]."""
        patches = extract_patches(pyramid, location, self.scales, self.patch_size)  # [B, M, k, 3, P, P]
        chunks = patches.flatten(0, 2).split(PATCHES_PER_PASS)
        features = torch.cat([self.features(normalize(chunk)).mean((2, 3)).float() for chunk in chunks])  # [B M k, D]
        return features.view(*location.shape[:2], -1)


class LocationNetwork(nn.Module):
    """Soft attention over the c x c cells of the context (Lu et al., arXiv 1612.01887, eq. 6 and 7)."""

    def __init__(self, *, n_features: int, rnn_hidden: int, n_attention: int = 1024) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_features, 1, kernel_size=1, bias=False)
        self.from_context = nn.Linear(n_features, n_attention, bias=False)
        self.from_hidden = nn.Linear(rnn_hidden, n_attention, bias=False)
        self.score = nn.Linear(n_attention, 1, bias=False)

    def forward(self, context: Tensor, hidden: Tensor, step: int) -> Tensor:
        """Context [B, D, c, c] and hidden state [B, M, H] before glimpse `step` (from 1) -> attention [B, M, c c]."""
        if step <= 1:  # the hidden state knows no location yet, so a 1x1 convolution scores the context alone
            score = self.first(context).flatten(1).unsqueeze(1).expand(-1, hidden.shape[1], -1)  # [B, M, c c]
        else:
            cells = self.from_context(context.flatten(2).transpose(1, 2))  # [B, c c, A]
            mixed = torch.tanh(cells.unsqueeze(1) + self.from_hidden(hidden).unsqueeze(2))  # [B, M, c c, A]
            score = self.score(mixed).squeeze(-1)  # [B, M, c c]
        return F.softmax(score.float(), dim=-1)


class BaselineNetwork(nn.Module):
    """Expected reward, in [0, 1], before a glimpse location is sampled; it reduces the variance of REINFORCE."""

    def __init__(self, *, n_features: int, rnn_hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_features + rnn_hidden, 1)

    def forward(self, pooled: Tensor, hidden: Tensor) -> Tensor:
        """Context averaged over its cells [B, M, D] and hidden state [B, M, H] -> [B, M]."""
        # The context distinguishes images while the hidden state is still zero; a sigmoid, unlike a ReLU, cannot die.
        return torch.sigmoid(self.linear(torch.cat([pooled, hidden], dim=-1)).squeeze(-1).float())


class Rollout(NamedTuple):
    """M trajectories over each of B images. If the context is classified, T counts this glance too, as the first."""

    logits: Tensor  # [B, M, T, C], of the breed, after each glimpse
    location: Tensor  # [B, M, T, 2], centers of the glimpses
    attention: Tensor  # [B, M, T, c c], over the cells of the context, row by row; detached
    log_prob: Tensor  # [B, M, T], of the sampled location; its gradient reaches only the location network
    baseline: Tensor  # [B, M, T], expected reward before the glimpse


def location_mean(attention: Tensor) -> Tensor:
    """Mean location before tanh: a grid of c x c places, the outermost at the corners, weighted by attention.

    attention: [..., c c], row by row. Returns [..., 2]. tanh pulls the corners, (±1, ±1), in to ±0.76.
    """
    weights, side = attention.unbind(-1), math.isqrt(attention.shape[-1])
    axis = [1 - 2 * i / (side - 1) for i in range(side)]  # from 1 to -1: at c = 2 the sums round as in 2018
    x = sum(axis[i] * weights[row * side + side - 1 - i] for i in range(side) for row in range(side))
    y = sum(axis[i] * weights[(side - 1 - i) * side + column] for i in range(side) for column in range(side))
    return torch.stack([x, y], dim=-1)


def gaussian_log_prob(sample: Tensor, mean: Tensor, std_dev: float) -> Tensor:
    """log N(sample; mean, std_dev^2 I), summed over the two axes: [..., 2] -> [...].

    The sample must be detached and taken *before* tanh: only then does the score have zero mean (Williams 1992).
    """
    distance = (sample - mean) / std_dev
    return (-0.5 * distance**2 - math.log(std_dev) - 0.5 * math.log(2 * math.pi)).sum(-1)


class RecurrentAttention(nn.Module):
    """Attends to a low-resolution context, takes T high-resolution glimpses and classifies the breed.

    After Sermanet et al. (arXiv 1412.7054), with the location from soft attention. classify_context: the LSTM first
    reads the context, which otherwise only guides the gaze, and predicts the breed from this glance alone, so that it
    can stop there (after Wang et al., arXiv 2010.05300). Raises ValueError for keywords that do not go together.
    """

    def __init__(
        self,
        *,
        backbone: nn.Sequential,
        n_classes: int,
        patch_size: int,
        k: int,
        start_size: int,
        n_glimpses: int,
        rnn_hidden: int,
        std_dev: float,
        classify_context: bool,
        cells: int,
    ) -> None:
        super().__init__()
        if not 2 <= cells <= patch_size // 16:
            raise ValueError(f"--cells must be from 2 to {patch_size // 16}, a sixteenth of --patch_size, not {cells}")
        self.n_glimpses = n_glimpses
        self.std_dev = std_dev
        self.classify_context = classify_context
        self.n_features = n_features = feature_size(backbone)
        scales = patch_scales(k, start_size)
        self.glimpse = GlimpseNetwork(backbone=backbone, patch_size=patch_size, scales=scales, cells=cells)
        self.locate = LocationNetwork(n_features=n_features, rnn_hidden=rnn_hidden)
        self.baseline = BaselineNetwork(n_features=n_features, rnn_hidden=rnn_hidden)
        self.rnn = nn.LSTMCell(k * n_features, rnn_hidden)
        if classify_context:
            self.glance = nn.LSTMCell(n_features, rnn_hidden)  # weights of its own to read the context
        self.classify = nn.Linear(rnn_hidden, n_classes)

    def forward(self, canvas: Tensor, noise: Tensor, policy: str, stop_at: float = math.inf) -> Rollout:
        """Roll out M trajectories over each image: T glimpses, after a glance at the context if it is classified.

        canvas: uint8 [B, 3, S, S]. noise: standard normal [B, M, T, 2], supplied by the caller; zeros give the
        deterministic trajectory. policy: "learned", "center" (always the image center), "random" (uniform over the
        image, computed from the noise), "grid" (the centers of the quadrants in turn) or "oracle" (at the dog: the
        noise is the location). All trajectories of an image share its pyramid and its context features. stop_at: end as
        soon as the highest probability of every trajectory in the batch is above this.
        """
        B, M = noise.shape[:2]
        pyramid = build_pyramid(canvas, self.glimpse.scales, self.glimpse.patch_size)
        if policy == "learned" or self.classify_context:
            V = self.glimpse.context(pyramid)  # [B, D, c, c]
        else:  # no context is computed for a policy that does without; its attention, uniform, has no effect
            V = torch.zeros(B, self.n_features, *[self.glimpse.cells] * 2, device=canvas.device)
        pooled = V.mean((2, 3)).unsqueeze(1).expand(-1, M, -1)  # [B, M, D]
        h_t = c_t = V.new_zeros(B * M, self.rnn.hidden_size)
        steps = []
        for t in range(1 - self.classify_context, self.n_glimpses + 1):
            state = h_t.detach().view(B, M, -1)
            b_t = self.baseline(pooled, state)  # [B, M]
            a_t = self.locate(V, state, t)  # [B, M, c c]
            if t == 0:  # the glance has nowhere to look but at the whole image
                l_t, log_pi = self.sample_location(a_t, noise[:, :, 0], "center", t)
                h_t, c_t = self.glance(pooled.flatten(0, 1), (h_t, c_t))  # [B M, H]
            else:
                l_t, log_pi = self.sample_location(a_t, noise[:, :, t - 1], policy, t)  # [B, M, 2], [B, M]
                g_t = self.glimpse(pyramid, l_t)  # [B, M, k D]
                h_t, c_t = self.rnn(g_t.flatten(0, 1), (h_t, c_t))  # [B M, H]
            z_t = self.classify(h_t).float().view(B, M, -1)  # [B, M, C]
            steps.append((z_t, l_t, a_t.detach(), log_pi, b_t))
            if stop_at < 1 and z_t.softmax(-1).amax(-1).min() > stop_at:
                break
        return Rollout(*(torch.stack(values, dim=2) for values in zip(*steps)))

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The trainable parameters: all but the attention after the first glimpse, and then those of that attention.

        That has a learning rate of its own: its score sums 1024 tanh units, all of which one Adam step can move in the
        same direction. At a rate that suits the rest, the softmax can saturate early, with the location in a corner.
        """
        later = [parameter for name, parameter in self.locate.named_parameters() if not name.startswith("first.")]
        later_ids = set(map(id, later))
        return [p for p in self.parameters() if p.requires_grad and id(p) not in later_ids], later

    def sample_location(self, attention: Tensor, noise: Tensor, policy: str, step: int) -> tuple[Tensor, Tensor]:
        """Attention [B, M, c c] and noise [B, M, 2] -> location [B, M, 2] and its log-probability [B, M]."""
        if policy == "learned":
            mean = location_mean(attention)
            sample = (mean + self.std_dev * noise).detach()
            return torch.tanh(sample), gaussian_log_prob(sample, mean, self.std_dev)
        if policy == "random":
            location = torch.erf(noise / math.sqrt(2))  # in (-1, 1): erf(x / sqrt(2)) is 2 * normal CDF(x) - 1
        elif policy == "grid":
            location = noise.new_tensor(GRID[(step - 1) % len(GRID)]).expand_as(noise)
        else:
            location = noise if policy == "oracle" else torch.zeros_like(noise)
        return location, noise.new_zeros(noise.shape[:2])


class LossTerms(NamedTuple):
    """The three terms of the loss, to be summed; each is a mean over images and trajectories."""

    classification: Tensor  # trains the LSTM and the classifier; mean over the supervised glimpses
    baseline: Tensor  # trains the baseline; mean over all glimpses
    reinforce: Tensor  # trains the location network; sum over all glimpses


def rewards(rollout: Rollout, labels: Tensor, supervision: str) -> Tensor:
    """Reward of each glimpse, [B, M, T]: 1 if the prediction after it ("last": the final one) is correct, else 0."""
    correct = (rollout.logits.argmax(-1) == labels.view(-1, 1, 1)).float()  # [B, M, T]
    return correct if supervision == "each" else correct[:, :, -1:].expand_as(correct)


def attention_loss(rollout: Rollout, labels: Tensor, supervision: str) -> LossTerms:
    """Cross-entropy + squared error of the baseline + REINFORCE (Williams 1992), for labels [B].

    supervision "each": every prediction is trained, and each glimpse is rewarded for the prediction after it; "last":
    only the final prediction is trained and rewarded. The two are the same for a single glimpse.
    The advantage, reward minus baseline, is detached: it weights the score, and no gradient flows through it.
    """
    logits = rollout.logits if supervision == "each" else rollout.logits[:, :, -1:]  # [B, M, T or 1, C]
    target = labels.view(-1, 1, 1).expand(logits.shape[:3])
    classification = F.cross_entropy(logits.flatten(0, 2), target.flatten())
    reward = rewards(rollout, labels, supervision)  # [B, M, T]
    advantage = (reward - rollout.baseline).detach()
    reinforce = -(advantage * rollout.log_prob).sum(-1).mean()
    return LossTerms(classification, F.mse_loss(rollout.baseline, reward), reinforce)
