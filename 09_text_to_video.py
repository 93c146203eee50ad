"""Lesson 9: text to video on Stable Diffusion's plan (Sec. 4.2, App. D and H.2).

Changes from lesson 3: the backbone is a text-to-image model that predicts eps, and the temporal layers read the text
too, in their own cross-attention. Alpha is one number a layer, so more frames can be asked for than were trained, and
larger ones (App. D). Changes from lesson 6: the interpolation model for text-to-video has no c_S path; masked latents
and mask are concatenated to the U-Net's input (4 + 4 + 1 channels), all of its weights are trained, the known frames
are noised a little in training (to a random level up to 250) and not when sampling, and the target rate stands with
that level in the temporal cross-attention, two tokens. It begins as the trained key-frame model. (--calm, ours, is
lesson 6's: what comes of one noise and of its negative, averaged, less the error of the known ends.)

  python 02_image_ldm.py --condition text     first: the toy backbone
  python 09_text_to_video.py                  trains both models (20 minutes of a slow core)
  python 09_text_to_video.py --prompt "a red car ahead on a left curve at night in the town"
  python 09_text_to_video.py --prompt "..." --key-frames 16 --reach 8 --wider 2     App. D: longer and wider
  python 09_text_to_video.py --inspect v1-5.safetensors              what is in a checkpoint, name by name
  python 09_text_to_video.py --backbone v1-5.safetensors --text-encoder FOLDER --data FOLDER --preset paper

Expect at the cpu preset, on the shipped autoencoder: clips that show what the caption says (night and the road in 94 %,
the colour of the car ahead in 91; on clips of other captions 56, 28 and 22), whose colours change 2.1 times as much as
real ones'; middle frames as sharp as real ones, at 26 and 31 dB, where a linear blend of the ends has 27 and 37: at the
final rate they boil (5 times real). It is training that lacks: after seven minutes on a GPU the colour of the car is
right in all, colours change 1.3 times as much as real ones', and the final rate is 1.7 times as restless
(docs/gallery.md has the commands). Four times the frames hang together as the trained number does.

Reads OUT/02_image_ldm-text, or the file given with --backbone; to sample also OUT/04 (decoder) and OUT/11 (upsampler;
else OUT/07, the one of pixels) where they are there. Writes OUT/09_text_to_video/: checkpoint.pt (temporal weights),
interpolation.pt (all weights of the interpolation model), captions.png, captions.gif, app_d.png, middle_frames.png;
with --prompt a folder of its own with long.mp4 (113 frames), long.webp, contact_sheet.png and, of the upsampler,
long-large.mp4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.blocks import sinusoids
from common.diffusion import guided
from common.image_model import ImageModel, conditions
from common.loop import EMA, Learner, load_part, training_loop
from common.temporal import TemporalOptions, train_temporal_only
from extra.latents import with_latents
from extra.metrics import READER_SIZE, SceneReader, captions_obeyed, train_reader
from extra.plan import dry_run, training_cost
from extra.pretrained import SHAPES, StableDiffusion, TextEncoder, check_text_to_image, inspect
from kit.data import HELD_OUT, Clips, Source, open_data
from kit.errors import UserError, cli, note
from kit.files import config_of, write_text
from kit.flags import Amount, Count, Fraction, NoiseLevel, Rate, SamplingSteps, TrainingConfig, Whole, parse
from kit.measures import colour_change, motion
from kit.parallel import whole
from kit.pictures import animation, plot_metrics, sheet
from kit.run import Run, known_good, one_process

lesson02 = import_module("02_image_ldm")
lesson04 = import_module("04_decoder_finetune")
lesson05 = import_module("05_prediction")
lesson06 = import_module("06_interpolation")
lesson07 = import_module("07_upsampler")
lesson08 = import_module("08_sample_long")
NAME = "09_text_to_video"


# %% The backbone: lesson 2's text-to-image model, or Stable Diffusion from a file


def open_backbone(run: Run, config, keep_captions: bool = True, upscaler: bool = False) -> ImageModel:
    """The frozen text-to-image model of this lesson's configuration, or of lesson 10's; lesson 11's upscaler."""
    if not config.backbone:
        return lesson02.load(run, "text")
    text = None
    if config.backbone not in SHAPES:
        if not config.text_encoder:
            raise UserError("--backbone also needs --text-encoder FOLDER, with its CLIP text model and tokenizer")
        text = TextEncoder(config.text_encoder, run.device, config.folder() / "captions" if keep_captions else None)
    image = StableDiffusion(config.backbone, text, *config.size, config.parameterization, run.device,
                            config.ema)
    image.autocast = run.autocast
    if not upscaler:
        check_text_to_image(image)
    return image


