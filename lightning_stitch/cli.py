"""The command line: LightningCLI's fit, validate, test and predict, and `inspect`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_stitch._lightning import pl
from lightning_stitch.errors import StitchError
from lightning_stitch.graph import Cut
from lightning_stitch.segments import CalibrationSettings
from lightning_stitch.sources import Source, load_source

try:
    from jsonargparse import ArgumentParser
except ImportError as error:
    raise ImportError("The command line needs jsonargparse: pip install 'lightning-stitch[cli]'") from error

LightningCLI = __import__(f"{pl.__name__}.cli", fromlist=["LightningCLI"]).LightningCLI
