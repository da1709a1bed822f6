"""Measure whether images that share one random transform cost accuracy: lesson 05, by group size and seed.

    python src/benchmarks/group_size.py --json docs/group_size.json    # about half an hour on 2 CPU cores

It trains the arm with_augmentation of lesson 05 by the lesson's own train(), on fewer images and for fewer
epochs than the lesson. In a group of 1 every image has random numbers of its own; so that is what the others
are compared with. The time that groups save is measured by augmentation_cost.py.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, describe_machine, load_lesson, machine_in_words, run_script, write_json
from tqdm import tqdm

ARM = "with_augmentation"


def final_accuracy(lesson, flags, group_size, seed):
    """Train once. Returns the validation accuracy in percent after the last epoch: no epoch is chosen."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = [*flags, "--group-size", str(group_size), "--seed", str(seed), "--output-dir", folder]
        args = lesson.parse_args(flags)
        images, labels, class_names, args.data = lesson.load_data(args.data, args.data_dir, train=True)
        train_set, val_set = lesson.split_train_val(images, labels, args.seed, args.subset)
        history = lesson.train(args, ARM, train_set, val_set, class_names, Path(folder) / "run" / ARM)
    return history[-1]["Accuracy/val"]


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--seeds", type=int, nargs="+", default=[42, 43, 44], help="one training for each, of each group size"
    )
    add("--group-sizes", type=int, nargs="+", default=[1, 16, 128], help="all are compared with the first")
    add("--epochs", default="8", help="as in lesson 05")
    add("--subset", default="20000", help="as in lesson 05")
    add("--data", default="cifar10", help="as in lesson 05")
    add("--data-dir", default=str(ROOT / "data"), help="as in lesson 05")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    lesson = load_lesson("05")
    flags = ["--epochs", args.epochs, "--subset", args.subset]
    flags += ["--data", args.data, "--data-dir", args.data_dir]
    accuracy = {size: [] for size in args.group_sizes}
    for size in accuracy:
        lesson.parse_args([*flags, "--group-size", str(size)])  # bad flags end it here, before any training
    with tqdm(total=len(args.seeds) * len(accuracy), unit="training", disable=None) as progress:
        for seed in args.seeds:
            for size in accuracy:
                accuracy[size].append(final_accuracy(lesson, flags, size, seed))
                progress.update()

    machine = describe_machine()
    print(machine_in_words(machine))
    print(f"Validation accuracy after {args.epochs} epochs on {args.subset} images, seeds {args.seeds}:")
    first = args.group_sizes[0]
    for size, values in accuracy.items():
        mean = np.mean(values)
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"  groups of {size:3d}: mean {mean:.2f} %, standard error of the mean {error:.2f}", end="")
        if size != first:
            print(f", {np.mean(accuracy[first]) - mean:.2f} points behind groups of {first}", end="")
        print(f"  ({', '.join(f'{value:.2f}' for value in values)})")
    if args.json:
        report = {"machine": machine, "seeds": args.seeds, "accuracy": accuracy}
        write_json(args.json, report)


if __name__ == "__main__":
    run_script(main)
