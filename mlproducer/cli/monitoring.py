"""``mlproducer monitoring export DIR``: write the dashboard and the alert rules.

A file that exists and differs may have been edited: then nothing is written, unless ``--force`` is
given. Each file appears whole or not at all, since Prometheus and Grafana may read
the directory meanwhile.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import secrets
import stat
from pathlib import Path

from mlproducer.cli.output import Console
from mlproducer.monitoring import ALERTS_FILE, DASHBOARD_FILE, files

HELP = "write the Grafana dashboard and the Prometheus alert rules"
DESCRIPTION = "The Grafana dashboard 'ML Producer Monitoring' and Prometheus alert rules."
LOG_LEVEL = logging.WARNING

READERS = {DASHBOARD_FILE: "grafana", ALERTS_FILE: "prometheus"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the one action and its arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    summary = "write the two files into a directory"
    export = actions.add_parser(
        "export",
        help=summary,
        description=f"Write {DASHBOARD_FILE} for Grafana and {ALERTS_FILE} for Prometheus. Files "
        "that exist and differ are kept, and the exit code is 1, unless --force is given.",
    )
    export.add_argument(
        "directory", metavar="DIR", type=_directory, help="where to write; created if missing"
    )
    export.add_argument("--force", action="store_true", help="overwrite files that differ")
    export.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="output for programs"
    )


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Write the files and print where they are.

    :raises OSError: a file exists and differs, or something cannot be read or written
    """
    texts = {arguments.directory / name: text for name, text in files().items()}
    results = {path: _compare(path, text) for path, text in texts.items()}
    edited = [path for path, result in results.items() if result == "replaced"]
    if edited and not arguments.force:
        why = "differs from what would be written; nothing was written (--force replaces it)"
        raise FileExistsError(errno.EEXIST, why, ", ".join(map(str, edited)))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        if results[path] != "unchanged":
            _write(path, text)
        console.detail(f"{results[path]:<9}  {path}")
    console.detail("Grafana: import the dashboard, and choose the data source at its top.")
    console.detail("Prometheus: name the rules below rule_files, and reload.")
    console.emit({"ok": True, "files": [_to_json(path, results[path]) for path in texts]})
    return True


def _directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty; '.' is the current directory")
    return Path(text)


def _compare(path: Path, text: str) -> str:
    """Return what writing a text to a path would do: "written", "unchanged" or "replaced".

    :raises OSError: the path is something else than a file, such as a symbolic link
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return "written"
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EEXIST, "exists and is not a regular file", path)
    with os.fdopen(descriptor, "rb") as there:
        return "unchanged" if there.read() == text.encode() else "replaced"


def _write(path: Path, text: str) -> None:
    """Write a temporary file and rename it to the path, with the old file's mode and owner.

    Other users may be able to write to the directory: with a name that cannot be guessed and must
    not exist yet, none of their files is written to.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(beside, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as new:
            new.write(text.encode())
            _copy_mode_and_owner(path, new.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _copy_mode_and_owner(path: Path, descriptor: int) -> None:
    try:
        old = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(old.st_mode):
        return
    made = os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        except PermissionError:
            raise PermissionError(
                errno.EPERM, "belongs to another user or group; nothing was written", path
            ) from None
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _to_json(path: Path, result: str) -> dict[str, str]:
    return {"path": str(path), "for": READERS[path.name], "result": result}
