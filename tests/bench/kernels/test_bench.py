"""The bench: counts against hand counts, checks that catch wrong results, statistics, and the three commands."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ttt
from bench.kernels import check, measure, models, plot, run, state, suites, timing
from bench.kernels.contenders import PlainLayer, compiled, plain_commit, plain_window_linear
from bench.kernels.registry import Case, Contender, Unavailable
from bench.kernels.suites.commit import Commit
from bench.kernels.suites.decode import Decode
from bench.kernels.suites.fisher import Fisher
from bench.kernels.suites.growth import layer_memory
from bench.kernels.suites.loops import Loop
from bench.kernels.suites.observe import Observe
from bench.kernels.suites.window_linear import WindowLinear
from ttt.ops.backends import calls


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A pool and a copy of kilobytes: these tests measure nothing."""
    monkeypatch.setattr(state, "POOL", 1 << 16)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)


def tiny_commit(dtype="float32", replay=2):
    return Commit("cpu", dtype, 24, 40, 5, replay, dtype)


def tiny_decode(dtype="float32", window=4):
    return Decode("cpu", dtype, 24, 40, window, 1, dtype)


# -- bytes and flops ----------------------------------------------------------------------------------------------


def test_commit_counts():
    case = Commit("cpu", "bfloat16", 3, 5, 7, 2, "float32")
    # W read and written, W* read: 2 bytes each; Omega read, F read and written: 4 each; x and delta; 2 replay rows.
    assert case.bytes("ttt") == 15 * (3 * 2 + 3 * 4) + 7 * (5 + 3) * 2 + 2 * 5 * 2
    assert case.flops("ttt") == 2 * 15 * 7 + 2 * 15 * 7 + 2 * 15 * 2 + 2 * 15 * 2  # G, S, E, E^T V
    assert case.product_flops("ttt") == 4 * 15 * 7
    assert case.bytes("forward") == 15 * 2 + 7 * 8 * 2
    assert case.flops("forward") == 2 * 15 * 7
    assert case.name == "3x5, T = 7, R = 2, float32 state"


def test_decode_counts_are_the_mean_over_one_window():
    m, n, c = 3, 5, 4
    case = Decode("cpu", "bfloat16", m, n, c, 1, "bfloat16")
    moved = flops = 0
    for held in range(c):  # token by token
        moved += 2 * (m * n + m + n) + 2 * held * (m + n) + 2 * (m + n)
        flops += 2 * m * n + 2 * held * (m + n)
    moved += 6 * m * n * 2 + 2 * c * (m + n)
    flops += 4 * m * n * c
    assert case.bytes("ttt") == round(moved / c)
    assert case.flops("ttt") == flops / c
    assert case.bytes("nn.Linear") == 2 * (m * n + m + n)
    # Of a large layer: 2 + 12 / C bytes a weight, and the window.
    large = Decode("cpu", "bfloat16", 4096, 4096, 16, 1, "bfloat16")
    assert large.bytes("ttt") / 4096**2 == pytest.approx(2 + 12 / 16, rel=0.01)


def test_other_counts():
    window = WindowLinear("cpu", "float32", 3, 5, 2, 7)
    assert window.bytes("ttt") == 4 * (15 + 2 * 5 + 2 * 3 + 7 * 5 + 7 * 3)
    assert window.flops("ttt") == 2 * 2 * (15 + 7 * 5 + 7 * 3)
    assert window.flops("nn.Linear") == 2 * 2 * 15
    fisher = Fisher("cpu", "float32", 3, 5, 2, 1)
    assert fisher.flops("forward + backward") == 4 * 15 * 2
    assert fisher.flops("BackPACK") == 6 * 15 * 2


def test_memory_is_that_of_a_layer():
    layer = ttt.nn.Linear(5, 3, bias=False, dtype=torch.bfloat16, config=state.LEARNS)
    found = layer_memory(3, 5, "bfloat16")
    counters = {"seen", "recent_seen", "step", "tokens", "importance_scale", "pending"}
    assert sum(found.values()) == sum(t.nbytes for name, t in layer.state().items() if name not in counters)
    assert found["trace"] == 3 * 5 * 2


def test_every_case_counts_and_is_named_once():
    for device in ("cpu", "cuda"):
        found = suites.select(device)
        keys = [(c.suite, c.name, c.dtype) for c in found]
        assert len(set(keys)) == len(keys)
        assert {c.suite for c in found} == set(suites.SUITES)
        assert any(c.quick for c in found)
        for case in found:
            json.dumps(case.parameters())
    with pytest.raises(ValueError, match=r"suite must be of commit, .*got 'comit'"):
        suites.select("cpu", ["comit"])
    assert all(c.m == 1024 for c in suites.select("cpu", ["commit"], only="1024x1024"))


