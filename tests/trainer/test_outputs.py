"""A run's folder: one run writes into it, and nothing of another run or a person is touched."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foreign_files import NAMES, Foreign
from root import ROOT

from trainer.lock import HANDED_DOWN, FolderRefused, Lock
from trainer.monitor import preview_images, trackers
from trainer.old_runs import KEPT_RUNS, KEPT_SECONDS
from trainer.outputs import Run, open_run
from trainer.result import report
from trainer.run_files import REPORT, SAMPLES, TRACKERS

DATASET = Path("robot.zip")

# A process that opens a run as its argument says, tells how, and holds it until it is killed or its
# standard input ends.
HOLDER = """
import json, sys
from pathlib import Path
from trainer.lock import FolderRefused
from trainer.outputs import open_run
given = {k: Path(v) for k, v in json.loads(sys.argv[1]).items()}
sys.stdin.readline()
try:
    with open_run(Path("robot.zip"), **given) as run:
        run.describe({})
        print(run.folder, flush=True)
        sys.stdin.read()
except FolderRefused as error:
    print("refused:", error, flush=True)
"""


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("trainer.lock.PATIENCE", 0.1)  # of this process; the others keep theirs
    return folder


@pytest.fixture
def holders() -> Iterator[Any]:
    """Starts processes that run `HOLDER`; all are ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(pass_fd: int | None = None, **given: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        fds = () if pass_fd is None else (pass_fd,)
        if pass_fd is not None:
            environment[HANDED_DOWN] = str(pass_fd)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=fds,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def reported(process: "subprocess.Popen[str]") -> str:
    """What a holder says once it may go."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def finish(run: Run, **facts: Any) -> Path:
    """A run that ends with a result."""
    with run:
        run.describe(facts)
        run.weights.write_bytes(b"weights")
        run.complete()
    return run.folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(each.relative_to(folder)): each.read_bytes()
        for each in sorted(folder.rglob("*"))
        if each.is_file()
    }


def age(folder: Path, seconds: float) -> None:
    """Makes a folder and its files older."""
    for each in (*folder.iterdir(), folder):
        os.utime(each, (time.time() - seconds,) * 2, follow_symlinks=False)


# ---- A given folder ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("file/x/y", "Not a directory"),
        ("circle", "loop"),
        ("circle/x", "loop"),
        ("x" * 300, "File name too long"),
        ("a/" * 3000, "File name too long"),
    ],
    ids=["below a file", "circle", "below a circle", "long name", "long path"],
)
def test_a_folder_that_cannot_be_made_is_refused_by_name(folder: str, said: str) -> None:
    Path("file").write_text("mine")
    Path("circle").symlink_to("circle")
    with pytest.raises(FolderRefused, match=rf"output_dir: .* cannot be created \(.*{said}"):
        open_run(DATASET, Path(folder))
    assert sorted(each.name for each in Path().iterdir()) == ["circle", "file"]


@pytest.mark.parametrize("place", ["checkpoints", "samples/x", "trackers/a/b", "hub-upload/x"])
def test_a_run_is_not_made_among_the_files_of_another(place: str, tmp_path: Path) -> None:
    """`publish` and a server remove some of these folders whole."""
    finish(open_run(DATASET, Path("one")))
    Path("link").symlink_to("one", target_is_directory=True)
    for folder in (Path("one") / place, Path("link") / place, Path("one").resolve() / place):
        with pytest.raises(FolderRefused, match=f"is in {place.partition('/')[0]} of another run"):
            open_run(DATASET, folder)
    assert not (Path("one") / place).exists()
    finish(open_run(DATASET, Path("one/other")))  # beside them


# ---- A new folder --------------------------------------------------------------------------------


def test_every_run_gets_a_new_folder_named_by_date_dataset_and_number() -> None:
    day = time.strftime("%Y-%m-%d")
    folders = [finish(open_run(Path("data/robot.tar.gz"))) for _ in range(3)]
    assert folders == [Path(f"outputs/{day}-robot-{number}") for number in ("01", "02", "03")]
    Path(f"outputs/{day}-robot-41").mkdir()
    assert finish(open_run(DATASET)).name == f"{day}-robot-42"
    assert finish(open_run(DATASET, name="fox_2")).name == f"{day}-fox_2-01"


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("my dog!.zip", "my-dog"),
        ("Füchse.ZIP", "Fuchse"),
        ("../../etc/passwd", "passwd"),
        ("v1.5", "v1-5"),
        ("ねこ.zip", "run"),
        ("/tmp/tmp2bmhl87mfile", "run"),
        ("/tmp/tmp_bmhl87m.zip", "run"),
        ("..", "tmp"),
        ("--help.zip", "help"),
        ("\x1b[31mred\n.zip", "31mred"),
        ("x" * 300 + ".zip", "x" * 40),
    ],
)
def test_the_datasets_name_becomes_a_safe_folder_name(
    dataset: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if dataset == "..":
        name = tmp_path.name.replace("_", "-")[:40].strip("-")
    folder = finish(open_run(Path(dataset)))
    assert folder.parent == Path("outputs")
    assert folder.name == f"{time.strftime('%Y-%m-%d')}-{name}-01"


def test_runs_that_start_at_once_get_a_folder_each(holders: Any) -> None:
    started = [holders() for _ in range(6)]
    for process in started:
        process.stdin.write("\n")
    for process in started:
        process.stdin.flush()
    folders = {process.stdout.readline().strip() for process in started}
    assert len(folders) == 6
    assert all(folder.startswith("outputs/") for folder in folders)


def test_where_the_working_folder_cannot_be_written_the_log_says_where_the_result_goes(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    working_folder.chmod(0o555)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # for root everything is writable
    folder = finish(open_run(DATASET))
    monkeypatch.undo()
    assert not folder.is_relative_to(working_folder)
    assert (folder / "weights.zip").is_file()
    assert str(folder.parent) in caplog.text
    assert list(working_folder.iterdir()) == []


def test_outputs_that_is_no_folder_is_named() -> None:
    Path("outputs").write_text("mine")
    with pytest.raises(FolderRefused, match="outputs is not a folder; move it away"):
        open_run(DATASET)
    assert Path("outputs").read_text() == "mine"


# ---- A folder of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "weights.zip",
        "weights-unchecked.zip",
        "weights-failed.zip",
        "report.html",
        "report-failed.html",
        "checkpoints/step-000003.safetensors",
        "checkpoints/step-1000000.safetensors",
        "samples/sheet.png",
        "samples/step-000000/00.png",
        "hub-upload/README.md",
    ],
)
def test_a_folder_that_holds_another_run_is_refused_by_name(name: str) -> None:
    file = Path("out", name)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"theirs")
    with pytest.raises(FolderRefused) as error:
        open_run(DATASET, Path("out"))
    assert str(error.value).startswith(
        f"out contains {name.rsplit('/00.png')[0]}".split("/README")[0]
    )
    assert "choose another output_dir" in str(error.value)
    assert files_in(Path("out")) == {name: b"theirs"}  # and no lock is left


def test_the_refusal_says_how_to_continue_the_other_run() -> None:
    with open_run(DATASET, Path("out")) as run:
        run.describe({})
        run.checkpoints.mkdir()
        (run.checkpoints / "step-000003.safetensors").touch()
    with pytest.raises(FolderRefused, match="or continue .* resume_from: out/checkpoints"):
        open_run(DATASET, Path("out"))
    done = finish(open_run(DATASET, Path("done")))
    with pytest.raises(FolderRefused, match="resume_from: done/weights.zip"):
        open_run(DATASET, done)
    with pytest.raises(FolderRefused, match="choose another output_dir"):  # its own would be lost
        open_run(DATASET, done, resume_from=done / "weights.zip")


@pytest.mark.parametrize("name", ["checkpoints", "samples", "trackers"])
def test_a_file_in_the_place_of_a_folder_is_refused(name: str) -> None:
    Path("out").mkdir()
    Path("out", name).write_text("mine")
    with pytest.raises(FolderRefused, match=f"out/{name} is not a folder"):
        open_run(DATASET, Path("out"))


def test_an_output_dir_that_is_a_file_is_refused() -> None:
    Path("out").write_text("mine")
    with pytest.raises(FolderRefused, match="out is not a folder"):
        open_run(DATASET, Path("out"))
    with pytest.raises(FolderRefused, match="output_dir: .* cannot be created .Not a directory"):
        open_run(DATASET, Path("out/in"))


def test_other_files_in_the_folder_are_fine_and_stay(tmp_path: Path) -> None:
    foreign = Foreign(Path("out"), tmp_path / "photos")
    finish(open_run(DATASET, Path("out")))
    foreign.assert_untouched()
    with pytest.raises(FolderRefused):
        open_run(DATASET, Path("out"))
    foreign.assert_untouched()
    assert len(files_in(Path("out"))) == len(NAMES) + 3  # lock, run.json, weights


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    """So that a run stays where it began, should `outputs/latest` move on."""
    Path("link").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk").mkdir()
    with open_run(DATASET, Path("link")) as run:
        assert run.folder == tmp_path / "disk"


@pytest.mark.parametrize("lock", [b"#!/bin/sh\n", b"[]", b"{}", b"4711\n"])
def test_a_run_lock_of_another_program_is_left_alone(lock: bytes) -> None:
    Path("out").mkdir()
    Path("out/run.lock").write_bytes(lock)
    with pytest.raises(FolderRefused, match="out/run.lock was not created by zeroprior"):
        open_run(DATASET, Path("out"))
    assert Path("out/run.lock").read_bytes() == lock


def test_a_lock_behind_a_link_is_refused() -> None:
    Path("out").mkdir()
    Path("mine").write_text("mine")
    Path("out/run.lock").symlink_to(Path("mine").resolve())
    with pytest.raises(FolderRefused, match="out/run.lock is a link"):
        open_run(DATASET, Path("out"))
    assert Path("mine").read_text() == "mine"


# ---- The lock ------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_with_the_process_that_holds_it(
    holders: Any,
) -> None:
    holder = holders(output_dir="out")
    assert reported(holder) == "out"
    start = time.monotonic()
    with pytest.raises(FolderRefused, match=f"out is in use .*process {holder.pid} on .*, since"):
        open_run(DATASET, Path("out"))
    assert time.monotonic() - start < 2
    assert holder.poll() is None


def test_of_runs_that_start_at_once_in_one_folder_all_but_one_are_refused(holders: Any) -> None:
    started = [holders(output_dir="out") for _ in range(5)]
    for process in started:
        process.stdin.write("\n")
    for process in started:
        process.stdin.flush()
    said = sorted(process.stdout.readline().strip() for process in started)
    assert said[0] == "out"
    assert all(line.startswith("refused: out is in use") for line in said[1:])


def test_the_lock_is_free_as_soon_as_its_holder_is_killed(holders: Any) -> None:
    """And a run that had saved nothing yet can be started again in its folder."""
    holder = holders(output_dir="out")
    assert reported(holder) == "out"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert Path("out/run.json").is_file()
    with open_run(DATASET, Path("out")):
        assert not Path("out/run.json").exists()


def test_within_one_process_a_folder_is_held_once_too() -> None:
    with open_run(DATASET, Path("out")):
        with pytest.raises(FolderRefused, match=f"process {os.getpid()} "):
            open_run(DATASET, Path("out"))
    with open_run(DATASET, Path("out")):
        pass


def test_a_moment_of_asking_does_not_get_in_the_way(holders: Any) -> None:
    """Whoever only asks for the state holds the lock for an instant."""
    Path("out").mkdir()
    asks = Lock.take(Path("out"))
    process = holders(output_dir="out")
    process.stdin.write("\n")
    process.stdin.flush()
    time.sleep(0.1)
    asks.remove()
    asks.release()
    assert process.stdout.readline().strip() == "out"
    with pytest.raises(FolderRefused, match=f"process {process.pid}"):
        Lock.take(Path("out"))


def test_a_lock_is_handed_down_to_a_child_without_a_moment_in_between(holders: Any) -> None:
    Path("out").mkdir()
    Path("out/run.json").write_text('{"program": "zeroprior", "queued": true}')
    lock = Lock.take(Path("out"))
    child = holders(lock._fd, output_dir="out")
    os.close(lock._fd)  # the parent's; never freed
    with pytest.raises(FolderRefused, match="in use"):  # also before the child has begun
        Lock.take(Path("out"))
    assert reported(child) == "out"
    with pytest.raises(FolderRefused, match=f"process {child.pid}"):
        Lock.take(Path("out"))
    assert json.loads(Path("out/run.json").read_text())["queued"]
    child.kill()
    child.wait()
    Lock.take(Path("out")).release()


def test_a_lock_that_was_handed_down_is_not_inherited_further(tmp_path: Path) -> None:
    """The child's child, which may outlive it, does not keep the folder."""
    Path("out").mkdir()
    lock = Lock.take(Path("out"))
    program = (
        "import os, subprocess, sys\n"
        "from trainer.lock import claim_handed_down\n"
        "claim_handed_down()\n"
        f"assert {HANDED_DOWN!r} not in os.environ\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], close_fds=False)\n"
        "print(child.pid, flush=True)\n"
    )
    reads, writes = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), HANDED_DOWN: str(lock._fd)},
        pass_fds=[lock._fd],
        stdin=reads,
        stdout=(tmp_path / "pid").open("w"),
    )
    os.close(lock._fd)
    try:
        assert done.returncode == 0
        os.kill(int((tmp_path / "pid").read_text()), 0)  # it lives
        Lock.take(Path("out")).release()
    finally:
        os.close(writes)  # ends it
        os.close(reads)


