"""Files of events: every form is read alike, nothing unreadable becomes an event, and errors say what to do."""

import gzip
import io
import math
import os
import shlex
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import orjson
import pytest

from stream.errors import ConfigError
from stream.files import FileForm, open_events
from stream.mapping import Mapping, guess_time_unit, time_reader

SHOP = Mapping.parse("user=who,interest=category,time=when,price=price,type=action")
CSV = "who,category,when,price,action\nada,tea,1511539217,3.5,view\nben,tents,1511539222,,buy\n"
EVENTS = [
    {"user": "ada", "interest": "tea", "time": 1511539217000, "type": "view", "price": 3.5},
    {"user": "ben", "interest": "tents", "time": 1511539222000, "type": "buy"},
]
DATA = Path(os.environ.get("DRIFTLINE_DATA", Path(__file__).parents[1] / "../shared/data"))

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def zipped(content: str, *names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()


JSON = "".join(
    orjson.dumps(row).decode() + "\n"
    for row in [
        {"who": "ada", "category": "tea", "when": 1511539217, "price": 3.5, "action": "view", "more": [1]},
        {"who": "ben", "category": "tents", "when": 1511539222, "price": None, "action": "buy"},
    ]
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("shop.csv", CSV),
        ("shop.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("shop.txt", CSV.replace(",", ";")),
        ("shop.tsv", CSV.replace(",", "\t")),
        ("shop.dat", CSV.replace(",", "::")),
        ("shop.txt", CSV.replace(",", " ").replace("  ", ' "" ')),
        ("shop.csv.gz", gzip.compress(CSV.encode())),
        ("no_suffix", gzip.compress(CSV.encode())),
        ("shop.zip", zipped(CSV, "__MACOSX/shop.csv", "shop.csv")),
        ("shop.jsonl", JSON),
        ("shop.json.gz", gzip.compress(("\ufeff" + JSON).encode())),
    ],
)
def test_every_form_gives_the_same_events(write: Write, name: str, content: str | bytes) -> None:
    """CSV, TSV, other separators, JSON lines, gzip, zip and byte order marks make no difference to the events."""
    with open_events(write(name, content), SHOP) as source:
        assert list(source) == EVENTS
        assert source.counts.rows == source.counts.events == 2
        assert source.facts.time_unit == "s" and "time_unit" in source.facts.guessed
        assert not source.counts.bad and not source.counts.left_out


def test_a_pipe_is_read_like_a_file() -> None:
    """The path - reads standard input, gzipped or not; how far it is cannot be known."""
    for content in (CSV.encode(), gzip.compress(CSV.encode())):
        source = open_events("-", SHOP, stdin=io.BytesIO(content))
        assert list(source) == EVENTS
        assert source.fraction() is None


def test_columns_without_a_header_go_by_number(write: Write) -> None:
    """--no-header: the first line is an event and columns are 0, 1, 2, ..."""
    path = write("ratings.csv", "6,2,4,1289241911.72836\n6,5,2,1289241941.53378\n")
    source = open_events(path, Mapping.parse("user=0,interest=1,rating=2,time=3"), FileForm(header=False))
    assert next(iter(source)) == {"user": "6", "interest": "2", "time": 1289241911728, "rating": 4.0}
    with pytest.raises(ConfigError, match=r"no column '0'.*--no-header"):
        open_events(path, Mapping.parse("user=0,interest=1,time=3"))


def test_fallback_and_joined_columns(write: Write) -> None:
    """A|B takes the first that is not empty; A+B needs both."""
    path = write("a.csv", "u,code,id,shop,t\n1,toys.cars,77,x,2020-01-01\n2,,78,,2020-01-02\n3,,,y,2020-01-03\n")
    source = open_events(path, Mapping.parse("user=u,interest=code|id,segment=shop+id,time=t"))
    assert [(e["user"], e["interest"], e.get("segment")) for e in source] == [
        ("1", "toys.cars", "x/77"),
        ("2", "78", None),
    ]
    assert source.counts.bad == {"no interest": 1}


def test_bad_rows_are_counted_and_shown_and_never_become_events(write: Write) -> None:
    """Each bad row has its reason; an unreadable optional number is left out and counted, not turned into another."""
    rows = [
        "ada,tea,2020-01-01T00:00:00,1.5,view",
        ",tea,2020-01-01T00:00:01,1.5,view",
        "NaN,tea,2020-01-01T00:00:01,1.5,view",
        "ada,,2020-01-01T00:00:01,1.5,view",
        "ada,tea,,1.5,view",
        "ada,tea,yesterday,1.5,view",
        "ada,tea,2020-13-01,1.5,view",
        "ada,tea,1969-12-31,1.5,view",
        "ada,tea,2020-01-01T00:00:01,1.5",
        "ada,tea,2020-01-01T00:00:01,1,5,view",
        "ada,tea,2020-01-01T00:00:02,cheap,view",
        "ada,tea,2020-01-01T00:00:03,inf,view",
        "ada,tea,2020-01-01T00:00:04,nan,",
        "ada,tea,2020-01-01 00:00:05 UTC,2,view",
    ]
    content = b"who,category,when,price,action\n" + "\n".join(rows).encode() + b"\nad\xff,tea,2020-01-02,1,view\n"
    source = open_events(write("bad.csv", content), SHOP, FileForm(time_unit="iso"))
    events = list(source)
    assert [e.get("price") for e in events] == [1.5, None, None, None, 2.0]
    assert source.counts.bad == {
        "no user": 2,
        "no interest": 1,
        "no time": 1,
        "time is unreadable or not between 1970 and 2100": 3,
        "4 columns, not 5": 1,
        "6 columns, not 5": 1,
        "not text in this encoding": 1,
    }
    assert source.counts.left_out == {"price": 2}
    assert source.counts.rows == source.counts.events + source.counts.bad.total() == 15
    assert len(source.counts.examples) == 5 and source.counts.examples[0][:2] == (3, "no user")


def test_bad_json_lines_are_counted(write: Write) -> None:
    """Broken JSON, other JSON than objects, and wrong types are bad rows; nested keys go by dots; numbers are ids."""
    lines = [
        '{"u": {"id": 7}, "c": "tea", "t": 1600000000000, "v": [1, 2.5], "price": [1]}',
        '{"u": {"id": true}, "c": "tea", "t": 1600000000000}',
        '{"u": {"id": 7}, "c": {"x": 1}, "t": 1600000000000}',
        '{"u": {"id": 7}, "c": "tea", "t": NaN}',
        '{"u": {"id": 7}, "c": "tea", "t"',
        "[1, 2]",
        "",
    ]
    mapping = Mapping.parse("user=u.id,interest=c,time=t,vector=v,price=price")
    source = open_events(write("bad.jsonl", "\n".join(lines)), mapping)
    assert list(source) == [{"user": "7", "interest": "tea", "time": 1600000000000, "vector": [1.0, 2.5]}]
    assert source.counts.bad.total() == 5 and source.counts.rows == 6 and source.counts.left_out == {"price": 1}


def test_a_json_key_may_come_late_but_a_typo_is_an_error(write: Write) -> None:
    """An optional key that the first lines lack is named, and used where it turns up; a near miss is refused."""
    row = '{"u": "a", "c": "tea", "t": 1600000000000, "price": 2.5'
    path = write("late.jsonl", f"{row}}}\n" * 1_500 + row + ', "stars": 5}\n')
    source = open_events(path, Mapping.parse("user=u,interest=c,time=t,rating=stars"))
    assert source.facts.unseen == ("stars",)
    assert [e["rating"] for e in source if "rating" in e] == [5.0]
    with pytest.raises(ConfigError, match="no column 'pirce'; did you mean 'price'"):
        open_events(path, Mapping.parse("user=u,interest=c,time=t,price=pirce"))
    with pytest.raises(ConfigError, match="no column 'category'"):
        open_events(path, Mapping.parse("user=u,interest=category,time=t"))


def test_unsorted_times_ask_for_sort_and_sort_is_stable(write: Write) -> None:
    """Times that run backwards are an error that names --sort; sorting keeps the file's order within equal times."""
    path = write("unsorted.csv", "u,i,t\na,x,1600000009\nb,1,1600000001\nc,2,1600000001\nd,3,1600000001\n")
    mapping = Mapping.parse("user=u,interest=i,time=t")
    with pytest.raises(ConfigError, match=r"line 3.*8\.000 s before.*--sort"):
        list(open_events(path, mapping))
    assert [e["user"] for e in open_events(path, mapping, FileForm(sort=True))] == ["b", "c", "d", "a"]


def test_order_as_time_only_when_asked_for(write: Write) -> None:
    """Without a time column nothing is read unless the order of the rows is asked for as the time."""
    path = write("commands.csv", "user,command\nu1,cpp\nu1,sh\n")
    mapping = Mapping.parse("user=user,interest=command")
    with pytest.raises(ConfigError, match=r"no column for time.*--time-unit order"):
        open_events(path, mapping)
    events = list(open_events(path, mapping, FileForm(time_unit="order")))
    assert events[1]["time"] - events[0]["time"] == 1_000


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "empty"),
        ("who,category,when,price,action\n", "no rows"),
        ("who,categories,when,price,action\na,b,1600000000,1,x\n", "no column 'category'; did you mean 'categories'"),
        ("who,category,when,price,action,who\na,b,1600000000,1,x,a\n", "more than one column 'who'"),
        ("who,category,when,price,action\na,b,12,1,x\n", "not clear from '12'; say --time-unit"),
        ("who,category,when,price,action\na,b,May 3rd,1,x\n", "neither numbers nor ISO 8601"),
        ("who,category,when,price,action\na,b,,1,x\n", "empty in the first rows"),
        ("who,category,when,price,action\na,,1600000000,1,x\n", "none of its 1 rows is an event; line 2: no interest"),
        ("just words\nand more\n", "no column 'who'"),
        ("nothing\nhere\n", "no separator found.*--sep"),
        (b"PAR1\0\0\0\0", "not a text file"),
        ('[{"who": 1}]', "JSON lines are read"),
        (gzip.compress((CSV + "cleo,tents,1511539222,,buy\n" * 50_000).encode())[:-100], "compressed data is damaged"),
        (zipped(CSV, "a.csv", "b.csv"), "holds 2 files"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(write: Write, content: str | bytes, match: str) -> None:
    """One ConfigError that says what and what to do, whatever the file is."""
    with pytest.raises(ConfigError, match=match):
        list(open_events(write("file.csv" if content != "nothing\nhere\n" else "file.txt", content), SHOP))


def test_a_missing_file_and_a_zip_in_a_pipe(tmp_path: Path) -> None:
    """Neither is a traceback."""
    with pytest.raises(ConfigError, match=r"none\.csv: cannot be read: No such file"):
        open_events(tmp_path / "none.csv", SHOP)
    with pytest.raises(ConfigError, match="zip file cannot be read from a pipe"):
        open_events("-", SHOP, stdin=io.BytesIO(zipped(CSV, "a.csv")))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("user=a,interest=b,tme=c", "no event field 'tme'; did you mean 'time'"),
        ("user=a,time=c", "no column for interest"),
        ("user=a,interest", "is not FIELD=COLUMN|belongs|no column for interest"),
        ("user=a,user=b,interest=c", "user is given twice"),
        ("user=a,interest=b,dwell=c,dwell_ms=d", "same field"),
    ],
)
def test_a_mapping_with_a_mistake_says_which(text: str, match: str) -> None:
    """A typo in --map names the field that was meant."""
    with pytest.raises(ConfigError, match=match):
        Mapping.parse(text)


