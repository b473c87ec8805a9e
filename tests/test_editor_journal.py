"""The table on disk: undo, crashes, damage, threads; always against a plain model in memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csm_studio.dataset import table_store
from csm_studio.dataset.editor import DatasetEditor, Row
from csm_studio.dataset.table_store import JOURNAL, SNAPSHOT
from csm_studio.errors import DatasetError

ROOT = Path(__file__).parent.parent
WORDS = ("the cat", "The hat", "a\nb", "", "東京 🙂", 'quo"ted\\', "\u2028")


class Model:
    """What the table should be: rows, and all the states before and after."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.past: list[dict[str, Row]] = []
        self.future: list[dict[str, Row]] = []
        self.revision = 0

    def set(self, rows: dict[str, Row]) -> None:
        if rows != self.rows:
            self.past.append(self.rows)
            self.future.clear()
            self.rows = rows
            self.revision += 1

    def change(self, ids: list[str], **values: Any) -> None:
        changed = {i: dataclasses.replace(self.rows[i], **values) for i in ids}
        self.set({**self.rows, **changed})

    def step(self, taken: list[dict[str, Row]], given: list[dict[str, Row]]) -> None:
        if taken:
            given.append(self.rows)
            self.rows = taken.pop()
            self.revision += 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out waiting for the disk, which only power loss would tell."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def new_editor(folder: Path) -> DatasetEditor:
    editor = DatasetEditor(folder).open()
    (folder / "audio" / "a.wav").write_bytes(b"sound")
    return editor


def row(text: str = "", speaker: int = 0) -> Row:
    return Row("", True, text, speaker, 3.0, "a.wav", source="take.wav")


def random_operation(draw: random.Random, editor: DatasetEditor, model: Model) -> None:
    """Do the same to the table and to the model."""
    names = list(model.rows)
    ids = draw.sample(names, min(len(names), draw.randint(1, 3)))
    kinds = ["add", "undo", "undo", "redo", "redo"]
    kinds += ["text", "keep", "speaker", "trim", "delete", "restore", "replace", "second"] * bool(
        ids
    )
    kind = draw.choice(kinds)
    number, text = draw.randint(0, 3), draw.choice(WORDS)
    if kind == "add":
        added = editor.add([row(draw.choice(WORDS), number) for _ in range(draw.randint(1, 3))])
        model.set({**model.rows, **{r.id: r for r in added}})
    elif kind == "undo":
        assert (editor.undo() is None) == (not model.past)
        model.step(model.past, model.future)
    elif kind == "redo":
        assert (editor.redo() is None) == (not model.future)
        model.step(model.future, model.past)
    elif kind == "text":
        editor.set_text(ids[0], text)
        model.change(ids[:1], text=text)
    elif kind == "keep":
        editor.set_keep(ids, bool(number % 2))
        model.change(ids, keep=bool(number % 2))
    elif kind == "speaker":
        editor.set_speaker(ids, number)
        model.change(ids, speaker=number)
    elif kind == "trim":
        start_s, end_s = number / 7, 1 + number / 3
        editor.trim(ids[0], start_s, end_s)
        model.change(ids[:1], start_s=start_s, end_s=end_s)
    elif kind in ("delete", "restore"):
        (editor.delete if kind == "delete" else editor.restore)(ids)
        model.change(ids, deleted=kind == "delete")
    elif kind == "replace":
        editor.replace_text("at", "og", match_case=True)
        model.set(
            {
                i: r if r.deleted else dataclasses.replace(r, text=r.text.replace("at", "og"))
                for i, r in model.rows.items()
            }
        )
    else:
        editor.set_second(dict.fromkeys(ids, (text, number / 3)))
        model.change(ids, second_text=text, disagreement=number / 3)


def assert_like(editor: DatasetEditor, model: Model) -> None:
    assert editor.rows(include_deleted=True) == list(model.rows.values())
    assert editor.revision == model.revision
    assert (editor.can_undo is None) == (not model.past)
    assert (editor.can_redo is None) == (not model.future)


def assert_history_like(editor: DatasetEditor, model: Model) -> None:
    """All the way back and forth again."""
    num_steps = len(model.past)
    for move, taken, given in (
        (editor.undo, model.past, model.future),
        (editor.redo, model.future, model.past),
    ):
        while taken:
            assert move() is not None
            model.step(taken, given)
            assert editor.rows(include_deleted=True) == list(model.rows.values())
        assert move() is None
    for _ in range(len(model.past) - num_steps):
        assert editor.undo() is not None
        model.step(model.past, model.future)
    assert_like(editor, model)


