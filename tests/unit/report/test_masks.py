"""show-masks: token texts, escaping, borders and colours, exit codes."""

import dataclasses
import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from megatron_amrlhf import cli
from megatron_amrlhf.errors import printable
from megatron_amrlhf.report.masks import (
    HIGH_RGB,
    LOW_RGB,
    print_records,
    rgb_of,
    token_views,
)
from megatron_amrlhf.report.masks_html import page
from megatron_amrlhf.report.samples import Message, SampleRecord, load_samples, write_samples

HOSTILE = "<script>alert(1)</script> \" ' & \x1b[31m \u202e [bold]"
RECORD = SampleRecord(
    step=3,
    sample=0,
    group=0,
    rendered="<|user|>" + HOSTILE,
    prompt="2 + 2? " + HOSTILE,
    answer="it is 4",
    token_ids=[5, 6, 7, 2],
    tokens=["it", " is", " 4", "<|end|>"],
    token_rewards=[-0.5, 0.1, 1.0, 0.4],
    signal=[-1.0, 0.0, 2.0, 0.5],
    baseline=0.25,
    delta=0.5,
    mask=[0, 0, 1, 1],
    messages=[Message(0, 2, -1, -0.2), Message(2, 4, 1, 0.7)],
    sequence_reward=0.25,
    use="chosen",
    ended=True,
    from_reference=False,
)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def printed(*records, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_records(console, records)
    return console.file.getvalue()


def test_an_answer_whose_reward_failed_is_neither_chosen_nor_rejected():
    nothing = {"sequence_reward": float("nan"), "mask": [0] * 4}
    failed = printed(dataclasses.replace(RECORD, use="failed", **nothing))
    assert "chosen (keeps +)" in printed(RECORD)
    assert "its reward failed" in failed and "keeps" not in failed


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("rejected", "rejected (keeps -)"),
        ("both", "chosen in one pair, rejected in another (keeps + and -)"),
        ("none", "not learned from"),
        ("left_out", "left out, as all that are cut"),
    ],
)
def test_what_became_of_an_answer_is_said(use, words):
    assert words in printed(dataclasses.replace(RECORD, use=use)).replace("\n", " ")
    assert words in page([dataclasses.replace(RECORD, use=use)], "x")


def test_what_steers_a_terminal_is_shown_instead():
    assert printable("a\x1b[2Jb\u202ec\x00\x9b\ud800\n\t") == (
        "a\\x1b[2Jb\\u202ec\\x00\\x9b\\ud800\n\t"
    )
    assert printable("\u4f60\u597d \U0001f389 \u0645") == "\u4f60\u597d \U0001f389 \u0645"


def test_colours_follow_the_distance_from_the_threshold():
    views = token_views(RECORD)
    assert [view.height for view in views] == pytest.approx([-1.25 / 1.75, -0.25 / 1.75, 1, 1 / 7])
    assert (rgb_of(1.0), rgb_of(-1.0), rgb_of(0.0)) == (HIGH_RGB, LOW_RGB, (255, 255, 255))
    assert [(v.message, v.sign, v.kept) for v in views] == [
        (0, -1, False),
        (0, -1, False),
        (1, 1, True),
        (1, 1, True),
    ]


def test_the_terminal_shows_borders_band_signs_and_mask():
    text = printed(RECORD)
    assert "it is\u2502 4<|end|>" in text
    assert "threshold b = 0.25, delta = 0.5: neutral from -0.25 to 0.75" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "0-1", "-", "-0.2", "0/2", "it", "is"] in rows
    assert ["1", "2-3", "+", "0.7", "2/2", "4<|end|>"] in rows
    assert "\x1b" not in text and "[bold]" in text and "\\u202e" in text


def test_a_narrow_terminal_shows_each_number_and_text_whole():
    lines = printed(RECORD, width=40).splitlines()
    assert "0  0-1  -  -0.2  0/2  it is" in lines
    assert "1  2-3  +  0.7  2/2  4<|end|>" in lines
    assert all(len(line) <= 40 for line in lines[1:])  # the first is the legend


def test_the_page_escapes_everything():
    record = dataclasses.replace(RECORD, answer=HOSTILE, tokens=[HOSTILE, "</span>", "&lt;", "x"])
    text = page([record], "runs/<b>")
    parsed = Page(text)
    assert not parsed.open and not {"script", "b", "bold"} & set(parsed.tags)
    assert HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") in parsed.text
    assert "runs/<b>" in parsed.text and "\x1b" not in text and "\u202e" not in text
    names = {name for _, name, _ in parsed.attributes}
    assert names <= set(
        "lang charset http-equiv content class style title width height role x y fill".split()
    )
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in parsed.attributes


