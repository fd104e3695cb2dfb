"""tools/split_steps.py: no problem on both sides, and beginnings that differ in nothing else."""

import json

import pytest

from tests.helpers import load_tool

split_steps = load_tool("split_steps")


def line(problem, *steps, ratings, finished=False):
    return {"problem": problem, "steps": list(steps), "ratings": ratings, "finished": finished}


def solutions(name):
    return [
        line(name, "a", "b", "c", ratings=[1, 0, 1], finished=True),
        line(name, "a", "b", "z", ratings=[1, 1, -1]),
        line(name, "v", "w", ratings=[1, -1], finished=True),
        line(name, "a", "x", ratings=[1, -1]),
        line(name, "y", ratings=[-1]),
        line(name, "a", "q", ratings=[1, None]),
    ]


NAMES = [f"problem {number}" for number in range(10)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "steps.jsonl"
    lines = [record for name in NAMES for record in solutions(name)]
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    return path


def read(folder, name):
    return [json.loads(text) for text in (folder / name).read_text().splitlines()]


def run(source, folder, *arguments):
    assert split_steps.main([str(source), "--out", str(folder), *arguments]) == 0


def test_every_line_is_kept_on_the_side_of_its_problem(source, tmp_path):
    run(source, tmp_path / "out", "--heldout", "0.3")
    train, heldout = (read(tmp_path / "out", f"{name}.jsonl") for name in ("train", "heldout"))
    sides = [{record["problem"] for record in side} for side in (train, heldout)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(NAMES)
    assert len(sides[1]) == 3
    for name in NAMES:
        found = [record for record in train + heldout if record["problem"] == name]
        assert found == solutions(name)


def test_the_side_of_a_problem_does_not_depend_on_the_order_of_the_file(source, tmp_path):
    run(source, tmp_path / "first")
    source.write_text("\n".join(reversed(source.read_text().splitlines())) + "\n")
    run(source, tmp_path / "second")
    first, second = (
        {record["problem"] for record in read(tmp_path / name, "heldout.jsonl")}
        for name in ("first", "second")
    )
    assert first == second


def test_pairs_and_answers_are_beginnings_of_as_many_steps(source, tmp_path):
    folder = tmp_path / "out"
    run(source, folder, "--heldout", "0.5")
    answers = read(folder, "answers.jsonl")
    assert len(answers) == 5 * 4 and all(answer["finished"] is False for answer in answers)
    right = {tuple(x["steps"]) for x in answers if x["correct"]}
    wrong = {tuple(x["steps"]) for x in answers if not x["correct"]}
    # The whole right solution without its last step has two beginnings; the wrong end is whole.
    assert right == {("a", "b"), ("a",)} and wrong == {("a", "x"), ("y",)}
    pairs = read(folder, "pairs_heldout.jsonl")
    assert len(pairs) == 10 and {pair["rejected"] for pair in pairs} == {"a\nx\n", "y\n"}
    assert all(pair["chosen"].count("\n") == pair["rejected"].count("\n") for pair in pairs)
    run(source, folder, "--heldout", "0.5", "--pairs", "1")
    assert len(read(folder, "pairs_heldout.jsonl")) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heldout", "1.5"], "must be between 0 and 1"),
        (["--heldout", "0.01"], "do not split that way"),
        (["--format", "math_shepherd"], "key 'input' is missing"),
        (["--pairs", "-1"], "--pairs: must be a whole number of at least 0"),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, capsys, arguments, words):
    assert split_steps.main([str(source), "--out", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_the_source_is_never_replaced(source, tmp_path, capsys):
    own = tmp_path / "train.jsonl"
    own.write_bytes(source.read_bytes())
    assert split_steps.main([str(own), "--out", str(tmp_path)]) == 2
    assert "itself would be replaced" in capsys.readouterr().err
    assert own.read_bytes() == source.read_bytes()


def test_what_stands_before_a_problem_stays_before_it(tmp_path):
    """As in the demonstration's own file, whose rows have a system message and a solved example."""
    source, example = tmp_path / "steps.jsonl", ["1 + 1", "2"]
    rows = [
        {**record, "system": "Add.", "history": [[*example]]} if number % 2 else record
        for number, name in enumerate(NAMES)
        for record in solutions(name)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(source, tmp_path / "out", "--heldout", "0.5")
    found = [read(tmp_path / "out", f"{name}.jsonl") for name in ("pairs_train", "answers")]
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    for row in [row for rows in found for row in rows]:
        has_context = NAMES.index(row["prompt"]) % 2 == 1
        assert row.get("system") == ("Add." if has_context else None)
        assert row.get("history") == (turns if has_context else None)
    train = read(tmp_path / "out", "train.jsonl")
    assert all(row in rows for row in train)
