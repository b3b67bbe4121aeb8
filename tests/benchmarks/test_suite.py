"""The suite's arithmetic and its plumbing; nothing is timed."""

import dataclasses
import json

import pytest

from benchmarks import common, jax_work, plots, predict, run, suite, table, train
from benchmarks.programs import roofline, trace
from benchmarks.table import TableRow, Target

SETTINGS = suite.Settings("cpu", "cpu", "float32", ("eager",), None, (1,), (4,))


def test_a_ratio_compares_the_runs_of_a_round():
    # The machine slows down threefold: medians of each side alone would say the same, the order of rounds doesn't.
    row = TableRow("p", "n", "s", [1.0, 3.0, 2.0], [2.0, 4.5, 6.0], [0.5, 1.5, 1.0], less=True)
    assert row.ratio() == {"min": 1.5, "median": 2.0, "max": 3.0}
    assert row.share() == {"min": 0.5, "median": 0.5, "max": 0.5}


def test_more_is_better_where_a_row_says_so():
    row = TableRow("p", "n", "chips/s", [30.0, 20.0], [10.0, 10.0], [40.0])
    assert row.ratio()["median"] == 2.5
    assert row.share()["median"] == pytest.approx(0.625)


def test_rounds_that_do_not_match_are_no_ratio():
    with pytest.raises(ValueError, match="shorter"):
        TableRow("p", "n", "s", [1.0, 2.0], [1.0]).ratio()


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("ratio", ">=", 2.0), True),
        (Target("ratio", ">=", 2.1), False),
        (Target("ours", "<", 1.0), False),
        (Target("ours", "<=", 1.0), True),
        (None, None),
    ],
)
def test_targets(target, met):
    assert TableRow("p", "n", "s", [1.0], [2.0], less=True, target=target).met() is met


def test_a_target_beside_a_rival_that_did_not_run_is_neither_met_nor_missed():
    row = TableRow("p", "n", "s", [1.0], target=Target("ratio", ">=", 1.4))
    assert row.met() is None
    assert row.cells() == ["p", "n", "1.00 s", "", "", ">= 1.40x", "", ""]


def test_the_table(capsys):
    rows = [
        TableRow(
            "model",
            "forward",
            "s",
            [0.118, 0.12, 0.13],
            [0.2, 0.18, 0.19],
            [0.08] * 3,
            True,
            Target("ratio", ">=", 1.4),
        ),
        TableRow("train", "memory", "GB", [5.2], [3.3], less=True, target=Target("ours", "<", 4)),
    ]
    table.show(rows)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    forward = ["0.120 s (0.118-0.130)", "0.190 s (0.180-0.200)", "1.50x (1.46-1.69)", ">= 1.40x, met", "0.080 s", "67%"]
    memory = ["5.20 GB", "3.30 GB", "0.63x (0.63-0.63)", "< 4.00 GB, MISSED", "", ""]
    assert lines[0] == list(table.HEADER)
    assert lines[2:] == [["model", "forward", *forward], ["train", "memory", *memory]]
    assert json.loads(json.dumps(rows[1].to_json()))["met"] is False


def test_seconds_on_a_cpu_and_chips_on_a_card():
    runs = {"ours": [{"seconds": 2.0, "gflops_peak": 50.0}], "eager": [{"seconds": 3.0}]}
    row = suite.timing_row(SETTINGS, "p", "n", runs, "eager", chips=4, work=10.0)
    assert (row.unit, row.limit, row.ratio()["median"], row.share()["median"]) == ("s", [0.8], 1.5, 0.4)
    card = suite.Settings("gpu", "NVIDIA H200", "bfloat16", ("eager",), None, (1,), (4,))
    row = suite.timing_row(card, "p", "n", runs, "eager", chips=4, work=10.0)
    # 790 TFLOP/s, whatever was measured beside: 79,000 chips/s of 10 GFLOP.
    assert (row.unit, row.ours, row.ratio()["median"]) == ("chips/s", [2.0], 1.5)
    assert row.limit == [pytest.approx(79_000)]


