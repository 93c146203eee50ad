"""Videos of any length through networks that take a few frames at a time."""

from collections.abc import Iterable, Iterator

import torch


def in_portions(items: Iterable[torch.Tensor], size: int, overlap: int = 0,
                rest: int = 0) -> Iterator[tuple[torch.Tensor, int]]:
    """Stacks a stream of frames into portions of `size`; yields each with how many of its last frames are new.

    The others, at least `overlap` from the second portion on, are the last ones of the portion before. All portions are
    full: the last one reaches back further, or, were only `rest` frames or fewer new in it, they make the one before
    longer. (A stream shorter than `size` is one short portion.)
    """
    window, new, wanted = [], 0, size
    for item in items:
        window, new = [*window, item][-(size + rest + 1) :], new + 1
        if new > wanted + rest:  # too many come after this portion to be joined to it
            yield torch.stack(window[: -rest - 1][-size:]), wanted
            new, wanted = rest + 1, size - overlap
    if new:
        yield torch.stack(window[-size - max(0, new - wanted) :]), new


def faded(portions: Iterable[tuple[torch.Tensor, int]], overlap: int) -> Iterator[torch.Tensor]:
    """Frames of `in_portions` that went through a network, one by one: where portions overlap, the old one fades into
    the new one. At a hard cut all frames jump a little at once, which the eye finds at once, every second or so."""
    waiting: list[torch.Tensor] = []  # frames that the next portion has a say in
    for frames, new in portions:
        again = frames[: len(frames) - new][len(frames) - new - len(waiting) :]
        for i, (old, anew) in enumerate(zip(waiting, again, strict=True)):
            yield old + (i + 1) / (len(waiting) + 1) * (anew - old)
        fresh = list(frames[len(frames) - new :])
        done = max(0, len(fresh) - overlap)
        yield from fresh[:done]
        waiting = fresh[done:]
    yield from waiting
