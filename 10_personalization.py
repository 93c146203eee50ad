"""Lesson 10: one particular car in videos: DreamBooth on the backbone, with lesson 9's temporal layers (Sec. 4.2.1).

Changes from lesson 9: nothing temporal is trained. DreamBooth tunes all spatial weights and the text encoder on ten
pictures of one subject, under captions with a rare token ("a sks car ahead on a left curve ..."), beside pictures of
the class that the untuned model made itself ("a car ahead on ..."), so that not every car becomes this one. Lesson 9's
temporal layers are then put into the tuned backbone as they are. When sampling, the spatial layers read the tuned
encoder's tokens of the caption with the token, the temporal layers the original encoder's of the caption without it,
as they know neither. The subject here is a striped purple van, which no lesson before has seen.

  python 09_text_to_video.py          first, with the text backbone of lesson 2
  python 10_personalization.py        (2 minutes on 2 cores without AMX)
  python 10_personalization.py --backbone v1-4.safetensors --text-encoder FOLDER --data FOLDER --preset paper \\
      --instances FOLDER --class-word frog --places "playing a guitar in a band" "in the snow"

Expect at the cpu preset, on the shipped autoencoder: the van in all frames of the personalised videos, in none of the
untuned model asked for the same, and in 3 % of those of the tuned one asked without the token. Colour changes 0.73
times as much as in lesson 9's videos, motion that cannot be matched is 0.69 times as much (0.91 in real clips, as a van
hides more than a car).

Reads OUT/02_image_ldm-text, or the file given with --backbone, and OUT/09_text_to_video. Writes
OUT/10_personalization/: checkpoint.pt (tuned spatial weights and text encoder), reader.pt (tells the van from other
cars), instances.png, images.png, videos.png (personalised and untuned in turn), personalised.gif, untuned.gif,
captions.txt, metrics.png.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.image_model import ImageModel, conditions
from common.loop import Learner, load_part, training_loop
from common.temporal import is_temporal
from extra.metrics import FrameReader, to_reader_size, train_reader
from extra.plan import dry_run, training_cost
from extra.pretrained import CaptionTokens
from kit.data import HELD_OUT, Clips, DrivingScenes, frame_files
from kit.errors import UserError, cli
from kit.files import write_text
from kit.flags import Amount, Count, Fraction, Rate, SamplingSteps, TrainingConfig, Whole, parse, preset_config
from kit.measures import colour_change, motion
from kit.media import fitted, open_picture
from kit.pictures import animation, plot_metrics, sheet
from kit.run import Run, known_good
from kit.scenes import Scene, scene_behind, van_scene

lesson02 = import_module("02_image_ldm")
lesson09 = import_module("09_text_to_video")
NAME = "10_personalization"


# %% The subject, and how it is called


def read_pictures(folder: str, height: int, width: int) -> torch.Tensor:
    """The pictures of a folder, scaled to fill the frame and cropped at the centre: n 1 3 H W in [-1, 1]."""
    if not Path(folder).is_dir():
        raise UserError(f"--instances {folder}: no such folder; give one with png or jpg pictures of the subject")
    files, pictures = frame_files(Path(folder)), []
    if len(files) < 3:
        raise UserError(f"--instances {folder}: {len(files) or 'no'} png or jpg pictures in it, 3 are the least")
    for file in files:
        try:
            pictures.append(np.asarray(fitted(open_picture(file), height, width)))
        except ValueError as error:
            raise UserError(f"{file}: {error}; remove or replace it") from None
    return rearrange(torch.from_numpy(np.stack(pictures)), "n h w c -> n 1 c h w").float() / 127.5 - 1


def asked(config: Config, places: Sequence[str], token: bool) -> Clips:
    """Captions such as "a sks car in the snow", or without the token, as rows of conditions."""
    name = f"a {config.token} {config.class_word}" if token else f"a {config.class_word}"
    return replace(conditions(len(places)), captions=[f"{name} {place}".strip() for place in places])


def drawn(config: Config, image: ImageModel, key: int, count: int, frames: int, split: str = "train",
          scene=van_scene) -> Clips:
    """Clips at the rate of key frames, of the van or of what else `scene` makes of the same drives."""
    source = DrivingScenes(image.config.height, image.config.width, config.final_fps, scene)
    return source.clips((config.seed, key), count, frames, config.final_fps / 16, split)


def places_of(vans: Clips) -> list[str]:
    return [caption.removeprefix("a purple van ") for caption in vans.captions]


def subject(config: Config, image: ImageModel) -> tuple[torch.Tensor, Clips, Clips]:
    """Pictures n 1 3 H W, their captions, and the captions of the pictures of the class."""
    if config.instances:
        pictures = read_pictures(config.instances, image.config.height, image.config.width)
        places, others = [""] * len(pictures), [""] * config.prior_images
    else:
        vans = drawn(config, image, 12, 10, 1)
        pictures, places = vans.video, places_of(vans)
        others = places_of(drawn(config, image, 13, config.prior_images, 1))
    return pictures, asked(config, places, True), asked(config, others, False)


# %% DreamBooth: Eq. (1) on the subject with the token, and on the class without


@torch.no_grad()
def sample_prior(run: Run, config: Config, image: ImageModel, captions: Clips) -> torch.Tensor:
    """What the untuned model makes of the class: latents n c h w. It is taught to keep just that."""
    unet = image.unet().eval()
    return torch.cat([
        lesson02.sample_images(unet, image, captions.pick(range(i, min(i + 16, len(captions)))), config.guidance, run,
                               config.ddim_steps, config.eta, "prior", i, label="prior")
        for i in range(0, len(captions), 16)
    ])


def trainable(conditioner: nn.Module) -> nn.Module:
    """A copy of the text encoder that learns. The original stays: the temporal layers go on with it."""
    conditioner = copy.deepcopy(conditioner)
    if isinstance(conditioner, CaptionTokens):
        conditioner.encoder.tune()  # its captions must not come from the folder of encoded ones any more
    return conditioner.requires_grad_(True)


def train(run: Run, config: Config, image: ImageModel, pictures: torch.Tensor, captions: Clips, prior: torch.Tensor,
          prior_captions: Clips) -> None:
    """Leaves checkpoint.pt. prior: latents n c h w."""
    model = lesson02.Conditioned(image.unet(), trainable(image.conditioner))
    learner, diffusion = Learner(run, model, config), image.diffusion
    z = torch.cat([image.encode(pictures), prior])  # the subject's, then its class's: n c h w
    captions = captions.join(prior_captions)
    for step in training_loop(run, config.steps, learner.parts, {"lineage": image.lineage}):
        for share in run.shares(config.batch, "dreambooth", step):
            one, other = share.integers(len(pictures)), len(pictures) + share.integers(len(prior))
            chosen = torch.stack([one, other], dim=1).flatten().tolist()  # (b 2): of the subject, and of its class
            x = z[chosen]
            tau = torch.stack([share.integers(diffusion.steps) for _ in range(2)], dim=1).flatten()
            eps = share.normal(x.shape)
            with run.autocast():
                output = learner.network(diffusion.diffuse(x, eps, tau), tau, captions.pick(chosen)).float()
            errors = (output - diffusion.target(x, eps, tau)).square().mean(dim=(1, 2, 3))
            instance, kept = errors.unflatten(0, (-1, 2)).mean(0)
            share.backward(instance + config.prior_weight * kept)
            run.log(instance=instance, prior=kept)
        learner.step(step)


# %% The video model: temporal layers of lesson 9 in the tuned backbone


def insert(video: nn.Module, tuned) -> nn.Module:
    """Lesson 9's network with the tuned spatial weights; its temporal ones are untouched."""
    network = copy.deepcopy(video)
    missing, unexpected = network.load_state_dict(tuned.weights, strict=False)
    assert not unexpected and all(is_temporal(name) for name in missing)
    return network


