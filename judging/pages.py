"""What lesson 12 writes: tables.json, to which every measured row is added; tables.md and the figures, made from it."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from extra.metrics import same_protocol
from judging.verdicts import Claim, Row, Verdict, by_seed, deviation, judge, self_checks
from judging.world import Config, World, asked, continued, decoded
from kit.errors import UserError
from kit.files import write_text
from kit.pictures import plt, save_figure, sheet

Tables = dict[str, tuple[str, list[Row]]]  # name: title and rows


# %% The results file


def read_results(config: Config) -> dict:
    """The results file, or an empty one. One made with other settings is a UserError."""
    path = Path(config.results) / "tables.json"
    settings = {k: getattr(config, k) for k in ("preset", "height", "width", "frames", "samples", "references",
                                                "rollouts", "ddim_steps", "guidance", "detector")}
    if not path.exists():
        return {"settings": settings, "records": []}
    try:
        results = json.loads(path.read_text())
        theirs = results["settings"]
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged; move it away or give another --results") from None
    if not config.render and theirs != settings:
        changed = ", ".join(f"{k} {theirs.get(k)} -> {v}" for k, v in settings.items() if theirs.get(k) != v)
        raise UserError(f"{path} was made with other settings ({changed}); give another --results")
    return results


def add_rows(config: Config, tables: Tables, mine: list[dict], readers: set[str]) -> dict:
    """Writes what was measured here into the results file, to which other processes may have added meanwhile. Of the
    tables it belongs to, rows that other readers than these read are dropped: one column has one protocol."""
    results, touched = read_results(config), {r["table"] for r in mine}
    kept = [r for r in results["records"] if not (r["table"] in touched and outdated(r, readers))]
    rows = {(r["seed"], r["table"], r["row"]): r for r in [*kept, *mine]}
    order = {(name, row.name): i for i, (name, row) in enumerate((n, r) for n in tables for r in tables[n][1])}
    results["records"] = sorted(rows.values(), key=lambda r: (r["seed"], order.get((r["table"], r["row"]), 0)))
    Path(config.results).mkdir(parents=True, exist_ok=True)
    write_text(Path(config.results) / "tables.json", json.dumps(results, indent=1) + "\n")
    return results


def outdated(record: dict, readers: set[str]) -> bool:
    """Whether a row was read by another clip or frame reader than today's: it is measured again."""
    networks = {number["protocol"]["network"] for number in record["numbers"].values()}
    return any(name.startswith(("ClipReader", "FrameReader")) and name not in readers for name in networks)


# %% tables.md

WIDEST = 12  # numbers side by side


def mean_and_deviation(values: dict[int, float]) -> str:
    if not values:
        return ""
    mean, spread = statistics.fmean(values.values()), deviation(list(values.values()))
    mean = 0.0 if abs(mean) < 1e-6 else mean
    return f"{mean:.3g} ± {spread:.2g}" if len(values) > 1 else f"{mean:.3g}"


def markdown(results: dict, tables: Tables, claims: Sequence[Claim]) -> str:
    """Every table with mean ± standard deviation over the seeds, and what was found in a sentence a row."""
    records, verdicts, lines = results["records"], judge(results["records"], claims), []
    for name, (title, rows) in tables.items():
        mine = [r for r in records if r["table"] == name]
        if not mine:
            continue
        metrics = list(dict.fromkeys(metric for r in mine for metric in r["numbers"]))
        for metric in metrics:
            if name != "checks":  # which compare sets of different size on purpose
                same_protocol([r["numbers"][metric] for r in mine if metric in r["numbers"]])
        seeds = sorted({r["seed"] for r in mine})
        lines += [f"### {title}", "", f"`python 12_tables.py --table {name}`, seeds {', '.join(map(str, seeds))}", ""]
        cells = [["row", *metrics, "paper"]]
        for row in rows:
            values = [mean_and_deviation(by_seed(records, name, row.name, metric)) for metric in metrics]
            if any(values) or not row.measure:
                cells.append([row.name, *values, row.paper])
        if len(metrics) > WIDEST:  # no page is wide enough: a line for each number instead
            cells = [list(column) for column in zip(*cells, strict=True) if any(column[1:])]
        lines += [f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * len(cells[0]), *cells[1:])]
        lines += ["", *(f"- {sentence}" for sentence in sentences(records, name, rows, verdicts)), ""]
        lines += [f"![{title}]({name}.png)", ""]
    return "\n".join(lines)


