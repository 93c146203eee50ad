"""Processes, portions and shards train what one process with the whole batch would have trained."""

import csv
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from kit.errors import UserError
from kit.files import load_checkpoint
from kit.parallel import Share, divide

ROOT = Path(__file__).parent.parent
PLAIN = ["--preset", "smoke", "--precision", "float32", "--threads", "1"]


def by_two(name: str, *flags: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", f"{name}.py"]
    done = subprocess.run([*command, *PLAIN, *map(str, flags)], cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def by_one(name: str, *flags: object) -> None:
    import_module(name).main([*PLAIN, *map(str, flags)])


def rows_of(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def assert_same_training(one: Path, two: Path, file: str) -> None:
    """Losses to a relative 1e-5 (they are written with six digits). Weights to 1e-4: Adam divides by the size of a
    gradient, and so makes much of the rounding of a small one."""
    losses = rows_of(one / file.replace("checkpoint.pt", "metrics.csv").replace(".pt", ".csv"))
    assert losses
    for mine, theirs in zip(losses, rows_of(two / file.replace("checkpoint.pt", "metrics.csv").replace(".pt", ".csv")),
                            strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-9)
    for part in ("model", "autoencoder", "critic"):
        weights, others = (load_checkpoint(folder / file, "").get(part, {}) for folder in (one, two))
        assert weights.keys() == others.keys()
        for name, value in weights.items():
            torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Lesson 2 by one process and by two, in a folder each."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    flags = ["--ae-batch", 4, "--batch", 4]
    by_one("02_image_ldm", "--out", one, *flags)
    by_two("02_image_ldm", "--out", two, *flags)
    return one, two


@pytest.mark.parametrize(("processes", "portions"), [(1, 3), (2, 3), (6, 1), (3, 2)])
def test_a_divided_batch_has_the_noise_of_the_whole_one(processes: int, portions: int) -> None:
    def draw(rows: range) -> dict[int, tuple]:
        share = Share(rows, 6, torch.Generator().manual_seed(5), torch.device("cpu"), lambda loss: None)
        noise, times, drop = share.normal((2 * len(rows), 3)), share.integers(1000), share.uniform()
        letters = share.keep(list("abcdef"))
        return {row: (noise[2 * i : 2 * i + 2].tolist(), int(times[i]), float(drop[i]), letters[i])
                for i, row in enumerate(rows)}  # fmt: skip

    divided = [rows for rank in range(processes) for rows in divide(6, rank, processes, portions)]
    assert sorted(row for rows in divided for row in rows) == list(range(6))
    found = {}
    for rows in divided:
        found |= draw(rows)
    assert found == draw(range(6))


def test_two_processes_train_the_image_model_of_one(folders: tuple[Path, Path]) -> None:
    """The critic and its adaptive weight included."""
    for file in ("autoencoder.pt", "checkpoint.pt"):
        assert_same_training(folders[0] / "02_image_ldm", folders[1] / "02_image_ldm", file)


def test_twenty_steps_of_two_processes_with_a_pause(folders: tuple[Path, Path]) -> None:
    """Two processes, stopped and resumed, against one process that computes its batch in portions."""
    one, two = folders
    flags = ["--batch", 4]
    by_two("03_temporal_layers", "--out", two, "--steps", 9, *flags)
    by_two("03_temporal_layers", "--out", two, "--steps", 20, "--resume", *flags)
    by_one("03_temporal_layers", "--out", one, "--steps", 20, "--accumulate", 2, *flags)
    assert_same_training(one / "03_temporal_layers", two / "03_temporal_layers", "checkpoint.pt")


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU (2.6 does)")
def test_a_sharded_text_to_video_model_is_trained_as_a_whole_one(folders: tuple[Path, Path]) -> None:
    one, two = folders
    flags = ["--batch", 2, "--interpolation-batch", 2, "--spatial-steps", 1]
    for out in folders:
        by_one("02_image_ldm", "--condition", "text", "--out", out)
    (two / "02_image_ldm" / "autoencoder.pt").write_bytes((one / "02_image_ldm" / "autoencoder.pt").read_bytes())
    (two / "02_image_ldm-text" / "checkpoint.pt").write_bytes((one / "02_image_ldm-text/checkpoint.pt").read_bytes())
    by_two("09_text_to_video", "--out", two, "--shard", "--checkpointing", *flags)
    by_one("09_text_to_video", "--out", one, *flags)
    for file in ("spatial.pt", "checkpoint.pt", "interpolation.pt"):
        assert_same_training(one / "09_text_to_video", two / "09_text_to_video", file)


def test_a_batch_that_cannot_be_divided_is_one_line(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="a batch of 1 cannot be divided among 1 processes with --accumulate 2"):
        by_one("05_prediction", "--out", folders[0], "--accumulate", 2)
    by_one("05_prediction", "--out", folders[0], "--batch", 2, "--accumulate", 2)  # the failed start is not in the way


def test_a_loss_that_is_not_finite_names_step_stage_and_layer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "02_image_ldm").symlink_to(folders[0] / "02_image_ldm")
    by_one("03_temporal_layers", "--out", tmp_path, "--save-every", 1)
    path = tmp_path / "03_temporal_layers" / "checkpoint.pt"
    content = load_checkpoint(path, "")
    name = next(name for name in content["model"] if "time_stack.in_layers.2.weight" in name)
    content["model"][name][:] = torch.nan
    torch.save(content, path)
    before = path.read_bytes()
    where = rf"03_temporal_layers, step 3: .* model\.{name.removesuffix('.weight')} \("
    with pytest.raises(UserError, match=where.replace("[", r"\[")):
        by_one("03_temporal_layers", "--out", tmp_path, "--steps", 5, "--resume")
    assert path.read_bytes() == before


def test_work_for_one_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, *flags in (("08_sample_long",), ("12_tables",), ("09_text_to_video", "--prompt", "a car"),
                         ("02_image_ldm", "--sample-boxes", "boxes.json")):  # fmt: skip
        with pytest.raises(UserError, match="is work for one process; start it with python"):
            import_module(name).main(flags)
