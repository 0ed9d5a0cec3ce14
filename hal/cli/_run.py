"""``hal run``: a bundle on arrays from files, on random inputs, on a prompt, or in a chat."""

from __future__ import annotations

import hashlib
import json as json_module
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._generate import Task, run_task
from hal.cli._options import (
    BundlePath,
    Dims,
    Json,
    Limit,
    Target,
    Threads,
    open_bundle,
    parse_dims,
    survived,
)
from hal.cli._output import print_json, print_line, print_table
from hal.errors import InputError

if TYPE_CHECKING:
    from hal.runtime.session import Session

EXAMPLE = "Example: hal run my-model.hal --target host:tvm --input x=x.npy -o result.npz"


def run_command(
    bundle: BundlePath,
    target: Target = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", metavar="NAME=FILE.npy", help="An input; repeatable."),
    ] = None,
    random_inputs: Annotated[
        bool, typer.Option("--random-inputs", help="Make up the inputs that are not given.")
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of random inputs and of sampling.")
    ] = 0,
    dim: Dims = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Text to continue (language models).")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Chat: a message a line from stdin, or --prompt as the only one."
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="The system message of a chat.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the draw; 0: always the best token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Draw from the K best tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Draw from the best tokens that have this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Draw from tokens this fraction as likely as the best."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: what occurred is less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends generation; repeatable.")
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option("--prompt-lookup", metavar="N", help="Guess N tokens ahead from the context."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option("--json-schema", metavar="FILE", help="A JSON schema that the text keeps to."),
    ] = None,
    load_state: Annotated[
        Path | None,
        typer.Option(
            "--load-state", metavar="FILE", help="Go on from a state; --prompt comes next."
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option("--save-state", metavar="FILE", help="Save the state after the text."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print rates and the size of the carried state.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.npz", help="Where the outputs are written."),
    ] = None,
    threads: Threads = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Run a bundle once; print each output's shape and digest, or the generated text."""
    generates = prompt is not None or chat or load_state is not None
    if not generates and not inputs and not random_inputs:
        raise InputError(
            "there is nothing to run on",
            "give --input name=file.npy, --random-inputs, --prompt or --chat",
        )
    if system is not None and not chat:
        raise InputError("--system is given without --chat", "add --chat, or leave it out")
    _check_combination(
        generates,
        {"--input": inputs, "--random-inputs": random_inputs, "--dim": dim, "--output": output},
        {"--save-state": save_state},
    )
    if system is not None and load_state is not None:
        raise InputError(
            "--system is given for a conversation that goes on", "it belongs at its beginning"
        )
    for option, file in (("--save-state", save_state), ("--output", output)):
        if file is not None:
            _check_place(option, file)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
        "prompt_lookup": prompt_lookup,
        "response_format": None if json_schema is None else _response_format(json_schema),
    }
    opened = open_bundle(bundle)

    def work() -> None:
        with opened.session(target, threads=threads) as session:
            if generates:
                task = Task(prompt, chat, system, load_state, save_state, options, stats, json)
                run_task(session, task)
                return
            arrays = read_arrays(inputs or [])
            if random_inputs:
                arrays = {**_random(session, seed, parse_dims(dim or [])), **arrays}
            outputs = session.run(arrays)
            name = session.target
        if output is not None:
            write_arrays(output, outputs)
        _print_outputs(name, outputs, output, json)

    if chat:
        work()  # it reads what is typed, which a process of its own would not get
    else:
        survived(opened, target, work, limit)


def _check_combination(
    generates: bool, for_arrays: Mapping[str, object], for_text: Mapping[str, object]
) -> None:
    """Refuse options that would have no effect.

    Raises:
        InputError: text is generated and an option is for arrays, or the other way round.
    """
    kind = "generating text" if generates else "a run on arrays"
    for option, value in (for_arrays if generates else for_text).items():
        if value:
            raise InputError(f"{option} has no effect on {kind}", "leave it out")


def _check_place(option: str, file: Path) -> None:
    """Refuse a file that cannot be written, before the work.

    Raises:
        InputError: its folder is missing or read-only, or it is a folder itself.
    """
    if file.is_dir():
        raise InputError(f"{option}: cannot write {file}: it is a folder", "name a file")
    if not file.parent.is_dir():
        raise InputError(
            f"{option}: cannot write {file}: there is no folder {file.parent}", "make it first"
        )
    if not os.access(file.parent, os.W_OK):
        raise InputError(
            f"{option}: cannot write {file}: its folder is read-only", "choose another place"
        )


def _response_format(file: Path) -> dict[str, Any]:
    """The generation option for a file with a schema.

    Raises:
        InputError: the file cannot be read or is no JSON.
    """
    try:
        schema = json_module.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--json-schema: cannot read {file} ({error})", "give a file with a JSON schema"
        ) from None
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _random(session: Session, seed: int, extents: Mapping[str, int]) -> dict[str, Any]:
    from hal.runtime.samples import sample_inputs

    metadata = session.bundle.manifest.metadata
    return sample_inputs(session.inputs, seed=seed, extents=extents, metadata=metadata)


def read_arrays(texts: Iterable[str]) -> dict[str, Any]:
    """Read ``name=file.npy`` options.

    Raises:
        InputError: the option does not read so, or the file is missing or no ``.npy`` file.
    """
    import numpy as np

    arrays: dict[str, Any] = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if not separator or not name or not file:
            raise InputError(
                f"--input {text!r} is not name=file.npy", "for example --input x=x.npy"
            )
        try:
            arrays[name] = np.load(file, allow_pickle=False)
        except FileNotFoundError:
            raise InputError(f"--input {name}: no such file: {file}", "check the path") from None
        except (ValueError, EOFError, OSError) as error:
            raise InputError(
                f"--input {name}: {file} is no .npy file ({error})", "write it with numpy.save"
            ) from None
        if not isinstance(arrays[name], np.ndarray):
            raise InputError(
                f"--input {name}: {file} holds several arrays", "use one .npy for each"
            )
    return arrays


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an ``.npz`` under a temporary name and rename it.

    Raises:
        InputError: the file cannot be written.
    """
    import numpy as np

    plain: dict[str, Any] = {name: _plain(array) for name, array in arrays.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **plain)
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}", "choose another output"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """An array that can be stored without pickling: strings get numpy's own string type."""
    import numpy as np

    array = np.asarray(value)
    return array.astype(str) if array.dtype == object else array


def _print_outputs(
    target: str, outputs: Mapping[str, Any], written: Path | None, as_json: bool
) -> None:
    facts = [_facts(name, value) for name, value in outputs.items()]
    if as_json:
        place = None if written is None else str(written)
        print_json({"target": target, "outputs": facts, "written": place})
        return
    print_table(
        f"outputs on {target}",
        ("name", "dtype", "shape", "sha256"),
        [(f["name"], f["dtype"], f["shape"], f["sha256"][:16]) for f in facts],
    )
    if written is not None:
        print_line(f"wrote {written}")


def _facts(name: str, value: Any) -> dict[str, Any]:
    import numpy as np

    if isinstance(value, np.ndarray):
        plain = value.dtype != object
        data = np.ascontiguousarray(value).tobytes() if plain else repr(value.tolist()).encode()
        dtype = str(value.dtype) if plain else "string"
        return {
            "name": name,
            "dtype": dtype,
            "shape": list(value.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    text = repr(value)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"name": name, "dtype": type(value).__name__, "shape": [], "sha256": digest}