@pytest.mark.parametrize("value", ["", "seven", "999", "-1", str(2**70)])
def test_a_handed_down_number_that_is_no_open_file_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HANDED_DOWN, value)
    with pytest.raises(FolderRefused, match=f"{HANDED_DOWN} is .*not an open file"):
        open_run(DATASET, Path("out"))
    assert not Path("out").exists()
    with open_run(DATASET, Path("out")):  # asked for once
        pass


def test_a_handed_down_lock_of_another_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("other").mkdir()
    lock = Lock.take(Path("other"))
    monkeypatch.setenv(HANDED_DOWN, str(lock._fd))
    with pytest.raises(FolderRefused, match="which is not out/run.lock"):
        open_run(DATASET, Path("out"))
    lock.release()


def test_a_copy_of_a_run_in_another_process_knows_the_folder_and_writes_nothing() -> None:
    with open_run(DATASET, Path("out")) as run:
        copy = pickle.loads(pickle.dumps(run))
        assert copy.folder == run.folder
        copy.describe({})
        copy.complete()
        copy.close()
        assert sorted(files_in(Path("out"))) == ["run.lock"]
        with pytest.raises(FolderRefused):
            open_run(DATASET, Path("out"))


# ---- The end of a run ----------------------------------------------------------------------------


def test_a_run_that_fails_before_it_has_a_result_takes_its_folder_back() -> None:
    for given in (None, Path("out"), Path("far/away")):
        with pytest.raises(RuntimeError), open_run(DATASET, given) as run:
            run.describe({})
            run.checkpoints.mkdir()
            raise RuntimeError
    assert list(Path().iterdir()) == []


