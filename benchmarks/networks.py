"""The networks that are compared, ours and others', under one call signature: x (b t) c h w, tau, text."""

import dataclasses
import gc
import importlib
import importlib.util
import sys
import unittest.mock
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.clocks import Clock
from common.blocks import channels_last
from common.diffusion import Diffusion, guide
from common.loop import adamw
from common.temporal import TemporalOptions, is_temporal
from common.unet import UNet
from extra.pretrained import architecture, from_diffusers_unet, load_weights
from kit.parallel import hasten

FRAMES, TEXT = 8, 64  # of a clip; width of the tokens
SAMPLING_STEPS, SCALE = 4, 2.0
# settings among which the fastest is taken: bfloat16 autocast, channels-last, compiled, recorded as a CUDA graph
FORMATS = {"float32": (False, False), "bfloat16": (True, False), "bfloat16, channels-last": (True, True)}
ON_GPU = {"bfloat16, channels-last": (True, True), "bfloat16, recorded": (True, False, False, True),
          "bfloat16, channels-last, recorded": (True, True, False, True)}
COMPILED = {"bfloat16, compiled, recorded": (True, False, True, True)}


@dataclasses.dataclass(frozen=True)
class Size:
    """A U-Net of Stable Video Diffusion's kind, and the latents that go through it."""

    width: int
    multipliers: tuple[int, ...] = (1, 2, 2)
    text: int = TEXT
    tokens: int = 1
    clips: int = 2
    latent: tuple[int, int] = (16, 32)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * multiplier for multiplier in self.multipliers)


LARGE = Size(320, (1, 2, 4, 4), text=1024, tokens=77, clips=1, latent=(40, 64))  # Stable Diffusion 2.1, 320 x 512


# %% One network and what can be done with it


