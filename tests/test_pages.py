"""Pages read without SQLite say what SQLite says, and never raise for what is on them."""

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from spool.pages import INDEX_LEAF, TABLE_LEAF, PageImages, Value, cells, record_at

Record = tuple[Value, ...]
SEED = 20_261_124
INTEGERS = [s * (2**b + d) for b in (0, 7, 8, 15, 23, 31, 47, 62) for d in (-1, 0) for s in (1, -1)]
REALS = [0.5, -1e300, 3.0, float(2**40)]
LENGTHS = [0, 1, 57, 58, 127, 128, 500, 4_061, 4_062, 9_000, 70_000]


def columns(dice: random.Random) -> list[Value]:
    size = dice.choice(LENGTHS)
    text = "".join(dice.choices("aé漢😀", k=dice.choice(LENGTHS[:6])))
    return [dice.choice(INTEGERS), dice.choice(REALS), text, dice.randbytes(size), None]


def make(path: Path, page_bytes: int, rows: int = 200) -> dict[int, Record]:
    """Make a database of random rows, in WAL mode but merged; return the rows by rowid."""
    dice = random.Random(SEED)  # noqa: S311 - a test's dice
    rowids = [dice.randrange(-(2**63), 2**63) >> dice.randrange(56) for _ in range(rows)]
    made = {rowid: (None, *columns(dice)) for rowid in (*rowids, 7)}
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(f"PRAGMA page_size={page_bytes}")
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("CREATE TABLE r (id INTEGER PRIMARY KEY, i, d, t TEXT, b, n)")
        conn.execute("CREATE TABLE m (k TEXT PRIMARY KEY, v TEXT) WITHOUT ROWID")
        for rowid, (_, *values) in made.items():
            conn.execute("INSERT INTO r VALUES (?,?,?,?,?,?)", (rowid, *values))
            conn.execute("INSERT INTO m VALUES (?,?)", (f"key {rowid}", str(values[2])))
        conn.commit()
    return made


@contextmanager
def opened(path: Path) -> Iterator[PageImages]:
    images = PageImages(path)
    try:
        yield images
    finally:
        images.close()


def rows_of(images: PageImages, *, by_log: bool = True) -> dict[int, Record]:
    """Return the rows of six columns on all images, the later ones last."""
    found: dict[int, Record] = {}
    for image in range(1, images.count):  # the first one is the schema's
        page = images.read(image)
        if page[0] == TABLE_LEAF:
            for at in cells(page):
                rowid, record = record_at(images, page, at, by_log=by_log)
                found[rowid] = tuple(record)
    return found


@pytest.mark.parametrize("page_bytes", [512, 1024, 4096, 65_536])
def test_every_row_is_read_as_sqlite_reads_it(tmp_path: Path, page_bytes: int) -> None:
    made = make(tmp_path / "a", page_bytes)
    with opened(tmp_path / "a") as images:
        assert images.page_bytes == page_bytes
        assert rows_of(images) == made
        leaves = [p for p in map(images.read, range(1, images.count)) if p[0] == INDEX_LEAF]
        pairs = [record_at(images, page, at)[1] for page in leaves for at in cells(page)]
    texts = {f"key {rowid}": str(values[3]) for rowid, values in made.items()}
    # The rest are the inner pages'.
    assert len(texts) * 0.5 < len(pairs) <= len(texts)
    assert all(texts[str(key)] == value for key, value in pairs)


