"""Checks a folder of images, and what is cached: `python -m pipelines.check_data FOLDER`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("check-data")

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from pipelines.command import announce, run_command
from pipelines.command_configs import CheckDataConfig
from pipelines.data.cache import verify_cache
from pipelines.data.decoding import UnreadableImageError
from pipelines.data.folder import decode_files
from pipelines.data.folder_listing import (
    arrange,
    check_found,
    check_usable,
    doubts,
)
from pipelines.data.folder_scan import printable, scan_folder
from pipelines.data.sixteen_bits import ValueRanges
from pipelines.options import parse_options
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file

MOST_SHOWN = 20

Treatment = Literal["used", "converted", "skipped", "refused"]


class Problem(NamedTuple):
    """A file that is not simply used, or a link that leads out of the folder."""

    file: str
    """Path below the folder."""
    treatment: Treatment
    reason: str


class Report(NamedTuple):
    """What training would do with the files of a folder."""

    num_files: dict[Treatment, int]
    """By what becomes of them."""
    class_names: tuple[str, ...]
    problems: list[Problem]
    """Sorted by file."""
    conversions: dict[str, int]
    """Files by what is done to them; of one file, several things may be done."""
    warnings: tuple[str, ...]
    """What is perhaps not meant to be."""
    obstacle: str
    """Why training would stop at this folder; empty where it would start."""


def check_data(config: CheckDataConfig) -> Report:
    """Reads all files, with the functions that training reads them with; writes nothing.

    Raises:
        InputError: there is no such folder.
    """
    if config.folder is None:
        raise InputError("folder must be given, unless --verify is")
    if not config.folder.is_dir():
        raise InputError(f"folder: there is no folder {printable(config.folder)}")
    scan = scan_folder(config.folder, config.follow_links)
    refusal: Treatment = "skipped" if config.skip_unreadable else "refused"
    problems = [Problem(name, "skipped", reason) for name, reason in scan.left_out]
    problems += [Problem(name, refusal, reason) for name, reason in scan.refused]
    conversions: Counter[str] = Counter()
    values = ValueRanges()
    usable: list[str] = []
    names = iter(scan.images)
    conversion = (config.image_size, config.channels, config.white_value)
    for results in decode_files(config.folder, scan.images, *conversion):
        for result, name in zip(results, names, strict=False):
            if isinstance(result, UnreadableImageError):
                problems.append(Problem(name, refusal, f"is not a readable image: {result}"))
                continue
            usable.append(name)
            values.add(result.value_range)
            if result.changes:
                problems.append(Problem(name, "converted", "; ".join(result.changes)))
                conversions.update(change.split(" (")[0] for change in result.changes)
    num_files: dict[Treatment, int] = {
        treatment: sum(problem.treatment == treatment for problem in problems)
        for treatment in ("used", "converted", "skipped", "refused")
    }
    num_files["used"] = len(usable) - num_files["converted"]
    # The links that are followed are listed beside what becomes of the files themselves.
    problems += [Problem(name, "used", reason) for name, reason in scan.followed]
    class_names: tuple[str, ...] = ()
    warnings: list[str] = [values.describe()] if values.num_files else []
    obstacle = ""
    try:
        check_found(config.folder, scan, "folder")
        listing = arrange(config.folder, scan.images, "folder")
        class_names = listing.class_names
        warnings += doubts(scan, listing)
        check_usable(listing, usable)
    except InputError as error:
        obstacle = str(error)
    first = min((each for each in problems if each.treatment == "refused"), default=None)
    if first is not None:
        obstacle = f"{printable(config.folder / first.file)} {first.reason}"
    return Report(
        num_files, class_names, sorted(problems), dict(conversions), tuple(warnings), obstacle
    )


def describe(report: Report) -> str:
    """The summary for people: counts, and the first files with a problem."""
    lines = [f"{count:8} {treatment}" for treatment, count in report.num_files.items()]
    lines.append(f"{len(report.class_names):8} classes")
    lines += [f"{count:8} converted: {what}" for what, count in report.conversions.items()]
    lines += [f"note: {warning}" for warning in report.warnings]
    # What stops the training first, what is left out as it is meant to be last.
    order = ("refused", "converted", "used", "skipped")
    shown = sorted(report.problems, key=lambda problem: order.index(problem.treatment))
    lines += [
        f"{treatment:>10}  {printable(file)} {reason}"
        for file, treatment, reason in shown[:MOST_SHOWN]
    ]
    if len(shown) > MOST_SHOWN:
        lines.append(f"            and {len(shown) - MOST_SHOWN} more in the report")
    return "\n".join(lines)


def write_report(report: Report, config: CheckDataConfig) -> None:
    """Writes the whole report as JSON."""
    content = {
        "folder": str(config.folder),
        "image_size": config.image_size,
        "channels": config.channels,
        "white_value": config.white_value,
        "skip_unreadable": config.skip_unreadable,
        "follow_links": config.follow_links,
        **report._asdict(),
        "problems": [problem._asdict() for problem in report.problems],
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    # ASCII: a name that is not UTF-8 could not be written otherwise.
    text = json.dumps(content, indent=1) + "\n"
    replace_file(config.output, functools.partial(Path.write_text, data=text))


def _run() -> None:
    config = parse_options(CheckDataConfig, "pipelines.check_data")
    obstacles = []
    if config.folder is not None or not config.verify:
        report = check_data(config)
        write_report(report, config)
        announce(describe(report))
        announce(f"the report is in {config.output}")
        obstacles += [f"training would stop: {report.obstacle}"] if report.obstacle else []
    if config.verify:
        for entry, damage in verify_cache(config.cache_dir):
            announce(f"{'damaged' if damage else 'whole':>10}  {printable(entry)}")
            obstacles += [damage] if damage else []
    if obstacles:
        raise InputError("; ".join(obstacles))


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()
