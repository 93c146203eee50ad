"""One run of a script: its folder, device, precision, random numbers, metrics and reported numbers.

Randomness is keyed, never carried: `run.generator("noise", step)` depends on the seed, the script and the step only,
so a resumed run draws what an uninterrupted one would have drawn and no random state has to be stored.
"""

import contextlib
import csv
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from kit import parallel
from kit.data import fingerprint
from kit.errors import UserError, note
from kit.files import CHECKPOINTS, check_lineage, command, load_checkpoint, lock, write_text
from kit.flags import BaseConfig, preset_config


def keep_freed_memory() -> None:
    """Tells glibc to keep freed tensors. Otherwise over half of the time of a small step goes into page faults."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc, m_trim_threshold, m_mmap_max = ctypes.CDLL("libc.so.6"), -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def pick_device(name: str) -> torch.device:
    """auto: a CUDA GPU, or else the CPU. Apple's (mps) has to be asked for: nobody has run this there, and torch has
    had channels-last layers that crash on it and fused optimizers that pass over `found_inf` (140902, 186360)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps":
        note("--device mps: not tried by us; compare a short run with --device cpu before you trust it")
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


def use_checkpointing(module: nn.Module, config: BaseConfig) -> None:
    """--checkpointing, in every U-Net that a module consists of."""
    for part in module.modules():
        if hasattr(part, "checkpointing"):
            part.checkpointing = getattr(config, "checkpointing", False)


class NotFinite(Exception):
    """A step's loss or gradients are not finite. Its optimizers have left the weights as they were."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: the {what} not finite")
        self.step = step


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
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN: docs/cluster.md
        self.late = int(self.device.type == "cuda")  # so many steps after its end a step's numbers are read
        self.rank, self.processes = parallel.join(self.device)
        self.told: set[Path] = set()  # shipped weights that were named already
        self.networks: list[nn.Module] = []  # what gradients are exchanged for
        self.finite: list[torch.Tensor] = []  # whether each loss of this step was, 1 or 0
        self.unread: list[tuple] = []  # steps whose numbers are on their way from the device
        self.dtype = pick_dtype(config.precision, self.device)
        self.numbers: dict[str, dict] = {}
        self.data = "" if config.data == "driving" else fingerprint(Path(config.data).expanduser())
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
        mine = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in self.config.free}
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

    def trained(self, lesson: str, lineage: dict | None = None, file: str = "checkpoint.pt", variant: str = "",
                flags: Sequence[str] = ()) -> dict:
        """The content of what a lesson has trained, in OUT or shipped, checked to be of this lineage; and its path.

        variant: of the lesson's folder; flags: more of the command that makes it, for the errors. Raises UserError.
        """
        path = self.built_on(f"{lesson}-{variant}" if variant else lesson) / file
        remedy = command(lesson, self.config, *flags)
        content = load_checkpoint(path, remedy) | {"path": path, "remedy": remedy}
        if (theirs := content.get("data", self.data)) != self.data:
            note(f"--data {self.config.data} holds other files ({self.data}) than {lesson} was trained on ({theirs})")
        check_lineage(content, lineage or {})
        return content

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
                self.finite.append(torch.isfinite(loss.detach()).float())  # read when the step has ended
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

    def end_step(self, step: int, stopped_by: int, gradients: Sequence[torch.Tensor] = ()) -> int:
        """Sends the step's numbers off to its row. gradients: 1 for each optimizer whose gradients were not finite.

        Nothing before this waits for the device, and a GPU's numbers are read one step later, while it computes on.
        Returns the signal that stopped any of the processes, or 0. Raises what `read_step` does.
        """
        means = [torch.stack([value.to(self.device) for value in values]).mean() for values in self.logged.values()]
        zero = torch.zeros((), device=self.device)
        spoilt = [torch.stack([zero, *(1 - finite for finite in self.finite)]).amax(),
                  torch.stack([zero, *(bad.to(self.device) for bad in gradients)]).amax()]
        values = torch.stack(parallel.average([*means, zero + float(stopped_by > 0), *spoilt]))
        on_gpu = self.device.type == "cuda"
        values = values.to("cpu", non_blocking=on_gpu)
        arrived = torch.cuda.current_stream().record_event() if on_gpu else None
        self.unread.append((step, list(self.logged), values, arrived))
        self.logged, self.finite = {}, []
        stop = len(self.unread) > self.late and self.read_step()
        return stop and (stopped_by or signal.SIGTERM)

    def read_step(self) -> bool:
        """Writes the row of the oldest step that was not read yet. Returns whether a process was told to stop then.

        Raises NotFinite for a loss or gradients that were not, UserError for another number that was not.
        """
        step, names, values, arrived = self.unread.pop(0)
        if arrived is not None:
            arrived.synchronize()
        *means, stop, loss, gradients = values.tolist()
        if loss or loss != loss:
            raise NotFinite(step, "loss is")
        if gradients or gradients != gradients:
            raise NotFinite(step, "gradients are")
        row = dict(zip(names, means, strict=True))
        for name, value in row.items():
            if not math.isfinite(value):
                raise UserError(f"{self.name}: {name} is {value} at step {step}; lower --lr (the last save is kept)")
        if row and self.rank == 0:
            new = not self.metrics.exists()
            with self.metrics.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", *row])
                writer.writerow([step, *(f"{value:.6g}" for value in row.values())])
        self.last_row = row or self.last_row
        return stop > 0

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


EXPECTED = Path(__file__).parent.parent / "docs" / "expected"


def known_good(run: Run, presets: dict[str, dict]) -> None:
    """Says whether a run with the default flags came out as ours did: losses and numbers of docs/expected/NN.csv.

    Rows are preset, file ("metrics.csv" and the like, or "numbers"), name, step, value, tolerance; a loss is averaged
    over the 50 steps before `step`. Made by docs/collect.py. Other flags than the preset's have no expectation. What
    stands on shipped weights is another run than in a course from nothing: its rows have the preset "cpu, shipped".
    """
    path, default = EXPECTED / f"{run.name[:2]}.csv", preset_config(type(run.config), presets, run.config.preset)
    if not path.exists() or any(
        getattr(run.config, f.name) != getattr(default, f.name)
        for f in dataclasses.fields(default) if f.name == "steps" or f.name not in default.free
    ):
        return
    preset = run.config.preset + ", shipped" * bool(run.told)
    rows = [row for row in csv.DictReader(path.open()) if row["preset"] == preset]
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
