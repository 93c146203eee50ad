"""The temporal layers of Video LDM (Sec. 3.1, Fig. 4), which is what turns an image model into a video model.

A layer of the image model sees a clip as images, `(b t) c h w`, and never mixes frames. Behind it stands a temporal
layer that sees the clip, `b c t (h w)` to convolve over frames or `(b h w) t c` to attend over them, and a merge:

    z' = temporal(z),   z <- alpha z + (1 - alpha) z'        alpha = 1 gives the image model back

How a temporal layer starts. Each one computes z' = z + f(z) with the last linear or convolution of f at zero, so z' = z
and the video network begins as the image network, exactly, whatever alpha is. The gradient of f's last layer is
(1 - alpha) times that of the output, so f learns from the first step on, and alpha follows as soon as z' differs from
z. The other way to begin as the image model, a hard clamp with alpha started at 1, never learns: (1 - alpha) = 0 makes
the first gradient of every temporal weight zero, and where the data push alpha above 1 the clamp holds it there.

Names and places are those of Stable Video Diffusion (`time_stack`, `time_mixer.mix_factor`, `time_pos_embed`), inside
those of Stable Diffusion, so real weights load key for key.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common.blocks import Attention, FeedForward, LayerNorm, ResBlock, SpatialTransformer, sinusoids, zero

# %% What they are told, and what they are


@dataclass
class Clip:
    """What temporal layers are told about the batch: t, tokens for their cross-attention, and c_S.

    context: b n d or None; frames_known: c_S = (mask * z, mask) by feature height and width, each (b t) c h w, or None;
    reach: frames attend to frames at most so far away, 0 is any distance (App. D, for clips longer than trained).
    """

    frames: int
    context: torch.Tensor | None = None
    frames_known: dict[tuple[int, int], torch.Tensor] | None = None
    reach: int = 0


@dataclass(frozen=True)
class TemporalOptions:
    """Temporal layers of a U-Net, the rows of Table 6.

    alpha_frames: length of alpha, 1 for one scalar a layer, or T for one value a frame ("dim alpha");
    context_dim: width of the tokens in temporal cross-attention, 0 for none; known_channels: channels of c_S, 0 for
    none; known_features: channels it is embedded to ("context channels"); conv: whether 3D-conv blocks are inserted;
    attention_blocks: temporal transformer blocks per spatial transformer, 0 for none; ff_mult: width of their
    feed-forward layers, and of the position embedding's up to 4; positions: whether frames are told their place.
    """

    alpha_frames: int = 1
    context_dim: int = 0
    known_channels: int = 0
    known_features: int = 128
    conv: bool = True
    attention_blocks: int = 1
    ff_mult: float = 4
    positions: bool = True


# %% The merge


class AlphaMerge(nn.Module):
    """z, z' -> alpha z + (1 - alpha) z' with alpha = sigmoid(mix_factor): alpha multiplies the *spatial* branch."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(frames))  # alpha starts at 1/2

    def alpha(self) -> torch.Tensor:
        return self.mix_factor.sigmoid()

    def forward(self, z: torch.Tensor, z_prime: torch.Tensor, frames: int) -> torch.Tensor:
        alpha = self.alpha()
        if len(alpha) not in (1, frames):
            raise ValueError(f"alpha has one value for each of {len(alpha)} frames, the clip has {frames} (App. D)")
        if len(alpha) > 1:
            alpha = alpha.repeat(len(z) // frames)  # (b t)
        alpha = alpha.to(z.dtype).view(-1, *[1] * (z.dim() - 1))
        # alpha z + (1 - alpha) z', in the form that is exact where z' = z
        return z + (1 - alpha) * (z_prime - z)


# %% Convolution over frames


class FrameConv(nn.Conv3d):
    """A (3,1,1) convolution of `b c t s`: every position mixes with itself in the neighbouring frames.

    Written as a 2D convolution over (t, s), so that a channels-last clip needs no copy; the weight keeps its 3D shape.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


class FrameResBlock(ResBlock):
    """The temporal 3D-conv residual block, kernel (3,1,1), with c_S concatenated to its input (Fig. 4).

    With context its skip is a learned 1x1x1 convolution that starts as the identity on z and zero on the context.
    """

    def __init__(self, channels: int, emb_channels: int, known_features: int) -> None:
        super().__init__(channels + known_features, emb_channels, channels, FrameConv, nn.Conv3d)
        if known_features:
            zero(self.skip_connection)
            with torch.no_grad():
                self.skip_connection.weight[:, :channels] = torch.eye(channels)[..., None, None, None]

    def forward(self, x: torch.Tensor, emb: torch.Tensor, clip: Clip) -> torch.Tensor:
        frames, height = clip.frames, x.shape[-2]
        # in two moves: one would leave a clip that comes alone with strides in which torch sees no channels-last memory
        x = rearrange(rearrange(x, "n c h w -> n c (h w)"), "(b t) c s -> b c t s", t=frames)
        emb = rearrange(self.emb_layers(emb), "(b t) c -> b c t 1", t=frames)
        skip = x
        if isinstance(self.skip_connection, nn.Conv3d):
            skip = F.conv2d(x, self.skip_connection.weight[..., 0], self.skip_connection.bias)
        x = skip + self.residual(x, emb)
        return rearrange(x, "b c t (h w) -> (b t) c h w", h=height)


class VideoResBlock(ResBlock):
    """A spatial ResBlock followed by its temporal one and the merge. Called without a clip it is the spatial one."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, options: TemporalOptions) -> None:
        super().__init__(channels, emb_channels, out_channels)
        features = options.known_features if options.known_channels else 0
        self.time_stack = FrameResBlock(out_channels, emb_channels, features)
        self.time_mixer = AlphaMerge(options.alpha_frames)
        if features:  # the learned downsampling of Fig. 4: parameter-free resize, then this convolution
            self.time_context = nn.Conv2d(options.known_channels, features, 3, padding=1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, clip: Clip | None = None) -> torch.Tensor:
        z = super().forward(x, emb)  # (b t) c h w
        if clip is None:
            return z
        z_prime = z
        if clip.frames_known is not None:
            known = self.time_context(clip.frames_known[tuple(z.shape[-2:])])
            z_prime = torch.cat([z, known.to(z.dtype)], dim=1)
        return self.time_mixer(z, self.time_stack(z_prime, emb, clip), clip.frames)


# %% Attention over frames


class FrameAttention(Attention):
    """Attention over frames. x: (b t) s c; every position attends to itself in all frames of its clip, uncausally, or
    with `reach` in those at most so many frames away (App. D)."""

    def forward(self, x: torch.Tensor, frames: int, reach: int = 0) -> torch.Tensor:
        q, k, v = (rearrange(f(x), "(b t) s c -> (b s) t c", t=frames) for f in (self.to_q, self.to_k, self.to_v))
        t, mask = torch.arange(frames, device=x.device), None
        if reach:
            mask = (t[:, None] - t).abs() <= reach
        out = rearrange(self.attend(q, k, v, mask), "(b s) t c -> (b t) s c", s=x.shape[1])
        return self.to_out(out)


class FrameTransformerBlock(nn.Module):
    """Temporal: input feed-forward, attention over frames, cross-attention, feed-forward. (b t) s c"""

    def __init__(self, channels: int, heads: int, options: TemporalOptions) -> None:
        super().__init__()
        self.norm_in, self.ff_in = LayerNorm(channels), FeedForward(channels, options.ff_mult)
        self.norm1, self.attn1 = LayerNorm(channels), FrameAttention(channels, heads)
        self.norm3, self.ff = LayerNorm(channels), FeedForward(channels, options.ff_mult)
        layers = [self.ff_in.net[2], self.attn1.to_out[0], self.ff.net[2]]
        if options.context_dim:
            self.norm2, self.attn2 = LayerNorm(channels), Attention(channels, heads, options.context_dim)
            layers.append(self.attn2.to_out[0])
        for layer in layers:  # z' = z at the start
            zero(layer)

    def forward(self, x: torch.Tensor, clip: Clip) -> torch.Tensor:
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x), clip.frames, clip.reach)
        if hasattr(self, "attn2"):
            x = x + self.attn2(self.norm2(x), clip.context)
        return x + self.ff(self.norm3(x))


