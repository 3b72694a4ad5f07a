"""What a folder holds by name: every entry is accounted for, and no link leads astray."""

import os
import sys
from pathlib import Path

import pytest

from pipelines.data import folder_scan
from pipelines.data.folder_scan import (
    IS_GIF,
    OF_A_SYSTEM,
    OTHER_SUFFIX,
    Finding,
    FolderScan,
    folders_without_images,
    printable,
    scan_folder,
)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_images_are_told_by_suffix_in_any_case_and_script_and_the_rest_is_left_out(
    tmp_path: Path,
) -> None:
    names = ["A.PNG", "c/d.jpeg", "c/e.WebP", "имя/名前.jpg", "नाम.png", "🙂.png"]
    names = sorted([*names, "g.JFIF", "h.jpe", "i.jif", "j.bmp", "k.tif", "c/l.TIFF"])
    junk = ["@eaDir/a.JPG/THUMB.jpg", "f/._x.jpg", "f/__MACOSX/b.png"]
    for name in (*names, *junk, "a.gif", "b", ".c.png", ".d/e.png", "f/notes.txt"):
        touch(tmp_path / name)
    left_out = [(name, "is hidden") for name in (".c.png", ".d", "f/._x.jpg")]
    left_out += [(name, OF_A_SYSTEM) for name in ("@eaDir", "f/__MACOSX")]
    left_out += [("a.gif", IS_GIF), ("b", OTHER_SUFFIX), ("f/notes.txt", OTHER_SUFFIX)]
    scan = scan_folder(tmp_path, follow_links=False)
    assert scan == FolderScan(names, sorted(left_out), [], [], ["c", "f", "имя"])
    assert folders_without_images(scan) == ["f"]
    first = scan_folder(tmp_path, follow_links=False, rules=1).images  # as version 0.1 did
    later = (".JFIF", ".jpe", ".jif", ".bmp", ".tif", ".TIFF")
    kept = [name for name in names if not name.endswith(later)]
    assert first == sorted([*kept, "@eaDir/a.JPG/THUMB.jpg", "f/__MACOSX/b.png"])


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Links to a file and a folder outside, and to a folder beside whose name begins alike."""
    touch(tmp_path / "outside" / "cat" / "a.png")
    touch(tmp_path / "images2" / "b.png")
    root = tmp_path / "images"
    touch(root / "dog" / "c.png")
    (root / "cat").symlink_to(tmp_path / "outside" / "cat")
    (root / "dog" / "b.png").symlink_to("../../images2/b.png")
    return root


def test_links_that_leave_the_folder_are_refused_or_followed_and_listed(linked: Path) -> None:
    leaving = [
        (name, f"is a link that leaves the folder, to {linked.parent / target}")
        for name, target in (("cat", "outside/cat"), ("dog/b.png", "images2/b.png"))
    ]
    refused = scan_folder(linked, follow_links=False)
    assert refused == FolderScan(["dog/c.png"], [], leaving, [], ["dog"])
    followed = scan_folder(linked, follow_links=True)
    names = ["cat/a.png", "dog/b.png", "dog/c.png"]
    assert followed == FolderScan(names, [], [], leaving, ["cat", "dog"])


def test_a_folder_may_itself_be_a_link(linked: Path) -> None:
    alias = linked.parent / "alias"
    alias.symlink_to(linked)
    (linked / "cat").unlink()
    touch(linked / "cat" / "d.png")
    (linked / "cat" / "same.png").symlink_to("d.png")
    expected = ["cat/d.png", "cat/same.png", "dog/c.png"]
    assert scan_folder(alias, follow_links=False).images == expected


@pytest.mark.parametrize("follow_links", [False, True])
def test_folders_that_lead_to_each_other_are_searched_once(
    tmp_path: Path, follow_links: bool
) -> None:
    """Every folder links to every other one: the paths through them are without end."""
    root = tmp_path / "images"
    for number in range(12):
        touch(root / f"{number:02d}" / "a.png")
        for other in range(12):
            (root / f"{number:02d}" / f"to{other}").symlink_to(f"../{other:02d}")
        (root / f"{number:02d}" / "up").symlink_to("..")
    scan = scan_folder(root, follow_links)
    assert scan.images == [f"{number:02d}/a.png" for number in range(12)]
    assert set(scan.left_out) == {
        (f"{number:02d}/{name}", "is a link to a folder within the folder")
        for number in range(12)
        for name in ("up", *(f"to{other}" for other in range(12)))
    }


def test_followed_folders_that_contain_each_other_are_searched_once(tmp_path: Path) -> None:
    touch(tmp_path / "set" / "deep" / "a.png")
    (tmp_path / "set" / "back").symlink_to(tmp_path)
    root = tmp_path / "images"
    root.mkdir()
    (root / "one").symlink_to(tmp_path / "set")
    (root / "two").symlink_to(tmp_path / "set" / "deep")
    scan = scan_folder(root, follow_links=True)
    assert len(scan.images) == 1
    assert os.path.realpath(root / scan.images[0]) == str(tmp_path / "set" / "deep" / "a.png")
    assert "leads to a folder that was searched already" in {own.reason for own in scan.left_out}


def test_a_link_to_itself_is_an_image_that_will_not_open(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    assert scan_folder(tmp_path, follow_links=False).images == ["broken.png", "loop.png"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    try:
        touch(tmp_path / "a\udcff" / "b.png")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    scan = scan_folder(tmp_path, follow_links=False)
    assert scan.refused == [("a\udcff/b.png", "is not a UTF-8 name")]


def test_folders_may_be_nested_deeper_than_the_stack(tmp_path: Path) -> None:
    depth = sys.getrecursionlimit() + 100
    deepest = os.path.join(tmp_path, *["d"] * depth)
    os.makedirs(os.path.join(tmp_path, *["d"] * (depth // 2)))
    os.makedirs(deepest)
    try:
        (Path(deepest) / "a.png").write_bytes(b"x")
        assert scan_folder(tmp_path, follow_links=False).images == ["d/" * depth + "a.png"]
    finally:  # pytest's own cleaning is recursive
        os.unlink(os.path.join(deepest, "a.png"))
        os.removedirs(deepest)
        tmp_path.mkdir(exist_ok=True, parents=True)


def test_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a" / "b.png")
    scandir = os.scandir

    def forbid(path: Path) -> object:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_scan.os, "scandir", forbid)  # root may read all folders
    scan = scan_folder(tmp_path, follow_links=False)
    assert scan.refused == [Finding("a/", "cannot be read: Permission denied")]


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        *((name, False) for name in ("a b.png", "имя", "名前", "नाम", "🙂", "it's")),
        *((name, True) for name in ("a\nb", "\x1b[2J", "\udcff", "\u202egnp.a", "\r", "\x85")),
    ],
)
def test_a_name_is_printed_as_it_is_unless_it_moves_the_cursor(name: str, moves: bool) -> None:
    assert printable(name) == (repr(name) if moves else name)
    assert printable(name).isprintable()
