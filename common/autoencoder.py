"""The autoencoder of the image LDM (Sec. 2, Table 8): KL- or VQ-regularised, f = 2^(levels - 1).

Module names are those of the Stable Diffusion checkpoints (`encoder.down.i.block.j`, `decoder.up.i`, `quant_conv`).
The decoder's residual block is a parameter, so that lesson 04 can build the video decoder with temporal layers inside.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.blocks import group_norm, zero

WIDE = 128  # channels from which on there are 32 groups: Stable Diffusion's autoencoder is that narrow


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, plus skip: b c h w -> b c' h w."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels, 1e-6, WIDE), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = (
            group_norm(out_channels, 1e-6, WIDE),
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return residual + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of one image: b c h w."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6, WIDE)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as in the released code


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks (`block.j`), attention after each where asked for (`attn.j`), a resampling."""

    def __init__(self, widths: list[tuple[int, int]], block: type[nn.Module], attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList([block(width, out) for width, out in widths])
        self.attn = nn.ModuleList([AttnBlock(out) for _, out in widths] if attention else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (block(channels, channels), AttnBlock(channels),
                                                   block(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """b 3 H W in [-1, 1] -> b z_channels H/f W/f."""

    def __init__(self, channels: int, multipliers: Sequence[int], depth: int, z_channels: int, attention: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down, width = nn.ModuleList(), channels
        for level, multiplier in enumerate(multipliers):
            last, out = level + 1 == len(multipliers), multiplier * channels
            self.down.append(Level([(width, out)] + [(out, out)] * (depth - 1), ResnetBlock, attention and last))
            if not last:
                self.down[level].downsample = Downsample(out)
            width = out
        self.mid = Middle(width, ResnetBlock)
        self.norm_out, self.conv_out = group_norm(width, 1e-6, WIDE), nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """b z H/f W/f -> b 3 H W. `up.i` counts from the highest resolution, as in the checkpoints."""

    def __init__(self, channels: int, multipliers: Sequence[int], depth: int, z_channels: int, attention: bool,
                 block: type[nn.Module] = ResnetBlock) -> None:
        super().__init__()
        width = multipliers[-1] * channels
        self.conv_in, self.mid = nn.Conv2d(z_channels, width, 3, padding=1), Middle(width, block)
        levels: list[nn.Module] = []
        for level, multiplier in reversed(list(enumerate(multipliers))):
            out, lowest = multiplier * channels, level + 1 == len(multipliers)
            levels.insert(0, Level([(width, out)] + [(out, out)] * depth, block, attention and lowest))
            if level:
                levels[0].upsample = Upsample(out)
            width = out
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = group_norm(width, 1e-6, WIDE), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """Nearest of `codes` vectors, with a straight-through gradient: b z h w -> (b z h w, loss)."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat, codes = rearrange(z, "b z h w -> (b h w) z").float(), self.embedding.weight.float()
        # |a - b|^2 without the |a|^2 that is the same for every code; in chunks, or 16,384 codes would fill the memory
        nearest = torch.cat([(codes.square().sum(1) - 2 * part @ codes.T).argmin(1) for part in flat.split(16384)])
        quantised = rearrange(self.embedding(nearest), "(b h w) z -> b z h w", b=len(z), h=z.shape[-2])
        loss = F.mse_loss(quantised, z.detach()) + 0.25 * F.mse_loss(z, quantised.detach())
        return z + (quantised - z).detach(), loss


class Autoencoder(nn.Module):
    """E and D of Sec. 2. regularizer: "kl" or "vq" (with `codes` codes).

    `scale` makes latents of unit variance for the diffusion model: measured once after training and kept in the
    checkpoint. encode and decode convert to and from scaled latents.
    """

    def __init__(self, channels: int, multipliers: Sequence[int], depth: int, z_channels: int, regularizer: str,
                 codes: int = 16384, attention: bool = False, block: type[nn.Module] = ResnetBlock) -> None:
        super().__init__()
        if regularizer not in ("kl", "vq"):
            raise ValueError(f"regularizer {regularizer!r}: use kl or vq")
        moments = 2 * z_channels if regularizer == "kl" else z_channels
        self.factor, self.regularizer = 2 ** (len(multipliers) - 1), regularizer
        self.encoder = Encoder(channels, multipliers, depth, moments, attention)
        self.decoder = Decoder(channels, multipliers, depth, z_channels, attention, block)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self._start_wide_open(z_channels)
        if regularizer == "vq":
            self.quantize = Codebook(codes, z_channels)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    @torch.no_grad()
    def _start_wide_open(self, z_channels: int) -> None:
        """Four linear layers in a row, each shrinking its input under torch's default initialisation, would leave the
        latent a whisper beside the decoder's biases, and colour unlearnt for hundreds of steps."""
        for layer in (self.encoder.conv_out, self.decoder.conv_in):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
        for layer in (self.quant_conv, self.post_quant_conv):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.regularizer == "kl":  # a posterior that begins narrow: unit noise would hide the picture likewise
            self.quant_conv.weight[z_channels:] = 0
            self.quant_conv.bias[z_channels:] = -6.0

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior (KL), or the latent before quantisation and a dummy (VQ)."""
        output = self.quant_conv(self.encoder(x)).float()
        if self.regularizer == "vq":
            return output, torch.zeros_like(output)
        mean, log_variance = output.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def regularize(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A latent to decode in training, and the regularisation loss (KL per image, or codebook and commitment)."""
        mean, log_variance = self.moments(x)
        if self.regularizer == "vq":
            return self.quantize(mean)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
        return mean + (0.5 * log_variance).exp() * noise, kl

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames to their reconstruction, and the regularisation loss: what training needs."""
        z, regularization = self.regularize(x, noise)
        return self.decoder(self.post_quant_conv(z)).float(), regularization

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """b 3 H W -> scaled latents b z H/f W/f: the posterior mean, or the latent before quantisation, as in LDM."""
        return self.moments(x)[0] * self.scale

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> frames in about [-1, 1]. The codebook is applied here."""
        z = z / self.scale
        if self.regularizer == "vq":
            z = self.quantize(z)[0]
        return self.decoder(self.post_quant_conv(z)).float()
