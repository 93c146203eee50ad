"""Lesson 12: distances against closed forms, protocols that refuse to mix, verdicts that can fail, the study's page."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from extra.metrics import (
    FAULTS,
    ClipReader,
    Detector,
    FrameReader,
    Protocol,
    Reading,
    box_iou,
    checksum,
    corruptions,
    frechet_distance,
    inception_score,
    same_protocol,
    spoil,
)
from judging import world
from judging.numbers import number
from judging.pages import add_rows, outdated, read_results, summary, verdict
from judging.study import wilson
from judging.verdicts import TIMELESS, judge, self_checks
from kit.data import DrivingScenes
from kit.errors import UserError
from kit.flags import preset_config
from kit.pictures import animation
from tests.test_scripts import ROOT, start

tables = import_module("12_tables")
HOLD = """
import sys
from pathlib import Path
from kit.files import lock
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
lock(folder)
print("locked", flush=True)
sys.stdin.read()
"""


# %% Metrics against what can be computed by hand


def test_frechet_distance_of_normal_distributions_is_the_closed_form() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=draw) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(200_000, 3, generator=draw) * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([0.0, 3.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0.25, rel=0.02)  # |mu|^2 + sum (sigma_a - sigma_b)^2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_correlated_features() -> None:
    """Against the definition with a general matrix root, which scipy would give; here by its eigenvalues."""
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(50, 4, generator=draw).double() @ torch.randn(4, 4, generator=draw).double() for _ in "ab")
    roots = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4))])
def test_frechet_distance_wants_matching_features(shapes: tuple) -> None:
    with pytest.raises(ValueError, match="want n d"):
        frechet_distance(*(torch.zeros(s) for s in shapes))


def test_inception_score_counts_sure_and_different_answers() -> None:
    sure = torch.eye(9)[torch.arange(9)]
    assert inception_score(Reading(torch.zeros(9), sure, torch.zeros(9))) == pytest.approx(9, rel=1e-4)
    same = sure[:1].expand(9, -1)
    assert inception_score(Reading(torch.zeros(9), same, torch.zeros(9))) == pytest.approx(1, rel=1e-4)
    unsure = torch.full((9, 9), 1 / 9)
    assert inception_score(Reading(torch.full((9,), 0.5), unsure, torch.zeros(9))) == pytest.approx(1, rel=1e-4)


def test_box_iou_of_a_perfect_and_of_a_shifted_reading() -> None:
    boxes = torch.zeros(1, 8, 4)
    boxes[0, 0] = torch.tensor([0.25, 0.5, 0.5, 1.0])
    where = torch.zeros(1, 1, 16, 32)
    where[..., 8:, 8:16] = 1
    assert box_iou(Reading(torch.zeros(1), torch.zeros(1, 9), where), boxes) == 1
    assert box_iou(Reading(torch.zeros(1), torch.zeros(1, 9), where.roll(4, -1)), boxes) == pytest.approx(1 / 3)


def test_shuffling_frames_keeps_the_frames_and_changes_their_order() -> None:
    video = torch.rand(3, 5, 3, 8, 16)
    shuffled = corruptions(video, torch.Generator().manual_seed(0))["shuffled frames"]
    assert not torch.equal(shuffled, video)
    assert torch.equal(shuffled.sum(1), video.sum(1)) or torch.allclose(shuffled.sum(1), video.sum(1), atol=1e-5)
    for a, b in zip(video, shuffled, strict=True):
        assert sorted(f.sum().item() for f in a) == sorted(f.sum().item() for f in b)


def test_readers_learn_to_read() -> None:
    """A minute of training gives good readers; sixty steps must already tell night from day."""
    torch.manual_seed(0)
    reader, scenes = FrameReader(), DrivingScenes(32, 64, 30.0)
    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3)
    for step in range(60):
        loss = reader.loss(scenes.clips((0, step), 16, 1, 30.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips = scenes.clips((1, 0), 64, 1, 30.0, "held-out")
    with torch.no_grad():
        night, _, _ = reader.heads(reader(clips.video[:, 0]))
    assert ((night > 0).long() == clips.night).float().mean() > 0.9


def test_seeds_side_by_side_read_with_the_same_shipped_reader(tmp_path: Path) -> None:
    config = preset_config(tables.Config, tables.PRESETS, "tables", out=str(tmp_path), device="cpu")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "readers")], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # as if another one trained readers
        assert other.stdout.readline().strip() == "locked"
        assert isinstance(tables.World(config, 1).clip_reader, ClipReader)
        other.communicate("done")


def test_lessons_train_as_the_tables_are_told_to() -> None:
    flags = {"workers": 3, "cuda_graphs": True, "device_noise": True, "threads": 1}
    config = preset_config(tables.Config, tables.PRESETS, "tables", **flags)
    for lesson in (tables.lesson02, tables.lesson03, tables.lesson04, tables.lesson07):
        told = world.lesson_config(config, lesson)
        assert {name: getattr(told, name) for name in flags} == flags


def test_clip_reader_sees_the_order_of_frames() -> None:
    torch.manual_seed(0)
    reader, video = ClipReader().eval(), DrivingScenes(32, 64, 30.0).clips((0,), 2, 5, 2.0).video
    with torch.no_grad():
        assert not torch.allclose(reader(video), reader(video.flip(1)), atol=1e-5)
        assert reader(video[:, :3]).shape == reader(video).shape == (2, ClipReader.FEATURES)


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_fault_is_what_its_name_says(fault: str) -> None:
    draw, frames = torch.Generator().manual_seed(0), torch.arange(9.0)[:, None, None, None].expand(9, 3, 16, 32) / 9
    number = FAULTS.index(fault) if fault in FAULTS else -1
    clip = spoil(frames, number, 5.0, draw)
    places = [round(9 * float(frame.mean())) for frame in clip]
    steps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert len(clip) == 8
    if fault == "jittering":
        still = spoil(torch.zeros(9, 3, 16, 32), number, 5.0, draw)
        assert 127.5 * float((still[1:] - still[:-1]).abs().mean()) == pytest.approx(5, rel=0.02)
    elif fault == "shuffled":
        assert sorted(places) == list(range(8)) and places != list(range(8))
    else:
        assert sorted(steps) == {"none": [1] * 7, "reversed": [-1] * 7, "dropped": [1] * 6 + [2],
                                 "repeated": [0, *[1] * 5, 2]}[fault]


# %% Detectors from a file


class Inception(torch.nn.Module):
    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return img.float().mean(dim=(2, 3))


class I3D(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True,
                return_features: bool = False) -> torch.Tensor:
        if rescale or resize:
            raise ValueError("the frames have been prepared already")
        return x.mean(dim=(3, 4))


@pytest.mark.parametrize(("network", "of_clips", "rows"), [(Inception, False, 32), (I3D, True, 2)])
def test_detectors_from_a_file(tmp_path: Path, network: type, of_clips: bool, rows: int) -> None:
    torch.jit.script(network()).save(str(tmp_path / "d.pt"))
    detector = Detector(str(tmp_path / "d.pt"), torch.device("cpu"))
    assert detector.of_clips is of_clips and len(detector.checksum) == 16
    assert len(detector.features(torch.zeros(2, 16, 3, 32, 64))) == rows


def test_a_file_that_is_no_detector(tmp_path: Path) -> None:
    (tmp_path / "d.pt").write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable TorchScript"):
        Detector(str(tmp_path / "d.pt"), torch.device("cpu"))


# %% Protocols and verdicts


def entry(value: float, **changes: object) -> dict:
    about = dict(metric="toy-FVD", network="n", frames=8, fps=2.0, size="32 x 64", samples=256, references=1024)
    return number(value, Protocol(**about | changes))


def test_numbers_of_different_protocols_refuse_to_be_compared() -> None:
    same_protocol([entry(1), entry(2)])
    with pytest.raises(UserError, match="samples 256 and 128"):
        same_protocol([entry(1), entry(2, samples=128)])


def records(row: str, values: list[float], table: str = "ablations", metric: str = "toy-FVD") -> list[dict]:
    numbers = [{metric: entry(v)} for v in values]
    return [{"table": table, "row": row, "seed": i, "numbers": n} for i, n in enumerate(numbers)]


@pytest.mark.parametrize(
    ("pixel", "holds"),
    [([12, 13, 14], True), ([10.1, 13, 25], False), ([12, 9, 14], False), ([8, 7, 6], False)],
)  # clear; too noisy; one seed the other way; the other way
def test_an_ordering_holds_only_when_it_is_clear(pixel: list[float], holds: bool) -> None:
    (verdict,) = judge(records("ours", [10, 10, 10]) + records("pixel", pixel), tables.CLAIMS)
    assert verdict.holds is holds


@pytest.mark.parametrize(("learned", "holds"), [([5.1, 4.9, 5.0], True), ([8, 8, 8], False)])
def test_an_equivalence_is_measured_by_the_floor(learned: list[float], holds: bool) -> None:
    rows = records("real", [1, 1, 1], "conditional", "toy-FID") + records("alpha = 1", [5, 5, 5], "alpha", "toy-FID")
    (verdict,) = judge(rows + records("learned alpha", learned, "alpha", "toy-FID"), tables.CLAIMS)
    assert verdict.holds is holds


@pytest.mark.parametrize(
    ("mismatch", "word"),
    [([0.2, 0.3, 0.2], "holds"), ([0.05, 0.06, 0.05], "open: the two numbers disagree"), ([0.05, 0.2, 0.05], "holds")],
)  # agrees; the other way in every seed; not in every seed
def test_what_a_person_sees_can_leave_an_ordering_open(mismatch: list[float], word: str) -> None:
    rows = records("ours", [10] * 3) + records("pixel", [12, 13, 14])
    for record, value in zip(rows, [0.1, 0.1, 0.1, *mismatch], strict=True):
        record["numbers"]["mismatch"] = entry(value)
    (found,) = judge(rows, tables.CLAIMS)
    assert found.word == word and found.seen_beside.startswith("mismatch ")


def test_rows_of_another_reader_are_outdated() -> None:
    (row,) = records("ours", [10])
    row["numbers"]["toy-FVD"]["protocol"]["network"] = "ClipReader 12ab"
    assert outdated(row, {"ClipReader 34cd", "FrameReader 56ef"}) and not outdated(row, {"ClipReader 12ab"})


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_prove_no_ordering(seeds: int) -> None:
    (verdict,) = judge(records("ours", [10] * seeds) + records("pixel", [20] * seeds), tables.CLAIMS)
    assert not verdict.holds


def test_self_checks_fail_where_a_metric_is_blind() -> None:
    rows = {"real against itself": 0, "real against real": 1, "real, half as many": 2, "little noise": 2,
            "more noise": 3, "blur": 3, "fewer cars": 3}
    rows |= {row: 11 for row in (*TIMELESS, "jitter of 5 levels")}
    seen = [r for row, v in rows.items() for r in records(row, [v], "checks")]
    assert all(good for _, good in self_checks(seen))
    blind = [r for r in seen if r["row"] not in ("blur", "half speed")]
    blind += records("blur", [0.5], "checks") + records("half speed", [9], "checks")
    assert [s for s, good in self_checks(blind) if not good] == [
        "blur raises toy-FVD above real against real",
        "half speed: toy-FVD is 9 times that of real clips (at least 10)"]


def test_a_self_check_that_holds_by_less_than_its_spread_does_not_hold() -> None:
    found = [r for row, v in {"real against itself": [0, 0, 0], "real against real": [1, 1, 1],
                              "little noise": [1.1, 1.2, 3]}.items() for r in records(row, v, "checks")]
    assert not dict(self_checks(found))["little noise raises toy-FVD above real against real"]


# %% The script


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    done = start("12_tables", "--preset", "smoke", "--out", folder / "run", "--results", folder / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_row_is_measured_with_its_protocol(measured: Path) -> None:
    results = json.loads((measured / "results" / "tables.json").read_text())
    wanted = {(name, row.name) for name, (_, rows) in tables.TABLES.items() for row in rows if row.measure}
    assert {(r["table"], r["row"]) for r in results["records"]} == wanted
    for record in results["records"]:
        assert record["seconds"] >= 0 and record["hardware"] and record["numbers"]
        for metric, found in record["numbers"].items():
            assert found["protocol"]["metric"] == metric.split(", to ")[0] or found["protocol"]["metric"] == metric
    for name in tables.TABLES:
        assert (measured / "results" / f"{name}.png").exists()
    by_row = {r["row"]: r["numbers"] for r in results["records"] if r["table"] == "checks"}
    assert by_row["real against itself"]["toy-FVD"]["value"] == pytest.approx(0, abs=1e-6)
    shuffled, real = by_row["shuffled frames"]["toy-FID"]["value"], by_row["real against real"]["toy-FID"]["value"]
    assert shuffled == pytest.approx(real, rel=1e-3)  # the same frames, in another order


def test_a_second_run_measures_nothing_and_an_interrupted_one_goes_on(measured: Path) -> None:
    path = measured / "results" / "tables.json"
    results, flags = json.loads(path.read_text()), ("--out", measured / "run", "--results", measured / "results")
    dropped = results["records"].pop()
    path.write_text(json.dumps(results))
    done = start("12_tables", "--preset", "smoke", *flags)
    assert done.returncode == 0, done.stderr
    again = json.loads(path.read_text())["records"]
    assert len(again) == len(results["records"]) + 1
    assert again[:-1] == results["records"]
    for metric, found in again[-1]["numbers"].items():  # trained and sampled from the same seed: the same number
        assert found["value"] == pytest.approx(dropped["numbers"][metric]["value"], abs=1e-6)


def test_processes_side_by_side_keep_each_others_rows(tmp_path: Path) -> None:
    config = preset_config(tables.Config, tables.PRESETS, "smoke", results=str(tmp_path))
    rows = [{"table": "ablations", "row": name, "seed": s, "numbers": {}} for s, name in ((1, "ours"), (0, "pixel"))]
    add_rows(config, tables.TABLES, rows[:1], set())
    add_rows(config, tables.TABLES, rows[1:], set())  # another process
    results = add_rows(config, tables.TABLES, rows[:1], set())
    assert results["records"] == [rows[1], rows[0]]  # each once, by seed
    assert json.loads((tmp_path / "tables.json").read_text()) == results


def test_a_row_drops_those_of_its_table_that_an_older_reader_read(tmp_path: Path) -> None:
    """Or one seed, measured again, could not be shown beside the others: numbers of two protocols in one column."""
    config = preset_config(tables.Config, tables.PRESETS, "smoke", results=str(tmp_path))
    old = [*records("ours", [10, 11]), *records("video decoder", [3], "decoder")]
    new = records("ours", [12])
    for row in old + new:
        row["numbers"]["toy-FVD"]["protocol"]["network"] = "ClipReader old" if row in old else "ClipReader new"
    add_rows(config, tables.TABLES, old, {"ClipReader old"})
    results = add_rows(config, tables.TABLES, new, {"ClipReader new"})
    assert results["records"] == [new[0], old[2]]  # another table waits until one of its rows is measured
    assert "| ours | 12 |" in summary(results, tables.TABLES, tables.CLAIMS)


def test_a_table_too_wide_for_a_page_has_a_line_for_each_number() -> None:
    numbers, rows = {f"m{i}": entry(i) for i in range(13)}, ("S = 1", "S = 2")
    results = {"records": [{"table": "rollouts", "row": row, "seed": 0, "numbers": numbers} for row in rows]}
    page = summary(results, tables.TABLES, tables.CLAIMS)
    assert "| row | S = 1 | S = 2 |\n| --- | --- | --- |\n| m0 | 0 | 0 |\n| m1 | 1 | 1 |" in page


def test_the_command_of_the_readme_goes_on_with_the_committed_results() -> None:
    """Other defaults would be refused in every clone: results made with other settings need a folder of their own."""
    assert read_results(tables.Config(results=str(ROOT / "results")))["records"]


def test_render_writes_the_same_text_again(measured: Path) -> None:
    text = (measured / "results" / "tables.md").read_text()
    done = start("12_tables", "--preset", "smoke", "--render", "--results", measured / "results")
    assert done.returncode == 0 and (measured / "results" / "tables.md").read_text() == text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--table", "nonsense"), "there is checks"),
        (("--samples", "10"), "needs more clips"),
        (("--rollouts", "48"), "needs more clips"),
        (("--data", "somewhere", "--final-fps", "30"), "judging/folders.py"),
        (("--detector", "none.pt"), "add --frames 16"),
        (("--preset", "smoke", "--detector", "none.pt", "--frames", "16"), "not a readable"),
        (("--render", "--results", "nowhere"), "no rows yet"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path: Path, flags: tuple, said: str) -> None:
    flags = flags if "--results" in flags else (*flags, "--results", tmp_path)
    done = start("12_tables", "--out", tmp_path / "run", *flags)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_results_of_other_settings_are_refused(measured: Path) -> None:
    done = start("12_tables", "--preset", "smoke", "--samples", "4", "--results", measured / "results")
    assert done.returncode == 2 and "samples 3 -> 4" in done.stderr


def test_compared_networks_train_the_same_number_of_parameters() -> None:
    for preset in ("smoke", "tables"):
        config = preset_config(tables.Config, tables.PRESETS, preset, out="/nowhere")
        counts = tables.trained_parameters(config)
        assert abs(counts["attention"] / counts["ours"] - 1) < 0.05, (preset, counts)


def test_checksums_tell_networks_apart() -> None:
    torch.manual_seed(0)
    one, other = FrameReader(), FrameReader()
    assert checksum(one) == checksum(one) != checksum(other)


def test_pages_show_the_committed_results() -> None:
    path = ROOT / "results" / "tables.json"
    if not path.exists():
        pytest.skip("no results are committed yet")
    results = json.loads(path.read_text())
    page = summary(results, tables.TABLES, tables.CLAIMS) + "\n"
    assert page == path.with_suffix(".md").read_text(), "run: python 12_tables.py --render"
    said = " ".join((ROOT / "README.md").read_text().split())
    assert verdict(results["records"], tables.CLAIMS) in said


def program(name: str, *flags: object) -> subprocess.CompletedProcess:
    """python -m NAME, as a user starts it."""
    return subprocess.run([sys.executable, "-m", name, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("folders", "ucf101"), "10,000 videos"),
        (("folders", "msrvtt", "--generated", "x"), "--clip FOLDER"),
        (("folders", "msrvtt", "--generated", "x", "--clip", "y", "--clips", "-1"), "negative"),
        (("study", "page", "x", "y"), "no video"),
        (("study", "score", "none.json"), "not the answers"),
    ],
)
def test_programs_end_in_one_line(flags: tuple, said: str) -> None:
    done = program(f"judging.{flags[0]}", *flags[1:])
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two folders of three animations, 20 frames at 10 fps, with captions; and a detector."""
    video = DrivingScenes(16, 32, 10.0).clips((0,), 6, 20, 10.0).video
    for i, clip in enumerate(video):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        animation(clip[None], folder / f"{i}.gif", 10, 1)
        (folder / f"{i}.txt").write_text("a red car")
    torch.jit.script(I3D()).save(str(tmp_path / "i3d.pt"))
    return tmp_path


