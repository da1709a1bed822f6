"""Measure what each part of lesson 05's recipe gains: its augmented arm, trained in several ways.

    python src/benchmarks/recipes.py --json docs/recipes.json    # two to three hours on 2 CPU cores

Every way differs from the lesson's own in what its name says, and in nothing else. Finished trainings are kept
in the JSON file, so the command can be stopped and started again; what is in the file is not trained again.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from common import ROOT, describe_machine, load_lesson, machine_in_words, run_script, write_json
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from tqdm import tqdm

CPU = torch.device("cpu")


def cosine(done, epochs):
    """Return the factor of the rate after so many epochs: half a cosine wave."""
    return (1 + math.cos(math.pi * done / epochs)) / 2


def warm_up(done):
    """Return the factor of the first two epochs: a third, two thirds."""
    return min(1, (done + 1) / 3)


SCHEDULES = {
    "cosine": cosine,
    "warm-up, cosine": lambda done, epochs: warm_up(done) * cosine(done, epochs),
    "warm-up, linear": lambda done, epochs: min(warm_up(done), 1 - done / epochs),
}
OWN = {
    "epochs": 16,
    "lr": 0.1,
    "schedule": "warm-up, cosine",
    "padding": 2,
    "rotation": 0.5,
    "batch_size": 128,
    "flips": "random",
}
WAYS = {
    "lesson 05": {},
    "no warm-up": {"schedule": "cosine"},
    "warm-up and linear decay": {"schedule": "warm-up, linear"},
    "half the rate, no warm-up": {"lr": 0.05, "schedule": "cosine"},
    "padding 4": {"padding": 4},
    "rotation always": {"rotation": 1.0},
    "alternating flips": {"flips": "alternating"},
    "batches of 64, half the rate": {"batch_size": 64, "lr": 0.05},
    "batches of 256, twice the rate": {"batch_size": 256, "lr": 0.2},
    "30 epochs, half the rate, no warm-up, padding 4, rotation always": {
        "epochs": 30,
        "lr": 0.05,
        "schedule": "cosine",
        "padding": 4,
        "rotation": 1.0,
    },
}


def train(lesson, way, seed, images, labels, subset, progress):
    """Train lesson 05's augmented arm in this way. Returns the best validation accuracy in percent."""
    train_set, val_set = lesson.split_train_val(images, labels, seed, subset)
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    transforms = list(lesson.AUGMENTATION)  # flip, crop, rotation, colours, erasing
    transforms[1] = v2.RandomCrop(32, padding=way["padding"])
    transforms[2] = v2.RandomApply(transforms[2].transforms, way["rotation"])
    if way["flips"] == "alternating":
        transforms = transforms[1:]
    lesson.AUGMENTATION = transforms
    augment = lesson.make_augmentation("cifar10", 16)
    model = lesson.SimpleCNN()
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), way["lr"], momentum=0.9, weight_decay=5e-4, nesterov=True)
    factor = SCHEDULES[way["schedule"]]
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda done: factor(done, way["epochs"]))
    pixels, targets = train_set.tensors
    # This half is turned in odd epochs, the other in even ones. Drawn apart, so that the batches stay the lesson's.
    turned = torch.rand(len(pixels), generator=torch.Generator().manual_seed(seed)) < 0.5
    best = 0.0
    for epoch in range(1, way["epochs"] + 1):
        if way["flips"] == "alternating":
            chosen = turned if epoch % 2 else ~turned
            flipped = pixels.clone()
            flipped[chosen] = pixels[chosen].flip(2)  # (N, 32, 32, 3): along the width
            train_set = TensorDataset(flipped, targets)
        loader = DataLoader(train_set, way["batch_size"], shuffle=True, generator=shuffle)
        lesson.train_one_epoch(model, loader, loss_fn, optimizer, CPU, epoch, augment)
        best = max(best, lesson.evaluate(model, DataLoader(val_set, batch_size=250), CPU)[1])
        scheduler.step()
        progress.update()
    return best


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="one training for each, of each way")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what is compared")
    add("--subset", type=int, default=50_000, help="as in lesson 05")
    add("--data", default="cifar10", help="as in lesson 05")
    add("--data-dir", type=Path, default=ROOT / "data", help="as in lesson 05")
    add("--data-name", default="CIFAR-10", help="what the tables call the data")
    add(
        "--json", type=Path, metavar="PATH", help="write the figures to this file, and go on with those in it"
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    report = {"machine": describe_machine(), "data": args.data_name, "accuracy": {}}
    if args.json and args.json.exists():
        report = json.loads(args.json.read_text(encoding="utf-8"))
    accuracy = report["accuracy"]  # {way: {seed: percent}}; in JSON, all keys are texts
    images, labels, *_ = load_lesson("05").load_data(args.data, args.data_dir, train=True)
    todo = [(s, name) for s in args.seeds for name in args.ways if str(s) not in accuracy.get(name, {})]
    print(machine_in_words(report["machine"]))
    total = sum((OWN | WAYS[name])["epochs"] for _, name in todo)
    with tqdm(total=total, unit="epoch", disable=None) as progress:
        for seed, name in todo:
            lesson = load_lesson("05")  # anew, because train() changes it
            found = train(lesson, OWN | WAYS[name], seed, images, labels, args.subset, progress)
            accuracy.setdefault(name, {})[str(seed)] = found
            if args.json:
                write_json(args.json, report)
    print("Best validation accuracy in percent, mean and every seed:")
    for name in args.ways:
        values = [accuracy[name][str(seed)] for seed in args.seeds]
        print(f"  {name:66} {statistics.mean(values):.2f}  ({', '.join(f'{value:.2f}' for value in values)})")


if __name__ == "__main__":
    run_script(main)
