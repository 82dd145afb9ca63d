"""Networks: the backbone, its pre-training heads, and the recurrent attention model with its one rollout.

Shapes: B pictures, M trajectories per picture, T glimpses, k patches per glimpse, P patch side, S canvas side,
D backbone features, H hidden units, C classes. Locations are (x, y) in (-1, 1), x to the right, y down.
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

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
HEADS = ("12", "13", "23", "123")  # the resolutions that each pre-training head reads: 1 high, 2 medium, 3 low
POLICIES = ("learned", "center", "random")
SUPERVISIONS = ("each", "last")
PATCHES_PER_PASS = 256  # bounds the memory that many trajectories take: 0.6 GB for a float32 stem at P = 96


class Backbone(nn.Sequential):
    """Layers that, in float32 on a CPU, run in the memory layout of oneDNN's own kernels.

    They compute the same there as in PyTorch's layouts, in less time and, in training, less memory.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """[N, 3, P, P] -> [N, D, P/16, P/16]."""
        device = patches.device.type
        float32 = patches.dtype == torch.float32 and not torch.is_autocast_enabled(device)
        has_backward = self.training or not torch.is_grad_enabled()  # BatchNorm's, which in eval mode lacks one there
        if device == "cpu" and float32 and has_backward and torch.backends.mkldnn.is_available():
            return super().forward(patches.to_mkldnn()).to_dense()
        return super().forward(patches)


