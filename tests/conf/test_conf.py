"""Every shipped YAML parses, builds what it names, is used by something, and states what the house asks of it."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.networks.nets import SwinUNETR
from tiny_sam import save_tiny_adapted, save_tiny_sam

from agssd.lightning_cli import AgssdCLI
from agssd.models.monai_swin_keys import load_into_monai_swin

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
WITHOUT_METHOD = ("small", "ct", "mri", "ultrasound_small")
OF_METHODS = {"agssd": "AGSSD", "region_contrast": "RegionContrast"}  # class by how the names of experiments begin
PRETRAINING = [path for path in EXPERIMENTS if path.stem.startswith(tuple(OF_METHODS)) or path.stem in WITHOUT_METHOD]
BACKBONES = sorted((CONF / "backbone").glob("*.yaml"))
METHODS = sorted((CONF / "method").glob("*.yaml"))
TASKS = [path for path in EXPERIMENTS if path not in PRETRAINING]
OVERLAYS = sorted((CONF / "cluster").glob("*.yaml"))
PLACES = {
    "trainer": {"accelerator", "devices", "num_nodes", "strategy", "plugins", "accumulate_grad_batches"}
    | {"default_root_dir"},
    "data": {"num_workers", "cache", "prefetch", "pin_memory"},
}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(CONF).with_suffix("")) for path in paths]


def first_quick(values: Sequence[Any]) -> list[Any]:
    """Return the values as parameters of which all but the first are left to `make test-slow`."""
    return [pytest.param(value, marks=pytest.mark.slow if number else ()) for number, value in enumerate(values)]


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


class Parsed(Exception):
    """Stops the CLI where a test has seen enough."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("AGSSD_RUN_STAMP", raising=False)
    monkeypatch.chdir(tmp_path)  # references resolve relative to their file, from any directory
    log, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    handlers = log.handlers[:]
    log.handlers.clear()
    torch.set_num_threads(1)
    yield
    log.handlers[:] = handlers
    torch.set_num_threads(threads)


