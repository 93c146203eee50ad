"""How fast, beside what, and how much of the machine: ratios measured in one run.

  python benchmarks/run.py                          everything there is something to compare with here
  python benchmarks/run.py --what unet sampling --widths 128 --against diffusers
  python benchmarks/run.py --what long              peak memory and time of 30 and of 300 seconds

unet: the same video U-Net with the same weights here and in diffusers (UNetSpatioTemporalConditionModel), forward,
temporal training step (spatial layers frozen) and full training step; and, doing the same job with as many parameters,
lucidrains' Unet3D and diffusers' UNet3DConditionModel. sampling: DDIM with guidance. training: the training steps of
the lessons at the cpu preset, data included. decoder: frames decoded by lessons 2 and 4. long: lesson 8. growth:
the temporal training step against frames, latent size, batch and processes, each beside the power law one expects.
large, on a GPU only: the temporal training step of a network of Stable Diffusion 2.1's size at 320 x 512, 8 frames,
against diffusers' with the same weights, both recorded or not; sampling; peak memory with and without gradient
checkpointing. compiled: the step again, both compiled and recorded. (Compiling takes five minutes for ours and six for
theirs, on an H200's 16 cores side by side; with TORCHINDUCTOR_CACHE_DIR kept, a minute for both from then on.)

Ours and theirs run in turn, each at the fastest of its settings (float32, bfloat16 autocast, channels-last), found by
trial at the start; a ratio is theirs over ours, the median over the pairs. Shares are FLOP/s, counted by torch, over
what a matrix product of 2048 x 2048 (on a GPU 8192 x 8192) reaches in bfloat16 in the same run. Nothing is asserted:
machines differ. On a GPU a comparison also says on what kinds of kernels each network spends its (eager) time.

Writes results/benchmarks.json (every repetition), benchmarks.md and benchmarks.png (growth), or with a GPU
benchmarks_NAME.
Needs: pip install "videoldm[bench]" for the networks of others; what is not installed is left out, and said so.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the lessons are scripts beside this folder
from benchmarks.clocks import Clock, Stopwatch, flops_of, profiled  # noqa: E402
from benchmarks.networks import (  # noqa: E402
    COMPILED,
    FORMATS,
    LARGE,
    ON_GPU,
    TEXT,
    Contestant,
    Size,
    call_ours,
    missing,
    ours_of_width,
    same_job,
    same_network,
)
from common.blocks import channels_last  # noqa: E402
from common.loop import adamw  # noqa: E402
from common.temporal import is_temporal, train_temporal_only  # noqa: E402
from kit.data import open_data  # noqa: E402
from kit.errors import UserError, cli  # noqa: E402
from kit.files import CHECKPOINTS, write_text  # noqa: E402
from kit.flags import preset_config  # noqa: E402
from kit.pictures import plt, save_figure  # noqa: E402
from kit.run import Run, keep_freed_memory, pick_device, pick_dtype  # noqa: E402

WHAT = ("unet", "sampling", "training", "decoder", "long", "growth", "large", "compiled")
WANT_A_GPU = ("large", "compiled")
AGAINST = ("diffusers", "lucidrains")
FASTEST = dict(cuda_graphs=True, device_noise=True, workers=8)  # of a lesson's flags, on a GPU


# %% What is measured


def compare(clock: Clock, name: str, jobs: tuple[Callable, Callable], pair: tuple[Contestant, Contestant],
            formats: dict[str, tuple] = FORMATS) -> dict:
    """One row: `jobs` of ours and theirs, each at its best setting."""
    settings = [one.best(clock, job, formats) for one, job in zip(pair, jobs, strict=True)]
    row = {"row": name, "setting, ours": settings[0], "setting, theirs": settings[1]} | clock.in_turn(*jobs)
    for who, one, job, setting in zip(("ours", "theirs"), pair, jobs, settings, strict=True):
        one.use(*formats[setting][:2])  # FLOPs of what is compiled or recorded are not seen by the counter
        row[f"FLOPs, {who}"] = flops_of(job)
        row[f"share, {who}"] = clock.share(row[f"FLOPs, {who}"], row[who])
        if kernels := profiled(clock, job) if clock.device.type == "cuda" else {}:
            row[f"kernels, {who}"] = kernels
            print(f"{who}: " + ", ".join(f"{kind} {1e3 * seconds:.1f} ms" for kind, seconds in kernels.items()))
    print(f"{name}: {row['ratio']:.2f} times ({row['ratio, lowest']:.2f} to {row['ratio, highest']:.2f}), "
          f"{100 * row['share, ours']:.0f} % of the matrix rate; ours {settings[0]}, theirs {settings[1]}")
    return row


def unet_rows(clock: Clock, against: list[str], widths: list[int], sampling: bool) -> list[dict]:
    rows = []
    for width in widths:
        if "diffusers" not in against:
            break
        ours, theirs = pair = same_network(Size(width), clock.device)
        a, b = ours.forward(), theirs.forward()
        equal = float((a - b).norm() / b.norm())
        total = sum(p.numel() for p in ours.net.parameters())
        facts = {"against": "diffusers, same weights", "width": width, "parameters": total, "difference": equal}
        print(f"width {width}: {total / 1e6:.1f} M parameters, outputs differ by {equal:.1e}")
        if sampling:
            jobs = {"sampling": (ours.sample, theirs.sample)}
        else:
            jobs = {"forward": (ours.forward, theirs.forward),
                    "temporal training step": (ours.step(True), theirs.step(True))}
        for name, job in jobs.items():
            rows.append(facts | compare(clock, f"{name}, width {width}", job, pair))
        if not sampling:  # made after the others were measured: it unfreezes the spatial layers
            job = ours.step(False), theirs.step(False)
            rows.append(facts | compare(clock, f"full training step, width {width}", job, pair))
    if sampling:
        return rows
    for who in against:
        width = min(widths, key=lambda w: abs(w - 128))
        ours = Contestant(ours_of_width(width).to(clock.device), call_ours, is_temporal, Size(width))
        total = sum(p.numel() for p in ours.net.parameters())
        theirs = same_job(who, total, clock.device)
        size = sum(p.numel() for p in theirs.net.parameters())
        facts = {"against": f"{who}, same job", "width": width, "parameters": total, "parameters, theirs": size}
        print(f"{who}: {size / 1e6:.1f} M parameters against our {total / 1e6:.1f} M")
        pair = ours, theirs
        for name, job in {"forward": (ours.forward, theirs.forward),
                          "full training step": (ours.step(False), theirs.step(False))}.items():
            rows.append(facts | compare(clock, f"{name}, {who}'s network", job, pair))
    return rows


def training_rows(clock: Clock) -> Iterator[dict]:
    """Steps of the lessons as they are, data and logging included; on a GPU also as it has them fastest, and so the gpu
    preset's. The cpu preset's stand on the weights in checkpoints/, the gpu preset's on untrained ones."""
    ways: list[tuple] = [("cpu", "", {}, 2, 2 + 3 * clock.repeats)]  # preset, name, flags, steps before, and in all
    if clock.device.type == "cuda":
        ways = [("gpu", ", recorded, 8 workers", FASTEST, 10, 30), ("cpu", ", recorded, 8 workers", FASTEST, 60, 260),
                ("cpu", "", {}, 10, 40)]
    for preset, way, flags, first, last in ways:
        with tempfile.TemporaryDirectory() as out:
            for row in lesson_rows(clock, preset, flags | {"out": out, "device": clock.device.type}, first, last):
                row["row"] += way
                print(f"{row['row']}: {1e3 * statistics.median(row['ours']):.1f} ms, {shares(row)}", flush=True)
                yield row


