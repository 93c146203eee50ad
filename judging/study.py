"""A human study as the paper's Table 2: blind pairs of videos on one HTML page, and what people preferred.

  python -m judging.study page OURS THEIRS                writes study.html: 100 pairs of two folders' videos
  python -m judging.study score answers.json ...          preferences with 95 % confidence intervals

The page needs no server: send the file, and have the answers sent back that it saves at its end.
"""

import argparse
import base64
import json
from pathlib import Path

import torch

from kit.errors import UserError, cli
from kit.files import write_text

MEDIA = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".webp": "image/webp", ".png": "image/png"}
TEMPLATE = Path(__file__).parent / "study.html"
PAIRS = 100


def write_page(folders: list[str], path: Path, seed: int) -> None:
    """PAIRS pairs (fewer if there are fewer videos), blind, in random order and sides: of files with the same name,
    which may be two ways to upsample one clip, where both folders have some; else at random.

    Raises UserError for a folder without videos.
    """
    draw, sets = torch.Generator().manual_seed(seed), []
    for folder in folders:
        files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in MEDIA)
        if not files:
            raise UserError(f"{folder}: no video in it (looked for {', '.join(MEDIA)})")
        sets.append([files[i] for i in torch.randperm(len(files), generator=draw).tolist()])
    ours, theirs = sets
    named = {path.stem: path for path in theirs}
    if same := [path for path in ours if path.stem in named]:
        ours, theirs = same, [named[path.stem] for path in same]
    pairs = []
    for a, b in list(zip(ours, theirs, strict=False))[:PAIRS]:
        left = int(torch.randint(0, 2, (), generator=draw))
        pairs.append({"left": "AB"[left], "media": [embedded((a, b)[left]), embedded((a, b)[1 - left])]})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, TEMPLATE.read_text().replace("/*PAIRS*/[]", json.dumps(pairs)))
    print(f"written: {path}, {len(pairs)} pairs; A is {folders[0]}, B is {folders[1]}")


def embedded(path: Path) -> dict[str, str]:
    kind = MEDIA[path.suffix.lower()]
    return {"kind": kind, "data": f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"}


def score(files: list[str]) -> None:
    """Prints the preferences over all answers. Raises UserError for files that are no answers."""
    counts = {"A": 0, "B": 0, "equal": 0}
    for file in files:
        try:
            for answer in json.loads(Path(file).read_text())["answers"]:
                counts[answer["preferred"]] += 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not the answers of a study ({error!r})") from None
    total = sum(counts.values())
    if not total:
        raise UserError("no answers in these files")
    for name, n in counts.items():
        low, high = wilson(n, total)
        print(f"{name}: {100 * n / total:.1f} %   (95 % interval {100 * low:.1f} to {100 * high:.1f}, {n} of {total})")


def wilson(n: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927): stays inside [0, 1], unlike the normal one."""
    share, width = n / total, z * z / total
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * (share * (1 - share) / total + width / 4 / total) ** 0.5
    return middle - half, middle + half


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m judging.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    page = jobs.add_parser("page", help="write the page")
    page.add_argument("folders", nargs=2, metavar=("OURS", "THEIRS"), help="two folders of videos")
    page.add_argument("--to", type=Path, default=Path("results/study.html"), help="the file to write")
    page.add_argument("--seed", type=int, default=0, help="of the order and the sides")
    jobs.add_parser("score", help="count answers").add_argument("files", nargs="+", metavar="ANSWERS")
    options = parser.parse_args(argv)
    if options.job == "page":
        write_page(options.folders, options.to, options.seed)
    else:
        score(options.files)


if __name__ == "__main__":
    raise SystemExit(cli(main))
