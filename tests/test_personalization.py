"""Lesson 10: who reads the token and who does not, what is tuned and what stays, the van, pictures, and errors."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.image_model import Conditioner
from common.temporal import is_temporal
from extra.pretrained import CaptionTokens, TextEncoder
from kit.errors import UserError
from kit.flags import preset_config
from kit.run import Run
from kit.scenes import Scene, scene_behind, van_scene
from tests.test_scripts import assert_known_good

lesson02, lesson09, lesson10 = (
    import_module(name) for name in ("02_image_ldm", "09_text_to_video", "10_personalization")
)
READS = ("02_image_ldm", "02_image_ldm-text", "09_text_to_video")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lessons 2 (with text as well), 9 and 10 at the smoke preset."""
    out = tmp_path_factory.mktemp("personal")
    for lesson, flags in ((lesson02, []), (lesson02, ["--condition", "text"]),
                          (lesson09, []), (lesson10, [])):  # fmt: skip
        lesson.main(["--preset", "smoke", "--out", str(out), *flags])
    return out


@pytest.fixture
def fresh(course: Path, tmp_path: Path) -> Path:
    """An OUT with what lesson 10 reads, and no lesson 10."""
    out = tmp_path / "out"
    out.mkdir()
    for part in READS:
        (out / part).symlink_to(course / part)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a folder of so many pictures, wide and tall ones."""

    def make(count: int) -> Path:
        path = tmp_path / "pictures"
        path.mkdir()
        for i in range(count):
            picture = np.full((40, 60 + i, 3) if i % 2 else (60 + i, 40, 3), 255 * (i % 2), np.uint8)
            Image.fromarray(picture).save(path / f"{i}.{'png' if i % 2 else 'jpg'}")
        return path

    return make


def open_run(out: Path) -> tuple[Run, object]:
    """A run in this OUT, and the backbone."""
    config = preset_config(lesson10.Config, lesson10.PRESETS, "smoke", out=str(out), resume=True)
    run = Run(lesson10.NAME, config)
    return run, lesson09.open_backbone(run, config)


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_smoke_is_known_good(course: Path, capsys: pytest.CaptureFixture) -> None:
    assert_known_good("10_personalization", course, capsys)


def test_smoke_writes_what_it_says(course: Path) -> None:
    out = course / "10_personalization"
    for name in ("instances.png", "images.png", "videos.png", "personalised.gif", "untuned.gif", "metrics.png"):
        assert (out / name).stat().st_size > 0
    numbers = json.loads((out / "numbers.json").read_text())
    for name in ("personalised videos", "untuned videos", "personalised videos, no token", "personalised images",
                 "real vans", "personalised less untuned videos"):  # fmt: skip
        assert 0 <= numbers[f"van seen, {name}"]["value"] <= 1
    assert numbers["colour change, personalised over untuned"]["value"] > 0
    assert all(line.startswith("a sks car ") for line in (out / "captions.txt").read_text().splitlines())


def test_all_spatial_weights_and_the_text_encoder_are_tuned_and_nothing_else(course: Path) -> None:
    content = torch.load(course / "10_personalization" / "checkpoint.pt", weights_only=True)
    run, image = open_run(course)
    spatial = {f"unet.{name}" for name in image.weights}
    assert {name for name in content["model"] if name.startswith("unet.")} == spatial
    rest = {name for name in content["model"]} - spatial
    assert rest == {f"conditioner.{name}" for name in image.conditioner.state_dict()}
    changed = [name for name in image.weights if not torch.equal(content["model"]["unet." + name], image.weights[name])]
    assert len(changed) > 0.9 * len(image.weights)


def test_resume_gives_the_same_weights(fresh: Path) -> None:
    found = []
    for runs in ([4], [2, 4]):
        for i, steps in enumerate(runs):
            flags = ["--overwrite"] if not i else ["--resume"]
            lesson10.main(["--preset", "smoke", "--out", str(fresh), "--steps", str(steps), *flags])
        content = torch.load(fresh / "10_personalization" / "checkpoint.pt", weights_only=True)
        found.append(content["model"] | {f"ema {name}": v for name, v in content["ema"]["shadow"].items()})
    assert equal(*found)


def test_the_subject_is_called_by_the_token_and_the_class_is_not(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the original text encoder stays what it was."""
    run, image = open_run(fresh)
    before, weights = copied(image.conditioner), dict(image.weights)
    pictures, captions, prior_captions = lesson10.subject(run.config, image)
    prior, read, forward = torch.randn(len(prior_captions), *image.shape), [], Conditioner.forward

    def recorded(self: Conditioner, clips, drop=None):
        read.append((self is image.conditioner, clips.captions))
        return forward(self, clips, drop)

    monkeypatch.setattr(Conditioner, "forward", recorded)
    lesson10.train(run, run.config, image, pictures, captions, prior, prior_captions)
    assert len(read) == run.config.steps and not any(original for original, _ in read)
    for _, rows in read:
        assert len(rows) == 2 * run.config.batch  # in turn
        assert all(row.startswith("a sks car ahead ") or row.startswith("a sks car of ") for row in rows[::2])
        assert all(row.startswith("a car ") and "sks" not in row and "purple" not in row for row in rows[1::2])
    assert equal(before, image.conditioner.state_dict()) and equal(weights, image.weights)
    tuned = lesson10.load(run, image)
    assert not equal(tuned.conditioner.state_dict(), before)
    assert equal(before, image.conditioner.state_dict()) and not equal(tuned.weights, weights)


