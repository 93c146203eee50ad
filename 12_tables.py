"""Lesson 12: every claim of the paper, measured in miniature (Tables 1, 3, 4, 5, 11, 14; Sec. 3.2, 3.3; App. D, I.3.2).

Trains what each table compares, at matched steps and trained parameters, for every seed; samples; measures; writes.
Rows that are already in the results file are skipped, so an interrupted run goes on where it stopped.

  python 12_tables.py                                     all tables, three seeds: 4 hours without those of lesson 9
  python 12_tables.py --table ablations --seeds 0         one table, one seed
  python 12_tables.py --threads 1 --seeds 0 & python 12_tables.py --threads 1 --seeds 1     side by side
  python 12_tables.py --render                            only writes tables.md and the figures
  python 12_tables.py --detector i3d.pt                   real FVD (or FID) by the paper's protocol, with your file
  python 12_tables.py --protocol ucf101 --data REAL --generated OURS --detector i3d.pt
  python 12_tables.py --protocol msrvtt --generated OURS --clip FOLDER
  python 12_tables.py --study OURS THEIRS                 an HTML page of blind pairs (Table 2), of two folders of clips
  python 12_tables.py --score answers.json                preferences with a confidence interval, from its answers

Distances in features of networks trained here are called toy-FID and toy-FVD: they rank what is in these tables and
cannot be compared with published numbers. Self-checks of the metrics stand in the first table.

Reads checkpoints/readers: networks that read scenes, kept so that numbers of different days can be compared. Writes
OUT/seedN/ (every lesson's folder) and RESULTS/: tables.json, tables.md, a figure per table.
"""

import base64
import dataclasses
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common.blocks import channels_last
from common.image_model import ImageModel, conditions
from common.loop import load_part
from extra.metrics import (
    READER_SIZE,
    CaptionReader,
    ClipReader,
    Detector,
    FrameReader,
    Protocol,
    SceneReader,
    box_iou,
    captions_obeyed,
    checksum,
    clip_features,
    clip_similarity,
    corruptions,
    frame_features,
    frechet_distance,
    in_batches,
    inception_score,
    load_clip,
    read,
    same_protocol,
    train_reader,
)
from kit.data import Clips, Source, VideoFolder, nearest, open_data
from kit.errors import UserError, cli
from kit.files import CHECKPOINTS, load_checkpoint, write_text
from kit.flags import Amount, BaseConfig, Count, SamplingSteps, Whole, parse, preset_config
from kit.measures import flicker, motion, psnr, sharpness
from kit.pictures import plt, save_figure, sheet
from kit.run import Run, one_process

lesson02 = import_module("02_image_ldm")
lesson03 = import_module("03_temporal_layers")
lesson04 = import_module("04_decoder_finetune")
lesson05 = import_module("05_prediction")
lesson06 = import_module("06_interpolation")
lesson07 = import_module("07_upsampler")
lesson09 = import_module("09_text_to_video")
NAME = "12_tables"
REAL, OTHER_REAL, ASKED = 12_000, 12_001, 12_002  # keys of held-out clips: the references, the floor, what is asked for


# %% Config


@dataclass(kw_only=True)
class Config(BaseConfig):
    preset: str = "tables"  # smoke, tables or gpu
    table: tuple[str, ...] = ()  # names of tables; none: all
    seeds: tuple[Whole, ...] = (0, 1, 2)  # every row is trained and measured once with each
    results: str = "results"  # folder of tables.json, tables.md and the figures
    render: bool = False  # compute nothing; write tables.md and figures from tables.json
    detector: str = "toy"  # "toy", or a TorchScript I3D or Inception
    clip: str = ""  # folder of a CLIP model, instead of the small one trained here
    protocol: Literal["", "ucf101", "msrvtt"] = ""  # judge folders of videos as the paper's Tables 4 and 5 do
    generated: str = ""  # folder of videos to judge with --protocol
    study: tuple[str, ...] = ()  # two folders of videos: write the page of a human study
    score: tuple[str, ...] = ()  # answers of a study: print preferences
    height: Count = 32  # frame height in pixels
    width: Count = 64  # frame width in pixels
    frames: Count = 8  # frames of a judged clip
    samples: Count = 256  # clips that are judged in each row
    references: Count = 1024  # real clips they are judged against
    rollouts: Whole = 100  # videos in the table of long prediction
    ddim_steps: SamplingSteps = 8  # sampling steps of every row, images and clips alike
    guidance: Amount = 1.5  # scale of context guidance in the guided row; the sweep has others
    reader_steps: Whole = 1500  # training steps of each network that reads scenes


PRESETS: dict[str, dict] = {
    "smoke": dict(height=16, width=32, frames=4, samples=3, references=4, rollouts=2, ddim_steps=2, reader_steps=2,
                  seeds=(0,)),
    "tables": {},
    "gpu": dict(height=128, width=256, samples=2048, references=2048, rollouts=256, ddim_steps=50,
                reader_steps=10_000),
}
# What the lessons are trained with for the tables, on top of the lesson's preset of the same size.
BASES = {"smoke": "smoke", "tables": "cpu", "gpu": "gpu"}
TABLES_RECIPE = {
    "02_image_ldm": dict(ae_steps=2500, gan_start=2200, steps=3000, channels=64, multipliers=(1, 2), attention=(2,)),
    "03_temporal_layers": dict(feed_forward=4.0, steps=1000, batch=4),
    "04_decoder_finetune": dict(steps=400, gan_start=250, batch=4),
    "05_prediction": dict(feed_forward=4.0, steps=1500, batch=4),
    "06_interpolation": dict(feed_forward=4.0, steps=1200),
    "07_upsampler": dict(multipliers=(1, 2, 4, 8), patch=16, image_steps=1200, steps=300, ddim_steps=6),
    "09_text_to_video": dict(feed_forward=4.0, steps=1000, batch=4),
}


ABLATIONS: dict[str, dict] = {"": {}, "attention": {"temporal": "attention"}, "end-to-end": {"end_to_end": True},
                              "pixel": {"pixel": True}}
# App. I.3.2 is measured a second time, after LONGER times the steps: FULL_RATE of them as ever, the rest at a fifth of
# the rate, without which the averaged weights stay noisy.
LONGER, FULL_RATE = 7, 4


def lesson_config(config: Config, lesson, **options):
    """The configuration of a lesson for these tables."""
    variant = ("pixel" if options.get("pixel") else options.get("condition", "")) if lesson is lesson02 else ""
    recipe = TABLES_RECIPE.get(lesson.NAME, {}) if config.preset == "tables" else {}
    if lesson is lesson02:
        recipe = recipe | dict(height=config.height, width=config.width)
    if variant == "pixel":  # it has a network of its own, matched in compute
        recipe = {k: v for k, v in recipe.items() if k not in ("channels", "multipliers", "attention")}
    presets = lesson02.presets(variant) if lesson is lesson02 else lesson.PRESETS
    machine = dict(threads=config.threads, device=config.device, precision=config.precision)
    return preset_config(lesson.Config, presets, BASES[config.preset], **recipe | machine | options)


def trained_parameters(config: Config) -> dict[str, int]:
    """Of the compared temporal networks, by row; "ours" and "attention" must match, the others cannot."""
    counts = {}
    for variant, options in ABLATIONS.items():
        image_config = lesson_config(config, lesson02, pixel=variant == "pixel")
        with torch.device("meta"):
            unet = lesson05.build(lesson_config(config, lesson05, **options), lesson02.ImageModel(image_config, "meta"))
        counts[variant or "ours"] = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return counts


# %% One seed: everything the rows compare, trained when first asked for


