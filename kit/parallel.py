"""One training on several processes: who computes which samples, and how gradients and losses come together again.

    torchrun --nproc_per_node 4 03_temporal_layers.py --batch 32 --accumulate 2

--batch is the batch of the whole step. Of its samples every process takes its share, and a share may be computed in
portions (--accumulate), one after the other. Random numbers are drawn for the whole batch, by everyone, and each keeps
those of its own samples: sample i of step n is the same clip with the same noise however the work is divided, and the
losses are those of one process.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

Rows = TypeVar("Rows", torch.Tensor, list)


def join(device: torch.device) -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun started them; 0 and 1 without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def average(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mean over the processes of each tensor; what comes in is left as it is."""
    if not dist.is_initialized():
        return values
    values = [value.detach().float().clone() for value in values]
    for value in values:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return values


def sent(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What was drawn on the CPU, on the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


class Share:
    """Some samples of a step's batch: their numbers, their random numbers and their part in the gradient.

    The rows of a draw are those that one process with the whole batch would have drawn for these samples.
    """

    def __init__(self, rows: Sequence[int], batch: int, generator: torch.Generator, device: torch.device,
                 backward: Callable[[torch.Tensor], None], noise: torch.Generator | None = None) -> None:
        """generator: draws on the CPU; noise: what draws Gaussian noise in its place, on the GPU (--device-noise)."""
        self.rows, self.batch, self.generator, self.device, self.backward = rows, batch, generator, device, backward
        self.gaussian = noise or generator

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, drawn: Rows) -> Rows:
        """Of what was drawn for each sample of the batch, the rows of this share."""
        if len(self) == self.batch:
            return drawn
        return [drawn[i] for i in self.rows] if isinstance(drawn, list) else drawn[list(self.rows)]

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Gaussian noise of this shape, (b k) ..., k rows (frames) for each sample."""
        each = shape[0] // len(self)
        noise = torch.randn(self.batch * each, *shape[1:], generator=self.gaussian, device=self.gaussian.device)
        noise = self.keep(noise.unflatten(0, (self.batch, each))).flatten(0, 1)
        return noise if noise.device == self.device else sent(noise, self.device)

    def uniform(self) -> torch.Tensor:
        """b, in [0, 1), on the CPU."""
        return self.keep(torch.rand(self.batch, generator=self.generator))

    def integers(self, end: int) -> torch.Tensor:
        """b, from 0 to end - 1: diffusion times and noise levels."""
        return sent(self.keep(torch.randint(0, end, (self.batch,), generator=self.generator)), self.device)


def divide(batch: int, rank: int, processes: int, portions: int) -> Iterator[range]:
    """The samples of one process, in portions. In strides, so that every portion has some from all over the batch."""
    for portion in range(portions):
        yield range(rank + portion * processes, batch, processes * portions)


class Method(nn.Module):
    """A method of a module as a forward pass, which is what DistributedDataParallel calls."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: object, **kwargs: object) -> object:
        return getattr(self.module, self.method)(*args, **kwargs)


def replicate(module: nn.Module, method: str, device: torch.device) -> nn.Module:
    """Every process has all weights; gradients are averaged while the backward pass goes on."""
    return nn.parallel.DistributedDataParallel(
        Method(module, method), device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True)


class Flat(nn.Module):
    """A forward pass that takes nothing but tensors: what a CUDA graph can be given."""

    def __init__(self, module: nn.Module, eager: Callable, args: tuple, kwargs: dict) -> None:
        super().__init__()
        self.module, self.eager, self.names = module, eager, list(kwargs)
        self.values = [torch.Tensor if isinstance(v, torch.Tensor) else v for v in (*args, *kwargs.values())]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        values = [next(given) if value is torch.Tensor else value for value in self.values]
        args, kwargs = values[: len(values) - len(self.names)], values[len(values) - len(self.names) :]
        return self.eager(*args, **dict(zip(self.names, kwargs, strict=True)))


def hasten(module: nn.Module, compiled: bool, recorded: bool, backend: str = "inductor") -> None:
    """A module's forward and backward pass in training, as a GPU has them fastest; without gradients nothing changes.

    compiled: by torch.compile, which melts the many small kernels around convolutions and products into few. recorded:
    from the first pass on as a CUDA graph that is replayed; the thousands of launches of a small network take longer
    than its kernels. Both want shapes that stay what they were.
    """
    eager = type(module).forward.__get__(module)  # also where another training of it was recorded before
    fast, graphs = torch.compile(eager, dynamic=False, backend=backend) if compiled else eager, []

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return eager(*args, **kwargs)
        if not recorded:
            return fast(*args, **kwargs)
        tensors = tuple(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        if not graphs:
            inputs = tuple(v.detach().clone().requires_grad_(v.requires_grad) for v in tensors)
            dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
            with torch.autocast("cuda", dtype, enabled, cache_enabled=False):  # a cached cast would be of old weights
                flat = Flat(module, fast, args, kwargs)
                graphs.append(torch.cuda.make_graphed_callables(flat, inputs, allow_unused_input=True))
        return graphs[0](*tensors)

    module.forward = forward


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Every process has a slice of weights, gradients and optimizer moments (FSDP2); a block is whole only in use."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for p in module.parameters():
        p.data = p.data.contiguous()  # channels-last weights cannot be cut
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for name, part in module.named_modules():
        if name.split(".")[-1].isdigit() and name.count(".") == 1:  # input_blocks.0, output_blocks.3
            fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def synchronise(module: nn.Module, last: bool) -> None:
    """Before a forward pass: whether its backward pass is the one after which processes exchange gradients."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = last
    else:
        module.set_requires_gradient_sync(last)


def whole(state: object) -> object:
    """A state whose sharded tensors are put together, on the CPU; all processes have to ask."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor().cpu() if hasattr(state, "full_tensor") else state


def placed_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The reverse: a whole tensor cut as `like` is; untouched where `like` is not sharded."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
