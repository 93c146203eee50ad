"""What one seed of lesson 12 trains: every lesson's model at the tables' size, made when a row first asks for it; and
the clips that are sampled from them, as lesson 8 does it.

Clips are n t 3 H W in [-1, 1].
"""

import dataclasses
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import torch
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

from common.blocks import channels_last
from common.image_model import ImageModel, conditions, planned_input
from common.loop import load_part
from extra.metrics import READER_SIZE, CaptionReader, ClipReader, Detector, FrameReader, SceneReader, train_reader
from kit.data import Clips, Source, open_data
from kit.files import CHECKPOINTS, load_checkpoint
from kit.flags import Amount, BaseConfig, Count, SamplingSteps, Whole, preset_config
from kit.run import Run

lesson02 = import_module("02_image_ldm")
lesson03 = import_module("03_temporal_layers")
lesson04 = import_module("04_decoder_finetune")
lesson05 = import_module("05_prediction")
lesson06 = import_module("06_interpolation")
lesson07 = import_module("07_upsampler")
lesson09 = import_module("09_text_to_video")
NAME = "12_tables"
OTHER_REAL, ASKED = 12_001, 12_002  # keys of held-out clips: the floor of a table, what is asked for


# %% Sizes and recipes


@dataclass(kw_only=True)
class Config(BaseConfig):
    preset: str = "tables"  # smoke, tables or gpu
    table: tuple[str, ...] = ()  # names of tables; none: all
    seeds: tuple[Whole, ...] = (0, 1, 2)  # every row is trained and measured once with each
    results: str = "results"  # folder of tables.json, tables.md and the figures
    render: bool = False  # compute nothing; write tables.md and figures from tables.json
    detector: str = "toy"  # "toy", or a TorchScript I3D or Inception
    clip: str = ""  # folder of a CLIP model, instead of the small one trained here
    height: Count = 32  # frame height in pixels
    width: Count = 64  # frame width in pixels
    frames: Count = 8  # frames of a judged clip
    samples: Count = 256  # clips that are judged in each row
    references: Count = 1024  # real clips they are judged against
    rollouts: Whole = 100  # videos in the table of long prediction
    ddim_steps: SamplingSteps = 8  # sampling steps of every row, images and clips alike
    guidance: Amount = 1.5  # scale of context guidance in the guided row; the sweep has others
    reader_steps: Whole = 1500  # training steps of each network that reads scenes
    workers: Whole = 0  # of every training, as in the lessons: processes that prepare the clips of the next steps
    cuda_graphs: bool = False  # likewise: replay the U-Net's kernels, which small networks wait for on a GPU
    device_noise: bool = False  # likewise: draw noise on the GPU


PRESETS: dict[str, dict] = {
    "smoke": dict(height=16, width=32, frames=4, samples=3, references=4, rollouts=2, ddim_steps=2, reader_steps=2,
                  seeds=(0,)),
    "tables": {},
    "gpu": dict(height=128, width=256, samples=2048, references=2048, rollouts=256, ddim_steps=50,
                reader_steps=10_000),
}
# What the lessons are trained with for the tables, on top of the lesson's preset of the same size:
# fixed before the first row is trained, so that nobody trains until a claim holds. A length that is changed after its
# result was seen says so in its row.
BASES = {"smoke": "smoke", "tables": "cpu", "gpu": "gpu"}
FEW = dict(muon=0.005, batch=8)  # fewer steps of more clips, with the optimizer that learns most in few
TABLES_RECIPE = {
    "02_image_ldm": FEW | dict(ae_steps=2500, ae_muon=0.0, gan_start=2200, steps=1000, steady=200, batch=32,
                               channels=64, multipliers=(1, 2), attention=(2,)),
    "03_temporal_layers": FEW | dict(feed_forward=4.0, steps=350, steady=130),
    "04_decoder_finetune": dict(muon=0.0, steps=400, gan_start=250, batch=4),
    "05_prediction": FEW | dict(feed_forward=4.0, steps=500, steady=130),
    "06_interpolation": FEW | dict(feed_forward=4.0, steps=400, steady=100, power=2.0),
    "07_upsampler": dict(muon=0.005, multipliers=(1, 2, 4, 8), patch=16, image_steps=800, steps=200, ddim_steps=6),
    "09_text_to_video": FEW | dict(feed_forward=4.0, steps=350, steady=0),
}


