"""Clips to train on: the built-in procedural scenes, or a folder of the user's videos.

Both kinds of source answer `clips(key, count, frames, fps, split)`, and the i-th clip depends on (key, i, split) alone:
a script passes (seed, ..., step) as key, so a resumed run sees what an uninterrupted one would have seen.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from common.scenes import MAX_CARS, Scene
from common.training import UserError

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")  # through PyAV
ANIMATIONS = (".gif", ".webp", ".png", ".apng")  # through Pillow
PICTURES = (".png", ".jpg", ".jpeg")  # numbered, one sub-folder a clip
CACHE_BYTES = 2**31  # decoded frames kept in memory; what does not fit is decoded again when needed


@dataclass
class Clips:
    """A batch: video `b t c h w` in [-1, 1]; night (1, 0, or -1 unknown) and cars in view (-1 unknown), b, int64;
    boxes `b t n 4` (x0 y0 x1 y1 in fractions of the frame, zeros where there is none); captions, "" where unknown."""

    video: torch.Tensor
    night: torch.Tensor
    cars: torch.Tensor
    boxes: torch.Tensor
    captions: list[str]


def as_video(frames: np.ndarray) -> torch.Tensor:
    """b t h w c uint8 -> b t c h w float32 in [-1, 1]."""
    return rearrange(torch.from_numpy(frames), "b t h w c -> b t c h w").float() / 127.5 - 1


def rng_of(key: Sequence[int], number: int, split: str) -> np.random.Generator:
    return np.random.default_rng([*key, number, int(split != "train")])


class DrivingScenes:
    """Procedural driving scenes: no download, any size and rate, labels and boxes known."""

    name, labelled = "driving", True

    def __init__(self, height: int, width: int, final_fps: float) -> None:
        self.height, self.width, self.final_fps = height, width, final_fps

    def clips(self, key: Sequence[int], count: int, frames: int, fps: float, split: str = "train") -> Clips:
        scenes = [Scene([*key, i, int(split != "train")]) for i in range(count)]
        times = [rng_of(key, i, split).uniform(0, 20) + np.arange(frames) / fps for i in range(count)]
        pairs = list(zip(scenes, times, strict=True))
        return Clips(
            as_video(np.stack([scene.render(t, self.height, self.width) for scene, t in pairs])),
            torch.tensor([int(scene.night) for scene in scenes]),
            torch.tensor([scene.car_count(t) for scene, t in pairs]),
            torch.from_numpy(np.stack([scene.boxes(t) for scene, t in pairs])).float(),
            [scene.caption for scene in scenes],
        )


# %% A folder of videos


@dataclass
class Video:
    """One file or sub-folder: when each frame is shown (seconds), its labels, and its frames once decoded."""

    path: Path
    times: np.ndarray
    night: int = -1
    cars: int = -1
    caption: str = ""
    pixels: np.ndarray | None = None

    @property
    def fps(self) -> float:
        return (len(self.times) - 1) / self.duration if self.duration > 0 else 0.0

    @property
    def duration(self) -> float:
        return float(self.times[-1] - self.times[0])

    def problem(self, frames: int, fps: float) -> str:
        """Why this video cannot give `frames` frames at `fps`; empty if it can. Never sampled above its own rate."""
        if frames > 1 and self.fps < 0.999 * fps:
            return f"{self.path.name} has {self.fps:.4g} frames a second"
        if self.duration + 0.5 / max(self.fps, 1e-9) < (frames - 1) / fps:
            return f"{self.path.name} is {self.duration:.3g} s long"
        return ""


def open_av(path: Path):
    try:
        import av
    except ImportError:
        raise UserError(f'{path.name} needs the video extra: pip install av (or pip install -e ".[video]")') from None
    return av.open(str(path))


def frame_times(path: Path, final_fps: float) -> np.ndarray:
    """When each frame is shown, in seconds. Any exception means that the file cannot be used."""
    if path.is_dir():
        rate = path / "fps.txt"
        fps = float(rate.read_text()) if rate.exists() else final_fps
        return np.arange(len(pictures_in(path))) / fps
    if path.suffix.lower() in VIDEOS:
        with open_av(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            return np.array([float(frame.pts * stream.time_base) for frame in container.decode(stream)])
    with Image.open(path) as image:
        durations = [frame.info.get("duration", 100) / 1000 for frame in ImageSequence.Iterator(image)]
    return np.cumsum([0.0, *durations[:-1]])


def pictures_in(folder: Path) -> list[Path]:
    """The numbered pictures of a sub-folder, 2 before 10."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    return sorted(found, key=lambda path: (len(path.stem), path.stem))


def read_frames(path: Path, first: int, last: int, height: int, width: int) -> np.ndarray:
    """Frames first..last, resized and centre-cropped: t h w 3 uint8."""

    def fit(image: Image.Image) -> np.ndarray:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))

    if path.is_dir():
        return np.stack([fit(Image.open(picture)) for picture in pictures_in(path)[first : last + 1]])
    if path.suffix.lower() in VIDEOS:
        with open_av(path) as container:
            frames = []
            for number, frame in enumerate(container.decode(video=0)):
                if number > last:
                    break
                if number >= first:
                    frames.append(fit(frame.to_image()))
            return np.stack(frames)
    with Image.open(path) as image:
        return np.stack([fit(f) for n, f in enumerate(ImageSequence.Iterator(image)) if first <= n <= last])


