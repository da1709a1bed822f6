"""Measure what the common mistakes on the pages of lessons 01, 04 and 05 cost.

    python src/benchmarks/mistakes.py --json docs/mistakes.json    # about five minutes on 2 CPU cores

Each mistake is made in a copy of the lesson, which is run with the flags of its page. With --lessons, what the
file holds of the other lessons stays.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import LAUNCHER, PATHS, describe_machine, make_parser, read_json, write_json
from tqdm import tqdm

SEED = 42
FLAGS = {
    "01": "--subset 5000 --epochs 5",
    "04": "--schedulers CosineAnnealingLR --subset 5000 --epochs 6",
    "05": "--subset 5000 --epochs 5",
}
# What each mistake changes in the lesson's source, from and to; a wrong learning rate needs a flag only.
NONE = ("", "")
MISTAKES = {
    "01": {
        "none": NONE,
        "no zero_grad": ("        optimizer.zero_grad()\n", ""),
        "softmax before the loss": ("loss_fn(logits, labels)", "loss_fn(logits.softmax(dim=1), labels)"),
        "--lr 0.5": NONE,
        "--lr 0.0005": NONE,
    },
    "04": {
        "none": NONE,
        "T_max=epochs // 2": ("T_max=epochs)", "T_max=epochs // 2)"),
    },
    "05": {
        "none": NONE,
        "validation augmented": (
            "    for images, labels in loader:\n",
            "    for images, labels in loader:\n"
            '        images = augment(images, compose(AUGMENTATION, "cifar10"), 16)\n',
        ),
        "transformed once": (
            "    model = SimpleCNN(len(class_names), dropout)",
            "    if transform:\n"
            "        images = augment(train_set.tensors[0], transform, args.group_size)\n"
            "        train_set = TensorDataset(images, train_set.tensors[1])\n"
            "        train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)\n"
            "        transform = None\n"
            "    model = SimpleCNN(len(class_names), dropout)",
        ),
    },
}
CURVES = ["train_loss", "train_accuracy", "val_accuracy"]
# A line with the name of a variant, or with the metrics of an epoch; lesson 01 has no validation.
LINE = r"^(\w+):$|^Epoch .*train loss ([\w.]+), acc +([\d.]+) %(?:.*val loss [\w.]+, acc +([\d.]+) %)?"


def with_mistake(source, old, new):
    """Return the source of a lesson with its one place that reads old changed to new."""
    if old and source.count(old) != 1:
        raise ValueError(f"{old!r} is not exactly once in the lesson.")
    return source.replace(old, new)


def curves(output):
    """Return what a lesson printed, {variant: {curve: [a value per epoch]}}; without variants, the key is ""."""
    found, variant = {}, ""
    for name, *values in re.findall(LINE, output, flags=re.MULTILINE):
        variant = name or variant
        for curve, value in zip(CURVES, values, strict=True):
            if value:
                found.setdefault(variant, {}).setdefault(curve, []).append(float(value))
    return found


def run(number, mistake, args):
    """Run a lesson with a mistake, in a process of its own. Return its curves()."""
    lesson = PATHS[number]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / lesson.name
        source = with_mistake(lesson.read_text(encoding="utf-8"), *MISTAKES[number][mistake])
        copy.write_text(source, encoding="utf-8")
        command = [sys.executable, *([args.launcher] if args.launcher else []), copy, *FLAGS[number].split()]
        command += mistake.split() if mistake.startswith("--") else []
        command += ["--seed", str(SEED), "--output-dir", folder, "--data", args.data]
        command += ["--data-dir", args.data_dir.resolve()]
        process = subprocess.run(command, capture_output=True, encoding="utf-8")
    if process.returncode != 0:
        sys.exit(f"{lesson.name} with the mistake {mistake!r} failed:\n{process.stderr}")
    return curves(process.stdout)


def build_parser():
    """Return the parser of this command line."""
    parser, names = make_parser(), list(MISTAKES)
    parser.add_argument("--lessons", nargs="+", choices=names, default=names, help="whose mistakes")
    parser.add_argument("--launcher", type=Path, help=LAUNCHER)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    report = read_json(args.json, {}) | {"machine": describe_machine(), "data": args.data_name, "seed": SEED}
    report |= {number: {"flags": FLAGS[number]} for number in args.lessons}
    todo = [(number, mistake) for number in args.lessons for mistake in MISTAKES[number]]
    for number, mistake in tqdm(todo, unit="run", disable=None):
        report[number][mistake] = run(number, mistake, args)
    for number in args.lessons:
        print(f"Lesson {number}, {FLAGS[number]}, the last epoch in percent:")
        for mistake in MISTAKES[number]:
            for variant, found in report[number][mistake].items():
                last = ", ".join(f"{curve.split('_')[0]} {found[curve][-1]:.2f}" for curve in list(found)[1:])
                print(f"  {mistake:24} {variant:30} {last}")
    write_json(args.json, report)


if __name__ == "__main__":
    main()