def lesson_rows(clock: Clock, preset: str, flags: dict, first: int, last: int) -> Iterator[dict]:
    """A row for each of four lessons, trained in turn, since each leaves the weights that the next one wants."""
    lesson02, out = importlib.import_module("02_image_ldm"), Path(flags["out"])
    if preset == "cpu":
        shutil.copytree(CHECKPOINTS / lesson02.NAME, out / lesson02.NAME)
    else:
        config = preset_config(lesson02.Config, lesson02.PRESETS, preset, out=str(out), device=flags["device"],
                               ae_steps=1, steps=0)
        scenes = open_data("driving", config.height, config.width, 30.0)
        lesson02.train(Run(lesson02.NAME, config), config, scenes, "")
    for name in (lesson02.NAME, "03_temporal_layers", "05_prediction", "06_interpolation"):
        lesson, variant = importlib.import_module(name), "timed" if name == lesson02.NAME else ""
        config = preset_config(lesson.Config, lesson.PRESETS, preset, **flags | {"steps": last})
        run, train = Run(name, config, variant), lesson02.train_unet if lesson is lesson02 else lesson.train
        image = lesson02.load(run)
        source = open_data("driving", image.config.height, image.config.width, 30.0, config.workers)
        watch = Stopwatch(source, first, clock)
        train(run, config, watch, image)
        row = {"row": f"{name}, {preset} preset, training step", "batch": config.batch} | watch.numbers()
        once = dataclasses.replace(config, steps=1, cuda_graphs=False)  # the counter does not see what is recorded
        run = Run(name, once, "counted")
        row["FLOPs, ours"] = flops_of(lambda t=train, r=run, c=once, s=source, i=image: t(r, c, s, i))
        row["share, ours"] = clock.share(row["FLOPs, ours"], row["ours"])
        if hasattr(source, "pool"):
            source.pool.shutdown(cancel_futures=True)
        yield row


