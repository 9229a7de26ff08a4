"""The log's file: private, set aside whole, bounded, locked, at work again after any trouble."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ochat_serve.request_log import LogFile
from ochat_serve.request_log.aside import Aside
from tests.request_log.disks import folder_of_a_plain_user, small_disk
from tests.request_log.files import all_lines, aside, finish, lines, log_file, mode, record, text

FULL_DISK = Path("/dev/full")


def line(number: int, size: int = 0) -> bytes:
    """At least ``size`` bytes that do not compress well."""
    filling = os.urandom(size // 2).hex()
    return record(request_id=str(number), user=filling).line().encode() + b"\n"


def numbers(found: list[dict[str, object]]) -> list[int]:
    return [int(str(line["request_id"])) for line in found]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_log_goes_on_where_the_last_one_ended(tmp_path: Path):
    path = tmp_path / "log"
    for number in (1, 2):
        file = log_file(path)
        assert file.write([line(number)]) == 0
        file.close()
    assert numbers(lines(path)) == [1, 2]
    assert not aside(path)


def test_set_aside_whole_and_compressed(tmp_path: Path):
    """The newest lines stay, the names sort, and no line is cut in two."""
    path = tmp_path / "log"
    file = log_file(path, max_bytes=100_000, max_count=3)
    for number in range(0, 24, 4):
        assert file.write([line(number + n, 30_000) for n in range(4)]) == 0
        finish(file)
    file.close()
    # Three lines go into a file.
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "log", "log.000005.gz", "log.000006.gz", "log.000007.gz", "log.lock",
    ]  # fmt: skip
    assert numbers(all_lines(path)) == list(range(12, 24))
    assert all(len(text(p)) <= 100_000 for p in [path, *aside(path)])


def test_numbers_go_on_after_a_restart(tmp_path: Path):
    path = tmp_path / "log"
    for number in range(5):
        file = log_file(path, max_bytes=50)
        file.write([line(number)])
        finish(file)
        file.close()
    assert [p.name for p in aside(path)] == [f"log.00000{n}.gz" for n in range(1, 5)]
    assert numbers(all_lines(path)) == [0, 1, 2, 3, 4]


def test_a_line_longer_than_a_file_is_a_file(tmp_path: Path):
    path = tmp_path / "log"
    file = log_file(path, max_bytes=1_000)
    assert file.write([line(1), line(2, 5_000), line(3)]) == 0
    file.close()
    assert numbers(all_lines(path)) == [1, 2, 3]
    assert [numbers(lines(p)) for p in aside(path)] == [[1], [2]]


def test_all_that_was_set_aside_together_is_bounded(tmp_path: Path):
    path = tmp_path / "log"
    file = log_file(path, max_bytes=100_000, total_bytes=180_000)
    for number in range(20):
        file.write([line(number, 90_000)])
        finish(file)
    assert sum(p.stat().st_size for p in aside(path)) <= 180_000
    # Hexadecimal digits compress to about a half.
    assert len(aside(path)) == 3
    assert numbers(all_lines(path)) == [16, 17, 18, 19]


def test_what_a_larger_limit_has_left_is_removed_at_the_start(tmp_path: Path):
    path = tmp_path / "log"
    file = log_file(path, max_bytes=50)
    file.write([line(number) for number in range(6)])
    finish(file)
    file.close()
    assert len(aside(path)) == 5
    (tmp_path / "log.000002.gz.part").touch()  # a crash, and its file is gone
    file = log_file(path, max_count=2)
    finish(file)
    file.close()
    assert numbers(all_lines(path)) == [3, 4, 5]
    assert [p.name for p in aside(path)] == ["log.000004.gz", "log.000005.gz"]


def test_an_old_file_is_set_aside(tmp_path: Path):
    """Its age is its first line's, whoever wrote that; an empty file has none."""
    path = tmp_path / "log"
    now = 1_000.0

    def write(number: int) -> None:
        file.write([record(request_id=str(number), time=now).line().encode() + b"\n"])

    def reopened() -> LogFile:
        return log_file(path, now=lambda: now, max_age_s=60)

    file = reopened()
    now += 100
    write(1)
    now += 60
    write(2)
    assert not aside(path)
    file.close()
    file = reopened()
    now += 1
    write(3)
    assert [numbers(lines(p)) for p in [*aside(path), path]] == [[1, 2], [3]]
    file.close()


def touch(path: Path) -> None:
    path.write_text("{}\n")
    path.chmod(0o644)


