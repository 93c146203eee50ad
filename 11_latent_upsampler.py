"""Lesson 11: a 4x video upsampler of latents, told by text (Sec. 4.2, App. H.2, Table 6).

Changes from lesson 7: diffusion runs in the latents of an autoencoder with f = 4. Latents of the large frames are just
as large as the small frames, which are concatenated to them as they are: 4 + 3 input channels. Text enters by the
cross-attention of spatial and temporal layers (the same tokens), is dropped in training and guided when sampling. The
level of the noise on the small frames is a class, whose embedding joins the diffusion time, not a token; sampling takes
level 30. Positions of frames are told. The plan is that of the public x4 upscaler, whose shallow levels look at the
text twice and never at the whole picture, too large there. With --backbone that model is the image upsampler, and only
temporal layers are trained. The decoder stays an image decoder, as in the paper.

Three things are lesson 7's, not the paper's, and off in the paper's preset: the same noise in all frames (--calm);
lower levels of it for smaller frames (10, not 30); and what is diffused is what the latents of the enlarged small
frames lack, a sixth of the deviation of the latents themselves (--residual): a small network's errors shrink as much.

  python 02_image_ldm.py --condition text            first: its autoencoder and its text tokens
  python 11_latent_upsampler.py                      ten minutes of a slow core with AMX
  python 11_latent_upsampler.py --preset paper --dry-run     parameters of Table 6, memory, FLOPs
  python 11_latent_upsampler.py --backbone x4.safetensors --text-encoder FOLDER --data FOLDER --preset paper

Expect at the cpu preset, on the shipped autoencoder: 31.1 dB at 1.7 times the restlessness of real clips (the image
upsampler by itself 31.2 and 1.5), where bilinear enlargement has 29.1 dB and the autoencoder alone, which bounds what
can be reached, 34.3 dB and 1.7 times; with the paper's noise 31.4 dB and 5 times, and flicker 13 % below the image
upsampler's, where 20 are asked.

Reads OUT/02_image_ldm and OUT/02_image_ldm-text, or the file given with --backbone. Writes OUT/11_latent_upsampler/:
image.pt, checkpoint.pt (temporal weights), upsampled.png, upsampled.gif, metrics.png. Lesson 9 calls `upsample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common.blocks import channels_last
from common.diffusion import Diffusion, guide
from common.image_model import ImageModel, conditions
from common.loop import Learner, load_part, training_loop
from common.portions import faded, in_portions
from common.temporal import TemporalOptions, is_temporal
from common.unet import UNet
from extra.plan import count, dry_run, training_cost
from extra.pretrained import StableDiffusion
from kit.data import HELD_OUT, Clips, Source, open_data
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
from kit.measures import flicker, psnr, restlessness, seam
from kit.parallel import Share
from kit.pictures import animation, plot_metrics, sheet
from kit.run import Run, known_good

lesson07 = import_module("07_upsampler")
lesson09 = import_module("09_text_to_video")
NAME = "11_latent_upsampler"
SCALE = lesson07.SCALE
LATENT_SCALE = 0.08333  # of the public x4 upscaler's autoencoder; a file does not say


# %% What the upsampler works with: autoencoder of f = 4, text; and with --backbone the image upsampler itself


def open_image(run: Run, config: Config) -> ImageModel:
    image = lesson09.open_backbone(run, config, config.keep_captions, upscaler=True)
    if config.backbone:
        check_backbone(config, image)
        image.autoencoder.scale.fill_(LATENT_SCALE)
    if (factor := image.autoencoder.factor) != SCALE:
        raise UserError(f"the autoencoder has f = {factor}, only f = {SCALE} gives latents as large as small frames: "
                        "train lesson 2, and its --condition text, with --ae-multipliers 1 2 4 into another --out")
    return image


def check_backbone(config: Config, image: StableDiffusion) -> None:
    channels, classes = image.architecture["in_channels"], max(0, image.architecture.get("label_classes", 0))
    if channels != image.shape[0] + 3 or classes <= config.max_level:
        raise UserError(f"--backbone {config.backbone}: not the x4 upscaler, whose U-Net has 4 + 3 input channels and "
                        f"a class for every level of noise (here {channels} channels, {classes} classes)")


# %% Model


def network(config: Config, image: ImageModel, time_width: int = 0) -> UNet:
    """g of Eq. (5). time_width: of the tokens that temporal layers read; 0: they read the spatial layers' own."""
    width = lesson09.token_width(image)
    temporal = TemporalOptions(context_dim=time_width or width, known_channels=3, known_features=config.known_features,
                               ff_mult=config.feed_forward)  # Table 6: positions are told, unlike in lesson 7
    if config.backbone:
        unet = image.unet(temporal)
    else:
        unet = UNet(image.shape[0] + 3, image.shape[0], config.channels, config.multipliers, config.depth,
                    config.attention, config.heads, context_dim=width, label_classes=1000, temporal=temporal,
                    text_only=config.text_only)
        # a level is seen a hundred times in minutes: too seldom to unlearn the random vector it would begin with
        nn.init.zeros_(unet.label_emb.weight)
        unet = channels_last(unet).to(image.device)
    return unet


