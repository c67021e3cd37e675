"""Texts for evaluation and calibration, cut into windows of tokens.

read_text + cut_windows   one running text in consecutive windows: evaluation
calibration_windows       any source, conversations and documents packed: calibration
mixed_windows             several sources in stated shares
stream_windows            the same for importance matrices, one running text as llama-imatrix cuts it
GivenText                 what is in memory: texts, datasets, token ids
"""

from lowbit.text.calibration import CalibrationWindows, calibration_windows, check_context, context_length
from lowbit.text.given import OF_MEMORY, GivenText
from lowbit.text.mixture import mixed_windows, parse_mixture, stream_text, stream_windows
from lowbit.text.windows import PROTOCOLS, PackagedText, Protocol, Text, Windows, cut_windows, read_text, wants_bos

__all__ = [
    "OF_MEMORY", "PROTOCOLS", "CalibrationWindows", "GivenText", "PackagedText", "Protocol", "Text", "Windows",
    "calibration_windows", "check_context", "context_length", "cut_windows", "mixed_windows", "parse_mixture",
    "read_text", "stream_text", "stream_windows", "wants_bos",
]  # fmt: skip
