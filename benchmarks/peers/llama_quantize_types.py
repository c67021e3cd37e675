"""Which ggml type the real llama-quantize gives every tensor, for tests/export/test_gguf_mix.py.

Writes a GGUF of zeros for each of the models below (real tensor names, tiny or awkward shapes; sparse files, so nothing
is really stored), runs `llama-quantize --dry-run` for every file type, with and without an importance matrix, with
`--pure`, and for a few models with types asked for, and records what it prints.

    python benchmarks/peers/llama_quantize_types.py LLAMA_QUANTIZE tests/data/gguf_mix/llama_quantize.json

LLAMA_QUANTIZE is the executable. The recorded file is of the llama.cpp that llama-cpp-python 0.3.36 ships in its sdist,
under vendor/llama.cpp (cmake -B build -DBUILD_SHARED_LIBS=OFF; cmake --build build --target llama-quantize).

The file:

    file_types   the names asked for
    variants     name → the options of llama-quantize
    rows         run-length coded types over the layers, "Q6_K*2 Q4_K*6"
    models       name → {facts, tensors, types}
                   tensors   [name with {} for the layer, shape in torch order, first layer, layer after the last]
                   types     variant → file type → for each of `tensors` an index into `rows`, then 1 where
                             llama-quantize warns that it needs an importance matrix; or the name of the variant that
                             is equal
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FILE_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4_MOE"),
    *("Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
VARIANTS = {
    "plain": [],
    "imatrix": ["--imatrix", "IMATRIX"],
    "pure": ["--pure"],
    "overrides": ["--tensor-type", r"blk\.[0-2]\.(attn_v|ffn_down)=q8_0", "--tensor-type", "attn_v|embd=q5_0"],
    "output": ["--output-tensor-type", "q5_1"],
    "both ends": ["--output-tensor-type", "q5_1", "--token-embedding-type", "iq4_nl"],
}
FOR_ALL = ("plain", "imatrix", "pure")
EVERY_VARIANT = ("llama tied", "llama grouped", "mixtral", "gemma3n", "falcon")  # the others have FOR_ALL
VOCAB = 64
OUTPUT = ("output.weight", "vocab", "hidden")
EMBEDDING = ("token_embd.weight", "vocab", "hidden")
NORM = ("output_norm.weight", "hidden")
SPLIT_ATTENTION = [
    ("blk.{}.attn_norm.weight", "hidden"),
    ("blk.{}.attn_q.weight", "hidden", "hidden"),
    ("blk.{}.attn_k.weight", "kv", "hidden"),
    ("blk.{}.attn_v.weight", "kv", "hidden"),
    ("blk.{}.attn_output.weight", "hidden", "hidden"),
]
BIASED = [("blk.{}.attn_q.bias", "hidden"), ("blk.{}.attn_k.bias", "kv"), ("blk.{}.attn_v.bias", "kv")]
HEAD_NORMS = [("blk.{}.attn_q_norm.weight", "head"), ("blk.{}.attn_k_norm.weight", "head")]
POST_NORMS = [("blk.{}.post_attention_norm.weight", "hidden"), ("blk.{}.post_ffw_norm.weight", "hidden")]
GATED = [
    ("blk.{}.ffn_norm.weight", "hidden"),
    ("blk.{}.ffn_gate.weight", "ffn", "hidden"),
    ("blk.{}.ffn_up.weight", "ffn", "hidden"),
    ("blk.{}.ffn_down.weight", "hidden", "ffn"),
]
UNGATED = [GATED[0], GATED[2], ("blk.{}.ffn_up.bias", "ffn"), GATED[3], ("blk.{}.ffn_down.bias", "hidden")]
EXPERTS = [
    ("blk.{}.ffn_norm.weight", "hidden"),
    ("blk.{}.ffn_gate_inp.weight", "experts", "hidden"),
    ("blk.{}.ffn_gate_exps.weight", "experts", "ffn", "hidden"),
    ("blk.{}.ffn_up_exps.weight", "experts", "ffn", "hidden"),
    ("blk.{}.ffn_down_exps.weight", "experts", "hidden", "ffn"),
]
SHARED_EXPERT = [
    ("blk.{}.ffn_gate_inp_shexp.weight", "hidden"),
    ("blk.{}.ffn_gate_shexp.weight", "ffn", "hidden"),
    ("blk.{}.ffn_up_shexp.weight", "ffn", "hidden"),
    ("blk.{}.ffn_down_shexp.weight", "hidden", "ffn"),
]
FUSED_ATTENTION = [
    ("blk.{}.attn_norm.weight", "hidden"),
    ("blk.{}.attn_qkv.weight", "qkv", "hidden"),
    ("blk.{}.attn_output.weight", "hidden", "hidden"),
]
LATENT_ATTENTION = [
    ("blk.{}.attn_norm.weight", "hidden"),
    ("blk.{}.attn_q.weight", "hidden", "hidden"),
    ("blk.{}.attn_kv_a_mqa.weight", "kv", "hidden"),
    ("blk.{}.attn_kv_a_norm.weight", "kv"),
    ("blk.{}.attn_k_b.weight", "heads", "kv", "head"),
    ("blk.{}.attn_v_b.weight", "heads", "head", "kv"),
    ("blk.{}.attn_output.weight", "hidden", "hidden"),
]
OLD_LATENT = [*LATENT_ATTENTION[:4], ("blk.{}.attn_kv_b.weight", "hidden", "kv"), LATENT_ATTENTION[6]]
STATE_SPACE = [
    ("blk.{}.attn_norm.weight", "hidden"),
    ("blk.{}.ssm_in.weight", "ffn", "hidden"),
    ("blk.{}.ssm_conv1d.weight", "hidden", "4"),
    ("blk.{}.ssm_x.weight", "kv", "hidden"),
    ("blk.{}.ssm_dt.weight", "hidden", "kv"),
    ("blk.{}.ssm_a", "hidden", "16"),
    ("blk.{}.ssm_out.weight", "hidden", "hidden"),
]
UNTIED = [EMBEDDING, NORM, OUTPUT]
TIED = [EMBEDDING, NORM]
POSITIONS = ("position_embd.weight", "128", "hidden")
MATFORMER = [
    ("per_layer_token_embd.weight", "vocab", "ffn"),
    ("per_layer_model_proj.weight", "ffn", "hidden"),
    ("altup_proj.weight", "2", "hidden", "hidden"),
    ("blk.{}.altup_router.weight", "4", "hidden"),
    ("blk.{}.laurel_l.weight", "32", "hidden"),
    ("blk.{}.inp_gate.weight", "hidden", "hidden"),
]
INDEXED = [("blk.{}.indexer.k_proj.weight", "32", "hidden"), ("blk.{}.attn_rel_b.weight", "32", "hidden")]
RWKV = ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused")
UNUSUAL = [  # names that are never quantized, and some that only look like it
    *[(f"blk.{{}}.time_mix_{part}.weight", "32", "hidden") for part in (*RWKV, "key", "output")],
    *[(name, "64", "hidden") for name in (
        "position_embd.weight", "token_types.weight", "v.position_embd.weight", "sam.pos_embd.weight",
        "sam.neck.0.weight", "sam.net_2.weight", "v.rel_pos.weight", "v.patch_embd.weight", "v.patch_merger.weight",
        "a.rvq.codebook.0.weight", "mm.a.code_embd.weight", "mm.0.weight", "v.blk.0.attn_q.weight",
        "v.blk.0.attn_v.weight", "a.position_embd.weight", "cls.weight", "cls_matrix",
    )],
    ("blk.{}.ssm_norm.weight", "8", "hidden"),
    ("blk.{}.shortconv.conv.weight", "hidden", "4"),
    ("blk.{}.shortconv.in_proj.weight", "hidden", "hidden"),
    ("blk.{}.indexer.q_proj.weight", "32", "hidden"),
    ("blk.{}.ffn_gate_tid2eid.weight", "32", "hidden"),
    *[(f"blk.{{}}.{name}.weight", "32", "hidden") for name in (
        "hc_attn_base", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a", "ssm_f_b", "ssm_g_a", "ssm_g_b", "ssm_beta",
    )],
]  # fmt: skip
HYBRID = [
    ("blk.{}.attn_q_a.weight", "hidden", "hidden"),
    ("blk.{}.attn_q_b.weight", "hidden", "hidden"),
    ("blk.{}.nextn.eh_proj.weight", "hidden", "ffn"),
    *LATENT_ATTENTION,
]
LONE_ROW = [("blk.{}.probe.weight", "1", "hidden"), ("blk.{}.probe_exps.weight", "2", "1", "hidden")]


def model(arch: str, layers: int, tensors: list[tuple[str, ...]], hidden: int = 256, ffn: int = 512, heads: int = 8,
          kv_heads: int = 8, experts: int = 0, head: int | None = None, dense: int = 0) -> dict[str, Any]:  # fmt: skip
    """One model: what its header says, and its tensors. `dense`: that many leading layers have GATED, not EXPERTS."""
    head = head or hidden // heads
    sizes = {"hidden": hidden, "ffn": ffn, "vocab": VOCAB, "kv": kv_heads * head, "head": head, "experts": experts,
             "heads": heads, "qkv": hidden + 2 * kv_heads * head}  # fmt: skip
    rows = []
    for name, *dims in tensors:
        first = dense if any(name == row[0] for row in EXPERTS[1:] + SHARED_EXPERT) else 0
        end = dense if dense and any(name == row[0] for row in GATED[1:]) else layers
        rows.append([name, [sizes.get(dim) or int(dim) for dim in dims], first, end if "{}" in name else 1])
    facts = {"arch": arch, "layers": layers, "experts": experts, "heads": heads, "kv_heads": kv_heads}
    return {"facts": facts, "hidden": hidden, "ffn": ffn, "head": head, "tensors": rows}


LLAMA = [*SPLIT_ATTENTION, *GATED]
MODELS = {
    "llama tied": model("llama", 10, [*TIED, *LLAMA]),
    "llama grouped": model("llama", 16, [*UNTIED, *LLAMA], kv_heads=2, ffn=768),
    "llama 576": model("llama", 12, [*TIED, *LLAMA], hidden=576, ffn=1536, heads=9, kv_heads=3),
    "llama 48": model("llama", 9, [*UNTIED, *LLAMA], hidden=48, ffn=96, heads=3, kv_heads=3),
    "llama 70B": model("llama", 80, [*UNTIED, *LLAMA], kv_heads=1),
    "llama 65B": model("llama", 80, [*UNTIED, *LLAMA]),
    "mixtral": model("llama", 20, [*UNTIED, *SPLIT_ATTENTION, *EXPERTS], kv_heads=2, experts=8),
    "mixtral ungrouped": model("llama", 80, [*TIED, *SPLIT_ATTENTION, *EXPERTS], kv_heads=4, experts=8, ffn=288),
    "four experts": model("llama", 7, [*UNTIED, *SPLIT_ATTENTION, *EXPERTS], experts=4),
    "two experts": model("llama", 7, [*UNTIED, *SPLIT_ATTENTION, *EXPERTS], experts=2),
    "qwen2": model("qwen2", 24, [*TIED, *LLAMA, *BIASED], hidden=896, ffn=1216, heads=14, kv_heads=2),
    "qwen2 72B": model("qwen2", 80, [*UNTIED, *LLAMA, *BIASED]),
    "qwen2moe": model("qwen2moe", 24, [*UNTIED, *SPLIT_ATTENTION, *EXPERTS, *SHARED_EXPERT], experts=60),
    "qwen3": model("qwen3", 28, [*TIED, *LLAMA, *HEAD_NORMS], kv_heads=4),
    "qwen3moe": model("qwen3moe", 14, [*UNTIED, *SPLIT_ATTENTION, *HEAD_NORMS, *EXPERTS], kv_heads=1, experts=16),
    "gemma2": model("gemma2", 26, [*TIED, *LLAMA, *POST_NORMS], kv_heads=4),
    "gemma3": model("gemma3", 26, [*TIED, *LLAMA, *HEAD_NORMS, *POST_NORMS], 1152, 6912, heads=4, kv_heads=1),
    "gemma3n": model("gemma3n", 10, [*TIED, *LLAMA, *MATFORMER]),
    "phi3": model("phi3", 32, [*UNTIED, *FUSED_ATTENTION, *UNGATED]),
    "gpt2": model("gpt2", 12, [*TIED, POSITIONS, *FUSED_ATTENTION, *UNGATED], 768, 3072),
    "gptneox": model("gptneox", 16, [*UNTIED, *FUSED_ATTENTION, *UNGATED]),
    "falcon": model("falcon", 32, [*UNTIED, *FUSED_ATTENTION, *UNGATED], kv_heads=1),
    "falcon tied": model("falcon", 17, [*TIED, *FUSED_ATTENTION, *UNGATED], kv_heads=8),
    "olmo 70B": model("olmo", 80, [*UNTIED, *SPLIT_ATTENTION, *GATED]),
    "deci 70B": model("deci", 80, [*UNTIED, SPLIT_ATTENTION[3]]),
    "jais2 70B": model("jais2", 68, [*UNTIED, SPLIT_ATTENTION[3]]),
    "llama-embed 70B": model("llama-embed", 80, [*UNTIED, SPLIT_ATTENTION[3]], kv_heads=4),
    "olmo2": model("olmo2", 16, [*UNTIED, *LLAMA, *HEAD_NORMS, *POST_NORMS]),
    "smollm3": model("smollm3", 36, [*TIED, *LLAMA], kv_heads=2),
    "granite": model("granite", 40, [*TIED, *LLAMA], kv_heads=2),
    "gpt-oss": model("gpt-oss", 24, [*UNTIED, *SPLIT_ATTENTION, *BIASED, *EXPERTS], 2880, 2880, 64, 8, experts=4),
    "deepseek2": model("deepseek2", 27, [*UNTIED, *LATENT_ATTENTION, *GATED, *EXPERTS[1:], *SHARED_EXPERT[1:]],
                       experts=6, dense=1),
    "deepseek2 old": model("deepseek2", 27, [*UNTIED, *OLD_LATENT, *GATED, *EXPERTS[1:]], experts=6, dense=3),
    "mamba": model("mamba", 12, [*TIED, *STATE_SPACE]),
    "odd tensors": model("llama", 8, [*UNTIED, *LLAMA, *INDEXED, *LONE_ROW, *UNUSUAL, LATENT_ATTENTION[2],
                                     ("v.blk.0.ffn_down.weight", "64", "hidden")]),
    "glm5-next": model("glm5-next", 6, [*UNTIED, *HYBRID, *EXPERTS, *SHARED_EXPERT[1:], *UNUSUAL], experts=4),
    "bailingmoe3": model("bailingmoe3", 6, [*UNTIED, *HYBRID, *EXPERTS, *SHARED_EXPERT[1:]], experts=4),
}  # fmt: skip


def tensor_names(tensors: list[list[Any]]) -> list[tuple[str, list[int]]]:
    """(name, shape) of every tensor, the layers written out."""
    return [(name.format(layer), shape) for name, shape, first, end in tensors for layer in range(first, end)]


def write_model(path: Path, spec: dict[str, Any]) -> None:
    """A GGUF with the header of `spec` and zeros for weights, float32, as a sparse file."""
    facts = spec["facts"]
    arch = facts["arch"]
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "context_length": 512, "embedding_length": spec["hidden"], "block_count": facts["layers"],
        "feed_forward_length": spec["ffn"], "attention.head_count": facts["heads"],
        "attention.head_count_kv": facts["kv_heads"], "attention.key_length": spec["head"],
        "attention.value_length": spec["head"], "expert_count": facts["experts"],
        "expert_used_count": min(2, facts["experts"]), "vocab_size": VOCAB, "attention.sliding_window": 64,
        "expert_feed_forward_length": spec["ffn"], "expert_shared_feed_forward_length": spec["ffn"],
        "attention.kv_lora_rank": 64, "attention.q_lora_rank": 64, "leading_dense_block_count": 1,
        "expert_shared_count": 1, "expert_gating_func": 1, "ssm.conv_kernel": 4, "ssm.inner_size": 256,
        "ssm.state_size": 16, "ssm.time_step_rank": 16, "rope.dimension_count": spec["head"],
        "altup.num_inputs": 4, "altup.active_idx": 0, "embedding_length_per_layer_input": 64,
        "attention.shared_kv_layers": 2, "attention.key_length_mla": 32, "attention.value_length_mla": 32,
        "kda.head_dim": 32, "attention.indexer.head_count": 2, "attention.indexer.key_length": 32,
        "attention.indexer.top_k": 8, "attention.indexer.kpool": 2, "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 2,
    }  # fmt: skip
    floats = {
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 1.0,
        "residual_scale": 1.0, "embedding_scale": 1.0, "attention.scale": 1.0, "expert_weights_scale": 1.0,
        "attention.clamp_kqv": 8.0, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        "rope.scaling.attn_factor": 1.0, "kda.gate_lower_bound": -5.0, "hyper_connection.epsilon": 1e-6,
        "swiglu_clamp_exp": 0.0, "swiglu_clamp_shexp": 0.0,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for key, value in floats.items():
        writer.add_float32(f"{arch}.{key}", value)
    writer.add_bool(f"{arch}.use_parallel_residual", True)
    size = 0
    for name, shape in tensor_names(spec["tensors"]):
        length = int(np.prod(shape)) * 4
        writer.add_tensor_info(name, shape, np.dtype(np.float32), length)
        size += -(-length // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(start + size)


def write_imatrix(path: Path) -> None:
    """An importance matrix of one tensor: all that the choice of types looks at is whether there is one."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), (?:.*\((\w+)\))?", re.M)