def test_what_else_is_in_its_folder_stays_then(tmp_path: Path) -> None:
    foreign = Foreign(Path("out"), tmp_path / "photos")
    Path("out/empty").mkdir()
    with pytest.raises(RuntimeError), open_run(DATASET, Path("out")) as run:
        run.describe({})
        raise RuntimeError
    foreign.assert_untouched()
    assert len(files_in(Path("out"))) == len(NAMES)
    assert Path("out/empty").is_dir()


@pytest.mark.parametrize(
    "name",
    ["checkpoints/step-000002.safetensors", "weights-failed.zip", "samples/step-000000/00.png"],
)
def test_a_run_that_fails_with_a_result_keeps_all_of_it(name: str) -> None:
    with pytest.raises(RuntimeError), open_run(DATASET) as run:
        run.describe({})
        file = run.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        raise RuntimeError
    assert file.is_file() and (run.folder / "run.json").is_file()
    with pytest.raises(FolderRefused, match="run.json of another run"):
        open_run(DATASET, run.folder)


# ---- outputs/latest ------------------------------------------------------------------------------


def test_latest_is_the_last_run_with_complete_weights(tmp_path: Path) -> None:
    latest = Path("outputs/latest")
    first = finish(open_run(DATASET))
    assert os.readlink(latest) == first.name
    with open_run(DATASET) as second:
        second.describe({})
        (second.folder / "report.html").touch()
        assert os.readlink(latest) == first.name
        third = finish(open_run(DATASET, Path("outputs/deep/er")))
        assert os.readlink(latest) == "deep/er"
        second.complete()
    assert latest.resolve() == second.folder.resolve() != third.resolve()
    elsewhere = finish(open_run(DATASET, tmp_path / "elsewhere"))
    assert latest.resolve() == second.folder.resolve() != elsewhere.resolve()
    assert [each.name for each in Path("outputs").iterdir() if each.name.startswith(".")] == []


