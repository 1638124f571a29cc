"""The loop end to end against a judge and a writer whose every answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from arr_fast.autorubric.call_log import CallLog
from arr_fast.autorubric.generate import generate_from_prompts
from arr_fast.autorubric.labelled import LabelledPair, Reading
from arr_fast.autorubric.pipeline import AutoRubric, verification_report
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.autorubric.structure import candidates_of, level_of, structure
from arr_fast.autorubric.templates import TemplateSet
from arr_fast.autorubric.text_backend import TextBackendError
from arr_fast.errors import ArrFastError
from arr_fast.images import to_image
from arr_fast.rubric import Rubric
from arr_fast.shapes.hidden_preference import HiddenPreference, sample_pairs
from arr_fast.shapes.render import render
from tests.autorubric.fakes import OracleJudge, ScriptedBackend, World, general_writer

HIDDEN = sample_pairs(HiddenPreference.draw(1), 16, seed=1)
WORLD = World(HIDDEN)
PAIRS = [
    LabelledPair(
        f"pair {n}",
        pair.example.caption,
        tuple(to_image(render(scene), name="x") for scene in pair.example.scenes),
        pair.preferred,
    )
    for n, pair in enumerate(HIDDEN)
]
SETTINGS = AutoRubricSettings(criteria=3, folds=3, selected=6)


def loop(answer, folder: Path | None = None, judge=None, settings=SETTINGS, name="shapes", **more):
    backend = answer if isinstance(answer, ScriptedBackend) else ScriptedBackend(answer)
    judge = judge or OracleJudge(WORLD)
    return AutoRubric(judge, backend, TemplateSet(name), settings, folder, batch_size=4, **more)


def whole(one: AutoRubric, pairs=PAIRS):
    try:
        outcomes = one.refine(one.verify(one.generate(pairs)))
        structured = one.structure(outcomes)
        return one.report(Reading(pairs), outcomes, structured, one.select(outcomes, structured))
    finally:
        one.close()


def test_a_run_killed_at_any_call_resumes_without_repeating_one(tmp_path) -> None:
    straight = loop(general_writer(WORLD), tmp_path / "straight")
    whole(straight)
    backend, judge = straight.writer.backend, straight.verdicts.judge
    asked, judged = len(backend.asked), _verdicts(judge)
    for kill in range(0, asked, asked // 3):
        folder = tmp_path / f"writer{kill}"
        first = loop(ScriptedBackend(general_writer(WORLD), kill_after=kill), folder)
        with pytest.raises(KeyboardInterrupt):
            whole(first)
        second = loop(general_writer(WORLD), folder)
        whole(second)
        assert len(first.writer.backend.asked) == kill
        assert len(second.writer.backend.asked) == asked - kill
        _same_files(tmp_path / "straight", folder)
    for kill in range(0, len(judge.calls), len(judge.calls) // 4):
        folder = tmp_path / f"judge{kill}"
        first = loop(general_writer(WORLD), folder, OracleJudge(WORLD, kill_after=kill))
        with pytest.raises(KeyboardInterrupt):
            whole(first)
        # What a kill in the middle of a write leaves behind.
        with (folder / "verdicts.jsonl").open("a") as handle:
            handle.write('{"schema": "arr_fast.call/1", "key": "ab')
        second = loop(general_writer(WORLD), folder)
        whole(second)
        before, after = _verdicts(first.verdicts.judge), _verdicts(second.verdicts.judge)
        assert len(before) == len(set(before)) and not set(before) & set(after)
        assert set(before) | set(after) == set(judged)
        _same_files(tmp_path / "straight", folder)
    again = loop(general_writer(WORLD), tmp_path / "straight")
    report = whole(again)
    assert again.writer.backend.asked == [] and again.verdicts.judge.calls == []
    assert report["cost"]["writer"]["calls"] == report["cost"]["judge"]["calls"] == 0


def _verdicts(judge: OracleJudge) -> list[tuple[str, str]]:
    return [(prompt, text) for call in judge.calls for prompt, texts in call for text in texts]


def _same_files(one: Path, other: Path) -> None:
    for name in ("pairs.jsonl", "structured.yaml", "rubric.yaml", "rubric.txt"):
        assert (one / name).read_text() == (other / name).read_text(), name


def test_the_report_and_the_rubric_on_disk(tmp_path) -> None:
    report = whole(loop(general_writer(WORLD), tmp_path))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    verification = report["verification"]
    assert sum(verification["status"].values()) == len(PAIRS)
    assert verification["pass_rate_unrefined"] == verification["passed_unrefined"] / len(PAIRS)
    rubric = Rubric.load(tmp_path / "rubric.yaml")
    assert 1 <= len(rubric) <= 6 and rubric.calibration_for("r1", "log_odds_mean") is not None
    assert "Theme: " in (tmp_path / "rubric.txt").read_text()
    assert len(report["selection"]["path"]) <= 6
    assert set(report["selection"]["cross_validation"]["methods"]) == {
        "unweighted", "greedy", "l1", "grouped l1",
    }  # fmt: skip


def test_a_pair_that_cannot_be_judged_is_left_out_of_selection_and_named(tmp_path) -> None:
    class Blind(OracleJudge):
        def compare(self, prompts, *args, **kwargs):
            found = super().compare(prompts, *args, **kwargs)
            errors = ["too long" if p == PAIRS[2].prompt else None for p in prompts]
            return replace(found, errors=tuple(errors))

    one = loop(general_writer(WORLD), tmp_path, Blind(WORLD))
    report = whole(one)
    assert report["unjudged"] == {PAIRS[2].name: "too long"}
    assert sum(report["selection"]["cross_validation"]["folds"]) == len(PAIRS) - 1


def test_failures_are_refined_with_what_failed_and_discarded_at_last() -> None:
    good, bad = PAIRS[0], PAIRS[1]

    def answer(request):
        text = "".join(part for part in request.parts if isinstance(part, str))
        if bad.prompt in text:
            return json.dumps({"criteria": [f"Fault number {request.seed} is absent."]})
        return general_writer(WORLD)(request)

    class AlwaysWrong(OracleJudge):
        def _odds(self, prompt, a, b, text):
            sign = 1 if prompt == good.prompt else -1
            label = {p.prompt: p.label for p in PAIRS}[prompt]
            return float(sign * label)

    one = loop(answer, judge=AlwaysWrong(WORLD))
    outcomes = one.refine(one.verify(one.generate([good, bad])))
    assert [o.status for o in outcomes] == ["verified", "discarded"]
    assert [o.criteria.round for o in outcomes] == [0, 5]
    requests = [r for r in one.writer.backend.asked if bad.prompt in str(r.parts)]
    assert len(requests) == 6 and len({r.seed for r in requests}) == 6
    for number, request in enumerate(requests):
        assert len(request.banned) == number
        text = "".join(part for part in request.parts if isinstance(part, str))
        assert ("Not these:" in text) == (number > 0)
        # The bundled judge was shown two at most; all are banned while decoding.
        assert all(banned in text for banned in request.banned[-2:])
    report = verification_report(outcomes)
    assert report["refinements"] == 5 and report["discard_rate"] == 0.5


def test_unusable_answers_are_counted_with_their_text_and_no_answer_is_asked_again(
    tmp_path,
) -> None:
    seen: list[str] = []

    def answer(request):
        text = "".join(part for part in request.parts if isinstance(part, str))
        seen.append(text)
        if PAIRS[0].prompt in text:
            return "never JSON"
        if PAIRS[1].prompt in text:
            return TextBackendError("no route")
        return general_writer(WORLD)(request)

    one = loop(answer, tmp_path)
    outcomes = one.refine(one.verify(one.generate(PAIRS[:3])))
    one.close()
    assert [o.status for o in outcomes] == ["discarded", "unanswered", "verified"]
    assert [raw for _, _, raw in outcomes[0].unusable] == ["never JSON"] * 6
    assert one.writer.cost.failed == 1
    report = verification_report(outcomes)["unusable_answers"]
    assert [entry["raw"] for entry in report].count("never JSON") == 6
    again = loop(general_writer(WORLD), tmp_path)
    outcomes = again.verify(again.generate(PAIRS[:3]))
    again.close()
    assert [r.parts for r in again.writer.backend.asked] != []
    assert len(again.writer.backend.asked) == 1 and outcomes[1].criteria.texts


def test_a_prompt_without_an_answer_is_no_matter_for_the_writer() -> None:
    def answer(request):
        text = "".join(part for part in request.parts if isinstance(part, str))
        if PAIRS[0].prompt in text:
            return TextBackendError("APIConnectionError: no route")
        # An answer that came and cannot be used is asked for again, with what was wrong.
        if PAIRS[1].prompt in text and request.temperature == 0.0:
            return "never JSON"
        return json.dumps({"criteria": ["There is one shape."]})

    one = loop(answer, name="default")
    prompts = [(pair.prompt, None) for pair in PAIRS[:3]]
    found = generate_from_prompts(one.writer, one.templates, prompts, SETTINGS)
    assert [bool(each.texts) for each in found] == [False, True, True]
    assert [each.answered for each in found] == [False, True, True]
    assert "run again" in found[0].problem and "no route" in found[0].problem
    asked = [str(request.parts) for request in one.writer.backend.asked]
    assert [sum(prompt in text for text in asked) for prompt, _ in prompts] == [1, 2, 1]
    assert not any("APIConnectionError" in text for text in asked)


def test_general_and_specific_criteria_are_kept_apart() -> None:
    pair = next(p for p in PAIRS if "circle" in p.prompt)

    def answer(_):
        return json.dumps({"criteria": ["The image is sharp.", "There is a circle."]})

    general = loop(answer).generate([pair])[0]
    specific = loop(answer, settings=AutoRubricSettings(general=False)).generate([pair])[0]
    assert general.texts == specific.other == ("The image is sharp.",)
    assert general.other == specific.texts == ("There is a circle.",)
    only = loop(lambda _: json.dumps({"criteria": ["There is a circle."]})).generate([pair])[0]
    assert only.texts == () and "none of the 1 criteria is general" in only.problem


def outcomes_with(texts_of: dict[int, list[str]]):
    one = loop(lambda request: json.dumps({"criteria": ["The image is sharp."]}))
    states = one.generate(PAIRS[: len(texts_of)])
    found = one.verify([replace(s, texts=tuple(texts_of[n])) for n, s in enumerate(states)])
    return [replace(o, status="verified") for o in found]


def test_clusters_merge_paraphrases_and_keep_what_differs() -> None:
    texts = {
        0: ["The image is sharp.", "No object is cut off."],
        1: ["The picture is sharp.", "No object is cut off by the frame."],
        2: ["The image is sharp.", "The background matches the caption."],
    }
    outcomes = outcomes_with(texts)
    found = structure(candidates_of(outcomes, range(3)), outcomes, "t2i", SETTINGS)
    assert (
        found.method == "clusters"
        and found.texts
        == structure(candidates_of(outcomes, range(3)), outcomes, "t2i", SETTINGS).texts
    )
    by_text = {criterion.text: criterion for criterion in found.criteria}
    assert set(by_text) == {
        "The image is sharp.", "No object is cut off.", "The background matches the caption.",
    }  # fmt: skip
    assert by_text["The image is sharp."].support == 3
    assert len(by_text["No object is cut off."].sources) == 2
    assert level_of("The image follows the caption.") == "coarse"
    assert level_of("The edges are sharp.") == "fine"
    often = SETTINGS.model_copy(update={"min_support": 2})
    kept = structure(candidates_of(outcomes, range(3)), outcomes, "t2i", often).texts
    assert set(kept) == {"The image is sharp.", "No object is cut off."}
    never = SETTINGS.model_copy(update={"min_support": 4})
    assert structure(candidates_of(outcomes, range(3)), outcomes, "t2i", never) == found
    # A fold's criteria are those of its own pairs.
    assert {c.text for c in candidates_of(outcomes, [2])} == set(texts[2])
    with pytest.raises(ArrFastError, match="no verified criteria"):
        structure([], outcomes, "t2i", SETTINGS)


def test_a_writers_structure_is_used_checked_and_replaced_when_broken() -> None:
    outcomes = outcomes_with({0: ["The image is sharp.", "No blur is seen."], 1: ["It is whole."]})
    candidates = candidates_of(outcomes, range(2))
    theme = {
        "theme": "Craft",
        "criteria": [
            {"text": "Edges are crisp.", "level": "fine", "sources": [1, 2]},
            {"text": "The red part is whole.", "level": "coarse", "sources": [3]},
        ],
    }
    one = loop(lambda _: json.dumps({"themes": [theme]}), name="default")
    found = structure(candidates, outcomes, "t2i", SETTINGS, one.writer, one.templates)
    assert found.method == "writer" and [c.level for c in found.criteria] == ["coarse", "fine"]
    assert found.criteria[1].sources == tuple(c.text for c in candidates[:2])
    # A merged text that names a colour is no general one: its best source takes its place.
    assert found.criteria[0].text == candidates[2].text and len(found.notes) == 1
    broken = loop(lambda _: "sorry", name="default")
    found = structure(candidates, outcomes, "t2i", SETTINGS, broken.writer, broken.templates)
    assert found.method == "clusters" and "could not be used" in found.notes[0]


def test_criteria_that_few_pairs_support_take_no_place_from_others() -> None:
    outcomes = outcomes_with(
        {0: ["The image is sharp.", "It is whole."], 1: ["The image is sharp."]}
    )
    candidates = candidates_of(outcomes, range(2))
    criteria = [
        {"text": "It is whole.", "level": "coarse", "sources": [2]},
        {"text": "The image is sharp.", "level": "fine", "sources": [1]},
    ]
    one = loop(lambda _: json.dumps({"themes": [{"theme": "Craft", "criteria": criteria}]}))
    for least, kept in ((1, "It is whole."), (2, "The image is sharp."), (3, "It is whole.")):
        settings = SETTINGS.model_copy(update={"structured": 1, "min_support": least})
        found = structure(candidates, outcomes, "t2i", settings, one.writer, TemplateSet("default"))
        assert (found.method, found.texts) == ("writer", (kept,))


def test_a_text_that_the_writer_repeats_keeps_all_of_its_sources() -> None:
    texts = {0: ["It is sharp."], 1: ["Edges are crisp."], 2: ["Edges are crisp."]}
    outcomes = outcomes_with(texts)
    themes = [
        {"theme": name, "criteria": [{"text": text, "level": level, "sources": [source]}]}
        for name, text, level, source in (
            ("Craft", "Nothing is blurred.", "fine", 2),
            ("Focus", "nothing is blurred", "coarse", 1),
        )
    ]
    one = loop(lambda _: json.dumps({"themes": themes}), name="default")
    often = SETTINGS.model_copy(update={"min_support": 3})
    found = structure(
        candidates_of(outcomes, range(3)), outcomes, "t2i", often, one.writer, one.templates
    )
    (only,) = found.criteria
    assert (only.text, only.theme, only.level) == ("Nothing is blurred.", "Craft", "fine")
    assert only.support == 3 and set(only.sources) == {"It is sharp.", "Edges are crisp."}


def test_a_judge_that_agrees_with_no_label_gives_no_rubric() -> None:
    class Contrary(OracleJudge):
        def _odds(self, prompt, a, b, text):
            return {p.prompt: -1.0 * p.label for p in PAIRS}[prompt]

    one = loop(general_writer(WORLD), judge=Contrary(WORLD))
    outcomes = [replace(o, status="verified") for o in one.verify(one.generate(PAIRS))]
    with pytest.raises(ArrFastError, match="nothing to select"):
        one.select(outcomes, one.structure(outcomes))


def test_mixed_tasks_are_refused() -> None:
    edit = LabelledPair("e", "Remove it.", PAIRS[0].images, 1, PAIRS[1].images[0])
    one = loop(general_writer(WORLD))
    outcomes = outcomes_with({0: ["The image is sharp."]})
    both = [*outcomes, replace(outcomes[0], criteria=replace(outcomes[0].criteria, pair=edit))]
    with pytest.raises(ArrFastError, match="mixes edits"):
        one.structure(both)


def test_call_log_keeps_lines_and_refuses_other_files(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    with CallLog(path) as log:
        log.put("a", [1.0, 2.0])
        log.put_all({"b": "\ud800 odd", "c": None})
    with path.open("ab") as handle:
        handle.write(b'{"schema": "arr_fa')
    with CallLog(path) as log:
        assert log.get("a") == [1.0, 2.0] and log.get("b") == "\ud800 odd" and len(log) == 3
    assert path.read_bytes().endswith(b"\n")
    path.write_text("something else\n")
    with pytest.raises(ArrFastError, match="line 1"):
        CallLog(path)