@pytest.mark.parametrize("page_bytes", [512, 1024, 2048, 4096, 65_536])
def test_the_page_size_is_seen_where_the_header_is_garbage(tmp_path: Path, page_bytes: int) -> None:
    made = make(tmp_path / "a", page_bytes)
    with (tmp_path / "a").open("r+b") as file:
        file.write(random.Random(1).randbytes(100))  # noqa: S311 - damage, not a secret
    with opened(tmp_path / "a") as images:
        assert rows_of(images) == made


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, bytes]:
    """A copy of a database whose log has a later image of a row's pages; that row's later blob."""
    make(tmp_path / "a", 1024)
    later = b"later" * 2_000
    with closing(sqlite3.connect(tmp_path / "a", isolation_level=None)) as conn:
        conn.execute("UPDATE r SET b = ? WHERE id = 7", (later,))
        conn.execute("INSERT OR REPLACE INTO m VALUES ('a key', 'first')")
        conn.execute("INSERT OR REPLACE INTO m VALUES ('a key', 'second')")
        for suffix in ("", "-wal"):
            shutil.copy(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}")
    return tmp_path / "b", later


@pytest.mark.parametrize("database", ["whole", "no bytes"])
def test_what_only_the_log_has_is_read_too(killed: tuple[Path, bytes], database: str) -> None:
    path, later = killed
    if database == "no bytes":
        path.write_bytes(b"")
    with opened(path) as images:
        found = {row[4] for row in _rows_of_log(images) if len(row) == 6}
        assert later in found
        values = [
            record_at(images, page, at)[1][1]
            for page in images.of_low_pages(10_000)
            for at in cells(page)
            if page[0] == INDEX_LEAF and record_at(images, page, at)[1][0] == "a key"
        ]
        assert values[-2:] == ["first", "second"], "in the order in which they were written"


def _rows_of_log(images: PageImages) -> Iterator[Record]:
    for image in range(images.count):
        page = images.read(image)
        if page[0] == TABLE_LEAF:
            for at in cells(page):
                try:
                    yield tuple(record_at(images, page, at)[1])
                except ValueError:
                    continue  # its overflow pages are not in the log


def test_frames_of_an_earlier_round_say_nothing_of_the_present(killed: tuple[Path, bytes]) -> None:
    path, _ = killed
    log = bytearray(path.with_name(f"{path.name}-wal").read_bytes())
    log[16] ^= 1  # the header's salt, which the current frames repeat
    path.with_name(f"{path.name}-wal").write_bytes(log)
    with opened(path) as images:
        pages = list(images.of_low_pages(10_000))
        assert len(pages) < images.count
        assert not any(b"a key" in page for page in pages)


@pytest.mark.parametrize("bad_bytes", [1, 30, 3_000])
@pytest.mark.parametrize("seed", range(15))
def test_damage_raises_nothing_but_what_is_announced_and_hides_nothing_else(
    tmp_path: Path, seed: int, bad_bytes: int
) -> None:
    dice = random.Random(seed)  # noqa: S311 - damage, not a secret
    made = make(tmp_path / "a", 512, rows=60)
    data = bytearray((tmp_path / "a").read_bytes())
    for _ in range(bad_bytes):
        data[dice.randrange(512, len(data))] = dice.randrange(256)
    if bad_bytes > 1:
        del data[dice.randrange(len(data) // 2, len(data)) :]
    (tmp_path / "a").write_bytes(data)
    same = 0
    with opened(tmp_path / "a") as images:
        for image in range(images.count):
            page = images.read(image)
            for at in cells(page):
                try:
                    rowid, record = record_at(images, page, at)
                except (ValueError, IndexError):
                    continue
                same += made.get(rowid) == tuple(record)
    # One byte is in one row, or in the header of a page of a few.
    assert bad_bytes > 1 or same > len(made) - 10


def test_an_overflow_chain_that_bites_its_tail_ends(tmp_path: Path) -> None:
    make(tmp_path / "a", 512, rows=20)
    with (tmp_path / "a").open("r+b") as file:
        file.seek(512 * 3)
        file.write((4).to_bytes(4, "big"))  # page 4 goes on with page 4
    with opened(tmp_path / "a") as images:
        assert len(images.follow(4, 10_000, by_log=True)) == 10_000


def test_a_file_that_is_not_there_is_an_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PageImages(tmp_path / "gone")
