"""What every script repeats and none is about: flags, folders, checkpoints, EMA, the loop around a training step.

A script reads like this:

    config = parse(Config, PRESETS, argv, __doc__)
    run = Run("03_temporal_layers", config)
    network = run.parallel(unet)
    for step in training_loop(run, config.steps, {"model": unet, "optimizer": optimizer, "ema": ema}):
        for share in run.shares(config.batch, "diffusion", step):
            ...clips, noise, prediction, loss: written out in the script...
            share.backward(loss)
            run.log(loss=loss)
        ...optimizer step...
    run.end_training()

Randomness is keyed, never carried: `run.generator("noise", step)` depends on the seed, the script and the step only,
so a resumed run draws what an uninterrupted one would have drawn and no random state has to be stored.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import parallel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """Something the user can put right. One line: what, where, what to do. Becomes exit code 2, without a traceback."""


# %% Config: one dataclass per script; a field's type says what it may be, the comment behind it is its --help


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be, both ends included: `lr: Annotated[float, Range(0, 10)]`. kind: "", "odd", "power of 2"."""

    low: float
    high: float
    kind: str = ""

    def __contains__(self, value: float) -> bool:
        fits = {"": True, "odd": value % 2 == 1, "power of 2": value > 0 and math.log2(value) % 1 == 0}
        return self.low <= value <= self.high and fits[self.kind]  # nan is in no range

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (f", {self.kind}" if self.kind else "")


Whole = Annotated[int, Range(0, 10**9)]
Count = Annotated[int, Range(1, 10**9)]
Factor = Annotated[int, Range(1, 64, "power of 2")]  # of a level's size to the whole
SamplingSteps = Annotated[int, Range(1, 1000)]
Spacing = Annotated[float, Range(1, 10)]  # of sampling steps: 1 even, more finer towards the data
NoiseLevel = Annotated[int, Range(0, 999)]  # a diffusion time
Beta = Annotated[float, Range(1e-6, 0.999)]
Fraction = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 10)]  # of learning
Amount = Annotated[float, Range(0, 1e20)]


@dataclasses.dataclass(kw_only=True)
class BaseConfig:
    preset: str = "cpu"  # smoke, cpu, gpu, paper or biking (the two columns of the paper's Tables 6 to 8)
    data: str = "driving"  # "driving" for the built-in scenes, or a folder of videos
    final_fps: Annotated[float, Range(0.1, 1000)] = 30.0  # final frame rate; key frames have a sixteenth of it
    out: str = ""  # results folder; default runs/PRESET-DATA
    seed: Whole = 0  # seed of everything random
    device: str = "auto"  # auto, cpu, cuda, mps
    precision: str = "auto"  # auto, float32 or bfloat16 (autocast)
    threads: Annotated[int, Range(0, 1024)] = 0  # CPU threads; 0 leaves it to torch
    save_every: Count = 500  # steps between checkpoints (one is always written at the end and on Ctrl-C)
    resume: bool = False  # go on from this script's last checkpoint
    overwrite: bool = False  # replace what the folder holds: trained weights, or what another configuration made
    dry_run: bool = False  # print configuration, parameter counts and shapes; write nothing

    def data_name(self) -> str:
        """What the data are called in folders and checkpoints; no folder passes for the built-in scenes."""
        name = Path(self.data).resolve().name
        return "driving" if self.data == "driving" else f"{name}-folder" if name == "driving" else name

    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.preset}-{self.data_name()}")


@dataclasses.dataclass(kw_only=True)
class TrainingConfig(BaseConfig):
    accumulate: Count = 1  # portions in which a process computes its share of the batch; more of them need less memory
    checkpointing: bool = False  # recompute activations in the backward pass, for less memory
    workers: Annotated[int, Range(0, 1024)] = 0  # processes that prepare the clips of the next steps
    cache_latents: bool = False  # lessons 2, 3, 5, 6, 9: encode the frames of --data once, into OUT/latents
    cuda_graphs: bool = False  # on one GPU: replay the U-Net's kernels, not launch them; what small networks wait for
    compile: bool = False  # on a GPU: compile the U-Net's training step; it begins a minute later and is faster
    device_noise: bool = False  # draw noise on the GPU: faster, but no longer the noise that a CPU draws for this seed
    reuse: Count = 1  # steps in a row that share clips, each with noise of its own: where making clips takes longest
    flops: Amount = 0.0  # with --dry-run: FLOP/s of all devices together, to print the time of the whole run


