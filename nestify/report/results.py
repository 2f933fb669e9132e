"""What Python and notebooks show of a result: one screen of text, or an HTML table. No torch here.

The screens are found by the name of the result's class, because importing the classes would import torch.
"""

import shlex
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nestify.report.batch import batch_screen
from nestify.report.bench import bench_sheets, masked_notes, noise_notes
from nestify.report.compare import Comparison, comparison_notes, comparison_tables
from nestify.report.evaluation import evaluation_notes, evaluation_sheets, gates_table, pick_notes, pick_table
from nestify.report.plan import plan_screen
from nestify.report.scan import scan_screen
from nestify.report.sheet import Column, Sheet
from nestify.report.table import (
    level_word,
    mebibytes,
    quantity,
    report_notes,
    report_table,
    report_title,
    verification_notes,
    verification_table,
)
from nestify.report.text import Screen, render

if TYPE_CHECKING:
    from nestify.compression.compress import Result
    from nestify.demo.write import Demo
    from nestify.evaluation.bench import Bench
    from nestify.evaluation.evaluate import Evaluation
    from nestify.evaluation.pick import Pick
    from nestify.evaluation.verify import Verification
    from nestify.exports.write import Exported, Int8
    from nestify.file.reader import NestedFile
    from nestify.file.slicing import Sliced
    from nestify.file.summary import Report
    from nestify.hub.folder import Card
    from nestify.hub.push import Pushed
    from nestify.model.nested_model import NestedModel

USUAL_SIZE = (100, 40)
"""Columns and lines of a screen that is not a terminal."""


def result_text(result: object) -> str:
    """Return a result as text that fits one screen; what does not fit is counted.

    Texts come from files that are not trusted: characters that are not visible are shown as escape codes.
    """
    columns, rows = shutil.get_terminal_size(USUAL_SIZE)
    lines = render(*result_screen(result), None, width=max(columns, 40)).splitlines()
    room = max(rows - 2, 10)  # for the line with the call, and the next prompt
    if len(lines) > room:
        lines[room - 1 :] = [f"({len(lines) - room + 1} more lines)"]
    return "\n".join(lines)


def result_html(result: object) -> str:
    """Return a result as a part of an HTML page, with every column; all texts are escaped."""
    from nestify.report.html.page import templates  # jinja is only needed here

    screen = result_screen(result)
    template = templates().get_template("result.html.j2")
    return template.render(title=screen.title, sheets=screen.sheets, notes=screen.notes)


def result_screen(result: object) -> Screen:
    """Return title, tables and notes of a result.

    Raises:
        KeyError: if the class of the result has no screen.
    """
    name = next((kind.__name__ for kind in type(result).__mro__ if kind.__name__ in SCREENS), "")
    return SCREENS[name](result)


def _compress_result(result: "Result") -> Screen:
    if result.report is None:
        names = [level.name for level in result.manifest.levels]
        return Screen(f"{result.path}: levels {', '.join(names)}")
    screen = _report(result.report)
    gates = [gates_table(result.gates)] if result.gates else []
    return Screen(screen.title, [*screen.sheets, *gates], [*screen.notes, f"Written: {result.path}"])


def _report(report: "Report") -> Screen:
    sheets = [report_table(report), *bench_sheets(report, report.measured)]
    return Screen(f"{report.path}: {report_title(report)}", sheets, report_notes(report))


def _file(file: "NestedFile") -> Screen:
    from nestify.file.summary import make_report

    return _report(make_report(file))


def _model(model: "NestedModel") -> Screen:
    """Return the levels of a model, with the elements of the weights that can be masked."""
    numbers = range(1, model.n_levels + 1)
    weights = [sum(model.elements(k, name) for name in model.spec.maskable) for k in numbers]
    columns = [
        Column("level", [str(k) for k in numbers]),
        Column("name", list(model.level_names), is_text=True),
        Column("classes", [str(classes or "-") for classes in model.classes]),
        Column("weights", [quantity(count) for count in weights]),
        Column("sparsity", [f"{model.sparsity(k):.4f}" for k in numbers]),
    ]
    size = "x".join(map(str, model.spec.input_size))
    predicts = f"{model.spec.num_classes} classes" if model.spec.num_classes else "backbone"
    title = f"NestedModel of {model.spec.architecture}, {predicts}, input {size}"
    notes = [
        "model(images, level=1) runs a level, model.at_level(1) returns it as a plain model, and "
        "model.network is the full network."
    ]
    return Screen(title, [Sheet(columns)], notes)


