"""The doctor's own files in a run's folder go; nothing else does."""

from dataclasses import dataclass

import pytest

from megatron_amrlhf.doctor.shared_files import PREFIX, look_from_everywhere
from megatron_amrlhf.owned import make_folder


@dataclass
class OnlyRank:
    """A meeting of one."""

    is_main = True
    host = "here"
    rank = 0

    def answer(self, value=None):
        return value

    def gather(self, key, own):
        return [own]


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_behind(tmp_path, exists):
    folder = tmp_path / "runs" / "demo"
    if exists:
        folder.mkdir(parents=True)
    (sight,) = look_from_everywhere(OnlyRank(), folder)
    assert sight.written and sight.returned
    assert folder.exists() == exists and (not exists or list(folder.iterdir()) == [])


def test_what_a_killed_doctor_left_goes_and_a_users_folder_stays(tmp_path):
    make_folder(tmp_path / f"{PREFIX}0123", "probe")
    (tmp_path / f"{PREFIX}0123" / "token").touch()
    users = tmp_path / f"{PREFIX}notes"
    users.mkdir()
    (users / "visit.txt").write_text("mine")
    look_from_everywhere(OnlyRank(), tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == [users.name]
    assert (users / "visit.txt").read_text() == "mine"
