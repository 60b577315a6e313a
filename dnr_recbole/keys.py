"""The documentation of keys, made from their definitions."""

from __future__ import annotations

from typing import Any, List, NamedTuple

from dnr_recbole.config import Config


class KeyInfo(NamedTuple):
    """One line of the documentation of keys; ``default`` is that of the described run."""

    key: str
    default: Any
    scope: str
    range: str
    help: str


def describe_keys(config: Config) -> List[KeyInfo]:
    """Every key of a run, sorted: those that a user may set, then stage 1's own as ``retriever_args.<key>``."""
    stage1 = config.retriever_config()
    # data_path as a user writes it: for ml-100k the run reads RecBole's own folder, which is another on each machine.
    data_path = config.as_dict()["data_path"]
    rows = [
        KeyInfo(name, data_path if name == "data_path" else config[name], key.scope, key.range, key.help)
        for name, key in config.schema.items()
        if key.origin == "user" and not key.instead and not key.stage1
    ]
    rows.sort(key=lambda row: row.key.lower())
    own = sorted(stage1.own_keys | {name for name, key in stage1.schema.items() if key.stage1})
    for name in own:
        key = stage1.schema[name]
        rows.append(KeyInfo(f"retriever_args.{name}", stage1[name], "retriever", key.range, key.help))
    return rows


def as_text(rows: List[KeyInfo]) -> str:
    """A line per key."""
    return "\n".join(f"{row.key} = {row.default!r}  ({row.range}; {row.scope})  {row.help}" for row in rows)


def as_markdown(rows: List[KeyInfo]) -> str:
    """A table."""
    cells = lambda *texts: "| " + " | ".join(str(t).replace("|", "\\|") for t in texts) + " |"  # noqa: E731
    lines = [cells("key", "default", "range", "scope", "meaning"), cells(*["---"] * 5)]
    return "\n".join(
        lines + [cells(f"`{row.key}`", f"`{row.default!r}`", row.range, row.scope, row.help) for row in rows]
    )
