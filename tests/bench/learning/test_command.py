"""The command: finished runs are not repeated, tuning chooses the best, figures and plots come from the runs."""

import json

import pytest
from typer.testing import CliRunner

from bench.learning import report, runs, tuning
from bench.learning.__main__ import app
from bench.learning.command import pick
from bench.learning.digits import run as digits_run
from bench.learning.digits.suite import DigitsSuite
from bench.learning.suite import Figure, candidates, swept
from bench.learning.suites import SUITES


class Toy:
    """A suite with a known score: -(a - 2)^2, plus one on "hill"."""

    name = "toy"
    scenarios = ("flat", "hill")
    methods = ("still", "moving")
    figures = (Figure("score", "score"), Figure("missing", "missing"))
    references = ()
    ran: list = []  # noqa: RUF012  every run, in order

    def protocol(self):
        return {"steps": 3}

    def fits(self, method, scenario):
        return method == "moving" or scenario == "flat"

    def family(self, method):
        return "reference"

    def grid(self, method):
        return {"a": (1, 2, 3), "b": ("x",)} if method == "moving" else {"a": (1, 2)}

    def run(self, scenario, method, seed, options, *, tuning):
        self.ran.append((scenario, method, seed, options["a"], tuning))
        return {"value": -((options["a"] - 2) ** 2) + (scenario == "hill") + seed / 1e4}

    more = ()

    def seeds(self, method):
        return tuning.SEEDS + (self.more if method == "moving" else ())

    def combine(self, method, scores):
        return sum(scores) / len(scores)

    def tuned_on(self, scenario):
        return scenario

    def sweep(self, method, scenario):
        return ("a", (1, 2, 4)) if (method, scenario) == ("moving", "hill") else None

    def facts(self):
        return {"known": 1}

    def score(self, record, others):
        return record["value"]

    def measure(self, record, others):
        return {"score": record["value"], "missing": None}

    def plot(self, records, rows, title, prefix):
        return []


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "toy", Toy)
    monkeypatch.setattr(Toy, "ran", [])

    def call(*args, fails=False):
        Toy.ran.clear()
        files = ["--results", str(tmp_path), "--tuned", str(tmp_path / "tuned.json")]
        done = CliRunner().invoke(app, ["--suite", "toy", *files, *args])
        assert (done.exit_code != 0) == fails, done.output
        return " ".join(done.output.replace("│", " ").split()) if fails else done.output

    return call


def test_tuning_chooses_the_best_mean_and_names_edges(call, tmp_path):
    call("--tune")
    assert len(Toy.ran) == (2 + 3 + 3) * len(tuning.SEEDS)
    assert {(seed, tuning) for _, _, seed, _, tuning in Toy.ran} == {(seed, True) for seed in tuning.SEEDS}
    chosen = json.loads((tmp_path / "tuned.json").read_text())["chosen"]
    assert chosen["hill"]["moving"]["options"] == {"a": 2, "b": "x"}
    assert chosen["hill"]["moving"]["at_edge"] == []
    assert chosen["hill"]["moving"]["score"] == pytest.approx(1.10005, abs=1e-4)
    assert set(chosen["hill"]) == {"moving"}
    call("--tune", "--methods", "still", "--scenarios", "flat")
    assert Toy.ran == []  # all of it had been run
    assert json.loads((tmp_path / "tuned.json").read_text())["chosen"] == chosen


def test_a_method_with_more_seeds_does_not_change_the_options_of_references(call, tmp_path, monkeypatch):
    def run(self, scenario, method, seed, options, *, tuning):
        self.ran.append((method, seed))
        return {"value": -((options["a"] - 2) ** 2) + 100 * (seed == 1002 and options["a"] == 1)}

    monkeypatch.setattr(Toy, "more", (1002,))
    monkeypatch.setattr(Toy, "references", ("still",))
    monkeypatch.setattr(Toy, "run", run)
    call("--tune", "--scenarios", "flat")
    expected = [("still", s) for s in (1000, 1001, 1002)] * 2 + [("moving", s) for s in (1000, 1001, 1002)] * 3
    assert sorted(Toy.ran) == sorted(expected)
    chosen = json.loads((tmp_path / "tuned.json").read_text())["chosen"]["flat"]
    assert (chosen["still"]["options"]["a"], chosen["moving"]["options"]["a"]) == (2, 1)