MACHINE = ("threads", "device", "precision", "workers", "cuda_graphs", "device_noise")  # settings that rows share
ABLATIONS: dict[str, dict] = {"": {}, "attention": {"temporal": "attention"}, "end-to-end": {"end_to_end": True},
                              "pixel": {"pixel": True}, "pixel-same-steps": {"pixel": True},
                              "end-to-end-same-flops": {"end_to_end": True}}
# App. I.3.2 is measured a second time, after LONGER times the steps: FULL_RATE of them as ever, the rest at a fifth of
# the rate, without which the averaged weights stay noisy.
LONGER, FULL_RATE = 7, 4
MIN_SNR = 5.0  # cap of the loss weights, as in Hang et al. 2023


def lesson_config(config: Config, lesson, **options):
    """The configuration of a lesson for these tables."""
    variant = ("pixel" if options.get("pixel") else options.get("condition", "")) if lesson is lesson02 else ""
    recipe = TABLES_RECIPE.get(lesson.NAME, {}) if config.preset == "tables" else {}
    if lesson is lesson02:
        recipe = recipe | dict(height=config.height, width=config.width)
    if variant == "pixel":  # it has a network of its own, matched in compute
        recipe = {k: v for k, v in recipe.items() if k not in ("channels", "multipliers", "attention")}
    presets = lesson02.presets(variant) if lesson is lesson02 else lesson.PRESETS
    machine = {name: getattr(config, name) for name in MACHINE}
    return preset_config(lesson.Config, presets, BASES[config.preset], **recipe | machine | options)


def trained_parameters(config: Config) -> dict[str, int]:
    """Of the compared temporal networks, by row; "ours" and "attention" must match, the others cannot."""
    counts = {}
    for variant, options in ABLATIONS.items():
        image_config = lesson_config(config, lesson02, pixel=variant.startswith("pixel"))
        with torch.device("meta"):
            unet = lesson05.build(lesson_config(config, lesson05, **options), lesson02.ImageModel(image_config, "meta"))
        counts[variant or "ours"] = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return counts


def flops(forward: Callable[[], torch.Tensor]) -> int:
    """Of a forward and a backward pass, on the meta device."""
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return counter.get_total_flops()


# %% The models of a seed


