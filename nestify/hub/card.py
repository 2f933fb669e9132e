"""The model card of a nested file: README.md of a repository on the hub. Does not import torch.

Everything in it is in the file, is stored next to it, or was given by the user; nothing is guessed. Names in
a file are untrusted: YAML is written by a YAML library, and Markdown shows them as they are.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from nestify.file.class_accuracy import read_class_accuracy
from nestify.file.reader import NestedFile
from nestify.file.summary import Report
from nestify.hub.card_options import CardOptions
from nestify.hub.markdown import fenced, literal
from nestify.recipe.metric import MAP, TOP1, metric_of
from nestify.report.bench import bench_sheets, noise_notes
from nestify.report.html.by_class import worst_classes
from nestify.report.sheet import Column, Sheet, settings
from nestify.report.table import level_word, report_notes, report_table
from nestify.text import printable

PLACEHOLDER = "OWNER/REPO"
"""Stands for the repository in the commands of a card, as long as it is not known."""

MOST_CLASSES = 100
"""Number of class names that a card lists."""

WORST_CLASSES = 5
"""Number of classes of each level in the table of the worst ones."""

RESULTS = {
    TOP1: ("accuracy", "Top-1 accuracy"),
    MAP: ("mean_average_precision", "Mean average precision"),
}
"""The hub's type, and the name, of each metric that says how good a level is."""

UNSET = ("null", "[]", "{}")
"""Values of options that were not given, which a card leaves out."""


def card_text(file: NestedFile, report: Report, name: str, sha256: str, options: CardOptions) -> str:
    """Return the model card: YAML metadata, and Markdown.

    Args:
        file: the nested file.
        report: its report, with the measurements next to it.
        name: name of the file in the repository.
        sha256: SHA-256 of the whole file, in hexadecimal.
        options: what the user says about it.
    """
    sections = [
        f"# {literal(_title(name))}\n\n{_introduction(report)}",
        f"## Levels\n\n{_levels(file, report)}",
        f"## Use\n\n{_use(report, name, options)}",
        f"## Preprocessing\n\n{_preprocessing(file)}",
        f"## Classes\n\n{_classes(file, report)}",
        f"## How it was made\n\n{_making(file, report)}",
        f"## Limits\n\n{_limits(report)}",
        f"## Hashes\n\n{_hashes(file, report, name, sha256)}",
        f"## Licence\n\n{_licence(options)}",
    ]
    return f"---\n{_metadata(report, name, options)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _title(name: str) -> str:
    return name.removesuffix(".safetensors").removesuffix(".nested")