# what may differ between two runs into the same folder
RUNTIME_FIELDS = {"out", "steps", "device", "precision", "threads", "save_every", "resume", "overwrite", "dry_run",
                  "sample_boxes", "keep_captions", "accumulate", "checkpointing", "workers", "cache_latents",
                  "flops", "shard", "cuda_graphs", "compile"}


@functools.cache
def field_help(config_class: type) -> dict[str, str]:
    """{field: the comment behind it}, read from the source of the dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): .*?  # (.*)", line):
                found[match[1]] = match[2]
    return found


def preset_config(config_class: type, presets: dict[str, dict], preset: str, **overrides):
    """The configuration of a preset. An unknown name is a UserError."""
    if preset not in presets:
        raise UserError(f"--preset {preset}: this script has {', '.join(presets)}")
    return config_class(**{"preset": preset, **presets[preset], **overrides})


def parse(config_class: type, presets: dict[str, dict], argv: list[str] | None, doc: str):
    """Flags to configuration: defaults of the dataclass, overridden by the preset, overridden by the flags."""
    # allow_abbrev off: a prefix that happens to be unique today would silently mean something else tomorrow.
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    comments, shown = field_help(config_class), preset_config(config_class, presets, config_class.preset)
    for field in dataclasses.fields(config_class):
        flag, (kind, several, allowed) = "--" + field.name.replace("_", "-"), kind_of(config_class, field.name)
        notes = [str(allowed)] if allowed else []
        notes += [f"default {getattr(shown, field.name)!s}"] if getattr(shown, field.name) not in ("", None) else []
        about = f"{comments.get(field.name, '')} ({'; '.join(notes)})".replace(" ()", "").replace("%", "%%")
        options: dict = {"dest": field.name, "default": argparse.SUPPRESS, "help": about}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, tuple):
            options["choices"] = kind
        else:
            options["type"] = kind
            options |= {"nargs": "*"} if several else {}
        parser.add_argument(flag, **options)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    preset = given.pop("preset", config_class.preset)
    config = preset_config(config_class, presets, preset, **given)
    check_ranges(config)
    check_together(config)
    return config


@functools.cache
def kind_of(config_class: type, name: str) -> tuple[type | tuple, bool, Range | None]:
    """Of a field: its type or its choices, whether there may be several, and its range."""
    hint, several = typing.get_type_hints(config_class, include_extras=True)[name], False
    if typing.get_origin(hint) is tuple:
        hint, several = typing.get_args(hint)[0], True
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint), several, None
    if typing.get_origin(hint) is Annotated:
        kind, allowed = typing.get_args(hint)
        return kind, several, allowed
    return (typing.get_args(hint) or (hint,))[0], several, None  # str | None: a text that may be empty, or not given


def check_ranges(config: BaseConfig) -> None:
    """Raises UserError for a number outside of its field's range."""
    for field in dataclasses.fields(config):
        _, _, allowed = kind_of(type(config), field.name)
        value = getattr(config, field.name)
        for one in (value if isinstance(value, tuple) else (value,)) if allowed else ():
            if one not in allowed:
                raise UserError(f"--{field.name.replace('_', '-')} {one}: must be {allowed}")


