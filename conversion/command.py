"""What the scripts here share: the remarks, the dry run, the bar, and errors as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemotron_h.checkpoints import formats
from nemotron_h.checkpoints.writing import Conversion, convert


def arguments(
    doc: str | None, source: str, dest: str = "the folder to write; must not be there"
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("dest", type=Path, help=dest)
    parser.add_argument(
        "--dry-run", action="store_true", help="list every tensor and what it is made of; write nothing"
    )
    return parser


def there_or_back(given: argparse.Namespace, to: str, **options: Any) -> Conversion:
    """From a published folder into the format `to`; what is no such folder becomes one."""
    published = formats.detect(given.source) == formats.HUGGINGFACE
    return formats.conversion(given.source, to if published else formats.HUGGINGFACE, **options)


def run(given: argparse.Namespace, make: Callable[[], Conversion]) -> None:
    try:
        conversion = make()
        for remark in conversion.remarks:
            print(remark)
        if given.dry_run:
            print(*conversion.plan.lines(), sep="\n")
            conversion.plan.check()
            return
        with tqdm(total=conversion.plan.nbytes, unit="B", unit_scale=True) as bar:
            convert(conversion, given.dest, bar.update)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