def test_latest_is_set_anew_where_its_run_is_gone() -> None:
    Path("outputs").mkdir()
    Path("outputs/latest").symlink_to("2020-01-01-gone-01")
    folder = finish(open_run(DATASET))
    assert os.readlink("outputs/latest") == folder.name


def test_a_latest_that_a_person_made_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latest = Path("outputs/latest")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "weights.zip").write_text("mine")

    def folder() -> None:
        latest.mkdir(parents=True)
        (latest / "weights.zip").write_text("mine")

    def file() -> None:
        latest.write_text("mine")

    def far() -> None:
        latest.symlink_to(photos)

    def near() -> None:
        Path("outputs/mine").mkdir()
        latest.symlink_to("mine")

    for make, clear in (
        (folder, lambda: ((latest / "weights.zip").unlink(), latest.rmdir())),
        (file, latest.unlink),
        (far, latest.unlink),
        (near, latest.unlink),
    ):
        make()
        before = os.lstat(latest)
        caplog.clear()
        done = finish(open_run(DATASET))
        assert os.path.samestat(os.lstat(latest), before), make
        assert "outputs/latest is not a link created by a run" in caplog.text
        assert (done / "weights.zip").is_file()
        clear()
    assert (photos / "weights.zip").read_text() == "mine"


# ---- Resuming ------------------------------------------------------------------------------------


