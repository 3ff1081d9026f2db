"""An error that ends a run stands at the end of Flower's log, and refused settings without a traceback."""

import logging

import pytest
from torch import nn

from psl_flower import ParallelSplitLearning
from psl_flower.errors import ConfigError, StepError
from psl_flower.last_word import last_word


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


def test_an_app_need_do_nothing_for_it(log):
    logger, lines = log
    try:
        ParallelSplitLearning(nn.Linear(2, 2), cut="layer9")
    except Exception as raised:
        logger.error("%s raised an exception", "Simulation", exc_info=raised)
    logger.error("Exit Code: 700\nAn unhandled exception occurred.")
    assert "Traceback" not in "".join(lines)
    assert "layer9" in lines[-1].split("\n\n")[-1]


def test_what_flower_raises_in_place_of_it(log):
    logger, lines = log
    try:
        with last_word():
            raise ConfigError("the reason")
    except ConfigError:
        pass
    logger.error("Simulation raised an exception", exc_info=RuntimeError("An error was encountered."))
    logger.error("Exit Code: 700\nAn unhandled exception occurred.")
    assert lines[-1].endswith("\n\nthe reason")


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