class Contestant:
    """A network under one call signature, f(x, tau, text) with x (b t) c h w, and its jobs at one setting."""

    def __init__(self, net: nn.Module, call: Callable, temporal: Callable[[str], bool], size: Size) -> None:
        self.net, self.call, self.temporal = net, call, temporal
        self.use(False, False)
        device = next(net.parameters()).device
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(size.clips * FRAMES, 4, *size.latent, generator=draw).to(device)
        self.tau = torch.tensor([7, 801], device=device)[: size.clips]
        self.text = torch.randn(size.clips, size.tokens, size.text, generator=draw).to(device)

    def use(self, bfloat16: bool, to_channels_last: bool, compiled: bool = False, recorded: bool = False,
            backend: str = "inductor") -> None:
        self.bfloat16, self.channels_last = bfloat16, to_channels_last
        hasten(self.net, compiled, recorded, backend)
        if to_channels_last:
            channels_last(self.net)
        else:
            for module in self.net.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.contiguous_format)

    def output(self, x: torch.Tensor, tau: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.call(self.net, x, tau, text)

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.output(self.x, self.tau, self.text)

    def step(self, only_temporal: bool) -> Callable[[], None]:
        for name, p in self.net.named_parameters():
            p.requires_grad_(self.temporal(name) or not only_temporal)
        optimizer = adamw(self.net, 1e-5)

        def train() -> None:
            self.output(self.x, self.tau, self.text).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return train

    def sample(self) -> torch.Tensor:
        """DDIM with guidance, both halves of it in one batch: t c h w of every clip."""
        diffusion = Diffusion("sqrt_linear", 0.0015, 0.0195, "v", self.x.device)
        text = torch.cat([torch.zeros_like(self.text), self.text])

        def predict(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
            untold, told = self.output(torch.cat([x, x]), tau[:: FRAMES].repeat(2), text).chunk(2)
            return guide(untold, told, SCALE)

        return diffusion.ddim(predict, self.x, SAMPLING_STEPS, 0.0, torch.Generator())

    def best(self, clock: Clock, job: Callable[[], object], formats: dict[str, tuple]) -> str:
        """Sets the fastest setting for a job and returns its name."""
        found = {}
        for name, setting in formats.items() if len(formats) > 1 else ():
            self.use(*setting)
            job()
            found[name] = min(clock.seconds(job) for _ in range(2))
            self.use(False, False)  # what was recorded holds tens of gigabytes until it is collected
            gc.collect()
            torch.cuda.empty_cache()
        name = min(found, key=found.get) if found else next(iter(formats))  # one need not be compiled twice
        self.use(*formats[name])
        return name


# %% Ours, and whose they are compared with


def ours_of_width(width: int) -> nn.Module:
    torch.manual_seed(0)
    return UNet(4, 4, width, (1, 2, 2), 2, (1, 2), head_channels=64, context_dim=TEXT,
                temporal=TemporalOptions(context_dim=TEXT))


def call_ours(net: nn.Module, x: torch.Tensor, tau: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return net(x, tau, text, frames=FRAMES, time_context=text)


def same_network(size: Size, device: torch.device) -> tuple[Contestant, Contestant]:
    """Our U-Net and diffusers' of Stable Video Diffusion with the same random weights.

    Two things are set in theirs, as the released code has them: the norms' eps, and the vector added to the diffusion
    time, which is made zero (we have none here). One thing in ours: 32 groups in every norm at any width.
    """
    import diffusers

    attended = len(size.widths) - 1
    with device:  # 1.5 G parameters take a CPU a minute
        theirs = diffusers.UNetSpatioTemporalConditionModel(
            in_channels=4, out_channels=4, block_out_channels=size.widths, layers_per_block=2,
            cross_attention_dim=size.text, num_attention_heads=tuple(width // 64 for width in size.widths),
            addition_time_embed_dim=16, projection_class_embeddings_input_dim=48,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * attended + ("DownBlockSpatioTemporal",),
            up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * attended)
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=draw, device=device) + (p.dim() == 1 and "norm" in name))
        for p in theirs.add_embedding.linear_2.parameters():
            p.zero_()
    for name, module in theirs.named_modules():
        if isinstance(module, nn.GroupNorm) and "resnets" in name:
            module.eps = 1e-5
    weights = from_diffusers_unet(theirs.state_dict())
    weights = {name: value for name, value in weights.items() if not name.startswith("label_emb")}
    with device:
        ours = UNet(**architecture(weights, "diffusers", head_channels=64))
    load_weights(ours, weights, "diffusers")
    for module in ours.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 32
    ids = torch.zeros(1, 3, device=device)

    def call_theirs(net: nn.Module, x: torch.Tensor, tau: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        clips = x.unflatten(0, (-1, FRAMES))
        return net(clips, tau, text, ids.expand(len(tau), -1), return_dict=False)[0].flatten(0, 1)

    def of_time(name: str) -> bool:
        return "temporal" in name or "time_pos" in name or "time_mixer" in name

    return (Contestant(ours.to(device), call_ours, is_temporal, size),
            Contestant(theirs.to(device), call_theirs, of_time, size))


def same_job(who: str, goal: int, device: torch.device) -> Contestant:
    """Another video U-Net of about `goal` parameters."""
    torch.manual_seed(0)
    if who == "diffusers":
        import diffusers

        def build(width: int) -> nn.Module:
            return diffusers.UNet3DConditionModel(
                block_out_channels=(width, 2 * width, 2 * width), layers_per_block=2, cross_attention_dim=TEXT,
                down_block_types=("CrossAttnDownBlock3D",) * 2 + ("DownBlock3D",),
                up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 2, attention_head_dim=32)  # fmt: skip

        def call(net: nn.Module, x: torch.Tensor, tau: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            clips = x.unflatten(0, (-1, FRAMES)).transpose(1, 2)  # b c t h w
            return net(clips, tau, text).sample.transpose(1, 2).flatten(0, 1)

        widths = range(32, 1024, 32)
    else:
        from video_diffusion_pytorch import Unet3D

        def build(width: int) -> nn.Module:
            return Unet3D(dim=width, cond_dim=TEXT, channels=4, dim_mults=(1, 2, 2))

        def call(net: nn.Module, x: torch.Tensor, tau: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            clips = x.unflatten(0, (-1, FRAMES)).transpose(1, 2)
            return net(clips, tau, cond=text[:, 0]).transpose(1, 2).flatten(0, 1)

        widths = range(16, 1024, 16)
    return Contestant(nearest_size(build, goal, widths).to(device), call, is_temporal, Size(0))


def nearest_size(build: Callable[[int], nn.Module], goal: int, widths: range) -> nn.Module:
    """The network of a family whose parameters come nearest to `goal`."""

    def parameters(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(width).parameters())

    return build(min(widths, key=lambda width: abs(parameters(width) - goal)))


def missing(who: str) -> str:
    """Why a network of others cannot be measured here; "" if it can."""
    package = {"diffusers": "diffusers", "lucidrains": "video_diffusion_pytorch"}[who]
    # lucidrains' data set and trainer use torchvision and its network does not: where there is none, an empty one does
    stand_in = who == "lucidrains" and not importlib.util.find_spec("torchvision")
    if stand_in:
        sys.modules["torchvision"] = unittest.mock.MagicMock()
    try:
        importlib.import_module(package)
    except ImportError:
        return f'{who}: not installed; pip install "videoldm[bench]"'
    finally:
        if stand_in:
            del sys.modules["torchvision"]
    return ""