def test_a_column_name_may_hold_the_marks_of_the_mapping(write: Write) -> None:
    """Commas, plus signs and bars that belong to a column's name are found there first."""
    path = write("odd.tsv", "user, id\ta+b\tt|x\nada\ttea\t2020-01-01\n")
    source = open_events(path, Mapping.parse("user=user, id,interest=a+b,time=t|x"))
    assert list(source) == [{"user": "ada", "interest": "tea", "time": 1577836800000}]


def test_tab_separated_text_may_hold_quotes(write: Write) -> None:
    """A lone quote in a TSV cell swallows no lines."""
    path = write("songs.tsv", 'u\tsong\tt\na\t"Heroes\t1600000000\nb\t12" mix\t1600000001\nc\t"x ""y"""\t1600000002\n')
    events = list(open_events(path, Mapping.parse("user=u,interest=song,time=t")))
    assert [e["interest"] for e in events] == ['"Heroes', '12" mix', 'x "y"']


def test_an_endless_quote_costs_one_bad_row_not_the_file(write: Write) -> None:
    """A quote that never closes is counted and reading goes on."""
    lines = ['a,"tea,1600000000'] + [f"u{n},coffee,1600000000" for n in range(20_000)]
    source = open_events(write("q.csv", "u,i,t\n" + "\n".join(lines) + "\n"), Mapping.parse("user=u,interest=i,time=t"))
    assert len(list(source)) > 10_000
    assert source.counts.bad.total() >= 1


