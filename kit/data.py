"""Training data: the built-in driving scenes, or a folder of the user's own videos.

    source = open_data("driving", height=64, width=128, final_fps=30.0)
    clips = source.clips(key=(seed, step), count=8, frames=8, fps=30 / 16)     # clips.video: 8 8 3 64 128

A request says how many frames at which rate: final_fps, a quarter or a sixteenth of it in this project. The
answer depends on the key alone, never on what was asked before, so a resumed run sees the same clips. In place of
a count may stand the numbers of the clips that are wanted, as when several processes share a batch.

A folder holds clips in any mixture of: videos (whatever PyAV opens), at any depth; animated gif, webp, png (Pillow);
sub-folders of numbered png or jpg frames, at final_fps or at the rate in the sub-folder's fps.txt. Frames are picked by
time stamp, not by stride: 25 frames a second have no even stride to 10, and phones record unevenly. In the folder may
stand labels.csv (name, night, cars, caption), and beside CLIP.mp4 its caption in CLIP.txt.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange

from kit.errors import UserError, note
from kit.media import (
    ANIMATIONS,
    PICTURES,
    Frames,
    animation_frames,
    fitted,
    folder_times,
    open_picture,
    read_text,
    reason,
    still,
    take,
    video_facts,
    video_frames,
    video_times,
)
from kit.scenes import MAX_CARS, Scene

SPLITS = ("train", "held-out")
HELD_OUT = 1_000_000_000  # keys of held-out batches begin here
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".ts", ".mts", ".m2ts", ".mpg", ".wmv", ".flv", ".3gp")
TEXTS = (".txt", ".csv")  # captions and labels
COLUMNS = ("name", "night", "cars", "caption")  # of labels.csv
LOOKED_FOR = "what PyAV opens (mp4, mov, mkv, ...); animated gif, webp, apng, png; sub-folders of png or jpg frames"
MEMORY = 2 * 2**30  # bytes of decoded frames to keep; clips beyond it are decoded again each time


@dataclasses.dataclass
class Clips:
    """A batch of clips and what is known about them."""

    video: torch.Tensor  # b t c h w, float32 in [-1, 1]
    night: torch.Tensor  # b, int64: 1 night, 0 day, -1 unknown
    cars: torch.Tensor  # b, int64: cars in view ("crowdedness"), -1 unknown
    boxes: torch.Tensor  # b t MAX_CARS 4, float32: x0 y0 x1 y1 in [0, 1], zeros where absent or unknown
    captions: list[str]  # "" where unknown
    speed: torch.Tensor  # b, float32: of the camera, m/s, nan where unknown
    curvature: torch.Tensor  # b, float32: of the road, 1/m, positive to the right, nan where unknown

    def __len__(self) -> int:
        return len(self.night)

    def pick(self, rows: Sequence[int]) -> "Clips":
        """The clips of these row numbers, in this order; a row may come more than once."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "captions"}
        return Clips(captions=[self.captions[i] for i in rows], **{k: v[list(rows)] for k, v in tensors.items()})

    def repeat(self, times: int) -> "Clips":
        """Every clip `times` times in a row."""
        return self.pick([i for i in range(len(self)) for _ in range(times)])

    def join(self, other: "Clips") -> "Clips":
        """These clips and behind them the others."""
        both = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Clips(**{name: a + b if name == "captions" else torch.cat([a, b]) for name, a, b in both})


class Source(Protocol):
    """Where clips come from: the built-in scenes, a folder of videos, and what prepares or keeps theirs."""

    def clips(self, key: Sequence[int], rows: int | Sequence[int], frames: int, fps: float,
              split: str = "train") -> Clips:
        """`rows` clips (or of a batch those numbers) of so many frames at this rate; the same key, the same clips."""
        ...


def keyed(key: Sequence[int], i: int, split: str) -> np.random.Generator:
    """The random numbers of clip i, other ones than those that draw its Scene."""
    return np.random.default_rng(np.random.SeedSequence([*key, i, SPLITS.index(split)], spawn_key=(1,)))


def as_video(frames: np.ndarray) -> torch.Tensor:
    """Frames b t h w c, uint8, to b t c h w in [-1, 1]."""
    return (rearrange(torch.from_numpy(frames), "b t h w c -> b t c h w").float() / 127.5 - 1).contiguous()


