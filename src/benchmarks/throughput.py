"""Measure how fast the lessons train, compared with the limits of this machine and the usual way to load images.

    python src/benchmarks/throughput.py                               # minutes on 2 CPU cores; needs no network
    python src/benchmarks/throughput.py --json docs/throughput.json   # keep the measurements as well

Everything is timed in turn, round after round, so that a slow moment of the machine hits all alike. All training
is on the CPU, and on random images unless --data-dir names CIFAR-10.

The same network takes the same optimizer steps in each of these ways:
- the lessons' own train_one_epoch(), without augmentation (lesson 02) and with it (lesson 05);
- the ceiling: batches that lie ready in memory, normalized, as if loading cost nothing;
- the usual way: torchvision's CIFAR10 dataset with a transform, which handles one image at a time, in a DataLoader
  with 0 and with 2 worker processes. The weights keep PyTorch's default memory format, whereas the lessons use
  channels-last. It is measured once more with pooling last in every block, as most tutorials have it;
- the arithmetic limit: the rate at which this machine multiplies large matrices, divided by the number of
  operations that an image takes.
"""

import argparse
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from common import describe_machine, load_lesson, measure, spread, write_json
from tables import ratios_table, throughput_table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

BATCH_SIZE = 128  # as in the lessons
MATRIX_SIZE = 2048  # large enough to keep all cores busy
MATRICES_PER_TASK = 10  # enough of them to take about a second

TO_TENSOR = [
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
]


class InMemoryCIFAR10(CIFAR10):
    """torchvision's CIFAR10 dataset, with these images uint8 (N, 3, 32, 32) instead of those of the archive."""

    def __init__(self, images, labels, transforms=TO_TENSOR):
        self.data, self.targets = images.permute(0, 2, 3, 1).numpy(), labels.tolist()
        self.transform, self.target_transform = v2.Compose(transforms), None


def make_pooling_last(lesson):
    """Return a new SimpleCNN that pools at the end of every block: convolution, BatchNorm, ReLU, pooling."""

    class PoolingLast(lesson.SimpleCNN):
        def forward(self, x):
            for conv, bn in [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]:
                x = F.max_pool2d(F.relu(bn(conv(x))), 2)
            return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))

    return PoolingLast()


