"""The blocks of the U-Net, spatial and temporal (Sec. 3.1, Fig. 4).

Dimension key: b clips, t frames, c channels, h, w, s = h * w positions, n context tokens. Spatial layers see
`(b t) c h w` and never mix frames; temporal layers see the clip. Module and parameter names are those of the Stable
Diffusion checkpoints, and the temporal layers sit in the same slots under the names of Stable Video Diffusion
(`time_stack`, `time_mixer.mix_factor`, `time_pos_embed`), so real weights load key for key.

How a temporal layer starts. Each one computes z' = z + f(z) with the last linear or convolution of f at zero, so z' = z
and the video network begins as the image network, exactly, whatever alpha is. The gradient of f's last layer is
(1 - alpha) times that of the output, so f learns from the first step on, and alpha follows as soon as z' differs from
z. The other way to begin as the image model, a hard clamp with alpha started at 1, never learns: (1 - alpha) = 0 makes
the first gradient of every temporal weight zero, and where the data push alpha above 1 the clamp holds it there.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn


class GroupNorm(nn.GroupNorm):
    """torch's, kept from a crash: on CPUs its backward pass segfaults (2.13, channels-last, small maps) when the input
    needs no gradient, which is so for the first temporal layer on a frozen network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad:
            x = x.detach().requires_grad_()
        return super().forward(x)


