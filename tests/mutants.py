"""Prove that the tests can fail: make mistakes that people really make, one at a time, and run the tests on each.

    python tests/mutants.py                  # all of them; takes a while
    python tests/mutants.py --only "zero_grad|shuffle"            # those whose name matches the regular expression
    python tests/mutants.py --only resume --first checkpoints     # begin with tests/test_checkpoints.py
    python tests/mutants.py --jobs 2                              # two at a time

Every mistake is made in a copy of the repository, in all lessons that contain the text (so that the test that holds the
lessons in step is not the one to notice). The report is a table of the tests that failed. Exit status 1 if a mistake
went unnoticed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSONS = Path("src/experiments/model_train")
# The quick ones first. (What the lessons have in common is not the point here, so test_sync.py stays out.)
FILES = [
    "training",
    "evaluation",
    "data",
    "schedules",
    "smoke",
    "checkpoints",
    "command_line",
    "tensorboard",
    "faults",
]

# name: (lessons, text, replacement)
MUTANTS = {
    "drop model.train()": ("123456", "    model.train()\n", ""),
    "drop zero_grad": ("123456", "        optimizer.zero_grad()\n", ""),
    "drop optimizer.step()": ("123456", "        optimizer.step()\n", ""),
    "step before backward": (
        "123456",
        "        loss.backward()\n",
        "        optimizer.step()\n        loss.backward()\n",
        "scales how far.\n        optimizer.step()\n",
        "scales how far.\n",
    ),
    "validate in train mode": (
        "23456",
        "    model.eval()\n    total_loss = correct = 0\n",
        "    model.train()\n    total_loss = correct = 0\n",
    ),
    "validate with gradients": ("23456", "@torch.no_grad()  # nothing here", "# nothing here"),
    "do not shuffle": ("123456", "shuffle=True, generator=shuffle", "shuffle=False, generator=shuffle"),
    "pin no memory for a GPU": ("123456", 'pinned = args.device.type == "cuda"', "pinned = False"),
    "pin memory without a GPU": ("123456", 'pinned = args.device.type == "cuda"', "pinned = True"),
    "read the loss of every batch": ("123456", "        loss.backward()\n", "        loss.backward()\n        loss.item()\n"),
    "shuffle without a generator": ("123456", "shuffle=True, generator=shuffle", "shuffle=True"),
    "average batch means": ("123456", "loss.detach() * len(labels)", "loss.detach() * loader.batch_size"),
    "average validation batch means": (
        "23456",
        "loss_fn(logits, labels) * len(labels)",
        "loss_fn(logits, labels) * loader.batch_size",
    ),
    "accuracy by batches": (
        "123456",
        "100 * correct.item() / len(loader.dataset)",
        "100 * correct.item() / (len(loader) * loader.batch_size)",
    ),
    "softmax before the loss": (
        "123456",
        "        loss = loss_fn(logits, labels)\n",
        "        loss = loss_fn(logits.softmax(dim=1), labels)\n",
    ),
    "softmax in the network": ("123456", "return self.fc2(x)", "return F.softmax(self.fc2(x), dim=1)"),
    "wrong standard deviation": ("123456", "[0.2470, 0.2435, 0.2616]", "[0.2023, 0.1994, 0.2010]"),
    "forget to scale to 0..1": ("123456", "images.float() / 255 - MEAN", "images.float() - MEAN"),
    "swap height and width": ("123456", "permute(0, 3, 1, 2)  # non_blocking", "permute(0, 3, 2, 1)  # non_blocking"),
    "no progress over dead mirrors": ("123456", "for url in MIRRORS:", "for url in MIRRORS[:1]:"),
    "trust a training that was stopped": ("6", "    save_checkpoint(best, path)", "            save_checkpoint(best, path)"),
    "keep the live weights": ("6", "copy.deepcopy(model.state_dict())", "model.state_dict()"),
    "write over the earlier run": ("345", "folder.rename(new_run_dir(folder.parent, LESSON))", "folder"),
    "no network timeout": ("123456", "urlopen(url, timeout=15)", "urlopen(url, timeout=None)"),
    "wait for a mirror that trickles": ("123456", "elif time.monotonic() > deadline:", "elif False:"),
    "accept any archive": ("123456", "if hashlib.md5(content).hexdigest() != CIFAR10.tgz_md5:", "if False:"),
    "go on with nan": ("123456", "if not math.isfinite(loss):", "if False:"),
    "notice nan at the end of the epoch": ("123456", "if batch % 20 == 0 or batch == len(loader):", "if batch == len(loader):"),
    "validate nan": ("23456", '    stop_if_diverged(val_loss, epoch, "validation")', "    #"),
    "believe in the TensorBoard folder": ("23456", "    Path(writer.log_dir).mkdir(parents=True, exist_ok=True)", "    #"),
    "keep the curves in memory": ("23456", "    writer.flush()  # now", "    #"),
    "believe in checksums that nobody looks at": ("3456", "        if file.testzip():", "        if False:"),
    "name the oldest file": ("3456", "st_mtime, reverse=True)", "st_mtime)"),
    "a traceback of the imports": ("123456", "    sys.tracebacklimit = 0", "    sys.tracebacklimit = 9"),
    "no tracebacks at all": ("123456", "    del sys.tracebacklimit", "    pass"),
    "read pictures of any size": ("3", "if picture.width * picture.height > 50_000_000:", "if False:"),
    "cut 16 bits off at 255": ("3", 'if picture.mode.startswith("I"):', "if False:"),
    "take an empty --resume for none": ("345", "if args.resume is not None:", "if args.resume:"),
    "write pictures in place": ("145", "savefig(temporary,", "savefig(path,", "    temporary.replace(path)", "    #"),
    "fall back without a word": (
        "123456",
        'answered: going on with handwritten digits instead."',
        'answered."',
    ),
    "swap the digits' splits": ("123456", "% 5 != 4) == train", "% 5 == 4) == train"),
    "take the seed from nowhere": (
        "123456",
        "torch.manual_seed(args.seed)  # the network's",
        "torch.seed()  # the network's",
    ),
    "split by the global random numbers": (
        "23456",
        "generator=torch.Generator().manual_seed(seed))",
        "generator=None)",
    ),
    "validation overlaps training": (
        "23456",
        "order[len(order) * 4 // 5 :][:subset]",
        "order[len(order) // 2 :][:subset]",
    ),
    "labels lose their images": (
        "23456",
        "TensorDataset(images[train], labels[train])",
        "TensorDataset(images[train], labels[train.sort().values])",
    ),
    "gap the wrong way round": (
        "2",
        'row["train_accuracy"] - row["val_accuracy"] > 10',
        'row["val_accuracy"] - row["train_accuracy"] > 10',
    ),
    "two epochs are a trend": ("2", "len(changes) == 3", "len(changes) >= 2"),
    "modes shown on the model itself": ("2", "model = copy.deepcopy(model)", "model = model"),
    "curves mixed up": (
        "23456",
        'writer.add_scalar("Loss/val", row["val_loss"], epoch)',
        'writer.add_scalar("Loss/val", row["train_loss"], epoch)',
    ),
    "step off by one": (
        "23456",
        'writer.add_scalar("Accuracy/val", row["val_accuracy"], epoch)',
        'writer.add_scalar("Accuracy/val", row["val_accuracy"], epoch - 1)',
    ),
    "second run draws over the first": ("23456", "        run += 1\n", "        break\n"),
    "best on training accuracy": (
        "345",
        'is_best = history[-1]["val_accuracy"] > best_accuracy',
        'is_best = history[-1]["train_accuracy"] > best_accuracy',
    ),
    "best on training accuracy in 06": ("6", 'if row["val_accuracy"] > best_accuracy', 'if row["train_accuracy"] > best_accuracy'),
    "best is always the last": ("345", "            if is_best:\n", "            if True:\n"),
    "snapshot every fourth epoch": ("3", "epoch % 5 == 0", "epoch % 4 == 0"),
    "store the last epoch as the next": ("345", '"next_epoch": epoch + 1', '"next_epoch": epoch'),
    "forget the optimizer's state": ("345", '        optimizer.load_state_dict(checkpoint["optimizer"])', "        #"),
    "forget the loader's generator": ("345", '    shuffle.set_state(states["shuffle"])\n', ""),
    "forget torch's random state": ("345", '    torch.set_rng_state(states["torch"])\n', ""),
    "forget NumPy's random state": ("345", '    np.random.set_state(tuple(states["numpy"]))\n', ""),
    "forget the history": (
        "345",
        'history, best_accuracy = checkpoint["history"], checkpoint["best_accuracy"]',
        'history, best_accuracy = checkpoint["history"], -1.0',
    ),
    "resume into a new TensorBoard run": ("345", '        run_dir = run_dir.with_name(checkpoint["run"])', "        #"),
    "write straight to the checkpoint": ("3456", 'temporary = path.with_suffix(".tmp")', "temporary = path"),
    "do not wait for the disk": ("3456", "        os.fsync(file.fileno())", "        #"),
    "load any pickle": ("3456", "weights_only=True)\n", "weights_only=False)\n"),
    "resume with other settings": ("45", "        if getattr(args, name) != saved[name]:", "        if False:"),
    "resume with other settings in 03": (
        "3",
        'if name != "epochs" and getattr(args, name) != saved[name]:',
        "if False:",
    ),
    "predict in train mode": ("3", "    model.eval()  # forgotten", "    model.train()  # forgotten"),
    "softmax over the batch": ("3", "F.softmax(model(to_input(images, device)), dim=1)", "F.softmax(model(to_input(images, device)), dim=0)"),
    "picture not turned upright": ("3", "ImageOps.exif_transpose(picture)", "picture"),
    "picture squeezed": ("3", 'ImageOps.fit(picture.convert("RGB"), (32, 32))', 'picture.convert("RGB").resize((32, 32))'),
    "forget the scheduler's state": ("45", '        scheduler.load_state_dict(checkpoint["scheduler"])', "        #"),
    "plateau on the training loss": ("4", 'scheduler.step(history[-1]["val_loss"])', 'scheduler.step(history[-1]["train_loss"])'),
    "rate logged after the step": (
        "4",
        "            is_best =",
        '            history[-1]["lr"] = optimizer.param_groups[0]["lr"]\n            is_best =',
    ),
    "scheduler before the optimizer": (
        "56",
        "        scheduler.step()\n",
        "        pass\n",
        "run_epoch(model, train_loader, val_loader, loss_fn, optimizer, args.device",
        "(scheduler.step(), run_epoch)[1](model, train_loader, val_loader, loss_fn, optimizer, args.device",
    ),
    "scheduler once a batch": (
        "4",
        "                scheduler.step()\n",
        "                [scheduler.step() for _ in train_loader]\n",
    ),
    "cosine too long": ("456", "T_max=", "T_max=1 + "),
    "plateau without patience": ("4", "factor=0.2, patience=1", "factor=0.2, patience=0"),
    "ranking upside down": ("45", '["val_accuracy"], reverse=True)', '["val_accuracy"])'),
    "standard error of one accuracy": ("45", "(2 * top / 100 *", "(top / 100 *"),
    "standard error without the root": ("45", "/ images) ** 0.5", "/ images)"),
    "augment validation": (
        "56",
        "    for images, labels in loader:\n",
        "    for images, labels in loader:\n        images = augment(images, 16)\n",
    ),
    "augment nothing": ("56", "        if group_size:", "        if False:"),
    "one draw for the whole batch": ("56", "2).split(group_size)", "2).split(len(images))"),
    "the same draws in every epoch": (
        "56",
        "\n    groups = images.permute(0, 3, 1, 2).split(group_size)",
        "\n    torch.manual_seed(0)\n    groups = images.permute(0, 3, 1, 2).split(group_size)",
    ),
    "upside down instead of mirrored": ("56", "        v2.RandomHorizontalFlip(p=0.5)", "        v2.RandomVerticalFlip(p=0.5)"),
    "dropout in every arm": ("5", '"augment": True, "dropout": 0.0', '"augment": True, "dropout": 0.5'),
    "augment the arm without": ("5", 'args.group_size if ARMS[name]["augment"] else 0', "args.group_size"),
    "choose on the test split": ("36", "load_data(args.data, args.data_dir, train=True)", "load_data(args.data, args.data_dir, train=False)"),
    "test on the training split": ("36", "load_data(args.data, args.data_dir, train=False)", "load_data(args.data, args.data_dir, train=True)"),
    "confusion matrix transposed": ("6", "confusion_matrix(labels, predicted,", "confusion_matrix(predicted, labels,"),
    "axes of the picture swapped": ("6", 'left.set(title="Images", xlabel="predicted class", ylabel="true class")', 'left.set(title="Images", xlabel="true class", ylabel="predicted class")'),
    "percent of the column": ("6", "matrix.sum(axis=1, keepdims=True)", "matrix.sum(axis=0, keepdims=True)"),
    "confidence from the logits": ("6", "F.softmax(logits, dim=1).max(dim=1)  # the largest", "logits.max(dim=1)  # the largest"),
    "softmax over the batch in 06": ("6", "F.softmax(logits, dim=1).max(dim=1)  # the largest", "F.softmax(logits, dim=0).max(dim=1)  # the largest"),
    "top-k one short": ("6", "k=k, labels=classes", "k=max(1, k - 1), labels=classes"),
    "argmax over the batch": ("6", "by_torch, by_numpy = batch.argmax(dim=1)", "by_torch, by_numpy = batch.argmax(dim=0)"),
    "calibration error unweighted": ("6", "inside.double().mean().item() * abs(", "0.1 * abs("),
    "interval of one standard error": ("6", "margin = 1.96 *", "margin = 1.0 *"),
    "error samples that are right": ("6", "wrong = (predicted != labels)", "wrong = (predicted == labels)"),
    "least confident errors": ("6", "argsort(descending=True)", "argsort()"),
    "evaluate in train mode": ("6", "    model.eval()\n    return torch.cat", "    model.train()\n    return torch.cat"),
}  # fmt: skip


def mutate(folder, lessons, edits):
    """Make the edits, pairs of a text and its replacement, in these lessons of a copy. Returns those that had them."""
    changed = []
    for path in sorted((folder / LESSONS).glob("0*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name[1] in lessons and all(old in source for old, _ in edits):
            for old, new in edits:
                source = source.replace(old, new)
            compile(source, path.name, "exec")  # a mistake that no lesson would start with proves nothing
            path.write_text(source, encoding="utf-8")
            changed.append(path.name[:2])
    return changed


def run(name, first, all_tests):
    """Run the tests on a copy with this mistake. Returns the lessons that have it and the tests that failed."""
    lessons, *texts = MUTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in ["src", "tests", "artifacts", "tensor_board"]:
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.pth", "events*", "__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        changed = mutate(folder, lessons, list(zip(texts[::2], texts[1::2], strict=True)))
        if not changed:
            return [], ["the text is not there any more: mend the mutant"]
        tests = [f"tests/test_{file}.py" for file in sorted(FILES, key=lambda file: file != first)]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:randomly",
            *tests,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            command + ([] if all_tests else ["-x"]),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        return changed, re.findall(r"^(?:FAILED|ERROR) tests/test_(\S+)", process.stdout, flags=re.MULTILINE)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="run the mutants whose name this regular expression matches"
    )
    parser.add_argument("--first", choices=FILES, default=FILES[0], help="the tests to begin with")
    parser.add_argument("--jobs", type=int, default=1, help="mutants to try at a time")
    parser.add_argument("--all-tests", action="store_true", help="go on after the first test that fails")
    args = parser.parse_args()
    names = [name for name in MUTANTS if re.search(args.only, name)]
    killed = 0
    print("| mistake | lessons | killed by |\n|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, (lessons, tests) in zip(
            names, pool.map(lambda n: run(n, args.first, args.all_tests), names), strict=True
        ):
            killed += bool(lessons and tests)
            print(f"| {name} | {' '.join(lessons)} | {', '.join(tests) or '**nobody**'} |", flush=True)
    print(f"\n{killed} of {len(names)} killed")
    sys.exit(killed < len(names))


if __name__ == "__main__":
    main()
