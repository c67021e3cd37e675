"""Distillation: scales, norms and biases of a quantized model learned from the unquantized one, end to end.

    student.py     the quantized model, one block in memory at a time: forward, and backward through all of it
    divergence.py  KL(unquantized ‖ quantized) over all tokens, some positions at a time, and its gradient
    descent.py     Adam over the changes; held-out windows decide the learning rate and when to stop
    memory.py      what that takes, before anything is spent
    stage.py       the step of a quantization: codes from the calibrated loop's store, results back into it

`descent.distill` knows neither where codes come from nor where they go: it takes functions that open `Learnable`s
(`rounding.learnable`) and returns their changes.
"""