def sample_videos(run: Run, config: Config, network: nn.Module, image: ImageModel, conditioner: nn.Module,
                  wanted: Clips, plain: Clips, frames: int, label: str) -> torch.Tensor:
    """Frames b t 3 H W. wanted: what the spatial layers read, through `conditioner`; plain: the captions without the
    token, which the temporal layers read through the original one. The noise is the same in every call."""
    text, time_text = lesson09.tokens(conditioner, wanted), lesson09.tokens(image.conditioner, plain)
    z = lesson09.sample_key_frames(network, image, text, time_text, frames, config, run, "videos", label=label)
    return lesson09.decoded(run, image, z)


# %% Settings, and what later lessons load


@dataclass(kw_only=True)
class Config(TrainingConfig):
    token: str = "sks"  # the rare word that comes to mean the subject
    class_word: str = "car"  # what the subject is one of: a word that the backbone knows
    instances: str = ""  # folder of png or jpg pictures of the subject; empty: the van is drawn
    places: tuple[str, ...] = ("next to the Eiffel Tower", "on a beach", "in a desert", "in the snow")  # in the videos
    backbone: str = ""  # Stable Diffusion 1.x or 2.x, file or folder; sd1, sd2: its shape, to count; empty: lesson 2's
    text_encoder: str = ""  # folder of the backbone's CLIP text model and tokenizer
    ema: bool = False  # take the averaged weights of a CompVis file
    size: tuple[Count, ...] = (320, 512)  # frame height and width with --backbone
    parameterization: Literal["", "eps", "v"] = ""  # what a --backbone predicts; empty: as its scheduler says, else eps
    prior_images: Count = 64  # pictures of the class, made by the untuned model
    prior_weight: Amount = 3.0  # weight of the loss on them: with 1, ten pictures teach a small model stillness as well
    steps: Whole = 400  # training steps
    batch: Count = 4  # pictures of the subject per step, and as many of the class
    lr: Rate = 2e-4  # learning rate of the U-Net and the text encoder
    warmup: Whole = 20  # steps of linear warm-up
    ema_decay: Fraction = 0.98  # decay of the weight average
    ddim_steps: SamplingSteps = 16  # sampling steps
    guidance: Amount = 3.0  # scale of guidance on the text
    eta: Fraction = 0.0  # 0 deterministic, 1 ancestral
    reader_steps: Whole = 300  # training steps of the network that knows the van
    samples: Count = 12  # videos of the van


