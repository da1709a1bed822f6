"""Measure how many minutes of training it takes to 75 % validation accuracy: lesson 04's way, and others.

    python src/benchmarks/time_to_accuracy.py --json docs/time_to_accuracy.json    # about an hour on 2 CPU cores

All train the network of lesson 04 with the schedule named by --schedule, on the lesson's split, and validate
after every epoch, which counts too:
- "lesson": the lesson's own train_one_epoch() and evaluate();
- "usual way, pooling last": every image through PIL, and pooling at the end of every block (see throughput.py);
- "Keras": the same network and recipe in Keras, if it is installed (it is no requirement; choose its backend
  with KERAS_BACKEND). Its first weights are drawn by its own rule.

They train in turn, an epoch of one after an epoch of the other, so that a slow moment of the machine hits all
alike. The time to the goal is the sum of a training's own epochs, up to the first one that reaches it.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from common import (
    ROOT,
    describe_machine,
    in_words,
    load_lesson,
    machine_in_words,
    median_and_each,
    run_script,
    spread,
    write_json,
)
from throughput import CLASSIC_POOLING_LAST, CPU, LESSON, TO_TENSOR, PILDataset, pooling_last, train_step
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

KERAS = "Keras"


def learning_rates(lesson, args):
    """Return the learning rate of every epoch under the schedule, by the lesson's own scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], args.lr)
    scheduler = lesson.SCHEDULERS[args.schedule](optimizer, args.epochs)
    rates = []
    for _ in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def new_training(lesson, args):
    """Return a new network, its optimizer, and the random numbers for the order of the images, by the seed."""
    torch.manual_seed(args.seed)
    model = lesson.SimpleCNN()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    return model, optimizer, torch.Generator().manual_seed(args.seed)


def lesson_way(lesson, args, train_set, val_set):
    """Return a function of (epoch, rate) that trains and validates as the lesson does. It returns percent."""
    model, optimizer, shuffle = new_training(lesson, args)
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    val_loader = DataLoader(val_set, batch_size=250)  # as in the lesson

    def run(epoch, rate):
        optimizer.param_groups[0]["lr"] = rate
        lesson.train_one_epoch(model, train_loader, nn.CrossEntropyLoss(), optimizer, CPU, epoch)
        return lesson.evaluate(model, val_loader, CPU)[1]

    return run


def usual_way(lesson, args, train_set, val_set):
    """Return a function of (epoch, rate) that trains and validates through PIL, and pools last."""
    model, optimizer, shuffle = new_training(lesson, args)

    def loader(split, **options):
        images, labels = split.tensors
        dataset = PILDataset(images.numpy(), labels.tolist(), transforms.Compose(TO_TENSOR))
        return DataLoader(dataset, **options)

    train_loader = loader(train_set, batch_size=args.batch_size, shuffle=True, generator=shuffle)
    val_loader = loader(val_set, batch_size=250)

    def run(epoch, rate):
        optimizer.param_groups[0]["lr"] = rate
        model.train()
        for images, labels in train_loader:
            train_step(model, nn.CrossEntropyLoss(), optimizer, images, labels, pooling_last)
        model.eval()
        with torch.no_grad():
            right = sum((pooling_last(model, x).argmax(dim=1) == y).sum().item() for x, y in val_loader)
        return 100 * right / len(val_set)

    return run


