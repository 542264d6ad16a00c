"""Importing this puts an empty module in the place of torchaudio, which LLaMA-Factory imports even for text alone."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

stand_in = ModuleType("torchaudio")
stand_in.__spec__ = ModuleSpec("torchaudio", loader=None)
sys.modules["torchaudio"] = stand_in
