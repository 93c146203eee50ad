"""Lesson 4: a decoder that knows about time (Sec. 3.1.1, Tables 3, 8 and 14).

An image decoder, frame by frame, turns smooth latents into flickering video. Here temporal layers (3D convolutions of
kernel 3,3,3, merged by alpha as in lesson 3) enter the decoder, and the whole decoder is fine-tuned on clips of 6
frames at the final rate: reconstruction, a perceptual term, and a patch-wise video discriminator made of 3D
convolutions. The encoder stays frozen, so every latent the diffusion models know keeps its meaning.

Two things are ours. The latents that the decoder will be given are generated, and jitter: in training they get a little
noise, which a decoder that sees several frames can average away. And frame-to-frame differences are weighed as such.

  python 04_decoder_finetune.py                         7 minutes on 2 slow cores
  python 04_decoder_finetune.py --freeze-spatial        train the temporal layers alone
  python 04_decoder_finetune.py --image-discriminator   the extra critic of Table 14
  python 04_decoder_finetune.py --lpips lpips.pt        a TorchScript LPIPS instead of the features trained here
  python 04_decoder_finetune.py --backbone v1-5.safetensors --data FOLDER --preset paper --steps 35000 --batch 40
                                                        Stable Diffusion's decoder, as for WebVid (Tables 8 and 11)

Expect of the shipped weights, trained longer than this preset: from latents that jitter as generated ones do, a quarter
of the image decoder's restlessness (change from frame to frame over that of real clips); from true latents, which
hardly jump in these smooth scenes, 19 % less, at 0.4 dB less PSNR.

Reads OUT/02_image_ldm, or the file given with --backbone. Writes OUT/04_decoder_finetune/: checkpoint.pt (the video
decoder), features.pt, decoders.png, time_slices.png, decoders.gif, metrics.png.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.autoencoder import Autoencoder, ResnetBlock
from common.blocks import channels_last, group_norm, zero
from common.image_model import ImageModel
from common.loop import Learner, load_part, training_loop
from common.portions import faded, in_portions
from common.temporal import is_temporal
from extra.conv3d import Conv3d
from extra.metrics import FrameReader, train_reader
from extra.plan import dry_run, training_cost
from kit.data import HELD_OUT, Source, open_data
from kit.errors import UserError, cli
from kit.flags import Amount, Count, Fraction, Range, Rate, TrainingConfig, Whole, parse
from kit.measures import flicker, psnr, restlessness, seam
from kit.pictures import animation, plot_metrics, sheet
from kit.run import Run, known_good

lesson02 = import_module("02_image_ldm")
NAME = "04_decoder_finetune"
PORTION = 4  # times the frames of a training clip are decoded at once


# %% The video decoder


class FrameResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3D conv, twice, plus identity; the last conv starts at zero. b c t h w"""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()

        def conv() -> nn.Conv3d:
            return Conv3d(channels, channels, (kernel, 3, 3), padding=(kernel // 2, 1, 1))

        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), conv())
        self.out_layers = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Identity(), zero(conv()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out_layers(self.in_layers(x))


class VideoResnetBlock(ResnetBlock):
    """The decoder's residual block, a temporal one behind it, merged by alpha, which multiplies the spatial branch.

    (Stable Video Diffusion's decoder has the same layers with alpha on the other branch; this follows the paper.)
    `frames` is set by `set_frames` before a pass; None decodes images and skips the temporal layers.
    """

    frames: int | None = None
    kernel: int = 3

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels)
        self.time_stack = FrameResnetBlock(out_channels, self.kernel)
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = super().forward(x)  # (b t) c h w
        if self.frames is None:
            return z
        z_prime = rearrange(
            self.time_stack(rearrange(z, "(b t) c h w -> b c t h w", t=self.frames)), "b c t h w -> (b t) c h w"
        )
        return z + (1 - self.mix_factor.sigmoid().to(z.dtype)) * (z_prime - z)


def set_frames(autoencoder: Autoencoder, frames: int | None) -> None:
    """Tells every block how many frames a clip has. The plain decoder's forward then serves for video as it is."""
    for module in autoencoder.decoder.modules():
        if isinstance(module, VideoResnetBlock):
            module.frames = frames


def video_autoencoder(image: ImageModel, kernel: int = 3) -> Autoencoder:
    """The image model's autoencoder with temporal layers in its decoder: equal to it at the start."""
    block = type("VideoResnetBlock", (VideoResnetBlock,), {"kernel": kernel})
    autoencoder = image.new_autoencoder(block)
    missing, _ = autoencoder.load_state_dict(image.autoencoder.state_dict(), strict=False)
    assert all(is_temporal(name) for name in missing), missing
    autoencoder.scale.copy_(image.autoencoder.scale)
    return channels_last(autoencoder).to(image.device)


