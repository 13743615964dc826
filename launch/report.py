"""Rebuild the HTML report of a run from its metrics.json and steps; or compare several runs."""

from __future__ import annotations

from pathlib import Path

from coalign.errors import UserError
from coalign.recipe import run_step

USAGE = """usage: python launch/report.py RUN
       python launch/report.py RUN RUN [RUN ...] [--out FILE]

With one run: prints the result and rewrites report.html beside its metrics.json.
With several: prints them side by side and writes one page that compares them, to FILE or compare.html beside the
first run's metrics.json.
A RUN is a run's folder (runs/NAME, or runs/NAME/round2 of a later round) or a folder that eval wrote (eval.folder)."""


def main(argv: list[str]) -> None:
    """Rebuild or compare."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    names, out = read_arguments(argv)
    from coalign.evaluation.metrics_file import read_metrics
    from coalign.report.comparison import COMPARE, name_runs, write_comparison
    from coalign.report.page import write_page
    from coalign.report.terminal import compare_lines, text_report

    found = {name: read_metrics(Path(name)) for name in names}
    if len(found) == 1:
        folder, metrics = next(iter(found.values()))
        lines, page = text_report(metrics), write_page(folder, metrics)
    else:
        runs = name_runs(found)
        lines = compare_lines({run.name: run.metrics for run in runs})
        page = write_comparison(out or runs[0].folder / COMPARE, runs)
    print("\n".join([*lines, "", f"report: {page}"]))


def read_arguments(argv: list[str]) -> tuple[list[str], Path | None]:
    """Return the runs, each once, and the file to write, if one was named. Raises UserError."""
    names: list[str] = []
    out: Path | None = None
    words = iter(argv)
    for word in words:
        if word == "--out" or word.startswith("--out="):
            value = word.partition("=")[2] or next(words, "")
            if not value:
                raise UserError("--out names no file; for example: --out compare.html")
            out = Path(value)
        elif word.startswith("-"):
            raise UserError(f"unknown option {word!r}; --out FILE is the only one, see --help")
        else:
            names.append(word)
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError("no run was named; for example: python launch/report.py runs/default")
    if out is not None and len(names) == 1:
        raise UserError(f"--out {out} is for several runs; the report of one run is written beside its metrics.json")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it, such as {out / 'compare.html'}")
    return names, out


if __name__ == "__main__":
    run_step(main)
