"""Lesson 6: temporal interpolation, T to 4T and again to 16T (Sec. 3.3).

Changes from lesson 5: clips have T = 5 frames and the mask knows both ends, (1, 0, 0, 0, 1). One model, with shared
weights, serves both passes: it is trained on clips at a quarter of the final rate and at the final rate (7.5 and 30
frames a second), and a token in the temporal cross-attention says which. N frames become 4 (N - 1) + 1: 8, 29, 113.
`train` is lesson 5's but for the start, the clips, the mask, the call and what is returned.

  python 06_interpolation.py          5.5 minutes on 2 slow cores

One thing is not the paper's, and off in its presets (--no-calm): frames are sampled from the same noise and once more
from its negative, averaged where the two agree, and the error that the known ends come back with is taken off the
frames between them. What a small model gets wrong is then alike in all frames, and some of it cancels: its video boils
less. An untrained one gives the linear blend of the ends: look where things move, as one of the numbers does.

Expect of the shipped weights, trained longer than this preset: where things move, 5.8 and 3.4 dB nearer to the true
frames than the blend, which shows ghosts; at the final rate neighbouring frames differ 1.73 times as much as real ones
do, where true latents decoded have 1.56, and in two passes 1.77 times; through lesson 4's decoder, which is what one
sees in lesson 8, 1.1 times. After this preset's own few steps it is 1.2 and 0.8 dB, and 2.8 times in one pass.

Reads OUT/02_image_ldm and OUT/05_prediction, and for two_passes.gif, where it is there, OUT/04_decoder_finetune.
Writes OUT/06_interpolation/: checkpoint.pt (temporal weights), middle_frames.png, copy_error-0.png and -1.png (one a
pass), two_passes.gif, metrics.png.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.diffusion import guided, in_common
from common.image_model import ImageModel, planned_input
from common.loop import EMA, Learner, load_part, training_loop
from common.temporal import TemporalOptions, train_temporal_only
from extra.latents import with_latents
from extra.plan import dry_run, training_cost
from kit.data import HELD_OUT, Clips, Source, open_data
from kit.errors import UserError, cli
from kit.files import config_of
from kit.flags import Amount, Count, Fraction, Rate, SamplingSteps, Spacing, TrainingConfig, Whole, parse
from kit.measures import psnr, restlessness, sharpness
from kit.pictures import animation, plot_metrics, plt, save_figure, sheet
from kit.run import Run, known_good

lesson02 = import_module("02_image_ldm")
lesson04 = import_module("04_decoder_finetune")
lesson05 = import_module("05_prediction")
NAME = "06_interpolation"
ERRORS = 0.3  # how much latents may differ, half from sample to sample, by error alone
FRAMES = 5  # two ends and three between: this is what "interpolation by 4" means


# %% Eq. (3) with another mask


def interpolation_mask(clips: int) -> torch.Tensor:
    """Both ends known: b t."""
    return torch.tensor([1.0, 0, 0, 0, 1]).expand(clips, FRAMES)


# %% Model


class Interpolator(nn.Module):
    """The U-Net with temporal layers, and the embedding of the stage: 0 is T to 4T, 1 is 4T to 16T."""

    def __init__(self, config: Config, image: ImageModel) -> None:
        super().__init__()
        self.unet = image.unet(
            TemporalOptions(alpha_frames=config.alpha_frames, ff_mult=config.feed_forward,
                            context_dim=config.stage_dim, known_channels=image.shape[0] + 1,
                            known_features=config.known_features)
        )
        train_temporal_only(self.unet)
        self.stage = nn.Embedding(2, config.stage_dim)

    def forward(self, z_tau: torch.Tensor, tau: torch.Tensor, context: torch.Tensor | None, c_S: torch.Tensor,
                stage: torch.Tensor) -> torch.Tensor:
        """z_tau: (b t) c h w, tau and stage: b, c_S: (b t) c+1 h w."""
        token = self.stage(stage.to(z_tau.device))[:, None]  # b 1 d
        return self.unet(z_tau, tau, context, frames=FRAMES, time_context=token, known=c_S)


# %% Training: Eq. (3)


def both_rates(source: Source, key: tuple[int, ...], rows: Sequence[int], batch: int,
               final_fps: float) -> tuple[Clips, torch.Tensor]:
    """Clips of 5 frames: in a batch, the first half has a quarter of the final rate (stage 0), the second the final one
    (stage 1). rows: which of the batch are wanted, in order."""
    slow_ones = batch - batch // 2
    slow, fast = [i for i in rows if i < slow_ones], [i - slow_ones for i in rows if i >= slow_ones]
    parts = [source.clips((*key, stage), wanted, FRAMES, fps)
             for stage, wanted, fps in ((0, slow, final_fps / 4), (1, fast, final_fps)) if wanted]
    clips = parts[0] if len(parts) == 1 else parts[0].join(parts[1])
    return clips, torch.tensor([0] * len(slow) + [1] * len(fast))


def train(run: Run, config: Config, source: Source, image: ImageModel) -> tuple[nn.Module, EMA]:
    torch.manual_seed(config.seed)
    source = with_latents(run, source, image)
    model = Interpolator(config, image).to(run.device)
    lesson05.begin_with(run, image, model.unet, lesson05.NAME)  # which has learned to read c_S
    learner, diffusion = Learner(run, model, config), image.diffusion
    for step in training_loop(run, config.steps, learner.parts, {"lineage": image.lineage}):
        for share in run.shares(config.batch, "diffusion", step):
            clips, stage = both_rates(source, (config.seed, 7, step), share.rows, config.batch, config.final_fps)
            z = image.encode(clips.video)  # (b t) c h w
            mask = interpolation_mask(len(share))  # b t
            c_S = lesson05.masked_context(z, mask)
            tau = share.integers(diffusion.steps)  # one diffusion time a clip
            drop = share.uniform() < image.config.p_drop
            eps = share.normal(z.shape)
            tau_of_frames = tau.repeat_interleave(mask.shape[1])  # (b t)
            z_tau = diffusion.diffuse(z, eps, tau_of_frames)  # all frames are noised; the known ones come through c_S
            with run.autocast():
                output = learner.network(z_tau, tau, image.conditioner(clips, drop), c_S, stage).float()
            loss = F.mse_loss(output, diffusion.target(z, eps, tau_of_frames))  # Eq. (3), over all frames as written
            share.backward(loss)
            run.log(loss=loss)
        learner.step(step)
    return model, learner.ema


# %% Sampling


@torch.no_grad()
def between(model: nn.Module, image: ImageModel, first: torch.Tensor, last: torch.Tensor, stage: int, clips: Clips,
            config: Config, run: Run, *key: object, label: str = "") -> torch.Tensor:
    """Three latents between each pair of ends, b c h w each -> b 5 c h w; the ends are kept as given."""
    b = len(first)
    z = torch.zeros(b, FRAMES, *image.shape, device=run.device)
    z[:, 0], z[:, -1] = first, last
    c_S = lesson05.masked_context(rearrange(z, "b t c h w -> (b t) c h w"), interpolation_mask(b))
    stages, context = torch.full((b,), stage), image.conditioner(clips)
    nothing = image.conditioner(clips, torch.ones(b, dtype=torch.bool))

    def predict(z_tau: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return guided(model, z_tau, tau[::FRAMES], [context, c_S, stages], [nothing, c_S, stages],
                      1 if context is None else config.guidance)

    def sample(noise: torch.Tensor) -> torch.Tensor:
        return image.sample(run, predict, noise, config.ddim_steps, config.eta, *key, power=config.power, label=label)

    return fill_in(z, run.noise((b * FRAMES, *image.shape), "sample", *key), config.calm, sample)


def fill_in(z: torch.Tensor, noise: torch.Tensor, calm: bool,
            sample: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Puts what is sampled from noise, both (b t) c h w, between the ends of z, b t c h w."""

    def frames(noise: torch.Tensor) -> torch.Tensor:
        return rearrange(sample(noise), "(b t) c h w -> b t c h w", t=FRAMES)

    if calm:
        noise = in_common(noise, FRAMES, 1.0)
        sampled = agreed(*(less_the_ends_error(frames(begin), z) for begin in (noise, -noise)))
    else:
        sampled = frames(noise)
    z[:, 1:-1] = sampled[:, 1:-1]
    return z


