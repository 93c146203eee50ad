"""kill -9 at random moments: what was saved loads, and at most the steps since the last save are lost.

    python tests/test_kills.py 60        as many kills, over all the training scripts; a few are part of the tests
"""

import csv
import errno
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kit.errors import UserError  # noqa: E402
from kit.files import load_checkpoint, save_checkpoint  # noqa: E402

SAVE_EVERY = 4
SCRIPTS = {  # and the flags that make them run long enough to be killed
    "02_image_ldm": ["--ae-steps", "5000", "--steps", "5000"],
    "03_temporal_layers": ["--steps", "5000"],
    "04_decoder_finetune": ["--steps", "5000"],
    "05_prediction": ["--steps", "5000"],
    "06_interpolation": ["--steps", "5000"],
    "07_upsampler": ["--image-steps", "2500", "--steps", "2500"],
    "09_text_to_video": ["--steps", "2500", "--interpolation-steps", "2500"],
    "10_personalization": ["--steps", "5000"],
    "11_latent_upsampler": ["--image-steps", "2500", "--steps", "2500"],
    "01_toy_alignment": ["--image-steps", "100000", "--steps", "100000"],
}


def start(name: str, out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, f"{name}.py", "--preset", "smoke", "--threads", "1", "--out", str(out)]
    return subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> None:
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said


def saved_steps(folder: Path) -> dict[str, int]:
    """The step of every checkpoint. All files have to load."""
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    return {path.name: load_checkpoint(path, "")["step"] for path in sorted(folder.glob("*.pt"))}


def last_row(folder: Path, checkpoint: str) -> int:
    name = {"checkpoint.pt": "metrics.csv"}.get(checkpoint, checkpoint.replace(".pt", ".csv"))
    with (folder / name).open() as file:
        return max((int(row["step"]) for row in csv.DictReader(file) if row["step"]), default=-1)


def kill_again_and_again(name: str, out: Path, kills: int, draw: random.Random) -> None:
    folder, before = out / name, {}
    for number in range(kills):
        process = start(name, out, *SCRIPTS[name], "--save-every", str(SAVE_EVERY), "--resume")
        until = time.monotonic() + draw.uniform(0.5, 9)  # the first seconds go into imports
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        said = process.communicate()[1]
        assert process.returncode in (-9, 0), said
        now = saved_steps(folder) if folder.exists() else {}
        print(f"{name}, kill {number + 1}: {now or 'nothing saved yet'}", flush=True)
        for file, step in before.items():
            assert now[file] >= step, f"{name}: {file} went back from step {step} to {now[file]}"
        for file, step in now.items():
            lost = last_row(folder, file) + 1 - step
            assert lost <= SAVE_EVERY or "01_toy" in name, f"{name}: {lost} steps lost in {file}"
        before = now


def what_others_stand_on(out: Path, text: bool) -> None:
    """Whole lessons 2, 3 and 5; for the lessons on text also the text backbone and lesson 9."""
    for name, *flags in (["02_image_ldm"], ["03_temporal_layers"], ["05_prediction"],
                         ["02_image_ldm", "--condition", "text"], ["09_text_to_video"])[: 5 if text else 3]:
        finished(start(name, out, *flags))


def killing(names: list[str], kills: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, draw = Path(folder) / "base", random.Random(seed)
        what_others_stand_on(base, text=max(names) > "08")
        for name in names:
            out = Path(folder) / name
            out.mkdir()
            for part in base.iterdir():
                if part.name != name:
                    (out / part.name).symlink_to(part)
            kill_again_and_again(name, out, kills, draw)
            flags = [flag if not flag.isdigit() else "12" for flag in SCRIPTS[name]]
            finished(start(name, out, *flags, "--resume"))  # and it can go on to its end
            assert not list((out / name).glob("*.part*"))


def test_a_killed_run_goes_on_from_its_last_save() -> None:
    killing(["05_prediction"], 3, seed=1)


def test_sigterm_saves_and_exits_as_a_scheduler_expects(tmp_path: Path) -> None:
    process = start("01_toy_alignment", tmp_path, "--image-steps", "100000", "--save-every", "100000")
    folder = tmp_path / "01_toy_alignment"
    while process.poll() is None and not (folder / "image.csv").exists():  # until it trains
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and "go on with --resume" in said, said
    assert 0 < saved_steps(folder)["image.pt"] < 100_000


def test_a_full_disk_is_one_line_and_spares_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"config": {}, "step": 1})
    before = path.read_bytes()

    def full(content: dict, file) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device; the one saved before is untouched"):
        save_checkpoint(path, {"config": {}, "step": 2})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_says_which_picture_and_spares_the_one_before(tmp_path: Path) -> None:
    """A file may have 2,000 bytes here, and noise needs more: as png, plot, gif, webp and text."""
    kinds = {"sheet.png": "sheet([video], path)", "plot.png": "save_figure(plt.figure(), path)",
             "clip.gif": "animation(video[None], path, 10)", "clip.webp": "animation(video[None], path, 10)",
             "said.txt": "write_text(path, 'word ' * 1000)"}
    program = ["import resource, torch", "from pathlib import Path", "from kit.errors import cli",
               "from kit.files import write_text", "from kit.pictures import animation, plt, save_figure, sheet",
               "video = torch.rand(4, 3, 64, 64) * 2 - 1", "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"]
    for name, write in kinds.items():
        (tmp_path / name).write_bytes(b"before")
        program += [f"path = Path({str(tmp_path / name)!r})", f"print(cli(lambda _: {write}))"]
    process = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout.split() == ["2"] * len(kinds), process.stderr
    for name, said in zip(kinds, process.stderr.splitlines(), strict=True):
        assert str(tmp_path / name) in said and "free some space" in said
        assert (tmp_path / name).read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kinds)


def test_an_unwritable_out_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    process = start("01_toy_alignment", tmp_path / "file")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and said.count("\n") == 1 and "choose another --out" in said, said


def test_whoever_reads_the_output_may_go_away() -> None:
    """`script --dry-run | head`: one line, and the exit code that a shell gives to what dies of a closed pipe."""
    process = subprocess.Popen([sys.executable, str(ROOT / "01_toy_alignment.py"), "--dry-run"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 141 and said.count("\n") == 1 and "what read the output is gone" in said, said


if __name__ == "__main__":
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    killing(list(SCRIPTS), -(-total // len(SCRIPTS)), seed=0)
    print("every file loaded after every kill")
