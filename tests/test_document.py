"""Strict YAML: what is read, what is refused, and where the message points."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from tpshard.document import MAX_BYTES, MAX_DEPTH, Node, did_you_mean, parse_documents, read_documents
from tpshard.errors import PolicyError, StorageError, TpshardError


def parse(text: str) -> Node:
    (document,) = parse_documents(text, "p.yaml")
    return document


def value(text: str) -> object:
    """The plain value of ``a`` in ``a: <text>``."""
    plain = parse(f"a: {text}").plain()
    assert isinstance(plain, dict)
    return plain["a"]


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        ("0", 0),
        ("-3", -3),
        ("true", True),
        ("false", False),
        ("column", "column"),
        ("'010'", "010"),
        ('"yes"', "yes"),
        ("''", ""),
        ("[1, x, [2]]", [1, "x", [2]]),
        ("{b: {c: 1}}", {"b": {"c": 1}}),
        ("a | b", "a | b"),
        ("num_heads / 2", "num_heads / 2"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ("x  # remark", "x"),
        ("H", "H"),
        ("ünïcode", "ünïcode"),
    ],
)
def test_values(text: str, expected: object) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_places_and_trails() -> None:
    document = parse("name: x\nrules:\n  a.b: column\n  c: {rule: row, parts: [1, 2]}\n")
    rules = document.mapping()["rules"].mapping()
    assert (str(rules["a.b"].mark), rules["a.b"].trail) == ("p.yaml:3:8", "rules.a.b")
    assert (str(rules["c"].mark), rules["c"].trail) == ("p.yaml:4:3", "rules.c"), "a mapping is where its key is"
    second = rules["c"].mapping()["parts"].value[1]  # type: ignore[index]
    assert (str(second.mark), second.trail) == ("p.yaml:4:29", "rules.c.parts[1]")


def test_several_documents() -> None:
    documents = parse_documents("---\nname: a\n---\nname: b\n---\n---\n# nothing\n", "p.yaml")
    assert [document.plain() for document in documents] == [{"name": "a"}, {"name": "b"}]
    assert str(documents[1].mark) == "p.yaml:4:1"


@pytest.mark.parametrize(
    ("text", "read", "message"),
    [
        ("a", Node.mapping, "p.yaml:1:4: a: must be a mapping, is the text 'a'"),
        ("[1]", Node.mapping, "p.yaml:1:4: a: must be a mapping, is a list"),
        ("", Node.mapping, "p.yaml:1:3: a: must be a mapping, is empty"),
        ("3", Node.text, "p.yaml:1:4: a: must be text, is the number 3"),
        ("{b: 1}", Node.text, "p.yaml:1:1: a: must be text, is a mapping"),
        ("'true'", Node.flag, "p.yaml:1:4: a: must be true or false, is the text 'true'"),
        ("1", Node.flag, "p.yaml:1:4: a: must be true or false, is the number 1"),
        ("true", Node.integer, "p.yaml:1:4: a: must be a whole number, is true"),
        ("'2'", Node.integer, "p.yaml:1:4: a: must be a whole number, is the text '2'"),
    ],
)
def test_what_a_value_must_be(text: str, read: object, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read(parse(f"a: {text}").mapping()["a"])  # type: ignore[operator]
    assert str(caught.value) == message


def test_one_of_suggests() -> None:
    node = parse("a: colum").mapping()["a"]
    with pytest.raises(PolicyError) as caught:
        node.one_of(("column", "row"))
    assert str(caught.value) == "p.yaml:1:4: a: must be one of column, row; is 'colum' (did you mean 'column'?)"
    with pytest.raises(PolicyError, match="must be one of column, row; is a list"):
        parse("a: [1]").mapping()["a"].one_of(("column", "row"))


def test_unknown_keys_suggest() -> None:
    with pytest.raises(PolicyError) as caught:
        parse("rulez: {}").known_keys(("name", "rules"))
    assert str(caught.value) == "p.yaml:1:1: rulez: is not a known key (did you mean 'rules'?)"
    with pytest.raises(PolicyError) as caught:
        parse("qqq: 1").known_keys(("name", "rules"))
    assert caught.value.hint == "known here: name, rules"


def test_did_you_mean() -> None:
    assert did_you_mean("colunm", ["row", "column"]) == "did you mean 'column'?"
    assert did_you_mean("xyz", ["row", "column"]) is None
    assert did_you_mean(None, ["row"]) is None


# ---------------------------------------------------------------------------------------------- what is refused

BOMB = "a: &a [x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20))

REFUSED = {
    "empty": ("", "p.yaml: is empty (a policy has at least: name, rules)"),
    "only remarks": ("# nothing\n---\n", "p.yaml: is empty"),
    "duplicate key": ("name: a\nname: b\n", "p.yaml:2:1: key 'name' appears twice, first at line 1"),
    "duplicate key within": ("a:\n  b: 1\n  c: 1\n  b: 2\n", "p.yaml:4:3: key 'b' appears twice, first at line 2"),
    "duplicate key, quoted": ("a: 1\n'a': 2\n", "p.yaml:2:1: key 'a' appears twice"),
    "duplicate key in flow": ("r: {a: 1, a: 2}", "p.yaml:1:11: key 'a' appears twice"),
    "octal": ("a: 010", "p.yaml:1:4: a: '010' is not a plain whole number (write it in decimal, or quote it)"),
    "octal in a list": ("a: [1, 010]", "p.yaml:1:8: a[1]: '010' is not a plain whole number"),
    "float": ("a: 2.0", "p.yaml:1:4: a: '2.0' is not a plain whole number"),
    "exponent": ("a: 1e3", "p.yaml:1:4: a: '1e3' is not a plain whole number"),
    "hexadecimal": ("a: 0xff", "p.yaml:1:4: a: '0xff' is not a plain whole number"),
    "sexagesimal": ("a: 12:30", "p.yaml:1:4: a: '12:30' is not a plain whole number"),
    "underscore": ("a: 1_000", "p.yaml:1:4: a: '1_000' is not a plain whole number"),
    "date": ("a: 2026-01-02", "p.yaml:1:4: a: '2026-01-02' is not a plain whole number"),
    "infinite": ("a: .inf", "p.yaml:1:4: a: '.inf' is not a plain whole number"),
    "not a number": ("a: .NaN", "p.yaml:1:4: a: '.NaN' is not a plain whole number"),
    "19 digits": ("a: 1000000000000000000", "is not a plain whole number"),
    "5000 digits": ("a: " + "9" * 5000, "is not a plain whole number"),
    "no": ("a: no", "p.yaml:1:4: a: 'no' means different things in different YAML versions"),
    "Yes": ("a: Yes", "p.yaml:1:4: a: 'Yes' means different things"),
    "on": ("a: on", "p.yaml:1:4: a: 'on' means different things"),
    "null": ("a: null", "p.yaml:1:4: a: 'null' means different things"),
    "True": ("a: True", "p.yaml:1:4: a: 'True' means different things"),
    "bomb": (BOMB, "p.yaml:1:4: anchors and aliases are not allowed in a policy (write it out; quote"),
    "recursive alias": ("a: &a [*a]", "p.yaml:1:4: anchors and aliases are not allowed"),
    "recursive root": ("&a\nb: *a", "p.yaml:1:1: anchors and aliases are not allowed"),
    "anchor": ("a: &x 1", "p.yaml:1:4: anchors and aliases are not allowed"),
    "merge key": ("a: &x {b: 1}\nc:\n  <<: *x", "anchors and aliases are not allowed"),
    "python tag": ("a: !!python/object/apply:os.system ['echo hi']", "p.yaml:1:4: tags and directives are not allowed"),
    "int tag": ("a: !!int '3'", "p.yaml:1:4: tags and directives are not allowed"),
    "own tag": ("a: !x 3", "p.yaml:1:4: tags and directives are not allowed"),
    "directive": ("%YAML 1.1\n---\na: 1", "p.yaml:1:1: tags and directives are not allowed"),
    "10,000 levels in flow": ("a: " + "[" * 10_000, f"nested deeper than {MAX_DEPTH} levels"),
    "10,000 closed levels": ("a: " + "[" * 10_000 + "]" * 10_000, f"nested deeper than {MAX_DEPTH} levels"),
    "10,000 mappings": ("a: " + "{b: " * 10_000, f"nested deeper than {MAX_DEPTH} levels"),
    "10,000 dashes": ("- " * 10_000 + "x", f"nested deeper than {MAX_DEPTH} levels"),
    "10,000 questions": ("? " * 10_000 + "x", f"nested deeper than {MAX_DEPTH} levels"),
    "400 levels in block": ("".join(" " * n + "a:\n" for n in range(400)), f"nested deeper than {MAX_DEPTH} levels"),
    "key is a list": ("[a, b]: 1", "p.yaml:1:1: a key must be text"),
    "key is a mapping": ("{q,k}: column", "a key must be text (quote keys that begin with '{', '[' or '*')"),
    "star key": ("*.dense: column", "but found '.' (write it out; quote a key that begins with '*')"),
    "star key, a word": ("*dense: column", "p.yaml:1:1: anchors and aliases are not allowed"),
    "tab": ("a:\n\tb: 1", "p.yaml:2:1: is not YAML: "),
    "unclosed quote": ("a: 'b", "is not YAML: "),
    "unclosed list": ("a: [1, 2", "is not YAML: "),
    "colon in text": ("a: b: c", "p.yaml:1:5: is not YAML: mapping values are not allowed here"),
    "two roots": ("a: 1\n- 2", "p.yaml:2:1: is not YAML: "),
    "NUL": ("a: b\0c", "p.yaml: is not YAML: "),
    "escape character": ("a: \x1b[31m", "p.yaml: is not YAML: "),
    "lone surrogate": ('a: "\\ud800"', "p.yaml:1:4: '\\ud800' is not Unicode text"),
    "lone surrogate key": ('"\\udc80": 1', "p.yaml:1:1: '\\udc80' is not Unicode text"),
}


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED.keys())
def test_refused(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(PolicyError) as caught:
        parse_documents(text, "p.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("p.yaml")
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


# ---------------------------------------------------------------------------------------------- files


def fails(path: Path, kind: type[TpshardError] = PolicyError) -> str:
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        read_documents(path)
    assert time.monotonic() - begin < 5
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(f"{path}: ")


def test_not_there(tmp_path: Path) -> None:
    assert fails(tmp_path / "p.yaml") == "is not there (built-in policies: tpshard policy list)"


def test_a_folder(tmp_path: Path) -> None:
    assert fails(tmp_path) == "is not a regular file"


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.yaml")
    assert fails(tmp_path / "p.yaml") == "is not a regular file"


def test_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("p.yaml")
        assert fails(tmp_path / "p.yaml") == "is not a regular file"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device(device: str) -> None:
    assert fails(Path(device)) == "is not a regular file"


def test_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").symlink_to("p.yaml")
    assert "symbolic links" in fails(tmp_path / "p.yaml", StorageError)


def test_50_megabytes(tmp_path: Path) -> None:
    with (tmp_path / "p.yaml").open("wb") as file:
        file.truncate(50 * 2**20)
    assert fails(tmp_path / "p.yaml") == f"has {50 * 2**20} bytes, a policy may have {MAX_BYTES}"


def test_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"name: \xff")
    assert fails(tmp_path / "p.yaml") == "is not UTF-8 (byte 6)"


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.yaml").write_text("name: x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert fails(tmp_path / "p.yaml", StorageError) == "Permission denied"


@pytest.mark.slow
@pytest.mark.parametrize("line", ["- a\n", "a{}: b\n", "? a{}\n: b\n", '"a{}": [b, c]\n', "'a{}': 'b'\n", "# r\n"])
def test_the_largest_file_takes_seconds(tmp_path: Path, line: str) -> None:
    """The limit on bytes is what bounds the time; 256 KB of anything must be read or refused soon."""
    text = ""
    for number in range(MAX_BYTES):
        text += line.format(number)
        if len(text) > MAX_BYTES - 50:
            break
    begin = time.monotonic()
    try:
        parse_documents(text, "p.yaml")
    except PolicyError as error:
        assert "is empty" in str(error)
    assert time.monotonic() - begin < 60
