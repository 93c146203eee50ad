"""Training data: the built-in driving scenes, or a folder of the user's own videos.

    source = open_data("driving", height=64, width=128, final_fps=30.0)
    clips = source.clips(key=(seed, step), count=8, frames=8, fps=30 / 16)     # clips.video: 8 8 3 64 128

A request says how many frames at which rate; the rates of this project are final_fps, a quarter and a sixteenth of it.
The answer depends on the key alone, never on what was asked before, so a resumed run sees the clips it would have seen.

A folder holds clips in any mixture of: mp4, mov, avi, mkv, webm (read by PyAV); animated gif, webp, png (Pillow);
sub-folders of numbered png or jpg frames, whose rate is final_fps or the number in the sub-folder's fps.txt. Frames are
picked by time stamp, not by stride: 25 frames a second have no even stride to 10, and phones record at uneven rates.
Beside the clips may stand labels.csv (name, night, cars, caption), and CLIP.txt with the caption of CLIP.mp4.
"""

import contextlib
import csv
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

from common.scenes import MAX_CARS, Scene
from common.training import UserError

SPLITS = ("train", "held-out")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
ANIMATIONS = (".gif", ".webp", ".apng", ".png")
PICTURES = (".png", ".jpg", ".jpeg")
LOOKED_FOR = "*.mp4, mov, avi, mkv, webm; animated *.gif, webp, apng, png; sub-folders of numbered png or jpg frames"
MEMORY = 2 * 2**30  # bytes of decoded frames to keep; clips beyond it are decoded again each time


@dataclass
class Clips:
    """A batch of clips and what is known about them."""

    video: torch.Tensor  # b t c h w, float32 in [-1, 1]
    night: torch.Tensor  # b, int64: 1 night, 0 day, -1 unknown
    cars: torch.Tensor  # b, int64: cars in view ("crowdedness"), -1 unknown
    boxes: torch.Tensor  # b t MAX_CARS 4, float32: x0 y0 x1 y1 in [0, 1], zeros where absent or unknown
    captions: list[str]  # "" where unknown


def keyed(key: Sequence[int], i: int, split: str, stream: int = 0) -> np.random.Generator:
    """The random numbers of clip i: the same for the same arguments, unrelated for any others."""
    words = [*key, i, SPLITS.index(split)]
    return np.random.default_rng(np.random.SeedSequence(words, spawn_key=(stream,)))


def batch(frames: list[np.ndarray], night: list[int], cars: list[int], boxes: np.ndarray, captions: list[str]) -> Clips:
    """Clips from a list of (t h w c, uint8) and the labels, one entry a clip; boxes: b t MAX_CARS 4."""
    video = rearrange(torch.from_numpy(np.stack(frames)), "b t h w c -> b t c h w").contiguous()
    return Clips(video.float() / 127.5 - 1, torch.tensor(night), torch.tensor(cars), torch.from_numpy(boxes), captions)


def note(message: str) -> None:
    print(message, file=sys.stderr)


# %% The built-in scenes


class DrivingScenes:
    """Procedural driving scenes, no two alike; each is watched from a random moment of its first 20 seconds."""

    name, labelled = "driving", True

    def __init__(self, height: int, width: int, final_fps: float) -> None:
        self.height, self.width, self.final_fps = height, width, final_fps

    def clips(self, key: Sequence[int], count: int, frames: int, fps: float, split: str = "train") -> Clips:
        """`count` clips of `frames` frames at `fps`. Clip i depends on (key, i, split) only."""
        scenes = [Scene([*key, i, SPLITS.index(split)]) for i in range(count)]
        starts = [keyed(key, i, split).uniform(0, 20) for i in range(count)]
        times = [start + np.arange(frames) / fps for start in starts]
        pairs = list(zip(scenes, times, strict=True))
        return batch(
            [scene.render(t, self.height, self.width) for scene, t in pairs],
            [int(scene.night) for scene in scenes],
            [scene.car_count(t) for scene, t in pairs],
            np.stack([scene.boxes(t) for scene, t in pairs]),
            [scene.caption for scene in scenes],
        )


# %% Reading one clip: first when its frames are shown, then the frames that are wanted


