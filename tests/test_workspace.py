"""The workspace: folders, the lock, projects, and ids from a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from csm_studio import locks
from csm_studio.errors import WorkspaceError
from csm_studio.locks import process_is_alive, process_started
from csm_studio.workspace import LOCK_NAME, Project, Workspace

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from csm_studio.workspace import Workspace
Workspace(Path(sys.argv[1])).open()
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    with Workspace(tmp_path / "work") as opened:
        yield opened


@pytest.fixture
def project(workspace: Workspace) -> Project:
    """A project with one of everything."""
    made = workspace.create_project("Mine")
    (made.runs / "lora-1").mkdir()
    (made.runs / "lora-1" / "lora_ckpt_epoch_1.safetensors").write_bytes(b"weights")
    (made.exports / "voice").mkdir()
    (made.generations / "g1.wav").write_bytes(b"sound")
    (made.audio / "c1 (ä).wav").write_bytes(b"sound")
    (made.originals / "take.m4a").write_bytes(b"sound")
    return made


def test_nothing_is_made_before_it_is_opened(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "new")
    assert workspace.projects() == []
    assert workspace.disk_free_bytes() > 0
    with pytest.raises(WorkspaceError, match="not open"):
        workspace.create_project("Mine")
    assert list(tmp_path.iterdir()) == []


def test_opening_makes_the_folders_and_closing_frees_them(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "new"
    with Workspace(root) as workspace:
        assert (root / LOCK_NAME).exists()
        for folder in (workspace.projects_dir, workspace.trash, workspace.temporary):
            assert folder.is_dir()
            assert folder.is_relative_to(root)
    assert not (root / LOCK_NAME).exists()


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_file_is_no_workspace(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkspaceError, match="Choose another folder"):
        Workspace(tmp_path / below).open()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locks, "write_json", refuse)
    with pytest.raises(WorkspaceError, match=r"cannot be written to \(Permission denied\)"):
        Workspace(tmp_path).open()


def test_a_folder_whose_projects_are_a_file_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "projects").write_text("mine")
    with pytest.raises(WorkspaceError, match="cannot be written to"):
        Workspace(tmp_path).open()
    assert not (tmp_path / LOCK_NAME).exists()


def test_another_process_is_refused_until_it_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(WorkspaceError, match=f"process {holder.pid}"):
            Workspace(tmp_path).open()
        holder.send_signal(signal.SIGKILL)
        # Not waited for: what is left is a zombie, which still has the number.
        while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        with Workspace(tmp_path) as workspace:
            assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
            assert workspace.projects() == []
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_number_given_to_another_process_is_told_apart(tmp_path: Path) -> None:
    parent = psutil.Process(os.getppid())
    held = {"pid": parent.pid, "process_started": parent.create_time(), "num_opens": 1}
    (tmp_path / LOCK_NAME).write_text(json.dumps(held))
    with pytest.raises(WorkspaceError, match="is open in another window"):
        Workspace(tmp_path).open()
    held["process_started"] -= 100
    (tmp_path / LOCK_NAME).write_text(json.dumps(held))
    with Workspace(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "num_opens": 1}'])
def test_a_damaged_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with Workspace(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_the_same_process_may_open_twice(tmp_path: Path) -> None:
    first, second = Workspace(tmp_path).open(), Workspace(tmp_path).open()
    assert first.open() is first
    first.close()
    first.close()
    assert (tmp_path / LOCK_NAME).exists(), "the second is still open"
    second.close()
    assert not (tmp_path / LOCK_NAME).exists()


def test_alive() -> None:
    assert process_is_alive(os.getpid(), process_started())
    assert not process_is_alive(os.getpid(), process_started() - 100)
    assert not process_is_alive(None, process_started())
    assert not process_is_alive(-1, 0.0)
    assert not process_is_alive(10**30, 0.0)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("My voice", "my-voice"),
        ("  Ärger & Söhne! ", "arger-sohne"),
        ("日本語", "project"),
        ("../../etc", "etc"),
        ("snake_case-2", "snake_case-2"),
        ("x" * 200, "x" * 64),
    ],
)
def test_a_project_is_named_after_its_title(workspace: Workspace, title: str, name: str) -> None:
    made = [workspace.create_project(title) for _ in range(3)]
    assert made[0].name == name
    assert len({project.name for project in made}) == 3
    for project in made:
        assert re.fullmatch(r"[a-z0-9_-]{1,64}", project.name)
        assert project.title == " ".join(title.split())
        assert workspace.project(project.name) == project
        for folder in (project.originals, project.audio, project.runs, project.generations):
            assert folder.is_dir()
    assert workspace.projects() == made


@pytest.mark.parametrize("title", ["", " \n", "a\0b", "\ud800", "x" * 201, None])
def test_titles_that_are_refused(workspace: Workspace, title: Any) -> None:
    with pytest.raises(WorkspaceError, match="title"):
        workspace.create_project(title)
    assert workspace.projects() == []


def test_threads_that_make_the_same_project_each_get_one(workspace: Workspace) -> None:
    made: list[Project] = []
    run = lambda: made.append(workspace.create_project("Same"))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({project.name for project in made}) == 8
    assert sorted(p.name for p in workspace.projects()) == sorted(p.name for p in made)


def test_renaming_changes_the_title_alone(workspace: Workspace, project: Project) -> None:
    renamed = workspace.rename_project(project.name, "Other  title")
    assert renamed == Project(project.folder, "Other title", project.created_at)
    assert workspace.projects() == [renamed]


def test_deleting_keeps_everything_in_the_trash(workspace: Workspace, project: Project) -> None:
    gone = workspace.delete_project(project.name)
    assert gone.parent == workspace.trash
    assert gone.name.startswith("mine-20")
    assert (gone / "generations" / "g1.wav").read_bytes() == b"sound"
    assert workspace.projects() == []
    again = workspace.create_project("Mine")
    assert again.name == "mine"
    assert workspace.delete_project("mine") != gone
    with pytest.raises(WorkspaceError, match="not found"):
        workspace.delete_project("mine")


def test_a_lost_manifest_does_not_hide_the_project(workspace: Workspace, project: Project) -> None:
    for content in ("", "[]", '{"title": 3}'):
        (project.folder / "project.json").write_text(content)
        assert workspace.projects() == [Project(project.folder, "mine", "")]
    assert workspace.rename_project("mine", "Found").title == "Found"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../mine", "mine/..", "/etc", "Mine", "mi\0ne", "x" * 65, "mine\n", 7]
)
def test_project_names_that_are_refused(workspace: Workspace, project: Project, name: Any) -> None:
    for method in (workspace.project, workspace.delete_project):
        with pytest.raises(WorkspaceError):
            method(name)
    assert workspace.projects() == [project]


def test_a_link_is_no_project(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (workspace.projects_dir / "link").symlink_to(tmp_path / "elsewhere")
    assert workspace.projects() == []
    with pytest.raises(WorkspaceError, match="not found"):
        workspace.project("link")


def test_folders_of_runs_and_exports_are_dated_and_counted(project: Project) -> None:
    runs = [project.new_run_dir("lora") for _ in range(3)]
    start = runs[0].name[:-1]
    assert re.fullmatch(r"lora-\d{4}-\d\d-\d\d-", start)
    assert [run.name for run in runs] == [f"{start}{n}" for n in (1, 2, 3)]
    runs[0].rmdir()
    assert project.new_run_dir("lora").name == f"{start}4"
    export = project.new_export_dir("My Voice/../x")
    assert re.fullmatch(r"my-voice-x-\d{4}-\d\d-\d\d-1", export.name)
    assert export.parent == project.exports
    assert project.resolve("export", export.name) == export


def test_ids_lead_to_their_files(project: Project) -> None:
    weights = "lora_ckpt_epoch_1.safetensors"
    assert project.resolve("run", "lora-1") == project.runs / "lora-1"
    assert project.resolve("export", "voice") == project.exports / "voice"
    assert project.resolve("generation", "g1") == project.generations / "g1.wav"
    assert project.resolve("clip", "c1 (ä).wav") == project.audio / "c1 (ä).wav"
    assert project.resolve("original", "take.m4a") == project.originals / "take.m4a"
    found = project.resolve("checkpoint", weights, run="lora-1")
    assert found == project.runs / "lora-1" / weights
    with pytest.raises(WorkspaceError, match="name the run"):
        project.resolve("checkpoint", weights)
    with pytest.raises(WorkspaceError, match="no name of a file"):
        project.resolve("checkpoint", weights, run="../runs/lora-1")


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export", "generation", "clip", "original"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "../project.json",
            "/etc/passwd",
            "a/b",
            "a\\b",
            ".hidden",
            "a\0",
            "\ud800",
        ),
        *("missing", "x" * 254, "é" * 200, "a\nb", None, 3, ["a"]),
    ],
)
def test_ids_that_are_refused(project: Project, kind: Any, name: Any) -> None:
    with pytest.raises(WorkspaceError):
        project.resolve(kind, name, run="lora-1")


def test_a_file_is_no_run_and_a_folder_no_clip(project: Project) -> None:
    (project.runs / "file").write_text("")
    (project.audio / "folder").mkdir()
    for kind, name in (("run", "file"), ("clip", "folder")):
        with pytest.raises(WorkspaceError, match="not found"):
            project.resolve(kind, name)  # type: ignore[arg-type]


def test_links_that_leave_are_refused(workspace: Workspace, project: Project) -> None:
    other = workspace.create_project("Other")
    (other.audio / "theirs.wav").write_bytes(b"sound")
    links = {
        "out.wav": workspace.root / LOCK_NAME,
        "theirs.wav": other.audio / "theirs.wav",
        "manifest.wav": project.folder / "project.json",
        "circle.wav": project.audio / "circle.wav",
    }
    for name, target in links.items():
        (project.audio / name).symlink_to(target)
        with pytest.raises(WorkspaceError):
            project.resolve("clip", name)
    (project.audio / "same.wav").symlink_to("c1 (ä).wav")
    assert project.resolve("clip", "same.wav").read_bytes() == b"sound"
    (project.runs / "far").symlink_to(other.folder, target_is_directory=True)
    with pytest.raises(WorkspaceError, match="link"):
        project.resolve("run", "far")
    shutil.rmtree(project.exports)
    (other.exports / "voice").mkdir()
    project.exports.symlink_to(other.exports, target_is_directory=True)
    with pytest.raises(WorkspaceError, match="link"):
        project.resolve("export", "voice")


def test_a_workspace_can_be_moved_and_reached_by_a_link(tmp_path: Path) -> None:
    with Workspace(tmp_path / "here") as workspace:
        made = workspace.create_project("Mine")
        (made.audio / "c1.wav").write_bytes(b"sound")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    for root in ("there", "link"):
        with Workspace(tmp_path / root) as workspace:
            (project,) = workspace.projects()
            assert (project.title, project.created_at) == ("Mine", made.created_at)
            assert project.resolve("clip", "c1.wav").read_bytes() == b"sound"
