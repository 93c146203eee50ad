"""What only a GPU can show: the same numbers as on a CPU, and every flag that belongs to it. Skipped without one.

python -m pytest tests/test_gpu.py          part of benchmarks/gpu.py
"""

import csv
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.autoencoder import Autoencoder
from common.blocks import channels_last
from common.temporal import TemporalOptions, is_temporal
from common.unet import UNet
from kit.flags import preset_config
from kit.parallel import hasten

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def unet(temporal: TemporalOptions | None = None) -> nn.Module:
    return UNet(4, 4, 64, (1, 2), 1, (1, 2), head_channels=32, context_dim=16, temporal=temporal)


def video_unet() -> nn.Module:
    return unet(TemporalOptions(context_dim=16, known_channels=5, known_features=32))


def networks() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, torch.device], torch.Tensor]]]:
    """Name: (what builds it, a forward pass of it on the device)."""
    lesson07 = import_module("07_upsampler")
    config = preset_config(lesson07.Config, lesson07.PRESETS, "smoke")
    draw = torch.Generator().manual_seed(3)
    z, text = torch.randn(8, 4, 8, 16, generator=draw), torch.randn(2, 3, 16, generator=draw)
    known, picture = torch.randn(8, 5, 8, 16, generator=draw), torch.randn(4, 3, 32, 64, generator=draw)
    small, noise = torch.randn(4, 3, 8, 16, generator=draw), torch.randn(4, 4, 8, 16, generator=draw)
    tau = torch.tensor([7, 801])
    return {
        "image U-Net": (unet, lambda net, d: net(z.to(d), tau.to(d), text.to(d))),
        "video U-Net": (video_unet, lambda net, d: net(z.to(d), tau.to(d), text.to(d), frames=4,
                                                       time_context=text.to(d), known=known.to(d))),
        "autoencoder": (lambda: Autoencoder(32, (1, 2, 2), 1, 4, "kl"),
                        lambda net, d: net(picture.to(d), noise.to(d))[0]),
        "upsampler": (lambda: lesson07.Upsampler(config),
                      lambda net, d: net(picture.to(d), tau[:1].to(d), small.to(d), tau[:1].to(d), 4)),
    }


