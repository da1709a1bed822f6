"""Train by the recipes of lessons 04 and 05 with one thing changed, and keep what is reached in docs/recipes.json.

    python src/benchmarks/recipes.py --json docs/recipes.json                      # all of them: hours
    python src/benchmarks/recipes.py --recipes "AdamW, cosine" --lr 0.0005 0.001 --json docs/recipes.json

A recipe differs from the lesson's own, which is the first of its group, in what its name says and in nothing else.
A run that is in the file is not repeated, so the command can be stopped and started again. On a busy machine add
--untimed: the accuracies do not depend on it, but the seconds do.
"""

import itertools
import sys
import time

import torch
from common import describe_machine, load_lesson, make_parser, read_json, write_json
from tables import optimizers_table
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from tqdm import tqdm

LESSON_04 = {"optimizer": "SGD", "schedule": "cosine", "lr": 0.05, "epochs": 5, "batch_size": 128}
LESSON_04 |= {"augmentation": False, "label_smoothing": 0.0, "subset": 50_000}
LESSON_05 = {"optimizer": "SGD, Nesterov", "schedule": "warm-up, cosine", "lr": 0.1, "epochs": 16}
LESSON_05 |= {"batch_size": 128, "augmentation": True, "label_smoothing": 0.1, "subset": 50_000}
LESSON_05 |= {"flips": "random", "padding": 2, "rotation": 0.5, "group_size": 16}
SHORT = {"epochs": 8, "subset": 20_000}
EARLIER = {"epochs": 30, "lr": 0.05, "schedule": "cosine", "padding": 4, "rotation": 1.0}
RECIPES = {
    "SGD, cosine": LESSON_04,
    "SGD, one cycle": LESSON_04 | {"schedule": "one cycle", "lr": 0.1},
    "AdamW, cosine": LESSON_04 | {"optimizer": "AdamW", "lr": 0.001},
    "lesson 05": LESSON_05,
    "no warm-up": LESSON_05 | {"schedule": "cosine"},
    "warm-up and linear decay": LESSON_05 | {"schedule": "warm-up, linear"},
    "half the learning rate, no warm-up": LESSON_05 | {"lr": 0.05, "schedule": "cosine"},
    "padding 4": LESSON_05 | {"padding": 4},
    "rotation always": LESSON_05 | {"rotation": 1.0},
    "alternating flips": LESSON_05 | {"flips": "alternating"},
    "batches of 64, half the learning rate": LESSON_05 | {"batch_size": 64, "lr": 0.05},
    "batches of 256, twice the learning rate": LESSON_05 | {"batch_size": 256, "lr": 0.2},
    "30 epochs, half the learning rate, no warm-up, padding 4, rotation always": LESSON_05 | EARLIER,
    "groups of 1": LESSON_05 | SHORT | {"group_size": 1},
    "groups of 16": LESSON_05 | SHORT,
    "groups of 128": LESSON_05 | SHORT | {"group_size": 128},
}


def make_transform(lesson, recipe, data):
    """Return lesson 05's transforms as one, with the recipe's flips, padding and rotation."""
    flip, _, rotation, jitter, erasing = lesson.AUGMENTATION
    flip = flip if recipe["flips"] == "random" else v2.Identity()  # train() does the alternating flips
    crop = v2.RandomCrop(32, padding=recipe["padding"])
    rotation = v2.RandomApply(rotation.transforms, p=recipe["rotation"])
    return lesson.compose([flip, crop, rotation, jitter, erasing], data)


def make_optimizer(name, model, lr):
    """Return the named optimizer of the model's weights."""
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr)  # with PyTorch's default weight decay, 0.01
    if name == "SGD, Nesterov":
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def make_scheduler(name, optimizer, lr, epochs, batches):
    """Return the named scheduler. "one cycle" is for a step after every batch, all others after every epoch."""
    if name == "one cycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=lr, epochs=epochs, steps_per_epoch=batches)
    if name == "warm-up, linear":
        return lr_scheduler.LambdaLR(optimizer, lambda done: min((done + 1) / 3, 1 - done / epochs))
    schedulers = []
    if name == "warm-up, cosine":
        schedulers.append(lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2))
    schedulers.append(lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs))
    return lr_scheduler.ChainedScheduler(schedulers)


