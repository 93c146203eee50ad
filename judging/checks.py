"""The first table of lesson 12: what its metrics do to sets whose order is known."""

from collections.abc import Iterator

import torch

from extra.metrics import corruptions, frechet_distance
from judging.numbers import clipsim, features, network_name, obeyed, plain, score
from judging.verdicts import Row
from judging.world import OTHER_REAL, World, asked, key_rate, real_clips

CORRUPTIONS = ("little noise", "more noise", "blur", "shuffled frames", "a repeated frame", "jitter of 5 levels")


def check_rows() -> Iterator[Row]:
    def real(w: World) -> torch.Tensor:
        return real_clips(w, w.config.frames, key_rate(w))

    yield Row("real against itself", "the same clips twice: 0", itself)
    yield Row("real against real", "other real clips: the floor", lambda w: score(w, real(w), key_rate(w)))
    yield Row("real, half as many", "the floor with half the clips, which shows the bias",
              lambda w: score(w, real(w)[: max(2, len(real(w)) // 2)], key_rate(w)))
    for name in CORRUPTIONS:
        yield Row(name, f"real clips with {name}", lambda w, name=name: score(
            w, corruptions(real(w), torch.Generator().manual_seed(7))[name], key_rate(w)))
    yield Row("half speed", "real clips played at half their speed", lambda w: score(w, w.source.clips(
        (OTHER_REAL, w.seed), w.config.samples, w.config.frames, 2 * key_rate(w), "held-out").video, key_rate(w)))
    yield Row("fewer cars", "real clips with the fewest cars", lambda w: score(w, fewest_cars(w), key_rate(w)))
    yield Row("captions", "real frames beside their own captions and beside others'", caption_check)
    yield Row("readers", "what the reading networks get right on real frames", reader_check)


def itself(world: World) -> dict[str, dict]:
    video, fps = real_clips(world, world.config.frames, key_rate(world)), key_rate(world)
    found: dict[str, dict] = {}
    for metric, rows in features(world, video).items():
        found |= plain(metric, frechet_distance(rows, rows), video, fps, network_name(world, metric))
    return found


def fewest_cars(world: World) -> torch.Tensor:
    count, fps = world.config.samples, key_rate(world)
    clips = world.source.clips((OTHER_REAL, world.seed, 1), 3 * count, world.config.frames, fps, "held-out")
    return clips.pick(clips.cars.argsort(stable=True)[:count].tolist()).video


def caption_check(world: World) -> dict[str, dict]:
    clips = asked(world)
    others = clips.captions[1:] + clips.captions[:1]
    return clipsim(world, "CLIPSIM", clips.video, clips.captions) | clipsim(
        world, "CLIPSIM, wrong captions", clips.video, others)


def reader_check(world: World) -> dict[str, dict]:
    return obeyed(world, asked(world).video[:, :1], asked(world))