def test_the_roofline_of_granite():
    # 32.44 GFLOP at 790 TFLOP/s are 41 us; 0.1 GB at 4.8 TB/s are 21 us, 0.4 GB 83 us.
    line = roofline.Roofline(flops=32.44e9, bytes=0.1e9)
    assert (line.bound, 1 / line.seconds) == ("compute", pytest.approx(24_353, rel=1e-3))
    line = roofline.Roofline(flops=32.44e9, bytes=0.4e9)
    assert (line.bound, 1 / line.seconds) == ("memory", pytest.approx(12_000))


def test_parts_of_a_step_are_differences():
    runs = [{"inputs": 1.0, "forward": 3.0, "backward": 8.0, "step": 9.5}]
    expected = {"inputs": [1.0], "forward": [2.0], "backward": [5.0], "optimiser": [1.5]}
    assert train.differences(runs) == expected


def test_what_being_sure_costs_is_of_the_same_round(monkeypatch):
    # The machine slows down threefold; each way goes on to take as many times a plain map's time.
    runs = [{"plain": t, "dropout": 1.25 * t, "symmetries": 8.5 * t, "ensemble": 1.2 * t} for t in (1.0, 3.0)]

    class Told:
        def __init__(self, *_, **arguments):
            self.facts, self.left = arguments, iter(runs)

        def once(self):
            return next(self.left)

        def close(self):
            pass

    monkeypatch.setattr(common, "Worker", Told)
    monkeypatch.setattr(common, "random_bundle", lambda fields, path: path)
    found = predict.measure_uncertainty(dataclasses.replace(SETTINGS, rounds=2))
    assert [list(row.ours) for row in found.rows] == [[1.25, 1.25], [8.5, 8.5], pytest.approx([1.2, 1.2])]
    assert [row.cells()[2:6:3] for row in found.rows] == [
        ["1.25 x (1.25-1.25)", "<= 1.30 x, met"],
        ["8.50 x (8.50-8.50)", "<= 8.20 x, MISSED"],
        ["1.20 x (1.20-1.20)", "<= 1.20 x, met"],
    ]
    models = [found.raw["facts"][name].rsplit("/", 1)[1] for name in ("bundle", "ensemble")]
    assert (models, found.raw["facts"]["samples"]) == (["swin_b", "swin_b_5_True"], 10)


@pytest.mark.slow
def test_each_way_of_being_sure_is_timed_on_a_program_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    monkeypatch.setattr(common, "SECONDS_A_CALL", 0.0)
    settings = dataclasses.replace(SETTINGS, fields=run.TINY)
    models = {"bundle": settings.bundle, "ensemble": settings.bundle_of({"members": 2, "shared_encoder": True})}
    facts, once = jax_work.uncertainty(**models, samples=2, side=32, dtype="float32")
    sure = ["mean", "sd"]
    expected = {"plain": ["mean"], "dropout": sure, "symmetries": sure, "ensemble": sure}
    assert facts == {"batch_size": 4, "channels": expected}
    assert all(seconds > 0 for seconds in once().values())
    assert once().keys() == expected.keys()


PROGRAM = """HloModule m

%inner (a: f32[2]) -> f32[2] {
  ROOT %dot.1 = f32[2]{0} dot(%a, %a), lhs_contracting_dims={0}
}

%moved (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  ROOT %t = f32[2]{0} transpose(%a), dimensions={0}
}

%mixed (a: f32[2]) -> f32[2] {
  %b = f32[2]{0} call(%a), to_apply=%inner
  ROOT %e = f32[2]{0} exponential(%b)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %fusion.1 = f32[2]{0} fusion(%x), kind=kLoop, calls=%moved
  %fusion.2 = f32[2]{0} fusion(%x), kind=kCustom, calls=%mixed
  %c = f32[2]{0} convolution(%x, %x), window={size=3}
  %g = (f32[2]{0}, s8[4]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %w = f32[2]{0} while(%x), condition=%inner, body=%mixed
  ROOT %add.7 = f32[2]{0} add(%x, %c)
}
"""