def test_folders_judged_by_the_protocol_of_table_4(folders: Path) -> None:
    flags = ("ucf101", "--clips", 10, "--fps", 10, "--detector", folders / "i3d.pt", "--real", folders / "a")
    done = program("judging.folders", *flags, "--generated", folders / "b")
    assert done.returncode == 0, done.stderr
    assert "FVD: " in done.stdout and "frames=16" in done.stdout and "550.61" in done.stdout
    same = program("judging.folders", *flags, "--generated", folders / "a")
    assert "FVD: 0.00" in same.stdout or "FVD: -0.00" in same.stdout, same.stdout


# %% The human study


def test_scores_of_a_study_with_intervals(tmp_path: Path) -> None:
    answers = [{"preferred": p} for p in ["A"] * 60 + ["B"] * 30 + ["equal"] * 10]
    (tmp_path / "answers.json").write_text(json.dumps({"answers": answers}))
    done = program("judging.study", "score", tmp_path / "answers.json")
    assert done.returncode == 0 and "A: 60.0 %   (95 % interval 50.2 to 69.1, 60 of 100)" in done.stdout


def test_wilson_intervals_stay_between_zero_and_one() -> None:
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12) and wilson(10, 10)[1] <= 1
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, measured: Path) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name in "ab":
        (folder / name).mkdir()
        for i in range(3):
            shutil.copy(measured / "results" / "alpha.png", folder / name / f"{i}.png")
    done = program("judging.study", "page", folder / "a", folder / "b", "--to", folder / "study.html")
    assert done.returncode == 0 and "3 pairs" in done.stdout, done.stderr
    return folder / "study.html"


