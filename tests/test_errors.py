import pickle

from gsda_fast.errors import UsageError


def test_a_mistake_is_told_in_one_form() -> None:
    assert str(UsageError("--steps", found="0", expected="1 or more")) == "--steps: found 0; expected 1 or more"
    with_remedy = UsageError("--steps", found="0", expected="1 or more", remedy="give more")
    assert str(with_remedy) == "--steps: found 0; expected 1 or more; give more"


def test_a_mistake_crosses_processes_whole() -> None:
    error = UsageError("--steps", found="0", expected="1 or more", remedy="give more")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is UsageError
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