def decoder_rows(clock: Clock) -> list[dict]:
    lesson02, lesson04 = (importlib.import_module(name) for name in ("02_image_ldm", "04_decoder_finetune"))
    with tempfile.TemporaryDirectory() as out:
        run = Run("04_decoder_finetune", preset_config(lesson04.Config, lesson04.PRESETS, "cpu", out=out))
    config = preset_config(lesson02.Config, lesson02.PRESETS, "cpu")
    image = lesson02.ImageModel(config, clock.device)
    frames = lesson04.Config().frames
    video = lesson04.video_autoencoder(image, lesson04.Config().kernel).eval()
    lesson04.set_frames(video, frames)
    z, rows = torch.randn(frames, *image.shape, device=clock.device), []
    decoders = {"image decoder": lambda: image.decode(z, frames), "video decoder": lambda: video.decode(z)}
    for name, decode in decoders.items():

        @torch.no_grad()
        def work(decode: Callable = decode) -> None:
            with run.autocast():
                decode()

        work()
        each = [clock.seconds(work) / frames for _ in range(2 * clock.repeats)]
        flops = flops_of(work) // frames
        rows.append({"row": f"{name}, a frame", "ours": each, "FLOPs, ours": flops,
                     "share, ours": clock.share(flops, each)})
        print(f"{name}: {1 / statistics.median(each):.0f} frames of {config.height} x {config.width} a second")
    return rows


