"""What a bench compared, in words: methods, readouts, data, machines, commits."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from agssd.commands.bench.kept import Kept
from agssd.commands.bench.settings import Bench, Method, Readout
from agssd.commands.report.facts import fact_lists


def what_was_compared(kept: Kept, rows: Sequence[dict[str, Any]]) -> str:
    """Return methods and readouts in tables, data and machines in lists; of a path only its name is shown."""
    methods = [(name, _pretrained(kept.bench, name, method, rows)) for name, method in kept.bench.methods.items()]
    readouts = [(name, _asked(kept.bench, name, one)) for name, one in kept.bench.readouts.items()]
    facts = fact_lists([("Data", kept.data), ("Runs", _origin(kept.bench, rows))])
    return f'<div class="card">{_table("method", methods)}{_table("readout", readouts)}</div>{facts}'


def _pretrained(bench: Bench, name: str, method: Method, rows: Sequence[dict[str, Any]]) -> str:
    if method.fit:
        own = "; ".join(f"{escape(readout)}: {_words(words)}" for readout, words in method.fit.items())
        return f"random weights; {own}" if name == "scratch" else own
    if method.encoders:
        return f"pretrained elsewhere: {_words(method.encoders[: bench.seeds])}"
    if not method.pretrain:
        return "random weights"
    steps = sorted({row["pretraining_steps"] for row in rows if row["method"] == name})
    told = " to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1]))) if steps else "no"
    if method.time_of is not None:
        return (
            f"{told} steps of {escape(method.time_of)}, as many as fit into the time of {escape(str(bench.equal_time))}"
        )
    return f"{told} steps of {_words([*method.pretrain, *bench.pretrain_common])}"


def _asked(bench: Bench, name: str, one: Readout) -> str:
    labels = ", ".join(map(str, bench.labels_of(name)))
    if one.probe is not None:
        window, depths = (
            " × ".join(map(str, one.window_vox)),
            "the last depth" if one.depths == "last" else "four depths",
        )
        told = f"{escape(one.probe)} of frozen features, windows of {window} voxels, {depths}"
    else:
        told = f"{', '.join(map(str, one.steps))} steps of {_words([*one.fit, *bench.fit_common])}"
    seeds = f"; {bench.seeds_of(name)} seeds" if bench.seeds_of(name) < bench.seeds else ""
    return f"labels {escape(labels)}{seeds}; {told}"


def _words(words: Sequence[str]) -> str:
    """Return a command line, each flag with its value unbroken where there is room; of a path only its name."""
    flags: list[str] = []
    for word in (word.rpartition("/")[2] for word in words):
        if word.startswith("--") or not flags:
            flags.append(word)
        else:
            flags[-1] += f" {word}"
    return " ".join(f"<code>{escape(flag)}</code>" for flag in flags)


def _origin(bench: Bench, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    def all_of(*names: str) -> str:
        return ", ".join(sorted({str(row[name]) for row in rows for name in names if row.get(name)})) or "not known"

    days = sorted({row["time"][:10] for row in rows})
    folds = "the split test" if bench.num_folds is None else f"{bench.num_folds} folds of the split train"
    return [
        ("measured on", folds),
        ("pretraining seeds", str(bench.seeds)),
        ("draws of labels", str(bench.draws)),
        ("machine", all_of("machine")),
        ("threads", str(bench.threads)),
        ("commit", all_of("commit")),
        ("commit of pretraining", all_of("pretraining_commit")),
        ("settings", all_of("bench")),
        ("date", " to ".join(dict.fromkeys((days[0], days[-1])))),
    ]


def _table(name: str, rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th scope=row>{escape(head)}</th><td>{text}</td></tr>" for head, text in rows)
    return (
        f'<div class="whole"><table><thead><tr><th scope=col>{name}</th><th scope=col>what it is</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
