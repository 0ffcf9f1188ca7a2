"""The command line of an export: classifies files and prints a line for each."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from fastflow import __version__
from fastflow.errors import FastflowError, VolumeError
from fastflow.readout import ARGMAX, READOUTS
from fastflow.runtime.export_folder import DOCUMENT
from fastflow.runtime.scorer import OnnxScorer, Prediction
from fastflow.runtime.sessions import PROVIDER_CHOICES

# Exit codes.
OK, FAILED, USAGE, FINISHED_WITH_ERRORS, INTERRUPTED = 0, 1, 2, 3, 130
COLUMNS = ("path", "status", "predicted", "posterior", "margin", "typicality", "error", "argmax", "scanner_p")
# The system follows no longer chains of links.
MAX_LINKS = 40
EXIT_CODES = (
    "Exit codes: 0 every file was classified, 3 some were not, 1 the run failed, "
    "2 wrong usage or a bad export."
)


def main(arguments: Sequence[str] | None = None, folder: Path | None = None) -> int:
    """Classify files, one line each.

    Args:
        arguments: those of the command line; of this process when None.
        folder: the export that a bundled program lies in; the command then takes ``--folder`` in place of
            FOLDER.

    Returns:
        The exit code: 0 every file was classified, 3 some were not, 1 the run failed, 2 wrong usage or a bad
        export.
    """
    options = _parser(folder).parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s")
    # File names that are no Unicode must not stop the run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        prior = None if options.prior is None else [float(part) for part in options.prior.split(",")]
        scorer = OnnxScorer(options.folder, options.providers, threads=options.threads)
        # A prior or an export that does not fit is told before any file is read.
        scorer.prior_or_own(prior)
        _ = scorer.export.own_preprocess
        scorer.readout(options.readout)
        scorer.check_reject_below(options.reject_below)
        precision, providers = scorer.export.precision, ", ".join(scorer.providers)
        print(f"{options.folder}: {precision}, runs on {providers}", file=sys.stderr)
        return _classify_files(scorer, options, prior)
    except KeyboardInterrupt:
        return _print_error("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads on (`| head`); the interpreter would complain while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (FastflowError, ValueError) as error:
        return _print_error(str(error), USAGE)
    except (OSError, MemoryError, RuntimeError) as error:
        return _print_error(str(error) or type(error).__name__, FAILED)


def own_folder(program: str | PathLike[str]) -> Path:
    """The export that a program lies in.

    Stores of content keep the files of a folder elsewhere, and links in the folder. So the folder in which
    the program is named comes before those that its links lead to, one after the other.

    Args:
        program: the program as it was called.

    Returns:
        The first of these folders that holds an export; the first of all where none does.
    """
    path = Path(os.path.abspath(program))
    places = [path.parent]
    while path.is_symlink() and len(places) < MAX_LINKS:
        path = path.parent / path.readlink()
        places.append(path.parent.resolve())
    places.append(Path(program).resolve().parent)
    return next((place for place in places if (place / DOCUMENT).is_file()), places[0])


def _parser(folder: Path | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastflow.export.runtime" if folder is None else "python runtime.pyz",
        description=f"Classify scans with an ONNX export. Prints a line per file: {', '.join(COLUMNS)}.",
        epilog=EXIT_CODES,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"fastflow {__version__}")
    if folder is None:
        add("folder", type=Path, metavar="FOLDER", help="the export")
    else:
        own = "the export; by default where this program lies"
        add("--folder", type=Path, default=folder, help=own)
    volumes = ".nii, .nii.gz, .mgz or .mgh volumes; PNG slices with Pillow"
    add("files", nargs="+", metavar="FILES", help=volumes)
    where = "where it runs; auto takes CUDA if it works"
    add("--providers", choices=PROVIDER_CHOICES, default="auto", help=where)
    add("--threads", type=int, help="of an operator on the CPU; the physical cores by default")
    add("--prior", help="probabilities of the labels in the export's order, e.g. 0.5,0.3,0.2")
    by = "how log-likelihoods become a label: the largest, or the model's read-out of all"
    add("--readout", choices=READOUTS, default=ARGMAX, help=by)
    limit = "flag files unknown_scanner whose scanner_p is below, e.g. 0.05; by default none are"
    add("--reject-below", type=float, metavar="P", help=limit)
    add("--json", action="store_true", help="JSON lines, with all probabilities and log-likelihoods")
    return parser


def _print_error(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _classify_files(scorer: OnnxScorer, options: argparse.Namespace, prior: ArrayLike | None) -> int:
    code = OK
    if not options.json:
        print("\t".join(COLUMNS), flush=True)
    for file in options.files:
        result: Prediction | VolumeError
        try:
            result = scorer.classify_volume(file, prior, options.readout, options.reject_below)
        except VolumeError as error:
            result, code = error, FINISHED_WITH_ERRORS
        # Each line is flushed, because its reader may be waiting for it.
        print(json_line(result, scorer.class_names) if options.json else text_line(result), flush=True)
    return code


def _row(result: Prediction | VolumeError) -> dict[str, Any]:
    if isinstance(result, VolumeError):
        return {"path": result.path, "status": "error", "error": f"{result.code}: {result.message}"}
    doubts = "; ".join(f"{code}: {message}" for code, message in result.flags)
    return {
        "path": result.path,
        "status": "flagged" if result.flags else "ok",
        "predicted": result.label,
        "argmax": result.argmax,
        "posterior": float(result.posterior.max()),
        "margin": result.margin,
        "typicality": result.typicality,
        "scanner_p": result.scanner_p,
        "error": doubts or None,
    }


def text_line(result: Prediction | VolumeError) -> str:
    """Columns between tabs, empty where nothing is known; the posterior is that of the predicted label."""
    row = _row(result)
    cells = (row.get(column) for column in COLUMNS)
    text = ("" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)
    # Without the escape, a name with a line break would make two lines.
    return "\t".join(
        cell.encode("unicode_escape").decode("ascii") if not cell.isprintable() else cell for cell in text
    )


def json_line(result: Prediction | VolumeError, names: Sequence[str]) -> str:
    """An object with the columns; posterior and log_probs by label, numbers that are not finite as null."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"log_probs": None} | _row(result)
    if isinstance(result, Prediction):
        row["posterior"] = dict(zip(names, result.posterior.tolist(), strict=True))
        row["log_probs"] = dict(zip(names, result.log_probs.tolist(), strict=True))
        row["margin"] = result.margin if math.isfinite(result.margin) else None
    return json.dumps(row, allow_nan=False)
