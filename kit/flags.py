"""Settings: one dataclass a script. A field's type says what it may be, the comment behind it is its --help."""

import argparse
import dataclasses
import functools
import inspect
import math
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from kit.data import look_into, usual_rate
from kit.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be, both ends included: `lr: Annotated[float, Range(0, 10)]`. kind: "", "odd", "power of 2".

    auto: 0, written "auto", is allowed as well and means that the program chooses.
    """

    low: float
    high: float
    kind: str = ""
    auto: bool = False

    def __contains__(self, value: float) -> bool:
        if self.auto and value == 0:
            return True
        fits = {"": True, "odd": value % 2 == 1, "power of 2": value > 0 and math.log2(value) % 1 == 0}
        return self.low <= value <= self.high and fits[self.kind]  # nan is in no range

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (f", {self.kind}" if self.kind else "") + ", or auto" * self.auto


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
    """What every script has. `free` names the fields that may differ between two runs into the same folder."""

    free = frozenset({"out", "steps", "device", "precision", "threads", "save_every", "resume", "overwrite", "dry_run"})

    preset: str = "cpu"  # smoke, cpu, gpu, paper or biking (the two columns of the paper's Tables 6 to 8)
    data: str = "driving"  # "driving" for the built-in scenes, or a folder of videos
    # key frames have a sixteenth of it, the first interpolation pass leads to a quarter
    final_fps: Annotated[float, Range(0.1, 1000, auto=True)] = 0.0  # final frame rate; auto: 30, or that of most videos
    out: str = ""  # results folder; default runs/PRESET-DATA
    seed: Whole = 0  # seed of everything random
    device: str = "auto"  # cpu, cuda or mps (Apple's, not tried); auto: cuda where there is one, else cpu
    precision: str = "auto"  # auto, float32 or bfloat16 (autocast)
    threads: Annotated[int, Range(0, 1024)] = 0  # CPU threads; 0 leaves it to torch
    save_every: Count = 500  # steps between checkpoints (one is always written at the end and on Ctrl-C)
    resume: bool = False  # go on from this script's last checkpoint
    overwrite: bool = False  # replace what the folder holds: trained weights, or what another configuration made
    dry_run: bool = False  # print configuration, parameter counts and shapes; write nothing

    def __post_init__(self) -> None:
        if not self.final_fps and self.data == "driving":
            self.final_fps = 30.0

    def data_name(self) -> str:
        """What the data are called in folders and checkpoints; no folder passes for the built-in scenes."""
        name = Path(self.data).resolve().name
        return "driving" if self.data == "driving" else f"{name}-folder" if name == "driving" else name

    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.preset}-{self.data_name()}")


@dataclasses.dataclass(kw_only=True)
class TrainingConfig(BaseConfig):
    """What every script that trains has as well."""

    free = BaseConfig.free | {"accumulate", "checkpointing", "workers", "cache_latents", "flops", "cuda_graphs",
                              "compile"}

    accumulate: Count = 1  # portions in which a process computes its share of the batch; more of them need less memory
    checkpointing: bool = False  # recompute activations in the backward pass, for less memory
    workers: Annotated[int, Range(0, 1024)] = 0  # processes that prepare the clips of the next steps
    cache_latents: bool = False  # lessons 2, 3, 5, 6, 9: encode the frames of --data once, into OUT/latents
    cuda_graphs: bool = False  # on one GPU: replay the U-Net's kernels, not launch them; what small networks wait for
    compile: bool = False  # on a GPU: compile the U-Net's training step; it begins a minute later and is faster
    device_noise: bool = False  # draw noise on the GPU: faster, but no longer the noise that a CPU draws for this seed
    reuse: Count = 1  # steps in a row that share clips, each with noise of its own: where making clips takes longest
    flops: Amount = 0.0  # with --dry-run: FLOP/s of all devices together, to print the time of the whole run


@functools.cache
def field_help(config_class: type) -> dict[str, str]:
    """{field: the comment behind it}, read from the source of the dataclass and its bases (a notebook's has none)."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        source = inspect.getsource(base) if hasattr(sys.modules[base.__module__], "__file__") else ""
        for line in source.splitlines():
            if match := re.match(r"    (\w+): .*?  # (.*)", line):
                found[match[1]] = match[2]
    return found


def preset_config(config_class: type, presets: dict[str, dict], preset: str, **overrides):
    """The configuration of a preset. An unknown name is a UserError."""
    if preset not in presets:
        raise UserError(f"--preset {preset}: this script has {', '.join(presets)}")
    return config_class(**{"preset": preset, **presets[preset], **overrides})


def parse(config_class: type, presets: dict[str, dict] | Callable[[dict], dict[str, dict]], argv: list[str] | None,
          doc: str):
    """Flags to configuration: defaults of the dataclass, overridden by the preset, overridden by the flags.

    presets: by name; or what gives them, for the flags that were given.
    """
    presets_for = presets if callable(presets) else lambda given: presets
    # allow_abbrev off: a prefix that happens to be unique today would silently mean something else tomorrow.
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # to show the defaults of the preset asked for
    early.add_argument("--preset", default=config_class.preset)
    named, comments = early.parse_known_args(argv)[0].preset, field_help(config_class)
    shown = preset_config(config_class, presets_for({}), named)
    parser.epilog = f"defaults are those of --preset {named}; --preset NAME --help shows those of another"
    groups = {base: parser.add_argument_group(title) for base, title in
              ((config_class, "of this script"), (TrainingConfig, "of training"), (BaseConfig, "of every script"))}
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
            options["type"] = number_or_auto if allowed and allowed.auto else kind
            options |= {"nargs": "*"} if several else {}
        home = next(base for base in (BaseConfig, TrainingConfig, config_class)
                    if field.name in getattr(base, "__dataclass_fields__", ()))
        groups[home].add_argument(flag, **options)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    preset = given.pop("preset", config_class.preset)
    config = preset_config(config_class, presets_for(given), preset, **given)
    check_ranges(config)
    check_together(config)
    if config.data != "driving" and (config.dry_run or not config.final_fps):
        recordings = look_into(Path(config.data).expanduser(), config.final_fps or 30.0)
        if not config.final_fps:
            config.final_fps = usual_rate(recordings)
            print(f"--final-fps {config.final_fps:g}, the rate that most minutes of {config.data} have")
    return config


def number_or_auto(text: str) -> float:
    return 0.0 if text == "auto" else float(text)


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
