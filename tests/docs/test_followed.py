"""Pages that are followed literally: each file and command of theirs, in order, in an empty folder."""

import page
import pytest


@pytest.mark.parametrize(("name", "commands"), [("adding_a_backend.md", 11), ("numerics.md", 1)])
def test_page(follow, name, commands):
    assert follow((page.ROOT / "docs" / name).read_text()) == commands


def test_what_is_not_as_shown_is_seen():
    assert page.differences("a 1.5 ms\n…\nd 7\n", "a   22 ms\nb\nc\nd 8\n") == ""
    assert "printed was" in page.differences("a 1 ms\nb\n", "a 1 ms\nc\n")
    assert "printed was" in page.differences("…\nmissing\n", "a\nb\n")
    assert "not shown" in page.differences("a\n", "a\nb\n")


def test_a_command_that_fails_is_seen(follow):
    with pytest.raises(AssertionError, match="status 3"):
        follow("```sh\nfalse || exit 3\n```\n".replace("exit 3", "(exit 3)"))