def randomise(net: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in net.parameters():  # the layers that begin at zero have to count as well
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    return channels_last(net)


def output_and_gradients(net: nn.Module, forward: Callable, device: torch.device, dtype: torch.dtype) -> list:
    net.to(device).zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = forward(net, device).float()
    output.square().mean().backward()
    gradient = torch.cat([p.grad.flatten().float() for p in net.parameters() if p.grad is not None])
    return [output.detach().cpu(), gradient.cpu()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["image U-Net", "video U-Net", "autoencoder", "upsampler"])
def test_outputs_and_gradients_are_those_of_a_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    build, forward = networks()[name]
    net = randomise(build())
    wanted = output_and_gradients(net, forward, torch.device("cpu"), torch.float32)
    found = output_and_gradients(net, forward, torch.device("cuda"), dtype)
    for what, a, b in zip(("output", "gradients"), found, wanted, strict=True):
        difference = float((a - b).norm() / b.norm())
        assert difference < tolerance, f"{what} of {name} differ by {difference:.1e}"


@pytest.mark.parametrize(("compiled", "recorded"), [(False, True), (True, False), (True, True)])
def test_a_hastened_network_is_the_eager_one(compiled: bool, recorded: bool) -> None:
    torch.manual_seed(0)
    build, forward = networks()["video U-Net"]
    net, device = randomise(build()).cuda(), torch.device("cuda")
    tolerance = 2e-2 if compiled else 5e-3  # what is melted together is rounded to bfloat16 less often
    wanted = output_and_gradients(net, forward, device, torch.bfloat16)
    hasten(net, compiled, recorded)
    for _ in range(2):  # the pass that compiles or records, and one that has it
        found = output_and_gradients(net, forward, device, torch.bfloat16)
        for a, b in zip(found, wanted, strict=True):
            assert float((a - b).norm() / b.norm()) < tolerance
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    moved = output_and_gradients(net, forward, device, torch.bfloat16)
    assert float((moved[0] - wanted[0]).norm() / wanted[0].norm()) > 0.05  # new weights are seen
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        eager = forward(net, device).float().cpu()
    assert float((moved[0] - eager).norm() / eager.norm()) < tolerance


def test_a_recorded_image_upsampler_has_the_gradients_of_the_eager_one_step_after_step() -> None:
    """Lesson 7 failed on a GPU, recorded, after hundreds of steps on images: its gradients were not finite."""
    lesson07 = import_module("07_upsampler")
    config = preset_config(lesson07.Config, lesson07.PRESETS, "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as lessons run; with it may be the failure
    device = torch.device("cuda")
    eager, recorded = (randomise(lesson07.Upsampler(config)).to(device) for _ in range(2))
    recorded.load_state_dict(eager.state_dict())
    for net in (eager, recorded):
        for name, p in net.named_parameters():
            p.requires_grad_(not is_temporal(name))
    hasten(recorded.unet, False, True)
    draw = torch.Generator(device).manual_seed(5)
    for step in range(400):
        small = torch.randn(6, 3, 16, 16, generator=draw, device=device)
        large = torch.randn(6, 3, 64, 64, generator=draw, device=device)
        tau, level = (torch.randint(0, most, (6,), generator=draw, device=device) for most in (1000, 141))
        found = [output_and_gradients(net, lambda net, d, x=large, s=small, t=tau, n=level: net(x, t, s, n), device,
                                      torch.bfloat16) for net in (eager, recorded)]
        for what, a, b in zip(("output", "gradients"), *found, strict=True):
            assert float((a - b).norm() / a.norm()) < 5e-3, f"step {step}: {what}"


# %% Lessons, as they are started


def start(name: str, *flags: object) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *str(name).split(), *map(str, flags)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses(out: Path, name: str = "05_prediction") -> torch.Tensor:
    with (out / name / "metrics.csv").open() as file:
        return torch.tensor([float(row["loss"]) for row in csv.DictReader(file)])


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lessons 2 and 3 at the smoke preset, in float32, on the GPU."""
    out = tmp_path_factory.mktemp("gpu")
    for name in ("02_image_ldm.py", "03_temporal_layers.py"):
        start(name, "--preset", "smoke", "--device", "cuda", "--precision", "float32", "--out", out)
    return out


def predict(lessons: Path, out: Path, *flags: object, program: str = "05_prediction.py") -> torch.Tensor:
    for name in ("02_image_ldm", "03_temporal_layers"):
        if not (out / name).exists():
            (out / name).symlink_to(lessons / name)
    start(program, "--preset", "smoke", "--out", out, "--steps", 6, "--batch", 2, "--precision", "float32", *flags)
    return losses(out)


@pytest.fixture(scope="module")
def plain(lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return predict(lessons, tmp_path_factory.mktemp("plain"), "--device", "cuda")


@pytest.mark.parametrize("flags", [("--checkpointing",), ("--accumulate", 2), ("--workers", 2), ("--cuda-graphs",),
                                   ("--device", "cpu")])
def test_flags_do_not_change_the_losses(flags: tuple, lessons: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    assert torch.allclose(predict(lessons, tmp_path, "--device", "cuda", *flags), plain, rtol=2e-3)


def test_a_resumed_run_has_the_losses_of_one_without_a_pause(lessons: Path, plain: torch.Tensor,
                                                             tmp_path: Path) -> None:
    predict(lessons, tmp_path, "--device", "cuda", "--steps", 3)
    assert torch.allclose(predict(lessons, tmp_path, "--device", "cuda", "--resume"), plain, rtol=2e-3)


def test_checkpoints_travel_between_devices(lessons: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    predict(lessons, tmp_path, "--device", "cuda", "--steps", 2)
    predict(lessons, tmp_path, "--device", "cpu", "--steps", 4, "--resume")
    assert torch.allclose(predict(lessons, tmp_path, "--device", "cuda", "--resume"), plain, rtol=2e-3)


def test_torchrun_with_one_process(lessons: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    program = "-m torch.distributed.run --standalone --nproc_per_node 1 05_prediction.py"
    assert torch.allclose(predict(lessons, tmp_path, "--device", "cuda", program=program), plain, rtol=2e-3)


def test_noise_of_the_gpu(lessons: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    found = predict(lessons, tmp_path, "--device", "cuda", "--device-noise")
    assert torch.isfinite(found).all() and not torch.allclose(found, plain, rtol=1e-4)


def test_latents_are_kept(tmp_path: Path) -> None:
    for clip in range(3):
        folder = tmp_path / "data" / f"clip{clip}"
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(clip).integers(0, 255, (16, 32, 3), np.uint8)
        for i in range(90):
            Image.fromarray(np.roll(pixels, i, 1)).save(folder / f"{i}.png")
    flags = ["--preset", "smoke", "--device", "cuda", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    for name in ("02_image_ldm.py", "03_temporal_layers.py"):
        start(name, *flags, "--cache-latents")
    assert list((tmp_path / "out" / "latents").glob("*/*.npy"))


def test_out_of_memory_is_one_line(lessons: Path, tmp_path: Path) -> None:
    code = ("import sys, torch, importlib; torch.cuda.set_per_process_memory_fraction(0.0005);"
            "from kit.errors import cli; lesson = importlib.import_module('05_prediction');"
            "sys.argv = ['05_prediction.py', *sys.argv[1:]]; raise SystemExit(cli(lesson.main))")
    for name in ("02_image_ldm", "03_temporal_layers"):
        (tmp_path / name).symlink_to(lessons / name)
    done = subprocess.run([sys.executable, "-c", code, "--preset", "smoke", "--out", str(tmp_path), "--batch", "64"],
                          cwd=ROOT, text=True, capture_output=True, timeout=300)  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "out of memory" in said[0], done.stderr