def _metadata(report: Report, name: str, options: CardOptions) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    metric = report.metric
    dataset = options.dataset or PurePosixPath(str(report.recipe.get("data", {}).get("path", ""))).name
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=options.dataset or "imagefolder",
            dataset_name=printable(dataset) or "images",
            metric_type=RESULTS[metric][0],
            metric_name=printable(f"{RESULTS[metric][1]} of level {level.level} ({level.name})"),
            metric_value=round(level.score / 100, 4),
        )
        for level in report.levels
        if metric in RESULTS and level.score is not None
    ]
    task = "image-classification" if report.num_classes else "image-feature-extraction"
    data = ModelCardData(
        library_name="nestify",
        pipeline_tag=task,
        license=options.license,
        base_model=options.base_model,
        datasets=options.dataset,
        metrics=[RESULTS[metric][0]] if results else None,
        tags=[task, "timm", "nestify", "nested-network", "model-compression"],
        model_name=printable(_title(name)) if results else None,
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text


def _introduction(report: Report) -> str:
    count = len(report.levels)
    are = "One network" if count == 1 else f"{count} networks of different size"
    return (
        f"{are} in one file, made by nestify from `timm`'s model {literal(report.architecture)}. Each level "
        "contains all weights of the levels below it, and is a prefix of the file's bytes: a device "
        "downloads the bytes of its level and no more."
    )


def _sheets(sheets: Sequence[Sheet], notes: Sequence[str] = ()) -> str:
    """Return tables and notes as paragraphs."""
    return "\n\n".join([*(sheet.markdown(literal) for sheet in sheets), *map(literal, notes)])


def _levels(file: NestedFile, report: Report) -> str:
    sheets = [report_table(report), *bench_sheets(report, report.measured)]
    saved = read_class_accuracy(file).accuracy
    rows = [
        (level.level, bar.name, bar.text)
        for level in (worst_classes(report, saved) if saved else ())
        for bar in level.bars[:WORST_CLASSES]
    ]
    if rows and saved:
        levels, names, texts = zip(*rows, strict=True)
        columns = [
            Column("level", levels, is_text=True),
            Column("class", names, is_text=True),
            Column("predicted correctly", texts),
        ]
        sheets.append(Sheet(columns, f"The classes that each level predicts worst, on {saved.data}"))
    return _sheets(sheets, report_notes(report) + noise_notes(report, report.measured))


def _use(report: Report, name: str, options: CardOptions) -> str:
    address = f"hf://{options.repo or PLACEHOLDER}/{name}"
    core, full = (level_word(level.level, level.name) for level in (report.levels[0], report.levels[-1]))
    shell = ["pip install nestify", ""]
    shell.append(f"nestify slice {shlex.quote(address)} --level {core} -o {core}.safetensors")
    if len(report.levels) > 1:
        upgrade = f"--level {full} --upgrade {core}.safetensors"
        shell += [
            "# later, only the bytes that are missing:",
            f"nestify slice {shlex.quote(address)} {upgrade}",
        ]
    shell += [
        "# a plain model, with pip install 'nestify[onnx]':",
        f"nestify export {shlex.quote(address)} --level {core} -o {core}.onnx",
    ]
    load = f'model = nestify.load("{address}", level="{core}")  # an ordinary torch module'
    return "\n\n".join([fenced("bash", "\n".join(shell)), fenced("python", f"import nestify\n\n{load}")])


def _preprocessing(file: NestedFile) -> str:
    given = file.manifest.model.preprocessing
    values = {
        "input size (channels, height, width)": " x ".join(map(str, given.input_size)),
        "mean, for pixels in [0, 1]": ", ".join(f"{value:g}" for value in given.mean),
        "standard deviation": ", ".join(f"{value:g}" for value in given.std),
        "interpolation": given.interpolation,
        "share of the image that is kept (crop_pct)": f"{given.crop_pct:g}",
        "crop mode": given.crop_mode,
        "turned upright by EXIF orientation": "yes" if given.exif_orientation else "no",
    }
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    arguments = ",\n".join(f"    {name}={_python(getattr(given, name))}" for name in names)
    mode = "L" if given.input_size[0] == 1 else "RGB"
    is_backbone = file.manifest.model.output != "logits"
    likely = ".sigmoid()[0]" if metric_of(file.manifest.levels[-1].metrics) is MAP else ".softmax(-1)[0]"
    name, then = ("features", "") if is_backbone else ("scores", likely)
    turned = [
        'image = Image.open("photo.jpg")',
        "image = ImageOps.exif_transpose(image)" if given.exif_orientation else "",
        f'{name} = model(transform(image.convert("{mode}")).unsqueeze(0)){then}',
    ]
    lines = [
        f"import timm\nfrom PIL import Image{', ImageOps' * given.exif_orientation}\n",
        f"transform = timm.data.create_transform(\n{arguments},\n)",
        *filter(None, turned),
    ]
    return f"{_sheets([_pairs('what', 'value', values.items())])}\n\n{fenced('python', chr(10).join(lines))}"


def _python(value: object) -> str:
    """Return a value as a literal of Python, in ASCII."""
    return ascii(tuple(value) if isinstance(value, list) else value)


def _pairs(left: str, right: str, rows: Any) -> Sheet:
    keys, values = zip(*rows, strict=True)
    return Sheet([Column(left, keys, is_text=True), Column(right, values, is_text=True)])


def _classes(file: NestedFile, report: Report) -> str:
    """Return the names of the classes of each set that a level predicts."""
    paragraphs = []
    for first in {level.class_set: level for level in reversed(report.levels)}.values():
        same = [level for level in report.levels if level.class_set == first.class_set]
        which = "" if len(same) == len(report.levels) else f" ({_listed(level.name for level in same)})"
        names = file.manifest.class_names(first.level)
        if names is None:
            counted = f"{first.classes} classes{which}, without names."
            paragraphs.append(counted if first.classes else _outputs(file))
            continue
        more = len(names) - MOST_CLASSES
        rest = f", and {more} more, which are in config.json" if more > 0 else ""
        listed = ", ".join(map(literal, names[:MOST_CLASSES]))
        paragraphs.append(f"{first.classes} classes{which}: {listed}{rest}.")
    return "\n\n".join(reversed(paragraphs))


def _outputs(file: NestedFile) -> str:
    """Say what a backbone returns."""
    model = file.manifest.model
    layout = "height, width, channels" if model.channels_last else "channels, height, width"
    if model.output == "embedding":
        return "None: the model is a backbone, and returns one embedding per image."
    strides = ", ".join(map(str, model.feature_reductions))
    return (
        f"None: the model is a backbone. It returns a list of feature maps (images, {layout}), with one "
        f"position per {strides} pixels in each direction."
    )


def _listed(names: Iterator[str]) -> str:
    return ", ".join(map(literal, names))


def _making(file: NestedFile, report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [f"- Schedule: {report.schedule}", f"- Seed: {report.seed}", f"- Versions: {literal(versions)}"]
    if report.source_sha256:
        lines.append(f"- SHA-256 of the checkpoint that it was made from: `{report.source_sha256}`")
    if (held := file.manifest.held_out) is not None:
        of_each = "" if held.unlabelled else " of each class"
        lines.append(
            f"- Validation images: {held.share:.0%}{of_each}, held out of {held.images} images of the split "
            f"{literal(held.split)}"
        )
    if report.added_levels:
        lines.append(f"- Levels that were added later: {_listed(iter(report.added_levels))}")
    given = [(key, _without_folders(value)) for key, value in settings(report.recipe) if value not in UNSET]
    table = _sheets([_pairs("option", "value", given)]) if given else "none"
    summary = "Recipe: all options, paths without their folders"
    return "\n".join(lines) + f"\n\n<details>\n<summary>{summary}</summary>\n\n{table}\n\n</details>"


def _without_folders(value: str) -> str:
    """Return a value without the folders of a path, which say something about the machine of the run."""
    if value.startswith(("hf-hub:", "[", "{")):
        return value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _limits(report: Report) -> str:
    counts = sorted({level.images for level in report.levels if level.images})
    lines = _limits_of_classes(report) if report.num_classes else []
    if counts:
        images = " or ".join(f"{count:,}" for count in counts)
        lines.append(
            f"- The scores were measured on {images} validation images; on other images they can be lower."
        )
    elif report.num_classes:
        lines.append("- The file holds no accuracies: no validation images were evaluated.")
    if any(level.sparsity > 0 for level in report.levels):
        lines.append(
            "- Sparse levels are smaller to store and to download. They are faster only on nestify's sparse "
            "engine."
        )
    return "\n".join(lines)


def _limits_of_classes(report: Report) -> list[str]:
    if report.metric is MAP:
        return [
            "- An image may have several of the labels above, or none.",
            "- The outputs are logits; a sigmoid of them is not a calibrated probability.",
        ]
    return [
        "- Every image gets one of the classes above, whatever it shows.",
        "- The outputs are logits; a softmax of them is not a calibrated probability."
        if all(level.temperature is None for level in report.levels)
        else "- The outputs are logits; divide them by the temperature in config.json before a softmax.",
    ]


def _hashes(file: NestedFile, report: Report, name: str, sha256: str) -> str:
    rows = [(name, f"{report.file_bytes:,}", sha256)]
    rows += [
        (f"bytes of level {number} ({level.name})", f"{level.data_bytes:,}", level.sha256)
        for number, level in enumerate(file.manifest.levels, start=1)
    ]
    what, sizes, hashes = zip(*rows, strict=True)
    columns = [Column("what", what, is_text=True), Column("bytes", sizes), Column("SHA-256", hashes)]
    note = "nestify slice checks the hash of every level that it copies, and nestify verify checks all."
    return _sheets([Sheet(columns)], [note])


def _licence(options: CardOptions) -> str:
    if options.license is None:
        return "None is stated. Look up the licence of the model that this file was made from."
    return f"{literal(options.license)}, as stated by whoever published this file."