def agreed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of samples from a noise and from its negative: the mean, where they differ as errors do; but the one, where they
    differ by more, as two readings of what moved how, of which a mean would be a ghost. Latents have deviation 1."""
    odd = (one - other) / 2
    return (one + other) / 2 + odd**3 / (odd**2 + ERRORS**2)


def less_the_ends_error(sampled: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """From the same noise much of a network's error is the same in all frames, and the ends, which are known (those of
    z), show it. Both b t c h w."""
    error, weight = sampled - z, between_ends(z)
    return sampled - (1 - weight) * error[:, :1] - weight * error[:, -1:]


def between_ends(z: torch.Tensor) -> torch.Tensor:
    """How much of the last of FRAMES a blend has at each, from 0 to 1: 1 t 1 1 1."""
    return torch.linspace(0, 1, FRAMES, device=z.device).view(1, -1, 1, 1, 1)


def interpolate(fill: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor], z: torch.Tensor,
                windows: int = 16) -> torch.Tensor:
    """One pass over a video's latents: n c h w -> 4(n-1)+1 c h w, `windows` pairs of frames at a time.

    fill(first, last, number of the first pair) gives what stands between pairs of ends, as `between` does.
    """
    pieces = []
    for start in range(0, len(z) - 1, windows):
        ends = z[start : start + windows + 1]
        pieces.append(rearrange(fill(ends[:-1], ends[1:], start)[:, :-1], "b t c h w -> (b t) c h w"))
    return torch.cat([*pieces, z[-1:]])


def one_pass(model: nn.Module, image: ImageModel, z: torch.Tensor, stage: int, clips: Clips, config: Config, run: Run,
             *key: object, label: str = "") -> torch.Tensor:
    """`interpolate` with this lesson's model. clips: one row of labels."""
    return interpolate(lambda first, last, start: between(model, image, first, last, stage, clips.repeat(len(first)),
                                                          config, run, *key, start, label=label), z)


