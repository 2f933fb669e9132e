"""Tables and notes of latencies, from made-up measurements."""

from dataclasses import replace
from typing import Any

from nestify.file.measurements import LevelLatency, Machine, Measurement
from nestify.file.summary import LevelReport, Report
from nestify.report.bench import bench_document, bench_sheets, engine_notes, masked_notes, noise_notes

CPU = Machine(cpu="A CPU", cores=2, device="cpu", device_name="A CPU", system="Linux x86_64", torch="2.6.0")
GPU = CPU.model_copy(update={"device": "cuda", "device_name": "A GPU"})


def report(*shares: tuple[float, float]) -> Report:
    """Build a report of levels with these sparsities and widths."""
    levels = [
        LevelReport(
            level=k,
            name=f"size-{k}",
            sparsity=sparsity,
            width=width,
            depth=1.0,
            skipped=[],
            pattern="unstructured",
            parameters=10,
            nonzero_parameters=10,
            dense_macs=int(1000 * width**2),
            effective_macs=None,
            prefix_bytes=10,
            top1=None,
            top5=None,
            loss=None,
            images=None,
            top1_before=None,
            classes=2,
            class_set="",
            layers=[],
        )
        for k, (sparsity, width) in enumerate(shares, start=1)
    ]
    return Report("file", "resnet", 2, (3, 8, 8), "combined", 10, 10, {}, {}, levels, {})


def measurement(*ratios: tuple[float, float, float], machine: Machine = CPU, **changes: Any) -> Measurement:
    """Build a measurement from each level's ratio and its quartiles; the full level takes 20 ms."""
    levels = [
        LevelLatency(
            level=k,
            name=f"size-{k}",
            median_seconds=0.02 * ratio,
            p95_seconds=0.2 * ratio,
            over_full=ratio,
            over_full_quartiles=(first, third),
        )
        for k, (ratio, first, third) in enumerate(ratios, start=1)
    ]
    facts = {"threads": 1, "batch_size": 4, "dtype": "float32", "rounds": 10, "date": "2026-01-31T12:00:00Z"}
    return Measurement(machine=machine, levels=levels, **{**facts, **changes})


FULL = (1.0, 1.0, 1.0)
NARROW = report((0.0, 0.5), (0.0, 1.0))


def test_a_row_per_level() -> None:
    [sheet] = bench_sheets(NARROW, [measurement((0.25, 0.2, 0.31), FULL)])
    assert sheet.title == (
        "Measured on A CPU, 2 cores, Linux x86_64: 1 thread, float32, torch 2.6.0, 10 rounds, 2026-01-31"
    )
    assert {column.title: column.cells for column in sheet.columns} == {
        "level": ["1", "2"],
        "name": ["size-1", "size-2"],
        "batch": ["4", "4"],
        "median ms": ["5.00", "20.0"],
        "p95 ms": ["50.0", "200"],
        "images/s": ["800", "200"],
        "dense MACs over full": ["0.250", "1.000"],
        "latency over full": ["0.250", "1.000"],
        "quartiles of ratio": ["0.200-0.310", "-"],
    }
    document = bench_document(NARROW, measurement((0.25, 0.2, 0.31), FULL))
    assert [level["images_per_second"] for level in document["levels"]] == [800, 200]
    assert [level["dense_macs_over_full"] for level in document["levels"]] == [0.25, 1]


def test_a_table_per_machine() -> None:
    made = [
        measurement(FULL, FULL, batch_size=16, rounds=7),
        measurement(FULL, FULL, machine=GPU),
        measurement(FULL, FULL, batch_size=16, threads=2, date="2026-02-01T00:00:00Z"),
        measurement(FULL, FULL, batch_size=2, dtype="bfloat16"),
    ]
    sheets = bench_sheets(NARROW, made)
    assert [sheet.title for sheet in sheets] == [
        "Measured on A CPU, 2 cores, Linux x86_64: 1 thread, bfloat16, torch 2.6.0, 10 rounds, 2026-01-31",
        "Measured on A CPU, 2 cores, Linux x86_64: float32, torch 2.6.0, 7 to 10 rounds, "
        "2026-01-31 to 2026-02-01",
        "Measured on cuda (A GPU), A CPU, 2 cores, Linux x86_64: 1 thread, float32, torch 2.6.0, 10 rounds, "
        "2026-01-31",
    ]
    columns = {column.title: column.cells for column in sheets[1].columns}
    assert columns["threads"] == ["1", "1", "2", "2"]


def test_masked_levels_have_their_own_note_and_are_not_noise() -> None:
    masked = report((0.9, 1.0), (0.5, 0.5), (0.0, 1.0))
    made = [measurement((1.0, 0.9, 1.1), (0.5, 0.4, 0.6), FULL)]
    [note] = masked_notes(masked, made)
    assert "nestify bench --engine" in note
    assert "multiply with the zeros, and size-1 should take about as long" in note
    [note] = noise_notes(masked, made)
    assert note.startswith("Latency over full is the median of the ratios")
    assert masked_notes(NARROW, made[:0]) == []
    assert masked_notes(NARROW, [measurement((0.5, 0.4, 0.6), FULL)]) == []


ENGINE = "engine on onnxruntime 1.21.0, avx2"


def test_what_masked_weights_save_is_what_was_measured() -> None:
    masked = report((0.9, 1.0), (0.5, 1.0), (0.0, 1.0))
    slow, fast = measurement(FULL, FULL, FULL), (0.31, 0.29, 0.33)
    [note] = engine_notes(replace(masked, measured=[slow]))
    assert "only on the sparse engine: nestify bench --engine" in note
    torch_is_quick = measurement(fast, fast, FULL)
    unclear = measurement((0.9, 0.8, 1.0), FULL, FULL, runtime=ENGINE)
    for measured in ([], [torch_is_quick], [unclear]):
        assert engine_notes(replace(masked, measured=measured)) == [note]
    made = [
        measurement((0.4, 0.3, 0.5), (0.95, 0.9, 1.0), FULL, runtime=ENGINE, batch_size=1),
        measurement(fast, (0.95, 0.9, 1.0), FULL, runtime=ENGINE, batch_size=1, threads=2),
    ]
    [note] = engine_notes(replace(masked, measured=[slow, *made]))
    assert "size-1 0.31 (batch 1, 2 threads)" in note
    assert "size-2" not in note
    quantised = made[1].model_copy(update={"dtype": "int8"})
    assert "(batch 1, 2 threads, both in int8)" in engine_notes(replace(masked, measured=[quantised]))[0]
    assert "nestify bench" not in note
    assert engine_notes(replace(NARROW, measured=made[:0])) == []


def test_a_ratio_within_the_noise_is_noted() -> None:
    made = [
        measurement((0.9, 0.8, 1.0), FULL, batch_size=1),
        measurement((0.9, 0.8, 0.999), FULL, batch_size=2),
        measurement((1.1, 1.001, 1.2), FULL, batch_size=3),
        measurement((1.1, 0.5, 3.0), FULL, batch_size=4),
    ]
    notes = noise_notes(NARROW, made)
    assert notes[1:] == [
        "Within the noise of the full level: size-1 (batch 1), size-1 (batch 4); the middle half of the "
        "ratios includes 1."
    ]
    assert noise_notes(NARROW, []) == []
