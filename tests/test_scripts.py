"""Every script as a user starts it: at the smoke preset, dry for every preset, resumed, and with bad input."""

import dataclasses
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.errors import UserError
from kit.files import LOCKS, load_checkpoint, lock, save_checkpoint
from kit.flags import kind_of, preset_config
from kit.run import Run, known_good, pick_device

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("0[1-8]_*.py"))
TRAINED = [name for name in SCRIPTS if name != "08_sample_long"]


def start(name: str, *flags: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"{name}.py", "--threads", "1", *map(str, flags)], cwd=ROOT, text=True,
                          capture_output=True, timeout=900)  # fmt: skip


@pytest.fixture(scope="session")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight lessons at the smoke preset, in order."""
    out = tmp_path_factory.mktemp("course")
    for name in SCRIPTS:
        done = start(name, "--preset", "smoke", "--out", out)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr, done.stderr
        assert "known-good: " in done.stdout and "outside" not in done.stdout, done.stdout  # docs/expected/NN.csv
    return out


def finished(name: str, out: Path) -> Run:
    """A lesson's run at the smoke preset, as it is when the lesson ends."""
    lesson, run = import_module(name), object.__new__(Run)
    run.name, run.folder, run.told = name, out / name, set()
    run.config = preset_config(lesson.Config, lesson.PRESETS, "smoke")
    run.numbers = json.loads((run.folder / "numbers.json").read_text())
    return run


def assert_known_good(name: str, out: Path, capsys: pytest.CaptureFixture) -> None:
    """The numbers of a smoke run lie inside those of docs/expected."""
    known_good(finished(name, out), import_module(name).PRESETS)
    said = capsys.readouterr().out
    assert "known-good: " in said and "outside" not in said, said


@pytest.mark.parametrize("file", ["05_prediction/checkpoint.pt", "06_interpolation/checkpoint.pt",
                                  "07_upsampler/image.pt", "07_upsampler/checkpoint.pt"])
def test_a_weight_that_is_missing_is_said(file: str, course: Path, tmp_path: Path) -> None:
    """Left as it was initialized, it would give a video that is merely worse."""
    name = file.split("/")[0]
    for folder in ("02_image_ldm", name):
        shutil.copytree(course / folder, tmp_path / folder)
    content = load_checkpoint(tmp_path / file, "")
    content["ema"]["shadow"].popitem()
    save_checkpoint(tmp_path / file, content)
    run = finished(name, tmp_path)
    run.config, run.data, run.device = dataclasses.replace(run.config, out=str(tmp_path)), "", torch.device("cpu")
    image = import_module("02_image_ldm").load(run)
    with pytest.raises(UserError, match="checkpoint.pt does not fit this network: 1 names missing"):
        import_module(name).load(run, image)


def test_known_good_values_notice_a_broken_run(course: Path, capsys: pytest.CaptureFixture) -> None:
    lesson, run = import_module("03_temporal_layers"), finished("03_temporal_layers", course)  # with a wrong number
    known_good(run, lesson.PRESETS)
    assert "outside" not in capsys.readouterr().out
    run.numbers["alpha, largest"]["value"] = 0.9
    known_good(run, lesson.PRESETS)
    assert "outside: alpha, largest is 0.9" in capsys.readouterr().out
    run.told = {Path("checkpoints/02_image_ldm")}  # nor has what stands on shipped weights that of a course
    known_good(run, lesson.PRESETS)
    assert not capsys.readouterr().out
    run.told = set()
    run.config.lr *= 2  # other flags have no expectation
    known_good(run, lesson.PRESETS)
    assert not capsys.readouterr().out


def test_apples_gpu_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type in ("cuda", "cpu")


