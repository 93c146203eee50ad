"""What a few minutes on one GPU are spent on, in order of worth: is it right, is it fast, weights worth standing on.

  python benchmarks/gpu.py                    nine minutes
  python benchmarks/gpu.py --parts correct    one part
  python benchmarks/gpu.py --tiny             a rehearsal on any machine: smoke presets, every part reached

Each job is a command of its own with a limit in seconds; at its limit it is asked to stop (lessons save and can go on).
Results are written after every job, and a second run does only what has not succeeded yet.

Writes OUT/gpu.json (command, seconds, exit code and last lines of every job) and OUT/NAME.log; what the commands write
themselves is in runs/weights, checkpoints/ and results/.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common.training import UserError, cli, write_text  # noqa: E402

PARTS = ("correct", "fast", "video")


@dataclasses.dataclass(frozen=True)
class Job:
    part: str
    name: str
    command: list[str]
    limit: float  # seconds; the last job gets all that remain


def jobs(out: Path, tiny: bool) -> list[Job]:
    """What there is to do, the most important first."""
    python, venv = sys.executable, out / "venv"
    venv.mkdir(parents=True, exist_ok=True)
    (venv / "installed").touch()  # make shall take this python, and install nothing
    make = ["make", f"VENV={venv}", f"RUN={python}", "-j", str(max(2, (os.cpu_count() or 2) // 4))]
    smoke = [f"OUT={out}/smoke", "PRESET=smoke", "EXTRA=--threads 1"]
    workers = max(1, (os.cpu_count() or 2) // 3 - 1)
    fast = f"EXTRA=--threads 1 --workers {workers} --cuda-graphs --device-noise"
    tests = Job("correct", "tests", [python, "-m", "pytest", "-q", "tests/test_gpu.py"], 120)
    bench = [python, "benchmarks/run.py", "--repeats", "5", "--what"]
    if tiny:
        return [tests, Job("correct", "lessons", [*make, *smoke, f"{out}/smoke/02_image_ldm/numbers.json"], 120),
                Job("fast", "training", [python, "benchmarks/run.py", "--help"], 60),
                Job("video", "weights", [*make, *smoke, "LONG=weights", "weights_03_temporal_layers=--steps 4",
                                         f"{out}/smoke/03_temporal_layers/numbers.json"], 120)]
    return [tests, Job("correct", "lessons", [*make, *smoke, "course", "text"], 100),
            Job("fast", "large", [*bench, "large"], 150), Job("fast", "training", [*bench, "training"], 60),
            Job("video", "weights", [*make, fast, "weights"], 0)]


def do(job: Job, seconds: float, log: Path) -> dict:
    """Runs a job for at most so long; asks it to stop, with 20 s to save, and then ends it."""
    start, environment = time.time(), {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(job.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
        for wait, number in ((seconds, signal.SIGTERM), (20, signal.SIGKILL)):
            try:
                process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, number)
    return {"part": job.part, "command": " ".join(job.command), "seconds": round(time.time() - start, 1),
            "exit code": process.wait(), "tail": log.read_text(errors="replace")[-1500:].splitlines()[-15:]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal without a GPU")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        raise UserError("benchmarks/gpu.py needs a GPU; --tiny rehearses it without one")
    out, end = options.out.resolve(), time.time() + 60 * options.minutes
    todo, path = jobs(out, options.tiny), out / "gpu.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for job in todo:
        if job.part not in options.parts or done.get(job.name, {}).get("exit code") == 0:
            continue
        left = end - time.time() - 25  # to stop and save
        if left < 10:
            print(f"{job.name}: no time left, run again for it")
            continue
        done[job.name] = do(job, min(job.limit or left, left), out / f"{job.name}.log")
        write_text(path, json.dumps(done, indent=1) + "\n")
        print(f"{job.name}: exit code {done[job.name]['exit code']} after {done[job.name]['seconds']} s", flush=True)
    missing = [job.name for job in todo if done.get(job.name, {}).get("exit code") != 0]
    print(f"{path}: {len(todo) - len(missing)} of {len(todo)} done", *(["but not", *missing] if missing else []))


if __name__ == "__main__":
    raise SystemExit(cli(main))