def ask(executable: Path, options: list[str], path: Path, file_type: str) -> tuple[dict[str, str], bool]:
    """Type of every tensor as printed, and whether an importance matrix would be needed."""
    command = [str(executable), "--dry-run", *options, str(path), file_type, "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    text = done.stdout + done.stderr
    types = {name: (new or old).upper() for name, old, new in LINE.findall(text)}
    return types, "will require an imatrix" in text


def run_lengths(types: list[str]) -> str:
    runs = [(kind, len(list(group))) for kind, group in itertools.groupby(types)]
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def record(executable: Path) -> dict[str, Any]:
    rows: dict[str, int] = {}
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        imatrix = Path(folder) / "imatrix.gguf"
        write_imatrix(imatrix)
        for title, spec in MODELS.items():
            path = Path(folder) / "model.gguf"
            write_model(path, spec)
            types: dict[str, Any] = {}
            for variant in VARIANTS if title in EVERY_VARIANT else FOR_ALL:
                types[variant] = {}
                for file_type in FILE_TYPES:
                    given = [str(imatrix) if option == "IMATRIX" else option for option in VARIANTS[variant]]
                    found, needs = ask(executable, given, path, file_type)
                    entry = []
                    for name, _, first, end in spec["tensors"]:
                        row = run_lengths([found[name.format(layer)] for layer in range(first, end)])
                        entry.append(rows.setdefault(row, len(rows)))
                    same = next((v for v in types if types[v].get(file_type) == [*entry, int(needs)]), None)
                    types[variant][file_type] = same or [*entry, int(needs)]
            models[title] = {"facts": spec["facts"], "tensors": spec["tensors"], "types": types}
            print(title, flush=True)
    return {"file_types": FILE_TYPES, "variants": VARIANTS, "rows": list(rows), "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executable", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    text = json.dumps(record(given.executable), separators=(",", ":"))
    text = re.sub(r'("\w[^"]*":\{"facts")', r"\n\1", text)  # a line per model, so that a change can be read
    given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