# %% Settings, and what later lessons load


@dataclass(kw_only=True)
class Config(TrainingConfig):
    alpha_frames: Count = 1  # length of alpha: 1 is a scalar a layer, 5 is one value a frame
    feed_forward: Amount = 1.0  # width of the temporal feed-forward layers over their channels (4 in SD)
    known_features: Count = 32  # channels c_S is embedded to ("context channels")
    stage_dim: Whole = 64  # width of the token that tells the stage, in the temporal cross-attention
    steps: Whole = 750  # training steps
    batch: Count = 4  # clips per step, half of each rate
    lr: Rate = 1e-3  # learning rate
    muon: Amount = 0.0  # learning rate of weight matrices by Muon (common/muon.py); 0: AdamW for all
    warmup: Whole = 50  # steps of linear warm-up
    steady: Whole = 0  # so many steps at the full rate, which then falls with the root of the step; 0: all
    ema_decay: Fraction = 0.995  # decay of the weight average
    ddim_steps: SamplingSteps = 4  # sampling steps
    power: Spacing = 3.0  # spacing of sampling steps: 1 even, more finer towards the data, for few steps
    eta: Fraction = 0.0  # 0 deterministic, 1 ancestral
    calm: bool = True  # sampling: frames begin with one noise, again its negative, and the ends' error is taken off
    guidance: Amount = 1.0  # scale of guidance on the labels (the paper: 2 with labels, 1 without)
    samples: Count = 12  # held-out clips of each rate in the numbers


PAPER = dict(feed_forward=4.0, known_features=128, stage_dim=512, lr=1e-4, warmup=1, ema_decay=0.9999, ddim_steps=50,
             power=1.0, alpha_frames=5, calm=False)
PRESETS: dict[str, dict] = {
    "smoke": dict(known_features=16, stage_dim=16, steps=3, batch=2, ddim_steps=2, samples=1),
    "cpu": dict(muon=0.005, steps=550, steady=220),
    "gpu": PAPER | dict(steps=30_000, batch=32, warmup=1000, alpha_frames=1, save_every=2000),
    "paper": PAPER | dict(steps=42_000, batch=384, guidance=2.0),  # Table 6: 16 clips on each of 24 GPUs
    "biking": PAPER | dict(steps=33_000, batch=120, eta=1.0),
}