def train_decoder(autoencoder: Autoencoder, freeze_spatial: bool) -> None:
    """Freezes the encoder (and the codebook), trains the decoder, or of it the temporal layers alone."""
    for name, parameter in autoencoder.named_parameters():
        ours = name.startswith(("decoder.", "post_quant_conv."))
        parameter.requires_grad_(ours and (is_temporal(name) or not freeze_spatial))


@torch.no_grad()
def decode_stream(run: Run, autoencoder: Autoencoder, z: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Latents of one video, c h w each, to frames 3 H W in [-1, 1] on the CPU, in portions of `size` frames of which a
    third overlaps. Trained on 6 frames, the convolutions over time serve for any number; longer portions are calmer."""

    def decoded() -> Iterator[tuple[torch.Tensor, int]]:
        for part, new in in_portions(z, size, size // 3, rest=size // 4):
            set_frames(autoencoder, len(part))
            with run.autocast():
                frames = autoencoder.decode(part.to(run.device))
            yield frames.cpu().clamp(-1, 1), new

    return faded(decoded(), size // 3)


# %% Losses: perceptual features and discriminators


def read_features(run: Run, config: Config, image: ImageModel) -> FrameReader:
    """The perceptual space: what a network looks at that has learned to read procedural scenes."""
    torch.manual_seed(config.seed + 40)
    size = image.config.height, image.config.width
    return train_reader(run, FrameReader(), config.feature_steps, *size, "features.pt")


def perceptual_distance(features: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distance of channel-normalised features, averaged over positions and summed over scales (as LPIPS)."""
    if isinstance(features, torch.jit.ScriptModule):
        return features(a, b).mean()
    pairs = zip(features(a), features(b), strict=True)
    return sum((F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(1).mean() for x, y in pairs)


class VideoDiscriminator(nn.Module):
    """A patch-wise critic of clips made of 3D convolutions: b 3 t h w -> b 1 t h/8 w/8. Time is never strided: a clip
    has only 6 frames."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = [3, channels, 2 * channels, 4 * channels]
        layers: list[nn.Module] = []
        for c, out in zip(widths, widths[1:], strict=False):
            layers += [Conv3d(c, out, (3, 4, 4), (1, 2, 2), 1), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, Conv3d(widths[-1], 1, 3, padding=1))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.layers(rearrange(video, "b t c h w -> b c t h w"))


class FrameDiscriminator(lesson02.PatchDiscriminator):
    """The image critic of lesson 2 on every frame of a clip (Table 14)."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return super().forward(rearrange(video, "b t c h w -> (b t) c h w"))


# %% Training


def train(run: Run, config: Config, source: Source, image: ImageModel, features: nn.Module) -> Autoencoder:
    torch.manual_seed(config.seed)
    autoencoder = video_autoencoder(image, config.kernel)
    train_decoder(autoencoder, config.freeze_spatial)
    critics = nn.ModuleList([VideoDiscriminator()] + ([FrameDiscriminator(32)] if config.image_discriminator else []))
    critics = channels_last(critics).to(run.device)
    adam = partial(lesson02.adam, betas=(0.5, 0.9))
    learner = Learner(run, autoencoder, config, optimizer=adam, method="decode")
    critic_optimizer, judges = adam(critics, config.lr), [run.parallel(critic) for critic in critics]
    parts = learner.parts | {"critics": critics, "critic_optimizer": critic_optimizer}
    # the adaptive weight is taken at the decoder's last layer, or the last one that is trained (up[0] runs after up[1])
    last = autoencoder.decoder.up[0].block[-1].time_stack.out_layers[-1] if config.freeze_spatial else (
        autoencoder.decoder.conv_out)
    for step in training_loop(run, config.steps, parts, {"lineage": image.lineage}):
        for share in run.shares(config.batch, step):
            clips = source.clips((config.seed, 5, step), share.rows, config.frames, config.final_fps)
            video = clips.video.to(run.device)
            frames = rearrange(video, "b t c h w -> (b t) c h w")
            set_frames(autoencoder, config.frames)
            critic_loss, weight = torch.zeros(()), torch.zeros(())
            with run.autocast():
                z = image.encode(video)  # the frozen encoder
                if config.latent_noise:
                    deviation = config.latent_noise * share.uniform().to(z).repeat_interleave(config.frames)
                    z = z + deviation[:, None, None, None] * share.normal(z.shape)
                decoded = learner.network(z)  # (b t) c h w
                l1 = (decoded - frames).abs().mean()
                perceptual = perceptual_distance(features, decoded, frames)
                clip = rearrange(decoded, "(b t) c h w -> b t c h w", t=config.frames)
                steps_in_time = (clip.diff(dim=1) - video.diff(dim=1)).abs().mean()
                loss = reconstruction = (l1 + config.perceptual_weight * perceptual
                                         + config.difference_weight * steps_in_time)
                if step >= config.gan_start:
                    critics.requires_grad_(False)  # they pass gradients on and get none of their own
                    gan = -sum(critic(clip).float().mean() for critic in critics)
                    weight = config.gan_weight * lesson02.adaptive_weight(reconstruction, gan, last.weight)
                    loss = reconstruction + weight * gan
            share.backward(loss)
            if step >= config.gan_start:
                critics.requires_grad_(True)
                with run.autocast():
                    critic_loss = sum(lesson02.hinge_loss(judge(video).float(), judge(clip.detach()).float())
                                      for judge in judges)
                share.backward(critic_loss)
            run.log(l1=l1, perceptual=perceptual, difference=steps_in_time, gan_weight=weight, critic=critic_loss)
        learner.step(step)
        if step >= config.gan_start:
            critic_optimizer.step()
            critic_optimizer.zero_grad(set_to_none=True)
    learner.ema.use()
    return autoencoder.eval()


# %% Settings, and what later lessons load


@dataclass(kw_only=True)
class Config(TrainingConfig):
    backbone: str = ""  # tune Stable Diffusion's decoder, of a file or folder, instead of lesson 2's
    size: tuple[Count, ...] = (320, 512)  # frame height and width with --backbone
    frames: Count = 6  # frames of a training clip
    kernel: Annotated[int, Range(1, 9, "odd")] = 3  # temporal kernel, of kernel x 3 x 3 convolutions
    steps: Whole = 450  # training steps
    batch: Count = 2  # clips per step
    lr: Rate = 6e-4  # learning rate of decoder and discriminators
    muon: Amount = 0.0  # learning rate of weight matrices by Muon (common/muon.py); 0: Adam for all
    warmup: Whole = 20  # steps of linear warm-up
    steady: Whole = 0  # so many steps at the full rate, which then falls with the root of the step; 0: all
    latent_noise: Amount = 0.0  # latents get noise of a deviation from 0 to this: what lessons 5 and 6 get wrong
    difference_weight: Amount = 0.0  # weight of the error of frame-to-frame differences
    ema_decay: Fraction = 0.99  # decay of the weight average; 0 is none
    freeze_spatial: bool = False  # train the new temporal layers only
    perceptual_weight: Amount = 0.1  # weight of the perceptual term
    lpips: str = ""  # TorchScript file (x, y in [-1, 1] -> distance) to use as perceptual term
    feature_steps: Whole = 250  # training steps of the feature network when there is no LPIPS file
    gan_start: Whole = 320  # step at which the discriminators join
    gan_weight: Amount = 0.1  # times the adaptive weight
    image_discriminator: bool = False  # an additional frame-wise discriminator (Table 14)
    samples: Count = 8  # held-out clips in the numbers


PAPER = dict(batch=32, lr=4e-5, warmup=1, gan_start=1000, gan_weight=0.6, perceptual_weight=1.0, feature_steps=20_000,
             ema_decay=0.0)
CALM = dict(latent_noise=0.15, difference_weight=2.0)  # not in the paper: see the first lines
PRESETS: dict[str, dict] = {
    "smoke": CALM | dict(frames=3, steps=3, batch=1, feature_steps=2, gan_start=1, samples=1),
    "cpu": CALM | dict(muon=0.001, steady=200),
    "gpu": PAPER | CALM | dict(steps=20_000, batch=8, lr=1e-4, gan_start=5000, save_every=2000),
    # Table 8: 4 clips on each of 8 GPUs. Start and weight of the discriminator are not given: LDM's habits.
    "paper": PAPER | dict(steps=41_000),
    "biking": PAPER | dict(steps=78_000, batch=40, lr=5e-5, gan_weight=0.5),
}


def load(run: Run, image: ImageModel) -> tuple[Autoencoder, int]:
    """The autoencoder with this lesson's decoder from OUT, and how many frames it is given at a time."""
    content = run.trained(NAME, image.lineage)
    autoencoder = video_autoencoder(image, content["config"]["kernel"])
    train_decoder(autoencoder, content["config"]["freeze_spatial"])
    load_part(autoencoder, content["ema"]["shadow"], content["path"])
    return autoencoder.requires_grad_(False).eval(), PORTION * content["config"]["frames"]


# %% Figures and numbers


JITTER = 0.08  # deviation of the noise that stands for what lesson 6 gets wrong in its frames, latents having 1


@torch.no_grad()
def evaluate(run: Run, config: Config, source: Source, image: ImageModel, autoencoder: Autoencoder) -> None:
    size = PORTION * config.frames
    length = size + size // 2  # two portions
    real = source.clips((config.seed, HELD_OUT), config.samples, length, config.final_fps, "held-out").video
    z = image.encode(real)
    decoded = {}
    for kind, latents in (("true latents", z), ("jittering latents", z + JITTER * run.noise(z.shape, "jitter"))):
        by_image = image.decode(latents, length)
        clips = rearrange(latents, "(b t) c h w -> b t c h w", t=length)
        by_video = torch.stack([torch.stack(list(decode_stream(run, autoencoder, clip, size))) for clip in clips])
        restless = [restlessness(video, real) for video in (by_image, by_video)]
        run.report(f"restlessness, {kind}, image decoder", restless[0], "times real")
        run.report(f"restlessness, {kind}, video decoder", restless[1], "times real")
        run.report(f"restlessness, {kind}, change", 100 * (restless[1] / restless[0] - 1), "%", at_most=-20)
        decoded[kind] = by_image, by_video
    by_image, by_video = decoded["true latents"]
    run.report("flicker, image decoder", flicker(by_image, real))
    run.report("flicker, video decoder", flicker(by_video, real))
    run.report("PSNR, image decoder", psnr(by_image, real), "dB")
    run.report("PSNR, video decoder", psnr(by_video, real), "dB")
    run.report("PSNR, change", psnr(by_video, real) - psnr(by_image, real), "dB", at_least=-0.3)
    run.report("flicker at the seam of portions over elsewhere", seam(by_video, real, size - size // 3))
    alphas = [float(p.sigmoid()) for n, p in autoencoder.named_parameters() if n.endswith("mix_factor")]
    run.report("alpha, smallest", min(alphas))
    run.report("alpha, largest", max(alphas))
    by_image, by_video = decoded["jittering latents"]
    sheet([v[0, : config.frames] for v in (real, by_image, by_video)], run.folder / "decoders.png")
    row = real.shape[-2] * 2 // 3  # one line of pixels over time: flicker shows as streaks across it
    slices = [rearrange(v[:4, :, :, row], "b t c w -> b c t w") for v in (real, by_image, by_video)]
    sheet([piece.repeat_interleave(6, dim=2) for piece in slices], run.folder / "time_slices.png")
    animation(torch.stack([real[0], by_image[0], by_video[0]]), run.folder / "decoders.gif", config.final_fps / 4, 3)
    plot_metrics(run.folder / "metrics.csv", ["l1", "perceptual", "gan_weight"], "video decoder")
    print(f"pictures: {run.folder}/decoders.png, time_slices.png, decoders.gif (real, image decoder, video decoder, "
          "from latents that jitter)")


# %% Main


def load_lpips(path: str, device: torch.device) -> nn.Module:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--lpips {path}: not a readable TorchScript file ({str(error).splitlines()[0]})") from None


def backbone(config: Config, device: torch.device | str) -> ImageModel:
    """Stable Diffusion in the place of lesson 2's image model; whoever does without never loads it."""
    from extra.pretrained import StableDiffusion

    return StableDiffusion(config.backbone, None, *config.size, device=device)


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, FLOPs and memory."""
    with torch.device("meta"):
        image = backbone(config, "meta") if config.backbone else lesson02.planned(config)
        autoencoder = video_autoencoder(image, config.kernel)
        critic = VideoDiscriminator()
    train_decoder(autoencoder, config.freeze_spatial)
    video = (config.batch, config.frames, 3, image.config.height, image.config.width)
    dry_run(config, {"autoencoder": autoencoder, "video discriminator": critic},
            {"clips": video, "latents": (config.batch, config.frames, *image.shape)})
    set_frames(autoencoder, config.frames)
    z = torch.zeros(config.frames, *image.shape, device="meta")
    forward = lambda: autoencoder.decode(z)  # noqa: E731
    training_cost(config, "decoder", autoencoder, forward, config.batch, config.steps)


def main(argv: list[str] | None = None) -> tuple | None:
    config = parse(Config, PRESETS, argv, __doc__)
    if config.dry_run:
        return plan(config)
    run = Run(NAME, config, "image-discriminator" if config.image_discriminator else "")
    image = backbone(config, run.device) if config.backbone else lesson02.load(run)
    source = open_data(config.data, image.config.height, image.config.width, config.final_fps,
                       config.workers, config.reuse, run.device)
    features = load_lpips(config.lpips, run.device) if config.lpips else read_features(run, config, image)
    autoencoder = train(run, config, source, image, features)
    run.end_training()
    evaluate(run, config, source, image, autoencoder)
    known_good(run, PRESETS)
    return run, config, source, image, autoencoder


if __name__ == "__main__":
    raise SystemExit(cli(main))
