"""Calibrated quantization, block by block: measure, transform, round, keep, go on with what the rounded block makes.

store.py     what has been decided for each finished block, durable on disk
rounders.py  one linear: weight + statistics + target → codes, by method
passes.py    two streams of hidden states through one block, stage by stage
run.py       the loop
overlay.py   a checkpoint as it looks with what was decided in place
"""
