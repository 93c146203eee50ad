"""Lesson 2: the image latent diffusion model (Sec. 2, Table 8). Everything later stands on it, frozen.

Two trainings in one script. First an autoencoder: frames to latents with f = 4 or 8 and back, L1 plus a little KL (or a
codebook), a patch discriminator joining late. Then a U-Net that denoises latents of single frames, conditioned through
cross-attention on labels (night, number of cars), on boxes, or on text; the condition is dropped at p_drop, so that one
model samples with, without and with guided conditions. (Here and in the lessons that build on it, the cpu preset moves
weight matrices by Muon, which is not the paper's: it learns as much in a third of the steps. See common/muon.py.)

  python 02_image_ldm.py                        18 minutes on 2 slow cores
  python 02_image_ldm.py --condition boxes      the variant that draws a scene from boxes; shares the autoencoder
  python 02_image_ldm.py --condition boxes --sample-boxes boxes.json
  python 02_image_ldm.py --condition text       the variant that reads captions, with the target (eps) and the betas of
                                                Stable Diffusion, for lesson 9; shares the autoencoder
  python 02_image_ldm.py --pixel                no autoencoder: the pixel-space backbone of Table 1

Expect of the shipped weights, trained longer than this preset: held-out reconstruction of 34 dB, 26 dB on car pixels
alone; samples with road, dashes and cars.

Reads nothing. Writes OUT/02_image_ldm/: autoencoder.pt, checkpoint.pt, reconstructions.png, samples.png, metrics.png.
The boxes file is a JSON list of cars, each [x0, y0, x1, y1] in fractions of the frame, left, top, right, bottom:
[[0.45, 0.5, 0.6, 0.7]].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common.autoencoder import Autoencoder
from common.blocks import channels_last
from common.diffusion import guided
from common.image_model import Conditioner, ImageModel, build_autoencoder, conditions, planned_input
from common.loop import EMA, Learner, load_part, trainable, training_loop
from extra.latents import with_latents
from extra.plan import dry_run, training_cost
from kit.data import HELD_OUT, Clips, Source, open_data
from kit.errors import UserError, cli
from kit.files import check_lineage, config_of
from kit.flags import (
    Amount,
    BaseConfig,
    Beta,
    Count,
    Factor,
    Fraction,
    Rate,
    SamplingSteps,
    TrainingConfig,
    Whole,
    parse,
    preset_config,
)
from kit.measures import box_mask, psnr
from kit.media import read_text
from kit.parallel import average
from kit.pictures import plot_metrics, sheet
from kit.run import Run, known_good, one_process
from kit.scenes import MAX_CARS

NAME = "02_image_ldm"


# %% Training the autoencoder: L1, KL, and a patch discriminator that joins late


class PatchDiscriminator(nn.Module):
    """A convolutional critic: one score per patch, b 3 h w -> b 1 h/8 w/8 (PatchGAN, kernel 4)."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        widths = [3, channels, 2 * channels, 4 * channels]
        layers: list[nn.Module] = []
        for c, out in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(c, out, 4, stride=2, padding=1), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss: scores of real patches above 1, of reconstructed ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: torch.Tensor, gan: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """|grad reconstruction| / |grad GAN| at the decoder's last layer: keeps the two terms in balance.

    The gradients are those of all processes together, but of one portion only with --accumulate.
    """
    grads = average([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, gan)])
    return (grads[0].norm() / (grads[1].norm() + 1e-4)).clamp(max=1e4).detach()


