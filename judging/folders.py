"""Judges folders of videos as the paper's Tables 4 (UCF-101: FVD) and 5 (MSR-VTT: CLIPSIM) do: clips of 16 frames.

  python -m judging.folders ucf101 --generated OURS --real REAL --detector i3d.pt
  python -m judging.folders msrvtt --generated OURS --clip FOLDER

OURS holds 10,000 videos that were prompted with the names of the classes, or 2,990, each with its caption in NAME.txt
or labels.csv; i3d.pt is a TorchScript I3D (or an Inception, for FID), FOLDER a CLIP ViT-B/32 in transformers' layout.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from extra.metrics import Detector, Protocol, frechet_distance, load_clip
from kit.data import VideoFolder, nearest
from kit.errors import UserError, cli
from kit.run import pick_device

FRAMES, SIZE = 16, 224
CLIPS = {"ucf101": 10_000, "msrvtt": 2990}


def windows(folder: str, count: int, fps: float) -> Iterator[tuple[torch.Tensor, str]]:
    """`count` random windows (1 t 3 h w in [-1, 1]) of the videos of a folder, each video in turn, with its caption.

    Raises UserError for a folder in which no video is long enough.
    """
    source, draw = VideoFolder(Path(folder), SIZE, SIZE, fps), torch.Generator().manual_seed(0)
    usable = [r for r in source.recordings if not r.problem(FRAMES, fps)]
    if not usable:
        raise UserError(f"{folder}: no video has {FRAMES} frames at {fps:g} fps")
    for i in range(count):
        recording = usable[i % len(usable)]
        free = max(recording.seconds - (FRAMES - 1) / fps, 0.0)
        start = recording.times[0] + free * float(torch.rand((), generator=draw))
        pixels = source.frames(recording, nearest(recording.times, start + np.arange(FRAMES) / fps))
        yield rearrange(torch.from_numpy(pixels.copy()), "t h w c -> 1 t c h w").float() / 127.5 - 1, recording.caption


def ucf101(options: argparse.Namespace, count: int) -> None:
    """Table 4: the Fréchet distance of generated clips to as many real ones."""
    detector = Detector(options.detector, pick_device(options.device))
    sets = [torch.cat([detector.features(clip) for clip, _ in windows(folder, count, options.fps)])
            for folder in (options.generated, options.real)]
    name, network = "FVD" if detector.of_clips else "FID", f"{options.detector} {detector.checksum}"
    about = Protocol(name, network, FRAMES, options.fps, f"{SIZE} x {SIZE}", count, count, options.real)
    print(f"{name}: {frechet_distance(*sets):.2f}   ({about})")
    print("paper, FVD: 550.61 with SD 2.1, 656.49 with SD 1.4; Make-A-Video 367.23, CogVideo 701.59")


def msrvtt(options: argparse.Namespace, count: int) -> None:
    """Table 5: how well the frames of clips fit their captions, by CLIP."""
    similarity, total = load_clip(options.clip), 0.0
    for clip, caption in windows(options.generated, count, options.fps):
        if not caption:
            raise UserError(f"{options.generated}: every video needs its caption in NAME.txt or labels.csv")
        total += similarity(clip, [caption])
    about = Protocol("CLIPSIM", options.clip, FRAMES, options.fps, f"{SIZE} x {SIZE}", count, 0, options.generated)
    print(f"CLIPSIM: {total / count:.4f}   ({about})")
    print("paper: 0.2929 with SD 2.1, 0.2848 with SD 1.4; Make-A-Video 0.3049, CogVideo 0.2631")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m judging.folders", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=CLIPS)
    parser.add_argument("--generated", default="", help="folder of generated videos")
    parser.add_argument("--real", default="", help="folder of real videos, for ucf101")
    parser.add_argument("--detector", default="", help="TorchScript I3D (or Inception), for ucf101")
    parser.add_argument("--clip", default="", help="folder of a CLIP model, for msrvtt")
    parser.add_argument("--fps", type=float, default=30.0, help="frame rate of the clips")
    parser.add_argument("--clips", type=int, default=0, help="so many clips; 0: as many as the paper's protocol")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps; auto: cuda or cpu")
    options = parser.parse_args(argv)
    needs = {
        "ucf101": {"--real FOLDER (UCF-101's videos)": options.real,
                   "--generated FOLDER (10,000 videos, prompted with the class names)": options.generated,
                   "--detector FILE (TorchScript I3D)": options.detector},
        "msrvtt": {"--generated FOLDER (2,990 videos, each with its caption in NAME.txt)": options.generated,
                   "--clip FOLDER (CLIP ViT-B/32 in transformers' layout)": options.clip},
    }[options.protocol]
    if missing := [what for what, given in needs.items() if not given]:
        raise UserError(f"{options.protocol} also needs {'; '.join(missing)}")
    if options.clips < 0 or options.fps <= 0:
        raise UserError("--clips must not be negative, --fps must be positive")
    {"ucf101": ucf101, "msrvtt": msrvtt}[options.protocol](options, options.clips or CLIPS[options.protocol])


if __name__ == "__main__":
    raise SystemExit(cli(main))