def crash_copies(folder: Path) -> Callable[[], Path]:
    """Return a function that copies the files of an open table as a crash would leave them."""
    numbers = itertools.count()

    def copy() -> Path:
        target = folder.with_name(f"{folder.name}-{next(numbers)}")
        shutil.copytree(folder, target)
        return target

    return copy


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", range(8))
def test_random_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw, model = random.Random(seed), Model()
    monkeypatch.setattr(table_store, "SNAPSHOT_EVERY", draw.choice((1, 3, 10, 1000)))
    editor = new_editor(tmp_path / "d")
    copy = crash_copies(tmp_path / "d")
    for step in range(100):
        random_operation(draw, editor, model)
        assert_like(editor, model)
        if draw.random() < 0.1:
            with DatasetEditor(copy()) as crashed:
                assert_like(crashed, model)
        if draw.random() < 0.1:
            editor.close()
            editor.open()
            assert_like(editor, model)
        if step % 40 == 39:
            assert_history_like(editor, model)
    editor.close()
    (editor.folder / SNAPSHOT).unlink()
    with editor:
        assert_like(editor, model)
        assert_history_like(editor, model)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("every", [13, 1000])
def test_a_journal_cut_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(table_store, "SNAPSHOT_EVERY", every)
    draw, model = random.Random(1), Model()
    editor = new_editor(tmp_path / "d")
    editor.add([row("x")])
    model.set({r.id: r for r in editor.rows()})
    states = {0: [], 1: list(model.rows.values())}
    while model.revision < 12:
        random_operation(draw, editor, model)
        states[model.revision] = list(model.rows.values())
    first = editor.rows(True)[0].id
    editor.set_text(first, "東")
    states[13] = editor.rows(True)
    editor.undo()
    states[14] = states[12]
    source = crash_copies(tmp_path / "d")()
    monkeypatch.setattr(table_store, "SNAPSHOT_EVERY", 1000)
    content = (source / JOURNAL).read_bytes()
    saved = json.loads((source / SNAPSHOT).read_text())["revision"] if every == 13 else 0
    assert saved in (0, 13)
    ends = [0, *(place + 1 for place, byte in enumerate(content) if byte == ord("\n"))]
    seen = set()
    for cut in range(ends[-3], len(content) + 1):
        (source / JOURNAL).write_bytes(content[:cut])
        work = tmp_path / "work"
        shutil.copytree(source, work)
        revision = max(saved, sum(end <= cut for end in ends) - 1)
        seen.add(revision)
        with DatasetEditor(work) as opened:
            assert (opened.revision, opened.rows(True)) == (revision, states[revision])
            opened.set_text(first, f"after {cut}")
            after = opened.rows(True)
            opened.undo()
            assert opened.rows(True) == states[revision]
            opened.redo()
        with DatasetEditor(work) as opened:
            assert (opened.revision, opened.rows(True)) == (revision + 3, after)
        shutil.rmtree(work)
    assert seen == ({13, 14} if saved else {12, 13, 14})


@pytest.mark.usefixtures("quick")
def test_lines_lost_behind_the_snapshot_cost_the_history_alone(tmp_path: Path) -> None:
    with new_editor(tmp_path) as editor:
        editor.add([row("one"), row("two")])
        editor.set_text("c1", "three")
    (tmp_path / JOURNAL).write_bytes((tmp_path / JOURNAL).read_bytes()[:-1])
    for _ in range(2):
        with DatasetEditor(tmp_path) as editor:
            assert [r.text for r in editor.rows()] == ["three", "two"]
            assert editor.can_undo is None
    assert (tmp_path / "journal-old-1.jsonl").exists()
    with DatasetEditor(tmp_path) as editor:
        editor.set_text("c1", "four")
        editor.undo()
        assert editor.rows()[0].text == "three"


@pytest.mark.usefixtures("quick")
def test_a_journal_of_another_copy_is_set_aside(tmp_path: Path) -> None:
    with new_editor(tmp_path / "d") as editor:
        editor.add([row("one")])
    shutil.copytree(tmp_path / "d", tmp_path / "other")
    for folder, texts in (("d", ["mine"]), ("other", ["long " * 20, "x", "y"])):
        with DatasetEditor(tmp_path / folder) as editor:
            for text in texts:
                editor.set_text("c1", text)
    shutil.copy(tmp_path / "other" / JOURNAL, tmp_path / "d" / JOURNAL)
    with DatasetEditor(tmp_path / "d") as editor:
        assert (editor.rows()[0].text, editor.can_undo) == ("mine", None)
    assert len((tmp_path / "d" / "journal-old-1.jsonl").read_text().splitlines()) == 4