@pytest.mark.parametrize("before", [touch, lambda path: None], ids=["existed", "new"])
@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_only_the_owner_reads_any_of_it(tmp_path: Path, before: Callable[[Path], None], mask: int):
    path = tmp_path / "log"
    before(path)
    with umask(mask):
        file = log_file(path, max_bytes=1_000)
        assert mode(path) == 0o600
        file.write([line(number, 900) for number in range(3)])
        finish(file)
        file.write([line(number, 900) for number in range(2)])
        file.work()  # half done
        everything = {p.name: mode(p) for p in tmp_path.iterdir()}
        file.close()
    assert {"log", "log.lock", "log.000001.gz"} < everything.keys()
    assert {name.partition(".")[2][6:] for name in everything} >= {"", ".gz", ".gz.part"}
    assert set(everything.values()) == {0o600}


def test_a_file_that_cannot_be_opened_is_said_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "log", tmp_path, tmp_path / "file" / "log"):
        with pytest.raises(OSError, match=str(path)):
            log_file(path)


def test_two_never_write_one_file(tmp_path: Path):
    """By whatever name, and after it was set aside."""
    path, link = tmp_path / "log", tmp_path / "link"
    file = log_file(path, max_bytes=50)
    link.symlink_to(path)
    for number in range(3):
        file.write([line(number)])
        for name in (path, link):
            with pytest.raises(BlockingIOError):
                log_file(name)
    file.close()
    log_file(link).close()


def test_a_device_stays_as_it_is():
    before = mode(FULL_DISK)
    file = log_file(FULL_DISK)
    assert file.write([line(1), line(2)]) == 2
    assert file.trouble == "/dev/full: No space left on device"
    assert not file.work()
    file.close()
    assert mode(FULL_DISK) == before
    assert not Path("/dev/full.lock").exists()


def test_a_pipe_takes_lines_and_is_never_set_aside(tmp_path: Path):
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o640)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = log_file(path, max_bytes=50)
    for number in range(3):
        assert file.write([line(number)]) == 0
    file.close()
    assert os.read(reader, 2**16).count(b"\n") == 3
    os.close(reader)
    assert list(tmp_path.iterdir()) == [path]
    assert mode(path) == 0o640


@pytest.mark.parametrize("mounted", [True, False], ids=["tmpfs", "limit"])
def test_a_full_disk_loses_lines_and_cuts_none(mounted: bool):
    with small_disk(mounted=mounted) as disk:
        path = disk.folder / "log"
        file = log_file(path)
        assert file.write([line(1)]) == 0
        disk.fill()
        lost = [file.write([line(number, 3_000)]) for number in range(2, 10)]
        assert lost[-1] == 1
        kept = [1, *(number for number, gone in enumerate(lost, 2) if not gone)]
        assert numbers(lines(path)) == kept
        disk.free()
        assert file.write([line(10, 3_000)]) == 0
        file.close()
        assert numbers(lines(path)) == [*kept, 10]


@pytest.mark.parametrize("mounted", [True, False], ids=["tmpfs", "limit"])
def test_a_disk_without_room_to_compress(mounted: bool, caplog: pytest.LogCaptureFixture):
    """What is left plain is compressed later."""
    with small_disk(mounted=mounted) as disk:
        path = disk.folder / "log"
        file = log_file(path, max_bytes=60_000)
        file.write([line(number, 10_000) for number in range(6)])
        disk.fill(1_000)
        finish(file)
        assert "cannot be compressed" in caplog.text
        assert [p.name for p in aside(path)] == ["log.000001"]
        disk.free()
        file.write([line(number, 10_000) for number in range(6, 12)])
        finish(file)
        file.close()
        assert [p.name for p in aside(path)] == ["log.000001.gz", "log.000002.gz"]
        assert numbers(all_lines(path)) == list(range(12))


def test_a_disk_that_is_full_at_the_end():
    """Half compressed: the next server, for whom the lock is free, begins anew."""
    with small_disk(mounted=False) as disk:
        path = disk.folder / "log"
        file = log_file(path, max_bytes=60_000)
        file.write([line(number, 10_000) for number in range(6)])
        file.work()
        disk.fill(1)
        file.close()
        assert [p.name for p in aside(path)] == ["log.000001"]
        disk.free()
        file = log_file(path)
        finish(file)
        file.close()
        assert [p.name for p in aside(path)] == ["log.000001.gz"]
        assert numbers(all_lines(path)) == list(range(6))


def test_a_folder_that_may_not_be_written_any_more():
    """Setting aside fails: the file grows no further, and goes on when it may."""
    with folder_of_a_plain_user() as folder:
        path = folder / "log"
        file = log_file(path, max_bytes=1_000)
        assert file.write([line(1, 900)]) == 0
        folder.chmod(0o500)
        assert file.write([line(2, 900), line(3, 900)]) == 2
        assert file.trouble == f"{path}: Permission denied"
        finish(file)
        folder.chmod(0o700)
        assert file.write([line(4, 900)]) == 0
        file.close()
        assert numbers(all_lines(path)) == [1, 4]