class SpatialVideoTransformer(SpatialTransformer):
    """A spatial transformer with its temporal block inside: after the spatial block, before the output projection."""

    def __init__(
        self, channels: int, heads: int, context_dim: int, options: TemporalOptions, linear: bool = True,
        text_only: bool = False,
    ) -> None:
        super().__init__(channels, heads, context_dim, linear, text_only)
        self.time_stack = nn.ModuleList(
            [FrameTransformerBlock(channels, heads, options) for _ in range(options.attention_blocks)]
        )
        # frame positions, added to the tokens; the last layer is zero, or they would break the identity at the start
        if options.positions:
            hidden = int(channels * min(4, options.ff_mult))
            self.time_pos_embed = nn.Sequential(
                nn.Linear(channels, hidden), nn.SiLU(), zero(nn.Linear(hidden, channels))
            )
        self.time_mixer = AlphaMerge(options.alpha_frames)

    def blocks(self, tokens: torch.Tensor, context: torch.Tensor | None, clip: Clip | None = None) -> torch.Tensor:
        z = super().blocks(tokens, context)  # (b t) s c
        if clip is None:
            return z
        z_prime = z
        if hasattr(self, "time_pos_embed"):
            positions = self.time_pos_embed(sinusoids(torch.arange(clip.frames, device=z.device), z.shape[-1]))  # t c
            z_prime = z + repeat(positions.to(z.dtype), "t c -> (b t) 1 c", b=len(z) // clip.frames)
        for block in self.time_stack:
            z_prime = block(z_prime, clip)
        return self.time_mixer(z, z_prime, clip.frames)


# %% Which weights they are: theta stays, phi learns (Eq. 2)


def is_temporal(name: str) -> bool:
    """Whether a parameter belongs to a temporal layer (`time_embed` is the diffusion time, and spatial)."""
    return re.search(r"time_(stack|mixer|pos_embed|context|mix_conv)|(^|\.)mix_factor", name) is not None


def train_temporal_only(network: nn.Module) -> None:
    """Freezes everything but the temporal layers."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_temporal(name))


def alphas_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """alpha of every temporal layer, by name, in the order of the network."""
    return {name.removesuffix(".time_mixer.mix_factor"): p.detach().float().sigmoid()
            for name, p in network.named_parameters() if name.endswith("mix_factor")}


def grow(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies temporal weights into a network that may be wider at the input of its 3D-conv blocks.

    Lessons 5 and 6 begin here: columns for the context c_S are new, and zero. Where alpha has another length it starts
    from the mean. (GroupNorm counts the context channels in, so the start is close to the old network, not equal.)
    Raises ValueError for weights of another width.
    """
    own = network.state_dict()
    for name, value in weights.items():
        if name not in own:
            continue
        target = own[name]
        if name.endswith("mix_factor") and target.shape != value.shape:
            value = value.mean().expand_as(target)
        elif target.shape != value.shape:
            if not any(part in name for part in (".in_layers.0.", ".in_layers.2.", ".skip_connection.")):
                raise ValueError(f"{name} has another width: train both with the same --feed-forward")
            wider = torch.full_like(target, float(name.endswith("in_layers.0.weight")))  # GroupNorm's: 1 and 0
            axis = 1 if value.dim() > 1 else 0  # input channels of a convolution, channels of the GroupNorm
            wider.narrow(axis, 0, value.shape[axis]).copy_(value)
            value = wider
        target.copy_(value)
