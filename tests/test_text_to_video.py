"""Lesson 9: text in both kinds of layers, the interpolation model's input, App. D, real checkpoints, and errors."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from common.image_model import ImageModel, conditions
from common.temporal import FrameAttention, is_temporal
from extra.metrics import said
from kit.errors import UserError
from kit.flags import preset_config
from tests.test_network import randomise
from tests.test_scripts import assert_known_good

lesson02, lesson04, lesson06, lesson09 = (
    import_module(name) for name in ("02_image_ldm", "04_decoder_finetune", "06_interpolation", "09_text_to_video")
)
CONFIG = preset_config(lesson09.Config, lesson09.PRESETS, "smoke")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lessons 2 (with text as well), 4 and 9 at the smoke preset."""
    out = tmp_path_factory.mktemp("text")
    for lesson, flags in ((lesson02, []), (lesson02, ["--condition", "text"]),
                          (lesson04, []), (lesson09, [])):  # fmt: skip
        lesson.main(["--preset", "smoke", "--out", str(out), *flags])
    return out


@pytest.fixture
def image() -> ImageModel:
    torch.manual_seed(0)
    image = ImageModel(preset_config(lesson02.Config, lesson02.PRESETS, "smoke", condition="text",
                                     parameterization="eps"))  # fmt: skip
    image.weights = randomise(image.unet()).state_dict()
    randomise(image.conditioner)
    return image


def latents(image: ImageModel, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, *image.shape, generator=torch.Generator().manual_seed(seed))


def test_the_key_frame_model_starts_as_the_image_model_and_then_reads_the_text_in_its_temporal_layers(image) -> None:
    unet, z, tau = lesson09.key_frame_model(CONFIG, image), latents(image, 4), torch.tensor([300])
    a, b = (image.conditioner(conditions(1, caption=caption)) for caption in ("a red car", "at night"))
    with torch.no_grad():
        assert torch.equal(unet(z, tau, a, frames=4, time_context=b), image.unet()(z, tau, a))
        randomise(unet)
        told, other = (unet(z, tau, a, frames=4, time_context=text) for text in (a, b))
        assert (told - other).abs().max() > 1e-4
        z[3] += 1
        assert (unet(z, tau, a, frames=4, time_context=a)[0] - told[0]).abs().max() > 1e-4
    assert all(is_temporal(name) == p.requires_grad for name, p in unet.named_parameters())
    assert all(p.numel() == 1 for name, p in unet.named_parameters() if name.endswith("mix_factor"))


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_masked_attention_reaches_so_far_and_no_farther(reach: int) -> None:
    attention, x = randomise(FrameAttention(8, 2)), torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = attention(x, 6, reach)
        x[5] += 1
        changed = (attention(x, 6, reach) - before).abs().amax(dim=(1, 2)) > 1e-6
    assert changed.tolist() == [reach == 0 or 5 - t <= reach for t in range(6)]


def test_longer_and_wider_clips_than_trained(image) -> None:
    unet, run = randomise(lesson09.key_frame_model(CONFIG, image)), FakeRun()
    text = lesson09.tokens(image.conditioner, conditions(2, caption="a red car"))
    c, h, w = image.shape
    for frames, wider in ((4, 1), (9, 1), (4, 2)):
        z = lesson09.sample_key_frames(unet, image, text, text, frames, CONFIG, run, wider=wider, reach=2)
        assert z.shape == (2, frames, c, wider * h, wider * w) and torch.isfinite(z).all()


def test_no_frame_is_told_a_brightness_by_its_noise(image) -> None:
    seen = []

    def unet(z_tau, tau, text, **_):
        seen.append(z_tau)
        return torch.zeros_like(z_tau)

    text = lesson09.tokens(image.conditioner, conditions(2, caption="a red car"))
    lesson09.sample_key_frames(unet, image, text, text, 4, CONFIG, FakeRun())
    means, spread = seen[0].mean(dim=(2, 3)), seen[0].std()
    assert means.abs().max() < 1e-5 and 0.8 < spread < 1.2


class FakeRun:
    """Enough of a Run to sample with."""

    device = torch.device("cpu")

    def generator(self, *key: object) -> torch.Generator:
        return torch.Generator().manual_seed(len(key))

    def noise(self, shape: tuple[int, ...], *key: object) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.generator(*key))

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


