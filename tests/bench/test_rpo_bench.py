"""The contenders of `arr-fast bench rpo` do the same mathematics, and the gate notices if not."""

from __future__ import annotations

import pytest

from arr_fast.bench import rpo
from arr_fast.bench.rpo import Contest, SleepingJudge, run_rpo_bench
from arr_fast.errors import ArrFastError
from tests.rpo.small_generator import small_code


@pytest.fixture
def contest(monkeypatch):
    monkeypatch.setattr(rpo, "fit_code", lambda seed: small_code())
    monkeypatch.setattr(rpo, "STEPS", 3)
    monkeypatch.setattr(rpo, "TRAINED", (1, 2))
    return Contest("tiny", 4, 2, 4, SleepingJudge(0.0))


def test_eager_and_reference_loop_have_one_gradient(contest):
    runs = {"ours-eager": contest.contender("ours-eager")}
    assert rpo._gate(contest, runs, lambda line: None)["ours-eager"] <= 1e-5


def test_the_gate_notices_another_loss(contest):
    run = contest.contender("ours-eager")
    contest.micro_batch = 4

    def doubled():
        run()
        return run()

    with pytest.raises(ArrFastError, match="nothing was timed"):
        rpo._gate(contest, {"ours": doubled}, lambda line: None)


def test_seconds_are_split(contest):
    seconds = contest.contender("reference-loop")()
    parts = seconds["sampling"] + seconds["judging"] + seconds["training"]
    assert parts == pytest.approx(seconds["total"])


def test_a_sleeping_judge_is_hidden_behind_sampling(contest):
    contest.judge = SleepingJudge(0.001)
    seconds = contest.contender("ours-eager")()
    assert seconds["judging"] >= 0.004
    assert seconds["hidden_share"] > 0


def test_serial_judging_answers_before_the_next_chunk_is_sampled(contest):
    class Watched(SleepingJudge):
        futures, earlier = [], []

        def __call__(self, request):
            self.earlier += [future.done() for future in self.futures]
            self.futures.append(super().__call__(request))
            return self.futures[-1]

    contest.judge = Watched(0.02)
    contest._ours(compile=False, serial=True)()
    assert len(contest.judge.futures) == 2
    assert contest.judge.earlier == [True]


def test_the_training_peak_holds_at_least_the_gradients(contest):
    gradients = 4 * sum(p.numel() for p in contest.policy.trainable_parameters().values())
    peak = contest.training_peak("ours-eager")
    contest.micro_batch = 1
    assert gradients < contest.training_peak("ours-eager") < peak
    assert contest.training_peak("reference-loop") is None


def test_rows_are_not_appended_under_other_columns(tmp_path):
    path = tmp_path / "rpo.csv"
    path.write_text("workload,engine\n")
    with pytest.raises(ArrFastError, match="other columns"):
        run_rpo_bench(["tiny"], csv_path=path)
    assert path.read_text() == "workload,engine\n"
    rpo._append([], tmp_path / "new.csv")
    rpo._append([], tmp_path / "new.csv")
    assert (tmp_path / "new.csv").read_text().count("workload") == 1


def test_unknown_workloads_and_engines_list_what_there_is(contest):
    with pytest.raises(ValueError, match="tiny, shapes"):
        run_rpo_bench(["huge"])
    with pytest.raises(ValueError, match="ours-eager"):
        contest.contender("theirs")
