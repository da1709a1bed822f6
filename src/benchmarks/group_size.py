"""Measure whether images that share one random transform cost accuracy: lesson 05 with several group sizes and seeds.

    python src/benchmarks/group_size.py --data-dir data    # 15 minutes on 2 CPU cores

It trains the arm with_augmentation of lesson 05 by the lesson's own train(), on fewer images and for fewer epochs than
the lesson. In a group of 1 every image has random numbers of its own; so that is what the others are compared with.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import describe_machine, load_lesson, machine_in_words
from tqdm import tqdm


def final_accuracy(lesson, flags, group_size, seed):
    """Train once. Returns the validation accuracy in percent after the last epoch: no epoch is chosen."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = [*flags, "--group-size", str(group_size), "--seed", str(seed), "--output-dir", folder]
        args = lesson.build_parser().parse_args(flags)
        images, labels, class_names, args.data = lesson.load_data(args.data, args.data_dir, train=True)
        train_set, val_set = lesson.split_train_val(images, labels, args.seed, args.subset)
        checkpoints = Path(folder) / "checkpoints"
        _, history = lesson.train(args, "with_augmentation", train_set, val_set, class_names, checkpoints, None, {})
    return history[-1]["val_accuracy"]


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="one training for each seed and group size")
    add("--group-sizes", type=int, nargs="+", default=[1, 16, 128], help="the first is compared with the others")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    parser.epilog = "All other flags are those of lesson 05; here --epochs is 8 and --subset 20000 by default."
    return parser


def main(argv=None):
    args, lesson_flags = build_parser().parse_known_args(argv)
    lesson = load_lesson("05")
    flags = ["--epochs", "8", "--subset", "20000", *lesson_flags]
    settings = lesson.build_parser().parse_args(flags)  # bad flags end the program here, before any training
    accuracy = {size: [] for size in args.group_sizes}
    with tqdm(total=len(args.seeds) * len(accuracy), unit="training", disable=None) as progress:
        for seed in args.seeds:
            for size in accuracy:
                accuracy[size].append(final_accuracy(lesson, flags, size, seed))
                progress.update()

    print(machine_in_words(describe_machine()))
    print(
        f"Validation accuracy after {settings.epochs} epochs on up to {settings.subset:,} images, seeds {args.seeds}:"
    )
    first = args.group_sizes[0]
    for size, values in accuracy.items():
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        behind = np.mean(accuracy[first]) - np.mean(values)
        print(f"  groups of {size:3d}: mean {np.mean(values):.2f} %, standard error of the mean {error:.2f}", end="")
        print("" if size == first else f", {behind:+.2f} points behind groups of {first}", end="")
        print(f"  ({', '.join(f'{value:.2f}' for value in values)})")
    if args.json:
        report = {"machine": describe_machine(), "seeds": args.seeds, "accuracy": accuracy}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(str(error))