def test_finished_runs_are_not_run_again(call, tmp_path):
    call("--tune")
    out = call("--seeds", "2")
    assert len(Toy.ran) == 3 * 2
    assert "flat" in out
    assert "0.000 ± 0.001" in out  # Student: 12.7 times half of 1e-4
    journal = tmp_path / "benchmark_toy.jsonl"
    assert len(journal.read_text().splitlines()) == 6
    call("--seeds", "3")
    assert sorted({run[2] for run in Toy.ran}) == [2]
    # An incomplete line, left by a process that was killed, is dropped, and its run is made again.
    journal.write_text(journal.read_text()[:-20])
    call("--seeds", "3")
    assert len(Toy.ran) == 1
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    rows = json.loads((tmp_path / "benchmark_toy.json").read_text())["rows"]
    assert [(r["scenario"], r["method"], r["seeds"]) for r in rows] == [
        ("flat", "still", 3), ("flat", "moving", 3), ("hill", "moving", 3),
    ]  # fmt: skip
    assert rows[2]["score"][0] == pytest.approx(1.0001)
    assert rows[2]["missing"] is None


def test_results_keep_the_machine_on_which_the_runs_were_made(call, tmp_path):
    call("--tune")
    call("--seeds", "2")
    path = tmp_path / "benchmark_toy.json"
    found = json.loads(path.read_text())
    elsewhere = {"machine": {"processor": "another", "torch": "1.0"}, "date": "2001-02-03"}
    path.write_text(json.dumps(found | elsewhere))
    call("--seeds", "2")
    assert json.loads(path.read_text()) == found | elsewhere
    call("--seeds", "3")
    again = json.loads(path.read_text())
    assert (again["machine"], again["date"]) == (found["machine"], found["date"])


def test_other_options_or_another_protocol_make_new_runs(call, tmp_path, monkeypatch):
    call("--tune")
    call("--seeds", "1")
    tuned = tmp_path / "tuned.json"
    held = json.loads(tuned.read_text())
    held["chosen"]["flat"]["moving"]["options"]["a"] = 3
    tuned.write_text(json.dumps(held))
    call("--seeds", "1")
    assert Toy.ran == [("flat", "moving", 0, 3, False)]
    rows = json.loads((tmp_path / "benchmark_toy.json").read_text())["rows"]
    assert [r["options"]["a"] for r in rows] == [2, 3, 2]  # the superseded run is gone
    monkeypatch.setattr(Toy, "protocol", lambda self: {"steps": 4})
    call("--seeds", "1", "--scenarios", "hill")
    assert Toy.ran == [("hill", "moving", 0, 2, False)]


def test_runs_of_curves_use_one_seed_and_are_not_in_the_tables(call, tmp_path, monkeypatch):
    call("--tune")
    call("--seeds", "2")
    rows = json.loads((tmp_path / "benchmark_toy.json").read_text())["rows"]
    drawn = []
    monkeypatch.setattr(Toy, "plot", lambda self, records, *args: drawn.extend(records) or [])
    call("--seeds", "2", "--curves")
    # Of 1, 2, 4 the search chose 2, which has been run.
    assert Toy.ran == [("hill", "moving", 0, 1, False), ("hill", "moving", 0, 4, False)]
    assert [r["options"]["a"] for r in drawn if swept(r)] == [1, 4]
    assert json.loads((tmp_path / "benchmark_toy.json").read_text())["rows"] == rows
    assert json.loads((tmp_path / "benchmark_toy.json").read_text())["known"] == 1
    # Later runs keep them, and do not repeat them.
    call("--seeds", "3")
    assert {run[2] for run in Toy.ran} == {2}
    call("--seeds", "3", "--curves")
    assert Toy.ran == []
    # With other tuned options they would belong to another curve.
    tuned = tmp_path / "tuned.json"
    held = json.loads(tuned.read_text())
    held["chosen"]["hill"]["moving"]["options"]["b"] = "y"
    tuned.write_text(json.dumps(held))
    drawn.clear()
    call("--seeds", "1")
    assert not any(swept(r) for r in drawn)


class Referenced(Toy):
    """A suite whose scores are relative to "still" with the same seed and its chosen options; one search for both."""

    references = ("still",)

    def fits(self, method, scenario):
        return True

    def tuned_on(self, scenario):
        return "hill"

    def score(self, record, others):
        if record["method"] == "still":
            return record["value"]
        return record["value"] - 10 * others["still"]["value"] * record["options"]["a"]


