"""Aligning frames without changing what each frame looks like: the paper's Figure 2, in one dimension (Sec. 3.1).

An "image" is a single number with a three-mode density, and an MLP learns that density by diffusion: the image model.
Six images drawn from it are six independent numbers. A clip is six numbers in one mode that drift smoothly, each
of them distributed as an image is. Temporal layers that mix the six frames go into the frozen image model, merged as
alpha z + (1 - alpha) z', and they alone are trained on clips with the image model's loss, Eq. (2). The same six
starting points then end in one mode, as a smooth sequence: the joint distribution has changed, the density of each
frame has not. From here on the number becomes a picture and the MLP a U-Net; the idea stays.

    python 01_toy_alignment.py                   # 90 s on 2 CPU cores
    python 01_toy_alignment.py --preset smoke    # a few seconds, learns nothing
    python 01_toy_alignment.py --dry-run

Expect, at the cpu preset: clips whose six end points share a mode 0.3 % before (chance: 0.4 %) and 99 % after; lag-1
correlation inside the mode 0.88 where the data has 0.90; Wasserstein-1 distance of one frame to the data 0.04 before
and 0.02 after, where other data gives 0.04 and the exact score with this sampler 0.04.

Writes OUT/01_toy_alignment/: image.pt (image model), checkpoint.pt (temporal layers), image.csv and metrics.csv (their
losses), numbers.json, figure2.png, figure2.gif.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from PIL import Image
from torch import Tensor, nn

from common.blocks import sinusoids
from common.diffusion import Diffusion
from common.loop import EMA, adamw, clip_and_warm_up, load_part, training_loop
from common.temporal import is_temporal
from extra.plan import dry_run
from kit.errors import cli
from kit.files import load_checkpoint, replacing
from kit.flags import BaseConfig, Count, Fraction, Rate, SamplingSteps, Whole, parse
from kit.run import Run, known_good

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

# %% Data: three modes for a frame; for a clip one mode, and a stationary process inside it

FRAMES, CORRELATION = 6, 0.9  # frames of a clip; correlation of neighbours inside the mode
MEANS, STDS, WEIGHTS = torch.tensor([[1.5, 0.0, -1.6], [0.23, 0.3, 0.1], [0.35, 0.33, 0.32]])  # read off Fig. 2


def covariance(frames: int) -> Tensor:
    """CORRELATION^|i - j|, a stationary AR(1) process: every frame has variance 1, whichever frame it is."""
    lag = torch.arange(frames)[:, None] - torch.arange(frames)
    return CORRELATION ** lag.abs().float()  # t t


def draw_clips(count: int, generator: torch.Generator, frames: int = FRAMES) -> Tensor:
    """Clips: b t. One frame of a clip is distributed exactly as an image (frames=1)."""
    mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)[:, None]  # b 1
    smooth = torch.randn(count, frames, generator=generator) @ torch.linalg.cholesky(covariance(frames)).T
    return MEANS[mode] + STDS[mode] * smooth


def exact_v(diffusion: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """The best v-prediction there is, in closed form, for clips of any length (one frame: for images). b t, b -> b t.

    Diffusion turns a mixture of Gaussians into a mixture of Gaussians, whose posterior mean E[x | x_tau] is a sum over
    modes. Along the eigenvectors of the covariance the frames of a clip are independent, so all of it is elementwise.
    """

    def predict(x_tau: Tensor, tau: Tensor) -> Tensor:
        alpha, sigma = (level[..., None].cpu() for level in diffusion.levels(tau, x_tau))  # b 1 1
        eigenvalues, basis = torch.linalg.eigh(covariance(x_tau.shape[1]))
        mean = MEANS[:, None] * basis.sum(0)  # m t
        prior = STDS[:, None] ** 2 * eigenvalues
        x = (x_tau.cpu() @ basis)[:, None]  # b 1 t
        variance = alpha**2 * prior + sigma**2  # b m t
        surprise = ((x - alpha * mean) ** 2 / variance + variance.log()).sum(-1)
        mode = (WEIGHTS.log() - surprise / 2).softmax(-1)[..., None]  # b m 1
        clean = (mode * (mean + alpha * prior / variance * (x - alpha * mean))).sum(1) @ basis.T
        return ((alpha[:, 0] * x_tau.cpu() - clean) / sigma[:, 0]).to(x_tau.device)  # from x = alpha x_tau - sigma v

    return predict


# %% Model


class TemporalLayer(nn.Module):
    """Mixes the frames of a clip at each feature, and merges the result with what the image model had. (b t) c.

    A convolution over frames, so wide that each of the six frames sees all others: it has to agree on the mode (far)
    and to smooth (near). From 03 on there are two kinds of layers, a narrow convolution and attention over frames.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv1d(channels, channels, 2 * FRAMES - 1, padding=FRAMES - 1)
        self.out = nn.Linear(channels, channels)
        # z' = z at the start, so the clip model begins as the image model whatever alpha is
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.mix_factor = nn.Parameter(torch.zeros(1))  # alpha = sigmoid(mix_factor) starts at 1/2

    def forward(self, z: Tensor, frames: int) -> Tensor:
        mixed = self.conv(rearrange(self.norm(z), "(b t) c -> b c t", t=frames))
        z_prime = z + self.out(F.silu(rearrange(mixed, "b c t -> (b t) c")))
        # alpha z + (1 - alpha) z', in the form that is exact where alpha = 1 or z' = z
        return z + (1 - self.mix_factor.sigmoid()) * (z_prime - z)