@pytest.fixture
def stopped() -> Path:
    """A run that was stopped after two checkpoints, while it wrote a third and its weights."""
    with open_run(DATASET) as run:
        run.describe({"part": 1})
        run.checkpoints.mkdir()
        for name in ("step-000003.safetensors", "step-000006.safetensors"):
            (run.checkpoints / name).touch()
        (run.checkpoints / ".step-000009.safetensors.x1_y2z3w.part").touch()
        (run.folder / ".weights.zip.abcdefgh.part").touch()
        (run.samples / "step-000003").mkdir(parents=True)
        (run.samples / "step-000003" / ".00.png.abcdefgh.part").touch()
    return run.folder


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/step-000003.safetensors"])
def test_a_resumed_run_continues_in_its_own_folder(what: str, stopped: Path) -> None:
    with open_run(DATASET, resume_from=stopped / what) as run:
        run.describe({"part": 2})
        assert run.folder == stopped
        with pytest.raises(FolderRefused, match="in use"):
            open_run(DATASET, resume_from=stopped / what)
    assert json.loads((stopped / "run.json").read_text())["part"] == 1
    assert list(stopped.rglob("*.part")) == []
    with open_run(DATASET, stopped, resume_from=stopped / what) as run:
        assert run.folder == stopped
    assert len(list((stopped / "checkpoints").iterdir())) == 2


def test_a_resumed_run_stays_in_its_folder_when_latest_moves_on(stopped: Path) -> None:
    Path("outputs/latest").symlink_to(stopped.name)
    with open_run(DATASET, resume_from=Path("outputs/latest/checkpoints")) as run:
        assert run.folder == stopped
    with open_run(DATASET, Path("outputs/latest"), Path("outputs/latest/checkpoints")) as run:
        assert run.folder.resolve() == stopped.resolve()


def test_a_checkpoints_folder_that_is_a_link_to_another_disk_can_be_resumed_from(
    stopped: Path, tmp_path: Path
) -> None:
    (stopped / "checkpoints").rename(tmp_path / "disk")
    (stopped / "checkpoints").symlink_to(tmp_path / "disk")
    for what in ("checkpoints", "checkpoints/step-000006.safetensors"):
        with open_run(DATASET, resume_from=stopped / what) as run:
            assert run.folder == stopped
    assert len(list((tmp_path / "disk").iterdir())) == 3  # nothing is removed through a link


def test_whatever_else_is_resumed_begins_a_new_folder(stopped: Path, tmp_path: Path) -> None:
    (stopped / "weights.zip").touch()
    before = files_in(stopped)
    copied = tmp_path / "checkpoints" / "step-000003.safetensors"  # in no run's folder
    copied.parent.mkdir()
    copied.touch()
    for what in (stopped / "weights.zip", copied, tmp_path / "nowhere.safetensors"):
        with open_run(DATASET, resume_from=what) as run:
            assert run.folder not in (stopped, tmp_path)
    with open_run(DATASET, Path("other"), resume_from=stopped / "checkpoints") as run:
        assert run.folder == Path("other")
    with open_run(DATASET, resume_from=stopped / "checkpoints", served=True) as run:
        assert run.folder != stopped  # it may be another customer's
    assert files_in(stopped) == before


def test_a_run_that_is_resumed_is_no_excuse_for_another_folder(stopped: Path) -> None:
    other = finish(open_run(DATASET))
    with pytest.raises(FolderRefused, match="of another run"):
        open_run(DATASET, other, resume_from=stopped / "checkpoints")


# ---- A server's old runs -------------------------------------------------------------------------


def serve(**facts: Any) -> Path:
    """A finished run of a server's."""
    return finish(open_run(DATASET, served=True), served=True, **facts)


