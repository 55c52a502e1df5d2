# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_example_rewards.py
"""The example reward functions grade as their docstrings say, with the real `mathruler`."""

import json
import math
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jinja2
import pytest

from tests.test_reward_function import make_batch
from verl.workers.reward import calls
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.function import reward_samples
from verl.workers.reward.user_function import load_reward_function

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "reward_function"


def load(name: str, **kwargs):
    config = RewardConfig(reward_function=f"{EXAMPLES / name}:compute_score", reward_function_kwargs=kwargs)
    return load_reward_function(config, decoder=None)._function


@pytest.mark.parametrize(
    ("response", "truth", "form", "accuracy"),
    [
        (r"<think>half of it</think> \boxed{\frac{1}{2}}", "0.5", 1, 1),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 0, 1),
        (r"<think>hm</think> \boxed{3}", "4", 1, 0),
        ("I do not know", "4", 0, 0),
    ],
)
def test_math_gives_a_tenth_for_form_and_the_rest_for_an_equal_value(
    response: str, truth: str, form: float, accuracy: float
) -> None:
    (score,) = load("math.py")([{"response": response, "ground_truth": truth}])
    assert score == {"overall": pytest.approx(0.1 * form + 0.9 * accuracy), "format": form, "accuracy": accuracy}


@pytest.mark.parametrize(
    ("response", "truth", "form", "accuracy"),
    [
        ("<think>count</think><answer>7</answer>", "7", 1, 1),
        ("<answer> 7 </answer>", "7", 0, 1),
        ("<think>count</think><answer>8</answer>", "7", 1, 0),
    ],
)
def test_r1v_gives_half_for_form_and_half_for_the_answer(
    response: str, truth: str, form: float, accuracy: float
) -> None:
    score = load("r1v.py")({"response": response, "ground_truth": truth})
    assert score == {"overall": pytest.approx(0.5 * form + 0.5 * accuracy), "format": form, "accuracy": accuracy}


@pytest.mark.parametrize(
    ("response", "hit"),
    [
        ("click(500, 120)", 1),
        ("I tap it: click( 400,100 ).", 1),  # the corner is part of the box
        ("click(600, 200)", 1),
        ("click(601, 200)", 0),
        ("click(500, 99)", 0),
        ("click(500, 120) click(10, 10)", 0),
        ("click(500, 120) click(500, 120)", 0),
        ("(500, 120)", 0),
        ("click(-500, 120)", 0),
        ("", 0),
    ],
)
@pytest.mark.parametrize("box", [[400, 100, 600, 200], "[400, 100, 600, 200]", (400.0, 100.0, 600.0, 200.0)])
def test_android_gui_gives_all_for_a_single_click_into_the_box(response: str, hit: float, box: object) -> None:
    assert load("android_gui.py")([{"response": response, "ground_truth": box}]) == [{"overall": hit, "accuracy": hit}]


@pytest.mark.parametrize(
    "box", ["[1, 2, 3]", "400, 100, 600, 200", [1, 2, 3, "x"], None, 5, [600, 100, 400, 200], [0, 0, 1080, 2400]]
)
def test_android_gui_refuses_a_truth_that_is_no_box_in_thousandths(box: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"ground truth {box!r} is not a box")):
        load("android_gui.py")([{"response": "click(1, 1)", "ground_truth": box}])


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("math", "<think>hm</think> \\boxed{12}"),
        ("r1v", "<think>hm</think><answer>12</answer>"),
        ("android_gui", "click(3, 4)"),
    ],
)
def test_a_format_prompt_holds_the_question_and_asks_for_what_its_reward_reads(name: str, response: str) -> None:
    template = (EXAMPLES.parent / "format_prompt" / f"{name}.jinja").read_text()
    prompt = jinja2.Template(template).render(content="<image>How many?\n")
    assert prompt.startswith("<image>How many?\n\n")
    marks = re.findall(r"</?\w+>|\\boxed|click", response)
    assert marks and all(mark in prompt for mark in marks)
    truth = [0, 0, 9, 9] if name == "android_gui" else "12"
    sample = {"response": response, "ground_truth": truth}
    score = load(f"{name}.py")(sample if name == "r1v" else [sample])
    assert (score if name == "r1v" else score[0])["overall"] == 1