def planned(config) -> ImageModel:
    """The backbone without weights, on the meta device: for --dry-run here and in lessons 10 and 11."""
    if not config.backbone:
        return lesson02.planned(config, "text")
    with torch.device("meta"):
        return StableDiffusion(config.backbone, None, *config.size, device="meta")


def train_spatial(run: Run, config: Config, source: Source, image: ImageModel) -> None:
    """The WebVid step: the spatial layers alone on single frames of the videos, Eq. (1); the result is `image`'s."""
    source, unet = with_latents(run, source, image), image.unet()
    learner, diffusion = Learner(run, unet, config, shard=config.shard), image.diffusion
    for step in training_loop(run, config.spatial_steps, learner.parts, {"lineage": image.lineage}, "spatial.pt",
                              "spatial.csv"):
        for share in run.shares(config.spatial_batch, "spatial", step):
            clips = source.clips((config.seed, 9, step), share.rows, 1, config.final_fps)
            z = image.encode(clips.video)  # b c h w
            tau = share.integers(diffusion.steps)
            drop = share.uniform() < image.config.p_drop
            eps = share.normal(z.shape)
            with run.autocast():
                output = learner.network(diffusion.diffuse(z, eps, tau), tau, image.conditioner(clips, drop)).float()
            loss = F.mse_loss(output, diffusion.target(z, eps, tau))  # Eq. (1)
            share.backward(loss)
            run.log(loss=loss)
        learner.step(step)
    image.weights = dict(image.weights) | whole(learner.ema.shadow)


# %% Key frames: text in the temporal layers as well


def key_frame_model(config: Config, image: ImageModel) -> nn.Module:
    """The backbone with temporal layers that read the same tokens as its spatial ones (Table 6), alpha a scalar."""
    unet = image.unet(TemporalOptions(context_dim=token_width(image), ff_mult=config.feed_forward))
    train_temporal_only(unet)
    return unet


def token_width(image: ImageModel) -> int:
    return image.architecture["context_dim"] if isinstance(image, StableDiffusion) else image.config.context_dim


def train_key_frames(run: Run, config: Config, source: Source, image: ImageModel) -> tuple[nn.Module, EMA]:
    torch.manual_seed(config.seed)
    source = with_latents(run, source, image)
    unet = key_frame_model(config, image)
    learner, diffusion = Learner(run, unet, config, shard=config.shard), image.diffusion
    for step in training_loop(run, config.steps, learner.parts, {"lineage": image.lineage}):
        for share in run.shares(config.batch, "diffusion", step):
            clips = source.clips((config.seed, 10, step), share.rows, config.frames, config.final_fps / 16)
            z = image.encode(clips.video)  # (b t) c h w
            tau = share.integers(diffusion.steps)  # one diffusion time a clip
            drop = share.uniform() < image.config.p_drop
            eps = share.normal(z.shape)
            tau_of_frames = tau.repeat_interleave(config.frames)  # (b t)
            z_tau = diffusion.diffuse(z, eps, tau_of_frames)
            with run.autocast():
                text = image.conditioner(clips, drop)  # b n d
                output = learner.network(z_tau, tau, text, frames=config.frames, time_context=text).float()
            loss = F.mse_loss(output, diffusion.target(z, eps, tau_of_frames))  # Eq. (2)
            share.backward(loss)
            run.log(loss=loss)
        learner.step(step)
    return unet, learner.ema


