"""The site: it builds, its links and anchors hold, it needs no network, and equations stand at what implements them."""

import ast
import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "docs/pages.py", "--to", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_links_and_anchors_hold(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name not in ("404.html", "toy.html")}
    assert len(pages) > 35
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            path, _, anchor = link.partition("#")
            if link.startswith("https://squidfunk."):  # whose theme it is
                continue
            assert not re.match(r"\w+:", link), f"{page.name} needs the network: {link}"
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".html":
                assert f'id="{anchor}"' in target.read_text(), f"{page.name}: {link}"


def test_equations_and_pictures_are_in_the_lessons(site: Path) -> None:
    lesson, equations = ((site / name).read_text() for name in ("05_prediction.html", "docs/equations.html"))
    assert lesson.count("<math") == 3 and "docs/equations.html#eq-4" in lesson and "05_futures.png" in lesson
    assert equations.count("<math") == 10 and "05_prediction.html#predict_clips" in equations
    assert "\\" not in re.sub(r"<(script|code|pre).*?</\1>", "", lesson, flags=re.S)  # no markup is left over


@pytest.mark.parametrize("name", ["01_toy_alignment", "05_prediction", "12_tables"])
def test_no_line_of_code_is_left_out(site: Path, name: str) -> None:
    source = (ROOT / f"{name}.py").read_text()
    shown = html.unescape(re.sub(r"<[^>]+>", "", (site / f"{name}.html").read_text()))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    said = {line for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and ast.get_docstring(node)
            for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    for number, line in enumerate(source.splitlines(), 1):
        if number not in said and not line.startswith("# %%"):
            assert line.strip() in shown, f"line {number}: {line}"
