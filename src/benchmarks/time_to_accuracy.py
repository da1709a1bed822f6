"""Measure how many minutes of training it takes to reach 75 % validation accuracy: lesson 04's way, and others.

    python src/benchmarks/time_to_accuracy.py --json docs/time_to_accuracy.json    # about an hour on 2 CPU cores

All train the network of lesson 04 with its cosine schedule, on the lesson's split, and validate after every epoch,
which counts too:
- "lesson": the lesson's own train_one_epoch() and evaluate();
- "usual way, pooling last": one image at a time, and pooling at the end of every block (see throughput.py);
- "Keras": the same network and recipe in Keras, if it is installed (it is not required; choose its backend with
  KERAS_BACKEND). It draws its initial weights by its own rule.

They train in turn, an epoch of one after an epoch of the other, so that a slow moment of the machine hits all
alike. The time to the goal is the sum of a run's own epochs, up to the first one that reaches it.
"""

import importlib.util
import time

import torch
from common import describe_machine, load_lesson, make_parser, spread, write_json
from tables import time_table
from throughput import InMemoryCIFAR10, make_pooling_last, train_batches
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

LR, BATCH_SIZE = 0.05, 128  # as in lesson 04


def learning_rates(lesson, epochs):
    """Return the learning rate of every epoch under the cosine, by the lesson's own scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)
    scheduler = lesson.make_scheduler("CosineAnnealingLR", optimizer, epochs)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def make_way(make_model, train_one_epoch, evaluate, seed, train_set, val_set):
    """Return a function of the learning rate that trains and validates with lesson 04's seeds. It returns percent."""
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    train_loader = DataLoader(train_set, BATCH_SIZE, shuffle=True, generator=shuffle)
    val_loader = DataLoader(val_set, batch_size=250)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)

    def run(rate):
        optimizer.param_groups[0]["lr"] = rate
        train_one_epoch(model, optimizer, train_loader)
        return evaluate(model, val_loader)

    return run


def lesson_way(lesson, *seed_and_sets):
    """Return a function of the learning rate that trains and validates as the lesson does. It returns percent."""

    def train_one_epoch(model, optimizer, loader):
        lesson.train_one_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, "cpu")

    def make_model():
        return lesson.SimpleCNN().to(memory_format=torch.channels_last)

    return make_way(
        make_model, train_one_epoch, lambda *args: lesson.evaluate(*args, "cpu")[1], *seed_and_sets
    )


def usual_way(lesson, seed, *sets):
    """Return a function of the learning rate that trains and validates the usual way, and pools last."""

    def evaluate(model, loader):
        model.eval()
        with torch.no_grad():
            correct = sum((model(x).argmax(dim=1) == y).sum().item() for x, y in loader)
        return 100 * correct / len(loader.dataset)

    sets = [InMemoryCIFAR10(*one.tensors) for one in sets]
    return make_way(lambda: make_pooling_last(lesson), train_batches, evaluate, seed, *sets)


def keras_way(lesson, seed, train_set, val_set):
    """Return a function of the learning rate that trains and validates the same network in Keras."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)
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
    optimizer = keras.optimizers.SGD(LR, momentum=0.9)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    (images, labels), (val_images, val_labels) = (
        (images.permute(0, 2, 3, 1).numpy(), labels.numpy())  # Keras expects (N, 32, 32, 3)
        for images, labels in [train_set.tensors, val_set.tensors]
    )

    def run(rate):
        optimizer.learning_rate = rate
        model.fit(images, labels, batch_size=BATCH_SIZE, verbose=0)  # in a new order every time
        _, accuracy = model.evaluate(val_images, val_labels, batch_size=250, verbose=0)
        return 100 * float(accuracy)

    return run


def train_in_turn(ways, rates, goal):
    """Train all ways, {name: function of the learning rate}, until each has reached the goal in percent.

    Return {name: [(seconds, accuracy), ...]}, a pair for every epoch; at most one epoch for every learning rate.
    """
    epochs = {name: [] for name in ways}
    for rate in tqdm(rates, unit="epoch", disable=None):
        for name, way in ways.items():
            if not epochs[name] or epochs[name][-1][1] < goal:
                start = time.perf_counter()
                accuracy = way(rate)
                epochs[name].append((time.perf_counter() - start, accuracy))
    return epochs


def summarize(runs, goal):
    """Turn what train_in_turn() returned for every seed, {seed: {name: ...}}, into plain numbers.

    minutes is None if a run does not reach the goal. A ratio is of two epochs of one seed with the same number,
    trained one after the other.
    """
    summary = {}
    for name in next(iter(runs.values())):
        of_seeds = [run[name] for run in runs.values()]
        pairs = [zip(run[name], run["lesson"], strict=False) for run in runs.values()]
        ratios = torch.tensor([own[0] / lesson[0] for pair in pairs for own, lesson in pair])
        summary[name] = {
            "minutes": [sum(s for s, _ in own) / 60 if own[-1][1] >= goal else None for own in of_seeds],
            "epochs": [len(own) for own in of_seeds],
            "accuracy": [own[-1][1] for own in of_seeds],
            "seconds_per_epoch": spread(torch.tensor([seconds for own in of_seeds for seconds, _ in own])),
            "time_per_epoch": spread(ratios),
        }
    return summary


def build_parser():
    """Return the parser of this command line."""
    parser = make_parser()
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="one run of each way for each of them")
    add("--goal", type=float, default=75.0, help="validation accuracy in percent")
    add("--epochs", type=int, default=5, help="as in lesson 04")
    add("--subset", type=int, default=50_000, help="as in lesson 04")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    lesson = load_lesson("04")
    ways = {"lesson": lesson_way, "usual way, pooling last": usual_way}
    if importlib.util.find_spec("keras"):
        ways["Keras"] = keras_way
    else:
        print("Keras is not installed, so it is left out.")
    images, labels, *_ = lesson.load_data(args.data, args.data_dir, train=True)
    runs = {}
    for seed in args.seeds:
        splits = lesson.split_train_val(images, labels, seed, args.subset)
        started = {name: way(lesson, seed, *splits) for name, way in ways.items()}
        runs[seed] = train_in_turn(started, learning_rates(lesson, args.epochs), args.goal)

    report = {"machine": describe_machine(), "data": args.data_name, "goal": args.goal, "seeds": args.seeds}
    report["ways"] = summarize(runs, args.goal)
    print(time_table(report))
    write_json(args.json, report)


if __name__ == "__main__":
    main()