def test_temporal_layers_are_lesson_9s_bit_for_bit(course: Path) -> None:
    run, image = open_run(course)
    video, _ = lesson09.load_key_frames(run, image)
    tuned, untouched = lesson10.load(run, image), copied(video)
    now = lesson10.insert(video, tuned).state_dict()
    shadow = torch.load(course / "09_text_to_video" / "checkpoint.pt", weights_only=True)["ema"]["shadow"]
    assert {name for name in now if is_temporal(name)} == shadow.keys()
    assert all(torch.equal(now[name], value) for name, value in shadow.items())
    assert equal({name: value for name, value in now.items() if not is_temporal(name)}, tuned.weights)
    assert equal(untouched, video.state_dict()) and not torch.equal(now["out.2.weight"], untouched["out.2.weight"])


def test_spatial_layers_read_the_token_and_temporal_ones_do_not(course: Path) -> None:
    run, image = open_run(course)
    tuned, seen = lesson10.load(run, image), []

    def network(z_tau, tau, text, *, frames, time_context, reach):
        seen.append((text, time_context))
        return torch.zeros_like(z_tau)

    wanted, plain = (lesson10.asked(run.config, ["in the snow"], token) for token in (True, False))
    assert wanted.captions == ["a sks car in the snow"] and plain.captions == ["a car in the snow"]
    video = lesson10.sample_videos(run, run.config, network, image, tuned.conditioner, wanted, plain, 4, "")
    assert video.shape == (1, 4, 3, image.config.height, image.config.width)
    spatial, temporal = lesson09.tokens(tuned.conditioner, wanted), lesson09.tokens(image.conditioner, plain)
    others = tuned.conditioner(plain), image.conditioner(wanted), image.conditioner(plain)
    assert not any(torch.equal(spatial[0], other) for other in others)
    assert len(seen) == run.config.ddim_steps
    for text, time_context in seen:  # guided: without the text, and with it
        assert torch.equal(text, torch.cat(spatial[::-1])) and torch.equal(time_context, torch.cat(temporal[::-1]))


def test_a_text_encoder_of_stable_diffusion_is_tuned_as_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 1}')
    (tmp_path / "tokenizer.json").write_text("{}")

    def model(self: TextEncoder) -> None:
        self.model = nn.Linear(8, 8).requires_grad_(False)

    monkeypatch.setattr(TextEncoder, "load", model)
    original = CaptionTokens(TextEncoder(tmp_path, "cpu", tmp_path / "captions"))
    original.encoder.load()
    tuned = lesson10.trainable(original)
    assert tuned.encoder.cache is None and all(p.requires_grad for p in tuned.parameters())
    assert len(list(tuned.parameters())) == 2
    assert original.encoder.cache is not None and not any(p.requires_grad for p in original.parameters())


def test_the_scenes_of_before_are_unchanged() -> None:
    """Brightness is pinned to what it was before there were vans; a drive behind its own car is that drive."""
    times = np.array([3.0, 7.0])
    pinned = [56.1292, 118.6753, 42.5918, 43.1963, 94.57, 79.7521]
    for seed, mean in enumerate(pinned):
        assert abs(Scene(seed).render(times[:1], 32, 64).mean() - mean) < 0.05
    seen = 0
    for seed in range(12):
        plain, behind, van = Scene(seed), scene_behind(seed), van_scene(seed)
        assert not any(car.stripes for car in plain.cars + behind.cars)
        if any(not car.oncoming for car in plain.cars):
            seen += 1
            assert behind.caption == plain.caption
            assert np.array_equal(behind.render(times, 32, 64), plain.render(times, 32, 64))
        assert any(not car.oncoming for car in behind.cars)
        assert [car for car in van.cars if not car.stripes] == [c for c in behind.cars if c.start != nearest(van).start]
    assert 0 < seen < 12  # on empty roads a car is put


def nearest(scene: Scene):
    return min((car for car in scene.cars if not car.oncoming), key=lambda car: car.start)


