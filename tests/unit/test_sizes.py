"""How sizes in bytes are told."""

from megatron_amrlhf.sizes import in_units


def test_a_size_has_three_digits_and_its_unit():
    units = {3 * 2**30: "3 GiB", 1023 * 2**20: "1023 MiB", 1234: "1.21 KiB", 7: "7 B"}
    assert {size: in_units(size) for size in units} == units