def sentences(records: list[dict], table: str, rows: list[Row], verdicts: list[Verdict]) -> Iterator[str]:
    """One sentence a row: the verdicts it stands in, or else how far it is from the floor."""
    metric = "toy-FVD"
    floor = by_seed(records, table, "real", metric)
    for row in rows:
        values = by_seed(records, table, row.name, metric)
        mine = [v for v in verdicts if v.claim.table == table and v.claim.better == row.name]
        said = f"**{row.name}** ({row.what})"
        if mine:
            yield f"{said}: " + "; ".join(map(str, mine)) + "."
        elif values and floor and row.name != "real":
            ratio = [values[seed] / floor[seed] for seed in values if floor.get(seed)]
            if ratio:
                yield f"{said}: {metric} is {statistics.fmean(ratio):.3g} times the floor."
        elif found := next((r for r in records if (r["table"], r["row"]) == (table, row.name)), None):
            values = {m: mean_and_deviation(by_seed(records, table, row.name, m)) for m in list(found["numbers"])[:2]}
            yield f"{said}: " + ", ".join(f"{m} {v}" for m, v in values.items()) + "."


def verdict(records: list[dict], claims: Sequence[Claim]) -> str:
    """The README's sentence: how many claims hold."""
    seeds, verdicts = {r["seed"] for r in records}, judge(records, claims)
    if len(seeds) < 3:
        return f"**Only {len(seeds)} of 3 seeds so far, so nothing is judged yet.**"
    words = {equal: [v.word for v in verdicts if v.claim.equal == equal] for equal in (False, True)}
    held, opened = (sum(word.startswith(start) for word in words[False]) for start in ("holds", "open"))
    return (f"Of the paper's orderings {held} of {len(words[False])} hold here{f', {opened} open' if opened else ''}, "
            f"of its equivalences {words[True].count('holds')} of {len(words[True])}.")


def summary(results: dict, tables: Tables, claims: Sequence[Claim]) -> str:
    """tables.md: what was found, claim by claim, and the tables."""
    verdicts = judge(results["records"], claims)
    lines = [
        "# Does each piece matter?", "",
        f"{verdict(results['records'], claims)} An ordering holds when the paired difference has the same sign in "
        "every seed and exceeds twice its standard error; an equivalence, when the difference is smaller than the "
        "distance of real clips from other real clips. Beside an ordering stands one number that a person can follow, "
        "by which it is open where that has the other sign in every seed: mismatch, how badly blocks of a frame are "
        "found again in the next one; flicker, the error of the steps from frame to frame. toy-FVD and toy-FID are "
        "distances in features of small networks trained here; they rank the rows of a table and cannot be compared "
        "with published numbers.", "",
        "| claim | difference over the seeds | as a person sees it | paper | |", "| --- " * 5 + "|",
    ]
    failed = [statement for statement, good in self_checks(results["records"]) if not good]
    passed = f"All {len(self_checks(results['records']))} self-checks of the metrics hold."
    checked = f"Self-checks of the metrics that do **not** hold: {'; '.join(failed)}." if failed else passed
    for v in verdicts:
        c, sign = v.claim, "equals" if v.claim.equal else "below"
        each = mean_and_deviation(dict(enumerate(v.differences)))
        lines.append(f"| {c.better} {sign} {c.worse}, {c.metric} | {each} | {v.seen_beside} | {c.paper} | {v.word} |")
    readers = {(number["protocol"]["network"], r["table"]) for r in results["records"]
               for metric, number in r["numbers"].items() if metric.startswith("toy-FVD")}
    checks = {network for network, table in readers if table == "checks"}
    if others := sorted({table for network, table in readers if network not in checks} if checks else ()):
        checked += (f" They are of the clip reader in checkpoints/; the toy-FVD of {', '.join(others)} was "
                    "read by another one; the command measures those rows again.")
    return "\n".join([*lines, "", checked, "", markdown(results, tables, claims)])


