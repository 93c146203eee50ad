"""How the exercises are checked: what a function does on some inputs, beside what the lesson's own function does there.

No second solution is kept: `solution` calls the lesson. `mistakes` are typical wrong answers; a function that does the
same as one of them gets its hint, any other is told what differs first.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import diffusion, portions, temporal
from common.unet import UNet
from extra.metrics import frechet_distance
from judging.verdicts import Claim, judge

lesson02, lesson04, lesson05, lesson06, lesson07, lesson08, lesson09, lesson10 = (import_module(name) for name in (
    "02_image_ldm", "04_decoder_finetune", "05_prediction", "06_interpolation", "07_upsampler", "08_sample_long",
    "09_text_to_video", "10_personalization"))

Observed = dict[str, object]  # what is looked at, in the learner's terms: what was found


@dataclass(frozen=True)
class Exercise:
    lesson: str  # of exercises/LESSON.py
    name: str
    observe: Callable[[Callable], Observed]
    solution: Callable
    mistakes: dict[str, Callable]  # hint: a function that needs it


class Wrong(AssertionError):
    """What is wrong with an answer, in one line."""


def check(exercise: Exercise, function: Callable) -> None:
    """Raises Wrong with a hint, or NotImplementedError where nothing is written yet."""
    try:
        found = exercise.observe(function)
    except NotImplementedError:
        raise
    except Exception as error:
        hint = " (is a return missing?)" if "NoneType" in str(error) else ""
        raise Wrong(f"{exercise.name} raises {type(error).__name__}: {error}{hint}") from error
    wanted = exercise.observe(exercise.solution)
    if same(found, wanted):
        return
    for hint, mistake in exercise.mistakes.items():
        if same(found, exercise.observe(mistake)):
            raise Wrong(f"{exercise.name}: {hint}")
    what = next(what for what in wanted if not same(found[what], wanted[what]))
    raise Wrong(f"{exercise.name}: {what}: {difference(found[what], wanted[what])}")


def same(a: object, b: object) -> bool:
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(
            a.detach().double(), b.detach().double(), rtol=1e-4, atol=1e-5)
    if isinstance(b, float):
        return isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
    if isinstance(b, dict):
        return isinstance(a, dict) and all(same(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def difference(found: object, wanted: object) -> str:
    if isinstance(wanted, torch.Tensor):
        if not isinstance(found, torch.Tensor):
            return f"a {type(found).__name__} came back, a tensor is wanted"
        if found.shape != wanted.shape:
            return f"the shape is {tuple(found.shape)}, {tuple(wanted.shape)} is wanted"
        return f"the values are off by up to {float((found.detach().double() - wanted.double()).abs().max()):.3g}"
    if isinstance(wanted, tuple) and isinstance(found, tuple | list) and len(found) == len(wanted):
        place = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if not same(*pair))
        return f"of what is returned, number {place}: {difference(found[place], wanted[place])}"
    return f"{found} was found, {wanted} is wanted"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DIFFUSION = diffusion.Diffusion("sqrt_linear", 0.0015, 0.0195, "v")


# %% Lesson 1


def rotated(f: Callable, first: str) -> Observed:
    """At three diffusion times, two numbers a row."""
    a, b, tau = noise(3, 2), noise(3, 2, seed=1), torch.tensor([20, 500, 950])
    return {first: f(a, b, *DIFFUSION.levels(tau, a))}


def of_tau(alpha: torch.Tensor) -> torch.Tensor:
    return torch.stack([(DIFFUSION.alpha - a).abs().argmin() for a in alpha.flatten()])


def stepped(f: Callable) -> Observed:
    def step(eta: float) -> object:
        levels = [(DIFFUSION.alpha[tau], DIFFUSION.sigma[tau]) for tau in (700, 400)]
        return f(noise(2, 3), noise(2, 3, seed=1), *levels, eta)

    return {"the deterministic step, eta 0": step(0.0), "the ancestral step, eta 1": step(1.0),
            "the step with eta 0.5": step(0.5)}


def wrong_step(fresh: Callable, rest: Callable) -> Callable:
    def step(clean, eps, now, after, eta):
        (alpha, sigma), (alpha_next, sigma_next) = now, after
        deviation = fresh(alpha, sigma, alpha_next, sigma_next, eta)
        return alpha_next * clean + rest(sigma, sigma_next, deviation) * eps, deviation

    return step


def fresh_of(alpha, sigma, alpha_next, sigma_next, eta):
    return eta * sigma_next / sigma * (1 - (alpha / alpha_next) ** 2) ** 0.5


def guided(f: Callable) -> Observed:
    u, c = noise(2, 3), noise(2, 3, seed=1)
    return {f"scale {scale:g}": f(u, c, scale) for scale in (0.0, 1.0, 2.5)}


# %% Lesson 2


def hinged(f: Callable) -> Observed:
    return {"scores on both sides of the margins": f(3 * noise(4, 1, 5, 5), 3 * noise(4, 1, 5, 5, seed=1)),
            "scores beyond the margins cost nothing": f(1 + noise(3, 1, 2, 2).abs(), -1 - noise(3, 1, 2, 2).abs())}


def weighed(f: Callable) -> Observed:
    weight = noise(3, 4).requires_grad_()
    reconstruction, gan = (weight @ noise(4, 2)).square().mean(), (weight @ noise(4, 2, seed=1)).mean()
    found = f(reconstruction, gan, weight)
    (reconstruction + gan).backward()  # the graphs have to be there still
    flat = f((weight.square()).mean(), 0 * weight.sum(), weight)
    return {"the weight": found, "it carries a gradient": found.requires_grad, "where the GAN's gradient is zero": flat}


def wrong_weight(norm: Callable = torch.Tensor.norm, swapped: bool = False, detach: bool = True) -> Callable:
    def weight(reconstruction, gan, last_layer):
        r, g = (norm(torch.autograd.grad(loss, last_layer, retain_graph=True, create_graph=not detach)[0])
                for loss in ((gan, reconstruction) if swapped else (reconstruction, gan)))
        found = (r / (g + 1e-4)).clamp(max=1e4)
        return found.detach() if detach else found

    return weight


# %% Lesson 3


def shown(pattern: str, clips: bool) -> Callable:
    return (lambda z, frames: rearrange(z, pattern, t=frames)) if clips else (lambda video: rearrange(video, pattern))


def attended(f: Callable) -> Observed:
    b, t, c, h, w = 2, 4, 3, 2, 3

    def attend(x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3 or x.shape[2] != c:
            raise ValueError(f"attend was given {tuple(x.shape)}, which is no n length c with {c} channels")
        return (x @ x.transpose(1, 2)).softmax(-1) @ x

    def apply(z: torch.Tensor) -> torch.Tensor:
        return f(attend, z, t)

    z = noise(b * t, c, h, w)
    there, elsewhere, other = z.clone(), z.clone(), z.clone()
    there[3, :, 0, 0] += 1  # the last frame of the first clip
    elsewhere[0, :, 1, 2] += 1
    other[4:] += 1
    out = apply(z)
    if out.shape != z.shape:
        return {"the shape": tuple(out.shape), "the output": out}
    return {"the shape": tuple(out.shape),
            "frame 0 changes when frame 3 does (if not: are frames in the batch axis?)":
            bool((apply(there) - out)[0, :, 0, 0].abs().max() > 1e-6),
            "a position sees another position of its own frame": bool((apply(elsewhere) - out)[0, :, 0, 0].any()),
            "a clip sees another clip": bool((apply(other) - out)[:4].any()), "the output": out}


def attending(there: str, back: str) -> Callable:
    def attend_over_frames(attend, z, frames):
        h = z.shape[2]
        return rearrange(attend(rearrange(z, f"(b t) c h w -> {there}", t=frames)), f"{back} -> (b t) c h w", t=frames,
                         h=h, w=z.shape[3])

    return attend_over_frames


def merged(f: Callable) -> Observed:
    z, other = noise(6, 2, 3, 3), noise(6, 2, 3, 3, seed=1)
    factors = torch.tensor([-1.0, 0.3, 2.0])
    cases = [(s * z, torch.tensor([m])) for s in (1.0, 0.1) for m in (-1.3, 0.3, 2.1)]
    always = all(torch.equal(f(x, x, factor, 3), x) for x, factor in cases)
    return {"one alpha for all frames": f(z, other, torch.tensor([0.8]), 3),
            "an alpha for each frame of each clip": f(z, other, factors, 3),
            "z' = z gives z to the last bit": always}


def merging(form: Callable, spread: Callable = lambda alpha, n: alpha.repeat(n)) -> Callable:
    def merge(z, z_prime, mix_factor, frames):
        alpha = mix_factor.sigmoid()
        alpha = spread(alpha, len(z) // frames) if len(alpha) > 1 else alpha
        return form(alpha.view(-1, 1, 1, 1), z, z_prime)

    return merge


def lessons_merge(z, z_prime, mix_factor, frames):
    layer = temporal.AlphaMerge(len(mix_factor))
    layer.mix_factor = nn.Parameter(mix_factor)
    return layer(z, z_prime, frames).detach()


def frozen(f: Callable) -> Observed:
    net = UNet(4, 4, 32, (1, 2), 1, (1, 2), head_channels=32, context_dim=8,
               temporal=temporal.TemporalOptions(known_channels=5, known_features=32))
    f(net)
    learning = {name for name, p in net.named_parameters() if p.requires_grad}

    def of(part: str) -> bool:
        return any(part in name for name in learning)

    return {"spatial convolutions learn": of("input_blocks.0.0"), "the embedding of the diffusion time learns": of(
        "time_embed"), "temporal convolutions learn": of("time_stack"), "the alphas learn": of("mix_factor"),
        "the embedding of c_S learns": of("time_context"), "what learns": sorted(learning)}


def freezing(learns: Callable[[str], bool]) -> Callable:
    def freeze(network):
        for name, p in network.named_parameters():
            p.requires_grad_(learns(name))

    return freeze


# %% Lesson 4


def told_apart(f: Callable) -> Observed:
    a, b = ([noise(2, 3, s, s, seed=seed), noise(2, 5, s // 2, s // 2, seed=seed + 1)] for s, seed in ((4, 0), (4, 5)))
    return {"the distance": f(a, b), "the distance of features that are only brighter": f(a, [3 * x for x in a])}


def distances(normal: Callable, mean: Callable, total: Callable = sum) -> Callable:
    return lambda a, b: total([mean((normal(x) - normal(y)).square()) for x, y in zip(a, b, strict=True)])


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1)


def cut_up(f: Callable) -> Observed:
    return {f"{length} frames in portions of {size} that overlap by {overlap}": f(length, size, overlap)
            for length, size, overlap in ((12, 6, 2), (14, 6, 2), (15, 6, 2), (12, 6, 0), (4, 6, 2), (6, 6, 2))}


def lessons_portions(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    frames = torch.arange(length)[:, None]
    return [(int(part[0]), new) for part, new in portions.in_portions(frames, size, overlap)]


def marching(stride: Callable, short_last: bool = False) -> Callable:
    def cut(length, size, overlap):
        found, end = [], 0
        while end < length:
            begin = 0 if not found else found[-1][0] + stride(size, overlap)
            stop = min(begin + size, length)
            found.append((begin if short_last or stop - begin == size else max(0, length - size), stop - end))
            end = stop
        return found

    return cut


def lessons_fade(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    n = len(old)
    return torch.stack(list(portions.faded([(old, n), (torch.cat([new, new[:1]]), 1)], n))[:n])


def fading(weights: Callable) -> Callable:
    return lambda old, new: old + weights(len(old)).view(-1, 1, 1, 1) * (new - old)


# %% Lesson 5


def known_first(f: Callable) -> Observed:
    return {"the mask of clips with 0, 1 and 2 known frames, as numbers": f(torch.tensor([0, 2, 1]), 4) * 1.0}


def told(f: Callable) -> Observed:
    z, mask = noise(6, 2, 3, 3), torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    hidden = z.clone()
    hidden[1] += 5
    return {"the number of channels": f(z, mask).shape[1], "a hidden frame gets through": not torch.equal(
        f(z, mask), f(hidden, mask)), "c_S": f(z, mask)}


def telling(order: Callable) -> Callable:
    def context(z, mask):
        mask = rearrange(mask, "b t -> (b t) 1 1 1").expand(-1, 1, *z.shape[2:])
        return order(z, mask)

    return context


def by_context(f: Callable) -> Observed:
    def network(z_tau: torch.Tensor, c_S: torch.Tensor) -> torch.Tensor:
        return z_tau.tanh() * (1 + c_S[:, :2]) + 2 * c_S[:, 2:]

    z, c_S = noise(3, 2, 2, 2), torch.cat([noise(3, 2, 2, 2, seed=1), torch.ones(3, 1, 2, 2)], dim=1)
    return {f"scale {scale:g}": f(network, z, c_S, scale) for scale in (1.0, 2.0)}


def lessons_guidance(network, z_tau, c_S, scale):
    return diffusion.guided(lambda x, tau, c: network(x, c), z_tau, torch.zeros(len(z_tau)), [c_S],
                            [torch.zeros_like(c_S)], scale)


def iterated(f: Callable) -> Observed:
    asked = []

    def predict(known: torch.Tensor) -> torch.Tensor:
        asked.append(known.shape[1])
        if known.dim() != 5 or len(known) != 1:
            raise ValueError(f"predict was given {tuple(known.shape)}, which is no 1 s c h w")
        new = known[:, -1:] + known.shape[1] * torch.arange(1, 9 - known.shape[1]).view(1, -1, 1, 1, 1)
        return torch.cat([known, new + known.mean()], dim=1)

    found = f(predict, noise(1, 2, 2, 2), 16)
    return {"how many latents": len(found), "how many frames were known each time": asked[:3], "the latents": found}


def lessons_iteration(predict, first, count):
    settings = SimpleNamespace(ddim_steps=1, guidance=0, anchor=False)
    with mock.patch.multiple(lesson05, load=lambda run, image: (None, settings),
                             predict_clips=lambda unet, image, known, *a, **k: predict(known)):
        stream = lesson08.key_frames(None, settings, None, first, None, 0)
        return torch.stack(list(itertools.islice(stream, count)))


def iterating(known: int, again: int = 0) -> Callable:
    def long(predict, first, count):
        z = first[None]
        while z.shape[1] < count:
            given = z[:, -known:]
            z = torch.cat([z, predict(given)[:, given.shape[1] - again :]], dim=1)
        return z[0, :count]

    return long


# %% Lesson 6


def filled(f: Callable) -> Observed:
    calls = []

    def fill(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        calls.append(len(first))
        weight = torch.linspace(0, 1, 5).view(1, -1, 1, 1, 1)
        return first[:, None] + weight * (last - first)[:, None]

    z = noise(4, 2, 2, 2)
    found = f(fill, z)
    return {"the number of frames": len(found), "pairs in each call of fill": calls,
            "frames given come out again": same(found[::4], z), "the video": found}


def filling(join: Callable) -> Callable:
    return lambda fill, z: join(fill(z[:-1], z[1:]), z)


def lengths(f: Callable) -> Observed:
    return {f"{n} frames, {passes} passes": f(n, passes) for n, passes in ((8, 1), (8, 2), (2, 1), (1, 2), (8, 0))}


# %% Lesson 7


def cropped(f: Callable) -> Observed:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    video = torch.stack([y, x, torch.zeros_like(x)]).expand(2, 5, -1, -1, -1)
    found = f(video, [(0, 4), (8, 12)], 8)
    return {"the shape": tuple(found.shape), "all frames are cut at the same place": bool(
        (found == found[:, :1]).all()), "the patches": found}


def lessons_patches(video, places, side):
    share = SimpleNamespace(generator=None, batch=len(video), keep=lambda drawn: places)
    return lesson07.patches(video, range(len(video)), side // lesson07.SCALE, share)


def noised(f: Callable) -> Observed:
    small, eps = noise(2, 3, 3, 2, 2), noise(2, 3, 3, 2, 2, seed=1)
    return {"the augmented frames": f(small, eps, torch.tensor([10, 300]), DIFFUSION.alpha, DIFFUSION.sigma)}


def lessons_augmented(small, eps, levels, alpha, sigma):
    of_frames = levels.repeat_interleave(small.shape[1])
    return DIFFUSION.diffuse(small.flatten(0, 1), eps.flatten(0, 1), of_frames).view_as(small)


def noising(shape: Callable, keep: bool = True) -> Callable:
    return lambda small, eps, levels, alpha, sigma: (
        shape(alpha[levels]) if keep else 1) * small + shape(sigma[levels]) * eps


# %% Lesson 8


def keys(f: Callable) -> Observed:
    return {f"{length} frames, {passes} passes": f(length, passes) for length, passes in (
        (113, 2), (114, 2), (112, 2), (29, 1), (8, 0), (1, 2), (4 * 10**17 + 2, 1))}


def streamed(f: Callable) -> Observed:
    taken = []

    def source() -> Iterator[int]:
        for i in itertools.count():
            taken.append(i)
            if i > 100:
                raise ValueError("all of a stream without end was asked for")
            yield i

    first = next(iter(f(source(), 3)))
    return {"lists": list(f(range(7), 3)), "what they are": [type(one).__name__ for one in f(range(2), 2)],
            "no items": list(f([], 3)), "the first list of a stream": first,
            "how many items were taken for it": len(taken)}


# %% Lesson 9


def noised_ends(f: Callable) -> Observed:
    z, eps, mask = noise(6, 2, 2, 2), noise(6, 2, 2, 2, seed=1), torch.tensor([[1.0, 0, 1], [1, 0, 1]])
    found = f(z, eps, mask, torch.tensor([20, 400]), DIFFUSION.alpha, DIFFUSION.sigma)
    return {"the number of channels": found.shape[1], "something of hidden frames, or their noise, gets through": bool(
        found[[1, 4]].any()), "the context": found}


def noising_ends(make: Callable) -> Callable:
    def context(z, eps, mask, levels, alpha, sigma):
        a, s = (table[levels.repeat_interleave(mask.shape[1])].view(-1, 1, 1, 1) for table in (alpha, sigma))
        return telling(lambda z, m: torch.cat([make(z, eps, m, a, s), m], dim=1))(z, mask)

    return context


def lessons_reach(frames: int, reach: int) -> torch.Tensor:
    layer, seen = temporal.FrameAttention(4, 1), []
    layer.attend = lambda q, k, v, mask: (seen.append(mask), q)[1]
    layer(torch.zeros(frames, 1, 4), frames, reach)
    return torch.ones(frames, frames, dtype=torch.bool) if seen[0] is None else seen[0]


def reached(f: Callable) -> Observed:
    return {f"{frames} frames, reach {reach}": f(frames, reach) for frames, reach in ((5, 2), (5, 1), (3, 8), (4, 0))}


def reaching(of: Callable) -> Callable:
    return lambda frames, reach: of(torch.arange(frames)[:, None] - torch.arange(frames), reach)


# %% Lesson 10

PLACES = ("in the snow", "", "on a beach")


def called(f: Callable) -> Observed:
    spatial, temporal = f(PLACES, "sks", "car")
    return {"what the spatial layers read": list(spatial), "what the temporal layers read": list(temporal)}


def lessons_captions(places, token, class_word):
    config = SimpleNamespace(token=token, class_word=class_word)
    return tuple(lesson10.asked(config, places, with_token).captions for with_token in (True, False))


def calling(spatial: str, temporal: str = "a car") -> Callable:
    return lambda places, token, word: tuple([f"{name} {place}".strip() for place in places]
                                             for name in (spatial, temporal))


def weights(*names: str) -> dict[str, torch.Tensor]:
    """Some of a video U-Net's, one number each."""
    return {name: noise(1, seed=i) for i, name in enumerate(names)}