def test_an_edit_is_on_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    wait = os.fsync

    def watched(handle: int) -> None:
        synced.append((tmp_path / JOURNAL).read_text())
        wait(handle)

    with new_editor(tmp_path) as editor:
        editor.add([row("one")])
        monkeypatch.setattr(os, "fsync", watched)
        editor.set_text("c1", "two")
        assert '"two"' in synced[-1]
        editor.undo()
        assert '"undo"' in synced[-1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("tail", [b"\0" * 40, b"\0" * 40 + b"\n", b'{"n": 3, "do"\n', b"\xff\n"])
def test_a_last_line_torn_by_power_loss_is_dropped(tmp_path: Path, tail: bytes) -> None:
    with new_editor(tmp_path) as editor:
        editor.add([row("one")])
        editor.set_text("c1", "two")
    with (tmp_path / JOURNAL).open("ab") as stream:
        stream.write(tail)
    with DatasetEditor(tmp_path) as editor:
        assert (editor.rows()[0].text, editor.revision) == ("two", 2)
        editor.set_text("c1", "three")
    (tmp_path / SNAPSHOT).unlink()
    with DatasetEditor(tmp_path) as editor:
        assert (editor.rows()[0].text, editor.revision) == ("three", 3)


@pytest.mark.usefixtures("quick")
def test_damage_is_named(tmp_path: Path) -> None:
    with new_editor(tmp_path) as editor:
        editor.add([row("one")])
        editor.set_text("c1", "two")
        editor.set_text("c1", "three")
    snapshot, content = (tmp_path / SNAPSHOT).read_text(), (tmp_path / JOURNAL).read_bytes()
    lines = content.splitlines(keepends=True)

    def refused(message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            DatasetEditor(tmp_path).open()

    for damaged in ("", "{", "[]", '{"format": 2}', snapshot.replace('"text"', '"words"')):
        (tmp_path / SNAPSHOT).write_text(damaged)
        refused(r"rows\.json: cannot be read")
    (tmp_path / SNAPSHOT).unlink()
    (tmp_path / JOURNAL).write_bytes(b"".join([lines[0], b"{\n", lines[2]]))
    refused(rf"journal\.jsonl: is damaged at byte {len(lines[0])}")
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[1:]))
    refused("not operation 1")
    (tmp_path / JOURNAL).write_bytes(
        b"".join([lines[0], lines[1].replace(b'"c1"', b'"c9"'), lines[2]])
    )
    refused("cannot be followed")
    (tmp_path / SNAPSHOT).write_text(snapshot)
    (tmp_path / JOURNAL).write_bytes(content.replace(b'"two"', b'"tw\xff"', 1))
    with DatasetEditor(tmp_path) as editor:
        assert editor.rows()[0].text == "three"
        assert editor.undo() == "Edit text"
        with pytest.raises(DatasetError, match="is damaged"):
            editor.undo()


@pytest.mark.parametrize("can_truncate", [True, False])
def test_a_full_disk_refuses_the_edit_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_truncate: bool
) -> None:
    editor = new_editor(tmp_path / "d")
    editor.add([row("one")])
    write = os.pwrite

    def write_half(handle: int, content: Any, position: int) -> int:
        if len(content) > 20:
            return write(handle, content[:20], position)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", write_half)
        if not can_truncate:
            broken.setattr(os, "ftruncate", lambda *_: write_half(0, b"", 0))
        for _ in range(2):
            with pytest.raises(DatasetError, match="No space left on device"):
                editor.set_text("c1", "lost " * 20)
    assert (editor.rows()[0].text, editor.revision) == ("one", 1)
    editor.set_text("c1", "two")
    shutil.copytree(tmp_path / "d", tmp_path / "crashed")
    editor.close()
    for folder in ("d", "crashed"):
        with DatasetEditor(tmp_path / folder) as editor:
            assert (editor.rows()[0].text, editor.revision) == ("two", 2)


def test_an_edit_that_the_disk_did_not_take_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    editor = new_editor(tmp_path / "d")
    editor.add([row("one")])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(DatasetError, match="Input/output error"):
            editor.set_text("c1", "two")
    shutil.copytree(tmp_path / "d", tmp_path / "crashed")
    with DatasetEditor(tmp_path / "crashed") as crashed:
        assert crashed.rows() == editor.rows()
        assert crashed.rows()[0].text == "one"
    editor.close()