def test_the_van_can_be_seen_and_is_in_its_box() -> None:
    for seed in range(8):
        van, scene, times = nearest(van_scene(seed)), van_scene(seed), np.array([2.0])
        assert van.stripes and scene.caption.startswith("a purple van ")
        full = scene.render(times, 64, 128)[0].astype(int)
        x0, y0, x1, y1 = scene.boxes(times)[0][scene.cars.index(van)]
        scene.cars.remove(van)
        changed = np.abs(scene.render(times, 64, 128)[0] - full).max(-1) > 12
        rows, columns = slice(round(64 * y0), round(64 * y1)), slice(round(128 * x0), round(128 * x1))
        assert changed[rows, columns].mean() > 0.85
        pixels = full[rows, columns].reshape(-1, 3)
        yellow = (pixels[:, 0] > 1.5 * pixels[:, 2]) & (pixels[:, 1] > 1.3 * pixels[:, 2])
        purple = (pixels[:, 0] > 1.2 * pixels[:, 1]) & (pixels[:, 2] > 1.2 * pixels[:, 1])
        assert yellow.mean() > 0.15 and purple.mean() > 0.3


def test_the_reader_learns_from_vans_and_from_purple_cars() -> None:
    scenes = [lesson10.van_or_not([0, 4, 0, i, 0]) for i in range(16)]
    assert sum(" van " in scene.caption for scene in scenes) == 8
    assert sum(scene.caption.startswith("a purple car ") for scene in scenes) >= 4
    torch.manual_seed(0)
    reader = lesson10.VanReader(lambda video: video)
    assert reader(torch.zeros(2, 3, 64, 128)).shape == (2,)


def test_pictures_are_fitted_and_turned_upright(folder: Callable[[int], Path]) -> None:
    path = folder(4)
    sideways = Image.new("RGB", (100, 50))
    sideways.paste((255, 0, 0), (0, 0, 50, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right: what is left in the file is at the top
    sideways.save(path / "9.jpg", exif=exif, quality=95)
    pictures = lesson10.read_pictures(str(path), 16, 16)
    assert pictures.shape == (5, 1, 3, 16, 16) and pictures.dtype == torch.float32
    assert pictures.mean(dim=(1, 2, 3, 4))[:4].tolist() == [-1, 1, -1, 1]
    assert pictures[4, 0, 0, :6].mean() > 0.9 and pictures[4, 0, 0, -6:].mean() < -0.9


def test_a_folder_of_pictures(fresh: Path, folder: Callable[[int], Path]) -> None:
    lesson10.main(["--preset", "smoke", "--out", str(fresh), "--instances", str(folder(3)), "--token", "rare",
                   "--class-word", "frog", "--places", "on a beach", "in the snow"])  # fmt: skip
    out = fresh / "10_personalization"
    assert (out / "captions.txt").read_text() == "a rare frog on a beach\na rare frog in the snow\n"
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers and not any("van" in name for name in numbers) and not (out / "reader.pt").exists()


def test_bad_pictures_are_one_line(fresh: Path, folder: Callable[[int], Path]) -> None:
    flags, path = ["--preset", "smoke", "--out", str(fresh), "--overwrite", "--instances"], folder(2)
    empty = path / "empty"
    empty.mkdir()
    for given, says in ((path / "nowhere", "no such folder"), (empty, "no png or jpg pictures in it"),
                        (path, "2 png or jpg pictures in it, 3 are the least")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            lesson10.main([*flags, str(given)])
    (path / "2.png").write_bytes((path / "1.png").read_bytes()[:60])
    with pytest.raises(UserError, match="2.png: not a readable picture") as error:
        lesson10.main([*flags, str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--condition text"),
        (["--data", "clips", "--final-fps", "30"], "also needs --instances"),
        (["--backbone", "nowhere.safetensors"], "needs --text-encoder"),
        (["--backbone", "sd1"], "is a shape"),
        (["--backbone", "sd1", "--size", "64", "--dry-run"], "height and width"),
        (["--preset", "biking"], "this script has smoke, cpu, gpu, paper"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        lesson10.main(["--preset", "smoke", "--out", str(tmp_path), *flags])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_lesson_9_must_be_there_and_of_the_same_backbone(course: Path, fresh: Path) -> None:
    (fresh / "09_text_to_video").unlink()
    with pytest.raises(UserError, match="make it with: python 09_text_to_video.py"):
        lesson10.main(["--preset", "smoke", "--out", str(fresh)])
    run, image = open_run(course)
    image.config.height *= 2
    with pytest.raises(UserError, match="10_personalization/checkpoint.pt was trained with height 16"):
        lesson10.load(run, image)


def test_dry_run_counts_the_published_parameters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lesson10.main(["--preset", "paper", "--dry-run", "--out", str(tmp_path / "new")])
    rows = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["unet trained"] == "859520964" and rows["video unet temporal"] == "649687078"
    assert (rows["prior_images"], rows["steps"], rows["lr"], rows["text"]) == ("256", "800", "1e-06", "(2, 77, 768)")
    assert not (tmp_path / "new").exists()
