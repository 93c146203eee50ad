"""What a few minutes on one GPU are spent on, in order of worth: is it right, is it fast, weights worth standing on.

  python benchmarks/gpu.py                    nine minutes
  python benchmarks/gpu.py --parts correct    one part
  python benchmarks/gpu.py --parts compiled   compiled beside diffusers compiled, for which nothing else leaves time
  python benchmarks/gpu.py --parts tables     lesson 12, three seeds side by side: hours of a CPU
  python benchmarks/gpu.py --tiny             a rehearsal on any machine: smoke presets, every part reached

Each job is a command of its own with a limit in seconds; at its limit it is asked to stop (lessons save and can go on).
Results are written after every job, and a second run does only what has not succeeded yet. The weights are trained one
lesson after the other, each for its share of the minutes that are left, on the shipped autoencoder; judge them with
docs/judge.py and pack them with docs/pack.py.

Writes OUT/gpu.json (command, seconds, exit code and last lines of every job) and OUT/NAME.log; what the commands write
themselves is in runs/weights, checkpoints/ and results/.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from kit.errors import UserError, cli  # noqa: E402
from kit.files import CHECKPOINTS, write_text  # noqa: E402

PARTS = ("correct", "fast", "video", "compiled", "tables")


# What is trained: its lesson, its share of the time, its flags. On one NVIDIA H200 lesson 2 made 30 of these steps a
# second with AdamW, lesson 3 12, lesson 5 12 and lesson 6 15. Compiled, lesson 6 made 27, but only after a hundred
# seconds.
LONG = "--batch 64 --steady 1000 --ema-decay 0.999 --reuse 4"
LAST = "--lr 2e-4 --muon 1e-3 --steady 0 --warmup 1 --ema-decay 0.995"
WEIGHTS = {
    "02": ("02_image_ldm", 0.15, "--ae-steps 0 --batch 256 --steady 600 --ema-decay 0.999 --reuse 6"),
    "03": ("03_temporal_layers", 0.11, LONG),
    "05": ("05_prediction", 0.30, LONG),
    "05, last steps": ("05_prediction", 0.08, f"{LONG} {LAST}"),
    "06": ("06_interpolation", 0.26, LONG),
    "06, last steps": ("06_interpolation", 0.10, f"{LONG} {LAST}"),
}
STOPPED = 128 + signal.SIGTERM  # what a lesson ends with that was stopped and has saved


@dataclasses.dataclass(frozen=True)
class Job:
    part: str
    name: str
    command: list[str]
    limit: float  # seconds; below 1, a share of what is left when its part begins
    ends: tuple[int, ...] = (0,)  # exit codes of a job that has done its work


def jobs(out: Path, tiny: bool) -> list[Job]:
    """What there is to do, the most important first."""
    python, venv = sys.executable, out / "venv"
    venv.mkdir(parents=True, exist_ok=True)
    (venv / "installed").touch()  # make shall take this python, and install nothing
    cores = os.cpu_count() or 2
    make = ["make", f"VENV={venv}", f"RUN={python}", "-j", str(max(2, cores // 4)), f"OUT={out}/smoke", "PRESET=smoke",
            "EXTRA=--threads 1"]
    bench = [python, "benchmarks/run.py", *(["--help"] if tiny else []), "--repeats", "5", "--what"]
    fast = ["--threads", "1", "--workers", str(max(1, cores // 2 - 2)), "--cuda-graphs", "--device-noise"]
    long = {name: [*flags.split(), *fast, "--steps", "1000000"] for name, (_, _, flags) in WEIGHTS.items()}
    if tiny:
        make.append(f"{out}/smoke/02_image_ldm/numbers.json")
        long = dict.fromkeys(WEIGHTS, ["--preset", "smoke", "--threads", "1"])
    weights = [Job("video", f"weights {name}", [
        python, f"{lesson}.py", "--out", str(out / "weights"), "--resume", *long[name]], share, (0, STOPPED))
        for name, (lesson, share, _) in WEIGHTS.items()]
    return [Job("correct", "tests", [python, "-m", "pytest", "-q", "tests/test_gpu.py"], 150),
            Job("correct", "lessons", make if tiny else [*make, "course", "text"], 120),
            Job("fast", "large", [*bench, "large"], 100), Job("fast", "training", [*bench, "training"], 120), *weights,
            Job("compiled", "compiled", [*bench, "compiled"], 500),
            Job("tables", "tables", ["bash", "-c", tables(out, tiny)], 1000, (0, STOPPED))]


def tables(out: Path, tiny: bool) -> str:
    """Lesson 12, a process for each seed; a shell script whose exit code is the worst of theirs. Rows are kept as they
    are measured, and what was stopped goes on."""
    command = [sys.executable, "12_tables.py", "--threads", "1", "--out", f"{out}/tables", "--results", f"{out}/tables"]
    command += ["--preset", "smoke", "--table", "choices"] if tiny else [
        "--workers", "4", "--cuda-graphs", "--device-noise"]
    codes = [f"{out}/seed{seed}" for seed in range(1 if tiny else 3)]
    seeds = [f"(trap : TERM; {shlex.join(command)} --seeds {seed}; echo $? > {shlex.quote(code)}) &"
             for seed, code in enumerate(codes)]
    waiting = 'while [ -n "$(jobs -rp)" ]; do wait; done'  # where stopped, until all have saved
    return "\n".join(["trap : TERM", *seeds, waiting, f"exit $(sort -n {shlex.join(codes)} | tail -1)"])


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
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="the first three, if none is named")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal without a GPU")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        raise UserError("benchmarks/gpu.py needs a GPU; --tiny rehearses it without one")
    parts = options.parts or (PARTS if options.tiny else PARTS[:3])
    out, end = options.out.resolve(), time.time() + 60 * options.minutes
    todo, path = jobs(out, options.tiny), out / "gpu.json"
    done = json.loads(path.read_text()) if path.exists() else {}

    def finished(job: Job) -> bool:
        return done.get(job.name, {}).get("exit code") in job.ends

    image = out / "weights" / "02_image_ldm"
    if not image.exists() and not options.tiny:
        image.mkdir(parents=True)
        shutil.copy(CHECKPOINTS / "02_image_ldm" / "autoencoder.pt", image)
    todo, whole = [job for job in todo if job.part in parts and not finished(job)], 0.0
    for i, job in enumerate(todo):
        left = end - time.time() - 25  # to stop and save
        if left < 10:
            print(f"{job.name}: no time left, run again for it")
            continue
        if job.limit < 1:  # of the shares that are left, its own
            whole = whole or left / sum(other.limit for other in todo[i:] if other.limit < 1)
        limit = job.limit * whole if job.limit < 1 else job.limit
        done[job.name] = do(job, min(limit, left), out / f"{job.name}.log")
        write_text(path, json.dumps(done, indent=1) + "\n")
        print(f"{job.name}: exit code {done[job.name]['exit code']} after {done[job.name]['seconds']} s", flush=True)
    missing = [job.name for job in todo if not finished(job)]
    print(f"{path}: {len(todo) - len(missing)} of {len(todo)} done", *(["but not", *missing] if missing else []))


if __name__ == "__main__":
    raise SystemExit(cli(main))
