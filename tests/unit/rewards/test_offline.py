"""Statistics of scored data: right numbers, and refused where they are another PRM's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.fingerprint import SAMPLED_BYTES, model_fingerprint
from megatron_amrlhf.rewards.offline import (
    SCORES_NAME,
    STATISTICS_NAME,
    load_offline,
    score_statistics,
)

SCORES = np.random.default_rng(3).normal(2.0, 3.0, size=501).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / STATISTICS_NAME
    path.write_text(score_statistics(SCORES, 7, "f" * 32, (1.0, 0.5), "d").as_json())
    save_file({"scores": SCORES}, tmp_path / SCORES_NAME)
    return path


def load(file, statistic="mean", quantile=0.5, prm="f" * 32, weights=(1.0, 0.5)):
    return load_offline(file, statistic, quantile, prm, weights)


def test_statistics_are_those_of_the_scores(file):
    wide = np.sort(SCORES.astype(np.float64))
    found = json.loads(file.read_text())
    assert (found["count"], found["num_answers"]) == (501, 7)
    assert found["mean"] == pytest.approx(wide.sum() / 501)
    assert found["std"] == pytest.approx(np.sqrt(((wide - wide.mean()) ** 2).sum() / 501))
    assert found["median"] == wide[250] == found["quantiles"]["0.5"]
    assert found["quantiles"]["0.1"] == pytest.approx(wide[50])


def test_the_baseline_is_the_configured_statistic(file):
    wide = np.sort(SCORES.astype(np.float64))
    assert load(file).baseline == pytest.approx(wide.mean())
    assert load(file, "median").baseline == wide[250]
    assert load(file, "quantile", 0.02).baseline == pytest.approx(wide[10])
    assert load(file, "quantile", 1.0).baseline == wide[-1]
    assert (load(file).mean, load(file).std) == pytest.approx((wide.mean(), wide.std()))


@pytest.mark.parametrize("scores", [SCORES[:0], SCORES[:-1], np.where(SCORES > 5, np.nan, SCORES)])
def test_quantiles_of_other_scores_than_the_files_are_refused(file, scores):
    save_file({"scores": scores}, file.with_name(SCORES_NAME))
    with pytest.raises(UserError, match="has not the 501 finite scores"):
        load(file, "quantile", 0.3)
    assert np.isfinite(load(file, "median").baseline)  # which reads the statistics alone


def test_a_damaged_fingerprint_is_no_statistics_file(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prm": None}))
    with pytest.raises(UserError, match="no statistics file .*: prm: .* valid string"):
        load(file)


def test_a_prm_with_another_marker_is_told_by_it(file):
    with pytest.raises(
        UserError, match=r"\(ffffffffffff, this run's is ffffffffffff '<x>' '\\n'\)"
    ):
        load(file, prm="f" * 32 + r" '<x>' '\n'")


def test_scores_of_another_prm_or_other_weights_are_refused(file):
    with pytest.raises(UserError, match="scores of another PRM .ffffffffffff, this run's is aaaa"):
        load(file, prm="a" * 32)
    for weights in (None, (1.0, 0.6)):
        with pytest.raises(UserError, match="attribute_weights .1.0, 0.5., this run has"):
            load(file, weights=weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", "no statistics file"),
        ("[1.0]", "no statistics file of tools/score_tokens.py: it holds no JSON object"),
        ('{"mean": 1.0}', "it lacks attribute_weights, count, data, median"),
        ('{"lr": 1.0, "b": 2}', "it lacks .* and has unknown b, lr$"),
        ('"std": -1.0', "std: .* greater than or equal to 0"),
        ('"mean": NaN', "NaN is no JSON number"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_file_is_named(file, change, words):
    if change is None:
        file.unlink()
    elif not change.startswith('"'):
        file.write_text(change)
    else:
        fields = json.loads(file.read_text())
        key, value = change.split(": ")
        fields[key.strip('"')] = float(value)
        file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=words) as caught:
        load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_quantiles_need_the_scores_beside(file):
    file.with_name(SCORES_NAME).unlink()
    assert load(file, "median").baseline
    with pytest.raises(UserError, match="quantiles are read from .*scores.safetensors"):
        load(file, "quantile", 0.2)


def test_a_fingerprint_sees_every_file_its_name_size_beginning_and_end(tmp_path):
    def of(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.safetensors").write_bytes(content)
        return model_fingerprint(folder)

    long = bytes(2 * SAMPLED_BYTES + 10)
    first = of(a=long, b=b"12")
    assert first == of(a=long, b=b"12") and len(first) == 32
    variants = [
        of(a=long, b=b"13"),
        of(a=long, c=b"12"),
        of(a=long[:-1] + b"1", b=b"12"),
        of(a=b"1" + long[1:], b=b"12"),
        of(a=long + b"\0", b=b"12"),
        of(a=long),
    ]
    assert len({first, *variants}) == len(variants) + 1
    with pytest.raises(UserError, match="no .*safetensors file"):
        of()


def test_a_fingerprint_is_that_of_the_statistics_made_before(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(range(256)) * 40000)  # more than both ends
    assert model_fingerprint(tmp_path) == "d317956835c57ee246c264b72388eb3f"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "many"),
        ("count", 0),
        ("num_answers", -1),
        ("quantiles", []),
        ("attribute_weights", "1.0"),
        ("mean", True),
        ("data", None),
    ],
)
def test_a_value_that_no_scoring_wrote_is_named(file, key, value):
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"no statistics file .*: {key}"):
        load(file)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", bytes(99), b'{"a": 1e999}'])
def test_what_is_no_json_is_one_line(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match="no statistics file") as caught:
        load(file)
    assert "\n" not in str(caught.value)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        load(file)