# %% Figures


def render(results: dict, folder: Path, tables: Tables, claims: Sequence[Claim]) -> None:
    """tables.md and figures."""
    write_text(folder / "tables.md", summary(results, tables, claims) + "\n")
    for name, (title, rows) in tables.items():
        draw_table(results["records"], name, title, rows, folder)
    print(f"written: {folder}/tables.md and its figures")


def draw_table(records: list[dict], name: str, title: str, rows: list[Row], folder: Path) -> None:
    """Bars with standard deviations over the seeds; lines over time for the rollouts."""
    mine = [r for r in records if r["table"] == name]
    rows = [row for row in rows if any(r["row"] == row.name for r in mine)]
    metrics = list(dict.fromkeys(metric for r in mine for metric in r["numbers"]))
    if not mine:
        return
    if name == "rollouts":
        return draw_rollouts(records, rows, metrics, title, folder)
    chosen = [m for m in metrics if m != "IS"][:4]
    height = 0.6 + 0.3 * len(rows)  # inches
    figure, axes = plt.subplots(1, len(chosen), figsize=(3.2 * len(chosen), height), sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], chosen, strict=True):
        for place, row in enumerate(rows):
            values = list(by_seed(records, name, row.name, metric).values())
            if values:
                axis.barh(place, statistics.fmean(values), xerr=deviation(values), color="C0", alpha=0.7, capsize=2)
                axis.plot(values, [place] * len(values), ".", color="0.2", markersize=3)
        axis.set(title=metric, yticks=range(len(rows)), yticklabels=[row.name for row in rows])
    axes[0, 0].invert_yaxis()
    figure.suptitle(title, y=1 + 0.3 / height)  # 0.3 inches above, clear of the names of the columns
    save_figure(figure, folder / f"{name}.png")


def draw_rollouts(records: list[dict], rows: list[Row], metrics: list[str], title: str, folder: Path) -> None:
    distances = list(dict.fromkeys(m.split(",")[0] for m in metrics if ", to " in m))
    figure, axes = plt.subplots(1, len(distances), figsize=(4 * len(distances), 3), squeeze=False)
    for axis, distance in zip(axes[0], distances, strict=True):
        for place, row in enumerate(rows):
            points = {
                float(m.split(" to ")[1].removesuffix(" s")): list(by_seed(records, "rollouts", row.name, m).values())
                for m in metrics if m.startswith(f"{distance}, to ")
            }
            points = {second: values for second, values in points.items() if values}
            if points:
                beside = [second + 0.6 * (place - (len(rows) - 1) / 2) for second in points]  # or bars hide each other
                axis.errorbar(beside, [statistics.fmean(v) for v in points.values()],
                              [deviation(v) for v in points.values()], label=row.name, capsize=2)
        axis.set(title=distance, xlabel="seconds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(rows),
                  frameon=False)
    figure.suptitle(title)
    save_figure(figure, folder / "rollouts.png")


def draw_boxes(world: World, images: torch.Tensor) -> None:
    """results/boxes.png: four scenes a row each; the real frame, its boxes, the image made from them, two futures."""
    clips, (run, _, image, _), rows = asked(world), world.prediction(), []
    height, width = images.shape[-2:]
    for i in clips.cars.argsort(descending=True, stable=True)[:4].tolist():
        outline = -torch.ones(3, height, width)
        corners = clips.boxes[i, 0] * torch.tensor([width, height, width, height])
        for x0, y0, x1, y1 in corners[corners.any(1)].round().long().tolist():  # the other slots hold no car
            outline[:, y0:y1, x0:x1] = 1
            outline[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = -1
        first = image.encode(images[[i, i]])
        futures = decoded(image, run, continued(world, "", first, clips.pick([i, i]), 4, 1.0, 7000 + i))
        rows.append(torch.cat([clips.video[i, :1], outline[None], images[i], futures[0, 1:4], futures[1, 1:4]]))
    folder = Path(world.config.results)
    folder.mkdir(parents=True, exist_ok=True)
    sheet(rows, folder / "boxes.png")
