"""Loading a YAML: right values in, one clear line out for each mistake."""

import pytest

from megatron_amrlhf.config.describe import list_keys
from megatron_amrlhf.config.load import dump_config, load_config
from megatron_amrlhf.errors import UserError

VALID = """\
run: {name: demo}
model: {path: some/model}
algorithm: {kind: ppo, clip_eps: 0.1}
data: {train: prompts.jsonl}
optimizer: {lr: 1e-6, betas: [0.9, 0.999]}
"""


@pytest.fixture
def write(tmp_path):
    def _write(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message_of(path, overrides=()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text, "an error is one line"
    return text


def test_a_valid_file_gives_its_values_and_the_defaults(write):
    config = load_config(write(VALID))
    assert config.algorithm.clip_eps == 0.1
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.rollout.top_k == 100


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E5", 1e5), ("2.5e-4", 2.5e-4), (".5e1", 5.0), ("1.e3", 1e3), ("3", 3.0)],
)
def test_floats_without_a_dot_are_floats(write, text, value):
    config = load_config(write(VALID.replace("1e-6", text)))
    assert config.optimizer.lr == value


@pytest.mark.parametrize(
    ("text", "value"), [("0100", 100), ("010", 10), ("008", 8), ("1_000", 1000), ("0x1F", 31)]
)
def test_integers_are_decimal_also_behind_a_zero(write, text, value):
    assert load_config(write(VALID), [f"run.seed={text}"]).run.seed == value


def test_a_time_is_no_number_of_base_60(write):
    with pytest.raises(UserError, match=r"run.max_minutes: .*12:00:00"):
        load_config(write(VALID), ["run.max_minutes=12:00:00"])


@pytest.mark.parametrize("name", ["08", "1e-6", "0o17", "12:00:00", "0x1F", ".5", "null", "yes"])
def test_a_text_that_looks_like_a_number_comes_back(write, name):
    config = load_config(write(VALID.replace("demo", f'"{name}"')))
    assert config.run.name == name and load_config(write(dump_config(config))) == config


def test_a_name_that_looks_like_hexadecimal_stays_text(write):
    assert load_config(write(VALID.replace("demo", "e6"))).run.name == "e6"


def test_overrides_win_and_are_typed_as_yaml(write):
    overrides = ["optimizer.lr=3e-5", "run.steps=4", "mask.kind=none", "data.heldout=null"]
    config = load_config(write(VALID), [*overrides, "optimizer.betas=[0.8, 0.9]"])
    assert config.optimizer.lr == 3e-5 and config.run.steps == 4
    assert config.mask.kind == "none" and config.data.heldout is None
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    "text",
    [
        "Use #### before",
        "# first, say hello",
        "Say 'x' #1",
        "5 # five",
        "two\nlines",
        "a\n\n  b",
        "--- a",
        "&you are",
        "! important",
        "C# and F#",
        "#",
        "|",
        ">",
        " ",
        "yes, no",
        "a\\nb",
    ],
)
def test_a_text_of_an_override_is_the_text_as_it_stands(write, text):
    config = load_config(write(VALID), [f"data.system_prompt={text}", f"data.input_mark={text}"])
    expected = text.strip() or text
    assert config.data.system_prompt == config.data.input_mark == expected


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("data.system_prompt", "null", None),
        ("data.system_prompt", "", None),
        ("data.system_prompt", '"Use # \\n"', "Use # \n"),
        ("data.system_prompt", "'it''s # 1'", "it's # 1"),
        ("data.system_prompt", "|\n a # b\n c", "a # b\nc"),
        ("data.system_prompt", "!!str 5", "5"),
        ("data.ignored_keys", "[a, 'b # c']", ("a", "b # c")),
        ("data.alternatives", "false", False),
        ("run.steps", " 5 ", 5),
        ("run.max_minutes", "1e3", 1000.0),
    ],
)
def test_yaml_of_an_override_stays_yaml(write, key, text, expected):
    config = load_config(write(VALID), [f"{key}={text}"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == expected


def test_a_section_can_be_given_by_an_override(write):
    assert load_config(write(VALID), ["mask={kind: none}"]).mask.kind == "none"
    assert load_config(write(VALID), ["mask=kind: none"]).mask.kind == "none"


def test_an_empty_section_means_its_defaults(write):
    assert load_config(write(VALID + "mask:\n")).mask.kind == "adaptive"


def test_the_resolved_config_loads_back_to_itself(write):
    config = load_config(write(VALID))
    assert load_config(write(dump_config(config))) == config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("run: {name: demo}", "run: {name: demo, sed: 1}"),
            "run.sed: unknown key, did you mean run.seed?",
        ),
        (("data:", "dta: {}\ndata:"), "dta: unknown key, did you mean data?"),
        (
            ("clip_eps: 0.1", "form: pair"),
            "algorithm.form: a key of algorithm.kind dpo, not of ppo",
        ),
        (
            ("clip_eps: 0.1", "beta: 0.1"),
            "algorithm.beta: a key of algorithm.kind dpo or kto, not of ppo",
        ),
        (
            ("clip_eps: 0.1", "clip_ep: 1"),
            "algorithm.clip_ep: unknown key, did you mean algorithm.clip_eps?",
        ),
        (("clip_eps: 0.1", "clip_eps: -1"), "algorithm.clip_eps: must be > 0 (got -1)"),
        (
            ("kind: ppo", "kind: ppoo"),
            "must be one of prm, orm, ppo, grpo, dpo, kto, rejection_sampling (got 'ppoo'), "
            "did you mean ppo?",
        ),
        (
            ("kind: ppo, ", ""),
            "algorithm.kind: is required, one of prm, orm, ppo, grpo, dpo, kto, rejection_sampling",
        ),
        (("data: {train: prompts.jsonl}", ""), "data: is required"),
        (("train: prompts.jsonl", ""), "data.train: is required"),
        (("data:", "rollout: {top_p: 3}\ndata:"), "rollout.top_p: must be <= 1 (got 3)"),
        (("data:", "top_p: 1\ndata:"), "top_p: unknown key, did you mean rollout.top_p?"),
        (("[0.9, 0.999]", "[0.9]"), "optimizer.betas[1]: is required"),
        (("demo", "17"), "run.name: must be text, in quotes if it looks like a number (got 17)"),
        (("data:", "model2: 1\nmask: 3\ndata:"), "mask: must be a section of keys (got 3)"),
        (("1e-6", "fast"), "optimizer.lr: must be a number (got 'fast')"),
        (
            ("data:", "mask: {kind: no}\ndata:"),
            "mask.kind: must be 'adaptive' or 'none' (got false)",
        ),
    ],
)
def test_each_mistake_names_its_key_and_the_fix(write, change, expected):
    path = write(VALID.replace(*change))
    message = message_of(path)
    assert message.startswith(f"{path}: ") and expected in message


