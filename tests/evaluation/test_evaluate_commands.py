import json

import pytest
import typer
from tiny_models import save_model
from typer.testing import CliRunner

from lowbit.cli.evaluate import evaluate
from lowbit.cli.generate import generate
from lowbit.cli.options import with_groups
from lowbit.cli.plain import plain
from lowbit.errors import UsageError

app = typer.Typer()
app.command()(with_groups(evaluate))
app.command()(with_groups(generate))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path, "qwen2")
    return path


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_evaluate_prints_the_table_and_a_sentence(folder, text_file):
    result = run("evaluate", folder, "--reference", folder, "--text", text_file, "--windows", 2, "--window-tokens", 16)
    assert "mean KLD (nats)" in result.stdout
    assert "perplexity is unchanged" in result.stdout


def test_evaluate_json_is_json_alone_on_stdout(folder, text_file):
    result = run("evaluate", folder, "--text", text_file, "--windows", 999, "--window-tokens", 100, "--bos", "--json")
    [row] = json.loads(result.stdout)
    assert (row["bos"], row["windows"], row["reference"]) == (True, 30, None)


def test_notes_go_to_stderr(folder, text_file):
    result = run("evaluate", folder, "--text", text_file, "--windows", 999, "--window-tokens", 100)
    assert "30 windows of the 999" in " ".join(result.stderr.split())
    assert "30 windows of the 999" not in " ".join(result.stdout.split())


def test_errors_reach_the_caller(folder):
    with pytest.raises(UsageError):
        run("evaluate", folder, "--text", "/no/such/text")


def test_generate_streams_to_stdout(folder):
    streamed = run("generate", folder, "-p", "hello", "--max-tokens", 8, "--raw").stdout
    document = json.loads(run("generate", folder, "-p", "hello", "--max-tokens", 8, "--raw", "--json").stdout)
    assert streamed == plain(document["text"]) + "\n"


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_help_is_there(command):
    assert "--json" in run(command, "--help").stdout


def test_generate_with_a_quantized_cache(folder):
    with pytest.raises(UsageError, match=r"q4_0 is run by llama\.cpp"):
        run("generate", folder, "-p", "hello", "--raw", "--kv-cache", "q4_0")
    with pytest.raises(UsageError, match="there is no cache type 'in4'"):
        run("generate", folder, "-p", "hello", "--raw", "--kv-cache", "in4")
