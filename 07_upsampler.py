"""Lesson 7: a 4x video upsampler (Sec. 3.4, Eq. 5, Table 3).

A second diffusion model, in pixel space: it denoises large frames given the small ones, which are concatenated to its
input, and fed again as c_S to the 3D-conv layers. Noise augmentation hides what the small frames of lesson 8 get wrong:
they are diffused to a random level in training (0 to 250 of 1000), to level 150 when sampling, and a token tells the
level. (The cpu preset has lower levels, and diffuses what bilinear enlargement lacks: see the presets.) First an image
upsampler is trained, on patches; then its spatial layers are frozen and temporal layers trained on clips of patches,
the same patch in every frame. Being convolutional it is applied to whole frames, in portions of 8.

  python 07_upsampler.py          4.5 minutes on 2 slow cores

One thing is not the paper's, and off in its presets (--no-calm): all frames of a video are given the same noise, of
both kinds, since what a small network leaves of it boils, and portions are of 16, of which 4 fade into the next. Then
the image upsampler by itself is as calm; what temporal layers are for shows in the numbers with the paper's noise,
which stand first.

Expect of the shipped weights, trained longer than this preset: 4 to 5 dB above bilinear enlargement; with the paper's
noise, flicker a quarter below the image upsampler's and 3.6 times the restlessness of real clips; with the same noise
1.6 times, where 2 is the goal.

Reads OUT/02_image_ldm (only for its frame size). Writes OUT/07_upsampler/: image.pt, checkpoint.pt (temporal weights),
upsampled.png, upsampled.gif, metrics.png.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.blocks import channels_last, sinusoids
from common.diffusion import Diffusion, in_common
from common.image_model import ImageModel
from common.loop import Learner, load_part, training_loop
from common.portions import faded, in_portions
from common.temporal import TemporalOptions, is_temporal, train_temporal_only
from common.unet import UNet
from extra.plan import dry_run, training_cost
from kit.data import HELD_OUT, Source, open_data
from kit.errors import UserError, cli
from kit.files import config_of
from kit.flags import (
    Amount,
    Beta,
    Count,
    Factor,
    Fraction,
    NoiseLevel,
    Rate,
    SamplingSteps,
    Spacing,
    TrainingConfig,
    Whole,
    parse,
)
from kit.measures import flicker, psnr, restlessness, seam, sharpness
from kit.parallel import Share
from kit.pictures import animation, plot_metrics, sheet
from kit.run import Run, known_good

lesson02 = import_module("02_image_ldm")
NAME = "07_upsampler"
SCALE = 4


# %% Model


class Upsampler(nn.Module):
    """g of Eq. (5): predicts v of the large frames from them noised, the small ones noised a little, and that level."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        temporal = TemporalOptions(alpha_frames=config.alpha_frames, context_dim=config.level_dim, known_channels=3,
                                   known_features=config.known_features,
                                   positions=False)  # Table 6: no position encoding here
        self.unet = channels_last(
            UNet(6, 3, config.channels, config.multipliers, config.depth, config.attention, config.heads,
                 context_dim=config.level_dim, temporal=temporal)
        )
        if not config.output_norm:
            # Normalising a whole picture just before the output takes its brightness and contrast away, and in pixel
            # space they are the picture. Wide networks find ways around it; 16 channels in minutes do not.
            self.unet.out[0] = nn.Identity()
        self.level = nn.Sequential(
            nn.Linear(config.level_dim, config.level_dim), nn.SiLU(), nn.Linear(config.level_dim, config.level_dim)
        )

    def forward(self, x_tau: torch.Tensor, tau: torch.Tensor, small: torch.Tensor, level: torch.Tensor,
                frames: int | None = None) -> torch.Tensor:
        """x_tau: (b t) 3 4h 4w, small: (b t) 3 h w already noised to level; tau, level: b (images: one a picture)."""
        token = self.level(sinusoids(level, self.level[0].in_features))[:, None]  # b 1 d
        enlarged = enlarge(small).to(x_tau)
        x = torch.cat([x_tau, enlarged], dim=1).contiguous(memory_format=torch.channels_last)
        return self.unet(x, tau, token, frames=frames, time_context=token, known=enlarged)


