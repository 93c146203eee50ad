"""Real weights: the same numbers as independent implementations, and files that do not fit."""

import json
import resource
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from common.autoencoder import Autoencoder
from common.loop import adamw
from common.temporal import TemporalOptions, is_temporal, train_temporal_only
from common.unet import UNet
from extra.pretrained import (
    SHAPES,
    Report,
    StableDiffusion,
    TextEncoder,
    architecture,
    autoencoder_architecture,
    check_text_to_image,
    from_diffusers_autoencoder,
    from_diffusers_unet,
    inspect,
    load_autoencoder,
    load_weights,
    predicted,
    read_part,
)
from kit.errors import UserError

diffusers = pytest.importorskip("diffusers")
# 256 channels: from 224 on both sides have 32 groups
TINY = dict(sample_size=8, block_out_channels=(256, 512), layers_per_block=2, cross_attention_dim=32,
            norm_num_groups=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
SD1 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SD2 = dict(sample_size=64, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
X4 = dict(sample_size=128, in_channels=7, block_out_channels=(256, 512, 512, 1024), cross_attention_dim=1024,
          attention_head_dim=8, use_linear_projection=True, num_class_embeds=1000,
          only_cross_attention=(True, True, True, False),
          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
          up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
slow = pytest.mark.slow


def load_unet(path: str | Path, temporal: TemporalOptions | None = None, heads: int = 0, head_channels: int = 0,
              ema: bool = False) -> tuple[UNet, Report]:
    """The U-Net of a file or folder; with `temporal`, new temporal layers in it."""
    weights = read_part(path, "unet", ema)
    found = architecture(weights, path, heads, head_channels)
    unet = UNet(**found | ({} if temporal is None else {"temporal": temporal}))
    return unet, load_weights(unet, weights, path)


def random_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random, none zero, and sizes that keep the signal alive through a deep network."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=draw) + (p.dim() == 1 and "norm" in name))
    return module.eval()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def both_ways(ours, theirs, x: torch.Tensor) -> tuple[float, float]:
    """Relative differences of outputs and of input gradients."""
    results = []
    for f in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        (gradient,) = torch.autograd.grad((out * weight).sum(), leaf)
        results.append((out.detach(), gradient))
    (out, gradient), (their_out, their_gradient) = results
    return difference(out, their_out), difference(gradient, their_gradient)


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("config", "size", "heads"),
    [
        (TINY | dict(attention_head_dim=8), 8, dict(heads=8)),
        (TINY | dict(attention_head_dim=[4, 8], use_linear_projection=True), 8, dict(head_channels=64)),
        (TINY | dict(in_channels=7, attention_head_dim=8, use_linear_projection=True, num_class_embeds=10,
                     only_cross_attention=(True, False)), 8, dict(heads=8)),
        pytest.param(SD1, 32, {}, marks=slow),
        pytest.param(SD2, 32, {}, marks=slow),
        pytest.param(X4, 32, {}, marks=slow),
    ],
    ids=["tiny-1.x", "tiny-2.x", "tiny-x4", "SD 1.x", "SD 2.x", "x4"],
)  # fmt: skip
def test_the_image_network_equals_diffusers(config: dict, size: int, heads: dict) -> None:
    theirs = random_weights(diffusers.UNet2DConditionModel(**config))
    weights = from_diffusers_unet(theirs.state_dict())
    ours = UNet(**architecture(weights, "diffusers", **heads)).eval()
    report = load_weights(ours, weights, "diffusers")
    assert not report.new and not report.unexpected
    x, tau = noise(2, theirs.config.in_channels, size, size), torch.tensor([7, 801])
    text = noise(2, 5, theirs.config.cross_attention_dim, seed=4)
    label = torch.tensor([3, 8]) if theirs.config.num_class_embeds else None
    out, gradient = both_ways(
        lambda x: ours(x, tau, text, label=label),
        lambda x: theirs(x, tau, text, class_labels=label).sample, x)  # fmt: skip
    assert out < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        dict(block_out_channels=(128, 256), layers_per_block=1, latent_channels=4,
             down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        pytest.param(dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                          down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
                     marks=slow),
    ],
    ids=["tiny", "SD"],
)  # fmt: skip
def test_the_autoencoder_equals_diffusers(config: dict) -> None:
    theirs = random_weights(diffusers.AutoencoderKL(**config))
    weights = from_diffusers_autoencoder(theirs.state_dict())
    ours = Autoencoder(**autoencoder_architecture(weights, "diffusers")).eval()
    assert not load_weights(ours, weights, "diffusers").unexpected
    x, z = noise(1, 3, 32, 32), noise(1, 4, 8, 8)
    assert max(both_ways(ours.encode, lambda x: theirs.encode(x).latent_dist.mean, x)) < 1e-5
    assert max(both_ways(ours.decode, lambda z: theirs.decode(z).sample, z)) < 1e-5


VIDEO = dict(in_channels=8, block_out_channels=(256, 512), layers_per_block=2, cross_attention_dim=32,
             num_attention_heads=(4, 8), addition_time_embed_dim=16, projection_class_embeddings_input_dim=48,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"))  # fmt: skip


@pytest.mark.parametrize(
    ("config", "size"), [(VIDEO, 8), pytest.param({}, 16, marks=slow)], ids=["tiny", "Stable Video Diffusion"]
)
def test_the_video_network_equals_diffusers(config: dict, size: int) -> None:
    """Two things are set in theirs: the norms' eps to the released code's 1e-5, and the vector they always add to
    that of the diffusion time, which comes from our label_emb as well."""
    frames, theirs = 4, random_weights(diffusers.UNetSpatioTemporalConditionModel(**config))
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.GroupNorm) and "resnets" in name:
            module.eps = 1e-5
    weights = from_diffusers_unet(theirs.state_dict())
    ours = UNet(**architecture(weights, "diffusers", head_channels=64)).eval()
    report = load_weights(ours, weights, "diffusers")
    assert not report.new and not report.unexpected
    x, tau = noise(2 * frames, 8, size, size), torch.tensor([7, 801])
    text, ids = noise(2, 1, theirs.config.cross_attention_dim, seed=4), torch.tensor([[6.0, 127, 0.02]] * 2)
    vector = theirs.add_time_proj(ids.flatten()).view(2, -1)
    out, gradient = both_ways(
        lambda x: ours(x, tau, text, label=vector, frames=frames, time_context=text),
        lambda x: theirs(x.unflatten(0, (2, frames)), tau, text, ids).sample.flatten(0, 1), x)  # fmt: skip
    assert out < 1e-5 and gradient < 1e-5


# %% Files: every layout, and every way one can be wrong

SMALL = dict(in_channels=4, out_channels=4, channels=16, multipliers=(1, 2), depth=1, attention=(1, 2), heads=2,
             context_dim=8)  # fmt: skip


def small() -> tuple[UNet, Autoencoder]:
    autoencoder = Autoencoder(32, (1, 2), 1, 4, "kl")
    return random_weights(UNet(**SMALL)), random_weights(autoencoder, 1)


@pytest.fixture
def single_file(tmp_path: Path) -> Path:
    """A file as CompVis's, with averages, and with what else training leaves in them."""
    unet, autoencoder = small()
    content = {"model.diffusion_model." + name: value for name, value in unet.state_dict().items()}
    averages = {"model_ema.diffusion_model" + n.replace(".", ""): 2 * v for n, v in unet.state_dict().items()}
    content |= {"first_stage_model." + name: value for name, value in autoencoder.state_dict().items()} | averages
    torch.save({"state_dict": content | {"betas": torch.zeros(3)}, "global_step": 7}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_a_single_file_needs_no_renaming(single_file: Path) -> None:
    unet, autoencoder = small()
    loaded, report = load_unet(single_file, heads=2)
    assert not report.new and len(report.loaded) == len(unet.state_dict())
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.state_dict().items())
    averaged, _ = load_unet(single_file, heads=2, ema=True)
    assert torch.equal(averaged.out[2].weight, 2 * unet.out[2].weight)
    z = load_autoencoder(single_file, scale=1.0)
    assert all(torch.equal(value, autoencoder.state_dict()[name]) for name, value in z.state_dict().items())


def test_temporal_layers_are_new_and_start_as_the_image_model(single_file: Path) -> None:
    video, report = load_unet(single_file, TemporalOptions(context_dim=8), heads=2)
    image, _ = load_unet(single_file, heads=2)
    assert report.new and all(is_temporal(name) for name in report.new)
    x, text = noise(4, 4, 8, 8), noise(2, 3, 8, seed=4)
    with torch.no_grad():
        expected = image(x, torch.tensor([5, 900]), text)
        assert torch.equal(video(x, torch.tensor([5, 900]), text, frames=2, time_context=text), expected)


def test_safetensors_and_folders_read_the_same(single_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = read_part(single_file, "unet")
    save_file({"model.diffusion_model." + name: value for name, value in weights.items()}, tmp_path / "m.safetensors")
    save_file(weights, tmp_path / "bare.safetensors")
    for name in ("m.safetensors", "bare.safetensors"):
        assert all(torch.equal(value, weights[n]) for n, value in read_part(tmp_path / name, "unet").items())
    theirs = random_weights(diffusers.UNet2DConditionModel(**TINY | dict(attention_head_dim=8)))
    theirs.save_pretrained(tmp_path / "pipeline" / "unet")
    loaded, report = load_unet(tmp_path / "pipeline", heads=8)
    assert torch.equal(loaded.out[2].weight, theirs.conv_out.weight) and not report.unexpected
    for alone in (tmp_path / "pipeline", tmp_path / "bare.safetensors"):  # there is no autoencoder in these
        assert "unet: " in inspect(alone, heads=2) and "autoencoder: " not in inspect(alone, heads=2)


def test_inspect_says_what_is_there(single_file: Path) -> None:
    weights = read_part(single_file, "unet")
    text = inspect(single_file, heads=2)
    assert f"loaded: {len(weights)}" in text and "new: " in text and "multipliers (1, 2)" in text
    assert f"unet parameters: {sum(p.numel() for p in weights.values())}" in text


class Code:
    def __reduce__(self) -> tuple:
        return print, ("this must never run",)


def test_bad_files_end_in_one_line(single_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = tmp_path / "bad.ckpt"

    def said(path: Path = bad, **options: object) -> str:
        with pytest.raises(UserError) as caught:
            load_unet(path, **{"heads": 2} | options)
        assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)
        return str(caught.value)

    assert "no such file" in said(tmp_path / "none.ckpt")
    bad.write_bytes(single_file.read_bytes()[:-2000])
    assert "truncated" in said()
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "truncated" in said(tmp_path / "bad.safetensors")
    torch.save({"state_dict": {"w": Code()}}, bad)
    assert "run its code" in said()
    assert "must never run" not in capsys.readouterr().out
    torch.save({"state_dict": {"step": 3}}, bad)
    assert "no named tensors" in said()
    torch.save({"other": torch.zeros(2)}, bad)
    assert "no weights of a U-Net" in said()
    (tmp_path / "empty").mkdir()
    assert "no .safetensors or .bin" in said(tmp_path / "empty")
    weights = {"model.diffusion_model." + name: value for name, value in read_part(single_file, "unet").items()}
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for change, expected in (({name: None}, "1 missing (middle_block.0.in_layers.2.weight)"),
                             ({name: torch.zeros(3, 32, 3, 3)}, "1 wrong shape (middle_block.0.in_layers.2.weight (3,"),
                             ({"model.diffusion_model.extra": torch.zeros(1)}, "1 unexpected (extra)")):  # fmt: skip
        torch.save({"state_dict": {k: v for k, v in (weights | change).items() if v is not None}}, bad)
        assert expected in said()
    assert "leave out --ema" in said(ema=True)
    assert "how many heads" in said(single_file, heads=0)


def test_nothing_is_half_loaded(single_file: Path) -> None:
    unet = UNet(**SMALL)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    weights = read_part(single_file, "unet")
    weights["out.2.bias"] = torch.zeros(9)
    with pytest.raises(UserError, match="out.2.bias"):
        load_weights(unet, weights, single_file)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


# %% Text


def clip_folder(folder: Path, width: int) -> Path:
    """A small CLIP text model with a tokenizer of single letters, in the layout of a pipeline's folder."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=len(words) - 1, bos_token_id=len(words) - 2)  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    transformers.CLIPTokenizer(str(folder / "tokenizer" / "vocab.json"), str(folder / "tokenizer" / "merges.txt")
                               ).save_pretrained(folder / "tokenizer")  # fmt: skip
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return clip_folder(tmp_path, 32)


def test_text_is_encoded_once(clip: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(clip, cache=tmp_path / "cache")
    tokens = encoder(["a red car", "a", "a red car"])
    assert tokens.shape == (3, 77, 32) and torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1])
    again = TextEncoder(clip, cache=tmp_path / "cache")
    assert torch.equal(again(["a", "a red car"]), tokens[[1, 0]]) and again.model is None
    torch.testing.assert_close(TextEncoder(clip)(["a"])[0], tokens[1])


def test_a_folder_that_is_no_text_encoder(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable config.json"):
        TextEncoder(tmp_path / "nowhere")
    for file in (clip / "text_encoder").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="not CLIP's text model"):
        TextEncoder(clip)(["a"])


def test_an_encoder_without_tokenizer_or_without_weights(clip: Path) -> None:
    weights = clip / "text_encoder" / "model.safetensors"
    content = safetensors_torch().load_file(weights)
    first = next(name for name in content if "layers.0" in name)
    safetensors_torch().save_file({k: v for k, v in content.items() if k != first}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of CLIP's text model are not in it"):
        TextEncoder(clip)(["a"])
    for file in (clip / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer in it"):
        TextEncoder(clip)


def safetensors_torch():
    return pytest.importorskip("safetensors.torch")


def test_words_beyond_what_clip_reads_are_named(clip: Path, capsys: pytest.CaptureFixture) -> None:
    TextEncoder(clip)(["a red car " * 40])
    assert "left out, beyond the 77 tokens" in capsys.readouterr().err


# %% What else people have under a checkpoint's name


@pytest.mark.parametrize(("wrapper", "prefix"), [("model", "module."), ("state_dict", "_orig_mod."),
                                                 ("module", "module._orig_mod.")])
def test_names_as_training_programs_leave_them(single_file: Path, wrapper: str, prefix: str) -> None:
    plain = read_part(single_file, "unet")
    content = {prefix + name: value for name, value in torch.load(single_file)["state_dict"].items()}
    torch.save({wrapper: content, "epoch": 3}, single_file)
    assert read_part(single_file, "unet").keys() == plain.keys()


@pytest.mark.parametrize(("begin", "what"), [(b"<!DOCTYPE html>", "is a web page"),
                                             (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer")])
def test_files_that_are_no_weights(tmp_path: Path, begin: bytes, what: str) -> None:
    for name in ("a.ckpt", "a.safetensors"):
        (tmp_path / name).write_bytes(begin)
        with pytest.raises(UserError, match=what):
            read_part(tmp_path / name, "unet")


def test_models_of_another_kind_are_named(released: tuple[Path, Path]) -> None:
    file, text = released
    content = torch.load(file)["state_dict"]
    first = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save({"state_dict": content | {first: torch.zeros(32, 9, 3, 3)}}, file)
    with pytest.raises(UserError, match="not text to image but an inpainting model"):
        check_text_to_image(StableDiffusion(str(file), TextEncoder(text), 64, 128))
    torch.save({"lora_unet_down.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="it looks like a LoRA"):
        StableDiffusion(str(file), TextEncoder(text), 64, 128)


def test_weights_that_are_not_finite_are_named(released: tuple[Path, Path]) -> None:
    file, _ = released
    content = torch.load(file)["state_dict"]
    content["model.diffusion_model.out.2.bias"][0] = torch.nan
    torch.save({"state_dict": content}, file)
    with pytest.raises(UserError, match=r"out\.2\.bias has values that are not finite"):
        load_unet(file)


def test_a_folder_s_scheduler_and_scale_are_read(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "vae").mkdir()
    said = {"prediction_type": "v_prediction", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear"}
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(said))
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.13025}))
    assert predicted(tmp_path, "") == predicted(tmp_path, "v") == "v"
    with pytest.raises(UserError, match="says v"):
        predicted(tmp_path, "eps")
    path.write_text(json.dumps(said | {"beta_end": 0.02}))
    with pytest.raises(UserError, match="other betas"):
        predicted(tmp_path, "")
    _, autoencoder = small()
    torch.save(autoencoder.state_dict(), tmp_path / "vae" / "model.bin")
    assert float(load_autoencoder(tmp_path).scale) == pytest.approx(0.13025)
    assert float(load_autoencoder(tmp_path, 0.5).scale) == 0.5


# %% Lessons 9 and 4 on a file of Stable Diffusion's layout


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, Path]:
    """A narrow network of Stable Diffusion 1.x's kind (8 heads, text 768 wide) and its text encoder; f = 8."""
    unet = random_weights(UNet(4, 4, 32, (1, 1, 1, 1), 1, (1, 2, 4), heads=8, context_dim=768, linear=False))
    autoencoder = random_weights(Autoencoder(32, (1, 1, 1, 1), 1, 4, "kl"), 1)
    content = {"model.diffusion_model." + name: value for name, value in unet.state_dict().items()}
    content |= {"first_stage_model." + name: value for name, value in autoencoder.state_dict().items()}
    torch.save({"state_dict": content}, tmp_path / "tiny.ckpt")
    (tmp_path / "clip").mkdir()
    return tmp_path / "tiny.ckpt", clip_folder(tmp_path / "clip", 768)


def test_lessons_9_and_4_train_and_sample_on_a_file(released: tuple[Path, Path], tmp_path: Path) -> None:
    file, text = released
    lesson04, lesson09 = import_module("04_decoder_finetune"), import_module("09_text_to_video")
    flags = ["--preset", "smoke", "--backbone", str(file), "--size", "64", "128", "--out", str(tmp_path / "out")]
    lesson04.main(flags)
    texts = ["--text-encoder", str(text), "--upsampled-seconds", "0"]
    lesson09.main([*flags, *texts])
    assert list((tmp_path / "out" / "captions").glob("*.pt"))  # every caption is encoded once
    lesson09.main([*flags, *texts, "--prompt", "a red car"])
    assert (tmp_path / "out" / "09_text_to_video-a-red-car" / "long.webp").exists()
    flags[3] = str(file.rename(file.with_name("other.ckpt")))  # the same file under another name is the same backbone
    lesson09.main([*flags, *texts, "--prompt", ""])
    with pytest.raises(UserError, match="was trained with parameterization eps"):
        lesson09.main([*flags, *texts, "--prompt", "a blue car", "--parameterization", "v"])
    content = torch.load(flags[3])["state_dict"]
    content["model.diffusion_model.out.2.bias"] += 1  # and another one under this name is another
    torch.save({"state_dict": content}, flags[3])
    with pytest.raises(UserError, match="was trained with backbone"):
        lesson09.main([*flags, *texts, "--prompt", "a blue car"])


def test_a_text_encoder_of_another_model_is_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    narrow = clip_folder(tmp_path / "other", 32)
    with pytest.raises(UserError, match="is 32 wide"):
        StableDiffusion(str(released[0]), TextEncoder(narrow), 64, 128)


def test_half_the_work_is_recomputed_with_the_same_gradients(released: tuple[Path, Path]) -> None:
    """Gradient checkpointing changes memory, not numbers."""
    gradients = []
    for checkpointing in (False, True):
        unet, _ = load_unet(released[0], TemporalOptions(context_dim=768))
        random_weights(unet)
        train_temporal_only(unet)
        unet.checkpointing = checkpointing
        x, text = noise(4, 4, 8, 8), noise(2, 3, 768, seed=4)
        unet(x, torch.tensor([5, 900]), text, frames=2, time_context=text).square().sum().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@slow
@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_one_training_step_at_full_size(shape: str) -> None:
    """Random weights, 8 frames of 320 x 512, bfloat16, checkpointing; prints time and memory."""
    frames, device = 8, "cuda" if torch.cuda.is_available() else "cpu"
    width = SHAPES[shape]["context_dim"]
    torch.manual_seed(0)
    unet = UNet(**SHAPES[shape], temporal=TemporalOptions(context_dim=width)).to(device)
    train_temporal_only(unet)
    unet.checkpointing = True
    for module in unet.modules():  # a frozen matrix may stay in bfloat16: autocast would round it so each time
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
    optimizer = adamw(unet, 1e-4)
    z, text = noise(frames, 4, 40, 64).to(device), noise(1, 77, width).to(device)
    start = time.time()
    with torch.autocast(device, torch.bfloat16):
        out = unet(z, torch.tensor([500], device=device), text, frames=frames, time_context=text)
    loss = (out.float() - noise(*out.shape, seed=9).to(device)).square().mean()
    loss.backward()
    optimizer.step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss
    seconds = time.time() - start
    print(f"\n{shape}: {seconds:.0f} s, peak {peak / 2**30:.1f} GiB, {device}, {frames} frames of 320 x 512")
    assert torch.isfinite(loss) and all(torch.isfinite(p).all() for p in unet.parameters() if p.requires_grad)
