"""Measure what the common mistakes on the pages of lessons 01, 04 and 05 cost.

    python src/benchmarks/mistakes.py --json docs/mistakes.json    # about five minutes on 2 CPU cores

Each mistake is made in a copy of the lesson, which is run with the flags of its page. With --lessons, what the
file holds of the other lessons stays.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import LESSONS, ROOT, describe_machine, read_json, write_json
from tqdm import tqdm

SEED = 42
FLAGS = {
    "01": "--subset 5000 --epochs 5",
    "04": "--schedulers CosineAnnealingLR --subset 5000 --epochs 6",
    "05": "--subset 5000 --epochs 5",
}
NONE = ("", "")
# What each mistake changes in the lesson's source, from and to; a wrong learning rate needs a flag only.
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
VARIANT = r"(?P<variant>\w+):$"
EPOCH = r"Epoch .*train loss (?P<train_loss>[\d.]+), acc +(?P<train_accuracy>[\d.]+) %"
VALIDATION = r"(?:.*val loss [\d.]+, acc +(?P<val_accuracy>[\d.]+) %)?"


def with_mistake(source, old, new):
    """Return the source of a lesson with its one place that reads old changed to new."""
    if (old, new) == NONE:
        return source
    if source.count(old) != 1:
        raise ValueError(f"{old!r} is not exactly once in the lesson.")
    return source.replace(old, new)


def curves(output):
    """Return what a lesson printed, {variant: {curve: [a value per epoch]}}; without variants, the key is ""."""
    found, variant = {}, ""
    for line in re.finditer(f"^(?:{VARIANT}|{EPOCH}{VALIDATION})", output, flags=re.MULTILINE):
        if line["variant"]:
            variant = line["variant"]
            continue
        for curve in ["train_loss", "train_accuracy", "val_accuracy"]:
            if line[curve]:
                found.setdefault(variant, {}).setdefault(curve, []).append(float(line[curve]))
    return found


def run(number, mistake, args):
    """Run a lesson with a mistake, in a process of its own. Return its curves()."""
    lesson = next(LESSONS.glob(f"{number}_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / lesson.name
        source = with_mistake(lesson.read_text(encoding="utf-8"), *MISTAKES[number][mistake])
        copy.write_text(source, encoding="utf-8")
        command = [sys.executable, *([str(args.launcher)] if args.launcher else []), str(copy)]
        command += FLAGS[number].split() + (mistake.split() if mistake[0] == "-" else [])
        command += ["--seed", str(SEED), "--output-dir", folder, "--data", args.data]
        command += ["--data-dir", str(args.data_dir.resolve())]
        process = subprocess.run(command, capture_output=True, encoding="utf-8")
    if process.returncode != 0:
        sys.exit(f"{lesson.name} with the mistake {mistake!r} failed:\n{process.stderr}")
    return curves(process.stdout)


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--lessons", nargs="+", choices=list(MISTAKES), default=list(MISTAKES), help="whose mistakes")
    add("--data", default="cifar10", help="as in the lessons")
    add("--data-dir", type=Path, default=ROOT / "data", help="as in the lessons")
    add("--data-name", default="CIFAR-10", help="what the file calls the data")
    add("--json", type=Path, metavar="PATH", help="write the measurements to this file")
    add("--launcher", type=Path, help="a Python script that runs the lesson and the flags given to it")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    report = read_json(args.json, {}) if args.json else {}
    report |= {"machine": describe_machine(), "data": args.data_name, "seed": SEED}
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
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