def train(lesson, recipe, images, labels, data, seed):
    """Train a SimpleCNN by the recipe. Return the validation accuracy of every epoch, in percent."""
    train_set, val_set = lesson.split_train_val(images, labels, seed, recipe["subset"])
    val_loader = DataLoader(val_set, batch_size=250)
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    augmentation = []
    if recipe["augmentation"]:
        augmentation = [make_transform(lesson, recipe, data), recipe["group_size"]]
    model = lesson.SimpleCNN().to(memory_format=torch.channels_last)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=recipe["label_smoothing"])
    optimizer = make_optimizer(recipe["optimizer"], model, recipe["lr"])
    batches = -(-len(train_set) // recipe["batch_size"])  # rounded up: the last batch may be smaller
    scheduler = make_scheduler(recipe["schedule"], optimizer, recipe["lr"], recipe["epochs"], batches)
    if recipe["schedule"] == "one cycle":
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
    pixels, targets = train_set.tensors
    # Alternating flips: this half is mirrored in odd epochs, the other half in even ones. It has a generator of its
    # own, so that the order of the images stays the lesson's.
    mirrored = torch.rand(len(pixels), generator=torch.Generator().manual_seed(seed)) < 0.5
    accuracies = []
    for _ in range(recipe["epochs"]):
        if recipe.get("flips") == "alternating":
            flipped = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
            train_set, mirrored = TensorDataset(flipped, targets), ~mirrored
        loader = DataLoader(train_set, recipe["batch_size"], shuffle=True, generator=shuffle)
        lesson.train_one_epoch(model, loader, loss_fn, optimizer, "cpu", *augmentation)
        if recipe["schedule"] != "one cycle":
            scheduler.step()
        accuracies.append(lesson.evaluate(model, val_loader, "cpu")[1])
    return accuracies


def build_parser():
    """Return the parser of this command line."""
    parser = make_parser()
    add = parser.add_argument
    add("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="what is compared")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="one run of each recipe for each of them")
    add("--lr", type=float, nargs="+", help="learning rates to try; the recipe's own if not given")
    add("--epochs", type=int, help="the recipe's own if not given")
    add("--subset", type=int, help="the recipe's own if not given")
    add("--untimed", action="store_true", help="keep no times, because the machine has other things to do")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    lesson = load_lesson("05")  # with transform=None, its train_one_epoch() is that of lesson 04
    images, labels, _, data = lesson.load_data(args.data, args.data_dir, train=True)
    runs = read_json(args.json, [])
    order, new = list(RECIPES), []
    wanted = list(itertools.product(args.seeds, args.recipes, args.lr or [None]))
    for seed, name, lr in tqdm(wanted, unit="run", disable=None):
        given = {"lr": lr, "epochs": args.epochs, "subset": args.subset}
        recipe = RECIPES[name] | {key: value for key, value in given.items() if value}
        run = {"recipe": name} | {key: recipe[key] for key in given} | {"seed": seed}
        if any(run.items() <= earlier.items() for earlier in runs):
            continue
        start = time.perf_counter()
        accuracies = train(lesson, recipe, images, labels, data, seed)
        seconds = None if args.untimed else round(time.perf_counter() - start, 1)
        run |= {"best_accuracy": max(accuracies), "last_accuracy": accuracies[-1], "seconds": seconds}
        run |= {"date": time.strftime("%Y-%m-%d"), "data": args.data_name, "machine": describe_machine()}
        new.append(run)
        runs = sorted([*runs, run], key=lambda run: (order.index(run["recipe"]), run["lr"], run["seed"]))
        write_json(args.json, runs)
    print(optimizers_table(new))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. With --json, the same command continues.")
