"""The schema explains itself."""

from megatron_amrlhf.config.describe import list_keys, section_fields


def test_every_key_has_a_description():
    assert not [key.name for key in list_keys() if not key.description]


def test_types_and_defaults_are_readable():
    keys = {(key.name, key.kind): key for key in list_keys()}
    top_p = keys["rollout.top_p", ""]
    assert (top_p.type, top_p.default) == ("float > 0, <= 1", "0.99")
    assert keys["run.steps", ""].type == "int > 0 or null"
    assert keys["run.name", ""].default == "required"
    assert keys["model.dtype", ""].type == "auto | float32 | bfloat16"
    assert keys["optimizer.betas", ""].default == "[0.9, 0.95]"
    assert ("algorithm.beta", "dpo") in keys and ("algorithm.beta", "ppo") not in keys


def test_section_fields_follow_the_algorithm():
    assert "clip_eps" in section_fields("algorithm", "ppo")
    assert "clip_eps" not in section_fields("algorithm", "dpo")
    assert section_fields("algorithm", None) == () == section_fields("nothing", "ppo")
