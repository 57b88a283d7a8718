"""The batch script says what the configuration says, survives odd names, and refuses what would lose a run."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from agssd.cli import main
from agssd.commands import submit


def arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    submit.add_arguments(parser)
    args, args.of_fit = parser.parse_known_args(["--config", "a.yaml", "--cluster", "c.yaml", *line])
    return args


def script(*line: str, directory: str = "/runs/ct", **trainer: Any) -> dict[str, str]:
    """Return the flags of the script by name, its last line as ``run``."""
    settings: dict[str, Any] = {"devices": 4, "num_nodes": 2, "accelerator": "gpu", **trainer}
    text = submit.batch_script(["--data.cache", "my ct.h5"], settings, 8, Path(directory), arguments(*line))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    flags = [shlex.split(each.removeprefix("#SBATCH "))[0] for each in lines if each.startswith("#SBATCH ")]
    return {flag[2:].partition("=")[0]: flag.partition("=")[2] for flag in flags} | {"run": lines[-1]}


def test_script__has_a_task_per_device_and_everything_that_requeueing_needs() -> None:
    flags = script("--time", "1-00:00:00", "--partition", "gpu", "--sbatch", "exclusive", "--sbatch=--comment=x y")
    wanted = {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "9", "signal": "USR1@90"}
    wanted |= {"requeue": "", "open-mode": "append", "output": "/runs/ct/slurm-%j.log", "time": "1-00:00:00"}
    wanted |= {"partition": "gpu", "exclusive": "", "comment": "x y"}
    assert wanted.items() <= flags.items()
    words = shlex.split(flags["run"])
    assert words[:2] == ["exec", "srun"] and words[-3:] == ["fit", "--data.cache", "my ct.h5"]
    assert "gpus-per-node" not in script(accelerator="cpu") and "gpus-per-node" not in script("--gres", "gpu:a100:4")
    assert flags["dependency"] == "singleton" and "dependency" not in script("--job-name", "mine")
    assert script("--dependency", "afterok:7")["dependency"] == "afterok:7,singleton"
    assert script("--signal-seconds", "300")["signal"] == "USR1@300"


def test_script__names_that_sbatch_would_read_otherwise_are_quoted_or_refused() -> None:
    assert script(directory="/my runs/50%")["output"] == "/my runs/50%%/slurm-%j.log"
    with pytest.raises(ValueError, match="quotes, backslashes and line ends"):
        script(directory='/runs/"a"')


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [("array=0-3", "submit each run by itself"), ("--signal=TERM@5", "--signal-seconds"), ("nodes=3", "num_nodes")],
)
def test_script__flags_that_would_break_the_run_are_refused(flag: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        script(f"--sbatch={flag}")


@pytest.mark.parametrize("devices", ["auto", -1, 0, "0,1"])
def test_script__devices_must_be_a_number(devices: Any) -> None:
    with pytest.raises(ValueError, match="needs the number of devices"):
        script(devices=devices)


def test_arguments__what_is_not_ours_goes_to_fit_in_its_order() -> None:
    args = arguments("--time", "60", "--data.cache", "x.h5", "--model", "m.yaml", "--trainer.max_steps=5")
    assert args.of_fit == ["--data.cache", "x.h5", "--model", "m.yaml", "--trainer.max_steps=5"] and args.time == "60"


CONF = Path(__file__).parents[2] / "conf"
TRAINER = {"trainer": {"devices": 2, "num_nodes": 1, "accelerator": "cpu"}, "data": {"init_args": {"num_workers": 3}}}


def parsed_as_little(arguments: list[str], new_directory: Path) -> SimpleNamespace:
    """Stand in for the parser of ``fit``."""
    named = dict(zip(arguments, arguments[1:], strict=False)).get("--trainer.default_root_dir", new_directory)
    return SimpleNamespace(settings=SimpleNamespace(as_dict=lambda: TRAINER), run_directory=Path(named))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a program called sbatch that is the only one there is; the test writes it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin/sbatch"


def write_program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def test_submit__dry_run_shows_the_script_of_the_whole_configuration_and_writes_nothing(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "my $(touch x) work"
    here.mkdir()
    monkeypatch.chdir(here)
    files = ["--config", str(CONF / "experiment/agssd_small.yaml"), "--cluster", str(CONF / "cluster/ddp2_cpu.yaml")]
    more = ["--data.cache", "a b.h5", "--data.num_workers", "5", "--trainer.default_root_dir", "my runs/ct"]
    assert main(["submit", *files, "--dry-run", *more]) == 0
    assert list(here.iterdir()) == [] and not (tmp_path / "x").exists()
    text = capsys.readouterr().out
    for line in ("--ntasks-per-node=2", "--cpus-per-task=6", "--signal=USR1@90", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    assert f'#SBATCH --output="{here}/my runs/ct/slurm-%j.log"\n' in text
    script = tmp_path / "submit.sh"
    script.write_text(text.replace("exec srun", "exec /bin/echo"))  # the shell takes it apart
    done = subprocess.run(["/bin/bash", str(script)], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "--cpus-per-task=6 " in done.stdout and "--data.cache a b.h5 " in done.stdout
    assert f"--trainer.default_root_dir {here}/my runs/ct\n" in done.stdout
    assert not (here / "x").exists() and not (tmp_path / "x").exists()


def test_submit__without_sbatch_is_refused_with_a_remedy(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--config", "a.yaml", "--cluster", "c.yaml"]) == 2
    assert "sbatch is not found" in (said := capsys.readouterr().err) and "--dry-run" in said


@pytest.mark.parametrize("content", [None, "trainer: {devises: 2}\n"])
def test_submit__cluster_file_that_fit_would_refuse_is_refused_and_nothing_is_left(
    sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str | None
) -> None:
    write_program(sbatch, "echo 1")
    cluster = tmp_path / "my cluster.yaml"
    if content is not None:
        cluster.write_text(content)
    experiment = str(CONF / "experiment/agssd_small.yaml")
    assert main(["submit", "--config", experiment, "--cluster", str(cluster), "--data.cache", "x.h5"]) == 2
    assert ("my cluster.yaml" if content is None else "devises") in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_submit__script_is_kept_only_if_sbatch_takes_it(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agssd.lightning_cli.ParsedFit", parsed_as_little)
    line = ["submit", "--config", "a.yaml", "--cluster", "c.yaml", "--trainer.default_root_dir", "my runs/ct"]
    write_program(sbatch, "echo 'invalid partition' >&2; exit 1")
    assert main(line) == 2
    assert "sbatch refuses ct: invalid partition" in capsys.readouterr().err
    assert not list((tmp_path / "my runs/ct").iterdir())
    write_program(sbatch, "echo '42;here'")
    for name in ("submit.sh", "submit-2.sh"):  # what ran is never overwritten
        assert main(line) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"job 42, run directory {tmp_path}/my runs/ct\n")
        assert f"tail -F '{tmp_path}/my runs/ct'/slurm-42.log" in said and f"my runs/ct/{name}'" in said
        assert (tmp_path / "my runs/ct" / name).read_text().startswith("#!/bin/bash\n#SBATCH ")


SUBMIT = [
    "submit",
    "--config",
    str(CONF / "experiment/agssd_small.yaml"),
    "--cluster",
    str(CONF / "cluster/ddp2_cpu.yaml"),
]


def test_submit__run_directories_of_the_same_second_differ_and_one_that_is_refused_is_gone(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agssd.lightning_cli.ParsedFit", parsed_as_little)
    monkeypatch.setattr("time.strftime", lambda form, *given: "now")
    write_program(sbatch, "echo 42")
    assert main(SUBMIT) == main(SUBMIT) == 0
    runs = tmp_path / "runs/agssd_small"
    assert sorted(path.name for path in runs.iterdir()) == ["now", "now-2"]
    names = set()
    for name in ("now", "now-2"):
        script = (runs / name / "submit.sh").read_text()
        assert f"--trainer.default_root_dir {runs / name}\n" in script
        names |= {line for line in script.splitlines() if "--job-name" in line}
    assert len(names) == 2
    write_program(sbatch, "exit 1")
    assert main(SUBMIT) == 2
    assert sorted(path.name for path in runs.iterdir()) == ["now", "now-2"]


def test_submit__missing_cache_is_refused_before_the_job_waits(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(sbatch, "touch submitted; echo 42")
    assert main([*SUBMIT, "--data.cache", "[here.h5,none.h5]"]) == 2
    (tmp_path / "here.h5").touch()
    assert main([*SUBMIT, "--data.cache", "[here.h5,none.h5]"]) == 2
    first, second = (line for line in capsys.readouterr().err.splitlines() if "data.cache" in line)
    assert "data.cache is here.h5, which does not exist" in first and "data.cache is none.h5" in second
    assert not (tmp_path / "runs").exists() and not (tmp_path / "submitted").exists()


def test_submit__run_that_cannot_go_on_with_the_settings_or_is_finished_is_refused(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(sbatch, "echo 42")
    (tmp_path / "ct.h5").touch()
    line = [*SUBMIT, "--data.cache", "ct.h5", "--trainer.max_steps", "50", "--trainer.default_root_dir", "run"]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    config = parsed_config(["--data.cache", "ct.h5", "--trainer.max_steps", "50"])

    def store(step: int, **changed: Any) -> None:
        saved = {
            "global_step": step,
            "state_dict": {},
            "loops": {},
            "optimizer_states": [],
            "config": {**config, **changed},
        }
        torch.save(saved, tmp_path / "run/checkpoints/step00000007.ckpt")

    store(7, seed_everything=config["seed_everything"] + 1)
    assert main(line) == 2
    assert "seed_everything: 1 in the checkpoint, 0 now" in capsys.readouterr().err
    store(50)
    assert main(line) == 2
    assert "is finished" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
    store(7)
    assert main(line) == 0
    assert (tmp_path / "run/submit.sh").is_file()


@pytest.mark.parametrize("by", ["its config.yaml", "its checkpoint", "the command line"])
def test_submit__a_run_that_is_named_goes_on_where_it_is(
    by: str, sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGSSD_RUN_STAMP", "of another")  # as where `agssd submit` is typed inside of a job
    write_program(sbatch, "echo 42")
    (tmp_path / "ct.h5").touch()
    run = tmp_path / "runs/ct"
    (run / "checkpoints").mkdir(parents=True)
    config = parsed_config(["--data.cache", "ct.h5"])
    saved = {"global_step": 7, "state_dict": {}, "loops": {}, "optimizer_states": [], "config": config}
    torch.save(saved, run / "checkpoints/step00000007.ckpt")
    more = ["--data.cache", "ct.h5"]
    if by == "its config.yaml":
        config["trainer"]["default_root_dir"] = "runs/ct"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        more = ["--config", "runs/ct/config.yaml"]
    elif by == "its checkpoint":
        more += ["--ckpt_path", "runs/ct/checkpoints/step00000007.ckpt"]
    else:
        more += ["--trainer.default_root_dir", "runs/ct"]
    line = SUBMIT[:1] + SUBMIT[3:] if by == "its config.yaml" else SUBMIT
    assert main([*line, *more]) == 0
    assert capsys.readouterr().out.startswith(f"job 42, run directory {run}\n")
    assert f"--trainer.default_root_dir {run}\n" in (run / "submit.sh").read_text()
    assert [path.name for path in run.parent.iterdir()] == ["ct"]
    fresh = [word for word in more if not word.startswith("--trainer.default") and word != "runs/ct"]
    if by == "the command line":
        assert main([*SUBMIT, *fresh]) == 0
        (new,) = (tmp_path / "runs/agssd_small").iterdir()
        assert new.name != "of another", "a directory of its own, whatever job this is typed in"


def parsed_config(line: list[str]) -> dict[str, Any]:
    from agssd.lightning_cli import ParsedFit
    from agssd.run.directory import plain_config

    fit = ParsedFit([*SUBMIT[1:3], "--config", SUBMIT[4], *line, "--trainer.default_root_dir", "elsewhere"])
    return plain_config(fit._parser("fit"), fit.settings)
