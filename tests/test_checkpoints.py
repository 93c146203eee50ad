"""The small trained weights of the repository: where they come from, how large they are, that a video comes out."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

from extra.metrics import checksum
from kit.errors import UserError
from kit.files import CHECKPOINTS, load_checkpoint
from kit.flags import preset_config
from tests.test_scripts import ROOT, start

lesson08, tables = import_module("08_sample_long"), import_module("12_tables")
MADE = json.loads((CHECKPOINTS / "made.json").read_text())


def packing() -> dict:
    scope: dict = {"__file__": str(ROOT / "docs" / "pack.py"), "__name__": "pack"}
    exec((ROOT / "docs" / "pack.py").read_text(), scope)  # docs/ is no package
    return scope


def test_every_file_says_how_it_was_made_and_all_are_small() -> None:
    files = {str(path.relative_to(CHECKPOINTS)) for path in CHECKPOINTS.rglob("*.pt")}
    assert files == set(MADE) == set(packing()["CURVES"])
    for name, made in MADE.items():
        assert made["command"].startswith("python ") and len(made["commit"]) == 40 and made["seed"] == 0
        assert (CHECKPOINTS / name).stat().st_size == made["bytes"]
        assert (CHECKPOINTS / made["curve"]).read_text().startswith("step,")
    assert sum(path.stat().st_size for path in CHECKPOINTS.rglob("*.*")) <= 40 * 2**20


def test_weights_are_those_of_the_cpu_preset() -> None:
    for name in (name for name in packing()["CURVES"] if not name.startswith("readers")):
        lesson = import_module(name.split("/")[0])
        default = preset_config(lesson.Config, lesson.PRESETS, "cpu")
        theirs = load_checkpoint(CHECKPOINTS / name, "")["config"]
        for key in ("channels", "multipliers", "height", "width", "kernel", "feed_forward", "known_features"):
            assert theirs.get(key) == getattr(default, key, None), (name, key)


def test_a_long_video_comes_out_of_a_fresh_clone(tmp_path: Path) -> None:
    flags = ("--seconds", "1", "--passes", "1", "--ddim-steps", "1", "--no-upsampler", "--out", tmp_path)
    done = start("08_sample_long", *flags)
    assert done.returncode == 0 and "taking the shipped one" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "08_sample_long" / "long.webp").stat().st_size > 1000
    assert not (tmp_path / "02_image_ldm").exists()  # nothing was trained


def test_trained_lessons_of_out_come_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "02_image_ldm").mkdir()
    shutil.copy(CHECKPOINTS / "02_image_ldm" / "autoencoder.pt", tmp_path / "02_image_ldm")
    with pytest.raises(UserError, match="02_image_ldm.py"):  # the next one is missing, and is not taken from elsewhere
        lesson08.main(["--out", str(tmp_path)])
    for other in (["--preset", "smoke"], ["--data", str(tmp_path), "--final-fps", "30"]):
        with pytest.raises(UserError, match="02_image_ldm.py"):
            lesson08.main(["--out", str(tmp_path / "other"), "--overwrite", *other])
    assert "shipped" not in capsys.readouterr().out


def test_tables_measure_with_the_readers_of_the_repository(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = preset_config(tables.Config, tables.PRESETS, "tables", out=str(tmp_path))
    reader = tables.World(config, 0).frame_reader
    assert "using" in capsys.readouterr().out and not (tmp_path / "readers" / "frames.pt").exists()
    results = json.loads((ROOT / "results" / "tables.json").read_text())
    networks = {n["protocol"]["network"] for r in results["records"] for m, n in r["numbers"].items() if m == "IS"}
    assert networks == {f"FrameReader {checksum(reader)}"}


def test_packing_halves_the_averaged_weights_and_says_when_there_is_nothing(tmp_path: Path) -> None:
    half = packing()["half"]({"w": torch.tensor([1.0, 2.5]), "n": torch.tensor(3)})
    assert half["w"].dtype == torch.float16 and half["w"].tolist() == [1.0, 2.5] and half["n"].dtype == torch.int64
    curve = tmp_path / "metrics.csv"
    curve.write_text("step,loss\n" + "".join(f"{i},{i % 2}\n" for i in range(100)))
    assert packing()["thinned"](curve) == "step,loss\n49,0.5\n99,0.5\n"