def load(run: Run, image: ImageModel) -> tuple[nn.Module, Config]:
    """The trained interpolation model (averaged weights) from OUT, and its configuration."""
    content = run.trained(NAME, image.lineage)
    config = config_of(Config, content)
    model = Interpolator(config, image).to(run.device)
    load_part(model, content["ema"]["shadow"], content["path"])
    return model.requires_grad_(False).eval(), config


# %% Figures and numbers


@torch.no_grad()
def evaluate(run: Run, config: Config, source: Source, image: ImageModel, model: nn.Module, ema: EMA) -> None:
    passes = (("T to 4T", config.final_fps / 4), ("4T to 16T", config.final_fps))
    strips = []
    with ema.applied():
        for stage, (name, fps) in enumerate(passes):
            real = source.clips((config.seed, HELD_OUT, stage), config.samples, FRAMES, fps, "held-out")
            z = image.encode(real.video)
            truth = image.decode(z, FRAMES)
            z = rearrange(z, "(b t) c h w -> b t c h w", t=FRAMES)
            ours = between(model, image, z[:, 0], z[:, -1], stage, real, config, run, stage, label=name)
            ours = image.decode(rearrange(ours, "b t c h w -> (b t) c h w"), FRAMES)
            weight = between_ends(truth)
            blend = (1 - weight) * truth[:, :1] + weight * truth[:, -1:]
            report_pass(run, name, real.video, truth, ours, blend)
            copy_error(run, image, model, z, real, stage, name)
            strips += [truth[0], ours[0], blend[0]]
        two_passes(run, config, source, image, model)
    sheet(strips, run.folder / "middle_frames.png")
    plot_metrics(run.folder / "metrics.csv", ["loss"], "interpolation")
    print(f"pictures: {run.folder}/middle_frames.png (truth, ours, blend; both passes), two_passes.gif")


