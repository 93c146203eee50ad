"""Lesson 8: the whole stack, and a long video out of it (Fig. 5).

One frame from the image model (or yours); prediction with S = 1 makes 8 key frames of it, prediction with S = 2 goes
on from the last two, again and again; two interpolation passes make 4 (N - 1) + 1 frames of N, twice; the video decoder
makes pixels; the upsampler makes them four times as large. Every stage is a generator that holds one window, so memory
does not grow with the length of the video.

One thing is not the paper's, and off in its presets (--no-anchor): the two known frames come back from an extension a
little wrong, the new ones are wrong alike, and it adds up from one to the next. So it is taken off: after half a minute
colours have drifted by 3.8 levels of 255 instead of 5.1 (real clips: 1.4), and in a minute autumn stays autumn.

  python 08_sample_long.py                            1.5 minutes on 2 slow cores
  python 08_sample_long.py --seconds 60 --no-upsampler
  python 08_sample_long.py --first-frame photo.png --futures 3
  python 08_sample_long.py --night 1 --cars 2 --overwrite
  python 08_sample_long.py --upsampled-seconds 1      the whole video small, and its first second large

Expect a drive of seconds that keeps its sky, land and light, and one of a minute that slowly grows darker; colour,
sharpness and, but for moments, change from frame to frame stay inside the band of real clips (drift.png). Upsampled,
neighbouring frames differ 1.7 times as much as real ones.

Reads OUT/02 to OUT/07; at the cpu preset, where nothing is trained there yet, the weights in checkpoints/.
Writes OUT/08_sample_long/: long.mp4 (where av is installed), long.webp (at most 240 frames of it), contact_sheet.png,
drift.png, drift.csv; with --futures, one of each per future; with --upsampled-seconds, long-large.mp4 and so on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from common.image_model import ImageModel, conditions
from extra.plan import count, dry_run
from kit.data import HELD_OUT, Clips, open_data
from kit.errors import UserError, cli
from kit.flags import Amount, BaseConfig, Count, Range, parse, preset_config
from kit.measures import sharpness
from kit.media import fitted, open_picture
from kit.pictures import VideoWriter, plt, save_animation, save_figure, sheet, to_uint8
from kit.run import Run, known_good, one_process
from kit.scenes import MAX_CARS

lesson02 = import_module("02_image_ldm")
lesson04 = import_module("04_decoder_finetune")
lesson05 = import_module("05_prediction")
lesson06 = import_module("06_interpolation")
lesson07 = import_module("07_upsampler")
NAME = "08_sample_long"
PREVIEW = 240  # frames of long.webp at most: it is kept in memory until the end


# %% The stages, each a generator over the frames of one video


def read_first_frame(path: str, height: int, width: int) -> torch.Tensor:
    """A picture, cropped to the shape and resized: 1 1 3 h w in [-1, 1]."""
    try:
        picture = fitted(open_picture(path), height, width)
    except ValueError as error:
        raise UserError(f"--first-frame {path}: {error}") from None
    return rearrange(torch.from_numpy(np.array(picture)).float() / 127.5 - 1, "h w c -> 1 1 c h w")


def first_latent(run: Run, config: Config, image: ImageModel, labels: Clips) -> torch.Tensor:
    """The latent of the first frame: 1 c h w."""
    if config.first_frame:
        frame = read_first_frame(config.first_frame, image.config.height, image.config.width)
        return image.encode(frame)
    return lesson02.sample_images(image.unet(), image, labels, image.config.guidance, run, image.config.ddim_steps,
                                  image.config.eta, "first", label="first frame")


def key_frames(
    run: Run, config: Config, image: ImageModel, first: torch.Tensor, labels: Clips, future: int
) -> Iterator[torch.Tensor]:
    """Key-frame latents without end: S = 1 from the first frame, then S = 2 from the last two, again and again."""
    unet, settings = lesson05.load(run, image)
    settings.ddim_steps = config.ddim_steps or settings.ddim_steps
    known = first[None]  # 1 s c h w
    yield from first
    for extension in itertools.count():
        clip = lesson05.predict_clips(
            unet, image, known, labels, settings, run, "key", future, extension, guidance=config.guidance or None
        )
        s = known.shape[1]
        if config.anchor and extension:  # the first clip's error has none before it to add up with
            clip = clip - (clip[:, :s] - known).mean(1, keepdim=True)
        yield from clip[0, s:]
        known = clip[:, -2:]


def interpolated(run: Run, config: Config, model, settings, image: ImageModel, frames: Iterable[torch.Tensor],
                 stage: int, labels: Clips, future: int) -> Iterator[torch.Tensor]:
    """One interpolation pass over a stream: every frame given comes out again, with three new ones before the next."""
    last = None
    for number, batch in enumerate(batched(frames, 8)):
        ends = torch.stack(batch if last is None else [last, *batch])
        out = lesson06.one_pass(model, image, ends, stage, labels, settings, run, "pass", future, stage, number)
        yield from out if last is None else out[1:]
        last = ends[-1]


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items (itertools.batched needs Python 3.12)."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def frames_of(
    run: Run, config: Config, image: ImageModel, first: torch.Tensor, labels: Clips, length: int, future: int
) -> Iterator[torch.Tensor]:
    """The whole stack for one video but the upsampler: 3 H W frames in [-1, 1], `length` of them."""
    keys = keys_for(length, config.passes)
    stream: Iterable = itertools.islice(key_frames(run, config, image, first, labels, future), keys)
    if config.passes:
        model, settings = lesson06.load(run, image)
        settings.ddim_steps = config.ddim_steps or settings.ddim_steps
        for stage in range(config.passes):
            stream = interpolated(run, config, model, settings, image, stream, stage, labels, future)
    stream = itertools.islice(stream, length)
    if config.video_decoder:
        autoencoder, portion = lesson04.load(run, image)
        stream = lesson04.decode_stream(run, autoencoder, stream, portion)
    else:
        stream = decoded_singly(run, image, stream)
    return iter(stream)


def enlarged(run: Run, image: ImageModel, frames: Iterable[torch.Tensor], future: int) -> Iterator[torch.Tensor]:
    upsampler, settings = lesson07.load(run, image)
    return lesson07.upsample(upsampler, settings, frames, run, future)


def decoded_singly(run: Run, image: ImageModel, latents: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for batch in batched(latents, 8):
        yield from image.decode(torch.stack(batch))[:, 0]


# %% Settings


@dataclass(kw_only=True)
class Config(BaseConfig):
    seconds: Annotated[float, Range(0.01, 1e6)] = 8.0  # length of the video
    fps: Amount = 0.0  # playback rate written into the files; 0: the rate the passes lead to
    first_frame: str = ""  # picture to start from; empty: one from the image model
    futures: Count = 1  # videos from the same first frame
    night: Annotated[int, Range(-1, 1)] = -1  # 1 night, 0 day, -1 whatever comes
    cars: Annotated[int, Range(-1, MAX_CARS)] = -1  # cars in view, -1 whatever comes
    guidance: Amount = 0.0  # context guidance of the prediction; 0: the scale lesson 5 was configured with
    ddim_steps: Annotated[int, Range(0, 1000)] = 0  # sampling steps of lessons 5 and 6; 0: as configured there
    anchor: bool = True  # what known frames come back wrong by is taken off the new ones; not the paper's
    passes: Annotated[int, Range(0, 2)] = 2  # interpolation passes: 0, 1 or 2
    video_decoder: bool = True  # lesson 4's decoder; otherwise the image decoder, frame by frame
    upsampler: bool = True  # lesson 7's upsampler; otherwise small frames
    upsampled_seconds: Amount = 0.0  # with a number: only the first so many seconds large, in a file of their own


PRESETS: dict[str, dict] = {
    "smoke": dict(seconds=1.0),
    "cpu": dict(seconds=4.0),
    "gpu": dict(seconds=30.0),
    "paper": dict(seconds=300.0, anchor=False),  # the paper shows up to 5 minutes
    "biking": dict(seconds=60.0, anchor=False),
}


# %% Writing, and what drifts


class Record:
    """Writes frames as they come and keeps of each a few numbers: colour, sharpness, motion."""

    def __init__(self, folder: Path, name: str, length: int, fps: float) -> None:
        self.folder, self.name, self.length, self.fps = folder, name, length, fps
        self.rows: list[list[float]] = []
        self.preview: list[np.ndarray] = []
        self.contact: list[torch.Tensor] = []
        self.writer, self.previous = None, None
        self.every = -(-length // PREVIEW)

    def add(self, frame: torch.Tensor) -> None:
        if not self.rows:
            try:
                self.writer = VideoWriter(self.folder / f"{self.name}.mp4", self.fps, *frame.shape[-2:])
            except UserError as error:
                print(f"no mp4: {error}")
        pixels, number = to_uint8(frame), len(self.rows)
        if self.writer:
            self.writer.write(pixels)
        if number % self.every == 0:
            self.preview.append(pixels)
        if number % max(1, self.length // 16) == 0 and len(self.contact) < 16:
            self.contact.append(frame)
        moved = 0.0 if self.previous is None else float((frame - self.previous).abs().mean())
        self.rows.append([*frame.mean(dim=(1, 2)).tolist(), float(sharpness(frame[None, None])), moved])
        self.previous = frame

    def close(self) -> None:
        if not self.rows:
            return
        if self.writer:
            self.writer.close()
        save_animation(self.preview, self.folder / f"{self.name}.webp", self.fps / self.every)
        rows = [torch.stack(self.contact[i : i + 4]) for i in range(0, len(self.contact), 4)]
        sheet(rows, self.folder / f"contact_sheet{self.name.removeprefix('long')}.png")


def clear(folder: Path) -> None:
    """An older video does not stay beside a new configuration."""
    for pattern in ("long*", "contact_sheet*", "drift*", "numbers.json"):
        for path in folder.glob(pattern):
            path.unlink()


def write(run: Run, name: str, frames: Iterable[torch.Tensor], length: int, rate: float) -> Record:
    record = Record(run.folder, name, length, rate)
    try:
        for frame in tqdm(frames, total=length, desc=name, mininterval=1.0):
            record.add(frame)
    except KeyboardInterrupt:
        done = len(record.rows)
        record.close()
        raise KeyboardInterrupt(f"{run.folder}/{name}.* has the {done} of {length} frames made until then") from None
    record.close()
    return record


def tee_first(frames: Iterator[torch.Tensor], count: int) -> tuple[Iterator[torch.Tensor], list[torch.Tensor]]:
    """The same stream, and a list that fills with its first `count` frames as they pass."""
    kept: list[torch.Tensor] = []

    def passing() -> Iterator[torch.Tensor]:
        for frame in frames:
            if len(kept) < count:
                kept.append(frame)
            yield frame

    return passing(), kept


def plot_drift(run: Run, record: Record, real: torch.Tensor, rate: float) -> None:
    """Colour, sharpness and frame difference over time, with the band (mean, two standard deviations) of real clips."""
    table, suffix = np.array(record.rows), record.name.removeprefix("long")
    header = "red,green,blue,sharpness,frame difference"
    np.savetxt(run.folder / f"drift{suffix}.csv", table, delimiter=",", header=header, comments="", fmt="%.5f")
    seconds = np.arange(len(table)) / rate
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6))
    bands = [real.mean(dim=(1, 2, 3, 4)), sharpness(real).mean(1), real.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))]
    lines = [table[:, :3], table[:, 3], table[1:, 4]]
    for axis, band, line, title in zip(axes, bands, lines, ("colour", "sharpness", "frame difference"), strict=True):
        mean, spread = float(band.mean()), 2 * float(band.std()) if len(band) > 1 else 0.0
        axis.axhspan(mean - spread, mean + spread, color="0.9", label="real clips")
        if line.ndim == 2:
            for channel, colour in enumerate(("tab:red", "tab:green", "tab:blue")):
                axis.plot(seconds, line[:, channel], color=colour, lw=1)
        else:
            axis.plot(seconds[-len(line) :], line, color="0.2", lw=1)
        if title == "frame difference":
            axis.axhline(2 * mean, color="tab:red", lw=1, ls=":", label="restlessness 2")
            axis.legend(fontsize="small")
        axis.set(title=title, xlabel="seconds")
    save_figure(figure, run.folder / f"drift{suffix}.png")
    band = bands[2].mean()
    run.report(f"restlessness{suffix}", float(table[1:, 4].mean() / band), "times real", at_most=2)
    half = max(1, len(table) // 4)  # the first and the last quarter of the video
    for name, column in (("colour", slice(0, 3)), ("sharpness", slice(3, 4)), ("frame difference", slice(4, 5))):
        first, last = table[1 : 1 + half, column].mean(), table[-half:, column].mean()
        run.report(f"drift of {name}, last quarter minus first{suffix}", float(last - first))


# %% Main


def plan(config: Config) -> None:
    """--dry-run: parameters of every stage and the shapes at their borders."""
    image = lesson02.planned(config)
    lessons = (lesson04, lesson05, lesson06, lesson07)
    options = {lesson: preset_config(lesson.Config, lesson.PRESETS, config.preset) for lesson in lessons}
    with torch.device("meta"):
        models = {"image model": image.unet(), "prediction": lesson05.build(options[lesson05], image),
                  "interpolation": lesson06.Interpolator(options[lesson06], image),
                  "video autoencoder": lesson04.video_autoencoder(image, options[lesson04].kernel),
                  "upsampler": lesson07.Upsampler(options[lesson07])}
    length, size = frame_count(config), (image.config.height, image.config.width)
    keys = keys_for(length, config.passes)
    shapes = {"key frames": (keys, *image.shape), "interpolated": (4**config.passes * (keys - 1) + 1, *image.shape),
              "decoded": (length, 3, *size), "upsampled": (length, 3, *(lesson07.SCALE * s for s in size))}
    dry_run(config, models, shapes)
    print(f"total parameters: {sum(count(m) for m in models.values())}")


def keys_for(length: int, passes: int) -> int:
    """How many key frames lead to `length` frames: N become 4^passes (N - 1) + 1, of which the last may be left out."""
    return -(-(length - 1) // 4**passes) + 1


def frame_count(config: Config) -> int:
    return max(2, round(config.seconds * config.final_fps / 4 ** (2 - config.passes)))


def main(argv: list[str] | None = None) -> tuple | None:
    config = parse(Config, PRESETS, argv, __doc__)
    one_process(NAME)
    if config.dry_run:
        return plan(config)
    if config.first_frame:
        read_first_frame(config.first_frame, 8, 8)  # a wrong path should not cost a minute
    run = Run(NAME, config)
    clear(run.folder)
    image = lesson02.load(run)
    labels = conditions(1, config.night, config.cars)
    rate, length = config.final_fps / 4 ** (2 - config.passes), frame_count(config)
    first = first_latent(run, config, image, labels)
    large_throughout = config.upsampler and not config.upsampled_seconds
    size = lesson07.SCALE if large_throughout else 1
    source = open_data(config.data, size * image.config.height, size * image.config.width, config.final_fps)
    real = source.clips((config.seed, HELD_OUT), 8, 8, rate, "held-out").video
    for future in range(config.futures):
        name, start = f"long-{future}" if config.futures > 1 else "long", time.time()
        frames = frames_of(run, config, image, first, labels, length, future)
        frames, beginning = tee_first(frames, round(config.upsampled_seconds * rate) if config.upsampler else 0)
        if large_throughout:
            frames = enlarged(run, image, frames, future)
        record = write(run, name, frames, length, config.fps or rate)
        if beginning:
            frames = enlarged(run, image, beginning, future)
            write(run, f"{name}-large", frames, len(beginning), config.fps or rate)
        run.report(f"frames in {name}", len(record.rows))
        run.report(f"time of {name}", time.time() - start, "s")
        plot_drift(run, record, real, rate)
    print(f"pictures: {run.folder}/{name}.webp, contact_sheet.png, drift.png")
    known_good(run, PRESETS)
    return run, config, image, labels


if __name__ == "__main__":
    raise SystemExit(cli(main))