def denoise(unet: UNet, z_tau: torch.Tensor, tau: torch.Tensor, small: torch.Tensor, level: torch.Tensor,
            text: torch.Tensor, frames: int | None = None) -> torch.Tensor:
    """v of the latents z_tau, (b t) c h w, of large frames; small: (b t) 3 h w already noised to level; text: b n d;
    tau, level: b (images: one a picture)."""
    z = torch.cat([z_tau, small], dim=1).contiguous(memory_format=torch.channels_last)
    return unet(z, tau, text, label=level, frames=frames, time_context=text, known=small)


def what_is_known(config: Config, diffusion: Diffusion, image: ImageModel, small: torch.Tensor,
                  level: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(mu, s) as in lesson 7, of latents: with --residual, (z - mu) / s is diffused in the place of z.

    mu are the latents of the enlarged small frames (b 3 h w, diffused to `level`, b), s the deviation of what they
    lack: detail, of 0.17 in these scenes, and the noise of the level, which encoding makes more of.
    """
    if not config.residual:
        return 0.0, 1.0
    alpha, sigma = diffusion.levels(level, small)
    return image.encode(lesson07.enlarge(small / alpha)[None]), (0.17**2 + 5 * (sigma / alpha) ** 2).sqrt()


def stages(config: Config) -> list[tuple[str, int | None]]:
    """File and clip length of what is trained: the image upsampler unless it is given, then its temporal layers."""
    both = [("image", None), ("checkpoint", config.frames)]
    return both[1:] if config.backbone else both


def train_part(unet: UNet, frames: int | None) -> None:
    """Freezes all but the spatial layers (frames None) or all but the temporal ones."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_temporal(name) == (frames is not None))


# %% Training: the image upsampler, then its temporal layers


def train(run: Run, config: Config, source: Source, image: ImageModel, unet: UNet) -> None:
    for name, frames in stages(config):
        train_part(unet, frames)
        steps, batch, lr = config.steps, config.batch, config.lr
        if frames is None:
            steps, batch, lr = config.image_steps, config.image_batch, config.image_lr
        learner = Learner(run, unet, config, lr)
        metrics = "metrics.csv" if frames else "image.csv"
        for step in training_loop(run, steps, learner.parts, {"lineage": image.lineage}, f"{name}.pt", metrics):
            for share in run.shares(batch, "diffusion", frames, step):
                loss = upsampling_loss(run, config, source, image, learner.network, share, step, frames)
                share.backward(loss)
                run.log(loss=loss)
            learner.step(step)
        learner.ema.use()  # the temporal layers are trained on the averaged image upsampler, and both are judged so


def upsampling_loss(run: Run, config: Config, source: Source, image: ImageModel, network: Callable, share: Share,
                    step: int, frames: int | None) -> torch.Tensor:
    """Eq. (5), on latents, on images (frames None) or clips, for a share of the batch."""
    diffusion, (numbers, of) = lesson07.make_diffusion(config, run.device), lesson07.cut_from(share)
    clips = source.clips((config.seed, 12, step, frames or 0), numbers, frames or 1, config.fps or config.final_fps)
    x = lesson07.patches(clips.video, of, config.patch, share)  # b t 3 4h 4w
    t = x.shape[1]
    with run.autocast():
        z = image.encode(x)  # (b t) c h w
        text, nothing = lesson09.tokens(image.conditioner, clips)  # n d for every clip
    drop = share.uniform() < image.config.p_drop
    text = torch.where(drop.to(run.device)[:, None, None], nothing[of], text[of])  # b n d
    level = share.integers(config.max_level + 1)
    small = lesson07.shrink(x).flatten(0, 1).to(run.device)  # (b t) 3 h w
    small = diffusion.diffuse(small, share.normal(small.shape), level.repeat_interleave(t))  # noise augmentation
    tau = share.integers(diffusion.steps)
    tau_of_frames = tau.repeat_interleave(t)
    mu, s = what_is_known(config, diffusion, image, small, level.repeat_interleave(t))
    z = (z - mu) / s
    eps = share.normal(z.shape)
    z_tau = diffusion.diffuse(z, eps, tau_of_frames)
    with run.autocast():
        output = denoise(network, z_tau, tau, small, level, text, frames).float()
    return F.mse_loss(output, diffusion.target(z, eps, tau_of_frames))


# %% Sampling


def upsample(run: Run, frames: Iterable[torch.Tensor], text: Clips, video: bool = True) -> Iterator[torch.Tensor]:
    """Frames of one video, 3 h w each in [-1, 1], to 3 4h 4w on the CPU, with the weights in the run's OUT.

    text: one row of conditions, with the caption of the video.
    """
    unet, image, config = load(run)
    return upsampled(run, config, image, unet, frames, text, video=video, label="upsampler")


@torch.no_grad()
def upsampled(run: Run, config: Config, image: ImageModel, unet: UNet, small: Iterable[torch.Tensor], text: Clips,
              *key: object, video: bool = True, label: str = "") -> Iterator[torch.Tensor]:
    """In portions of `config.frames`, of which the calm way a quarter fades into the next; no longer ones, as positions
    are told. video False applies the image upsampler, alpha = 1, to the same noise."""
    diffusion = lesson07.make_diffusion(config, run.device)
    level, overlap = torch.full((1,), config.level, device=run.device), config.frames // 4 if config.calm else 0
    with run.autocast():
        told, nothing = lesson09.tokens(image.conditioner, text)  # 1 n d

    def latents() -> Iterator[tuple[torch.Tensor, int]]:
        first = None
        for number, (part, new) in enumerate(in_portions(small, config.frames, overlap)):
            draw, t = run.generator("upsample", *key, number), len(part)
            low = torch.randn(part.shape, generator=draw).to(run.device)
            noise = torch.randn(t, image.shape[0], *part.shape[-2:], generator=draw).to(run.device)
            if config.calm:
                first = first or (low[:1], noise[:1])
                low, noise = (of_one.expand(t, -1, -1, -1) for of_one in first)
            low = diffusion.diffuse(part.to(run.device), low, level)

            def predict(z_tau: torch.Tensor, tau: torch.Tensor, low: torch.Tensor = low,
                        frames: int | None = t if video else None) -> torch.Tensor:
                with run.autocast():
                    output = denoise(unet, z_tau, tau[:1], low, level, told, frames)
                    if config.guidance == 1:
                        return output
                    return guide(denoise(unet, z_tau, tau[:1], low, level, nothing, frames), output, config.guidance)

            mu, s = what_is_known(config, diffusion, image, low, level)
            z = diffusion.ddim(predict, noise, config.ddim_steps, config.eta, draw, label=label, power=config.power)
            yield mu + s * z, new

    for z in faded(latents(), overlap):
        yield image.decode(z[None])[0, 0]  # large frames fill the memory: one at a time


# %% Settings, and what later lessons load


@dataclass(kw_only=True)
class Config(TrainingConfig):
    backbone: str = ""  # the x4 upscaler, file or folder; x4: its shape, to count; empty: one is trained here
    text_encoder: str = ""  # folder of the backbone's CLIP text model and tokenizer
    keep_captions: bool = True  # encode each caption once and keep it in OUT/captions; 0.3 MB each, so not for millions
    ema: bool = False  # take the averaged weights of a CompVis file
    size: tuple[Count, ...] = (320, 512)  # small frames' height and width with --backbone
    patch: Count = 16  # side of a training patch in small pixels, and in latents; the large one is 4 times that
    frames: Count = 8  # T, frames of a training clip, and of a portion when sampling
    fps: Amount = 0.0  # frame rate of the training clips; 0: the final rate
    channels: Count = 32  # base width
    multipliers: tuple[Count, ...] = (1, 2, 2)  # factor of the width per level
    depth: Count = 1  # residual blocks per level
    attention: tuple[Factor, ...] = (2, 4)  # downsampling factors with transformers
    text_only: tuple[Factor, ...] = (2,)  # those of them whose first attention looks at the text, not at the picture
    heads: Whole = 2  # attention heads
    known_features: Count = 16  # channels c_S is embedded to ("context channels")
    feed_forward: Amount = 1.0  # width of the temporal feed-forward layers over their channels (4 in the paper)
    schedule: Literal["sqrt_linear", "linear"] = "sqrt_linear"  # what the upscaler's code calls linear
    beta_start: Beta = 1e-4  # first beta
    beta_end: Beta = 0.02  # last beta
    parameterization: Literal["v", "eps"] = "v"  # what the network predicts
    residual: bool = False  # diffuse what the latents of the enlarged small frames lack, rather than all of them
    max_level: NoiseLevel = 250  # noise augmentation in training: uniform in 0 to this
    level: NoiseLevel = 30  # noise augmentation when sampling
    image_steps: Whole = 3000  # training steps of the image upsampler
    image_batch: Count = 12  # patches per step
    image_lr: Rate = 1e-3  # its learning rate
    steps: Whole = 700  # training steps of the temporal layers
    batch: Count = 4  # clips of patches per step
    lr: Rate = 1e-3  # their learning rate
    muon: Amount = 0.0  # learning rate of weight matrices by Muon (common/muon.py); 0: AdamW for all
    warmup: Whole = 50  # steps of linear warm-up
    steady: Whole = 0  # so many steps at the full rates, which then fall with the root of the step; 0: all
    ema_decay: Fraction = 0.995  # decay of the weight average
    ddim_steps: SamplingSteps = 6  # sampling steps
    power: Spacing = 2.0  # spacing of sampling steps: 1 even, 2 finer towards the data, for few steps
    eta: Fraction = 0.0  # 0 deterministic, 1 ancestral: its fresh noise is another in every frame
    calm: bool = True  # sampling: the same noise of both kinds in all frames of a video; portions fade
    guidance: Amount = 2.0  # scale of guidance on the text
    samples: Count = 1  # held-out clips in the numbers


# As in lesson 7: lower levels for smaller frames, and small errors of the rest instead of large ones of the whole.
SMALL = dict(residual=True, max_level=140, level=10, ddim_steps=2, power=1.0)
PRESETS: dict[str, dict] = {
    "smoke": SMALL | dict(patch=4, frames=3, channels=16, multipliers=(1, 2), attention=(1, 2), text_only=(1,),
                          image_steps=3, image_batch=2, steps=3, batch=2),
    "cpu": SMALL | dict(muon=0.005, image_steps=1200, steps=250, steady=400),
    # Lesson 2's gpu preset has f = 8; for this lesson train it, and its text variant, with --ae-multipliers 1 2 4.
    "gpu": dict(patch=32, channels=128, multipliers=(1, 2, 2, 4), depth=2, attention=(2, 4, 8), text_only=(2, 4),
                heads=8, known_features=64, feed_forward=4.0, image_steps=60_000, image_batch=32, image_lr=1e-4,
                steps=10_000, batch=16, lr=1e-4, warmup=1000, ema_decay=0.9999, ddim_steps=50, power=1.0,
                eta=1.0, calm=False, save_every=2000),
    # Table 6, upsampler of Stable Diffusion: crops of 320 x 320, 8 clips on each of 32 GPUs. Its cross-attention is 768
    # wide, the upscaler's text encoder 1024: --dry-run counts both. Text is dropped at 0.1, which is not in the paper.
    "paper": dict(backbone="x4", checkpointing=True, patch=80, fps=2.0, known_features=128, feed_forward=4.0,
                  steps=10_000, batch=256, lr=1e-4, warmup=1, ema_decay=0.9999, ddim_steps=250, power=1.0,
                  eta=1.0, calm=False, save_every=1000),
}


def load(run: Run) -> tuple[UNet, ImageModel, Config]:
    """The trained upsampler (averaged weights) from OUT, what it works with, and its configuration."""
    config = config_of(Config, run.trained(NAME))
    config.out = str(run.config.folder())  # the folder may have moved since
    image = open_image(run, config)
    unet = network(config, image)
    for name, frames in stages(config):
        content = run.trained(NAME, image.lineage, f"{name}.pt")
        train_part(unet, frames)
        load_part(unet, content["ema"]["shadow"], content["path"])
    return unet.requires_grad_(False).eval(), image, config


# %% Figures and numbers


@torch.no_grad()
def evaluate(run: Run, config: Config, source: Source, image: ImageModel, unet: UNet) -> None:
    length = config.frames + config.frames // 2  # two portions, the second overlapping backwards
    held_out = source.clips((config.seed, HELD_OUT), config.samples, length, config.final_fps, "held-out")
    real = held_out.video
    small = lesson07.shrink(real)
    videos = {"bilinear": F.interpolate(small.flatten(0, 1), scale_factor=SCALE, mode="bilinear").view_as(real)}
    for calm in sorted({False, config.calm}):  # as in lesson 7
        for name, video in (("image upsampler", False), ("video upsampler", True)):
            name, settings, clips = name + ", same noise" * calm, replace(config, calm=calm), []
            for i, caption in enumerate(held_out.captions):
                text = conditions(1, caption=caption)
                clips.append(list(upsampled(run, settings, image, unet, small[i], text, i, video=video, label=name)))
            videos[name] = torch.stack([torch.stack(clip) for clip in clips])
    # what can be reached: the true large frames, encoded and decoded one by one
    frames = [image.decode(image.encode(frame[None, None])) for frame in real.flatten(0, 1)]
    videos["autoencoder alone"] = torch.cat(frames).view_as(real)
    for name, clips in videos.items():
        run.report(f"PSNR, {name}", psnr(clips, real), "dB")
        run.report(f"flicker, {name}", flicker(clips, real))
        run.report(f"restlessness, {name}", restlessness(clips, real), "times real")
    change = flicker(videos["video upsampler"], real) / flicker(videos["image upsampler"], real) - 1
    run.report("flicker, change", 100 * change, "%", at_most=-20)
    run.report("flicker at the seam of portions over elsewhere", seam(videos["video upsampler"], real, config.frames))
    shown = ("bilinear", "image upsampler", "video upsampler" + ", same noise" * config.calm, "autoencoder alone")
    pictures = [*(videos[name] for name in shown), real]
    sheet([clips[0, :3] for clips in pictures], run.folder / "upsampled.png")
    crop = [clips[0, :, :, -160:, :160] for clips in pictures]
    animation(torch.stack(crop), run.folder / "upsampled.gif", 8, columns=5)
    for name in ("image", "metrics"):
        plot_metrics(run.folder / f"{name}.csv", ["loss"], "latent upsampler")
    print(f"pictures: {run.folder}/upsampled.png, upsampled.gif ({', '.join(shown)}, truth)")


# %% Main


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, and what a training step needs."""
    image = lesson09.planned(config)
    if config.backbone:
        check_backbone(config, image)
    with torch.device("meta"):
        unet, table_6 = network(config, image), network(config, image, 768)
    train_part(unet, config.frames)
    b, t, p, c = config.batch, config.frames, config.patch, image.shape[0]
    n, d = 77 if config.backbone else image.conditioner.LENGTH, lesson09.token_width(image)
    small = image.config.height, image.config.width
    dry_run(config, {"unet": unet} | ({"autoencoder": image.autoencoder} if config.backbone else {}), {
        "unet temporal, at Table 6's width of cross-attention": count(table_6, is_temporal),
        "patches": (b, t, 3, SCALE * p, SCALE * p), "input": (b, t, c + 3, p, p), "text": (b, n, d),
        "small frames": (t, 3, *small), "large frames": (t, 3, SCALE * small[0], SCALE * small[1]),
    })  # fmt: skip
    z, known = (torch.zeros(t, channels, p, p, device="meta") for channels in (c, 3))
    one, text = torch.zeros(1, dtype=torch.long, device="meta"), torch.zeros(1, n, d, device="meta")
    training_cost(config, "unet", unet, lambda: denoise(unet, z, one, known, one, text, t), b, config.steps)


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, __doc__)
    if config.dry_run:
        return plan(config)
    run = Run(NAME, config)
    image = open_image(run, config)
    torch.manual_seed(config.seed)
    unet = network(config, image)
    height, width = image.config.height, image.config.width
    if not 0 < config.patch <= min(height, width) or any(n % unet.factor for n in (config.patch, height, width)):
        raise UserError(f"--patch {config.patch}, small frames {height} x {width}: the patch must fit into them, and "
                        f"all be multiples of {unet.factor}, as the U-Net halves them")
    source = open_data(config.data, SCALE * height, SCALE * width, config.final_fps,
                       config.workers, config.reuse, run.device)
    train(run, config, source, image, unet)
    run.end_training()
    evaluate(run, config, source, image, unet.eval())
    known_good(run, PRESETS)


if __name__ == "__main__":
    raise SystemExit(cli(main))
