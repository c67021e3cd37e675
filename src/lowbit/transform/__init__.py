"""Stage 4: weights rewritten so that they round better, while the float output of the model stays the same.

A transform is a row in `lowbit.methods.TRANSFORMS` and a function

    apply(block: BlockTensors, facts: ModelFacts, fake_quantize: FakeQuantize, options) → list[TransformNote]

`facts` is made once per model (`lowbit.transform.facts.model_facts`); `options` is the dataclass of the transform's
module, None for its defaults. Transforms change `block.tensors` and `block.stats` together, so that what follows
(another transform, GPTQ) sees the statistics of the rewritten model.
"""