def adam(module: nn.Module, lr: float, but: Sequence[nn.Parameter] = (),
         betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.Adam:
    """What LDM's code trains autoencoders and critics with, there with betas of 0.5 and 0.9 (lesson 4 has these)."""
    return torch.optim.Adam(trainable(module, but), lr, betas, fused=True)


def train_autoencoder(run: Run, config: Config, source: Source) -> None:
    """Trains E and D on single frames, then measures the latent scale and keeps it in the checkpoint."""
    torch.manual_seed(config.seed)  # initial weights
    autoencoder = channels_last(build_autoencoder(config)).to(run.device)
    critic = channels_last(PatchDiscriminator(config.ae_channels)).to(run.device)
    learner = Learner(run, autoencoder, config, config.ae_lr, config.ae_steady, config.ae_muon, optimizer=adam)
    judge, critic_optimizer, extra = run.parallel(critic), adam(critic, config.ae_lr), {}
    parts = learner.parts | {"critic": critic, "critic_optimizer": critic_optimizer}
    for step in training_loop(run, config.ae_steps, parts, extra, "autoencoder.pt", "autoencoder.csv"):
        for share in run.shares(config.ae_batch, "autoencoder", step):
            x = source.clips((config.seed, 0, step), share.rows, 1, config.final_fps).video[:, 0]
            x = x.to(run.device).contiguous(memory_format=torch.channels_last)  # b 3 H W
            height, width = (n // autoencoder.factor for n in x.shape[2:])
            noise = share.normal((len(x), config.latent_channels, height, width))
            critic_loss, weight = torch.zeros(()), torch.zeros(())
            with run.autocast():
                reconstruction, regularization = learner.network(x, noise)
                l1 = (reconstruction - x).abs().mean()
                error = l1 + config.square_weight * F.mse_loss(reconstruction, x)
                # LDM sums the reconstruction error over the image, which is why its KL weight looks so small: per pixel
                # here, so the KL is divided by their number
                weighting = config.kl_weight / x[0].numel() if config.regularizer == "kl" else 1.0
                loss = error + weighting * regularization
                if step >= config.gan_start:
                    critic.requires_grad_(False)  # it passes gradients on and gets none of its own
                    gan = -critic(reconstruction).float().mean()
                    weight = config.gan_weight * adaptive_weight(error, gan, autoencoder.decoder.conv_out.weight)
                    loss = loss + weight * gan
            share.backward(loss)
            if step >= config.gan_start:
                critic.requires_grad_(True)
                with run.autocast():
                    critic_loss = hinge_loss(judge(x).float(), judge(reconstruction.detach()).float())
                share.backward(critic_loss)
            run.log(l1=l1, regularization=regularization, gan_weight=weight, critic=critic_loss)
        learner.step(step)
        if step >= config.gan_start:
            critic_optimizer.step()
            critic_optimizer.zero_grad(set_to_none=True)
        if step + 1 == config.ae_steps:
            with learner.ema.applied():
                extra["latent_scale"] = measure_scale(run, config, autoencoder, source)


@torch.no_grad()
def measure_scale(run: Run, config: Config, autoencoder: Autoencoder, source: Source) -> float:
    """1 / standard deviation of the latents of some training frames."""
    x = source.clips((config.seed, 1), 8 * config.ae_batch, 1, config.final_fps).video[:, 0].to(run.device)
    with run.autocast():
        return float(1 / autoencoder.moments(x)[0].std())


# %% Training the U-Net: Eq. (1)


class Conditioned(nn.Module):
    """A U-Net and what turns conditions into its context, trained together."""

    def __init__(self, unet: nn.Module, conditioner: nn.Module) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def forward(self, x: torch.Tensor, tau: torch.Tensor, clips: Clips,
                drop: torch.Tensor | None = None) -> torch.Tensor:
        return self.unet(x, tau, self.conditioner(clips, drop))


def train_unet(run: Run, config: Config, source: Source, image: ImageModel) -> tuple[nn.Module, EMA]:
    torch.manual_seed(config.seed + 1)  # initial weights
    source = with_latents(run, source, image)
    conditioner = Conditioner(config.condition, config.context_dim, config.fusion_layers).to(run.device)
    model = Conditioned(image.unet(), conditioner)
    learner = Learner(run, model, config)
    diffusion = image.diffusion
    for step in training_loop(run, config.steps, learner.parts, {"lineage": image.lineage}):
        for share in run.shares(config.batch, "diffusion", step):
            clips = source.clips((config.seed, 2, step), share.rows, 1, config.final_fps)
            x = image.encode(clips.video)  # b c h w
            tau = share.integers(diffusion.steps)
            drop = share.uniform() < config.p_drop
            eps = share.normal(x.shape)
            x_tau = diffusion.diffuse(x, eps, tau)
            with run.autocast():
                output = learner.network(x_tau, tau, clips, drop).float()
            error = (output - diffusion.target(x, eps, tau)).square().mean(dim=(1, 2, 3))  # Eq. (1), b
            if config.min_snr:
                error = diffusion.min_snr_weight(tau, config.min_snr) * error
            loss = error.mean()
            share.backward(loss)
            run.log(loss=loss)
        learner.step(step)
    return model, learner.ema


def train(run: Run, config: Config, source: Source, variant: str) -> tuple[ImageModel, nn.Module, EMA]:
    """Both trainings. A variant shares the autoencoder of 02_image_ldm; pixels need none."""
    image = ImageModel(config, run.device)
    image.autocast = run.autocast
    if not config.pixel:
        if not variant and config.ae_steps:
            train_autoencoder(run, config, source)
        load_autoencoder(run, image.autoencoder)
    return image, *train_unet(run, config, source, image)


# %% Sampling


def sample_images(unet: nn.Module, image: ImageModel, clips: Clips, guidance: float, run: Run, steps: int, eta: float,
                  *key: object, label: str = "") -> torch.Tensor:
    """Latents of one frame for each row of `clips` (whose labels, boxes or captions condition it): b c h w."""
    count = len(clips)
    context = image.conditioner(clips)
    nothing = image.conditioner(clips, torch.ones(count, dtype=torch.bool))

    def predict(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return guided(unet, x, tau, [context], [nothing], 1 if context is None else guidance)

    return image.sample(run, predict, run.noise((count, *image.shape), "sample", *key), steps, eta, *key, label=label)


def read_boxes(path: str) -> list:
    """The boxes of a --sample-boxes file. Anything but up to MAX_CARS quadruples in [0, 1] is a UserError."""
    try:
        boxes = json.loads(read_text(Path(path)))
    except (OSError, ValueError) as error:
        raise UserError(f"--sample-boxes {path}: not a readable JSON file ({error})") from None
    good = (
        isinstance(boxes, list)
        and len(boxes) <= MAX_CARS
        and all(
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(v, int | float) for v in box)
            and 0 <= box[0] < box[2] <= 1
            and 0 <= box[1] < box[3] <= 1
            for box in boxes
        )
    )
    if not good:
        raise UserError(f"--sample-boxes {path}: want a list of at most {MAX_CARS} boxes [x0, y0, x1, y1] in [0, 1]")
    return boxes


# %% Settings, and what later lessons load


@dataclass(kw_only=True)
class Config(TrainingConfig):
    free = TrainingConfig.free | {"sample_boxes"}

    condition: Literal["none", "labels", "boxes", "text"] = "labels"  # what enters by cross-attention
    pixel: bool = False  # diffusion on pixels, no autoencoder (Table 1, Pixel-baseline)
    sample_boxes: str = ""  # JSON file of boxes: draw that scene with a trained --condition boxes model, and stop
    height: Count = 64  # frame height in pixels
    width: Count = 128  # frame width in pixels
    # the autoencoder (Table 8)
    ae_channels: Count = 32  # base width
    ae_multipliers: tuple[Count, ...] = (1, 2, 2)  # factor of the width per level; f = 2^(levels - 1)
    ae_depth: Count = 1  # residual blocks per level
    ae_attention: bool = False  # attention in the blocks of the lowest level
    latent_channels: Count = 4  # channels of z
    regularizer: Literal["kl", "vq"] = "kl"  # KL to a standard normal, or vector quantisation
    codes: Count = 16384  # codebook size for vq
    ae_steps: Whole = 3000  # training steps of the autoencoder; 0: keep the one that is in OUT
    ae_batch: Count = 4  # frames per step; in minutes, many steps on few frames give most
    ae_lr: Rate = 3e-3  # learning rate of autoencoder and discriminator
    ae_muon: Amount = 0.0  # learning rate of the autoencoder's weight matrices by Muon; 0: Adam for all
    ae_steady: Whole = 0  # so many steps at the full rate, which then falls with the root of the step; 0: all
    square_weight: Amount = 2.0  # weight of the squared error beside the absolute one; finds colours sooner
    kl_weight: Amount = 1e-6  # weight of the KL term beside the error summed over an image, as in LDM's code
    gan_start: Whole = 2600  # step at which the discriminator joins; tiny models blow up when it comes early
    gan_weight: Amount = 0.1  # times the adaptive weight |grad reconstruction| / |grad GAN| (0.5 to 0.6 in LDM's code)
    # the U-Net (Table 6)
    channels: Count = 64  # base width
    multipliers: tuple[Count, ...] = (1, 2, 2)  # factor of the width per level
    depth: Count = 1  # residual blocks per level
    attention: tuple[Factor, ...] = (2, 4)  # downsampling factors with transformers
    heads: Whole = 0  # attention heads; 0: from head_channels
    head_channels: Whole = 32  # channels per head
    context_dim: Whole = 64  # width of the condition tokens
    fusion_layers: Whole = 2  # depth of the small transformer over boxes or words
    # diffusion
    schedule: Literal["sqrt_linear", "linear"] = "sqrt_linear"  # linear in sqrt(beta) (latents) or in beta (pixels)
    beta_start: Beta = 0.0015  # first beta
    beta_end: Beta = 0.0195  # last beta
    parameterization: Literal["v", "eps"] = "v"  # what the network predicts
    min_snr: Amount = 0.0  # cap of loss weights that follow the signal-to-noise ratio (5 in Hang et al. 2023); 0: none
    steps: Whole = 2300  # training steps of the U-Net
    batch: Count = 16  # frames per step
    lr: Rate = 1e-3  # learning rate of the U-Net
    muon: Amount = 0.0  # learning rate of weight matrices by Muon (common/muon.py); 0: AdamW for all
    warmup: Whole = 50  # steps of linear warm-up
    steady: Whole = 0  # so many steps at the full rate, which then falls with the root of the step; 0: all
    ema_decay: Fraction = 0.998  # decay of the weight average
    p_drop: Fraction = 0.3  # probability of dropping the condition; most samples of this course are unconditional
    ddim_steps: SamplingSteps = 25  # sampling steps
    eta: Fraction = 1.0  # 0 deterministic, 1 ancestral
    guidance: Amount = 2.0  # scale of classifier-free guidance on the condition
    samples: Count = 16  # pictures in samples.png and frames in the held-out numbers


PAPER = dict(height=128, width=256, ae_channels=128, ae_multipliers=(1, 2, 2, 4), ae_depth=2, ae_lr=4.5e-6 * 64,
             square_weight=0.0, ae_batch=64, ae_steps=200_000, gan_start=50_000, gan_weight=0.6, warmup=1,
             ema_decay=0.9999, lr=1e-4, p_drop=0.1)
PRESETS: dict[str, dict] = {
    "smoke": dict(height=16, width=32, ae_channels=16, ae_multipliers=(1, 1, 1), ae_steps=6, ae_batch=2, gan_start=4,
                  channels=16, multipliers=(1, 2), attention=(2,), head_channels=16, context_dim=16, fusion_layers=1,
                  steps=4, batch=2, ddim_steps=3, samples=2),
    "cpu": dict(ae_batch=8, ae_lr=2e-3, ae_muon=0.005, ae_steady=400, ae_steps=1200, gan_start=1050, muon=0.005,
                steps=1500, steady=600),
    "gpu": dict(height=128, width=256, ae_channels=64, ae_multipliers=(1, 2, 2, 4), ae_depth=2, ae_steps=30_000,
                ae_batch=32, ae_lr=2e-4, gan_start=20_000, channels=128, multipliers=(1, 2, 2, 4), depth=2,
                attention=(1, 2, 4), context_dim=256, steps=60_000, batch=128, lr=2e-4, ema_decay=0.9999, warmup=1000,
                p_drop=0.1, ddim_steps=100, save_every=2000),
    # Tables 6 and 8, driving. Autoencoder: LDM's VQ-f8; its training length is not in the paper (a guess stands above).
    # Attention resolutions 16, 8, 4 are widths of feature maps of 32-wide latents: factors 2, 4, 8.
    "paper": PAPER
    | dict(regularizer="vq", ae_attention=True, channels=224, multipliers=(1, 2, 2, 3, 4), depth=4,
           attention=(2, 4, 8), context_dim=256, steps=73_000, batch=640, ddim_steps=200),
    # Tables 6 and 8, Mountain Biking: no labels. Attention resolutions 32, 16, 8: factors 1, 2, 4.
    "biking": PAPER
    | dict(condition="none", channels=256, multipliers=(1, 2, 4), depth=2, attention=(1, 2, 4), heads=4,
           head_channels=0, context_dim=0, beta_start=0.0003, beta_end=0.022, steps=14_000, batch=300, ddim_steps=100,
           guidance=1.0, p_drop=0.0, gan_weight=0.5),
}
# Table 7's Pixel-baseline: 128 channels on 128 x 256 x 3, attention at factors 8 and 16, and the DDPM betas.
PIXEL = dict(schedule="linear", beta_start=1e-4, beta_end=0.02)
PIXEL_NETWORK = {
    "smoke": dict(multipliers=(1, 1, 2), attention=(4,)),
    "cpu": dict(channels=32, multipliers=(1, 2, 2, 4), attention=(8,)),
    "gpu": dict(channels=64, multipliers=(1, 1, 2, 2, 4), attention=(8, 16)),
    "paper": dict(channels=128, multipliers=(1, 1, 2, 3, 4), depth=2, attention=(8, 16), steps=42_000, batch=480),
}
PIXEL_NETWORK["biking"] = PIXEL_NETWORK["paper"]


# Table 6, text to video: what Stable Diffusion predicts, and its betas. With the betas above, the last step would have
# 1.2 % of signal left where Stable Diffusion has 6.8; an eps-model divides by it, and colours run away in samples.
TEXT = dict(condition="text", parameterization="eps", beta_start=0.00085, beta_end=0.012)


def presets(variant: str) -> dict[str, dict]:
    """The presets of a variant: "", "boxes", "text" or "pixel"."""
    changes = {"pixel": lambda name: PIXEL | PIXEL_NETWORK[name], "text": lambda name: TEXT}
    return {name: p | changes.get(variant, lambda name: {})(name) for name, p in PRESETS.items()}


def planned(config: BaseConfig, variant: str = "") -> ImageModel:
    """The model a preset would have, without weights, on the meta device: for --dry-run."""
    with torch.device("meta"):
        pixel = variant == "pixel"
        image = preset_config(Config, presets(variant), config.preset, data=config.data, pixel=pixel)
        return ImageModel(image, "meta")


def load(run: Run, variant: str = "") -> ImageModel:
    """The trained model (averaged weights) from OUT, checked against this run and against its autoencoder."""
    flags = {"pixel": ["--pixel"], "": []}.get(variant, ["--condition", variant])
    content = run.trained(NAME, {"data": run.config.data_name()}, variant=variant, flags=flags)
    model = ImageModel(config_of(Config, content), run.device)
    model.autocast = run.autocast
    if model.autoencoder is not None:
        load_autoencoder(run, model.autoencoder)
    check_lineage(content, model.lineage)  # trained on this very autoencoder's latents
    shadow = content["ema"]["shadow"]
    model.weights = {k.removeprefix("unet."): v for k, v in shadow.items() if k.startswith("unet.")}
    conditioner = {k.removeprefix("conditioner."): v for k, v in shadow.items() if k.startswith("conditioner.")}
    load_part(model.conditioner, conditioner, content["path"])
    model.conditioner.requires_grad_(False)
    return model


def load_autoencoder(run: Run, autoencoder: Autoencoder) -> None:
    """The autoencoder and its latent scale, from OUT/02_image_ldm (the variants share it); frozen from here on."""
    content = run.trained(NAME, file="autoencoder.pt")
    load_part(autoencoder, content["ema"]["shadow"], content["path"])
    autoencoder.scale.fill_(content.get("latent_scale", 1.0))
    autoencoder.requires_grad_(False).eval()


# %% Figures and numbers


@torch.no_grad()
def evaluate(run: Run, config: Config, source: Source, image: ImageModel, model: nn.Module, ema: EMA) -> None:
    held_out = source.clips((config.seed, HELD_OUT), 4 * config.samples, 1, config.final_fps, "held-out")
    with run.autocast():
        z = image.encode(held_out.video)
        if not config.pixel:
            decoded = image.decode(z)
            run.report("held-out reconstruction PSNR", psnr(decoded, held_out.video), "dB", at_least=32)
            cars = box_mask(held_out.boxes, config.height, config.width)
            if cars.any():
                run.report("held-out PSNR on car pixels", psnr(decoded, held_out.video, cars), "dB", at_least=25)
            run.report("latent scale", float(image.autoencoder.scale))
            pick = slice(0, min(8, config.samples))
            sheet([held_out.video[pick, 0], decoded[pick, 0]], run.folder / "reconstructions.png")
            if (run.folder / "autoencoder.csv").exists():  # variants share the autoencoder of 02_image_ldm
                plot_metrics(run.folder / "autoencoder.csv", ["l1", "gan_weight"], "autoencoder")
    with ema.applied():
        image.conditioner = model.conditioner
        context, taus = image.conditioner(held_out), [50, 200, 400, 600, 800, 950]

        def predict(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
            with run.autocast():
                return model.unet(x, tau, context)

        losses = image.diffusion.loss_at(predict, z, run.noise(z.shape, "held-out"), taus)
        for tau, loss in zip(taus, losses, strict=True):
            run.report(f"held-out {config.parameterization}-loss at tau {tau}", loss)
        pictures = []
        for row, wanted in enumerate(wanted_rows(config, source, held_out)):
            z = sample_images(
                model.unet, image, wanted, config.guidance, run, config.ddim_steps, config.eta, row, label="samples"
            )
            pictures.append(image.decode(z)[:, 0])
    sheet(pictures, run.folder / "samples.png")
    plot_metrics(run.folder / "metrics.csv", ["loss"], "image diffusion")
    print(f"pictures: {run.folder}/samples.png" + ("" if config.pixel else ", reconstructions.png"))


def wanted_rows(config: Config, source: Source, held_out: Clips) -> list[Clips]:
    """Conditions for samples.png: by day, by night with two cars, crowded; or those of held-out frames."""
    count = max(1, config.samples // 2)
    if config.condition == "labels" and source.labelled:
        return [conditions(count, 0, 0), conditions(count, 0, 2), conditions(count, 1, 2)]
    if config.condition in ("boxes", "text"):
        return [held_out.pick(range(count))]
    return [conditions(count), conditions(count)]


def draw_boxes(run: Run, config: Config) -> None:
    """--sample-boxes: the image of a scene drawn as boxes, for 08_sample_long.py --first-frame (Sec. 4.1.2)."""
    boxes = read_boxes(config.sample_boxes)
    image = load(run, "boxes")
    z = sample_images(image.unet(), image, conditions(1, boxes=boxes), config.guidance, run, config.ddim_steps,
                      config.eta, "boxes", label="boxes")
    frame = image.decode(z)[0]
    sheet([frame], run.folder / "from_boxes.png", gap=0)
    print(
        f"pictures: {run.folder}/from_boxes.png; continue it with: "
        f"python 08_sample_long.py --first-frame {run.folder}/from_boxes.png --futures 2"
    )


# %% Main


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, FLOPs and memory."""
    with torch.device("meta"):
        image = ImageModel(config, "meta")
        unet, conditioner = image.unet(), image.conditioner
    models = {"unet": unet, "conditioner": conditioner} | (
        {} if config.pixel else {"autoencoder": image.autoencoder}
    )
    z, tau, context = planned_input(image, 1)
    tokens = 0 if context is None else context.shape[1]
    dry_run(
        config,
        models,
        {
            "frames": (config.batch, 3, config.height, config.width),
            "latents": (config.batch, *image.shape),
            "context": (config.batch, tokens, config.context_dim if tokens else 0),
        },
    )
    training_cost(config, "unet", unet, lambda: unet(z, tau, context), config.batch, config.steps)
    if not config.pixel:
        x = torch.zeros(1, 3, config.height, config.width, device="meta")
        training_cost(config, "autoencoder", image.autoencoder, lambda: image.autoencoder(x, z)[0], config.ae_batch,
                      config.ae_steps)


def main(argv: list[str] | None = None) -> tuple | None:
    config = parse(Config, lambda given: presets("pixel" if given.get("pixel") else given.get("condition", "")), argv,
                   __doc__)
    if config.sample_boxes:
        config.condition = "boxes"
    usual = config.condition in ("labels", PRESETS[config.preset].get("condition"))
    variant = "pixel" if config.pixel else "" if usual else config.condition
    if config.dry_run:
        return plan(config)
    if config.sample_boxes:
        one_process("--sample-boxes")
    run = Run(NAME, config, variant)
    if config.sample_boxes:
        return draw_boxes(run, config)
    source = open_data(config.data, config.height, config.width, config.final_fps,
                       config.workers, config.reuse, run.device)
    trained = train(run, config, source, variant)
    run.end_training()
    evaluate(run, config, source, *trained)
    known_good(run, PRESETS)
    return run, config, source, *trained


if __name__ == "__main__":
    raise SystemExit(cli(main))
