"""Copies numbers and pictures of finished runs into docs/ and writes docs/numbers.md from them.

python docs/collect.py runs/cpu-driving driving
python docs/collect.py runs/cpu-dashcam real
python docs/collect.py runs/cpu-driving text     what `make text` adds: lessons 9 to 11 and their backbone
python docs/collect.py runs/text text-gpu        the same of a longer training
python docs/collect.py runs/demo demo            only pictures, of what `make demo` wrote
python docs/collect.py runs/cpu-driving expected  writes the known-good values, docs/expected/NN.csv
python docs/collect.py                           only rewrites docs/numbers.md from docs/numbers/*.json
"""

import csv
import itertools
import json
import shutil
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
from kit.pictures import save_animation, save_image  # noqa: E402

TARGET = DOCS / "numbers.md"
LIMIT = 300_000  # bytes of a picture; one over it is tried coarser, then smaller:
COARSER = ((90, 4), (90, 8), (85, 10), (80, 10), (75, 12), (70, 12))  # quality, levels: see save_animation
LONG = 60  # frames
SMALLER = ((1, 512), (2, 512), (2, 384), (3, 384), (3, 320), (4, 320), (4, 256))  # every nth frame, width
TITLES = {"driving": "On the procedural scenes", "text": "Text to video, personalization, latent upsampler",
          "text-gpu": "Text to video, trained for minutes on a GPU", "real": "On real dashcam clips"}
PROMPTED = ("text", "text-gpu")
TEXT = ("02_image_ldm-text", "09_text_to_video", "10_personalization", "11_latent_upsampler")


