"""One U-Net for everything from 1 M parameters to Stable Diffusion, with or without temporal layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.blocks import ResBlock, SpatialTransformer, channels_last, group_norm, sinusoids, zero
from common.temporal import Clip, SpatialVideoTransformer, TemporalOptions, VideoResBlock


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Block(nn.Sequential):
    """Layers in order; residual blocks get the diffusion time, transformers the context, and both the clip."""

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None, clip: Clip | None
    ) -> torch.Tensor:
        for layer in self:
            if isinstance(layer, VideoResBlock):
                x = layer(x, emb, clip)
            elif isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialVideoTransformer):
                x = layer(x, context, clip)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """f_theta of Eq. (1), and with `temporal` f_theta,phi of Eq. (2).

    in_channels, out_channels: of the noisy input (with anything concatenated to it) and of the prediction;
    channels, multipliers, depth: base width, its factor on each level, residual blocks per level (one more going up);
    attention: downsampling factors of the levels that have transformers (the paper's tables sometimes list widths of
    feature maps instead: 16, 8, 4 for 32-wide latents means factors 2, 4, 8); heads or head_channels: the one given
    fixes the other; context_dim: width of the tokens in spatial cross-attention, 0 for none;
    label_classes: with n > 0, an embedding of integer labels, with n < 0 an MLP on label vectors of width -n, added to
    the diffusion time (noise level of an upsampler; vector conditioning of Stable Video Diffusion);
    linear: Linear projections in transformers (SD 2.x) rather than 1x1 convolutions (SD 1.x);
    text_only: downsampling factors of levels whose first attention sees the context instead of the picture (x4 model).
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int, multipliers: Sequence[int], depth: int,
                 attention: Sequence[int], heads: int = 0, head_channels: int = 0, context_dim: int = 0,
                 label_classes: int = 0, linear: bool = True, temporal: TemporalOptions | None = None,
                 text_only: Sequence[int] = ()) -> None:
        super().__init__()
        self.channels, self.temporal, emb = channels, temporal, 4 * channels
        self.checkpointing = False  # true: recompute each block in the backward pass, for less memory
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if label_classes > 0:
            self.label_emb: nn.Module = nn.Embedding(label_classes, emb)
        elif label_classes < 0:
            mlp = nn.Sequential(nn.Linear(-label_classes, emb), nn.SiLU(), nn.Linear(emb, emb))
            self.label_emb = nn.Sequential(mlp)

        def res(width: int, out: int) -> ResBlock:
            if temporal and temporal.conv:
                return VideoResBlock(width, emb, out, temporal)
            return ResBlock(width, emb, out)

        def transformer(width: int, factor: int = 0) -> SpatialTransformer:
            number = heads or width // head_channels
            if temporal and temporal.attention_blocks:
                return SpatialVideoTransformer(width, number, context_dim, temporal, linear, factor in text_only)
            return SpatialTransformer(width, number, context_dim, linear, factor in text_only)

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        width, factor, skips = channels, 1, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(depth):
                layers: list[nn.Module] = [res(width, multiplier * channels)]
                width = multiplier * channels
                if factor in attention:
                    layers.append(transformer(width, factor))
                self.input_blocks.append(Block(*layers))
                skips.append(width)
            if level + 1 < len(multipliers):
                self.input_blocks.append(Block(Downsample(width)))
                skips.append(width)
                factor *= 2
        self.middle_block = Block(res(width, width), transformer(width), res(width, width))
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(depth + 1):
                layers = [res(width + skips.pop(), multiplier * channels)]
                width = multiplier * channels
                if factor in attention:
                    layers.append(transformer(width, factor))
                if level and i == depth:
                    layers.append(Upsample(width))
                    factor //= 2
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(group_norm(width), nn.SiLU(), zero(nn.Conv2d(width, out_channels, 3, padding=1)))
        self.factor = 2 ** (len(multipliers) - 1)

    def forward(self, x: torch.Tensor, tau: torch.Tensor, context: torch.Tensor | None = None, *,
                label: torch.Tensor | None = None, frames: int | None = None, time_context: torch.Tensor | None = None,
                known: torch.Tensor | None = None, reach: int = 0) -> torch.Tensor:
        """(b t) c h w -> (b t) c' h w. Height and width must be divisible by `factor`.

        tau, label: one value a clip (b) or a frame (b t); context: tokens for the spatial layers, b n d or (b t) n d;
        time_context: tokens for the temporal layers, b n d; known: c_S = (mask * z, mask), (b t) c h w;
        frames: t. Without it the batch is images and the temporal layers are skipped, which is alpha = 1 exactly;
        reach: how far temporal attention looks, in frames, 0 without end.
        """
        emb = self.time_embed(sinusoids(tau, self.channels))
        if label is not None:
            emb = emb + self.label_emb(label)
        emb = repeat(emb, "b c -> (b t) c", t=len(x) // len(emb))
        clip = None
        if self.temporal and frames is not None:
            clip = Clip(frames, time_context, None if known is None else self.pyramid(known), reach)
        skips = []
        for block in self.input_blocks:
            x = self.apply_block(block, x, emb, context, clip)
            skips.append(x)
        x = self.apply_block(self.middle_block, x, emb, context, clip)
        for block in self.output_blocks:
            x = self.apply_block(block, torch.cat([x, skips.pop()], dim=1), emb, context, clip)
        return self.out(x)

    def apply_block(self, block: Block, *inputs) -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def widen(self, channels: int) -> None:
        """Gives the first convolution `channels` more inputs. They begin at zero: the output stays what it was."""
        old = self.input_blocks[0][0]
        new = nn.Conv2d(old.in_channels + channels, old.out_channels, 3, padding=1).to(old.weight)
        with torch.no_grad():
            new.weight.zero_()
            new.weight[:, : old.in_channels] = old.weight
            new.bias.copy_(old.bias)
        # like all others: one layer that is not puts the whole first level in the slower memory format
        self.input_blocks[0][0] = channels_last(new)

    def pyramid(self, known: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        """c_S resized to every level by averaging (the mask is constant over a frame and stays 0 or 1)."""
        sizes = {(known.shape[-2] // 2**k, known.shape[-1] // 2**k) for k in range(self.factor.bit_length())}
        return {size: F.adaptive_avg_pool2d(known, size) for size in sizes}
