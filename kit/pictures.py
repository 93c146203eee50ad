"""Pictures and videos out of tensors: sheets, animations, mp4, and the style of every plot."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from einops import rearrange
from PIL import Image

from kit.errors import UserError
from kit.files import replacing
from kit.media import BT601, BT709, HD, LIMITED

matplotlib.use("Agg")  # no screen on a cluster
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams.update({"figure.dpi": 100, "savefig.bbox": "tight", "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.25, "font.size": 9, "legend.frameon": False})
SMALL = 200  # pixels of width, below which pictures are doubled or kept exactly, to be seen


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """`... c h w` in [-1, 1] -> `... h w c` uint8."""
    pixels = ((video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return rearrange(pixels, "... c h w -> ... h w c").numpy()


def sheet(rows: Sequence[torch.Tensor], path: Path, gap: int = 2) -> None:
    """Writes rows of pictures, each `n c h w` in [-1, 1], as one PNG; a clip a row makes a film strip.

    Small pictures are doubled, to be seen; with gap 0, a single picture is written as it is.
    """
    strips, zoom = [], 2 if gap and rows[0].shape[-1] < SMALL else 1
    for row in rows:
        pictures = to_uint8(row).repeat(zoom, axis=1).repeat(zoom, axis=2)
        pictures = [np.pad(picture, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for picture in pictures]
        strips.append(np.concatenate(pictures, axis=1))
    width = max(strip.shape[1] for strip in strips)
    strips = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    save_image(np.concatenate(strips), path)


def palette(pixels: np.ndarray) -> Image.Image:
    """256 colours for h w 3 uint8, by k-means, for median cut gives small red lamps the orange of a large sky. Of large
    pictures a part is looked at, or it would take ten seconds."""
    every = math.ceil((pixels.shape[0] * pixels.shape[1] / 200_000) ** 0.5)
    return Image.fromarray(pixels[::every, ::every].copy()).quantize(256, kmeans=1)


def save_image(pixels: np.ndarray, path: Path) -> None:
    """Writes h w 3 uint8 as PNG; a large one with a palette, which keeps it small enough for a README."""
    image = Image.fromarray(pixels)
    if pixels.size > 300_000:
        image = image.quantize(palette=palette(pixels), dither=Image.Dither.NONE)
    with replacing(path) as part:
        image.save(part, optimize=True)


def animation(clips: torch.Tensor, path: Path, fps: float, columns: int = 4) -> None:
    """Writes clips `b t c h w` side by side as a looping gif."""
    rows = -(-len(clips) // columns)
    padded = torch.cat([clips, clips.new_ones(rows * columns - len(clips), *clips.shape[1:])])
    frames = to_uint8(rearrange(padded, "(r k) t c h w -> t c (r h) (k w)", r=rows))
    save_animation(frames, path, fps)


def held(frames: Iterable[np.ndarray], levels: int) -> Iterator[np.ndarray]:
    """Frames in which a block of 8 x 8 pixels stays as it was last shown until one of its pixels is off by more levels.

    WebP's encoder leaves out blocks that resemble the frame before, whatever is shown: small changes add up, to 25
    levels within a second, and a cloud that has dissolved stays in the picture. So it is told here what to leave out.
    """
    shown = None
    for frame in frames:
        shown = frame.copy() if shown is None else shown
        off = np.abs(frame.astype(np.int16) - shown).max(-1)  # h w
        height, width = off.shape
        blocks = np.pad(off, ((0, -height % 8), (0, -width % 8)))
        stale = rearrange(blocks, "(h p) (w q) -> h w p q", p=8, q=8).max((2, 3)) > levels
        stale = stale.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
        shown[stale] = frame[stale]
        yield shown.copy()


def save_animation(frames: Iterable[np.ndarray], path: Path, fps: float, quality: int = 90, levels: int = 4) -> None:
    """Writes frames (h w 3, uint8) as a looping gif or webp, by the suffix. Frames may come from a generator.

    quality, levels: of a webp; how well blocks are kept, and by how much one may be off before it is drawn anew.
    """
    if path.suffix == ".gif":
        frames = list(frames)  # one palette for all: each with its own, still land changes from frame to frame
        colours = palette(np.concatenate(frames[:: -(-len(frames) // 16)]))
        images = (Image.fromarray(frame).quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames)
    else:
        images = (Image.fromarray(frame) for frame in held(frames, levels))
    first = next(images)
    # kmax: by itself WebP draws every fifth frame anew, not from the one before, and the whole picture pulses with it;
    # lossless: colours are kept at half the sharpness else, which is seen in small pictures, and flickers
    with replacing(path) as part:
        first.save(part, save_all=True, append_images=images, duration=round(1000 / fps), loop=0, quality=quality,
                   method=3, kmin=0, kmax=0, lossless=first.width < SMALL)


class VideoWriter:
    """Streams frames into an mp4 (H.264, yuv420p, which every player opens), a frame in memory at a time."""

    def __init__(self, path: Path, fps: float, height: int, width: int) -> None:
        try:
            import av
        except ImportError:
            raise UserError('mp4 needs the video extra: pip install av (or pip install -e ".[video]")') from None
        from fractions import Fraction

        self.av, self.path, self.part = av, path, path.with_suffix(".part.mp4")  # renamed when it is whole
        self.container = av.open(str(self.part), "w")
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self.stream.height, self.stream.width = height // 2 * 2, width // 2 * 2
        self.stream.pix_fmt, self.stream.options = "yuv420p", {"crf": "18"}
        # said in the file, for players guess differently; FFmpeg's numbers of BT.709 and of BT.601 with 525 lines
        self.matrix = BT709 if height >= HD else BT601
        about = self.stream.codec_context
        about.colorspace = about.color_primaries = about.color_trc = self.matrix
        about.color_range = LIMITED

    def write(self, frame: np.ndarray) -> None:
        """frame: h w 3 uint8."""
        frame = np.ascontiguousarray(frame[: self.stream.height, : self.stream.width])
        picture = self.av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=self.matrix, dst_color_range=LIMITED)
        for packet in self.stream.encode(picture):
            self.container.mux(packet)

    def close(self) -> None:
        for packet in self.stream.encode():
            self.container.mux(packet)
        self.container.close()
        self.part.replace(self.path)


def save_figure(figure: plt.Figure, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part)
    plt.close(figure)


def plot_metrics(path: Path, columns: Sequence[str], title: str, smooth: int = 50) -> None:
    """Plots columns of a metrics.csv, each raw (faint) and averaged over `smooth` rows, to a PNG beside it."""
    if not path.exists():
        return  # no step was trained
    table = np.genfromtxt(path, delimiter=",", names=True, invalid_raise=False)
    figure, axes = plt.subplots(1, len(columns), figsize=(4 * len(columns), 2.6), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        values = np.atleast_1d(table[column])
        window = min(smooth, len(values))
        axis.plot(np.atleast_1d(table["step"]), values, alpha=0.25, color="C0")
        mean = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(np.atleast_1d(table["step"])[window - 1 :], mean, color="C0")
        axis.set(xlabel="step", ylabel=column, title=title)
    save_figure(figure, path.with_suffix(".png"))