def listing(parts: list[str], most: int = 3) -> str:
    return "; ".join(parts[:most]) + (f"; and {len(parts) - most} more" if len(parts) > most else "")


class DrivingScenes:
    """Procedural driving scenes, no two alike, each watched from a random moment of its first 20 seconds."""

    name, labelled = "driving", True

    def __init__(self, height: int, width: int, final_fps: float,
                 scene: Callable[[Sequence[int]], Scene] = Scene) -> None:
        self.height, self.width, self.final_fps, self.scene = height, width, final_fps, scene

    def clips(self, key: Sequence[int], rows: int | Sequence[int], frames: int, fps: float,
              split: str = "train") -> Clips:
        """Clips of `frames` frames at `fps`: so many, or those of these numbers. Clip i depends on (key, i, split)."""
        rows = range(rows) if isinstance(rows, int) else rows
        scenes = [self.scene([*key, i, SPLITS.index(split)]) for i in rows]
        times = [keyed(key, i, split).uniform(0, 20) + np.arange(frames) / fps for i in rows]
        watched = list(zip(scenes, times, strict=True))
        return Clips(
            as_video(np.stack([scene.render(t, self.height, self.width) for scene, t in watched])),
            torch.tensor([int(scene.night) for scene in scenes]),
            torch.tensor([scene.car_count(t) for scene, t in watched]),
            torch.from_numpy(np.stack([scene.boxes(t) for scene, t in watched])), [scene.caption for scene in scenes],
            torch.tensor([scene.speed for scene in scenes]), torch.tensor([scene.curvature for scene in scenes]))


# %% One clip of a folder: first when its frames are shown, then the frames that are wanted

SLACK = 1.05  # a clock may be so wrong: 29.97 and 29.5 pass for 30


@dataclasses.dataclass
class Recording:
    """One clip of a folder."""

    path: Path
    times: np.ndarray  # seconds, increasing, as stored in the file
    size: tuple[int, int] = (0, 0)  # height and width as shown
    said: Sequence[str] = ()  # what a person should know: turned, HDR, ...
    night: int = -1
    cars: int = -1
    caption: str = ""
    kept: np.ndarray | None = None  # t h w c, uint8: all frames, once they are in memory

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return float(self.times[-1] - self.times[0])

    @property
    def fps(self) -> float:
        """The rate without the holes; a single picture has none and passes for any."""
        steps = np.diff(self.times)
        return 1 / float(steps[steps <= 1.5 * np.median(steps)].mean()) if len(steps) else math.inf

    def too_slow(self, fps: float) -> bool:
        return self.fps * SLACK < fps

    def starts(self, frames: int, fps: float) -> np.ndarray:
        """When a clip of so many frames can begin, counted from the first frame: n 2, from and to, in seconds.

        At every moment of it there is a frame not farther away than half a step; across a hole there is none.
        """
        latest, reach = self.seconds - (frames - 1) / fps, 0.5 * SLACK / fps
        if self.too_slow(fps) or latest < -0.5 / self.fps:  # half a frame may lack at the end
            return np.empty((0, 2))
        hole = np.flatnonzero(np.diff(self.times) > 2 * reach + 1e-6)
        holes = np.stack([self.times[hole] + reach, self.times[hole + 1] - reach], axis=1) - self.times[0]
        cut = (holes - np.arange(frames)[:, None, None] / fps).reshape(-1, 2)  # from where one of the frames is in one
        cut = cut[np.argsort(cut[:, 0])]
        begin = np.maximum.accumulate(np.append(0.0, cut[:, 1]))
        end = np.append(cut[:, 0], np.inf).clip(max=max(latest, 0.0))
        return np.stack([begin, end], axis=1)[begin <= end]

    def problem(self, frames: int, fps: float) -> str:
        """Why it cannot give so many frames at this rate; "" if it can."""
        if len(self.starts(frames, fps)):
            return ""
        if self.too_slow(fps):
            return f"{self.path.name} has {self.fps:.4g} fps, {fps:g} are asked for"
        asked = f"{frames} frames at {fps:g} fps"
        if (frames - 1) / fps > self.seconds:
            return f"{self.path.name} is {self.seconds:.1f} s long, {asked} need {(frames - 1) / fps:.1f} s"
        return f"{self.path.name} has too many holes in time for {asked} in a row"


