"""Scoring, runs that go on after a kill, baselines, comparisons, and the files of published benchmarks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from nvila.errors import InvalidRequest, NotFound, Unavailable
from nvila.model.tiny import make_random_checkpoint
from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.evaluation import metrics
from nvila.train.evaluation.adapters import BenchmarkSource
from nvila.train.evaluation.baselines import Chance, Statistics
from nvila.train.evaluation.compare import compare, mcnemar
from nvila.train.evaluation.endpoint import EndpointAnswerer
from nvila.train.evaluation.model import ModelAnswerer
from nvila.train.evaluation.report import interval, scores
from nvila.train.evaluation.run import Answer, TextOnly, evaluate, judge, read_answers
from nvila.train.samples import Sample, SampleMedia, ask
from nvila.types import MediaKind

SMALL = Knobs(canvas_px=96, text_px=(8, 16), video_px=48, clip_s=(3.0, 4.0))


def sample(metric: str, *answers: str, choices: tuple[str, ...] = (), seconds: float = 0.0, index: int = 0) -> Sample:
    clip = SampleMedia(
        kind=MediaKind.VIDEO, frames_FHWC=np.zeros((2, 8, 8, 3), np.uint8), times_s=(0.0, 1.0), duration_s=seconds
    )
    return Sample(
        source="set",
        index=index,
        task=f"family.{metric}",
        messages=ask("what?", answers[0], int(seconds > 0)),
        media=(clip,) if seconds else (),
        metric=metric,
        answers=answers,
        choices=choices,
    )


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "said", "expected"),
    [
        (sample("exact", "red"), "Red.", 1.0),
        (sample("exact", "red"), "the red", 1.0),
        (sample("exact", "3"), "three", 1.0),
        (sample("exact", "red"), "dark red", 0.0),
        (sample("exact", "12.50"), "12.5", 0.0),
        (sample("exact", "A"), "A.", 1.0),
        (sample("exact", "A"), "", 0.0),
        (sample("exact", "A"), "the", 0.0),
        (sample("anls", "TOWER"), "tower", 1.0),
        (sample("anls", "tower"), "towel", 0.8),
        (sample("anls", "tower"), "boat", 0.0),
        (sample("anls", "12 Mar 2020", "12.03.2020"), "12.03.2020", 1.0),
        (sample("anls", "a"), "", 0.0),
        (sample("choice", "B", choices=("red", "blue")), "B", 1.0),
        (sample("choice", "B", choices=("red", "blue")), "(b) blue", 1.0),
        (sample("choice", "B", choices=("red", "blue")), "The answer is B.", 1.0),
        (sample("choice", "B", choices=("red", "blue")), "blue", 1.0),
        (sample("choice", "B", choices=("red", "blue")), "A red one", 0.0),
        (sample("choice", "A", choices=("red", "blue")), "A blue one", 0.0),
        (sample("choice", "B", choices=("red", "blue")), "B is the answer", 1.0),
        (sample("choice", "A", choices=("red", "blue")), "Option A is right", 1.0),
        (sample("choice", "B", choices=("a dog", "a cat")), "A cat", 1.0),
        (sample("choice", "B", choices=("a dog", "a cat")), "The answer is a cat.", 1.0),
        (sample("choice", "A", choices=("a dog", "a cat")), "a", 1.0),
        (sample("choice", "A", choices=("B", "A")), "A", 1.0),
        (sample("choice", "B", choices=("red", "blue")), "", 0.0),
        (sample("vqa", *["yes"] * 10), "Yes", 1.0),
        (sample("vqa", *["yes"] * 2, *["no"] * 8), "yes", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (sample("interval", "<2> <4>", seconds=10), "<3.0> <5.0>", 1 / 3),
        (sample("interval", "<2> <4>", seconds=10), "from <4> back to <2>", 1.0),
        (sample("interval", "<2> <4>", seconds=10), "no idea", 0.2),
    ],
)
def test_answers_are_judged_by_the_metric_of_their_sample(one: Sample, said: str, expected: float) -> None:
    assert metrics.score(one, said) == pytest.approx(expected)


def test_a_sample_without_an_answer_or_of_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no right answer"):
        metrics.score(replace(sample("exact", "x"), answers=()), "x")
    with pytest.raises(InvalidRequest, match="metric 'bleu'"):
        metrics.score(sample("bleu", "x"), "x")


# -- runs -------------------------------------------------------------------------------------------------------------


class Parrot:
    """Says the answer of every second sample, breaks after `breaks_after` of them."""

    name, batch = "parrot", 2

    def __init__(self, breaks_after: int = 1000) -> None:
        self.asked: list[str] = []
        self._breaks_after = breaks_after

    def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
        if len(self.asked) >= self._breaks_after:
            raise Unavailable("gone")
        self.asked += [one.name for one in samples]
        return [one.answer if one.index % 2 else InvalidRequest("too long") for one in samples]

    def close(self) -> None:
        """Nothing is held."""


SIX = [sample("exact", "red", index=index) for index in range(6)]


def test_a_run_that_broke_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with pytest.raises(Unavailable):
        evaluate(SIX, Parrot(breaks_after=4), out, lambda _: None)
    with out.open("a") as file:
        file.write('{"name": "cut o')

    second = Parrot()
    answers = evaluate(SIX, second, out, lambda _: None)

    assert second.asked == ["set:4", "set:5"]
    assert [answer.score for answer in answers] == [0, 1, 0, 1, 0, 1]
    assert [answer.error for answer in answers][:2] == ["too long", ""]
    assert len(read_answers(out)) == 6


def test_a_file_that_is_no_run_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"colour": "red"}\n')

    with pytest.raises(InvalidRequest, match=r"other\.jsonl:1"):
        read_answers(path)


def test_time_tokens_become_seconds_before_an_answer_is_judged() -> None:
    class Timer(Parrot):
        def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
            return ["<t10> <t30>" for _ in samples]

    (answer,) = evaluate([sample("interval", "<1> <3>", seconds=10)], Timer(), None, lambda _: None, time_tokens=101)

    assert answer.answer == "<1.0> <3.0>"
    assert answer.score == 1.0


def test_text_only_takes_away_all_that_could_be_seen() -> None:
    seen: list[Sample] = []

    class Watching(Parrot):
        def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
            seen.extend(samples)
            return super().answer(samples)

    (answer,) = evaluate(
        [sample("interval", "<2> <4>", seconds=10, index=1)], TextOnly(Watching()), None, lambda _: None
    )

    assert seen[0].media == ()
    assert all(not hasattr(part, "index") for message in seen[0].messages for part in message.parts)
    assert answer.score == 1.0


# -- reports ----------------------------------------------------------------------------------------------------------


def test_scores_are_given_per_task_family_and_over_all_with_intervals() -> None:
    answers = [judge(one, "red") for one in SIX] + [judge(sample("interval", "<0> <6>", seconds=10), "<0> <3>")]

    found = {score.name: score for score in scores(answers)}

    assert found["family.exact"].mean == 1.0
    assert found["family.interval"].precision_at_50 == 1.0
    assert found["family"].samples == 7
    assert found["family"].precision_at_50 is None
    assert found["family.exact"].low == pytest.approx(0.61, abs=0.01)  # Wilson: six of six is not certainty


def test_wilsons_interval_is_the_published_one() -> None:
    low, high = interval([1.0] * 8 + [0.0] * 2)

    assert (low, high) == pytest.approx((0.490, 0.943), abs=0.001)


def answered(right: Sequence[int], said: str = "x") -> list[Answer]:
    return [
        Answer(name=f"set:{i}", task="a.b", metric="exact", question="q", answer=said, right="x", score=float(score))
        for i, score in enumerate(right)
    ]


def test_two_runs_are_compared_question_by_question() -> None:
    (one,) = compare(answered([1, 1, 1, 0, 1]), answered([1, 0, 0, 0, 1]))

    assert (one.samples, one.only_a, one.only_b, one.agreement) == (5, 2, 0, 1.0)
    assert one.loss == pytest.approx(0.4)
    assert one.p == pytest.approx(0.5)


def test_mcnemars_test_is_exact_for_few_and_close_for_many() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 / 1024)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(560, 470) == pytest.approx(mcnemar(543, 456), rel=0.15)


def test_an_error_agrees_with_nothing() -> None:
    broken = [replace(one, answer="", error="too long") for one in answered([0, 0])]

    (one,) = compare([*broken, *answered([0] * 4)[2:]], [*broken, *answered([0] * 4)[2:]])

    assert one.agreement == 0.5


def test_only_runs_over_the_same_questions_are_compared() -> None:
    with pytest.raises(InvalidRequest, match="2 in A, 1 in B, 1 of them in one run only, such as set:1"):
        compare(answered([1, 1]), answered([1]))
    with pytest.raises(InvalidRequest, match="not of the same questions"):
        compare(answered([1]), [replace(answered([1])[0], question="another")])
    with pytest.raises(InvalidRequest, match="hold no answer"):
        compare([], [])


# -- baselines --------------------------------------------------------------------------------------------------------


def test_baselines_know_the_answers_of_the_training_data_and_no_more() -> None:
    training = [make_sample(family, Split.TRAIN, 0, i, SMALL) for family in ("order", "when") for i in range(60)]
    test = [make_sample(family, Split.TEST, 0, i, SMALL) for family in ("order", "when") for i in range(30)]

    for baseline in (Chance(training), Statistics(training)):
        answers = evaluate(test, baseline, None, lambda _: None)
        found = {score.name: score.mean for score in scores(answers)}
        assert found["order"] < 0.6
        assert 0.05 < found["when"] < 0.5


def test_a_baseline_without_training_data_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="needs training samples"):
        Chance([])


# -- answerers --------------------------------------------------------------------------------------------------------


def test_a_model_says_the_same_alone_and_in_company(tmp_path: Path) -> None:
    answerer = ModelAnswerer.load(
        make_random_checkpoint(tmp_path / "tiny"), device="cpu", frames=8, batch=3, max_tokens=6
    )
    samples = [make_sample(family, Split.TEST, 0, 1, SMALL) for family in ("shapes", "pairs", "when")]
    together = answerer.answer(samples)

    assert [answerer.answer([one])[0] for one in samples] == together
    assert all(isinstance(said, str) and said for said in together)


class _Endpoint(BaseHTTPRequestHandler):
    """Counts the media of a request, refuses those with a video, and is busy at first: `busy` says for how long."""

    busy: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "counting-model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        parts = [part for message in request["messages"] for part in message["content"]]
        kinds = [part["type"] for part in parts]
        if _Endpoint.busy:
            self._send(429, {"error": {"message": "later"}}, retry_after=_Endpoint.busy.pop(0))
        elif "video_url" in kinds:
            self._send(422, {"error": {"message": "no videos here"}})
        else:
            assert all(part["image_url"]["url"].startswith("data:image/png;base64,") for part in parts[:-1])
            self._send(200, {"choices": [{"message": {"content": f"{kinds.count('image_url')} images"}}]})

    def _send(self, status: int, body: Any, retry_after: str = "") -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if retry_after:
            self.send_header("retry-after", retry_after)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_endpoint_is_asked_with_pictures_in_the_request(endpoint: str) -> None:
    answerer = EndpointAnswerer(endpoint, concurrency=1)
    samples = [make_sample(family, Split.TEST, 0, 0, SMALL) for family in ("shapes", "pairs", "when")]

    said = answerer.answer(samples)
    answerer.close()

    assert answerer.name == "counting-model"
    assert said[:2] == ["1 images", f"{len(samples[1].media)} images"]
    assert isinstance(said[2], InvalidRequest)
    assert "no videos here" in said[2].message


def test_a_busy_endpoint_is_asked_again_when_it_says_and_later_and_later_where_it_does_not(endpoint: str) -> None:
    _Endpoint.busy[:] = ["7", "", ""]
    waited: list[float] = []
    answerer = EndpointAnswerer(endpoint, concurrency=1, sleep=waited.append)

    said = answerer.answer([make_sample("shapes", Split.TEST, 0, 0, SMALL)])

    assert said == ["1 images"]
    assert waited == [7.0, 1.0, 2.0]
    _Endpoint.busy[:] = ["1"] * 6
    with pytest.raises(Unavailable, match="answered 429"):
        answerer.answer([make_sample("shapes", Split.TEST, 0, 0, SMALL)])
    answerer.close()


def test_an_endpoint_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="no model can be had"):
        EndpointAnswerer("http://127.0.0.1:9")


# -- published benchmarks ---------------------------------------------------------------------------------------------


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def test_ai2d_is_read_as_published(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "4.png")
    about = {"abcLabel": False, "answerTexts": ["sun", "moon"], "correctAnswer": 1, "questionId": "4.png-0"}
    write_json(tmp_path / "questions" / "4.png.json", {"imageName": "4.png", "questions": {"What shines?": about}})

    one = BenchmarkSource("ai2d", tmp_path).load(0)

    assert one.question.startswith("What shines?\nA. sun\nB. moon\n")
    assert (one.answers, one.metric, one.choices) == (("B",), "choice", ("sun", "moon"))
    assert one.media[0].frames_FHWC.shape == (1, 6, 8, 3)


def test_docvqa_is_read_as_published(tmp_path: Path) -> None:
    picture(tmp_path / "documents" / "a.png")
    entry = {"questionId": 7, "question": "What date?", "image": "documents/a.png", "answers": ["1/8/93", "Jan 8"]}
    write_json(tmp_path / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [entry]})

    source = BenchmarkSource("docvqa", tmp_path)

    assert source.where(0) == "val_v1.0_withQT.json:7"
    assert (source.load(0).metric, source.load(0).answers) == ("anls", ("1/8/93", "Jan 8"))


def test_textvqa_is_read_as_published(tmp_path: Path) -> None:
    picture(tmp_path / "train_images" / "0a.jpg")
    entry = {"question": "what is written?", "image_id": "0a", "question_id": 3, "answers": ["stop"] * 10}
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": [entry]})

    one = BenchmarkSource("textvqa", tmp_path).load(0)

    assert (one.metric, len(one.answers)) == ("vqa", 10)


def test_mmmu_is_read_as_published(tmp_path: Path) -> None:
    picture(tmp_path / "Art" / "1.png")
    image = {"path": "1.png"}
    rows: list[dict[str, Any]] = [
        {
            "id": "validation_Art_1",
            "question": "Who painted <image 1>?",
            "options": "['Ann', 'Bo']",
            "answer": "A",
            "question_type": "multiple-choice",
            "image_1": image,
            "image_2": None,
        },
        {
            "id": "validation_Art_2",
            "question": "How many?",
            "options": "[]",
            "answer": "['2', 'two']",
            "question_type": "open",
            "image_1": image,
            "image_2": image,
        },
    ]
    write_rows(tmp_path / "Art" / "validation-00000-of-00001.jsonl", rows)

    source = BenchmarkSource("mmmu", tmp_path)

    assert [source.load(i).task for i in range(2)] == ["mmmu.Art"] * 2
    assert source.load(0).question.startswith("Who painted image 1?\nA. Ann")
    assert (source.load(1).answers, source.load(1).metric, len(source.load(1).media)) == (("2", "two"), "exact", 2)


def test_video_mme_is_read_as_published(tmp_path: Path) -> None:
    row = {
        "videoID": "abc",
        "question_id": "001-1",
        "duration": "short",
        "question": "What happens?",
        "options": ["A. Rain.", "B. Snow."],
        "answer": "B",
    }
    write_rows(tmp_path / "videomme" / "test-00000-of-00001.jsonl", [row])

    source = BenchmarkSource("videomme", tmp_path)

    assert source.where(0).endswith(":001-1")
    with pytest.raises(NotFound, match=r"no video 'abc\.mp4'"):
        source.load(0)


def test_a_folder_that_does_not_hold_the_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file"):
        BenchmarkSource("docvqa", tmp_path)
    write_json(tmp_path / "val.json", {"data": [{"questionId": 1}]})
    with pytest.raises(InvalidRequest, match="does not hold docvqa as it is published"):
        BenchmarkSource("docvqa", tmp_path)
    with pytest.raises(InvalidRequest, match="no adapter 'poems'"):
        BenchmarkSource("poems", tmp_path)
