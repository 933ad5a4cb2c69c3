"""python -m lab.experiments.zero_prior: does a word without a past help?

make_captions   writes one dataset: images, and captions with a condition's word
run_experiment  trains and measures; a run that was stopped goes on where it was
metrics         the means of every condition
compare         the placeholder against the other words, and what was tried of it
report          writes both, a plot and the images into docs/zero_prior.md
"""

import argparse
import logging
import shutil
from pathlib import Path

import torch

from lab.experiments.zero_prior.captions import make_captions
from lab.experiments.zero_prior.compare import Results, compare, metrics
from lab.experiments.zero_prior.design import CLASS_WORDS, CONDITIONS, SMALL, Size
from lab.experiments.zero_prior.photographs import Photographs
from lab.experiments.zero_prior.study import RESULTS, Study
from lab.experiments.zero_prior.world import World
from miniature.world import SUBJECTS

FOLDER = Path("outputs/zero_prior")
PUBLISHED = Path(__file__).parent / RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.experiments.zero_prior",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    captions = commands.add_parser("make_captions")
    captions.add_argument("folder", type=Path)
    captions.add_argument("--subject", choices=SUBJECTS, default=SUBJECTS[0])
    captions.add_argument("--condition", choices=[c.name for c in CONDITIONS], required=True)
    captions.add_argument("--seed", type=int, default=42)
    run = commands.add_parser("run_experiment")
    run.add_argument("--part", default="1/1", help="1/2 and 2/2 share the work of two processes")
    run.add_argument("--small", action="store_true", help="seconds, to see that it works")
    run.add_argument("--photographs", type=Path, help="a folder of CLASS-NAME folders of pictures")
    run.add_argument("--base", default="z-image-turbo", help="for photographs; %(default)s")
    run.add_argument("--folder", type=Path, default=FOLDER, help="of results (%(default)s)")
    for command in map(commands.add_parser, ("metrics", "compare")):
        command.add_argument("--folder", type=Path, help="of results; else the published ones")
    report = commands.add_parser("report", help="needs matplotlib")
    report.add_argument("--folder", type=Path, help="publish the results of this folder first")
    options = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)  # for models this small, sharing the work out costs more
    if options.command == "make_captions":
        condition = next(c for c in CONDITIONS if c.name == options.condition)
        word = condition.word_for(CLASS_WORDS[options.subject])
        print(make_captions(options.subject, options.seed, word, options.folder))
    elif options.command == "run_experiment":
        part, parts = map(int, options.part.split("/"))
        size = SMALL if options.small else Size()
        ground = (
            Photographs(options.photographs, options.base, size)
            if options.photographs
            else World(size)
        )
        Study(options.folder, ground).run(part - 1, parts)
    elif options.command == "report":
        from lab.experiments.zero_prior.report import DOCUMENT, write_report

        if options.folder:
            shutil.copy(options.folder / RESULTS, PUBLISHED)
        write_report(PUBLISHED, options.folder, DOCUMENT)
    else:
        results = Results.read(options.folder / RESULTS if options.folder else PUBLISHED)
        print({"metrics": metrics, "compare": compare}[options.command](results))


if __name__ == "__main__":
    main()