def check_together(config: BaseConfig) -> None:
    """Raises UserError for settings that are each possible and not together."""
    has = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}

    def refuse(wrong: bool, *names: str, because: str) -> None:
        if wrong:
            values = (" ".join(map(str, v)) if isinstance(v := has[name], tuple) else v for name in names)
            flags = " ".join(f"--{n.replace('_', '-')} {v}" for n, v in zip(names, values, strict=True))
            raise UserError(f"{flags.strip()}: {because}")

    for name in ("multipliers", "ae_multipliers", "sweep", "seeds"):
        refuse(has.get(name) == (), name, because="give at least one")
    if "size" in has:
        refuse(len(has["size"]) != 2, "size", because="give height and width")
    if "context_shares" in has:
        wrong = len(has["context_shares"]) != 3 or abs(sum(has["context_shares"]) - 1) > 1e-6
        refuse(wrong, "context_shares", because="want three that sum to 1, for 0, 1 and 2 known frames")
    if "frames" in has and "alpha_frames" in has:
        refuse(has["alpha_frames"] not in (1, has["frames"]), "alpha_frames", "frames",
               because="alpha has one value, or one for each frame")
    if "beta_start" in has:
        refuse(has["beta_start"] > has["beta_end"], "beta_start", "beta_end", because="noise must not decrease")
    if "power" in has and has["ddim_steps"]:
        n = has["ddim_steps"]
        times = {round((k / n) ** has["power"] * 1000) for k in range(1, n + 1)} - {0}
        refuse(len(times) < n, "ddim_steps", "power", because="too many steps to be spaced so")
    if has.get("head_channels") and has.get("attention"):
        widths = [has["channels"] * m for m in has["multipliers"]]
        refuse(not has["heads"] and any(w % has["head_channels"] for w in widths), "channels", "head_channels",
               because="the width of every level must be a multiple of the heads' channels")