def test_kinds_of_operations():
    products, convolutions, copies, elementwise = trace.KINDS
    kinds = trace.kinds_of(PROGRAM)
    expected = {"fusion.1": copies, "fusion.2": products, "c": convolutions, "g": products, "add.7": elementwise}
    assert {name: kinds.get(name) for name in (*expected, "x", "w")} == expected | {"x": None, "w": None}
    found = [("fusion.1", 1.0), ("fusion.2", 6.0), ("c", 2.0), ("c", 1.0), ("end: c", 9.0), ("ThunkExecutor", 99.0)]
    assert trace.shares(found, kinds) == {products: 0.6, convolutions: 0.3, copies: 0.1, elementwise: 0.0}
    with pytest.raises(ValueError, match="none of the program"):
        trace.shares([("ThunkExecutor", 1.0)], kinds)


def test_a_profile_shows_the_operations_of_a_program():
    import jax
    import jax.numpy as jnp

    x = jnp.ones((256, 256))
    program = jax.jit(lambda x: jnp.sin(x @ x)).lower(x).compile()
    shares = trace.by_kind(program.as_text(), lambda: program(x).block_until_ready())
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["matrix products"] > 0


def test_workers_answer_in_turns_and_a_broken_one_says_so(tmp_path, monkeypatch):
    # A module of its own, so that no framework starts.
    (tmp_path / "counting.py").write_text(
        "from benchmarks import common\n"
        "def count(start):\n"
        "    print('chatter of a library')\n"
        "    state = [start]\n"
        "    def once():\n"
        "        state[0] += 1\n"
        "        return {'n': state[0]}\n"
        "    return {'start': start}, once\n"
        "common.serve({'count': count})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{common.ROOT}:{tmp_path}")
    with common.Crew() as workers:
        workers["a"] = common.Worker("counting", "count", start=0)
        workers["b"] = common.Worker("counting", "count", start=10)
        assert workers["b"].facts == {"start": 10}
        assert common.in_turns(workers, 2) == {"a": [{"n": 1}, {"n": 2}], "b": [{"n": 11}, {"n": 12}]}
    with pytest.raises(common.WorkerError, match="counting nothing"):
        common.ask("counting", "nothing")


def test_the_command_line_refuses_unknown_parts(capsys):
    assert run.parser().parse_args(["--only", "model,prep"]).only == ("model", "prep")
    with pytest.raises(SystemExit):
        run.parser().parse_args(["--only", "model,modle"])
    assert "unknown: modle" in capsys.readouterr().err


def result(rows, **parts):
    return {
        "machine": {"cpu": "a machine"},
        "settings": {"kind": "cpu", "dtype": "float32"},
        "rows": [row.to_json() for row in rows],
        "parts": parts,
    }


def test_pictures_are_drawn_from_results(tmp_path, monkeypatch, capsys):
    rows = [
        TableRow("model", f"forward, batch {size}", "s", [size * 0.14], [size * 0.2], [size * 0.08], less=True)
        for size in (8, 1)
    ]
    kinds = dict(zip(trace.KINDS, (0.6, 0.2, 0.1, 0.1), strict=True))
    breakdown = {"parts": {"inputs": [0.1], "forward": [0.6], "backward": [1.3]}, "kinds": kinds, "batch_size": 4}
    files = {"model": result(rows), "breakdown": result([], breakdown=breakdown)}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    paths = [str(tmp_path / f"{name}.json") for name in files]
    merged = plots.merged([tmp_path / "model.json", tmp_path / "breakdown.json"])
    assert plots.points(merged["rows"], "forward", False, "ours") == ([1, 8], pytest.approx([1 / 0.14, 1 / 0.14]))
    assert plots.points(merged["rows"], "forward", True, "ours") == ([], [])
    monkeypatch.setattr("sys.argv", ["plots", *paths, "--out", str(tmp_path / "out")])
    plots.main()
    assert [path.stat().st_size > 5000 for path in sorted((tmp_path / "out").glob("*.png"))] == [True, True]
    assert capsys.readouterr().out.count(".png") == 2
    with pytest.raises(SystemExit, match="no breakdown"):
        plots.step_time(plots.merged([tmp_path / "model.json"]))
