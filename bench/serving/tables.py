"""The tables of docs/serving.md, for `bench.tables`: lists of a head and lines of cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WAYS = {"off": "off", "on": "on", "beside_learning": "beside learning"}
Lines = list[tuple[str, ...]]


def _run(found: Mapping[str, Any]) -> tuple[str, ...]:
    """The row that tells how the figures were made."""
    machine = f"{found['device']}, {found['server_threads']} thread(s), torch {found['torch']}, {found['date']}"
    return "run", f"`{found['command']}`; {machine}"


def server(found: Mapping[str, Any]) -> Lines:
    """Tokens per second and latencies of one, eight and 32 users."""
    rows: Lines = [("users", "learning", "tokens/s", "first token, ms: p50", "p99", "between tokens, ms: p50", "p99")]
    for row in found["streams"]:
        for way, shown in WAYS.items():
            run = row[way]
            rows.append((
                str(row["users"]), shown, f"{run['tokens_per_s']:.0f}",
                *(f"{run[what][f'p{q}_ms']:.0f}" for what in ("first_token", "between_tokens") for q in (50, 99)),
            ))  # fmt: skip
    return rows


def prices(found: Mapping[str, Any]) -> Lines:
    """What a token, a write, an opening and a user cost."""
    price, memory = found["prices"], found["memory"]
    return [
        ("what", "cost"),
        ("a token that is read (prompt)", f"{price['read_ms']:.1f} ms"),
        ("a token that is learnt", f"{price['learnt_ms']:.1f} ms, {price['learnt_over_read']:.1f} times as long"),
        ("writing a version", f"{found['store_write_ms']:.0f} ms, in a thread of its own"),
        ("opening a user", f"{found['user_open_ms']:.0f} ms"),
        ("a user in the store, after a few turns", f"{memory['stored_bytes'] / 1e6:.1f} MB"),
        ("a slot in memory", f"{memory['slot_bytes'] / 1e6:.1f} MB"),
        _run(found),
    ]


def soak(found: Mapping[str, Any]) -> Lines:
    """What came of half an hour with kills and evictions."""
    ends = [life[-1] / 1e9 for life in found["resident_bytes"] if life]
    return [
        ("what", "found"),
        ("users, slots, minutes", f"{found['users']}, {found['slots']}, {found['minutes']:g}"),
        ("kills, evictions", f"{found['kills']}, {found['evictions']}"),
        ("turns acknowledged as stored", str(found["turns_acknowledged"])),
        ("of these lost, or in another order", str(len(found["faults"]))),
        ("users whose state equals the replay, to the bit",
         f"{found['users_equal_to_the_bit']} of {found['users_replayed']}"),
        ("memory of the process before each kill", f"{min(ends):.2f} to {max(ends):.2f} GB"),
        _run(found),
    ]  # fmt: skip
