"""What holds for the project as a whole: weight of imports, dependency order, and what must not be in the tree."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".sh", ".cfg", ""}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def fastest(*arguments: str, repetitions: int = 12) -> float:
    """Seconds of the fastest of several runs: what the work costs, whatever else the machine does."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        done = run(*arguments)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    return min(times)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_import__light_and_without_torch() -> None:
    heavy = "torch numpy lightning monai torchio h5py matplotlib jsonargparse"
    done = run(
        "-c",
        f"import sys, agssd, agssd.types, agssd.schedules; print([m for m in '{heavy}'.split() if m in sys.modules])",
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_import__under_100_ms() -> None:
    probe = "import time; t = time.perf_counter(); import agssd; print(time.perf_counter() - t)"
    assert min(float(run("-c", probe).stdout) for _ in range(5)) < 0.1


def test_import__sets_nothing() -> None:
    probe = (
        "import logging, os, random; before = (dict(os.environ), random.getstate(), logging.root.handlers[:]);"
        "import agssd, agssd.cli;"
        "assert before == (dict(os.environ), random.getstate(), logging.root.handlers[:])"
    )
    done = run("-c", probe)
    assert done.returncode == 0, done.stderr


def test_import__every_module_alone() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "src" / "agssd").rglob("*.py")
    )
    probe = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = run("-W", "error::DeprecationWarning:agssd", "-c", probe, *modules)
    assert done.returncode == 0, done.stderr


def test_version__agrees_with_metadata_under_300_ms() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    done = run("-m", "agssd.cli", "--version")
    assert done.returncode == 0, done.stderr
    assert version in done.stdout
    assert fastest("-m", "agssd.cli", "--version") < 0.3


def test_layers__hold() -> None:
    probe = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_recipes__import_no_other_recipe() -> None:
    """What two recipes share moves down a layer; a recipe is read in one file."""
    found = []
    for path in sorted((ROOT / "src/agssd/methods").glob("*.py")):
        for name in re.findall(r"agssd\.methods\.(\w+)|from agssd\.methods import (\w+)", path.read_text()):
            if "".join(name) not in ("base", path.stem):
                found.append(f"{path.name}: {''.join(name)}")
    assert not found


def test_readme__shows_the_whole_diff_that_adds_a_recipe() -> None:
    text = (ROOT / "README.md").read_text()
    diff = text[text.index("```diff\n") + 8 :]
    parts = re.split(r"--- /dev/null\n\+\+\+ b/(.+)\n@@ -0,0 \+1,(\d+) @@\n", diff[: diff.index("\n```") + 1])
    shown = {name: (int(count), body) for name, count, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
    assert set(shown) == {"src/agssd/methods/simmim.py", "conf/method/simmim.yaml"}
    for name, (count, body) in shown.items():
        lines = (ROOT / name).read_text().splitlines()
        assert body.splitlines() == [f"+{line}" for line in lines] and count == len(lines), name


def test_public_names__resolve() -> None:
    probe = "import agssd; [getattr(agssd, name) for name in agssd.__all__]"
    done = run("-c", probe)
    assert done.returncode == 0, done.stderr
    done = run("-c", "import agssd; agssd.load_backbones")
    assert "AttributeError" in done.stderr


def test_tree__has_no_machine_of_its_own() -> None:
    patterns = {
        "an absolute path of somebody's machine": re.compile(r"(?<![\w./])/(?:home|Users|root|work|mnt|scratch)/\w"),
        "a host that serves packages": re.compile(
            r"https?://[^\s/\"']*(?:pypi|pythonhosted|artifactory|nexus|download\.pytorch)"
        ),
        "a note to come back": re.compile(r"\b(?:TODO|FIXME|XXX)\b"),
    }
    found = []
    for path in tracked_files():
        if path.suffix not in TEXT or path == Path(__file__).resolve() or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}"
                for what, pattern in patterns.items()
                if pattern.search(line)
            ]
    assert not found, "\n".join(found)


def test_tree__holds_no_large_file() -> None:
    large = [path for path in tracked_files() if path.stat().st_size > 1_000_000]
    assert not large


def test_tests__mirror_the_package() -> None:
    """Every test file of a mirrored folder is named for a module that exists, or for that module and an aspect."""
    extra = {"cluster", "conf", "contracts", "ddp", "report", "resume"}
    stray = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.relative_to(ROOT / "tests").parent
        if folder.parts and folder.parts[0] not in extra:
            modules = [module.stem for module in (ROOT / "src" / "agssd" / folder).iterdir()]
            if not any(f"{path.stem}_".startswith(f"test_{module}_") for module in modules):
                stray.append(str(path.relative_to(ROOT)))
    assert not stray


COMMANDS = sorted(
    path.stem.replace("_", "-")
    for path in (ROOT / "src" / "agssd" / "commands").iterdir()
    if not path.stem.startswith("_")
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help__every_command_explains_itself(command: str) -> None:
    done = run("-m", "agssd.cli", command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: agssd" in done.stdout
    options = re.findall(r"^  (-\S+.*?)$", done.stdout, re.MULTILINE)
    assert options


def test_help__lists_every_command() -> None:
    done = run("-m", "agssd.cli", "--help")
    assert done.returncode == 0, done.stderr
    for command in [*COMMANDS, "fit", "validate", "test", "predict"]:
        assert re.search(rf"\b{command}\b", done.stdout), command


def test_constraints__satisfy_the_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {
        name.lower(): version for name, version in (line.split("==") for line in lines if line and line[0] != "#")
    }
    for text in [*project["dependencies"], *project["optional-dependencies"]["demo"]]:
        requirement = Requirement(text)
        assert requirement.name.lower() in tested, f"{requirement.name} has no tested version"
        assert requirement.specifier.contains(tested[requirement.name.lower()]), text


def test_dependencies__cover_every_import() -> None:
    """Nothing is imported that the metadata does not name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["bench"], *extras["slices"], *extras["regions"]]
    named = {re.split(r"[\[><=!~]", text)[0].lower() for text in texts}
    modules = {
        "pil": "pillow",
        "yaml": "pyyaml",
        "lightning_utilities": "lightning-utilities",
        "skimage": "scikit-image",
    }
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for name in re.findall(r"^\s*(?:from|import) ([A-Za-z_]\w*)", path.read_text(), re.MULTILINE):
            if name not in sys.stdlib_module_names and name != "agssd":
                imported.add(modules.get(name.lower(), name.lower()))
    assert imported <= named, imported - named
