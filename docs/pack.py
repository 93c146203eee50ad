"""Packs trained lessons for the repository: checkpoints/, which lessons 8 and 12 use where OUT has no weights.

python docs/pack.py runs/cpu-driving                   all that 08_sample_long.py loads
python docs/pack.py runs/tables-driving                the readers of 12_tables.py

Keeps the averaged weights in half precision, laid out as an OUT. checkpoints/made.json says of each file which command
and seed made it, on which device, and at which commit it was packed (pack where you trained; a line "hours ..." in the
run's env.txt is kept too); metrics.csv or its like beside it holds
the curve, a mean over every 50 steps.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from kit.errors import UserError, cli  # noqa: E402
from kit.files import CHECKPOINTS, load_checkpoint, save_checkpoint, write_text  # noqa: E402

CURVES = {  # file of weights: file of its losses
    "02_image_ldm/autoencoder.pt": "autoencoder.csv",
    "02_image_ldm/checkpoint.pt": "metrics.csv",
    "04_decoder_finetune/checkpoint.pt": "metrics.csv",
    "05_prediction/checkpoint.pt": "metrics.csv",
    "06_interpolation/checkpoint.pt": "metrics.csv",
    "07_upsampler/image.pt": "image.csv",
    "07_upsampler/checkpoint.pt": "metrics.csv",
    "readers/frames.pt": "frames.csv",
    "readers/clips.pt": "clips.csv",
    "readers/captions.pt": "captions.csv",
    "readers/scenes.pt": "scenes.csv",
}
LIMIT = 40 * 2**20  # bytes of all files together
KEPT = ("script", "step", "config", "lineage", "latent_scale")


def half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def thinned(path: Path, every: int = 50) -> str:
    """The rows of a metrics file, averaged over runs of `every`."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    lines = [",".join(rows[0])]
    for start in range(0, len(rows), every):
        part = rows[start : start + every]
        means = (sum(float(row[name]) for row in part) / len(part) for name in rows[0] if name != "step")
        lines.append(",".join([part[-1]["step"], *(f"{mean:.5g}" for mean in means)]))
    return "\n".join(lines) + "\n"


def pack(out: Path) -> None:
    made = json.loads((CHECKPOINTS / "made.json").read_text()) if (CHECKPOINTS / "made.json").exists() else {}
    revision = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()
    for name, curve in CURVES.items():
        path, target = out / name, CHECKPOINTS / name
        if not path.exists():
            continue
        content = load_checkpoint(path, "the lesson that is named like its folder")
        content["config"]["out"] = ""  # where it lay is nobody's business
        weights = {"ema": {"shadow": half(content["ema"]["shadow"])}} if "ema" in content else {
            "reader": half(content["reader"])}
        target.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(target, {key: content[key] for key in KEPT if key in content} | weights)
        write_text(target.with_name(curve), thinned(path.with_name(curve)))
        environment = dict(line.partition(" ")[::2] for line in (path.parent / "env.txt").read_text().splitlines())
        made[name] = {"command": "python " + environment["command"].replace(" --resume", ""), "commit": commit,
                      "seed": content["config"]["seed"], "steps": content["step"], "torch": environment["torch"],
                      "machine": environment.get("device", ""), "hours": environment.get("hours", "not kept"),
                      "precision": environment["precision"], "curve": str(Path(name).with_name(curve)),
                      "bytes": target.stat().st_size}
    if not made:
        raise UserError(f"{out}: nothing to pack; it has none of {', '.join(CURVES)}")
    write_text(CHECKPOINTS / "made.json", json.dumps(made, indent=1) + "\n")
    total = sum(path.stat().st_size for path in CHECKPOINTS.rglob("*.*"))
    print(f"{CHECKPOINTS}: {len(made)} files of weights, {total / 2**20:.1f} MiB in all")
    if total > LIMIT:
        raise UserError(f"{CHECKPOINTS} is over {LIMIT / 2**20:.0f} MiB")


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise UserError("give one OUT, like runs/cpu-driving")
    pack(Path(arguments[0]))


if __name__ == "__main__":
    raise SystemExit(cli(main))
