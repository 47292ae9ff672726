"""The command line and what a script says: flags, lines, progress bars. --quiet and --verbose mean
the same in every script."""

import argparse
import difflib
import os
import sys
from typing import Any, NoReturn

from tqdm import tqdm

BAR_DELAY = 2  # seconds; what is done sooner needs no bar
LOG_INTERVAL = 60  # seconds between two lines of a bar that goes to a file

_loudness = {"quiet": False, "verbose": False}
_said: set[str] = set()  # kinds of lines that are not said again


def set_loudness(quiet: bool, verbose: bool) -> None:
    """What say, detail and bar show from now on."""
    _loudness.update(quiet=quiet, verbose=verbose)


def is_verbose() -> bool:
    return _loudness["verbose"]


def say(text: str) -> None:
    """A line on stdout, above the bars."""
    if _loudness["quiet"]:
        return
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)


def say_first(kind: str, text: str) -> None:
    """The first line of a kind; the others say the same of other files."""
    if kind not in _said:
        _said.add(kind)
        say(text)


def detail(text: str) -> None:
    """A line that few want."""
    if _loudness["verbose"]:
        say(text)


class LogLines(tqdm):
    """A bar that goes to a file: a line now and then, not one that is drawn over."""

    monitor_interval = 0  # no thread that says the same line again: each step looks at the time

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
            print(self, file=sys.stderr, flush=True)
        return True


def bar(items: Any = None, **options: Any) -> Any:
    """tqdm with an ETA on stderr: on a terminal after BAR_DELAY, in a log file a line every
    LOG_INTERVAL; never with --quiet, and of several ranks' only the first's."""
    hidden = _loudness["quiet"] or os.environ.get("RANK", "0") != "0"
    options = {"disable": hidden, **options}
    if sys.stderr.isatty():
        return tqdm(items, delay=BAR_DELAY, mininterval=0.2, dynamic_ncols=True, **options)
    options |= {"leave": False, "delay": LOG_INTERVAL, "mininterval": LOG_INTERVAL, "miniters": 1}
    return LogLines(items, **options)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown where the help does not tell them; descriptions keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default in ("", [])
        if nothing or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class CliParser(argparse.ArgumentParser):
    """argparse with dashes and underscores alike in flags, defaults in --help, one-line errors."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("usage", "%(prog)s [flags]")  # help begins with commands, not with flags
        super().__init__(allow_abbrev=False, **kwargs)
        group = self.add_argument_group("on the terminal").add_mutually_exclusive_group()
        group.add_argument("--quiet", action="store_true", help="tables asked for and errors alone")
        group.add_argument("--verbose", action="store_true", help="settings, tracebacks too")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        known = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
        for index, argument in enumerate(args):
            if argument == "--":  # all that follows is positional
                break
            if argument.startswith("--"):
                name, equals, value = argument.partition("=")
                args[index] = known.get(name.replace("-", "_"), name) + equals + value
        found, rest = super().parse_known_args(args, namespace)
        set_loudness(found.__dict__.pop("quiet", False), found.__dict__.pop("verbose", False))
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self._flags_meant(message)}see {self.prog} --help)\n")

    def _flags_meant(self, message: str) -> str:
        """Known flags that are close to unknown ones, as the beginning of a hint."""
        if not message.startswith("unrecognized arguments"):
            return ""
        known, meant = self._option_string_actions, []
        for word in message.split():
            if word.startswith("--"):
                meant += difflib.get_close_matches(word.partition("=")[0], known, n=1)
        return f"did you mean {' and '.join(dict.fromkeys(meant))}? " if meant else ""