class VideoFolder:
    """A folder of videos of any size and rate, sampled by time stamp; labels.csv and captions where there are.

    A fifth of the clips (the longest ones) is held out. Unusable files are named and skipped.
    Raises UserError when nothing usable is there, or a label is wrong.
    """

    def __init__(self, folder: Path, height: int, width: int, final_fps: float) -> None:
        self.folder, self.name, self.height, self.width, self.final_fps = folder, folder.name, height, width, final_fps
        self.videos: list[Video] = []
        skipped = []
        for path in self._candidates():
            try:
                times = frame_times(path, final_fps)
                if len(times) < 2:
                    raise ValueError("fewer than two frames")
                self.videos.append(Video(path, times))
            except UserError:
                raise
            except Exception as error:  # decoders raise what they like
                skipped.append(f"{path.name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
        if skipped:
            print(
                f"skipped {len(skipped)} unreadable of {len(skipped) + len(self.videos)}: {', '.join(skipped)}",
                file=sys.stderr,
            )
        if not self.videos:
            raise UserError(
                f"--data {folder}: no usable video; looked for {', '.join(VIDEOS)} and animated "
                f"{', '.join(ANIMATIONS)} files, and sub-folders of numbered png or jpg frames"
            )
        self._read_labels()
        by_length = sorted(self.videos, key=lambda video: (-video.duration, video.path.name))
        number = max(1, len(self.videos) // 5) if len(self.videos) > 2 else 0
        self.held_out = {video.path for video in by_length[:number]}
        self.labelled = all(video.night >= 0 and video.cars >= 0 for video in self.videos)
        self.told: set = set()

    def _candidates(self) -> list[Path]:
        if not self.folder.is_dir():
            raise UserError(f"--data {self.folder}: no such folder (or use --data driving, the built-in scenes)")
        return sorted(
            path
            for path in self.folder.iterdir()
            if not path.name.startswith(".")
            and (path.suffix.lower() in VIDEOS + ANIMATIONS or path.is_dir() and pictures_in(path))
        )

    def _read_labels(self) -> None:
        """labels.csv (name, night, cars, caption) and captions in text files beside the clips."""
        by_name = {name: video for video in self.videos for name in (video.path.name, video.path.stem)}
        for video in self.videos:
            if video.path.with_suffix(".txt").is_file():
                video.caption = video.path.with_suffix(".txt").read_text().strip()
        path = self.folder / "labels.csv"
        if not path.exists():
            return
        with path.open(newline="") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                video = by_name.get(row.get("name") or "")
                if video is None:
                    raise UserError(f"{path}, line {line}: there is no clip named {row.get('name')!r}")
                try:
                    video.night, video.cars = int(row.get("night") or -1), int(row.get("cars") or -1)
                    if video.night not in (-1, 0, 1) or not -1 <= video.cars <= 99:
                        raise ValueError
                except ValueError:
                    raise UserError(f"{path}, line {line}: night is 0 or 1, cars a number from 0 to 99") from None
                video.caption = row.get("caption") or video.caption

    def _tell(self, text: str) -> None:
        """Prints a note once."""
        if text not in self.told:
            self.told.add(text)
            print(text, file=sys.stderr)

    def usable(self, frames: int, fps: float, split: str) -> list[Video]:
        """The videos of a split that can give such a clip; the others are named once."""
        problems = [problem for video in self.videos if (problem := video.problem(frames, fps))]
        if problems:
            self._tell(
                f"skipped {len(problems)} of {len(self.videos)} clips for {frames} frames at {fps:g} a second "
                f"({(frames - 1) / fps:.3g} s): {', '.join(problems)}"
            )
        good = [video for video in self.videos if not video.problem(frames, fps)]
        if not good:
            raise UserError(
                f"--data {self.folder}: no clip gives {frames} frames at {fps:g} a second; "
                "use longer clips, or --final-fps with the rate they have"
            )
        chosen = [video for video in good if (video.path in self.held_out) == (split != "train")]
        if not chosen:
            self._tell(
                f"note: too few clips of {frames} frames at {fps:g} a second to hold any out; "
                "training and held-out clips are the same"
            )
        return chosen or good

    def clips(self, key: Sequence[int], count: int, frames: int, fps: float, split: str = "train") -> Clips:
        videos, windows, picked = self.usable(frames, fps, split), [], []
        for i in range(count):
            rng = rng_of(key, i, split)
            video = videos[rng.integers(len(videos))]
            slack = max(0.0, video.duration - (frames - 1) / fps)
            wanted = video.times[0] + rng.uniform(0, slack) + np.arange(frames) / fps
            windows.append(self._pixels(video, nearest(video.times, wanted)))
            picked.append(video)
        return Clips(
            as_video(np.stack(windows)),
            torch.tensor([v.night for v in picked]),
            torch.tensor([v.cars for v in picked]),
            torch.zeros(count, frames, MAX_CARS, 4),
            [v.caption for v in picked],
        )

    def _pixels(self, video: Video, numbers: np.ndarray) -> np.ndarray:
        """Frames by number, from memory if the video is there or fits."""
        size = self.height * self.width * 3
        if video.pixels is None:
            kept = sum(v.pixels.nbytes for v in self.videos if v.pixels is not None)
            if kept + size * len(video.times) > CACHE_BYTES:
                return read_frames(video.path, numbers[0], numbers[-1], self.height, self.width)[numbers - numbers[0]]
            video.pixels = read_frames(video.path, 0, len(video.times) - 1, self.height, self.width)
        return video.pixels[numbers]


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Numbers of the frames shown nearest to the times wanted. By time stamp: 25 fps has no even stride to 10."""
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    return np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)


def open_data(data: str, height: int, width: int, final_fps: float) -> DrivingScenes | VideoFolder:
    """--data: "driving", or a folder of videos."""
    if data == "driving":
        return DrivingScenes(height, width, final_fps)
    try:
        return VideoFolder(Path(data), height, width, final_fps)
    except UnidentifiedImageError as error:
        raise UserError(f"--data {data}: {error}") from None
