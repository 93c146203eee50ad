"""Lesson 11: what its network sees, same crops, the start as the image upsampler, resuming, the x4 file, errors."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.autoencoder import Autoencoder
from common.image_model import ImageModel, conditions
from common.temporal import is_temporal
from common.unet import UNet
from kit.errors import UserError
from kit.flags import preset_config
from kit.measures import seam
from kit.run import Run
from tests.test_network import randomise
from tests.test_scripts import assert_known_good

lesson02, lesson09, lesson11 = (
    import_module(name) for name in ("02_image_ldm", "09_text_to_video", "11_latent_upsampler")
)
CONFIG = preset_config(lesson11.Config, lesson11.PRESETS, "smoke")
FLAGS = ["--preset", "smoke", "--threads", "1"]
X4 = dict(in_channels=7, out_channels=4, channels=16, multipliers=(1, 2), depth=1, attention=(1, 2), text_only=(1,),
          heads=8, context_dim=1024, label_classes=1000)  # fmt: skip


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lessons 2 (with text as well) and 11 at the smoke preset."""
    out = tmp_path_factory.mktemp("latent")
    for lesson, flags in ((lesson02, []), (lesson02, ["--condition", "text"]),
                          (lesson11, [])):  # fmt: skip
        lesson.main([*FLAGS, "--out", str(out), *flags])
    return out


@pytest.fixture
def image() -> ImageModel:
    torch.manual_seed(0)
    image = ImageModel(preset_config(lesson02.Config, lesson02.PRESETS, "smoke", condition="text"))
    randomise(image.conditioner)
    return image


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linked(course: Path, out: Path) -> str:
    """A new OUT with the course's lesson 2."""
    out.mkdir(exist_ok=True)
    for part in ("02_image_ldm", "02_image_ldm-text"):
        (out / part).symlink_to(course / part)
    return str(out)


# %% The network


def test_it_starts_as_the_image_upsampler_and_then_everything_matters(image: ImageModel) -> None:
    unet = lesson11.network(CONFIG, image)
    for name, p in unet.named_parameters():  # spatial weights as after training, temporal ones as they begin
        if not is_temporal(name):
            torch.nn.init.normal_(p, 1.0 if "norm" in name and p.dim() == 1 else 0.0, 0.05)
    tau, level = torch.tensor([300]), torch.tensor([30])
    given = dict(z_tau=noise(4, 4, 8, 8), small=noise(4, 3, 8, 8, seed=1), tau=tau, level=level,
                 text=image.conditioner(conditions(1, caption="a red car")))  # fmt: skip
    with torch.no_grad():
        still = lesson11.denoise(unet, **given)
        assert still.shape == (4, 4, 8, 8) and still.abs().max() > 0
        assert torch.equal(lesson11.denoise(unet, **given, frames=4), still)
        randomise(unet)
        before = lesson11.denoise(unet, **given, frames=4)
        others = dict(small=noise(4, 3, 8, 8, seed=2), level=level + 200, tau=tau + 100,
                      text=image.conditioner(conditions(1, caption="at night")))  # fmt: skip
        for name, other in others.items():
            assert (lesson11.denoise(unet, **given | {name: other}, frames=4) - before).abs().max() > 1e-4, name
        given["z_tau"][3] += 1
        assert (lesson11.denoise(unet, **given, frames=4)[0] - before[0]).abs().max() > 1e-4  # frames mix


def test_temporal_layers_read_text_positions_and_small_frames(image: ImageModel) -> None:
    names = {name for name, _ in lesson11.network(CONFIG, image).named_parameters() if is_temporal(name)}
    for part in ("time_stack.0.attn2", "time_pos_embed", "time_context"):
        assert any(part in name for name in names), part


