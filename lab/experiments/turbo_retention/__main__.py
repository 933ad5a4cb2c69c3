"""python -m lab.experiments.turbo_retention: how long few-step quality survives training.

run     trains and measures; a run that was stopped goes on where it was
report  writes the figures, the plots and the images of docs/turbo.md
merge   measures what merging the adapter costs, and how exactly it is gone again
"""

import argparse
import logging
import shutil
from pathlib import Path

import torch

from lab.experiments.turbo_retention.design import SMALL, Size
from lab.experiments.turbo_retention.study import RESULTS, Study

FOLDER = Path("outputs/turbo_retention")
PUBLISHED = Path(__file__).parent / RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.experiments.turbo_retention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="about an hour of one CPU core")
    run.add_argument("--folder", type=Path, default=FOLDER, help="of results (%(default)s)")
    run.add_argument("--small", action="store_true", help="seconds, to see that it works")
    report = commands.add_parser("report", help="needs matplotlib")
    report.add_argument("--folder", type=Path, help="publish the results of this folder first")
    commands.add_parser("merge", help="seconds")
    options = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)  # for models this small, sharing the work out costs more
    if options.command == "run":
        Study(options.folder, SMALL if options.small else Size()).run()
    elif options.command == "merge":
        from lab.experiments.turbo_retention.merge import main as merge

        merge()
    else:
        from lab.experiments.turbo_retention.report import DOCUMENT, write_report

        if options.folder:
            shutil.copy(options.folder / RESULTS, PUBLISHED)
        write_report(PUBLISHED, options.folder, DOCUMENT)


if __name__ == "__main__":
    main()
