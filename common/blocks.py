"""The blocks of the image U-Net.

Dimension key: b clips, t frames, c channels, h, w, s = h * w positions, n context tokens. These layers see images, or
the frames of clips as images, `(b t) c h w`; what mixes frames is in common/temporal.py. Module and parameter names are
those of the Stable Diffusion checkpoints, so real weights load key for key.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class LayerNorm(nn.LayerNorm):
    """torch's, in the precision of its input, as CPUs do it by themselves. On GPUs autocast would have it in float32,
    with every activation copied there and back, forward and backward. (Sums are in float32 all the same.)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNorm(nn.GroupNorm):
    """torch's, in the precision of its input, as LayerNorm; and kept from a crash: on CPUs its backward pass segfaults
    (2.13, channels-last, small maps) when the input needs no gradient, which is so for the first temporal layer on a
    frozen network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            with torch.autocast("cuda", enabled=False):
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if torch.compiler.is_compiling():
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


def channels_last(module: nn.Module) -> nn.Module:
    """Puts the weights of 2D convolutions in the memory format that CPUs and tensor cores are fastest with."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)
    return module


def sinusoids(positions: torch.Tensor, channels: int, max_period: float = 10000.0) -> torch.Tensor:
    """Cosines, then sines, of positions (n) at `channels / 2` frequencies: n c. For diffusion times and for frames."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=positions.device) / half)
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# %% Residual blocks


def conv3x3(channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, plus diffusion time, GroupNorm, SiLU, conv, plus skip: b c h w, b e -> b c' h w.

    conv, skip: the kinds of convolution that it is made of.
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int,
                 conv: Callable[[int, int], nn.Module] = conv3x3, skip: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), conv(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels), nn.SiLU(), nn.Identity(), zero(conv(out_channels, out_channels))
        )  # Identity: the place of the dropout in Stable Diffusion, which numbers the last conv 3
        self.skip_connection: nn.Module = nn.Identity()
        if channels != out_channels:
            self.skip_connection = skip(channels, out_channels, 1)

    def residual(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """emb: already shaped to add to the features."""
        return self.out_layers(self.in_layers(x) + emb)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.skip_connection(x) + self.residual(x, self.emb_layers(emb)[:, :, None, None])


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


class TransformerBlock(nn.Module):
    """Spatial: self-attention, cross-attention (where there is a context), feed-forward, each on a LayerNorm. b s c

    text_only: the first attention looks at the context too (the x4 upscaler's way of disabling self-attention).
    """

    def __init__(self, channels: int, heads: int, context_dim: int, text_only: bool = False) -> None:
        super().__init__()
        self.text_only = text_only
        self.norm1, self.norm3 = LayerNorm(channels), LayerNorm(channels)
        self.attn1, self.ff = Attention(channels, heads, context_dim if text_only else 0), FeedForward(channels)
        if context_dim:
            self.norm2, self.attn2 = LayerNorm(channels), Attention(channels, heads, context_dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x), context if self.text_only else None)
        if hasattr(self, "attn2"):
            x = x + self.attn2(self.norm2(x), context)
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

    def blocks(self, tokens: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return self.transformer_blocks[0](tokens, context)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None, *clip: object) -> torch.Tensor:
        """clip: only for the temporal kind, which has more `blocks`."""
        height = x.shape[-2]
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        tokens = self.project(self.proj_in, tokens)
        tokens = self.project(self.proj_out, self.blocks(tokens, context, *clip))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=height)


