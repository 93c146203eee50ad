"""Lesson 5: prediction, context guidance and long videos by iteration (Sec. 3.2, Eqs. 3 and 4, Table 1).

Changes from lesson 3: the temporal layers are told some frames. A mask m_S marks the first S of T frames, S in
{0, 1, 2}; c_S = (m_S * z, m_S) goes, resized to each level and through a learned convolution, into the 3D-conv blocks.
Training starts from lesson 3's temporal weights with the new context columns at zero. With S = 1 a start frame
continues, in as many futures as there are seeds; with S = 2, again and again, it becomes a long video.

  python 05_prediction.py                          9 minutes on 2 slow cores
  python 05_prediction.py --temporal attention     the ablations of Table 1, each in a folder of its own:
                                                   also --temporal conv, --end-to-end, --pixel
Expect of the shipped weights, trained longer than this preset: given frames come back (39 dB); the best of 8 futures is
4.4 dB nearer to the true next frame than a copy of the given one; things move 0.7 to 0.85 times as far as in real clips
(two sets of clips).

Reads OUT/02_image_ldm and OUT/03_temporal_layers. Writes OUT/05_prediction/: checkpoint.pt (temporal weights),
futures.png, futures.gif, guidance.png, copy_error.png, metrics.png.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from common.diffusion import guided
from common.image_model import ImageModel, planned_input
from common.loop import EMA, Learner, load_part, training_loop
from common.temporal import TemporalOptions, grow, is_temporal, train_temporal_only
from common.unet import UNet
from extra.latents import with_latents
from extra.plan import count, dry_run, training_cost
from kit.data import HELD_OUT, Clips, Source, open_data
from kit.errors import UserError, cli
from kit.files import config_of
from kit.flags import Amount, Count, Fraction, Rate, SamplingSteps, TrainingConfig, Whole, parse
from kit.measures import motion, psnr, ratio_of_means
from kit.parallel import Share
from kit.pictures import animation, plot_metrics, plt, save_figure, sheet
from kit.run import Run, known_good

lesson02 = import_module("02_image_ldm")
NAME = "05_prediction"


# %% Eq. (3): masks and the context c_S


def prediction_mask(known: torch.Tensor, frames: int) -> torch.Tensor:
    """m_S: S frames known at the start. known: b, the S of each clip -> b t of zeros and ones."""
    return (torch.arange(frames) < known[:, None]).float()


def draw_S(share: Share, config: Config) -> torch.Tensor:
    """How many frames are known, of each clip of a share: b."""
    p_S = torch.tensor(config.context_shares)
    return share.keep(torch.multinomial(p_S, config.batch, True, generator=share.generator))


def masked_context(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """c_S = (m_S * z, m_S). z: (b t) c h w, mask: b t -> (b t) c+1 h w.

    The mask comes first: what it hides is multiplied by zero before anything sees it. S = 0 is all zeros, the mask
    included, which is how the network is told that nothing is known (also the first term of Eq. 4).
    """
    mask = repeat(mask.to(z), "b t -> (b t) 1 h w", h=z.shape[2], w=z.shape[3])
    return torch.cat([mask * z, mask], dim=1)


# %% Model


def temporal_options(config: Config, image: ImageModel) -> TemporalOptions:
    """Temporal layers with c_S. Attention alone has no 3D-conv blocks and so no c_S of this kind: see `build`."""
    known = image.shape[0] + 1
    options = dict(alpha_frames=config.alpha_frames, ff_mult=config.feed_forward, known_channels=known,
                   known_features=config.known_features)
    if config.temporal == "conv":
        return TemporalOptions(**options, attention_blocks=0)
    if config.temporal == "attention":
        return TemporalOptions(
            alpha_frames=config.alpha_frames, conv=False, attention_blocks=2, ff_mult=matching_ff_mult(config, image)
        )
    return TemporalOptions(**options)


def build(config: Config, image: ImageModel) -> nn.Module:
    unet = image.unet(temporal_options(config, image))
    if config.temporal == "attention":
        # How context reached the attention-only model is not in the paper. Here c_S enters at the U-Net's input, as
        # in the paper's text-to-video interpolation, through new columns that start at zero and are trained.
        unet.widen(image.shape[0] + 1)
    train_temporal_only(unet)
    if config.temporal == "attention":
        unet.input_blocks[0][0].requires_grad_(True)
    if config.end_to_end:
        unet.requires_grad_(True)
    return unet


def run_unet(unet: nn.Module, z_tau: torch.Tensor, tau: torch.Tensor, context: torch.Tensor | None, c_S: torch.Tensor,
             config: Config) -> torch.Tensor:
    """f(z_tau; c_S). z_tau: (b t) c h w, tau: b, c_S: (b t) c+1 h w."""
    if config.temporal == "attention":
        return unet(torch.cat([z_tau, c_S], dim=1), tau, context, frames=config.frames)
    return unet(z_tau, tau, context, frames=config.frames, known=c_S)


def begin_with(run: Run, image: ImageModel, unet: UNet, lesson: str) -> None:
    """Starts from the averaged temporal weights of another lesson, unless its own run goes on. Raises UserError for
    those of another width."""
    if run.config.resume and (run.folder / "checkpoint.pt").exists():
        return
    try:
        grow(unet, run.trained(lesson, image.lineage)["ema"]["shadow"])
    except ValueError as error:
        raise UserError(f"{lesson}: {error}") from None


def begin(run: Run, config: Config, image: ImageModel) -> nn.Module:
    """The network as training finds it: with lesson 3's temporal layers, or afresh in Table 1's ablations."""
    if config.end_to_end:
        image.weights = {}
    unet = build(config, image)
    # pixels have no lesson 3; attention alone has feed-forward layers of another width
    if not (config.end_to_end or config.pixel or config.temporal == "attention"):
        begin_with(run, image, unet, "03_temporal_layers")
    return unet


# %% Training: Eq. (3)


def train(run: Run, config: Config, source: Source, image: ImageModel) -> tuple[nn.Module, EMA]:
    torch.manual_seed(config.seed)
    source = with_latents(run, source, image)
    unet = begin(run, config, image)
    learner, diffusion = Learner(run, unet, config), image.diffusion
    for step in training_loop(run, config.steps, learner.parts, {"lineage": image.lineage}):
        for share in run.shares(config.batch, "diffusion", step):
            clips = source.clips((config.seed, 6, step), share.rows, config.frames, config.final_fps / 16)
            z = image.encode(clips.video)  # (b t) c h w
            mask = prediction_mask(draw_S(share, config), config.frames)  # b t
            c_S = masked_context(z, mask)
            tau = share.integers(diffusion.steps)  # one diffusion time a clip
            drop = share.uniform() < image.config.p_drop
            eps = share.normal(z.shape)
            tau_of_frames = tau.repeat_interleave(mask.shape[1])  # (b t)
            z_tau = diffusion.diffuse(z, eps, tau_of_frames)  # all frames are noised; the known ones come through c_S
            with run.autocast():
                output = run_unet(learner.network, z_tau, tau, image.conditioner(clips, drop), c_S, config).float()
            loss = F.mse_loss(output, diffusion.target(z, eps, tau_of_frames))  # Eq. (3), over all frames as written
            share.backward(loss)
            run.log(loss=loss)
        learner.step(step)
    return unet, learner.ema


# %% Sampling: Eq. (4)


@torch.no_grad()
def predict_clips(unet: nn.Module, image: ImageModel, known: torch.Tensor, clips: Clips, config: Config, run: Run,
                  *key: object, guidance: float | None = None, label: str = "") -> torch.Tensor:
    """Continues clips. known: b s c h w, the latents of the S first frames (S = 0, 1, 2) -> b t c h w, all frames.

    clips: the labels of each row. The known frames are denoised along with the others and come back nearly as given.
    """
    scale = config.guidance if guidance is None else guidance
    b, s = known.shape[:2]
    z = torch.cat([known, known.new_zeros(b, config.frames - s, *image.shape)], dim=1).to(run.device)
    mask = prediction_mask(torch.full((b,), s), config.frames)
    c_S = masked_context(rearrange(z, "b t c h w -> (b t) c h w"), mask)
    context = image.conditioner(clips)

    def predict(z_tau: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        # Eq. (4): f(z) + s (f(z; c_S) - f(z))
        return guided(partial(run_unet, unet, config=config), z_tau, tau[:: config.frames], [context, c_S],
                      [context, torch.zeros_like(c_S)], scale if s else 1)

    noise = run.noise((b * config.frames, *image.shape), "sample", *key)
    z = image.sample(run, predict, noise, config.ddim_steps, config.eta, *key, label=label)
    return rearrange(z, "(b t) c h w -> b t c h w", b=b)


# %% Settings, and what later lessons load


@dataclass(kw_only=True)
class Config(TrainingConfig):
    frames: Count = 8  # T, frames of a clip
    alpha_frames: Count = 1  # length of alpha: 1 is a scalar a layer, T is one value a frame
    feed_forward: Amount = 1.0  # width of the temporal feed-forward layers over their channels (4 in SD)
    known_features: Count = 32  # channels c_S is embedded to ("context channels")
    context_shares: tuple[Fraction, ...] = (0.2, 0.4, 0.4)  # probabilities of S = 0, 1, 2 (not given in the paper)
    temporal: Literal["both", "attention", "conv"] = "both"  # which temporal layers (attention: twice as many)
    end_to_end: bool = False  # train spatial and temporal layers together from nothing
    pixel: bool = False  # on the pixel-space image model of 02_image_ldm.py --pixel
    steps: Whole = 1100  # training steps
    batch: Count = 2  # clips per step
    lr: Rate = 1e-3  # learning rate
    muon: Amount = 0.0  # learning rate of weight matrices by Muon (common/muon.py); 0: AdamW for all
    warmup: Whole = 50  # steps of linear warm-up
    steady: Whole = 0  # so many steps at the full rate, which then falls with the root of the step; 0: all
    ema_decay: Fraction = 0.995  # decay of the weight average
    ddim_steps: SamplingSteps = 16  # sampling steps
    eta: Fraction = 1.0  # 0 deterministic, 1 ancestral
    guidance: Amount = 1.5  # scale s of context guidance, Eq. (4)
    sweep: tuple[Amount, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)  # scales in guidance.png
    samples: Count = 4  # held-out clips in the numbers
    futures: Count = 8  # futures sampled for each


PAPER = dict(feed_forward=4.0, known_features=128, lr=1e-4, warmup=1, ema_decay=0.9999, guidance=2.0)
PRESETS: dict[str, dict] = {
    "smoke": dict(frames=4, known_features=16, steps=3, batch=1, ddim_steps=2, samples=1, futures=2, sweep=(1.0, 2.0)),
    "cpu": dict(muon=0.005, steps=850, steady=300),
    "gpu": PAPER | dict(steps=40_000, batch=16, warmup=1000, ddim_steps=100, save_every=2000),
    # Table 6, driving prediction: 9 clips on each of 40 GPUs. p_S is not in the paper: ours.
    "paper": PAPER | dict(frames=10, alpha_frames=10, steps=146_000, batch=360, ddim_steps=200),
    "biking": PAPER | dict(frames=8, alpha_frames=8, steps=107_000, batch=160, ddim_steps=100),
}


def load(run: Run, image: ImageModel, variant: str = "") -> tuple[nn.Module, Config]:
    """The trained prediction model (averaged weights) from OUT, and its configuration."""
    content = run.trained(NAME, image.lineage, variant=variant)
    config = config_of(Config, content)
    unet = build(config, image)
    load_part(unet, content["ema"]["shadow"], content["path"])
    return unet.requires_grad_(False).eval(), config


def matching_ff_mult(config: Config, image: ImageModel) -> float:
    """The feed-forward width at which twice the attention layers have as many trained parameters as both kinds.

    Table 1 says "equal trainable parameters"; parameters are linear in the width, so two counts give the answer.
    """

    def trained(**options) -> int:
        with torch.device("meta"):
            return count(ImageModel(image.config, "meta").unet(TemporalOptions(**options)), is_temporal)

    goal = trained(
        alpha_frames=config.alpha_frames, ff_mult=config.feed_forward, known_channels=image.shape[0] + 1,
        known_features=config.known_features,
    )
    attention = dict(alpha_frames=config.alpha_frames, conv=False, attention_blocks=2)
    narrow, wide = (trained(**attention, ff_mult=mult) for mult in (1, 2))
    return max(0.25, 1 + (goal - narrow) / (wide - narrow))


# %% Figures and numbers


@torch.no_grad()
def evaluate(run: Run, config: Config, source: Source, image: ImageModel, unet: nn.Module, ema: EMA) -> None:
    fps, n = config.final_fps / 16, config.futures
    real = source.clips((config.seed, HELD_OUT), config.samples, config.frames, fps, "held-out")
    reference = source.clips((config.seed, HELD_OUT), 8 * config.samples, config.frames, fps, "held-out")
    z = rearrange(image.encode(real.video), "(b t) c h w -> b t c h w", t=config.frames)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return image.decode(rearrange(latents, "b t c h w -> (b t) c h w"), config.frames)

    truth = decode(z)
    with ema.applied():
        futures = decode(
            predict_clips(
                unet, image, z[:, :1].repeat_interleave(n, 0), real.repeat(n), config, run, 1, label="futures, S = 1"
            )
        )
        second = decode(predict_clips(unet, image, z[:, :2], real, config, run, 2, label="S = 2"))
        started = rearrange(image.encode(reference.video), "(b t) c h w -> b t c h w", t=config.frames)[:, :1]
        moving = decode(predict_clips(unet, image, started, reference, config, run, 3, label="one future each"))
        by_scale = {}
        for scale in config.sweep:
            clips = predict_clips(unet, image, z[:, :1], real, config, run, 1, guidance=scale, label=f"s = {scale:g}")
            by_scale[scale] = decode(clips)
        copy_error(run, config, image, unet, z, real)
    truths = truth.repeat_interleave(n, 0)
    run.report("given frame, S = 1, PSNR", psnr(futures[:, 0], truths[:, 0]), "dB", at_least=25)
    run.report("given frames, S = 2, PSNR", psnr(second[:, :2], truth[:, :2]), "dB", at_least=25)
    each = torch.tensor([psnr(a, b) for a, b in zip(futures[:, 1], truths[:, 1], strict=True)]).view(-1, n)
    copied = torch.tensor([psnr(a, b) for a, b in zip(truth[:, 0], truth[:, 1], strict=True)])
    run.report("copied frame, first predicted frame, PSNR", float(copied.mean()), "dB")
    run.report("mean of futures, first predicted frame, PSNR", float(each.mean()), "dB")
    run.report("best of futures, first predicted frame, PSNR", float(each.amax(1).mean()), "dB")
    run.report("best of futures over the copy", float((each.amax(1) - copied).mean()), "dB", at_least=0.5)
    # Speeds of drives differ by half, so a few clips say little; the error is the standard one of this many.
    (distance, mismatch), (real_distance, real_mismatch) = motion(moving), motion(reference.video)
    ratio, error = ratio_of_means(distance, real_distance)
    run.report("motion, distance over real", ratio, f"+- {error:.2f}", at_least=0.8, at_most=1.2)
    run.report("motion, mismatch over real", float(mismatch.mean() / real_mismatch.mean()))
    last = rearrange(futures[:, -1], "(b n) c h w -> b n c h w", n=n)
    run.report("spread of futures at the last frame", float(last.std(1).mean()))
    sheet([truth[0], *futures[: min(n, 3)], second[0]], run.folder / "futures.png")
    animation(futures[:n], run.folder / "futures.gif", fps)
    plot_sweep(run, by_scale, truth, float(motion(real.video)[0].mean()))
    plot_metrics(run.folder / "metrics.csv", ["loss"], "prediction")
    print(f"pictures: {run.folder}/futures.png (truth, three futures, S = 2), futures.gif, guidance.png")


COPY_TAUS = (20, 100, 400, 700, 999)


def clean_errors(image: ImageModel, predict: Callable, z: torch.Tensor, eps: torch.Tensor, known: Sequence[int],
                 asked: Sequence[int]) -> tuple[list[float], list[float]]:
    """Errors (root mean squares; latents have deviation 1) of the clean estimate at COPY_TAUS, of the frames that are
    known and of those asked for. z: b t c h w; predict(z_tau, tau of every frame) gives the network's output."""
    flat, errors = rearrange(z, "b t c h w -> (b t) c h w"), ([], [])
    for level in COPY_TAUS:
        tau = torch.full((len(flat),), level, device=flat.device)
        z_tau = image.diffusion.diffuse(flat, eps, tau)
        clean, _ = image.diffusion.split(predict(z_tau, tau).float(), z_tau, tau)
        square = rearrange((clean - flat).square(), "(b t) c h w -> b t c h w", b=len(z))
        for which, frames in zip(errors, (known, asked), strict=True):
            which.append(float(square[:, list(frames)].mean().sqrt()))
    return errors