def build_backbone(arch: str) -> Backbone:
    """A torchvision ResNet without pooling and classifier, its stem 5x5 with stride 1.

    The state-dict keys ("0.weight", "4.0.conv1.weight", ...) are those of the 2018 `pt_glimpse_model.tar`.
    """
    resnet = torchvision.models.get_model(arch, weights=None)
    resnet.conv1 = nn.Conv2d(3, 64, kernel_size=5, stride=1, padding=2, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own stem
    return Backbone(*list(resnet.children())[:-2])


def feature_size(backbone: nn.Sequential) -> int:
    """D, the number of channels that the backbone puts out."""
    return [module for module in backbone.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def fold_batchnorm(backbone: nn.Sequential) -> nn.Sequential:
    """A copy that multiplies each BatchNorm's fixed statistics into the convolution before it.

    It computes what the backbone computes in eval mode in less time, and nothing is left in it that could drift.
    """
    folded = copy.deepcopy(backbone).eval()
    for module in folded.modules():
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(norm, nn.BatchNorm2d):  # in a ResNet it always follows a convolution
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


def load_resnet_weights(backbone: nn.Sequential, resnet_state: dict[str, Tensor]) -> None:
    """Load a torchvision ResNet's state dict, its 7x7 stem resampled to 5x5. Raises RuntimeError if it does not fit.

    The kernel is a picture of what the filter answers to, so it is shrunk as one, antialiased; the factor 49/25 keeps
    its sum, hence the response to a slowly varying picture.
    """
    children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    state = {}
    for key, value in resnet_state.items():
        child, _, rest = key.partition(".")
        if child in children:
            state[f"{children.index(child)}.{rest}"] = value.float() if value.is_floating_point() else value
    stem = state.get("0.weight")
    if stem is not None and stem.shape[-2:] == (7, 7):
        state["0.weight"] = F.interpolate(stem, size=(5, 5), mode="bilinear", antialias=True) * (49 / 25)
    backbone.load_state_dict(state)


class PretrainNetwork(nn.Module):
    """The backbone under four classifiers of concentric patches at high, medium and low resolution."""

    def __init__(self, *, backbone: nn.Sequential, n_classes: int, patch_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.patch_size = patch_size
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(len(resolutions) * feature_size(backbone), 1024),
                nn.BatchNorm1d(1024),
                nn.ReLU(),
                nn.Linear(1024, n_classes),
            )
            for resolutions in HEADS
        )

    def forward(self, canvas: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> logits [B, 4, C], one row for each of `HEADS`."""
        pyramid = build_pyramid(canvas, STARTS, self.patch_size)
        center = torch.zeros(len(canvas), 1, 2, device=canvas.device)
        patches = normalize(extract_patches(pyramid, center, STARTS, self.patch_size))  # [B, 1, 3, 3, P, P]
        # One pass for each resolution: BatchNorm must not mix the statistics of close-ups and whole pictures.
        features = [self.backbone(patches[:, 0, i]).mean((2, 3)) for i in range(len(STARTS))]  # 3 x [B, D]
        logits = [
            head(torch.cat([features[int(resolution) - 1] for resolution in resolutions], dim=1))
            for head, resolutions in zip(self.heads, HEADS)
        ]
        return torch.stack(logits, dim=1).float()


class GlimpseNetwork(nn.Module):
    """Sees patches through the backbone, frozen: nothing in it is trained, and no BatchNorm left to drift."""

    def __init__(self, *, backbone: nn.Sequential, patch_size: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = fold_batchnorm(backbone).requires_grad_(False)
        self.patch_size = patch_size
        self.scales = scales
        self.canvas_size = canvas_size(patch_size, scales[0])

    @torch.no_grad()
    def context(self, pyramid: dict[int, Tensor]) -> Tensor:
        """Features of the whole picture, averaged over each quadrant: [B, D, 2, 2]."""
        level = pyramid[FULL_SCALE]
        center = torch.zeros(len(level), 1, 2, device=level.device)
        picture = extract_patches(pyramid, center, (FULL_SCALE,), self.patch_size)  # [B, 1, 1, 3, P, P]
        return F.adaptive_avg_pool2d(self.backbone(normalize(picture.flatten(0, 2))), 2).float()

    @torch.no_grad()
    def forward(self, pyramid: dict[int, Tensor], location: Tensor) -> Tensor:
        """Features of the glimpses at location [B, M, 2], patches side by side, finest first: [B, M, k D]."""
        patches = extract_patches(pyramid, location, self.scales, self.patch_size)  # [B, M, k, 3, P, P]
        passes = patches.flatten(0, 2).split(PATCHES_PER_PASS)
        features = torch.cat([self.backbone(normalize(some)).mean((2, 3)).float() for some in passes])  # [B M k, D]
        return features.view(*location.shape[:2], -1)


class LocationNetwork(nn.Module):
    """Soft attention over the quadrants of the context (Lu et al., arXiv 1612.01887, eq. 6 and 7)."""

    def __init__(self, *, n_features: int, rnn_hidden: int, n_attention: int = 1024) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_features, 1, kernel_size=1, bias=False)
        self.from_context = nn.Linear(n_features, n_attention, bias=False)
        self.from_hidden = nn.Linear(rnn_hidden, n_attention, bias=False)
        self.score = nn.Linear(n_attention, 1, bias=False)

    def forward(self, context: Tensor, hidden: Tensor, step: int) -> Tensor:
        """Context [B, D, 2, 2] and hidden state [B, M, H] before glimpse number `step` -> attention [B, M, 4].

        Before the first glimpse there is nothing in the hidden state, so a 1x1 convolution reads the context alone.
        """
        if step == 0:
            score = self.first(context).flatten(1).unsqueeze(1).expand(-1, hidden.shape[1], -1)  # [B, M, 4]
        else:
            quadrants = self.from_context(context.flatten(2).transpose(1, 2))  # [B, 4, A]
            mixed = torch.tanh(quadrants.unsqueeze(1) + self.from_hidden(hidden).unsqueeze(2))  # [B, M, 4, A]
            score = self.score(mixed).squeeze(-1)  # [B, M, 4]
        return F.softmax(score.float(), dim=-1)


class BaselineNetwork(nn.Module):
    """Expected reward, in [0, 1], before a glimpse is drawn: it lowers the variance of REINFORCE.

    Where the hidden state is still zero the context tells pictures apart; a sigmoid, unlike a ReLU, cannot die.
    """

    def __init__(self, *, n_features: int, rnn_hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_features + rnn_hidden, 1)

    def forward(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Context [B, D, 2, 2] and hidden state [B, M, H] -> [B, M]."""
        pooled = context.mean((2, 3)).unsqueeze(1).expand(-1, hidden.shape[1], -1)  # [B, M, D]
        return torch.sigmoid(self.linear(torch.cat([pooled, hidden], dim=-1)).squeeze(-1).float())


class Rollout(NamedTuple):
    """What happened on M trajectories over each of B pictures."""

    logits: Tensor  # [B, M, T, C], of the breed, after each glimpse
    location: Tensor  # [B, M, T, 2], where the glimpses were taken
    attention: Tensor  # [B, M, T, 4], over top left, top right, bottom left, bottom right; detached
    log_prob: Tensor  # [B, M, T], of the location drawn; its gradient reaches the location network alone
    baseline: Tensor  # [B, M, T], expected reward before the glimpse


def location_mean(attention: Tensor) -> Tensor:
    """Mean gaze before squashing: the corners of the picture weighted by attention. [..., 4] -> [..., 2]."""
    top_left, top_right, bottom_left, bottom_right = attention.unbind(-1)
    x = top_right + bottom_right - top_left - bottom_left
    y = bottom_left + bottom_right - top_left - top_right
    return torch.stack([x, y], dim=-1)


def gaussian_log_prob(sample: Tensor, mean: Tensor, std_dev: float) -> Tensor:
    """log N(sample; mean, std_dev^2 I), summed over the two axes: [..., 2] -> [...].

    The sample must be detached and the one *before* tanh; only so the mean of the gradient, the score, is zero
    (Williams 1992).
    """
    distance = (sample - mean) / std_dev
    return (-0.5 * distance**2 - math.log(std_dev) - 0.5 * math.log(2 * math.pi)).sum(-1)


class RecurrentAttention(nn.Module):
    """Looks at a small copy of the picture, decides where to look closer, and names the breed after T glimpses.

    After Sermanet et al. (arXiv 1412.7054), the location from soft attention. Raises ValueError for a pair of k and
    start_size that is not valid.
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
    ) -> None:
        super().__init__()
        self.n_glimpses = n_glimpses
        self.std_dev = std_dev
        n_features = feature_size(backbone)
        self.glimpse = GlimpseNetwork(backbone=backbone, patch_size=patch_size, scales=patch_scales(k, start_size))
        self.locate = LocationNetwork(n_features=n_features, rnn_hidden=rnn_hidden)
        self.baseline = BaselineNetwork(n_features=n_features, rnn_hidden=rnn_hidden)
        self.rnn = nn.LSTMCell(k * n_features, rnn_hidden)
        self.classify = nn.Linear(rnn_hidden, n_classes)

    def forward(self, canvas: Tensor, noise: Tensor, policy: str = "learned") -> Rollout:
        """Roll out M trajectories over each picture.

        canvas: uint8 [B, 3, S, S]. noise: standard normal [B, M, T, 2], so that randomness is the caller's; zeros give
        the deterministic trajectory. policy: "learned", "center" (always the middle) or "random" (uniform over the
        picture, made of the same noise). All trajectories of a picture share its pyramid and its context features.
        """
        B, M = noise.shape[:2]
        pyramid = build_pyramid(canvas, self.glimpse.scales, self.glimpse.patch_size)
        V = self.glimpse.context(pyramid)  # [B, D, 2, 2]
        h_t = c_t = V.new_zeros(B * M, self.rnn.hidden_size)
        steps = []
        for t in range(self.n_glimpses):
            state = h_t.detach().view(B, M, -1)
            b_t = self.baseline(V, state)  # [B, M]
            a_t = self.locate(V, state, t)  # [B, M, 4]
            l_t, log_pi = self.gaze(a_t, noise[:, :, t], policy)  # [B, M, 2], [B, M]
            g_t = self.glimpse(pyramid, l_t)  # [B, M, k D]
            h_t, c_t = self.rnn(g_t.flatten(0, 1), (h_t, c_t))  # [B M, H]
            z_t = self.classify(h_t).float().view(B, M, -1)  # [B, M, C]
            steps.append((z_t, l_t, a_t.detach(), log_pi, b_t))
        return Rollout(*(torch.stack(values, dim=2) for values in zip(*steps)))

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: everything but the attention after the first glimpse, and that, for a rate of its own.

        Its score sums up 1024 units of tanh, all of which a step of Adam may move the same way. A rate that suits
        the rest can saturate the softmax before there is anything to learn from; the gaze then stays in a corner.
        """
        later = [parameter for name, parameter in self.locate.named_parameters() if not name.startswith("first.")]
        known = set(map(id, later))
        return [p for p in self.parameters() if p.requires_grad and id(p) not in known], later

    def gaze(self, attention: Tensor, noise: Tensor, policy: str) -> tuple[Tensor, Tensor]:
        """Where to look: attention [B, M, 4] and noise [B, M, 2] -> location [B, M, 2], log-probability [B, M]."""
        if policy == "learned":
            mean = location_mean(attention)
            sample = (mean + self.std_dev * noise).detach()
            return torch.tanh(sample), gaussian_log_prob(sample, mean, self.std_dev)
        location = torch.zeros_like(noise)
        if policy == "random":
            location = torch.erf(noise / math.sqrt(2))  # the normal distribution's own function makes it uniform
        return location, noise.new_zeros(noise.shape[:2])


class LossTerms(NamedTuple):
    """The three terms whose sum is minimized, means over pictures and trajectories."""

    classification: Tensor  # trains the LSTM and the classifier; a mean over the glimpses that are classified
    baseline: Tensor  # trains the baseline; a mean over the glimpses too
    reinforce: Tensor  # trains the location network; a sum over the glimpses


def rewards(rollout: Rollout, labels: Tensor, supervision: str) -> Tensor:
    """Reward of every glimpse, 1 or 0, [B, M, T]: whether the prediction that counts for it is right, labels [B].

    supervision "last", as in 2018: that is the final one. "each": the one right after the glimpse.
    """
    right = (rollout.logits.argmax(-1) == labels.view(-1, 1, 1)).float()  # [B, M, T]
    return right if supervision == "each" else right[:, :, -1:].expand_as(right)


def attention_loss(rollout: Rollout, labels: Tensor, supervision: str) -> LossTerms:
    """Cross-entropy + squared error of the baseline + REINFORCE (Williams 1992), for labels [B].

    supervision "last": only the final prediction is trained. "each": every prediction is, and has a reward of its own;
    a later glimpse then has a reason of its own. With one glimpse the two are the same.

    The advantage, reward minus baseline, is detached: it weighs the score, and no gradient flows through it.
    """
    logits = rollout.logits if supervision == "each" else rollout.logits[:, :, -1:]  # [B, M, T or 1, C]
    target = labels.view(-1, 1, 1).expand(logits.shape[:3])
    classification = F.cross_entropy(logits.flatten(0, 2), target.flatten())
    reward = rewards(rollout, labels, supervision)  # [B, M, T]
    advantage = (reward - rollout.baseline).detach()
    reinforce = -(advantage * rollout.log_prob).sum(-1).mean()
    return LossTerms(classification, F.mse_loss(rollout.baseline, reward), reinforce)
