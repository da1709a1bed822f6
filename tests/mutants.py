"""Measure how many small mistakes the tests find: change the lessons at random, one place at a time, and run the tests.

    python tests/mutants.py                             # 120 mutants, which takes hours
    python tests/mutants.py --mutants 10 --lessons 03   # a few, in the functions of lesson 03

A mutant changes one node of a function's syntax tree: a comparison, an operator, a number, a condition, a slice or a
keyword argument, or it leaves out a statement. It does so in all lessons that have the same function, and runs their
tests. A mutant that survives is worth a look: a test may be missing, or the change may make no difference.
"""

import argparse
import ast
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSONS = Path("src/experiments/model_train")
NUMBERS = [path.name[:2] for path in sorted((ROOT / LESSONS).glob("[01]*.py"))]
TESTS_OF_ALL = ["smoke", "training", "data", "command_line"]
TIMEOUT = 900  # seconds, because a mutant may wait forever
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
LIBRARIES = "torch.utils.tensorboard torchvision.transforms.v2 sklearn.metrics seaborn".split()
SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.In: ast.NotIn, ast.And: ast.Or}
SWAPS |= {ast.Add: ast.Sub, ast.Mult: ast.Div}
SWAPS |= {new: old for old, new in SWAPS.items()} | {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
OTHER = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value * 1.5}
# Keyword arguments and calls that decide how something looks, which a test cannot judge
LOOKS = "alpha annot axis capsize cmap color desc disable dpi figsize fontsize grid help indent label layout".split()
LOOKS += "leave legend linestyle linewidth marker suptitle textcoords width xytext".split()


def walk(node):
    """Yield a node and all nodes below it, except those that decide how something looks."""
    call = node.value if isinstance(node, ast.Expr) else node
    name = getattr(getattr(call, "func", None), "attr", getattr(node, "arg", None))
    if name not in LOOKS:
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)


def mistakes(node):
    """Yield changes of a node's fields, {field: value}, each of which is one mistake."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield {"ops": [SWAPS[type(node.ops[0])](), *node.ops[1:]]}
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
        yield {"op": SWAPS[type(node.op)]()}
    if isinstance(node, ast.Constant) and type(node.value) in OTHER:
        yield {"value": OTHER[type(node.value)](node.value)}
    if isinstance(node, (ast.If, ast.IfExp)):
        yield {"test": ast.UnaryOp(ast.Not(), node.test)}
    if isinstance(node, ast.Slice):
        yield {"lower": None, "upper": None, "step": None}
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg not in LOOKS:
                yield {"keywords": [other for other in node.keywords if other is not keyword]}
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if getattr(node.value.func, "id", None) != "print":
            yield {"value": ast.Constant(...)}  # a statement that does nothing


def find_mutants(numbers):
    """Return the mutants of all functions in these lessons: (name, {lesson: text of the function}, mutated text)."""
    found = {}  # {code without comments: (syntax tree, {lesson: text})}
    for path in sorted((ROOT / LESSONS).glob("[01]*.py")):
        source = path.read_text(encoding="utf-8")
        for function in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]:
            text = ast.get_source_segment(source, function, padded=True)
            function.decorator_list = []  # they stand above the text, and stay there
            found.setdefault(ast.unparse(function), (function, {}))[1][path.name[:2]] = text
    mutants = {}
    for code, (function, texts) in found.items():
        for node in list(walk(function)) if texts.keys() & set(numbers) else []:
            for fields in mistakes(node):
                saved = {name: getattr(node, name) for name in fields}
                vars(node).update(fields)
                mutated = ast.unparse(function)
                vars(node).update(saved)
                lines = zip(code.splitlines(), mutated.splitlines(), strict=False)
                change = next((f"{a.strip()}  ->  {b.strip()}" for a, b in lines if a != b), None)
                if change:
                    new = textwrap.indent(mutated, " " * function.col_offset)
                    mutants[code, mutated] = (f"{function.name}: {change}", texts, new)
    return list(mutants.values())


def run_tests(folder, files):
    """Run test files in a copy of the project until one fails. The process ends with pytest's status."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, with the processes that the tests start
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # some tests send it; a background process ignores it
    os.chdir(folder)
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = importlib.import_module("pytest").main(
        ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", *files]
    )
    sys.stdout.flush()
    os._exit(status)


def is_killed(mutant):
    """Run the tests on a copy of the project with this mistake. Print the verdict, and return whether one fails."""
    name, texts, new = mutant
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ignored = shutil.ignore_patterns(".*", "data", "quick", "*.pth", "events.*", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
        for path in Path(folder, LESSONS).glob("[01]*.py"):
            if path.name[:2] in texts:
                source = path.read_text(encoding="utf-8")
                path.write_text(source.replace(texts[path.name[:2]], new), encoding="utf-8")
        own, shared = (
            [f"test_{number}_*.py" for number in texts],
            [f"test_{name}.py" for name in TESTS_OF_ALL],
        )
        patterns = own + shared if len(texts) == 1 else shared + own  # the most likely to fail come first
        files = [str(path) for pattern in patterns for path in sorted(Path(folder, "tests").glob(pattern))]
        process = CONTEXT.Process(target=run_tests, args=(folder, files))
        process.start()
        try:
            process.join(TIMEOUT)
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.join()
        output = Path(folder, "output.txt").read_text(errors="replace")
    failed = " ".join(re.findall(r"^(?:FAILED|ERROR) .*?tests/(\S+)", output, flags=re.MULTILINE))
    print(
        "KILLED  " if process.exitcode else "SURVIVED", ", ".join(texts), name, failed, sep=" | ", flush=True
    )
    return process.exitcode != 0


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mutants", type=int, default=120, help="how many to draw")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the draw")
    parser.add_argument(
        "--lessons", nargs="+", choices=NUMBERS, default=NUMBERS, help="whose functions to change"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants to try at a time")
    args = parser.parse_args()
    mutants = find_mutants(args.lessons)
    drawn = random.Random(args.seed).sample(mutants, min(args.mutants, len(mutants)))
    print(f"{len(drawn)} of {len(mutants)} mutants, seed {args.seed}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
    for library in LIBRARIES:
        importlib.import_module(library)  # a forked process has it at once
    with ProcessPoolExecutor(args.jobs, mp_context=CONTEXT) as pool:
        if pool.submit(is_killed, ("no mistake", dict.fromkeys(args.lessons, ""), "")).result():
            sys.exit("The tests fail without any mistake.")
        killed = list(pool.map(is_killed, drawn))

    from scipy.stats import binomtest

    interval = binomtest(sum(killed), len(drawn)).proportion_ci(0.95, method="wilson")
    share = f"{sum(killed)} of {len(drawn)}, {100 * sum(killed) / len(drawn):.0f} %"
    print(
        f"Killed: {share} (95 % confidence interval {100 * interval.low:.0f} to {100 * interval.high:.0f} %)"
    )
    survivors = [
        f"{', '.join(texts)}: {name}"
        for (name, texts, _), dead in zip(drawn, killed, strict=True)
        if not dead
    ]
    print("Survivors:", *survivors, sep="\n  ")


if __name__ == "__main__":
    main()
