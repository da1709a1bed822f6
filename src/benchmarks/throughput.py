"""Measure how fast the lessons train: against the limits of this machine, and the usual way to load images.

    python src/benchmarks/throughput.py                          # minutes on 2 CPU cores; no network needed
    python src/benchmarks/throughput.py --json throughput.json   # keep the figures as well

Everything is timed in turn, round after round, so that a slow moment of the machine hits all alike. It prints
a table and draws artifacts/throughput.png. All training is on the CPU, on random images unless --data-dir
names CIFAR-10.

What is compared, with the same network and the same steps of the optimizer:
- the lessons' own train_one_epoch(), without augmentation (lesson 02) and with it (lesson 05);
- the ceiling: the same training on batches that lie ready in memory, normalized, as if loading cost nothing;
- the usual way: a dataset that turns every image into a PIL image and back into a tensor, with 0 and with 2
  worker processes, and each colour of an image in a block of its own in memory, not channels-last as the
  lessons have it; once more with pooling last in every block, as most tutorials have it;
- the arithmetic limit: the rate at which this machine multiplies large matrices, divided by what an image
  takes.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    ROOT,
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
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import CIFAR10

BATCH_SIZE = 128  # as in the lessons
MATRIX_SIZE = 2048  # large enough to keep all cores busy
MATRICES_PER_TASK = 10  # ... and enough of them to take about a second
CPU = torch.device("cpu")

LESSON = "lesson"
LESSON_AUGMENTED = "lesson, augmented"
CEILING = "ceiling: ready-made batches"
CLASSIC = "usual way"
CLASSIC_WORKERS = "usual way, 2 workers"
CLASSIC_POOLING_LAST = "usual way, pooling last"
CLASSIC_AUGMENTED = "usual way, augmented"
CLASSIC_AUGMENTED_WORKERS = "usual way, augmented, 2 workers"
MATRICES = "matrix multiplication"

# Lesson 05's AUGMENTATION, written the usual way: for one PIL image after the other
PIL_AUGMENTATION = [
    transforms.RandomHorizontalFlip(p=0.5),
    transforms.RandomCrop(32, padding=2),
    transforms.RandomApply(
        [transforms.RandomRotation(15, interpolation=transforms.InterpolationMode.BILINEAR)], p=0.5
    ),
    transforms.RandomApply(
        [transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)], p=0.3
    ),
]
TO_TENSOR = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
ERASING = [transforms.RandomErasing(p=0.3, scale=(0.02, 0.15))]


class PILDataset(Dataset):
    """Images as torchvision's CIFAR10 dataset gives them: one by one, through PIL, then transformed."""

    def __init__(self, images, labels, transform):  # images: uint8 array (N, 32, 32, 3)
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def pooling_last(model, x):
    """Do what SimpleCNN.forward() does with images (N, 3, 32, 32), but pool last in every block."""
    for conv, bn in [(model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.bn3)]:
        x = F.max_pool2d(F.relu(bn(conv(x))), 2)
    return model.fc2(model.dropout(F.relu(model.fc1(x.flatten(1)))))


