"""A build that is cut, killed, refused the disk or met by another ends in the same bytes as an undisturbed one."""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest

from agssd.commands import merge, prepare
from agssd.data_modules.build_folder import BuildFolder, Shard
from agssd.data_modules.cache import VolumeCache

NUM_SCANS = 9
SHARD_GIB = 40_000 / 2**30  # two or three of the cases below


def _run(*arguments: object) -> int:
    return _call(prepare, arguments)


def _merge(*arguments: object) -> int:
    return _call(merge, arguments)


def _call(command: Any, arguments: tuple[object, ...]) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine small heads of which one is refused and two are the same file."""
    folder = tmp_path_factory.mktemp("source") / "scans"
    folder.mkdir()
    for number in range(NUM_SCANS):
        rng = np.random.default_rng(number)
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (28, 26, 24)), indexing="ij"))
        head = np.where((grid**2).sum(0) < 0.8, rng.normal(300, 20, grid.shape[1:]), 0.0).astype("f4")
        nib.save(nib.Nifti1Image(head, np.eye(4)), folder / f"p{number}.nii.gz")
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), np.nan, "f4"), np.eye(4)), folder / "broken.nii.gz")
    shutil.copy(folder / "p0.nii.gz", folder / "q0.nii.gz")
    return folder


@pytest.fixture(scope="module")
def undisturbed(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Hash of the undisturbed cache, as one file and as a folder."""
    place = tmp_path_factory.mktemp("undisturbed")
    hashes = {}
    for in_shards in (False, True):
        out = place / ("folder" if in_shards else "c.h5")
        assert _run(scans, "--out", out, *_shards(in_shards)) == 3
        assert sorted(path.name for path in place.iterdir() if path != place / "c.h5") in ([], ["folder"])
        hashes[in_shards] = _hash(out)
    assert len(VolumeCache(place / "folder").files) > 2
    return hashes


def _shards(in_shards: bool) -> list[object]:
    return ["--shard-gib", SHARD_GIB] if in_shards else []