@pytest.mark.parametrize(
    ("unit", "text", "time_ms"),
    [
        ("s", "1289241911.72836", 1289241911728),
        ("s", "0", 0),
        ("ms", "1515379410476", 1515379410476),
        ("ms", "1.515379410476e12", 1515379410476),
        ("iso", "2018-04-01T00:00:31", 1522540831000),
        ("iso", "2018-04-01T02:00:31+02:00", 1522540831000),
        ("iso", "2018-04-01 00:00:31 UTC", 1522540831000),
        ("iso", "2018-04-01", 1522540800000),
        ("%d/%m/%Y %H:%M", "01/04/2018 00:00", 1522540800000),
    ],
)
def test_times_of_each_unit(unit: str, text: str, time_ms: int) -> None:
    """Seconds, milliseconds, ISO 8601 and patterns come out as milliseconds; without a zone they are UTC."""
    assert time_reader(unit)(text) == time_ms


@pytest.mark.parametrize("unit", ["s", "ms", "iso", "%Y"])
@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e300", "x", "99999999999999", "10000-01-01", "12:00"])
def test_times_outside_of_1970_to_2100_are_refused(unit: str, text: str) -> None:
    """No unit turns nonsense into a time."""
    with pytest.raises(ValueError):
        time_reader(unit)(text)