def as_module(state: dict[str, torch.Tensor]) -> nn.Module:
    root = nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        part = root
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, nn.Module())
            part = getattr(part, step)
        part.register_parameter(last, nn.Parameter(value.clone()))
    return root


def put_together(f: Callable) -> Observed:
    video = weights("out.2.weight", "input_blocks.1.0.in_layers.2.weight",
                    "input_blocks.1.0.time_stack.in_layers.2.bias")
    tuned = {name: value + 1 for name, value in video.items() if "time_stack" not in name}
    before, made = dict(video), f(video, tuned)
    return {"the names": sorted(made), "the weights": dict(sorted(made.items())),
            "the untuned video model afterwards": {name: video[name] for name in before}}


def lessons_insert(video, tuned):
    return lesson10.insert(as_module(video), SimpleNamespace(weights=tuned)).state_dict()


def inserting_in_place(video, tuned):
    video.update(tuned)
    return video


# %% Lesson 12


def measured(f: Callable) -> Observed:
    a, b = noise(40, 3) @ noise(3, 3, seed=2), noise(30, 3, seed=1) @ noise(3, 3, seed=3) + 1
    return {"the distance": float(f(a, b)), "a set against itself": abs(float(f(a, a))) < 1e-5}


def apart(root: Callable, unbiased: bool = True, squared: bool = True) -> Callable:
    def distance(a, b):
        a, b = a.double(), b.double()
        A, B = (torch.cov(x.T, correction=int(unbiased)) for x in (a, b))
        means = (a.mean(0) - b.mean(0)).square().sum()
        return float((means if squared else means.sqrt()) + A.trace() + B.trace() - 2 * root(A, B))

    return distance