def make_optimizer(model):
    """Return the optimizer of the lessons 01 to 03."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train_batches(model, optimizer, batches):
    """Train on every batch once: float32 images (B, 3, 32, 32), normalized, and labels int64 (B,)."""
    model.train()
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def lesson_task(lesson, images, labels, *augmentation):
    """Return a function that trains one epoch by the lesson's own code, on images uint8 (N, 3, 32, 32).

    augmentation: nothing, or the transform and the group size that lesson 05's train_one_epoch() takes.
    """
    model = lesson.SimpleCNN().to(memory_format=torch.channels_last)  # as in the lesson's train()
    optimizer = make_optimizer(model)
    loader = DataLoader(TensorDataset(images, labels), BATCH_SIZE, shuffle=True)
    loss_fn = nn.CrossEntropyLoss()
    return lambda: lesson.train_one_epoch(model, loader, loss_fn, optimizer, "cpu", *augmentation)


def ceiling_task(lesson, images, labels):
    """Return a function that trains one epoch on batches that were prepared before, as the lesson would."""
    model = lesson.SimpleCNN().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model)
    pairs = zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    batches = [(lesson.normalize(batch), batch_labels) for batch, batch_labels in pairs]
    return lambda: train_batches(model, optimizer, batches)


def usual_task(images, labels, model, transforms=TO_TENSOR, workers=0):
    """Return a function that trains the model for one epoch the usual way, with that many worker processes."""
    optimizer = make_optimizer(model)
    # Workers that persist start once, before the first round, and not in every round, which favours this way.
    more = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(InMemoryCIFAR10(images, labels, transforms), BATCH_SIZE, shuffle=True, **more)
    return lambda: train_batches(model, optimizer, loader)


def build_tasks(images, labels):
    """Return what is compared, {name: function}, for images uint8 (N, 3, 32, 32) and labels int64 (N,)."""
    plain, augmented = load_lesson("02"), load_lesson("05")
    transform = augmented.compose(augmented.AUGMENTATION, "cifar10")
    *on_pictures, erasing = augmented.AUGMENTATION  # RandomErasing works on tensors only, so it comes last
    usual_augmentation = [*on_pictures, *TO_TENSOR, erasing]
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    usual = functools.partial(usual_task, images, labels)
    return {
        "lesson": lesson_task(plain, images, labels),
        "lesson, augmented": lesson_task(augmented, images, labels, transform, 16),
        "ceiling: ready-made batches": ceiling_task(plain, images, labels),
        "usual way": usual(plain.SimpleCNN()),
        "usual way, 2 workers": usual(plain.SimpleCNN(), workers=2),
        "usual way, pooling last": usual(make_pooling_last(plain)),
        "usual way, augmented": usual(plain.SimpleCNN(), usual_augmentation),
        "usual way, augmented, 2 workers": usual(plain.SimpleCNN(), usual_augmentation, workers=2),
        "matrix multiplication": lambda: [matrix @ matrix for _ in range(MATRICES_PER_TASK)],
    }


def operations_per_image(lesson):
    """Return how many floating-point operations an image takes in a step of training, by PyTorch's counter.

    It counts the convolutions and the linear layers, forward and backward; all else is small beside them.
    """
    model = lesson.SimpleCNN()
    batch = torch.zeros(BATCH_SIZE, 3, 32, 32), torch.zeros(BATCH_SIZE).long()
    with FlopCounterMode(display=False) as counter:
        train_batches(model, make_optimizer(model), [batch])
    return counter.get_total_flops() / BATCH_SIZE


def compare(seconds, images):
    """Turn the seconds of all tasks, {name: array (rounds,)}, into rates and ratios, a dict of plain types.

    A ratio is taken within every round, and the median over the rounds comes last.
    """
    operations = operations_per_image(load_lesson("02"))
    # The product of two matrices of n x n takes n^3 multiplications and n^3 additions.
    matrix_rate = MATRICES_PER_TASK * 2 * MATRIX_SIZE**3 / seconds["matrix multiplication"]
    rates = {name: images / values for name, values in seconds.items() if name != "matrix multiplication"}
    shares = {name: values * operations / matrix_rate for name, values in rates.items()}
    plain, augmented = rates["lesson"], rates["lesson, augmented"]
    augmented_workers = rates["usual way, augmented, 2 workers"]
    ratios = {
        "speed: lesson / ceiling": plain / rates["ceiling: ready-made batches"],
        "speed: lesson / usual way": plain / rates["usual way"],
        "speed: lesson / usual way, 2 workers": plain / rates["usual way, 2 workers"],
        "speed: lesson / usual way, pooling last": plain / rates["usual way, pooling last"],
        "speed, augmented: lesson / usual way": augmented / rates["usual way, augmented"],
        "speed, augmented: lesson / usual way, 2 workers": augmented / augmented_workers,
        "time, lesson: augmented / plain": seconds["lesson, augmented"] / seconds["lesson"],
        "time, usual way: augmented / plain": seconds["usual way, augmented"] / seconds["usual way"],
    }
    return {
        "operations_per_image": operations,
        "matrix_operations_per_second": spread(matrix_rate),
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "share_of_arithmetic_limit": {name: spread(values) for name, values in shares.items()},
        "ratios": {name: spread(values) for name, values in ratios.items()},
    }


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=11, help="how often everything is timed")
    add("--images", type=int, default=2048, help="images in one timing")
    add("--data-dir", type=Path, help="folder of CIFAR-10; random images if it is not given")
    add("--json", type=Path, metavar="PATH", help="write the measurements to this file")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.data_dir:
        images, labels, *_ = load_lesson("02").load_data("cifar10", args.data_dir, train=True)
        images, labels = images[: args.images], labels[: args.images]
    else:
        images = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(10, (args.images,))
    seconds = measure(build_tasks(images, labels), args.rounds)
    report = {"machine": describe_machine(), "data": "CIFAR-10" if args.data_dir else "random images"}
    report |= {"rounds": args.rounds, "images": args.images} | compare(seconds, args.images)
    print(throughput_table(report), ratios_table(report), sep="\n\n")
    write_json(args.json, report)


if __name__ == "__main__":
    main()