def new_training(lesson):
    """Return a new network of the lesson, its loss function and its optimizer."""
    model = lesson.SimpleCNN()
    return model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train_step(model, loss_fn, optimizer, images, labels, forward=nn.Module.__call__):
    """Do one step of training on float32 images (N, 3, 32, 32) and labels int64 (N,)."""
    loss = loss_fn(forward(model, images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def lesson_task(lesson, images, labels, *augment):
    """Return a function that trains one epoch by the lesson's own code, with its augment(), if it has one."""
    model, loss_fn, optimizer = new_training(lesson)
    loader = DataLoader(TensorDataset(images, labels), BATCH_SIZE, shuffle=True)
    return lambda: lesson.train_one_epoch(model, loader, loss_fn, optimizer, CPU, 1, *augment)


def ceiling_task(lesson, images, labels):
    """Return a function that trains one epoch on batches that were prepared before, as the lesson would."""
    model, loss_fn, optimizer = new_training(lesson)
    pairs = zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    batches = [(lesson.to_input(batch, CPU), batch_labels) for batch, batch_labels in pairs]

    def run():
        model.train()
        for batch, batch_labels in batches:
            train_step(model, loss_fn, optimizer, batch, batch_labels)

    return run


def classic_task(lesson, images, labels, transform, workers, forward=nn.Module.__call__):
    """Return a function that trains one epoch the usual way, with that many worker processes.

    transform: a list, for one PIL image after the other.
    """
    model, loss_fn, optimizer = new_training(lesson)
    dataset = PILDataset(images.numpy(), labels.tolist(), transforms.Compose(transform))
    # Workers that persist start once, before the first round, and not in every round: that favours this way.
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, **options)

    def run():
        model.train()
        for batch, batch_labels in loader:
            train_step(model, loss_fn, optimizer, batch, batch_labels, forward)

    return run


def operations_per_image(lesson):
    """Return how many floating-point operations an image takes in a step of training, by PyTorch's counter.

    It counts the convolutions and the linear layers, forward and backward; all else is small beside them.
    """
    images, labels = torch.zeros(BATCH_SIZE, 3, 32, 32), torch.zeros(BATCH_SIZE).long()
    with FlopCounterMode(display=False) as counter:
        train_step(*new_training(lesson), images, labels)
    return counter.get_total_flops() / BATCH_SIZE


def peak_memory():
    """Return the peak memory of this process in bytes, or None on Windows, where Python cannot ask."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build_tasks(images, labels):
    """Return what is compared, {name: function}, for images uint8 (N, 32, 32, 3) and labels int64 (N,)."""
    plain, augmented = load_lesson("02"), load_lesson("05")
    augment = augmented.make_augmentation("cifar10", augmented.parse_args(["--device", "cpu"]).group_size)
    pil_augmentation = PIL_AUGMENTATION + TO_TENSOR + ERASING
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    return {
        LESSON: lesson_task(plain, images, labels),
        LESSON_AUGMENTED: lesson_task(augmented, images, labels, augment),
        CEILING: ceiling_task(plain, images, labels),
        CLASSIC: classic_task(plain, images, labels, TO_TENSOR, 0),
        CLASSIC_WORKERS: classic_task(plain, images, labels, TO_TENSOR, 2),
        CLASSIC_POOLING_LAST: classic_task(plain, images, labels, TO_TENSOR, 0, pooling_last),
        CLASSIC_AUGMENTED: classic_task(plain, images, labels, pil_augmentation, 0),
        CLASSIC_AUGMENTED_WORKERS: classic_task(plain, images, labels, pil_augmentation, 2),
        MATRICES: lambda: [matrix @ matrix for _ in range(MATRICES_PER_TASK)],
    }


def compare(seconds, images):
    """Turn the seconds of all tasks, {name: array (rounds,)}, into rates and ratios, a dict of plain types.

    A ratio is taken within every round, and the median over the rounds comes last.
    """
    operations = operations_per_image(load_lesson("02"))
    # The product of two matrices of n x n takes n^3 multiplications and n^3 additions.
    matrix_rate = MATRICES_PER_TASK * 2 * MATRIX_SIZE**3 / seconds[MATRICES]
    rates = {name: images / values for name, values in seconds.items() if name != MATRICES}
    shares = {name: values * operations / matrix_rate for name, values in rates.items()}
    plain, augmented = rates[LESSON], rates[LESSON_AUGMENTED]
    ratios = {
        "speed: lesson / ceiling": plain / rates[CEILING],
        "speed: lesson / usual way": plain / rates[CLASSIC],
        "speed: lesson / usual way, 2 workers": plain / rates[CLASSIC_WORKERS],
        "speed: lesson / usual way, pooling last": plain / rates[CLASSIC_POOLING_LAST],
        "speed, augmented: lesson / usual way": augmented / rates[CLASSIC_AUGMENTED],
        "speed, augmented: lesson / usual way, 2 workers": augmented / rates[CLASSIC_AUGMENTED_WORKERS],
        "time, lesson: augmented / plain": seconds[LESSON_AUGMENTED] / seconds[LESSON],
        "time, usual way: augmented / plain": seconds[CLASSIC_AUGMENTED] / seconds[CLASSIC],
    }
    return {
        "operations_per_image": operations,
        "matrix_operations_per_second": spread(matrix_rate),
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "share_of_arithmetic_limit": {name: spread(values) for name, values in shares.items()},
        "ratios": {name: spread(values) for name, values in ratios.items()},
    }


def print_report(report):
    """Print the figures of compare(), the times by size and the memory as tables."""
    millions = report["operations_per_image"] / 1e6
    billions = report["matrix_operations_per_second"]["median"] / 1e9
    print(f"A step of training takes {millions:.1f} million operations for an image. Multiplying", end="")
    print(f" {MATRIX_SIZE}x{MATRIX_SIZE} matrices, this machine does {billions:,.0f} billion a second.")
    print(f"Median (least to greatest) of {report['rounds']} rounds of {report['images']:,} images", end="")
    print(f" in batches of {BATCH_SIZE}:")
    print(f"  {'':32} {'images/s':>24}   share of the arithmetic limit")
    for name, figures in report["images_per_second"].items():
        share = in_words(report["share_of_arithmetic_limit"][name], 2)
        print(f"  {name:32} {in_words(figures, 0):>24}   {share}")
    for name, figures in report["ratios"].items():
        print(f"  {name:48} {in_words(figures, 2)}")
    first = next(iter(report["time_per_image_by_size"]))
    for size, figures in report["time_per_image_by_size"].items():
        print(f"  {f'time for an image: of {size:,} / of {first:,}':48} {in_words(figures, 2)}")
    if report["peak_memory_bytes"]:
        print(f"Peak memory of this process: {report['peak_memory_bytes'] / 1e9:.2f} GB")


def plot_rates(report, path):
    """Draw the rates of a report in images/s, and the arithmetic limit, as bars into a PNG file."""
    ax = Figure(figsize=(9, 3.6), layout="constrained").subplots()
    for name, rate in reversed(report["images_per_second"].items()):  # barh() begins at the bottom
        color = "C2" if name == CEILING else "C0" if name.startswith("lesson") else "lightgrey"
        ends = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
        ax.barh(name, rate["median"], color=color, xerr=ends, error_kw={"ecolor": "grey", "capsize": 3})
    limit = report["matrix_operations_per_second"]["median"] / report["operations_per_image"]
    ax.axvline(limit, color="C3", linestyle="--", label="arithmetic limit")
    machine = report["machine"]
    title = f"{machine['processor']}, {machine['threads']} threads, {machine['instructions']}"
    ax.set(title=f"Training SimpleCNN on {title}")
    ax.set(xlabel="images per second (median; thin lines: least to greatest)")
    ax.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(path, dpi=120)


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=whole_number, default=11, help="how often everything is timed")
    add("--images", type=whole_number, default=2048, help="images in one timing")
    sizes = [2000, 10_000, 50_000]
    add("--sizes", type=whole_number, nargs="+", default=sizes, help="is the cost in proportion?")
    add("--data-dir", type=Path, help="folder of CIFAR-10; random images if it is not given")
    add("--output-dir", type=Path, default=ROOT, help="folder in which artifacts/throughput.png is written")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    count = max(args.images, *args.sizes)
    if args.data_dir:
        split = CIFAR10(args.data_dir, train=True)
        images, labels = torch.tensor(split.data[:count]), torch.tensor(split.targets[:count])
    else:
        images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
        labels = torch.randint(10, (count,))
    report = {"machine": describe_machine(), "data": "CIFAR-10" if args.data_dir else "random images"}
    print(f"{machine_in_words(report['machine'])}; {report['data']}")

    seconds = measure(build_tasks(images[: args.images], labels[: args.images]), args.rounds)
    report |= {"rounds": args.rounds, "images": args.images} | compare(seconds, args.images)
    lesson = load_lesson("02")
    by_size = {size: lesson_task(lesson, images[:size], labels[:size]) for size in args.sizes}
    seconds = measure(by_size, min(args.rounds, 5))  # 5, because these are large
    times = {size: values / size for size, values in seconds.items()}  # for one image
    by_size = {size: spread(values / times[args.sizes[0]]) for size, values in times.items()}
    report |= {"time_per_image_by_size": by_size, "peak_memory_bytes": peak_memory()}

    print_report(report)
    path = args.output_dir / "artifacts" / "throughput.png"
    plot_rates(report, path)
    print(f"The picture is {path}.")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    run_script(main, RuntimeError)  # which CIFAR10 raises if the folder has no images
