"""Write the measurements into the guides: every table between its markers, in both languages.

    python src/benchmarks/tables.py

The numbers come from docs/NAME.json, written by src/benchmarks/NAME.py: results, throughput, processes,
time_to_accuracy (and once more with --epochs 6), recipes. A table stands between <!-- table: NAME --> and
<!-- end of table -->; of the table of lessons only the last two columns are written here.
"""

import os
import re
import statistics
from pathlib import Path

import numpy as np
from common import LESSONS, PATHS, ROOT, machine_in_words, read_json

GUIDES = sorted([*ROOT.glob("*.md"), *LESSONS.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# {name: what the Chinese tables call it}. A longer name is put together from its parts: see words().
CHINESE = read_json(Path(__file__).with_name("chinese.json"))
# The variants that stand for lessons that are not about the best of their networks
HEADLINES = {"09": "images_x_255_norm_50", "10": "fine_tuned_50", "11": "by_group"}
NAMES = {
    "with_augmentation": "with augmentation",
    "images_x_255_norm_50": "images x 255, norm clipped",
    "fine_tuned_50": "fine-tuned, 50 images per class",
    "by_group": "split by group",
}
# The first of these that a lesson has an accuracy of is the one that counts
SPLITS = {"test": "test", "val": "validation", "train": "training"}
# Of lesson 09, as in its DANGERS and its table
DANGERS = ["none", "lr x 4", "images x 255", "images of nan", "BatchNorm, none", "BatchNorm, lr x 6"]
REMEDIES = ["none", "norm 50 %", "norm 90 %", "norm 99 %", "value 50 %", "value 90 %", "value 99 %", "lr / 4"]


def words(language):
    """Return a function that says a name in that language, "en" or "zh"."""

    def say(name):
        if language == "en":
            return name
        return CHINESE.get(name) or "".join(CHINESE[part] for part in re.split(r"(, |: | / | \| )", name))

    return say


ENGLISH = words("en")


def mean_and_spread(values, digits=2):
    """Return the mean of numbers and, if there are several, their sample standard deviation, as text."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def median_and_range(figures, digits=0):
    """Return what spread() in common.py returned, as text."""
    return f"{figures['median']:,.{digits}f} ({figures['min']:,.{digits}f} - {figures['max']:,.{digits}f})"


def listed(values, digits=None):
    """Return all values as text."""
    return ", ".join(str(value) if digits is None else f"{value:.{digits}f}" for value in values)


def median_and_each(values):
    """Return the median and every value as text. None, shown as "-", stands for more than any number."""
    values = [float("inf") if value is None else value for value in values]
    return f"{np.median(values):.1f} ({listed(values, 1)})".replace("inf", "-")


def table(header, rows):
    """Return a Markdown table. header: the names of the columns with " | " between them; rows: lists of texts."""
    first, *others = [f"| {row} |" for row in [header, *map(" | ".join, rows)]]
    return "\n".join([first, "|" + "---|" * len(header.split(" | ")), *others])


def pick(results, number):
    """Return the entries of one lesson, by seed."""
    return sorted([entry for entry in results if entry["lesson"] == number], key=lambda entry: entry["seed"])


def by_variant(entries, metric):
    """Return the metric of every variant, {variant: [a value for every seed]}, of one lesson's entries."""
    return {name: [entry["arms"][name][metric] for entry in entries] for name in entries[0]["arms"]}


def headline(entries, say):
    """Return the accuracy that stands for a lesson, as text: of its best variant, or of that in HEADLINES."""
    metrics = next(iter(entries[0]["arms"].values()))
    split = next(split for split in SPLITS if f"{split}_accuracy" in metrics)
    accuracy = by_variant(entries, f"{split}_accuracy")
    best = HEADLINES.get(entries[0]["lesson"]) or max(
        accuracy, key=lambda name: statistics.mean(accuracy[name])
    )
    text = say(f"{{}} % on {SPLITS[split]} images").format(mean_and_spread(accuracy[best], 1))
    if not best:  # a lesson with a single variant
        return text
    return text + say(", ") + (say(NAMES[best]) if best in NAMES else best)


def duration(seconds, say):
    """Return the median of times in seconds as text, "-" if none was measured. None stands for not measured."""
    seconds = [value for value in seconds if value]
    if not seconds:
        return "-"
    median = statistics.median(seconds)
    return f"{median:.0f} {say('s')}" if median < 100 else f"{median / 60:.0f} {say('min')}"


def fill_lessons(text, results, say):
    """Write time and accuracy into the table of lessons: the last two columns of rows that begin with NN_."""

    def fill(row):
        entries = pick(results, row["number"])
        if not entries:
            return row[0]
        time = duration([entry["seconds"] for entry in entries], say)
        return f"{row['rest']}| {time} | {headline(entries, say)} |"

    row = r"^(?P<rest>\| `?\[?`?(?P<number>\d\d)[_ ].*?)\|[^|\n]*\|[^|\n]*\|$"
    return re.sub(row, fill, text, flags=re.MULTILINE)


def runs_table(results, say):
    """Return the table of these lessons: accuracy, gap, time, memory, seeds."""
    rows = []
    for number in sorted({entry["lesson"] for entry in results}):
        entries = pick(results, number)
        variants = list(entries[0]["arms"])
        gaps = [entry["arms"][variants[0]].get("gap") for entry in entries]
        gap = mean_and_spread(gaps, 1) if len(variants) == 1 and None not in gaps else "-"
        time = duration([entry["seconds"] for entry in entries], say)
        memory = [entry["peak_memory_bytes"] for entry in entries if entry["peak_memory_bytes"]]
        memory = f"{max(memory) / 1e9:.2f} GB" if memory else "-"
        rows.append([number, headline(entries, say), gap, time, memory, listed(e["seed"] for e in entries)])
    return table(say("lesson | accuracy | gap | time | peak memory | seeds"), rows)


def variants_table(entries, say):
    """Return the table of a lesson's variants, the best first.

    Variants of one seed share their initial weights and their batches, so the differences are taken seed by seed.
    One of at most two standard errors of its mean can be chance.
    """
    accuracy, gaps = by_variant(entries, "val_accuracy"), by_variant(entries, "gap")
    first, *others = ranking = sorted(accuracy, key=lambda name: -statistics.mean(accuracy[name]))
    notes = {first: ""}
    for name in others:
        behind = [best - own for best, own in zip(accuracy[first], accuracy[name], strict=True)]
        notes[name] = mean_and_spread(behind)
        if len(behind) > 1 and statistics.mean(behind) <= 2 * statistics.stdev(behind) / len(behind) ** 0.5:
            notes[name] += say(", ") + say("not distinguishable")
    rows = [
        [f"`{name}`", mean_and_spread(accuracy[name]), mean_and_spread(gaps[name], 1), notes[name]]
        for name in ranking
    ]
    header = "schedule" if entries[0]["lesson"] == "04" else "variant"
    return table(say(f"{header} | validation accuracy | gap | behind the first"), rows)


def rules_table(entries, say):
    """Return the table of lesson 08: what every rule makes of the run of each seed."""
    rows = []
    for rule in entries[0]["arms"][""]["rules"]:
        found = [entry["arms"][""]["rules"][rule] for entry in entries]
        stops = listed(figures["stops_after"] or "-" for figures in found)
        epochs, saved = (listed(figures[key] for figures in found) for key in ["best_epoch", "saved_epochs"])
        metric, *settings = rule.split()
        lost = listed([figures["lost_points"] for figures in found], 2)
        rows.append([f"`{metric}`", *settings, stops, epochs, saved, lost])
    header = "metric | patience | min_delta | stops after epoch | best epoch | epochs saved | points lost"
    return table(say(header), rows)


def clipping_run(danger, remedy):
    """Return the name of the run of lesson 09 that was trained under this danger with this remedy."""
    return "_".join(re.findall(r"\w+", f"{danger} {remedy}"))


def clipping_table(entries, say):
    """Return the table of lesson 09: validation accuracy in percent by danger and remedy, over the seeds."""
    accuracy = by_variant(entries, "val_accuracy")
    rows = []
    for danger in DANGERS:
        cells = [mean_and_spread(accuracy[clipping_run(danger, remedy)], 1) for remedy in REMEDIES]
        rows.append([f"`{danger}`", *cells])
    return table(" | ".join([say("danger"), *REMEDIES]), rows)


def transfer_table(entries, say):
    """Return the table of lesson 10: test accuracy in percent by variant and images, over all draws."""
    cells = {}
    for name in entries[0]["arms"]:
        variant, count = name.rsplit("_", 1)
        draws = [accuracy for entry in entries for accuracy in entry["arms"][name]["draws"]]
        cells.setdefault(variant, {})[count] = mean_and_spread(draws, 1)
    rows = [[f"`{variant}`", *row.values()] for variant, row in cells.items()]
    counts = [say("{} images per class").format(count) for count in next(iter(cells.values()))]
    return table(" | ".join([say("variant"), *counts]), rows)


def splits_table(entries, say):
    """Return the table of lesson 11: what validation promises and new scenes get, in percent, over the seeds."""
    val, test = by_variant(entries, "val_accuracy"), by_variant(entries, "test_accuracy")
    rows = [[f"`{split}`", mean_and_spread(val[split], 1), mean_and_spread(test[split], 1)] for split in val]
    return table(say("split | validation | test (new groups)"), rows)


def processes_table(report, say=ENGLISH):
    """Return the table of images per second by number of processes, and of the ratio to one process."""
    rows = []
    for way, figures in report["images_per_second"].items():
        ratio = f"{report['ratio'][way]['median']:.2f}"
        rows.append([*way.split(" x "), median_and_range(figures), ratio])
    return table(say("processes | threads in each | images per second | ratio to the first row"), rows)


def throughput_table(report, say=ENGLISH):
    """Return the table of images per second, and of what share of the arithmetic limit that is."""
    rows = []
    for name, figures in report["images_per_second"].items():
        share = f"{report['share_of_arithmetic_limit'][name]['median']:.2f}"
        rows.append([say(name.replace("lesson", "this course")), median_and_range(figures), share])
    return table(" | " + say("images per second | share of the arithmetic limit"), rows)


def ratios_table(report, say=ENGLISH):
    """Return the table of what throughput.py compares."""
    rows = [
        [say(name.replace("lesson", "this course")), median_and_range(figures, 2)]
        for name, figures in report["ratios"].items()
    ]
    return table(say("ratio | median (least to greatest)"), rows)


def time_table(report, say=ENGLISH):
    """Return the table of minutes to an accuracy, by way of training: the median and every seed."""
    rows = []
    for name, figures in report["ways"].items():
        accuracy = say("{} %").format(listed(figures["accuracy"], 2))
        minutes, ratio = median_and_each(figures["minutes"]), median_and_range(figures["time_per_epoch"], 2)
        way = say(name.replace("lesson", "this course"))
        rows.append([way, minutes, listed(figures["epochs"]), accuracy, ratio])
    to_goal = say("minutes to {} %").format(f"{report['goal']:g}")
    others = say("epochs | accuracy after them | time for an epoch (ratio)")
    return table(f"{say('way')} | {to_goal} | {others}", rows)


def by_recipe(runs, metric):
    """Return {(recipe, learning rate): {seed: metric}} of runs as in docs/recipes.json."""
    found = {}
    for run in runs:
        found.setdefault((run["recipe"], run["lr"]), {})[run["seed"]] = run[metric]
    return found


def recipes_table(runs, say):
    """Return the table of lesson 05's recipe with one thing changed, compared with the first seed by seed."""
    rows, first = [], None
    for (name, _), accuracy in by_recipe(runs, "best_accuracy").items():
        difference = mean_and_spread([accuracy[seed] - first[seed] for seed in accuracy]) if first else ""
        rows.append([say(name), mean_and_spread(accuracy.values()), difference])
        first = first or accuracy
    return table(say("recipe | validation accuracy | difference"), rows)


def optimizers_table(runs, say=ENGLISH):
    """Return the table of accuracy by recipe and learning rate, which recipes.py also prints."""
    rows = [
        [say(name), f"{lr:g}", mean_and_spread(accuracy.values()), listed(accuracy)]
        for (name, lr), accuracy in by_recipe(runs, "best_accuracy").items()
    ]
    return table(say("recipe | learning rate | validation accuracy | seeds"), rows)


def group_size_table(runs, say):
    """Return the table of accuracy after the last epoch by group size."""
    rows = []
    for (name, _), accuracy in by_recipe(runs, "last_accuracy").items():
        values = accuracy.values()
        mean = say("{} %").format(f"{statistics.mean(values):.2f}")
        error = f"{statistics.stdev(values) / len(values) ** 0.5:.2f}"
        rows.append([name.removeprefix("groups of "), mean, error, listed(values, 2)])
    return table(say("images in a group | mean | standard error | every seed"), rows)


def measured_on(entries, say):
    """Return one sentence that names the machines and the data behind a table."""
    machines = " / ".join(dict.fromkeys(machine_in_words(entry["machine"]) for entry in entries))
    data = say(", ").join(dict.fromkeys(say(entry["data"]) for entry in entries))
    return say("Measured on {machines}; data: {data}.").format(machines=machines, data=data)


def runs_on(entries, say):
    """Return the sentences that name the machines, the data and the statistic of runs."""
    return measured_on(entries, say) + say(" Of several seeds, mean ± standard deviation is shown.")


def run_table(entries, say):
    """Return the table of one lesson on its own page, and on what it was measured."""
    return runs_table(entries, say) + "\n\n" + runs_on(entries, say)


def build_tables():
    """Return what belongs between the markers, {name: (function, the measurements that it is given)}."""
    names = ["results", "throughput", "processes", "time_to_accuracy", "time_to_accuracy_6_epochs", "recipes"]
    measured = [read_json(ROOT / "docs" / f"{name}.json", []) for name in names]
    results, throughput, processes, times, times_6_epochs, recipes = measured
    groups = [run for run in recipes if run["recipe"].startswith("groups of")]
    optimizers = [run for run in recipes if run["recipe"].startswith(("SGD", "AdamW"))]
    recipes = [run for run in recipes if run not in groups + optimizers]
    tables = {
        "runs": (runs_table, results),
        "runs machine": (runs_on, results),
        "schedulers": (variants_table, pick(results, "04")),
        "optimizers": (optimizers_table, optimizers),
        "optimizers machine": (measured_on, optimizers),
        "augmentation": (variants_table, pick(results, "05")),
        "precisions": (variants_table, pick(results, "07")),
        "rules": (rules_table, pick(results, "08")),
        "clipping": (clipping_table, pick(results, "09")),
        "transfer": (transfer_table, pick(results, "10")),
        "splits": (splits_table, pick(results, "11")),
        "processes": (processes_table, processes),
        "processes machine": (measured_on, processes and [processes]),
        "throughput": (throughput_table, throughput),
        "ratios": (ratios_table, throughput),
        "throughput machine": (measured_on, throughput and [throughput]),
        "group size": (group_size_table, groups),
        "recipes": (recipes_table, recipes),
        "recipes machine": (measured_on, recipes),
        "time": (time_table, times),
        "time, 6 epochs": (time_table, times_6_epochs),
        "time machine": (measured_on, times and [times]),
    }
    for number in PATHS:  # on the page of a lesson
        tables[f"run {number}"] = (run_table, pick(results, number))
        tables[f"machine {number}"] = (runs_on, pick(results, number))
    return results, tables


def fill(text, language):
    """Return the text of a guide with all its tables written anew."""
    say = words(language)
    results, tables = build_tables()

    def write(match):
        begin, name, old, end = match.groups()
        if name == "lessons":
            return begin + fill_lessons(old, results, say) + end
        function, measurements = tables[name]
        new = function(measurements, say) if measurements else "..."  # not measured yet
        return f"{begin}{new}\n{end}"

    markers = r"(<!-- table: (.*?) -->\n)(.*?)(<!-- end of table -->)"
    return re.sub(markers, write, text, flags=re.DOTALL)


def main():
    for path in GUIDES:
        text = fill(path.read_text(encoding="utf-8"), "zh" if path.name.endswith(".zh-CN.md") else "en")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)


if __name__ == "__main__":
    main()
