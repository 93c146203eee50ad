"""The network: alpha = 1 is the image model, spatial layers do not mix frames, temporal layers do."""

from importlib import import_module

import pytest
import torch

from common.autoencoder import Autoencoder
from common.blocks import channels_last, group_norm
from common.image_model import ImageModel
from common.loop import adamw, clip_and_warm_up
from common.temporal import (
    AlphaMerge,
    Clip,
    FrameAttention,
    FrameConv,
    FrameResBlock,
    TemporalOptions,
    is_temporal,
    train_temporal_only,
)
from common.unet import UNet
from extra.conv3d import AMX, Conv3d, Conv3dWithGradientBy2D
from extra.plan import count
from kit.flags import preset_config

SMALL = dict(in_channels=4, out_channels=4, channels=16, multipliers=(1, 2), depth=1, attention=(1, 2), heads=2)
OPTIONS = TemporalOptions(context_dim=8, known_channels=5, known_features=16)
B, T = 2, 4


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values everywhere: a network whose zero-initialised layers are still zero would pass any test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (B * T, 4, 8, 16), "context": (B, 3, 8), "time_context": (B, 2, 8), "known": (B * T, 5, 8, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pair() -> tuple[UNet, UNet]:
    """An image network and a video network with the same spatial weights, all weights random."""
    image, video = UNet(**SMALL, context_dim=8), UNet(**SMALL, context_dim=8, temporal=OPTIONS)
    randomise(image), randomise(video, 2)
    missing, unexpected = video.load_state_dict(image.state_dict(), strict=False)
    assert not unexpected and missing and all(is_temporal(name) for name in missing)
    return image, video


def video_call(video: UNet, given: dict, tau: torch.Tensor | None = None, frames: int | None = T) -> torch.Tensor:
    tau = torch.tensor([100, 700]) if tau is None else tau
    return video(given["x"], tau, given["context"], frames=frames, time_context=given["time_context"],
                 known=given["known"] if video.temporal.known_channels else None)  # fmt: skip


def test_alpha_one_is_the_image_model_bit_for_bit() -> None:
    image, video = pair()
    given, tau = inputs(), torch.tensor([100, 700])
    with torch.no_grad():
        expected = image(given["x"], tau, given["context"])
        assert torch.equal(video_call(video, given, frames=None), expected)  # called on images
        assert not torch.allclose(video_call(video, given), expected)
        for name, parameter in video.named_parameters():
            if name.endswith("mix_factor"):
                parameter.fill_(float("inf"))  # alpha = 1
        assert torch.equal(video_call(video, given), expected)


def test_a_new_video_network_starts_as_the_image_model() -> None:
    image = randomise(UNet(**SMALL, context_dim=8))
    video = UNet(**SMALL, context_dim=8, temporal=OPTIONS)
    video.load_state_dict(image.state_dict(), strict=False)
    given = inputs()
    with torch.no_grad():
        expected = image(given["x"], torch.tensor([100, 700]), given["context"])
        torch.testing.assert_close(video_call(video, given), expected, rtol=0, atol=0)


def test_temporal_weights_learn_from_the_first_step() -> None:
    video = UNet(**SMALL, context_dim=8, temporal=OPTIONS)
    video.load_state_dict(randomise(UNet(**SMALL, context_dim=8)).state_dict(), strict=False)
    train_temporal_only(video)
    video_call(video, inputs()).square().mean().backward()
    last = [p for n, p in video.named_parameters() if "time_stack" in n and n.endswith("ff.net.2.weight")]
    assert last and all(p.grad.abs().max() > 0 for p in last)
    assert all(p.grad is None for n, p in video.named_parameters() if not is_temporal(n))


def test_a_widened_network_is_the_old_one_until_it_learns() -> None:
    """And stays in one memory format: a first layer in another would take the first level with it."""
    image, given = channels_last(randomise(UNet(**SMALL, context_dim=8))), inputs()
    x, more, tau = given["x"], torch.randn(B * T, 3, 8, 16), torch.tensor([100, 700])
    with torch.no_grad():
        expected = image(x, tau, given["context"])
        image.widen(3)
        torch.testing.assert_close(image(torch.cat([x, more], dim=1), tau, given["context"]), expected)
    assert image.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_rate_warms_up_and_falls_whatever_the_total_of_steps() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer, rates = adamw(layer, 1.0), []
    layer(torch.ones(1, 2)).sum().backward()
    for step in (0, 3, 7, 31):
        clip_and_warm_up(optimizer, step, 0.1, 4, 8)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.025, 0.1, 0.1, 0.05])


@pytest.mark.parametrize("options", [OPTIONS, TemporalOptions(conv=False), TemporalOptions(attention_blocks=0)])
def test_changing_frame_3_changes_frame_0(options: TemporalOptions) -> None:
    video = randomise(UNet(**SMALL, context_dim=8, temporal=options))
    given = inputs()
    with torch.no_grad():
        before = video_call(video, given)
        given["x"][3] += 1
        after = video_call(video, given)
    assert (after[0] - before[0]).abs().max() > 1e-5  # exactly 0 where frames do not mix
    assert torch.equal(after[T:], before[T:])  # the other clip of the batch does not notice