def report_pass(run: Run, name: str, real: torch.Tensor, truth: torch.Tensor, ours: torch.Tensor,
                blend: torch.Tensor) -> None:
    """The three frames between: PSNR to the frames decoded from the true latents, beside that of a linear blend of the
    ends, how restless they are, and how sharp the middle one is. All through the image decoder, which hides nothing."""
    ours_psnr, blend_psnr = (psnr(v[:, 1:-1], truth[:, 1:-1]) for v in (ours, blend))
    run.report(f"{name}, PSNR of ours", ours_psnr, "dB")
    run.report(f"{name}, PSNR of the blend", blend_psnr, "dB")
    moving = (real.amax(1) - real.amin(1)).amax(1) > 20 / 127.5  # b h w: 20 levels of 255 in a clip
    where = moving[:, None, None]  # b 1 1 h w
    if where.any():
        gain = psnr(ours[:, 1:-1], truth[:, 1:-1], where) - psnr(blend[:, 1:-1], truth[:, 1:-1], where)
        run.report(f"{name}, PSNR over the blend, where things move", gain, "dB", at_least=0)
    run.report(f"{name}, restlessness, decoded true latents", restlessness(truth, real), "times real")
    run.report(f"{name}, restlessness, ours", restlessness(ours, real), "times real", at_most=1.5)
    middle = [float(sharpness(v)[:, FRAMES // 2].mean()) for v in (truth, ours, blend)]
    run.report(f"{name}, gradient of the middle over real, ours", middle[1] / middle[0], at_least=0.85, at_most=1.15)
    run.report(f"{name}, gradient of the middle over real, blend", middle[2] / middle[0])


def copy_error(run: Run, image: ImageModel, model: nn.Module, z: torch.Tensor, real: Clips, stage: int,
               name: str) -> None:
    """Error of the clean estimate of both ends, which are known, and of the frames between. z: b t c h w."""
    c_S = lesson05.masked_context(rearrange(z, "b t c h w -> (b t) c h w"), interpolation_mask(len(z)))
    context, stages = image.conditioner(real), torch.full((len(z),), stage)

    def predict(z_tau: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        with run.autocast():
            return model(z_tau, tau[::FRAMES], context, c_S, stages)

    eps = run.noise((len(z) * FRAMES, *image.shape), "copy", stage)
    ends, middle = lesson05.clean_errors(image, predict, z, eps, (0, FRAMES - 1), range(1, FRAMES - 1))
    weight = between_ends(z)
    blend = float(((1 - weight) * z[:, :1] + weight * z[:, -1:] - z)[:, 1:-1].square().mean().sqrt())
    figure, axis = plt.subplots(figsize=(4.5, 3))
    axis.plot(lesson05.COPY_TAUS, ends, "o-", label="known ends")
    axis.plot(lesson05.COPY_TAUS, middle, "o-", label="frames between")
    axis.axhline(blend, color="0.5", ls="--", label="linear blend of the ends")
    axis.set(xlabel="diffusion time tau", ylabel="error of the clean estimate", title=name, yscale="log")
    axis.legend()
    save_figure(figure, run.folder / f"copy_error-{stage}.png")
    run.report(f"{name}, copy error of the ends at tau 999", ends[-1])
    run.report(f"{name}, error between at tau 999", middle[-1])
    run.report(f"{name}, error between, blend", blend)


def two_passes(run: Run, config: Config, source: Source, image: ImageModel, model: nn.Module) -> None:
    """Three true key frames to 9 to 33 frames, beside the true ones: what lesson 8 does to whole videos. Shown, and
    judged a second time, through lesson 4's decoder where there is one, as lesson 8 shows them."""
    count = -(-config.samples // 3)
    real = source.clips((config.seed, HELD_OUT, 2), count, 33, config.final_fps, "held-out")
    z = rearrange(image.encode(real.video), "(b t) c h w -> b t c h w", b=count)
    ours = []
    for i, keys in enumerate(z[:, ::16]):
        for stage in (0, 1):
            keys = one_pass(model, image, keys, stage, real.pick([i]), config, run, "two", i, stage, label="two passes")
        ours.append(keys)
    videos = [z, torch.stack(ours)]
    truth, ours = (image.decode(video.flatten(0, 1), 33) for video in videos)
    run.report("two passes, 3 key frames to 33, PSNR", psnr(ours, truth), "dB")
    run.report("two passes, restlessness", restlessness(ours, real.video), "times real", at_most=1.5)
    try:
        autoencoder, size = lesson04.load(run, image)
    except UserError as reason:  # none, or another image model's: no reason to lose what was trained here
        print(f"two passes are not shown through lesson 4's decoder: {reason}")
    else:
        truth, ours = (torch.stack([torch.stack(list(lesson04.decode_stream(run, autoencoder, clip, size)))
                                    for clip in video]) for video in videos)
        run.report("two passes, restlessness, by lesson 4's decoder", restlessness(ours, real.video), "times real",
                   at_most=1.5)
        run.report("the same of true latents", restlessness(truth, real.video), "times real")
        run.report("two passes, gradient over that of true latents, by lesson 4's decoder",
                   float(sharpness(ours).mean() / sharpness(truth).mean()), at_least=0.85, at_most=1.15)
    animation(torch.stack([truth[0], ours[0]]), run.folder / "two_passes.gif", config.final_fps / 2, 2)


# %% Main


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, FLOPs and memory."""
    image = lesson02.planned(config)
    with torch.device("meta"):
        model = Interpolator(config, image)
    dry_run(
        config,
        {"model": model},
        {
            "clips": (config.batch, FRAMES, *image.shape),
            "c_S": (config.batch, FRAMES, image.shape[0] + 1, *image.shape[1:]),
            "stage token": (config.batch, 1, config.stage_dim),
        },
    )
    z, tau, context = planned_input(image, FRAMES)
    c_S, stage = torch.cat([z, z[:, :1]], dim=1), torch.zeros(1, dtype=torch.long, device="meta")
    forward = lambda: model(z, tau, context, c_S, stage)  # noqa: E731
    training_cost(config, "model", model, forward, config.batch, config.steps)


def main(argv: list[str] | None = None) -> tuple | None:
    config = parse(Config, PRESETS, argv, __doc__)
    if config.dry_run:
        return plan(config)
    run = Run(NAME, config)
    image = lesson02.load(run)
    source = open_data(config.data, image.config.height, image.config.width, config.final_fps,
                       config.workers, config.reuse, run.device)
    model, ema = train(run, config, source, image)
    run.end_training()
    evaluate(run, config, source, image, model, ema)
    known_good(run, PRESETS)
    ema.use()
    return run, config, source, image, model


if __name__ == "__main__":
    raise SystemExit(cli(main))