def test_the_weighted_answer_weighs_the_tokens_that_write_it_with_mean_one() -> None:
    """Three of six tokens touch `\\boxed{12}`: raw weights 1, 1, 2, 2, 2, 1 have mean 1.5."""
    tokens = ["It ", "is ", "\\box", "ed{1", "2}.", "<|im_end|>"]
    sample = {"response": "It is \\boxed{12}.", "ground_truth": "12", "response_tokens": tokens}
    score = load("weighted_answer.py")(sample)
    weights = score.pop("token_weights")
    assert score == {"overall": 1.0, "accuracy": 1.0}
    assert weights == pytest.approx([2 / 3, 2 / 3, 4 / 3, 4 / 3, 4 / 3, 2 / 3])


def test_the_weighted_answer_leaves_a_response_without_an_answer_to_others() -> None:
    score = load("weighted_answer.py")({"response": "twelve", "ground_truth": "12", "response_tokens": ["twelve"]})
    assert score == {"overall": 0.0, "accuracy": 0.0, "token_weights": None}


LENGTHS = {"max_response_length": 100, "overlong_buffer_length": 20, "overlong_penalty_factor": 0.5}
"""A response may have 100 tokens; the last 20 of them cost up to half a point."""


@pytest.mark.parametrize(
    ("length", "overlong"), [(1, 0), (80, 0), (81, -1 / 20), (90, -10 / 20), (99, -19 / 20), (100, -1), (101, -1)]
)
def test_dapo_takes_off_more_the_further_a_response_runs_into_the_buffer(length: int, overlong: float) -> None:
    """Equation 13 with L_max = 100 and L_cache = 20: 0 up to 80 tokens, then (80 - length) / 20, and -1 beyond 100."""
    samples = [
        {"response": f"Answer: {answer}", "response_length": length, "ground_truth": "34"} for answer in (34, 35)
    ]
    right, wrong = load("dapo.py", **LENGTHS)(samples, **LENGTHS)
    assert right == {
        "overall": pytest.approx(1 + 0.5 * overlong),
        "accuracy": 1.0,
        "overlong": pytest.approx(overlong),
        "accuracy_normalized": 1.0,
    }
    assert wrong == {
        "overall": pytest.approx(-1 + 0.5 * overlong),
        "accuracy": -1.0,
        "overlong": pytest.approx(overlong),
        "accuracy_normalized": 0.0,
    }


def test_dapo_without_a_buffer_leaves_length_alone() -> None:
    lengths = {**LENGTHS, "overlong_buffer_length": 0}
    sample = {"response": "Answer: 34", "response_length": 100, "ground_truth": "34"}
    assert load("dapo.py", **lengths)([sample], **lengths)[0]["overlong"] == 0


@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        ("half of it\nAnswer: 1/2", True),
        ("half of it\n**Answer:** $\\frac{1}{2}$.", True),
        ("**Answer**: **.5**", True),
        ("Answer:\n0.5", True),
        (r"Answer: \boxed{\frac{1}{2}}", True),
        (r"so it is \boxed{0.5}", True),
        ("Answer: 2\nno, wait\nAnswer: 0.5", True),
        ("Answer: 0.5\nno, wait\nAnswer: 2", False),
        (r"\boxed{0.5} is wrong. Answer: 2", False),
        ("it is 0.5", False),
        ("", False),
    ],
)
def test_dapo_grades_what_follows_the_last_answer_or_is_boxed(response: str, is_right: bool) -> None:
    sample = {"response": response, "response_length": 9, "ground_truth": r"\frac{1}{2}"}
    (score,) = load("dapo.py", **LENGTHS)([sample], **LENGTHS)
    assert score["accuracy"] == (1.0 if is_right else -1.0)


def test_dapo_finds_the_answer_where_its_format_prompt_asks_for_it() -> None:
    template = (EXAMPLES.parent / "format_prompt" / "dapo.jinja").read_text()
    assert 'a line of its own that reads "Answer:" followed by the result' in template


