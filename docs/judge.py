"""Judges trained weights: the numbers and pictures of lessons 2 to 7, without training, from an OUT like checkpoints/.

python docs/judge.py checkpoints runs/shipped          of what the repository ships

Writes the lessons' folders with numbers.json and pictures into the second folder. The settings of sampling are those of
today's cpu preset, whatever the weights were trained with.
"""

import dataclasses
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common.image_model import ImageModel  # noqa: E402
from common.loop import EMA  # noqa: E402
from common.temporal import TemporalOptions, is_temporal  # noqa: E402
from kit.data import open_data  # noqa: E402
from kit.errors import UserError, cli  # noqa: E402
from kit.flags import preset_config  # noqa: E402
from kit.run import Run  # noqa: E402


class Judged(Run):
    """A run that reads weights from one OUT and writes into another."""

    def __init__(self, name: str, weights: Path, out: Path) -> None:
        lesson = import_module(name)
        super().__init__(name, preset_config(lesson.Config, lesson.PRESETS, "cpu", out=str(out), overwrite=True))
        self.config = dataclasses.replace(self.config, out=str(weights))


def trained(run: Run, image: ImageModel, lesson) -> nn.Module:
    """The network of lessons 3, 5 and 6; 3 has no `load`, since only its weights go on."""
    if hasattr(lesson, "load"):
        return lesson.load(run, image)[0]
    options = TemporalOptions(alpha_frames=run.config.alpha_frames, ff_mult=run.config.feed_forward)
    unet, weights = image.unet(options), run.trained(lesson.NAME, image.lineage)["ema"]["shadow"]
    assert all(is_temporal(name) for name in weights)
    unet.load_state_dict(weights, strict=False)
    return unet.requires_grad_(False).eval()


def judge(weights: Path, out: Path) -> None:
    lesson02 = import_module("02_image_ldm")
    for name in sorted(path.name for path in weights.glob("0[2-7]_*") if "-" not in path.name):
        lesson, run = import_module(name), Judged(name, weights, out)
        image = lesson02.load(run)
        size = [side * (4 if name[:2] == "07" else 1) for side in (image.config.height, image.config.width)]
        source = open_data("driving", *size, run.config.final_fps)
        still = EMA(nn.Module(), 0.0)  # the weights are averages already
        if name[:2] == "02":
            model = lesson.Conditioned(image.unet().requires_grad_(False), image.conditioner)
            lesson.evaluate(run, dataclasses.replace(image.config, samples=run.config.samples), source, image, model,
                            still)
        elif name[:2] == "04":
            lesson.evaluate(run, run.config, source, image, lesson.load(run, image)[0])
        elif name[:2] == "07":
            lesson.evaluate(run, run.config, source, lesson.load(run, image)[0])
        else:
            history = [[]] if name[:2] == "03" else []
            arguments = (run, run.config, source, image, trained(run, image, lesson), still)
            lesson.evaluate(*arguments, *([] if name[:2] != "03" else history))


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2 or arguments[0] == arguments[1]:
        raise UserError("give an OUT with weights and another folder to write into: checkpoints runs/shipped")
    with torch.no_grad():
        judge(Path(arguments[0]), Path(arguments[1]))


if __name__ == "__main__":
    raise SystemExit(cli(main))
