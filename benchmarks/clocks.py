"""How times are taken: clocks that wait for the device, what kinds of kernels a GPU spends them on, what a step waits
for."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from kit.data import Clips, Source


class Clock:
    """Times on one device, and the rate of its matrix products, the measure of everything else."""

    def __init__(self, device: torch.device, repeats: int, n: int = 0) -> None:
        """n: size of the matrices; 0 is large enough that a launch does not count."""
        self.device, self.repeats = device, repeats
        n = n or (8192 if device.type == "cuda" else 2048)
        self.peak = {str(dtype).removeprefix("torch."): self.matrix_rate(dtype, n)
                     for dtype in (torch.float32, torch.bfloat16)}

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def matrix_rate(self, dtype: torch.dtype, n: int) -> float:
        """FLOP/s of the fastest of ten products of n x n matrices."""
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        a @ b
        return 2 * n**3 / min(self.seconds(lambda: a @ b) for _ in range(10))

    def in_turn(self, ours: Callable[[], object], theirs: Callable[[], object]) -> dict:
        """Both measured in turn, after one unmeasured call of each."""
        ours(), theirs()
        pairs = [(self.seconds(ours), self.seconds(theirs)) for _ in range(self.repeats)]
        ratios = [b / a for a, b in pairs]
        return {"ours": [a for a, _ in pairs], "theirs": [b for _, b in pairs], "ratio": statistics.median(ratios),
                "ratio, lowest": min(ratios), "ratio, highest": max(ratios)}

    def share(self, flops: int, seconds: list[float]) -> float:
        return flops / statistics.median(seconds) / self.peak["bfloat16"]


def flops_of(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# %% What a GPU does meanwhile


KERNELS = {  # kind: what stands in the names of its kernels; the first that fits
    "attention": ("flash", "fmha", "attention", "softmax"),
    "norms": ("norm", "welford", "rowwisemoments"),
    "optimizer": ("multi_tensor", "adam"),
    "copies": ("copy", "memcpy", "memset", "nchwtonhwc", "nhwctonchw", "cat"),
    "convolutions": ("conv", "implicit", "fprop", "dgrad", "wgrad", "winograd"),
    "matrix products": ("gemm", "cublas", "cutlass", "nvjet", "gemv"),
    "elementwise": ("elementwise", "reduce", "triton"),
}


def kernel_times(names: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds of the GPU by kind of kernel, the longest first, of (name, seconds)."""
    found = dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, seconds in names:
        kinds = (kind for kind, parts in KERNELS.items() if any(part in name.lower() for part in parts))
        found[next(kinds, "other")] += seconds
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1]))


def profiled(clock: Clock, job: Callable[[], object]) -> dict[str, float]:
    """What the GPU spends one call of a job on; empty on a CPU."""
    job()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        clock.wait()
    return kernel_times((event.key, event.self_device_time_total / 1e6) for event in profile.key_averages()
                        if event.self_device_time_total)


# %% What a training step waits for


class Stopwatch:
    """A source of clips that notes when each step asks for its own and how long it waits, and profiles some steps."""

    def __init__(self, source: Source, first: int, clock: Clock) -> None:
        """first: the step from which on times count; what is recorded or kept is there by then."""
        self.source, self.first, self.clock = source, first, clock
        self.asked: list[float] = []  # by step
        self.waited: list[float] = []
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def clips(self, key: Sequence[int], *about: object) -> Clips:
        if key[2] == len(self.asked):  # (seed, lesson, step, ...): the first request of a step
            self.begin_step(key[2])
        start = time.perf_counter()
        clips = self.source.clips(key, *about)
        self.waited[-1] += time.perf_counter() - start
        return clips

    def begin_step(self, step: int) -> None:
        if self.clock.device.type == "cuda" and step in (self.first // 2, self.first):  # profiled before it is timed
            self.clock.wait()
            if step < self.first:
                self.profile.start()  # which takes a second by itself
                self.began = time.perf_counter()
            else:
                self.profiled = time.perf_counter() - self.began
                self.profile.stop()
        self.asked.append(time.perf_counter())
        self.waited.append(0.0)

    def numbers(self) -> dict:
        """Seconds of each step, from asking to asking; shares of them: waiting for clips, and the GPU at work."""
        asked = self.asked[self.first :]
        found = {"ours": [b - a for a, b in zip(asked, asked[1:], strict=False)]}
        found["waiting for clips"] = sum(self.waited[self.first : -1]) / sum(found["ours"])
        if self.clock.device.type == "cuda":
            kernels = sum(event.self_device_time_total for event in self.profile.key_averages()) / 1e6
            found["GPU at work"] = kernels / self.profiled
        return found
