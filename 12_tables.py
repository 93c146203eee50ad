"""Lesson 12: every claim of the paper, measured in miniature (Tables 1, 3, 4, 5, 11, 14; Sec. 3.2, 3.3; App. D, I.3.2).

What is compared with what stands here: a table is some rows, a row says in a line what is sampled and how it is
measured, and a claim is two rows of which the paper says that one is better. judging/world.py trains what a row needs,
at matched steps and trained parameters, for every seed; judging/numbers.py measures; judging/verdicts.py judges.

  python 12_tables.py                                     all tables, three seeds: some 15 hours of a core
  python 12_tables.py --table ablations --seeds 0         one table, one seed
  python 12_tables.py --threads 1 --seeds 0 & python 12_tables.py --threads 1 --seeds 1     side by side
  python 12_tables.py --render                            only writes tables.md and the figures
  python 12_tables.py --detector i3d.pt                   real FVD (or FID) by the paper's protocol, with your file

Rows that are in the results file are skipped, unless another reader read them: an interrupted run goes on. Distances in
features of networks trained here are called toy-FID and toy-FVD: they rank what is in these tables and cannot be
compared with published numbers. Self-checks of the metrics stand in the first table. Folders of videos are judged by
judging/folders.py, pairs of videos by people with judging/study.py.

Reads checkpoints/readers: networks that read scenes, kept so that numbers of different days can be compared. Writes
OUT/seedN/ (every lesson's folder) and RESULTS/: tables.json, tables.md, a figure per table.
"""

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from common.image_model import conditions
from extra.metrics import ClipReader, Detector, captions_obeyed, checksum
from judging.checks import check_rows, reader_check
from judging.numbers import against_truth, clipsim, drift, network_name, obeyed, plain, score
from judging.pages import add_rows, draw_boxes, outdated, read_results, render
from judging.verdicts import Claim, Row, judge, self_checks
from judging.world import (
    LONGER,
    OTHER_REAL,
    PRESETS,
    Config,
    World,
    asked,
    continued,
    decoded,
    first_frames,
    from_captions,
    generated,
    in_parts,
    independent,
    interpolated,
    key_rate,
    lesson02,
    lesson03,
    lesson04,
    lesson07,
    real_clips,
    reconstructed,
    trained_parameters,
)
from kit.data import Clips
from kit.errors import UserError, cli
from kit.flags import parse
from kit.measures import sharpness
from kit.run import one_process

NAME = "12_tables"


# %% The tables. A row is a name, what it shows, and a function of a world that gives its numbers


def conditional_rows() -> Iterator[Row]:
    """Table 1, left."""
    yield Row("Long Video GAN", "the paper's number, not reproduced here", None, "FVD 478, FID 53.5")
    yield Row("real", "other real clips: the floor", lambda w: score(
        w, real_clips(w, w.config.frames, key_rate(w)), key_rate(w)))
    yield Row("independent frames", "each from the image model", lambda w: score(w, independent(w), key_rate(w)))
    yield Row("copied first frame", "the first frame of each clip, repeated", lambda w: score(
        w, generated(w)[:, :1].repeat(1, w.config.frames, 1, 1, 1), key_rate(w)))
    yield Row("unconditional", "an image and its continuation, no labels",
              lambda w: score(w, generated(w), key_rate(w)), "FVD 389, FID 31.6")
    yield Row("conditional", "the same, told night and number of cars", lambda w: score(
        w, generated(w, conditional=True), key_rate(w)), "FVD 356, FID 51.9")


def ablation_rows() -> Iterator[Row]:
    """Table 1, right: matched training steps (the pixel row: matched compute) and trained parameters; and both of the
    weakest rows at the larger of steps and compute."""
    for variant, what, paper in (
        ("pixel", "diffusion on pixels, at the same compute", "FVD 639.56, FID 59.70"),
        ("pixel-same-steps", "the same, trained on to as many steps as ours", ""),
        ("end-to-end", "no image pre-training, all layers trained on clips", "FVD 1155.10, FID 71.26"),
        ("end-to-end-same-flops", "the same, trained on to the compute of ours, image model included", ""),
        ("attention", "twice the temporal attention layers, no 3D convolutions", "FVD 704.41, FID 50.01"),
    ):
        yield Row(variant, what, lambda w, v=variant: score(w, generated(w, v), key_rate(w)), paper)
    yield Row("ours", "3D convolutions and attention, on the frozen image model", lambda w: score(
        w, generated(w), key_rate(w)), "FVD 534.17, FID 48.26")
    yield Row("ours, guided", "with context guidance, at the lesson's scale", lambda w: score(
        w, generated(w, guidance=w.config.guidance), key_rate(w)), "FVD 508.82, FID 54.16")
    for scale in (2.0, 3.0, 5.0):
        yield Row(f"ours, scale {scale:g}", "context guidance, the sweep", lambda w, s=scale: score(
            w, generated(w, guidance=s), key_rate(w)))