DREAMBOOTH = dict(prior_images=256, prior_weight=1.0, steps=800, eta=1.0)
PRESETS: dict[str, dict] = {
    "smoke": dict(prior_images=4, steps=3, batch=2, ddim_steps=2, reader_steps=2, samples=2),
    "cpu": {},
    "gpu": DREAMBOOTH | dict(batch=8, lr=5e-5, ddim_steps=50, reader_steps=2000, samples=32),
    # App. H.3: Stable Diffusion 1.4, 8 to 23 pictures, 256 of the class. One picture of each a step is DreamBooth's;
    # the paper does not say. No weight average.
    "paper": DREAMBOOTH | dict(backbone="sd1", batch=1, lr=1e-6, warmup=1, ema_decay=0.0, ddim_steps=250, guidance=8.0,
                               samples=4),
}


def load(run: Run, image: ImageModel):
    """The tuned image model: `image` with other spatial weights and another text encoder (both averaged)."""
    content = run.trained(NAME, image.lineage)
    weights = content["model"] | content["ema"]["shadow"]
    unet, conditioner = ({name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}
                         for part in ("unet.", "conditioner."))
    tuned = copy.copy(image)
    tuned.weights, tuned.conditioner = unet, trainable(image.conditioner)
    load_part(tuned.conditioner, conditioner, content["path"])
    tuned.conditioner.requires_grad_(False)
    return tuned