def test_spatial_and_temporal_layers_may_be_told_different_things(image) -> None:
    """As lesson 10 does. And guidance steers from the negative prompt."""
    seen = []

    def unet(z_tau, tau, text, *, frames, time_context, reach):
        seen.append((text, time_context))
        return torch.zeros_like(z_tau)

    spatial = lesson09.tokens(image.conditioner, conditions(1, caption="a red car"))
    temporal = lesson09.tokens(image.conditioner, conditions(1, caption="a car"), negative="night")
    lesson09.sample_key_frames(unet, image, spatial, temporal, 4, CONFIG, FakeRun())
    night = image.conditioner(conditions(1, caption="night"))
    for text, time_text in seen:  # the untold half of the batch, then the told one
        assert torch.equal(text, torch.cat([spatial[1], spatial[0]]))
        assert torch.equal(time_text, torch.cat([night, temporal[0]]))
    assert len(seen) == CONFIG.ddim_steps


def test_the_interpolation_model_sees_nothing_of_the_frames_between(image) -> None:
    mask, z = lesson06.interpolation_mask(1), latents(image, 5)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    known = lesson09.augmented(image, z, mask, torch.tensor([0]), eps)
    assert known.shape[1] == image.shape[0] + 1
    noise = float(image.diffusion.sigma[0])
    assert (known[[0, 4], :-1] - z[[0, 4]]).abs().max() < 6 * noise  # level 0 is next to nothing
    other = z.clone()
    other[1:4] = 100
    again = lesson09.augmented(image, other, mask, torch.tensor([0]), eps)
    assert torch.equal(known, again) and known[1:4].abs().max() == 0
    loud = lesson09.augmented(image, z, mask, torch.tensor([250]), eps)
    assert (loud[0, :-1] - z[0]).std() > 5 * (known[0, :-1] - z[0]).std()


def test_the_interpolation_model_is_wider_and_trained_as_a_whole(image) -> None:
    model = lesson09.Interpolator(CONFIG, image)
    assert model.unet.input_blocks[0][0].in_channels == 2 * image.shape[0] + 1
    assert all(p.requires_grad for p in model.parameters())
    randomise(model)
    z, known, text = latents(image, 5), latents(image, 5, 1), image.conditioner(conditions(1, caption="a"))
    known, tau = torch.cat([known, torch.ones_like(known[:, :1])], dim=1), torch.tensor([300])
    with torch.no_grad():
        outs = [model(z, tau, text, known, torch.tensor([fps]), torch.tensor([level]))
                for fps, level in ((7.5, 0), (30.0, 0), (7.5, 200))]  # fmt: skip
        quiet = model(z, tau, text, 0 * known, torch.tensor([7.5]), torch.tensor([0]))
    for other in (*outs[1:], quiet):  # the rate, the level and the known frames all matter
        assert (other - outs[0]).abs().max() > 1e-5
    assert lesson09.rate(torch.tensor([0, 1]), CONFIG).tolist() == [7.5, 30.0]


def test_ends_are_kept_and_8_frames_become_113(image) -> None:
    model, run = lesson09.Interpolator(CONFIG, image).eval(), FakeRun()
    text, z = lesson09.tokens(image.conditioner, conditions(1, caption="a")), latents(image, 8)
    keys = z
    for stage in (0, 1):
        z = lesson06.interpolate(
            lambda a, b, start, stage=stage: lesson09.between(model, image, a, b, stage, text, CONFIG, run, start), z)
    assert len(z) == 113 and torch.equal(z[::16], keys)


def test_what_captions_say() -> None:
    captions = ["a red car ahead on a left curve at night in the town", "an empty right curve by day in the snow",
                "an orange car of two ahead and one oncoming car on a straight road by day in the woods",
                "one oncoming car on a straight road at night in the snow", "bottles on a table"]  # fmt: skip
    assert said(captions).tolist() == [[1, 0, 0], [0, 2, 8], [0, 1, 6], [1, 1, 8], [-1, -1, -1]]


def test_smoke_writes_what_it_says(course: Path) -> None:
    folder = course / "09_text_to_video"
    for name in ("captions.png", "captions.gif", "app_d.png", "app_d_wide.png", "middle_frames.png"):
        assert (folder / name).stat().st_size > 0
    numbers = json.loads((folder / "numbers.json").read_text())
    assert "colour of the car ahead, read right, samples, chance" in numbers
    key_frames = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(is_temporal(name) for name in key_frames["model"])
    whole = torch.load(folder / "interpolation.pt", weights_only=True)["model"]
    assert any(not is_temporal(name) for name in whole)


