"""Pictures of faults for when_it_goes_wrong.md that no flag of a lesson makes, into runs/symptoms.

python docs/symptoms.py sideways jerk scale     seconds but for `scale`, which trains twice; all stand on checkpoints/
"""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common.image_model import conditions  # noqa: E402
from common.portions import in_portions  # noqa: E402
from kit.data import open_data  # noqa: E402
from kit.errors import UserError, cli  # noqa: E402
from kit.flags import preset_config  # noqa: E402
from kit.media import open_picture  # noqa: E402
from kit.pictures import plt, save_figure, sheet, to_uint8  # noqa: E402
from kit.run import Run  # noqa: E402

lesson02, lesson04 = import_module("02_image_ldm"), import_module("04_decoder_finetune")


def sideways(run: Run) -> None:
    """A phone's picture as a decoder gives it, and as viewers show it: the turn is a side note in the file."""
    frame = to_uint8(open_data("driving", 96, 128, 30.0).clips((0, 3), 1, 1, 30.0, "held-out").video[0, 0])
    path, turn = run.folder / "phone.jpg", Image.Exif()
    turn[0x0112] = 6  # a quarter turn is left to whoever shows it
    Image.fromarray(np.rot90(frame)).save(path, exif=turn)
    figure = plt.figure(figsize=(4, 1.9))
    for i, (picture, title) in enumerate(((Image.open(path), "as stored"), (open_picture(path), "as shown"))):
        axis = figure.add_subplot(1, 2, i + 1)
        axis.imshow(picture)
        axis.set_title(title)
        axis.axis("off")
    save_figure(figure, run.folder / "sideways.png")


@torch.no_grad()
def jerk(run: Run) -> None:
    """How much frames change when portions of six are decoded one after the other, and when portions fade."""
    image = lesson02.load(run)
    autoencoder, size = lesson04.load(run, image)
    video = open_data("driving", image.config.height, image.config.width, 30.0).clips((0, 1), 1, 49, 30.0, "held-out")
    z = image.encode(video.video)
    cut = []
    for part, new in in_portions(z, 6):
        lesson04.set_frames(autoencoder, len(part))
        with run.autocast():
            cut += autoencoder.decode(part)[len(part) - new :].cpu()
    faded = list(lesson04.decode_stream(run, autoencoder, z, size))
    figure, axis = plt.subplots(figsize=(6, 2.2))
    for frames, name in ((cut, "portions of 6, one after the other"), (faded, f"portions of {size} that fade"),
                         (video.video[0], "real")):
        axis.plot(range(1, 49), torch.stack(list(frames)).float().diff(dim=0).abs().mean(dim=(1, 2, 3)) * 127.5,
                  label=name)
    axis.set(xlabel="frame", ylabel="change, levels of 255", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    save_figure(figure, run.folder / "jerk.png")


def scale(run: Run, steps: int = 300) -> None:
    """Samples of a U-Net trained on latents of deviation 1, on latents as the encoder gives them (3), and a tenth."""
    rows = []
    for factor in (None, 1.0, 0.03):
        config = preset_config(lesson02.Config, lesson02.PRESETS, "cpu", muon=0.0, steps=steps,
                               out=str(run.folder / str(factor)), overwrite=True)
        training = Run(lesson02.NAME, config)
        image = lesson02.ImageModel(config, run.device)
        image.autocast = run.autocast
        lesson02.load_autoencoder(run, image.autoencoder)
        if factor:
            image.autoencoder.scale.fill_(factor)
        source = open_data("driving", config.height, config.width, config.final_fps)
        model, ema = lesson02.train_unet(training, config, source, image)
        image.conditioner = model.conditioner
        with torch.no_grad(), ema.applied():
            z = lesson02.sample_images(model.unet.eval(), image, conditions(5), 1.0, training, 25, 1.0)
        rows.append(image.decode(z)[:, 0])
    sheet(rows, run.folder / "scale.png")


def main(argv: list[str] | None = None) -> None:
    names = sys.argv[1:] if argv is None else argv
    pictures = {f.__name__: f for f in (sideways, jerk, scale)}
    if not names or set(names) - set(pictures):
        raise UserError(f"give one or more of: {' '.join(pictures)}")
    run = Run("symptoms", preset_config(lesson02.Config, lesson02.PRESETS, "cpu", out="runs/", overwrite=True))
    for name in names:
        pictures[name](run)
        print(f"picture: {run.folder / name}.png")


if __name__ == "__main__":
    raise SystemExit(cli(main))
