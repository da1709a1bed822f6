"""Write the measured figures into the guides: every table between its markers, in both languages.

    python src/benchmarks/tables.py

The figures come from docs/NAME.json, written by src/benchmarks/NAME.py: results, throughput, group_size,
processes, time_to_accuracy (and once more with --epochs 6), recipes. A table stands between <!-- table: NAME -->
and <!-- end of table -->; of the table of lessons only the last two columns are written here.
"""

import json
import os
import re
import statistics

from common import LESSONS, ROOT, machine_in_words, median_and_each

FIGURES = ["results", "throughput", "group_size", "processes"]
FIGURES += ["time_to_accuracy", "time_to_accuracy_6_epochs", "recipes"]
GUIDES = sorted([*ROOT.glob("*.md"), *LESSONS.glob("*.md"), *(ROOT / "docs").glob("*.md")])

CHINESE = {
    "schedule": "调度器",
    "validation accuracy": "验证准确率",
    "gap": "差距",
    "behind the first": "落后第一名",
    " (a tie)": "（视为并列）",
    "{} % on training images": "{}%（训练图片）",
    "{} % on validation images": "{}%（验证图片）",
    "{} % on test images": "{}%（测试图片）",
    "min": "分钟",
    "s": "秒",
    "lesson": "课程",
    "seeds": "种子",
    "time": "时间",
    "peak memory": "内存峰值",
    "accuracy": "准确率",
    "images per second": "每秒图片数",
    "share of the arithmetic limit": "占算力上限的比例",
    "ratio": "比值",
    "median (least to greatest)": "中位数（最小到最大）",
    "images in a group": "每组图片数",
    "mean": "平均",
    "standard error": "标准误",
    "every seed": "各个种子",
    "watches": "看的指标",
    "patience": "耐心值",
    "stops after epoch": "停在第几个 epoch",
    "brings back": "回到第几个 epoch",
    "saved": "节省",
    "lost": "降低",
    "danger": "异常情况",
    "no clipping": "不裁剪",
    "norm clipped": "裁剪范数",
    "values clipped": "裁剪数值",
    "none": "无异常",
    "rate x 4": "学习率 x 4",
    "images x 255": "图片 x 255",
    "images of nan": "图片为 nan",
    "BatchNorm, none": "有 BatchNorm，无异常",
    "BatchNorm, rate x 6": "有 BatchNorm，学习率 x 6",
    "BatchNorm, images x 255": "有 BatchNorm，图片 x 255",
    "random images": "随机图片",
    "JPEG copy of CIFAR-10": "CIFAR-10 的 JPEG 副本",
    ", ": "，",
    "this course, augmented": "本课程，带增强",
    "ceiling: ready-made batches": "上限：现成的批次",
    "usual way": "常见做法",
    "usual way, 2 workers": "常见做法，2 个工作进程",
    "usual way, pooling last": "常见做法，池化在最后",
    "usual way, augmented": "常见做法，带增强",
    "usual way, augmented, 2 workers": "常见做法，带增强，2 个工作进程",
    "speed: this course / ceiling": "速度：本课程 / 上限",
    "speed: this course / usual way": "速度：本课程 / 常见做法",
    "speed: this course / usual way, 2 workers": "速度：本课程 / 常见做法，2 个工作进程",
    "speed: this course / usual way, pooling last": "速度：本课程 / 常见做法，池化在最后",
    "speed, augmented: this course / usual way": "速度，带增强：本课程 / 常见做法",
    "speed, augmented: this course / usual way, 2 workers": "速度，带增强：本课程 / 常见做法，2 个工作进程",
    "time, this course: augmented / plain": "时间，本课程：带增强 / 不带",
    "time, usual way: augmented / plain": "时间，常见做法：带增强 / 不带",
    "time for an image: of {} / of {}": "每张图片的时间：共 {} 张 / 共 {} 张",
    "way": "做法",
    "this course": "本课程",
    "{} %": "{}%",
    "minutes to {} %": "达到 {}% 的分钟数",
    "epochs": "epoch 数",
    "accuracy after them": "那时的准确率",
    "time for an epoch, ratio": "每个 epoch 的时间之比",
    "Keras": "Keras",
    "difference": "差别",
    "lesson 05": "第 05 课",
    "no warm-up": "不预热",
    "warm-up and linear decay": "预热，然后线性下降",
    "half the rate, no warm-up": "学习率减半，不预热",
    "padding 4": "填充 4",
    "alternating flips": "交替翻转",
    "batches of 64, half the rate": "批次大小 64，学习率减半",
    "batches of 256, twice the rate": "批次大小 256，学习率加倍",
    "30 epochs, half the rate, no warm-up, padding 4, rotation always": (
        "30 个 epoch，学习率减半，不预热，填充 4，每次都旋转"
    ),
    "rotation always": "每次都旋转",
    "arm": "实验组",
    "{} images of a class": "每类 {} 张",
    "with augmentation": "带增强",
    "images x 255, norm clipped": "图片 x 255，裁剪范数",
    "new linear layers, 50 images of a class": "只换线性层，每类 50 张",
    "split by group": "按组划分",
    "split": "划分方式",
    "processes": "进程数",
    "threads in each": "每个进程的线程数",
    "ratio to the first row": "与第一行之比",
    "validation": "验证集",
    "test (new scenes)": "测试集（新场景）",
    "Measured on {machines}; data: {data}.": "测量环境：{machines}；数据：{data}。",
    " Of several seeds: the mean ± the standard deviation.": "有多个种子时：平均值 ± 标准差。",
}