class World:
    """The models of one seed and the real clips. Training goes on where it was interrupted, or is done already."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self.folder = config.folder() / f"seed{seed}"
        self.run = Run(NAME, dataclasses.replace(config, out=str(self.folder), seed=seed, resume=True))
        self.source = open_data("driving", config.height, config.width, config.final_fps)
        self.kept: dict[object, object] = {}

    def keep(self, key: object, make: Callable[[], object]):
        """Something several rows need, made once (trained, it may be, from within a sampler, hence enable_grad)."""
        if key not in self.kept:
            with torch.enable_grad():
                self.kept[key] = make()
        return self.kept[key]

    def lesson(self, lesson, variant: str = "", **options) -> tuple[Run, object]:
        """The run and configuration of a lesson in this seed's folder."""
        config = lesson_config(self.config, lesson, out=str(self.folder), seed=self.seed, **options)
        run = Run(lesson.NAME, config, variant)  # refuses a folder that another recipe trained
        config.resume = True
        return run, config

    # the networks that measure, shared by all seeds

    @cached_property
    def frame_reader(self) -> FrameReader:
        return self.reader(FrameReader, "frames.pt")

    @cached_property
    def clip_reader(self) -> ClipReader:
        return self.reader(ClipReader, "clips.pt")

    @cached_property
    def caption_reader(self) -> CaptionReader:
        return self.reader(CaptionReader, "captions.pt")

    @cached_property
    def scene_reader(self) -> SceneReader:
        return self.reader(SceneReader, "scenes.pt")

    def reader(self, kind: type, file: str):
        """Trained in OUT; or, where OUT has none, the one of the repository, with which numbers can be compared."""
        torch.manual_seed(0)
        run = Run("readers", dataclasses.replace(self.config, out=str(self.config.folder()), resume=True))
        kept, reader = CHECKPOINTS / "readers" / file, kind()
        if self.config.preset != "tables" or (run.folder / file).exists() or not kept.exists():
            longer = 3 if kind is ClipReader else 1  # time takes longer to learn to read
            return train_reader(run, reader, longer * self.config.reader_steps, *READER_SIZE, file)
        print(f"{run.folder} has no {file}: using {kept}")
        load_part(reader, load_checkpoint(kept, "git checkout checkpoints")["reader"], kept)
        return channels_last(reader).to(run.device).requires_grad_(False).eval()

    @cached_property
    def detector(self) -> Detector | None:
        return None if self.config.detector == "toy" else Detector(self.config.detector, self.run.device)

    # the models that are measured

    def image(self, variant: str = ""):
        """The image LDM: "", "boxes", "text" or "pixel" (whose steps match the compute of the latent U-Net's)."""

        def make():
            options = {"": {}, "pixel": {"pixel": True}}.get(variant, {"condition": variant})
            if variant:
                self.image()  # the autoencoder of all of them
            run, config = self.lesson(lesson02, variant, **options)
            if variant == "pixel":
                _, latent = self.lesson(lesson02)
                config.steps = self.matched_steps(latent.steps, lesson02.ImageModel(config), self.image())
            source = open_data("driving", config.height, config.width, config.final_fps)
            lesson02.train(run, config, source, variant)
            return lesson02.load(run, variant)

        return self.keep(("image", variant), make)

    def matched_steps(self, steps: int, pixel, latent) -> int:
        """So many steps of the pixel model cost what `steps` of the latent one do (FLOPs of a forward pass)."""

        def cost(image: ImageModel) -> int:
            x, unet = torch.zeros(1, *image.shape), image.unet()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(x, torch.zeros(1, dtype=torch.long), image.conditioner(conditions(1)))
            return counter.get_total_flops()

        return max(1, round(steps * cost(latent) / cost(pixel)))

    def prediction(self, variant: str = ""):
        """Lesson 5, an ablation or "longer": run, configuration, image model, network with averaged weights."""

        def make():
            image = self.image("pixel" if variant == "pixel" else "")
            run, config = self.lesson(lesson05, variant, **ABLATIONS.get(variant, {}))
            if variant == "pixel":
                config.steps = self.matched_steps(config.steps, image, self.image())
            if variant == "longer":
                config.steps *= FULL_RATE
            if variant in ("", "longer"):
                lesson03.train(*self.lesson(lesson03), self.source, image)
            weights = image.weights
            unet, ema = lesson05.train(run, config, self.source, image)
            if variant == "longer":
                config.steps, config.lr = config.steps // FULL_RATE * LONGER, config.lr / 5
                unet, ema = lesson05.train(run, config, self.source, image)
            image.weights = weights  # end-to-end training takes them away
            ema.use()
            config.ddim_steps = self.config.ddim_steps
            return run, config, image, unet.requires_grad_(False).eval()

        return self.keep(("prediction", variant), make)

    def interpolation(self):
        def make():
            self.prediction()  # where this begins
            run, config = self.lesson(lesson06)
            model, ema = lesson06.train(run, config, self.source, self.image())
            ema.use()
            config.ddim_steps = self.config.ddim_steps
            return run, config, model.requires_grad_(False).eval()

        return self.keep("interpolation", make)

    def decoder(self, image_critic: bool):
        def make():
            variant = "image-discriminator" if image_critic else ""
            run, config = self.lesson(lesson04, variant, image_discriminator=image_critic)
            model = lesson04.train(run, config, self.source, self.image(), self.frame_reader)
            return run, config, model.requires_grad_(False).eval()

        return self.keep(("decoder", image_critic), make)

    def text_to_video(self):
        """Lesson 9's key frames: run, configuration, image model, network with averaged weights."""

        def make():
            image = self.image("text")
            run, config = self.lesson(lesson09)
            unet, ema = lesson09.train_key_frames(run, config, self.source, image)
            ema.use()
            config.ddim_steps = self.config.ddim_steps
            return run, config, image, unet.requires_grad_(False).eval()

        return self.keep("text_to_video", make)

    @cached_property
    def upsampler_source(self):
        """Large frames of twice the tables' size, so that small ones are half of it: their own data."""
        return open_data("driving", 2 * self.config.height, 2 * self.config.width, self.config.final_fps)

    def upsampler(self):
        def make():
            run, config = self.lesson(lesson07)
            config.patch = min(config.patch, self.config.height // 2)
            # it sees frames, not latents: of the image model it asks the size, so an untrained one will do
            image = lesson02.ImageModel(lesson_config(self.config, lesson02))
            model = lesson07.train(run, config, self.upsampler_source, image)
            return run, config, model.requires_grad_(False).eval()

        return self.keep("upsampler", make)


# %% Sampling: from noise to frames, as lesson 8 does it


@torch.no_grad()
def first_frames(world: World, variant: str, labels: Clips, guidance: float, part: int) -> torch.Tensor:
    """One latent for each row of labels, b c h w, from the image model that a row of Table 1 stands on."""
    run, config, image, unet = world.prediction(variant)
    if variant == "end-to-end":  # it has no image model: the first frame of a clip with nothing given
        nothing = torch.zeros(len(labels), 0, *image.shape)
        return lesson05.predict_clips(unet, image, nothing, labels, config, run, "first", part)[:, 0]
    unet, steps = image.unet(), config.ddim_steps
    return lesson02.sample_images(unet, image, labels, guidance, run, steps, config.eta, "first", part)


@torch.no_grad()
def continued(world: World, variant: str, first: torch.Tensor, labels: Clips, length: int, guidance: float, part: int,
              overlap: int = 2) -> torch.Tensor:
    """Latents b length c h w: S = 1 from the first frame, then S = `overlap` again and again."""
    run, config, image, unet = world.prediction(variant)
    z = first[:, None]
    while z.shape[1] < length:
        known, key = z[:, -min(overlap, z.shape[1]) :], ("on", part, z.shape[1])
        clip = lesson05.predict_clips(unet, image, known, labels, config, run, *key, guidance=guidance)
        z = torch.cat([z, clip[:, known.shape[1] :]], dim=1)
    return z[:, :length]


def decoded(image: ImageModel, run: Run, z: torch.Tensor) -> torch.Tensor:
    return image.decode(rearrange(z, "b t c h w -> (b t) c h w"), z.shape[1])


def in_parts(labels: Clips, make: Callable[[Clips, int], torch.Tensor], size: int = 64) -> torch.Tensor:
    """Rows of labels a few at a time, so that memory does not grow with the number of samples."""
    starts = range(0, len(labels), size)
    return torch.cat([make(labels.pick(range(s, min(s + size, len(labels)))), s) for s in starts])


def generated(world: World, variant: str = "", guidance: float = 1.0, conditional: bool = False) -> torch.Tensor:
    """The clips of a row of Table 1, n t 3 H W at the key-frame rate: an image, and its continuation."""

    def part(labels: Clips, start: int) -> torch.Tensor:
        run, _, image, _ = world.prediction(variant)
        first = first_frames(world, variant, labels, 2.0 if conditional else 1.0, start)
        return decoded(image, run, continued(world, variant, first, labels, world.config.frames, guidance, start))

    labels = asked(world) if conditional else conditions(world.config.samples)
    return world.keep(("generated", variant, guidance, conditional), lambda: in_parts(labels, part))


def independent(world: World) -> torch.Tensor:
    """Every frame from the image model on its own, which is the video model at alpha = 1: n t 3 H W."""

    def part(labels: Clips, start: int) -> torch.Tensor:
        frames, image = labels.repeat(world.config.frames), world.image()
        z = lesson02.sample_images(image.unet(), image, frames, 1.0, world.run, world.config.ddim_steps, 1.0, start)
        return decoded(image, world.run, rearrange(z, "(b t) c h w -> b t c h w", t=world.config.frames))

    return world.keep("independent", lambda: in_parts(conditions(world.config.samples), part))


def asked(world: World) -> Clips:
    """Held-out scenes whose labels are asked for, and whose first frames are continued."""
    count, frames, fps = world.config.samples, world.config.frames, key_rate(world)
    return world.keep("asked", lambda: world.source.clips((ASKED,), count, frames, fps, "held-out"))


def key_rate(world: World) -> float:
    return world.config.final_fps / 16


# %% Numbers of a set of clips


def number(value: float, protocol: Protocol) -> dict:
    return {"value": value, "protocol": dataclasses.asdict(protocol)}


def features(world: World, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name of the distance, rows of features: two from the readers, one from a detector."""
    if world.detector:
        name = "FVD" if world.detector.of_clips else "FID"
        return {name: torch.cat([world.detector.features(part) for part in video.split(16)])}
    clip_reader, frame_reader = world.clip_reader, world.frame_reader
    return {
        "toy-FVD": in_batches(world.run, lambda v: clip_features(clip_reader, v), video),
        "toy-FID": in_batches(world.run, lambda v: frame_features(frame_reader, v), video),
    }


def real_features(world: World, source: Source, frames: int, fps: float) -> dict[str, torch.Tensor]:
    """Features of the references, by distance; the clips themselves are not kept."""
    count = world.config.references

    def make() -> dict[str, torch.Tensor]:
        parts = [
            features(world, source.clips((REAL, start), min(64, count - start), frames, fps, "held-out").video)
            for start in range(0, count, 64)
        ]
        return {metric: torch.cat([part[metric] for part in parts]) for metric in parts[0]}

    return world.keep(("references", source.height, frames, fps), make)


def network_name(world: World, metric: str) -> str:
    if world.detector:
        return f"{Path(world.config.detector).name} {world.detector.checksum}"
    reader = world.clip_reader if metric == "toy-FVD" else world.frame_reader
    return f"{type(reader).__name__} {checksum(reader)}"


def score(world: World, video: torch.Tensor, fps: float,
                  source: Source | None = None) -> dict[str, dict]:
    """Distances to real clips of the same length, rate and size; inception score; consistency of motion."""
    source, frames = source or world.source, video.shape[1]
    real, size = real_features(world, source, frames, fps), f"{video.shape[-2]} x {video.shape[-1]}"
    about = dict(frames=frames, fps=fps, size=size, samples=len(video), references=world.config.references)
    numbers = {
        metric: number(frechet_distance(rows, real[metric]), Protocol(metric, network_name(world, metric), **about))
        for metric, rows in features(world, video).items()
    }
    if not world.detector:
        value = inception_score(read(world.run, world.frame_reader, video))
        numbers["IS"] = number(value, Protocol("IS", network_name(world, "IS"), **about | {"references": 0}))
    _, mismatch = motion(video[:64])
    about |= {"samples": min(64, len(video)), "references": 0}
    return numbers | {"mismatch": number(float(mismatch.mean()), Protocol("mismatch", "block matching", **about))}


def plain(metric: str, value: float, video: torch.Tensor, fps: float, network: str = "none") -> dict[str, dict]:
    """A number that needs no references, of clips `n t 3 H W`."""
    n, t, _, height, width = video.shape
    return {metric: number(value, Protocol(metric, network, t, fps, f"{height} x {width}", n, 0))}


def real_clips(world: World, frames: int, fps: float, source: Source | None = None, count: int = 0) -> torch.Tensor:
    """Other real clips than the references: the floor of a table. Others for every seed."""
    source, count = source or world.source, count or world.config.samples
    key = (OTHER_REAL, world.seed)
    return world.keep(("floor", source.height, frames, fps, count), lambda: source.clips(
        key, count, frames, fps, "held-out").video)


# %% The tables. A row is a name, what it shows, and a function of a world that gives its numbers


@dataclass(frozen=True)
class Row:
    name: str
    what: str  # what stands in this row, a clause
    measure: Callable[[World], dict[str, dict]] | None  # None: quoted from the paper, not reproduced
    paper: str = ""  # the paper's numbers, where it has this row


def check_rows() -> Iterator[Row]:
    """What the metrics do to sets whose order is known."""

    def real(w: World) -> torch.Tensor:
        return real_clips(w, w.config.frames, key_rate(w))

    yield Row("real against itself", "the same clips twice: 0", itself)
    yield Row("real against real", "other real clips: the floor", lambda w: score(w, real(w), key_rate(w)))
    yield Row("real, half as many", "the floor with half the clips, which shows the bias",
              lambda w: score(w, real(w)[: max(2, len(real(w)) // 2)], key_rate(w)))
    for name in CORRUPTIONS:
        yield Row(name, f"real clips with {name}", lambda w, name=name: score(
            w, corruptions(real(w), torch.Generator().manual_seed(7))[name], key_rate(w)))
    yield Row("half speed", "real clips played at half their speed", lambda w: score(w, w.source.clips(
        (OTHER_REAL, w.seed), w.config.samples, w.config.frames, 2 * key_rate(w), "held-out").video, key_rate(w)))
    yield Row("fewer cars", "real clips with the fewest cars", lambda w: score(w, fewest_cars(w), key_rate(w)))
    yield Row("captions", "real frames beside their own captions and beside others'", caption_check)
    yield Row("readers", "what the reading networks get right on real frames", reader_check)


CORRUPTIONS = ("little noise", "more noise", "blur", "shuffled frames", "a repeated frame", "jitter of 5 levels")
TIMELESS = ("shuffled frames", "a repeated frame", "half speed")  # only clips can tell: every frame is real


def itself(world: World) -> dict[str, dict]:
    video, fps = real_clips(world, world.config.frames, key_rate(world)), key_rate(world)
    found: dict[str, dict] = {}
    for metric, rows in features(world, video).items():
        found |= plain(metric, frechet_distance(rows, rows), video, fps, network_name(world, metric))
    return found


def fewest_cars(world: World) -> torch.Tensor:
    count, fps = world.config.samples, key_rate(world)
    clips = world.source.clips((OTHER_REAL, world.seed, 1), 3 * count, world.config.frames, fps, "held-out")
    return clips.pick(clips.cars.argsort(stable=True)[:count].tolist()).video


def caption_check(world: World) -> dict[str, dict]:
    clips = asked(world)
    others = clips.captions[1:] + clips.captions[:1]
    return clipsim(world, "CLIPSIM", clips.video, clips.captions) | clipsim(
        world, "CLIPSIM, wrong captions", clips.video, others)


def clipsim(world: World, name: str, video: torch.Tensor, captions: list[str]) -> dict[str, dict]:
    if world.config.clip:
        value, network = load_clip(world.config.clip)(video, captions), Path(world.config.clip).name
    else:
        value = clip_similarity(world.run, world.caption_reader, video, captions)
        network = f"CaptionReader {checksum(world.caption_reader)}"
    return plain(name, value, video, key_rate(world), network)


def reader_check(world: World) -> dict[str, dict]:
    return obeyed(world, asked(world).video[:, :1], asked(world))


def conditional_rows() -> Iterator[Row]:
    """Table 1, left."""
    yield Row("Long Video GAN", "the paper's number, not reproduced here", None, "FVD 478, FID 53.5")
    yield Row("real", "other real clips: the floor", lambda w: score(
        w, real_clips(w, w.config.frames, key_rate(w)), key_rate(w)))
    yield Row("independent frames", "the image model, every frame on its own", lambda w: score(
        w, independent(w), key_rate(w)))
    yield Row("copied first frame", "the first frame of each clip, repeated", lambda w: score(
        w, generated(w)[:, :1].repeat(1, w.config.frames, 1, 1, 1), key_rate(w)))
    yield Row("unconditional", "one image and its continuation, no labels", lambda w: score(
        w, generated(w), key_rate(w)), "FVD 389, FID 31.6")
    yield Row("conditional", "the same, told night and number of cars", lambda w: score(
        w, generated(w, conditional=True), key_rate(w)), "FVD 356, FID 51.9")


def ablation_rows() -> Iterator[Row]:
    """Table 1, right: matched training steps (the pixel row: matched compute) and trained parameters."""
    for variant, what, paper in (
        ("pixel", "diffusion on pixels, at the same compute", "FVD 639.56, FID 59.70"),
        ("end-to-end", "no image pre-training, all layers trained on clips", "FVD 1155.10, FID 71.26"),
        ("attention", "twice the temporal attention layers, no 3D convolutions", "FVD 704.41, FID 50.01"),
    ):
        yield Row(variant, what, lambda w, v=variant: score(w, generated(w, v), key_rate(w)), paper)
    yield Row("ours", "3D convolutions and attention, on the frozen image model", lambda w: score(
        w, generated(w), key_rate(w)), "FVD 534.17, FID 48.26")
    yield Row("ours, guided", "with context guidance, at the lesson's scale", lambda w: score(
        w, generated(w, guidance=w.config.guidance), key_rate(w)), "FVD 508.82, FID 54.16")
    for scale in (2.0, 3.0, 5.0):
        yield Row(f"ours, scale {scale:g}", "context guidance, the sweep", lambda w, s=scale: score(
            w, generated(w, guidance=s), key_rate(w)))


def against_truth(world: World, video: torch.Tensor, truth: torch.Tensor, fps: float,
                  source: Source | None = None) -> dict[str, dict]:
    """The score, and what can be measured where the true frames are known."""
    found = score(world, video, fps, source) | plain("flicker", flicker(video, truth), video, fps)
    return found | plain("PSNR", min(psnr(video, truth), 99.0), video, fps)


def upsampler_rows() -> Iterator[Row]:
    """Table 3, left: from real small frames."""
    t = lesson07.Config().frames

    def real(w: World) -> torch.Tensor:
        return real_clips(w, t, w.config.final_fps, w.upsampler_source, max(2, w.config.samples // 2))

    def bilinear(w: World) -> torch.Tensor:
        small = lesson07.shrink(real(w))
        return F.interpolate(small.flatten(0, 1), scale_factor=4, mode="bilinear").unflatten(0, small.shape[:2])

    def upsampled(w: World, video: bool) -> torch.Tensor:
        run, config, model = w.upsampler()
        clips = enumerate(lesson07.shrink(real(w)))
        return torch.stack(
            [torch.stack(list(lesson07.upsample(model, config, clip, run, i, video=video))) for i, clip in clips]
        )

    def numbers(w: World, video: torch.Tensor) -> dict[str, dict]:
        return against_truth(w, video, real(w), w.config.final_fps, w.upsampler_source)

    yield Row("real", "the large frames themselves: the floor", lambda w: numbers(w, real(w)))
    yield Row("bilinear", "no model", lambda w: numbers(w, bilinear(w)))
    yield Row("image upsampler", "every frame on its own", lambda w: numbers(w, upsampled(w, False)),
              "FVD 165.98, FID 19.71")
    yield Row("video upsampler", "with temporal layers", lambda w: numbers(w, upsampled(w, True)),
              "FVD 45.39, FID 19.85")


def decoder_rows() -> Iterator[Row]:
    """Tables 3 (right), 11 and 14: real clips through the encoder and back."""
    t = lesson04.Config().frames

    def real(w: World) -> torch.Tensor:
        return real_clips(w, t, w.config.final_fps)

    @torch.no_grad()
    def through(w: World, image_critic: bool | None) -> torch.Tensor:
        image, run, clips = w.image(), w.run, []
        autoencoder = image.autoencoder
        if image_critic is not None:
            run, _, autoencoder = w.decoder(image_critic)
            lesson04.set_frames(autoencoder, t)
        for part in real(w).split(16):
            with run.autocast():
                frames = autoencoder.decode(image.encode(part)).float().cpu().clamp(-1, 1)
            clips.append(rearrange(frames, "(b t) c h w -> b t c h w", t=t))
        return torch.cat(clips)

    def numbers(w: World, video: torch.Tensor) -> dict[str, dict]:
        return against_truth(w, video, real(w), w.config.final_fps)

    yield Row("real", "not encoded at all: the floor", lambda w: numbers(w, real(w)))
    yield Row("image decoder", "every frame on its own", lambda w: numbers(w, through(w, None)),
              "FVD 390.88, FID 7.61")
    yield Row("video decoder", "fine-tuned with a video discriminator", lambda w: numbers(w, through(w, False)),
              "FVD 32.94, FID 9.17")
    yield Row("video decoder, both critics", "and with an image discriminator", lambda w: numbers(
        w, through(w, True)), "FVD 51.01, FID 9.04")


def alpha_rows() -> Iterator[Row]:
    """App. I.3.2: are single frames as good as the image model's?"""
    yield Row("alpha = 1", "the frozen image model", lambda w: score(w, independent(w), key_rate(w)), "FID 47.00")
    yield Row("learned alpha", "frames of the video model", lambda w: score(w, generated(w), key_rate(w)), "FID 48.26")
    yield Row("learned alpha, longer", f"after {LONGER} times the steps, the last at a lower rate", lambda w: score(
        w, generated(w, "longer"), key_rate(w)), "FID 48.26")


def rollout_rows() -> Iterator[Row]:
    """Sec. 3.2: long videos by iteration. Distances of windows over time; four videos of 300 s by statistics only."""

    def roll(w: World, guidance: float, overlap: int, count: int, frames: int) -> torch.Tensor:
        run, _, image, _ = w.prediction()
        first = first_frames(w, "", conditions(count), 1.0, 5000)
        z = continued(w, "", first, conditions(count), frames, guidance, 5000, overlap)
        return decoded(image, run, z)

    def numbers(w: World, guidance: float, overlap: int) -> dict[str, dict]:
        fps, t, small = key_rate(w), w.config.frames, w.config.preset == "smoke"
        length, longest = (2 * t, 3 * t) if small else (round(60 * fps), round(300 * fps))
        video, found = roll(w, guidance, overlap, w.config.rollouts, length), {}
        for end in dict.fromkeys(max(t, min(round(s * fps), length)) for s in (5, 10, 20, 30, 40, 50, 60)):
            window = score(w, video[:, end - t : end], fps)
            distances = [m for m in window if m.endswith(("FVD", "FID"))]
            found |= {f"{m}, to {end / fps:.0f} s": window[m] for m in distances}
        return found | drift(video, fps, "60 s") | drift(roll(w, guidance, overlap, 4, longest), fps, "300 s")

    for guided in (False, True):
        for overlap in (1, 2):
            what = f"iterated with {overlap} known frame{'s' * (overlap - 1)}" + ", context guidance" * guided
            yield Row(f"S = {overlap}" + ", guided" * guided, what, lambda w, g=guided, s=overlap: numbers(
                w, w.config.guidance if g else 1.0, s))


def drift(video: torch.Tensor, fps: float, name: str) -> dict[str, dict]:
    """Colour, sharpness and frame difference: the last quarter against the first."""
    quarter = max(2, video.shape[1] // 4)
    first, last = video[:, :quarter], video[:, -quarter:]
    found = plain(f"drift of colour, {name}",
                  float((last.mean(dim=(1, 3, 4)) - first.mean(dim=(1, 3, 4))).abs().mean()), video, fps)
    found |= plain(f"sharpness, last over first, {name}",
                   float(sharpness(last).mean() / sharpness(first).mean()), video, fps)
    return found | plain(f"frame difference, last over first, {name}",
                         float(last.diff(dim=1).abs().mean() / first.diff(dim=1).abs().mean()), video, fps)


def future_rows() -> Iterator[Row]:
    """Sec. 3.2: several futures of one frame, diversity against quality, over the scale of context guidance."""

    def numbers(w: World, guidance: float) -> dict[str, dict]:
        run, _, image, _ = w.prediction()
        each = min(4, w.config.samples)
        starts = asked(w).pick(range(w.config.samples // each))

        def part(labels: Clips, start: int) -> torch.Tensor:
            first = image.encode(labels.video[:, :1])
            return decoded(image, run, continued(w, "", first, labels, w.config.frames, guidance, start))

        video = in_parts(starts.repeat(each), part)
        last = rearrange(video[:, -1], "(b n) c h w -> b n c h w", n=each)
        return score(w, video, key_rate(w)) | plain("spread", float(last.std(1).mean()), video, key_rate(w))

    for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
        yield Row(f"scale {scale:g}", "four futures each of real first frames", lambda w, s=scale: numbers(w, s))


def interpolation_rows(passes: int) -> Iterator[Row]:
    """Sec. 3.3: what stands between real frames, after one pass (a quarter of the final rate) or two."""
    t = 4**passes + 1

    def rate(w: World) -> float:
        return w.config.final_fps / 4 ** (2 - passes)

    def real(w: World) -> Clips:
        return w.keep(("ends", passes), lambda: w.source.clips(
            (OTHER_REAL, w.seed, 2), w.config.samples, t, rate(w), "held-out"))

    def ours(w: World) -> torch.Tensor:
        run, config, model = w.interpolation()
        image = w.image()

        def part(labels: Clips, start: int) -> torch.Tensor:
            z = rearrange(image.encode(labels.video[:, [0, -1]]), "(b t) c h w -> b t c h w", t=2)
            for stage in range(passes):  # the second pass works on what the first one made
                pairs = z.shape[1] - 1
                ends = z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1)
                out = lesson06.between(model, image, *ends, stage, labels.repeat(pairs), config, run, start, stage)
                out = rearrange(out, "(b p) t c h w -> b p t c h w", p=pairs)
                z = torch.cat([out[:, :, :-1].flatten(1, 2), out[:, -1, -1:]], dim=1)
            return decoded(image, run, z)

        return in_parts(real(w), part)

    def decoded_truth(w: World) -> torch.Tensor:  # what can be reached on these latents, and where the blend begins
        image = w.image()

        def part(labels: Clips, start: int) -> torch.Tensor:
            with w.run.autocast():
                return image.decode(image.encode(labels.video), t)

        return in_parts(real(w), part)

    def blend(w: World) -> torch.Tensor:
        ends, weight = decoded_truth(w)[:, [0, -1]], torch.linspace(0, 1, t).view(1, -1, 1, 1, 1)
        return (1 - weight) * ends[:, :1] + weight * ends[:, 1:]

    def alone(w: World) -> torch.Tensor:
        image, ends = w.image(), decoded_truth(w)[:, [0, -1]]

        def part(labels: Clips, start: int) -> torch.Tensor:
            z = lesson02.sample_images(image.unet(), image, labels.repeat(t - 2), 1.0, w.run, w.config.ddim_steps,
                                       1.0, "between", start)
            between = decoded(image, w.run, rearrange(z, "(b t) c h w -> b t c h w", t=t - 2))
            first, last = ends[start : start + len(labels)].split(1, dim=1)
            return torch.cat([first, between, last], dim=1)

        return in_parts(real(w), part)

    def numbers(w: World, video: torch.Tensor) -> dict[str, dict]:
        truth, middle = real(w).video, slice(t // 2, t // 2 + 1)
        sharp = float(sharpness(video[:, middle]).mean() / sharpness(truth[:, middle]).mean())
        found = against_truth(w, video, truth, rate(w))
        return found | plain("gradient of the middle over real", sharp, video, rate(w))

    yield Row("real", "the true frames", lambda w: numbers(w, real(w).video))
    yield Row("autoencoder", "the true frames, encoded and decoded", lambda w: numbers(w, decoded_truth(w)))
    yield Row("ours", f"the interpolation model, {passes} pass{'es' * (passes - 1)}", lambda w: numbers(w, ours(w)))
    yield Row("linear blend", "of the two decoded end frames", lambda w: numbers(w, blend(w)))
    yield Row("image model alone", "every frame between on its own", lambda w: numbers(w, alone(w)))


def obeyed(world: World, video: torch.Tensor, asked_for: Clips) -> dict[str, dict]:
    """Is what was asked for seen in single frames, n 1 3 H W?"""
    reading = read(world.run, world.frame_reader, video)
    counted = torch.stack([asked_for.cars.float(), reading.car_count.float()])
    values = {
        "night, accuracy": float(((reading.night > 0.5).long() == asked_for.night).float().mean()),
        "cars, correlation": float(torch.corrcoef(counted)[0, 1].nan_to_num()) if len(video) > 1 else 0.0,
        "cars, mean error": float((counted[0] - counted[1]).abs().mean()),
        "boxes, IoU": box_iou(reading, asked_for.boxes[:, 0]),
    }
    found: dict[str, dict] = {}
    for metric, value in values.items():
        found |= plain(metric, value, video, 0, network_name(world, metric))
    return found


def control_rows() -> Iterator[Row]:
    """Sec. 4.1: are night, crowdedness and boxes obeyed? Read off single frames, and off the last frame of clips."""

    def images(w: World, variant: str, guidance: float) -> torch.Tensor:
        image = w.image(variant)

        def part(labels: Clips, start: int) -> torch.Tensor:
            key = ("control", variant, start)
            steps = w.config.ddim_steps
            z = lesson02.sample_images(image.unet(), image, labels, guidance, w.run, steps, 1.0, *key)
            return decoded(image, w.run, z[:, None])

        return w.keep(("images", variant, guidance), lambda: in_parts(asked(w), part))

    def others(w: World) -> Clips:
        return asked(w).pick([(i + 1) % len(asked(w)) for i in range(len(asked(w)))])

    def boxes(w: World) -> dict[str, dict]:
        if w.seed == 0 or not (Path(w.config.results) / "boxes.png").exists():
            draw_boxes(w, images(w, "boxes", 2.0))
        return obeyed(w, images(w, "boxes", 2.0), asked(w))

    yield Row("real frames", "what the reader itself gets right", reader_check)
    yield Row("labels", "images told night and number of cars", lambda w: obeyed(w, images(w, "", 1.0), asked(w)))
    yield Row("labels, guided", "the same with classifier-free guidance, scale 2", lambda w: obeyed(
        w, images(w, "", 2.0), asked(w)))
    yield Row("labels, last frame", "the last frame of conditional clips", lambda w: obeyed(
        w, generated(w, conditional=True)[:, -1:], asked(w)))
    yield Row("labels, chance", "guided images judged by another image's labels", lambda w: obeyed(
        w, images(w, "", 2.0), others(w)))
    yield Row("boxes", "images told where cars are", lambda w: obeyed(w, images(w, "boxes", 1.0), asked(w)))
    yield Row("boxes, guided", "the same with classifier-free guidance, scale 2", boxes)
    yield Row("boxes, chance", "guided images judged by another image's boxes", lambda w: obeyed(
        w, images(w, "boxes", 2.0), others(w)))


def draw_boxes(world: World, images: torch.Tensor) -> None:
    """results/boxes.png: four scenes a row each; the real frame, its boxes, the image made from them, two futures."""
    clips, (run, _, image, _), rows = asked(world), world.prediction(), []
    height, width = images.shape[-2:]
    for i in clips.cars.argsort(descending=True, stable=True)[:4].tolist():
        outline = -torch.ones(3, height, width)
        corners = clips.boxes[i, 0] * torch.tensor([width, height, width, height])
        for x0, y0, x1, y1 in corners[corners.any(1)].round().long().tolist():  # the other slots hold no car
            outline[:, y0:y1, x0:x1] = 1
            outline[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = -1
        first = image.encode(images[[i, i]])
        futures = decoded(image, run, continued(world, "", first, clips.pick([i, i]), 4, 1.0, 7000 + i))
        rows.append(torch.cat([clips.video[i, :1], outline[None], images[i], futures[0, 1:4], futures[1, 1:4]]))
    folder = Path(world.config.results)
    folder.mkdir(parents=True, exist_ok=True)
    sheet(rows, folder / "boxes.png")


def from_captions(world: World, count: int, guidance: float, times: int = 1, wider: int = 1, reach: int = 0,
                  alone: bool = False) -> torch.Tensor:
    """The first `count` captions that are asked for as clips, n t 3 H W, of `times` the trained length, `wider` times
    as large; alone: every frame on its own, by the text-to-image model."""

    def part(labels: Clips, start: int) -> torch.Tensor:
        run, config, image, unet = world.text_to_video()
        config = dataclasses.replace(config, guidance=guidance)
        if alone:
            frames = labels.repeat(world.config.frames)
            z = lesson02.sample_images(image.unet(), image, frames, guidance, run, config.ddim_steps, 1.0, start)
            return decoded(image, run, rearrange(z, "(b t) c h w -> b t c h w", t=world.config.frames))
        text = lesson09.tokens(image.conditioner, labels)
        z = lesson09.sample_key_frames(unet, image, text, text, times * world.config.frames, config, run, start, times,
                                       wider, wider=wider, reach=reach)
        return decoded(image, run, z)

    def make() -> torch.Tensor:
        return in_parts(asked(world).pick(range(count)), part, max(1, 64 // times // wider**2))

    return world.keep(("captions", count, guidance, times, wider, reach, alone), make)


def text_rows() -> Iterator[Row]:
    """Sec. 4.2, and in the manner of Tables 4 (IS, FVD) and 5 (CLIPSIM): videos of held-out captions."""

    def numbers(w: World, video: torch.Tensor, shift: int = 0) -> dict[str, dict]:
        captions = asked(w).captions[shift:] + asked(w).captions[:shift]
        middle, found = video[:, w.config.frames // 2], score(w, video, key_rate(w))
        found |= clipsim(w, "CLIPSIM", video, captions)
        for what, share in captions_obeyed(w.run, w.scene_reader, middle, captions).items():
            found |= plain(f"{what}, obeyed", share, video, 0, f"SceneReader {checksum(w.scene_reader)}")
        return found

    def ours(w: World, guidance: float) -> torch.Tensor:
        return from_captions(w, w.config.samples, guidance)

    yield Row("real", "the captioned clips themselves", lambda w: numbers(w, asked(w).video))
    yield Row("text-to-image, every frame alone", "the backbone without temporal layers, scale 3", lambda w: numbers(
        w, from_captions(w, w.config.samples, 3.0, alone=True)))
    for scale in (1.0, 3.0, 6.0):
        paper = "UCF-101: IS 33.45, FVD 550.61; MSR-VTT: CLIPSIM 0.2929" if scale == 3 else ""
        yield Row(f"text-to-video, scale {scale:g}", "guided by the text", lambda w, s=scale: numbers(w, ours(w, s)),
                  paper)
    yield Row("text-to-video, chance", "scale 3, judged by other captions", lambda w: numbers(w, ours(w, 3.0), 1))


def beyond_rows() -> Iterator[Row]:
    """App. D: more and larger frames than trained, in one pass. The last frames of long clips are judged, and large
    frames brought to the trained size, so that all rows have one protocol."""

    def numbers(w: World, **options: int) -> dict[str, dict]:
        video = from_captions(w, max(2, w.config.samples // 2), 1.0, **options)
        if wider := options.get("wider"):
            video = F.avg_pool2d(video.flatten(0, 1), wider).unflatten(0, video.shape[:2])
        return score(w, video[:, -w.config.frames :], key_rate(w))

    yield Row("real", "other real clips: the floor", lambda w: score(
        w, real_clips(w, w.config.frames, key_rate(w), count=max(2, w.config.samples // 2)), key_rate(w)))
    yield Row("as trained", "8 frames of the trained size, unguided", lambda w: numbers(w))
    for times in (2, 4):
        yield Row(f"{times} times as long", "attention over all frames", lambda w, t=times: numbers(w, times=t))
        yield Row(f"{times} times as long, masked", "attention within a distance of 8", lambda w, t=times: numbers(
            w, times=t, reach=8))
    for wider in (2, 4):
        yield Row(f"{wider} times as wide", "and as high", lambda w, s=wider: numbers(w, wider=s))


TABLES: dict[str, tuple[str, list[Row]]] = {
    "checks": ("Self-checks of the metrics", list(check_rows())),
    "conditional": ("Table 1, left: with and without labels", list(conditional_rows())),
    "ablations": ("Table 1, right: ablations", list(ablation_rows())),
    "upsampler": ("Table 3, left: upsampler", list(upsampler_rows())),
    "decoder": ("Tables 3 (right), 11 and 14: decoder", list(decoder_rows())),
    "alpha": ("App. I.3.2: single frames with alpha = 1 and with learned alpha", list(alpha_rows())),
    "rollouts": ("Sec. 3.2: long prediction", list(rollout_rows())),
    "futures": ("Sec. 3.2: several futures, diversity against quality", list(future_rows())),
    "interpolation-5": ("Sec. 3.3: 5 frames at a quarter of the final rate", list(interpolation_rows(1))),
    "interpolation-17": ("Sec. 3.3: 17 frames at the final rate", list(interpolation_rows(2))),
    "control": ("Sec. 4.1: control", list(control_rows())),
    "text": ("Sec. 4.2, Tables 4 and 5 in miniature: text to video", list(text_rows())),
    "beyond": ("App. D: longer and larger than trained", list(beyond_rows())),
}


# %% What the paper says, as orderings and equivalences that can fail


@dataclass(frozen=True)
class Claim:
    """In `table`, row `better` has the lower `metric`; or, with equal, the two do not differ."""

    table: str
    metric: str
    better: str
    worse: str
    paper: str
    equal: bool = False


CLAIMS = (
    Claim("ablations", "toy-FVD", "ours", "pixel", "534 < 640"),
    Claim("ablations", "toy-FVD", "ours", "end-to-end", "534 < 1155"),
    Claim("ablations", "toy-FVD", "ours", "attention", "534 < 704"),
    Claim("ablations", "toy-FVD", "ours, guided", "ours", "509 < 534"),
    Claim("conditional", "toy-FVD", "conditional", "unconditional", "356 < 389"),
    Claim("upsampler", "toy-FVD", "video upsampler", "image upsampler", "45 < 166"),
    Claim("decoder", "toy-FVD", "video decoder", "image decoder", "33 < 391"),
    Claim("decoder", "toy-FVD", "video decoder", "video decoder, both critics", "33 < 51"),
    Claim("alpha", "toy-FID", "alpha = 1", "learned alpha", "47.00, 48.26", equal=True),
    Claim("alpha", "toy-FID", "alpha = 1", "learned alpha, longer", "47.00, 48.26", equal=True),
    Claim("upsampler", "toy-FID", "image upsampler", "video upsampler", "19.71, 19.85", equal=True),
    Claim("decoder", "toy-FID", "video decoder, both critics", "video decoder", "9.04, 9.17", equal=True),
)


@dataclass
class Verdict:
    claim: Claim
    differences: list[float]  # worse minus better, one a seed
    floor: float  # of an equivalence: how far real clips are from other real clips
    holds: bool

    @property
    def word(self) -> str:
        judged = "**fails**" if len(self.differences) >= 3 else "fewer than 3 seeds, not judged"
        return "holds" if self.holds else judged

    def __str__(self) -> str:
        c, mean, spread = self.claim, statistics.fmean(self.differences), deviation(self.differences)
        verdict = self.word
        if c.equal:
            said = f"{c.better} and {c.worse} differ by {mean:+.3g} ± {spread:.2g} in {c.metric}"
            return f"{said}; real clips differ from real ones by {self.floor:.3g} (paper: {c.paper}): {verdict}"
        said = f"{c.better} is below {c.worse} in {c.metric} by {mean:.3g} ± {spread:.2g}"
        return f"{said} (paper: {c.paper}): {verdict}"


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def judge(records: list[dict]) -> list[Verdict]:
    """An ordering holds when the paired difference has one sign in all seeds and exceeds twice its standard error; an
    equivalence, when the mean difference is smaller than the distance of real clips from other real clips."""
    verdicts = []
    for claim in CLAIMS:
        better, worse = (by_seed(records, claim.table, row, claim.metric) for row in (claim.better, claim.worse))
        seeds = sorted(set(better) & set(worse))
        if not seeds:
            continue
        differences = [worse[seed] - better[seed] for seed in seeds]
        mean, error = statistics.fmean(differences), deviation(differences) / len(seeds) ** 0.5
        floors = by_seed(records, "conditional" if claim.table == "alpha" else claim.table, "real", claim.metric)
        floor = statistics.fmean(floors.values()) if floors else 0.0
        holds = len(seeds) >= 3 and (abs(mean) < floor if claim.equal else min(differences) > 0 and mean > 2 * error)
        verdicts.append(Verdict(claim, differences, floor, holds))
    return verdicts


def by_seed(records: list[dict], table: str, row: str, metric: str) -> dict[int, float]:
    found = [r for r in records if (r["table"], r["row"]) == (table, row) and metric in r["numbers"]]
    return {r["seed"]: r["numbers"][metric]["value"] for r in found}


def self_checks(records: list[dict]) -> list[tuple[str, bool]]:
    """What the metrics must do on sets whose order is known, by more than the spread over the seeds, and what only time
    tells by a wide margin; and the size of their bias."""

    def values(row: str, metric: str) -> list[float]:
        return list(by_seed(records, "checks", row, metric).values())

    def above(worse: str, better: str, metric: str) -> bool:
        differences = [a - b for a, b in zip(values(worse, metric), values(better, metric), strict=False)]
        return bool(differences) and min(differences) > 0 and statistics.fmean(differences) > deviation(differences)

    found: list[tuple[str, bool]] = []
    for metric in ("toy-FVD", "toy-FID", "FVD", "FID"):
        floors = values("real against real", metric)
        if not floors:
            continue
        itself, floor = values("real against itself", metric), statistics.fmean(floors)
        found.append((f"{metric} of a set against itself is 0", all(abs(v) < 1e-3 for v in itself)))
        for worse, better in (("more noise", "little noise"), ("little noise", "real against real"),
                              ("blur", "real against real"), ("fewer cars", "real against real")):
            found.append((f"{worse} raises {metric} above {better}", above(worse, better, metric)))
        of_clips = metric.endswith("FVD")
        for row in (*TIMELESS, "jitter of 5 levels") if of_clips else TIMELESS:
            times = statistics.fmean(values(row, metric) or [math.nan]) / floor
            margin = "at least 10" if of_clips else "at most 2"
            found.append((f"{row}: {metric} is {times:.2g} times that of real clips ({margin})",
                          times >= 10 if of_clips else times <= 2))
        half = statistics.fmean(values("real, half as many", metric) or [0.0])
        bias = f"{floor:.3g} at the sample count used, {half:.3g} at half of it"
        found.append((f"{metric} of real against other real clips, its bias, is {bias}", True))
    return found


# %% Writing: tables.md and figures


def mean_and_deviation(values: dict[int, float]) -> str:
    if not values:
        return ""
    mean, spread = statistics.fmean(values.values()), deviation(list(values.values()))
    mean = 0.0 if abs(mean) < 1e-6 else mean
    return f"{mean:.3g} ± {spread:.2g}" if len(values) > 1 else f"{mean:.3g}"


def markdown(results: dict) -> str:
    """Every table with mean ± standard deviation over the seeds, and what was found in a sentence a row."""
    records, verdicts, lines = results["records"], judge(results["records"]), []
    for name, (title, rows) in TABLES.items():
        mine = [r for r in records if r["table"] == name]
        if not mine:
            continue
        metrics = list(dict.fromkeys(metric for r in mine for metric in r["numbers"]))
        for metric in metrics:
            if name != "checks":  # which compare sets of different size on purpose
                same_protocol([r["numbers"][metric] for r in mine if metric in r["numbers"]])
        seeds = sorted({r["seed"] for r in mine})
        lines += [f"### {title}", "", f"`python 12_tables.py --table {name}`, seeds {', '.join(map(str, seeds))}", ""]
        lines += ["| row | " + " | ".join(metrics) + " | paper |", "| --- " * (len(metrics) + 2) + "|"]
        for row in rows:
            cells = [mean_and_deviation(by_seed(records, name, row.name, metric)) for metric in metrics]
            if any(cells) or not row.measure:
                lines.append(f"| {row.name} | " + " | ".join(cells) + f" | {row.paper} |")
        lines += ["", *(f"- {sentence}" for sentence in sentences(records, name, rows, verdicts)), ""]
        lines += [f"![{title}]({name}.png)", ""]
    return "\n".join(lines)


def sentences(records: list[dict], table: str, rows: list[Row], verdicts: list[Verdict]) -> Iterator[str]:
    """One sentence a row: the verdicts it stands in, or else how far it is from the floor."""
    metric = "toy-FVD"
    floor = by_seed(records, table, "real", metric)
    for row in rows:
        values = by_seed(records, table, row.name, metric)
        mine = [v for v in verdicts if v.claim.table == table and v.claim.better == row.name]
        said = f"**{row.name}** ({row.what})"
        if mine:
            yield f"{said}: " + "; ".join(map(str, mine)) + "."
        elif values and floor and row.name != "real":
            ratio = [values[seed] / floor[seed] for seed in values if floor.get(seed)]
            if ratio:
                yield f"{said}: {metric} is {statistics.fmean(ratio):.3g} times the floor."
        elif found := next((r for r in records if (r["table"], r["row"]) == (table, row.name)), None):
            values = {m: mean_and_deviation(by_seed(records, table, row.name, m)) for m in list(found["numbers"])[:2]}
            yield f"{said}: " + ", ".join(f"{m} {v}" for m, v in values.items()) + "."


def verdict(records: list[dict]) -> str:
    """The README's sentence: how many claims hold."""
    seeds, verdicts = {r["seed"] for r in records}, judge(records)
    if len(seeds) < 3:
        return f"**Only {len(seeds)} of 3 seeds so far, so nothing is judged yet.**"
    orderings, equivalences = ([v.holds for v in verdicts if v.claim.equal == equal] for equal in (False, True))
    return (f"Of the paper's orderings {sum(orderings)} of {len(orderings)} hold here, of its equivalences "
            f"{sum(equivalences)} of {len(equivalences)}.")


def summary(results: dict) -> str:
    """tables.md: what was found, claim by claim, and the tables."""
    verdicts = judge(results["records"])
    lines = [
        "# Does each piece matter?", "",
        f"{verdict(results['records'])} An ordering holds when the paired difference has the same sign in every seed "
        "and exceeds twice its standard error; an equivalence, when the difference is smaller than the distance of "
        "real clips from other real clips. toy-FVD and toy-FID are distances in features of small networks trained "
        "here; they rank the rows of a table and cannot be compared with published numbers.", "",
        "| claim | difference over the seeds | paper | |", "| --- | --- | --- | --- |",
    ]
    failed = [statement for statement, good in self_checks(results["records"]) if not good]
    passed = f"All {len(self_checks(results['records']))} self-checks of the metrics hold."
    checked = f"Self-checks of the metrics that do **not** hold: {'; '.join(failed)}." if failed else passed
    for v in verdicts:
        c, sign = v.claim, "equals" if v.claim.equal else "below"
        each = mean_and_deviation(dict(enumerate(v.differences)))
        lines.append(f"| {c.better} {sign} {c.worse}, {c.metric} | {each} | {c.paper} | {v.word} |")
    readers = {(r["numbers"]["toy-FVD"]["protocol"]["network"], r["table"]) for r in results["records"]
               if "toy-FVD" in r["numbers"]}
    checks = {network for network, table in readers if table == "checks"}
    if others := sorted({table for network, table in readers if network not in checks} if checks else ()):
        checked += (f" They are of the clip reader in checkpoints/; the toy-FVD of the tables {', '.join(others)} was "
                    "read by an earlier one, which hardly saw time, and waits to be measured again.")
    return "\n".join([*lines, "", checked, "", markdown(results)])


def render(config: Config, results: dict) -> None:
    """tables.md and figures."""
    folder = Path(config.results)
    write_text(folder / "tables.md", summary(results) + "\n")
    for name, (title, rows) in TABLES.items():
        draw_table(results["records"], name, title, rows, folder)
    print(f"written: {folder}/tables.md and its figures")


def draw_table(records: list[dict], name: str, title: str, rows: list[Row], folder: Path) -> None:
    """Bars with standard deviations over the seeds; lines over time for the rollouts."""
    mine, rows = [r for r in records if r["table"] == name], [row for row in rows if row.measure]
    metrics = list(dict.fromkeys(metric for r in mine for metric in r["numbers"]))
    if not mine:
        return
    if name == "rollouts":
        return draw_rollouts(records, rows, metrics, title, folder)
    chosen = [m for m in metrics if m != "IS"][:4]
    height = 0.6 + 0.3 * len(rows)  # inches
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.2 * len(chosen), height), sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], chosen, strict=True):
        for place, row in enumerate(rows):
            values = list(by_seed(records, name, row.name, metric).values())
            if values:
                axis.barh(place, statistics.fmean(values), xerr=deviation(values), color="C0", alpha=0.7, capsize=2)
                axis.plot(values, [place] * len(values), ".", color="0.2", markersize=3)
        axis.set(title=metric, yticks=range(len(rows)), yticklabels=[row.name for row in rows])
    axes[0, 0].invert_yaxis()
    figure.suptitle(title, y=1 + 0.3 / height)  # 0.3 inches above, clear of the names of the columns
    save_figure(figure, folder / f"{name}.png")


def draw_rollouts(records: list[dict], rows: list[Row], metrics: list[str], title: str, folder: Path) -> None:
    distances = list(dict.fromkeys(m.split(",")[0] for m in metrics if ", to " in m))
    figure, axes = plt.subplots(1, len(distances), figsize=(4 * len(distances), 3), squeeze=False)
    for axis, distance in zip(axes[0], distances, strict=True):
        for row in rows:
            points = {
                float(m.split(" to ")[1].removesuffix(" s")): list(by_seed(records, "rollouts", row.name, m).values())
                for m in metrics if m.startswith(f"{distance}, to ")
            }
            points = {second: values for second, values in points.items() if values}
            if points:
                axis.errorbar(list(points), [statistics.fmean(v) for v in points.values()],
                              [deviation(v) for v in points.values()], label=row.name, capsize=2)
        axis.set(title=distance, xlabel="seconds")
    axes[0, 0].legend()
    figure.suptitle(title)
    save_figure(figure, folder / "rollouts.png")


# %% Running


def read_results(config: Config) -> dict:
    """The results file, or an empty one. One made with other settings is a UserError."""
    path = Path(config.results) / "tables.json"
    settings = {k: getattr(config, k) for k in ("preset", "height", "width", "frames", "samples", "references",
                                                "rollouts", "ddim_steps", "guidance", "detector")}
    if not path.exists():
        return {"settings": settings, "records": []}
    try:
        results = json.loads(path.read_text())
        theirs = results["settings"]
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged; move it away or give another --results") from None
    if not config.render and theirs != settings:
        changed = ", ".join(f"{k} {theirs.get(k)} -> {v}" for k, v in settings.items() if theirs.get(k) != v)
        raise UserError(f"{path} was made with other settings ({changed}); give another --results")
    return results


def check(config: Config) -> None:
    """Everything that would go wrong after hours, before they are spent."""
    for name in config.table:
        if name not in TABLES:
            raise UserError(f"--table {name}: there is {', '.join(TABLES)}")
    fewest = min(config.samples // 2, config.rollouts)  # the upsampler's table judges half as many clips
    if config.preset != "smoke" and fewest <= ClipReader.FEATURES:
        raise UserError(f"--samples {config.samples} --rollouts {config.rollouts}: a covariance of clip features, "
                        f"{ClipReader.FEATURES} wide, needs more clips (samples count half in one table)")
    if config.data != "driving":
        raise UserError(f"--data {config.data}: the tables are of procedural scenes; folders go with --protocol")
    if config.detector != "toy" and config.frames < 16:
        raise UserError(f"--frames {config.frames}: a detector is given clips of 16 (add --frames 16 --samples 2048)")
    if config.detector != "toy":
        Detector(config.detector, torch.device("cpu"))  # whether it can be read and applied


def show_plan(config: Config) -> None:
    """--dry-run: settings, parameters and rows."""
    for name, value in dataclasses.asdict(config).items():
        print(f"{name}: {value}")
    for name, count in trained_parameters(config).items():
        print(f"{name} trained: {count}")
    for name in config.table or TABLES:
        print(f"{name}: {', '.join(row.name for row in TABLES[name][1])}")


def add_rows(config: Config, mine: list[dict]) -> dict:
    """Writes what was measured here into the results file, to which other processes may have added meanwhile."""
    results = read_results(config)
    rows = {(r["seed"], r["table"], r["row"]): r for r in [*results["records"], *mine]}
    order = {(name, row.name): i for i, (name, row) in enumerate((n, r) for n in TABLES for r in TABLES[n][1])}
    results["records"] = sorted(rows.values(), key=lambda r: (r["seed"], order.get((r["table"], r["row"]), 0)))
    Path(config.results).mkdir(parents=True, exist_ok=True)
    write_text(Path(config.results) / "tables.json", json.dumps(results, indent=1) + "\n")
    return results


def run_tables(config: Config) -> dict:
    """Measures the rows that are missing. Seeds may be measured side by side, each by a process of its own."""
    results, mine = read_results(config), []
    names = config.table or tuple(TABLES)
    plan = [(seed, name, row) for seed in config.seeds for name in names for row in TABLES[name][1] if row.measure]
    done = {(r["seed"], r["table"], r["row"]) for r in results["records"]}
    left = [(seed, name, row) for seed, name, row in plan if (seed, name, row.name) not in done]
    bar = tqdm(left, initial=len(plan) - len(left), total=len(plan), desc="rows")
    world: World | None = None
    for seed, name, row in bar:
        bar.set_postfix_str(f"seed {seed}, {name}: {row.name}")
        if world is None or world.seed != seed:
            world = None  # lets go of one seed's models and clips before the next one's
            world = World(config, seed)
        start = time.time()
        numbers = row.measure(world)
        for metric, found in numbers.items():
            if not abs(found["value"]) < float("inf"):
                raise UserError(f"table {name}, row {row.name}, seed {seed}: {metric} is {found['value']}")
        mine.append(
            {"table": name, "row": row.name, "seed": seed, "numbers": numbers, "seconds": round(time.time() - start, 1),
             "made": datetime.date.today().isoformat(), "hardware": hardware(world)}
        )
        add_rows(config, mine)
    return add_rows(config, mine)


def hardware(world: World) -> str:
    device = world.run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, {str(world.run.dtype).removeprefix('torch.')}, torch {torch.__version__}, {platform.machine()}"


# %% Folders of videos: the protocols of Tables 4 and 5


def windows(folder: str, count: int, frames: int, fps: float, size: int,
            run: Run) -> Iterator[tuple[torch.Tensor, str]]:
    """`count` random windows (1 t 3 size size) of the videos of a folder, each video in turn, with its caption."""
    source = VideoFolder(Path(folder), size, size, fps)
    usable = [r for r in source.recordings if not r.problem(frames, fps)]
    if not usable:
        raise UserError(f"{folder}: no video has {frames} frames at {fps:g} fps")
    for i in range(count):
        recording = usable[i % len(usable)]
        free = max(recording.seconds - (frames - 1) / fps, 0.0)
        start = recording.times[0] + free * float(torch.rand((), generator=run.generator("window", folder, i)))
        pixels = source.frames(recording, nearest(recording.times, start + np.arange(frames) / fps))
        yield rearrange(torch.from_numpy(pixels.copy()), "t h w c -> 1 t c h w").float() / 127.5 - 1, recording.caption


def judge_folders(config: Config) -> None:
    """Table 4 (UCF-101: FVD, 16 frames, 10k clips) or Table 5 (MSR-VTT: CLIPSIM, 16 frames) for the user's folders."""
    needs = {
        "ucf101": {"--data REAL (folder of UCF-101 videos)": config.data != "driving",
                   "--generated FOLDER (10,000 videos, prompted with the class names)": config.generated,
                   "--detector FILE (TorchScript I3D)": config.detector != "toy"},
        "msrvtt": {"--generated FOLDER (2,990 videos, each with its caption in NAME.txt)": config.generated,
                   "--clip FOLDER (CLIP ViT-B/32 in transformers' layout)": config.clip},
    }[config.protocol]
    if missing := [what for what, given in needs.items() if not given]:
        raise UserError(f"--protocol {config.protocol} also needs {'; '.join(missing)}")
    run, frames, fps = Run(NAME, config), 16, config.final_fps
    count = 10 if config.preset == "smoke" else {"ucf101": 10_000, "msrvtt": 2990}[config.protocol]
    if config.protocol == "ucf101":
        detector = Detector(config.detector, run.device)
        sets = [
            torch.cat([detector.features(clip) for clip, _ in windows(folder, count, frames, fps, 224, run)])
            for folder in (config.generated, config.data)
        ]
        name = "FVD" if detector.of_clips else "FID"
        network = f"{config.detector} {detector.checksum}"
        about = Protocol(name, network, frames, fps, "224 x 224", count, count, config.data)
        print(f"{name}: {frechet_distance(*sets):.2f}   ({about})")
        return print("paper, FVD: 550.61 with SD 2.1, 656.49 with SD 1.4; Make-A-Video 367.23, CogVideo 701.59")
    similarity, total = load_clip(config.clip), 0.0
    for clip, caption in windows(config.generated, count, frames, fps, 224, run):
        if not caption:
            raise UserError(f"{config.generated}: every video needs its caption in NAME.txt or labels.csv")
        total += similarity(clip, [caption])
    about = Protocol("CLIPSIM", config.clip, frames, fps, "224 x 224", count, 0, config.generated)
    print(f"CLIPSIM: {total / count:.4f}   ({about})")
    print("paper: 0.2929 with SD 2.1, 0.2848 with SD 1.4; Make-A-Video 0.3049, CogVideo 0.2631")


# %% The human study of Table 2

MEDIA = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".webp": "image/webp", ".png": "image/png"}


def write_study(config: Config) -> None:
    """RESULTS/study.html: 100 random pairs (fewer if there are fewer videos), blind, in random order and sides."""
    if len(config.study) != 2:
        raise UserError("--study: give two folders of videos")
    draw, sets = torch.Generator().manual_seed(config.seed), []
    for folder in config.study:
        files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in MEDIA)
        if not files:
            raise UserError(f"--study {folder}: no video in it (looked for {', '.join(MEDIA)})")
        sets.append([files[i] for i in torch.randperm(len(files), generator=draw).tolist()])
    pairs = []
    for a, b in list(zip(*sets, strict=False))[:100]:
        left = int(torch.randint(0, 2, (), generator=draw))
        pairs.append({"left": "AB"[left], "media": [embedded((a, b)[left]), embedded((a, b)[1 - left])]})
    folder = Path(config.results)
    folder.mkdir(parents=True, exist_ok=True)
    template = (Path(__file__).parent / "docs" / "study.html").read_text()
    write_text(folder / "study.html", template.replace("/*PAIRS*/[]", json.dumps(pairs)))
    print(f"written: {folder}/study.html, {len(pairs)} pairs; A is {config.study[0]}, B is {config.study[1]}")


def embedded(path: Path) -> dict[str, str]:
    kind = MEDIA[path.suffix.lower()]
    return {"kind": kind, "data": f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"}


def score_study(config: Config) -> None:
    """Preferences over all answers, with 95 % Wilson intervals."""
    counts = {"A": 0, "B": 0, "equal": 0}
    for file in config.score:
        try:
            for answer in json.loads(Path(file).read_text())["answers"]:
                counts[answer["preferred"]] += 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--score {file}: not the answers of a study ({error!r})") from None
    total = sum(counts.values())
    if not total:
        raise UserError("--score: no answers in these files")
    for name, n in counts.items():
        low, high = wilson(n, total)
        print(f"{name}: {100 * n / total:.1f} %   (95 % interval {100 * low:.1f} to {100 * high:.1f}, {n} of {total})")


def wilson(n: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927): stays inside [0, 1], unlike the normal one."""
    share, width = n / total, z * z / total
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * (share * (1 - share) / total + width / 4 / total) ** 0.5
    return middle - half, middle + half


# %% Main


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, __doc__)
    one_process(NAME)
    if config.study:
        return write_study(config)
    if config.score:
        return score_study(config)
    if config.protocol:
        return judge_folders(config)
    check(config)
    if config.dry_run:
        return show_plan(config)
    results = read_results(config) if config.render else run_tables(config)
    if not results["records"]:
        raise UserError(f"{config.results}/tables.json has no rows yet; run without --render")
    render(config, results)
    for statement, good in self_checks(results["records"]):
        print(f"self-check: {statement}" + ("" if good else ": does NOT hold"))
    for verdict in judge(results["records"]):
        print(str(verdict).replace("**", ""))


if __name__ == "__main__":
    raise SystemExit(cli(main))