def copy_error(run: Run, config: Config, image: ImageModel, unet: nn.Module, z: torch.Tensor, real: Clips) -> None:
    """Does the network copy what it is given? From tau = 999, where z_tau is noise, the known frames are all it has."""
    eps, figure = run.noise((len(z) * config.frames, *image.shape), "copy"), plt.figure(figsize=(7, 2.6))
    context = image.conditioner(real)
    for s in (1, 2):
        mask = prediction_mask(torch.full((len(z),), s), config.frames)
        c_S = masked_context(rearrange(z, "b t c h w -> (b t) c h w"), mask)

        def predict(z_tau: torch.Tensor, tau: torch.Tensor, c_S: torch.Tensor = c_S) -> torch.Tensor:
            with run.autocast():
                return run_unet(unet, z_tau, tau[:: config.frames], context, c_S, config)

        known, asked = clean_errors(image, predict, z, eps, range(s), range(s, config.frames))
        axis = figure.add_subplot(1, 2, s)
        axis.plot(COPY_TAUS, known, "o-", label="known frames")
        axis.plot(COPY_TAUS, asked, "o-", label="frames asked for")
        axis.set(xlabel="diffusion time tau", title=f"error of the clean estimate, S = {s}", yscale="log")
        axis.legend()
        run.report(f"copy error at tau 999, S = {s}", known[-1], at_most=0.05)
    figure.tight_layout()
    save_figure(figure, run.folder / "copy_error.png")


