"""People's pictures and videos, as viewers and players show them, and when each frame is shown.

One place for what files say beside their pixels: which side is up (EXIF, display matrix), pixels that are not square,
16 bits, transparency (laid on black), colour matrices, covers and posters that are no frames, time stamps. The lessons
see upright RGB pictures with square pixels.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kit.errors import UserError, note

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")  # numbered frames, or of a subject
ANIMATIONS = (".gif", ".webp", ".apng", ".png")
HD = 720  # from so many lines on, a video that does not say which colour matrix it has is taken for BT.709
# as FFmpeg numbers them: colour matrices, transfer curves of HDR, the range from 16 to 235
BT709, UNKNOWN, BT601, PQ, HLG, LIMITED = 1, 2, 6, 16, 18, 1
NO_VIDEO = ("tty", "image2", "lavfi")  # what FFmpeg makes of text and of single pictures
Frames = Iterator[tuple[float, Callable[[], Image.Image]]]  # when each is shown, in seconds, and what makes the picture


def reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


# %% Pictures


def as_shown(image: Image.Image) -> Image.Image:
    """RGB and upright: 16 bits to 8, transparent parts on black, turned as EXIF says."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] == "I":  # Pillow's own conversion cuts off at 255
        values = (np.asarray(upright, np.float64) / 257).round().clip(0, 255)
        upright = Image.fromarray(values.astype(np.uint8))
    if upright.has_transparency_data:
        picture = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return upright.convert("RGB")


def open_picture(path: Path | str) -> Image.Image:
    """A picture file as viewers show it. Raises ValueError with the reason for anything else."""
    try:
        with Image.open(path) as image:
            return as_shown(image)
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, DecompressionBombError, ...
        raise ValueError(f"not a readable picture: {reason(error)}") from None


def still(path: Path) -> bool:
    """Whether a picture is one, and no animation."""
    with contextlib.suppress(Exception), Image.open(path) as image:  # what is damaged is said where it is read
        return getattr(image, "n_frames", 1) == 1
    return False


def fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled to fill the size, and cropped at the centre."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


# %% Videos


def open_video(path: Path):
    """A PyAV container and its video stream: the best one, not the first, and no cover.

    Raises UserError without PyAV, ValueError without video.
    """
    try:
        import av
    except ImportError:
        how = 'pip install av (or pip install "videoldm[video]")'
        raise UserError(f"{path} needs PyAV to be read: {how}") from None
    container = av.open(f"file:{path}", metadata_errors="ignore")  # a bare name with a colon in it is taken for a URL
    stream = container.streams.best("video")
    name = container.format.name
    cover = stream is not None and stream.disposition & type(stream.disposition).attached_pic
    if stream is None or cover or name in NO_VIDEO or name.endswith("_pipe"):
        container.close()
        raise ValueError("a single picture" if "pipe" in name or name == "image2" else "no video in it")
    stream.thread_type = "AUTO"
    return container, stream


def video_times(path: Path) -> np.ndarray:
    """When the frames that can be decoded are shown: (t), in seconds, increasing."""
    container, stream = open_video(path)
    with container:
        if path.suffix.lower() == ".avi":  # keeps only the order of decoding, so all of it has to be decoded
            return np.array([time for time, _ in video_frames(path, 0.0)])
        found, first, scale = [], None, float(stream.time_base)
        for packet in container.demux(stream):  # one packet is one frame, not yet decoded
            if packet.is_corrupt:
                raise ValueError("truncated")
            if packet.size and not packet.is_discard and packet.pts is not None:
                found.append(packet.pts)
                if packet.is_keyframe and first is None:
                    first = packet.pts
    # what is shown before the first key frame leans on frames that were cut off
    return np.unique([pts for pts in found if first is None or pts >= first]) * scale