def test_a_folder_that_is_away_for_a_while(tmp_path: Path):
    path = tmp_path / "logs" / "log"
    path.parent.mkdir()
    file = log_file(path)
    path.unlink()
    (path.parent / "log.lock").unlink()
    path.parent.rmdir()
    assert file.write([line(1)]) == 1
    finish(file)
    path.parent.mkdir()
    assert file.write([line(2)]) == 0
    file.close()
    assert numbers(lines(path)) == [2]


@pytest.mark.parametrize("act", [Path.unlink, lambda path: path.rename(path.with_name("old"))])
def test_a_file_that_somebody_takes_away(tmp_path: Path, act: Callable[[Path], object]):
    """A new one is begun: lines in a file without a name are lost, and nobody knows."""
    path = tmp_path / "log"
    file = log_file(path)
    file.write([line(1)])
    act(path)
    assert file.write([line(2)]) == 0
    file.close()
    assert numbers(lines(path)) == [2]


def test_no_line_is_glued_to_one_that_a_crash_has_cut(tmp_path: Path):
    path = tmp_path / "log"
    path.write_text('{"time":1}\n{"time":2,"requ')
    file = log_file(path)
    file.write([line(3), line(4)])
    file.close()
    *_, cut, third, fourth, end = text(path).split("\n")
    assert (cut, end) == ('{"time":2,"requ', "")
    assert [third + "\n", fourth + "\n"] == [line(3).decode(), line(4).decode()]


def test_a_file_that_a_crash_has_cut_and_that_is_full(tmp_path: Path):
    path = tmp_path / "log"
    path.write_text('{"time":1}\n{"time":2,"requ')
    file = log_file(path, max_bytes=20)
    file.write([line(3)])
    file.close()
    assert numbers(lines(path)) == [3]


def test_a_crash_while_compressing_neither_loses_nor_doubles(tmp_path: Path):
    """At each of its steps: begun, finished, and the plain file not removed yet."""
    path = tmp_path / "log"
    file = log_file(path, max_bytes=1_000)
    file.write([line(number, 900) for number in range(4)])
    file.close()
    plain = [p.read_bytes() for p in aside(path)]
    assert len(plain) == 3
    file = log_file(path)
    finish(file)
    file.close()
    first, second, third = aside(path)
    first.with_suffix("").write_bytes(plain[0])
    second.rename(f"{second}.part")
    second.with_suffix("").write_bytes(plain[1])
    third.rename(f"{third}.part")
    third.with_name(third.name + ".part").write_bytes(b"half of it")
    third.with_suffix("").write_bytes(plain[2])
    file = log_file(path)
    finish(file)
    file.close()
    assert [p.name for p in aside(path)] == [f"log.00000{n}.gz" for n in (1, 2, 3)]
    assert numbers(all_lines(path)) == [0, 1, 2, 3]


def test_closing_does_not_wait_for_compressing(tmp_path: Path):
    path = tmp_path / "log"
    file = log_file(path, max_bytes=2**20)
    file.write([line(1, 2**20 - 1_000), line(2, 2_000)])
    file.close()
    file = log_file(path)
    file.work()
    assert (tmp_path / "log.000001.gz.part").exists()
    file.close()
    assert [p.name for p in aside(path)] == ["log.000001"]
    assert numbers(all_lines(path)) == [1, 2]


def test_one_file_is_compressed_before_the_next_is_full(tmp_path: Path):
    """So there is never room needed for more than two that are not."""
    path = tmp_path / "log"
    file = log_file(path, max_bytes=2**22)
    waiting = []
    for number in range(24):
        file.write([line(number, 2**20)])
        file.work()
        waiting.append(len([p for p in aside(path) if p.suffix not in (".gz", ".part")]))
    assert len(aside(path)) >= 6
    assert max(waiting) == 1
    file.close()


def test_other_files_are_left_alone(tmp_path: Path):
    strangers = ["log.1", "log.1.gz", "log.bak", "logs.000001", "log.000001.txt", "log.0000x1"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    path = tmp_path / "log"
    file = log_file(path, max_bytes=50, max_count=1)
    file.write([line(number) for number in range(5)])
    finish(file)
    file.close()
    assert all((tmp_path / name).read_text() == "mine" for name in strangers)
    assert [p.name for p in aside(path) if p.name not in strangers] == ["log.000004.gz"]


def test_a_million_is_more_than_a_thousand(tmp_path: Path):
    """Numbers are numbers, however many digits they have."""
    for name in ("log.999999.gz", "log.1000000.gz"):
        (tmp_path / name).touch()
    path = tmp_path / "log"
    path.touch()
    Aside(str(path), log_file(tmp_path / "x")._retention).take()
    assert (tmp_path / "log.1000001").exists()
