"""What is read of a folder or a tar: hidden and other files, links, devices; which folders are classes."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestify.data.dataset import Images, open_images, open_splits
from nestify.data.listing import MAX_DEPTH, ImageFile, _in_natural_order, natural_key
from nestify.data.loaders import eval_loader
from nestify.errors import DataError
from tests.data.builders import PREPROCESSING, grey, make_folder, png

COUNTS = {"cat": 2, "dog": 2}
OTHERS = {
    "cat/._000.png": b"\0\5\x16\7",
    "__MACOSX/cat/._000.png": b"\0\5\x16\7",
    "__MACOSX/cat/000.png": b"\0\5\x16\7",
    ".ipynb_checkpoints/000-checkpoint.png": png(1),
    "dog/.thumbnails/000.png": png(1),
    "dog/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg": png(1),
    ".DS_Store": b"x",
    "cat/.DS_Store": b"x",
    "cat/Thumbs.db": b"x",
    "dog/desktop.ini": b"x",
    "dog/notes.TXT": b"x",
    "dog/more.txt": b"x",
    "dog/README": b"x",
}


def greys(images: Images) -> list[int]:
    loader = eval_loader(images, PREPROCESSING, batch_size=3)
    return [round(float(image[0, 0, 0]) * 255) for batch, _ in loader for image in batch]


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shades(*names: str) -> dict[str, bytes]:
    return {name: png(i + 1) for i, name in enumerate(names)}


WRITE = pytest.mark.parametrize("write", [write_folder, write_tar])
ALL = {f"{name}/{i:03d}.png": png(grey(c, i)) for c, name in enumerate(COUNTS) for i in range(2)}


@WRITE
def test_hidden_and_other_files_are_left_out_and_counted(tmp_path: Path, write: type[write_folder]) -> None:
    images = open_images(str(write(tmp_path / "d.tar", {**OTHERS, **ALL})))
    assert images.class_names == ("cat", "dog")
    assert greys(images) == [grey(0, 0), grey(0, 1), grey(1, 0), grey(1, 1)]
    (notice,) = images.notices
    assert ".txt 2" in notice
    assert ".db 1" in notice
    assert ".ini 1" in notice
    assert "no ending 1" in notice
    if write is write_folder:
        assert "ignored 8 files" in notice
        assert "hidden 3" in notice
        assert "and 4 folders (.ipynb_checkpoints, .thumbnails, @eaDir, ...)" in notice
    else:
        assert "ignored 13 files" in notice
        assert "hidden 8" in notice


@WRITE
def test_many_endings_are_summed(tmp_path: Path, write: type[write_folder]) -> None:
    others = {f"cat/x.e{i}": b"" for i in range(9)}
    (notice,) = open_images(str(write(tmp_path / "d.tar", {**others, **ALL}))).notices
    assert notice.endswith("ignored 9 files (.e0 1, .e1 1, .e2 1, .e3 1, .e4 1, others 4)")


@WRITE
def test_only_hidden_images(tmp_path: Path, write: type[write_folder]) -> None:
    with pytest.raises(DataError, match="no images in class folders"):
        open_images(str(write(tmp_path / "d.tar", {".cat/0.png": png(1), "dog/._0.png": b""})))


@WRITE
def test_the_first_folder_is_the_class(tmp_path: Path, write: type[write_folder]) -> None:
    days = shades("red/day0/a.png", "red/day1/a.png", "blue/day0/a.png", "blue/day1/x/a.png", "blue/a.png")
    images = open_images(str(write(tmp_path / "d.tar", days)))
    assert images.class_names == ("blue", "red")
    assert images.dataset.reader.targets == [0, 0, 0, 1, 1]
    assert (
        "first folders: blue, red; folders inside them, such as blue/day0, are no classes"
        in (images.notices[0])
    )


@WRITE
@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (("fit/cat/a.png", "fit/dog/a.png", "check/cat/a.png", "check/dog/a.png"), True),
        (("cat/big/a.png", "cat/small/a.png", "dog/big/a.png", "dog/a.png"), False),
        (("cat/best/a.png", "dog/best/a.png"), False),
    ],
)
def test_splits_of_other_names_are_suspected(
    tmp_path: Path, write: type[write_folder], paths: tuple[str, ...], told: bool
) -> None:
    notice = open_images(str(write(tmp_path / "d.tar", shades(*paths)))).notices[0]
    assert ("name them with --train-split and --val-split" in notice) == told


@WRITE
def test_folder_around_the_classes(tmp_path: Path, write: type[write_folder]) -> None:
    photos = shades("./photos/all/cat/1.png", "./photos/all/dog/1.png", "./photos/.x/cat/1.png")
    images = open_images(str(write(tmp_path / "d.tar", photos)))
    assert images.class_names == ("cat", "dog")
    assert "the classes are the folders in photos/all: cat, dog" in images.notices[-1]


@WRITE
def test_splits_that_are_joined_are_named(tmp_path: Path, write: type[write_folder]) -> None:
    photos = shades(
        "photos/train/cat/1.png", "photos/train/dog/1.png", "photos/val/cat/2.png", "photos/val/dog/2.png"
    )
    data = str(write(tmp_path / "d.tar", photos))
    images = open_images(data, ".")
    assert images.class_names == ("cat", "dog")
    assert "the images of photos/train and photos/val are used together" in images.notices[-1]
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"splits, photos/train and photos/val; .* --train-split \."):
            open_images(data, split)
        with pytest.raises(DataError, match=r"splits, photos/train and photos/val; .* --train-split \."):
            open_images(data, split, labelled=False)


@WRITE
@pytest.mark.parametrize(
    ("paths", "refused"),
    [
        (("a/train/1.png", "a/validation/2.png"), True),
        (("a/train/x/1.png", "a/test/2.png"), True),
        (("a/train/x/1.png", "b/val/2.png"), False),
        (("a/train/1.png", "a/cat/2.png"), False),
        (("a/train/1.png",), False),
    ],
)
def test_splits_of_images_without_labels(
    paths: tuple[str, ...], refused: bool, write: type[write_folder], tmp_path: Path
) -> None:
    data = str(write(tmp_path / "d.tar", shades(*paths)))
    if refused:
        with pytest.raises(DataError, match=r"holds several splits, .* or join them"):
            open_images(data, labelled=False)
    assert len(open_images(data, "." if refused else "train", labelled=False)) == len(paths)


@WRITE
def test_a_known_class_is_no_folder_around_classes(tmp_path: Path, write: type[write_folder]) -> None:
    days = shades("dog/day0/1.png", "dog/day1/1.png")
    images = open_images(str(write(tmp_path / "d.tar", days)), class_names=["cat", "dog"])
    assert [t for _, targets in eval_loader(images, PREPROCESSING, batch_size=2) for t in targets] == [1, 1]


@WRITE
def test_splits_are_not_classes(tmp_path: Path, write: type[write_folder]) -> None:
    files = shades("x/train/cat/1.png", "x/train/dog/1.png", "x/val/cat/1.png", "x/val/dog/1.png")
    images = open_images(str(write(tmp_path / "d.tar", files)), ".")
    assert images.class_names == ("cat", "dog")
    assert len(images) == 4
    assert "the classes are the folders in x/train and x/val: cat, dog" in images.notices[0]
    assert open_images(
        str(write(tmp_path / "e.tar", shades("train/1.png", "val/1.png"))), "."
    ).class_names == ("train", "val")


@WRITE
def test_class_without_images(tmp_path: Path, write: type[write_folder]) -> None:
    files = {**shades("x/cat/1.png", "x/dog/1.png"), "x/cow/1.heic": b""}
    with pytest.raises(DataError, match=r"x/cow: no images in this class folder; it holds \.heic 1"):
        open_images(str(write(tmp_path / "d.tar", files)))


@WRITE
def test_names_that_differ_in_form_only(tmp_path: Path, write: type[write_folder]) -> None:
    with pytest.raises(DataError, match=r"both named caf. .*; rename or join"):
        open_images(str(write(tmp_path / "d.tar", shades("caf\u00e9/1.png", "cafe\u0301/1.png"))))
    images = open_images(
        str(write(tmp_path / "e.tar", shades("cafe\u0301/1.png", "dog/1.png"))),
        class_names=["dog", "caf\u00e9"],
    )
    assert images.classes.index_of == (1, 0)
    letters = open_images(str(write(tmp_path / "f.tar", shades("a/1.png", "A/1.png", "01/1.png", "1/1.png"))))
    assert letters.class_names == ("01", "1", "A", "a")


def test_name_that_is_no_text(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1})
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/1.png")).write_bytes(png(1))
    with pytest.raises(DataError, match="not named in UTF-8; rename"):
        open_images(str(tmp_path))


def test_natural_order() -> None:
    names = ["b", "a10", "a9", "a", "a0", "a\u00b2", "1" * 5000, "10", "2", "B", "a09"]
    assert sorted(names, key=natural_key) == [
        *("2", "10", "1" * 5000, "a", "a0", "a09", "a9", "a10", "a\u00b2", "B", "b")
    ]


def test_class_folders_named_like_images(tmp_path: Path) -> None:
    assert open_images(str(make_folder(tmp_path, {"x.png": 1, "y.jpg": 1}))).class_names == ("x.png", "y.jpg")


def test_special_files(tmp_path: Path) -> None:
    make_folder(tmp_path, COUNTS)
    os.mkfifo(tmp_path / "cat" / "fifo.png")
    (tmp_path / "cat" / "link.png").symlink_to("fifo.png")
    (tmp_path / "dog" / "null.png").symlink_to("/dev/null")
    images = open_images(str(tmp_path))
    assert len(greys(images)) == 4
    assert images.notices == (f"{tmp_path}: ignored 3 files (not a regular file 3)",)


def test_fifo_as_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.tar")
    with pytest.raises(DataError, match=r"d\.tar: cannot be read"):
        open_images(str(tmp_path / "d.tar"))


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("/", "contains the images; remove it"),
        ("../..", "contains the images; remove it"),
        ("..", "are the same folder; remove one"),
        (".", "are the same folder; remove one"),
    ],
)
def test_link_that_never_ends(tmp_path: Path, target: str, problem: str) -> None:
    root = make_folder(tmp_path / "d", COUNTS)
    (root / "cat" / "loop").symlink_to(target)
    with pytest.raises(DataError, match=f"loop.*{problem}"):
        open_images(str(root))


def test_linked_images_and_folders_are_read_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "far", {"a": 2, "b": 1})
    root = make_folder(tmp_path / "d", {"cat": 1})
    (root / "dog").symlink_to(tmp_path / "far" / "a")
    (root / "cat" / "b").symlink_to("../../far/b")
    (root / "cat" / "one.png").symlink_to("../../far/a/000.png")
    images = open_images(str(root))
    assert images.dataset.reader.targets == [0, 0, 0, 1, 1]
    assert len(greys(images)) == 5
    (root / "hound").symlink_to("dog")
    with pytest.raises(DataError, match=r"hound and .*dog are the same folder|dog and .*hound are the same"):
        open_images(str(root))


def test_broken_links_are_unreadable_images(tmp_path: Path) -> None:
    make_folder(tmp_path, COUNTS)
    (tmp_path / "cat" / "gone.png").symlink_to("nowhere")
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    with pytest.raises(DataError, match=r"(gone|self)\.png: not a readable image"):
        greys(open_images(str(tmp_path)))
    images = open_images(str(tmp_path), on_bad_image="skip")
    assert len(greys(images)) == 4
    assert len(images.skipped) == 2


def test_classes_that_both_splits_share_by_a_link(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", COUNTS)
    make_folder(tmp_path / "val", {"dog": 1})
    (tmp_path / "val" / "cat").symlink_to("../train/cat")
    with pytest.raises(DataError, match=r"would use the same images.*remove the link"):
        open_splits(str(tmp_path))


def test_too_many_folders_inside_each_other(tmp_path: Path) -> None:
    deep = tmp_path / "cat"
    for _ in range(MAX_DEPTH):
        deep /= "x"
    deep.mkdir(parents=True)
    with pytest.raises(DataError, match=f"more than {MAX_DEPTH} folders"):
        open_images(str(tmp_path))


def tar_of(path: Path, *members: tuple[str, bytes, str] | tuple[str, bytes, bytes]) -> str:
    """A tar of members: name, type, and a link's target or a file's content."""
    with tarfile.open(path, "w") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, str):
                member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_links_in_a_tar(tmp_path: Path) -> None:
    images = open_images(
        tar_of(
            tmp_path / "d.tar",
            ("./cat/1.png", tarfile.REGTYPE, png(7)),
            ("dog/hard.png", tarfile.LNKTYPE, "./cat/1.png"),
            ("dog/soft.png", tarfile.SYMTYPE, "../cat/1.png"),
            ("dog/twice.png", tarfile.SYMTYPE, "soft.png"),
            ("dog/out.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("dog/up.png", tarfile.SYMTYPE, "../../../x.png"),
            ("dog/self.png", tarfile.SYMTYPE, "self.png"),
            ("dog/pair.png", tarfile.SYMTYPE, "riap.png"),
            ("dog/riap.png", tarfile.SYMTYPE, "pair.png"),
            ("dog/fifo.png", tarfile.FIFOTYPE, ""),
            ("dog/null.png", tarfile.CHRTYPE, ""),
        )
    )
    assert greys(images) == [7, 7, 7, 7]
    assert [images.file_name(i).rpartition(":")[2] for i in range(4)] == [
        *("cat/1.png", "dog/hard.png", "dog/soft.png", "dog/twice.png")
    ]
    assert images.notices == (f"{tmp_path}/d.tar: ignored 7 files (link 5, not a regular file 2)",)


def test_the_last_member_of_a_name_counts(tmp_path: Path) -> None:
    members = [
        (f"{name}/1.png", tarfile.REGTYPE, png(value)) for name, value in (("a", 3), ("b", 4), ("a", 5))
    ]
    images = open_images(tar_of(tmp_path / "d.tar", *members))
    assert greys(images) == [5, 4]
    assert "replaced later 1" in images.notices[0]


def test_tars_in_a_tar(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "x.tar", shades("1.png", "sub/2.png")).read_bytes()
    images = open_images(str(write_tar(tmp_path / "d.tar", {"cat.tar": inner, "dog/1.png": png(9)})))
    assert images.class_names == ("cat", "dog")
    assert greys(images) == [1, 2, 9]


def test_damage_in_the_middle_of_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "d.tar", ALL)
    intact = path.read_bytes()
    second = intact.index(b"cat/001.png")
    path.write_bytes(intact[:second] + b"\xff" * 512 + intact[second + 512 :])
    with pytest.raises(DataError, match=r"d\.tar: its members cannot be read after byte"):
        open_images(str(path))
    path.write_bytes(intact + intact)
    with pytest.raises(DataError, match=r"another archive appended"):
        open_images(str(path))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(
    st.dictionaries(
        st.lists(st.text("aAbB0129-. _", min_size=1, max_size=3), min_size=1, max_size=2).map("/".join),
        st.lists(st.text("aAb0129-._", min_size=1, max_size=4), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_order_by_folder_is_that_of_all_names(folders: dict[str, list[str]]) -> None:
    names = {f"{folder}/{name}" for folder, inside in folders.items() for name in inside}
    images = [ImageFile(name, name) for name in names]
    assert [image.name for image in _in_natural_order(images)] == sorted(names, key=natural_key)