def group_norm(channels: int, eps: float = 1e-5, wide: int = 224) -> GroupNorm:
    """32 groups from `wide` channels on, as in Stable Diffusion; groups of 16 channels below.

    Narrow groups would erase what few channels say (at 32 channels each its mean), and in channels-last memory CPUs
    handle groups of 16 channels in bfloat16 several times faster than groups of 4.
    """
    return GroupNorm(math.gcd(32 if channels >= wide else max(1, channels // 16), channels), channels, eps=eps)


def zero(module: nn.Module) -> nn.Module:
    """Sets a module's parameters to zero and returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoids(positions: torch.Tensor, channels: int, max_period: float = 10000.0) -> torch.Tensor:
    """Cosines, then sines, of positions (n) at `channels / 2` frequencies: n c. For diffusion times and for frames."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=positions.device) / half)
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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


# %% Residual blocks


class FrameConv(nn.Conv3d):
    """A (3,1,1) convolution of `b c t s`: every position mixes with itself in the neighbouring frames.

    Written as a 2D convolution over (t, s), so that a channels-last clip needs no copy; the weight keeps its 3D shape.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, plus diffusion time, GroupNorm, SiLU, conv, plus skip: b c h w, b e -> b c' h w."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, temporal: bool = False) -> None:
        super().__init__()
        conv = FrameConv if temporal else lambda c, c_out: nn.Conv2d(c, c_out, 3, padding=1)
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), conv(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels), nn.SiLU(), nn.Identity(), zero(conv(out_channels, out_channels))
        )  # Identity: the place of the dropout in Stable Diffusion, which numbers the last conv 3
        self.skip_connection: nn.Module = nn.Identity()
        if channels != out_channels:
            self.skip_connection = (nn.Conv3d if temporal else nn.Conv2d)(channels, out_channels, 1)

    def residual(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """emb: already shaped to add to the features."""
        return self.out_layers(self.in_layers(x) + emb)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, clip: Clip | None = None) -> torch.Tensor:
        return self.skip_connection(x) + self.residual(x, self.emb_layers(emb)[:, :, None, None])


class FrameResBlock(ResBlock):
    """The temporal 3D-conv residual block, kernel (3,1,1), with c_S concatenated to its input (Fig. 4).

    With context its skip is a learned 1x1x1 convolution that starts as the identity on z and zero on the context.
    """

    def __init__(self, channels: int, emb_channels: int, known_features: int) -> None:
        super().__init__(channels + known_features, emb_channels, channels, temporal=True)
        if known_features:
            zero(self.skip_connection)
            with torch.no_grad():
                self.skip_connection.weight[:, :channels] = torch.eye(channels)[..., None, None, None]

    def forward(self, x: torch.Tensor, emb: torch.Tensor, clip: Clip) -> torch.Tensor:
        frames, height = clip.frames, x.shape[-2]
        x = rearrange(x, "(b t) c h w -> b c t (h w)", t=frames)
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


# %% Transformers


class GEGLU(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int, mult: float = 4) -> None:
        super().__init__()
        hidden = int(channels * mult)
        self.net = nn.Sequential(GEGLU(channels, hidden), nn.Identity(), nn.Linear(hidden, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Multi-head attention. x: b s c attends to context b n d, or to itself. A context with fewer rows than x has
    (one a clip, say, for x of (b t) s c) serves equal runs of rows, without copying it."""

    def __init__(self, channels: int, heads: int, context_dim: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               mask: torch.Tensor | None = None) -> torch.Tensor:
        """mask: s n, true where a position may look; None: everywhere."""
        q, k, v = (rearrange(y, "b s (h d) -> b h s d", h=self.heads) for y in (q, k, v))
        if q.is_cuda or q.shape[-2] * k.shape[-2] > 2**16:
            out = F.scaled_dot_product_attention(q, k, v, mask)
        else:  # the same, written out: on CPUs and short sequences its backward pass is 3 to 4 times faster
            logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
            out = (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(dim=-1) @ v
        return rearrange(out, "b h s d -> b s (h d)")

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q = self.to_q(x).reshape(len(context), -1, x.shape[-1])
        return self.to_out(self.attend(q, self.to_k(context), self.to_v(context)).view_as(x))


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


class TransformerBlock(nn.Module):
    """Spatial: self-attention, cross-attention (where there is a context), feed-forward, each on a LayerNorm. b s c

    text_only: the first attention looks at the context too (the x4 upscaler's way of disabling self-attention).
    """

    def __init__(self, channels: int, heads: int, context_dim: int, text_only: bool = False) -> None:
        super().__init__()
        self.text_only = text_only
        self.norm1, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn1, self.ff = Attention(channels, heads, context_dim if text_only else 0), FeedForward(channels)
        if context_dim:
            self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, context_dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x), context if self.text_only else None)
        if hasattr(self, "attn2"):
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class FrameTransformerBlock(nn.Module):
    """Temporal: input feed-forward, attention over frames, cross-attention, feed-forward. (b t) s c"""

    def __init__(self, channels: int, heads: int, options: TemporalOptions) -> None:
        super().__init__()
        self.norm_in, self.ff_in = nn.LayerNorm(channels), FeedForward(channels, options.ff_mult)
        self.norm1, self.attn1 = nn.LayerNorm(channels), FrameAttention(channels, heads)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(channels, options.ff_mult)
        layers = [self.ff_in.net[2], self.attn1.to_out[0], self.ff.net[2]]
        if options.context_dim:
            self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, options.context_dim)
            layers.append(self.attn2.to_out[0])
        for layer in layers:  # z' = z at the start
            zero(layer)

    def forward(self, x: torch.Tensor, clip: Clip) -> torch.Tensor:
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x), clip.frames, clip.reach)
        if hasattr(self, "attn2"):
            x = x + self.attn2(self.norm2(x), clip.context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """GroupNorm, projection, transformer block, projection, skip. (b t) c h w; context: b n d or (b t) n d.

    linear: the projections are Linear (SD 2.x) rather than 1x1 convolutions (SD 1.x); the mathematics is the same.
    """

    def __init__(self, channels: int, heads: int, context_dim: int, linear: bool = True,
                 text_only: bool = False) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim, text_only)])
        self.proj_out = zero(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    @staticmethod
    def project(layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """A Linear, or the 1x1 convolution that is one; tokens: b s c."""
        return F.linear(tokens, layer.weight.flatten(1), layer.bias)

    def blocks(self, tokens: torch.Tensor, context: torch.Tensor | None, clip: Clip | None) -> torch.Tensor:
        return self.transformer_blocks[0](tokens, context)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None, clip: Clip | None = None) -> torch.Tensor:
        height = x.shape[-2]
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        tokens = self.project(self.proj_in, tokens)
        tokens = self.project(self.proj_out, self.blocks(tokens, context, clip))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=height)


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

    def blocks(self, tokens: torch.Tensor, context: torch.Tensor | None, clip: Clip | None) -> torch.Tensor:
        z = super().blocks(tokens, context, clip)  # (b t) s c
        if clip is None:
            return z
        z_prime = z
        if hasattr(self, "time_pos_embed"):
            positions = self.time_pos_embed(sinusoids(torch.arange(clip.frames, device=z.device), z.shape[-1]))  # t c
            z_prime = z + repeat(positions.to(z.dtype), "t c -> (b t) 1 c", b=len(z) // clip.frames)
        for block in self.time_stack:
            z_prime = block(z_prime, clip)
        return self.time_mixer(z, z_prime, clip.frames)
