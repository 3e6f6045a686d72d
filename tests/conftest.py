"""A failure is told when it happens, not only at the end: a run that is cut off has no end, and its log should say why all the same."""

import pytest


class ToldAtOnce:
    """Writes the report of what failed below the line of its test."""

    def __init__(self, terminal):
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._terminal.line("")
            self._terminal.section(
                f"{report.fspath} {report.head_line}, {report.when} ended after {report.duration:.0f} s", sep="-"
            )
            self._terminal.line(report.longreprtext)


@pytest.hookimpl(trylast=True)  # the terminal reporter comes with the same hook
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(ToldAtOnce(terminal), "told-at-once")
