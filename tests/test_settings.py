"""Settings beside a manifest: equal ones are equal texts, and different ones say where."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from omnigen_pipe.settings import as_text, changes, from_text, listed

values = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3))
options = st.dictionaries(st.sampled_from("abc"), values)
some_settings = st.builds(
    lambda datasets, more: {"datasets": datasets} | more,
    st.dictionaries(st.sampled_from(["cats", "dogs"]), options),
    st.dictionaries(st.sampled_from(["pixels", "template"]), st.text(min_size=1, max_size=3)),
)


@given(some_settings, some_settings)
def test_nothing_changed_exactly_where_the_texts_are_equal(one: dict, other: dict) -> None:
    assert from_text(as_text(one)) == one
    # An option that is not there, and one that is None, are both unset.
    bare = [
        {k: v for k, v in s.items() if k != "datasets"}
        | {
            "datasets": {
                d: {k: v for k, v in o.items() if v is not None} for d, o in s["datasets"].items()
            }
        }
        for s in (one, other)
    ]
    assert (changes(one, other) == []) == (as_text(bare[0]) == as_text(bare[1]))
    assert len(changes(one, other)) == len(changes(other, one))


def test_changes_read_as_a_person_would_say_them() -> None:
    then = {
        "datasets": {"cats": {"crop_style": "center", "resolution": 512}, "old": {}},
        "pixels": "v1",
    }
    now = {
        "datasets": {"cats": {"crop_style": "random", "resolution": 512}, "dogs": {"repeats": 1}},
        "pixels": "v1",
        "tiles": (1, 2),
    }
    assert changes(then, now) == [
        "tiles: unset → [1, 2]",
        "crop_style of dataset cats: center → random",
        "dataset dogs is new",
        "dataset old is gone or disabled",
    ]


def test_what_is_no_settings_counts_as_none() -> None:
    for text in ("", "0123abc", "[1]", "null"):
        assert from_text(text) == {}


def test_a_long_list_says_how_many_more() -> None:
    assert listed(["a", "b"]) == "a; b"
    assert listed([str(i) for i in range(9)]) == "0; 1; 2; 3; 4; and 4 more"
