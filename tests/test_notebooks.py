"""Lessons as notebooks: run top to bottom in a fresh kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("lesson", ["01", "03", "05"])
def test_a_lesson_runs_as_a_notebook_and_can_be_gone_on_with(lesson: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "docs/notebooks.py", lesson, "--run", "--to", tmp_path], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.ipynb")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    last = cells[-1]["outputs"]
    if lesson == "01":
        assert "modes: " in "".join("".join(out["text"]) for out in last if out["output_type"] == "stream")
    else:
        assert any("image/png" in out.get("data", {}) for out in last)


def test_a_lesson_that_is_none(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "docs/notebooks.py", "13", "--to", tmp_path], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr == "error: 13: there are 01, 02, 03, 04, 05, 06, 07, 08\n"
