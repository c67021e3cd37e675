"""Every model type that transformers can build, through lowbit: quantize, verify, load, compare, calibrate.

    python benchmarks/model_types.py [TYPE ...] [--json FILE] [--write docs/models.md] [--workers 2] [--keep FOLDER]

Given types, --write renews their rows and leaves the others.

For each type a tiny random model (tests/tiny_types.py) goes through these stages, in a process of its own with limits
of time and memory; a stage that fails leaves its reason, and what needs its output is left out:

    built    transformers makes the model, and it continues a text with finite logits
    rtn      lowbit quantize --scheme W4A16 --group-size 32; then every weight of the source stands in the report,
             quantized or with the reason why not
    verify   lowbit verify, with the source at hand
    loads    transformers loads the result with compressed-tensors, and its logits are those of lowbit.load, within a
             part of their spread (TOLERANCES). "loader": it does so with a folder made with --loader transformers, in
             which as many weights are quantized; "part": with one in which fewer are. "dequantized": with
             CompressedTensorsConfig(dequantize=True) only. "lowbit": lowbit.load alone gave finite logits. Where it is
             not the first, lowbit verify --engine transformers has to say so, and the row has the reason. A folder that
             loads although the command says no is a failure
    gptq     lowbit quantize --method gptq --samples 8 --seqlen 64; the share of the quantized weights whose codes the
             text chose

The last column is the share of the weights of matrices in decoder blocks that are quantized, in bytes of 16 bits.
The exit status is 1 if anything but a LowbitError came out of lowbit, or if a stage gave a wrong result.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

TEXT = list(range(3, 19))
GROUP_SIZE = 32
# The same weights give the same logits in bfloat16, except where transformers computes a quantized layer another way;
# in float32 that does not matter, but transformers rounds the decoded weights of experts to bfloat16 there.
TOLERANCES = {"bfloat16": 1e-3, "float32": 0.02}
SECONDS = 180
BYTES = 12 * 2**30  # address space of one type's process; torch alone takes 5
DECODED = 0.05  # the same where transformers decodes as it loads, which rounds decoded weights once more
STAGES = ("built", "rtn", "verify", "loads", "gptq")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--write", type=Path, help="a document whose table between <!-- types --> and <!-- end --> is renewed"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep the models here")
    args = parser.parse_args()
    names = prepare()
    names = args.types or names
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        with ThreadPoolExecutor(args.workers) as pool:
            rows = list(pool.map(lambda name: shown(run_apart(name, folder / name, keep=args.keep is not None)), names))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        args.write.write_text(renewed(text, rows, whole=not args.types), encoding="utf-8")
    print(summary(rows))
    return int(any(row.get("crashed") for row in rows))


def prepare() -> list[str]:
    """All types. What every process needs is imported here once: the processes are forks of this one."""
    import torch
    import transformers

    import lowbit
    from tiny_types import model_types

    del lowbit
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        sweep = _Sweep("llama", Path(scratch))
        for stage in STAGES:
            sweep.stage(stage)
    return list(model_types())


def run_apart(name: str, folder: Path, keep: bool) -> dict[str, Any]:
    """The row of one type, from a process of its own."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, folder, writer))
    started = time.perf_counter()
    process.start()
    writer.close()
    row: dict[str, Any] = {"type": name}
    while time.perf_counter() - started < SECONDS:
        if reader.poll(0.2):
            try:
                found = reader.recv()
                reasons = [each["reason"] for each in (row, found) if "reason" in each]
                row |= found | ({"reason": "; ".join(reasons)} if reasons else {})
            except EOFError:
                break
    else:
        row |= failed(row, f"took more than {SECONDS} s")
        process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        row |= failed(row, f"its process ended with {process.exitcode}")
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def failed(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """The stage after the last finished one did not come to an end."""
    stage = next((stage for stage in STAGES if stage not in row), STAGES[-1])
    return {stage: "failed", "reason": f"{stage}: {reason}", "crashed": True}


def _child(name: str, folder: Path, writer: Any) -> None:
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    folder.mkdir(parents=True, exist_ok=True)
    sweep = _Sweep(name, folder)
    for stage in STAGES:
        found = sweep.stage(stage)
        found |= {key: found[key].replace(f"{folder}/", "") for key in ("reason", "refusal") if key in found}
        writer.send(found)
        if found.get(stage) == "failed" and stage in ("built", "rtn"):
            break
    writer.close()
    os._exit(0)  # a fork of a thread has the pool's exit handler, but not the threads that it joins


class _Sweep:
    """One type on its way; each stage reads what those before it left in `folder`."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.source, self.quantized = folder / "source", folder / "quantized"
        self.share = 0.0

    def stage(self, stage: str) -> dict[str, Any]:
        """{stage: what came out} or {stage: "failed" or "refused", "reason": why}."""
        from lowbit.errors import LowbitError

        try:
            return getattr(self, stage)()
        except LowbitError as error:
            return {stage: "refused" if stage == "gptq" else "failed", "reason": f"{stage}: {one_line(error)}"}
        except NotMade as error:
            return {stage: "failed", "reason": one_line(error, kind=False)}
        except Exception as error:  # anything else is a mistake somewhere, and the row says where
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            return {stage: "failed", "reason": f"{stage}: {one_line(error)} ({place})", "crashed": stage != "built"}

    def built(self) -> dict[str, Any]:
        import torch

        from tiny_type_rows import NOT_MADE, NOT_RUN
        from tiny_types import build_tiny

        if self.name in NOT_MADE:
            raise NotMade(NOT_MADE[self.name])
        try:
            model = build_tiny(self.name)
        except ImportError as error:
            raise NotMade(f"needs a package: {one_line(error)}") from None
        if self.name not in NOT_RUN and not self.logits(model).isfinite().all():
            raise NotMade("its logits are not finite")
        save(model.to(torch.bfloat16), self.source)
        return {"built": "yes" if self.name not in NOT_RUN else "not run", "class": type(model).__name__}

    def logits(self, model: Any) -> Any:
        import torch

        from tiny_type_rows import inputs

        given = inputs(self.name, model.config, torch.tensor([TEXT]))
        given = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in given.items()}
        torch.manual_seed(0)  # some draw noise that they continue
        with torch.inference_mode():
            return model(**given, use_cache=False).logits.float()

    def rtn(self) -> dict[str, Any]:
        row, listed = self.rounded(self.quantized)
        self.share = row["share"]
        weights = stored_weights(self.source)
        if listed != weights:
            return {
                **row,
                "rtn": "failed",
                "reason": f"rtn: {weights} weights, {listed} in the report",
                "crashed": True,
            }
        return {**row, "rtn": "ok"}

    def rounded(self, output: Path, **more: Any) -> tuple[dict[str, Any], int]:
        """({"share": of the decoder's weights that are quantized, "kept": why others are not}, weights reported)."""
        import lowbit

        entries = lowbit.quantize(self.source, output, scheme="W4A16", group_size=GROUP_SIZE, **more).report.tensors
        matrices = [entry for entry in entries if entry.block is not None and len(entry.shape) > 1]
        quantized = sum(math.prod(entry.shape) for entry in matrices if entry.scheme is not None)
        kept = sorted({f"{entry.role}: {entry.reason}" for entry in matrices if entry.scheme is None})
        share = quantized / max(1, sum(math.prod(entry.shape) for entry in matrices))
        return {"share": share, "kept": kept}, sum(math.prod(entry.shape) for entry in entries)

    def verify(self) -> dict[str, Any]:
        import lowbit

        verification = lowbit.verify(self.quantized)
        broken = [f"{check.rule}: {check.detail}" for check in verification.broken]
        if broken:
            return {"verify": "failed", "reason": f"verify: {broken[0]}", "crashed": True}
        return {"verify": "ok" if verification.ok else "limits"}

    def loads(self) -> dict[str, Any]:
        import torch

        import lowbit
        from tiny_type_rows import NOT_RUN

        own, _ = lowbit.load(self.quantized, dtype=torch.float32)
        if self.name in NOT_RUN:
            return {"loads": "not run"}
        if not self.logits(own).isfinite().all():
            raise ValueError("the logits of lowbit.load are not finite")
        row = self.loads_in_transformers(self.quantized)
        return row if "refusal" not in row else row | self.loads_where_written_for_it(row["refusal"])

    def loads_where_written_for_it(self, refusal: str) -> dict[str, Any]:
        """{"loads": "loader" or "part"} where transformers loads the folder of --loader transformers."""
        folder = self.folder / "for_transformers"
        share = self.rounded(folder, loader="transformers")[0]["share"]
        row = self.loads_in_transformers(folder)
        if row["loads"] == "failed":
            return row
        if row["loads"] != "transformers" or share == 0:
            return {}
        if math.isclose(share, self.share, rel_tol=1e-6):
            return {"loads": "loader", "refusal": refusal}
        said = f"with --loader transformers it loads, and {100 * share:.0f} % is quantized"
        return {"loads": "part", "refusal": f"{refusal}; {said}"}

    def loads_in_transformers(self, folder: Path) -> dict[str, Any]:
        import torch

        import lowbit

        foretold = lowbit.verify(folder, engine="transformers")
        said = "; ".join(f"{check.rule}: {check.detail}" for check in foretold.failed)
        config = json.loads((folder / "config.json").read_text())
        decodes = config["quantization_config"].get("dequantize", False)
        outcomes, wrong = [], False
        for dtype, tolerance in (TOLERANCES | ({"float32": DECODED} if decodes else {})).items():
            try:
                difference = self.difference(folder, getattr(torch, dtype))
            except Exception as error:  # whatever transformers raises is what it says of the folder
                outcomes.append(f"{one_line(error)} in {dtype}")
                continue
            if difference < tolerance:
                if foretold.ok:
                    return {"loads": "transformers", "difference": difference}
                return {"loads": "failed", "reason": f"loads: it does, but {said}", "crashed": True}
            wrong = True
            outcomes.append(f"logits differ by {difference:.2g} of their spread in {dtype}")
        if "dequantize=True" in said and self.difference(folder, torch.float32, dequantize=True) < DECODED:
            return {"loads": "dequantized", "refusal": said}
        if not foretold.ok:
            return {"loads": "lowbit", "refusal": said}
        row = {"loads": "failed" if wrong else "lowbit", "reason": f"loads: {', '.join(outcomes)}"}
        return row | ({"crashed": True} if wrong else {})

    def difference(self, folder: Path, dtype: Any, dequantize: bool = False) -> float:
        """Of the logits of transformers from those of lowbit.load, as a part of the spread of the logits."""
        import transformers

        import lowbit

        (named,) = json.loads((folder / "config.json").read_text())["architectures"]
        asked = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
        theirs = getattr(transformers, named).from_pretrained(folder, dtype=dtype, **asked).eval()
        ours, _ = lowbit.load(folder, dtype=dtype)
        take_computed_buffers(ours, theirs)
        wanted = self.logits(ours)
        return ((self.logits(theirs) - wanted).abs().max() / wanted.std()).item()

    def gptq(self) -> dict[str, Any]:
        import lowbit

        output = self.folder / "gptq"
        made = lowbit.quantize(self.source, output, scheme="W4A16", group_size=GROUP_SIZE, method="gptq", samples=8,
                               seqlen=64)  # fmt: skip
        quantized = [entry for entry in made.report.tensors if entry.scheme is not None]
        chosen = sum(math.prod(entry.shape) for entry in quantized if entry.method == "gptq")
        return {"gptq": "ok", "chosen": chosen / max(1, sum(math.prod(entry.shape) for entry in quantized))}


class NotMade(Exception):
    """transformers gives no model of the type."""


def take_computed_buffers(model: Any, other: Any) -> None:
    """Give a model the buffers that the other's class computed and no file stores: transformers computes some of them
    in bfloat16 where it loads in bfloat16."""
    for name, module in other.named_modules():
        for buffer in module._non_persistent_buffers_set:
            value = module._buffers[buffer]
            if value is not None:
                model.get_submodule(name)._buffers[buffer] = value


def save(model: Any, folder: Path) -> None:
    from models import make_tokenizer

    model.save_pretrained(folder)
    make_tokenizer(folder)


def stored_weights(folder: Path) -> int:
    """Numbers in the safetensors files of a folder."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total


def one_line(error: BaseException, kind: bool = True) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if kind else text


def shown(row: dict[str, Any]) -> dict[str, Any]:
    cells = " ".join(f"{row.get(stage, ''):12s}" for stage in STAGES)
    share = f"{100 * row['share']:.0f} %" if "share" in row else ""
    print(
        f"{row['type']:28s} {cells} {share:6s} {row['seconds']:5.1f} s  {row.get('reason') or row.get('refusal', '')}",
        flush=True,
    )
    return row


def renewed(text: str, rows: list[dict[str, Any]], whole: bool) -> str:
    """A document with the table of these rows; `whole`: with no others."""
    head, _, rest = text.partition("<!-- types -->")
    table, _, tail = rest.partition("<!-- end -->")
    titles, rule, *new = markdown(rows).splitlines()
    kept = [] if whole else table.strip().splitlines()[2:]
    by_type = {line.split("|")[1].strip(" `"): line for line in (*kept, *new)}
    lines = [titles, rule, *(by_type[name] for name in sorted(by_type))]
    return head + "<!-- types -->\n\n" + "\n".join(lines) + "\n\n<!-- end -->" + tail


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| type | built | rtn | verify | loads | gptq | quantized | why |", "|---|---|---|---|---|---|---:|---|"]
    for row in rows:
        share = f"{100 * row['share']:.0f} %" if "share" in row else ""
        why = (
            "; ".join(filter(None, (row.get("refusal"), row.get("reason")))) or "; ".join(row.get("kept", []))
        ).replace("|", "\\|")
        cells = [f"`{row['type']}`", *(row.get(stage, "") for stage in STAGES), share, why]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    good = {"built": ("yes", "not run"), "rtn": ("ok",), "verify": ("ok", "limits"),
            "loads": ("transformers", "loader", "dequantized", "not run"), "gptq": ("ok",)}  # fmt: skip
    counts = ", ".join(f"{stage} {sum(row.get(stage) in good[stage] for row in rows)}" for stage in STAGES)
    return f"{len(rows)} types: {counts}"


if __name__ == "__main__":
    sys.exit(main())
