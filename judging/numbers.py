"""Numbers of a set of clips, each with the protocol it was measured by. Clips are n t 3 H W in [-1, 1]."""

import dataclasses
from pathlib import Path

import torch

from extra.metrics import (
    Protocol,
    box_iou,
    checksum,
    clip_features,
    clip_similarity,
    frame_features,
    frechet_distance,
    in_batches,
    inception_score,
    load_clip,
    read,
)
from judging.world import World, key_rate
from kit.data import Clips, Source
from kit.measures import flicker, motion, psnr, sharpness

REAL = 12_000  # key of the held-out clips that are the references


def number(value: float, protocol: Protocol) -> dict:
    return {"value": value, "protocol": dataclasses.asdict(protocol)}


def features(world: World, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name of the distance, rows of features: two from the readers, one from a detector."""
    if world.detector:
        name = "FVD" if world.detector.of_clips else "FID"
        return {name: torch.cat([world.detector.features(part) for part in video.split(16)])}
    clip_reader, frame_reader = world.clip_reader, world.frame_reader
    return {
        "toy-FVD": in_batches(world.run, lambda v: clip_features(clip_reader, v), video),
        "toy-FID": in_batches(world.run, lambda v: frame_features(frame_reader, v), video),
    }


def real_features(world: World, source: Source, frames: int, fps: float) -> dict[str, torch.Tensor]:
    """Features of the references, by distance; the clips themselves are not kept."""
    count = world.config.references

    def make() -> dict[str, torch.Tensor]:
        parts = [
            features(world, source.clips((REAL, start), min(64, count - start), frames, fps, "held-out").video)
            for start in range(0, count, 64)
        ]
        return {metric: torch.cat([part[metric] for part in parts]) for metric in parts[0]}

    return world.keep(("references", source.height, frames, fps), make)


def network_name(world: World, metric: str) -> str:
    if world.detector:
        return f"{Path(world.config.detector).name} {world.detector.checksum}"
    reader = world.clip_reader if metric == "toy-FVD" else world.frame_reader
    return f"{type(reader).__name__} {checksum(reader)}"


def score(world: World, video: torch.Tensor, fps: float,
                  source: Source | None = None) -> dict[str, dict]:
    """Distances to real clips of the same length, rate and size; inception score; consistency of motion."""
    source, frames = source or world.source, video.shape[1]
    real, size = real_features(world, source, frames, fps), f"{video.shape[-2]} x {video.shape[-1]}"
    about = dict(frames=frames, fps=fps, size=size, samples=len(video), references=world.config.references)
    numbers = {
        metric: number(frechet_distance(rows, real[metric]), Protocol(metric, network_name(world, metric), **about))
        for metric, rows in features(world, video).items()
    }
    if not world.detector:
        value = inception_score(read(world.run, world.frame_reader, video))
        numbers["IS"] = number(value, Protocol("IS", network_name(world, "IS"), **about | {"references": 0}))
    _, mismatch = motion(video[:64])
    about |= {"samples": min(64, len(video)), "references": 0}
    return numbers | {"mismatch": number(float(mismatch.mean()), Protocol("mismatch", "block matching", **about))}


def plain(metric: str, value: float, video: torch.Tensor, fps: float, network: str = "none") -> dict[str, dict]:
    """A number that needs no references, of clips `n t 3 H W`."""
    n, t, _, height, width = video.shape
    return {metric: number(value, Protocol(metric, network, t, fps, f"{height} x {width}", n, 0))}


def against_truth(world: World, video: torch.Tensor, truth: torch.Tensor, fps: float,
                  source: Source | None = None) -> dict[str, dict]:
    """The score, and what can be measured where the true frames are known."""
    found = score(world, video, fps, source) | plain("flicker", flicker(video, truth), video, fps)
    return found | plain("PSNR", min(psnr(video, truth), 99.0), video, fps)


def drift(video: torch.Tensor, fps: float, name: str) -> dict[str, dict]:
    """Colour, sharpness and frame difference: the last quarter against the first."""
    quarter = max(2, video.shape[1] // 4)
    first, last = video[:, :quarter], video[:, -quarter:]
    found = plain(f"drift of colour, {name}",
                  float((last.mean(dim=(1, 3, 4)) - first.mean(dim=(1, 3, 4))).abs().mean()), video, fps)
    found |= plain(f"sharpness, last over first, {name}",
                   float(sharpness(last).mean() / sharpness(first).mean()), video, fps)
    return found | plain(f"frame difference, last over first, {name}",
                         float(last.diff(dim=1).abs().mean() / first.diff(dim=1).abs().mean()), video, fps)


def clipsim(world: World, name: str, video: torch.Tensor, captions: list[str]) -> dict[str, dict]:
    if world.config.clip:
        value, network = load_clip(world.config.clip)(video, captions), Path(world.config.clip).name
    else:
        value = clip_similarity(world.run, world.caption_reader, video, captions)
        network = f"CaptionReader {checksum(world.caption_reader)}"
    return plain(name, value, video, key_rate(world), network)


def obeyed(world: World, video: torch.Tensor, asked_for: Clips) -> dict[str, dict]:
    """Is what was asked for seen in single frames, n 1 3 H W?"""
    reading = read(world.run, world.frame_reader, video)
    counted = torch.stack([asked_for.cars.float(), reading.car_count.float()])
    values = {
        "night, accuracy": float(((reading.night > 0.5).long() == asked_for.night).float().mean()),
        "cars, correlation": float(torch.corrcoef(counted)[0, 1].nan_to_num()) if len(video) > 1 else 0.0,
        "cars, mean error": float((counted[0] - counted[1]).abs().mean()),
        "boxes, IoU": box_iou(reading, asked_for.boxes[:, 0]),
    }
    found: dict[str, dict] = {}
    for metric, value in values.items():
        found |= plain(metric, value, video, 0, network_name(world, metric))
    return found
