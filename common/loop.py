"""The loop around a training step: steps that can be interrupted, the average of the weights, the rate.

A script reads like this:

    config = parse(Config, PRESETS, argv, __doc__)
    run = Run("03_temporal_layers", config)
    learner = Learner(run, unet, config)
    for step in training_loop(run, config.steps, learner.parts):
        for share in run.shares(config.batch, "diffusion", step):
            ...clips, noise, prediction, loss: written out in the script...
            share.backward(loss)
            run.log(loss=loss)
        learner.step(step)
    run.end_training()
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common.muon import Muon, matrices_of
from kit import parallel
from kit.errors import UserError
from kit.files import load_checkpoint, save_checkpoint, write_text
from kit.run import NotFinite, Run


def training_loop(run: Run, steps: int, parts: dict, extra: dict | None = None, file: str = "checkpoint.pt",
                  metrics: str = "metrics.csv") -> Iterator[int]:
    """Yields step numbers; around them it resumes, saves, shows progress and answers Ctrl-C and SIGTERM.

    parts: modules, optimizers and EMA by name, restored with --resume and saved every `save_every` steps, at the last
    step and when stopped; extra: tensors and primitives to keep in the checkpoint as they are at that moment. After a
    loss that is not finite the same step comes once more, watched, and ends in a UserError that names the layer.
    """
    path, start, stopped_by = run.folder / file, 0, []
    extra, run.metrics, run.last_row, run.logged = {} if extra is None else extra, run.folder / metrics, {}, {}
    run.finite, run.unread = [], []

    def save(done: int) -> None:
        config = dataclasses.asdict(run.config)
        state = {name: parallel.whole(trained_state(part)) for name, part in parts.items()}
        if run.rank == 0:
            about = {"script": run.name, "step": done, "config": config, "data": run.data}
            save_checkpoint(path, {**about, **extra, **state})
        if run.processes > 1:
            torch.distributed.barrier()  # the others may read it next

    if path.exists() and not (run.config.resume or run.config.overwrite):
        raise UserError(f"{path} holds what was trained before: --resume goes on with it, --overwrite replaces it")
    if run.config.resume and path.exists():
        content = load_checkpoint(path, "the same command without --resume")
        for name, part in parts.items():
            load_part(part, content.get(name, {}), path)
        start = content["step"]
        extra.update({k: v for k, v in content.items() if k not in (*parts, "script", "step", "config", "data")})
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
            try:
                stop = run.end_step(step, stopped_by[0] if stopped_by else 0,
                                    [part.found_inf for part in parts.values() if hasattr(part, "found_inf")])
                saving = stop or step + 1 == steps or (step + 1) % run.config.save_every == 0
                while saving and run.unread:
                    run.read_step()
            except NotFinite as error:
                with watched(parts, f"{run.name}, step {error.step}"):
                    yield error.step  # the same clips and noise once more, to see where it begins
                raise UserError(f"{run.name}, {error}; lower --lr (the last save is kept)") from None
            bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in run.last_row.items()), refresh=False)
            if saving:
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


def trainable(module: nn.Module, but: Sequence[nn.Parameter] = ()) -> list[nn.Parameter]:
    """Its trained parameters; but: those that another optimizer has."""
    others = set(but)
    return [p for p in module.parameters() if p.requires_grad and p not in others]


def adamw(module: nn.Module, lr: float, but: Sequence[nn.Parameter] = ()) -> torch.optim.AdamW:
    """AdamW with torch's defaults (the paper names no optimizer; LDM's code uses this for diffusion models)."""
    return torch.optim.AdamW(trainable(module, but), lr=lr, fused=True)


def clip_and_warm_up(optimizer: torch.optim.Optimizer, step: int, lr: float, warmup: int, steady: int = 0) -> None:
    """Clips the gradient norm to 1 and sets the rate: linear warm-up, then `lr`, and after `steady` steps (0: never)
    lr * sqrt(steady / step). Nothing here depends on the total of steps.

    One step with gradients that are not finite would spoil the weights: where `found_inf` is 1, the optimizer leaves
    them as they are, without anybody having waited for the device; the loop reads it when the step has ended.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / max(1, warmup), (steady / (step + 1)) ** 0.5 if steady else 1.0)
        norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.found_inf = (~torch.isfinite(norm)).float()


class Learner:
    """A network in training: how to call it, its optimizer, the average of its weights; and the step.

    settings: has lr, warmup, ema_decay, perhaps steady (see clip_and_warm_up) and muon, the rate of weight matrices by
    Muon; lr, steady, muon: where others are wanted; shard, method: see Run.parallel; optimizer: makes the one of what
    Muon does not move. `parts` is what a checkpoint keeps.
    """

    def __init__(self, run: Run, module: nn.Module, settings, lr: float | None = None, steady: int | None = None,
                 muon: float | None = None, shard: bool = False, optimizer: Callable = adamw,
                 method: str = "__call__") -> None:
        self.network = run.parallel(module, method, shard)
        self.warmup, self.steady = settings.warmup, getattr(settings, "steady", 0) if steady is None else steady
        lr, rate = settings.lr if lr is None else lr, getattr(settings, "muon", 0.0) if muon is None else muon
        if rate and shard:
            raise UserError("--muon wants whole matrices, which --shard cuts up: give one of them")
        matrices = matrices_of(module) if rate else []
        self.optimizers = {"optimizer": (optimizer(module, lr, matrices), lr)}
        if matrices:
            self.optimizers["muon"] = Muon(matrices, rate, run.dtype), rate
        self.ema = EMA(module, settings.ema_decay)
        self.parts = {"model": module, "ema": self.ema} | {name: each for name, (each, _) in self.optimizers.items()}

    def step(self, number: int) -> None:
        """Takes the gradients that the backward passes left, and clears them. number: of this step, from 0."""
        for optimizer, lr in self.optimizers.values():
            clip_and_warm_up(optimizer, number, lr, self.warmup, self.steady)
        found_inf = sum(optimizer.found_inf for optimizer, _ in self.optimizers.values()).clamp(max=1)
        for optimizer, _ in self.optimizers.values():  # where one cannot step, the others wait as well
            optimizer.found_inf = found_inf
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update()


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