def natural(path: Path) -> list:
    """Sorting key that puts 9.png before 10.png."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.name))]


def listed(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.name[0] != "."), key=natural)


def frame_files(folder: Path) -> list[Path]:
    return [path for path in listed(folder) if path.suffix.lower() in PICTURES]


def examine(path: Path, default_fps: float) -> Recording:
    """A clip, with the times of its frames but without them. Any error but UserError means damage."""
    if path.is_dir():
        files = frame_files(path)
        times, picture = folder_times(files, path, default_fps), open_picture(files[0])
        size, said = (picture.height, picture.width), []
    elif path.suffix.lower() in ANIMATIONS:
        times = np.array([time for time, _ in animation_frames(path)])
        picture = next(animation_frames(path))[1]()
        size, said = (picture.height, picture.width), []
    else:
        times = video_times(path)
        size, said = video_facts(path) if len(times) else ((0, 0), [])
    if len(times) == 0:
        raise ValueError("no frames in it")
    return Recording(path, times, size, said)


def frames_from(recording: Recording, start: float) -> Frames:
    """A clip's frames in order; the first is at or before `start` seconds."""
    path = recording.path
    if path.is_dir():
        makers = [functools.partial(open_picture, file) for file in frame_files(path)]
        return zip(recording.times.tolist(), makers, strict=True)
    return animation_frames(path) if path.suffix.lower() in ANIMATIONS else video_frames(path, start)


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the time nearest to each wanted one, the earlier of two equally near ones."""
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted - 1e-6)


def read(recording: Recording, indices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames (t h w c, uint8) of increasing indices, scaled to fill the size and cropped at the centre.

    Raises UserError when the file turns out to be damaged.
    """
    wanted, done = recording.times[indices], 0
    result = np.empty((len(indices), height, width, 3), np.uint8)
    try:
        for picture in take(frames_from(recording, wanted[0]), wanted):
            result[done] = fitted(picture, height, width)
            done += 1
        return result
    except Exception as error:  # PyAV and Pillow raise whatever the codec raises
        where = f"{recording.path}: cannot read the frame at {wanted[done] - recording.times[0]:.2f} s"
        raise UserError(f"{where} ({reason(error)}); remove or replace this clip") from error


# %% A folder of clips


def candidates(folder: Path) -> list[Path]:
    """What may be a clip, sorted by name: every file but texts, sub-folders of pictures, and what is in the others; or
    the folder itself, where it holds nothing but still pictures."""
    try:
        paths, found = listed(folder), []
    except OSError as error:
        advice = 'give a folder of videos, or "driving" for the built-in scenes'
        raise UserError(f"--data {folder}: cannot be read ({reason(error)}); {advice}") from None
    stills = [path for path in paths if path.suffix.lower() in PICTURES]
    if len(stills) > 1 and len(stills) == sum(path.suffix.lower() not in TEXTS for path in paths) and still(stills[0]):
        return [folder]
    for path in paths:
        if not path.is_dir():
            found += [] if path.suffix.lower() in TEXTS else [path]
        elif frame_files(path) and not any(p.is_dir() or p.suffix.lower() in VIDEOS for p in listed(path)):
            found.append(path)
        else:
            found += candidates(path)
    return found


@functools.cache
def examined(path: Path, default_fps: float, changed: int) -> Recording:
    return examine(path, default_fps)