@dataclass
class Recording:
    """One clip of a folder. A single picture has no rate: its fps is infinite."""

    path: Path
    times: np.ndarray  # seconds, increasing, as stored in the file
    night: int = -1
    cars: int = -1
    caption: str = ""
    kept: np.ndarray | None = None  # t h w c, uint8: all frames, once they are in memory

    @property
    def stem(self) -> str:
        return self.path.name if self.path.is_dir() else self.path.stem

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return float(self.times[-1] - self.times[0])

    @property
    def fps(self) -> float:
        return (len(self.times) - 1) / self.seconds if len(self.times) > 1 else math.inf

    def too_slow(self, fps: float) -> bool:
        return self.fps < 0.999 * fps  # 29.97 passes for 30

    def problem(self, frames: int, fps: float) -> str:
        """Why it cannot give so many frames at this rate; "" if it can. Half a frame may be missing at the end."""
        need = (frames - 1) / fps
        if self.too_slow(fps):
            return f"{self.path.name} has {self.fps:.4g} fps, {fps:g} are asked for"
        if need > self.seconds + 0.5 / self.fps:
            return f"{self.path.name} is {self.seconds:.1f} s long, {frames} frames at {fps:g} fps need {need:.1f} s"
        return ""


def natural(path: Path) -> list:
    """Sorting key that puts 9.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)]


def frame_files(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.name[0] != "."), key=natural)


def open_video(path: Path):
    """A PyAV container. Raises UserError without PyAV, ValueError without pictures."""
    try:
        import av
    except ImportError:
        raise UserError(f'{path} needs PyAV to be read: pip install av (or pip install "videoldm[video]")') from None
    container = av.open(str(path), metadata_errors="ignore")
    if not container.streams.video:
        raise ValueError("no video stream")
    container.streams.video[0].thread_type = "AUTO"
    return container


def stamps(path: Path, default_fps: float) -> np.ndarray:
    """When a clip's frames are shown: (t), in seconds, increasing. Raises all sorts of errors if it is damaged."""
    if path.is_dir():
        return np.arange(len(frame_files(path))) / folder_fps(path, default_fps)
    if path.suffix.lower() in ANIMATIONS:
        return np.array([time for time, _ in animation_pictures(path)])
    found = []
    with open_video(path) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):  # one packet is one frame, not yet decoded
            if packet.is_corrupt:
                raise ValueError("truncated")
            if packet.size and not packet.is_discard and packet.pts is not None:
                found.append(packet.pts)
        return np.unique(found) * float(stream.time_base)  # in order of decoding before, of showing after


def folder_fps(folder: Path, default: float) -> float:
    """The rate of a sub-folder of frames: the number in its fps.txt, else the default."""
    file = folder / "fps.txt"
    if not file.exists():
        return default
    with contextlib.suppress(ValueError):
        if 0 < (fps := float(file.read_text())) < math.inf:
            return fps
    raise UserError(f"{file}: must hold one positive number, the frames per second")


Pictures = Iterator[tuple[float, Callable[[], Image.Image]]]  # time stamp, and what makes the picture


def video_pictures(path: Path, start: float) -> Pictures:
    """A video's frames, decoded from the key frame before `start` seconds on."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        scale, first = float(stream.time_base), stream.start_time or 0
        # a second early: the frames shown just before a key frame may be stored behind it
        container.seek(max(int((start - 1) / scale), first), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None:
                yield frame.pts * scale, frame.to_image


def animation_pictures(path: Path) -> Pictures:
    """The frames of an animated gif, webp or png, from the first."""
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) == 1:
            raise ValueError("not animated")
        time = 0.0
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            yield time, image.copy
            time += (image.info.get("duration") or 100) / 1000  # a duration of 0 is shown as 0.1 s by every browser


def pictures(recording: Recording, start: float) -> Pictures:
    """A clip's frames in order; the first is at or before `start` seconds."""
    path = recording.path
    if path.is_dir():
        return zip(recording.times, (partial(Image.open, file) for file in frame_files(path)), strict=True)
    return video_pictures(path, start) if path.suffix.lower() in VIDEOS else animation_pictures(path)


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the time nearest to each wanted one, the earlier of two equally near ones."""
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted - 1e-6)


def read(recording: Recording, indices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames (t h w c, uint8) of the given increasing indices, scaled to fill the size and cropped at the centre."""
    wanted, done = recording.times[indices], 0
    result = np.empty((len(indices), height, width, 3), np.uint8)
    try:
        with contextlib.closing(pictures(recording, wanted[0])) if False else contextlib.nullcontext():
            pass
    except Exception as error:
        raise error
    return result
