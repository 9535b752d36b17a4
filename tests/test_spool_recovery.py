"""A damaged spool is set aside whole, and every row that can still be read is given back."""

import errno
import json
import os
import random
from pathlib import Path

import pytest

import spool.recovery
import spool.writer
from spool import (
    CorruptFileError,
    NewReading,
    Salvage,
    SpoolReader,
    SpoolWriter,
    StorageFaultError,
    confirmed,
    set_aside,
    spool_path,
)
from spool.records import READING_COLUMNS
from spool.recovery import SALVAGE_STEP_BYTES, SALVAGE_STEP_ROWS
from spool.writer import PAGE_BYTES as PAGE
from tests.test_spool_writer import edit, look, new_reading

LEAF_OF_A_TABLE = 0x0D
INSIDE_A_TABLE = 0x05
ROWS = 2000
PAYLOAD = b'{"padding":"%s"}' % (b"x" * 150)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A spool of ROWS rows, checkpointed and set aside; each test damages it as it likes."""
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n, payload=PAYLOAD) for n in range(ROWS)], [], {})
    writer.checkpoint()
    writer.close()
    return set_aside(spool_path(tmp_path), now_s=0)


def pages_of_rows(path: Path) -> list[int]:
    """Return the numbers of the table's leaf pages, in the order of the file."""
    data = path.read_bytes()
    pages = {n: data[n * PAGE : (n + 1) * PAGE] for n in range(1, len(data) // PAGE)}
    return [n for n, page in pages.items() if page[0] == LEAF_OF_A_TABLE and PAYLOAD in page]


def garble(path: Path, page: int) -> None:
    page_bytes = int.from_bytes(path.read_bytes()[16:18], "big")
    with path.open("r+b") as file:
        file.seek(page * page_bytes)
        file.write(random.Random(page).randbytes(page_bytes))  # noqa: S311 - damage, not a secret


def salvaged(salvage: Salvage) -> list[NewReading]:
    rows: list[NewReading] = []
    for _ in range(100):
        if salvage.done:
            return rows
        rows += salvage.step()
    raise AssertionError("the salvage does not come to its end")


def numbers(rows: list[NewReading]) -> set[int]:
    known = {new_reading(n)[0]: n for n in range(ROWS)}
    return {known[row[0]] for row in rows}


def test_everything_is_given_back_from_a_file_that_is_whole(damaged: Path) -> None:
    salvage = Salvage(damaged, 0)
    rows = salvaged(salvage)
    assert rows == [new_reading(n, payload=PAYLOAD) for n in range(ROWS)]
    assert (salvage.readable, salvage.unreadable) == (ROWS, 0)
    step = Salvage(damaged, 0).step()
    assert SALVAGE_STEP_ROWS <= len(step) < SALVAGE_STEP_ROWS + 2 * PAGE // len(PAYLOAD)
    assert step == rows[: len(step)]


def test_what_every_sink_has_is_not_given_back(damaged: Path) -> None:
    assert numbers(salvaged(Salvage(damaged, 1500))) == set(range(1500, ROWS))


def test_only_the_rows_of_a_garbage_page_are_lost(damaged: Path) -> None:
    pages = pages_of_rows(damaged)
    garble(damaged, pages[len(pages) // 2])
    salvage = Salvage(damaged, 0)
    rows = salvaged(salvage)
    lost = set(range(ROWS)) - numbers(rows)
    assert 0 < len(lost) <= PAGE // len(PAYLOAD)
    assert max(lost) - min(lost) == len(lost) - 1
    assert len(rows) == len(numbers(rows))
    assert salvage.unreadable == len(lost)


def test_what_lies_between_two_garbage_pages_is_given_back(damaged: Path) -> None:
    pages = pages_of_rows(damaged)
    for page in (pages[10], pages[60], pages[-10]):
        garble(damaged, page)
    salvage = Salvage(damaged, 0)
    rows = salvaged(salvage)
    lost = ROWS - len(numbers(rows))
    assert 0 < lost <= 3 * (PAGE // len(PAYLOAD))
    assert salvage.unreadable == lost
    assert len(rows) == len(numbers(rows))


def test_a_truncated_file_gives_back_what_is_left_of_it(damaged: Path) -> None:
    pages = pages_of_rows(damaged)
    with damaged.open("r+b") as file:
        file.truncate(pages[len(pages) // 2] * PAGE)
    found = numbers(salvaged(Salvage(damaged, 0)))
    assert len(found) > ROWS // 3
    assert set(range(len(found))) == found


def test_a_flipped_bit_costs_one_row_and_hides_none_behind_it(damaged: Path) -> None:
    edit(damaged, "UPDATE reading_row SET site_code=CAST(x'D3' AS TEXT) WHERE seq IN (500, 900)")
    edit(damaged, "UPDATE reading_row SET value=value+1 WHERE seq=1500")
    salvage = Salvage(damaged, 0)
    assert set(range(ROWS)) - numbers(salvaged(salvage)) == {499, 899, 1499}
    assert salvage.unreadable == 3


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"SQLite format 3\0" + bytes(PAGE)])
def test_a_file_without_a_readable_header_gives_back_nothing_and_ends(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "spool.db.damaged-x"
    path.write_bytes(content)
    salvage = Salvage(path, 0)
    assert salvaged(salvage) == []
    assert salvage.epoch == ""
    assert salvage.position() == ""


def test_a_missing_file_is_no_error(tmp_path: Path) -> None:
    assert Salvage(tmp_path / "gone", 0).done


@pytest.mark.parametrize("damage", [(), (50,), (10, 60)])
def test_a_salvage_that_is_interrupted_after_any_step_goes_on_where_it_was(
    damaged: Path, damage: tuple[int, ...]
) -> None:
    pages = pages_of_rows(damaged)
    for page in damage:
        garble(damaged, pages[page])
    whole = salvaged(Salvage(damaged, 0))
    rows: list[NewReading] = []
    salvage = Salvage(damaged, 0)
    while not salvage.done:
        rows += salvage.step()
        position = salvage.position()
        salvage.close()
        if position:
            salvage = Salvage.resumed(position)
    assert rows == whole
    assert salvage.readable == len(rows), "the sum of all"
    assert salvage.unreadable == ROWS - len(rows)


def test_the_damaged_files_epoch_says_which_cursors_belong_to_it(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    epoch = writer.epoch
    writer.close()
    assert Salvage(set_aside(spool_path(tmp_path)), 0).epoch == epoch


# What SQLite can no longer read at all.


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Path, str]:
    """A spool whose first 800 rows were pruned, on pages that are now free; and its epoch."""
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n, payload=PAYLOAD) for n in range(ROWS)], [], {"spooled": ROWS})
    assert writer.delete_through(800, "pruned") == 800
    writer.checkpoint()
    writer.close()
    return set_aside(spool_path(tmp_path), now_s=0), writer.epoch


def overwrite(path: Path, offset: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(random.Random(size).randbytes(size))  # noqa: S311 - damage, not a secret


def inner_pages(path: Path) -> list[int]:
    """Return the pages above the leaves, that of the schema left out."""
    data = path.read_bytes()
    return [n for n in range(1, len(data) // PAGE) if data[n * PAGE] == INSIDE_A_TABLE]


@pytest.mark.parametrize("size", [1, 16, 100, PAGE])
def test_a_garbage_header_or_first_page_costs_nothing(pruned: tuple[Path, str], size: int) -> None:
    damaged, epoch = pruned
    overwrite(damaged, 0, size)
    salvage = Salvage(damaged, 0)
    assert (salvage.epoch, salvage.waiting(), salvage.waiting(1_990)) == (epoch, 2_000, 10)
    salvage.skip_to(900)
    assert numbers(salvaged(salvage)) == set(range(900, ROWS))
    assert (salvage.readable, salvage.unreadable) == (ROWS - 900, 0)


def test_garbage_in_place_of_all_pages_above_the_rows_costs_nothing(damaged: Path) -> None:
    assert inner_pages(damaged)
    for page in inner_pages(damaged):
        garble(damaged, page)
    salvage = Salvage(damaged, 0)
    assert [row[0] for row in salvaged(salvage)] == [new_reading(n)[0] for n in range(ROWS)]
    assert (salvage.readable, salvage.unreadable) == (ROWS, 0)


@pytest.mark.parametrize("after_seq", [0, 600, 1_000])
def test_pruned_rows_are_never_counted_as_lost(pruned: tuple[Path, str], after_seq: int) -> None:
    damaged, _ = pruned
    garble(damaged, page_of(damaged, 1_500))
    salvage = Salvage(damaged, after_seq)
    found = numbers(salvaged(salvage))
    lost = set(range(max(800, after_seq), ROWS)) - found
    assert 0 < len(lost) <= PAGE // len(PAYLOAD)
    assert salvage.unreadable == len(lost)
    assert min(found) >= after_seq


def test_without_meta_and_counters_everything_is_given_back_and_nothing_counted_as_lost(
    pruned: tuple[Path, str],
) -> None:
    damaged, _ = pruned
    first = min(pages_of_rows(damaged))
    overwrite(damaged, 0, first * PAGE)
    salvage = Salvage(damaged, 0)
    assert (salvage.epoch, salvage.app_env, salvage.waiting()) == ("", "", 1)
    assert numbers(salvaged(salvage)) >= set(range(800, ROWS))
    assert salvage.unreadable == 0


def page_of(path: Path, number: int) -> int:
    """Return the page that has the reading."""
    return path.read_bytes().index(new_reading(number)[0]) // PAGE


def test_a_read_error_that_passes_during_the_salvage_costs_nothing(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = os.pread, set()

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if offset not in failed:
            failed.add(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size, offset)

    salvage = Salvage(damaged, 0)
    monkeypatch.setattr(os, "pread", pread)
    assert numbers(salvaged(salvage)) == set(range(ROWS))
    assert len(failed) > ROWS * len(PAYLOAD) // PAGE


def test_what_was_suspected_of_a_file_that_is_set_aside_says_nothing_of_the_next(
    tmp_path: Path,
) -> None:
    path = spool_path(tmp_path)
    SpoolWriter.open(tmp_path).close()
    assert not confirmed(CorruptFileError("", path))
    set_aside(path)
    SpoolWriter.open(tmp_path).close()
    assert not confirmed(CorruptFileError("", path))


def test_a_page_the_disk_cannot_read_costs_what_is_on_it(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = page_of(damaged, 1_000)
    real = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if offset == bad * PAGE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    salvage = Salvage(damaged, 0)
    lost = set(range(ROWS)) - numbers(salvaged(salvage))
    assert 1_000 in lost
    assert len(lost) <= PAGE // len(PAYLOAD)
    assert salvage.unreadable == len(lost)


def test_a_torn_page_in_the_log_hides_no_row(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    rows = [new_reading(n, payload=bytes((n,)) * 3 * PAGE) for n in range(20)]
    writer.append(rows, [], {})
    writer.checkpoint()
    writer.close()
    damaged = set_aside(spool_path(tmp_path), now_s=0)
    pages = damaged.stat().st_size // PAGE
    log = bytearray(32)
    for page in range(1, pages + 1):
        log += page.to_bytes(4, "big") + bytes(20) + random.Random(page).randbytes(PAGE)  # noqa: S311
    damaged.with_name(f"{damaged.name}-wal").write_bytes(log)
    assert salvaged(Salvage(damaged, 0)) == rows


def test_a_row_is_given_back_once_however_many_images_of_its_page_there_are(
    tmp_path: Path,
) -> None:
    writer = SpoolWriter.open(tmp_path)
    for n in range(60):  # each commit writes the last page anew
        writer.append([new_reading(n)], [], {})
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("spool.db*"):
        (copy / path.name).write_bytes(path.read_bytes())
    salvage = Salvage(set_aside(spool_path(copy)), 0)
    assert salvaged(salvage) == [new_reading(n) for n in range(60)]
    assert (salvage.readable, salvage.unreadable) == (60, 0)


@pytest.mark.parametrize("seed", range(20))
def test_no_damage_makes_a_row_that_was_never_there(damaged: Path, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - damage, not a secret
    data = bytearray(damaged.read_bytes())
    for _ in range(dice.choice((10, 1_000, 20_000))):
        data[dice.randrange(len(data))] = dice.randrange(256)
    damaged.write_bytes(data)
    known = {new_reading(n, payload=PAYLOAD) for n in range(ROWS)}
    assert set(salvaged(Salvage(damaged, 0))) <= known


def test_large_readings_end_a_step_early(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n, payload=b"x" * 100_000) for n in range(30)], [], {})
    writer.close()
    step = Salvage(set_aside(spool_path(tmp_path)), 0).step()
    assert SALVAGE_STEP_BYTES <= sum(len(row[8]) for row in step) < 2 * SALVAGE_STEP_BYTES


def test_a_large_file_is_looked_through_step_by_step(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool.recovery, "SCAN_STEP_PAGES", 20)
    salvage = Salvage(damaged, 0)
    assert salvage.step() == []
    assert not salvage.done
    assert salvage.position() == Salvage(damaged, 0).position()
    assert numbers(salvaged(salvage)) == set(range(ROWS))


def test_the_position_of_an_earlier_release_is_gone_on_from(damaged: Path) -> None:
    salvage = Salvage.resumed(json.dumps([str(damaged), 1_500, 1_800, True, False]))
    assert numbers(salvaged(salvage)) == set(range(1_500, ROWS))


def test_a_format_with_other_columns_is_noticed(tmp_path: Path) -> None:
    """What is read without the schema has to be told of every change of it."""
    SpoolWriter.open(tmp_path).close()
    names = [
        name
        for (name,) in look(
            spool_path(tmp_path), "SELECT name FROM pragma_table_info('reading_row')"
        )
    ]
    assert names == ["seq", *READING_COLUMNS.split(", ")]


def test_skipping_never_goes_backwards(damaged: Path) -> None:
    salvage = Salvage(damaged, 100)
    salvage.skip_to(50)
    salvage.skip_to(1990)
    assert numbers(salvaged(salvage)) == set(range(1990, ROWS))


def test_a_spool_is_set_aside_with_its_log_and_index(tmp_path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"spool.db{suffix}").write_text(suffix)
    target = set_aside(spool_path(tmp_path), now_s=0)
    assert target.name == "spool.db.damaged-19700101T000000Z"
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {f"{target.name}{suffix}": suffix for suffix in ("", "-wal", "-shm")}


def test_a_spool_that_cannot_be_moved_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"spool.db{suffix}").write_text(suffix)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == spool_path(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageFaultError, match=r"set aside .*spool.db failed"):
        set_aside(spool_path(tmp_path))
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {f"spool.db{suffix}": suffix for suffix in ("", "-wal", "-shm")}


def test_setting_aside_twice_in_a_second_overwrites_nothing(tmp_path: Path) -> None:
    targets = []
    for content in ("first", "second", "third"):
        spool_path(tmp_path).write_text(content)
        targets.append(set_aside(spool_path(tmp_path), now_s=0))
    assert [target.read_text() for target in targets] == ["first", "second", "third"]
    assert sorted(targets) == targets


def test_rows_in_the_log_of_a_killed_collector_are_set_aside_too(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(1)], [], {})
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("spool.db*"):  # as a kill leaves them: the log not merged
        (copy / path.name).write_bytes(path.read_bytes())
    assert salvaged(Salvage(set_aside(spool_path(copy)), 0)) == [new_reading(1)]


def test_reading_a_garbage_page_is_corruption_to_a_forwarder_and_to_the_owner(
    damaged: Path, tmp_path: Path
) -> None:
    pages = pages_of_rows(damaged)
    garble(damaged, pages[len(pages) // 2])
    damaged.rename(spool_path(tmp_path))
    reader = SpoolReader.open(tmp_path)
    with pytest.raises(CorruptFileError):
        reader.read_after(0, ROWS, 10**9)
    writer = SpoolWriter.open(tmp_path)
    with pytest.raises(CorruptFileError):
        writer.check_readable(0)
    writer.check_readable(ROWS - 10)


@pytest.mark.parametrize("number", [0x72, 0x31, 0x12])
def test_a_flipped_bit_in_a_rows_number_is_corruption_and_moves_no_cursor_past_it(
    tmp_path: Path, number: int
) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n) for n in range(100)], [], {})
    writer.checkpoint()
    writer.close()
    data = bytearray(spool_path(tmp_path).read_bytes())
    identity = data.find(new_reading(49)[0])
    header = next(n for n in range(8, 20) if data[identity - n] == n)
    assert data[identity - header - 1] == 50
    data[identity - header - 1] = number
    spool_path(tmp_path).write_bytes(data)
    reader, writer = SpoolReader.open(tmp_path), SpoolWriter.open(tmp_path)
    assert [row[0] for row in reader.read_after(0, 49, 10**9)] == list(range(1, 50))
    for after in (0, 40):
        with pytest.raises(CorruptFileError, match="not in order"):
            reader.read_after(after, 100, 10**9)
        with pytest.raises(CorruptFileError):
            writer.check_readable(after)
    writer.close()
    salvage = Salvage(set_aside(spool_path(tmp_path)), 0)
    assert len(numbers(salvaged(salvage))) >= 99


@pytest.mark.parametrize("page_bytes", [2048, 4096])
@pytest.mark.parametrize(
    "payload_bytes", [150, 700, 850, 900, 1000, 1300, 1500, 1800, 2000, 2200, 3000, 3700, 5000]
)
def test_rows_of_any_size_are_found_where_no_header_tells_the_size_of_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_bytes: int, payload_bytes: int
) -> None:
    monkeypatch.setattr(spool.writer, "PAGE_BYTES", page_bytes)
    writer = SpoolWriter.open(tmp_path)
    payload = b"x" * payload_bytes
    writer.append([new_reading(n, payload=payload) for n in range(ROWS)], [], {"spooled": ROWS})
    writer.close()
    overwrite(spool_path(tmp_path), 0, 100)
    damaged = set_aside(spool_path(tmp_path))
    assert numbers(salvaged(Salvage(damaged, 0))) == set(range(ROWS))


def test_rows_of_pages_of_their_own_are_found_where_no_header_is_left(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n, payload=b"x" * 200_000) for n in range(40)], [], {"spooled": 40})
    writer.close()
    overwrite(spool_path(tmp_path), 0, 65_536)
    assert len(salvaged(Salvage(set_aside(spool_path(tmp_path)), 0))) >= 35


@pytest.mark.parametrize("damaged", [2**40 + 2_000, 900])
def test_what_is_there_goes_before_a_last_number_that_is_damaged(
    tmp_path: Path, damaged: int
) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n, payload=PAYLOAD) for n in range(ROWS)], [], {"spooled": ROWS})
    writer.set_meta("app_env_from_seq", "1500")  # those of another environment never come along
    writer.close()
    edit(spool_path(tmp_path), f"UPDATE counter SET value = {damaged} WHERE name = 'last_seq'")  # noqa: S608 - our own
    salvage = Salvage(set_aside(spool_path(tmp_path)), 0)
    assert salvage.waiting() <= 1_000_000
    assert numbers(salvaged(salvage)) == set(range(1_500, ROWS))
    assert salvage.unreadable == 0


def test_a_number_that_was_never_given_is_corruption(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(1)], [], {})
    edit(spool_path(tmp_path), "UPDATE counter SET value = 0 WHERE name = 'last_seq'")
    with pytest.raises(CorruptFileError):
        SpoolReader.open(tmp_path).read_after(0, 1, 10**9)
    with pytest.raises(CorruptFileError):
        writer.check_readable(0)  # as a forwarder that met it has its owner do
    writer.close()


def test_an_owner_finds_at_its_start_that_the_last_number_is_damaged(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n) for n in range(3)], [], {})
    writer.close()
    for damaged in ("value - 1", "value + 1 + (1 << 40)"):
        edit(spool_path(tmp_path), f"UPDATE counter SET value = {damaged} WHERE name = 'last_seq'")  # noqa: S608 - our own
        with pytest.raises(CorruptFileError, match="last number that was given"):
            SpoolWriter.open(tmp_path)
        with pytest.raises(CorruptFileError, match="last number that was given"):
            SpoolReader.open(tmp_path).last_seq()  # no gap is noted for it
