"""Any config is refused by the name of a field, or builds, learns, saves and loads."""

from pathlib import Path

from hypothesis import HealthCheck, given, settings

from pipelines.config import TokenizerRunConfig
from pipelines.generation import SamplingConfig
from prior import PriorConfig
from tests.faults.config_fields import (
    Edited,
    edited,
    prior_fields,
    run_fields,
    sampling_fields,
    tokenizer_fields,
)
from tests.faults.configuration import (
    trial,
    use_prior,
    use_run,
    use_sampling,
    use_tokenizer,
    wrong_message,
)
from tokenizer import TokenizerConfig
from tokenizer.storage.configs import StrictConfig

# The folder is empty again after each example.
STEADY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=40, suppress_health_check=STEADY)
@given(case=edited(tokenizer_fields()))
def test_any_tokenizer_is_refused_by_field_or_works(case: Edited, tmp_path: Path) -> None:
    assert trial(TokenizerConfig, use_tokenizer, case, tmp_path) == ""


@settings(max_examples=25, suppress_health_check=STEADY)
@given(case=edited(prior_fields()))
def test_any_prior_is_refused_by_field_or_works(case: Edited, tmp_path: Path) -> None:
    assert trial(PriorConfig, use_prior, case, tmp_path) == ""


@settings(max_examples=15, suppress_health_check=STEADY)
@given(case=edited(sampling_fields()))
def test_any_sampling_is_refused_by_field_or_works(case: Edited, tmp_path: Path) -> None:
    assert trial(SamplingConfig, use_sampling, case, tmp_path) == ""


@settings(max_examples=6, suppress_health_check=STEADY)
@given(case=edited(run_fields(), most=1))
def test_any_run_is_refused_by_field_or_works(case: Edited, tmp_path: Path) -> None:
    assert trial(TokenizerRunConfig, use_run, case, tmp_path) == ""


def test_a_trial_notices_what_does_not_work(tmp_path: Path) -> None:
    def fail(config: StrictConfig, folder: Path) -> None:
        raise RuntimeError("a bug")

    case = Edited({}, ())
    assert trial(SamplingConfig, fail, case, tmp_path) == "RuntimeError: a bug"


def test_a_message_must_name_the_field_on_one_line() -> None:
    assert not wrong_message("channels: must be 3", TokenizerConfig, ("channels",))
    assert "not named" in wrong_message("groups: must be 3", TokenizerConfig, ("channels",))
    assert "no field" in wrong_message("something is wrong", TokenizerConfig, ())
    assert "printable" in wrong_message("channels\nare wrong", TokenizerConfig, ("channels",))
    assert "printable" in wrong_message("channels " * 1000, TokenizerConfig, ("channels",))