def test_study_shows_what_has_the_same_name_side_by_side(tmp_path: Path) -> None:
    for folder, names in (("ours", "1234"), ("theirs", "53641")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.png").write_bytes(name.encode())
    done = program("judging.study", "page", tmp_path / "ours", tmp_path / "theirs", "--to", tmp_path / "study.html")
    pairs = json.loads((tmp_path / "study.html").read_text().split("const pairs = ")[1].split(";\n")[0])
    shown = [{media["data"] for media in pair["media"]} for pair in pairs]
    assert "3 pairs" in done.stdout and len(pairs) == 3 and all(len(both) == 1 for both in shown)


def test_study_is_one_file_that_names_no_method(page: Path) -> None:
    text = page.read_text()
    assert text.count("data:image/png;base64") == 6 and "src=" not in text.replace("element.src =", "")
    assert str(page.parent) not in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_study_works_in_a_browser(page: Path) -> None:
    """Three answers by keyboard and mouse, one taken back; the page's own JSON is read out of the document."""
    steps = """
    <script>
    const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key: key }));
    press("ArrowLeft"); press("ArrowDown"); press("Backspace"); press("ArrowRight");
    document.querySelector("button[data-choice=equal]").click();
    document.title = JSON.stringify(answers) + (byId("end").hidden ? " open" : " over");
    </script>"""
    driven = page.with_name("driven.html")
    driven.write_text(page.read_text().replace("</html>", steps + "</html>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             f"--user-data-dir={page.parent}/profile", "--dump-dom", driven.as_uri()]
    shown = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=60).stdout
    said = shown.split("<title>")[1].split("</title>")[0]
    answers = json.loads(said.removesuffix(" over"))
    assert said.endswith(" over") and [a["choice"] for a in answers] == ["left", "right", "equal"]
    for answer in answers[:2]:
        other = {"A": "B", "B": "A"}[answer["left"]]
        assert answer["preferred"] == (answer["left"] if answer["choice"] == "left" else other)
    assert len({a["pair"] for a in answers}) == 3 and answers[2]["preferred"] == "equal"