def test_an_unknown_unit_is_named() -> None:
    """A wrong --time-unit lists the right ones."""
    with pytest.raises(ConfigError, match="'us': there are s, ms, iso"):
        time_reader("us")


def test_units_are_guessed_only_when_clear() -> None:
    """Seconds and milliseconds of this century are told apart; small numbers are not guessed."""
    assert guess_time_unit(["1511539217.5", "x", *["1511539217"] * 20], "t") == "s"
    assert guess_time_unit(["1511539217000"], "t") == "ms"
    assert guess_time_unit(["2019-10-01 00:00:00 UTC"], "t") == "iso"
    for samples in (["0", "36"], ["1511539217000000"], ["20191001"], ["1.5e9", "2020-01-01"]):
        with pytest.raises(ConfigError):
            guess_time_unit(samples, "t")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Reading without --sort holds a sample and one row, not the file."""

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.csv"
        with path.open("w") as out:
            out.write("u,i,t\n")
            out.writelines(f"user{n % 50},interest{n},{1_600_000_000 + n}\n" for n in range(rows))
        source = open_events(path, Mapping.parse("user=u,interest=i,time=t"))
        tracemalloc.start()
        assert sum(1 for _ in source) == rows
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(20_000) < peak(2_000) + 300_000


def test_a_table_holds_the_events_as_columns(write: Write) -> None:
    """Columns of equal length; missing text is empty, missing numbers are NaN."""
    table = open_events(write("shop.csv", CSV), SHOP).table()
    assert list(table.user) == ["ada", "ben"] and list(table.item) == ["", ""]
    assert table.time_ms.tolist() == [1511539217000, 1511539222000]
    assert table.price[0] == 3.5 and math.isnan(table.price[1]) and len(table) == 2
    assert len(open_events(write("shop.csv", CSV), SHOP).table(limit=1)) == 1


REAL = [
    ("taobao/events.csv.gz", "user=user,interest=category,time=time,item=item,type=type", {}, 84_440, 815),
    (
        "rees46/events.csv.gz",
        "user=user_id,interest=category_code|category_id,time=event_time,type=event_type,price=price",
        {},
        17_434,
        4_504,
    ),
    (
        "completejourney/transactions_with_products.csv.gz",
        "user=household_id,interest=department+product_category,time=transaction_timestamp,price=sales_value",
        {},
        74_669,
        2_374,
    ),
    (
        "yoochoose/yoochoose-clicks-100k_train_full.txt.gz",
        "user=SessionId,interest=ItemId,time=Time",
        {"sort": True},
        70_278,
        17_794,
    ),
    (
        "reviews/Musical_Instruments.zip",
        "user=reviewerID,interest=asin,time=unixReviewTime,rating=overall",
        {"sort": True},
        10_261,
        1_429,
    ),
    ("bitcoin_otc/otc_network.csv", "user=0,interest=1,rating=2,time=3", {"header": False}, 35_592, 4_814),
    ("ednet/ednet_kt1_60users.csv.gz", "user=user,interest=tags,time=timestamp_ms,dwell_ms=elapsed_ms", {}, 63_060, 60),
]


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here (DRIFTLINE_DATA)")
@pytest.mark.parametrize(("name", "mapping", "form", "events", "users"), REAL, ids=[r[0].split("/")[0] for r in REAL])
def test_real_sets_are_read_whole(name: str, mapping: str, form: dict[str, bool], events: int, users: int) -> None:
    """Every set is read with its own columns and units; the counts are those of an independent count."""
    source = open_events(DATA / name, Mapping.parse(mapping), FileForm(**form))  # type: ignore[arg-type]
    table = source.table()
    assert len(table) == events and len(set(table.user)) == users
    assert source.counts.events + source.counts.bad.total() == source.counts.rows
    assert (table.time_ms[1:] >= table.time_ms[:-1]).all()


DOCUMENTED = {  # the sets of docs/data.md whose files are at hand
    "taobao": "taobao/events.csv.gz",
    "rees46": "rees46/events.csv.gz",
    "online_retail": "online_retail/online_retail.csv.gz",
    "completejourney": "completejourney/transactions_with_products.csv.gz",
    "wikipedia": "wikipedia/wikipedia_first90.csv.gz",
    "yoochoose": "yoochoose/yoochoose-clicks-100k_train_full.txt.gz",
    "ednet": "ednet/ednet_kt1_60users.csv.gz",
    "fraud_handbook": "fraud_handbook/tx_2018-04_to_06.csv.gz",
    "bitcoin_otc": "bitcoin_otc/otc_network.csv",
    "reviews": "reviews/Musical_Instruments.zip",
    "masquerade": "masquerade/commands.csv.gz",
}


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here (DRIFTLINE_DATA)")
@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documented_mapping_reads_the_set(name: str) -> None:
    """Every line of "How to read it" in docs/data.md works as it stands, and refuses next to nothing."""
    page = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} | `"))
    words = shlex.split(line.split("`")[1].replace("\\|", "|"))
    options = dict(zip(words, [*words[1:], ""], strict=True))
    form = FileForm(header="--no-header" not in words, sort="--sort" in words, time_unit=options.get("--time-unit"))
    source = open_events(DATA / DOCUMENTED[name], Mapping.parse(options["--map"]), form)
    assert len(list(islice(source, 5_000))) == 5_000
    refused = source.counts.bad.total() / source.counts.rows
    assert refused < (0.4 if name == "online_retail" else 0.01)
    assert not source.counts.left_out