def test_a_server_removes_old_runs_and_never_the_newest_complete_one() -> None:
    old, newest = serve(), serve()
    for folder in (old, newest):
        age(folder, KEPT_SECONDS + 60)
    with open_run(DATASET, served=True) as run:
        assert sorted(Path("outputs").glob("20*")) == [newest, run.folder]
    assert newest.is_dir()
    done = serve()
    age(done, KEPT_SECONDS - 60)
    following = serve()
    assert sorted(Path("outputs").glob("20*")) == [done, following]


def test_a_server_keeps_so_many_runs_at_most() -> None:
    folders = [serve() for _ in range(KEPT_RUNS + 3)]
    assert sorted(Path("outputs").glob("20*")) == folders[-KEPT_RUNS:]
    with open_run(DATASET, served=True) as run:
        assert sorted(Path("outputs").glob("20*")) == [*folders[-KEPT_RUNS + 1 :], run.folder]


def test_a_failed_run_does_not_replace_the_result_that_somebody_may_still_collect() -> None:
    result = serve()
    with open_run(DATASET, served=True) as run:
        run.describe({"served": True})
        run.checkpoints.mkdir()
        (run.checkpoints / "step-000001.safetensors").touch()
    for folder in (result, run.folder):
        age(folder, 2 * KEPT_SECONDS)
    with open_run(DATASET, served=True):
        assert result.is_dir()
        assert not run.folder.exists()


def test_a_server_removes_nothing_that_it_has_not_made(holders: Any, tmp_path: Path) -> None:
    by_hand = finish(open_run(DATASET), served=False)
    no_record = Path("outputs/no-record")
    no_record.mkdir()
    (no_record / "weights.zip").touch()
    forged = Path("outputs/of-another-program")
    forged.mkdir()
    (forged / "run.json").write_text('{"served": true}')
    (forged / "run.lock").write_text('{"pid": 1, "served": true}')
    truthy = finish(open_run(DATASET), served="yes")
    linked = Path("outputs/linked")
    (tmp_path / "elsewhere").mkdir()
    for name in ("run.json", "run.lock", "weights.zip"):
        source = serve() / name
        (tmp_path / "elsewhere" / name).write_bytes(source.read_bytes())
    linked.symlink_to(tmp_path / "elsewhere")
    continued = serve()
    Path(continued, "checkpoints").mkdir()
    Path(continued, "checkpoints", "step-000001.safetensors").touch()
    with open_run(DATASET, resume_from=continued / "checkpoints"):
        pass  # by hand
    in_use = serve()
    Path(in_use, "checkpoints").mkdir()
    Path(in_use, "checkpoints", "step-000001.safetensors").touch()
    assert reported(holders(resume_from=str(in_use / "checkpoints"))) == str(in_use)
    kept = (by_hand, no_record, forged, truthy, continued, in_use)
    for folder in (*kept, tmp_path / "elsewhere"):
        age(folder, 2 * KEPT_SECONDS)
    serve()
    serve()
    assert all(folder.is_dir() for folder in kept)
    assert sorted(each.name for each in (tmp_path / "elsewhere").iterdir()) == [
        *("run.json", "run.lock", "weights.zip")
    ]


def test_a_persons_files_in_a_servers_run_stay(tmp_path: Path) -> None:
    old = serve()
    (old / "samples" / "step-000001").mkdir(parents=True)
    for name in ("samples/step-000001/00.png", "samples/sheet.png", "trackers/events"):
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).touch()
    foreign = Foreign(old, tmp_path / "photos")
    (old / "samples" / "step-000003").symlink_to(tmp_path / "photos" / "step-000001")
    (old / "hub-upload").symlink_to(tmp_path / "photos")
    serve()
    age(old, 2 * KEPT_SECONDS)
    serve()
    foreign.assert_untouched()
    assert set(files_in(old)) == set(NAMES)
    assert (old / "samples" / "step-000003").is_symlink()


def test_what_is_left_of_a_server_that_was_killed_at_its_start_is_removed() -> None:
    folder = Path("outputs/2020-01-01-robot-01")
    folder.mkdir(parents=True)
    Lock.take(folder, served=True).release()
    age(folder, 2 * KEPT_SECONDS)
    serve()
    assert not folder.exists()


# ---- Names ---------------------------------------------------------------------------------------


def test_the_names_of_a_runs_files_are_the_same_everywhere() -> None:
    assert (preview_images.FOLDER, trackers.FOLDER, report.NAME) == (SAMPLES, TRACKERS, REPORT)