# The arms that stand for lessons that are not about the best of their networks
HEADLINES = {"09": "images_x_255_clipping_norm", "10": "new_linear_layers_50", "11": "by_group"}
NAMES = {
    "with_augmentation": "with augmentation",
    "images_x_255_clipping_norm": "images x 255, norm clipped",
    "new_linear_layers_50": "new linear layers, 50 images of a class",
    "by_group": "split by group",
}
DANGERS = ["none", "rate x 4", "images x 255", "images of nan"]
DANGERS += ["BatchNorm, none", "BatchNorm, rate x 6", "BatchNorm, images x 255"]


def words(language):
    """Return a function that says a word in that language, "en" or "zh"."""
    return lambda word: CHINESE[word] if language == "zh" else word


def mean_and_spread(values, digits=2):
    """Return the mean of numbers and, if there are several, their sample standard deviation, as text."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def median_and_range(figures, digits=0):
    """Return what spread() in common.py returned, as text."""
    return f"{figures['median']:,.{digits}f} ({figures['min']:,.{digits}f} - {figures['max']:,.{digits}f})"


def table(header, rows):
    """Return a Markdown table; header and rows hold texts."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def pick(results, number):
    """Return the entries of one lesson, by seed."""
    return sorted((entry for entry in results if entry["lesson"] == number), key=lambda entry: entry["seed"])


def headline(entries, say):
    """Return the accuracy that stands for a lesson, as text: its best arm's, or that of HEADLINES."""
    split = {"01": "train", "06": "test", "11": "test"}.get(entries[0]["lesson"], "val")
    key = f"{split}_accuracy"
    by_arm = {arm: [entry["arms"][arm][key] for entry in entries] for arm in entries[0]["arms"]}
    best = HEADLINES.get(entries[0]["lesson"]) or max(by_arm, key=lambda arm: statistics.mean(by_arm[arm]))
    split_name = {"train": "training", "val": "validation", "test": "test"}[split]
    text = say(f"{{}} % on {split_name} images").format(mean_and_spread(by_arm[best], 1))
    if not best:  # a lesson with a single arm
        return text
    return text + say(", ") + (say(NAMES[best]) if best in NAMES else best)


def duration(entries, say):
    """Return the median time of a lesson's runs as text, "-" if none was timed from start to end."""
    seconds = [entry["seconds"] for entry in entries if entry["seconds"]]
    if not seconds:
        return "-"
    median = statistics.median(seconds)
    return f"{median:.0f} {say('s')}" if median < 100 else f"{median / 60:.0f} {say('min')}"


