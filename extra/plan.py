"""Dry runs: parameters, shapes, FLOPs and memory of a stage, before anything runs."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.temporal import is_temporal
from kit.flags import BaseConfig, TrainingConfig
from kit.run import use_checkpointing


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
