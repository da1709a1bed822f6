"""Measure what each transform of lesson 05 costs, and what is saved when a group of images shares one.

    python src/benchmarks/augmentation_cost.py                                     # within a minute
    python src/benchmarks/augmentation_cost.py --json docs/augmentation_cost.json  # keep the figures as well

It times every transform alone, always applied, in groups as large as the lesson's; ColorJitter once more
without hue, which costs most; and all together, as the lesson trains, in groups of several sizes. It takes
random images, because no transform looks at what it transforms. Everything is timed in turn, round after
round, so that a slow moment of the machine hits all alike.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from common import (
    describe_machine,
    in_words,
    load_lesson,
    machine_in_words,
    measure,
    run_script,
    spread,
    whole_number,
    write_json,
)
from torchvision.transforms import v2

GROUP_SIZE = 16  # the lesson's default
GROUP_SIZES = [1, 8, 16, 128]  # of all together


def transform_in_groups(transform, images, group_size):
    """Draw a transform once for every group_size images. images: uint8 (N, 32, 32, 3)."""
    for group in images.permute(0, 3, 1, 2).split(group_size):  # as in the lesson's augment()
        transform(group)


def build_tasks(images):
    """Return what is timed, {name: function}, for images uint8 (N, 32, 32, 3)."""
    lesson = load_lesson("05")
    jitter, together = lesson.TRANSFORMS["ColorJitter"], v2.Compose(lesson.AUGMENTATION)
    without_hue = v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation)
    alone = lesson.TRANSFORMS | {"ColorJitter without hue": without_hue}
    timed = [(name, transform, GROUP_SIZE) for name, transform in alone.items()]
    timed += [("all together", together, size) for size in GROUP_SIZES]
    return {
        f"{name}, groups of {size}": partial(transform_in_groups, transform, images, size)
        for name, transform, size in timed
    }


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=whole_number, default=11, help="how often everything is timed")
    add("--images", type=whole_number, default=512, help="images in one timing")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    machine = describe_machine()
    print(machine_in_words(machine))
    images = torch.randint(256, (args.images, 32, 32, 3), dtype=torch.uint8)
    seconds = measure(build_tasks(images), args.rounds)
    # Milliseconds for 1,000 images: 1,000 times the seconds, and 1,000 / images times as many images
    costs = {name: spread(values * 1_000_000 / args.images) for name, values in seconds.items()}

    print(
        f"ms per 1,000 images: median (least to greatest) of {args.rounds} rounds of {args.images:,} images"
    )
    for name, figures in costs.items():
        print(f"  {name:38} {in_words(figures, 1):>28}")
    if args.json:
        report = {"machine": machine, "rounds": args.rounds, "images": args.images}
        report["ms_per_1000_images"] = costs
        write_json(args.json, report)


if __name__ == "__main__":
    run_script(main)