def fill_lessons(text, results, say):
    """Write time and accuracy into the table of lessons: the last two columns of rows that begin with NN_."""

    def fill(row):
        entries = pick(results, row["number"])
        return f"{row['rest']}| {duration(entries, say)} | {headline(entries, say)} |" if entries else row[0]

    row = r"^(?P<rest>\| `?\[?`?(?P<number>\d\d)[_ ].*?)\|[^|\n]*\|[^|\n]*\|$"
    return re.sub(row, fill, text, flags=re.MULTILINE)


def runs_table(results, say):
    """Return the table of these lessons: accuracy, gap, time, memory, seeds."""
    if not results:
        return "..."  # not measured yet
    rows = []
    for number in sorted({entry["lesson"] for entry in results}):
        entries = pick(results, number)
        arms = list(entries[0]["arms"])
        gaps = [entry["arms"][arms[0]].get("gap") for entry in entries]
        memory = [entry["peak_memory_bytes"] for entry in entries if entry["peak_memory_bytes"]]
        rows.append(
            [
                number,
                headline(entries, say),
                mean_and_spread(gaps, 1) if len(arms) == 1 and None not in gaps else "-",
                duration(entries, say),
                f"{max(memory) / 1e9:.2f} GB" if memory else "-",
                ", ".join(str(entry["seed"]) for entry in entries),
            ]
        )
    return table([say(word) for word in ["lesson", "accuracy", "gap", "time", "peak memory", "seeds"]], rows)


def arms_table(results, number, say):
    """Return the table of a lesson's arms, the best first. A difference inside its own spread is a tie.

    Arms of one seed share their first weights and their batches, so the differences are taken seed by seed.
    """
    entries = pick(results, number)
    if not entries:
        return "..."  # not measured yet
    accuracy = {arm: [entry["arms"][arm]["val_accuracy"] for entry in entries] for arm in entries[0]["arms"]}
    ranking = sorted(accuracy, key=lambda arm: -statistics.mean(accuracy[arm]))
    rows = []
    for arm in ranking:
        behind = [first - own for first, own in zip(accuracy[ranking[0]], accuracy[arm], strict=True)]
        note = mean_and_spread(behind) if arm != ranking[0] else ""
        if note and len(behind) > 1 and statistics.mean(behind) <= statistics.stdev(behind):
            note += say(" (a tie)")
        gaps = [entry["arms"][arm]["gap"] for entry in entries]
        rows.append([f"`{arm}`", mean_and_spread(accuracy[arm]), mean_and_spread(gaps, 1), note])
    first = {"04": "schedule"}.get(number, "arm")
    return table([say(word) for word in [first, "validation accuracy", "gap", "behind the first"]], rows)


def rules_table(results, say):
    """Return the table of lesson 08: what every rule makes of the training of each seed."""
    entries = pick(results, "08")
    if not entries:
        return "..."  # not measured yet
    rows = []
    for rule in entries[0]["arms"][""]["rules"]:
        curve, patience = rule.split()
        found = [entry["arms"][""]["rules"][rule] for entry in entries]
        stops = ", ".join(str(figures["stops_after"] or "-") for figures in found)
        epochs = ", ".join(str(figures["brings_back"]) for figures in found)
        saved = ", ".join(str(figures["saved_epochs"]) for figures in found)
        lost = ", ".join(f"{figures['lost_points']:.2f}" for figures in found)
        rows.append([f"`{curve}`", patience, stops, epochs, saved, lost])
    header = ["watches", "patience", "stops after epoch", "brings back", "saved", "lost"]
    return table([say(word) for word in header], rows)


def clipping_run(danger, clipping):
    """Return the name of the run of lesson 09 that was trained under this danger with this clipping."""
    return f"{danger} clipping {clipping}".replace(" ", "_").replace(",", "")


