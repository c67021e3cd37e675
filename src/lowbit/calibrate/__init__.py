"""Stage 3: what calibration text makes of a model's activations."""

from lowbit.calibrate.input_ranges import measure_input_ranges

__all__ = ["measure_input_ranges"]
