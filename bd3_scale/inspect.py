"""Show what a checkpoint holds, and verify it.

    bd3 inspect runs/quickstart                      # the latest of a run
    bd3 inspect checkpoints/step_00001000 --verify   # compare every byte with its recorded hash
    bd3 inspect checkpoints/step_00001000 --json

Prints step, samples, parameters, kinds, tensors with their shapes, files and versions. Exit status 1, with one line that
says what is wrong, for anything that is not a whole checkpoint. Changes nothing.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from bd3_scale.checkpoint.index import FORMAT_VERSION
from bd3_scale.checkpoint.region import Region
from bd3_scale.checkpoint.store import Checkpoint, locate
from bd3_scale.errors import UserError
from bd3_scale.program import run_program


def describe(checkpoint: Checkpoint, verified: bool) -> dict[str, Any]:
    """Everything that is shown, as one JSON document."""
    index = checkpoint.index
    shapes: dict[str, tuple[int, ...]] = {}
    for kind in checkpoint.kinds:
        shapes.update(checkpoint.shapes(kind))
    return {
        "path": str(checkpoint.path),
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "samples_consumed": checkpoint.samples_consumed,
        "parameters": checkpoint.parameter_count,
        "kinds": {kind: len(checkpoint.shapes(kind)) for kind in checkpoint.kinds},
        "tensors": [
            {
                "name": name,
                "shape": list(shape),
                "elements": Region.whole(shape).numel,
                "kinds": [kind for kind in checkpoint.kinds if name in checkpoint.shapes(kind)],
                "parts": max(len(names[name].parts) for names in index.tensors.values() if name in names),
            }
            for name, shape in sorted(shapes.items())
        ],
        "files": {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in sorted(index.files.items())},
        "bytes": sum(record.bytes for record in index.files.values()),
        "versions": checkpoint.versions,
        "run": checkpoint.run,
        "verified": verified,
    }


def show(document: dict[str, Any]) -> None:
    """The same for people."""
    print(f"checkpoint   {document['path']} (format {document['format_version']})")
    print(f"step         {document['step']:,}; {document['samples_consumed']:,} samples consumed")
    print(f"parameters   {document['parameters']:,} in {document['kinds'].get('weight', 0)} tensors")
    print(f"kinds        {', '.join(document['kinds'])}")
    print(f"versions     {', '.join(f'{package} {version}' for package, version in sorted(document['versions'].items()))}")
    print(f"size         {document['bytes']:,} bytes in {len(document['files'])} files and the index")
    for name, record in document["files"].items():
        print(f"  {name}  {record['bytes']:>15,}  sha256 {record['sha256'][:16]}...")
    print("tensors")
    width = max(len(tensor["name"]) for tensor in document["tensors"])
    for tensor in document["tensors"]:
        shape = " x ".join(str(extent) for extent in tensor["shape"]) or "scalar"
        kinds = "" if tensor["kinds"] == list(document["kinds"]) else f"  only {', '.join(tensor['kinds'])}"
        parts = f"  in {tensor['parts']} parts" if tensor["parts"] > 1 else ""
        print(f"  {tensor['name']:<{width}}  {shape}{parts}{kinds}")
    print("run")
    for key, value in sorted(document["run"].items()):
        text = json.dumps(value, ensure_ascii=False)
        print(f"  {key}: {text if len(text) <= 120 else text[:117] + '...'}")
    print(
        "verified     every file has its recorded size and SHA-256"
        if document["verified"]
        else "not verified: sizes and index are sound; --verify compares every byte"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bd3 inspect", description="Show what a checkpoint holds, and verify it.")
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run directory (its latest is taken)")
    parser.add_argument("--verify", action="store_true", help="compare size and SHA-256 of every file with the index")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        checkpoint = Checkpoint(locate(options.checkpoint))
        if options.verify:
            checkpoint.verify_files()
        document = describe(checkpoint, options.verify)
    except UserError as error:
        return error.say("bd3 inspect")
    if options.json:
        print(json.dumps(document, ensure_ascii=False, indent=1))
    else:
        show(document)
    return 0


if __name__ == "__main__":
    run_program(main)