def collect(out: Path, name: str) -> None:
    numbers, folders = {}, [path.parent for path in sorted(out.glob("*/numbers.json"))]
    folders = [f for f in folders if (f.name in TEXT if name in PROMPTED else f.name[:2] < "09" and f.name not in TEXT)]
    for path in (folder / "numbers.json" for folder in folders):
        environment = dict(line.partition(" ")[::2] for line in (path.parent / "env.txt").read_text().splitlines())
        command = environment["command"].replace(" --resume", "").replace(" --overwrite", "")
        numbers[path.parent.name] = {"command": command, "numbers": json.loads(path.read_text())}
    (DOCS / "numbers").mkdir(exist_ok=True)
    (DOCS / "numbers" / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    suffixes = (".png", ".gif", ".webp")
    for picture in sorted(p for folder in folders for p in folder.iterdir() if p.suffix in suffixes):
        if name in ("driving", *PROMPTED):  # the demo's pictures stand for lesson 8
            shown = picture.parent.name not in DEMO
        else:
            shown = picture.name in GENERATED
        if shown and picture.name in SHOWN.get(picture.parent.name, ()):
            suffix = "_real" if name == "real" else ""
            copy_small(picture, DOCS / "figures" / f"{picture.parent.name[:2]}_{picture.stem}{suffix}{picture.suffix}")
    if prompts := sorted(out.glob("09_text_to_video-*/long-large.webp")) if name in PROMPTED else []:
        side_by_side(prompts, DOCS / "figures" / "09_prompts.webp")


def copy_small(picture: Path, target: Path) -> None:
    """Copies a picture; one over the limit is made coarser, then shorter and smaller; a long animation always."""
    shutil.copy(picture, target)
    still = picture.suffix == ".png"  # large still pictures shrink by width alone
    with Image.open(picture) as image:
        shorten = getattr(image, "n_frames", 1) > LONG
        if still and image.mode != "P":  # a plot
            save_image(np.asarray(image.convert("RGB")), target)
    for (step, width), (quality, levels) in itertools.product(SMALLER[shorten:], COARSER):
        if target.stat().st_size <= LIMIT and not shorten:
            return
        frames, pause = frames_of(picture, step, 3 * width if still else width)
        if still:
            save_image(np.asarray(frames[0]), target)
        else:
            save_animation(map(np.asarray, frames), target, 1000 / pause, quality, levels)
        shorten = False


def frames_of(picture: Path, step: int, width: int) -> tuple[list[Image.Image], int]:
    """Every step-th frame, at most so wide, and how many milliseconds each is seen."""
    frames, seen = [], []
    with Image.open(picture) as image:
        width = min(width, image.width)
        size = width, round(image.height * width / image.width)
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
            seen.append(image.info.get("duration", 100))
    once = min(seen)  # of frames that are alike the file holds one, for longer
    frames = [frame for frame, long in zip(frames, seen, strict=True) for _ in range(round(long / once))]
    return frames[::step], step * once


def side_by_side(videos: list[Path], target: Path, width: int = 256) -> None:
    """Animations of one length and rate in a row, every second frame."""
    columns, pauses = zip(*(frames_of(video, 2, width) for video in videos), strict=True)
    gap = np.full((columns[0][0].height, 4, 3), 255, np.uint8)
    rows = [[part for frame in row for part in (gap, np.asarray(frame))][1:] for row in zip(*columns, strict=False)]
    frames = [np.concatenate(row, axis=1) for row in rows]
    for quality, levels in COARSER:
        save_animation(iter(frames), target, 1000 / pauses[0], quality, levels)
        if target.stat().st_size <= LIMIT:
            return


SHOWN = {
    "01_toy_alignment": ("figure2.png", "figure2.gif"),
    "02_image_ldm": ("samples.png", "reconstructions.png"),
    "03_temporal_layers": ("before_after.png", "after.gif", "alphas.png", "loss_per_level.png"),
    "04_decoder_finetune": ("decoders.png", "time_slices.png"),
    "05_prediction": ("futures.png", "futures.gif", "guidance.png", "copy_error.png"),
    "06_interpolation": ("middle_frames.png", "two_passes.gif", "copy_error-1.png"),
    "07_upsampler": ("upsampled.png",),
    "08_sample_long": ("long.webp", "long-large.webp", "contact_sheet.png", "drift.png"),
    "09_text_to_video": ("captions.png", "app_d.png", "app_d_wide.png"),
    "10_personalization": ("instances.png", "videos.png"),
    "11_latent_upsampler": ("upsampled.png",),
}
DEMO = {"08_sample_long": {"long.webp": "08_small.webp", "long-large.webp": "08_long.webp",
                           "contact_sheet.png": "08_contact_sheet.png", "drift.png": "08_drift.png"}}
# of real clips only what models made may be shown: these pictures hold no source frame
GENERATED = (
    "samples.png",
    "before_after.png",
    "long.webp",
    "long-large.webp",
    "contact_sheet.png",
    "drift.png",
)


DRIFT = {"colour": 0.15, "sharpness": 0.02, "frame difference": 0.005}  # that two good videos may differ by


def write_expected(out: Path) -> None:
    """docs/expected/NN.csv from a finished run of a preset: losses at a tenth, a third and the end, and all numbers."""
    from kit.flags import preset_config
    from kit.run import mean_before

    for folder in sorted(out.glob("??_*")):
        if "-" in folder.name or not (folder / "numbers.json").exists():
            continue
        config, lesson = json.loads((folder / "config.json").read_text()), import_module(folder.name)
        preset = config["preset"]
        default = json.loads(json.dumps(asdict(preset_config(lesson.Config, lesson.PRESETS, preset))))
        if preset == "cpu" and folder.name[:2] > "02" and not (out / "02_image_ldm").exists():
            preset = "cpu, shipped"  # what it stands on; see known_good
        fixed = (k for k in default if k not in lesson.Config.free or k == "steps")
        if changed := [k for k in fixed if config.get(k, default[k]) != default[k]]:
            print(f"{folder.name}: not the preset's flags ({', '.join(changed)}), left out")
            continue
        rows = []
        for path in sorted(folder.glob("*.csv")):
            with path.open() as file:
                table = csv.DictReader(file)
                names = [name for name in table.fieldnames if name in ("loss", "l1", "perceptual")]
                last = max((int(row["step"]) for row in table if row.get("step")), default=-1) + 1
            for step in dict.fromkeys((last // 10, last // 3, last) if last > 50 else (last,)):
                for name in names:
                    value = mean_before(path, name, step)
                    # measured with features that the run has trained itself: two runs of the course lay 45 % apart
                    tolerance = (0.5 if name == "perceptual" and preset != "smoke" else 0.2) * value
                    rows.append([preset, path.name, name, step, f"{value:.4g}", f"{tolerance:.2g}"])
        for name, number in json.loads((folder / "numbers.json").read_text()).items():
            if number["unit"] != "s":
                value = number["value"]
                # untrained and from the same noise, frames differ by rounding: 0.27 times in bfloat16, 0.002 in float32
                least = 0.3 if number["unit"] == "times real" else 0.002
                if name.startswith("clips that flip"):  # a count: another machine's rounding may flip one
                    least = 1
                if name.startswith("drift of") and preset != "smoke":  # of one video; another good course's may be 0
                    least = DRIFT[name.removeprefix("drift of ").partition(",")[0]]
                tolerance = {"dB": 1.5, "%": 10.0}.get(number["unit"], max(0.3 * abs(value), least))
                rows.append([preset, "numbers", name, "", f"{value:.4g}", f"{tolerance:.2g}"])
        path = DOCS / "expected" / f"{folder.name[:2]}.csv"
        path.parent.mkdir(exist_ok=True)
        header = ["preset", "file", "name", "step", "value", "tolerance"]
        if path.exists():
            with path.open() as file:
                rows = [row for row in list(csv.reader(file))[1:] if row[0] != preset] + rows
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])


def render() -> str:
    text = ("# What was measured\n\nEvery number that a lesson reports, beside its goal. The command above each table "
            "gives it. Written by docs/collect.py.\n")
    for name, title in TITLES.items():
        path = DOCS / "numbers" / f"{name}.json"
        if not path.exists():
            continue
        text += f"\n## {title}\n"
        for lesson, content in json.loads(path.read_text()).items():
            goals = [number["met"] for number in content["numbers"].values() if number["goal"]]
            met = f": {sum(goals)} of {len(goals)} goals met" if goals else ""
            text += f"\n<details><summary><b>{lesson}</b>{met}</summary>\n\n`python {content['command']}`\n\n"
            text += "| number | value | goal | |\n| --- | --- | --- | --- |\n"
            for label, number in content["numbers"].items():
                value = f"{number['value']:.4g} {number['unit']}".rstrip()
                verdict = "" if not number["goal"] else "met" if number["met"] else "**missed**"
                text += f"| {label} | {value} | {number['goal']} | {verdict} |\n"
            text += "\n</details>\n"
    return text


def main(argv: list[str]) -> None:
    if argv and argv[1] == "expected":
        return write_expected(Path(argv[0]))
    if argv and argv[1] == "demo":
        for lesson, pictures in DEMO.items():
            for name, shown in pictures.items():
                copy_small(Path(argv[0]) / lesson / name, DOCS / "figures" / shown)
        return
    if argv:
        collect(Path(argv[0]), argv[1])
    TARGET.write_text(render())


if __name__ == "__main__":
    main(sys.argv[1:])