def cli(main: Callable[[list[str] | None], object]) -> int:
    """Runs a script's main: a UserError becomes one line and exit code 2."""
    try:
        main(None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; free some space or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nstopped; {stopped or 'checkpoints that were written stay'}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        print(f"error: out of memory ({reason}); use a higher --accumulate, --checkpointing, a lower --batch or lower "
              "resolution", file=sys.stderr)
        return 2
    return 0


# %% The run: folder, device, precision, random numbers, metrics


def keep_freed_memory() -> None:
    """Tells glibc to keep freed tensors. Otherwise over half of the time of a small step goes into page faults."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc, m_trim_threshold, m_mmap_max = ctypes.CDLL("libc.so.6"), -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU for each process of a node
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32 (AMX or AVX512-BF16 on CPUs), else float32."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--precision {name}: use auto, float32 or bfloat16")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if device.type == "cpu" else ()
    fast = any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return torch.bfloat16 if fast else torch.float32


def one_process(what: str) -> None:
    """Raises UserError under torchrun with several processes: they would all do the same work and write over it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{what} is work for one process; start it with python instead of torchrun")


class Run:
    """One script's folder OUT/NN_name[-variant], its device and precision, its random numbers and its metrics.

    Raises UserError when the folder was made by another configuration and neither --resume nor --overwrite is given.
    """

    def __init__(self, name: str, config: BaseConfig, variant: str = "") -> None:
        self.name, self.config = name, config
        self.folder = config.folder() / (f"{name}-{variant}" if variant else name)
        keep_freed_memory()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = pick_device(config.device)
        self.rank, self.processes = parallel.join(self.device)
        self.told: set[Path] = set()  # shipped weights that were named already
        self.networks: list[nn.Module] = []  # what gradients are exchanged for
        self.not_finite = False  # a loss of this step was not
        self.dtype = pick_dtype(config.precision, self.device)
        self.numbers: dict[str, dict] = {}
        self.metrics, self.last_row = self.folder / "metrics.csv", {}
        self.logged: dict[str, list[torch.Tensor]] = {}  # of the current step
        try:
            self._claim_folder()
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --out") from None
        if self.rank == 0:
            others = f", {self.processes} processes" if self.processes > 1 else ""
            print(f"{name}: {self.folder}, {self.device.type}, {str(self.dtype).removeprefix('torch.')}{others}",
                  flush=True)

    def _claim_folder(self) -> None:
        mine = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in RUNTIME_FIELDS}
        mine = json.loads(json.dumps(mine))
        path = self.folder / "config.json"
        made = path.exists() and any(p.name not in ("config.json", "env.txt", "lock") for p in self.folder.iterdir())
        if made and not (self.config.resume or self.config.overwrite):
            try:
                theirs = json.loads(path.read_text())
            except ValueError:
                raise UserError(f"{path} is damaged; use --overwrite to start this folder anew") from None
            changed = [k for k in mine if k in theirs and theirs[k] != mine[k]]
            if changed:
                what = ", ".join(f"{k} {theirs[k]} -> {mine[k]}" for k in changed[:3])
                raise UserError(f"{self.folder} was made with another configuration ({what}): --overwrite or --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank:
            return  # only the first process writes
        lock(self.folder)
        write_text(path, json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")
        lines = [f"python {platform.python_version()}", f"torch {torch.__version__}", platform.platform()]
        lines += [f"device {self.device}", f"precision {self.dtype}", f"threads {torch.get_num_threads()}"]
        lines += ["command " + " ".join(sys.argv)]
        write_text(self.folder / "env.txt", "\n".join(lines) + "\n")

    def built_on(self, lesson: str) -> Path:
        """The folder of a lesson that this one builds on: in OUT, or, where OUT has no image model of its own (and so
        nothing that could be built on another), in checkpoints/, trained longer than a course can be."""
        own, shipped = self.config.folder() / lesson, CHECKPOINTS / lesson
        begun = own.exists() or (self.config.folder() / "02_image_ldm").exists()
        if begun or self.config.preset != "cpu" or self.config.data != "driving" or not shipped.exists():
            return own
        if shipped not in self.told:
            self.told.add(shipped)
            print(f"{self.config.folder()} has no {lesson}: taking the shipped one, {shipped}", flush=True)
        return shipped

    def generator(self, *key: object) -> torch.Generator:
        """A CPU generator that depends on (seed, script, key) only. Noise is drawn on the CPU on every device."""
        digest = hashlib.blake2b(repr((self.config.seed, self.name, *key)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def noise(self, shape: torch.Size | tuple[int, ...], *key: object) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.generator(*key)).to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def shares(self, batch: int, *key: object) -> Iterator[parallel.Share]:
        """This process's share of a step's batch, in --accumulate portions; random numbers are keyed as `generator`'s.

        Raises UserError when the batch cannot be divided: unequal shares would weigh samples unequally.
        """
        portions = getattr(self.config, "accumulate", 1)
        if batch % (self.processes * portions):
            raise UserError(f"a batch of {batch} cannot be divided among {self.processes} processes "
                            f"with --accumulate {portions}; change --batch or --accumulate")
        rows = list(parallel.divide(batch, self.rank, self.processes, portions))
        for portion in rows:
            for network in self.networks:
                parallel.synchronise(network, portion is rows[-1])

            def backward(loss: torch.Tensor) -> None:
                # A loss that is not finite would spoil the weights; without gradients they stay, and the step can be
                # looked at (see training_loop). All processes have to leave the backward pass out together.
                finite = torch.isfinite(loss.detach()).float()
                self.not_finite |= not bool(parallel.average([finite])[0] == 1)
                if not self.not_finite:
                    (loss / portions).backward()

            draw, noise = self.generator(*key), None
            if getattr(self.config, "device_noise", False):
                noise = torch.Generator(self.device).manual_seed(draw.initial_seed())
            yield parallel.Share(portion, batch, draw, self.device, backward, noise)

    def parallel(self, module: nn.Module, method: str = "__call__", shard: bool = False) -> Callable:
        """How to call a module (or a method of it) in training, so that its gradients are those of all processes.

        shard: cut the weights up as well, in place; before the optimizer and the average are made.
        """
        use_checkpointing(module, self.config)
        recorded, compiled = (getattr(self.config, flag, False) for flag in ("cuda_graphs", "compile"))
        if recorded and (self.device.type != "cuda" or self.processes > 1 or self.config.accumulate > 1 or shard):
            raise UserError("--cuda-graphs wants one process on one GPU, without --accumulate and --shard")
        if compiled and self.device.type != "cuda":
            raise UserError("--compile wants a GPU; on CPUs compiled training steps are slower")
        if recorded or compiled:
            for part in module.modules():
                if hasattr(part, "checkpointing"):
                    parallel.hasten(part, compiled, recorded)
        if self.processes == 1:
            return getattr(module, method)
        network = (parallel.shard(module, self.device) if shard else
                   parallel.replicate(module, method, self.device))
        self.networks.append(network)
        return network

    def end_training(self) -> None:
        """Behind it only the first process goes on: sampling and figures are work for one."""
        if self.processes > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            if self.rank:
                raise SystemExit(0)
            self.processes = 1

    def log(self, **values: float | torch.Tensor) -> None:
        """Numbers for the current step's row of the metrics file: their mean over the shares of all processes."""
        for name, value in values.items():
            self.logged.setdefault(name, []).append(torch.as_tensor(value).detach().float())

    def end_step(self, step: int, stopped_by: int) -> int:
        """Writes the row. Returns the signal that stopped any of the processes, or 0."""
        means = [torch.stack([value.to(self.device) for value in values]).mean() for values in self.logged.values()]
        *means, stop = parallel.average([*means, torch.tensor(float(stopped_by), device=self.device)])
        row = {name: float(mean) for name, mean in zip(self.logged, means, strict=True)}
        self.logged = {}
        for name, value in row.items():
            if value != value or abs(value) == float("inf"):
                raise UserError(f"{self.name}: {name} is {value} at step {step}; lower --lr (the last save is kept)")
        if row and self.rank == 0:
            new = not self.metrics.exists()
            with self.metrics.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", *row])
                writer.writerow([step, *(f"{value:.6g}" for value in row.values())])
        self.last_row = row or self.last_row
        return round(float(stop) * self.processes) and (stopped_by or signal.SIGTERM)

    def report(
        self, name: str, value: float, unit: str = "", at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """Prints one of the stage's numbers beside its goal and keeps it in numbers.json."""
        goal, met = "", True
        if self.config.preset == "smoke":  # a few steps prove that it runs, not that it learns
            at_least = at_most = None
        if at_least is not None:
            goal, met = f"at least {at_least:g}", value >= at_least
        if at_most is not None:
            goal, met = f"{goal} and at most {at_most:g}".removeprefix(" and "), met and value <= at_most
        self.numbers[name] = {"value": value, "unit": unit, "goal": goal, "met": bool(met)}
        verdict = f"   ({goal}: {'met' if met else 'MISSED'})" if goal else ""
        print(f"{name}: {value:.4g} {unit}".rstrip() + verdict, flush=True)
        write_text(self.folder / "numbers.json", json.dumps(self.numbers, indent=1) + "\n")


LOCKS: dict[Path, typing.IO] = {}  # of this process; the system releases them when it ends, however it ends


def lock(folder: Path) -> None:
    """Keeps other processes out of a folder. Raises UserError when one is in it. (Not on Windows.)"""
    path = folder.resolve() / "lock"
    if fcntl is None or path in LOCKS:
        return
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run; wait for it, or choose another --out") from None
    except OSError:
        return  # some network file systems have no locks
    LOCKS[path] = file


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def fingerprint(path: Path) -> str:
    """Of a file's or folder's content, cheaply: names inside, sizes, and three samples of the bytes of each."""
    digest = hashlib.sha256()
    for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
        size = file.stat().st_size
        digest.update(repr((file.relative_to(path).as_posix(), size)).encode())
        with file.open("rb") as opened:
            for start in (0, size // 2, max(0, size - 2**16)):
                opened.seek(start)
                digest.update(opened.read(2**16))
    return digest.hexdigest()[:16]


EXPECTED = Path(__file__).parent.parent / "docs" / "expected"


def known_good(run: Run, presets: dict[str, dict]) -> None:
    """Says whether a run with the default flags came out as ours did: losses and numbers of docs/expected/NN.csv.

    Rows are preset, file ("metrics.csv" and the like, or "numbers"), name, step, value, tolerance; a loss is averaged
    over the 50 steps before `step`. Made by docs/collect.py. Other flags than the preset's have no expectation.
    """
    path, default = EXPECTED / f"{run.name[:2]}.csv", preset_config(type(run.config), presets, run.config.preset)
    if not path.exists() or any(
        getattr(run.config, f.name) != getattr(default, f.name)
        for f in dataclasses.fields(default) if f.name == "steps" or f.name not in RUNTIME_FIELDS
    ):
        return
    rows = [row for row in csv.DictReader(path.open()) if row["preset"] == run.config.preset]
    outside = []
    for row in rows:
        if row["file"] == "numbers":
            found = run.numbers.get(row["name"], {}).get("value")
        else:
            found = mean_before(run.folder / row["file"], row["name"], int(row["step"]))
        expected, tolerance = float(row["value"]), float(row["tolerance"])
        if found is None or not abs(found - expected) <= tolerance:
            where = f" at step {row['step']}" if row["step"] else ""
            outside.append(f"{row['name']}{where} is {found if found is None else f'{found:.4g}'}, "
                           f"expected {expected:.4g} +- {tolerance:.2g}")
    if rows:
        print(f"known-good: {len(rows) - len(outside)} of {len(rows)} values are as expected ({path.name})")
    for line in outside:
        print(f"  outside: {line}")


def mean_before(path: Path, name: str, step: int, window: int = 50) -> float | None:
    """Mean of a column of a metrics file over the `window` steps before `step`; None where it has no such rows."""
    if not path.exists():
        return None
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if step - window <= int(row["step"]) < step]
    values = [float(row[name]) for row in rows if row.get(name)]
    return sum(values) / len(values) if values else None


# %% Checkpoints

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"  # small trained weights, made by docs/pack.py; an OUT


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes tensors and primitives to a temporary file beside `path` and renames it: never half a checkpoint."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; the one saved before is untouched") from None
    finally:
        Path(part).unlink(missing_ok=True)


def load_checkpoint(path: Path, made_by: str) -> dict:
    """Reads a checkpoint onto the CPU. `made_by` is the command that makes it, for the error when it is missing."""
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises five kinds of exception for a broken file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); make it anew with: {made_by}") from None
    if not isinstance(content, dict) or "config" not in content:
        raise UserError(f"{path} is not a checkpoint of this project; make it anew with: {made_by}")
    return content


def config_of(config_class: type, content: dict):
    """The configuration a checkpoint was trained with (torch.save keeps tuples; json would not).

    Raises UserError for settings that this version of the script does not have: they may have shaped the weights.
    """
    unknown = content["config"].keys() - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        lesson = Path(inspect.getfile(config_class)).stem
        names = ", ".join(sorted(unknown))
        raise UserError(f"the checkpoint of {lesson} was made by another version of it, with {names} among its "
                        f"settings; make it anew with {lesson}.py --overwrite")
    return config_class(**content["config"])


def command(script: str, config: BaseConfig, *flags: str) -> str:
    """The command line that makes a predecessor's checkpoint in the same OUT, to be pasted."""
    parts = ["python", f"{script}.py", "--preset", config.preset]
    parts += ["--data", config.data] if config.data != "driving" else []
    parts += ["--final-fps", f"{config.final_fps:g}"] if config.final_fps != 30 else []
    parts += ["--out", config.out] if config.out else []
    return shlex.join([*parts, *flags])


def check_lineage(content: dict, lineage: dict, path: Path, remedy: str) -> None:
    """A checkpoint trained on other data, another size or another autoencoder than its neighbours is a UserError."""
    theirs = content.get("lineage", {})
    for name, value in lineage.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{path} was trained with {name} {theirs.get(name)}, this run has {value}; "
                f"make it anew with: {remedy} --overwrite"
            )


def is_temporal(name: str) -> bool:
    """Whether a parameter belongs to a temporal layer (`time_embed` is the diffusion time, and spatial)."""
    return re.search(r"time_(stack|mixer|pos_embed|context|mix_conv)|(^|\.)mix_factor", name) is not None


def count(module: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if keep(name))


def dry_run(config: BaseConfig, models: dict[str, nn.Module], shapes: dict[str, object]) -> None:
    """Prints `name: value` rows: the resolved configuration, parameter counts, shapes at the stage's borders."""
    for name, value in dataclasses.asdict(config).items():
        print(f"{name}: {value}")
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        spatial, temporal = count(model, lambda n: not is_temporal(n)), count(model, is_temporal)
        print(f"{name} parameters: {spatial + temporal}\n{name} spatial: {spatial}\n{name} temporal: {temporal}")
        print(f"{name} trained: {trained}\n{name} frozen: {spatial + temporal - trained}")
    for name, shape in shapes.items():
        print(f"{name}: {tuple(shape) if isinstance(shape, torch.Size) else shape}")


def use_checkpointing(module: nn.Module, config: BaseConfig) -> None:
    """--checkpointing, in every U-Net that a module consists of."""
    for part in module.modules():
        if hasattr(part, "checkpointing"):
            part.checkpointing = getattr(config, "checkpointing", False)


def training_cost(config: TrainingConfig, name: str, module: nn.Module, forward: Callable[[], torch.Tensor], batch: int,
                  steps: int) -> None:
    """More rows for --dry-run: FLOPs and memory of a training step, counted on the meta device; with --flops, the time.

    forward: a forward pass of one sample (clip) of the batch. What is computed without gradients, as latents are, does
    not count, nor what --checkpointing computes again. Weights, gradients, AdamW's moments and the moving average count
    in float32, what the backward pass keeps in bfloat16 (a frozen network could keep its weights so as well, which
    would save more).
    """
    use_checkpointing(module, config)
    own, kept = {p.untyped_storage()._cdata for p in module.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward()
        activations = sum(storage.nbytes() for storage in kept.values()) // 2
        output.sum().backward()
    weights = 4 * count(module)
    trained = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    flops = counter.get_total_flops() * batch
    print(f"{name} FLOPs per training step: {flops:.4g}")
    if config.flops:
        hours = flops * steps / config.flops / 3600
        print(f"{name} time of {steps} steps at {config.flops:.3g} FLOP/s: {hours:.3g} h")
    print(f"{name} memory, weights: {weights / 2**30:.2f} GiB")
    print(f"{name} memory, gradients, AdamW and moving average: {4 * trained / 2**30:.2f} GiB")
    print(f"{name} memory, activations of one sample: {activations / 2**30:.2f} GiB")


# %% EMA and the loop


class EMA:
    """Exponential moving average of the trained parameters: decay min(decay, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights; afterwards the trained ones again."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.use()
        try:
            yield
        finally:
            self._copy(trained)

    def use(self) -> None:
        """Gives the module the averaged weights for good."""
        self._copy(self.shadow)

    @torch.no_grad()
    def _copy(self, values: dict[str, torch.Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def state_dict(self) -> dict:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        for name, value in self.shadow.items():
            value.copy_(parallel.placed_like(state["shadow"][name], value))
        self.updates = state["updates"]


def trained_state(part: nn.Module | torch.optim.Optimizer | EMA) -> dict:
    """What a checkpoint keeps of a part: of a module only what is trained (frozen weights live with their owner)."""
    if not isinstance(part, nn.Module):
        return part.state_dict()
    trained = {name for name, p in part.named_parameters() if p.requires_grad}
    return {name: v for name, v in part.state_dict().items() if name in trained or name in dict(part.named_buffers())}


def load_part(part: nn.Module | torch.optim.Optimizer | EMA, state: dict, where: Path) -> None:
    """The inverse of `trained_state`. Any missing, unexpected or wrongly shaped name is a UserError."""
    try:
        if isinstance(part, nn.Module):
            own = part.state_dict()
            state = {name: parallel.placed_like(value, own.get(name, value)) for name, value in state.items()}
            missing = set(trained_state(part)) - set(state)
            unexpected = part.load_state_dict(state, strict=False).unexpected_keys
            if missing or unexpected:
                names = ", ".join(sorted([*missing, *unexpected])[:3])
                raise UserError(
                    f"{where} does not fit this network: {len(missing)} names missing, "
                    f"{len(unexpected)} unexpected ({names}, ...); train again with --overwrite"
                )
        else:
            part.load_state_dict(state)
            if isinstance(part, torch.optim.Optimizer):
                for p, moments in part.state.items():
                    moments.update({name: parallel.placed_like(value, p) for name, value in moments.items()})
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"{where} does not fit this network ({str(error).strip().splitlines()[-1].strip()}); "
            "train again with --overwrite"
        ) from None


def training_loop(run: Run, steps: int, parts: dict, extra: dict | None = None, file: str = "checkpoint.pt",
                  metrics: str = "metrics.csv") -> Iterator[int]:
    """Yields step numbers; around them it resumes, saves, shows progress and answers Ctrl-C and SIGTERM.

    parts: modules, optimizers and EMA by name, restored with --resume and saved every `save_every` steps, at the last
    step and when stopped; extra: tensors and primitives to keep in the checkpoint as they are at that moment. After a
    loss that is not finite the same step comes once more, watched, and ends in a UserError that names the layer.
    """
    path, start, stopped_by = run.folder / file, 0, []
    extra, run.metrics, run.last_row, run.logged = {} if extra is None else extra, run.folder / metrics, {}, {}

    def save(done: int) -> None:
        config = dataclasses.asdict(run.config)
        state = {name: parallel.whole(trained_state(part)) for name, part in parts.items()}
        if run.rank == 0:
            save_checkpoint(path, {"script": run.name, "step": done, "config": config, **extra, **state})
        if run.processes > 1:
            torch.distributed.barrier()  # the others may read it next

    if path.exists() and not (run.config.resume or run.config.overwrite):
        raise UserError(f"{path} holds what was trained before: --resume goes on with it, --overwrite replaces it")
    if run.config.resume and path.exists():
        content = load_checkpoint(path, "the same command without --resume")
        for name, part in parts.items():
            load_part(part, content.get(name, {}), path)
        start = content["step"]
        extra.update({k: v for k, v in content.items() if k not in (*parts, "script", "step", "config")})
    if run.rank == 0:
        keep_rows_before(run.metrics, start)
        for part in run.folder.glob(f"{file}*.part"):
            part.unlink()  # of a run that was killed while it saved
    previous = {}
    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda caught, _: stopped_by.append(caught))
    try:
        bar = tqdm(range(start, steps), initial=start, total=steps, desc=file.removesuffix(".pt"), mininterval=1.0,
                   disable=run.rank > 0)
        for step in bar:
            yield step
            if run.not_finite:
                with watched(parts, f"{run.name}, step {step}"):
                    yield step  # the same clips and noise once more, to see where it begins
                raise UserError(f"{run.name}, step {step}: the loss is not finite; lower --lr (the last save is kept)")
            stop = run.end_step(step, stopped_by[0] if stopped_by else 0)
            bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in run.last_row.items()), refresh=False)
            if stop or step + 1 == steps or (step + 1) % run.config.save_every == 0:
                save(step + 1)
            if stop:
                print(f"\nstopped at step {step + 1}, saved in {path}; go on with --resume", file=sys.stderr)
                raise SystemExit(128 + stop)
        if not path.exists() or (steps == 0 and start == 0):
            save(start)  # --steps 0: there is always a checkpoint
    finally:
        run.networks = []
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watched(parts: dict, where: str) -> Iterator[None]:
    """Inside, the first layer whose output is not finite is a UserError that names it."""

    def hook(name: str) -> Callable:
        def look(layer: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                raise UserError(f"{where}: the loss is not finite; the first layer with such an output is {name} "
                                f"({type(layer).__name__}); lower --lr (the last save is kept)")

        return look

    handles = [layer.register_forward_hook(hook(f"{part}.{name}".rstrip("."))) for part, module in parts.items()
               if isinstance(module, nn.Module) for name, layer in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_rows_before(path: Path, step: int) -> None:
    """Drops the rows of metrics.csv that a resumed run will write again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if not line[0].isdigit() or int(line.split(",")[0]) < step))


def channels_last(module: nn.Module) -> nn.Module:
    """Puts the weights of 2D convolutions in the memory format that CPUs and tensor cores are fastest with."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)
    return module


def adamw(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with torch's defaults (the paper names no optimizer; LDM's code uses this)."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, fused=True)


def clip_and_warm_up(optimizer: torch.optim.Optimizer, step: int, lr: float, warmup: int, steady: int = 0) -> None:
    """Clips the gradient norm to 1 and sets the rate: linear warm-up, then `lr`, and after `steady` steps (0: never)
    lr * sqrt(steady / step). Nothing here depends on the total of steps.

    Raises UserError for gradients that are not finite: one step with them would spoil the weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / max(1, warmup), (steady / (step + 1)) ** 0.5 if steady else 1.0)
        norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
        if not torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm):
            raise UserError(f"step {step}: the gradients are not finite; lower --lr (the last save is kept)")
