"""Speed measured in a real engine: `lowbit.bench`.

    result.py   `Bench`: tokens per second by context and batch, memory, and all that repeats it
    run.py      checks, starts the engine in a process of its own, collects
    child.py    that process: warm-up, repeated runs, the clock
    drivers.py  how each engine is started and asked: llama.cpp, transformers, vLLM, a server by URL

Nothing is imported here: the process of an engine must hold the engine and nothing else.
"""
