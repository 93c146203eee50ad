"""What the tables measure with: networks that read scenes, Fréchet distances, inception score, caption similarity.

The default networks are trained here on procedural scenes, whose attributes are known, so distances in their features
are called toy-FID and toy-FVD and must not be compared with published ones. With `Detector` a TorchScript Inception or
I3D takes their place. Every number goes with a `Protocol`; numbers of different protocols are never put in one table.
Videos are `b t 3 h w` in [-1, 1].
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.blocks import channels_last, group_norm
from common.image_model import Conditioner
from common.loop import adamw, clip_and_warm_up, training_loop
from common.temporal import FrameConv
from kit.data import Clips, DrivingScenes
from kit.errors import UserError
from kit.measures import box_mask
from kit.run import Run
from kit.scenes import COLOURS, MAX_CARS, Scene

READER_SIZE = (64, 128)  # frames are brought to this size before they are read, as to 224 x 224 for I3D

# %% Networks that read a scene


class FrameReader(nn.Module):
    """Reads a frame: night, number of cars, where cars are. Its features are also a perceptual space (lesson 4).

    b 3 h w -> features at four scales, of strides 2, 4, 8, 16.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 3 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, out, 3, stride=2, padding=1), group_norm(out), nn.SiLU(),
                          nn.Conv2d(out, out, 3, padding=1), group_norm(out), nn.SiLU())
            for c, out in zip(widths, widths[1:], strict=False)
        )
        self.where = nn.Conv2d(widths[2] + widths[3], 1, 1)
        self.what = nn.Linear(widths[4], 2 + MAX_CARS)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """b 3 h w -> b 6 width: what the frame is like, and the strongest of what is anywhere in it."""
        features = self(x)
        return torch.cat([features[3].mean(dim=(2, 3)), features[1].amax(dim=(2, 3))], dim=1)

    def heads(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of night (b), of the number of cars (b, MAX_CARS + 1), and of "a car is here" (b 1 h/4 w/4)."""
        said = self.what(features[3].mean(dim=(2, 3))).float()
        fine = torch.cat([features[1], F.interpolate(features[2], size=features[1].shape[-2:])], dim=1)
        return said[:, 0], said[:, 1:], self.where(fine).float()

    def loss(self, clips: Clips) -> torch.Tensor:
        """How badly it reads the first frames."""
        x = clips.video[:, 0].to(self.where.weight.device)
        night, cars, where = self.heads(self(x))
        cells = F.adaptive_avg_pool2d(box_mask(clips.boxes[:, 0], *x.shape[-2:]), where.shape[-2:]).to(x.device)
        return (
            F.binary_cross_entropy_with_logits(night, clips.night.to(x.device).float())
            + F.cross_entropy(cars, clips.cars.to(x.device))
            + F.binary_cross_entropy_with_logits(where, (cells > 0.5).float())
        )


FAULTS = ("shuffled", "reversed", "repeated", "dropped", "jittering")  # what only time tells


class ClipReader(nn.Module):
    """Reads a clip of any length: night, cars, curvature, how far the camera goes per frame, how much frames differ
    that should not, and whether frames were shuffled, played backwards, repeated, left out or made to jitter.

    b t 3 h w -> features b 48. What is asked for is read off along directions of length 1, so that features of a fault
    have to lie as far from those without as its logits, some 10 apart: then a Fréchet distance cannot overlook it.
    """

    FEATURES = 48
    PACE, UNREST = 6.0, 3.0  # features a unit of log metres per frame, of log(1 + levels of 255)

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 3 * width, 4 * width]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.frames = nn.ModuleList(nn.Sequential(nn.Conv2d(c, out, 3, stride=2, padding=1), group_norm(out), nn.SiLU())
                                    for c, out in pairs)
        self.times = nn.ModuleList(FrameConv(out, out) for _, out in pairs)
        self.features = nn.Linear(2 * widths[-1], self.FEATURES)
        self.what = nn.Linear(self.FEATURES, 4 + len(FAULTS) + MAX_CARS + 1)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        x, t = rearrange(video, "b t c h w -> (b t) c h w"), video.shape[1]
        for frame, time in zip(self.frames, self.times, strict=True):
            x = frame(x)
            mixed = time(rearrange(x, "(b t) c h w -> b c t (h w)", t=t))
            x = x + F.silu(rearrange(mixed, "b c t (h w) -> (b t) c h w", h=x.shape[-2]))
        x = rearrange(x.mean(dim=(2, 3)), "(b t) c -> b t c", t=t)
        return self.features(torch.cat([x.mean(dim=1), x.amax(dim=1)], dim=1)).float()  # as a whole, and at its worst

    def loss(self, clips: Clips, fps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """How badly it reads the clips, of which most are given a fault first. fps: b; their last frame is spare."""
        device, b = self.what.weight.device, len(clips)
        fault = torch.randint(-2, len(FAULTS), (b,), generator=generator)  # below 0: none
        levels = 10 ** torch.rand(b, generator=generator) * (fault == FAULTS.index("jittering"))
        video = torch.stack([spoil(*one, generator) for one in zip(clips.video, fault.tolist(), levels, strict=True)])
        if torch.rand((), generator=generator) < 0.5:  # small frames are read enlarged
            video = F.avg_pool2d(video.flatten(0, 1), 2).unflatten(0, video.shape[:2])
        said = F.linear(self(to_reader_size(video).to(device)), F.normalize(self.what.weight, dim=1), self.what.bias)
        night, pace, curvature, unrest, faults, cars = said.split((1, 1, 1, 1, len(FAULTS), MAX_CARS + 1), dim=1)
        step = self.PACE * (clips.speed / fps).log()  # of metres per frame: what can be seen without knowing the rate
        calm = (fault < 0) | (levels > 0)
        return (
            F.binary_cross_entropy_with_logits(night[:, 0], clips.night.to(device).float())
            + F.binary_cross_entropy_with_logits(faults, F.one_hot(fault + 2, len(FAULTS) + 2)[:, 2:].to(faults)) * 5
            + ((pace[:, 0] - step.to(device)).square() * (fault != 0).to(device)).mean() / self.PACE
            + ((unrest[:, 0] - self.UNREST * levels.log1p().to(device)).square() * calm.to(device)).mean() / self.UNREST
            + (curvature[:, 0] - 200 * clips.curvature.to(device)).square().mean()
            + F.cross_entropy(cars, clips.cars.to(device))
        )


def spoil(frames: torch.Tensor, fault: int, levels: float, generator: torch.Generator) -> torch.Tensor:
    """A clip (t + 1) 3 h w with one of FAULTS (by number; below 0: none), t frames long."""
    name, t = FAULTS[fault] if fault >= 0 else "", len(frames) - 1
    order, at = torch.arange(t), int(torch.randint(1, t, (), generator=generator))
    if name == "shuffled":
        order = torch.randperm(t, generator=generator)
    elif name == "reversed":
        order = order.flip(0)
    elif name == "repeated":
        order[at] = at - 1
    elif name == "dropped":
        order[at:] += 1
    clip = frames[order]
    grain = 2 ** int(torch.randint(0, 4, (), generator=generator))
    return jittering(clip[None], levels, grain, generator)[0] if name == "jittering" else clip


def jittering(video: torch.Tensor, levels: float, grain: int, generator: torch.Generator) -> torch.Tensor:
    """Clips b t 3 h w whose frames are changed each on its own, in spots of `grain` pixels, so that still neighbours
    would differ by so many levels of 255 on average: what boiling is."""
    b, t, _, height, width = video.shape
    spots = torch.randn(b * t, 3, -(-height // grain), -(-width // grain), generator=generator)
    noise = F.interpolate(spots, size=(height, width), mode="bilinear").view_as(video)
    mean = (noise[:, 1:] - noise[:, :-1]).abs().mean() if t > 1 else noise.new_ones(())
    return (video + noise * (levels / 127.5 / mean)).clamp(-1, 1)


ROADS = ("left curve", "straight road", "right curve")
NOTHING = len(COLOURS)  # the number of "no car ahead" among the colours


def said(captions: Sequence[str]) -> torch.Tensor:
    """What captions ask for, b 3: night (1, 0), road (number in ROADS), colour of the nearest car ahead (number in
    COLOURS, or NOTHING); -1 where a caption does not say."""
    rows, colours = [], list(COLOURS)
    for caption in captions:
        road = next((i for i, name in enumerate(ROADS) if name in caption), -1)
        night = 1 if "night" in caption else 0 if "day" in caption else -1
        car = re.search(r"\b(\w+) car\b.* ahead", caption)
        colour = colours.index(car[1]) if car and car[1] in COLOURS else NOTHING if road >= 0 and not car else -1
        rows.append([night, road, colour])
    return torch.tensor(rows)


class SceneReader(nn.Module):
    """Reads off a frame what captions tell: night, the road, the colour of the nearest car ahead. b 3 h w."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.what = FrameReader(24), nn.Linear(96 + 48, 2 + len(ROADS) + NOTHING + 1)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of each of the three, b n."""
        return self.what(self.frames.pooled(frames)).float().split((2, len(ROADS), NOTHING + 1), dim=1)

    def loss(self, clips: Clips) -> torch.Tensor:
        wanted, logits = said(clips.captions).to(self.what.weight.device), self(clips.video[:, 0].to(self.what.weight))
        return sum(F.cross_entropy(row, wanted[:, i], ignore_index=-1) for i, row in enumerate(logits))


@torch.no_grad()
def captions_obeyed(run: Run, reader: SceneReader, frames: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of frames (b 3 h w) in which is read what their captions say: night, road, colour of the car ahead."""
    wanted, small = said(captions), to_reader_size(frames[:, None])[:, 0]
    with run.autocast():
        read_off = torch.stack([row.argmax(1).cpu() for row in reader(small.to(run.device))], dim=1)
    names = ("night", "road", "colour of the car ahead")
    told = wanted >= 0
    return {name: float(((read_off == wanted) & told)[:, i].sum() / told[:, i].sum().clamp(min=1))
            for i, name in enumerate(names)}


class CaptionReader(nn.Module):
    """Frames and captions in one space of unit vectors, trained by contrast as CLIP is."""

    LENGTH = 16  # words of a caption it reads: the weights in checkpoints/readers were trained so

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.frames, self.image = FrameReader(), nn.Linear(128 + 64, dim)
        self.words = nn.EmbeddingBag(Conditioner.WORDS + 1, dim, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image(self.frames.pooled(frames)).float(), dim=1)

    def captions(self, captions: Sequence[str]) -> torch.Tensor:
        words = torch.stack([Conditioner.words(caption, self.LENGTH) for caption in captions]).to(self.scale.device)
        return F.normalize(self.text(self.words(words)).float(), dim=1)

    def loss(self, clips: Clips) -> torch.Tensor:
        alike = self.scale.exp() * self(clips.video[:, 0].to(self.scale.device)) @ self.captions(clips.captions).T
        same = torch.tensor([[a == b for b in clips.captions] for a in clips.captions], device=alike.device).float()
        goal = same / same.sum(1, keepdim=True)  # captions come twice in a batch
        return (F.cross_entropy(alike, goal) + F.cross_entropy(alike.T, goal)) / 2


def train_reader(run: Run, reader: nn.Module, steps: int, height: int, width: int, file: str,
                 scene: Callable[[Sequence[int]], Scene] = Scene) -> nn.Module:
    """Trains one of the readers on procedural scenes, whatever a run's data: they come with labels and no download.

    Clips are 8 frames at the final rate, a quarter and a sixteenth of it. Resumable; keys are the readers' own.
    scene: makes a drive of a seed.
    """
    scenes, rates = DrivingScenes(height, width, 30.0, scene), (30 / 16, 30 / 4, 30.0)
    reader = channels_last(reader).to(run.device)
    optimizer = adamw(reader, 2e-3)
    frames, steady = (8 + 1, 500) if isinstance(reader, ClipReader) else (1, 0)  # one is spare; see clip_and_warm_up
    parts, metrics = {"reader": reader, "optimizer": optimizer}, file.replace(".pt", ".csv")
    for step in training_loop(run, steps, parts, file=file, metrics=metrics):
        fps, count = rates[step % 3], 32 if isinstance(reader, CaptionReader) else 16
        clips = scenes.clips((run.config.seed, 4, step), count, frames, fps)
        with run.autocast():
            if isinstance(reader, ClipReader):
                loss = reader.loss(clips, torch.full((count,), fps), run.generator("reader", step))
            else:
                loss = reader.loss(clips)
        loss.backward()
        clip_and_warm_up(optimizer, step, 2e-3, 20, steady)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(loss=loss)
    return reader.requires_grad_(False).eval()


# %% Detectors from a file


class Detector:
    """A TorchScript network from a file: an I3D (clips) or an Inception (frames), for real FVD and FID.

    Raises UserError for a file that is neither. `checksum` is the first 16 digits of its SHA-256.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            self.checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
            self.network = torch.jit.load(path, map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"--detector {path}: not a readable TorchScript file ({first})") from None
        self.arguments = {argument.name for argument in self.network.forward.schema.arguments}
        self.of_clips = "rescale" in self.arguments or "resize" in self.arguments
        self.device, self.path = device, path
        with torch.no_grad():
            self.features(torch.zeros(1, 16, 3, *READER_SIZE))

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """b t 3 h w -> n d: one row a clip for an I3D, one a frame for an Inception."""
        options = {"return_features": True} if "return_features" in self.arguments else {}
        frames = rearrange(video, "b t c h w -> (b t) c h w").to(self.device)
        if self.of_clips:  # 224 x 224, [-1, 1], b c t h w; the network is told to leave that as it is
            frames = F.interpolate(frames, size=(224, 224), mode="bilinear")
            x = rearrange(frames, "(b t) c h w -> b c t h w", t=video.shape[1])
            options |= {name: False for name in ("rescale", "resize") if name in self.arguments}
        else:  # StyleGAN's Inception takes bytes and resizes by itself
            x = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        try:
            return self.network(x, **options).flatten(1).float().cpu()
        except RuntimeError as error:
            said = str(error).strip().splitlines()[-1]
            raise UserError(f"--detector {self.path}: cannot be applied to {tuple(x.shape)} ({said})") from None


# %% Protocols and numbers


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything two numbers must agree in to be compared."""

    metric: str
    network: str  # what reads the frames, with its checksum
    frames: int  # of a clip
    fps: float
    size: str  # of the frames before they are read, height x width
    samples: int  # clips that are judged
    references: int  # real clips they are judged against
    data: str = "driving, held-out"


def same_protocol(numbers: Sequence[dict]) -> None:
    """Raises UserError when numbers that shall stand in one column were measured in different ways."""
    first = numbers[0]["protocol"]
    for number in numbers[1:]:
        if differ := [k for k in first if number["protocol"].get(k) != first[k]]:
            what = ", ".join(f"{k} {first[k]} and {number['protocol'].get(k)}" for k in differ)
            raise UserError(f"numbers of different protocols cannot stand in one table: {what}")


def checksum(module: nn.Module) -> str:
    """Of weights, to tell networks apart."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# %% Metrics


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of two normal distributions fitted to features n d and m d (unbiased covariances).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); the trace of the root by symmetric eigenvalues, in float64.
    Raises ValueError for fewer than 2 rows or differing widths.
    """
    if len(a) < 2 or len(b) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {tuple(a.shape)} and {tuple(b.shape)}: want n d and m d, n and m at least 2")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def to_reader_size(frames: torch.Tensor) -> torch.Tensor:
    """... 3 h w to READER_SIZE, averaging where that is smaller."""
    flat = frames.flatten(0, -4).float()
    return F.interpolate(flat, size=READER_SIZE, mode="bilinear", antialias=True).unflatten(0, frames.shape[:-3])


@torch.no_grad()
def in_batches(run: Run, network, video: torch.Tensor, size: int = 16) -> torch.Tensor:
    """Features of many clips: rows n d of `network` applied to a few clips at a time."""
    with run.autocast():
        return torch.cat([network(part).float().cpu() for part in video.split(size)])


def frame_features(reader: FrameReader, video: torch.Tensor) -> torch.Tensor:
    """b t 3 h w -> (b t) 128: what toy-FID compares."""
    frames = rearrange(to_reader_size(video), "b t c h w -> (b t) c h w").to(reader.where.weight.device)
    return reader(frames)[3].mean(dim=(2, 3))


def clip_features(reader: ClipReader, video: torch.Tensor) -> torch.Tensor:
    """b t 3 h w -> b 48: what toy-FVD compares."""
    return reader(to_reader_size(video).to(reader.what.weight.device))


@dataclasses.dataclass
class Reading:
    """What a FrameReader sees in frames: rows are (b t)."""

    night: torch.Tensor  # n, probability
    cars: torch.Tensor  # n MAX_CARS+1, probabilities of every number
    where: torch.Tensor  # n 1 h/4 w/4, probability of a car in a cell

    @property
    def car_count(self) -> torch.Tensor:
        return self.cars.argmax(1)


@torch.no_grad()
def read(run: Run, reader: FrameReader, video: torch.Tensor) -> Reading:
    parts = []
    for part in rearrange(video, "b t c h w -> (b t) c h w").split(64):
        with run.autocast():
            night, cars, where = reader.heads(reader(to_reader_size(part).to(run.device)))
        parts.append((night.sigmoid().cpu(), cars.softmax(1).cpu(), where.sigmoid().cpu()))
    return Reading(*(torch.cat(values) for values in zip(*parts, strict=True)))


def inception_score(reading: Reading) -> float:
    """exp of the mean KL of p(y | x) from p(y), y being night and number of cars together (18 classes)."""
    night = torch.stack([1 - reading.night, reading.night], dim=1)
    p = (night[:, :, None] * reading.cars[:, None]).flatten(1).clamp(min=1e-8).double()
    return float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())


def box_iou(reading: Reading, boxes: torch.Tensor) -> float:
    """Intersection over union of the cells a reader finds cars in and those of asked boxes (n MAX_CARS 4), over all."""
    asked = F.adaptive_avg_pool2d(box_mask(boxes, *READER_SIZE), reading.where.shape[-2:]) > 0.5
    found = reading.where > 0.5
    return float((asked & found).sum() / (asked | found).sum().clamp(min=1))


@torch.no_grad()
def clip_similarity(run: Run, reader: CaptionReader, video: torch.Tensor, captions: Sequence[str]) -> float:
    """CLIPSIM: mean cosine between a clip's caption and each of its frames."""
    texts, total = reader.captions(captions), 0.0
    for clip, text in zip(video, texts, strict=True):
        with run.autocast():
            total += float((reader(to_reader_size(clip).to(run.device)) @ text).mean())
    return total / len(video)


def load_clip(folder: str):
    """A CLIP model from a folder of transformers' layout as (frames, captions) -> cosines. Raises UserError."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise UserError('--clip needs transformers: pip install transformers') from None
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises several kinds
        raise UserError(f"--clip {folder}: not a readable CLIP folder ({str(error).splitlines()[0]})") from None

    @torch.no_grad()
    def similarity(video: torch.Tensor, captions: Sequence[str]) -> float:
        total = 0.0
        for clip, caption in zip(video, captions, strict=True):
            pictures = ((clip.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
            inputs = processor(text=[caption], images=list(pictures), return_tensors="pt", truncation=True)
            output = model(**inputs)
            total += float(F.cosine_similarity(output.image_embeds, output.text_embeds).mean())
        return total / len(video)

    return similarity


# %% Self-checks


def corruptions(video: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Real clips made worse: what every distance must notice, and what only those of clips can, as every frame is real
    (shuffled, repeated) or as good as real (jitter: noise of four levels in 255, but other noise in every frame)."""
    b, t = video.shape[:2]
    noise = torch.randn(video.shape, generator=generator)
    blurred = F.avg_pool2d(video.flatten(0, 1), 5, stride=1, padding=2, count_include_pad=False).view_as(video)
    clip, order = torch.arange(b)[:, None], torch.stack([torch.randperm(t, generator=generator) for _ in range(b)])
    again = torch.arange(t).repeat(b, 1)
    again[clip[:, 0], t // 2] = t // 2 - 1
    return {
        "little noise": (video + 0.1 * noise).clamp(-1, 1),
        "more noise": (video + 0.3 * noise).clamp(-1, 1),
        "blur": blurred,
        "shuffled frames": video[clip, order],
        "a repeated frame": video[clip, again],
        "jitter of 5 levels": jittering(video, 5.0, 4, generator),
    }
