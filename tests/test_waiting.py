"""No step of training waits for the device: nothing that comes from weights is read before the step has ended.

On a GPU every such read (`.item()`, `float(loss)`, `if norm > 1`, a boolean mask) keeps it idle until the CPU has sent
the next kernels. Here the CPU is the device, so a watcher follows what is computed from weights through all operations.
"""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from common.loop import Learner, training_loop
from kit.errors import UserError
from kit.flags import TrainingConfig, preset_config
from kit.run import Run

ROOT = Path(__file__).parent.parent
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")


class Watcher(TorchDispatchMode):
    """Keeps the places in the project where a value that depends on weights is read while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.computed, self.places = False, WeakIdKeyDictionary(), []

    def follow(self, tensors: Iterator[torch.Tensor]) -> None:
        for tensor in tensors:
            self.computed[tensor] = True

    def __torch_dispatch__(self, func: Callable, types: list, args: tuple = (), kwargs: dict | None = None) -> object:
        inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        known = any(isinstance(v, torch.nn.Parameter) or v in self.computed for v in inputs)
        if known and self.on and func.overloadpacket.__name__ in READS:
            frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in (ROOT, ROOT / "common",
                                                                                          ROOT / "kit", ROOT / "extra")]
            self.places.append(f"{Path(frames[-1].filename).name}, {frames[-1].name}, line {frames[-1].lineno}")
        result = func(*args, **(kwargs or {}))
        if known:
            self.follow(v for v in tree_leaves(result) if isinstance(v, torch.Tensor))
        return result


class Trained(Exception):
    """Training is over; what follows may read what it likes."""


def reads_of(monkeypatch: pytest.MonkeyPatch, lesson: str, *flags: object) -> tuple[list[str], int]:
    """Where a lesson's steps read what was computed, and how many steps were watched."""
    watcher, ends, shares, steps = Watcher(), Run.end_step, Run.shares, []

    def noted(name: str) -> Callable:  # on a CPU these take a tensor's memory without asking for an operation
        read = getattr(torch.Tensor, name)

        def reading(tensor: torch.Tensor, *args: object) -> object:
            if watcher.on and tensor in watcher.computed:
                watcher.places.append(f"{name} in {traceback.extract_stack()[-2].name}")
            return read(tensor, *args)

        return reading

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, noted(name))

    def begin(run: Run, *args: object) -> Iterator:
        watcher.on = True
        yield from shares(run, *args)

    def end(run: Run, *args: object) -> int:
        watcher.on = False
        steps.append(args[0])
        return ends(run, *args)

    def over(run: Run) -> None:
        raise Trained

    monkeypatch.setattr(Run, "shares", begin)
    monkeypatch.setattr(Run, "end_step", end)
    monkeypatch.setattr(Run, "end_training", over)
    with watcher, pytest.raises(Trained):
        import_module(lesson).main(["--preset", "smoke", *map(str, flags)])
    return watcher.places, len(steps)


LESSONS = [("02_image_ldm",), ("02_image_ldm", "--condition", "text"), ("03_temporal_layers",),
           ("04_decoder_finetune",), ("05_prediction",), ("06_interpolation",), ("07_upsampler",),
           ("09_text_to_video",), ("10_personalization",), ("11_latent_upsampler",)]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("waiting")


@pytest.mark.parametrize("lesson", LESSONS, ids=" ".join)
def test_no_step_waits(lesson: tuple[str, ...], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: each builds on what the ones before it left in OUT. The scale of the latents is measured once."""
    places, steps = reads_of(monkeypatch, *lesson, "--out", out)
    assert steps >= 3 and [place for place in places if ", measure_scale, " not in place] == []


def test_a_read_is_found(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Run.log
    monkeypatch.setattr(Run, "log", lambda run, **values: log(run, **{k: float(v) for k, v in values.items()}))
    places, _ = reads_of(monkeypatch, "03_temporal_layers", "--out", out, "--overwrite")
    assert len(places) >= 3 and all(place.startswith("03_temporal_layers.py") for place in places)


def test_numbers_read_a_step_late_are_the_same(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a step's row is written while the next one is computed; --save-every has to wait for it."""
    begin = Run.__init__

    def late(run: Run, *args: object) -> None:
        begin(run, *args)
        run.late = 1

    (tmp_path / "02_image_ldm").symlink_to(out / "02_image_ldm")
    flags = ["--preset", "smoke", "--steps", "5", "--save-every", "3"]
    import_module("03_temporal_layers").main([*flags, "--out", str(out), "--overwrite"])
    monkeypatch.setattr(Run, "__init__", late)
    import_module("03_temporal_layers").main([*flags, "--out", str(tmp_path)])
    soon, late = ((folder / "03_temporal_layers" / "metrics.csv").read_text() for folder in (out, tmp_path))
    assert soon == late and soon.count("\n") == 6


@dataclass
class Rates:
    lr: float = 0.1
    warmup: int = 1
    ema_decay: float = 0.9


def test_gradients_that_are_not_finite_leave_weights_and_moments(tmp_path: Path) -> None:
    run = Run("99_layer", preset_config(TrainingConfig, {"cpu": {}}, "cpu", out=str(tmp_path)))
    layer, kept = torch.nn.Linear(2, 1), []
    learner = Learner(run, layer, Rates())
    with pytest.raises(UserError, match="99_layer, step 2: the gradients are not finite; lower --lr"):
        for step in training_loop(run, 5, learner.parts):
            layer(torch.ones(4, 2)).square().mean().backward()
            if step == 2:
                layer.weight.grad[0, 1] = torch.inf
            learner.step(step)
            moments = [state["exp_avg"] for state in learner.parts["optimizer"].state.values()]
            kept.append(torch.cat([v.detach().flatten() for v in (*layer.parameters(), *moments)]).clone())
    first, second, spoilt, watched = kept
    assert torch.isfinite(spoilt).all() and not torch.equal(first, second)
    assert torch.equal(second, spoilt) and torch.equal(spoilt, watched)