class Denoiser(nn.Module):
    """v-prediction for each frame: x_tau b t, tau b -> b t. With temporal=False it is the image model, bit for bit."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(9 + 32, channels)
        self.spatial = nn.ModuleList(nn.Linear(channels, channels) for _ in range(layers))
        self.time_stack = nn.ModuleList(TemporalLayer(channels) for _ in range(layers))
        self.out = nn.Linear(channels, 1)

    def forward(self, x: Tensor, tau: Tensor, temporal: bool = True) -> Tensor:
        frames = x.shape[1]
        x = rearrange(x, "b t -> (b t) 1")  # to the spatial layers each frame is a sample of its own
        # Waves of x down to half a sigma: an MLP fed with x alone is slow to find a mode of width 0.1
        waves = x * (2.0 ** torch.arange(-1, 3, device=x.device) * (math.pi / 2))
        tau = sinusoids(tau, 32).repeat_interleave(frames, 0)
        z = F.silu(self.embed(torch.cat([x, waves.sin(), waves.cos(), tau], -1)))  # (b t) c
        for spatial, time_stack in zip(self.spatial, self.time_stack, strict=True):
            z = z + F.silu(spatial(z))
            if temporal:
                z = time_stack(z, frames)
        return rearrange(self.out(z), "(b t) 1 -> b t", t=frames)


def train_only(model: nn.Module, temporal: bool) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_temporal(name) == temporal)


# %% Loss and training: the same for images and for clips


def train(run: Run, model: Denoiser, diffusion: Diffusion, temporal: bool) -> None:
    """Trains the image model on images (Eq. 1), or with temporal=True the temporal layers on clips (Eq. 2)."""
    config = run.config
    stage, steps, batch, frames = ("clip", config.steps, config.batch, FRAMES) if temporal else (
        "image", config.image_steps, config.image_batch, 1)
    train_only(model, temporal)
    network, optimizer, ema = run.parallel(model), adamw(model, config.lr), EMA(model, config.ema_decay)
    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    files = ("checkpoint.pt", "metrics.csv") if temporal else ("image.pt", "image.csv")
    for step in training_loop(run, steps, parts, None, *files):
        for share in run.shares(batch, stage, step):
            x = share.keep(draw_clips(batch, share.generator, frames)).to(run.device)  # b t
            eps = share.normal(x.shape)
            tau = share.integers(diffusion.steps)  # one diffusion time for all frames of a clip
            prediction = network(diffusion.diffuse(x, eps, tau), tau, temporal)
            loss = F.mse_loss(prediction, diffusion.target(x, eps, tau))
            share.backward(loss)
        # The fall of the rate depends on the step alone: a longer run goes through the same first steps
        clip_and_warm_up(optimizer, step, config.lr / math.sqrt(1 + step / 300), warmup=50)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        if step % 20 == 0:
            run.log(loss=loss)


def take_averaged(model: Denoiser, path: Path, temporal: bool) -> None:
    """Loads the averaged weights of a finished stage: sampling wants the mode weights without the last steps' noise."""
    train_only(model, temporal)  # what load_part expects to find in the file
    load_part(model, load_checkpoint(path, "python 01_toy_alignment.py --overwrite")["ema"]["shadow"], path)