def upsampler_rows() -> Iterator[Row]:
    """Table 3, left: from real small frames."""
    t = lesson07.Config().frames

    def real(w: World) -> torch.Tensor:
        return real_clips(w, t, w.config.final_fps, w.upsampler_source, max(2, w.config.samples // 2))

    def bilinear(w: World) -> torch.Tensor:
        small = lesson07.shrink(real(w))
        return F.interpolate(small.flatten(0, 1), scale_factor=4, mode="bilinear").unflatten(0, small.shape[:2])

    def upsampled(w: World, video: bool, calm: bool = False) -> torch.Tensor:
        run, config, model = w.upsampler()
        config = dataclasses.replace(config, calm=calm)
        return torch.stack([torch.stack(list(lesson07.upsample(model, config, clip, run, i, video=video)))
                            for i, clip in enumerate(lesson07.shrink(real(w)))])

    def numbers(w: World, video: torch.Tensor) -> dict[str, dict]:
        return against_truth(w, video, real(w), w.config.final_fps, w.upsampler_source)

    yield Row("real", "the large frames themselves: the floor", lambda w: numbers(w, real(w)))
    yield Row("bilinear", "no model", lambda w: numbers(w, bilinear(w)))
    yield Row("image upsampler", "every frame on its own", lambda w: numbers(w, upsampled(w, False)),
              "FVD 165.98, FID 19.71")
    yield Row("video upsampler", "with temporal layers", lambda w: numbers(w, upsampled(w, True)),
              "FVD 45.39, FID 19.85")
    for kind in ("image", "video"):
        yield Row(f"{kind} upsampler, same noise", "all frames given the same noise, as lesson 8 does it",
                  lambda w, video=kind == "video": numbers(w, upsampled(w, video, calm=True)))


def decoder_rows() -> Iterator[Row]:
    """Tables 3 (right), 11 and 14: real clips through the encoder and back."""
    t = lesson04.Config().frames

    def real(w: World) -> torch.Tensor:
        return real_clips(w, t, w.config.final_fps)

    def numbers(w: World, video: torch.Tensor) -> dict[str, dict]:
        return against_truth(w, video, real(w), w.config.final_fps)

    yield Row("real", "not encoded at all: the floor", lambda w: numbers(w, real(w)))
    yield Row("image decoder", "every frame on its own", lambda w: numbers(w, reconstructed(w, real(w), None)),
              "FVD 390.88, FID 7.61")
    yield Row("video decoder", "fine-tuned with a video discriminator", lambda w: numbers(
        w, reconstructed(w, real(w), False)), "FVD 32.94, FID 9.17")
    yield Row("video decoder, both critics", "and with an image discriminator", lambda w: numbers(
        w, reconstructed(w, real(w), True)), "FVD 51.01, FID 9.04")


def alpha_rows() -> Iterator[Row]:
    """App. I.3.2: are single frames as good as the image model's?"""
    yield Row("alpha = 1", "the frozen image model", lambda w: score(w, independent(w), key_rate(w)), "FID 47.00")
    yield Row("learned alpha", "frames of the video model", lambda w: score(w, generated(w), key_rate(w)), "FID 48.26")
    yield Row("learned alpha, longer", f"after {LONGER} times the steps, the last at a lower rate", lambda w: score(
        w, generated(w, "longer"), key_rate(w)), "FID 48.26")


def choice_rows() -> Iterator[Row]:
    """Beyond the paper: what sampling steps are worth, and loss weights. (Noise in common, and where lesson 6 begins:
    the tables of interpolation and of the upsampler.)"""
    for steps in (4, 8, 16):
        yield Row(f"{steps} steps", f"images and their continuations in {steps} sampling steps",
                  lambda w, n=steps: score(w, generated(w, f"{n} steps"), key_rate(w)))
    yield Row("image model", "each frame on its own, the loss of Eq. (1)", lambda w: score(
        w, independent(w), key_rate(w)))
    yield Row("image model, min-SNR", "the same steps, losses weighed by the signal-to-noise ratio, at most 5",
              lambda w: score(w, independent(w, "min-snr"), key_rate(w)))


def rollout_rows() -> Iterator[Row]:
    """Sec. 3.2: long videos by iteration. Distances of windows over time; four videos of 300 s by statistics only."""

    def rolled(w: World, guidance: float, overlap: int, count: int, frames: int) -> torch.Tensor:
        run, _, image, _ = w.prediction()
        first = first_frames(w, "", conditions(count), 1.0, 5000)
        z = continued(w, "", first, conditions(count), frames, guidance, 5000, overlap)
        return decoded(image, run, z)

    def numbers(w: World, make: Callable[[int, int], torch.Tensor]) -> dict[str, dict]:
        fps, t, small = key_rate(w), w.config.frames, w.config.preset == "smoke"
        length, longest = (2 * t, 3 * t) if small else (round(60 * fps), round(300 * fps))
        video, found = make(w.config.rollouts, length), {}
        for end in dict.fromkeys(max(t, min(round(s * fps), length)) for s in (5, 10, 20, 30, 40, 50, 60)):
            window = score(w, video[:, end - t : end], fps)
            distances = [m for m in window if m.endswith(("FVD", "FID"))]
            found |= {f"{m}, to {end / fps:.0f} s": window[m] for m in distances}
        return found | drift(video, fps, "60 s") | drift(make(4, longest), fps, "300 s")

    yield Row("real", "real drives: the floor, and what changes by itself (a row added when the others had been seen)",
              lambda w: numbers(w, lambda count, frames: real_clips(w, frames, key_rate(w), count=count)))
    for guided in (False, True):
        for overlap in (1, 2):
            what = f"iterated with {overlap} known frame{'s' * (overlap - 1)}" + ", context guidance" * guided
            yield Row(f"S = {overlap}" + ", guided" * guided, what, lambda w, g=guided, s=overlap: numbers(
                w, partial(rolled, w, w.config.guidance if g else 1.0, s)))


def future_rows() -> Iterator[Row]:
    """Sec. 3.2: several futures of one frame, diversity against quality, over the scale of context guidance."""

    def numbers(w: World, guidance: float) -> dict[str, dict]:
        run, _, image, _ = w.prediction()
        each = min(4, w.config.samples)
        starts = asked(w).pick(range(w.config.samples // each))

        def part(labels: Clips, start: int) -> torch.Tensor:
            first = image.encode(labels.video[:, :1])
            return decoded(image, run, continued(w, "", first, labels, w.config.frames, guidance, start))

        video = in_parts(starts.repeat(each), part)
        last = rearrange(video[:, -1], "(b n) c h w -> b n c h w", n=each)
        return score(w, video, key_rate(w)) | plain("spread", float(last.std(1).mean()), video, key_rate(w))

    for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
        yield Row(f"scale {scale:g}", "four futures each of real first frames", lambda w, s=scale: numbers(w, s))


def interpolation_rows(passes: int) -> Iterator[Row]:
    """Sec. 3.3: what stands between real frames, after one pass (a quarter of the final rate) or two."""
    t = 4**passes + 1

    def rate(w: World) -> float:
        return w.config.final_fps / 4 ** (2 - passes)

    def real(w: World) -> Clips:
        return w.keep(("ends", passes), lambda: w.source.clips(
            (OTHER_REAL, w.seed, 2), w.config.samples, t, rate(w), "held-out"))

    def decoded_truth(w: World) -> torch.Tensor:  # what can be reached on these latents, and where the blend begins
        image = w.image()

        def part(labels: Clips, start: int) -> torch.Tensor:
            with w.run.autocast():
                return image.decode(image.encode(labels.video), t)

        return in_parts(real(w), part)

    def blend(w: World) -> torch.Tensor:
        ends, weight = decoded_truth(w)[:, [0, -1]], torch.linspace(0, 1, t).view(1, -1, 1, 1, 1)
        return (1 - weight) * ends[:, :1] + weight * ends[:, 1:]

    def alone(w: World) -> torch.Tensor:
        image, ends = w.image(), decoded_truth(w)[:, [0, -1]]

        def part(labels: Clips, start: int) -> torch.Tensor:
            z = lesson02.sample_images(image.unet(), image, labels.repeat(t - 2), 1.0, w.run, w.config.ddim_steps,
                                       1.0, "between", start)
            between = decoded(image, w.run, rearrange(z, "(b t) c h w -> b t c h w", t=t - 2))
            first, last = ends[start : start + len(labels)].split(1, dim=1)
            return torch.cat([first, between, last], dim=1)

        return in_parts(real(w), part)

    def numbers(w: World, video: torch.Tensor) -> dict[str, dict]:
        truth, middle = real(w).video, slice(t // 2, t // 2 + 1)
        sharp = float(sharpness(video[:, middle]).mean() / sharpness(truth[:, middle]).mean())
        found = against_truth(w, video, truth, rate(w))
        return found | plain("gradient of the middle over real", sharp, video, rate(w))

    yield Row("real", "the true frames", lambda w: numbers(w, real(w).video))
    yield Row("autoencoder", "the true frames, encoded and decoded", lambda w: numbers(w, decoded_truth(w)))
    yield Row("ours", f"the interpolation model, {passes} pass{'es' * (passes - 1)}", lambda w: numbers(
        w, interpolated(w, real(w), passes)))
    yield Row("ours, as the paper samples", "from noise of its own for every frame", lambda w: numbers(
        w, interpolated(w, real(w), passes, calm=False)))
    yield Row("ours, begun at lesson 3", "the same steps, from temporal layers that have not learned to read c_S",
              lambda w: numbers(w, interpolated(w, real(w), passes, start=lesson03.NAME)))
    yield Row("linear blend", "of the two decoded end frames", lambda w: numbers(w, blend(w)))
    yield Row("image model alone", "every frame between on its own", lambda w: numbers(w, alone(w)))


def control_rows() -> Iterator[Row]:
    """Sec. 4.1: are night, crowdedness and boxes obeyed? Read off single frames, and off the last frame of clips."""

    def images(w: World, variant: str, guidance: float) -> torch.Tensor:
        image = w.image(variant)

        def part(labels: Clips, start: int) -> torch.Tensor:
            key = ("control", variant, start)
            steps = w.config.ddim_steps
            z = lesson02.sample_images(image.unet(), image, labels, guidance, w.run, steps, 1.0, *key)
            return decoded(image, w.run, z[:, None])

        return w.keep(("images", variant, guidance), lambda: in_parts(asked(w), part))

    def others(w: World) -> Clips:
        return asked(w).pick([(i + 1) % len(asked(w)) for i in range(len(asked(w)))])

    def boxes(w: World) -> dict[str, dict]:
        if w.seed == 0 or not (Path(w.config.results) / "boxes.png").exists():
            draw_boxes(w, images(w, "boxes", 2.0))
        return obeyed(w, images(w, "boxes", 2.0), asked(w))

    yield Row("real frames", "what the reader itself gets right", reader_check)
    yield Row("labels", "images told night and number of cars", lambda w: obeyed(w, images(w, "", 1.0), asked(w)))
    yield Row("labels, guided", "the same with classifier-free guidance, scale 2", lambda w: obeyed(
        w, images(w, "", 2.0), asked(w)))
    yield Row("labels, last frame", "the last frame of conditional clips", lambda w: obeyed(
        w, generated(w, conditional=True)[:, -1:], asked(w)))
    yield Row("labels, chance", "guided images judged by another image's labels", lambda w: obeyed(
        w, images(w, "", 2.0), others(w)))
    yield Row("boxes", "images told where cars are", lambda w: obeyed(w, images(w, "boxes", 1.0), asked(w)))
    yield Row("boxes, guided", "the same with classifier-free guidance, scale 2", boxes)
    yield Row("boxes, chance", "guided images judged by another image's boxes", lambda w: obeyed(
        w, images(w, "boxes", 2.0), others(w)))


def text_rows() -> Iterator[Row]:
    """Sec. 4.2, and in the manner of Tables 4 (IS, FVD) and 5 (CLIPSIM): videos of held-out captions."""

    def numbers(w: World, video: torch.Tensor, shift: int = 0) -> dict[str, dict]:
        captions = asked(w).captions[shift:] + asked(w).captions[:shift]
        middle, found = video[:, w.config.frames // 2], score(w, video, key_rate(w))
        found |= clipsim(w, "CLIPSIM", video, captions)
        for what, share in captions_obeyed(w.run, w.scene_reader, middle, captions).items():
            found |= plain(f"{what}, obeyed", share, video, 0, f"SceneReader {checksum(w.scene_reader)}")
        return found

    def ours(w: World, guidance: float) -> torch.Tensor:
        return from_captions(w, w.config.samples, guidance)

    yield Row("real", "the captioned clips themselves", lambda w: numbers(w, asked(w).video))
    yield Row("text-to-image, every frame alone", "the backbone without temporal layers, scale 3", lambda w: numbers(
        w, from_captions(w, w.config.samples, 3.0, alone=True)))
    for scale in (1.0, 3.0, 6.0):
        paper = "UCF-101: IS 33.45, FVD 550.61; MSR-VTT: CLIPSIM 0.2929" if scale == 3 else ""
        yield Row(f"text-to-video, scale {scale:g}", "guided by the text", lambda w, s=scale: numbers(w, ours(w, s)),
                  paper)
    yield Row("text-to-video, chance", "scale 3, judged by other captions", lambda w: numbers(w, ours(w, 3.0), 1))


def beyond_rows() -> Iterator[Row]:
    """App. D: more and larger frames than trained, in one pass. The last frames of long clips are judged, and large
    frames brought to the trained size, so that all rows have one protocol."""

    def numbers(w: World, **options: int) -> dict[str, dict]:
        video = from_captions(w, max(2, w.config.samples // 2), 1.0, **options)
        if wider := options.get("wider"):
            video = F.avg_pool2d(video.flatten(0, 1), wider).unflatten(0, video.shape[:2])
        return score(w, video[:, -w.config.frames :], key_rate(w))

    yield Row("real", "other real clips: the floor", lambda w: score(
        w, real_clips(w, w.config.frames, key_rate(w), count=max(2, w.config.samples // 2)), key_rate(w)))
    yield Row("as trained", "8 frames of the trained size, unguided", lambda w: numbers(w))
    for times in (2, 4):
        yield Row(f"{times} times as long", "attention over all frames", lambda w, t=times: numbers(w, times=t))
        yield Row(f"{times} times as long, masked", "attention within a distance of 8", lambda w, t=times: numbers(
            w, times=t, reach=8))
    for wider in (2, 4):
        yield Row(f"{wider} times as wide", "and as high", lambda w, s=wider: numbers(w, wider=s))


TABLES: dict[str, tuple[str, list[Row]]] = {
    "checks": ("Self-checks of the metrics", list(check_rows())),
    "conditional": ("Table 1, left: with and without labels", list(conditional_rows())),
    "ablations": ("Table 1, right: ablations", list(ablation_rows())),
    "upsampler": ("Table 3, left: upsampler", list(upsampler_rows())),
    "decoder": ("Tables 3 (right), 11 and 14: decoder", list(decoder_rows())),
    "alpha": ("App. I.3.2: single frames with alpha = 1 and with learned alpha", list(alpha_rows())),
    "choices": ("Beyond the paper: sampling steps, loss weights", list(choice_rows())),
    "rollouts": ("Sec. 3.2: long prediction", list(rollout_rows())),
    "futures": ("Sec. 3.2: several futures, diversity against quality", list(future_rows())),
    "interpolation-5": ("Sec. 3.3: 5 frames at a quarter of the final rate", list(interpolation_rows(1))),
    "interpolation-17": ("Sec. 3.3: 17 frames at the final rate", list(interpolation_rows(2))),
    "control": ("Sec. 4.1: control", list(control_rows())),
    "text": ("Sec. 4.2, Tables 4 and 5 in miniature: text to video", list(text_rows())),
    "beyond": ("App. D: longer and larger than trained", list(beyond_rows())),
}


# %% What the paper says, as orderings and equivalences that can fail


CLAIMS = (
    Claim("ablations", "toy-FVD", "ours", "pixel", "534 < 640", seen="mismatch"),
    Claim("ablations", "toy-FVD", "ours", "end-to-end", "534 < 1155", seen="mismatch"),
    Claim("ablations", "toy-FVD", "ours", "pixel-same-steps", "534 < 640", seen="mismatch"),
    Claim("ablations", "toy-FVD", "ours", "end-to-end-same-flops", "534 < 1155", seen="mismatch"),
    Claim("ablations", "toy-FVD", "ours", "attention", "534 < 704", seen="mismatch"),
    Claim("ablations", "toy-FVD", "ours, guided", "ours", "509 < 534", seen="mismatch"),
    Claim("conditional", "toy-FVD", "conditional", "unconditional", "356 < 389", seen="mismatch"),
    Claim("upsampler", "toy-FVD", "video upsampler", "image upsampler", "45 < 166", seen="flicker"),
    Claim("decoder", "toy-FVD", "video decoder", "image decoder", "33 < 391", seen="flicker"),
    Claim("decoder", "toy-FVD", "video decoder", "video decoder, both critics", "33 < 51", seen="flicker"),
    Claim("alpha", "toy-FID", "alpha = 1", "learned alpha", "47.00, 48.26", equal=True),
    Claim("alpha", "toy-FID", "alpha = 1", "learned alpha, longer", "47.00, 48.26", equal=True),
    Claim("upsampler", "toy-FID", "image upsampler", "video upsampler", "19.71, 19.85", equal=True),
    Claim("decoder", "toy-FID", "video decoder, both critics", "video decoder", "9.04, 9.17", equal=True),
)


# %% Running


def check(config: Config) -> None:
    """Everything that would go wrong after hours, before they are spent."""
    for name in config.table:
        if name not in TABLES:
            raise UserError(f"--table {name}: there is {', '.join(TABLES)}")
    fewest = min(config.samples // 2, config.rollouts)  # the upsampler's table judges half as many clips
    if config.preset != "smoke" and fewest <= ClipReader.FEATURES:
        raise UserError(f"--samples {config.samples} --rollouts {config.rollouts}: a covariance of clip features, "
                        f"{ClipReader.FEATURES} wide, needs more clips (samples count half in one table)")
    if config.data != "driving":
        raise UserError(f"--data {config.data}: the tables are of procedural scenes; folders: judging/folders.py")
    if config.detector != "toy" and config.frames < 16:
        raise UserError(f"--frames {config.frames}: a detector is given clips of 16 (add --frames 16 --samples 2048)")
    if config.detector != "toy":
        Detector(config.detector, torch.device("cpu"))  # whether it can be read and applied


def show_plan(config: Config) -> None:
    """--dry-run: settings, parameters and rows."""
    for name, value in dataclasses.asdict(config).items():
        print(f"{name}: {value}")
    for name, count in trained_parameters(config).items():
        print(f"{name} trained: {count}")
    for name in config.table or TABLES:
        print(f"{name}: {', '.join(row.name for row in TABLES[name][1])}")


def run_tables(config: Config) -> dict:
    """Measures the rows that are missing or outdated. Seeds may be measured side by side, a process each."""
    results, mine = read_results(config), []
    names = config.table or tuple(TABLES)
    plan = [(seed, name, row) for seed in config.seeds for name in names for row in TABLES[name][1] if row.measure]
    world: World | None = World(config, config.seeds[0])
    readers = {network_name(world, metric) for metric in ("toy-FVD", "toy-FID")}
    done = {(r["seed"], r["table"], r["row"]) for r in results["records"] if not outdated(r, readers)}
    left = [(seed, name, row) for seed, name, row in plan if (seed, name, row.name) not in done]
    bar = tqdm(left, initial=len(plan) - len(left), total=len(plan), desc="rows")
    for seed, name, row in bar:
        bar.set_postfix_str(f"seed {seed}, {name}: {row.name}")
        if world is None or world.seed != seed:
            world = None  # lets go of one seed's models and clips before the next one's
            world = World(config, seed)
        start = time.time()
        numbers = row.measure(world)
        for metric, found in numbers.items():
            if not abs(found["value"]) < float("inf"):
                raise UserError(f"table {name}, row {row.name}, seed {seed}: {metric} is {found['value']}")
        mine.append({"table": name, "row": row.name, "seed": seed, "numbers": numbers,
                     "seconds": round(time.time() - start, 1), "made": datetime.date.today().isoformat(),
                     "hardware": world.hardware()})
        add_rows(config, TABLES, mine, readers)
    return add_rows(config, TABLES, mine, readers)


# %% Main


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, __doc__)
    one_process(NAME)
    check(config)
    if config.dry_run:
        return show_plan(config)
    results = read_results(config) if config.render else run_tables(config)
    if not results["records"]:
        raise UserError(f"{config.results}/tables.json has no rows yet; run without --render")
    render(results, Path(config.results), TABLES, CLAIMS)
    for statement, good in self_checks(results["records"]):
        print(f"self-check: {statement}" + ("" if good else ": does NOT hold"))
    for verdict in judge(results["records"], CLAIMS):
        print(str(verdict).replace("**", ""))


if __name__ == "__main__":
    raise SystemExit(cli(main))