class World:
    """The models of one seed and the real clips. Training goes on where it was interrupted, or is done already."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self.folder = config.folder() / f"seed{seed}"
        self.run = Run(NAME, dataclasses.replace(config, out=str(self.folder), seed=seed, resume=True))
        self.source = open_data("driving", config.height, config.width, config.final_fps, config.workers)
        self.kept: dict[object, object] = {}

    def keep(self, key: object, make: Callable[[], object]):
        """Something several rows need, made once (trained, it may be, from within a sampler, hence enable_grad)."""
        if key not in self.kept:
            with torch.enable_grad():
                self.kept[key] = make()
        return self.kept[key]

    def lesson(self, lesson, variant: str = "", **options) -> tuple[Run, object]:
        """The run and configuration of a lesson in this seed's folder."""
        config = lesson_config(self.config, lesson, **{"out": str(self.folder), "seed": self.seed} | options)
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
        folder, kept, reader = self.config.folder() / "readers", CHECKPOINTS / "readers" / file, kind()
        if self.config.preset != "tables" or (folder / file).exists() or not kept.exists():
            run = Run(folder.name, dataclasses.replace(self.config, out=str(folder.parent), resume=True))
            longer = 3 if kind is ClipReader else 1  # time takes longer to learn to read
            return train_reader(run, reader, longer * self.config.reader_steps, *READER_SIZE, file)
        # no run and no lock: seeds that are measured side by side read with the same one
        print(f"{folder} has no {file}: using {kept}")
        load_part(reader, load_checkpoint(kept, "git checkout checkpoints")["reader"], kept)
        return channels_last(reader).to(self.run.device).requires_grad_(False).eval()

    @cached_property
    def detector(self) -> Detector | None:
        return None if self.config.detector == "toy" else Detector(self.config.detector, self.run.device)

    def hardware(self) -> str:
        device, dtype = self.run.device, str(self.run.dtype).removeprefix("torch.")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        return f"{name}, {dtype}, torch {torch.__version__}, {platform.machine()}"

    # the models that are measured

    def image(self, variant: str = ""):
        """The image LDM: "", "boxes", "text", "min-snr", "pixel" (whose steps match the compute of the latent U-Net's),
        or "pixel-same-steps"."""

        def make():
            options: dict = {"condition": variant} if variant else {}
            if variant.startswith("pixel"):
                options = {"pixel": True}
            if variant == "min-snr":
                options = {"min_snr": MIN_SNR}
            latent = lesson_config(self.config, lesson02)
            if variant:
                self.image()  # the autoencoder of all of them
            run, config = self.lesson(lesson02, variant, **options)
            if variant == "pixel":
                config.steps = self.matched_steps(latent.steps, lesson02.ImageModel(config), self.image())
            if variant == "pixel-same-steps":
                config.steps = latent.steps
                self.image("pixel")
                self.train_on(run, "pixel")
            lesson02.train(run, config, self.source, variant)
            return lesson02.load(run, variant)

        return self.keep(("image", variant), make)

    def train_on(self, run: Run, variant: str) -> None:
        """Lets a run go on from where another variant's ended, which stays as it is."""
        ended = self.folder / f"{run.name}-{variant}"
        if not (run.folder / "checkpoint.pt").exists():
            for name in ("checkpoint.pt", "metrics.csv"):
                shutil.copyfile(ended / name, run.folder / name)

    def matched_steps(self, steps: int, pixel, latent) -> int:
        """So many steps of the pixel model cost what `steps` of the latent one do (FLOPs of a forward pass)."""

        def cost(image: ImageModel) -> int:
            x, unet = torch.zeros(1, *image.shape, device=image.device), image.unet()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(x, torch.zeros(1, dtype=torch.long, device=image.device), image.conditioner(conditions(1)))
            return counter.get_total_flops()

        return max(1, round(steps * cost(latent) / cost(pixel)))

    def prediction(self, variant: str = ""):
        """Lesson 5, an ablation, "longer", or sampled in "4 steps": run, configuration, image model, network with
        averaged weights."""
        if variant.endswith(" steps"):
            run, config, image, unet = self.prediction()
            return run, dataclasses.replace(config, ddim_steps=int(variant.split()[0])), image, unet

        def make():
            image = self.image(variant if variant.startswith("pixel") else "")
            run, config = self.lesson(lesson05, variant, **ABLATIONS.get(variant, {}))
            if variant == "pixel":
                config.steps = self.matched_steps(config.steps, image, self.image())
            if variant == "end-to-end-same-flops":
                config.steps = self.equal_flops()
                self.prediction("end-to-end")
                self.train_on(run, "end-to-end")
            if variant == "longer":
                config.steps *= FULL_RATE
            if variant in ("", "longer"):
                lesson03.train(*self.lesson(lesson03), self.source, image)
            weights = image.weights
            unet, ema = lesson05.train(run, config, self.source, image)
            if variant == "longer":
                config.steps = config.steps // FULL_RATE * LONGER
                config.lr, config.muon = config.lr / 5, config.muon / 5
                unet, ema = lesson05.train(run, config, self.source, image)
            image.weights = weights  # end-to-end training takes them away
            ema.use()
            config.ddim_steps = self.config.ddim_steps
            return run, config, image, unet.requires_grad_(False).eval()

        return self.keep(("prediction", variant), make)

    def equal_flops(self) -> int:
        """So many steps of end-to-end training cost what ours takes: the image model, lesson 3 and lesson 5."""
        spatial, third, ours = (lesson_config(self.config, lesson) for lesson in (lesson02, lesson03, lesson05))
        image = lesson02.ImageModel(spatial, "meta")

        def clip(config) -> int:
            with torch.device("meta"):
                unet = lesson05.build(config, image)
            z, tau, context = planned_input(image, config.frames)
            c_S = torch.cat([z, z[:, :1]], dim=1)
            return flops(lambda: lesson05.run_unet(unet, z, tau, context, c_S, config))

        with torch.device("meta"):
            unet = image.unet()
        cost = flops(lambda: unet(*planned_input(image, 1))) * spatial.steps * spatial.batch
        cost += clip(ours) * (third.steps * third.batch + ours.steps * ours.batch)
        return round(cost / clip(dataclasses.replace(ours, end_to_end=True)) / ours.batch)

    def interpolation(self, start: str = lesson05.NAME):
        """Lesson 6, begun with the temporal layers of lesson 5 or, for comparison, of another."""

        def make():
            self.prediction()  # which trains lesson 3 as well
            out = self.folder
            if start != lesson05.NAME:  # a folder in which the other one's weights stand as lesson 5's
                out = self.folder / f"begun-at-{start}"
                (out / lesson05.NAME).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / start / "checkpoint.pt", out / lesson05.NAME / "checkpoint.pt")
            run, config = self.lesson(lesson06, out=str(out))
            model, ema = lesson06.train(run, config, self.source, self.image())
            ema.use()
            config.ddim_steps = self.config.ddim_steps
            return run, config, model.requires_grad_(False).eval()

        return self.keep(("interpolation", start), make)

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
        size = 2 * self.config.height, 2 * self.config.width
        return open_data("driving", *size, self.config.final_fps, self.config.workers)

    def upsampler(self):
        def make():
            run, config = self.lesson(lesson07)
            config.patch = min(config.patch, self.config.height // 2)
            # it sees frames, not latents: of the image model it asks the size, so an untrained one will do
            image = lesson02.ImageModel(lesson_config(self.config, lesson02))
            model = lesson07.train(run, config, self.upsampler_source, image)
            return run, config, model.requires_grad_(False).eval()

        return self.keep("upsampler", make)


# %% Sampling: from noise to frames


@torch.no_grad()
def first_frames(world: World, variant: str, labels: Clips, guidance: float, part: int) -> torch.Tensor:
    """One latent for each row of labels, b c h w, from the image model that a row of Table 1 stands on."""
    run, config, image, unet = world.prediction(variant)
    if variant.startswith("end-to-end"):  # it has no image model: the first frame of a clip with nothing given
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


def independent(world: World, variant: str = "") -> torch.Tensor:
    """Every frame from an image model on its own, which is the video model at alpha = 1: n t 3 H W."""

    def part(labels: Clips, start: int) -> torch.Tensor:
        frames, image = labels.repeat(world.config.frames), world.image(variant)
        z = lesson02.sample_images(image.unet(), image, frames, 1.0, world.run, world.config.ddim_steps, 1.0, start)
        return decoded(image, world.run, rearrange(z, "(b t) c h w -> b t c h w", t=world.config.frames))

    return world.keep(("independent", variant), lambda: in_parts(conditions(world.config.samples), part))


def asked(world: World) -> Clips:
    """Held-out scenes whose labels are asked for, and whose first frames are continued."""
    count, frames, fps = world.config.samples, world.config.frames, key_rate(world)
    return world.keep("asked", lambda: world.source.clips((ASKED,), count, frames, fps, "held-out"))


def key_rate(world: World) -> float:
    return world.config.final_fps / 16


def real_clips(world: World, frames: int, fps: float, source: Source | None = None, count: int = 0) -> torch.Tensor:
    """Other real clips than the references: the floor of a table. Others for every seed."""
    source, count = source or world.source, count or world.config.samples
    key = (OTHER_REAL, world.seed)
    return world.keep(("floor", source.height, frames, fps, count), lambda: source.clips(
        key, count, frames, fps, "held-out").video)


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


def interpolated(world: World, real: Clips, passes: int, calm: bool = True, start: str = lesson05.NAME) -> torch.Tensor:
    """Clips between the first and the last frame of real ones: 4^passes - 1 frames between them."""
    (run, config, model), image = world.interpolation(start), world.image()
    config = dataclasses.replace(config, calm=calm)

    def part(labels: Clips, start: int) -> torch.Tensor:
        z = rearrange(image.encode(labels.video[:, [0, -1]]), "(b t) c h w -> b t c h w", t=2)
        for stage in range(passes):  # the second pass works on what the first one made
            pairs = z.shape[1] - 1
            ends = z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1)
            out = lesson06.between(model, image, *ends, stage, labels.repeat(pairs), config, run, start, stage)
            out = rearrange(out, "(b p) t c h w -> b p t c h w", p=pairs)
            z = torch.cat([out[:, :, :-1].flatten(1, 2), out[:, -1, -1:]], dim=1)
        return decoded(image, run, z)

    return in_parts(real, part)


@torch.no_grad()
def reconstructed(world: World, video: torch.Tensor, image_critic: bool | None) -> torch.Tensor:
    """Clips through the encoder and back: by the image decoder (None), or by lesson 4's, with or without the critic of
    single frames."""
    image, run, clips, t = world.image(), world.run, [], video.shape[1]
    autoencoder = image.autoencoder
    if image_critic is not None:
        run, _, autoencoder = world.decoder(image_critic)
        lesson04.set_frames(autoencoder, t)
    for part in video.split(16):
        with run.autocast():
            frames = autoencoder.decode(image.encode(part)).float().cpu().clamp(-1, 1)
        clips.append(rearrange(frames, "(b t) c h w -> b t c h w", t=t))
    return torch.cat(clips)
