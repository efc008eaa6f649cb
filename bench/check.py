"""Whether ours has become slower beside its peers: `python bench/check.py FILE [--results FOLDER] [--store]`.

FILE is one of `bench/results`, of which the last run of each suite counts, or what `pytest bench --benchmark-only
--benchmark-json FILE` wrote. For every case the ratio ours / peer, both of one run, is compared with that of the latest
stored run of the same suite, options and machine kind; of 20th percentiles, for what else a machine does makes calls
slower, never faster. A case is worse if ours lost more than 15 % against every peer that both runs have: where it lost
against one alone, it is the peer that changed. Exit code 1 if a case is worse, 0 if none is, 2 if there is nothing to
compare with.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import record
from bench.record import ResultsError, Run

TOLERANCE = 0.15
PYTEST = "pytest"  # the suite's name of a pytest-benchmark run

Key = tuple[str, str, str]  # op, case, clock


@dataclass(frozen=True)
class Ratio:
    """Ours / peer in one case, now and then."""

    key: Key
    ours: str
    peer: str
    now: float
    then: float | None

    @property
    def change(self) -> float | None:
        """By which factor the ratio grew."""
        return None if self.then is None else self.now / self.then


def ratios(run: Run) -> dict[tuple[Key, str, str], float]:
    """Ours / peer for every case, contender of ours and peer."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for row in run["rows"]:
        groups.setdefault((row["op"], row["case"], row["clock"]), []).append(row)
    return {
        (key, ours["who"], peer["who"]): ours["us"]["p20"] / peer["us"]["p20"]
        for key, rows in groups.items()
        for ours in rows
        if ours["ours"]
        for peer in rows
        if not peer["ours"]
    }


def compare(run: Run, stored: Run | None) -> list[Ratio]:
    """Every ratio of `run`, beside that of `stored`."""
    before = {} if stored is None else ratios(stored)
    return [
        Ratio(key, ours, peer, now, before.get((key, ours, peer))) for (key, ours, peer), now in ratios(run).items()
    ]


def worse(found: Sequence[Ratio]) -> dict[tuple[Key, str], float]:
    """Cases and contenders that lost more than the tolerance against every peer: to the least factor of the loss."""
    changes: dict[tuple[Key, str], list[float]] = {}
    for ratio in found:
        if ratio.change is not None:
            changes.setdefault((ratio.key, ratio.ours), []).append(ratio.change)
    return {case: min(values) for case, values in changes.items() if min(values) > 1 + TOLERANCE}


def report(run: Run, stored: Run | None) -> Iterator[str]:
    """The comparison as lines."""
    found = compare(run, stored)
    bad = worse(found)
    if stored is None:
        yield f"no stored {run['suite']} run of {run['machine']['kind']} to compare with"
    else:
        yield f"{run['suite']} on {run['machine']['kind']}, beside {stored['date']}, commit {stored['commit']}"
    for ratio in found:
        op, case, _ = ratio.key
        then = "" if ratio.then is None else f" then {ratio.then:6.3f}"
        mark = "  WORSE" if (ratio.key, ratio.ours) in bad else ""
        yield f"{op:<16} {case:<40} {ratio.ours:<26} / {ratio.peer:<30} {ratio.now:7.3f}{then}{mark}"
    if bad:
        yield f"{len(bad)} of {len({(one.key, one.ours) for one in found})} cases are over {TOLERANCE:.0%} worse"


def latest(stored: Iterable[Run], run: Run) -> Run | None:
    """The last stored run of the same suite, machine kind and options that has a ratio of `run`'s; not itself."""
    names, wanted = ("suite", "dtype", "quick"), ratios(run).keys()
    alike = [
        one
        for one in stored
        if one != run
        and one["machine"]["kind"] == run["machine"]["kind"]
        and all(one.get(name) == run.get(name) for name in names)
        and ratios(one).keys() & wanted
    ]
    return alike[-1] if alike else None


def read(path: Path) -> list[Run]:
    """The last run of each suite of a file of results, or the one of pytest-benchmark's JSON.

    Raises:
        ResultsError: it is neither.
    """
    value = record.read_json(path)
    if isinstance(value, dict) and "benchmarks" in value:
        return [_from_pytest(value, path)]
    last = {(run["suite"], run.get("quick")): run for run in record.read(path)}
    return list(last.values())


def _from_pytest(value: dict[str, Any], path: Path) -> Run:
    facts = value.get("machine_info", {}).get("fave_fast")
    if facts is None:
        raise ResultsError(f"{path}: not of this bench; expected pytest bench --benchmark-only --benchmark-json FILE")
    rows = [one["extra_info"] for one in value["benchmarks"]]
    date = value.get("datetime", "")[:10] or datetime.date.today().isoformat()
    return {
        "suite": PYTEST,
        "date": date,
        "command": "pytest bench --benchmark-only",
        "absent": {},
        "versions": {},
        **facts,
        "rows": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="bench/check.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a file of results, or pytest-benchmark's JSON")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="stored runs (default: bench/results)")
    parser.add_argument("--store", action="store_true", help="keep the runs of FILE, too, if none is worse")
    arguments = parser.parse_args(argv)
    try:
        runs, stored = read(arguments.file), list(record.stored(arguments.results))
    except ResultsError as error:
        print(f"bench/check.py: error: {error}", file=sys.stderr)
        return 2
    bad = compared = False
    for run in runs:
        before = latest(stored, run)
        compared |= before is not None
        bad |= bool(worse(compare(run, before)))
        print("\n".join(report(run, before)))
    if arguments.store and not bad:
        for run in runs:
            print(f"stored in {record.append(run, arguments.results)}", file=sys.stderr)
        return 0
    if not compared:
        print("bench/check.py: nothing stored to compare with; --store keeps this run", file=sys.stderr)
        return 2
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