def test_permuting_frames_permutes_spatial_layers_and_not_temporal_ones() -> None:
    _, video = pair()
    given, order = inputs(), torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    shuffled = given | {"x": given["x"][order], "known": given["known"][order]}
    with torch.no_grad():
        torch.testing.assert_close(
            video_call(video, shuffled, frames=None), video_call(video, given, frames=None)[order]
        )
        assert not torch.allclose(video_call(video, shuffled), video_call(video, given)[order], atol=1e-3)


def test_the_frame_convolution_is_the_3d_convolution() -> None:
    conv = FrameConv(4, 6)
    x = torch.randn(2, 4, 5, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conv(x), torch.nn.Conv3d.forward(conv, x[..., None])[..., 0])


@pytest.mark.parametrize("clips", [1, 2])
def test_a_channels_last_clip_stays_so_in_the_temporal_block_also_where_it_comes_alone(clips: int) -> None:
    """Strides that torch does not take for channels-last cost a copy in each layer; is_contiguous does not tell."""
    block, seen = FrameResBlock(16, 8, 0), []
    block.in_layers[0].register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    x = torch.randn(clips * 4, 16, 6, 10).contiguous(memory_format=torch.channels_last)
    block(x, torch.zeros(len(x), 8), Clip(4))
    given, normalised = seen
    assert given.data_ptr() == x.data_ptr()
    assert given.stride() == normalised.stride() == (4 * 60 * 16, 1, 60 * 16, 16)


def test_frame_attention_is_attention_at_every_position() -> None:
    attention = randomise(FrameAttention(8, 2))
    x = torch.randn(B * T, 6, 8, generator=torch.Generator().manual_seed(0))
    alone = [super(FrameAttention, attention).forward(x.view(B, T, 6, 8)[:, :, i]) for i in range(6)]
    torch.testing.assert_close(attention(x, T), torch.stack(alone, dim=2).reshape(B * T, 6, 8))


def test_alpha_multiplies_the_spatial_branch_and_may_be_a_vector_over_frames() -> None:
    merge, z, z_prime = AlphaMerge(T), torch.zeros(B * T, 1, 2, 2), torch.ones(B * T, 1, 2, 2)
    with torch.no_grad():
        merge.mix_factor.copy_(torch.tensor([float("inf"), 0.0, float("-inf"), 0.0]))
    assert merge(z, z_prime, T)[:T, 0, 0, 0].tolist() == [0.0, 0.5, 1.0, 0.5]
    with pytest.raises(ValueError, match="4 frames"):
        merge(z[:6], z_prime[:6], 3)


def test_a_merge_of_equal_branches_is_exact_in_bfloat16() -> None:
    merge, z = AlphaMerge(1), torch.randn(8, 4, 3, 3).bfloat16()
    with torch.no_grad():
        merge.mix_factor.fill_(0.3)
    assert torch.equal(merge(z, z, 4), z)


@pytest.mark.parametrize(
    ("config", "spatial", "temporal"),
    [  # published counts, and those of the paper's App. H.2.1 (649, 656 and 449 million)
        (dict(channels=320, multipliers=(1, 2, 4, 4), depth=2, attention=(1, 2, 4), heads=8, context_dim=768,
              linear=False, temporal=TemporalOptions(context_dim=768)), 859_520_964, 649_687_078),
        (dict(channels=320, multipliers=(1, 2, 4, 4), depth=2, attention=(1, 2, 4), head_channels=64, context_dim=1024,
              temporal=TemporalOptions(context_dim=1024)), 865_910_724, 656_076_838),
        (dict(in_channels=7, channels=256, multipliers=(1, 2, 2, 4), depth=2, attention=(2, 4, 8), heads=8,
              context_dim=1024, label_classes=1000, temporal=TemporalOptions(context_dim=768, known_channels=3)),
         468_155_140, 449_420_838),
    ],
)  # fmt: skip
def test_parameter_counts_of_stable_diffusion(config: dict, spatial: int, temporal: int) -> None:
    with torch.device("meta"):
        unet = UNet(**{"in_channels": 4, "out_channels": 4} | config)
    assert count(unet, lambda name: not is_temporal(name)) == spatial
    assert count(unet, is_temporal) == temporal