def test_all_mistakes_come_at_once(write):
    text = VALID.replace("clip_eps: 0.1", "clip_eps: 0, gama: 1") + "rollout: {top_k: 1.5}\n"
    message = message_of(write(text))
    assert message.count("; ") == 2
    for key in ("algorithm.clip_eps", "algorithm.gama", "rollout.top_k"):
        assert key in message


def test_a_mistake_from_an_override_says_so(write):
    message = message_of(write(VALID), ["rollout.top_kk=1"])
    assert "rollout.top_kk: unknown key, did you mean rollout.top_k? (from --set)" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [1, 2", "malformed YAML"),
        ("run:\n  name: a\n bad: 1\n", ", line 3: malformed YAML"),
        ("run: {name: a}\nrun: {name: b}\n", ", line 2: malformed YAML (key 'run' is given twice)"),
        ("", "is empty, must be a mapping"),
        ("[" * 100_000, "malformed YAML (nested too deeply)"),
        ("- a\n- b\n", "holds a list, must be a mapping"),
        (
            "run:\n  name: 2024-13-45\n",
            ", line 2: malformed YAML ('2024-13-45' is no timestamp, in quotes it is text)",
        ),
    ],
)
def test_malformed_files_name_the_line(write, text, expected):
    assert expected in message_of(write(text))


def test_files_that_cannot_be_read_are_user_errors(tmp_path):
    assert "no such file" in message_of(tmp_path / "none.yaml")
    assert "is a folder" in message_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff\xfe\n")
    assert "is not UTF-8 text" in message_of(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.top_p", "must look like section.key=value"),
        (".=1", "must look like section.key=value"),
        ("run.name.x=1", "run.name is not a section"),
        ("optimizer.betas=[0.9", "malformed YAML"),
        ("optimizer.betas=[0.8, 0.9] # x", "'# x' is a comment: a text with # needs quotes"),
        ("data.system_prompt='a' # b", "'# b' is a comment"),
        ("data.system_prompt=Note: use #### x", "'#### x' is a comment"),
        ("run.name=2024-13-45", "'2024-13-45' is no timestamp, in quotes it is text"),
        ('run.name=!!int "zzz"', "'zzz' is no int"),
        ('run.name=!!bool "zzz"', "'zzz' is no bool"),
        ('run.name=!!timestamp "zzz"', "'zzz' is no timestamp"),
    ],
)
def test_malformed_overrides_are_quoted_back(write, override, expected):
    message = message_of(write(VALID), [override])
    assert message.startswith(f"--set {override}") and expected in message


@pytest.mark.parametrize(
    "override",
    [
        'data.system_prompt="\\ud83d b"',
        'data.ignored_keys=["\\udc00"]',
        'run.folder="a\\0b"',
        'mask={"\\ud83d": 1}',
    ],
)
def test_half_a_character_is_refused(write, override):
    message = message_of(write(VALID), [override])
    assert override.partition("=")[0] in message and "character" in message
    message.encode()


NUMBERS = [key for key in list_keys() if "int" in key.type or "float" in key.type]


@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: f"{key.kind}:{key.name}")
def test_no_number_is_without_bounds(write, key):
    """10^26 steps, a time that no clock takes, a weight whose square is infinite."""
    path = write(VALID.replace("{kind: ppo, clip_eps: 0.1}", f"{{kind: {key.kind or 'ppo'}}}"))
    for number in ("1" + "0" * 26, "-1" + "0" * 26, "1e300"):
        value = f"[{number}, {number}]" if key.type.startswith("list") else number
        message = message_of(path, [f"{key.name}={value}"])
        assert key.name in message and len(message) < 400


def test_a_number_of_too_many_digits_is_one_short_line(write):
    assert len(message_of(write(VALID), [f"run.seed={'9' * 5000}"])) < 250