@pytest.mark.usefixtures("quick")
def test_a_snapshot_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_store, "SNAPSHOT_EVERY", 1)
    monkeypatch.setattr(table_store, "write_text", fail)
    with new_editor(tmp_path) as editor:
        editor.add([row("one")])
        editor.set_text("c1", "two")
    with DatasetEditor(tmp_path) as editor:
        assert (editor.rows()[0].text, editor.can_undo) == ("two", "Edit text")


def test_a_table_is_open_once(tmp_path: Path) -> None:
    with new_editor(tmp_path) as editor:
        assert editor.open() is editor
        for _ in range(2):
            with pytest.raises(DatasetError, match="open elsewhere"):
                DatasetEditor(tmp_path).open()
        editor.add([row("one")])
    with DatasetEditor(tmp_path) as editor:
        assert len(editor.rows()) == 1


@pytest.mark.usefixtures("quick")
def test_a_thousand_operations_can_be_undone_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_edits = 1_100
    with new_editor(tmp_path) as editor:
        editor.add([row("0")])
        for number in range(1, num_edits):
            editor.set_text("c1", str(number))
    with DatasetEditor(tmp_path) as editor:
        for number in reversed(range(num_edits)):
            assert editor.rows()[0].text == str(number)
            editor.undo()
        assert editor.rows() == []
    monkeypatch.setattr(table_store, "HISTORY_LENGTH", 5)
    with DatasetEditor(tmp_path) as editor:
        for _ in range(8):
            editor.redo()
        assert editor.rows()[0].text == "7"
        assert [editor.undo() is not None for _ in range(6)] == [True] * 5 + [False]


@pytest.mark.usefixtures("quick")
def test_a_large_change_is_followed_by_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_store, "SNAPSHOT_EVERY_BYTES", 1_000)
    with new_editor(tmp_path) as editor:
        editor.add([row("one")])
        assert not (tmp_path / SNAPSHOT).exists()
        editor.set_text("c1", "x" * 1_000)
        assert json.loads((tmp_path / SNAPSHOT).read_text())["revision"] == 2


@pytest.mark.usefixtures("quick")
def test_threads_lose_nothing(tmp_path: Path) -> None:
    num_threads, num_edits = 4, 100
    editor = new_editor(tmp_path)
    editor.add([row("same") for _ in range(num_threads + 1)])
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        field = ("text", "second_text", "conversation", "source")[thread]
        try:
            for number in range(1, num_edits + 1):
                editor.set_text(f"c{thread + 1}", f"{thread} {number}")
                editor.apply({"c5": {field: f"{thread} {number}"}}, "Edit")
                assert len(editor.view(search=f"{thread} {number}")) >= 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    editor.close()
    with editor:
        rows = editor.rows()
        assert [r.text for r in rows[:4]] == [f"{n} {num_edits}" for n in range(num_threads)]
        assert (rows[4].text, rows[4].second_text) == (f"0 {num_edits}", f"1 {num_edits}")
        assert (rows[4].conversation, rows[4].source) == (f"2 {num_edits}", f"3 {num_edits}")
        assert editor.revision == 1 + 2 * num_threads * num_edits
        while editor.can_undo:
            editor.undo()
        assert editor.rows() == []


BURST = """
import itertools, sys
from pathlib import Path
from csm_studio.dataset import table_store
from csm_studio.dataset.editor import DatasetEditor
table_store.SNAPSHOT_EVERY = 7
editor = DatasetEditor(Path(sys.argv[1])).open()
for number in itertools.count(1):
    editor.set_text(f"c{number % 5 + 1}", f"edit {number}")
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("num_edits", [1, 20, 53])
def test_kill_9_in_a_burst_of_edits_loses_none_that_returned(
    tmp_path: Path, num_edits: int
) -> None:
    with new_editor(tmp_path) as editor:
        editor.add([row(f"clip {n}") for n in range(5)])
    burst = subprocess.Popen(
        [sys.executable, "-c", BURST, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert burst.stdout is not None
    for _ in range(num_edits):
        burst.stdout.readline()
    burst.send_signal(signal.SIGKILL)
    said = [num_edits, *map(int, burst.stdout.read().split())]
    burst.wait()
    burst.stdout.close()
    with DatasetEditor(tmp_path) as editor:
        last = editor.revision - 1
        # The edit under way may be there or not.
        assert last in (said[-1], said[-1] + 1)
        for n in range(5):
            numbers = [number for number in range(1, last + 1) if number % 5 == n]
            text = f"edit {numbers[-1]}" if numbers else f"clip {n}"
            assert editor.get(f"c{n + 1}").text == text
        for _ in range(last):
            assert editor.undo() == "Edit text"
        assert [r.text for r in editor.rows()] == [f"clip {n}" for n in range(5)]