def plot_sweep(run: Run, by_scale: dict[float, torch.Tensor], truth: torch.Tensor, real_distance: float) -> None:
    """Context guidance: fidelity to the given frame, motion and contrast against the scale s."""
    scales, figure = list(by_scale), plt.figure(figsize=(9, 2.6))
    for i, (name, values) in enumerate(
        {
            "PSNR of the given frame (dB)": [psnr(v[:, 0], truth[:, 0]) for v in by_scale.values()],
            "motion over real": [float(motion(v)[0].mean()) / real_distance for v in by_scale.values()],
            "contrast at the last frame over real": [
                float(v[:, -1].std() / truth[:, -1].std()) for v in by_scale.values()
            ],
        }.items()
    ):
        axis = figure.add_subplot(1, 3, i + 1)
        axis.plot(scales, values, "o-")
        axis.set(xlabel="context guidance s", title=name)
    figure.tight_layout()
    save_figure(figure, run.folder / "guidance.png")


# %% Main


def variant_of(config: Config) -> str:
    names = [config.temporal] if config.temporal != "both" else []
    return "-".join(names + ["end-to-end"] * config.end_to_end + ["pixel"] * config.pixel)


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, FLOPs and memory."""
    image = lesson02.planned(config, "pixel" if config.pixel else "")
    with torch.device("meta"):
        unet = build(config, image)
    dry_run(
        config,
        {"unet": unet},
        {
            "clips": (config.batch, config.frames, *image.shape),
            "c_S": (config.batch, config.frames, image.shape[0] + 1, *image.shape[1:]),
        },
    )
    z, tau, context = planned_input(image, config.frames)
    c_S = torch.cat([z, z[:, :1]], dim=1)
    forward = lambda: run_unet(unet, z, tau, context, c_S, config)  # noqa: E731
    training_cost(config, "unet", unet, forward, config.batch, config.steps)


def main(argv: list[str] | None = None) -> tuple | None:
    config = parse(Config, PRESETS, argv, __doc__)
    if config.dry_run:
        return plan(config)
    run = Run(NAME, config, variant_of(config))
    image = lesson02.load(run, "pixel" if config.pixel else "")
    source = open_data(config.data, image.config.height, image.config.width, config.final_fps,
                       config.workers, config.reuse, run.device)
    unet, ema = train(run, config, source, image)
    run.end_training()
    evaluate(run, config, source, image, unet, ema)
    known_good(run, PRESETS)
    ema.use()
    return run, config, source, image, unet


if __name__ == "__main__":
    raise SystemExit(cli(main))