def keras_way(lesson, args, train_set, val_set):
    """Return a function of (epoch, rate) that trains and validates the same network in Keras."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(args.seed)
    mean, std = lesson.MEAN.flatten().numpy(), lesson.STD.flatten().numpy()
    model = keras.Sequential([keras.Input((32, 32, 3))])
    model.add(layers.Normalization(mean=255 * mean, variance=(255 * std) ** 2))
    for filters in [32, 64, 128]:
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.MaxPooling2D())
        model.add(layers.BatchNormalization(momentum=0.9, epsilon=1e-5))
        model.add(layers.ReLU())
    model.add(layers.Flatten())
    model.add(layers.Dense(256, activation="relu"))
    model.add(layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(args.lr, momentum=0.9)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    (images, labels), (val_images, val_labels) = (
        [part.numpy() for part in split.tensors] for split in [train_set, val_set]
    )

    def run(epoch, rate):
        optimizer.learning_rate = rate
        model.fit(images, labels, batch_size=args.batch_size, verbose=0)  # in a new order every time
        _, accuracy = model.evaluate(val_images, val_labels, batch_size=250, verbose=0)
        return 100 * float(accuracy)

    return run


def train_in_turn(ways, rates, goal):
    """Train all ways, {name: function of (epoch, rate)}, until each has reached the goal in percent.

    Returns {name: [(seconds, accuracy), ...]}, a pair for every epoch; at most one epoch for every rate.
    """
    epochs = {name: [] for name in ways}
    for epoch, rate in enumerate(tqdm(rates, unit="epoch", disable=None), start=1):
        for name, way in ways.items():
            if not epochs[name] or epochs[name][-1][1] < goal:
                start = time.perf_counter()
                accuracy = way(epoch, rate)
                epochs[name].append((time.perf_counter() - start, accuracy))
    return epochs


def seconds_to(goal, epochs):
    """Return the seconds of all epochs up to the first that reaches the goal, or None if none does."""
    if epochs[-1][1] < goal:
        return None
    return sum(seconds for seconds, _ in epochs)


def summarize(runs, goal):
    """Turn what train_in_turn() returned for every seed, {seed: {name: ...}}, into figures of plain types.

    A ratio is of two epochs of one seed with the same number, trained one after the other.
    """
    by_seed = list(runs.values())
    names = list(by_seed[0])
    figures = {}
    for name in names:
        seconds = [seconds_to(goal, run[name]) for run in by_seed]
        pairs = [zip(run[name], run[LESSON], strict=False) for run in by_seed]
        ratios = torch.tensor([own[0] / lesson[0] for pair in pairs for own, lesson in pair])
        figures[name] = {
            "minutes": [None if value is None else value / 60 for value in seconds],
            "epochs": [len(run[name]) for run in by_seed],
            "accuracy": [run[name][-1][1] for run in by_seed],
            "seconds_per_epoch": spread(torch.tensor([s for run in by_seed for s, _ in run[name]])),
            "time_per_epoch": spread(ratios),
        }
    return figures


def print_report(report):
    """Print the figures of summarize(), a line for every way."""
    print(f"Minutes of training to {report['goal']:g} % validation accuracy, seeds {report['seeds']}:")
    for name, figures in report["ways"].items():
        minutes, ratio = median_and_each(figures["minutes"]), in_words(figures["time_per_epoch"], 2)
        print(f"  {name:24} {minutes}, after {figures['epochs']} epochs; ", end="")
        print(f"time for an epoch against the lesson: {ratio}")


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="one training for each, of each way")
    add("--schedule", default="CosineAnnealingLR", help="one of lesson 04's that go by the epoch alone")
    add("--goal", type=float, default=75.0, help="validation accuracy in percent")
    add("--epochs", help="as in lesson 04; its own default if it is not given")
    add("--subset", default="50000", help="as in lesson 04")
    add("--data", default="cifar10", help="as in lesson 04")
    add("--data-dir", default=str(ROOT / "data"), help="as in lesson 04")
    add("--data-name", default="CIFAR-10", help="what the tables call the data")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    return parser


def main(argv=None):
    options = build_parser().parse_args(argv)
    lesson = load_lesson("04")
    known = [name for name in lesson.SCHEDULERS if name != "ReduceLROnPlateau"]
    if options.schedule not in known:
        sys.exit(f"--schedule {options.schedule} is none of {', '.join(known)}.")
    flags = ["--device", "cpu", "--subset", options.subset]
    flags += ["--data", options.data, "--data-dir", options.data_dir]
    flags += ["--epochs", options.epochs] if options.epochs else []
    ways = {LESSON: lesson_way, CLASSIC_POOLING_LAST: usual_way}
    if importlib.util.find_spec("keras"):
        ways[KERAS] = keras_way
    else:
        print("Keras is not installed, so it is left out.")
    machine = describe_machine()
    print(machine_in_words(machine))
    args = lesson.parse_args(flags)
    images, labels, *_ = lesson.load_data(args.data, args.data_dir, train=True)
    args.schedule = options.schedule
    rates, runs = learning_rates(lesson, args), {}
    for seed in options.seeds:
        args.seed = seed
        splits = lesson.split_train_val(images, labels, args.seed, args.subset)
        trainings = {name: way(lesson, args, *splits) for name, way in ways.items()}
        runs[seed] = train_in_turn(trainings, rates, options.goal)
    report = {"machine": machine, "data": options.data_name, "goal": options.goal, "seeds": options.seeds}
    report |= {"schedule": options.schedule, "ways": summarize(runs, options.goal)}
    print_report(report)
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    run_script(main)
