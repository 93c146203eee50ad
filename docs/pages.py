"""A site of the lessons, prose beside code, in site/. Needs pip install "videoldm[pages]".

python docs/pages.py               or: make pages
python -m http.server -d site      then http://localhost:8000; opened as files, all but the search works

No network is needed to read it.

The pages of README.md, docs/, results/ and exercises/ are taken as they are; every Python file that they link to gets a
page: docstrings on the left, the code they belong to on the right, and the paper's equations above the lines that
implement them. mkdocs with its material theme does the rest.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from kit.errors import UserError, cli  # noqa: E402

LINK = re.compile(r"\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)#:]+)\)")
LESSONS = sorted(path.name for path in ROOT.glob("[01]*.py"))
FOLDERS = ("docs", "results", "exercises")

# The paper's equations: what they say, and the definitions that are them.
EQUATIONS: dict[str, tuple[str, str, tuple[tuple[str, str], ...]]] = {
    "Sec. 2": ("the diffusion process", r"x_\tau = \alpha_\tau x + \sigma_\tau \epsilon, \quad "
               r"\alpha_\tau^2 + \sigma_\tau^2 = 1", (("common/diffusion.py", "Diffusion"),)),
    "Sec. 2, v": ("what the network is asked for", r"y = v = \alpha_\tau \epsilon - \sigma_\tau x",
                  (("common/diffusion.py", "Diffusion"),)),
    "Eq. (1)": ("the loss of the image model",
                r"\mathbb{E}_{x, \tau, \epsilon} \left[ \| y - f_\theta(x_\tau; c, \tau) \|_2^2 \right]",
                (("02_image_ldm.py", "train_unet"),)),
    "Eq. (2)": ("only the temporal layers learn", r"\min_\phi \mathbb{E}_{z, \tau, \epsilon} \left[ \| y - "
                r"f_{\theta, \phi}(z_\tau; c, \tau) \|_2^2 \right]", (("03_temporal_layers.py", "train"),)),
    "Sec. 3.1": ("the merge", r"z \leftarrow \alpha z + (1 - \alpha) z'", (("common/temporal.py", "AlphaMerge"),)),
    "Sec. 3.2": ("what is known", r"c_S = (m_S \circ z, m_S)", (("05_prediction.py", "masked_context"),)),
    "Eq. (3)": ("prediction of what is masked", r"\mathbb{E}_{z, m_S, \tau, \epsilon} \left[ \| y - f_{\theta, \phi}"
                r"(z_\tau; c_S, c, \tau) \|_2^2 \right]",
                (("05_prediction.py", "train"), ("06_interpolation.py", "train"))),
    "Eq. (4)": ("context guidance", r"f'(z_\tau; c_S) = f(z_\tau) + s \, (f(z_\tau; c_S) - f(z_\tau))",
                (("common/diffusion.py", "guide"), ("05_prediction.py", "predict_clips"))),
    "Sec. 3.3": ("how many frames", r"N \to 4 (N - 1) + 1: \quad 8 \to 29 \to 113",
                 (("06_interpolation.py", "interpolate"), ("08_sample_long.py", "keys_for"))),
    "Eq. (5)": ("the upsampler, told its input's noise", r"\mathbb{E}_{x, (\tau, \epsilon), (\tau_\gamma, \epsilon_"
                r"\gamma)} \left[ \| y - g_{\theta, \phi}(x_\tau; c_{\tau_\gamma}, \tau_\gamma, \tau) \|_2^2 \right]",
                (("07_upsampler.py", "upsampling_loss"),)),
}

STYLE = """\
.pair { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 0 1.5rem; }
.pair { border-top: 1px solid #8883; }
.pair > div { min-width: 0; }
.pair pre > code { font-size: .64rem; }
math { font-size: 1.2em; margin: .5em 0 1em; }
.md-search__form { border: 1px solid #fff8; }
.md-grid { max-width: 85rem; }
@media (max-width: 60rem) { .pair { grid-template-columns: minmax(0, 1fr); } }
"""

SETTINGS = """\
site_name: Video LDM, one script per stage
docs_dir: source
site_dir: {site}
use_directory_urls: false
theme:
  name: material
  font: false
  features: [navigation.footer, navigation.sections, toc.integrate]
plugins: [search]
extra_css: [style.css]
markdown_extensions: [admonition, attr_list, md_in_html, tables, toc, pymdownx.superfences, pymdownx.highlight]
nav:
{nav}
"""


def equation(name: str) -> str:
    """An equation as MathML, which browsers set without a script or a font of the site."""
    import latex2mathml.converter

    return latex2mathml.converter.convert(EQUATIONS[name][1], display="block")


def escaped(found: re.Match) -> str:
    return found[0] if found[0][0] == "`" else "\\" + found[0]


def prose(docstring: str) -> str:
    """A docstring as Markdown: indented lines are commands; nothing else in it is markup."""
    lines, code = [], False
    for line in docstring.splitlines():
        indented = line.startswith(("  ", "python ")) and bool(line.strip())
        lines += ["```"] * (indented != code)
        code = indented
        lines.append(line.strip() if code else re.sub(r"`[^`]*`|[*_<\[]", escaped, line))
    return "\n".join([*lines, *["```"] * code])


def pair(left: str, code: str, anchor: str = "") -> str:
    fence = f"```python\n{code.strip(chr(10))}\n```"
    name = f'<a id="{anchor}"></a>' if anchor else ""
    return (f'<div class="pair" markdown="1">\n<div class="prose" markdown="1">\n{name}\n\n{left}\n\n</div>\n'
            f'<div markdown="1">\n\n{fence}\n\n</div>\n</div>\n')


def without_docstring(node: ast.AST, lines: list[str]) -> str:
    """The code of a definition, from its decorators on, but for its docstring."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    if ast.get_docstring(node) is None or len(node.body) == 1:
        return "\n".join(lines[start : node.end_lineno])
    first = node.body[0]
    return "\n".join([*lines[start : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]])


def page_of(path: str) -> str:
    """A Python file as Markdown: prose beside code, cell by cell."""
    text = (ROOT / path).read_text()
    tree, lines = ast.parse(text), text.splitlines()
    doc = ast.get_docstring(tree) or path
    title, _, rest = doc.partition("\n")
    out, end = [f"# {title.rstrip('.:')}", "", f"`{path}`", "", prose(rest.strip()), ""], 0
    statements: list[str] = []

    def flush() -> Iterator[str]:
        if code := "\n".join(statements).strip("\n"):
            yield f"```python\n{code}\n```\n"
        statements.clear()

    for node in tree.body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        for line in lines[end:start]:
            if line.startswith("# %%"):
                code = "".join(flush())
                first = not any(part.startswith(("## ", "<div", "<details")) for part in out)
                folded = f'<details markdown="1"><summary>imports</summary>\n\n{code}\n</details>\n'
                out.append(folded if first else code)
                out += [f"## {line[4:].strip()}", ""]
            elif line.strip():
                statements.append(line)
        end = node.end_lineno
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out += flush()
            mine = [name for name, (_, _, places) in EQUATIONS.items() if (path, node.name) in places]
            depth = os.path.relpath("docs/equations.md", Path(path).parent)
            out += [f"[{name}]({depth}#{slug(name)})\n\n{equation(name)}\n" for name in mine]
            left = f"**{node.name.replace('_', chr(92) + '_')}**\n\n{prose(ast.get_docstring(node) or '')}"
            out.append(pair(left, without_docstring(node, lines), node.name))
        elif node is not tree.body[0] or not ast.get_docstring(tree):
            statements += lines[start:end]
    out += flush()
    if shown := sorted((ROOT / "docs" / "figures").glob(f"{path[:2]}_*")) if path in LESSONS else []:
        out += ["## Pictures", "", *(f"![{picture.stem}](docs/figures/{picture.name})\n" for picture in shown)]
    return "\n".join(out)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def equations_page() -> str:
    out = ["# The equations, and the lines that are them", ""]
    for name, (what, _, places) in EQUATIONS.items():
        links = ", ".join(f"[{path}: {place}](../{path.removesuffix('.py')}.md#{place})" for path, place in places)
        out += [f'## {name}: {what} {{ #{slug(name)} }}', "", equation(name), "", links, ""]
    return "\n".join(out)


def build(source: Path) -> list[str]:
    """Writes the site's sources. Returns the Python files that got a page."""
    linked = dict.fromkeys([*LESSONS, *(path for _, _, places in EQUATIONS.values() for path, _ in places)])
    pages = {"index.md": ROOT / "README.md"}
    pages |= {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))}

    def resolve(match: re.Match, page: Path) -> str:
        label, target = match[1], (page.parent / match[2]).resolve()
        inner = LINK.sub(lambda inside: resolve(inside, page), label) if "](" in label else label
        path = target.relative_to(ROOT)
        if target.suffix == ".py":
            linked[str(path)] = None
            return f"[{inner}]({match[2].removesuffix('.py')}.md)"
        if target == ROOT / "README.md":
            return f"[{inner}]({os.path.relpath('index.md', page.parent.relative_to(ROOT))})"
        if target.is_file() and path.parts[0] in FOLDERS:
            return f"[{inner}]({match[2]})"
        return inner  # folders, and files that are nothing to read here

    for name, path in pages.items():
        text = path.read_text()
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(LINK.sub(lambda match, path=path: resolve(match, path), text).replace(
            "<details>", '<details markdown="1">'))
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".png", ".gif", ".webp", ".html", ".json"):
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    for path in linked:
        target = (source / path).with_suffix(".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page_of(path))
    (source / "docs" / "equations.md").write_text(equations_page())
    (source / "style.css").write_text(STYLE)
    return list(linked)


def navigation(files: list[str]) -> str:
    """mkdocs' nav: the lessons in order, what they stand on, then the pages."""
    def entries(paths: list[str]) -> str:
        return "".join(f"      - {path}\n" for path in paths)

    lessons = entries([f"{name.removesuffix('.py')}.md" for name in LESSONS])
    code = entries(sorted(f"{name.removesuffix('.py')}.md" for name in files if name not in LESSONS))
    texts = ["docs/equations.md"] + [str(p.relative_to(ROOT)) for f in FOLDERS for p in sorted((ROOT / f).glob("*.md"))]
    return f"  - index.md\n  - Lessons:\n{lessons}  - Pages:\n{entries(texts)}  - More code:\n{code}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "site", help="folder to write to")
    site = parser.parse_args(argv).to.resolve()
    try:
        import latex2mathml.converter  # noqa: F401
        import material  # noqa: F401
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install "videoldm[pages]"') from None
    with tempfile.TemporaryDirectory() as folder:
        files = build(Path(folder) / "source")
        settings = Path(folder) / "mkdocs.yml"
        settings.write_text(SETTINGS.format(site=site, nav=navigation(files)))
        done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(settings)],
                              capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
        if done.returncode:
            raise UserError(f"mkdocs: {(done.stderr or done.stdout).strip()[-1500:]}")
    print(site / "index.html")


if __name__ == "__main__":
    raise SystemExit(cli(main))