def held(f: Callable) -> Observed:
    cases = {"clear": [12, 13, 14], "one seed the other way": [12, 9, 14], "noisy": [10.1, 13, 25], "worse": [8, 7, 6]}
    found = {f"{name}, three seeds": f([10, 10, 10], worse) for name, worse in cases.items()}
    return {name: bool(value) for name, value in found.items()} | {
        "two seeds": bool(f([10, 10], [20, 20])), "pairs that differ by the same": bool(f([1, 5, 9], [2, 6, 10]))}


def lessons_ordering(better, worse):
    rows = [{"table": "t", "row": row, "seed": seed, "numbers": {"m": {"value": value}}}
            for row, values in (("a", better), ("b", worse)) for seed, value in enumerate(values)]
    return judge(rows, [Claim("t", "m", "a", "b", "")])[0].holds


def holding(better_by: Callable) -> Callable:
    return lambda better, worse: better_by(torch.tensor(worse, dtype=torch.double) - torch.tensor(
        better, dtype=torch.double))


# %% All of them

EXERCISES = (
    Exercise("01", "v_target", lambda f: rotated(f, "the target"),
             lambda x, eps, alpha, sigma: DIFFUSION.target(x, eps, of_tau(alpha)), {
        "the sign is the other way round": lambda x, eps, alpha, sigma: sigma * x - alpha * eps,
        "alpha goes with eps and sigma with x": lambda x, eps, alpha, sigma: alpha * x - sigma * eps,
        "that is the target of eps-prediction": lambda x, eps, alpha, sigma: eps,
    }),
    Exercise("01", "clean_and_noise", lambda f: rotated(f, "x and eps"),
             lambda v, x_tau, alpha, sigma: DIFFUSION.split(v, x_tau, of_tau(alpha)), {
        "eps comes first; x is asked for first":
        lambda v, x, alpha, sigma: (sigma * x + alpha * v, alpha * x - sigma * v),
        "the sign of v is wrong in both": lambda v, x, alpha, sigma: (alpha * x + sigma * v, sigma * x - alpha * v),
        "that takes v for eps": lambda v, x, alpha, sigma: ((x - sigma * v) / alpha, v),
    }),
    Exercise("01", "ddim_step", stepped, lambda clean, eps, now, after, eta: DIFFUSION.ddim_step(
        clean, eps, *(int(of_tau(level[0])) for level in (now, after)), eta), {
        "the noise that stays is not less by what is drawn afresh": wrong_step(fresh_of, lambda s, n, d: n),
        "the noise that stays goes down to the level of `now`, not of `after`":
        wrong_step(fresh_of, lambda s, n, d: (s**2 - d**2) ** 0.5),
        "eta is missing: the deterministic step draws noise, too":
        wrong_step(lambda a, s, an, sn, eta: fresh_of(a, s, an, sn, 1.0), lambda s, n, d: (n**2 - d**2) ** 0.5),
    }),
    Exercise("01", "guide", guided, diffusion.guide, {
        "scale 1 has to give the conditional prediction; that adds the difference to it":
        lambda u, c, s: c + s * (c - u),
        "unconditional and conditional have each other's place": lambda u, c, s: c + s * (u - c),
        "the difference is missing: conditional times scale overshoots": lambda u, c, s: u + s * c,
    }),
    Exercise("02", "hinge_loss", hinged, lesson02.hinge_loss, {
        "real and reconstructed have each other's place": lambda real, fake: lesson02.hinge_loss(fake, real),
        "beyond the margin a score still earns: relu is missing":
        lambda real, fake: 0.5 * ((1 - real).mean() + (1 + fake).mean()),
        "the mean of the two is asked for, not the sum": lambda real, fake: 2 * lesson02.hinge_loss(real, fake),
    }),
    Exercise("02", "adaptive_weight", weighed, lesson02.adaptive_weight, {
        "the ratio is upside down: a GAN with a small gradient shall weigh more": wrong_weight(swapped=True),
        "the weight must not be learned: detach it": wrong_weight(detach=False),
        "the norm is the root of the sum of squares": wrong_weight(lambda g: g.abs().sum()),
    }),
    Exercise("03", "as_images", lambda f: {"the images": f(noise(2, 3, 4, 2, 2))},
             shown("b t c h w -> (b t) c h w", False), {
        "frames and clips are mixed up: the frames of a clip stand next to each other":
        shown("b t c h w -> (t b) c h w", False),
        "frames went into the channels; an image layer would see a clip as one picture":
        shown("b t c h w -> b (t c) h w", False),
        "channels are the second axis, clips and frames the first": shown("b t c h w -> b c t h w", False),
    }),
    Exercise("03", "as_clips", lambda f: {"the clips": f(noise(6, 4, 2, 3), 3)},
             shown("(b t) c h w -> b c t (h w)", True), {
        "frames are the outer axis of the batch there; here they are the inner one":
        shown("(t b) c h w -> b c t (h w)", True),
        "frames stand before the channels; a convolution looks for channels first":
        shown("(b t) c h w -> b t c (h w)", True),
        "the rows of pixels are read by columns": shown("(b t) c h w -> b c t (w h)", True),
    }),
    Exercise("03", "attend_over_frames", attended, attending("(b h w) t c", "(b h w) t c"), {
        "frame 0 does not change when frame 3 does: are frames in the batch axis?":
        attending("(b t) (h w) c", "(b t) (h w) c"),
        "a position attends to all positions of all frames, which is right, but not asked, and costs (t h w)^2":
        attending("b (t h w) c", "b (t h w) c"),
        "it goes there by positions and comes back otherwise: pixels have changed place":
        attending("(b h w) t c", "(b w h) t c"),
    }),
    Exercise("03", "merge", merged, lessons_merge, {
        "alpha belongs to z, the spatial branch: with alpha = 1 the image model is back":
        merging(lambda alpha, z, other: other + (1 - alpha) * (z - other)),
        "in exact arithmetic that is right, but where z' = z rounding gives another z: the untrained video model is no "
        "longer the image model": merging(lambda alpha, z, other: alpha * z + (1 - alpha) * other),
        "an alpha of each frame repeats from clip to clip: frame 1 of clip 0 got the alpha of frame 0": merging(
            lambda alpha, z, other: z + (1 - alpha) * (other - z), lambda alpha, n: alpha.repeat_interleave(n)),
    }),
    Exercise("03", "freeze", frozen, temporal.train_temporal_only, {
        "the embedding of the diffusion time learns: its name contains `time`, but it is spatial":
        freezing(lambda name: "time" in name),
        "the alphas do not learn: time_mixer is missing":
        freezing(lambda name: "time_mixer" not in name and temporal.is_temporal(name)),
        "the other way round: the image model learns and the temporal layers are frozen":
        freezing(lambda name: not temporal.is_temporal(name)),
    }),
    Exercise("04", "perceptual_distance", told_apart, lambda a, b: lesson04.perceptual_distance(
        lambda which: which, a, b), {
        "features are not normalised: a brighter picture is not another one":
        distances(lambda x: x, lambda d: d.sum(1).mean()),
        "squares are summed over the channels, not averaged": distances(unit, torch.mean),
        "scales are summed, not averaged": distances(unit, lambda d: d.sum(1).mean(), lambda all: sum(all) / len(all)),
    }),
    Exercise("04", "portions", cut_up, lessons_portions, {
        "they do not overlap": marching(lambda size, overlap: size),
        "the last portion is short; a network trained on clips wants it full":
        marching(lambda size, overlap: size - overlap, short_last=True),
        "that steps by the overlap": marching(lambda size, overlap: overlap or size),
    }),
    Exercise("04", "fade", lambda f: {"the faded frames": f(noise(3, 1, 2, 2), noise(3, 1, 2, 2, seed=1))},
             lessons_fade, {
        "from 0 to 1 the first frame is all old and the last all new: one step too long on either side":
        fading(lambda n: torch.linspace(0, 1, n)),
        "old and new have each other's weight": fading(lambda n: 1 - torch.arange(1, n + 1) / (n + 1)),
        "half and half does not fade: there are two small cuts in place of one":
        fading(lambda n: torch.full((n,), 0.5)),
    }),
    Exercise("05", "prediction_mask", known_first, lesson05.prediction_mask, {
        "one frame too many is known": lambda known, t: (torch.arange(t) <= known[:, None]).float(),
        "known and unknown are the other way round": lambda known, t: (torch.arange(t) >= known[:, None]).float(),
        "that marks the last frames": lambda known, t: (torch.arange(t) >= t - known[:, None]).float(),
    }),
    Exercise("05", "masked_context", told, lesson05.masked_context, {
        "unknown frames get through: z is not multiplied by the mask": telling(lambda z, m: torch.cat([z, m], dim=1)),
        "the mask is not told: a known frame of zeros and an unknown one look the same": telling(lambda z, m: m * z),
        "the mask comes last, as the new channel": telling(lambda z, m: torch.cat([m, m * z], dim=1)),
    }),
    Exercise("05", "context_guidance", by_context, lessons_guidance, {
        "the mask still says that frames are known where they are zero":
        lambda f, z, c, s: diffusion.guide(f(z, torch.cat([0 * c[:, :-1], c[:, -1:]], dim=1)), f(z, c), s),
        "the scale belongs to the difference": lambda f, z, c, s: s * f(z, c),
        "with and without context have each other's place": lambda f, z, c, s: diffusion.guide(f(z, c), f(z, 0 * c), s),
    }),
    Exercise("05", "long_prediction", iterated, lessons_iteration, {
        "one known frame each time: speed is lost at every seam, S = 2 keeps it": iterating(1),
        "the last known frame is written twice, a stutter at every seam": iterating(2, again=1),
        "three frames are known; the model was trained on 0, 1 and 2": iterating(3),
    }),
    Exercise("06", "interpolation_mask", lambda f: {"the mask, as numbers": f(2) * 1.0}, lesson06.interpolation_mask, {
        "known and unknown are the other way round": lambda clips: torch.tensor([0.0, 1, 1, 1, 0]).expand(clips, 5),
        "only the start is known: that is prediction": lambda clips: torch.tensor([1.0, 0, 0, 0, 0]).expand(clips, 5),
        "frames come last: clips t": lambda clips: torch.tensor([[1.0], [0], [0], [0], [1]]).expand(5, clips),
    }),
    Exercise("06", "length_after", lengths, lambda n, passes: lesson_length(n, passes), {
        "between N frames are N - 1 gaps": lambda n, passes: 4**passes * n,
        "the last frame is missing": lambda n, passes: 4**passes * (n - 1),
        "that is one pass, whatever is asked": lambda n, passes: 4 * (n - 1) + 1,
    }),
    Exercise("06", "interpolate", filled, lambda fill, z: lesson06.interpolate(lambda a, b, start: fill(a, b), z), {
        "frames between two pairs are there twice": filling(lambda out, z: out.flatten(0, 1)),
        "the last frame is missing": filling(lambda out, z: out[:, :-1].flatten(0, 1)),
        "only what was filled in is there": filling(lambda out, z: out[:, 1:-1].flatten(0, 1)),
    }),
    Exercise("07", "patches", cropped, lessons_patches, {
        "all clips are cut at the place of the first": lambda video, at, side: torch.stack(
            [clip[..., at[0][0] : at[0][0] + side, at[0][1] : at[0][1] + side] for clip in video]),
        "(top, left) is (y, x): they have each other's place": lambda video, at, side: torch.stack(
            [F.pad(clip, (0, 16, 0, 16))[..., x : x + side, y : y + side]
             for clip, (y, x) in zip(video, at, strict=True)]),
        "every frame is cut a little farther: time would hold nothing to learn": lambda video, at, side: torch.stack(
            [torch.stack([frame[..., y : y + side, x + i : x + i + side] for i, frame in enumerate(clip)])
             for clip, (y, x) in zip(video, at, strict=True)]),
    }),
    Exercise("07", "augmented", noised, lessons_augmented, {
        "each clip has a level, not each frame: the level of clip 0 went to the frames 0":
        lambda small, eps, levels, alpha, sigma: (DIFFUSION.diffuse(small.transpose(0, 1).flatten(0, 1), eps.transpose(
            0, 1).flatten(0, 1), levels.repeat_interleave(3)).unflatten(0, (3, 2)).transpose(0, 1)),
        "the frames are not scaled by alpha: the variance grows": noising(lambda a: a.view(-1, 1, 1, 1, 1), keep=False),
        "all clips have the level of the first": noising(lambda a: a[0]),
    }),
    Exercise("08", "keys_for", keys, lesson08.keys_for, {
        "the frame at the start is missing: N key frames have N - 1 gaps": lambda n, p: -(-(n - 1) // 4**p),
        "rounded down, the last frames are missing": lambda n, p: (n - 1) // 4**p + 1,
        "floats have 53 bits; long videos are rounded": lambda n, p: math.ceil((n - 1) / 4**p) + 1,
    }),
    Exercise("08", "batched", streamed, lesson08.batched, {
        "the last, shorter list is missing": lambda items, n: (list(x) for x in zip(*[iter(items)] * n, strict=False)),
        "lists are asked for, not tuples or iterators":
        lambda items, n: map(tuple, lesson08.batched(items, n)),
        "an empty list comes last; a stream of nothing has no lists":
        lambda items, n: itertools.chain(lesson08.batched(items, n), [[]]),
    }),
    Exercise("09", "noised_context", noised_ends, lambda z, eps, mask, levels, alpha, sigma: lesson09.augmented(
        SimpleNamespace(diffusion=DIFFUSION), z, mask, levels, eps), {
        "hidden frames are not zero: noise came behind the mask": noising_ends(lambda z, e, m, a, s: a * m * z + s * e),
        "known frames come clean: the level is told and not applied": noising_ends(lambda z, e, m, a, s: m * z),
        "known frames are not scaled by alpha": noising_ends(lambda z, e, m, a, s: m * (z + s * e)),
    }),
    Exercise("09", "within_reach", reached, lessons_reach, {
        "frames exactly `reach` away are within it": reaching(lambda d, reach: d.abs() < reach if reach else d == d),
        "attention is not causal: later frames are seen, too":
        reaching(lambda d, reach: (d >= 0) & (d <= reach) if reach else d == d),
        "reach 0 means any distance": reaching(lambda d, reach: d.abs() <= reach),
    }),
    Exercise("10", "captions", called, lessons_captions, {
        "the temporal layers have never seen the token": calling("a sks car", "a sks car"),
        "the token stands beside the class word, whose meaning it borrows, not in its place": calling("a sks"),
        "the token comes before the class word": calling("a car sks"),
    }),
    Exercise("10", "insert", put_together, lessons_insert, {
        "the video model's spatial weights went over the tuned ones: the subject is gone":
        lambda video, tuned: {**tuned, **video},
        "the temporal layers are missing: that is an image model": lambda video, tuned: dict(tuned),
        "the untuned video model was changed; what is there to compare with?": inserting_in_place,
    }),
    Exercise("12", "frechet_distance", measured, frechet_distance, {
        "the root of A B is not the root of its elements": apart(lambda A, B: (A @ B).trace().abs().sqrt()),
        "the means' distance is squared": apart(
            lambda A, B: torch.linalg.eigvals(A @ B).sqrt().real.sum(), squared=False),
        "covariances are unbiased, over n - 1": apart(
            lambda A, B: torch.linalg.eigvals(A @ B).sqrt().real.sum(), unbiased=False),
    }),
    Exercise("12", "ordering_holds", held, lessons_ordering, {
        "the mean alone does not tell: two seeds, or one far off, would do": holding(lambda d: d.mean() > 0),
        "the sign in every seed is not enough: two seeds, or a spread as large as the mean, would do":
        holding(lambda d: d.min() > 0),
        "two seeds prove nothing": holding(lambda d: d.min() > 0 and d.mean() > 2 * d.std() / len(d) ** 0.5),
    }),
)


def lesson_length(frames: int, passes: int) -> int:
    z = torch.zeros(frames, 1, 1, 1)
    for _ in range(passes):
        z = lesson06.interpolate(lambda first, last, start: first[:, None].expand(-1, 5, -1, -1, -1), z)
    return len(z)