def _evaluation(evaluation: "Evaluation") -> Screen:
    notes = [*evaluation_notes(evaluation), *(f"warning: {text}" for text in evaluation.warnings)]
    notes += [f"Saved: {evaluation.saved}"] if evaluation.saved else []
    return Screen(f"{evaluation.path} on {evaluation.data}", evaluation_sheets(evaluation), notes)


def _verification(verification: "Verification") -> Screen:
    return Screen(verification.name, [verification_table(verification)], verification_notes(verification))


def _bench(bench: "Bench") -> Screen:
    measured = (bench.report, bench.measurements)
    notes = masked_notes(*measured) + noise_notes(*measured)
    notes += [f"Saved: {bench.saved}"] if bench.saved else []
    return Screen(f"{bench.path}, {bench.report.architecture}", bench_sheets(*measured), notes)


def _pick(pick: "Pick") -> Screen:
    picked = "no level" if pick.level is None else pick.level.name
    title = f"{pick.path}: {picked} for {', '.join(map(str, pick.limits))}"
    return Screen(title, [pick_table(pick)], pick_notes(pick))


def sliced_lines(done: "Sliced") -> list[str]:
    """Return what slicing or upgrading did, in lines."""
    levels = ", ".join(f"{number} ({name})" for number, name in enumerate(done.levels, start=1))
    read = f"{mebibytes(done.bytes_read)} MiB read from {done.source}"
    if not done.bytes_written:
        return [f"{done.path}: already has levels {levels}, so nothing was written", read]
    return [f"{done.path}: levels {levels}", f"{mebibytes(done.bytes_written)} MiB written, {read}"]


NO_LICENSE = "The card states no licence; give yours with --license ID, as in --license apache-2.0."


def card_lines(done: "Card") -> list[str]:
    """Return what the folder of a repository holds, in lines."""
    levels = ", ".join(f"{number} ({name})" for number, name in enumerate(done.levels, start=1))
    lines = [
        f"{done.folder}: README.md, config.json and {done.file} ({mebibytes(done.bytes)} MiB)",
        f"levels {levels}",
    ]
    return lines if done.options.license else [*lines, NO_LICENSE]


def pushed_lines(done: "Pushed") -> list[str]:
    """Return what was uploaded, and how to use it, in lines."""
    visible = "private" if done.private else "public"
    return [
        f"{done.repo} ({visible}): README.md, config.json and {done.file}, commit {done.commit[:12]}",
        done.url,
        *([] if done.license else [NO_LICENSE]),
        "Next:",
        f"  nestify slice {done.address} --level {level_word(1, done.levels[0])} -o slice.safetensors",
    ]


def demo_lines(done: "Demo") -> list[str]:
    """Return what a page fetches, and how to view it, in lines."""
    pairs = zip(done.levels, done.level_bytes, strict=True)
    fetched = ", ".join(f"{name} {mebibytes(size)} MiB" for name, size in pairs)
    return [
        f"{done.folder}: the page and its files, {mebibytes(done.bytes)} MiB",
        f"In addition to ONNX Runtime, a browser fetches for each level: {fetched}",
        "Next:",
        f"  nestify demo {shlex.quote(str(done.folder))} --serve 8000",
    ]


