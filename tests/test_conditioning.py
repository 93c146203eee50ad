"""What the models are told: masks leak nothing, patches are the same in all frames, portions cover a video."""

import itertools
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from common.image_model import Conditioner, ImageModel, conditions
from common.portions import faded, in_portions
from common.temporal import TemporalOptions, grow, is_temporal
from extra.plan import count
from kit.data import DrivingScenes
from kit.errors import UserError
from kit.flags import preset_config
from kit.parallel import Share
from tests.test_network import randomise

lesson02, lesson03, lesson04 = (import_module(n) for n in ("02_image_ldm", "03_temporal_layers", "04_decoder_finetune"))
lesson05, lesson06, lesson07 = (import_module(n) for n in ("05_prediction", "06_interpolation", "07_upsampler"))
lesson08 = import_module("08_sample_long")


def smoke_image() -> object:
    """The smoke image model with random weights."""
    image = ImageModel(preset_config(lesson02.Config, lesson02.PRESETS, "smoke"))
    image.weights = randomise(image.unet()).state_dict()
    return image


def test_prediction_mask() -> None:
    mask = lesson05.prediction_mask(torch.tensor([0, 1, 2]), 4)
    assert mask.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert lesson06.interpolation_mask(2).tolist() == [[1, 0, 0, 0, 1]] * 2


@pytest.mark.parametrize("temporal", ["both", "conv", "attention"])
@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_masked_frame_leaks_nothing(temporal: str, known: int) -> None:
    image = smoke_image()
    config = preset_config(lesson05.Config, lesson05.PRESETS, "smoke", temporal=temporal)
    unet, t = randomise(lesson05.build(config, image)), config.frames
    z = torch.randn(t, *image.shape, generator=torch.Generator().manual_seed(0))
    mask = lesson05.prediction_mask(torch.tensor([known]), t)

    def output(z: torch.Tensor) -> torch.Tensor:
        c_S = lesson05.masked_context(z, mask)
        context = image.conditioner(conditions(1))
        with torch.no_grad():
            return lesson05.run_unet(unet, torch.zeros_like(z), torch.tensor([500]), context, c_S, config)

    before, hidden, seen = output(z), z.clone(), z.clone()
    hidden[known:] += 100.0
    assert torch.equal(output(hidden), before)
    if known:
        seen[:known] += 1.0
        assert not torch.allclose(output(seen), before)


def test_new_context_columns_start_at_zero_and_old_weights_arrive() -> None:
    image = smoke_image()
    config = preset_config(lesson05.Config, lesson05.PRESETS, "smoke")
    old = randomise(image.unet(TemporalOptions(ff_mult=config.feed_forward)), 3).state_dict()
    unet = lesson05.build(config, image)
    grow(unet, {name: value for name, value in old.items() if is_temporal(name)})
    new = unet.state_dict()
    name = "input_blocks.1.0.time_stack.in_layers.2.weight"
    width = old[name].shape[1]
    assert torch.equal(new[name][:, :width], old[name]) and not new[name][:, width:].any()
    skip = new["input_blocks.1.0.time_stack.skip_connection.weight"][..., 0, 0, 0]
    assert torch.equal(skip[:, :width], torch.eye(width)) and not skip[:, width:].any()
    assert torch.equal(new["input_blocks.1.0.time_mixer.mix_factor"], old["input_blocks.1.0.time_mixer.mix_factor"])
    tokens = new["input_blocks.1.0.time_stack.in_layers.0.weight"]
    assert tokens[width:].eq(1).all()
    other = image.unet(TemporalOptions(ff_mult=2 * config.feed_forward)).state_dict()
    trained = {"ema": {"shadow": {name: value for name, value in other.items() if is_temporal(name)}}}
    run = SimpleNamespace(trained=lambda lesson, lineage: trained, config=SimpleNamespace(resume=False))
    with pytest.raises(UserError, match="03_temporal_layers: .*--feed-forward"):
        lesson05.begin_with(run, image, unet, "03_temporal_layers")


@pytest.mark.parametrize("preset", ["cpu", "gpu", "paper", "biking"])
def test_attention_only_has_as_many_trained_parameters(preset: str) -> None:
    image = lesson02.planned(preset_config(lesson05.Config, lesson05.PRESETS, preset))
    counts = []
    for temporal in ("both", "attention"):
        config = preset_config(lesson05.Config, lesson05.PRESETS, preset, temporal=temporal)
        with torch.device("meta"):
            counts.append(count(image.unet(lesson05.temporal_options(config, image)), is_temporal))
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