def test_smoke_is_known_good(course: Path, capsys: pytest.CaptureFixture) -> None:
    assert_known_good("09_text_to_video", course, capsys)


def test_a_prompt_becomes_a_video(course: Path) -> None:
    flags = ["--preset", "smoke", "--out", str(course), "--upsampled-seconds", "0", "--prompt", "A red car, ahead!"]
    lesson09.main(flags)
    folder = course / "09_text_to_video-a-red-car-ahead"
    first = (folder / "long.webp").read_bytes()
    lesson09.main([*flags, "--negative", "night", "--seed", "1", "--overwrite"])
    assert (folder / "long.webp").read_bytes() != first
    with pytest.raises(UserError, match="another configuration"):
        lesson09.main(flags)


def test_resume_gives_the_same_weights(course: Path, tmp_path: Path) -> None:
    """Of the key frames and of the interpolation, which begins where the key frames end."""
    found = []
    for name, runs in (("once", [(4, 4)]), ("twice", [(2, 0), (4, 2), (4, 4)])):
        out = tmp_path / name
        out.mkdir()
        for part in ("02_image_ldm", "02_image_ldm-text"):
            (out / part).symlink_to(course / part)
        for i, (steps, more) in enumerate(runs):
            lesson09.main(["--preset", "smoke", "--out", str(out), "--spatial-steps", "2", "--steps", str(steps),
                           "--interpolation-steps", str(more), *(["--resume"] if i else [])])  # fmt: skip
            if not more:
                (out / "09_text_to_video" / "interpolation.pt").unlink()
        found.append([torch.load(out / "09_text_to_video" / file, weights_only=True)["model"]
                      for file in ("spatial.pt", "checkpoint.pt", "interpolation.pt")])  # fmt: skip
    for once, twice in zip(*found, strict=True):
        assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


def test_tuned_spatial_layers_are_found_again(course: Path, tmp_path: Path) -> None:
    for part in ("02_image_ldm", "02_image_ldm-text", "04_decoder_finetune"):
        (tmp_path / part).symlink_to(course / part)
    flags = ["--preset", "smoke", "--out", str(tmp_path)]
    lesson09.main([*flags, "--spatial-steps", "2"])
    run = lesson09.Run(lesson09.NAME, preset_config(lesson09.Config, lesson09.PRESETS, "smoke", out=str(tmp_path),
                                                    resume=True))  # fmt: skip
    image = lesson02.load(run, "text")
    before = image.weights["out.2.weight"]
    unet, _ = lesson09.load_key_frames(run, image)
    assert not torch.equal(before, unet.out[2].weight)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "make it with: python 02_image_ldm.py --preset smoke --out"),
        (["--key-frames", "1", "--prompt", "a"], "--key-frames at least 2"),
        (["--prompt", "a"], "--condition text"),
        (["--backbone", "sd2"], "is a shape"),
        (["--backbone", "nowhere.safetensors"], "needs --text-encoder"),
        (["--backbone", "nowhere.ckpt", "--text-encoder", "nowhere"], "no readable config.json"),
        (["--backbone", "sd1", "--size", "64", "--dry-run"], "height and width"),
        (["--backbone", "sd1", "--size", "70", "64", "--dry-run"], "multiples of 64"),
        (["--inspect", "nowhere.ckpt"], "no such file"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        lesson09.main(["--preset", "smoke", "--out", str(tmp_path), *flags])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "spatial", "temporal"), [("sd1", 859_520_964, 649_687_078), ("sd2", 865_910_724, 656_076_838)]
)
def test_dry_run_counts_the_published_parameters(backbone: str, spatial: int, temporal: int,
                                                 capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    lesson09.main(["--preset", "paper", "--backbone", backbone, "--dry-run"])
    rows = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert int(rows["unet spatial"]) == spatial and int(rows["unet trained"]) == temporal
    assert int(rows["autoencoder parameters"]) == 83_653_863
    assert rows["interpolation input"] == "(1024, 5, 9, 40, 64)" and rows["guidance"] == "8.0"
    assert float(rows["unet FLOPs per training step"]) > 1e15 and "GiB" in rows["unet memory, weights"]