def exported_notes(done: "Exported") -> list[str]:
    """Return what was exported, how exact it is, and how to load it, in lines."""
    form = f"{done.format}, opset {done.opset}" if done.opset else str(done.format)
    number = "any number of images" if done.batch is None else "1 image"
    batches = f"{number if done.batch in (None, 1) else f'{done.batch} images'} per call"
    lines = [
        f"as {form}, {done.dtype}, {mebibytes(done.bytes)} MiB, {batches}",
        f"Loaded again by {done.checked_by}, its logits differ from the level's by "
        f"{done.max_difference:.1e} of the largest one."
        if done.checked_by
        else "Its logits were not compared, because nothing on this machine runs it. Its stored weights "
        f"differ from the level's by {done.max_difference:.1e} of the largest of each tensor.",
        f"Load it with: {done.load_line}",
    ]
    if done.with_preprocessing:
        size = "any size"
        if done.format == "executorch":
            from nestify.exports.executorch import LARGEST_SIDE

            size = f"at most {LARGEST_SIDE} x {LARGEST_SIDE} pixels"
        lines.append(f"It takes upright pictures, uint8 (batch, height, width, channels), of {size}.")
    if done.int8 is not None:
        lines.extend(_int8_notes(done.int8))
    if done.int8 is not None and done.packed_layers == 0:
        lines.append(
            "No layer is packed: in int8 the engine runs depthwise layers, and large ones of levels that are "
            "made with --pattern 1x4."
        )
    elif done.packed_layers is not None:
        lines.append(
            f"{done.packed_layers} layers are packed for the sparse engine; other programs register its "
            "library, whose path `nestify engine --library` prints."
        )
    elif done.facts.sparsity > 0 and done.format != "coreml":  # which stores them sparse
        zeros = f"{done.facts.sparsity:.1%} of the maskable weights"
        full = "the full level" if done.int8 is None else "the full level in int8"
        lines.append(
            f"It stores and multiplies the zeros ({zeros}), so it is as large and as slow as {full}; gzip "
            "makes the file smaller."
        )
    if done.format == "pt2":
        from torch import __version__ as version

        lines.append(
            f"It was written by torch {version}; torch does not guarantee that other versions can read it."
        )
    return lines


def _int8_notes(int8: "Int8") -> list[str]:
    metric, images = int8.metric, f"on {int8.images:,} images"
    title = metric.title.capitalize() if metric.counts_images else metric.title
    scores = f"{title} {int8.score:.2f} % in int8, {int8.float32_score:.2f} % in float32, {images}"
    if metric.is_comparison:
        scores = f"{title} of int8 with float32: {int8.score:.2f} %, {images}"
    elif int8.agreement is not None:
        scores += f"; both predict the same class for {int8.agreement:.2f} %"
    lines = [
        f"{scores}.",
        f"Ranges of activations are those of {int8.calibration_images} training images.",
    ]
    if int8.float_layers:
        names = ", ".join(int8.float_layers)
        lines.append(f"Layers in float32, because they cost most in int8: {names}.")
    if int8.saturates:
        from nestify.evaluation.runtimes import SATURATES  # loaded where there is such a result

        lines.append(SATURATES)
    return lines


def _sliced(done: "Sliced") -> Screen:
    title, *notes = sliced_lines(done)
    return Screen(title, (), notes)


def _card(done: "Card") -> Screen:
    title, *notes = card_lines(done)
    return Screen(title, (), notes)


def _demo(done: "Demo") -> Screen:
    title, *notes = demo_lines(done)
    return Screen(title, (), notes)


def _pushed(done: "Pushed") -> Screen:
    title, *notes = pushed_lines(done)
    return Screen(title, (), notes)


def _exported(done: "Exported") -> Screen:
    return Screen(f"{done.path}: {done.facts.title}", (), exported_notes(done))


def _comparison(comparison: Comparison) -> Screen:
    here, there = comparison.here.path, comparison.there.path
    notes = comparison_notes(comparison)
    return Screen(f"{here} compared with {there}", comparison_tables(comparison), notes)


SCREENS: dict[str, Callable[[Any], Screen]] = {
    "BatchResult": batch_screen,
    "Bench": _bench,
    "Card": _card,
    "Comparison": _comparison,
    "Demo": _demo,
    "Evaluation": _evaluation,
    "Exported": _exported,
    "NestedFile": _file,
    "NestedModel": _model,
    "Pick": _pick,
    "Plan": plan_screen,
    "Pushed": _pushed,
    "Report": _report,
    "Result": _compress_result,
    "Scan": scan_screen,
    "Sliced": _sliced,
    "Verification": _verification,
}
"""The screen of each class of results, by the name of the class."""
