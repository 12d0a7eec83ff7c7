"""The bench's arithmetic, its table, and that it leaves no process behind."""

from __future__ import annotations

import json
import random
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bench import core, crew, deploy_tables, durability, harness, models, report, tables, traffic
from bench.peers.kernel import Rows, table_kernel


def test_rate_counts_only_while_all_are_at_work() -> None:
    """A slow worker that goes on alone does not dilute the rate."""
    fast = harness.Trace([0.0, 1.0, 2.0, 3.0], [])
    slow = harness.Trace([0.0, 1.5, 3.0, 4.5, 6.0], [])
    assert harness.joint_rate([fast, slow]) == pytest.approx(1.0 + 2 / 3)


def test_rate_of_one_step_that_ends_late_is_its_own() -> None:
    assert harness.joint_rate([harness.Trace([0.0, 1.0], []), harness.Trace([0.0, 4.0], [])]) == pytest.approx(1.25)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that becomes twice as slow after a round changes no ratio."""
    samples = harness.Samples(ours=[8.0, 4.0, 4.0], theirs=[4.0, 2.0, 2.0])
    assert samples.ratio("ours", "theirs") == 2.0


def test_rounds_alternate_and_the_first_is_thrown_away() -> None:
    calls: list[str] = []

    def note(name: str) -> float:
        calls.append(name)
        return len(calls)

    samples = harness.interleave({name: partial(note, name) for name in "ab"}, rounds=2)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert samples == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_a_step_before_the_first_is_not_measured() -> None:
    trace = harness.run_steps(partial(next, count(1)), 3)
    assert trace.values == [2, 3, 4]
    assert len(trace.stamps) == 4


def _result(value: float) -> report.Result:
    checks = [report.Check("speed", value, 0.8), report.Check("memory", 90, 100, at_most=True)]
    return report.Result("core.9", "something", "of it", checks, {"peer (steps/s)": 12345.6})


def test_a_result_holds_when_every_part_does() -> None:
    answer = json.loads(_result(0.8).json())
    assert answer == {
        "figure": "core.9",
        "what": "something",
        "value": 0.8,
        "unit": "of it",
        "beside": {"memory": 90, "peer (steps/s)": 12345.6},
        "target": "≥ 0.8; memory ≤ 100",
        "holds": True,
    }


def test_a_short_result_says_why() -> None:
    answer = json.loads(_result(0.75).json())
    assert not answer["holds"]
    assert answer["reason"] == "speed is 0.75, not ≥ 0.8"
    assert "**short**: speed is 0.75" in _result(0.75).row()


def test_what_could_not_be_measured_is_short() -> None:
    result = report.Result("core.9", "something", "of it", error="no | server\ntrace")
    assert json.loads(result.json())["value"] is None
    assert result.row().endswith("| **short**: no / server |")


def test_the_table_goes_between_the_markers() -> None:
    readme = f"# Title\n{report.START}\nstale\n{report.STOP}\nrest\n"
    new = report.insert(readme, report.table([_result(1.0)], "a machine"))
    assert new.startswith(f"# Title\n{report.START}\nMeasured on a machine.")
    assert new.endswith(f"{report.STOP}\nrest\n")
    assert "stale" not in new
    assert report.insert(new, "x") == f"# Title\n{report.START}\nx\n{report.STOP}\nrest\n"


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the lines"):
        report.insert("# Title\n", "x")


def test_resident_memory_is_summed_by_name() -> None:
    shared = "7f00-7f10 rw-s 0 00:01 9   /memfd:gradients (deleted)\nSize: 8 kB\nRss:  1000 kB\n"
    private = "7f10-7f20 rw-p 0 00:00 0\nRss: 500 kB\n"
    assert core.resident_mb(2 * shared + private) == {"/memfd:gradients (deleted)": 2.048, "": 0.512}


def test_own_time_is_that_of_the_worker_that_came_last() -> None:
    traces = [harness.Trace([0.0, 5.0, 10.0], [0.1, 2.0]), harness.Trace([0.0, 5.0, 10.0], [1.0, 0.4])]
    assert core.own_time_percent(traces) == pytest.approx(5.0)


def stepper() -> harness.Step:
    """Run in a process of the bench: a step that does nothing."""
    return lambda: 7


def failing() -> None:
    """Run in a process of the bench."""
    raise ValueError("no such thing")


def test_a_fleet_ends_its_processes() -> None:
    with harness.Fleet() as fleet:
        process = fleet.start(f"{__name__}.stepper")
        process.ready()
        process.begin(3)
        assert process.answer().values == [7, 7, 7]
        folder = Path(fleet.folder)
    assert not process.is_alive
    assert not folder.exists()


def test_a_process_that_fails_says_why() -> None:
    with harness.Fleet() as fleet, pytest.raises(harness.BenchError, match=r"failing\(\) failed: no such thing"):
        fleet.start(f"{__name__}.failing").ready()


def test_time_to_a_quality_is_that_of_the_first_epoch_that_reaches_it() -> None:
    said = "epoch 1: loss 1.1, held-out RMSE 0.9400, 0.50 s\nepoch 2: loss 0.9, held-out RMSE 0.9300, 1.00 s\n"
    assert tables.seconds_to(0.93, said) == 1.0
    assert tables.seconds_to(0.92, said) == float("inf")


def test_means_are_apart_by_errors_of_their_difference() -> None:
    """Variances 1 and 4 over three seeds each: the error is √(5/3)."""
    assert models.errors_apart([1.0, 2.0, 3.0], [5.0, 7.0, 9.0]) == pytest.approx(5 / (5 / 3) ** 0.5)
    assert models.errors_apart([1.0, 1.0], [1.0, 1.0]) == 0.0
    assert models.errors_apart([1.0, 1.0], [2.0, 2.0]) == float("inf")


def test_ids_of_batches_are_strewn_one_to_one_and_zipf_is_zipf() -> None:
    rows = 1000
    ids = np.concatenate(traffic.batches("zipf", rows, seed=0))
    counts = np.sort(np.bincount(ids, minlength=rows))[::-1]
    assert len(counts) == rows
    assert counts[0] / counts[9] == pytest.approx(10**traffic.ZIPF, rel=0.05)
    assert len(np.unique(np.concatenate(traffic.batches("uniform", rows, seed=0)))) == rows


def test_so_many_ids_of_a_batch_are_not_among_the_hottest() -> None:
    rows, hottest = 20_000, 500
    chance = np.random.default_rng(0)
    shares = np.arange(1.0, rows + 1) ** -traffic.ZIPF
    drawn = chance.choice(rows, traffic.BATCH, p=shares / shares.sum())
    assert traffic.distinct_beyond(rows, hottest) == pytest.approx(
        np.count_nonzero(np.unique(drawn) >= hottest), rel=0.02
    )


def test_the_plain_array_of_the_bench_makes_the_steps_of_a_table() -> None:
    """It is a peer only if it does the same work."""
    rows, chance = 500, np.random.default_rng(0)
    ours, plain = Rows(rows, 1, plain=False), Rows(rows, 2, plain=True)
    table_kernel(1).pull(np.arange(rows), plain.table.values, touch=False, now=0.0)
    found = [np.empty((300, traffic.DIM), np.float32) for _ in range(2)]
    for _ in range(3):
        ids, some = chance.permutation(rows)[:300], chance.normal(0, 1, (300, traffic.DIM)).astype(np.float32)
        for table, out in zip((ours, plain), found, strict=True):
            table.push(ids, some)
            table.pull(ids, out)
        np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-7)


def simulate(kind: str, deaths: list[tuple[float, int]], *, closes_s: float) -> float:
    """Simulate three workers whose steps take a second, from their first commit on, away for half a second after a death."""
    return durability.simulate(kind, 3, 1.0, deaths, 0.5, 0.5, closes_s, random.Random(0))


@pytest.mark.parametrize("kind", ["bsp", "asp"])
def test_without_deaths_the_bound_is_what_the_workers_do(kind: str) -> None:
    assert simulate(kind, [], closes_s=30.5) == pytest.approx(3.0)


def test_a_death_costs_the_push_that_was_being_made_and_a_joiner_begins_with_the_others() -> None:
    assert simulate("bsp", [(1.2, 0)], closes_s=1.5) == 2.0  # commit 2, at 2 s
    assert (
        simulate("bsp", [(1.2, 0)], closes_s=2.5) == 2.5
    )  # commits 2 and 3: the successor came at 1.7 s and began at 2 s
    assert simulate("bsp", [(1.2, 0), (1.8, 0)], closes_s=2.5) == 2.0  # it dies before it has begun


def test_when_all_are_dead_the_first_to_come_goes_on_alone() -> None:
    assert simulate("bsp", [(1.2, 0), (1.3, 1), (1.4, 2)], closes_s=1.5) == pytest.approx(
        1 / 1.7
    )  # from 1.7 s to 2.7 s


def test_a_crew_is_killed_and_comes_back_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TOKEN", "a token for tests")
    plan = crew.Plan("bsp", 3, 0.02, kill_every_s=0.1, away_s=0.1, warm_s=0.1, window_s=1.0, seed=3)
    with harness.Fleet() as fleet:
        seen = durability.run(fleet, plan)
    assert len(seen.kills) > 3
    assert 0.0 < seen.alive < 1.0
    assert 0.0 < durability.rate(seen) < 150.0  # of three that never die


@pytest.mark.parametrize("kept", ["log:3", "replicated:3"])
def test_updates_are_counted_under_servers_that_are_killed(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TOKEN", "bench")
    tally = durability.Tally()
    with harness.Fleet() as fleet:
        updates, wrong = durability.count_updates(fleet, random.Random(1), tally, kept, "bsp", 2, 2)
    assert (wrong, tally.kills) == (0, 2)
    assert updates > 3 * durability.ENDS_AFTER


def test_a_push_is_seen_with_its_own_value_of_the_probe_or_a_later_one() -> None:
    lags = deploy_tables.freshness([(1, 0.0), (2, 1.0), (3, 2.0)], [(0, 0.5), (2, 1.5)])
    assert lags == [1.5, 0.5, float("inf")]
