"""The lessons as notebooks, made from the scripts: notebooks/NN_name.ipynb. Needs pip install "videoldm[notebooks]".

python docs/notebooks.py                all lessons
python docs/notebooks.py 03 05 --run    those, run top to bottom at the smoke preset, with what they print and draw

Each cell of a script is a cell here, under its title. The last one runs `main` and gives what it made (run, settings,
data, models), so that the next cell can go on with it.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from kit.errors import UserError, cli  # noqa: E402
from kit.files import write_text  # noqa: E402

SETUP = """\
# Opened in a clone of the repository, on a bare machine as well.
import os
import sys
from pathlib import Path

if not Path("common").exists():
    os.chdir("..")
sys.path.insert(0, os.getcwd())
try:
    import av, einops, matplotlib, torch, tqdm
except ImportError:
    %pip install -q -c constraints.txt -e ".[video]"
    sys.path.insert(0, os.getcwd())"""

FLAGS = """\
# The smoke preset proves in seconds that everything runs, and learns nothing. With FLAGS = ["--out", "runs/mine"] the
# lesson trains for minutes, on the weights in checkpoints/ where it builds on others.
from importlib import import_module
from pathlib import Path

FLAGS = ["--preset", "smoke", "--out", "runs/notebook", "--overwrite"]
for earlier in {earlier}:
    if "smoke" in FLAGS and not Path("runs/notebook", earlier, "numbers.json").exists():
        import_module(earlier).main(FLAGS)"""

SHOW = """
from IPython.display import Image, display

{make}
display(Image(filename=run.folder / "mine.png", width=1000))"""

# What each lesson builds on, what its main returns, and a first thing to do with it.
LESSONS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "01_toy_alignment": ((), "run, config, diffusion, model", """
# Start points that all agree: do temporal layers keep them together?
noise = torch.randn(5, 1).expand(5, FRAMES).clone()
clips, path = sample(model, diffusion, noise, config.ddim_steps, torch.Generator().manual_seed(0))
print(clips)
print("modes:", mode_of(clips).tolist())"""),
    "02_image_ldm": ((), "run, config, source, image, model, ema", SHOW.format(make="""
with ema.applied():
    z = sample_images(model.unet, image, conditions(4), config.guidance, run, config.ddim_steps, config.eta, "mine")
sheet([image.decode(z)[:, 0]], run.folder / "mine.png")""".strip())),
    "03_temporal_layers": (("02_image_ldm",), "run, config, source, image, unet", SHOW.format(make="""
labels = conditions(2)
z = sample_clips(unet, image, labels, config.frames, config.ddim_steps, config.eta, run, "mine")
sheet(list(image.decode(z, config.frames)), run.folder / "mine.png")""".strip())),
    "04_decoder_finetune": (("02_image_ldm",), "run, config, source, image, autoencoder", SHOW.format(make="""
real = source.clips((0, HELD_OUT), 1, config.frames, config.final_fps, "held-out").video
set_frames(autoencoder, config.frames)
with torch.no_grad(), run.autocast():
    decoded = autoencoder.decode(image.encode(real)).float().cpu().clamp(-1, 1)
sheet([real[0], decoded], run.folder / "mine.png")""".strip())),
    "05_prediction": (("02_image_ldm", "03_temporal_layers"), "run, config, source, image, unet", SHOW.format(make="""
real = source.clips((0, HELD_OUT), 1, config.frames, config.final_fps / 16, "held-out")
z = rearrange(image.encode(real.video), "(b t) c h w -> b t c h w", t=config.frames)
futures = predict_clips(unet, image, z[:, :1].repeat(3, 1, 1, 1, 1), real.repeat(3), config, run, "mine")
decoded = image.decode(rearrange(futures, "b t c h w -> (b t) c h w"), config.frames)
sheet([real.video[0], *decoded], run.folder / "mine.png")""".strip())),
    "06_interpolation": (("02_image_ldm", "03_temporal_layers", "05_prediction"), "run, config, source, image, model",
                         SHOW.format(make="""
real = source.clips((0, HELD_OUT), 1, FRAMES, config.final_fps / 4, "held-out")
z = rearrange(image.encode(real.video), "(b t) c h w -> b t c h w", t=FRAMES)
z = between(model, image, z[:, 0], z[:, -1], 0, real, config, run, "mine")
sheet([real.video[0], image.decode(z[0], FRAMES)[0]], run.folder / "mine.png")""".strip())),
    "07_upsampler": (("02_image_ldm",), "run, config, source, image, model", SHOW.format(make="""
real = source.clips((0, HELD_OUT), 1, 4, config.final_fps, "held-out").video[0]
large = torch.stack(list(upsample(model, config, shrink(real), run, "mine")))
sheet([enlarge(shrink(real)), large, real], run.folder / "mine.png")""".strip())),
    "08_sample_long": (("02_image_ldm", "03_temporal_layers", "04_decoder_finetune", "05_prediction",
                        "06_interpolation", "07_upsampler"), "run, config, image, labels", SHOW.format(make="""
first = first_latent(run, config, image, labels)
frames = list(frames_of(run, config, image, first, labels, 8, future=7))
sheet([torch.stack(frames)], run.folder / "mine.png")""".strip())),
}


def notebook(name: str):
    """A lesson as a notebook."""
    import jupytext
    from nbformat.v4 import new_code_cell, new_markdown_cell

    text, (earlier, made, more) = (ROOT / f"{name}.py").read_text(), LESSONS[name]
    start = ast.parse(text).body[0].end_lineno  # of the docstring
    book = jupytext.reads("".join(text.splitlines(keepends=True)[start:]), fmt="py:percent")
    cells = [new_markdown_cell(f"```\n{ast.get_docstring(ast.parse(text))}\n```"), new_code_cell(SETUP)]
    for cell in book.cells:
        if title := cell.metadata.pop("title", ""):
            cells.append(new_markdown_cell(f"## {title}"))
        cells.append(new_code_cell(cell.source.split('\n\n\nif __name__ == "__main__":')[0].strip()))
    cells += [new_code_cell(FLAGS.format(earlier=earlier)), new_code_cell(f"{made} = main(FLAGS)"),
              new_markdown_cell("## Your turn"), new_code_cell(more.strip())]
    book.cells = cells
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return book


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", default=[], help="numbers, like 03; none: all")
    parser.add_argument("--run", action="store_true", help="run them, in a kernel of this Python")
    parser.add_argument("--to", type=Path, default=ROOT / "notebooks", help="folder to write to")
    options = parser.parse_args(argv)
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install "videoldm[notebooks]"') from None
    chosen = [name for name in LESSONS if not options.lessons or name[:2] in options.lessons]
    if not chosen or {*options.lessons} - {name[:2] for name in chosen}:
        raise UserError(f"{' '.join(options.lessons)}: there are {', '.join(name[:2] for name in LESSONS)}")
    options.to.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        book = notebook(name)
        if options.run:
            try:
                NotebookClient(book, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
            except CellExecutionError as error:
                raise UserError(f"{name}: {str(error).strip().splitlines()[-1]}") from None
        write_text(options.to / f"{name}.ipynb", nbformat.writes(book))
        print(options.to / f"{name}.ipynb")


if __name__ == "__main__":
    raise SystemExit(cli(main))
