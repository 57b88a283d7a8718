"""What a run that goes on must have in common with its checkpoint, and which checkpoints it may go on from."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment

from agssd.run.artifacts import without_paths

# What a run computes, as long as it is not named below; all schedules are shares of trainer.max_steps.
RESUMED_UNCHANGED = ("seed_everything", "trainer", "model", "backbone", "views", "data", "mask_ratio", "ema_teacher")
# How fast a run is, where its files lie, what is predicted. Files move: another cache is the user's to answer for.
RESUMED_FREELY = (
    "model.compile",
    "data.cache",
    "data.num_workers",
    "data.pin_memory",
    "data.prefetch",
    "data.predict_split",
    "data.leakage",
    "data.on_broken",  # a run that a broken scan has stopped goes on without it
    # Of the trainer: where it runs, how long, what it validates and what it tells.
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",  # see AgssdCLI._warn_of_other_cut
    "trainer.max_time",
    "trainer.deterministic",
    "trainer.benchmark",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
    "trainer.limit_predict_batches",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.num_sanity_val_steps",
    "trainer.inference_mode",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.enable_checkpointing",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.enable_autolog_hparams",
    "trainer.model_registry",
    "trainer.profiler",
    "trainer.detect_anomaly",
    "trainer.default_root_dir",
)

# Settings that early checkpoints do not name, and what they were then.
NOT_NAMED_ONCE = {"backbone.spatial_dims": 3, "data.regions": False, "views.centres": "uniform"}


def refuse_missing(ckpt_path: str) -> None:
    """Refuse a checkpoint of this machine that is not there.

    Raises:
        ValueError: naming it.
    """
    if "://" not in ckpt_path and not Path(ckpt_path).exists():
        raise ValueError(f"--ckpt_path {ckpt_path} does not exist")


def refuse_other_lineages(ckpt_path: str, subcommand: str) -> None:
    """Refuse Lightning's words for checkpoints that are not of the run's own line.

    Raises:
        ValueError: saying what to name instead.
    """
    keyword = ckpt_path.partition(":")[0]
    if keyword == "hpc":
        raise ValueError(
            "--ckpt_path hpc means what Lightning saves inside its signal handlers, and agssd keeps these off: a run "
            "has one line of checkpoints. Leave --ckpt_path out, or name a file of DIR/checkpoints"
        )
    if keyword == "registry" and subcommand == "fit":
        raise ValueError(
            f"--ckpt_path {ckpt_path}: a checkpoint of a model registry cannot be held against the settings of the run "
            "before it is fetched; fetch it and name the file"
        )


def changed_settings(saved: dict[str, Any], given: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Return the :func:`differences` between the configuration of a checkpoint and the one that goes on from it.

    Args:
        saved: of the checkpoint.
        given: of the run.
        defaults: of ``trainer``, for settings that the version of Lightning which has saved did not know yet.
    """
    saved = saved | {"trainer": defaults | saved.get("trainer", {})}
    pairs = [(name, saved.get(name), given.get(name)) for name in RESUMED_UNCHANGED if name != "trainer"]
    before, now = ({**of["trainer"], "plugins": _computing(of["trainer"])} for of in (saved, given))
    pairs.append(("trainer", before, now))
    return [line for pair in pairs for line in differences(*pair)]


def _computing(trainer: dict[str, Any]) -> list[Any]:
    """Return the plugins that are neither a cluster's environment nor a way to write files."""
    plugins = trainer.get("plugins") or []
    return [one for one in (plugins if isinstance(plugins, list) else [plugins]) if not _is_of_the_place(one)]


def _is_of_the_place(plugin: Any) -> bool:
    module, _, name = str(plugin.get("class_path", "") if isinstance(plugin, dict) else plugin).rpartition(".")
    kind = getattr(import_module(module), name, None) if module else None
    return isinstance(kind, type) and issubclass(kind, (ClusterEnvironment, CheckpointIO))


def differences(name: str, saved: Any, given: Any) -> Iterator[str]:
    """Yield ``NAME: SAVED in the checkpoint, GIVEN now`` for every setting that differs and must not."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in sorted({*saved, *given}):
            label = f"{name}.{key}".replace(".init_args.", ".")
            if label not in RESUMED_FREELY:
                yield from differences(label, saved.get(key, NOT_NAMED_ONCE.get(label)), given.get(key))
    elif saved != given and saved != without_paths(given, name.rpartition(".")[2]):  # a copy that was sent has no paths
        yield f"{name}: {saved!r} in the checkpoint, {given!r} now"
