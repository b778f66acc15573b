"""`urlvr report`: several runs on one self-contained HTML page, with its figures beside it as PNG.

run folders ─► RunRecord ─► Series (one line of a figure) ─► tables, sentences, figures ─► report.html
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import tables
from .curves import COLLAPSED, END_WINDOW, MIN_CHANGE
from .figures import Styles
from .pictures import report_pictures
from .runs import RunError, Series, load_run, tell_bases_apart

REPORT_FILE = "report.html"


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, title: str | None = None, notes: Sequence[str] = ()
) -> Path:
    """Report on run folders together; each is a line of its own. Returns the page's path.

    `out` is the page (`*.html`) or the folder of `report.html`; None takes `<run>/report/`, or beside several runs
    `report/` in the folder they have in common. Raises RunError for a folder that is no run.
    """
    if not runs:
        raise RunError("a report needs at least one run folder")
    records = [load_run(path) for path in runs]
    repeated = {name for name, count in Counter(record.name for record in records).items() if count > 1}
    for record in records:
        if record.name in repeated:  # the folder tells apart what the name does not
            record.label = str(record.path)
    title = title or ("Run " + records[0].name if len(records) == 1 else f"{len(records)} runs")
    series = [Series(record.label, [record]) for record in records]
    tell_bases_apart(series)
    return write_series_report(series, _page(out, [record.path for record in records]), title=title, notes=notes)


def write_series_report(
    series: Sequence[Series],
    page: Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    select_set: str | None = None,
    measure_set: str | None = None,
) -> Path:
    """Write `page` (`*.html`) and the figures beside it. With both sets, peaks are chosen on `select_set` and measured
    on the disjoint `measure_set`, which is also the set that figures show first."""
    styles = Styles(series)
    sets = _eval_sets(series, first=measure_set)
    main = sets[0] if sets else None
    overview, others, details = report_pictures(series, sets, styles, title)
    context = {
        "title": title,
        "notes": list(notes),
        "bases": tables.base_sentences(series, sets),
        "overview": overview,
        "findings": [
            {"label": item.label, "colour": styles.colour(item), "text": tables.finding(item, main)} for item in series
        ],
        "tables": [tables.accuracy_table(series, each, styles) for each in sets]
        or [tables.accuracy_table(series, None, styles)],
        "peaks": tables.peak_table(series, select_set, measure_set, styles),
        "pictures": others,
        "details": details,
        "samples": [found for item in series if (found := tables.probe_samples(item, main, styles))],
        "labels": [tables.label_row(label, run) for label, run in tables.labelled(series)],
        "settings": tables.setting_table(series),
        "missing": tables.missing(series, sets),
        "files": [tables.file_row(label, run) for label, run in tables.labelled(series)],
        "logdir": _common([run.path for item in series for run in item.runs]),
        "min_change": MIN_CHANGE,
        "collapsed": COLLAPSED,
        "window": END_WINDOW,
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    for picture in filter(None, [overview, *others, *details]):
        (page.parent / f"{picture.name}.png").write_bytes(picture.png)
    page.write_text(_template().render(context), encoding="utf-8")
    return page


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("megatron_urlvr.analysis"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("report.html.j2")


def _page(out: Path | None, runs: Sequence[Path]) -> Path:
    folder = out if out is not None else (runs[0] if len(runs) == 1 else _common(runs)) / "report"
    return folder if folder.suffix == ".html" else folder / REPORT_FILE


def _common(paths: Sequence[Path]) -> Path:
    resolved = [path.resolve() for path in paths]
    return resolved[0] if len(resolved) == 1 else Path(os.path.commonpath(resolved))


def _eval_sets(series: Iterable[Series], first: str | None) -> list[str]:
    found = list(dict.fromkeys(name for item in series for run in item.runs for name in run.eval_sets))
    return sorted(found, key=lambda name: name != first)
