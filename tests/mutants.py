"""Prove that the tests can fail: make mistakes that people really make, one at a time, and run the tests on each.

    python tests/mutants.py                  # all of them; takes a while
    python tests/mutants.py --only "zero_grad|shuffle"            # those whose name matches the regular expression
    python tests/mutants.py --only resume --first faults          # begin with tests/test_faults.py
    python tests/mutants.py --jobs 2                              # two at a time

Every mistake is made in a copy of the repository, in all lessons that its entry names (so that the test that holds the
lessons in step is not the one to notice). The tests begin with the file that is named beside the mistake, and go on
with all the others until one fails. The report is a table of the tests that failed. Exit status 1 if a mistake went
unnoticed.
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
    "precision",
    "early_stopping",
    "clipping",
    "transfer",
    "pictures",
    "distributed",
]

# name: (lessons, the test file to begin with, text, replacement, another text, its replacement, ...)
# Lessons are a text of digits, from 10 on a list.
# A text has no comment in it, so that comments can be reworded.
MUTANTS = {
    # The loop
    "drop model.train()": ("123456", "training", "    model.train()", "    pass"),
    "drop zero_grad": ("123456", "training", "        optimizer.zero_grad()\n", ""),
    "drop optimizer.step()": ("123456", "training", "        optimizer.step()\n", ""),
    "step before backward": (
        "123456",
        "training",
        "        loss.backward()\n",
        "        optimizer.step()\n        loss.backward()\n",
        "        optimizer.step()\n\n",
        "\n",
    ),
    "validate in train mode": (
        "23456",
        "training",
        "    model.eval()\n    total_loss = correct = 0\n",
        "    model.train()\n    total_loss = correct = 0\n",
    ),
    "validate with gradients": ("23456", "training", "def evaluate(", "@torch.enable_grad()\ndef evaluate("),
    "do not shuffle": ("123456", "training", "shuffle=True, generator=shuffle", "shuffle=False, generator=shuffle"),
    "shuffle without a generator": ("123456", "training", "shuffle=True, generator=shuffle", "shuffle=True"),
    "pin no memory for a GPU": ("123456", "training", 'pinned = args.device.type == "cuda"', "pinned = False"),
    "pin memory without a GPU": ("123456", "training", 'pinned = args.device.type == "cuda"', "pinned = True"),
    "read the loss of every batch": ("123456", "training", "        loss.backward()\n", "        loss.backward()\n        loss.item()\n"),
    "average batch means": ("123456", "training", "loss.detach() * len(labels)", "loss.detach() * loader.batch_size"),
    "average validation batch means": (
        "23456",
        "training",
        "F.cross_entropy(logits, labels) * len(labels)",
        "F.cross_entropy(logits, labels) * loader.batch_size",
    ),
    "accuracy by batches": (
        "123456",
        "training",
        "100 * correct.item() / len(loader.dataset)",
        "100 * correct.item() / (len(loader) * loader.batch_size)",
    ),
    "softmax before the loss": (
        "123456",
        "training",
        "        loss = loss_fn(logits, labels)\n",
        "        loss = loss_fn(logits.softmax(dim=1), labels)\n",
    ),
    "softmax in the network": ("123456", "training", "return self.fc2(x)", "return F.softmax(self.fc2(x), dim=1)"),
    "wrong standard deviation": ("123456", "training", "[0.2470, 0.2435, 0.2616]", "[0.2023, 0.1994, 0.2010]"),
    "forget to scale to 0..1": ("123456", "training", "images.float() / 255 - ", "images.float() - "),
    "swap height and width": ("123456", "training", "to_device(images, device).permute(0, 3, 1, 2)", "to_device(images, device).permute(0, 3, 2, 1)"),
    "images for a Mac's GPU not contiguous": ("123456", "training", 'if device.type == "mps":', "if False:"),
    "wait for no copy, to whatever device": ("123456", "training", 'non_blocking=device.type == "cuda"', "non_blocking=True"),
    "batch size wired wrongly": ("123456", "training", "DataLoader(train_set, args.batch_size,", "DataLoader(train_set, 128,"),
    "learning rate wired wrongly": ("1234", "training", "lr=args.lr, momentum", "lr=0.02, momentum"),
    "learning rate wired wrongly in 05 and 06": ("56", "training", "model.parameters(), args.lr,", "model.parameters(), 0.05,"),
    "too little momentum": ("123456", "training", "momentum=0.9", "momentum=0.5"),
    "ten times the weight decay": ("56", "schedules", "weight_decay=5e-4", "weight_decay=5e-3"),
    "no nesterov momentum": ("56", "schedules", ", nesterov=True", ""),
    "no label smoothing": ("56", "training", "label_smoothing=0.1", ""),
    "validation loss with label smoothing": (
        "56",
        "training",
        "F.cross_entropy(logits, labels) * len(labels)",
        "F.cross_entropy(logits, labels, label_smoothing=0.1) * len(labels)",
    ),
    "take the seed from nowhere": ("123456", "command_line", "torch.manual_seed(args.seed)", "torch.seed()"),
    "go on with nan": ("123456", "faults", "if not math.isfinite(loss):", "if False:"),
    "notice nan at the end of the epoch": ("123456", "faults", "if batch % 100 == 1 or batch == len(loader):", "if batch == len(loader):"),
    "validate nan": ("23456", "faults", '    stop_if_diverged(val_loss, epoch, "validation")', "    #"),
    # The images
    "no progress over dead mirrors": ("123456", "data", "for url in MIRRORS:", "for url in MIRRORS[:1]:"),
    "no network timeout": ("123456", "data", "socket.setdefaulttimeout(15)", "socket.setdefaulttimeout(None)"),
    "fall back without a word": ("123456", "data", '        print(f"{problem}; this run', '        str(f"{problem}; this run'),
    "pass over an archive of another name": (
        "123456",
        "data",
        "if found and not found & {CIFAR10.base_folder, CIFAR10.filename}:",
        "if False:",
    ),
    "look for the inner folder in the inner folder": (
        "123456",
        "data",
        "data_dir = data_dir.parent if data_dir.name == CIFAR10.base_folder else data_dir",
        "data_dir = Path(data_dir)",
    ),
    "swap the digits' splits": ("123456", "data", "% 5 != 4) == train", "% 5 == 4) == train"),
    "split by the global random numbers": ("23456", "data", "generator=torch.Generator().manual_seed(seed))", "generator=None)"),
    "validation overlaps training": ("23456", "data", "order[len(order) * 4 // 5 :][:subset]", "order[len(order) // 2 :][:subset]"),
    "labels lose their images": (
        "23456",
        "data",
        "TensorDataset(images[train], labels[train])",
        "TensorDataset(images[train], labels[train.sort().values])",
    ),
    "validate on the training images": (
        "23456",
        "training",
        "split_train_val(images, labels, args.seed, args.subset)",
        "split_train_val(images, labels, args.seed, args.subset); val_set = train_set",
    ),
    "choose on the test split": ("36", "evaluation", "load_data(args.data, args.data_dir, train=True)", "load_data(args.data, args.data_dir, train=False)"),
    "test on the training split": ("36", "evaluation", "load_data(args.data, args.data_dir, train=False)", "load_data(args.data, args.data_dir, train=True)"),
    "test all images in spite of --subset": ("6", "evaluation", "images[: args.subset], labels[: args.subset]", "images, labels"),
    # Augmentation
    "augment validation": (
        "56",
        "training",
        "    for images, labels in loader:\n",
        '    for images, labels in loader:\n        images = make_augmentation("digits", 16)(images)\n',
    ),
    "augment nothing": ("56", "data", "        if augment:", "        if False:"),
    "one draw for the whole batch": ("56", "data", "2).split(group_size)", "2).split(len(images))"),
    "the same draws in every epoch": (
        "56",
        "data",
        "        groups = images.permute",
        "        torch.manual_seed(0)\n        groups = images.permute",
    ),
    "upside down instead of mirrored": ("56", "data", "    v2.RandomHorizontalFlip(p=0.5)", "    v2.RandomVerticalFlip(p=0.5)"),
    "mirror the digits": ("56", "data", 'transforms = v2.Compose(AUGMENTATION[1:] if data == "digits" else AUGMENTATION)', "transforms = v2.Compose(AUGMENTATION)"),
    "mirror the digits in the picture": ("5", "schedules", '"all together": v2.Compose(AUGMENTATION[1:] if data == "digits" else AUGMENTATION)', '"all together": v2.Compose(AUGMENTATION)'),
    "mirror no photographs": ("56", "data", 'transforms = v2.Compose(AUGMENTATION[1:] if data == "digits" else AUGMENTATION)', "transforms = v2.Compose(AUGMENTATION[1:])"),
    "transforms of other data": ("56", "data", "make_augmentation(args.data, args.group_size)", 'make_augmentation("cifar10", args.group_size)'),
    "group size wired wrongly": ("56", "data", "make_augmentation(args.data, args.group_size)", "make_augmentation(args.data, 16)"),
    "dropout in every arm": ("5", "schedules", '"with_augmentation": (True, 0.0)', '"with_augmentation": (True, 0.5)'),
    "dropout in no arm": ("5", "data", "SimpleCNN(len(class_names), dropout)", "SimpleCNN(len(class_names))"),
    "augment the arm without": ("5", "data", "args.group_size) if augmented else None", "args.group_size)"),
    # Overfitting
    "gap the wrong way round": ("2", "training", 'row["Overfitting/accuracy_gap"] > 10', '-row["Overfitting/accuracy_gap"] > 10'),
    "two epochs are a trend": ("2", "training", "len(last_four) == 4", "len(last_four) >= 3"),
    "modes shown on the model itself": ("2", "training", "model = copy.deepcopy(model)", "model = model"),
    "gap by validation images": ("5", "schedules", "gaps = measure_gaps(args, folder, histories, train_set)", "gaps = measure_gaps(args, folder, histories, val_set)"),
    "gap by test images": (
        "5",
        "evaluation",
        "gaps = measure_gaps(args, folder, histories, train_set)",
        "gaps = measure_gaps(args, folder, histories, TensorDataset(*load_data(args.data, args.data_dir, train=False)[:2]))",
    ),
    "gap of the last model": ("5", "schedules", 'load_checkpoint(folder / name / "best_model.pth"', 'load_checkpoint(folder / name / "latest_checkpoint.pth"'),
    "gap by augmented images": ("5", "schedules", 'train_accuracy - best["Accuracy/val"]', 'best["Accuracy/train"] - best["Accuracy/val"]'),
    "negative gap in 05": ("5", "schedules", 'train_accuracy - best["Accuracy/val"]', 'best["Accuracy/val"] - train_accuracy'),
    "what has learned nothing hardly overfits": ("5", "schedules", "if train_accuracy < 50:", "if False:"),
    # Runs, their folders, and what TensorBoard shows of them
    "two runs share a folder": (
        "23456",
        "command_line",
        "if not any(run_dir.exists() for run_dir in run_dirs):",
        "if True:",
        "run_dir.mkdir(parents=True)",
        "run_dir.mkdir(parents=True, exist_ok=True)",
    ),
    "two starts in one moment share a folder": ("23456", "checkpoints", "run_dir.mkdir(parents=True)", "run_dir.mkdir(parents=True, exist_ok=True)"),
    "believe in the TensorBoard folder": ("23456", "faults", "    Path(writer.log_dir).mkdir(parents=True, exist_ok=True)", "    #"),
    "keep the curves in memory": ("23456", "tensorboard", "    writer.flush()", "    #"),
    "curves mixed up": ("23456", "training", '"Loss/val": val_loss,', '"Loss/val": loss,'),
    "curve of the gap the wrong way round": ("23456", "training", '"Overfitting/accuracy_gap": acc - val_acc', '"Overfitting/accuracy_gap": val_acc - acc'),
    "step off by one": ("23456", "training", "writer.add_scalar(curve, value, epoch)", "writer.add_scalar(curve, value, epoch - 1)"),
    "resume into a new TensorBoard run": (
        "345",
        "checkpoints",
        "    with SummaryWriter(run_dir, purge_step",
        '    run_dir = new_run_dirs("more", args.output_dir / "tensor_board" / LESSON)[0] if history else run_dir\n    with SummaryWriter(run_dir, purge_step',
    ),
    "hide no unsaved epoch": ("345", "faults", "SummaryWriter(run_dir, purge_step=len(history) + 1)", "SummaryWriter(run_dir)"),
    "hide the last saved epoch": ("345", "checkpoints", "purge_step=len(history) + 1", "purge_step=len(history)"),
    "leave one unsaved epoch": ("345", "faults", "purge_step=len(history) + 1", "purge_step=len(history) + 2"),
    "best curve shows the last": ("45", "checkpoints", "max(val_acc, best_accuracy)", "val_acc"),
    "HParams names another curve": ("45", "tensorboard", '{"Accuracy/best_val": 0}', '{"Accuracy/val": 0}'),
    "HParams with another rate": ("45", "tensorboard", '"lr": args.lr,', '"lr": 0.0,'),
    "PR curves of another class": ("6", "evaluation", "logits.softmax(dim=1)[:, i]", "logits.softmax(dim=1)[:, i - 1]"),
    "test accuracy as a share in TensorBoard": ("6", "evaluation", '"Test/accuracy", 100 * report["accuracy"]', '"Test/accuracy", report["accuracy"]'),
    # Checkpoints
    "best on training accuracy": ("345", "checkpoints", "if val_acc > best_accuracy:", "if acc > best_accuracy:", "best_accuracy = val_acc", "best_accuracy = acc"),
    "best on training accuracy in 06": ("6", "checkpoints", "if val_acc > best_accuracy:", "if acc > best_accuracy:", "best_accuracy = val_acc", "best_accuracy = acc"),
    "best is always the last": ("3456", "checkpoints", "if val_acc > best_accuracy:", "if True:"),
    "best saved after latest": (
        "345",
        "checkpoints",
        "            save(latest)",
        "            #",
        "            if val_acc > best_accuracy:\n",
        "            save(latest)\n            if val_acc > best_accuracy:\n",
    ),
    "snapshot every fourth epoch": ("3", "checkpoints", "epoch % 5 == 0", "epoch % 4 == 0"),
    "save nothing before the first epoch": ("345", "checkpoints", "    if not latest.exists():", "    if False:"),
    "no best model of a checkpoint from elsewhere": ("345", "checkpoints", "    if history and not best.exists():", "    if False:"),
    "repeat the last saved epoch": ("345", "checkpoints", "range(len(history) + 1, args.epochs + 1)", "range(max(1, len(history)), args.epochs + 1)"),
    "forget the optimizer's state": ("345", "checkpoints", "part.load_state_dict(checkpoint[key])", 'key == "optimizer" or part.load_state_dict(checkpoint[key])'),
    "forget the scheduler's state": ("45", "checkpoints", "part.load_state_dict(checkpoint[key])", 'key == "scheduler" or part.load_state_dict(checkpoint[key])'),
    "forget the loader's generator": ("345", "checkpoints", '            generator.set_state(state)', '            generator is generators[0] or generator.set_state(state)'),
    "forget torch's random state": ("345", "checkpoints", '            generator.set_state(state)', '            generator is generators[1] or generator.set_state(state)'),
    "forget the best accuracy": (
        "345",
        "checkpoints",
        'load_checkpoint(best)["history"][-1]["Accuracy/val"] if best.exists() else -1.0',
        "-1.0",
    ),
    "resume the oldest run": ("345", "checkpoints", "return paths[-1]", "return paths[0]"),
    "resume the run of the last name": ("345", "checkpoints", "key=lambda path: path.stat().st_mtime", "key=str"),
    "take an empty --resume for none": ("345", "checkpoints", "if args.resume is not None:", "if args.resume:"),
    "an older epoch goes on in the folder of its run": (
        "3",
        "checkpoints",
        'resumed.resolve() in checkpoints.resolve().glob("*/latest_checkpoint.pth")',
        'resumed.resolve() in checkpoints.resolve().glob("*/*.pth")',
    ),
    "a checkpoint from elsewhere goes on where it lies": (
        "3",
        "checkpoints",
        'resumed.resolve() in checkpoints.resolve().glob("*/latest_checkpoint.pth")',
        'resumed.name == "latest_checkpoint.pth"',
    ),
    "go on with a run of another output folder": ("45", "checkpoints", "if folder.resolve().parent != checkpoints.resolve():", "if False:"),
    "resume with other settings": ("45", "checkpoints", "        if getattr(args, key) != value:", "        if False:"),
    "resume with other settings in 03": ("3", "checkpoints", 'if key != "epochs" and getattr(args, key) != value:', "if False:"),
    "resume another lesson's run": ("345", "checkpoints", 'if resumed and (resumed["lesson"] != LESSON or types != HYPERPARAMETERS):', "if False:"),
    "believe in the settings of a checkpoint": ("345", "checkpoints", 'resumed["lesson"] != LESSON or types != HYPERPARAMETERS', 'resumed["lesson"] != LESSON'),
    "the command to resume forgets the folder": ("345", "checkpoints", '"--output-dir", args.output_dir, ', ""),
    "write straight to the checkpoint": ("3456", "checkpoints", 'temporary = path.with_suffix(".tmp")', "temporary = path"),
    "do not wait for the disk": ("3456", "checkpoints", "        os.fsync(file.fileno())", "        #"),
    "load any pickle": ("3456", "checkpoints", "weights_only=True)\n", "weights_only=False)\n"),
    "believe in checksums that nobody looks at": ("3456", "faults", "            if file.testzip():", "            if False:"),
    "believe in the kinds of a checkpoint's parts": ("3456", "checkpoints", "if not isinstance(checkpoint[key], kind):", "if False:"),
    "believe in the history of a checkpoint": (
        "3456",
        "checkpoints",
        'if not all(isinstance(row["Accuracy/val"], float) for row in checkpoint["history"]):',
        "if False:",
    ),
    "show the latest model as the best": ("3", "checkpoints", 'load_checkpoint(folder / "best_model.pth"', 'load_checkpoint(folder / "latest_checkpoint.pth"'),
    "trust a training that was stopped": ("6", "checkpoints", 'unfinished = path.with_name(f"{run_dir.name}_unfinished.pth")', "unfinished = path"),
    "evaluate a model of other data": ("6", "evaluation", 'if args.data not in ["auto", settings["data"]]:', "if False:"),
    # Pictures to predict
    "predict in train mode": ("3", "checkpoints", "return model(to_input(images, device))", "return model.train()(to_input(images, device))"),
    "softmax over the batch": ("3", "checkpoints", ".softmax(dim=1).cpu()", ".softmax(dim=0).cpu()"),
    "picture not turned upright": ("3", "checkpoints", "ImageOps.exif_transpose(Image.open(path))", "Image.open(path)"),
    "picture squeezed": (
        "3",
        "checkpoints",
        'ImageOps.fit(Image.alpha_composite(white, picture).convert("RGB"), (32, 32))',
        'Image.alpha_composite(white, picture).convert("RGB").resize((32, 32))',
    ),
    "show what transparency hides": ("3", "faults", "Image.alpha_composite(white, picture)", "picture"),
    "cut 16 bits off at 255": ("3", "faults", 'if picture.mode.startswith("I;16"):', "if False:"),
    "guess the range of deep grey": ("3", "faults", 'if picture.mode in ["I", "F"]:', "if False:"),
    "guess the range of decimal grey": ("3", "faults", 'if picture.mode in ["I", "F"]:', 'if picture.mode == "I":'),
    "open whatever --predict names": ("3", "faults", "if not path.is_file():", "if False:"),
    "the least probable classes": ("3", "checkpoints", "probabilities.topk(3)", "probabilities.topk(3, largest=False)"),
    "predictions of other images than named": ("3", "checkpoints", "images[:10], args.device", "images[10:20], args.device"),
    # Schedules
    "rate logged after the step": (
        "4",
        "schedules",
        '            if name == "ReduceLROnPlateau":\n                scheduler.step(val_loss)\n            else:\n                scheduler.step()\n',
        "",
        "            row = {",
        '            scheduler.step(*[val_loss] * (name == "ReduceLROnPlateau"))\n            row = {',
    ),
    "rate logged after the step in 05 and 06": (
        "56",
        "schedules",
        "            scheduler.step()\n",
        "",
        "            row = {",
        "            scheduler.step()\n            row = {",
    ),
    "scheduler before the optimizer": (
        "56",
        "schedules",
        "            scheduler.step()\n",
        "",
        "            loss, acc = train_one_epoch(",
        "            scheduler.step()\n            loss, acc = train_one_epoch(",
    ),
    "scheduler once a batch": ("4", "schedules", "                scheduler.step()\n", "                [scheduler.step() for _ in train_loader]\n"),
    "plateau on the training loss": ("4", "schedules", "scheduler.step(val_loss)", "scheduler.step(loss)"),
    "plateau with patience": ("4", "schedules", "factor=0.2, patience=0", "factor=0.2, patience=1"),
    "plateau without threshold": ("4", "schedules", ", threshold=0.05", ""),
    "cosine too long": ("456", "schedules", "T_max=", "T_max=1 + "),
    "no warm-up": ("56", "schedules", "ChainedScheduler([warm_up, cosine])", "ChainedScheduler([cosine])"),
    "warm-up alone": ("56", "schedules", "ChainedScheduler([warm_up, cosine])", "ChainedScheduler([warm_up])"),
    "warm-up too short": ("56", "schedules", "total_iters=2", "total_iters=1"),
    "warm-up from too low": ("56", "schedules", "start_factor=1 / 3", "start_factor=1 / 4"),
    "thirds rounded down": ("4", "schedules", "math.ceil(epochs / 3)", "max(1, epochs // 3)"),
    "milestones rounded down": ("4", "schedules", "[math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)]", "[epochs // 2, epochs * 3 // 4]"),
    # The comparison of the arms
    "ranking upside down": ("45", "schedules", "key=best.get, reverse=True)", "key=best.get)"),
    "ranking by the last epoch": ("45", "schedules", '{name: max(row["Accuracy/val"] for row in history) for', '{name: history[-1]["Accuracy/val"] for'),
    "ranking shows the last epoch's accuracy": ("45", "schedules", "{best[name]:5.2f} % in epoch", "{histories[name][-1]['Accuracy/val']:5.2f} % in epoch"),
    "ranking counts epochs from 0": ("45", "schedules", ".index(best[name]) + 1", ".index(best[name])"),
    "standard error of one accuracy": ("45", "schedules", "error = 2**0.5 * standard_error(", "error = standard_error("),
    "standard error without the root": ("45", "schedules", "return 100 * (p * (1 - p) / images) ** 0.5", "return 100 * (p * (1 - p) / images)"),
    "no error where all are right": ("45", "schedules", "p = (accuracy / 100 * images + 1) / (images + 2)", "p = accuracy / 100"),
    "gap of another arm in words": ("5", "schedules", 'print(f"    gap {gap:.2f} points', 'print(f"    gap {max(gaps.values()):.2f} points'),
    "gap beside the last accuracy": ("5", "schedules", "validation {best['Accuracy/val']:.2f} %", "validation {history[-1]['Accuracy/val']:.2f} %"),
    "seconds of the last epoch": ("5", "schedules", 'sum(row["Seconds"] for row in history)', 'history[-1]["Seconds"]'),
    "rates of another arm in the picture": (
        "4",
        "schedules",
        "        ax.stairs(rates,",
        '        ax.stairs([row["LearningRate"] for row in list(histories.values())[0]],',
    ),
    "accuracies of another arm in the picture": ("4", "schedules", "range(1, len(rates) + 1), accuracies,", "range(1, len(rates) + 1), [row['Accuracy/val'] for row in list(histories.values())[-1]],"),
    "epochs of the rates half an epoch late": ("4", "schedules", "np.arange(len(rates) + 1) + 0.5", "np.arange(len(rates) + 1)"),
    "last instead of best in the picture": ("4", "schedules", "best = max(accuracies)", "best = accuracies[-1]"),
    "error bars too small": ("4", "schedules", "xerr=standard_error(best, images)", "xerr=standard_error(best, images) / 2"),
    "training drawn as validation": ("5", "schedules", "values, label = [row[key] for row in history]", 'values, label = [row["Accuracy/val"] for row in history]'),
    "accuracies from epoch 0 on": ("5", "schedules", "range(1, len(values) + 1)", "range(len(values))"),
    "bars of negative gaps": ("5", "schedules", 'points", gaps[name]', 'points", -gaps[name]'),
    "the image itself among its draws": ("5", "schedules", "if number else image", "if number > 1 else image"),
    "draws where the image should be": ("5", "schedules", "if number else image", "if True else image"),
    # What is said and drawn of an epoch
    "losses from epoch 0 on": ("1", "training", "ax.plot(range(1, args.epochs + 1)", "ax.plot(range(args.epochs)"),
    "mean loss shown as the batch's": ("1", "training", "loss {loss.item():.4f}", "loss {total_loss.item() / batch:.4f}"),
    "training and validation loss swapped in words": (
        "23456",
        "training",
        "train loss {row['Loss/train']",
        "train loss {row['Loss/val']",
        "val loss {row['Loss/val']",
        "val loss {row['Loss/train']",
    ),
    "validation accuracy shown twice": ("23456", "training", "acc {row['Accuracy/train']", "acc {row['Accuracy/val']"),
    "last epoch shown as the best in 02": ("2", "training", 'max(history, key=lambda row: row["Accuracy/val"])', "history[-1]"),
    "best epoch counted from 0 in 02": ("2", "training", "history.index(best) + 1", "history.index(best)"),
    "first accuracy shown as the best in 03": ("3", "checkpoints", 'accuracy = history[-1]["Accuracy/val"]', 'accuracy = history[0]["Accuracy/val"]'),
    # The evaluation
    "confusion matrix transposed": ("6", "evaluation", "confusion_matrix(labels, predicted,", "confusion_matrix(predicted, labels,"),
    "percent of the column": ("6", "evaluation", "matrix.sum(axis=1, keepdims=True)", "matrix.sum(axis=0, keepdims=True)"),
    "confidence from the logits": ("6", "evaluation", "confidence, predicted = logits.softmax(dim=1).max(dim=1)", "confidence, predicted = logits.max(dim=1)"),
    "softmax over the batch in 06": ("6", "evaluation", "confidence, predicted = logits.softmax(dim=1).max(dim=1)", "confidence, predicted = logits.softmax(dim=0).max(dim=1)"),
    "top-k one short": ("6", "evaluation", "k=k, labels=classes", "k=max(1, k - 1), labels=classes"),
    "argmax over the batch": ("6", "evaluation", "torch.max(batch, dim=1)", "torch.max(batch, dim=0)"),
    "calibration error unweighted": (
        "6",
        "evaluation",
        "sum(n * abs(sure - share) for sure, share, n in bins) / len(labels)",
        "sum(abs(sure - share) for sure, share, n in bins) / len(bins)",
    ),
    "interval of one standard error": ("6", "evaluation", "proportion_ci(0.95,", "proportion_ci(0.68,"),
    "interval that is not Wilson's": ("6", "evaluation", 'method="wilson"', 'method="exact"'),
    "overconfident by one point": (
        "6",
        "evaluation",
        'if sure > high else "underconfident" if sure < low else',
        'if sure > accuracy + 0.01 else "underconfident" if sure < accuracy - 0.01 else',
    ),
    "macro average shown as weighted": ("6", "evaluation", 'by_class["weighted avg"]', 'by_class["macro avg"]'),
    "precision and recall swapped in the table": ("6", "evaluation", "precision, recall, f1, images = row", "recall, precision, f1, images = row"),
    "top-k labels off by one": ("6", "evaluation", 'f"top-{k} {100', 'f"top-{k - 1} {100'),
    "strongest class called the weakest": ("6", "evaluation", "min(scores, key=scores.get)", "max(scores, key=scores.get)"),
    "rarest confusion called the worst": ("6", "evaluation", "sorted(pairs, reverse=True)[:5]", "sorted(pairs)[-5:]"),
    "validation accuracy of the first epoch in 06": ("6", "checkpoints", 'val_accuracy = checkpoint["history"][-1]', 'val_accuracy = checkpoint["history"][0]'),
    "evaluate in train mode": ("6", "evaluation", "    model.eval()\n    return torch.cat", "    model.train()\n    return torch.cat"),
    "axes of the picture swapped": (
        "6",
        "evaluation",
        'left.set(title="Percent of the true class", xlabel="predicted class", ylabel="true class")',
        'left.set(title="Percent of the true class", xlabel="true class", ylabel="predicted class")',
    ),
    "images in the panel of percents": ("6", "evaluation", "sns.heatmap(percent,", "sns.heatmap(1.0 * matrix,"),
    "right answers among the errors": ("6", "evaluation", "errors = matrix - np.diag(matrix.diagonal())", "errors = matrix"),
    "right and wrong answers swapped": ("6", "evaluation", "[confidence[predicted == labels].numpy(), confidence[predicted != labels].numpy()]", "[confidence[predicted != labels].numpy(), confidence[predicted == labels].numpy()]"),
    "right and wrong answers swapped in the legend": ("6", "evaluation", 'label=["right answers", "wrong answers"]', 'label=["wrong answers", "right answers"]'),
    "histogram of 20 bins": ("6", "evaluation", "bins=10, range=(0, 1)", "bins=20, range=(0, 1)"),
    "reliability the wrong way round": ("6", "evaluation", "right.errorbar(sure, share,", "right.errorbar(share, sure,"),
    "error bars without the root in 06": ("6", "evaluation", "yerr=(p * (1 - p) / images) ** 0.5", "yerr=p * (1 - p) / images"),
    "no error in a bin where all are right": ("6", "evaluation", "p = (share * images + 1) / (images + 2)", "p = share"),
    "error samples that are right": ("6", "evaluation", "wrong = (predicted != labels)", "wrong = (predicted == labels)"),
    "least confident errors": ("6", "evaluation", "argsort(descending=True)", "argsort()"),
    "true and predicted class swapped in titles": (
        "6",
        "evaluation",
        "true: {class_names[labels[i]]}",
        "true: {class_names[predicted[i]]}",
        "taken for {class_names[predicted[i]]}",
        "taken for {class_names[labels[i]]}",
    ),
    "confidence shown as the true class's": ("6", "evaluation", "{100 * probabilities[i, labels[i]]:.0f} %", "{100 * confidence[i]:.0f} %"),
    "images beside their titles": ("6", "evaluation", "ax.imshow(images[i].numpy())", "ax.imshow(images[i - 1].numpy())"),
    # Lesson 07
    "autocast around backward": (
        "7",
        "precision",
        "        optimizer.zero_grad()\n",
        "        optimizer.zero_grad()\n        torch.autocast(device.type, torch.bfloat16).__enter__()\n",
        "        scaler.unscale_(optimizer)\n",
        "        torch.autocast(device.type, torch.bfloat16).__exit__(None, None, None)\n        scaler.unscale_(optimizer)\n",
    ),
    "loss in 16 bits": ("7", "precision", "loss = loss_fn(logits, labels)", "loss = loss_fn(logits, labels).to(dtype)"),
    "evaluate in 32 bits": ("7", "precision", "        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # NEW in 07\n", "        if True:\n"),
    "train in 32 bits": ("7", "precision", "        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):\n            logits = model(images)  # calls", "        if True:\n            logits = model(images)  # calls"),
    "weights in 16 bits": ("7", "precision", "    dtype = PRECISIONS[name]\n", "    dtype = PRECISIONS[name]\n    model.to(dtype)\n"),
    "clip without unscale": ("7", "precision", "        scaler.unscale_(optimizer)\n", ""),
    "step without the scaler": ("7", "precision", "scaler.step(optimizer)", "optimizer.step()"),
    "backward without the scaler": ("7", "precision", "scaler.scale(loss).backward()", "loss.backward()"),
    "scaler that is never updated": ("7", "precision", "        scaler.update()", "        pass"),
    "scaler for bfloat16 too": ("7", "precision", "enabled=dtype == torch.float16)", "enabled=dtype != torch.float32)"),
    "scaler missing from the checkpoint": ("7", "precision", '"scheduler": scheduler, "scaler": scaler}', '"scheduler": scheduler}'),
    "arms one after the other": (
        "7",
        "precision",
        "        for epoch in range(1, args.epochs + 1):",
        "        for name in args.precisions:",
        "            for name in args.precisions:\n",
        "            for epoch in range(1, args.epochs + 1):\n",
    ),
    "train a finished epoch again": ("7", "precision", "if len(history) >= last_epoch:", "if len(history) > last_epoch:"),
    "speed of training with validation": ("7", "precision", "val_seconds = time.perf_counter() - start - seconds", "val_seconds = time.perf_counter() - start"),
    "ratio of medians the wrong way round": ("7", "precision", "ratios = [speed / other", "ratios = [other / speed"),
    "gradients that were 0 without rounding": ("7", "precision", "(logits.grad * scale).to(PRECISIONS[name]) == 0", "(logits.grad * scale).to(PRECISIONS[name]) != 0"),
    "steps of 32 bits": ("7", "precision", "kept = weights.to(PRECISIONS[name])", "kept = weights"),
    "moves as large as gradients": ("7", "precision", "moves = lr * torch.cat", "moves = torch.cat"),
    "float16 on the CPU by default": ("7", "precision", '3 if args.device.type == "cuda" else 2', "3"),
    "speed drawn as accuracy": ("7", "precision", '(right, "ImagesPerSecond/train")', '(right, "Accuracy/val")'),
    # Lesson 08
    "patience off by one": ("8", "early_stopping", "self.epoch - self.best_epoch >= self.patience", "self.epoch - self.best_epoch > self.patience"),
    "as good is better": ("8", "early_stopping", "if gain > self.min_delta:", "if gain >= self.min_delta:"),
    "min_delta forgotten": ("8", "early_stopping", "if gain > self.min_delta:", "if gain > 0:"),
    "loss watched as if more were better": ("8", "early_stopping", 'WATCHED = {"Loss/val": "min"', 'WATCHED = {"Loss/val": "max"'),
    "count bad epochs for ever": ("8", "early_stopping", "self.best_epoch, self.best_value = self.epoch, value", "self.best_value = value"),
    "best weights not brought back": ("8", "early_stopping", 'load_checkpoint(folder / "best_model.pth", {"model": model})', 'load_checkpoint(folder / "latest_checkpoint.pth", {"model": model})'),
    "stop by the training accuracy": ("8", "early_stopping", "early_stopping.step(val_acc)", "early_stopping.step(acc)"),
    "stop by the training loss": ("8", "early_stopping", "early_stopping.step(val_acc)", "early_stopping.step(-loss)"),
    "plateau by the loss": ("8", "early_stopping", "scheduler.step(val_acc)", "scheduler.step(val_loss)"),
    "plateau with the wrong mode": ("8", "early_stopping", 'mode="max", factor=0.1', 'mode="min", factor=0.1'),
    "rule missing from the checkpoint": ("8", "early_stopping", '    parts["early_stopping"] = early_stopping', "    pass"),
    "never asked whether to stop": ("8", "early_stopping", "if early_stopping.should_stop():", "if False:"),
    "state that is no copy": ("8", "early_stopping", "return vars(self).copy()", "return vars(self)"),
    "points lost against the last epoch": ("8", "early_stopping", 'best = max(row["Accuracy/val"] for row in history)', 'best = history[-1]["Accuracy/val"]'),
    "accuracy of the epoch of the stop": ("8", "early_stopping", 'accuracy = history[restored - 1]["Accuracy/val"]', 'accuracy = history[(stop or len(history)) - 1]["Accuracy/val"]'),
    "minutes saved as if all were": ("8", "early_stopping", "minutes * (epochs - stop) if stop else 0", "minutes * (epochs - (stop or len(history)))"),
    "stop by the test images": ("8", "early_stopping", "train=False)\n    images, labels = images", "train=True)\n    images, labels = images"),
    "lines at the epochs brought back": ("8", "early_stopping", "x = [stop + 0.1 * number] if stop else []", "x = [restored]"),
    # Lesson 09
    "clip after step": (
        "9",
        "clipping",
        "        norms.append(clip_gradients(parameters, clipping, limit))\n",
        "",
        "        optimizer.step()\n",
        "        optimizer.step()\n        norms.append(clip_gradients(parameters, clipping, limit))\n",
    ),
    "clip before backward": (
        "9",
        "clipping",
        "        norms.append(clip_gradients(parameters, clipping, limit))\n",
        "",
        "        loss.backward()\n",
        "        norms.append(clip_gradients(parameters, clipping, limit))\n        loss.backward()\n",
    ),
    "clip an exhausted generator": (
        "9",
        "clipping",
        "parameters = list(model.parameters())",
        "parameters = model.parameters()",
        "    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])",
        "    norm = nn.utils.get_total_norm([parameter.grad for parameter in list(parameters)])",
    ),
    "norm of nan passed over": ("9", "clipping", "if not math.isfinite(norm)]", "if False]"),
    "nan gradients set to 0": ("9", "clipping", "        return nn.utils.clip_grad_norm_(parameters, limit)\n", "        norm = nn.utils.clip_grad_norm_(parameters, limit)\n        for parameter in parameters:\n            parameter.grad.nan_to_num_()\n        return norm\n"),
    "norm after clipping": ("9", "clipping", "        return nn.utils.clip_grad_norm_(parameters, limit)\n", "        nn.utils.clip_grad_norm_(parameters, limit)\n        return nn.utils.get_total_norm([parameter.grad for parameter in parameters])\n"),
    "limits swapped": ("9", "clipping", 'limit = args.max_value if clipping == "value"', 'limit = args.max_value if clipping == "norm"'),
    "all images faulty": ("9", "clipping", "images[0] *= spoil", "images *= spoil"),
    "a fault in every batch": ("9", "clipping", "if batch % 20 == 3:", "if True:"),
    "danger with BatchNorm always": ("9", "clipping", "batch_norm=batch_norm).to(args.device)", "batch_norm=True).to(args.device)"),
    "rate not multiplied": ("9", "clipping", "lr=factor * args.lr", "lr=args.lr"),
    "no bias without BatchNorm": ("9", "clipping", "bias=not batch_norm", "bias=False"),
    "table of the first epoch": ("9", "clipping", 'results[danger, clipping][0][-1]["Accuracy/val"] for', 'results[danger, clipping][0][0]["Accuracy/val"] for'),
    "norms of the clipped training": ("9", "clipping", 'print_norms(results["none", "none"][1]', 'print_norms(results["none", "norm"][1]'),
    "norms drawn of the clipped training": ("9", "clipping", 'norms = results[danger, "none"][1]', 'norms = results[danger, "norm"][1]'),
    "share below the limit": ("9", "clipping", "norm > max_norm for norm", "norm <= max_norm for norm"),
    # The command line
    "keep the output back": ("123456", "command_line", ", flush=True)", ")"),
    "draw as the terminal does": ("1456", "command_line", 'os.environ["MPLBACKEND"] = "Agg"', ""),
    "count folders instead of looking for src": (
        "123456",
        "command_line",
        'next((folder for folder in Path(__file__).resolve().parents if (folder / "src").is_dir()), Path.cwd())',
        "Path(__file__).resolve().parents[3]",
    ),
    "run in a notebook's cell": ("123456", "command_line", 'if "__file__" not in globals():', "if False:"),
    "a sentence for a reader who has gone": ("123456", "command_line", "    except BrokenPipeError:", "    except ZeroDivisionError:"),
    # Lesson 10
    "BatchNorm of frozen layers in train mode": (["10"], "transfer", "            self.get_submodule(name).eval()\n", "            pass\n"),
    "gradients for frozen layers": (["10"], "transfer", "self.get_submodule(name).requires_grad_(False)", "pass"),
    "frozen layers in the optimizer": (["10"], "transfer", "        if key not in model.frozen\n", ""),
    "freeze by a learning rate of 0": (["10"], "transfer", "    if share == 0:\n", "    if share < 0:\n"),
    "one learning rate for all layers": (["10"], "transfer", "lr if key in new_layers else lr * share", "lr"),
    "whatever fits, with strict=False": (["10"], "transfer", "load_state_dict(source | new)", "load_state_dict(source | new, strict=False)"),
    "take nothing over": (["10"], "transfer", "load_state_dict(source | new)", "load_state_dict(model.state_dict())"),
    "take over the old linear layer too": (["10"], "transfer", 'if key.split(".")[0] in new_layers}', 'if key.split(".")[0] == "fc2"}'),
    "an old class among the new ones": (["10"], "transfer", "(labels >= classes.start) &", "(labels >= classes.start - 1) &", "labels[chosen] - classes.start)", "(labels[chosen] - classes.start).clamp(min=0))"),
    "labels from the validation images": (["10"], "transfer", "draw_labelled(pool, n,", "draw_labelled(new_val_set, n,"),
    "the same images in all draws": (["10"], "transfer", "draw_labelled(pool, n, args.seed + draw)", "draw_labelled(pool, n, args.seed)"),
    "other images for every number of labels": (["10"], "transfer", "draw_labelled(pool, n, args.seed + draw)", "draw_labelled(pool, n, args.seed + draw + n)"),
    "classes of different size in a draw": (["10"], "transfer", "chosen = torch.cat([order[labels[order] == label][:count] for label in labels.unique()])", "chosen = order[: count * len(labels.unique())]"),
    "first weights by chance in every arm": (["10"], "transfer", "    torch.manual_seed(seed)", "    pass"),
    "the same batches in all draws": (["10"], "transfer", "train_on(draw, first_seed + i)", "train_on(draw, first_seed)"),
    "a constant rate for the arms": (["10"], "transfer", "loader, loss_fn, optimizer, args.device, epoch)\n        scheduler.step()\n", "loader, loss_fn, optimizer, args.device, epoch)\n"),
    "measure on the labelled images": (["10"], "transfer", "return evaluate(model, val_loader, args.device)[1]", "return evaluate(model, loader, args.device)[1]"),
    "the last of the old models": (["10"], "transfer", "            if val_acc > best_accuracy:", "            if True:"),
    "features in train mode": (["10"], "transfer", "    model.eval().to(device)\n", "    model.to(device)\n"),
    "BGR": (["10"], "transfer", "model(prepare(to_device(batch, device)))", "model(prepare(to_device(batch.flip(1), device)))"),
    "ImageNet's mean for weights that want another": (["10"], "transfer", "v2.Normalize([127.0] * 3, [128.0] * 3)", "v2.Normalize([123.7, 116.3, 103.5], [58.4, 57.1, 57.4])"),
    "no normalization": (["10"], "transfer", "return model, weights.transforms()", "return model, v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)])"),
    "the backbone's own last layer stays": (["10"], "transfer", "            model.fc = nn.Identity()", "            pass"),
    "open a downloaded pickle": (["10"], "transfer", "check_hash=True, weights_only=True", "check_hash=True"),
    "the backbone's weights not loaded": (["10"], "transfer", 'model.load_state_dict(torch.load(WeightsFile.get_model_file_path(), "cpu", weights_only=True))', "pass"),
    "deviation of a whole population": (["10"], "transfer", "+- {np.std(row, ddof=1):.1f}", "+- {np.std(row):.1f}"),
    "the worst arm as the best": (["10"], "transfer", "np.argmax(draw)", "np.argmin(draw)"),
    "train before the download fails": (["10"], "transfer", "        arms[args.backbone] = make_backbone_arm(args, new_val_set)\n", "        arms[args.backbone] = lambda *draw: make_backbone_arm(args, new_val_set)(*draw)\n"),
    # Lesson 11
    "pictures not turned upright": (["11"], "pictures", "ImageOps.exif_transpose(file)", "file.copy()"),
    "red and blue exchanged": (["11"], "pictures", "np.asarray(ImageOps.fit(picture, (32, 32)))", "np.asarray(ImageOps.fit(picture, (32, 32)))[..., ::-1].copy()"),
    "transparency on black": (["11"], "pictures", 'picture.size, "white")', 'picture.size, "black")'),
    "cut a folder's 16 bits off at 255": (["11"], "pictures", 'if picture.mode.startswith("I;16"):', "if False:"),
    "leave picture files open": (["11"], "pictures", "        with Image.open(path) as file:", "        for file in [Image.open(path)]:"),
    "decode all of a large JPEG": (["11"], "pictures", "            file.draft(None, (64, 64))", "            pass"),
    "squeeze pictures into a square": (["11"], "pictures", "ImageOps.fit(picture, (32, 32))", "picture.resize((32, 32))"),
    "keep copies": (["11"], "pictures", "if content in found:", "if False:"),
    "take hidden files for pictures": (["11"], "pictures", 'if "/." not in f"/{name}"', "if True"),
    "leave files out in silence": (["11"], "pictures", "*reasons[:10]", "*[]"),
    "count broken files as pictures": (["11"], "pictures", "{len(sizes[name]):8,}", "{len(sizes[name]) + len(left_out[name]):8,}"),
    "number the classes backwards": (["11"], "pictures", "in enumerate(classes)}", "in enumerate(classes[::-1])}"),
    "take running numbers for groups": (["11"], "pictures", "in set(groups)).values()) < 5:", "in set(groups)).values()) < 1:"),
    "split by file in both arms": (["11"], "pictures", 'groups if split == "by_group" else pictures.names', "pictures.names"),
    "test on shots of scenes that were trained on": (["11"], "pictures", "cut(range(len(pictures)), groups,", "cut(range(len(pictures)), pictures.names,"),
    "split without classes": (["11"], "pictures", "stratify=stratify", "stratify=None"),
    "the same split for every seed": (["11"], "pictures", "random_state=seed", "random_state=0"),
    "ignore --subset in a folder": (["11"], "pictures", "min(subset, len(part))", "len(part)"),
    "keep workers for all epochs": (["11"], "pictures", "args.workers if args.lazy else 0}", 'args.workers if args.lazy else 0, "persistent_workers": args.lazy}'),
    "test the latest model": (["11"], "pictures", 'load_model(folder / name / "best_model.pth"', 'load_model(folder / name / "latest_checkpoint.pth"'),
    "number a folder's classes anew to predict": (["11"], "pictures", 'look_through(args.predict, checkpoint["class_to_idx"])', "look_through(args.predict)"),
    "resume with other pictures": (["11"], "pictures", "if folder and listed != args.pictures:", "if False:"),
    "resume with other classes": (["11"], "pictures", "not set(classes) <= set(class_to_idx)", "False"),
    "three answers of two classes": (["11"], "pictures", "min(3, len(class_names))", "3"),
    "use a folder that was half written": (["11"], "pictures", 'folder.with_suffix(".unfinished")', "folder"),
    "turned pictures without EXIF": (["11"], "pictures", '.{suffix}", exif=exif)', '.{suffix}")'),
    # Several processes (lesson 12). "call the dead" waits for a timeout of a minute or more: keep it last.
    "leave set_epoch out": (["12"], "distributed", "            sampler.set_epoch(epoch)", "            pass"),
    "leave the seed out of the sampler": (
        ["12"],
        "distributed",
        "DistributedSampler(train_set, seed=args.seed)",
        "DistributedSampler(train_set)",
    ),
    "drop what cannot be shared evenly": (
        ["12"],
        "distributed",
        "DistributedSampler(train_set, seed=args.seed)",
        "DistributedSampler(train_set, seed=args.seed, drop_last=True)",
    ),
    "validate some images twice": (
        ["12"],
        "distributed",
        "Subset(val_set, range(rank, len(val_set), processes))",
        "Subset(val_set, list(DistributedSampler(val_set, shuffle=False)))",
    ),
    "validate everything in each process": (
        ["12"],
        "distributed",
        "range(rank, len(val_set), processes)",
        "range(len(val_set))",
    ),
    "report the figures of one process": (["12"], "distributed", "    dist.all_reduce(sums)", "    pass"),
    "count the images of the whole set": (["12"], "distributed", "len(loader.sampler)", "len(loader.dataset)"),
    "count the speed of one process": (
        ["12"],
        "distributed",
        "len(sampler) * processes / seconds",
        "len(sampler) / seconds",
    ),
    "average no gradients": (
        ["12"],
        "distributed",
        "    ddp_model = DistributedDataParallel(model)\n",
        "    ddp_model = DistributedDataParallel(model)\n    ddp_model.require_backward_grad_sync = False\n",
    ),
    "give each process a whole batch": (["12"], "distributed", "args.batch_size // processes", "args.batch_size"),
    "leave each process its BatchNorm statistics": (
        ["12"],
        "distributed",
        "                dist.broadcast(buffer, src=0)",
        "                pass",
    ),
    "draw the same random numbers in all processes": (
        ["12"],
        "distributed",
        "torch.manual_seed(args.seed + processes * epoch + rank)",
        "torch.manual_seed(args.seed + processes * epoch)",
    ),
    "save in all processes": (
        ["12"],
        "distributed",
        "contextlib.nullcontext()\n    if rank == 0:",
        "contextlib.nullcontext()\n    if True:",
        "            if rank > 0:\n                continue\n",
        "",
    ),
    "save the wrapper's names": (
        ["12"],
        "distributed",
        "{key: part.state_dict() for key, part in parts.items()}, path)",
        '{"model": ddp_model.state_dict(), "optimizer": optimizer.state_dict()}, path)',
    ),
    "print in all processes": (
        ["12"],
        "distributed",
        '        sys.stdout = open(os.devnull, "w")',
        "        pass",
    ),
    "let every process find the data for itself": (
        ["12"],
        "distributed",
        "    name = from_process_0(data[3] if data else None)",
        "    from_process_0(None)",
    ),
    "restore the weights only": (
        ["12"],
        "distributed",
        "for key in parts if checkpoint else []:",
        'for key in ["model"] if checkpoint else []:',
    ),
    "restore process 0 only": (
        ["12"],
        "distributed",
        "for key in parts if checkpoint else []:",
        "for key in parts if checkpoint and rank == 0 else []:",
    ),
    "begin anew after a restart": (
        ["12"],
        "distributed",
        "if path.read_text() == RUN_ID and latest.exists():",
        "if False:",
    ),
    "go on with any run after a restart": (
        ["12"],
        "distributed",
        "if path.read_text() == RUN_ID and latest.exists():",
        "if latest.exists():",
    ),
    "find a restart without a checkpoint": (
        ["12"],
        "distributed",
        "if path.read_text() == RUN_ID and latest.exists():",
        "if path.read_text() == RUN_ID:",
    ),
    "check the weights of a checkpoint only": (
        ["12"],
        "distributed",
        'parts = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}',
        'parts = {"model": model}',
    ),
    "call every error a lost connection": (
        ["12"],
        "distributed",
        'if "by peer" not in str(error):',
        "if False:",
    ),
    "show a lost connection as a traceback": (
        ["12"],
        "distributed",
        'if "by peer" not in str(error):',
        "if True:",
    ),
    "share a batch unevenly": (["12"], "distributed", "if args.batch_size % processes:", "if False:"),
    "leave the group behind": (["12"], "distributed", "    dist.destroy_process_group()", "    pass"),
    "call the dead": (["12"], "distributed", 'if os.environ["GROUP_WORLD_SIZE"] == "1":', "if False:"),
}  # fmt: skip


def numbers_of(lessons):
    """Return the lessons of an entry as a list: "01", "02", ..."""
    return lessons if isinstance(lessons, list) else [f"0{digit}" for digit in lessons]


def mutate(folder, lessons, edits):
    """Make the edits, pairs of a text and its replacement, in these lessons of a copy. Returns those that had them."""
    changed = []
    for path in sorted((folder / LESSONS).glob("[01]*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name[:2] in lessons and all(old in source for old, _ in edits):
            for old, new in edits:
                source = source.replace(old, new)
            compile(source, path.name, "exec")  # a mistake that no lesson would start with proves nothing
            path.write_text(source, encoding="utf-8")
            changed.append(path.name[:2])
    return changed


def run(name, first, all_tests):
    """Run the tests on a copy with this mistake, beginning with the first file or, if it is None, the entry's own.

    Returns the lessons that have the mistake, and the tests that failed.
    """
    lessons, named, *texts = MUTANTS[name]
    lessons = numbers_of(lessons)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in ["src", "tests", "artifacts", "tensor_board"]:
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.pth", "events*", "__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        changed = mutate(folder, lessons, list(zip(texts[::2], texts[1::2], strict=True)))
        missing = [number for number in lessons if number not in changed]
        if missing:
            return [], [f"the text is not in {', '.join(missing)} any more: mend the mutant"]
        tests = [f"tests/test_{file}.py" for file in sorted(FILES, key=lambda file: file != (first or named))]
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
        try:
            process = subprocess.run(
                command + ([] if all_tests else ["-x"]),
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=7200,
            )
        except subprocess.TimeoutExpired:
            return changed, ["none of them, but they did not come to an end within two hours"]
        return changed, re.findall(r"^(?:FAILED|ERROR) tests/test_(\S+)", process.stdout, flags=re.MULTILINE)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="run the mutants whose name this regular expression matches"
    )
    parser.add_argument("--first", choices=FILES, help="the tests to begin with, whatever a mutant names")
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