def fingerprint(folder: Path) -> str:
    """What tells the contents of a folder from another's: the names and sizes of its files. Raises UserError."""
    paths = candidates(folder)
    files = [file for path in paths for file in (frame_files(path) if path.is_dir() else [path])]
    said = repr([(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files])
    return f"{len(paths)} clips, {hashlib.blake2b(said.encode(), digest_size=4).hexdigest()}"


def find_recordings(folder: Path, final_fps: float) -> list[Recording]:
    """All readable clips of a folder; the others are named on stderr. Raises UserError when there is none."""
    found, skipped = [], []
    for path in candidates(folder):
        try:
            found.append(dataclasses.replace(examined(path, final_fps, path.stat().st_mtime_ns)))
        except UserError:
            raise
        except Exception as error:  # PyAV and Pillow raise whatever the codec raises
            skipped.append(f"{path.relative_to(folder)} ({reason(error)})")
    damaged = f"skipped {len(skipped)} of {len(skipped) + len(found)} files: {listing(skipped)}"
    if not found:
        what = f"{damaged}; looked for {LOOKED_FOR}" if skipped else f"looked for {LOOKED_FOR}"
        raise UserError(f"--data {folder}: no clip; {what}")
    if skipped:
        note(f"{folder}: {damaged}")
    return found


def summary(recordings: list[Recording]) -> str:
    """What a folder gives, in a line: clips, minutes, rates, sizes, and what a person should know of them."""
    rates = sorted({f"{r.fps:.4g}" for r in recordings if r.fps < math.inf}, key=float)
    sizes = sorted({r.size for r in recordings})
    parts = [f"{len(recordings)} clips", f"{sum(r.seconds for r in recordings) / 60:.1f} minutes",
             f"{' to '.join(dict.fromkeys([rates[0], rates[-1]]))} fps" if rates else "single pictures",
             " to ".join(f"{width} x {height}" for height, width in dict.fromkeys([sizes[0], sizes[-1]]))]
    said = Counter(what for r in recordings for what in r.said)
    return ", ".join(parts) + "".join(f"; {count} {what}" for what, count in said.items())


def look_into(folder: Path, final_fps: float) -> list[Recording]:
    """The clips of a folder, and the line that says what it gives. Raises UserError when there is none."""
    recordings = find_recordings(folder, final_fps)
    note(f"{folder}: {summary(recordings)}")
    return recordings


USUAL_RATES = np.array([5, 6, 7.5, 8, 10, 12, 12.5, 15, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 240])


def usual_rate(recordings: Sequence[Recording]) -> float:
    """The rate that most minutes of some clips have. What is within 2 % of a usual one (29.97, a phone's 29.66) passes
    for it; single pictures have none, and where there is nothing else it is 30."""
    seconds: Counter = Counter()
    for recording in recordings:
        if recording.fps < math.inf:
            near = float(USUAL_RATES[np.abs(np.log(USUAL_RATES / recording.fps)).argmin()])
            rate = near if abs(recording.fps / near - 1) < 0.02 else float(f"{recording.fps:.3g}")
            seconds[rate] += recording.seconds
    return max(seconds, key=lambda rate: (seconds[rate], rate)) if seconds else 30.0


def names_of(path: Path, folder: Path) -> set[str]:
    """What a clip may be called in labels.csv: its name, with or without suffix, or its path in the folder."""
    names = {path.name, path.relative_to(folder).as_posix(), path.name if path.is_dir() else path.stem}
    return {unicodedata.normalize("NFC", name) for name in names}


def read_labels(folder: Path, recordings: list[Recording]) -> None:
    """Fills in night, cars and caption from CLIP.txt and labels.csv. Raises UserError with file and line."""
    for recording in recordings:
        path = recording.path
        text = path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")
        if text.is_file():
            recording.caption = " ".join(read_text(text).split())
    table = folder / "labels.csv"
    if not table.is_file():
        return
    known = set().union(*(names_of(path, folder) for path in candidates(folder)))  # of damaged clips, too
    rows = csv.DictReader(io.StringIO(read_text(table), newline=""), restval="")
    rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
    columns = f"the columns are {', '.join(COLUMNS)}"
    if "name" not in rows.fieldnames or (unknown := set(rows.fieldnames) - set(COLUMNS)):
        what = f"has columns {listing(sorted(unknown))}" if "name" in rows.fieldnames else "has no column 'name'"
        raise UserError(f"{table}, line 1: {what}; {columns}")
    for row in rows:
        where = f"{table}, line {rows.line_num}"
        if None in row:
            raise UserError(f"{where}: more values than columns; put a caption with a comma in quotes")
        name = unicodedata.normalize("NFC", row["name"].strip())
        if name not in known:
            raise UserError(f"{where}: no clip is called '{name}'; {columns}")
        for recording in recordings:
            if name in names_of(recording.path, folder):
                recording.night = label(row, "night", "0|1", "1 (night), 0 (day)", where)
                recording.cars = label(row, "cars", "[0-9]{1,9}", "a whole number", where)
                recording.caption = row.get("caption", "").strip() or recording.caption


def label(row: dict[str, str], column: str, pattern: str, expected: str, where: str) -> int:
    """A number of labels.csv, -1 where nothing is written."""
    text = row.get(column, "").strip()
    if text and not re.fullmatch(pattern, text):
        raise UserError(f"{where}: {column} is '{text}', must be {expected} or empty")
    return int(text or -1)


class VideoFolder:
    """The clips of a folder. Raises UserError for a folder without clips, and for labels that do not fit.

    A fifth of the clips is held out, chosen once on opening: the longest of those that have the final rate,
    because a held-out clip too short for key frames would be of no use.
    """

    def __init__(self, folder: Path, height: int, width: int, final_fps: float) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.height, self.width, self.final_fps = height, width, final_fps
        self.recordings = look_into(folder, final_fps)
        read_labels(folder, self.recordings)
        self.labelled = all(r.night >= 0 and r.cars >= 0 for r in self.recordings)
        # lengths count as equal to a tenth of a second; the sort keeps the order of names
        order = sorted(self.recordings, key=lambda r: (r.too_slow(final_fps), -round(r.seconds, 1)))
        self.held_out = {r.path for r in order[: max(len(order) // 5, 1)]} if len(order) >= 3 else set()
        if not self.held_out:
            note(f"{folder}: fewer than 3 clips, so train and held-out share them")
        self.memory, self.pools = MEMORY, {}

    def clips(self, key: Sequence[int], rows: int | Sequence[int], frames: int, fps: float,
              split: str = "train") -> Clips:
        """Clips of `frames` frames at `fps`: so many, or those of these numbers. Clip i depends on (key, i, split).

        A clip is drawn as often as it is long. Raises UserError when none is long and fast enough.
        """
        chosen = self.choose(key, rows, frames, fps, split)
        video = np.stack([self.frames(*one) for one in chosen])
        clips = self.describe([recording for recording, _ in chosen], frames)
        return dataclasses.replace(clips, video=as_video(video))

    def choose(self, key: Sequence[int], rows: int | Sequence[int], frames: int, fps: float,
               split: str) -> list[tuple[Recording, np.ndarray]]:
        """From which recording each clip is, and which of its frames."""
        if (frames, fps, split) not in self.pools:
            self.pools[frames, fps, split] = self.pool(frames, fps, split)
        pool = self.pools[frames, fps, split]
        lengths, chosen = np.array([len(recording.times) for recording, _ in pool]), []
        for i in range(rows) if isinstance(rows, int) else rows:
            rng = keyed(key, i, split)
            recording, starts = pool[rng.choice(len(pool), p=lengths / lengths.sum())]
            before = np.append(0.0, np.cumsum(starts[:, 1] - starts[:, 0]))
            place = rng.uniform(0, before[-1])
            which = int(np.searchsorted(before[1:-1], place, side="right"))
            start = recording.times[0] + starts[which, 0] + place - before[which]
            chosen.append((recording, nearest(recording.times, start + np.arange(frames) / fps)))
        return chosen

    def describe(self, recordings: list[Recording], frames: int) -> Clips:
        """What is known about clips, without their video."""
        night, cars, captions = zip(*((r.night, r.cars, r.caption) for r in recordings), strict=True)
        boxes, unknown = torch.zeros(len(recordings), frames, MAX_CARS, 4), torch.full((len(recordings),), math.nan)
        return Clips(torch.empty(0), torch.tensor(night), torch.tensor(cars), boxes, list(captions), unknown, unknown)

    def pool(self, frames: int, fps: float, split: str) -> list[tuple[Recording, np.ndarray]]:
        """The long and fast enough clips of a split, and when they can begin; where it has none, the other split's,
        with a note."""
        problems = [r.problem(frames, fps) for r in self.recordings]
        usable = [r for r, problem in zip(self.recordings, problems, strict=True) if not problem]
        reasons = [problem for problem in problems if problem]
        if not usable:
            advice = "use longer clips, fewer frames or a higher --final-fps"
            if all(r.too_slow(fps) for r in self.recordings):
                advice = f"try --final-fps {max(r.fps for r in self.recordings) * self.final_fps / fps:.4g}"
            raise UserError(f"--data {self.folder}: no usable clip ({listing(reasons)}); {advice}")
        if reasons:
            note(f"skipped {len(reasons)} of {len(self.recordings)} clips: {listing(reasons)}")
        wanted = [r for r in usable if (r.path in self.held_out) == (SPLITS.index(split) == 1)]
        if not wanted and self.held_out:
            asked = f"no {split} clip has {frames} frames at {fps:g} fps"
            note(f"{self.folder}: {asked}, so clips of the other split are used")
        return [(r, r.starts(frames, fps)) for r in wanted or usable]

    def frames(self, recording: Recording, indices: np.ndarray) -> np.ndarray:
        """Frames t h w c, uint8. The first call keeps the whole clip in memory if there is room for it."""
        size = len(recording.times) * self.height * self.width * 3
        if recording.kept is None and size <= self.memory:
            recording.kept = read(recording, np.arange(len(recording.times)), self.height, self.width)
            self.memory -= size
        if recording.kept is None:
            return read(recording, indices, self.height, self.width)
        return recording.kept[indices]


class Around:
    """Another source, but for its training clips, whose keys are (seed, lesson, step, ...): steps follow each other."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def clips(self, key: Sequence[int], rows: int | Sequence[int], frames: int, fps: float,
              split: str = "train") -> Clips:
        if split != "train" or len(key) < 3:
            return self.source.clips(key, rows, frames, fps, split)
        seed, lesson, step, *rest = key
        rows = tuple(range(rows) if isinstance(rows, int) else rows)
        return self.of_step(step, lambda step: ((seed, lesson, step, *rest), rows, frames, fps))


class Ahead(Around):
    """Training clips are made by worker processes while the step before is computed: what comes next is known."""

    def __init__(self, source: DrivingScenes | VideoFolder, workers: int) -> None:
        super().__init__(source)
        self.workers, self.coming = workers, {}
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker, initargs=(source,))

    def of_step(self, step: int, request: Callable[[int], tuple]) -> Clips:
        asked = [request(step + i) for i in range(self.workers + 1)]
        for one in asked[asked[0] not in self.coming :]:  # what nobody has begun is made here
            if one not in self.coming:
                self.coming[one] = self.pool.submit(make_clips, *one)
        made = self.coming.pop(asked[0], None)
        return self.source.clips(*asked[0]) if made is None else made.result()


class Again(Around):
    """Training clips serve several steps in a row (--reuse), each with noise of its own, and stay on the device
    meanwhile: for where making clips takes longer than training on them. prepare: what is done once to a video
    b t c h w, as encoding it."""

    def __init__(self, source: Source, times: int, device: torch.device | str,
                 prepare: Callable[[torch.Tensor], torch.Tensor] = lambda video: video) -> None:
        super().__init__(source)
        self.times, self.device, self.prepare, self.kept = times, device, prepare, {}

    def of_step(self, step: int, request: Callable[[int], tuple]) -> Clips:
        asked = request(step // self.times)
        if asked not in self.kept:
            self.kept = {old: clips for old, clips in self.kept.items() if old[0][2] == asked[0][2]}
            clips = self.source.clips(*asked)
            self.kept[asked] = dataclasses.replace(clips, video=self.prepare(clips.video.to(self.device)))
        return self.kept[asked]


def start_worker(source: DrivingScenes | VideoFolder) -> None:
    global worker_source  # of this process; sending it along with every request would take longer than the request
    worker_source = source
    torch.set_num_threads(1)


def make_clips(*request: object) -> Clips:
    return worker_source.clips(*request)


def open_data(data: str, height: int, width: int, final_fps: float, workers: int = 0, reuse: int = 1,
              device: torch.device | str = "cpu") -> Source:
    """The built-in scenes for "driving", else a folder of videos. Raises UserError.

    workers: processes that make the clips of coming steps; reuse: steps in a row that share clips, kept on `device`.
    """
    source = (DrivingScenes(height, width, final_fps) if data == "driving" else
              VideoFolder(Path(data).expanduser(), height, width, final_fps))
    source = Ahead(source, workers) if workers else source
    return Again(source, reuse, device) if reuse > 1 else source
