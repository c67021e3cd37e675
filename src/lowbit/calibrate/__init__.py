"""Stage 5: run a text through the model, block by block, and round the weights by the statistics of their inputs.

task.py           what a run works on
loop.py           text, memory, the loop over blocks, and its result
one_block.py      one block by the method: measure, transform, round, store
linear.py         one linear: weight + statistics + target → codes
passes.py         two streams of hidden states through one block, stage by stage
stages.py         the order in which a block computes, and the outputs kept of its parts
statistics.py     Hessians and the other statistics of the inputs
blocks.py         forward passes with one block in memory at a time
block_modules.py  the modules whose inputs are observed
store.py          codes and results of each finished block, on disk
tensors.py        the stored tensors of a block, and a checkpoint with some tensors replaced
memory.py         memory of a run
summary.py        inputs on the calibration text, small enough for a report
self_text.py      text that the model writes itself
input_ranges.py   ranges of the inputs of linears, for static scales; range_choice.py: by percentile or squared error
kv_cache.py       ranges of keys and values
"""
