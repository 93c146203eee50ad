"""The README says what the files say."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_numbers_is_the_one_collected() -> None:
    scope: dict = {"__file__": str(ROOT / "docs" / "collect.py"), "__name__": "collect"}
    exec((ROOT / "docs" / "collect.py").read_text(), scope)  # docs/ is no package
    assert scope["BEGIN"] + scope["render"]() + scope["END"] in README


def test_files_and_names_in_the_readme_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for path, names in re.findall(r"`((?:common/)?\w+\.py): ([\w, ]+)`", README):
        text = (ROOT / path).read_text()
        for name in names.split(", "):
            assert re.search(rf"(def|class) {name}\b", text), f"{path}: {name}"


def test_figures_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "docs" / "figures").iterdir()]
    assert max(sizes, default=0) <= 300_000 and sum(sizes) <= 5_000_000