# %% Figures and numbers


class VanReader(nn.Module):
    """Tells frames with the van from frames without. b 3 h w -> logits b.

    through: what drawn frames, b 1 3 h w, are sent through before it learns from them: the autoencoder, since what it
    will read has come out of the decoder, which blurs bands and bleaches colours. (Crisp frames teach it to know the
    van by pixels that no decoded frame has: it then sees the van in half of the true ones only.)
    """

    def __init__(self, through: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.through, self.frames, self.what = through, FrameReader(24), nn.Linear(96 + 48, 1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.what(self.frames.pooled(frames)).float()[:, 0]

    def loss(self, clips: Clips) -> torch.Tensor:
        wanted = torch.tensor([float(" van " in caption) for caption in clips.captions]).to(self.what.weight)
        frames = to_reader_size(self.through(clips.video))[:, 0].to(self.what.weight)
        return F.binary_cross_entropy_with_logits(self(frames), wanted)


def van_or_not(seed: Sequence[int]) -> Scene:
    """What the reader learns from: half with the van, a quarter behind a plain purple car, the rest as they come."""
    number = seed[-2]  # of the clip in its batch
    if number % 2:
        return van_scene(seed)
    return scene_behind(seed, colour="purple") if number % 4 else Scene(seed)


@torch.no_grad()
def share_with_van(run: Run, reader: VanReader, video: torch.Tensor) -> float:
    """Share of all frames of clips b t 3 h w in which the van is read."""
    with run.autocast():
        return float(torch.cat([reader(to_reader_size(clip).to(run.device)) > 0 for clip in video]).float().mean())


def report_consistency(run: Run, ours: torch.Tensor, untuned: torch.Tensor,
                       real: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Do frames hang together as the untuned model's do? Colour that changes, and motion that cannot be matched.

    real: true clips of the subject and of others, where there are any: a van is larger than other cars and striped, and
    hides what lies behind, so much changes with nothing gone wrong.
    """
    goal = dict(at_least=0.9, at_most=1.1)
    for what, of in (("colour change", colour_change), ("motion, mismatch", lambda video: motion(video)[1])):
        ratio = float(of(ours).mean() / of(untuned).mean())
        run.report(f"{what}, personalised over untuned", ratio, **(goal if real is None else {}))
        if real is not None:
            expected = float(of(real[0]).mean() / of(real[1]).mean())
            run.report(f"{what}, real vans over real cars", expected)
            run.report(f"{what}, personalised over untuned, beyond what a van changes", ratio / expected, **goal)


@torch.no_grad()
def evaluate(run: Run, config: Config, image: ImageModel, tuned, video: nn.Module, frames: int,
             pictures: torch.Tensor) -> None:
    real = None if config.instances else drawn(config, image, HELD_OUT, config.samples, frames, "held-out")
    places = config.places if real is None else places_of(real)
    told, plain = asked(config, places, True), asked(config, places, False)
    network, found = insert(video, tuned), {}
    for name, model, who, wanted in (("personalised videos", network, tuned, told),
                                     ("untuned videos", video, image, told),
                                     ("personalised videos, no token", network, tuned, plain)):
        found[name] = sample_videos(run, config, model, image, who.conditioner, wanted, plain, frames, name)
    z = lesson02.sample_images(tuned.unet(), tuned, told, config.guidance, run, config.ddim_steps, config.eta, "images")
    found["personalised images"] = lesson09.decoded(run, image, z[:, None])
    ours, untuned = found["personalised videos"], found["untuned videos"]
    others = drawn(config, image, HELD_OUT, config.samples, frames, "held-out", scene_behind) if real else None
    report_consistency(run, ours, untuned, (real.video, others.video) if real else None)
    if real:
        report_identity(run, config, image, found, real, others)
    shown = min(8, len(places))
    sheet(pictures[:, 0].split(5), run.folder / "instances.png")
    sheet([found["personalised images"][:shown, 0]], run.folder / "images.png")
    sheet([row for i in range(min(3, shown)) for row in (ours[i], untuned[i])], run.folder / "videos.png")
    animation(ours[:shown], run.folder / "personalised.gif", config.final_fps / 16)
    animation(untuned[:shown], run.folder / "untuned.gif", config.final_fps / 16)
    write_text(run.folder / "captions.txt", "\n".join(told.captions[:shown]) + "\n")
    plot_metrics(run.folder / "metrics.csv", ["instance", "prior"], "DreamBooth")
    print(f"pictures: {run.folder}/instances.png, images.png, videos.png, personalised.gif, untuned.gif")


def report_identity(run: Run, config: Config, image: ImageModel, found: dict, real: Clips, others: Clips) -> None:
    """In which share of frames the van is seen: real ones first, to know what the reader's word is worth."""

    def through(video: torch.Tensor) -> torch.Tensor:
        return image.decode(image.encode(video), video.shape[1])

    size = (image.config.height, image.config.width)
    with torch.enable_grad():
        torch.manual_seed(0)
        reader = train_reader(run, VanReader(through), config.reader_steps, *size, "reader.pt", van_or_not)
    known = {"real vans": real.video, "real vans through the autoencoder": through(real.video),
             "real cars through the autoencoder": through(others.video)}
    shares = {name: share_with_van(run, reader, video) for name, video in (known | found).items()}
    for name, share in shares.items():
        run.report(f"van seen, {name}", share, at_least=0.5 if name == "personalised videos" else None)
    run.report("van seen, personalised less untuned videos", shares["personalised videos"] - shares["untuned videos"],
               at_least=0.3)


# %% Main


def plan(config: Config) -> None:
    """--dry-run: parameters, shapes, and what a training step of the U-Net needs (the text encoder adds little)."""
    image = lesson09.planned(config)
    with torch.device("meta"):
        settings = preset_config(lesson09.Config, lesson09.PRESETS, config.preset)
        models = {"unet": image.unet(), "video unet": lesson09.key_frame_model(settings, image)}
    models["video unet"].requires_grad_(False)  # nothing of it is trained here
    if image.conditioner is not None:  # Stable Diffusion's is in --text-encoder's folder
        models["conditioner"] = image.conditioner
    words = 77 if config.backbone else image.conditioner.LENGTH
    dry_run(config, models, {
        "pictures": (2 * config.batch, 3, image.config.height, image.config.width),
        "latents": (2 * config.batch, *image.shape),
        "text": (2 * config.batch, words, lesson09.token_width(image)),
        "videos": (config.samples, settings.frames, *image.shape),
    })
    z, tau = torch.zeros(1, *image.shape, device="meta"), torch.zeros(1, device="meta")
    text = torch.zeros(1, words, lesson09.token_width(image), device="meta")
    training_cost(config, "unet", models["unet"], lambda: models["unet"](z, tau, text), 2 * config.batch, config.steps)


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, __doc__)
    if config.dry_run:
        return plan(config)
    if config.data != "driving" and not config.instances:
        raise UserError(f"--data {config.data} also needs --instances: the van is drawn for the drawn scenes only")
    run = Run(NAME, config)
    image = lesson09.open_backbone(run, config)
    # through a copy: lesson 9 may have tuned spatial weights of its own, DreamBooth begins with the original ones
    video, settings = lesson09.load_key_frames(run, copy.copy(image))
    pictures, captions, prior_captions = subject(config, image)
    prior = sample_prior(run, config, image, prior_captions)
    train(run, config, image, pictures, captions, prior, prior_captions)
    run.end_training()
    evaluate(run, config, image, load(run, image), video, settings.frames, pictures)
    known_good(run, PRESETS)


if __name__ == "__main__":
    raise SystemExit(cli(main))
