"""What a worker leaves for the launcher when the user must act."""

from pathlib import Path

import pytest

from trainer.refusal import VARIABLE, refuse, refused


def test_a_worker_killed_while_it_refuses_leaves_the_words_of_the_one_before(monkeypatch, tmp_path):
    """The launcher kills the others as soon as one has refused, and they may be just about to."""
    file = tmp_path / "refusal"
    monkeypatch.setenv(VARIABLE, str(file))
    assert not refused()
    refuse("the first")

    def killed(path, _message):
        path.open("w").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            refuse("the second")
    assert file.read_text() == "the first"
    assert refused()
    refuse("the third")
    assert file.read_text() == "the third"
