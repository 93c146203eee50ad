"""The image LDM as every later lesson sees it: autoencoder, conditioner, diffusion, spatial weights (Sec. 2, App. F).

Lesson 2 trains it; from lesson 3 on it is frozen. `config` is the Config of lesson 2.
"""

import contextlib
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.autoencoder import Autoencoder, ResnetBlock
from common.blocks import channels_last, sinusoids
from common.diffusion import Diffusion
from common.temporal import TemporalOptions
from common.unet import UNet
from kit.data import Clips
from kit.errors import UserError
from kit.run import Run
from kit.scenes import MAX_CARS

# %% Conditions to tokens


class Conditioner(nn.Module):
    """Clips to cross-attention tokens, b n d. `drop` (b, bool) replaces a condition by "unknown".

    labels: one token, the sum of an embedding of night and one of the number of cars (App. F: sequence length 1);
    boxes: one token a car, coordinates embedded and fused by a transformer (App. H.1); text: one token a word.
    """

    WORDS, LENGTH = 2048, 20

    def __init__(self, kind: str, dim: int, layers: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "labels":
            self.night, self.cars = nn.Embedding(3, dim), nn.Embedding(MAX_CARS + 2, dim)  # the last: unknown
        elif kind in ("boxes", "text"):
            self.unknown = nn.Parameter(torch.zeros(dim))
            self.embed = nn.Linear(4 * 32, dim) if kind == "boxes" else nn.Embedding(self.WORDS + 1, dim)
            self.position = nn.Parameter(torch.zeros(self.LENGTH if kind == "text" else MAX_CARS, dim))
            layer = nn.TransformerEncoderLayer(
                dim, max(1, dim // 32), 4 * dim, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            self.fuse = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, clips: Clips, drop: torch.Tensor | None = None) -> torch.Tensor | None:
        if self.kind == "none":
            return None
        device = next(self.parameters()).device
        drop = torch.zeros(len(clips), dtype=torch.bool) if drop is None else drop
        if self.kind == "labels":
            night = torch.where(drop | (clips.night < 0), 2, clips.night)
            cars = torch.where(drop | (clips.cars < 0), MAX_CARS + 1, clips.cars.clamp(max=MAX_CARS))
            return (self.night(night.to(device)) + self.cars(cars.to(device)))[:, None]  # b 1 d
        if self.kind == "boxes":
            boxes = clips.boxes[:, 0].to(device)  # b n 4, of the first frame
            tokens = self.embed(
                rearrange(sinusoids(1000 * boxes.flatten(), 32), "(b n k) c -> b n (k c)", b=len(boxes), k=4)
            )
        else:
            tokens = self.embed(torch.stack([self.words(caption) for caption in clips.captions]).to(device))
        tokens = self.fuse(tokens + self.position)
        return torch.where(drop.to(device)[:, None, None], self.unknown.to(tokens.dtype), tokens)

    @classmethod
    def words(cls, caption: str, length: int = LENGTH) -> torch.Tensor:
        """Word numbers by a hash, so that no vocabulary has to be kept; 0 fills up, and what is too long is cut."""
        words = [1 + zlib.crc32(word.encode()) % cls.WORDS for word in caption.lower().split()][:length]
        return torch.tensor(words + [0] * (length - len(words)))


def conditions(count: int, night: int = -1, cars: int = -1, caption: str = "", boxes: list | None = None) -> Clips:
    """Rows of conditions with no video: what to ask a model for."""
    slots = torch.zeros(count, 1, MAX_CARS, 4)
    if boxes:
        slots[:, 0, : len(boxes)] = torch.tensor(boxes, dtype=torch.float32)
    return Clips(torch.zeros(count, 1, 3, 0, 0), torch.full((count,), night), torch.full((count,), cars), slots,
                 [caption] * count, torch.full((count,), torch.nan), torch.full((count,), torch.nan))


# %% The model


def build_autoencoder(config, block: type[nn.Module] = ResnetBlock) -> Autoencoder:
    return Autoencoder(config.ae_channels, config.ae_multipliers, config.ae_depth, config.latent_channels,
                       config.regularizer, config.codes, config.ae_attention, block)


class ImageModel:
    """The image LDM as later lessons see it: configuration, autoencoder, conditioner, diffusion, spatial weights.

    autocast: what frames are encoded and decoded, and networks sampled, under; a run's, where there is one.
    """

    autocast: Callable = contextlib.nullcontext

    def __init__(self, config, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, device
        self.autoencoder = None if config.pixel else channels_last(build_autoencoder(config)).to(device)
        self.conditioner = Conditioner(config.condition, config.context_dim, config.fusion_layers).to(device)
        self.diffusion = Diffusion(config.schedule, config.beta_start, config.beta_end, config.parameterization, device)
        self.weights: dict[str, torch.Tensor] = {}
        factor = 1 if config.pixel else self.autoencoder.factor
        if config.height % factor or config.width % factor:
            raise UserError(f"--height {config.height} --width {config.width}: not divisible by f = {factor}")
        channels = 3 if config.pixel else config.latent_channels
        self.shape = (channels, config.height // factor, config.width // factor)
        if self.shape[1] % 2 ** (len(config.multipliers) - 1) or self.shape[2] % 2 ** (len(config.multipliers) - 1):
            raise UserError(
                f"latents of {self.shape[1]} x {self.shape[2]} cannot be halved "
                f"{len(config.multipliers) - 1} times; change --height, --width or --multipliers"
            )

    def unet(self, temporal: TemporalOptions | None = None) -> UNet:
        """The U-Net with this model's spatial weights, and with temporal layers where asked for."""
        c = self.config
        unet = UNet(self.shape[0], self.shape[0], c.channels, c.multipliers, c.depth, c.attention, c.heads,
                    c.head_channels, c.context_dim if c.condition != "none" else 0, temporal=temporal)
        if self.weights:
            unet.load_state_dict(self.weights, strict=temporal is None)
        return channels_last(unet).to(self.device)

    def new_autoencoder(self, block: type[nn.Module] = ResnetBlock) -> Autoencoder:
        """An untrained autoencoder of this model's shape, its decoder made of `block`s."""
        return build_autoencoder(self.config, block)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Frames `b t 3 H W` to latents `(b t) c h w`; pixels stay pixels for the pixel baseline, latents latents."""
        frames = rearrange(video, "b t c h w -> (b t) c h w").to(self.device)
        if frames.shape[1:] == self.shape:
            return frames
        with torch.no_grad(), self.autocast():
            return self.autoencoder.encode(frames.contiguous(memory_format=torch.channels_last)).float()

    def decode(self, z: torch.Tensor, frames: int = 1, chunk: int = 32) -> torch.Tensor:
        """Latents `(b t) c h w` to frames `b t 3 H W`, on the CPU, a chunk at a time."""
        if not self.config.pixel:
            with torch.no_grad(), self.autocast():
                z = torch.cat([self.autoencoder.decode(part).cpu() for part in z.split(chunk)])
        return rearrange(z.float().cpu().clamp(-1, 1), "(b t) c h w -> b t c h w", t=frames)

    def sample(self, run: Run, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor,
               steps: int, eta: float, *key: object, power: float = 1.0, label: str = "") -> torch.Tensor:
        """DDIM from `noise`, (b t) c h w, to latents. predict(z_tau, tau of every row) gives the network's output; the
        noise that eta > 0 draws afresh depends on `key`. See Diffusion.ddim."""

        def output(z_tau: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                return predict(z_tau, tau)

        clamp = 1.0 if self.config.pixel else None  # pixels have a range, latents none
        return self.diffusion.ddim(output, noise, steps, eta, run.generator("ddim", *key), clamp, label, power)

    @property
    def lineage(self) -> dict:
        """What must agree between this model and everything built on it."""
        scale = 1.0 if self.config.pixel else float(self.autoencoder.scale)
        size = {"height": self.config.height, "width": self.config.width}
        return {"data": self.config.data_name(), **size, "latent_scale": scale}


def planned_input(image: ImageModel, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Latents of a clip, its diffusion time and its context, on the meta device."""
    with torch.device("meta"):
        tokens = {"none": 0, "labels": 1, "boxes": MAX_CARS, "text": Conditioner.LENGTH}[image.config.condition]
        context = torch.zeros(1, tokens, image.config.context_dim) if tokens else None
        return torch.zeros(frames, *image.shape), torch.zeros(1), context