# -- contenders: right ones pass, wrong ones are caught ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_commit, tiny_decode])
def test_right_contenders_pass(make, dtype):
    case = make(dtype)
    good, not_timed = measure.checked(case)
    assert not not_timed
    assert set(good) == {"ttt", "plain torch", case.forward}
    for contender in good.values():
        contender.run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_directions_that_are_taken_out_are_checked(dtype, monkeypatch):
    case = Decode("cpu", dtype, 24, 40, 4, 1, dtype, orthogonal=3)
    assert set(measure.checked(case)[0]) == {"ttt", "ttt, k = 0", "nn.Linear"}
    assert case.bytes("ttt") - case.bytes("ttt, k = 0") == (3 + 1) * 40 * getattr(torch, dtype).itemsize
    assert case.flops("ttt") - case.flops("ttt, k = 0") == 4 * 40 * 3
    monkeypatch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
    monkeypatch.setattr("ttt.nn.linear.project_inputs", lambda x, basis: x)
    assert set(reasons(case)) == {"ttt"}


def test_layers_rotate():
    case = tiny_commit()
    _, layers = case.layers()
    assert len(layers) == -(-(1 << 16) // (4 * 24 * 40 * 4)) | 1
    contender = case.contenders()["ttt"]()
    before = [layer["weight"].clone() for layer in layers]
    for _ in range(contender.cycle):
        contender.run()
    assert not any(torch.equal(layer["weight"], w) for layer, w in zip(layers, before, strict=True))


@pytest.mark.parametrize("window", [1, 2, 8])
def test_exactly_one_commit_falls_on_every_window_of_tokens(window, monkeypatch):
    case = tiny_decode(window=window)
    monkeypatch.setattr(Decode, "in_cache", False)
    contender = case.learning()
    assert contender.units == window
    assert contender.cycle > 3
    calls.clear()
    for number in range(1, 2 * contender.cycle):
        contender.run()
        assert sum(count for (op, _, _), count in calls.items() if op == "commit") == number


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_the_decode_step_of_a_gpu_is_right_too(window, monkeypatch):
    """Capturable layers, on CPU: their check passes, and one run is a step of each layer."""
    case = tiny_decode(window=window)
    monkeypatch.setattr(Decode, "in_cache", False)
    monkeypatch.setattr(Decode, "capturable", True)
    contender = case.learning()
    contender.check()
    weights, _ = case.weights()
    assert contender.units == len(weights)
    assert contender.cycle == 1
    before = [w.clone() for w in weights]
    for _ in range(window + 1):  # each layer has committed at least once
        contender.run()
    assert not any(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(ttt.nn.Linear, "_commit", lambda self, *args: None)
        with pytest.raises(AssertionError, match="is off by"):
            case.learning().check()


def test_results_of_suites_run_one_by_one_are_merged(tmp_path):
    from bench.kernels.merge import main, merged

    row = {"suite": "decode", "dtype": "float32", "copy_gb_per_s": 3.0}
    parts: list = [{"machine": {"command": name}, "ceilings": {}, "not_timed": []} for name in "ab"]
    for part, name in zip(parts, "ab", strict=True):
        part["rows"] = [row | {"suite": name}]
    found = merged(parts)
    assert [r["suite"] for r in found["rows"]] == ["a", "b"]
    assert found["machine"]["command"] == "a; b"
    assert found["ceilings"] == {"copy_gb_per_s": 3.0}
    (tmp_path / "a.json").write_text(json.dumps(parts[0]))
    main(str(tmp_path / "out.json"), str(tmp_path / "missing.json"), str(tmp_path / "a.json"))
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 1
    with pytest.raises(SystemExit, match="none of"):
        main(str(tmp_path / "out.json"), str(tmp_path / "missing.json"))


def corrupted(function, **changes):
    """``function`` with some of its arguments multiplied."""

    def wrong(*args, **kwargs):
        return function(*args, **{k: v * changes.get(k, 1) for k, v in kwargs.items()})

    return wrong


def reasons(case):
    return {row["contender"]: row["reason"] for row in measure.checked(case)[1]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_commit_is_caught(dtype, monkeypatch):
    case = tiny_commit(dtype, replay=2)
    original = ttt.ops.commit

    def written_to(name):
        def wrong(**given):
            original(**given)
            given[name][0, 0] += 8

        return wrong

    for wrong, word in (
        (lambda **given: None, "weight"),
        (corrupted(original, delta=1.05), "weight"),
        (lambda **given: original(**given | {"replay_rows": 0}), "weight"),
        (lambda **given: original(**given, kind="mas"), "trace"),
        (written_to("trace"), "trace"),
        (written_to("anchor"), "anchor was written"),
        (written_to("importance"), "importance was written"),
    ):
        monkeypatch.setattr(ttt.ops, "commit", wrong)
        assert word in reasons(case)["ttt"]
    monkeypatch.setattr(ttt.ops, "commit", original)
    assert not reasons(case)
    monkeypatch.setattr("bench.kernels.suites.commit.plain_commit", corrupted(plain_commit, lam=500.0))
    assert "weight" in reasons(case)["plain torch"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_layer_is_caught(dtype, monkeypatch):
    case = tiny_decode(dtype)
    with monkeypatch.context() as patch:  # forgets its window
        patch.setattr(ttt.nn.Linear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight))
        assert "the output" in reasons(case)["ttt"]
    with monkeypatch.context() as patch:  # never commits
        patch.setattr("ttt.nn.linear.binding_of", lambda layer: None)
        patch.setattr(ttt.nn.Linear, "_commit", lambda self, *args: None)
        assert set(reasons(case)) == {"ttt"}
    with monkeypatch.context() as patch:  # the trace stays behind
        trace = PlainLayer.learn

        def learn(self, *args):
            kept = self.layer["trace"].clone()
            trace(self, *args)
            self.layer["trace"].copy_(kept)

        patch.setattr(PlainLayer, "learn", learn)
        assert "trace" in reasons(case)["plain torch"]
    assert not reasons(case)


def test_wrong_products_are_caught(monkeypatch):
    case = WindowLinear("cpu", "float32", 24, 40, 2, 4)
    assert not reasons(case)
    wrong = lambda x, w, bias, win_x, win_delta, win_eta: plain_window_linear(x, w, win_x, win_delta, win_eta * 1.01)  # noqa: E731
    monkeypatch.setattr(ttt.ops, "window_linear", wrong)
    assert set(reasons(case)) == {"ttt"}
    monkeypatch.undo()
    fisher = Fisher("cpu", "float32", 8, 12, 3, 1)
    makers = fisher.contenders()
    for name in ("ttt", "forward + backward", "plain torch"):
        makers[name]().check()
    original = ttt.ops.commit
    # The square of the batch's gradient is not the sum of the tokens' squares.
    monkeypatch.setattr(ttt.ops, "commit", lambda w, a, b, trace, x, d, eta, step: trace.add_((d.T @ x).square()))
    with pytest.raises(AssertionError, match="trace is off"):
        makers["ttt"]().check()
    monkeypatch.setattr(ttt.ops, "commit", lambda *args: (original(*args), args[0].data.add_(1)))
    with pytest.raises(AssertionError, match="the weight was written"):
        makers["ttt"]().check()


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(models, "frozen", lambda *args: models.load(*args).requires_grad_(False))
    return "llama 2x64"


def test_wrong_loops_are_caught(tiny_model, monkeypatch):
    case = Loop("cpu", "float32", tiny_model, 6)
    good, not_timed = measure.checked(case)
    assert not [row for row in not_timed if row["failed"]]
    assert {"observe", "forward", "AdamW", "SGD in hooks", "dynamic evaluation"} <= set(good)
    step = torch.optim.AdamW.step
    with monkeypatch.context() as patch:

        def late(self):  # one percent too far
            for group in self.param_groups:
                group["lr"] *= 1.01
            step(self)

        patch.setattr(torch.optim.AdamW, "step", late)
        with pytest.raises(AssertionError, match="off by"):
            case.contenders()["AdamW"]().check()
    with monkeypatch.context() as patch:
        patch.setattr(ttt.nn.Linear, "learn", lambda self, update: None)
        with pytest.raises(AssertionError, match="down_proj"):
            case.contenders()["observe"]().check()


def test_a_wrong_reader_is_caught(tiny_model, monkeypatch):
    case = Observe("cpu", "float32", tiny_model, 4, 12)
    assert not reasons(case)
    observe = ttt.Learner.observe

    def wrong(self, ids):  # learns first, then scores
        observe(self, ids)
        return observe(self, ids, learn=False)

    with monkeypatch.context() as patch:
        patch.setattr(ttt.Learner, "observe", wrong)
        assert "the first chunk" in reasons(case)["observe"]
    with monkeypatch.context() as patch:
        patch.setattr(ttt.Learner, "observe", lambda self, ids: observe(self, ids, learn=False))
        assert "bits, then" in reasons(case)["observe"]


def test_a_compile_that_did_not_happen_is_reported(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(Unavailable, match="without compiling"):
        compiled(plain_window_linear)(*(torch.ones(2, 2),) * 3, torch.ones(2, 2), torch.ones(2))


# -- figures ------------------------------------------------------------------------------------------------------


def test_quartiles():
    values = [5.0, 1.0, 4.0, 9.0, 2.0, 2.5]
    assert timing.quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_a_row_holds_ratios_of_its_rounds():
    case = tiny_commit(replay=0)
    rate = 2e9  # bytes per second, in the first and second round; half of it in the third
    times = {"ttt": [1e-3, 2e-3, 4e-3], "plain torch": [4e-3, 4e-3, 4e-3], "forward": [1e-4, 1e-4, 1e-4]}
    times["copy"] = [1 / rate, 1 / rate, 2 / rate]
    row = measure.row_of(case, "ttt", times, {"more": 1})
    assert row["us"] == 2000
    assert (row["us_q1"], row["us_q3"]) == (1500, 3000)
    assert row["ratio"] == 0.5
    assert row["ratio_to_forward"] == 20
    assert row["us_above_baseline"] == -2000
    moved = case.bytes("ttt")
    assert row["gb_per_s"] == pytest.approx(moved / 2e-3 / 1e9, rel=1e-5)
    # Rounds: 1e-3 / (moved / rate), twice that, and twice that again at half the rate.
    assert row["percent_of_copy"] == pytest.approx(100 * moved / rate / 2e-3, rel=1e-5)
    assert row["ratio_to_bound"] == pytest.approx(100 / row["percent_of_copy"], rel=1e-5)
    assert row["copy_gb_per_s"] == 2
    assert row["ratio_to_read_bound"] is None
    read = measure.row_of(case, "ttt", times | {"read": [2 / rate, 2 / rate, 4 / rate]}, {})
    assert read["ratio_to_read_bound"] == pytest.approx(row["ratio_to_bound"] / 2, rel=1e-5)
    assert read["read_gb_per_s"] == 1
    assert measure.summary_of_ceilings([row, read]) == {"copy_gb_per_s": 2, "read_gb_per_s": 1}
    assert row["ours"] is True
    assert row["percent_of_matmul"] is None
    assert row["more"] == 1
    assert measure.row_of(case, "plain torch", times, {})["ours"] is False


@dataclasses.dataclass(frozen=True)
class Broken(Case):
    """One contender of each fate."""

    suite, baseline, name = "broken", "good", "case"

    def bytes(self, contender):
        return 8

    def flops(self, contender):
        return None

    def contenders(self):
        def absent():
            raise Unavailable("xyz is not installed")

        def wrong():
            raise AssertionError("off by 3")

        never = lambda: pytest.fail("an unchecked contender ran")  # noqa: E731
        return {
            "ttt": lambda: Contender(never, wrong),
            "good": lambda: Contender(lambda: None, lambda: None),
            "absent": absent,
        }


def test_what_fails_its_check_is_reported_and_not_timed():
    rows, not_timed = measure.measure(Broken("cpu", "float32"), rounds=3)
    assert [row["contender"] for row in rows] == ["good"]
    assert rows[0]["rounds"] == 3
    assert {(r["contender"], r["reason"], r["failed"]) for r in not_timed} == {
        ("ttt", "AssertionError: off by 3", True),
        ("absent", "xyz is not installed", False),
    }


# -- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with the result of a run over tiny cases, and what the run printed."""
    monkeypatch.setitem(
        suites.SUITES,
        "commit",
        lambda device: [tiny_commit(), tiny_commit("bfloat16", 0), dataclasses.replace(tiny_commit(), tokens=64)],
    )
    file = tmp_path / "results" / "tiny.json"
    arguments = ["--suite", "commit", "--rounds", "3", "--json", str(file), "--only", "24x40"]
    done = CliRunner().invoke(run.app, arguments)
    assert done.exit_code == 0, done.output
    return file, done.output


def test_run_writes_rows_and_a_table(results):
    file, printed = results
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 9
    assert not found["not_timed"]
    assert {"device", "isa", "threads", "torch", "commit", "date", "command", "kind"} <= set(found["machine"])
    assert found["ceilings"]["copy_gb_per_s"] > 0
    for row in found["rows"]:
        assert 0 < row["us_q1"] <= row["us"] <= row["us_q3"]
        assert (row["percent_of_matmul"] is not None) == (row["tokens"] == 64)
        if row["contender"] == row["baseline"]:
            assert row["ratio"] == 1
    assert "24x40, T = 5, R = 2" in printed
    assert "of copy" in printed


def test_run_refuses_what_it_does_not_know():
    done = CliRunner().invoke(run.app, ["--suite", "comit"])
    assert done.exit_code != 0
    assert "comit" in done.output
    done = CliRunner().invoke(run.app, ["--only", "no such case"])
    assert done.exit_code != 0
    if not torch.cuda.is_available():
        done = CliRunner().invoke(run.app, ["--device", "cuda"])
        assert done.exit_code != 0


def changed(file, name, change):
    found = json.loads(file.read_text())
    change(found)
    other = file.parent / name
    other.write_text(json.dumps(found))
    return other


def test_check_passes_and_fails(results, monkeypatch):
    file, _ = results
    invoke = CliRunner().invoke

    def worse(factor):
        def change(found):
            for row in found["rows"]:
                if row["ours"] and row["dtype"] == "bfloat16":
                    row["ratio_to_forward"] *= factor

        return change

    assert invoke(check.app, [str(file), "--against", str(file)]).exit_code == 0
    for factor, code in ((1.24, 0), (1.27, 1), (0.2, 0)):
        new = changed(file, "new.json", worse(factor))
        done = invoke(check.app, [str(new), "--against", str(file)])
        assert done.exit_code == code, done.output
    done = invoke(check.app, [str(changed(file, "new.json", worse(1.5))), "--against", str(file)])
    assert "+50 %" in done.output
    assert "1 of " in done.output
    # Against the folder of committed results, which the new file is not part of.
    monkeypatch.setattr(check, "RESULTS", file.parent)
    assert invoke(check.app, [str(changed(file, "new.json", worse(1.5)))]).exit_code == 1
    other = changed(file, "other.json", lambda found: found["machine"].update(device="another processor"))
    done = invoke(check.app, [str(other), "--against", str(file)])
    assert done.exit_code == 0
    assert "No committed result of another processor" in done.output


def test_only_results_of_the_bench_are_read():
    """The folder holds those of the store as well."""
    found = {path.name: check.load(path) for path in check.RESULTS.glob("*.json")}
    assert {name for name, results in found.items() if results is not None} == {
        n for n in found if n.startswith("cpu_")
    }
    assert "store.json" in found
    kinds = {check.kind_of(results) for results in found.values() if results is not None}
    assert all(check.committed(list(check.RESULTS.glob("*.json")), kind) for kind in kinds)


def test_check_fails_when_ours_was_not_timed(results):
    file, _ = results
    row = {"suite": "commit", "case": "c", "dtype": "float32", "contender": "ttt", "reason": "off", "failed": True}
    new = changed(file, "new.json", lambda found: found["not_timed"].append(row))
    assert CliRunner().invoke(check.app, [str(new), "--against", str(file)]).exit_code == 1


def test_plot_draws(results, monkeypatch):
    file, _ = results
    growth = [
        {"suite": "growth", "curve": curve, "dtype": dtype, "contender": contender, "us": 2.0 + i, "us_q1": 1.0,
         "us_q3": 5.0, "m": 64 << i, "n": 64, "tokens": 1 << i, "replay": i, "window": 4 << i, "adapted": f"last {i}",
         "model": "llama", "memory_bytes": layer_memory(64, 64, dtype)}
        for curve in ("d", "T", "replay rows", "window", "adapted layers")
        for dtype in ("float32", "bfloat16")
        for contender in ("ttt", "forward", "observe")
        for i in range(3)
    ]  # fmt: skip
    for row in growth:
        row["case"] = f"{row['curve']} {row['m']}"
    changed(file, "tiny.json", lambda found: found["rows"].extend(growth))
    (file.parent / "demo.json").write_text("{}")  # of another kind
    done = CliRunner().invoke(plot.app, ["--results", str(file.parent), "--out", str(file.parent / "out")])
    assert done.exit_code == 0, done.output
    for name in ("roofline_cpu.png", "growth_cpu.png"):
        assert (file.parent / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert "no results on cuda" in done.output
