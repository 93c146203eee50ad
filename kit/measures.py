"""Numbers that several lessons report. Videos are `b t c h w` in [-1, 1]."""

import torch
import torch.nn.functional as F
from einops import rearrange


def psnr(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB for a range of 2, over the pixels of the mask `where` if given."""
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square()
    mean = error.mean() if where is None else (error * where).sum() / (where.expand_as(error).sum().clamp(min=1))
    return float(10 * torch.log10(4 / mean.clamp(min=1e-10)))


def low_pass(video: torch.Tensor) -> torch.Tensor:
    """Every frame averaged to 4 x 8 cells: the colours of sky and land, without objects or dashes."""
    b, t = video.shape[:2]
    cells = F.adaptive_avg_pool2d(rearrange(video.float(), "b t c h w -> (b t) c h w"), (4, 8))
    return rearrange(cells, "(b t) c h w -> b t c h w", b=b, t=t)


def colour_change(video: torch.Tensor) -> torch.Tensor:
    """Mean absolute change of low-pass colour between adjacent frames, per clip: b. Large where frames disagree."""
    return low_pass(video).diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


def motion(video: torch.Tensor, block: int = 8, reach: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Block matching between adjacent frames: how far things move, in pixels, and how badly they match: b, b.

    Every textured block of a frame (dashes, edges, trees, cars; not sky) looks for its best match in the next frame
    within `reach` pixels. Frames that only share a sky match badly; a frozen clip matches perfectly at distance 0. So
    a clip moves like real ones only if both numbers do. Frames are blurred a little and a pixel of distance costs
    0.005 of brightness: without that, grain too faint to see sends blocks anywhere (real clips that went through the
    autoencoder would seem to move 1.3 times as far; so it is 1.03).
    """
    b, t = video.shape[:2]
    grey = F.avg_pool2d(F.pad(video.float().mean(dim=2), [1] * 4, mode="replicate"), 3, stride=1)  # b t h w
    first = rearrange(grey[:, :-1], "b t h w -> (b t) 1 h w")
    second = F.pad(rearrange(grey[:, 1:], "b t h w -> (b t) 1 h w"), [reach] * 4, mode="replicate")
    height, width = first.shape[-2:]
    best = first.new_full((len(first), 1, height // block, width // block), float("inf"))
    distance, mismatch = torch.zeros_like(best), torch.zeros_like(best)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            moved = second[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width]
            length = (dx * dx + dy * dy) ** 0.5
            error = F.avg_pool2d((first - moved).abs(), block)
            better = error + 0.005 * length < best
            distance, mismatch = distance.where(~better, length), mismatch.where(~better, error)
            best = best.where(~better, error + 0.005 * length)
    texture = F.avg_pool2d(first.square(), block) - F.avg_pool2d(first, block).square()
    textured = (texture > 0.005).float()
    share = rearrange(textured, "(b t) 1 h w -> b (t h w)", b=b)

    def mean(values: torch.Tensor) -> torch.Tensor:
        values = rearrange(values, "(b t) 1 h w -> b (t h w)", b=b)
        return (values * share).sum(1) / share.sum(1).clamp(min=1)

    return mean(distance), mean(mismatch)


def ratio_of_means(values: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """mean(values) / mean(real), one value a clip, and its standard error, as if the clips were drawn apart."""
    ratio = float(values.mean() / real.mean())
    error = (values.var() / len(values) + ratio**2 * real.var() / len(real)) ** 0.5 / real.mean()
    return ratio, float(error)


def flicker(video: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean absolute error of frame-to-frame differences against the true clip."""
    return float((video.float().diff(dim=1) - truth.float().diff(dim=1)).abs().mean())


def restlessness(video: torch.Tensor, real: torch.Tensor) -> float:
    """Mean absolute change from frame to frame over that of real clips at the same rate. 1 is as calm as they are; what
    boils has more. A blurred or frozen video has less, so it goes with a number for sharpness or for motion."""
    change = [float(clips.float().clamp(-1, 1).diff(dim=1).abs().mean()) for clips in (video, real)]
    return change[0] / max(change[1], 1e-8)


def seam(video: torch.Tensor, truth: torch.Tensor, at: int) -> float:
    """Error of the step in time into frame `at`, where a portion begins, over the mean error of all other steps."""
    steps = (video.float().diff(dim=1) - truth.float().diff(dim=1)).abs().mean(dim=(0, 2, 3, 4))
    return float(steps[at - 1] / torch.cat([steps[: at - 1], steps[at:]]).mean())


def sharpness(video: torch.Tensor) -> torch.Tensor:
    """Mean gradient magnitude of the brightness of every frame: b t."""
    grey = video.float().mean(dim=2)
    dy, dx = grey.diff(dim=-2)[..., :, :-1], grey.diff(dim=-1)[..., :-1, :]
    return (dx.square() + dy.square()).sqrt().mean(dim=(-2, -1))


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes `... n 4` (x0 y0 x1 y1 in [0, 1], zeros where absent) -> 1 inside any of them: `... 1 height width`."""
    ys = (torch.arange(height) + 0.5)[:, None] / height
    xs = (torch.arange(width) + 0.5)[None, :] / width
    x0, y0, x1, y1 = (boxes[..., i, None, None] for i in range(4))
    inside = (xs >= x0) & (xs <= x1) & (ys >= y0) & (ys <= y1)  # ... n height width
    return inside.any(dim=-3).float()[..., None, :, :]