@pytest.fixture
def only_build(monkeypatch: pytest.MonkeyPatch) -> list[AgssdCLI]:
    """Let the CLI parse and build, but not run; return the list that receives it."""
    built: list[AgssdCLI] = []

    def stop(self: AgssdCLI, subcommand: str) -> None:
        built.append(self)

    monkeypatch.setattr(AgssdCLI, "_run_subcommand", stop)
    return built


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let the CLI parse and then stop by ``Parsed``; return the list that receives the configuration."""
    seen: list[Any] = []

    def stop(self: AgssdCLI) -> None:
        seen.append(self.config["fit"])
        raise Parsed

    monkeypatch.setattr(AgssdCLI, "before_instantiate_classes", stop)
    return seen


def arguments(experiment: Path, *more: str) -> list[str]:
    if experiment.stem.startswith("lp_sam") and not Path("sam-vit-base").exists():  # in the test's own folder
        save_tiny_adapted(Path(content(CONF / "task/lp_sam_prompts.yaml")["init_args"]["adapted"]))
        save_tiny_sam(Path("sam-vit-base"))
    model = () if "model" in content(experiment) else ("--model", str(CONF / "method/agssd_small.yaml"))
    return ["fit", "--config", str(experiment), *model, "--data.cache", "cache.h5", *more]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=names(EXPERIMENTS))
def test_experiment__parses_and_builds(experiment: Path, only_build: list[AgssdCLI]) -> None:
    AgssdCLI(arguments(experiment, "--trainer.accelerator", "cpu"))
    (cli,) = only_build
    assert cli.model.hparams["_class_path"] == cli.config["fit"].model.class_path
    if experiment in PRETRAINING:
        named = [name for start, name in OF_METHODS.items() if experiment.stem.startswith(start)]
        assert [type(cli.model).__name__] == (named or ["AGSSD"])
        views, parent = cli.config["fit"].views.init_args, cli.config["fit"].data.init_args.parent_vox
        patch = cli.config["fit"].backbone.init_args.patch_size
        assert all(size % patch == 0 for size in (*views.size_vox, *views.local_size_vox))
        assert all(p >= s for p, s in zip(parent, views.size_vox, strict=True))


@pytest.mark.parametrize("group", ["trainer", "model.init_args", "data.init_args", "views.init_args", "checkpoint"])
@pytest.mark.parametrize("experiment", PRETRAINING, ids=names(PRETRAINING))
def test_experiment__misspelt_key_fails(experiment: Path, group: str, tmp_path: Path) -> None:
    refused_when_misspelt(experiment, group, tmp_path)


@pytest.mark.parametrize("group", ["trainer", "model.init_args", "data.init_args", "backbone.init_args"])
@pytest.mark.parametrize("experiment", TASKS, ids=names(TASKS))
def test_task_experiment__misspelt_key_fails(experiment: Path, group: str, tmp_path: Path) -> None:
    refused_when_misspelt(experiment, group, tmp_path)


def refused_when_misspelt(experiment: Path, group: str, tmp_path: Path) -> None:
    nested: Any = {"misspelt_key": 1}
    for part in reversed(group.split(".")):
        nested = {part: nested}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(nested))
    with pytest.raises(Exception, match="misspelt_key"):
        AgssdCLI(arguments(experiment, "--config", str(wrong)))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=names(OVERLAYS))
def test_overlay__says_where_and_never_what(overlay: Path) -> None:
    given = content(overlay)
    assert set(given) <= set(PLACES)
    assert set(given.get("trainer", {})) <= PLACES["trainer"]
    assert set(given.get("data", {})) <= {"init_args"}
    assert set(given.get("data", {}).get("init_args", {})) <= PLACES["data"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=names(OVERLAYS))
@pytest.mark.parametrize("experiment", first_quick(PRETRAINING), ids=names(PRETRAINING))
def test_overlay__merges_into_every_experiment(overlay: Path, experiment: Path, only_parse: list[Any]) -> None:
    with pytest.raises(Parsed):
        AgssdCLI(arguments(experiment, "--config", str(overlay)))
    (config,) = only_parse
    given = content(overlay)["trainer"]
    assert config.trainer.devices == given["devices"]
    trainer = content(CONF / "experiment" / content(experiment)["trainer"])
    assert config.trainer.max_steps == trainer["max_steps"] and config.trainer.precision == trainer["precision"]
    ranks = given["devices"] * given.get("num_nodes", 1) * given.get("accumulate_grad_batches", 1)
    assert config.data.init_args.global_batch_size % ranks == 0


def test_conf__no_file_is_orphaned() -> None:
    texts = {path: path.read_text() for path in FILES}
    texts[ROOT / "README.md"] = (ROOT / "README.md").read_text()
    for path in FILES:
        inside = str(path.relative_to(CONF))
        others = "\n".join(text for other, text in texts.items() if other != path)
        assert inside in others or path.parent.name in ("experiment", "cluster", "method", "bench", "base"), (
            f"nothing names conf/{inside}"
        )


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_conf__comments_give_a_command_or_a_user_and_lead_to_files_that_exist(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert "agssd" in head or "Named by" in head
    for mentioned in re.findall(r"conf/[\w/]+\.yaml", text):
        assert (ROOT / mentioned).is_file() or "NAME" in mentioned, mentioned


@pytest.mark.parametrize("folder", ["backbone", "views", "method"])
def test_part__states_every_argument_so_that_one_replaces_another(folder: str) -> None:
    groups, may_be_left_out = {"backbone", "views"}, {"appearance"}  # their own groups; appearance has a default set
    for path in sorted((CONF / folder).glob("*.yaml")):
        module, _, name = content(path)["class_path"].rpartition(".")
        accepted = set(inspect.signature(getattr(import_module(module), name)).parameters)
        given = set(content(path)["init_args"])
        assert accepted - groups - may_be_left_out <= given <= accepted - groups, path.stem


@pytest.mark.parametrize("name", WITHOUT_METHOD)
def test_experiment_without_method__is_that_of_agssd_without_what_is_its_methods(name: str) -> None:
    whole = content(CONF / f"experiment/agssd_{name}.yaml")
    del whole["model"]
    whole["collapse_monitor"].pop("max_gradient_ratio", None)  # of its weights
    bare = content(CONF / f"experiment/{name}.yaml")
    views = [content(CONF / "experiment" / found.pop("views")) for found in (whole, bare)]
    for found in views:
        found["init_args"].pop("num_local")  # local views are for its [CLS] term
    assert bare == whole and views[0] == views[1]


@pytest.mark.parametrize("name", first_quick(WITHOUT_METHOD))
@pytest.mark.parametrize("method", METHODS, ids=names(METHODS))
def test_method__keeps_its_own_settings_in_every_experiment(
    method: Path, name: str, only_build: list[AgssdCLI]
) -> None:
    model, data = ["--model", str(method)], ["--data.cache", "cache.h5", "--trainer.accelerator", "cpu"]
    if name != "small" and method.stem.endswith("_small"):
        pytest.skip("sized for small experiments")
    if "ultrasound" in name and len(content(method)["init_args"].get("base_grid", [])) == 3:
        pytest.skip("a grid of volumes; frames need a --model.base_grid of two numbers")
    AgssdCLI(["fit", "--config", str(CONF / f"experiment/{name}.yaml"), *model, *data])
    (cli,) = only_build
    stated = content(method)
    assert cli.config["fit"].model.class_path == stated["class_path"]
    for key, value in stated["init_args"].items():
        found = cli.config["fit"].model.init_args[key]
        assert (list(found) if isinstance(found, tuple) else found) == value, key
    ratio = stated["init_args"].get("mask_ratio")
    schedule = next(c for c in cli.trainer.callbacks if type(c).__name__ == "MaskRatioSchedule")
    schedule.active, schedule._total = hasattr(cli.model, "mask_ratio"), 1
    if ratio is not None:
        schedule._apply(cli.trainer, cli.model)
        assert list(cli.model.mask_ratio) == ratio, "the experiment's ratio replaces the method's"


def advised(path: Path) -> list[str]:
    """Return the flags that the comments of a method file advise, the words of its commands left out."""
    found: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("#") and "agssd fit" not in line:
            found += re.findall(r"--(?:model|ema_teacher)\.\w+ (?!with\b)[^\s;]+", line)
    return [word for flag in found for word in flag.rstrip(".:,").split(" ")]


ADVISED = [path for path in METHODS if advised(path)]


@pytest.mark.parametrize("method", ADVISED, ids=names(ADVISED))
def test_method__what_its_comments_advise_builds(method: Path, only_build: list[AgssdCLI]) -> None:
    flags = advised(method)
    model, data = ["--model", str(method), *flags], ["--data.cache", "cache.h5", "--trainer.accelerator", "cpu"]
    AgssdCLI(["fit", "--config", str(CONF / "experiment/small.yaml"), *model, *data])
    config = only_build[0].config["fit"]
    for flag, text in zip(flags[::2], flags[1::2], strict=True):
        group, name = flag.removeprefix("--").split(".")
        found = (config.model.init_args if group == "model" else config[group])[name]
        assert (list(found) if isinstance(found, tuple) else found) == yaml.safe_load(
            re.sub(r"^(\d+)e", r"\1.0e", text)
        ), flag


def test_makefile__bench_methods_takes_what_the_comments_advise() -> None:
    makefile = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) := (.+)$", makefile, re.MULTILINE))
    rows = re.findall(r"--also '[^']*? (conf/method/\w+\.yaml) ([^']+)'", makefile)
    assert len(rows) >= 4
    for path, flags in rows:
        for _ in range(2):  # one variable holds another
            flags = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], flags)
        words, wanted = flags.split(), advised(ROOT / path)
        given = {pair for pair in zip(words[::2], words[1::2], strict=True) if pair[0].startswith("--model.")}
        assert given and given <= set(zip(wanted[::2], wanted[1::2], strict=True)), path


@pytest.mark.parametrize(
    ("name", "of"), [("agssd_ultrasound", "agssd_small"), ("region_contrast_ultrasound", "region_contrast_small")]
)
def test_method_of_ultrasound__differs_in_appearances_alone(name: str, of: str) -> None:
    ours, volumes = (content(CONF / "method" / f"{stem}.yaml") for stem in (name, of))
    appearance = ours["init_args"].pop("appearance")
    assert appearance.items() >= volumes["init_args"].pop("appearance", {}).items()
    assert ours == volumes


def test_readme__lists_every_method_once() -> None:
    _, table = (ROOT / "README.md").read_text().split("| `conf/method/` | Method | Loss |\n")
    rows = table.split("\n\n")[0].splitlines()[1:]
    listed = [row.split("`")[1].removesuffix(".yaml") for row in rows]
    assert sorted(listed) == [path.stem for path in METHODS if not path.stem.endswith("_small")]


@pytest.mark.parametrize("second", BACKBONES, ids=names(BACKBONES))
@pytest.mark.parametrize("first", first_quick(BACKBONES), ids=names(BACKBONES))
def test_backbone__replaces_another_without_a_trace(first: Path, second: Path, only_parse: list[Any]) -> None:
    with pytest.raises(Parsed):
        AgssdCLI(arguments(CONF / "experiment/ct.yaml", "--backbone", str(first), "--backbone", str(second)))
    (config,) = only_parse
    for found in (config.backbone, config.model.init_args.backbone):
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.init_args.items()}
        assert {"class_path": found.class_path, "init_args": plain} == content(second)


@pytest.mark.parametrize("name", first_quick(["swin_unetr_tiny", "resnet_fpn_small"]))
@pytest.mark.parametrize("method", METHODS, ids=names(METHODS))
def test_method__takes_other_families_of_encoders_or_says_why_not(
    method: Path, name: str, only_build: list[AgssdCLI]
) -> None:
    parts = ["--model", str(method), "--backbone", str(CONF / f"backbone/{name}.yaml")]
    kind = content(CONF / f"backbone/{name}.yaml")["class_path"].rpartition(".")[2]
    command = ["fit", "--config", str(CONF / "experiment/small.yaml"), *parts, "--data.cache", "cache.h5"]
    try:
        AgssdCLI([*command, "--trainer.accelerator", "cpu"])
    except ValueError as error:
        left_out = {"agssd", "agssd_small", "agssd_ultrasound"}
        reasons = {"mae": "cannot leave tokens out; use a ViT"}
        reasons |= dict.fromkeys(left_out, "for AG-SSD, student_views both or masked")
        if name == "resnet_fpn_small":
            reasons["moco_v3"] = "no patch embedding to freeze; set model.freeze_patch_embedding to false"
        assert f"{kind} " in str(error) and reasons[method.stem] in str(error)
        if method.stem not in left_out:
            return
        AgssdCLI([*command, "--trainer.accelerator", "cpu", "--model.student_views", "masked"])  # as it says
    encoder = only_build[0].model.backbone
    assert type(encoder).__name__ == kind and encoder.patch_size == (8, 8, 8)


@pytest.mark.parametrize(
    "path", [path for path in BACKBONES if "agssd fit" in path.read_text()], ids=lambda path: path.stem
)
def test_backbone__command_in_its_head_is_accepted(path: Path, only_build: list[AgssdCLI]) -> None:
    said = path.read_text().replace("\\\n#", "")
    (command,) = re.findall(r"agssd (fit .*)", said)
    words = [str(ROOT / word) if word.startswith("conf/") else word for word in command.split()]
    AgssdCLI([*words, "--trainer.accelerator", "cpu"])
    assert type(only_build[0].model.backbone).__name__ == content(path)["class_path"].rpartition(".")[2]


def test_swin_unetr_v2__has_monais_usual_sizes(only_build: list[AgssdCLI]) -> None:
    parts = ["--model", str(CONF / "method/simmim.yaml"), "--backbone", str(CONF / "backbone/swin_unetr_v2.yaml")]
    command = ["fit", "--config", str(CONF / "experiment/ct.yaml"), *parts, "--data.cache", "cache.h5"]
    AgssdCLI([*command, "--model.mask_block", "1", "--trainer.accelerator", "cpu"])
    encoder = only_build[0].model.backbone
    network = SwinUNETR(1, 2, feature_size=48, use_v2=True, downsample="mergingv2")
    load_into_monai_swin(encoder, network)
    assert encoder.token_grid((96, 96, 96)) == (3, 3, 3) and encoder.embed_dim == 768


@pytest.mark.slow
def test_agssd_small__trains_and_its_callbacks_act(tiny_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--data.cache", str(tiny_cache), "--trainer.default_root_dir", str(run), "--trainer.max_steps", "3"]
    more += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    more += ["--data.global_batch_size", "4"]
    AgssdCLI(["fit", "--config", str(CONF / "experiment/agssd_small.yaml"), *more])
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["config"]["backbone"]["class_path"] == "agssd.models.vit.ViT"
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert "train/ema_momentum" in header and "train/mask_ratio_low" in header
    assert list((run / "panels").glob("*.png"))
