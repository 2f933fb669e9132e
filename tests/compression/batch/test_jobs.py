"""Shards, and recipes that are placed in folders."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.compression.batch.jobs import Shard, make_jobs, parse_shard
from nestify.errors import RecipeError
from nestify.recipe.recipe import Recipe, load_recipe
from tests.compression.batch.builders import DATA, write_recipe


@given(st.integers(0, 50), st.integers(1, 60))
def test_shards_partition_the_jobs(jobs: int, count: int) -> None:
    shares = [Shard(number, count).select(list(range(jobs))) for number in range(1, count + 1)]
    assert sorted(job for share in shares for job in share) == list(range(jobs))
    assert all(list(share) == list(range(number, jobs, count)) for number, share in enumerate(shares))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shards_as_text() -> None:
    assert parse_shard("2/4") == Shard(2, 4)
    assert (str(Shard(2, 4)), Shard(2, 4).suffix, Shard().suffix) == ("2/4", ".2-of-4", "")


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "1", "1/", "/2", "a/b", "-1/2", "1/2/3", "1/0", "", "1.0/2", "²/4"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_shard(text)
    told = f"--shard {text} is not I/N with I from 1 to N; give 1/4 to 4/4 to four machines"
    assert str(caught.value) == told


def test_a_job_means_the_same_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "a.toml").write_text(
        'output = "deep/er/mine.nested.safetensors"\n[model]\nname = "local-dir:local"\n'
        'checkpoint = "a.safetensors"\n[data]\npath = "photos"\nhierarchy = "photos/../b.csv"\n'
        '[train]\nteacher = "local-dir:local"\nteacher_checkpoint = "t.safetensors"\n'
        '[finetune]\nepochs = 1\nsave = "deep/dense.safetensors"\n'
        '[gates]\nbaseline = "base.json"\nmax_regression = 1\n'
    )
    [job] = make_jobs(["a.toml"], Path("out"), Shard())
    folder = tmp_path / "out" / "a"
    assert job.folder == folder
    recipe = job.recipe
    assert recipe.output_path == folder / "mine.nested.safetensors"
    assert recipe.finetune.save == str(folder / "dense.safetensors")
    assert recipe.model.name == f"local-dir:{tmp_path}/local"
    assert recipe.model.checkpoint == str(tmp_path / "a.safetensors")
    assert recipe.train.teacher == recipe.model.name
    assert recipe.train.teacher_checkpoint == str(tmp_path / "t.safetensors")
    assert recipe.data.path == str(tmp_path / "photos")
    assert recipe.gates.baseline == str(tmp_path / "base.json")
    written = tmp_path / "elsewhere" / "recipe.json"
    written.parent.mkdir()
    written.write_text(job.recipe_text)
    monkeypatch.chdir("/")
    assert load_recipe(str(written)) == recipe
    assert Recipe.model_validate(recipe.to_dict()) == recipe


def test_names_of_data_sets_stay(tmp_path: Path) -> None:
    for path in ("hfds/x", "wds/y", "embedded/digits", "torch/cifar10"):
        recipe = write_recipe(tmp_path / "a.toml").replace(DATA, "")
        Path(recipe).write_text(f'[model]\nname = "m"\n[data]\npath = "{path}"\n')
        assert make_jobs([recipe], tmp_path, Shard())[0].recipe.data.path == path


@pytest.mark.parametrize("name", ["recipe.json", "result.json", "log.txt"])
def test_outputs_do_not_replace_a_jobs_own_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'output = "x/{name}"\n[model]\nname = "m"\n{DATA}')
    with pytest.raises(RecipeError) as caught:
        make_jobs([str(path)], tmp_path, Shard())
    assert (
        str(caught.value)
        == f"{path}: output = x/{name} is the name of another file of the job; choose another"
    )


def test_two_outputs_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        f'output = "x/a.safetensors"\n[model]\nname = "m"\n{DATA}'
        '[finetune]\nepochs = 1\nsave = "y/a.safetensors"\n'
    )
    with pytest.raises(RecipeError, match=r"finetune.save = y/a.safetensors is the name of another file"):
        make_jobs([str(path)], tmp_path, Shard())