def video_frames(path: Path, start: float) -> Frames:
    """A video's frames, decoded from the key frame before `start` seconds on."""
    container, stream = open_video(path)
    with container:
        ratio = stream.sample_aspect_ratio or 1
        if path.suffix.lower() == ".avi":
            number = -1  # counts frames that were left out, too; where B-frames hide it, they follow each other
            for frame in container.decode(stream):
                number = max(number + 1, -1 if frame.pts is None else frame.pts)
                yield number / float(stream.average_rate), functools.partial(frame_as_shown, frame, ratio)
            return
        scale, early = float(stream.time_base), False
        if start - 1 > (stream.start_time or 0) * scale:
            # a second early: the frames shown just before a key frame may be stored behind it
            container.seek(int((start - 1) / scale), stream=stream)
            early = True
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            if early and frame.pts * scale > start + 1e-6:
                break
            early = False
            yield frame.pts * scale, functools.partial(frame_as_shown, frame, ratio)
    if early:  # some formats are searched roughly
        yield from video_frames(path, -math.inf)


def frame_as_shown(frame, ratio: float) -> Image.Image:
    """A decoded frame in RGB, with square pixels, turned and mirrored as its display matrix says. ratio: width of a
    stored pixel over its height."""
    matrix = BT709 if frame.colorspace == UNKNOWN and frame.height >= HD else None
    image = frame.reformat(format="rgb24", src_colorspace=matrix).to_image()
    if ratio != 1:
        image = image.resize((max(1, round(image.width * ratio)), image.height), Image.Resampling.LANCZOS)
    a, b, c, d = display_matrix(frame)
    if not a and not d:  # x and y change places
        image, a, d = image.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else image


def display_matrix(frame) -> tuple[int, int, int, int]:
    """(a, b, c, d): x, y are shown at a x + c y, b x + d y. Quarter turns only; what lies between is left as stored."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.sign(np.round(np.frombuffer(bytes(data), np.int32)[:5] / 2**16)).astype(int).tolist()
            if (a, d).count(0) in (0, 2) and (a == 0) == (b != 0) == (c != 0):
                return a, b, c, d
    return 1, 0, 0, 1


def video_facts(path: Path) -> tuple[tuple[int, int], list[str]]:
    """Height and width as shown, and what there is to say about a video."""
    container, stream = open_video(path)
    with container:
        frame, ratio, said = next(container.decode(stream)), stream.sample_aspect_ratio or 1, []
        shown = frame_as_shown(frame, ratio)
        if display_matrix(frame) != (1, 0, 0, 1):
            said.append("turned")
        if ratio != 1:
            said.append("pixels made square")
        if frame.color_trc in (PQ, HLG):
            said.append("HDR, which is not tone-mapped here and looks washed out: convert it to SDR first")
        return (shown.height, shown.width), said


# %% Animations, folders of numbered pictures, and texts


def animation_frames(path: Path) -> Frames:
    """The frames of an animated gif, webp or png, from the first; the poster of an animated png is none."""
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) == 1:
            raise ValueError("not animated")
        time = 0.0
        for i in range(int(getattr(image, "default_image", False)), image.n_frames):
            image.seek(i)
            image.load()
            yield time, functools.partial(as_shown, image.copy())
            time += (image.info.get("duration") or 100) / 1000  # browsers show a duration of 0 as 0.1 s


def read_text(path: Path) -> str:
    """The text of a small file as people's editors write it: UTF-8 or UTF-16, with or without a mark, or Windows-1252,
    which is said."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        note(f"{path}: not UTF-8, read as Windows-1252")
        return content.decode("cp1252", errors="replace")


def folder_times(files: list[Path], folder: Path, default_fps: float) -> np.ndarray:
    """When the pictures of a folder are shown: at the rate in fps.txt, or at the default one."""
    rate = folder / "fps.txt"
    fps = float(read_text(rate)) if rate.exists() else default_fps
    if not 0 < fps < math.inf:
        raise ValueError("fps.txt must hold a positive number")
    return np.arange(len(files)) / fps


def take(frames: Frames, wanted: np.ndarray) -> Iterator[Image.Image]:
    """The pictures at these increasing times, each of which is that of a frame; one may be wanted twice.

    Raises ValueError when the frames end early.
    """
    for time, places in itertools.groupby(wanted.tolist()):
        for shown, make in frames:
            if shown >= time - 1e-6:
                picture = make()
                break
        else:
            raise ValueError("the file ends early")
        yield from (picture for _ in places)
