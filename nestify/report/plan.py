"""A plan as text and as JSON. No torch here."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from nestify.report.sheet import Column, Sheet
from nestify.report.table import class_columns, is_patterned, mebibytes, quantity, size_columns
from nestify.report.text import Screen, render

if TYPE_CHECKING:
    from nestify.schedule.costs import Plan

SCHEMA_VERSION = 1


def plan_text(plan: "Plan", stream: TextIO | None) -> str:
    """Return a plan as text.

    Args:
        plan: plan of a run.
        stream: where the text will be printed; None for a file. If it is a terminal, the text fits its width.
    """
    return render(*plan_screen(plan), stream)


def plan_table(plan: "Plan") -> Sheet:
    """Return the levels of a plan, one row per level."""
    levels = plan.levels
    columns = [
        Column("level", [str(k) for k in range(1, len(levels) + 1)], rank=2),
        Column("name", [level.level.name for level in levels], is_text=True),
        *size_columns([(level.cost.sparsity, level.level.width, level.level.depth) for level in levels]),
        *class_columns([(level.classes, level.class_set) for level in levels]),
    ]
    if any(is_patterned(str(level.level.pattern)) for level in levels):
        patterns = [str(level.level.pattern) if level.cost.sparsity else "-" for level in levels]
        columns.append(Column("pattern", patterns, is_text=True, rank=3))
    columns += [
        Column("non-zero", [quantity(level.cost.nonzero_parameters) for level in levels], rank=1),
        Column("dense MACs", [quantity(level.cost.dense_macs) for level in levels], rank=4),
        Column("effective MACs", [quantity(level.cost.effective_macs) for level in levels], rank=5),
        Column("prefix MiB", [mebibytes(level.prefix_bytes) for level in levels]),
    ]
    shares = [level.latency for level in levels]
    if any(share is not None for share in shares):
        columns.append(
            Column("predicted time", ["-" if share is None else f"{share:.3f}" for share in shares])
        )
    return Sheet(columns)


def _rate_notes(plan: "Plan") -> Iterator[str]:
    """Yield a note on the learning rate of each training."""
    for section, lr in plan.rates.items():
        searched = section in plan.search_steps
        what = "fine-tuning" if section == "finetune" else "the levels"
        why = f", because there are too few steps for {section}.lr = auto" if searched else ""
        yield f"learning rate: {lr:g} for {what}{why}"
    for section, steps in plan.search_steps.items():
        if steps:
            yield f"learning rate: searched in {steps} steps of short trainings ({section}.lr = auto)"


def plan_screen(plan: "Plan") -> Screen:
    """Return what is shown of a plan: its levels, and notes on images, steps and what stays dense."""
    spec = plan.spec
    size = "x".join(map(str, spec.input_size))
    notes = [
        f"images: {plan.train_images} to train on, {plan.val_images} to validate on",
        f"steps: {plan.finetune_steps} of fine-tuning, {plan.steps} of nested training",
    ]
    notes += _rate_notes(plan)
    if plan.maskable and plan.steps:
        notes.append(
            f"sparsity: increases during the first {plan.ramp:.0%} of the nested training"
            if plan.ramp
            else "sparsity: at its target from the first step (schedule.ramp = 0)"
        )
    if plan.seconds is not None and plan.memory_bytes is not None:
        notes.append(
            f"estimate: {plan.seconds / 60:.1f} min of training steps on this machine, without loading and "
            f"validation; {mebibytes(plan.memory_bytes)} MiB of memory for a step"
        )
    if plan.computing:
        notes.append(f"computing: {', '.join(plan.computing)}")
    if plan.dense_layers:
        notes.append(
            f"the pattern does not divide these weights, which stay dense: {', '.join(plan.dense_layers)}"
        )
    if plan.without_rule:
        operators = ", ".join(plan.without_rule)
        notes.append(f"no rule covers these operators, so every level keeps all their channels: {operators}")
    if any(planned.latency is not None for planned in plan.levels):
        notes.append(
            "predicted time: on the sparse engine, over the full level's, for one image on one thread of "
            "this machine"
        )
    if plan.uncounted:
        notes.append(f"MACs do not include these unknown operators: {', '.join(plan.uncounted)}")
    notes += [f"warning: {warning}" for warning in plan.warnings]
    parts = []
    if plan.maskable:
        parts.append(f"{quantity(plan.maskable)} maskable weights in {len(spec.maskable)} layers")
    if plan.channel_groups:
        parts.append(f"{plan.channel_groups} groups of coupled channels")
    if plan.blocks:
        parts.append(f"{plan.blocks} blocks that can be skipped")
    what = ", ".join(parts)
    predicts = f"{spec.num_classes} classes" if spec.num_classes else "backbone"
    title = f"{spec.architecture}, {predicts}, input {size}, {what}"
    return Screen(title, [plan_table(plan)], notes)


def plan_document(plan: "Plan") -> dict[str, Any]:
    """Return a plan as plain JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "architecture": plan.spec.architecture,
        "num_classes": plan.spec.num_classes,
        "input_size": list(plan.spec.input_size),
        "maskable": plan.maskable,
        "channel_groups": plan.channel_groups,
        "blocks": plan.blocks,
        "without_rule": list(plan.without_rule),
        "dense_layers": list(plan.dense_layers),
        "train_images": plan.train_images,
        "val_images": plan.val_images,
        "finetune_steps": plan.finetune_steps,
        "steps": plan.steps,
        **({"search_steps": dict(plan.search_steps)} if plan.search_steps else {}),
        "rates": dict(plan.rates),
        "ramp": plan.ramp,
        "seconds": plan.seconds,
        "memory_bytes": plan.memory_bytes,
        "uncounted": dict(plan.uncounted),
        "warnings": list(plan.warnings),
        **({"computing": list(plan.computing)} if plan.computing else {}),
        "levels": [
            {
                "level": k,
                "name": planned.level.name,
                "width": planned.level.width,
                "depth": planned.level.depth,
                "classes": planned.classes,
                "class_set": planned.class_set,
                "sparsity": planned.cost.sparsity,
                "pattern": str(planned.level.pattern),
                "parameters": planned.cost.parameters,
                "nonzero_parameters": planned.cost.nonzero_parameters,
                "dense_macs": planned.cost.dense_macs,
                "effective_macs": planned.cost.effective_macs,
                "prefix_bytes": planned.prefix_bytes,
                **({} if planned.latency is None else {"predicted_latency": planned.latency}),
            }
            for k, planned in enumerate(plan.levels, start=1)
        ],
    }
