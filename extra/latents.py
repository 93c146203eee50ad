"""Latents of a folder's frames, encoded once and kept on disk (--cache-latents).

One file a clip, OUT/latents/KEY/NAME.npy: all its frames, t c h w, half precision. KEY depends on the frame size and
on the autoencoder's weights, NAME on the clip's content too, so that nothing stale is ever read. Files are
renamed into place when they are whole, so that runs can share the folder; they are memory-mapped, not loaded.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.image_model import ImageModel
from kit.data import Again, Clips, Recording, Source, VideoFolder, read
from kit.errors import UserError
from kit.files import fingerprint, my_part
from kit.run import Run


def with_latents(run: Run, source: Source, image: ImageModel):
    """The source itself; with --cache-latents or --reuse, one whose clips hold latents where the video would be.

    Raises UserError for --cache-latents with the driving scenes, which never come twice.
    """
    if image.autoencoder is None:
        return source

    def encode(video: torch.Tensor) -> torch.Tensor:
        return image.encode(video).unflatten(0, video.shape[:2])

    if not run.config.cache_latents:
        return Again(source.source, source.times, source.device, encode) if isinstance(source, Again) else source
    if run.config.data == "driving":
        raise UserError("--cache-latents: driving scenes never come twice, so there is nothing to keep; use --data")
    return LatentFolder(run, source, image)


class LatentFolder:
    """Clips of a folder, `video` holding latents b t c h w, as ImageModel.encode takes them as well."""

    def __init__(self, run: Run, source: VideoFolder, image: ImageModel) -> None:
        self.run, self.source, self.image, self.open = run, source, image, {}
        digest = hashlib.sha256(repr((source.height, source.width, float(image.autoencoder.scale))).encode())
        for name, value in sorted(image.autoencoder.state_dict().items()):
            digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
        self.folder = run.config.folder() / "latents" / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def clips(self, key: Sequence[int], rows: int | Sequence[int], frames: int, fps: float,
              split: str = "train") -> Clips:
        chosen = self.source.choose(key, rows, frames, fps, split)
        clips = self.source.describe([recording for recording, _ in chosen], frames)
        latents = np.stack([self.latents(recording)[indices] for recording, indices in chosen])
        return dataclasses.replace(clips, video=torch.from_numpy(latents).float())

    def latents(self, recording: Recording) -> np.ndarray:
        """Of all frames of a clip, memory-mapped; made where they are missing."""
        if recording.path not in self.open:
            path = self.folder / f"{recording.path.stem}-{fingerprint(recording.path)}.npy"
            if not path.exists():
                self.make(recording, path)
            self.open[recording.path] = np.load(path, mmap_mode="r")
        return self.open[recording.path]

    @torch.no_grad()
    def make(self, recording: Recording, path: Path, chunk: int = 64) -> None:
        count, (height, width) = len(recording.times), (self.source.height, self.source.width)
        part = my_part(self.folder)
        try:
            kept = np.lib.format.open_memmap(part, "w+", np.float16, (count, *self.image.shape))
            for start in range(0, count, chunk):
                frames = read(recording, np.arange(start, min(start + chunk, count)), height, width)
                video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
                kept[start : start + chunk] = self.image.encode(video).half().cpu().numpy()
            kept.flush()
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; free some space, or leave out "
                            "--cache-latents") from None
        finally:
            part.unlink(missing_ok=True)
