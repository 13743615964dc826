"""Measure coalign against the plain way to do the same work and print one table of ratios.

`make bench`, or `python tests/benchmarks/bench.py --rows align judge`. docs/benchmarks.md explains every row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))

from benchmarks import generation_rows, logprob_rows, output_rows, peer_rows, process_rows, step_rows, training_rows
from benchmarks.rows import HEADER, Builder, measure_row, table_line

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT / "distributed"), str(ROOT / "tests")]
MODULES = (training_rows, logprob_rows, generation_rows, process_rows, step_rows, output_rows)
BUILDERS: dict[str, Builder] = {name: build for module in MODULES for name, build in module.BUILDERS.items()}
PEERS: dict[str, Builder] = peer_rows.BUILDERS  # measured only when they are named: they install other projects
KNOWN = BUILDERS | PEERS


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(BUILDERS), choices=list(KNOWN), metavar="ROW")
    parser.add_argument("--list", action="store_true", help="print the names that --rows takes")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of both sides, of which the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench.json", help="file for the results")
    parser.add_argument("--tiny", action="store_true", help="only see that the rows run: their numbers mean nothing")
    return parser.parse_args(argv)


def machine() -> dict[str, Any]:
    """Return what the results depend on beside the code."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(argv: list[str]) -> None:
    """Measure the rows and print their table, writing the file anew after each."""
    options = parse(argv)
    if options.list:
        print("\n".join(KNOWN))
        return
    torch.set_num_threads(options.threads)
    # Processes that rows start import this tree, and the thread pools of none of them are larger.
    os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = []
    print(HEADER, flush=True)
    for name in options.rows:
        for row in KNOWN[name](options.tiny):
            found = {"name": name} | measure_row(row, options.repeats)
            print(table_line(found), flush=True)
            results.append(found)
            content = {"tiny": options.tiny, "repeats": options.repeats, **machine(), "rows": results}
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