def test_names_are_those_of_the_checkpoints() -> None:
    with torch.device("meta"):
        unet = UNet(4, 4, 320, (1, 2, 4, 4), 2, (1, 2, 4), heads=8, context_dim=768, linear=False,
                    temporal=TemporalOptions(context_dim=768))  # fmt: skip
        autoencoder = Autoencoder(128, (1, 2, 4, 4), 2, 4, "kl")
    names, spatial = set(unet.state_dict()), [n for n in unet.state_dict() if not is_temporal(n)]
    assert len(spatial) == 686
    assert len(names) - len(spatial) == 738  # Stable Video Diffusion's 742 less its 4 of label_emb
    for name in ("input_blocks.1.0.in_layers.2.weight", "input_blocks.3.0.op.weight", "output_blocks.2.1.conv.bias",
                 "output_blocks.5.2.conv.weight", "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
                 "input_blocks.1.1.time_stack.0.ff_in.net.0.proj.weight", "input_blocks.1.1.time_pos_embed.2.bias",
                 "middle_block.0.time_stack.out_layers.3.weight", "input_blocks.1.0.time_mixer.mix_factor",
                 "out.2.weight", "time_embed.2.weight"):  # fmt: skip
        assert name in names, name
    assert unet.input_blocks[1][0].time_stack.in_layers[2].weight.shape == (320, 320, 3, 1, 1)
    assert len(autoencoder.state_dict()) == 248 and count(autoencoder) == 83_653_863
    assert "decoder.up.3.block.2.conv2.weight" in autoencoder.state_dict()


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
@pytest.mark.parametrize("levels", [3, 4])
def test_autoencoder_shapes(regularizer: str, levels: int) -> None:
    autoencoder = Autoencoder(16, (1,) * levels, 1, 4, regularizer, codes=32)
    x, f = torch.randn(2, 3, 16, 32), 2 ** (levels - 1)
    z = autoencoder.encode(x)
    assert z.shape == (2, 4, 16 // f, 32 // f) and autoencoder.decode(z).shape == x.shape
    z, loss = autoencoder.regularize(x, torch.zeros_like(z))
    loss.backward()
    assert autoencoder.encoder.conv_out.weight.grad.abs().max() > 0


def test_the_video_decoder_starts_as_the_image_decoder_and_then_mixes_frames() -> None:
    lesson02, lesson04 = import_module("02_image_ldm"), import_module("04_decoder_finetune")
    image = ImageModel(preset_config(lesson02.Config, lesson02.PRESETS, "smoke"))
    randomise(image.autoencoder)
    video = lesson04.video_autoencoder(image)
    z = torch.randn(4, *image.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = image.autoencoder.decode(z)
        lesson04.set_frames(video, 4)
        torch.testing.assert_close(video.decode(z), expected, rtol=0, atol=0)
        randomise(video).load_state_dict(image.autoencoder.state_dict(), strict=False)
        lesson04.set_frames(video, None)
        assert torch.equal(video.decode(z), image.autoencoder.decode(z))  # the temporal layers are skipped
        lesson04.set_frames(video, 4)
        before = video.decode(z)
        z[3] += 1
        assert (video.decode(z)[0] - before[0]).abs().max() > 1e-4
    lesson04.train_decoder(video, freeze_spatial=False)
    assert not any(p.requires_grad for p in video.encoder.parameters())
    assert all(p.requires_grad for p in video.decoder.parameters())
    lesson04.train_decoder(video, freeze_spatial=True)
    assert all(is_temporal(n) == p.requires_grad for n, p in video.named_parameters())


@pytest.mark.parametrize("channels, out, kernel, stride, frames, size", [
    (4, 6, (3, 3, 3), (1, 1, 1), 5, (6, 10)), (3, 8, (3, 4, 4), (1, 2, 2), 4, (8, 16)),
    (4, 4, (1, 3, 3), (1, 1, 1), 3, (4, 4)), (8, 1, (5, 3, 3), (1, 1, 1), 2, (4, 8))])
def test_gradients_of_3d_convolutions_by_2d_ones(channels: int, out: int, kernel: tuple, stride: tuple, frames: int,
                                                 size: tuple) -> None:
    """What replaces torch's bfloat16 weight gradients on CPUs with AMX is the same sum."""
    generator = torch.Generator().manual_seed(0)
    conv = Conv3d(channels, out, kernel, stride, (kernel[0] // 2, 1, 1))
    x = torch.randn(2, channels, frames, *size, generator=generator, requires_grad=True)
    inputs = [x, *conv.parameters()]
    expected = torch.nn.functional.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding)
    grad = torch.randn(expected.shape, generator=generator)
    made = Conv3dWithGradientBy2D.apply(x, conv.weight, conv.bias, conv.stride, conv.padding)
    torch.testing.assert_close(made, expected)
    for a, b in zip(torch.autograd.grad(made, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not AMX, reason="torch is right without AMX")
def test_bfloat16_gradients_of_3d_convolutions_on_amx() -> None:
    """A shape at which torch 2.13's own are wrong, sometimes a hundred times too large, beside float32's."""
    conv = Conv3d(128, 128, 3, padding=1)
    x = torch.randn(2, 128, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(conv(x).square().mean(), conv.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        made = conv(x)
    made = torch.autograd.grad(made.float().square().mean(), conv.weight)[0]
    assert float((made - expected).norm() / expected.norm()) < 0.01


def test_norm_of_a_frozen_input_survives_its_backward_pass() -> None:
    """torch's own GroupNorm ends the process here."""
    x = torch.randn(2, 64, 8, 128).contiguous(memory_format=torch.channels_last)
    norm = group_norm(64)
    norm(x).square().sum().backward()
    assert norm.weight.grad is not None and torch.isfinite(norm.weight.grad).all()