@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        ("Answer:\n\\[\n\\boxed{0.5}\n\\]", True),
        ("Answer:\n$$\n0.5\n$$", True),
        ("**Answer:**\r\n\r\n\\begin{align*}\r\n0.5\r\n\\end{align*}", True),
        ("Answer: \\boxed{\n0.5}", True),
        ("Thus $\\boxed{0.5}$\n\nAnswer:", True),
        ("Thus $\\boxed{0.5}$\n\nAnswer:\n$$\n", True),
        ("Answer:\nAnswer: 0.5", True),
        ("Answer: 0.5\n\nCheck: \\boxed{2}", True),  # the published rule reads the line alone
        ("Answer: \\boxed{0.5} (the answer: a half)", True),
        ("Answer: 2\n\nCheck: \\boxed{0.5}", False),
        ("Thus \\boxed{0.5}. Answer:\n\\[\n\\boxed{2}\n\\]", False),
        ("Thus \\boxed{0.5}. Answer: \\boxed{", False),
        ("Answer:", False),
    ],
)
def test_dapo_finds_an_answer_in_display_mathematics_on_the_lines_that_follow(response: str, is_right: bool) -> None:
    sample = {"response": response, "response_length": 9, "ground_truth": r"\frac{1}{2}"}
    (score,) = load("dapo.py", **LENGTHS)([sample], **LENGTHS)
    assert score["accuracy"] == (1.0 if is_right else -1.0)


def accuracy_of(name: str, response: str, truth: object) -> float:
    sample = {"response": response, "ground_truth": truth, "response_tokens": [response], "response_length": 1}
    lengths = LENGTHS if name == "dapo.py" else {}
    function = load(name, **lengths)
    return (function([sample], **lengths)[0] if name in ("math.py", "dapo.py") else function(sample))["accuracy"]


MATHEMATICAL = ["math.py", "dapo.py", "r1v.py", "weighted_answer.py"]


@pytest.mark.parametrize("response", ["no box", r"\boxed{", "Answer:", "<answer></answer>", ""])
@pytest.mark.parametrize("truth", ["None", "none", None, math.nan, ""])
@pytest.mark.parametrize("name", MATHEMATICAL)
def test_no_answer_is_never_right(name: str, truth: object, response: str) -> None:
    assert accuracy_of(name, response, truth) == (-1 if name == "dapo.py" else 0)


@pytest.mark.parametrize("name", MATHEMATICAL)
def test_none_as_an_answer_is_right_for_a_truth_of_that_word_and_for_no_missing_truth(name: str) -> None:
    response = r"<answer>None</answer> \boxed{None}"
    assert accuracy_of(name, response, "None") == 1
    assert accuracy_of(name, response, None) == (-1 if name == "dapo.py" else 0)
    assert accuracy_of(name, r"<answer>nan</answer> \boxed{nan}", math.nan) == (-1 if name == "dapo.py" else 0)


@pytest.mark.parametrize(
    ("response", "accuracy"),
    [
        ("<think>The result goes between <answer> and </answer>. 2+3=5.</think>\n<answer>5</answer>", 1),
        ("<think>Close with <answer>. 2+3=5.</think>\n<answer>5</answer>", 1),
        ("<think>Is it <answer>5</answer>?</think>\n<answer>4</answer>", 0),
        ("<answer>4</answer> No: <answer>5</answer>", 1),
        ("I put it in <answer> tags: <answer>5</answer>", 1),
        ("<think>2+3</think><answer>5</answer> or <answer>", 1),
        ("<think>2+3 <answer>5</answer></think>", 1),
        ("<think>2+3</think><answer>5</answer></answer>", 1),
        ("</answer>5<answer>", 0),
        ("5", 1),
    ],
)
def test_r1v_grades_the_last_pair_of_tags_behind_the_thinking(response: str, accuracy: float) -> None:
    assert accuracy_of("r1v.py", response, "5") == accuracy


@pytest.mark.parametrize(
    ("tokens", "weighted"),
    [
        (["\\boxed{4}", " no, ", "\\boxed{5}", " so }"], [2]),
        (["so ", "\\boxed{\n", "{5}", "\n}", " }"], [1, 2, 3]),
        (["{", "\\boxed{5}", "}"], [1]),
        (["\\boxed{4}", " and ", "\\boxed{5"], None),
    ],
)
def test_the_weighted_answer_weighs_the_box_that_is_graded(tokens: list[str], weighted: list[int] | None) -> None:
    """Weights are 1 and 2 over their mean, so the answer's tokens are those above one."""
    sample = {"response": "".join(tokens), "ground_truth": "5", "response_tokens": tokens}
    score = load("weighted_answer.py")(sample)
    weights = score["token_weights"]
    assert score["accuracy"] == (weighted is not None)
    assert (weights and [index for index, weight in enumerate(weights) if weight > 1]) == weighted


