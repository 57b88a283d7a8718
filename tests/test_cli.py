"""The command line: speed, dispatch, composition of YAML, the run directory, refusals."""

from __future__ import annotations

import csv
import inspect
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  (attaches its log handler now, not in a test)
import numpy as np
import pytest
import torch
import yaml

import agssd.cli
from agssd import __version__, commands
from agssd.cli import TRAINING, main, refusal
from agssd.run import state as run_state
from agssd.run.resume_rules import changed_settings, differences
from agssd.run.state import read_state, write_state

TOYS = Path(__file__).parent / "cli_toys"


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def conf(tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a configuration folder with experiments of every toy."""
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("AGSSD_RUN_STAMP", raising=False)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "conf"
    for name in ("ToyRecipe", "ToyTask", "ToyPlain", "ToyBug"):
        dump(root / f"method/{name}.yaml", {"class_path": f"toy_recipe.{name}"})
        dump(
            root / f"experiment/{name}.yaml",
            {
                "trainer": "../trainer/base.yaml",
                "model": f"../method/{name}.yaml",
                "backbone": "../backbone/toy.yaml",
                "views": "../views/toy.yaml",
                "data": "../data/toy.yaml",
                "online_probe": {"at_start": False, "at_end": False},  # a toy has no tokens
            },
        )
    dump(root / "backbone/toy.yaml", {"class_path": "toy_recipe.ToyBackbone", "init_args": {"embed_dim": 5}})
    dump(
        root / "views/toy.yaml",
        {"class_path": "agssd.transforms.crops.OverlapCrops", "init_args": {"size_vox": [16, 16, 16]}},
    )
    dump(
        root / "data/toy.yaml",
        {
            "class_path": "agssd.data_modules.pretrain.PretrainDataModule",
            "init_args": {
                "cache": str(tiny_cache),
                "parent_vox": [16, 16, 16],
                "global_batch_size": 4,
                "num_workers": 0,
            },
        },
    )
    dump(
        root / "trainer/base.yaml",
        {
            "max_steps": 3,
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )
    return root


@pytest.fixture(autouse=True)
def _one_thread_and_quiet() -> Iterator[None]:
    before, lightning_log = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    handlers = lightning_log.handlers[:]
    lightning_log.handlers.clear()  # its handler keeps the stderr of the test that imported it
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    lightning_log.handlers[:] = handlers


def fit(conf: Path, run: Path, *more: str, toy: str = "ToyRecipe") -> int:
    arguments = ["fit", "--config", str(conf / f"experiment/{toy}.yaml"), "--trainer.default_root_dir", str(run)]
    return main([*arguments, *more])


def checkpoint(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return loaded


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


# ------------------------------------------------------------------ dispatch


def test_version__is_printed_without_importing_torch() -> None:
    code = "import sys, agssd.cli; agssd.cli.main(['--version']); print('torch' in sys.modules, 'yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["agssd", __version__, "False", "False"]


def test_version__costs_little_more_than_python_itself() -> None:
    def fastest(code: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest("import agssd.cli; agssd.cli.main(['--version'])") - fastest("pass") < 0.25


def test_help__lists_every_subcommand_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    folder = Path(main.__code__.co_filename).parent / "commands"
    files = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    names = {name.replace("_", "-") for name in files if not name.startswith("_")}
    assert set(lines) == set(TRAINING) | names
    assert all(len(line.split()) > 3 for line in lines.values())


def test_commands__loading_one_hides_no_other() -> None:
    before = commands.summaries()
    for name in before:
        assert callable(commands.load(name).run)
    assert commands.summaries() == before and all(commands.exists(name) for name in before)


def test_dispatch__unknown_subcommand_is_refused_with_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    error = capsys.readouterr().err
    assert "'fitt'" in error and "fit" in error and "prepare" in error and "Traceback" not in error


def test_main__runs_as_a_module_too() -> None:
    out = subprocess.run([sys.executable, "-m", "agssd", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout == f"agssd {__version__}\n"


def test_main__reader_that_has_seen_enough_is_no_error(tiny_cache: Path) -> None:
    command = f"import sys; from agssd.cli import main; sys.exit(main(['inspect', {str(tiny_cache)!r}, '--json']))"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_fit_help__takes_less_than_five_seconds_of_processor_time() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "agssd", "fit", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(2)) < 5


def test_fit_help__names_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups = ("backbone", "views", "data", "ema_teacher", "mask_ratio", "collapse_monitor", "view_panels", "throughput")
    assert all(f"--{group}" in text for group in (*groups, "checkpoint", "wandb"))


def test_refusal__is_for_what_the_user_gave_and_not_for_bugs() -> None:
    def caught(call: Any) -> Exception:
        try:
            call()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    from agssd.data_modules.sampling import micro_batch_size

    assert "global_batch_size 3" in str(refusal(caught(lambda: micro_batch_size(3, 2, 1))))
    assert "gone.txt" in str(refusal(caught(lambda: open("gone.txt"))))  # noqa: SIM115
    assert refusal(caught(lambda: int("x"))) is None
    assert refusal(caught(lambda: torch.distributions.Categorical(probs=torch.tensor(-1.0)))) is None
    assert refusal(KeyError("x")) is None


# ---------------------------------------------------------------------- fit


def test_fit__fills_its_directory_and_the_checkpoint_is_plain(conf: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit(conf, run, "--model.lr", "0.07", "--checkpoint.every_n_train_steps", "2") == 0
    names = ["checkpoints", "config.yaml", "machine.json", "metrics.csv", "state.json"]
    assert sorted(p.name for p in run.iterdir()) == names
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step00000002.ckpt",
        "step00000003.ckpt",
    ]
    assert (run / "checkpoints/last.ckpt").samefile(run / "checkpoints/step00000003.ckpt")  # one file, two names
    assert len(losses(run)) == 3
    saved = checkpoint(run)
    assert saved["global_step"] == 3  # the last step, though no multiple of 2
    parameters = saved["hyper_parameters"]
    assert parameters["lr"] == 0.07  # the command line wins
    assert parameters["backbone"] == {
        "class_path": "toy_recipe.ToyBackbone",
        "init_args": {"embed_dim": 5, "patch_size": [8, 8, 8]},
    }
    assert parameters["views"]["init_args"]["size_vox"] == [16, 16, 16]
    assert saved["state_dict"]["backbone.gain"].shape == (5,)
    assert saved["PretrainDataModule"]["samples_seen"] == 12
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] == str(run)
    assert config["seed_everything"] == 0


def test_fit__saved_config_repeats_the_run(conf: Path, tmp_path: Path) -> None:
    assert fit(conf, tmp_path / "a", "--backbone.embed_dim", "3") == 0
    again = ["--config", str(tmp_path / "a/config.yaml"), "--trainer.default_root_dir", str(tmp_path / "b")]
    assert main(["fit", *again]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert checkpoint(tmp_path / "b")["state_dict"]["backbone.gain"].shape == (3,)


@pytest.mark.parametrize("toy", ["ToyTask", "ToyPlain"])
def test_fit__models_without_views_or_backbone_ignore_those_groups(conf: Path, tmp_path: Path, toy: str) -> None:
    assert fit(conf, tmp_path / "run", toy=toy) == 0
    parameters = checkpoint(tmp_path / "run")["hyper_parameters"]
    assert "views" not in parameters
    assert ("backbone" in parameters) == (toy == "ToyTask")


def test_fit__second_config_merges_key_by_key(conf: Path, tmp_path: Path) -> None:
    overlay = dump(tmp_path / "overlay.yaml", {"trainer": {"max_steps": 1}, "data": {"init_args": {"seed": 9}}})
    assert fit(conf, tmp_path / "run", "--config", str(overlay)) == 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 1 and config["trainer"]["log_every_n_steps"] == 1
    assert config["data"]["init_args"]["seed"] == 9 and config["data"]["init_args"]["global_batch_size"] == 4


def test_fit__without_directory_every_run_gets_its_own(conf: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["fit", "--config", str(conf / "experiment/ToyPlain.yaml"), "--trainer.max_steps", "1"]
    assert main(arguments) == 0
    (run,) = (tmp_path / "runs/toyplain").iterdir()
    assert (run / "config.yaml").is_file()
    assert main(arguments) == 0  # same stamp, as after a requeue: the same run
    assert f"{run.relative_to(tmp_path)} is finished" in capsys.readouterr().out


def test_fit__finished_run_says_so_and_is_left_alone(conf: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert fit(conf, run) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for how in ([], ["--ckpt_path", "last"], ["--ckpt_path", str(run / "checkpoints/last.ckpt")]):
        assert fit(conf, run, *how) == 0
        told = capsys.readouterr().out
        assert "is finished" in told and "step 3 of 3" in told and "another --trainer.default_root_dir" in told
    assert fit(conf, run, "--trainer.max_steps", "4") == 2  # schedules would have another length
    assert "trainer.max_steps: 3 in the checkpoint, 4 now" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_fit__run_that_was_cut_off_behind_its_last_step_is_finished_and_says_what_is_missing(
    conf: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert fit(conf, run) == 0
    ended = read_state(run)
    assert ended is not None and ended["state"] == "finished"
    write_state(run, ended | {"state": "running", "pid": 2**22 + 1})  # killed: no process has that number
    capsys.readouterr()
    assert fit(conf, run) == 0
    said = capsys.readouterr().out
    assert "is finished" in said and "may be left out" in said
    settled = read_state(run)
    assert settled is not None and settled["state"] == "finished" and "best.ckpt" in settled["reason"]
    assert fit(conf, run) == 0
    assert "left out" not in capsys.readouterr().out  # it is said once
    stopped = ended | {"state": "stopped", "reason": "collapse"}
    write_state(run, stopped)
    assert fit(conf, run) == 0
    assert (read_state(run) or {})["reason"] == "collapse"  # whose report it is to keep


def test_fit__beside_a_run_in_the_same_directory_is_refused(
    conf: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TOY_STOPS_AT", "2")
    assert fit(conf, run, "--trainer.max_steps", "4") == 0
    monkeypatch.delenv("TOY_STOPS_AT")
    ended, rows = read_state(run), (run / "metrics.csv").read_bytes()
    assert ended is not None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        born = run_state._born(other.pid)
        living = ended | {"state": "running", "pid": other.pid, "born": born, "slurm_job": "41"}
        write_state(run, living)
        assert fit(conf, run, "--trainer.max_steps", "4") == 2
        said = capsys.readouterr().err
        assert f"process {other.pid} of SLURM job 41" in said and "another run goes on in" in said
        assert read_state(run) == {"format": run_state.FORMAT, **living} and (run / "metrics.csv").read_bytes() == rows
        other.communicate(b"\n")
    assert fit(conf, run, "--trainer.max_steps", "4") == 0  # it has ended
    assert checkpoint(run)["global_step"] == 4


def test_fit__run_without_checkpoints_wants_a_directory_of_its_own(conf: Path, tmp_path: Path, capsys: Any) -> None:
    assert fit(conf, tmp_path / "run", "--trainer.enable_checkpointing", "false") == 0
    assert fit(conf, tmp_path / "run", "--trainer.enable_checkpointing", "false") == 2
    error = capsys.readouterr().err
    assert "already holds a run" in error and "name another --trainer.default_root_dir" in error


@pytest.mark.parametrize(("accumulate", "how"), [(1, []), (2, []), (2, ["--ckpt_path", "last"])])
def test_fit__resumed_run_ends_like_an_undisturbed_one(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, how: list[str]
) -> None:
    more = ("--trainer.max_steps", "5", "--trainer.accumulate_grad_batches", str(accumulate))
    assert fit(conf, tmp_path / "whole", *more) == 0
    monkeypatch.setenv("TOY_STOPS_AT", "2")
    assert fit(conf, tmp_path / "cut", *more) == 0
    assert checkpoint(tmp_path / "cut")["global_step"] == 2
    monkeypatch.delenv("TOY_STOPS_AT")
    assert fit(conf, tmp_path / "cut", *how, *more) == 0
    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    assert torch.equal(whole["state_dict"]["backbone.gain"], cut["state_dict"]["backbone.gain"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert (tmp_path / "cut/config-2.yaml").is_file()


def test_fit__resumed_run_goes_on_in_its_wandb_run_without_a_step_twice(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb
    from wandb.sdk.wandb_run import Run

    log, sent = Run.log, list[tuple[str, int]]()

    def listen(run: Run, data: dict[str, Any], *given: Any, **named: Any) -> None:
        if "train/loss" in data:
            sent.append((str(run.id), data["trainer/global_step"]))
        log(run, data, *given, **named)

    monkeypatch.setattr(Run, "log", listen)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TOY_STOPS_AT", "2")
    assert fit(conf, tmp_path / "run", "--trainer.max_steps", "5") == 0
    wandb.finish()  # as the end of the process does
    monkeypatch.delenv("TOY_STOPS_AT")
    time.sleep(1.1)  # W&B names its folders by the second
    assert fit(conf, tmp_path / "run", "--trainer.max_steps", "5") == 0
    wandb.finish()
    name = (tmp_path / "run/wandb_id").read_text()
    assert sent == [(name, step) for step in range(5)]
    folders = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{name}") for folder in folders)


def test_fit__lines_and_tensorboard_follow_a_run_through_a_resume(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, more = tmp_path / "run", ("--tensorboard", "true", "--trainer.enable_progress_bar", "true")
    more += ("--trainer.max_steps", "5", "--progress.every_s", "0")
    monkeypatch.setenv("TOY_STOPS_AT", "2")
    assert fit(conf, run, *more) == 0
    assert read_state(run)["state"] == "stopped"  # type: ignore[index]
    monkeypatch.delenv("TOY_STOPS_AT")
    assert fit(conf, run, *more) == 0
    assert read_state(run)["state"] == "finished"  # type: ignore[index]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [0, 1, 2, 3, 4]
    assert [one.value for one in events.Scalars("train/loss")] == [float(np.float32(loss)) for loss in losses(run)]
    kept = yaml.safe_load((run / "tensorboard/hparams.yaml").read_text())
    assert kept["data"]["init_args"] | {"global_batch_size": 4, "cache": "<path>"} == kept["data"]["init_args"]
    assert "lr" not in kept and "_instantiator" not in kept  # the module's own are in model
    assert main(["runs", str(run)]) == 0
    assert "ToyRecipe" in capsys.readouterr().out


def test_fit__no_progress_where_it_is_switched_off(conf: Path, tmp_path: Path, capsys: Any) -> None:
    assert fit(conf, tmp_path / "a", "--trainer.enable_progress_bar", "true", "--progress.mode", "off") == 0
    assert "step 1" not in capsys.readouterr().out


def test_fit__resuming_with_other_model_settings_is_refused_with_the_difference(
    conf: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert fit(conf, run) == 0
    changes = ["--model.lr", "0.5", "--backbone.embed_dim", "7", "--mask_ratio.start", "0.1"]
    changes += ["--trainer.max_steps", "9", "--trainer.precision", "bf16-mixed", "--ema_teacher.momentum_start", "0.5"]
    assert fit(conf, run, "--ckpt_path", str(run / "checkpoints/last.ckpt"), *changes) == 2
    error = capsys.readouterr().err
    assert "model.lr: 0.01 in the checkpoint, 0.5 now" in error
    assert "backbone.embed_dim: 5 in the checkpoint, 7 now" in error
    assert "trainer.max_steps: 3 in the checkpoint, 9 now" in error
    for name in ("mask_ratio.start", "ema_teacher.momentum_start", "trainer.precision"):
        assert f"{name}: " in error
    assert error.count("in the checkpoint") == 6


_OF_THE_PLACE = {
    "accelerator", "strategy", "devices", "num_nodes", "accumulate_grad_batches", "max_time", "deterministic",
    "benchmark", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval",
    "check_val_every_n_epoch", "num_sanity_val_steps", "inference_mode", "log_every_n_steps", "logger", "callbacks",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams", "model_registry",
    "profiler", "detect_anomaly", "default_root_dir",
}  # fmt: skip


def test_changed_settings__every_argument_of_the_trainer_counts_unless_it_is_of_the_place() -> None:
    names = set(inspect.signature(lightning.pytorch.Trainer.__init__).parameters) - {"self", "plugins"}
    defaults: dict[str, Any] = dict.fromkeys(names)
    assert names > _OF_THE_PLACE, "a name that Lightning does not know"
    changed = {name for name in names if changed_settings({}, {"trainer": {**defaults, name: 7}}, defaults)}
    assert changed == names - _OF_THE_PLACE
    assert changed > {"max_steps", "max_epochs", "limit_train_batches", "overfit_batches", "sync_batchnorm"}
    later = {"unheard_of": 1}
    assert changed_settings({}, {"trainer": {**defaults, **later}}, defaults) == [
        "trainer.unheard_of: None in the checkpoint, 1 now"
    ]
    assert not changed_settings({}, {"trainer": {**defaults, **later}}, defaults | later), "its default is no change"


def test_changed_settings__of_plugins_only_those_that_compute() -> None:
    def found(*plugins: Any) -> list[str]:
        return changed_settings({"trainer": {"plugins": None}}, {"trainer": {"plugins": list(plugins)}}, {})

    place = {"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment", "init_args": {}}
    double = {"class_path": "lightning.pytorch.plugins.precision.DoublePrecision"}
    assert not found() and not found(place)
    (line,) = found(place, double)
    assert line.startswith("trainer.plugins: [] in the checkpoint") and "DoublePrecision" in line
    assert "SLURM" not in line


def test_fit__resuming_with_another_length_of_epoch_is_refused(conf: Path, tmp_path: Path, capsys: Any) -> None:
    assert fit(conf, tmp_path / "run") == 0
    changes = ["--trainer.max_epochs", "4", "--trainer.limit_train_batches", "2", "--trainer.sync_batchnorm", "true"]
    assert fit(conf, tmp_path / "run", *changes, "--trainer.limit_val_batches", "1") == 2
    error = capsys.readouterr().err
    assert "trainer.max_epochs: None in the checkpoint, 4 now" in error
    assert "trainer.limit_train_batches: None in the checkpoint, 2 now" in error
    assert error.count("in the checkpoint") == 3


@pytest.mark.parametrize("keyword", ["hpc", "registry:some/model"])
def test_fit__checkpoints_of_another_lineage_are_refused(conf: Path, tmp_path: Path, capsys: Any, keyword: str) -> None:
    assert fit(conf, tmp_path / "run", "--ckpt_path", keyword) == 2
    error = capsys.readouterr().err
    assert f"--ckpt_path {keyword}" in error and "name " in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_fit__best_is_the_best_of_the_run_and_held_to_its_settings(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TOY_STOPS_AT", "2")
    assert fit(conf, run) == 0
    assert fit(conf, run, "--ckpt_path", "best") == 2
    assert "best.ckpt does not exist" in capsys.readouterr().err
    shutil.copyfile(run / "checkpoints/last.ckpt", run / "checkpoints/best.ckpt")
    (run / "checkpoints/last.ckpt").unlink()
    assert fit(conf, run, "--ckpt_path", "best", "--model.lr", "0.5") == 2
    assert "best.ckpt was trained with other settings" in capsys.readouterr().err
    monkeypatch.delenv("TOY_STOPS_AT")
    assert fit(conf, run, "--ckpt_path", "best") == 0
    assert checkpoint(run)["global_step"] == 3 and len(losses(run)) == 3


def test_fit__another_cut_is_said_where_samples_meet(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_recipe

    monkeypatch.setenv("TOY_STOPS_AT", "1")
    assert fit(conf, tmp_path / "run") == 0
    monkeypatch.delenv("TOY_STOPS_AT")
    cut = ("--trainer.accumulate_grad_batches", "2")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shutil.copytree(tmp_path / "run", tmp_path / "alone")
        assert fit(conf, tmp_path / "alone", *cut) == 0
        assert not [one for one in said if "micro-batch of all" in str(one.message)]
        monkeypatch.setattr(toy_recipe.ToyRecipe, "couples_samples", ("koleo",), raising=False)
        shutil.copytree(tmp_path / "run", tmp_path / "same")
        assert fit(conf, tmp_path / "same") == 0
        assert not [one for one in said if "micro-batch of all" in str(one.message)]
        assert fit(conf, tmp_path / "run", *cut) == 0
    (line,) = [str(one.message) for one in said if "micro-batch of all" in str(one.message)]
    assert "accumulate_grad_batches was 1" in line and "is 2: koleo of ToyRecipe" in line and "is 1/2 now" in line


def test_fit__resuming_on_other_data_settings_is_refused_but_workers_are_free(
    conf: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TOY_STOPS_AT", "1")
    assert fit(conf, run) == 0
    again = ("--data.pin_memory", "false", "--data.prefetch", "3", "--trainer.accumulate_grad_batches", "2")
    assert fit(conf, run, *again, "--data.prob_foreground", "0.1") == 2
    error = capsys.readouterr().err
    assert "data.prob_foreground: 0.8 in the checkpoint, 0.1 now" in error and error.count("in the checkpoint") == 1
    monkeypatch.delenv("TOY_STOPS_AT")
    assert fit(conf, run, *again) == 0


def test_fit__broken_scan_stops_the_run_with_its_name_and_resumes_without_it(
    conf: Path, tmp_path: Path, tiny_cache: Path, spoil_cache: Callable[..., Path], capsys: Any
) -> None:
    broken, run = spoil_cache(tiny_cache, ["case001"], tmp_path / "broken.h5"), tmp_path / "run"
    every_step = ("--checkpoint.every_n_train_steps", "1", "--data_stream.every_n_steps", "1")
    length = ("--data.global_batch_size", "2", "--trainer.max_steps", "8")
    settings = ("--data.cache", str(broken), *length, *every_step)
    assert fit(conf, run, *settings, "--data.num_workers", "1") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert f"{broken}: cannot read image of case case001" in line and "Traceback" not in error
    again = ("--data.on_broken", "quarantine", "--data.num_workers", "2")
    assert fit(conf, run, *settings, *again) == 0
    listed = (run / "quarantine.csv").read_text().splitlines()
    assert listed[0] == "case,cache,first_sample" and len(listed) == 2 and listed[1].startswith("case001,0,")
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("data/source0_samples")]
    assert float(rows[-1]["data/source0_samples"]) == 16 and float(rows[-1]["data/source0_passes"]) == 16 / 5
    assert float(rows[-1]["data/replaced_samples"]) == 3  # the stopped run met the first of them in its third step


def test_differences__compiling_or_not_is_free_on_resuming() -> None:
    saved = {"class_path": "a.B", "init_args": {"compile": True, "lr": 0.1}}
    given = {"class_path": "a.B", "init_args": {"compile": False, "lr": 0.2}}
    assert list(differences("model", saved, given)) == ["model.lr: 0.1 in the checkpoint, 0.2 now"]


def test_fit__torn_and_missing_checkpoints_are_refused(conf: Path, tmp_path: Path, capsys: Any) -> None:
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(b"PK\x03\x04 not a checkpoint")
    assert fit(conf, tmp_path / "run", "--ckpt_path", str(torn)) == 2
    assert "torn.ckpt cannot be read as a checkpoint" in capsys.readouterr().err
    assert fit(conf, tmp_path / "run", "--ckpt_path", str(tmp_path / "gone.ckpt")) == 2
    assert "gone.ckpt does not exist" in capsys.readouterr().err
    assert fit(conf, tmp_path / "run", "--ckpt_path", "last") == 2
    assert "there is no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validate__works_beside_the_run_and_replaces_nothing(conf: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit(conf, run) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    common = ["validate", "--config", str(conf / "experiment/ToyRecipe.yaml"), "--trainer.limit_val_batches", "1.0"]
    for _ in range(2):
        assert main([*common, "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0  # the run of the checkpoint
    assert {path: path.read_bytes() for path in before} == before
    added = {path.name for path in run.iterdir()} - {path.name for path in before} - {"checkpoints"}
    assert added == {"validate.yaml", "validate-2.yaml", "validate_metrics.csv"}
    with (run / "validate_metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    gain = checkpoint(run)["state_dict"]["backbone.gain"].mean()
    assert [float(row["val/gain"]) for row in rows] == pytest.approx([float(gain)] * 2, rel=1e-6)


# ----------------------------------------------------------------- refusals


def refused(conf: Path, tmp_path: Path, capsys: Any, *more: str, toy: str = "ToyRecipe") -> str:
    """Return the message of a refused fit, after checking that it left nothing behind."""
    assert fit(conf, tmp_path / "run", *more, toy=toy) == 2
    assert not (tmp_path / "run").exists()
    error = str(capsys.readouterr().err)
    assert "Traceback" not in error and error.count("error:") == 1 and "usage:" not in error
    return error


def test_refusal__repeated_cache_names_the_remedy(conf: Path, tmp_path: Path, capsys: Any) -> None:
    error = refused(conf, tmp_path, capsys, "--data.cache", "A.h5", "--data.cache=B.h5")
    assert "--data.cache [A.h5,B.h5]" in error


def test_refusal__missing_cache_comes_before_anything_is_written(conf: Path, tmp_path: Path, capsys: Any) -> None:
    assert "gone.h5" in refused(conf, tmp_path, capsys, "--data.cache", "gone.h5")
    assert "gone.h5" in refused(conf, tmp_path, capsys, "--data.cache", "[gone.h5,other.h5]")


def test_refusal__endless_run_remainder_and_padding(conf: Path, tmp_path: Path, capsys: Any) -> None:
    assert "max_steps" in refused(conf, tmp_path, capsys, "--trainer.max_steps", "-1")
    assert "cannot be divided" in refused(conf, tmp_path, capsys, "--trainer.accumulate_grad_batches", "3")
    assert "too large" in refused(conf, tmp_path, capsys, "--data.parent_vox", "[200,200,200]")


def test_refusal__misspelt_keys_are_named(conf: Path, tmp_path: Path, capsys: Any) -> None:
    assert "learning_rate" in refused(conf, tmp_path, capsys, "--model.learning_rate", "1")
    wrong = dump(tmp_path / "wrong.yaml", {"trainer": {"max_stepz": 4}})
    assert "max_stepz" in refused(conf, tmp_path, capsys, "--config", str(wrong))


def test_refusal__second_model_would_inherit_settings(conf: Path, tmp_path: Path, capsys: Any) -> None:
    error = refused(conf, tmp_path, capsys, "--model", str(conf / "method/ToyTask.yaml"))
    assert "toy_recipe.ToyRecipe" in error and "toy_recipe.ToyTask" in error and "leak" in error


def test_refusal__backbone_must_be_stated_at_the_top(conf: Path, tmp_path: Path, capsys: Any) -> None:
    experiment = yaml.safe_load((conf / "experiment/ToyTask.yaml").read_text())
    del experiment["backbone"]
    experiment["model"] = {
        "class_path": "toy_recipe.ToyTask",
        "init_args": {"backbone": {"class_path": "toy_recipe.ToyBackbone"}},
    }
    dump(conf / "experiment/Inner.yaml", experiment)
    assert "state it at the top level" in refused(conf, tmp_path, capsys, toy="Inner")


def test_refusal__no_model_or_no_data(conf: Path, tmp_path: Path, capsys: Any) -> None:
    experiment = yaml.safe_load((conf / "experiment/ToyTask.yaml").read_text())
    for part in ("model", "data"):
        dump(conf / "experiment/Less.yaml", {key: value for key, value in experiment.items() if key != part})
        assert f"required: fit.{part}" in refused(conf, tmp_path, capsys, toy="Less")


def test_refusal__configured_callback_that_the_model_cannot_use(conf: Path, tmp_path: Path, capsys: Any) -> None:
    error = refused(conf, tmp_path, capsys, "--ema_teacher.momentum_start", "0.9")
    assert "EMATeacher" in error and "TeacherStudent" in error


def test_bug__keeps_its_traceback(conf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="probs"):
        fit(conf, tmp_path / "run", toy="ToyBug")


def test_traceback__flag_shows_where_a_refusal_came_from(conf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.h5"):
        fit(conf, tmp_path / "run", "--data.cache", "gone.h5", "--traceback")


# ---------------------------------------------------------------------- DDP


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_fit__signal_while_it_still_imports_ends_it_after_a_step_and_the_same_command_goes_on(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    assert fit(conf, tmp_path / "undisturbed") == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(agssd.cli, "_import_training", lambda: os.kill(os.getpid(), number))
        assert fit(conf, tmp_path / "run") == 75
    assert checkpoint(tmp_path / "run")["global_step"] == 1 and signal.getsignal(number) is before
    assert fit(conf, tmp_path / "run") == 0
    gains = [checkpoint(tmp_path / name)["state_dict"]["backbone.gain"] for name in ("run", "undisturbed")]
    assert torch.equal(*gains) and losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


TOLD_WITH_ITS_SERVICE = """
import os, signal, sys, time, toy_recipe, agssd.cli
from pathlib import Path

def told(self, *args):
    if self.trainer.global_step == 2:
        numbers = [n for path in Path("/proc/self/task").glob("*/children") for n in path.read_text().split()]
        names = {int(number): Path(f"/proc/{number}/comm").read_text().strip() for number in numbers}
        for number in (number for number, name in names.items() if "wandb" in name):
            os.kill(number, signal.SIGTERM)
            os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)
            print("the service is gone")
        time.sleep(float(os.environ["SETTLES_S"]))
        os.kill(os.getpid(), signal.SIGTERM)