def _hash(out: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(out.iterdir()) if out.is_dir() else [out]:
        digest.update(path.name.encode() if out.is_dir() else b"")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _in_child(target: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    return child


def _build(arguments: tuple[object, ...]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (the process ends with it)
    _run(*arguments)


def _build_and_die(arguments: tuple[object, ...], moment: int) -> None:
    """Build, and be killed before or after one of the calls that change what a later build finds."""
    passed = 0

    def step() -> None:
        nonlocal passed
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            step()
            result = call(*given, **named)
            step()
            return result

        return wrapped

    os.replace = around(os.replace)
    os.fsync = around(os.fsync)
    shutil.rmtree = around(shutil.rmtree)
    Path.unlink = around(Path.unlink)
    h5py.Group.copy = around(h5py.Group.copy)
    _build(arguments)


@pytest.mark.parametrize("in_shards", [pytest.param(False, marks=pytest.mark.slow), True], ids=["file", "folder"])
def test_build__killed_at_any_step_is_completed_to_the_same_bytes(
    scans: Path, tmp_path: Path, undisturbed: dict[bool, str], in_shards: bool, request: pytest.FixtureRequest
) -> None:
    everything = request.config.getoption("markexpr", "") == ""  # make test-slow
    moment, completed_from, ended = 0, 0, False
    while not ended:
        out = tmp_path / f"killed-{moment}"
        arguments = (scans, "--out", out, *_shards(in_shards))
        child = _in_child(_build_and_die, arguments, moment)
        child.join()
        ended = child.exitcode == 0
        assert ended or child.exitcode == -signal.SIGKILL
        if not ended:
            assert not out.exists() or _hash(out) == undisturbed[in_shards]  # never half a cache
            over = out.exists() and not Path(f"{out}.build", "publishing").exists()
            assert _run(*arguments) == (1 if over else 3), f"killed at step {moment}"
            completed_from += not over
        assert _hash(out) == undisturbed[in_shards], f"killed at step {moment}"
        assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]
        shutil.rmtree(out) if in_shards else out.unlink()
        moment += 1 if everything else 7
    assert completed_from >= (100 if everything else 15)


@pytest.mark.slow
@pytest.mark.parametrize("in_shards", [False, True], ids=["file", "folder"])
def test_build__killed_at_random_moments_is_completed_to_the_same_bytes(
    scans: Path, tmp_path: Path, undisturbed: dict[bool, str], in_shards: bool, request: pytest.FixtureRequest
) -> None:
    """``make test`` kills 10 times, ``make test-slow`` 50 times."""
    kills = 50 if request.config.getoption("markexpr", "") == "" else 10
    rng = np.random.default_rng(0)
    out = tmp_path / "c"
    arguments = (scans, "--out", out, *_shards(in_shards))
    started = time.perf_counter()
    _build_in_child = _in_child(_build, arguments)
    _first_case(out)
    first = time.perf_counter()
    _build_in_child.join()
    rest = time.perf_counter() - first
    assert first > started and _hash(out) == undisturbed[in_shards]
    states: Counter[str] = Counter()
    while states.total() - states["ended before"] < kills:
        assert states.total() < 10 * kills, f"most builds ended before they were killed: {dict(states)}"
        child = _in_child(_build, (*arguments, "--overwrite"))
        _first_case(out)
        time.sleep(float(rng.uniform(0, rest)))
        child.kill()
        child.join()
        parts = len(list(Path(f"{out}.build", "parts").glob("*.h5")))
        states["ended before" if child.exitcode == 0 else "merging" if parts >= NUM_SCANS else "preparing"] += 1
        # The old cache stands until the new one is whole; only folders need two renames, with nothing between them.
        old = out if out.exists() or not in_shards else Path(f"{out}.build", "replaced")
        assert _hash(old) == undisturbed[in_shards]
        assert _run(*arguments, "--overwrite") == 3
        assert _hash(out) == undisturbed[in_shards], f"after {dict(states)}"
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
    print(f"killed while: {dict(states)}")
    assert states["preparing"] >= kills // 5


def _first_case(out: Path) -> None:
    end = time.monotonic() + 60
    while not any(Path(f"{out}.build", "parts").glob("*.h5")):
        assert time.monotonic() < end, "no case was prepared within a minute"
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["build", "worker"])
def test_build__of_two_workers_killed_is_completed_to_the_same_bytes(
    scans: Path, tmp_path: Path, undisturbed: dict[bool, str], victim: str
) -> None:
    rng = np.random.default_rng(1)
    out = tmp_path / "c"
    command = [sys.executable, "-m", "agssd", "prepare", str(scans), "--out", str(out), "--workers", "2"]
    for number in range(6):
        build = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _first_case(out)
        children = [int(pid) for pid in Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()]
        workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        time.sleep(float(rng.uniform(0, 0.05)))
        try:
            os.kill(build.pid if victim == "build" else workers[number % len(workers)], signal.SIGKILL)
        except ProcessLookupError:
            pass  # it had ended
        error = build.communicate(timeout=60)[1]
        if victim == "worker" and build.returncode == 1:
            assert "a worker died" in error and "run the same command again" in error
        deadline = time.monotonic() + 20
        while any(_alive(pid) for pid in workers):  # none works on when the build is dead
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if not out.exists() or Path(f"{out}.build").exists():
            assert subprocess.run(command, capture_output=True, check=False).returncode == 3
        assert _hash(out) == undisturbed[False]
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
        out.unlink()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("in_shards", [False, True], ids=["file", "folder"])
def test_merge__bytes_do_not_depend_on_the_number_of_shards(
    scans: Path,
    tmp_path: Path,
    undisturbed: dict[bool, str],
    count: int,
    in_shards: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "c"
    for number in reversed(range(count)):
        assert _run(scans, "--out", out, "--shard", f"{number}/{count}") in (0, 3)
        assert "agssd merge" in capsys.readouterr().out
        if number:
            assert _merge(out) == 1  # and says what is missing
            assert "neither cached nor refused" in capsys.readouterr().err
    assert _merge(out, *_shards(in_shards)) == 3
    assert "NaN" in capsys.readouterr().out
    assert _hash(out) == undisturbed[in_shards]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def _merge_and_die(out: Path, files: int) -> None:
    """Merge into a folder, and be killed when some of its files are done."""
    real = shutil.disk_usage

    def dying(path: Path) -> Any:  # asked before each file
        if len(list(Path(f"{out}.build", "merged").glob("*.h5"))) == files:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path)

    shutil.disk_usage = dying
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (the process ends with it)
    _merge(out, *_shards(True))


def test_merge__of_another_kind_never_throws_away_what_an_interrupted_one_has_used_up(
    scans: Path, tmp_path: Path, undisturbed: dict[bool, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    _run(scans, "--out", out, "--shard", "0/1")
    child = _in_child(_merge_and_die, out, 2)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    merged = sorted(Path(f"{out}.build", "merged").glob("*.h5"))
    assert len(merged) == 2
    for arguments in ((), ("--partial",), ("--partial", *_shards(True))):
        assert _merge(out, *arguments) == 1
        assert f"--shard-gib {int(SHARD_GIB * 2**30) / 2**30:.17g}" in capsys.readouterr().err
        assert sorted(Path(f"{out}.build", "merged").glob("*.h5")) == merged
    assert _merge(out, *_shards(True)) == 3
    assert _hash(out) == undisturbed[True]


def test_merge__tells_of_scans_that_two_shards_hold_alike(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(scans / f"p{'0' if name != 'c' else '1'}.nii.gz", source / f"{name}.nii.gz")
    out = tmp_path / "c.h5"
    for number in range(2):
        assert _run(source, "--out", out, "--shard", f"{number}/2") == 0
    assert _merge(out) == 3
    assert "refused: 1: same bytes as another scan" in capsys.readouterr().out
    assert len(VolumeCache(out)) == 2


def test_merge__partial_takes_what_is_there(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.h5"
    _run(scans, "--out", out, "--shard", "0/3")
    done = int(capsys.readouterr().out.split("shard 0/3: ")[1].split()[0])
    _merge(out, "--partial")
    assert 0 < len(VolumeCache(out)) == done < NUM_SCANS


def test_shard__of_other_settings_is_refused(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.h5"
    assert _run(scans, "--out", out, "--shard", "0/2") in (0, 3)
    assert _run(scans, "--out", out, "--shard", "1/2", "--spacing-mm", "2") == 1
    assert "begun with other sources, files or settings" in capsys.readouterr().err
    assert _merge(tmp_path / "other.h5") == 1
    assert "nothing to merge" in capsys.readouterr().err


def test_build__a_changed_source_or_setting_is_prepared_anew(scans: Path, tmp_path: Path) -> None:
    source = tmp_path / "scans"
    shutil.copytree(scans, source)
    out = tmp_path / "c.h5"
    _run(source, "--out", out, "--shard", "0/1")  # all parts stand there
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (28, 26, 24)), indexing="ij"))
    changed = np.where((grid**2).sum(0) < 0.8, np.random.default_rng(77).normal(300, 20, grid.shape[1:]), 0.0)
    nib.save(nib.Nifti1Image(changed.astype("f4"), np.eye(4)), source / "p3.nii.gz")
    assert _run(source, "--out", out, "--spacing-mm", "1.2") == 3
    fresh = tmp_path / "fresh.h5"
    assert _run(source, "--out", fresh, "--spacing-mm", "1.2") == 3
    assert out.read_bytes() == fresh.read_bytes()


def test_build__goes_on_without_preparing_again(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from agssd.data_modules import parts

    out, rows = tmp_path / "c.h5", tmp_path / "keys.csv"
    _run(scans, "--out", out, "--shard", "0/1")
    monkeypatch.setattr(parts, "prepare_case", lambda *job: pytest.fail("a scan was read again"))
    assert _run(scans, "--out", out, "--key-map", rows) == 3
    text = capsys.readouterr().out
    assert "going on where an interrupted build stood" in text and "broken.nii.gz: 17" not in text
    assert "NaN" in text and "same bytes as" in text  # what was refused before is said again
    assert len(rows.read_text().splitlines()) == 1 + NUM_SCANS


@pytest.mark.parametrize("other", [None, Shard(0, 2)], ids=["whole", "shard"])
def test_build__two_into_one_place_refuse_each_other(
    scans: Path, tmp_path: Path, other: Shard | None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.h5"
    with BuildFolder(out, other) as held:
        (held.parts / "a.h5").touch()
        assert _run(scans, "--out", out) == 1
        assert "is in use: another process" in capsys.readouterr().err
        assert _run(scans, "--out", out, "--shard", "0/2") == 1
        assert "is in use: another process" in capsys.readouterr().err
        if other is not None:
            assert _run(scans, "--out", out, "--shard", "1/2") in (0, 3)
        (held.parts / "a.h5").unlink()
    assert _run(scans, "--out", out) == 3


def test_build__names_no_source_while_it_is_under_way(scans: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in scans.iterdir():
        if not path.name.startswith("."):
            shutil.copy(path, source / f"SURNAME_{path.name}")
    label = np.zeros((28, 26, 24), "u1")
    nib.save(nib.Nifti1Image(label[:5], np.eye(4)), source / "SURNAME_p0_seg.nii.gz")
    out = tmp_path / "c.h5"
    _run(source, "--labels", "*_seg.nii.gz", "--out", out, "--shard", "0/1")
    written = [path for path in Path(f"{out}.build").rglob("*") if path.is_file()]
    assert any(path.suffix == ".refused" for path in written) and any(path.suffix == ".h5" for path in written)
    for path in written:
        assert b"SURNAME" not in path.read_bytes() and "SURNAME" not in path.name


@pytest.mark.parametrize("in_shards", [False, True], ids=["file", "folder"])
def test_build__a_full_disk_leaves_the_old_cache_and_the_finished_cases(
    scans: Path, tmp_path: Path, undisturbed: dict[bool, str], in_shards: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        out = disk / "c"
        assert _run(scans / "p1.nii.gz", "--out", out, "--salt", scans / ".agssd-salt", *_shards(in_shards)) == 0
        old = _hash(out)
        ballast = disk / "ballast"
        arguments = (scans, "--out", out, "--overwrite", "--no-forecast", *_shards(in_shards))
        failures = 0
        for room in (30_000, 90_000, 150_000, 200_000):
            ballast.unlink(missing_ok=True)
            ballast.write_bytes(bytes(max(shutil.disk_usage(disk).free - room, 0)))
            code = _run(*arguments)
            if code == 3:
                break
            failures += 1
            assert code == 1
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last.startswith("error: ") and str(disk) in last and "run the same command again" in last
            assert _hash(out) == old and len(VolumeCache(out)) == 1
        assert failures >= 2
        if code != 3:
            assert _run(scans, "--out", out, "--overwrite", *_shards(in_shards)) == 1  # foreseen
            foreseen = capsys.readouterr().err
            assert "building needs about" in foreseen or "merging into" in foreseen
            assert "run the same command again" in foreseen
        ballast.unlink()
        assert code == 3 or _run(*arguments) == 3
        assert _hash(out) == undisturbed[in_shards]
        assert {path.name for path in disk.iterdir()} == {"c"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folder__is_read_like_a_file_and_names_what_is_missing(scans: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.h5", tmp_path / "many"
    _run(scans, "--out", one)
    _run(scans, "--out", many, *_shards(True))
    file, folder = VolumeCache(one), VolumeCache(many)
    assert file.cases == folder.cases and file.class_names == folder.class_names
    assert file.salt_fingerprint == folder.salt_fingerprint is not None
    for case in range(len(file)):
        for what in ("image", "foreground"):
            assert np.array_equal(file.read_whole(case, what), folder.read_whole(case, what))
            box = ((2, 3, 4), (9, 8, 7), what)
            assert np.array_equal(file.read(case, *box), folder.read(case, *box))
    alone = [info for path in folder.files for info in VolumeCache(path).cases]
    assert sorted(alone, key=lambda info: info.key) == list(folder.cases)  # each file is a cache of its own
    last = folder.files[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{last.name} has {len(whole) - 1} bytes, its index says {len(whole)}"):
        VolumeCache(many)
    last.unlink()
    with pytest.raises(ValueError, match=f"{last.name} is missing"):
        VolumeCache(many)


def test_prepare__a_folder_of_the_users_is_never_replaced(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").touch()
    (theirs / "index.json").write_text("{}")  # as many projects have
    assert _run(scans, "--out", theirs, "--overwrite", *_shards(True)) == 1
    assert "is a folder" in capsys.readouterr().err
    assert sorted(path.name for path in theirs.iterdir()) == ["index.json", "thesis.tex"]
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    ours = tmp_path / "ours"
    assert _run(scans, "--out", ours, *_shards(True)) == 3
    (ours / "thesis.tex").touch()  # put into a cache of ours
    assert _run(scans, "--out", ours, "--overwrite", *_shards(True)) == 1
    assert (ours / "thesis.tex").exists()