def test_patches_are_cut_at_the_same_place_in_all_frames() -> None:
    clip = torch.rand(1, 1, 3, 64, 96, generator=torch.Generator().manual_seed(0)).expand(2, 5, 3, 64, 96)
    share = Share(range(6), 6, torch.Generator().manual_seed(1), torch.device("cpu"), lambda loss: None)
    assert lesson07.cut_from(share) == ([0, 1], [0, 1, 0, 1, 0, 1])
    cut = lesson07.patches(clip, [0, 1, 0, 1, 0, 1], 4, share)
    assert cut.shape == (6, 5, 3, 16, 16)
    assert torch.equal(cut, cut[:, :1].expand_as(cut))  # equal frames stay equal
    assert not torch.equal(cut[0], cut[1])  # and each patch has its own place


def test_small_frames_are_averages() -> None:
    large = torch.rand(2, 3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    small = lesson07.shrink(large)
    assert small.shape == (2, 3, 3, 2, 3)
    torch.testing.assert_close(small[1, 2, 0, 1, 1], large[1, 2, 0, 4:8, 4:8].mean())


@pytest.mark.parametrize("length", [1, 5, 6, 7, 12, 13, 17])
def test_portions_are_full_and_cover_every_frame_once(length: int) -> None:
    given = []
    for part, new in in_portions(torch.arange(length), 6):
        assert len(part) == min(6, length)  # the last one overlaps backwards
        given += part[-new:].tolist()
    assert given == list(range(length))


def test_a_short_rest_makes_the_last_portion_longer() -> None:
    def spans(length: int, rest: int) -> list[tuple[int, int]]:
        return [(int(part[0]), int(part[-1])) for part, _ in in_portions(torch.arange(length), 16, 4, rest)]

    assert spans(30, rest=4) == [(0, 15), (12, 29)]  # 34 frames to compute, not 48
    assert spans(32, rest=4) == [(0, 15), (12, 31)]
    assert spans(33, rest=4) == [(0, 15), (12, 27), (17, 32)] and spans(20, rest=4) == [(0, 19)]
    assert spans(30, rest=0) == [(0, 15), (12, 27), (14, 29)]


@pytest.mark.parametrize("length", [1, 5, 6, 7, 10, 13, 25])
@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("rest", [0, 1, 3])
def test_portions_fade_into_each_other(length: int, overlap: int, rest: int) -> None:
    portions = list(in_portions(torch.arange(length).float(), 6, overlap, rest))
    assert all(len(part) - new >= overlap for part, new in portions[1:])
    given = [round(float(x), 4) for x in faded(portions, overlap)]
    assert given == list(range(length))  # nothing is lost, nothing comes twice
    shifted = [(part + 100 * i, new) for i, (part, new) in enumerate(portions)]  # portions that disagree by 100
    steps = torch.stack(list(faded(shifted, overlap))).diff() - 1
    assert length == 1 or float(steps.max()) <= 100 / (overlap + 1) + 1e-3


@pytest.mark.parametrize(("keys", "frames"), [(8, 29), (29, 113), (2, 5)])
def test_interpolation_makes_4n_minus_3_frames_and_keeps_the_given_ones(keys: int, frames: int) -> None:
    class Guess(torch.nn.Module):
        def forward(self, z_tau, tau, context, c_S, stage):
            return torch.zeros_like(z_tau)

    image, run = smoke_image(), FakeRun()
    config = preset_config(lesson06.Config, lesson06.PRESETS, "smoke")
    z = torch.randn(keys, *image.shape, generator=torch.Generator().manual_seed(0))

    def fill(first: torch.Tensor, last: torch.Tensor, start: int) -> torch.Tensor:
        return lesson06.between(Guess(), image, first, last, 0, conditions(len(first)), config, run, start)

    out = lesson06.interpolate(fill, z, windows=3)
    assert len(out) == frames and torch.equal(out[::4], z)


def test_what_is_odd_in_the_noise_cancels_between_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that leaves a little of the noise, in each frame another part: of a noise and its negative, next to
    nothing is left, and of the noise alone it is."""

    class Leaving(torch.nn.Module):
        def forward(self, z_tau, tau, context, c_S, stage):
            return z_tau * 0.02 * (torch.arange(lesson06.FRAMES) % 2).repeat(len(tau)).view(-1, 1, 1, 1)

    image, config = smoke_image(), preset_config(lesson06.Config, lesson06.PRESETS, "smoke", calm=True)
    first, last = torch.randn(2, 3, *image.shape, generator=torch.Generator().manual_seed(0))

    def error() -> float:
        z = lesson06.between(Leaving(), image, first, last, 0, conditions(3), config, FakeRun())
        weight = lesson06.between_ends(z)
        return float((z - (1 - weight) * first[:, None] - weight * last[:, None]).square().mean().sqrt())

    both = error()
    monkeypatch.setattr(lesson06, "agreed", lambda one, other: one)
    assert both < 0.2 * error()


def test_samples_are_averaged_where_they_agree_and_one_is_kept_where_not() -> None:
    one = torch.tensor([1.0, 1.0, 5.0])
    found = lesson06.agreed(one, torch.tensor([1.0, 0.9, -5.0]))
    assert torch.allclose(found, torch.tensor([1.0, 0.95, 5.0]), atol=0.02)


class FakeRun:
    """Enough of a Run to sample with."""

    device = torch.device("cpu")

    def generator(self, *key: object) -> torch.Generator:
        return torch.Generator().manual_seed(len(key))

    def noise(self, shape: tuple[int, ...], *key: object) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.generator(*key))

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


def test_conditions_and_dropping() -> None:
    conditioner = randomise(Conditioner("labels", 8, 1))
    clips = conditions(2, night=1, cars=3)
    told, dropped = conditioner(clips), conditioner(clips, torch.tensor([True, False]))
    assert told.shape == (2, 1, 8) and torch.equal(told[1], dropped[1])
    assert torch.equal(dropped[0], conditioner(conditions(1))[0])  # dropped is the same as unknown
    boxes = randomise(Conditioner("boxes", 8, 1))
    some = boxes(conditions(1, boxes=[[0.1, 0.2, 0.3, 0.4]]))
    assert not torch.allclose(some, boxes(conditions(1, boxes=[[0.5, 0.2, 0.7, 0.4]])))
    text = randomise(Conditioner("text", 8, 1))
    assert not torch.allclose(text(conditions(1, caption="a red car")), text(conditions(1, caption="a")))


def test_clips_repeat_pick_and_join() -> None:
    clips = conditions(1, night=0, cars=3, caption="a").join(conditions(1, night=1, cars=4, caption="b"))
    rows = clips.repeat(2)
    assert rows.night.tolist() == [0, 0, 1, 1] and rows.captions == ["a", "a", "b", "b"] and len(rows) == 4
    assert rows.pick([3, 0]).cars.tolist() == [4, 3]


def test_clips_carry_speed_and_curvature() -> None:
    clips = DrivingScenes(16, 32, 30.0).clips((0,), 6, 2, 30.0)
    assert clips.speed.min() >= 3 and clips.speed.max() <= 9 and len(clips.curvature.unique()) > 1


@pytest.mark.parametrize("anchor", [True, False])
def test_an_error_that_known_frames_come_back_with_does_not_add_up(anchor: bool,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that makes everything a little brighter, the known frames among it: 8 frames, then 6 an extension."""

    def brighter(unet: None, image: None, known: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.cat([known, known[:, -1:].expand(-1, 8 - known.shape[1], -1, -1, -1)], 1) + 0.1

    monkeypatch.setattr(lesson05, "load", lambda run, image: (None, SimpleNamespace(ddim_steps=1)))
    monkeypatch.setattr(lesson05, "predict_clips", brighter)
    config = preset_config(lesson08.Config, lesson08.PRESETS, "cpu", anchor=anchor)
    frames = lesson08.key_frames(None, config, None, torch.zeros(1, 4, 2, 2), conditions(1), 0)
    levels = [float(frame.mean()) for frame in itertools.islice(frames, 20)]
    assert levels[:8] == pytest.approx([0, *[0.1] * 7])  # the first clip is left as it comes
    assert levels[8:] == pytest.approx([0.1] * 12 if anchor else [*[0.2] * 6, *[0.3] * 6])