toy_recipe.ToyRecipe.on_train_batch_start = told
sys.exit(agssd.cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("settles_s", ["0", "1"])
def test_fit__told_together_with_the_wandb_service_saves_itself_and_says_so(
    conf: Path, tmp_path: Path, settles_s: str
) -> None:
    arguments = ["fit", "--config", str(conf / "experiment/ToyRecipe.yaml"), "--trainer.max_steps", "9"]
    arguments += ["--trainer.default_root_dir", str(tmp_path / "run"), "--wandb.mode", "offline"]
    paths = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")])
    own = {name: value for name, value in os.environ.items() if "WANDB" not in name}  # no service of this process
    environment = own | {"PYTHONPATH": paths, "WANDB_MODE": "offline", "SETTLES_S": settles_s}
    command = [sys.executable, "-c", TOLD_WITH_ITS_SERVICE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "the service is gone" in done.stdout
    assert done.returncode == 75, done.stderr[-3000:]
    assert checkpoint(tmp_path / "run")["global_step"] == 3 and len(losses(tmp_path / "run")) == 3
    assert done.stderr.count("W&B is lost until the next start") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_fit__without_checkpoints_a_signal_ends_it_as_any_program(conf: Path, tmp_path: Path) -> None:
    code = "import os, signal, sys, agssd.cli as cli; there = cli._import_training\n"
    code += "def told(): there(); os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "cli._import_training = told; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["fit", "--config", str(conf / "experiment/ToyRecipe.yaml"), "--trainer.enable_checkpointing", "false"]
    command = [sys.executable, "-c", code, *arguments, "--trainer.default_root_dir", str(tmp_path / "run")]
    paths = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGTERM, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.ddp
def test_fit__two_processes_reach_the_weights_of_one(
    conf: Path, tmp_path: Path, tiny_cache: Path, spoil_cache: Callable[..., Path]
) -> None:
    broken = spoil_cache(tiny_cache, ["case001"], tmp_path / "broken.h5")
    settings = ["--data.cache", str(broken), "--data.on_broken", "quarantine", "--data_stream.every_n_steps", "1"]
    assert fit(conf, tmp_path / "one", *settings) == 0
    command = [sys.executable, "-m", "agssd.cli", "fit", "--config", str(conf / "experiment/ToyRecipe.yaml")]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command += ["--trainer.default_root_dir", str(tmp_path / "two"), *settings]
    paths = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (checkpoint(tmp_path / name)["state_dict"]["backbone.gain"] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "two/config.yaml").is_file() and not (tmp_path / "two/config-2.yaml").exists()
    replaced = []
    for name in ("one", "two"):
        assert [line.split(",")[0] for line in (tmp_path / name / "quarantine.csv").read_text().split()[1:2]] == [
            "case001"
        ]
        with (tmp_path / name / "metrics.csv").open() as file:
            rows = [row["data/replaced_samples"] for row in csv.DictReader(file) if row.get("data/replaced_samples")]
        replaced.append([float(row) for row in rows])
    assert replaced[0] == replaced[1] and replaced[0][-1] == 3  # summed over ranks


def test_changed_settings__what_early_checkpoints_do_not_name_is_what_it_was_then() -> None:
    saved = {"backbone": {"class_path": "agssd.models.vit.ViT", "init_args": {"depth": 4}}}
    for dims, changes in ((3, 0), (2, 1)):
        given = {"backbone": {"class_path": "agssd.models.vit.ViT", "init_args": {"depth": 4, "spatial_dims": dims}}}
        assert len(changed_settings(saved | {"trainer": {}}, given | {"trainer": {}}, {})) == changes
    parts: dict[str, Any] = {"trainer": {}, "data": {"parent_vox": [40, 56, 40]}, "views": {"init_args": {}}}
    for regions, centres, changes in ((False, "uniform", 0), (True, "regions", 2)):
        given = {"data": parts["data"] | {"regions": regions}, "views": {"init_args": {"centres": centres}}}
        assert len(changed_settings(parts, parts | given, {})) == changes