def test_the_page_has_messages_masks_and_a_chart():
    text = page([RECORD], "run")
    parsed = Page(text)
    kinds = [value for tag, name, value in parsed.attributes if name == "class"]
    # Beside the legend's one of each: two messages, two kept tokens.
    assert (kinds.count("message"), kinds.count("kept")) == (3, 3)
    titles = [value for _, name, value in parsed.attributes if name == "title"]
    assert titles[2] == "token 2: reward 1, signal 2, message 1 (+), kept"
    assert parsed.tags.count("svg") == 1
    assert parsed.tags.count("rect") == 1 + 4 + 1 + 2 + 1  # band, bars, border, kept, threshold
    assert 'charset="utf-8"' in text


def test_chinese_and_emoji_pass_unchanged():
    tokens = ["\u4f60\u597d", "\U0001f389", "", "<|end|>"]
    record = dataclasses.replace(RECORD, answer="\u4f60\u597d\U0001f389", tokens=tokens)
    assert "\u4f60\u597d" in Page(page([record], "run")).text
    assert "\u4f60\u597d\U0001f389\u2502\u00b7<|end|>" in printed(record)


def test_nan_rewards_and_empty_answers_can_be_shown():
    nan = float("nan")
    odd = dataclasses.replace(RECORD, token_rewards=[nan] * 4, signal=[nan] * 4)
    empty = dataclasses.replace(
        RECORD,
        answer="",
        token_ids=[],
        tokens=[],
        token_rewards=[],
        signal=[],
        mask=[],
        messages=[],
    )
    assert "nan" in page([odd, empty], "run") and printed(odd, empty)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    write_samples(tmp_path / "samples.jsonl", [RECORD, dataclasses.replace(RECORD, step=5)] * 3)
    return tmp_path


def test_show_masks_takes_a_run_a_file_or_a_config(run, capsys):
    config = run.parent / "run.yaml"
    config.write_text(
        f"run: {{name: {run.name}, folder: {run.parent}}}\nmodel: {{path: x}}\n"
        "algorithm: {kind: prm}\ndata: {train: x, format: steps}\n"
    )
    outputs = []
    for source in (run, run / "samples.jsonl", config):
        assert cli.main(["show-masks", str(source)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].count("step 5,") == 3  # the newest step


def test_step_limit_and_html(run, capsys):
    target = run / "masks.html"
    arguments = ["show-masks", str(run), "--step", "3", "--limit", "2", "--html", str(target)]
    assert cli.main(arguments) == 0
    assert "2 answers of step 3" in capsys.readouterr().out
    assert target.read_text(encoding="utf-8").count("<article>") == 2


def test_samples_read_back_as_they_were(run):
    assert load_samples(run)[0] == RECORD


def test_an_answer_without_a_threshold_can_be_shown(run, capsys):
    odd = dataclasses.replace(RECORD, step=6, baseline=float("nan"))
    write_samples(run / "samples.jsonl", [odd])
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 7, "cut sh')
    assert cli.main(["show-masks", str(run)]) == 0
    assert "no threshold; colours are relative to the answer's mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, ["nowhere"], "nowhere: no such file"),
        ("", [], "no samples in it yet"),
        ("{}\n", [], "samples.jsonl:1: not a sample of a run (KeyError: 'step')"),
        ("[1]\n", [], "samples.jsonl:1: not a sample"),
        ("nonsense\n{}\n", [], "samples.jsonl:1: not valid JSON"),
        (None, ["--step", "9"], "--step 9: no such step in the file, it has 3, 5"),
        (None, ["--limit", "0"], "--limit: must be a whole number of at least 1, found '0'"),
        (None, ["--html", "no/such/folder/x.html"], "--html no/such/folder/x.html: cannot be"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, capsys, content, arguments, expected):
    if content is not None:
        (run / "samples.jsonl").write_text(content)
    source = [] if arguments == ["nowhere"] else [str(run)]
    assert cli.main(["show-masks", *source, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_lists_of_wrong_lengths_name_the_line(run, capsys):
    path = run / "samples.jsonl"
    lines = path.read_text().split("\n")
    fields = json.loads(lines[1])
    lines[1] = json.dumps(fields | {"mask": [1]})
    path.write_text("\n".join(lines))
    assert cli.main(["show-masks", str(run)]) == 2
    assert "samples.jsonl:2: not a sample of a run" in capsys.readouterr().err
