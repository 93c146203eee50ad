"""README and docs/ say what the files say."""

import difflib
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from kit.errors import UserError
from kit.pictures import save_animation

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(path for folder in ("docs", "results", "exercises")
                              for path in sorted((ROOT / folder).glob("*.md")))]
LINK = re.compile(r"\]\(([^)#:]+)\)")


def test_the_table_of_numbers_is_the_one_collected() -> None:
    collect = runpy.run_path(str(ROOT / "docs" / "collect.py"))  # docs/ is no package
    assert collect["render"]() == collect["TARGET"].read_text()


def test_animations_in_pages_are_small(tmp_path: Path) -> None:
    """A long one has every second frame, in the same time; videos side by side are one."""
    collect = runpy.run_path(str(ROOT / "docs" / "collect.py"))
    grain = np.random.default_rng(0).integers(0, 256, (32, 80, 3), np.uint8)
    drive = [np.roll(grain, 4 * i, axis=1).repeat(4, axis=0).repeat(4, axis=1) for i in range(80)]
    drive[10:20] = 10 * [drive[10]]  # it stands
    save_animation(iter(drive), tmp_path / "drive.webp", 25)
    collect["copy_small"](tmp_path / "drive.webp", tmp_path / "small.webp")
    collect["side_by_side"]([tmp_path / "drive.webp"] * 2, tmp_path / "both.webp", 64)
    assert (tmp_path / "small.webp").stat().st_size <= collect["LIMIT"] < (tmp_path / "drive.webp").stat().st_size
    for name, size in (("small", None), ("both", (64 + 4 + 64, 26))):
        frames, pause = collect["frames_of"](tmp_path / f"{name}.webp", 1, 1000)
        assert len(frames) == 40 and len(frames) * pause == pytest.approx(80 * 40)
        assert frames[0].width <= 512 and size in (None, frames[0].size)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_in_pages_exist(page: Path) -> None:
    text = page.read_text()
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), link
    for path, names in re.findall(r"`((?:\w+/)?\w+\.py): ([\w, ]+)`", text):
        code = (ROOT / path).read_text()
        for name in names.split(", "):
            assert re.search(rf"(def|class) {name}\b", code), f"{path}: {name}"


def test_every_page_and_picture_is_linked() -> None:
    linked = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text())}
    for path in (*PAGES[1:], *(ROOT / "docs" / "figures").iterdir(), *(ROOT / "results").glob("*.png")):
        assert path.resolve() in linked, f"no page links to {path.relative_to(ROOT)}"


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_figures_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "docs" / "figures").iterdir()]
    assert max(sizes, default=0) <= 300_000 and sum(sizes) <= 5_000_000


def test_faults_that_no_flag_makes_have_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(ROOT / "docs" / "symptoms.py"))["main"]
    monkeypatch.chdir(tmp_path)
    main(["sideways", "jerk"])  # what stands on checkpoints/ as well
    assert all((tmp_path / "runs" / "symptoms" / f"{name}.png").stat().st_size > 5000 for name in ("sideways", "jerk"))
    with pytest.raises(UserError, match="give one or more of: sideways jerk scale"):
        main(["sidewards"])


def test_lessons_5_and_6_train_alike() -> None:
    """But for the start, the clips, the mask, the call and what is returned, as lesson 6 says."""
    code = [next(ROOT.glob(f"{number}_*.py")).read_text() for number in ("05", "06")]
    trains = [re.search(r"^def train\(.*?\n\n\n", text, re.M | re.S).group().splitlines() for text in code]
    places = difflib.SequenceMatcher(None, *trains, autojunk=False).get_opcodes()
    assert sum(tag != "equal" for tag, *_ in places) == 5
