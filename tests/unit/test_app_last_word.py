"""An error that ends a run stands at the end of Flower's log, and refused settings without a traceback."""

import logging

import pytest

from psl_flower.app.last_word import last_word
from psl_flower.errors import ConfigError, StepError


@pytest.fixture
def log():
    logger = logging.getLogger("flwr")
    lines, filters = [], list(logger.filters)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))
    logger.addHandler(handler)
    yield logger, lines
    logger.removeHandler(handler)
    logger.filters[:] = filters


def end_of_a_process(logger, error):
    """Log what Flower does when a ServerApp raises."""
    try:
        with last_word():
            raise error
    except Exception as raised:
        logger.error("%s raised an exception", "Simulation", exc_info=raised)
    logger.error("Exit Code: 700\nAn unhandled exception occurred.")


def test_refused_settings_are_told_in_a_line_and_once_more_at_the_end(log):
    logger, lines = log
    end_of_a_process(logger, ConfigError("batch-size must be 100% right"))
    assert lines[0] == "batch-size must be 100% right"
    assert lines[1:] == ["Exit Code: 700\nAn unhandled exception occurred.\n\nbatch-size must be 100% right"]


def test_of_other_errors_the_traceback_stays(log):
    logger, lines = log
    end_of_a_process(logger, StepError("step 3 failed"))
    assert "Traceback" in lines[0]
    assert lines[1].endswith("\n\nstep 3 failed")


def test_only_the_last_error_has_it(log):
    logger, lines = log
    end_of_a_process(logger, ConfigError("the first"))
    end_of_a_process(logger, ConfigError("the second"))
    assert lines[-1].endswith("occurred.\n\nthe second")


def test_what_is_not_ours_is_left_as_it_is(log):
    logger, lines = log
    end_of_a_process(logger, KeyError("missing"))
    assert "Traceback" in lines[0]
    assert lines[1].endswith("occurred.")