Tokens = tuple[torch.Tensor, torch.Tensor]  # of the text, and of what stands for no text: b n d each


def tokens(conditioner: nn.Module, clips: Clips, negative: str = "") -> Tokens:
    if negative:
        return conditioner(clips), conditioner(conditions(len(clips), caption=negative))
    return conditioner(clips), conditioner(clips, torch.ones(len(clips), dtype=torch.bool))


@torch.no_grad()
def sample_key_frames(unet: nn.Module, image: ImageModel, text: Tokens, time_text: Tokens, frames: int, config: Config,
                      run: Run, *key: object, wider: int = 1, reach: int = 0, label: str = "") -> torch.Tensor:
    """Clips of `frames` key frames, a row of tokens each: latents b t c h w.

    text goes to the spatial layers, time_text to the temporal ones: the same here, two encoders' in lesson 10.
    wider, reach: larger latents than trained, and how far temporal attention looks in longer clips (App. D).

    The noise of every frame has mean zero in every channel, as it nearly has at real sizes. Stable Diffusion's betas
    leave 6.8 % of the signal at the last step, where a model reads the brightness of a frame; the mean of 16 x 32
    random numbers is of that size (0.044, against 0.02 of 40 x 64) and would tell every frame another brightness.
    """
    b, (c, h, w) = len(text[0]), image.shape

    def network(z_tau: torch.Tensor, tau: torch.Tensor, text: torch.Tensor, time_text: torch.Tensor) -> torch.Tensor:
        return unet(z_tau, tau, text, frames=frames, time_context=time_text, reach=reach)

    def predict(z_tau: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return guided(network, z_tau, tau[::frames], *zip(text, time_text, strict=True), config.guidance)

    noise = run.noise((b * frames, c, wider * h, wider * w), "sample", *key)
    noise = noise - noise.mean(dim=(2, 3), keepdim=True)
    z = image.sample(run, predict, noise, config.ddim_steps, config.eta, *key, label=label)
    return rearrange(z, "(b t) c h w -> b t c h w", b=b)


# %% Interpolation: masked latents at the input, all weights trained


class Interpolator(nn.Module):
    """The U-Net with 4 + 4 + 1 input channels, and the two tokens of its temporal cross-attention: rate and level."""

    def __init__(self, config: Config, image: ImageModel) -> None:
        super().__init__()
        self.unet = image.unet(TemporalOptions(context_dim=token_width(image), ff_mult=config.feed_forward))
        self.unet.widen(image.shape[0] + 1)
        d = token_width(image)
        self.told = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)).to(image.device)

    def forward(self, z_tau: torch.Tensor, tau: torch.Tensor, text: torch.Tensor, known: torch.Tensor,
                fps: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """z_tau: (b t) c h w, known: (mask * z, mask) (b t) c+1 h w, fps and level (of the noise on z): b."""
        numbers = torch.stack([fps, level.to(fps)], dim=1).flatten().to(z_tau.device)
        pair = self.told(sinusoids(numbers, self.told[0].in_features))
        pair = rearrange(pair, "(b n) d -> b n d", n=2)
        return self.unet(torch.cat([z_tau, known], dim=1), tau, text, frames=lesson06.FRAMES, time_context=pair)


def augmented(image: ImageModel, z: torch.Tensor, mask: torch.Tensor, level: torch.Tensor,
              eps: torch.Tensor) -> torch.Tensor:
    """(mask * z, mask) with z noised to `level` (b), the conditioning augmentation of App. H.2."""
    return lesson05.masked_context(image.diffusion.diffuse(z, eps, level.repeat_interleave(mask.shape[1])), mask)


def train_interpolation(run: Run, config: Config, source: Source, image: ImageModel,
                        key_frames: dict) -> tuple[nn.Module, EMA]:
    """key_frames: the trained temporal weights, where this begins (as the paper's model on SD 2.1 does)."""
    torch.manual_seed(config.seed + 1)
    source = with_latents(run, source, image)
    model = Interpolator(config, image)
    model.unet.load_state_dict(key_frames, strict=False)
    learner, diffusion = Learner(run, model, config, shard=config.shard), image.diffusion
    for step in training_loop(run, config.interpolation_steps, learner.parts, {"lineage": image.lineage},
                              "interpolation.pt", "interpolation.csv"):
        for share in run.shares(config.interpolation_batch, "interpolation", step):
            clips, stage = lesson06.both_rates(source, (config.seed, 11, step), share.rows, share.batch,
                                               config.final_fps)
            z = image.encode(clips.video)  # (b t) c h w
            level = share.integers(config.max_level + 1)
            known = augmented(image, z, lesson06.interpolation_mask(len(share)), level, share.normal(z.shape))
            tau = share.integers(diffusion.steps)
            drop = share.uniform() < image.config.p_drop
            eps = share.normal(z.shape)
            tau_of_frames = tau.repeat_interleave(lesson06.FRAMES)  # (b t)
            z_tau = diffusion.diffuse(z, eps, tau_of_frames)
            with run.autocast():
                text, fps = image.conditioner(clips, drop), rate(stage, config)
                output = learner.network(z_tau, tau, text, known, fps, level).float()
            loss = F.mse_loss(output, diffusion.target(z, eps, tau_of_frames))  # Eq. (3)
            share.backward(loss)
            run.log(loss=loss)
        learner.step(step)
    return model, learner.ema


def rate(stage: torch.Tensor, config: Config) -> torch.Tensor:
    """The target rate in frames a second: a quarter of the final one in stage 0, the final one in stage 1."""
    return config.final_fps / 4 ** (1 - stage.float())


@torch.no_grad()
def between(model: nn.Module, image: ImageModel, first: torch.Tensor, last: torch.Tensor, stage: int, text: Tokens,
            config: Config, run: Run, *key: object) -> torch.Tensor:
    """Three latents between each pair of ends, b c h w each -> b 5 c h w; the ends are kept. text: one row, or b.

    Sampling begins with the ends' blend diffused to the last step, not with noise alone. With Stable Diffusion's betas
    6.8 % of the signal are left there, which is enough to tell colours: a model learns to read them off the noise, and
    from pure noise would paint between two green fields a brown one.
    """
    b, t = len(first), lesson06.FRAMES
    weight = lesson06.between_ends(first)
    blend = (1 - weight) * first[:, None] + weight * last[:, None]  # b t c h w
    z = torch.zeros_like(blend)
    z[:, 0], z[:, -1] = first, last
    known = lesson05.masked_context(z.flatten(0, 1), lesson06.interpolation_mask(b))
    fps, level = rate(torch.full((b,), stage), config), torch.zeros(b)
    told, untold = (tokens.expand(b, -1, -1) for tokens in text)

    def predict(z_tau: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return guided(model, z_tau, tau[::t], [told, known, fps, level], [untold, known, fps, level],
                      config.interpolation_guidance)

    def sample(noise: torch.Tensor) -> torch.Tensor:
        begin = image.diffusion.diffuse(blend.flatten(0, 1), noise, torch.full((b * t,), image.diffusion.steps - 1))
        return image.sample(run, predict, begin, config.interpolation_ddim_steps, config.eta, *key)

    return lesson06.fill_in(z, run.noise((b * t, *first.shape[1:]), "between", *key), config.calm, sample)


# %% Settings


@dataclass(kw_only=True)
class Config(TrainingConfig):
    free = TrainingConfig.free | {"keep_captions", "shard"}

    prompt: str | None = None  # text to show, "" for none; nothing is trained then
    negative: str = ""  # what to steer away from, in the place of no text at all
    key_frames: Count = 8  # key frames of the video, 16 (n - 1) + 1 frames come of n
    reach: Whole = 0  # temporal attention sees frames at most so far away; 0 all, App. D takes 8
    wider: Count = 1  # latents so many times as high and as wide as trained (App. D)
    upsampled_seconds: Amount = 1.0  # so much of the video is upsampled, where lesson 11 is trained
    inspect: str = ""  # a checkpoint: print its parts and what becomes of every name, and stop
    backbone: str = ""  # Stable Diffusion 1.x or 2.x, file or folder; sd1, sd2: its shape, to count; empty: lesson 2's
    text_encoder: str = ""  # folder of the backbone's CLIP text model and tokenizer
    keep_captions: bool = True  # encode each caption once and keep it in OUT/captions; 0.3 MB each, so not for millions
    ema: bool = False  # take the averaged weights of a CompVis file
    size: tuple[Count, ...] = (320, 512)  # frame height and width with --backbone
    parameterization: Literal["", "eps", "v"] = ""  # what a --backbone predicts; empty: as its scheduler says, else eps
    spatial_steps: Whole = 0  # first tune the spatial layers on single frames of the videos (the WebVid step)
    spatial_batch: Count = 16  # frames per step of that
    shard: bool = False  # under torchrun: spread weights and optimizer over the processes (FSDP2)
    frames: Count = 8  # T, frames of a training clip
    feed_forward: Amount = 1.0  # width of the temporal feed-forward layers over their channels (4 in SD)
    steps: Whole = 900  # training steps of the temporal layers
    batch: Count = 2  # clips per step
    interpolation_steps: Whole = 1200  # training steps of the interpolation model
    interpolation_batch: Count = 2  # clips per step, half of each rate
    max_level: NoiseLevel = 250  # noise on the known frames in training: uniform in 0 to this; none when sampling
    lr: Rate = 1e-3  # learning rate of all
    muon: Amount = 0.0  # learning rate of weight matrices by Muon (common/muon.py); 0: AdamW for all
    warmup: Whole = 50  # steps of linear warm-up
    steady: Whole = 0  # so many steps at the full rate, which then falls with the root of the step; 0: all
    ema_decay: Fraction = 0.995  # decay of the weight average
    ddim_steps: SamplingSteps = 16  # sampling steps of key frames
    guidance: Amount = 3.0  # scale of guidance on the text
    interpolation_ddim_steps: SamplingSteps = 12  # sampling steps of the interpolation
    calm: bool = True  # interpolation: from one noise and its negative, less the ends' error, as in lesson 6
    interpolation_guidance: Amount = 1.0  # its scale of guidance on the text
    eta: Fraction = 0.0  # 0 deterministic, 1 ancestral: with few steps its fresh noise makes brightness flicker
    reader_steps: Whole = 700  # training steps of the network that reads what is in the samples
    samples: Count = 32  # held-out captions in the numbers


PAPER = dict(feed_forward=4.0, lr=1e-4, warmup=1, ema_decay=0.9999, eta=1.0, calm=False)
PRESETS: dict[str, dict] = {
    "smoke": dict(frames=4, key_frames=3, steps=3, batch=1, interpolation_steps=3, interpolation_batch=2,
                  spatial_batch=2, ddim_steps=2, interpolation_ddim_steps=2, reader_steps=2, samples=2),
    "cpu": dict(muon=0.005, steps=500, interpolation_steps=500, interpolation_batch=4, steady=200),
    "gpu": PAPER | dict(steps=40_000, batch=16, interpolation_steps=30_000, interpolation_batch=32, warmup=1000,
                        ddim_steps=50, interpolation_ddim_steps=50, reader_steps=5000, save_every=2000),
    # Table 6, Stable Diffusion 2.1: 3 clips on each of 256 GPUs, and 8 on each of 128 for the interpolation (eps, as
    # the table says). Key frames at fps / 16 = 1.875, as in the stack (the table says 2). Text is dropped at 0.1 (not
    # in the paper), and the steps of the spatial tuning are not given either.
    "paper": PAPER | dict(backbone="sd2", checkpointing=True, steps=402_000, batch=768, interpolation_steps=95_000,
                          interpolation_batch=1024, ddim_steps=250, guidance=8.0, interpolation_ddim_steps=100,
                          interpolation_guidance=13.0, save_every=1000),
}


# %% Loading, for sampling and for lesson 10


def load_key_frames(run: Run, image: ImageModel) -> tuple[nn.Module, Config]:
    """The key-frame model (averaged temporal weights on the backbone), and its configuration."""
    content = run.trained(NAME, image.lineage)
    config = config_of(Config, content)
    if config.spatial_steps:
        image.weights = dict(image.weights) | run.trained(NAME, file="spatial.pt")["ema"]["shadow"]
    unet = key_frame_model(config, image)
    load_part(unet, content["ema"]["shadow"], content["path"])
    return unet.requires_grad_(False).eval(), config


def load_interpolation(run: Run, image: ImageModel) -> nn.Module:
    content = run.trained(NAME, image.lineage, "interpolation.pt")
    model = Interpolator(config_of(Config, content), image)
    load_part(model, content["ema"]["shadow"], content["path"])
    return model.requires_grad_(False).eval()


# %% Figures and numbers


def decoded(run: Run, image: ImageModel, z: torch.Tensor) -> torch.Tensor:
    """Latents b t c h w to frames b t 3 H W."""
    return image.decode(z.flatten(0, 1), z.shape[1])


@torch.no_grad()
def evaluate(run: Run, config: Config, source: Source, image: ImageModel, unet: nn.Module, model: nn.Module) -> None:
    fps = config.final_fps / 16
    real = source.clips((config.seed, HELD_OUT), config.samples, config.frames, fps, "held-out")
    text = tokens(image.conditioner, real)
    video = decoded(run, image, sample_key_frames(unet, image, text, text, config.frames, config, run, label="samples"))
    if source.labelled:
        report_captions(run, config, video, real)
    report_alignment(run, "", video, real.video)
    shown = min(8, config.samples)
    sheet([*video[: min(4, shown)], real.video[0]], run.folder / "captions.png")
    animation(video[:shown], run.folder / "captions.gif", fps)
    write_text(run.folder / "captions.txt", "\n".join(real.captions[:shown]) + "\n")
    beyond_training(run, config, image, unet, real)
    strips = []
    for stage, name in enumerate(("T to 4T", "4T to 16T")):
        clips = source.clips((config.seed, HELD_OUT, stage), 12 if config.samples > 12 else 1, lesson06.FRAMES,
                             float(rate(torch.tensor(stage), config)), "held-out")
        z = rearrange(image.encode(clips.video), "(b t) c h w -> b t c h w", b=len(clips))
        ours = between(model, image, z[:, 0], z[:, -1], stage, tokens(image.conditioner, clips), config, run, stage)
        truth, ours = decoded(run, image, z), decoded(run, image, ours)
        weight = lesson06.between_ends(truth)
        blend = (1 - weight) * truth[:, :1] + weight * truth[:, -1:]
        lesson06.report_pass(run, name, clips.video, truth, ours, blend)
        strips += [truth[0], ours[0], blend[0]]
    sheet(strips, run.folder / "middle_frames.png")
    plot_metrics(run.folder / "metrics.csv", ["loss"], "key frames")
    plot_metrics(run.folder / "interpolation.csv", ["loss"], "interpolation")
    print(f"pictures: {run.folder}/captions.png, captions.gif (their text: captions.txt), app_d.png, middle_frames.png")


def report_captions(run: Run, config: Config, video: torch.Tensor, real: Clips) -> None:
    """What is read off the middle frame of every clip, against its caption and against another's (chance)."""
    with torch.enable_grad():
        torch.manual_seed(0)
        reader = train_reader(run, SceneReader(), config.reader_steps, *READER_SIZE, "reader.pt")
    middle, others = video.shape[1] // 2, real.captions[1:] + real.captions[:1]
    for name, frames, captions in (("real frames", real.video, real.captions), ("samples", video, real.captions),
                                   ("samples, chance", video, others)):
        for what, share in captions_obeyed(run, reader, frames[:, middle], captions).items():
            run.report(f"{what}, read right, {name}", share)


def report_alignment(run: Run, name: str, video: torch.Tensor, real: torch.Tensor) -> None:
    """Do frames of a clip belong together? Colour that changes, and motion that cannot be matched, over real clips'."""
    ratios = {"colour change over real": colour_change(video).mean() / colour_change(real).mean(),
              "motion, mismatch over real": motion(video)[1].mean() / motion(real)[1].mean()}
    for what, ratio in ratios.items():
        run.report(what + name, float(ratio))


def beyond_training(run: Run, config: Config, image: ImageModel, unet: nn.Module, real: Clips) -> None:
    """App. D, and what it costs: clips of 2 and 4 times the frames, attention masked or not, and of twice the size; the
    numbers stand beside those of the trained length and size. Many more clips, and 4 times the size: lesson 12."""
    few, reach, strips = real.pick(range(min(2, config.samples))), config.reach or 8, []
    text = tokens(image.conditioner, few)
    for times, masked in ((2, 0), (2, reach), (4, 0), (4, reach)):
        z = sample_key_frames(unet, image, text, text, times * config.frames, config, run, "D", times, reach=masked,
                              label=f"{times} times as long")
        video = decoded(run, image, z)
        report_alignment(run, f", {times} times as long" + f", reach {masked}" * bool(masked), video, real.video)
        strips.append(video[0, :: 2 * times])
    sheet(strips, run.folder / "app_d.png")
    z = sample_key_frames(unet, image, text, text, config.frames, config, run, "D", "wide", wider=2,
                          label="twice as wide")
    video = decoded(run, image, z)
    small = F.avg_pool2d(video.flatten(0, 1), 2).unflatten(0, video.shape[:2])
    report_alignment(run, ", twice as wide", small, real.video)
    sheet([video[0, ::2]], run.folder / "app_d_wide.png")


# %% From a prompt to a video


def frames_of(run: Run, config: Config, image: ImageModel) -> Iterator[torch.Tensor]:
    """The whole stack but the upsampler: key frames, two interpolation passes, decoder. 3 H W in [-1, 1] each."""
    unet, _ = load_key_frames(run, image)
    model, text = load_interpolation(run, image), tokens(image.conditioner, conditions(1, caption=config.prompt),
                                                         config.negative)
    z = sample_key_frames(unet, image, text, text, config.key_frames, config, run, "prompt", wider=config.wider,
                          reach=config.reach, label="key frames")[0]
    for stage in (0, 1):  # 8 to 29 to 113
        z = lesson06.interpolate(
            lambda first, last, start, stage=stage: between(model, image, first, last, stage, text, config, run,
                                                            "prompt", stage, start), z, windows=8)
    # with lesson 2's autoencoder the shipped decoder will do as well
    decoder = run.config.folder() / lesson04.NAME if config.backbone else run.built_on(lesson04.NAME)
    if (decoder / "checkpoint.pt").exists():
        autoencoder, portion = lesson04.load(run, image)
        yield from lesson04.decode_stream(run, autoencoder, z, portion)
    else:
        print(f"no {lesson04.NAME} in {run.config.folder()}: decoding frame by frame")
        yield from lesson08.decoded_singly(run, image, z)


def show(config: Config) -> None:
    """--prompt: the video, small, and its beginning large."""
    name = "-".join(re.findall(r"[a-z0-9]+", config.prompt.lower()))[:60]
    run = Run(NAME, config, name or ("prompt" if config.prompt else "no-text"))
    lesson08.clear(run.folder)
    image = open_backbone(run, config, config.keep_captions)
    words = "" if config.backbone else " ".join(config.prompt.split()[image.conditioner.LENGTH :])
    if words:
        note(f"left out, beyond the {image.conditioner.LENGTH} words that this model reads: {words}")
    length, fps = 16 * (config.key_frames - 1) + 1, config.final_fps
    frames, beginning = lesson08.tee_first(frames_of(run, config, image), round(config.upsampled_seconds * fps))
    lesson08.write(run, "long", frames, length, fps)
    lesson11, large = import_module("11_latent_upsampler"), None
    if beginning and (config.folder() / lesson11.NAME / "checkpoint.pt").exists():
        large = lesson11.upsample(run, beginning, conditions(1, caption=config.prompt))
    elif beginning and (run.built_on(lesson07.NAME) / "checkpoint.pt").exists():
        print(f"no {lesson11.NAME} in {config.folder()}: enlarging pixels, with {lesson07.NAME}")
        large = lesson08.enlarged(run, image, beginning, 0)
    elif beginning:
        print(f"no {lesson11.NAME} in {config.folder()}, and no {lesson07.NAME}: small frames only")
    if large:
        lesson08.write(run, "long-large", large, len(beginning), fps)
    print(f"pictures: {run.folder}/long.webp, contact_sheet.png")


# %% Main


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, and what a training step needs."""
    image = planned(config)
    with torch.device("meta"):
        unet, model = key_frame_model(config, image), Interpolator(config, image)
    b, t, d = config.batch, config.frames, token_width(image)
    dry_run(config, {"unet": unet, "interpolation": model, "autoencoder": image.autoencoder},
            {"clips": (b, t, *image.shape), "text": (b, 77 if config.backbone else image.conditioner.LENGTH, d),
             "interpolation input": (config.interpolation_batch, lesson06.FRAMES, 2 * image.shape[0] + 1,
                                     *image.shape[1:]), "interpolation tokens": (config.interpolation_batch, 2, d)})
    z = torch.zeros(t, *image.shape, device="meta")
    tau, text = torch.zeros(1, device="meta"), torch.zeros(1, 77, d, device="meta")
    training_cost(config, "unet", unet, lambda: unet(z, tau, text, frames=t, time_context=text), b, config.steps)
    z = torch.zeros(lesson06.FRAMES, *image.shape, device="meta")
    known = torch.zeros(lesson06.FRAMES, image.shape[0] + 1, *image.shape[1:], device="meta")
    training_cost(config, "interpolation", model, lambda: model(z, tau, text, known, tau, tau),
                  config.interpolation_batch, config.interpolation_steps)


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, __doc__)
    if config.inspect:
        return print(inspect(config.inspect))
    if config.dry_run:
        return plan(config)
    if config.key_frames < 2 or config.wider < 1 or config.reach < 0:
        raise UserError("--key-frames at least 2, --wider at least 1, --reach not negative")
    if config.prompt is not None:
        one_process("--prompt")
        return show(config)
    run = Run(NAME, config)
    image = open_backbone(run, config, config.keep_captions)
    source = open_data(config.data, image.config.height, image.config.width, config.final_fps,
                       config.workers, config.reuse, run.device)
    if config.spatial_steps:
        train_spatial(run, config, source, image)
    unet, ema = train_key_frames(run, config, source, image)
    ema.use()
    unet.requires_grad_(False).eval()
    model, ema = train_interpolation(run, config, source, image, whole(ema.shadow))
    ema.use()
    run.end_training()
    if config.shard:  # one process cannot run what was spread over all
        return print("trained; for the numbers and pictures: the same with python, --resume and no --shard")
    evaluate(run, config, source, image, unet, model.eval())
    known_good(run, PRESETS)


if __name__ == "__main__":
    raise SystemExit(cli(main))