def clipping_table(results, say):
    """Return the table of lesson 09: validation accuracy in percent by danger and clipping, over the seeds."""
    entries = pick(results, "09")
    if not entries:
        return "..."  # not measured yet
    rows = []
    for danger in DANGERS:
        arms = [clipping_run(danger, clipping) for clipping in ["none", "norm", "value"]]
        cells = [[entry["arms"][arm]["val_accuracy"] for entry in entries] for arm in arms]
        rows.append([say(danger), *(mean_and_spread(cell, 1) for cell in cells)])
    return table([say(word) for word in ["danger", "no clipping", "norm clipped", "values clipped"]], rows)


def transfer_table(results, say):
    """Return the table of lesson 10: validation accuracy in percent by arm and number of images, over all draws."""
    entries = pick(results, "10")
    if not entries:
        return "..."  # not measured yet
    cells = {}
    for run in list(entries[0]["arms"])[1:]:  # the first is the training on the old classes
        arm, count = run.rsplit("_", 1)
        draws = [accuracy for entry in entries for accuracy in entry["arms"][run]["draws"]]
        cells.setdefault(arm, {})[count] = mean_and_spread(draws, 1)
    rows = [[f"`{arm}`", *row.values()] for arm, row in cells.items()]
    counts = [say("{} images of a class").format(count) for count in next(iter(cells.values()))]
    return table([say("arm"), *counts], rows)


def splits_table(results, say):
    """Return the table of lesson 11: what validation promises and new scenes get, in percent, over the seeds."""
    entries = pick(results, "11")
    if not entries:
        return "..."  # not measured yet
    rows = []
    for split in entries[0]["arms"]:
        columns = [
            [entry["arms"][split][key] for entry in entries] for key in ["val_accuracy", "test_accuracy"]
        ]
        rows.append([f"`{split}`", *(mean_and_spread(column, 1) for column in columns)])
    return table([say(word) for word in ["split", "validation", "test (new scenes)"]], rows)


def processes_table(report, say):
    """Return the table of images per second by number of processes, and of the ratio to one process."""
    rows = []
    for way, figures in report["images_per_second"].items():
        ratio = f"{report['ratio'][way]['median']:.2f}"
        rows.append([*way.split(" x "), median_and_range(figures), ratio])
    words = ["processes", "threads in each", "images per second", "ratio to the first row"]
    return table([say(word) for word in words], rows)


def throughput_table(report, say):
    """Return the table of images per second, and of what share of the arithmetic limit that is."""
    rows = []
    for name, figures in report["images_per_second"].items():
        share = f"{report['share_of_arithmetic_limit'][name]['median']:.2f}"
        rows.append([say(name.replace("lesson", "this course")), median_and_range(figures), share])
    return table(["", say("images per second"), say("share of the arithmetic limit")], rows)


def ratios_table(report, say):
    """Return the table of what throughput.py compares."""
    ratios = {say(name.replace("lesson", "this course")): value for name, value in report["ratios"].items()}
    first, *others = report["time_per_image_by_size"]
    for size in others:
        name = say("time for an image: of {} / of {}").format(f"{int(size):,}", f"{int(first):,}")
        ratios[name] = report["time_per_image_by_size"][size]
    rows = [[name, median_and_range(figures, 2)] for name, figures in ratios.items()]
    return table([say("ratio"), say("median (least to greatest)")], rows)


def group_size_table(report, say):
    """Return the table of accuracy by group size."""
    rows = []
    for size, values in report["accuracy"].items():
        error = statistics.stdev(values) / len(values) ** 0.5
        every_seed = ", ".join(f"{value:.2f}" for value in values)
        rows.append([size, say("{} %").format(f"{statistics.mean(values):.2f}"), f"{error:.2f}", every_seed])
    return table([say(word) for word in ["images in a group", "mean", "standard error", "every seed"]], rows)


def time_table(report, say):
    """Return the table of minutes to an accuracy, by way of training: the median and every seed."""
    if not report:
        return "..."  # not measured yet
    rows = []
    for name, figures in report["ways"].items():
        epochs = ", ".join(str(count) for count in figures["epochs"])
        accuracy = say("{} %").format(", ".join(f"{value:.2f}" for value in figures["accuracy"]))
        minutes, ratio = median_and_each(figures["minutes"]), median_and_range(figures["time_per_epoch"], 2)
        rows.append([say(name.replace("lesson", "this course")), minutes, epochs, accuracy, ratio])
    to_goal = say("minutes to {} %").format(f"{report['goal']:g}")
    last = [say(word) for word in ["epochs", "accuracy after them", "time for an epoch, ratio"]]
    return table([say("way"), to_goal, *last], rows)