def test_references_are_chosen_first_and_others_are_scored_against_them(call, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "toy", Referenced)
    call("--tune", "--methods", "moving", "--scenarios", "flat")
    assert {run[:2] for run in Toy.ran} == {("hill", "still"), ("hill", "moving")}
    chosen = json.loads((tmp_path / "tuned.json").read_text())["chosen"]
    assert set(chosen) == {"hill"}
    assert chosen["hill"]["still"]["options"] == {"a": 2}
    # "still" is worth about 1.1 there: -(a - 2)^2 + 1.1 - 11 a is best at a = 1.
    assert chosen["hill"]["moving"]["options"] == {"a": 1, "b": "x"}
    assert chosen["hill"]["moving"]["score"] == pytest.approx(0.1 - 11, abs=0.01)
    call("--seeds", "1", "--scenarios", "flat")
    assert {run[:4] for run in Toy.ran} == {("flat", "still", 0, 2), ("flat", "moving", 0, 1)}


def test_the_page_has_tables_and_pictures(call, tmp_path):
    page = tmp_path / "report" / "page.html"
    assert "holds no benchmark_*.json" in call("--report", "--page", str(page), fails=True)
    call("--tune")
    call("--seeds", "2")
    (tmp_path / "benchmark_toy_a.png").write_bytes(b"picture")
    call("--report", "--page", str(page))
    assert len(Toy.ran) == 0
    text = page.read_text()
    assert 'src="data:image/png;base64,cGljdHVyZQ=="' in text
    assert "src=" not in text.replace('src="data:', "")
    for scenario in Toy.scenarios:
        assert f"<h3>{scenario} (2 seeds)</h3>" in text
    assert "<th>score</tr>" in text  # and no column for what is always missing
    assert '<tr title="a = 2, b = x"><td>moving<td>1.000 ± 0.001</tr>' in text


def test_unknown_suites_scenarios_methods_and_missing_options_are_refused(call):
    assert "suite must be one of" in call("--suite", "imagenet", fails=True)
    assert "got 'valley'" in call("--scenarios", "flat,valley", fails=True)
    assert "got 'running'" in call("--methods", "running", fails=True)
    assert "--tune" in call(fails=True)  # nothing was tuned


def test_candidates_are_all_combinations_in_the_order_of_the_grid():
    assert candidates({"a": (1, 2), "b": (3,)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    assert candidates({}) == [{}]


def test_parallel_runs_equal_runs_one_by_one(tmp_path):
    todo = [runs.wanted(Toy(), "hill", "moving", seed, {"a": 2}, tuning=False) for seed in range(3)]
    finished = []
    for jobs in (1, 2):
        journal = runs.Journal(tmp_path / f"{jobs}.jsonl")
        runs.run_all(Toy(), todo, journal, jobs=jobs, finished=finished.append)
    assert len(finished) == 6
    one_by_one, parallel = (runs.Journal(tmp_path / f"{jobs}.jsonl").records for jobs in (1, 2))
    assert {r["jobs"] for r in one_by_one.values()} == {1}
    assert {key: {**r, "jobs": 1} for key, r in parallel.items()} == one_by_one


def test_the_suite_digits_runs_and_draws_its_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(digits_run.EPOCHS, "split-task", 1)
    args = ["--scenarios", "split-task", "--methods", "frozen,PNN", "--seeds", "2"]
    done = CliRunner().invoke(app, [*args, "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {f"benchmark_digits{end}" for end in (".json", ".jsonl", "_acc.png", "_curves.png")}
    rows = json.loads((tmp_path / "benchmark_digits.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["frozen", "PNN"]
    assert rows[1]["forgetting"] == [0.0, 0.0]
    assert rows[0]["intransigence"] is None  # joint training was not run


def test_committed_figures_are_made_from_the_committed_runs():
    suite = DigitsSuite()
    folder = tuning.Path(__file__).parents[3] / "bench" / "learning" / "results"
    journal = runs.Journal(folder / "benchmark_digits.jsonl")
    found = json.loads((folder / "benchmark_digits.json").read_text())
    assert found["rows"] == report.summarise(suite, list(journal.records.values()))
    options = tuning.load(tuning.tuned_path(suite))
    assert {(r["scenario"], r["method"]) for r in found["rows"]} == {
        (s, m) for s in suite.scenarios for m in suite.methods if suite.fits(m, s)
    }
    for row in found["rows"]:
        assert row["options"] == options[row["scenario"]][row["method"]]
        assert row["seeds"] >= 5


def test_methods_whose_names_hold_commas_can_be_picked():
    allowed = ["a", "a (x, y)", "a (x, y, z)", "b"]
    assert pick("methods", "b, a (x, y, z),a", allowed) == ["a", "a (x, y, z)", "b"]
    assert pick("methods", None, allowed) == allowed
    with pytest.raises(ValueError, match=r"methods must be among .* got 'a \(x\)'"):
        pick("methods", "a (x), b", allowed)