def test_all_frames_of_a_clip_are_cut_at_the_same_place(course: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """In frames that all show the same, a clip of patches must show the same in every frame, small and large."""
    seen = []

    class Still:
        def __init__(self, source) -> None:
            self.source, self.labelled = source, False

        def clips(self, *args):
            clips = self.source.clips(*args)
            clips.video = noise(1, 1, *clips.video.shape[2:]).expand(clips.video.shape)
            return clips

    def encode(image, video):
        seen.append(video)
        return ENCODE(image, video)

    ENCODE, opened = ImageModel.encode, lesson11.open_data
    monkeypatch.setattr(lesson11, "open_data", lambda *args: Still(opened(*args)))
    monkeypatch.setattr(ImageModel, "encode", encode)
    monkeypatch.setattr(lesson11, "evaluate", lambda *args: None)
    lesson11.main([*FLAGS, "--out", linked(course, tmp_path / "out")])
    clips = [video for video in seen if video.shape[1] == CONFIG.frames]
    assert len(clips) == CONFIG.steps and clips[0].shape == (2, 3, 3, 16, 16)
    assert all(torch.equal(video[:, :1].expand_as(video), video) for video in clips)
    assert not torch.equal(clips[0][0], clips[0][1])  # and another place for each patch


def test_the_seam_is_the_step_into_the_frame() -> None:
    truth = noise(1, 6, 3, 4, 4)
    video = truth + torch.tensor([0, 1.0, 2, 3, 13, 14]).view(1, 6, 1, 1, 1)
    assert seam(video, truth, 4) == pytest.approx(10)


# %% The script


def test_smoke_is_known_good(course: Path, capsys: pytest.CaptureFixture) -> None:
    assert_known_good("11_latent_upsampler", course, capsys)


def test_smoke_writes_what_it_says(course: Path) -> None:
    folder = course / "11_latent_upsampler"
    for name in ("upsampled.png", "upsampled.gif", "image.png", "metrics.png"):
        assert (folder / name).stat().st_size > 0
    numbers = json.loads((folder / "numbers.json").read_text())
    for name in ("bilinear", "image upsampler", "video upsampler", "autoencoder alone"):
        assert numbers[f"PSNR, {name}"]["value"] > 0 and numbers[f"flicker, {name}"]["value"] > 0
    assert "flicker, change" in numbers and "flicker at the seam of portions over elsewhere" in numbers
    spatial, temporal = (torch.load(folder / f"{file}.pt", weights_only=True)["model"]
                         for file in ("image", "checkpoint"))  # fmt: skip
    assert not any(map(is_temporal, spatial)) and all(map(is_temporal, temporal))


def test_upsample_takes_a_stream_and_the_weights_of_the_out_it_is_in(course: Path) -> None:
    config = preset_config(lesson09.Config, lesson09.PRESETS, "smoke", out=str(course))
    run = Run("09_text_to_video-test", config)  # another lesson's, as when lesson 9 calls
    frames, text = noise(5, 3, 16, 32).clamp(-1, 1), conditions(1, caption="a red car")
    large = torch.stack(list(lesson11.upsample(run, iter(frames), text)))  # 3, and 2 overlapping backwards
    assert large.shape == (5, 3, 64, 128) and large.abs().max() <= 1
    assert torch.equal(large, torch.stack(list(lesson11.upsample(run, frames, text))))
    images = torch.stack(list(lesson11.upsample(run, frames, text, video=False)))
    assert images.shape == large.shape and not torch.equal(images, large)
    unet, image, _ = lesson11.load(run)
    for name, part in (("image", False), ("checkpoint", True)):
        shadow = torch.load(course / lesson11.NAME / f"{name}.pt", weights_only=True)["ema"]["shadow"]
        loaded = {n: p for n, p in unet.named_parameters() if is_temporal(n) == part}
        assert shadow.keys() == loaded.keys() and all(torch.equal(shadow[n], loaded[n]) for n in shadow)


@pytest.mark.parametrize("residual", [False, True])
def test_a_perfect_network_gives_the_latents_of_the_large_frames(course: Path, residual: bool,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset_config(lesson09.Config, lesson09.PRESETS, "smoke", out=str(course))
    run = Run("09_text_to_video-test", config)
    unet, image, config = lesson11.load(run)
    config.residual = residual
    diffusion, z = lesson11.lesson07.make_diffusion(config, run.device), noise(3, image.shape[0], 16, 32)

    def perfect(unet: UNet, z_tau: torch.Tensor, tau: torch.Tensor, low: torch.Tensor, level: torch.Tensor,
                *others: object) -> torch.Tensor:
        mu, s = lesson11.what_is_known(config, diffusion, image, low, level)
        alpha, sigma = diffusion.levels(tau, z_tau)
        x = (z - mu) / s
        return alpha * (z_tau - alpha * x) / sigma - sigma * x  # v

    monkeypatch.setattr(lesson11, "denoise", perfect)
    text = conditions(1, caption="a red car")
    found = torch.stack(list(lesson11.upsampled(run, config, image, unet, noise(3, 3, 16, 32), text)))
    torch.testing.assert_close(found, image.decode(z)[:, 0], rtol=0, atol=0.05)  # bfloat16


def test_lesson_9_finds_it(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [frame.clamp(-1, 1) for frame in noise(17, 3, 16, 32)]
    monkeypatch.setattr(lesson09, "frames_of", lambda *args: iter(small))
    flags = [*FLAGS, "--out", str(course), "--key-frames", "2", "--upsampled-seconds", "0.1"]
    lesson09.main([*flags, "--prompt", "a car"])
    assert (course / "09_text_to_video-a-car" / "long-large.webp").stat().st_size > 0


def test_without_it_lesson_9_enlarges_pixels(course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture) -> None:
    small, out = [frame.clamp(-1, 1) for frame in noise(17, 3, 16, 32)], tmp_path / "out"
    monkeypatch.setattr(lesson09, "frames_of", lambda *args: iter(small))
    flags = [*FLAGS, "--out", linked(course, out), "--key-frames", "2", "--upsampled-seconds", "0.1"]
    flags += ["--prompt", "a car"]
    lesson09.main(flags)
    assert "small frames only" in capsys.readouterr().out
    assert not (out / "09_text_to_video-a-car" / "long-large.webp").exists()
    import_module("07_upsampler").main([*FLAGS, "--out", str(out)])
    lesson09.main([*flags, "--overwrite"])
    assert "enlarging pixels, with 07_upsampler" in capsys.readouterr().out
    with Image.open(out / "09_text_to_video-a-car" / "long-large.webp") as large:
        assert large.size == (4 * 32, 4 * 16) and large.n_frames == 3


def test_resume_gives_the_same_weights(course: Path, tmp_path: Path) -> None:
    """Stopped in the first training, and in the second."""
    found = []
    for name, runs in (("once", [(4, 4)]), ("twice", [(2, 0), (4, 2), (4, 4)])):
        out = linked(course, tmp_path / name)
        for i, (image_steps, steps) in enumerate(runs):
            lesson11.main([*FLAGS, "--out", out, "--image-steps", str(image_steps), "--steps", str(steps),
                           *(["--resume"] if i else [])])  # fmt: skip
        found.append([torch.load(Path(out) / lesson11.NAME / file, weights_only=True)
                      for file in ("image.pt", "checkpoint.pt")])  # fmt: skip
    for once, twice in zip(*found, strict=True):
        assert once["step"] == twice["step"] == 4
        for a, b in ((once["model"], twice["model"]), (once["ema"]["shadow"], twice["ema"]["shadow"])):
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("preset", lesson11.PRESETS)
def test_dry_run_prints_rows_and_writes_nothing(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lesson11.main(["--preset", preset, "--dry-run", "--out", str(tmp_path / "out")])
    rows = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(rows["unet FLOPs per training step"]) > 0 and not (tmp_path / "out").exists()
    assert rows["unet trained"] == rows["unet temporal"]


def test_dry_run_counts_the_published_parameters(capsys: pytest.CaptureFixture) -> None:
    lesson11.main(["--preset", "paper", "--dry-run"])
    rows = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert int(rows["unet spatial"]) == 473_398_020 and int(rows["unet temporal"]) == 455_188_006
    assert int(rows["unet temporal, at Table 6's width of cross-attention"]) == 449_420_838
    assert int(rows["autoencoder parameters"]) == 55_325_927
    assert rows["input"] == "(256, 8, 7, 80, 80)" and rows["large frames"] == "(8, 3, 1280, 2048)"
    assert float(rows["unet FLOPs per training step"]) > 1e15 and "GiB" in rows["unet memory, weights"]


# %% The public upscaler's kind of file


def x4_file(path: Path, factor_levels: int = 3, **changes: int) -> Path:
    """A small network of the x4 upscaler's kind under CompVis's names, with random weights."""
    torch.manual_seed(0)
    unet, autoencoder = randomise(UNet(**X4 | changes)), Autoencoder(16, (1,) * factor_levels, 1, 4, "kl")
    torch.save({"state_dict": {"model.diffusion_model." + name: value for name, value in unet.state_dict().items()}
                | {"first_stage_model." + name: value for name, value in autoencoder.state_dict().items()}}, path)
    return path  # fmt: skip


def fake_clip(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 1024, "num_hidden_layers": 2}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def clip(folder: Path) -> Path:
    """A CLIP text model as wide as OpenCLIP ViT-H and otherwise small, with a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        eos_token_id=len(words) - 1, bos_token_id=len(words) - 2)  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    transformers.CLIPTokenizer(str(folder / "tokenizer" / "vocab.json"), str(folder / "tokenizer" / "merges.txt")
                               ).save_pretrained(folder / "tokenizer")  # fmt: skip
    return folder


def test_temporal_layers_are_trained_on_an_x4_file(tmp_path: Path) -> None:
    flags = [*FLAGS, "--out", str(tmp_path / "out"), "--steps", "1", "--size", "16", "32", "--backbone",
             str(x4_file(tmp_path / "x4.ckpt")), "--text-encoder", str(clip(tmp_path / "clip"))]  # fmt: skip
    lesson11.main(flags)
    folder = tmp_path / "out" / lesson11.NAME
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["step"] == 1 and all(map(is_temporal, content["model"])) and not (folder / "image.pt").exists()
    run = Run(lesson11.NAME, preset_config(lesson11.Config, lesson11.PRESETS, "smoke", out=str(tmp_path / "out"),
                                           resume=True))  # fmt: skip
    unet, image, config = lesson11.load(run)
    weights = torch.load(tmp_path / "x4.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(p, weights["model.diffusion_model." + n]) for n, p in unet.named_parameters()
               if not is_temporal(n))  # fmt: skip
    assert float(image.autoencoder.scale) == pytest.approx(0.08333) and config.backbone.endswith("x4.ckpt")
    large = list(lesson11.upsample(run, noise(2, 3, 16, 32).clamp(-1, 1), conditions(1, caption="a cat")))
    assert len(large) == 2 and large[0].shape == (3, 64, 128)


# %% Errors


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "make it with: python 02_image_ldm.py --preset smoke --out"),
        (["--backbone", "x4"], "is a shape"),
        (["--backbone", "nowhere.safetensors"], "needs --text-encoder"),
        (["--backbone", "sd2", "--dry-run"], "not the x4 upscaler, whose U-Net has 4 + 3 input channels"),
        (["--backbone", "x4", "--size", "70", "64", "--dry-run"], "multiples of 64"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        lesson11.main([*FLAGS, "--out", str(tmp_path), *flags])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("patch", [3, 18])
def test_a_patch_that_does_not_fit(course: Path, patch: int, tmp_path: Path) -> None:
    out = linked(course, tmp_path / "out")
    with pytest.raises(UserError, match=f"--patch {patch}, small frames 16 x 32.*multiples of 2"):
        lesson11.main([*FLAGS, "--out", out, "--patch", str(patch)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [(dict(in_channels=4), "here 4 channels, 1000 classes"), (dict(factor_levels=2), "f = 2, only f = 4")],
)
def test_a_backbone_of_another_kind(changes: dict, says: str, tmp_path: Path) -> None:
    flags = [*FLAGS, "--out", str(tmp_path), "--size", "16", "32", "--text-encoder", str(fake_clip(tmp_path / "clip"))]
    with pytest.raises(UserError, match=says):
        lesson11.main([*flags, "--backbone", str(x4_file(tmp_path / "other.ckpt", **changes))])


def test_lesson_2_with_another_factor(tmp_path: Path) -> None:
    """As of its gpu preset. The remedy works for both of its models."""
    flags = [*FLAGS, "--out", str(tmp_path), "--ae-multipliers", "1", "1", "--ae-steps", "1", "--steps", "1"]
    lesson02.main(flags)
    lesson02.main([*flags, "--condition", "text"])
    with pytest.raises(UserError, match="f = 2, only f = 4.*--ae-multipliers 1 2 4"):
        lesson11.main([*FLAGS, "--out", str(tmp_path)])


def test_a_checkpoint_of_another_lesson_2(course: Path, tmp_path: Path) -> None:
    out = Path(linked(course, tmp_path / "out"))
    (out / lesson11.NAME).mkdir()
    for name in ("image.pt", "checkpoint.pt"):
        content = torch.load(course / lesson11.NAME / name, weights_only=True)
        content["lineage"]["latent_scale"] *= 2
        torch.save(content, out / lesson11.NAME / name)
    run = Run("09_text_to_video", preset_config(lesson09.Config, lesson09.PRESETS, "smoke", out=str(out)))
    with pytest.raises(UserError, match="was trained with latent_scale"):
        lesson11.upsample(run, [], conditions(1))