def shrink(video: torch.Tensor) -> torch.Tensor:
    """... 3 4h 4w -> ... 3 h w by averaging."""
    return F.avg_pool2d(video.flatten(0, -4), SCALE).unflatten(0, video.shape[:-3])


def enlarge(small: torch.Tensor) -> torch.Tensor:
    """b 3 h w -> b 3 4h 4w, bilinear."""
    return F.interpolate(small, scale_factor=SCALE, mode="bilinear")


def what_is_known(config: Config, diffusion: Diffusion, small: torch.Tensor,
                  level: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(mu, s): with --residual, (x - mu) / s is diffused in the place of x, and has about unit variance.

    mu is the enlargement of the small frames (b 3 h w, diffused to `level`, b), s the deviation of what it lacks:
    detail, of 0.08 in these scenes, and the noise of the level, of which enlarging keeps 0.4. A small network's errors
    are then errors of s, not of the picture.
    """
    if not config.residual:
        return 0.0, 1.0
    alpha, sigma = diffusion.levels(level, small)
    return enlarge(small / alpha), (0.08**2 + 0.4 * (sigma / alpha) ** 2).sqrt()


def cut_from(share: Share) -> tuple[list[int], list[int]]:
    """Four patches are cut from each clip: the numbers of the clips a share needs, and which of them each patch has."""
    clips = -(-share.batch // 4)
    wanted = sorted({row % clips for row in share.rows})
    return wanted, [wanted.index(row % clips) for row in share.rows]


def patches(video: torch.Tensor, of: list[int], size: int, share: Share) -> torch.Tensor:
    """Patches of 4 `size` pixels a side, each from the clip `b t 3 H W` of its number in `of`: b t 3 s s.

    All frames of a clip are cut at the same place; were each cut at its own, time would hold nothing to learn."""
    side, draw = SCALE * size, share.generator
    ends = [(length - side) // SCALE + 1 for length in video.shape[-2:]]
    places = [[SCALE * int(torch.randint(0, end, (), generator=draw)) for end in ends] for _ in range(share.batch)]
    return torch.stack([video[clip, ..., top : top + side, left : left + side]
                        for clip, (top, left) in zip(of, share.keep(places), strict=True)])


def make_diffusion(config: Config, device: torch.device | str) -> Diffusion:
    return Diffusion(config.schedule, config.beta_start, config.beta_end, config.parameterization, device)


# %% Training: the image upsampler, then its temporal layers


def train(run: Run, config: Config, source: Source, image: ImageModel) -> Upsampler:
    torch.manual_seed(config.seed)
    model = Upsampler(config).to(run.device)
    for name, frames in (("image", None), ("checkpoint", config.frames)):
        if frames is None:
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(not is_temporal(parameter_name))
            steps, batch, lr = config.image_steps, config.image_batch, config.image_lr
        else:
            model.requires_grad_(False)
            train_temporal_only(model.unet)
            steps, batch, lr = config.steps, config.batch, config.lr
        learner = Learner(run, model, config, lr)
        metrics = "metrics.csv" if frames else "image.csv"
        for step in training_loop(run, steps, learner.parts, {"lineage": size_lineage(image)}, f"{name}.pt", metrics):
            for share in run.shares(batch, "diffusion", frames, step):
                loss = upsampling_loss(run, config, source, learner.network, share, step, frames)
                share.backward(loss)
                run.log(loss=loss)
            learner.step(step)
        learner.ema.use()  # the temporal layers are trained on the averaged image upsampler, and both are judged so
    return model


def upsampling_loss(run: Run, config: Config, source: Source, network: Callable, share: Share, step: int,
                    frames: int | None) -> torch.Tensor:
    """Eq. (5) on images (frames None) or clips, for a share of the batch."""
    diffusion, (numbers, of) = make_diffusion(config, run.device), cut_from(share)
    clips = source.clips((config.seed, 8, step, frames or 0), numbers, frames or 1, config.fps or config.final_fps)
    x = patches(clips.video, of, config.patch, share).to(run.device)
    level = share.integers(config.max_level + 1)
    tau, t = share.integers(diffusion.steps), x.shape[1]
    x = rearrange(x, "b t c h w -> (b t) c h w")
    small = shrink(x)
    # Noise augmentation: the *small* frames are diffused to `level` (Eq. 5 prints the large x there)
    small = diffusion.diffuse(small, share.normal(small.shape), level.repeat_interleave(t))
    mu, s = what_is_known(config, diffusion, small, level.repeat_interleave(t))
    x = (x - mu) / s
    eps = in_common(share.normal(x.shape), t, config.shared_noise)
    x_tau = diffusion.diffuse(x, eps, tau.repeat_interleave(t))
    with run.autocast():
        output = network(x_tau, tau, small, level, frames).float()
    return F.mse_loss(output, diffusion.target(x, eps, tau.repeat_interleave(t)))


# %% Sampling


@torch.no_grad()
def upsample(model: Upsampler, config: Config, small: Iterable[torch.Tensor], run: Run, *key: object,
             video: bool = True, label: str = "") -> Iterator[torch.Tensor]:
    """Frames of one video, 3 h w each in [-1, 1], to 3 4h 4w on the CPU, in portions of `config.frames`; the calm way
    in twice as long ones, since the first and the last frames of each are another kind to convolutions over time.

    video False applies the image upsampler, alpha = 1, to the same noise.
    """
    diffusion = make_diffusion(config, run.device)
    size, overlap, rest = config.frames, config.overlap, 0
    if config.calm:
        size, overlap, rest = 2 * config.frames, config.frames // 2, config.frames // 2

    def enlarged() -> Iterator[tuple[torch.Tensor, int]]:
        first = None
        for number, (part, new) in enumerate(in_portions(small, size, overlap, rest)):
            draw, t = run.generator("upsample", *key, number), len(part)
            groups = 1 if video else t  # images: every frame is a batch row of its own
            level = torch.full((groups,), config.level, device=run.device)
            low, noise = (torch.randn(t, 3, *(factor * side for side in part.shape[-2:]), generator=draw).to(run.device)
                          for factor in (1, SCALE))
            noise = in_common(noise, t, config.shared_noise)
            if config.calm:  # what a small network leaves of the noise stands still, in all portions
                first = first or (low[:1], noise[:1])
                low, noise = (of_one.expand(t, -1, -1, -1) for of_one in first)
            low = diffusion.diffuse(part.to(run.device), low, level.repeat_interleave(t // groups))

            def predict(x_tau: torch.Tensor, tau: torch.Tensor, low: torch.Tensor = low, level: torch.Tensor = level,
                        frames: int | None = t if video else None) -> torch.Tensor:
                with run.autocast():
                    return model(x_tau, tau[: len(level)], low, level, frames)

            mu, s = what_is_known(config, diffusion, low, level.repeat_interleave(t // groups))
            clamp = None if config.residual else 1.0
            large = diffusion.ddim(predict, noise, config.ddim_steps, config.eta, draw, clamp, label, config.power)
            yield (mu + s * large).clamp(-1, 1).cpu(), new

    return faded(enlarged(), overlap)


# %% Settings, and what later lessons load


@dataclass(kw_only=True)
class Config(TrainingConfig):
    patch: Count = 16  # side of a training patch in small pixels; the large one is 4 times that
    frames: Count = 8  # T, frames of a training clip, and of a portion when sampling
    overlap: Whole = 0  # frames that portions have in common when sampling; there one fades into the other
    fps: Amount = 0.0  # frame rate of the training clips; 0: the final rate
    channels: Count = 16  # base width
    multipliers: tuple[Count, ...] = (1, 2, 4, 4)  # factor of the width per level
    depth: Count = 1  # residual blocks per level
    attention: tuple[Factor, ...] = (8,)  # downsampling factors with transformers; 4 would double the time of a frame
    heads: Whole = 4  # attention heads
    output_norm: bool = False  # GroupNorm before the last convolution; at 16 channels it costs 2 dB (see Upsampler)
    level_dim: Whole = 64  # width of the token that tells the noise level
    known_features: Count = 16  # channels c_S is embedded to ("context channels")
    alpha_frames: Count = 1  # length of alpha: 1 is a scalar a layer, T is one value a frame
    schedule: Literal["sqrt_linear", "linear"] = "linear"  # linear in beta, which App. F names, for this pixel model
    beta_start: Beta = 1e-4  # first beta
    beta_end: Beta = 0.02  # last beta
    parameterization: Literal["v", "eps"] = "v"  # what the network predicts
    residual: bool = False  # diffuse what bilinear enlargement lacks, at unit variance, rather than the whole picture
    shared_noise: Fraction = 0.0  # part of the noise's variance that the frames of a clip have in common
    max_level: NoiseLevel = 250  # noise augmentation in training: uniform in 0 to this
    level: NoiseLevel = 150  # noise augmentation when sampling
    image_steps: Whole = 1800  # training steps of the image upsampler
    image_batch: Count = 6  # patches per step; in minutes, many steps on few patches give most
    image_lr: Rate = 2e-3  # its learning rate
    steps: Whole = 230  # training steps of the temporal layers
    batch: Count = 2  # clips of patches per step
    lr: Rate = 1e-3  # their learning rate
    muon: Amount = 0.0  # learning rate of weight matrices by Muon (common/muon.py); 0: AdamW for all
    warmup: Whole = 50  # steps of linear warm-up
    steady: Whole = 0  # so many steps at the full rates, which then fall with the root of the step; 0: all
    ema_decay: Fraction = 0.995  # decay of the weight average
    ddim_steps: SamplingSteps = 4  # sampling steps
    power: Spacing = 2.0  # spacing of sampling steps: 1 even, 2 finer towards the data, for few steps
    eta: Fraction = 1.0  # 0 deterministic, 1 ancestral
    calm: bool = True  # sampling: the same noise of both kinds in all frames of a video; longer portions, which fade
    samples: Count = 1  # held-out clips in the numbers


# Frames of 64 x 128 have a quarter of the paper's pixels to average noise over, so the same level hides four times as
# much. At 140 the signal-to-noise ratio is four times that of the paper's 250 and leaves as much to see (Hoogeboom et
# al. 2023); 75 would be its 150. Sampling takes 10, which has a higher PSNR than 30 (docs/tried.md).
SMALL = dict(residual=True, shared_noise=0.9, max_level=140, level=10, ddim_steps=2, power=1.0, eta=0.0)
PRESETS: dict[str, dict] = {
    "smoke": SMALL | dict(patch=4, frames=3, overlap=1, channels=16, multipliers=(1, 2), attention=(2,), level_dim=16,
                          known_features=16, image_steps=3, image_batch=2, steps=3, batch=1, ddim_steps=2, samples=1),
    "cpu": SMALL | dict(overlap=2, muon=0.005, image_steps=1200, steps=200, steady=400),
    "gpu": dict(residual=True, overlap=2, shared_noise=0.9, patch=32, channels=96, multipliers=(1, 2, 4, 4), depth=2,
                attention=(8,), output_norm=True, level_dim=256, known_features=64, image_steps=30_000,
                image_batch=32, image_lr=1e-4, steps=20_000, batch=8, lr=1e-4, warmup=1000, ema_decay=0.9999,
                ddim_steps=50, power=1.0, save_every=2000),
    # Table 6, driving upsampler. The table's attention resolution 8 can only be a downsampling factor; its alpha of
    # length 10 does not fit its 8 frames (8 here); its patch size is not given (64 small pixels is our guess).
    "paper": dict(patch=64, fps=4.0, channels=160, multipliers=(1, 2, 4, 4), depth=2, attention=(8,), output_norm=True,
                  level_dim=768, known_features=128, alpha_frames=8, image_steps=84_000, image_batch=32,
                  image_lr=1e-5, steps=84_000, batch=16, lr=1e-4, warmup=1, ema_decay=0.9999, ddim_steps=50, power=1.0,
                  calm=False),
}
PRESETS["biking"] = PRESETS["paper"]  # the paper trained none for Mountain Biking


def load(run: Run, image: ImageModel) -> tuple[nn.Module, Config]:
    """The trained upsampler (averaged weights, spatial and temporal) from OUT, and its configuration."""
    contents = [run.trained(NAME, size_lineage(image), file) for file in ("image.pt", "checkpoint.pt")]
    config = config_of(Config, contents[1])
    model = Upsampler(config).to(run.device)
    load_part(model, contents[0]["ema"]["shadow"] | contents[1]["ema"]["shadow"], contents[1]["path"])
    return model.requires_grad_(False).eval(), config


def size_lineage(image: ImageModel) -> dict:
    """The upsampler sees frames, not latents: it fits any image model of this data and frame size."""
    return {k: v for k, v in image.lineage.items() if k != "latent_scale"}


# %% Figures and numbers


@torch.no_grad()
def evaluate(run: Run, config: Config, source: Source, model: Upsampler) -> None:
    length = config.frames + config.frames // 2  # two portions, the second overlapping backwards
    real = source.clips((config.seed, HELD_OUT), config.samples, length, config.final_fps, "held-out").video
    small = shrink(real)
    bilinear = F.interpolate(small.flatten(0, 1), scale_factor=SCALE, mode="bilinear").view_as(real)
    ours = {}
    for calm in sorted({False, config.calm}):  # the paper's noise tells what temporal layers do; ours is what 08 shows
        for name, video in (("image upsampler", False), ("video upsampler", True)):
            name, settings = name + ", same noise" * calm, replace(config, calm=calm)
            ours[name] = torch.stack(
                [
                    torch.stack(list(upsample(model, settings, clip, run, i, video=video, label=name)))
                    for i, clip in enumerate(small)
                ]
            )
    shown = list(ours)[-1]
    for name, clips in {"bilinear": bilinear, **ours}.items():
        run.report(f"PSNR, {name}", psnr(clips, real), "dB")
        run.report(f"flicker, {name}", flicker(clips, real))
        ours_alone = name == shown
        restless, sharp = restlessness(clips, real), float(sharpness(clips).mean() / sharpness(real).mean())
        run.report(f"restlessness, {name}", restless, "times real", at_most=2 if ours_alone else None)
        run.report(f"sharpness over real, {name}", sharp, at_least=0.85 if ours_alone else None,
                   at_most=1.15 if ours_alone else None)
    run.report(f"PSNR, {shown}, over bilinear", psnr(ours[shown], real) - psnr(bilinear, real), "dB", at_least=0)
    change = flicker(ours["video upsampler"], real) / flicker(ours["image upsampler"], real) - 1
    run.report("flicker, change", 100 * change, "%", at_most=-20)
    jump = seam(ours["video upsampler"], real, config.frames - config.overlap)
    run.report("flicker at the seam of portions over elsewhere", jump)
    pictures = (bilinear, ours["image upsampler"], ours[shown], real)
    sheet([clips[0, :3] for clips in pictures], run.folder / "upsampled.png")
    crop = [clips[0, :, :, -160:, :160] for clips in pictures]
    animation(torch.stack(crop), run.folder / "upsampled.gif", 8)
    for name in ("image", "metrics"):
        plot_metrics(run.folder / f"{name}.csv", ["loss"], "upsampler")
    print(f"pictures: {run.folder}/upsampled.png (bilinear, image, video, truth), upsampled.gif")


# %% Main


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, FLOPs and memory."""
    image = lesson02.planned(config)
    with torch.device("meta"):
        model = Upsampler(config)
    model.requires_grad_(False)
    train_temporal_only(model.unet)
    large = (SCALE * image.config.height, SCALE * image.config.width)
    dry_run(
        config,
        {"model": model},
        {
            "patches": (config.batch, config.frames, 3, SCALE * config.patch, SCALE * config.patch),
            "small frames": (config.frames, 3, image.config.height, image.config.width),
            "large frames": (config.frames, 3, *large),
        },
    )
    side, one = SCALE * config.patch, torch.zeros(1, device="meta")
    x, small = (torch.zeros(config.frames, 3, n, n, device="meta") for n in (side, config.patch))
    forward = lambda: model(x, one, small, one, config.frames)  # noqa: E731
    training_cost(config, "model", model, forward, config.batch, config.steps)


def main(argv: list[str] | None = None) -> tuple | None:
    config = parse(Config, PRESETS, argv, __doc__)
    if config.dry_run:
        return plan(config)
    run = Run(NAME, config)
    image = lesson02.load(run)
    if config.patch > min(image.config.height, image.config.width):
        raise UserError(f"--patch {config.patch}: larger than the frames, {image.config.height} x {image.config.width}")
    source = open_data(config.data, SCALE * image.config.height, SCALE * image.config.width, config.final_fps,
                       config.workers, config.reuse, run.device)
    model = train(run, config, source, image)
    run.end_training()
    evaluate(run, config, source, model.eval())
    known_good(run, PRESETS)
    return run, config, source, image, model


if __name__ == "__main__":
    raise SystemExit(cli(main))