# %% Sample


def sampling_times(diffusion: Diffusion, steps: int) -> list[int]:
    """From the last diffusion time down to 0, quadratic: fine near the data, where the narrow mode (0.1) takes shape.

    Times that coincide after rounding, a few next to 0, are used once.
    """
    return torch.linspace((diffusion.steps - 1) ** 0.5, 0, steps).square().round().long().unique().flip(0).tolist()


@torch.no_grad()
def sample(predict: Callable[[Tensor, Tensor], Tensor], diffusion: Diffusion, noise: Tensor, steps: int,
           generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """DDIM with eta = 1, which is ancestral sampling. noise: b t -> end points b t, the whole paths (steps + 1) b t."""
    x, path = noise, [noise]
    times = sampling_times(diffusion, steps)
    for now, after in zip(times, [*times[1:], -1], strict=True):
        tau = torch.full((len(x),), now, device=x.device)
        clean, eps = diffusion.split(predict(x, tau), x, tau)
        x = clean
        if after >= 0:
            alpha, sigma = diffusion.alpha[now], diffusion.sigma[now]
            alpha_next, sigma_next = diffusion.alpha[after], diffusion.sigma[after]
            # All noise that fits is drawn afresh, for each frame on its own: the paths are jagged and know nothing of
            # each other but what the prediction tells them
            fresh = sigma_next / sigma * (1 - (alpha / alpha_next) ** 2).sqrt()
            x = alpha_next * clean + (sigma_next**2 - fresh**2).sqrt() * eps
            x = x + fresh * torch.randn(x.shape, generator=generator).to(x.device)
        path.append(x)
    return x, torch.stack(path)


def mode_of(x: Tensor) -> Tensor:
    """The likeliest mode of clean values, any shape."""
    return (WEIGHTS.log() - STDS.log() - ((x[..., None] - MEANS) / STDS) ** 2 / 2).argmax(-1)


def measure(clips: Tensor, data: Tensor) -> dict[str, float]:
    """Numbers of clips (b t), on the CPU; data: as many clips of the true process."""
    mode = mode_of(clips)  # b t
    together = (mode == mode[:, :1]).all(1)
    centred = clips - clips.mean(0)
    inside = ((clips - MEANS[mode]) / STDS[mode])[together]
    lag1 = [float((x[:, 1:] * x[:, :-1]).mean() / x.square().mean()) for x in (centred, inside)]
    # In one dimension the Wasserstein-1 distance is the mean distance of the sorted values
    distance = (clips.sort(0).values - data.sort(0).values).abs().mean()
    return {"together": float(together.float().mean()), "lag1": lag1[0], "lag1_inside": lag1[1], "w1": float(distance)}


# %% Settings


@dataclasses.dataclass(kw_only=True)
class Config(BaseConfig):
    precision: str = "float32"  # float32; tensors this small gain nothing from less
    image_steps: Whole = 1500  # training steps of the image model
    image_batch: Count = 4096  # images a step
    steps: Whole = 3500  # training steps of the temporal layers
    batch: Count = 512  # clips a step
    channels: Count = 64  # width of the MLP
    layers: Count = 2  # spatial layers, each with a temporal layer behind it
    lr: Rate = 4e-3  # learning rate after warm-up; it then falls as 1 / sqrt(1 + step / 300)
    ema_decay: Fraction = 0.999  # decay of the averaged weights, which are the ones sampled with
    ddim_steps: SamplingSteps = 150  # sampling steps, finer towards the data
    clips: Count = 8192  # clips the numbers are measured on


# The toy is the same whatever is built on it: gpu and the two models of the paper change nothing here.
PRESETS = {
    "smoke": {"image_steps": 20, "image_batch": 256, "steps": 20, "batch": 64, "channels": 16, "ddim_steps": 12,
              "clips": 256},
    "cpu": {}, "gpu": {}, "paper": {}, "biking": {},
}


# %% Figure 2


def density(diffusion: Diffusion, values: Tensor, tau: int | None) -> np.ndarray:
    """Density of one frame at diffusion time tau (None: of the data) at values (n)."""
    alpha, sigma = (1.0, 0.0) if tau is None else (float(diffusion.alpha[tau]), float(diffusion.sigma[tau]))
    modes = torch.distributions.Normal(alpha * MEANS, (alpha**2 * STDS**2 + sigma**2).sqrt())
    return (modes.log_prob(values[:, None]).exp() @ WEIGHTS).numpy()


def draw_box(ax, diffusion: Diffusion, times: list[int], path: Tensor, title: str, aligned: bool) -> list:
    """One box: the wall with the density of a frame over time, its two ends as curves, and six paths in their lanes.

    path: (steps + 1) t. Returns the artists that move: six lines, and the arrows along the frames if aligned.
    """
    length, wall, floor, top = len(times), FRAMES + 0.2, -3.2, 3.2
    values = torch.linspace(floor, top, 161)
    columns = [*range(0, length, 2), None]  # every other step is fine enough for the wall
    image = np.stack([density(diffusion, values, None if i is None else times[i]) for i in columns], 1)
    image = (image / image.max(0)) ** 0.7  # each column by its own maximum, or the narrow mode outshines all
    at, height = np.meshgrid(np.linspace(0, length, len(columns)), values)
    ax.plot_surface(at, np.full_like(at, wall), height, facecolors=plt.cm.magma(image), rcount=161, ccount=200,
                    shade=False, antialiased=False, linewidth=0, zorder=0)
    for start, direction, tau in ((0, -1, times[0]), (length, 1, None)):
        curve = density(diffusion, values, tau)
        curve = start + direction * length * (0.02 + 0.2 * curve / curve.max())
        outline = [(x, wall, float(v)) for x, v in zip(curve, values, strict=True)]
        outline += [(start + direction * length * 0.02, wall, edge) for edge in (top, floor)]
        ax.add_collection3d(Poly3DCollection([outline], facecolor="#f6c28b", edgecolor="#a8480f", lw=0.8, zorder=0,
                                              clip_on=False))
    colors = plt.cm.winter(np.linspace(0, 1, FRAMES))  # blue to green
    lines = []
    for frame in reversed(range(FRAMES)):  # the nearest lane is drawn last
        ax.plot([0, length], [frame] * 2, [floor] * 2, color="0.82", lw=0.8, zorder=1)
        ax.text(length * 1.06, frame, floor, str(frame + 1), fontsize=8, color="0.3", ha="center", va="center")
        steps = np.arange(length + 1)
        lines += ax.plot(steps, [frame] * len(steps), path[:, frame], color=colors[frame], lw=1.1, zorder=20 - frame,
                         marker="o", markevery=[0, -1], ms=4.5, mec="white", mew=0.6)
    if aligned:
        ends = path[-1].numpy()
        rest = np.zeros(FRAMES - 1)
        lines.append(ax.quiver(rest + length, np.arange(FRAMES - 1), ends[:-1], rest, rest + 1, np.diff(ends),
                               color="#d7191c", lw=1.8, arrow_length_ratio=0.35, zorder=30))
    ax.text(length / 2, -0.9, floor - 0.2, "denoising", "x", fontsize=9, color="0.3", ha="center", va="top")
    ax.text(length * 1.2, FRAMES / 2 - 0.5, floor, "frame", "y", fontsize=9, color="0.3", ha="center", va="top")
    ax.set(xlim=(-0.1 * length, 1.1 * length), ylim=(0, wall), zlim=(floor, top))
    ax.set_title(title, fontsize=11, y=1.0)
    ax.set_box_aspect((2.0, 1.3, 1.0), zoom=1.02)
    ax.view_init(elev=24, azim=-52)
    ax.set_axis_off()
    return lines


def draw_figure(folder: Path, diffusion: Diffusion, times: list[int], paths: dict[str, Tensor]) -> None:
    """figure2.png, and figure2.gif with the same two boxes while the paths grow. paths: {title: (steps + 1) t}."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), subplot_kw={"projection": "3d", "computed_zorder": False})
    figure.subplots_adjust(0, 0, 1, 0.93, 0)
    moving = [draw_box(ax, diffusion, times, path, title, aligned=box == 1)
              for box, (ax, (title, path)) in enumerate(zip(axes, paths.items(), strict=True))]
    with replacing(folder / "figure2.png") as part:
        figure.savefig(part, dpi=110, pil_kwargs={"optimize": True})
    # Walls are drawn once and kept; each picture of the animation adds its paths to the copy
    figure.set_dpi(70)
    for line in sum(moving, []):
        line.set_visible(False)
    figure.canvas.draw()
    background = figure.canvas.copy_from_bbox(figure.bbox)
    full = [[line.get_data_3d() for line in lines[:FRAMES]] for lines in moving]
    pictures, length = [], len(times) + 1
    for shown in np.linspace(1, length, 44).astype(int):
        figure.canvas.restore_region(background)
        for ax, lines, data in zip(axes, moving, full, strict=True):
            for line, xyz in zip(lines, data + [None], strict=False):
                if xyz is None and shown < length:
                    continue  # the arrows come with the end points
                line.set_visible(True)
                if xyz is None:
                    line.do_3d_projection()
                else:
                    line.set_data_3d(*(np.asarray(values)[:shown] for values in xyz))
                ax.draw_artist(line)
        pictures.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
    palette = pictures[-1].quantize(64)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    with replacing(folder / "figure2.gif") as part:
        pictures[0].save(part, save_all=True, append_images=pictures[1:], loop=0,
                         duration=[70] * (len(pictures) - 1) + [2500])
    plt.close(figure)


# %% Main


def main(argv: list[str] | None = None) -> tuple | None:
    config = parse(Config, PRESETS, argv, __doc__)
    model = Denoiser(config.channels, config.layers)
    if config.dry_run:
        x = torch.empty(config.batch, FRAMES, device="meta")
        v = model.to("meta")(x, torch.empty(config.batch, device="meta", dtype=torch.long))
        train_only(model, temporal=True)
        return dry_run(config, {"model": model}, {"clip x_tau (b t)": x.shape, "clip v (b t)": v.shape})
    run = Run("01_toy_alignment", config)
    torch.manual_seed(config.seed)
    model = Denoiser(config.channels, config.layers).to(run.device)
    diffusion = Diffusion("sqrt_linear", 0.0015, 0.0195, "v", run.device)  # the paper's latent models, Tables 6 and 7
    image_file, clip_file = run.folder / "image.pt", run.folder / "checkpoint.pt"
    if config.overwrite and not config.resume:
        clip_file.unlink(missing_ok=True)  # temporal layers of an earlier image model

    data = draw_clips(config.clips, run.generator("data"))
    floor = measure(draw_clips(config.clips, run.generator("floor")), data)
    noise = run.noise((config.clips, FRAMES), "noise")

    def evaluate(predict: Callable[[Tensor, Tensor], Tensor]) -> tuple[dict[str, float], Tensor]:
        """The same starting points and the same fresh noise for every model."""
        end, path = sample(predict, diffusion, noise, config.ddim_steps, run.generator("sampler"))
        return measure(end.cpu(), data), path.cpu()

    if not clip_file.exists():  # where it exists, --resume goes on after the image model
        train(run, model, diffusion, temporal=False)
    take_averaged(model, image_file, temporal=False)
    before, path_before = evaluate(lambda x, tau: model(x, tau, temporal=False))
    tau = diffusion.random_tau(config.clips, run.generator("tau"))
    with torch.no_grad():
        image_v = model(noise, tau, temporal=False)

    train(run, model, diffusion, temporal=True)
    run.end_training()
    take_averaged(model, clip_file, temporal=True)
    after, path_after = evaluate(model)

    with torch.no_grad():
        for layer in model.time_stack:
            layer.mix_factor.fill_(math.inf)  # alpha = 1: Sec. 3.1, the temporal layers are skipped
        unmerged = float((model(noise, tau) - image_v).abs().max())
    take_averaged(model, clip_file, temporal=True)
    # The yardstick: what the sampler makes of the exact score of an image, and of a clip
    ideal = exact_v(diffusion)
    exact_image, _ = evaluate(lambda x, tau: ideal(x.reshape(-1, 1), tau.repeat_interleave(FRAMES)).view_as(x))
    exact_clip, _ = evaluate(ideal)

    run.report("clips in one mode, chance", float((WEIGHTS**FRAMES).sum()))
    run.report("clips in one mode, before", before["together"], at_most=0.02)
    run.report("clips in one mode, after", after["together"], at_least=0.95)
    run.report("clips in one mode, data", floor["together"])
    run.report("clips in one mode, exact score", exact_clip["together"])
    inside = "lag-1 correlation inside the mode"
    for key, name, most in (("lag1", "lag-1 correlation", 0.01), ("lag1_inside", inside, 0.05)):
        run.report(f"{name}, after", after[key])
        run.report(f"{name}, data", floor[key])
        run.report(f"{name}, exact score", exact_clip[key])
        run.report(f"{name}, after against data", abs(after[key] - floor[key]), at_most=most)
    run.report("distance of a frame to the data, before", before["w1"], "sigma (Wasserstein-1)", at_most=0.05)
    run.report("distance of a frame to the data, after", after["w1"], "sigma (Wasserstein-1)", at_most=0.08)
    run.report("distance of a frame to the data, data against data", floor["w1"], "sigma (Wasserstein-1)")
    run.report("distance of a frame to the data, exact score", exact_image["w1"], "sigma (Wasserstein-1)")
    run.report("alpha = 1, difference to the image model", unmerged, at_most=0.0)
    gates = [layer.mix_factor.sigmoid().item() for layer in model.time_stack]
    run.report("alpha, mean of the temporal layers", float(np.mean(gates)))

    # A clip that shows the point: the first whose frames visit all three modes before. After: the same starting points
    modes = mode_of(path_before[-1])
    shown = int(torch.stack([(modes == mode).any(1) for mode in range(3)]).all(0).float().argmax())
    titles = (f"before: frames are independent ({before['together']:.1%} of clips in one mode)",
              f"after: frames are aligned ({after['together']:.1%} of clips in one mode)")
    draw_figure(run.folder, diffusion, sampling_times(diffusion, config.ddim_steps),
                dict(zip(titles, (path_before[:, shown], path_after[:, shown]), strict=True)))
    print(f"pictures: {run.folder}/figure2.png, figure2.gif")
    known_good(run, PRESETS)
    return run, config, diffusion, model


if __name__ == "__main__":
    raise SystemExit(cli(main))