def test_there_are_eight() -> None:
    assert len(SCRIPTS) == 8


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke_writes_what_the_contract_says(course: Path, name: str) -> None:
    folder = course / name
    assert json.loads((folder / "config.json").read_text())["preset"] == "smoke"
    assert "torch" in (folder / "env.txt").read_text()
    assert json.loads((folder / "numbers.json").read_text())
    assert list(folder.glob("*.png")) and not list(folder.glob("*.part*"))
    if name in TRAINED:
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert content["script"] == name and content["step"] > 0
        modes = {(folder / file).stat().st_mode for file in ("checkpoint.pt", "config.json")}
        assert len(modes) == 1, modes  # colleagues who may read the folder may read the weights
        assert (folder / "metrics.csv").read_text().startswith("step,")


def test_lesson_8_writes_a_video_of_the_length_asked_for(course: Path) -> None:
    with Image.open(course / "08_sample_long" / "long.webp") as video:
        shown = []
        for frame in range(video.n_frames):  # of two that are alike the file holds one, for twice as long
            video.seek(frame)
            video.load()
            shown.append(video.info["duration"])
        assert sum(shown) == 30 * 33 and video.size == (128, 64)  # one second, four times 32 x 16
    assert len((course / "08_sample_long" / "drift.csv").read_text().splitlines()) == 31


