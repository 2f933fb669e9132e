"""No output replaces a file that the command reads."""

from pathlib import Path

import pytest

from tests.cli.conftest import Refused
from tests.cli.driver import CHECKPOINT, QUICK, nestify

START = ("compress", "digits", *QUICK)


def test_a_report_replaces_nothing_that_it_reads(digits_file: Path, refused: Refused) -> None:
    own, link = Path("own.safetensors"), Path("link.safetensors")
    own.write_bytes(digits_file.read_bytes())
    link.symlink_to(own)
    Path("gates.toml").write_text("[gates]\nmin_top1 = 1\n")
    for output in (own, link):
        assert "is the nested file itself; choose another path" in refused(3, "report", own, "-o", output)
    words = ("report", digits_file, "--compare", own, "--check", "gates.toml", "-o")
    assert "is the file to compare with" in refused(3, *words, own)
    assert "is the file of gates" in refused(3, *words, "gates.toml")


def test_a_scan_replaces_nothing_that_it_reads(refused: Refused) -> None:
    Path("recipe.toml").write_text('extends = "digits"\n')
    words = ("scan", "recipe.toml", "--checkpoint", CHECKPOINT)
    assert "recipe.toml: is the recipe" in refused(3, *words, "--budget", "macs=0.5", "-o", "recipe.toml")
    assert "recipe.toml: is the recipe" in refused(3, *words, "--html", "recipe.toml")
    told = refused(3, *words, "--budget", "macs=0.5", "-o", "a.html", "--html", "a.html")
    assert "a.html: is the page of --html too" in told


@pytest.mark.parametrize("key", ["hierarchy", "labels", "class_names"])
def test_a_run_replaces_no_table(key: str, refused: Refused) -> None:
    Path("a.csv").write_text("file,labels\n1.png,a\n")
    told = refused(3, *START, "-o", "a.csv", "--set", f"data.{key}=a.csv")
    assert "output = a.csv is the " in told
    assert "of this run; choose another path" in told


@pytest.mark.parametrize("name", ["a.safetensors", "a.resume.safetensors"])
def test_fine_tuned_weights_have_a_file_of_their_own(name: str, refused: Refused) -> None:
    words = ("--finetune-epochs", "1", "--set", f"finetune.save={name}")
    told = refused(3, *START, "-o", "a.safetensors", *words)
    assert told.startswith(f"finetune.save = {name} is ")
    assert "give each file a name of its own" in told


def test_the_json_of_a_report_has_one_format(digits_file: Path) -> None:
    done = nestify("report", digits_file, "--json", "--format", "html")
    assert (done.code, done.out) == (2, "")
    assert "--json and --format html exclude each other" in done.message