def long_rows(clock: Clock) -> list[dict]:
    """Lesson 8 in processes of their own: does memory grow with the length of the video, does a second cost more?"""
    rows = []
    for seconds in (30, 300):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(ROOT / "08_sample_long.py"), "--seconds", str(seconds), "--no-upsampler",
                       "--out", out]
            measured = [sys.executable, "-c", MEASURED, *command]
            found = json.loads(subprocess.run(measured, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        rows.append({"row": f"lesson 8, {seconds} s without upsampler", "ours": [found["seconds"]],
                     "peak bytes": found["peak"]})
        print(f"{rows[-1]['row']}: {found['seconds']:.0f} s, peak {found['peak'] / 2**20:.0f} MiB")
    return rows


def large_rows(clock: Clock, against: list[str], size: Size = LARGE,
               formats: dict[str, tuple] = ON_GPU) -> Iterator[dict]:
    """The temporal training step at the paper's size, sampling, and the step's peak memory with activations kept or
    computed again (the step alone with `COMPILED`, whose first one takes minutes)."""
    if "diffusers" not in against:
        return
    ours, theirs = pair = same_network(size, clock.device)
    facts = {"against": "diffusers, same weights", "parameters": sum(p.numel() for p in ours.net.parameters())}
    name, job = "temporal training step, SD 2.1 size", ours.step(True)
    row = facts | compare(clock, name, (job, theirs.step(True)), pair, formats)
    yield row
    if formats is COMPILED:
        return
    eager = FORMATS if formats is ON_GPU else formats  # without gradients nothing is recorded
    yield facts | compare(clock, "sampling, SD 2.1 size", (ours.sample, theirs.sample), pair, eager)
    theirs.net.to("meta")  # its memory is not ours
    for ours.net.checkpointing in (False, True):
        ours.use(*formats[row["setting, ours"]][:2])  # eager: what is recorded keeps its memory
        job()
        peak = {}
        if clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        each = [clock.seconds(job) for _ in range(clock.repeats)]
        if clock.device.type == "cuda":
            peak = {"peak bytes": torch.cuda.max_memory_allocated()}
        how = "with" if ours.net.checkpointing else "without"
        print(f"{name}, {how} gradient checkpointing: {statistics.median(each):.3f} s, "
              f"peak {peak.get('peak bytes', 0) / 2**30:.1f} GiB")
        yield {"row": f"{name}, {how} gradient checkpointing", "ours": each} | peak


GROWTH = {  # sizes, and the exponent that is expected: why
    "frames": ((4, 8, 16, 32), 1.0, "all layers but temporal attention are linear in T"),
    "latent pixels": ((128, 512, 2048, 8192), 1.0, "convolutions; spatial attention adds towards 2"),
    "clips in a batch": ((1, 2, 4, 8), 1.0, "samples do not meet"),
    "processes": ((1, 2), -1.0, "a thread each, the same batch"),
}


def growth_rows(clock: Clock) -> list[dict]:
    """Seconds of a temporal training step, one size at a time changed from 8 frames of 16 x 32 latents, 1 clip."""
    rows = []
    for axis, (sizes, expected, why) in GROWTH.items():
        for size in sizes:
            each = (steps_by_processes(size, clock.repeats) if axis == "processes" else
                    steps_of_size(clock, **{axis.split()[-1]: size}))
            rows.append({"row": f"growth: {size} {axis}", "against": f"exponent {expected:g} expected: {why}",
                         "ours": each, "axis": axis, "size": size})
            print(f"{rows[-1]['row']}: {statistics.median(each):.3f} s")
    return rows


def steps_of_size(clock: Clock, frames: int = 8, pixels: int = 512, batch: int = 1) -> list[float]:
    unet = channels_last(ours_of_width(64)).to(clock.device)
    train_temporal_only(unet)
    height = round((pixels / 2) ** 0.5)
    x = torch.randn(batch * frames, 4, height, 2 * height, device=clock.device)
    tau, text = torch.full((batch,), 500, device=clock.device), torch.randn(batch, 1, TEXT, device=clock.device)
    optimizer, dtype = adamw(unet, 1e-5), pick_dtype("auto", clock.device)

    def step() -> None:
        with torch.autocast(clock.device.type, dtype, enabled=dtype != torch.float32):
            output = unet(x.contiguous(memory_format=torch.channels_last), tau, text, frames=frames, time_context=text)
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return [clock.seconds(step) for _ in range(clock.repeats)]


def steps_by_processes(processes: int, repeats: int) -> list[float]:
    """Lesson 3 under torchrun, on the weights in checkpoints/: what 5 steps and what 25 take, the difference by 20."""
    found = []
    for _ in range(max(1, repeats // 3)):
        seconds = []
        for steps in (5, 25):
            with tempfile.TemporaryDirectory() as out:
                shutil.copytree(CHECKPOINTS / "02_image_ldm", Path(out) / "02_image_ldm")
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           str(processes), str(ROOT / "03_temporal_layers.py"), "--threads", "1", "--batch", "4",
                           "--steps", str(steps), "--samples", "1", "--ddim-steps", "1", "--out", out]
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - start)
        found.append((seconds[1] - seconds[0]) / 20)
    return found


def exponent(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> float:
    """Of the power law through the first and the last point."""
    return math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0])


def growth_figure(rows: list[dict], path: Path) -> None:
    """Measured seconds over size, the power law through their ends, and the expected one."""
    figure, axes = plt.subplots(1, len(GROWTH), figsize=(3.2 * len(GROWTH), 3), constrained_layout=True)
    for axis, (name, (_, expected, why)) in zip(axes, GROWTH.items(), strict=True):
        sizes, seconds = zip(*((r["size"], statistics.median(r["ours"])) for r in rows if r["axis"] == name),
                             strict=True)  # fmt: skip
        axis.loglog(sizes, seconds, "o-", label=f"measured, exponent {exponent(sizes, seconds):.2f}")
        axis.loglog(sizes, [seconds[0] * (size / sizes[0]) ** expected for size in sizes], "--", color="grey",
                    label=f"expected {expected:g}")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_yticks(seconds, [f"{each:.2g}" for each in seconds])
        axis.minorticks_off()
        axis.set_xlabel(f"{name}\n({why})", fontsize=8)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("seconds of a training step")
    save_figure(figure, path)


MEASURED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(json.dumps({"seconds": time.perf_counter() - start,
                  "peak": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))
"""


# %% Results


def hardware(clock: Clock) -> dict:
    name = torch.cuda.get_device_name() if clock.device.type == "cuda" else platform.processor() or platform.machine()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", flags)
    kinds = [kind for kind in ("amx_bf16", "avx512_bf16") if kind in flags]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "video_diffusion_pytorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"device": name, "gpu": name if clock.device.type == "cuda" else "",
            "cpu": model[1] if model else platform.machine(), "instructions": kinds,
            "threads": torch.get_num_threads(), "versions": versions,
            "matrix rate, GFLOP/s": {name: rate / 1e9 for name, rate in clock.peak.items()},
            "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def shares(row: dict) -> str:
    """Of the matrix rate, ours and theirs; of the time of a step."""
    if "peak bytes" in row:
        return f"(peak {row['peak bytes'] / 2**20:.0f} MiB)"
    found = [f"{100 * row[key]:.2g} %" for key in ("share, ours", "share, theirs") if key in row]
    found += [f"{100 * row[key]:.0f} % {key}" for key in ("waiting for clips", "GPU at work") if key in row]
    return ", ".join(found)


def table(results: dict) -> str:
    machine, lines = results["hardware"], []
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in machine["matrix rate, GFLOP/s"].items())
    kinds = ", ".join(machine["instructions"]) or "neither AMX nor AVX512-BF16"
    where = machine.get("gpu") or f"{machine['cpu']} ({kinds}), {machine['threads']} threads"
    lines += [f"{where}, torch {machine['versions']['torch']}; "
              f"matrix products in GFLOP/s: {rates}", "",
              "| what | against | ours, s | theirs, s | ratio (lowest to highest) | share of the bfloat16 matrix rate, "
              "ours, theirs |", "| --- | --- | --- | --- | --- | --- |"]
    for row in results["rows"]:
        theirs = f"{statistics.median(row['theirs']):.3g}" if "theirs" in row else ""
        ratio = f"{row['ratio']:.2f} ({row['ratio, lowest']:.2f} to {row['ratio, highest']:.2f})" if theirs else ""
        ours = statistics.median(row["ours"])
        lines.append(f"| {row['row']} | {row.get('against', '')} | {ours:.3g} | {theirs} | {ratio} | {shares(row)} |")
    return "\n".join(lines) + "\n"


def tables(parts: dict[str, dict]) -> str:
    text = "\n".join(f"**{name}**: {table(part)}" for name, part in parts.items())
    if "large" not in parts:
        text += ("\n**large**, the temporal training step of the SD 2.1-size model at 320 x 512, 8 frames, recorded or "
                 "compiled, and its peak memory with and without gradient checkpointing: not measured; it needs a "
                 "GPU.\n")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", choices=WHAT, default=WHAT, help="parts to measure; the others are kept")
    parser.add_argument("--against", nargs="*", choices=AGAINST, default=AGAINST, help="whose networks")
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 128, 320], help="base widths of the U-Net")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder to write to")
    options = parser.parse_args(argv)
    if options.repeats < 1 or min(options.widths, default=0) < 64 or any(w % 64 for w in options.widths):
        raise UserError("--repeats must be positive, --widths multiples of 64")
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()  # for both sides: the allocator is the process's
    against, left_out = [], []
    for who in options.against:
        (left_out if missing(who) else against).append(missing(who) or who)
    for line in left_out:
        print(line)
    clock = Clock(pick_device(options.device), options.repeats)
    suffix = "_" + re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if clock.device.type == "cuda" else ""
    path = Path(options.results) / f"benchmarks{suffix}.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    for what in tqdm(options.what, desc="parts"):
        if what in ("unet", "sampling"):
            measured = unet_rows(clock, against, options.widths, what == "sampling")
        elif what in WANT_A_GPU:
            if clock.device.type != "cuda":
                print(f"{what}: not measured, it needs a GPU")
                continue
            measured = large_rows(clock, against, formats=ON_GPU if what == "large" else COMPILED)
        else:
            measure = {"training": training_rows, "decoder": decoder_rows, "long": long_rows, "growth": growth_rows}
            measured = measure[what](clock)
        rows: list[dict] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        for row in measured:  # each is kept as soon as it is there
            rows.append(row)
            parts[what] = {"hardware": hardware(clock), "rows": rows}
            write_text(path, json.dumps({"parts": parts}, indent=1) + "\n")
            write_text(path.with_suffix(".md"), tables(parts))
        if what == "growth":
            growth_figure(rows, path.with_suffix(".png"))
    print(f"results: {path}, {path.with_suffix('.md')}")


if __name__ == "__main__":
    raise SystemExit(cli(main))