def recipes_table(report, say):
    """Return the table of lesson 05's augmented arm trained in several ways, compared seed by seed."""
    if not report:
        return "..."  # not measured yet
    rows, first = [], next(iter(report["accuracy"].values()))
    for name, by_seed in report["accuracy"].items():
        values = list(by_seed.values())
        difference = mean_and_spread([by_seed[seed] - first[seed] for seed in by_seed])
        rows.append([say(name), mean_and_spread(values), difference if by_seed != first else ""])
    return table([say(word) for word in ["way", "validation accuracy", "difference"]], rows)


def measured_on(machines, data, say):
    """Return one sentence that names the machines and the data behind a table."""
    names = " / ".join(dict.fromkeys(machine_in_words(machine) for machine in machines))
    data = say(", ").join(say(name) for name in dict.fromkeys(data))
    return say("Measured on {machines}; data: {data}.").format(machines=names, data=data)


def report_on(report, say):
    """Return the sentence that names the machine and the data of one benchmark's report."""
    return measured_on([report["machine"]], [report["data"]], say) if report else "..."  # not measured yet


def runs_on(results, say):
    """Return the sentences that name the machines, the data and the statistic of runs."""
    if not results:
        return "..."
    sentence = measured_on([entry["machine"] for entry in results], [entry["data"] for entry in results], say)
    return sentence + say(" Of several seeds: the mean ± the standard deviation.")


def fill(text, language):
    """Return the text of a guide with all its tables written anew."""
    say = words(language)
    paths = [ROOT / "docs" / f"{name}.json" for name in FIGURES]
    results, throughput, group_size, processes, times, times_6_epochs, recipes = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else None for path in paths
    )
    tables = {
        "lessons": lambda old: fill_lessons(old, results, say),
        "runs": lambda old: runs_table(results, say),
        "runs machine": lambda old: runs_on(results, say),
        "schedulers": lambda old: arms_table(results, "04", say),
        "augmentation": lambda old: arms_table(results, "05", say),
        "precisions": lambda old: arms_table(results, "07", say),
        "rules": lambda old: rules_table(results, say),
        "clipping": lambda old: clipping_table(results, say),
        "transfer": lambda old: transfer_table(results, say),
        "splits": lambda old: splits_table(results, say),
        "processes": lambda old: processes_table(processes, say),
        "processes machine": lambda old: report_on(processes, say),
        "throughput": lambda old: throughput_table(throughput, say),
        "ratios": lambda old: ratios_table(throughput, say),
        "throughput machine": lambda old: report_on(throughput, say),
        "group size": lambda old: group_size_table(group_size, say),
        "recipes": lambda old: recipes_table(recipes, say),
        "recipes machine": lambda old: report_on(recipes, say),
        "time": lambda old: time_table(times, say),
        "time, 6 epochs": lambda old: time_table(times_6_epochs, say),
        "time machine": lambda old: report_on(times, say),
    }
    for number in sorted({path.name[:2] for path in LESSONS.glob("[01]*.py")}):  # on the page of a lesson
        own = pick(results, number)
        tables[f"run {number}"] = lambda old, own=own: runs_table(own, say) + "\n\n" + runs_on(own, say)
        tables[f"machine {number}"] = lambda old, own=own: runs_on(own, say)
    return re.sub(
        r"(<!-- table: (.*?) -->\n)(.*?)(<!-- end of table -->)",
        lambda match: match[1] + tables[match[2]](match[3].rstrip("\n")) + "\n" + match[4],
        text,
        flags=re.DOTALL,
    )


def main():
    for path in GUIDES:
        text = fill(path.read_text(encoding="utf-8"), "zh" if path.name.endswith(".zh-CN.md") else "en")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)


if __name__ == "__main__":
    main()