@pytest.mark.parametrize("preset", ["smoke", "cpu", "gpu", "paper", "biking"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_prints_rows_and_writes_nothing(
    name: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import_module(name).main(["--preset", preset, "--dry-run", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert all(": " in line for line in lines) and any("parameters: " in line for line in lines)
    assert name in ("01_toy_alignment", "08_sample_long") or any("FLOPs per training step: " in line for line in lines)
    assert not (tmp_path / "out").exists()


def rows_of(name: str, capsys: pytest.CaptureFixture, *flags: str) -> dict[str, str]:
    import_module(name).main(["--preset", "paper", "--dry-run", *flags])
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_the_paper_preset_is_table_6(capsys: pytest.CaptureFixture) -> None:
    image = rows_of("02_image_ldm", capsys)
    assert image["latents"] == "(640, 4, 16, 32)" and image["channels"] == "224" and image["regularizer"] == "vq"
    prediction = rows_of("05_prediction", capsys, "--flops", "1e15")
    hours = float(prediction["unet FLOPs per training step"]) * 146_000 / 1e15 / 3600
    assert prediction["unet time of 146000 steps at 1e+15 FLOP/s"] == f"{hours:.3g} h"
    assert prediction["c_S"] == "(360, 10, 5, 16, 32)" and prediction["known_features"] == "128"
    assert prediction["ddim_steps"] == "200" and prediction["eta"] == "1.0" and prediction["guidance"] == "2.0"
    interpolation = rows_of("06_interpolation", capsys)
    assert interpolation["clips"] == "(384, 5, 4, 16, 32)" and interpolation["stage token"] == "(384, 1, 512)"
    assert interpolation["eta"] == "0.0" and interpolation["ddim_steps"] == "50"
    import_module("06_interpolation").main(["--preset", "biking", "--dry-run"])
    assert "eta: 1.0" in capsys.readouterr().out.splitlines()  # the other column of Table 6
    upsampler = rows_of("07_upsampler", capsys)
    assert upsampler["large frames"] == "(8, 3, 512, 1024)" and upsampler["image_lr"] == "1e-05"


def assert_identical(one: object, two: object, where: str = "") -> None:
    """Of two checkpoints: weights, moments, averages, steps."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_identical(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif not where.startswith("/config"):
        assert one == two, where


@pytest.mark.parametrize(("name", "file", "flag", "others"),
                         [(name, "checkpoint.pt", "--steps", ()) for name in TRAINED]
                         + [("02_image_ldm", "autoencoder.pt", "--ae-steps", ("--steps", "0", "--ae-muon", "0.01")),
                            ("07_upsampler", "image.pt", "--image-steps", ("--steps", "0")),
                            ("03_temporal_layers", "checkpoint.pt", "--steps", ("--muon", "0.01"))])  # fmt: skip
def test_resume_gives_the_same_checkpoint(course: Path, name: str, file: str, flag: str, others: tuple,
                                          tmp_path: Path) -> None:
    """--steps 2 and then --steps 5 --resume equal --steps 5: no schedule depends on the total."""
    found = []
    for run, sequence in (("once", [["5"]]), ("twice", [["2"], ["5", "--resume"]])):
        out = tmp_path / run
        out.mkdir()
        for part in ("02_image_ldm", "03_temporal_layers", "05_prediction"):
            if part != name:
                (out / part).symlink_to(course / part)
        for more in sequence:
            import_module(name).main(["--preset", "smoke", "--out", str(out), *others, flag, *more])
        found.append(torch.load(out / name / file, weights_only=True))
    assert found[0]["step"] == 5
    assert_identical(*found)


def test_spatial_weights_did_not_move(course: Path) -> None:
    numbers = json.loads((course / "03_temporal_layers" / "numbers.json").read_text())
    assert numbers["spatial weights changed"]["value"] == 0
    content = torch.load(course / "03_temporal_layers" / "checkpoint.pt", weights_only=True)
    assert all("time_" in key for key in content["model"])  # and nothing spatial is kept twice


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("03_temporal_layers", [], "make it with: python 02_image_ldm.py --preset smoke"),
        ("05_prediction", ["--context-shares", "1", "0"], "want three"),
        ("02_image_ldm", ["--data", "no/such/folder"], "cannot be read"),
        ("02_image_ldm", ["--height", "18"], "not divisible"),
        ("02_image_ldm", ["--preset", "huge"], "smoke, cpu"),
        ("02_image_ldm", ["--device", "abacus"], "--device abacus"),
        ("02_image_ldm", ["--precision", "float8"], "float32 or bfloat16"),
        ("02_image_ldm", ["--sample-boxes", "no.json", "--condition", "boxes"], "no.json"),
        ("08_sample_long", ["--first-frame", "no.png"], "no.png"),
        ("08_sample_long", ["--passes", "3"], "0 to 2"),
    ],
)
def test_bad_input_is_one_line(name: str, flags: list[str], says: str, tmp_path: Path) -> None:
    preset = [] if "--preset" in flags else ["--preset", "smoke"]
    with pytest.raises(UserError) as error:
        import_module(name).main([*preset, "--out", str(tmp_path), *flags])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_errors_end_in_exit_code_2_without_traceback(tmp_path: Path) -> None:
    done = start("03_temporal_layers", "--preset", "smoke", "--out", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    assert start("02_image_ldm", "--no-such-flag").returncode == 2


def test_a_broken_checkpoint_and_a_mismatched_one(course: Path, tmp_path: Path) -> None:
    lesson03 = import_module("03_temporal_layers")
    folder = tmp_path / "02_image_ldm"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes((course / "02_image_ldm" / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        lesson03.main(["--preset", "smoke", "--out", str(tmp_path)])
    content = torch.load(course / "02_image_ldm" / "checkpoint.pt", weights_only=True)
    content["config"]["colour"] = "blue"
    torch.save(content, folder / "checkpoint.pt")
    (folder / "autoencoder.pt").symlink_to(course / "02_image_ldm" / "autoencoder.pt")
    with pytest.raises(UserError, match="02_image_ldm was made by another version of it, with colour among"):
        lesson03.main(["--preset", "smoke", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="another configuration"):
        lesson03.main(["--preset", "smoke", "--out", str(course), "--lr", "5"])
    with pytest.raises(UserError, match="data driving"):
        data = ["--data", str(tmp_path), "--final-fps", "30"]
        lesson03.main(["--preset", "smoke", "--out", str(course), *data, "--overwrite"])


def test_a_folder_of_videos_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two lessons on little gifs: their rate is found, clips are read, latents are trained."""
    data = tmp_path / "clips"
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        frames = [Image.fromarray(rng.integers(0, 255, (20, 44, 3), dtype=np.uint8)) for _ in range(24)]
        frames[0].save(data / f"{i}.gif", save_all=True, append_images=frames[1:], duration=100)
    flags = ["--preset", "smoke", "--data", str(data), "--out", str(tmp_path / "out")]
    import_module("02_image_ldm").main([*flags, "--dry-run"])
    said = capsys.readouterr()
    assert "final_fps: 10.0" in said.out and "3 clips, 0.1 minutes, 10 fps, 44 x 20" in said.err
    assert not (tmp_path / "out").exists()
    import_module("02_image_ldm").main(flags)
    assert json.loads((tmp_path / "out" / "02_image_ldm" / "config.json").read_text())["final_fps"] == 10
    with pytest.raises(UserError, match="--final-fps"):  # 4 frames at 10 / 16 a second need 4.8 s, the clips have 2.4
        import_module("03_temporal_layers").main(flags)
    assert "other files" not in capsys.readouterr().err
    shutil.copy(data / "0.gif", data / "3.gif")
    import_module("04_decoder_finetune").main(flags)
    said = capsys.readouterr().err
    assert re.search(r"other files \(4 clips, \w+\) than 02_image_ldm was trained on \(3 clips", said), said


@pytest.mark.parametrize("flags", [[], ["--freeze-spatial"]])
def test_the_critics_are_weighed_at_the_decoders_last_layer(course: Path, tmp_path: Path, flags: list[str],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is trained, the layer that runs last, whatever stands last in the list of parameters."""
    lesson02, lesson04 = import_module("02_image_ldm"), import_module("04_decoder_finetune")
    shutil.copytree(course / "02_image_ldm", tmp_path / "02_image_ldm")
    weigh, ran, weighed = lesson02.adaptive_weight, [], []

    def watch(reconstruction: torch.Tensor, gan: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
        weights = [getattr(layer, "weight", None) for layer in ran]
        weighed.append(last_layer is [w for w in weights if w is not None and w.requires_grad and w.dim() > 3][-1])
        return weigh(reconstruction, gan, last_layer)

    monkeypatch.setattr(lesson02, "adaptive_weight", watch)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda layer, given, made: ran.append(layer))
    try:
        lesson04.main(["--preset", "smoke", "--out", str(tmp_path), *flags])
    finally:
        handle.remove()
    assert weighed == [True, True]


def test_image_variants(course: Path) -> None:
    """Boxes share the autoencoder; the file of boxes makes a first frame, which continues in two futures."""
    lesson02, boxes = import_module("02_image_ldm"), course / "boxes.json"
    flags = ["--preset", "smoke", "--out", str(course)]
    lesson02.main([*flags, "--condition", "boxes"])
    assert not (course / "02_image_ldm-boxes" / "autoencoder.pt").exists()
    boxes.write_text("[[0.4, 0.5, 0.6, 0.8]]", "utf-8-sig")  # as Windows' Notepad writes it
    lesson02.main([*flags, "--sample-boxes", str(boxes)])
    frame = course / "02_image_ldm-boxes" / "from_boxes.png"
    import_module("08_sample_long").main(
        [*flags, "--first-frame", str(frame), "--futures", "2", "--no-upsampler", "--seconds", "0.5", "--overwrite"]
    )
    folder = course / "08_sample_long"
    assert (folder / "long-0.webp").read_bytes() != (folder / "long-1.webp").read_bytes()
    boxes.write_text("[[0.4, 0.5, 0.3, 0.8]]")
    with pytest.raises(UserError, match="want a list"):
        lesson02.main([*flags, "--sample-boxes", str(boxes)])


@pytest.mark.parametrize("flags", [["--temporal", "attention"], ["--temporal", "conv"], ["--end-to-end"]])
def test_prediction_ablations(course: Path, flags: list[str]) -> None:
    import_module("05_prediction").main(["--preset", "smoke", "--out", str(course), *flags])
    assert (course / f"05_prediction-{flags[-1].removeprefix('--')}" / "checkpoint.pt").exists()


def test_pixel_baseline(course: Path) -> None:
    for name in ("02_image_ldm", "05_prediction"):
        import_module(name).main(["--preset", "smoke", "--out", str(course), "--pixel"])
        assert (course / f"{name}-pixel" / "checkpoint.pt").exists()


# %% Starting over


def test_trained_work_is_not_started_over_without_a_word(tmp_path: Path) -> None:
    flags = ["--preset", "smoke", "--out", tmp_path / "my runs", "--threads", "1"]
    assert start("01_toy_alignment", *flags).returncode == 0
    path = tmp_path / "my runs" / "01_toy_alignment" / "checkpoint.pt"
    before = path.read_bytes()
    again = start("01_toy_alignment", *flags)
    assert again.returncode == 2 and "--resume goes on with it, --overwrite replaces it" in again.stderr
    assert path.read_bytes() == before
    missing = start("03_temporal_layers", *flags)
    suggested = shlex.split(missing.stderr.strip().splitlines()[-1].partition("make it with: ")[2])
    assert suggested[:2] == ["python", "02_image_ldm.py"] and str(tmp_path / "my runs") in suggested


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    lock(tmp_path)
    lock(tmp_path)  # this process again
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n" \
           "from kit.errors import cli\nfrom kit.files import lock\n" \
           f"sys.exit(cli(lambda _: lock(Path({str(tmp_path)!r}))))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode == 2 and "is in use by another run" in other.stderr
    file = LOCKS.pop(tmp_path.resolve() / "lock")
    file.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_interrupted_video_can_be_played(course: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    lesson08 = import_module("08_sample_long")
    run = lesson08.Run("08_sample_long", lesson08.Config(preset="smoke", out=str(tmp_path)))

    def frames() -> Iterator[torch.Tensor]:
        for i in range(9):
            if i == 5:
                raise KeyboardInterrupt
            yield torch.zeros(3, 16, 32)

    with pytest.raises(KeyboardInterrupt, match="has the 5 of 9 frames made until then"):
        lesson08.write(run, "long", frames(), 9, 10.0)
    with av.open(str(run.folder / "long.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5


# %% Settings have ranges

EVERY = sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("name", EVERY)
def test_every_number_has_a_range_and_is_held_to_it(name: str, tmp_path: Path) -> None:
    lesson, out = import_module(name), tmp_path / "out"
    for field in dataclasses.fields(lesson.Config):
        kind, _, allowed = kind_of(lesson.Config, field.name)
        assert (allowed is not None) == (kind in (int, float)), f"{name}: {field.name} has no range"
        if allowed is None:
            continue
        flag, assigned = "--" + field.name.replace("_", "-"), f"--{field.name.replace('_', '-')}="
        for wrong in (allowed.low - 1, 2 * allowed.high + 1, *((math.nan, math.inf) if kind is float else ())):
            with pytest.raises(UserError, match=rf"{flag} \S+: must be {re.escape(str(allowed))}"):
                lesson.main([f"{assigned}{kind(wrong)}", "--out", str(out)])
        for wrong in ("", "x", *(("nan", "1.5") if kind is int else ())):
            with pytest.raises(SystemExit) as stopped:
                lesson.main([f"{assigned}{wrong}", "--out", str(out)])
            assert stopped.value.code == 2
    assert not out.exists()


@pytest.mark.parametrize(("name", "flags"), [
    ("02_image_ldm", "--multipliers"), ("02_image_ldm", "--attention 3"), ("02_image_ldm", "--channels 50"),
    ("02_image_ldm", "--beta-start 0.1"), ("03_temporal_layers", "--alpha-frames 3 --frames 4"),
    ("04_decoder_finetune", "--kernel 2"), ("05_prediction", "--context-shares 0.5 0.6 0.1"),
    ("06_interpolation", "--ddim-steps 1000"), ("09_text_to_video", "--size 64"), ("12_tables", "--seeds"),
])
def test_settings_that_cannot_be(name: str, flags: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{flags.split()[0]}"):
        import_module(name).main([*flags.split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_help_says_ranges_and_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        import_module("02_image_ldm").main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(0 to 1; default 0.3)" in said and "(1 to 1000; default 25)" in said
