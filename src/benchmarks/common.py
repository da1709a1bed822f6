"""What the benchmarks share: a lesson as a module, the curves of a run, timing, the name of the machine."""

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds src/, docs/ and artifacts/
LESSONS = ROOT / "src" / "experiments" / "model_train"


def load_lesson(number):
    """Import a lesson, "01" to "12", from its file; its name begins with a digit, so `import` cannot."""
    path = next(LESSONS.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(f"lesson_{number}", path)
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def read_scalars(run_dir):
    """Return the curves of one TensorBoard run: {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def write_json(path, content):
    """Write a dict or list into a file in one step, so that a crash cannot leave half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def run_script(main, *errors):
    """Run main() of a benchmark. Ctrl-C ends it with status 130, an OSError or one of these with its sentence."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, *errors) as error:
        sys.exit(str(error))


def whole_number(text):
    """Let argparse read a whole number from 1 to 50,000, the number of training images in CIFAR-10."""
    if not 1 <= int(text) <= 50_000:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 50,000")
    return int(text)


def measure(tasks, rounds):
    """Time all tasks in turn. tasks: {name: function}. Returns seconds as {name: array (rounds,)}."""
    seconds = {name: [] for name in tasks}
    with tqdm(total=(rounds + 1) * len(tasks), desc="warming up", disable=None) as progress:
        for number in range(rounds + 1):
            for name, task in tasks.items():
                start = time.perf_counter()
                task()
                if number > 0:  # round 0 starts workers and fills caches
                    seconds[name].append(time.perf_counter() - start)
                progress.update()
            progress.set_description(f"round {number} of {rounds}")
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values):
    """Return median, least and greatest of an array as a dict of plain numbers."""
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def in_words(figures, digits):
    """Return a dict from spread() as text."""
    return f"{figures['median']:,.{digits}f} ({figures['min']:,.{digits}f} to {figures['max']:,.{digits}f})"


def median_and_each(values):
    """Return the median and every value as text. None, shown as "-", stands for more than any number."""
    values = [float("inf") if value is None else value for value in values]
    median, *each = [
        "-" if value == float("inf") else f"{value:.1f}" for value in [np.median(values), *values]
    ]
    return f"{median} ({', '.join(each)})"


def describe_machine():
    """Return what the figures depend on, in words and plain numbers: processor, cores, versions."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux knows the name of the processor, but Python does not ask there
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":")[1].strip() if lines else processor
    return {
        "processor": processor or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # the widest PyTorch uses here: AVX2, ...
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "torchvision": torchvision.__version__.split("+")[0],
    }


def machine_in_words(machine):
    """Return one line about a machine that describe_machine() described."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}, {machine['system']}, "
        f"Python {machine['python']}, torch {machine['torch']}, torchvision {machine['torchvision']}"
    )