@pytest.mark.parametrize("name", MATHEMATICAL)
def test_an_answer_that_is_too_large_to_evaluate_is_wrong_at_once(name: str) -> None:
    """Evaluating these takes minutes at least."""
    for answer in ("9999999999999999999999!", "5{0}00000!", "9**9**9"):
        begun = time.monotonic()
        response = f"<answer>{answer}</answer> \\boxed{{{answer}}}"
        assert accuracy_of(name, response, r"\frac{3}{4}") == (-1 if name == "dapo.py" else 0)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", MATHEMATICAL)
def test_a_grader_copied_to_another_folder_works(name: str, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / name, tmp_path)
    config = RewardConfig(
        reward_function=f"{tmp_path / name}:compute_score",
        reward_function_kwargs=LENGTHS if name == "dapo.py" else {},
    )
    assert load_reward_function(config, decoder=None).reward_type in ("batch", "sequential")


@pytest.mark.parametrize("truth", [12, 12.0, "12"])
@pytest.mark.parametrize("name", ["math.py", "dapo.py", "r1v.py", "weighted_answer.py", "digits.py"])
def test_answers_that_are_numbers_are_graded_as_their_texts(name: str, truth: object) -> None:
    """JSON and parquet files may hold them so."""
    scores = []
    for answer in ("12", "13"):
        response = f"<think>hm</think> <answer>{answer}</answer> Answer: {answer} \\boxed{{{answer}}}"
        sample = {"response": response, "ground_truth": truth, "response_tokens": [response], "response_length": 1}
        batched = name in ("math.py", "dapo.py", "digits.py")
        lengths = dict(max_response_length=8, overlong_buffer_length=4, overlong_penalty_factor=1.0)
        function = load(name, **(lengths if name == "dapo.py" else {}))
        kwargs = lengths if name == "dapo.py" else {}
        result = function([sample], **kwargs)[0] if batched else function(sample)
        scores.append(result["overall"])
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("math.py", r"hm</think> \boxed{12}"),
        ("r1v.py", "hm</think> <answer>12</answer>"),
        ("digits.py", r"hm</think> \boxed{12}"),
    ],
)
def test_the_form_counts_what_the_template_wrote_before_the_response(name: str, rest: str) -> None:
    """Templates of thinking models open the thought themselves."""
    forms = []
    for prefix, response in (("", rest), ("<think>\n", rest), ("", f"<think>\n{rest}")):
        sample = {"response": response, "prefix": prefix, "ground_truth": "12"}
        result = load(name)(sample) if name == "r1v.py" else load(name)([sample])[0]
        forms.append(result["format"])
    assert forms == [0, 1, 1]


# ---- the judge ----


VERDICTS = {
    "12": "<think>is it YES or NO?</think>\nYes.",
    "weather": "Perhaps.",
    "13": "NO",
    "14": "I cannot say YES; the answer is wrong.",
    "15": None,
}


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server on this machine; it turns the first request away, as a busy one does."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        self.server.seen.append((self.path, self.headers["Authorization"], body["model"]))
        is_first = len(self.server.seen) == 1
        self.server.running += 1
        self.server.most = max(self.server.most, self.server.running)
        time.sleep(0.05)
        self.server.running -= 1
        if is_first:
            self.send_error(429)
            return
        verdict = VERDICTS[question.partition("Answer to grade: ")[2].partition("\n")[0]]
        reply = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.seen, server.running, server.most = [], 0, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_judge_is_asked_for_all_at_once_again_when_busy_and_its_verdicts_score(
    judge, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(calls, "RETRY_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    config = RewardConfig(
        reward_function=f"{EXAMPLES}/llm_judge.py:compute_score",
        reward_function_kwargs={"url": f"http://127.0.0.1:{judge.server_port}/v1", "model": "tiny"},
        timeout_s=30,
    )
    function = load_reward_function(config, tokenizer)
    scored = function.score(reward_samples(make_batch(tokenizer, ["12", "weather", "13"]), 1, "train"))
    more = function.score(reward_samples(make_batch(tokenizer, ["14", "15"]), 1, "train"))
    assert [result["overall"] for result in scored.results + more.results] == [1, 0, 0, 0, 0]
    assert [result["unclear"] for result in scored.results + more.results] == [0, 1, 0, 1, 1]
    assert len(scored.failures) == 1 and "429" in scored.failures[0]
    assert set(judge.seen) == {("/v1/chat/completions", "Bearer sesame", "tiny")} and len(judge.seen) == 6
    assert judge.most > 1
