"""Stage 4: weights rewritten so that they round better, while the float output of the model stays the same."""
